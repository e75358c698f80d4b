"""Inverted lists: exact among the rows of the lists that a search looks into, and otherwise the flat index."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastembed
from fastembed import BinaryIndex, IndexFileError, IVFBinaryIndex
from fastembed.index import _file, load_index

DIM = 30
RNG = np.random.default_rng(0)
CENTRES = RNG.standard_normal((12, DIM))
# Clustered, and coarse enough for many ties.
VECTORS = np.sign(CENTRES[RNG.integers(0, 12, 600)] + 0.7 * RNG.standard_normal((600, DIM))).astype(np.float32)
QUERIES = (CENTRES[RNG.integers(0, 12, 9)] + 0.5 * RNG.standard_normal((9, DIM))).astype(np.float32)
FORMATS: list[dict[str, Any]] = [
    {},
    {"centroids": "float"},
    {"bits": 2, "metric": "sdc"},
    {"bits": 3, "metric": "sdc", "centroids": "float", "rescore": "int8"},
]


def filled(format: dict[str, Any], lists: int = 8) -> IVFBinaryIndex:
    """In several runs, with ids out of order and rows removed."""
    index = IVFBinaryIndex(DIM, lists=lists, nprobe=min(3, lists), **format)
    index.train(VECTORS)
    index.add(VECTORS[:400], np.random.default_rng(1).permutation(400))
    index.add(VECTORS[400:500])
    index.add(VECTORS[500:])
    index.remove(range(0, 600, 7))
    return index


def as_flat(index: IVFBinaryIndex) -> BinaryIndex:
    flat = BinaryIndex(DIM, index.bits, index.metric, rescore=index.rescore)
    vectors = None if index.rescore is None else index.reconstruct(index.ids)
    flat.add(index.codes(), index.ids, vectors=vectors)
    return flat


def probed_ids(index: IVFBinaryIndex, query: np.ndarray, nprobe: int) -> np.ndarray:
    """The ids in the nearest lists, worked out beside the index."""
    run = index._merged_run()
    centroids = index._centroids.values
    if index._centroid_kind == "binary":
        bits = np.unpackbits(centroids ^ fastembed.pack_bits(query), axis=1)
        order = np.argsort(bits.sum(axis=1, dtype=int), kind="stable")
    else:
        order = np.argsort(-(centroids @ query / np.linalg.norm(query)), kind="stable")
    return run.id_array[np.isin(run.lists, order[:nprobe])]


def assert_same(ours: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("format", FORMATS)
def test_probing_every_list_is_the_flat_search(format: dict[str, Any]) -> None:
    index = filled(format)
    flat = as_flat(index)
    assert index.ids.tolist() == flat.ids.tolist()
    for k in (1, 10, len(index)):
        how = {"rescore_multiplier": 0}
        assert_same(index.search(QUERIES, k, nprobe=8, **how), flat.search(QUERIES, k, **how))
        allowed = np.arange(500) % 2 == 0
        assert_same(
            index.search(QUERIES, k, nprobe=8, filter=allowed, **how), flat.search(QUERIES, k, filter=allowed, **how)
        )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("nprobe", [1, 3])
def test_a_search_is_exact_among_the_probed_lists(format: dict[str, Any], nprobe: int) -> None:
    index = filled(format)
    flat = as_flat(index)
    for k in (1, 10, 300):
        values, ids = index.search(QUERIES, k, nprobe=nprobe, rescore_multiplier=0)
        for row, query in enumerate(QUERIES):
            allowed = probed_ids(index, query, nprobe)
            expected = flat.search(query[None], k, filter=allowed, rescore_multiplier=0)
            assert_same((values[row : row + 1], ids[row : row + 1]), expected)
            assert_same(index.search(query[None], k, nprobe=nprobe, rescore_multiplier=0), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_a_range_search_is_exact_among_the_probed_lists(format: dict[str, Any]) -> None:
    index = filled(format)
    values, ids = index.search(QUERIES, len(index), nprobe=2, rescore_multiplier=0)
    for radius in (3, 9, 30) if index.metric == "hamming" else (0.3, 0.0, -1.0):
        inside = (values <= radius if index.metric == "hamming" else values >= radius) & (ids >= 0)
        lims, found, numbers = index.range_search(QUERIES, radius, nprobe=2)
        np.testing.assert_array_equal(np.diff(lims), inside.sum(axis=1))
        assert_same((found, numbers), (values[inside], ids[inside]))


def test_search_uses_the_default_nprobe_and_re_scores() -> None:
    index = filled({"rescore": "float32"})
    assert_same(index.search(QUERIES, 5), index.search(QUERIES, 5, nprobe=3))
    scores, ids = index.search(QUERIES, 5, rescore_multiplier=100)
    exact = QUERIES / np.linalg.norm(QUERIES, axis=1, keepdims=True) @ index.reconstruct(index.ids).T
    for row in range(len(QUERIES)):
        here = np.isin(index.ids, probed_ids(index, QUERIES[row], 3))
        np.testing.assert_allclose(scores[row], np.sort(exact[row, here])[::-1][:5], atol=1e-6)
        np.testing.assert_allclose(exact[row][np.searchsorted(index.ids, ids[row])], scores[row], atol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_codes_search_like_vectors(format: dict[str, Any]) -> None:
    index = IVFBinaryIndex(DIM, lists=8, **{**format, "centroids": "binary", "rescore": None})
    index.train(VECTORS)
    other = IVFBinaryIndex(DIM, lists=8, **{**format, "centroids": "binary", "rescore": None})
    encode = (lambda x: fastembed.sdc_encode(x, index.bits)) if index.metric == "sdc" else fastembed.pack_bits
    other.train(encode(VECTORS))
    index.add(VECTORS)
    other.add(encode(VECTORS))
    assert_same(other.search(encode(QUERIES), 9, nprobe=2), index.search(QUERIES, 9, nprobe=2))


def test_training_repeats_itself_and_fills_lists() -> None:
    for centroids in ("binary", "float"):
        trained = []
        for _ in range(2):
            index = IVFBinaryIndex(DIM, lists=12, centroids=centroids)
            index.train(VECTORS, seed=5)
            index.add(VECTORS)
            trained.append(index)
        np.testing.assert_array_equal(trained[0]._centroids.values, trained[1]._centroids.values)
        assert trained[0].list_sizes.sum() == 600
        assert (trained[0].list_sizes > 0).sum() >= 10
        # Better than centroids that were never moved.
        still = IVFBinaryIndex(DIM, lists=12, centroids=centroids)
        still.train(VECTORS, seed=5, iterations=0)
        flat = BinaryIndex(DIM)
        flat.add(VECTORS)

        def similarity(index: IVFBinaryIndex, centroids: str = centroids) -> float:
            values = index._centroids.values
            units = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
            if centroids == "binary":
                values = np.sign(np.unpackbits(values, axis=1, count=DIM).astype(np.float32) - 0.5)
            return float((units @ values.T).max(axis=1).mean())

        assert similarity(trained[0]) > similarity(still) + 0.01


def test_rows_that_are_all_alike() -> None:
    index = IVFBinaryIndex(DIM, lists=4, nprobe=4)
    index.train(np.ones((10, DIM), np.float32))
    index.add(np.ones((10, DIM), np.float32))
    assert index.search(np.ones((1, DIM), np.float32), 10)[1].tolist() == [list(range(10))]


@pytest.mark.parametrize("centroids", ["binary", "float"])
@pytest.mark.parametrize(("bits", "metric"), [(1, "hamming"), (1, "sdc"), (2, "sdc"), (4, "sdc")])
@pytest.mark.parametrize("count", [1, 30])
def test_ties_go_to_the_smaller_id_by_either_way(bits: int, metric: str, centroids: str, count: int) -> None:
    """Few different codes, ids in no order of the rows: a search without a filter takes one call of the kernels, one
    with a filter that lets all pass goes through the runs."""
    rng = np.random.default_rng(count)
    x = np.sign(rng.standard_normal((900, 5), dtype=np.float32))
    ids = rng.permutation(5000)[: len(x)]
    index = IVFBinaryIndex(5, bits, metric, lists=8, centroids=centroids)
    index.train(x)
    index.add(x, ids)
    for k in (1, 10, 200, 900):
        for nprobe in (1, 3, 8):
            found = index.search(x[:count], k, nprobe=nprobe)
            assert_same(found, index.search(x[:count], k, nprobe=nprobe, filter=np.arange(5000)))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mmap", [False, True])
def test_a_saved_index_goes_on_where_it_was(tmp_path: Path, format: dict[str, Any], mmap: bool) -> None:
    index = filled(format)
    index.save(tmp_path / "index")
    loaded = IVFBinaryIndex.load(tmp_path / "index", mmap=mmap)
    assert repr(loaded) == repr(index)
    for each in (loaded, index):
        each.add(VECTORS[:20])
        each.update([1], VECTORS[:1])
    for nprobe in (1, 3, 8):
        assert_same(loaded.search(QUERIES, 40, nprobe=nprobe), index.search(QUERIES, 40, nprobe=nprobe))
    np.testing.assert_array_equal(loaded.list_sizes, index.list_sizes)
    loaded = load_index(tmp_path / "index", mmap=mmap)
    assert isinstance(loaded, IVFBinaryIndex)
    with pytest.raises(IndexFileError, match=r"must hold an index of kind 'flat', but .* has 'ivf'"):
        BinaryIndex.load(tmp_path / "index")
    empty = IVFBinaryIndex(DIM, lists=8, **format)
    empty.train(VECTORS)
    empty.save(tmp_path / "index")
    loaded = IVFBinaryIndex.load(tmp_path / "index", mmap=mmap)
    loaded.add(VECTORS)
    empty.add(VECTORS)
    assert_same(loaded.search(QUERIES, 4), empty.search(QUERIES, 4))


def with_starts(change: Any) -> Any:
    def changed(settings: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        starts = arrays["starts"].copy()
        change(starts)
        arrays["starts"] = starts

    return changed


FORGERIES: list[tuple[str, Any]] = [
    ("starts do not ascend", with_starts(lambda starts: starts.__setitem__(-1, 10**12))),
    ("starts do not ascend", with_starts(lambda starts: starts.__setitem__(0, 1))),
    ("starts do not ascend", with_starts(lambda starts: starts.__setitem__(3, -5))),
    ("starts do not ascend", with_starts(lambda starts: starts.__setitem__(3, 10**12))),
    ("starts is", lambda settings, arrays: arrays.update(starts=arrays["starts"][1:])),
    ("starts", lambda settings, arrays: arrays.pop("starts")),
    ("centroids is", lambda settings, arrays: arrays.update(centroids=arrays["centroids"][1:])),
    ("centroids is", lambda settings, arrays: arrays.update(centroids=arrays["centroids"].astype(np.float32))),
    ("lists must be", lambda settings, arrays: settings.update(lists=0)),
    ("starts is|centroids is", lambda settings, arrays: settings.update(lists=9)),
    ("nprobe must be", lambda settings, arrays: settings.update(nprobe=9)),
    ("centroids must be", lambda settings, arrays: settings.update(centroids="x")),
]


@pytest.mark.parametrize("case", range(len(FORGERIES)))
def test_structure_that_no_index_has_is_refused_even_unverified(tmp_path: Path, case: int) -> None:
    message, change = FORGERIES[case]
    path = tmp_path / "index"
    filled({}).save(path)
    settings, arrays = _file.read_index_file(path, mapped=False, verified=True)
    change(settings, arrays)
    _file.write_index_file(path, settings, arrays)
    for how in ({}, {"mmap": True}):
        with pytest.raises(IndexFileError, match=message):
            IVFBinaryIndex.load(path, **how)


def test_damaged_structure_is_found_by_a_map(tmp_path: Path) -> None:
    path = tmp_path / "index"
    filled({}).save(path)
    original = path.read_bytes()
    arrays = _file.read_index_file(path, mapped=False, verified=True)[1]
    for name in ("starts", "centroids"):
        place = original.find(arrays[name].tobytes()[:16])
        for offset in range(0, 100, 7):
            data = bytearray(original)
            data[place + offset] ^= 0x10
            path.write_bytes(data)
            with pytest.raises(IndexFileError, match=f"checksum of section {name} does not match"):
                IVFBinaryIndex.load(path, mmap=True)


def test_ids_out_of_order_in_a_list_are_found(tmp_path: Path) -> None:
    path = tmp_path / "index"
    filled({}).save(path)
    settings, arrays = _file.read_index_file(path, mapped=False, verified=True)
    ids = arrays["ids"].copy()
    first = int(np.argmax(np.diff(arrays["starts"])))
    ids[arrays["starts"][first] : arrays["starts"][first] + 2] = ids[arrays["starts"][first] :][:2][::-1]
    _file.write_index_file(path, settings, {**arrays, "ids": ids})
    with pytest.raises(IndexFileError, match="ids are not ascending"):
        IVFBinaryIndex.load(path)
    ids = arrays["ids"].copy()
    ids[int(arrays["starts"][first + 1]) - 1] = settings["next_id"] - 1
    ids[-1] = settings["next_id"] - 1
    _file.write_index_file(path, settings, {**arrays, "ids": ids})
    with pytest.raises(IndexFileError, match=r"ids are not ascending|ids must be distinct"):
        IVFBinaryIndex.load(path)


def test_split_and_pickle_keep_the_lists() -> None:
    import copy
    import pickle

    index = filled({})
    for same in (copy.deepcopy(index), pickle.loads(pickle.dumps(index))):
        assert_same(same.search(QUERIES, 20), index.search(QUERIES, 20))
        same.add(VECTORS[:3])
    assert len(index) == len(as_flat(index))
    parts = index.split(3)
    assert np.concatenate([part.ids for part in parts]).tolist() == index.ids.tolist()
    found = [part.search(QUERIES, 20) for part in parts]
    values, ids = (np.concatenate(columns, axis=1) for columns in zip(*found, strict=True))
    order = np.lexsort((ids, values, ids < 0), axis=1)[:, :20]
    assert_same((np.take_along_axis(values, order, 1), np.take_along_axis(ids, order, 1)), index.search(QUERIES, 20))
    assert [len(part) for part in BinaryIndex(DIM).split(2)] == [0, 0]


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lists": 0}, ValueError, "lists must be at least 1, got 0"),
    ({"lists": 8, "nprobe": 9}, ValueError, "nprobe must be between 1 and 8, got 9"),
    ({"lists": 8, "nprobe": 0}, ValueError, "nprobe must be between 1 and 8, got 0"),
    ({"lists": 8, "nprobe": 2, "centroids": "int8"}, ValueError, "centroids must be 'binary' or 'float', got 'int8'"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_settings(case: int) -> None:
    settings, error, message = BAD[case]
    with pytest.raises(error, match=message):
        IVFBinaryIndex(DIM, **settings)


def test_nprobe_may_be_set_to_what_an_index_may_have(tmp_path: Path) -> None:
    """What is saved must be loaded again."""
    index = filled({}, lists=np.int64(8))
    index.nprobe = np.int64(8)
    assert_same(index.search(QUERIES, 5), as_flat(index).search(QUERIES, 5))
    index.save(tmp_path / "index")
    assert IVFBinaryIndex.load(tmp_path / "index").nprobe == 8
    with pytest.raises(ValueError, match="nprobe must be between 1 and 8, got 9"):
        index.nprobe = 9
    with pytest.raises(AttributeError):
        index.lists = 9


def test_bad_order_of_things(tmp_path: Path) -> None:
    index = IVFBinaryIndex(DIM, lists=8, nprobe=2)
    with pytest.raises(ValueError, match="train the index before rows are added"):
        index.add(VECTORS)
    with pytest.raises(ValueError, match="must be trained before it is saved"):
        index.save(tmp_path / "index")
    with pytest.raises(ValueError, match="x must have at least a row for each of the 8 lists, got 7"):
        index.train(VECTORS[:7])
    with pytest.raises(ValueError, match="x must be finite"):
        index.train(VECTORS * np.float32("nan"))
    index.train(VECTORS)
    with pytest.raises(ValueError, match="the index is trained"):
        index.train(VECTORS)
    with pytest.raises(ValueError, match="k must be at most the number of rows, but there are none"):
        index.search(QUERIES, 1)
    index.add(VECTORS)
    with pytest.raises(ValueError, match="nprobe must be between 1 and 8, got 9"):
        index.search(QUERIES, 1, nprobe=9)
    with pytest.raises(ValueError, match="k must be between 1 and 600, got 601"):
        index.search(QUERIES, 601)
