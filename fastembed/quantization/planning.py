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
    if config.avg_bits is None:
        chosen = [config.bits_of(layer.name) for layer in layers.weights]
        return [Assigned(bits) for bits in chosen if bits is not None]
    budget = budget_of(layers.weights, config.avg_bits)
    if config.measures:
        _require_budget(layers.weights, _levels_of(config), config)
        choices = measured_choices(layers, config, calibration, progress)
        return [Assigned(choice.bits, choice.error) for choice in allocate(choices, budget)]
    low, high = _two_levels_around(layers.weights, config, budget)
    _require_budget(layers.weights, [low], config)
    units = _units(layers.weights, config)
    scores = _scores(model, units, config, calibration)
    pairs = [
        (Choice(low, bytes_of(unit, low, config), 0), Choice(high, bytes_of(unit, high, config), 0)) for unit in units
    ]
    assigned = {
        id(layer): Assigned(choice.bits, score)
        for unit, choice, score in zip(units, two_levels(pairs, scores, budget), scores, strict=True)
        for layer in unit
    }
    return [assigned[id(layer)] for layer in layers.weights]


def budget_of(weights: Sequence[Linear], avg_bits: float) -> int:
    """The bytes that so many bits per weight allow."""
    return int(avg_bits * _count(weights) / 8)


def bytes_of(weights: Sequence[Linear], bits: int, config: QuantConfig) -> int:
    """What is stored for weights at a level: codes, scales, zero points and padding."""
    from ..nn import QuantLinear  # which imports the quantisers of this package

    return sum(
        QuantLinear(
            layer.module.in_features,
            layer.module.out_features,
            bias=False,
            bits=bits,
            group_size=config.group_size,
            symmetric=config.symmetric,
            scale_dtype=config.scale_dtype,
            device="meta",
        ).nbytes
        for layer in weights
    )


def measured_choices(
    layers: Layers, config: QuantConfig, calibration: Calibration | None, progress: bool = False
) -> list[list[Choice]]:
    """What every level costs and errs, for every weight; the same whatever the budget."""
    assert calibration is not None
    levels = _levels_of(config)

    def dequantized(hessian: Hessian | None, weight: Tensor, bits: int) -> Tensor:
        return stands_for(*config.quantize(weight, bits, hessian), bits, config.group_size)

    # On the inputs that it has fitted its rounding to, GPTQ errs less than on others.
    fitted, judged = calibration.halves() if config.quantizer == "gptq" else (calibration, calibration)
    quantizers = (
        partial(dequantized, None if hessian is None else InverseHessian.of(hessian))
        for hessian in hessians_for(layers, config, fitted)
    )
    errors = measured_errors(judged, layers.by_weight, levels, quantizers, progress)
    return [
        [Choice(level, bytes_of([layer], level, config), errors_of_layer[level]) for level in levels]
        for layer, errors_of_layer in zip(layers.weights, errors, strict=True)
    ]


def hessians_for(layers: Layers, config: QuantConfig, calibration: Calibration | None) -> Iterator[Tensor | None]:
    """What the quantiser needs to know of the inputs of every weight."""
    if config.quantizer != "gptq":
        return iter([None] * len(layers.weights))
    assert calibration is not None
    return hessians(calibration, layers.by_weight)


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


def _levels_of(config: QuantConfig) -> tuple[int, ...]:
    return tuple(config.levels or ALL_LEVELS)


def _two_levels_around(weights: Sequence[Linear], config: QuantConfig, budget: int) -> tuple[int, int]:
    """The two levels of the scheme: those of the configuration, or the neighbours that the budget lies between."""
    if config.levels is not None:
        return min(config.levels), max(config.levels)
    low = max((level for level in ALL_LEVELS if bytes_of(weights, level, config) <= budget), default=1)
    return low, min(low + 1, 8)


def _require_budget(weights: Sequence[Linear], levels: Sequence[int], config: QuantConfig) -> None:
    """Refuse a budget that not even the smallest level fits into, before anything is scored."""
    assert config.avg_bits is not None
    least, bits = min((bytes_of(weights, level, config), level) for level in levels)
    if least > budget_of(weights, config.avg_bits):
        raise ValueError(
            f"avg_bits must be at least {8 * least / _count(weights):.3f} for these layers ({bits} bits of code in "
            f"groups of {config.group_size}, with their scales), got {config.avg_bits}; the model is left as it was"
        )


def _count(weights: Sequence[Linear]) -> int:
    return sum(layer.module.in_features * layer.module.out_features for layer in weights)
