"""The index file: what was saved comes back, every damage is one clear exception, and nothing saved is ever lost."""

import os
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastembed import BinaryIndex, IndexFileError
from fastembed.index import _file

DIM = 44
RNG = np.random.default_rng(0)
VECTORS = RNG.standard_normal((300, DIM)).astype(np.float32)
QUERIES = RNG.standard_normal((6, DIM)).astype(np.float32)
MAKERS: dict[str, Callable[[], Any]] = {
    "hamming": lambda: BinaryIndex(DIM),
    "hamming float32": lambda: BinaryIndex(DIM, rescore="float32"),
    "sdc int8": lambda: BinaryIndex(DIM, 3, "sdc", rescore="int8"),
    "sdc float16": lambda: BinaryIndex(DIM, 2, "sdc", rescore="float16"),
}


def filled(kind: str) -> Any:
    index = MAKERS[kind]()
    index.add(VECTORS[:200])
    index.add(VECTORS[200:], range(1000, 1100))
    index.remove([0, 17, 1099])
    return index


def load(index: Any, path: Path, **how: Any) -> Any:
    return type(index).load(path, **how)


def assert_same_results(one: Any, other: Any) -> None:
    assert len(one) == len(other)
    for k in (1, 50):
        for ours, expected in zip(one.search(QUERIES, k), other.search(QUERIES, k), strict=True):
            np.testing.assert_array_equal(ours, expected)


@pytest.fixture(params=MAKERS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, Path]]:
    index = filled(request.param)
    index.save(tmp_path / "index")
    yield index, tmp_path / "index"
    assert os.listdir(tmp_path) == ["index"], "no temporary file is left"


# ---- what was saved comes back ----


@pytest.mark.parametrize("mmap", [False, True])
def test_a_saved_index_goes_on_where_it_was(saved: tuple[Any, Path], mmap: bool) -> None:
    index, path = saved
    loaded = load(index, path, mmap=mmap)
    assert repr(loaded) == repr(index)
    assert_same_results(loaded, index)
    for each in (index, loaded):  # reads a map, writes memory
        assert each.add(VECTORS[:5]).tolist() == list(range(1100, 1105))
        each.remove([3, 1050])
        each.update([4], VECTORS[9:10])
    assert_same_results(loaded, index)
    loaded.save(path)  # over the file that is mapped
    assert_same_results(loaded, index)
    assert_same_results(load(index, path, mmap=mmap, verify=True), index)


def test_a_map_is_read_in_place_and_never_written(saved: tuple[Any, Path]) -> None:
    index, path = saved
    (run,) = load(index, path, mmap=True)._state.runs
    for array in (run.ids, *run.columns.values()):
        assert not array.flags.writeable
        assert not array.flags.owndata


def test_an_empty_index_is_saved_too(tmp_path: Path) -> None:
    for make in MAKERS.values():
        index = make()
        index.add(VECTORS, range(5, 305))
        index.remove(range(5, 305))
        index.save(tmp_path / "index")
        for mmap in (False, True):
            loaded = load(index, tmp_path / "index", mmap=mmap)
            assert len(loaded) == 0
            assert loaded.add(VECTORS[:1]).tolist() == [305]


def test_consecutive_ids_take_no_room(tmp_path: Path) -> None:
    index = BinaryIndex(DIM)
    index.add(VECTORS[:100], range(5, 105))
    index.add(VECTORS[100:])
    index.save(tmp_path / "index")
    settings, arrays = _file.read_index_file(tmp_path / "index", mapped=True, verified=True)
    assert (settings["first_id"], list(arrays)) == (5, ["codes"])
    assert index.nbytes == arrays["codes"].nbytes
    for mmap in (False, True):
        loaded = load(index, tmp_path / "index", mmap=mmap)
        assert_same_results(loaded, index)
        assert loaded.ids.tolist() == list(range(5, 305))
        loaded.remove([5, 304])
        loaded.add(VECTORS[:1], [5])
        assert loaded.ids.tolist() == list(range(5, 304))
        with pytest.raises(IndexError, match="got 4"):
            loaded.remove([4])


def test_the_same_rows_make_the_same_file(tmp_path: Path) -> None:
    for name in ("one", "other"):
        filled("sdc int8").save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_the_file_is_laid_out_as_documented(tmp_path: Path) -> None:
    """docs/index.md, read by hand."""
    index = filled("sdc int8")
    index.save(tmp_path / "index")
    data = (tmp_path / "index").read_bytes()
    magic, version, count, size, table_crc, header_crc = struct.unpack_from("<8sIIQII", data)
    assert (magic, version, size) == (b"\x93FEINDEX", 1, len(data))
    assert header_crc == zlib.crc32(data[:28])
    assert table_crc == zlib.crc32(data[32:4096])
    sections = {}
    for entry in range(count):
        name, dtype, rows, columns, offset, nbytes, crc, zero = struct.unpack_from(
            "<16s8sQQQQII", data, 32 + 64 * entry
        )
        assert offset % 4096 == 0
        assert zero == 0
        end = offset + -(-nbytes // 4096) * 4096
        assert crc == zlib.crc32(data[offset:end])
        assert data[offset + nbytes : end] == bytes(end - offset - nbytes)
        array = np.frombuffer(data[offset : offset + nbytes], dtype.rstrip(b"\0").decode())
        sections[name.rstrip(b"\0").decode()] = array.reshape(rows, columns) if columns else array
    assert end == size
    codes = index.codes()
    np.testing.assert_array_equal(sections["ids"], index.ids)
    np.testing.assert_array_equal(sections["codes"], codes.codes)
    np.testing.assert_array_equal(sections["inverse_norms"], codes.inverse_norms)
    assert list(sections) == ["settings", "ids", "codes", "inverse_norms", "vectors", "vector_scales"]
    assert sections["settings"].tobytes() == (
        b'{"bits": 3, "dim": 44, "first_id": null, "kind": "flat", "metric": "sdc", "next_id": 1100, "rescore": "int8"}'
    )


def test_a_new_file_has_the_permissions_of_one(tmp_path: Path) -> None:
    filled("hamming").save(tmp_path / "index")
    (tmp_path / "plain").touch()
    assert (tmp_path / "index").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_old_file_keeps_its_permissions(tmp_path: Path) -> None:
    filled("hamming").save(tmp_path / "index")
    (tmp_path / "index").chmod(0o600)
    filled("hamming").save(tmp_path / "index")
    assert (tmp_path / "index").stat().st_mode & 0o777 == 0o600


def test_a_pipe_is_no_place_for_an_index(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="Neither a file nor the name of a new one"):
        filled("hamming").save(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("index")
    filled("hamming").save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same_results(BinaryIndex.load(tmp_path / "index"), filled("hamming"))


MAPPED = """
import sys
sys.modules["torch"] = None
import numpy as np
from fastembed import BinaryIndex

def most_resident():
    return 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

queries = np.zeros((1, 64), np.uint8)
warm = BinaryIndex(512)
warm.add(np.zeros((5000, 64), np.uint8))
warm.search(queries, 10)
before = most_resident()
index = BinaryIndex.load(sys.argv[1], mmap=True)
opened = most_resident() - before
index.search(queries, 10)
codes = 64 * len(index)
assert opened < codes / 10, opened
assert codes / 2 < most_resident() - before < 1.1 * codes, most_resident() - before
"""


def test_a_search_of_a_map_keeps_little_but_the_codes_resident(tmp_path: Path) -> None:
    index = BinaryIndex(512)
    index.add(np.random.default_rng(0).integers(0, 256, (1_000_000, 64), dtype=np.uint8))
    index.save(tmp_path / "index")
    command = [sys.executable, "-c", MAPPED, str(tmp_path / "index")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# ---- damage ----


def loads_or_refuses(index: Any, path: Path, **how: Any) -> Any:
    """The index, or None where it was refused in the one way there is."""
    try:
        return load(index, path, **how)
    except IndexFileError:
        return None


def test_every_truncation_is_refused(saved: tuple[Any, Path]) -> None:
    index, path = saved
    data = path.read_bytes()
    lengths = {*range(0, 700), *range(700, len(data), 97), *range(4096 - 2, len(data), 4096), len(data) - 1}
    for length in sorted(lengths):
        path.write_bytes(data[:length])
        for how in ({}, {"mmap": True}, {"mmap": True, "verify": True}):
            assert loads_or_refuses(index, path, **how) is None
    path.write_bytes(data + b"\0")
    assert loads_or_refuses(index, path) is None


def test_every_flipped_byte_is_found(saved: tuple[Any, Path]) -> None:
    """All of header and table, the rest sampled; a map that is not verified finds what is not payload."""
    index, path = saved
    original = path.read_bytes()
    _, _, count, *_ = struct.unpack_from("<8sIIQII", original)
    sizes = [struct.unpack_from("<16s8sQQQQII", original, 32 + 64 * entry) for entry in range(count)]
    structural = {*range(4096), *range(sizes[0][4], sizes[0][4] + 4096)}
    places = {*range(32 + 64 * count + 8), *range(4096, 4300), *RNG.integers(0, len(original), 500).tolist()}
    with open(path, "r+b") as file:
        for place in sorted(places):
            for flip in (0x01, 0x80, 0xFF):
                os.pwrite(file.fileno(), bytes([original[place] ^ flip]), place)
                assert loads_or_refuses(index, path) is None, place
                assert loads_or_refuses(index, path, mmap=True, verify=True) is None, place
                if place in structural:
                    assert loads_or_refuses(index, path, mmap=True) is None, place
            os.pwrite(file.fileno(), original[place : place + 1], place)
    assert_same_results(load(index, path), index)


def forged(path: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], None]) -> None:
    """The file with other contents and right checksums."""
    settings, arrays = _file.read_index_file(path, mapped=False, verified=True)
    change(settings, arrays)
    _file.write_index_file(path, settings, arrays)


FORGERIES: list[tuple[str, Callable[[dict[str, Any], dict[str, np.ndarray]], Any]]] = [
    ("has None", lambda settings, arrays: settings.update(kind=None)),
    ("dim must be", lambda settings, arrays: settings.update(dim=0)),
    ("codes is uint8", lambda settings, arrays: settings.update(dim=10**9)),
    ("dim must be an integer", lambda settings, arrays: settings.update(dim="44")),
    ("bits must be", lambda settings, arrays: settings.update(bits=77)),
    ("metric must be", lambda settings, arrays: settings.update(metric="l2")),
    ("rescore must be", lambda settings, arrays: settings.update(rescore="int3")),
    ("unexpected keyword", lambda settings, arrays: settings.update(more=1)),
    ("next_id must be", lambda settings, arrays: settings.update(next_id=-1)),
    ("next_id must be an integer", lambda settings, arrays: settings.pop("next_id")),
    ("ids are not ascending", lambda settings, arrays: settings.update(next_id=3)),
    ("ids are not ascending", lambda settings, arrays: arrays.update(ids=arrays["ids"][::-1])),
    ("ids are not ascending", lambda settings, arrays: arrays.update(ids=arrays["ids"] - 5)),
    ("ids is", lambda settings, arrays: arrays.update(ids=arrays["ids"].astype(np.float32))),
    ("arrays", lambda settings, arrays: arrays.pop("ids")),
    ("arrays", lambda settings, arrays: settings.update(first_id=0)),
    ("first_id must be", lambda settings, arrays: (arrays.pop("ids"), settings.update(first_id=1000))),
    ("first_id must be", lambda settings, arrays: (arrays.pop("ids"), settings.update(first_id=-1))),
    ("first_id must be an integer", lambda settings, arrays: (arrays.pop("ids"), settings.update(first_id=0.0))),
    ("'codes'", lambda settings, arrays: arrays.pop("codes")),
    ("arrays", lambda settings, arrays: arrays.update(more=arrays["ids"])),
    ("ids is int64|inverse_norms is", lambda settings, arrays: arrays.update(codes=arrays["codes"][1:])),
    ("codes is uint8", lambda settings, arrays: arrays.update(codes=arrays["codes"][:, 1:])),
    ("bits beyond dim 44", lambda settings, arrays: arrays.update(codes=arrays["codes"] | np.uint8(1))),
    ("inverse_norms must be", lambda settings, arrays: arrays.update(inverse_norms=0 * arrays["inverse_norms"])),
    ("vector_scales must be", lambda settings, arrays: arrays.update(vector_scales=np.nan * arrays["vector_scales"])),
]


@pytest.mark.parametrize("case", range(len(FORGERIES)))
def test_contents_that_no_index_has_are_refused(tmp_path: Path, case: int) -> None:
    message, change = FORGERIES[case]
    path = tmp_path / "index"
    filled("sdc int8").save(path)
    forged(path, change)
    with pytest.raises(IndexFileError, match=message):
        BinaryIndex.load(path)
    with pytest.raises(IndexFileError, match=message):
        BinaryIndex.load(path, mmap=True, verify=True)


def resealed(data: bytes, place: int, raw: bytes) -> bytes:
    """The file with other bytes in header or table and right checksums of both."""
    data = data[:place] + raw + data[place + len(raw) :]
    data = data[:24] + struct.pack("<I", zlib.crc32(data[32:4096])) + data[28:]
    return data[:28] + struct.pack("<I", zlib.crc32(data[:28])) + data[32:]


def test_every_field_of_header_and_table_may_hold_anything(tmp_path: Path) -> None:
    """Right checksums around wrong fields: refused, or (a checksum of payload, unread by a map) without effect."""
    path = tmp_path / "index"
    index = filled("sdc int8")
    index.save(path)
    original = path.read_bytes()
    count = struct.unpack_from("<I", original, 12)[0]
    fields = [(8, 4), (12, 4), (16, 8)]
    widths = (16, 8, 8, 8, 8, 8, 4, 4)
    for entry in range(count):
        start = 32 + 64 * entry
        fields += [(start + sum(widths[:i]), width) for i, width in enumerate(widths)]
    values = [0, 1, 7, 4095, 4096, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]
    for start, width in fields:
        for value in values:
            raw = (value % 256**width).to_bytes(width, "little")
            if raw == original[start : start + width]:
                continue
            path.write_bytes(resealed(original, start, raw))
            assert loads_or_refuses(index, path) is None, (start, value)
            if (mapped := loads_or_refuses(index, path, mmap=True)) is not None:
                assert_same_results(mapped, index)


def test_other_files_are_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "index"
    with pytest.raises(FileNotFoundError):
        BinaryIndex.load(path)
    for data in (b"", b"\x93NUMPY", os.urandom(10_000), bytes(5000)):
        path.write_bytes(data)
        for mmap in (False, True):
            with pytest.raises(IndexFileError, match=r"must be an index file, but .* does not begin like one"):
                BinaryIndex.load(path, mmap=mmap)
    filled("hamming").save(path)
    path.write_bytes(path.read_bytes()[:8] + struct.pack("<I", 2) + path.read_bytes()[12:])
    with pytest.raises(IndexFileError, match=r"of version 1, but .* is of version 2"):
        BinaryIndex.load(path)
    with pytest.raises(ValueError, match="verify must be True unless mmap is True"):
        BinaryIndex.load(path, verify=False)


# ---- faults while saving ----

SAVER = """
import sys
sys.modules["torch"] = None  # starts sooner
import numpy as np
from fastembed import BinaryIndex
path = sys.argv[1]
rng = np.random.default_rng(1)
index = BinaryIndex(256)
index.add(rng.integers(0, 256, (60_000, 32), dtype=np.uint8))
print("ready", flush=True)
while True:
    index.update([0], np.packbits(np.arange(256) < len(index) % 256)[None])
    index.add(rng.integers(0, 256, (1, 32), dtype=np.uint8))
    index.save(path)
    print("saved", flush=True)
"""


def test_a_killed_save_leaves_the_old_index_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "index"
    chooser = np.random.default_rng(3)
    rows = 0
    for attempt in range(12):
        saver = subprocess.Popen([sys.executable, "-c", SAVER, str(path)], stdout=subprocess.PIPE)
        try:
            assert saver.stdout is not None
            for _ in range(1 + attempt % 3):  # killed before, during or after its first save, or one of the next
                saver.stdout.readline()
            time.sleep(chooser.uniform(0.001, 0.06))
        finally:
            saver.send_signal(signal.SIGKILL)
            saver.wait()
            saver.communicate()
        if path.exists():
            index = BinaryIndex.load(path)
            # Of one moment: the first row says how many there were.
            assert np.unpackbits(index.codes([0])).sum() == (len(index) - 1) % 256
            rows = max(rows, len(index))
    assert rows > 60_000, "some save was finished"
    BinaryIndex.load(path).save(path)
    assert os.listdir(tmp_path) == ["index"], "what the killed left is deleted"


def test_a_full_disk_leaves_the_old_index(tmp_path: Path) -> None:
    path = tmp_path / "index"
    filled("hamming").save(path)
    before = path.read_bytes()
    larger = BinaryIndex(DIM, rescore="float32")
    larger.add(RNG.standard_normal((20_000, DIM)).astype(np.float32))
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (0, 100, 4096, 100_000, 2_000_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises(OSError, match="File too large"):
                larger.save(path)
            assert path.read_bytes() == before
            assert os.listdir(tmp_path) == ["index"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    larger.save(path)
    assert len(BinaryIndex.load(path)) == 20_000


def test_another_savers_temporary_file_is_left_alone(tmp_path: Path) -> None:
    from fastembed._atomic import replacing

    path = tmp_path / "index"
    with replacing(path) as slow:
        slow.write(b"late")
        filled("hamming").save(path)
        assert len(os.listdir(tmp_path)) == 2
    assert path.read_bytes() == b"late"
    with pytest.raises(FileNotFoundError):
        filled("hamming").save(tmp_path / "no folder" / "index")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        filled("hamming").save(tmp_path)
