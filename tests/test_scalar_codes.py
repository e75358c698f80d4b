"""Scalar codes: quantisers against what defines them, the search against its reference, every bit."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch.library import opcheck

import fastembed
from fastembed import ScalarCodes, ScalarQuantizer, hamming_topk, pack_bits, scalar_topk, sdc_encode, sdc_topk

DIMS = (1, 2, 7, 8, 31, 33, 64, 65, 100, 128, 257, 384)
QUERY_BITS = (1, 3, 4, 7, 8, 9, 15)


def vectors(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32) + np.float32(0.2)


def as_tensors(codes: ScalarCodes) -> ScalarCodes:
    return ScalarCodes(torch.from_numpy(codes.codes), torch.from_numpy(codes.factors), codes.bits, codes.dim)


def random_codes(rng: np.random.Generator, rows: int, dim: int, bits: int) -> ScalarCodes:
    """Any integers there are, every vector several times, and factors of any sign: more than quantisers give."""
    c = rng.integers(0, 2**bits, (rows, dim))
    planes = [np.packbits(c >> shift & 1, axis=1) for shift in reversed(range(bits))]
    factors = rng.standard_normal((rows, 4)).astype(np.float32)
    factors[:, 2] = c.sum(axis=1)
    codes = ScalarCodes(np.concatenate(planes, axis=1).astype(np.uint8), factors, bits, dim)
    return codes[rng.integers(0, max(rows, 1), rows)]


def assert_same(ours: tuple, expected: tuple) -> None:
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def oracle(queries: ScalarCodes, codes: ScalarCodes, k: int, allowed: np.ndarray | None = None) -> tuple:
    """The score in NumPy's float32, operation by operation."""
    c, factors = codes.integers().astype(np.int64), codes.factors
    lower, step, total, extra = factors[:, 0], factors[:, 1], None, factors[:, 3]
    total = lower * np.float32(codes.dim) + step * factors[:, 2]
    half = 2 ** (queries.bits - 1)
    s = queries.integers().astype(np.int64) - half
    if queries.bits <= 8:
        product = (s @ c.T).astype(np.float32)
    else:
        product = (s // 128 @ c.T).astype(np.float32) * np.float32(128) + (s % 128 @ c.T).astype(np.float32)
    q_lower, q_step, _, q_extra = queries.factors.T[..., None]
    scores = (step * product + lower * s.sum(axis=1, keepdims=True).astype(np.float32)) * q_step
    scores = scores + total * (q_lower + q_step * np.float32(half)) + extra + q_extra
    assert scores.dtype == np.float32
    if allowed is not None:
        scores = np.where(allowed, scores, -np.inf)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(scores, ids, axis=1)
    return scores, np.where(np.isneginf(scores), -1, ids)


# ---- search ----


@pytest.mark.parametrize("bits", range(1, 9))
@given(
    queries=st.integers(0, 19),
    codes=st.integers(1, 200),
    dim=st.sampled_from(DIMS),
    query_bits=st.sampled_from(QUERY_BITS),
    k=st.integers(1, 200),
    seed=st.integers(0, 99),
)
def test_scalar_topk_is_exact(
    isa: str, bits: int, queries: int, codes: int, dim: int, query_bits: int, k: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    q, c = random_codes(rng, queries, dim, query_bits), random_codes(rng, codes, dim, bits)
    k = min(k, codes)
    expected = oracle(q, c, k)
    ours = scalar_topk(q, c, k)
    assert (ours[0].dtype, ours[1].dtype) == (np.float32, np.int64)
    assert_same(ours, expected)
    assert_same(scalar_topk(as_tensors(q), as_tensors(c), k), expected)


@given(
    bits=st.sampled_from([1, 2, 4, 5, 8]),
    query_bits=st.sampled_from([4, 8, 15]),
    codes=st.integers(1, 1000),
    kind=st.sampled_from(["mask", "ids", "ranges", "mask and ranges"]),
    k=st.integers(1, 50),
    seed=st.integers(0, 99),
)
def test_filtered_scalar_topk_is_exact(
    isa: str, bits: int, query_bits: int, codes: int, kind: str, k: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    q, c = random_codes(rng, 9, 20, query_bits), random_codes(rng, codes, 20, bits)
    filters: dict[str, np.ndarray] = {}
    allowed = np.ones((9, codes), bool)
    if "mask" in kind or "ids" in kind:
        listed = rng.random(codes) < rng.choice([0.03, 0.5, 0.97])
        filters |= {"mask": listed} if "mask" in kind else {"ids": np.flatnonzero(listed)}
        allowed &= listed
    if "ranges" in kind:
        filters["ranges"] = np.sort(rng.integers(0, codes + 1, (9, 3, 2)), axis=2)
        rows = np.arange(codes)
        allowed &= ((filters["ranges"][..., :1] <= rows) & (rows < filters["ranges"][..., 1:])).any(axis=1)
    k = min(k, codes)
    expected = oracle(q, c, k, allowed)
    assert_same(scalar_topk(q, c, k, **filters), expected)
    in_torch = {name: torch.from_numpy(value) for name, value in filters.items()}
    assert_same(scalar_topk(as_tensors(q), as_tensors(c), k, **in_torch), expected)
    with fastembed.use_backend("reference"):
        assert_same(scalar_topk(as_tensors(q), as_tensors(c), k, **in_torch), expected)


@pytest.mark.parametrize("bits", range(1, 9))
def test_one_query_meets_rows_as_they_lie(isa: str, bits: int) -> None:
    rng = np.random.default_rng(bits)
    for dim in (8, 60, 64, 128, 136, 192, 256, 384, 512, 640, 1024, 1100, 2048):
        codes = random_codes(rng, 700, dim, bits)
        for query_bits in (4, 8, 15):
            q = random_codes(rng, 1, dim, query_bits)
            for count in (3, 17, 700):
                assert_same(scalar_topk(q, codes[:count], 3), oracle(q, codes[:count], 3))


def test_largest_products_do_not_overflow(isa: str) -> None:
    dim = (2**31 - 1) // (128 * 255)
    ones = np.packbits(np.ones(dim, np.uint8))
    codes = ScalarCodes(np.tile(ones, (2, 8)), np.array([[0, 1, 255 * dim, 0]] * 2, np.float32), 8, dim)
    for c in (0, 255):  # s = -128 and 127 in every dim
        query = np.tile(ones if c else 0 * ones, (1, 8))
        q = ScalarCodes(query, np.array([[0, 1, c * dim, 0]], np.float32), 8, dim)
        assert_same(scalar_topk(q, codes, 2), oracle(q, codes, 2))


@pytest.mark.parametrize("query_bits", [4, 8])
@pytest.mark.parametrize("bits", [1, 2])
def test_long_codes_are_looked_up_in_parts(isa: str, bits: int, query_bits: int) -> None:
    rng = np.random.default_rng(0)
    for dim in (1023, 5000):
        q, c = random_codes(rng, 7, dim, query_bits), random_codes(rng, 600, dim, bits)
        q.codes[0], q.codes[1], c.codes[:3] = 0, 255, 255  # the least and the largest sums
        assert_same(scalar_topk(q, c, 20), oracle(q, c, 20))


def test_more_queries_than_meet_a_block_together() -> None:
    rng = np.random.default_rng(0)
    q, c = random_codes(rng, 2100, 16, 4), random_codes(rng, 50, 16, 1)
    ranges = np.sort(rng.integers(0, 51, (2100, 1, 2)), axis=2)
    rows = np.arange(50)
    allowed = ((ranges[..., :1] <= rows) & (rows < ranges[..., 1:])).any(axis=1)
    assert_same(scalar_topk(q, c, 7, ranges=ranges), oracle(q, c, 7, allowed))


def test_results_do_not_depend_on_threads_or_batch(thread_counts: tuple[int, ...]) -> None:
    x = vectors(20_000, 48)
    quantizer = ScalarQuantizer.fit(x, 4)
    codes, q = quantizer.encode(x), quantizer.encode_queries(x[:130])
    expected = oracle(q, codes, 15)
    for threads in thread_counts:
        torch.set_num_threads(threads)
        assert_same((quantizer.encode(x[:50]).codes,), (codes.codes[:50],))
        for batch in (1, 7, 130):
            assert_same(scalar_topk(q[:batch], codes, 15), [part[:batch] for part in expected])


# ---- other codes in this form ----


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_codes_of_recurrent_binary_embeddings_are_searched_alike(bits: int) -> None:
    codes = sdc_encode(vectors(300, 100), bits)
    ours = ScalarCodes.from_sdc(codes)
    np.testing.assert_allclose(ours.decode(), codes.levels() * codes.inverse_norms[:, None], atol=1e-6)
    expected, _ = sdc_topk(codes[:20], codes, 300)
    scores, _ = scalar_topk(ours[:20], ours, 300)
    np.testing.assert_allclose(scores, expected, atol=2e-6)
    in_torch = ScalarCodes.from_sdc(sdc_encode(torch.from_numpy(vectors(300, 100)), bits))
    assert_same((in_torch.codes, in_torch.factors), (ours.codes, ours.factors))


def test_binary_codes_score_by_their_hamming_distance() -> None:
    bits = pack_bits(vectors(300, 100))
    codes = ScalarCodes.from_bits(bits, 100)
    distances, ids = hamming_topk(bits[:20], bits, 50)
    assert_same(scalar_topk(codes[:20], codes, 50), (100 - 2.0 * distances, ids))


def test_signs_of_unit_vectors_rank_by_their_hamming_distance() -> None:
    x = vectors(300, 64)
    codes = ScalarQuantizer(64, 1, "sign", rotation=False).encode(x)
    np.testing.assert_array_equal(codes.codes, pack_bits(x))
    scores, _ = scalar_topk(codes[:20], codes, 300)
    distances, _ = hamming_topk(pack_bits(x[:20]), pack_bits(x), 300)
    np.testing.assert_allclose(scores, 1 - 2 * distances / 64, atol=1e-6)


def test_rabitq_estimates_as_faiss_does() -> None:
    """One bit, no rotation: FAISS's RaBitQ estimates the distance by the same formula, its query kept in float32."""
    faiss = pytest.importorskip("faiss")
    x, q = vectors(400, 96), vectors(15, 96, seed=1)
    index = faiss.IndexRaBitQ(96, faiss.METRIC_L2)
    index.train(x)
    index.add(x)
    index.qb = 0  # queries as they are
    distances, ids = index.search(q, 400)
    centroid = faiss.vector_to_array(index.center)
    quantizer = ScalarQuantizer(96, 1, "rabitq", "l2", centroid, rotation=False)
    scores, ours = scalar_topk(quantizer.encode_queries(q, 15), quantizer.encode(x), 400)
    by_id = [
        np.take_along_axis(values, np.argsort(order, axis=1), axis=1)
        for values, order in ((distances, ids), (-2 * scores, ours))
    ]
    np.testing.assert_allclose(by_id[1], by_id[0], rtol=2e-4)


# ---- quantisers ----

METHODS = (
    [("rabitq", bits) for bits in (1, 2, 3, 4, 6, 8)] + [("osq", bits) for bits in (1, 2, 4, 7, 8, 15)] + [("sign", 1)]
)


@pytest.mark.parametrize(("method", "bits"), METHODS)
@given(
    rows=st.integers(0, 6),
    dim=st.sampled_from((16, 33, 64, 100, 128)),
    metric=st.sampled_from(["ip", "cosine", "l2"]),
    centred=st.booleans(),
    rotated=st.booleans(),
)
def test_encoders_equal_their_reference(
    method: str, bits: int, rows: int, dim: int, metric: str, centred: bool, rotated: bool
) -> None:
    x = torch.from_numpy(vectors(rows, dim, seed=dim))
    centroid = torch.full((dim,), 0.2) if centred else None
    signs = torch.randint(0, 2, (4, dim), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    args = (centroid, signs if rotated else None, bits, method, metric)
    encode = torch.ops.fastembed.scalar_encode
    codes, factors = encode(x, *args)
    with fastembed.use_backend("reference"):
        expected, expected_factors = encode(x, *args)
    ours, theirs = ScalarCodes(codes, factors, bits, dim), ScalarCodes(expected, expected_factors, bits, dim)
    if method == "rabitq" and bits > 1:
        # Two scales may be equally good but for the order of a sum, and then the best next to either is found.
        levels = [some.integers() - (2**bits - 1) / 2 for some in (ours, theirs)]
        widths = [some.factors[:, 1] * w.norm(dim=1) for some, w in zip((ours, theirs), levels, strict=True)]
        torch.testing.assert_close(*widths, rtol=1e-5, atol=0)  # the length of the vector over the cosine
        torch.testing.assert_close(factors[:, 3], expected_factors[:, 3], rtol=1e-6, atol=1e-6)
    else:
        assert_same((codes,), (expected,))
        torch.testing.assert_close(factors, expected_factors, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", range(1, 9))
def test_rabitq_finds_the_closest_codes(bits: int) -> None:
    x = vectors(20, 40).astype(np.float64)
    x[1], x[2, 1:], x[3, ::2] = 1.0, 0.0, 0.0  # all equal, a spike, many zeros
    quantizer = ScalarQuantizer(40, bits, metric="ip", rotation=False)
    codes = quantizer.encode(x)
    half, most = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    w = codes.integers() - (2**bits - 1) / 2
    np.testing.assert_array_equal(w > 0, x > 0)
    x = x.astype(np.float32).astype(np.float64)
    products = (w * x).sum(axis=1)
    step = (x**2).sum(axis=1) / products
    np.testing.assert_allclose(codes.factors[:, 1], step, rtol=1e-6)
    np.testing.assert_allclose(codes.factors[:, 0], step * (0.5 - half), rtol=1e-6)
    # Unbiased along the vector itself.
    np.testing.assert_allclose((codes.decode() * x).sum(axis=1), (x**2).sum(axis=1), rtol=1e-5)
    # The best of all scales at which any code changes. Up to 2 bits all of them are tried, beyond grids lead there.
    for row, reached in zip(np.abs(x), products / np.linalg.norm(w, axis=1), strict=True):
        scales = (np.arange(1, most + 1)[:, None] / row[row > 0]).ravel() * (1 + 1e-12)
        levels = np.minimum(np.floor(np.append(scales, 0)[:, None] * row), most) + 0.5
        best = ((levels * row).sum(axis=1) / np.linalg.norm(levels, axis=1)).max()
        assert reached >= best * (1 - (1e-12 if bits <= 2 else 1e-4))


@pytest.mark.parametrize("bits", range(1, 9))
def test_optimised_intervals_lose_less_than_those_they_start_from(bits: int) -> None:
    x = vectors(50, 64).astype(np.float64)
    codes = ScalarQuantizer(64, bits, "osq", "ip", rotation=False).encode(x)
    x = x.astype(np.float32).astype(np.float64)

    def loss(decoded: np.ndarray) -> np.ndarray:
        off = x - decoded
        along = (x * off).sum(axis=1) ** 2 / (x**2).sum(axis=1)
        return 0.9 * along + 0.1 * (off**2).sum(axis=1)

    reach = (0.798, 1.493, 2.051, 2.514, 2.916, 3.278, 3.611, 3.922)[bits - 1] * x.std(axis=1, keepdims=True)
    mean = x.mean(axis=1, keepdims=True)
    lower, upper = np.maximum(mean - reach, x.min(1, keepdims=True)), np.minimum(mean + reach, x.max(1, keepdims=True))
    step = (upper - lower) / (2**bits - 1)
    start = lower + step * np.floor((np.clip(x, lower, upper) - lower) / step + 0.5)
    assert (loss(codes.decode()) <= loss(start) * (1 + 1e-4)).all()  # factors are rounded to float32
    np.testing.assert_array_equal(codes.factors[:, 2], codes.integers().sum(axis=1))


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
@pytest.mark.parametrize("method", ["rabitq", "osq"])
def test_scores_estimate_the_metric(method: str, metric: str) -> None:
    x, q = vectors(300, 200) + 1, vectors(20, 200, seed=1) + 1
    quantizer = ScalarQuantizer.fit(x, 8, method=method, metric=metric)
    codes = quantizer.encode(x)
    if metric == "cosine":
        x, q = (some / np.linalg.norm(some, axis=1, keepdims=True) for some in (x, q))
    truth = q @ x.T if metric != "l2" else -((q[:, None] - x) ** 2).sum(axis=2) / 2
    # Of a centred vector, 8 bits lose a ten-thousandth of the squared length at most (Max 1960: 0.88e-4), in a random
    # direction. Six standard deviations of what that does to inner products of two such vectors.
    longest = [np.linalg.norm(some - x.mean(axis=0), axis=1).max() for some in (q, x)]
    bound = 6 * longest[0] * longest[1] * np.sqrt(2 * 1e-4 / 200)
    for queries in (quantizer.encode_queries(q, 15), quantizer.encode_queries(q), quantizer.encode(q)):
        scores, ids = scalar_topk(queries, codes, 300)
        assert np.abs(scores - np.take_along_axis(truth, ids, axis=1)).max() < bound


def test_the_rotation_is_orthogonal_and_the_same_everywhere() -> None:
    from fastembed.reference.scalar_codes import rotate

    for dim in (1, 2, 3, 64, 96, 100, 129):
        signs = torch.from_numpy(ScalarQuantizer(dim, 1, seed=5)._signs)
        turned = rotate(torch.eye(dim, dtype=torch.float64), signs)
        torch.testing.assert_close(turned @ turned.T, torch.eye(dim, dtype=torch.float64))
    assert "".join(map(str, ScalarQuantizer(16, 1)._signs[0])) == "0010100110010010"


def test_dtypes_are_converted_exactly_and_strides_do_not_matter() -> None:
    x = torch.from_numpy(vectors(20, 40))
    quantizer = ScalarQuantizer.fit(x, 3)
    assert isinstance(quantizer.centroid, np.ndarray)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        converted = x.to(dtype)
        ours, expected = quantizer.encode(converted), quantizer.encode(converted.float())
        assert_same((ours.codes, ours.factors), (expected.codes, expected.factors))
        assert isinstance(ours.codes, torch.Tensor)
    for view in (x.numpy()[::2, ::-1], x.numpy().astype(np.float16), np.asfortranarray(x.numpy())):
        ours = quantizer.encode(view)
        expected = quantizer.encode(np.ascontiguousarray(view, np.float32))
        assert_same((ours.codes, ours.factors), (expected.codes, expected.factors))


def test_vectors_without_length_are_encoded() -> None:
    x = np.zeros((3, 10), np.float32)
    x[1] = 1
    for method, bits in METHODS:
        if bits > 8:
            continue
        codes = ScalarQuantizer(10, bits, method, rotation=False).encode(x)
        assert np.isfinite(codes.factors).all()
        np.testing.assert_allclose(codes.decode()[0], 0)


def test_scalar_codes_are_sliced_like_arrays() -> None:
    codes = ScalarQuantizer(40, 2).encode(vectors(30, 40))
    for rows in (slice(3, 20), np.array([4, 1, 1]), np.arange(30) % 3 == 0):
        part = codes[rows]
        assert_same((part.codes, part.factors), (codes.codes[rows], codes.factors[rows]))
        assert_same(scalar_topk(codes, part, 2), oracle(codes, part, 2))
    assert len(codes) == 30
    assert codes.nbytes == 30 * (10 + 16)
    assert codes[:7].codes.base is not None, "a slice shares memory"


# ---- as PyTorch sees it, and bad input ----

X = torch.from_numpy(vectors(50, 40))
QUANTIZER = ScalarQuantizer.fit(X, 2)
CODES = QUANTIZER.encode(X)
Q8 = QUANTIZER.encode_queries(X[:5])
OPS: dict[str, tuple[Any, ...]] = {
    "scalar_encode": (X, X[0], torch.from_numpy(QUANTIZER._signs), 2, "osq", "l2"),
    "scalar_topk": (Q8.codes, Q8.factors, 8, CODES.codes, CODES.factors, 2, 40, 3, X[:, 0] > 0),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("change", [lambda t: t, lambda t: t.mT.contiguous().mT if t.dim() == 2 else t])
def test_opcheck(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    args = tuple(change(arg) if isinstance(arg, torch.Tensor) else arg for arg in OPS[name])
    opcheck(getattr(torch.ops.fastembed, name).default, args)


def test_compiles_into_one_graph() -> None:
    def search(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return scalar_topk(QUANTIZER.encode_queries(x), CODES, 3)

    assert_same(torch.compile(search, fullgraph=True, backend="aot_eager")(X), search(X))


def test_encoding_has_no_backward() -> None:
    x = X.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="scalar_encode"):
        QUANTIZER.encode(x).factors.sum().backward()


N = np.asarray
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ScalarQuantizer(40, 9), ValueError, "bits must be between 1 and 8, got 9"),
    (lambda: ScalarQuantizer(40, 2, "sign"), ValueError, "bits must be between 1 and 1, got 2"),
    (lambda: ScalarQuantizer(40, 2, "pq"), ValueError, "method must be 'rabitq' or 'osq' or 'sign', got 'pq'"),
    (lambda: ScalarQuantizer(40, 2, metric="dot"), ValueError, "metric must be 'ip' or 'cosine' or 'l2', got 'dot'"),
    (lambda: ScalarQuantizer(0, 2), ValueError, "dim must be between 1 and"),
    (lambda: ScalarQuantizer(65794, 8), ValueError, "dim must be between 1 and 65793, got 65794"),
    (lambda: ScalarQuantizer(40.0, 2), TypeError, "dim must be an integer"),
    (lambda: ScalarQuantizer(40, 2, seed=-1), ValueError, "seed must be between"),
    (lambda: ScalarQuantizer(40, 2, centroid=X[0, 1:]), ValueError, "centroid must have 40 dims, got 39"),
    (lambda: ScalarQuantizer(40, 2, centroid=X[0] * torch.nan), ValueError, "centroid must be finite"),
    (lambda: ScalarQuantizer(40, 2, centroid=X[0].double()), TypeError, "centroid must be float32"),
    (lambda: ScalarQuantizer.fit(X[:0], 2), ValueError, "x must have at least one row"),
    (lambda: ScalarQuantizer.fit(X / 0, 2), ValueError, "x must be finite"),
    (lambda: ScalarQuantizer.fit([1.0], 2), TypeError, "x must be a NumPy array or a tensor"),
    (lambda: QUANTIZER.encode(X[:, 1:]), ValueError, "x must have the 40 dims of the quantizer, got 39"),
    (lambda: QUANTIZER.encode(X[0]), ValueError, "x must have shape"),
    (lambda: QUANTIZER.encode(X.int()), TypeError, "x must be bfloat16 or float16"),
    (
        lambda: QUANTIZER.encode(torch.cat([X[:9], X[:1] / 0])),
        ValueError,
        "x must be finite, got a NaN or infinity in row 9",
    ),
    (lambda: QUANTIZER.encode_queries(X, 16), ValueError, "bits must be between 1 and 15, got 16"),
    (lambda: scalar_topk(X, CODES, 1), TypeError, "queries must be ScalarCodes, got Tensor"),
    (lambda: scalar_topk(CODES, X, 1), TypeError, "codes must be ScalarCodes, got Tensor"),
    (lambda: scalar_topk(Q8, QUANTIZER.encode_queries(X, 9), 1), ValueError, "bits must be between 1 and 8, got 9"),
    (lambda: scalar_topk(Q8, CODES, 51), ValueError, "k must be between 1 and 50, got 51"),
    (lambda: scalar_topk(Q8, QUANTIZER.encode(N(X)), 1), TypeError, "all NumPy arrays or all tensors"),
    (
        lambda: scalar_topk(ScalarQuantizer(39, 8).encode(X[:, 1:]), CODES, 1),
        ValueError,
        "the 40 dims of the codes, got 39",
    ),
    (lambda: scalar_topk(Q8, CODES, 1, ids=torch.tensor([3, 50])), IndexError, "row numbers of the 50 codes, got 50"),
    (
        lambda: ScalarCodes(CODES.codes, CODES.factors, 3, 40),
        ValueError,
        "codes must be 15 bytes wide for 3 bits and dim 40",
    ),
    (lambda: ScalarCodes(CODES.codes, CODES.factors[:, :3], 2, 40), ValueError, r"factors must have shape \[50, 4\]"),
    (lambda: ScalarCodes(CODES.codes, CODES.factors.double(), 2, 40), TypeError, "factors must be float32"),
    (lambda: ScalarCodes.from_sdc(CODES), TypeError, "codes must be SDCCodes, got ScalarCodes"),
    (lambda: ScalarCodes.from_bits(CODES.codes, 40), ValueError, "codes must be 5 bytes wide for dim 40, got 10"),
    (lambda: CODES[3], TypeError, "rows must be a slice"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_raises_one_clear_error(case: int) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
