import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from arkv.errors import CheckpointError
from arkv.models import vq
from arkv.models.config import Section
from arkv.models.emu3_checkpoint import EMU3_VQ, decoder_shape
from arkv.models.movq import SpatialNorm, StoredNorm
from arkv.models.vq import CHAMELEON_VQ, MOVQ, UNUSED, VQ8, VQ16, Layout, VQConfig, VQDecoder, to_uint8
from arkv.weights.checkpoint import load_weights_

DATA = Path(__file__).parent.parent / "data"

Golden = tuple[VQDecoder, dict[str, Tensor], dict[str, float]]
LAYOUTS: dict[str, Layout] = {
    "llamagen_vq16": "llamagen",
    "chameleon_vqgan": "taming",
    "emu3_vq": "emu3",
    "lumina2_movq": "taming",
    "emu35_ibq": "taming",
}
CASES = list(LAYOUTS)


def redrawn(module: nn.Module) -> nn.Module:
    """Weights that are neither small nor zero, so that nothing is hidden."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in module.parameters():
            spread = 1.5 / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.3
            weight.normal_(0, spread, generator=generator)
    return module.eval()


class Skip(nn.Module):
    """Stands for a part that is left out."""

    def forward(self, x: Tensor, vectors: Tensor) -> Tensor:
        return x


class Nothing(nn.Module):
    """Stands for a part that would add something."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :1])


def golden(case: str) -> Golden:
    """A decoder with the weights of a reference, the reference's pictures, and how near they should be."""
    facts = json.loads((DATA / f"{case}.json").read_text())
    file = DATA / f"{case}.safetensors"
    config, layout = facts["config"], LAYOUTS[case]
    if case == "llamagen_vq16":
        shape = VQConfig(
            config["codebook_size"],
            config["codebook_embed_dim"],
            config["z_channels"],
            config["base_channels"],
            tuple(config["channel_multiplier"]),
            config["num_res_blocks"] + 1,
        )
    elif case == "emu3_vq":
        shape = decoder_shape(Section(config["vq_config"], case))
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
            attention=bool(inner["attn_resolutions"]),
            spatial=case == "lumina2_movq",
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
    assert len(found) >= 2
    for picture, error in found.items():
        assert error <= tolerance[picture], picture


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        *itertools.product(CASES, ["columns", "norm", "middle", "bilinear"]),
        *itertools.product(CASES[:2], ["levels"]),  # of five
        *((case, "lowest") for case in CASES if case != "chameleon_vqgan"),  # which has no attention there
        *itertools.product(["emu3_vq", "lumina2_movq"], ["shift", "codes"]),
        *(("emu3_vq", part) for part in ("blocks", "doublings", "mean")),
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
        decoder.decoder.middle[1] = Skip()
    elif wrong == "lowest":
        levels[0].attention = nn.ModuleList(Skip() for _ in levels[0].blocks)
    elif wrong == "bilinear":
        plain = F.interpolate
        monkeypatch.setattr(
            F,
            "interpolate",
            lambda x, size=None, scale_factor=None: plain(
                x, size, scale_factor, "bilinear" if size is None else "nearest"
            ),
        )
    elif wrong == "shift":
        for norm in decoder.modules():
            if isinstance(norm, SpatialNorm):
                norm.shift = Nothing()  # type: ignore[assignment]
    elif wrong == "codes":  # norms see the raw vectors in Emu3, and what enters the decoder in MoVQGAN
        inner = decoder.decoder.forward
        raw = decoder.first_frame is not None
        monkeypatch.setattr(decoder.decoder, "forward", lambda x, vectors: inner(x, seen[0] if raw else x))
        seen: list[Tensor] = []
        decoder.post_quant.register_forward_hook(lambda _, inputs, __: seen.insert(0, inputs[0]))
    elif wrong in ("blocks", "doublings"):
        setattr(decoder.first_frame, wrong, nn.ModuleList())
    elif wrong == "mean":
        for norm in decoder.modules():
            if isinstance(norm, StoredNorm):
                norm.mean.zero_()
                norm.variance.fill_(1)
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
    lumina2 = ((plain + 1) * 127.5).round().clip(0, 255).astype(numpy.uint8)
    assert numpy.array_equal(to_uint8(x, "even").numpy(), lumina2)
    assert {0, 255} <= set(janus.flat)


def test_many_pictures_are_drawn_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = redrawn(VQDecoder(VQConfig(24, 8, 32, 32, (1, 1), 2)))
    assert isinstance(decoder, VQDecoder)
    codes = torch.randint(24, (5, 3, 4), generator=torch.Generator().manual_seed(0))
    seen: list[int] = []
    decoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    together = decoder.pixels(codes, "down")
    monkeypatch.setattr(vq, "MOST_NUMBERS", 2 * 6 * 8 * 32)
    apart = decoder.pixels(codes, "down")
    monkeypatch.setattr(vq, "MOST_NUMBERS", 1)
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
    ("config", "millions", "scale"),
    [(VQ16, 42.6, 16), (VQ8, 41.5, 8), (CHAMELEON_VQ, 41.5, 16), (MOVQ, 161.2, 8), (EMU3_VQ, 161.25, 8)],
)
def test_published_sizes(config: VQConfig, millions: float, scale: int) -> None:
    with torch.device("meta"):
        decoder = VQDecoder(config)
        pictures = decoder(torch.zeros(1, 2, 3, dtype=torch.long))
    assert sum(w.numel() for w in decoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert pictures.shape == (1, 3, 2 * scale, 3 * scale)
    assert config.scale == scale
