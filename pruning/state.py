"""What is stored after every stage, so that a run that was killed continues where it was."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_bytes
from torch import nn

from cbs_opt.errors import InstanceError
from cbs_opt.files.atomic import atomic_write
from cbs_opt.instances.batches import Bundle, slices
from cbs_opt.instances.data import SampleSource
from cbs_opt.jsonable import finite
from cbs_opt.pruning.method import Method
from cbs_opt.pruning.network import State
from cbs_opt.pruning.outcome import Stage
from cbs_opt.pruning.samples import Pool
from cbs_opt.typing import BoolArray

FORMAT, VERSION = "cbs-prune-state", 2
_PRUNED = "pruned|"
_TENSOR = "tensor|"
_LOOKED_AT = 256  # samples by which data are recognised
_SAME_LOSS = 1e-3  # relative, between machines that compute in another order
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_ADVICE = "remove it, or name another with `--state`"


@dataclass(frozen=True)
class Stored:
    """A run after some of its stages.

    Attributes
    ----------
    stages : tuple of Stage
    tensors : dict of str to Tensor
        Of the network, as `WorkingCopy.state` gives them.
    pruned : bool (n,)
    dense_loss : float or None
        Of the network that all began with, on the held-out samples.
    """

    stages: tuple[Stage, ...]
    tensors: State
    pruned: BoolArray
    dense_loss: float | None

    def check_same_network(self, path: Path | str, dense_loss: float | None) -> None:
        """Refuse to go on where the dense network has another loss now: its code, or the loss, has changed.

        Raises
        ------
        InstanceError
        """
        if self.dense_loss is None or dense_loss is None:
            return
        if abs(self.dense_loss - dense_loss) > _SAME_LOSS * max(abs(self.dense_loss), abs(dense_loss)):
            raise InstanceError(
                f"{path}: is the state of another run: the network before pruning had the loss "
                f"{self.dense_loss:.6g} on the held-out samples, it has {dense_loss:.6g} now: {_ADVICE}"
            )


def fingerprint(
    method: Method,
    model: nn.Module,
    dense: State,
    names: Sequence[str],
    samples: Pool,
    held_out: SampleSource | None,
    loss: str,
) -> str:
    """SHA-256 of what a run depends on: options, modules, dense tensors, loss, some of the samples."""
    digest = hashlib.sha256()
    facts = {
        "method": finite(method.to_dict()),
        "modules": _ADDRESS.sub("", repr(model)),
        "names": list(names),
        "samples": len(samples),
        "held_out": 0 if held_out is None else len(held_out),
        "loss": loss,
    }
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(dense.items()):
        digest.update(name.encode())
        digest.update(_bytes_of(tensor))
    for source, indices in (
        (samples.source, samples.indices),
        (held_out, np.arange(0 if held_out is None else len(held_out))),
    ):
        if source is not None and indices.size:
            spread = np.unique(np.linspace(0, indices.size - 1, min(indices.size, _LOOKED_AT)).astype(np.int64))
            seen = source.subset(indices[spread])
            for part in slices(seen.inputs, _LOOKED_AT):
                _add(digest, seen.inputs[part])
                _add(digest, None if seen.labels is None else seen.labels[part])
    return digest.hexdigest()


def _add(digest: Any, values: Any) -> None:
    """Add a tensor, or the leaves of a bundle."""
    for leaf in values.leaves if isinstance(values, Bundle) else [values]:
        if isinstance(leaf, torch.Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            digest.update(_bytes_of(leaf))
        else:
            digest.update(_ADDRESS.sub("", repr(leaf)).encode())


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


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
        "dense_loss": json.dumps(finite(stored.dense_loss)),
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
    advice = _ADVICE
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
        dense_loss = json.loads(metadata["dense_loss"])
        if dense_loss is not None:
            dense_loss = float(dense_loss)
    except (KeyError, TypeError, ValueError) as error:
        raise InstanceError(f"{path}: is damaged ({type(error).__name__}): {advice}") from None
    state = {name.removeprefix(_TENSOR): tensor for name, tensor in tensors.items()}
    return Stored(stages, state, pruned, dense_loss)
