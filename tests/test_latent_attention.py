"""Attention between tokens and latents: the definition, its gradients, and the rules of an op."""

from typing import Any

import pytest
import torch
from attention_cases import assert_as_good_as_pytorch, make_case
from torch import Tensor

from fastembed import use_backend
from fastembed.ops.latent_attention import latent_attention
from fastembed.reference import latent as reference


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_close_to_the_definition(backend: str, masked: bool) -> None:
    with use_backend(backend):
        assert_as_good_as_pytorch(make_case(2, 5, 9, 12, 7, masked, torch.float32))


def test_the_definition_is_attention() -> None:
    case = make_case(2, 5, 9, 12, 7, False, torch.float64)
    out, lse = reference.attention(case.query, case.key, case.value, None, case.scale)
    expected = torch.nn.functional.scaled_dot_product_attention(case.query, case.key, case.value, scale=case.scale)
    torch.testing.assert_close(out, expected)
    scores = case.scale * case.query @ case.key.mT
    torch.testing.assert_close((scores - lse[..., None]).exp().sum(dim=-1), torch.ones_like(lse))


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_the_definition(masked: bool) -> None:
    """The backward that kernels are compared with is that of autograd."""
    case = make_case(2, 5, 9, 12, 7, masked, torch.float64)
    out, lse = reference.attention(case.query, case.key, case.value, case.keep, case.scale)
    tensors = (case.query, case.key, case.value, case.keep, out, lse)
    gradients = reference.attention_backward(case.grad, *tensors, case.scale)
    for ours, expected in zip(gradients, case.by_the_definition()[1:], strict=True):
        torch.testing.assert_close(ours, expected)


def test_gradcheck_of_the_op() -> None:
    case = make_case(1, 3, 4, 5, 2, False, torch.float64)
    inputs = [x.requires_grad_(True) for x in (case.query, case.key, case.value)]
    op = torch.ops.fastembed.latent_attention.default
    assert torch.autograd.gradcheck(lambda q, k, v: op(q, k, v, None, 0.3)[0], inputs)


def test_opcheck() -> None:
    case = make_case(2, 5, 9, 12, 7, True, torch.float32)
    inputs = [x.nan_to_num().requires_grad_(True) for x in (case.query, case.key, case.value)]
    torch.library.opcheck(torch.ops.fastembed.latent_attention.default, (*inputs, case.keep, 0.3))
    out, lse = reference.attention(case.query, case.key, case.value, case.keep, 0.3)
    tensors = (case.grad, *(x.detach() for x in inputs), case.keep, out, lse, 0.3)
    torch.library.opcheck(torch.ops.fastembed.latent_attention_backward.default, tensors)


def test_compiles_whole() -> None:
    case = make_case(2, 5, 9, 12, 7, True, torch.float32)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return latent_attention(q, k, v, case.keep, scale=0.3)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case.query, case.key, case.value), attend(case.query, case.key, case.value))


def test_no_keys_and_no_queries() -> None:
    x, none = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 0, 4)
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            assert torch.equal(latent_attention(x, none, none, scale=1.0), torch.zeros(1, 2, 3, 4))
            assert latent_attention(none, x, x, scale=1.0).shape == (1, 2, 0, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(5, 12)}, ValueError, r"query must have shape \[batch, heads, queries, features\], got"),
        ({"query": torch.zeros(2, 2, 5, 12).int()}, TypeError, "query must be floating point, got torch.int32"),
        ({"key": torch.zeros(2, 2, 9, 11)}, ValueError, r"key must have shape \[2, 2, keys, 12\], as query, got"),
        ({"value": torch.zeros(2, 2, 8, 7)}, ValueError, r"value must have shape \[2, 2, 9, value features\], as key"),
        ({"value": torch.zeros(2, 2, 9, 7).half()}, TypeError, "value must be torch.float32, as query, got"),
        ({"keep": torch.ones(2, 9)}, TypeError, "keep must be torch.bool, got torch.float32"),
        ({"keep": torch.ones(2, 8, dtype=torch.bool)}, ValueError, r"keep must have shape \[2, 9\], got \[2, 8\]"),
        ({"key": torch.zeros(2, 2, 9, 12, device="meta")}, ValueError, "key must be on cpu, where query is, got meta"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    case = make_case(2, 5, 9, 12, 7, True, torch.float32)
    arguments = {"query": case.query, "key": case.key, "value": case.value, "keep": case.keep, **change}
    with pytest.raises(error, match=message):
        latent_attention(**arguments, scale=0.3)
