"""The Triton pooling kernels, run by the mended interpreter, against the reference."""

from typing import Any

import interpreter
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tolerance import assert_close_to_oracle
from torch import Tensor

import fastembed
from fastembed.ops.pooling import MODES
from fastembed.reference import pooling as reference
from fastembed.reference.search import pack_bits
from fastembed.triton_kernels import pooling as triton_pooling

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pool(hidden_states: list[Tensor], attention_mask: Tensor | None = None, **options: Any) -> list[Tensor]:
    with fastembed.use_backend("triton"):
        pooled = fastembed.pool_exits(hidden_states, attention_mask, **options)
    return [tensor for by_dim in pooled for tensor in by_dim.values()]


def check(hidden_states: list[Tensor], attention_mask: Tensor | None = None, **options: Any) -> None:
    """Compare with the reference in float64, within what the reference itself loses in float32."""
    ours = pool(hidden_states, attention_mask, **options)
    with fastembed.use_backend("reference"):
        doubles = {**options, "out_dtype": torch.float64}
        oracle = fastembed.pool_exits([hidden.double() for hidden in hidden_states], attention_mask, **doubles)
        theirs = fastembed.pool_exits(hidden_states, attention_mask, **options)
    references = [(mine[dim], exact[dim]) for mine, exact in zip(theirs, oracle, strict=True) for dim in exact]
    for output, (torch_same_dtype, exact) in zip(ours, references, strict=True):
        assert output.dtype == torch_same_dtype.dtype
        assert output.is_contiguous()
        assert_close_to_oracle(output, torch_same_dtype, exact)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Around 1: sums that cancel to almost nothing would compare two rounding errors, not two results."""
    return (1 + torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@st.composite
def masks(draw: st.DrawFn, batch: int, length: int) -> Tensor | None:
    kind = draw(st.sampled_from(["none", "left", "right", "holes"]))
    if kind == "none":
        return None
    if kind == "holes":
        values = draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))
        mask = torch.tensor(values, dtype=torch.bool).view(batch, length)
    else:
        counts = draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
        mask = torch.arange(length) < torch.tensor(counts)[:, None]
        mask = mask.flip(1) if kind == "left" else mask
    return mask.to(draw(st.sampled_from([torch.bool, torch.int64, torch.uint8, torch.float32])))


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Tensor], Tensor | None, dict[str, Any]]:
    """Arguments of pool_exits: padded or packed, exits of different widths."""
    batch = draw(st.integers(1, 3))
    length = draw(st.integers(1, 70))
    widths = draw(st.lists(st.integers(1, 80), min_size=1, max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    options = {
        "mode": draw(st.sampled_from(MODES)),
        "normalize": draw(st.booleans()),
        "dims": [draw(st.lists(st.integers(1, width), min_size=1, max_size=3, unique=True)) for width in widths],
        "out_dtype": draw(st.sampled_from([None, *DTYPES])),
    }
    # Views of equal strides, which share a launch whatever their widths; nothing may be read from their gaps.
    stacked = normal(draw(st.integers(0, 2**16)), len(widths), batch, length, 100, dtype=dtype)
    hidden_states = [exit[..., :width] for exit, width in zip(stacked, widths, strict=True)]
    if draw(st.booleans()):
        return hidden_states, draw(masks(batch, length)), options
    inner = sorted(draw(st.lists(st.integers(0, batch * length), max_size=3)))
    integer = draw(st.sampled_from([torch.int32, torch.int64]))
    options["cu_seqlens"] = torch.tensor([0, *inner, batch * length], dtype=integer)
    return [hidden.flatten(0, 1) for hidden in hidden_states], None, options


@given(calls())
def test_agrees_with_the_reference(call: tuple[list[Tensor], Tensor | None, dict[str, Any]]) -> None:
    hidden_states, attention_mask, options = call
    check(hidden_states, attention_mask, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_never_leaks(mode: str, dtype: torch.dtype) -> None:
    hidden = normal(0, 3, 40, 24, dtype=dtype)
    mask = torch.zeros(3, 40, dtype=torch.int64)
    mask[0, 5:], mask[1, :33], mask[2, 1::3] = 1, 1, 1
    clean = pool([hidden], mask, mode=mode, dims=[8, 24])
    hidden[mask == 0] = torch.nan
    for before, after in zip(clean, pool([hidden], mask, mode=mode, dims=[8, 24]), strict=True):
        assert torch.equal(before, after)
        assert not bool(after.isnan().any())


@pytest.mark.parametrize("mode", MODES)
def test_rows_without_valid_tokens_are_zero(mode: str) -> None:
    mask = torch.tensor([[0, 0, 0], [1, 0, 1]])
    hidden = normal(0, 2, 3, 10)
    hidden[0] = torch.nan
    padded = pool([hidden], mask, mode=mode)[0]
    packed = pool([hidden[1]], cu_seqlens=torch.tensor([0, 0, 3, 3]), mode=mode)[0]
    assert bool((padded[0] == 0).all())
    assert bool((packed[[0, 2]] == 0).all())
    assert bool((padded[1] != 0).all())
    assert bool((packed[1] != 0).all())
    assert pool([hidden[:, :0]], mask[:, :0], mode=mode)[0].tolist() == [[0.0] * 10] * 2
    assert pool([hidden[:0]], mask[:0], mode=mode)[0].shape == (0, 10)
    assert pool([hidden[1, :0]], cu_seqlens=torch.tensor([0, 0]), mode=mode)[0].tolist() == [[0.0] * 10]
    assert pool([hidden[1, :0]], cu_seqlens=torch.tensor([0]), mode=mode)[0].shape == (0, 10)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("length", [3, 600])
def test_max_propagates_nan_and_infinity_of_valid_tokens(length: int, normalize: bool) -> None:
    hidden = normal(0, 2, length, 6)
    hidden[0, 1, 2] = torch.nan
    hidden[1, 0, 1], hidden[1, :, 3] = torch.inf, -torch.inf
    check([hidden], mode="max", dims=[1, 2, 6], normalize=normalize)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [triton_pooling.MIN_PIECE.value + 1, 4500])
def test_long_sequences_in_pieces(mode: str, length: int) -> None:
    hidden = normal(0, 2, length, 3, dtype=torch.float16)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, : length - 30], mask[1, ::7] = False, False
    check([hidden], mask, mode=mode, dims=[3])
    check([hidden.flatten(0, 1)], mode=mode, dims=[3], cu_seqlens=torch.tensor([0, length - 5, length, 2 * length]))


@pytest.mark.parametrize("mode", ["mean", "weightedmean"])
def test_float16_sums_do_not_overflow(mode: str) -> None:
    pooled = pool([torch.full((1, 600, 4), 200.0, dtype=torch.float16)], mode=mode, normalize=False)[0]
    assert pooled.tolist() == [[200.0] * 4]


def test_tiny_and_zero_vectors_normalise_as_in_float32() -> None:
    hidden = torch.tensor([0.0, 1e-7, 1e-3, 6e4], dtype=torch.float16).view(4, 1, 1).repeat(1, 2, 5)
    check([hidden], mode="mean", dims=[1, 5])


@pytest.mark.parametrize("mode", MODES)
def test_more_exits_and_dims_than_one_launch_takes(mode: str) -> None:
    exits, width = triton_pooling.EXITS_PER_LAUNCH + 1, 2 * triton_pooling.DIMS_PER_LAUNCH + 1
    dims = [list(range(width, 0, -1)), *([1 + i, width] for i in range(exits - 1))]
    check([normal(i, 1, 5, width) for i in range(exits)], mode=mode, dims=dims)


@pytest.mark.parametrize("mode", MODES)
def test_any_memory_layout_is_read_in_place(mode: str) -> None:
    stacked = normal(0, 3, 7, 2, 9)
    layouts = [stacked[:, :, 1], stacked[:, :, 0].mT.contiguous().mT, normal(1, 3, 9)[:, None].expand(3, 7, 9)]
    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 1]]).expand(3, 7)
    check(layouts, mask, mode=mode, dims=[4, 9])
    check([layouts[0][0]], cu_seqlens=torch.tensor([0, 9, 3, 9, 7, 9])[::2], mode=mode)


@pytest.mark.parametrize("mode", MODES)
@example(offsets=[-(2**62), 2**62, -5, 7])
@example(offsets=[5, 2, 2**31, 2**63 - 1])
@given(offsets=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=4))
def test_no_offsets_reach_outside_the_tokens(mode: str, offsets: list[int]) -> None:
    """On a GPU the offsets are not checked before the launch; the interpreter refuses any access out of bounds."""
    hidden = normal(0, 6, 4)
    pooled = triton_pooling.pool_exits([hidden], None, torch.tensor(offsets), mode, [[4]], True, torch.float32)
    assert bool(pooled[0].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint64, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_mask_of_any_dtype(dtype: torch.dtype) -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1]])
    arguments = (None, "weightedmean", [[4]], True, torch.float32)
    ours = triton_pooling.pool_exits([normal(0, 1, 5, 4)], mask.to(dtype), *arguments)
    assert torch.equal(ours[0], triton_pooling.pool_exits([normal(0, 1, 5, 4)], mask, *arguments)[0])


@pytest.mark.parametrize("mode", MODES)
def test_any_mask_value_but_zero_is_valid(mode: str) -> None:
    """On a GPU the values of the mask are not checked before the launch."""
    hidden = normal(0, 1, 4, 4)
    mask = torch.tensor([[0, -3, 0, 255]])
    arguments = (None, mode, [[4]], True, torch.float32)
    ours = triton_pooling.pool_exits([hidden], mask, *arguments)
    expected = triton_pooling.pool_exits([hidden], (mask != 0).long(), *arguments)
    assert torch.equal(ours[0], expected[0])


@pytest.mark.parametrize("mode", MODES)
def test_bits_depend_on_the_sequence_alone(mode: str) -> None:
    """Neither on the order of the programs, nor on the batch, nor on whether it is padded or packed."""
    length = 700
    hidden = normal(0, 3, length, 40)
    with interpreter.program_order(2):
        batch = pool([hidden, hidden], mode=mode, dims=[40])
    with interpreter.program_order(3):
        again = pool([hidden, hidden], mode=mode, dims=[40])
    single = pool([hidden[1:2]], mode=mode, dims=[40])
    packed = pool([hidden.flatten(0, 1)], mode=mode, cu_seqlens=torch.arange(4) * length)
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    assert torch.equal(batch[0], batch[1])
    assert torch.equal(batch[0][1:2], single[0])
    assert torch.equal(batch[0], packed[0])


@pytest.mark.parametrize("mode", ["mean", "max", "cls"])
def test_int8_and_packed_bits(mode: str) -> None:
    """Exactly the codes of the vectors that the same kernels pool."""
    hidden = normal(8, 5, 6, 43)
    hidden[1], hidden[2, 0, 20], hidden[3, 0, 3] = 0, torch.nan, torch.inf
    dims = [43, 8, 21]
    pooled = pool([hidden], mode=mode, normalize=False)[0]
    int8 = pool([hidden], mode=mode, dims=dims, out_dtype=torch.int8)
    bits = pool([hidden], mode=mode, dims=dims, out_dtype=torch.uint8)
    for i, dim in enumerate(dims):
        assert torch.equal(int8[i], reference.to_int8(pooled[:, :dim]))
        assert torch.equal(bits[i], pack_bits(pooled[:, :dim]))


def test_float64_is_refused() -> None:
    with pytest.raises(TypeError, match=r"backend 'triton' does not take torch\.float64"):
        pool([normal(0, 1, 2, 3).double()])
