"""What was saved comes back: on other devices, after damage, after a kill; the best is kept."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ham_jax import checkpoints, config, parallel
from ham_jax.config import InputError

ROOT = Path(__file__).parents[1]
ADAMW = optax.adamw(1e-3, mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params))
META = {"classes": ["mel", "nv"], "config": {"seed": 7, "model": {"name": "é"}}}


def mesh_of(num_devices):
    return jax.sharding.Mesh(np.array(jax.devices()[:num_devices]), ("data",))


def state_of(step, optimizer=None, with_ema=True):
    """Returns a state whose every value tells of which step it is."""
    optimizer = optimizer or optax.sgd(0.1, momentum=0.9, nesterov=True)
    params = {"conv": {"kernel": jnp.arange(24.0).reshape(2, 3, 4) + step}, "bias": jnp.ones(3)}
    stats = {"norm": {"mean": jnp.full(3, step, jnp.float32)}}
    _, opt_state = optimizer.update(jax.tree.map(jnp.sin, params), optimizer.init(params), params)
    return {
        "step": jnp.int32(step),
        "params": params,
        "batch_stats": stats,
        "opt_state": opt_state,
        "ema": {"params": params, "batch_stats": stats} if with_ema else {},
    }


def save(workdir, values, keep=2):
    """Saves a state at each step of {step: metric or None}."""
    with checkpoints.Checkpoints(workdir, keep) as saved:
        for step, value in values.items():
            numbers = None if value is None else {checkpoints.METRIC: value, "val/log_loss": 1.0}
            saved.save(step, parallel.replicate(mesh_of(8), state_of(step)), numbers, META)


def kept(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 8)])
@pytest.mark.parametrize(
    ("optimizer", "with_ema"), [(optax.sgd(0.1, momentum=0.9), True), (ADAMW, False)]
)
def test_a_state_returns_whole_on_other_devices(before, after, optimizer, with_ema, tmp_path):
    state = state_of(5, optimizer, with_ema)
    with checkpoints.Checkpoints(tmp_path) as saved:
        saved.save(5, parallel.replicate(mesh_of(before), state), None, META)
    with checkpoints.Checkpoints(tmp_path) as saved:
        restored, meta = saved.restore(None, jax.eval_shape(lambda: state), mesh_of(after))
    assert_equal(restored, state)
    assert meta == META
    for leaf in jax.tree.leaves(restored):
        assert leaf.sharding.device_set == set(jax.devices()[:after])
    params, batch_stats, ema, meta, step = checkpoints.load_for_inference(tmp_path)
    assert_equal((params, batch_stats, ema), (state["params"], state["batch_stats"], state["ema"]))
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves((params, batch_stats, ema)))
    assert (meta, step) == (META, 5)


@pytest.mark.parametrize("name", ["a[1]", "[2024] x", "[!a]*?", "{b} #%20ü", "$x ~'\"&,:y"])
def test_a_run_may_have_any_name(name, tmp_path, capfd):
    run = tmp_path / name / "run"
    with checkpoints.claimed(run):
        save(run, {1: 0.5, 2: 0.4})
    with checkpoints.Checkpoints(run) as saved:
        assert_equal(saved.restore(None, state_of(0), mesh_of(8))[0], state_of(2))
    params, *_, step = checkpoints.load_for_inference(run)
    assert_equal(params, state_of(step)["params"])
    assert step == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["a\\b", "gs:", os.fsdecode(b"\xe9")])
def test_a_name_that_cannot_be_written_under_is_refused(name, tmp_path):
    with (
        pytest.raises(InputError, match="Name another folder"),
        checkpoints.claimed(tmp_path / name),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_orbax_did_not_finish_is_not_called_whole(three_steps, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(three_steps, run)
    (run / "checkpoints/3/model/manifest.ocdbt").unlink()
    hashes = checkpoints._hashes(run / "checkpoints/3")
    hashes.pop("_CHECKPOINT_METADATA")
    (run / "checksums/3.json").write_text(json.dumps(hashes))  # as an earlier version wrote them
    assert checkpoints.load_for_inference(run, "latest")[-1] == 2
    assert "it was saved without" in caplog.text


FULL = """
    import resource, sys
    from pathlib import Path
    from ham_jax import checkpoints
    sys.path.insert(0, "tests")
    import test_checkpoints
    test_checkpoints.save(Path(sys.argv[1]), {1: 0.5})
    if sys.argv[2] == "within":
        checkpoints._reserve = lambda *_: None
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
    try:
        test_checkpoints.save(Path(sys.argv[1]), {2: 0.9})
    except checkpoints.InputError as error:
        print(error)
"""


@pytest.mark.parametrize("moment", ["before", "within"])
def test_a_disk_that_takes_no_more_is_one_sentence(moment, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(FULL), tmp_path, moment]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0
    assert "a checkpoint could not be written (File too large" in ended.stdout
    if moment == "before":
        assert ended.stderr == ""
    assert checkpoints.load_for_inference(tmp_path, "latest")[-1] == 1


def test_the_newest_and_the_best_stay_also_over_a_restart(tmp_path):
    save(tmp_path, {1: 0.5, 2: 0.9, 3: 0.7, 4: None})
    assert kept(tmp_path) == [2, 3, 4]
    save(tmp_path, {5: 0.8, 6: None, 7: None})
    assert kept(tmp_path) == [2, 6, 7]
    with checkpoints.Checkpoints(tmp_path) as saved:
        assert (saved.best(), saved.latest()) == (2, 7)
    assert checkpoints.load_for_inference(tmp_path, "best")[-1] == 2
    assert checkpoints.load_for_inference(tmp_path, "latest")[-1] == 7
    assert checkpoints.load_for_inference(tmp_path, 6)[-1] == 6
    save(tmp_path, {8: 0.9, 9: None, 10: None})  # of equals the later
    assert kept(tmp_path) == [8, 9, 10]
    assert checkpoints.load_for_inference(tmp_path)[-1] == 8


def test_unevaluated_steps_come_newest_first(tmp_path):
    save(tmp_path, {1: None, 2: None, 3: None})
    assert kept(tmp_path) == [2, 3]
    assert checkpoints.load_for_inference(tmp_path, "best")[-1] == 3


def remove(file):
    file.unlink()


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save(folder, {1: 0.1, 2: 0.2, 3: 0.3}, keep=3)
    return folder


@pytest.mark.parametrize("damage", [remove, truncate, flip])
@pytest.mark.parametrize("part", ["model/d/*", "progress/manifest.ocdbt", "metrics/metrics"])
def test_a_damaged_newest_is_named_and_the_one_before_used(
    damage, part, three_steps, tmp_path, caplog
):
    run = tmp_path / "run"
    shutil.copytree(three_steps, run)
    file = max((run / "checkpoints/3").glob(part), key=lambda path: path.stat().st_size)
    damage(file)

    caplog.clear()
    assert checkpoints.load_for_inference(run, "latest")[-1] == 2
    assert "step 3 is damaged" in caplog.text
    assert file.name in caplog.text
    assert kept(run) == [1, 2, 3]  # inference only reads

    caplog.clear()
    with checkpoints.Checkpoints(run) as saved:
        assert (saved.latest(), saved.best()) == (2, 2)
        state, _ = saved.restore(None, state_of(0), mesh_of(1))
        assert "step 3 is damaged" in caplog.text
        assert_equal(state, state_of(2))
        saved.save(3, state_of(3), None, META)  # the run comes by again
    assert checkpoints.load_for_inference(run, "latest")[-1] == 3
    assert [path.name for path in (run / "damaged").iterdir()] == ["3-0"]


def test_nothing_is_said_and_nothing_moved_where_all_is_well(three_steps, caplog, capfd):
    with checkpoints.Checkpoints(three_steps, keep=3) as saved:
        saved.restore(None, state_of(0), mesh_of(8))
    checkpoints.load_for_inference(three_steps)
    assert [r.message for r in caplog.records if r.levelname != "INFO"] == []
    assert capfd.readouterr().err == ""
    assert not (three_steps / "damaged").exists()


def test_an_error_over_verified_files_is_no_damage(three_steps, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(three_steps, run)

    def refuse(*_, **__):
        raise ValueError("shape")

    with checkpoints.Checkpoints(run) as saved:
        monkeypatch.setattr(saved._manager, "restore", refuse)
        with pytest.raises(ValueError, match="shape"):
            saved.restore(None, state_of(0), mesh_of(1))
    assert kept(run) == [1, 2, 3]


def test_lost_checksums_lose_no_checkpoint(three_steps, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(three_steps / "checkpoints", run / "checkpoints")
    with checkpoints.Checkpoints(run) as saved:
        assert_equal(saved.restore(None, state_of(0), mesh_of(1))[0], state_of(3))
    assert "step 3" in caplog.text
    assert "unverified" in caplog.text


def test_damaged_checksums_are_a_damaged_checkpoint(three_steps, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(three_steps, run)
    newest = max((run / "checksums").glob("*.json"), key=lambda path: int(path.stem))
    text = newest.read_text()
    for damaged in (text[:-20], "[]"):
        newest.write_text(damaged)
        caplog.clear()
        assert checkpoints.load_for_inference(run, "latest")[-1] == 2
        assert f"step 3: {newest} is damaged" in caplog.text
    (run / "damaged" / "3-1").mkdir(parents=True)  # of before, when there was a 3-0 too
    with checkpoints.Checkpoints(run) as saved:
        assert_equal(saved.restore(None, state_of(0), mesh_of(1))[0], state_of(2))
    shutil.copytree(three_steps / "checkpoints/3", run / "checkpoints/3")
    newest.write_text("[]")
    with checkpoints.Checkpoints(run) as saved:
        assert saved.latest() == 2
    assert sorted(path.name for path in (run / "damaged").iterdir()) == ["3-0", "3-1", "3-2"]


def test_a_step_that_is_replaced_while_it_is_looked_at_is_no_damage(
    three_steps, tmp_path, monkeypatch, caplog
):
    run = tmp_path / "run"
    shutil.copytree(three_steps, run)
    for part in ("checkpoints/3", "checksums/3.json"):
        (run / part).rename(run / part.replace("3", "later"))
    hashes = checkpoints._hashes

    def replaced(folder):
        if folder.name == "2":
            shutil.rmtree(folder)
            for part in ("checkpoints/3", "checksums/3.json"):
                (run / part.replace("3", "later")).rename(run / part)
        return hashes(folder)

    monkeypatch.setattr(checkpoints, "_hashes", replaced)
    assert checkpoints.load_for_inference(run, "latest")[-1] == 3
    assert "damaged" not in caplog.text


def test_a_run_without_a_whole_checkpoint_says_so(three_steps, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(three_steps, run)
    for file in (run / "checkpoints").rglob("_METADATA"):
        file.unlink()
    with pytest.raises(InputError, match="each checkpoint is damaged"):
        checkpoints.load_for_inference(run)
    with pytest.raises(InputError, match="every checkpoint is damaged"):
        checkpoints.Checkpoints(run)
    with checkpoints.Checkpoints(run) as saved:
        assert saved.latest() is None
        assert saved.best() is None


KILLED = """
    import os, signal, sys, time
    from pathlib import Path
    from ham_jax import checkpoints
    sys.path.insert(0, "tests")
    import test_checkpoints
    workdir = Path(sys.argv[1])
    test_checkpoints.save(workdir, {1: 0.5})
    write = checkpoints.Checkpoints._write_checksums

    def last_words(self):
        if sys.argv[2] == "after":
            write(self)
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.Checkpoints._write_checksums = last_words
    test_checkpoints.save(workdir, {2: 0.9})
"""


@pytest.mark.parametrize("moment", ["before", "after"])  # the checksums, and so the renaming
def test_a_kill_while_saving_leaves_the_step_before(moment, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(KILLED), tmp_path, moment]
    assert subprocess.run(command, cwd=ROOT, env=environment).returncode == -signal.SIGKILL
    (unfinished,) = (tmp_path / "checkpoints").glob("2.*")

    # A run that still saves looks the same: looking at it must leave it alone.
    assert checkpoints.load_for_inference(tmp_path, "latest")[-1] == 1
    assert unfinished.exists()

    with checkpoints.Checkpoints(tmp_path) as saved:
        assert_equal(saved.restore(None, state_of(0), mesh_of(8))[0], state_of(1))
    assert kept(tmp_path) == [1]
    save(tmp_path, {2: 0.9})
    assert checkpoints.load_for_inference(tmp_path)[-1] == 2


def test_a_folder_without_checkpoints_is_answered_with_what_it_holds(three_steps, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        checkpoints.load_for_inference(tmp_path / "nowhere")
    (tmp_path / "photographs").mkdir()
    with pytest.raises(InputError, match="but photographs"):
        checkpoints.load_for_inference(tmp_path)
    with pytest.raises(InputError, match="no checkpoint of step 9, but of 1, 2, 3"):
        checkpoints.load_for_inference(three_steps, 9)


def test_another_configuration_is_refused_with_both_values(tmp_path):
    c = config.base()
    checkpoints.check_run_config(tmp_path, c)
    checkpoints.write_run_config(tmp_path, c)
    c.data.dir = "elsewhere"  # data may move
    checkpoints.check_run_config(tmp_path, c)
    c.optim.learning_rate = 0.7
    c.train.duration = {"steps": 3}
    path = tmp_path / "config.json"
    whole = path.read_text()
    for damaged in ("", whole[:-20], "[]", '{"data": 3}', '{"seed": "x"}', "\0" * 40):
        path.write_text(damaged)
        with pytest.raises(InputError, match=f"{path} is"):
            checkpoints.check_run_config(tmp_path, c)
    path.write_text(whole)
    with pytest.raises(InputError) as refused:
        checkpoints.check_run_config(tmp_path, c)
    first, *keys = refused.value.faults
    assert "another --workdir" in first
    assert sorted(keys) == [
        "optim.learning_rate: 0.05 there, 0.7 now.",
        "train.duration: {'epochs': 30.0} there, {'steps': 3} now.",
    ]
