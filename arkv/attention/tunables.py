"""Sizes that the attention kernels go by, from a small table by shape.

None of them depends on how many rows there are: it is the slots alone that say how a sum is formed.
`docs/results/tune_kernels.py` measures them on the machine at hand and prints a better table.
"""

from __future__ import annotations

from typing import NamedTuple

from arkv.attention.blocks import BLOCK


class Shape(NamedTuple):
    """What of a call decides about sizes.

    Attributes:
        unequal: whether the slots of the heads lie in blocks.
        grouped: whether several query heads share a key head.
        key_bytes: bytes of one key, 64 to 512; keys of other lengths go by the next of these.
        window: whether there are several tokens; then there is no difference if heads are grouped.
    """

    unequal: bool
    grouped: bool
    key_bytes: int
    window: bool = False

    @staticmethod
    def of(group: int, head_dim: int, itemsize: int, unequal: bool, window: bool = False) -> Shape:
        """The shape of a call.

        Args:
            group: query heads of a key head.
            head_dim: numbers of a key.
            itemsize: bytes of a stored number.
            unequal: as in `Shape`.
            window: as in `Shape`.
        """
        width = itemsize * (1 << (head_dim - 1).bit_length())
        return Shape(unequal, group > 1 and not window, min(max(width, 64), 512), window)


class Tuning(NamedTuple):
    """Sizes of the first kernel.

    Attributes:
        tile: slots of which a warp has keys and values under way at a time, a power of two. Those that make
            4 KB of keys take, with as many of values, half of a thread's registers.
        threads: that share the key of a slot, a power of two: few exchange less, many need fewer registers.
        warps: of a program, each with slots of its own.
        stages: tiles that are fetched ahead of the one at hand, plus one.
        part: most slots of a part, a multiple of `BLOCK`; for unequal heads the places of a program.
    """

    tile: int
    threads: int
    warps: int
    stages: int
    part: int


TABLE: dict[Shape, Tuning] = {
    Shape(unequal=False, grouped=False, key_bytes=64): Tuning(64, 4, 2, 1, 256),
    Shape(unequal=False, grouped=False, key_bytes=128): Tuning(32, 8, 2, 1, 256),
    Shape(unequal=False, grouped=False, key_bytes=256): Tuning(16, 8, 4, 1, 256),
    Shape(unequal=False, grouped=False, key_bytes=512): Tuning(8, 8, 4, 1, 256),
    Shape(unequal=False, grouped=True, key_bytes=64): Tuning(32, 8, 1, 1, 256),
    Shape(unequal=False, grouped=True, key_bytes=128): Tuning(16, 8, 2, 1, 256),
    Shape(unequal=False, grouped=True, key_bytes=256): Tuning(16, 8, 2, 1, 256),
    Shape(unequal=False, grouped=True, key_bytes=512): Tuning(16, 8, 1, 1, 256),
    Shape(unequal=True, grouped=False, key_bytes=64): Tuning(32, 4, 1, 1, 128),
    Shape(unequal=True, grouped=False, key_bytes=128): Tuning(16, 8, 2, 1, 128),
    Shape(unequal=True, grouped=False, key_bytes=256): Tuning(16, 8, 2, 1, 128),
    Shape(unequal=True, grouped=False, key_bytes=512): Tuning(8, 8, 2, 1, 128),
    Shape(unequal=True, grouped=True, key_bytes=64): Tuning(32, 8, 1, 1, 128),
    Shape(unequal=True, grouped=True, key_bytes=128): Tuning(16, 8, 2, 1, 128),
    Shape(unequal=True, grouped=True, key_bytes=256): Tuning(8, 8, 4, 1, 128),
    Shape(unequal=True, grouped=True, key_bytes=512): Tuning(16, 8, 1, 1, 128),
    Shape(unequal=False, grouped=False, key_bytes=64, window=True): Tuning(8, 8, 4, 1, 64),
    Shape(unequal=False, grouped=False, key_bytes=128, window=True): Tuning(8, 8, 4, 1, 64),
    Shape(unequal=False, grouped=False, key_bytes=256, window=True): Tuning(8, 8, 4, 1, 64),
    Shape(unequal=False, grouped=False, key_bytes=512, window=True): Tuning(8, 8, 4, 1, 64),
    Shape(unequal=True, grouped=False, key_bytes=64, window=True): Tuning(8, 8, 4, 1, 64),
    Shape(unequal=True, grouped=False, key_bytes=128, window=True): Tuning(8, 8, 4, 1, 64),
    Shape(unequal=True, grouped=False, key_bytes=256, window=True): Tuning(8, 8, 4, 1, 64),
    Shape(unequal=True, grouped=False, key_bytes=512, window=True): Tuning(8, 8, 4, 1, 64),
}
"""Chosen from machine code for sm_80, sm_90 and sm_100 (see the page on kernels), and not measured yet."""


def tuning_of(shape: Shape) -> Tuning:
    """What the table has for a shape."""
    return TABLE[shape]


def parts_of(capacity: int, tuning: Tuning) -> tuple[int, int]:
    """How the slots of a head are cut.

    Args:
        capacity: slots of the head.
        tuning: has the most that a part may have.

    Returns:
        Parts, and the slots of each but the last, a multiple of `BLOCK`: as even as that allows.
    """
    parts = -(-capacity // tuning.part)
    share = -(-capacity // (parts * BLOCK)) * BLOCK
    return -(-capacity // share), share
