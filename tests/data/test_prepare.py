"""From a configuration to records with splits, with any classes."""

import pytest

from ham_jax import config
from ham_jax.config import InputError
from ham_jax.data import prepare


def asked(folder, **data):
    c = config.base()
    c.data.update(
        {
            "dir": str(folder / "raw"),
            "prepared_dir": str(folder / "prepared"),
            "canvas": (24, 32),
            "num_workers": 1,
            "num_folds": 2,
            **data,
        }
    )
    return c


@pytest.mark.parametrize("num_classes", [3, 12])
def test_the_demonstration_draws_any_classes(num_classes, tmp_path):
    names = tuple(f"kind {n}" for n in range(num_classes))
    data = {"classes": names, "synthetic_images": 8 * num_classes}
    whole = prepare.prepare(asked(tmp_path, **data, malignant=names[:1]))
    assert whole.records.classes.names == names
    assert whole.records.classes.malignant == names[:1]
    assert list(whole.audit.counts.index) == [*names, "total"]
    for split in ("train", "val"):
        assert set(whole.select(split).labels) == set(range(num_classes))
    again = prepare.prepare(asked(tmp_path, **data, malignant=names[1:2], titles=names[::-1]))
    assert again.records.folder == whole.records.folder  # which the two do not change
    assert again.records.classes.malignant == names[1:2]
    assert again.records.classes.title(names[0]) == names[-1]


def test_what_cannot_be_is_refused_before_any_work(tmp_path):
    with pytest.raises(InputError, match=r"fetches HAM10000, and data\.classes = "):
        prepare.prepare(asked(tmp_path, download=True, classes=("a", "b")))
    few = asked(tmp_path, synthetic_images=30, num_folds=5)
    with pytest.raises(InputError, match="too few for 7 classes with 5 lesions each") as error:
        prepare.prepare(few)
    assert list(tmp_path.iterdir()) == []
    few.data.synthetic_images = int(str(error.value).split(" or more")[0].split()[-1])
    assert prepare.prepare(few).select("val").labels.size
