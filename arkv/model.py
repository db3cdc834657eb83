"""What the runtime needs to know of a model, and nothing more.

An adapter knows its checkpoint, its prompts and its pictures. It knows nothing of caches: a block hands
out queries, keys and values and takes back what attention made of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from typing_extensions import Self

from arkv.errors import ArkvError
from arkv.grid import Grid


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a model, as far as the cache and the loop depend on it.

    Attributes:
        name: what the registry calls it.
        layers: transformer blocks.
        heads: query heads of a layer.
        kv_heads: key and value heads of a layer; divides `heads`.
        head_dim: width of one head.
        vocabulary: visual codes; the width of the logits.
        grid: raster of the visual tokens.
        max_condition: the most condition tokens a prompt can take.
        guidance: the scale that suits this model's pictures best.
        width: size of the residual stream; for estimates of memory only.
        hidden: width of the inside of the MLP; for estimates of memory only.
        top_k: how many of the likeliest tokens this model is to draw from; 0 for all.
        guided_tokens: first visual tokens that guidance is for; None for all.
        head_profile: file with what was measured of its heads, which `arkv profile` writes; None where
            nobody has measured them.
    """

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    grid: Grid
    max_condition: int
    guidance: float
    width: int
    hidden: int
    top_k: int = 0
    guided_tokens: int | None = None
    head_profile: Path | None = None


@dataclass(frozen=True)
class Condition:
    """The condition tokens of a batch, left-padded to one length `C`, and the positions of all tokens.

    With guidance there are two rows a picture: first every conditional row, then every unconditional
    one, in the same order.

    Attributes:
        embeddings: `[rows, C, width]`.
        mask: bool `[rows, C]`, False on padding. The last column is True in every row.
        rotation: float32 `[rows or 1, C + N, head_dim]`, cosines then sines of the rotary angles of
            condition and visual tokens.
    """

    embeddings: Tensor
    mask: Tensor
    rotation: Tensor

    def padded(self, length: int) -> Condition:
        """The same with more padding in front.

        Args:
            length: condition tokens of a row then, not less than there are.
        """
        more = length - self.mask.shape[1]
        return Condition(
            pad(self.embeddings, (0, 0, more, 0)),
            pad(self.mask, (more, 0)),
            pad(self.rotation, (0, 0, more, 0)),
        )


class Block(Protocol):
    """A transformer block cut in two at its attention (see `arkv.models.transformer.Block`)."""

    def project(self, hidden: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden `[rows, tokens, width]` to query `[rows, tokens, heads, head_dim]`, key and value."""
        ...

    def merge(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Hidden and attended `[rows, tokens, heads, head_dim]` to the next hidden."""
        ...


class PictureDecoder(Protocol):
    """What makes pictures of tokens: a model, or its picture decoder alone."""

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        ...

    def pixels(self, tokens: Tensor) -> Tensor:
        """Int64 `[pictures, N]` to uint8 `[pictures, height, width, 3]` on the CPU."""
        ...


class Model(nn.Module, ABC):
    """Base of every adapter.

    `embed` and `head` are called inside the compiled step: tensor code only. `condition` and `pixels` are
    called once a batch, outside of it.
    """

    spec: ModelSpec

    @classmethod
    @abstractmethod
    def from_pretrained(cls, *, dtype: torch.dtype, device: torch.device) -> Self:
        """Load the trained weights; an adapter may take more arguments, such as a path.

        Args:
            dtype: of the weights, and so of keys and values.
            device: where to put them. On the meta device shapes are enough: no weight is read.

        Raises:
            CheckpointError: a file is missing, damaged, or belongs to another model.
        """

    @classmethod
    def load_picture_decoder(cls, *, device: torch.device, **options: Any) -> PictureDecoder:
        """Load no more than it takes to make pictures of tokens; here, that is the whole model.

        Args:
            device: where to put the weights.
            options: as for `from_pretrained`; those that only the rest of the model needs are passed over.

        Raises:
            CheckpointError: as `from_pretrained`.
        """
        return cls.from_pretrained(dtype=torch.float32, device=device, **options)

    @classmethod
    def recognises(cls, source: str | Path) -> bool:
        """Whether a file or folder holds a checkpoint of this model, or a repository on the hub is its own.

        No, as here, where a model is loaded by its name only. What decides is in the files: a path is not
        looked at for its name, and where the files do not tell two models apart, both say yes.

        Raises:
            CheckpointError: it is this model's by its form and cannot be loaded; says why.
        """
        return False

    @property
    @abstractmethod
    def blocks(self) -> Sequence[Block]:
        """The transformer blocks in order."""

    def check_prompts(self, prompts: Sequence[Any]) -> None:
        """Look at every prompt before the first picture is begun; here, nothing is looked at.

        Raises:
            PromptError: a prompt is not one that the model can take.
        """

    @abstractmethod
    def condition(self, prompts: Sequence[Any], guided: bool) -> Condition:
        """Turn prompts into condition tokens.

        Args:
            prompts: one a picture: texts, or whatever this family is conditioned on.
            guided: whether to append the unconditional rows.

        Raises:
            PromptError: a prompt is not one that the model can take.
        """

    @abstractmethod
    def embed(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Embed the visual tokens just drawn.

        Args:
            tokens: int64 `[rows]`.
            position: int64 0-d, their place in raster order.

        Returns:
            `[rows, 1, width]`.
        """

    @abstractmethod
    def head(self, hidden: Tensor, position: Tensor) -> Tensor:
        """Logits of the visual token at `position`.

        Args:
            hidden: `[rows, 1, width]`, output of the last block for the token before.
            position: int64 0-d, the place in raster order that is to be filled.

        Returns:
            float32 `[rows, vocabulary]`; minus infinity where a token is not allowed at that place.
        """

    @abstractmethod
    def pixels(self, tokens: Tensor) -> Tensor:
        """Draw pictures.

        Args:
            tokens: int64 `[pictures, N]`.

        Returns:
            uint8 `[pictures, height, width, 3]` on the CPU.
        """

    @abstractmethod
    def example_prompts(self, count: int, seed: int) -> list[Any]:
        """Prompts that this model can take, for benchmarks and conformance tests; the same for one seed."""

    @property
    def picture_part(self) -> nn.Module | None:
        """The one module with all weights that `pixels` needs; None, as here, where there is no such."""
        return None

    def satisfies(self, prompt: Any, picture: Tensor) -> bool | None:
        """Whether a picture, uint8 `[height, width, 3]`, shows what its prompt asks for.

        None, as here, where the model has no exact judge of its pictures.
        """
        return None

    def group(self, prompt: Any) -> str | None:
        """The kind of prompt that this is, by which scores are told apart.

        None, as here, where the model has no kinds.
        """
        return None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and so of keys and values."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.parameters()).device


class PicturesOnly:
    """A model that has the weights of its picture decoder, and otherwise shapes.

    Args:
        model: whose `picture_part` has weights.
    """

    def __init__(self, model: Model) -> None:
        part = model.picture_part
        assert part is not None
        self._model, self._part = model, part

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self._part.parameters()).device

    def pixels(self, tokens: Tensor) -> Tensor:
        """As the whole model draws them."""
        return self._model.pixels(tokens)


def check_model(model: object) -> None:
    """Refuse what is no model, though it may lead to one.

    Raises:
        ArkvError: says what to give instead.
    """
    if isinstance(model, Model):
        return
    inner = next(
        (found for name in ("module", "_orig_mod") if isinstance(found := getattr(model, name, None), Model)),
        None,
    )
    if isinstance(model, (str, Path)):
        advice = f"load it first, as in Decoder(load_model({str(model)[:100]!r}), ...)"
    elif inner is not None:
        advice = "give the model that is wrapped in it: a decoder places and compiles it itself"
    elif isinstance(model, type) and issubclass(model, Model):
        advice = "give an instance, from load_model or from_pretrained"
    else:
        advice = "it comes from load_model"
    raise ArkvError(f"model is a {type(model).__name__}: give an arkv.Model itself; {advice}")
