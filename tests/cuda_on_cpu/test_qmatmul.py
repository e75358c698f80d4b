"""csrc/qmatmul/qmatmul.cu through the whole Python path, against the reference."""

import pytest
import torch
from hypothesis import given, settings
from qmatmul_layers import ALL_BITS, DTYPES, ZEROS, Layer, layer_of, layers_and_inputs, make_layer, oracle, random_x
from tolerance import assert_close_to_oracle
from torch import Tensor

import fastembed
from fastembed.ops.qmatmul import EPILOGUES
from fastembed.reference import qmatmul as reference

pytestmark = pytest.mark.usefixtures("simulated_cuda")

# csrc/qmatmul/qmatmul.cu: one mma's tokens, the last row that few_tokens takes, a tile of many_tokens.
OPERAND, FEW, TILE = 8, 32, 128


def check(layer: Layer, x: Tensor) -> None:
    y = layer(x)
    assert y.dtype == x.dtype
    with fastembed.use_backend("reference"):
        theirs = layer(x)
    assert_close_to_oracle(y, theirs, oracle(layer, x))


@settings(max_examples=40)
@given(
    case=layers_and_inputs(
        in_features=(1, 4, 5, 16, 37, 64, 100, 192, 300),
        out_features=(1, 15, 64, 65, 72, 130, 192),
        rows=(1, 7, OPERAND, 9, FEW, FEW + 1, TILE + 3),
        group_sizes=(16, 32, 48, 64, 128, 1024),
    )
)
def test_close_to_the_definition(case: tuple[Layer, Tensor]) -> None:
    layer, x = case
    check(layer, x)


def check_integers(bits: int, rows: int, group_size: int) -> None:
    """With unit scales and activations that are their own codes, every result is an integer below 2**24."""
    layer = make_layer(200, 130, bits, group_size, symmetric=bits % 2 == 0, bias=None)
    layer.scales.fill_(1)
    x = torch.randint(-127, 128, (rows, 200), generator=torch.Generator().manual_seed(bits)).float()
    x[:, 0] = 127
    with fastembed.use_backend("reference"):
        expected = layer(x)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("rows", [1, 13, FEW + 8])
@pytest.mark.parametrize("group_size", [48, 256])
def test_integers_are_exact(bits: int, rows: int, group_size: int) -> None:
    check_integers(bits, rows, group_size)


@pytest.mark.parametrize("rows", [FEW, FEW + 8])
def test_with_little_shared_memory(small_shared_memory: None, rows: int) -> None:
    check_integers(8, rows, 48)


@pytest.mark.parametrize("bits", [1, 6])
@pytest.mark.parametrize("rows", [1, FEW + 8])
def test_integers_are_exact_in_any_order(thread_order: str, copies: str, bits: int, rows: int) -> None:
    check_integers(bits, rows, 48)


@pytest.mark.parametrize(("rows", "zeros"), [(2, "none"), (9, "fractional"), (FEW + 2, "codes")])
def test_sanitized(rows: int, zeros: str) -> None:
    """Small, for the runs under sanitizers: tails of panels, stages and groups, and a row of unaligned activations."""
    layer = layer_of(zeros, 76, 72, 3, 48, epilogue="gelu")
    check(layer, random_x(rows, 77)[:, 1:])
    check(layer_of(zeros, 5, 3, 8, 16), random_x(rows, 5, dtype=torch.bfloat16))


@pytest.mark.parametrize("code", [0, 255])
@pytest.mark.parametrize("group_size", [128, 2048])
@pytest.mark.parametrize("rows", [3, FEW + 1])
def test_extreme_products(code: int, group_size: int, rows: int) -> None:
    """Sums as large as they get, counted from a float's bits in short groups and converted in long ones."""
    codes = torch.full((64, 2048), code, dtype=torch.uint8)
    zeros = torch.full((64, 2048 // group_size), 255 - code, dtype=torch.uint8)
    scales = torch.ones(64, 2048 // group_size)
    arrays = (reference.pack_codes(codes, 8), reference.to_panels(scales), reference.to_panels(zeros))
    layer = Layer(*arrays, None, None, 8, group_size, 64)
    for x in (torch.full((rows, 2048), 127.0), torch.full((rows, 2048), -127.0)):
        assert torch.equal(layer(x), ((2 * code - 255) * x.sum(dim=1, keepdim=True)).expand(rows, 64))


@pytest.mark.parametrize("rows", [1, FEW])
@pytest.mark.parametrize("zeros", ZEROS)
def test_split_over_blocks(thread_order: str, rows: int, zeros: str) -> None:
    """Long rows are cut where no group ends."""
    check(layer_of(zeros, 64 * 33 + 20, 70, 2, 1600), random_x(rows, 64 * 33 + 20))


@pytest.mark.parametrize("rows", [FEW, TILE])
def test_a_row_depends_neither_on_others_nor_on_thread_order(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within what one kernel takes: a few rows alone run another one than many."""
    layer = make_layer(1100, 70, epilogue="silu")
    x = random_x(rows, 1100)
    y = layer(x)
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", "desc")
    assert torch.equal(layer(x), y)
    part = slice(3, 5) if rows <= FEW else slice(3, FEW + 4)
    assert torch.equal(layer(x[part]), y[part])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [7, FEW + 7])
def test_a_token_that_is_not_finite_spoils_only_itself(dtype: torch.dtype, rows: int) -> None:
    for epilogue, bad in zip(EPILOGUES, ("nan", "inf", "-inf", "nan", "inf"), strict=True):
        layer = make_layer(100, 70, epilogue=epilogue)
        x = random_x(rows, 100, dtype=dtype)
        expected = layer(x)
        x[2, 41] = float(bad)
        y = layer(x)
        assert y[2].isnan().all()
        y[2] = expected[2]
        assert torch.equal(y, expected)


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1e-30, 1e30, 3e38])
def test_extreme_magnitudes(magnitude: float) -> None:
    layer = make_layer(64, 64, bits=8, bias=None)
    layer.scales.mul_(2**-6)
    x = random_x(5, 64).clamp(-1, 1) * magnitude
    y = layer(x)
    with fastembed.use_backend("reference"):
        torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=0 if magnitude >= 1e-30 else 1e-38)


@pytest.mark.parametrize("epilogue", ["gelu", "gelu_tanh", "silu"])
def test_epilogue_over_its_whole_range(epilogue: str) -> None:
    z = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, 100.0, -100.0, 1e30, -1e30])])
    layer = make_layer(16, len(z), bits=8, epilogue=epilogue)
    layer.bias = z
    y = layer(torch.zeros(1, 16))[0]
    error = (y.double() - reference.apply_epilogue(z.double(), epilogue)).abs()
    assert (error <= 3e-7 * z.abs().clamp(min=1)).all(), error.max()


@pytest.mark.parametrize(("in_features", "out_features"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("rows", [0, 3, FEW + 1])
def test_no_features(in_features: int, out_features: int, rows: int) -> None:
    layer = make_layer(in_features, out_features)
    assert torch.equal(layer(random_x(rows, in_features)), layer.bias.expand(rows, out_features))


def test_arrays_that_lie_as_no_kernel_reads_them() -> None:
    layer, x = make_layer(100, 72), random_x(5, 100)
    expected = layer(x)
    for name in ("codes", "scales", "zeros", "bias"):
        tensor = getattr(layer, name)
        shifted = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view_as(tensor).copy_(tensor)
        assert torch.equal(layer(x, **{name: shifted}), expected)
    assert torch.equal(layer(x.T.contiguous().T), expected)
    assert torch.equal(layer(x[:, None]), expected[:, None])


def test_too_many_rows_for_a_launch(simulated_module: object) -> None:
    arguments = (0, 0, 2**40, 16, 16, 0, 0, 0, 0, 0, 4, 16, 0, 0, 64, 0, 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="more than one launch takes"):
        simulated_module.qlinear(*arguments)
