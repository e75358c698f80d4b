"""Imported layers stand for exactly what their source dequantises to."""

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import fastembed
from fastembed.integrations.checkpoints import from_awq, from_gguf, from_gptq, from_hqq, from_quanto

K, N, GROUP = 128, 96, 32


def grid(bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [K, N], zero points [groups, N] and scales [groups, N], as checkpoints orient them."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (K, N), generator=generator)
    zeros = torch.randint(1, 1 << bits, (K // GROUP, N), generator=generator)
    return codes, zeros, torch.rand(K // GROUP, N, generator=generator).half() + 0.1


def packed(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Fields of the last dimension into 32-bit words, lowest bits first: the packing written out in NumPy."""
    fields = values.numpy().astype(np.uint32).reshape(len(values), -1, 32 // bits)
    words = np.zeros(fields.shape[:2], dtype=np.uint32)
    for index in range(32 // bits):
        words |= fields[:, :, index] << np.uint32(bits * index)
    return torch.from_numpy(words.view(np.int32).copy())


def dequantised(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(K) // GROUP
    return ((codes - zeros[rows]) * scales.float()[rows]).T


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("offset", [0, 1])
def test_gptq(bits: int, offset: int) -> None:
    codes, zeros, scales = grid(bits)
    layer = from_gptq(
        packed(codes.T, bits).T,
        packed(zeros - offset, bits),
        scales,
        torch.arange(K) // GROUP,
        torch.zeros(N),
        bits=bits,
        zero_offset=offset,
    )
    assert torch.equal(layer.dequantize(), dequantised(codes, zeros, scales))
    assert layer(torch.randn(3, K)).shape == (3, N)


def test_gptq_with_a_zero_point_beyond_the_codes() -> None:
    codes, zeros, scales = grid(4)
    zeros[0, 0] = 16  # stored as 15
    layer = from_gptq(packed(codes.T, 4).T, packed(zeros - 1, 4), scales)
    assert torch.equal(layer.dequantize(), dequantised(codes, zeros, scales))


def test_gptq_with_a_shorter_last_group() -> None:
    codes, zeros, scales = grid(4)
    groups = torch.arange(K) // 48  # and not 128 / 3
    zeros, scales = zeros[:3], scales[:3]
    layer = from_gptq(packed(codes.T, 4).T, packed(zeros, 4), scales, groups, zero_offset=0)
    assert torch.equal(layer.dequantize(), ((codes - zeros[groups]) * scales.float()[groups]).T)


def test_symmetric_gptq_keeps_no_zero_points() -> None:
    codes, zeros, scales = grid(4)
    zeros[:] = 8
    layer = from_gptq(packed(codes.T, 4).T, packed(zeros - 1, 4), scales)
    assert layer.symmetric
    assert torch.equal(layer.dequantize(), dequantised(codes, zeros, scales))


def test_gptq_in_activation_order_is_refused() -> None:
    codes, zeros, scales = grid(4)
    arguments = packed(codes.T, 4).T, packed(zeros, 4), scales
    with pytest.raises(ValueError, match="activation order"):
        from_gptq(*arguments, torch.randperm(K) // GROUP)
    with pytest.raises(ValueError, match="bits must be 2, 4 or 8, got 3"):
        from_gptq(*arguments, bits=3)
    with pytest.raises(TypeError, match="qweight and qzeros must be int32 matrices"):
        from_gptq(arguments[0].long(), *arguments[1:])
    with pytest.raises(ValueError, match="scales must have a row for every group"):
        from_gptq(*arguments[:2], scales[:3])


def test_awq() -> None:
    codes, zeros, scales = grid(4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def awq(values: torch.Tensor) -> torch.Tensor:
        return packed(values.unflatten(1, (-1, 8))[:, :, order].flatten(1), 4)

    layer = from_awq(awq(codes), awq(zeros), scales, torch.ones(N))
    assert torch.equal(layer.dequantize(), dequantised(codes, zeros, scales))
    assert torch.equal(layer.bias, torch.ones(N))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, None])
def test_hqq(bits: int, group: int | None) -> None:
    hqq = pytest.importorskip("hqq.core.quantize")
    torch.manual_seed(0)
    config = hqq.BaseQuantizeConfig(nbits=bits, group_size=group, axis=1)
    theirs = hqq.HQQLinear(nn.Linear(K, N), config, compute_dtype=torch.float32, device="cpu", del_orig=False)
    layer = from_hqq(theirs)
    torch.testing.assert_close(layer.dequantize(), theirs.dequantize(), rtol=1e-6, atol=1e-7)
    assert layer.bits == bits


def test_a_model_of_imported_layers_is_saved_and_loaded(tmp_path: Path) -> None:
    hqq = pytest.importorskip("hqq.core.quantize")
    model = nn.Sequential(nn.Linear(K, N), nn.GELU())
    skeleton = copy.deepcopy(model)
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=32, axis=1)
    model[0] = hqq.HQQLinear(model[0], config, compute_dtype=torch.float32, device="cpu")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, hqq.HQQLinear):
            model.set_submodule(name, from_hqq(layer))
    fastembed.save_quantized(model, tmp_path)
    x = torch.randn(3, K)
    assert torch.equal(fastembed.load_quantized(tmp_path, skeleton)(x), model(x))


def test_hqq_along_output_features_is_refused() -> None:
    hqq = pytest.importorskip("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=32, axis=0)
    with pytest.raises(ValueError, match="axis=1"):
        from_hqq(hqq.HQQLinear(nn.Linear(K, N), config, compute_dtype=torch.float32, device="cpu"))


@pytest.mark.parametrize("kind", ["qint8", "qint4", "qint2"])
def test_quanto(kind: str) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N))
    quanto.quantize(model, weights=getattr(quanto, kind))
    with pytest.raises(TypeError, match="layer must be frozen"):
        from_quanto(model[0])
    quanto.freeze(model)
    layer = from_quanto(model[0])
    torch.testing.assert_close(layer.dequantize(), model[0].weight.dequantize(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_gguf(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    tensor_type = gguf.GGMLQuantizationType[kind]
    weight = np.random.default_rng(0).standard_normal((N, K)).astype(np.float32)
    data = gguf.quants.quantize(weight, tensor_type)
    layer = from_gguf(SimpleNamespace(data=data, tensor_type=tensor_type))
    assert np.array_equal(layer.dequantize().numpy(), gguf.quants.dequantize(data, tensor_type))


def test_other_gguf_types_are_refused() -> None:
    gguf = pytest.importorskip("gguf")
    with pytest.raises(ValueError, match="tensor must be of type Q4_0 or Q8_0, got Q6_K"):
        from_gguf(SimpleNamespace(data=None, tensor_type=gguf.GGMLQuantizationType.Q6_K))
