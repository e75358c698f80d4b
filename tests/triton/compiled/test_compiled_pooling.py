"""The Triton pooling kernels, compiled for real architectures by the calls that launch them, without a GPU."""

import pytest
import torch

from bench.static import KernelResources
from bench.static.triton import (
    compile_offline,
    noted_instructions,
    pool_exits,
    pool_exits_backward,
    resources,
    rows,
)
from fastembed.triton_kernels import pooling_backward
from fastembed.triton_kernels.pooling import BLOCK_TOKENS, TILE_BYTES


@pytest.fixture(scope="module")
def table(arch: int) -> list[KernelResources]:
    return rows("pooling", "pooling_backward", archs=[arch])


def test_every_kernel_compiles(table: list[KernelResources]) -> None:
    kernels = {row.kernel for row in table}
    assert len(table) == len(kernels)
    assert kernels >= {"pooling.reduce_tokens[mean, bfloat16]", "pooling.finish_rows[cls, bfloat16, NORMALIZE]"}
    assert kernels >= {"pooling_backward.write_tokens[mean, padded, bfloat16]"}


def test_nothing_spills(table: list[KernelResources]) -> None:
    assert [row for row in table if row.spill_bytes or row.stack_bytes] == []


def test_registers_leave_room_for_six_blocks_per_multiprocessor(table: list[KernelResources]) -> None:
    registers, threads_per_block = 65536, 128
    assert [row for row in table if row.registers > registers // (6 * threads_per_block)] == []


@pytest.mark.parametrize(("dtype", "packed"), [(torch.float32, True), (torch.float16, False)])
def test_token_loop_loads_16_bytes_at_a_time(dtype: torch.dtype, packed: bool) -> None:
    (reduce_tokens, log), (finish_rows, _) = compile_offline(lambda: pool_exits("mean", dtype, packed=packed), 90)
    assert resources("pooling", "mean", reduce_tokens, log).spill_bytes == 0
    threads = 32 * reduce_tokens.metadata.num_warps
    loads = noted_instructions(reduce_tokens)
    assert loads["LDG.128"] == BLOCK_TOKENS.value * TILE_BYTES // (16 * threads)
    for kernel in (reduce_tokens, finish_rows):
        assert not any(opcode.startswith(("ATOM", "RED")) for opcode in noted_instructions(kernel))


def test_gradients_are_written_16_bytes_at_a_time() -> None:
    kernels = compile_offline(lambda: pool_exits_backward("max", torch.bfloat16, packed=True), 90)
    _, (write_tokens, _) = kernels
    threads = 32 * write_tokens.metadata.num_warps
    tile = pooling_backward.BLOCK_TOKENS.value * pooling_backward.TILE_BYTES
    assert noted_instructions(write_tokens)["STG.128"] == tile // (16 * threads)
    for kernel, _ in kernels:
        assert not any(opcode.startswith(("ATOM", "RED")) for opcode in noted_instructions(kernel))
