"""What every index of codes does: rows that come and go under readers, search, re-scoring and files."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .. import _native, backends
from .._checks import check_integer
from ..ops._search_checks import check_k
from ..ops.search import SDCCodes, rescore
from . import _file, _inputs
from ._file import damaged
from ._formats import CodeFormat, Column, Columns, VectorFormat, unit_rows
from ._rows import Filter, Run, State
from ._searching import best_rows, rows_within

if TYPE_CHECKING:
    from typing import Self

# Candidate vectors that are decoded at a time, in elements.
_RESCORE_ELEMENTS = 1 << 24


class CodeIndex:
    """The common part of `BinaryIndex` and `IVFBinaryIndex`."""

    kind: ClassVar[str]

    def __init__(self, dim: int, bits: int, metric: str, rescore: str | None) -> None:
        self._codes = CodeFormat(dim, bits, metric)
        self._vectors = None if rescore is None else VectorFormat(self._codes.dim, rescore)
        self._state = State()
        self._writing = threading.Lock()

    dim = property(lambda self: self._codes.dim, doc="Dimensions of a vector.")
    bits = property(lambda self: self._codes.bits, doc="Bits of a code for each dimension.")
    metric = property(lambda self: self._codes.metric, doc="'hamming' or 'sdc'.")

    @property
    def rescore(self) -> str | None:
        """Dtype of the vectors kept for re-scoring, or None."""
        return None if self._vectors is None else self._vectors.dtype

    @property
    def ids(self) -> np.ndarray:
        """int64 [len(index)]: the ids there are, ascending."""
        return self._state.ids

    @property
    def nbytes(self) -> int:
        """Bytes of ids, codes and vectors, in memory or mapped."""
        stored = [array for run in self._state.runs for array in (run.ids, *run.columns.values())]
        return sum(array.nbytes for array in stored if isinstance(array, np.ndarray))

    def __len__(self) -> int:
        return self._state.live

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_writing"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _writing=threading.Lock())

    # ---- rows come and go ----

    def add(self, x: Any, ids: Any = None, *, vectors: Any = None) -> np.ndarray:
        """Add rows. Searches that began before see none of them, searches that begin afterwards all of them.

        Args:
            x: [N, dim] real vectors (float32, float16, bfloat16 or float64; finite), which are encoded by `pack_bits`
                or `sdc_encode`; or codes: for metric "hamming" uint8 [N, ceil(dim / 8)], for "sdc" `SDCCodes`. Arrays
                or tensors.
            ids: N distinct integers from 0 to 2^63 - 1 that the index does not hold. Default: consecutive ones, from
                one above the largest that the index has ever held.
            vectors: the real vectors [N, dim] to keep for re-scoring; default x. Needed where x is codes and the index
                keeps vectors.

        Returns:
            int64 [N], the ids.

        Raises:
            TypeError, ValueError: an argument is not as above; the index is left as it was.
        """
        lists, columns = self._encoded(x, vectors)
        count = len(columns["codes"])
        given = None if ids is None else self._checked_ids(ids, count)
        with self._writing:
            state = self._state
            if given is None:
                if count > _inputs.LARGEST_ID + 1 - state.next_id:
                    raise ValueError(f"ids must be given: {count} beyond {state.next_id - 1} are not left")
                given = np.arange(count) + state.next_id if count else np.empty(0, np.int64)
            elif (present := given[state.positions_of(given) >= 0]).size:
                raise ValueError(f"ids must not be in the index (update replaces rows), got {present[0]}")
            if count:
                run = Run.arranged(given, lists, self._list_count, columns)
                self._state = state.with_run(run, max(state.next_id, int(given.max()) + 1))
        return given.copy()  # the run's own must not change

    def remove(self, ids: Any) -> None:
        """Remove rows. Their memory is given up when they outnumber those left beside them.

        Args:
            ids: distinct integers.

        Raises:
            IndexError: an id is not in the index, which is left as it was.
            TypeError, ValueError: ids are not as above.
        """
        given = self._checked_ids(ids)
        with self._writing:
            self._state = self._state.without(self._positions_of(self._state, given))

    def update(self, ids: Any, x: Any, *, vectors: Any = None) -> None:
        """Replace the rows of ids that are in the index. Each search sees all of the new rows or none.

        Args:
            ids: N distinct integers.
            x, vectors: as for `add`.

        Raises:
            IndexError: an id is not in the index, which is left as it was.
            TypeError, ValueError: an argument is not as above.
        """
        lists, columns = self._encoded(x, vectors)
        given = self._checked_ids(ids, len(columns["codes"]))
        with self._writing:
            state = self._state.without(self._positions_of(self._state, given))
            if len(given):
                run = Run.arranged(given, lists, self._list_count, columns)
                self._state = state.with_run(run, state.next_id)

    def reconstruct(self, ids: Any) -> np.ndarray:
        """The vectors of ids, at unit length: those kept for re-scoring, otherwise what the codes stand for.

        Args:
            ids: integers, [N].

        Returns:
            float32 [N, dim].

        Raises:
            IndexError: an id is not in the index.
        """
        given, state = _inputs.check_ids("ids", ids), self._state
        decoder = self._vectors or self._codes
        if len(given) == 0:
            return np.empty((0, self.dim), np.float32)
        return decoder.decode(state.take(self._positions_of(state, given), list(decoder.columns)))

    def codes(self, ids: Any = None) -> np.ndarray | SDCCodes:
        """The codes of ids (default: of all, ascending): uint8 [N, ceil(dim / 8)], or `SDCCodes` for metric "sdc".

        Raises:
            IndexError: an id is not in the index.
        """
        state = self._state
        given = state.ids if ids is None else _inputs.check_ids("ids", ids)
        columns = (
            state.take(self._positions_of(state, given), list(self._codes.columns)) if len(given) else self._no_codes()
        )
        return columns["codes"] if self.metric == "hamming" else self._codes.as_sdc(columns)

    def split(self, count: int) -> list[Self]:
        """`count` indexes with the settings of this one that hold its rows, consecutive ids in each, in equal parts."""
        count = check_integer("count", count, 1)
        run, next_id = self._merged_run(), self._state.next_id
        parts = []
        every_id = run.id_array
        for ids in np.array_split(np.sort(every_id), count):
            rows = np.zeros(len(run), bool) if len(ids) == 0 else (every_id >= ids[0]) & (every_id <= ids[-1])
            columns = {name: column[rows] for name, column in run.columns.items()}
            part = copy.copy(self)
            some = Run.arranged(every_id[rows], run.lists[rows], self._list_count, columns)
            part._state = State((some,) if len(some) else (), next_id)
            parts.append(part)
        return parts

    # ---- search ----

    def _search(
        self, queries: Any, k: int, allowed: Any, vectors: Any, rescore_multiplier: int, **how: Any
    ) -> tuple[Any, Any]:
        state = self._state  # all that this search sees
        _check_backend()
        rescore_multiplier = check_integer("rescore_multiplier", rescore_multiplier, 0)
        given, vectors = _inputs.to_numpy("queries", queries), self._query_vectors(queries, vectors, rescore_multiplier)
        codes = self._codes.encode("queries", given)
        k = check_k(k, state.live, "rows")
        if vectors is not None and len(vectors) != len(codes["codes"]):
            raise ValueError(
                f"vectors must have a row for each of the {len(codes['codes'])} queries, got {len(vectors)}"
            )
        selection = _inputs.check_filter(allowed)
        wanted = k if vectors is None else min(k * rescore_multiplier, state.live)
        values, positions = self._best_rows(state, given, codes, wanted, selection, **how)
        if vectors is not None:
            values, positions = self._rescored(state, vectors, positions, k)
        return like_queries(queries, values, state.ids_at(positions))

    def _best_rows(
        self, state: State, queries: Any, codes: Columns, k: int, allowed: Filter | None, **how: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """(values [Q, k], positions [Q, k]) by the codes, as `best_rows` gives them."""
        return best_rows(self._codes, state, codes, k, allowed, self._probed(queries, codes, **how))

    def _probed(self, queries: Any, codes: Columns, **how: Any) -> np.ndarray | None:
        """int64 [Q, n]: the lists that each query looks into; None: all there are."""
        return None

    def _range_search(self, queries: Any, radius: float, allowed: Any, **how: Any) -> tuple[Any, Any, Any]:
        state = self._state
        _check_backend()
        given = _inputs.to_numpy("queries", queries)
        codes, selection = self._codes.encode("queries", given), _inputs.check_filter(allowed)
        self._codes.check_radius(radius)
        probed = self._probed(given, codes, **how) if state.runs else None
        return like_queries(queries, *rows_within(self._codes, state, codes, radius, selection, probed))

    def _query_vectors(self, queries: Any, vectors: Any, rescore_multiplier: int) -> np.ndarray | None:
        """The vectors to re-score with, or None for no re-scoring."""
        if self._vectors is None or rescore_multiplier == 0:
            if vectors is not None:
                raise ValueError("vectors must be None where nothing is re-scored")
            return None
        given = _inputs.to_numpy("queries", queries) if vectors is None else _inputs.to_numpy("vectors", vectors)
        if _inputs.is_codes(given):
            raise ValueError("vectors must be given to re-score, queries being codes; or rescore_multiplier=0")
        return _inputs.check_vectors("queries" if vectors is None else "vectors", given, self.dim)

    def _rescored(
        self, state: State, queries: np.ndarray, positions: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best of each query's candidates by the cosine of the vectors: (scores, positions)."""
        assert self._vectors is not None
        scores = np.empty((len(queries), k), np.float32)
        best = np.empty((len(queries), k), np.int64)
        step = max(1, _RESCORE_ELEMENTS // (positions.shape[1] * self.dim))
        for start in range(0, len(queries), step):
            some = slice(start, start + step)
            # Places ascend with ids, so that equal scores are ordered by id. Position -1 has id -1, hence place 0,
            # and a vector of NaN, which scores last.
            ids, first, places = np.unique(state.ids_at(positions[some]), return_index=True, return_inverse=True)
            named = positions[some].reshape(-1)[first]
            vectors = np.full((len(ids), self.dim), np.nan, np.float32)
            found = np.nonzero(named >= 0)[0]
            vectors[found] = self._vectors.decode(state.take(named[found], list(self._vectors.columns)))
            scores[some], chosen = rescore(unit_rows(queries[some]), vectors, places.reshape(positions[some].shape), k)
            best[some] = named[chosen]
        scores[best < 0] = -np.inf
        return scores, best

    # ---- files ----

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to one file (docs/index.md), synced, in place of what stood at `path`: whenever the process
        or the machine stops, that is the old file or the new one, whole. Rows may come and go meanwhile; the file has
        those there were at the beginning.

        Raises:
            OSError: the file cannot be written; what stood at `path` still does.
        """
        state = self._state
        run = self._merged_run(state)
        first_id = run.ids.start if isinstance(run.ids, range) else None
        settings = {"kind": self.kind, "next_id": state.next_id, "first_id": first_id, **self._settings()}
        ids = {} if isinstance(run.ids, range) else {"ids": run.ids}
        _file.write_index_file(path, settings, {**ids, **self._structure(run), **run.columns})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mmap: bool = False, verify: bool | None = None) -> Self:
        """The index that `save` wrote.

        Args:
            path: the file.
            mmap: map the rows instead of reading them: this takes milliseconds whatever the size, and processes share
                the memory. Replacing the file by `save` is safe meanwhile, truncating or writing it in place is not.
            verify: check every byte and value. Default: yes, unless mapped; a mapped file gets the checks of everything
                but ids, codes and vectors, so that no damage can crash a search.

        Raises:
            IndexFileError: the file is not a whole undamaged index file of this class. It is a ValueError.
            OSError: it cannot be read.
        """
        verified = not mmap if verify is None else verify
        if not mmap and not verified:
            raise ValueError("verify must be True unless mmap is True: an index in memory is always verified")
        settings, arrays = _file.read_index_file(
            path, mapped=mmap, verified=verified, always_verified=frozenset(cls._structure_names)
        )
        kind, next_id, first_id = (settings.pop(name, None) for name in ("kind", "next_id", "first_id"))
        if kind != cls.kind:
            raise _file.IndexFileError(
                f"path must hold an index of kind {cls.kind!r}, but {os.fspath(path)} has {kind!r}"
            )
        try:
            index = cls._from_settings(settings, arrays)
            check_integer("next_id", next_id, 0, _inputs.LARGEST_ID + 1)
            run = index._run_of(arrays, next_id, first_id, verified)
        except (TypeError, ValueError, KeyError) as error:
            raise damaged(path, str(error)) from error
        index._state = State((run,) if len(run) else (), next_id)
        return index

    _structure_names: ClassVar[tuple[str, ...]] = ()

    def _settings(self) -> dict[str, Any]:
        return {"dim": self.dim, "bits": self.bits, "metric": self.metric, "rescore": self.rescore}

    def _structure(self, run: Run) -> dict[str, np.ndarray]:
        """The arrays beside ids and columns, named by `_structure_names`."""
        return {}

    @classmethod
    def _from_settings(cls, settings: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> Self:
        """An empty index; takes the arrays that are not rows out of `arrays`."""
        raise NotImplementedError

    def _starts(self, arrays: dict[str, np.ndarray], rows: int) -> np.ndarray:
        """`Run.starts`, taken out of `arrays`."""
        return np.array([0, rows])

    def _run_of(self, arrays: dict[str, np.ndarray], next_id: int, first_id: int | None, verified: bool) -> Run:
        """The rows of a file, or ValueError."""
        count = len(arrays["codes"])
        starts = self._starts(arrays, count)
        expected = self._columns()
        if first_id is None:
            expected["ids"] = Column(np.int64)
        else:
            check_integer("first_id", first_id, 0, next_id - count)
        if arrays.keys() != expected.keys():
            raise ValueError(f"it has arrays {sorted(arrays)} where {sorted(expected)} belong")
        for name, column in expected.items():
            shape = (count,) if column.width is None else (count, column.width)
            if (arrays[name].dtype, arrays[name].shape) != (np.dtype(column.dtype), shape):
                raise ValueError(f"{name} is {arrays[name].dtype} {list(arrays[name].shape)}")
        ids = arrays.pop("ids") if first_id is None else range(first_id, first_id + count)
        run = Run(ids, starts, arrays)
        if verified and count:
            if isinstance(ids, np.ndarray):
                _check_ascending(ids, starts, next_id)
            self._codes.check(arrays)
            if self._vectors is not None:
                self._vectors.check(arrays)
        return run

    # ---- parts ----

    @property
    def _list_count(self) -> int:
        return 1

    def _merged_run(self, state: State | None = None) -> Run:
        """All rows of a state (default: of now) in one run."""
        runs = (self._state if state is None else state).runs
        empty = Run(np.empty(0, np.int64), np.zeros(self._list_count + 1, np.int64), self._no_rows())
        return Run.merged(runs) if runs else empty

    def _columns(self) -> dict[str, Column]:
        return {**self._codes.columns, **(self._vectors.columns if self._vectors is not None else {})}

    def _no_rows(self) -> Columns:
        return {
            name: np.empty((0,) if column.width is None else (0, column.width), column.dtype)
            for name, column in self._columns().items()
        }

    def _no_codes(self) -> Columns:
        return {name: column for name, column in self._no_rows().items() if name in self._codes.columns}

    def _encoded(self, x: Any, vectors: Any) -> tuple[np.ndarray | None, Columns]:
        """The list of each row (None: there is one) and the columns."""
        given = _inputs.to_numpy("x", x)
        columns = self._codes.encode("x", given)
        if self._vectors is None:
            if vectors is not None:
                raise ValueError("vectors must be None: the index keeps none (rescore=None)")
        else:
            if vectors is None and _inputs.is_codes(given):
                raise ValueError("vectors must be given with codes: the index keeps vectors for re-scoring")
            kept = given if vectors is None else _inputs.to_numpy("vectors", vectors)
            if vectors is not None:
                _inputs.check_vectors("vectors", kept, self.dim)
            if len(kept) != len(columns["codes"]):
                raise ValueError(
                    f"vectors must have a row for each of the {len(columns['codes'])} of x, got {len(kept)}"
                )
            columns.update(self._vectors.encode(kept))
        return self._assigned(given, columns), columns

    def _assigned(self, x: Any, columns: Columns) -> np.ndarray | None:
        """The list of each row (None: there is one)."""
        return None

    @staticmethod
    def _checked_ids(ids: Any, count: int | None = None) -> np.ndarray:
        given = _inputs.check_ids("ids", ids)
        if count is not None and len(given) != count:
            raise ValueError(f"ids must be one for each of the {count} rows of x, got {len(given)}")
        _inputs.check_distinct("ids", given)
        return given

    @staticmethod
    def _positions_of(state: State, ids: np.ndarray) -> np.ndarray:
        positions = state.positions_of(ids)
        if (positions < 0).any():
            raise IndexError(f"ids must be in the index, got {ids[positions < 0][0]}")
        return positions


def _check_ascending(ids: np.ndarray, starts: np.ndarray, next_id: int) -> None:
    """Raise ValueError unless ids ascend within lists, are below next_id and distinct."""
    falling = np.nonzero(ids[1:] <= ids[:-1])[0] + 1
    if ids.min() < 0 or ids.max() >= next_id or not np.isin(falling, starts).all():
        raise ValueError("ids are not ascending, between 0 and next_id")
    if len(starts) > 2:
        _inputs.check_distinct("ids", ids)


def like_queries(queries: Any, *results: np.ndarray) -> Any:
    """The results as tensors on the device of the queries, if those are tensors."""
    source = queries.codes if isinstance(queries, SDCCodes) else queries
    if not _inputs.is_tensor(source):
        return results
    return tuple(_native.torch.from_numpy(result).to(source.device) for result in results)


def _check_backend() -> None:
    if (backend := backends.forced_backend()) not in (None, "cpu"):
        raise ValueError(f"backend must be 'cpu' to search an index, got {backend!r}")
