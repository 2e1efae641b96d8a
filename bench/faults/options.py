"""Cases that give commands absurd options: answered in one sentence, before any work."""

from __future__ import annotations

from pathlib import Path

from cbs_opt.bench.faults.damage import Generator
from cbs_opt.bench.faults.material import Material
from cbs_opt.bench.faults.processes import Surroundings, run
from cbs_opt.bench.faults.verdict import Finding

_VALUES = (
    "", "-1", "0", "nan", "inf", "-inf", "1e999", "1e-320", "99999999999999999999", "0x10", "１", "½", "a b",
    "\x1b[31m", "../..", "/", "/proc/self/mem", "none", "true", "[]", "{}", "=", "x=y", "re:(",
    "re:(a+)+$", "é" * 300, "no/such/folder/file.npz", "\n", "library:", "library:nothing", "--", "-", "1:2",
    "4:2", "0:0", "9" * 400,
)  # fmt: skip

_OPTIONS = {
    "solve": (
        "--solver", "--objective", "--sparsity", "--budget", "--time-limit", "--damping", "--max-iterations",
        "--no-improvement", "--target", "--gap", "--seed", "--device", "--threads", "--batch-size", "--set",
        "--config", "--solution", "--warm-start", "--json", "--history", "--check", "--update",
    ),
    "info": ("--solution", "--picture", "--json", "--export", "--verify"),
    "export": (
        "--checkpoint", "--data", "--samples", "--batch", "--source", "--fisher", "--curvature", "--blocks",
        "--loss", "--metric", "--damping", "--relative-damping", "--sparsity", "--nm", "--tensors", "--exclude",
        "-o",
    ),
    "apply": ("--checkpoint", "--data", "-o", "--network", "--picture", "--update-scale", "--max-drop", "--onnx"),
    "bench": ("-o", "--engine", "--workers", "--time-limit", "--fail-above", "--json", "--title", "--profile"),
}  # fmt: skip


def absurd_options(material: Material, rng: Generator, folder: Path) -> Finding:
    """A command line that is valid but for a few options or arguments."""
    command = str(rng.choice([*_OPTIONS]))
    arguments = _valid(command, material, rng)
    for _ in range(int(rng.integers(1, 4))):
        options = _OPTIONS[command]
        more = [options[int(rng.integers(len(options)))]]
        if rng.random() < 0.9:
            more.append(_VALUES[int(rng.integers(len(_VALUES)))])
        if rng.random() < 0.2:
            more = more[1:]
        at = int(rng.integers(len(arguments) + 1)) if rng.random() < 0.3 else len(arguments)
        arguments[at:at] = more
    if command == "solve":
        arguments += ["--time-limit", "1"]
    found = run(command, arguments, Surroundings(folder)).finding()
    return found.where(f"cbs-{command} {arguments!r}") if found.is_fault else material.check()


def _valid(command: str, material: Material, rng: Generator) -> list[str]:
    files = {name: str(path) for name, path in material.files.items()}
    if command == "solve":
        return [files["hessian"], "--solver", str(rng.choice(["obd", "ls", "search"]))]
    if command == "info":
        return [files["hessian"]]
    if command == "export":
        return [
            "digits-mlp", "--data", "digits", "--checkpoint", files["network.pt"], "--samples", "10",
            "-o", "out.npz",
        ]  # fmt: skip
    if command == "apply":
        return [files["hessian"], files["solution"], "--checkpoint", files["network.pt"], "-o", "out.pt"]
    return [["report", files["store"], "-o", "report"], ["compare", files["store"], files["store"]], ["list"]][
        int(rng.integers(3))
    ]
