"""Layouts of pictures, read back the way that the official evaluators read them."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import tracemalloc
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from arkv.errors import ArkvError
from arkv.jobs.job import Job, picture_seed
from arkv.pictures.layout import Picture, PictureFile
from arkv.pictures.layouts import LAYOUTS
from arkv.pictures.npz import write_npz
from arkv.pictures.prompts import Prompt


def prompts(count: int) -> list[Prompt]:
    return [
        Prompt(f"prompt {i}", f"partiprompts{i}", f"line {i + 1}", {"tag": "t", "prompt": f"prompt {i}"})
        for i in range(count)
    ]


def picture(value: int, size: tuple[int, int] = (4, 4)) -> Image.Image:
    return Image.new("RGB", size, (value, 255 - value, 7))


def lay_out(name: str, items: list[Prompt], samples: int, folder: Path) -> None:
    """As a job does it, in another order; picture n is filled with the value n."""
    layout = LAYOUTS[name]
    layout.check(items, samples)
    files = Job(items, name, samples).files
    for file, content in layout.beside(items).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    for file in files:
        (folder / file.file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.file).write_bytes(
            layout.content(drawn(name, items, samples, file), {"policy": "none"})
        )
    if (archive := layout.archive(None)) is not None:
        pictures = [folder / file.file for file in sorted(files, key=lambda file: file.pictures)]
        layout.write_archive(folder / archive, pictures, None)


def drawn(name: str, items: list[Prompt], samples: int, file: PictureFile) -> list[Picture]:
    job = Job(items, name, samples)
    return [
        Picture(number, picture(number % 256), job.prompt(number), job.picture_seed(number))
        for number in file.pictures
    ]


@pytest.mark.parametrize("name", sorted(LAYOUTS))
@given(count=st.integers(1, 20), samples=st.integers(1, 4), batch_size=st.integers(1, 50))
def test_every_picture_has_one_place_and_every_file_one_unit(
    name: str, count: int, samples: int, batch_size: int
) -> None:
    items = [replace(item, prompt="p" * (i * 7 % 5 + 1)) for i, item in enumerate(prompts(count))]
    job = Job(items, name, samples)
    numbers = [number for file in job.files for number in file.pictures]
    assert numbers == job.order
    assert sorted(numbers) == list(range(count * samples))
    assert len({file.file for file in job.files}) == len(job.files)
    shown = Counter(job.prompt(number).name for number in numbers)
    assert shown == dict.fromkeys((item.name for item in items), samples)
    lengths = [len(job.prompt(number).prompt) for number in numbers]
    assert lengths == sorted(lengths, reverse=True), "the longest first"
    assert [file for unit in job.units(batch_size) for file in unit] == job.files
    for unit in job.units(batch_size):
        assert len(unit) == 1 or sum(len(file.pictures) for file in unit) <= batch_size
    if name == "dpg":
        assert all(len({job.prompt(number).name for number in file.pictures}) == 1 for file in job.files)


def test_geneval_finds_records_and_samples(tmp_path: Path) -> None:
    """The walk of GenEval's evaluate_images.py."""
    items = prompts(3)
    (tmp_path / "index.jsonl").touch()
    lay_out("geneval", items, 4, tmp_path)
    found = {}
    for folder in os.listdir(tmp_path):
        if not os.path.isdir(tmp_path / folder) or not folder.isdigit():
            continue
        metadata = json.loads((tmp_path / folder / "metadata.jsonl").read_text())
        names = [name for name in os.listdir(tmp_path / folder / "samples") if re.match(r"\d+\.png", name)]
        found[metadata["prompt"]] = sorted(
            Image.open(tmp_path / folder / "samples" / name).getpixel((0, 0))[0] for name in names
        )
        assert metadata == items[int(folder)].record
    assert found == {"prompt 0": [0, 1, 2, 3], "prompt 1": [4, 5, 6, 7], "prompt 2": [8, 9, 10, 11]}


@pytest.mark.parametrize("samples", [1, 2, 3, 4])
def test_dpg_bench_cuts_out_the_samples(samples: int, tmp_path: Path) -> None:
    """The crops of DPG-Bench's compute_dpg_bench.py with --pic-num and --resolution."""
    lay_out("dpg", prompts(2), samples, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["partiprompts0.png", "partiprompts1.png"]
    sheet, side = Image.open(tmp_path / "partiprompts1.png"), 4
    assert sheet.size == ((side, side) if samples == 1 else (2 * side, 2 * side))
    corners = [(0, 0), (side, 0), (0, side), (side, side)][:samples]
    crops = [sheet.crop((x, y, x + side, y + side)) for x, y in corners]
    wanted = [picture(samples + sample) for sample in range(samples)]
    assert [crop.tobytes() for crop in crops] == [one.tobytes() for one in wanted]


def test_every_part_of_a_flat_folder_shows_all_prompts() -> None:
    """An inception score is taken over parts of consecutive pictures, by their names."""
    job = Job(prompts(10), "npz", 5)
    files = sorted(job.files, key=lambda file: file.file)
    assert [file.pictures for file in files] == [(number,) for number in range(50)]
    for start in range(0, 50, 10):
        shown = {job.prompt(number).name for file in files[start : start + 10] for number in file.pictures}
        assert len(shown) == 10
    assert [file.file for file in files[:2]] == ["000000.png", "000001.png"]


def test_a_webdataset_has_pictures_texts_and_how_they_were_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arkv.pictures.layouts.SHARD", 4)
    items = [*prompts(2), Prompt(207, "207", "line 3")]
    lay_out("webdataset", items, 2, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["000000.tar", "000001.tar"]
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(tmp_path.iterdir()):
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, suffix = member.name.partition(".")
                found = archive.extractfile(member)
                assert found is not None
                samples.setdefault(key, {})[suffix] = found.read()
                assert (member.mtime, member.uid, member.uname) == (0, 0, "")
    assert len(samples) == 6
    for key, sample in samples.items():
        number = int(key)
        job = Job(items, "webdataset", 2)
        assert Image.open(io.BytesIO(sample["png"])).getpixel((0, 0))[0] == number
        told = json.loads(sample["json"])
        assert told["seed"] == job.picture_seed(number)
        assert told["policy"] == "none"
        text = sample["cls" if number % 3 == 2 else "txt"].decode()
        assert text == str(items[number % 3].prompt) == str(told["prompt"])


def test_a_table_is_one_that_datasets_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("arkv.pictures.layouts.SHARD", 4)
    lay_out("parquet", prompts(3), 2, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["000000.parquet", "000001.parquet"]
    rows = [row for shard in sorted(tmp_path.iterdir()) for row in parquet.read_table(shard).to_pylist()]
    assert [row["number"] for row in rows] == Job(prompts(3), "parquet", 2).order
    for row in rows:
        assert row["prompt"] == f"prompt {row['number'] % 3}"
        assert row["seed"] == picture_seed(0, row["number"])
        assert row["image"]["path"] == f"{row['number']:09d}.png"
        assert Image.open(io.BytesIO(row["image"]["bytes"])).getpixel((0, 0))[0] == row["number"]
    metadata = parquet.read_schema(tmp_path / "000000.parquet").metadata
    assert json.loads(metadata[b"huggingface"])["info"]["features"]["image"] == {"_type": "Image"}
    assert json.loads(metadata[b"arkv"]) == {"policy": "none"}


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_the_same_pictures_are_the_same_file(name: str) -> None:
    items = prompts(2)
    file = Job(items, name, 2).files[0]
    one, two = (LAYOUTS[name].content(drawn(name, items, 2, file), {"a": "b"}) for _ in range(2))
    assert one == two


def test_npz_is_what_numpy_would_write(tmp_path: Path) -> None:
    lay_out("npz", prompts(3), 2, tmp_path)
    wanted = numpy.stack([numpy.asarray(picture(number)) for number in range(6)])
    numpy.savez(tmp_path / "naive.npz", arr_0=wanted)
    with numpy.load(tmp_path / "samples.npz") as found:
        assert list(found) == ["arr_0"]
        assert found["arr_0"].dtype == numpy.uint8
        numpy.testing.assert_array_equal(found["arr_0"], wanted)
    with zipfile.ZipFile(tmp_path / "samples.npz") as ours, zipfile.ZipFile(tmp_path / "naive.npz") as naive:
        assert ours.read("arr_0.npy") == naive.read("arr_0.npy")
        assert ours.infolist()[0].compress_type == zipfile.ZIP_STORED
    assert not list(tmp_path.glob(".*"))


def test_npz_is_the_same_every_time_and_never_half(tmp_path: Path) -> None:
    pictures = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(pictures):
        picture(i, (5, 3)).save(path)
    write_npz(tmp_path / "one.npz", pictures)
    write_npz(tmp_path / "two.npz", pictures)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    assert numpy.load(tmp_path / "one.npz")["arr_0"].shape == (3, 3, 5, 3)
    picture(9).save(pictures[2])
    with pytest.raises(ArkvError, match=r"2\.png is 4 x 4, others are 5 x 3"):
        write_npz(tmp_path / "three.npz", pictures)
    pictures[2].write_bytes(pictures[1].read_bytes()[:50])
    with pytest.raises(ArkvError, match=r"cannot read .*2\.png"):
        write_npz(tmp_path / "three.npz", pictures)
    assert sorted(os.listdir(tmp_path)) == ["0.png", "1.png", "2.png", "one.npz", "two.npz"]


def test_npz_holds_one_picture_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    picture(3, (256, 256)).save(path)
    write_npz(tmp_path / "warm.npz", [path])
    tracemalloc.start()
    write_npz(tmp_path / "samples.npz", [path] * 40)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 256 * 256 * 3, "of 40 pictures"


def test_npz_can_be_of_resized_pictures(tmp_path: Path) -> None:
    """As LlamaGen's sample_c2i_ddp.py resizes, but that colours are whole numbers before."""
    rng = numpy.random.default_rng(0)
    drawn = rng.integers(0, 256, (3, 12, 12, 3), dtype=numpy.uint8)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, pixels in zip(paths, drawn, strict=True):
        Image.fromarray(pixels).save(path)
    write_npz(tmp_path / "small.npz", paths, side=8)
    found = numpy.load(tmp_path / "small.npz")["arr_0"]
    colours = torch.from_numpy(drawn).permute(0, 3, 1, 2) / 127.5 - 1
    resized = torch.nn.functional.interpolate(colours, size=(8, 8), mode="bicubic")
    wanted = torch.clamp(127.5 * resized + 128.0, 0, 255).permute(0, 2, 3, 1).to(torch.uint8)
    assert found.shape == (3, 8, 8, 3)
    difference = numpy.abs(found.astype(int) - wanted.numpy().astype(int))
    assert difference.max() <= 1
    assert difference.mean() < 0.01, "halves may be rounded to either side"


BAD = {
    "no record": ("geneval", [Prompt("x", "x", "list.txt, line 1")], 4, "list.txt, line 1 has no record"),
    "five in a square": ("dpg", prompts(1), 5, "room for 1 to 4 samples"),
    "same name twice": ("dpg", [*prompts(1), *prompts(1)], 4, "line 1 and line 1 are both named"),
    "name with a slash": ("dpg", [Prompt("x", "../x", "line 1")], 4, "which no file can be"),
    "hidden name": ("dpg", [Prompt("x", ".x", "line 1")], 4, "which no file can be"),
}


@pytest.mark.parametrize(("name", "items", "samples", "complaint"), BAD.values(), ids=BAD)
def test_what_an_evaluator_could_not_read_is_refused(
    name: str, items: list[Prompt], samples: int, complaint: str
) -> None:
    with pytest.raises(ArkvError, match=complaint):
        LAYOUTS[name].check(items, samples)


def test_dpg_bench_takes_squares_only() -> None:
    with pytest.raises(ArkvError, match="the pictures are 6 x 4"):
        LAYOUTS["dpg"].content([Picture(0, picture(0, (6, 4)), prompts(1)[0], 0)], {})
