"""What is drawn of a list of prompts, and how its files are laid out."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Le

from arkv.options import Plain, Positive, option, options

LayoutName = Literal["geneval", "dpg", "flat", "npz", "webdataset", "parquet"]
"""Those of `arkv.pictures.layouts`, in words."""


@options
class ListOptions:
    """What is drawn of a list of prompts."""

    SECTION = "Prompts of a file"

    samples: Positive | None = option(
        default=None,
        metavar="N",
        help="pictures of every prompt (default: 4 for GenEval and DPG-Bench, else 1)",
    )
    layout: LayoutName | None = option(
        default=None,
        help="how the pictures are laid out, for which evaluator (default: by the file, else flat)",
    )
    npz_side: Annotated[int, Ge(8), Le(4096), Plain] | None = option(
        default=None,
        metavar="PIXELS",
        help="side that the pictures in the archive of the layout npz are resized to (default: as drawn)",
    )
