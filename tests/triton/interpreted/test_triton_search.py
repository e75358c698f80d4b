"""The Triton search kernels, run by the mended interpreter, against the reference: every id and bit of a score."""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import interpreter
import pytest
import torch
import triton
from changed_kernels import changed
from hypothesis import given, settings
from hypothesis import strategies as st
from search_cases import assert_equals_reference, encoded, packed, scalar_codes, searches
from torch import Tensor

import fastembed
from fastembed import SDCCodes, hamming_topk, scalar_topk, sdc_topk
from fastembed import triton_kernels as package
from fastembed.ops import _search_torch, _search_triton
from fastembed.triton_kernels import search as kernels

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")

FEW, MANY, BLOCK = kernels.FEW_QUERIES.value, kernels.MANY_QUERIES, kernels.BLOCK_CODES.value
# Codes of which k = 1 leaves groups of 16, and of 128.
OF_GROUPS = (kernels.REVISITED * 16 + 3, kernels.REVISITED * 128 + 5)

Case = tuple[int, int, int, int, dict[str, Tensor]]


def check(search: Callable[[], tuple[Tensor, ...]]) -> None:
    assert_equals_reference(search, "triton")


def sizes() -> st.SearchStrategy[Case]:
    return searches((1, FEW, FEW + 1, MANY + 1), (1, 17, BLOCK, BLOCK + 1, 700, *OF_GROUPS))


@settings(max_examples=15)
@given(case=sizes())
def test_hamming(case: Case) -> None:
    queries, codes, dim, k, chosen = case
    q, c = packed(queries, dim, 0), packed(codes, dim, 1)
    check(lambda: hamming_topk(q, c, k, **chosen))


@settings(max_examples=15)
@given(case=sizes(), bits=st.integers(1, 8))
def test_levels(case: Case, bits: int) -> None:
    queries, codes, dim, k, chosen = case
    q, c = encoded(queries, dim, 0, bits), encoded(codes, dim, 1, bits)
    check(lambda: sdc_topk(q, c, k, **chosen))


@settings(max_examples=15)
@given(case=sizes(), bits=st.integers(1, 8), query_bits=st.sampled_from((1, 4, 8, 9, 15)))
def test_scalar_codes(case: Case, bits: int, query_bits: int) -> None:
    queries, codes, dim, k, chosen = case
    q, c = scalar_codes(queries, dim, 0, query_bits), scalar_codes(codes, dim, 1, bits)
    check(lambda: scalar_topk(q, c, k, **chosen))


@pytest.mark.parametrize("codes", OF_GROUPS)
@pytest.mark.parametrize("k", [1, 3, 60])
def test_ties_in_any_order(codes: int, k: int) -> None:
    """Codes of which each stands many times, best ones last and first, and programs that run in different orders."""
    c, q = packed(5, 64, 0).repeat(-(-codes // 5), 1)[:codes], packed(3, 64, 1)
    distances = (q[0] ^ c).sum(dim=1)
    for seed, order in enumerate((distances.argsort(), distances.argsort(descending=True))):
        with interpreter.program_order(seed):
            check(lambda order=order: hamming_topk(q, c[order], k))


def test_a_filter_leaves_less_than_a_group_has() -> None:
    q, c = packed(2, 64, 0), packed(OF_GROUPS[1], 64, 1)
    for rows in ([], [1000], [0, 1, 130, 600]):
        check(lambda rows=rows: hamming_topk(q, c, 5, ids=torch.tensor(rows, dtype=torch.int64)))


def test_several_passes_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WORKSPACE", 600)
    q, c = packed(5, 100, 0), packed(OF_GROUPS[1], 100, 1)
    ends = torch.randint(0, len(c), (5, 2, 2), generator=torch.Generator().manual_seed(0)).sort(dim=-1)[0]
    for k in (1, 40, 300):
        check(lambda k=k: hamming_topk(q, c, k, ranges=ends))


def test_a_query_alone_finds_the_same() -> None:
    q, c = encoded(FEW + 1, 100, 0, 3), encoded(300, 100, 1, 3)
    with fastembed.use_backend("triton"):
        together = sdc_topk(q, c, 9)
        for row in (0, FEW):
            alone = sdc_topk(q[row : row + 1], c, 9)
            assert all(torch.equal(one, all_[row : row + 1]) for one, all_ in zip(alone, together, strict=True))


def test_rows_are_read_in_place() -> None:
    c, q = packed(300, 1024, 0), packed(3, 512, 1)
    for some in (c[:, :64], c[::3, 32:96], c[:, 1:65], c[:, :64].T.contiguous().T):
        check(lambda some=some: hamming_topk(q, some, 5))
    check(lambda: hamming_topk(q[:, :0], c[:, :0], 5))
    check(lambda: hamming_topk(q[:0], c[:, :64], 5))


@pytest.mark.parametrize("bits", [1, 7, 8])
def test_extreme_levels(bits: int) -> None:
    """The largest products and sums of either sign, and scores that are equal, zero and negative."""
    data = torch.tensor([0, 255, 0, 255, 170], dtype=torch.uint8)[:, None].repeat(1, bits * 512)
    codes = SDCCodes(data, torch.full((5,), 1 / 64), bits, 4096)
    check(lambda: sdc_topk(codes, codes, 5))


def test_bits_beyond_the_last_dimension_do_not_count() -> None:
    for bits in (1, 8):
        q, c = encoded(2, 77, 0, bits), encoded(40, 77, 1, bits)
        dirty = c.codes.clone().reshape(40, bits, 10)
        dirty[..., -1] |= 7
        check(lambda c=c, q=q, dirty=dirty: sdc_topk(q, SDCCodes(dirty.flatten(1), c.inverse_norms, c.bits, 77), 9))


def test_takes_the_bits_that_the_cuda_kernels_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_search_torch.sdc_topk, "_choose", lambda *_: "cuda")
    ran = mock.Mock(wraps=_search_triton.sdc_topk)
    monkeypatch.setattr(_search_triton, "sdc_topk", ran)
    sdc_topk(encoded(2, 20, 0, 5), encoded(9, 20, 1, 5), 3)
    assert ran.call_count == 1


def sdc_ties() -> tuple[Tensor, Tensor]:
    """Among the best of the last, short, group as well."""
    rows = torch.randint(0, 200, (OF_GROUPS[1],), generator=torch.Generator().manual_seed(0))
    codes = encoded(200, 77, 0, 8)[rows]
    return sdc_topk(codes[-2:], codes, 8, mask=rows % 3 != 1)


def all_sdc() -> tuple[Tensor, Tensor]:
    return sdc_topk(encoded(2, 77, 0, 2), encoded(40, 77, 1, 2), 40)


def ranges_of_hamming() -> tuple[Tensor, Tensor]:
    q, c = packed(MANY + 1, 200, 0), packed(OF_GROUPS[0], 200, 1)
    ends = torch.randint(0, len(c), (len(q), 2, 2), generator=torch.Generator().manual_seed(0)).sort(dim=-1)[0]
    return hamming_topk(q, c, 60, ranges=ends)


def scalar_queries_of_two_bytes() -> tuple[Tensor, Tensor]:
    return scalar_topk(scalar_codes(2, 77, 0, 15), scalar_codes(130, 77, 1, 5), 130)


# What each search finds wrong when the kernels have the bug.
BUGS: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], str, str]] = {
    "best of a group by its last key": (sdc_ties, "keys = tl.min(tl.reshape", "keys = tl.max(tl.reshape"),
    "groups named by their block": (sdc_ties, "<< 32) | group[:, None]", "<< 32) | block"),
    "members not named": (sdc_ties, "<< 32) | id, mask", "<< 32) | member, mask"),
    "another query's members": (sdc_ties, "chosen + row * k +", "chosen +"),
    "mask forgotten": (sdc_ties, "other=0) != 0)[:, None]", "other=0) >= 0)[:, None]"),
    "codes past the last": (sdc_ties, "inside = (exists & (id < count))[:, None]", "inside = exists[:, None]"),
    "groups past the last": (sdc_ties, "wanted = (group < groups)[:, None]", "wanted = (group >= 0)[:, None]"),
    "scores ascend": (sdc_ties, "return ~(bits ^", "return (bits ^"),
    "negative scores ascend": (all_sdc, "(bits ^ ((bits >> 31) & 0x7FFFFFFF))", "bits"),
    "planes in the wrong order": (sdc_ties, "<< (BITS - 1 - plane)", "<< plane"),
    "codes not centred": (sdc_ties, "(codes - half)", "(codes - 0 * half)"),
    "bytes of the next plane": (sdc_ties, "is_row[:, None] & (byte < plane_bytes)[None, :]", "is_row[:, None] & True"),
    "first byte of a query twice": (sdc_ties, "first * 128 + second", "first * 128 + first"),
    "one range only": (ranges_of_hamming, "for i in range(0, range_count)", "for i in range(0, 1)"),
    "ranges with their ends": (ranges_of_hamming, "id[:, None] < end[None, :]", "id[:, None] <= end[None, :]"),
    "ranges of another query": (ranges_of_hamming, "(query * range_count + i) * 2", "(query * 0 + i) * 2"),
    "tiles that overlap": (ranges_of_hamming, "row = tl.program_id(0) % tiles * QUERIES", "row = 0"),
    "offset of the wrong part": (
        scalar_queries_of_two_bytes,
        "queries.offsets + query * 2 + 1",
        "queries.offsets + query * 2",
    ),
    "part of the wrong query": (scalar_queries_of_two_bytes, "(PARTS * query_dims)", "query_dims"),
    "sum of the wrong code": (scalar_queries_of_two_bytes, "codes.factors + id * 4 + 2", "codes.factors + id + 2"),
    "terms in another order": (
        scalar_queries_of_two_bytes,
        "* f1 + total * f2) + extra) + f3",
        "* f1 + (total * f2 + extra)) + f3)",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_found(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search, *change = BUGS[bug]
    check(search)
    monkeypatch.setattr(package, "search", changed(kernels, tmp_path / "broken.py", change))
    with pytest.raises((AssertionError, triton.runtime.errors.InterpreterError)):
        check(search)
