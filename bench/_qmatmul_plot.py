"""The plot of `python -m bench qmatmul`: speed by bits of the weights, a panel per number of tokens."""

import math
import re
from collections import Counter, defaultdict
from pathlib import Path

from .harness.report import COLOURS, plt
from .harness.runner import Results
from .harness.workload import OURS

PEERS = ("ONNX Runtime MatMulNBits", "ggml", "auto-round-lib")
BASE = "ONNX Runtime dynamic int8"
_NAME = re.compile(r"(\d+x\d+), (\d+) tokens?, (\d)-bit, groups of (\d+)$")

Panel = tuple[int, int]  # threads, tokens
Lines = dict[str, dict[int, float]]  # label -> bits -> times the speed of BASE


def plot(path: Path, results: Results, circumstances: dict[str, str]) -> None:
    """Times the speed of ONNX Runtime's dynamic int8, at the two shapes measured most; the peers at the larger one."""
    panels = _panels(results)
    threads, tokens = (sorted({panel[i] for panel in panels}) or [1] for i in range(2))
    labels = sorted(
        {label for lines in panels.values() for label in lines}, key=lambda label: (OURS not in label, label)
    )
    figure, axes = plt.subplots(
        len(threads), len(tokens), figsize=(1.5 + 3.2 * len(tokens), 1.6 + 3 * len(threads)), squeeze=False, sharex=True
    )
    for (row, count), (column, rows) in ((r, c) for r in enumerate(threads) for c in enumerate(tokens)):
        axis = axes[row][column]
        for label, points in panels.get((count, rows), {}).items():
            bits = sorted(points)
            style = "-" if label.startswith(OURS) else ":"
            colour = COLOURS[labels.index(label) % len(COLOURS)]
            axis.plot(bits, [points[b] for b in bits], style, marker="o", markersize=4, color=colour, label=label)
        axis.axhline(1, color="#888888", linewidth=0.8, zorder=0)
        axis.set_title(f"{rows} token{'s' if rows > 1 else ''}, {count} thread{'s' if count > 1 else ''}", fontsize=9)
        axis.set_xticks(range(2, 9))
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        if row + 1 == len(threads):
            axis.set_xlabel("bits per weight")
    axes[0][0].set_ylabel("times the speed of int8")
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.suptitle(f"qmatmul beside {BASE}: {circumstances['cpu']}, {circumstances['isa']}", fontsize=11)
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.05 + 0.03 * -(-len(handles) // 4), 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panels(results: Results) -> dict[Panel, Lines]:
    base = {(row.case, row.threads): row.timing.best for row in results.measurements if row.provider == BASE}
    shapes = _most_measured(results)
    panels: dict[Panel, Lines] = defaultdict(lambda: defaultdict(dict))
    for row in results.measurements:
        name = _NAME.match(row.case)
        if name is None or (row.case, row.threads) not in base or name[1] not in shapes:
            continue
        shape, tokens, bits, group_size = name[1], int(name[2]), int(name[3]), int(name[4])
        provider = "ggml" if row.provider.startswith("ggml") else row.provider
        if provider == OURS:
            label = f"{OURS}, {shape}, groups of {group_size}"
        elif provider in PEERS and (shape, group_size) == (shapes[0], 64):
            label = f"{provider}, {shape}"
        else:
            continue
        panels[row.threads, tokens][label][bits] = base[row.case, row.threads] / row.timing.best
    return panels


def _most_measured(results: Results) -> list[str]:
    """Two shapes, the larger first."""
    counts = Counter(name[1] for row in results.measurements if (name := _NAME.match(row.case)))
    shapes = [shape for shape, _ in counts.most_common(2)]
    return sorted(shapes, key=lambda shape: math.prod(map(int, shape.split("x"))), reverse=True)
