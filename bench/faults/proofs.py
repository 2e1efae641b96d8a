"""Cases that forge certificates: what the checker accepts is true."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cbs_opt import read_certificate, verify_certificate
from cbs_opt.bench.faults.damage import Generator
from cbs_opt.bench.faults.material import Material
from cbs_opt.bench.faults.processes import isolated
from cbs_opt.bench.faults.verdict import FINE, Finding, Verdict, judge_error
from cbs_opt.errors import SolutionError
from cbs_opt.files.certificate_file import Certificate, write_certificate
from cbs_opt.testing.problems import make_problem

_SLACK = 1e-6
_EXACT_LIMIT = 13  # weights up to which the optimum is enumerated again for each forgery


def forged_proof(material: Material, rng: Generator, folder: Path) -> Finding:
    """A valid proof is changed in the direction in which a liar would change it, and checked."""
    return isolated(partial(_forge, material, rng, folder))


def _forge(material: Material, rng: Generator, folder: Path) -> Finding:
    objective = str(rng.choice(["selection", "joint"]))
    name = "certificate" if objective == "selection" else "joint-certificate"
    instance = material.instance("proven")
    certificate = read_certificate(material.files[name])
    if rng.random() < 0.3:  # the proof of a similar instance, with the name of this one
        other = make_problem(int(rng.integers(1000)), n=int(rng.integers(8, _EXACT_LIMIT)), kind="hessian")
        instance = other.instance
        optimum = other.optimum(objective)
    else:
        optimum = material.optima[objective]
    forged, what = certificate, []
    for _ in range(int(rng.integers(1, 4))):
        forged, said = _forgeries()[int(rng.integers(len(_forgeries())))](forged, rng)
        what.append(said)
    if rng.random() < 0.7:
        raised = optimum * (1.0 + 10.0 ** rng.uniform(-5, 0.5))
        forged = replace(forged, bound=raised, objective=max(forged.objective, raised))
        what.append("a higher bound")
    try:
        path = folder / "forged.npz"
        write_certificate(path, forged)
        found = verify_certificate(instance, read_certificate(path))
    except SolutionError as error:
        return judge_error(error)
    except (ValueError, TypeError, OverflowError) as error:
        if not (folder / "forged.npz").exists():
            return FINE  # no file can say this
        return Finding(Verdict.TRACEBACK, f"{objective}, {json.dumps(what)}: {type(error).__name__}: {error}")
    if max(found.bound, forged.bound) > optimum * (1.0 + _SLACK):
        return Finding(
            Verdict.WRONG, f"{objective}, {json.dumps(what)}: bound {forged.bound!r} passed, optimum {optimum!r}"
        )
    if found.optimal and found.objective > optimum * (1.0 + _SLACK):
        return Finding(Verdict.WRONG, f"{objective}, {json.dumps(what)}: {found.objective!r} passed as optimal")
    return FINE


Forgery = Callable[[Certificate, Generator], tuple[Certificate, str]]


def _forgeries() -> list[Forgery]:
    """All ways to change a certificate."""
    arrays = ("pieces", "tree_piece", "tree_count", "tree_nodes", "branch", "how", "fixed_counts", "fixings",
              "diagonals", "product_counts", "products", "product_prices", "codes", "numbers")  # fmt: skip
    entries = [partial(_entries, name) for name in arrays]
    lengths = [partial(_length, name) for name in arrays]
    return [*entries, *entries, *lengths, _leaf, _numbers_up, _diagonals_up, _selection, _claim, _drop_tree]


def _entries(name: str, certificate: Certificate, rng: Generator) -> tuple[Certificate, str]:
    array = np.array(getattr(certificate, name))
    if array.size == 0:
        return certificate, f"{name} is empty"
    for at in rng.integers(array.size, size=int(rng.integers(1, 4))):
        if array.dtype.kind == "f":
            scaled = array[at] * 10.0 ** rng.uniform(-3, 3)
            values: list[Any] = [0.0, array[at] * 2, -array[at], scaled, 1e30, np.nan]
            array[at] = values[int(rng.integers(len(values)))]
        else:
            low, high = (0, 256) if array.dtype == np.uint8 else (-3, max(3, int(array.max()) + 2))
            array[at] = rng.integers(low, high)
    return _replaced(certificate, name, array), f"entries of {name}"


def _length(name: str, certificate: Certificate, rng: Generator) -> tuple[Certificate, str]:
    array = np.array(getattr(certificate, name))
    if name == "pieces" or array.size == 0:
        return certificate, "nothing"
    made = array[:-1] if rng.random() < 0.5 else np.append(array, array[-1:])
    return _replaced(certificate, name, made), f"length of {name}"


def _leaf(certificate: Certificate, rng: Generator) -> tuple[Certificate, str]:
    """Cut a tree off below one of its nodes, which becomes a leaf."""
    branch = np.array(certificate.branch)
    inner = np.flatnonzero(branch != -1)
    if inner.size == 0 or not _is_even(certificate):
        return certificate, "no inner node"
    at = int(rng.choice(inner))
    ends, open_ = at, 1
    while open_ and ends < branch.size:
        open_ += -1 if branch[ends] == -1 else 0 if branch[ends] == -2 else 1
        ends += 1
    keep = np.ones(branch.size, dtype=bool)
    keep[at + 1 : ends] = False
    branch[at] = -1
    nodes = np.array(certificate.tree_nodes)
    tree = int(np.searchsorted(np.cumsum(nodes), at, side="right"))
    if tree < nodes.size:
        nodes[tree] -= int((~keep).sum())
    made = replace(
        certificate, branch=branch[keep], how=certificate.how[keep], fixed_counts=certificate.fixed_counts[keep],
        tree_nodes=nodes,
    )  # fmt: skip
    return made, f"a leaf at node {at}"


def _numbers_up(certificate: Certificate, rng: Generator) -> tuple[Certificate, str]:
    factor = 1.0 + 10.0 ** rng.uniform(-4, 1)
    return _replaced(certificate, "numbers", certificate.numbers * np.float32(factor)), "larger numbers"


def _diagonals_up(certificate: Certificate, rng: Generator) -> tuple[Certificate, str]:
    factor = 1.0 + 10.0 ** rng.uniform(-6, 1)
    return _replaced(certificate, "diagonals", certificate.diagonals * factor), "larger diagonals"


def _selection(certificate: Certificate, rng: Generator) -> tuple[Certificate, str]:
    pruned = rng.permutation(certificate.pruned)
    return replace(certificate, pruned=pruned), "another selection"


def _claim(certificate: Certificate, rng: Generator) -> tuple[Certificate, str]:
    factor = 1.0 + rng.choice([-1, 1]) * 10.0 ** rng.uniform(-7, 1)
    changes: list[dict[str, Any]] = [
        {"objective": certificate.objective * factor},
        {"budget": certificate.budget + int(rng.integers(-2, 3))},
        {"damping": float(rng.random())},
        {"objective_kind": "joint" if certificate.objective_kind == "selection" else "selection"},
        {"instance_sha256": ""},
        {"bound": certificate.bound * factor},
    ]
    change = changes[int(rng.integers(len(changes)))]
    return replace(certificate, **change), f"another {next(iter(change))}"


def _drop_tree(certificate: Certificate, rng: Generator) -> tuple[Certificate, str]:
    """Leave a whole tree out."""
    sizes = certificate.tree_nodes
    if sizes.size < 2 or not _is_even(certificate):
        return certificate, "one tree only"
    tree = int(rng.integers(sizes.size))
    start = int(sizes[:tree].sum())
    keep = np.ones(certificate.branch.size, dtype=bool)
    keep[start : start + int(sizes[tree])] = False
    others = np.arange(sizes.size) != tree
    made = replace(
        certificate, branch=certificate.branch[keep], how=certificate.how[keep],
        fixed_counts=certificate.fixed_counts[keep], tree_nodes=sizes[others],
        tree_piece=certificate.tree_piece[others], tree_count=certificate.tree_count[others],
    )  # fmt: skip
    return made, f"without tree {tree}"


def _is_even(certificate: Certificate) -> bool:
    """Whether all arrays of nodes, and those of trees, have the same length."""
    nodes = {certificate.branch.size, certificate.how.size, certificate.fixed_counts.size}
    trees = {certificate.tree_nodes.size, certificate.tree_piece.size, certificate.tree_count.size}
    return len(nodes) == len(trees) == 1 and bool((certificate.tree_nodes >= 0).all())


def _replaced(certificate: Certificate, name: str, array: Any) -> Certificate:
    return replace(certificate, **{name: array})
