"""`arkv models`."""

from __future__ import annotations

import inspect
from typing import Any

from arkv.cli.parser import Command
from arkv.cli.policies import told
from arkv.cli.tables import print_table
from arkv.errors import CheckpointError
from arkv.options import Filled, option, options

HEADER = ("model", "origin", "layers", "heads", "grid", "N", "codes", "parameters", "about")


@options
class ModelsOptions:
    """Options of `arkv models`."""

    name: Filled | None = option(
        default=None, metavar="NAME", kind="positional", help="of one, to be shown in detail"
    )


def run(given: ModelsOptions, typed: str) -> None:
    """List them, or show one."""
    from arkv.registry import load_class, names

    entries = names("model")
    if given.name is not None:
        model_class = load_class("model", given.name)
        row = _row(next(entry for entry in entries if entry.name == given.name))
        for title, cell in zip(HEADER[:-1], row[:-1], strict=True):
            print(f"{title + ':':<12}{cell}")
        print(f"\n{inspect.cleandoc(model_class.__doc__ or '').strip()}\n")
        print(f"from_pretrained{inspect.signature(model_class.from_pretrained)}")
        return
    print_table(HEADER, map(_row, entries), right={2, 3, 4, 5, 6, 7})


def _row(entry: Any) -> tuple[Any, ...]:
    """A model's cells; what cannot be found out is a dash, with the reason."""
    from arkv.registry import load_class, load_model

    shape: tuple[Any, ...] = ("-",) * 6
    about = ""
    try:
        about = _summary(load_class("model", entry.name))
        model = load_model(entry.name, dtype="float32", device="meta")
        spec, grid = model.spec, model.spec.grid
        heads = f"{spec.heads}" if spec.heads == spec.kv_heads else f"{spec.heads} ({spec.kv_heads} KV)"
        parameters = f"{sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M"
        raster = f"{grid.rows} x {grid.line}"
        shape = (spec.layers, heads, raster, f"{grid.tokens:,}", f"{spec.vocabulary:,}", parameters)
    except CheckpointError as error:
        about = f"{about} (no weights: {error})"
    except Exception as error:
        # Somebody else's broken package must not hide the others.
        about = f"broken: {told(error)}"
    return (entry.name, entry.origin, *shape, about)


def _summary(documented: object) -> str:
    """First sentence of a docstring, without what stands in parentheses at its end."""
    text = " ".join((documented.__doc__ or "").split("\n\n")[0].split())
    return text.partition(" (")[0].rstrip(".")


COMMAND = Command(ModelsOptions, run, ("arkv models", "arkv models janus-pro-1b"))
