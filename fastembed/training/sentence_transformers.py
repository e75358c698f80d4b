"""LayerExit losses as the trainer of sentence-transformers takes losses."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._exits import LayerExit
from ..encoder import MultiExitEncoder
from ..integrations.libraries import is_sentence_transformer
from .exit_losses import ExitLoss

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class SentenceTransformerExitLoss(nn.Module):
    """Trains exits of a SentenceTransformer with sentence-transformers' own trainer.

        loss = SentenceTransformerExitLoss(model, StarbucksLoss([(2, 64), (4, 128), (6, 384)]))
        SentenceTransformerTrainer(model=model, train_dataset=pairs, loss=loss).train()

    The columns of the data set are, in this order, queries, their documents, and any number of further columns of
    documents that answer none of the queries. Every exit is pooled while the model runs, by a `MultiExitEncoder`; the
    trainer also updates what the loss itself learns (a scale, heads).

    Args:
        model: a SentenceTransformer of a Transformer, a Pooling and perhaps a Normalize.
        loss: one of the exit losses.
        mode, final_norm, heads, layers: as `MultiExitEncoder` takes them.

    Attributes:
        encoder: the `MultiExitEncoder` that is trained, with the heads.

    Raises:
        TypeError: a model or a loss of another kind.
        ValueError: exits that the model does not have, and what else `MultiExitEncoder` refuses.
    """

    def __init__(
        self,
        model: "SentenceTransformer",
        loss: ExitLoss,
        *,
        mode: str | None = None,
        final_norm: bool = False,
        heads: Mapping[int, nn.Module] | None = None,
        layers: str | None = None,
    ) -> None:
        super().__init__()
        if not is_sentence_transformer(model):
            raise TypeError(f"model must be a SentenceTransformer, got {type(model).__name__}")
        if not isinstance(loss, ExitLoss):
            raise TypeError(f"loss must be one of fastembed.training's exit losses, got {type(loss).__name__}")
        self.model = model  # the trainer puts what it wraps around it (DistributedDataParallel) in its place
        self.loss = loss
        self.encoder = MultiExitEncoder(
            model,
            loss.exits,
            mode=mode,
            normalize=loss.normalize,
            final_norm=final_norm,
            heads=heads,
            layers=layers,
        )

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch of tokenised columns; there are no labels.

        Raises:
            ValueError: fewer than two columns.
        """
        columns = [self._embed(features) for features in sentence_features]
        if len(columns) < 2:
            raise ValueError(f"sentence_features must be at least queries and their documents, got {len(columns)}")
        queries, *documents = columns
        return self.loss(queries, {exit: torch.cat([column[exit] for column in documents]) for exit in self.loss.exits})

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card that the trainer writes."""
        return {"loss": type(self.loss).__name__, "exits": [list(exit) for exit in self.encoder.exits]}

    def _embed(self, features: dict[str, Any]) -> dict[LayerExit, Tensor]:
        prompt_length = (
            0 if self.encoder.include_prompt else int(torch.as_tensor(features.get("prompt_length", 0)).max())
        )
        with self.encoder.observe(features.get("attention_mask"), prompt_length=prompt_length) as embeddings:
            self.model(features)
        return {exit: embeddings[exit] for exit in self.loss.exits}
