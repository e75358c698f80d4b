"""The Triton qmatmul kernels, run by the mended interpreter, against the reference."""

import interpreter
import pytest
import torch
from hypothesis import given, settings
from qmatmul_layers import ALL_BITS, ZEROS, Layer, layer_of, layers_and_inputs, make_layer, oracle, random_x
from tolerance import assert_close_to_oracle
from torch import Tensor

import fastembed
from fastembed.ops.qmatmul import EPILOGUES

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


def on_triton(layer: Layer, x: Tensor) -> Tensor:
    with fastembed.use_backend("triton"):
        return layer(x)


def on_reference(layer: Layer, x: Tensor) -> Tensor:
    with fastembed.use_backend("reference"):
        return layer(x)


@settings(max_examples=20)
@given(
    case=layers_and_inputs(
        in_features=(1, 5, 37, 64, 200),
        out_features=(1, 65, 130),
        rows=(1, 16, 17, 70),
        group_sizes=(16, 48, 64, 128, 1024),
    )
)
def test_close_to_the_definition(case: tuple[Layer, Tensor]) -> None:
    layer, x = case
    y = on_triton(layer, x)
    assert y.dtype == x.dtype
    assert_close_to_oracle(y, on_reference(layer, x), oracle(layer, x))


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("group_size", [48, 256])
def test_integers_are_exact(bits: int, group_size: int) -> None:
    """With unit scales and activations that are their own codes, every result is an integer below 2**24."""
    layer = make_layer(200, 70, bits, group_size, symmetric=bits % 2 == 0, bias=None)
    layer.scales.fill_(1)
    x = torch.randint(-127, 128, (5, 200), generator=torch.Generator().manual_seed(bits)).float()
    x[:, 0] = 127
    assert torch.equal(on_triton(layer, x), on_reference(layer, x))


def test_rounding_of_activations_is_to_even() -> None:
    layer = make_layer(256, 64, bits=8, bias=None)
    x = (torch.arange(-128, 128) + 0.5)[None]
    x[0, 0] = 127
    assert_close_to_oracle(on_triton(layer, x), on_reference(layer, x), oracle(layer, x))


@pytest.mark.parametrize("zeros", ZEROS)
def test_split_over_blocks_in_any_order(zeros: str) -> None:
    layer, x = layer_of(zeros, 1500, 70, 3, 1600), random_x(3, 1500)
    with interpreter.program_order(2):
        y = on_triton(layer, x)
    with interpreter.program_order(3):
        assert torch.equal(on_triton(layer, x), y)
    assert torch.equal(on_triton(layer, x[1:2]), y[1:2])
    assert_close_to_oracle(y, on_reference(layer, x), oracle(layer, x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_not_finite_spoils_only_itself(bad: float) -> None:
    for epilogue in EPILOGUES:
        layer, x = make_layer(100, 70, epilogue=epilogue), random_x(4, 100)
        expected = on_triton(layer, x)
        x[2, 41] = bad
        y = on_triton(layer, x)
        assert y[2].isnan().all()
        y[2] = expected[2]
        assert torch.equal(y, expected)


@pytest.mark.parametrize("epilogue", ["gelu", "gelu_tanh", "silu"])
def test_epilogue_over_its_whole_range(epilogue: str) -> None:
    z = torch.cat([torch.linspace(-12, 12, 801), torch.tensor([0.0, -0.0, 1e-30, 80.0, -80.0])])
    layer = make_layer(16, len(z), bits=8, epilogue=epilogue)
    layer.bias = z
    x = torch.zeros(1, 16)
    error = (on_triton(layer, x)[0].double() - oracle(layer, x)[0]).abs()
    assert (error <= 3e-7 * z.abs().clamp(min=1)).all(), error.max()


@pytest.mark.parametrize(("in_features", "out_features"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("rows", [0, 3])
def test_no_features(in_features: int, out_features: int, rows: int) -> None:
    layer = make_layer(in_features, out_features)
    assert torch.equal(on_triton(layer, random_x(rows, in_features)), layer.bias.expand(rows, out_features))


def test_any_memory_layout() -> None:
    layer, x = make_layer(100, 70), random_x(5, 100)
    expected = on_triton(layer, x)
    assert torch.equal(on_triton(layer, x.T.contiguous().T), expected)
    assert torch.equal(on_triton(layer, torch.cat([x, x], 1)[:, :100]), expected)
    assert torch.equal(on_triton(layer, x[:, None]), expected[:, None])
