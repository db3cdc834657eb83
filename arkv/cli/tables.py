"""Tables: fitted to a terminal, and as wide as they are where they are piped."""

from __future__ import annotations

import io
import sys
from collections.abc import Collection, Iterable, Sequence

WIDEST = 100_000


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]], right: Collection[int] = ()) -> None:
    """Print columns two spaces apart.

    Args:
        header: of the columns.
        rows: cells of any kind.
        right: columns that are numbers and end flush.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    lines = [[Text(str(cell)) for cell in row] for row in rows]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", collapse_padding=True)
    for index, title in enumerate(header):
        table.add_column(Text(title), justify="right" if index in right else "left", overflow="fold")
    for line in lines:
        table.add_row(*line)
    if sys.stdout.isatty():
        Console(file=sys.stdout, highlight=False).print(table)
        return
    # A reader of a pipe wants a row a line, however long.
    console = Console(file=io.StringIO(), width=WIDEST, highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))
