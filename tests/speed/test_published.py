"""The tables of the papers, by the numbers that the papers derive from them."""

from __future__ import annotations

import pytest

from arkv.registry import load_policy, names
from arkv.speed.published import PRESETS, published_for

SPEEDUPS = {
    ("llamagen-xl-384", 256): {"LineAR 1/4": 5.18, "LineAR 1/6": 7.57},
    ("llamagen-xxl-384", 128): {"LineAR 1/4": 3.60, "LineAR 1/6": 4.97},
    ("janus-pro-1b", 128): {"LineAR 1/4": 4.53, "LineAR 1/6": 5.87, "SSD": 6.6, "SSD w/ buffer": 10.7},
    ("janus-pro-1b", 64): {"SSD": 3.1, "SSD w/ buffer": 4.6},
    ("janus-pro-1b", 32): {"SSD": 1.4, "SSD w/ buffer": 2.0},
    ("janus-pro-7b", 64): {"LineAR 1/4": 4.49, "LineAR 1/6": 5.62},
    ("lumina-mgpt-7b-768", 12): {"LineAR 1/6": 1.93, "LineAR 1/8": 2.13},
    ("lumina-mgpt-7b-1024", 8): {"LineAR 1/8": 2.64},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_have_the_speedups_that_the_paper_prints(preset: str) -> None:
    rows = PRESETS[preset]
    full = {(row.model, row.batch_size): row for row in rows if row.policy == "full"}
    small = [row for row in rows if row.policy != "full"]
    assert small
    for row in small:
        base = full[row.model, row.batch_size]
        printed = SPEEDUPS[row.model, row.batch_size][row.method]
        assert row.pictures_per_second / base.pictures_per_second == pytest.approx(printed, rel=0.03)
        assert row.gigabytes < base.gigabytes


def test_models_and_policies_are_ours() -> None:
    models = {entry.name for entry in names("model")}
    for row in (row for rows in PRESETS.values() for row in rows):
        assert row.model in models
        load_policy(row.policy)


def test_what_has_been_published_of_a_model() -> None:
    found = published_for("janus-pro-1b", [128, 1])
    assert {row.batch_size for row in found} == {128}
    assert len({row.table for row in found}) == 2
    assert published_for("scenes", [128]) == []
