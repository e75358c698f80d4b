"""Fixtures shared by the CPU suites."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from isa_levels import supported_isa_levels

from fastembed._native import core
from fastembed.backends import unavailable_reason

# Timing on a shared machine says nothing about correctness: no deadlines. Derandomised, so that a red run can be
# repeated; `pytest --hypothesis-profile=explore` looks further, `quick` serves slow builds of the core.
_common = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
settings.register_profile("default", derandomize=True, max_examples=40, **_common)
settings.register_profile("quick", derandomize=True, max_examples=4, **_common)
settings.register_profile("explore", max_examples=1000, **_common)
settings.load_profile("default")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    # More threads than cores: those that wait for the next loop must not spin.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    from parallel import ByFile

    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # a process of `pytest -n`
        from parallel import longest_first

        longest_first(items)


@pytest.fixture(params=supported_isa_levels())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction-set level that this machine has."""
    before = core.isa()
    core.set_isa(request.param)
    yield request.param
    core.set_isa(before)


@pytest.fixture
def thread_counts() -> Iterator[tuple[int, ...]]:
    """Thread counts to compare; the setting before the test is restored."""
    before = torch.get_num_threads()
    yield (1, 2, 3)
    torch.set_num_threads(before)


@pytest.fixture
def uninitialised_memory_is_nan() -> Iterator[None]:
    """PyTorch fills what it allocates, so that reading what nothing wrote, or writing nothing, shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend that runs on this machine's GPU; tests with one of them only parametrize it indirectly."""
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    if (reason := unavailable_reason(request.param)) is not None:
        pytest.skip(reason)
    return request.param
