"""What to quantise, and how."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch


@dataclass(frozen=True)
class QuantConfig:
    """How `fastembed.swap` quantises the linear layers of a model.

    Args:
        bits, group_size, symmetric, activations, scale_dtype: as `fastembed.nn.QuantLinear` takes them.
        skip: layers to leave as they are, by shell-style patterns over module names. A pattern fits a layer when it
            fits a run of whole components of its name: "pooler" and "encoder.layer.0" leave out everything inside,
            "output.dense" and "layer.*.attention" leave out those layers of every block.

    Raises:
        TypeError: `skip` is not a sequence of strings.
        ValueError: a setting that no kernel implements.
    """

    bits: int = 8
    group_size: int = 64
    symmetric: bool = False
    activations: str = "int8"
    scale_dtype: torch.dtype = torch.float16
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        from ..nn import QuantLinear  # which imports the quantisers of this package

        if isinstance(self.skip, str) or not all(isinstance(pattern, str) for pattern in self.skip):
            raise TypeError(f"skip must be a list of strings, got {self.skip!r}")
        object.__setattr__(self, "skip", tuple(self.skip))
        # The layer owns the rules for what it can be; an empty one applies them.
        QuantLinear(
            1,
            1,
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            activations=self.activations,
            scale_dtype=self.scale_dtype,
            device="meta",
        )

    def skips(self, name: str) -> bool:
        """Whether a pattern of `skip` fits the module name."""
        return any(fits(pattern, name) for pattern in self.skip)


def fits(pattern: str, name: str) -> bool:
    """Whether a pattern of `QuantConfig.skip` fits a module name."""
    return fnmatchcase(f".{name}.", f"*.{pattern}.*")
