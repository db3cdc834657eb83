"""Write the tables of options into the pages, from the classes that say what there is.

python docs/option_tables.py           writes them
python docs/option_tables.py --check   says which page is not up to date

A table stands between `<!-- options of NAME -->` and `<!-- end of options -->`; NAME is a command or
`job.yaml`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from arkv.bulk.description import Description
from arkv.cli.flags import default_text, flag_name, sections_of
from arkv.cli.parser import load_command
from arkv.jobs.recipe import Recipe
from arkv.options import expected, fields_of, type_of

DOCS = Path(__file__).parent
PAGES = ("guide/cli.md", "scaling.md")
MARKED = re.compile(r"(<!-- options of (\S+) -->\n).*?(<!-- end of options -->)", re.S)


def table_of(name: str) -> str:
    """A table, in Markdown."""
    if name == "job.yaml":
        fields = {**fields_of(Description), **fields_of(Recipe)}
        del fields["recipe"]
        first = ["prompts", "out"]
        rows = [
            (f"`{each}`", fields[each]) for each in [*first, *(each for each in fields if each not in first)]
        ]
        head = "name"
    else:
        cls = load_command(name).options
        rows = [
            (f"`{flag_name(cls, each)}`", fields_of(cls)[each])
            for names in sections_of(cls).values()
            for each in names
        ]
        head = "flag"
    lines = [f"| {head} | meaning | may be | default |", "|---|---|---|---|"]
    for title, field in rows:
        default = "required" if field.is_required() else f"`{text}`" if (text := default_text(field)) else ""
        may_be = "" if field.annotation is bool and head == "flag" else expected(type_of(field))
        may_be = may_be.replace(" to 1000000000", "").replace(" to 18446744073709551615", "")
        cells = (title, field.description or "", may_be, default)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def with_tables(text: str) -> str:
    """A page with its tables as they should be."""
    return MARKED.sub(lambda found: f"{found[1]}\n{table_of(found[2])}\n{found[3]}", text)


def main() -> int:
    """Write, or check."""
    stale = []
    for page in PAGES:
        path = DOCS / page
        text = path.read_text(encoding="utf-8")
        if (new := with_tables(text)) != text:
            stale.append(page)
            if "--check" not in sys.argv[1:]:
                path.write_text(new, encoding="utf-8")
    if stale and "--check" in sys.argv[1:]:
        print(f"not up to date: {', '.join(stale)}; run python docs/option_tables.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
