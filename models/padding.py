"""Prompts of different lengths as one batch, for models that read text and picture as one sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from arkv.model import Condition
from arkv.models.rope import sequence_rotation


def left_padded(
    rows: Sequence[Sequence[int]],
    padding: int,
    embedding: nn.Embedding,
    tokens: int,
    head_dim: int,
    theta: float,
) -> Condition:
    """Rows of ids, left-padded to the longest; positions count from each row's own first token.

    Args:
        rows: ids of the condition tokens, at least one a row.
        padding: id that stands, masked, where a row has no token.
        embedding: of the ids.
        tokens: visual tokens that follow, `N`.
        head_dim: width of a head, even.
        theta: base of the rotary frequencies.
    """
    device = embedding.weight.device
    length = max(map(len, rows))
    absent = torch.tensor([length - len(row) for row in rows], device=device)[:, None]
    ids = torch.tensor([[padding] * (length - len(row)) + [*row] for row in rows])
    places = torch.arange(length + tokens, device=device)
    rotation = sequence_rotation((places - absent).clamp(min=0), head_dim, theta)
    return Condition(embedding(ids.to(device)), places[:length] >= absent, rotation)
