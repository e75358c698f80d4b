"""What was measured on, and how many threads its libraries use."""

import ctypes
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastembed
from fastembed._native import core

ROOT = Path(__file__).parent.parent.parent
PEERS = (
    "torch",
    "sentence-transformers",
    "transformers",
    "faiss-cpu",
    "usearch",
    "turbovec",
    "onnxruntime",
    "xllamacpp",
    "auto-round-lib",
    "numpy",
    "triton",
)


def set_threads(threads: int) -> None:
    """Give every loaded library the same number of threads, and those that start threads in Rust."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # read once, when the first of them is needed
    torch.set_num_threads(threads)
    if (faiss := sys.modules.get("faiss")) is not None:
        faiss.omp_set_num_threads(threads)


_held: list[int] = []  # memory that nobody shall use


def reuse_memory(reuse: bool) -> None:
    """Whether what a program frees is kept for its next allocations, or given back so that each gets fresh pages.

    By itself glibc does now one and now the other with tensors of 128 KB to 32 MB, and writing fresh pages, which the
    system has to clear, takes several times as long. Does nothing where the allocator is another.
    """
    libc = ctypes.CDLL(None)
    if sys.platform != "linux" or not hasattr(libc, "mallopt"):
        return
    trim_threshold, mmap_threshold, is_mapped = -1, -3, 2  # malloc.h, and a bit of the size before every allocation
    libc.malloc.restype = ctypes.c_void_p
    while _held:
        libc.free(ctypes.c_void_p(_held.pop()))
    libc.mallopt(trim_threshold, 2**31 - 1 if reuse else 1 << 17)
    libc.mallopt(mmap_threshold, 1 << (25 if reuse else 17))
    if not reuse:  # what is free already would be used again
        libc.malloc_trim(0)
        while True:
            at = int(libc.malloc(1 << 18))
            _held.append(at)
            if ctypes.c_size_t.from_address(at - 8).value & is_mapped:
                break


def without_gradients(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same call in inference mode, as models are used that are not trained."""

    def run() -> Any:
        with torch.inference_mode():
            return call()

    return run


def require_device(device: str) -> None:
    """Exit with the reason where the device asked for is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"bench: --device cuda needs a GPU that PyTorch can use; PyTorch {torch.__version__} finds none")


def describe(device: str) -> dict[str, str]:
    """The circumstances that every result row carries."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "cpu": _cpu_name(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "isa": core.isa(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join([f"fastembed-kernels {fastembed.__version__}", *_versions()]),
    }


def _versions() -> list[str]:
    found = []
    for name in PEERS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return found


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + (" with changes" if changes.stdout else "")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
