"""`python -m bench.quantize`: quality against bits, on the CPU kernels; table and plot go to bench/results/."""

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib
import torch
from tqdm import tqdm

from fastembed.demo.corpus import build_corpus
from fastembed.demo.encoders import load_model

from .. import RESULTS
from ..harness import environment
from . import (
    AVERAGES,
    CALIBRATED,
    MAX_TOKENS,
    MEASURED,
    SEEDS,
    UNIFORM,
    Evaluation,
    Planner,
    Row,
    has_goal,
    mean_of,
    verdicts,
)
from . import __doc__ as method

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {
    UNIFORM: "#7f7f7f",
    MEASURED: "#d1495b",
    CALIBRATED: "#8d1c3d",
    "LIM": "#30638e",
    "LIM reversed": "#a9c4dd",
    "ZD": "#00798c",
    "ZD reversed": "#9fd3cf",
    "random": "#edae49",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quantize", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=1000, help="pairs of the corpus to encode for every setting")
    parser.add_argument("--averages", type=float, nargs="+", default=AVERAGES, metavar="BITS")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="random orders")
    parser.add_argument("--quick", action="store_true", help="smoke test: few texts and sizes, nothing written")
    parser.add_argument("--output", type=Path, help="folder for csv, markdown and png (default: bench/results)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.pairs, arguments.averages, arguments.seeds = 20, [4.25], 1
    start = time.perf_counter()
    model = load_model(None)
    model.max_seq_length = MAX_TOKENS
    corpus = build_corpus()
    half = corpus[len(corpus) // 2 :]
    pairs, more = half[: arguments.pairs], [] if arguments.quick else half[arguments.pairs :]
    evaluation = Evaluation(model, pairs, more)
    settings = list(Planner(model).settings(sorted(arguments.averages), arguments.seeds))
    rows = [evaluation.row(setting) for setting in tqdm(settings, desc="Quantising and encoding", unit=" setting")]
    rows_of_all = [evaluation.row_of_all(setting) for setting in settings if has_goal(setting.order, setting.name)]
    circumstances = environment.describe("cpu") | {
        "texts": f"{len(pairs)} queries over their {len(pairs)} documents, of at most {MAX_TOKENS} tokens",
        "float32": f"MRR@10 {evaluation.mrr:.4f}",
        "goals": f"on {len(pairs) + len(more)} pairs, of which float32 has MRR@10 {evaluation.mrr_of_all:.4f}",
        "time": f"{(time.perf_counter() - start) / 60:.1f} minutes, {arguments.threads} threads",
    }
    text = _markdown(rows, rows_of_all, circumstances)
    print(text)
    output = arguments.output or (None if arguments.quick else RESULTS)
    if output is None:
        return
    output.mkdir(parents=True, exist_ok=True)
    (output / "quantize.md").write_text(text)
    with (output / "quantize.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), *circumstances])
        writer.writeheader()
        writer.writerows(asdict(row) | circumstances for row in rows)
    _plot(output / "quantize.png", rows)
    print(f"written to {output}/quantize.*", file=sys.stderr)


def _lines(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Every order with its rows by size, random ones averaged."""
    orders = dict.fromkeys(row.order for row in rows)
    names = {order: dict.fromkeys(row.name for row in rows if row.order == order) for order in orders}
    return [
        (order, sorted((mean_of(rows, order, name) for name in names[order]), key=lambda row: row.bits))
        for order in orders
    ]


def _markdown(rows: Sequence[Row], rows_of_all: Sequence[Row], circumstances: dict[str, str]) -> str:
    lines = [
        "# quantize",
        "",
        str(method).strip(),
        "",
        *(f"- {name}: {value}" for name, value in circumstances.items()),
    ]
    lines += ["", "Written by `python -m bench.quantize`.", ""]
    lines += [
        "| order | asked for | bits per weight | 1 - cosine | MRR@10 | points lost |",
        "|---|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.order} | {row.name} | {row.bits:.3f} | {1 - row.cosine:.5f} | {row.mrr:.4f} | {row.lost:+.2f} |"
        for _, of_order in _lines(rows)
        for row in of_order
    ]
    lines += ["", "| goal | outcome |", "|---|---|"]
    lines += [f"| {text} | {'met' if met else 'MISSED'} |" for text, met in verdicts(rows, rows_of_all)]
    return "\n".join(lines) + "\n"


def _plot(path: Path, rows: Sequence[Row]) -> None:
    """Cosine distance and points of MRR@10 lost, both by bits per weight."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8))
    for order, of_order in _lines(rows):
        bits = [row.bits for row in of_order]
        bold = order in (UNIFORM, MEASURED, CALIBRATED)
        for axis, values in zip(
            axes, ([1 - row.cosine for row in of_order], [row.lost for row in of_order]), strict=True
        ):
            axis.plot(
                bits,
                values,
                "o-" if bold else "--",
                color=COLOURS[order],
                label=order,
                markersize=4,
                linewidth=1.8 if bold else 1.2,
            )
    axes[0].set_yscale("log")
    axes[0].set_ylabel("1 - cosine to the float32 embeddings")
    axes[1].set_yscale("symlog", linthresh=1)
    axes[1].set_ylabel("points of MRR@10 lost")
    for axis in axes:
        axis.set_xlabel("bits per weight, everything counted")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle("all-MiniLM-L6-v2 quantised, groups of 64, int8 activations", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
