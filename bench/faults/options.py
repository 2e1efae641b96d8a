"""Cases that give commands absurd options: answered in one sentence, before any work."""

from __future__ import annotations

import filecmp
import functools
import re
import shutil
from collections.abc import Mapping, Set
from pathlib import Path

from cbs_opt.bench.faults.damage import Generator
from cbs_opt.bench.faults.material import Material
from cbs_opt.bench.faults.processes import Surroundings, run
from cbs_opt.bench.faults.verdict import Finding, Verdict

_VALUES = (
    "", "-1", "0", "nan", "inf", "-inf", "1e999", "1e-320", "99999999999999999999", "0x10", "１", "½", "a b",
    "\x1b[31m", "../..", "/", "/proc/self/mem", "none", "true", "[]", "{}", "=", "x=y", "re:(",
    "re:(a+)+$", "é" * 300, "no/such/folder/file.npz", "\n", "library:", "library:nothing", "--", "-", "1:2",
    "4:2", "0:0", "9" * 400,
)  # fmt: skip
_SENSIBLE = (
    "0.5", "2", "7", "1e-3", "2:4", "auto", "yes", "no", "all", "layer", "row", "full", "global", "exact", "joint",
    "selection", "magnitude", "kfac", "fisher", "reconstruction", "gradients", "hessian", "cpu", "cuda", "dense",
    "digits", "digits-mlp", "library:digits-mlp", "torch.nn:Linear", "starts=2", "out.npz", "out.json",
    "new/x.npz",
)  # fmt: skip
"""What some option takes: others are to refuse it, or to go on with it."""

_COMMANDS = ("solve", "info", "export", "apply", "prune", "bench")
_HARMLESS = ("--help", "--version", "--debug")  # the last asks for tracebacks
_LONG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")


def absurd_options(material: Material, rng: Generator, folder: Path) -> Finding:
    """A command line with a few odd options or arguments; files that these do not name must stay as they are."""
    command = _COMMANDS[int(rng.integers(len(_COMMANDS)))]
    copies = {name: str(shutil.copy(path, folder)) for name, path in material.files.items()}
    arguments = _valid(command, copies, rng)
    options = _options(command, arguments[0] if command == "bench" else None, material.folder)
    untouched = set(copies.values())
    values = (*_VALUES, *_SENSIBLE, *copies.values())
    for _ in range(int(rng.integers(1, 4))):
        more = [options[int(rng.integers(len(options)))]]
        if rng.random() < 0.9:
            more.append(values[int(rng.integers(len(values)))])
        if rng.random() < 0.2:
            more = more[1:]
        untouched -= set(more)
        at = int(rng.integers(len(arguments) + 1)) if rng.random() < 0.3 else len(arguments)
        arguments[at:at] = more
    if command in ("solve", "prune"):
        arguments += ["--time-limit", "1"]
    found = run(command, arguments, Surroundings(folder)).finding()
    changed = [path.name for path in material.files.values() if _differs(path, folder, untouched)]
    if changed and not found.is_fault:
        found = Finding(Verdict.LOST, f"changed: {', '.join(changed)}")
    return found.where(f"cbs-{command} {arguments!r}") if found.is_fault else material.check()


def _differs(original: Path, folder: Path, untouched: Set[str]) -> bool:
    """Whether the copy of a file, one of those that no odd option names, is another or gone."""
    copy = folder / original.name
    return str(copy) in untouched and not (copy.exists() and filecmp.cmp(original, copy, shallow=False))


@functools.cache
def _options(command: str, part: str | None, folder: Path) -> list[str]:
    """The long options of a command, or of a part of `bench`, by its own help."""
    told = run(command, [*([] if part is None else [part]), "--help"], Surroundings(folder)).out
    return [*dict.fromkeys(name for name in _LONG.findall(told) if name not in _HARMLESS), "-o", "-q"]


def _valid(command: str, files: Mapping[str, str], rng: Generator) -> list[str]:
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
    if command == "prune":
        return [
            "digits-mlp", "--data", "digits", "--checkpoint", files["network.safetensors"], "--samples", "10",
            "--sparsity", ".8", "--source", str(rng.choice(["fisher", "kfac", "reconstruction"])),
            "--solver", "magnitude", "-o", "out.safetensors",
        ]  # fmt: skip
    return [
        ["report", files["store"], "-o", "report"],
        ["compare", files["store"], files["store"]],
        ["run", files["configuration"], "-o", "new.sqlite"],
        ["paper", "mlpnet", "--checkpoint", files["network.npz"], "--data", files["images"], "--dry-run"],
        ["list"],
    ][int(rng.integers(5))]
