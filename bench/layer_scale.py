"""A cost model of large layers: `python -m cbs_opt.bench.layer_scale` measures, fits, checks and predicts.

Generated layers (`large_layers`) are solved to the end by `joint`, each in a process of its own, and the processor
seconds of solving and evaluating, and the peak memory, are fitted by non-negative least squares:

    seconds = a · rows · K² + b · K³,    bytes = c · rows · K + d · K² + e.

a and b depend on the sparsity, which sets the number of iterations. The model is checked on a size that was not
fitted, and predicts the linear layers of two transformers on 2 cores and on clusters.
"""

from __future__ import annotations

import heapq
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cbs_opt.bench.anytime import load
from cbs_opt.bench.kept import once
from cbs_opt.bench.large_layers import as_instance, generate, transformer_block
from cbs_opt.bench.layers import table
from cbs_opt.bench.startup import machine
from cbs_opt.cli.common import Parser, check_outputs, run_main
from cbs_opt.errors import SolverError, UsageError
from cbs_opt.files import write_instance
from cbs_opt.typing import FloatArray

SIZES = ((256, 1152), (768, 1152), (256, 1536), (768, 1536), (1536, 1280))
"""Rows and columns of the layers that the model is fitted to."""

UNSEEN = (512, 2048)
SPARSITIES = (0.5, 0.7)
CLUSTERS = (1, 8, 64)
"""Numbers of machines with two cores."""

TRANSFORMERS = {
    "7B": (32, ((4096, 4096, 4), (11008, 4096, 2), (4096, 11008, 1))),
    "70B": (80, ((8192, 8192, 2), (1024, 8192, 2), (28672, 8192, 2), (8192, 28672, 1))),
}
"""Blocks, and the linear layers of each: rows, columns, how many. The shapes of Llama 2 (2307.09288)."""


@dataclass(frozen=True)
class Measured:
    """One layer that was solved."""

    rows: int
    columns: int
    sparsity: float
    seconds: float
    memory: float  # bytes
    error: float

    def cells(self) -> list[str]:
        """For a table."""
        return [
            f"{self.rows} × {self.columns}",
            f"{self.sparsity:g}",
            f"{self.seconds:.1f}",
            f"{self.memory / 1e9:.2f}",
        ]


@dataclass(frozen=True)
class CostModel:
    """Coefficients of seconds, by sparsity, and of bytes."""

    seconds: dict[float, tuple[float, float]]
    memory: tuple[float, float, float]

    def seconds_of(self, rows: int, columns: int, sparsity: float) -> float:
        """Processor seconds of one layer."""
        a, b = self.seconds[sparsity]
        return a * rows * float(columns) ** 2 + b * float(columns) ** 3

    def bytes_of(self, rows: int, columns: int) -> float:
        """Peak memory of one layer."""
        c, d, e = self.memory
        return c * rows * columns + d * float(columns) ** 2 + e


def measure_here(rows: int, columns: int, sparsity: float) -> Measured:
    """Solve one generated layer with one thread, in this process: its peak memory is that of the layer."""
    from cbs_opt.solve import solve

    W, S = generate(rows, columns, 2 * columns)
    instance = as_instance(W, S, sparsity)
    reference = 0.5 * float(np.einsum("rk,rk->", W @ S, W))
    del W, S
    began = time.process_time()
    result = solve(instance, "joint", objective="joint", threads=1)
    seconds = time.process_time() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Measured(rows, columns, sparsity, seconds, float(memory), result.objective / reference)


def measure(rows: int, columns: int, sparsity: float) -> Measured:
    """The same in a fresh process.

    Raises
    ------
    SolverError
        When it fails.
    """
    command = [sys.executable, "-m", "cbs_opt.bench.layer_scale", "--one", str(rows), str(columns), str(sparsity)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SolverError(f"the layer {rows} × {columns} could not be measured: {done.stderr.strip()[-300:]}")
    return Measured(**json.loads(done.stdout))


def measured_once(rows: int, columns: int, sparsity: float, kept: Path | None) -> Measured:
    """A measurement from the file of earlier ones, or a new one, which is added to it; raises as `measure`."""
    return once(
        kept,
        Measured,
        lambda found: (found.rows, found.columns, found.sparsity) == (rows, columns, sparsity),
        lambda: measure(rows, columns, sparsity),
    )


def fitted(rows: Iterable[Measured]) -> CostModel:
    """Least squares of relative errors, with coefficients that are not negative."""
    from scipy.optimize import nnls

    found = list(rows)
    seconds: dict[float, tuple[float, float]] = {}
    for sparsity in sorted({m.sparsity for m in found}):
        here = [m for m in found if m.sparsity == sparsity]
        A: FloatArray = np.array([[m.rows * m.columns**2, m.columns**3] for m in here], dtype=np.float64)
        y = np.array([m.seconds for m in here])
        a, b = nnls(A / y[:, None], np.ones(y.size))[0]
        seconds[sparsity] = float(a), float(b)
    A = np.array([[m.rows * m.columns, m.columns**2, 1.0] for m in found], dtype=np.float64)
    y = np.array([m.memory for m in found])
    c, d, e = nnls(A / y[:, None], np.ones(y.size))[0]
    return CostModel(seconds, (float(c), float(d), float(e)))


def makespan(tasks: Sequence[float], machines: int) -> float:
    """Seconds until all tasks are done, the largest first on the machine that is free first."""
    ends = [0.0] * machines
    for seconds in sorted(tasks, reverse=True):
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends)


def predictions(model: CostModel) -> list[list[object]]:
    """One row for each transformer and sparsity."""
    out: list[list[object]] = []
    for name, (blocks, shapes) in TRANSFORMERS.items():
        memory = max(model.bytes_of(rows, columns) for rows, columns, _ in shapes)
        for sparsity in sorted(model.seconds):
            tasks = [
                model.seconds_of(rows, columns, sparsity) / 2
                for rows, columns, count in shapes
                for _ in range(blocks * count)
            ]
            hours = [f"{makespan(tasks, machines) / 3600:.3g} h" for machines in CLUSTERS]
            out.append(
                [name, f"{sparsity:g}", len(tasks), f"{max(tasks) / 3600:.2g} h", *hours, f"{memory / 1e9:.1f}"]
            )
    return out


def report(
    sizes: Sequence[tuple[int, int]],
    unseen: tuple[int, int],
    sparsities: Sequence[float],
    kept: Path | None = None,
) -> Iterable[str]:
    """The tables, one piece after the other."""
    yield f"{machine()}, 1 thread, processor seconds. {load()}\n"
    measured = [measured_once(*size, sparsity, kept) for size in sizes for sparsity in sparsities]
    header = ["layer", "sparsity", "seconds", "GB"]
    model = fitted(measured)
    rows = [
        [
            *m.cells(),
            f"{model.seconds_of(m.rows, m.columns, m.sparsity):.1f}",
            f"{model.bytes_of(m.rows, m.columns) / 1e9:.2f}",
        ]
        for m in measured
    ]
    yield f"\n## Measured and fitted\n\n{table([*header, 'fitted seconds', 'fitted GB'], rows)}"
    lines = [
        f"sparsity {sparsity:g}: seconds = {a:.3g} · rows · K² + {b:.3g} · K³"
        for sparsity, (a, b) in model.seconds.items()
    ]
    c, d, e = model.memory
    lines.append(f"bytes = {c:.3g} · rows · K + {d:.3g} · K² + {e:.3g}")
    yield "\n" + "\n".join(f"- {line}" for line in lines) + "\n"
    rows = []
    for sparsity in sparsities:
        m = measured_once(*unseen, sparsity, kept)
        seconds, memory = model.seconds_of(*unseen, sparsity), model.bytes_of(*unseen)
        rows.append(
            [
                *m.cells(),
                f"{seconds:.1f} ({round(100 * (seconds / m.seconds - 1)):+d} %)",
                f"{memory / 1e9:.2f} ({round(100 * (memory / m.memory - 1)):+d} %)",
            ]
        )
    yield f"\n## A size that was not fitted\n\n{table([*header, 'predicted seconds', 'predicted GB'], rows)}"
    header = ["network", "sparsity", "layers", "largest layer, 2 cores"]
    header += [f"{n} machine{'s' if n > 1 else ''} of 2 cores" for n in CLUSTERS] + ["GB of the largest layer"]
    yield f"\n## Predictions, not measured\n\n{table(header, predictions(model))}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_main("cbs_opt.bench.layer_scale", _main, arguments)


def _main(arguments: list[str]) -> int:
    parser = Parser(
        "python -m cbs_opt.bench.layer_scale", "Measure layers, fit a model of time and memory, and predict."
    )
    add: Any = parser.add_argument
    add("--sizes", nargs="+", metavar="ROWSxCOLUMNS", default=[f"{r}x{c}" for r, c in SIZES])
    add("--unseen", metavar="ROWSxCOLUMNS", default=f"{UNSEEN[0]}x{UNSEEN[1]}", help="default: %(default)s")
    add("--sparsities", type=float, nargs="+", default=list(SPARSITIES), metavar="F")
    add(
        "--rows", type=Path, metavar="FILE", help="keep every measurement here, one JSON object a line, and resume"
    )
    add(
        "--write-block", type=Path, metavar="FILE.npz",
        help="write one block of the 7B network, 16 times narrower, as an instance, and end",
    )  # fmt: skip
    add("--one", nargs=3, metavar=("ROWS", "COLUMNS", "F"), help="measure one layer in this process, as JSON")
    options = parser.parse_args(arguments)
    check_outputs((), (options.rows, options.write_block))
    if options.one is not None:
        rows, columns = _size("x".join(options.one[:2]))
        found = measure_here(rows, columns, float(options.one[2]))
        sys.stdout.write(json.dumps(found.__dict__) + "\n")
        return 0
    if options.write_block is not None:
        write_instance(options.write_block, transformer_block(256, 688, 0.7))
        return 0
    if any(not 0 < sparsity < 1 for sparsity in options.sparsities):
        raise UsageError("`--sparsities` must be between 0 and 1")
    for piece in report(
        [_size(text) for text in options.sizes], _size(options.unseen), options.sparsities, options.rows
    ):
        sys.stdout.write(piece)
        sys.stdout.flush()
    return 0


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"a size is ROWSxCOLUMNS, such as 512x2048, got '{text[:40]}'")
    return int(parts[0]), int(parts[1])


if __name__ == "__main__":
    sys.exit(main())
