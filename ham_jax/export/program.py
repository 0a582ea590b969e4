"""All that a model says of photographs, as one function of JAX to be written into a file.

Weights are float32 constants in it, the images are shown in all views, and the calibration and the
out-of-distribution model are part of it. It is traced in forms that suit every backend.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from ham_jax import config as configuration
from ham_jax import models
from ham_jax.data import preprocess
from ham_jax.data.metadata import NUM_METADATA
from ham_jax.inference.detector import Detector
from ham_jax.model import Model
from ham_jax.models import conv

Outputs = dict[str, Any]
"""`probabilities` [N, C], calibrated; `raw` [N, C], the same before; `features` [N, F] of the
upright view; and of a model with a detector `ood_score` [N]; float32."""


def arguments(model: Model) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns what the function takes, by name, of a symbolic number of photographs."""
    (batch,) = export.symbolic_shape("N")
    taken = {"image": jax.ShapeDtypeStruct((batch, *model.canvas, 3), jnp.uint8)}
    if model.takes_metadata:
        taken["metadata"] = jax.ShapeDtypeStruct((batch, NUM_METADATA), jnp.float32)
    return taken


def output_names(model: Model) -> list[str]:
    """Returns the names of what comes out, in their order."""
    return ["probabilities", "raw", "features"] + ["ood_score"] * (model.detector is not None)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Within it, what is traced suits every backend, not this one alone."""
    with conv.stock(), preprocess.in_form("products"):
        yield


class Program:
    """What a model says, to be called within `portable`.

    Args:
      model: with its weights and decisions.
    """

    def __init__(self, model: Model):
        self._model = model
        section = model.config.model.copy_and_resolve_references()
        section.dtype = "float32"  # on every backend
        num_metadata = NUM_METADATA if model.takes_metadata else 0
        self._network = models.build(section, len(model.classes), num_metadata)
        self._num_averaged = model.config.eval.tiles * model.config.eval.tta
        self._weights = jax.tree.map(np.asarray, dict(model.variables))

    def __call__(self, image: jax.Array, metadata: jax.Array | None = None) -> Outputs:
        """Images on the canvas uint8 [N, H, W, 3], metadata float32 [N, M] -> Outputs."""
        model, weights = self._model, (self._weights["params"], self._weights["batch_stats"])
        views = self._views(image)
        # One network over all views at once, so that its layers stand in the file once.
        features = self._network.features(*weights, jnp.concatenate(views))
        beside = None if metadata is None else jnp.concatenate([metadata] * len(views))
        shares = jax.nn.softmax(self._network.classify(*weights, features, beside))
        shares, features = (x.reshape(len(views), -1, x.shape[-1]) for x in (shares, features))
        raw = lax.slice_in_dim(shares, len(views) - self._num_averaged, len(views)).sum(0)
        raw = raw / raw.sum(-1, keepdims=True)
        upright = lax.index_in_dim(features, 0, keepdims=False)
        said = {"probabilities": self._calibrated(raw), "raw": raw, "features": upright}
        if model.detector is not None:
            said["ood_score"] = _score(model.detector, upright)
        return said

    def _views(self, image: jax.Array) -> list[jax.Array]:
        """Returns what the network sees, float32 [N, s, s, 3] each, the central one upright first.

        Where there are several tiles, that one is not among those whose answers are averaged.
        """
        config = self._model.config
        grid = configuration.tile_grid(config)

        def view(one, **tile):
            settings = (config.augment.crop_px, config.eval.crop_scale)
            return preprocess.eval_view(
                one[None], *settings, config.augment.shades_of_gray, **tile
            )[0]

        def turned(one, k):
            return preprocess.dihedral(one[None], jnp.int32(k))[0]

        # Image by image, the weights of the resampling are the same for all, and so constants.
        tiles = range(config.eval.tiles)
        crops = [jax.vmap(functools.partial(view, grid=grid, tile=t))(image) for t in tiles]
        views = [
            jax.vmap(functools.partial(turned, k=k))(crop)
            for crop in crops
            for k in range(config.eval.tta)
        ]
        return views if len(tiles) == 1 else [jax.vmap(view)(image), *views]

    def _calibrated(self, raw: jax.Array) -> jax.Array:
        """See `calibrator.calibrate`."""
        if self._model.calibrator is None:
            return raw
        method = self._model.config.eval.calibration
        return calibrate(self._model.calibrator.methods[method]["parameters"], method, raw)


def calibrate(parameters: Mapping[str, Any], method: str, raw: jax.Array) -> jax.Array:
    """Returns `calibrator.calibrate`'s probabilities, float32 [N, C]."""
    if method == "none":
        return raw
    if method == "temperature":
        logits = jnp.log(jnp.maximum(raw, np.finfo(float).eps))
        return jax.nn.softmax(logits / parameters["temperature"])
    lines = zip(parameters["x"], parameters["y"], strict=True)
    columns = [_line(lax.index_in_dim(raw, label, 1), *line) for label, line in enumerate(lines)]
    columns = jnp.concatenate(columns, -1)
    return columns / columns.sum(-1, keepdims=True)


def _line(p: jax.Array, x: list[float], y: list[float]) -> jax.Array:
    """Returns `np.interp(p, x, y)`: a sum of ramps, one between two points each; p is [N, 1]."""
    starts, steps = np.array(x[:-1], np.float32), np.diff(y).astype(np.float32)
    widths = np.maximum(np.diff(x), np.finfo(np.float32).tiny).astype(np.float32)
    return y[0] + (jnp.clip((p - starts) / widths, 0, 1) * steps).sum(-1, keepdims=True)


def _score(detector: Detector, features: jax.Array) -> jax.Array:
    """See `Detector.score`; features are [N, F]."""
    # Measured from their middle, for in float32 a difference of large numbers has few digits.
    middle = detector.means.mean(0)
    means = (detector.means - middle) @ detector.whitening
    white = (features - middle.astype(np.float32)) @ detector.whitening.astype(np.float32)
    squares = ((white[:, None] - means.astype(np.float32)) ** 2).sum(-1)
    return jnp.sqrt(squares.min(-1)) / np.float32(detector.threshold)
