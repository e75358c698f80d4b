"""HQQ and GPTQ against what they promise: less error than round-to-nearest in their own measure."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastembed.nn import QuantLinear
from fastembed.quantization import quantize_gptq, quantize_hqq, quantize_mse, quantize_rtn


def weight_and_inputs(rows: int = 48, columns: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    return weight, torch.randn(600, columns, generator=generator) @ mixing


def stands_for(
    quantised: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], bits: int, group: int
) -> torch.Tensor:
    codes, scales, zeros = quantised
    return QuantLinear.from_codes(codes, scales, zeros, bits=bits, group_size=group).dequantize()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_keeps_the_outputs_better_than_rounding(bits: int, group: int, symmetric: bool) -> None:
    weight, x = weight_and_inputs()
    rounded = stands_for(quantize_rtn(weight, bits, group, symmetric, torch.float32), bits, group)
    calibrated = quantize_gptq(weight, bits, group, symmetric, torch.float32, hessian=x.T @ x)
    errors = [(x @ (w - weight).T).norm().item() for w in (rounded, stands_for(calibrated, bits, group))]
    assert errors[1] < (1.0 if bits == 1 else 0.9) * errors[0]


def test_gptq_is_the_recursion_of_the_paper() -> None:
    """Feature by feature, with the inverse Hessian shrunk by Gaussian elimination after each (equations 2 and 3)."""
    weight, x = weight_and_inputs(5, 40)
    weight, hessian = weight.double(), (x.T @ x).double()
    codes, scales, zeros = quantize_gptq(weight, 3, -1, False, torch.float32, hessian=hessian)
    assert zeros is not None
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(40)
    inverse = torch.linalg.inv(damped)
    left = weight.clone()
    expected = torch.empty_like(codes)
    for feature in hessian.diagonal().argsort(descending=True).tolist():
        code = (left[:, feature] / scales[:, 0] + zeros[:, 0]).round().clamp(0, 7)
        expected[:, feature] = code.to(torch.uint8)
        error = (left[:, feature] - scales[:, 0] * (code - zeros[:, 0])) / inverse[feature, feature]
        left -= error[:, None] * inverse[feature]
        inverse -= inverse[:, feature, None] * inverse[feature] / inverse[feature, feature]
    # A weight in the middle of two codes may fall to either side in float32.
    assert (codes != expected).float().mean() < 0.02


def test_gptq_takes_features_that_are_always_zero_and_few_samples() -> None:
    weight, x = weight_and_inputs()
    x[:, ::3] = 0
    for samples in (x, x[:3], 0 * x):
        codes, scales, zeros = quantize_gptq(weight, 4, 32, hessian=samples.T @ samples)
        assert codes.shape == weight.shape
        assert zeros is not None
        assert scales.isfinite().all()


def test_gptq_refuses_bad_hessians() -> None:
    weight, x = weight_and_inputs()
    with pytest.raises(ValueError, match=r"hessian must have shape \[100, 100\], got \[3, 3\]"):
        quantize_gptq(weight, 4, 32, hessian=torch.eye(3))
    with pytest.raises(ValueError, match="hessian must be finite"):
        quantize_gptq(weight, 4, 32, hessian=x.T @ x * float("nan"))
    with pytest.raises(ValueError, match="hessian must be positive semi-definite"):
        quantize_gptq(weight, 4, 32, hessian=-(x.T @ x))


@given(
    bits=st.integers(1, 8),
    group=st.sampled_from((16, 32, 64, -1)),
    shape=st.sampled_from(((1, 1), (5, 37), (70, 100), (64, 128))),
    offset=st.sampled_from((0.0, 2.0, -2.0)),
    scale_dtype=st.sampled_from((torch.float16, torch.bfloat16, torch.float32)),
)
def test_hqq_errs_by_little_more_than_half_a_step(
    bits: int, group: int, shape: tuple[int, int], offset: float, scale_dtype: torch.dtype
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(bits)) + offset
    codes, scales, zeros = quantize_hqq(weight, bits, group, scale_dtype)
    assert scales.dtype == scale_dtype
    assert zeros.dtype == (scale_dtype if bits == 1 else torch.uint8)
    assert int(codes.max()) < 1 << bits
    dequantised = stands_for((codes, scales, zeros), bits, group)
    # The mean error is what is minimised: about a quarter of a step for even weights, and no worse than one step, plus
    # what rounding scale and zero point moves the far end of the range by.
    rounding = torch.finfo(scale_dtype).eps * (1 << bits) * (1 + abs(offset))
    columns = shape[1] if group == -1 else group
    steps = scales.float().abs()[:, torch.arange(shape[1]) // columns]
    assert (dequantised - weight).abs().mean() <= (1 + rounding) * steps.mean() + 1e-6


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("shape", "group"), [((5, 37), 16), ((3, 100), -1), ((2000, 200), 64)])
def test_mse_errs_no_more_than_rounding_in_any_group(
    bits: int, symmetric: bool, shape: tuple[int, int], group: int
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(bits))
    errors = []
    for quantise in (quantize_rtn, quantize_mse):
        codes, scales, zeros = quantise(weight, bits, group, symmetric, torch.float32)
        assert int(codes.max()) < 1 << bits
        errors.append((stands_for((codes, scales, zeros), bits, group) - weight).square())
    size = shape[1] if group == -1 else group
    by_group = [torch.stack([e.sum(dim=1) for e in error.split(size, dim=1)]) for error in errors]
    assert (by_group[1] <= by_group[0] * (1 + 1e-5)).all()
    if bits in (2, 3):
        assert errors[1].sum() < 0.9 * errors[0].sum()


def test_what_is_zero_stays_zero() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) + 0.7
    weight[:, ::5] = 0
    for bits in range(2, 9):
        for quantise in (quantize_rtn, quantize_mse, quantize_hqq):
            assert not stands_for(quantise(weight, bits, 64), bits, 64)[:, ::5].any()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_beats_rounding_where_there_are_outliers(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator)
    weight[torch.rand(weight.shape, generator=generator) < 0.01] *= 4
    error = {
        name: (stands_for(quantised, bits, 64) - weight).abs().pow(0.7).mean().item()
        for name, quantised in {
            "rtn": quantize_rtn(weight, bits, 64, False, torch.float32),
            "hqq": quantize_hqq(weight, bits, 64, torch.float32),
        }.items()
    }
    assert error["hqq"] < error["rtn"]


def test_hqq_keeps_flat_groups() -> None:
    for value in (0.0, 3.0, -0.25):
        weight = torch.full((4, 64), value)
        torch.testing.assert_close(stands_for(quantize_hqq(weight, 4, 32), 4, 32), weight, rtol=2**-10, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight, x = weight_and_inputs()
    weight[3, 4] = bad
    for quantise in (quantize_hqq, quantize_mse, lambda w, b, g: quantize_gptq(w, b, g, hessian=x.T @ x)):
        with pytest.raises(ValueError, match="weight must be finite"):
            quantise(weight, 4, 32)
