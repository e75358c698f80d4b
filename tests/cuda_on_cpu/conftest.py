"""The simulated CUDA module, in place of the real one."""

import os
from collections.abc import Iterator
from types import ModuleType

import pytest

import fastembed
from fastembed import _native

from . import build

# Set by test_sanitizers.py for the process that it starts.
SANITIZER = os.environ.get("CUDA_ON_CPU_SANITIZER", "none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if (reason := build.unavailable_reason()) is not None:
        for item in items:
            if item.path.parent == build.SHIM.parent and item.path.name != "test_rewriter.py":
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def simulated_module() -> ModuleType:
    return build.load(build.module(SANITIZER))


@pytest.fixture
def simulated_cuda(simulated_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every fastembed op runs its CUDA kernels, simulated, on CPU tensors."""
    monkeypatch.setattr(_native, "cuda", simulated_module)
    with fastembed.use_backend("cuda"):
        yield


@pytest.fixture(params=["asc", "desc", "random"])
def thread_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Order in which blocks and threads run."""
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", request.param)
    monkeypatch.setenv("CUDA_ON_CPU_SEED", "1")
    return request.param


@pytest.fixture(params=["late", "eager"])
def copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """When asynchronous copies happen: once they are waited for, or at once."""
    monkeypatch.setenv("CUDA_ON_CPU_COPIES", request.param)
    return request.param


@pytest.fixture
def small_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a block, as on devices of compute capability 8.6, 8.9 and 12."""
    monkeypatch.setenv("CUDA_ON_CPU_SHARED", str(99 * 1024))
