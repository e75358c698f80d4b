"""The benchmarks run: every family, on inputs too small to mean anything, with every provider verified."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bench import Case, Context, Faster, OfLimit, Within, Workload
from bench.__main__ import main
from bench.harness import runner

ROOT = Path(__file__).parent.parent
FAMILIES = sorted(path.stem for path in (ROOT / "bench").glob("[!_]*.py"))


def _bench(*arguments: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "bench", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


# One family in a process for each number of threads, the others in one: a process takes seconds to start.
@pytest.mark.parametrize("family", [*FAMILIES, "limits"])
def test_quick_run_writes_all_outputs(family: str, tmp_path: Path) -> None:
    threads = ["1", "2"] if family in ("fde", "limits") else ["2"]
    _bench(family, "--quick", "--threads", *threads, "--output", str(tmp_path))
    with (tmp_path / f"{family}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["threads"] for row in rows} == set(threads)
    assert {"int8", "float32", "popcount", "read"} <= {row["provider"] for row in rows if row["case"] == "limit"}
    assert all(float(row["rate"]) > 0 and row["cpu"] and row["versions"] for row in rows)
    assert (tmp_path / f"{family}.md").read_text().startswith(f"# {family}")
    assert (tmp_path / f"{family}.png").exists() == (family != "limits")


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """The same in this process."""
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    main()


def test_quick_run_leaves_the_recorded_results_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _main(monkeypatch, "limits", "--quick", "--threads", "1")
    assert "written" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "invalid choice"),
        (["limits", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["fde", "--case", "none of this name"], "no case of fde matches 'none of this name'"),
        (["limits", "--device", "cuda"], "--device cuda needs a GPU that PyTorch can use"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        _main(monkeypatch, *arguments)
    assert message in f"{error.value}{capsys.readouterr().err}"


def test_nothing_loads_openmp_before_the_command_says_how_its_threads_wait() -> None:
    code = "import sys, bench; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def _case(wrong: float = 0.0) -> Case:
    def setup(context: Context) -> Workload:
        return Workload(
            providers={"fastembed": lambda: 1.0, "peer": lambda: 1.0 + wrong},
            verify=lambda name, result: abs(result - 1.0),
            tolerance=0.1,
            amount=8.0,
            unit="B",
            demands={"read": 8.0},
            goals=[Faster("peer", 1e-9), Faster("absent", 2.0), OfLimit(1e9), Within(1e9)],
        )

    return Case("case", setup)


def test_goals_are_judged() -> None:
    results = runner.run([_case()], 1, "cpu", True, lambda message: None)
    assert [verdict.outcome for verdict in results.verdicts] == ["met", "not measured", "MISSED", "met"]
    assert {row.bound_by for row in results.measurements} == {"read"}


@pytest.mark.parametrize("wrong", [0.2, float("nan")])
def test_a_wrong_provider_is_not_timed(wrong: float) -> None:
    with pytest.raises(runner.VerificationError, match="case: peer has error"):
        runner.run([_case(wrong)], 1, "cpu", True, lambda message: None)


def test_recall_table_holds_every_method_and_knows_a_good_one() -> None:
    from bench import recall

    rng = np.random.default_rng(0)
    documents = rng.standard_normal((1200, 64), dtype=np.float32)
    queries = documents + 0.8 * rng.standard_normal((1200, 64), dtype=np.float32)
    queries, documents = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, documents))
    rows = {row.method: row for row in recall.table(queries, documents, epochs=1, progress=False)}
    assert rows["float32"].overlap == rows["float32"].relative == 1
    assert len(rows) == 41
    assert all(0.2 < row.overlap <= 1 for row in rows.values() if "other queries" not in row.method)
    assert rows["older codes, other queries"].overlap < 0.1 < rows["older codes, compatible queries"].overlap
    assert rows["sign codes, 2 bit"].overlap > rows["sign codes, 1 bit"].overlap
    assert rows["sign codes, 2 bit, 40 re-scored"].overlap > rows["sign codes, 2 bit"].overlap


def test_chamfer_table_orders_the_encodings() -> None:
    from bench import chamfer

    generator = torch.Generator().manual_seed(0)
    documents = [F.normalize(torch.randn(20 + i, 32, generator=generator), dim=1) for i in range(12)]
    queries = [document[:5] for document in documents]
    exact = chamfer.chamfer(queries, documents)
    assert np.allclose(np.diag(exact), 1, atol=1e-6)
    assert exact[0, 1] == pytest.approx(float((queries[0] @ documents[1].T).amax(dim=1).mean()), abs=1e-6)
    rows = list(chamfer.table(queries, documents, exact))
    assert len(rows) == len(chamfer.CONFIGURATIONS)
    assert rows[0].error > rows[4].error
    assert all(row.recall[1] > 0.8 for row in rows[2:])
