"""Classes say what is wrong with them, and come back from JSON."""

import pytest

from ham_jax.classes import HAM10000, ISIC2019, Classes, known


@pytest.mark.parametrize(
    ("names", "malignant", "told"),
    [
        (("a",), (), "There are 1 classes; 2 to 100"),
        (tuple(map(str, range(101))), (), "There are 101 classes"),
        (("Nevus", "nevus"), (), "nevus is there twice"),
        (("a", " b"), (), "without spaces around it, not ' b'"),
        (("a", "b\n"), (), "printable"),
        (("benign", "Malignant", "Total"), (), "called malignant, total: .*'malignant lesion'"),
        (("a", "b"), ("c",), "Malignant is c, but the classes are a, b"),
        (("a", "b"), ("a", "b"), "nothing to flag"),
    ],
)
def test_what_cannot_be_classes_is_told(names, malignant, told):
    with pytest.raises(ValueError, match=told):
        Classes(names, malignant)


def test_classes_come_back_from_json_and_known_ones_keep_their_meaning():
    own = Classes(("a b", "c"), malignant=("c",), titles=("A", "C"))
    for classes in (own, HAM10000, ISIC2019):
        assert Classes.from_json(classes.to_json()) == classes
    assert Classes.from_json(list(HAM10000)) == HAM10000
    assert HAM10000.malignant == ("akiec", "bcc", "mel")
    assert known(("MEL", "wart")).malignant_labels == (0,)
    assert known(("MEL", "wart"), malignant=()).malignant == ()
    assert known(("MEL", "wart")).titles == ("melanoma", "wart")
    for content in (3, "ab", {"names": "ab"}, {"names": [1, 2]}, None):
        with pytest.raises(ValueError, match="name"):
            Classes.from_json(content)
