"""Captions as LlamaGen reads them: cleaned, then the states of a T5 encoder (arXiv 1910.10683)."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from arkv.errors import CheckpointError
from arkv.weights.checkpoint import read_config
from arkv.weights.hub import fetch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIG_FILE, TOKENIZER_FILE = "config.json", "tokenizer.json"
NEEDED = (CONFIG_FILE, TOKENIZER_FILE)
CHOICES = ((*NEEDED, "model*.safetensors*"), (*NEEDED, "pytorch_model*.bin*"))

QUOTES = str.maketrans(
    {**dict.fromkeys("«»“”¨`´", '"'), **dict.fromkeys("‘’", "'"), **dict.fromkeys("‐‑‒–—―−", "-")}  # noqa: RUF001
)


def clean_caption(caption: str) -> str:
    """Lower case, no web addresses or mark-up, plain quotes and dashes, single spaces.

    LlamaGen cleans captions with the routine of DeepFloyd IF and PixArt. This is what it does to ordinary
    prompts. Not reproduced are the repair of wrongly decoded text (ftfy), and its removal of things that
    captions of web pictures have: Chinese and Japanese characters, file names, long numbers, hashtags, IP
    and postal addresses, prices, and words that sell something.
    """
    for _ in range(2):
        caption = html.unescape(caption.lower())
        caption = re.sub(r"\b(?:https?://|www\.)\S+", " ", caption)
        caption = re.sub(r"</?[a-z][^>]*>", " ", caption.replace("<person>", "person"))
        caption = " ".join(caption.translate(QUOTES).split())
    return caption


class CaptionEncoder(nn.Module):
    """The encoder of a T5 with its tokenizer.

    Args:
        encoder: transformers' `T5EncoderModel`.
        tokenizer: of the same checkpoint; ends every text with its end token.
        longest: tokens of a caption at most; what is longer is cut.
    """

    def __init__(self, encoder: nn.Module, tokenizer: Tokenizer, longest: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.tokenizer.enable_truncation(longest)
        self.tokenizer.no_padding()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        longest: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        revision: str | None = None,
        token: str | None = None,
    ) -> Self:
        """Load a T5 checkpoint, of which the decoder is left out.

        Args:
            source: folder, or name of a repository on the hub, in the layout of transformers.
            longest: tokens of a caption at most.
            dtype: of the weights.
            device: where to put them.
            revision: of the repository.
            token: for the hub.

        Raises:
            CheckpointError: a file is missing, damaged, or belongs to another model.
        """
        from tokenizers import Tokenizer
        from transformers import T5EncoderModel

        folder = fetch(source, *CHOICES, revision=revision, token=token)
        kind = read_config(folder / CONFIG_FILE).get("model_type")
        if kind != "t5":
            raise CheckpointError(f"{folder} is not a T5: its configuration has the model_type {kind!r}")
        try:
            tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
            encoder = T5EncoderModel.from_pretrained(folder, dtype=dtype)
        except Exception as error:  # the libraries raise many kinds
            raise CheckpointError(
                f"the text encoder in {folder} cannot be read: {' '.join(str(error).split())}"
            ) from error
        return cls(cast(nn.Module, encoder).to(device), tokenizer, longest).eval()

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return cast(int, self.encoder.config.d_model)  # type: ignore[union-attr]

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> list[Tensor]:
        """Hidden states of the tokens of each caption, `[tokens, width]`, the end token included."""
        rows = [self.tokenizer.encode(clean_caption(caption)).ids for caption in captions]
        length, device = max(map(len, rows)), next(self.encoder.parameters()).device
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return [states[: len(row)] for states, row in zip(hidden, rows, strict=True)]
