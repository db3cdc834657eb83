"""Which heads look far: the share of attention that goes beyond the neighbourhood of the query.

    share of a query  = attention to visual tokens outside of its neighbourhood / to all visual tokens
    share of a head   = mean over queries, pictures and guidance rows

The score that SSD sorts heads by (arXiv 2510.18716, sparsity profiling), measured while pictures are drawn
with the full cache. The form is inferred: the paper says that attention outside the immediate neighbourhood
is averaged, and leaves open how far that neighbourhood reaches, and what it is divided by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from arkv.decoder import Decoder
from arkv.decoding.compiling import Compile
from arkv.errors import ArkvError
from arkv.grid import Grid
from arkv.head_profile import HeadProfile
from arkv.model import Model, ModelSpec
from arkv.pictures.figure import new_figure, to_image
from arkv.policy import CachePolicy, Observation
from arkv.registry import load_policy
from arkv.store import CachePlan, Store

RADIUS = 2
"""Cells that a neighbourhood reaches upwards and to either side: what a 5 x 5 convolution would see."""

MAP_COLOURS = "cividis"  # as even to colour-blind eyes, and in print


def measure(
    model: Model,
    prompts: Sequence[Any],
    *,
    seeds: Sequence[int] | None = None,
    radius: int = RADIUS,
    guidance: float | None = None,
    batch_size: int | None = None,
    compile: Compile = "none",
    progress: bool = False,
) -> HeadProfile:
    """Draw pictures with the full cache and measure every head on the way.

    The neighbourhood of a query are the cells at most `radius` rows above it and at most `radius` columns to
    either side, its own among them. Condition tokens are not counted. A query counts if a whole row lies
    outside of its neighbourhood, so from row `radius + 1` on: one that has nothing far to look at would
    only make every head look local. Query heads that share a key head count by their attention to visual
    tokens.

    Args:
        model: whose heads are measured.
        prompts: as for `Decoder.generate`.
        seeds: one a prompt; None for 0, 1, 2, ...
        radius: in cells.
        guidance: scale of classifier-free guidance; 1 leaves the unconditional rows out, None takes the
            model's own.
        batch_size: pictures drawn at a time; None for all at once.
        compile: "none" or "inductor".
        progress: show a bar for every batch.

    Raises:
        ArkvError: no row of the picture is beyond the radius, or as `Decoder.generate`.
    """
    spec = model.spec
    queries = sum(spec.grid.row(position) > radius for position in range(spec.grid.tokens - 1))
    if radius < 0 or not queries:
        raise ArkvError(
            f"the radius is {radius}: expected 0 to {spec.grid.rows - 2}, so that some rows of the "
            f"{spec.grid.rows} of {spec.name} lie outside of a neighbourhood"
        )
    guidance = spec.guidance if guidance is None else guidance
    seeds = range(len(prompts)) if seeds is None else seeds
    if len(seeds) != len(prompts) or not prompts:
        raise ArkvError(
            f"{len(seeds)} seeds for {len(prompts)} prompts: give one seed a prompt, at least one"
        )
    size = len(prompts) if batch_size is None else batch_size
    if size < 1:
        raise ArkvError(f"batch_size is {size}: expected at least 1")
    model.check_prompts(prompts)
    decoder = Decoder(model, Watching(full=load_policy("full"), radius=radius), compile)
    total = torch.zeros(spec.layers, spec.kv_heads, dtype=torch.float64)
    rows = 0
    for start in range(0, len(prompts), size):
        batch = slice(start, start + size)
        decoder.generate(prompts[batch], seeds=seeds[batch], guidance=guidance, progress=progress)
        assert decoder.store is not None
        shares = decoder.store["outside"].cpu().double()  # not all devices have float64
        total += shares.sum(1)
        rows += shares.shape[1]
    means = (total / (rows * queries)).tolist()
    return HeadProfile(
        model=spec.name,
        outside=tuple(tuple(round(share, 6) for share in layer) for layer in means),
        radius=radius,
        prompts=len(prompts),
        guidance=guidance,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={"arkv": version("arkv"), "torch": torch.__version__},
    )


def draw_map(profile: HeadProfile) -> Image.Image:
    """The shares as a map, a row a layer and a column a key head, every cell with its value in percent.

    Raises:
        ArkvError: matplotlib is not installed.
    """
    layers, heads = len(profile.outside), len(profile.outside[0])
    figure = new_figure(max(4.6, 2.2 + 0.52 * heads), 1.9 + 0.42 * layers)
    axes = figure.add_subplot()
    drawn = axes.imshow(profile.outside, cmap=MAP_COLOURS, vmin=0, vmax=1, aspect="auto")
    for layer, shares in enumerate(profile.outside):
        for head, share in enumerate(shares):
            ink = "white" if share < 0.5 else "black"
            axes.text(head, layer, f"{share:.0%}", ha="center", va="center", color=ink, fontsize=8)
    axes.set_xticks(range(heads))
    axes.set_yticks(range(layers))
    axes.set_xlabel("key head", fontsize=9)
    axes.set_ylabel("layer", fontsize=9)
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    # White lines between the cells.
    axes.set_xticks([x - 0.5 for x in range(1, heads)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, layers)], minor=True)
    axes.tick_params(which="minor", length=0)
    axes.grid(which="minor", color=figure.get_facecolor(), linewidth=2)
    bar = figure.colorbar(drawn, ax=axes, format=lambda share, _: f"{share:.0%}")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8)
    figure.suptitle(f"{profile.model}: attention beyond the neighbourhood", fontsize=11, fontweight="bold")
    axes.set_title(
        f"how much of the attention to visual tokens goes further than {profile.radius} cells;\n"
        f"mean over {profile.prompts} pictures drawn with the full cache",
        fontsize=8,
    )
    return to_image(figure)


@dataclass(frozen=True, kw_only=True)
class Watching(CachePolicy):
    """The full cache, while the shares of distant attention of its queries are summed up.

    Attributes:
        full: the full cache.
        radius: cells that a neighbourhood reaches upwards and to either side.
    """

    head_fields: ClassVar[Mapping[str, torch.dtype]] = {"outside": torch.float32}
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})

    full: CachePolicy
    radius: int

    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        """That of the full cache."""
        return self.full.plan(grid, spec)

    def select(self, store: Store, step: Tensor) -> Tensor:
        """As the full cache."""
        return self.full.select(store, step)

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        """Add the share of this query."""
        assert seen.mass is not None
        grid, position = store.grid, store.position
        above = grid.row(step) - grid.row(position)
        beside = (grid.column(step) - grid.column(position)).abs()
        visual = torch.where(position >= 0, seen.mass, 0)
        distant = torch.where((above > self.radius) | (beside > self.radius), visual, 0)
        # A head that looks at condition tokens alone looks at nothing far.
        least = torch.finfo(torch.float32).tiny
        share = store.sum_by_head(distant) / store.sum_by_head(visual).clamp(min=least)
        store["outside"].add_(torch.where(grid.row(step) > self.radius, share, 0))
