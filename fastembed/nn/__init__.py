"""Drop-in modules."""

from .binarizer import RecurrentBinarizer
from .linear import QuantLinear, QuantLinearGroup
from .mix import LayerMix
from .pooling import MultiExitPooling

__all__ = ["LayerMix", "MultiExitPooling", "QuantLinear", "QuantLinearGroup", "RecurrentBinarizer"]
