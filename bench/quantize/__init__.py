"""What bits cost in quality: all-MiniLM-L6-v2 quantised to every size in every order, on the demo's corpus.

Texts are those of the second half of the corpus; the calibration data are the first texts of it, as in
`fastembed.quantize` without calibration. Every setting quantises the float model anew and encodes queries and documents
once. `cosine` is that of its embeddings to the float32 ones; `MRR@10` is of queries that look for their own document
among all documents. Bits per weight count codes, scales and zero points. Goals in points of MRR@10 are judged on all
pairs of that half: with 500 queries, one that moves from rank 1 to rank 2 is 0.1 points.

Orders of importance, of transformer blocks, get the two levels between which the average lies, layer by layer from the
most important block on: LIM and ZD, each of them reversed, and several random ones. "measured" is the default of
`fastembed.quantize`, "measured, gptq" the same with its calibrated quantiser. "uniform" has one level everywhere;
between its sizes it is taken as the straight line of log(1 - cosine).
"""

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

import fastembed
from fastembed.demo.corpus import Pair
from fastembed.demo.encoders import BATCH
from fastembed.quantization.layers import block_of

from ..exits import quality

AVERAGES = (2.5, 3.0, 3.5, 4.0, 4.25, 4.5, 5.0, 5.5, 6.0)
WIDTHS = (2, 3, 4, 5, 6, 8)
SEEDS = 3
MAX_TOKENS = 64
UNIFORM, MEASURED, CALIBRATED = "uniform", "measured", "measured, gptq"
# Most points of MRR@10 that may be lost.
GOALS = {"8 bits": 0.3, "avg_bits=4.25": 1.0}


@dataclass(frozen=True)
class Setting:
    """One way to quantise: a line of the plot, its name for the goals if it has one, arguments of `quantize`."""

    order: str
    name: str
    arguments: Mapping[str, Any] = field(hash=False)


@dataclass(frozen=True)
class Row:
    """How good one setting's embeddings are; `lost` is in points (hundredths) of MRR@10 against float32."""

    order: str
    name: str
    bits: float
    cosine: float
    mrr: float
    lost: float


class Evaluation:
    """A float model and texts, and what its quantised copies make of them."""

    def __init__(self, model: SentenceTransformer, pairs: Sequence[Pair]) -> None:
        self.model = model
        self.texts = [[pair.query for pair in pairs], [pair.document for pair in pairs]]
        self.expected = self._encode(model)
        self.mrr = quality(*self.expected)[0]

    def row(self, setting: Setting) -> Row:
        model = copy.deepcopy(self.model)
        report = fastembed.quantize(model, verbose=False, **setting.arguments)
        embeddings = self._encode(model)
        cosine = np.mean([(ours * theirs).sum(axis=1) for ours, theirs in zip(embeddings, self.expected, strict=True)])
        mrr = quality(*embeddings)[0]
        assert report.average_bits is not None
        return Row(setting.order, setting.name, report.average_bits, float(cosine), mrr, 100 * (self.mrr - mrr))

    def _encode(self, model: SentenceTransformer) -> list[np.ndarray]:
        return [
            model.encode(texts, batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False)
            for texts in self.texts
        ]


def settings(model: SentenceTransformer, averages: Sequence[float], seeds: int) -> Iterator[Setting]:
    for bits in WIDTHS:
        yield Setting(UNIFORM, f"{bits} bits", {"bits": bits})
    # Also at the sizes of uniform widths, where nothing has to be read off a line between them.
    for average in (*averages, *(size for size in uniform_sizes(model) if averages[0] <= size <= averages[-1])):
        for order, quantizer in ((MEASURED, "mse"), (CALIBRATED, "gptq")):
            yield Setting(order, f"avg_bits={average:g}", {"avg_bits": average, "quantizer": quantizer})
    orders = orders_of_blocks(model, seeds)
    for average in averages:
        for order, scores in orders:
            yield Setting(order, f"avg_bits={average:g}", {"avg_bits": average, "importance": scores})


def uniform_sizes(model: SentenceTransformer) -> list[float]:
    """Bits per weight of the widths, everything counted."""
    reports = [fastembed.quantize(copy.deepcopy(model), bits=bits, verbose=False) for bits in WIDTHS]
    return [report.average_bits for report in reports if report.average_bits is not None]


def orders_of_blocks(model: SentenceTransformer, seeds: int) -> list[tuple[str, dict[str, float]]]:
    """Every order as {pattern: score}. The layer outside the blocks comes first in all of them."""
    orders = []
    for order in ("lim", "zd"):
        report = fastembed.quantize(copy.deepcopy(model), avg_bits=4.25, importance=order, verbose=False)
        scores = {block: row.score for row in report.rows if (block := block_of(row.name)) and row.score is not None}
        outside = {row.name: 2.0 for row in report.rows if block_of(row.name) is None}
        orders.append((order.upper(), scores | outside))
        orders.append((f"{order.upper()} reversed", {block: -score for block, score in scores.items()} | outside))
    for seed in range(seeds):
        shuffled = random.Random(seed).sample(sorted(scores), len(scores))
        orders.append(("random", {block: place / len(scores) for place, block in enumerate(shuffled)} | outside))
    return orders


def uniform_at(rows: Sequence[Row], bits: float) -> float:
    """Cosine of uniform widths at a size: interpolated between two, those at the ends continued."""
    widths = sorted((row.bits, np.log1p(-min(row.cosine, 1 - 1e-9))) for row in rows if row.order == UNIFORM)
    (low, a), (high, b) = next(
        (pair for pair in pairwise(widths) if bits <= pair[1][0] + 1e-9), list(pairwise(widths))[-1]
    )
    return float(1 - np.exp(a + (b - a) * (bits - low) / (high - low)))


def mean_of(rows: Sequence[Row], order: str, name: str) -> Row:
    """The rows of one order at one average, as one."""
    found = [row for row in rows if (row.order, row.name) == (order, name)]
    bits, cosine, mrr, lost = np.mean([(row.bits, row.cosine, row.mrr, row.lost) for row in found], axis=0)
    return Row(order, name, float(bits), float(cosine), float(mrr), float(lost))


def has_goal(order: str, name: str) -> bool:
    """Whether a setting is judged by the points of MRR@10 that it loses."""
    return name in GOALS and order in (UNIFORM, MEASURED, CALIBRATED)


def verdicts(rows: Sequence[Row], of_all_pairs: Sequence[Row]) -> list[tuple[str, bool]]:
    """(what was to be reached and what was, whether it was); `of_all_pairs` are the settings that `has_goal`."""
    found = []
    for row in of_all_pairs:
        most = GOALS[row.name]
        found.append((f"{row.order}, {row.name}: at most {most} points lost, got {row.lost:.2f}", row.lost <= most))
    for order in (MEASURED, CALIBRATED):
        for row in sorted((row for row in rows if row.order == order), key=lambda row: row.bits):
            uniform = uniform_at(rows, row.bits)
            text = f"{order} beats uniform at {row.bits:.3f} bits: cosine {row.cosine:.4f}, uniform {uniform:.4f}"
            found.append((text, row.cosine > uniform))
    for order in ("LIM", "ZD"):
        for name in dict.fromkeys(row.name for row in rows if row.order == order):
            ours, chance, back = (mean_of(rows, o, name) for o in (order, "random", f"{order} reversed"))
            text = (
                f"{order} beats random order at {name}: cosine {ours.cosine:.4f}, random {chance.cosine:.4f}, "
                f"reversed {back.cosine:.4f}"
            )
            found.append((text, ours.cosine > chance.cosine))
    return found
