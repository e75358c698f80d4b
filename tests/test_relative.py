"""Relative representations."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close_to_oracle
from torch.nn import functional as F

from fastembed import relative_representations, use_backend
from fastembed.ops._relative_torch import relative_representations as _op

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 24, generator=GENERATOR)
ANCHORS = torch.randn(9, 24, generator=GENERATOR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_cosines(isa: str, dtype: torch.dtype) -> None:
    x, anchors = X.to(dtype), ANCHORS.to(dtype)
    ours = relative_representations(x, anchors)
    assert ours.dtype == dtype
    oracle = F.cosine_similarity(x.double()[:, None], anchors.double()[None], dim=2)
    theirs = F.cosine_similarity(x[:, None], anchors[None], dim=2)
    assert_close_to_oracle(ours, theirs, oracle)


def test_a_rotated_and_scaled_space_gives_the_same() -> None:
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=GENERATOR)).Q
    torch.testing.assert_close(
        relative_representations(3 * X @ rotation, 0.5 * ANCHORS @ rotation),
        relative_representations(X, ANCHORS),
        atol=1e-5,
        rtol=0,
    )


def test_arrays_strides_zeros_and_gradients() -> None:
    expected = relative_representations(X, ANCHORS)
    np.testing.assert_array_equal(relative_representations(X.numpy(), ANCHORS.numpy()), expected)
    torch.testing.assert_close(relative_representations(X.mT.contiguous().mT, ANCHORS), expected)
    assert not relative_representations(torch.zeros(2, 24), ANCHORS).any()
    assert relative_representations(X[:0], ANCHORS).shape == (0, 9)
    inputs = (X[:3].double().requires_grad_(), ANCHORS[:2].double().requires_grad_())
    assert torch.autograd.gradcheck(relative_representations, inputs)
    torch.library.opcheck(_op.overload, (X, ANCHORS))
    compiled = torch.compile(relative_representations, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X, ANCHORS), expected)


@given(rows=st.integers(0, 130), anchors=st.integers(0, 40), dim=st.integers(1, 50), seed=st.integers(0, 2**32 - 1))
def test_every_level_is_as_exact_as_the_reference(isa: str, rows: int, anchors: int, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    arguments = (torch.randn(rows, dim, generator=generator), torch.randn(anchors, dim, generator=generator))
    ours = relative_representations(*arguments)
    with use_backend("reference"):
        theirs = relative_representations(*arguments)
        oracle = relative_representations(*(argument.double() for argument in arguments))
    assert_close_to_oracle(ours, theirs, oracle)
    if rows:
        assert torch.equal(relative_representations(arguments[0][-1:], arguments[1]), ours[-1:])


BAD: list[tuple[tuple[Any, Any], type[Exception], str]] = [
    ((X, ANCHORS[:, 1:]), ValueError, "anchors must have the 24 dims of x, got 23"),
    ((X[0], ANCHORS), ValueError, "x must have shape"),
    ((X, ANCHORS.double()), TypeError, "anchors must have the dtype of x"),
    ((X, ANCHORS.numpy()), TypeError, "must be all NumPy arrays or all tensors"),
    ((X.int(), ANCHORS), TypeError, "x must be"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_raises_one_clear_error(case: int) -> None:
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        relative_representations(*arguments)
