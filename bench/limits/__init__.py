"""What this machine can do at most, measured in the same run as the kernels it is compared with."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("limits.cpp")
# Limit -> unit of its rate (per second).
UNITS = {
    "int8": "op",
    "float32": "op",
    "popcount": "bit",
    "read": "B",
    "tensor read": "B",
    "tensor write": "B",
    "bfloat16": "op",
}

# Large enough that no last-level cache holds a useful part of it.
READ_BYTES = 1 << 30
QUICK_READ_BYTES = 1 << 25


def measure(threads: int, device: str, quick: bool) -> dict[str, float]:
    """Rates per second that `threads` threads (or the GPU) reach together, by limit.

    "int8": multiplications and additions of 8-bit integers into 32-bit sums; "float32": of float32 numbers;
    "popcount": bits compared by xor, population count and add, in registers; "read": bytes streamed from memory in huge
    pages; "tensor read" and "tensor write": bytes streamed from and to memory as PyTorch allocates it, which is in 4 KB
    pages on most machines, a tenth to a quarter slower to read; and on a GPU "bfloat16": multiplications and additions
    on tensor cores.
    """
    return _measure_cuda(quick) if device == "cuda" else _measure_cpu(threads, quick)


def reader(pieces: Sequence[torch.Tensor], threads: int) -> Callable[[], None]:
    """A call that does nothing but read contiguous tensors in memory, as fast as the machine can: a limit that can be
    timed in turns with what has to read the same bytes. The memory of a virtual machine is shared with others, and what
    it delivers changes from second to second."""
    return _through_pieces("read_pieces", pieces, threads)


def writer(pieces: Sequence[torch.Tensor], threads: int) -> Callable[[], None]:
    """The same for what has to write: a call that overwrites contiguous tensors, whose memory begins and ends at
    multiples of 64 bytes."""
    return _through_pieces("write_pieces", pieces, threads)


def _through_pieces(name: str, pieces: Sequence[torch.Tensor], threads: int) -> Callable[[], None]:
    function = getattr(_library(), name)
    addresses = (ctypes.c_void_p * len(pieces))(*[piece.data_ptr() for piece in pieces])
    sizes = (ctypes.c_size_t * len(pieces))(*[piece.nbytes for piece in pieces])
    kept = list(pieces)
    return lambda: function(threads, addresses, sizes, len(kept))


def _measure_cpu(threads: int, quick: bool) -> dict[str, float]:
    library = _library()
    seconds, repeats = (0.005, 2) if quick else (0.05, 5)
    limits = {
        name: max(getattr(library, f"limit_{name}")(threads, seconds) for _ in range(repeats))
        for name in ("int8", "float32", "popcount")
    }
    size = QUICK_READ_BYTES if quick else READ_BYTES
    limits["read"] = library.limit_read(threads, None, size, repeats)
    tensor = torch.ones(size, dtype=torch.uint8)
    limits["tensor read"] = library.limit_read(threads, tensor.data_ptr(), size, repeats)
    limits["tensor write"] = library.limit_write(threads, tensor.data_ptr(), size, repeats)
    return limits


def _measure_cuda(quick: bool) -> dict[str, float]:
    n = 2048 if quick else 8192
    half = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    single = half.float()
    bytes_ = torch.ones(n, n, device="cuda", dtype=torch.int8)
    stream = torch.ones(QUICK_READ_BYTES if quick else 4 * READ_BYTES, device="cuda", dtype=torch.int8).view(
        torch.int64
    )
    operations = 2.0 * n**3
    calls: dict[str, tuple[float, Callable[[], object]]] = {
        "int8": (operations, lambda: torch._int_mm(bytes_, bytes_)),
        "float32": (operations, lambda: single @ single),
        "bfloat16": (operations, lambda: half @ half),
        "read": (stream.nbytes, lambda: stream.max()),
        "tensor read": (stream.nbytes, lambda: stream.max()),
        "tensor write": (stream.nbytes, lambda: stream.fill_(1)),
    }
    return {name: amount / _best_cuda_seconds(call) for name, (amount, call) in calls.items()}


def _best_cuda_seconds(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


@cache
def _library() -> ctypes.CDLL:
    """limits.cpp compiled for this very machine, once per version of the file."""
    source = SOURCE.read_bytes()
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        sys.exit("bench: a C++ compiler is needed to measure the limits of this machine (none on PATH; set CXX)")
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    output = cache_home / "fastembed" / f"limits-{hashlib.sha256(source + compiler.encode()).hexdigest()[:16]}.so"
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = output.with_suffix(f".{os.getpid()}")
        command = [compiler, "-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread", str(SOURCE)]
        subprocess.run([*command, "-o", str(unfinished)], check=True)
        unfinished.rename(output)
    library = ctypes.CDLL(str(output))
    for name in ("int8", "float32", "popcount"):
        getattr(library, f"limit_{name}").argtypes = [ctypes.c_int, ctypes.c_double]
        getattr(library, f"limit_{name}").restype = ctypes.c_double
    for name in ("read_pieces", "write_pieces"):
        getattr(library, name).argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
        getattr(library, name).restype = None
    for name in ("read", "write"):
        getattr(library, f"limit_{name}").argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        getattr(library, f"limit_{name}").restype = ctypes.c_double
    return library
