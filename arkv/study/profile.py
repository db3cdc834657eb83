"""How far back every head looks: the share of its attention by lag, the distance behind the query.

    share of a query at a lag  = attention to the token that far back / to all visual tokens
    share of a head            = mean over queries, pictures and guidance rows

What a window of W tokens leaves out of it is the score that SSD sorts heads by (arXiv 2510.18716, sparsity
profiling), measured while pictures are drawn with the full cache. The form is inferred: the paper says that
attention outside the immediate neighbourhood is averaged, and leaves open which neighbourhood that is. Here
it is the window that a spatial head keeps, because what lies outside of that is what such a head would lose.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from arkv.head_profile import PERCENTS, HeadProfile
from arkv.model import Model, ModelSpec
from arkv.pictures.figure import new_figure, to_image
from arkv.policy import CachePolicy, Observation
from arkv.registry import load_policy
from arkv.store import CachePlan, HeadFields, Store
from arkv.study.shadow import by_token

MAP_COLOURS = "cividis"  # as even to colour-blind eyes, and in print


def measure(
    model: Model,
    prompts: Sequence[Any],
    *,
    seeds: Sequence[int] | None = None,
    guidance: float | None = None,
    batch_size: int | None = None,
    compile: Compile = "none",
    progress: bool = False,
) -> HeadProfile:
    """Draw pictures with the full cache and measure every head on the way.

    Condition tokens are not counted, and every query counts the same: the first ones, which have little
    behind them, lose little by a window and make every head look a little more local. Query heads that share
    a key head count by their attention to visual tokens.

    Args:
        model: whose heads are measured.
        prompts: as for `Decoder.generate`.
        seeds: one a prompt; None for 0, 1, 2, ...
        guidance: scale of classifier-free guidance; 1 leaves the unconditional rows out, None takes the
            model's own.
        batch_size: pictures drawn at a time; None for all at once.
        compile: "none" or "inductor".
        progress: show a bar for every batch.

    Raises:
        ArkvError: seeds or batch size do not fit, or as `Decoder.generate`.
    """
    spec = model.spec
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
    decoder = Decoder(model, Watching(full=load_policy("full")), compile)
    total = torch.zeros(spec.layers, spec.kv_heads, spec.grid.tokens, dtype=torch.float64)
    for start in range(0, len(prompts), size):
        batch = slice(start, start + size)
        decoder.generate(prompts[batch], seeds=seeds[batch], guidance=guidance, window=1, progress=progress)
        assert decoder.store is not None
        total += decoder.store["by_lag"].cpu().double().sum(1)  # not all devices have float64
    held = total.cumsum(-1) / total.sum(-1, keepdim=True)
    least = torch.tensor([1 - percent / 100 for percent in PERCENTS], dtype=torch.float64)
    reach = torch.searchsorted(held, least.expand(spec.layers, spec.kv_heads, -1).contiguous()).tolist()
    return HeadProfile(
        model=spec.name,
        tokens=spec.grid.tokens,
        reach=tuple(tuple(tuple(head) for head in layer) for layer in reach),
        prompts=len(prompts),
        guidance=guidance,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={"arkv": version("arkv"), "torch": torch.__version__},
    )


def draw_map(profile: HeadProfile, window: int) -> Image.Image:
    """What a window leaves out as a map, a row a layer and a column a key head, every cell in percent.

    Args:
        profile: what was measured.
        window: tokens before the query's own.

    Raises:
        ArkvError: matplotlib is not installed.
    """
    left_out = profile.left_out(window)
    layers, heads = len(left_out), len(left_out[0])
    figure = new_figure(max(4.6, 2.2 + 0.52 * heads), 1.9 + 0.42 * layers)
    axes = figure.add_subplot()
    drawn = axes.imshow(left_out, cmap=MAP_COLOURS, vmin=0, vmax=1, aspect="auto")
    for layer, shares in enumerate(left_out):
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
    figure.suptitle(f"{profile.model}: attention that a window leaves out", fontsize=11, fontweight="bold")
    axes.set_title(
        f"how much of the attention to visual tokens goes more than {window} tokens back;\n"
        f"mean over {profile.prompts} pictures drawn with the full cache",
        fontsize=8,
    )
    return to_image(figure)


@dataclass(frozen=True, kw_only=True)
class Watching(CachePolicy):
    """The full cache, while the shares of its queries' attention are summed up by lag.

    Attributes:
        full: the full cache.
    """

    head_fields: ClassVar[HeadFields] = {"by_lag": (torch.float32, "tokens")}
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})

    full: CachePolicy

    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        """That of the full cache."""
        return self.full.plan(grid, spec)

    def select(self, store: Store, step: Tensor) -> Tensor:
        """As the full cache."""
        return self.full.select(store, step)

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        """Add the shares of this query."""
        visual = by_token(store, seen.mass)[..., store.condition :]
        # A head that looks at condition tokens alone looks at no lag.
        visual = visual / visual.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        position = step - torch.arange(store.grid.tokens, device=visual.device)
        by_lag = visual.index_select(-1, position.clamp(min=0))
        store["by_lag"].add_(torch.where(position >= 0, by_lag, 0))
