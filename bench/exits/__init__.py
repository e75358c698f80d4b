"""Fine-tuning a model's exits on text-to-code pairs, and what it does for those cut off early.

The pairs are the demo's: what is said of a function of the Python standard library, and its source. The model learns
from the first half of them. Of the other half, queries look for their functions among those of all queries, with the
embeddings of every layer and of several prefixes, before the training and after it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tqdm import tqdm

from fastembed import MultiExitEncoder
from fastembed._exits import LayerExit
from fastembed.demo.corpus import Pair
from fastembed.training import SentenceTransformerExitLoss, StarbucksLoss

DIMS = (32, 64, 128, 256, 384)
TRAINED_DIMS = (32, 128, 384)
MAX_TOKENS = 64
BATCH = 64
WINDOW = 8  # batches that are sorted by length together
LEARNING_RATE = 1e-4
WARM_UP = 0.1  # part of the steps
TEMPERATURE = 0.05
EVALUATION_BATCH = 32
# Matrix products of the training in bfloat16, where the processor has instructions for them.
HALF_PRECISION = torch.ops.mkldnn._is_mkldnn_bf16_supported()


@dataclass(frozen=True)
class Row:
    """How well one exit finds the functions: mean reciprocal rank among the first ten, and share of first places."""

    layer: int
    dim: int
    mrr_before: float
    mrr_after: float
    first_before: float
    first_after: float


def depth_of(model: SentenceTransformer) -> int:
    encoder: Any = model[0].auto_model
    return int(encoder.config.num_hidden_layers)


def fine_tune(model: SentenceTransformer, pairs: Sequence[Pair], epochs: int, seed: int) -> None:
    """Train all layers' exits at TRAINED_DIMS together, in place: StarbucksLoss, AdamW, warm-up and linear decay."""
    exits = [(layer, dim) for layer in range(1, depth_of(model) + 1) for dim in TRAINED_DIMS]
    loss_of = SentenceTransformerExitLoss(model, StarbucksLoss(exits, temperature=TEMPERATURE, normalize=True))
    torch.manual_seed(seed)
    shuffle = random.Random(seed)
    steps = epochs * len(batches(pairs, random.Random(seed)))
    warm_up = max(1, round(WARM_UP * steps))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))
    )
    model.train()
    with tqdm(total=steps, desc="Training", unit=" step") as progress:
        for _ in range(epochs):
            for batch in batches(pairs, shuffle):
                columns = ([pair.query for pair in batch], [pair.document for pair in batch])
                features = [model.preprocess(texts) for texts in columns]
                with torch.autocast("cpu", torch.bfloat16, enabled=HALF_PRECISION):
                    loss = loss_of(features)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                progress.update()
    model.eval()


def batches(pairs: Sequence[Pair], shuffle: random.Random) -> list[list[Pair]]:
    """One epoch in random order, pairs of about the same length together: padding is work for nothing."""
    order = shuffle.sample(pairs, len(pairs))
    cut = []
    for start in range(0, len(order), WINDOW * BATCH):
        window = sorted(order[start : start + WINDOW * BATCH], key=lambda pair: len(pair.query))
        cut += [window[first : first + BATCH] for first in range(0, len(window) - BATCH + 1, BATCH)]
    return shuffle.sample(cut, len(cut))


def retrieval(model: SentenceTransformer, pairs: Sequence[Pair]) -> dict[LayerExit, tuple[float, float]]:
    """Of every layer and prefix: (mean reciprocal rank among the first ten, share of first places)."""
    exits = [(layer, dim) for layer in range(1, depth_of(model) + 1) for dim in DIMS]
    encoder = MultiExitEncoder(model, exits, normalize=True)
    queries, documents = (
        encoder.encode(texts, batch_size=EVALUATION_BATCH, show_progress_bar=True)
        for texts in ([pair.query for pair in pairs], [pair.document for pair in pairs])
    )
    return {exit: quality(queries[exit], documents[exit]) for exit in exits}


def quality(queries: np.ndarray, documents: np.ndarray) -> tuple[float, float]:
    """Of queries whose documents are those of their numbers: (MRR@10, share of first places)."""
    scores = queries @ documents.T
    ranks = 1 + (scores > scores.diagonal()[:, None]).sum(axis=1)
    return float(np.where(ranks <= 10, 1 / ranks, 0).mean()), float((ranks == 1).mean())


def compare(before: dict[LayerExit, tuple[float, float]], after: dict[LayerExit, tuple[float, float]]) -> list[Row]:
    return [Row(*exit, before[exit][0], after[exit][0], before[exit][1], after[exit][1]) for exit in before]
