"""The command line, `fastembed.info()`, and the warning about the other project of the same import name."""

import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch

import fastembed
from fastembed import _distributions, backends, cli
from fastembed._native import core


def test_info_says_what_is_used() -> None:
    info = fastembed.info()
    assert (info.version, info.torch) == (fastembed.__version__, torch.__version__)
    assert (info.isa, info.best_isa) == (core.isa(), core.best_isa())
    assert info.threads == torch.get_num_threads()
    assert info.cores >= 1
    assert set(info.backends) == set(backends.BACKENDS)
    assert info.backends["cpu"] is None
    assert info.backends["cuda"] == backends.unavailable_reason("cuda")


def test_one_openmp_runtime_serves_pytorch_and_the_kernels() -> None:
    openmp = fastembed.info().openmp
    if not openmp:
        pytest.skip("this system does not tell which libraries are loaded")
    code = "import fastembed; print(*fastembed.info().openmp)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert len(loaded) == 1, loaded


def test_info_reports_a_level_that_is_held_down(isa: str) -> None:
    info = fastembed.info()
    assert info.isa == isa
    assert ("this CPU has" in str(info)) == (isa != core.best_isa())


def test_info_reports_the_forced_backend() -> None:
    assert fastembed.info().forced_backend is None
    with fastembed.use_backend("reference"):
        assert fastembed.info().forced_backend == "reference"


def test_info_explains_a_forced_backend_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTEMBED_BACKEND", "cuda")
    info = fastembed.info()
    assert info.forced_backend == "cuda"
    assert "backend forced" in str(info)


def test_info_command_prints_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["info"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["fastembed-kernels", fastembed.__version__]
    for name in backends.BACKENDS:
        assert any(line.startswith(f"backend {name} ") for line in lines)


def test_installed_command_works() -> None:
    command = Path(sys.executable).with_name("fastembed")
    if not command.exists():
        pytest.skip("the package is not installed with its scripts")
    result = subprocess.run([str(command), "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"fastembed-kernels {fastembed.__version__}"


@pytest.mark.parametrize(("arguments", "message"), [([], "COMMAND"), (["nonsense"], "invalid choice")])
def test_wrong_commands_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("other", ["fastembed", "fastembed-gpu"])
def test_the_other_fastembed_is_named(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != other:
            raise metadata.PackageNotFoundError(name)
        return "0.9.1"

    monkeypatch.setattr(metadata, "version", version)
    with pytest.warns(RuntimeWarning, match=rf"fastembed-kernels and {other} 0\.9\.1 \(Qdrant\)") as caught:
        _distributions.warn_if_name_is_shared()
    assert len(caught) == 1


def test_alone_there_is_no_warning() -> None:
    for name in _distributions.OTHERS:
        with pytest.raises(metadata.PackageNotFoundError):
            metadata.version(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _distributions.warn_if_name_is_shared()


def test_import_warns_once_beside_the_other_distribution(tmp_path: Path) -> None:
    """A real import, with the other distribution's metadata on the path."""
    folder = tmp_path / "fastembed-0.9.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: fastembed\nVersion: 0.9.1\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import fastembed, fastembed.info; import fastembed"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.count("fastembed-kernels and fastembed 0.9.1 (Qdrant)") == 1, result.stderr
