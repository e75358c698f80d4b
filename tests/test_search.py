"""Search over binary and few-bit codes, against NumPy: everything exact, bits, distances, scores and ids."""

import itertools
import subprocess
import sys
import threading

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

import fastembed
from fastembed import SDCCodes, hamming_range, hamming_topk, pack_bits, rescore, sdc_encode, sdc_topk, unpack_bits

# Widths in bytes around every boundary of the kernels: bytes, words, groups of 3 and 7 words, registers.
WIDTHS = (1, 2, 7, 8, 9, 24, 32, 48, 55, 56, 57, 63, 64, 65, 80, 96, 127, 128, 129, 192, 200, 256, 300, 512)
SPECIAL = np.array([0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 1e-45, -1e-45, 1.0, -1.0], np.float32)


def random_codes(rng: np.random.Generator, rows: int, width: int, *, values: int = 256) -> np.ndarray:
    """Codes of `width` bytes; few `values` give many equal distances."""
    return rng.integers(0, values, (rows, width), dtype=np.uint8)


def hamming_oracle(queries: np.ndarray, codes: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    differing = np.unpackbits(queries[:, None] ^ codes[None], axis=-1).sum(axis=-1, dtype=np.int32)
    ids = np.argsort(differing, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(differing, ids, axis=1), ids


def filters_of(
    rng: np.random.Generator, kind: str, queries: int, codes: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Filters of some kinds, and [queries, codes], what they let through."""
    filters: dict[str, np.ndarray] = {}
    allowed = np.ones((queries, codes), bool)
    if "mask" in kind or "ids" in kind:
        listed = rng.random(codes) < rng.choice([0.0, 0.03, 0.5, 0.97, 1.0])
        filters |= {"mask": listed} if "mask" in kind else {"ids": np.flatnonzero(listed)}
        allowed &= listed
    if "ranges" in kind:
        # Few ends, so that queries share ranges as they share inverted lists.
        ends = rng.choice(np.arange(codes + 1), min(codes + 1, 6), replace=False)
        ranges = np.sort(rng.choice(ends, (queries, rng.integers(0, 5), 2)), axis=2)
        filters["ranges"] = ranges
        rows = np.arange(codes)
        allowed &= ((ranges[..., :1] <= rows) & (rows < ranges[..., 1:])).any(axis=1)
    return filters, allowed


FILTERS = ("none", "mask", "ids", "ranges", "mask and ranges", "ids and ranges")


def sdc_oracle(queries: SDCCodes, codes: SDCCodes, k: int) -> tuple[np.ndarray, np.ndarray]:
    dots = queries.levels().astype(np.int64) @ codes.levels().astype(np.int64).T
    scores = dots.astype(np.float32) * codes.inverse_norms * queries.inverse_norms[:, None]
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, ids, axis=1), ids


def assert_same(ours: tuple, expected: tuple) -> None:
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


# ---- pack_bits ----


@given(rows=st.integers(0, 5), dim=st.integers(0, 150), seed=st.integers(0, 99))
def test_pack_bits_is_numpys_packbits(isa: str, rows: int, dim: int, seed: int) -> None:
    x = np.random.default_rng(seed).choice(SPECIAL, (rows, dim))
    expected = np.packbits(x > 0, axis=-1)
    for dtype in (np.float32, np.float16, np.float64):
        converted = x.astype(dtype)
        np.testing.assert_array_equal(pack_bits(converted), np.packbits(converted > 0, axis=-1))
    for dtype in (torch.float32, torch.float64):
        np.testing.assert_array_equal(pack_bits(torch.from_numpy(x).to(dtype)), expected)
    for dtype in (torch.bfloat16, torch.float16):
        converted = torch.from_numpy(x).to(dtype)
        np.testing.assert_array_equal(pack_bits(converted), np.packbits(converted.float().numpy() > 0, axis=-1))


@given(rows=st.integers(0, 5), dim=st.integers(0, 150), seed=st.integers(0, 99))
def test_pack_bits_above_thresholds(isa: str, rows: int, dim: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, thresholds = rng.choice(SPECIAL, (rows, dim)), rng.choice(SPECIAL, dim)
    for dtype in (np.float32, np.float16, np.float64):
        converted = x.astype(dtype)
        expected = np.packbits(converted > thresholds, axis=-1)
        np.testing.assert_array_equal(pack_bits(converted, thresholds=thresholds), expected)
        ours = pack_bits(torch.from_numpy(converted), thresholds=torch.from_numpy(thresholds))
        np.testing.assert_array_equal(ours, expected)
    converted = torch.from_numpy(x).bfloat16()
    expected = np.packbits(converted.float().numpy() > thresholds, axis=-1)
    np.testing.assert_array_equal(pack_bits(converted, thresholds=torch.from_numpy(thresholds)), expected)


@given(dim=st.integers(0, 100), seed=st.integers(0, 99))
def test_unpack_bits_is_the_inverse_of_pack_bits(dim: int, seed: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 2, (2, 3, dim), dtype=np.uint8)
    codes = pack_bits(bits.astype(np.float32))
    np.testing.assert_array_equal(unpack_bits(codes, dim), bits)
    ours = unpack_bits(torch.from_numpy(codes), dim)
    assert ours.dtype == torch.uint8
    np.testing.assert_array_equal(ours, bits)


def test_pack_bits_matches_sentence_transformers() -> None:
    quantization = pytest.importorskip("sentence_transformers.util.quantization")
    x = np.random.default_rng(0).standard_normal((50, 384)).astype(np.float32)
    codes = pack_bits(x)
    np.testing.assert_array_equal(codes, quantization.quantize_embeddings(x, "ubinary"))
    # "binary" are the same bytes less 128: flipping the first bit tells them apart.
    np.testing.assert_array_equal(codes ^ 128, quantization.quantize_embeddings(x, "binary").view(np.uint8))


def test_pack_bits_matches_faiss_but_for_the_order_of_bits() -> None:
    faiss = pytest.importorskip("faiss")
    x = np.random.default_rng(0).standard_normal((50, 384)).astype(np.float32)
    bits = np.zeros((50, 48), np.uint8)
    faiss.fvecs2bitvecs(faiss.swig_ptr(x), faiss.swig_ptr(bits), 384, 50)
    reversed_bits = np.packbits(np.unpackbits(bits, axis=1, bitorder="little"), axis=1)
    np.testing.assert_array_equal(pack_bits(x), reversed_bits)


def test_pack_bits_takes_any_strides_and_leading_axes() -> None:
    x = np.random.default_rng(0).standard_normal((4, 6, 20)).astype(np.float32)
    for view in (x, x[0, 0], x[:, ::2], x.transpose(2, 1, 0), x[..., ::-1], x[::-1]):
        np.testing.assert_array_equal(pack_bits(view), np.packbits(view > 0, axis=-1))
    np.testing.assert_array_equal(pack_bits(torch.from_numpy(x).mT), np.packbits(np.swapaxes(x, 1, 2) > 0, axis=-1))


# ---- hamming_topk ----


@given(
    queries=st.integers(0, 20),
    codes=st.integers(1, 300),
    width=st.sampled_from(WIDTHS),
    values=st.sampled_from([2, 256]),
    k=st.integers(1, 300),
    seed=st.integers(0, 99),
)
def test_hamming_topk_is_exact(isa: str, queries: int, codes: int, width: int, values: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    q, c = random_codes(rng, queries, width, values=values), random_codes(rng, codes, width, values=values)
    k = min(k, codes)
    expected = hamming_oracle(q, c, k)
    ours = hamming_topk(q, c, k)
    assert (ours[0].dtype, ours[1].dtype) == (np.int32, np.int64)
    assert_same(ours, expected)
    assert_same(hamming_topk(*tensors(q, c), k), expected)


@pytest.mark.parametrize("k", [1, 10, 1000, 20_000])
@pytest.mark.parametrize("queries", [1, 9])
def test_hamming_topk_leaves_ties_to_the_smaller_id(isa: str, queries: int, k: int) -> None:
    rng = np.random.default_rng(0)
    same = np.zeros((20_000, 16), np.uint8)
    assert_same(
        hamming_topk(same[:queries], same, k),
        (np.zeros((queries, k), np.int32), np.broadcast_to(np.arange(k), (queries, k))),
    )
    # From far to near: every code enters the buffer.
    falling = np.packbits(np.arange(128) < (128 - np.arange(20_000) // 160)[:, None], axis=1)
    q = random_codes(rng, queries, 16)
    q[0] = 0
    assert_same(hamming_topk(q, falling, k), hamming_oracle(q, falling, k))


def test_hamming_topk_equals_faiss() -> None:
    faiss = pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    q, c = random_codes(rng, 40, 64), random_codes(rng, 5000, 64)
    index = faiss.IndexBinaryFlat(512)
    index.add(c)
    distances, _ = index.search(q, 20)
    np.testing.assert_array_equal(hamming_topk(q, c, 20)[0], distances)


def test_hamming_topk_reads_strided_rows_in_place() -> None:
    rng = np.random.default_rng(0)
    q, c = random_codes(rng, 11, 48), random_codes(rng, 500, 48)
    for rows in (slice(None, None, 3), slice(None, None, -1), slice(100, 200)):
        for columns in (slice(8, 24), slice(0, 47), slice(None, None, 2), slice(None, None, -1)):
            view, query_view = c[rows, columns], q[:, columns]
            expected = hamming_oracle(query_view, view, 7)
            assert_same(hamming_topk(query_view, view, 7), expected)
            if rows.step != -1 and columns.step != -1:
                t, s = torch.from_numpy(c)[rows, columns], torch.from_numpy(q)[:, columns]
                assert_same(hamming_topk(s, t, 7), expected)


def test_hamming_topk_reads_rows_at_any_address(isa: str) -> None:
    # Rows of whole cache lines are read by lines, wherever they begin in one; what lies around them is no part of them.
    rng = np.random.default_rng(0)
    memory = rng.integers(0, 256, 16_384, np.uint8)
    start = -memory.ctypes.data % 64
    for width in (64, 128, 192, 256):
        for offset in (0, 1, 16, 32, 63):
            for stride in (width, width + 64):
                rows = np.lib.stride_tricks.as_strided(memory[start + offset :], (19, width), (stride, 1))
                for count in (1, 8, 19):
                    q = random_codes(rng, 1, width)
                    assert_same(hamming_topk(q, rows[:count], count), hamming_oracle(q, rows[:count], count))


def test_hamming_topk_reads_a_memory_map(tmp_path) -> None:
    rng = np.random.default_rng(0)
    q, c = random_codes(rng, 3, 32), random_codes(rng, 1000, 32)
    c.tofile(tmp_path / "codes")
    mapped = np.memmap(tmp_path / "codes", np.uint8, mode="r", shape=c.shape)
    assert_same(hamming_topk(q, mapped, 5), hamming_oracle(q, c, 5))


def test_hamming_topk_of_codes_without_bytes() -> None:
    distances, ids = hamming_topk(np.empty((3, 0), np.uint8), np.empty((5, 0), np.uint8), 2)
    np.testing.assert_array_equal(distances, np.zeros((3, 2)))
    np.testing.assert_array_equal(ids, [[0, 1]] * 3)


@given(
    queries=st.integers(0, 12),
    codes=st.integers(1, 3000),
    width=st.sampled_from([3, 8, 16, 64, 128, 200]),
    kind=st.sampled_from(FILTERS),
    k=st.integers(1, 400),
    seed=st.integers(0, 99),
)
def test_filtered_hamming_searches_are_exact(
    isa: str, queries: int, codes: int, width: int, kind: str, k: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    q, c = random_codes(rng, queries, width, values=4), random_codes(rng, codes, width, values=4)
    filters, allowed = filters_of(rng, kind, queries, codes)
    k = min(k, codes)
    differing = np.bitwise_count(q[:, None] ^ c[None]).sum(axis=-1, dtype=np.int32)

    barred = np.where(allowed, differing, np.iinfo(np.int32).max)
    ids = np.argsort(barred, axis=1, kind="stable")[:, :k]
    distances = np.take_along_axis(barred, ids, axis=1)
    expected = distances, np.where(np.take_along_axis(allowed, ids, axis=1), ids, -1)
    assert_same(hamming_topk(q, c, k, **filters), expected)
    in_torch = {name: torch.from_numpy(value) for name, value in filters.items()}
    assert_same(hamming_topk(*tensors(q, c), k, **in_torch), expected)

    radius = int(rng.integers(0, 5 * width))
    lims, distances, ids = hamming_range(q, c, radius, **filters)
    assert (lims.dtype, distances.dtype, ids.dtype) == (np.int64, np.int32, np.int64)
    found = [np.flatnonzero(row <= radius) for row in barred]
    found = [near[np.argsort(row[near], kind="stable")] for near, row in zip(found, barred, strict=True)]
    np.testing.assert_array_equal(lims, np.cumsum([0, *map(len, found)]))
    np.testing.assert_array_equal(ids, np.concatenate([*found, np.empty(0, np.int64)]))
    rows = np.repeat(np.arange(queries), np.diff(lims))
    np.testing.assert_array_equal(distances, differing[rows, ids])
    assert_same(hamming_range(*tensors(q, c), radius, **in_torch), (lims, distances, ids))


def test_hamming_range_equals_faiss_at_one_less() -> None:
    faiss = pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    q, c = random_codes(rng, 10, 16), random_codes(rng, 5000, 16)
    index = faiss.IndexBinaryFlat(128)
    index.add(c)
    lims, distances, ids = index.range_search(q, 52)
    ours = hamming_range(q, c, 51)
    np.testing.assert_array_equal(ours[0], lims)
    for first, last in itertools.pairwise(ours[0]):
        order = np.lexsort((ids[first:last], distances[first:last])) + first
        np.testing.assert_array_equal(ours[1][first:last], distances[order])
        np.testing.assert_array_equal(ours[2][first:last], ids[order])


def test_hamming_range_takes_any_radius() -> None:
    c = random_codes(np.random.default_rng(0), 3000, 16)
    lims, distances, ids = hamming_range(c[:2], c, 2**70)
    np.testing.assert_array_equal(lims, [0, 3000, 6000])
    assert_same((distances[:3000], ids[:3000]), [part[0] for part in hamming_oracle(c[:1], c, 3000)])


# ---- sdc ----


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 7, 8])
@given(
    queries=st.integers(0, 12),
    codes=st.integers(1, 200),
    dim=st.sampled_from([1, 3, 8, 15, 31, 33, 63, 64, 65, 100, 128, 384, 511, 1024]),
    k=st.integers(1, 200),
    seed=st.integers(0, 99),
)
def test_sdc_topk_is_exact(isa: str, bits: int, queries: int, codes: int, dim: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((codes, dim)).astype(np.float32)
    # Every code several times: ties.
    encoded = sdc_encode(x[rng.integers(0, codes, codes)], bits)
    q = rng.standard_normal((queries, dim)).astype(np.float32)
    k = min(k, codes)
    expected = sdc_oracle(sdc_encode(q, bits), encoded, k)
    ours = sdc_topk(q, encoded, k)
    assert (ours[0].dtype, ours[1].dtype) == (np.float32, np.int64)
    assert_same(ours, expected)
    in_torch = SDCCodes(*tensors(encoded.codes, encoded.inverse_norms), bits, dim)
    assert_same(sdc_topk(torch.from_numpy(q), in_torch, k), expected)


# Dimensions around every number of pieces of a plane that a register holds.
ROW_DIMS = (8, 60, 64, 72, 128, 136, 192, 256, 300, 384, 512, 640, 1024, 1100, 1536, 2048)


@pytest.mark.parametrize("bits", range(1, 9))
def test_one_query_meets_rows_as_they_lie(isa: str, bits: int) -> None:
    rng = np.random.default_rng(bits)
    for dim in ROW_DIMS:
        x = rng.standard_normal((700, dim)).astype(np.float32)
        q = sdc_encode(rng.standard_normal((1, dim)).astype(np.float32), bits)
        for count in (3, 15, 16, 17, 700):
            codes = sdc_encode(x[:count], bits)
            assert_same(sdc_topk(q, codes, 3), sdc_oracle(q, codes, 3))


def test_sdc_topk_of_codes_with_very_different_norms(isa: str) -> None:
    # The bound that passes a block over goes by its largest inverse norm.
    rng = np.random.default_rng(0)
    for bits in (2, 4, 8):
        x = rng.standard_normal((3000, 40)).astype(np.float32)
        x[::7, 1:] *= 1e-3  # nearly all levels small, one large
        codes, q = sdc_encode(x, bits), sdc_encode(rng.standard_normal((9, 40)).astype(np.float32), bits)
        assert_same(sdc_topk(q, codes, 20), sdc_oracle(q, codes, 20))


@pytest.mark.parametrize("dim", [1, 8, 20, 48, 49, 384, 530, 1500, 7248, 7249])
def test_two_bits_are_looked_up_for_many_queries(isa: str, dim: int) -> None:
    # Lengths around the parts that tables are cut into and the longest whose sums fit 16 bits. Ranges are not looked up
    # and are compared with the reference above.
    rng = np.random.default_rng(dim)
    x = rng.standard_normal((2100, dim)).astype(np.float32)
    x[5:9], x[1800:] = np.abs(x[5:9]) + 9, x[:300]  # the largest sums; ties
    codes, q = sdc_encode(x, 2), sdc_encode(np.concatenate([x[3:40], -x[5:35]]), 2)
    everything = np.tile(np.array([0, len(x)]), (len(q.codes), 1, 1))
    assert_same(sdc_topk(q, codes, 12), sdc_topk(q, codes, 12, ranges=everything))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@given(
    queries=st.integers(0, 12),
    codes=st.integers(1, 1000),
    kind=st.sampled_from(FILTERS),
    k=st.integers(1, 50),
    seed=st.integers(0, 99),
)
def test_filtered_sdc_topk_is_exact(
    isa: str, bits: int, queries: int, codes: int, kind: str, k: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((codes, 20)).astype(np.float32)
    encoded = sdc_encode(x[rng.integers(0, codes, codes)], bits)
    q = sdc_encode(rng.standard_normal((queries, 20)).astype(np.float32), bits)
    filters, allowed = filters_of(rng, kind, queries, codes)
    k = min(k, codes)
    scores, ids = sdc_oracle(q, encoded, codes)
    passed = np.take_along_axis(allowed, ids, axis=1)
    order = np.argsort(~passed, axis=1, kind="stable")[:, :k]
    scores, ids, passed = (np.take_along_axis(part, order, axis=1) for part in (scores, ids, passed))
    expected = np.where(passed, scores, -np.inf), np.where(passed, ids, -1)
    assert_same(sdc_topk(q, encoded, k, **filters), expected)
    in_torch = [SDCCodes(*tensors(some.codes, some.inverse_norms), bits, 20) for some in (q, encoded)]
    filters = {name: torch.from_numpy(value) for name, value in filters.items()}
    assert_same(sdc_topk(*in_torch, k, **filters), expected)
    with fastembed.use_backend("reference"):
        assert_same(sdc_topk(*in_torch, k, **filters), expected)


@pytest.mark.parametrize("bits", range(1, 9))
@given(rows=st.integers(0, 5), dim=st.integers(1, 150), scale=st.sampled_from([1e-30, 1.0, 1e30]))
def test_sdc_encode_is_the_quantiser_it_says(isa: str, bits: int, rows: int, dim: int, scale: float) -> None:
    x = (np.random.default_rng(dim).standard_normal((rows, dim)) * scale).astype(np.float32)
    encoded = sdc_encode(x, bits)
    step = (1.0, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)[bits - 1] * np.sqrt(
        np.mean(np.square(x, dtype=np.float64), axis=1)
    )
    half = 2 ** (bits - 1)
    thresholds = (np.arange(1 - half, half) * step[:, None]).astype(np.float32)
    c = (x[:, :, None] > thresholds[:, None, :]).sum(axis=-1)
    levels = 2 * c - (2**bits - 1)
    np.testing.assert_array_equal(encoded.levels(), levels)
    in_torch = SDCCodes(*tensors(encoded.codes, encoded.inverse_norms), bits, dim)
    np.testing.assert_array_equal(in_torch.levels(), levels)
    np.testing.assert_array_equal(
        encoded.inverse_norms, (1 / np.sqrt(np.square(levels).sum(axis=1))).astype(np.float32)
    )
    for plane in range(bits):
        stored = encoded.codes.reshape(rows, bits, (dim + 7) // 8)[:, plane]
        np.testing.assert_array_equal(stored, np.packbits(c >> (bits - 1 - plane) & 1, axis=1).astype(np.uint8))
    if bits == 1:
        np.testing.assert_array_equal(encoded.codes, pack_bits(x))


def test_sdc_encode_loses_what_the_quantiser_must_lose() -> None:
    x = np.random.default_rng(0).standard_normal((200, 768)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    # Squared errors of the uniform quantisers of a normal source (Max 1960, table II) as cosines.
    for bits, error in ((1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154), (8, 8.77e-5)):
        encoded = sdc_encode(x, bits)
        cosines = (encoded.levels() * encoded.inverse_norms[:, None] * x).sum(axis=1)
        assert abs(cosines.mean() - np.sqrt(1 - error)) < 2e-3


def test_sdc_encode_converts_other_dtypes_exactly() -> None:
    x = torch.randn(20, 100, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        converted = x.to(dtype)
        assert_same((sdc_encode(converted, 2).codes,), (sdc_encode(converted.float(), 2).codes,))
    half = x.half().numpy()
    assert_same((sdc_encode(half, 3).codes,), (sdc_encode(half.astype(np.float32), 3).codes,))


def test_sdc_codes_are_sliced_like_arrays() -> None:
    x = np.random.default_rng(0).standard_normal((30, 40)).astype(np.float32)
    codes = sdc_encode(x, 2)
    for rows in (slice(3, 20), slice(None, None, 2), slice(None, None, -1), np.array([4, 1, 1]), x[:, 0] > 0):
        part = codes[rows]
        assert len(part) == len(x[rows])
        assert_same((part.codes, part.inverse_norms), (codes.codes[rows], codes.inverse_norms[rows]))
        assert_same(sdc_topk(x, part, 3), sdc_oracle(codes, part, 3))
    assert codes.nbytes == 30 * (10 + 4)
    assert codes[:7].codes.base is not None, "a slice shares memory"
    with pytest.raises(TypeError, match="rows"):
        codes[3]


# ---- rescore ----


@given(
    queries=st.integers(0, 5),
    candidates=st.integers(1, 40),
    dim=st.sampled_from([1, 15, 16, 17, 384]),
    k=st.integers(1, 40),
)
def test_rescore_ranks_candidates_by_dot_product(queries: int, candidates: int, dim: int, k: int) -> None:
    rng = np.random.default_rng(dim)
    # Small integers: float32 dot products are exact, and ties are many.
    q, d = (rng.integers(-2, 3, (rows, dim)).astype(np.float32) for rows in (queries, 50))
    ids = rng.integers(0, 50, (queries, candidates))
    k = min(k, candidates)
    scores = np.einsum("qd,qcd->qc", q, d[ids])
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    expected = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
    assert_same(rescore(q, d, ids, k), expected)
    assert_same(rescore(q.astype(np.float16), np.asfortranarray(d.astype(np.float16)), ids, k), expected)
    assert_same(rescore(*tensors(q, d, ids), k), expected)
    assert_same(rescore(*(t.bfloat16() for t in tensors(q, d)), torch.from_numpy(ids), k), expected)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_rescore_of_codes_keeps_the_queries_as_they_are(bits: int) -> None:
    rng = np.random.default_rng(0)
    q, x = (rng.standard_normal((rows, 37)).astype(np.float32) for rows in (6, 90))
    codes, ids = sdc_encode(x, bits), rng.integers(0, 90, (6, 20))
    decoded = codes.levels().astype(np.float32) * codes.inverse_norms[:, None]
    expected = rescore(q, decoded, ids, 7)
    assert_same(rescore(q, codes, ids, 7), expected)
    in_torch = SDCCodes(*tensors(codes.codes, codes.inverse_norms), bits, 37)
    assert_same(rescore(torch.from_numpy(q), in_torch, torch.from_numpy(ids), 7), expected)
    with pytest.raises(IndexError, match="row numbers of the 90 documents, got 90"):
        rescore(q, codes, ids + 90 - ids.max(), 7)


def test_rescore_puts_nan_last() -> None:
    d = np.array([[np.nan], [-np.inf], [1.0], [np.nan], [2.0]], np.float32)
    ids = np.array([[3, 0, 1, 2, 4]])
    for backend in ("cpu", "reference"):
        with fastembed.use_backend(backend):
            scores, order = rescore(*tensors(np.ones((1, 1), np.float32), d, ids), 5)
        np.testing.assert_array_equal(order, [[4, 2, 1, 0, 3]])
        np.testing.assert_array_equal(scores, [[2.0, 1.0, -np.inf, np.nan, np.nan]])


# ---- whatever runs it ----


def test_results_do_not_depend_on_threads_batch_or_concurrency(thread_counts: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    q, c = random_codes(rng, 150, 24, values=4), random_codes(rng, 20_000, 24, values=4)
    x = rng.standard_normal((20_000, 48)).astype(np.float32)
    codes, few = sdc_encode(x, 2), sdc_encode(x[:150], 2)
    expected, expected_sdc = hamming_oracle(q, c, 25), sdc_oracle(few, codes, 25)
    for threads in thread_counts:
        torch.set_num_threads(threads)
        for batch in (1, 7, 150):
            assert_same(hamming_topk(q[:batch], c, 25), [part[:batch] for part in expected])
            assert_same(sdc_topk(few[:batch], codes, 25), [part[:batch] for part in expected_sdc])
        failures: list[BaseException] = []

        def search_repeatedly(failures: list[BaseException] = failures) -> None:
            try:
                for _ in range(3):
                    assert_same(hamming_topk(q[:9], c, 25), [part[:9] for part in expected])
                    assert_same(sdc_topk(few[:9], codes, 25), [part[:9] for part in expected_sdc])
            except BaseException as error:
                failures.append(error)

        searchers = [threading.Thread(target=search_repeatedly) for _ in range(8)]
        for searcher in searchers:
            searcher.start()
        for searcher in searchers:
            searcher.join()
        assert not failures


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import numpy as np
import fastembed
x = np.random.default_rng(0).standard_normal((100, 40)).astype(np.float32)
distances, ids = fastembed.hamming_topk(fastembed.pack_bits(x[:5]), fastembed.pack_bits(x), 3)
assert (ids[:, 0] == range(5)).all() and (distances[:, 0] == 0).all()
scores, ids = fastembed.sdc_topk(x[:5], fastembed.sdc_encode(x, 2), 3)
assert (ids[:, 0] == range(5)).all()
quantizer = fastembed.ScalarQuantizer.fit(x, 4)
_, scalar_ids = fastembed.scalar_topk(quantizer.encode_queries(x[:5]), quantizer.encode(x), 3)
assert (scalar_ids[:, 0] == range(5)).all()
scores, ids = fastembed.rescore(x[:5], x, ids, 2)
assert (ids[:, 0] == range(5)).all()
try:
    fastembed.pack_bits([1.0])
except TypeError as error:
    assert "x must be a NumPy array" in str(error)
else:
    raise AssertionError
assert not any(name.startswith("torch") and module for name, module in sys.modules.items())
"""


def test_numpy_needs_no_pytorch() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
