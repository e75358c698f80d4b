"""Training of what turns embeddings into codes.

binarizer.py   `train_binarizer`: the data, the momentum encoder and its queue, the steps, checkpoints
losses.py      what it minimises
"""

from .binarizer import train_binarizer

__all__ = ["train_binarizer"]
