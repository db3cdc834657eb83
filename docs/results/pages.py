"""Print every table and plot of the results pages from the JSON lines beside them.

python docs/results           writes them, and says which rows are older than the code that they measure
python docs/results --check   writes nothing, and fails where a page is not what would be printed

A table stands between `<!-- printed: NAME -->` and `<!-- end of printed -->`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping

import tables
from claims import SAID, wrong_claims
from plots import plots
from stale import stale_rows
from tables import HERE

PRINTED = re.compile(r"(<!-- printed: (\S+) -->\n).*?(<!-- end of printed -->)", re.S)
PAGES: Mapping[str, Mapping[str, tuple[Callable[[str], str], str]]] = {
    "scenes.md": {
        "right": (tables.right_by_ratio, "scenes"),
        "lost": (tables.lost_by_ratio, "scenes"),
        "groups": (tables.groups_closely, "scenes"),
        "ssd": (tables.ssd_at_its_ratio, "ssd"),
    },
    "front.md": {"bytes": (tables.at_equal_bytes, "front"), "parts": (tables.parts_of_front, "front")},
    "linear.md": {"choices": (tables.choices_of_linear, "linear")},
    "speed.md": {
        "beside": (tables.beside_transformers, "speed-cpu"),
        "few": (tables.few_pictures, "few-cpu"),
        "one": (tables.one_picture, "one-picture"),
        "memory": (tables.at_equal_memory, "memory-cpu"),
        "growth": (tables.growth, "growth"),
        "grid": (tables.of_a_large_grid, "grid-64-cpu"),
        "unequal": (tables.unequal_heads, "ragged-cpu"),
    },
}
"""The tables of each page: what prints them, and the file of JSON lines."""


def pages() -> dict[str, str]:
    """Every page with its tables as the rows have them."""
    return {name: with_tables(name, (HERE / name).read_text(encoding="utf-8")) for name in PAGES}


def with_tables(name: str, text: str) -> str:
    """One page."""

    def printed(found: re.Match[str]) -> str:
        print_table, rows = PAGES[name][found[2]]
        return f"{found[1]}\n{print_table(rows)}\n{found[3]}"

    return PRINTED.sub(printed, text)


def main() -> int:
    """Write what has changed, or say it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    wanted = pages() | plots()
    files = {HERE / name: text for name, text in wanted.items()}
    other = [
        path for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    for path in other:
        if check:
            print(f"{path} is not what its rows print: run 'make results'", file=sys.stderr)
        else:
            path.write_text(files[path], encoding="utf-8")
            print(f"{path.relative_to(HERE.parents[1])} is written anew")
    wrong = [f"{page}: {told}" for page, rows in SAID.items() for told in wrong_claims(wanted[page], rows)]
    for told in wrong:
        print(f"docs/results/{told}", file=sys.stderr)
    if not check:
        for path in sorted(HERE.glob("*.jsonl")):
            for why, rows in stale_rows(path).items():
                print(f"{path.name}: {len(rows)} rows are older than the code, {why}: {'; '.join(rows)}")
    return 1 if wrong or (check and other) else 0
