"""Random numbers that are functions: of a seed, a place and a code, and of nothing else.

A counter-based generator has no state (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
2011). Whoever asks for the number of (seed, place, code) gets the same one, in any order, on any device,
alone or in a batch; nothing is stored, and nothing is drawn beforehand. Here a code passes two rounds of a
mixer of 32 bits, each under a key of the seed and the place. A mixer is one to one, so no two codes of a
place share a number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

# Odd factors spread neighbouring places and codes over all bits: those of Philox's keys.
PLACES, CODES = 0x9E3779B9 - 2**32, 0xBB67AE85 - 2**32
# MurmurHash3's mixer of 32 bits (Appleby 2011): every bit of its input flips half of the bits behind it.
FIRST_FACTOR, SECOND_FACTOR = 0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32


def seed_keys(seeds: Sequence[int]) -> Tensor:
    """The keys of seeds, as numpy's `SeedSequence` spreads them.

    Args:
        seeds: from 0 to 2^64 - 1, one a picture.

    Returns:
        int32 `[pictures, 2]`.
    """
    states = [numpy.random.SeedSequence(seed).generate_state(2) for seed in seeds]
    return torch.from_numpy(numpy.stack(states).view(numpy.int32))


def random_bits(keys: Tensor, places: Tensor, codes: int) -> Tensor:
    """Random numbers of 32 bits, the same to the last bit wherever they are computed.

    Args:
        keys: int32 `[..., 2]`, from `seed_keys`.
        places: int64 `[...]`, below 2^31, of the shape of the keys but for their last dimension.
        codes: how many.

    Returns:
        int32 `[..., codes]`, all of its values equally likely.
    """
    first = _mix((places.int() * PLACES) ^ keys[..., 0])
    second = _mix(first ^ keys[..., 1])
    code = torch.arange(codes, dtype=torch.int32, device=keys.device) * CODES
    return _mix(_mix(code ^ first[..., None]) ^ second[..., None])


def gumbel(keys: Tensor, places: Tensor, codes: int) -> Tensor:
    """Noise of the standard Gumbel distribution.

    The code with the greatest sum of logit and noise is a draw from the softmax of the logits (Maddison et
    al., "A* Sampling", arXiv 1411.0030, section 2). A small change of the logits seldom makes it another.

    Args:
        keys: as for `random_bits`.
        places: as for `random_bits`.
        codes: how many.

    Returns:
        float32 `[..., codes]`, from -2.9 to 22.2.
    """
    # A share of few bits is exact, and small shares make the large noise that decides.
    share = (_shifted(random_bits(keys, places, codes), 1).float() + 0.5) * 2.0**-31
    return -torch.log(-torch.log1p(-share.clamp(max=1 - 2.0**-24)))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 16)) * FIRST_FACTOR
    x = (x ^ _shifted(x, 13)) * SECOND_FACTOR
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Towards the lower bits, with zeros behind them."""
    return (x >> bits) & (2 ** (32 - bits) - 1)
