"""csrc/pooling/backward.cu, and what pooling.cu keeps for it, through autograd, against the reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from pooling_backward_cases import assert_agrees_with_the_reference as check
from pooling_backward_cases import assert_gradient_goes_to_the_first, gradients, reached_twice
from test_pooling import DTYPES, Call, _calls, _random

from fastembed.ops.pooling import MODES, _pool_exits_backward

from .test_pooling import CHUNK, mask_with_holes

pytestmark = pytest.mark.usefixtures("simulated_cuda", "uninitialised_memory_is_nan")


@settings(max_examples=10)
@given(call=_calls())
def test_agrees_with_the_reference(thread_order: str, call: Call) -> None:
    check(call)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_padded(mode: str, dtype: torch.dtype) -> None:
    """Several chunks and tiles; a width that vectors divide and one that they do not, of which columns are left out."""
    mask = mask_with_holes(4, CHUNK + 40)
    hidden = _random((4, CHUNK + 40, 301), 0, dtype)
    hidden[mask == 0] = math.nan
    for size in (301, 264):
        check(Call([hidden[..., :size]], {"attention_mask": mask, "mode": mode, "dims": [200, 7, 261]}))


@pytest.mark.parametrize(
    ("mode", "dtype"), [("max", torch.float32), ("lasttoken", torch.float16), ("weightedmean", torch.float16)]
)
def test_sanitized(mode: str, dtype: torch.dtype) -> None:
    """Small, for the runs under sanitizers."""
    mask = mask_with_holes(2, CHUNK + 5)
    hidden = _random((2, CHUNK + 5, 40), 7, dtype)
    check(Call([hidden, hidden[..., :3]], {"attention_mask": mask, "mode": mode, "dims": [[8, 40], [3]]}))
    check(Call([hidden[0]], {"cu_seqlens": torch.tensor([0, 2, CHUNK + 5]), "mode": mode, "dims": [37]}))
    of_hostile_offsets([9, -(2**40), 2**40, 3], mode)


def of_hostile_offsets(offsets: list[int], mode: str) -> None:
    """Every gradient is written, once, whatever the offsets say."""
    tokens, size = 70, 9
    state = [torch.ones(3, size), torch.zeros(3, size, dtype=torch.int32)][: 2 if mode == "max" else 1]
    arguments = (None, torch.tensor(offsets), tokens, [size], torch.float32, mode, [size], [1], True)
    (gradient,) = _pool_exits_backward(state, [torch.ones(3, size)], *arguments)
    assert gradient.shape == (tokens, size)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("offsets", [[5, 3, 1, 0], [0, 400, 10, 20], [-7, -1, 10**12, 2**62], [50, 0, 50, 0]])
@pytest.mark.parametrize("mode", ["mean", "max", "weightedmean"])
def test_hostile_offsets(offsets: list[int], mode: str) -> None:
    of_hostile_offsets(offsets, mode)


@pytest.mark.parametrize("mode", MODES)
def test_packed(mode: str) -> None:
    """Sequences that begin and end on, before and after the edges of chunks; empty ones between them."""
    lengths = [0, CHUNK, 1, 0, 0, CHUNK - 1, 2 * CHUNK + 1, 3, 0]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    mask = (torch.arange(int(offsets[-1])) % 5 > 0).long()
    hidden = _random((int(offsets[-1]), 40), 1)
    check(Call([hidden], {"cu_seqlens": offsets, "attention_mask": mask, "mode": mode, "dims": [8, 40]}))


def test_more_exits_and_dims_than_one_launch_takes() -> None:
    hidden_states = [_random((1, 3, 130), seed) for seed in range(18)]
    every_dim = list(range(130, 0, -1))
    check(Call(hidden_states, {"dims": [every_dim, *([[5, 130]] * 16), every_dim], "mode": "max"}))


def test_no_sequences() -> None:
    check(Call([_random((0, 5, 8), 0), _random((0, 5, 3), 0)]))
    check(Call([_random((0, 8), 0)], {"cu_seqlens": torch.tensor([0, 0, 0])}))


@reached_twice
def test_a_maximum_reached_twice_sends_its_gradient_to_the_first(values: list[float]) -> None:
    for length in (3, 2 * CHUNK + 3):
        assert_gradient_goes_to_the_first(values, length)


def test_neither_thread_order_nor_the_batch_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = _random((3, 140, 96), 5)
    options = {"mode": "weightedmean", "dims": [96, 32]}
    results = []
    for order in ("asc", "desc", "random"):
        monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
        results += gradients(Call([hidden], options))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    row = hidden[:1].clone()
    assert torch.equal(gradients(Call([row], options))[0], gradients(Call([row, row], options))[0])
