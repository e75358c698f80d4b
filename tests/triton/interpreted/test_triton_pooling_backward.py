"""The Triton pooling backward, and what the forward keeps for it, run by the mended interpreter through autograd."""

import math

import interpreter
import pytest
import torch
from hypothesis import given, settings
from pooling_backward_cases import (
    assert_agrees_with_the_reference,
    assert_gradient_goes_to_the_first,
    gradients,
    reached_twice,
)
from test_pooling import DTYPES, Call, _calls, _random

import fastembed
from fastembed.ops.pooling import MODES
from fastembed.triton_kernels import pooling, pooling_backward

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


def check(call: Call) -> None:
    with fastembed.use_backend("triton"):
        assert_agrees_with_the_reference(call)


@settings(max_examples=20)
@given(_calls())
def test_agrees_with_the_reference(call: Call) -> None:
    check(call)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_gets_nothing_and_never_matters(mode: str, dtype: torch.dtype) -> None:
    hidden = _random((3, 40, 70), 0, dtype)
    mask = torch.zeros(3, 40, dtype=torch.int64)
    mask[0, 5:], mask[1, :33], mask[2, 1::3] = 1, 1, 1
    hidden[mask == 0] = math.nan
    check(Call([hidden, hidden[..., :20]], {"attention_mask": mask, "mode": mode, "dims": [[8, 60], [20]]}))


@pytest.mark.parametrize("mode", MODES)
def test_packed(mode: str) -> None:
    offsets = torch.tensor([0, 0, 32, 33, 33, 34, 97, 97], dtype=torch.int32)
    mask = (torch.arange(97) % 5 > 0).long()
    hidden = _random((97, 18), 1)
    check(Call([hidden], {"cu_seqlens": offsets, "attention_mask": mask, "mode": mode, "dims": [8, 18]}))


@pytest.mark.parametrize("offsets", [[5, 2, 2**31, 2**63 - 1], [-(2**62), 2**62, -5, 7], [60, 0, 60, 0]])
@pytest.mark.parametrize("mode", ["mean", "max", "weightedmean"])
def test_hostile_offsets(offsets: list[int], mode: str) -> None:
    """Every gradient is written, whatever the offsets say, and nothing outside them."""
    tokens, size = 70, 9
    state = [torch.ones(3, size), torch.zeros(3, size, dtype=torch.int32)][: 2 if mode == "max" else 1]
    arguments = (None, torch.tensor(offsets), tokens, [size], torch.float32, mode, [[size]], True)
    (gradient,) = pooling_backward.pool_exits_backward(state, [torch.ones(3, size)], *arguments)
    assert bool(gradient.isfinite().all())


@reached_twice
@pytest.mark.parametrize("length", [3, pooling.MIN_PIECE.value + 40])
def test_a_maximum_reached_twice_sends_its_gradient_to_the_first(values: list[float], length: int) -> None:
    with fastembed.use_backend("triton"):
        assert_gradient_goes_to_the_first(values, length)


def test_more_exits_and_dims_than_one_launch_takes() -> None:
    exits, width = pooling.EXITS_PER_LAUNCH + 1, 2 * pooling.DIMS_PER_LAUNCH + 1
    dims = [list(range(width, 0, -1)), *([1 + i, width] for i in range(exits - 1))]
    check(Call([_random((1, 5, width), i) for i in range(exits)], {"mode": "max", "dims": dims}))


def test_no_sequences() -> None:
    check(Call([_random((0, 5, 8), 0)]))
    check(Call([_random((0, 8), 0)], {"cu_seqlens": torch.tensor([0, 0, 0])}))


def test_neither_the_order_of_programs_nor_the_batch_matters() -> None:
    hidden = _random((3, 70, 40), 5)
    options = {"mode": "weightedmean", "dims": [40, 7]}
    with fastembed.use_backend("triton"):
        with interpreter.program_order(2):
            once = gradients(Call([hidden], options))[0]
        with interpreter.program_order(3):
            again = gradients(Call([hidden], options))[0]
        alone = gradients(Call([hidden[:1]], options))[0]
        beside = gradients(Call([hidden[:1], hidden[:1]], options))[0]
    assert torch.equal(once, again)
    assert torch.equal(alone, beside)
