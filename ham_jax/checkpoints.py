"""Saving and restoring runs. The only room that knows Orbax.

`<workdir>/checkpoints/<step>` is one committed step: `model` (params, batch_stats, ema),
`progress` (step, opt_state), `meta` (JSON: what rebuilds the run) and its metrics. Orbax writes it
under a temporary name and renames it. `<workdir>/checksums/<step>.json` holds the SHA-256 of each
of its files, for Orbax restores a flipped bit without a word. `<workdir>/.lock` says which job
trains there.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from ham_jax import config as configuration
from ham_jax import files, hub, parallel
from ham_jax.config import InputError
from ham_jax.local_path import LocalPath

State = dict[str, Any]

SPLIT = "split.csv"  # in a run's folder: who trained and who validated
METRIC = "val/balanced_accuracy"
_MODEL = ("params", "batch_stats", "ema")
_NO_METRIC = -1.0  # of a step that was not evaluated: below any balanced accuracy
_NONE = -1  # where processes agree on a step and there is none
_SPARE_BYTES = 1 << 20  # for a checkpoint's metadata
_TEMPORARY = ocp.utils.TMP_DIR_SUFFIX
# Orbax adds the time to it when it renames the folder; restoring does not depend on it.
_TIME_STAMPED = "_CHECKPOINT_METADATA"


_MERGED = "manifest.ocdbt"  # what makes one array store of all processes' files


class Checkpoints:
    """The checkpoints of one run that trains: the newest `keep`, and the best by `METRIC`.

    On opening, each is verified; a damaged one is named in a warning and moved to
    `<workdir>/damaged`, and what follows goes by the others. Only one job may have a folder open;
    `load_for_inference` may read it meanwhile.

    A context manager: on leaving it, what is being saved is finished.

    Args:
      workdir: of the run.
      keep: how many of the newest stay.

    Raises:
      InputError: there are checkpoints, and all are damaged.
    """

    def __init__(self, workdir: Path, keep: int = 2):
        self._workdir = workdir.absolute()
        self._folder = self._workdir / "checkpoints"
        lost = False
        if parallel.is_main():
            # Left by a run that was killed while it saved.
            for unfinished in self._folder.glob(f"*{_TEMPORARY}*"):
                shutil.rmtree(unfinished)
            before = _steps(self._workdir)
            damaged = [step for step in before if not _is_whole(self._workdir, step)]
            for step in damaged:
                self._set_aside(step)
            lost = bool(before) and before == damaged
        if parallel.broadcast(int(lost)):  # which also lets the others wait for the main process
            raise InputError(
                f"{self._folder}: every checkpoint is damaged; they are now in"
                f" {self._workdir / 'damaged'}. Restore the folder from a copy, or start the same"
                " command again to train from the beginning."
            )
        policies = checkpoint_managers
        self._manager = ocp.CheckpointManager(
            LocalPath(self._folder),
            options=ocp.CheckpointManagerOptions(
                # Without best_fn, BestN would not know earlier steps' metrics after a restart.
                best_fn=lambda metrics: metrics[METRIC],
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep),
                        policies.BestN(get_metric_fn=lambda metrics: metrics[METRIC], n=1),
                    ]
                ),
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        with self._telling():
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

        Raises:
          InputError: the disk is full, or fails; also for an earlier save.
        """
        self.check_space(state)
        if jax.process_count() == 1:
            # Orbax would share each array out among the devices that hold it, and compile a program
            # for each device and shape to cut it.
            state = jax.tree.map(
                lambda x: x.addressable_data(0) if x.is_fully_replicated else x, state
            )
        with self._telling():
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

    def wait(self) -> None:
        """Returns when everything saved is on disk.

        Raises:
          InputError: the disk is full, or fails.
        """
        with self._telling():
            self._manager.wait_until_finished()

    def check_space(self, state: State) -> None:
        """Checks that one more checkpoint has room on the disk and in the user's quota.

        Raises:
          InputError: it has not.
        """
        num_bytes = _SPARE_BYTES + sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        parallel.on_main(lambda: _reserve(self._folder, num_bytes))

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Turns what Orbax raises for a disk that is full or fails into a sentence."""
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError is tensorstore's
            of_system = re.search(r"os_error_code='(\d+)'", str(error))
            if not of_system and not isinstance(error, OSError):
                raise
            why = os.strerror(int(of_system[1])) if of_system else error
            raise InputError(_not_written(self._folder, why)) from error

    def latest(self) -> int | None:
        """Returns the newest step, None if there is none."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Returns the step with the best metric, the later one of equals; None if there is none.

        Where no step was evaluated it is the newest.
        """
        return next(iter(_by_metric(self._workdir, self._manager.all_steps())), None)

    def restore(
        self, step: int | None, like: State, mesh: jax.sharding.Mesh
    ) -> tuple[State, dict[str, Any]]:
        """Restores a step onto the mesh at hand, whatever devices it was saved from.

        Args:
          step: which; None: the newest.
          like: a state of the same shapes.
          mesh: where to place it.

        Returns:
          (state, meta).

        Raises:
          InputError: there is no such step, or it was damaged since the folder was opened.
        """
        step = self.latest() if step is None else step
        whole = step is not None and parallel.is_main() and _is_whole(self._workdir, step)
        if not parallel.broadcast(int(whole)):
            raise InputError(
                f"{self._folder} holds no whole checkpoint of step {step}. Start the same command"
                " again: it goes on from another one."
            )
        sharding = parallel.replicated(mesh)
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like
        )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardRestore({name: like[name] for name in _MODEL}),
                progress=ocp.args.StandardRestore(
                    {name: like[name] for name in like if name not in _MODEL}
                ),
                meta=ocp.args.JsonRestore(),
            ),
        )
        return {**restored["model"], **restored["progress"]}, restored["meta"]

    def _set_aside(self, step: int) -> None:
        aside = self._workdir / "damaged"
        aside.mkdir(exist_ok=True)
        targets = (aside / f"{step}-{number}" for number in itertools.count())
        target = next(path for path in targets if not path.exists())
        logging.warning("Step %d is moved to %s; the run goes on without it.", step, target)
        os.rename(self._folder / str(step), target)
        _checksums(self._workdir, step).unlink(missing_ok=True)

    def _write_checksums(self) -> None:
        """Called by Orbax on the main process, right before it gives a folder its final name."""
        folder = _checksums(self._workdir, 0).parent
        folder.mkdir(exist_ok=True)
        for saved in self._folder.glob(f"*{_TEMPORARY}*"):
            hashes = _hashes(saved)
            if unmerged := _unmerged(hashes):
                raise RuntimeError(f"Orbax did not finish {saved}: {unmerged} is missing")
            hashes.pop(_TIME_STAMPED)
            files.write_json(folder / f"{saved.name.split('.')[0]}.json", hashes)
        current = {path.name.split(".")[0] for path in self._folder.iterdir()}
        for old in folder.glob("*.json"):
            if old.stem not in current:
                old.unlink()


def load_for_inference(
    workdir: Path, which: str | int = "best"
) -> tuple[State, State, State, dict[str, Any], int]:
    """Returns (params, batch_stats, ema, meta, step) of a run as numpy arrays.

    Only reads, so a run may be looked at while it trains. A damaged checkpoint is named in a
    warning and the next in the order asked for is used.

    Args:
      workdir: of the run; or an exported folder, which holds one step and of it the weights that
        answer.
      which: 'best', 'latest' or a step.

    Raises:
      InputError: there is no such checkpoint, or none that is whole.
    """
    steps = _steps(workdir)
    if not steps and ((workdir / hub.WEIGHTS).is_file() or hub.is_exported(workdir)):
        return hub.load(workdir)
    if not steps:
        raise InputError(_nothing_there(workdir))
    if which not in ("best", "latest", *steps):
        raise InputError(
            f"--workdir={workdir} has no checkpoint of step {which}, but of"
            f" {', '.join(map(str, sorted(steps)))}."
        )
    chosen = parallel.broadcast(_first_whole(workdir, which) if parallel.is_main() else _NONE)
    if chosen == _NONE:
        raise InputError(
            f"--workdir={workdir}: {'each' if len(steps) > 1 else 'this'} checkpoint is damaged;"
            " restore it from a copy, or train again."
        )
    folder = LocalPath(_folder(workdir.absolute(), chosen))
    handler = ocp.PyTreeCheckpointHandler()
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(folder / "model").tree
    )
    model = handler.restore(folder / "model", args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    meta = ocp.JsonCheckpointHandler().restore(folder / "meta")
    return model["params"], model["batch_stats"], model["ema"], meta, chosen


def fold_folder(workdir: Path, fold: int) -> Path:
    """Returns where a cross-validation in `workdir` trains a fold."""
    return workdir / f"fold{fold}"


def has_checkpoints(workdir: Path) -> bool:
    """Returns whether `workdir` is the folder of a run that saved something."""
    return bool(_steps(workdir))


def runs(workdir: Path) -> list[Path]:
    """Returns the folders of the runs that `workdir` stands for.

    That is itself, or the folds of a cross-validation, or the members of an exported ensemble.
    """
    if hub.is_exported(workdir):
        return hub.members(workdir)
    config = fold_folder(workdir, 0) / "config.json"
    if has_checkpoints(workdir) or not config.is_file():
        return [workdir]
    num_folds = read_run_config(config.parent, is_trained=True).data.num_folds
    return [fold_folder(workdir, fold) for fold in range(num_folds)]


def check_run_config(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Checks that a folder is new or of the same run.

    Raises:
      InputError: it is of a cross-validation, or of a run with another configuration; all
        differing keys are named.
    """
    if hub.is_exported(workdir):
        raise InputError(
            f"--workdir={workdir} holds an exported model, which cannot be trained on. Choose"
            f" another --workdir and start from it: --config.model.pretrained={workdir}"
        )
    if fold_folder(workdir, 0).is_dir():
        raise InputError(f"--workdir={workdir} holds a cross-validation; choose another --workdir.")
    if (workdir / "config.json").exists():
        saved = read_run_config(workdir)
    elif steps := _steps(workdir):  # it was lost; each checkpoint has a copy
        meta = files.read_json(_folder(workdir, steps[0]) / "meta/metadata", "Remove that step.")
        saved = configuration.from_dict(meta.get("config") or {})
    else:
        return
    differing = configuration.differences(saved, config)
    if differing:
        listed = [f"{key}: {old!r} there, {new!r} now." for key, (old, new) in differing.items()]
        raise InputError(
            [f"--workdir={workdir} holds another run; choose another --workdir.", *listed]
        )


def read_run_config(workdir: Path, is_trained: bool = False) -> ml_collections.ConfigDict:
    """Returns what `write_run_config` wrote, or an export; `is_trained` as in `config.from_dict`.

    Raises:
      FileNotFoundError: there is no config.json.
      InputError: it is damaged, or holds keys that this version does not have.
    """
    if hub.is_exported(workdir):
        return hub.run_config(workdir, is_trained)
    path = workdir / "config.json"
    remedy = (
        "Restore it from a copy. Where there is none, remove it: the command that started the run"
        " makes it anew."
    )
    content = files.read_json(path, remedy)
    try:
        return configuration.from_dict(content, is_trained)
    except InputError as error:
        raise InputError([f"{path} is no configuration of a run.", *error.faults]) from error
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}. {remedy}") from error


def write_run_config(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Writes config.json."""
    if parallel.is_main():
        files.write_json(workdir / "config.json", configuration.to_dict(config))


def _nothing_there(workdir: Path) -> str:
    if not workdir.is_dir():
        return f"--workdir={workdir}: there is no such folder. Train first."
    names = sorted(path.name for path in workdir.iterdir() if not path.name.startswith("."))
    there = ", ".join(names[:10]) or "nothing"
    return (
        f"--workdir={workdir} holds no checkpoint, but {there}. Name the folder of a training run,"
        " such as runs/resnet, or train first."
    )


def _steps(workdir: Path) -> list[int]:
    """Returns the committed steps, the newest first."""
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted((int(p.name) for p in folder.iterdir() if p.name.isdecimal()), reverse=True)


def _folder(workdir: Path, step: int) -> Path:
    return workdir / "checkpoints" / str(step)


def _by_metric(workdir: Path, steps: list[int]) -> list[int]:
    """Returns steps, the best first and the later one of equals, as Orbax keeps them."""

    def key(step: int) -> tuple[float, int]:
        try:
            metrics = _folder(workdir, step) / "metrics/metrics"
            return float(json.loads(metrics.read_text())[METRIC]), step
        # Damaged, which verifying it will say.
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return _NO_METRIC, step

    return sorted(steps, key=key, reverse=True)


def _first_whole(workdir: Path, which: str | int) -> int:
    """Returns the first whole step in the order asked for, or _NONE.

    After each that is not, the folder is read anew: a run that trains may have replaced it.
    """
    judged: set[int] = set()
    while steps := [step for step in _steps(workdir) if step not in judged]:
        if which == "best":
            steps = _by_metric(workdir, steps)
        elif which != "latest":
            steps = [step for step in steps if step == which]
        if not steps:
            break
        judged.add(steps[0])
        if _is_whole(workdir, steps[0]):
            return steps[0]
    return _NONE


@contextlib.contextmanager
def claimed(workdir: Path) -> Iterator[None]:
    """Keeps other jobs from training in a run's folder at the same time.

    Raises:
      InputError: another one does, the folder has a name that no checkpoint can be under, or not
        every process of this job sees it.
    """
    parallel.check_shared(workdir)
    with contextlib.ExitStack() as held:

        def claim() -> None:
            _check_name(workdir)
            held.enter_context(files.claimed(workdir / ".lock", f"--workdir={workdir}"))

        parallel.on_main(claim)
        yield


def _check_name(workdir: Path) -> None:
    """Refuses what tensorstore, which writes the arrays, cannot have in a path."""
    text = os.fspath(workdir.absolute())
    try:
        text.encode()
        what = {"\\": "a backslash", ":/": "a colon at the end of a folder's name"}
        found = [name for part, name in what.items() if part in f"{text}/"]
    except UnicodeEncodeError:
        found = ["bytes that are not UTF-8"]
    if found:
        raise InputError(
            f"--workdir={workdir}: checkpoints cannot be written where the path has {found[0]}."
            " Name another folder."
        )


def _reserve(folder: Path, num_bytes: int) -> None:
    """Takes that much of the disk for a moment, which also asks the user's quota."""
    path = folder / ".space"
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        return
    except (OSError, AttributeError) as error:  # AttributeError: macOS has no such function
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(_not_written(folder, error.strerror, num_bytes)) from error
    finally:
        path.unlink(missing_ok=True)
    if shutil.disk_usage(folder).free < num_bytes:
        raise InputError(_not_written(folder, os.strerror(errno.ENOSPC), num_bytes))


def _not_written(folder: Path, why: Any, num_bytes: int = 0) -> str:
    needed = f", {num_bytes / 1e6:,.0f} MB needed" if num_bytes else ""
    return (
        f"{folder}: a checkpoint could not be written ({why}{needed}). Make room, or let the folder"
        " be written to; then the same command goes on from the last checkpoint that is whole."
    )


def _unmerged(names: Iterable[str]) -> str:
    """Returns an item without its merged manifest among a step's files; '' where all have one."""
    return next(
        (n for n in (f"{i}/{_MERGED}" for i in ("model", "progress")) if n not in names), ""
    )


def _checksums(workdir: Path, step: int) -> Path:
    return workdir / "checksums" / f"{step}.json"


def _is_whole(workdir: Path, step: int) -> bool:
    """Returns whether a step's files are as they were saved; warns where not, or not known.

    Nothing is said of a step that is gone: the run that trains has replaced it by another.
    """
    checksums, folder = _checksums(workdir, step), _folder(workdir, step)
    if not folder.is_dir():
        return False
    if not checksums.exists():
        logging.warning(
            "Checkpoint of step %d in %s has no checksums: it is used unverified.", step, folder
        )
        return True
    try:
        expected, found = json.loads(checksums.read_text()), _hashes(folder)
        if not isinstance(expected, dict):
            raise ValueError
    except (ValueError, RecursionError):
        logging.warning("Checkpoint of step %d: %s is damaged.", step, checksums)
        return False
    except FileNotFoundError:  # it went while it was read
        return False
    if not folder.is_dir():
        return False
    if unmerged := _unmerged(found):
        logging.warning(
            "Checkpoint of step %d is damaged: it was saved without %s.", step, folder / unmerged
        )
        return False
    for name, digest in expected.items():
        if found.get(name) != digest:
            fault = "has changed" if name in found else "is missing"
            logging.warning("Checkpoint of step %d is damaged: %s %s.", step, folder / name, fault)
            return False
    return True


def _hashes(folder: Path) -> dict[str, str]:
    """Returns {file relative to the folder: SHA-256} of all files below it."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            hashes[path.relative_to(folder).as_posix()] = digest
    return hashes
