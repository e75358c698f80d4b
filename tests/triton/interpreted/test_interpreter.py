"""The mended interpreter computes what a GPU does, and refuses what a GPU would let pass."""

from collections.abc import Callable
from typing import Any

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

SIZE = tl.constexpr(64)


@pytest.fixture
def every_bfloat16() -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)


@triton.jit
def arithmetic(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    b = tl.load(y + i)
    tl.store(out + i, a + b)
    tl.store(out + N + i, a * b)
    tl.store(out + 2 * N + i, tl.maximum(a, -b))
    tl.store(out + 3 * N + i, tl.where(a < b, a - b, b - a))


def test_bfloat16_arithmetic_rounds_to_nearest_even(every_bfloat16: Tensor) -> None:
    a, b = every_bfloat16, every_bfloat16[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    a, b = (x.where(x.isfinite(), 1) for x in (a, b))
    out = torch.empty(4, 2**16, dtype=torch.bfloat16)
    arithmetic[1,](a, b, out, 2**16)
    expected = [a + b, a * b, torch.maximum(a, -b), torch.where(a < b, a - b, b - a)]
    torch.testing.assert_close(out, torch.stack(expected), rtol=0, atol=0)


@triton.jit
def cast(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def cast_with_rounding_named(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty, fp_downcast_rounding="rtne"))


@pytest.mark.parametrize("kernel", [cast, cast_with_rounding_named])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_round_to_nearest_even(kernel: Any, dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0)).int()
    ties = (bits & ~0xFFFF) | 0x8000
    x = torch.cat([bits.view(torch.float32), ties.view(torch.float32)])
    out = torch.empty(2**17, dtype=dtype)
    kernel[1,](x, out, 2**17)
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_bfloat16_to_float32_is_exact(every_bfloat16: Tensor) -> None:
    out = torch.empty(2**16)
    cast[1,](every_bfloat16, out, 2**16)
    torch.testing.assert_close(out, every_bfloat16.float(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def dot_and_sum(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i[:, None] * N + i[None, :])
    tl.store(out + i[:, None] * N + i[None, :], tl.dot(a, a) + tl.sum(a, axis=0)[None, :])


def test_bfloat16_dot_and_sum() -> None:
    x = torch.randint(-8, 9, (32, 32), generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty(32, 32)
    dot_and_sum[1,](x, out, 32)
    torch.testing.assert_close(out, x.float() @ x.float() + x.float().sum(dim=0), rtol=0, atol=0)


@triton.jit
def extremes(x, y, out):
    i = tl.arange(0, 4)
    a = tl.load(x + i)
    b = tl.load(y + i)
    tl.store(out + i, tl.maximum(a, b))
    tl.store(out + 4 + i, tl.minimum(a, b))
    tl.store(out + 8 + i, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out + 12 + i, tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL))


def test_maximum_and_minimum_propagate_nan_only_where_told() -> None:
    nan = torch.nan
    x, y, out = torch.tensor([1, nan, 2, nan]), torch.tensor([2, 3, nan, nan]), torch.empty(4, 4)
    extremes[1,](x, y, out)
    expected = [[2, 3, 2, nan], [1, 3, 2, nan], [2, nan, nan, nan], [1, nan, nan, nan]]
    torch.testing.assert_close(out, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


@triton.jit
def scalar_condition_in_mask(x, out, count):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i, mask=(i < 32) & (count > 0), other=7.0))


def test_scalar_comparison_broadcasts_into_a_mask() -> None:
    x, out = torch.ones(SIZE.value), torch.empty(SIZE.value)
    scalar_condition_in_mask[1,](x, out, 5)
    assert out.tolist() == [1.0] * 32 + [7.0] * 32


@triton.jit
def load_without_other(x, out):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i, mask=i < 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_masked_lanes_without_other_are_poison(dtype: torch.dtype) -> None:
    x, out = torch.ones(SIZE.value, dtype=dtype), torch.zeros(SIZE.value, dtype=dtype)
    load_without_other[1,](x, out)
    assert bool((out[:32] == 1).all())
    poison = out[32:]
    assert bool(poison.isnan().all() if dtype.is_floating_point else (poison == torch.iinfo(dtype).max).all())


@triton.jit
def copy(x, out, first, stride):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + first + i * stride))


@triton.jit
def store_from(out, first):
    tl.store(out + first + tl.arange(0, SIZE), 1.0)


@triton.jit
def add_atomically(out, first):
    tl.atomic_add(out + first + tl.arange(0, SIZE), 1.0)


STORAGE = torch.zeros(4, 128)


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (lambda: copy[1,](STORAGE[1, :64], torch.empty(64), 1, 1), "load outside every tensor passed: 1 of 64"),
        (lambda: copy[1,](STORAGE[1, :64], torch.empty(64), -1, 1), "load outside every tensor passed: 1 of 64"),
        (lambda: copy[1,](STORAGE[:, ::2], torch.empty(64), 0, 1), "load outside every tensor passed: 32 of 64"),
        (lambda: store_from[1,](STORAGE[1, :64], 1), "store outside every tensor passed: 1 of 64"),
        (lambda: add_atomically[1,](STORAGE[1, :64], 1), "atomic outside every tensor passed: 1 of 64"),
    ],
    ids=["load after the end", "load before the start", "load from a view's gaps", "store", "atomic"],
)
def test_access_outside_the_tensors_is_refused(launch: Callable[[], None], message: str) -> None:
    before = STORAGE.clone()
    with pytest.raises(triton.runtime.errors.InterpreterError, match=message):
        launch()
    assert torch.equal(STORAGE, before)


def test_strided_view_is_read_in_place() -> None:
    x, out = torch.randn(4, 128), torch.empty(64)
    copy[1,](x[2, ::2], out, 0, 2)
    assert torch.equal(out, x[2, ::2])


@triton.jit
def store_own_id(out):
    tl.store(out, tl.program_id(0))


@triton.jit
def store_all_lanes_to_one_element(out):
    tl.store(out + tl.arange(0, SIZE) * 0, 1)


@triton.jit
def running_sum(x):
    """Right only if the programs run one after the other, by their id."""
    i = tl.program_id(0)
    before = tl.load(x + i - 1, mask=i > 0, other=0)
    tl.store(x + i, tl.load(x + i) + before)


@triton.jit
def count_atomically(out):
    tl.atomic_add(out, 1)


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (lambda x: store_own_id[4,](x), "programs . and . store to the same element"),
        (lambda x: store_all_lanes_to_one_element[1,](x), "two lanes of one store in program 0"),
        (lambda x: running_sum[4,](x), "loads what program . stores|stores to what another program loads"),
    ],
    ids=["two programs store", "two lanes store", "one loads, one stores"],
)
def test_race_is_refused(launch: Callable[[Tensor], None], message: str, seed: int | None) -> None:
    with (
        interpreter.program_order(seed),
        pytest.raises(triton.runtime.errors.InterpreterError, match=message),
    ):
        launch(torch.zeros(64, dtype=torch.int32))


def test_atomics_are_no_race() -> None:
    count = torch.zeros(1, dtype=torch.int32)
    count_atomically[5,](count)
    assert count.item() == 5


@triton.jit
def order_of_turns(turns, counter):
    tl.store(turns + tl.program_id(0) * 2 + tl.program_id(1), tl.atomic_add(counter, 1))


def test_programs_run_in_an_order_that_the_seed_decides() -> None:
    def order(seed: int | None) -> list[int]:
        turns = torch.empty(8, dtype=torch.int32)
        with interpreter.program_order(seed):
            order_of_turns[4, 2](turns, torch.zeros(1, dtype=torch.int32))
        return turns.tolist()

    assert order(None) == list(range(8))
    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(8))
