"""What is stored after every stage, so that a run that was killed continues where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_bytes

from cbs_opt.errors import InstanceError
from cbs_opt.files.atomic import atomic_write
from cbs_opt.jsonable import finite
from cbs_opt.pruning.method import Method
from cbs_opt.pruning.network import State
from cbs_opt.pruning.outcome import Stage
from cbs_opt.typing import BoolArray

FORMAT, VERSION = "cbs-prune-state", 1
_PRUNED = "pruned|"
_TENSOR = "tensor|"


@dataclass(frozen=True)
class Stored:
    """A run after some of its stages.

    Attributes
    ----------
    stages : tuple of Stage
    tensors : dict of str to Tensor
        Of the network, as `WorkingCopy.state` gives them.
    pruned : bool (n,)
    """

    stages: tuple[Stage, ...]
    tensors: State
    pruned: BoolArray


def fingerprint(method: Method, dense: State, names: Sequence[str], samples: int, loss: str) -> str:
    """SHA-256 of all that a run depends on: options, dense tensors, number of samples, loss."""
    digest = hashlib.sha256()
    facts = {"method": finite(method.to_dict()), "names": list(names), "samples": samples, "loss": loss}
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(dense.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_state(path: Path | str, stored: Stored, run: str) -> None:
    """Write the file atomically.

    Parameters
    ----------
    path : Path or str
    stored : Stored
    run : str
        The `fingerprint`.

    Raises
    ------
    OutputError
        When it cannot be written; the file is then as it was before.
    """
    tensors = {f"{_TENSOR}{name}": tensor.contiguous() for name, tensor in stored.tensors.items()}
    tensors[_PRUNED] = torch.from_numpy(np.packbits(stored.pruned))
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "run": run,
        "weights": str(stored.pruned.size),
        "stages": json.dumps([finite(asdict(stage)) for stage in stored.stages]),
    }
    with atomic_write(path) as file:
        file.write(safetensors_bytes(tensors, metadata))


def read_state(path: Path | str, run: str) -> Stored | None:
    """Read the file; None where there is none.

    Raises
    ------
    InstanceError
        When it is no such file, damaged, or that of another run.
    """
    path = Path(path)
    if not path.exists():
        return None
    advice = "remove it, or name another with `--state`"
    try:
        content = path.read_bytes()
        tensors = safetensors_load(content)
        length = int.from_bytes(content[:8], "little")
        metadata: Mapping[str, Any] = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    except (OSError, SafetensorError, ValueError) as error:
        raise InstanceError(f"{path}: is no state of a run that can be read ({error}): {advice}") from None
    if metadata.get("format") != FORMAT:
        raise InstanceError(f"{path}: is no state of a run: {advice}")
    if metadata.get("version") != str(VERSION):
        raise InstanceError(
            f"{path}: has version {metadata.get('version')}, this program reads {VERSION}: {advice}"
        )
    if metadata.get("run") != run:
        raise InstanceError(
            f"{path}: is the state of another run, with other options, data or weights: repeat its options, or "
            f"{advice}"
        )
    try:
        pruned = np.unpackbits(tensors.pop(_PRUNED).numpy(), count=int(metadata["weights"])).astype(bool)
        stages = tuple(Stage(**entry) for entry in json.loads(metadata["stages"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InstanceError(f"{path}: is damaged ({type(error).__name__}): {advice}") from None
    return Stored(stages, {name.removeprefix(_TENSOR): tensor for name, tensor in tensors.items()}, pruned)
