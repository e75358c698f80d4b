"""`IVFBinaryIndex`: rows in lists by their nearest centroid; a search looks into the lists nearest to the query."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .._checks import check_integer
from ..ops._search_numpy import lists_topk
from . import _inputs
from ._base import CodeIndex
from ._centroids import BinaryCentroids, Centroids, FloatCentroids
from ._rows import Columns, Filter, Run, State

if TYPE_CHECKING:
    from typing import Self

_CENTROIDS: dict[str, type[Centroids]] = {"binary": BinaryCentroids, "float": FloatCentroids}
# Rows that training looks at, for each list.
_TRAINING_ROWS = 64


class IVFBinaryIndex(CodeIndex):
    """An inverted-file index: `BinaryIndex`, but rows are kept in lists by their nearest centroid, and a search looks
    only into the `nprobe` lists whose centroids are nearest to the query. Among the rows of those lists it is exact.

    Args:
        dim, bits, metric, rescore: as for `BinaryIndex`.
        lists: number of lists. A search compares a query with `lists` centroids and about nprobe / lists of the rows:
            the square root of the number of rows, or a few times that, is a good choice.
        centroids: "binary": codes of one bit for each dimension, compared by Hamming distance, as quick as the search
            itself. "float": float32 vectors, compared by cosine: slower to train, add and search, and better where
            lists are few.
        nprobe: lists that a search looks into unless told otherwise, 1 to `lists`; default 16, or all if fewer.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Sources: Jegou et al., "Product Quantization for Nearest Neighbor Search", PAMI 2011 (inverted file, section 4);
    Grana et al., "A fast approach for integrating ORB descriptors in the bag of words model", 2013 (k-majority).
    """

    kind = "ivf"
    _structure_names = ("centroids", "starts")

    def __init__(
        self,
        dim: int,
        bits: int = 1,
        metric: str = "hamming",
        *,
        lists: int,
        centroids: str = "binary",
        nprobe: int | None = None,
        rescore: str | None = None,
    ) -> None:
        super().__init__(dim, bits, metric, rescore)
        self._lists = check_integer("lists", lists, 1)
        if centroids not in _CENTROIDS:
            raise ValueError(f"centroids must be 'binary' or 'float', got {centroids!r}")
        self.nprobe = min(16, lists) if nprobe is None else nprobe
        self._centroid_kind = centroids
        self._centroids: Centroids | None = None

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings().items())
        return f"IVFBinaryIndex({settings}): {len(self)} rows{'' if self.is_trained else ', not trained'}"

    lists = property(lambda self: self._lists, doc="Number of lists.")

    @property
    def nprobe(self) -> int:
        """Lists that a search looks into unless told otherwise; may be set, to 1 to `lists`."""
        return self._nprobe

    @nprobe.setter
    def nprobe(self, nprobe: int) -> None:
        self._nprobe = check_integer("nprobe", nprobe, 1, self.lists)

    @property
    def is_trained(self) -> bool:
        """Whether there are centroids, so that rows can be added."""
        return self._centroids is not None

    @property
    def list_sizes(self) -> np.ndarray:
        """int64 [lists]: rows of each list."""
        live = [run.lists if run.removed is None else run.lists[~run.removed] for run in self._state.runs]
        return np.bincount(np.concatenate([np.empty(0, np.int64), *live]), minlength=self.lists)

    def train(self, x: Any, *, iterations: int = 10, seed: int = 0) -> None:
        """Choose the centroids: k-majority (binary) or spherical k-means (float) of at most 64 rows for each list.

        Args:
            x: [N, dim] real vectors or codes, as for `add`; at least `lists` rows, distributed like those to be added.
            iterations: rounds at most; it ends when no row changes its list.
            seed: of the sample of rows and of the first centroids.

        Raises:
            TypeError, ValueError: an argument is not as above, or the index has been trained.
        """
        given = _inputs.to_numpy("x", x)
        columns = self._codes.encode("x", given)
        check_integer("iterations", iterations, 0)
        check_integer("seed", seed, 0)
        count = len(columns["codes"])
        if count < self.lists:
            raise ValueError(f"x must have at least a row for each of the {self.lists} lists, got {count}")
        rng = np.random.default_rng(seed)
        chosen = np.sort(rng.choice(count, min(count, _TRAINING_ROWS * self.lists), replace=False))
        sample = given[chosen], {name: column[chosen] for name, column in columns.items()}
        trained = _CENTROIDS[self._centroid_kind].trained(self._codes, *sample, self.lists, iterations, rng)
        with self._writing:
            # Rows that another thread is adding have been given lists of these centroids.
            if self._centroids is not None:
                raise ValueError("train must be called once: the index is trained")
            self._centroids = trained

    def search(
        self,
        queries: Any,
        k: int,
        *,
        filter: Any = None,
        vectors: Any = None,
        rescore_multiplier: int = 4,
        nprobe: int | None = None,
    ) -> tuple[Any, Any]:
        """The k best rows for each query among those of the nearest lists.

        Args:
            queries, k, filter, vectors, rescore_multiplier: as for `BinaryIndex.search`.
            nprobe: lists to look into, 1 to `lists`; default `index.nprobe`. With all of them the search is exact.

        Returns:
            As `BinaryIndex.search`. Where the lists hold fewer than k rows that pass, the last ids are -1.

        Raises:
            TypeError, ValueError: an argument is not as above, or k is larger than the index.
        """
        nprobe = self._checked_nprobe(nprobe)
        return self._search(queries, k, filter, vectors, rescore_multiplier, nprobe=nprobe)

    def range_search(
        self, queries: Any, radius: float, *, filter: Any = None, nprobe: int | None = None
    ) -> tuple[Any, Any, Any]:
        """All rows near each query among those of the nearest lists.

        Args:
            queries, radius, filter: as for `BinaryIndex.range_search`.
            nprobe: as for `search`.

        Returns:
            As `BinaryIndex.range_search`.

        Raises:
            TypeError, ValueError: an argument is not as above.
        """
        return self._range_search(queries, radius, filter, nprobe=self._checked_nprobe(nprobe))

    def _checked_nprobe(self, nprobe: int | None) -> int:
        return self.nprobe if nprobe is None else check_integer("nprobe", nprobe, 1, self.lists)

    def _best_rows(
        self, state: State, queries: Any, codes: Columns, k: int, allowed: Filter | None, **how: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        run = state.runs[0]
        if allowed is not None or len(state.runs) > 1 or run.removed is not None or isinstance(run.ids, range):
            return super()._best_rows(state, queries, codes, k, allowed, **how)
        # All rows in one run: one call does everything.
        if isinstance(self._centroids, BinaryCentroids):
            lists = {"centroids": self._centroids.values, "probes": how["nprobe"]}
        else:
            lists = {"probed": self._probed(queries, codes, **how)}
        return lists_topk(codes, run.columns, self.dim, self.bits, k, run.starts, run.ids, **lists)

    def _probed(self, queries: Any, codes: Columns, **how: Any) -> np.ndarray | None:
        assert self._centroids is not None  # there are rows
        return self._centroids.nearest(queries, codes, how["nprobe"])

    def _assigned(self, x: Any, columns: Columns) -> np.ndarray | None:
        if self._centroids is None:
            raise ValueError("x must wait: train the index before rows are added")
        return self._centroids.nearest_one(x, columns)

    @property
    def _list_count(self) -> int:
        return self.lists

    def _settings(self) -> dict[str, Any]:
        return {
            **super()._settings(),
            "lists": self.lists,
            "centroids": self._centroid_kind,
            "nprobe": self.nprobe,
        }

    def _structure(self, run: Run) -> dict[str, np.ndarray]:
        if self._centroids is None:
            raise ValueError("an index must be trained before it is saved")
        return {"centroids": self._centroids.values, "starts": run.starts}

    @classmethod
    def _from_settings(cls, settings: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> Self:
        index = cls(**settings)
        centroids = _CENTROIDS[index._centroid_kind]
        index._centroids = centroids.checked(index._codes, arrays.pop("centroids"), index.lists)
        return index

    def _starts(self, arrays: dict[str, np.ndarray], rows: int) -> np.ndarray:
        starts = arrays.pop("starts")
        if (starts.dtype, starts.shape) != (np.int64, (self.lists + 1,)):
            raise ValueError(f"starts is {starts.dtype} {list(starts.shape)}")
        if starts[0] != 0 or starts[-1] != rows or (starts[1:] < starts[:-1]).any():
            raise ValueError("starts do not ascend from 0 to the number of rows")
        return starts
