"""Gradients of pooling by the backend in use, for the suite of every backend, and what they must be."""

import math

import pytest
import torch
from test_pooling import Call, _flat, _random
from tolerance import assert_close_to_oracle
from torch import Tensor

import fastembed

# A maximum that is reached twice, infinities and NaN among them.
reached_twice = pytest.mark.parametrize(
    "values", [[1.0, 3.0, 3.0], [-math.inf, -math.inf, -math.inf], [1.0, math.nan, math.nan]]
)


def gradients(call: Call, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Of the hidden states (in `dtype`, if given), when random gradients of the embeddings come back."""
    hidden_states = [hidden.detach().to(dtype or hidden.dtype).requires_grad_() for hidden in call.hidden_states]
    out_dtype = call.options.get("out_dtype")
    outputs = _flat(fastembed.pool_exits(hidden_states, **{**call.options, "out_dtype": dtype or out_dtype}))
    rounded = out_dtype or call.hidden_states[0].dtype  # the gradients are the same ones in any dtype
    backward = [_random(tuple(out.shape), i, rounded).to(out) for i, out in enumerate(outputs)]
    return list(torch.autograd.grad(outputs, hidden_states, backward))


def assert_agrees_with_the_reference(call: Call) -> None:
    ours = gradients(call)
    with fastembed.use_backend("reference"):
        reference, oracle = gradients(call), gradients(call, torch.float64)
    for our, same_dtype, exact, hidden in zip(ours, reference, oracle, call.hidden_states, strict=True):
        assert our.dtype == hidden.dtype
        assert our.shape == hidden.shape
        assert_close_to_oracle(our, same_dtype, exact, factor=3.0)


def assert_gradient_goes_to_the_first(values: list[float], length: int, dtype: torch.dtype = torch.float32) -> None:
    """Of the `values`, which end a sequence of so many tokens, to the one that torch.max finds."""
    tokens = torch.tensor([-math.inf] * (length - len(values)) + values, dtype=dtype)
    hidden = tokens.view(1, -1, 1).repeat(1, 1, 21).requires_grad_()
    fastembed.pool_exits([hidden], mode="max", normalize=False)[0][21].sum().backward()
    expected = torch.zeros(1, length, 21, dtype=dtype)
    expected[:, tokens.max(dim=0).indices] = 1
    assert torch.equal(hidden.grad, expected)
