"""How `pytest -n` shares the tests out (pytest-xdist).

The tests of a file go to one process, since they share what was dear to make: models, compiled code, a child process.
"""

import pytest
from xdist.scheduler import LoadScopeScheduling

# Folders whose files share such things with each other.
SHARING = ("tests/cuda_on_cpu/", "tests/triton/")
# Tests that share nothing.
INDEPENDENT = "tests/test_sanitizers.py"
# They take minutes: begun first, lest one process works on them when the others have nothing left to do.
LONG = (INDEPENDENT, "tests/test_cuda_static.py", *SHARING)


def longest_first(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


class ByFile(LoadScopeScheduling):
    """Gives files, in their order, to whichever process is free."""

    def __init__(self, config: pytest.Config, log: object) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False  # by number of tests, as xdist would have it

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(INDEPENDENT):
            return nodeid
        file = nodeid.split("::", 1)[0]
        return next((folder for folder in SHARING if file.startswith(folder)), file)
