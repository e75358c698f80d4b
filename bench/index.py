"""Indexes: inverted lists beside the flat search of the same rows, opening a file, and the memory that a search takes.

The codes (`clustered_codes`) are clustered as embeddings are, on two levels: a code is one of 100,000 subtopics, a
subtopic one of 1,000 topics, each time with every bit flipped with probability 1/4; a topic is random bits. So the
codes of a subtopic differ from each other in 37.5% of their bits, those of a topic in 47%, any others in half. Queries
are further codes of random subtopics; their nearest rows are the nearest of some hundred in the same subtopic, which
one list seldom holds.

The error is 1 - Recall@10 against the exact search, except for the memory case: there it is the growth of resident
memory while searching a mapped index, divided by the bytes of its codes.
"""

import atexit
import functools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from fastembed import BinaryIndex, IVFBinaryIndex
from fastembed.integrations.faiss import to_faiss

from . import Case, Context, Faster, Reached, Within, Workload
from .harness.workload import OURS

K = 10
DIM = 1024
MOST_SECONDS_TO_OPEN = 0.05
TOPICS, SUBTOPICS = 1_000, 100_000
FLAT = "fastembed flat"
FAISS_LISTS = "FAISS, the same lists"


def cases() -> Iterator[Case]:
    yield Case("10^7 codes of 1024 bits in 4096 lists, 1 query", _inverted(1))
    yield Case("10^7 codes of 1024 bits in 4096 lists, 64 queries", _inverted(64))
    yield Case("opening 10^7 codes of 1024 bits", _opening())
    yield Case("resident memory of a search of 10^7 mapped codes", _memory())


def clustered_codes(count: int, queries: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [count, DIM / 8] codes and [queries, DIM / 8] queries, as described above."""
    rng = np.random.default_rng(seed)

    def noisy(codes: np.ndarray) -> np.ndarray:
        """Each bit flipped with probability 1/4."""
        return codes ^ (_random_bytes(rng, codes.shape) & _random_bytes(rng, codes.shape))

    topics = _random_bytes(rng, (TOPICS, DIM // 8))
    subtopics = noisy(topics[rng.integers(0, TOPICS, SUBTOPICS)])
    codes = np.empty((count, DIM // 8), np.uint8)
    for start in range(0, count, 1 << 18):
        rows = codes[start : start + (1 << 18)]
        rows[:] = noisy(subtopics[rng.integers(0, SUBTOPICS, len(rows))])
    return codes, noisy(subtopics[rng.integers(0, SUBTOPICS, queries)])


def _random_bytes(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(rng.bytes(int(np.prod(shape))), np.uint8).reshape(shape)


class _Indexes:
    """The same rows in every index, made once for all cases."""

    def __init__(self, count: int, lists: int, nprobe: int) -> None:
        codes, self.queries = clustered_codes(count, 64)
        self.inverted = IVFBinaryIndex(DIM, lists=lists, nprobe=nprobe)
        self.inverted.train(codes[: 64 * lists])
        self.inverted.add(codes)
        self.flat = BinaryIndex(DIM)
        self.flat.add(codes)
        self.faiss = to_faiss(self.inverted)
        self.farthest = self.flat.search(self.queries, K)[0][:, -1]
        folder = Path(tempfile.mkdtemp(prefix="fastembed-bench-"))
        atexit.register(shutil.rmtree, folder)
        self.path, self.faiss_path = folder / "index", folder / "faiss"
        self.flat.save(self.path)
        flat_of_faiss = to_faiss(self.flat)
        faiss.write_index_binary(flat_of_faiss, str(self.faiss_path))

    def missed(self, result: tuple[Any, Any]) -> float:
        """Share of the results farther than the K-th nearest row: by distance, since tied ids are a matter of taste."""
        distances = result[0]
        return float((distances > self.farthest[: len(distances), None]).mean())


@functools.cache
def _indexes(quick: bool) -> _Indexes:
    return _Indexes(20_000, 64, 64) if quick else _Indexes(10_000_000, 4096, 4)


def _inverted(count: int) -> Callable[[Context], Workload]:
    def setup(context: Context) -> Workload:
        made = _indexes(context.quick)
        queries = made.queries[:count]
        return Workload(
            providers={
                OURS: lambda: made.inverted.search(queries, K),
                FAISS_LISTS: lambda: made.faiss.search(queries, K),
                FLAT: lambda: made.flat.search(queries, K),
            },
            verify=lambda _, result: made.missed(result),
            # Of one query a missed neighbour is a tenth: the recall is that of the 64.
            tolerance=1 if count == 1 else 0.05,
            amount=count,
            unit="query",
            goals=[Faster(FLAT, 20), Faster(FAISS_LISTS, 1)],
        )

    return setup


def _opening() -> Callable[[Context], Workload]:
    def setup(context: Context) -> Workload:
        made = _indexes(context.quick)
        flags = faiss.IO_FLAG_MMAP_IFC
        return Workload(
            providers={
                OURS: lambda: BinaryIndex.load(made.path, mmap=True),
                "fastembed, every byte verified": lambda: BinaryIndex.load(made.path, mmap=True, verify=True),
                "FAISS, mapped": lambda: faiss.read_index_binary(str(made.faiss_path), flags),
            },
            verify=lambda provider, index: float(_size(index) != len(made.flat)),
            tolerance=0,
            amount=1,
            unit="file",
            goals=[Faster("FAISS, mapped", 1), Within(MOST_SECONDS_TO_OPEN)],
        )

    return setup


def _size(index: Any) -> int:
    return len(index) if isinstance(index, BinaryIndex) else index.ntotal


def _memory() -> Callable[[Context], Workload]:
    def setup(context: Context) -> Workload:
        made = _indexes(context.quick)
        mapped = BinaryIndex.load(made.path, mmap=True)
        # What a process needs besides codes counts little only where the codes are many.
        most = 10 if context.quick else 1.1
        growth = _resident_growth(made.path, context.threads)
        return Workload(
            providers={OURS: lambda: mapped.search(made.queries, K)},
            verify=lambda *_: growth,
            tolerance=most,
            amount=len(made.queries) * len(mapped),
            unit="pair",
            goals=[Reached("bytes of codes for each byte that a search keeps resident", 1 / most, 1 / growth)],
        )

    return setup


GROWTH = """
import sys
import numpy as np, fastembed
from fastembed._native import torch

def resident():
    status = open("/proc/self/status").read()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

torch.set_num_threads(int(sys.argv[2]))
warm = fastembed.BinaryIndex(1024)
warm.add(np.zeros((10_000, 128), np.uint8))
queries = np.random.default_rng(0).integers(0, 256, (64, 128), dtype=np.uint8)
warm.search(queries, 10)
before = resident()
index = fastembed.BinaryIndex.load(sys.argv[1], mmap=True)
index.search(queries, 10)
print((resident() - before) / (128 * len(index)))
"""


def _resident_growth(path: Path, threads: int) -> float:
    """Peak resident memory that opening and searching the file adds to a process, in units of its codes."""
    command = [sys.executable, "-c", GROWTH, str(path), str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
