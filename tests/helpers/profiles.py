"""Profiles of heads that nobody has measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arkv.head_profile import PERCENTS, HeadProfile
from arkv.model import ModelSpec


def profile_of(spec: ModelSpec, shares: Sequence[Sequence[float]]) -> HeadProfile:
    """Heads of which every window short of the whole picture leaves out these shares, in whole percent."""
    far = spec.grid.tokens - 1
    reach = tuple(
        tuple(tuple(far if percent <= 100 * share else 0 for percent in PERCENTS) for share in layer)
        for layer in shares
    )
    return HeadProfile(spec.name, spec.grid.tokens, reach, 1, 1.5, "2026-01-01", {})


def saved(profile: HeadProfile, path: Path) -> str:
    """The path, once the profile lies there."""
    profile.save(path)
    return str(path)
