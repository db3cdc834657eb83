"""Golden vectors of the families whose text and pictures share a vocabulary, and how far a model is off."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from tiny import build
from torch import Tensor

from arkv import Decoder
from arkv.model import Condition
from arkv.models import transformer as transformer_file
from arkv.models.one_vocabulary import OneVocabulary
from arkv.models.transformer import Block
from arkv.registry import names

DATA = Path(__file__).parents[1] / "data"
POLICIES = [entry.name for entry in names("policy") if entry.name != "ssd"]
"""All but SSD, which needs to be told of the heads."""


@dataclass
class Golden:
    """One case: what went in, what came out of the reference, and what it was made with."""

    case: str

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(DATA / f"{self.case}.safetensors")

    @cached_property
    def facts(self) -> dict[str, Any]:
        return cast("dict[str, Any]", json.loads((DATA / f"{self.case}.json").read_text()))

    @property
    def weights(self) -> dict[str, Tensor]:
        """By the names of a published checkpoint."""
        return {n.removeprefix("weights."): x for n, x in self.tensors.items() if n.startswith("weights.")}

    @property
    def ids(self) -> dict[str, int]:
        return cast("dict[str, int]", self.facts["config"]["special_ids"])

    @property
    def codes(self) -> int:
        return int(self.facts["config"]["num_image_codes"])

    @property
    def prompts(self) -> list[list[int]]:
        """Ids of the text of each prompt."""
        rows, mask = self.tensors["inputs.text_ids"], self.tensors["inputs.text_mask"].bool()
        return [row[here].tolist() for row, here in zip(rows, mask, strict=True)]

    @property
    def rows(self) -> list[list[int]]:
        """The whole conditional rows."""
        rows, mask = self.tensors["inputs.cond_ids"], self.tensors["inputs.cond_mask"].bool()
        return [row[here].tolist() for row, here in zip(rows, mask, strict=True)]

    def visual(self, ids: Tensor, model: OneVocabulary) -> Tensor:
        """Ids of the common vocabulary to visual tokens, of which every line's last is its end."""
        grid = model.spec.grid
        ids = ids[:, : grid.tokens]
        is_end = grid.column(torch.arange(grid.tokens)) == grid.columns
        return torch.where(is_end, self.codes, ids - self.ids["code_0"])

    def deviations(self, model: OneVocabulary, prompts: list[list[int]] | None = None) -> dict[str, float]:
        """By kind of row, how far logits are from the reference's where a token is allowed."""
        grid, forced = model.spec.grid, self.visual(self.tensors["inputs.forced_tokens"], model)
        scale = self.facts["settings"]["cfg_scale"]
        found = Decoder(model, build("full", 0)).teacher_force(prompts or self.prompts, forced, scale)
        count = len(forced)
        # The last one ends the picture; what it is called changes nothing.
        steps = grid.tokens - 1
        columns = [*range(self.ids["code_0"], self.ids["code_0"] + self.codes), self.ids["eol"]]
        allowed = self.tensors["expected.allowed_mask"][:steps, columns]
        result = {}
        for kind, logits in {
            "cond": found.raw[:count],
            "uncond": found.raw[count:],
            "guided": found.guided,
        }.items():
            assert torch.equal(logits[:, :steps].isfinite(), allowed.expand(count, -1, -1))
            expected = self.tensors[f"expected.logits_{kind}"][:, :steps, columns]
            error = (logits[:, :steps] - expected)[:, allowed].abs().max()
            result[f"expected.logits_{kind}"] = error.item()
        return result

    def check_logits(self, model: OneVocabulary) -> None:
        for name, error in self.deviations(model).items():
            assert error <= self.facts["tolerance"]["values"][name], name

    def check_wrong(self, model: OneVocabulary, kind: str) -> None:
        """Whether the vectors tell a wrong model apart."""
        name = f"expected.logits_{kind}"
        assert self.deviations(model)[name] > 100 * self.facts["tolerance"]["values"][name]

    def check_greedy(self, model: OneVocabulary) -> Tensor:
        """The greedy tokens, which have to be the reference's."""
        grid, scale = model.spec.grid, self.facts["settings"]["cfg_scale"]
        result = Decoder(model, build("full", 0)).generate(self.prompts, guidance=scale, temperature=0)
        assert torch.equal(result.tokens, self.visual(self.tensors["expected.greedy_tokens"], model))
        codes = result.tokens.unflatten(1, (grid.rows, grid.line))[:, :, :-1]
        assert torch.equal(codes, self.tensors["expected.greedy_codes"])
        return result.tokens

    def check_batches(self, model: OneVocabulary) -> None:
        """Whether a prompt gives the same alone and in a batch."""
        grid, decoder, prompts = model.spec.grid, Decoder(model, build("full", 0)), self.prompts
        forced = self.visual(self.tensors["inputs.forced_tokens"], model)
        together = decoder.teacher_force(prompts, forced, 3.0)
        drawn = decoder.generate(prompts, seeds=[5, 6])
        for i, prompt in enumerate(prompts):
            alone = decoder.teacher_force([prompt], forced[[i]], 3.0)
            torch.testing.assert_close(alone.raw, together.raw[[i, 2 + i]], atol=1e-4, rtol=1e-4)
            assert torch.equal(decoder.generate([prompt], seeds=[5 + i]).tokens, drawn.tokens[[i]])
        is_end = grid.column(torch.arange(grid.tokens)) == grid.columns
        assert ((drawn.tokens == self.codes) == is_end).all()

    def check_policy(self, model: OneVocabulary, policy: str) -> None:
        """Whether a policy with room for all gives the tokens of the full cache."""
        full, roomy = build("full", 0), build(policy, model.spec.grid.tokens)
        drawn = [Decoder(model, each).generate(self.prompts).tokens for each in (full, roomy)]
        assert torch.equal(*drawn)


# Wrong models.


def form(**changes: Callable[[Any], Any]) -> Callable[[OneVocabulary], None]:
    """A model with other rows: fields of its form, each made of what it is."""

    def change(model: OneVocabulary) -> None:
        made = {name: tuple(make(getattr(model.form, name))) for name, make in changes.items()}
        model.form = replace(model.form, **made)

    return change


def tiled(model: OneVocabulary) -> None:
    """Key heads in the order 0, 1, 0, 1 in place of 0, 0, 1, 1."""
    for block in cast("list[Block]", model.blocks):
        inner, order = block.heads * block.head_dim, [0, 2, 1, 3]
        query, output = block.qkv.weight.data[:inner], block.output.weight.data
        query.copy_(query.unflatten(0, (4, -1))[order].flatten(0, 1).clone())
        output.copy_(output.unflatten(1, (4, -1))[:, order].flatten(1).clone())


def other_epsilon(model: OneVocabulary, inside: str = "") -> None:
    """RMS norms, of all or of those with this in their names, with a tenth or ten times their epsilon."""
    for name, module in model.named_modules():
        if isinstance(module, transformer_file.RMSNorm) and inside in name:
            module.eps = 1.1e-5 - module.eps


def padding_seen(model: OneVocabulary) -> None:
    condition = model.condition

    def unmasked(prompts: list[Any], guided: bool) -> Condition:
        made = condition(prompts, guided)
        return replace(made, mask=torch.ones_like(made.mask))

    model.condition = unmasked  # type: ignore[method-assign, assignment]


def norm_last(model: OneVocabulary) -> None:
    """Queries and keys normalised after they are rotated."""
    for block in cast("list[Block]", model.blocks):
        norms, project = (block.query_norm, block.key_norm), block.project
        block.query_norm = block.key_norm = None

        def late(
            hidden: Tensor, rotation: Tensor, project: Any = project, norms: Any = norms
        ) -> tuple[Tensor, Tensor, Tensor]:
            query, key, value = project(hidden, rotation)
            return norms[0](query), norms[1](key), value

        block.project = late  # type: ignore[method-assign]


def no_norm(model: OneVocabulary) -> None:
    """Queries and keys as they are."""
    for block in cast("list[Block]", model.blocks):
        block.query_norm = block.key_norm = None


def other_base(model: OneVocabulary) -> None:
    model.rope_theta = 1e4 if model.rope_theta == 1e6 else 1e6


def transposed(header: tuple[int, ...]) -> tuple[int, ...]:
    """A header of an Emu with its one-digit height and width exchanged."""
    return (*header[:-4], header[-2], header[-3], header[-4], header[-1])
