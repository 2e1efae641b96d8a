"""What is stored after every stage, so that a run that was killed continues where it was."""

from __future__ import annotations

import hashlib
import json
import logging
import math
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
from cbs_opt.instances.batches import Bundle, Pieces, slices
from cbs_opt.instances.data import SampleSource
from cbs_opt.jsonable import finite
from cbs_opt.pruning.method import Method
from cbs_opt.pruning.network import State
from cbs_opt.pruning.outcome import Stage
from cbs_opt.pruning.samples import Pool
from cbs_opt.typing import BoolArray

logger = logging.getLogger("cbs_opt")

FORMAT, VERSION = "cbs-prune-state", 2
_PRUNED = "pruned|"
_TENSOR = "tensor|"
_LOOKED_AT = 1024  # samples by which data are recognised
_SAME_LOSS = 1e-3  # relative, between machines that compute in another order
_SIMILAR_LOSS = 0.5  # on samples that are others, of the same data
_DRAWN_ANEW = 0.1  # by how much means may differ, as a share of the standard deviation
_WORD = 2**64
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_ADVICE = "remove it, or name another with `--state`"


@dataclass(frozen=True)
class DataFacts:
    """By what data are recognised.

    Attributes
    ----------
    samples : str
        SHA-256 of some of the samples, in their order.
    labels : int
        Of all labels, in whatever order.
    mean, std : float
        Of the inputs of some samples, where they are no whole numbers; else 0.
    """

    samples: str
    labels: int
    mean: float
    std: float

    @classmethod
    def of(cls, pool: Pool, held_out: SampleSource | None) -> DataFacts:
        """The facts of the samples to prune with and of those held out."""
        digest = hashlib.sha256()
        sums = np.zeros(3)
        for source, indices in (
            (pool.source, pool.indices),
            (held_out, np.arange(0 if held_out is None else len(held_out))),
        ):
            if source is None or not indices.size:
                continue
            spread = np.unique(np.linspace(0, indices.size - 1, min(indices.size, _LOOKED_AT)).astype(np.int64))
            seen = source.subset(indices[spread])
            for part in slices(seen.inputs, _LOOKED_AT):
                inputs = seen.inputs[part]
                _add(digest, inputs)
                _add(digest, None if seen.labels is None else seen.labels[part])
                for leaf in _leaves(inputs):
                    if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                        values = leaf.double()
                        sums += float(values.numel()), float(values.sum()), float((values**2).sum())
        mean = sums[1] / sums[0] if sums[0] else 0.0
        std = math.sqrt(max(sums[2] / sums[0] - mean**2, 0.0)) if sums[0] else 0.0
        labels = sum(_sum_of_rows(leaf) for leaf in _leaves(pool.source.labels))
        if held_out is not None and len(pool) == len(pool.source):  # else they are among those
            labels += sum(_sum_of_rows(leaf) for leaf in _leaves(held_out.labels))
        return cls(digest.hexdigest(), labels % _WORD, mean, std)

    def resemble(self, other: DataFacts) -> bool:
        """Whether these may be the same data in another order, or with other random changes of the inputs."""
        scale = max(self.std, other.std)
        close = abs(self.mean - other.mean) <= _DRAWN_ANEW * scale
        return self.labels == other.labels and close and abs(self.std - other.std) <= _DRAWN_ANEW * scale


def _leaves(values: Any) -> Sequence[Any]:
    """The tensors of samples or labels, also of those with several shapes."""
    if isinstance(values, Pieces):
        return [leaf for part in values.parts for leaf in _leaves(part)]
    return values.leaves if isinstance(values, Bundle) else [values]


def _add(digest: Any, values: Any) -> None:
    for leaf in _leaves(values):
        if isinstance(leaf, torch.Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            digest.update(_bytes_of(leaf))
        else:
            digest.update(_ADDRESS.sub("", repr(leaf)).encode())


def _sum_of_rows(leaf: Any) -> int:
    """A sum over the rows of a tensor that does not depend on their order."""
    if not isinstance(leaf, torch.Tensor) or not leaf.numel():
        return 0
    rows = np.frombuffer(_bytes_of(leaf), np.uint8).reshape(len(leaf) if leaf.dim() else 1, -1)
    factors = np.random.default_rng(0).integers(1, 2**63, rows.shape[1], dtype=np.uint64) | np.uint64(1)
    words = rows.astype(np.uint64) @ factors  # modulo 2⁶⁴
    words = (words ^ (words >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return int((words ^ (words >> np.uint64(32))).sum(dtype=np.uint64))


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


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

    data: DataFacts

    def check_same(self, path: Path | str, data: DataFacts, dense_loss: float | None) -> None:
        """Refuse to go on with other data, or where the dense network has another loss, as by other code.

        A loader that shuffles, or a data set that draws its samples anew, gives the same data in this sense.

        Raises
        ------
        InstanceError
        """
        same = self.data.samples == data.samples
        if not same and not self.data.resemble(data):
            raise InstanceError(f"{path}: is the state of another run, with other data: {_ADVICE}")
        if not same:
            logger.info("the samples come in another order than in the stored run, or are drawn anew: it goes on")
        before, now = self.dense_loss, dense_loss
        if before is None or now is None:
            return
        if abs(before - now) > (_SAME_LOSS if same else _SIMILAR_LOSS) * max(abs(before), abs(now)):
            raise InstanceError(
                f"{path}: is the state of another run: the network before pruning had the loss {before:.6g} on "
                f"the held-out samples, it has {now:.6g} now: {_ADVICE}"
            )


def fingerprint(
    method: Method,
    model: nn.Module,
    dense: State,
    names: Sequence[str],
    samples: int,
    held_out: int,
    loss: str,
) -> str:
    """SHA-256 of what a run depends on but for the data: options, modules, dense tensors, loss, sizes."""
    digest = hashlib.sha256()
    facts = {
        "method": finite(method.to_dict()),
        "modules": _ADDRESS.sub("", repr(model)),
        "names": list(names),
        "samples": samples,
        "held_out": held_out,
        "loss": loss,
    }
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(dense.items()):
        digest.update(name.encode())
        digest.update(_bytes_of(tensor))
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
        "dense_loss": json.dumps(finite(stored.dense_loss)),
        "data": json.dumps(asdict(stored.data)),
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
            f"{path}: is the state of another run, with other options or another network: repeat its options, or "
            f"{advice}"
        )
    try:
        pruned = np.unpackbits(tensors.pop(_PRUNED).numpy(), count=int(metadata["weights"])).astype(bool)
        stages = tuple(Stage(**entry) for entry in json.loads(metadata["stages"]))
        dense_loss = json.loads(metadata["dense_loss"])
        if dense_loss is not None:
            dense_loss = float(dense_loss)
        data = DataFacts(**json.loads(metadata["data"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InstanceError(f"{path}: is damaged ({type(error).__name__}): {advice}") from None
    state = {name.removeprefix(_TENSOR): tensor for name, tensor in tensors.items()}
    return Stored(stages, state, pruned, dense_loss, data)
