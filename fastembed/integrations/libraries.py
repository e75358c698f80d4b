"""Which library a model is of; none need be installed to ask."""

import sys

from torch import nn


def is_sentence_transformer(model: object) -> bool:
    """Whether a model is one of sentence-transformers', which need not be installed."""
    if "sentence_transformers" not in sys.modules:  # then no model can be one of its
        return False
    from sentence_transformers import SentenceTransformer

    return isinstance(model, SentenceTransformer)


def is_pipeline(model: nn.Module) -> bool:
    """Whether a model is a row of sentence-transformers' modules, which take what its `preprocess` makes of texts: a
    SentenceTransformer, a CrossEncoder or a SparseEncoder."""
    return hasattr(type(model), "preprocess") and isinstance(model, nn.Sequential)


def library_of(model: nn.Module) -> str:
    """The library that builds such models: "sentence-transformers", "transformers" or "torch"."""
    if is_pipeline(model):
        return "sentence-transformers"
    return "transformers" if hasattr(type(model), "push_to_hub") and hasattr(model, "config") else "torch"
