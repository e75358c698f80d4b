"""`python -m bench.static`: compiles every GPU kernel and writes what the compilers say to bench/results/."""

import argparse
import csv
import dataclasses
import io

from .. import RESULTS
from . import KernelResources, cuda, triton

HEADINGS = {
    "kernel": "kernel",
    "toolchain": "compiler",
    "arch": "arch",
    "registers": "registers per thread",
    "spill_bytes": "spilled bytes",
    "stack_bytes": "stack bytes",
    "shared_bytes": "shared memory per block",
    "notes": "instructions",
}
INTRODUCTION = """# GPU kernels, static evidence

What the compilers say about every GPU kernel of the package, written by `python -m bench.static`. Nothing here was run
on a GPU and nothing was timed.

"""


def main() -> None:
    argparse.ArgumentParser(prog="python -m bench.static", description=__doc__).parse_args()
    rows = [*cuda.rows(), *triton.rows()]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gpu_static.md").write_text(INTRODUCTION + markdown(rows))
    (RESULTS / "gpu_static.csv").write_text(as_csv(rows))
    spilling = [f"{row.kernel} on {row.arch}" for row in rows if row.spill_bytes > 0]
    print(f"{len(rows)} kernels compiled, {len(spilling)} spill{': ' if spilling else ''}{', '.join(spilling)}")
    print(f"written: {RESULTS / 'gpu_static.md'}, {RESULTS / 'gpu_static.csv'}")


def markdown(rows: list[KernelResources]) -> str:
    lines = [" | ".join(HEADINGS.values()), " | ".join("---" for _ in HEADINGS)]
    lines += [" | ".join(str(value) for value in dataclasses.astuple(row)) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def as_csv(rows: list[KernelResources]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADINGS)
    writer.writerows(dataclasses.astuple(row) for row in rows)
    return text.getvalue()


if __name__ == "__main__":
    main()
