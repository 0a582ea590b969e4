"""Age, sex and site of a lesion as numbers that a network may take beside the photograph.

Only what a physician knows before the diagnosis. `dx_type` (how it was confirmed) and `dataset`
(which clinic) predict the label and never enter.

A code is float32 [NUM_METADATA]: three groups of places, for age, sex and site. Each group is
non-negative, sums to 1 and ends with the place for "unknown", so that a missing value is a value as
any other. Which values are missing is correlated with the clinic in HAM10000, and so with the
diagnosis; `drop` makes them miss at random in training too.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from ham_jax import console, parallel

if TYPE_CHECKING:  # imported where a table is made: predict mostly has none
    import pandas as pd

COLUMNS = {  # and what tables may call them
    "age": ("age", "age_approx"),
    "sex": ("sex",),
    "localization": ("localization", "site", "anatom_site_general"),
}
AGES = np.arange(0, 91, 10)  # years; HAM10000 rounds to 5, from 5 to 85
SEXES = ("female", "male")
SITES = (
    *("abdomen", "acral", "back", "chest", "ear", "face", "foot", "genital", "hand"),
    *("lower extremity", "neck", "scalp", "trunk", "upper extremity"),
)
UNKNOWN = ("", "na", "nan", "none", "unknown")

_SIZES = [len(places) + 1 for places in (AGES, SEXES, SITES)]
NUM_METADATA = sum(_SIZES)
MISSING = np.zeros(NUM_METADATA, np.float32)
"""The code of a photograph without metadata."""
MISSING[np.cumsum(_SIZES) - 1] = 1
_GROUP = np.repeat(np.arange(len(_SIZES)), _SIZES)  # which group each place belongs to


def encode(table: "pd.DataFrame") -> np.ndarray:
    """Returns the codes of photographs, float32 [n, NUM_METADATA].

    An age lies between two of `AGES` and is shared among them by its distance to each, which lets
    a linear layer learn any line with bends at these ages; beyond the last it counts as the last.

    Args:
      table: one row an image; of its columns only `age` (years, nan where unknown), `sex` and
        `localization` are read. A column that is absent, and a word that is not one of `SEXES` or
        `SITES`, count as unknown. So does an age of 0: of HAM10000's 39 such photographs 5 are
        of keratoses (bkl), which infants do not have, so that 0 cannot be taken at its word.
    """
    import pandas as pd

    age = table["age"].to_numpy(np.float64) if "age" in table else np.full(len(table), np.nan)
    given = age > 0  # false for nan
    age = np.where(given, np.clip(age, AGES[0], AGES[-1]), np.nan)
    near = 1 - np.abs(age[:, None] - AGES) / (AGES[1] - AGES[0])
    shares = np.where(given[:, None], np.maximum(near, 0), 0)
    groups = [shares, ~given[:, None]]
    for column, words in (("sex", SEXES), ("localization", SITES)):
        places = pd.Index(words).get_indexer(_texts(table, column))
        groups.append(np.eye(len(words) + 1)[places])  # -1 of any other word: the last place
    return np.concatenate(groups, axis=1, dtype=np.float32)


def warn_unknown(table: "pd.DataFrame") -> None:
    """Prints a sentence for each column with words that `encode` does not know."""
    for column, words in (("sex", SEXES), ("localization", SITES)):
        texts = _texts(table, column)
        counts = texts[~texts.isin((*words, *UNKNOWN))].value_counts()
        if len(counts) and parallel.is_main():
            shown = ", ".join(repr(word) for word in counts.index[:5])
            console.log_line(
                f"{column}: {counts.sum()} of {len(table)} photographs count as unknown ({shown});"
                f" the network knows {', '.join(words)}."
            )


def drop(key: jax.Array, metadata: jax.Array, rate: float) -> jax.Array:
    """Replaces age, sex and site by their code for "unknown", each by itself at random.

    Args:
      key: of this step, and of nothing else.
      metadata: float32 [B, NUM_METADATA].
      rate: probability, in [0, 1).
    """
    gone = jax.random.bernoulli(key, rate, (len(metadata), len(_SIZES)))
    return jnp.where(gone[:, _GROUP], MISSING, metadata)


def _texts(table: "pd.DataFrame", column: str) -> "pd.Series":
    if column not in table:
        table = table.assign(**{column: ""})
    return table[column].fillna("").astype(str).str.strip().str.lower()
