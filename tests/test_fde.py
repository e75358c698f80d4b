"""Fixed dimensional encodings of token embeddings. Tokens and matrices of small integers make every sum exact in
float32, so that kernels and reference agree on which side of a hyperplane a token falls."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import fastembed
from fastembed import FDEMatrices, fde_documents, fde_queries
from fastembed.ops._fde_torch import _fde

ENCODERS = (fde_queries, fde_documents)


def _integers(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return generator.integers(-3, 4, shape).astype(np.float32)


def _exact_matrices(generator: np.random.Generator, dim: int, **sizes: Any) -> FDEMatrices:
    matrices = FDEMatrices.random(dim, **sizes)
    hyperplanes = _integers(generator, *matrices.hyperplanes.shape)
    projections = None if matrices.projections is None else np.sign(matrices.projections)
    return dataclasses.replace(matrices, hyperplanes=hyperplanes, projections=projections)


@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    dim=st.integers(1, 40),
    repetitions=st.integers(1, 3),
    bits=st.integers(0, 4),
    projected=st.booleans(),
    sketched=st.booleans(),
    documents=st.booleans(),
)
def test_every_level_equals_the_reference(
    isa: str,
    seed: int,
    lengths: list[int],
    dim: int,
    repetitions: int,
    bits: int,
    projected: bool,
    sketched: bool,
    documents: bool,
) -> None:
    generator = np.random.default_rng(seed)
    matrices = _exact_matrices(
        generator,
        dim,
        repetitions=repetitions,
        bits=bits,
        projection_dim=(dim + 1) // 2 if projected else None,
        final_dim=repetitions if sketched else None,
    )
    tokens = torch.from_numpy(_integers(generator, sum(lengths), dim))
    offsets = torch.tensor(np.cumsum([0, *lengths]))
    encode = ENCODERS[documents]
    ours = encode(tokens, matrices, cu_seqlens=offsets)
    with fastembed.use_backend("reference"):
        theirs = encode(tokens, matrices, cu_seqlens=offsets)
    # Means are rounded once, before they are projected and summed.
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6 * float(theirs.abs().max()) if documents else 0)


@pytest.mark.parametrize("encode", ENCODERS)
def test_every_form_of_the_tokens_gives_the_same(encode: Any) -> None:
    generator = np.random.default_rng(0)
    matrices = FDEMatrices.random(12, repetitions=3, bits=3, projection_dim=4)
    sequences = [generator.standard_normal((length, 12), np.float32) for length in (5, 0, 70)]
    expected = encode(sequences, matrices)
    assert expected.dtype == np.float32
    assert expected.shape == (3, 3 * 8 * 4)
    packed, offsets = np.concatenate(sequences), np.array([0, 5, 5, 75])
    np.testing.assert_array_equal(encode(packed, matrices, cu_seqlens=offsets), expected)
    # Padding anywhere, holding anything.
    padded, mask = np.full((3, 90, 12), np.nan, np.float32), np.zeros((3, 90), bool)
    for row, sequence in enumerate(sequences):
        positions = np.sort(generator.permutation(90)[: len(sequence)])
        padded[row, positions], mask[row, positions] = sequence, True
    np.testing.assert_array_equal(encode(padded, matrices, mask), expected)
    as_tensors = encode(torch.from_numpy(padded), matrices, torch.from_numpy(mask).int())
    np.testing.assert_array_equal(as_tensors.numpy(), expected)
    np.testing.assert_array_equal(encode(sequences[2][None], matrices), expected[2:])
    np.testing.assert_array_equal(encode([s.astype(np.float64) for s in sequences], matrices), expected)


def test_results_do_not_depend_on_threads_or_batch(isa: str, thread_counts: tuple[int, ...]) -> None:
    tokens = torch.randn(9, 33, 24, generator=torch.Generator().manual_seed(0))
    matrices = FDEMatrices.random(24)
    results = []
    for threads in thread_counts:
        torch.set_num_threads(threads)
        results.append(fde_documents(tokens, matrices))
    for result in results:
        assert torch.equal(result, results[0])
    assert torch.equal(fde_documents(tokens[4:5], matrices), results[0][4:5])


def test_an_empty_block_takes_the_nearest_token_and_of_several_the_first() -> None:
    identity = np.eye(3, dtype=np.float32)[:, None, :]  # partition: the signs of the three dims
    matrices = FDEMatrices(identity, None, None, None, 24)
    tokens = np.array([[1, 1, 1], [-1, -1, 1], [2, 2, 2]], np.float32)  # partitions 7, 4, 7
    blocks = fde_documents(tokens[None], matrices).reshape(8, 3)
    first, second = tokens[:2]
    mean = (tokens[0] + tokens[2]) / 2
    # bits away from (7, 4): 0 (3, 1)  1 (2, 2)  2 (2, 2)  3 (1, 3)  5 (1, 1)  6 (1, 1)
    np.testing.assert_array_equal(blocks, [second, first, first, first, second, first, first, mean])
    blocks = fde_queries(tokens[None], matrices).reshape(8, 3)
    np.testing.assert_array_equal(blocks[[4, 7]], [second, tokens[0] + tokens[2]])
    assert not blocks[[0, 1, 2, 3, 5, 6]].any()


def test_more_repetitions_come_nearer_to_the_chamfer_similarity() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 32, generator=generator)
    documents = centres[torch.randint(40, (30, 50), generator=generator)]
    documents = torch.nn.functional.normalize(documents + 0.3 * torch.randn(30, 50, 32, generator=generator), dim=2)
    queries = documents[:10, :8]
    exact = torch.einsum("qid,njd->qnij", queries, documents).amax(dim=3).mean(dim=2)
    errors = []
    for repetitions in (1, 8, 64):
        matrices = FDEMatrices.random(32, repetitions=repetitions, bits=4, projection_dim=None)
        estimate = fde_queries(queries, matrices) @ fde_documents(documents, matrices).T / (8 * repetitions)
        errors.append(float((estimate - estimate.mean() - exact + exact.mean()).square().mean()))
    assert errors == sorted(errors, reverse=True)


def test_estimates_are_within_epsilon_below_the_chamfer_similarity() -> None:
    """Theorem 2.1 of the paper, with blocks as they are: a block's dot product is a mean of some where the Chamfer
    similarity has the largest of all, and the more hyperplanes, the nearer to it."""
    rng = np.random.default_rng(0)
    sets = rng.standard_normal((30, 40, 24)).astype(np.float32)
    documents = sets / np.linalg.norm(sets, axis=2, keepdims=True)
    queries = documents[:10, :6]
    exact = np.einsum("qid,njd->qnij", queries, documents).max(axis=3).mean(axis=2)
    epsilons = []
    for bits in (0, 3, 6, 9):
        matrices = FDEMatrices.random(24, repetitions=1, bits=bits, projection_dim=None)
        below = exact - fde_queries(queries, matrices) @ fde_documents(documents, matrices).T / 6
        assert below.min() > -1e-5
        epsilons.append(float(below.mean()))
    assert epsilons == sorted(epsilons, reverse=True)


def test_matrices_are_seeded_saved_and_loaded(tmp_path: Path) -> None:
    matrices = FDEMatrices.random(8, repetitions=2, bits=3, projection_dim=3, final_dim=20, seed=1)
    dim, repetitions, bits, projection_dim = np.array([8, 2, 3, 3], np.int8)  # whose own products overflow
    again = FDEMatrices.random(
        dim, repetitions=repetitions, bits=bits, projection_dim=projection_dim, final_dim=20, seed=1
    )
    for ours, theirs in zip(matrices.arrays(), again.arrays(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    matrices.save(tmp_path / "m.safetensors")
    loaded = FDEMatrices.load(tmp_path / "m.safetensors")
    tokens = np.random.default_rng(0).standard_normal((2, 5, 8), np.float32)
    np.testing.assert_array_equal(fde_queries(tokens, loaded), fde_queries(tokens, matrices))
    (tmp_path / "short").write_bytes((tmp_path / "m.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="path must be a safetensors file of FDE matrices, got"):
        FDEMatrices.load(tmp_path / "short")
    save_file({"hyperplanes": np.zeros((8, 2, 3))}, tmp_path / "other", {"final_dim": "128"})
    with pytest.raises(ValueError, match="other: hyperplanes must be a float32 array of 3 axes, got"):
        FDEMatrices.load(tmp_path / "other")
    whole = (tmp_path / "m.safetensors").read_bytes()
    for place in range(len(whole) - 1, len(whole) - 400, -13):
        (tmp_path / "damaged").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"path must be an? (undamaged )?file of FDE matrices, got .*damaged"):
            FDEMatrices.load(tmp_path / "damaged")
    with pytest.raises(IsADirectoryError):
        matrices.save(tmp_path)


def test_op_is_registered_properly() -> None:
    matrices = FDEMatrices.random(6, repetitions=2, bits=2, projection_dim=3, final_dim=7)
    tensors = [torch.from_numpy(array) for array in matrices.arrays() if array is not None]
    arguments = (torch.randn(9, 6), torch.tensor([0, 4, 9]), *tensors, 7, True)
    torch.library.opcheck(_fde.overload, arguments)


MATRICES = FDEMatrices.random(4, repetitions=2, bits=2, projection_dim=None)
TOKENS = np.ones((3, 5, 4), np.float32)
NOT_FINITE = TOKENS.copy()
NOT_FINITE[1, 2, 3] = np.inf
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"tokens": TOKENS[..., :3]}, ValueError, "tokens must have the 4 dims of the matrices, got 3"),
    ({"tokens": TOKENS[0]}, ValueError, "tokens must have shape"),
    ({"tokens": TOKENS.astype(np.int32)}, TypeError, "tokens must be .* got int32"),
    ({"tokens": []}, ValueError, "tokens must hold at least one sequence"),
    ({"tokens": [TOKENS[0], TOKENS[0, :, :3]]}, ValueError, "tokens must share dim and dtype"),
    ({"tokens": NOT_FINITE}, ValueError, "tokens must be finite, got a NaN or infinity in row 7"),
    ({"attention_mask": np.ones((3, 4))}, ValueError, r"attention_mask must be \[3, 5\], got \[3, 4\]"),
    ({"attention_mask": torch.ones(3, 5)}, TypeError, "must be all NumPy arrays or all tensors"),
    ({"tokens": TOKENS[0], "cu_seqlens": np.array([0, 6])}, ValueError, "cu_seqlens must rise from 0 to the 5 tokens"),
    ({"tokens": TOKENS[0], "cu_seqlens": np.array([0, 4, 2, 5])}, ValueError, "cu_seqlens must rise"),
    ({"tokens": TOKENS[0], "cu_seqlens": np.array([0.0, 5.0])}, TypeError, "cu_seqlens must be int32 or int64"),
    ({"matrices": MATRICES.hyperplanes}, TypeError, "matrices must be FDEMatrices, got ndarray"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_tokens_raise_one_clear_error(case: int) -> None:
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        fde_queries(**{"tokens": TOKENS, "matrices": MATRICES, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"dim": 4, "bits": 13}, "bits must be between 0 and 12, got 13"),
        ({"dim": 4, "projection_dim": 5}, "projection_dim must be between 1 and 4, got 5"),
        ({"dim": 4, "repetitions": 0}, "repetitions must be at least 1"),
        ({"dim": 4, "projection_dim": 1, "final_dim": 641}, "final_dim must be between 1 and 640, got 641"),
    ],
)
def test_bad_sizes_raise_one_clear_error(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FDEMatrices.random(**arguments)
