"""Multi-exit pooling as an op: errors, autograd, compile, export, and the module."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastembed
from fastembed.nn import MultiExitPooling
from fastembed.ops import pooling as pooling_ops
from fastembed.ops.pooling import MODES
from fastembed.reference import pooling as reference

MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 1, 0]])
HIDDEN = [torch.linspace(-2, 2, 3 * 5 * 8).view(3, 5, 8), torch.linspace(1, -3, 3 * 5 * 6).view(3, 5, 6)]
DIMS = [[4, 8], [3]]
RANGES = torch.tensor([[0, 5], [2, 4], [1, 1]])
PACKED = HIDDEN[0].reshape(15, 8)
CU_SEQLENS = torch.tensor([0, 4, 4, 15])


def _flat(pooled: list[dict[int, Tensor]]) -> tuple[Tensor, ...]:
    return tuple(tensor for by_dim in pooled for tensor in by_dim.values())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastembed.pool_exits(HIDDEN[0], MASK), TypeError, "hidden_states must be a list of tensors"),
        (lambda: fastembed.pool_exits([], MASK), ValueError, "hidden_states must hold at least one exit"),
        (lambda: fastembed.pool_exits([[1.0]], MASK), TypeError, r"hidden_states\[0\] must be a tensor, got list"),
        (lambda: fastembed.pool_exits([HIDDEN[0].int()]), TypeError, r"hidden_states\[0\] must be dense float32"),
        (lambda: fastembed.pool_exits([HIDDEN[0].to_sparse()]), TypeError, r"hidden_states\[0\] must be dense"),
        (lambda: fastembed.pool_exits([PACKED]), ValueError, r"must be \[B, T, D\].*got shape \(15, 8\)"),
        (
            lambda: fastembed.pool_exits(HIDDEN, cu_seqlens=CU_SEQLENS),
            ValueError,
            r"must be \[N, D\] or \[1, N, D\].*got shape \(3, 5, 8\)",
        ),
        (lambda: fastembed.pool_exits([HIDDEN[0], HIDDEN[1].half()]), TypeError, "must share dtype and device"),
        (lambda: fastembed.pool_exits([HIDDEN[0], HIDDEN[0][:2]]), ValueError, "must share all but the last axis"),
        (lambda: fastembed.pool_exits([HIDDEN[0].to("meta")], MASK), ValueError, "attention_mask must be .* device"),
        (lambda: fastembed.pool_exits(HIDDEN, MASK.tolist()), TypeError, "attention_mask must be a tensor, got list"),
        (lambda: fastembed.pool_exits(HIDDEN, MASK[:, :4]), ValueError, r"attention_mask must be \[B, T\] = \[3, 5\]"),
        (lambda: fastembed.pool_exits(HIDDEN, MASK[0]), ValueError, r"attention_mask must be .*got shape \(5,\)"),
        (lambda: fastembed.pool_exits(HIDDEN, MASK.cfloat()), TypeError, "attention_mask must be bool"),
        (lambda: fastembed.pool_exits(HIDDEN, MASK * 2), ValueError, "attention_mask must hold only 0 and 1"),
        (lambda: fastembed.pool_exits(HIDDEN, MASK * 0.5), ValueError, "attention_mask must hold only 0 and 1"),
        (lambda: fastembed.pool_exits(HIDDEN, MASK * torch.nan), ValueError, "attention_mask must hold only 0 and 1"),
        (
            lambda: fastembed.pool_exits(HIDDEN, MASK.float()[:, None, None]),
            ValueError,
            "attention_mask of floats .* -1e4",
        ),
        (
            lambda: fastembed.pool_exits(HIDDEN, MASK[:, None, None] * 2),
            ValueError,
            "attention_mask must hold only 0 and",
        ),
        (
            lambda: fastembed.pool_exits(HIDDEN, MASK[:, None]),
            ValueError,
            r"or \[B, 1, 1, T\] as in hidden_states, got shape \(3, 1, 5\)",
        ),
        (
            lambda: fastembed.pool_exits([PACKED], MASK, cu_seqlens=CU_SEQLENS),
            ValueError,
            r"attention_mask must be \[N\] = \[15\] with cu_seqlens",
        ),
        (lambda: fastembed.pool_exits([PACKED], cu_seqlens=[0, 15]), TypeError, "cu_seqlens must be a tensor"),
        (lambda: fastembed.pool_exits([PACKED], cu_seqlens=CU_SEQLENS.float()), TypeError, "cu_seqlens must be int32"),
        (lambda: fastembed.pool_exits([PACKED], cu_seqlens=CU_SEQLENS[None]), ValueError, r"cu_seqlens .* \(1, 4\)"),
        (lambda: fastembed.pool_exits([PACKED], cu_seqlens=CU_SEQLENS[:0]), ValueError, r"cu_seqlens .* \(0,\)"),
        (lambda: fastembed.pool_exits([PACKED], cu_seqlens=CU_SEQLENS[:3]), ValueError, "cu_seqlens must rise from 0"),
        (lambda: fastembed.pool_exits([PACKED], cu_seqlens=CU_SEQLENS + 1), ValueError, "cu_seqlens must rise from 0"),
        (lambda: fastembed.pool_exits([PACKED], cu_seqlens=CU_SEQLENS - 1), ValueError, "cu_seqlens must rise from 0"),
        (
            lambda: fastembed.pool_exits([PACKED], cu_seqlens=torch.tensor([0, 9, 5, 15])),
            ValueError,
            "cu_seqlens must rise from 0 to the 15 tokens",
        ),
        (
            lambda: fastembed.pool_exits([PACKED], cu_seqlens=torch.tensor([0, 2**62, -(2**62), 15])),
            ValueError,
            "cu_seqlens must rise from 0 to the 15 tokens",
        ),
        (lambda: fastembed.pool_exits(HIDDEN, MASK, mode="median"), ValueError, "mode must be one of mean, cls"),
        (lambda: fastembed.pool_exits(HIDDEN, MASK, mode=[]), TypeError, "mode must be a string or a list"),
        (lambda: fastembed.pool_exits(HIDDEN, MASK, mode=["mean", "median"]), ValueError, "mode must be one of mean"),
        (lambda: fastembed.pool_exits(HIDDEN, MASK, mode=["mean"], dims=[9]), ValueError, "dims of exit 0 must lie"),
        (lambda: fastembed.pool_exits(HIDDEN, ranges=RANGES.tolist()), TypeError, "ranges must be a tensor, got list"),
        (lambda: fastembed.pool_exits(HIDDEN, ranges=RANGES.float()), TypeError, "ranges must be int32 or int64"),
        (lambda: fastembed.pool_exits(HIDDEN, ranges=RANGES[:2]), ValueError, r"ranges must be \[B, 2\] with B = 3"),
        (lambda: fastembed.pool_exits(HIDDEN, ranges=RANGES[:, :1]), ValueError, r"ranges .*got shape \(3, 1\)"),
        (lambda: fastembed.pool_exits(HIDDEN, ranges=RANGES + 1), ValueError, "ranges must hold a start and an end"),
        (lambda: fastembed.pool_exits(HIDDEN, ranges=RANGES.flip(1)), ValueError, "0 <= start <= end <= its length"),
        (lambda: fastembed.pool_exits(HIDDEN, MASK * 2, ranges=RANGES), ValueError, "attention_mask must hold only"),
        (lambda: fastembed.pool_exits(HIDDEN, positions=RANGES[:1]), ValueError, r"positions must be \[B, P\]"),
        (lambda: fastembed.pool_exits(HIDDEN, positions=RANGES), ValueError, "positions must lie inside"),
        (lambda: fastembed.pool_exits(HIDDEN, positions=RANGES - 3), ValueError, "positions must lie inside"),
        (
            lambda: fastembed.pool_exits(
                [PACKED], cu_seqlens=CU_SEQLENS, ranges=torch.tensor([[0, 4], [0, 1], [0, 11]])
            ),
            ValueError,
            "ranges must hold a start and an end per sequence",
        ),
        (lambda: fastembed.pool_exits(HIDDEN, MASK, dims=[7]), ValueError, "dims of exit 1 must lie between 1 and"),
        (lambda: fastembed.pool_exits(HIDDEN, MASK, dims=[0]), ValueError, "dims of exit 0 must lie .* got 0"),
        (lambda: fastembed.pool_exits(HIDDEN, MASK, dims=[[4]]), ValueError, "dims must have one list per exit"),
        (lambda: fastembed.pool_exits(HIDDEN, MASK, dims=[[4], []]), ValueError, "dims must name at least one"),
        (lambda: fastembed.pool_exits(HIDDEN, MASK, dims=[]), ValueError, "dims must name at least one"),
        (lambda: fastembed.pool_exits(HIDDEN, MASK, dims=[[4], 4]), TypeError, "dims must be all ints or all lists"),
        (lambda: fastembed.pool_exits(HIDDEN, MASK, dims=[4.0]), TypeError, "dims must be ints, got 4.0"),
        (lambda: fastembed.pool_exits(HIDDEN, MASK, dims=[True]), TypeError, "dims must be ints, got True"),
        (lambda: fastembed.pool_exits(HIDDEN, MASK, dims=4), TypeError, "dims must be a list of ints"),
        (lambda: fastembed.pool_exits(HIDDEN, MASK, dims="48"), TypeError, "dims must be"),
        (lambda: fastembed.pool_exits(HIDDEN, MASK, out_dtype=torch.int16), TypeError, "out_dtype must be float32"),
        (lambda: fastembed.pool_exits(HIDDEN, MASK, out_dtype=torch.float64), TypeError, "out_dtype float64 needs"),
        (
            lambda: fastembed.pool_exits([HIDDEN[0][..., :0]]),
            ValueError,
            r"at least one feature .* got shape \(3, 5, 0\)",
        ),
        (lambda: MultiExitPooling(mode="median"), ValueError, "mode must be one of mean, cls"),
    ],
)
def test_bad_input_is_one_clear_exception(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def _arguments(mode: str, normalize: bool, requires_grad: bool, packed: bool) -> tuple[Any, ...]:
    hidden = [PACKED.clone()] if packed else [tensor.clone() for tensor in HIDDEN]
    for tensor in hidden:
        tensor.requires_grad_(requires_grad)
    dims, dims_per_exit = ([4, 8], [2]) if packed else ([4, 8, 3], [2, 1])
    mask, cu_seqlens = (None, CU_SEQLENS) if packed else (MASK, None)
    return hidden, mask, cu_seqlens, mode, dims, dims_per_exit, normalize, torch.float32, requires_grad


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("mode", ["mean", "max"])
def test_opcheck(mode: str, requires_grad: bool, packed: bool) -> None:
    torch.library.opcheck(torch.ops.fastembed.pool_exits.default, _arguments(mode, True, requires_grad, packed))


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck_of_several_modes(packed: bool) -> None:
    hidden, mask, cu_seqlens, _, dims, dims_per_exit, normalize, *_ = _arguments("mean", True, False, packed)
    arguments = (hidden, mask, cu_seqlens, ["max", "mean", "cls"], dims, dims_per_exit, normalize, torch.float32)
    torch.library.opcheck(torch.ops.fastembed.pool_modes.default, arguments)


def test_several_modes_of_a_backend_that_has_one_at_a_time() -> None:
    mode_by_mode = pooling_ops._mode_by_mode(reference.pool_exits)
    modes, dims = ["max", "cls", "mean"], [[20, 3], [18]]
    ours = mode_by_mode(HIDDEN, MASK, None, modes, dims, True, torch.float16)
    expected = reference.pool_modes(HIDDEN, MASK, None, modes, dims, True, torch.float16)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_several_modes_with_gradients() -> None:
    modes = ["max", "mean_sqrt_len", "mean"]
    hidden = [tensor.clone().requires_grad_() for tensor in HIDDEN]
    options = {"mode": modes, "dims": [10, 5]}
    pooled = fastembed.pool_exits(hidden, MASK, **options)
    torch.testing.assert_close(pooled, fastembed.pool_exits(HIDDEN, MASK, **options))
    sum(tensor.sum() for tensor in _flat(pooled)).backward()
    with fastembed.use_backend("reference"):
        again = [tensor.clone().requires_grad_() for tensor in HIDDEN]
        sum(tensor.sum() for tensor in _flat(fastembed.pool_exits(again, MASK, **options))).backward()
    for ours, theirs in zip(hidden, again, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", ["mean", "max"])
def test_opcheck_backward(mode: str, packed: bool) -> None:
    hidden, mask, cu_seqlens, mode, dims, dims_per_exit, normalize, *_ = _arguments(mode, True, False, packed)
    arguments = (mask, cu_seqlens, mode, dims, dims_per_exit, normalize)
    state = torch.ops.fastembed.pool_exits(hidden, *arguments, torch.float32, True)[len(dims) :]
    grads = [torch.ones(3, dim) for dim in dims]
    tokens, sizes = hidden[0].shape[-2], [tensor.shape[-1] for tensor in hidden]
    backward = (state, grads, mask, cu_seqlens, tokens, sizes, torch.float32, mode, dims, dims_per_exit, normalize)
    torch.library.opcheck(torch.ops.fastembed.pool_exits_backward.default, backward)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str, normalize: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(h.shape, generator=generator, dtype=torch.float64, requires_grad=True) for h in HIDDEN]
    packed = torch.randn(PACKED.shape, generator=generator, dtype=torch.float64, requires_grad=True)

    def pool_padded(*exits: Tensor) -> tuple[Tensor, ...]:
        return _flat(fastembed.pool_exits(exits, MASK, mode=mode, dims=DIMS, normalize=normalize))

    def pool_packed(tokens: Tensor) -> tuple[Tensor, ...]:
        pooled = fastembed.pool_exits([tokens], cu_seqlens=CU_SEQLENS, mode=mode, dims=[4, 8], normalize=normalize)
        return tuple(tensor[[0, 2]] for tensor in _flat(pooled))  # the norm of an empty sequence has no derivative

    assert torch.autograd.gradcheck(pool_padded, hidden)
    assert torch.autograd.gradcheck(pool_packed, packed)


@pytest.mark.parametrize("mode", MODES)
def test_no_gradient_reaches_padding_or_empty_rows(mode: str) -> None:
    hidden = torch.ones(2, 3, 4, requires_grad=True)
    mask = torch.tensor([[0, 1, 0], [0, 0, 0]])
    pooled = fastembed.pool_exits([hidden], mask, mode=mode, normalize=False)
    pooled[0][4].sum().backward()
    expected = torch.zeros(2, 3, 4)
    expected[0, 1] = 1
    torch.testing.assert_close(hidden.grad, expected)


def test_gradient_of_unused_exits_is_zero() -> None:
    exits = [tensor.clone().requires_grad_() for tensor in HIDDEN]
    fastembed.pool_exits(exits, MASK, dims=DIMS)[0][4].sum().backward()
    assert exits[0].grad.abs().sum() > 0
    assert exits[1].grad.abs().sum() == 0


@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiles_to_one_graph(requires_grad: bool) -> None:
    exits = [tensor.clone().requires_grad_(requires_grad) for tensor in HIDDEN]

    def pool(*exits: Tensor) -> tuple[Tensor, ...]:
        return _flat(fastembed.pool_exits(exits, MASK, dims=DIMS))

    compiled = torch.compile(pool, fullgraph=True)
    torch.testing.assert_close(compiled(*exits), pool(*exits), rtol=0, atol=0)
    if requires_grad:
        torch.testing.assert_close(
            torch.autograd.grad(sum(t.sum() for t in compiled(*exits)), exits),
            torch.autograd.grad(sum(t.sum() for t in pool(*exits)), exits),
        )


@pytest.mark.parametrize("mode", ["weightedmean", ["mean", "max"]])
def test_compiles_around_the_look_at_the_values(mode: str | list[str]) -> None:
    def pool(hidden: Tensor, ranges: Tensor) -> tuple[Tensor, ...]:
        return _flat(fastembed.pool_exits([hidden], MASK, ranges=ranges, mode=mode, dims=[5], out_dtype=torch.int8))

    with torch.no_grad():
        compiled = torch.compile(pool, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(compiled(HIDDEN[0], RANGES), pool(HIDDEN[0], RANGES), rtol=0, atol=0)


def test_exports_with_dynamic_batch_and_length() -> None:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = {"hidden_states": [{0: batch, 1: length}] * 2, "attention_mask": {0: batch, 1: length}}
    module = MultiExitPooling(dims=DIMS)
    exported = torch.export.export(module, (HIDDEN, MASK), dynamic_shapes=shapes).module()
    larger = [torch.cat([hidden, hidden]).repeat(1, 2, 1) for hidden in HIDDEN], MASK.repeat(2, 2)
    torch.testing.assert_close(exported(*larger), module(*larger), rtol=0, atol=0)


def test_inference_mode_and_autocast_change_nothing() -> None:
    expected = fastembed.pool_exits(HIDDEN, MASK, dims=DIMS)
    with torch.inference_mode():
        torch.testing.assert_close(fastembed.pool_exits(HIDDEN, MASK, dims=DIMS), expected, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fastembed.pool_exits(HIDDEN, MASK, dims=DIMS), expected, rtol=0, atol=0)


def test_module_is_the_function_and_survives_copies() -> None:
    module = MultiExitPooling("weightedmean", dims=DIMS, normalize=False, out_dtype=torch.bfloat16)
    expected = fastembed.pool_exits(
        HIDDEN, MASK, mode="weightedmean", dims=DIMS, normalize=False, out_dtype=torch.bfloat16
    )
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(twin(HIDDEN, MASK), expected, rtol=0, atol=0)
    assert module.state_dict() == {}
    assert repr(module) == (
        "MultiExitPooling(mode='weightedmean', dims=[[4, 8], [3]], normalize=False, out_dtype=torch.bfloat16)"
    )


def test_outputs_never_share_memory() -> None:
    same = HIDDEN[0][:, :1]
    outputs = _flat(fastembed.pool_exits([same, same], mode="cls", dims=[8, 4], normalize=False))
    storages = {tensor.untyped_storage().data_ptr() for tensor in (same, *outputs)}
    assert len(storages) == 1 + len(outputs)
    assert all(tensor.is_contiguous() for tensor in outputs)


def test_meta_tensors_give_shapes() -> None:
    exits, mask = [hidden.to("meta") for hidden in HIDDEN], MASK.to("meta")
    pooled = fastembed.pool_exits(exits, mask, dims=DIMS, out_dtype=torch.float16)
    assert [{dim: (t.shape, t.dtype) for dim, t in by_dim.items()} for by_dim in pooled] == [
        {dim: ((3, dim), torch.float16) for dim in dims} for dims in DIMS
    ]


def test_a_forced_backend_leaves_pooling_trainable() -> None:
    hidden = torch.randn(2, 5, 16, requires_grad=True)
    with fastembed.use_backend("cpu"):
        fastembed.pool_exits([hidden])[0][16].sum().backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_masks_as_attention_layers_take_them(padded: bool, compiled: bool) -> None:
    mask = MASK if padded else torch.ones_like(MASK)
    pool = fastembed.pool_exits
    if compiled:
        torch._dynamo.reset()
        pool = torch.compile(pool, fullgraph=True, backend="aot_eager")
    expected = fastembed.pool_exits(HIDDEN, mask)
    extended = mask[:, None, None]
    least = [torch.finfo(torch.float16).min, torch.finfo(torch.float32).min, -torch.inf, -1e4]
    additive = [torch.zeros(extended.shape).masked_fill_(extended == 0, value) for value in least]
    for form in (extended, extended.bool(), *additive, additive[0].bfloat16()):
        torch.testing.assert_close(pool(HIDDEN, form), expected, rtol=0, atol=0)
