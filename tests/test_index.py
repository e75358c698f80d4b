"""The flat index: every search equals a search of a plain dictionary of vectors, whatever came and went before."""

import os
import subprocess
import sys
import threading
from typing import Any, ClassVar

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import fastembed
from fastembed import BinaryIndex, SDCCodes
from fastembed.index import _formats

DIM = 20
RNG = np.random.default_rng(0)
# Few distinct vectors: ties everywhere.
VECTORS = RNG.integers(-2, 3, (40, DIM)).astype(np.float32) + np.float32(0.25)
QUERIES = RNG.standard_normal((7, DIM)).astype(np.float32)
FORMATS: list[dict[str, Any]] = [
    {},
    {"rescore": "float32"},
    *({"bits": bits, "metric": "sdc"} for bits in (1, 2, 3, 4, 8)),
    {"bits": 2, "metric": "sdc", "rescore": "int8"},
]
LARGEST_INT32 = np.iinfo(np.int32).max


def encoded(index: BinaryIndex, x: np.ndarray) -> Any:
    return fastembed.pack_bits(x) if index.metric == "hamming" else fastembed.sdc_encode(x, index.bits)


def oracle(index: BinaryIndex, rows: dict[int, np.ndarray], queries: np.ndarray, k: int) -> tuple[Any, Any]:
    """The search by codes of a dictionary id -> vector, filled up to k."""
    ids = np.array(sorted(rows), np.int64)
    found = min(k, len(ids))
    largest = index.metric == "sdc"
    values = np.full((len(queries), k), -np.inf if largest else LARGEST_INT32, np.float32 if largest else np.int32)
    best = np.full((len(queries), k), -1)
    if found:
        topk = fastembed.sdc_topk if largest else fastembed.hamming_topk
        codes = encoded(index, np.stack([rows[i] for i in ids.tolist()]))
        values[:, :found], places = topk(encoded(index, queries), codes, found)
        best[:, :found] = ids[places]
    return values, best


def cosines(queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    queries, vectors = (x.astype(np.float64) for x in (queries, vectors))
    norms = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(vectors, axis=1)
    return queries @ vectors.T / norms


def assert_same(ours: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


# ---- rows come and go ----


class Rows(RuleBasedStateMachine):
    """An index beside a dictionary."""

    format: ClassVar[dict[str, Any]]

    def __init__(self) -> None:
        super().__init__()
        self.index = BinaryIndex(DIM, **self.format)
        self.rows: dict[int, np.ndarray] = {}
        self.next_id = 0

    @rule(which=st.lists(st.integers(0, 39), max_size=30))
    def add(self, which: list[int]) -> None:
        ids = self.index.add(VECTORS[which])
        assert ids.tolist() == list(range(self.next_id, self.next_id + len(which)))
        self._set(ids, which)

    @rule(ids=st.sets(st.integers(0, 100), max_size=20), data=st.data())
    def add_with_ids(self, ids: set[int], data: st.DataObject) -> None:
        wanted = data.draw(st.permutations(sorted(ids)))
        which = data.draw(st.lists(st.integers(0, 39), min_size=len(wanted), max_size=len(wanted)))
        if ids & self.rows.keys():
            with pytest.raises(ValueError, match="ids must not be in the index"):
                self.index.add(VECTORS[which], wanted)
        else:
            self.index.add(VECTORS[which], wanted)
            self._set(wanted, which)

    @rule(ids=st.sets(st.integers(0, 100), max_size=30))
    def remove(self, ids: set[int]) -> None:
        if missing := ids - self.rows.keys():
            with pytest.raises(IndexError, match="ids must be in the index"):
                self.index.remove(list(ids))
        here = list(ids - missing)
        self.index.remove(here)
        for row in here:
            del self.rows[row]

    @rule(data=st.data())
    def update(self, data: st.DataObject) -> None:
        if self.rows:
            ids = data.draw(st.lists(st.sampled_from(sorted(self.rows)), unique=True))
            which = data.draw(st.lists(st.integers(0, 39), min_size=len(ids), max_size=len(ids)))
            self.index.update(ids, VECTORS[which])
            self._set(ids, which)

    @invariant()
    def searches_agree(self) -> None:
        assert len(self.index) == len(self.rows)
        assert self.index.ids.tolist() == sorted(self.rows)
        if self.rows:
            k = min(5, len(self.rows))
            assert_same(self.index.search(QUERIES, k, rescore_multiplier=0), oracle(self.index, self.rows, QUERIES, k))
            allowed = {i: row for i, row in self.rows.items() if i % 3 == 0}
            expected = oracle(self.index, allowed, QUERIES, k)
            assert_same(self.index.search(QUERIES, k, filter=np.arange(200) % 3 == 0, rescore_multiplier=0), expected)
            assert_same(self.index.search(QUERIES, k, filter=list(allowed), rescore_multiplier=0), expected)

    def _set(self, ids: Any, which: list[int]) -> None:
        for row, vector in zip(ids, which, strict=True):
            self.rows[int(row)] = VECTORS[vector]
            self.next_id = max(self.next_id, int(row) + 1)


@pytest.mark.parametrize("number", range(len(FORMATS)))
def test_any_history_searches_like_a_dictionary(number: int) -> None:
    machine = type("RowsOfFormat", (Rows,), {"format": FORMATS[number]})
    run_state_machine_as_test(machine, settings=settings(max_examples=30, stateful_step_count=20))


def test_runs_stay_few_however_rows_come() -> None:
    index = BinaryIndex(DIM)
    for vector in VECTORS[RNG.integers(0, 40, 300)]:
        index.add(vector[None])
    lengths = [run.live for run in index._state.runs]
    assert sum(lengths) == 300
    assert all(one >= 2 * sum(lengths[i + 1 :]) for i, one in enumerate(lengths[:-1]))
    index.remove(range(280))
    assert sum(map(len, index._state.runs)) < 60, "removed rows are given up"


def test_what_the_caller_does_to_its_arrays_later_changes_nothing() -> None:
    for index, codes in (
        (BinaryIndex(DIM), fastembed.pack_bits(VECTORS)),
        (BinaryIndex(DIM, 2, "sdc"), fastembed.sdc_encode(VECTORS, 2)),
    ):
        index.add(codes)[:] = 7
        before = index.search(QUERIES, 5)
        (codes if index.metric == "hamming" else codes.codes)[:] = 0
        assert_same(index.search(QUERIES, 5), before)


# ---- search ----


@pytest.mark.parametrize("format", FORMATS)
def test_codes_and_tensors_search_like_vectors(format: dict[str, Any]) -> None:
    index, of_codes, of_tensors = (BinaryIndex(DIM, **format) for _ in range(3))
    vectors = None if index.rescore is None else VECTORS
    index.add(VECTORS)
    of_codes.add(encoded(index, VECTORS), vectors=vectors)
    tensor = torch.from_numpy(VECTORS)
    of_tensors.add(tensor.bfloat16() if index.rescore is None else tensor, torch.arange(40))  # exact in bfloat16
    queries = None if index.rescore is None else QUERIES
    expected = index.search(QUERIES, 6)
    assert_same(of_codes.search(encoded(index, QUERIES), 6, vectors=queries), expected)
    ours = of_tensors.search(torch.from_numpy(QUERIES).requires_grad_(), 6)
    assert all(isinstance(part, torch.Tensor) for part in ours)
    assert_same(ours, expected)
    for query in range(len(QUERIES)):
        assert_same(index.search(QUERIES[query : query + 1], 6), [part[query : query + 1] for part in expected])


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("float16", 1e-3), ("int8", 1e-2)])
def test_rescoring_is_by_the_cosine_of_the_vectors(dtype: str, error: float) -> None:
    rng = np.random.default_rng(1)
    vectors, queries = (rng.standard_normal((rows, 65)).astype(np.float32) for rows in (300, 9))
    vectors *= rng.uniform(1e-30, 1e30, (300, 1)).astype(np.float32)  # codes ignore the length, and so must this
    index = BinaryIndex(65, rescore=dtype)
    for part in np.array_split(vectors, 5):
        index.add(part)
    scores, ids = index.search(queries, 10, rescore_multiplier=300)
    exact = cosines(queries, vectors)
    kept = index.reconstruct(np.arange(300))
    np.testing.assert_allclose(np.linalg.norm(kept, axis=1), 1, atol=error)
    np.testing.assert_allclose(scores, np.take_along_axis(exact, ids, 1), atol=error)
    of_kept = cosines(queries, kept)
    order = np.argsort(-of_kept, axis=1, kind="stable")[:, :10]
    np.testing.assert_allclose(np.take_along_axis(of_kept, ids, 1), np.take_along_axis(of_kept, order, 1), atol=1e-6)
    # Few candidates: those that the codes rank first, in a new order.
    _, candidates = index.search(queries, 20, rescore_multiplier=0)
    _, few = index.search(queries, 10, rescore_multiplier=2)
    assert all(set(row) <= set(of) for row, of in zip(few.tolist(), candidates.tolist(), strict=True))


def test_a_zero_vector_has_cosine_zero() -> None:
    for dtype in ("float32", "float16", "int8"):
        index = BinaryIndex(3, rescore=dtype)
        index.add(np.array([[0, 0, 0], [1, 0, 0], [-1, 0, 0]], np.float32))
        scores, ids = index.search(np.array([[2, 0, 0], [0, 0, 0]], np.float32), 3)
        np.testing.assert_array_equal(ids, [[1, 0, 2], [0, 1, 2]])
        np.testing.assert_array_equal(scores, [[1, 0, -1], [0, 0, 0]])


@pytest.mark.parametrize("format", FORMATS)
def test_range_search_finds_what_is_near(format: dict[str, Any]) -> None:
    index = BinaryIndex(DIM, **format)
    index.add(VECTORS[:30], range(100, 130))
    for row in VECTORS[30:]:
        index.add(row[None])
    index.remove([103])
    values, ids = index.search(QUERIES, 39, rescore_multiplier=0)
    hamming = index.metric == "hamming"
    for radius in (0, 5, 8, 20, 10**9) if hamming else (-2.0, -0.1, 0.2, float(values[0, 7]), 2.0):
        for allowed in (None, [1, 2, 3, 104, 105]):
            lims, found, numbers = index.range_search(QUERIES, radius, filter=allowed)
            inside = values <= radius if hamming else values >= np.float32(radius)
            if allowed is not None:
                inside &= np.isin(ids, allowed)
            np.testing.assert_array_equal(np.diff(lims), inside.sum(axis=1))
            assert_same((found, numbers), (values[inside], ids[inside]))
    ours = index.range_search(torch.from_numpy(QUERIES), radius)
    assert all(isinstance(part, torch.Tensor) for part in ours)
    for empty in (index.range_search(QUERIES[:0], 1), BinaryIndex(DIM, **format).range_search(QUERIES, 1)):
        assert empty[0].tolist() == [0] * len(empty[0])
        assert (len(empty[1]), len(empty[2])) == (0, 0)


def test_a_wide_range_search_asks_again_only_where_there_is_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the rows asked for first, in as many calls of the kernels as their results need."""
    monkeypatch.setattr(_formats, "RESULTS_AT_A_TIME", 500)
    x = RNG.standard_normal((900, DIM)).astype(np.float32)
    x[100:400] = x[0]
    index = BinaryIndex(DIM, 3, "sdc")
    index.add(x)
    values, ids = index.search(x[:20], 900)
    for radius in (0.99, 0.2, -0.3, -2.0):
        for allowed in (None, range(50, 700)):
            inside = (values >= np.float32(radius)) & ((allowed is None) | np.isin(ids, allowed or []))
            lims, found, numbers = index.range_search(x[:20], radius, filter=allowed)
            np.testing.assert_array_equal(np.diff(lims), inside.sum(axis=1))
            assert_same((found, numbers), (values[inside], ids[inside]))


def test_bad_radius() -> None:
    hamming, sdc = BinaryIndex(DIM), BinaryIndex(DIM, 2, "sdc")
    with pytest.raises(TypeError, match="radius must be an integer"):
        hamming.range_search(QUERIES, 0.5)
    with pytest.raises(ValueError, match="radius must be at least 0, got -1"):
        hamming.range_search(QUERIES, -1)
    with pytest.raises(TypeError, match="radius must be a number, got 'x'"):
        sdc.range_search(QUERIES, "x")
    with pytest.raises(ValueError, match="radius must be a number, got NaN"):
        sdc.range_search(QUERIES, float("nan"))


def test_a_filter_that_leaves_too_few_fills_up() -> None:
    for format in FORMATS:
        index = BinaryIndex(DIM, **format)
        index.add(VECTORS)
        for allowed in ([], [7, 3], [3, 7, 99, 2**62], np.arange(8) % 4 == 3, torch.tensor([7, 3])):
            values, ids = index.search(QUERIES, 4, filter=allowed)
            assert {tuple(sorted(row)) for row in ids.tolist()} == {
                (-1, -1, -1, -1) if len(allowed) == 0 else (-1, -1, 3, 7)
            }
            filler = LARGEST_INT32 if values.dtype == np.int32 else -np.inf
            assert (values[ids < 0] == filler).all()
            assert (ids[:, -1] == -1).all()


def test_reconstruct_gives_vectors_of_unit_length() -> None:
    for bits in (1, 2, 4):
        index = BinaryIndex(DIM, bits, "sdc")
        index.add(VECTORS, range(100, 140))
        rows = index.reconstruct([139, 100])
        expected = fastembed.sdc_encode(VECTORS[[39, 0]], bits)
        np.testing.assert_allclose(rows, expected.levels() * expected.inverse_norms[:, None])
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    index = BinaryIndex(DIM)
    index.add(VECTORS)
    np.testing.assert_array_equal(np.sign(index.reconstruct([5])), np.where(VECTORS[[5]] > 0, 1, -1))
    assert index.reconstruct([]).shape == (0, DIM)
    with pytest.raises(IndexError, match="ids must be in the index, got 40"):
        index.reconstruct([1, 40])


def test_codes_come_back_as_they_went_in() -> None:
    for format in FORMATS:
        index = BinaryIndex(DIM, **format)
        assert len(index.codes()) == 0
        index.add(VECTORS, range(50, 90))
        ours, expected = index.codes([52, 89]), encoded(index, VECTORS[[2, 39]])
        if index.metric == "hamming":
            np.testing.assert_array_equal(ours, expected)
            np.testing.assert_array_equal(index.codes(), encoded(index, VECTORS))
        else:
            assert isinstance(ours, SDCCodes)
            np.testing.assert_array_equal(ours.codes, expected.codes)
            np.testing.assert_array_equal(ours.inverse_norms, expected.inverse_norms)


# ---- readers beside writers ----


@pytest.mark.parametrize("format", [{}, {"bits": 2, "metric": "sdc", "rescore": "float16"}])
def test_searches_beside_an_adder_see_whole_snapshots(format: dict[str, Any]) -> None:
    """Every row added before a search began is found, and no half of an update."""
    rng = np.random.default_rng(2)
    index = BinaryIndex(64, **format)
    vectors = rng.standard_normal((2000, 64)).astype(np.float32)
    index.add(vectors[:100])
    added, done, failures = [100], threading.Event(), []

    def search(seed: int) -> None:
        chooser = np.random.default_rng(seed)
        try:
            while not done.is_set():
                known = added[0]
                which = np.append(chooser.integers(0, known, 3), known - 1)
                _, ids = index.search(vectors[which], 2)
                assert ids[:, 0].tolist() == which.tolist()
        except BaseException as error:
            failures.append(error)

    searchers = [threading.Thread(target=search, args=(seed,)) for seed in range(8)]
    for searcher in searchers:
        searcher.start()
    try:
        for start in range(100, 2000, 50):
            index.add(vectors[start : start + 50], range(start, start + 50))
            added[0] = start + 50
            index.update([start], vectors[start : start + 1])
            index.add(-vectors[:2], [10**6, 10**6 + 1])
            index.remove([10**6, 10**6 + 1])
    finally:
        done.set()
        for searcher in searchers:
            searcher.join()
    assert not failures, failures[0]


# ---- bad input ----

NAN = VECTORS.copy()
NAN[3, 1] = np.nan
SDC = fastembed.sdc_encode(VECTORS, 2)
PADDED = fastembed.pack_bits(VECTORS)
PADDED[4, -1] |= 1

BAD_CONSTRUCTIONS: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((0,), {}, ValueError, "dim must be at least 1, got 0"),
    ((8.0,), {}, TypeError, "dim must be an integer"),
    ((8, 9), {}, ValueError, "bits must be"),
    ((8, 2), {}, ValueError, "bits must be 1 for metric 'hamming', got 2"),
    ((8, 2, "cosine"), {}, ValueError, "metric must be 'hamming' or 'sdc', got 'cosine'"),
    ((8,), {"rescore": "float64"}, ValueError, "rescore must be None or one of float32, float16, int8, got 'float64'"),
]


@pytest.mark.parametrize("case", range(len(BAD_CONSTRUCTIONS)))
def test_bad_settings(case: int) -> None:
    arguments, keywords, error, message = BAD_CONSTRUCTIONS[case]
    with pytest.raises(error, match=message):
        BinaryIndex(*arguments, **keywords)


BAD_ROWS: list[tuple[Any, Any, type[Exception], str]] = [
    (VECTORS[:, 1:], None, ValueError, "x must have the 20 dims of the index, got 19"),
    (VECTORS[0], None, ValueError, r"x must have shape \[rows, columns\], got \[20\]"),
    (VECTORS.astype(int), None, TypeError, "x must be bfloat16 or float16 or float32 or float64, got int64"),
    (VECTORS.tolist(), None, TypeError, "x must be a NumPy array, a tensor or SDCCodes, got list"),
    (NAN, None, ValueError, "x must be finite, got a NaN or infinity in row 3"),
    (NAN * np.inf, None, ValueError, "x must be finite, got a NaN or infinity in row 0"),
    (fastembed.pack_bits(VECTORS)[:, 1:], None, ValueError, "x must have the 3 bytes of the index, got 2"),
    (PADDED, None, ValueError, "x must have zeros in the bits beyond dim 20, got others in row 4"),
    (SDC, None, ValueError, "x must have the 1 bits and 20 dims of the index, got 2 and 20"),
    (VECTORS, range(39), ValueError, "ids must be one for each of the 40 rows of x, got 39"),
    (VECTORS, [0] * 40, ValueError, "ids must be distinct, got 0 more than once"),
    (VECTORS, range(-1, 39), ValueError, r"ids must be between 0 and 2\^63 - 1, got -1"),
    (VECTORS, np.arange(2**63, 2**63 + 40, dtype=np.uint64), ValueError, "ids must be between 0 and .*, got 92233"),
    (VECTORS, [2**70 + i for i in range(40)], ValueError, "ids must be between 0 and .*, got 118059"),
    (VECTORS, [2**63 + i for i in range(40)], ValueError, "ids must be between 0 and"),
    (VECTORS, np.arange(40.0), TypeError, "ids must be integers, got float64"),
    (VECTORS, np.zeros(40, bool), TypeError, "ids must be integers, got bool"),
    (VECTORS, ["a"] * 40, TypeError, "ids must be integers"),
    (VECTORS, set(range(40)), TypeError, "ids must be an array, a tensor or a sequence of integers, got set"),
    (VECTORS, 7, TypeError, "ids must be an array, a tensor or a sequence of integers, got int"),
    (VECTORS, np.arange(40)[None], ValueError, r"ids must have shape \[rows\], got \[1, 40\]"),
    (VECTORS, range(7, 47), ValueError, r"ids must not be in the index \(update replaces rows\), got 7"),
]


@pytest.mark.parametrize("case", range(len(BAD_ROWS)))
def test_bad_rows_leave_the_index_as_it_was(case: int) -> None:
    x, ids, error, message = BAD_ROWS[case]
    index = BinaryIndex(DIM)
    index.add(VECTORS[:8])
    state = index._state
    with pytest.raises(error, match=message):
        index.add(x, ids)
    assert index._state is state
    if not message.startswith("ids must not be in the index"):
        with pytest.raises(error, match=message):
            index.update(range(len(x)) if ids is None else ids, x)
        assert index._state is state


def test_bad_vectors_beside_codes() -> None:
    index = BinaryIndex(DIM, rescore="int8")
    codes = fastembed.pack_bits(VECTORS)
    with pytest.raises(ValueError, match="vectors must be given with codes"):
        index.add(codes)
    with pytest.raises(ValueError, match="vectors must have a row for each of the 40 of x, got 3"):
        index.add(codes, vectors=VECTORS[:3])
    with pytest.raises(ValueError, match="vectors must be finite"):
        index.add(codes, vectors=NAN)
    with pytest.raises(ValueError, match="vectors must be None"):
        BinaryIndex(DIM).add(codes, vectors=VECTORS)
    assert len(index) == 0
    sdc = BinaryIndex(DIM, 2, "sdc")
    with pytest.raises(TypeError, match="x must be real vectors or SDCCodes for metric 'sdc', got uint8"):
        sdc.add(codes)
    with pytest.raises(ValueError, match="x must have finite positive inverse_norms"):
        sdc.add(SDCCodes(SDC.codes, SDC.inverse_norms * np.float32(np.nan), 2, DIM))


def test_ids_run_out_in_words() -> None:
    index = BinaryIndex(DIM)
    index.add(VECTORS[:1], [2**63 - 1])
    assert index.search(QUERIES, 1)[1].tolist() == [[2**63 - 1]] * len(QUERIES)
    assert index.add(VECTORS[:0]).tolist() == []
    index.remove([2**63 - 1])
    index.add(VECTORS[:1], [2**63 - 2])
    with pytest.raises(ValueError, match="ids must be given: 1 beyond 9223372036854775807 are not left"):
        index.add(VECTORS[:1])


BAD_SEARCHES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"k": 0}, ValueError, "k must be between 1 and 40, got 0"),
    ({"k": 41}, ValueError, "k must be between 1 and 40, got 41"),
    ({"k": 1.0}, TypeError, "k must be an integer"),
    ({"queries": QUERIES[:, 1:]}, ValueError, "queries must have the 20 dims of the index, got 19"),
    ({"queries": NAN}, ValueError, "queries must be finite"),
    ({"queries": fastembed.pack_bits(QUERIES)}, ValueError, "vectors must be given to re-score"),
    ({"vectors": QUERIES[1:]}, ValueError, "vectors must have a row for each of the 7 queries, got 6"),
    ({"vectors": QUERIES, "rescore_multiplier": 0}, ValueError, "vectors must be None where nothing is re-scored"),
    ({"rescore_multiplier": -1}, ValueError, "rescore_multiplier must be at least 0, got -1"),
    ({"filter": [-1]}, ValueError, "filter must be between 0 and"),
    ({"filter": [0.5]}, TypeError, "filter must be integers, got float64"),
    ({"filter": {1, 2}}, TypeError, "filter must be an array, a tensor or a sequence of integers, got set"),
    ({"filter": np.ones((2, 2), bool)}, ValueError, r"filter must have shape \[ids\], got \[2, 2\]"),
]


@pytest.mark.parametrize("case", range(len(BAD_SEARCHES)))
def test_bad_searches(case: int) -> None:
    changes, error, message = BAD_SEARCHES[case]
    index = BinaryIndex(DIM, rescore="float32")
    index.add(VECTORS)
    with pytest.raises(error, match=message):
        index.search(**{"queries": QUERIES, "k": 3, **changes})


def test_an_empty_index_says_so() -> None:
    index = BinaryIndex(DIM)
    with pytest.raises(ValueError, match="k must be at most the number of rows, but there are none"):
        index.search(QUERIES, 1)
    index.add(VECTORS[:0])
    index.remove([])
    assert len(index) == 0
    assert index.ids.tolist() == []
    index.add(VECTORS)
    assert index.search(QUERIES[:0], 3)[1].shape == (0, 3)
    index.remove(range(40))
    with pytest.raises(ValueError, match="k must be at most the number of rows, but there are none"):
        index.search(QUERIES, 1)
    assert index.add(VECTORS[:1]).tolist() == [40], "ids are not used again"


def test_another_backend_is_refused() -> None:
    index = BinaryIndex(DIM)
    index.add(VECTORS)
    with fastembed.use_backend("reference"), pytest.raises(ValueError, match="backend must be 'cpu'"):
        index.search(torch.from_numpy(QUERIES), 1)


def test_integers_of_numpy_are_integers(tmp_path: Any) -> None:
    index = BinaryIndex(np.int64(DIM), np.int16(2), "sdc", rescore="float32")
    index.add(VECTORS)
    assert_same(index.search(QUERIES, np.uint8(33), rescore_multiplier=np.uint8(8)), index.search(QUERIES, 33))
    index.save(tmp_path / "index")
    assert repr(BinaryIndex.load(tmp_path / "index")) == repr(index)


FORKED = """
import os, signal, sys
sys.modules["torch"] = None
import numpy as np
import fastembed
codes = np.random.default_rng(0).integers(0, 256, (100_000, 64), dtype=np.uint8)
expected = fastembed.hamming_topk(codes[:64], codes, 3)
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
signal.alarm(20)
for _ in range(3):
    found = fastembed.hamming_topk(codes[:64], codes, 3)
    assert all((one == other).all() for one, other in zip(found, expected))
"""


def test_the_child_of_a_fork_searches_like_its_parent() -> None:
    """It has none of the threads that OpenMP started for its parent."""
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    command = [sys.executable, "-c", FORKED]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import numpy as np
import fastembed
x = np.random.default_rng(0).standard_normal((100, 40)).astype(np.float32)
index = fastembed.BinaryIndex(40, 2, "sdc", rescore="int8")
index.add(x)
assert (index.search(x[:5], 3)[1][:, 0] == range(5)).all()
index.save(sys.argv[1])
loaded = fastembed.BinaryIndex.load(sys.argv[1], mmap=True)
assert (loaded.search(x[:5], 3)[1] == index.search(x[:5], 3)[1]).all()
"""


def test_numpy_needs_no_pytorch(tmp_path: Any) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path / "index")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@given(dim=st.integers(1, 70), bits=st.integers(1, 8), rows=st.integers(1, 30))
def test_any_dim_takes_its_own_codes_back(dim: int, bits: int, rows: int) -> None:
    x = np.random.default_rng(dim).standard_normal((rows, dim)).astype(np.float32)
    index, again = BinaryIndex(dim, bits, "sdc"), BinaryIndex(dim, bits, "sdc")
    index.add(x)
    again.add(index.codes())
    assert_same(again.search(x, rows), index.search(x, rows))
