"""Files of `torch.save`: read without executing anything, rewritten with new values in the same places.

A file of `torch.save` is a pickle together with raw storages. The pickle is read by an unpickler that knows only
the few names by which torch describes tensors. Every other class or function becomes an inert placeholder:
nothing is imported or called. Checkpoints can therefore be read whatever else they contain: optimizers,
configurations, whole models, TorchScript. When a file is written, the bytes of the changed storages are replaced;
all others are copied.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from cbs_opt.errors import InstanceError
from cbs_opt.files.zip_limits import check_archive

_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128, "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}  # fmt: skip


def _bytearray(content: Any = b"", *encoding: str) -> bytearray:
    """As pickles call it; not of a number, for which it would make as many zeros."""
    return bytearray(content.encode(*encoding) if isinstance(content, str) else memoryview(content))


_PLAIN = {
    "bytearray": _bytearray,
    "set": set, "frozenset": frozenset, "complex": complex, "slice": slice, "list": list,
    "dict": dict, "tuple": tuple, "int": int, "float": float, "str": str, "bool": bool,
}  # fmt: skip
MOST_TENSORS = 20_000
"""Members of an archive of tensors; a file with more is refused."""

_MAGIC = 0x1950A86A20F9469CFC6C
_DAMAGED = (  # what zipfile raises for members that are not what the directory says
    KeyError, ValueError, EOFError, OSError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_ALIGNMENT = 64


@dataclass
class Storage:
    """Raw numbers of a file: a member of the archive, or a range of a file of the old kind.

    Attributes
    ----------
    key : str
    dtype : torch.dtype
        As the pickle declares it.
    start, size : int
        Place in the file and bytes, in files of the old kind; −1 in archives.
    """

    key: str
    dtype: torch.dtype
    start: int = -1
    size: int = -1


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file that has not been read yet: a view of a storage."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def place(self) -> tuple[object, ...]:
        """Equal for two names of the same tensor."""
        return self.storage.key, self.offset, self.shape, self.stride


class Inert:
    """A placeholder for an unknown object of a pickle: it stores its arguments and does nothing."""

    origin = "an object"

    def __new__(cls, *args: object, **kwargs: object) -> Inert:
        """Take any arguments."""
        made = super().__new__(cls)
        made.__dict__["_state"] = None
        return made

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.__dict__["_state"] = state

    def append(self, item: object) -> None:
        """Drop an item of a list."""

    def extend(self, items: object) -> None:
        """Drop items of a list."""

    def add(self, item: object) -> None:
        """Drop an item of a set."""

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def __call__(self, *args: object, **kwargs: object) -> Inert:
        """Stay as it is."""
        return self

    def __hash__(self) -> int:
        return id(self)

    @property
    def state(self) -> Any:
        """What the pickle gave it."""
        return self.__dict__["_state"]


class TorchFile:
    """A file of `torch.save`.

    Parameters
    ----------
    path : Path

    Attributes
    ----------
    content : object
        What was saved: plain Python, `StoredTensor` for tensors, `Inert` for unknown objects.
    unknown : list of str
        The classes and functions that became placeholders.

    Raises
    ------
    InstanceError
        When the file is none, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unknown: list[str] = []
        self._storages: dict[str, Storage] = {}
        self._prefix: str | None = None  # of the members of an archive; None in files of the old kind
        try:
            if zipfile.is_zipfile(path):
                self._read_archive()
            else:
                self._read_old()
        except InstanceError:
            raise
        except MemoryError:
            raise
        except RecursionError:
            raise InstanceError(f"{path}: cannot be read as a checkpoint: it is nested too deeply") from None
        except Exception as error:  # a damaged pickle can raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InstanceError(f"{path}: cannot be read as a checkpoint: {reason[:200]}") from None

    def read(self, tensor: StoredTensor) -> Tensor:
        """The numbers of a tensor; raises `InstanceError` when they are not there."""
        data = self._bytes(tensor.storage)
        try:
            if min(tensor.shape, default=1) == 0:
                return torch.empty(tensor.shape, dtype=tensor.dtype)
            flat = torch.frombuffer(bytearray(data), dtype=tensor.dtype)
            return flat.as_strided(tensor.shape, tensor.stride, tensor.offset).clone()
        except (RuntimeError, ValueError):
            raise InstanceError(f"{self.path}: is damaged: a tensor reaches beyond its storage") from None

    def write(self, file: IO[bytes], changes: Mapping[str, tuple[StoredTensor, Tensor]]) -> None:
        """Rewrite the file with new values in some tensors, which keep their types and places.

        Parameters
        ----------
        file : binary file
        changes : mapping of str to (StoredTensor, Tensor)

        Raises
        ------
        InstanceError
            When two of them are the same numbers in the file and differ.
        """
        by_key: dict[str, list[tuple[str, StoredTensor, Tensor]]] = {}
        for name, (stored, tensor) in changes.items():
            by_key.setdefault(stored.storage.key, []).append((name, stored, tensor))
        if self._prefix is None:
            with self.path.open("rb") as source:
                _copy(source, file)
            for key, those in by_key.items():
                file.seek(self._storages[key].start)
                file.write(self._changed(key, those))
            file.seek(0, io.SEEK_END)
            return
        members = {f"{self._prefix}data/{key}": key for key in by_key}
        with zipfile.ZipFile(self.path) as source_zip, zipfile.ZipFile(file, "w", allowZip64=True) as target:
            for info in source_zip.infolist():
                storage = members.get(info.filename)
                try:
                    data = source_zip.read(info) if storage is None else self._changed(storage, by_key[storage])
                except _DAMAGED as error:
                    raise InstanceError(f"{self.path}: is damaged: {error}") from None
                fresh = zipfile.ZipInfo(info.filename, info.date_time)
                fresh.compress_type = info.compress_type
                # torch maps storages into memory: they start at multiples of 64 bytes, as it writes them itself.
                start = file.tell() + 30 + len(info.filename.encode()) + 4
                padding = -start % _ALIGNMENT
                fresh.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
                target.writestr(fresh, data)

    def _changed(self, key: str, those: list[tuple[str, StoredTensor, Tensor]]) -> bytes:
        data = bytearray(self._bytes(self._storages[key]))
        views = []
        for name, stored, tensor in those:
            view = torch.frombuffer(data, dtype=stored.dtype).as_strided(
                stored.shape, stored.stride, stored.offset
            )
            try:
                view.copy_(tensor)
            except RuntimeError:
                raise InstanceError(
                    f"{self.path}: '{name}' repeats its numbers in the file: save the checkpoint anew, with "
                    "clones of its tensors"
                ) from None
            views.append((name, view, tensor))
        for name, view, tensor in views:
            if not torch.equal(_raw(view), _raw(tensor.to(view.dtype))):
                others = ", ".join(f"'{other}'" for other, _, _ in those if other != name)
                raise InstanceError(
                    f"{self.path}: '{name}' shares its numbers with {others} in the file, but not in the network: "
                    "save the checkpoint anew with torch.save(model.state_dict(), …) of the network"
                )
        return bytes(data)

    def _bytes(self, storage: Storage) -> bytes:
        if storage.start >= 0:
            with self.path.open("rb") as file:
                file.seek(storage.start)
                return file.read(storage.size)
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(f"{self._prefix}data/{storage.key}")
        except _DAMAGED as error:
            raise InstanceError(f"{self.path}: is damaged: {error}") from None

    def _read_archive(self) -> None:
        with zipfile.ZipFile(self.path) as archive:
            check_archive(archive, self.path, InstanceError, MOST_TENSORS)
            names = archive.namelist()
            pickled = next((name for name in names if name == "data.pkl" or name.endswith("/data.pkl")), None)
            if pickled is None:
                raise InstanceError(f"{self.path}: is no file of torch.save: the archive has no data.pkl")
            self._prefix = pickled.removesuffix("data.pkl")
            order = f"{self._prefix}byteorder"
            if order in names and archive.read(order).strip() != sys.byteorder.encode():
                raise InstanceError(f"{self.path}: was written on a machine with another order of bytes")
            self.content = self._unpickler(io.BytesIO(archive.read(pickled))).load()

    def _read_old(self) -> None:
        with self.path.open("rb") as file:
            if self._unpickler(file).load() != _MAGIC:
                raise InstanceError(f"{self.path}: is a pickle, but no file of torch.save")
            self._unpickler(file).load()  # the version of the protocol
            self._unpickler(file).load()  # sizes and byte order of the writer
            self.content = self._unpickler(file).load()
            for key in self._unpickler(file).load():
                (count,) = struct.unpack("<q", file.read(8))
                storage = self._storages[str(key)]
                storage.start = file.tell()
                storage.size = count * storage.dtype.itemsize
                file.seek(storage.size, io.SEEK_CUR)

    def _unpickler(self, file: IO[bytes]) -> pickle.Unpickler:
        return _Unpickler(file, self._storages, self.unknown)


class _Unpickler(pickle.Unpickler):
    """Reads tensors, and replaces everything else by placeholders."""

    def __init__(self, file: IO[bytes], storages: dict[str, Storage], unknown: list[str]) -> None:
        super().__init__(file, encoding="utf-8", errors="surrogateescape")
        self._storages, self._unknown = storages, unknown
        # Made anew for every file: whatever a pickle does to them ends with it.
        self._known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): _size(),
            ("torch", "device"): _constant(None),
            **{("torch._utils", f"_rebuild_tensor{version}"): _rebuilder() for version in ("", "_v2", "_v3")},
            **{("torch._utils", f"_rebuild_parameter{kind}"): _first() for kind in ("", "_with_state")},
            **{("builtins", name): kind for name, kind in _PLAIN.items()},
            **{("__builtin__", name): kind for name, kind in _PLAIN.items()},
            **{("torch", name): dtype for name, dtype in _STORAGES.items()},
            ("torch.storage", "UntypedStorage"): torch.uint8,
        }

    def find_class(self, module: str, name: str) -> Any:
        """A name that describes tensors, or a placeholder."""
        found = self._known.get((module, name))
        # Not by getattr: torch loads some of its modules, and calls functions, for names that are asked for so.
        if found is None and module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            found = vars(torch)[name]
        if found is None:
            origin = f"{module}.{name}"
            self._unknown.append(origin)
            found = self._known[module, name] = type("Inert", (Inert,), {"origin": origin})
        return found

    def persistent_load(self, pid: Any) -> Any:
        """A storage; a class with its source in old files of whole models."""
        if not isinstance(pid, tuple) or not pid:
            raise pickle.UnpicklingError("a reference to something that is no storage")
        if pid[0] == "module":
            return pid[1]
        if pid[0] != "storage" or len(pid) < 5:
            raise pickle.UnpicklingError("a reference to something that is no storage")
        _, dtype, key, _, count = pid[:5]
        if not isinstance(dtype, torch.dtype) or not isinstance(count, int):
            raise pickle.UnpicklingError("a storage of a type that is not known")
        storage = self._storages.setdefault(str(key), Storage(str(key), dtype))
        view = pid[5] if len(pid) > 5 else None
        if isinstance(view, tuple):  # a part of another storage, in the old format
            raise pickle.UnpicklingError("a view of a storage, as PyTorch 0.1 wrote them")
        return storage


def _rebuilder() -> Callable[..., Any]:
    def rebuild(storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> Any:
        if not isinstance(storage, Storage):
            return Inert()
        dtype = next((each for each in rest if isinstance(each, torch.dtype)), storage.dtype)
        shape, steps = tuple(map(int, size)), tuple(map(int, stride))
        if len(shape) != len(steps) or min((*shape, *steps, int(offset)), default=0) < 0:
            raise pickle.UnpicklingError("a tensor of an impossible shape")
        return StoredTensor(storage, dtype, int(offset), shape, steps)

    return rebuild


def _first() -> Callable[..., Any]:
    return lambda data, *rest: data


def _size() -> Callable[..., Any]:
    return lambda shape=(): tuple(shape)


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *rest: value


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _copy(source: IO[bytes], target: IO[bytes]) -> None:
    while piece := source.read(1 << 24):
        target.write(piece)


def dictionaries(content: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dictionary of tensors in what a file holds, with the path of keys that leads to it.

    Objects of unknown classes count by their state: a whole model is the dictionary of its parameters and buffers.
    """
    yield from _dictionaries(content, "", 0, set())


def _dictionaries(content: Any, path: str, depth: int, seen: set[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    if depth > _DEEPEST or id(content) in seen:
        return
    seen.add(id(content))
    if isinstance(content, Inert):
        tensors = dict(_tensors_of_module(content, "", 0))
        if tensors:
            yield path, tensors
            return
        content = content.state if isinstance(content.state, dict) else {}
    if not isinstance(content, dict):
        return
    if any(isinstance(value, StoredTensor) for value in content.values()):
        yield path, {str(key): value for key, value in content.items()}
    for key, value in content.items():
        if isinstance(value, dict | Inert):
            yield from _dictionaries(value, f"{path}.{key}" if path else str(key), depth + 1, seen)


_DEEPEST = 4


def _tensors_of_module(module: Inert, prefix: str, depth: int) -> Iterator[tuple[str, StoredTensor]]:
    """Parameters and buffers of a pickled `torch.nn.Module`, or attributes of a TorchScript module."""
    state = module.state
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], dict):
        state = state[0]
    if not isinstance(state, dict) or depth > 100:
        return
    parts = [state.get(kind) for kind in ("_parameters", "_buffers")]
    if not any(isinstance(part, dict) for part in parts):
        parts = [state]
    hidden = state.get("_non_persistent_buffers_set")
    for part in parts:
        for key, value in part.items() if isinstance(part, dict) else ():
            if isinstance(value, StoredTensor) and not (isinstance(hidden, set) and key in hidden):
                yield f"{prefix}{key}", value
    children = state.get("_modules", state)
    for key, value in children.items() if isinstance(children, dict) else ():
        if isinstance(value, Inert):
            yield from _tensors_of_module(value, f"{prefix}{key}.", depth + 1)
