"""A network learns its teachers' answers to the views that it sees itself."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ham_jax import checkpoints, classes, config, models
from ham_jax import model as models_that_answer
from ham_jax.config import InputError
from ham_jax.data import prepare as preparation
from ham_jax.evaluation import evaluate, predictions
from ham_jax.model import Model
from ham_jax.training import augment, crossval, distill, loop, losses, optim, step

COUNTS = np.array([10, 20, 30, 40, 50, 600, 70])


def linear(section, num_classes, num_metadata=0):
    """A network that costs nothing: its name decides what it looks at."""
    power = {"resnet18": 1, "resnet34": 2, "resnet50": 3}[section.name]

    def features(params, batch_stats, image):
        return jnp.concatenate([(image**power).mean((1, 2)), image.std((1, 2))], axis=-1)

    def classify(params, batch_stats, x, metadata=None):
        if num_metadata:
            x = jnp.concatenate([x, metadata], axis=-1)
        return x @ params["head"]["kernel"]

    def apply(params, batch_stats, image, train=False, key=None, metadata=None):
        return classify(params, {}, features(params, {}, image), metadata), batch_stats

    def init(seed):
        shape = (6 + num_metadata, num_classes)
        kernel = np.random.default_rng(seed + power).normal(0, 3, shape)
        return {"head": {"kernel": jnp.asarray(kernel, jnp.float32)}}, {}

    return models.Network(section.name, init, apply, features, None, classify)


@pytest.fixture(autouse=True)
def linear_networks(monkeypatch):
    monkeypatch.setattr(models, "build", linear)


@pytest.fixture
def mesh():
    return jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))


class StopAfter:
    """A request to stop, as SIGTERM would make it, after being asked for a number of times."""

    exit_code = 75

    def __init__(self, times=None):
        self.times, self.asked = times, 0

    def reached(self):
        self.asked += 1
        return self.asked == self.times


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize(("share", "parts"), [(1.0, 1), (0.3, 2)])
def test_a_step_descends_the_divergence_of_the_bare_outputs(share, parts, mesh):
    c = config.base()
    c.augment.crop_px = 16
    c.loss.update(imbalance="logit_adjusted", teacher_share=share, teacher_temperature=2.0)
    c.train.accumulate = parts
    names = ("resnet34", "resnet50")
    teachers = []
    for name in names:
        its = c.copy_and_resolve_references()
        its.model.name = name
        of_classes = classes.of_config(its.data)
        teacher = Model.of("teacher", its, of_classes, mesh)
        params, batch_stats = teacher.forward.network.init(5)
        variables = {"params": params, "batch_stats": batch_stats}
        teachers.append(teacher.replace(variables=variables))
    network = linear(c.model, 7)
    optimizer = optim.make(c.optim, lambda _: 0.1, network.init(0)[0])
    loss = losses.make_loss(c.loss, COUNTS, c.data.classes)
    take = step.make_train_step(network, optimizer, loss, c, mesh, teachers)
    state = step.init_state(network, optimizer, c, mesh)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (8, 20, 24, 3)).astype(np.uint8),
        "label": np.arange(8, dtype=np.int32) % 7,
    }
    taught = tuple(teacher.variables for teacher in teachers)
    _, scalars = take(state, batch, taught)

    # The same by hand: of logits z = x @ W, dL/dW = x^T dL/dz, averaged over the batch.
    key = jax.random.fold_in(jax.random.key(c.seed), 0)
    image, target, _ = augment.augment(key, batch["image"], batch["label"], c.augment, 7)
    kernel = np.asarray(state["params"]["head"]["kernel"], np.float64)
    x = np.asarray(network.features(None, None, image), np.float64)
    logits, target = x @ kernel, np.asarray(target, np.float64)
    q = np.mean(
        [
            np.exp(log_softmax(t.forward.network.apply(*v.values(), image)[0] / np.float32(2)))
            for t, v in zip(teachers, taught, strict=True)
        ],
        axis=0,
    )
    divergence = 4 * (q * (np.log(q) - log_softmax(logits / 2))).sum(1).mean()
    adjusted = log_softmax(logits + np.log(COUNTS / COUNTS.sum()))
    truth = -(target * adjusted).sum(1).mean()
    expected = share * divergence + (1 - share) * truth
    np.testing.assert_allclose(scalars["loss"], expected, rtol=2e-5)
    of_logits = share * 2 * (np.exp(log_softmax(logits / 2)) - q)
    of_logits += (1 - share) * (np.exp(adjusted) - target)
    norm = np.linalg.norm(x.T @ of_logits / len(x))
    np.testing.assert_allclose(scalars["grad_norm"], norm, rtol=2e-4)

    # The teachers' weights are arguments: others teach something else without a new program.
    others = jax.tree.map(lambda w: -w, taught)
    assert take(state, batch, others)[1]["loss"] != scalars["loss"]
    assert take._cache_size() == 1


def test_sure_teachers_have_a_finite_divergence():
    sure = jax.nn.log_softmax(jnp.array([[2000.0, 0, -2000]]))
    value, slope = jax.value_and_grad(lambda z: distill.divergence(sure, z, 1.0).sum())(
        jnp.array([[-300.0, 500, 100]])
    )
    np.testing.assert_allclose(value, 800)
    np.testing.assert_allclose(slope, [[-1, 1, 0]], atol=1e-6)
    np.testing.assert_allclose(distill.divergence(sure, sure, 1.0), 0, atol=1e-6)


def tiny(raw, prepared, **edits):
    c = config.base()
    c.data.dir, c.data.prepared_dir = str(raw), str(prepared)
    c.data.update(canvas=(24, 32), allow_partial=True, num_folds=2, num_workers=1)
    c.data.update(feed="resident", test_share=0.2, val_share=0.2)
    c.augment.crop_px, c.eval.batch_size, c.train.batch_size = 16, 64, 8
    c.optim.ema_decay, c.optim.learning_rate, c.optim.warmup = 0.5, 0.1, {"steps": 0}
    c.train.duration, c.checkpoint.every = {"steps": 3}, {"steps": 1}
    c.loss.imbalance = "logit_adjusted"
    c.log.tensorboard = False
    with c.unlocked():
        c.update_from_flattened_dict(edits)
    config.validate(c)
    return c


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


@pytest.fixture(scope="module")
def trained(tiny_raw, prepared, tmp_path_factory):
    """A cross-validation beside an inner test, and what its folds may teach."""
    folder = tmp_path_factory.mktemp("runs")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build", linear)
        crossval.train(tiny(tiny_raw, prepared), folder / "folds", mesh, StopAfter())
        edits = {"data.num_folds": 1, "loss.teacher": str(folder / "folds")}
        c = tiny(tiny_raw, prepared, **edits)
        loop.train(c, folder / "student", mesh, StopAfter())
    return folder


def test_folds_and_what_they_teach_are_tested_on_lesions_that_none_saw(
    trained, tiny_raw, prepared, mesh, tmp_path
):
    folds, student = trained / "folds", trained / "student"
    data = preparation.prepare(tiny(tiny_raw, prepared, **{"data.num_folds": 1}))
    lesions = {name: set(data.select(name).table["lesion_id"]) for name in ("train", "val", "test")}
    assert set(predictions.read(folds / "predictions.csv").lesion_ids) == lesions["train"]
    assert set(predictions.read(student / "predictions.csv").lesion_ids) == lesions["val"]

    raw = []
    for number, runs in enumerate(([folds / "fold0"], [folds / "fold1"], [folds], [student])):
        output = tmp_path / str(number)
        numbers = evaluate.run(runs, "test", [], mesh, output)
        judged = predictions.read(output / "predictions.csv")
        assert set(judged.lesion_ids) == lesions["test"]
        assert numbers["split"] == "test"
        raw.append(judged.probabilities)
    np.testing.assert_array_equal(raw[2], (raw[0] + raw[1]) / 2)
    assert not np.allclose(raw[3], raw[2])


def test_resumed_under_teachers_it_is_the_same_run_and_answers_without_them(
    trained, tiny_raw, prepared, mesh, tmp_path, caplog
):
    shutil.copytree(trained / "folds", tmp_path / "folds")
    names = ("calibration.json", "metrics.json", "predictions.csv", "split.csv")
    edits = {"data.num_folds": 1, "loss.teacher": str(tmp_path / "folds")}
    c, run = tiny(tiny_raw, prepared, **edits), tmp_path / "student"
    with pytest.raises(loop.Preempted):
        loop.train(c, run, mesh, StopAfter(2))
    loop.train(c, run, mesh, StopAfter())
    for name in names:
        assert (run / name).read_bytes() == (trained / "student" / name).read_bytes(), name
    states = [checkpoints.load_for_inference(r, "latest") for r in (run, trained / "student")]
    jax.tree.map(np.testing.assert_array_equal, states[0][:3], states[1][:3])
    assert set(states[0][0]) == {"head"}  # and no weights of a teacher

    shutil.rmtree(tmp_path / "folds")
    written = (run / "metrics.json").read_text()
    evaluate.run([run], "val", [], mesh)
    assert (run / "metrics.json").read_text() == written
    assert not caplog.text
    assert len(models_that_answer.load(run, mesh=mesh).predict(next(tiny_raw.rglob("*.jpg")))) == 1
    with pytest.raises(InputError, match=r"(?s)loss\.teacher = .*no such folder"):
        loop.train(c, tmp_path / "new", mesh, StopAfter())
    assert not (tmp_path / "new").exists()


def test_teachers_that_saw_a_held_out_lesion_or_other_views_are_refused(
    trained, tiny_raw, prepared, mesh, tmp_path
):
    teacher = {"loss.teacher": f"{trained / 'folds' / 'fold0'},{trained / 'folds' / 'fold1'}"}
    for train, edits in (
        (loop.train, {}),  # fold 1's network trained on what validates fold 0
        (loop.train, {"data.num_folds": 1, "seed": 1}),  # others are set aside
        (crossval.train, {}),
    ):
        c = tiny(tiny_raw, prepared, **(teacher | edits))
        with pytest.raises(InputError, match=r"loss\.teacher = .*inflated by leakage"):
            train(c, tmp_path / "run", mesh, StopAfter())
    # Fold 0's alone may teach another network of fold 0.
    alone = {"loss.teacher": str(trained / "folds" / "fold0"), "train.duration": {"steps": 1}}
    loop.train(tiny(tiny_raw, prepared, **alone), tmp_path / "alone", mesh, StopAfter())

    names = list(config.base().data.classes)
    edits = {"data.canvas": (32, 40), "augment.crop_px": 24, "data.classes": tuple(names[::-1])}
    with pytest.raises(InputError) as error:
        loop.train(tiny(tiny_raw, prepared, **(teacher | edits)), tmp_path / "b", mesh, StopAfter())
    told = "\n".join(error.value.faults)
    assert len(error.value.faults) == 6, told
    for part in ("the same order", "data.canvas = (24, 32)", "augment.crop_px = 16, this run"):
        assert part in told
    assert {path.name for path in tmp_path.iterdir()} == {"alone"}


def test_what_cannot_be_set_together_is_said(tmp_path):
    c = config.base()
    c.data.update(split_csv="a.csv", test_share=0.1)
    c.loss.teacher = "a,,b"
    with pytest.raises(InputError) as error:
        config.validate(c)
    assert [fault.split(" =")[0] for fault in error.value.faults] == [
        "data.split_csv",
        "loss.teacher",
    ]
    c.data.update(split_csv=None, num_folds=1, test_share=0.1)
    c.loss.teacher = None
    with pytest.raises(InputError, match=r"leaves nothing to validate: set data\.val_share"):
        config.validate(c)
    with pytest.raises(InputError, match=r"data\.num_folds = 1 is a single run"):
        crossval.train(c, tmp_path / "folds", None, None)
    texts = [("loss.teacher", f"~/a, hf:user/b,{tmp_path}")]
    assert config.override(c, texts) == []
    first, second, third = config.paths(c.loss.teacher)
    assert not first.startswith("~")
    assert (second, third) == ("hf:user/b", str(tmp_path))
