"""What mkdocs asks while it builds the site: the version at the foot of a page, the drawing of the house."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # a hook is loaded by its path, without its neighbours

from draw_house import draw

HOUSE = "{{ house }}"
"""Where a page wants the drawing. It is made anew for every build, from the table that `make lint` holds."""


def on_config(config: Any) -> Any:
    """Name the version that the pages are about."""
    config.copyright = f"arkv {version('arkv')}"
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the drawing into the page."""
    return markdown.replace(HOUSE, draw()) if HOUSE in markdown else markdown
