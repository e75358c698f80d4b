"""NV-Embed checkpoints of any size, with random weights."""

import torch
from torch import Tensor


def nv_embed_weights(
    dim: int = 24,
    latents: int = 10,
    heads: int = 2,
    head_dim: int = 32,
    mult: int = 4,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Random tensors under the released names."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float32) * std + mean).to(dtype)

    inner, hidden = heads * head_dim, mult * dim
    weights = {
        "latents": normal(latents, dim),
        "cross_attend_blocks.0.fn.to_q.weight": normal(inner, dim, std=2 * dim**-0.5),
        "cross_attend_blocks.0.fn.to_kv.weight": normal(2 * inner, dim, std=dim**-0.5),
        "cross_attend_blocks.0.fn.to_out.weight": normal(dim, inner, std=inner**-0.5),
        "cross_attend_blocks.1.fn.net.0.weight": normal(2 * hidden, dim, std=dim**-0.5),
        "cross_attend_blocks.1.fn.net.0.bias": normal(2 * hidden, std=0.1),
        "cross_attend_blocks.1.fn.net.2.weight": normal(dim, hidden, std=hidden**-0.5),
        "cross_attend_blocks.1.fn.net.2.bias": normal(dim, std=0.1),
    }
    for norm in ("0.norm", "0.norm_context", "1.norm"):
        weights[f"cross_attend_blocks.{norm}.weight"] = normal(dim, std=0.1, mean=1)
        weights[f"cross_attend_blocks.{norm}.bias"] = normal(dim, std=0.1)
    return weights
