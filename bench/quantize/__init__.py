"""What bits cost in quality: all-MiniLM-L6-v2 quantised to every size in every order, on the demo's corpus.

Texts are those of the second half of the corpus; the calibration data are the first texts of it, as in
`fastembed.quantize` without calibration. `cosine` is that of a quantised model's embeddings to the float32 ones;
`MRR@10` is of queries that look for their own document among all documents. Bits per weight count codes, scales and
zero points. Goals in points of MRR@10 are judged on all pairs of that half: with 500 queries, one that moves from rank
1 to rank 2 is 0.1 points.

What does not depend on a setting is done once for all of them: measuring the layers (which the size does not change),
quantising each layer to each level (which the other layers' levels do not change), tokenising, and encoding with equal
levels, to which several orders lead. The models are those that `fastembed.quantize` makes of the settings, bit for bit.

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
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer

import fastembed
from fastembed.demo.corpus import Pair
from fastembed.demo.encoders import BATCH
from fastembed.nn import QuantLinear
from fastembed.quantization import QuantConfig
from fastembed.quantization.allocation import allocate
from fastembed.quantization.calibration import prepare
from fastembed.quantization.layers import block_of, find_layers
from fastembed.quantization.planning import Assigned, assign_bits, budget_of, bytes_of, measured_choices

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
    """One way to quantise: a line of the plot, its name for the goals if it has one, and what each layer gets."""

    order: str
    name: str
    quantizer: str
    levels: Mapping[str, int] = field(hash=False)


@dataclass(frozen=True)
class Row:
    """How good one setting's embeddings are; `lost` is in points (hundredths) of MRR@10 against float32."""

    order: str
    name: str
    bits: float
    cosine: float
    mrr: float
    lost: float


class Mixer:
    """A quantised model whose layers are exchanged between settings; each is quantised to a level once."""

    def __init__(self, model: SentenceTransformer) -> None:
        self._float = model
        self._layers: dict[tuple[str, int], dict[str, QuantLinear]] = {}
        self._model = self._quantized("rtn", 8)

    def mix(self, setting: Setting) -> tuple[SentenceTransformer, float]:
        """The model at a setting, until the next one is asked for, and its bits per weight."""
        layers = {name: self._at(setting.quantizer, bits)[name] for name, bits in setting.levels.items()}
        for name, layer in layers.items():
            self._model.set_submodule(name, layer)
        weights = {name: layer.in_features * layer.out_features for name, layer in layers.items()}
        stored = sum(layer.bits_per_weight * weights[name] for name, layer in layers.items())
        return self._model, stored / sum(weights.values())

    def _at(self, quantizer: str, bits: int) -> dict[str, QuantLinear]:
        key = quantizer, bits
        if key not in self._layers:
            modules = self._quantized(*key).named_modules()
            self._layers[key] = {name: module for name, module in modules if isinstance(module, QuantLinear)}
        return self._layers[key]

    def _quantized(self, quantizer: str, bits: int) -> SentenceTransformer:
        model = copy.deepcopy(self._float)
        fastembed.quantize(model, bits=bits, quantizer=quantizer, verbose=False)
        return model


class Texts:
    """Queries and documents, tokenised once, in batches of about one length."""

    def __init__(self, model: SentenceTransformer, pairs: Sequence[Pair]) -> None:
        self._count = len(pairs)
        texts = [pair.query for pair in pairs] + [pair.document for pair in pairs]
        order = np.argsort([-len(text) for text in texts], kind="stable")
        self._batches = [
            (places, model.preprocess([texts[place] for place in places]))
            for places in np.split(order, range(BATCH, len(order), BATCH))
            if len(places)
        ]

    @torch.inference_mode()
    def encode(self, model: SentenceTransformer) -> np.ndarray:
        """Embeddings [2, pairs, dim] of unit length: queries, documents."""
        embeddings: np.ndarray | None = None
        for places, features in self._batches:
            found = F.normalize(model(dict(features))["sentence_embedding"], dim=-1).numpy()
            if embeddings is None:
                embeddings = np.empty((2 * self._count, found.shape[1]), np.float32)
            embeddings[places] = found
        assert embeddings is not None
        return embeddings.reshape(2, self._count, -1)


class Evaluation:
    """What quantised copies of a model make of pairs, and of more of them where a goal is judged."""

    def __init__(self, model: SentenceTransformer, pairs: Sequence[Pair], more: Sequence[Pair] = ()) -> None:
        self._mixer = Mixer(model)
        self._texts = [Texts(model, side) for side in (pairs, more) if side]
        self._expected = [texts.encode(model) for texts in self._texts]
        self._encoded: dict[tuple[Any, ...], tuple[float, np.ndarray]] = {}
        self.mrr = quality(*self._expected[0])[0]
        self.mrr_of_all = quality(*np.concatenate(self._expected, axis=1))[0]

    def row(self, setting: Setting) -> Row:
        """Of the pairs."""
        bits, embeddings = self._of_pairs(setting)
        return self._row(setting, bits, embeddings, self._expected[0], self.mrr)

    def row_of_all(self, setting: Setting) -> Row:
        """Of the pairs and more of them."""
        bits, embeddings = self._of_pairs(setting)
        model, _ = self._mixer.mix(setting)
        embeddings = np.concatenate([embeddings, *(texts.encode(model) for texts in self._texts[1:])], axis=1)
        return self._row(setting, bits, embeddings, np.concatenate(self._expected, axis=1), self.mrr_of_all)

    def _of_pairs(self, setting: Setting) -> tuple[float, np.ndarray]:
        key = setting.quantizer, *setting.levels.items()
        if key not in self._encoded:
            model, bits = self._mixer.mix(setting)
            self._encoded[key] = bits, self._texts[0].encode(model)
        return self._encoded[key]

    @staticmethod
    def _row(setting: Setting, bits: float, embeddings: np.ndarray, expected: np.ndarray, mrr_of_float: float) -> Row:
        mrr = quality(*embeddings)[0]
        cosine = float((embeddings * expected).sum(axis=-1).mean())
        return Row(setting.order, setting.name, bits, cosine, mrr, 100 * (mrr_of_float - mrr))


class Planner:
    """What every layer gets in a setting."""

    def __init__(self, model: SentenceTransformer) -> None:
        self._model = model
        self._layers = find_layers(model, QuantConfig())
        self._calibration = prepare(model, None)
        self._names = [layer.name for layer in self._layers.weights]

    def settings(self, averages: Sequence[float], seeds: int) -> Iterator[Setting]:
        for bits in WIDTHS:
            yield Setting(UNIFORM, f"{bits} bits", "mse", dict.fromkeys(self._names, bits))
        # Also at the sizes of uniform widths, where nothing has to be read off a line between them.
        sizes = [*averages, *(size for size in self.uniform_sizes() if averages[0] <= size <= averages[-1])]
        for order, quantizer in ((MEASURED, "mse"), (CALIBRATED, "gptq")):
            config = QuantConfig(avg_bits=sizes[0], quantizer=quantizer)
            choices = measured_choices(self._layers, config, self._calibration)
            for average in sizes:
                picked = allocate(choices, budget_of(self._layers.weights, average))
                levels = {name: choice.bits for name, choice in zip(self._names, picked, strict=True)}
                yield Setting(order, f"avg_bits={average:g}", quantizer, levels)
        orders = self._orders_of_blocks(seeds)
        for average in averages:
            for order, scores in orders:
                yield Setting(order, f"avg_bits={average:g}", "mse", self._levels_by(scores, average))

    def uniform_sizes(self) -> list[float]:
        """Bits per weight of the widths, everything counted."""
        weights = self._layers.weights
        return [8 * bytes_of(weights, bits, QuantConfig()) / budget_of(weights, 8) for bits in WIDTHS]

    def _orders_of_blocks(self, seeds: int) -> list[tuple[str, dict[str, float]]]:
        """Every order as {pattern: score}. The layer outside the blocks comes first in all of them."""
        orders = []
        for order in ("lim", "zd"):
            assigned = self._assigned(QuantConfig(avg_bits=4.25, importance=order))
            scores = {block: row.score for name, row in assigned if (block := block_of(name)) and row.score is not None}
            outside = {name: 2.0 for name, _ in assigned if block_of(name) is None}
            orders.append((order.upper(), scores | outside))
            orders.append((f"{order.upper()} reversed", {block: -score for block, score in scores.items()} | outside))
        for seed in range(seeds):
            shuffled = random.Random(seed).sample(sorted(scores), len(scores))
            orders.append(("random", {block: place / len(scores) for place, block in enumerate(shuffled)} | outside))
        return orders

    def _levels_by(self, scores: Mapping[str, float], average: float) -> dict[str, int]:
        return {name: row.bits for name, row in self._assigned(QuantConfig(avg_bits=average, importance=scores))}

    def _assigned(self, config: QuantConfig) -> list[tuple[str, Assigned]]:
        assigned = assign_bits(self._model, self._layers, config, self._calibration)
        return list(zip(self._names, assigned, strict=True))


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
