"""Reading and writing instance files, `cbs-instance` versions 1 to 3; `docs/format.md` is the specification."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbs_opt.budget import Budget
from cbs_opt.curvature import Curvature, SharedBlocks, curvature_kinds
from cbs_opt.curvature.outline import CurvatureOutline
from cbs_opt.curvature.shared_blocks import stored_sizes
from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.files.npz import NpzReader, json_text, write_npz
from cbs_opt.files.paths import as_path
from cbs_opt.instance import Instance
from cbs_opt.typing import FloatArray

FORMAT = "cbs-instance"
VERSION = 3
"""The newest version; every instance is written in the oldest version that can hold it."""

_MANY_WEIGHTS = 1 << 20  # from here on weights and groups are written in fewer bytes

_REQUIRED = {"format", "version", "weights", "block_sizes", "budget", "metadata"}
_OPTIONAL = {"groups", "group_sizes", "group_budgets", "cross_groups", "cross_group_budgets", "linear", "fixed"}
_SHARING = {"shared", "block_scale"}
_NEWER = {
    "shared": 2, "block_scale": 2, "group_sizes": 2, "cross_groups": 3, "cross_group_budgets": 3,
}  # fmt: skip
"""Members that version 1 has not, and the version that they need."""


def read_instance(path: Path | str) -> Instance:
    """Read an instance file.

    Parameters
    ----------
    path : Path or str

    Returns
    -------
    Instance
        Large arrays are memory-mapped if the file stores them uncompressed.

    Raises
    ------
    InstanceError
        One sentence that names the file and the field.

    Notes
    -----
    The file is read twice, once for its SHA-256 and once for checksums and values; dense blocks are checked
    by Cholesky, O(Σ b_k³).
    """
    return _read(as_path(path), outline=False)


def read_outline(path: Path | str) -> Instance:
    """Read an instance file without the values of its curvature, which are neither checked nor hashed.

    Parameters
    ----------
    path : Path or str

    Returns
    -------
    Instance
        With a `CurvatureOutline` in place of its curvature, and without `sha256`.

    Raises
    ------
    InstanceError
        As `read_instance`, for what is read.

    Notes
    -----
    O(n) time and memory, whatever the size of the file.
    """
    return _read(as_path(path), outline=True)


def _read(path: Path, outline: bool) -> Instance:
    try:
        return _read_members(path, outline)
    except MemoryError:
        raise InstanceError(f"{path}: does not fit into memory, or into what `ulimit -v` leaves") from None


def _read_members(path: Path, outline: bool) -> Instance:
    with NpzReader(path, InstanceError) as npz:
        npz.check_format(FORMAT, VERSION)
        kinds = curvature_kinds()
        members = {key for kind in kinds.values() for key in kind.members}
        npz.check_keys(_REQUIRED, _OPTIONAL | members | _SHARING)
        kind = _kind(npz, kinds)
        (n,) = npz.expect("weights", "float", (None,)).shape
        if n < 1:
            raise InstanceError(f"{path}: `weights` must hold at least one weight")
        _check_shapes(npz, n)
        try:
            block_sizes = _block_sizes(npz, n)
            arrays = {key: npz.read(key) for key in npz.headers.keys() & (_OPTIONAL | {"weights"})}
            return Instance(
                weights=arrays["weights"],
                curvature=(_outline if outline else _curvature)(npz, kind, block_sizes),
                budget=_budget(npz.integer("budget"), arrays, n),
                linear=arrays.get("linear"),
                fixed=arrays.get("fixed"),
                metadata=npz.json_object("metadata"),
                path=path,
                sha256=None if outline else file_sha256(path),
            )
        except InstanceError as error:
            text = str(error)
            raise InstanceError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def _kind(npz: NpzReader, kinds: dict[str, type[Curvature]]) -> type[Curvature]:
    """The kind of curvature that the file holds, with all of its members and no other's."""
    given = [key for key in kinds if key in npz.headers]
    if len(given) != 1:
        listed = ", ".join(f"`{key}`" for key in kinds)
        raise InstanceError(
            f"{npz.path}: exactly one of {listed} must be there, got "
            f"{' and '.join(f'`{key}`' for key in given) or 'none'}"
        )
    kind = kinds[given[0]]
    for other in kinds.values():
        for key in other.members:
            if (key in npz.headers) != (key in kind.members):
                problem = "it is missing" if key in kind.members else f"the curvature is `{kind.kind}`"
                raise InstanceError(
                    f"{npz.path}: `{key}` is required with `{other.kind}` and not allowed otherwise; {problem}"
                )
    version = npz.integer("version")
    for key in sorted(_NEWER.keys() & npz.headers.keys()):
        if version < _NEWER[key]:
            raise InstanceError(f"{npz.path}: `{key}` needs `version` {_NEWER[key]}, got {version}")
    if {"groups", "group_sizes"} <= npz.headers.keys():
        raise InstanceError(f"{npz.path}: `groups` and `group_sizes` exclude each other")
    if "group_sizes" in npz.headers and "group_budgets" not in npz.headers:
        raise InstanceError(f"{npz.path}: `group_sizes` is allowed only with `group_budgets`")
    if "block_scale" in npz.headers and "shared" not in npz.headers:
        raise InstanceError(f"{npz.path}: `block_scale` is allowed only with `shared`")
    return kind


def _check_shapes(npz: NpzReader, n: int) -> None:
    """Check the headers of all members but the curvature, before any data are read."""
    (blocks,) = npz.expect("block_sizes", "integer", (None,)).shape
    if blocks > n:
        raise InstanceError(f"{npz.path}: `block_sizes` must have at most {n} entries, one a weight, got {blocks}")
    npz.expect("budget", "integer", ())
    optional = {
        "linear": ("float", (n,)),
        "fixed": ("int8", (n,)),
        "groups": ("integer", (n,)),
        "group_sizes": ("integer", (None,)),
        "group_budgets": ("integer", (None,)),
        "cross_groups": ("integer", (n,)),
        "cross_group_budgets": ("integer", (None,)),
        "shared": ("integer", (blocks,)),
        "block_scale": ("float", (blocks,)),
    }
    for key, (type_, shape) in optional.items():
        if key in npz.headers:
            npz.expect(key, type_, shape)
    for key in ("group_sizes", "group_budgets", "cross_group_budgets"):
        groups = npz.headers[key].shape[0] if key in npz.headers else 0
        if groups > n:
            raise InstanceError(f"{npz.path}: `{key}` must have at most {n} entries, one a weight, got {groups}")


def _budget(total: int, arrays: dict[str, NDArray[Any]], n: int) -> Budget:
    """The budget; with `group_sizes` the groups are that many consecutive weights each."""
    counts, sizes = arrays.get("group_budgets"), arrays.get("group_sizes")
    crossed = arrays.get("cross_groups"), arrays.get("cross_group_budgets")
    if sizes is None or counts is None:
        return Budget(total, arrays.get("groups"), counts, *crossed)
    if sizes.size == 0 or sizes.min() < 1 or sizes.max() > n:
        raise InstanceError(f"`group_sizes` must hold numbers between 1 and {n}")
    sizes = sizes.astype(np.int64)
    if sizes.size == 1:
        sizes = np.full(n // int(sizes[0]), sizes[0])
    if int(sizes.sum()) != n:
        raise InstanceError(f"`group_sizes` must sum to {n}, or be one number that divides it")
    if counts.size not in (1, sizes.size):
        raise InstanceError(f"`group_budgets` must have 1 or {sizes.size} entries, got {counts.size}")
    groups = np.repeat(np.arange(sizes.size), sizes)
    return Budget(total, groups, np.broadcast_to(counts, sizes.shape), *crossed)


def _group_arrays(budget: Budget) -> dict[str, NDArray[Any]]:
    """The members that state groups and cross groups: of many weights in consecutive runs only their sizes."""
    if budget.groups is None or budget.group_budgets is None:
        return {}
    crossed: dict[str, NDArray[Any]] = {}
    if budget.cross_groups is not None and budget.cross_group_budgets is not None:
        many = budget.cross_groups.size >= _MANY_WEIGHTS and budget.cross_group_budgets.size <= 1 << 31
        crossed["cross_groups"] = budget.cross_groups.astype(np.int32 if many else np.int64)
        crossed["cross_group_budgets"] = budget.cross_group_budgets
    sizes, counts = budget.group_sizes(budget.groups.size), budget.group_budgets
    if budget.groups.size < _MANY_WEIGHTS or not budget.in_order or sizes.min() < 1:
        return {"groups": budget.groups, "group_budgets": counts} | crossed
    sizes, counts = (array[:1] if (array == array[0]).all() else array for array in (sizes, counts))
    return {"group_sizes": sizes, "group_budgets": counts} | crossed


def _block_sizes(npz: NpzReader, n: int) -> NDArray[np.int64]:
    sizes = npz.read("block_sizes")
    if sizes.dtype.kind == "u":
        sizes = sizes.astype(np.int64)
    if sizes.size == 0 or sizes.min() < 1 or sizes.max() > n:
        raise InstanceError(f"`block_sizes` must hold numbers between 1 and {n}")
    if int(sizes.sum()) != n:
        raise InstanceError(f"`block_sizes` must sum to {n}, the number of weights, got {int(sizes.sum())}")
    return sizes.astype(np.int64)


def _stored(
    npz: NpzReader, kind: type[Curvature], block_sizes: NDArray[np.int64]
) -> tuple[NDArray[Any] | None, NDArray[np.int64]]:
    """`shared`, if it is there, and the sizes of the stored blocks; checks the shapes of the arrays."""
    shared = npz.read("shared") if "shared" in npz.headers else None
    sizes = block_sizes if shared is None else stored_sizes(block_sizes, shared)
    known = {"n": int(sizes.sum()), "n2": sum(int(size) ** 2 for size in sizes)}
    for key, member in kind.members.items():
        lengths = tuple(known.get(str(length), length) for length in member.shape)
        npz.expect(key, member.type, tuple(None if isinstance(length, str) else length for length in lengths))
    return shared, sizes


def _outline(npz: NpzReader, kind: type[Curvature], block_sizes: NDArray[np.int64]) -> CurvatureOutline:
    """The form of the curvature, from the headers of its arrays; single numbers are read."""
    shared, sizes = _stored(npz, kind, block_sizes)
    details = []
    for key, member in kind.members.items():
        shape = npz.headers[key].shape
        if member.shape == ():
            details.append((key, f"{npz.read(key)[()]:g}"))
        elif member.shape and len(shape) == len(member.shape) > 1:
            details.append((key, " × ".join(f"{length:,}" for length in shape)))
    return CurvatureOutline(kind.kind, block_sizes, None if shared is None else sizes.size, details)


def _curvature(npz: NpzReader, kind: type[Curvature], block_sizes: NDArray[np.int64]) -> Curvature:
    """Read the curvature, after a check of the shapes of its arrays."""
    shared, sizes = _stored(npz, kind, block_sizes)
    stored = kind.from_arrays({key: npz.read(key) for key in kind.members}, sizes)
    if shared is None:
        return stored
    return SharedBlocks(stored, shared, npz.read("block_scale") if "block_scale" in npz.headers else None)


def write_instance(path: Path | str, instance: Instance) -> None:
    """Write an instance file. The same instance gives the same bytes.

    Raises
    ------
    OutputError
        When the file cannot be written; nothing is left behind then.
    InstanceError
        When `metadata` cannot be represented as JSON.
    UsageError
        For something else than an instance.
    """
    if not isinstance(instance, Instance):
        raise UsageError(
            f"`instance` must be an Instance, got {type(instance).__name__}: write_instance(path, instance)"
        )
    write_npz(path, instance_arrays(instance))


def instance_arrays(instance: Instance) -> dict[str, NDArray[Any]]:
    """The members of an instance file, in their order; raises `InstanceError` as `write_instance` does."""
    curvature = instance.curvature
    groups = _group_arrays(instance.budget)
    version = max(curvature.format_version, *(_NEWER.get(key, 1) for key in groups), 1)
    arrays: dict[str, NDArray[Any]] = {
        "format": np.array(FORMAT),
        "version": np.array(version, dtype=np.int64),
        "weights": _short_weights(instance.weights),
        "block_sizes": curvature.block_sizes,
        "budget": np.array(instance.budget.total, dtype=np.int64),
    }
    arrays |= curvature.arrays()
    arrays |= groups
    if instance.linear is not None:
        arrays["linear"] = instance.linear
    if instance.fixed is not None:
        arrays["fixed"] = instance.fixed
    try:
        arrays["metadata"] = json_text(instance.metadata)
    except (TypeError, ValueError) as error:
        raise InstanceError(f"`metadata` cannot be written as JSON: {error}") from None
    return arrays


def _short_weights(weights: FloatArray) -> NDArray[Any]:
    """Many weights that are numbers of single precision as float32: a file as small as the network."""
    if weights.size < _MANY_WEIGHTS or np.abs(weights).max() > np.finfo(np.float32).max:
        return weights
    single = weights.astype(np.float32)
    return single if np.array_equal(single, weights) else weights


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
