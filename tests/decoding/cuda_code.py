"""What Inductor writes for a GPU, counted: a JSON line for each function that a step or a pass compiles.

`test_cuda_code.py` runs this file in a process of its own, which believes in a GPU for good:

    python cuda_code.py FAMILY CASE...

A case is a policy with its parameters, and behind an @ how keys and values are stored.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import faked_cuda
import profiles
import torch

CODES: list[str] = []
faked_cuda.install(CODES.append)

from torch import Tensor  # noqa: E402
from torch._inductor.compile_fx import compile_fx  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from arkv import Model, load_policy  # noqa: E402
from arkv.attention import operators  # noqa: E402
from arkv.decoding import loop as loop_module  # noqa: E402
from arkv.decoding.loop import Loop  # noqa: E402
from arkv.decoding.sampling import Sampling  # noqa: E402
from arkv.model import Condition  # noqa: E402
from arkv.models.emu3 import Emu3  # noqa: E402
from arkv.models.emu3_checkpoint import EMU3_STAGE1  # noqa: E402
from arkv.models.emu35 import Emu35  # noqa: E402
from arkv.models.emu35_checkpoint import EMU35_IMAGE  # noqa: E402
from arkv.models.janus import JANUS_PRO_1B, JanusPro  # noqa: E402
from arkv.models.llamagen import VARIANTS as LLAMAGEN  # noqa: E402
from arkv.models.llamagen import LlamaGen  # noqa: E402
from arkv.models.lumina import LUMINA_7B_768, LuminaMGPT  # noqa: E402
from arkv.weights.quantization import WeightDtype  # noqa: E402
from arkv.weights.quantized import quantize_  # noqa: E402

LAYERS = 2  # all are alike
ALLOCATED = re.compile(r"empty_strided_cuda\(\(([\d, ]*)\), \([\d, ]*\), (torch\.\w+)\)")


@dataclass(frozen=True)
class Family:
    """A model at the batch that it is measured with.

    Attributes:
        make: what makes the model of a variant.
        variant: of the model.
        pictures: decoded at a time.
        condition: condition tokens of a row.
        weights: how those of the blocks are stored.
        window: tokens of a pass, where passes of several are looked at, too.
    """

    make: Callable[[Any], Model]
    variant: Any
    pictures: int
    condition: int
    weights: WeightDtype | None = None
    window: int | None = None


FAMILIES = {
    "janus": Family(JanusPro, JANUS_PRO_1B, 128, 24),
    "llamagen": Family(LlamaGen, next(one for one in LLAMAGEN if one.name == "llamagen-xl-256"), 256, 1),
    "lumina": Family(LuminaMGPT, LUMINA_7B_768, 12, 30),
    "emu3": Family(Emu3, EMU3_STAGE1, 12, 60),
    "emu3.5": Family(Emu35, EMU35_IMAGE, 12, 60),
    "janus-int4": Family(JanusPro, JANUS_PRO_1B, 16, 24, "int4"),
    "janus-window": Family(JanusPro, JANUS_PRO_1B, 4, 24, window=16),
}


def model_of(family: Family) -> Model:
    """Its shape in few layers, in bfloat16."""
    shape = dataclasses.replace(family.variant.transformer, layers=LAYERS)
    torch.set_default_dtype(torch.bfloat16)
    with faked_cuda.DEVICE:
        model = family.make(dataclasses.replace(family.variant, transformer=shape))
    torch.set_default_dtype(torch.float32)
    if family.weights is not None:
        quantize_(model, family.weights)
    return model.eval()


def profile_of(model: Model, folder: Path) -> Path:
    """A profile of heads that differ, for policies that ask for one."""
    spec = model.spec
    shares = tuple(tuple((head % 2) / 1.0 for head in range(spec.kv_heads)) for _ in range(spec.layers))
    path = folder / "heads.json"
    profiles.profile_of(spec, shares).save(path)
    return path


def noted(codes: list[tuple[str, str]], written: dict[Hashable, str]) -> Callable[..., Any]:
    """`torch.compile`, with Inductor only writing; the graph itself is what then runs on fake tensors.

    Args:
        codes: gets the name of each function that is compiled, and the code.
        written: the code of every graph so far: what two policies have in common is written once.
    """
    compile_ = torch.compile

    def compiled(function: Callable[..., Any], **settings: Any) -> Any:
        def backend(graph: Any, inputs: list[Any]) -> Any:
            shapes = [(x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in inputs]
            key = (graph.code, str(shapes))
            if key not in written:
                try:
                    compile_fx(graph, inputs)
                except Exception as error:
                    if not was_written(error):
                        raise
                written[key] = CODES.pop()
            codes.append((function.__name__, written[key]))
            return graph.forward

        return compile_(function, backend=backend, **settings)

    return compiled


def was_written(error: BaseException | None) -> bool:
    """Whether Inductor was stopped because it was done."""
    while error is not None:
        if isinstance(error, faked_cuda.Written):
            return True
        error = error.__cause__ or error.__context__
    return False


def largest_temporary(code: str) -> tuple[int, str]:
    """Bytes of the largest tensor that the code allocates, and what it is."""
    found = [(0, "none")]
    for shape, dtype in ALLOCATED.findall(code):
        sizes = [int(size) for size in shape.split(",") if size.strip()]
        size = prod(sizes) * getattr(torch, dtype.removeprefix("torch.")).itemsize
        found.append((size, f"{sizes} {dtype}"))
    return max(found)


def rows_of(model: Model, family: Family, text: str, written: dict[Hashable, str]) -> list[dict[str, Any]]:
    """One step of a case, evicting, and a line in a window if the family has one: what is compiled for it."""
    codes: list[tuple[str, str]] = []
    torch._dynamo.reset()
    policy, _, kv_dtype = text.partition("@")
    rows, spec = 2 * family.pictures, model.spec
    plain, torch.compile = torch.compile, noted(codes, written)
    try:
        loop = Loop(model, load_policy(policy), rows, family.condition, "inductor", True, kv_dtype or None)
        loop.prefill_(
            Condition(
                torch.zeros(rows, family.condition, spec.width, dtype=model.dtype, device=model.device),
                torch.ones(rows, family.condition, dtype=torch.bool, device=model.device),
                torch.zeros(1, family.condition + spec.grid.tokens, spec.head_dim, device=model.device),
            )
        )
        loop.advance_(torch.zeros(rows, dtype=torch.long, device=model.device), 0)
        if family.window is not None:
            window, line = loop._window(family.window), range(loop.store.plan.period)
            window._open_(0, line)
            window._pass_(Sampling(), True)
            window._show_(0, line)
    finally:
        torch.compile = plain
    leaf = min(leaf.nbytes for leaf in loop.store.keys)
    found = []
    for name, code in codes:
        size, what = largest_temporary(code)
        operators_ = re.findall(r"torch\.ops\.([\w.]+)\(", code)
        found.append(
            {
                "case": text,
                "function": name,
                "triton": len(re.findall(r"\.run\(", code)),
                "products": len(re.findall(r"extern_kernels\.\w+\(", code)),
                "attention": sum(each.startswith("arkv.") for each in operators_),
                "eager": [each for each in operators_ if not each.startswith("arkv.")],
                "largest": size,
                "largest_is": what,
                "leaf": leaf,
                "statistic": loop.store.position.nbytes,
            }
        )
    return found


def main(name: str, cases: list[str]) -> None:
    """Print the lines of all cases of a family."""
    operators.available = lambda *_: True  # type: ignore[assignment]
    loop_module.check_selection = lambda *_: None  # looks at numbers, and there are none
    FakeTensorMode.avoid_device_init = True  # type: ignore[assignment, method-assign]
    family = FAMILIES[name]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), FakeTensorMode():
        model = model_of(family)
        profile, written = profile_of(model, Path(folder)), dict[Hashable, str]()
        for case in cases:
            try:
                found = rows_of(model, family, case.replace("HEADS", str(profile)), written)
            except Exception:
                found = [{"case": case, "failed": traceback.format_exc()[-1500:]}]
            for row in found:
                print(json.dumps(row | {"case": case}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
