import pytest
import torch
from arkv_squares.model import LONGEST, Squares

import arkv
from arkv.errors import PromptError


@pytest.fixture
def model() -> Squares:
    return Squares.from_pretrained(dtype=torch.float32, device=torch.device("cpu"))


@torch.inference_mode()
def test_the_decoder_agrees_with_the_plain_transformer(model: Squares) -> None:
    prompts = ["a", "longer"]
    tokens = torch.randint(16, (2, 36), generator=torch.Generator().manual_seed(0))
    condition = model.condition(prompts, guided=True)
    hidden = torch.cat([condition.embeddings, model.grays(tokens.repeat(2, 1))[:, :-1]], dim=1)
    mask = torch.cat([condition.mask, torch.ones(4, 35, dtype=torch.bool)], dim=1)
    hidden = model.transformer(hidden, condition.rotation[:, : hidden.shape[1]], mask)[:, LONGEST:]

    forced = arkv.Decoder(model, arkv.load_policy("full")).teacher_force(prompts, tokens, guidance=2.0)
    torch.testing.assert_close(forced.raw, model.output(hidden), atol=1e-4, rtol=1e-4)


def test_a_picture_has_a_square_for_every_token(model: Squares) -> None:
    picture = model.pixels(torch.arange(36)[None] % 16)
    assert picture.shape == (1, 48, 48, 3)
    assert picture[0, 0, 0].tolist() == [0, 0, 0]
    assert picture[0, 16, 24].tolist() == [255, 255, 255]  # token 15: row 2, column 3


def test_a_prompt_that_is_too_long_is_refused(model: Squares) -> None:
    decoder = arkv.Decoder(model, arkv.load_policy("full"))
    with pytest.raises(PromptError, match="more than 16 bytes"):
        decoder.generate(["far too long a prompt"])


def test_shapes_are_known_without_weights() -> None:
    model = Squares.from_pretrained(dtype=torch.float32, device=torch.device("meta"))
    assert model.spec.grid.tokens == 36
    assert model.device.type == "meta"
