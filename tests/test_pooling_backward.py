"""The backward of multi-exit pooling on the CPU: agreement with the reference in float64, and what must not matter."""

import math
import mmap
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pooling_backward_cases import (
    assert_agrees_with_the_reference,
    assert_gradient_goes_to_the_first,
    gradients,
    reached_twice,
)
from test_pooling import DTYPES, Call, _calls, _flat, _random
from torch import Tensor

import fastembed
from fastembed.ops import pooling
from fastembed.ops.pooling import MODES


@given(call=_calls())
def test_agrees_with_the_reference(isa: str, call: Call) -> None:
    assert_agrees_with_the_reference(call)


@given(call=_calls(), data=st.data())
def test_padding_gets_nothing_and_never_matters(isa: str, call: Call, data: st.DataObject) -> None:
    if (mask := call.options.get("attention_mask")) is None:
        return
    expected = gradients(call)
    mask = mask.view(call.hidden_states[0].shape[:-1])
    for hidden, gradient in zip(call.hidden_states, expected, strict=True):
        hidden[mask == 0] = data.draw(st.sampled_from([math.nan, math.inf, 1e4]))
        assert not gradient[mask == 0].any()
    torch.testing.assert_close(gradients(call), expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_neither_threads_nor_the_batch_nor_its_size_matter(isa: str, thread_counts: tuple[int, ...], mode: str) -> None:
    """The gradients of the whole batch are too large for the caches and written past them; those of a row are not."""
    hidden = _random((11, 300, 1408), 0)
    mask = (torch.arange(300) < torch.linspace(300, 1, 11).long()[:, None]).long()
    call = Call([hidden], {"attention_mask": mask, "mode": mode, "dims": [1408, 1000, 50]})
    torch.set_num_threads(thread_counts[0])
    (expected,) = gradients(call)
    for threads in thread_counts[1:]:
        torch.set_num_threads(threads)
        torch.testing.assert_close(gradients(call)[0], expected, rtol=0, atol=0)
    alone = hidden[10:].clone().requires_grad_()
    outputs = _flat(fastembed.pool_exits([alone], mask[10:], mode=mode, dims=[1408, 1000, 50]))
    backward = [_random((11, output.shape[1]), i)[10:] for i, output in enumerate(outputs)]
    (of_row,) = torch.autograd.grad(outputs, [alone], backward)
    torch.testing.assert_close(of_row[0], expected[10], rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_fresh_and_reused_memory(isa: str, thread_counts: tuple[int, ...], mode: str, monkeypatch: Any) -> None:
    """Gradients so large that they are written past the caches, unless their memory was never written to before."""
    call = Call([_random((2, 700, 1536), i) for i in range(3)], {"mode": mode})
    torch.set_num_threads(thread_counts[-1])
    expected = gradients(call)
    shape = call.hidden_states[0].shape
    for threads in thread_counts:
        torch.set_num_threads(threads)
        fresh = [mmap.mmap(-1, 4 * shape.numel(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(3)]
        memory = [torch.frombuffer(pages, dtype=torch.float32).view(shape) for pages in fresh]
        monkeypatch.setattr(pooling, "_empty_gradients", lambda *_, memory=memory: memory)
        for _ in range(2):
            assert all(map(torch.equal, gradients(call), expected))
            for written in memory:
                written.fill_(math.nan)


@reached_twice
def test_a_maximum_reached_twice_sends_its_gradient_to_the_first(isa: str, values: list[float]) -> None:
    for dtype in DTYPES:
        assert_gradient_goes_to_the_first(values, 3, dtype)


@pytest.mark.parametrize("length", [7, 127, 128, 301])
def test_the_first_of_many_equal_maxima(isa: str, length: int) -> None:
    """However the tokens are read."""
    generator = torch.Generator().manual_seed(length)
    hidden = torch.randint(-2, 3, (2, length, 70), generator=generator).float()
    hidden[0, :, ::7] = math.nan
    hidden[1, : length // 2, ::5] = math.nan
    hidden.requires_grad_()
    fastembed.pool_exits([hidden], mode="max", normalize=False)[0][70].sum().backward()
    expected = torch.zeros(2, length, 70).scatter(1, hidden.detach().max(dim=1, keepdim=True).indices, 1.0)
    assert torch.equal(hidden.grad, expected)


def test_a_vector_too_short_to_normalize(isa: str) -> None:
    """Divided by 1e-12, whatever its length: so is its gradient."""
    hidden = torch.full((1, 2, 4), 1e-14, requires_grad=True)
    fastembed.pool_exits([hidden])[0][4].sum().backward()
    torch.testing.assert_close(hidden.grad, torch.full((1, 2, 4), 0.5e12))


def test_the_hidden_states_are_not_kept() -> None:
    hidden = _random((2, 5, 8), 0).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        fastembed.pool_exits([hidden * 2], torch.ones(2, 5))
    assert all(tensor.shape != hidden.shape for tensor in saved if tensor is not hidden)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("mode", ["mean", "max"])
def test_codes_have_no_gradient(mode: str, backend: str) -> None:
    hidden = _random((2, 5, 8), 0).requires_grad_()
    with fastembed.use_backend(backend):
        for dtype in (torch.int8, torch.uint8):
            assert not fastembed.pool_exits([hidden], mode=mode, out_dtype=dtype)[0][8].requires_grad


def test_gradcheck_of_selected_and_concatenated_tokens() -> None:
    hidden = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ranges = torch.tensor([[0, 5], [2, 4], [3, 5]])
    positions = torch.tensor([[0, 4, -1], [3, 2, 0], [4, 4, 4]])
    options: dict[str, Any] = {
        "ranges": ranges,
        "positions": positions,
        "dims": [3, 12],
        "mode": ["mean", "max", "cls"],
    }
    assert torch.autograd.gradcheck(lambda x: _flat(fastembed.pool_exits([x], **options)), hidden)
