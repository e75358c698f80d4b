"""The compiled core, loaded after PyTorch where PyTorch is installed.

The order matters: the core needs `libgomp.so.1`, and PyTorch's wheel carries its own copy. Whoever loads first decides
which copy the process uses, and two OpenMP pools on the same cores stall each other by milliseconds per call.
"""

import importlib
import importlib.util
from typing import Any

try:
    import torch
except ModuleNotFoundError:
    torch = None  # type: ignore[assignment]

from . import _core as core

# Absent where it was not built; present but failing is an error to show, not to hide.
cuda: Any = importlib.import_module("._cuda", __package__) if importlib.util.find_spec("._cuda", __package__) else None

__all__ = ["core", "cuda", "num_threads", "torch"]


def num_threads() -> int:
    """Threads the kernels may use: what `torch.set_num_threads` says, or 0 (OpenMP decides) without PyTorch."""
    return torch.get_num_threads() if torch is not None else 0
