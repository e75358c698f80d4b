"""Multi-exit pooling on the CPU: agreement with the reference and with sentence-transformers, and the traps that others
fell into."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close_to_oracle
from torch import Tensor
from torch.nn.functional import normalize as l2_normalize

import fastembed
from fastembed.ops.pooling import MODES, finish_pooled

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64)
MASK_DTYPES = (*INTEGERS, *DTYPES, torch.float64)


@dataclass
class Call:
    """Arguments of one `pool_exits`."""

    hidden_states: list[Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def ours(self) -> list[dict[int, Tensor]]:
        return fastembed.pool_exits(self.hidden_states, **self.options)

    def reference(self) -> list[dict[int, Tensor]]:
        with fastembed.use_backend("reference"):
            return self.ours()

    def oracle(self) -> list[dict[int, Tensor]]:
        options = {**self.options, "out_dtype": torch.float64}
        with fastembed.use_backend("reference"):
            return fastembed.pool_exits([hidden.double() for hidden in self.hidden_states], **options)


def _flat(pooled: list[dict[int, Tensor]]) -> list[Tensor]:
    return [tensor for by_dim in pooled for tensor in by_dim.values()]


def _random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values around 0.5: neither sums nor means cancel to nothing."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5).to(dtype)


@st.composite
def _layouts(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of the shape with one of the memory layouts that callers have."""
    tensor = _random(shape, draw(st.integers(0, 2**32)), dtype)
    layout = draw(st.sampled_from(["contiguous", "stack slice", "feature slice", "transposed", "reversed axes"]))
    if layout == "stack slice":
        return torch.stack([tensor, -tensor], dim=-2)[..., 0, :]
    if layout == "feature slice":
        return torch.cat([-tensor, tensor, tensor], dim=-1)[..., shape[-1] : 2 * shape[-1]]
    if layout == "transposed":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "reversed axes":
        return tensor.permute(*reversed(range(tensor.dim()))).contiguous().permute(*reversed(range(tensor.dim())))
    return tensor


@st.composite
def _masks(draw: st.DrawFn, batch: int, length: int) -> Tensor | None:
    side = draw(st.sampled_from(["none", "left", "right", "holes"]))
    if side == "none":
        return None
    if side == "holes":
        rows = [draw(st.lists(st.integers(0, 1), min_size=length, max_size=length)) for _ in range(batch)]
        mask = torch.tensor(rows, dtype=torch.int64).view(batch, length)
    else:
        counts = torch.tensor([draw(st.integers(0, length)) for _ in range(batch)], dtype=torch.int64)
        mask = (torch.arange(length) < counts[:, None]).long()
        mask = mask.flip(1) if side == "left" else mask
    mask = mask.to(draw(st.sampled_from(MASK_DTYPES)))
    return mask.T.contiguous().T if draw(st.booleans()) else mask


@st.composite
def _calls(draw: st.DrawFn) -> Call:
    dtype = draw(st.sampled_from(DTYPES))
    hidden_sizes = draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))
    packed = draw(st.booleans())
    if packed:
        lengths = draw(st.lists(st.integers(0, 20), max_size=4))
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(draw(st.sampled_from([torch.int32, torch.int64])))
        tokens: tuple[int, ...] = (sum(lengths),)
        options: dict[str, Any] = {"cu_seqlens": offsets}
        if draw(st.booleans()):
            options["attention_mask"] = draw(_masks(1, sum(lengths)))
    else:
        tokens = draw(st.integers(0, 4)), draw(st.integers(0, 30))
        options = {"attention_mask": draw(_masks(*tokens))}
    hidden_states = [draw(_layouts((*tokens, size), dtype)) for size in hidden_sizes]
    dims = [draw(st.lists(st.integers(1, size), min_size=1, max_size=4)) for size in hidden_sizes]
    options |= {
        "mode": draw(st.sampled_from(MODES)),
        "dims": dims if draw(st.booleans()) else None,
        "normalize": draw(st.booleans()),
        "out_dtype": draw(st.sampled_from([None, *DTYPES])),
    }
    return Call(hidden_states, options)


@given(call=_calls())
def test_agrees_with_the_reference(isa: str, call: Call) -> None:
    ours, reference, oracle = call.ours(), call.reference(), call.oracle()
    assert [list(by_dim) for by_dim in ours] == [list(by_dim) for by_dim in reference]
    for our, same_dtype, exact in zip(_flat(ours), _flat(reference), _flat(oracle), strict=True):
        assert our.dtype == same_dtype.dtype
        assert_close_to_oracle(our, same_dtype, exact)


@given(call=_calls(), data=st.data())
def test_special_values_come_out_as_in_the_reference(isa: str, call: Call, data: st.DataObject) -> None:
    """NaN and infinities of valid tokens, in every mode; those of padding never."""
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0])
    for hidden in call.hidden_states:
        rate = data.draw(st.sampled_from([0.02, 0.3]))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
        chosen = torch.rand(hidden.shape, generator=generator) < rate
        hidden[chosen] = special[torch.randint(4, (int(chosen.sum()),), generator=generator)].to(hidden.dtype)
    call.options["normalize"] = False
    for our, same in zip(_flat(call.ours()), _flat(call.reference()), strict=True):
        torch.testing.assert_close(our.isnan(), same.isnan())
        torch.testing.assert_close(our.isinf() * our.sign(), same.isinf() * same.sign(), equal_nan=True)


@given(call=_calls(), data=st.data())
def test_padding_never_matters(isa: str, call: Call, data: st.DataObject) -> None:
    mask = call.options.get("attention_mask")
    if mask is None:
        return
    expected = call.ours()
    mask = mask.view(call.hidden_states[0].shape[:-1])
    for hidden in call.hidden_states:
        hidden[mask == 0] = data.draw(st.sampled_from([math.nan, math.inf, 1e4]))
    torch.testing.assert_close(call.ours(), expected, rtol=0, atol=0)


@given(call=_calls())
def test_a_batch_of_one_equals_its_row_and_a_prefix_the_prefix_alone(isa: str, call: Call) -> None:
    everything = call.ours()
    options = dict(call.options)
    for row in range(_flat(everything)[0].shape[0]):
        if (offsets := call.options.get("cu_seqlens")) is not None:
            begin, end = offsets[row : row + 2].tolist()
            hidden_states = [hidden[begin:end] for hidden in call.hidden_states]
            options["cu_seqlens"] = offsets.new_tensor([0, end - begin])
            if (mask := call.options.get("attention_mask")) is not None:
                options["attention_mask"] = mask[:, begin:end]
        else:
            hidden_states = [hidden[row : row + 1] for hidden in call.hidden_states]
            if (mask := call.options["attention_mask"]) is not None:
                options["attention_mask"] = mask[row : row + 1]
        for exit_index, hidden in enumerate(hidden_states):
            for dim, tensor in everything[exit_index].items():
                alone = fastembed.pool_exits([hidden], **{**options, "dims": [dim]})[0][dim]
                torch.testing.assert_close(alone[0], tensor[row], rtol=0, atol=0, equal_nan=True)


@given(call=_calls())
def test_codes_are_those_of_the_pooled_vectors(isa: str, call: Call) -> None:
    """Exactly: of what this very kernel pools, int8 as the definition says and bits as pack_bits makes them."""
    plain = {**call.options, "normalize": False, "out_dtype": torch.float32}
    pooled = fastembed.pool_exits(call.hidden_states, **plain)
    int8 = fastembed.pool_exits(call.hidden_states, **{**call.options, "out_dtype": torch.int8})
    bits = fastembed.pool_exits(call.hidden_states, **{**call.options, "out_dtype": torch.uint8})
    for vectors, codes, packed in zip(_flat(pooled), _flat(int8), _flat(bits), strict=True):
        largest = vectors.abs().amax(dim=1, keepdim=True)
        expected = torch.where(largest > 0, (vectors / largest * 127).round(), 0).to(torch.int8)
        torch.testing.assert_close(codes, expected, rtol=0, atol=0)
        torch.testing.assert_close(packed, fastembed.pack_bits(vectors), rtol=0, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 1e-45])
def test_codes_of_special_values(isa: str, value: float) -> None:
    hidden = torch.full((1, 1, 37), 2.0)
    hidden[..., 20] = value
    if value in (0.0, 1e-45):
        hidden[:] = value
    (codes,) = _flat(fastembed.pool_exits([hidden], out_dtype=torch.int8))
    (bits,) = _flat(fastembed.pool_exits([hidden], out_dtype=torch.uint8))
    assert (codes == (127 if value == 1e-45 else 0)).all()
    torch.testing.assert_close(bits, fastembed.pack_bits(hidden[0]), rtol=0, atol=0)
    with fastembed.use_backend("reference"):
        same = fastembed.pool_exits([hidden], out_dtype=torch.int8)[0][37]
    torch.testing.assert_close(codes, same, rtol=0, atol=0)


@given(call=_calls(), data=st.data())
def test_ranges_and_positions_are_masks(isa: str, call: Call, data: st.DataObject) -> None:
    if (offsets := call.options.get("cu_seqlens")) is not None:
        starts, lengths = offsets[:-1].tolist(), offsets.diff().tolist()
    else:
        batch, length = call.hidden_states[0].shape[:2]
        starts, lengths = [row * length for row in range(batch)], [length] * batch
    spans = [sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2))) for n in lengths]
    lists = [data.draw(st.lists(st.integers(-1, n - 1), min_size=3, max_size=3)) for n in lengths]
    in_span = torch.zeros(call.hidden_states[0].shape[:-1], dtype=torch.bool)
    listed = in_span.clone()
    for start, (begin, end), positions in zip(starts, spans, lists, strict=True):
        in_span.view(-1)[start + begin : start + end] = True
        for position in positions:
            if position >= 0:
                listed.view(-1)[start + position] = True
    mask = call.options.get("attention_mask")
    valid = torch.ones_like(in_span) if mask is None else mask.view(in_span.shape).bool()
    ranges = torch.tensor(spans, dtype=torch.int64).view(-1, 2)
    positions = torch.tensor(lists, dtype=torch.int32).view(-1, 3)
    for selection, of_tokens in (
        ({"ranges": ranges}, in_span),
        ({"positions": positions}, listed),
        ({"ranges": ranges, "positions": positions}, in_span & listed),
    ):
        ours = fastembed.pool_exits(call.hidden_states, **call.options, **selection)
        masked = fastembed.pool_exits(call.hidden_states, **{**call.options, "attention_mask": valid & of_tokens})
        torch.testing.assert_close(ours, masked, rtol=0, atol=0, equal_nan=True)


@given(call=_calls(), modes=st.lists(st.sampled_from(MODES), min_size=1, max_size=4), data=st.data())
def test_several_modes_are_each_as_by_itself(isa: str, call: Call, modes: list[str], data: st.DataObject) -> None:
    """Side by side, bit for bit, and then cut and normalised as one vector."""
    alone = {"normalize": False, "dims": None, "out_dtype": torch.float32}
    parts = []
    for mode in modes:
        call.options |= {**alone, "mode": mode}
        parts.append(_flat(call.ours()))
    whole = [torch.cat(of_exit, dim=1) for of_exit in zip(*parts, strict=True)]
    call.options |= {"mode": modes}
    torch.testing.assert_close(_flat(call.ours()), whole, rtol=0, atol=0)
    dims = [data.draw(st.lists(st.integers(1, vectors.shape[1]), min_size=1, max_size=3)) for vectors in whole]
    out_dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.uint8]))
    call.options |= {"dims": dims, "normalize": True, "out_dtype": out_dtype}
    expected = finish_pooled(whole, dims, True, out_dtype)
    torch.testing.assert_close(_flat(call.ours()), _flat(expected), rtol=0, atol=0)


@pytest.mark.parametrize("modes", [["mean", "max"], ["cls"], ["weightedmean", "lasttoken", "mean_sqrt_len"]])
def test_several_modes_side_by_side_as_in_sentence_transformers(modes: list[str]) -> None:
    models = pytest.importorskip("sentence_transformers.models")
    hidden = _random((4, 9, 24), 0)
    mask = (torch.arange(9) < torch.tensor([9, 1, 4, 6])[:, None]).long()
    pooling = models.Pooling(24, pooling_mode=tuple(ST_NAMES.get(mode, mode) for mode in modes))
    theirs = pooling({"token_embeddings": hidden, "attention_mask": mask})["sentence_embedding"]
    ours = fastembed.pool_exits([hidden], mask, mode=modes, normalize=False)[0][24 * len(modes)]
    torch.testing.assert_close(ours, theirs)
    (prefix,) = fastembed.pool_exits([hidden], mask, mode=modes, dims=[20])[0].values()
    torch.testing.assert_close(prefix, l2_normalize(ours[:, :20], dim=1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("exits", "batch", "length", "size"), [(1, 1, 301, 2100), (2, 1, 900, 100), (3, 5, 64, 384), (1, 1, 3000, 64)]
)
def test_results_do_not_depend_on_the_number_of_threads(
    isa: str, thread_counts: tuple[int, ...], mode: str, exits: int, batch: int, length: int, size: int
) -> None:
    hidden_states = [_random((batch, length, size), seed) for seed in range(exits)]
    mask = (torch.arange(length) < torch.linspace(length, 1, batch).long()[:, None]).long()
    call = Call(hidden_states, {"attention_mask": mask, "mode": mode, "dims": [size, 50]})
    results = []
    for threads in thread_counts:
        torch.set_num_threads(threads)
        results.append(_flat(call.ours()))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)
    for our, same_dtype, exact in zip(results[0], _flat(call.reference()), _flat(call.oracle()), strict=True):
        assert_close_to_oracle(our, same_dtype, exact)


ST_NAMES = {"mean_sqrt_len": "mean_sqrt_len_tokens"}


def _sentence_transformers(mode: str, features: dict[str, Tensor], dim: int, normalize: bool) -> Tensor:
    models = pytest.importorskip("sentence_transformers.models")
    pooling = models.Pooling(features["token_embeddings"].shape[-1], pooling_mode=ST_NAMES.get(mode, mode))
    embedding = pooling(dict(features))["sentence_embedding"][:, :dim]
    return models.Normalize()({"sentence_embedding": embedding})["sentence_embedding"] if normalize else embedding


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_parity_with_sentence_transformers(padding: str, mode: str, dtype: torch.dtype, normalize: bool) -> None:
    hidden = _random((4, 9, 24), 0, dtype)
    mask = (torch.arange(9) < torch.tensor([9, 1, 4, 6])[:, None]).long()
    mask = {"right": mask, "left": mask.flip(1), "holes": mask[:, torch.tensor([3, 0, 4, 1, 8, 2, 5, 7, 6])]}[padding]
    call = Call([hidden], {"attention_mask": mask, "mode": mode, "dims": [24, 10], "normalize": normalize})
    features = {"token_embeddings": hidden, "attention_mask": mask}
    for dim, ours in call.ours()[0].items():
        theirs = _sentence_transformers(mode, features, dim, normalize)
        assert_close_to_oracle(ours, theirs, call.oracle()[0][dim])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_packed_parity_with_sentence_transformers_and_with_padded(mode: str, dtype: torch.dtype) -> None:
    lengths = torch.tensor([3, 1, 7, 5])
    padded = _random((4, 7, 24), 0, dtype)
    mask = torch.arange(7) < lengths[:, None]
    packed = padded[mask][None]
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    call = Call([packed], {"cu_seqlens": offsets, "mode": mode, "normalize": False})
    features = {"token_embeddings": packed, "cu_seq_lens_q": offsets}
    theirs = _sentence_transformers(mode, features, 24, normalize=False)
    assert_close_to_oracle(call.ours()[0][24], theirs, call.oracle()[0][24])
    as_padded = fastembed.pool_exits([padded], mask, mode=mode, normalize=False)
    torch.testing.assert_close(call.ours(), as_padded, rtol=0, atol=0)


@pytest.mark.parametrize("length", [1, 362, 2048, 8192])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["mean", "mean_sqrt_len", "weightedmean"])
def test_long_sequences_neither_overflow_nor_lose_digits(isa: str, mode: str, dtype: torch.dtype, length: int) -> None:
    """Sums of half-precision tokens pass 65504, their counts and weights stop being exact above 2048 (256 in bfloat16);
    float32 sums of many tokens lose digits unless their errors are kept."""
    call = Call([_random((1, length, 20), length, dtype)], {"mode": mode, "normalize": False})
    assert_close_to_oracle(_flat(call.ours())[0], _flat(call.reference())[0], _flat(call.oracle())[0])
    constant = torch.full((1, length, 20), 200.0, dtype=dtype)
    pooled = fastembed.pool_exits([constant], mode=mode, normalize=False)[0][20]
    expected = 200 * math.sqrt(length) if mode == "mean_sqrt_len" else 200
    torch.testing.assert_close(pooled, torch.full_like(pooled, expected), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_tokens_are_zeros(isa: str, dtype: torch.dtype, mode: str) -> None:
    hidden = torch.full((3, 4, 5), math.nan, dtype=dtype)
    hidden[1] = 1
    mask = torch.tensor([[0] * 4, [1] * 4, [0] * 4])
    packed = torch.ones(4, 5, dtype=dtype)
    offsets = torch.tensor([0, 0, 4, 4])
    for normalize in (False, True):
        padded_rows = fastembed.pool_exits([hidden], mask, mode=mode, normalize=normalize)[0][5]
        packed_rows = fastembed.pool_exits([packed], cu_seqlens=offsets, mode=mode, normalize=normalize)[0][5]
        assert (padded_rows[[0, 2]] == 0).all()
        torch.testing.assert_close(packed_rows, padded_rows, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_neither_overflow_nor_vanish(isa: str, dtype: torch.dtype) -> None:
    """In half precision 1e-12 is zero and a norm above 65504 infinite; in float32 the squares leave the range first."""
    large, small = (6e4, 1e-4) if dtype == torch.float16 else (1e30, 1e-10)
    for scale in (large, small):
        hidden = torch.full((1, 1, 16), scale, dtype=dtype)
        unit = fastembed.pool_exits([hidden])[0][16]
        torch.testing.assert_close(unit, torch.full_like(unit, 0.25), rtol=torch.finfo(dtype).eps, atol=0)
    assert (fastembed.pool_exits([torch.zeros(1, 1, 16, dtype=dtype)])[0][16] == 0).all()


@pytest.mark.parametrize(
    ("mode", "left", "holes"),
    [("cls", 3, 1), ("lasttoken", 4, 4), ("weightedmean", 11 / 3, 17 / 5), ("mean", 3.5, 2.5)],
)
def test_positions_count_from_the_first_valid_token(isa: str, mode: str, left: float, holes: float) -> None:
    hidden = torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1)
    for mask, expected in (([[0, 0, 1, 1]], left), ([[1, 0, 0, 1]], holes)):
        pooled = fastembed.pool_exits([hidden], torch.tensor(mask), mode=mode, normalize=False)
        assert pooled[0][1].item() == pytest.approx(expected, rel=1e-6)


def test_prefixes_are_cut_first_and_normalized_then(isa: str) -> None:
    hidden = _random((2, 5, 48), 0)
    pooled = fastembed.pool_exits([hidden], dims=[48, 7, 30])[0]
    whole = hidden.double().mean(dim=1)
    assert list(pooled) == [48, 7, 30]
    for dim, prefix in pooled.items():
        torch.testing.assert_close(prefix.double(), l2_normalize(whole[:, :dim], dim=1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_inputs_are_left_alone(isa: str, mode: str) -> None:
    hidden, mask = _random((2, 5, 9), 0), torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, 1, 1]])
    before = hidden.clone(), mask.clone()
    fastembed.pool_exits([hidden, hidden], mask, mode=mode, dims=[9, 3])
    torch.testing.assert_close((hidden, mask), before, rtol=0, atol=0)


def test_half_precision_conversions_are_exact(isa: str) -> None:
    """Every float16 and bfloat16 value through load and store, and float32 values around every rounding boundary."""
    for dtype in HALVES:
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        hidden = every.view(1, 1, -1)
        for out_dtype in DTYPES:
            pooled = fastembed.pool_exits([hidden], mode="max", normalize=False, out_dtype=out_dtype)[0][2**16]
            torch.testing.assert_close(pooled[0], every.to(out_dtype), rtol=0, atol=0, equal_nan=True)
        widened = every.float()
        middle = (widened + widened.roll(-1)) / 2
        near = torch.stack([middle, middle.nextafter(widened), middle.nextafter(widened.roll(-1))])
        pooled = fastembed.pool_exits([near[:, None]], mode="max", normalize=False, out_dtype=dtype)[0][2**16]
        torch.testing.assert_close(pooled, near.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_expanded_and_negated_views_are_read_right(isa: str) -> None:
    row = _random((1, 1, 12), 0)
    mask = torch.ones(1, 1, dtype=torch.bool).expand(3, 7)
    pooled = fastembed.pool_exits([row.expand(3, 7, 12)], mask, normalize=False)[0][12]
    torch.testing.assert_close(pooled, row[:, 0].expand(3, 12))
    negated = torch.complex(row, row).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(fastembed.pool_exits([negated], normalize=False)[0][12], -row[:, 0])
