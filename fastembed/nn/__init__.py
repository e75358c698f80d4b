"""Drop-in modules."""

from .binarizer import RecurrentBinarizer
from .linear import QuantLinear
from .pooling import MultiExitPooling

__all__ = ["MultiExitPooling", "QuantLinear", "RecurrentBinarizer"]
