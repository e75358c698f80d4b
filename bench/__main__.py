"""Times a family of kernels beside its peers and the machine's limits.

Quality, training and the compilers' reports have commands of their own: python -m bench.recall, bench.chamfer,
bench.exits, bench.quantize, bench.quantize.timing and bench.static.
"""

import os

# Several OpenMP runtimes live in one process here (PyTorch's, FAISS's): idle threads of one must sleep, not spin on the
# cores that another one is being timed on. Read when the runtimes are loaded, hence before any other import.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import importlib
import os.path
import re
import sys
from pathlib import Path

from . import RESULTS, limits
from .harness import environment, families, report, runner


def main() -> None:
    arguments = _parser().parse_args()
    if min(arguments.threads) < 1:
        sys.exit(f"bench: --threads must be at least 1, got {min(arguments.threads)}")
    environment.require_device(arguments.device)
    thread_counts = arguments.threads if arguments.device == "cpu" else [os.cpu_count() or 1]
    plot = None
    if arguments.family == "limits":
        measured = {count: limits.measure(count, arguments.device, arguments.quick) for count in thread_counts}
        results = runner.Results([], [], measured)
    else:
        plot = getattr(importlib.import_module(f"bench.{arguments.family}"), "plot", None)
        selection = families.Selection(
            arguments.family, arguments.case, arguments.device, arguments.quick, arguments.seconds
        )
        if not selection.cases():
            sys.exit(f"bench: no case of {arguments.family} matches {arguments.case.pattern!r}")
        try:
            results = families.run(selection, thread_counts)
        except runner.VerificationError as error:
            sys.exit(f"bench: {error}")
    circumstances = environment.describe(arguments.device)
    report.print_all(arguments.family, results, circumstances)
    output = arguments.output or (None if arguments.quick else RESULTS)
    if output is not None:
        stem = arguments.family if arguments.device == "cpu" else f"{arguments.family}-{arguments.device}"
        report.write_all(output, stem, results, circumstances, plot)
        print(f"\nwritten to {os.path.relpath(output)}/{stem}.*")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "family", choices=[*families.FAMILIES, "limits"], help="what to measure; limits: only the machine"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}), metavar="N")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="smoke test: tiny inputs, nothing written by default")
    parser.add_argument("--case", type=re.compile, default="", metavar="REGEX", help="only cases whose names match")
    parser.add_argument("--seconds", type=float, default=runner.SECONDS, help="to time each provider of a case for")
    parser.add_argument("--output", type=Path, help="folder for csv, markdown and png (default: bench/results)")
    return parser


if __name__ == "__main__":
    main()
