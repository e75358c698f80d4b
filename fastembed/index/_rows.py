"""The rows of an index: immutable runs, and states that readers may keep while writers make new ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

Columns = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Run:
    """Rows in lists one after another (a flat index has one list), those of a list by ascending id.

    Attributes:
        ids: int64 [N]; a range where they are consecutive, which costs no memory.
        starts: int64 [lists + 1], first row of each list, then N.
        columns: arrays of N rows.
        removed: bool [N], or None if no row has been removed.
    """

    ids: np.ndarray | range
    starts: np.ndarray
    columns: Columns
    removed: np.ndarray | None = None

    @classmethod
    def arranged(cls, ids: np.ndarray, lists: np.ndarray | None, list_count: int, columns: Columns) -> Run:
        """A run of rows in any order; `lists` [N] names the list of each (None: there is one)."""
        if lists is None or list_count == 1:
            ascending = len(ids) < 2 or bool((ids[1:] > ids[:-1]).all())
            order = None if ascending else np.argsort(ids)
            starts = np.array([0, len(ids)])
        else:
            order = np.lexsort((ids, lists))
            starts = np.concatenate([[0], np.cumsum(np.bincount(lists, minlength=list_count))])
        if order is not None:
            ids, columns = ids[order], {name: column[order] for name, column in columns.items()}
        consecutive = len(starts) == 2 and len(ids) > 0 and ids[-1] - ids[0] == len(ids) - 1
        return cls(range(int(ids[0]), int(ids[-1]) + 1) if consecutive else ids, starts, columns)

    @classmethod
    def merged(cls, runs: Sequence[Run]) -> Run:
        """One run of the rows of all, without those removed."""
        if len(runs) == 1 and runs[0].removed is None:
            return runs[0]
        alive = [slice(None) if run.removed is None else ~run.removed for run in runs]
        ids = np.concatenate([run.id_array[rows] for run, rows in zip(runs, alive, strict=True)])
        lists = np.concatenate([run.lists[rows] for run, rows in zip(runs, alive, strict=True)])
        columns = {
            name: np.concatenate([run.columns[name][rows] for run, rows in zip(runs, alive, strict=True)])
            for name in runs[0].columns
        }
        return cls.arranged(ids, lists, len(runs[0].starts) - 1, columns)

    def __len__(self) -> int:
        """Rows, those removed included."""
        return len(self.ids)

    @cached_property
    def live(self) -> int:
        return len(self.ids) if self.removed is None else int(np.count_nonzero(~self.removed))

    @cached_property
    def live_rows(self) -> np.ndarray | None:
        """int64, ascending: the rows that have not been removed; None for all."""
        return None if self.removed is None else np.nonzero(~self.removed)[0]

    @property
    def lists(self) -> np.ndarray:
        """The list of each row."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    @property
    def id_array(self) -> np.ndarray:
        return np.arange(len(self)) + self.ids.start if isinstance(self.ids, range) else self.ids

    def ids_of(self, rows: np.ndarray) -> np.ndarray:
        """The ids of rows of any shape."""
        return rows + self.ids.start if isinstance(self.ids, range) else self.ids[rows]

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """int64 [len(ids)]: the row of each id, -1 where it is not here or was removed."""
        if len(self) == 0:
            return np.full(len(ids), -1)
        if isinstance(self.ids, range):
            rows = np.clip(ids, self.ids.start, self.ids.stop - 1) - self.ids.start
        else:
            places = np.minimum(np.searchsorted(self.ids, ids, sorter=self._id_order), len(self) - 1)
            rows = places if self._id_order is None else self._id_order[places]
        here = self.ids_of(rows) == ids
        if self.removed is not None:
            here &= ~self.removed[rows]
        return np.where(here, rows, -1)

    def without(self, rows: np.ndarray) -> Run:
        removed = np.zeros(len(self), bool) if self.removed is None else self.removed.copy()
        removed[rows] = True
        return replace(self, removed=removed)

    @cached_property
    def _id_order(self) -> np.ndarray | None:
        """Rows by ascending id; None where they stand so."""
        return None if len(self.starts) == 2 else np.argsort(self.id_array)


@dataclass(frozen=True, eq=False)
class State:
    """What a search sees: runs, and the id that the next row without one gets. Never changed: a writer makes another.

    Each run is at least twice as large as all those behind it together, so there are few.
    """

    runs: tuple[Run, ...] = ()
    next_id: int = 0

    @cached_property
    def live(self) -> int:
        return sum(run.live for run in self.runs)

    @property
    def ids(self) -> np.ndarray:
        """int64 [live], ascending."""
        live = [run.id_array if run.removed is None else run.id_array[~run.removed] for run in self.runs]
        return np.sort(np.concatenate([np.empty(0, np.int64), *live]))

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [runs + 1]: position of the first row of each run; a row's position counts through all runs."""
        return np.cumsum([0, *map(len, self.runs)])

    def located(self) -> Iterator[tuple[Run, int]]:
        """Each run with the position of its first row."""
        return zip(self.runs, self.offsets.tolist(), strict=False)

    def positions_of(self, ids: np.ndarray) -> np.ndarray:
        """int64 [len(ids)]: the position of each id, -1 where there is none."""
        positions = np.full(len(ids), -1)
        for run, offset in self.located():
            rows = run.rows_of(ids)
            positions[rows >= 0] = rows[rows >= 0] + offset
        return positions

    def ids_at(self, positions: np.ndarray) -> np.ndarray:
        """The ids at positions of any shape; -1 for -1."""
        if len(self.runs) == 1:
            ids = self.runs[0].ids_of(positions)
            ids[positions < 0] = -1
            return ids
        ids = np.full(positions.shape, -1)
        for run, offset in self.located():
            here = (positions >= offset) & (positions < offset + len(run))
            ids[here] = run.ids_of(positions[here] - offset)
        return ids

    def take(self, positions: np.ndarray, names: Sequence[str]) -> Columns:
        """These columns of the rows at positions [n]."""
        taken = {}
        for name in names:
            first = self.runs[0].columns[name]
            column = taken[name] = np.empty((len(positions), *first.shape[1:]), first.dtype)
            for run, offset in self.located():
                here = (positions >= offset) & (positions < offset + len(run))
                column[here] = run.columns[name][positions[here] - offset]
        return taken

    def with_run(self, run: Run, next_id: int) -> State:
        """The state with another run, merged with the smaller ones before it."""
        return State(_balanced([*self.runs, run]), next_id)

    def without(self, positions: np.ndarray) -> State:
        """The state without the rows at positions."""
        runs = []
        for run, offset in self.located():
            rows = positions[(positions >= offset) & (positions < offset + len(run))] - offset
            kept = run.without(rows) if len(rows) else run
            # Rows that only cost time are given up before they are as many as the others.
            if kept.live:
                runs.append(Run.merged([kept]) if 2 * kept.live < len(kept) else kept)
        return State(_balanced(runs), self.next_id)


def _balanced(runs: list[Run]) -> tuple[Run, ...]:
    done: list[Run] = []
    for run in runs:
        tail = [run]
        while done and done[-1].live < 2 * sum(other.live for other in tail):
            tail.insert(0, done.pop())
        done.append(Run.merged(tail) if len(tail) > 1 else run)
    return tuple(done)


class Filter:
    """The ids that a search may find: a boolean mask indexed by id, or distinct ids."""

    def __init__(self, mask: np.ndarray | None, ids: np.ndarray | None) -> None:
        self._mask, self._ids = mask, ids

    def rows_of(self, run: Run) -> np.ndarray:
        """int64, ascending: the rows of a run that may be found."""
        if self._ids is not None:
            rows = run.rows_of(self._ids)
            return np.sort(rows[rows >= 0])
        assert self._mask is not None
        allowed = np.zeros(len(run), bool)
        if isinstance(run.ids, range):
            part = self._mask[run.ids.start : run.ids.stop]
            allowed[: len(part)] = part
        else:
            inside = run.ids < len(self._mask)
            allowed[inside] = self._mask[run.ids[inside]]
        return np.nonzero(allowed if run.removed is None else allowed & ~run.removed)[0]


def selected_rows(run: Run, allowed: Filter | None) -> np.ndarray | None:
    """int64, ascending: the rows that a search may find; None for all."""
    return run.live_rows if allowed is None else allowed.rows_of(run)
