"""Checks of the arguments of pool_exits, and the tokens that its ranges and positions leave."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.pooling import check_values

MODES = ("mean", "cls", "lasttoken", "max", "mean_sqrt_len", "weightedmean")
FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
CODES = frozenset({torch.int8, torch.uint8})


def check_mode(mode: Any) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")


def check_modes(modes: Any) -> tuple[str, ...]:
    """One mode or several, as a tuple."""
    if not isinstance(modes, (str, list, tuple)) or not modes:
        raise TypeError(f"mode must be a string or a list of strings, got {modes!r}")
    several = (modes,) if isinstance(modes, str) else tuple(modes)
    for mode in several:
        check_mode(mode)
    return several


def check_hidden_states(hidden_states: Sequence[Tensor], packed: bool) -> list[Tensor]:
    """The exits as [B, T, D], or as [N, D] when packed."""
    if not isinstance(hidden_states, (list, tuple)):
        raise TypeError(f"hidden_states must be a list of tensors, one per exit, got {type(hidden_states).__name__}")
    if not hidden_states:
        raise ValueError("hidden_states must hold at least one exit, got an empty list")
    exits = [_check_exit(hidden, position, packed) for position, hidden in enumerate(hidden_states)]
    first = exits[0]
    for position in range(1, len(exits)):
        hidden = exits[position]
        if hidden.dtype != first.dtype or hidden.device != first.device:
            raise TypeError(
                f"hidden_states must share dtype and device: hidden_states[0] is {first.dtype} on {first.device}, "
                f"hidden_states[{position}] is {hidden.dtype} on {hidden.device}"
            )
        if hidden.shape[:-1] != first.shape[:-1]:
            raise ValueError(
                f"hidden_states must share all but the last axis: hidden_states[0] has shape {tuple(first.shape)}, "
                f"hidden_states[{position}] has {tuple(hidden.shape)}"
            )
    return exits


def _check_exit(hidden: Tensor, position: int, packed: bool) -> Tensor:
    if not isinstance(hidden, Tensor):
        raise TypeError(f"hidden_states[{position}] must be a tensor, got {type(hidden).__name__}")
    if hidden.dtype not in FLOATS or hidden.layout != torch.strided:
        raise TypeError(
            f"hidden_states[{position}] must be dense float32, bfloat16, float16 or float64, "
            f"got {hidden.dtype} {hidden.layout}"
        )
    rank = hidden.dim()
    if rank and hidden.shape[-1] == 0:
        raise ValueError(
            f"hidden_states[{position}] must have at least one feature per token, got shape {tuple(hidden.shape)}"
        )
    if packed and rank == 3 and hidden.shape[0] == 1:
        return hidden[0]
    if rank != (2 if packed else 3):
        expected = (
            "[N, D] or [1, N, D] when cu_seqlens is given" if packed else "[B, T, D] (or packed, with cu_seqlens)"
        )
        raise ValueError(f"hidden_states[{position}] must be {expected}, got shape {tuple(hidden.shape)}")
    return hidden


# A token counts as left out of an additive mask from here down. The mildest fill in use is -1e4, of old BERT code.
_LEFT_OUT = -1e4


def flat_mask(attention_mask: Tensor) -> Tensor:
    """A mask [B, 1, 1, T], as attention layers take it, as [B, T]; others as they are.

    Whether a mask is additive is told by its shape and dtype, not by its values: an additive mask of a batch without
    padding and a 0/1 mask of nothing but padding are both all zeros.

    Raises:
        ValueError: on the CPU, an additive mask that holds more than 0 and values of -1e4 or below.
    """
    if attention_mask.dim() != 4 or attention_mask.shape[1:3] != (1, 1):
        return attention_mask
    flat = attention_mask[:, 0, 0]
    if not flat.is_floating_point():
        return flat
    valid = flat == 0
    if (
        flat.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not bool((valid | (flat <= _LEFT_OUT)).all())
    ):
        raise ValueError(
            "attention_mask of floats [B, 1, 1, T] is additive and must hold only 0, for a token to pool, and -1e4 or "
            "less, got other values; one of 0 and 1 must be bool, integer or [B, T]"
        )
    return valid


def check_mask(hidden: Tensor, attention_mask: Tensor, packed: bool) -> Tensor:
    """The mask as [B, T], or as [N] when packed."""
    _check_companion("attention_mask", attention_mask, hidden)
    if attention_mask.dtype.is_complex:
        raise TypeError(f"attention_mask must be bool, integer or float, got {attention_mask.dtype}")
    attention_mask = flat_mask(attention_mask)
    tokens = hidden.shape[:-1]
    if packed and attention_mask.shape == (1, *tokens):
        return attention_mask[0]
    if attention_mask.shape != tokens:
        expected = f"[N] = {list(tokens)} with cu_seqlens" if packed else f"[B, T] = {list(tokens)}, or [B, 1, 1, T]"
        raise ValueError(
            f"attention_mask must be {expected} as in hidden_states, got shape {tuple(attention_mask.shape)}"
        )
    return attention_mask


def check_offsets(hidden: Tensor, cu_seqlens: Tensor) -> None:
    _check_companion("cu_seqlens", cu_seqlens, hidden)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be [B + 1], got shape {tuple(cu_seqlens.shape)}")


def _check_companion(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.device != hidden.device or tensor.layout != torch.strided:
        raise ValueError(
            f"{name} must be dense and on the device of hidden_states, {hidden.device}, "
            f"got {tensor.layout} on {tensor.device}"
        )


def check_dims(dims: Sequence[int] | Sequence[Sequence[int]] | None, sizes: Sequence[int]) -> list[list[int]]:
    """One list per exit of so many columns, repeats removed."""
    if dims is None:
        return [[size] for size in sizes]
    if not isinstance(dims, (list, tuple)):
        raise TypeError(f"dims must be a list of ints, or one such list per exit, got {type(dims).__name__}")
    if not dims or not isinstance(dims[0], (list, tuple)):
        return [_check_dims_of_exit(dims, position, size) for position, size in enumerate(sizes)]
    if len(dims) != len(sizes):
        raise ValueError(f"dims must have one list per exit: got {len(dims)} lists for {len(sizes)} exits")
    return [_check_dims_of_exit(dims[position], position, size) for position, size in enumerate(sizes)]


def _check_dims_of_exit(dims: Any, position: int, size: int) -> list[int]:
    if not isinstance(dims, (list, tuple)):
        raise TypeError(f"dims must be all ints or all lists of ints, got {dims!r} for exit {position}")
    if not dims:
        raise ValueError(f"dims must name at least one dim for exit {position}, got none")
    for dim in dims:
        if type(dim) is not int and not isinstance(dim, torch.SymInt):
            raise TypeError(f"dims must be ints, got {dim!r} for exit {position}")
        if not 1 <= dim <= size:
            raise ValueError(f"dims of exit {position} must lie between 1 and its size {size}, got {dim}")
    return list(dict.fromkeys(dims))


def check_out_dtype(out_dtype: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    if out_dtype is None or out_dtype == dtype:
        return dtype
    if out_dtype not in FLOATS and out_dtype not in CODES:
        raise TypeError(f"out_dtype must be float32, bfloat16, float16, float64, int8 or uint8, got {out_dtype}")
    if out_dtype == torch.float64:
        raise TypeError(f"out_dtype float64 needs float64 hidden_states, got {dtype}: sums are float32 below that")
    return out_dtype


def select_tokens(
    hidden: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ranges: Tensor | None,
    positions: Tensor | None,
) -> Tensor:
    """The mask of the tokens that are valid, inside the ranges and among the positions; [B, T], or [N] when packed.

    Raises:
        TypeError, ValueError: ranges or positions of a wrong dtype or shape; on the CPU also of wrong values.
    """
    if hidden.device.type == "cpu":
        check_values(attention_mask, cu_seqlens, hidden.shape)
    sequences = hidden.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tokens = hidden.shape[-2]
    if cu_seqlens is None:
        sequence = torch.arange(sequences, device=hidden.device)[:, None]
        starts = torch.zeros_like(sequence)[:, 0]
        lengths = torch.full_like(starts, tokens)
    else:
        offsets = cu_seqlens.long()
        starts, lengths = offsets[:-1], offsets.diff()
        sequence = torch.searchsorted(offsets[1:], torch.arange(tokens, device=hidden.device), right=True)
        sequence = sequence.clamp(max=sequences - 1)  # of offsets that no one has checked, on a GPU
    selected = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
    if attention_mask is not None:
        selected &= attention_mask.bool()
    if ranges is not None:
        _check_per_sequence("ranges", ranges, hidden, sequences, "[B, 2]")
        begin, end = ranges.long().unbind(1)
        if ranges.device.type == "cpu" and not bool(((begin >= 0) & (begin <= end) & (end <= lengths)).all()):
            raise ValueError(
                "ranges must hold a start and an end per sequence, 0 <= start <= end <= its length, got others"
            )
        position = torch.arange(tokens, device=hidden.device)
        if cu_seqlens is not None:
            position = position - starts[sequence]
        selected &= (position >= begin[sequence]) & (position < end[sequence])
    if positions is not None:
        _check_per_sequence("positions", positions, hidden, sequences, "[B, P]")
        positions = positions.long()
        if positions.device.type == "cpu" and not bool(((positions >= -1) & (positions < lengths[:, None])).all()):
            raise ValueError("positions must lie inside their sequence, or be -1 for none, got others")
        inside = (positions >= 0) & (positions < lengths[:, None])
        base = starts if cu_seqlens is not None else torch.arange(sequences, device=hidden.device) * tokens
        wanted = torch.where(inside, positions + base[:, None], selected.numel())
        listed = selected.new_zeros(selected.numel() + 1).index_fill(0, wanted.flatten(), True)
        selected &= listed[:-1].view_as(selected)
    return selected


def _check_per_sequence(name: str, tensor: Tensor, hidden: Tensor, sequences: int, shape: str) -> None:
    _check_companion(name, tensor, hidden)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
    if tensor.dim() != 2 or tensor.shape[0] != sequences or (name == "ranges" and tensor.shape[1] != 2):
        raise ValueError(f"{name} must be {shape} with B = {sequences}, got shape {tuple(tensor.shape)}")
