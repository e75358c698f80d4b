"""Small random encoders of the architectures that embedding models use, bare and in sentence-transformers models, and
the settings that other suites build more of them from."""

from pathlib import Path

import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import nn

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "query", ":", *(f"w{index}" for index in range(93))]

WIDTH = 64
_SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
TEXT = {**_SIZES, "vocab_size": 100, "max_position_embeddings": 80, "pad_token_id": 0}
DECODER = {**TEXT, "num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3}
IMAGE = {**_SIZES, "image_size": 32, "patch_size": 8}
T5 = {"vocab_size": 100, "d_model": WIDTH, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_heads": 4, "pad_token_id": 0}
SEGFORMER = {
    "num_encoder_blocks": 3,
    "depths": [1, 2, 1],
    "hidden_sizes": [16, 32, WIDTH],
    "num_attention_heads": [1, 2, 4],
    "patch_sizes": [7, 3, 3],
    "strides": [4, 2, 2],
    "sr_ratios": [4, 2, 1],
    "mlp_ratios": [2, 2, 2],
}
_TWO_LAYERS = {**TEXT, "num_hidden_layers": 2}

CONFIGS = {
    "bert": transformers.BertConfig(**_TWO_LAYERS),
    "roberta": transformers.RobertaConfig(**_TWO_LAYERS, type_vocab_size=1),
    "xlm-roberta": transformers.XLMRobertaConfig(**_TWO_LAYERS, type_vocab_size=1),
    "mpnet": transformers.MPNetConfig(**_TWO_LAYERS),
    "distilbert": transformers.DistilBertConfig(
        dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=96, vocab_size=100, max_position_embeddings=80, pad_token_id=0
    ),
    "modernbert": transformers.ModernBertConfig(
        **_TWO_LAYERS, global_attn_every_n_layers=2, local_attention=16, cls_token_id=2, sep_token_id=3
    ),
    "electra": transformers.ElectraConfig(**_TWO_LAYERS, embedding_size=64),
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


def left_padded(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same rows, moved to the right end."""
    lengths = batch["attention_mask"].sum(1).tolist()
    return {
        name: torch.stack([row.roll(-length) for row, length in zip(tensor, lengths, strict=True)])
        for name, tensor in batch.items()
    }


def pixels(count: int = 3) -> dict[str, torch.Tensor]:
    """Random images."""
    return {"pixel_values": torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def sentence_transformer(
    folder: Path, mode: str | tuple[str, ...] = "mean", *, normalize: bool = True, **pooling: object
) -> SentenceTransformer:
    """A sentence-transformers model of a tiny BERT, its tokenizer and pooling; `folder` is for its files."""
    source = folder / "encoder"
    if not source.exists():
        encoder().save_pretrained(source)
        (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
        transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(source)
    modules = [Transformer(str(source), max_seq_length=64), Pooling(WIDTH, mode, **pooling)]
    return SentenceTransformer(modules=[*modules, Normalize()] if normalize else modules, device="cpu").eval()


def texts(count: int = 6) -> list[str]:
    """Sentences of different lengths over the vocabulary."""
    return [" ".join(f"w{(7 * row + 3 * word) % 93}" for word in range(3 + 5 * row)) for row in range(count)]
