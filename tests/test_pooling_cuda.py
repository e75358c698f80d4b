"""Multi-exit pooling on a real CUDA device: `pytest -m cuda`."""

import pytest
import torch
from pooling_backward_cases import assert_agrees_with_the_reference
from test_pooling import DTYPES, Call, _flat, _random
from tolerance import assert_close_to_oracle

import fastembed
from fastembed.ops.pooling import MODES

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.usefixtures("gpu_backend"),
    pytest.mark.parametrize("gpu_backend", ["cuda"], indirect=True),
]


def check(call: Call) -> None:
    with fastembed.use_backend("cuda"):
        ours = call.ours()
    for our, same_dtype, exact in zip(_flat(ours), _flat(call.reference()), _flat(call.oracle()), strict=True):
        assert_close_to_oracle(our, same_dtype, exact)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [384, 301])
def test_padded(mode: str, dtype: torch.dtype, width: int) -> None:
    hidden = _random((5, 700, width), 0, dtype).cuda()
    mask = torch.rand(5, 700, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[3] = False
    mask = mask.cuda()
    hidden[~mask] = float("nan")
    check(Call([hidden, hidden.flip(0)[:, :, :64]], {"attention_mask": mask.flip(0) & mask, "mode": mode}))


@pytest.mark.parametrize("mode", MODES)
def test_packed(mode: str) -> None:
    offsets = torch.tensor([0, 0, 128, 129, 129, 800, 803]).cuda()
    check(Call([_random((803, 256), 2).cuda()], {"cu_seqlens": offsets, "mode": mode, "dims": [64, 256]}))


def test_in_a_cuda_graph() -> None:
    """Nothing in the call waits for the device or allocates outside PyTorch's pools."""
    hidden = _random((4, 300, 384), 3).cuda()
    mask = torch.ones(4, 300, dtype=torch.int64, device="cuda")
    with fastembed.use_backend("cuda"):
        expected = fastembed.pool_exits([hidden], mask)[0][384]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = fastembed.pool_exits([hidden], mask)[0][384]
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


def test_on_another_stream() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), fastembed.use_backend("cuda"):
        hidden = torch.ones(2, 500, 64, device="cuda")
        pooled = fastembed.pool_exits([hidden], normalize=False)[0][64]
    stream.synchronize()
    assert torch.equal(pooled, torch.ones(2, 64, device="cuda"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_backward(mode: str, backend: str) -> None:
    mask = (torch.rand(5, 300, generator=torch.Generator().manual_seed(1)) < 0.7).cuda()
    hidden = _random((5, 300, 384), 0, torch.bfloat16).cuda()
    call = Call([hidden, hidden[..., :64]], {"attention_mask": mask, "mode": mode, "dims": [[384, 64], [64]]})
    with fastembed.use_backend(backend):
        assert_agrees_with_the_reference(call)
