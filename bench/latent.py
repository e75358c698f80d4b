"""NV-Embed's latent-attention pooling beside its released computation, and its relatives: small heads, which are not
folded, and SigLIP's learned query.

Random weights of the released shapes. The error is 1 - cosine to float64, and the tolerances are the goals: 1e-6 in
float32, 1e-5 in bfloat16. Peak extra memory is that of the process during one call, weights not counted.
"""

import copy
import ctypes
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastembed.integrations.attention_heads import find_attention_heads
from fastembed.nn import LatentAttentionPooling
from fastembed.reference.latent import nv_embed_pooling

from . import Case, Context, Faster, Reached, Workload, optional_import
from .harness.environment import without_gradients
from .harness.workload import OURS

siglip = optional_import("transformers.models.siglip.modeling_siglip")

RELEASED = "released, PyTorch SDPA"
CACHED = "keys and values cached"
OURS_INT8 = "fastembed, 8-bit W1"
OURS_BF16 = "fastembed, bfloat16"
TOLERANCE = {RELEASED: 1e-6, CACHED: 1e-6, OURS: 1e-6, OURS_INT8: 1e-3, OURS_BF16: 1e-5}
HEADS = 8
BLOCK = "cross_attend_blocks"
TRANSFORMERS = "transformers"


def cases() -> Iterator[Case]:
    yield Case("width 1024, 512 latents, 8 heads of 1024, 4 x 128 tokens", _pooling(1024, 4, 128))
    yield Case("width 4096, 512 latents, 8 heads of 4096, 512 tokens", _pooling(4096, 1, 512))
    yield Case("not folded: width 1024, 512 latents, 8 heads of 128, 4 x 128 tokens", _not_folded)
    if siglip is not None:
        yield Case("learned query: SigLIP's head, width 1152, 16 heads of 72, 8 x 729 tokens", _learned_query)


def _pooling(width: int, batch: int, length: int) -> Callable[[Context], Workload]:
    def setup(context: Context) -> Workload:
        if context.quick:
            return _workload(64, 32, 2, 8)
        return _workload(width, 512, batch, length)

    return setup


def _workload(width: int, latents: int, batch: int, length: int) -> Workload:
    weights = _weights(width, latents)
    torch.manual_seed(1)
    x = torch.randn(batch, length, width)
    x[..., 7] *= 20  # one channel far larger than the others, as hidden states have it
    x = x.bfloat16().float()
    mask = torch.ones(batch, length)
    pooling = LatentAttentionPooling.from_nv_embed(weights, HEADS).fold()
    quantized = LatentAttentionPooling.from_nv_embed(weights, HEADS).quantize(8).fold()
    # The weights are bfloat16 numbers, so that one float64 result serves both dtypes.
    half = LatentAttentionPooling.from_nv_embed({name: w.bfloat16() for name, w in weights.items()}, HEADS).fold()
    low = x.bfloat16()
    with torch.no_grad():
        layer: Any = pooling.layers[0]
        keys, values = (kept.expand(batch, -1, -1, -1) for kept in layer.keys_values(pooling.latents))
    providers = {
        OURS: lambda: pooling(x, mask),
        OURS_INT8: lambda: quantized(x, mask),
        OURS_BF16: lambda: half(low, mask),
        RELEASED: lambda: nv_embed_pooling(x, mask, weights, HEADS),
        CACHED: lambda: _with_cached(x, mask, weights, keys, values),
    }
    providers = {name: without_gradients(call) for name, call in providers.items()}
    expected = _in_double(x, weights)
    memory = {name: _peak_memory(providers[name]) for name in (OURS, OURS_INT8, RELEASED)}

    def error(_: str, result: Tensor) -> float:
        return float(1 - F.cosine_similarity(result.double(), expected).min())

    modules = {OURS: (pooling, x), OURS_INT8: (quantized, x), OURS_BF16: (half, low)}
    alone = sum(_same_alone(module, hidden) for module, hidden in modules.values()) / len(modules)
    accuracy = [
        Reached(f"times the accuracy asked of {name}, 1 - cosine {TOLERANCE[name]:g}", 1.0,
                TOLERANCE[name] / max(1e-16, error(name, providers[name]())))
        for name in (OURS, OURS_BF16)
    ]  # fmt: skip
    operations = pooling.arithmetic(batch * length, batch)
    return Workload(
        providers=providers,
        verify=error,
        tolerance=TOLERANCE,
        amount=operations["folded"],
        unit="op",
        demands={"float32": operations["folded"]},
        goals=[
            Faster(RELEASED, 4.0),
            Faster(CACHED, 2.7),
            Faster(RELEASED, 10.0, OURS_INT8),
            Reached(f"times less extra memory than {RELEASED}", 5.0, memory[RELEASED] / max(1, memory[OURS])),
            Reached(f"times less, {OURS_INT8}", 5.0, memory[RELEASED] / max(1, memory[OURS_INT8])),
            *accuracy,
            Reached("of the dtypes give a row alone the bits it has in a batch", 1.0, alone),
        ],
        rounds=3 if width > 1024 else 7,
    )


@torch.no_grad()
def _same_alone(module: LatentAttentionPooling, x: Tensor) -> bool:
    """Whether a sequence has the same result, bit for bit, by itself and beside others."""
    row = x[:1]
    mask = torch.ones(len(x) + 1, x.shape[1])
    return torch.equal(module(row, mask[:1])[0], module(torch.cat([row, x.flip(1)]), mask)[0])


def _not_folded(context: Context) -> Workload:
    """Heads so small that folding would be more arithmetic: PyTorch's own attention, and its share of the limit."""
    width, latents, head_dim, batch, length = (64, 32, 8, 2, 8) if context.quick else (1024, 512, 128, 4, 128)
    weights = _weights(width, latents, head_dim)
    torch.manual_seed(1)
    x, mask = torch.randn(batch, length, width), torch.ones(batch, length)
    pooling = LatentAttentionPooling.from_nv_embed(weights, HEADS)
    expected = _in_double(x, weights)
    operations = pooling.arithmetic(batch * length, batch)["folded"]
    return Workload(
        providers={
            OURS: without_gradients(lambda: pooling(x, mask)),
            RELEASED: without_gradients(lambda: nv_embed_pooling(x, mask, weights, HEADS)),
        },
        verify=lambda _, result: float(1 - F.cosine_similarity(result.double(), expected).min()),
        tolerance=TOLERANCE[OURS],
        amount=operations,
        unit="op",
        demands={"float32": operations},
        goals=[Faster(RELEASED, 1.3)],
    )


def _learned_query(context: Context) -> Workload:
    """The pooling head of SigLIP so400m on the patches of 384 x 384 pixels."""
    width, heads, batch, length = (32, 2, 2, 8) if context.quick else (1152, 16, 8, 729)
    torch.manual_seed(0)
    config = siglip.SiglipVisionConfig(
        hidden_size=width, intermediate_size=width * 4304 // 1152, num_attention_heads=heads
    )
    theirs = siglip.SiglipMultiheadAttentionPoolingHead(config).eval()
    (head,) = find_attention_heads(torch.nn.Sequential(theirs))
    ours = head.pooling.eval()
    x = torch.randn(batch, length, width)
    with torch.no_grad():
        expected = copy.deepcopy(theirs).double()(x.double())
    operations = ours.arithmetic(batch * length, batch)["folded"]
    return Workload(
        providers={OURS: without_gradients(lambda: ours(x)), TRANSFORMERS: without_gradients(lambda: theirs(x))},
        verify=lambda _, result: float(1 - F.cosine_similarity(result.double(), expected).min()),
        tolerance=TOLERANCE[OURS],
        amount=operations,
        unit="op",
        demands={"float32": operations},
        goals=[Faster(TRANSFORMERS, 4.0)],
    )


def _weights(width: int, latents: int, head_dim: int | None = None) -> dict[str, Tensor]:
    """A checkpoint whose scores spread as trained ones do, with 8 heads, of the width each if nothing else is said."""
    torch.manual_seed(0)
    inner, hidden = HEADS * (head_dim or width), 4 * width
    shapes = {
        "latents": (latents, width),
        f"{BLOCK}.0.fn.to_q.weight": (inner, width),
        f"{BLOCK}.0.fn.to_kv.weight": (2 * inner, width),
        f"{BLOCK}.0.fn.to_out.weight": (width, inner),
        f"{BLOCK}.1.fn.net.0.weight": (2 * hidden, width),
        f"{BLOCK}.1.fn.net.0.bias": (2 * hidden,),
        f"{BLOCK}.1.fn.net.2.weight": (width, hidden),
        f"{BLOCK}.1.fn.net.2.bias": (width,),
    }
    weights = {}
    for name, shape in shapes.items():
        std = 1.0 if name == "latents" else 0.1 if len(shape) == 1 else shape[1] ** -0.5
        weights[name] = torch.empty(shape).normal_(std=std)
    for norm in ("0.norm", "0.norm_context", "1.norm"):
        weights[f"{BLOCK}.{norm}.weight"] = torch.empty(width).normal_(1.0, 0.1)
        weights[f"{BLOCK}.{norm}.bias"] = torch.empty(width).normal_(std=0.1)
    for tensor in weights.values():
        tensor.copy_(tensor.bfloat16())
    return weights


def _with_cached(x: Tensor, mask: Tensor, weights: dict[str, Tensor], keys: Tensor, values: Tensor) -> Tensor:
    """The released computation with keys and values of the latents [B, H, L, d_h] kept from call to call."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{BLOCK}.{name}.weight"], weights[f"{BLOCK}.{name}.bias"])

    query = F.linear(norm(x, "0.norm"), weights[f"{BLOCK}.0.fn.to_q.weight"])
    attended = F.scaled_dot_product_attention(query.unflatten(-1, (HEADS, -1)).transpose(1, 2), keys, values)
    y = F.linear(attended.transpose(1, 2).flatten(2), weights[f"{BLOCK}.0.fn.to_out.weight"]) + x
    name = f"{BLOCK}.1.fn.net"
    hidden = F.linear(norm(y, "1.norm"), weights[f"{name}.0.weight"], weights[f"{name}.0.bias"])
    first, gates = hidden.chunk(2, dim=-1)
    z = F.linear(first * F.gelu(gates), weights[f"{name}.2.weight"], weights[f"{name}.2.bias"]) + y
    return F.normalize((z * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True), dim=-1)


@torch.no_grad()
def _in_double(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The released computation in float64, a head or a part of the feed-forward at a time: 6 GB do not fit twice."""
    batch, _, width = x.shape
    rows = x.double().flatten(0, 1)

    def norm(x: Tensor, name: str) -> Tensor:
        affine = weights[f"{BLOCK}.{name}.weight"].double(), weights[f"{BLOCK}.{name}.bias"].double()
        return F.layer_norm(x, (width,), *affine)

    context, normed, y = norm(weights["latents"].double(), "0.norm_context"), norm(rows, "0.norm"), rows.clone()
    heads = zip(
        weights[f"{BLOCK}.0.fn.to_q.weight"].chunk(HEADS),
        *(part.chunk(HEADS) for part in weights[f"{BLOCK}.0.fn.to_kv.weight"].chunk(2)),
        weights[f"{BLOCK}.0.fn.to_out.weight"].chunk(HEADS, dim=1),
        strict=True,
    )
    for to_query, to_key, to_value, to_out in heads:
        scores = (normed @ to_query.double().T) @ (context @ to_key.double().T).T / len(to_query) ** 0.5
        y += scores.softmax(-1) @ (context @ to_value.double().T) @ to_out.double().T
    normed, z = norm(y, "1.norm"), y + weights[f"{BLOCK}.1.fn.net.2.bias"].double()
    parts = zip(
        *(part.chunk(8) for part in weights[f"{BLOCK}.1.fn.net.0.weight"].chunk(2)),
        *(part.chunk(8) for part in weights[f"{BLOCK}.1.fn.net.0.bias"].chunk(2)),
        weights[f"{BLOCK}.1.fn.net.2.weight"].chunk(8, dim=1),
        strict=True,
    )
    for value_weight, gate_weight, value_bias, gate_bias, last in parts:
        first = F.linear(normed, value_weight.double(), value_bias.double())
        gates = F.linear(normed, gate_weight.double(), gate_bias.double())
        z += (first * F.gelu(gates)) @ last.double().T
    return F.normalize(z.unflatten(0, (batch, -1)).mean(dim=1), dim=-1)


def _peak_memory(call: Callable[[], Tensor]) -> int:
    """Most resident bytes of the process during a call, those before it not counted."""
    call()
    gc.collect()
    # What malloc has kept from the call before would be used again and not be seen.
    ctypes.CDLL(None).malloc_trim(0)
    # 5 sets the peak back to what is resident now (proc(5)).
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
