"""A saved run comes back as it was, on other devices too, and a damaged checkpoint costs one step."""

import os
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
from ham_jax.checkpoints import METRIC, Checkpoints
from ham_jax.config import InputError


def mesh_of(num_devices):
    return jax.sharding.Mesh(np.array(jax.devices()[:num_devices]), ("data",))


def state_of(step, mesh):
    rng = np.random.default_rng(step)
    params = {"head": {"kernel": jnp.asarray(rng.normal(size=(64, 7)), jnp.float32)}}
    optimizer = optax.adamw(1e-3)
    state = {
        "step": jnp.int32(step),
        "params": params,
        "batch_stats": {"norm": {"mean": jnp.asarray(rng.normal(size=3), jnp.float32)}},
        "opt_state": optimizer.update(params, optimizer.init(params), params)[1],
        "ema": {"params": params},
    }
    return parallel.replicate(mesh, state)


def save(workdir, metrics, mesh=None, keep=3):
    """Saves a step for each of {step: metric or None}."""
    with Checkpoints(workdir, keep) as saved:
        for step, metric in metrics.items():
            numbers = None if metric is None else {METRIC: metric}
            saved.save(step, state_of(step, mesh or mesh_of(1)), numbers, {"name": "run"})
            saved.wait()


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 8)])
def test_a_run_moves_between_numbers_of_devices(before, after, tmp_path):
    save(tmp_path, {4: 0.5}, mesh_of(before))
    with Checkpoints(tmp_path) as saved:
        state, meta = saved.restore(None, state_of(0, mesh_of(after)), mesh_of(after))
    assert_equal(state, state_of(4, mesh_of(after)))
    assert meta == {"name": "run"}
    assert all(len(x.sharding.device_set) == after for x in jax.tree.leaves(state))


def test_newest_and_best_are_kept_across_restarts(tmp_path):
    save(tmp_path, {1: 0.5, 2: 0.9, 3: None}, keep=2)
    save(tmp_path, {4: 0.6, 5: 0.9, 6: None, 7: 0.8}, keep=2)
    with Checkpoints(tmp_path, 2) as saved:
        assert saved.latest() == 7
        assert saved.best() == 5  # the later one of equals
        assert sorted(saved._manager.all_steps()) == [5, 6, 7]
    assert {p.stem for p in (tmp_path / "checksums").iterdir()} == {"5", "6", "7"}
    params, _, ema, meta, step = checkpoints.load_for_inference(tmp_path)
    assert (step, meta) == (5, {"name": "run"})
    assert_equal(params, state_of(5, mesh_of(1))["params"])
    assert_equal(ema, state_of(5, mesh_of(1))["ema"])
    assert isinstance(params["head"]["kernel"], np.ndarray)
    assert checkpoints.load_for_inference(tmp_path, "latest")[-1] == 7


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage", [flip, Path.unlink, lambda file: os.truncate(file, file.stat().st_size // 2)]
)
def test_a_damaged_newest_is_named_and_the_one_before_is_used(damage, tmp_path, caplog):
    save(tmp_path, {1: 0.9, 2: 0.5, 3: 0.6})
    written = [path for path in (tmp_path / "checkpoints/3").rglob("*") if path.is_file()]
    damage(max(written, key=lambda path: path.stat().st_size))
    like = state_of(0, mesh_of(1))
    with Checkpoints(tmp_path, 3) as saved:
        state, _ = saved.restore(None, like, mesh_of(1))
        assert_equal(state, state_of(2, mesh_of(1)))
        saved.save(3, state_of(3, mesh_of(1)), {METRIC: 0.6}, {})  # the run goes on
    assert "Checkpoint of step 3" in caplog.text
    assert "is damaged" in caplog.text
    assert [p.name for p in (tmp_path / "damaged").iterdir()] == ["3-0"]
    with Checkpoints(tmp_path, 3) as saved:
        assert_equal(saved.restore(None, like, mesh_of(1))[0], state_of(3, mesh_of(1)))


def test_a_damaged_best_falls_back_to_the_next_best(tmp_path, caplog):
    save(tmp_path, {1: 0.7, 2: 0.9, 3: 0.6})
    flip(next((tmp_path / "checkpoints/2/model").rglob("d/*")))
    assert checkpoints.load_for_inference(tmp_path)[-1] == 1
    assert "Checkpoint of step 2" in caplog.text


def test_with_nothing_whole_left_it_says_so(tmp_path):
    save(tmp_path, {1: 0.9})
    flip(next((tmp_path / "checkpoints/1/model").rglob("d/*")))
    with pytest.raises(InputError, match="no whole checkpoint"):
        checkpoints.load_for_inference(tmp_path)


def test_a_run_killed_while_saving_keeps_the_step_before(tmp_path):
    program = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        import test_checkpoints as t
        workdir = Path(sys.argv[1])
        t.save(workdir, {1: 0.5})
        saved = t.Checkpoints(workdir)
        # Commits never: what is on disk is a save in the middle.
        os.rename = os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        Path.rename = Path.replace = os.rename
        saved.save(2, t.state_of(2, t.mesh_of(1)), {t.METRIC: 0.6}, {})
        saved.wait()
    """)
    ended = subprocess.run(
        [sys.executable, "-c", program, tmp_path, Path(__file__).parent],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        timeout=120,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL
    with Checkpoints(tmp_path) as saved:
        state, _ = saved.restore(None, state_of(0, mesh_of(1)), mesh_of(1))
    assert_equal(state, state_of(1, mesh_of(1)))


def test_a_folder_without_a_run_says_what_is_there(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        checkpoints.load_for_inference(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"holds no checkpoint, but notes\.txt"):
        checkpoints.load_for_inference(tmp_path)


def test_the_folder_of_another_configuration_is_refused(tmp_path):
    c = config.base()
    checkpoints.check_run_config(tmp_path, c)
    checkpoints.write_run_config(tmp_path, c)
    c.log.every_steps = 3  # changes no number
    checkpoints.check_run_config(tmp_path, c)
    c.train.batch_size, c.seed = 128, 1
    with pytest.raises(InputError) as error:
        checkpoints.check_run_config(tmp_path, c)
    assert {f.split(":")[0] for f in error.value.faults[1:]} == {"train.batch_size", "seed"}
