"""Time and memory on an instance as large as MLPNet: `python -m cbs_opt.bench.scale` prints a Markdown table.

Random weights and gradients, one block. The evaluator goes first, so that the peak of its memory is known
before torch is loaded. No view of `cbs-bench`: rows hold neither memory nor the evaluator's seconds.
"""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Sequence

import numpy as np

from cbs_opt import Budget, GradientFactor, Instance, joint_loss, selection_loss, solve
from cbs_opt.bench.startup import machine
from cbs_opt.cli.common import Parser, run_main


def random_instance(n: int, m: int, damping: float, sparsity: float, seed: int) -> Instance:
    """Normal weights and float32 gradients, one block."""
    rng = np.random.default_rng(seed)
    gradients = rng.standard_normal((m, n), dtype=np.float32)
    return Instance(rng.standard_normal(n), GradientFactor(gradients, damping), Budget(int(np.ceil(sparsity * n))))


def peak_gigabytes() -> float:
    """Largest resident memory of this process so far, in GB."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def measure(n: int, m: int, damping: float, draws: int, seed: int) -> list[tuple[str, float, float]]:
    """Rows of what was done, seconds, and the peak of memory in GB after it."""
    rows = []

    def clocked(what: str, started: float) -> None:
        rows.append((what, time.perf_counter() - started, peak_gigabytes()))

    started = time.perf_counter()
    instance = random_instance(n, m, damping, 0.9, seed)
    clocked(f"making the instance: {instance.describe()}", started)
    # Sparse selections leave many weights, dense ones few: the evaluator goes by the smaller system.
    for sparsity in (0.98, 0.9, 0.5):
        there = instance.with_sparsity(sparsity)
        pruned = there.budget.cheapest(np.abs(there.weights))
        started = time.perf_counter()
        selection = selection_loss(there, pruned)
        clocked(f"`selection_loss` at sparsity {sparsity:g}: {selection:.6e}", started)
        started = time.perf_counter()
        joint = joint_loss(there, pruned)
        clocked(f"`joint_loss` at sparsity {sparsity:g}: {joint:.6e}", started)
    result = solve(instance, "rmp", seed=seed, parameters={"draws": draws}, device="cpu")
    rows.append((f"`rmp`, {draws} draws: solving", result.solve_seconds, peak_gigabytes()))
    rows.append((f"`rmp`, {draws} draws: building", result.build_seconds, peak_gigabytes()))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_main("cbs_opt.bench.scale", _main, arguments)


def _main(arguments: list[str]) -> int:
    parser = Parser("python -m cbs_opt.bench.scale", "Measure the evaluator and rmp on a large instance.")
    add = parser.add_argument
    add("--weights", type=int, default=32_360, metavar="N", help="default: 32360, as MLPNet")
    add("--gradients", type=int, default=1000, metavar="M", help="default: 1000")
    add("--damping", type=float, default=1e-5, metavar="L", help="default: 1e-5")
    add("--draws", type=int, default=50, metavar="S", help="default: 50")
    add("--seed", type=int, default=0, metavar="N")
    options = parser.parse_args(arguments)
    rows = measure(options.weights, options.gradients, options.damping, options.draws, options.seed)
    lines = [machine(), "", "| what | time | peak memory by then |", "|---|---|---|"]
    lines += [f"| {what} | {seconds:.2f} s | {peak:.2f} GB |" for what, seconds, peak in rows]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
