"""Which layer gets how many bits."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from .allocation import Choice, allocate, two_levels
from .calibration import Calibration
from .config import QuantConfig
from .gptq import InverseHessian
from .importance import (
    hessians,
    layer_input_modification,
    linear_input_modification,
    measured_errors,
    z_score_share,
)
from .layers import Layers, Linear, block_of
from .quantizers import Hessian
from .rtn import stands_for

ALL_LEVELS = tuple(range(1, 9))


@dataclass(frozen=True)
class Assigned:
    """What a layer gets.

    Attributes:
        bits: its bit-level.
        score: its importance, or with "measured" the error that this level is expected to cause in the embeddings (1
            minus the cosine); None where nothing was scored.
    """

    bits: int
    score: float | None = None


def assign_bits(
    model: nn.Module, layers: Layers, config: QuantConfig, calibration: Calibration | None, progress: bool = False
) -> list[Assigned]:
    """The bit-level of every weight, in the order of `layers.weights`.

    Raises:
        ValueError: avg_bits is below what the lowest level takes, or the calibration fails.
    """
    weights = layers.weights
    if config.avg_bits is None:
        chosen = [config.bits_of(layer.name) for layer in weights]
        return [Assigned(bits) for bits in chosen if bits is not None]
    if config.measures:
        return _best(layers, config, calibration, progress)
    units = _units(weights, config)
    scores = _scores(model, units, config, calibration)
    total = sum(_weights(layer) for layer in weights)
    budget = int(config.avg_bits * total / 8)
    low, high = _two_levels_around(weights, config, budget)
    choices = [
        (
            Choice(low, sum(_bytes(w, low, config) for w in unit), 0),
            Choice(high, sum(_bytes(w, high, config) for w in unit), 0),
        )
        for unit in units
    ]
    try:
        picked = two_levels(choices, scores, budget)
    except ValueError:
        raise _too_few_bits(config, sum(choice.nbytes for choice, _ in choices), total, low) from None
    assigned = {
        id(layer): Assigned(choice.bits, score)
        for unit, choice, score in zip(units, picked, scores, strict=True)
        for layer in unit
    }
    return [assigned[id(layer)] for layer in weights]


def hessians_for(layers: Layers, config: QuantConfig, calibration: Calibration | None) -> Iterator[Tensor | None]:
    """What the quantiser needs to know of the inputs of every weight."""
    if config.quantizer != "gptq":
        return iter([None] * len(layers.weights))
    assert calibration is not None
    return hessians(calibration, layers.by_weight)


def _best(layers: Layers, config: QuantConfig, calibration: Calibration | None, progress: bool) -> list[Assigned]:
    """The allocation of least measured error."""
    assert calibration is not None
    assert config.avg_bits is not None
    levels = tuple(config.levels or ALL_LEVELS)
    weights = layers.weights
    total = sum(_weights(layer) for layer in weights)
    budget = int(config.avg_bits * total / 8)
    costs = [[_bytes(layer, level, config) for level in levels] for layer in weights]
    if (least := sum(map(min, costs))) > budget:
        raise _too_few_bits(config, least, total, min(levels))

    def dequantized(hessian: Hessian | None, weight: Tensor, bits: int) -> Tensor:
        return stands_for(*config.quantise(weight, bits, hessian), bits, config.group_size)

    # On the inputs that it has fitted its rounding to, GPTQ errs less than on others.
    fitted, judged = calibration.halves() if config.quantizer == "gptq" else (calibration, calibration)
    quantisers = (
        partial(dequantized, None if hessian is None else InverseHessian.of(hessian))
        for hessian in hessians_for(layers, config, fitted)
    )
    errors = measured_errors(judged, layers.by_weight, levels, quantisers, progress)
    choices = [
        [Choice(level, cost, error[level]) for level, cost in zip(levels, cost_of_layer, strict=True)]
        for cost_of_layer, error in zip(costs, errors, strict=True)
    ]
    return [Assigned(choice.bits, choice.error) for choice in allocate(choices, budget)]


def _units(weights: Sequence[Linear], config: QuantConfig) -> list[list[Linear]]:
    """What is scored and gets one level: the layers of a block, or a layer."""
    if config.granularity == "linear" or isinstance(config.importance, Mapping):
        return [[layer] for layer in weights]
    units: dict[str, list[Linear]] = {}
    for layer in weights:
        units.setdefault(block_of(layer.name) or layer.name, []).append(layer)
    return list(units.values())


def _scores(
    model: nn.Module, units: Sequence[Sequence[Linear]], config: QuantConfig, calibration: Calibration | None
) -> list[float]:
    """Importance of every unit; higher is more."""
    if isinstance(config.importance, Mapping):
        return [config.importance_of(unit[0].name) for unit in units]
    if config.importance == "zd":
        return [-z_score_share([layer.module.weight.detach() for layer in unit]) for unit in units]
    assert calibration is not None
    if config.granularity == "linear":
        return linear_input_modification(calibration, [unit[0].module for unit in units])
    blocks = [block_of(unit[0].name) for unit in units]
    found = layer_input_modification(calibration, [model.get_submodule(name) for name in blocks if name is not None])
    by_name = dict(zip((name for name in blocks if name is not None), found, strict=True))
    # Layers outside the blocks (poolers, projections) have no score in the paper: nothing is more important.
    return [1.0 if name is None else by_name[name] for name in blocks]


def _two_levels_around(weights: Sequence[Linear], config: QuantConfig, budget: int) -> tuple[int, int]:
    """The two levels of the scheme: those of the configuration, or the neighbours that the budget lies between."""
    if config.levels is not None:
        return min(config.levels), max(config.levels)
    sizes = {level: sum(_bytes(layer, level, config) for layer in weights) for level in ALL_LEVELS}
    low = max((level for level in ALL_LEVELS if sizes[level] <= budget), default=1)
    return low, min(low + 1, 8)


def _weights(layer: Linear) -> int:
    return layer.module.in_features * layer.module.out_features


def _bytes(layer: Linear, bits: int, config: QuantConfig) -> int:
    """What is stored for the layer's weight at a level, padding included."""
    from ..nn import QuantLinear  # which imports the quantisers of this package

    return QuantLinear(
        layer.module.in_features,
        layer.module.out_features,
        bias=False,
        bits=bits,
        group_size=config.group_size,
        symmetric=config.symmetric,
        scale_dtype=config.scale_dtype,
        device="meta",
    ).nbytes


def _too_few_bits(config: QuantConfig, least: int, total: int, bits: int) -> ValueError:
    return ValueError(
        f"avg_bits must be at least {8 * least / total:.3f} for these layers ({bits} bits of code in groups of "
        f"{config.group_size}, with their scales), got {config.avg_bits}; the model is left as it was"
    )
