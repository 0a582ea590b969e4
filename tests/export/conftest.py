"""Small models of every family with all that an answer can have, without training."""

import jax
import numpy as np
import pytest

from ham_jax import config, model, parallel
from ham_jax.classes import Classes
from ham_jax.inference.calibrator import Calibrator
from ham_jax.inference.detector import Detector
from ham_jax.models import convnext, efficientnet, resnet

CLASSES = Classes(("bkl", "mel", "nv"), ("mel",), ("benign keratosis", "melanoma", "nevus"))
_THRESHOLDS = {"malignant": 0.3, "marginal": 0.4, "class_conditional": [0.2, 0.25, 0.45]}
_PARAMETERS = {
    "none": {},
    "temperature": {"temperature": 1.7},
    "isotonic": {  # the second point twice: a step
        "x": [[0.01, 0.3, 0.3, 0.9]] * 3,
        "y": [[0.02, 0.1, 0.4, 0.95], [0.1, 0.2, 0.25, 0.8], [0.01, 0.5, 0.6, 0.9]],
    },
}


@pytest.fixture
def small_model(monkeypatch, tmp_path):
    """Returns a function from keys of the configuration to a model."""
    monkeypatch.setattr(resnet, "_WIDTHS", (8, 16))
    monkeypatch.setitem(resnet.DEPTHS, "resnet18", (1, 1))
    monkeypatch.setattr(efficientnet, "_STAGES", ((1, 3, 1, 1, 8), (2, 5, 2, 6, 16)))
    monkeypatch.setattr(efficientnet, "_HEAD", 32)
    monkeypatch.setitem(convnext.SCALES, "convnext_atto", ((1, 1, 0, 1), (8, 8, 8, 16)))

    def make(**keys):
        c = config.base()
        settings = {"data.canvas": (36, 48), "augment.crop_px": 32, "model.dropout": 0.2} | keys
        with c.unlocked():
            c.update_from_flattened_dict(settings)
        made = model.Model.of(tmp_path, c, CLASSES, parallel.mesh())
        rng = np.random.default_rng(0)

        def weights(path, leaf):
            drawn = rng.normal(size=leaf.shape).astype(np.float32)
            if path[-1].key in ("var", "std", "scale"):
                return np.abs(drawn) / 4 + 0.5
            return drawn / np.sqrt(max(1, np.prod(leaf.shape[:-1])))

        params, stats = jax.tree.map_with_path(
            weights, jax.eval_shape(made.forward.network.init, 0)
        )
        num = params["head"]["kernel"].shape[0] - 64 * c.model.metadata
        detector = Detector(rng.normal(size=(3, num)), rng.normal(size=(num, num)), 2.5 * num, {})
        methods = {
            name: {"parameters": parameters, "thresholds": _THRESHOLDS}
            for name, parameters in _PARAMETERS.items()
        }
        variables = parallel.replicate(made.forward.mesh, {"params": params, "batch_stats": stats})
        return made.replace(
            variables=variables, calibrator=Calibrator(CLASSES, methods), detector=detector
        )

    return make
