"""sentence-transformers' modules: its Pooling, and the Normalize after it, in one pass over the tokens."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from torch import Tensor, nn

from ..ops.pooling import pool_exits
from .prompts import valid_tokens

# sentence-transformers' names that differ from ours.
MODES = {"mean_sqrt_len_tokens": "mean_sqrt_len"}

# Features of older modules (WordWeights, CLS-only encoders) that change what pooling means.
_SPECIAL_FEATURES = ("cls_token_embeddings", "token_weights_sum")


class FusedPooling(Pooling):
    """A sentence-transformers Pooling that runs `fastembed.pool_exits`, and the L2 normalisation with it if asked to.

    Reads and writes the same features. It is a Pooling, so what sentence-transformers asks of its pooling module
    (dimensions, `include_prompt`) it answers alike. A sequence without valid tokens gives zeros.

    Args:
        pooling: the module whose settings to take.
        normalize: whether the embedding is L2-normalised, as a Normalize module after it would.
    """

    def __init__(self, pooling: Pooling, *, normalize: bool) -> None:
        super().__init__(pooling.embedding_dimension, pooling.pooling_mode, pooling.include_prompt)
        self.normalize = normalize

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        prompt_length = 0 if self.include_prompt else _as_int(features.get("prompt_length", 0))
        if self._is_special(features, prompt_length):
            features = super().forward(features, **kwargs)
            if self.normalize:
                embedding = features["sentence_embedding"]
                features["sentence_embedding"] = nn.functional.normalize(embedding, p=2, dim=-1)
            return features
        tokens = features["token_embeddings"]
        offsets = features.get("cu_seq_lens_q")
        mask = None if offsets is not None else valid_tokens(tokens, features.get("attention_mask"), prompt_length)
        mode = renamed(self.pooling_mode, MODES)
        (embedding,) = pool_exits([tokens], mask, cu_seqlens=offsets, mode=mode, normalize=self.normalize)[0].values()
        features["sentence_embedding"] = embedding
        return features

    def _is_special(self, features: dict[str, Any], prompt_length: int) -> bool:
        """Whether only sentence-transformers' own implementation covers these features."""
        if any(name in features for name in _SPECIAL_FEATURES):
            return True
        # It counts the weights of weightedmean from before the prompt that it leaves out.
        return prompt_length > 0 and ("cu_seq_lens_q" in features or "weightedmean" in self.pooling_mode)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}"


def renamed(mode: str | Sequence[str], names: Mapping[str, str]) -> str | tuple[str, ...]:
    """A pooling mode, or several, by other names where there are such."""
    return names.get(mode, mode) if isinstance(mode, str) else tuple(names.get(one, one) for one in mode)


def plain_modules(fused: nn.Module) -> tuple[Pooling, Normalize]:
    """What a FusedPooling stands for: the Pooling, and the Normalize that follows where it normalises."""
    assert isinstance(fused, FusedPooling)
    return Pooling(fused.embedding_dimension, fused.pooling_mode, fused.include_prompt), Normalize()


def find_poolings(model: nn.Module) -> Iterator[tuple[nn.Module, str, Pooling, str | None]]:
    """Every place with a Pooling: (parent, child's name, the Pooling, name of the Normalize it can take over or None).

    A Normalize right behind it in a Sequential can be taken over when it normalises the whole sentence embedding.
    """
    for parent in model.modules():
        children = [(name, child) for name, child in parent._modules.items() if child is not None]
        for (name, child), (next_name, following) in zip(children, [*children, ("", None)][1:], strict=True):
            if not isinstance(child, Pooling) or type(child) is not Pooling:
                continue
            fuses = (
                isinstance(parent, nn.Sequential)
                and type(following) is Normalize
                and following.module_input_name == following.module_output_name == "sentence_embedding"
            )
            yield parent, name, child, next_name if fuses else None


def _as_int(prompt_length: int | Tensor) -> int:
    """In inference an int; in training a tensor that repeats it for every sequence."""
    return int(prompt_length.flatten()[0]) if isinstance(prompt_length, Tensor) else prompt_length
