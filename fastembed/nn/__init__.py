"""Drop-in modules."""

from .binarizer import RecurrentBinarizer
from .latent import LatentAttentionPooling
from .linear import QuantLinear, QuantLinearGroup
from .mix import LayerMix
from .pooling import MultiExitPooling

__all__ = [
    "LatentAttentionPooling",
    "LayerMix",
    "MultiExitPooling",
    "QuantLinear",
    "QuantLinearGroup",
    "RecurrentBinarizer",
]
