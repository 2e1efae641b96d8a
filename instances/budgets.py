"""Budgets of layers: a sparsity for each, by name or pattern, and a number of weights that every layer keeps."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cbs_opt.budget import Budget
from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.files.toml_text import read_toml
from cbs_opt.instances.prunable import matches
from cbs_opt.scalars import is_finite
from cbs_opt.typing import FloatArray

logger = logging.getLogger("cbs_opt")


def share_of(value: object, what: str) -> float:
    """A fraction from 0.5, "0.5" or "50%"; raises `UsageError` for anything else."""
    text = str(value).strip()
    try:
        number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not 0 <= number <= 1:
        found = f"'{text[:40]}'" if isinstance(value, str | int | float) else type(value).__name__
        raise UsageError(f"{what} must be a fraction between 0 and 1, such as 0.5 or 50%, got {found}")
    return number


def read_rules(texts: Sequence[str]) -> dict[str, float]:
    """Sparsities by pattern, from `PATTERN=F` and `.toml` files of such pairs; later ones take precedence.

    Raises
    ------
    UsageError
        For what is neither, or no fraction.
    InstanceError
        When a file cannot be read.
    """
    rules: dict[str, float] = {}
    for text in texts:
        pattern, equals, value = text.rpartition("=")
        pairs: Mapping[str, object] = {pattern: value}
        where = f"'{text}'"
        if not equals:
            if not text.endswith(".toml"):
                raise UsageError(
                    f"`--sparsity-per-layer` takes PATTERN=FRACTION ('fc.*=0.9') or a .toml file, got '{text}'"
                )
            pairs, where = _flat(read_toml(Path(text), InstanceError)[0]), text
        for name, number in pairs.items():
            rules.pop(name, None)  # the last rule takes precedence
            rules[name] = share_of(number, f"{where}: the sparsity of '{name}'")
    return rules


def _flat(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """TOML reads unquoted names with dots as tables."""
    out: dict[str, object] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def budget_of_layers(
    names: Sequence[str], sizes: Sequence[int], rules: Mapping[str, float], sparsity: float
) -> Budget:
    """A group for each layer with a rule, and one for all others together.

    Parameters
    ----------
    names, sizes : sequences
        Of the tensors, in the order of the weights.
    rules : mapping of str to float
        Sparsities by pattern, see `prunable.matches`; the last pattern that fits counts.
    sparsity : float
        Of all other tensors together.

    Raises
    ------
    UsageError
        For a pattern that names none of the tensors.
    """
    for pattern in rules:
        if not any(matches(pattern, name) for name in names):
            listed = ", ".join(names[:12]) + (" …" if len(names) > 12 else "")
            raise UsageError(
                f"`--sparsity-per-layer`: '{pattern}' is no tensor that is pruned; these are {listed}"
            )
    group: list[int] = []
    budgets: list[int] = []
    others: list[int] = []
    for index, (name, size) in enumerate(zip(names, sizes, strict=True)):
        found = [share for pattern, share in rules.items() if matches(pattern, name)]
        if found:
            group.append(len(budgets))
            budgets.append(_count(found[-1], size))
        else:
            group.append(-1)
            others.append(index)
    if others:
        group = [len(budgets) if g < 0 else g for g in group]
        budgets.append(_count(sparsity, sum(sizes[index] for index in others)))
    return Budget(sum(budgets), np.repeat(np.array(group, np.int64), sizes), np.array(budgets, np.int64))


def keeping(
    budget: Budget,
    weights: FloatArray,
    sizes: Sequence[int],
    least: float,
    fixed: NDArray[np.int8] | None,
    *,
    log: bool = True,
) -> tuple[Budget, NDArray[np.int8]]:
    """Keep at least a number of weights of every tensor: its largest ones are fixed.

    Parameters
    ----------
    budget : Budget
    weights : float64 (n,)
    sizes : sequence of int
        Of the tensors.
    least : float
        A whole number of weights, or below 1 a share of each tensor.
    fixed : int8 (n,), optional
        Weights that are already fixed.
    log : bool
        Whether the log says that the budget is lowered.

    Returns
    -------
    budget : Budget
        Lowered where it would prune more than may be pruned.
    fixed : int8 (n,)
        −1 for the weights that are kept.

    Raises
    ------
    UsageError
        For a number that is neither, and where an N:M pattern leaves fewer weights.
    """
    if not is_finite(least) or least < 0 or (least > 1 and least != int(least)):
        raise UsageError(f"`keep_at_least` must be a whole number of weights, or a share below 1, got {least}")
    out = np.zeros(weights.size, np.int8) if fixed is None else np.array(fixed, np.int8)
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        start += size
        wanted = math.ceil(least * size - 1e-9 * size) if least < 1 else min(int(least), size)
        if budget.groups is not None:
            own = np.unique(budget.groups[part])
            left = size - int(budget.per_group[own].sum())
            if left >= wanted:
                continue  # whatever is pruned
            if own.size > 1:
                raise UsageError(
                    f"`keep_at_least` {least:g} asks for {wanted} weights of a layer of {size}, and the N:M "
                    f"pattern leaves {left}: leave out one of them"
                )
        free = np.flatnonzero(out[part] == 0)
        wanted -= int(np.count_nonzero(out[part] == -1))
        largest = free[np.argsort(-np.abs(weights[part][free]), kind="stable")[: max(wanted, 0)]]
        out[part][largest] = -1
    group = budget.group_of(weights.size)
    may = budget.group_sizes(weights.size) - np.bincount(group[out == -1], minlength=budget.number_of_groups)
    old = budget.per_group
    new = np.minimum(old, may)
    if (new == old).all():
        return budget, out
    logger.log(
        logging.WARNING if log else logging.DEBUG,
        f"every layer keeps {least:g}{' of its weights' if least < 1 else ' weights'}: {int(new.sum())} are "
        "pruned in "
        f"place of {int(old.sum())}",
    )
    if budget.groups is None:
        return Budget(int(new[0])), out
    return Budget(int(new.sum()), budget.groups, new), out


def check_room(budget: Budget, fixed: NDArray[np.int8], what: str) -> None:
    """Refuse fixed weights that leave a transposable pattern no way; other budgets are changed to fit.

    Raises
    ------
    UsageError
    """
    try:
        budget.check_fits(fixed.size, fixed)
    except InstanceError as error:
        raise UsageError(f"{what} leaves no transposable N:M pattern: {error}") from None


def _count(share: float, size: int) -> int:
    # The product of a decimal fraction and a number may exceed a whole number by a rounding error.
    return min(size, math.ceil(share * size - 1e-9 * size))
