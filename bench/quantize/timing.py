"""`python -m bench.quantize.timing`: how long a layer takes to quantise, from float weight to packed QuantLinear.

GPTQ's time includes the Hessian of its samples. The table goes to bench/results/.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastembed.nn import QuantLinear
from fastembed.quantization import quantize_gptq, quantize_hqq, quantize_mse, quantize_rtn

from .. import RESULTS
from ..harness import environment

SIZE = 4096
SAMPLES = 2048
GROUP = 64
BITS = (2, 3, 4, 8)
# Most seconds on two cores.
GOALS = {"rtn": 0.3, "mse": 5.0, "hqq": 5.0, "gptq": 30.0}
ROUNDS = {"rtn": 5, "mse": 2, "hqq": 2, "gptq": 1}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quantize.timing", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="smoke test: a small layer, nothing written")
    parser.add_argument("--output", type=Path, help="folder for the markdown (default: bench/results)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = 256 if arguments.quick else SIZE
    torch.manual_seed(0)
    weight = nn.Linear(size, size, bias=False).weight.detach()
    x = torch.randn(SAMPLES, size)
    QuantLinear.from_codes(*quantize_rtn(weight, 4, GROUP), bits=4, group_size=GROUP)  # first calls allocate
    lines = [
        "# quantising time",
        "",
        str(__doc__).strip(),
        "",
        *(f"- {name}: {value}" for name, value in environment.describe("cpu").items()),
        f"- layer: {size}x{size}, groups of {GROUP}, {SAMPLES} samples, {arguments.threads} threads",
        "",
        "| quantiser | bits | seconds | processor seconds | goal | outcome |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name, goal in GOALS.items():
        for bits in BITS:
            wall, processor = _best(partial(quantize, name, weight, bits, x), ROUNDS[name])
            outcome = "met" if wall <= goal else "MISSED"
            lines.append(f"| {name} | {bits} | {wall:.2f} | {processor:.2f} | {goal:g} | {outcome} |")
    text = "\n".join(lines) + "\n"
    print(text)
    output = arguments.output or (None if arguments.quick else RESULTS)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "quantize_timing.md").write_text(text)


def quantize(name: str, weight: torch.Tensor, bits: int, x: torch.Tensor) -> QuantLinear:
    """One layer, by the quantiser of this name; x are GPTQ's calibration inputs."""
    if name == "gptq":
        codes = quantize_gptq(weight, bits, GROUP, hessian=x.T @ x)
    else:
        quantizers: dict[str, Callable[..., Any]] = {"rtn": quantize_rtn, "mse": quantize_mse, "hqq": quantize_hqq}
        codes = quantizers[name](weight, bits, GROUP)
    return QuantLinear.from_codes(*codes, bits=bits, group_size=GROUP)


def _best(call: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Least wall-clock and processor seconds of a call."""
    walls, processors = [], []
    for _ in range(rounds):
        wall, processor = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    return min(walls), min(processors)


if __name__ == "__main__":
    main()
