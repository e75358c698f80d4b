"""`python -m bench FAMILY`: our kernels beside their peers and the machine's limits, in one run.

A family is a module `bench/<family>.py` with one function `cases() -> Iterable[Case]`. A case builds its inputs for a
given number of threads and says what to call, how to judge the answers, what the work costs and what ours must reach:

    from bench import Case, Context, Faster, Goal, OfLimit, Workload, optional_import

    faiss = optional_import("faiss")              # a peer that is not installed is left out, and the report says so

    def cases():
        for codes in (10_000, 1_000_000):
            yield Case(f"top-10 of {codes} codes", lambda context, codes=codes: workload(context, codes))

    def workload(context: Context, codes: int) -> Workload:
        x = random_codes(codes // 100 if context.quick else codes)
        expected = slow_but_sure(x)
        providers = {"fastembed": lambda: fastembed.hamming_topk(q, x, 10), "numpy": lambda: numpy_topk(q, x, 10)}
        if faiss is not None:
            providers["faiss"] = lambda: index.search(q, 10)
        return Workload(
            providers=providers,
            verify=lambda name, result: float((result[0] != expected).sum()),   # the error figure, beside the speed
            tolerance=0.0,                                                      # above it, nothing is timed
            amount=len(q) * len(x), unit="pair",                                # shown as Gpair/s
            demands={"read": x.nbytes, "popcount": len(q) * x.nbytes * 8},      # what one call needs of each limit
            goals=[Faster("faiss", 2.0), OfLimit(0.75)],
        )

The runner verifies every provider once, then times them in turns (a new random order each round), one thread count and
one thread pool at a time, and keeps the best and the median round of each in wall-clock and in processor time. The
limits (bench/limits) are measured before and after, in the same process.
"""

from pathlib import Path

from .harness.workload import Case, Context, Faster, Goal, OfLimit, Rate, Reached, Within, Workload, optional_import

__all__ = [
    "RESULTS",
    "Case",
    "Context",
    "Faster",
    "Goal",
    "OfLimit",
    "Rate",
    "Reached",
    "Within",
    "Workload",
    "optional_import",
]

RESULTS = Path(__file__).parent / "results"  # the recorded runs
