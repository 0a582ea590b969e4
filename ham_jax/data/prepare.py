"""A configuration's photographs, as records with their splits, checked for leaks."""

import dataclasses
from pathlib import Path

import ml_collections
import numpy as np
import pandas as pd

from ham_jax import classes as class_lists
from ham_jax import console, parallel
from ham_jax.classes import HAM10000, Classes
from ham_jax.config import InputError
from ham_jax.data import download, records, splits, synthetic
from ham_jax.data.records import Records, Subset


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Records and who belongs where.

    Attributes:
      records: the training set's images and table.
      split: of each of its records, one of `splits.SPLITS`.
      test_records: the official test set, if `data.test_dir` is given.
      audit: what `splits.audit` found.
    """

    records: Records
    split: np.ndarray
    test_records: Records | None
    audit: splits.Audit

    def select(self, name: str) -> Subset:
        """Returns the images of the split called `name`.

        Raises:
          InputError: there is no such image.
        """
        if name == "test" and self.test_records is not None:
            return Subset(self.test_records, np.arange(len(self.test_records.table)))
        rows = np.flatnonzero(self.split == name)
        if not len(rows):
            raise InputError(
                f"There is no image in split {name!r}. For the official test give"
                " --config.data.test_dir=FOLDER (--config.data.download=true fetches it);"
                " in training data.test_share or data.split_csv may set one aside."
            )
        return Subset(self.records, rows)

    def held_out(self) -> pd.DataFrame:
        """Returns the table of what does not train: all images but those of 'train'."""
        table = self.records.table[self.split != "train"]
        return table if self.test_records is None else pd.concat([table, self.test_records.table])


def prepare(config: ml_collections.ConfigDict) -> Dataset:
    """Draws, fetches or finds the photographs, makes records of them once, and splits them.

    What is already there is left alone, so that this is quick the second time.

    Raises:
      InputError: nothing to read, faulty metadata or images, or lesions shared between splits.
    """
    data = config.data
    classes = class_lists.of_config(data)
    if data.download and sorted(classes) != sorted(HAM10000):
        raise InputError(
            f"data.download = true fetches HAM10000, and data.classes = {classes.names!r} are not"
            " its seven. Leave out data.classes, or set data.dir to your own photographs and"
            " data.download=false."
        )
    for folder in filter(None, (data.dir, data.test_dir)):
        if (data.synthetic_images or data.download) and not Path(folder).exists():
            records.import_builder(folder)  # nothing is drawn or fetched that nobody can read
    train_records = _records(config, classes, "train")
    test_records = _records(config, classes, "test") if data.test_dir else None
    table = train_records.table
    split = splits.assign(table, data, config.seed)
    test_table = None if test_records is None else test_records.table
    audit = splits.audit(table, split, classes, test_table)
    if audit.shared_lesions:
        shown = ", ".join(audit.shared_lesions[:5])
        raise InputError(
            f"{len(audit.shared_lesions)} lesions lie in more than one split ({shown}, ...):"
            " results would be inflated by leakage. Give test photographs of other lesions."
        )
    return Dataset(train_records, split, test_records, audit)


def _records(config: ml_collections.ConfigDict, classes: Classes, what: str) -> Records:
    """Opens the records of 'train' or 'test'; the main process makes them where they are not there.

    It alone looks at the photographs, which may be many and lie on a file system that all share.
    """
    data = config.data
    folder = data.dir if what == "train" else data.test_dir

    def made() -> str:
        prepared = records.prepare(
            folder,
            tuple(data.canvas),
            data.prepared_dir,
            classes=classes,
            allow_partial=data.allow_partial or data.synthetic_images > 0,
            num_workers=data.num_workers,
        )
        return str(prepared)

    def fetched_and_made() -> str:
        if data.synthetic_images and what == "train":
            min_lesions = 1 if data.split_csv else splits.min_lesions(data)
            synthetic.write(
                Path(folder), data.synthetic_images, config.seed, classes, min_lesions=min_lesions
            )
        if data.download:
            with console.progress(f"Fetching {what}") as progress:
                download.download(Path(folder), what, progress)
        return made()

    prepared = parallel.from_main(fetched_and_made)
    if not Path(prepared).is_dir():  # this host has another disk there
        prepared = made()
    # Titles, and which classes are malignant, may change without new records.
    return dataclasses.replace(records.open_records(prepared), classes=classes)
