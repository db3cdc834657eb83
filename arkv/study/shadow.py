"""What a policy changes, step by step, beside a full cache that is fed the same tokens.

    every token:   one step of the full cache, one step of the policy's
                   mass lost = attention of the full cache's queries on tokens that the policy's may not see
                   KL, top-1 = the two distributions of the next token, after guidance

Both decode given tokens, so a step is judged by itself and not by where earlier ones have led to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from arkv.attention.quantization import KvDtype
from arkv.decoding.loop import Loop
from arkv.decoding.sampling import Sampling, guide
from arkv.grid import Grid
from arkv.model import Model, ModelSpec
from arkv.policy import CachePolicy, Observation
from arkv.registry import load_policy
from arkv.store import CONDITION, CachePlan, HeadFields, Store


@dataclass(frozen=True)
class Fidelity:
    """How far a policy is from the full cache.

    Attributes:
        attention_lost: share of the full cache's attention that lies on tokens which the policy has given up
            or may not look at; mean over steps, pictures, guidance rows, layers and key heads.
        attention_lost_by_layer: the same, one number a layer.
        kl: Kullback-Leibler divergence of the policy's distribution of the next token from the full cache's,
            KL(full || policy), in nats, after guidance and before any filter; mean over the visual tokens of
            all pictures.
        top1_agreement: share of these tokens for which both find the same one likeliest.
    """

    attention_lost: float
    attention_lost_by_layer: list[float]
    kl: float
    top1_agreement: float


@torch.inference_mode()
def compare(
    model: Model,
    policy: CachePolicy,
    prompts: Sequence[Any],
    tokens: Tensor,
    guidance: float = 1.0,
    kv_dtype: KvDtype | None = None,
) -> Fidelity:
    """Decode given tokens with the full cache and with a policy, side by side, as one batch.

    Runs eagerly. Logits are compared as they come, so memory is that of the two caches.

    Args:
        model: decodes.
        policy: is compared with the full cache.
        prompts: one a picture.
        tokens: int64 `[pictures, N]`.
        guidance: scale of classifier-free guidance; 1 leaves the unconditional rows out.
        kv_dtype: how the policy's keys and values are stored; the full cache's are always exact.

    Raises:
        BudgetError: the policy does not fit the model's grid.
        NumericalError: a number was not finite.
    """
    total, sampling = model.spec.grid.tokens, Sampling(guidance, guided_tokens=model.spec.guided_tokens)
    condition = model.condition(prompts, sampling.guided)
    rows, length = condition.mask.shape
    watched = [Watched(policy=load_policy("full"), with_mass=True), Watched(policy=policy)]
    shadow, loop = (
        Loop(model, one, rows, length, "none", sampling.guided, stored)
        for one, stored in zip(watched, (None, kv_dtype), strict=True)
    )
    tokens = tokens.to(model.device)
    scale = torch.tensor(guidance, dtype=torch.float32, device=model.device)
    lost = torch.zeros(model.spec.layers, device=model.device)
    divergence, agreed = torch.zeros(2, device=model.device).unbind()

    both = [shadow.prefill_(condition), loop.prefill_(condition)]
    for position in range(total):
        guided = [guide(x, scale) if sampling.guides(position) else x[: len(prompts)] for x in both]
        truth, approximation = (x.log_softmax(-1) for x in guided)
        divergence += kl_divergence(truth, approximation).sum()
        agreed += (truth.argmax(-1) == approximation.argmax(-1)).sum()
        if position + 1 == total:
            break
        drawn = tokens[:, position].repeat(2 if sampling.guided else 1)
        both = [one.advance_(drawn, position) for one in (shadow, loop)]
        mass = by_token(shadow.store, watched[0].saw["mass"])
        seen = by_token(loop.store, watched[1].saw["visible"])
        lost += (torch.where(seen, 0, mass).sum(-1) / mass.sum(-1)).mean((1, 2))
    shadow.check()
    loop.check()
    by_layer = (lost / max(1, total - 1)).tolist()
    return Fidelity(
        attention_lost=sum(by_layer) / len(by_layer),
        attention_lost_by_layer=by_layer,
        kl=divergence.item() / tokens.numel(),
        top1_agreement=agreed.item() / tokens.numel(),
    )


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats, by row; rounding does not make it negative.

    Args:
        p: float32 `[rows, vocabulary]`, logarithms of probabilities; minus infinity where forbidden.
        q: as `p`.
    """
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0).sum(-1).clamp(min=0)


def by_token(store: Store, x: Tensor) -> Tensor:
    """What lies in slots, in order of the tokens: condition, then the image in raster order.

    Args:
        store: of any layout; says which token and which head a slot is of.
        x: `[layers, rows, slots]`.

    Returns:
        `[layers, rows, kv_heads, condition + N]` in the dtype of `x`; zero where a token is not resident.
    """
    length, heads = store.condition + store.grid.tokens, store.kv_heads
    head = store.head.expand(store.position.shape)
    # Condition slots never change hands: they are the first of each head, in order.
    starts = pad(store.starts, (0, 1))[:, None].expand(-1, store.rows, -1).gather(-1, head)
    slot = torch.arange(store.slots, device=head.device)
    token = torch.where(store.position == CONDITION, slot - starts, store.condition + store.position)
    held = store.resident & (head < heads)
    # What is free, or nobody's, goes to one place past the end.
    place = torch.where(held, head * length + token, heads * length)
    flat = x.new_zeros(*x.shape[:-1], heads * length + 1).scatter(-1, place, x)
    return flat[..., :-1].unflatten(-1, (heads, length))


@dataclass(frozen=True, kw_only=True)
class Watched(CachePolicy):
    """Another policy, while what its newest token saw is written down. For loops that are not compiled.

    Attributes:
        policy: decides everything.
        with_mass: whether to write down attention, too.
        saw: of the newest token: "visible", bool `[layers, rows, slots]`, the slots that it might look at,
            and "mass", float32 of the same shape, the attention that it paid them.
    """

    policy: CachePolicy
    with_mass: bool = False
    saw: dict[str, Tensor] = field(default_factory=dict)

    @property
    def fields(self) -> Mapping[str, torch.dtype]:  # type: ignore[override]
        """The policy's."""
        return self.policy.fields

    @property
    def head_fields(self) -> HeadFields:  # type: ignore[override]
        """The policy's."""
        return self.policy.head_fields

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The policy's, and what is to be written down."""
        return self.policy.needs | ({"mass"} if self.with_mass else set())

    @property
    def in_order(self) -> bool:  # type: ignore[override]
        """As the policy's."""
        return self.policy.in_order

    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        """As the policy does."""
        return self.policy.plan(grid, spec)

    def begin(self, store: Store) -> None:
        """As the policy does."""
        self.policy.begin(store)

    def visible(self, store: Store, step: Tensor) -> Tensor | None:
        """As the policy does; written down here, because statistics may tell otherwise after the step."""
        limit = self.policy.visible(store, step)
        self.saw["visible"] = store.resident if limit is None else store.resident & limit
        return limit

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        """As the policy does, if it looks."""
        if self.policy.needs:
            self.policy.observe(store, seen, step)
        if seen.mass is not None:
            self.saw["mass"] = seen.mass

    def select(self, store: Store, step: Tensor) -> Tensor:
        """As the policy does."""
        return self.policy.select(store, step)

    def evict(self, store: Store, slots: Tensor) -> None:
        """As the policy does."""
        self.policy.evict(store, slots)
