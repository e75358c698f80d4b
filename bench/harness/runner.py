"""Verifies and times workloads."""

import dataclasses
import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import limits
from . import environment
from .workload import OURS, Case, Context, Faster, OfLimit, Rate, Reached, Within, Workload

# Timed per provider and case, unless told otherwise.
SECONDS = 1.5


class VerificationError(Exception):
    """A provider's result is further from the truth than its tolerance."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the best and the median round, and the best processor time of all threads together."""

    best: float
    median: float
    processor: float


@dataclass(frozen=True)
class Measurement:
    """One provider in one case at one thread count; `bound` is the least time that the limits allow, if any apply."""

    case: str
    provider: str
    threads: int
    timing: Timing
    error: float
    rate: float
    unit: str
    bound: float | None
    bound_by: str | None

    @property
    def of_limit(self) -> float | None:
        return None if self.bound is None else self.bound / self.timing.best


@dataclass(frozen=True)
class Verdict:
    """One goal and what was reached; `reached` is None where the peer was not installed."""

    case: str
    threads: int
    goal: str
    wanted: float
    reached: float | None

    @property
    def outcome(self) -> str:
        if self.reached is None:
            return "not measured"
        return "met" if self.reached >= self.wanted else "MISSED"


@dataclass(frozen=True)
class Results:
    measurements: list[Measurement]
    verdicts: list[Verdict]
    limits: dict[int, dict[str, float]]


def run(
    cases: list[Case],
    threads: int,
    device: str,
    quick: bool,
    progress: Callable[[str], None],
    seconds: float = SECONDS,
) -> Results:
    """Measure every case with so many threads, about `seconds` per provider.

    Raises:
        VerificationError: a provider is wrong; nothing of its case has been timed.
    """
    environment.set_threads(threads)
    progress(f"limits of the machine, {threads} threads")
    timed = []
    before = limits.measure(threads, device, quick)
    for case in cases:
        progress(f"{case.name}, {threads} threads")
        workload = case.setup(Context(threads, device, quick))
        environment.set_threads(threads)  # again: the setup may have loaded another library, or changed it
        timed.append(
            (case.name, _without_calls(workload), *_verify_and_time(case.name, workload, device, quick, seconds))
        )
        del workload
        gc.collect()
    # A machine that was held back during one of the two must not make us look closer to its limit than we are.
    after = limits.measure(threads, device, quick)
    rates = {name: max(before[name], after[name]) for name in before}
    measurements: list[Measurement] = []
    verdicts: list[Verdict] = []
    for name, workload, errors, timings in timed:
        rows = _measurements(name, workload, errors, timings, threads, rates)
        measurements += rows
        verdicts += _verdicts(rows, workload)
    return Results(measurements, verdicts, {threads: rates})


def together(parts: Sequence[Results]) -> Results:
    return Results(
        [row for part in parts for row in part.measurements],
        [verdict for part in parts for verdict in part.verdicts],
        {threads: rates for part in parts for threads, rates in part.limits.items()},
    )


def _verify_and_time(
    case: str, workload: Workload, device: str, quick: bool, seconds: float
) -> tuple[dict[str, float], dict[str, Timing]]:
    errors = {}
    for name, call in workload.providers.items():
        errors[name] = workload.verify(name, call())
        if not errors[name] <= workload.tolerance_of(name):  # a NaN fails too
            raise VerificationError(
                f"{case}: {name} has error {errors[name]:.3g}, tolerance {workload.tolerance_of(name):.3g}"
            )
    clock = _cuda_seconds if device == "cuda" else _cpu_seconds
    return errors, _time_in_turns(workload, clock, quick, seconds)


def _time_in_turns(
    workload: Workload, clock: Callable[[Callable[[], Any], int], tuple[float, float]], quick: bool, seconds: float
) -> dict[str, Timing]:
    """Time all providers round by round, in a new order each round, so that drift of the machine hits all alike."""
    providers = workload.providers
    sample, budget, fewest = (0.001, 0.05, 2) if quick else (0.01, seconds * len(providers), workload.rounds)
    repeats = {}
    for name, call in providers.items():
        once = min(clock(call, 1)[0] for _ in range(2))
        repeats[name] = max(1, round(sample / max(once, 1e-7)))
    wall: dict[str, list[float]] = {name: [] for name in providers}
    processor: dict[str, list[float]] = {name: [] for name in providers}
    order = random.Random(0)
    start = time.perf_counter()
    done = 0
    while done < fewest or time.perf_counter() - start < budget:
        for name in order.sample(list(providers), len(providers)):
            elapsed, processor_seconds = clock(providers[name], repeats[name])
            wall[name].append(elapsed / repeats[name])
            processor[name].append(processor_seconds / repeats[name])
        done += 1
    return {name: Timing(min(wall[name]), statistics.median(wall[name]), min(processor[name])) for name in providers}


def _cpu_seconds(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Wall-clock and processor seconds of `repeats` calls."""
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
    return time.perf_counter() - wall, time.process_time() - processor


def _cuda_seconds(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Seconds between two events on the stream around `repeats` calls, and processor seconds of the host meanwhile."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    processor = time.process_time()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, time.process_time() - processor


def _without_calls(workload: Workload) -> Workload:
    """What is needed after timing, without the calls and the inputs that they hold on to."""
    return dataclasses.replace(workload, providers={}, verify=lambda name, result: 0.0)


def _measurements(
    case: str,
    workload: Workload,
    errors: dict[str, float],
    timings: dict[str, Timing],
    threads: int,
    rates: dict[str, float],
) -> list[Measurement]:
    bounds = {name: demand / rates[name] for name, demand in workload.demands.items() if name in rates}
    bound_by = max(bounds, key=bounds.__getitem__, default=None)
    bound = None if bound_by is None else bounds[bound_by]
    return [
        Measurement(
            case, name, threads, timing, errors[name], workload.amount / timing.best, workload.unit, bound, bound_by
        )
        for name, timing in timings.items()
    ]


def _other_threads(row: Measurement | None) -> str:
    """A remark where a provider did not keep all of its threads busy, or used more."""
    if row is None or 0.8 <= (used := row.timing.processor / row.timing.best) / row.threads <= 1.2:
        return ""
    return f", which used {used:.1f} threads"


def _verdicts(rows: list[Measurement], workload: Workload) -> list[Verdict]:
    by_provider = {row.provider: row for row in rows}
    ours = by_provider[OURS]
    verdicts = []
    for goal in workload.goals:
        if isinstance(goal, Faster):
            peer = by_provider.get(goal.than)
            our = by_provider[goal.ours]
            reached = None if peer is None else peer.timing.best / our.timing.best
            whose = "" if goal.ours == OURS else f"{goal.ours}: "
            what = f"{whose}times the speed of {goal.than}{_other_threads(peer)}"
            verdicts.append(Verdict(ours.case, ours.threads, what, goal.by, reached))
        elif isinstance(goal, Reached):
            verdicts.append(Verdict(ours.case, ours.threads, goal.what, goal.wanted, goal.reached))
        elif isinstance(goal, OfLimit):
            verdicts.append(Verdict(ours.case, ours.threads, f"of limit {ours.bound_by}", goal.fraction, ours.of_limit))
        elif isinstance(goal, Rate):
            name = f"G {ours.unit}s a second and thread"
            reached = ours.rate / ours.threads / 1e9
            verdicts.append(Verdict(ours.case, ours.threads, name, goal.amount / 1e9, reached))
        elif isinstance(goal, Within):
            what = f"times the speed of {1e3 * goal.seconds:g} ms a call"
            verdicts.append(Verdict(ours.case, ours.threads, what, 1, goal.seconds / ours.timing.best))
    return verdicts
