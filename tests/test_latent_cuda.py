"""Attention between tokens and latents on a real CUDA device: `pytest -m cuda`."""

from dataclasses import replace

import pytest
import torch
from attention_cases import SIZES, Case, assert_as_good_as_pytorch, make_case

import fastembed
from fastembed.nn import LatentAttentionPooling

pytestmark = pytest.mark.cuda


def on_device(case: Case) -> Case:
    names = ("query", "key", "value", "keep", "grad")
    tensors = {name: getattr(case, name) for name in names}
    return replace(case, **{name: None if tensor is None else tensor.cuda() for name, tensor in tensors.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [*SIZES, (1000, 512, 4096, 4096), (65, 3000, 64, 64)])
def test_close_to_the_definition_with_gradients(gpu_backend: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    with fastembed.use_backend(gpu_backend):
        assert_as_good_as_pytorch(on_device(make_case(2, *sizes, masked=sizes[0] % 2 == 1, dtype=dtype)))


@pytest.mark.parametrize("direction", ["tokens_q", "latents_q"])
def test_the_module_is_what_it_is_on_the_cpu(gpu_backend: str, direction: str) -> None:
    torch.manual_seed(0)
    reduce = "masked_mean" if direction == "tokens_q" else "mean_latents"
    module = LatentAttentionPooling(64, 10, 2, 96, direction=direction, reduce=reduce).eval()
    assert module.folds()
    x, mask = torch.randn(3, 70, 64), torch.rand(3, 70) < 0.7
    with torch.no_grad():
        expected = module(x, mask)
        with fastembed.use_backend(gpu_backend):
            pooled = module.cuda()(x.cuda(), mask.cuda())
    torch.testing.assert_close(pooled.cpu(), expected, rtol=1e-4, atol=1e-5)
