"""The diagnoses that a data set tells apart: their names, their titles, and which are malignant."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MAX_CLASSES = 100


@dataclasses.dataclass(frozen=True)
class Classes:
    """Diagnoses in the order of every label, logit and probability.

    Attributes:
      names: as the column `dx` has them; no two differ in case alone.
      malignant: those of the names that the malignancy flag is to find; empty: there is no flag.
      titles: of each name, in plain words; empty: the names themselves.

    Raises:
      ValueError: names that are too much alike, or malignant ones and titles that do not fit them.
    """

    names: tuple[str, ...]
    malignant: tuple[str, ...] = ()
    titles: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.titles:
            object.__setattr__(self, "titles", self.names)
        if why := faults(self.names, self.malignant):
            raise ValueError(" ".join(why))
        if len(self.titles) != len(self.names):
            raise ValueError(f"there are {len(self.titles)} titles of {len(self.names)} classes")

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def index(self, name: str) -> int:
        """Returns the label of a name; ValueError where there is no such class."""
        return self.names.index(name)

    @functools.cached_property
    def malignant_labels(self) -> tuple[int, ...]:
        """The labels of the malignant classes."""
        return tuple(map(self.names.index, self.malignant))

    def title(self, name: str) -> str:
        """Returns a class in plain words."""
        return self.titles[self.index(name)]

    def to_json(self) -> dict[str, list[str]]:
        """Returns what JSON can hold and `from_json` reads."""
        return {name: list(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, content: Any) -> "Classes":
        """Returns what `to_json` wrote, or the classes of a list of names alone.

        Raises:
          ValueError: it is neither.
        """
        if isinstance(content, Mapping):
            fields = {field.name: content.get(field.name, ()) for field in dataclasses.fields(cls)}
        else:
            fields = {"names": content}
        if not all(
            isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)
            for value in fields.values()
        ):
            raise ValueError(f"{content!r:.200} does not name classes")
        if "malignant" not in fields:
            return known(fields["names"])
        return cls(**{name: tuple(value) for name, value in fields.items()})


def faults(names: Sequence[str], malignant: Sequence[str]) -> list[str]:
    """Returns a sentence for each reason why these cannot be `Classes`."""
    found = []
    if not 2 <= len(names) <= MAX_CLASSES:
        found.append(f"There are {len(names)} classes; 2 to {MAX_CLASSES} are allowed.")
    lower = [name.lower() for name in names]
    if repeated := sorted({name for name in lower if lower.count(name) > 1}):
        found.append(f"Classes differ in more than case: {', '.join(repeated)} is there twice.")
    odd = [name for name in names if not name.isprintable() or name != name.strip() or not name]
    if odd:
        found.append(f"A class needs a printable name without spaces around it, not {odd[0]!r}.")
    if taken := [name for name in lower if name in _TAKEN]:
        found.append(
            f"No class can be called {', '.join(taken)}: files have such a column. Add a word, such"
            f" as '{taken[0]} lesion'."
        )
    if others := [name for name in malignant if name not in names]:
        found.append(f"Malignant is {', '.join(others)}, but the classes are {', '.join(names)}.")
    elif len(set(malignant)) == len(names):
        found.append("All classes are malignant: then there is nothing to flag; name none.")
    return found


# Columns beside the classes in predictions.csv, predict.csv and split files; a row of audit.csv.
_TAKEN = (
    *("image", "image_id", "lesion_id", "truth", "split", "label", "path", "prediction"),
    *("age", "sex", "localization", "dx", "dx_type", "dataset", "file_sha256", "ood", "ood_score"),
    *("malignant_flag", "any_malignant", "prediction_set", "error", "note", "total"),
)

_KNOWN = {  # of HAM10000, ISIC 2019 and the plainest question: title, and whether it is malignant
    "akiec": ("actinic keratosis, Bowen's disease", True),
    "ak": ("actinic keratosis", True),
    "bcc": ("basal cell carcinoma", True),
    "benign": ("benign lesion", False),
    "bkl": ("benign keratosis", False),
    "df": ("dermatofibroma", False),
    "malignant": ("malignant lesion", True),
    "mel": ("melanoma", True),
    "nv": ("nevus", False),
    "scc": ("squamous cell carcinoma", True),
    "vasc": ("vascular lesion", False),
}


def known(
    names: Sequence[str], malignant: Sequence[str] | None = None, titles: Sequence[str] = ()
) -> Classes:
    """Returns classes, with what HAM10000 and ISIC 2019 say of theirs where nothing else is given.

    Args:
      names: in their order.
      malignant: of the names; None: those that are malignant in HAM10000 or ISIC 2019.
      titles: one a name; empty: those of HAM10000 and ISIC 2019, and a name's own for others.

    Raises:
      ValueError: see `Classes`.
    """
    told = [_KNOWN.get(name.lower(), (name, False)) for name in names]
    if malignant is None:
        malignant = [name for name, (_, bad) in zip(names, told, strict=True) if bad]
        malignant = [] if len(malignant) == len(names) else malignant
    titles = titles or [title for title, _ in told]
    return Classes(tuple(names), tuple(malignant), tuple(titles))


def of_config(data: Any) -> Classes:
    """Returns the classes of a validated configuration's section `data`."""
    return known(data.classes, data.malignant, data.titles)


HAM10000 = known(("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"))
"""HAM10000's seven diagnoses."""

ISIC2019 = known(("mel", "nv", "bcc", "ak", "bkl", "df", "vasc", "scc"))
"""ISIC 2019's eight, in the order of its truth file, which has a ninth column for none of them."""
