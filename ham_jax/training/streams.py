"""The random streams of a training step: one number a draw, so that no draw shifts another.

A step's key is fold_in(key(seed), step); a stream's is fold_in(step's key, number). A number never
changes: a new draw gets the next one, and the number of a draw that was removed stays unused. Two
things are drawn elsewhere: `feed` orders images by (seed, 0, epoch) and (seed, 1, step), and
`Network.init` draws the initial weights from key(seed).
"""

import enum


class Stream(enum.IntEnum):
    """The number of each draw of a training step."""

    CROP = 0
    DIHEDRAL = 1
    COLOR = 2
    CUTOUT = 3
    MIX_CHOICE = 4
    MIXUP = 5
    CUTMIX = 6
    WARP = 7
    MODEL = 8  # dropout, stochastic depth
    METADATA = 9
