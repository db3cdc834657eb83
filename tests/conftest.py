"""What all tests share: one thread, a policy, and how many examples hypothesis tries."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from sums import Sums

# `pytest --hypothesis-profile=nightly` works as well as the variable.
slow_is_fine = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile(
    "ci", max_examples=60, deadline=None, derandomize=True, suppress_health_check=slow_is_fine
)
settings.register_profile("nightly", max_examples=2000, deadline=None, suppress_health_check=slow_is_fine)
settings.load_profile(os.environ.get("ARKV_HYPOTHESIS_PROFILE", "ci"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m gpu` is every test whose name says so."""
    for item in items:
        if item.name.startswith("test_gpu_"):
            item.add_marker("gpu")


@pytest.fixture
def device() -> torch.device:
    """The GPU; with ARKV_GPU_TESTS=dry the CPU, to find what needs no GPU to be found."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if os.environ.get("ARKV_GPU_TESTS") == "dry":
        return torch.device("cpu")
    pytest.skip("needs a CUDA GPU")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Keeps torch to one thread: on a busy machine many threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def sums() -> type[Sums]:
    """A policy whose heads may have any budgets, and lend each other slots."""
    return Sums
