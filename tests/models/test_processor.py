import pytest

from ham_jax.models import processor


@pytest.mark.parametrize(
    ("text", "family"),
    [
        ("vendor_id\t: Intel\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", "avx512"),
        ("flags\t\t: fpu avx2\n\nflags\t\t: fpu avx2\n", "avx2"),
        ("Features\t: fp asimd\n", "other"),
        (None, "other"),
    ],
)
def test_the_family_is_read_off_the_flags(text, family, tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(processor, "_CPUINFO", path)
    processor.flags.cache_clear()
    try:
        about = processor.describe()
    finally:
        processor.flags.cache_clear()
    assert about["family"] == family
    assert about["flags"] == processor.UNKNOWN if text is None else "fp" in " ".join(about["flags"])
