"""`arkv estimate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from arkv.cli.parser import Command
from arkv.cli.policies import told
from arkv.cli.tables import print_table
from arkv.errors import ArkvError
from arkv.jobs.loading import Dtype, ShapeOptions
from arkv.jobs.recipe import CompileOption, GuidanceOption, KvDtypeOption, PolicyOptions, policy_text
from arkv.options import Bytes, OptionError, Plain, Positive, option, options

if TYPE_CHECKING:
    from arkv.model import Model

USUAL_RATIO = "1/6"
"""Of all policies that have one, where several are compared."""


@options
class EstimateOptions(PolicyOptions, GuidanceOption, ShapeOptions, CompileOption, KvDtypeOption):
    """Options of `arkv estimate`."""

    SECTION = "What to estimate"

    batch_size: Positive | None = option(default=None, metavar="N", help="pictures at a time (default: 1)")
    memory: Bytes | None = option(
        default=None,
        metavar="GB",
        help="say instead how many pictures fit into so many gigabytes, weights included, by policy: all of "
        "them, or --policy beside the full cache",
    )
    condition: Annotated[int, Plain] | None = option(
        default=None,
        metavar="N",
        help="condition tokens of a row (default: the most a prompt can have)",
    )
    dtype: Dtype = option(default="float32", help="of weights, keys and values")

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.memory is not None:
            raise OptionError("--memory is not allowed with --batch-size: give one of them")


def run(given: EstimateOptions, typed: str) -> None:
    """Estimate."""
    if given.memory is None:
        given.load_policy()  # what is misspelt shows first
    from arkv.decoding.sampling import Sampling

    # On the meta device a model has shapes and no memory.
    model = given.load_model("meta")
    sampling = Sampling(guidance=model.spec.guidance if given.guidance is None else given.guidance)
    sampling.check(model.spec.vocabulary)
    longest = model.spec.max_condition
    if given.condition is not None and not 1 <= given.condition <= longest:
        raise ArkvError(
            f"--condition is {given.condition}: expected 1 to {longest}, the most condition tokens that "
            f"a prompt of {given.model} can have"
        )
    condition = longest if given.condition is None else given.condition
    if given.memory is None:
        _print_bytes(given, model, sampling.guided, condition)
    else:
        _print_pictures(given, model, sampling.guided, condition, given.memory)


def _print_bytes(given: EstimateOptions, model: Model, guided: bool, condition: int) -> None:
    """What a batch takes."""
    from arkv.estimate import estimate, format_bytes, rows_of
    from arkv.registry import torch_dtype

    policy, pictures = given.load_policy(), given.batch_size or 1
    dtype = torch_dtype(given.dtype)
    estimated = estimate(
        model, policy, pictures, guided, condition, dtype, given.kv_dtype, compile=given.compile
    )
    rows = [(name, format_bytes(count), f"{count:,}") for name, count in rows_of(estimated).items()]
    text, count = policy_text(given.policy, policy), f"{pictures} picture{'s' * (pictures > 1)}"
    print(f"{given.model}, {text}, {count}, {_rows(guided)}, {_stored(given)}")
    print_table(("", "", "bytes"), rows, right={1, 2})
    print(f"the policy holds {estimated.kv / estimated.full_kv:.1%} of the full cache")


def _print_pictures(given: EstimateOptions, model: Model, guided: bool, condition: int, memory: int) -> None:
    """How large a batch fits, by policy."""
    from arkv.estimate import estimate, format_bytes, pictures_within
    from arkv.registry import load_policy, names
    from arkv.speed.bench import configurations

    all_of_them = given.policy == "full"
    policies = [entry.name for entry in names("policy")] if all_of_them else ["full", given.policy]
    ratio = USUAL_RATIO if given.ratio is None else str(given.ratio)
    rows: list[tuple[str, str, str, str]] = []
    for text in policies:
        try:
            (one,) = configurations([text], [ratio], [1])
            policy = load_policy(one.policy)
            single = estimate(
                model, policy, 1, guided, condition, kv_dtype=given.kv_dtype, compile=given.compile
            )
            fits = pictures_within(
                max(0, memory - single.weights),
                model,
                policy,
                guided,
                condition,
                given.kv_dtype,
                compile=given.compile,
            )
            share = f"{single.kv / single.full_kv:.1%}"
            rows.append((one.policy, f"{fits:,}", format_bytes(single.batch), share))
        except Exception as error:
            if not all_of_them:
                raise
            # Somebody else's broken package must not hide the others.
            rows.append((text, "-", "-", told(error)))
    weights = estimate(model, load_policy("full"), 1, guided, condition).weights
    print(
        f"{given.model} in {format_bytes(memory)}, of which {format_bytes(weights)} are weights, "
        f"{_rows(guided)}, {_stored(given)}"
    )
    print_table(("policy", "pictures", "one picture", "of the full cache"), rows, right={1, 2, 3})


def _stored(given: EstimateOptions) -> str:
    return given.dtype if given.weights is None else f"{given.dtype} with weights in {given.weights}"


def _rows(guided: bool) -> str:
    return "two rows a picture" if guided else "one row a picture"


COMMAND = Command(
    EstimateOptions,
    run,
    (
        "arkv estimate --model scenes --policy linear --ratio 1/6 --batch-size 16",
        "arkv estimate --model janus-pro-1b --dtype bfloat16 --memory 24GB",
        "arkv estimate --model lumina-mgpt-7b-768 --dtype bfloat16 --weights int4 --memory 16GB",
    ),
)
