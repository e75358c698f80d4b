"""csrc/latent/latent.cu through the whole Python path, against the reference."""

from typing import Any

import pytest
import torch
from attention_cases import SIZES, assert_as_good_as_pytorch, assert_padding_does_not_show, make_case
from latent_models import (
    assert_folded_block_as_good_as_pytorch,
    assert_folded_heads_are_added,
    assert_learned_queries_take_one_launch,
    assert_only_its_sequence_suffers,
    folded_block,
    in_double,
    nv_embed_weights,
)

import fastembed
from fastembed.nn import LatentAttentionPooling
from fastembed.ops import _latent_cuda
from fastembed.ops.latent import latent_pool
from fastembed.ops.latent_attention import latent_attention
from fastembed.reference import latent as reference

pytestmark = pytest.mark.usefixtures("simulated_cuda")


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_close_to_the_definition_with_gradients(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """With more keys and queries than a block has columns, and with features that are no multiple of anything."""
    assert_as_good_as_pytorch(make_case(1 + sizes[0] % 2, *sizes, masked=sizes[0] % 2 == 1, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_keys_than_are_gone_through_at_a_time(dtype: torch.dtype) -> None:
    assert_as_good_as_pytorch(make_case(1, 2, 1100, 8, 8, False, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [140, 300])
def test_with_little_shared_memory(
    small_shared_memory: None, keys: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_as_good_as_pytorch(make_case(1, 2, keys, 8, 8, False, dtype=dtype))
    assert_folded_heads_are_added(_latent_cuda.attend_folded, 2, keys, dtype, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_any_order(thread_order: str, copies: str, dtype: torch.dtype) -> None:
    """Two chunks of features, and one."""
    assert_as_good_as_pytorch(make_case(1, 3, 20, 72, 40, False, dtype))


def test_padding_does_not_show() -> None:
    """With keys that fill more than a block."""
    assert_padding_does_not_show(make_case(2, 2, 520, 8, 8, False, torch.bfloat16), 7, 513)
    assert_padding_does_not_show(make_case(2, 2, 70, 8, 8, True, torch.float32), 513, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_learned_queries_take_one_launch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_learned_queries_take_one_launch(dtype, monkeypatch)


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


@pytest.mark.parametrize(("dtype", "chunk"), [(torch.float32, 32), (torch.bfloat16, 64)])
def test_sanitized(small_shared_memory: None, dtype: torch.dtype, chunk: int) -> None:
    """Small, for the runs under sanitizers: two chunks of features, tails of everything, and rows nobody keeps."""
    assert_as_good_as_pytorch(make_case(2, 3, 9, chunk + 6, chunk + 3, True, dtype))


def test_two_blocks_of_weights_sanitized(small_shared_memory: None) -> None:
    assert_as_good_as_pytorch(make_case(1, 2, 140, 8, 8, False, torch.bfloat16))


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


def test_double_precision_has_no_kernel() -> None:
    x = torch.zeros(1, 1, 2, 8, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"latent_attention: backend 'cuda' does not take torch.float64"):
        latent_attention(x, x, x, scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[5, 0, 40, 1], [0]])
def test_the_folded_block(lengths: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_folded_block_as_good_as_pytorch(lengths, dtype, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_folded_block_in_any_order(thread_order: str, copies: str, dtype: torch.dtype) -> None:
    inputs = folded_block([3, 2], dim=36, latents=300, dtype=dtype)
    expected = reference.latent_pool(**in_double(inputs))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, exact in zip(latent_pool(**inputs), expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("heads", "latents"), [(1, 7), (3, 40), (2, 600)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_heads_are_added(heads: int, latents: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_folded_heads_are_added(_latent_cuda.attend_folded, heads, latents, dtype, monkeypatch)


def test_a_token_that_is_not_finite_concerns_its_sequence_only() -> None:
    assert_only_its_sequence_suffers()


def test_the_folded_module() -> None:
    """From the checkpoint to the pooled embedding, and offsets that are out of range."""
    module = LatentAttentionPooling.from_nv_embed(nv_embed_weights(dtype=torch.float32), heads=2)
    x, mask = torch.randn(3, 7, 24), torch.rand(3, 7) < 0.7
    with torch.no_grad():
        pooled = module(x, mask)
        with fastembed.use_backend("reference"):
            torch.testing.assert_close(pooled, module(x, mask), rtol=1e-4, atol=1e-5)
    inputs = folded_block([4, 3])
    expected = latent_pool(**inputs)
    inputs["cu_seqlens"] = torch.tensor([-5, 4, 700])
    assert all(map(torch.equal, latent_pool(**inputs), expected))


def test_folded_sanitized(small_shared_memory: None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = folded_block([2, 0, 1], dim=37, latents=5, dtype=dtype)
        assert all(result.isfinite().all() for result in latent_pool(**inputs))


def test_too_many_heads_for_a_launch(simulated_module: Any) -> None:
    arguments = (1, [1, 2**20, 1, 1, 8, 8], *[[0, 8, 8, 8]] * 3, [0, 0, 0], 1.0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="more than one launch takes"):
        simulated_module.latent_attention(*arguments)
