"""The Triton latent-attention kernels, run by the mended interpreter, against the reference."""

from typing import Any

import interpreter
import pytest
import torch
from attention_cases import SIZES, assert_as_good_as_pytorch, assert_padding_does_not_show, make_case
from latent_models import (
    assert_folded_block_as_good_as_pytorch,
    assert_folded_heads_are_added,
    assert_learned_queries_take_one_launch,
    assert_only_its_sequence_suffers,
)
from torch import Tensor

import fastembed
from fastembed.nn import LatentAttentionPooling
from fastembed.ops.latent_attention import latent_attention
from fastembed.triton_kernels import latent as kernels

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_close_to_the_definition_with_gradients(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    with fastembed.use_backend("triton"):
        assert_as_good_as_pytorch(make_case(1 + sizes[0] % 2, *sizes, masked=sizes[0] % 2 == 1, dtype=dtype))


def test_in_any_order_of_programs() -> None:
    case = make_case(1, 70, 300, 20, 20, False, torch.bfloat16)
    with fastembed.use_backend("triton"):
        with interpreter.program_order(2):
            first = case.out_and_gradients()
        with interpreter.program_order(3):
            again = case.out_and_gradients()
    assert all(map(torch.equal, first, again))


def test_a_sequence_does_not_depend_on_its_batch() -> None:
    case = make_case(3, 20, 40, 24, 24, True, torch.bfloat16)
    with fastembed.use_backend("triton"):
        together = case.out_and_gradients()
        for row in range(3):
            alone = case.row(row).out_and_gradients()
            assert all(torch.equal(one[0], all_of_them[row]) for one, all_of_them in zip(alone, together, strict=True))


def test_padding_does_not_show() -> None:
    """With keys that fill more than a block."""
    with fastembed.use_backend("triton"):
        assert_padding_does_not_show(make_case(2, 5, 300, 20, 20, False, torch.bfloat16), 7, 300)
        assert_padding_does_not_show(make_case(2, 5, 70, 20, 20, True, torch.float32), 70, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_learned_queries_take_one_launch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    with fastembed.use_backend("triton"):
        assert_learned_queries_take_one_launch(dtype, monkeypatch)


def test_any_strides_and_no_batch() -> None:
    query, key, value = (torch.randn(2, 24, size).mT for size in (5, 9, 9))
    wide = torch.randn(1, 1, 5, 24).expand(3, 2, 5, 24)
    with fastembed.use_backend("triton"):
        expected = latent_attention(query.contiguous(), key.contiguous(), value.contiguous(), scale=0.2)
        assert torch.equal(latent_attention(query, key, value, scale=0.2), expected)
        ours = latent_attention(wide, key.expand(3, 2, 9, 24), value.expand(3, 2, 9, 24), scale=0.2)
    assert torch.equal(ours[0], ours[2])


@pytest.mark.parametrize(("heads", "latents"), [(1, 7), (3, 40), (2, 600)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_heads_are_added(heads: int, latents: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_folded_heads_are_added(kernels.attend_folded, heads, latents, dtype, monkeypatch)


def masks() -> Tensor:
    return torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    "settings",
    [
        {"heads": 2, "head_dim": 32},
        {
            "heads": 2,
            "direction": "latents_q",
            "residual": "none",
            "ffn": "gelu_tanh",
            "reduce": "first",
            "qkv_bias": True,
            "out_bias": True,
        },
        {"heads": 2, "direction": "latents_q", "concat_latents": True, "depth": 2, "ffn": "gelu", "reduce": "all"},
    ],
    ids=["NV-Embed", "SigLIP", "Perceiver"],
)
def test_training_of_the_module(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = LatentAttentionPooling(24, 6, normalize=False, **settings).train()
    x = torch.randn(3, 5, 24, requires_grad=True)

    def step() -> list[Tensor]:
        parameters = [x, *module.parameters()]
        y = module(x, masks())
        return [y, *torch.autograd.grad(y.square().sum(), parameters)]

    expected = step()
    with fastembed.use_backend("triton"):
        ours = step()
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[5, 0, 40, 1], [0]])
def test_the_folded_block(lengths: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    with fastembed.use_backend("triton"):
        assert_folded_block_as_good_as_pytorch(lengths, dtype, monkeypatch)


def test_a_token_that_is_not_finite_concerns_its_sequence_only() -> None:
    with fastembed.use_backend("triton"):
        assert_only_its_sequence_suffers()
