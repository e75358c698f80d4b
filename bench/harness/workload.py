"""What a family declares: cases, and the workload that a case sets up."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OURS = "fastembed"


@dataclass(frozen=True)
class Context:
    """The circumstances that a case is set up for.

    Attributes:
        threads: Threads that every provider may use. PyTorch, FAISS and what uses Rayon are told by the runner; a peer
            that takes the number at construction (an ONNX Runtime session) has to be given it by the case.
        device: "cpu" or "cuda".
        quick: Whether this is the smoke test: the same code on inputs small enough for a second in total.
    """

    threads: int
    device: str
    quick: bool


@dataclass(frozen=True)
class Faster:
    """Goal: ours, or another provider of ours, takes at most 1/`by` of the time of provider `than`."""

    than: str
    by: float
    ours: str = OURS


@dataclass(frozen=True)
class Reached:
    """Goal: at least `wanted` of something that the case has measured itself, `what`."""

    what: str
    wanted: float
    reached: float


@dataclass(frozen=True)
class OfLimit:
    """Goal: ours reaches `fraction` of what the hardware allows for the demands of the workload."""

    fraction: float


@dataclass(frozen=True)
class Rate:
    """Goal: ours does at least `amount` units of work a second with each thread."""

    amount: float


@dataclass(frozen=True)
class Within:
    """Goal: a call of ours takes at most so many seconds."""

    seconds: float


Goal = Faster | OfLimit | Rate | Reached | Within


@dataclass(frozen=True)
class Workload:
    """One thing to measure.

    Attributes:
        providers: Name -> call without arguments that does all the work and returns its result. Ours is "fastembed".
        verify: (provider, result) -> error figure, in whatever unit suits the family; lower is better.
        tolerance: Largest error accepted before timing, for all providers or per provider.
        amount: Work of one call, in `unit` ("B", "op", "pair", "row"), for the rate that the report shows.
        unit: See `amount`.
        demands: Limit -> what one call needs of it at least: bytes for "read", multiplications and additions for
            "int8" and "float32", bits compared for "popcount" (see bench/limits). The limit whose demand takes longest
            bounds the speed.
        goals: What ours must reach; reported as met or missed.
        rounds: Fewest rounds of timing; where a call takes seconds, few have to do.
    """

    providers: Mapping[str, Callable[[], Any]]
    verify: Callable[[str, Any], float]
    tolerance: float | Mapping[str, float]
    amount: float
    unit: str
    demands: Mapping[str, float] = field(default_factory=dict)
    goals: Sequence[Goal] = ()
    rounds: int = 7

    def tolerance_of(self, provider: str) -> float:
        return self.tolerance if isinstance(self.tolerance, int | float) else self.tolerance[provider]


@dataclass(frozen=True)
class Case:
    """A named workload, set up anew for every thread count; `quick`: whether the smoke test has it too."""

    name: str
    setup: Callable[[Context], Workload]
    quick: bool = True


def optional_import(name: str) -> Any:
    """The module of an optional peer, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        return None
