"""Cases that interrupt commands: by signals at random moments, by SIGKILL with a restart."""

from __future__ import annotations

import json
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from cbs_opt import CbsError, read_certificate, read_instance, read_solution
from cbs_opt.bench.faults.damage import Generator
from cbs_opt.bench.faults.material import Material
from cbs_opt.bench.faults.processes import Finished, Surroundings, run, run_fresh
from cbs_opt.bench.faults.verdict import FINE, Finding, Verdict

OLD = b"an output of an earlier run"


def interrupted(material: Material, rng: Generator, folder: Path) -> Finding:
    """A command gets one or two signals; what it writes is complete, or as it was before."""
    name, command, arguments, outputs, seconds = command_lines(material)[
        int(rng.integers(len(command_lines(material))))
    ]
    number = int(rng.choice([signal.SIGINT, signal.SIGTERM]))
    compiling = rng.random() < 0.15
    fresh = compiling or rng.random() < 0.3
    delay = float(rng.uniform(0.0, seconds + (0.7 if fresh else 0.0)))
    signals = [(delay, number)]
    if rng.random() < 0.25:
        signals.append((float(rng.uniform(0.0, 0.3)), number))
    environment: dict[str, str | None] = {}
    if compiling:
        environment["CBS_OPT_CACHE"] = str(folder / "cache")
    old = [output for output in outputs if rng.random() < 0.5]
    for output in old:
        (folder / output).write_bytes(OLD)
    there = Surroundings(folder, environment, signals=signals)
    done = (run_fresh if fresh else run)(command, arguments, there)
    found = done.finding((0, 1, 130))
    if not found.is_fault:
        found = check_outputs(done, folder, outputs, old)
    if not found.is_fault:
        found = material.check()
    return found.where(f"{name}, {'fresh' if fresh else 'forked'}, signals {signals}, {environment}")


def killed_and_resumed(material: Material, rng: Generator, folder: Path) -> Finding:
    """`cbs-bench run` and `cbs-prune` are killed again and again, and end with what an undisturbed run gives."""
    if rng.random() < 0.5:
        return _resumed_bench(material, rng, folder)
    return _resumed_prune(material, rng, folder)


def _resumed_bench(material: Material, rng: Generator, folder: Path) -> Finding:
    store = folder / "store.sqlite"
    arguments = ["run", material.files["configuration"], "-o", store, "-q"]
    if rng.random() < 0.3:
        arguments += ["--workers", "2"]
    delays, rows = [], 0
    for _ in range(int(rng.integers(1, 5))):
        delays.append(float(rng.uniform(0.0, 0.6)))
        done = run("bench", arguments, Surroundings(folder, signals=[(delays[-1], signal.SIGKILL)]))
        found = done.finding()
        if found.is_fault:
            return found.where(f"killed after {delays}")
        if store.exists():
            now = _rows(store)
            if now < rows:
                return Finding(Verdict.LOST, f"killed after {delays}: {rows} rows, then {now}")
            rows = now
    done = run("bench", arguments, Surroundings(folder))
    found = done.finding((0,))
    if not found.is_fault and _rows(store) != _rows(material.files["store"]):
        found = Finding(Verdict.LOST, f"{_rows(store)} rows at the end")
    return found.where(f"killed after {delays}")


def _resumed_prune(material: Material, rng: Generator, folder: Path) -> Finding:
    arguments = [*_prune(material), "-o", "out.safetensors"]
    delays = [float(rng.uniform(0.0, 1.5)) for _ in range(int(rng.integers(1, 3)))]
    for delay in delays:
        done = run("prune", arguments, Surroundings(folder, signals=[(delay, signal.SIGKILL)]))
        found = done.finding()
        if found.is_fault:
            return found.where(f"killed after {delays}")
        if (folder / "out.safetensors").exists():
            found = _readable(folder / "out.safetensors")
            if found.is_fault:
                return found.where(f"killed after {delays}")
    done = run("prune", arguments, Surroundings(folder))
    found = done.finding((0,))
    if not found.is_fault and not (folder / "out.safetensors").exists():
        found = Finding(Verdict.LOST, "no output at the end")
    return found.where(f"prune killed after {delays}")


def two_at_once(material: Material, rng: Generator, folder: Path) -> Finding:
    """Two processes on one store, one output, one empty cache; the second may be refused in a sentence."""
    import multiprocessing

    kind = str(rng.choice(["store", "solution", "cache"]))
    store = folder / "store.sqlite"
    lines: dict[str, tuple[str, list[object]]] = {
        "store": ("bench", ["run", material.files["configuration"], "-o", store, "-q"]),
        "solution": ("solve", [material.files["hessian"], "--solver", "search", "--solution", "s.npz", "-q"]),
        "cache": ("solve", [material.files["hessian"], "--solver", "ls", "--solution", "s.npz", "-q"]),
    }
    environment = {"CBS_OPT_CACHE": str(folder / "cache")} if kind == "cache" else {}
    command, arguments = lines[kind]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        waits = [0.0, float(rng.uniform(0.0, 0.3))]
        runs = [
            pool.apply_async(_late, (wait, command, arguments, Surroundings(folder, environment)))
            for wait in waits
        ]
        both = [each.get() for each in runs]
    for done in both:
        found = done.finding((0, 2, 3) if kind == "store" else (0,))
        if found.is_fault:
            return found.where(f"two on one {kind}")
    if kind == "store":
        if all(done.code != 0 for done in both):
            return Finding(Verdict.CRASHED, f"both of two processes were refused: {both[0].err}")
        run(command, arguments, Surroundings(folder))
        if _rows(store) != _rows(material.files["store"]):
            return Finding(Verdict.LOST, f"{_rows(store)} rows of two processes")
        return FINE
    return _readable(folder / "s.npz").where(f"two on one {kind}")


def _late(wait: float, command: str, arguments: list[object], there: Surroundings) -> Finished:
    import time

    time.sleep(wait)
    return run(command, arguments, there)


# Command lines -----------------------------------------------------------------------------------------------


Line = tuple[str, str, list[object], list[str], float]


def _prune(material: Material) -> list[object]:
    return [
        "digits-mlp", "--checkpoint", material.files["network.safetensors"], "--data", "digits",
        "--sparsity", ".8", "--source", "fisher", "--samples", "40", "--stages", "2", "--solver", "magnitude",
    ]  # fmt: skip


def command_lines(material: Material) -> list[Line]:
    """Name, command, arguments, outputs, and seconds that it takes at most, roughly."""
    files = material.files
    export: list[object] = [
        "digits-mlp", "--data", "digits", "--checkpoint", files["network.pt"], "--samples", "100", "-o", "x.npz",
    ]  # fmt: skip
    large = "library:digits-mlp"
    return [
        ("search", "solve", [large, "--time-limit", "2", "--solution", "s.npz", "--json", "r.json"],
         ["s.npz", "r.json"], 3.0),
        ("joint", "solve", [large, "--objective", "joint", "--time-limit", "2", "--solution", "s.npz"],
         ["s.npz"], 3.0),
        ("exact", "solve", [large, "--solver", "exact", "--set", "certificate=c.npz", "--time-limit", "2"],
         ["c.npz"], 3.0),
        ("cbs", "solve", [large, "--solver", "cbs", "--json", "r.json", "--time-limit", "2"], ["r.json"], 2.0),
        ("path", "solve", [large, "--sparsity", ".5", ".7", "--time-limit", "1", "--json", "r.json"],
         ["r.json"], 3.0),
        ("check", "solve", [files["proven"], "--check", files["certificate"], "--json", "r.json"],
         ["r.json"], 0.2),
        ("info", "info", [large, "--picture", "p.png", "--json", "r.json"], ["p.png", "r.json"], 1.5),
        ("lp", "info", [files["hessian"], "--export", "x.lp"], ["x.lp"], 0.5),
        ("export", "export", export, ["x.npz"], 1.5),
        ("prune", "prune", [*_prune(material), "-o", "out.safetensors"], ["out.safetensors"], 2.0),
        ("bench", "bench", ["run", files["configuration"], "-o", "new.sqlite"], [], 1.0),
        ("report", "bench", ["report", files["store"], "-o", "report"], [], 2.0),
        ("compare", "bench", ["compare", files["store"], files["store"], "--json", "r.json"], ["r.json"], 0.3),
    ]  # fmt: skip


# What they left ----------------------------------------------------------------------------------------------


def check_outputs(done: Finished, folder: Path, outputs: list[str], old: list[str]) -> Finding:
    """Every output is complete, absent, or as it was; nothing else is left."""
    for name in outputs:
        path = folder / name
        if not path.exists():
            if name in old:
                return Finding(Verdict.LOST, f"{name} is gone")
            continue
        if path.read_bytes() == OLD and name in old:
            continue
        found = _readable(path)
        if found.is_fault:
            return found
    left = [path.name for path in folder.iterdir() if path.name.endswith(".part")]
    if left and done.code >= 0 and done.code != 130:
        return Finding(Verdict.LOST, f"left behind: {left}")
    return FINE


def _readable(path: Path) -> Finding:
    """Whether a file is complete, by its reader."""
    readers: dict[str, Callable[[Path], object]] = {
        "s.npz": read_solution,
        "c.npz": read_certificate,
        "x.npz": read_instance,
        "r.json": lambda path: json.loads(path.read_text()),
        "p.png": lambda path: path.read_bytes().endswith(b"IEND\xaeB`\x82") or _refuse(path),
        "x.lp": lambda path: path.read_text().rstrip().lower().endswith("end") or _refuse(path),
        "out.safetensors": _safetensors,
    }
    try:
        readers[path.name](path)
    except (CbsError, ValueError, OSError) as error:
        return Finding(Verdict.LOST, f"{path.name} is half written: {error}")
    return FINE


def _refuse(path: Path) -> bool:
    raise ValueError(f"{path.name} has no end")


def _safetensors(path: Path) -> object:
    from safetensors.numpy import load_file

    return load_file(path)


def _rows(store: Path) -> int:
    with closing(sqlite3.connect(store, timeout=30)) as connection:
        tables = connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'rows'").fetchone()[0]
        return int(connection.execute("SELECT count(*) FROM rows").fetchone()[0]) if tables else 0
