"""Small random encoders of the architectures that embedding models use, bare and in sentence-transformers models."""

from pathlib import Path

import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import nn

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "query", ":", *(f"w{index}" for index in range(93))]

_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
_COMMON = {"vocab_size": 100, "max_position_embeddings": 80, "pad_token_id": 0}

CONFIGS = {
    "bert": transformers.BertConfig(**_SIZES, **_COMMON),
    "roberta": transformers.RobertaConfig(**_SIZES, **_COMMON, type_vocab_size=1),
    "xlm-roberta": transformers.XLMRobertaConfig(**_SIZES, **_COMMON, type_vocab_size=1),
    "mpnet": transformers.MPNetConfig(**_SIZES, **_COMMON),
    "distilbert": transformers.DistilBertConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=96, **_COMMON),
    "modernbert": transformers.ModernBertConfig(
        **_SIZES, **_COMMON, global_attn_every_n_layers=2, local_attention=16, cls_token_id=2, sep_token_id=3
    ),
    "electra": transformers.ElectraConfig(**_SIZES, **_COMMON, embedding_size=64),
}


def encoder(architecture: str = "bert", **settings: object) -> nn.Module:
    """A random transformers encoder in evaluation mode, the same every time."""
    config = type(CONFIGS[architecture])(**{**CONFIGS[architecture].to_dict(), **settings})
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # all zeros otherwise, which hides a lost bias
                parameter.normal_(std=0.1)
    return model


def batch(rows: int = 5, length: int = 24) -> dict[str, torch.Tensor]:
    """Token ids with right padding, each row of another length."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(7, 100, (rows, length), generator=generator)
    lengths = torch.linspace(length, max(1, length // 3), rows).long()
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def sentence_transformer(
    folder: Path, mode: str | tuple[str, ...] = "mean", *, normalize: bool = True, **pooling: object
) -> SentenceTransformer:
    """A sentence-transformers model of a tiny BERT, its tokenizer and pooling; `folder` is for its files."""
    source = folder / "encoder"
    if not source.exists():
        encoder().save_pretrained(source)
        (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
        transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(source)
    modules = [Transformer(str(source), max_seq_length=64), Pooling(64, mode, **pooling)]
    return SentenceTransformer(modules=[*modules, Normalize()] if normalize else modules, device="cpu").eval()


def texts(count: int = 6) -> list[str]:
    """Sentences of different lengths over the vocabulary."""
    return [" ".join(f"w{(7 * row + 3 * word) % 93}" for word in range(3 + 5 * row)) for row in range(count)]
