"""Captions as LlamaGen reads them: cleaned, then the states of a T5 encoder (arXiv 1910.10683)."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from arkv.errors import CheckpointError
from arkv.models.config import MOST_TOKENS, Section
from arkv.models.pretrained import CHOICES, CONFIG_FILE, Part, load, read_tokenizer
from arkv.models.prompting import encode, special_tokens
from arkv.models.transformer import MOST_LAYERS, MOST_WIDTH
from arkv.weights.checkpoint import WeightSlot, tensor_names
from arkv.weights.files import read_config, weight_files
from arkv.weights.hub import fetch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

AnyEncoder = TypeVar("AnyEncoder", bound="CaptionEncoder")

END = "</s>"
"""Ends every text that a T5 reads."""

PADDING = "<pad>"

UNUSED = ("decoder.*", "lm_head.weight")
SHARED, TWIN = "shared.weight", "encoder.embed_tokens.weight"
"""Two names of one tensor; a file has one of them or both."""

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
        # Numbers that no character has, of any length, are not for int() to read.
        caption = re.sub(r"&#(?:\d{8,}|x[\da-f]{8,});?", " ", caption.lower())
        caption = re.sub(r"\b(?:https?://|www\.)\S+", " ", html.unescape(caption))
        # A tag has no other in it: looking past the next one for its end would take squared time.
        caption = re.sub(r"</?[a-z][^<>]*>", " ", caption.replace("<person>", "person"))
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
        self.longest = longest
        self.special = special_tokens(tokenizer, (END, PADDING))
        end = tokenizer.token_to_id(END)
        if end is None:
            raise CheckpointError(f"the tokenizer of the text encoder has no token {END}: it is not a T5's")
        self.end: int = end

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
        folder = fetch(source, *CHOICES, revision=revision, token=token)
        config = read_config(folder / CONFIG_FILE)
        if config.get("model_type") != "t5":
            kind = config.get("model_type")
            raise CheckpointError(f"{folder} is not a T5: its configuration has the model_type {kind!r:.60}")
        _check_shape(Section(config, str(folder / CONFIG_FILE)))
        tokenizer, files = read_tokenizer(folder), weight_files(folder)
        # Activations of one projection overflow in float16, so its weights stay wide, as transformers has it.
        wide = torch.float32 if dtype == torch.float16 else dtype
        build = partial(_build, cls, config, tokenizer, longest)
        encoder = load(build, wide, device, lambda module: _parts(module, files))
        for name, weight in encoder.named_parameters() if wide != dtype else ():
            if not name.endswith(".wo.weight"):
                weight.data = weight.to(dtype)
        return encoder

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return cast(int, self.encoder.config.d_model)  # type: ignore[union-attr]

    def ids(self, caption: str) -> list[int]:
        """Tokens of a caption, cleaned and cut where it is too long, with the end token behind them.

        Raises:
            PromptError: it has half a character or a special token in it, or the encoder has no such token.
        """
        words = cast(int, self.encoder.config.vocab_size)  # type: ignore[union-attr]
        encode(self.tokenizer, caption, caption, self.special, words)
        cleaned = clean_caption(caption)
        ids = encode(self.tokenizer, cleaned, cleaned, self.special, words)
        return [*ids[: self.longest - 1], self.end]

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> list[Tensor]:
        """Hidden states of the tokens of each caption, `[tokens, width]`, the end token included."""
        rows = [self.ids(caption) for caption in captions]
        length, device = max(map(len, rows)), next(self.encoder.parameters()).device
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return [states[: len(row)] for states, row in zip(hidden, rows, strict=True)]


def encoder_for(
    width: int, source: str | Path, longest: int, dtype: torch.dtype, device: torch.device, token: str | None
) -> CaptionEncoder:
    """An encoder whose states have the width that a model wants; otherwise as `from_pretrained`.

    Raises:
        CheckpointError: it has another width, too.
    """
    encoder = CaptionEncoder.from_pretrained(source, longest, dtype=dtype, device=device, token=token)
    if encoder.width != width:
        raise CheckpointError(
            f"the states of the text encoder {source} have width {encoder.width}, the model wants {width}"
        )
    return encoder


def _check_shape(described: Section) -> None:
    """Refuse what would take for ever to build, and keys that the T5 of transformers knows nothing of."""
    described.ignore("model_type", "feed_forward_proj", "is_gated_act", "dense_act_fn", "num_decoder_layers")
    described.ignore("tie_word_embeddings", "scale_decoder_outputs", "n_positions", "relative_attention_*")
    described.whole("num_layers", 6, MOST_LAYERS)
    described.whole("vocab_size", 32128, MOST_TOKENS)
    for key, default in {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_heads": 8}.items():
        described.whole(key, default, MOST_WIDTH)
    described.number("layer_norm_epsilon", 1e-6, 1.0)
    described.whole("relative_attention_num_buckets", 32, MOST_WIDTH)
    described.whole("relative_attention_max_distance", 128, MOST_TOKENS)
    described.close()


def _build(
    encoder_class: type[AnyEncoder], config: dict[str, Any], tokenizer: Tokenizer, longest: int
) -> AnyEncoder:
    from transformers import T5Config, T5EncoderModel

    try:
        encoder = T5EncoderModel(T5Config.from_dict(config))
    except Exception as error:  # the library raises many kinds
        raise CheckpointError(
            f"the configuration of the text encoder describes no T5: {' '.join(str(error).split())}"
        ) from None
    return encoder_class(cast(nn.Module, encoder), tokenizer, longest)


def _parts(encoder: CaptionEncoder, files: Sequence[Path]) -> Iterator[Part]:
    """Every tensor of the encoder; the embedding may go by two names, under which it is the same."""
    inner = cast(Any, encoder.encoder)
    inner.encoder.embed_tokens = inner.shared
    slots = {
        name: WeightSlot(weight)
        for name, weight in inner.named_parameters(remove_duplicate=False)
        if name != TWIN
    }
    names = set().union(*map(tensor_names, files))
    twin = torch.empty_like(inner.shared.weight)
    if TWIN in names and SHARED in names:
        slots[TWIN] = WeightSlot(twin)
    elif TWIN in names:
        slots[TWIN] = slots.pop(SHARED)
    yield Part(slots, files, UNUSED)
    if TWIN in names and SHARED in names and not torch.equal(twin, inner.shared.weight):
        raise CheckpointError(
            f"{files[0].parent} has two tensors, {SHARED} and {TWIN}, that are one in a T5: they differ"
        )
