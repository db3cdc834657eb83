"""How many tokens of a picture a pass is to take where nobody says: reading against arithmetic.

A pass reads every weight once, however many tokens it is fed, and does two operations a weight for each of
them. As long as reading takes longer, more tokens cost little: up to as many as the machine's operations a
second by its bytes a second, times the bytes of a weight, by two. Rows of the batch and tokens of a window
count alike, so the more pictures there are, the smaller is the window that pays.

The choice depends on the shape of the batch, the device and the dtype, and on nothing that is measured while
it is made: the same call makes the same passes.
"""

from __future__ import annotations

from typing import Final, Literal

import torch

WindowSize = int | Literal["auto"]

WIDTHS: Final = (16, 8, 4)
"""What is chosen from; with fewer a pass, what a window costs beside is too much of what it saves."""

BALANCE: Final = {("cuda", 2): 160, ("cuda", 4): 32, ("cpu", 2): 32, ("cpu", 4): 64}
"""Tokens of a pass, all rows together, by device and bytes of a weight.

CUDA by data sheets: dense products in sixteen bits, an A100 156 (312e12 / 2.0e12), an H100 295, an L4 403;
in float32 without TensorFloat-32, an A100 20, an H100 40. CPU: from two cores of a server
without matrix units. In sixteen bits a pass of 32 tokens cost Janus-Pro-1B twice one of two, and a pass of 64
four times one of eight (docs/guide/window.md), which drafts hardly bring in; float32 was tried on `scenes`.
"""

BREAK_EVEN: Final = 1.5
"""Tokens a pass below which a window is taken not to pay; a pass of eight is to cost 1.4 of one at most."""

TRIAL_LINES: Final = 2
"""Lines after which a picture alone is asked whether its drafts are right often enough."""


def chosen_width(rows: int, device: torch.device, dtype: torch.dtype) -> int:
    """The window that `"auto"` stands for.

    Args:
        rows: of the batch, both guidance rows of a picture counted.
        device: where the weights are; one that is not known decodes one token a pass.
        dtype: of the weights.

    Returns:
        Tokens of a picture in a pass: 1 where a pass is bound by arithmetic already.
    """
    most = BALANCE.get((device.type, dtype.itemsize), 0)
    return next((width for width in WIDTHS if rows * width <= most), 1)
