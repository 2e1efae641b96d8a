"""Layers against their peers: `python -m cbs_opt.bench.layers FOLDER` prints Markdown tables.

`solvers.layers` compared with magnitude, SparseGPT and ALPS (`cbs_opt.bench.layer_peers`) on layers of networks,
at the peers' own time and later, its certified gap, the selection problem compared with Wanda with 1-swaps, and
generated large layers. FOLDER holds `.npz` files of `weight` (rows, K) and `covariance` (K, K); the Hessian is
the covariance plus a hundredth of its mean diagonal. Errors are relative, Σ (ŵ − w)ᵀH(ŵ − w) / Σ wᵀHw, recomputed
in float64.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cbs_opt.bench import layer_peers as peers
from cbs_opt.bench.anytime import CLOCKS, load
from cbs_opt.bench.kept import once
from cbs_opt.bench.large_layers import DAMPING, generate
from cbs_opt.bench.layer_peers import Pattern
from cbs_opt.bench.layer_pictures import Course, draw
from cbs_opt.bench.startup import machine
from cbs_opt.cli.common import Parser, check_outputs, run_main
from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.files.atomic import atomic_write, write_text
from cbs_opt.solvers.layers.problem import Layer, LayerBudget, LayerSolution
from cbs_opt.solvers.layers.solve import solve_layers
from cbs_opt.solvers.layers.warm_up import layers_joint, layers_selection
from cbs_opt.threads import library_threads
from cbs_opt.typing import BoolArray, FloatArray, IntArray

SPARSITIES = (0.5, 0.7, 0.8, 0.9)
PEERS = ("magnitude, refit", "SparseGPT, refit", "ALPS")
LARGE = (512, 2048, 4096)
"""Rows, columns and samples of the generated layer."""
GAP_SPARSITIES = (0.5, 0.8, 0.9)


@dataclass
class Timed:
    """Relative error of a method and the seconds it took."""

    error: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.error:.4e} ({self.seconds:.2f} s)"


@dataclass
class Case:
    """A layer with one clock for all methods."""

    name: str
    weights: FloatArray
    hessian: FloatArray
    clock: Callable[[], float]
    threads: int

    def __post_init__(self) -> None:
        self.layer = Layer(self.weights, self.hessian)
        self.reference = float(np.einsum("rk,rk->", self.weights @ self.hessian, self.weights))

    def error(self, weights: FloatArray) -> float:
        """Relative error of weights of the layer."""
        change = weights - self.weights
        return float(np.einsum("rk,rk->", change @ self.hessian, change)) / self.reference

    def timed(self, method: Callable[[], FloatArray]) -> Timed:
        """Error and seconds of a method that returns weights."""
        with library_threads(self.threads):
            began = self.clock()
            weights = method()
            seconds = self.clock() - began
        return Timed(self.error(weights), seconds)

    def solve(self, budget: LayerBudget, seconds: float, **options: object) -> LayerSolution:
        """Our own answer after the given number of seconds."""
        return solve_layers(
            [self.layer],
            budget,
            time_limit=seconds,
            threads=self.threads,
            clock=self.clock,
            **options,  # type: ignore[arg-type]
        )

    def error_at(self, solution: LayerSolution, seconds: float) -> float:
        """Relative error of the incumbent after the given number of seconds; infinite before the first."""
        found = [objective for at, objective, _ in solution.history if at <= seconds and objective is not None]
        return 2 * min(found, default=np.inf) / self.reference

    def peers(
        self, count: int | None, pattern: tuple[int, int] | None = None, names: Sequence[str] = PEERS
    ) -> dict[str, Timed]:
        """Magnitude and SparseGPT with an exact refit, and ALPS; or those of them that are named."""
        W, S = self.weights, self.hessian

        def refitted(mask: BoolArray) -> FloatArray:
            return peers.refit(W, S, mask)

        methods = {
            "magnitude, refit": lambda: refitted(peers.magnitude(W, S, count, pattern)),
            "SparseGPT, refit": lambda: refitted(peers.sparsegpt(W, S, count, pattern)[0]),
            "ALPS": lambda: peers.alps(W, S, count, pattern)[1],
        }
        return {name: self.timed(method) for name, method in methods.items() if name in names}


def read_layer(path: Path, clock: Callable[[], float], threads: int) -> Case:
    """A layer file; raises `InstanceError` where an array is missing."""
    with np.load(path, allow_pickle=False) as file:
        missing = [key for key in ("weight", "covariance") if key not in file]
        if missing:
            raise InstanceError(f"{path}: no array `{missing[0]}`; a layer needs `weight` and `covariance`")
        W, S = file["weight"].astype(np.float64), file["covariance"].astype(np.float64)
    return Case(path.stem, W, S + DAMPING * float(np.mean(np.diag(S))) * np.eye(S.shape[0]), clock, threads)


def peak_memory() -> float:
    """Largest resident memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def generated_layer(rows: int, columns: int, samples: int, clock: Callable[[], float], threads: int) -> Case:
    """Gaussian weights, and inputs whose spectrum falls like 1/k; see `large_layers.generate`."""
    W, S = generate(rows, columns, samples)
    return Case(f"generated {rows} × {columns}, m = {samples}", W, S, clock, threads)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def joint_rows(
    case: Case,
    sparsities: Sequence[float],
    seconds: float,
    times: float = 10.0,
    patterns: Sequence[Pattern] = (),
    names: Sequence[str] = PEERS,
) -> list[list[object]]:
    """One row for each sparsity or N:M: the peers, our error at their time, at `times` that, and at the end."""
    counts = [(f"{s:g}", int(np.ceil(s * case.weights.size)), None) for s in sparsities]
    out: list[list[object]] = []
    for name, count, pattern in [*counts, *((f"{p[0]}:{p[1]}", None, p) for p in patterns)]:
        found = case.peers(count, pattern, names)
        best = min(found.values(), key=lambda timed: timed.error)
        solution = case.solve(LayerBudget(total=count, pattern=pattern), max(seconds, times * best.seconds))
        errors = [case.error_at(solution, t) for t in (best.seconds, times * best.seconds, np.inf)]
        cells = [f"{error:.4e} ({100 * (error / best.error - 1):+.2f} %)" for error in errors]
        out.append([case.name, name, *found.values(), *cells])
    return out


def gap_rows(
    case: Case,
    sparsities: Sequence[float],
    seconds: float,
    courses: dict[float, list[Course]] | None = None,
    kept: Path | None = None,
) -> list[list[object]]:
    """Objective, bound and gap after the given number of seconds.

    courses : by sparsity, receives the history of the run and the other methods. kept : see `kept_course`.
    """
    out: list[list[object]] = []
    for sparsity in sparsities:
        course = kept_course(case, sparsity, seconds, kept)
        (error, bound) = (float(value or 0.0) for value in course.history[-1][1:])
        if courses is not None:
            courses.setdefault(sparsity, []).append(course)
        gap = f"{100 * (1 - bound / error):.1f} %"
        out.append([case.name, f"{sparsity:g}", f"{error:.4e}", f"{bound:.4e}", gap])
    return out


def kept_course(case: Case, sparsity: float, seconds: float, kept: Path | None) -> Course:
    """One run with bounds, and the other methods; from a file of finished ones, or new and added to it.

    The file holds a JSON object a line.
    """
    title = f"{case.name}, sparsity {sparsity:g}"
    return once(
        kept,
        Course,
        lambda course: (course.title, course.seconds) == (title, seconds),
        lambda: _course(case, sparsity, seconds, title),
    )


def _course(case: Case, sparsity: float, seconds: float, title: str) -> Course:
    count = int(np.ceil(sparsity * case.weights.size))
    solution = case.solve(LayerBudget(total=count), seconds, bound_share=0.8)
    found = {name: (peer.seconds, peer.error) for name, peer in case.peers(count).items()}
    history = [
        (at, None if loss is None else 2 * loss / case.reference, 2 * (low or 0.0) / case.reference)
        for at, loss, low in solution.history
    ]
    history.append((seconds, case.error(solution.weights[0]), 2 * (solution.bound or 0.0) / case.reference))
    return Course(title, found, history, seconds)


def selection_rows(case: Case, sparsities: Sequence[float], seconds: float) -> list[list[object]]:
    """Selection with budgets for each row: Wanda, Wanda with 1-swaps, and ours at the same time and at the end."""
    out: list[list[object]] = []
    W, S = case.weights, case.hessian
    for sparsity in sparsities:
        per_row: IntArray = np.full(W.shape[0], int(np.ceil(sparsity * W.shape[1])), dtype=np.int64)
        start = peers.wanda(W, S, per_row)
        peers.sparse_swaps(W[:1], S, start[:1], 1)
        wanda = case.error(np.where(start, 0.0, W))
        swapped: list[BoolArray] = []

        def swaps(start: BoolArray = start, swapped: list[BoolArray] = swapped) -> FloatArray:
            swapped.append(peers.sparse_swaps(W, S, start)[0])
            return np.where(swapped[0], 0.0, W)

        peer = case.timed(swaps)
        solution = case.solve(
            LayerBudget(per_row=(per_row,)), max(seconds, peer.seconds), objective="selection", bound_share=0.4
        )
        _, exchanges = peers.sparse_swaps(W, S, solution.pruned[0])
        at = case.error_at(solution, peer.seconds)
        out.append(
            [case.name, f"{sparsity:g}", f"{wanda:.4e}", peer]
            + [f"{e:.4e} ({100 * (e / peer.error - 1):+.2f} %)" for e in (at, case.error(solution.weights[0]))]
            + [exchanges, f"{100 * (solution.gap or 1.0):.1f} %"]
        )
    return out


def report(
    folder: Path,
    parts: Sequence[str],
    sparsities: Sequence[float],
    seconds: float,
    gap_seconds: float,
    threads: int,
    clock: str,
    shape: tuple[int, int, int] = LARGE,
    courses: dict[float, list[Course]] | None = None,
    kept: Path | None = None,
    patterns: Sequence[Pattern] = ((2, 4),),
    names: Sequence[str] = PEERS,
) -> Iterator[str]:
    """The tables, one piece after the other as they are made."""
    gaps_at = [sparsity for sparsity in sparsities if sparsity in GAP_SPARSITIES] or sparsities
    layers_joint()
    layers_selection()
    yield f"{machine()}, {threads} thread{'s' if threads > 1 else ''}, {clock} seconds. {load()}\n"
    paths = sorted(folder.glob("*.npz")) if folder.is_dir() else []
    if not paths and set(parts) & {"joint", "gap", "row", "selection"}:
        yield f"\nNOT MEASURED: no layers (*.npz) in {folder}.\n"
        parts = [part for part in parts if part.startswith("large")]
    cases = [read_layer(path, CLOCKS[clock], threads) for path in paths]
    if "joint" in parts:
        header = ["layer", "sparsity", "magnitude, refit", "SparseGPT, refit", "ALPS"]
        header += ["ours at the best peer's time", "at 10 × that time", f"after {seconds:g} s or more"]
        rows = [row for case in cases for row in joint_rows(case, sparsities, seconds)]
        yield f"\n## Joint: one budget over the layer\n\n{table(header, rows)}"
    if "row" in parts:
        rows = []
        for case in cases:
            single = Case(f"{case.name}, row 0", case.weights[:1], case.hessian, case.clock, threads)
            rows += gap_rows(single, gaps_at, seconds)
        header = ["row", "sparsity", "error", "bound", "gap"]
        yield f"\n## Single rows, {seconds:g} s\n\n{table(header, rows)}"
    if "selection" in parts:
        header = ["layer", "sparsity", "Wanda", "Wanda and 1-swaps", "ours at that time", f"after {seconds:g} s"]
        header += ["1-swaps left", "gap"]
        rows = [row for case in cases for row in selection_rows(case, (0.5, 0.6), seconds)]
        yield f"\n## Selection: budgets for each row, fixed weights\n\n{table(header, rows)}"
    if "gap" in parts:
        rows = [row for case in cases for row in gap_rows(case, gaps_at, gap_seconds, courses, kept)]
        header = ["layer", "sparsity", "error", "bound", "gap"]
        yield f"\n## Certified gaps after {gap_seconds:g} s\n\n{table(header, rows)}"
    if "large" in parts:
        header = ["layer", "sparsity", *names]
        header += ["ours at the best peer's time", f"after {seconds:g} s or that time"]
        case = generated_layer(*shape, CLOCKS[clock], threads)
        found = joint_rows(case, sparsities, seconds, 1.0, patterns, names)
        rows = [[*row[:-2], row[-1]] for row in found]
        memory = f"Peak memory of the process: {peak_memory():.1f} GB."
        yield f"\n## A generated layer\n\n{table(header, rows)}\n{memory}\n"


_DRAWN = 0.8  # the sparsity of the picture, if there is one
PARTS = ("joint", "gap", "row", "selection", "large")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_main("cbs_opt.bench.layers", _main, arguments)


def _main(arguments: list[str]) -> int:
    parser = Parser("python -m cbs_opt.bench.layers", "Print errors and gaps of layers and of other methods.")
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="layers as .npz files of `weight` and `covariance`")
    add("--parts", choices=PARTS, nargs="+", default=["joint", "gap", "row", "selection"], metavar="PART")
    add("--sparsities", type=float, nargs="*", default=list(SPARSITIES), metavar="F")
    add(
        "--shape", type=int, nargs=3, default=list(LARGE), metavar=("ROWS", "COLUMNS", "SAMPLES"),
        help="of the generated layer of the part `large`; default: %(default)s",
    )  # fmt: skip
    add("--patterns", nargs="*", default=["2:4"], metavar="N:M", help="of the part `large`; default: %(default)s")
    add("--peers", choices=PEERS, nargs="+", default=list(PEERS), metavar="NAME", help="of the part `large`")
    add("--seconds", type=float, default=20.0, metavar="S", help="of our own runs")
    add("--gap-seconds", type=float, metavar="S", help="of the runs for gaps; default: three times --seconds")
    add(
        "--picture", type=Path, metavar="FILE.png", help="draw error and bound over time at .8; needs the part gap"
    )
    add("--rows", type=Path, metavar="FILE", help="keep finished runs of the part gap here, and go on from them")
    add("--threads", type=int, default=1, metavar="N")
    add("--clock", choices=tuple(CLOCKS), default="processor", help="default: processor")
    add("-o", "--output", type=Path, metavar="FILE.md", help="also write the tables to a file")
    options = parser.parse_args(arguments)
    check_outputs((), (options.output, options.picture, options.rows))
    if options.seconds <= 0 or any(not 0 < s < 1 for s in options.sparsities):
        raise UsageError("`--seconds` must be positive and `--sparsities` between 0 and 1")
    if min(options.shape) < 4 or options.shape[1] % 4:
        raise UsageError("`--shape` needs at least 4 rows, columns and samples, and a multiple of 4 columns")
    gap_seconds = 3 * options.seconds if options.gap_seconds is None else options.gap_seconds
    if not gap_seconds > 0:
        raise UsageError("`--gap-seconds` must be positive")
    if options.picture is not None and "gap" not in options.parts:
        raise UsageError("`--picture` draws the runs of the part gap: add it to `--parts`")
    pieces = []
    courses: dict[float, list[Course]] | None = None if options.picture is None else {}
    for piece in report(
        options.folder,
        options.parts,
        options.sparsities,
        options.seconds,
        gap_seconds,
        options.threads,
        options.clock,
        tuple(options.shape),
        courses,
        options.rows,
        [_pattern(text) for text in options.patterns],
        options.peers,
    ):
        sys.stdout.write(piece)
        sys.stdout.flush()
        pieces.append(piece)
    if options.output is not None:
        write_text(options.output, "".join(pieces))
    if courses:
        figure = draw(courses.get(_DRAWN) or next(iter(courses.values())))
        with atomic_write(options.picture) as file:
            figure.savefig(file, format=options.picture.suffix.lstrip(".") or "png")
    return 0


def _pattern(text: str) -> Pattern:
    n, colon, m = text.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal() and int(n) <= int(m)):
        raise UsageError(f"`--patterns` are of the form N:M, such as 2:4, got '{text[:40]}'")
    return int(n), int(m)


if __name__ == "__main__":
    sys.exit(main())
