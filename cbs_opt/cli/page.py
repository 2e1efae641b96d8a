"""The text of `cbs-info`, from the content that `describe` collects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cbs_opt.files import instance_file, solution_file
from cbs_opt.instance import Instance
from cbs_opt.view.text import Facts, count, facts, number, percent, shape, share, short, sizes, table

_CURVATURES = {
    "hessian": "dense blocks of the Hessian H",
    "inverse_hessian": "dense blocks of the inverse Hessian H⁻¹",
    "gradients": "gradients: H = λI + GᵀG/m within each block",
}
_ORIGIN = (
    ("network", "network"),
    ("data", "data"),
    ("hessian", "Hessian"),
    ("samples", "samples"),
    ("loss", "loss"),
    ("dense_loss", "trained loss"),
    ("dense_accuracy", "trained accuracy"),
    ("train_accuracy", "training accuracy"),
    ("test_accuracy", "test accuracy"),
    ("seed", "seed"),
    ("writer", "written by"),
)
_ON_THE_PAGE = {
    "tensors",
    "regression",
    "stated_objective",
    "tensor",
    "shape",
    "positions",
    "damping",
    *(key for key, _ in _ORIGIN),
}
_LONGEST_VALUE = 300


def page(content: Mapping[str, Any], instance: Instance | None = None) -> str:
    """The page of an instance, a solution or a certificate, according to `format`."""
    if content["format"] == instance_file.FORMAT:
        assert instance is not None
        return _instance_page(content, instance)
    if content["format"] == solution_file.FORMAT:
        return _solution_page(content)
    return _certificate_page(content)


def _instance_page(content: Mapping[str, Any], instance: Instance) -> str:
    metadata = content["metadata"]
    damping = content.get("damping", metadata.get("damping"))
    rows: Facts = [
        ("instance", str(content["path"])),
        ("weights", f"{content['weights']:,}"),
        *instance.budget.facts(instance.n),
        ("curvature", _CURVATURES.get(content["curvature"], content["curvature"].replace("_", " "))),
        ("blocks", _blocks(instance)),
    ]
    rows += [
        (name, value) for name, value in instance.curvature.facts()[2:] if name not in ("gradients", "damping")
    ]
    if "gradients" in content:
        rows.append(("gradients", f"m = {content['gradients']:,}, of {content['weights']:,} entries each"))
    if isinstance(damping, int | float):
        baked = "" if "damping" in content else ", included in the blocks"
        rows.append(("damping", f"λ = {damping:g} (loss per squared unit of weight){baked}"))
    if "hessian_diagonal" in content:
        low, high = content["hessian_diagonal"]
        rows.append(("H_ii", f"{short(low)} to {short(high)} (loss per squared unit of weight)"))
    if isinstance(regression := metadata.get("regression"), Mapping):
        rows.append(("regression", f"best subset: keep {content['kept']:,}, {_regression(regression)}"))
    if content["linear"]:
        rows.append(("linear", "with a first-order term gᵀδ: losses may be negative"))
    if instance.fixed is not None:
        must, stay = int((instance.fixed == 1).sum()), int((instance.fixed == -1).sum())
        rows.append(("fixed", f"{must:,} must be pruned, {stay:,} must stay"))
    if content.get("free_weights"):
        rows.append(("free", f"{count(content['free_weights'], 'weight')} whose removal alone costs nothing"))
    parts = [facts(rows)]
    if tensors := content.get("tensors"):
        parts.append(_tensor_table(tensors, instance))
    if known := content.get("best_known"):
        parts.append(
            "best known\n" + facts([(f"{kind} loss", _known(best)) for kind, best in known.items()], "  ")
        )
    if origin := _origin(metadata):
        parts.append("origin\n" + facts(origin, "  "))
    if content.get("sha256"):
        parts.append(facts([("sha256", content["sha256"])]))
    if not content["verified"]:
        parts.append(
            "The values of the curvature were not read: `--verify` checks them and adds what follows from them."
        )
    return "\n\n".join(parts) + "\n"


def _regression(regression: Mapping[str, Any]) -> str:
    samples, ridge = regression.get("samples"), regression.get("ridge")
    scaled = ", standardized columns" if regression.get("standardize") else ""
    return f"{samples} samples, ridge {ridge}{', intercept' if regression.get('intercept') else ''}{scaled}"


def _blocks(instance: Instance) -> str:
    curvature = instance.curvature
    uniform = np.unique(curvature.block_sizes).size == 1
    return f"{curvature.number_of_blocks:,}{' of' if uniform else ':'} {sizes(curvature.block_sizes)} weights"


def _tensor_table(tensors: list[dict[str, Any]], instance: Instance) -> str:
    header = ["tensor", "shape", "weights", "blocks", "to prune", "share"]
    lines = []
    for tensor in tensors:
        budget = tensor["budget"]
        prune = ["open", "-"] if budget is None else [f"{budget:,}", share(budget, tensor["weights"])]
        lines.append(
            [tensor["name"], shape(tensor["shape"]), f"{tensor['weights']:,}", f"{tensor['blocks']:,}", *prune]
        )
    if len(tensors) > 1:
        total = instance.budget.total
        blocks = f"{instance.curvature.number_of_blocks:,}"
        lines.append(["all", "", f"{instance.n:,}", blocks, f"{total:,}", share(total, instance.n)])
    text = table(header, lines, left=2)
    if any(tensor["budget"] is None for tensor in tensors):
        text += "\nopen: the budget covers several tensors, and the solver divides it"
    return text


def _known(best: Mapping[str, Any]) -> str:
    if best["proven"]:
        return f"{number(best['value'])}  proven optimal"
    found = f"found by {best['solver']}"
    if best["bound"] is None:
        return f"{number(best['value'])}  {found}"
    gap = (best["value"] - best["bound"]) / max(abs(best["value"]), 1e-300)
    return f"{number(best['value'])}  {found}, gap {percent(gap)} to the bound"


def _origin(metadata: Mapping[str, Any]) -> Facts:
    rows = [(title, _value(metadata[key])) for key, title in _ORIGIN if key in metadata]
    return rows + [
        (key.replace("_", " "), _value(value)) for key, value in metadata.items() if key not in _ON_THE_PAGE
    ]


def _value(value: Any) -> str:
    """A value of the metadata: short numbers, no quotes, no braces."""
    if isinstance(value, bool) or value is None:
        text = {True: "yes", False: "no", None: "-"}[value]
    elif isinstance(value, int):
        text = f"{value:,}"
    elif isinstance(value, float):
        text = short(value)
    elif isinstance(value, Mapping):
        text = ", ".join(f"{str(key).replace('_', ' ')} {_value(item)}" for key, item in value.items())
    elif isinstance(value, list | tuple):
        few = list(value[:8])
        text = ", ".join(map(_value, few)) + (f", … ({len(value):,} in all)" if len(value) > len(few) else "")
    else:
        text = str(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "…"


def _number(value: Any) -> str:
    """A loss as a file states it, which need not be a number."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number(float(value))
    return "-" if value is None else str(value)[:40]


def _solution_page(content: Mapping[str, Any]) -> str:
    updated = "" if not content["updated_weights"] else ", and the kept weights updated"
    pruned, n = content["pruned"], content["weights"]
    rows: Facts = [
        ("solution", content["path"]),
        ("pruned", f"{pruned:,} of {n:,} weights ({share(pruned, n)}){updated}"),
    ]
    if "solver" in content:
        seed = f", seed {content['seed']}" if "seed" in content else ""
        rows.append(("solver", f"{content['solver']}{seed}"))
    if "status" in content:
        rows.append(("status", str(content["status"]).replace("_", " ")))
    if "objective" in content:
        kind = f"  ({content['objective_kind']})" if "objective_kind" in content else ""
        rows.append(("objective", f"{_number(content['objective'])}{kind}"))
    rows += [
        (key.replace("_", " "), _number(content[key]))
        for key in ("selection_loss", "joint_loss", "bound")
        if key in content
    ]
    gap = content.get("gap")
    if isinstance(gap, int | float) and not isinstance(gap, bool):
        rows.append(("gap", percent(float(gap))))
    seconds = content.get("runtime", {}).get("solve_s")
    if isinstance(seconds, int | float) and not isinstance(seconds, bool):
        rows.append(("time", f"{seconds:.2f} s solving"))
    if content["instance_path"]:
        rows.append(("instance", content["instance_path"]))
    if content["instance_sha256"]:
        rows.append(("sha256", f"{content['instance_sha256']}  (of the instance)"))
    parts = [facts(rows)]
    if tensors := content.get("tensors"):
        lines = [
            [
                t["name"],
                shape(t["shape"]),
                f"{t['weights']:,}",
                f"{t['pruned']:,}",
                share(t["pruned"], t["weights"]),
            ]
            for t in tensors
        ]
        if len(tensors) > 1:
            lines.append(["all", "", f"{n:,}", f"{pruned:,}", share(pruned, n)])
        parts.append(table(["tensor", "shape", "weights", "pruned", "share"], lines, left=2))
    parts.append("The losses are those stated in the file: cbs-solve INSTANCE --check SOLUTION recomputes them.")
    return "\n\n".join(parts) + "\n"


def _certificate_page(content: Mapping[str, Any]) -> str:
    pruned, n = content["pruned"], content["weights"]
    rows: Facts = [
        ("certificate", content["path"]),
        ("pruned", f"{pruned:,} of {n:,} weights ({share(pruned, n)})"),
        ("objective", f"{number(content['objective'])}  ({content['objective_kind']})"),
        ("bound", number(content["bound"])),
        ("gap", percent(content["gap"])),
        (
            "proof",
            f"{count(content['pieces'], 'piece')}, {count(content['trees'], 'tree')}, "
            f"{count(content['nodes'], 'node')}, {count(content['fixings'], 'weight')} fixed by bounds",
        ),
    ]
    if content["damping"] is not None:
        rows.append(("damping", f"λ = {content['damping']:g}"))
    if content["instance_sha256"]:
        rows.append(("sha256", f"{content['instance_sha256']}  (of the instance)"))
    claim = "These are the statements of the file: cbs-solve INSTANCE --check CERTIFICATE verifies them."
    return f"{facts(rows)}\n\n{claim}\n"
