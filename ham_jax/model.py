"""What answers: a network with its weights, preprocessing, classes, calibration and thresholds.

`load` makes a `Model` of a run's folder or an exported one, or an `Ensemble` of several. In a job
of several processes all of them must ask together.
"""

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ham_jax import config as configuration
from ham_jax import console, hub, parallel, programs
from ham_jax.classes import Classes
from ham_jax.config import InputError
from ham_jax.data import feed, preprocess
from ham_jax.data import image as image_files
from ham_jax.data.metadata import MISSING, NUM_METADATA, encode
from ham_jax.inference import calibrator, decision, detector
from ham_jax.inference.calibrator import Calibrator
from ham_jax.inference.decision import Calibrated
from ham_jax.inference.detector import Detector

if TYPE_CHECKING:  # an exported network that was traced before needs neither Flax nor Orbax
    import pandas as pd

    from ham_jax import models

# Photographs in a batch: on CPU larger ones take longer an image, for their maps leave the caches.
_MOST_ON_CPU = 2
_SCORED = 256  # photographs: one at a time, the detector's product takes longer than the network
_MOST_LANES = 8
# YNNPACK is kept for convolutions: each of its products waits twice for other threads, and in a
# small batch that takes as long as the product. In a large one nothing is gained.
_OF_FEW = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"}
_IN_FLIGHT = 4  # batches a lane: so decoding goes on while the devices work

Variables = Mapping[str, Any]
"""{'params', 'batch_stats'} as nested dicts."""


class Explanation(NamedTuple):
    """Where a network looked, of n images.

    Attributes:
      view: what it saw, float32 [n, s, s, 3] in [0, 1].
      heat: the Grad-CAM scaled to it, float32 [n, s, s]; 1 at its own maximum, 0 where nothing
        speaks for the class.
    """

    view: np.ndarray
    heat: np.ndarray


class Lanes:
    """Computes small batches side by side on CPU, one program a thread.

    There JAX does what one thread asks for one after the other, and of a small batch much is done
    by one core while the others wait: side by side, views take two thirds of the time.

    Args:
      mesh: the devices. But for a single CPU there is one lane, whose caller waits for nothing.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        alone = mesh.devices.size == 1 and mesh.devices.flat[0].platform == "cpu"
        self._num = min(os.cpu_count() or 1, _MOST_LANES) if alone else 1
        self._pool = ThreadPoolExecutor(self._num, "lane")

    def num(self, batch_size: int) -> int:
        """Returns how many batches of that size are computed at once."""
        return self._num if batch_size <= _MOST_ON_CPU else 1

    def run(self, program: Callable[..., Any], calls: list[tuple[Any, ...]], batch_size: int):
        """Returns program(*arguments) of each call, in order."""
        if self.num(batch_size) == 1:
            return [program(*arguments) for arguments in calls]

        def in_lane(arguments: tuple[Any, ...]) -> Any:
            return jax.block_until_ready(program(*arguments))

        return list((self._pool.map if calls[1:] else map)(in_lane, calls))


class Forward:
    """The compiled ways from canvas pixels, uint8 [B, H, W, 3], to what a network says.

    Weights are arguments, for training evaluates changing ones. Results are on every process.

    Args:
      build: returns the model's pure functions; called when they are first needed.
      config: the whole configuration.
      mesh: the devices, axis `data`.
      about: what `build` returns depends on, as JSON can hold it, for the traced programs to be
        kept on disk; None: they are not.
    """

    def __init__(
        self,
        build: Callable[[], "models.Network"],
        config: ml_collections.ConfigDict,
        mesh: jax.sharding.Mesh,
        about: Any = None,
    ):
        self._build, self.mesh = build, mesh
        self.lanes = Lanes(mesh)
        self._num_tiles, self._num_views = config.eval.tiles, config.eval.tta
        self._takes_metadata = config.model.metadata
        self._view = functools.partial(
            preprocess.eval_view,
            crop_px=config.augment.crop_px,
            crop_scale=config.eval.crop_scale,
            gray_norm=config.augment.shades_of_gray,
        )
        grid = configuration.tile_grid(config)
        jit = functools.partial(jax.jit, out_shardings=parallel.batch_sharding(mesh))
        self._tile = jit(lambda tile, image: self._view(image, grid=grid, tile=tile))
        self._center = jit(self._view)
        jit = functools.partial(jax.jit, out_shardings=parallel.replicated(mesh))
        self._mean = jit(lambda views: sum(views[1:], views[0]) / len(views))
        self._said = jit(self._of_view)
        options = _OF_FEW if mesh.devices.flat[0].platform == "cpu" else None
        self._said_of_few = jit(self._of_view, compiler_options=options)
        self.explain = jit(self._explain)
        if about is not None and mesh.devices.size == 1:
            self._said = programs.Kept(self._said, ["network", *about])
            self._said_of_few = programs.Kept(self._said_of_few, ["network", *about], options)
            self._tile = programs.Kept(self._tile, ["tile", grid, *self._view.keywords.values()])

    @functools.cached_property
    def network(self) -> "models.Network":
        """The model's pure functions."""
        return self._build()

    def probabilities(
        self, variables: Variables, image: jax.Array, metadata: jax.Array | None = None
    ) -> jax.Array:
        """Returns float32 [B, C]; `metadata` is float32 [B, M], for a network that takes it.

        It is the mean over the `eval.tiles` squares of the canvas, and in each with `eval.tta = n`
        over the first n views of the dihedral group: 2 adds the mirror image, 4 all flips, 8 the
        quarter turns too.
        """
        return self._views(variables, image, metadata)[0]

    def features(self, variables: Variables, image: jax.Array) -> jax.Array:
        """Returns float32 [B, F], of the central square upright."""
        metadata = None
        if self._takes_metadata:  # which the features do not depend on
            metadata = np.tile(MISSING, (len(image), 1))
        said = self._program(len(image))
        return said(variables, self._center(image), np.int32(0), metadata)[1]

    def both(
        self, variables: Variables, image: jax.Array, metadata: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns `probabilities` and `features`, which one of the views has."""
        probabilities, features = self._views(variables, image, metadata)
        if self._num_tiles > 1:  # none of which is the central square
            features = self.features(variables, image)
        return probabilities, features

    def _views(self, variables, image, metadata):
        """Returns the mean probabilities of all views, and the features of the first."""
        # One program for all views: eight unrolled copies would compile eight times as long.
        tiles = [self._tile(np.int32(t), image) for t in range(self._num_tiles)]
        calls = [
            (variables, tile, np.int32(k), metadata)
            for tile in tiles
            for k in range(self._num_views)
        ]
        views = self.lanes.run(self._program(len(image)), calls, len(image))
        probabilities, features = zip(*views, strict=True)
        return self._mean(probabilities) if views[1:] else probabilities[0], features[0]

    def _program(self, batch_size: int) -> Any:
        return self._said_of_few if batch_size <= _MOST_ON_CPU else self._said

    def _of_view(self, variables, view, k, metadata):
        weights = variables["params"], variables["batch_stats"]
        features = self.network.features(*weights, preprocess.dihedral(view, k))
        return jax.nn.softmax(self.network.classify(*weights, features, metadata)), features

    def _explain(self, variables, image, labels, metadata=None):
        """Of the central square upright, see `Explanation`; `labels` is int32 [B]."""
        view = self._view(image)
        last, gradient = self.network.class_maps(
            variables["params"], variables["batch_stats"], view, labels, metadata
        )
        heat = jax.image.resize(grad_cam(last, gradient), view.shape[:3], "bilinear")
        return view, heat / jnp.maximum(heat.max((1, 2), keepdims=True), 1e-12)


def grad_cam(last: jax.Array, gradient: jax.Array) -> jax.Array:
    """Returns how much each place of a map speaks for a class, [B, h, w], 0 where not at all.

    Selvaraju et al., Grad-CAM, ICCV 2017: a channel weighs what the logit's derivative is on
    average over all places (eq. 1), and the positive part of the weighted sum is shown (eq. 2).

    Args:
      last: the map, [B, h, w, K].
      gradient: of the class's logit with respect to it, [B, h, w, K].
    """
    weights = gradient.mean((1, 2))
    return jax.nn.relu(jnp.einsum("bhwk,bk->bhw", last, weights))


@dataclasses.dataclass(frozen=True)
class Answer:
    """What is said of a photograph.

    Attributes:
      prediction: the class of the greatest probability; empty where it could not be read.
      probabilities: {class: probability}.
      prediction_set: diagnoses, made to hold the true one in 90 % of the lesions, of the kind that
        `decision.sets_note` tells; None where a run has no calibration.
      malignancy: the sum of the malignant classes' probabilities; None without a calibration, or
        without malignant classes.
      flagged: whether that reaches the flag's threshold; None likewise.
      ood_score: see `Detector.score`; None where no run has such a model.
      error: why it could not be read; empty where it could.
    """

    prediction: str
    probabilities: Mapping[str, float]
    prediction_set: tuple[str, ...] | None = None
    malignancy: float | None = None
    flagged: bool | None = None
    ood_score: float | None = None
    error: str = ""

    @property
    def unlike(self) -> bool:
        """Whether the photograph is known to be unlike those of training."""
        return self.ood_score is not None and self.ood_score > 1


@dataclasses.dataclass(frozen=True, eq=False)
class Answers(Sequence[Answer]):
    """What is said of n photographs: a sequence of `Answer`, and the same as arrays.

    Attributes:
      classes: C of them.
      probabilities: float64 [n, C], calibrated where there is a calibration; nan of an unreadable
        photograph.
      calibrated: with the thresholds of flag and sets, of the readable photographs in their order;
        None where a run has no calibration.
      ood_scores: float64 [n], see `Detector.score`; None where no run has such a model.
      errors: {number of a photograph: why it could not be read}.
    """

    classes: Classes
    probabilities: np.ndarray
    calibrated: Calibrated | None
    ood_scores: np.ndarray | None
    errors: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.probabilities)

    def __getitem__(self, number):
        """Returns what is said of one photograph; of a slice, a list."""
        if isinstance(number, slice):
            return [self[n] for n in range(len(self))[number]]
        number = range(len(self))[number]
        if number in self.errors:
            return Answer("", {}, error=self.errors[number])
        row, names = self.probabilities[number], self.classes.names
        members, malignancy, flagged = None, None, None
        if self._decisions is not None:
            sets, sums, flags = self._decisions
            place = int(np.searchsorted(self.read, number))
            members = tuple(np.array(names, object)[sets[place]])
            if self.classes.malignant:
                malignancy, flagged = float(sums[place]), bool(flags[place])
        return Answer(
            prediction=names[row.argmax()],
            probabilities=dict(zip(names, row.tolist(), strict=True)),
            prediction_set=members,
            malignancy=malignancy,
            flagged=flagged,
            ood_score=None if self.ood_scores is None else float(self.ood_scores[number]),
        )

    @functools.cached_property
    def _decisions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Sets, malignancy and flags of the readable photographs."""
        decided = self.calibrated
        return decided and (decided.sets(decision.SHOWN), decided.malignancy, decided.flagged)

    @functools.cached_property
    def read(self) -> np.ndarray:
        """The numbers of the photographs that could be read, int."""
        return np.setdiff1d(np.arange(len(self.probabilities)), list(self.errors))

    @property
    def unlike(self) -> np.ndarray:
        """Whether each photograph is known to be unlike those of training, bool [n]."""
        if self.ood_scores is None:
            return np.zeros(len(self.probabilities), bool)
        return self.ood_scores > 1


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A trained network and all that its answers need.

    Attributes:
      name: the folder it comes from.
      classes: what it was trained to tell apart.
      config: of the run, with the keys that were set anew.
      forward: its compiled functions.
      variables: the weights that answer, on the mesh.
      provenance: step, tta, tiles, crop_scale and weights ('raw' or 'ema'), as metrics.json and
        calibration.json say them.
      records: the fingerprint of the records that it was trained on; empty: not trained.
      calibrator: of its probabilities, or None.
      detector: of photographs unlike those of training, or None.
    """

    name: str
    classes: Classes
    config: ml_collections.ConfigDict
    forward: Forward
    variables: Variables
    provenance: Mapping[str, Any]
    records: str = ""
    calibrator: Calibrator | None = None
    detector: Detector | None = None

    @classmethod
    def of(
        cls,
        workdir: Path,
        config: ml_collections.ConfigDict,
        classes: Classes,
        mesh: jax.sharding.Mesh,
        keep: bool = False,
    ) -> "Model":
        """Returns the network of a configuration, without weights and decisions.

        Args:
          workdir: the folder it comes from.
          config: of the run.
          classes: what it is trained to tell apart.
          mesh: the devices.
          keep: what is traced of it on disk, for the next process.
        """

        def build() -> "models.Network":
            from ham_jax import models

            return models.build(
                config.model, len(classes), NUM_METADATA if config.model.metadata else 0
            )

        forward = Forward(build, config, mesh, _about(config, classes) if keep else None)
        provenance = {name: config.eval[name] for name in ("tta", "tiles", "crop_scale")}
        return cls(str(workdir), classes, config, forward, {}, provenance)

    @classmethod
    def load(
        cls,
        workdir: str | Path,
        *,
        mesh: jax.sharding.Mesh | None = None,
        overrides: Sequence[tuple[str, str]] = (),
    ) -> "Model":
        """Returns what a run's folder holds; see `load`, which also takes several."""
        mesh = parallel.mesh() if mesh is None else mesh
        return restore(hub.local(workdir), overrides, mesh).with_calibrator().with_detector()

    @property
    def workdir(self) -> Path:
        """The folder it comes from."""
        return Path(self.name)

    @property
    def takes_metadata(self) -> bool:
        """Whether it sees age, sex and site beside the photograph."""
        return self.config.model.metadata

    @property
    def num_features(self) -> int:
        """F, the length of an image's features."""
        params = self.variables["params"]
        beside = params["fusion"]["layer2"]["bias"] if "fusion" in params else ()
        return len(params["head"]["kernel"]) - len(beside)

    @property
    def canvas(self) -> tuple[int, int]:
        """Height, width in pixels of the images that it takes."""
        return tuple(self.config.data.canvas)

    def replace(self, **fields) -> "Model":
        """Returns it with other fields."""
        return dataclasses.replace(self, **fields)

    def with_weights(self, state: Mapping[str, Any], step: int) -> "Model":
        """Returns it with the weights of a state that `eval.weights` asks for.

        Args:
          state: `params`, `batch_stats` and `ema`, which is empty where no average is kept.
          step: of the state.
        """
        variables, weights = judged_weights(state, self.config.eval.weights)
        settings = {"step": step, **self.provenance, "weights": weights}
        return self.replace(variables=variables, provenance=settings)

    def encode(self, table: "pd.DataFrame") -> np.ndarray | None:
        """Returns the codes of age, sex and site float32 [n, M]; None where it takes none."""
        return encode(table) if self.takes_metadata else None

    def probabilities(
        self,
        images: feed.Images,
        metadata: np.ndarray | None = None,
        title: str | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Returns raw probabilities float64 [n, C]: evaluation cross-fits its own validation.

        Args:
          images: on the canvas, uint8 [n, H, W, 3].
          metadata: `encode`d, float32 [n, M].
          title: of a progress bar.
          batch_size: see `in_batches`.
        """
        beside = {"metadata": metadata}
        return normalised(
            self.in_batches(self.forward.probabilities, images, beside, title, batch_size)
        )

    def features(
        self, images: feed.Images, title: str | None = None, batch_size: int | None = None
    ) -> np.ndarray:
        """Returns float32 [n, F] of images on the canvas, uint8 [n, H, W, 3]; see `in_batches`."""
        return self.in_batches(self.forward.features, images, {}, title, batch_size)

    def explain(
        self, images: np.ndarray, labels: np.ndarray, metadata: np.ndarray | None = None
    ) -> Explanation:
        """Returns where the network looked.

        Args:
          images: on the canvas, uint8 [n, H, W, 3].
          labels: int [n], the class to speak for.
          metadata: `encode`d, float32 [n, M].
        """
        beside = {"labels": labels.astype(np.int32), "metadata": metadata}
        # A few images need not fill the batch of an evaluation.
        num_devices = self.forward.mesh.devices.size
        size = min(self.config.eval.batch_size, -(-len(images) // num_devices) * num_devices)
        return Explanation(*self.in_batches(self.forward.explain, images, beside, batch_size=size))

    def in_batches(
        self,
        function: Callable[..., Any],
        images: feed.Images,
        beside: Mapping[str, np.ndarray | None],
        title: str | None = None,
        batch_size: int | None = None,
    ) -> Any:
        """Returns function(variables, image=..., ...) of all images, as arrays [n, ...].

        Args:
          function: such as `forward.probabilities`.
          images: on the canvas, uint8 [n, H, W, 3].
          beside: what else it takes, by name: [n, ...] or None.
          title: of a progress bar.
          batch_size: images at once. Default: `eval.batch_size`.
        """
        mesh, parts, done = self.forward.mesh, [], 0
        batch_size = batch_size or self.config.eval.batch_size
        beside = {name: values for name, values in beside.items() if values is not None}
        batches = feed.sequential(images, batch_size, mesh, beside)
        with console.progress(title) as progress:
            for batch, count in batches:
                part = function(self.variables, **batch)
                parts.append(jax.tree.map(lambda x, count=count: np.asarray(x)[:count], part))
                done += count
                progress(done, len(images))
        return jax.tree.map(lambda *of_parts: np.concatenate(of_parts), *parts)

    def ask(
        self, images: np.ndarray, metadata: np.ndarray | None, batch_size: int
    ) -> tuple[jax.Array, jax.Array]:
        """Returns `Forward.both` of one batch: [batch_size, ...].

        Args:
          images: on the canvas, uint8 [n, H, W, 3], at most `batch_size`; the last fills it up.
          metadata: `encode`d, float32 [n, M]; ignored by a network that takes none.
          batch_size: a multiple of the number of devices.
        """
        beside = {}
        if self.takes_metadata and metadata is not None:
            beside["metadata"] = metadata
        batch = feed.one_batch(images, batch_size, self.forward.mesh, beside)
        return self.forward.both(self.variables, **batch)

    def predict(self, photographs: Any, metadata: Any = None, exact: bool = False) -> Answers:
        """Returns what is said of photographs: see `Ensemble.predict`."""
        return Ensemble((self,)).predict(photographs, metadata, exact)

    def decode(self, photographs: Any) -> np.ndarray:
        """Returns photographs on the canvas, uint8 [n, H, W, 3], for `features` and `explain`.

        Raises:
          image.ImageError: one cannot be read.
        """
        several = [photographs] if image_files.is_one(photographs) else photographs
        return np.stack([image_files.load(one, self.canvas) for one in several])

    @property
    def card(self) -> str:
        """The model card as Markdown: an export's, or what `--mode=report` wrote for a run.

        Raises:
          FileNotFoundError: there is none.
        """
        file = hub.CARD if hub.is_exported(self.workdir) else "model_card.md"
        return (self.workdir / file).read_text(encoding="utf-8")

    def with_calibrator(self) -> "Model":
        """Returns it with its folder's calibration.json; a line says where that is amiss.

        Raises:
          InputError: the file is damaged.
        """
        found, line = calibrator.read(self.workdir, self.classes), ""
        if found is None:
            line = (
                f"{self.name} has no {calibrator.FILE}: its probabilities stay as the network gives"
                f" them, without flag and sets. {calibrator.how_to_make(self.workdir)}"
            )
        elif differs := found.mismatch(self.provenance):
            line = (
                f"{self.name}/{calibrator.FILE} does not fit: {differs}. Fit it anew with the same"
                f" keys and --mode=eval --split=val --workdir={self.name}."
            )
        if line and parallel.is_main():
            console.log_line(line)
        return self.replace(calibrator=found)

    def with_detector(self, may_fit: bool = False) -> "Model":
        """Returns it with its folder's out-of-distribution model, if fitted for its weights.

        Unless the caller may fit one anew, a line says why there is none.
        """
        if not self.config.eval.ood:
            return self
        path = self.workdir / detector.FILE
        try:
            if hub.is_exported(self.workdir):
                path = self.workdir / hub.OOD
                saved = hub.read_ood(self.workdir)
                found = saved and detector.of(*saved)
                if found and len(found.whitening) != self.num_features:
                    raise ValueError(f"{path} is of a network with other features")
            else:
                found = detector.load(path)
            why = "" if found else f"there is no {path}"
        except (TypeError, ValueError) as error:
            found, why = None, f"{error}"
        if found is not None:
            asked = self.detector_provenance
            differs = [key for key in asked if found.provenance.get(key) != asked[key]]
            if differs:
                found, why = None, f"{path} was fitted with another {', '.join(differs)}"
        if why and not may_fit and parallel.is_main():
            console.log_line(
                f"Images unlike those of training are not marked: {why}. --mode=eval --split=val"
                f" --workdir={self.name} makes it."
            )
        return self.replace(detector=found)

    @property
    def detector_provenance(self) -> dict[str, Any]:
        """What features depend on and a command line can change."""
        return {key: self.provenance[key] for key in ("step", "weights", "crop_scale")}


@dataclasses.dataclass(frozen=True, eq=False)
class Ensemble:
    """Models whose probabilities are averaged; they may differ in all but their classes.

    Attributes:
      members: at least one.
    """

    members: tuple[Model, ...]

    def __post_init__(self):
        if not self.members:
            raise InputError("No run was named: give the folder of at least one.")
        first = self.members[0]
        for member in self.members[1:]:
            if member.classes.names != first.classes.names:
                raise InputError(
                    f"--workdir: {first.name} was trained on classes {', '.join(first.classes)},"
                    f" {member.name} on {', '.join(member.classes)}; only networks of the same"
                    " classes can be averaged."
                )

    @property
    def classes(self) -> Classes:
        """Those of the members."""
        return self.members[0].classes

    @property
    def takes_metadata(self) -> bool:
        """Whether a member sees age, sex and site beside the photograph."""
        return any(member.takes_metadata for member in self.members)

    def with_decisions(self) -> "Ensemble":
        """Returns it with the calibration and out-of-distribution models of the members' folders.

        Raises:
          InputError: a calibration is damaged.
        """
        members = [member.with_calibrator() for member in self.members]
        if len(members) > 1 and all(m.calibrator for m in members) and parallel.is_main():
            console.log_line(
                f"Flag and sets go by the mean of {len(members)} runs' thresholds. Each run's were"
                " fixed for its own probabilities; for their mean nothing was measured."
            )
        return Ensemble(tuple(member.with_detector() for member in members))

    def predict(self, photographs: Any, metadata: Any = None, exact: bool = False) -> Answers:
        """Returns what is said of photographs: the mean over the members.

        Each photograph is decoded once for each canvas among the members.

        Args:
          photographs: one or several, n: paths, files' bytes, Pillow images or arrays uint8
            [H, W, 3], see `image.load`.
          metadata: what is known of them, for members that take it: a row a photograph with any of
            age (years), sex and localization, as a DataFrame or what makes one; or one dict.
          exact: fill each batch up to `eval.batch_size`, so that answers equal those of evaluation
            to the last bit. Few photographs are answered faster without, to about 1e-6.
        """
        if image_files.is_one(photographs):
            photographs = [photographs]
        size = None
        if not exact:  # a power of two, so that few programs are ever compiled
            size = 1 << max(len(photographs) - 1, 0).bit_length()
            if self.members[0].forward.mesh.devices.flat[0].platform == "cpu":
                size = min(size, _MOST_ON_CPU)
        decode = functools.partial(image_files.load_many, photographs)
        return self.answers(decode, len(photographs), metadata, size, "Predicting")

    def answers(
        self,
        decode: Callable[[tuple[int, int], int], Iterable[np.ndarray | image_files.ImageError]],
        num: int,
        metadata: Any = None,
        batch_size: int | None = None,
        title: str | None = None,
    ) -> Answers:
        """Returns what is said of photographs that the caller decodes.

        Args:
          decode: (canvas, number of processes) -> each photograph on it, as `image.load_many`.
          num: of the photographs.
          metadata: see `predict`.
          batch_size: photographs at once; at least one a device, and at most `eval.batch_size`,
            which is the default.
          title: of a progress bar.
        """
        codes = encode(_table(metadata, num)) if self.takes_metadata else None
        raw = np.full((len(self.members), num, len(self.classes)), np.nan)
        scores = np.full(raw.shape[:2], np.nan)
        errors: dict[int, str] = {}
        canvases = [member.canvas for member in self.members]
        for canvas in dict.fromkeys(canvases):
            chosen = [place for place, other in enumerate(canvases) if other == canvas]
            config = self.members[chosen[0]].config
            num_devices = self.members[0].forward.mesh.devices.size
            size = config.eval.batch_size
            if batch_size is not None:
                size = min(size, -(-batch_size // num_devices) * num_devices)
            decoded = decode(canvas, config.data.num_workers)
            batches = _in_batches(decoded, num, size, errors, title)
            batches = (
                (place, rows, images, None if codes is None else codes[rows])
                for rows, images in batches
                for place in chosen
            )

            def ask(batch, size=size):
                place, rows, images, beside = batch
                return place, rows, self.members[place].ask(images, beside, size)

            num_lanes = self.members[0].forward.lanes.num(size)
            asked = feed.ahead(ask, batches, num_lanes, _IN_FLIGHT * num_lanes)
            for place, rows, said, features in _gathered(asked):
                raw[place, rows] = normalised(said)
                if found := self.members[place].detector:
                    scores[place, rows] = found.score(features)
        of_members = [s if m.detector else None for s, m in zip(scores, self.members, strict=True)]
        return self._answers(raw, detector.joined(of_members), errors)

    def _answers(
        self, raw: np.ndarray, ood_scores: np.ndarray | None, errors: Mapping[int, str]
    ) -> Answers:
        """Returns the answers of raw probabilities float64 [members, n, C]."""
        read = np.setdiff1d(np.arange(raw.shape[1]), list(errors))
        calibrated, each = [], []
        for member, of_member in zip(self.members, raw[:, read], strict=True):
            if member.calibrator:
                method = member.config.eval.calibration
                calibrated.append(member.calibrator.apply(method, of_member))
                of_member = calibrated[-1].probabilities
            each.append(of_member)
        probabilities = raw.mean(0)
        probabilities[read] = np.mean(each, axis=0)
        together = decision.mean(calibrated) if len(calibrated) == len(each) else None
        return Answers(self.classes, probabilities, together, ood_scores, errors)


def load(
    path: str | Path | Sequence[str | Path] | None = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
    overrides: Sequence[tuple[str, str]] = (),
) -> Model | Ensemble:
    """Returns what a run's folder says: network, weights, calibration, out-of-distribution model.

    Unless JAX was given another place, compiled programs are from now on kept on disk, see
    `parallel.compile_cache`: the next process answers seconds earlier.

    Args:
      path: of a training run; of a cross-validation, whose folds become an ensemble; an exported
        folder; `hf:user/name`, such a folder on the Hugging Face hub; or several of these.
        Default: the network that comes with this library.
      mesh: the devices. Default: all there are.
      overrides: (key, text) pairs of keys that evaluation may set anew, such as ("eval.tta", "8").

    Raises:
      InputError: no checkpoint there, or keys that may not be set anew.
    """
    paths = [path] if isinstance(path, str | Path) else path
    if paths is None:
        paths = hub.released()
    if jax.config.jax_compilation_cache_dir is None:
        parallel.compile_cache()
    mesh = parallel.mesh() if mesh is None else mesh
    ensemble = Ensemble(restore_all([hub.local(one) for one in paths], overrides, mesh))
    ensemble = ensemble.with_decisions()
    return ensemble.members[0] if len(ensemble.members) == 1 else ensemble


def restore_all(
    workdirs: Sequence[Path], overrides: Sequence[tuple[str, str]], mesh: jax.sharding.Mesh
) -> tuple[Model, ...]:
    """Returns the runs of the folders, without decisions; of a cross-validation each fold's.

    Args:
      workdirs: of training runs and cross-validations, and exported folders.
      overrides: (key, text) pairs of the command line.
      mesh: the devices.

    Raises:
      InputError: see `restore`.
    """
    runs = [run for workdir in workdirs for run in _runs(workdir)]
    return tuple(restore(run, overrides, mesh) for run in runs)


def _runs(workdir: Path) -> list[Path]:
    if hub.is_exported(workdir):
        return hub.members(workdir)
    from ham_jax import checkpoints

    return checkpoints.runs(workdir)


def restore(workdir: Path, overrides: Sequence[tuple[str, str]], mesh: jax.sharding.Mesh) -> Model:
    """Returns the network of a run with its best weights, without decisions.

    Args:
      workdir: of a training run, or an exported folder.
      overrides: (key, text) pairs of the command line.
      mesh: the devices.

    Raises:
      InputError: no checkpoint there, none of this network, or keys that may not be set anew.
    """
    is_exported = hub.is_exported(workdir)
    if is_exported:
        params, batch_stats, ema, meta, step = hub.load(workdir)
    else:
        from ham_jax import checkpoints

        params, batch_stats, ema, meta, step = checkpoints.load_for_inference(workdir)
    config = configuration.from_dict(meta["config"], is_trained=True)
    faults = configuration.fixed_faults([path for path, _ in overrides], workdir)
    faults += configuration.override(config, overrides)
    if faults:
        raise InputError(faults)
    configuration.validate(config, mesh.devices.size)
    try:
        classes = Classes.from_json(meta["classes"])
    except ValueError as error:
        raise InputError(f"{workdir}: its classes are damaged: {error}") from error
    model = Model.of(workdir, config, classes, mesh, keep=True)
    state = {"params": params, "batch_stats": batch_stats, "ema": ema}
    model = model.with_weights(state, step).replace(records=meta.get("records", ""))
    if is_exported:
        _check_shapes(model)
    return model.replace(variables=parallel.replicate(mesh, model.variables))


def _check_shapes(model: Model) -> None:
    """Checks that weights, which may come from anybody, are those of the network.

    Raises:
      InputError: they are not.
    """

    def of_network() -> dict[str, list[int]]:
        params, batch_stats = jax.eval_shape(lambda: model.forward.network.init(0))
        return _shapes({"params": params, "batch_stats": batch_stats})

    about = ["shapes", *_about(model.config, model.classes)]
    needed, found = programs.remembered(about, of_network), _shapes(model.variables)
    odd = sorted(
        path for path in needed.keys() | found.keys() if needed.get(path) != found.get(path)
    )
    if odd:
        raise InputError(
            f"{model.workdir / hub.WEIGHTS} does not fit {model.config.model.name} of"
            f" {len(model.classes)} classes: {len(odd)} tensors are missing, left over or of"
            f" another shape, {', '.join(odd[:3])} among them."
        )


def _shapes(tree: Variables) -> dict[str, list[int]]:
    """Returns {path/of/leaf: its shape}."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _about(config: ml_collections.ConfigDict, classes: Classes) -> list[Any]:
    """Returns what a network's functions depend on, as JSON can hold it."""
    return [config.model.to_dict(), len(classes)]


def judged_weights(state: Mapping[str, Any], asked: str) -> tuple[Variables, str]:
    """Returns the weights that a run is judged by and answers with, and which they are.

    Args:
      state: `params`, `batch_stats` and `ema`, which is empty where no average is kept.
      asked: `eval.weights`: 'raw', 'ema' or 'auto'.

    Returns:
      (variables, 'raw' or 'ema').

    Raises:
      InputError: those asked for are not there.
    """
    if state["ema"] and asked != "raw":
        return state["ema"], "ema"
    if not state["params"]:
        raise InputError("eval.weights = 'raw': an export of averaged weights has no others.")
    return {name: state[name] for name in ("params", "batch_stats")}, "raw"


def normalised(probabilities: np.ndarray) -> np.ndarray:
    """Returns float64 rows that sum to 1, without float32's rounding."""
    probabilities = probabilities.astype(np.float64)
    return probabilities / probabilities.sum(-1, keepdims=True)


def _table(metadata: Any, num_photographs: int) -> "pd.DataFrame":
    """Returns a row a photograph.

    Raises:
      InputError: there are more or fewer.
    """
    import pandas as pd

    if isinstance(metadata, Mapping) and not any(isinstance(v, list) for v in metadata.values()):
        metadata = [metadata] * num_photographs
    table = pd.DataFrame(index=range(num_photographs)) if metadata is None else metadata
    table = pd.DataFrame(table)
    if len(table) != num_photographs:
        raise InputError(f"There are metadata of {len(table)} for {num_photographs} photographs.")
    return table


def _gathered(asked: Iterable[tuple[int, list[int], tuple[jax.Array, ...]]]) -> Iterator[Any]:
    """Yields (member, numbers of photographs [k], arrays [k, ...]) of several batches together.

    Args:
      asked: (member, numbers, what `Model.ask` returned), of one batch.
    """
    parts: dict[int, list[tuple[Any, ...]]] = collections.defaultdict(list)
    for place, rows, said in asked:
        parts[place].append((rows, *(np.asarray(array)[: len(rows)] for array in said)))
        if sum(len(rows) for rows, *_ in parts[place]) >= _SCORED:
            yield place, *map(np.concatenate, zip(*parts.pop(place), strict=True))
    for place, rest in parts.items():
        yield place, *map(np.concatenate, zip(*rest, strict=True))


def _in_batches(
    decoded: Iterable[np.ndarray | image_files.ImageError],
    num_photographs: int,
    batch_size: int,
    errors: dict[int, str],
    title: str | None,
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yields (numbers, pixels uint8 [k, H, W, 3]) of the readable ones, a batch at a time.

    Why the others are not readable is added to `errors`.
    """
    rows: list[int] = []
    batch: list[np.ndarray] = []
    with console.progress(title) as progress:
        for number, pixels in enumerate(decoded):
            if isinstance(pixels, image_files.ImageError):
                errors[number] = str(pixels)
            else:
                batch.append(pixels)
                rows.append(number)
            if len(rows) == batch_size:
                yield rows, np.stack(batch)
                rows, batch = [], []
            progress(number + 1, num_photographs)
    if rows:
        yield rows, np.stack(batch)
