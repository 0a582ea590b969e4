import jax
import numpy as np

from ham_jax.data.metadata import MISSING
from ham_jax.export import stablehlo

IMAGES = np.random.default_rng(1).integers(0, 256, (5, 36, 48, 3), np.uint8)


def test_the_file_says_what_the_model_says(small_model, tmp_path):
    settings = {"model.name": "resnet18", "eval.tta": 8, "model.metadata": True}
    model, path = small_model(**settings), tmp_path / "model.stablehlo"
    stablehlo.write(model, path)
    for num in (1, 5):
        said = stablehlo.answer(path, IMAGES[:num], np.tile(MISSING, (num, 1)))
        ours = model.predict(IMAGES[:num])
        np.testing.assert_allclose(said["probabilities"], ours.probabilities, atol=1e-5)
        np.testing.assert_allclose(said["ood_score"], ours.ood_scores, rtol=1e-4)
        features = model.features(IMAGES[:num])
        np.testing.assert_allclose(said["features"], features, rtol=1e-4, atol=1e-4)
    assert jax.export.deserialize(path.read_bytes()).platforms == ("cpu", "cuda", "tpu")
