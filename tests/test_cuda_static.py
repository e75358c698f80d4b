"""The CUDA kernels as nvcc compiles them for each architecture."""

import re

import pytest

from bench.static import KernelResources
from bench.static.cuda import ARCHS, _parse, nvcc, rows


@pytest.fixture(
    scope="module", params=[pytest.param(arch, marks=[] if arch == 90 else pytest.mark.slow) for arch in ARCHS]
)
def table(request: pytest.FixtureRequest) -> list[KernelResources]:
    if nvcc() is None:
        pytest.skip("nvcc was found neither on PATH nor under CUDA_HOME")
    return rows([request.param])


def test_every_kernel_compiles(table: list[KernelResources]) -> None:
    kernels = {row.kernel for row in table}
    assert len(table) == len(kernels)
    assert kernels >= {"pooling.finish_rows[Floats]", "pooling.reduce_chunks[__nv_bfloat16, WeightedSum, true]"}
    assert kernels >= {"pooling.gather_prefixes", "pooling.write_tokens[__half, true]"}
    assert kernels >= {f"qmatmul.many_tokens[{bits}]" for bits in range(1, 9)}
    assert kernels >= {f"qmatmul.few_tokens[{bits}, {operands}]" for bits in range(1, 9) for operands in (1, 4)}


def test_nothing_spills(table: list[KernelResources]) -> None:
    assert [row for row in table if row.spill_bytes or row.stack_bytes] == []


def test_nothing_is_added_atomically(table: list[KernelResources]) -> None:
    assert [row for row in table if "atomics" in row.notes] == []


def test_vectorised_kernels_load_16_bytes_at_a_time(table: list[KernelResources]) -> None:
    vectorised = [row for row in table if row.kernel.endswith(", true]")]
    assert all("16-byte loads" in row.notes for row in vectorised if "reduce_chunks" in row.kernel)
    assert all("16-byte stores" in row.notes for row in vectorised if "write_tokens" in row.kernel)


def test_products_run_on_tensor_cores_from_asynchronous_copies(table: list[KernelResources]) -> None:
    products = [row for row in table if row.kernel.startswith(("qmatmul.few_tokens", "qmatmul.many_tokens"))]
    assert all(re.search(r"\d+ cp.async, \d+ mma.m16n8k32 u8.s8", row.notes) for row in products), products


def test_attention_runs_on_tensor_cores_from_shared_memory(table: list[KernelResources]) -> None:
    """float32 as the sum of three bfloat16."""
    attention = ("latent.attend_rows", "latent.gradients")
    notes = {row.kernel: row.notes for row in table if row.kernel.startswith(attention)}
    assert len(notes) == 12
    for kernel, note in notes.items():
        product = "f16.f16" if "half" in kernel else "bf16.bf16"
        assert re.fullmatch(rf"\d+ cp.async, \d+ ldmatrix, \d+ mma.m16n8k16 {product}", note), (kernel, note)


def test_searches_multiply_bits_and_bytes(table: list[KernelResources]) -> None:
    notes = {row.kernel: row.notes for row in table if row.kernel.startswith("search.find")}
    assert len(notes) == 10
    for kernel, note in notes.items():
        assert ("mma.m16n8k256 b1.b1" if "BitProducts" in kernel else "mma.m16n8k32 u8.s8") in note
        assert "16-byte loads" in note


def test_the_log_of_ptxas_is_read() -> None:
    log = (
        "ptxas info    : Compiling entry function '_Z1kPf' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z1kPf\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 4096 bytes smem, 360 bytes cmem[0]\n"
    )
    assert _parse(log) == [
        {
            "name": "_Z1kPf",
            "arch": "90",
            "stack": "8",
            "stores": "4",
            "loads": "12",
            "registers": "40",
            "shared": "4096",
        }
    ]
