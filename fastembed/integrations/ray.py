"""One search over many index files, each searched by a Ray actor on some machine (extra `ray`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..index import BinaryIndex, IVFBinaryIndex, load_index
from ..index._base import like_queries
from ..index._inputs import to_numpy
from ..index._searching import best_by_id
from ..ops._search_checks import check_k


class ShardedIndex:
    """Index files as one index: every file is mapped by an actor of its own, and their results are merged exactly.

    A worker that dies is started again from its file, wherever Ray finds room, and the search that it took part in goes
    on. If the file was replaced meanwhile, the new one is what it serves. `index.split(n)` cuts an index into shards to
    save.

    Args:
        paths: files that `save` wrote, readable under these names wherever actors may run: indexes of one class and of
            the same settings, with ids of their own.
        num_cpus: threads of each actor, and what Ray sets aside for it: where it has not as many for every path, it
            waits until it does.

    Raises:
        TypeError: paths is one path rather than several.
        ValueError: no paths, or indexes that differ.
        IndexFileError: a file is not whole and undamaged.
        OSError: a file cannot be read.
        ModuleNotFoundError: Ray is not installed.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], *, num_cpus: int = 1) -> None:
        import ray

        if isinstance(paths, str | bytes | os.PathLike):
            raise TypeError(f"paths must be several paths, got {paths!r}")
        if not paths:
            raise ValueError("paths must name at least one file, got none")
        actor: Any = ray.remote(_Shard).options(num_cpus=num_cpus, max_restarts=-1, max_task_retries=-1)
        self._shards: list[Any] = [actor.remote(os.path.abspath(path)) for path in paths]
        try:
            described = _results([shard.describe.remote() for shard in self._shards])
            for path, (_, settings) in zip(paths, described, strict=True):
                if settings != described[0][1]:
                    raise ValueError(
                        f"paths must hold indexes of the same settings, {described[0][1]}, but {path} has {settings}"
                    )
        except BaseException:
            self.close()
            raise
        self._size = sum(size for size, _ in described)
        self.settings = described[0][1]

    def __len__(self) -> int:
        """Rows that the files held when they were first opened."""
        return self._size

    def search(self, queries: Any, k: int, **how: Any) -> tuple[Any, Any]:
        """The k best rows for each query, as the `search` of the indexes would give them if they were one.

        Where rows are re-scored, each shard does so with its own first candidates: at least those that one index would
        have taken.

        Args:
            queries: as for the `search` of the indexes.
            k: results for each query, 1 to len(index).
            how: the other arguments of that `search`.

        Raises:
            TypeError, ValueError: an argument is not as above, two shards hold the same id, or the index is closed.
            OSError: a worker died, and its file is gone.
        """
        import ray

        if not self._shards:
            raise ValueError("search must come before close")
        check_k(k, len(self), "rows")
        given = ray.put(to_numpy("queries", queries))
        how = {name: to_numpy(name, value) if hasattr(value, "detach") else value for name, value in how.items()}
        found = _results([shard.search.remote(given, k, how) for shard in self._shards])
        values, ids = (np.concatenate(parts, axis=1) for parts in zip(*filter(None, found), strict=True))
        if values.shape[1] < k:
            raise ValueError(f"k must be at most the {values.shape[1]} rows that the files hold by now, got {k}")
        _check_shards_differ(ids)
        return like_queries(queries, *best_by_id(values, ids, ids, k, largest=values.dtype == np.float32))

    def close(self) -> None:
        """Stop the actors."""
        import ray

        for shard in self._shards:
            ray.kill(shard)
        self._shards = []


class _Shard:
    """An index file in a process of its own. Ray makes it anew, from its path, when the process dies.

    Errors are handed to the driver as results: Ray would wrap them in its own, print those of every shard, and start
    an actor whose constructor raises for ever.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._index: BinaryIndex | IVFBinaryIndex | None = None

    def describe(self) -> tuple[int, dict[str, Any]] | Exception:
        """Rows and settings."""
        try:
            index = self._opened()
        except (OSError, ValueError) as error:
            return error
        return len(index), {"kind": index.kind, **index._settings()}

    def search(self, queries: Any, k: int, how: dict[str, Any]) -> tuple[np.ndarray, np.ndarray] | Exception | None:
        """Values and ids of the k best rows, or of all if there are fewer; None without rows."""
        try:
            index = self._opened()
            return index.search(queries, min(k, len(index)), **how) if len(index) else None
        except (OSError, TypeError, ValueError) as error:
            return error

    def process(self) -> int:
        """The number of the process, for tests that end it."""
        return os.getpid()

    def _opened(self) -> BinaryIndex | IVFBinaryIndex:
        if self._index is None:
            self._index = load_index(self._path, mmap=True)
        return self._index


def _results(calls: list[Any]) -> list[Any]:
    """What the calls return; raises the first exception among it."""
    import ray

    results = ray.get(calls)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def _check_shards_differ(ids: np.ndarray) -> None:
    ordered = np.sort(ids, axis=1)
    repeated = ordered[:, 1:][(ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)]
    if len(repeated):
        raise ValueError(f"paths must hold indexes with ids of their own, but two hold {repeated[0]}")
