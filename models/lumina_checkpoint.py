"""Lumina-mGPT's checkpoints: which models there are, their tokens, and the files that they come in.

The three models differ in nothing but their weights, so no file says which of them it belongs to. The name of
a folder says what somebody thought of it, and is not looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from arkv.errors import CheckpointError
from arkv.models.config import MOST_TOKENS, Section, check_attention, rope_theta
from arkv.models.pretrained import CONFIG_FILE, read_tokenizer
from arkv.models.sizes import Size
from arkv.models.transformer import TransformerConfig
from arkv.models.vq import CHAMELEON_VQ, VQConfig
from arkv.weights.files import is_file, place, read_config

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ROPE_THETA = 10_000.0

CELL = 32
"""Pixels along the side of a cell, the unit of the size tokens: two codes each way."""

MAX_RATIO = 4
"""Longest side of a picture over its shortest."""

SEPARATOR = "<reserved08706>"

VQGAN_FILE = "vqgan.ckpt"
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")

TOKENIZER_REPOSITORY = "Alpha-VLLM/Lumina-mGPT-7B-768"
"""The only one of the published models with a tokenizer; it serves them all."""

CHAMELEON_7B = TransformerConfig(
    layers=32, width=4096, heads=32, kv_heads=32, head_dim=128, hidden=11008, norm_eps=1e-5, qk_norm="layer"
)

UNUSED = (
    "model.vqmodel.*",
    "model.layers.*.rotary_emb.inv_freq",
    "model.layers.*.self_attn.rotary_emb.inv_freq",
)
"""Tensors that no picture needs, of a checkpoint that was saved again with transformers: an encoder that was
never trained, and frequencies that follow from the configuration."""


def code_name(code: int) -> str:
    """The name of a picture code in the vocabulary: its decimal digits as letters."""
    return f"IMGIMG{str(code).translate(str.maketrans('0123456789', 'ABCDEFGHIJ'))}Z"


def size_name(cells: int) -> str:
    """The name in the vocabulary of a side of so many cells."""
    return f"<reserved{8800 + cells:05d}>"


@dataclass(frozen=True)
class Tokens:
    """Ids of the tokens that give a sequence its form; the defaults are the published ones.

    Attributes:
        begin: begins every sequence.
        first_code: the picture code 0; the others follow in order.
        image_start: begins a picture.
        separator: ends what the user says.
        line_end: ends a line of picture codes.
        first_size: a side of no cells; longer sides follow in order.
    """

    begin: int = 0
    first_code: int = 4
    image_start: int = 8197
    separator: int = 8710
    line_end: int = 8803
    first_size: int = 8804

    @classmethod
    def from_names(cls, ids: Mapping[str, int], codes: int, longest: int) -> Tokens:
        """Look the tokens up by their names.

        Args:
            ids: name of every token to its id (the `vocabulary_map` of a published configuration).
            codes: how many picture codes there have to be.
            longest: cells of the longest side that there has to be a token for.

        Raises:
            CheckpointError: a token is missing, or codes or sizes are not in order.
        """
        names = {
            "begin": "<s>",
            "first_code": code_name(0),
            "image_start": "<racm3:break>",
            "separator": SEPARATOR,
            "line_end": "<reserved08799>",
            "first_size": size_name(0),
        }
        runs = [
            ("first_code", [code_name(code) for code in range(codes)]),
            ("first_size", [size_name(cells) for cells in range(longest + 1)]),
        ]
        wanted = [*names.values(), *itertools.chain.from_iterable(run for _, run in runs)]
        if absent := [name for name in wanted if name not in ids]:
            raise CheckpointError(
                f"the vocabulary_map of the configuration has no {absent[0]}: it is not Lumina-mGPT's"
            )
        tokens = cls(**{field: ids[name] for field, name in names.items()})
        for field, run in runs:
            for i, name in enumerate(run):
                if ids[name] != getattr(tokens, field) + i:
                    raise CheckpointError(
                        f"the vocabulary_map of the configuration gives {name} the id {ids[name]}: expected "
                        f"{getattr(tokens, field) + i}, {i} after {run[0]}"
                    )
        return tokens


@dataclass(frozen=True)
class ChameleonVariant:
    """A model on the architecture of Chameleon, of this family or of its successor.

    Attributes:
        name: what the registry calls it.
        target: side of the square picture it was trained for, in pixels; the other sizes have about as many.
        repository: where its weights are published.
        transformer: shape of the transformer.
        vocabulary: tokens of text and picture together.
        vq: shape of the picture decoder.
        rope_theta: base of the rotary frequencies.
    """

    name: str
    target: int
    repository: str
    transformer: TransformerConfig = CHAMELEON_7B
    vocabulary: int = 65536
    vq: VQConfig = CHAMELEON_VQ
    rope_theta: float = ROPE_THETA

    @property
    def sizes(self) -> list[Size]:
        """Width and height in pixels of every picture that the model was trained for, the widest first."""
        return crop_sizes(self.target)


@dataclass(frozen=True)
class LuminaVariant(ChameleonVariant):
    """One of the models of the family.

    Attributes:
        tokens: the ids that matter.
    """

    tokens: Tokens = Tokens()


def crop_sizes(target: int) -> list[Size]:
    """Width and height in pixels of every picture with about as many as the square, the widest first.

    As many cells as fit into the area of the square, for every width and the next: the list of
    Lumina-mGPT's `generate_crop_size_list`.

    Args:
        target: side of the square, in pixels.
    """
    cells = (target // CELL) ** 2
    return [
        (width * CELL, height * CELL)
        for width in range(cells, 0, -1)
        for height in range(cells // width, max(1, cells // (width + 1)) - 1, -1)
        if max(width, height) <= MAX_RATIO * min(width, height)
    ]


LUMINA_7B_512 = LuminaVariant("lumina-mgpt-7b-512", 512, "Alpha-VLLM/Lumina-mGPT-7B-512")
LUMINA_7B_768 = LuminaVariant("lumina-mgpt-7b-768", 768, "Alpha-VLLM/Lumina-mGPT-7B-768")
LUMINA_7B_1024 = LuminaVariant("lumina-mgpt-7b-1024", 1024, "Alpha-VLLM/Lumina-mGPT-7B-1024")

VARIANTS = (LUMINA_7B_512, LUMINA_7B_768, LUMINA_7B_1024)


VERSION_2 = 2**17
"""Tokens of a vocabulary; that of Lumina-mGPT 2.0 has more, and Chameleon's half as many."""


def chameleon_version(folder: Path) -> int:
    """Which Lumina-mGPT a folder has in it, 1 or 2; 0 where there is no architecture of Chameleon.

    Raises:
        CheckpointError: it is Chameleon as Meta published it.
    """
    if is_file(folder / CONFIG_FILE):
        config = read_config(folder / CONFIG_FILE)
        if config.get("model_type") != "chameleon":
            return 0
        words = config.get("vocab_size")
        return 2 if type(words) is int and words > VERSION_2 else 1
    if is_file(folder / "tokenizer" / VQGAN_FILE):
        raise CheckpointError(
            f"{folder} is Meta's Chameleon, which does not draw: give the weights of Lumina-mGPT as "
            "source, and this folder as vqgan, for its picture decoder"
        )
    return 0


def read_variant(folder: Path, variant: LuminaVariant) -> LuminaVariant:
    """A variant with the tokens and the vocabulary that the configuration in a folder tells of.

    Raises:
        CheckpointError: it is the configuration of another model.
    """
    words, theta, ids = chameleon_shape(folder, variant.transformer, variant.vocabulary)
    path = folder / CONFIG_FILE
    if words > VERSION_2:
        raise CheckpointError(f"{folder} has a vocabulary of {words} tokens: it is of Lumina-mGPT 2.0")
    longest = max(itertools.chain.from_iterable(variant.sizes)) // CELL
    known = {str(name): i for name, i in ids.items() if type(i) is int} if isinstance(ids, dict) else {}
    tokens = Tokens.from_names(known, variant.vq.codes, longest)
    if (
        last := max(
            *vars(tokens).values(), tokens.first_code + variant.vq.codes - 1, tokens.first_size + longest
        )
    ) >= words:
        raise CheckpointError(f"{path} has a vocabulary of {words} tokens, and a token of the number {last}")
    return replace(variant, tokens=tokens, vocabulary=words, rope_theta=theta)


def chameleon_shape(folder: Path, shape: TransformerConfig, vocabulary: int) -> tuple[int, float, object]:
    """What the configuration of a Chameleon says that is not known before.

    Args:
        folder: with the configuration.
        shape: of the transformer, which it has to have.
        vocabulary: tokens, where it does not say.

    Returns:
        Tokens of the vocabulary, the base of the rotary frequencies, and the `vocabulary_map` as it is.

    Raises:
        CheckpointError: it is the configuration of another model.
    """
    if is_file(folder):
        raise CheckpointError(f"{folder} is a file: give the folder with {CONFIG_FILE} that it is in")
    path = folder / CONFIG_FILE
    described = Section(read_config(path), str(path))
    wanted = {
        "model_type": "chameleon",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.width,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.hidden,
        "rms_norm_eps": shape.norm_eps,
        "swin_norm": False,
        "tie_word_embeddings": False,
    }
    for name, value in wanted.items():
        described.expect(name, value)
    described.expect("hidden_act", "silu", "swish")
    # Of transformers' encoder of pictures, and of its writing of text.
    described.ignore("vq_config", "mask_image_logits")
    words = described.whole("vocab_size", vocabulary, MOST_TOKENS)
    theta = rope_theta(described, ROPE_THETA)
    check_attention(described, shape.layers, shape.head_dim)
    ids = described.get("vocabulary_map")
    described.close()
    return words, theta, ids


def norm_rows(files: Sequence[Path], heads: int) -> int:
    """Rows of the norms of queries and keys: one as published, one a head as transformers saves them."""
    name = "model.layers.0.self_attn.q_norm.weight"
    for path in files:
        # What is wrong with a file is said when its weights are read.
        with suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
            if name in file.keys() and file.get_slice(name).get_shape()[0] == heads:  # noqa: SIM118
                return heads
    return 1


def find_vqgan(source: str | Path) -> Path:
    """The file of the picture decoder's weights, at a path or in the folder at a path.

    Raises:
        CheckpointError: there is none.
    """
    path = place(source)
    for file in (path, path / VQGAN_FILE, path / "tokenizer" / VQGAN_FILE):
        if is_file(file):
            return file
    raise CheckpointError(
        f"there is no {VQGAN_FILE} in {path}: Lumina-mGPT is published without its picture decoder; take "
        f"tokenizer/{VQGAN_FILE} of Meta's Chameleon, and say where it is with vqgan=..."
    )


def tokenizer_for(path: Path, tokens: Tokens) -> Tokenizer:
    """The tokenizer in a file or folder, which has to be this family's.

    Raises:
        CheckpointError: there is none, it is damaged or another model's.
    """
    if not is_file(path) and not is_file(path / "tokenizer.json"):
        raise CheckpointError(
            f"there is no tokenizer {path / 'tokenizer.json'}: of the published models only the one for 768 "
            "pixels has it, and it serves all; say where it is with tokenizer=..."
        )
    tokenizer = read_tokenizer(path)
    if tokenizer.token_to_id(SEPARATOR) != tokens.separator:
        raise CheckpointError(f"{path} gives {SEPARATOR} another id than the model: it is another model's")
    return tokenizer
