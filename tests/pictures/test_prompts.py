"""Readers of prompt files: what the authors' files look like, and what broken ones are told."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arkv.decoding.arguments import prompt_list
from arkv.errors import ArkvError
from arkv.pictures.prompts import read_prompts

BENCH = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
COWS = {"tag": "counting", "include": [], "exclude": [], "prompt": "a photo of two cows"}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path, content: str | bytes) -> list[str]:
    _, prompts = read_prompts(write(path, content))
    return [prompt.prompt for prompt in prompts]


def test_geneval_keeps_its_records(tmp_path: Path) -> None:
    lines = f"{json.dumps(BENCH)}\n\n{json.dumps(COWS)}\n{json.dumps(BENCH)}"
    kind, prompts = read_prompts(write(tmp_path / "evaluation_metadata.jsonl", lines))
    assert kind == "geneval"
    assert [prompt.prompt for prompt in prompts] == [each["prompt"] for each in (BENCH, COWS, BENCH)]
    assert [prompt.record for prompt in prompts] == [BENCH, COWS, BENCH]
    assert [prompt.name for prompt in prompts] == ["00000", "00001", "00002"], "by prompt, not by line"
    assert prompts[1].where == f"{tmp_path / 'evaluation_metadata.jsonl'}, line 3"


def test_dpg_bench_is_a_folder_whose_names_are_kept(tmp_path: Path) -> None:
    for name, text in {
        "b10.txt": "two\n lines ",
        "a2.txt": "one",
        ".DS_Store.txt": "",
        "notes.md": "no",
    }.items():
        write(tmp_path / name, text)
    kind, prompts = read_prompts(tmp_path)
    assert kind == "dpg"
    assert [(prompt.name, prompt.prompt) for prompt in prompts] == [("a2", "one"), ("b10", "two lines")]


def test_captions_are_found_by_the_name_of_their_column(tmp_path: Path) -> None:
    content = 'image_id,Caption\r\n7,"a dog, asleep"\r\n\r\n9,"a ""big"" cat\r\non a mat"\r\n7,a cow\r\n'
    kind, prompts = read_prompts(write(tmp_path / "coco.csv", "\ufeff" + content))
    assert kind == "csv"
    assert [p.prompt for p in prompts] == ["a dog, asleep", 'a "big" cat on a mat', "a cow"]
    assert [p.name for p in prompts] == ["7", "9", "7"]
    assert [p.where.rpartition(" ")[2] for p in prompts] == ["2", "4", "6"], "where a row begins"


def test_a_single_column_may_have_bare_commas(tmp_path: Path) -> None:
    """As in LlamaGen's list of COCO captions."""
    content = 'Prompt\nA furry, black bear standing in a rocky, weedy area \n"quoted, too"\nplain\n'
    wanted = ["A furry, black bear standing in a rocky, weedy area", "quoted, too", "plain"]
    assert read(tmp_path / "coco_captions.csv", content) == wanted


def test_parti_prompts_have_tabs(tmp_path: Path) -> None:
    content = "Prompt\tCategory\tChallenge\tNote\nan owl, a fish\tAnimals\tBasic\t\n"
    assert read(tmp_path / "PartiPrompts.tsv", content) == ["an owl, a fish"]


def test_records_have_texts_or_classes(tmp_path: Path) -> None:
    records = [{"prompt": " a  red\ncircle ", "id": 17}, {"prompt": 207}, {"prompt": "x", "image_id": "y"}]
    kind, prompts = read_prompts(write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, records))))
    assert kind == "jsonl"
    assert [(each.prompt, each.name) for each in prompts] == [
        ("a red circle", "17"),
        ("207", "000001"),
        ("x", "y"),
    ]
    assert all(each.record is None for each in prompts)


def test_a_table_has_prompts_in_a_column(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.table({"ID": [3, 4], "Caption": ["a  b", "c"]}), path)
    kind, prompts = read_prompts(path)
    assert kind == "parquet"
    assert [(each.prompt, each.name) for each in prompts] == [("a b", "3"), ("c", "4")]
    assert prompts[1].where == f"{path}, row 2"
    parquet.write_table(pyarrow.table({"prompt": [5, 6]}), path)
    assert [(each.prompt, each.name) for each in read_prompts(path)[1]] == [("5", "000000"), ("6", "000001")]
    parquet.write_table(pyarrow.table({"prompt": ["a", None]}), path)
    with pytest.raises(ArkvError, match="row 2 has no prompt"):
        read_prompts(path)
    parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    with pytest.raises(ArkvError, match="has the columns text: expected one that is named caption or prompt"):
        read_prompts(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ArkvError, match="cannot read .*Parquet magic bytes"):
        read_prompts(path)
    with pytest.raises(ArkvError, match=r"cannot read .*none\.parquet: No such file or directory"):
        read_prompts(tmp_path / "none.parquet")
    path.write_bytes(b"x")
    with pytest.raises(ArkvError, match="cannot read"):
        read_prompts(path)


def test_lines_of_text_are_prompts_or_classes(tmp_path: Path) -> None:
    content = "\ufeffa red circle\r\n\r\n207\r\n golden retriever \r\n207\r\na line\u2028of one\r\n"
    wanted = ["a red circle", "207", "golden retriever", "207", "a line\u2028of one"]
    assert read(tmp_path / "list.txt", content) == wanted


def test_counts_come_in_rounds(tmp_path: Path) -> None:
    assert read(tmp_path / "classes.txt", "1\t3\nmacaw\n2\t2\n") == ["1", "macaw", "2", "1", "2", "1"]
    _, prompts = read_prompts(tmp_path / "classes.txt")
    assert [prompt.name for prompt in prompts] == [f"{number:06d}" for number in range(6)]


def test_a_prompt_means_the_same_wherever_it_stands(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for prompt in ("1984", "007", "a red circle"):
        lists = {
            "p.txt": prompt,
            "p.csv": f"prompt\n{prompt}\n",
            "p.tsv": f"Prompt\tid\n{prompt}\t1\n",
            "p.jsonl": json.dumps({"prompt": prompt}),
        }
        for name, content in lists.items():
            assert read(tmp_path / name, content) == [prompt], name
        parquet.write_table(pyarrow.table({"prompt": [prompt]}), tmp_path / "p.parquet")
        assert [each.prompt for each in read_prompts(tmp_path / "p.parquet")[1]] == [prompt]
    assert read(tmp_path / "n.jsonl", '{"prompt": 1984}') == ["1984"], "a number without quotes, too"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("a  red   circle", "a red circle"),
        (" a red circle ", "a red circle"),
        ("a red\v\fcircle", "a red circle"),
        ("a\u00a0red\u2003circle", "a\u00a0red\u2003circle"),
        ("\u3000a circle", "\u3000a circle"),
    ],
    ids=["several", "around", "control characters", "other spaces", "a wide one"],
)
def test_white_space_means_the_same_wherever_it_stands(typed: str, meant: str, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "dpg").mkdir()
    (tmp_path / "dpg" / "a.txt").write_text(typed)
    parquet.write_table(pyarrow.table({"prompt": [typed]}), tmp_path / "p.parquet")
    got = [each.prompt for name in ("dpg", "p.parquet") for each in read_prompts(tmp_path / name)[1]]
    for name, content in {
        "p.txt": typed,
        "q.txt": f"{typed}\t1",
        "p.csv": f'prompt\n"{typed}"\n',
        "p.tsv": f"Prompt\tid\n{typed}\t1\n",
        "p.jsonl": json.dumps({"prompt": typed}),
        "g.jsonl": json.dumps({"prompt": typed, "tag": "x"}),
    }.items():
        got += read(tmp_path / name, content)
    assert got == [meant] * 8
    assert prompt_list([typed]) == [meant], "in Python, and behind --prompt"


def test_a_list_that_cannot_be_looked_at_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "p.txt", "a red circle")
    assert [prompt.prompt for prompt in read_prompts(Path("~/p.txt"))[1]] == ["a red circle"]
    with pytest.raises(ArkvError, match="not JSON"):
        read_prompts(write(tmp_path / "deep.jsonl", "[" * 200_000))

    def denied(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", denied)
    with pytest.raises(ArkvError, match="^cannot look at .*: Permission denied$"):
        read_prompts(tmp_path / "p.txt")


BAD = {
    "no json": ("p.jsonl", json.dumps(BENCH) + "\n{oops\n", "line 2 is not JSON"),
    "json that is no object": ("p.jsonl", "[1]\n", 'line 1 has no "prompt"'),
    "record without prompt": ("p.jsonl", '\n{"tag": "x"}\n', 'line 2 has no text "prompt"'),
    "record without tag": ("p.jsonl", '{"tag": "x", "prompt": "x"}\n{"prompt": "x"}', 'no text "tag"'),
    "record with no prompt": ("p.jsonl", '{"caption": "x"}\n', 'line 1 has no "prompt"'),
    "record with an empty prompt": ("p.jsonl", '{"prompt": "x"}\n{"prompt": " "}', 'line 2 has no "prompt"'),
    "prompt that is no text": ("p.jsonl", '{"prompt": 3, "tag": "x"}', 'line 1 has no text "prompt"'),
    "no caption column": ("p.csv", "id,text\n1,a\n", "line 1 has the columns id, text: expected one"),
    "comma without quotes": (
        "p.csv",
        "id,caption\n1,a\n2,a, b\n",
        "line 3 has 3 columns and the first line 2",
    ),
    "too few columns": ("p.csv", "id,caption\n1\n", "line 2 has 1 columns"),
    "empty caption": ("p.csv", "id,caption\n1,\n", "line 2 has an empty caption"),
    "open quotation mark": ("p.tsv", 'Prompt\tNote\na\tb\n"c\td\ne\tf"\t\n', "line 3 has a quotation mark"),
    "count that is none": ("p.txt", "a\nb\tmany\n", "line 2 has 'many' behind a tab"),
    "count of nothing": ("p.txt", "\t2\n", "line 1 has no prompt before its tab"),
    "count of zero": ("p.txt", "a\t0\n", "line 1 has '0' behind a tab"),
    "no prompts": ("p.txt", "\n \n", "has no prompts in it"),
    "header only": ("p.csv", "caption\n", "has no prompts in it"),
    "empty file": ("p.csv", "", "has no prompts in it"),
    "no UTF-8": ("p.txt", b"a\nb\xff\n", "line 2 is not UTF-8"),
    "unknown suffix": ("p.yaml", "", "by the suffix .yaml"),
    "no suffix": ("prompts", "a\n", "by no suffix"),
}


@pytest.mark.parametrize(("name", "content", "complaint"), BAD.values(), ids=BAD)
def test_what_cannot_be_read_is_one_line(
    name: str, content: str | bytes, complaint: str, tmp_path: Path
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ArkvError) as error:
        read_prompts(path)
    assert complaint in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArkvError, match="cannot read .*none.txt: No such file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(ArkvError, match="has no prompts in it"):
        read_prompts(tmp_path)
    write(tmp_path / "a.txt", "\n")
    with pytest.raises(ArkvError, match=r"a\.txt is empty"):
        read_prompts(tmp_path)


# No line ends: a prompt that comes back has its white space put together.
texts = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Zs", "Zl", "Zp")), min_size=1, max_size=12
).filter(lambda text: "\ufeff" not in text)


@given(texts=st.lists(st.tuples(texts, texts), min_size=1, max_size=5))
def test_what_a_csv_writer_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str]]
) -> None:
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("image_id", "caption"), *texts])
    path = write(tmp_path_factory.mktemp("csv") / "coco.csv", buffer.getvalue())
    _, prompts = read_prompts(path)
    assert [(prompt.name, prompt.prompt) for prompt in prompts] == texts


@given(prompts=st.lists(texts, min_size=1, max_size=5))
def test_what_is_written_as_json_is_read(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[str]
) -> None:
    lines = [json.dumps({"tag": "t", "prompt": text, "n": i}) for i, text in enumerate(prompts)]
    path = write(tmp_path_factory.mktemp("jsonl") / "m.jsonl", "\n".join(lines))
    _, read_back = read_prompts(path)
    assert [json.dumps(prompt.record) for prompt in read_back] == lines


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl", "folder/p.txt"])
def test_what_never_ends_is_not_waited_for(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ArkvError, match="cannot read .*it is a FIFO"):
        read_prompts(tmp_path / name if "/" not in name else tmp_path / "folder")
