import dataclasses
from pathlib import Path

import numpy as np
import pytest

from ham_jax.classes import HAM10000, Classes
from ham_jax.config import InputError
from ham_jax.evaluation import compare
from ham_jax.evaluation.predictions import Predictions


def some(num_images=300, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(num_images) % 7
    groups = np.arange(num_images) // 2 * 7 + labels  # lesions of one image
    groups[: num_images // 2] = labels[: num_images // 2]  # and seven of many
    lesion_ids = np.array([f"HAM_{g}" for g in groups])
    image_ids = np.array([f"ISIC_{n:07}" for n in range(num_images)])
    probabilities = rng.dirichlet(np.ones(7), num_images)
    return Predictions(HAM10000, labels, probabilities, lesion_ids, image_ids)


def improved(first, share, seed=1):
    """Makes a share of the answers right."""
    right = np.random.default_rng(seed).random(len(first)) < share
    truth = np.eye(7)[first.labels]
    return first.with_probabilities(np.where(right[:, None], truth, first.probabilities))


def test_the_interval_is_that_of_a_loop_which_judges_both_in_the_same_resamples():
    first = some()
    labels, groups = first.labels, first.lesion_ids
    second = improved(first, 0.2)
    found = compare.paired(first, second, num_draws=4000)
    rng = np.random.default_rng(7)
    differences = []
    for _ in range(1000):
        recalls = []
        for k in range(7):
            lesions = np.unique(groups[labels == k])
            drawn = rng.choice(lesions, len(lesions))
            rows = np.concatenate([np.flatnonzero((groups == g) & (labels == k)) for g in drawn])
            recalls.append([(p.probabilities[rows].argmax(1) == k).mean() for p in (first, second)])
        differences.append(np.diff(np.mean(recalls, axis=0))[0])
    np.testing.assert_allclose(
        found["interval"], np.quantile(differences, [0.025, 0.975]), atol=0.02
    )
    assert found["interval"][0] < found["difference"] < found["interval"][1]


def test_equal_networks_do_not_differ_and_exchanging_them_turns_the_sign():
    first = some()
    same = compare.paired(first, first)
    assert (same["difference"], same["interval"], same["mcnemar_p"]) == (0, [0, 0], 1)
    second = improved(first, 0.3)
    there, back = compare.paired(first, second), compare.paired(second, first)
    assert there["difference"] == -back["difference"] > 0
    np.testing.assert_allclose(there["interval"], -np.array(back["interval"][::-1]), atol=0.02)
    assert there["mcnemar_p"] == back["mcnemar_p"] < 1e-3
    assert there["only_second_right"] == back["only_first_right"] > 0


def test_files_are_matched_by_image_and_others_are_refused(tmp_path, capsys):
    first = some(70)
    second = improved(first, 0.5)
    files = [str(tmp_path / f"{name}.csv") for name in "abc"]
    first.write(files[0])
    second.write(files[1])
    # `write` sorts by image: another order has to be made by hand
    header, *lines = Path(files[1]).read_text().splitlines()
    Path(files[1]).write_text("\n".join([header, *lines[::-1]]) + "\n")
    (result,) = compare.run(files[:2])
    assert result == compare.paired(first, second)
    assert f"{result['difference']:+.3f}" in capsys.readouterr().out
    image_ids = np.array([*first.image_ids[:-1], "ISIC_9999999"])
    dataclasses.replace(first, image_ids=image_ids).write(files[2])
    with pytest.raises(InputError, match="69 are in both"):
        compare.run([files[0], files[2]])
    dataclasses.replace(first, labels=(first.labels + 1) % 7).write(files[2])
    with pytest.raises(InputError, match="disagree about the truth"):
        compare.run([files[0], files[2]])
    dataclasses.replace(first, classes=Classes(tuple("abcdefg"))).write(files[2])
    with pytest.raises(InputError, match=r"has the classes a, b, .*akiec") as caught:
        compare.run([files[0], files[2], files[2]])
    assert len(caught.value.faults) == 2
