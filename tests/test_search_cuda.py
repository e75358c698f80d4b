"""Search over codes on a real CUDA device: `pytest -m cuda`."""

import pytest
import torch

import fastembed
from fastembed import hamming_topk, pack_bits, sdc_encode, sdc_topk
from fastembed.backends import unavailable_reason

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def cuda_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    if (reason := unavailable_reason("cuda")) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("queries", [1, 8, 100])
@pytest.mark.parametrize("bits", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("k", [1, 10, 1000])
def test_exact(queries: int, bits: int, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, c = (torch.randn(rows, 384, generator=generator).cuda() for rows in (queries, 50_000))
    mask = torch.rand(50_000, generator=generator).cuda() < 0.5
    if bits == 0:
        q, c, search = pack_bits(q), pack_bits(c), hamming_topk
    else:
        q, c, search = sdc_encode(q, bits), sdc_encode(c, bits), sdc_topk
    for chosen in ({}, {"mask": mask}):
        with fastembed.use_backend("cuda"):
            ours = search(q, c, k, **chosen)
        with fastembed.use_backend("reference"):
            expected = search(q, c, k, **chosen)
        assert torch.equal(ours[0], expected[0])
        assert torch.equal(ours[1], expected[1])
