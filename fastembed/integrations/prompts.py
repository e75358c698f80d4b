"""Prompts that are read by the model and left out of pooling."""

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
