"""A model for commands that need not draw well."""

from __future__ import annotations

import pytest
import torch

from arkv import registry
from arkv.models.scenes.adapter import Scenes
from arkv.models.scenes.codebook import PATCH_VALUES, Codebook
from arkv.models.transformer import TransformerConfig


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Scenes:
    """An untrained model with the prompts and pictures of `scenes`, in its place: much faster."""
    torch.manual_seed(0)
    config = TransformerConfig(layers=1, width=16, heads=1, kv_heads=1, head_dim=16, hidden=16)
    model = Scenes(Codebook(torch.rand(8, PATCH_VALUES)), config).eval()
    monkeypatch.setattr(registry, "load_model", lambda *_, **__: model)
    return model
