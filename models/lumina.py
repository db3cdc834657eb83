"""Lumina-mGPT 7B (arXiv 2408.02657): text to pictures of many shapes, on the architecture of Chameleon.

One sequence of text and picture tokens from one vocabulary. A picture begins with a token that says so, then
the height and the width in cells of 32 x 32 pixels, then its codes, two lines of them a cell; every line ends
in a token of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy
import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from typing_extensions import Self

from arkv.errors import ArkvError, CheckpointError, PromptError
from arkv.grid import Grid
from arkv.model import Block, Condition, Model, ModelSpec
from arkv.models.padding import left_padded
from arkv.models.transformer import Transformer, TransformerConfig
from arkv.models.vq import CHAMELEON_VQ, VQConfig, VQDecoder
from arkv.models.vq import UNUSED as VQ_UNUSED
from arkv.weights.checkpoint import WeightSlot, empty, load_weights_, read_config, weight_files
from arkv.weights.hub import fetch, is_hub_id
from arkv.weights.packing import Linear

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ROPE_THETA = 10_000.0

CELL = 32
"""Pixels along the side of a cell, the unit of the size tokens: two codes each way."""

MAX_RATIO = 4
"""Longest side of a picture over its shortest."""

MAX_TEXT = 512
"""Tokens of the longest text that is taken, the sentence around the prompt counted."""

GUIDANCE, TOP_K = 4.0, 2000

PROMPT = "Generate an image of {width}x{height} according to the following prompt:\n{prompt}"

SEPARATOR = "<reserved08706>"

CONFIG_FILE, TOKENIZER_FILE, VQGAN_FILE = "config.json", "tokenizer.json", "vqgan.ckpt"
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")

TOKENIZER_REPOSITORY = "Alpha-VLLM/Lumina-mGPT-7B-768"
"""The only one of the published models with a tokenizer; it serves them all."""

CHAMELEON_7B = TransformerConfig(
    layers=32, width=4096, heads=32, kv_heads=32, head_dim=128, hidden=11008, norm_eps=1e-5, qk_norm=True
)

UNUSED = ("model.vqmodel.*", "model.layers.*.rotary_emb.inv_freq")
"""Tensors that no picture needs, of a checkpoint that was saved again with transformers: an encoder that was
never trained, and frequencies that follow from the configuration."""

THINGS = ("a red bus", "a brown bear", "a blue bird", "an old clock", "a glass vase", "a wooden bench")
"""What example prompts are made of."""


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
class LuminaVariant:
    """One of the models of the family.

    Attributes:
        name: what the registry calls it.
        target: side of the square picture it was trained for, in pixels; the other sizes have about as many.
        repository: where its weights are published.
        transformer: shape of the transformer.
        vocabulary: tokens of text and picture together.
        tokens: the ids that matter.
        vq: shape of the picture decoder.
    """

    name: str
    target: int
    repository: str
    transformer: TransformerConfig = CHAMELEON_7B
    vocabulary: int = 65536
    tokens: Tokens = Tokens()
    vq: VQConfig = CHAMELEON_VQ

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height in pixels of every picture that the model was trained for, the widest first.

        As many cells as fit into the area of the square, for every width and the next: the list of
        Lumina-mGPT's `generate_crop_size_list`.
        """
        cells = (self.target // CELL) ** 2
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


class LuminaMGPT(Model):
    """Lumina-mGPT: pictures of any published size from a text.

    The prompt is put into the sentence that the model was trained on, which names the size. What the model
    would then write itself, the tokens that begin a picture and say its size, is given to it as part of the
    condition, so that no sample can get it wrong. The unconditional row is these three tokens alone. The line
    end is the only token allowed where a line ends, and allowed nowhere else; nothing is decoded after the
    last one.

    Defaults as in the README of Lumina-mGPT's code: guidance 4.0 on all visual tokens, the 2,000 likeliest
    codes, temperature 1.

    A prompt is a text; or a list of ids of text tokens, which is taken as the whole text instead of the
    sentence. Only the latter is possible without a tokenizer.

    Args:
        variant: which model.
        size: width and height of the pictures in pixels, one of `variant.sizes`; None for the square.
        tokenizer: of the published checkpoint.

    Raises:
        ArkvError: the model was not trained for this size.
    """

    variant: ClassVar[LuminaVariant | None] = None
    """The one model that a subclass is; None where size or name of the folder say which."""

    def __init__(
        self, variant: LuminaVariant, size: tuple[int, int] | None = None, tokenizer: Tokenizer | None = None
    ) -> None:
        super().__init__()
        config, codes = variant.transformer, variant.vq.codes
        self.size = _check_size(variant, size)
        width, height = (side // CELL for side in self.size)
        self.tokens, self.codes, self.tokenizer = variant.tokens, codes, tokenizer
        self.spec = ModelSpec(
            name=variant.name,
            layers=config.layers,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            vocabulary=codes + 1,
            grid=Grid(2 * height, 2 * width, newline=True),
            max_condition=MAX_TEXT + 5,
            guidance=GUIDANCE,
            width=config.width,
            hidden=config.hidden,
            top_k=min(TOP_K, codes),
        )
        self.image = [self.tokens.image_start, *(self.tokens.first_size + side for side in (height, width))]
        self.embedding = nn.Embedding(variant.vocabulary, config.width)
        self.transformer = Transformer(config)
        # Of the published head, only the rows that a picture can use.
        self.output = Linear(config.width, codes + 1, bias=False)
        self.vq = VQDecoder(variant.vq)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        size: tuple[int, int] | None = None,
        vqgan: Path | str | None = None,
        tokenizer: Path | str | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> Self:
        """Load a published checkpoint, or a finetuned one in the same layout.

        The three models differ in nothing but their weights, so which one it is follows from the class, or
        from `size`, or from the name of the folder where that has "7B-512", "7B-768" or "7B-1024" in it.

        Args:
            source: folder with `config.json` and the safetensors, or name of a repository on the hub; None
                for the repository of this class's variant.
            dtype: of the weights but for the picture decoder's, which are float32.
            device: where to put them. For the meta device no file is read.
            size: width and height of the pictures in pixels; None for the square.
            vqgan: `vqgan.ckpt` of Meta's Chameleon; None for the one in the folder, or in `tokenizer` there.
            tokenizer: `tokenizer.json` or a folder with it, or a hub id; None for the folder of the weights,
                or for the published one if they come from the hub.
            revision: of the repository.
            token: for the hub.

        Raises:
            CheckpointError: a file is missing, damaged, or belongs to another model.
            ArkvError: the model was not trained for this size.
        """
        device = torch.device(device)
        variant = cls.variant or _variant_of(source, size)
        if device.type == "meta":
            return empty(partial(cls, variant, size, None), dtype, device)
        source = variant.repository if source is None else source
        # What may be missing is looked for before the large files are downloaded.
        folder = fetch(source, (CONFIG_FILE, TOKENIZER_FILE, VQGAN_FILE), revision=revision, token=token)
        tokens = _read_tokens(folder / CONFIG_FILE, variant)
        if tokenizer is None:
            is_bare = is_hub_id(source) and not (folder / TOKENIZER_FILE).is_file()
            tokenizer = TOKENIZER_REPOSITORY if is_bare else folder
        words = _read_tokenizer(fetch(tokenizer, (TOKENIZER_FILE,), token=token), tokens)
        decoder = _find_vqgan(folder if vqgan is None else Path(vqgan))
        model = empty(partial(cls, replace(variant, tokens=tokens), size, words), dtype, device)
        files = weight_files(fetch(source, WEIGHT_FILES, revision=revision, token=token))
        load_weights_(model.weight_slots(_norm_rows(files, model.spec.heads)), files, UNUSED)
        load_weights_(model.vq.weight_slots("taming"), [decoder], VQ_UNUSED)
        return model

    @classmethod
    def recognises(cls, source: str | Path) -> bool:
        """Whether a folder has a checkpoint of this model in it, or a repository on the hub is its own.

        Only the name of a folder tells the models apart; one that does not may have any of them in it.
        """
        if cls.variant is not None and source == cls.variant.repository:
            return True
        named = _named(source)
        try:
            _read_tokens(Path(source) / CONFIG_FILE, cls.variant or VARIANTS[0])
        except CheckpointError:
            return False
        return cls.variant in (None, named) or named is None

    @property
    def blocks(self) -> Sequence[Block]:
        """The transformer blocks in order."""
        return cast("Sequence[Block]", self.transformer.blocks)

    def check_prompts(self, prompts: Sequence[str | Sequence[int]]) -> None:
        """Tokenise every prompt.

        Raises:
            PromptError: a prompt is too long, has tokens of a picture in it, or is a text where there is no
                tokenizer.
        """
        for prompt in prompts:
            self._text(prompt)

    def condition(self, prompts: Sequence[str | Sequence[int]], guided: bool) -> Condition:
        """Text, separator and picture header, left-padded; positions count from each row's first token.

        Raises:
            PromptError: as `check_prompts`.
        """
        rows = [
            [self.tokens.begin, *self._text(prompt), self.tokens.separator, *self.image] for prompt in prompts
        ]
        if guided:
            rows += [self.image] * len(prompts)
        spec = self.spec
        return left_padded(
            rows, self.tokens.begin, self.embedding, spec.grid.tokens, spec.head_dim, ROPE_THETA
        )

    def _text(self, prompt: str | Sequence[int]) -> list[int]:
        """Ids of the text tokens of a prompt."""
        shown = repr(prompt) if len(repr(prompt)) <= 60 else f"{prompt!r:.60}..."
        if not isinstance(prompt, str):
            words = self.embedding.num_embeddings
            if not isinstance(prompt, Sequence) or any(
                type(i) is not int or not 0 <= i < words for i in prompt
            ):
                raise PromptError(
                    f"the prompt {shown} is neither a text nor a list of token ids from 0 to {words - 1}"
                )
            ids = list(cast("Sequence[int]", prompt))
        elif self.tokenizer is None:
            raise PromptError(
                f"{self.spec.name} has no tokenizer: load it from a checkpoint that has one, or give prompts "
                "as lists of token ids"
            )
        else:
            text = PROMPT.format(width=self.size[0], height=self.size[1], prompt=prompt)
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) > MAX_TEXT:
            raise PromptError(f"the prompt {shown} has {len(ids)} tokens: expected at most {MAX_TEXT}")
        if bad := [i for i in ids if self._is_reserved(i)]:
            raise PromptError(f"the prompt {shown} has a token (id {bad[0]}) that is not text: leave it out")
        return ids

    def _is_reserved(self, token: int) -> bool:
        """Whether a token gives a sequence its form, or is part of a picture."""
        t = self.tokens
        return token in (t.begin, t.image_start, t.separator, t.line_end) or (
            t.first_code <= token < t.first_code + self.codes
        )

    def embed(self, tokens: Tensor, position: Tensor) -> Tensor:
        """The vectors that codes and line end have in the common vocabulary."""
        ids = torch.where(tokens == self.codes, self.tokens.line_end, tokens + self.tokens.first_code)
        return self.embedding(ids)[:, None]

    def head(self, hidden: Tensor, position: Tensor) -> Tensor:
        """Final norm and one projection; the line end where a line ends, codes elsewhere."""
        logits = self.output(self.transformer.norm(hidden))[:, 0].float()
        grid = self.spec.grid
        is_end = torch.arange(self.codes + 1, device=logits.device) == self.codes
        return logits.masked_fill(is_end != (grid.column(position) == grid.columns), -torch.inf)

    def pixels(self, tokens: Tensor) -> Tensor:
        """Draw the codes with Chameleon's decoder; colours are rounded down as in its code."""
        grid = self.spec.grid
        codes = rearrange(tokens, "n (rows line) -> n rows line", rows=grid.rows)[:, :, : grid.columns]
        return self.vq.pixels(codes, "down")

    def example_prompts(self, count: int, seed: int) -> list[Any]:
        """Short sentences; without a tokenizer, as many ids of text tokens as such sentences have."""
        rng = numpy.random.default_rng(seed)
        if self.tokenizer is not None:
            sentences = [f"a photo of {a} and {b}" for a, b in itertools.permutations(THINGS, 2)]
            return [sentences[i] for i in rng.integers(len(sentences), size=count)]
        text = [i for i in range(self.embedding.num_embeddings) if not self._is_reserved(i)]
        return [[text[i] for i in rng.integers(len(text), size=24)] for _ in range(count)]

    def weight_slots(self, norm_rows: int = 1) -> dict[str, WeightSlot]:
        """Where the tensors of a published checkpoint go, all but those of the picture decoder.

        Args:
            norm_rows: rows of its query and key norms.
        """
        first, codes, end = self.tokens.first_code, self.codes, self.tokens.line_end
        head = WeightSlot(
            self.output.weight,
            lambda rows: torch.cat([rows[first : first + codes], rows[end : end + 1]]),
            tuple(self.embedding.weight.shape),
        )
        return {
            "model.embed_tokens.weight": WeightSlot(self.embedding.weight),
            "lm_head.weight": head,
            **self.transformer.weight_slots("model.", norm_rows),
        }


class LuminaMGPT512(LuminaMGPT):
    """Lumina-mGPT 7B for pictures of about 512 x 512 pixels."""

    variant = LUMINA_7B_512


class LuminaMGPT768(LuminaMGPT):
    """Lumina-mGPT 7B for pictures of about 768 x 768 pixels."""

    variant = LUMINA_7B_768


class LuminaMGPT1024(LuminaMGPT):
    """Lumina-mGPT 7B for pictures of about 1024 x 1024 pixels."""

    variant = LUMINA_7B_1024


def code_name(code: int) -> str:
    """The name of a picture code in the vocabulary: its decimal digits as letters."""
    return f"IMGIMG{str(code).translate(str.maketrans('0123456789', 'ABCDEFGHIJ'))}Z"


def size_name(cells: int) -> str:
    """The name in the vocabulary of a side of so many cells."""
    return f"<reserved{8800 + cells:05d}>"


def _check_size(variant: LuminaVariant, size: tuple[int, int] | None) -> tuple[int, int]:
    legal = variant.sizes
    if size is None:
        return variant.target, variant.target
    if not (isinstance(size, Sequence) and len(size) == 2 and all(type(side) is int for side in size)):
        raise ArkvError(f"the size is {size!r}: expected width and height in pixels, such as {legal[0]}")
    if tuple(size) not in legal:
        near = sorted(legal, key=lambda s: abs(s[0] - size[0]) + abs(s[1] - size[1]))
        raise ArkvError(
            f"the size is {size}: {variant.name} was trained for sizes (width, height) such as "
            f"{', '.join(map(str, near[:3]))}"
        )
    return size[0], size[1]


def _variant_of(source: str | Path | None, size: tuple[int, int] | None) -> LuminaVariant:
    sized = (variant for variant in VARIANTS if size in variant.sizes)
    variant = _named(source) or next(sized, None)
    if variant is None:
        raise CheckpointError(
            "nothing says which of the Lumina-mGPT models this is, and their configurations are alike: "
            f"give a size that it was trained for, such as size={(VARIANTS[0].target,) * 2}"
        )
    return variant


def _named(source: str | Path | None) -> LuminaVariant | None:
    """The model that the name of a folder or repository tells."""
    name = str(source).lower()
    return next((variant for variant in VARIANTS if f"7b-{variant.target}" in name), None)


def _read_tokens(path: Path, variant: LuminaVariant) -> Tokens:
    """The tokens by the names in a configuration, which has to be that of the model."""
    config, shape = read_config(path), variant.transformer
    wanted = {
        "model_type": "chameleon",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.width,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.hidden,
        "vocab_size": variant.vocabulary,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": ROPE_THETA,
        "swin_norm": False,
    }
    for name, value in wanted.items():
        if (found := config.get(name, value)) != value:
            raise CheckpointError(f"{path} says {name} is {found!r}: {variant.name} has {value!r}")
    ids = config.get("vocabulary_map")
    longest = max(itertools.chain.from_iterable(variant.sizes)) // CELL
    return Tokens.from_names(ids if isinstance(ids, dict) else {}, variant.vq.codes, longest)


def _norm_rows(files: Sequence[Path], heads: int) -> int:
    """Rows of the norms of queries and keys: one as published, one a head as transformers saves them."""
    name = "model.layers.0.self_attn.q_norm.weight"
    for path in files:
        # What is wrong with a file is said when its weights are read.
        with suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
            if name in file.keys() and file.get_slice(name).get_shape()[0] == heads:  # noqa: SIM118
                return heads
    return 1


def _find_vqgan(path: Path) -> Path:
    for place in (path, path / VQGAN_FILE, path / "tokenizer" / VQGAN_FILE):
        if place.is_file():
            return place
    raise CheckpointError(
        f"there is no {VQGAN_FILE} in {path}: Lumina-mGPT is published without its picture decoder; take "
        f"tokenizer/{VQGAN_FILE} of Meta's Chameleon, and say where it is with vqgan=..."
    )


def _read_tokenizer(path: Path, tokens: Tokens) -> Tokenizer:
    path = path / TOKENIZER_FILE if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(
            f"there is no tokenizer {path}: of the published models only the one for 768 pixels has it, and "
            "it serves all; say where it is with tokenizer=..."
        )
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more particular
        raise CheckpointError(
            f"{path} is damaged or not a tokenizer: {' '.join(str(error).split())}"
        ) from None
    if tokenizer.token_to_id(SEPARATOR) != tokens.separator:
        raise CheckpointError(f"{path} gives {SEPARATOR} another id than the model: it is another model's")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
