"""Every weight of a model quantised, at the levels that a configuration or a budget gives them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..nn import QuantLinear
from .calibration import prepare
from .config import QuantConfig
from .layers import Layers, Linear
from .planning import Assigned, assign_bits, hessians_for
from .rtn import check_finite


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantised weight, the relative error of what it stands for, and how its layer was scored."""

    layer: QuantLinear
    error: float
    score: float | None


def quantize_weights(
    model: nn.Module, layers: Layers, config: QuantConfig, data: Any, tokenizer: Any, progress: bool
) -> dict[int, QuantizedWeight]:
    """Every weight quantised, by the id of the first of the layers that have it. The model is not changed.

    Args:
        model, layers, config: what `find_layers` found in the model for the configuration.
        data, tokenizer: as `prepare` takes them, where the configuration calibrates.
        progress: show progress.

    Raises:
        ValueError: a weight is not finite or too large for its scales, the calibration fails, or the budget is too
            small.
    """
    for linear in layers.weights:
        _require_finite(linear)
    quantized = {}
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        calibration = prepare(model, data, tokenizer) if config.calibrates else None
        assigned = assign_bits(model, layers, config, calibration, progress)
        steps = zip(layers.weights, assigned, hessians_for(layers, config, calibration), strict=True)
        for linear, level, hessian in tqdm(
            steps, desc="Quantising", unit=" layer", total=len(layers.weights), disable=not progress
        ):
            quantized[id(linear)] = _quantize_weight(linear, level, hessian, config)
    return quantized


def _quantize_weight(linear: Linear, level: Assigned, hessian: Tensor | None, config: QuantConfig) -> QuantizedWeight:
    module = linear.module
    try:
        with torch.no_grad():
            codes = config.quantize(module.weight, level.bits, hessian)
            bias = None if module.bias is None else module.bias.detach().clone()
        layer = QuantLinear.from_codes(*codes, bias, bits=level.bits, group_size=config.group_size)
    except ValueError as error:
        raise _refused(linear, error) from error
    return QuantizedWeight(layer, _relative_error(layer, module.weight.detach()), level.score)


def _require_finite(linear: Linear) -> None:
    for name, parameter in linear.module.named_parameters():
        try:
            check_finite(parameter, name)
        except ValueError as error:
            raise _refused(linear, error) from error


def _refused(linear: Linear, error: ValueError) -> ValueError:
    return ValueError(f"{linear.name} cannot be quantised: {error}; the model is left as it was")


def _relative_error(layer: QuantLinear, weight: Tensor) -> float:
    """Frobenius norm of the weight's error over that of the weight."""
    norm = weight.float().norm()
    return float((layer.dequantize() - weight.float()).norm() / norm) if norm else 0.0
