"""QuantLinear as a drop-in for nn.Linear, and the round-to-nearest quantiser that fills it."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastembed
from fastembed.nn import QuantLinear, QuantLinearGroup
from fastembed.quantization import quantize_rtn


def make_linear(in_features: int = 100, out_features: int = 70, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias)


@given(
    bits=st.integers(2, 8),
    group_size=st.sampled_from((16, 32, 64, 128)),
    symmetric=st.booleans(),
    shape=st.sampled_from(((1, 1), (5, 37), (70, 100), (64, 128))),
    offset=st.sampled_from((0.0, 1.0, -1.0)),
)
def test_rtn_errs_by_half_a_step(
    bits: int, group_size: int, symmetric: bool, shape: tuple[int, int], offset: float
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(bits)) + offset
    codes, scales, zeros = quantize_rtn(weight, bits, group_size, symmetric)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 1 << bits
    groups = torch.arange(shape[1]) // group_size
    steps = scales.float()[:, groups]
    midpoints = 1 << (bits - 1) if symmetric else zeros.float()[:, groups]
    # The scale's own rounding to float16 moves the far end of the range by up to 2**-11 of it.
    allowed = 0.5 * steps * (1 + 2.0**-10 * (1 << bits)) + 1e-7
    # Zero is a code, so the range's ends may be off by up to half a step more than what lies inside.
    assert ((codes.float() - midpoints) * steps - weight).abs().le(allowed + (0 if symmetric else 0.5 * steps)).all()


@given(
    group_size=st.sampled_from((16, 64, -1)),
    shape=st.sampled_from(((1, 1), (5, 37), (70, 100))),
    offset=st.sampled_from((0.0, 1.0)),
    scale_dtype=st.sampled_from((torch.float16, torch.bfloat16, torch.float32)),
)
def test_one_bit_keeps_the_means_on_both_sides(
    group_size: int, shape: tuple[int, int], offset: float, scale_dtype: torch.dtype
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + offset
    columns = shape[1] if group_size == -1 else group_size
    codes, scales, zeros = quantize_rtn(weight, 1, group_size, scale_dtype=scale_dtype)
    assert zeros.dtype == scales.dtype == scale_dtype
    rounding = 8 * torch.finfo(scale_dtype).eps
    for group, start in enumerate(range(0, shape[1], columns)):
        piece = weight[:, start : start + columns]
        above = codes[:, start : start + columns].bool()
        for value, side in ((0, ~above), (1, above)):
            mean = (piece * side).sum(1) / side.sum(1).clamp(min=1)
            got = scales[:, group].float() * (value - zeros[:, group].float())
            mean, got = mean[side.any(1)], got[side.any(1)]
            torch.testing.assert_close(got, mean, rtol=rounding, atol=rounding * (1 + offset))


def test_one_symmetric_bit_is_the_sign_times_the_mean_magnitude() -> None:
    weight = make_linear().weight.detach()
    layer = QuantLinear.from_linear(make_linear(), bits=1, group_size=-1, symmetric=True, scale_dtype=torch.float32)
    expected = torch.where(weight > 0, 1.0, -1.0) * weight.abs().mean(dim=1, keepdim=True)
    torch.testing.assert_close(layer.dequantize(), expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_rtn_represents_zero_exactly(symmetric: bool) -> None:
    weight = make_linear().weight.detach()
    weight[:, ::3] = 0
    weight[7] = 0
    layer = make_linear()
    layer.weight.data = weight
    dequantized = QuantLinear.from_linear(layer, bits=4, symmetric=symmetric).dequantize()
    assert torch.equal(dequantized[:, ::3], weight[:, ::3])
    assert torch.equal(dequantized[7], weight[7])


def test_rtn_keeps_values_that_are_on_its_grid() -> None:
    """Quantising what is already quantised changes nothing."""
    linear = make_linear()
    once = QuantLinear.from_linear(linear, bits=4, symmetric=True)
    # Both ends of the symmetric range, so that the second pass finds the same step.
    linear.weight.data = once.dequantize()
    twice = QuantLinear.from_linear(linear, bits=4, symmetric=True)
    torch.testing.assert_close(twice.dequantize(), once.dequantize(), rtol=2**-10, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rtn_refuses_weights_that_are_not_finite(bad: float) -> None:
    linear = make_linear()
    linear.weight.data[3, 4] = bad
    with pytest.raises(ValueError, match="weight must be finite"):
        QuantLinear.from_linear(linear)


def test_rtn_refuses_weights_beyond_float16_scales() -> None:
    linear = make_linear()
    linear.weight.data *= 1e9
    with pytest.raises(ValueError, match="weight is too large"):
        QuantLinear.from_linear(linear)


@pytest.mark.parametrize(("bits", "allowed"), [(4, 0.09), (8, 0.012)])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_near_the_float_layer(isa: str, bits: int, allowed: float, symmetric: bool, bias: bool) -> None:
    linear = make_linear(bias=bias)
    layer = QuantLinear.from_linear(linear, bits=bits, symmetric=symmetric)
    x = torch.randn(2, 9, 100)
    assert (layer(x) - linear(x)).norm() <= allowed * linear(x).norm()
    assert (layer.dequantize() - linear.weight).norm() <= allowed * linear.weight.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_activations_leave_only_the_error_of_the_weights(isa: str, dtype: torch.dtype) -> None:
    layer = QuantLinear.from_linear(make_linear(), activations="float")
    x = torch.randn(9, 100, dtype=dtype)
    expected = nn.functional.linear(x.float(), layer.dequantize(), layer.bias)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x).float(), expected, rtol=8 * rounding, atol=8 * rounding)
    layer.activations = "int8"
    assert not torch.equal(layer(x).float(), expected)


def test_error_falls_with_every_bit() -> None:
    linear, x = make_linear(), torch.randn(40, 100)
    errors = [
        (QuantLinear.from_linear(linear, bits=bits, group_size=32)(x) - linear(x)).norm().item() for bits in range(1, 9)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < linear(x).norm()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("zeros", ["none", "codes", "fractional"])
@pytest.mark.parametrize("group_size", [32, -1])
def test_from_codes(isa: str, bits: int, zeros: str, group_size: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    groups = 1 if group_size == -1 else 4
    codes = torch.randint(0, 1 << bits, (70, 100), dtype=torch.uint8, generator=generator)
    scales = torch.rand(70, groups, generator=generator) + 0.1
    points = {
        "none": None,
        "codes": torch.randint(0, 1 << bits, (70, groups), dtype=torch.uint8, generator=generator),
        "fractional": torch.rand(70, groups, generator=generator) * (1 << bits),
    }[zeros]
    bias = torch.randn(70, generator=generator)
    layer = QuantLinear.from_codes(codes, scales, points, bias, bits=bits, group_size=group_size)
    columns = torch.arange(100) // (100 if group_size == -1 else 32)
    middle = 0.5 if bits == 1 else 1 << (bits - 1)
    minus = middle if points is None else points.float()[:, columns]
    assert torch.equal(layer.dequantize(), scales[:, columns] * (codes.float() - minus))
    x = torch.randn(5, 100, generator=generator)
    expected = nn.functional.linear(x, layer.dequantize(), bias)
    # Activations are rounded by at most 1 / 254 of their largest.
    allowed = x.abs().amax(1, keepdim=True) / 254 * layer.dequantize().abs().sum(1) + 1e-3
    assert ((layer(x) - expected).abs() <= allowed).all()
    assert layer.symmetric == (points is None)


def test_from_codes_refuses_what_does_not_fit() -> None:
    codes, scales = torch.zeros(6, 32, dtype=torch.uint8), torch.ones(6, 2)
    settings = {"bits": 2, "group_size": 16}
    with pytest.raises(TypeError, match=r"codes must be uint8 \[out_features, in_features\], got torch.int64"):
        QuantLinear.from_codes(codes.long(), scales, None, **settings)
    with pytest.raises(ValueError, match="codes must be at most 3 for 2 bits, got 4"):
        QuantLinear.from_codes(codes + 4, scales, None, **settings)
    with pytest.raises(ValueError, match=r"scales must have shape \[6, 2\], got \[6, 1\]"):
        QuantLinear.from_codes(codes, scales[:, :1], None, **settings)
    with pytest.raises(TypeError, match=r"zeros must be uint8 or torch.float32 like the scales, got torch.float16"):
        QuantLinear.from_codes(codes, scales, scales.half(), **settings)
    with pytest.raises(ValueError, match=r"bias must have shape \[6\], got \[5\]"):
        QuantLinear.from_codes(codes, scales, None, torch.zeros(5), **settings)
    with pytest.raises(TypeError, match=r"scales must be float16, bfloat16 or float32, got torch.float64"):
        QuantLinear.from_codes(codes, scales.double(), None, **settings)


def test_from_codes_takes_the_bias_of_a_linear() -> None:
    linear = make_linear()
    codes, scales, zeros = quantize_rtn(linear.weight.detach(), 4, 64)
    layer = QuantLinear.from_codes(codes, scales, zeros, linear.bias, bits=4, group_size=64)
    x = torch.randn(3, 100)
    assert torch.equal(layer(x), QuantLinear.from_linear(linear)(x))
    with pytest.raises(TypeError, match=r"bias must be float32, bfloat16 or float16, got torch.int64"):
        QuantLinear.from_codes(codes, scales, zeros, linear.bias.long(), bits=4, group_size=64)


def test_residual_is_added_after_the_epilogue() -> None:
    layer = QuantLinear.from_linear(make_linear(), epilogue="gelu")
    x, residual = torch.randn(3, 100), torch.randn(3, 70)
    torch.testing.assert_close(layer(x, residual), layer(x) + residual)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x, residual).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_layer_and_input_are_free(dtype: torch.dtype) -> None:
    layer = QuantLinear.from_linear(make_linear().to(dtype))
    assert layer.bias.dtype == dtype
    for x_dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert layer(torch.randn(3, 100, dtype=x_dtype)).dtype == x_dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bits", [1, 4])
def test_casting_the_model_keeps_the_weight(dtype: torch.dtype, bits: int) -> None:
    layer = QuantLinear.from_linear(make_linear(), bits=bits, scale_dtype=torch.float32)
    weight = layer.dequantize()
    layer.to(dtype)
    assert layer.scales.dtype == torch.float32
    assert torch.equal(layer.dequantize(), weight)


def test_autocast_decides_the_output_dtype() -> None:
    layer = QuantLinear.from_linear(make_linear())
    x = torch.randn(3, 100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert torch.equal(layer(x), layer(x.bfloat16()))
    assert layer(x).dtype == torch.float32


def test_under_a_trainable_head() -> None:
    torch.manual_seed(0)
    embedding = nn.Parameter(torch.randn(4, 100))
    model = nn.Sequential(QuantLinear.from_linear(make_linear(), epilogue="gelu"), nn.Linear(70, 1))
    model(embedding).sum().backward()
    assert embedding.grad.abs().sum() > 0
    assert model[1].weight.grad is not None
    assert [name for name, _ in model.named_parameters()] == ["1.weight", "1.bias"]


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_state_dict_fits_a_fresh_layer(bits: int, symmetric: bool) -> None:
    layer = QuantLinear.from_linear(make_linear(), bits=bits, symmetric=symmetric, group_size=32)
    for device, assign in (("cpu", False), ("meta", True)):
        fresh = QuantLinear(100, 70, bits=bits, symmetric=symmetric, group_size=32, device=device)
        fresh.load_state_dict(layer.state_dict(), assign=assign)
        x = torch.randn(3, 100)
        assert torch.equal(fresh(x), layer(x))


def test_state_of_another_configuration_is_refused() -> None:
    state = QuantLinear.from_linear(make_linear()).state_dict()
    for other in (
        {"bits": 8},
        {"group_size": 32},
        {"symmetric": True},
        {"bias": False},
        {"scale_dtype": torch.float32},
        {"fractional_zeros": True},
    ):
        with pytest.raises(RuntimeError, match=r"state_dict"):
            QuantLinear(100, 70, **other).load_state_dict(state)


def test_safetensors_round_trip(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    layer = QuantLinear.from_linear(make_linear())
    safetensors.save_model(layer, str(tmp_path / "layer.safetensors"))
    fresh = QuantLinear(100, 70)
    safetensors.load_model(fresh, str(tmp_path / "layer.safetensors"))
    x = torch.randn(3, 100)
    assert torch.equal(fresh(x), layer(x))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(clone: Callable[[QuantLinear], QuantLinear]) -> None:
    layer = QuantLinear.from_linear(make_linear(), epilogue="gelu")
    x = torch.randn(3, 100)
    assert torch.equal(clone(layer)(x), layer(x))


@pytest.mark.parametrize("epilogue", ["gelu", "gelu_tanh", "relu", "silu"])
def test_epilogue_may_be_set_later(epilogue: str) -> None:
    layer = QuantLinear.from_linear(make_linear())
    x = torch.randn(3, 100)
    plain = layer(x)
    layer.epilogue = epilogue
    after = {
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda y: nn.functional.gelu(y, approximate="tanh"),
        "relu": nn.functional.relu,
        "silu": nn.functional.silu,
    }[epilogue](plain)
    torch.testing.assert_close(layer(x), after, rtol=1e-6, atol=1e-6)
    layer.epilogue = "swish"
    with pytest.raises(ValueError, match="epilogue must be one of"):
        layer(x)


def test_size_is_accounted_for() -> None:
    layer = QuantLinear.from_linear(make_linear(256, 128), bits=4, group_size=64)
    weights = 256 * 128
    assert layer.nbytes == weights // 2 + weights // 64 * 3 + 128 * 4
    assert layer.bits_per_weight == pytest.approx(4 + 24 / 64)
    assert (
        layer.bits_per_weight > QuantLinear.from_linear(make_linear(256, 128), bits=4, symmetric=True).bits_per_weight
    )


def test_repr_says_what_it_is() -> None:
    layer = QuantLinear.from_linear(make_linear(), bits=8, group_size=128, symmetric=True, epilogue="gelu")
    assert repr(layer) == (
        "QuantLinear(in_features=100, out_features=70, bias=True, bits=8, group_size=128, symmetric=True, "
        "activations='int8', epilogue='gelu')"
    )


def test_training_mode_is_kept_and_the_linear_is_not_changed() -> None:
    linear = make_linear().eval()
    before = copy.deepcopy(linear.state_dict())
    layer = QuantLinear.from_linear(linear)
    assert not layer.training
    assert layer.bias.data_ptr() != linear.bias.data_ptr()
    assert all(torch.equal(before[name], tensor) for name, tensor in linear.state_dict().items())


def make_group(**settings: object) -> QuantLinearGroup:
    torch.manual_seed(0)
    sizes, bits, group_sizes = (70, 64, 130), (8, 2, 8), (64, 32, -1)
    layers = [
        QuantLinear.from_linear(nn.Linear(100, size), bits=b, group_size=g, **settings)
        for size, b, g in zip(sizes, bits, group_sizes, strict=True)
    ]
    return QuantLinearGroup(layers)


@pytest.mark.parametrize("activations", ["int8", "float", "both"])
@pytest.mark.parametrize("shape", [(100,), (1, 100), (2, 9, 100), (300, 100), (0, 100)])
def test_a_group_gives_what_its_layers_give(isa: str, activations: str, shape: tuple[int, ...]) -> None:
    group = make_group()
    for layer in group.layers[:2] if activations == "both" else group.layers:
        layer.activations = activations if activations != "both" else "float"
    x = torch.randn(shape)
    for ours, layer in zip(group(x), group.layers, strict=True):
        assert torch.equal(ours, layer(x))


def test_a_group_on_threads(thread_counts: tuple[int, ...]) -> None:
    layers = [QuantLinear.from_linear(nn.Linear(512, size)) for size in (1100, 512)]
    group, x = QuantLinearGroup(layers), torch.randn(250, 512)
    results = []
    for threads in thread_counts:
        torch.set_num_threads(threads)
        results.append(group(x))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_a_group_trains_compiles_and_takes_autocast() -> None:
    group = make_group()
    x = torch.randn(3, 100, requires_grad=True)
    sum(y.sum() for y in group(x)).backward()
    assert x.grad is not None
    compiled = torch.compile(group, fullgraph=True, backend="aot_eager")
    x = x.detach()
    assert all(torch.equal(a, b) for a, b in zip(compiled(x), group(x), strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(y.dtype == torch.bfloat16 for y in group(x))
    assert all(torch.equal(a, b) for a, b in zip(copy.deepcopy(group)(x), group(x), strict=True))


def test_a_group_refuses_what_does_not_fit() -> None:
    layer = QuantLinear(100, 70)
    with pytest.raises(TypeError, match="layers must be QuantLinears, got a Linear"):
        QuantLinearGroup([layer, nn.Linear(100, 70)])
    with pytest.raises(ValueError, match="the same in_features"):
        QuantLinearGroup([layer, QuantLinear(64, 70)])
    with pytest.raises(ValueError, match="the same in_features"):
        QuantLinearGroup([])
    with pytest.raises(ValueError, match="100 features in its last dimension"):
        QuantLinearGroup([layer])(torch.zeros(3, 64))


CHANGES: dict[str, Callable[[QuantLinear, QuantLinear], object]] = {
    "a new buffer": lambda layer, other: setattr(layer, "codes", other.codes),
    "a buffer's new memory": lambda layer, other: setattr(layer.scales, "data", other.scales.clone()),
    "new values": lambda layer, other: layer.codes.copy_(other.codes),
    "a state_dict": lambda layer, other: layer.load_state_dict(other.state_dict()),
    "a state_dict that is assigned": lambda layer, other: layer.load_state_dict(other.state_dict(), assign=True),
    "no bias": lambda layer, other: setattr(layer, "bias", None),
    "another bias": lambda layer, other: setattr(layer, "bias", other.bias),
    "a strided bias": lambda layer, other: setattr(layer, "bias", torch.stack([other.bias] * 2, dim=1)[:, 0]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_weight_is_seen(change: str) -> None:
    """What a layer prepared for its first call must not outlive the tensors it was prepared from."""
    layer = QuantLinear.from_linear(make_linear())
    torch.manual_seed(1)
    other = QuantLinear.from_linear(nn.Linear(100, 70))
    x = torch.randn(3, 100)
    with torch.no_grad():
        before = layer(x)
        CHANGES[change](layer, other)
        after = layer(x)
        with fastembed.use_backend("reference"):
            expected = layer(x)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, expected)


def test_a_change_to_a_weight_that_does_not_fit_is_refused() -> None:
    layer = QuantLinear.from_linear(make_linear())
    layer(torch.randn(3, 100))
    layer.scales = layer.scales[:, :1]
    with pytest.raises(ValueError, match="scales must have shape"):
        layer(torch.randn(3, 100))


def test_a_bias_that_learns_after_the_first_call() -> None:
    layer = QuantLinear.from_linear(make_linear())
    x = torch.randn(3, 100)
    layer(x)
    layer.bias.requires_grad_()
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((70,), 3.0))


@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_that_is_elsewhere_is_refused(bias: bool) -> None:
    """By address alone, no kernel could tell."""
    layer = QuantLinear(100, 70, bias=bias, device="meta")
    with pytest.raises(ValueError, match="x must be on meta, where the weight is, got cpu"):
        layer(torch.randn(3, 100))


def test_reference_backend_can_be_forced() -> None:
    layer = QuantLinear.from_linear(make_linear())
    x = torch.randn(3, 100)
    with fastembed.use_backend("reference"):
        expected = layer(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_compile_and_export() -> None:
    layer = QuantLinear.from_linear(make_linear(), epilogue="gelu").eval()
    x = torch.randn(3, 100)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(x), layer(x))
    assert torch.equal(torch.jit.trace(layer, x, check_trace=False)(x + 1), layer(x + 1))
    batch = torch.export.Dim("batch")
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},)).module()
    assert torch.equal(exported(torch.ones(7, 100)), layer(torch.ones(7, 100)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "bits must be 1 to 8, got 0"),
        ({"bits": 9}, "bits must be 1 to 8, got 9"),
        ({"bits": 4.5}, "bits must be 1 to 8, got 4.5"),
        ({"group_size": 40}, "group_size must be a positive multiple of 16, got 40"),
        ({"group_size": -2}, "group_size must be a positive multiple of 16, got -2"),
        ({"activations": "int4"}, "activations must be 'int8' or 'float', got 'int4'"),
        ({"epilogue": "swish"}, "epilogue must be one of"),
    ],
)
def test_bad_settings(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantLinear.from_linear(make_linear(), **arguments)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"linear must be an nn.Linear, got Conv1d"):
        QuantLinear.from_linear(nn.Conv1d(3, 3, 1))
    layer = QuantLinear.from_linear(make_linear())
    with pytest.raises(ValueError, match="x must have 100 features in its last dimension"):
        layer(torch.randn(3, 99))
    with pytest.raises(TypeError, match=r"x must be float32, bfloat16 or float16, got torch.int64"):
        layer(torch.ones(3, 100, dtype=torch.long))
    with pytest.raises(ValueError, match=r"residual must have shape \[3, 70\], got \[1, 70\]"):
        layer(torch.randn(3, 100), torch.randn(1, 70))
    with pytest.raises(TypeError, match=r"residual must be torch.float32, got torch.float64"):
        layer(torch.randn(3, 100), torch.randn(3, 70).double())
