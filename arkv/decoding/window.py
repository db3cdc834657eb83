"""Several tokens a forward pass, and the very same picture (Jacobi decoding: Teng et al., arXiv 2410.01699).

    a pass:      feed the last accepted token of a picture and K - 1 drafts of the tokens behind it
                 draw a token after each of them
                 accept draws as long as the drafts before them were right, and one more
                 the other draws are the drafts of the next pass

A draw is a function of the seed, the place and what stands before, so an accepted draw is the token that one
token at a time would have drawn. An eviction has named the slots of a whole line: every draft has its slot,
and a wrong one is overwritten where it lies. Within a line every picture goes on at its own pace; at its end
they meet, and the policy is shown the attention of the tokens, one after the other and in order, as if they
had been decoded so. It need not know of windows.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from arkv.attention.window import window_attention
from arkv.decoding.buffers import Buffers
from arkv.decoding.checks import note_
from arkv.decoding.compiling import Compile, compiled
from arkv.decoding.layers import Layer, layers_of
from arkv.decoding.sampling import Sampling, draw, guide
from arkv.decoding.step import recycle_
from arkv.model import Block, Model
from arkv.policy import CachePolicy, Observation
from arkv.store import Store, write_

HIDDEN = torch.iinfo(torch.int32).max


def widest_window(policy: CachePolicy, store: Store) -> int:
    """The most tokens that a pass can take: those between two evictions.

    One where the policy decides at every token what may be looked at, since what it would decide for a draft
    depends on attention that it has not been shown yet.
    """
    first = torch.zeros((), dtype=torch.long, device=store.position.device)
    return store.plan.period if policy.visible(store, first) is None else 1


class Window:
    """What is done for several tokens of every row.

    Args:
        model: whose weights decode.
        policy: what stays resident.
        store: where keys and values lie.
        buffers: of the same batch.
        compile: "none" calls the parts as they are, all others call them compiled.
        width: tokens of a pass, `K`.

    Attributes:
        at: int64 `[pictures]`, place of the last accepted token of each picture, which is to be fed next.
    """

    def __init__(
        self,
        model: Model,
        policy: CachePolicy,
        store: Store,
        buffers: Buffers,
        compile: Compile,
        width: int,
    ) -> None:
        self._model, self._policy, self._store, self._buffers = model, policy, store, buffers
        self._blocks = list(model.blocks)
        device, spec = store.position.device, store.spec
        self.at = torch.zeros(len(buffers.tokens), dtype=torch.long, device=device)
        self._stop = torch.zeros((), dtype=torch.long, device=device)
        self._ahead = torch.arange(width, device=device)
        # By slot, from which place on it is seen.
        self._seen_from = torch.zeros(store.position.shape, dtype=torch.int32, device=device)
        self._layers = layers_of(store, {}, False)
        sizes = dict.fromkeys(("mass", "scores"), (store.slots,)) | {"queries": (spec.heads, spec.head_dim)}
        self._shown = {
            name: torch.zeros(
                store.layers,
                store.plan.period,
                store.rows,
                *sizes[name],
                dtype=model.dtype if name == "queries" else torch.float32,
                device=device,
            )
            for name in sorted(policy.needs)
        }
        self._recycle = compiled(recycle_, compile)
        self._enter = compiled(enter_, compile)
        self._pass_block = compiled(pass_block, compile)
        self._finish = compiled(finish_, compile)
        self._replay = compiled(replay_, compile)

    def __call__(self, steps: range, sampling: Sampling) -> int:
        """A line, or a part of it, in as many passes as it takes.

        Args:
            steps: places of the tokens to feed; the first has been drawn.
            sampling: how the tokens after them are drawn.

        Returns:
            The number of passes.
        """
        # A window ends where an eviction is due.
        return sum(self._part_(part, sampling) for part in parts_of(steps, self._store.plan.period))

    def _part_(self, steps: range, sampling: Sampling) -> int:
        """Tokens between two evictions: room for them, passes over them, and a look at what they saw."""
        self.begin_(steps)
        passes = 0
        # No pass accepts more than its width, so a few need no look at how far they came.
        while passes * len(self._ahead) < len(steps) or bool((self.at < steps.stop).any()):
            self.pass_(sampling, sampling.guides(steps.start + 1))
            passes += 1
        self.show_(steps)
        return passes

    def begin_(self, steps: range) -> None:
        """Make room for the tokens of some steps, and say who will see them."""
        store, buffers = self._store, self._buffers
        buffers.step.fill_(steps.start)
        offset = steps.start % store.plan.period
        if offset == 0:
            buffers.slots.copy_(self._recycle(self._policy, store, buffers.step))
        self.at.fill_(steps.start)
        self._stop.fill_(steps.stop)
        self._seen_from.copy_(torch.where(store.resident, -1, HIDDEN))
        slots = buffers.slots[..., offset : offset + len(steps)].flatten(2)
        places = buffers.places[steps.start : steps.stop].int().repeat(store.kv_heads)
        self._seen_from.scatter_(-1, slots, places.expand(slots.shape))

    def pass_(self, sampling: Sampling, guided: bool) -> None:
        """One pass: feed a window of every picture, and accept what its drafts got right.

        Args:
            sampling: how tokens are drawn.
            guided: whether those of this pass are.
        """
        store, buffers = self._store, self._buffers
        hidden, rotation, places, slots = self._enter(
            self._model, store, buffers, self.at, self._ahead, self._stop
        )
        offsets = places % store.plan.period
        for number, (block, layer) in enumerate(zip(self._blocks, self._layers, strict=True)):
            hidden = self._pass_block(
                block,
                hidden,
                rotation,
                layer,
                slots[number],
                self._seen_from[number],
                places,
                offsets,
                store.kv_heads,
                {name: shown[number] for name, shown in self._shown.items()},
            )
        self._finish(self._model, buffers, self.at, hidden, places, self._stop, sampling.frozen, guided)

    def show_(self, steps: range) -> None:
        """Claim the slots of the tokens and show the policy their attention, in order."""
        store, buffers = self._store, self._buffers
        for place in steps:
            buffers.step.fill_(place)
            offset = buffers.places[place % store.plan.period]
            self._replay(self._policy, store, buffers.slots, offset, self._shown, buffers.step)
        buffers.step.fill_(steps.stop)


def parts_of(steps: range, period: int) -> list[range]:
    """Steps in parts that end where an eviction is due."""
    evictions = range((steps.start // period + 1) * period, steps.stop, period)
    return [range(start, stop) for start, stop in pairwise([steps.start, *evictions, steps.stop])]


def enter_(
    model: Model, store: Store, buffers: Buffers, at: Tensor, ahead: Tensor, stop: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Embed a window of every row; one that would reach past the end repeats its last token.

    Args:
        model: embeds the tokens.
        store: of the batch.
        buffers: of the batch.
        at: int64 `[pictures]`, the first place of each window.
        ahead: int64 `[K]`, 0, 1, ... K - 1.
        stop: int64 0-d, the place after the last that may be fed.

    Returns:
        Hidden `[rows, K, width]`, rotations `[rows, K, head_dim]`, places int64 `[rows, K]` and, by layer,
        where to write, int64 `[rows, K, kv_heads]`.
    """
    places = torch.minimum(at[:, None] + ahead, stop - 1)
    tokens = buffers.tokens.gather(1, places)
    if store.guided:
        places, tokens = places.repeat(2, 1), tokens.repeat(2, 1)
    # An adapter is written for one place at a time.
    embed = torch.vmap(lambda token, place: model.embed(token[None], place)[0, 0])
    hidden = embed(tokens.flatten(), places.flatten()).unflatten(0, places.shape)
    turned = buffers.rotation.expand(store.rows, -1, -1)
    index = (places + store.condition)[..., None].expand(-1, -1, turned.shape[-1])
    offsets = (places % store.plan.period)[None, :, None].expand(store.layers, -1, store.kv_heads, -1)
    slots = buffers.slots.gather(-1, offsets).transpose(2, 3)
    return hidden, turned.gather(1, index), places, list(slots.unbind())


def pass_block(
    block: Block,
    hidden: Tensor,
    rotation: Tensor,
    layer: Layer,
    slots: Tensor,
    seen_from: Tensor,
    places: Tensor,
    offsets: Tensor,
    kv_heads: int,
    shown: dict[str, Tensor],
) -> Tensor:
    """One block for a window: write keys and values, attend over the slots.

    Args:
        block: the weights.
        hidden: `[rows, K, width]`.
        rotation: float32 `[rows, K, head_dim]`.
        layer: where keys and values lie.
        slots: int64 `[rows, K, kv_heads]`, where the window's keys and values go.
        seen_from: int32 `[rows, slots]`, the first place that sees each slot.
        places: int64 `[rows, K]`, of the window's tokens.
        offsets: int64 `[rows, K]`, their places since the last eviction.
        kv_heads: key heads.
        shown: by what the policy needs, where to keep it until the end of the line, `[period, rows, ...]`.

    Returns:
        The next hidden state.
    """
    query, key, value = block.project(hidden, rotation)
    keys, values, key_scale, value_scale, owner, _ = layer
    write_(keys, slots.flatten(1), key.flatten(1, 2)[:, None], key_scale)
    write_(values, slots.flatten(1), value.flatten(1, 2)[:, None], value_scale)
    visible = seen_from[:, None, : keys.shape[1]] <= places[..., None]
    needs = frozenset(shown)
    attended = window_attention(
        query, keys, values, visible, kv_heads, cast("Tensor | None", owner), needs, key_scale, value_scale
    )
    seen = {"mass": attended.mass, "scores": attended.scores, "queries": query}
    rows = torch.arange(len(places), device=places.device)[:, None]
    for name, kept in shown.items():
        new = cast(Tensor, seen[name])
        if name != "queries":
            new = pad(new, (0, kept.shape[-1] - new.shape[-1]))
        kept.index_put_((offsets, rows), new)
    return block.merge(hidden, attended.output)


def finish_(
    model: Model,
    buffers: Buffers,
    at: Tensor,
    hidden: Tensor,
    places: Tensor,
    stop: Tensor,
    sampling: Sampling,
    guided: bool,
) -> None:
    """Draw a token after each of the window's, and accept those that were drawn after right ones.

    Args:
        model: gives the logits.
        buffers: its tokens are written in place.
        at: int64 `[pictures]`, moved on in place.
        hidden: `[rows, K, width]`, output of the last block.
        places: int64 `[rows, K]`.
        stop: int64 0-d, the last place that may be drawn.
        sampling: how.
        guided: whether the second half of the rows are the unconditional ones.
    """
    pictures = len(at)
    head = torch.vmap(lambda state, place: model.head(state[None, None], place)[0])
    logits = head(hidden.flatten(0, 1), places.flatten() + 1).unflatten(0, places.shape)
    logits = guide(logits, buffers.scale) if guided else logits[:pictures]
    note_(buffers.first_bad, logits, at.min() + 1)
    keys = buffers.keys[:, None].expand(-1, places.shape[1], -1)
    places = places[:pictures]
    drawn = draw(logits, keys, places + 1, sampling, buffers.temperature)
    accept_(buffers.tokens, at, places, drawn, stop)


def accept_(tokens: Tensor, at: Tensor, places: Tensor, drawn: Tensor, stop: Tensor) -> None:
    """Put draws where they belong, and move every picture on to its last accepted token.

    Args:
        tokens: int64 `[pictures, N]`; up to `at` accepted, behind it drafts. Written in place.
        at: int64 `[pictures]`; written in place.
        places: int64 `[pictures, K]`, of the tokens that were fed.
        drawn: int64 `[pictures, K]`, the tokens drawn after them.
        stop: int64 0-d, the last place that may be drawn; a picture that is there stays as it is.
    """
    # Where a window repeats its last token, the draw after the first of them counts.
    drawn = drawn.gather(1, (places - at[:, None]).clamp(min=0))
    drafts = tokens.gather(1, places + 1)
    right = (drawn == drafts) & (places + 1 < stop)
    accepted = right[:, :-1].long().cumprod(1).sum(1) + 1
    tokens.scatter_(1, places + 1, torch.where(at[:, None] < stop, drawn, drafts))
    # What has not been drawn yet is guessed to be as its left neighbour.
    last = places[:, -1:] + 1
    beyond = torch.arange(tokens.shape[1], device=tokens.device) > last
    tokens.copy_(torch.where(beyond, tokens.gather(1, last), tokens))
    at.copy_(torch.minimum(at + accepted, stop))


def replay_(
    policy: CachePolicy, store: Store, slots: Tensor, offset: Tensor, shown: dict[str, Tensor], step: Tensor
) -> None:
    """Claim a token's slots, and show the policy its attention.

    Args:
        policy: looks.
        store: positions and statistics are written in place.
        slots: int64 `[layers, rows, kv_heads, period]`, what the last eviction freed.
        offset: int64 0-d, which of them are the token's.
        shown: what the policy needs, of all tokens since the last eviction, `[layers, period, rows, ...]`.
        step: int64 0-d, position of the token.
    """
    store.claim_(slots.index_select(-1, offset[None])[..., 0], step)
    if policy.needs:
        seen = {name: kept.index_select(1, offset[None])[:, 0] for name, kept in shown.items()}
        policy.observe(store, Observation(**seen), step)
