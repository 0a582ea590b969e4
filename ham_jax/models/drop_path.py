"""Stochastic depth: Huang et al., Deep Networks with Stochastic Depth, ECCV 2016."""

from collections.abc import Sequence

from flax import nnx


class DropPath(nnx.Dropout):
    """Leaves out a residual branch [B, H, W, C] in training, for each image by itself.

    What remains is divided by the share that does, so that the expectation is the branch and
    evaluation needs no correction.
    """

    def __init__(self, rate: float):
        super().__init__(rate, broadcast_dims=(1, 2, 3))


def rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Returns each stage's rate of each block: from 0 in a line to `last` at the last block."""
    step = last / max(sum(depths) - 1, 1)
    blocks = iter(range(sum(depths)))
    return [[step * next(blocks) for _ in range(depth)] for depth in depths]
