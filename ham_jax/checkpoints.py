"""Saving and restoring runs. The only room that knows Orbax.

`<workdir>/checkpoints/<step>` is one committed step: `model` (params, batch_stats, ema),
`progress` (step, opt_state), `meta` (JSON: what rebuilds the run) and its metrics. Orbax writes it
under a temporary name and renames it. `<workdir>/checksums/<step>.json` holds the SHA-256 of each
of its files, for Orbax restores a flipped bit without a word.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from ham_jax import config as configuration
from ham_jax import files, parallel
from ham_jax.config import InputError

State = dict[str, Any]

METRIC = "val/balanced_accuracy"
_MODEL = ("params", "batch_stats", "ema")
_NO_METRIC = -1.0  # below any balanced accuracy: of a step that was not evaluated
_POLL_S = 0.05


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and the best by `METRIC`.

    A context manager: on leaving it, what is being saved is finished.

    Args:
      workdir: of the run.
      keep: how many of the newest stay.
    """

    def __init__(self, workdir: Path, keep: int = 2):
        self._workdir, self._keep = workdir, keep
        self._folder = (workdir / "checkpoints").absolute()
        self._open()

    def _open(self) -> None:
        policies = checkpoint_managers
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                # Without best_fn, BestN would not know earlier steps' metrics after a restart.
                best_fn=_metric,
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(self._keep),
                        policies.BestN(
                            get_metric_fn=_metric, n=1, keep_checkpoints_without_metrics=False
                        ),
                    ]
                ),
                cleanup_tmp_directories=True,
            ),
            item_handlers={
                "model": ocp.StandardCheckpointHandler(),
                "progress": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )
        self._saving = False
        self._hashing: threading.Thread | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self._close()

    def _close(self) -> None:
        self.wait()
        self._manager.close()

    def save(
        self, step: int, state: State, metrics: Mapping[str, float] | None, meta: Mapping[str, Any]
    ) -> None:
        """Saves in the background; returns once the state may change.

        Args:
          step: steps done.
          state: `step`, `params`, `batch_stats`, `opt_state`, `ema`, on the mesh.
          metrics: of this state, with `METRIC`; None if it was not evaluated.
          meta: what JSON can hold.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave({name: state[name] for name in _MODEL}),
                progress=ocp.args.StandardSave(
                    {name: state[name] for name in state if name not in _MODEL}
                ),
                meta=ocp.args.JsonSave(dict(meta)),
            ),
            metrics={METRIC: _NO_METRIC if metrics is None else metrics[METRIC]},
            force=True,
        )
        if self._hashing is not None:
            self._hashing.join()
        self._saving = True
        self._hashing = threading.Thread(target=self._write_checksums, args=(step,), daemon=True)
        self._hashing.start()

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self._manager.wait_until_finished()
        self._saving = False
        if self._hashing is not None:
            self._hashing.join()

    def latest(self) -> int | None:
        """Returns the newest step, None if there is none."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Returns the step with the best metric, the later one of equals; None if there is none."""
        return next(iter(self._by_metric()), None)

    def restore(
        self, step: int | None, like: State, mesh: jax.sharding.Mesh
    ) -> tuple[State, dict[str, Any]]:
        """Restores a step onto the mesh at hand, whatever devices it was saved from.

        A damaged checkpoint is named in a warning and moved to `<workdir>/damaged`; the one
        before it is used.

        Args:
          step: which; None: the newest. Only the newest has one before it to fall back to.
          like: a state of the same shapes.
          mesh: where to place it.

        Returns:
          (state, meta).

        Raises:
          InputError: no checkpoint is whole.
        """
        sharding = parallel.replicated(mesh)
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like
        )
        args = ocp.args.Composite(
            model=ocp.args.StandardRestore({name: like[name] for name in _MODEL}),
            progress=ocp.args.StandardRestore(
                {name: like[name] for name in like if name not in _MODEL}
            ),
            meta=ocp.args.JsonRestore(),
        )
        steps = sorted(self._manager.all_steps(), reverse=True) if step is None else [step]
        restored, _ = self._first_whole(steps, lambda _: args)
        return {**restored["model"], **restored["progress"]}, restored["meta"]

    def restore_model(self, which: str | int) -> tuple[dict[str, Any], dict[str, Any], int]:
        """Returns (params, batch_stats and ema as numpy arrays, meta, step); see restore.

        Args:
          which: 'best', 'latest' or a step.
        """
        if which == "best":
            steps = self._by_metric()
        elif which == "latest":
            steps = sorted(self._manager.all_steps(), reverse=True)
        else:
            steps = [which]

        def args(step: int) -> ocp.args.Composite:
            shapes = self._manager.item_metadata(step)["model"]
            as_numpy = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes.tree)
            return ocp.args.Composite(
                model=ocp.args.StandardRestore(as_numpy), meta=ocp.args.JsonRestore()
            )

        restored, step = self._first_whole(steps, args)
        return restored["model"], restored["meta"], step

    def _by_metric(self) -> list[int]:
        """Returns all steps, the best first; of equals the later one, which Orbax keeps."""

        def key(step: int) -> tuple[float, int]:
            return _metric(self._manager.metrics(step)), step

        return sorted(self._manager.all_steps(), key=key, reverse=True)

    def _first_whole(self, steps: list[int], args: Callable) -> tuple[Any, int]:
        for step in steps:
            fault = self._fault(step) if parallel.is_main() else None
            if not parallel.broadcast(int(fault is not None)):
                try:
                    return self._manager.restore(step, args=args(step)), step
                # Orbax's errors for damaged files share no base class. Files that were verified
                # are not damaged: then it is another error, and no reason to lose a checkpoint.
                except Exception as error:
                    if self._checksums(step).exists():
                        raise
                    fault = f"{type(error).__name__}: {error}"
            logging.warning(
                "Checkpoint of step %d in %s is damaged (%s). It is moved to %s; the one before it"
                " is used.",
                step,
                self._folder,
                fault or "found by the main process",
                self._workdir / "damaged",
            )
            self._set_aside(step)
        raise InputError(
            f"{self._folder} holds no whole checkpoint. Train again in another --workdir, or"
            " restore the folder from a copy."
        )

    def _set_aside(self, step: int) -> None:
        self._close()
        if parallel.is_main():
            aside = self._workdir / "damaged"
            aside.mkdir(exist_ok=True)
            number = len(list(aside.iterdir()))
            os.rename(self._folder / str(step), aside / f"{step}-{number}")
            self._checksums(step).unlink(missing_ok=True)
        parallel.barrier(f"set aside {step}")
        self._open()

    def _checksums(self, step: int | str) -> Path:
        return self._workdir / "checksums" / f"{step}.json"

    def _write_checksums(self, step: int) -> None:
        """Waits until Orbax has renamed the step's folder, then hashes its files."""
        if not parallel.is_main():
            return
        folder = self._folder / str(step)
        while not folder.exists():
            if not self._saving:
                return  # saving failed; Orbax raises in the main thread
            time.sleep(_POLL_S)
        self._checksums(step).parent.mkdir(exist_ok=True)
        files.write_json(self._checksums(step), _hashes(folder))
        for old in self._checksums(step).parent.glob("*.json"):
            if not (self._folder / old.stem).exists():
                old.unlink()

    def _fault(self, step: int) -> str | None:
        """Returns what is wrong with a step's files, None if they are as they were saved."""
        if not self._checksums(step).exists():
            logging.warning(
                "Checkpoint of step %d has no checksums (its run was killed while it saved): it is"
                " used unverified.",
                step,
            )
            return None
        try:
            expected = json.loads(self._checksums(step).read_text())
        except ValueError:
            return f"{self._checksums(step)} is not JSON"
        found = _hashes(self._folder / str(step))
        missing = sorted(expected.keys() - found.keys())
        if missing:
            return f"{missing[0]} is missing"
        changed = sorted(name for name in expected if found[name] != expected[name])
        return f"{changed[0]} has changed" if changed else None


def load_for_inference(
    workdir: Path, which: str | int = "best"
) -> tuple[State, State, State, dict[str, Any], int]:
    """Returns (params, batch_stats, ema, meta, step) of a run as numpy arrays.

    Args:
      workdir: of the run.
      which: 'best', 'latest' or a step; a damaged one is replaced as in `Checkpoints.restore`.

    Raises:
      InputError: there is no checkpoint.
    """
    if not workdir.is_dir():
        raise InputError(f"--workdir={workdir}: there is no such folder. Train first.")
    folder = workdir / "checkpoints"
    if not folder.is_dir() or not any(path.name.isdecimal() for path in folder.iterdir()):
        there = ", ".join(sorted(path.name for path in workdir.iterdir())[:10]) or "nothing"
        raise InputError(
            f"--workdir={workdir} holds no checkpoint, but {there}. Name the folder of a training"
            " run, such as runs/resnet, or train first."
        )
    with Checkpoints(workdir) as saved:
        model, meta, step = saved.restore_model(which)
    return model["params"], model["batch_stats"], model.get("ema") or {}, meta, step


def check_run_config(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Checks that a folder is new or of the same run.

    Raises:
      InputError: it is of a run with another configuration; all differing keys are named.
    """
    file = workdir / "config.json"
    if not file.exists():
        return
    saved = configuration.from_dict(json.loads(file.read_text()))
    differing = configuration.differences(saved, config)
    if differing:
        listed = [f"{key}: {old!r} there, {new!r} now." for key, (old, new) in differing.items()]
        raise InputError(
            [f"--workdir={workdir} holds another run; choose another --workdir.", *listed]
        )


def write_run_config(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Writes config.json."""
    if parallel.is_main():
        files.write_json(workdir / "config.json", configuration.to_dict(config))


def _metric(metrics: Mapping[str, float]) -> float:
    return metrics[METRIC]


def _hashes(folder: Path) -> dict[str, str]:
    """Returns {file relative to the folder: SHA-256} of all files below it."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            hashes[path.relative_to(folder).as_posix()] = digest
    return hashes
