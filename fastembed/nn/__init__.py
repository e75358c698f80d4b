"""Drop-in modules."""

from .pooling import MultiExitPooling

__all__ = ["MultiExitPooling"]
