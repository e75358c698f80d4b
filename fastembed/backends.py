"""Which implementation an op runs: `cpu`, `cuda`, `triton` or `reference`.

Without being told, an op takes the best implementation it has for the device and dtype of its inputs, and the plain
PyTorch reference where it has none. `use_backend` or the environment variable FASTEMBED_BACKEND force one, and then a
missing one is an error, never a silent fallback.
"""

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from . import _native

BACKENDS = ("cpu", "cuda", "triton", "reference")

_forced: ContextVar[str | None] = ContextVar("fastembed_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force the backend of every fastembed op inside the `with` block.

    Args:
        name: "cpu" (C++ kernels), "cuda" (CUDA C++ kernels), "triton", or "reference" (plain PyTorch).

    Raises:
        ValueError: the name is none of these.
        RuntimeError: the backend is not available; the message says why.
    """
    _require_available(_check_name(name, "name"))
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def requested_backend() -> str | None:
    """What `use_backend` or FASTEMBED_BACKEND names, whether it can run here or not; None without either."""
    return _forced.get() or _native.core.requested_backend() or None


def forced_backend() -> str | None:
    """The backend that `use_backend` or FASTEMBED_BACKEND asks for, or None.

    Raises:
        ValueError: FASTEMBED_BACKEND names none.
        RuntimeError: the backend is not available; the message says why.
    """
    if (name := requested_backend()) is not None and _forced.get() is None:
        _require_available(_check_name(name, "FASTEMBED_BACKEND"))
    return name


def unavailable_reason(name: str) -> str | None:
    """Why a backend cannot run here, or None when it can."""
    if name == "cuda":
        if _native.cuda is None:
            return "the CUDA kernels were not compiled (nvcc was not found, or FASTEMBED_CUDA=0, at installation)"
        if _native.cuda.device_count() == 0:
            return "no CUDA driver or device"
        if (reason := _wrong_architecture(_native.cuda)) is not None:
            return reason
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed (pip install 'fastembed-kernels[triton]')"
        if not triton_is_interpreted() and (_native.torch is None or not _native.torch.cuda.is_available()):
            return "no GPU that PyTorch can use (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    if name == "reference" and _native.torch is None:
        return "PyTorch is not installed (pip install 'fastembed-kernels[torch]')"
    return None


@functools.cache
def _wrong_architecture(cuda: Any) -> str | None:
    """Why kernels compiled for other GPUs cannot run on this one, as PyTorch sees it."""
    if cuda_is_simulated() or _native.torch is None or not _native.torch.cuda.is_available():
        return None
    major, minor = _native.torch.cuda.get_device_capability()
    ours = 100 * major + 10 * minor
    compiled = cuda.architectures
    if ours >= max(compiled) or any(arch // 100 == major and arch <= ours for arch in compiled):
        return None
    names = ", ".join(f"{arch // 100}.{arch // 10 % 10}" for arch in compiled)
    return f"the CUDA kernels were compiled for compute capability {names}, and this GPU has {major}.{minor}"


def triton_is_interpreted() -> bool:
    """Whether Triton kernels run in Triton's CPU interpreter, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def cuda_is_simulated() -> bool:
    """Whether the CUDA kernels in use were compiled for the CPU by tests/cuda_on_cpu."""
    return getattr(_native.cuda, "simulated", False)


def _check_name(name: str, argument: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def _require_available(name: str) -> None:
    if (reason := unavailable_reason(name)) is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
