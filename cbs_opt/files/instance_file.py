"""Reading and writing instance files, `cbs-instance` version 1; `docs/format.md` is the specification."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbs_opt.budget import Budget
from cbs_opt.curvature import Curvature, GradientFactor, HessianBlocks, InverseHessianBlocks
from cbs_opt.errors import InstanceError
from cbs_opt.files.npz import NpzReader, json_text, write_npz
from cbs_opt.files.paths import as_path
from cbs_opt.instance import Instance

FORMAT = "cbs-instance"
VERSION = 1

_REQUIRED = {"format", "version", "weights", "block_sizes", "budget", "metadata"}
_CURVATURES = ("inverse_hessian", "hessian", "gradients")
_OPTIONAL = {*_CURVATURES, "damping", "groups", "group_budgets", "linear", "fixed"}


def read_instance(path: Path | str) -> Instance:
    """Read an instance file.

    Parameters
    ----------
    path : Path or str

    Returns
    -------
    Instance
        Its large arrays are memory-mapped where the file holds them uncompressed.

    Raises
    ------
    InstanceError
        With one sentence that names the file and the field.

    Notes
    -----
    The file is read twice, once for its SHA-256 and once for checksums and values; dense blocks are checked
    by Cholesky, O(Σ b_k³).
    """
    path = as_path(path)
    with NpzReader(path, InstanceError) as npz:
        npz.check_format(FORMAT, VERSION)
        npz.check_keys(_REQUIRED, _OPTIONAL)
        given = [key for key in _CURVATURES if key in npz.headers]
        if len(given) != 1:
            raise InstanceError(
                f"{path}: exactly one of `inverse_hessian`, `hessian` and `gradients` must be there, got "
                f"{' and '.join(f'`{key}`' for key in given) or 'none'}"
            )
        (kind,) = given
        if ("damping" in npz.headers) != (kind == "gradients"):
            raise InstanceError(
                f"{path}: `damping` comes with `gradients` and only with them; "
                f"{'it is missing' if kind == 'gradients' else f'the curvature is `{kind}`'}"
            )
        (n,) = npz.expect("weights", "float", (None,)).shape
        if n < 1:
            raise InstanceError(f"{path}: `weights` must hold at least one weight")
        _check_shapes(npz, kind, n)
        try:
            arrays = {key: npz.read(key) for key in npz.headers.keys() & (_OPTIONAL | {"weights"})}
            block_sizes = npz.read("block_sizes")
            if block_sizes.dtype.kind == "u":
                block_sizes = block_sizes.astype(np.int64)
            if block_sizes.size == 0 or block_sizes.min() < 1 or block_sizes.max() > n:
                raise InstanceError(f"`block_sizes` must hold numbers between 1 and {n}")
            if int(block_sizes.sum()) != n:
                raise InstanceError(
                    f"`block_sizes` must sum to {n}, the number of weights, got {int(block_sizes.sum())}"
                )
            return Instance(
                weights=arrays["weights"],
                curvature=_curvature(kind, arrays, block_sizes),
                budget=Budget(npz.integer("budget"), arrays.get("groups"), arrays.get("group_budgets")),
                linear=arrays.get("linear"),
                fixed=arrays.get("fixed"),
                metadata=npz.json_object("metadata"),
                path=path,
                sha256=file_sha256(path),
            )
        except InstanceError as error:
            text = str(error)
            raise InstanceError(text if text.startswith(str(path)) else f"{path}: {text}") from None
        except MemoryError:
            raise InstanceError(f"{path}: does not fit into memory") from None


def _check_shapes(npz: NpzReader, kind: str, n: int) -> None:
    """Everything that the headers tell, before any data is read."""
    npz.expect("block_sizes", "integer", (None,))
    npz.expect("budget", "integer", ())
    npz.expect(kind, "float", (None, n) if kind == "gradients" else (None,))
    if kind == "gradients":
        npz.expect("damping", "float", ())
    for key, type_ in (("linear", "float"), ("fixed", "int8"), ("groups", "integer")):
        if key in npz.headers:
            npz.expect(key, type_, (n,))
    if "group_budgets" in npz.headers:
        npz.expect("group_budgets", "integer", (None,))


def _curvature(kind: str, arrays: dict[str, NDArray[Any]], block_sizes: NDArray[Any]) -> Curvature:
    if kind == "gradients":
        return GradientFactor(arrays["gradients"], float(arrays["damping"]), block_sizes)
    if kind == "hessian":
        return HessianBlocks(arrays["hessian"], block_sizes)
    return InverseHessianBlocks(arrays["inverse_hessian"], block_sizes)


def write_instance(path: Path | str, instance: Instance) -> None:
    """Write an instance file; same instance, same bytes.

    Raises
    ------
    OutputError
        When the file cannot be written; nothing is left behind then.
    InstanceError
        When `metadata` holds what JSON cannot.
    """
    write_npz(path, instance_arrays(instance))


def instance_arrays(instance: Instance) -> dict[str, NDArray[Any]]:
    """The members of an instance file, in their order; raises `InstanceError` as `write_instance` does."""
    curvature = instance.curvature
    arrays: dict[str, NDArray[Any]] = {
        "format": np.array(FORMAT),
        "version": np.array(VERSION, dtype=np.int64),
        "weights": instance.weights,
        "block_sizes": curvature.block_sizes,
        "budget": np.array(instance.budget.total, dtype=np.int64),
    }
    if isinstance(curvature, GradientFactor):
        arrays["gradients"] = curvature.gradients
        arrays["damping"] = np.array(curvature.damping)
    elif isinstance(curvature, HessianBlocks | InverseHessianBlocks):
        arrays[curvature.kind] = curvature.flat
    if instance.budget.groups is not None and instance.budget.group_budgets is not None:
        arrays |= {"groups": instance.budget.groups, "group_budgets": instance.budget.group_budgets}
    if instance.linear is not None:
        arrays["linear"] = instance.linear
    if instance.fixed is not None:
        arrays["fixed"] = instance.fixed
    try:
        arrays["metadata"] = json_text(instance.metadata)
    except (TypeError, ValueError) as error:
        raise InstanceError(f"`metadata` cannot be written as JSON: {error}") from None
    return arrays


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
