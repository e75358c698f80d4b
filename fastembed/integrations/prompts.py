"""Tokens that are read by the model and left out of pooling: prompts, and what a selection leaves."""

from dataclasses import dataclass

import torch
from torch import Tensor


def valid_tokens(tokens: Tensor, mask: Tensor | None, prompt_length: int) -> Tensor | None:
    """The mask [B, T] to pool `tokens` [B, T, D] over, or None for every token.

    The first `prompt_length` valid tokens of each sequence are left out, wherever its padding stands.
    """
    if mask is None or mask.shape[-1] != tokens.shape[1]:
        if not prompt_length:
            return None
        mask = torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
    if prompt_length:
        first = mask.to(torch.int32).argmax(dim=1, keepdim=True)
        positions = torch.arange(mask.shape[1], device=mask.device)
        mask = mask * (positions >= first + prompt_length)
    return mask


@dataclass(frozen=True)
class FromToken:
    """Selects the tokens of each sequence from the first one with this id on, as ModularStarEncoder pools from its
    first separator (arXiv 2503.03008). A sequence without such a token has all of its tokens pooled."""

    token_id: int

    def __call__(self, input_ids: Tensor) -> Tensor:
        seen = (input_ids == self.token_id).cumsum(dim=1) > 0
        return seen | ~seen.any(dim=1, keepdim=True)


@dataclass(frozen=True)
class OnlyTokens:
    """Selects the tokens with one of these ids, as landmark pooling does with the separators it puts between chunks of
    the text (arXiv 2601.21525). A sequence without any gets a zero embedding."""

    token_ids: tuple[int, ...]

    def __call__(self, input_ids: Tensor) -> Tensor:
        return torch.isin(input_ids, torch.tensor(self.token_ids, device=input_ids.device))
