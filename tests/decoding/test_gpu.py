"""The loop on a GPU: compile modes, graphs of several decoders, a second device, memory."""

from collections.abc import Sequence

import pytest
import torch
from tiny import Tiny, tight
from torch import Tensor

from arkv import Decoder
from arkv.decoding.compiling import Compile
from arkv.machine.instruments import used_memory

PROMPTS = [(1, 2, 3), (4,), (5, 6)]
POLICIES = ("full", "linear", "adakv")


def modes(device: torch.device) -> tuple[Compile, ...]:
    return ("none", "inductor", "cudagraphs") if device.type == "cuda" else ("none",)


def decoder(device: torch.device, policy: str, mode: Compile, seed: int = 0) -> Decoder:
    model = Tiny(seed=seed).to(device)
    return Decoder(model, tight(policy, model), compile=mode)


def drawn(by: Decoder, prompts: Sequence[tuple[int, ...]] = PROMPTS) -> Tensor:
    return by.generate(prompts, pixels=False).tokens


@pytest.mark.parametrize("policy", POLICIES)
def test_gpu_every_compile_mode_draws_the_same_pictures(device: torch.device, policy: str) -> None:
    expected = drawn(decoder(torch.device("cpu"), policy, "none"))
    for mode in modes(device):
        one = decoder(device, policy, mode)
        for _ in range(3):  # run, captured, replayed
            assert torch.equal(drawn(one), expected), mode


def test_gpu_decoders_that_take_turns_do_not_read_each_others_memory(device: torch.device) -> None:
    mode = modes(device)[-1]
    alone = [drawn(decoder(device, policy, mode)) for policy in POLICIES]
    together = [decoder(device, policy, mode) for policy in POLICIES]
    for _ in range(3):
        for one, expected in zip(together, alone, strict=True):
            assert torch.equal(drawn(one), expected)
    del together[0]  # its graphs go, and what the others were captured with stays
    for one, expected in zip(together, alone[1:], strict=True):
        assert torch.equal(drawn(one), expected)


def test_gpu_a_device_that_is_not_the_current_one_draws_the_same(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    last = torch.device("cuda", torch.cuda.device_count() - 1) if device.type == "cuda" else device
    expected = drawn(decoder(torch.device("cpu"), "linear", "none"))
    one = decoder(last, "linear", modes(device)[-1])
    for _ in range(3):
        assert torch.equal(drawn(one), expected)


def test_gpu_memory_stays_while_batches_change_their_size(device: torch.device) -> None:
    one = decoder(device, "linear", modes(device)[-1])
    sizes = (1, 3, 2)
    for size in 2 * sizes:
        drawn(one, PROMPTS[:size])
    before = used_memory(device)
    for size in 4 * sizes:
        drawn(one, PROMPTS[:size])
    after = used_memory(device)
    assert before is not None
    assert after is not None
    # Where the whole process is counted, so is what Python and its libraries keep.
    assert after - before <= (0 if device.type == "cuda" else 2**26)
