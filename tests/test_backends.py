"""Which backend an op takes for a device and a dtype, what is said of one that is missing, and forward mode."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from latent_models import folded_block
from torch import Tensor
from torch.autograd import forward_ad

import fastembed
from fastembed import _native, backends
from fastembed.nn import LatentAttentionPooling, QuantLinear
from fastembed.ops.latent import latent_pool
from fastembed.ops.latent_attention import _latent_attention
from fastembed.ops.pooling import _pool_exits, pool_exits


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch sees an H100; Triton is there, CUDA kernels are not."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(_native, "cuda", None)


def kernels(*architectures: int, devices: int = 1) -> SimpleNamespace:
    """A compiled module, hashable as a module is."""

    class Module(SimpleNamespace):
        __hash__ = object.__hash__

    return Module(device_count=lambda: devices, architectures=list(architectures))


def chosen(device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> tuple[str, ...]:
    return tuple(op._choose(device, dtype) for op in (_latent_attention, _pool_exits))


@pytest.mark.usefixtures("gpu")
def test_a_gpu_takes_compiled_kernels_then_triton_then_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen() == ("triton", "triton")
    monkeypatch.setattr(_native, "cuda", kernels(800, 900, 1000))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert chosen(dtype=dtype) == ("cuda", "cuda")
    assert chosen(dtype=torch.float64) == ("reference", "reference")
    monkeypatch.setattr(_native, "cuda", None)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert chosen() == ("reference", "reference")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("capability", "runs"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), False), ((12, 0), True)]
)
def test_a_gpu_that_kernels_were_not_compiled_for(
    capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(_native, "cuda", kernels(800, 1000))
    assert chosen()[0] == ("cuda" if runs else "triton")
    if not runs:
        message = rf"compiled for compute capability 8\.0, 10\.0, and this GPU has {capability[0]}\.{capability[1]}"
        with pytest.raises(RuntimeError, match=message), fastembed.use_backend("cuda"):
            pass


@pytest.mark.usefixtures("gpu")
def test_what_is_said_of_a_backend_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="'cuda' is not available: the CUDA kernels were not compiled"):
        backends._require_available("cuda")
    monkeypatch.setattr(_native, "cuda", kernels(900, devices=0))
    with pytest.raises(RuntimeError, match="'cuda' is not available: no CUDA driver or device"):
        backends._require_available("cuda")
    with fastembed.use_backend("triton"), pytest.raises(RuntimeError, match="but the tensors are on cpu"):
        chosen("cpu")
    with fastembed.use_backend("triton"), pytest.raises(TypeError, match=r"does not take torch\.float64"):
        chosen(dtype=torch.float64)


def test_a_device_without_kernels_is_left_to_pytorch() -> None:
    assert chosen("cpu", torch.float32) == ("cpu", "cpu")
    assert chosen("mps", torch.float32) == ("reference", "reference")


_linear = QuantLinear.from_linear(torch.nn.Linear(64, 8))
_quantized_head = LatentAttentionPooling(64, 8, 2, 64).quantize().eval()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: pool_exits([x])[0][64],
        lambda x: pool_exits([x], mode=["mean", "max"])[0][128],
        _linear,
        lambda x: latent_pool(**{**folded_block([4], dim=64), "x": x[0]})[0],
        lambda x: _latent_attention(x[None], x[None], x[None], None, 1.0)[0],
        lambda x: fastembed.pack_bits(x[0]),
        _quantized_head,  # PyTorch's attention raises; the folded kernels would give zeros
    ],
    ids=["pool_exits", "pool_modes", "qlinear", "latent_pool", "latent_attention", "pack_bits", "quantized head"],
)
def test_forward_mode_raises_instead_of_giving_zeros(call: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 4, 64)
    with pytest.raises(NotImplementedError, match="forward"):
        torch.func.jvp(call, (x,), (x,))
    with pytest.raises(NotImplementedError, match="forward"), forward_ad.dual_level(), torch.no_grad():
        call(forward_ad.make_dual(x, x))
    with forward_ad.dual_level():  # what has no tangent is not concerned
        assert not call(x).isnan().any()
