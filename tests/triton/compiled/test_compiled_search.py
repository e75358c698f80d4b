"""The Triton search kernels, compiled for real architectures by the calls that launch them, without a GPU."""

import pytest

from bench.static import KernelResources
from bench.static.triton import rows


@pytest.fixture(scope="module")
def table() -> list[KernelResources]:
    return rows("search")


def test_nothing_spills(table: list[KernelResources]) -> None:
    assert [row for row in table if row.spill_bytes or row.stack_bytes] == []


@pytest.mark.parametrize(("arch", "product"), [("sm_80", "IMMA"), ("sm_90", "IGMMA"), ("sm_100", "UTCIMMA")])
def test_products_run_on_int8_tensor_cores(table: list[KernelResources], arch: str, product: str) -> None:
    notes = [row.notes for row in table if row.arch == arch]
    # Each search finds groups, then their members; but one has so large a k that its groups are the codes themselves.
    assert len(notes) == 11
    assert all(f" {product}" in note for note in notes)


def test_nothing_is_added_atomically(table: list[KernelResources]) -> None:
    assert [row for row in table if "ATOM" in row.notes or "RED" in row.notes] == []
