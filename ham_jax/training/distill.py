"""Trained networks that teach another: it learns their probabilities beside the diagnoses.

Of an image whose target is y the loss of a network with the logits z is

    (1 - s) L(z, y) + s T^2 KL(q || softmax(z / T)),    q = mean over teachers of softmax(t / T),

with s = `loss.teacher_share` and T = `loss.teacher_temperature` (Hinton et al., Distilling the
Knowledge in a Neural Network, 2015, section 2.1; the factor T^2 keeps the gradient's size). L is
the run's own loss. Teachers see the very view that the network sees, crop, colour and mixing
included, for as long as it trains: Beyer et al., Knowledge distillation: A good teacher is patient
and consistent, CVPR 2022.

L may be adjusted for class imbalance, the divergence never is. Logit adjustment adds the log prior
to z in training, so that the bare z, which answer, favour no class. What teachers answer with are
their bare logits t, too. So z is compared with t as it is: where z + log prior were compared, z
would come to t - log prior, and favour rare classes twice. With s = 1 the divergence is 0 where the
network's answers equal its teachers' mean.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ham_jax import classes
from ham_jax import config as configuration
from ham_jax.config import InputError
from ham_jax.model import Model, Variables, restore_all

# Keys of what an image goes through before a network sees it.
_OF_VIEW = ("data.canvas", "augment.crop_px", "augment.shades_of_gray")


def load(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> tuple[Model, ...]:
    """Returns the networks that `loss.teacher` names, with the weights that answer, on the mesh.

    Args:
      config: the whole configuration of the run that they teach.
      mesh: the devices.

    Raises:
      InputError: one is no trained run, or was trained on other classes or another kind of view.
    """
    if not config.loss.teacher:
        return ()
    where = f"loss.teacher = {config.loss.teacher!r}"
    folders = [Path(path) for path in configuration.paths(config.loss.teacher)]
    try:
        teachers = restore_all(folders, (), mesh)
    except InputError as error:
        raise InputError([f"{where} must name trained runs.", *error.faults]) from error
    faults = []
    for teacher in teachers:
        told = f"{where}: {teacher.name}"
        names = classes.of_config(config.data).names
        if teacher.classes.names != names:
            faults.append(
                f"{told} was trained on classes {', '.join(teacher.classes)}, this run has"
                f" {', '.join(names)}: they must be the same, in the same order."
            )
        own, its = (configuration.flatten(c) for c in (config, teacher.config))
        faults += [
            f"{told} was trained with {key} = {its[key]!r}, this run has {own[key]!r}: teachers"
            " see the views of the run, so set the same."
            for key in _OF_VIEW
            if its[key] != own[key]
        ]
        if teacher.takes_metadata and not config.model.metadata:
            faults.append(
                f"{told} takes age, sex and site: set model.metadata = true, or take teachers that"
                " see the image alone."
            )
    if faults:
        raise InputError(faults)
    return teachers


def log_probabilities(
    teachers: Sequence[Model],
    variables: Sequence[Variables],
    image: jax.Array,
    metadata: jax.Array | None,
    temperature: float,
) -> jax.Array:
    """Returns log q of the module's formula, float32 [B, C].

    Args:
      teachers: at least one.
      variables: the weights of each; arguments, lest they become constants of a program.
      image: what the network sees, float32 [B, s, s, 3].
      metadata: float32 [B, M], for teachers that take it, or None.
      temperature: T.
    """
    each = []
    for teacher, weights in zip(teachers, variables, strict=True):
        logits, _ = teacher.forward.network.apply(
            weights["params"],
            weights["batch_stats"],
            image,
            train=False,
            metadata=metadata if teacher.takes_metadata else None,
        )
        each.append(jax.nn.log_softmax(logits / temperature))
    return jax.nn.logsumexp(jnp.stack(each), axis=0) - np.float32(np.log(len(each)))


def divergence(log_taught: jax.Array, logits: jax.Array, temperature: float) -> jax.Array:
    """Returns T^2 KL(q || softmax(logits / T)) of each image in nats, float32 [B].

    Args:
      log_taught: log q, float32 [B, C].
      logits: of the network, without adjustment, [B, C].
      temperature: T.
    """
    log_p = jax.nn.log_softmax(logits.astype(log_taught.dtype) / temperature)
    return temperature**2 * (jnp.exp(log_taught) * (log_taught - log_p)).sum(-1)
