"""A file larger than the memory to be used: `python -m cbs_opt.bench.large_file` prints a Markdown table.

Room: bench. It writes an instance of random dense blocks, solves it by `cbs-solve` in processes whose data are
limited (`RLIMIT_DATA`, as by `ulimit -d`), and watches how much memory of their own these hold. Mapped pages of
the file, which the system takes back when it needs them, are no memory of their own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cbs_opt.bench.startup import machine
from cbs_opt.cli.common import Parser, run_main
from cbs_opt.errors import UsageError
from cbs_opt.files.npz import Stream, json_text, write_npz
from cbs_opt.typing import FloatArray

_FACTORS = 64  # of each block, whose Hessian is a sum of squares of so many and a ridge
_PERIOD = 0.05  # seconds between two looks at a process


def block_of(b: int, seed: int, k: int) -> FloatArray:
    """Block k: AAᵀ/64 + 0.01 I of a size between 0.1 and 10, float32 (b, b)."""
    rng = np.random.default_rng([seed, k])
    A = rng.standard_normal((b, _FACTORS), dtype=np.float32) * np.float32(10 ** rng.uniform(-0.5, 0.5))
    H = A @ A.T / np.float32(_FACTORS)
    H[np.diag_indices(b)] += np.float32(0.01)
    return np.asarray(np.maximum(H, H.T))


def write_large(path: Path, blocks: int, b: int, sparsity: float, seed: int) -> None:
    """Write an instance of `blocks` blocks of b weights, one block in memory at a time."""

    def entries() -> Iterator[FloatArray]:
        for k in range(blocks):
            yield block_of(b, seed, k).ravel()

    write_npz(
        path,
        {
            "format": np.array("cbs-instance"),
            "version": np.array(1),
            "weights": np.random.default_rng(seed).standard_normal(blocks * b),
            "block_sizes": np.full(blocks, b),
            "budget": np.array(int(sparsity * blocks * b)),
            "hessian": Stream(np.dtype(np.float32), (blocks * b * b,), entries()),
            "metadata": json_text({}),
        },
    )


def solve_limited(path: Path, solver: str, seconds: float, gigabytes: float) -> dict[str, Any]:
    """Run `cbs-solve` with limited data; what it found, and its peak of memory of its own in GB."""
    objective = "joint" if solver in ("joint", "backward", "obs") else "selection"
    most = int(gigabytes * 1e9)
    line = [sys.executable, "-m", "cbs_opt.cli.solve", str(path), "--solver", solver, "--objective", objective]
    line += ["--time-limit", str(seconds), "--threads", "1", "--json", "-", "-q"]
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (most, most)),
    )
    while process.poll() is None:
        peak = max(peak, _own_bytes(process.pid))
        time.sleep(_PERIOD)
    out, errors = process.communicate()
    found = json.loads(out) if process.returncode == 0 else {"error": errors.strip()[-300:]}
    return {**found, "peak": peak / 1e9, "seconds": time.perf_counter() - began}


def _own_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return 1024 * int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_main("cbs_opt.bench.large_file", _main, arguments)


def _main(arguments: list[str]) -> int:
    parser = Parser(
        "python -m cbs_opt.bench.large_file", "Solve a file that is larger than the memory to be used."
    )
    add = parser.add_argument
    add("--blocks", type=int, default=80, metavar="K", help="default: 80")
    add("--size", type=int, default=5000, metavar="B", help="weights of a block; default: 5000, 8 GB in all")
    add("--memory", type=float, default=4.0, metavar="GB", help="limit of the data of a process; default: 4")
    add("--time-limit", type=float, default=60.0, metavar="S", help="of each solver; default: 60")
    add("--solvers", nargs="+", default=["magnitude", "obd", "search", "joint"], metavar="NAME")
    add("--seed", type=int, default=0, metavar="N")
    add("--folder", type=Path, metavar="DIR", help="for the file, which is removed; default: the temporary folder")
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        raise UsageError("needs Linux: it limits processes and reads /proc")
    sys.stdout.write(
        f"{machine()}\n\n| solver | objective | bound | peak of its own memory | time |\n|{'---|' * 5}\n"
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "large.npz"
        write_large(path, options.blocks, options.size, 0.7, options.seed)
        size = path.stat().st_size / 1e9
        for solver in options.solvers:
            found = solve_limited(path, solver, options.time_limit, options.memory)
            what = found.get("error") or f"{found['objective']:.6e} ({found['objective_kind']}, {found['status']})"
            bound = "-" if found.get("bound") is None else f"{found['bound']:.4e}"
            row = (f"`{solver}`", what, bound, f"{found['peak']:.2f} GB", f"{found['seconds']:.0f} s")
            sys.stdout.write(f"| {' | '.join(row)} |\n")
            sys.stdout.flush()
    sys.stdout.write(f"\n{options.blocks} blocks of {options.size} weights, {size:.1f} GB\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
