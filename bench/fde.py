"""Encodings that start from float embeddings: fixed dimensional encodings of token embeddings, and relative
representations, beside the same in PyTorch operations over the whole batch.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

import fastembed

from . import Case, Context, Faster, Workload
from .harness.workload import OURS


def cases() -> Iterator[Case]:
    """Token counts of documents and queries of multi-vector models."""
    yield Case("documents, 256 x 128 tokens, dim 128", _fde(256, 128, 128, documents=True))
    yield Case("documents, 256 x 128 tokens, dim 384", _fde(256, 128, 384, documents=True))
    yield Case("queries, 256 x 32 tokens, dim 128", _fde(256, 32, 128, documents=False))
    yield Case("relative representations, 100k x 384, 256 anchors", _relative(100_000, 384, 256))


def _fde(batch: int, length: int, dim: int, *, documents: bool) -> Callable[[Context], Workload]:
    def setup(context: Context) -> Workload:
        count = 4 if context.quick else batch
        generator = torch.Generator().manual_seed(0)
        tokens = F.normalize(torch.randn(count, length, dim, generator=generator), dim=2)
        matrices = fastembed.FDEMatrices.random(dim)
        encode = fastembed.fde_documents if documents else fastembed.fde_queries
        with fastembed.use_backend("reference"):
            expected = encode(tokens[:2], matrices)
        repetitions, bits = matrices.hyperplanes.shape[1:]
        # The sides of all hyperplanes; the rest depends on how the tokens fall.
        operations = 2.0 * count * length * dim * repetitions * bits
        return Workload(
            providers={
                OURS: lambda: encode(tokens, matrices),
                "PyTorch": _in_pytorch(tokens, matrices, documents),
            },
            verify=lambda _, result: float((result[:2] - expected).abs().max()),
            tolerance=1e-4,
            amount=count * length,
            unit="token",
            demands={"float32": operations},
            goals=[Faster("PyTorch", 2.0)],
        )

    return setup


def _in_pytorch(tokens: torch.Tensor, matrices: fastembed.FDEMatrices, documents: bool) -> Callable[[], Any]:
    """All sequences at once: partitions by one matrix product, sums by a one-hot product, empty blocks by a matrix of
    Hamming distances."""
    dim, repetitions, bits = matrices.hyperplanes.shape
    count, length = tokens.shape[:2]
    hyperplanes = torch.from_numpy(matrices.hyperplanes).reshape(dim, -1)
    projections = torch.from_numpy(matrices.projections)
    powers = 1 << torch.arange(bits)
    ids = torch.arange(1 << bits)
    differing = ((ids[:, None] ^ ids) >> torch.arange(bits)[:, None, None] & 1).sum(dim=0)

    def call() -> torch.Tensor:
        above = (tokens @ hyperplanes > 0).reshape(count, length, repetitions, bits)
        partitions = (above * powers).sum(dim=3)
        blocks = []
        for repetition in range(repetitions):
            one_hot = F.one_hot(partitions[:, :, repetition], 1 << bits).to(tokens.dtype)
            sums = one_hot.mT @ tokens
            if documents:
                counts = one_hot.sum(dim=1)[..., None]
                order = differing[partitions[:, :, repetition]] * length + torch.arange(length)[:, None]
                nearest = order.argmin(dim=1)[..., None].expand(-1, -1, dim)
                sums = torch.where(counts > 0, sums / counts.clamp(min=1), tokens.gather(1, nearest))
            blocks.append(sums @ projections[repetition])
        return torch.stack(blocks, dim=1).flatten(1)

    return call


def _relative(rows: int, dim: int, anchors: int) -> Callable[[Context], Workload]:
    def setup(context: Context) -> Workload:
        count = 200 if context.quick else rows
        generator = torch.Generator().manual_seed(0)
        x, a = torch.randn(count, dim, generator=generator), torch.randn(anchors, dim, generator=generator)
        expected = F.normalize(x[:64].double()) @ F.normalize(a.double()).T
        return Workload(
            providers={
                OURS: lambda: fastembed.relative_representations(x, a),
                "PyTorch": lambda: F.normalize(x) @ F.normalize(a).T,
            },
            verify=lambda _, result: float((result[:64] - expected).abs().max()),
            tolerance=1e-5,
            amount=count,
            unit="row",
            demands={"float32": 2.0 * count * dim * anchors},
            goals=[Faster("PyTorch", 1.0)],
        )

    return setup
