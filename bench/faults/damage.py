"""Damages files at random: their bytes, or the arrays of an .npz file under correct checksums."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Generator = np.random.Generator


def damaged_bytes(data: bytes, rng: Generator) -> tuple[bytes, str]:
    """The bytes with some damage, and what it is."""
    kinds: list[Callable[[bytearray, Generator], str]] = [
        _flip, _flip, _overwrite, _truncate, _cut, _insert, _zero, _repeat, _swap, _number, _garbage,
    ]  # fmt: skip
    out = bytearray(data)
    what = kinds[int(rng.integers(len(kinds)))](out, rng)
    return bytes(out), what


def _at(data: bytearray, rng: Generator) -> int:
    """A position; headers and ends, where the structure is, more often than their share."""
    size = len(data)
    if size == 0:
        return 0
    kind = rng.random()
    if kind < 0.25:
        return int(rng.integers(min(size, 400)))
    if kind < 0.5:
        return size - 1 - int(rng.integers(min(size, 1500)))
    return int(rng.integers(size))


def _flip(data: bytearray, rng: Generator) -> str:
    places = [_at(data, rng) for _ in range(int(rng.integers(1, 9)))]
    for at in places:
        data[at] ^= 1 << int(rng.integers(8))
    return f"bits flipped in bytes {places}"


def _overwrite(data: bytearray, rng: Generator) -> str:
    at, length = _at(data, rng), int(rng.integers(1, 64))
    data[at : at + length] = rng.bytes(length)
    return f"{length} random bytes at {at}"


def _truncate(data: bytearray, rng: Generator) -> str:
    at = _at(data, rng)
    del data[at:]
    return f"cut off at {at}"


def _cut(data: bytearray, rng: Generator) -> str:
    at, length = _at(data, rng), int(rng.integers(1, 4000))
    del data[at : at + length]
    return f"{length} bytes cut out at {at}"


def _insert(data: bytearray, rng: Generator) -> str:
    at, length = _at(data, rng), int(rng.integers(1, 200))
    data[at:at] = rng.bytes(length)
    return f"{length} bytes inserted at {at}"


def _zero(data: bytearray, rng: Generator) -> str:
    at, length = _at(data, rng), int(rng.integers(1, 5000))
    data[at : at + length] = bytes(len(data[at : at + length]))
    return f"{length} zeros at {at}"


def _repeat(data: bytearray, rng: Generator) -> str:
    at, length = _at(data, rng), int(rng.integers(1, 3000))
    data[at:at] = data[at : at + length]
    return f"{length} bytes at {at} twice"


def _swap(data: bytearray, rng: Generator) -> str:
    length = int(rng.integers(1, 300))
    a, b = sorted((_at(data, rng), _at(data, rng)))
    if b - a < length or b + length > len(data):
        return _flip(data, rng)
    data[a : a + length], data[b : b + length] = data[b : b + length], data[a : a + length]
    return f"{length} bytes at {a} and {b} exchanged"


def _number(data: bytearray, rng: Generator) -> str:
    """A length or an offset of a header becomes very large, negative or zero."""
    at, width = _at(data, rng), int(rng.choice([2, 4, 8]))
    top = 1 << 8 * width
    values = [0, 1, top - 1, top // 2, top // 2 - 1]
    value = values[int(rng.integers(len(values)))]
    data[at : at + width] = value.to_bytes(width, "little")[: len(data[at : at + width])]
    return f"the number {value} of {width} bytes at {at}"


def _garbage(data: bytearray, rng: Generator) -> str:
    kind = int(rng.integers(4))
    data[:] = (b"", rng.bytes(int(rng.integers(1, 3000))), b"PK\x03\x04" + rng.bytes(200), b"hello\n" * 50)[kind]
    return ("empty", "random bytes", "random bytes that start as a zip file", "text")[kind]


# Arrays ------------------------------------------------------------------------------------------------------


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file that is valid."""
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


def write_arrays(path: Path, arrays: dict[str, NDArray[Any]], rng: Generator) -> None:
    """Write arrays with correct checksums, compressed or not, in any order."""
    order = [str(key) for key in rng.permutation([*arrays])]
    packed = zipfile.ZIP_DEFLATED if rng.random() < 0.3 else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", packed) as archive:
        for key in order:
            member = io.BytesIO()
            np.lib.format.write_array(member, arrays[key], allow_pickle=True)
            archive.writestr(f"{key}.npy", member.getvalue())


def damaged_arrays(arrays: dict[str, NDArray[Any]], rng: Generator) -> tuple[dict[str, NDArray[Any]], str]:
    """The arrays with one of them changed, and what was changed."""
    out = dict(arrays)
    key = str(rng.choice([*arrays]))
    array = arrays[key]
    if array.dtype.kind == "U":
        out[key], what = _damaged_text(array, rng)
        return out, f"`{key}`: {what}"
    kinds: list[tuple[str, Callable[[], Any]]] = [
        ("missing", lambda: None),
        ("another type", lambda: array.astype(rng.choice(["f2", "f4", "f8", "i1", "i2", "u8", "c16", "?", "S3"]))),
        ("another byte order", lambda: array.astype(array.dtype.newbyteorder(">"))),
        ("one entry less", lambda: array[:-1] if array.ndim else np.zeros(0)),
        ("one entry more", lambda: np.append(array, array.ravel()[:1]) if array.size else np.zeros(3)),
        ("one axis more", lambda: array[None]),
        ("columns first", lambda: np.asfortranarray(array)),
        ("Python objects", lambda: np.array([None, {}], dtype=object)),
        ("empty", lambda: array[:0] if array.ndim else np.zeros((0, 0))),
        ("an extreme entry", lambda: _with_extreme(array, rng)),
        ("an extreme entry", lambda: _with_extreme(array, rng)),
        ("entries in another order", lambda: rng.permutation(array) if array.ndim else array + 1),
        ("the opposite", lambda: -array if array.dtype.kind in "if" else ~array),
        ("another scale", lambda: (array * 10.0 ** rng.integers(-300, 300)).astype(array.dtype)),
    ]  # fmt: skip
    what, make = kinds[int(rng.integers(len(kinds)))]
    with np.errstate(all="ignore"):
        made = make()
    if made is None:
        del out[key]
    else:
        out[key] = made
    if rng.random() < 0.03:
        out["x" * int(rng.integers(1, 300))] = np.zeros(3)
        what += ", and another member"
    return out, f"`{key}`: {what}"


def _with_extreme(array: NDArray[Any], rng: Generator) -> NDArray[Any]:
    out = np.array(array)
    if out.size == 0:
        return out
    values: list[Any] = [0, 1, -1, 2]
    if out.dtype.kind == "f":
        values += [np.nan, np.inf, -np.inf, 1e308, -1e308, 5e-324, 1e-310, 1e154, -1e154]
    elif out.dtype.kind in "iu":
        limits = np.iinfo(out.dtype)
        values += [limits.max, limits.min, limits.max // 2]
    flat = out.reshape(-1)
    for _ in range(int(rng.integers(1, 4))):
        value = values[int(rng.integers(len(values)))]
        if out.dtype.kind != "u" or value >= 0:
            flat[int(rng.integers(flat.size))] = value
    return out


def _damaged_text(array: NDArray[Any], rng: Generator) -> tuple[NDArray[Any], str]:
    text = str(array)
    kinds: list[tuple[str, Callable[[], str]]] = [
        ("empty", lambda: ""),
        ("garbage", lambda: "".join(chr(int(c)) for c in rng.integers(32, 1000, 50))),
        ("cut off", lambda: text[: int(rng.integers(len(text) + 1))]),
        ("deep", lambda: "[" * 100_000),
        ("deep objects", lambda: '{"a":' * 20_000 + "1" + "}" * 20_000),
        ("NaN", lambda: text.replace("0", "NaN", 1)),
        ("a huge number", lambda: '{"x": 1' + "0" * 5000 + "}"),
        ("control characters", lambda: json.dumps({"network": "\x1b[31m\x07\x00", "tensors": []})),
        ("another value", lambda: _damaged_json(text, rng)),
        ("another value", lambda: _damaged_json(text, rng)),
        ("another value", lambda: _damaged_json(text, rng)),
    ]
    what, make = kinds[int(rng.integers(len(kinds)))]
    return np.array(make()), what


def _damaged_json(text: str, rng: Generator) -> str:
    """JSON with the value of one key replaced by one of another type or size."""
    try:
        content = json.loads(text)
    except ValueError:
        return text[::-1]
    values: list[Any] = [
        None, True, -1, 0, 1e300, 10**30, "x" * 1000, [], {}, [[[]]], [1, "a"], {"a": {"b": []}}, "\x1b[2J",
    ]  # fmt: skip
    place = content
    while isinstance(place, dict | list) and place:
        key: Any = str(rng.choice([*place])) if isinstance(place, dict) else int(rng.integers(len(place)))
        if not isinstance(place[key], dict | list) or rng.random() < 0.4:
            place[key] = values[int(rng.integers(len(values)))]
            break
        place = place[key]
    return json.dumps(content)
