"""The options of an export: the form of H, its blocks, its damping, and the budget."""

from __future__ import annotations

import difflib
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cbs_opt.budget import Budget, number_of
from cbs_opt.errors import OutputError, UsageError
from cbs_opt.instances.budgets import budget_of_layers, share_of
from cbs_opt.instances.curvature import Shape, block_sizes, cut, working_bytes
from cbs_opt.memory import available_bytes
from cbs_opt.scalars import is_finite, is_integer
from cbs_opt.typing import IntArray

logger = logging.getLogger("cbs_opt")

Source = Literal["fisher", "reconstruction", "kfac"]
Fisher = Literal["empirical", "sampled", "exact"]
Form = Literal["gradients", "hessian", "inverse-hessian"]
Along = Literal["inputs", "outputs", "both"]

LEAST_MEMORY = 1_000_000
"""Bytes: less is rather a number of gigabytes."""
DAMPING = 1e-5
KFAC_DAMPING = 0.01  # of the mean diagonal
SPARSITY = 0.9

_SUGGESTED_SIZES = (5000, 2000, 1000, 500, 200, 100, 50, 20)


def checked_temperature(value: object) -> float:
    """The temperature as a float; raises `UsageError` where it is none."""
    if not is_finite(value) or not 1e-3 <= float(value) <= 1e3:  # type: ignore[arg-type]
        raise UsageError(f"`temperature` must be a number from 0.001 to 1000, got {value!r}")
    return float(value)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Recipe:
    """The options of an export, checked, with defaults for those that are not given.

    Parameters
    ----------
    source : {"fisher", "reconstruction", "kfac"}
        H = λI + GᵀG/m of the loss's gradients; or, for each row of a layer, H = λI + XXᵀ/m of the layer's inputs
        (see `cbs_opt.instances.reconstruction` for the scale), or H = E[g²] (λI + XXᵀ/m) with the gradient g of
        the loss by the row's output (see `cbs_opt.instances.kfac`).
    curvature : {"gradients", "hessian", "inverse-hessian"}, optional
        What is stored. By default the gradients where H is one block, the Hessian for kfac, and inverse blocks
        otherwise.
    blocks : {"full", "layer", "row"} or int, optional
        See `curvature.block_sizes`. By default one full block for gradients, one per layer for dense blocks,
        one per row for the reconstruction error and kfac.
    batch : int
        Samples of the mean gradient ḡ from which a row of G is made, √batch·(ḡ − g) + g with the mean g of all: H,
        `linear` and damping then have the scale of single samples, whatever the batch is.
    damping : float, optional
        λ; 1e-5 when `relative_damping` is not given either, but for kfac.
    relative_damping : float, optional
        λ as a multiple of the mean diagonal entry: of H and all weights for the Fisher matrix, of each layer's
        XXᵀ/m for the others; 0.01 for kfac when `damping` is not given either.
    dtype : {"float32", "float64"}, optional
        Of the stored entries; float32 for gradients, float64 for blocks, by default.
    sparsity : float, optional
        Fraction of the weights to prune, 0.9 by default.
    per_layer : bool
        The same fraction of every tensor, as groups.
    nm : (int, int), optional
        (N, M): of M weights in a row N stay and the others are pruned, as groups; see `nm_budget`.
    first_order : bool
        Also store the mean gradient, `linear`, of the same samples.
    memory : int, optional
        Bytes that the export may use; half of what is free by default.
    keep_mask : bool
        Weights that are already zero stay zero, and count as pruned. This always holds for masks.
    nm_along : {"inputs", "outputs", "both"}
        The M weights of an N:M pattern are consecutive inputs of one output, or outputs of one input, or the
        pattern is transposable: N:M along both, in tiles of M inputs and M outputs.

    layers : mapping of str to float, optional
        Sparsities of layers by name or pattern, see `budgets.budget_of_layers`; `sparsity` is that of all others.
    keep_at_least : float, optional
        Weights that every layer keeps, or below 1 a share of each, see `budgets.keeping`.
    fisher : {"empirical", "sampled", "exact"}, optional
        Labels that the gradients of kfac are taken for, see `fisher_terms`; empirical by default.
    seed : int
        Of the labels that `fisher` sampled draws.
    temperature : float
        Of the class probabilities that `fisher` sampled and exact draw labels from or weight them by, see
        `fisher_terms`; from 0.001 to 1000.
    keep : int, optional
        Weights that stay, over all tensors together, instead of `sparsity`.

    Raises
    ------
    UsageError
        For options that make no sense, alone or together.
    """

    source: Source = "fisher"
    curvature: Form | None = None
    blocks: str | int | None = None
    batch: int = 1
    damping: float | None = None
    relative_damping: float | None = None
    dtype: str | None = None
    sparsity: float | None = None
    per_layer: bool = False
    nm: tuple[int, int] | None = None
    first_order: bool = False
    memory: int | None = None
    keep_mask: bool = False
    nm_along: Along = "inputs"
    layers: Mapping[str, float] | None = None
    keep_at_least: float | None = None
    fisher: Fisher | None = None
    seed: int = 0
    keep: int | None = None
    temperature: float = 1.0
    form: Form = field(init=False)
    block_rule: str | int = field(init=False)
    entry: np.dtype[Any] = field(init=False)

    def __post_init__(self) -> None:
        one_of("source", self.source, ("fisher", "reconstruction", "kfac"))
        if self.fisher is not None:
            one_of("fisher", self.fisher, ("empirical", "sampled", "exact"))
            if self.source != "kfac":
                raise UsageError(f"`fisher` chooses the labels of `source` kfac, got {self.source}")
        object.__setattr__(self, "temperature", checked_temperature(self.temperature))
        if self.temperature != 1 and (self.source != "kfac" or self.fisher in (None, "empirical")):
            raise UsageError(
                "`temperature` is of the class probabilities of `source` kfac with `fisher` sampled or exact, got "
                f"{self.source}" + ("" if self.source != "kfac" else f" and {self.fisher or 'empirical'}")
            )
        if self.curvature is not None:
            one_of("curvature", self.curvature, ("gradients", "hessian", "inverse-hessian"))
        if not is_integer(self.batch) or self.batch < 1:
            raise UsageError(f"`batch` must be a whole number of at least 1, got {self.batch!r}")
        object.__setattr__(self, "batch", int(self.batch))
        if self.damping is not None and self.relative_damping is not None:
            raise UsageError("`damping` and `relative_damping` exclude each other")
        for name, value in (("damping", self.damping), ("relative_damping", self.relative_damping)):
            if value is not None and not (is_finite(value) and value >= 0):
                raise UsageError(f"`{name}` must be a finite number ≥ 0, got {value}")
        if self.sparsity is not None and not (is_finite(self.sparsity) and 0 <= self.sparsity <= 1):
            raise UsageError(f"`sparsity` must be between 0 and 1, got {self.sparsity}")
        if self.keep is not None:
            if not is_integer(self.keep) or self.keep < 0:
                raise UsageError(f"`keep` must be a whole number ≥ 0, got {self.keep!r}")
            others = {"sparsity": self.sparsity is not None, "nm": self.nm is not None}
            others |= {"per_layer": self.per_layer, "sparsity_per_layer": bool(self.layers)}
            for name, given in others.items():
                if given:
                    raise UsageError(f"`keep` and `{name}` exclude each other: `keep` counts over all tensors")
        if self.layers is not None:
            if not isinstance(self.layers, Mapping):
                raise UsageError(
                    f"`layers` must be a mapping from names or patterns to sparsities, got {self.layers!r}"
                )
            rules = {
                name: share_of(value, f"`layers`: the sparsity of '{name}'") for name, value in self.layers.items()
            }
            object.__setattr__(self, "layers", rules)
        if self.nm is not None:
            if not (isinstance(self.nm, list | tuple) and len(self.nm) == 2 and all(map(is_integer, self.nm))):
                raise UsageError(f"`nm` must be two whole numbers, such as (2, 4), got {self.nm!r}")
            N, M = self.nm
            if not 0 <= N <= M or M < 1:
                raise UsageError(f"N:M must have 0 ≤ N ≤ M and M ≥ 1, got {N}:{M}")
            if self.sparsity is not None or self.per_layer or self.layers:
                raise UsageError(
                    "N:M sets how many weights are pruned: it goes without `sparsity` and `per_layer`"
                )
        one_of("nm_along", self.nm_along, ("inputs", "outputs", "both"))
        if self.nm_along != "inputs" and self.nm is None:
            raise UsageError("`nm_along` is for N:M patterns: give `nm` too")
        if self.dtype is not None:
            one_of("dtype", self.dtype, ("float32", "float64"))
        form, rule = self.curvature, self.blocks
        if self.by_rows:
            what = "kfac" if self.source == "kfac" else "the reconstruction error"
            form = form or ("hessian" if self.source == "kfac" else "inverse-hessian")
            rule = "row" if rule is None else rule
            if form == "gradients":
                raise UsageError(f"{what} has no gradients: `curvature` hessian or inverse-hessian")
            if rule in ("layer", "full"):
                raise UsageError(f"{what} has a block for each output row: `blocks` row or a size, got {rule}")
            if self.first_order and self.source == "reconstruction":
                raise UsageError(f"{what} has no first-order term: the trained weights are its minimum")
            if self.batch > 1:
                raise UsageError(f"`batch` is for gradients, which {what} has not")
            if self.source == "kfac" and self.damping is None and self.relative_damping is None:
                object.__setattr__(self, "relative_damping", KFAC_DAMPING)
        else:
            form = form or ("gradients" if rule in (None, "full") else "inverse-hessian")
            rule = rule if rule is not None else "full" if form == "gradients" else "layer"
        block_sizes([(1,)], rule)
        object.__setattr__(self, "form", form)
        object.__setattr__(self, "block_rule", int(rule) if is_integer(rule) else rule)
        default = "float32" if form == "gradients" else "float64"
        object.__setattr__(self, "entry", np.dtype(self.dtype or default))

    @property
    def by_rows(self) -> bool:
        """Whether every row of a layer has a block of its own, which it shares with other rows."""
        return self.source != "fisher"

    @property
    def needs_labels(self) -> bool:
        """Whether the labels of the data enter H."""
        empirical = self.source == "kfac" and self.fisher in (None, "empirical")
        return self.source == "fisher" or self.first_order or empirical

    def sizes(self, shapes: Sequence[Shape]) -> list[int]:
        """The block sizes for tensors of these shapes."""
        if self.by_rows and isinstance(self.block_rule, int):
            return cut(block_sizes(shapes, "row"), self.block_rule)
        return block_sizes(shapes, self.block_rule)

    def budget(self, shapes: Sequence[Shape], names: Sequence[str] = (), *, log: bool = True) -> Budget:
        """How many weights to prune: over all of them, of each tensor, of those that `layers` names, or N:M.

        With `log`, tensors that no N:M pattern fits exactly are named in the log.
        """
        if self.layers:
            default = SPARSITY if self.sparsity is None else self.sparsity
            rules = {**(dict.fromkeys(names, default) if self.per_layer else {}), **self.layers}
            return budget_of_layers(names, [int(np.prod(shape)) for shape in shapes], rules, default)
        if self.nm is not None:
            if log:
                self._tell_shorter_groups(shapes, names)
            if self.nm_along == "both":
                return transposable_budget(shapes, *self.nm)
            return nm_budget(shapes, *self.nm, along=self.nm_along)
        sparsity = SPARSITY if self.sparsity is None else self.sparsity
        numbers = [int(np.prod(shape)) for shape in shapes]
        if self.keep is not None:
            if self.keep > sum(numbers):
                raise UsageError(f"`keep` must be at most {sum(numbers)}, the number of weights, got {self.keep}")
            return Budget(sum(numbers) - self.keep)
        if not self.per_layer:
            return Budget(number_of(sparsity, sum(numbers)))
        per_layer = np.array([number_of(sparsity, number) for number in numbers], dtype=np.int64)
        return Budget(int(per_layer.sum()), np.repeat(np.arange(len(numbers)), numbers), per_layer)

    def _tell_shorter_groups(self, shapes: Sequence[Shape], names: Sequence[str]) -> None:
        """Warn of tensors whose rows are no multiple of M long: hardware for the pattern does not take them."""
        assert self.nm is not None
        keep, of = self.nm
        for axis, what in enumerate(("outputs", "inputs")):
            if self.nm_along not in (what, "both"):
                continue
            lengths = [(shape if len(shape) > 1 else (1, *shape))[axis] for shape in shapes]
            uneven = [f"'{name}' ({length})" for name, length in zip(names, lengths, strict=False) if length % of]
            if uneven:
                more = f" and {len(uneven) - 4} more" if len(uneven) > 4 else ""
                end = "the last group of each row is shorter, and loses fewer weights"
                if self.nm_along == "both":
                    end = "the last tiles are smaller, and lose fewer weights"
                logger.warning(
                    f"{keep}:{of}: the numbers of {what} of {', '.join(uneven[:4])}{more} are no multiples "
                    f"of {of}: {end}"
                )

    def memory_bytes(self) -> int:
        """What the export may use."""
        return available_memory() // 2 if self.memory is None else self.memory

    def stored_sizes(self, shapes: Sequence[Shape], inputs: Sequence[int] | None = None) -> list[int]:
        """Sizes of the blocks that are stored.

        Parameters
        ----------
        shapes : sequence of tuple
        inputs : sequence of int, optional
            Of sources whose rows share their Hessians: the number of inputs of each Hessian; by default one for
            each tensor, which is the least.
        """
        if not self.by_rows:
            return self.sizes(shapes)
        if inputs is None:
            inputs = [int(np.prod(shape[1:])) for shape in shapes]
        return cut(inputs, self.block_rule) if isinstance(self.block_rule, int) else list(inputs)

    def content_bytes(self, shapes: Sequence[Shape], samples: int, inputs: Sequence[int] | None = None) -> int:
        """Size of the curvature as it is stored; `inputs` as for `stored_sizes`."""
        if self.form == "gradients":
            return self.entry.itemsize * (samples // self.batch) * sum(int(np.prod(shape)) for shape in shapes)
        return self.entry.itemsize * sum(b * b for b in self.stored_sizes(shapes, inputs))

    def check_fits(
        self, shapes: Sequence[Shape], samples: int, folder: Path | None, inputs: Sequence[int] | None = None
    ) -> None:
        """Refuse what fits neither into memory nor, when it goes to a file in `folder`, onto the disk.

        Parameters
        ----------
        shapes : sequence of tuple
        samples : int
        folder : Path or None
        inputs : sequence of int, optional
            As for `stored_sizes`.

        Raises
        ------
        UsageError
            With the size needed, what is free, and options that would do.
        """
        needed = self.content_bytes(shapes, samples, inputs)
        memory = available_memory() if self.memory is None else self.memory
        room = self.memory_bytes() if folder is None else shutil.disk_usage(folder).free
        where = "memory" if folder is None else "the disk"
        if needed > room:
            what = "gradients" if self.form == "gradients" else "blocks"
            raise UsageError(
                f"the {what} take {_gb(needed)}, of which {where} has {_gb(room)}: "
                f"{self._what_would_do(shapes, samples, room, memory, inputs)}"
            )
        if self.form == "gradients":
            return
        largest = max(self.stored_sizes(shapes, inputs))
        working = self._working_bytes(largest, samples)
        if working > memory:
            raise UsageError(
                f"a block of {largest} weights needs {_gb(working)} of memory, {_gb(memory)} are free: "
                f"{self._what_would_do(shapes, samples, room, memory, inputs)}"
            )
        held = 0 if not self.by_rows else 8 * sum(int(np.prod(shape[1:])) ** 2 for shape in shapes)
        if held + working > memory:
            raise UsageError(
                f"the covariances of the inputs of all layers take {_gb(held)} of memory, {_gb(memory)} are free: "
                "prune fewer tensors at a time, or give more by `--memory`"
            )

    def fitting(self, shapes: Sequence[Shape], samples: int, folder: Path | None) -> Recipe:
        """The recipe itself, or gradients where it asks for blocks of layers in no form and they are too large.

        GradientFactor with a block for each layer is the same H: it is not formed. Parameters and errors as for
        `check_fits`.
        """
        if self.source != "fisher" or self.curvature is not None or self.block_rule != "layer":
            self.check_fits(shapes, samples, folder)
            return self
        try:
            self.check_fits(shapes, samples, folder)
            if self.content_bytes(shapes, samples) <= self.memory_bytes():
                return self
        except UsageError as error:
            logger.debug(f"blocks of layers: {error}")
        other = replace(self, curvature="gradients", blocks="layer")
        other.check_fits(shapes, samples, folder)
        logger.info(
            f"dense blocks of the layers would take {_gb(self.content_bytes(shapes, samples))}: gradients are "
            f"stored, {_gb(other.content_bytes(shapes, samples))} (`--curvature inverse-hessian` forces blocks)"
        )
        return other

    def _working_bytes(self, block: int, samples: int) -> int:
        rows = samples // self.batch if self.source == "fisher" else block
        return working_bytes(block, rows, inverse=self.form == "inverse-hessian")

    def _what_would_do(
        self, shapes: Sequence[Shape], samples: int, room: int, memory: int, inputs: Sequence[int] | None
    ) -> str:
        n = sum(int(np.prod(shape)) for shape in shapes)
        out = []
        if self.form != "gradients":
            stored = self.stored_sizes(shapes, inputs)
            longest = max(stored)
            for size in _SUGGESTED_SIZES:
                total = self.entry.itemsize * sum(b * b for b in cut(stored, size))
                if size < longest and total <= room // 2 and self._working_bytes(size, samples) <= memory:
                    out.append(f"--blocks {size} ({_gb(total)})")
                    break
        if self.source == "fisher":
            rows = max(1, samples // self.batch)
            if self.form != "gradients" and 4 * rows * n <= room:
                out.append(f"--curvature gradients ({_gb(4 * rows * n)})")
            elif 4 * n <= room:
                out.append(f"at most {room // (4 * n)} samples or batches")
        return f"{' or '.join(out)} would do" if out else "prune fewer tensors"


def nm_budget(shapes: Sequence[Shape], keep: int, of: int, *, along: Along = "inputs") -> Budget:
    """Groups of `of` consecutive weights of a row, of which `keep` stay.

    Inputs are counted along the second axis of a tensor in the order of the instance, as hardware for 2:4 sparsity
    does: the features of a linear layer, the channels of a convolution at the same place of its kernel. What is
    left at the end of a row, r < `of` weights, is a group of its own that loses ⌊r (of − keep)/of⌋. With `along`
    outputs the groups run down the columns: consecutive outputs of the same input, for products with the
    transposed matrix.
    """
    groups, budgets, offset = [], [], 0
    for shape in shapes:
        index = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape if len(shape) > 1 else (1, -1))
        line_axis = 1 if along == "inputs" else 0
        length = index.shape[line_axis]
        lines = np.moveaxis(index, line_axis, -1).reshape(-1, length)
        per_line = -(-length // of)
        of_line = np.arange(length) // of
        layer = np.empty(index.size, dtype=np.int64)
        layer[lines] = offset + np.arange(len(lines))[:, None] * per_line + of_line[None, :]
        groups.append(layer)
        budgets.append(np.tile(np.bincount(of_line) * (of - keep) // of, len(lines)))
        offset += per_line * len(lines)
    per_group: IntArray = np.concatenate(budgets).astype(np.int64)
    return Budget(int(per_group.sum()), np.concatenate(groups), per_group)


def transposable_budget(shapes: Sequence[Shape], keep: int, of: int) -> Budget:
    """Tiles of `of` outputs and `of` inputs in which every row and every column keeps `keep` weights.

    A matrix with this pattern has it transposed, too, so that sparse hardware takes the products of both passes of
    training [1]_. Inputs are counted as by `nm_budget`: the weights of a convolution at the same place of its
    kernel form tiles. The groups are those along the inputs, the cross groups those along the outputs. A tile at
    the end of a matrix, with a ≤ `of` outputs and b ≤ `of` inputs, loses as many weights as the rules of both
    sides allow, min(a ⌊b (of − keep)/of⌋, b ⌊a (of − keep)/of⌋), in equal parts of its rows and of its columns as
    far as they divide, the first ones one more.

    References
    ----------
    .. [1] Hubara, Chmiel, Island, Banner, Naor, Soudry: Accelerated sparse neural training: a provable and
       efficient method to find N:M transposable masks, NeurIPS 2021.
    """
    rows, columns = (nm_budget(shapes, keep, of, along=side).groups for side in ("inputs", "outputs"))
    of_rows, of_columns = [], []
    for shape in shapes:
        outputs, inputs, *places = shape if len(shape) > 1 else (1, *shape)
        heights, widths = (np.bincount(np.arange(length) // of) for length in (outputs, inputs))
        a, b = heights[:, None], widths[None, :]
        lost = np.minimum(a * (b * (of - keep) // of), b * (a * (of - keep) // of))
        row, column = np.arange(outputs), np.arange(inputs)
        whole, rest = lost // a, lost % a
        per_row = whole[row // of] + (rest[row // of] > (row % of)[:, None])
        whole, rest = (lost // b).T, (lost % b).T
        per_column = whole[column // of] + (rest[column // of] > (column % of)[:, None])
        number = int(np.prod(places))
        of_rows.append(np.repeat(per_row[:, None], number, axis=1).ravel())
        of_columns.append(np.repeat(per_column[:, None], number, axis=1).ravel())
    row_budgets: IntArray = np.concatenate(of_rows).astype(np.int64)
    column_budgets: IntArray = np.concatenate(of_columns).astype(np.int64)
    return Budget(int(row_budgets.sum()), rows, row_budgets, columns, column_budgets)


def check_memory(memory: Any) -> None:
    """Refuse a number of bytes that nothing fits into: gigabytes perhaps, as on the command line.

    Raises
    ------
    UsageError
    """
    if memory is not None and (not is_finite(memory) or memory < LEAST_MEMORY):
        raise UsageError(
            f"`memory` must be a number of bytes, at least {LEAST_MEMORY}, got {memory!r:.60}: 8 GB are "
            "8_000_000_000"
        )


def available_memory() -> int:
    """Bytes of memory that are free for a new program, or 4 GB where the system does not tell."""
    if (known := available_bytes()) < float("inf"):
        return int(known)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 4_000_000_000


def scratch(shape: tuple[int, int], dtype: np.dtype[Any], memory: int, folder: Path | None) -> NDArray[Any]:
    """An empty array, in memory up to `memory` bytes, otherwise in a file without a name that ends with it.

    Raises
    ------
    UsageError
        When the disk has no room for it either.
    OutputError
        When the file cannot take its space, as on a full disk.
    """
    import tempfile

    needed = dtype.itemsize * shape[0] * shape[1]
    if needed <= memory:
        return np.empty(shape, dtype)
    folder = Path(tempfile.gettempdir()) if folder is None else folder
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UsageError(
            f"the gradients take {_gb(needed)}, more than the memory of {_gb(memory)} allowed and than the "
            f"{_gb(free)} free on the disk: fewer samples or tensors would do"
        )
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # a disk that fills up under a map would end the process
            try:
                os.posix_fallocate(file.fileno(), 0, needed)
            except OSError as error:
                raise OutputError(f"{folder}: no room for {_gb(needed)} of gradients: {error.strerror}") from error
        return np.memmap(file, dtype, "w+", shape=shape)


def one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raise `UsageError` unless an option has one of the values that it may have."""
    if value not in known:
        raise UsageError(f"`{name}` must be one of {', '.join(known)}, got {value!r}")


def check_options(
    function: str, given: Iterable[str], known: Sequence[str], other: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Raise `UsageError` for an option that a function has not, with the nearest name."""
    other = {"sparsity_per_layer": "layers", **other}
    for name in given:
        if name not in known:
            near = [other[name]] if name in other else difflib.get_close_matches(name, known, 1)
            hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(known)}"
            raise UsageError(f"`{function}` has no option `{name}`: {hint}")


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
