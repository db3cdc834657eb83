"""How pictures are made: model, policy and sampling, in words that a file can hold."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import arkv
from arkv.jobs.loading import described, load

if TYPE_CHECKING:
    from arkv.decoder import Decoder
    from arkv.model import Model
    from arkv.policy import CachePolicy


@dataclass(frozen=True)
class Recipe:
    """Everything that decides on a picture beside its prompt and its seed.

    The names are those of the flags of `arkv generate`; None is the model's own wherever it has one.

    Attributes:
        model: a name, a path, or a repository of the hub.
        source: path or repository of a checkpoint, for a model that is given by name.
        revision: of the repository.
        size: width and height in pixels, for models of several shapes.
        decoder: weights of the picture decoder.
        vqgan: the file of that name, for Lumina-mGPT.
        text_encoder: folder or repository.
        tokenizer: file, folder or repository.
        random_weights: whether weights are drawn instead of read.
        policy: as `load_policy` takes it.
        ratio: part of the visual tokens that is kept.
        guidance: as for `Decoder.generate`, like the next four.
        temperature: divisor of the logits.
        top_k: likeliest tokens that are drawn from.
        top_p: probability of the smallest set of tokens that is drawn from.
        guided_tokens: visual tokens that are guided.
        dtype: of the weights.
        device: where the model is.
        compile: as for `Decoder`.
        kv_dtype: as for `Decoder`.
    """

    model: str = "scenes"
    source: str | None = None
    revision: str | None = None
    size: tuple[int, int] | None = None
    decoder: str | None = None
    vqgan: str | None = None
    text_encoder: str | None = None
    tokenizer: str | None = None
    random_weights: bool = False
    policy: str = "full"
    ratio: str | float | None = None
    guidance: float | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guided_tokens: int | None = None
    dtype: str | None = None
    device: str = "cpu"
    compile: Literal["none", "inductor", "cudagraphs"] = "none"
    kv_dtype: Literal["int8", "fp8"] | None = None

    def load_policy(self) -> CachePolicy:
        """The policy.

        Raises:
            ArkvError: as `arkv.load_policy`.
        """
        from arkv.registry import load_policy

        return load_policy(self.policy, **({} if self.ratio is None else {"ratio": self.ratio}))

    def load_model(self, device: str | None = None) -> Model:
        """The model, where the recipe says or on another device; on the meta device, without weights.

        Raises:
            ArkvError: as `arkv.load_model`.
        """
        return load(self, device)

    def load_decoder(self) -> Decoder:
        """Model and policy, ready to draw.

        Raises:
            ArkvError: as `arkv.load_model`, `arkv.load_policy` and `Decoder`.
        """
        from arkv.decoder import Decoder

        policy = self.load_policy()  # what is misspelt shows before weights are read
        return Decoder(self.load_model(), policy, self.compile, self.kv_dtype)

    def sampling(self, model: Model) -> dict[str, Any]:
        """How tokens are drawn, as `Decoder.generate` takes it, the model's own guidance filled in."""
        return {
            "guidance": model.spec.guidance if self.guidance is None else self.guidance,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "guided_tokens": self.guided_tokens,
        }

    def settings(self, model: Model) -> dict[str, Any]:
        """Sampling and arithmetic, ready for JSON."""
        return {
            **self.sampling(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "compile": self.compile,
            "kv_dtype": self.kv_dtype,
        }

    def texts(self, model: Model) -> dict[str, str]:
        """What every picture's file says of how it was made, beside prompt and seed."""
        loading = described(self)
        return {
            "model": self.model,
            **({} if loading is None else {"loading": json.dumps(loading)}),
            "policy": policy_text(self.policy, self.load_policy()),
            "settings": json.dumps(self.settings(model)),
            "Software": f"arkv {arkv.__version__}",
        }

    def account(self, model: Model) -> dict[str, Any]:
        """What two runs must have in common to draw the same pictures, ready for JSON."""
        import torch

        return {
            "model": model.spec.name,
            "loading": described(self),
            "policy": policy_text(self.policy, self.load_policy()),
            **self.settings(model),
            "arkv": arkv.__version__,
            "torch": torch.__version__,
        }


def recipe_of(values: Mapping[str, Any]) -> Recipe:
    """The recipe in some values by name, others of which are passed over."""
    names = {field.name for field in dataclasses.fields(Recipe)}
    return Recipe(**{name: value for name, value in values.items() if name in names})


def policy_text(given: str, policy: CachePolicy) -> str:
    """Name and every parameter that is not None, as `--policy` takes them."""
    values = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    parameters = ",".join(f"{name}={_value_text(v)}" for name, v in values.items() if v is not None)
    return ":".join(filter(None, (given.partition(":")[0], parameters)))


def _value_text(value: object) -> str:
    """A parameter's value such that its commas do not end it."""
    from arkv.registry import split_commas

    text = str(value)
    return text if split_commas(text) == [text] else repr(value)
