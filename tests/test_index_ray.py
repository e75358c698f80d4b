"""Sharded search on a local Ray."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastembed import BinaryIndex, IndexFileError, IVFBinaryIndex

ray = pytest.importorskip("ray")

from fastembed.integrations.ray import ShardedIndex  # noqa: E402

DIM = 40
RNG = np.random.default_rng(0)
VECTORS = RNG.integers(-1, 2, (500, DIM)).astype(np.float32) + np.float32(0.25)
QUERIES = RNG.standard_normal((5, DIM)).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=80 << 20,
        logging_level="error",
        log_to_driver=False,
    )
    yield
    ray.shutdown()


def saved(index: Any, folder: Path, count: int) -> list[Path]:
    paths = [folder / f"shard-{number}" for number in range(count)]
    for part, path in zip(index.split(count), paths, strict=True):
        part.save(path)
    return paths


def assert_same(ours: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert type(one) is type(other)
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_shards_are_one_index_and_outlive_their_workers(tmp_path: Path) -> None:
    index = BinaryIndex(DIM, 2, "sdc", rescore="float16")
    index.add(VECTORS)
    shards = ShardedIndex(saved(index, tmp_path, 2))
    assert len(shards) == 500
    how = {"rescore_multiplier": 0}
    assert_same(shards.search(QUERIES, 20, **how), index.search(QUERIES, 20, **how))
    tensor = torch.from_numpy(QUERIES)
    assert_same(
        shards.search(tensor, 300, filter=torch.arange(400), **how), index.search(tensor, 300, filter=range(400), **how)
    )
    assert_same(shards.search(QUERIES, 500), index.search(QUERIES, 500))
    process = ray.get(shards._shards[0].process.remote())
    os.kill(process, signal.SIGKILL)
    assert_same(shards.search(QUERIES, 7, **how), index.search(QUERIES, 7, **how))
    assert ray.get(shards._shards[0].process.remote()) != process
    with pytest.raises(ValueError, match="k must be between 1 and 500, got 501"):
        shards.search(QUERIES, 501)
    with pytest.raises(ValueError, match=r"^queries must have the 40 dims of the index, got 39$"):
        shards.search(QUERIES[:, 1:], 3)
    # Files that are gone, or were replaced by smaller ones, while their worker was away.
    path = tmp_path / "shard-1"
    whole = path.read_bytes()
    path.unlink()
    os.kill(ray.get(shards._shards[1].process.remote()), signal.SIGKILL)
    with pytest.raises(FileNotFoundError, match="shard-1"):
        shards.search(QUERIES, 7)
    index.split(50)[-1].save(path)
    with pytest.raises(ValueError, match="k must be at most the 260 rows that the files hold by now, got 500"):
        shards.search(QUERIES, 500)
    path.write_bytes(whole)
    os.kill(ray.get(shards._shards[1].process.remote()), signal.SIGKILL)
    assert_same(shards.search(QUERIES, 7, **how), index.search(QUERIES, 7, **how))
    shards.close()
    with pytest.raises(ValueError, match="search must come before close"):
        shards.search(QUERIES, 7)


def test_shards_of_lists_and_shards_that_do_not_fit(tmp_path: Path) -> None:
    index = IVFBinaryIndex(DIM, lists=6, nprobe=2)
    index.train(VECTORS)
    index.add(VECTORS)
    paths = saved(index, tmp_path, 2)
    shards = ShardedIndex(paths)
    assert_same(shards.search(QUERIES, 30, nprobe=3), index.search(QUERIES, 30, nprobe=3))
    shards.close()
    twice = ShardedIndex([paths[0], paths[0]])
    with pytest.raises(ValueError, match="paths must hold indexes with ids of their own, but two hold"):
        twice.search(QUERIES, 3)
    twice.close()
    other = BinaryIndex(DIM)
    other.add(VECTORS)
    other.save(tmp_path / "other")
    with pytest.raises(ValueError, match="paths must hold indexes of the same settings"):
        ShardedIndex([paths[0], tmp_path / "other"])
    (tmp_path / "other").write_bytes(b"no index")
    with pytest.raises(IndexFileError, match="must be an index file"):
        ShardedIndex([tmp_path / "other"])
    with pytest.raises(ValueError, match="paths must name at least one file, got none"):
        ShardedIndex([])
    with pytest.raises(TypeError, match="paths must be several paths, got 'other'"):
        ShardedIndex("other")
