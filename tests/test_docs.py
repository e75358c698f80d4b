"""The examples of the documentation run as they stand, given the names that they start from."""

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from latent_models import nv_embed_weights
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

import fastembed
from fastembed.training import StarbucksLoss

DOCS = Path(__file__).parent.parent / "docs"


def run(text: str, **names: Any) -> dict[str, Any]:
    """The Python blocks of a page, one after the other; what they leave behind."""
    names |= {"torch": torch, "fastembed": fastembed}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    return names


def test_attention_pooling() -> None:
    torch.manual_seed(0)
    weights = nv_embed_weights(dtype=torch.float32, heads=8)
    hidden, mask = torch.randn(4, 9, weights["latents"].shape[1]), torch.ones(4, 9)
    left = run(
        (DOCS / "attention_pooling.md").read_text(),
        checkpoint={f"latent_attention_model.{name}": weight for name, weight in weights.items()},
        hidden_states=hidden,
        pool_mask=mask,
        patches=torch.randn(2, 5, 768),
        batches=[(hidden, mask, hidden, mask)],
    )
    assert left["saved"] > 0
    assert left["similarity"] > 0.999
    assert left["pooled"].shape == (2, 768)
    assert left["scores"].requires_grad


def test_from_a_model_to_a_smaller_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_models.sentence_transformer(tmp_path)  # for its tokenizer
    tiny_models.encoder(num_hidden_layers=6, hidden_size=384).save_pretrained("encoder")
    model = SentenceTransformer(modules=[Transformer("encoder"), Pooling(384)], device="cpu")
    texts = tiny_models.texts(4)
    section = (DOCS / "training.md").read_text().partition("## From a model")[2].partition("\n## ")[0]
    names = {"StarbucksLoss": StarbucksLoss, "SentenceTransformer": SentenceTransformer}
    left = run(section, model=model, batches=[(texts, texts[::-1])], **names)
    assert left["embeddings"].shape == (4, 128)
    assert torch.cosine_similarity(*map(torch.from_numpy, (left["embeddings"], left["by_exit"][4, 128]))).min() > 0.9999
