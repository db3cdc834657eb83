"""What is said of arguments that cannot be read, and what help says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from saying import usage_of

from arkv.cli import main
from arkv.cli.flags import flag_name
from arkv.cli.parser import COMMANDS, load_command, parse
from arkv.errors import ArkvError
from arkv.options import fields_of

LOADING = "--decoder --model --random-weights --revision --size --source --text-encoder --tokenizer --vqgan"
USUAL = f"--device --dtype --guidance --quiet --seed {LOADING}"
KEPT = {
    "generate": f"{USUAL} --batch-size --compile --guided-tokens --kv-dtype --layout --npz-side --out "
    "--policy --prompt --prompts-file --ratio --samples --temperature --top-k --top-p",
    "run": "--address --engine --quiet --resume --status --workers FILE",
    "estimate": "--batch-size --condition --dtype --guidance --kv-dtype --model --policy --ratio --revision "
    "--size --source",
    "bench": f"{USUAL} --batch-sizes --compile --json --kv-dtype --lines --memory --plot --policies --preset "
    "--profile --ratios --repeats --tokens",
    "eval": f"{USUAL} --batch-size --by --compile --forced-prompts --kv-dtype --kv-dtypes --out --pair "
    "--pictures --plot --policies --prompts --prompts-file --ratios",
    "inspect": f"{USUAL} --animation --heads --layers --lines --out --policy --prompt --ratio "
    "--unconditional",
    "profile": f"{USUAL} --batch-size --compile --map --out --prompts --window",
    "demo": "--compile --device --dtype --guidance --judged --out --quiet --seed",
}


@pytest.mark.parametrize("command", KEPT)
def test_no_flag_is_ever_renamed(command: str) -> None:
    options = load_command(command).options
    assert set(KEPT[command].split()) <= {flag_name(options, name) for name in fields_of(options)}


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["generate", "--out", "picture.png"],
        ["generate", "--prompt", "a red circle"],
        ["generate", "--prompt", "a red circle", "--out", "picture.png", "--compile", "magic"],
        ["generate", "--prompt", "a red circle", "--out", ""],
        ["generate", "--prompt", "a", "--prompts-file", "b", "--out", "c"],
        ["demo", "--out", " "],
        ["demo", "--out"],
        ["demo", "extra"],
        ["generate", "--prompts-file", "list.txt", "--out", "pictures", "--samples", "0"],
        ["generate", "--prompts-file", "list.txt", "--out", "pictures", "--npz-side", "0"],
        ["generate", "--prompt", "a red circle", "--out", "picture.png", "--size", "1024"],
        ["generate", "--prompt", "a red circle", "--out", "picture.png", "--top-k", "many"],
        ["generate", "--prompt", "a red circle", "--out", "a\0b"],
        ["generate", "--prompt", "a \udc80", "--out", "picture.png"],
        ["estimate", "--random-weights"],
        ["estimate", "--batch-size", "2", "--memory", "8"],
        ["bench", "--json", ""],
        ["estimate", "--batch-size", "0"],
        ["bench", "--batch-sizes", "1,none"],
        ["bench", "--ratios", ","],
        ["bench", "--memory", "0"],
        ["bench", "--memory", "nan"],
        ["bench", "--memory", "inf"],
        ["bench", "--memory", "8", "--batch-sizes", "1"],
        ["bench", "--tokens", "8", "--lines", "1"],
        ["eval", "--out", "a", "--kv-dtypes", "own,int5"],
        ["eval", "--out", "a", "--kv-dtypes", "own", "--kv-dtype", "int8"],
        ["eval", "--out", "a", "--pair", "linear"],
        ["eval", "--out", "a", "--by", "colour"],
        ["run"],
        ["run", "job.yaml", "--resume", "--status"],
        ["sheet"],
        ["completion", "tcsh"],
    ],
)
def test_usage_errors_are_three_lines_and_leave_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    told = usage_of(capsys, *arguments).splitlines()
    assert told[1].startswith("arkv: error: ")
    assert max(map(len, told)) < 300


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["genrate"], "unknown command 'genrate'; did you mean generate"),
        (["generate", "--polcy", "x"], "--policy"),
        (["generate", "--samples", "0"], "--samples is 0: expected a whole number from 1"),
        (["generate", "--prompt", "x"], "needs --out"),
        (["demo", "--compile", "magic"], "--compile is magic: expected 'none', 'inductor' or 'cudagraphs'"),
    ],
)
def test_what_might_have_been_meant_is_said(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in usage_of(capsys, *arguments)


@given(st.sampled_from(list(COMMANDS)), st.lists(st.text(max_size=12), max_size=4))
def test_any_arguments_are_read_or_refused(command: str, arguments: list[str]) -> None:
    try:
        assert parse([command, *arguments]).name == command
    except SystemExit as stop:
        status = stop.code
    except ArkvError:
        status = 2
    else:
        return
    assert status in (0, 2)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples_groups_and_every_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"arkv {command}" in text[text.index("example") :]
    options = load_command(command).options
    for name in fields_of(options):
        assert flag_name(options, name) in text
    for example in load_command(command).examples:
        assert example in text, "copied as it stands"


def test_help_of_everything_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "arkv demo --out demo.png" in text
    for command in COMMANDS:
        assert f"\n  {command} " in text
    assert "\x1b" not in text


def test_every_file_of_a_command_is_one() -> None:
    folder = Path(sys.modules["arkv.cli"].__path__[0])
    beside = {
        "entry",
        "parser",
        "flags",
        "tables",
        "outputs",
        "summary",
        "bench_tables",
        "eval_tables",
        "__init__",
        "__main__",
    }
    assert {path.stem for path in folder.glob("*.py")} - beside == set(COMMANDS)


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["generat"], ["--version"]])
def test_help_and_errors_import_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys, contextlib\nfrom arkv.cli import main\n"
        f"with contextlib.suppress(SystemExit): main({arguments!r})\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_shell_completes_commands_flags_words_and_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    assert "_ARKV_COMPLETE=bash_complete" in capsys.readouterr().out

    def completed(words: str, current: str) -> str:
        asked = {"_ARKV_COMPLETE": "bash_complete", "COMP_WORDS": f"{words} {current}"}
        asked["COMP_CWORD"] = str(len(words.split()))
        done = subprocess.run(
            [sys.executable, "-m", "arkv.cli"], env={**os.environ, **asked}, capture_output=True, text=True
        )
        return done.stdout

    assert "plain,generate" in completed("arkv", "gen")
    assert "plain,--policy" in completed("arkv generate", "--pol")
    assert "plain,linear" in completed("arkv generate --policy", "lin")
    assert "plain,inductor" in completed("arkv generate --compile", "ind")
    assert "file," in completed("arkv generate --out", "pic")
    assert not completed("arkv generate --prompt", "pic").strip()
