"""Checkpoints as files: safetensors, `.npz` of tensors, and what `torch.save` writes, without running its code.

The container is recognised by its content, not by its name. A file of `torch.save` is read with
`weights_only=True`: it may hold tensors and plain values, and nothing that would have to be executed. The
tensors may lie under `state_dict`, `model_state_dict`, `model` or `net`, and their names may all start with
`module.` (as `DataParallel` leaves them): both are looked through, and kept when such a file is written anew.
"""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from cbs_opt.errors import InstanceError
from cbs_opt.files.atomic import atomic_write
from cbs_opt.files.instance_file import file_sha256
from cbs_opt.files.npz import NpzReader, write_npz

Container = Literal["safetensors", "npz", "torch"]

_NESTS = ("state_dict", "model_state_dict", "model", "net")
_PARALLEL = "module."


def read_checkpoint(path: Path | str) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, on the CPU.

    Raises
    ------
    InstanceError
        When the file is no checkpoint, is damaged, holds no tensors, or holds pickled code.
    """
    path = Path(path)
    container = container_of(path)
    if container == "safetensors":
        tensors = _read_safetensors(path)[0]
    elif container == "npz":
        tensors = {key: _tensor(array) for key, array in _read_npz(path).items() if array.dtype.kind in "fiub"}
    else:
        tensors = _plain_names(_nested(path, _read_torch(path)))
    if not tensors:
        raise InstanceError(f"{path}: holds no tensors")
    return tensors


def load_checkpoint(model: nn.Module, path: Path | str) -> None:
    """Load a checkpoint into a model, strictly.

    Raises
    ------
    InstanceError
        With the tensors that are missing, unexpected or of another shape; the model is then unchanged.
    """
    tensors, own = read_checkpoint(path), model.state_dict()
    problems = []
    missing, unexpected = own.keys() - tensors.keys(), tensors.keys() - own.keys()
    if missing:
        problems.append(f"it lacks {_listed(name for name in own if name in missing)}")
    if unexpected:
        problems.append(f"the network has no {_listed(name for name in tensors if name in unexpected)}")
    misshapen = [name for name in own if name in tensors and tensors[name].shape != own[name].shape]
    if misshapen:
        problems.append(
            "of another shape are "
            + _listed(f"{n} ({tuple(tensors[n].shape)}, expected {tuple(own[n].shape)})" for n in misshapen)
        )
    if problems:
        raise InstanceError(f"{path}: does not fit the network: {'; '.join(problems)}")
    model.load_state_dict(tensors)


def write_checkpoint(path: Path | str, tensors: Mapping[str, Tensor], like: Path | str) -> None:
    """Write a checkpoint in the container of another one, whose other entries are kept.

    Parameters
    ----------
    path : Path or str
        May be `like` itself.
    tensors : mapping of str to Tensor
        Those that change; they are stored in the type that `like` has.
    like : Path or str

    Raises
    ------
    InstanceError
        When `like` cannot be read, or has no such tensors.
    OutputError
        When the file cannot be written; `path` is then as it was before.
    """
    path, like = Path(path), Path(like)
    container = container_of(like)
    if container == "npz":
        arrays = _read_npz(like)
        old = {key: _tensor(array) for key, array in arrays.items() if array.dtype.kind in "fiub"}
        new = {key: tensor.numpy() for key, tensor in _fitted(like, tensors, old).items()}
        write_npz(path, arrays | new)
        return
    if container == "safetensors":
        old, metadata = _read_safetensors(like)
        data = safetensors_bytes(old | _fitted(like, tensors, old), metadata)
    else:
        content = _read_torch(like)
        nest = _nested(like, content)
        names = dict(zip(_plain_names(nest), nest, strict=True))
        fitted = _fitted(like, tensors, _plain_names(nest))
        # Layers that share a parameter have it under each of their names: the last one loaded would win.
        shared = {_place(nest[names[name]]): tensor for name, tensor in fitted.items()}
        for key, old_tensor in list(nest.items()):
            nest[key] = shared.get(_place(old_tensor), old_tensor)
        for name, tensor in fitted.items():
            nest[names[name]] = tensor
        buffer = io.BytesIO()  # torch would turn an error of the disk into one of its own
        torch.save(content, buffer)
        data = buffer.getvalue()
    with atomic_write(path) as file:
        file.write(data)


def checkpoint_sha256(path: Path | str) -> str:
    """SHA-256 of the file, in hexadecimal; raises `InstanceError` when it cannot be read."""
    try:
        return file_sha256(Path(path))
    except OSError as error:
        raise InstanceError(f"{path}: cannot be read: {error.strerror or error}") from None


def container_of(path: Path | str) -> Container:
    """Which kind of checkpoint a file is, by its content.

    Raises
    ------
    InstanceError
        When there is no such file, or it is none of the three.
    """
    path = Path(path)
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
    if head[:1] == b"\x80":
        return "torch"
    if head[:4] == b"PK\x03\x04":
        raise InstanceError(f"{path}: is damaged: its end is missing")
    raise InstanceError(
        f"{path}: is no checkpoint that we know: safetensors, .npz of tensors, or a file of torch.save"
    )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise InstanceError(f"{path}: is damaged: {error}") from None


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    with NpzReader(path, InstanceError) as npz:
        # Copies: what is read must not change when `path` is written anew.
        return {key: np.array(npz.read(key)) for key in npz.headers}


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual protocols: what they hold is refused or read
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InstanceError(
            f"{path}: holds pickled objects that only running code could restore{_what(error)}, which is refused: "
            "save the tensors alone, by torch.save(model.state_dict(), …) or as safetensors"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError, … on damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InstanceError(f"{path}: cannot be read as a checkpoint: {reason[:200]}") from None


def _what(error: BaseException) -> str:
    """The object that torch refused, from its message."""
    for words in ("GLOBAL ", "global "):
        _, found, rest = str(error).partition(words)
        if found and rest:
            return f" ({rest.split()[0].strip('.,`')[:80]})"
    return ""


def _nested(path: Path, content: Any) -> dict[str, Tensor]:
    """The dictionary of tensors in what a file of `torch.save` holds."""
    for key in (None, *_NESTS):
        nest = content if key is None else content.get(key) if isinstance(content, dict) else None
        if isinstance(nest, dict) and any(isinstance(value, Tensor) for value in nest.values()):
            bad = [
                name for name, value in nest.items() if not isinstance(name, str) or not isinstance(value, Tensor)
            ]
            if not bad:
                return nest
            raise InstanceError(f"{path}: {_listed(map(str, bad))} must be a tensor")
    raise InstanceError(
        f"{path}: holds no dictionary of tensors, at its top or under {', '.join(f'`{key}`' for key in _NESTS)}"
    )


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Where a tensor lies in memory: equal for two names of the same tensor."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _plain_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the prefix that `DataParallel` gives to all their names."""
    if all(name.startswith(_PARALLEL) for name in tensors):
        return {name.removeprefix(_PARALLEL): tensor for name, tensor in tensors.items()}
    return dict(tensors)


def _fitted(path: Path, new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The new tensors in the types of the old ones, on the CPU."""
    out = {}
    for name, tensor in new.items():
        if name not in old:
            raise InstanceError(f"{path}: holds no tensor {name}")
        if tensor.shape != old[name].shape:
            raise InstanceError(f"{path}: {name} has shape {tuple(old[name].shape)}, not {tuple(tensor.shape)}")
        out[name] = tensor.detach().to("cpu", old[name].dtype).contiguous()
    return out


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape))


def _listed(names: Iterable[str]) -> str:
    """Up to six names, and how many more."""
    all_names = list(names)
    more = f" and {len(all_names) - 6} more" if len(all_names) > 6 else ""
    return ", ".join(all_names[:6]) + more
