"""`python -m bench.exits`: fine-tunes all-MiniLM-L6-v2's exits and writes table and plot to bench/results/."""

import argparse
import csv
import time
from dataclasses import asdict
from pathlib import Path

import matplotlib
import torch

from fastembed.demo.corpus import build_corpus
from fastembed.demo.encoders import load_model

from .. import RESULTS
from ..harness import environment
from . import BATCH, DIMS, HALF_PRECISION, LEARNING_RATE, MAX_TOKENS, TRAINED_DIMS, Row, compare, fine_tune, retrieval
from . import __doc__ as method

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.exits", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--pairs", type=int, help="take so many pairs of the corpus only, to try it out")
    parser.add_argument("--held-out", type=int, default=1000, help="pairs of the other half to search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="folder of another saved model")
    parser.add_argument("--save", type=Path, help="folder to save the trained model in")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for csv, markdown and png")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    circumstances = environment.describe("cpu")
    model = load_model(arguments.model)
    model.max_seq_length = MAX_TOKENS
    pairs = build_corpus(arguments.pairs)
    training, held_out = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :][: arguments.held_out]
    before = retrieval(model, held_out)
    wall, processor = time.perf_counter(), time.process_time()
    fine_tune(model, training, arguments.epochs, arguments.seed)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    rows = compare(before, retrieval(model, held_out))
    if arguments.save is not None:
        model.save(str(arguments.save))
    circumstances |= {
        "training": f"{len(training)} pairs, {arguments.epochs} epochs, batches of {BATCH}, texts of at most "
        f"{MAX_TOKENS} tokens, learning rate {LEARNING_RATE:g}, dims {', '.join(map(str, TRAINED_DIMS))} of every "
        f"layer, {'bfloat16' if HALF_PRECISION else 'float32'}, seed {arguments.seed}",
        "training time": f"{processor / 60:.1f} minutes of processor time, {wall / 60:.1f} minutes by the clock, "
        f"{arguments.threads} thread{'s' if arguments.threads > 1 else ''}",
        "held out": f"{len(held_out)} queries over their {len(held_out)} functions",
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    text = _markdown(rows, circumstances)
    (arguments.output / "exits.md").write_text(text)
    with (arguments.output / "exits.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), *circumstances])
        writer.writeheader()
        writer.writerows(asdict(row) | circumstances for row in rows)
    _plot(arguments.output / "exits.png", rows)
    print(text)


def _markdown(rows: list[Row], circumstances: dict[str, str]) -> str:
    lines = ["# exits", "", str(method).strip(), "", *(f"- {name}: {value}" for name, value in circumstances.items())]
    lines += [
        "",
        "MRR@10, untrained → trained, by layer and dim. Written by `python -m bench.exits`.",
        "",
        "| layer | " + " | ".join(f"{dim} dims" for dim in DIMS) + " |",
        "|---:|" + "---:|" * len(DIMS),
    ]
    by_exit = {(row.layer, row.dim): row for row in rows}
    for layer in sorted({row.layer for row in rows}):
        cells = [f"{by_exit[layer, dim].mrr_before:.3f} → {by_exit[layer, dim].mrr_after:.3f}" for dim in DIMS]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _plot(path: Path, rows: list[Row]) -> None:
    """MRR by dim, one colour per layer: dashed before the training, solid after it."""
    figure, axis = plt.subplots(figsize=(7.5, 5))
    layers = sorted({row.layer for row in rows})
    for layer, colour in zip(
        layers, plt.cm.viridis_r([i / len(layers) for i in range(1, len(layers) + 1)]), strict=True
    ):
        exits = [row for row in rows if row.layer == layer]
        dims = [row.dim for row in exits]
        axis.plot(dims, [row.mrr_after for row in exits], "o-", color=colour, label=f"layer {layer}", markersize=4)
        axis.plot(dims, [row.mrr_before for row in exits], "--", color=colour, linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_xticks(DIMS, [str(dim) for dim in DIMS])
    axis.set_xlabel("dims")
    axis.set_ylabel("MRR@10 on held-out pairs")
    axis.set_title("Exits before (dashed) and after (solid) fine-tuning", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
