"""A configuration is what it says, or is refused with every fault at once."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ham_jax import config as configuration
from ham_jax.config import InputError

OLD = Path(__file__).with_name("config_86e8317.json")  # that commit's to_dict(base())
KEYS = sorted(configuration.flatten(configuration.base()))


def faults_of(config, **kwargs):
    with pytest.raises(InputError) as error:
        configuration.validate(config, **kwargs)
    return error.value.faults


@pytest.mark.parametrize(
    "file",
    [
        *("resnet.py", "resnet.py:34", "resnet.py:50", "efficientnet_lite.py:2", "demo.py"),
        *("convnext.py", "convnext.py:tiny-imagenet", "resnet.py:50-imagenet"),
    ],
)
def test_every_config_file_is_valid(file, request):
    configuration.validate(configuration.load(f"{request.config.rootpath}/configs/{file}"))


@pytest.mark.parametrize("key", configuration.KEYS, ids=lambda key: key.name)
def test_every_key_is_documented_and_its_default_is_allowed(key):
    assert key.doc[0].isupper() or key.doc[0] == "("
    assert key.doc.endswith((".", ")."))
    assert "|" not in key.doc  # which would split a row of docs/keys.md
    assert configuration.faults_of(key.name, key.default) == []
    assert key.optional is None or key.default is None
    if key.range and not key.is_duration:
        assert configuration.faults_of(key.name, type(key.default)(key.range[0])) == []
        assert configuration.faults_of(key.name, key.range[0] - 1) != []
    assert configuration.faults_of(key.name, object()) != []


def test_every_text_is_a_path_or_has_choices():
    texts = [key for key in configuration.KEYS if key.kind is str]
    named_by_their_rooms = {"model.name", "loss.imbalance", "optim.name"}
    without = {key.name for key in texts if not key.is_path and not key.choices}
    assert without == named_by_their_rooms
    assert not any(key.is_path and key.choices for key in texts)


def test_the_page_of_keys_is_what_the_table_says(request):
    page = request.config.rootpath / "docs/keys.md"
    assert page.read_text() == configuration.markdown(), (
        "Run python -m ham_jax.config > docs/keys.md"
    )


def test_a_configuration_of_an_earlier_version_is_converted():
    old = json.loads(OLD.read_text())
    config = configuration.from_dict(old)
    configuration.validate(config)
    assert configuration.differences(config, configuration.base()) == {}
    values, now = configuration.flatten(old), configuration.flatten(configuration.to_dict(config))
    gone = {"optim.schedule", "augment.shear", "loss.effective_beta"}
    assert values.keys() - now.keys() == gone
    assert all(now[name] == values[name] for name in values.keys() - gone)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [("optim", "schedule", "constant"), ("augment", "shear", 0.1)],
)
def test_a_removed_key_that_was_in_use_is_refused(section, name, value):
    old = json.loads(OLD.read_text())
    old["loss"]["effective_beta"] = 0.9  # of no effect without its loss
    old[section][name] = value
    with pytest.raises(InputError) as error:
        configuration.from_dict(old)
    (fault,) = error.value.faults
    assert fault.startswith(f"{section}.{name} = {value!r}: this version of ham_jax no longer has")
    configuration.validate(configuration.from_dict(old, is_trained=True))  # it is only asked
    (fault,) = configuration.override(configuration.base(), [(f"{section}.{name}", str(value))])
    assert "no longer has this key; leave it out." in fault


@pytest.mark.parametrize(
    ("section", "name", "value", "instead"),
    [
        ("optim", "name", "lamb", "adamw"),
        ("loss", "imbalance", "effective_number", "sqrt"),
        ("eval", "calibration", "vector", "temperature"),
    ],
)
def test_a_removed_choice_is_refused_unless_it_is_set_anew(section, name, value, instead):
    old = json.loads(OLD.read_text())
    old[section][name] = value
    config = configuration.from_dict(old)
    (fault,) = faults_of(config)
    assert fault.startswith(f"{section}.{name} = {value!r} is no longer available: ")
    asked = configuration.from_dict(old, is_trained=True)
    if section != "eval":  # of a trained run its training does not matter
        configuration.validate(asked)
    assert configuration.override(config, [(f"{section}.{name}", instead)]) == []
    configuration.validate(config)


def test_overrides_take_the_type_of_their_key():
    c = configuration.base()
    texts = [
        ("train.batch_size", "32"),
        ("optim.learning_rate", "1"),
        ("data.download", "true"),
        ("data.canvas", "(450, 600)"),
        ("data.test_dir", "isic/test"),
        ("data.split_seed", "None"),
        ("train.duration", "{'steps': 10}"),
        ("eval.every.epochs", "0.5"),
        ("log.profile", "[3, 5]"),
    ]
    assert configuration.override(c, texts) == []
    assert (c.train.batch_size, c.optim.learning_rate, c.data.download) == (32, 1.0, True)
    assert (c.data.canvas, c.data.test_dir, c.data.split_seed) == ((450, 600), "isic/test", None)
    assert dict(c.train.duration) == {"steps": 10}
    assert dict(c.eval.every) == {"epochs": 0.5}
    assert c.log.profile == (3, 5)
    configuration.validate(c)


def test_all_faults_of_a_command_line_are_named_at_once():
    c = configuration.base()
    faults = configuration.override(
        c,
        [
            ("train.batch_sze", "3"),
            ("crop_px", "64"),
            ("data", "x"),
            ("augment.crop_px", "wide"),
            ("train.duration.weeks", "3"),
            ("seed", "1.5"),
            ("optim.freeze", "stem"),
        ],
    )
    assert len(faults) == 7
    assert "Did you mean 'train.batch_size'?" in faults[0]
    assert "Did you mean 'augment.crop_px'?" in faults[1]
    assert "is a section" in faults[2]
    assert all("this is not" in fault for fault in faults[3:])


def test_all_faults_of_the_values_are_named_at_once():
    c = configuration.base()
    c.data.feed = "streem"
    c.data.fold = 7
    c.train.batch_size = 30
    c.eval.weights = "ema"
    c.optim.freeze = ("(",)
    c.augment.crop_scale = (0.9, 0.1)
    faults = faults_of(c, num_devices=4)
    assert len(faults) == 6
    assert "Did you mean 'stream'?" in faults[0]
    assert "32 can" in next(f for f in faults if "batch_size" in f)


def test_unknown_and_missing_keys_of_a_config_file_are_named():
    c = configuration.base()
    c.train.batchsize = 3
    del c.seed
    faults = faults_of(c)
    assert any("train.batchsize" in f and "'train.batch_size'" in f for f in faults)
    assert "seed is missing." in faults


@settings(deadline=None)  # how busy the machine is proves nothing
@given(st.sampled_from(KEYS), st.text(max_size=12))
def test_any_text_for_any_key_is_set_or_refused_never_a_crash(key, text):
    c = configuration.base()
    faults = configuration.override(c, [(key, text)])
    try:
        configuration.validate(c)
    except InputError as error:
        faults += error.faults
    back = configuration.from_dict(configuration.to_dict(c))
    assert configuration.to_dict(back) == configuration.to_dict(c)
    assert all(key.split(".")[-1] in fault or key in fault for fault in faults)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((0.5, 128), "0.5 must be"),
        (((1.0, 128),), "between 0 and 1"),
        (((0.5, 8),), "from 16"),
        (((0.5, 128), (0.5, 160)), "must increase"),
    ],
)
def test_growing_crops_are_pairs_of_increasing_shares(sizes, says):
    c = configuration.base()
    c.augment.progressive = sizes
    assert any("augment.progressive" in fault and says in fault for fault in faults_of(c))


@pytest.mark.parametrize(
    ("tiles", "crop_scale", "grid"),
    [
        (1, 0.2, (1, 1)),
        (2, 1.0, (1, 2)),
        (4, 1.0, (1, 4)),  # not 2 x 2: the rows would be the same
        (4, 224 / 300, (2, 2)),
        (6, 224 / 300, (2, 3)),
        (8, 224 / 300, (2, 4)),
        (16, 224 / 300, (4, 4)),
        (12, 1 / 3, (3, 4)),
    ],
)
def test_squares_cover_the_canvas_evenly(tiles, crop_scale, grid):
    c = configuration.base()
    c.data.canvas = (300, 400)
    c.eval.tiles, c.eval.crop_scale = tiles, crop_scale
    configuration.validate(c)
    assert configuration.tile_grid(c) == grid


@pytest.mark.parametrize(
    ("tiles", "crop_scale", "says"),
    [(5, 0.75, "1, 4, 6, 8, 9 can"), (4, 1 / 3, "1, 12, 15, 16, 18 can"), (0, 0.75, "[1, 256]")],
)
def test_squares_that_cannot_cover_the_canvas_are_refused(tiles, crop_scale, says):
    c = configuration.base()
    c.data.canvas = (300, 400)
    c.eval.tiles, c.eval.crop_scale = tiles, crop_scale
    (fault,) = faults_of(c)
    assert f"eval.tiles = {tiles}" in fault
    assert says in fault


def test_only_keys_that_change_the_numbers_make_it_another_run():
    a, b = configuration.base(), configuration.base()
    b.data.dir, b.data.feed, b.log.every_steps, b.eval.tta = "elsewhere", "stream", 1, 8
    assert configuration.differences(a, b) == {}
    b.train.batch_size = 128
    b.train.duration = {"steps": 5}
    assert configuration.differences(a, b) == {
        "train.batch_size": (64, 128),
        "train.duration": ({"epochs": 30.0}, {"steps": 5}),
    }


def test_durations_in_steps():
    assert configuration.num_steps({"epochs": 2.5}, 10.2) == 26
    assert configuration.num_steps({"steps": 7}, 10.2) == 7
    assert configuration.num_steps({"epochs": 0.001}, 10) == 1
    assert configuration.num_steps({"epochs": 0.0}, 10) == 0
