import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from arkv.checkpoint import read_config, read_weights_
from arkv.errors import CheckpointError


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
        read_weights_(net, path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert not net.weight.any(), "nothing is copied from a file that does not fit"
    return message


def test_every_tensor_is_copied_in_the_modules_dtype(tmp_path: Path) -> None:
    net = Net().to(torch.bfloat16)
    place = net.weight.data_ptr()
    read_weights_(net, save(tmp_path / "net.safetensors"))
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
