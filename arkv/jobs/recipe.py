"""How pictures are made: model, policy and sampling, in words that a file can hold."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le

import arkv
from arkv.jobs.loading import DeviceOptions, ModelOptions
from arkv.options import Count, Filled, Plain, Positive, Ratio, option, options, split_commas

if TYPE_CHECKING:
    from arkv.decoder import Decoder
    from arkv.model import Model
    from arkv.policy import CachePolicy

Compile = Literal["none", "inductor", "cudagraphs"]
KvDtype = Literal["int8", "fp8", "int4"]
Guidance = Annotated[float, Ge(0), Plain]


@options
class PolicyOptions:
    """Which part of the cache is kept."""

    SECTION = "Policy"

    policy: Filled = option(default="full", metavar="NAME[:PARAMETER=VALUE,...]", help="see 'arkv policies'")
    ratio: Ratio | None = option(
        default=None,
        metavar="RATIO",
        help="part of the visual tokens that is kept, such as 1/6 or 0.25 (default: what the policy says)",
    )

    def load_policy(self) -> CachePolicy:
        """The policy.

        Raises:
            ArkvError: as `arkv.load_policy`.
        """
        from arkv.registry import load_policy

        return load_policy(self.policy, **({} if self.ratio is None else {"ratio": self.ratio}))


@options
class GuidanceOption:
    """How far pictures are guided."""

    SECTION = "Sampling"

    guidance: Guidance | None = option(
        default=None,
        metavar="SCALE",
        help="scale of classifier-free guidance; 1 leaves unconditional rows out (default: the model's own)",
    )


@options
class SamplingOptions(GuidanceOption):
    """How tokens are drawn from logits."""

    SECTION = "Sampling"

    temperature: Annotated[float, Ge(0), Plain] = option(
        default=1.0, metavar="NUMBER", help="divisor of the logits; 0 takes the likeliest token"
    )
    top_k: Count | None = option(
        default=None,
        metavar="K",
        help="draw from this many likeliest tokens; 0 for all (default: the model's own)",
    )
    top_p: Annotated[float, Gt(0), Le(1), Plain] | None = option(
        default=None,
        metavar="P",
        help="draw from the smallest set of tokens this probable (default: the model's own, mostly all)",
    )
    guided_tokens: Count | None = option(
        default=None,
        metavar="N",
        help="guide the first N visual tokens only (default: the model's own, which is all for most)",
    )


@options
class CompileOption:
    """How the model is run."""

    SECTION = "Compute"

    compile: Compile = option(default="none", help="what compiles the model; cudagraphs on a GPU only")


@options
class WindowOption:
    """How many tokens of a picture a forward pass takes."""

    SECTION = "Compute"

    window: Positive | Literal["auto"] = option(
        default="auto",
        metavar="TOKENS",
        help="most tokens of a picture in a forward pass, or auto by the size of the batch",
    )


@options
class KvDtypeOption:
    """How keys and values are stored."""

    SECTION = "Compute"

    kv_dtype: KvDtype | None = option(
        default=None, help="store keys and values in eight or four bits (default: as the weights)"
    )


@options
class Recipe(
    PolicyOptions, SamplingOptions, ModelOptions, CompileOption, WindowOption, DeviceOptions, KvDtypeOption
):
    """Everything that decides on a picture beside its prompt and its seed.

    The options are those of `arkv generate`; None is the model's own wherever it has one.
    """

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
            "window": self.window,
            "kv_dtype": self.kv_dtype,
        }

    def texts(self, model: Model) -> dict[str, str]:
        """What every picture's file says of how it was made, beside prompt and seed."""
        loading = self.described()
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
            "loading": self.described(),
            "policy": policy_text(self.policy, self.load_policy()),
            **self.settings(model),
            "arkv": arkv.__version__,
            "torch": torch.__version__,
        }


Part = TypeVar("Part")


def part_of(cls: type[Part], given: Any) -> Part:
    """The options of one class within those of a larger one, such as the recipe in a command's."""
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    return cls(**{name: getattr(given, name) for name in names})


def policy_text(given: str, policy: CachePolicy) -> str:
    """Name and every parameter that is not None, as `--policy` takes them."""
    values = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    parameters = ",".join(f"{name}={_value_text(v)}" for name, v in values.items() if v is not None)
    return ":".join(filter(None, (given.partition(":")[0], parameters)))


def _value_text(value: object) -> str:
    """A parameter's value such that its commas do not end it."""
    text = str(value)
    return text if split_commas(text) == [text] else repr(value)
