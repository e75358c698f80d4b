"""Search over codes on a real CUDA device: `pytest -m cuda`."""

import pytest
import torch

import fastembed
from fastembed import hamming_topk, pack_bits, sdc_encode, sdc_topk

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.usefixtures("gpu_backend"),
    pytest.mark.parametrize("gpu_backend", ["cuda"], indirect=True),
]


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
