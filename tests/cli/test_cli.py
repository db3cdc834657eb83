"""The command line: what it writes, what it prints, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import arkv
from arkv import registry
from arkv.cli import _split_policies, main
from arkv.models.scenes.adapter import Scenes
from arkv.models.scenes.codebook import GRID, PATCH_VALUES, Codebook
from arkv.models.transformer import TransformerConfig
from arkv.speed import bench, published
from arkv.store import Store

PROMPTS = ("three red circles", "a blue square above a cyan circle")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Scenes:
    """An untrained model with the prompts and pictures of `scenes`, in its place: much faster."""
    torch.manual_seed(0)
    config = TransformerConfig(layers=1, width=16, heads=1, kv_heads=1, head_dim=16, hidden=16)
    model = Scenes(Codebook(torch.rand(8, PATCH_VALUES)), config).eval()
    monkeypatch.setattr(registry, "load_model", lambda *_, **__: model)
    return model


def arkv_says(capsys: pytest.CaptureFixture[str], *arguments: str | Path, status: int = 0) -> str:
    """Runs the command; gives its standard output, or the one line of its complaint."""
    assert main([str(argument) for argument in arguments]) == status
    out, err = capsys.readouterr()
    if status == 0:
        return out
    assert not out
    assert err.startswith("arkv: error: ")
    assert err.count("\n") == 1, err
    return err


def picture_of(*names: str) -> list[str]:
    return [part for name in names for part in ("--prompt", name)]


def test_generate_writes_a_picture_and_how_it_was_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the trained weights, from end to end."""
    out = tmp_path / "new" / "picture.png"
    flags = ("--policy", "linear:recent=48", "--ratio", "1/6", "--seed", "7", "--guidance", "1", "--quiet")
    printed = arkv_says(capsys, "generate", *flags, *picture_of(PROMPTS[0]), "--out", out)
    assert printed.startswith(f"{out}: ")
    assert printed.count("\n") == 1
    assert "22% of the full cache" in printed
    image = Image.open(out)
    assert image.size == (48, 48)
    assert image.text["prompt"] == PROMPTS[0]
    assert image.text["seed"] == "7"
    assert image.text["model"] == "scenes"
    assert image.text["policy"] == "linear:ratio=1/6,share_rows=False,anchors=4,recent=48,scoring=softmax"
    assert image.text["Software"] == f"arkv {arkv.__version__}"
    settings = json.loads(image.text["settings"])
    assert settings == {
        "guidance": 1,
        "temperature": 1,
        "top_k": None,
        "top_p": None,
        "guided_tokens": None,
        "dtype": "float32",
        "compile": "none",
        "kv_dtype": None,
    }
    assert [file.name for file in out.parent.iterdir()] == ["picture.png"]


def test_generate_fills_a_folder_that_its_own_metadata_reproduces(
    tiny: Scenes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, again = tmp_path / "pictures", tmp_path / "again.png"
    flags = ("generate", "--policy", "window", "--ratio", "1/4")
    arkv_says(capsys, *flags, *picture_of(*PROMPTS), "--seed", "3", "--batch-size", "1", "--out", folder)
    assert sorted(file.name for file in folder.iterdir()) == ["0000.png", "0001.png"]
    second = Image.open(folder / "0001.png")
    assert second.text["prompt"] == PROMPTS[1]
    recorded = ("--policy", second.text["policy"], "--seed", second.text["seed"])
    arkv_says(capsys, "generate", *recorded, *picture_of(PROMPTS[1]), "--out", again)
    assert Image.open(again).tobytes() == second.tobytes()
    assert Image.open(folder / "0000.png").tobytes() != second.tobytes()


def test_generate_puts_several_pictures_of_one_file_on_a_sheet(
    tiny: Scenes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheet.png"
    assert main(["generate", *picture_of(*PROMPTS), "--out", str(out)]) == 0
    assert "token" in capsys.readouterr().err, "progress is shown unless --quiet"
    image = Image.open(out)
    assert image.width > 2 * 192
    assert image.height > 192
    assert json.loads(image.text["prompt"]) == list(PROMPTS)
    assert json.loads(image.text["seed"]) == [0, 1]


BAD = {
    "unknown model": (["--model", "scene"], "'scene'; did you mean scenes?"),
    "unknown policy": (["--policy", "windw"], "unknown policy 'windw'; did you mean window?"),
    "unknown parameter": (["--policy", "linear:anchor=2", "--ratio", "1/6"], "did you mean anchors?"),
    "parameter without value": (["--policy", "linear:anchors"], "expected parameter=value"),
    "parameter of another type": (["--policy", "linear:anchors=few,ratio=1/6"], "anchors is 'few'"),
    "ratio for the full cache": (
        ["--ratio", "1/6"],
        "the policy full takes no parameters: leave out ratio=1/6",
    ),
    "no budget": (["--policy", "linear"], "give a budget in slots or a ratio"),
    "ratio of zero": (["--policy", "window", "--ratio", "0"], "the ratio is 0"),
    "ratio below zero": (["--policy", "window", "--ratio=-1/6"], "the ratio is -1/6"),
    "ratio that is none": (["--policy", "window", "--ratio", "small"], "cannot read the ratio 'small'"),
    "ratio too small": (["--policy", "linear", "--ratio", "1/100"], "the smallest ratio that does is 28/576"),
    "unknown word": (["--prompt", "three red dragons"], "unknown word 'dragons'"),
    "empty prompt": (["--prompt", ""], "prompt"),
    "negative seed": (["--seed=-1"], "seed -1"),
    "negative temperature": (["--temperature=-1"], "temperature is -1"),
    "top-k below zero": (["--top-k=-1"], "top_k is -1"),
    "top-k above the vocabulary": (["--top-k", "9999"], "expected 1 to "),
    "top-p of zero": (["--top-p", "0"], "top_p is 0"),
    "guidance that is no number": (["--guidance", "nan"], "guidance is nan"),
    "no such device": (["--device", "abacus"], "unknown device 'abacus'"),
    "another format": (["--out", "picture.jpg"], "expected a name that ends in .png, or a folder"),
}


@pytest.mark.parametrize(("flags", "complaint"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_no_file(
    flags: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    usual = ["generate", "--prompt", PROMPTS[0], "--out", "pictures/"]
    assert complaint in arkv_says(capsys, *usual, "--quiet", *flags, status=1)
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_one_line(
    tiny: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("arkv.estimate.available_memory", lambda device: 250_000)
    out = tmp_path / "sheet.png"
    complaint = arkv_says(capsys, "generate", *picture_of(*PROMPTS), "--out", out, "--quiet", status=1)
    assert "the largest batch that fits is 1" in complaint
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_none_leave_no_file(
    tiny: Scenes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.no_grad():
        tiny.output.weight.fill_(torch.nan)
    out = tmp_path / "picture.png"
    complaint = arkv_says(capsys, "generate", *picture_of(PROMPTS[0]), "--out", out, "--quiet", status=1)
    assert "NaN or infinity at visual token 0" in complaint
    assert not list(tmp_path.iterdir())


def damage_all(weights: Path) -> None:
    weights.unlink()


def damage_end(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:100_000])


def damage_config(weights: Path) -> None:
    config = weights.with_suffix(".json")
    facts = json.loads(config.read_text())
    config.write_text(json.dumps(facts | {"codes": 7}))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (damage_all, "there is no checkpoint"),
        (damage_end, "is damaged or not a safetensors file"),
        (damage_config, "the model wants (7,"),
    ],
)
def test_bad_checkpoint_is_one_line(
    damage: Callable[[Path], None],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from arkv.models.scenes.adapter import WEIGHTS

    weights = tmp_path / WEIGHTS.name
    for suffix in (".safetensors", ".json"):
        weights.with_suffix(suffix).write_bytes(WEIGHTS.with_suffix(suffix).read_bytes())
    damage(weights)
    load = Scenes.from_pretrained
    monkeypatch.setattr(Scenes, "from_pretrained", lambda **keywords: load(weights, **keywords))
    out = tmp_path / "picture.png"
    assert complaint in arkv_says(capsys, "generate", *picture_of(PROMPTS[0]), "--out", out, status=1)
    assert not out.exists()


@pytest.mark.parametrize("command", ["generate", "bench", "demo"])
def test_place_that_cannot_be_written_is_told_before_anything_is_loaded(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(registry, "load_model", load)
    file = tmp_path / "file"
    file.touch()
    flags = {
        "generate": ["generate", *picture_of(PROMPTS[0]), "--out"],
        "bench": ["bench", "--json"],
        "demo": ["demo", "--out"],
    }[command]
    assert "Not a directory" in arkv_says(capsys, *flags, file / "out.png", status=1)
    assert list(tmp_path.iterdir()) == [file]


def test_failure_while_writing_leaves_what_was_there(
    tiny: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "picture.png"
    out.write_text("older")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    complaint = arkv_says(capsys, "generate", *picture_of(PROMPTS[0]), "--out", out, "--quiet", status=1)
    assert complaint.endswith(f"cannot write {out}: No space left on device\n")
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_text() == "older"


def test_interrupt_is_quiet(
    tiny: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "head", interrupt)
    flags = [*picture_of(PROMPTS[0]), "--out", str(tmp_path / "picture.png"), "--quiet"]
    assert main(["generate", *flags]) == 130
    assert capsys.readouterr().err == "arkv: interrupted\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["generate", "--out", "picture.png"],
        ["generate", "--prompt", "a red circle"],
        ["generate", "--prompt", "a red circle", "--out", "picture.png", "--compile", "magic"],
        ["generate", "--prompt", "a red circle", "--out", ""],
        ["demo", "--out", " "],
        ["generate", "--prompts-file", "list.txt", "--out", "pictures", "--samples", "0"],
        ["generate", "--prompt", "a red circle", "--out", "picture.png", "--size", "1024"],
        ["estimate", "--random-weights"],
        ["bench", "--json", ""],
        ["estimate", "--batch-size", "0"],
        ["bench", "--batch-sizes", "1,none"],
        ["bench", "--ratios", ","],
        ["bench", "--memory", "0"],
        ["bench", "--memory", "8", "--batch-sizes", "1"],
        ["bench", "--tokens", "8", "--lines", "1"],
    ],
)
def test_usage_errors_leave_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage: arkv")


@pytest.mark.parametrize("command", ["generate", "policies", "models", "estimate", "bench", "demo"])
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"arkv {command}" in text[text.index("example") :]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"arkv {arkv.__version__}\n"


def test_policies_are_listed_with_source_and_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    printed = arkv_says(capsys, "policies")
    (line,) = (line for line in printed.splitlines() if line.startswith("linear "))
    for part in (f"arkv {arkv.__version__}", "arXiv 2512.04857", "ratio=None", "anchors=4"):
        assert part in line


def test_models_are_listed_with_their_shape(capsys: pytest.CaptureFixture[str]) -> None:
    printed = arkv_says(capsys, "models")
    (line,) = (line for line in printed.splitlines() if line.startswith("scenes "))
    for part in (f"arkv {arkv.__version__}", f"{GRID} x {GRID}", f" {GRID**2} ", " M "):
        assert part in line


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("guidance", "rows"), [("1", 1), ("1.4", 2)])
def test_estimate_is_what_the_store_takes(
    dtype: str, guidance: str, rows: int, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (
        "--policy",
        "linear",
        "--ratio",
        "1/6",
        "--batch-size",
        "3",
        "--dtype",
        dtype,
        "--guidance",
        guidance,
    )
    printed = arkv_says(capsys, "estimate", *flags)

    def bytes_of(name: str) -> int:
        (line,) = (line for line in printed.splitlines() if line.startswith(name))
        return int(line.split()[-1].replace(",", ""))

    model = arkv.load_model("scenes", dtype=dtype)
    spec, policy = model.spec, arkv.load_policy("linear", ratio="1/6")
    plan = policy.plan(spec.grid, spec)
    store = Store(spec, plan, 3 * rows, spec.max_condition, policy.fields, model.dtype)
    assert bytes_of("keys and values") == store.kv_bytes
    assert bytes_of("statistics") == store.nbytes - store.kv_bytes
    parts = ("weights", "keys and values", "statistics", "scratch")
    assert bytes_of("total") == sum(map(bytes_of, parts))


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--guidance", "nan"], "guidance is nan"),
        (["--guidance=-1"], "guidance is -1"),
        (["--condition", "0"], "--condition is 0: expected 1 to "),
        (["--condition=-5"], "--condition is -5: expected 1 to "),
        (["--condition", "100000"], "--condition is 100000: expected 1 to "),
    ],
)
def test_estimate_refuses_what_generate_would(
    flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complaint in arkv_says(capsys, "estimate", *flags, status=1)


def test_estimate_of_the_longest_condition_is_the_usual_one(capsys: pytest.CaptureFixture[str]) -> None:
    longest = arkv.load_model("scenes", device="meta").spec.max_condition
    usual = arkv_says(capsys, "estimate")
    assert arkv_says(capsys, "estimate", "--condition", str(longest)) == usual
    assert arkv_says(capsys, "estimate", "--condition", "1") != usual


@pytest.mark.parametrize("broken", [OSError("no\nhub"), AttributeError("source"), ImportError("torch 1")])
def test_a_broken_plugin_hides_no_other(
    broken: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(EntryPoint):
        def load(self) -> None:
            raise broken

    class Asked(type(Scenes)):  # type: ignore[misc]
        def __getattribute__(cls, name: str) -> object:
            if name in ("source", "from_pretrained"):
                raise broken
            return super().__getattribute__(name)

    class AskedModel(Scenes, metaclass=Asked):
        """A model that cannot be built."""

    class AskedPolicy(type(arkv.load_policy("full")), metaclass=Asked):  # type: ignore[misc]
        """A policy that does not say where it is from."""

    class Lazy(EntryPoint):
        def load(self) -> object:
            return AskedModel if self.group == "arkv.models" else AskedPolicy

    real = registry.entry_points
    monkeypatch.setattr(
        registry,
        "entry_points",
        lambda group: [*real(group=group), Broken("bad", "bad:Bad", group), Lazy("late", "late:Late", group)],
    )
    told = " ".join(f"{type(broken).__name__}: {broken}".split())
    for command, good in (("policies", "linear"), ("models", "scenes")):
        lines = arkv_says(capsys, command).splitlines()
        assert any(line.startswith(f"{good} ") and "broken" not in line for line in lines)
        for name in ("bad", "late"):
            (line,) = (line for line in lines if line.startswith(f"{name} "))
            assert "broken: " in line
            assert told in line


def test_a_policy_without_a_source_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(type(arkv.load_policy("full")), "source", "")
    (line,) = (line for line in arkv_says(capsys, "policies").splitlines() if line.startswith("full "))
    assert line.split()[-2:] == ["-", "-"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
        MemoryError(),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
    ],
)
def test_memory_that_runs_out_is_one_line(
    error: Exception,
    tiny: Scenes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(tiny, "pixels", fail)
    out = tmp_path / "picture.png"
    complaint = arkv_says(capsys, "generate", *picture_of(PROMPTS[0]), "--out", out, "--quiet", status=1)
    assert complaint == "arkv: error: out of memory; take a smaller --batch-size or a smaller ratio\n"
    assert not list(tmp_path.iterdir())


def test_other_errors_are_not_taken_for_it(
    tiny: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(tiny, "pixels", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["generate", *picture_of(PROMPTS[0]), "--out", str(tmp_path / "picture.png"), "--quiet"])


BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize("command", ["policies", "--help"])
def test_a_reader_that_leaves_is_no_error(command: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "arkv.cli", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=BUFFERED,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait() == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_cannot_be_written_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "arkv.cli", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=BUFFERED,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("arkv: error: cannot write to the standard output: ")
    assert done.stderr.count("\n") == 1


def test_help_and_its_errors_import_no_torch() -> None:
    code = (
        "import sys; from arkv import cli; "
        "cli._generate = lambda arguments: (_ for _ in ()).throw(MemoryError()); "
        "assert cli.main(['generate', '--prompt', 'x', '--out', 'x.png']) == 1; "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "out of memory" in done.stderr


def test_bench_splits_policies_outside_brackets_only() -> None:
    assert _split_policies("full,linear:w={1:2,3:4},recent=3,window") == [
        "full",
        "linear:w={1:2,3:4},recent=3",
        "window",
    ]


def test_bench_prints_a_table_and_writes_json_lines(
    tiny: Scenes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.jsonl"
    flags = ("--policies", "full,linear:anchors=2,recent=24", "--batch-sizes", "1", "--repeats", "1")
    printed = arkv_says(capsys, "bench", *flags, "--json", out, "--quiet").splitlines()
    assert printed[1].split()[:3] == ["policy", "batch", "tokens/s"]
    assert [line.split()[0] for line in printed[2:]] == ["full", "linear:anchors=2,recent=24,ratio=1/6"]
    head, *rows = map(json.loads, out.read_text().splitlines())
    for field in ("date", "arkv", "commit", "torch", "cpu", "threads", "device", "dtype", "seed"):
        assert field in head["run"]
    assert [row["policy"] for row in rows] == ["full", "linear:anchors=2,recent=24,ratio=1/6"]
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert row["cold_seconds"] > 0
    assert rows[0]["kv_bytes"] == rows[0]["full_kv_bytes"] == rows[1]["full_kv_bytes"]
    assert rows[1]["kv_bytes"] < rows[0]["kv_bytes"]


def test_bench_goes_on_where_it_was_stopped(
    tiny: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.jsonl"
    flags = ["bench", "--policies", "full,window", "--tokens", "24", "--repeats", "1", "--quiet"]
    arkv_says(capsys, *flags, "--batch-sizes", "1", "--json", out)
    before = out.read_text()
    head, *_ = map(json.loads, before.splitlines())
    assert head["run"]["tokens"] == 24
    assert head["run"]["command"].startswith("arkv bench --policies full,window")
    measured: list[int] = []
    measure = bench.measure

    def counted(model: Scenes, wanted: list[bench.Configuration], **settings: Any) -> Any:
        measured.append(len(wanted))
        return measure(model, wanted, **settings)

    monkeypatch.setattr(bench, "measure", counted)
    printed = arkv_says(capsys, *flags, "--batch-sizes", "1,2", "--json", out, "--plot", tmp_path / "b.png")
    assert measured == [2]
    assert out.read_text().startswith(before)
    assert len(out.read_text().splitlines()) == 1 + 4
    assert [line.split()[1] for line in printed.splitlines()[2:6]] == ["1", "1", "2", "2"]
    assert Image.open(tmp_path / "b.png").width > 1000
    complaint = arkv_says(capsys, *flags, "--batch-sizes", "1", "--seed", "7", "--json", out, status=1)
    assert "seed is 0 there and 7 here" in complaint


def test_bench_walks_the_rows_of_a_table(
    tiny: Scenes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        published.Published("a table", "scenes", method, policy, 2, speed, gigabytes, "a card", note)
        for method, policy, speed, gigabytes, note in (
            ("full cache", "full", 0.5, 8.0, ""),
            ("small", "window:ratio=1/6", 2.0, 3.0, "inferred"),
            ("tiny", "linear:ratio=1/100", 3.0, 2.0, ""),
        )
    ]
    monkeypatch.setitem(published.PRESETS, "linear-table", tuple(rows))
    flags = ["--preset", "linear-table", "--lines", "0,23", "--repeats", "1", "--quiet"]
    title, _, *lines = arkv_says(capsys, "bench", *flags).splitlines()
    assert "lines 0, 23 timed" in title
    assert [line.split()[:2] for line in lines[:2]] == [["full", "2"], ["window:ratio=1/6", "2"]]
    assert lines[2].startswith("linear:ratio=1/100 x 2 is left out: ")
    assert lines[4] == "published, on other hardware:"
    assert [line.split()[0] for line in lines[6:9]] == ["full", "small", "tiny"]
    assert " 4.00x " in lines[7]
    assert lines[7].endswith("3 GB  a table")
    assert lines[9:] == ["a card", "inferred"]
    complaint = arkv_says(capsys, "bench", "--preset", "linear-table", "--model", "lumina", status=1)
    assert "no rows of lumina" in complaint


def test_bench_leaves_out_a_baseline_that_there_is_not(
    tiny: Scenes, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--policies", "window,transformers-dynamic", "--memory", "0.005", "--tokens", "2"]
    *_, row, note = arkv_says(capsys, "bench", *flags, "--repeats", "1", "--quiet").splitlines()
    assert row.startswith("window:ratio=1/6")
    assert int(row.split()[1]) > 1
    assert "is left out: transformers has no scenes" in note


def test_demo_writes_a_sheet_and_prints_scores(
    tiny: Scenes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo.png"
    printed = arkv_says(capsys, "demo", "--judged", "0", "--out", out, "--quiet").splitlines()
    assert [line.split("  ")[0] for line in printed[1:4]] == ["full cache", "LineAR 1/6", "StreamingLLM 1/6"]
    assert all(line.endswith("of 8") for line in printed[1:4])
    assert Image.open(out).width > 8 * 192
