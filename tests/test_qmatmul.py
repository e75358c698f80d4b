"""The low-bit linear op: layout, kernels at every instruction-set level against the reference, contracts of an op."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from isa_levels import supported_isa_levels
from qmatmul_layers import ALL_BITS, DTYPES, ZEROS, Layer, make_layer, oracle, random_x
from tolerance import assert_close_to_oracle
from torch import Tensor

import fastembed
from fastembed._native import core
from fastembed.ops.qmatmul import ACTIVATIONS, EPILOGUES, dequantize_weight
from fastembed.reference import qmatmul as reference

# Around the tile of 4 input features, the registers of 16 and 64, and more than one block and one panel.
IN_FEATURES = (1, 3, 4, 5, 16, 37, 64, 100, 192, 384, 1100)
OUT_FEATURES = (1, 2, 15, 16, 17, 63, 64, 65, 130, 192)
ROWS = (1, 2, 3, 4, 5, 6, 7, 12, 13, 17, 18, 19, 70)


@given(
    bits=st.integers(1, 8),
    rows=st.sampled_from(OUT_FEATURES),
    columns=st.sampled_from(IN_FEATURES),
    seed=st.integers(0, 99),
)
def test_packing_round_trips(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)
    packed = reference.pack_codes(codes, bits)
    assert packed.shape == (-(-rows // 64), -(-columns // 4), 32 * bits)
    assert packed.is_contiguous()
    assert torch.equal(reference.unpack_codes(packed, bits, rows, columns), codes)


def test_packed_layout_is_the_documented_one() -> None:
    """Files hold this layout: it must not change unnoticed."""
    codes = torch.zeros(64, 8, dtype=torch.uint8)
    codes[17, 6] = 0b101  # tile 1, lane 0, second feature of the lane; second quad, third of it: field 6
    packed = reference.pack_codes(codes, 3)
    assert packed.nonzero().tolist() == [[0, 1, 1 * 24 + 2]]
    assert packed[0, 1, 26] == 0b101 << (6 * 3 - 2 * 8)


@given(
    in_features=st.sampled_from(IN_FEATURES),
    out_features=st.sampled_from(OUT_FEATURES),
    rows=st.sampled_from(ROWS),
    bits=st.sampled_from(ALL_BITS),
    group_size=st.sampled_from((16, 32, 64, 128, 1024)),
    zeros=st.sampled_from(ZEROS),
    scale_dtype=st.sampled_from(DTYPES),
    residual=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    bias=st.sampled_from((None, *DTYPES)),
    epilogue=st.sampled_from(EPILOGUES),
    activations=st.sampled_from(ACTIVATIONS),
)
def test_close_to_the_definition(
    isa: str,
    in_features: int,
    out_features: int,
    rows: int,
    bits: int,
    group_size: int,
    zeros: str,
    scale_dtype: torch.dtype,
    residual: bool,
    dtype: torch.dtype,
    bias: torch.dtype | None,
    epilogue: str | None,
    activations: str,
) -> None:
    layer = make_layer(
        in_features,
        out_features,
        bits,
        group_size,
        symmetric=zeros == "none",
        fractional=zeros == "fractional",
        scale_dtype=scale_dtype,
        bias=bias,
        epilogue=epilogue,
        activations=activations,
    )
    x = random_x(rows, in_features, dtype=dtype)
    layer.residual = random_x(rows, out_features, dtype=dtype, seed=3) if residual else None
    y = layer(x)
    assert y.dtype == dtype
    with fastembed.use_backend("reference"):
        theirs = layer(x)
    assert_close_to_oracle(y, theirs, oracle(layer, x))


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 5, 13, 20])
def test_integers_are_exact(isa: str, bits: int, symmetric: bool, rows: int) -> None:
    """With unit scales and activations that are their own codes, every result is an integer below 2**24."""
    layer = make_layer(200, 130, bits, 64, symmetric=symmetric, bias=None)
    layer.scales.fill_(1)
    x = torch.randint(-127, 128, (rows, 200), generator=torch.Generator().manual_seed(bits)).float()
    x[:, 0] = 127
    with fastembed.use_backend("reference"):
        expected = layer(x)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("code", [0, -1])
def test_extreme_products_do_not_saturate(isa: str, bits: int, code: int) -> None:
    codes = torch.full((64, 128), code % (1 << bits), dtype=torch.uint8)
    zeros = torch.full((64, 2), (1 << bits) - 1 - int(codes[0, 0]), dtype=torch.uint8)
    layer = Layer(
        reference.pack_codes(codes, bits),
        reference.to_panels(torch.ones(64, 2).half()),
        reference.to_panels(zeros),
        None,
        None,
        bits,
        64,
        64,
    )
    for rows, value in itertools.product((1, 6, 20), (127.0, -127.0)):
        x = torch.full((rows, 128), value)
        expected = (int(codes[0, 0]) - int(zeros[0, 0])) * x.sum(dim=1, keepdim=True)
        assert torch.equal(layer(x), expected.expand(rows, 64))


@pytest.mark.parametrize("bits", ALL_BITS)
def test_the_longest_group_does_not_overflow(isa: str, bits: int) -> None:
    codes = torch.full((64, 65536), (1 << bits) - 1, dtype=torch.uint8)
    layer = Layer(
        reference.pack_codes(codes, bits),
        reference.to_panels(torch.ones(64, 1).half()),
        reference.to_panels(torch.zeros(64, 1, dtype=torch.uint8)),
        None,
        None,
        bits,
        65536,
        64,
    )
    for rows in (1, 6, 20):
        expected = torch.full((rows, 64), float((1 << bits) - 1) * 65536 * 127)
        assert torch.equal(layer(torch.full((rows, 65536), 127.0)), expected)


@given(
    rows=st.integers(1, 40),
    in_features=st.sampled_from((100, 600)),
    bits=st.sampled_from(ALL_BITS),
    symmetric=st.booleans(),
    activations=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from(DTYPES),
)
def test_a_row_does_not_depend_on_its_batch(
    isa: str, rows: int, in_features: int, bits: int, symmetric: bool, activations: str, dtype: torch.dtype
) -> None:
    layer = make_layer(in_features, 70, bits, 32, symmetric=symmetric, epilogue="gelu", activations=activations)
    x = random_x(rows, in_features, dtype=dtype)
    y = layer(x)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(layer(x[row]), y[row])


@pytest.mark.parametrize("bits", ALL_BITS)
def test_a_token_of_many_features_does_not_depend_on_its_batch(isa: str, bits: int) -> None:
    layer = make_layer(20000, 64, bits, 64)
    x = random_x(20, 20000)
    assert torch.equal(layer(x[3]), layer(x)[3])


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize(
    ("rows", "in_features", "out_features"),
    [
        (1, 1024, 1100),
        (3, 1024, 1100),
        (300, 1024, 1100),
        (450, 4096, 64),  # three blocks of tokens or more, one of which may be quantised while another is multiplied
        (2000, 16, 1100),  # outputs whose fresh pages are touched beforehand
    ],
)
def test_threads_do_not_change_results(
    isa: str, thread_counts: tuple[int, ...], rows: int, in_features: int, out_features: int, activations: str
) -> None:
    layer = make_layer(in_features, out_features, activations=activations)
    x = random_x(rows, in_features)
    results = []
    for threads in thread_counts:
        torch.set_num_threads(threads)
        results.append(layer(x))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("epilogue", [None, "gelu", "silu"])
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_vector_levels_agree_bit_for_bit(bits: int, zeros: str, epilogue: str | None, activations: str) -> None:
    """A state dict moved to another machine gives the same results there."""
    layer = make_layer(
        200,
        130,
        bits,
        symmetric=zeros == "none",
        fractional=zeros == "fractional",
        epilogue=epilogue,
        activations=activations,
    )
    for rows in (1, 9, 21):
        x = random_x(rows, 200)
        before = core.isa()
        results = []
        for level in supported_isa_levels()[1:]:
            core.set_isa(level)
            results.append(layer(x))
        core.set_isa(before)
        assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_more_rows_than_one_block(activations: str) -> None:
    """Long inputs are quantised and multiplied block by block."""
    layer = make_layer(4096, 64, activations=activations)
    x = random_x(1200, 4096)
    y = layer(x)
    assert torch.equal(y[-1], layer(x[-1]))
    assert torch.equal(y[500:510], layer(x[500:510]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_not_finite_spoils_only_itself(isa: str, dtype: torch.dtype, bad: float) -> None:
    for epilogue in EPILOGUES:
        layer = make_layer(100, 70, epilogue=epilogue)
        x = random_x(7, 100, dtype=dtype)
        expected = layer(x)
        x[2, 41] = bad
        y = layer(x)
        assert y[2].isnan().all()
        others = [0, 1, 3, 4, 5, 6]
        assert torch.equal(y[others], expected[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_pass_through_float_activations(isa: str, dtype: torch.dtype) -> None:
    """As through nn.Linear: infinite, or NaN where infinities cancel, in their own token only."""
    layer = make_layer(100, 70, activations="float")
    x = random_x(7, 100, dtype=dtype)
    expected = layer(x)
    x[2, 41], x[4, 3] = float("inf"), float("nan")
    y = layer(x)
    with fastembed.use_backend("reference"):
        theirs = layer(x)
    torch.testing.assert_close(y[2], theirs[2], equal_nan=True)
    assert not y[2].isfinite().any()
    assert y[4].isnan().all()
    others = [0, 1, 3, 5, 6]
    assert torch.equal(y[others], expected[others])


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("zeros", ZEROS)
def test_float_activations_see_the_very_weight(isa: str, bits: int, zeros: str) -> None:
    """Rows of the identity pick out columns of the dequantised weight, exactly."""
    layer = make_layer(
        100, 70, bits, symmetric=zeros == "none", fractional=zeros == "fractional", bias=None, activations="float"
    )
    weight = dequantize_weight(
        layer.codes, layer.scales, layer.zeros, bits=bits, group_size=64, out_features=70, in_features=100
    )
    assert torch.equal(layer(torch.eye(100)), weight.T)
    if zeros != "fractional" and not (bits == 1 and zeros == "none"):
        # These are products of exact bfloat16 numbers before their scale, so they come out rounded once.
        assert torch.equal(layer(torch.eye(100, dtype=torch.bfloat16)), weight.T.bfloat16())


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1e-30, 1e30, 3e38])
def test_extreme_magnitudes(isa: str, magnitude: float) -> None:
    layer = make_layer(64, 64, bits=8, bias=None)
    layer.scales.mul_(2**-6)  # so that no output overflows
    x = random_x(5, 64).clamp(-1, 1) * magnitude
    y = layer(x)
    assert y.isfinite().all()
    with fastembed.use_backend("reference"):
        torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=0 if magnitude >= 1e-30 else 1e-38)
    if magnitude == 0:
        assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("epilogue", ["gelu", "gelu_tanh", "silu"])
def test_epilogue_over_its_whole_range(isa: str, epilogue: str) -> None:
    """A layer that passes its bias through: the epilogue alone, against float64."""
    z = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, 100.0, -100.0, 1e30, -1e30])])
    layer = make_layer(16, len(z), bits=8, epilogue=epilogue)
    layer.bias = z
    y = layer(torch.zeros(1, 16))[0]
    expected = reference.apply_epilogue(z.double(), epilogue)
    error = (y.double() - expected).abs()
    assert (error <= 1e-7 * z.abs().clamp(min=1)).all(), error.max()


@pytest.mark.parametrize("shape", [(100,), (1, 100), (2, 3, 100), (2, 0, 100), (0, 100), (2, 1, 3, 100)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    layer = make_layer(100, 70)
    x = random_x(*shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 70)
    assert y.is_contiguous()
    assert torch.equal(y.reshape(-1, 70), layer(x.reshape(-1, 100)))


@given(
    view=st.sampled_from(("transposed", "sliced columns", "sliced rows", "expanded", "reversed batch", "stepped")),
    dtype=st.sampled_from(DTYPES),
)
def test_strided_input(isa: str, view: str, dtype: torch.dtype) -> None:
    layer = make_layer(48, 70)
    x = {
        "transposed": lambda: random_x(48, 9, dtype=dtype).T,
        "sliced columns": lambda: random_x(9, 100, dtype=dtype)[:, 7:55],
        "sliced rows": lambda: random_x(20, 48, dtype=dtype)[1::2],
        "expanded": lambda: random_x(48, dtype=dtype).expand(9, 48),
        "reversed batch": lambda: random_x(3, 4, 48, dtype=dtype).transpose(0, 1),
        "stepped": lambda: random_x(9, 96, dtype=dtype)[:, ::2],
    }[view]()
    assert torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("rows", [1, 7])
def test_residual_is_added_after_the_epilogue(isa: str, rows: int) -> None:
    layer, x = make_layer(100, 70, epilogue="relu"), random_x(rows, 100)
    residual = random_x(70, rows, seed=5).T
    assert torch.equal(layer(x, residual=residual), layer(x) + residual)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_group_longer_than_the_row_is_the_row(isa: str, symmetric: bool) -> None:
    layer, x = make_layer(100, 70, group_size=112, symmetric=symmetric), random_x(5, 100)
    assert torch.equal(layer(x, group_size=4096), layer(x))


def test_one_bit_without_zeros_is_plus_and_minus(isa: str) -> None:
    layer, x = make_layer(64, 64, bits=1, symmetric=True, bias=None), random_x(3, 64)
    halves = torch.full_like(layer.scales, 0.5)
    assert torch.equal(layer(x), layer(x, zeros=halves))
    weight = dequantize_weight(layer.codes, layer.scales, None, bits=1, group_size=64, out_features=64, in_features=64)
    assert torch.equal(weight.abs(), reference.from_panels(layer.scales, 64).float().expand(64, 64) / 2)


def test_strided_weights() -> None:
    layer, x = make_layer(100, 70), random_x(5, 100)
    strided = {
        name: torch.stack([getattr(layer, name)] * 2, dim=-1)[..., 0] for name in ("codes", "scales", "zeros", "bias")
    }
    assert torch.equal(layer(x, **strided), layer(x))


@pytest.mark.parametrize(("in_features", "out_features"), [(0, 5), (5, 0), (0, 0)])
def test_no_features(isa: str, in_features: int, out_features: int) -> None:
    layer = make_layer(in_features, out_features)
    y = layer(random_x(3, in_features))
    assert torch.equal(y, layer.bias.expand(3, out_features))


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_opcheck(epilogue: str | None, symmetric: bool) -> None:
    layer = make_layer(40, 70, symmetric=symmetric, bias=None if symmetric else torch.float32, epilogue=epilogue)
    with_residual = {**layer.__dict__, "residual": random_x(2, 70).requires_grad_()}
    torch.library.opcheck(torch.ops.fastembed.qlinear.default, (random_x(2, 40), *with_residual.values()))
    for x in (random_x(2, 3, 40), random_x(40, 4).T, random_x(0, 40), random_x(2, 40).requires_grad_()):
        torch.library.opcheck(torch.ops.fastembed.qlinear.default, (x, *layer.positional()))
    weight = (layer.codes, layer.scales, layer.zeros, layer.bits, layer.group_size, 70, 40)
    torch.library.opcheck(torch.ops.fastembed.dequantize_weight.default, weight)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_gradients_of_input_and_bias(epilogue: str | None, dtype: torch.dtype, activations: str) -> None:
    """Straight through the rounding of the activations: the gradients of the float layer at our pre-activations."""
    layer = make_layer(100, 70, epilogue=epilogue, activations=activations)
    layer.bias = layer.bias.to(dtype).requires_grad_()
    x = random_x(2, 3, 100, dtype=dtype).requires_grad_()
    upstream = random_x(2, 3, 70, dtype=dtype, seed=2)
    residual = random_x(2, 3, 70, dtype=dtype, seed=4).requires_grad_()
    layer(x, residual=residual).backward(upstream)
    assert torch.equal(residual.grad, upstream)

    weight = dequantize_weight(
        layer.codes, layer.scales, layer.zeros, bits=4, group_size=64, out_features=70, in_features=100
    )
    before = layer(x.detach(), epilogue=None).double().requires_grad_()
    (grad,) = torch.autograd.grad(reference.apply_epilogue(before, epilogue), before, upstream.double())
    rounding = torch.finfo(dtype).eps
    for got, expected in (
        (x.grad, grad @ weight.double()),
        (layer.bias.grad, grad.sum(dim=(0, 1))),
    ):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=rounding, atol=4 * rounding * expected.abs().max())


def test_weights_have_no_gradient() -> None:
    layer = make_layer(40, 70)
    layer.scales.requires_grad_()
    layer(random_x(2, 40)).sum().backward()
    assert layer.scales.grad is None


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_compiled_exported_and_in_inference_mode(activations: str) -> None:
    layer = make_layer(40, 70, epilogue="gelu", activations=activations)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return layer(x * 2) + 1

    module, x = Module(), random_x(3, 40)
    expected = module(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(compiled(random_x(5, 40)), module(random_x(5, 40)))
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), expected)
    with torch.inference_mode():
        assert torch.equal(module(x), expected)


BAD_X = {
    "float64": (lambda x: x.double(), TypeError, "x must be float32, bfloat16 or float16"),
    "a scalar": (lambda x: x[0, 0], ValueError, "x must have at least one dimension"),
    "too narrow": (lambda x: x[:, :30], ValueError, "x must end in a dimension"),
    "too wide": (lambda x: torch.cat([x, x], 1), ValueError, "x must end in a dimension"),
    "elsewhere": (lambda x: x.to("meta"), ValueError, "x must be on cpu"),
}
BAD_ARGUMENT = [
    ("codes", lambda codes: codes.to(torch.int8), TypeError, "codes must be torch.uint8"),
    ("codes", lambda codes: codes[0], ValueError, "codes must have shape"),
    ("codes", lambda codes: codes[:1], ValueError, r"codes must have shape \[2, 25, 128\]"),
    ("scales", lambda scales: scales.double(), TypeError, "scales must be float32, bfloat16 or float16"),
    ("scales", lambda scales: scales[:, :1], ValueError, "scales must have shape"),
    ("zeros", lambda zeros: zeros[:, :1], ValueError, "zeros must have shape"),
    ("zeros", lambda zeros: zeros.long(), TypeError, "zeros must be torch.uint8 or torch.float16"),
    ("zeros", lambda zeros: zeros.float(), TypeError, "zeros must be torch.uint8 or torch.float16"),
    ("residual", lambda _: torch.zeros(2, 69), ValueError, r"residual must have shape \[2, 70\]"),
    ("residual", lambda _: torch.zeros(2, 70).half(), TypeError, "residual must be torch.float32"),
    ("bias", lambda bias: bias[:-1], ValueError, r"bias must have shape \[70\]"),
    ("bias", lambda bias: bias.long(), TypeError, "bias must be float32"),
    ("bits", lambda _: 3, ValueError, "codes must have shape"),
    ("bits", lambda _: 9, ValueError, "bits must be 1 to 8, got 9"),
    ("group_size", lambda _: 24, ValueError, "group_size must be a positive multiple of 16"),
    ("group_size", lambda _: 0, ValueError, "group_size must be a positive multiple of 16"),
    ("out_features", lambda _: -1, ValueError, "codes must have shape"),
    ("epilogue", lambda _: "swish", ValueError, "epilogue must be one of"),
    ("activations", lambda _: "int4", ValueError, "activations must be 'int8' or 'float'"),
]


def check_refused(layer: Layer, x: Tensor, error: type[Exception], message: str) -> None:
    """By the function and by the registered op alike: neither may reach a kernel."""
    with pytest.raises(error, match=message):
        layer(x)
    with pytest.raises(error, match=message):
        torch.ops.fastembed.qlinear(x, *layer.positional())


@pytest.mark.parametrize("case", BAD_X)
def test_bad_x(case: str) -> None:
    change, error, message = BAD_X[case]
    check_refused(make_layer(100, 70), change(random_x(2, 100)), error, message)


@pytest.mark.parametrize(("name", "change", "error", "message"), BAD_ARGUMENT)
def test_bad_argument(name: str, change: Callable[[object], object], error: type[Exception], message: str) -> None:
    layer = make_layer(100, 70)
    setattr(layer, name, change(getattr(layer, name)))
    check_refused(layer, random_x(2, 100), error, message)
