"""Small valid files of every format, from which the cases of the campaign start."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cbs_opt import Instance, read_instance, solve, write_instance, write_solution
from cbs_opt.bench.faults.processes import Surroundings, run
from cbs_opt.bench.faults.verdict import FINE, Finding, Verdict
from cbs_opt.testing.problems import make_problem

CONFIGURATION = """\
name = "campaign"
description = "A few rows that take no time."
instances = ["INSTANCES/hessian.npz", "INSTANCES/gradients.npz"]
sparsities = [0.3, 0.6]
time_limit = 2.0
objective = "selection"

[[solvers]]
name = "magnitude"

[[solvers]]
name = "obd"

[[solvers]]
name = "ls"
seeds = [0, 1]
"""

INSTANCES: Mapping[str, Mapping[str, Any]] = {
    "hessian": {"kind": "hessian", "blocks": 3, "n": 24},
    "inverse": {"kind": "inverse_hessian", "blocks": 2, "n": 20},
    "gradients": {"kind": "gradients", "n": 22, "linear": True, "fixed": True},
    "grouped": {"kind": "hessian", "n": 16, "groups": "2:4"},
    "shared": {"kind": "hessian", "n": 24, "shared": (0, 1, 0, 0)},
    "proven": {"kind": "hessian", "n": 14},
}
"""Arguments of `make_problem` for each instance."""


@dataclass(frozen=True)
class Material:
    """The folder of the valid files, and their hashes.

    Attributes
    ----------
    folder : Path
    files : mapping of str to Path
        Instances as in `INSTANCES`; `solution`, `weights` (a solution with updated weights), `certificate` and
        `joint-certificate` of `proven`, `configuration`, `store`, and for the digits network `network.pt`,
        `network.npz`, `network.safetensors`.
    optima : mapping of str to float
        Of `proven`, by objective, from enumeration.
    """

    folder: Path
    files: Mapping[str, Path]
    optima: Mapping[str, float]
    hashes: Mapping[str, str]

    def instance(self, name: str) -> Instance:
        """An instance, read from its file."""
        return read_instance(self.files[name])

    def check(self) -> Finding:
        """Whether all files are as they were."""
        now = {path.name: _sha256(path) for path in sorted(self.folder.iterdir()) if path.is_file()}
        if now == self.hashes:
            return FINE
        changed = sorted(
            name for name in now.keys() | self.hashes.keys() if now.get(name) != self.hashes.get(name)
        )
        return Finding(Verdict.LOST, f"inputs changed: {', '.join(changed)}")


def make_material(folder: Path) -> Material:
    """Make all files in an empty folder."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Path] = {}
    for number, (name, arguments) in enumerate(INSTANCES.items()):
        files[name] = folder / f"{name}.npz"
        write_instance(files[name], make_problem(number, **arguments).instance)
    problem = make_problem(list(INSTANCES).index("proven"), **INSTANCES["proven"])
    optima = {kind: problem.optimum(kind) for kind in ("selection", "joint")}
    hessian, proven = read_instance(files["hessian"]), read_instance(files["proven"])
    files["solution"], files["weights"] = folder / "solution.npz", folder / "weights.npz"
    write_solution(files["solution"], solve(hessian, "obd"))
    write_solution(files["weights"], solve(hessian, "obs", update=True))
    for name, objective in (("certificate", "selection"), ("joint-certificate", "joint")):
        files[name] = folder / f"{name}.npz"
        solve(proven, "exact", objective=objective, parameters={"certificate": str(files[name])})
    files["configuration"] = folder / "configuration.toml"
    files["configuration"].write_text(CONFIGURATION.replace("INSTANCES", str(folder)))
    files["store"] = folder / "store.sqlite"
    made = run("bench", ["run", files["configuration"], "-o", files["store"], "-q"], Surroundings(folder))
    if made.code != 0:
        raise RuntimeError(f"the store of the campaign cannot be made: {made.err}")
    files |= _networks(folder)
    files |= _data(folder)
    hashes = {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
    return Material(folder, files, optima, hashes)


def _networks(folder: Path) -> dict[str, Path]:
    """The digits network with random weights, in three formats of checkpoints."""
    import torch
    from safetensors.torch import save_file

    from cbs_opt.instances.networks import load_network

    torch.manual_seed(0)
    state = {name: tensor.clone() for name, tensor in load_network("digits-mlp").model.state_dict().items()}
    paths = {f"network.{kind}": folder / f"network.{kind}" for kind in ("pt", "npz", "safetensors")}
    torch.save(state, paths["network.pt"])
    np.savez(paths["network.npz"], **{name: tensor.numpy() for name, tensor in state.items()})
    save_file(state, paths["network.safetensors"])
    return paths


def _data(folder: Path) -> dict[str, Path]:
    """Images and labels as IDX files, and a batch of CIFAR-10, the one format that is a pickle."""
    rng = np.random.default_rng(0)
    images, labels = folder / "t10k-images-idx3-ubyte", folder / "t10k-labels-idx1-ubyte"
    images.write_bytes(
        bytes.fromhex("00000803") + b"".join(n.to_bytes(4, "big") for n in (20, 8, 8)) + rng.bytes(1280)
    )
    labels.write_bytes(bytes.fromhex("00000801") + (20).to_bytes(4, "big") + bytes(i % 10 for i in range(20)))
    batch = folder / "test_batch"
    pixels = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
    batch.write_bytes(pickle.dumps({b"data": pixels, b"labels": list(range(10))}, protocol=2))
    return {"images": images, "labels": labels, "batch": batch}


def contents(instance: Instance) -> str:
    """A hash of everything that an instance means."""
    digest = hashlib.sha256()
    curvature, budget = instance.curvature, instance.budget
    parts = [curvature.block(k) for k in range(curvature.number_of_blocks)]
    for part in (
        instance.weights, curvature.block_sizes, *parts, instance.linear, instance.fixed, np.array(budget.total),
        budget.groups, budget.group_budgets, budget.cross_groups, budget.cross_group_budgets,
    ):  # fmt: skip
        digest.update(b"-" if part is None else np.ascontiguousarray(part).tobytes())
    digest.update(json.dumps(dict(instance.metadata), sort_keys=True).encode())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
