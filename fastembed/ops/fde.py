"""Fixed dimensional encodings (MUVERA): one vector for a set of token embeddings, so that the dot product of two
encodings stands for the Chamfer similarity (MaxSim) of the sets. From NumPy arrays with or without PyTorch, and from
tensors through a registered op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .. import _native
from .._atomic import checksum, replacing
from .._checks import FLOATS, OFFSETS, are_tensors, check_array, check_integer, raise_not_finite
from .._native import core, num_threads

if TYPE_CHECKING:
    from torch import Tensor

    Array = TypeVar("Array", np.ndarray, Tensor)

if _native.torch is not None:
    from . import _fde_torch

MAX_BITS = 12
# Of the matrices, in a file.
_NAMES = ("hyperplanes", "projections", "buckets", "signs")


@dataclass(frozen=True, eq=False)
class FDEMatrices:
    """The random matrices behind fixed dimensional encodings. Encodings can only be compared when they were made by the
    same ones, so keep them (`save`) with the encodings: the stream of a random generator is no format.

    Attributes:
        hyperplanes: float32 [dim, repetitions, bits], normal: the sides a token lies on are the bits of its
            partition.
        projections: float32 [repetitions, dim, projection_dim], entries +-1 / sqrt(projection_dim); or None: blocks
            keep all dims of the tokens.
        buckets: int64 [repetitions * 2**bits * block_dim], the component of the result that an element of the encoding
            is added to; or None: no final projection.
        signs: float32, shaped as buckets, +-1; or None.
        final_dim: components of the result.
    """

    hyperplanes: np.ndarray
    projections: np.ndarray | None
    buckets: np.ndarray | None
    signs: np.ndarray | None
    final_dim: int

    @classmethod
    def random(
        cls,
        dim: int,
        *,
        repetitions: int = 20,
        bits: int = 5,
        projection_dim: int | None = 16,
        final_dim: int | None = None,
        seed: int = 0,
    ) -> FDEMatrices:
        """New matrices.

        Args:
            dim: of the token embeddings.
            repetitions: independent partitions of space, whose encodings are concatenated.
            bits: hyperplanes per repetition, 0 to 12: 2**bits partitions. 4 or 5 suit sequences of tens to hundreds of
                tokens.
            projection_dim: dims of a block; None, or dim: a block is not projected.
            final_dim: dims of the result, by a count sketch of the whole encoding; None: the encoding itself,
                repetitions * 2**bits * projection_dim.
            seed: of NumPy's default generator.

        Raises:
            TypeError, ValueError: a number is no integer or outside its range.
        """
        dim = check_integer("dim", dim, 1)
        repetitions = check_integer("repetitions", repetitions, 1)
        bits = check_integer("bits", bits, 0, MAX_BITS)
        block_dim = dim
        if projection_dim is not None:
            block_dim = check_integer("projection_dim", projection_dim, 1, dim)
        length = (repetitions << bits) * block_dim
        if final_dim is not None:
            check_integer("final_dim", final_dim, 1, length)
        check_integer("seed", seed, 0)
        generator = np.random.default_rng(seed)
        hyperplanes = generator.standard_normal((dim, repetitions, bits), np.float32)
        projections = buckets = signs = None
        if block_dim < dim:
            coins = generator.integers(0, 2, (repetitions, dim, block_dim))
            projections = ((2 * coins - 1) / np.sqrt(block_dim)).astype(np.float32)
        if final_dim is not None:
            buckets = generator.integers(0, final_dim, length)
            signs = (2 * generator.integers(0, 2, length) - 1).astype(np.float32)
        return cls(hyperplanes, projections, buckets, signs, length if final_dim is None else final_dim)

    @property
    def dim(self) -> int:
        """Dims of the token embeddings."""
        return self.hyperplanes.shape[0]

    @property
    def block_dim(self) -> int:
        """Dims of a block of the encoding."""
        return self.dim if self.projections is None else self.projections.shape[2]

    def arrays(self) -> tuple[np.ndarray | None, ...]:
        """hyperplanes, projections, buckets and signs."""
        return self.hyperplanes, self.projections, self.buckets, self.signs

    def __post_init__(self) -> None:
        _check_matrix("hyperplanes", self.hyperplanes, np.float32, 3)
        dim, repetitions, bits = self.hyperplanes.shape
        if self.projections is not None:
            _check_matrix("projections", self.projections, np.float32, 3)
            if self.projections.shape[:2] != (repetitions, dim):
                raise ValueError(
                    f"projections must be [{repetitions}, {dim}, projection_dim], got {list(self.projections.shape)}"
                )
        length = (repetitions << bits) * self.block_dim
        if (self.buckets is None) != (self.signs is None):
            raise ValueError("buckets and signs go together: give both or neither")
        if self.buckets is None or self.signs is None:
            if self.final_dim != length:
                raise ValueError(f"final_dim must be {length} without buckets, got {self.final_dim}")
            return
        _check_matrix("buckets", self.buckets, np.int64, 1)
        _check_matrix("signs", self.signs, np.float32, 1)
        if len(self.buckets) != length or len(self.signs) != length:
            raise ValueError(f"buckets and signs must have length {length}, got {len(self.buckets)}, {len(self.signs)}")
        check_integer("final_dim", self.final_dim, 1)
        if self.buckets.min() < 0 or self.buckets.max() >= self.final_dim:
            raise ValueError(
                f"buckets must be 0 to {self.final_dim - 1}, got {self.buckets.min()}..{self.buckets.max()}"
            )

    def save(self, path: str | Path) -> None:
        """Write the matrices to a safetensors file, in place of what stood at `path`: whenever the process or the
        machine stops, that is the old file or the new one, whole.

        Raises:
            OSError: the file cannot be written; what stood at `path` still does.
        """
        from safetensors.numpy import save

        tensors = {name: value for name, value in zip(_NAMES, self.arrays(), strict=True) if value is not None}
        final_dim = str(self.final_dim)
        data = save(tensors, {"final_dim": final_dim, "crc32": _checksum(final_dim, tensors)})
        with replacing(path) as file:
            file.write(data)

    @classmethod
    def load(cls, path: str | Path) -> FDEMatrices:
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds something else, or is damaged; the message names it.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ValueError(f"path must be a safetensors file of FDE matrices, got {path}: {error}") from error
        if "hyperplanes" not in tensors or not metadata.get("final_dim", "").isdigit():
            raise ValueError(f"path must be a file of FDE matrices, got {path}, without hyperplanes or final_dim")
        projections, buckets, signs = map(tensors.get, _NAMES[1:])
        try:
            matrices = cls(tensors["hyperplanes"], projections, buckets, signs, int(metadata["final_dim"]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"path must be a file of FDE matrices, got {path}: {error}") from error
        if metadata.get("crc32") != _checksum(metadata["final_dim"], tensors):
            raise ValueError(f"path must be an undamaged file of FDE matrices, got {path}: another checksum")
        return matrices


def fde_queries(
    tokens: Array | Sequence[Array],
    matrices: FDEMatrices,
    attention_mask: Array | None = None,
    *,
    cu_seqlens: Array | None = None,
) -> Array:
    """Fixed dimensional encodings of queries, each a set of token embeddings.

    <encoding of query, encoding of document> / (tokens of the query) is within epsilon of the mean, over the query's
    tokens, of each one's largest dot product with a token of the document, with bits in O(log(tokens) / epsilon) and
    projection_dim in O(log(tokens) / epsilon^2), for unit tokens (Theorem 2.1 of the paper). Single-vector search then
    finds candidates, and the exact similarity orders them.

    A token's partition depends on the sign of a float32 sum, so a token within rounding of a hyperplane may change
    sides between instruction sets or backends; on one of them, an encoding depends on its own tokens alone.

    Args:
        tokens: [B, T, dim], with `attention_mask` where there is padding; or packed [N, dim] with `cu_seqlens`; or a
            list of B arrays [T_i, dim]. float32, float16, bfloat16 or float64 (computed in float32), finite where not
            masked. Arrays or tensors; what comes back is of the same kind.
        matrices: `FDEMatrices.random(dim)`, the same for queries and documents.
        attention_mask: [B, T], bool or numbers, 0 for padding.
        cu_seqlens: int32 or int64 [B + 1], rising from 0 to N: sequence b is tokens[cu_seqlens[b] : cu_seqlens[b + 1]].

    Returns:
        float32 [B, matrices.final_dim]. A query without tokens gives zeros.

    Raises:
        TypeError: arrays and tensors are mixed, or a wrong dtype.
        ValueError: a wrong shape, offsets that do not rise from 0 to N, or a token that is not finite (rows are
            counted among the tokens that are not masked).

    Source: Jayaram et al., "MUVERA: Multi-Vector Retrieval via Fixed Dimensional Encodings", NeurIPS 2024,
    arXiv 2405.19504, section 2.
    """
    return _encode(tokens, matrices, attention_mask, cu_seqlens, documents=False)


def fde_documents(
    tokens: Array | Sequence[Array],
    matrices: FDEMatrices,
    attention_mask: Array | None = None,
    *,
    cu_seqlens: Array | None = None,
) -> Array:
    """Fixed dimensional encodings of documents: as `fde_queries`, but a block is the mean of its tokens, and an empty
    block takes the token whose partition differs in the fewest bits (the first of several)."""
    return _encode(tokens, matrices, attention_mask, cu_seqlens, documents=True)


def _encode(tokens: Any, matrices: FDEMatrices, attention_mask: Any, cu_seqlens: Any, documents: bool) -> Any:
    if not isinstance(matrices, FDEMatrices):
        raise TypeError(f"matrices must be FDEMatrices, got {type(matrices).__name__}")
    if isinstance(tokens, (list, tuple)):
        if attention_mask is not None or cu_seqlens is not None:
            raise ValueError("attention_mask and cu_seqlens must be None when tokens is a list of sequences")
        tokens, cu_seqlens = _joined(tokens)
    given = {"tokens": tokens, "attention_mask": attention_mask, "cu_seqlens": cu_seqlens}
    tensors = are_tensors(**{name: value for name, value in given.items() if value is not None})
    packed: Any
    packed, offsets = _packed(tokens, attention_mask, cu_seqlens, matrices.dim)
    packed = packed.float() if tensors else np.require(packed, np.float32, ["C", "A"])
    arrays = [None if value is None else np.require(value, requirements=["C", "A"]) for value in matrices.arrays()]
    if tensors:
        return _fde_torch.encode(packed, offsets, arrays, matrices.final_dim, documents)
    encodings = np.empty((len(offsets) - 1, matrices.final_dim), np.float32)
    dim, repetitions, bits = matrices.hyperplanes.shape
    hyperplanes, projections, buckets, signs = (0 if array is None else core.address(array) for array in arrays)
    first_bad = core.fde(
        *(core.address(packed), core.address(offsets), len(offsets) - 1),
        *(hyperplanes, projections, buckets, signs),
        *(dim, repetitions, bits, matrices.block_dim, matrices.final_dim),
        *(documents, core.address(encodings), num_threads()),
    )
    raise_not_finite(first_bad, "tokens")
    return encodings


def _joined(sequences: Sequence[Any]) -> tuple[Any, Any]:
    """A list of sequences, packed."""
    if not sequences:
        raise ValueError("tokens must hold at least one sequence, got an empty list")
    tensors = are_tensors(**{f"tokens[{i}]": sequence for i, sequence in enumerate(sequences)})
    for i, sequence in enumerate(sequences):
        check_array(f"tokens[{i}]", sequence, 2, FLOATS)
        if sequence.shape[1] != sequences[0].shape[1] or sequence.dtype != sequences[0].dtype:
            raise ValueError(
                f"tokens must share dim and dtype: tokens[0] is {sequences[0].dtype} {list(sequences[0].shape)}, "
                f"tokens[{i}] is {sequence.dtype} {list(sequence.shape)}"
            )
    offsets = np.cumsum([0, *(len(sequence) for sequence in sequences)], dtype=np.int64)
    if not tensors:
        return np.concatenate(sequences), offsets
    torch = _native.torch
    return torch.cat(list(sequences)), torch.from_numpy(offsets).to(sequences[0].device)


def _packed(tokens: Any, attention_mask: Any, cu_seqlens: Any, dim: int) -> tuple[Any, Any]:
    """Tokens as [N, dim] and their int64 offsets."""
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError("attention_mask must be None when cu_seqlens is given: packed tokens have no padding")
        check_array("tokens", tokens, 2, FLOATS)
        check_array("cu_seqlens", cu_seqlens, 1, OFFSETS, "[batch + 1]")
        _check_dim(tokens, dim)
        offsets = cu_seqlens.astype(np.int64) if isinstance(cu_seqlens, np.ndarray) else cu_seqlens.long()
        ends = (int(offsets[0]), int(offsets[-1])) if len(offsets) else (-1, -1)
        if ends != (0, len(tokens)) or bool((offsets[1:] < offsets[:-1]).any()):
            raise ValueError(f"cu_seqlens must rise from 0 to the {len(tokens)} tokens, got {cu_seqlens}")
        return tokens, offsets
    check_array("tokens", tokens, 3, FLOATS, "[batch, tokens, dims]")
    _check_dim(tokens, dim)
    batch, length = tokens.shape[:2]
    if attention_mask is None:
        offsets = np.arange(batch + 1, dtype=np.int64) * length
        packed = tokens.reshape(batch * length, dim)
    else:
        if tuple(attention_mask.shape) != (batch, length):
            raise ValueError(f"attention_mask must be [{batch}, {length}], got {list(attention_mask.shape)}")
        valid = attention_mask != 0
        offsets = np.concatenate([[0], np.cumsum(np.asarray(valid.sum(1).tolist(), np.int64))]).astype(np.int64)
        packed = tokens[valid]
    return packed, offsets if isinstance(tokens, np.ndarray) else _native.torch.from_numpy(offsets).to(tokens.device)


def _check_dim(tokens: Any, dim: int) -> None:
    if tokens.shape[-1] != dim:
        raise ValueError(f"tokens must have the {dim} dims of the matrices, got {tokens.shape[-1]}")


def _checksum(final_dim: str, tensors: Mapping[str, np.ndarray]) -> str:
    """Of the matrices there are, by name."""
    return checksum(final_dim, ((f"{name} {value.shape}", value.tobytes()) for name, value in sorted(tensors.items())))


def _check_matrix(name: str, value: Any, dtype: Any, ndim: int) -> None:
    if not isinstance(value, np.ndarray) or value.dtype != dtype or value.ndim != ndim:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"{name} must be a {np.dtype(dtype)} array of {ndim} axes, got {got}")
