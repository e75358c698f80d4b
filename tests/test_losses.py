"""The exit losses: against the formulas written out in float64, gradcheck, and in sentence-transformers' trainer."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastembed import MultiExitEncoder, pool_exits
from fastembed.training import (
    ESELoss,
    ExitLoss,
    Matryoshka2dLoss,
    MultiExitContrastiveLoss,
    RankingLoss,
    SentenceTransformerExitLoss,
    StarbucksLoss,
)

Embeddings = dict[tuple[int, int], Tensor]

EXITS = [(1, 4), (2, 8), (4, 16)]
WHOLE = [(0, 16), (1, 16), (2, 16), (4, 16)]
LAYERS = [0, 1, 2, 4]


def embeddings(exits: list[tuple[int, int]], rows: int, seed: int) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    return {exit: torch.randn(rows, exit[1], generator=generator, dtype=torch.float64) for exit in exits}


def pairs(exits: list[tuple[int, int]], documents: int = 6) -> tuple[Embeddings, Embeddings]:
    """Four queries, and documents that resemble them in their order."""
    queries = embeddings(exits, 4, 0)
    other = embeddings(exits, documents, 1)
    for exit in exits:
        other[exit][:4] += queries[exit]
    return queries, other


def cross_entropy(scores: Tensor) -> Tensor:
    """Of each row's own column, the softmax written out."""
    return torch.stack([scores[i].logsumexp(0) - scores[i, i] for i in range(len(scores))]).mean()


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over the rows of KL(softmax(teacher) || softmax(student))."""
    p, q = teacher.softmax(1), student.softmax(1)
    return (p * (p.log() - q.log())).sum() / len(p)


def test_multi_exit_contrastive_is_the_symmetric_clip_loss() -> None:
    queries, documents = pairs(EXITS, documents=4)
    for weights, expected in (
        ("depth", [0.25, 0.5, 1.0]),
        ("uniform", [1.0] * 3),
        ([3.0, 0.5, 2.0], [3.0, 0.5, 2.0]),
    ):
        loss = MultiExitContrastiveLoss(EXITS, weights, scale=7.0).double()
        terms = []
        for weight, exit in zip(expected, EXITS, strict=True):
            scores = loss.log_scale.exp() * queries[exit] @ documents[exit].T
            terms.append(weight * (cross_entropy(scores) + cross_entropy(scores.T)) / 2)
        torch.testing.assert_close(loss(queries, documents), sum(terms))
    assert loss.log_scale.exp().item() == pytest.approx(7.0)


def test_multi_exit_contrastive_with_documents_that_answer_nothing() -> None:
    queries, documents = pairs(EXITS)
    scores = 7.0 * queries[1, 4] @ documents[1, 4].T
    expected = (cross_entropy(scores) + cross_entropy(scores[:, :4].T)) / 2
    loss = MultiExitContrastiveLoss([(1, 4)], scale=7.0, learn_scale=False).double()
    torch.testing.assert_close(loss(queries, documents), expected)
    assert not any(parameter.requires_grad for parameter in loss.parameters())


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_starbucks_is_the_released_computation(temperature: float) -> None:
    """Queries and passages stacked [layers, rows, 16], dims beyond the layer's masked out, one einsum over all."""
    queries, documents = pairs([(layer, 16) for layer, _ in EXITS])

    def stacked(whole: Embeddings) -> Tensor:
        return torch.stack([F.pad(whole[layer, 16][:, :dim], (0, 16 - dim)) for layer, dim in EXITS])

    scores = torch.einsum("lqh,ldh->lqdh", stacked(queries), stacked(documents)).sum(-1) / temperature
    expected = cross_entropy(scores[2])
    for layer in range(2):
        expected = expected + cross_entropy(scores[layer]) + 0.7 * divergence(scores[2], scores[layer])

    def prefixes(whole: Embeddings) -> Embeddings:
        return {(layer, dim): whole[layer, 16][:, :dim] for layer, dim in EXITS}

    loss = StarbucksLoss(EXITS, distillation=0.7, temperature=temperature)
    torch.testing.assert_close(loss(prefixes(queries), prefixes(documents)), expected)


def test_starbucks_makes_nothing_larger_than_the_scores() -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    exits = [(1, 8), (2, 64)]
    queries, documents = embeddings(exits, 96, 0), embeddings(exits, 128, 1)
    for embedding in (*queries.values(), *documents.values()):
        embedding.requires_grad_()
    with Watch():
        StarbucksLoss(exits)(queries, documents).backward()
    assert largest == 96 * 128


@pytest.mark.parametrize("weighting", ["uniform", "log", "linear"])
def test_matryoshka_2d_written_out(weighting: str) -> None:
    queries, documents = pairs(WHOLE)
    weight = {"uniform": lambda i: 1.0, "log": lambda i: 1 / (1 + math.log(1 + i)), "linear": lambda i: 1 / (1 + i)}
    dim_weights = {4: 0.5, 16: 2.0}

    def ranking(exit: tuple[int, int]) -> Tensor:
        terms = []
        for dim, dim_weight in dim_weights.items():
            q, d = queries[exit][:, :dim], documents[exit][:, :dim]
            cosines = (q / q.norm(dim=1, keepdim=True)) @ (d / d.norm(dim=1, keepdim=True)).T
            terms.append(dim_weight * cross_entropy(20 * cosines))
        return sum(terms)

    expected = 1.5 * ranking((4, 16))
    for layer, width in WHOLE[:-1]:
        expected = expected + 0.8 * weight[weighting](layer) * ranking((layer, width)) / 3
        both = [torch.cat([queries[exit], documents[exit]]) / 0.3 for exit in ((4, 16), (layer, width))]
        expected = expected + 0.6 * 0.3 * divergence(*both)
    loss = Matryoshka2dLoss(
        LAYERS,
        16,
        [4, 16],
        dim_weights=[0.5, 2.0],
        layers_per_step=None,
        dims_per_step=None,
        layer_weighting=weighting,
        last_weight=1.5,
        prior_weight=0.8,
        alignment=0.6,
    )
    torch.testing.assert_close(loss(queries, documents), expected)


def test_matryoshka_2d_draws_layers_and_dims_from_its_seed() -> None:
    queries, documents = pairs(WHOLE)

    def losses(seed: int) -> list[float]:
        loss = Matryoshka2dLoss(LAYERS, 16, [2, 4, 8, 16], seed=seed)
        return [loss(queries, documents).item() for _ in range(6)]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)
    assert len(set(losses(0))) > 1
    drawn: list[tuple[int, ...]] = []

    def pair_loss(q: Tensor, d: Tensor) -> Tensor:
        drawn.append(tuple(q.shape))
        return RankingLoss()(q, d)

    Matryoshka2dLoss(LAYERS, 16, [2, 4, 8, 16], pair_loss=pair_loss)(queries, documents)
    assert len(drawn) == 2  # one dim of the last layer, one of another


def test_ese_written_out() -> None:
    queries, documents = pairs(WHOLE)
    leaves = [e.requires_grad_() for side in (queries, documents) for e in side.values()]
    loss = ESELoss(LAYERS, 16, 4, temperature=0.5)

    def ranking(q: Tensor, d: Tensor) -> Tensor:
        return cross_entropy(20 * torch.cosine_similarity(q[:, None], d[None], dim=2))

    def prefix(exit: tuple[int, int]) -> Tensor:
        e = torch.cat([queries[exit], documents[exit]])
        affinity = (e.T @ e / 4).softmax(-1)  # the square root of 16 features
        # Through the eigenvectors of C C^T, so that the SVD is not checked by itself.
        values, vectors = torch.linalg.eigh(affinity @ affinity.T)
        u, s = vectors.flip(1)[:, :4], values.flip(0)[:4].sqrt()
        u = u * torch.stack([column[column.abs().argmax()].sign() for column in u.T])
        target = (e @ u @ torch.diag(s)).detach()
        aligned = (e[:, :4] - target).square().mean() + 0.5 * divergence(target / 0.5, e[:, :4] / 0.5)
        return ranking(queries[exit][:, :4], documents[exit][:, :4]) + aligned

    expected = ranking(queries[4, 16], documents[4, 16]) + prefix((4, 16))
    for layer in LAYERS[:-1]:
        expected = expected + prefix((layer, 16)) / (1 + math.log(1 + layer)) / 3
    ours = loss(queries, documents)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    for ours_grad, grad in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours_grad, grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MultiExitContrastiveLoss(EXITS).double(),
        lambda: StarbucksLoss(EXITS),
        lambda: Matryoshka2dLoss(LAYERS, 16, [4, 16], layers_per_step=None, dims_per_step=None),
    ],
)
def test_gradcheck(make: Callable[[], ExitLoss]) -> None:
    """Over every exit but the teacher, which the finite differences would see through the detached terms."""
    loss = make()
    queries, documents = pairs(list(loss.exits))
    inputs = [e.requires_grad_() for side in (queries, documents) for exit, e in side.items() if exit != loss.exits[-1]]
    inputs += loss.parameters()
    assert torch.autograd.gradcheck(lambda *_: loss(queries, documents), inputs)


@pytest.mark.parametrize(
    ("distilled", "alone"),
    [
        (StarbucksLoss(EXITS), StarbucksLoss(EXITS[-1:])),
        (
            Matryoshka2dLoss(LAYERS, 16, [4], layers_per_step=None),
            Matryoshka2dLoss(LAYERS[-1:], 16, [4]),
        ),
    ],
)
def test_teachers_are_detached(distilled: ExitLoss, alone: ExitLoss) -> None:
    queries, documents = pairs(list(distilled.exits))
    teacher = queries[distilled.exits[-1]].requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(distilled(queries, documents), teacher),
        torch.autograd.grad(alone(queries, documents), teacher),
    )


def test_plain_pytorch_over_an_encoder_and_over_pool_exits() -> None:
    model = tiny_models.encoder()
    batches = [tiny_models.batch(), tiny_models.batch(length=30)]
    loss = StarbucksLoss([(0, 8), (1, 16), (2, 64)])
    encoder = MultiExitEncoder(model, loss.exits, normalize=loss.normalize)
    ours = loss(*(encoder(**batch) for batch in batches))
    layers, dims = [0, 1, 2], [[8], [16], [64]]
    pooled = []
    for batch in batches:
        hidden = model(**batch, output_hidden_states=True).hidden_states
        exits = pool_exits([hidden[layer] for layer in layers], batch["attention_mask"], dims=dims, normalize=False)
        pooled.append({(layer, dim): e for layer, exit in zip(layers, exits, strict=True) for dim, e in exit.items()})
    torch.testing.assert_close(ours, loss(*pooled))
    ours.backward()
    assert all(layer.output.dense.weight.grad.abs().sum() > 0 for layer in model.encoder.layer)


# ---- in sentence-transformers ----


def columns(model, count: int = 3) -> list[dict[str, Tensor]]:
    texts = tiny_models.texts(12)
    return [dict(model.preprocess(texts[4 * column : 4 * column + 4])) for column in range(count)]


@pytest.mark.parametrize("weighting", ["uniform", "log", "linear"])
def test_matryoshka_2d_is_that_of_sentence_transformers(tmp_path: Path, weighting: str) -> None:
    from sentence_transformers.sentence_transformer import losses

    model = tiny_models.sentence_transformer(tmp_path, normalize=False)
    options = {"layer_weighting": weighting, "last_layer_weight": 1.5, "prior_layers_weight": 0.7, "kl_div_weight": 0.4}
    ranking = losses.MultipleNegativesRankingLoss(model)
    theirs = losses.Matryoshka2dLoss(model, ranking, [64, 16], n_layers_per_step=-1, n_dims_per_step=-1, **options)
    loss = Matryoshka2dLoss(
        [0, 1, 2],
        64,
        [64, 16],
        layers_per_step=None,
        dims_per_step=None,
        layer_weighting=weighting,
        last_weight=1.5,
        prior_weight=0.7,
        alignment=0.4,
    )
    ours = SentenceTransformerExitLoss(model, loss)
    parameters = [p for p in model.parameters() if p.requires_grad]
    results = []
    for compute in (theirs, ours):
        value = compute(columns(model), None)
        grads = torch.autograd.grad(value, parameters, allow_unused=True)
        results.append((value.detach(), [grad for grad in grads if grad is not None]))
    torch.testing.assert_close(*(value for value, _ in results))
    for grad, their_grad in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(grad, their_grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MultiExitContrastiveLoss([(1, 32), (2, 64)]),
        lambda: StarbucksLoss([(1, 32), (2, 64)], temperature=0.05, normalize=True),
        lambda: Matryoshka2dLoss([0, 1, 2], 64, [16, 64]),
        lambda: ESELoss([0, 2], 64, 16),
    ],
)
def test_trains_in_the_trainer_of_sentence_transformers(tmp_path: Path, make: Callable[[], ExitLoss]) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    texts = tiny_models.texts(8)
    pairs = datasets.Dataset.from_dict({"query": texts, "document": [text.replace("w1", "w2") for text in texts]})

    def train(folder: str) -> tuple[nn.Module, nn.Module, float]:
        model = tiny_models.sentence_transformer(tmp_path)
        loss = SentenceTransformerExitLoss(model, make())
        before = copy.deepcopy(model.state_dict())
        arguments = SentenceTransformerTrainingArguments(
            str(tmp_path / folder),
            num_train_epochs=2,
            per_device_train_batch_size=4,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=3,
        )
        result = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=pairs, loss=loss).train()
        changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
        assert any("encoder.layer.0" in name for name in changed)
        return model, loss, result.training_loss

    first, loss, value = train("first")
    again, _, same = train("again")
    assert value == same
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    if isinstance(loss.loss, MultiExitContrastiveLoss):
        assert loss.loss.log_scale.item() != pytest.approx(math.log(10.0), abs=1e-7)


def test_heads_and_prompts_are_trained_as_they_are_encoded(tmp_path: Path) -> None:
    model = tiny_models.sentence_transformer(tmp_path, include_prompt=False)
    head = nn.Linear(64, 24)
    loss = SentenceTransformerExitLoss(model, StarbucksLoss([(1, 24), (2, 64)]), heads={1: head})
    prompt = "query : "
    batch = [
        {**model.preprocess([prompt + text for text in tiny_models.texts(4)]), "prompt_length": torch.tensor([3] * 4)}
        for _ in range(2)
    ]
    with torch.no_grad():
        embeddings = loss._embed(dict(batch[0]))
        expected = loss.encoder.encode(tiny_models.texts(4), prompt=prompt)
    for exit, embedding in expected.items():
        torch.testing.assert_close(embeddings[exit], torch.from_numpy(embedding), rtol=1e-4, atol=1e-5)
    loss(batch).backward()
    assert head.weight.grad is not None
    assert any(parameter is head.weight for parameter in loss.parameters())


@pytest.mark.parametrize("loss", [MultiExitContrastiveLoss(EXITS), StarbucksLoss(EXITS)])
def test_half_precision_embeddings_have_their_softmax_in_float32(loss: ExitLoss) -> None:
    queries, documents = pairs(EXITS)
    half = [{exit: e.bfloat16() for exit, e in embeddings.items()} for embeddings in (queries, documents)]
    value = loss(*half)
    assert value.dtype == torch.float32
    assert value == loss(*({exit: e.float() for exit, e in embeddings.items()} for embeddings in half))


# ---- bad input ----


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: StarbucksLoss([]), ValueError, "exits must be a list of at least one"),
        (lambda: StarbucksLoss([3]), TypeError, r"exits must be pairs of ints \(layer, dim\), got 3"),
        (lambda: StarbucksLoss([(1, 0)]), ValueError, "dims of at least 1, got"),
        (lambda: StarbucksLoss([(-1, 4)]), ValueError, "layers of at least 0"),
        (lambda: StarbucksLoss([(1, 4), (1, 4)]), ValueError, "exits must not repeat"),
        (lambda: StarbucksLoss(EXITS, temperature=0), ValueError, "temperature must be positive and finite, got 0"),
        (lambda: StarbucksLoss(EXITS, distillation=-1), ValueError, "distillation must be at least 0"),
        (lambda: MultiExitContrastiveLoss(EXITS, "deep"), ValueError, "weights must be 'depth', 'uniform' or"),
        (lambda: MultiExitContrastiveLoss(EXITS, [1.0]), ValueError, "weights must be 3 numbers, got 1"),
        (lambda: MultiExitContrastiveLoss([(0, 4)]), ValueError, "weights must not be 'depth'"),
        (lambda: MultiExitContrastiveLoss(EXITS, scale=math.inf), ValueError, "scale must be positive and finite"),
        (lambda: Matryoshka2dLoss(LAYERS, 16, [32]), ValueError, "lie between 1 and the width 16, got"),
        (lambda: Matryoshka2dLoss(LAYERS, 16, [4, 4]), ValueError, "dims must be distinct"),
        (lambda: Matryoshka2dLoss(LAYERS, 16, 4), TypeError, "dims must be a list of ints, got 4"),
        (lambda: Matryoshka2dLoss(LAYERS, 16, [4], layer_weighting="square"), ValueError, "one of uniform, log, lin"),
        (lambda: Matryoshka2dLoss(LAYERS, 16, [4], layers_per_step=0), ValueError, "layers_per_step must be at least"),
        (lambda: Matryoshka2dLoss(3, 16, [4]), TypeError, "layers must be a list of ints, got 3"),
        (lambda: ESELoss(LAYERS, 16, 32), ValueError, "lie between 1 and the width 16"),
        (
            lambda: Matryoshka2dLoss(LAYERS, 16, [4], layer_weighting=3),
            TypeError,
            "layer_weighting must be a name or a",
        ),
        (lambda: Matryoshka2dLoss(LAYERS, 16, [4], last_weight=-1), ValueError, "last_weight must be at least 0"),
        (lambda: RankingLoss(0), ValueError, "scale must be positive"),
        (lambda: RankingLoss("large"), TypeError, "scale must be a number, got 'large'"),
    ],
)
def test_bad_settings(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_bad_embeddings() -> None:
    loss = StarbucksLoss(EXITS)
    queries, documents = pairs(EXITS)
    with pytest.raises(TypeError, match=r"queries must map \(layer, dim\) to tensors, got list"):
        loss([], documents)
    with pytest.raises(ValueError, match=r"documents must hold the exits .* got none for \[\(4, 16\)\]"):
        loss(queries, {exit: e for exit, e in documents.items() if exit != (4, 16)})
    with pytest.raises(TypeError, match=r"queries must hold tensors, got list at exit \(2, 8\)"):
        loss({**queries, (2, 8): queries[2, 8].tolist()}, documents)
    with pytest.raises(ValueError, match=r"queries must be \[4, 8\] at exit \(2, 8\), got shape \[4, 7\]"):
        loss({**queries, (2, 8): queries[2, 8][:, :7]}, documents)
    with pytest.raises(ValueError, match="documents must be at least as many as queries, and those 1, got 3 and 4"):
        loss(queries, {exit: e[:3] for exit, e in documents.items()})


def test_bad_training_arguments(tmp_path: Path) -> None:
    model = tiny_models.sentence_transformer(tmp_path)
    with pytest.raises(TypeError, match="model must be a SentenceTransformer, got BertModel"):
        SentenceTransformerExitLoss(model[0].auto_model, StarbucksLoss([(1, 8)]))
    with pytest.raises(TypeError, match=r"loss must be one of fastembed\.training's exit losses, got CrossEntropyLoss"):
        SentenceTransformerExitLoss(model, nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="exits must name layers 0"):
        SentenceTransformerExitLoss(model, StarbucksLoss([(7, 8)]))
    with pytest.raises(ValueError, match="sentence_features must be at least queries and their documents, got 1"):
        SentenceTransformerExitLoss(model, StarbucksLoss([(1, 8)]))(columns(model, 1))
