"""Multi-exit pooling: the public function, schema, fake kernels, autograd and backend choice."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._native import core, num_threads
from ..reference import pooling as reference
from . import _pooling_checks as checks
from ._cuda import current_stream
from ._dtypes import DTYPE_CODES
from ._pooling_checks import MODES
from ._registry import Op

__all__ = ["MODES", "finish_pooled", "pool_exits"]

_KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def pool_exits(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    ranges: Tensor | None = None,
    positions: Tensor | None = None,
    mode: str | Sequence[str] = "mean",
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
        attention_mask: [B, T], or [N] of packed tokens, of any bool, integer or float dtype, 1 for a valid token and 0
            for one to leave out, which may stand anywhere: left, right or in between. None: every token is valid. What
            a token that is left out holds never matters, NaN included. Also as attention layers take it, [B, 1, 1, T]:
            bool or integer, 1 for a valid token; or float, which is additive: 0 for a valid token and -1e4 or less,
            such as -inf or `torch.finfo(dtype).min`, for one to leave out.
        cu_seqlens: int32 or int64 [B + 1], the offsets of packed sequences: sequence b is the tokens cu_seqlens[b]
            up to cu_seqlens[b + 1].
        ranges: int32 or int64 [B, 2]. Only tokens start <= t < end of each sequence count, of those that are valid; t
            counts from the first token of the sequence, or of its row, padding included.
        positions: int32 or int64 [B, P], lists of the only tokens that count, of those that are valid, in any order;
            t as above, -1 to fill up shorter lists. What is not listed is not read.
        mode: over the valid tokens of a sequence, as sentence-transformers names them: "mean"; "cls", the first;
            "lasttoken", the last; "max", per feature (a NaN stays NaN); "mean_sqrt_len", the sum over the square root
            of their number; "weightedmean", weights 1, 2, 3, ... counted from the first valid position. Several modes:
            their vectors one after the other, as one vector of len(mode) * D.
        dims: the prefixes of the pooled vector to return, one list of ints for all exits or one list per exit. None:
            the whole vector.
        normalize: L2-normalize each prefix: divide by max(its norm, 1e-12). Truncation comes first.
        out_dtype: dtype of the embeddings, by default that of the hidden states. float64 needs float64 hidden states.
            int8: each prefix times 127 over its largest magnitude, rounded, which leaves cosines as they are; zeros
            where that is zero or not finite. uint8: packed bits, one per component, as `fastembed.pack_bits` makes
            them. Neither is differentiable, and `normalize` makes no difference to them.

    Returns:
        One dict per exit: dim -> [B, dim] (packed bits: [B, ceil(dim / 8)]), in the order of `dims`. A sequence without
        valid tokens gives zeros.

    Raises:
        TypeError: a wrong dtype, or something that is no tensor.
        ValueError: shapes that do not match, an unknown mode, a dim outside 1..D, and on the CPU, where looking at
            values costs nothing, a mask with values other than these, offsets that do not rise from 0 to N, ranges
            or positions outside their sequence.

    Sources: Matryoshka representations, arXiv 2205.13147; exits by layer and dim, arXiv 2402.14776 (2D Matryoshka) and
    arXiv 2410.13230 (Starbucks); weightedmean, arXiv 2202.08904 (SGPT); ranges, arXiv 2503.03008
    (ModularStarEncoder pools from a separator on); positions, arXiv 2601.21525 (landmark pooling).
    """
    packed = cu_seqlens is not None
    exits = checks.check_hidden_states(hidden_states, packed)
    first = exits[0]
    if cu_seqlens is not None:
        checks.check_offsets(first, cu_seqlens)
    if attention_mask is not None:
        attention_mask = checks.check_mask(first, attention_mask, packed)
    if ranges is not None or positions is not None:
        attention_mask = checks.select_tokens(first, attention_mask, cu_seqlens, ranges, positions)
    out_dtype = checks.check_out_dtype(out_dtype, first.dtype)
    if not isinstance(mode, str):
        return _concatenated(exits, attention_mask, cu_seqlens, mode, dims, normalize, out_dtype)
    checks.check_mode(mode)
    exit_dims = checks.check_dims(dims, [hidden.shape[-1] for hidden in exits])
    flat_dims = [dim for dims_of_exit in exit_dims for dim in dims_of_exit]
    dims_per_exit = [len(dims_of_exit) for dims_of_exit in exit_dims]
    if out_dtype in checks.CODES:
        exits = [hidden.detach() for hidden in exits]
    keep_state = torch.is_grad_enabled() and any(hidden.requires_grad for hidden in exits)
    outputs = _pool_exits(
        exits, attention_mask, cu_seqlens, mode, flat_dims, dims_per_exit, bool(normalize), out_dtype, keep_state
    )
    remaining = iter(outputs)
    return [{dim: next(remaining) for dim in dims_of_exit} for dims_of_exit in exit_dims]


def finish_pooled(
    pooled: Sequence[Tensor],
    dims: Sequence[int] | Sequence[Sequence[int]] | None = None,
    normalize: bool = True,
    out_dtype: torch.dtype | None = None,
) -> list[dict[int, Tensor]]:
    """Truncate, normalise and convert vectors [B, D] that were pooled already, as `pool_exits` does at its end."""
    tokens = [vectors[:, None] for vectors in pooled]  # pooling one token per sequence leaves it as it is
    return pool_exits(tokens, mode="cls", dims=dims, normalize=normalize, out_dtype=out_dtype)


def _concatenated(
    exits: list[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    modes: Sequence[str],
    dims: Sequence[int] | Sequence[Sequence[int]] | None,
    normalize: bool,
    out_dtype: torch.dtype,
) -> list[dict[int, Tensor]]:
    """Several modes side by side, as sentence-transformers' Pooling does it; where gradients are wanted one by one."""
    modes = checks.check_modes(modes)
    sizes = [len(modes) * hidden.shape[-1] for hidden in exits]
    exit_dims = checks.check_dims(dims, sizes)
    if out_dtype in checks.CODES:
        exits = [hidden.detach() for hidden in exits]
    if not (torch.is_grad_enabled() and any(hidden.requires_grad for hidden in exits)):
        flat_dims = [dim for dims_of_exit in exit_dims for dim in dims_of_exit]
        dims_per_exit = [len(dims_of_exit) for dims_of_exit in exit_dims]
        remaining = iter(
            _pool_modes(
                exits, attention_mask, cu_seqlens, list(modes), flat_dims, dims_per_exit, bool(normalize), out_dtype
            )
        )
        return [{dim: next(remaining) for dim in dims_of_exit} for dims_of_exit in exit_dims]
    accumulated = torch.promote_types(exits[0].dtype, torch.float32)
    parts = [
        pool_exits(exits, attention_mask, cu_seqlens=cu_seqlens, mode=mode, normalize=False, out_dtype=accumulated)
        for mode in modes
    ]
    pooled = [
        torch.cat([vectors for of_mode in parts for vectors in of_mode[i].values()], 1) for i in range(len(exits))
    ]
    return finish_pooled(pooled, exit_dims, normalize, out_dtype)


def _by_exit(dims: list[int], dims_per_exit: list[int]) -> list[list[int]]:
    nested = []
    begin = 0
    for count in dims_per_exit:
        nested.append(dims[begin : begin + count])
        begin += count
    return nested


def _nested(run: Callable[..., list[Tensor]], at: int = 4) -> Callable[..., list[Tensor]]:
    """A backend's function, which takes dims as a list per exit, in the schema's terms, which knows only flat lists:
    argument `at` holds the dims of all exits, the next one how many each has."""
    return lambda *args: run(*args[:at], _by_exit(args[at], args[at + 1]), *args[at + 2 :])


_MODE_CODES = {mode: code for code, mode in enumerate(MODES)}  # Mode in csrc/pooling/pooling.hpp

_OUTPUT_CODES = {**DTYPE_CODES, torch.int8: 3, torch.uint8: 4}  # OutputType in csrc/pooling/kernels.hpp

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


def _pool_exits_cpu(*arguments: Any) -> list[Tensor]:
    *of_call, keep_state = arguments
    call = _NativeCall(*of_call)
    state, states = call.empty_state() if keep_state else ([], [])
    core.pool_exits(*(*call.arguments, states, num_threads()))
    return [*call.outputs, *state]


def _pool_modes_cpu(*arguments: Any) -> list[Tensor]:
    call = _NativeCall(*arguments)
    sizes = [hidden.shape[-1] for hidden in call.hidden_states]
    core.pool_modes(*(*call.arguments, sizes, num_threads()))
    return call.outputs


def _mode_by_mode(pool: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """A GPU backend's function for one mode, called for each, with truncation and what follows in PyTorch."""

    def run(
        hidden_states: list[Tensor],
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        modes: list[str],
        dims: list[list[int]],
        normalize: bool,
        out_dtype: torch.dtype,
    ) -> list[Tensor]:
        whole = [[hidden.shape[-1]] for hidden in hidden_states]
        batch = hidden_states, attention_mask, cu_seqlens
        by_mode = [pool(*batch, mode, whole, False, torch.float32, False) for mode in modes]
        return [
            output
            for parts, exit_dims in zip(zip(*by_mode, strict=True), dims, strict=True)
            for output in reference.write_prefixes(torch.cat(parts, dim=1), exit_dims, normalize, out_dtype)
        ]

    return run


def _states(pooled: list[Tensor], winners: list[Tensor]) -> list[tuple[int, int]]:
    return [(vectors.data_ptr(), winners[i].data_ptr() if winners else 0) for i, vectors in enumerate(pooled)]


def _pool_exits_cuda(*arguments: Any) -> list[Tensor]:
    *of_call, keep_state = arguments
    call = _NativeCall(*of_call)
    first = call.hidden_states[0]
    cuda = _native.cuda
    assert cuda is not None, "the backend is chosen only where it is available"
    widest = max(map(max, call.dims))
    floats = cuda.pool_exits_workspace(len(call.dims), widest, call.sequences, call.tokens, call.packed)
    state, states = call.empty_state() if keep_state else ([], [])
    with current_stream(first.device) as stream:
        workspace = first.new_empty(floats, dtype=torch.float32)
        cuda.pool_exits(*call.arguments, states, workspace.data_ptr(), stream)
    return [*call.outputs, *state]


def _native_batch(attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Any, Any, Any]:
    """Mask and offsets as both compiled modules take them (csrc/pooling/arguments.hpp), and what they point to."""
    mask = offsets = None
    if cu_seqlens is not None:
        offsets = (cu_seqlens.data_ptr(), cu_seqlens.stride(0), cu_seqlens.dtype == torch.int64)
    if attention_mask is not None:
        if attention_mask.dtype not in _MASK_BITS:
            attention_mask = attention_mask.to(torch.float32)
        size, one, negative_zero = _MASK_BITS[attention_mask.dtype]
        row_stride, token_stride = (0, *attention_mask.stride())[-2:]
        mask = (attention_mask.data_ptr(), row_stride, token_stride, size, one, negative_zero)
    return mask, offsets, (attention_mask, cu_seqlens)


class _NativeCall:
    """The outputs of a call and the arguments that both compiled modules take.

    Keeps what the arguments point to alive.
    """

    def __init__(
        self,
        hidden_states: list[Tensor],
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        mode: str | list[str],
        dims: list[list[int]],
        normalize: bool,
        out_dtype: torch.dtype,
    ) -> None:
        first = hidden_states[0]
        device, dtype = first.device, first.dtype
        if cu_seqlens is None:
            sequences, tokens, _ = first.shape
        else:
            sequences, tokens = cu_seqlens.shape[0] - 1, first.shape[0]
        mask, offsets, companions = _native_batch(attention_mask, cu_seqlens)
        self.hidden_states, self.mode, self.dims = hidden_states, mode, dims
        self.sequences, self.tokens, self.packed = sequences, tokens, cu_seqlens is not None
        self._alive: list[Any] = [companions]
        self.outputs: list[Tensor] = []
        exits = []
        for hidden, exit_dims in zip(hidden_states, dims, strict=True):
            if hidden.stride(-1) != 1 or hidden.is_neg():
                hidden = hidden.resolve_neg().contiguous()
            self._alive.append(hidden)
            prefixes = []
            for dim in exit_dims:
                output = torch.empty((sequences, output_columns(dim, out_dtype)), dtype=out_dtype, device=device)
                self.outputs.append(output)
                prefixes.append((dim, output.data_ptr()))
            strides = hidden.stride()
            exits.append((hidden.data_ptr(), 0 if cu_seqlens is not None else strides[0], strides[-2], prefixes))
        self.arguments: tuple[Any, ...] = (
            exits,
            sequences,
            tokens,
            mask,
            offsets,
            _MODE_CODES[mode] if isinstance(mode, str) else [_MODE_CODES[one] for one in mode],
            DTYPE_CODES[dtype],
            _OUTPUT_CODES[out_dtype],
            normalize,
        )

    def empty_state(self) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """Tensors for what the backward needs, and their addresses as both compiled modules take them."""
        first = self.hidden_states[0]
        shapes = [(self.sequences, max(exit_dims)) for exit_dims in self.dims]
        pooled = [first.new_empty(shape, dtype=torch.float32) for shape in shapes]
        winners = [first.new_empty(shape, dtype=torch.int32) for shape in shapes] if self.mode == "max" else []
        return [*pooled, *winners], _states(pooled, winners)


def output_columns(dim: int, out_dtype: torch.dtype) -> int:
    """Elements of an embedding of so many dims: packed bits are eight to one."""
    return (dim + 7) // 8 if out_dtype == torch.uint8 else dim


def _backward_cpu(*arguments: Any) -> list[Tensor]:
    call = _NativeBackward(*arguments)
    core.pool_exits_backward(*call.arguments, num_threads())
    return call.results


def _backward_cuda(*arguments: Any) -> list[Tensor]:
    call = _NativeBackward(*arguments)
    if call.sequences == 0:
        return [result.zero_() for result in call.results]
    cuda = _native.cuda
    assert cuda is not None, "the backend is chosen only where it is available"
    device = call.results[0].device
    floats = cuda.pool_exits_backward_workspace(sum(map(max, call.dims)), call.sequences)
    with current_stream(device) as stream:
        workspace = torch.empty(floats, dtype=torch.float32, device=device)
        cuda.pool_exits_backward(*call.arguments, workspace.data_ptr(), stream)
    return call.results


class _NativeBackward:
    """The gradients that a backward fills and the arguments that both compiled modules take.

    Keeps what the arguments point to alive.
    """

    def __init__(
        self,
        state: list[Tensor],
        grads: list[Tensor],
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        tokens: int,
        sizes: list[int],
        dtype: torch.dtype,
        mode: str,
        dims: list[list[int]],
        normalize: bool,
    ) -> None:
        self.dims, self.sequences = dims, len(state[0])
        mask, offsets, companions = _native_batch(attention_mask, cu_seqlens)
        grads = [grad.resolve_neg().contiguous() for grad in grads]
        self._alive = [companions, grads]
        self.results = _empty_gradients(state, cu_seqlens, tokens, sizes, dtype)
        addresses = iter([grad.data_ptr() for grad in grads])
        states = _states(state[: len(sizes)], state[len(sizes) :])
        exits = [
            (result.data_ptr(), size, of_exit, [(dim, next(addresses)) for dim in exit_dims])
            for result, size, of_exit, exit_dims in zip(self.results, sizes, states, dims, strict=True)
        ]
        self.arguments = (
            exits,
            self.sequences,
            tokens,
            mask,
            offsets,
            _MODE_CODES[mode],
            DTYPE_CODES[dtype],
            DTYPE_CODES[grads[0].dtype],
            normalize,
        )


def _empty_gradients(
    state: list[Tensor], cu_seqlens: Tensor | None, tokens: int, sizes: Iterable[int], dtype: torch.dtype
) -> list[Tensor]:
    leading = (state[0].shape[0], tokens) if cu_seqlens is None else (tokens,)
    return [state[0].new_empty((*leading, size), dtype=dtype) for size in sizes]


def _fake(
    hidden_states: list[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    mode: str,
    dims: list[int],
    dims_per_exit: list[int],
    normalize: bool,
    out_dtype: torch.dtype,
    keep_state: bool,
) -> list[Tensor]:
    first = hidden_states[0]
    batch = first.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    outputs = [first.new_empty((batch, output_columns(dim, out_dtype)), dtype=out_dtype) for dim in dims]
    if not keep_state:
        return outputs
    shapes = [(batch, max(exit_dims)) for exit_dims in _by_exit(dims, dims_per_exit)]
    accumulated = torch.promote_types(first.dtype, torch.float32)
    outputs += [first.new_empty(shape, dtype=accumulated) for shape in shapes]
    return outputs + ([first.new_empty(shape, dtype=torch.int32) for shape in shapes] if mode == "max" else [])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden_states, attention_mask, cu_seqlens, mode, dims, dims_per_exit, normalize, _, ctx.keep_state = inputs
    ctx.sizes = [hidden.shape[-1] for hidden in hidden_states]
    ctx.tokens, ctx.dtype = hidden_states[0].shape[-2], hidden_states[0].dtype
    ctx.options = mode, dims, dims_per_exit, normalize
    ctx.save_for_backward(attention_mask, cu_seqlens, *output[len(dims) :])


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    if not ctx.keep_state:
        raise RuntimeError("fastembed::pool_exits keeps what its backward needs only with keep_state=True")
    attention_mask, cu_seqlens, *state = ctx.saved_tensors
    outputs = len(ctx.options[1])
    grad_hidden = _pool_exits_backward(
        state, list(grads[:outputs]), attention_mask, cu_seqlens, ctx.tokens, ctx.sizes, ctx.dtype, *ctx.options
    )
    return (grad_hidden, *[None] * 8)


def _pool_exits_triton(*args: Any) -> list[Tensor]:
    """Imports Triton at the first call: it is optional, and slow to import."""
    from ..triton_kernels import pooling

    return pooling.pool_exits(*args)


def _backward_triton(*args: Any) -> list[Tensor]:
    from ..triton_kernels import pooling_backward

    return pooling_backward.pool_exits_backward(*args)


# Every implementation takes (hidden_states, attention_mask, cu_seqlens, mode, dims per exit, normalize, out_dtype,
# keep_state), shapes and dtypes already checked, values not, and returns [B, dim] tensors exit by exit, followed with
# keep_state by what the backward needs (see reference.pool_exits).
_pool_exits = Op(
    "pool_exits(Tensor[] hidden_states, Tensor? attention_mask, Tensor? cu_seqlens, str mode, int[] dims, "
    "int[] dims_per_exit, bool normalize, ScalarType out_dtype, bool keep_state) -> Tensor[]",
    implementations={
        "reference": _nested(reference.pool_exits),
        "cpu": _nested(_pool_exits_cpu),
        "cuda": _nested(_pool_exits_cuda),
        "triton": _nested(_pool_exits_triton),
    },
    fake=_fake,
    accepts={"cpu": _KERNEL_DTYPES, "cuda": _KERNEL_DTYPES, "triton": _KERNEL_DTYPES},
    backward=_backward,
    setup_context=_setup_context,
)

# As pool_exits for several modes side by side, without gradients.
_pool_modes = Op(
    "pool_modes(Tensor[] hidden_states, Tensor? attention_mask, Tensor? cu_seqlens, str[] modes, int[] dims, "
    "int[] dims_per_exit, bool normalize, ScalarType out_dtype) -> Tensor[]",
    implementations={
        "reference": _nested(reference.pool_modes),
        "cpu": _nested(_pool_modes_cpu),
        "cuda": _nested(_mode_by_mode(_pool_exits_cuda)),
        "triton": _nested(_mode_by_mode(_pool_exits_triton)),
    },
    fake=lambda hidden, mask, cu_seqlens, modes, dims, dims_per_exit, normalize, out_dtype: _fake(
        hidden, mask, cu_seqlens, modes[0], dims, dims_per_exit, normalize, out_dtype, False
    ),
    accepts={"cpu": _KERNEL_DTYPES, "cuda": _KERNEL_DTYPES, "triton": _KERNEL_DTYPES},
)

# From the state that pool_exits kept and the gradients of its outputs to those of the hidden states: per exit
# [B, tokens, size] or packed [tokens, size], contiguous, in `dtype`. The state comes first: its dtype is that of the
# computation, which decides the backend.
_pool_exits_backward = Op(
    "pool_exits_backward(Tensor[] state, Tensor[] grads, Tensor? attention_mask, Tensor? cu_seqlens, SymInt tokens, "
    "SymInt[] sizes, ScalarType dtype, str mode, int[] dims, int[] dims_per_exit, bool normalize) -> Tensor[]",
    implementations={
        "reference": _nested(reference.pool_exits_backward, at=8),
        "cpu": _nested(_backward_cpu, at=8),
        "cuda": _nested(_backward_cuda, at=8),
        "triton": _nested(_backward_triton, at=8),
    },
    fake=lambda state, _, __, cu_seqlens, tokens, sizes, dtype, *___: _empty_gradients(
        state, cu_seqlens, tokens, sizes, dtype
    ),
    accepts={name: frozenset({torch.float32}) for name in ("cpu", "cuda", "triton")},
)
