"""`python -m cbs_opt.bench.gpu`: all parts, each in a process of its own and within its time, then one table.

Room: bench.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cbs_opt.bench.gpu import table
from cbs_opt.bench.gpu.table import COMMAND
from cbs_opt.cli.common import Parser, run_main
from cbs_opt.device import EMULATE
from cbs_opt.errors import UsageError

if TYPE_CHECKING:
    from cbs_opt.bench.gpu.measure import Row

PARTS = {
    "make": ("solver_parts:make", 80.0),
    "card": ("parts:card", 45.0),
    "blocks": ("parts:blocks", 45.0),
    "tests": ("parts:tests", 90.0),
    "dense": ("parts:dense_blocks", 60.0),
    "mlpnet": ("solver_parts:mlpnet", 70.0),
    "search": ("solver_parts:search", 85.0),
    "layers": ("solver_parts:layers", 100.0),
    "update": ("solver_parts:update", 40.0),
    "export": ("solver_parts:export", 60.0),
}
"""The function of each part, and the seconds that it may take at most."""

CORES = ("mlpnet", "resnet20")
"""Instances that one core works on beside the other parts."""

_ASK_FOR_THE_CARD = """
import torch
name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
try:
    from triton import __version__ as triton
except ModuleNotFoundError:
    triton = "is missing"
print(f"{name}, compute capability {capability[0]}.{capability[1]}, torch {torch.__version__}, Triton {triton}")
"""
_LEAST = 0.4  # of the time of a part that is left for it, whatever the parts before it take
_END = 12.0  # seconds that the table and the end of processes may take
_LAST_LINES = 4  # of what a part printed that are shown when it failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_main("cbs_opt.bench.gpu", _main, arguments)


def _main(arguments: list[str]) -> int:
    parser = Parser(COMMAND, "Measure the package on one card; every part is independent of the others.")
    add = parser.add_argument
    add("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: the card is emulated, for tests")
    add("--tiny", action="store_true", help="sizes that take seconds, also on a CPU; shows that everything runs")
    add("--minutes", type=float, default=7.5, metavar="M", help="time in all; default: 7.5")
    add("--parts", metavar="NAMES", help=f"of {','.join(PARTS)}, by commas; default: all")
    add(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="of gpu.md and gpu.csv; on a card bench/results",
    )
    add("--one", help="run one part in this process; for internal use", metavar="PART")
    add("--folder", type=Path, help="of shared instances; for internal use")
    add("--rows", type=Path, help="file of rows; for internal use")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        os.environ[EMULATE] = "1"
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is declared, so before torch and Triton come
    if options.one:
        return _run_parts(options.one.split(","), options.device, options.tiny, options.folder, options.rows)
    names = list(PARTS) if options.parts is None else options.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"there is no part '{unknown[0]}'; known: {', '.join(PARTS)}")
    if not 0 < options.minutes <= 1000:
        parser.error(f"--minutes must be a number above 0, got {options.minutes:g}")
    return _measure(names, options.device, options.tiny, 60.0 * options.minutes, options.output)


def _run_parts(names: list[str], device: str, tiny: bool, folder: Path, rows: Path) -> int:
    """Run parts in this process; what one raises becomes a row."""
    from cbs_opt.bench.gpu.measure import Bench

    code = 0
    for name in names:
        bench = Bench(name, device, tiny, folder, rows)
        try:
            if name.startswith("core-"):
                from cbs_opt.bench.gpu.solver_parts import core

                core(bench, name.removeprefix("core-"))
                continue
            module, function = PARTS[name][0].split(":")
            getattr(importlib.import_module(f"cbs_opt.bench.gpu.{module}"), function)(bench)
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            bench.row(f"{name}: failed", None, note=f"{type(error).__name__}: {lines[0][:200]}")
            code = 1
    return code


class _Part:
    """Parts in a process of their own."""

    def __init__(self, names: list[str], device: str, tiny: bool, folder: Path) -> None:
        self.names, self.rows = names, folder / f"rows-{names[0]}.jsonl"
        self.log = folder / f"log-{names[0]}.txt"
        environment = dict(os.environ)
        root = Path(__file__).resolve().parents[2]
        if (root / "pyproject.toml").is_file():  # a checkout, maybe not installed
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), environment.get("PYTHONPATH"))))
        if names[0].startswith("core-"):
            environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
            environment["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, "-m", "cbs_opt.bench.gpu", "--one", ",".join(names), "--device", device]
        command += ["--folder", str(folder), "--rows", str(self.rows), *["--tiny"] * tiny]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def end(self) -> None:
        """End the process and its children."""
        if self.process.poll() is None:
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, 9)
            else:
                self.process.kill()
        self.process.wait()

    def wait(self, seconds: float) -> str:
        """Wait so long at most; says in a few words what was wrong, if anything was."""
        from cbs_opt.bench.gpu.measure import read_rows

        try:
            code = self.process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            self.end()
            return f"ended after its {seconds:.0f} s"
        if code == 0 or (code == 1 and read_rows(self.rows)):  # 1: a row says what failed
            return ""
        return f"exit code {code}: {(self.last_lines() or ['nothing printed'])[-1][:200]}"

    def last_lines(self) -> list[str]:
        """The end of what it printed."""
        return [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()][-_LAST_LINES:]


def seconds_of(chosen: Sequence[str], after: Sequence[str], left: float) -> float:
    """Seconds that parts may take at most, of those that are left: what comes after has its least share."""
    own, later = (sum(PARTS[name][1] for name in names) for names in (chosen, after))
    return min(own, max(left - _LEAST * later, _LEAST * own), left)


def _measure(names: list[str], device: str, tiny: bool, seconds: float, output: Path | None) -> int:
    from cbs_opt.bench.gpu.measure import Row, read_rows
    from cbs_opt.bench.startup import machine

    began = time.monotonic()
    name, why_not = _card_name(device)
    if name is None:
        raise UsageError(
            f"no CUDA card answers here{why_not}; `--device cpu --tiny` shows that everything runs, emulated"
        )
    if output is None and device == "cuda" and not tiny:
        output = Path(__file__).resolve().parents[1] / "results"
    rows: list[Row] = []
    cores: list[_Part] = []
    running: list[_Part] = []

    def left() -> float:
        return seconds - _END - (time.monotonic() - began)

    with tempfile.TemporaryDirectory(prefix="cbs-gpu-") as temporary:
        folder = Path(temporary)
        try:
            # Where all is tiny one process does everything: starting ten would take longer than their work.
            for chosen in [["make"], [name for name in names if name != "make"]] if tiny else [[n] for n in names]:
                if not chosen or (chosen == ["make"] and "make" not in names):
                    continue
                if left() <= 1:
                    rows.append(Row(chosen[0], f"{chosen[0]}: not run, no time left", None))
                    continue
                after = names[names.index(chosen[-1]) + 1 :]
                limit = seconds_of(chosen, after, left())
                _say(f"{', '.join(chosen)} …")
                part = _Part(chosen, device, tiny, folder)
                running.append(part)
                wrong = part.wait(limit)
                rows += read_rows(part.rows)
                if wrong:
                    rows.append(Row(chosen[0], f"{chosen[0]}: failed", None, note=wrong))
                _write(rows, f"{name}; not finished", output)
                if wrong or part.process.returncode:
                    for line in part.last_lines():
                        _say(f"    {line}")
                if chosen == ["make"]:
                    there = [name for name in CORES if (folder / f"{name}.npz").is_file()]
                    cores = [_Part([f"core-{name}"], device, tiny, folder) for name in there]
                    running += cores
            for part in cores:
                if wrong := part.wait(left()):
                    rows.append(Row(part.names[0], f"{part.names[0]}: failed", None, note=wrong))
                rows += read_rows(part.rows)
        finally:
            for part in running:
                part.end()
    rows += table.comparisons(rows, tiny)
    spent = time.monotonic() - began
    about = f"{name}; {machine()}; {time.strftime('%Y-%m-%d')}; {spent:.0f} s in all"
    about += "; tiny sizes, which say nothing about speed" if tiny else ""
    _write(rows, about, output)
    sys.stdout.write("\n".join(["", about, "", *table.lines(rows), ""]))
    sys.stdout.flush()
    return 0 if any(row.value is not None for row in rows) else 4


def _write(rows: Sequence[Row], about: str, output: Path | None) -> None:
    """The page and the table; after every part, so that nothing is lost where this process is ended."""
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "gpu.md").write_text(table.markdown(rows, about), encoding="utf-8")
        (output / "gpu.csv").write_text(table.csv_text(rows), encoding="utf-8")


def _card_name(device: str) -> tuple[str | None, str]:
    """The card, asked for by a child, as this process keeps away from it; None without one, and why."""
    if device == "cpu":
        return "no card: emulated on the CPU", ""
    code = _ASK_FOR_THE_CARD
    try:  # a first import of torch may take a minute
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=150, check=False
        )
    except subprocess.TimeoutExpired:
        return None, " within 150 s"
    last = (done.stderr.strip().splitlines() or [""])[-1][:200]
    return done.stdout.strip() or None, f": {last}" if last else ""


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
