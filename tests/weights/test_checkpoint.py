import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from arkv.errors import CheckpointError
from arkv.models.pretrained import slots_of
from arkv.weights.checkpoint import WeightSlot, load_weights_, tensor_names
from arkv.weights.files import read_config, weight_files


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))
        self.register_buffer("table", torch.zeros(4))
        self.register_buffer("made", torch.ones(1), persistent=False)


def save(path: Path, **tensors: torch.Tensor) -> Path:
    save_file({"weight": torch.ones(2, 3), "table": torch.arange(4.0)} | tensors, path)
    return path


def refusal(path: Path) -> str:
    net = Net()
    with pytest.raises(CheckpointError) as caught:
        load_weights_(slots_of(net), [path])
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert not net.weight.any(), "nothing is copied from a file that does not fit"
    return message


def test_every_tensor_is_copied_in_the_modules_dtype(tmp_path: Path) -> None:
    net = Net().to(torch.bfloat16)
    place = net.weight.data_ptr()
    load_weights_(slots_of(net), [save(tmp_path / "net.safetensors")])
    assert net.weight.dtype == torch.bfloat16
    assert net.weight.data_ptr() == place
    assert torch.equal(net.weight, torch.ones(2, 3, dtype=torch.bfloat16))
    assert net.table.tolist() == [0, 1, 2, 3]
    assert net.weight.requires_grad


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "there is no checkpoint" in refusal(tmp_path / "absent.safetensors")
    assert "there is no checkpoint" in refusal(tmp_path)


@pytest.mark.parametrize("share", [0, 4, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    path = save(tmp_path / "net.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[: int(share if share > 1 else share * len(content))])
    assert "damaged" in refusal(path)


def test_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    torch.save({"weight": torch.ones(2, 3)}, path)
    assert "damaged or not a safetensors file" in refusal(path)


def test_every_tensor_that_does_not_fit_is_named_with_both_shapes(tmp_path: Path) -> None:
    path = save(tmp_path / "net.safetensors", weight=torch.ones(3, 2), extra=torch.ones(5, 1))
    message = refusal(path)
    assert "weight has shape (3, 2), the model wants (2, 3)" in message
    assert "extra (5, 1) is unexpected" in message
    save_file({"table": torch.zeros(4)}, path)
    assert "weight (2, 3) is missing" in refusal(path)


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


def complaint(slots: dict[str, WeightSlot], *files: Path, unused: tuple[str, ...] = ()) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_weights_(slots, files, unused)
    message = str(caught.value)
    assert "\n" not in message
    assert not any(slot.target.any() for slot in slots.values()), "nothing is copied from what does not fit"
    return message


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_tensors_of_all_files_go_where_their_slots_say(tmp_path: Path, suffix: str) -> None:
    fused = torch.zeros(5, 3, dtype=torch.bfloat16)
    swapped, repeated = torch.zeros(2, 4), torch.zeros(3, 2)
    slots = {
        "a": WeightSlot(fused[:2]),
        "b": WeightSlot(fused[2:]),
        "c": WeightSlot(swapped, lambda x: x.flip(0)),
        "d": WeightSlot(repeated, lambda x: x.repeat(3, 1), (1, 2)),
    }
    first = write(tmp_path / f"1{suffix}", {"a": torch.ones(2, 3), "d": torch.tensor([[4.0, 5.0]])})
    second = {"b": torch.full((3, 3), 2.0), "c": torch.arange(8.0).reshape(2, 4), "x.y": torch.ones(9)}
    load_weights_(slots, [first, write(tmp_path / f"2{suffix}", second)], unused=["x.*"])
    assert fused.tolist() == [[1] * 3] * 2 + [[2] * 3] * 3
    assert swapped.tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]
    assert repeated.tolist() == [[4, 5]] * 3
    assert tensor_names(first) == {"a", "d"}


@pytest.mark.parametrize("wrap", ["model", "module", "state_dict", None])
@pytest.mark.parametrize("zipped", [True, False])
def test_what_training_programs_write_is_unwrapped(tmp_path: Path, wrap: str | None, zipped: bool) -> None:
    content: dict = {"weight": torch.ones(2)}
    if wrap:
        content = {wrap: content, "steps": 7, "args": Namespace(lr=0.1), "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    target = torch.zeros(2)
    load_weights_({"weight": WeightSlot(target)}, [tmp_path / "x.pt"])
    assert target.tolist() == [1, 1]


class Planted:
    def __reduce__(self) -> tuple:
        return (print, ("executed",))


def test_a_file_that_wants_to_execute_something_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"weight": torch.ones(2), "more": Planted()}, tmp_path / "x.pt")
    assert "damaged or not a file of weights" in complaint(
        {"weight": WeightSlot(torch.zeros(2))}, tmp_path / "x.pt"
    )
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_a_truncated_torch_file_is_refused(tmp_path: Path, share: float) -> None:
    path = write(tmp_path / "x.pt", {"weight": torch.ones(300)})
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    message = complaint({"weight": WeightSlot(torch.zeros(300))}, path)
    assert str(path) in message
    assert "damaged" in message


def test_something_else_than_tensors_is_refused(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "x.pt")
    assert "holds a list" in complaint({"weight": WeightSlot(torch.zeros(2))}, tmp_path / "x.pt")


def test_tensors_of_all_layers_are_named_together(tmp_path: Path) -> None:
    slots = {f"layers.{i}.{n}": WeightSlot(torch.zeros(2)) for i in range(30) for n in ("q", "k")}
    slots["head"] = WeightSlot(torch.zeros(3))
    tensors = {name: torch.ones(2) for name in slots if not name.endswith("k")} | {
        "layers.3.k": torch.ones(1)
    }
    message = complaint(slots, write(tmp_path / "x.safetensors", tensors))
    assert "layers.*.k (29 of them) (2,) is missing" in message
    assert "layers.3.k has shape (1,), the model wants (2,)" in message
    assert "head has shape (2,), the model wants (3,)" in message


def test_a_long_list_of_problems_is_cut(tmp_path: Path) -> None:
    tensors = {"weight": torch.ones(1)} | {f"extra{i}": torch.ones(1) for i in range(50)}
    message = complaint({"weight": WeightSlot(torch.zeros(1))}, write(tmp_path / "x.bin", tensors))
    assert "and 20 more" in message


def test_a_checkpoint_of_another_model_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "x.bin", {f"other.{i}": torch.ones(1) for i in range(50)})
    message = complaint({"weight": WeightSlot(torch.zeros(1))}, path)
    assert "belongs to another model" in message
    assert "other.0, other.1, other.10, ..." in message


def test_quantised_weights_are_not_taken_for_plain_ones(tmp_path: Path) -> None:
    for dtype in (torch.int8, torch.float8_e4m3fn):
        for suffix in (".safetensors", ".bin"):
            path = write(tmp_path / f"x{suffix}", {"weight": torch.ones(2).to(dtype)})
            assert "weight is quantised" in complaint({"weight": WeightSlot(torch.zeros(2))}, path)


def test_a_conversion_to_the_wrong_shape_is_not_broadcast(tmp_path: Path) -> None:
    path = write(tmp_path / "x.bin", {"weight": torch.ones(1)})
    with pytest.raises(ValueError, match="weight is converted to"):
        load_weights_({"weight": WeightSlot(torch.zeros(2), lambda x: x, (1,))}, [path])


def test_weight_files_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no weights"):
        weight_files(tmp_path)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "2.bin", "b": "1.bin", "c": "2.bin"}}))
    (tmp_path / "1.bin").touch()
    with pytest.raises(CheckpointError, match=r"lacks 2\.bin \(1 of 2 shards"):
        weight_files(tmp_path)
    (tmp_path / "2.bin").touch()
    assert weight_files(tmp_path) == [tmp_path / "1.bin", tmp_path / "2.bin"]
    (tmp_path / "model.safetensors").touch()
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "?"])
def test_a_broken_index_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        weight_files(tmp_path)


PEAK = """
import sys
from pathlib import Path
import torch
from arkv.weights.checkpoint import WeightSlot, load_weights_

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

load_weights_({"x": WeightSlot(torch.zeros(1))}, [Path(sys.argv[2])])  # what loading imports and starts
before = peak()
dtype = getattr(torch, sys.argv[3])
slots = {f"layers.{i}": WeightSlot(torch.empty(1024, 1024, dtype=dtype)) for i in range(50)}
load_weights_(slots, [Path(sys.argv[1])])
print((peak() - before) / sum(slot.target.nbytes for slot in slots.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize(("suffix", "dtype"), [(".safetensors", "float32"), (".bin", "bfloat16")])
def test_loading_takes_little_more_memory_than_the_model(tmp_path: Path, suffix: str, dtype: str) -> None:
    tensors = {f"layers.{i}": torch.full((1024, 1024), float(i)) for i in range(50)}
    path = write(tmp_path / f"large{suffix}", tensors)  # 210 MB
    small = write(tmp_path / f"small{suffix}", {"x": torch.ones(1)})
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, path, small, dtype], capture_output=True, text=True, check=True
    )
    assert float(ran.stdout) < 1.15


def test_a_configuration_is_a_json_object(tmp_path: Path) -> None:
    path = tmp_path / "net.json"
    path.write_text('{"layers": 2}')
    assert read_config(path) == {"layers": 2}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[1]", "not a JSON object"),
        (None, "read"),
    ],
)
def test_a_broken_configuration_is_named(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    path = tmp_path / "net.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as caught:
        read_config(path)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_checkpoint_that_the_package_reads_can_execute_code() -> None:
    import arkv
    import arkv.models
    import arkv.policies

    folders = {Path(folder) for package in (arkv, arkv.models, arkv.policies) for folder in package.__path__}
    sources = [path for folder in folders for path in folder.rglob("*.py")]
    assert len(sources) > 20
    for source in sources:
        for call in re.findall(r"torch\.load\([^)]*\)", source.read_text()):
            assert "weights_only=True" in call, source
        assert not re.search(
            r"\bpickle\b|\beval\(|\bexec\(", re.sub(r"\.eval\(\)", "", source.read_text())
        ), source
