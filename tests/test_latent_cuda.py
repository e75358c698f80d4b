"""Attention between tokens and latents on a real CUDA device: `pytest -m cuda`."""

from dataclasses import replace

import pytest
import torch
from attention_cases import SIZES, Case, assert_as_good_as_pytorch, make_case
from latent_models import nv_embed_weights

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
    if gpu_backend == "cuda" and dtype == torch.float32:
        pytest.skip("float32 has no tensor-core product of its own precision")
    with fastembed.use_backend(gpu_backend):
        assert_as_good_as_pytorch(on_device(make_case(2, *sizes, masked=sizes[0] % 2 == 1, dtype=dtype)))


def test_the_module_is_what_it_is_on_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    module = LatentAttentionPooling.from_nv_embed(nv_embed_weights(dtype=torch.float32), heads=2)
    x, mask = torch.randn(3, 70, 24), torch.rand(3, 70) < 0.7
    with torch.no_grad():
        expected = module(x, mask)
        pooled = module.cuda()(x.cuda(), mask.cuda())
    torch.testing.assert_close(pooled.cpu(), expected, rtol=1e-4, atol=1e-5)
