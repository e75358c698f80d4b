"""Multi-exit pooling: checks, schema, fake kernel, autograd and backend choice."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._native import core, num_threads
from ..reference import pooling as reference
from ._cuda import current_stream
from ._registry import Op

MODES = ("mean", "cls", "lasttoken", "max", "mean_sqrt_len", "weightedmean")

_KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_DTYPES = _KERNEL_DTYPES | {torch.float64}


def pool_exits(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    mode: str = "mean",
    dims: Sequence[int] | Sequence[Sequence[int]] | None = None,
    normalize: bool = True,
    out_dtype: torch.dtype | None = None,
) -> list[dict[int, Tensor]]:
    """Pool the hidden states of several exits (layers) into sentence embeddings of several Matryoshka dims at once.

    Every exit is read once, and of it only the valid tokens and the columns that its largest dim needs; all dims of
    an exit come from that one pass. Sums, norms and divisions are in float32 whatever the input (float64 for float64)
    and rounded once at the end. Differentiable.

    Args:
        hidden_states: one tensor per exit, padded [B, T, D], or packed [N, D] or [1, N, D] with `cu_seqlens`. The
            exits share B and T (or N), dtype (float32, bfloat16, float16 or float64) and device; D may differ. Strided
            tensors are read in place as long as the last axis has stride 1.
        attention_mask: [B, T] of any bool, integer or float dtype, 1 for a valid token and 0 for padding, which may
            stand anywhere: left, right or in between. None: every token is valid. What a padding position holds never
            matters, NaN included.
        cu_seqlens: int32 or int64 [B + 1], the offsets of packed sequences: sequence b is the tokens cu_seqlens[b]
            up to cu_seqlens[b + 1].
        mode: over the valid tokens of a sequence, as sentence-transformers names them: "mean"; "cls", the first;
            "lasttoken", the last; "max", per feature (a NaN stays NaN); "mean_sqrt_len", the sum over the square root
            of their number; "weightedmean", weights 1, 2, 3, ... counted from the first valid position.
        dims: the prefixes of the pooled vector to return, one list of ints for all exits or one list per exit. None:
            the whole vector, D.
        normalize: L2-normalize each prefix: divide by max(its norm, 1e-12). Truncation comes first.
        out_dtype: dtype of the embeddings, by default that of the hidden states. float64 needs float64 hidden states.

    Returns:
        One dict per exit: dim -> [B, dim], in the order of `dims`. A sequence without valid tokens gives zeros.

    Raises:
        TypeError: a wrong dtype, or something that is no tensor.
        ValueError: shapes that do not match, an unknown mode, a dim outside 1..D, a mask with values other than 0 and
            1, offsets that do not rise from 0 to N.

    Sources: Matryoshka representations, arXiv 2205.13147; exits by layer and dim, arXiv 2402.14776 (2D Matryoshka) and
    arXiv 2410.13230 (Starbucks); weightedmean, arXiv 2202.08904 (SGPT).
    """
    exits = _check_hidden_states(hidden_states, cu_seqlens)
    _check_tokens(exits[0], attention_mask, cu_seqlens)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    exit_dims = _check_dims(dims, exits)
    out_dtype = _check_out_dtype(out_dtype, exits[0].dtype)
    flat_dims = [dim for dims_of_exit in exit_dims for dim in dims_of_exit]
    dims_per_exit = [len(dims_of_exit) for dims_of_exit in exit_dims]
    outputs = _pool_exits(exits, attention_mask, cu_seqlens, mode, flat_dims, dims_per_exit, bool(normalize), out_dtype)
    remaining = iter(outputs)
    return [{dim: next(remaining) for dim in dims_of_exit} for dims_of_exit in exit_dims]


def _check_hidden_states(hidden_states: Sequence[Tensor], cu_seqlens: Tensor | None) -> list[Tensor]:
    """The exits as [B, T, D], or as [N, D] when packed."""
    if not isinstance(hidden_states, (list, tuple)):
        raise TypeError(f"hidden_states must be a list of tensors, one per exit, got {type(hidden_states).__name__}")
    if not hidden_states:
        raise ValueError("hidden_states must hold at least one exit, got an empty list")
    exits = [_check_exit(hidden, position, cu_seqlens is not None) for position, hidden in enumerate(hidden_states)]
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
    if hidden.dtype not in _DTYPES or hidden.layout != torch.strided:
        raise TypeError(
            f"hidden_states[{position}] must be dense float32, bfloat16, float16 or float64, "
            f"got {hidden.dtype} {hidden.layout}"
        )
    rank = hidden.dim()
    if packed and rank == 3 and hidden.shape[0] == 1:
        return hidden[0]
    if rank != (2 if packed else 3):
        expected = (
            "[N, D] or [1, N, D] when cu_seqlens is given" if packed else "[B, T, D] (or packed, with cu_seqlens)"
        )
        raise ValueError(f"hidden_states[{position}] must be {expected}, got shape {tuple(hidden.shape)}")
    return hidden


def _check_tokens(hidden: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError("attention_mask must be None when cu_seqlens is given: packed tokens have no padding")
        _check_companion("cu_seqlens", cu_seqlens, hidden)
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"cu_seqlens must be [B + 1], got shape {tuple(cu_seqlens.shape)}")
    elif attention_mask is not None:
        _check_companion("attention_mask", attention_mask, hidden)
        if attention_mask.dtype.is_complex:
            raise TypeError(f"attention_mask must be bool, integer or float, got {attention_mask.dtype}")
        if attention_mask.shape != hidden.shape[:2]:
            raise ValueError(
                f"attention_mask must be [B, T] = {list(hidden.shape[:2])} as in hidden_states, "
                f"got shape {tuple(attention_mask.shape)}"
            )


def _check_companion(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.device != hidden.device or tensor.layout != torch.strided:
        raise ValueError(
            f"{name} must be dense and on the device of hidden_states, {hidden.device}, "
            f"got {tensor.layout} on {tensor.device}"
        )


def _check_dims(dims: Sequence[int] | Sequence[Sequence[int]] | None, exits: list[Tensor]) -> list[list[int]]:
    """One list per exit, repeats removed."""
    if dims is None:
        return [_check_dims_of_exit([hidden.shape[-1]], position, hidden) for position, hidden in enumerate(exits)]
    if not isinstance(dims, (list, tuple)):
        raise TypeError(f"dims must be a list of ints, or one such list per exit, got {type(dims).__name__}")
    if not dims or not isinstance(dims[0], (list, tuple)):
        return [_check_dims_of_exit(dims, position, hidden) for position, hidden in enumerate(exits)]
    if len(dims) != len(exits):
        raise ValueError(f"dims must have one list per exit: got {len(dims)} lists for {len(exits)} exits")
    return [_check_dims_of_exit(dims[position], position, hidden) for position, hidden in enumerate(exits)]


def _check_dims_of_exit(dims: Any, position: int, hidden: Tensor) -> list[int]:
    if not isinstance(dims, (list, tuple)):
        raise TypeError(f"dims must be all ints or all lists of ints, got {dims!r} for exit {position}")
    if not dims:
        raise ValueError(f"dims must name at least one dim for exit {position}, got none")
    size = hidden.shape[-1]
    for dim in dims:
        if not isinstance(dim, (int, torch.SymInt)) or isinstance(dim, bool):
            raise TypeError(f"dims must be ints, got {dim!r} for exit {position}")
        if not 1 <= dim <= size:
            raise ValueError(f"dims of exit {position} must lie between 1 and its hidden size {size}, got {dim}")
    return list(dict.fromkeys(dims))


def _check_out_dtype(out_dtype: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    if out_dtype is None:
        return dtype
    if out_dtype not in _DTYPES:
        raise TypeError(f"out_dtype must be float32, bfloat16, float16 or float64, got {out_dtype}")
    if out_dtype == torch.float64 and dtype != torch.float64:
        raise TypeError(f"out_dtype float64 needs float64 hidden_states, got {dtype}: sums are float32 below that")
    return out_dtype


def _by_exit(dims: list[int], dims_per_exit: list[int]) -> list[list[int]]:
    nested = []
    begin = 0
    for count in dims_per_exit:
        nested.append(dims[begin : begin + count])
        begin += count
    return nested


def _implementation(pool: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """A backend's function, which takes dims as a list per exit, in the schema's terms, which knows only flat lists."""

    def run(
        hidden_states: list[Tensor],
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        mode: str,
        dims: list[int],
        dims_per_exit: list[int],
        normalize: bool,
        out_dtype: torch.dtype,
    ) -> list[Tensor]:
        nested = _by_exit(dims, dims_per_exit)
        return pool(hidden_states, attention_mask, cu_seqlens, mode, nested, normalize, out_dtype)

    return run


_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/common/dtype.hpp

# How csrc/pooling reads a mask of any dtype: the element's size, its bits for 1, and its bits for -0.0.
_MASK_BITS = {
    **dict.fromkeys((torch.bool, torch.uint8, torch.int8), (1, 1, 0)),
    torch.int16: (2, 1, 0),
    torch.int32: (4, 1, 0),
    torch.int64: (8, 1, 0),
    torch.float16: (2, 0x3C00, 0x8000),
    torch.bfloat16: (2, 0x3F80, 0x8000),
    torch.float32: (4, 0x3F80_0000, 0x8000_0000),
    torch.float64: (8, 0x3FF0_0000_0000_0000, 0x8000_0000_0000_0000),
}


def _pool_exits_cpu(
    hidden_states: list[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    mode: str,
    dims: list[list[int]],
    normalize: bool,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    call = _NativeCall(hidden_states, attention_mask, cu_seqlens, mode, dims, normalize, out_dtype)
    core.pool_exits(*call.arguments, num_threads())
    return call.outputs


def _pool_exits_cuda(
    hidden_states: list[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    mode: str,
    dims: list[list[int]],
    normalize: bool,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    call = _NativeCall(hidden_states, attention_mask, cu_seqlens, mode, dims, normalize, out_dtype)
    _, sequences, tokens, *_ = call.arguments
    first = hidden_states[0]
    cuda = _native.cuda
    assert cuda is not None, "the backend is chosen only where it is available"
    floats = cuda.pool_exits_workspace(
        len(hidden_states), max(map(max, dims)), sequences, tokens, cu_seqlens is not None
    )
    with current_stream(first.device) as stream:
        workspace = first.new_empty(floats, dtype=torch.float32)
        cuda.pool_exits(*call.arguments, workspace.data_ptr(), stream)
    return call.outputs


class _NativeCall:
    """The outputs of a call and the arguments that both compiled modules take (csrc/pooling/arguments.hpp).

    Keeps what the arguments point to alive.
    """

    def __init__(
        self,
        hidden_states: list[Tensor],
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        mode: str,
        dims: list[list[int]],
        normalize: bool,
        out_dtype: torch.dtype,
    ) -> None:
        first = hidden_states[0]
        mask = offsets = None
        if cu_seqlens is not None:
            sequences, tokens = cu_seqlens.shape[0] - 1, first.shape[0]
            offsets = (cu_seqlens.data_ptr(), cu_seqlens.stride(0), cu_seqlens.dtype == torch.int64)
        else:
            sequences, tokens, _ = first.shape
            if attention_mask is not None:
                if attention_mask.dtype not in _MASK_BITS:
                    attention_mask = attention_mask.to(torch.float32)
                size, one, negative_zero = _MASK_BITS[attention_mask.dtype]
                row_stride, token_stride = attention_mask.stride()
                mask = (attention_mask.data_ptr(), row_stride, token_stride, size, one, negative_zero)
        readable = [_with_contiguous_features(hidden) for hidden in hidden_states]
        self._alive = (readable, attention_mask)
        self.outputs: list[Tensor] = []
        exits = []
        for hidden, exit_dims in zip(readable, dims, strict=True):
            prefixes = []
            for dim in exit_dims:
                output = first.new_empty((sequences, dim), dtype=out_dtype)
                self.outputs.append(output)
                prefixes.append((dim, output.data_ptr()))
            sequence_stride = 0 if cu_seqlens is not None else hidden.stride(0)
            exits.append((hidden.data_ptr(), sequence_stride, hidden.stride(-2), prefixes))
        self.arguments = (
            exits,
            sequences,
            tokens,
            mask,
            offsets,
            MODES.index(mode),
            _DTYPE_CODES[first.dtype],
            _DTYPE_CODES[out_dtype],
            normalize,
        )


def _with_contiguous_features(hidden: Tensor) -> Tensor:
    hidden = hidden.resolve_neg()
    return hidden if hidden.stride(-1) == 1 else hidden.contiguous()


def _backward_reference(
    hidden_states: list[Tensor],
    grads: list[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    mode: str,
    dims: list[int],
    dims_per_exit: list[int],
    normalize: bool,
) -> list[Tensor]:
    nested = _by_exit(dims, dims_per_exit)
    return reference.pool_exits_backward(hidden_states, grads, attention_mask, cu_seqlens, mode, nested, normalize)


def _fake(
    hidden_states: list[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    mode: str,
    dims: list[int],
    dims_per_exit: list[int],
    normalize: bool,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    batch = hidden_states[0].shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return [hidden_states[0].new_empty((batch, dim), dtype=out_dtype) for dim in dims]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden_states, attention_mask, cu_seqlens, *ctx.options, _ = inputs
    ctx.save_for_backward(attention_mask, cu_seqlens, *hidden_states)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    attention_mask, cu_seqlens, *hidden_states = ctx.saved_tensors
    grad_hidden = _pool_exits_backward(hidden_states, list(grads), attention_mask, cu_seqlens, *ctx.options)
    return (grad_hidden, None, None, None, None, None, None, None)


def _pool_exits_triton(*args: Any) -> list[Tensor]:
    """Imports Triton at the first call: it is optional, and slow to import."""
    from ..triton_kernels import pooling

    return pooling.pool_exits(*args)


# Every implementation takes (hidden_states, attention_mask, cu_seqlens, mode, dims per exit, normalize, out_dtype),
# shapes and dtypes already checked, values not, and returns [B, dim] tensors exit by exit.
_pool_exits = Op(
    "pool_exits(Tensor[] hidden_states, Tensor? attention_mask, Tensor? cu_seqlens, str mode, int[] dims, "
    "int[] dims_per_exit, bool normalize, ScalarType out_dtype) -> Tensor[]",
    implementations={
        "reference": _implementation(reference.pool_exits),
        "cpu": _implementation(_pool_exits_cpu),
        "cuda": _implementation(_pool_exits_cuda),
        "triton": _implementation(_pool_exits_triton),
    },
    fake=_fake,
    accepts={"cpu": _KERNEL_DTYPES, "cuda": _KERNEL_DTYPES, "triton": _KERNEL_DTYPES},
    backward=_backward,
    setup_context=_setup_context,
)

_pool_exits_backward = Op(
    "pool_exits_backward(Tensor[] hidden_states, Tensor[] grads, Tensor? attention_mask, Tensor? cu_seqlens, "
    "str mode, int[] dims, int[] dims_per_exit, bool normalize) -> Tensor[]",
    implementations={"reference": _backward_reference},
    fake=lambda hidden_states, *_: [hidden.new_empty(hidden.shape) for hidden in hidden_states],
)
