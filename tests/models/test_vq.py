import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from arkv.errors import CheckpointError
from arkv.models import vq
from arkv.models.vq import CHAMELEON_VQ, UNUSED, VQ8, VQ16, Layout, VQConfig, VQDecoder, to_uint8
from arkv.weights.checkpoint import load_weights_

DATA = Path(__file__).parent.parent / "data"

Golden = tuple[VQDecoder, dict[str, Tensor], dict[str, float]]
CASES = ["llamagen_vq16", "chameleon_vqgan"]


def redrawn(module: nn.Module) -> nn.Module:
    """Weights that are neither small nor zero, so that nothing is hidden."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in module.parameters():
            spread = 1.5 / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.3
            weight.normal_(0, spread, generator=generator)
    return module.eval()


def golden(case: str) -> Golden:
    """A decoder with the weights of a reference, the reference's pictures, and how near they should be."""
    facts = json.loads((DATA / f"{case}.json").read_text())
    file = DATA / f"{case}.safetensors"
    config, layout = facts["config"], cast(Layout, "llamagen" if case == "llamagen_vq16" else "taming")
    if case == "llamagen_vq16":
        shape = VQConfig(
            config["codebook_size"],
            config["codebook_embed_dim"],
            config["z_channels"],
            config["base_channels"],
            tuple(config["channel_multiplier"]),
            config["num_res_blocks"] + 1,
        )
    else:
        inner = config["ddconfig"]
        shape = VQConfig(
            config["n_embed"],
            config["embed_dim"],
            inner["z_channels"],
            inner["ch"],
            tuple(inner["ch_mult"]),
            inner["num_res_blocks"] + 1,
            normalised=False,
            attention=False,
        )
    decoder = VQDecoder(shape).eval()
    unused = ["inputs.*", "expected.*", *(f"weights.{pattern}" for pattern in UNUSED)]
    load_weights_(decoder.weight_slots(layout, "weights."), [file], unused)
    return decoder, load_file(file), facts["tolerance"]["values"]


@torch.no_grad()
def errors(decoder: VQDecoder, tensors: dict[str, Tensor], flip: bool = False) -> dict[str, float]:
    """By picture, how far the decoder is from the reference; `flip` reads the codes column by column."""
    found = {}
    for name, codes in tensors.items():
        if name.startswith("inputs.codes_"):
            picture = "expected.pixels_" + name.removeprefix("inputs.codes_")
            codes = codes.mT.reshape(codes.shape) if flip else codes
            found[picture] = (decoder(codes) - tensors[picture]).abs().max().item()
    return found


@pytest.mark.parametrize("case", CASES)
def test_pictures_are_those_of_the_reference(case: str) -> None:
    decoder, tensors, tolerance = golden(case)
    found = errors(decoder, tensors)
    assert len(found) == 2
    for picture, error in found.items():
        assert error <= tolerance[picture], picture


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        *itertools.product(CASES, ["columns", "norm", "levels", "middle", "bilinear"]),
        ("llamagen_vq16", "lowest"),  # the other has no attention there
    ],
)
def test_wrong_decoders_are_told_apart(case: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, tensors, tolerance = golden(case)
    levels = decoder.decoder.levels
    if wrong == "norm":
        decoder.config = replace(decoder.config, normalised=not decoder.config.normalised)
    elif wrong == "levels":
        levels[2].blocks, levels[3].blocks = levels[3].blocks, levels[2].blocks
    elif wrong == "middle":
        decoder.decoder.middle[1] = nn.Identity()
    elif wrong == "lowest":
        levels[0].attention = nn.ModuleList(nn.Identity() for _ in levels[0].blocks)
    elif wrong == "bilinear":
        plain = F.interpolate
        monkeypatch.setattr(
            F, "interpolate", lambda x, scale_factor: plain(x, None, scale_factor, "bilinear")
        )
    found = errors(decoder, tensors, flip=wrong == "columns")
    assert all(error > 100 * tolerance[picture] for picture, error in found.items())


@pytest.mark.parametrize(("shape", "multipliers"), [((4, 4), (1, 1, 2)), ((3, 5), (1, 2, 2, 4))])
def test_the_decoder_of_janus_in_transformers_gives_the_same(
    shape: tuple[int, int], multipliers: tuple[int, ...], tmp_path: Path
) -> None:
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

    sizes = {"embed_dim": 8, "num_embeddings": 24, "latent_channels": 40, "base_channels": 32}
    reference = redrawn(
        JanusVQVAE(
            JanusVQVAEConfig(**sizes, channel_multiplier=list(multipliers), num_res_blocks=1, num_patches=4)
        )
    )
    torch.save(reference.state_dict(), tmp_path / "vq.bin")
    decoder = VQDecoder(VQConfig(24, 8, 40, 32, multipliers, 2)).eval()
    load_weights_(decoder.weight_slots("transformers"), [tmp_path / "vq.bin"], UNUSED)
    codes = torch.randint(24, (2, *shape), generator=torch.Generator().manual_seed(0))
    reference.quantize.quant_state_dims = list(shape)  # it is made for square pictures, but not bound to them
    with torch.no_grad():
        expected, found = reference.decode(codes.flatten(1)), decoder(codes)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_a_missing_tensor_is_named_as_in_the_checkpoint(tmp_path: Path) -> None:
    decoder = VQDecoder(VQConfig(24, 8, 32, 32, (1, 2, 2), 2))
    state = {name: slot.target for name, slot in decoder.weight_slots("taming").items()}
    state["loss.logvar"] = torch.zeros(())
    del state["decoder.up.2.attn.1.q.bias"]
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "vq.ckpt")
    with pytest.raises(CheckpointError, match=r"decoder\.up\.2\.attn\.1\.q\.bias \(64,\) is missing"):
        load_weights_(decoder.weight_slots("taming"), [tmp_path / "vq.ckpt"], UNUSED)


def test_colours_are_those_of_the_official_programs() -> None:
    x = torch.linspace(-1.2, 1.2, 3 * 4001).view(1, 3, 1, -1)
    plain = x.permute(0, 2, 3, 1).numpy()
    janus = numpy.clip((plain + 1) / 2 * 255, 0, 255).astype(numpy.uint8)
    llamagen = numpy.clip(127.5 * plain + 128, 0, 255).astype(numpy.uint8)
    assert numpy.array_equal(to_uint8(x, "down").numpy(), janus)
    assert numpy.array_equal(to_uint8(x, "nearest").numpy(), llamagen)
    assert {0, 255} <= set(janus.flat)


def test_many_pictures_are_drawn_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = redrawn(VQDecoder(VQConfig(24, 8, 32, 32, (1, 1), 2)))
    assert isinstance(decoder, VQDecoder)
    codes = torch.randint(24, (5, 3, 4), generator=torch.Generator().manual_seed(0))
    seen: list[int] = []
    decoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    together = decoder.pixels(codes, "down")
    monkeypatch.setattr(vq, "MAX_PIXELS", 2 * 6 * 8)
    apart = decoder.pixels(codes, "down")
    monkeypatch.setattr(vq, "MAX_PIXELS", 1)
    decoder.pixels(codes[:2], "down")
    assert seen == [5, 2, 2, 1, 1, 1]
    assert together.shape == (5, 6, 8, 3)
    assert together.dtype == torch.uint8
    assert (together.int() - apart.int()).abs().max() <= 1  # rounding may differ with the batch
    assert together.unique().numel() > 50


def test_weights_stay_as_they_are_when_a_model_is_narrowed() -> None:
    decoder = VQDecoder(VQConfig(24, 8, 32, 32, (1,), 1))
    before = {name: weight.clone() for name, weight in decoder.state_dict().items()}
    nn.Sequential(decoder).to(torch.bfloat16)
    for name, weight in decoder.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, before[name])
    assert decoder.to("meta").codebook.weight.is_meta


@pytest.mark.parametrize(
    ("config", "millions", "scale"), [(VQ16, 42.6, 16), (VQ8, 41.5, 8), (CHAMELEON_VQ, 41.5, 16)]
)
def test_published_sizes(config: VQConfig, millions: float, scale: int) -> None:
    with torch.device("meta"):
        decoder = VQDecoder(config)
        pictures = decoder(torch.zeros(1, 2, 3, dtype=torch.long))
    assert sum(w.numel() for w in decoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert pictures.shape == (1, 3, 2 * scale, 3 * scale)
    assert config.scale == scale
