"""One search over many index files, each searched by a Ray actor on some machine (extra `ray`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from .._checks import check_integer
from ..index import load_index
from ..index._base import like_queries
from ..index._inputs import to_numpy
from ..index._searching import best_by_id


class ShardedIndex:
    """Index files as one index: every file is mapped by an actor of its own, and their results are merged exactly.

    A worker that dies is started again from its file, wherever Ray finds room, and the search that it took part in goes
    on. `index.split(n)` cuts an index into shards to save.

    Args:
        paths: files that `save` wrote, readable under these names wherever actors may run: indexes of one class and of
            the same settings, with ids of their own.
        num_cpus: threads of each actor.

    Raises:
        ValueError: no paths, or indexes that differ.
        IndexFileError: a file is not whole and undamaged.
        ModuleNotFoundError: Ray is not installed.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], *, num_cpus: int = 1) -> None:
        import ray

        if not paths:
            raise ValueError("paths must name at least one file, got none")
        actor: Any = ray.remote(_Shard).options(num_cpus=num_cpus, max_restarts=-1, max_task_retries=-1)
        self._shards: list[Any] = [actor.remote(os.path.abspath(path)) for path in paths]
        try:
            described = ray.get([shard.describe.remote() for shard in self._shards])
        except ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from None
        failures = [failure for failure, _, _ in described if failure is not None]
        if failures:
            raise failures[0]
        self._sizes = [size for _, size, _ in described]
        settings = [settings for _, _, settings in described]
        for path, other in zip(paths, settings, strict=True):
            if other != settings[0]:
                raise ValueError(f"paths must hold indexes of the same settings, {settings[0]}, but {path} has {other}")
        self.settings = settings[0]

    def __len__(self) -> int:
        return sum(self._sizes)

    def search(self, queries: Any, k: int, **how: Any) -> tuple[Any, Any]:
        """The k best rows for each query, as the `search` of the indexes would give them if they were one.

        Where rows are re-scored, each shard does so with its own first candidates: at least those that one index would
        have taken.

        Args:
            queries: as for the `search` of the indexes.
            k: results for each query, 1 to len(index).
            how: the other arguments of that `search`.

        Raises:
            TypeError, ValueError: an argument is not as above, or two shards hold the same id.
        """
        import ray

        check_integer("k", k, 1, len(self))
        given = ray.put(to_numpy("queries", queries))
        how = {name: to_numpy(name, value) if hasattr(value, "detach") else value for name, value in how.items()}
        calls = [
            shard.search.remote(given, min(k, size), how)
            for shard, size in zip(self._shards, self._sizes, strict=True)
            if size
        ]
        try:
            found = ray.get(calls)
        except ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from None
        values, ids = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        _check_shards_differ(ids)
        return like_queries(queries, *best_by_id(values, ids, ids, k, largest=values.dtype == np.float32))

    def close(self) -> None:
        """Stop the actors."""
        import ray

        for shard in self._shards:
            ray.kill(shard)
        self._shards = []


class _Shard:
    """An index file in a process of its own. Ray makes it anew, from its path, when the process dies."""

    def __init__(self, path: str) -> None:
        # An error here would leave Ray starting actors for ever; `describe` hands it to the driver.
        self._index, self._failure = None, None
        try:
            self._index = load_index(path, mmap=True)
        except (OSError, ValueError) as error:
            self._failure = error

    def describe(self) -> tuple[Exception | None, int, Any]:
        if self._index is None:
            return self._failure, 0, None
        return None, len(self._index), {"kind": self._index.kind, **self._index._settings()}

    def search(self, queries: Any, k: int, how: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        if self._index is None:
            assert self._failure is not None
            raise self._failure  # the file went away
        return self._index.search(queries, k, **how)

    def process(self) -> int:
        """The number of the process, for tests that end it."""
        return os.getpid()


def _check_shards_differ(ids: np.ndarray) -> None:
    ordered = np.sort(ids, axis=1)
    repeated = ordered[:, 1:][(ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)]
    if len(repeated):
        raise ValueError(f"paths must hold indexes with ids of their own, but two hold {repeated[0]}")
