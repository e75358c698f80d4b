"""csrc/latent/latent.cu through the whole Python path, against the reference."""

from typing import Any

import pytest
import torch
from attention_cases import SIZES, assert_as_good_as_pytorch, make_case

from fastembed.nn import LatentAttentionPooling
from fastembed.ops.latent_attention import latent_attention

pytestmark = pytest.mark.usefixtures("simulated_cuda")


@pytest.mark.parametrize(("sizes", "dtype"), list(zip(SIZES, (torch.bfloat16, torch.float16) * 2, strict=True)))
def test_close_to_the_definition_with_gradients(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """With more keys and queries than a block has columns, and with features that are no multiple of anything."""
    assert_as_good_as_pytorch(make_case(1 + sizes[0] % 2, *sizes, masked=sizes[0] % 2 == 1, dtype=dtype))


def test_in_any_order(thread_order: str, copies: str) -> None:
    """Two chunks of features, and one."""
    assert_as_good_as_pytorch(make_case(1, 3, 20, 72, 40, False, torch.bfloat16))


def test_thread_order_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(1, 66, 20, 24, 24, False, torch.bfloat16)
    first = case.out_and_gradients()
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", "desc")
    assert all(map(torch.equal, case.out_and_gradients(), first))


def test_a_sequence_does_not_depend_on_its_batch() -> None:
    case = make_case(3, 20, 40, 24, 24, True, torch.bfloat16)
    together = case.out_and_gradients()
    alone = case.row(1).out_and_gradients()
    assert all(torch.equal(one[0], all_of_them[1]) for one, all_of_them in zip(alone, together, strict=True))


def test_sanitized() -> None:
    """Small, for the runs under sanitizers: two chunks of features, tails of everything, and rows nobody keeps."""
    assert_as_good_as_pytorch(make_case(2, 3, 9, 70, 67, True, torch.bfloat16))


def test_strides_and_alignments() -> None:
    query, key, value = (torch.randn(2, 24, size).bfloat16().mT for size in (5, 9, 9))
    expected = latent_attention(query.contiguous(), key.contiguous(), value.contiguous(), scale=0.2)
    assert torch.equal(latent_attention(query, key, value, scale=0.2), expected)
    shifted = torch.empty(key.numel() + 1, dtype=key.dtype)[1:].view(2, 9, 24).copy_(key)
    assert torch.equal(latent_attention(query, shifted, value, scale=0.2), expected)
    ours = latent_attention(query.expand(3, 2, 5, 24), key, value, scale=0.2)
    assert torch.equal(ours, expected.expand(3, 2, 5, 24))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_query_that_is_not_finite_spoils_only_itself(bad: float) -> None:
    case = make_case(1, 5, 9, 12, 7, False, torch.bfloat16)
    expected = latent_attention(case.query, case.key, case.value, scale=1.0)
    case.query[0, 1, 2, 3] = bad
    out = latent_attention(case.query, case.key, case.value, scale=1.0)
    assert out[0, 1, 2].isnan().all()
    out[0, 1, 2] = expected[0, 1, 2]
    assert torch.equal(out, expected)


def test_no_keys_and_no_queries() -> None:
    x, none = torch.randn(1, 2, 3, 8).bfloat16(), torch.randn(1, 2, 0, 8).bfloat16()
    assert torch.equal(latent_attention(x, none, none, scale=1.0), torch.zeros_like(x))
    assert latent_attention(none, x, x, scale=1.0).shape == (1, 2, 0, 8)


def test_training_of_the_module() -> None:
    torch.manual_seed(0)
    module = LatentAttentionPooling(24, 6, heads=2, head_dim=32, normalize=False).bfloat16().train()
    x = torch.randn(3, 5, 24).bfloat16().requires_grad_(True)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    module(x, mask).square().sum().backward()
    assert x.grad is not None
    assert x.grad[0, :3].abs().sum() > 0
    assert x.grad[0, 3:].abs().sum() == 0
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_float32_has_no_tensor_cores() -> None:
    x = torch.zeros(1, 1, 2, 8)
    with pytest.raises(TypeError, match=r"latent_attention: backend 'cuda' does not take torch.float32"):
        latent_attention(x, x, x, scale=1.0)


def test_too_many_heads_for_a_launch(simulated_module: Any) -> None:
    arguments = (1, [1, 2**20, 1, 1, 8, 8], *[[0, 8, 8, 8]] * 3, [0, 0, 0], 1.0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="more than one launch takes"):
        simulated_module.latent_attention(*arguments)
