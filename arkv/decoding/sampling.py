"""From logits to a token: guidance, filters, and the greatest sum of logit and noise.

The noise is a function of a picture's seed, the token's place and its code (see `arkv.decoding.noise`), so a
picture is the same alone or in a batch, eager or captured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arkv.decoding.noise import gumbel
from arkv.errors import ArkvError
from arkv.scalars import brief

LEAST_TEMPERATURE = 1e-6  # below, logits divided by it may overflow
MOST_SCALE = torch.finfo(torch.float32).max  # what logits are computed in


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    Attributes:
        guidance: scale `s` of classifier-free guidance, `u + s (c - u)` on logits (arXiv 2207.12598).
            At 1 the unconditional rows are left out altogether.
        temperature: divisor of the logits; 0 takes the likeliest token.
        top_k: draw from this many likeliest tokens only, and those as likely as the last of them; None
            from all.
        top_p: draw from the smallest set of tokens with at least this probability (arXiv 1904.09751),
            after `top_k`; None from all.
        guided_tokens: visual tokens from the first on that are guided; those after them are drawn from the
            conditional logits (LlamaGen's `cfg_interval`). None: all.
    """

    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guided_tokens: int | None = None

    @property
    def guided(self) -> bool:
        """Whether unconditional rows are needed."""
        return self.guidance != 1.0 and self.guided_tokens != 0

    def guides(self, position: int) -> bool:
        """Whether the visual token at a position is guided."""
        return self.guided and (self.guided_tokens is None or position < self.guided_tokens)

    @property
    def frozen(self) -> Sampling:
        """The same for all that draw by the same operations: numbers that come as tensors are left out."""
        return replace(self, guidance=1.0, temperature=0.0 if self.temperature == 0 else 1.0)

    def check(self, vocabulary: int) -> None:
        """Raise `ArkvError` for a value out of range or of the wrong type."""
        for name in ("guidance", "temperature", "top_k", "top_p"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number and not (value is None and name.startswith("top")):
                raise ArkvError(f"{name} is {brief(value)}: expected a number")
        for name in ("guidance", "temperature"):
            if not 0 <= getattr(self, name) <= MOST_SCALE:
                told = brief(getattr(self, name))
                raise ArkvError(f"{name} is {told}: expected a finite number, 0 or more")
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ArkvError(f"temperature is {self.temperature}: take 0 for the likeliest token")
        if self.top_k is not None and not (isinstance(self.top_k, int) and 1 <= self.top_k <= vocabulary):
            told = brief(self.top_k)
            raise ArkvError(f"top_k is {told}: expected 1 to {vocabulary}, the size of the vocabulary")
        guided = self.guided_tokens
        if guided is not None and (isinstance(guided, bool) or not isinstance(guided, int) or guided < 0):
            raise ArkvError(f"guided_tokens is {brief(guided)}: expected a whole number, 0 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ArkvError(f"top_p is {brief(self.top_p)}: expected more than 0 and at most 1")


def guide(logits: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance.

    Args:
        logits: float32 `[2 * pictures, vocabulary]`, conditional rows first.
        scale: float32 0-d.

    Returns:
        float32 `[pictures, vocabulary]`. A token that either row forbids (minus infinity) stays so.
    """
    conditional, unconditional = logits.chunk(2)
    guided = unconditional + scale * (conditional - unconditional)
    forbidden = (conditional == -torch.inf) | (unconditional == -torch.inf)
    return guided.masked_fill(forbidden, -torch.inf)


def filtered(logits: Tensor, sampling: Sampling, temperature: Tensor) -> Tensor:
    """Logits of the distribution that a token is drawn from: temperature, then top-k, then top-p.

    Args:
        logits: float32 `[..., vocabulary]`, guided already.
        sampling: the filters.
        temperature: float32 0-d, above 0.

    Returns:
        float32 `[..., vocabulary]`, minus infinity where a filter cut something off.
    """
    logits = logits / temperature
    if sampling.top_k is not None:
        least = logits.topk(sampling.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        weights = ordered.softmax(-1)
        # A token is in if the likelier ones do not reach top_p without it, and the likeliest always is.
        likelier = weights.cumsum(-1) - weights
        ordered = ordered.masked_fill((likelier >= sampling.top_p) & (likelier > 0), -torch.inf)
        logits = logits.scatter(-1, order, ordered)
    return logits


def draw(logits: Tensor, keys: Tensor, places: Tensor, sampling: Sampling, temperature: Tensor) -> Tensor:
    """Draw tokens.

    Args:
        logits: float32 `[..., vocabulary]`, guided already.
        keys: int32 `[..., 2]`, of the pictures' seeds (see `arkv.decoding.noise.seed_keys`).
        places: int64 `[...]`, of the tokens in raster order.
        sampling: the filters, and whether to take the likeliest.
        temperature: float32 0-d, that of `sampling` as a tensor, so that a captured draw can be told another.

    Returns:
        int64 `[...]`: the code with the greatest sum of filtered logit and Gumbel noise.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    noise = gumbel(keys, places, logits.shape[-1])
    return (filtered(logits, sampling, temperature) + noise).argmax(-1)
