"""The families of benchmarks: each is a module bench/<family>.py with a function `cases`."""

import importlib
import multiprocessing
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import runner
from .workload import Case

FAMILIES = sorted(path.stem for path in Path(__file__).parents[1].glob("[!_]*.py"))


@dataclass(frozen=True)
class Selection:
    """What of a family to measure, and how; `seconds` for each provider of a case."""

    family: str
    matching: re.Pattern[str]
    device: str
    quick: bool
    seconds: float

    def cases(self) -> list[Case]:
        cases = list(importlib.import_module(f"bench.{self.family}").cases())
        return [case for case in cases if self.matching.search(case.name) and (case.quick or not self.quick)]


def run(selection: Selection, thread_counts: Sequence[int]) -> runner.Results:
    """Every number of threads in a process of its own: some libraries take it once and for all when they start.

    In a new process, not a fork of this one: in a fork OpenMP has to start its threads again for every call.
    """
    if len(thread_counts) == 1:
        return _run(selection, thread_counts[0])
    parts = []
    for threads in thread_counts:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            parts.append(process.submit(_run, selection, threads).result())
    return runner.together(parts)


def _run(selection: Selection, threads: int) -> runner.Results:
    return runner.run(selection.cases(), threads, selection.device, selection.quick, _progress, selection.seconds)


def _progress(message: str) -> None:
    print(f"... {message}", file=sys.stderr, flush=True)
