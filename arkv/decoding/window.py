"""Several tokens a forward pass, and the very same picture (Jacobi decoding: Teng et al., arXiv 2410.01699).

    a pass:      feed the last accepted token of a picture and K - 1 drafts of the tokens behind it
                 draw a token after each of them
                 accept draws as long as the drafts before them were right, and one more
                 the other draws are the drafts of the next pass

A draw is a function of the seed, the place and what stands before, so an accepted draw is the token that one
token at a time would have drawn. An eviction has named the slots of a whole line: every draft has its slot,
and a wrong one is overwritten where it lies. Every picture goes on at its own pace. Where one has come to an
eviction, the policy is shown the attention of its tokens, one after the other and in order, as if they had
been decoded so, and evicts, in that picture alone. It need not know of windows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from arkv.decoding.buffers import Buffers
from arkv.decoding.compiling import Compile, compiled
from arkv.decoding.graphs import Look, Replayed, on_device
from arkv.decoding.layers import has_kernels, layers_of
from arkv.decoding.passes import HIDDEN, enter_, finish_, pass_block, replay_
from arkv.decoding.sampling import Sampling
from arkv.decoding.step import recycle_
from arkv.machine.threads import Threads
from arkv.model import Model, ModelSpec
from arkv.policy import CachePolicy
from arkv.store import Store


def widest_window(policy: CachePolicy, store: Store) -> int:
    """The most tokens that a pass can take: those between two evictions.

    One where the policy decides at every token what may be looked at, since what it would decide for a draft
    depends on attention that it has not been shown yet.
    """
    first = torch.zeros((), dtype=torch.long, device=store.position.device)
    return reach_of(policy, store) if policy.visible(store, first) is None else 1


def reach_of(policy: CachePolicy, store: Store) -> int:
    """Tokens whose slots can be known beforehand: a period's, or all if no slot is ever given up."""
    period, total = store.plan.period, store.grid.tokens
    return -(-total // period) * period if policy.in_order and not policy.needs else period


def shown_sizes(spec: ModelSpec, needs: frozenset[str], slots: int) -> dict[str, tuple[int, ...]]:
    """What is kept of a token of a row and a layer until the policy is shown it: the shape, by need."""
    sizes = dict.fromkeys(("mass", "scores"), (slots,)) | {"queries": (spec.heads, spec.head_dim)}
    return {name: sizes[name] for name in sorted(needs)}


class Window:
    """What is done for several tokens of every row.

    Args:
        model: whose weights decode.
        policy: what stays resident.
        store: where keys and values lie.
        buffers: of the same batch.
        compile: "none" calls the parts as they are, all others call them compiled.
        graphs: replays passes and what is done between them, if anything is replayed.
        threads: how many a pass takes.
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
        graphs: Replayed,
        threads: Threads,
        width: int,
    ) -> None:
        self._model, self._policy, self._store, self._buffers = model, policy, store, buffers
        self._blocks, self._graphs, self._threads, self._width = list(model.blocks), graphs, threads, width
        device, spec, pictures = store.position.device, store.spec, len(buffers.tokens)
        self.at = torch.zeros(pictures, dtype=torch.long, device=device)
        self._stop = torch.zeros(pictures, dtype=torch.long, device=device)
        self._ahead = torch.arange(width, device=device)
        # By slot, from which place on it is seen.
        self._seen_from = torch.zeros(store.position.shape, dtype=torch.int32, device=device)
        self._with_kernels = has_kernels(model, store)
        self._layers = layers_of(store, {}, self._with_kernels)
        self._period, self._reach = store.plan.period, reach_of(policy, store)
        self._slots = buffers.slots
        if self._reach > self._period:
            self._slots = buffers.slots.new_zeros(*buffers.slots.shape[:-1], self._reach)
        self._shown = {
            name: torch.zeros(
                store.layers,
                self._period,
                store.rows,
                *size,
                dtype=model.dtype if name == "queries" else torch.float32,
                device=device,
            )
            for name, size in shown_sizes(spec, policy.needs, store.slots).items()
        }
        # Views are made once, not in every pass.
        self._seen_by_layer = list(self._seen_from.unbind())
        self._shown_by_layer = [
            {name: shown[layer] for name, shown in self._shown.items()} for layer in range(store.layers)
        ]
        self._pictures = [
            OfPicture(
                store.of_picture(number),
                buffers.slots[:, number::pictures],
                self._slots[:, number::pictures],
                self._seen_from[:, number::pictures],
                {name: shown[:, :, number::pictures] for name, shown in self._shown.items()},
            )
            for number in range(pictures)
        ]
        # A GPU does the next pass while the places that the last one has led to are read.
        self._lag = 1 if device.type == "cuda" and compile != "none" else 0
        self._recycle = compiled(recycle_, compile)
        self._enter = compiled(enter_, compile)
        self._pass_block = compiled(pass_block, compile)
        self._finish = compiled(finish_, compile)
        self._replay = compiled(replay_, compile)

    def __call__(self, steps: range, sampling: Sampling) -> Iterator[int]:
        """Tokens of all pictures, in as many passes as it takes.

        Args:
            steps: places of the tokens to feed; the first has been drawn.
            sampling: how the tokens after them are drawn; all of them guided, or none.

        Yields:
            After each pass, the place that all pictures have come to, as far as is known.
        """
        parts = parts_of(steps, self._reach)
        now, known = [0 for _ in self._pictures], [steps.start for _ in self._pictures]
        looks: deque[Look] = deque()

        def may_end() -> bool:
            """Whether a picture may have come to the end of its part in a pass that was not looked at."""
            reach = len(looks) * self._width
            return any(at < parts[part].stop <= at + reach for at, part in zip(known, now, strict=True))

        self.at.fill_(steps.start)
        due = list(range(len(known)))
        while min(known) < steps.stop:
            with on_device(self.at.device), self._threads.fitted():
                for picture in due:
                    self._open_(picture, parts[now[picture]])
                due = []
                self._pass_(sampling, sampling.guides(steps.start + 1))
                looks.append(Look(self.at))
                while len(looks) > self._lag or may_end():
                    before, known = known, looks.popleft().read().tolist()
                    for picture, (was, at) in enumerate(zip(before, known, strict=True)):
                        if was < at == parts[now[picture]].stop:
                            self._show_(picture, parts[now[picture]])
                            if at < steps.stop:
                                now[picture] += 1
                                due.append(picture)
            yield min(known)

    def _open_(self, picture: int, part: range) -> None:
        """Evict in one picture where that is due, and lay out slots for the tokens of a part."""
        of, step, period = self._pictures[picture], self._buffers.step, self._period
        step.fill_(part.start)
        self._stop[picture].fill_(part.stop)

        def run() -> None:
            for number, line in enumerate(parts_of(part, period)):
                if line.start % period == 0:
                    of.slots.copy_(self._recycle(self._policy, of.store, step))
                self._lay_out_(of, line, is_first=number == 0)
                step.add_(len(line))

        # What a graph has for good; the place itself is a tensor.
        self._graphs.run(("open", self._width, picture, part.start % self._reach, len(part)), run)

    def _show_(self, picture: int, part: range) -> None:
        """Show the policy the tokens of a part of one picture, in order, and claim their slots."""
        of, step = self._pictures[picture], self._buffers.step
        if not self._policy.needs:
            return
        step.fill_(part.start)

        def run() -> None:
            for place in part:
                offset = self._buffers.places[place % self._period]
                self._replay(self._policy, of.store, of.slots, offset, of.shown, step)
                step.add_(1)

        self._graphs.run(("show", self._width, picture, part.start % self._period, len(part)), run)

    def _lay_out_(self, of: OfPicture, line: range, is_first: bool) -> None:
        """Say who will see the tokens between two evictions, and where they are written; `step` is the first.

        Args:
            of: the picture.
            line: their places, which decide nothing but where in a period they begin, and how many they are.
            is_first: whether nothing has been laid out since the last pass.
        """
        store, step, period = of.store, self._buffers.step, self._period
        offset = line.start % period
        if is_first:
            of.seen_from.copy_(torch.where(store.resident, -1, HIDDEN))
        if self._reach > period:
            start = (line.start - offset) % self._reach
            of.room[..., start : start + period].copy_(of.slots)
        slots = of.slots[..., offset : offset + len(line)].flatten(2)
        places = (step + self._buffers.places[: len(line)]).int().repeat(store.kv_heads)
        of.seen_from.scatter_(-1, slots, places.expand(slots.shape))
        if not self._policy.needs:  # what is claimed now need not be shown
            store.claim_(slots, places)

    def _pass_(self, sampling: Sampling, guided: bool) -> None:
        """One pass: feed a window of every picture, and accept what its drafts got right.

        Args:
            sampling: how tokens are drawn.
            guided: whether those of this pass are.
        """
        store, buffers, frozen = self._store, self._buffers, sampling.frozen

        def run() -> None:
            hidden, rotation, places, offsets, slots = self._enter(
                self._model, store, buffers, self._slots, self.at, self._ahead, self._stop
            )
            for number, (block, layer) in enumerate(zip(self._blocks, self._layers, strict=True)):
                hidden = self._pass_block(
                    block,
                    hidden,
                    rotation,
                    layer,
                    slots[number],
                    self._seen_by_layer[number],
                    places,
                    offsets,
                    store.kv_heads,
                    self._shown_by_layer[number],
                    self._with_kernels,
                )
            self._finish(
                self._model, buffers, self.at, hidden, places, self._stop, store.grid, frozen, guided
            )

        self._graphs.run(("pass", self._width, frozen, guided), run)


class OfPicture(NamedTuple):
    """Views of what belongs to one picture of a batch; `rows` are its own.

    Attributes:
        store: of its rows.
        slots: int64 `[layers, rows, kv_heads, period]`, what its last eviction freed.
        room: int64 `[layers, rows, kv_heads, reach]`, the slots of the tokens that passes are to take.
        seen_from: int32 `[layers, rows, slots]`, the first place that sees each slot.
        shown: what the policy needs, of all tokens since the last eviction, `[layers, period, rows, ...]`.
    """

    store: Store
    slots: Tensor
    room: Tensor
    seen_from: Tensor
    shown: dict[str, Tensor]


def parts_of(steps: range, period: int) -> list[range]:
    """Steps in parts that end where a period does: where an eviction is due, or a line ends."""
    ends = range((steps.start // period + 1) * period, steps.stop, period)
    cuts = pairwise([steps.start, *ends, steps.stop])
    return [range(start, stop) for start, stop in cuts if start < stop]
