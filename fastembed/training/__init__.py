"""Training: of what turns embeddings into codes, and of a model's exits.

binarizer.py              `train_binarizer`: the data, the momentum encoder and its queue, the steps, checkpoints
losses.py                 what it minimises
exit_losses.py            losses that train the exits of a MultiExitEncoder together
sentence_transformers.py  the same in sentence-transformers' trainer
"""

from .binarizer import train_binarizer
from .exit_losses import ESELoss, ExitLoss, Matryoshka2dLoss, MultiExitContrastiveLoss, RankingLoss, StarbucksLoss
from .sentence_transformers import SentenceTransformerExitLoss

__all__ = [
    "ESELoss",
    "ExitLoss",
    "Matryoshka2dLoss",
    "MultiExitContrastiveLoss",
    "RankingLoss",
    "SentenceTransformerExitLoss",
    "StarbucksLoss",
    "train_binarizer",
]
