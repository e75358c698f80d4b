"""Codes, filters and whole searches for the suites of the GPU backends, and what they must equal: the reference."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import fastembed
from fastembed import ScalarCodes, SDCCodes, pack_bits, sdc_encode
from fastembed.reference.search import _pack


def vectors(rows: int, dim: int, seed: int) -> Tensor:
    """Of so few values that many distances are equal."""
    return torch.randint(-2, 3, (rows, dim), generator=torch.Generator().manual_seed(seed)).float()


def packed(rows: int, dim: int, seed: int) -> Tensor:
    with fastembed.use_backend("reference"):
        return pack_bits(vectors(rows, dim, seed))


def encoded(rows: int, dim: int, seed: int, bits: int) -> SDCCodes:
    with fastembed.use_backend("reference"):
        return sdc_encode(vectors(rows, dim, seed) + 0.5, bits)


def scalar_codes(rows: int, dim: int, seed: int, bits: int) -> ScalarCodes:
    """Any integers there are, most vectors several times, and factors of any sign: more than quantisers give."""
    generator = torch.Generator().manual_seed(seed)
    c = torch.randint(0, 2**bits, (rows, dim), generator=generator)
    planes = [_pack((c >> shift & 1).bool()) for shift in reversed(range(bits))]
    factors = torch.randn(rows, 4, generator=generator)
    factors[:, 2] = c.sum(dim=1)
    codes = ScalarCodes(torch.cat(planes, dim=1), factors, bits, dim)
    return codes[torch.randint(0, max(rows, 1), (rows,), generator=generator)]


def assert_equals_reference(search: Callable[[], tuple[Tensor, ...]], backend: str) -> None:
    """Every id, and every bit of a score."""
    with fastembed.use_backend(backend):
        ours = search()
    with fastembed.use_backend("reference"):
        expected = search()
    for our, exact in zip(ours, expected, strict=True):
        assert our.dtype == exact.dtype
        assert torch.equal(our, exact)


@st.composite
def searches(
    draw: st.DrawFn, queries: Sequence[int], codes: Sequence[int]
) -> tuple[int, int, int, int, dict[str, Tensor]]:
    """Queries, codes, dims, k and filters."""
    rows = draw(st.sampled_from(codes))
    dim = draw(st.sampled_from((1, 8, 77, 128, 384, 1000)))
    some = draw(st.sampled_from(queries))
    return some, rows, dim, draw(st.integers(1, rows)), _filters(draw, some, rows)


def _filters(draw: st.DrawFn, queries: int, codes: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    chosen: dict[str, Any] = {}
    kind = draw(st.sampled_from(("none", "mask", "ids")))
    listed = torch.rand(codes, generator=generator) < draw(st.sampled_from((0.02, 0.5)))
    if kind == "mask":
        chosen["mask"] = listed
    if kind == "ids":
        chosen["ids"] = listed.nonzero().squeeze(1)
    if draw(st.booleans()):
        ends = torch.randint(0, codes + 1, (queries, draw(st.integers(0, 3)), 2), generator=generator)
        chosen["ranges"] = ends.sort(dim=-1)[0]
    return chosen
