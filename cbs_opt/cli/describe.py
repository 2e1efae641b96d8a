"""The contents of an instance, a solution or a certificate as JSON types, for `cbs-info`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cbs_opt.curvature.outline import CurvatureOutline
from cbs_opt.files import instance_file, solution_file
from cbs_opt.files.certificate_file import FORMAT as CERTIFICATE
from cbs_opt.files.certificate_file import Certificate
from cbs_opt.files.library_file import best_known
from cbs_opt.instance import Instance
from cbs_opt.solution import Solution
from cbs_opt.solver import OBJECTIVES
from cbs_opt.tensor_table import TensorEntry, tensor_table

_KEPT = ("solver", "objective_kind", "status", "objective", "selection_loss", "joint_loss", "bound", "gap", "seed")


def describe_instance(instance: Instance) -> dict[str, Any]:
    """All properties of an instance that need no solve; O(Σ b_k³) for inverse blocks.

    Of an outline (see `read_outline`) only those that need no values of the curvature.
    """
    curvature, sizes = instance.curvature, instance.curvature.block_sizes
    content: dict[str, Any] = {
        "format": instance_file.FORMAT,
        "path": None if instance.path is None else str(instance.path),
        "sha256": instance.sha256,
        "weights": instance.n,
        "budget": instance.budget.total,
        "kept": instance.n - instance.budget.total,
        "sparsity": instance.budget.total / instance.n,
        "curvature": curvature.kind,
        "blocks": sizes.size,
        "block_sizes": _few(sizes.tolist()),
        "stored_blocks": curvature.number_of_stored,
    }
    factor = curvature.as_factor()
    if factor is not None:
        content |= {"gradients": factor.m, "damping": factor.damping}
    elif curvature.damping is not None:
        content["damping"] = curvature.damping
    if instance.budget.groups is not None:
        content |= {
            "groups": instance.budget.number_of_groups,
            "group_budgets": _few(instance.budget.per_group.tolist()),
        }
    if instance.budget.cross_group_budgets is not None:
        content |= {
            "cross_groups": instance.budget.cross_group_budgets.size,
            "cross_group_budgets": _few(instance.budget.cross_group_budgets.tolist()),
        }
    if tensors := tensor_table(instance):
        content["tensors"] = [describe_tensor(instance, tensor) for tensor in tensors]
    content |= {
        "linear": instance.linear is not None,
        "fixed": 0 if instance.fixed is None else int(np.count_nonzero(instance.fixed)),
        "verified": not isinstance(curvature, CurvatureOutline),
        **({} if isinstance(curvature, CurvatureOutline) else _values(instance)),
        "metadata": dict(instance.metadata),
    }
    return content


def _values(instance: Instance) -> dict[str, Any]:
    """What follows from the values of the curvature and from the hash of the file."""
    diagonal = instance.curvature.diagonal()
    return {
        "indefinite_blocks": len(instance.curvature.indefinite_blocks),
        "hessian_diagonal": [float(diagonal.min()), float(diagonal.max())],
        "free_weights": int(np.count_nonzero(instance.weights**2 * diagonal == 0)),
        "best_known": {
            objective: {"value": known.value, "bound": known.bound, "proven": known.proven, "solver": known.solver}
            for objective in OBJECTIVES
            if (known := best_known(instance, objective)) is not None
        },
    }


def describe_tensor(instance: Instance, tensor: TensorEntry) -> dict[str, Any]:
    """Name, shape, weights, blocks and budget of a tensor.

    `budget` is None if groups, or one budget over all weights, do not determine how much of it is pruned.
    """
    starts, ends = instance.curvature.offsets[:-1], instance.curvature.offsets[1:]
    budget = instance.budget
    fixed_share: int | None = None
    if budget.groups is not None:
        inside = np.unique(budget.groups[tensor.start : tensor.stop])
        outside = np.concatenate([budget.groups[: tensor.start], budget.groups[tensor.stop :]])
        if not np.isin(inside, outside).any():
            fixed_share = int(budget.per_group[inside].sum())
    elif tensor.size == instance.n:
        fixed_share = budget.total
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "weights": tensor.size,
        "blocks": int(np.count_nonzero((starts < tensor.stop) & (ends > tensor.start))),
        "budget": fixed_share,
    }


def describe_solution(path: Path, solution: Solution, instance: Instance | None = None) -> dict[str, Any]:
    """The contents of a solution file; with its instance also the numbers pruned in each tensor."""
    content: dict[str, Any] = {
        "format": solution_file.FORMAT,
        "path": str(path),
        "instance_sha256": solution.instance_sha256,
        "instance_path": _instance_path(solution),
        "weights": solution.pruned.size,
        "pruned": int(solution.pruned.sum()),
        "updated_weights": solution.weights is not None,
        **{key: solution.result[key] for key in _KEPT if key in solution.result},
    }
    runtime = solution.result.get("runtime")
    if isinstance(runtime, dict):
        content["runtime"] = runtime
    if instance is not None:
        content["tensors"] = [
            describe_tensor(instance, tensor) | {"pruned": int(solution.pruned[tensor.start : tensor.stop].sum())}
            for tensor in tensor_table(instance)
        ]
    return content


def describe_certificate(path: Path, certificate: Certificate) -> dict[str, Any]:
    """The statements of a certificate; `cbs-solve --check` verifies them."""
    objective, bound = certificate.objective, certificate.bound
    return {
        "format": CERTIFICATE,
        "path": str(path),
        "instance_sha256": certificate.instance_sha256,
        "weights": certificate.pruned.size,
        "pruned": int(certificate.pruned.sum()),
        "budget": certificate.budget,
        "damping": certificate.damping,
        "objective_kind": certificate.objective_kind,
        "objective": objective,
        "bound": bound,
        "gap": max(objective - bound, 0.0) / max(abs(objective), 1e-300),
        "pieces": int(certificate.pieces.max(initial=-1)) + 1,
        "trees": certificate.tree_nodes.size,
        "nodes": certificate.branch.size,
        "fixings": certificate.fixings.size,
    }


def _instance_path(solution: Solution) -> str | None:
    stored = solution.result.get("instance")
    path = stored.get("path") if isinstance(stored, dict) else None
    return path if isinstance(path, str) else None


def _few(values: list[Any]) -> list[Any]:
    """At most a dozen values, the middle omitted."""
    return values if len(values) <= 12 else [*values[:10], "…", values[-1]]
