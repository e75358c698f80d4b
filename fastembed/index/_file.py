"""The index file: named arrays and settings in one file, every byte under a checksum. docs/index.md describes it byte
by byte; nothing here knows what the arrays mean."""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from .._atomic import replacing

MAGIC = b"\x93FEINDEX"
VERSION = 1
ALIGNMENT = 4096
SETTINGS = "settings"

# magic, version, sections, file bytes, CRC-32 of the table, CRC-32 of the 28 bytes before it
_HEADER = struct.Struct("<8sIIQII")
# name, dtype, rows, columns (0: one axis only), offset, bytes, CRC-32 of the section, zero
_ENTRY = struct.Struct("<16s8sQQQQII")
_DTYPES = {"|u1", "|i1", "<f2", "<f4", "<i8"}
_MAX_SECTIONS = 64
_CHUNK = 1 << 24


class IndexFileError(ValueError):
    """A file is no index file, is of a newer version, or is damaged; the message says which and where."""


@dataclass(frozen=True)
class _Section:
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    crc: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize

    @property
    def end(self) -> int:
        return _aligned(self.offset + self.nbytes)


def write_index_file(
    path: str | os.PathLike[str], settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Write settings (what JSON can hold) and arrays of one or two axes to `path`, replaced whole or not at all."""
    text = json.dumps(dict(settings), sort_keys=True).encode()
    contents = {SETTINGS: np.frombuffer(text, np.uint8)}
    contents.update((name, _little_endian(array)) for name, array in arrays.items())
    offset = _aligned(_HEADER.size + _ENTRY.size * len(contents))
    sections = []
    with replacing(path) as file:
        file.seek(offset)
        for name, array in contents.items():
            section = _Section(name, array.dtype, array.shape, file.tell(), _write_section(file, array))
            sections.append(section)
        size = file.tell()
        table = b"".join(_entry(section) for section in sections)
        table += bytes(offset - _HEADER.size - len(table))
        head = _HEADER.pack(MAGIC, VERSION, len(sections), size, zlib.crc32(table), 0)[:-4]
        file.seek(0)
        file.write(head + struct.pack("<I", zlib.crc32(head)) + table)


def read_index_file(
    path: str | os.PathLike[str], *, mapped: bool, verified: bool, always_verified: frozenset[str] = frozenset()
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The settings and arrays of an index file.

    Args:
        path: the file.
        mapped: map the arrays, read-only, instead of reading them.
        verified: check the checksum of every section, not only of the header, the table and the settings.
        always_verified: sections whose checksums are checked in any case.

    Raises:
        IndexFileError: the file is not what `write_index_file` wrote.
        OSError: it cannot be read at all.
    """
    with open(path, "rb") as file:
        sections = _read_table(file, os.fspath(path))
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if mapped else None
        arrays = {}
        for section in sections:
            check = verified or section.name == SETTINGS or section.name in always_verified
            arrays[section.name] = _read_section(file, section, view, check, os.fspath(path))
    try:
        settings = json.loads(arrays.pop(SETTINGS).tobytes())
    except ValueError as error:
        raise damaged(path, "its settings are no JSON") from error
    if not isinstance(settings, dict):
        raise damaged(path, "its settings are no JSON object")
    return settings, arrays


def damaged(path: str | os.PathLike[str], what: str) -> IndexFileError:
    return IndexFileError(f"path must be an undamaged index file, but {os.fspath(path)} is not: {what}")


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _little_endian(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<"))


def _entry(section: _Section) -> bytes:
    rows, columns = (*section.shape, 0)[:2]
    return _ENTRY.pack(
        *(section.name.encode(), section.dtype.str.encode(), rows, columns),
        *(section.offset, section.nbytes, section.crc, 0),
    )


def _write_section(file: BinaryIO, array: np.ndarray) -> int:
    """Write the array and zeros up to the next multiple of ALIGNMENT; the CRC-32 of both."""
    crc = 0
    padding = memoryview(bytes(_aligned(array.nbytes) - array.nbytes))
    for chunk in (*_chunks(array.reshape(-1).view(np.uint8).data), padding):
        file.write(chunk)
        crc = zlib.crc32(chunk, crc)
    return crc


def _chunks(view: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(view), _CHUNK):
        yield view[start : start + _CHUNK]


def _read_table(file: BinaryIO, path: str) -> list[_Section]:
    """The table of sections; header, table and sizes are those that `write_index_file` would have written."""
    size = os.fstat(file.fileno()).st_size
    header = file.read(_HEADER.size)
    if header[: len(MAGIC)] != MAGIC:
        raise IndexFileError(f"path must be an index file, but {path} does not begin like one")
    if len(header) < _HEADER.size:
        raise damaged(path, f"it ends after {size} bytes, within the header")
    _, version, count, stated_size, table_crc, crc = _HEADER.unpack(header)
    # The version first: another version may have another header.
    if version != VERSION:
        raise IndexFileError(f"path must be an index file of version {VERSION}, but {path} is of version {version}")
    if zlib.crc32(header[:-4]) != crc:
        raise damaged(path, "the checksum of the header does not match")
    if stated_size != size:
        raise damaged(path, f"it should be {stated_size} bytes long but is {size}")
    if not 1 <= count <= _MAX_SECTIONS:
        raise damaged(path, f"it states {count} sections")
    first = _aligned(_HEADER.size + _ENTRY.size * count)
    table = file.read(first - _HEADER.size)
    if len(table) < first - _HEADER.size or zlib.crc32(table) != table_crc:
        raise damaged(path, "the checksum of the table does not match")
    sections = [_parse_entry(table[i * _ENTRY.size :][: _ENTRY.size], path) for i in range(count)]
    end = first
    for section in sections:
        if section.offset != end:
            raise damaged(path, f"section {section.name} does not follow the one before it")
        end = section.end
    if end != size:
        raise damaged(path, f"its sections end at byte {end} of {size}")
    names = [section.name for section in sections]
    if names[0] != SETTINGS or len(set(names)) != count:
        raise damaged(path, f"its sections are {', '.join(names)}")
    if (sections[0].dtype, len(sections[0].shape)) != (np.uint8, 1):
        raise damaged(path, "its settings are no bytes")
    return sections


def _parse_entry(entry: bytes, path: str) -> _Section:
    raw_name, raw_dtype, rows, columns, offset, nbytes, crc, zero = _ENTRY.unpack(entry)
    try:
        name, dtype = (raw.rstrip(b"\0").decode("ascii") for raw in (raw_name, raw_dtype))
    except UnicodeDecodeError as error:
        raise damaged(path, "the table holds a name that is not ASCII") from error
    if dtype not in _DTYPES:
        raise damaged(path, f"section {name} has dtype {dtype!r}")
    section = _Section(name, np.dtype(dtype), (rows, columns) if columns else (rows,), offset, crc)
    if section.nbytes != nbytes or zero != 0:
        raise damaged(path, f"the sizes of section {name} do not agree")
    return section


def _read_section(file: BinaryIO, section: _Section, view: mmap.mmap | None, check: bool, path: str) -> np.ndarray:
    length = section.end - section.offset
    if view is not None:
        data = memoryview(view)[section.offset : section.end]
    else:
        data = np.empty(length, np.uint8).data
        file.seek(section.offset)
        done = 0
        while done < length:
            # Unbuffered reads of a file that another process truncates end early.
            count = file.readinto(data[done:])  # type: ignore[attr-defined]
            if not count:
                raise damaged(path, f"it ends within section {section.name}")
            done += count
    if check:
        crc = 0
        for chunk in _chunks(data):
            crc = zlib.crc32(chunk, crc)
        if crc != section.crc:
            raise damaged(path, f"the checksum of section {section.name} does not match")
    return np.frombuffer(data, section.dtype, section.nbytes // section.dtype.itemsize).reshape(section.shape)
