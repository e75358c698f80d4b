"""Drop-in modules."""

from .linear import QuantLinear
from .pooling import MultiExitPooling

__all__ = ["MultiExitPooling", "QuantLinear"]
