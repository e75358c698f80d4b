"""How near fixed dimensional encodings come to the Chamfer similarity on token embeddings of a real encoder.

Chamfer similarity (MaxSim) of a query and a document: the mean, over the query's tokens, of each one's largest dot
product with a token of the document. Tokens are the last hidden states of all-MiniLM-L6-v2, to unit length, of the
docstrings (queries) and functions (documents) of the demo's corpus.

An encoding's estimate is its dot product, over the query's tokens and the repetitions. `epsilon`: how far from the
similarity 95% of the estimates are at most (MUVERA, arXiv 2405.19504, theorem 2.1, bounds it with high probability);
`above`: share of estimates above the similarity, 0 without a projection, since a bucket's mean comes no nearer than its
nearest token; `error`: root mean square once the means over all pairs are taken off, since a constant shift changes no
ranking. `recall@n`: share of queries whose nearest document by Chamfer similarity is among the first n by the encoding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import fastembed

# (repetitions, bits, projection_dim, final_dim)
CONFIGURATIONS: tuple[tuple[int, int, int | None, int | None], ...] = (
    (1, 4, None, None),
    (5, 4, None, None),
    (20, 2, None, None),
    (20, 3, None, None),
    (20, 4, None, None),
    (20, 5, None, None),
    (20, 5, 8, None),
    (20, 5, 16, None),
    (20, 5, 16, 4096),
    (40, 5, 16, None),
    (5, 7, None, None),
)
DEPTHS = (1, 10, 100)
ROUNDING = 1e-5  # of sums in float32


@dataclass(frozen=True)
class Row:
    """One set of matrices.

    Attributes:
        repetitions, bits, projection_dim, dims: of the encoding.
        epsilon, above, error: of the estimates for all pairs, as above.
        recall: at each of DEPTHS.
    """

    repetitions: int
    bits: int
    projection_dim: int | None
    dims: int
    epsilon: float
    above: float
    error: float
    recall: tuple[float, ...]


def chamfer(queries: Sequence[Tensor], documents: Sequence[Tensor]) -> np.ndarray:
    """The exact similarities [queries, documents] of lists of unit tokens [T_i, dim]."""
    padded = torch.nn.utils.rnn.pad_sequence(list(documents), batch_first=True)
    lengths = torch.tensor([len(document) for document in documents])
    beyond = torch.arange(padded.shape[1]) >= lengths[:, None]
    rows = [(query @ padded.mT).masked_fill_(beyond[:, None], -2).amax(dim=2).mean(dim=1) for query in queries]
    return torch.stack(rows).numpy()


def table(queries: Sequence[Tensor], documents: Sequence[Tensor], exact: np.ndarray) -> Iterator[Row]:
    """A row per configuration."""
    best = exact.argmax(axis=1)
    tokens = np.array([[len(query)] for query in queries])
    for repetitions, bits, projection_dim, final_dim in CONFIGURATIONS:
        matrices = fastembed.FDEMatrices.random(
            queries[0].shape[1],
            repetitions=repetitions,
            bits=bits,
            projection_dim=projection_dim,
            final_dim=final_dim,
        )
        products = fastembed.fde_queries(list(queries), matrices) @ fastembed.fde_documents(list(documents), matrices).T
        estimates = products.numpy() / (tokens * repetitions)
        difference = estimates - exact
        epsilon = float(np.quantile(np.abs(difference), 0.95))
        above = float((difference > ROUNDING).mean())
        ranks = (estimates > np.take_along_axis(estimates, best[:, None], axis=1)).sum(axis=1)
        recall = tuple(float((ranks < depth).mean()) for depth in DEPTHS)
        yield Row(
            repetitions, bits, projection_dim, matrices.final_dim, epsilon, above, float(difference.std()), recall
        )
