"""RecurrentBinarizer and its training."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastembed
from fastembed import hamming_topk, pack_bits, sdc_encode, sdc_topk, train_binarizer
from fastembed.nn import RecurrentBinarizer
from fastembed.training import binarizer as training

DIM = 32
X = torch.randn(300, DIM, generator=torch.Generator().manual_seed(0))
SHAPES = [(DIM, 1, None), (DIM, 2, None), (20, 3, 64), (48, 4, 100), (24, 2, 0), (32, 2, 7)]


def trained_a_little(out_dims: int = DIM, bits: int = 2, hidden_dim: int | None = None) -> RecurrentBinarizer:
    """A module whose normalisations have statistics of their own."""
    module = RecurrentBinarizer(DIM, out_dims, bits, hidden_dim, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    module(X)
    return module.eval()


def levels_by_the_formula(module: RecurrentBinarizer, x: Tensor) -> Tensor:
    """The recurrence as the class states it, in float64, from the layers themselves."""
    module = copy.deepcopy(module).double().eval()

    def sign(value: Tensor) -> Tensor:
        return 2 * (value > 0).double() - 1

    f = F.normalize(x.double())
    b = sign(module.binarize(f))
    for i in range(module.bits - 1):
        b = b + sign(module.residual[i](f - F.normalize(module.reconstruct[i](b)))) / 2 ** (i + 1)
    return b


@pytest.mark.parametrize(("out_dims", "bits", "hidden_dim"), SHAPES)
def test_codes_are_the_levels_of_the_recurrence(out_dims: int, bits: int, hidden_dim: int | None) -> None:
    module = trained_a_little(out_dims, bits, hidden_dim)
    expected = levels_by_the_formula(module, X)
    codes = module.encode(X)
    assert (codes.bits, codes.dim, len(codes)) == (bits, out_dims, len(X))
    levels = codes.levels()
    # b_j = (2 c_j - (2^bits - 1)) / 2^(bits - 1), in float64 and in float32 but for arguments within rounding of 0.
    differing = (levels.double() / 2 ** (bits - 1) != expected).double().mean()
    assert differing < 1e-3
    assert torch.equal(module(X), levels.float() / 2 ** (bits - 1)) or differing > 0
    torch.testing.assert_close(codes.inverse_norms, 1 / levels.float().norm(dim=1), rtol=1e-6, atol=0)


def test_first_plane_is_the_binary_code() -> None:
    module = trained_a_little(bits=3)
    first = pack_bits(module.binarize(F.normalize(X)).detach())
    assert torch.equal(module.encode(X).codes[:, : DIM // 8], first)
    one = RecurrentBinarizer(DIM, bits=1)
    assert torch.equal(one.encode(X).codes, pack_bits(X))
    hamming_topk(one.encode(X[:3]).codes, one.encode(X).codes, 5)


def test_zero_falls_on_the_side_where_pack_bits_puts_it() -> None:
    module = RecurrentBinarizer(DIM, bits=2)
    assert torch.equal(module.encode(torch.zeros(1, DIM)).codes[:, : DIM // 8], pack_bits(torch.zeros(1, DIM)))
    assert set(module(torch.zeros(2, DIM)).unique().abs().tolist()) <= {0.5, 1.5}


def test_untrained_module_is_a_good_quantiser() -> None:
    ours, plain = RecurrentBinarizer(DIM, bits=2).encode(X).levels(), sdc_encode(X, 2).levels()
    assert (ours == plain).float().mean() > 0.99
    with torch.no_grad():
        calibrated = RecurrentBinarizer(DIM, bits=2)
        calibrated.calibrate(X)
        assert (calibrated.train()(X) * 2 == plain).float().mean() > 0.99


def test_gradient_is_straight_through_and_clipped() -> None:
    x = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5], requires_grad=True)
    from fastembed.nn.binarizer import _sign

    y = _sign(x)
    assert y.tolist() == [-1, -1, -1, -1, 1, 1, 1]
    (y * torch.arange(1.0, 8)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 0]
    module = RecurrentBinarizer(DIM, bits=3)
    module(X).square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_arrays_tensors_dtypes_lengths_and_modes_give_the_same_codes() -> None:
    module = trained_a_little()
    expected = module.encode(X)
    for codes in (
        module.encode(X.numpy()),
        module.encode(X.double()),
        module.encode(X * 8),
        module.train().encode(X),
        module.encode(torch.cat([X, X])[:300]),
        module.encode(np.asarray(X)[::-1][::-1]),
    ):
        np.testing.assert_array_equal(np.asarray(codes.codes), expected.codes)
        np.testing.assert_array_equal(np.asarray(codes.inverse_norms), expected.inverse_norms)
    assert isinstance(module.encode(X.numpy()).codes, np.ndarray)
    assert len(module.encode(X[:0])) == 0
    assert torch.equal(module.encode(X, dims=16).levels(), expected.levels()[:, :16])


def test_folded_weights_follow_the_module() -> None:
    module = trained_a_little()
    before = module.encode(X).codes
    with torch.no_grad():
        module.binarize.norm.bias += 1  # type: ignore[union-attr, operator]
    assert not torch.equal(module.encode(X).codes, before)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin.encode(X).codes, module.encode(X).codes)
    with torch.inference_mode():
        inside = RecurrentBinarizer(DIM)
        inside.encode(X)
        inside.encode(X)


def test_save_and_load(tmp_path: Path) -> None:
    module = trained_a_little(24, 3, 100)
    path = tmp_path / "binarizer.safetensors"
    module.save(path)
    loaded = RecurrentBinarizer.load(path)
    assert loaded.config() == module.config()
    assert not loaded.training
    assert torch.equal(loaded.encode(X).codes, module.encode(X).codes)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="path must be"):
            RecurrentBinarizer.load(path)
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="path must be an undamaged fastembed safetensors file"):
            RecurrentBinarizer.load(path)
    with pytest.raises(IsADirectoryError):
        RecurrentBinarizer.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        RecurrentBinarizer.load(tmp_path / "absent")


def test_a_wider_module_starts_from_an_older_one() -> None:
    for hidden_dim in (None, 0):
        older = trained_a_little(20, 3, hidden_dim)
        wider = RecurrentBinarizer(DIM, 32, 3, hidden_dim, seed=7).eval()
        wider.start_from(older)
        assert torch.equal(wider.encode(X, dims=20).codes, older.encode(X).codes)
    with pytest.raises(ValueError, match="older must have a hidden_dim that fits into 64, got 0"):
        trained_a_little().start_from(trained_a_little(hidden_dim=0))


# ---- training ----


def clustered(rows: int, seed: int, dim: int = DIM) -> tuple[Tensor, Tensor]:
    """Pairs about centres that every seed shares: the first 8 dims are noise that the pairs do not share."""
    centres = torch.randn(200, dim, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    rows_of = torch.randint(0, 200, (rows,), generator=generator)
    sides = []
    for _ in range(2):
        side = centres[rows_of] + 0.5 * torch.randn(rows, dim, generator=generator)
        side[:, :8] = 2.5 * torch.randn(rows, 8, generator=generator)
        sides.append(side)
    return sides[0], sides[1]


FAST: dict[str, Any] = {"epochs": 4, "batch_size": 64, "progress": False}
TRAIN = clustered(640, 1)


def recall(queries: Any, codes: Any, k: int = 10) -> float:
    _, ids = sdc_topk(queries, codes, k)
    return (ids == torch.arange(len(queries))[:, None]).any(dim=1).double().mean().item()


def test_training_on_pairs_improves_the_search_of_held_out_ones() -> None:
    module = train_binarizer(*TRAIN, bits=2, **FAST)
    queries, documents = clustered(300, 2)
    trained = recall(module.encode(queries), module.encode(documents))
    untrained = recall(sdc_encode(queries, 2), sdc_encode(documents, 2))
    assert trained > untrained + 0.03


def test_training_without_pairs_keeps_the_neighbourhoods() -> None:
    module = train_binarizer(TRAIN[0], bits=1, **FAST)
    rows = F.normalize(clustered(300, 2)[0])
    truth = (rows @ rows.T).topk(10).indices

    def overlap(codes: Any) -> float:
        return (sdc_topk(codes, codes, 10)[1][:, :, None] == truth[:, None]).any(dim=2).double().mean().item()

    assert overlap(module.encode(rows)) > overlap(sdc_encode(rows, 1)) - 0.02


def test_new_queries_search_old_codes() -> None:
    old = train_binarizer(*TRAIN, dims=24, **FAST)
    more = clustered(960, 3)
    new = train_binarizer(*more, dims=32, compatible_with=old, seed=5, **FAST)
    stranger = train_binarizer(*more, dims=32, seed=5, **FAST)
    queries, documents = clustered(300, 2)
    old_codes = old.encode(documents)
    among_old = recall(old.encode(queries), old_codes)
    assert recall(new.encode(queries, dims=24), old_codes) > 0.9 * among_old
    assert recall(stranger.encode(queries, dims=24), old_codes) < 0.6 * among_old
    assert recall(new.encode(queries), new.encode(documents)) > 0.9 * among_old


@pytest.mark.parametrize("pairs", [True, False])
def test_the_same_seed_gives_the_same_bits(pairs: bool) -> None:
    data = TRAIN if pairs else TRAIN[:1]
    settings = {**FAST, "epochs": 1}
    one = train_binarizer(*data, seed=3, **settings).state_dict()
    other = train_binarizer(*(side.numpy() for side in data), seed=3, **settings).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    different = train_binarizer(*data, seed=4, **settings).state_dict()
    assert any(not torch.equal(one[name], different[name]) for name in one)


@pytest.mark.parametrize("older", [False, True])
def test_a_killed_run_resumes_exactly(older: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {**FAST, "queue_size": 100}
    if older:
        settings["compatible_with"] = train_binarizer(*TRAIN, **{**FAST, "epochs": 0})
    whole = train_binarizer(*TRAIN, **settings).state_dict()
    path = tmp_path / "run.safetensors"
    steps = training._Run.train_on
    calls = 0

    def killed(run: Any, ids: Tensor) -> float:
        nonlocal calls
        calls += 1
        if calls == 25:  # in the third epoch of ten steps each
            raise KeyboardInterrupt
        return steps(run, ids)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "train_on", killed)
        with pytest.raises(KeyboardInterrupt):
            train_binarizer(*TRAIN, checkpoint=path, **settings)
    resumed = train_binarizer(*TRAIN, checkpoint=path, **settings).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    done = train_binarizer(*TRAIN, checkpoint=path, **settings).state_dict()
    assert all(torch.equal(whole[name], done[name]) for name in whole)
    with pytest.raises(ValueError, match="same data and settings"):
        train_binarizer(*TRAIN, checkpoint=path, **{**settings, "seed": 9})
    with pytest.raises(ValueError, match="same data and settings"):
        train_binarizer(TRAIN[0], TRAIN[1] + 1, checkpoint=path, **settings)


def test_fewer_embeddings_than_a_batch_train_too() -> None:
    train_binarizer(TRAIN[0][:5], TRAIN[1][:5], **FAST)
    train_binarizer(TRAIN[0][:2], **FAST)


def test_numbers_of_numpy_and_no_grad_do_not_matter(tmp_path: Path) -> None:
    settings = {
        **FAST,
        "epochs": np.int64(1),
        "seed": np.int32(3),
        "bits": np.int64(1),
        "learning_rate": np.float64(1e-3),
    }
    with torch.inference_mode():
        one = train_binarizer(*TRAIN, checkpoint=tmp_path / "run", **settings)
    with torch.no_grad():
        other = train_binarizer(*TRAIN, **{**FAST, "epochs": 1, "seed": 3, "bits": 1})
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    RecurrentBinarizer(np.int64(8), np.int64(4), np.int64(2), np.int64(16), seed=np.int64(1)).save(tmp_path / "module")
    assert RecurrentBinarizer.load(tmp_path / "module").config()["out_dims"] == 4


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    train_binarizer(*TRAIN, **{**FAST, "epochs": 1, "progress": True})
    assert "10/10" in capsys.readouterr().err


NAN = torch.where(torch.arange(300)[:, None] == 7, torch.nan, X)
MODULE = RecurrentBinarizer(DIM)
BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda: RecurrentBinarizer(0), ValueError, "in_features must be at least 1, got 0"),
    (lambda: RecurrentBinarizer(8, 0), ValueError, "out_dims must be at least 1"),
    (lambda: RecurrentBinarizer(8, bits=5), ValueError, "bits must be between 1 and 4, got 5"),
    (lambda: RecurrentBinarizer(8, hidden_dim=-1), ValueError, "hidden_dim must be at least 0"),
    (lambda: RecurrentBinarizer(8.0), TypeError, "in_features must be an integer"),
    (lambda: MODULE.encode(X[:, 1:]), ValueError, r"embeddings must have 32 columns, got \[300, 31\]"),
    (lambda: MODULE.encode(X[0]), ValueError, "embeddings must have shape"),
    (lambda: MODULE.encode(X.int()), TypeError, "embeddings must be"),
    (lambda: MODULE.encode([1.0]), TypeError, "embeddings must be a NumPy array or a tensor"),
    (lambda: MODULE.encode(NAN), ValueError, "embeddings must be finite, got a NaN or infinity in row 7"),
    (lambda: MODULE.encode(X, dims=33), ValueError, "dims must be between 1 and 32, got 33"),
    (lambda: MODULE(X[:, 1:]), ValueError, "x must have 32 columns"),
    (lambda: train_binarizer(NAN, **FAST), ValueError, "embeddings must be finite, got a NaN or infinity in row 7"),
    (lambda: train_binarizer(X, NAN, **FAST), ValueError, "positives must be finite"),
    (lambda: train_binarizer(X[:0], **FAST), ValueError, "embeddings must have at least 2 rows, got 0"),
    (lambda: train_binarizer(X[:1], **FAST), ValueError, "embeddings must have at least 2 rows, got 1"),
    (lambda: train_binarizer(X[:, :0], **FAST), ValueError, "in_features must be at least 1"),
    (lambda: train_binarizer(X[0], **FAST), ValueError, "embeddings must have shape"),
    (lambda: train_binarizer(X, X[1:], **FAST), ValueError, "positives must have the shape of the embeddings"),
    (lambda: train_binarizer(X, X.numpy(), **FAST), TypeError, "must be all NumPy arrays or all tensors"),
    (lambda: train_binarizer(X, dims=0, **FAST), ValueError, "^dims must be at least 1, got 0"),
    (lambda: train_binarizer(X, bits=0, **FAST), ValueError, "bits must be between 1 and 4"),
    (lambda: train_binarizer(X, momentum=1.0, **FAST), ValueError, "momentum must be at least 0 and below 1"),
    (lambda: train_binarizer(X, temperature=0.0, **FAST), ValueError, "temperature must be positive"),
    (
        lambda: train_binarizer(X, learning_rate=float("nan"), **FAST),
        ValueError,
        "learning_rate must be a number, got NaN",
    ),
    (lambda: train_binarizer(X, learning_rate="fast", **FAST), TypeError, "learning_rate must be a number, got 'fast'"),
    (lambda: train_binarizer(X, learning_rate=-1.0, **FAST), ValueError, "learning_rate must be positive"),
    (lambda: train_binarizer(X, learning_rate=1e20, **FAST), ValueError, "smaller than 1e[+]20: training diverged in"),
    (lambda: train_binarizer(X, seed=2**63, **FAST), ValueError, "seed must be between 0 and"),
    (lambda: train_binarizer(X, checkpoint="absent/run", **FAST), FileNotFoundError, "in a folder that is there"),
    (lambda: train_binarizer(X, hard_negatives=0, **FAST), ValueError, "hard_negatives must be at least 1"),
    (lambda: train_binarizer(X, compatible_with=X, **FAST), TypeError, "must be a RecurrentBinarizer, got Tensor"),
    (lambda: train_binarizer(X, dims=8, compatible_with=MODULE, **FAST), ValueError, "older must take 32"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_raises_one_clear_error(case: int) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_the_public_names() -> None:
    assert fastembed.nn.RecurrentBinarizer is RecurrentBinarizer
    assert fastembed.train_binarizer is train_binarizer
