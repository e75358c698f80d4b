"""Every architecture with our modules in place of its own; `python tests/test_swap_architectures.py` writes the table.

docs/architectures.md is that table. The test fails where the table says anything else than what is measured here.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from latent_models import LatentAttentionModel, nv_embed_weights
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from tiny_models import DECODER, IMAGE, SEGFORMER, T5, TEXT, WIDTH
from torch import Tensor, nn
from torch.nn import functional as F

import fastembed
from fastembed import MultiExitEncoder, QuantConfig
from fastembed.integrations.prompts import FromToken

TABLE = Path(__file__).parent.parent / "docs" / "architectures.md"

Inputs = dict[str, Tensor]
Embed = Callable[[Any, Inputs], Tensor]


@dataclass(frozen=True)
class Architecture:
    """A model, its own embeddings, and ours.

    Attributes:
        models: whose architecture it is.
        build: makes it, randomly initialised.
        inputs: a batch for it.
        original: the embeddings that the unmodified model and its own code give, of unit length.
        ours: the same with fastembed's modules; None where `fastembed.swap` puts them into the model.
        how: what stands in for what, where swap's own report does not say it.
    """

    models: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    original: Embed
    ours: Embed | None = None
    how: str = ""


def left_padded() -> Inputs:
    return tiny_models.left_padded(tiny_models.batch())


def random_model(kind: type[nn.Module], config: Any) -> Callable[[], nn.Module]:
    return lambda: seeded(lambda: kind(config))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


# ---- sentence-transformers pipelines: the model, pooling, perhaps a projection, normalisation ----


def pipeline(build: Callable[[], nn.Module], mode: str, project: bool = False) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with TemporaryDirectory() as folder:
            transformer = tiny_models.sentence_transformer(Path(folder))[0]
        transformer.model = build()
        torch.manual_seed(1)
        dense = [Dense(WIDTH, 48, bias=False, activation_function=nn.Identity())] if project else []
        modules = [transformer, Pooling(WIDTH, mode), *dense, Normalize()]
        return SentenceTransformer(modules=modules, device="cpu").eval()

    return make


def embed(model: Any, inputs: Inputs) -> Tensor:
    return model(dict(inputs))["sentence_embedding"]


def text(
    models: str, build: Callable[[], nn.Module], mode: str, inputs=tiny_models.batch, project=False
) -> Architecture:
    return Architecture(models, pipeline(build, mode, project), inputs, embed)


def tiny(architecture: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: tiny_models.encoder(architecture, **settings)


# ---- models with code of their own ----


class ModularStarEncoder(nn.Module):
    """Its exits as released: every token is projected by the exit's head; from the separator on they are averaged."""

    exits = (4, 9, 18, 27, 36)
    separator = 3

    def __init__(self) -> None:
        super().__init__()
        config = transformers.Starcoder2Config(**{**DECODER, "num_hidden_layers": 36}, is_causal=False)
        self.model = transformers.Starcoder2Model(config)
        self.projections = nn.ModuleList(nn.Linear(WIDTH, 48) for _ in self.exits)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.model(input_ids, attention_mask, output_hidden_states=True).hidden_states
        begins = (input_ids == self.separator).int().argmax(1)
        mask = (torch.arange(input_ids.shape[1]) >= begins[:, None])[..., None].float()
        embeddings = []
        for layer, projection in zip(self.exits, self.projections, strict=True):
            projected = projection(hidden[layer])
            embeddings.append(F.normalize((projected * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(embeddings, dim=1)


def separated_batch() -> Inputs:
    """An instruction that is read and not pooled stands in front of the separator."""
    batch = left_padded()
    begins = batch["attention_mask"].argmax(1)
    batch["input_ids"][torch.arange(len(begins)), begins + 2] = ModularStarEncoder.separator
    return batch


def modular_exits(model: Any, inputs: Inputs) -> Tensor:
    heads = dict(zip(model.exits, model.projections, strict=True))
    exits = [(layer, 48) for layer in model.exits]
    encoder = MultiExitEncoder(model.model, exits, heads=heads, select=FromToken(model.separator))
    return torch.cat(list(encoder(**inputs).values()), dim=1)


def clip_text(model: Any, inputs: Inputs) -> Tensor:
    return F.normalize(model(**inputs).text_embeds, dim=1)


def clip_text_exit(model: Any, inputs: Inputs) -> Tensor:
    # The text of a sequence ends with its end token, the last valid one.
    encoder = MultiExitEncoder(model, [(3, 32)], heads={3: model.text_projection}, mode="lasttoken")
    return encoder(**inputs)[3, 32]


def clip_batch() -> Inputs:
    batch = tiny_models.batch()
    last = batch["attention_mask"].sum(1) - 1
    batch["input_ids"][torch.arange(len(last)), last] = 3
    return batch


def clip_vision(model: Any, inputs: Inputs) -> Tensor:
    return F.normalize(model(**inputs).image_embeds, dim=1)


def clip_vision_exit(model: Any, inputs: Inputs) -> Tensor:
    head = nn.Sequential(model.vision_model.post_layernorm, model.visual_projection)
    return MultiExitEncoder(model, [(3, 32)], heads={3: head}, mode="cls")(**inputs)[3, 32]


class NVEmbed(nn.Module):
    """A bidirectional Mistral and latent attention, which pools all but the instruction."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding_model = transformers.MistralModel(transformers.MistralConfig(**DECODER, is_causal=False))
        self.latent_attention_model = LatentAttentionModel(nv_embed_weights(dim=WIDTH, dtype=torch.float32))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        pool_mask = attention_mask * (torch.arange(input_ids.shape[1]) >= 3)
        return self.latent_attention_model(self.embedding_model(input_ids, attention_mask)[0], pool_mask)


def prepended(model: Any, inputs: Inputs) -> Tensor:
    """Token prepending with hidden states overwritten by hand, in front of layers 1 and 2; the last layer but one."""

    def overwrite(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0].clone()
        hidden[inputs["input_ids"] == 5] = hidden[:, -1]
        return hidden, *args[1:]

    handles = [layer.register_forward_pre_hook(overwrite) for layer in model.layers[1:3]]
    hidden = model(**inputs, output_hidden_states=True).hidden_states[-2]
    for handle in handles:
        handle.remove()
    return F.normalize(hidden[:, -1], dim=1)


def prepended_by_us(model: Any, inputs: Inputs) -> Tensor:
    with fastembed.prepend_token(model, 5, start=1, exit=3) as encoder:
        return next(iter(encoder(**inputs).values()))


def placeholder_batch() -> Inputs:
    batch = left_padded()
    first = batch["attention_mask"].argmax(1)
    batch["input_ids"][torch.arange(len(first)), first + 1] = 5
    return batch


def dense(layers: dict[int, int]) -> tuple[Embed, Embed]:
    """Patch embeddings of several layers, each at a number of dims, as one vector per image."""

    def original(model: Any, inputs: Inputs) -> Tensor:
        hidden = model(**inputs, output_hidden_states=True).hidden_states
        first = len(hidden) == 3  # SegFormer's stages have no embedding output before them
        maps = {layer: hidden[layer - first] for layer in layers}
        tokens = {layer: h.flatten(2).transpose(1, 2) if h.dim() == 4 else h for layer, h in maps.items()}
        return torch.cat([F.normalize(tokens[layer][..., :dim], dim=2).flatten(1) for layer, dim in layers.items()], 1)

    def ours(model: Any, inputs: Inputs) -> Tensor:
        exits = fastembed.dense_exits(model, list(layers.items()), **inputs)
        return torch.cat([embeddings.flatten(1) for embeddings in exits.values()], dim=1)

    return original, ours


def pooler(model: Any, inputs: Inputs) -> Tensor:
    return F.normalize(model(**inputs).pooler_output, dim=1)


def pooler_exit(model: Any, inputs: Inputs) -> Tensor:
    head = nn.Sequential(model.pooler.dense, model.pooler.activation)
    return MultiExitEncoder(model, [(3, WIDTH)], heads={3: head}, mode="cls")(**inputs)[3, WIDTH]


def llama(**settings: Any) -> Callable[[], nn.Module]:
    return random_model(transformers.LlamaModel, transformers.LlamaConfig(**DECODER, **settings))


def qwen() -> nn.Module:
    return random_model(transformers.Qwen3Model, transformers.Qwen3Config(**DECODER, head_dim=16))()


ARCHITECTURES = {
    "BERT": text("MuRIL, MahaBERT, CuBERT, BioBERT", tiny("bert"), "mean"),
    "RoBERTa": text("all-distilroberta, SimCSE", tiny("roberta"), "cls"),
    "MPNet": text("all-mpnet-base-v2", tiny("mpnet"), "mean"),
    "MiniLM": text("all-MiniLM-L6-v2", tiny("bert", num_hidden_layers=6), "mean"),
    "DistilBERT": text("msmarco-distilbert", tiny("distilbert"), "max"),
    "ModernBERT": text("modernbert-embed, GTE", tiny("modernbert"), "mean"),
    "XLM-R": text("multilingual-e5, BGE-M3", tiny("xlm-roberta"), "mean"),
    "T5 encoder": text(
        "sentence-t5, GTR",
        random_model(transformers.T5EncoderModel, transformers.T5Config(**T5)),
        "mean",
        project=True,
    ),
    "StarCoder2, bidirectional": Architecture(
        "ModularStarEncoder",
        lambda: seeded(ModularStarEncoder),
        separated_batch,
        lambda model, inputs: model(**inputs),
        modular_exits,
        "MultiExitEncoder: exits 4, 9, 18, 27 and 36, pooled from the separator on, their heads after pooling",
    ),
    "Mistral, bidirectional, with latent attention": Architecture(
        "NV-Embed", lambda: seeded(NVEmbed), tiny_models.batch, lambda model, inputs: model(**inputs)
    ),
    "Mistral": text(
        "E5-Mistral",
        random_model(transformers.MistralModel, transformers.MistralConfig(**DECODER)),
        "lasttoken",
        left_padded,
    ),
    "Llama": text("LLM2Vec, RepLLaMA", llama(), "lasttoken", left_padded),
    "Llama, token prepending": Architecture(
        "TP",
        llama(),
        placeholder_batch,
        prepended,
        prepended_by_us,
        "prepend_token: layers 1 and 2, the last but one out",
    ),
    "Qwen3": text("Qwen3-Embedding", qwen, "lasttoken", left_padded),
    "CLIP, text": Architecture(
        "CLIP",
        random_model(
            transformers.CLIPTextModelWithProjection,
            transformers.CLIPTextConfig(**TEXT, bos_token_id=2, eos_token_id=3, projection_dim=32),
        ),
        clip_batch,
        clip_text,
        clip_text_exit,
        "MultiExitEncoder: last token, the projection as head",
    ),
    "CLIP, vision": Architecture(
        "CLIP, LLM2CLIP",
        random_model(
            transformers.CLIPVisionModelWithProjection, transformers.CLIPVisionConfig(**IMAGE, projection_dim=32)
        ),
        tiny_models.pixels,
        clip_vision,
        clip_vision_exit,
        "MultiExitEncoder: class token, norm and projection as head",
    ),
    "Llama as CLIP's text encoder": text("LLM2CLIP", llama(is_causal=False), "mean", left_padded, project=True),
    "SigLIP, vision": Architecture(
        "SigLIP",
        random_model(transformers.SiglipVisionModel, transformers.SiglipVisionConfig(**IMAGE)),
        tiny_models.pixels,
        pooler,
    ),
    "ViT": Architecture(
        "ViT",
        random_model(transformers.ViTModel, transformers.ViTConfig(**IMAGE)),
        tiny_models.pixels,
        pooler,
        pooler_exit,
        "MultiExitEncoder: class token, the pooler as head",
    ),
    "ViT, patches": Architecture(
        "ViT",
        random_model(transformers.ViTModel, transformers.ViTConfig(**IMAGE)),
        tiny_models.pixels,
        *dense({0: 64, 1: 16, 2: 32}),
        "dense_exits: patch embeddings, layers 1 and 2",
    ),
    "SegFormer, patches": Architecture(
        "SegFormer",
        random_model(transformers.SegformerModel, transformers.SegformerConfig(**SEGFORMER)),
        tiny_models.pixels,
        *dense({1: 16, 2: 32, 3: 64}),
        "dense_exits: every stage",
    ),
}


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    models: str
    swapped: str
    difference: float
    linears: str
    cosine: float

    def cells(self) -> list[str]:
        return [self.models, self.swapped, f"{self.difference:.0e}", self.linears, f"{self.cosine:.4f}"]


@torch.no_grad()
def measure(architecture: Architecture) -> Row:
    model, inputs = architecture.build(), architecture.inputs()
    reference = architecture.original(copy.deepcopy(model), inputs)
    if architecture.ours is None:
        report = fastembed.swap(model, quantize=None, verbose=False)
        swapped = "swap: " + ", ".join(row.kind for row in report.rows)
        ours = architecture.original(model, inputs)
        fastembed.unswap(model)
        assert torch.equal(architecture.original(model, inputs), reference)
    else:
        swapped = architecture.how
        ours = architecture.ours(model, inputs)
    report = fastembed.swap(model, QuantConfig(bits=8), pooling=True, verbose=False)
    quantised = (architecture.ours or architecture.original)(model, inputs)
    linear = [row for row in report.rows if row.kind.startswith("linear")]
    left = f", {len(report.left)} left" if report.left else ""
    cosine = torch.cosine_similarity(quantised, reference, dim=1).min().item()
    difference = (ours - reference).abs().max().item()
    return Row(architecture.models, swapped, difference, f"{len(linear)} of them{left}", cosine)


HEADER = ["architecture", "as in", "poolings and heads", "largest difference", "linear layers", "lowest cosine"]


def document(rows: dict[str, Row]) -> str:
    lines = [
        "# Architectures",
        "",
        "Every architecture with our modules in place of its own, on small randomly initialised models. The largest",
        "difference is that of the embeddings, of unit length and in float32, from what the unmodified model gives.",
        "The last two columns are of the same model after `fastembed.swap(model, QuantConfig(bits=8))`: the linear",
        "layers that were quantised, and the lowest cosine of an embedding to the original one.",
        "",
        "Written by `python tests/test_swap_architectures.py`; the test of that file fails when this table is stale.",
        "",
        f"| {' | '.join(HEADER)} |",
        "|" + "---|" * len(HEADER),
        *(f"| {name} | {' | '.join(row.cells())} |" for name, row in rows.items()),
    ]
    return "\n".join(lines) + "\n"


def recorded(name: str) -> list[str]:
    (line,) = re.findall(rf"^\| {re.escape(name)} \|(.*)\|$", TABLE.read_text(), re.MULTILINE) or [""]
    return [cell.strip() for cell in line.split("|")]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_table_says_what_is_measured(name: str) -> None:
    row = measure(ARCHITECTURES[name])
    models, swapped, difference, linears, cosine = recorded(name)
    assert [models, swapped, linears] == [row.models, row.swapped, row.linears]
    # Another machine's kernels round otherwise: a few roundings more are not another result.
    assert row.difference <= 4 * float(difference) + 1e-6
    assert row.difference <= 1e-5
    assert row.cosine == pytest.approx(float(cosine), abs=2e-3)


def test_the_table_has_no_other_lines() -> None:
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")][1:]
    assert [line.split("|")[1].strip() for line in lines] == list(ARCHITECTURES)


if __name__ == "__main__":
    TABLE.write_text(document({name: measure(architecture) for name, architecture in ARCHITECTURES.items()}))
    print(TABLE.read_text())
