"""`cbs-solve --check`: verifies a solution or a certificate of optimality."""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict
from pathlib import Path

from cbs_opt.cli.common import EXIT_FILE, EXIT_OK, say
from cbs_opt.cli.report import SCHEMA, write_json
from cbs_opt.errors import SolutionError
from cbs_opt.files import read_solution
from cbs_opt.files.certificate_file import is_certificate, read_certificate
from cbs_opt.instance import Instance
from cbs_opt.verification import verify
from cbs_opt.view.text import facts, number, percent

logger = logging.getLogger("cbs_opt")


def check_solution(instance: Instance, path: Path, json_target: str | None) -> int:
    """Check feasibility and recompute every loss; exit code 0 if all agrees, 3 otherwise.

    A certificate is recognised by its format, see `check_certificate`.
    """
    if is_certificate(path):
        return check_certificate(instance, path, json_target)
    solution = read_solution(path, instance)
    found = verify(instance, solution)
    if json_target is not None:
        write_json(json_target, {
            "schema": SCHEMA,
            "feasible": found.feasible,
            "pruned_count": found.pruned_count,
            "selection_loss": found.selection_loss,
            "joint_loss": found.joint_loss,
            "weights_loss": found.weights_loss,
            "valid": found.valid,
            "problems": list(found.problems),
        })  # fmt: skip
    if json_target != "-":
        say(facts(found.facts(), width=14) + "\n")
    for problem in found.problems:
        sys.stderr.write(f"cbs-solve: {path}: {problem}\n")
    return EXIT_OK if found.valid else EXIT_FILE


def check_certificate(instance: Instance, path: Path, json_target: str | None) -> int:
    """Verify a certificate by recomputing every bound; exit code 0 if it holds.

    Raises
    ------
    SolutionError
        One sentence, if it does not hold.
    """
    from cbs_opt.certificate import verify as verify_certificate

    certificate = read_certificate(path)
    total = certificate.branch.size

    def progress(done: int) -> None:
        if done % 20_000 == 0:
            logger.info(f"certificate: {done} of {total} nodes checked")

    try:
        found = verify_certificate(instance, certificate, progress)
    except SolutionError as error:
        raise SolutionError(f"{path}: {error}") from None
    if json_target is not None:
        write_json(json_target, {"schema": SCHEMA, "valid": True, "objective_kind": certificate.objective_kind}
                   | asdict(found))  # fmt: skip
    if json_target != "-":
        proven = "the selection is optimal" if found.optimal else "a lower bound"
        rows = [
            ("certificate", f"valid: {proven}"),
            ("pruned", f"{int(certificate.pruned.sum())} of {instance.n} weights"),
            ("objective", f"{number(found.objective)}  ({certificate.objective_kind})"),
            ("bound", number(found.bound)),
            ("gap", percent(found.gap)),
            ("proof", f"{found.pieces} pieces, {found.trees} trees, {found.nodes} nodes, {found.leaves} leaves"),
        ]
        say(facts(rows, width=14) + "\n")
    return EXIT_OK
