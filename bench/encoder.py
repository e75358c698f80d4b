"""MultiExitEncoder: all exits of an encoder in one pass, beside a plain forward pass without hidden states, and beside
the usual way, which keeps all of them and pools them afterwards. The model has the shape of all-MiniLM-L6-v2.

The column "error" holds the peak memory of a call over that of the plain forward pass, which is a goal too; that the
embeddings are right is checked as well.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import fastembed

from . import Case, Context, Faster, Reached, Workload, optional_import
from .harness.environment import without_gradients
from .harness.workload import OURS

transformers = optional_import("transformers")

# Pooling is a thousandth of a forward pass: what the goals ask is that nothing else is added, and calls of half a
# second on a virtual machine differ by more than that from round to round.
ROUNDS = 15
PLAIN = "plain forward"
KEEPING = "hidden states kept"
ALL_LAYERS = "fastembed, 6 layers"
LAYERS = 6
MOST_MEMORY = 1.05


def cases() -> Iterator[Case]:
    if transformers is None:
        return
    for batch, length in ((16, 128), (2, 512)):
        yield Case(f"6 exits of 6 layers, {batch} x {length} x 384", _six_exits(batch, length))
        yield Case(f"stop after layer 3 of 6, {batch} x {length} x 384", _stop_early(batch, length))


def _six_exits(batch: int, length: int) -> Callable[[Context], Workload]:
    def setup(context: Context) -> Workload:
        model, inputs = _model_and_batch(context, batch, length)
        dims = [384, 128]
        exits = [(layer, dim) for layer in range(1, LAYERS + 1) for dim in dims]
        encoder = fastembed.MultiExitEncoder(model, exits)

        def keep_and_pool() -> dict[tuple[int, int], Tensor]:
            hidden = model(**inputs, output_hidden_states=True).hidden_states[1:]
            pooled = fastembed.pool_exits(list(hidden), inputs["attention_mask"], dims=dims)
            return {(layer, dim): pooled[layer - 1][dim] for layer, dim in exits}

        return _workload(
            {
                OURS: lambda: encoder(**inputs),
                PLAIN: lambda: model(**inputs).last_hidden_state,
                KEEPING: keep_and_pool,
            },
            expected=keep_and_pool(),
            amount=inputs["input_ids"].numel(),
            quick=context.quick,
            goals=[Faster(PLAIN, 1 / 1.02), Faster(KEEPING, 1 / 1.02)],
        )

    return setup


def _stop_early(batch: int, length: int) -> Callable[[Context], Workload]:
    def setup(context: Context) -> Workload:
        model, inputs = _model_and_batch(context, batch, length)
        encoder = fastembed.MultiExitEncoder(model, [(3, 384), (LAYERS, 384)])
        shorter, _ = _model_and_batch(context, batch, length, layers=3)
        shorter.load_state_dict(model.state_dict(), strict=False)

        def pooled() -> dict[tuple[int, int], Tensor]:
            hidden = shorter(**inputs).last_hidden_state
            return {(3, 384): fastembed.pool_exits([hidden], inputs["attention_mask"])[0][384]}

        return _workload(
            {
                OURS: lambda: encoder([(3, 384)], **inputs),
                PLAIN: lambda: shorter(**inputs).last_hidden_state,
                ALL_LAYERS: lambda: encoder([(LAYERS, 384)], **inputs),
            },
            expected=pooled(),
            amount=inputs["input_ids"].numel(),
            quick=context.quick,
            goals=[Faster(PLAIN, 1 / 1.02), Faster(ALL_LAYERS, 1 / 0.55)],
        )

    return setup


def _model_and_batch(
    context: Context, batch: int, length: int, layers: int = LAYERS
) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    rows, tokens = (2, 8) if context.quick else (batch, length)
    config = transformers.BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    ids = torch.randint(config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
    lengths = torch.linspace(tokens // 2, tokens, rows).round()
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    inputs = {"input_ids": ids.to(context.device), "attention_mask": mask.to(context.device)}
    return model.to(context.device), inputs


def _workload(
    calls: Mapping[str, Callable[[], Any]],
    *,
    expected: dict[tuple[int, int], Tensor],
    amount: float,
    quick: bool,
    goals: list[Faster],
) -> Workload:
    providers = {name: without_gradients(call) for name, call in calls.items()}
    peaks = {name: _peak_memory(call) for name, call in providers.items()}

    def memory(name: str, result: Any) -> float:
        for exit, embedding in expected.items():
            if name not in (PLAIN, ALL_LAYERS):
                torch.testing.assert_close(result[exit], embedding, atol=1e-5, rtol=1e-4)
        return peaks[name] / peaks[PLAIN]

    return Workload(
        providers=providers,
        verify=memory,
        # In the smoke test the embeddings are as large as the activations.
        tolerance=dict.fromkeys(calls, float("inf")) | ({} if quick else {OURS: MOST_MEMORY}),
        amount=amount,
        unit="token",
        goals=[*goals, Reached(f"of our peak memory needed by {PLAIN}", 1 / MOST_MEMORY, peaks[PLAIN] / peaks[OURS])],
        rounds=ROUNDS,
    )


def _peak_memory(call: Callable[[], Any]) -> int:
    """Most bytes of tensors that lived at once during a call, those from before it not counted."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
        del result
    events = profile.profiler.kineto_results.events()
    allocations = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, size in allocations:
        live += size
        peak = max(peak, live)
    return peak
