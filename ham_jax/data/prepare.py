"""A configuration's photographs, as records with their splits, checked for leaks."""

import dataclasses
from pathlib import Path

import ml_collections
import numpy as np
import pandas as pd

from ham_jax import console, parallel
from ham_jax.config import InputError
from ham_jax.data import download, ham10000, splits, synthetic


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Records and who belongs where.

    Attributes:
      records: the training set's images and table.
      split: 'train', 'val' or 'test' of each of its records.
      test_records: the official test set, if `data.test_dir` is given.
      audit: what `splits.audit` found.
    """

    records: ham10000.Records
    split: np.ndarray
    test_records: ham10000.Records | None
    audit: splits.Audit

    def select(self, name: str) -> ham10000.Subset:
        """Returns the images of the split called `name`.

        Raises:
          InputError: there is no such image.
        """
        if name == "test" and self.test_records is not None:
            return ham10000.Subset(self.test_records, np.arange(len(self.test_records.table)))
        rows = np.flatnonzero(self.split == name)
        if not len(rows):
            raise InputError(
                f"There is no image in split {name!r}. For the official test give"
                " --config.data.test_dir=FOLDER (--config.data.download=true fetches it);"
                " a data.split_csv may name one too."
            )
        return ham10000.Subset(self.records, rows)

    def held_out(self) -> pd.DataFrame:
        """Returns the table of what does not train: the images of val, test and test_dir."""
        table = self.records.table[self.split != "train"]
        return table if self.test_records is None else pd.concat([table, self.test_records.table])


def prepare(config: ml_collections.ConfigDict) -> Dataset:
    """Draws, fetches or finds the photographs, makes records of them once, and splits them.

    What is already there is left alone, so that this is quick the second time.

    Raises:
      InputError: nothing to read, faulty metadata or images, or lesions shared between splits.
    """
    data = config.data
    if data.synthetic_images and parallel.is_main():
        synthetic.write(Path(data.dir), data.synthetic_images, config.seed)
    if data.download and parallel.is_main():
        for folder, what in ((data.dir, "train"), (data.test_dir, "test")):
            if folder:
                with console.progress(f"Fetching {what}") as progress:
                    download.download(Path(folder), what, progress)
    parallel.barrier("photographs")
    records = _records(data, data.dir)
    test_records = _records(data, data.test_dir) if data.test_dir else None
    split = splits.assign(records.table, data, config.seed)
    audit = splits.audit(records.table, split, None if test_records is None else test_records.table)
    if audit.shared_lesions:
        shown = ", ".join(audit.shared_lesions[:5])
        raise InputError(
            f"{len(audit.shared_lesions)} lesions lie in more than one split ({shown}, ...):"
            " results would be inflated by leakage. Give test photographs of other lesions."
        )
    return Dataset(records, split, test_records, audit)


def _records(data: ml_collections.ConfigDict, folder: str) -> ham10000.Records:
    with console.progress(f"Preparing {folder}") as progress:
        prepared = ham10000.prepare(
            Path(folder),
            tuple(data.canvas),
            Path(data.prepared_dir),
            allow_partial=data.allow_partial or data.synthetic_images > 0,
            num_workers=data.num_workers,
            progress=progress,
        )
    return ham10000.open_records(prepared)
