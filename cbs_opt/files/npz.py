"""A strict reader and writer of `.npz` archives.

The reader checks every header before it reads data, loads no pickled objects, verifies the checksum of each
member, and memory-maps large uncompressed members. The writer aligns members, so that a mapped array is an
aligned array, and writes the same bytes for the same arrays.
"""

from __future__ import annotations

import errno
import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from cbs_opt.errors import CbsError
from cbs_opt.files.atomic import atomic_write
from cbs_opt.files.zip_limits import check_archive
from cbs_opt.temporary import temporary_array

MAP_BYTES = 1 << 26
"""Uncompressed members of at least this size are memory-mapped."""

SPILL_BYTES = 1 << 29
"""Compressed members of at least this size are expanded into a temporary file, and that is mapped."""

_ALIGNMENT = 64
_CHUNK = 1 << 22
_LONGEST_HEADER = 10_000  # bytes; those of numpy have about 100
_LONGEST_TEXT = 1 << 27  # bytes, four a character
_PADDING_ID = 0xD935  # the extra field that zipalign pads with


@dataclass(frozen=True)
class Header:
    """Type, shape and position of an array, before it is read."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran_order: bool
    data_offset: int  # within the member

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


class NpzReader:
    """The arrays of an `.npz` file, read one by one.

    Parameters
    ----------
    path : Path
    error : type
        The error class to raise, with a message that names the file.
    most_members : int
        A file with more is refused before anything of it is read.

    Attributes
    ----------
    headers : dict of str to Header
        All members, by key.
    """

    def __init__(self, path: Path, error: type[CbsError], most_members: int = 200) -> None:
        self.path = path
        self._error = error
        try:
            missing = None if path.is_file() else "is not a file" if path.exists() else "no such file"
            if missing is None:
                self._archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile:
            raise error(f"{path}: is not an .npz archive, or it is truncated") from None
        except Exception as broken:
            raise error(f"{path}: cannot be read: {_reason(broken)}") from None
        if missing is not None:
            raise error(f"{path}: {missing}")
        self.headers: dict[str, Header] = {}
        check_archive(self._archive, path, error, most_members)
        for info in self._archive.infolist():
            if not info.filename.isprintable():
                raise error(f"{path}: is damaged: it holds a member with the name {info.filename[:60]!r}")
            if not info.filename.endswith(".npy"):
                raise error(f"{path}: holds '{info.filename[:60]}', which is no array")
            key = info.filename.removesuffix(".npy")
            if key in self.headers:
                raise error(f"{path}: holds `{key[:60]}` twice")
            self.headers[key] = self._read_header(info, key)

    def __enter__(self) -> NpzReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def _read_header(self, info: zipfile.ZipInfo, key: str) -> Header:
        try:
            with self._archive.open(info) as member:
                start = member.read(12)  # magic string, version, and the length of the header
                if len(start) == 12 and start[6] > 1 and int.from_bytes(start[8:12], "little") > _LONGEST_HEADER:
                    raise ValueError(f"its header is longer than {_LONGEST_HEADER} bytes")
            with self._archive.open(info) as member:
                version = npy_format.read_magic(member)
                read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
                shape, fortran_order, dtype = read(member)
                header = Header(np.dtype(dtype), shape, fortran_order, member.tell())
        except Exception as broken:  # zipfile, its decompressors and numpy raise a dozen kinds
            raise self._error(f"{self.path}: `{key}` is damaged: {_reason(broken)}") from None
        if header.dtype.hasobject:
            raise self._error(f"{self.path}: `{key}` holds pickled Python objects, which are never loaded")
        if any(length < 0 for length in shape) or header.data_offset + header.nbytes != info.file_size:
            raise self._error(
                f"{self.path}: `{key}` is damaged: its header announces {header.nbytes} bytes of data, "
                f"the member has {info.file_size - header.data_offset}"
            )
        return header

    def read(self, key: str) -> NDArray[Any]:
        """One array; memory-mapped, read-only, where it is large, aligned and uncompressed."""
        header, info = self.headers[key], self._archive.getinfo(key + ".npy")
        try:
            if info.compress_type != zipfile.ZIP_STORED and header.nbytes >= SPILL_BYTES:
                return self._expanded(info, header)
            if info.compress_type == zipfile.ZIP_STORED and header.nbytes >= MAP_BYTES:
                self._check_sum(info)
                offset = self._data_start(info) + header.data_offset
                if offset % max(header.dtype.alignment, 1) == 0:
                    mapped: NDArray[Any] = np.memmap(
                        self.path,
                        header.dtype,
                        "r",
                        offset=offset,
                        shape=header.shape,
                        order="F" if header.fortran_order else "C",
                    )
                    return mapped
            with self._archive.open(info) as member:
                return np.asarray(npy_format.read_array(member, allow_pickle=False))
        except (MemoryError, CbsError):
            raise
        except OSError as error:
            if error.errno == errno.ENOMEM:  # the address space is limited
                raise MemoryError from None
            raise self._error(f"{self.path}: `{key}` is damaged: {_reason(error)}") from None
        except Exception as broken:  # zipfile, its decompressors and numpy raise a dozen kinds
            raise self._error(f"{self.path}: `{key}` is damaged: {_reason(broken)}") from None

    def _expanded(self, info: zipfile.ZipInfo, header: Header) -> NDArray[Any]:
        """A compressed array, mapped from a temporary file that ends with it."""
        flat = temporary_array((header.nbytes,), np.uint8, "it is compressed, and its")
        with self._archive.open(info) as member:
            member.read(header.data_offset)
            at = 0
            while chunk := member.read(_CHUNK):  # the checksum is compared at the end
                flat[at : at + len(chunk)] = np.frombuffer(chunk, np.uint8)
                at += len(chunk)
        flat.flags.writeable = False
        array: NDArray[Any] = flat.view(header.dtype)
        return array.reshape(header.shape[::-1]).T if header.fortran_order else array.reshape(header.shape)

    def _check_sum(self, info: zipfile.ZipInfo) -> None:
        with self._archive.open(info) as member:  # zipfile compares the checksum at the end of the data
            while member.read(_CHUNK):
                pass

    def _data_start(self, info: zipfile.ZipInfo) -> int:
        with self.path.open("rb") as file:
            file.seek(info.header_offset)
            fixed = file.read(30)
        name_length, extra_length = struct.unpack("<HH", fixed[26:30])
        return info.header_offset + 30 + int(name_length) + int(extra_length)

    def text(self, key: str) -> str:
        """A member that holds one text."""
        header = self.headers[key]
        if header.dtype.kind != "U" or header.shape != ():
            raise self._error(f"{self.path}: `{key}` must be one text, got {header.dtype} {header.shape}")
        if header.nbytes > _LONGEST_TEXT:
            raise self._error(
                f"{self.path}: `{key}` must be a text of at most {_LONGEST_TEXT // 4} characters, got "
                f"{header.nbytes // 4}"
            )
        try:
            text = str(self.read(key)[()])
            text.encode()
        except (UnicodeError, ValueError):
            raise self._error(f"{self.path}: `{key}` is damaged: it is no valid text") from None
        return text

    def json_object(self, key: str) -> dict[str, Any]:
        """A member that holds one JSON object, without the NaN and Infinity that Python accepts."""
        try:
            content = json.loads(self.text(key), parse_constant=_refuse, parse_float=_finite)
        except (ValueError, RecursionError):
            raise self._error(f"{self.path}: `{key}` must be JSON text") from None
        if not isinstance(content, dict):
            raise self._error(f"{self.path}: `{key}` must be a JSON object, got {type(content).__name__}")
        return content

    def check_format(self, name: str, newest: int) -> None:
        """Check the members `format` and `version`."""
        for key in ("format", "version"):
            if key not in self.headers:
                raise self._error(f"{self.path}: `{key}` is missing: this is not a {name} file")
        found = self.text("format")
        if found != name:
            raise self._error(f"{self.path}: `format` must be '{name}', got {found[:40]!r}")
        version = self.integer("version")
        if version > newest:
            raise self._error(
                f"{self.path}: `version` is {version}; this release reads {name} files up to version {newest}: "
                "update cbs-opt"
            )
        if version < 1:
            raise self._error(f"{self.path}: `version` must be at least 1, got {version}")

    def check_keys(self, required: set[str], optional: set[str]) -> None:
        """Check that all `required` members are present, and no others except the `optional` ones."""
        missing = sorted(required - self.headers.keys())
        if missing:
            raise self._error(f"{self.path}: `{missing[0]}` is missing")
        extra = sorted(self.headers.keys() - required - optional)
        if extra:
            known = ", ".join(sorted(required | optional))
            raise self._error(f"{self.path}: `{extra[0][:60]}` is not a known key; known: {known}")

    def expect(self, key: str, kind: str, shape: tuple[int | None, ...]) -> Header:
        """Check type and shape of a member before it is read.

        `kind` is "float", "integer", "bool" or "int8"; None in `shape` denotes any length.
        """
        header = self.headers[key]
        allowed = {
            "float": header.dtype.newbyteorder("=") in (np.dtype("f4"), np.dtype("f8")),
            "integer": header.dtype.kind in "iu",
            "int8": header.dtype == np.int8,
            "bool": header.dtype == np.bool_,
        }[kind]
        wanted = {"float": "float32 or float64"}.get(kind, kind)
        if not allowed:
            raise self._error(f"{self.path}: `{key}` must be {wanted}, got {header.dtype}")
        fits = len(shape) == len(header.shape) and all(
            want is None or want == have for want, have in zip(shape, header.shape, strict=True)
        )
        if not fits:
            lengths = ", ".join("any" if want is None else str(want) for want in shape)
            tail = "," if len(shape) == 1 else ""
            raise self._error(f"{self.path}: `{key}` must have shape ({lengths}{tail}), got {header.shape}")
        return header

    def integer(self, key: str) -> int:
        """A member that holds one whole number."""
        self.expect(key, "integer", ())
        return int(self.read(key)[()])


@dataclass(frozen=True)
class Stream:
    """An array that is written as it is computed: `chunks` yields its entries in C order."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    chunks: Iterable[NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return Header(self.dtype, self.shape, False, 0).nbytes


Content: TypeAlias = NDArray[Any] | Stream | Callable[[], NDArray[Any]]
"""A member for `write_npz`; a function is called when the members before it have been written."""


def write_npz(path: Path | str, arrays: Mapping[str, Content]) -> None:
    """Write arrays uncompressed and aligned to 64 bytes, to a temporary name first.

    Raises
    ------
    OutputError
        When the file cannot be written.
    """
    with (
        atomic_write(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        for key, content in arrays.items():
            array = (
                content if isinstance(content, Stream) else np.asarray(content() if callable(content) else content)
            )
            info = zipfile.ZipInfo(key + ".npy")  # the epoch of zip files as date: same arrays, same bytes
            # Local header, name, the 20 bytes of the zip64 field that force_zip64 adds, this field's own 4.
            start = file.tell() + 30 + len(info.filename) + 20 + 4
            padding = -start % _ALIGNMENT
            info.extra = struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
            with archive.open(info, "w", force_zip64=True) as member:
                header = io.BytesIO()
                if isinstance(array, Stream):
                    descr = npy_format.dtype_to_descr(array.dtype)
                    fields = {"descr": descr, "fortran_order": False, "shape": array.shape}
                    npy_format.write_array_header_1_0(header, fields)
                    member.write(header.getvalue())
                    _write_stream(member, array)
                    continue
                npy_format.write_array_header_1_0(header, npy_format.header_data_from_array_1_0(array))
                member.write(header.getvalue())
                by_columns = array.flags.f_contiguous and not array.flags.c_contiguous
                data = array.ravel("F" if by_columns else "C")
                step = max(1, _CHUNK // max(1, array.itemsize))
                for first in range(0, data.size, step):
                    member.write(data[first : first + step].tobytes())


def _write_stream(member: IO[bytes], stream: Stream) -> None:
    written = 0
    for chunk in stream.chunks:
        data = memoryview(np.ascontiguousarray(chunk, stream.dtype)).cast("B")
        written += data.nbytes
        member.write(data)
    if written != stream.nbytes:
        raise ValueError(f"an array of shape {stream.shape} has {stream.nbytes} bytes, the stream gave {written}")


def json_text(content: Mapping[str, Any]) -> NDArray[Any]:
    """A JSON object as an array of one text; raises `ValueError` for NaN and infinity."""
    return np.array(json.dumps(dict(content), sort_keys=True, allow_nan=False))


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    if np.isinf(value := float(text)):
        raise ValueError(f"{text} is out of range")
    return value


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
