"""Indexes to and from FAISS, of one-bit codes and Hamming distance.

Distances are the same on both sides as long as queries are packed by `pack_bits` too: FAISS never looks at the order
of bits within a byte. Where dim is no multiple of 8, FAISS, which knows whole bytes only, gets one that is; the bits
beyond dim are zeros and add nothing to a distance.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .._checks import check_integer
from ..index import BinaryIndex, IVFBinaryIndex
from ..index._centroids import BinaryCentroids
from ..index._rows import Run, State


def to_faiss(index: BinaryIndex | IVFBinaryIndex) -> Any:
    """A FAISS index of the rows that the index holds now, with their ids: `IndexBinaryIDMap2` of an `IndexBinaryFlat`
    for a `BinaryIndex`, `IndexBinaryIVF` with the same lists and nprobe for an `IVFBinaryIndex`.

    Vectors kept for re-scoring are left behind.

    Raises:
        TypeError: it is no index of ours.
        ValueError: its metric is not "hamming" or its centroids are not binary, which FAISS has no index for.
        ModuleNotFoundError: FAISS is not installed.
    """
    import faiss

    if not isinstance(index, BinaryIndex | IVFBinaryIndex):
        raise TypeError(f"index must be a BinaryIndex or an IVFBinaryIndex, got {type(index).__name__}")
    if index.metric != "hamming":
        raise ValueError(f"index must have metric 'hamming' for FAISS, got {index.metric!r}")
    run = index._merged_run()
    codes = np.ascontiguousarray(run.columns["codes"])
    bits = 8 * codes.shape[1]
    if isinstance(index, BinaryIndex):
        flat = faiss.IndexBinaryIDMap2(faiss.IndexBinaryFlat(bits))
        flat.add_with_ids(codes, run.id_array)
        return flat
    if not isinstance(index._centroids, BinaryCentroids):
        raise ValueError("index must be trained and have binary centroids for FAISS")
    quantizer = faiss.IndexBinaryFlat(bits)
    quantizer.add(np.ascontiguousarray(index._centroids.values))
    inverted = faiss.IndexBinaryIVF(quantizer, bits, index.lists)
    for number in np.nonzero(np.diff(run.starts))[0].tolist():
        rows = slice(int(run.starts[number]), int(run.starts[number + 1]))
        ids, some = np.ascontiguousarray(run.id_array[rows]), codes[rows]
        inverted.invlists.add_entries(number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(some))
    inverted.ntotal, inverted.nprobe, inverted.is_trained = len(run), index.nprobe, True
    return inverted


def from_faiss(index: Any, dim: int | None = None) -> BinaryIndex | IVFBinaryIndex:
    """An index of ours with the rows and ids of a FAISS `IndexBinaryFlat`, `IndexBinaryIDMap`, `IndexBinaryIDMap2` or
    `IndexBinaryIVF`.

    Args:
        index: the FAISS index.
        dim: dimensions of the vectors, if they are not those that FAISS names but up to 7 fewer. The bits beyond must
            be zero.

    Raises:
        TypeError: it is another kind of index.
        ValueError: dim does not fit, an id is negative or there twice, or inverted lists are not trained.
        ModuleNotFoundError: FAISS is not installed.
    """
    import faiss

    if not isinstance(index, faiss.IndexBinary):
        raise TypeError(f"index must be a binary index of FAISS, got {type(index).__name__}")
    theirs = faiss.downcast_IndexBinary(index)  # does not keep the index alive: the argument does
    dim = theirs.d if dim is None else dim
    check_integer("dim", dim, theirs.d - 7, theirs.d)
    if isinstance(theirs, faiss.IndexBinaryIVF):
        return _from_ivf(faiss, theirs, dim)
    ids = None
    if isinstance(theirs, faiss.IndexBinaryIDMap):
        ids = faiss.vector_to_array(theirs.id_map)
        theirs = faiss.downcast_IndexBinary(theirs.index)
    ours = BinaryIndex(dim)
    ours.add(_flat_codes(faiss, theirs), ids)
    return ours


def _flat_codes(faiss: Any, index: Any) -> np.ndarray:
    if not isinstance(index, faiss.IndexBinaryFlat):
        raise TypeError(f"index must be flat, an id map of a flat one, or inverted lists, got {type(index).__name__}")
    return faiss.vector_to_array(index.xb).reshape(index.ntotal, index.code_size)


def _from_ivf(faiss: Any, index: Any, dim: int) -> IVFBinaryIndex:
    if not index.is_trained:
        raise ValueError("index must be trained")
    lists, width = index.nlist, index.code_size
    ours = IVFBinaryIndex(dim, lists=lists, nprobe=min(max(1, index.nprobe), lists))
    sizes = np.array([index.invlists.list_size(number) for number in range(lists)])
    ids, codes = np.empty(sizes.sum(), np.int64), np.empty((sizes.sum(), width), np.uint8)
    end = 0
    for number in np.nonzero(sizes)[0].tolist():
        start, end = end, end + int(sizes[number])
        ids[start:end] = faiss.rev_swig_ptr(index.invlists.get_ids(number), end - start)
        codes[start:end] = faiss.rev_swig_ptr(index.invlists.get_codes(number), (end - start) * width).reshape(
            -1, width
        )
    columns = ours._codes.encode("index", codes)
    ids = ours._checked_ids(ids)
    centroids = _flat_codes(faiss, faiss.downcast_IndexBinary(index.quantizer))
    ours._centroids = BinaryCentroids(ours._codes, ours._codes.encode("index", centroids)["codes"])
    if len(ids):
        run = Run.arranged(ids, np.repeat(np.arange(lists), sizes), lists, columns)
        ours._state = State((run,), int(ids.max()) + 1)
    return ours
