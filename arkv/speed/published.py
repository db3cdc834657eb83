"""Speeds that papers have published, to stand beside what is measured here.

They were measured on other hardware, with other code for the full cache, and are never compared with ours
row by row: what may be compared is how much faster a small cache is than the full one of the same table.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

LINEAR_TABLE = "LineAR, arXiv 2512.04857, table of efficiency"
SSD_TABLE = "SSD, arXiv 2510.18716, table of efficiency"
LARGE_CARD = "hardware not named: a card of 80 GB by what it holds"


@dataclass(frozen=True)
class Published:
    """A row of a table.

    Attributes:
        table: paper and table.
        model: what the registry calls it.
        method: what the table calls it.
        policy: the same for `arkv.load_policy`.
        batch_size: pictures decoded at a time.
        pictures_per_second: as printed, or derived from what is.
        gigabytes: memory of the device in use, 10^9 bytes.
        hardware: where it was measured.
        note: what the table leaves open and we have inferred; empty if nothing.
    """

    table: str
    model: str
    method: str
    policy: str
    batch_size: int
    pictures_per_second: float
    gigabytes: float
    hardware: str = LARGE_CARD
    note: str = ""


def _linear_rows() -> list[Published]:
    # Model, batch, and for every ratio gigabytes and seconds a batch.
    measured = [
        ("llamagen-xl-384", 256, {"1": (64.75, 331.52), "1/4": (25.51, 63.99), "1/6": (20.97, 43.78)}),
        ("llamagen-xxl-384", 128, {"1": (51.37, 179.96), "1/4": (19.54, 50.05), "1/6": (15.87, 36.22)}),
        ("janus-pro-1b", 128, {"1": (58.68, 143.64), "1/4": (37.04, 31.76), "1/6": (34.64, 24.52)}),
        ("janus-pro-7b", 64, {"1": (74.01, 180.8), "1/4": (47.59, 40.3), "1/6": (44.66, 32.19)}),
        ("lumina-mgpt-7b-768", 12, {"1": (55.48, 283.99), "1/6": (21.43, 146.82), "1/8": (19.64, 133.51)}),
        ("lumina-mgpt-7b-1024", 8, {"1": (62.95, 655.52), "1/8": (20.50, 248.63)}),
    ]
    return [
        Published(
            table=LINEAR_TABLE,
            model=model,
            method="full cache" if ratio == "1" else f"LineAR {ratio}",
            policy="full" if ratio == "1" else f"linear:ratio={ratio}",
            batch_size=batch,
            pictures_per_second=batch / seconds,
            gigabytes=gigabytes,
        )
        for model, batch, ratios in measured
        for ratio, (gigabytes, seconds) in ratios.items()
    ]


def _ssd_rows() -> list[Published]:
    methods = {
        "full cache": "full",
        "SSD": "ssd:ratio=1/5,buffer=1",
        "SSD w/ buffer": "ssd:ratio=1/5,buffer=24",
    }
    # Tokens a second and gigabytes, in the order of the methods.
    measured = {
        32: ((897.3, 18.1), (1253.0, 5.9), (1754.1, 5.8)),
        64: ((543.6, 32.2), (1658.4, 7.9), (2524.6, 7.7)),
        128: ((289.2, 60.4), (1911.7, 11.8), (3099.4, 11.6)),
    }
    return [
        Published(
            table=SSD_TABLE,
            model="janus-pro-1b",
            method=method,
            policy=policy,
            batch_size=batch,
            pictures_per_second=tokens / 576,
            gigabytes=gigabytes,
            note="SSD's table names neither its model nor its units: Janus-Pro-1B, tokens/s and GB inferred",
        )
        for batch, cells in measured.items()
        for (method, policy), (tokens, gigabytes) in zip(methods.items(), cells, strict=True)
    ]


PRESETS: dict[str, tuple[Published, ...]] = {
    "linear-table": tuple(_linear_rows()),
    "ssd-table": tuple(_ssd_rows()),
}
"""The efficiency tables of the papers, by the name that `arkv bench --preset` knows them by."""


def published_for(model: str, batch_sizes: Collection[int]) -> list[Published]:
    """What has been published of a model at one of these batch sizes."""
    return [
        row
        for rows in PRESETS.values()
        for row in rows
        if row.model == model and row.batch_size in batch_sizes
    ]
