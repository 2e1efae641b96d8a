"""Checkpoint files of all formats: reading and writing their tensors by the names in the file."""

from __future__ import annotations

import io
import json
import logging
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from cbs_opt.errors import InstanceError, OutputError
from cbs_opt.files.atomic import atomic_write
from cbs_opt.files.npz import NpzReader, write_npz
from cbs_opt.instances.checkpoint_names import matched, preference
from cbs_opt.instances.torch_file import MOST_TENSORS, StoredTensor, TorchFile, dictionaries

logger = logging.getLogger("cbs_opt")

Container = Literal["safetensors", "npz", "torch", "folder"]

_INDICES = ("*.safetensors.index.json", "*.bin.index.json")
_SINGLE = (
    "model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "*.safetensors",
    "*.bin",
)
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".npz",
    ".index.json",
)


def container_of(path: Path | str) -> Container:
    """The format of a checkpoint file, from its content.

    Raises
    ------
    InstanceError
        When there is no such file, or its format is unknown.
    """
    path = Path(path)
    if path.is_dir():
        return "folder"
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                members = archive.namelist()
            return "npz" if members and all(name.endswith(".npy") for name in members) else "torch"
    except OSError as error:
        raise InstanceError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (zipfile.BadZipFile, ValueError, RuntimeError) as error:
        raise InstanceError(f"{path}: is damaged: {error}") from None
    if len(head) == 9 and head[8:] == b"{":
        return "safetensors"
    if path.name.endswith(".index.json"):
        return "folder"
    if head[:1] == b"\x80":
        return "torch"
    if head[:4] == b"PK\x03\x04":
        raise InstanceError(f"{path}: is damaged: its end is missing")
    raise InstanceError(
        f"{path}: is no known checkpoint format: safetensors, .npz of tensors, a file of torch.save, or a folder "
        "of these with an index"
    )


class Archive:
    """The tensors of a checkpoint by their names in the file.

    Attributes
    ----------
    path : Path
    shapes : dict of str to tuple of int
    floating : dict of str to bool
        Whether a tensor holds floating-point numbers.
    ignored : list of str
        Other contents of the file, for the log.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.floating: dict[str, bool] = {}
        self.ignored: list[str] = []

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        raise NotImplementedError

    def write(self, path: Path, changes: Mapping[str, Tensor], replaced: Collection[str] = ()) -> None:
        """Rewrite the checkpoint.

        Parameters
        ----------
        path : Path
            May be that of the checkpoint.
        changes : mapping of str to Tensor
            New values, of the old shapes and types; other names are added.
        replaced : collection of str
            Names of tensors that are left out.
        """
        raise NotImplementedError


class SafetensorsArchive(Archive):
    """A `.safetensors` file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    view = file.get_slice(name)
                    self.shapes[name] = tuple(view.get_shape())
                    self.floating[name] = view.get_dtype().startswith(("F", "BF"))
        except (SafetensorError, ValueError, OSError) as error:
            raise InstanceError(f"{path}: is damaged: {error}") from None

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        try:
            with safe_open(self.path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor.clone()  # the file may be written anew while it is mapped
        except (SafetensorError, ValueError, OSError) as error:
            raise InstanceError(f"{self.path}: is damaged: {error}") from None

    def write(self, path: Path, changes: Mapping[str, Tensor], replaced: Collection[str] = ()) -> None:
        """Rewrite the file, with its metadata."""
        with safe_open(self.path, framework="pt") as file:
            metadata = file.metadata()
        tensors = {name: self.read(name) for name in self.shapes if name not in changes and name not in replaced}
        ordered = {**dict.fromkeys(name for name in self.shapes if name not in replaced), **tensors, **changes}
        data = safetensors_bytes({name: t for name, t in ordered.items() if t is not None}, metadata)
        with atomic_write(path) as out:
            out.write(data)


class NpzArchive(Archive):
    """An `.npz` of tensors; arrays of other kinds are kept as they are."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with NpzReader(path, InstanceError, MOST_TENSORS) as npz:
            # Copies: what is read must not change when `path` is written anew.
            self._arrays: dict[str, NDArray[Any]] = {key: np.array(npz.read(key)) for key in npz.headers}
        for key, array in self._arrays.items():
            if array.dtype.kind in "fiub":
                self.shapes[key] = array.shape
                self.floating[key] = array.dtype.kind == "f"
            else:
                self.ignored.append(key)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        array = self._arrays[name]
        return torch.from_numpy(np.array(array, array.dtype.newbyteorder("=")).reshape(array.shape))

    def write(self, path: Path, changes: Mapping[str, Tensor], replaced: Collection[str] = ()) -> None:
        """Rewrite the file."""
        kept = {key: array for key, array in self._arrays.items() if key not in replaced}
        write_npz(path, kept | {name: tensor.numpy() for name, tensor in changes.items()})


class TorchArchive(Archive):
    """A file of `torch.save`: one of its dictionaries of tensors.

    Parameters
    ----------
    path : Path
    wanted : collection of str
        Tensors of the network: the dictionary that has most of them is taken.
    key : str, optional
        Path of the dictionary, such as `state_dict_ema`, instead of that choice.
    quiet : bool
        Do not log the choice.
    """

    def __init__(
        self, path: Path, wanted: Collection[str] = (), key: str | None = None, *, quiet: bool = False
    ) -> None:
        super().__init__(path)
        self._file = TorchFile(path)
        self.key, self._tensors = self._choice(wanted, key, quiet)
        for name, stored in self._tensors.items():
            self.shapes[name] = stored.shape
            self.floating[name] = stored.dtype.is_floating_point

    def _choice(
        self, wanted: Collection[str], key: str | None, quiet: bool
    ) -> tuple[str, dict[str, StoredTensor]]:
        found = list(dictionaries(self._file.content))
        if key is not None:
            for path, entries in found:
                if path == key or path.rpartition(".")[2] == key:
                    return path, _tensors(entries)
            known = ", ".join(f"`{path}`" for path, _ in found if path) or "none"
            raise InstanceError(f"{self.path}: has no dictionary of tensors under `{key}`; it has {known}")
        if not found:
            raise InstanceError(
                f"{self.path}: holds no dictionary of tensors"
                + (f", only {', '.join(dict.fromkeys(self._file.unknown))[:120]}" if self._file.unknown else "")
                + ": save torch.save(model.state_dict(), …) or safetensors"
            )

        def fit(item: tuple[str, dict[str, Any]]) -> int:
            return len(set(wanted) & matched(_tensors(item[1]), wanted).keys())

        ranked = sorted(found, key=lambda item: (-fit(item), *preference(item[0]), -len(_tensors(item[1]))))
        path, entries = ranked[0]
        best = fit(ranked[0])
        others = [other for other, inner in ranked[1:] if fit((other, inner)) == best > 0]
        title = f"`{path}`" if path else "the dictionary at the top"
        if others and not quiet:
            logger.warning(
                f"{self.path}: {title} is taken; it also has {', '.join(f'`{name}`' for name in others)} "
                f"(--checkpoint-key {others[0]} takes that)"
            )
        elif path and not quiet:
            logger.info(f"{self.path}: {title} is taken")
        ignored = [str(k) for k in entries if not isinstance(entries[k], StoredTensor)]
        content = self._file.content
        if path and isinstance(content, dict):
            ignored += [str(k) for k in content if str(k) != path.partition(".")[0] and str(k) not in others]
        self.ignored += ignored
        return path, _tensors(entries)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        return self._file.read(self._tensors[name])

    def write(self, path: Path, changes: Mapping[str, Tensor], replaced: Collection[str] = ()) -> None:
        """Write new values into the same places; if names change, write only the dictionary."""
        if replaced or any(name not in self._tensors for name in changes):
            kept = {name: self.read(name) for name in self._tensors if name not in replaced}
            if self.ignored or self.key:
                logger.warning(
                    f"{path}: only the tensors are written: other names than in {self.path} need a new file"
                )
            buffer = io.BytesIO()  # torch would replace an error of the disk by one of its own
            torch.save(OrderedDict(kept | dict(changes)), buffer)
            with atomic_write(path) as file:
                file.write(buffer.getvalue())
            return
        self._check_overlaps(changes)
        with atomic_write(path) as file:
            self._file.write(file, {name: (self._tensors[name], tensor) for name, tensor in changes.items()})

    def _check_overlaps(self, changes: Mapping[str, Tensor]) -> None:
        """Refuse to change memory that a changed tensor shares with an unchanged one."""
        changed = {self._tensors[name].place for name in changes}
        keys = {self._tensors[name].storage.key: name for name in changes}
        for name, stored in self._tensors.items():
            if stored.storage.key not in keys or stored.place in changed:
                continue
            for other in changes:
                theirs = self._tensors[other]
                if theirs.storage.key == stored.storage.key and _overlap(stored, theirs):
                    raise InstanceError(
                        f"{self.path}: '{name}' and '{other}' are parts of the same numbers in the file: save the "
                        "checkpoint anew, with clones of its tensors"
                    )


class FolderArchive(Archive):
    """A Hugging Face folder: shards with an index, or one file; written with the same shards.

    Parameters
    ----------
    path : Path
        The folder, or its index.
    wanted, key
        As for `TorchArchive`.
    """

    def __init__(
        self, path: Path, wanted: Collection[str] = (), key: str | None = None, *, quiet: bool = False
    ) -> None:
        super().__init__(path)
        self.folder = path if path.is_dir() else path.parent
        self._index = path if not path.is_dir() else next(_found(path, _INDICES), None)
        if self._index is None:
            single = next(_found(self.folder, _SINGLE), None)
            if single is None:
                raise InstanceError(f"{path}: holds no checkpoint: no index of shards, no .safetensors, no .bin")
            names = [single.name]
        else:
            names = sorted(set(_weight_map(self._index).values()))
        self.files = {name: open_file(self.folder / name, wanted, key, quiet=quiet) for name in names}
        self._owner = {tensor: name for name, archive in self.files.items() for tensor in archive.shapes}
        for archive in self.files.values():
            self.shapes |= archive.shapes
            self.floating |= archive.floating
            self.ignored += archive.ignored

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        return self.files[self._owner[name]].read(name)

    def write(self, path: Path, changes: Mapping[str, Tensor], replaced: Collection[str] = ()) -> None:
        """Write every shard and the index into another folder, with configuration files and the like."""
        target = path if not path.name.endswith(".index.json") else path.parent
        try:
            target.mkdir(exist_ok=True)
            for entry in self.folder.iterdir():
                if (
                    target.resolve() != self.folder.resolve()
                    and entry.is_file()
                    and not entry.name.endswith(_WEIGHTS)
                ):
                    shutil.copyfile(entry, target / entry.name)
        except OSError as error:
            raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
        first = next(iter(self.files))
        # Names that are new go where the tensors that they replace were.
        places = {name: self._owner.get(name, first) for name in changes}
        for file_name, archive in self.files.items():
            own = {name: tensor for name, tensor in changes.items() if places[name] == file_name}
            archive.write(target / file_name, own, [name for name in replaced if self._owner[name] == file_name])
        if self._index is not None:
            content = json.loads(self._index.read_text(encoding="utf-8"))
            kept = {name: file for name, file in content["weight_map"].items() if name not in replaced}
            content["weight_map"] = kept | {name: places[name] for name in changes if name not in kept}
            with atomic_write(target / self._index.name) as file:
                file.write(json.dumps(content, indent=2).encode() + b"\n")

    def members(self) -> list[Path]:
        """The files whose bytes make up the checkpoint."""
        return [*([] if self._index is None else [self._index]), *(self.folder / name for name in self.files)]


def open_file(path: Path, wanted: Collection[str] = (), key: str | None = None, *, quiet: bool = False) -> Archive:
    """Open a checkpoint of any format; raises `InstanceError` if it is none or is damaged."""
    container = container_of(path)
    if container == "folder":
        return FolderArchive(path, wanted, key, quiet=quiet)
    if container == "torch":
        return TorchArchive(path, wanted, key, quiet=quiet)
    if key is not None:
        raise InstanceError(f"{path}: has no dictionaries to choose from: it holds its tensors at the top")
    return SafetensorsArchive(path) if container == "safetensors" else NpzArchive(path)


def _tensors(entries: Mapping[str, Any]) -> dict[str, StoredTensor]:
    return {name: value for name, value in entries.items() if isinstance(value, StoredTensor)}


def _overlap(one: StoredTensor, other: StoredTensor) -> bool:
    spans = []
    for tensor in (one, other):
        if min(tensor.shape, default=1) == 0:
            return False
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride, strict=True))
        size = tensor.dtype.itemsize
        spans.append((tensor.offset * size, (tensor.offset + reach + 1) * size))
    return spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]


def _found(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    for pattern in patterns:
        yield from sorted(folder.glob(pattern))


def _is_shard(index: Path, file: Any) -> bool:
    if not isinstance(file, str) or Path(file).name != file or file == ".." or file.endswith(".index.json"):
        return False
    return not (index.parent / file).is_dir()


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        found = content["weight_map"]
        # A shard is in the folder of the index: its name must not lead elsewhere.
        if isinstance(found, dict) and found and all(_is_shard(index, file) for file in found.values()):
            return {str(name): file for name, file in found.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InstanceError(f"{index}: is no index of shards: {type(error).__name__}: {error}") from None
    raise InstanceError(f"{index}: `weight_map` must name a file of its own folder for every tensor")
