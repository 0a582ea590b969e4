"""The benchmark counts what it says it counts."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

from ham_jax.models import conv, processor

SPEED = Path(__file__).parents[2] / "benchmarks" / "speed.py"
spec = importlib.util.spec_from_file_location("speed", SPEED)
speed = importlib.util.module_from_spec(spec)
spec.loader.exec_module(speed)

OBEDIENT = """
import json, sys
print(json.dumps({"parameters": 7}), flush=True)
for line in sys.stdin:
    print(json.dumps(2 * int(line)), flush=True)
"""


def test_a_contestant_answers_for_itself_and_ends_when_it_is_left():
    with speed.Contestant("peer", [sys.executable, "-c", OBEDIENT]) as peer:
        assert peer.about == {"parameters": 7}
        assert [peer.work(n) for n in (1, 21)] == [2, 42]
    with pytest.raises(RuntimeError, match="peer ended with 3"):
        speed.Contestant("peer", [sys.executable, "-c", "raise SystemExit(3)"])


def test_the_ratio_is_the_median_of_the_rounds_ratios():
    rates = {"ours": [10.0, 30.0, 20.0], "other": [10.0, 10.0, 40.0]}
    compared = speed.compared(rates)
    assert compared["ours"] == {"median": 20, "min": 10, "max": 30, "ratio": 1}
    assert compared["other"] == {"median": 10, "min": 10, "max": 40, "ratio": 1}


def test_a_turn_counts_only_what_follows_its_untimed_steps():
    told = []

    class Recorder:
        def work(self, amount):
            told.append(amount)
            return 0.5 * amount

    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(seconds=2.0):
        assert speed._turn(Recorder(), batch_size=8, untimed=3)() == 16
    assert told == [1, 3, 4]


def test_a_start_ends_with_its_sign_or_with_the_command():
    python = [sys.executable, "-c"]
    talks = [*python, "import time; print('ready', flush=True); time.sleep(0.5)"]
    assert speed._seconds_until("ready", talks, {}) + 0.4 < speed._seconds_until(None, talks, {})
    with pytest.raises(RuntimeError, match="broken"):
        speed._seconds_until(None, [*python, "raise SystemExit('broken')"], {})


def test_work_of_another_form_is_refused():
    flags.FLAGS.mark_as_parsed()
    with pytest.raises(flags.IllegalFlagValueError, match="model:pixels:batch"):
        flags.FLAGS.work = ["resnet18:128"]


@pytest.fixture
def one_small_work():
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(work=["resnet18:32:1"], seconds=0.01):
        yield "resnet18:32:1"


def test_the_fastest_forms_become_a_table_beside_those_of_other_processors(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    path.write_text('{"other": []}' if processor.family() != "other" else "{}")
    given = (8, 32, 32, 64), (3, 3, 64, 64), conv.Geometry(1, ((1, 1), (1, 1)))
    forms = conv.rule(*given)
    ms = [dict.fromkeys(names, 9.5) for names in conv.fitting(*given)]
    ms[0][forms.forward] = 10.0  # too close to the rule's
    ms[2] |= {forms.weight: 10.0, "rows": 5.0}
    parts = dict(zip(("forward", "input", "weight"), ms, strict=True))
    measured = {"x": given[0], "kernel": given[1], **given[2]._asdict(), "ms": parts}
    speed._write_table(path, [measured])
    monkeypatch.setenv(conv.TABLE, str(path))
    conv._table.cache_clear()
    assert conv.choose(*given) == forms._replace(weight="rows")
    assert len(json.loads(path.read_text())) == (2 if processor.family() != "other" else 1)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite2"])
def test_frozen_work_freezes_as_the_recipe_does(name):
    config, batch_size = speed._config_of(f"{name}:224:64:frozen")
    assert (batch_size, config.optim.freeze) == (64, ("/stem/", "/stage1/", "/stage2/"))
    assert speed._peer_command("torch_step", f"{name}:224:64:frozen")[-1] == "--frozen"


def test_every_convolution_of_the_network_is_counted(one_small_work, monkeypatch, capsys):
    def of_each_form(x, kernel, geometry):
        parts = ("forward", "input", "weight")
        fitting = conv.fitting(x, kernel, geometry)
        return {p: dict.fromkeys(names, 1.0) for p, names in zip(parts, fitting, strict=True)}

    monkeypatch.setattr(speed, "_time_forms", of_each_form)
    shapes = speed.conv()[one_small_work]
    assert sum(shape["count"] for shape in shapes) == 20
    for shape in shapes:
        for chosen, of_part in zip(shape["chosen"], shape["ms"].values(), strict=True):
            assert {"direct", chosen} <= set(of_part)
    # the gradient of the photograph is not asked for
    assert "chosen 59 ms, fastest 59 ms, direct 59 ms" in capsys.readouterr().out


@pytest.mark.usefixtures("one_small_work")
def test_forms_take_time():
    times = speed._time_forms((1, 4, 4, 16), (3, 3, 16, 16), conv.Geometry(1, ((1, 1), (1, 1))))
    assert set(times) == {"forward", "input", "weight"}
    assert {"direct", "inside", "rows"} <= set(times["weight"])
    assert all(ms > 0 for of_part in times.values() for ms in of_part.values())


def test_the_forms_of_the_crop_are_timed_and_compared(monkeypatch, capsys):
    monkeypatch.setattr(speed, "_CROPS", (((30, 40), 16, 8),))
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(seconds=0.01, rounds=1):
        (found,) = speed.crop()["rates"].values()
    assert list(found) == ["products", "products, turned", "gathers", "gathers, turned"]
    assert 0 < found["products"]["grey_levels_apart"] < 0.01
    assert "grey levels apart" in capsys.readouterr().out
