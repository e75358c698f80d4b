"""Kernels with changes to their source: bugs put in on purpose, or constants that a test wants smaller."""

import importlib.util
from pathlib import Path
from types import ModuleType


def changed(kernels: ModuleType, path: Path, *changes: tuple[str, str]) -> ModuleType:
    """The module `kernels` written to `path` and imported from there, each text before replaced by the one after."""
    source = Path(kernels.__file__).read_text()
    for before, after in changes:
        assert source.count(before) == 1, f"the kernels no longer have this once: {before}"
        source = source.replace(before, after)
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
