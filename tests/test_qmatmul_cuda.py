"""Low-bit linear layers on a real CUDA device: `pytest -m cuda`."""

import pytest
import torch
from qmatmul_layers import ALL_BITS, DTYPES, Layer, make_layer, oracle, random_x
from tolerance import assert_close_to_oracle
from torch import Tensor

import fastembed

pytestmark = pytest.mark.cuda


def on_device(layer: Layer) -> Layer:
    return Layer(*(value.cuda() if isinstance(value, Tensor) else value for value in layer.positional()))


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("rows", [1, 9, 33, 500])
@pytest.mark.parametrize("dtype", DTYPES)
def test_close_to_the_definition(gpu_backend: str, bits: int, rows: int, dtype: torch.dtype) -> None:
    layer, x = make_layer(768, 1100, bits, epilogue="gelu"), random_x(rows, 768, dtype=dtype)
    with fastembed.use_backend(gpu_backend):
        y = on_device(layer)(x.cuda()).cpu()
    with fastembed.use_backend("reference"):
        theirs = layer(x)
    assert_close_to_oracle(y, theirs, oracle(layer, x))


@pytest.mark.parametrize("rows", [1, 200])
def test_in_a_cuda_graph(gpu_backend: str, rows: int) -> None:
    """Nothing in the call waits for the device or allocates outside PyTorch's pools."""
    layer, x = on_device(make_layer(4096, 256)), random_x(rows, 4096).cuda()
    with fastembed.use_backend(gpu_backend):
        expected = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)
