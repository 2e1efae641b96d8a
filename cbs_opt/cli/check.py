"""`cbs-solve --check`: is a solution what it says it is, and does a certificate prove what it claims?"""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cbs_opt.cli.common import EXIT_FILE, EXIT_OK, say
from cbs_opt.cli.progress import number, percent
from cbs_opt.cli.report import SCHEMA, write_json
from cbs_opt.errors import SolutionError, UsageError
from cbs_opt.files import read_solution
from cbs_opt.files.certificate_file import is_certificate, read_certificate
from cbs_opt.instance import Instance
from cbs_opt.losses import evaluate, predicted_loss

logger = logging.getLogger("cbs_opt")

_TOLERANCE = 1e-6  # relative, between what the file claims and what is found


def check_solution(instance: Instance, path: Path, json_target: str | None) -> int:
    """Check feasibility and recompute every loss; exit code 0 if all agrees, 3 otherwise.

    A certificate is told by its format, see `check_certificate`.
    """
    if is_certificate(path):
        return check_certificate(instance, path, json_target)
    solution = read_solution(path, instance)
    pruned = solution.pruned
    stored = solution.result.get("instance", {})
    count = int(pruned.sum())
    problems = []
    asked = instance
    if instance.budget.groups is None and isinstance(stored, dict) and stored.get("budget") == count:
        # Solved for another budget than the file's; where `fixed` does not allow it, the selection is wrong.
        with suppress(UsageError):
            asked = instance.with_budget(count)
    if not asked.admits(pruned):
        problems.append(
            f"the selection, {count} weights, does not meet the budget of {instance.budget.total}, the groups "
            "or `fixed` of the instance"
        )
    losses = evaluate(instance, pruned)
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "feasible": not problems,
        "pruned_count": count,
        "selection_loss": losses.selection_loss,
        "joint_loss": losses.joint_loss,
        "weights_loss": None,
    }
    if solution.weights is not None:
        if np.any(solution.weights[pruned] != 0):
            problems.append("`weights` is not zero on all pruned weights")
        found["weights_loss"] = predicted_loss(instance, solution.weights - instance.weights)
    kind = "joint_loss" if solution.result.get("objective_kind") == "joint" else "selection_loss"
    for key, value in (
        ("selection_loss", found["selection_loss"]),
        ("joint_loss", found["joint_loss"]),
        ("objective", found[kind]),
        ("pruned_count", count),
    ):
        claimed = solution.result.get(key)
        if claimed is None or value is None:
            continue
        if not _is_number(claimed) or abs(claimed - value) > _TOLERANCE * max(abs(value), 1e-300):
            problems.append(f"`{key}` is {value:.9g}, the file claims {str(claimed)[:40]}")
    bound, value = solution.result.get("bound"), found[kind]
    if bound is not None and not _is_number(bound):
        problems.append(f"the claimed bound {str(bound)[:40]} is no number")
    elif bound is not None and value is not None and bound > value + _TOLERANCE * abs(value):
        problems.append(f"the claimed bound {bound:.9g} lies above the {kind} {value:.9g}")
    found |= {"valid": not problems, "problems": problems}
    if json_target is not None:
        write_json(json_target, found)
    if json_target != "-":
        lines = [
            f"{'feasible':<15} {'yes' if found['feasible'] else 'no'}",
            f"{'pruned':<15} {count} of {instance.n} weights",
            f"{'selection loss':<15} {number(found['selection_loss'])}",
            f"{'joint loss':<15} {number(found['joint_loss'])}",
        ]
        if solution.weights is not None:
            lines.append(f"{'weights loss':<15} {number(found['weights_loss'])}")
        say("\n".join(lines) + "\n")
    for problem in problems:
        sys.stderr.write(f"cbs-solve: {path}: {problem}\n")
    return EXIT_FILE if problems else EXIT_OK


def check_certificate(instance: Instance, path: Path, json_target: str | None) -> int:
    """Check what a certificate proves by computing every bound afresh; exit code 0 if it holds.

    Raises
    ------
    SolutionError
        With one sentence, where it does not.
    """
    from cbs_opt.certificate import verify

    certificate = read_certificate(path)
    total = certificate.branch.size

    def beat(done: int) -> None:
        if done % 20_000 == 0:
            logger.info(f"certificate: {done} of {total} nodes checked")

    try:
        found = verify(instance, certificate, beat)
    except SolutionError as error:
        raise SolutionError(f"{path}: {error}") from None
    if json_target is not None:
        write_json(json_target, {"schema": SCHEMA, "valid": True, "objective_kind": certificate.objective_kind}
                   | asdict(found))  # fmt: skip
    if json_target != "-":
        proven = "the selection is optimal" if found.optimal else "a lower bound"
        lines = [
            f"{'certificate':<15} valid: {proven}",
            f"{'pruned':<15} {int(certificate.pruned.sum())} of {instance.n} weights",
            f"{'objective':<15} {number(found.objective)}  ({certificate.objective_kind})",
            f"{'bound':<15} {number(found.bound)}",
            f"{'gap':<15} {percent(found.gap)}",
            f"{'proof':<15} {found.pieces} pieces, {found.trees} trees, {found.nodes} nodes, "
            f"{found.leaves} leaves",
        ]
        say("\n".join(lines) + "\n")
    return EXIT_OK


def _is_number(value: Any) -> bool:
    """Whether JSON gave a number that float64 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e308
