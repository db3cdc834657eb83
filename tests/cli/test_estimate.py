"""`arkv estimate`."""

from __future__ import annotations

import pytest
from saying import arkv_says

import arkv
from arkv.store import Store


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


def test_a_ratio_that_was_not_given_is_not_one_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    told = arkv_says(capsys, "estimate", "--policy", "linear", status=1)
    assert "give a budget in slots or a ratio" in told
    assert "both" not in told


def test_memory_says_how_many_pictures_fit_by_policy(capsys: pytest.CaptureFixture[str]) -> None:
    printed = arkv_says(capsys, "estimate", "--memory", "1GB").splitlines()
    pictures = {line.split()[0]: line.split()[1].replace(",", "") for line in printed[2:]}
    assert int(pictures["full"]) < int(pictures["window:ratio=1/6"])
    lines = arkv_says(
        capsys, "estimate", "--memory", "1", "--policy", "window", "--ratio", "1/6"
    ).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["full", "window:ratio=1/6"]
    fits = int(pictures["window:ratio=1/6"])
    flags = ("estimate", "--policy", "window:ratio=1/6", "--batch-size")
    for count, inside in ((fits, True), (fits + 1, False)):
        (total,) = (
            line for line in arkv_says(capsys, *flags, str(count)).splitlines() if line.startswith("total")
        )
        assert (int(total.split()[-1].replace(",", "")) <= 10**9) is inside


def test_memory_for_the_weights_alone_holds_no_picture(capsys: pytest.CaptureFixture[str]) -> None:
    printed = arkv_says(capsys, "estimate", "--memory", "0.001", "--policy", "window").splitlines()
    assert [line.split()[1] for line in printed[2:]] == ["0", "0"]
