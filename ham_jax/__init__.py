"""Train, evaluate and use skin-lesion classifiers on HAM10000. Not a medical device.

import ham_jax
model = ham_jax.load("runs/lite")
answers = model.predict(["photograph.jpg"])
"""

from typing import TYPE_CHECKING, Any

from ham_jax.classes import Classes

if TYPE_CHECKING:
    from ham_jax.model import Answer, Answers, Ensemble, Model, load

__version__ = "0.1.0"
__all__ = ["Answer", "Answers", "Classes", "Ensemble", "Model", "load"]

DISCLAIMER = "Educational and research use, not a diagnosis."


def __getattr__(name: str) -> Any:
    """Imports what needs JAX only where it is asked for."""
    if name in __all__:
        from ham_jax import model

        return getattr(model, name)
    raise AttributeError(f"module 'ham_jax' has no attribute {name!r}")
