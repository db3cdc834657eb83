"""Lets Inductor believe in a GPU, so that it writes the code for one. Nothing of that code is run.

`install` changes torch for good: a process that calls it is of no use for anything else. Tensors are fake
ones on `DEVICE`, made under a `FakeTensorMode`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

DEVICE = torch.device("cuda", 0)

# An H200, as `torch.cuda.get_device_properties` describes it.
PROPERTIES = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=150_000_000_000,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    L2_cache_size=60 * 2**20,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    is_integrated=0,
    gcnArchName="",
    clock_rate=1_980_000,
    memory_clock_rate=3_201_000,
    memory_bus_width=6144,
)


class Written(Exception):
    """Raised where Inductor would go on to load what it has written."""


class _Guard:
    """Stands for the context managers that choose a device."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> bool:
        return False


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def install(written: Callable[[str], None]) -> None:
    """Fake the device.

    Args:
        written: is handed the Python text of each graph that Inductor has made code of.
    """
    _fake_cuda()
    _fake_triton()
    _stop_inductor_after_writing(written)


def _fake_cuda() -> None:
    from torch._dynamo.device_interface import CudaInterface
    from torch._subclasses import fake_tensor

    state = torch.random.get_rng_state()
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": PROPERTIES,
        "get_device_capability": (9, 0),
        "get_device_name": PROPERTIES.name,
        "is_bf16_supported": True,
        "is_initialized": True,
        "mem_get_info": (140 * 10**9, 150 * 10**9),
        "memory_reserved": 0,
        "memory_allocated": 0,
        "current_stream": None,
        "get_rng_state": state,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    nothing = ("_lazy_init", "init", "synchronize", "set_device", "set_rng_state")
    for name, value in {**answers, **dict.fromkeys(nothing)}.items():
        setattr(torch.cuda, name, _always(value))
    torch.cuda.random.get_rng_state = _always(state)
    torch.cuda.random.set_rng_state = _always(None)
    torch.cuda.device = torch.cuda._DeviceGuard = _Guard  # type: ignore[misc, assignment]
    for name in ("getDevice", "setDevice", "exchangeDevice", "maybeExchangeDevice", "getCurrentRawStream"):
        setattr(torch._C, f"_cuda_{name}", _always(0))
    of_interface = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": PROPERTIES,
        "get_compute_capability": 90,
        "synchronize": None,
        "get_raw_stream": 0,
        "set_device": None,
        "exchange_device": 0,
        "maybe_exchange_device": 0,
    }
    for name, value in of_interface.items():
        setattr(CudaInterface, name, staticmethod(_always(value)))
    for name in ("get_device_properties", "current_device", "set_device"):
        setattr(CudaInterface.Worker, name, staticmethod(_always(of_interface[name])))
    CudaInterface.device = _Guard  # type: ignore[misc, assignment]
    fake_tensor.init_gpu_context = _always(None)
    torch._C._ensureCUDADeviceGuardSet()


def _fake_triton() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        get_current_target = _always(GPUTarget("cuda", 90, 32))
        get_current_device = get_current_stream = _always(0)
        get_active_torch_device = _always(DEVICE)
        get_benchmarker = _always(_always([1.0] * 3))

    driver.set_active(Driver())


def _stop_inductor_after_writing(written: Callable[[str], None]) -> None:
    from torch._inductor import config
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    from torch._inductor.graph import GraphLowering

    def compile_to_module(self: GraphLowering) -> None:
        code, _ = self.codegen()
        written(getattr(code, "value", code))
        raise Written

    GraphLowering.compile_to_module = compile_to_module  # type: ignore[method-assign]
    config.fx_graph_cache = False
    config.compile_threads = 1
    config.joint_graph_constant_folding = False  # would compute
    # These patterns are found with examples on the device.
    fuse_attention._sfdp_init = pad_mm._pad_mm_init = _always(None)
    misc_patterns._misc_patterns_init = _always(None)
