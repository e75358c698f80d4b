"""Texts to batches of tokens, those of about one length together."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .._checks import check_integer

# Tokens that go through the encoder together on the CPU. The activations of one slice then stay in the caches; those of
# a batch of 32 long texts do not, and their buffers are so large that every layer gets them from the kernel afresh.
SLICE_TOKENS = 1024

# Batches whose texts are tokenised together and then sorted by tokens: enough to sort well, little to hold.
_WINDOW = 64


class Tokenizer:
    """A transformers tokenizer, and the most tokens to keep of a text."""

    def __init__(self, tokenizer: Any, max_length: int | None) -> None:
        if not callable(tokenizer):
            raise TypeError(f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}")
        if max_length is not None:
            check_integer("max_length", max_length, 1)
        self.tokenizer = tokenizer
        limit = getattr(tokenizer, "model_max_length", None)
        # Tokenizers without a limit say so with a number beyond any text.
        self.max_length = max_length if max_length is not None or limit is None or limit > 1 << 30 else limit

    def __call__(self, texts: Sequence[Any]) -> list[dict[str, Any]]:
        """What the tokenizer makes of each text or pair of texts, without padding."""
        encoded = self.tokenizer(list(texts), truncation=self.max_length is not None, max_length=self.max_length)
        return [{name: values[row] for name, values in encoded.items()} for row in range(len(texts))]

    def pad(self, encoded: Sequence[dict[str, Any]], device: torch.device) -> dict[str, torch.Tensor]:
        """One padded batch."""
        joined = {name: [row[name] for row in encoded] for name in encoded[0]}
        padded = self.tokenizer.pad(joined, padding=True, return_tensors="pt")
        return {name: tensor.to(device) for name, tensor in padded.items()}

    def prompt_length(self, prompt: str) -> int:
        """Tokens that a prompt puts in front of a text: its own, and the special ones before it."""
        if not prompt:
            return 0
        ids: list[int] = self.tokenizer(prompt)["input_ids"]
        special = set(self.tokenizer.all_special_ids)
        while ids and ids[-1] in special:
            ids = ids[:-1]
        return len(ids)


def batches_by_length(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    prompt: str,
    batch_size: int,
    device: torch.device,
    show_progress_bar: bool,
) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
    """Batches of at most `batch_size` texts of about the same length: (their numbers, the model's inputs).

    On the CPU a batch of long texts has fewer, so that the activations of a layer stay in the caches.
    """
    by_characters = np.argsort([-len(text) for text in texts], kind="stable")
    limit = SLICE_TOKENS if device.type == "cpu" else None
    with tqdm(total=len(texts), desc="Encoding", unit=" text", disable=not show_progress_bar) as progress:
        for start in range(0, len(texts), _WINDOW * batch_size):
            window = by_characters[start : start + _WINDOW * batch_size]
            encoded = tokenizer([prompt + texts[row] for row in window])
            lengths = np.array([len(row["input_ids"]) for row in encoded])
            by_tokens = np.argsort(-lengths, kind="stable")
            for first, end in _cuts(lengths[by_tokens], batch_size, limit):
                chosen = by_tokens[first:end]
                yield window[chosen], tokenizer.pad([encoded[row] for row in chosen], device)
                progress.update(len(chosen))


def _cuts(lengths: np.ndarray, batch_size: int, limit: int | None) -> list[tuple[int, int]]:
    """Where to cut texts of falling lengths: the first of a batch is as long as its padding."""
    sizes = []
    first = 0
    while first < len(lengths):
        size = batch_size if limit is None else max(1, min(batch_size, limit // max(1, int(lengths[first]))))
        sizes.append(min(size, len(lengths) - first))
        first += sizes[-1]
    ends = list(accumulate(sizes))
    return list(zip([0, *ends], ends, strict=False))
