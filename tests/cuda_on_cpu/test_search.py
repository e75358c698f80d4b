"""csrc/search/search.cu through the whole Python path, against the reference: every id and every bit of a score."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from search_cases import assert_equals_reference, encoded, packed, searches
from torch import Tensor

from fastembed import SDCCodes, hamming_topk, sdc_topk
from fastembed.ops import _search_cuda

pytestmark = pytest.mark.usefixtures("simulated_cuda")

# csrc/search/search.cu: the queries of one operand, the codes of the largest chunk, and of two slices.
OPERAND, CHUNK, TWO_SLICES = 8, 256, 4096


@pytest.fixture(params=[True, False], ids=["bit products", "byte products"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on sm_80 and sm_90, and as on devices without one-bit products."""
    monkeypatch.setattr(_search_cuda, "_has_bit_products", lambda device: request.param)


def check(search: Callable[[], tuple[Tensor, Tensor]]) -> None:
    assert_equals_reference(search, "cuda")


def sizes() -> st.SearchStrategy[tuple[int, int, int, int, dict[str, Tensor]]]:
    return searches((1, OPERAND, OPERAND + 1, 33), (1, 17, CHUNK, CHUNK + 1, 700))


@settings(max_examples=15)
@given(case=sizes())
def test_hamming(products: None, case: tuple[int, int, int, int, dict[str, Tensor]]) -> None:
    queries, codes, dim, k, chosen = case
    q, c = packed(queries, dim, 0), packed(codes, dim, 1)
    check(lambda: hamming_topk(q, c, k, **chosen))


@settings(max_examples=15)
@given(case=sizes(), bits=st.sampled_from((1, 2, 3, 4, 8)))
def test_levels(case: tuple[int, int, int, int, dict[str, Tensor]], bits: int) -> None:
    queries, codes, dim, k, chosen = case
    q, c = encoded(queries, dim, 0, bits), encoded(codes, dim, 1, bits)
    check(lambda: sdc_topk(q, c, k, **chosen))


@pytest.mark.parametrize("bits", [0, 2])
def test_sanitized(bits: int) -> None:
    """Small, for the runs under sanitizers: a buffer cut back, rows whose bytes end within a vector, a filter."""
    mask = torch.arange(600) % 5 != 1
    if bits == 0:
        q, c = packed(9, 100, 0), packed(600, 100, 1)
        check(lambda: hamming_topk(q, c, 3, mask=mask))
    else:
        q, c = encoded(9, 100, 0, bits), encoded(600, 100, 1, bits)
        check(lambda: sdc_topk(q, c, 3, mask=mask))


@pytest.mark.parametrize("k", [1, 10, 700])
def test_slices_and_ties_in_any_order(thread_order: str, k: int) -> None:
    """Codes of which each stands many times, best ones last and first."""
    c, q = packed(5, 64, 0).repeat(TWO_SLICES // 4, 1), packed(3, 64, 1)
    check(lambda: hamming_topk(q, c, k))
    distances = (q[0] ^ c).sum(dim=1)
    for order in (distances.argsort(), distances.argsort(descending=True)):
        check(lambda order=order: hamming_topk(q, c[order], k))


def test_several_launches_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_search_cuda, "WORKSPACE", 2 << 12)
    q, c = encoded(5, 100, 0, 2), encoded(300, 100, 1, 2)
    ends = torch.randint(0, len(c), (5, 2, 2), generator=torch.Generator().manual_seed(0)).sort(dim=-1)[0]
    check(lambda: sdc_topk(q, c, 7, ranges=ends))


def test_rows_are_read_in_place() -> None:
    c, q = packed(300, 1024, 0), packed(3, 512, 1)
    for some in (c[:, :64], c[::3, 32:96], c[:, 1:65], c[:, :64].T.contiguous().T):
        check(lambda some=some: hamming_topk(q, some, 5))
    check(lambda: hamming_topk(q[:, :0], c[:, :0], 5))
    check(lambda: hamming_topk(q[:0], c[:, :64], 5))


def test_extreme_levels() -> None:
    """The largest products and sums of either sign, and scores that are equal, zero and negative."""
    for bits in (1, 2, 3, 4):
        codes = torch.tensor([0, 255, 0, 255, 170], dtype=torch.uint8)[:, None].repeat(1, bits * 512)
        norms = torch.full((5,), 1 / 64)
        codes = SDCCodes(codes, norms, bits, 4096)
        check(lambda codes=codes: sdc_topk(codes, codes, 5))


def test_too_many_codes_for_a_launch(simulated_module: Any) -> None:
    with pytest.raises(RuntimeError, match="more than one launch takes"):
        simulated_module.find_candidates((0, 1, 8, 0), (0, 2**31, 8, 0), 1, 8, 64, True, 0, 0, -1, 1, 0, 0, 0, 0)
