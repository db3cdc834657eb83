"""Prompts of evaluations, read from the files in which they are published.

| file | read as | columns or fields |
|---|---|---|
| `.jsonl` | GenEval | `prompt` and `tag`; the record goes back to the evaluator |
| `.jsonl` | records without `tag` | `prompt`, a text or a class; `image_id` or `id`, if there |
| folder of `.txt` | DPG-Bench | a prompt a file, named after it |
| `.csv` | COCO captions | `caption` or `prompt`; `image_id` or `id`, if there |
| `.tsv` | PartiPrompts | `Prompt` |
| `.parquet` | a table | `caption` or `prompt`; `image_id` or `id`, if there |
| `.txt` | prompts or classes | one a line; behind a tab, how many pictures of it |

A prompt is read as text wherever it stands, numbers too: what `1984` means is for the model to say. Spaces,
tabs and line breaks within it are single spaces, and there are none around it.

Files are UTF-8, with or without a byte order mark, with either kind of line end. Blank lines are passed over.
A prompt that stands twice is drawn twice.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arkv.errors import ArkvError
from arkv.pictures.files import check_regular
from arkv.scalars import whole

MOST = 10**8
"""Prompts of a list, counted as often as they stand for pictures."""

WHITE_SPACE = re.compile(r"[ \t\n\r\v\f]+")

CAPTION_COLUMNS = ("caption", "prompt")
NAME_COLUMNS = ("image_id", "id")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to draw, and what an evaluator knows it by.

    Attributes:
        prompt: a text; of a class, its name or its number in digits. The model alone decides which it is.
        name: file stem or identifier, as the evaluator has it; else the number in the list.
        where: file and line, for messages.
        record: what the evaluator wants back beside the picture; None where it wants nothing.
    """

    prompt: str
    name: str
    where: str = field(compare=False)
    record: dict[str, Any] | None = field(default=None, hash=False)


def single_spaced(text: str) -> str:
    """A prompt without white space around it, and with single spaces for it inside.

    Only what typing and saving a list leaves is touched: other spaces of Unicode may be meant.
    """
    return WHITE_SPACE.sub(" ", text).strip(" ")


def read_prompts(path: Path) -> tuple[str, list[Prompt]]:
    """Read a list of prompts; the format is recognised by the suffix, a folder is DPG-Bench's.

    Returns:
        The format ("geneval", "jsonl", "dpg", "csv", "tsv", "parquet" or "txt") and the prompts in the order
        of the file, those of a folder in the order of their names. Lines of text that have a count come in
        rounds, the first picture of every line before the second of any: statistics over parts of the list
        see all classes.

    Raises:
        ArkvError: there is no such file, its format is none of these, or a line cannot be read.
    """
    try:
        path = path.expanduser()
        is_folder = path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        told = getattr(error, "strerror", None) or error
        raise ArkvError(f"cannot look at {str(path)[:200]!r}: {told}") from None
    kind = "dpg" if is_folder else path.suffix.lower().removeprefix(".")
    if kind == "jsonl" and _is_geneval(path):
        kind = "geneval"
    if kind not in READERS:
        what = "no suffix" if not path.suffix else f"the suffix {path.suffix}"
        raise ArkvError(
            f"cannot tell the format of {path} by {what}: expected .jsonl, .csv, .tsv, .parquet, .txt, or a "
            "folder of .txt files (DPG-Bench)"
        )
    prompts = list(READERS[kind](path))
    if not prompts:
        raise ArkvError(f"{path} has no prompts in it")
    return kind, prompts


def _geneval(path: Path) -> Iterator[Prompt]:
    """`evaluation_metadata.jsonl` of github.com/djghosh13/geneval; pictures are numbered by its lines."""
    for number, (where, record) in enumerate(_records(path)):
        for name in ("prompt", "tag"):
            text = record.get(name) if isinstance(record, dict) else None
            if not isinstance(text, str) or not text.strip():
                raise ArkvError(
                    f'{where} has no text "{name}": expected a record of GenEval, an object a line'
                )
        yield Prompt(single_spaced(record["prompt"]), f"{number:05d}", where, record)


def _jsonl(path: Path) -> Iterator[Prompt]:
    for number, (where, record) in enumerate(_records(path)):
        prompt = _text_or_class(record.get("prompt")) if isinstance(record, dict) else None
        if prompt is None:
            raise ArkvError(f'{where} has no "prompt": expected an object a line with a text or a class')
        name = next((str(record[name]) for name in NAME_COLUMNS if name in record), f"{number:06d}")
        yield Prompt(prompt, name, where)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    for where, line in _lines(path):
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ArkvError(f"{where} is not JSON: {error}") from None


def _is_geneval(path: Path) -> bool:
    """Whether the first record has a tag."""
    record = next((record for _, record in _records(path)), None)
    return isinstance(record, dict) and "tag" in record


def _dpg(path: Path) -> Iterator[Prompt]:
    """`dpg_bench/prompts` of github.com/TencentQQGYLab/ELLA: pictures are found by the stem of a file."""
    for file in sorted(path.glob("[!.]*.txt")):
        text = single_spaced(_text(file))
        if not text.strip():
            raise ArkvError(f"{file} is empty: expected a prompt")
        yield Prompt(text, file.stem, str(file))


def _csv(path: Path) -> Iterator[Prompt]:
    return _table(path, ",")


def _tsv(path: Path) -> Iterator[Prompt]:
    return _table(path, "\t")


def _table(path: Path, delimiter: str) -> Iterator[Prompt]:
    text = _text(path)
    header = text.lstrip().partition("\n")[0]
    # A single column may come without quotes around its commas, as LlamaGen's coco_captions.csv does.
    delimiter = delimiter if delimiter in header else "\t"
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    columns: list[str] = []
    caption, name = 0, None
    number, end = 0, 0
    try:
        for row in rows:
            where, end = f"{path}, line {end + 1}", rows.line_num
            if not any(cell.strip() for cell in row):
                continue
            if not columns:
                columns = [cell.strip().casefold() for cell in row]
                found = _column(columns, CAPTION_COLUMNS)
                if found is None:
                    raise ArkvError(
                        f"{where} has the columns {', '.join(row)}: expected one that is named "
                        f"{' or '.join(CAPTION_COLUMNS)}"
                    )
                caption, name = found, _column(columns, NAME_COLUMNS)
                continue
            if len(row) != len(columns):
                raise ArkvError(
                    f"{where} has {len(row)} columns and the first line {len(columns)}: is there a text with "
                    "a delimiter that is not in quotation marks?"
                )
            if delimiter == "\t" and any("\n" in cell for cell in row):
                raise ArkvError(f"{where} has a quotation mark that is not closed on its line")
            prompt = single_spaced(row[caption])
            if not prompt.strip():
                raise ArkvError(f"{where} has an empty {columns[caption]}")
            yield Prompt(prompt, f"{number:06d}" if name is None else row[name].strip(), where)
            number += 1
    except csv.Error as error:
        raise ArkvError(f"{path}, line {rows.line_num}: {error}") from None


def _column(columns: list[str], wanted: tuple[str, ...]) -> int | None:
    return next((columns.index(name) for name in wanted if name in columns), None)


def _parquet(path: Path) -> Iterator[Prompt]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ArkvError(f"{path} needs pyarrow: pip install 'arkv[parquet]'") from None
    try:
        check_regular(path)
        with path.open("rb") as file:
            table = parquet.read_table(file)
    except (OSError, ArrowException) as error:
        told = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ArkvError(f"cannot read {path}: {told}") from None
    columns = [name.casefold() for name in table.column_names]
    caption, name = _column(columns, CAPTION_COLUMNS), _column(columns, NAME_COLUMNS)
    if caption is None:
        raise ArkvError(
            f"{path} has the columns {', '.join(table.column_names)}: expected one that is named "
            f"{' or '.join(CAPTION_COLUMNS)}"
        )
    names = None if name is None else table.column(name).to_pylist()
    for number, value in enumerate(table.column(caption).to_pylist()):
        where = f"{path}, row {number + 1}"
        prompt = _text_or_class(value)
        if prompt is None:
            raise ArkvError(f"{where} has no {columns[caption]}: expected a text or a class")
        yield Prompt(prompt, f"{number:06d}" if names is None else str(names[number]), where)


def _text_or_class(value: object) -> str | None:
    """A prompt, a number in digits; None for what is none."""
    number = whole(value)
    if number is not None:
        return str(number)
    return single_spaced(value) if isinstance(value, str) and value.strip() else None


def _txt(path: Path) -> Iterator[Prompt]:
    lines, total = [], 0
    for where, line in _lines(path):
        text, tab, told = line.rpartition("\t")
        text, told = (text, told.strip()) if tab else (told, "1")
        if not told.isdecimal() or not told.strip("0"):
            raise ArkvError(f"{where} has {told!r} behind a tab: expected how many pictures of it to draw")
        total = MOST + 1 if len(told) > len(str(MOST)) else total + int(told)
        if total > MOST:
            raise ArkvError(
                f"{where} asks for more pictures than a list has: at most {MOST:,}; take several lists"
            )
        if not text.strip():
            raise ArkvError(f"{where} has no prompt before its tab: expected a text or a class")
        lines.append((where, single_spaced(text), int(told)))
    number = 0
    for round_ in range(max((count for _, _, count in lines), default=0)):
        for where, prompt, count in lines:
            if round_ < count:
                yield Prompt(prompt, f"{number:06d}", where)
                number += 1


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines with something on them, and where they stand."""
    # Not splitlines: it breaks at characters that stand in texts, too.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", line.strip(" \r\v\f")


def _text(path: Path) -> str:
    try:
        check_regular(path)
        content = path.read_bytes()
    except OSError as error:
        raise ArkvError(f"cannot read {path}: {error.strerror}") from None
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ArkvError(f"{path}, line {line} is not UTF-8: save it as such") from None


READERS: dict[str, Callable[[Path], Iterator[Prompt]]] = {
    "geneval": _geneval,
    "jsonl": _jsonl,
    "dpg": _dpg,
    "csv": _csv,
    "tsv": _tsv,
    "parquet": _parquet,
    "txt": _txt,
}
