"""What to quantise, and how."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from .quantizers import QUANTIZERS, Hessian, Quantized

IMPORTANCE = ("measured", "lim", "zd")
GRANULARITIES = ("block", "linear")


@dataclass(frozen=True)
class QuantConfig:
    """How `fastembed.swap` and `fastembed.quantize` quantise the linear layers of a model.

    A pattern (of `bits`, `importance`, `activations` and `skip`) is shell-style over module names. It fits a layer when
    it fits a run of whole components of its name: "pooler" and "encoder.layer.0" mean everything inside, "output.dense"
    and "layer.*.attention" those layers of every block. Of several patterns that fit a layer the last one counts.

    Args:
        bits: of every layer; or {pattern: bits}, where layers that no pattern fits stay as they are. None with
            `avg_bits`.
        avg_bits: bits per weight on average over the quantised layers, with everything that is stored for a weight
            counted: codes, scales, zero points and padding. Layers get different bit-levels, by their importance.
        importance: what decides, with `avg_bits`. "measured": how far the model's output moves when a layer is
            quantised to each level, and the best allocation for that. "lim" and "zd": the scores of Dumitru et al.,
            "Layer-Wise Quantization" (arXiv 2406.17415), and their two-level scheme, as with {pattern: score}, scores
            of your own (higher is more important; 0 where no pattern fits).
        granularity: what is scored by "lim" and "zd": transformer blocks ("block", as the paper has it) or every linear
            layer by itself ("linear").
        levels: the bit-levels to choose from with `avg_bits`. None: all of 1 to 8 for "measured", else the two
            neighbouring ones between which the average lies.
        quantizer: "rtn" (round-to-nearest), "mse" (the same, within the range of each group that errs least), "hqq"
            (half-quadratic zero points) or "gptq" (calibrated).
        group_size, symmetric, scale_dtype: as `fastembed.nn.QuantLinear` takes them.
        activations: of every layer, "int8" or "float"; or {pattern: mode}, "int8" where no pattern fits.
        skip: patterns of layers to leave as they are.

    Raises:
        TypeError: a setting of the wrong type.
        ValueError: a setting that no kernel implements, or that contradicts another.
    """

    bits: int | Mapping[str, int] | None = None
    group_size: int = 64
    symmetric: bool = False
    activations: str | Mapping[str, str] = "int8"
    scale_dtype: torch.dtype = torch.float16
    skip: Sequence[str] = ()
    avg_bits: float | None = None
    importance: str | Mapping[str, float] = "measured"
    granularity: str = "block"
    levels: Sequence[int] | None = None
    quantizer: str = "rtn"

    def __post_init__(self) -> None:
        self._check_patterns()
        self._check_budget()
        self._check_quantizer()

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_patterns(self) -> None:
        if isinstance(self.skip, str) or not all(isinstance(pattern, str) for pattern in self.skip):
            raise TypeError(f"skip must be a list of strings, got {self.skip!r}")
        self._keep("skip", tuple(self.skip))
        if self.bits is not None and self.avg_bits is not None:
            raise ValueError(f"bits and avg_bits exclude each other, got {self.bits!r} and {self.avg_bits!r}")
        if self.bits is None and self.avg_bits is None:
            self._keep("bits", 8)
        if isinstance(self.bits, Mapping) and not self.bits:
            raise ValueError("bits must have at least one pattern, got none")
        for name in ("bits", "activations", "importance"):
            if isinstance(getattr(self, name), Mapping):
                self._keep(name, _FrozenMapping(getattr(self, name)))

    def _check_budget(self) -> None:
        """`avg_bits`, and what is said about how it is spent."""
        if self.avg_bits is None:
            for name, default in (("importance", "measured"), ("granularity", "block"), ("levels", None)):
                if (value := getattr(self, name)) != default:
                    raise ValueError(f"{name} must be left out without avg_bits, got {value!r}")
            return
        is_number = isinstance(self.avg_bits, int | float) and not isinstance(self.avg_bits, bool)
        if not (is_number and 0 < self.avg_bits < 64):
            raise ValueError(f"avg_bits must be a positive number of bits per weight, got {self.avg_bits!r}")
        if isinstance(self.importance, Mapping):
            if not all(isinstance(score, int | float) and isfinite(score) for score in self.importance.values()):
                raise ValueError(f"importance must have finite numbers as scores, got {dict(self.importance)}")
        elif self.importance not in IMPORTANCE:
            raise ValueError(f"importance must be {_one_of(IMPORTANCE)} or a mapping, got {self.importance!r}")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be {_one_of(GRANULARITIES)}, got {self.granularity!r}")
        if self.levels is None:
            return
        if isinstance(self.levels, str) or not isinstance(self.levels, Iterable):
            raise TypeError(f"levels must be a list of bit-levels, got {self.levels!r}")
        self._keep("levels", tuple(sorted(set(self.levels))))
        if not self.levels:
            raise ValueError("levels must have at least one bit-level, got none")
        if not self.measures and len(self.levels) > 2:
            raise ValueError(f"levels must be two unless importance is 'measured', got {list(self.levels)}")

    def _check_quantizer(self) -> None:
        from ..nn import QuantLinear  # which imports the quantisers of this package

        if self.quantizer not in tuple(QUANTIZERS):
            raise ValueError(f"quantizer must be {_one_of(tuple(QUANTIZERS))}, got {self.quantizer!r}")
        if self.quantizer == "hqq" and self.symmetric:
            raise ValueError("quantizer 'hqq' finds zero points: symmetric must be False, got True")
        # The layer owns the rules for what it can be; an empty one applies them.
        levels = self.bits.values() if isinstance(self.bits, Mapping) else [8 if self.bits is None else self.bits]
        modes = self.activations.values() if isinstance(self.activations, Mapping) else [self.activations]
        for bits, activations in product((*levels, *(self.levels or ())), modes):
            QuantLinear(
                1,
                1,
                bits=bits,
                group_size=self.group_size,
                symmetric=self.symmetric,
                activations=activations,
                scale_dtype=self.scale_dtype,
                device="meta",
            )

    @property
    def measures(self) -> bool:
        """Whether bit-levels follow from the measured effect of each level."""
        return self.importance == "measured"

    @property
    def calibrates(self) -> bool:
        """Whether the model has to be run."""
        return self.quantizer == "gptq" or (self.avg_bits is not None and self.importance in ("measured", "lim"))

    def skips(self, name: str) -> bool:
        """Whether a pattern of `skip` fits the module name."""
        return any(fits(pattern, name) for pattern in self.skip)

    def quantize(self, weight: Tensor, bits: int, hessian: Hessian | None) -> Quantized:
        """A weight quantised to a level; `hessian` is what "gptq" needs to know of its inputs."""
        quantizer = QUANTIZERS[self.quantizer]
        return quantizer(weight, bits, self.group_size, self.symmetric, self.scale_dtype, hessian)

    def bits_of(self, name: str) -> int | None:
        """What `bits` says about a layer; None where no pattern fits."""
        return self._said_of(name, self.bits, None)

    def activations_of(self, name: str) -> str:
        """What `activations` says about a layer."""
        return self._said_of(name, self.activations, "int8")

    def importance_of(self, name: str) -> float:
        """The score of a layer, where `importance` has scores."""
        return float(self._said_of(name, self.importance, 0.0))

    @staticmethod
    def _said_of(name: str, setting: Any, otherwise: Any) -> Any:
        if not isinstance(setting, Mapping):
            return setting
        return next((value for pattern, value in reversed(list(setting.items())) if fits(pattern, name)), otherwise)


def fits(pattern: str, name: str) -> bool:
    """Whether a pattern, as `QuantConfig` describes them, fits a module name."""
    return fnmatchcase(f".{name}.", f"*.{pattern}.*")


class _FrozenMapping(dict[str, Any]):
    """A mapping that a frozen, hashable configuration can hold."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))


def _one_of(names: Sequence[str]) -> str:
    return f"{', '.join(map(repr, names[:-1]))} or {names[-1]!r}"
