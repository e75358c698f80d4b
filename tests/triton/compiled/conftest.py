"""The architectures that kernels are compiled for: one in every run, all of them in the long one."""

import pytest

from bench.static.triton import ARCHS


@pytest.fixture(
    scope="module", params=[pytest.param(arch, marks=[] if arch == 90 else pytest.mark.slow) for arch in ARCHS]
)
def arch(request: pytest.FixtureRequest) -> int:
    return request.param
