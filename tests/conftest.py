"""Problems of every kind with the dense matrices that they came from, and runs of the command line."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import pytest
from hypothesis import Phase, settings

from cbs_opt import (
    Budget,
    GradientFactor,
    HessianBlocks,
    Instance,
    InverseHessianBlocks,
    SharedBlocks,
    write_instance,
)

ROOT = Path(__file__).resolve().parent.parent

settings.register_profile("suite", deadline=None, max_examples=40, derandomize=True)
# A failure is all that tests/mutations asks for: no search for the smallest example.
settings.register_profile(
    "mutations", parent=settings.get_profile("suite"), phases=(Phase.explicit, Phase.generate), database=None
)
settings.load_profile("suite")


@dataclass(frozen=True)
class Problem:
    """An instance beside its dense H and g, from which the tests compute by textbook formulae."""

    instance: Instance
    H: np.ndarray
    g: np.ndarray

    @property
    def w(self):
        return self.instance.weights

    def selection_loss(self, pruned):
        delta = np.where(pruned, -self.w, 0.0)
        return self.g @ delta + 0.5 * delta @ self.H @ delta

    def joint_loss(self, pruned):
        """Eqs 10-12 with explicit inverses, around the free minimiser u = −H⁻¹g."""
        inverse = np.linalg.inv(self.H)
        u = -inverse @ self.g
        free = self.g @ u + 0.5 * u @ self.H @ u
        P = np.flatnonzero(pruned)
        residual = self.w[P] + u[P]
        return free + 0.5 * residual @ np.linalg.solve(inverse[np.ix_(P, P)], residual)

    def loss(self, objective, pruned):
        return self.selection_loss(pruned) if objective == "selection" else self.joint_loss(pruned)

    def selections(self) -> Iterator[np.ndarray]:
        """Every feasible selection, by itertools, not by the package's code."""
        n, budget = self.instance.n, self.instance.budget
        groups = [0] * n if budget.groups is None else budget.groups.tolist()
        wanted = [budget.total] if budget.group_budgets is None else budget.group_budgets.tolist()
        fixed = [0] * n if self.instance.fixed is None else self.instance.fixed.tolist()
        for chosen in itertools.combinations(range(n), budget.total):
            counts = [0] * len(wanted)
            for i in chosen:
                counts[groups[i]] += 1
            inside = set(chosen)
            if counts == wanted and all(f == 0 or (f == 1) == (i in inside) for i, f in enumerate(fixed)):
                pruned = np.zeros(n, dtype=bool)
                pruned[list(chosen)] = True
                yield pruned

    def optimum(self, objective):
        return min(self.loss(objective, pruned) for pruned in self.selections())

    def scale(self):
        """A size of losses to compare rounding with."""
        return 0.5 * np.abs(self.w) @ np.abs(self.H) @ np.abs(self.w) + np.abs(self.g) @ np.abs(self.w)


def make_problem(
    seed=0,
    *,
    n=8,
    kind="gradients",
    blocks=1,
    budget=None,
    groups=None,
    linear=False,
    fixed=False,
    m=None,
    damping=1e-3,
    weights=None,
    zero_columns=(),
    dtype=np.float64,
    shared=None,
):
    """A random problem; `groups` is None, "layers" (three, in order), "rows" (interleaved) or "2:4".

    With `shared`, (0, 0, 1) for instance, there are as many equal blocks, and block k is a multiple of stored
    block shared[k].
    """
    if shared is not None:
        return make_shared_problem(
            seed, n=n, kind=kind, shared=shared, budget=budget, groups=groups, linear=linear, fixed=fixed, m=m,
            damping=damping,
        )  # fmt: skip
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, n), size=blocks - 1, replace=False)) if blocks > 1 else []
    sizes = np.diff([0, *cuts, n]).astype(np.int64)
    m = n + 2 if m is None else m
    G = rng.standard_normal((m, n)) * rng.uniform(0.2, 2.0, n)
    G[:, list(zero_columns)] = 0.0
    G = G.astype(dtype)
    H = np.zeros((n, n))
    ends = np.cumsum(sizes)
    for start, stop in zip(ends - sizes, ends, strict=True):
        part = G[:, start:stop].astype(np.float64)
        H[start:stop, start:stop] = part.T @ part / m + damping * np.eye(stop - start)
    parts = [H[start:stop, start:stop] for start, stop in zip(ends - sizes, ends, strict=True)]
    if kind == "gradients":
        curvature = GradientFactor(G, damping, sizes)
    elif kind == "hessian":
        curvature = HessianBlocks.from_blocks(parts)
    else:
        curvature = InverseHessianBlocks.from_blocks([(A + A.T) / 2 for A in map(np.linalg.inv, parts)])
    w = rng.standard_normal(n) if weights is None else np.asarray(weights, dtype=np.float64)
    return Problem(
        Instance(
            w,
            curvature,
            _budget(groups, n, n // 2 if budget is None else budget),
            linear=(g := 0.3 * rng.standard_normal(n)) if linear else None,
            fixed=_fixed(n) if fixed else None,
        ),
        H,
        g if linear else np.zeros(n),
    )


def make_shared_problem(seed, *, n, kind, shared, budget, groups, linear, fixed, m, damping):
    """Equal blocks H_k = scale_k · S of a few stored S, beside the dense H that they stand for."""
    b, rows = n // len(shared), len(shared)
    stored = make_problem(seed, n=b * (max(shared) + 1), kind="gradients", m=m or b + 2, damping=damping)
    sizes = np.full(max(shared) + 1, b)
    curvature = GradientFactor(stored.instance.curvature.gradients, damping, sizes)
    parts = [curvature.block(s) for s in range(sizes.size)]
    if kind == "hessian":
        curvature = HessianBlocks.from_blocks(parts)
    elif kind == "inverse_hessian":
        curvature = InverseHessianBlocks.from_blocks([(A + A.T) / 2 for A in map(np.linalg.inv, parts)])
    rng = np.random.default_rng([seed, 1])
    scale = rng.uniform(0.25, 4.0, rows)
    H = np.zeros((b * rows, b * rows))
    for k, s in enumerate(shared):
        H[k * b : (k + 1) * b, k * b : (k + 1) * b] = scale[k] * parts[s]
    n = b * rows
    g = 0.3 * rng.standard_normal(n) if linear else None
    instance = Instance(
        rng.standard_normal(n),
        SharedBlocks(curvature, shared, scale),
        _budget(groups, n, n // 2 if budget is None else budget),
        linear=g,
        fixed=_fixed(n) if fixed else None,
    )
    return Problem(instance, H, np.zeros(n) if g is None else g)


def _budget(groups, n, total):
    if groups is None:
        return Budget(total)
    if groups == "layers":
        of = np.arange(n) * 3 // n
        sizes = np.bincount(of, minlength=3)
        return Budget(int((sizes // 2).sum()), of, sizes // 2)
    if groups == "rows":
        of = np.arange(n) % max(n // 2, 1)
        sizes = np.bincount(of)
        return Budget(int((sizes // 2).sum()), of, sizes // 2)
    of = np.arange(n) // 4
    sizes = np.bincount(of)
    return Budget(int((sizes // 2).sum()), of, sizes // 2)


def _fixed(n):
    fixed = np.zeros(n, dtype=np.int8)
    fixed[0], fixed[-1] = 1, -1
    return fixed


@pytest.fixture(scope="session")
def problem():
    """The factory of random problems."""
    return make_problem


@pytest.fixture(scope="session")
def with_instance():
    """`with_instance(problem, weights=...)`: the same problem with parts of the instance replaced."""

    def change(problem, **parts):
        return replace(problem, instance=replace(problem.instance, **parts))

    return change


@pytest.fixture(scope="session")
def run():
    """Run a command line in a process of its own: `run("solve", "file.npz", "--json", "-")`."""

    def call(command, *arguments, timeout=120, **options):
        return subprocess.run(
            [sys.executable, "-m", f"cbs_opt.cli.{command}", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment(),
            **options,
        )

    return call


def environment():
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def process_environment():
    """Environment variables with which a subprocess finds the package."""
    return environment()


@pytest.fixture(scope="session")
def repository():
    """The root of the repository."""
    return ROOT


@pytest.fixture
def instance_file(tmp_path):
    """A small instance file of one block, twelve weights, six to prune."""
    path = tmp_path / "instance.npz"
    write_instance(path, make_problem(3, n=12, kind="gradients").instance)
    return path


@pytest.fixture(scope="session")
def shared_instances():
    """The folder of instances beside the repository; tests that need it are marked `shared`."""
    folder = ROOT.parent / "shared" / "data" / "instances"
    if not folder.is_dir():
        pytest.skip(f"NOT TESTED: the shared data folder {folder.relative_to(ROOT.parent)} is absent")
    return folder
