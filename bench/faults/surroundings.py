"""Cases that run commands in hostile surroundings: no memory, disk or permission, closed streams, odd clocks."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cbs_opt.bench.faults.damage import Generator
from cbs_opt.bench.faults.material import Material
from cbs_opt.bench.faults.processes import (
    Finished,
    Surroundings,
    drop_privileges,
    limit_memory,
    mount_small_disk,
    run,
    run_fresh,
)
from cbs_opt.bench.faults.signals import OLD, check_outputs, command_lines
from cbs_opt.bench.faults.verdict import Finding, Verdict


def small_memory(material: Material, rng: Generator, folder: Path) -> Finding:
    """A command may ask for 0.1 MB to 1 GB more than what is loaded."""
    more = int(10.0 ** rng.uniform(5, 9))
    return _in(material, rng, folder, f"{more} bytes of memory", partial(limit_memory, more))


def full_disk(material: Material, rng: Generator, folder: Path) -> Finding:
    """Files may not grow beyond a few kB, or the disk is that small."""
    size = 4096 * int(rng.integers(1, 12))
    if rng.random() < 0.5:
        limits = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
        return _in(material, rng, folder, f"files of {size} bytes at most", limits)

    def mounted() -> None:
        mount_small_disk(folder, size)
        os.chdir(folder)

    try:
        if os.geteuid() != 0:
            raise OSError("not root")
        return _in(material, rng, folder, f"a disk of {size} bytes", mounted, keeps=False)
    except OSError as error:
        return Finding(Verdict.SKIPPED, f"no file system can be mounted here: {error}")


def few_descriptors(material: Material, rng: Generator, folder: Path) -> Finding:
    """A process may have three to thirty files open."""
    number = int(rng.integers(3, 30))
    limits = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (number, number))
    return _in(material, rng, folder, f"{number} open files", limits)


def jumping_clock(material: Material, rng: Generator, folder: Path) -> Finding:
    """The clock of the system jumps while a command runs: limits hold all the same."""
    now = time.time
    offsets = [float(offset) for offset in rng.choice([-1e9, -3600.0, -0.5, 0.5, 3600.0, 1e9], 3)]

    def jump() -> None:
        calls = [0]

        def jumping() -> float:
            calls[0] += 1
            return now() + offsets[calls[0] % 3]

        time.time = jumping

    began = time.monotonic()
    found = _in(material, rng, folder, f"a clock that jumps by {offsets}", jump, codes=(0,))
    if not found.is_fault and time.monotonic() - began > 60.0:
        return Finding(Verdict.HUNG, f"{time.monotonic() - began:.0f} s with a clock that jumps by {offsets}")
    return found


def _in(
    material: Material,
    rng: Generator,
    folder: Path,
    where: str,
    prepare: Callable[[], object],
    keeps: bool = True,
    codes: tuple[int, ...] = (0, 1, 2, 3, 4),
) -> Finding:
    """A command after `prepare` in its process; `keeps`: its outputs can be seen from here."""
    lines = command_lines(material)
    name, command, arguments, outputs, _ = lines[int(rng.integers(len(lines)))]
    old = [output for output in outputs if rng.random() < 0.5]
    for output in old:
        (folder / output).write_bytes(OLD)
    done = run(command, arguments, Surroundings(folder, prepare=lambda: _call(prepare)))
    if "the surroundings cannot be made" in done.err:
        return Finding(Verdict.SKIPPED, done.err[-300:])
    found = done.finding(codes)
    if not found.is_fault and keeps:
        found = check_outputs(done, folder, outputs, old)
    if not found.is_fault:
        found = material.check()
    return found.where(f"{name} with {where}")


def _call(prepare: Callable[[], object]) -> None:
    try:
        prepare()
    except OSError as error:
        sys.stderr.write(f"the surroundings cannot be made: {error}\n")
        sys.stderr.flush()
        os._exit(0)


# Places --------------------------------------------------------------------------------------------------------


def odd_places(material: Material, rng: Generator, folder: Path) -> Finding:
    """Outputs that cannot be written, or would destroy an input; folders that are read-only or gone."""
    kinds: list[Callable[[Material, Generator, Path], Finding]] = [
        _output_place, _output_place, _output_is_input, _read_only_folder, _removed_folder, _odd_environment,
    ]  # fmt: skip
    return kinds[int(rng.integers(len(kinds)))](material, rng, folder)


def _writer(material: Material, rng: Generator, output: object) -> tuple[str, list[object]]:
    """A command line that writes to a place."""
    files = material.files
    lines: list[tuple[str, list[object]]] = [
        ("solve", [files["hessian"], "--solver", "obd", "--solution", output]),
        ("solve", [files["hessian"], "--solver", "obd", "--json", output]),
        ("solve", [files["hessian"], "--solver", "ls", "--history", output]),
        ("solve", [files["proven"], "--solver", "exact", "--set", f"certificate={output}"]),
        ("info", [files["hessian"], "--json", output]),
        ("info", [files["hessian"], "--export", f"{output}.lp"]),
        ("bench", ["compare", files["store"], files["store"], "--json", output]),
        ("bench", ["run", files["configuration"], "-o", output]),
        ("bench", ["report", files["store"], "-o", output]),
        ("export", ["digits-mlp", "--data", "digits", "--checkpoint", files["network.pt"], "--samples", "10",
                    "-o", output]),
    ]  # fmt: skip
    return lines[int(rng.integers(len(lines)))]


def _output_place(material: Material, rng: Generator, folder: Path) -> Finding:
    (folder / "directory").mkdir()
    (folder / "dangling").symlink_to(folder / "nowhere" / "x")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "file").write_bytes(OLD)
    places = [
        "missing/x.npz", "directory", "dangling", "loop", "file/x.npz", "/dev/full", "/proc/x", "/", "x" * 300,
        "a\nb.npz", "ü.npz", "\udc80.npz", " ", "/dev/null",
    ]  # fmt: skip
    place = places[int(rng.integers(len(places)))]
    command, arguments = _writer(material, rng, place)
    found = run(command, arguments, Surroundings(folder)).finding()
    if not found.is_fault and (folder / "file").read_bytes() != OLD:
        found = Finding(Verdict.LOST, "a file in the way is gone")
    if not found.is_fault:
        found = material.check()
    return found.where(f"cbs-{command} writes to {place!r}")


def _output_is_input(material: Material, rng: Generator, folder: Path) -> Finding:
    """The output is an input, by its own name, by a link of either kind, or by a detour."""
    command, arguments = _writer(material, rng, "OUTPUT")
    given = next((a for a in arguments if isinstance(a, Path)), material.files["hessian"])
    copy, link = folder / given.name, folder / "link"
    shutil.copy(given, copy)
    before = copy.read_bytes()
    kind = str(rng.choice(["itself", "symbolic link", "hard link", "detour"]))
    if kind == "symbolic link":
        link.symlink_to(copy)
    elif kind == "hard link":
        link.hardlink_to(copy)
    output = {"itself": copy, "detour": folder / "." / ".." / folder.name / copy.name}.get(kind, link)
    line = [str(a).replace("OUTPUT", str(output)) if a != given else copy for a in arguments]
    if command == "bench":
        line = [copy if a == given else a for a in line]
    found = run(command, line, Surroundings(folder)).finding()
    if not found.is_fault and copy.read_bytes() != before:
        found = Finding(Verdict.LOST, "the input has been overwritten")
    return found.where(f"cbs-{command} {line}, {kind}")


def _read_only_folder(material: Material, rng: Generator, folder: Path) -> Finding:
    """Nothing may be written, here, in HOME, in the folder of the cache; as root, without the powers of root."""
    closed = folder / "closed"
    closed.mkdir()
    (closed / "old").write_bytes(OLD)
    closed.chmod(0o555)
    command, arguments = _writer(material, rng, "old" if rng.random() < 0.5 else "new")
    environment: dict[str, str | None] = {"HOME": str(closed), "CBS_OPT_CACHE": None, "XDG_CACHE_HOME": None}
    fresh = rng.random() < 0.2
    there = Surroundings(closed, environment, prepare=drop_privileges)
    done = (run_fresh if fresh else run)(command, arguments, there)
    found = done.finding()
    if not found.is_fault and (closed / "old").read_bytes() != OLD:
        found = Finding(Verdict.LOST, "a file in a read-only folder has changed")
    closed.chmod(0o755)
    return found.where(f"cbs-{command} {arguments} in a read-only folder, {'fresh' if fresh else 'forked'}")


def _removed_folder(material: Material, rng: Generator, folder: Path) -> Finding:
    gone = folder / "gone"
    gone.mkdir()
    command, arguments = _writer(material, rng, "x.npz")
    found = run(command, arguments, Surroundings(gone, prepare=gone.rmdir)).finding()
    return found.where(f"cbs-{command} {arguments} in a folder that is gone")


def _odd_environment(material: Material, rng: Generator, folder: Path) -> Finding:
    """Variables that name nothing: a fresh process, since they are read at the start."""
    (folder / "file").write_text("")
    places: list[str | None] = [
        None, "", "/", "/nonexistent", "/proc", str(folder / "file"), str(folder / "new" / "deep"), "~", "\n",
        "x" * 5000,
    ]  # fmt: skip
    names = [
        "HOME",
        "TMPDIR",
        "CBS_OPT_CACHE",
        "NUMBA_CACHE_DIR",
        "XDG_CACHE_HOME",
        "MPLCONFIGDIR",
        "TERM",
        "COLUMNS",
    ]
    environment = {
        str(name): places[int(rng.integers(len(places)))]
        for name in rng.choice(names, int(rng.integers(1, 4)), replace=False)
    }
    command, arguments = _writer(material, rng, "x.npz")
    found = run_fresh(command, arguments, Surroundings(folder, environment)).finding()
    return found.where(f"cbs-{command} {arguments} with {environment}")


# Streams and locales -------------------------------------------------------------------------------------------


def odd_streams(material: Material, rng: Generator, folder: Path) -> Finding:
    """Streams that are closed, full, or lead to a reader that has gone."""
    lines = [
        line for line in command_lines(material) if line[0] in ("exact", "check", "info", "lp", "bench", "compare")
    ]
    name, command, arguments, outputs, _ = lines[int(rng.integers(len(lines)))]
    if rng.random() < 0.4 and "--json" in arguments:
        arguments = [*arguments[: arguments.index("--json")], "--json", "-"]
        outputs = [output for output in outputs if not output.endswith(".json")]
    streams: dict[int, Any] = {}
    opened: list[Any] = []
    said = []
    for number in (0, 1, 2):
        kind = str(rng.choice(["usual", "closed", "full", "no reader"]))
        if kind == "closed":
            streams[number] = None
        elif kind == "full" and number and Path("/dev/full").exists():
            opened.append(open("/dev/full", "wb"))  # noqa: PTH123, SIM115
            streams[number] = opened[-1]
        elif kind == "no reader" and number:
            reading, writing = os.pipe()
            os.close(reading)
            opened.append(os.fdopen(writing, "wb"))
            streams[number] = opened[-1]
        said.append(f"{number} {kind}")
    try:
        done = run_fresh(command, arguments, Surroundings(folder, streams=streams))
    finally:
        for stream in opened:
            stream.close()
    silent = 2 in streams
    found = _quiet(done) if silent else done.finding()
    if not found.is_fault:
        found = check_outputs(done, folder, outputs, [])
    return found.where(f"{name} with streams {', '.join(said)}")


def _quiet(done: Finished) -> Finding:
    """The finding where nothing can be said on stderr."""
    spoken = Finished(done.code, done.hung, done.out, "(closed)", done.sent)
    return spoken.finding((0, 1, 2, 3, 4, 120, 130))


def odd_locales(material: Material, rng: Generator, folder: Path) -> Finding:
    """Locales and encodings in which the signs of the output do not exist; names of files that are no text."""
    environment: dict[str, str | None] = {
        "LC_ALL": str(rng.choice(["C", "POSIX", "C.UTF-8", "de_DE.UTF-8", "tr_TR.UTF-8", "xx_YY.ISO-8859-1", ""])),
        "PYTHONUTF8": str(rng.choice(["0", "1"])),
        "PYTHONIOENCODING": str(
            rng.choice(["ascii", "latin-1", "utf-8", "utf-16", "cp1252:strict", "ascii:strict"])
        ),
        "PYTHONCOERCECLOCALE": str(rng.choice(["0", "1"])),
    }
    names = [
        b"plain.npz",
        "größe.npz".encode(),
        "größe.npz".encode("latin-1"),
        b"a b\tc.npz",
        b"-x.npz",
        "数.npz".encode(),
    ]
    name = os.fsdecode(names[int(rng.integers(len(names)))])
    path = folder / name
    shutil.copy(material.files["hessian"], path)
    lines: list[tuple[str, list[object]]] = [
        ("solve", [path, "--solver", "obd", "--solution", folder / f"out-{name}"]),
        ("solve", [path, "--solver", "obd", "--json", "-"]),
        ("solve", [path, "--solver", "nothing"]),
        ("solve", ["--list-solvers"]),
        ("info", [path]),
        ("info", [path, "--export", folder / "x.lp"]),
        ("bench", ["report", material.files["store"], "-o", folder / "report"]),
        ("solve", ["--help"]),
    ]
    command, arguments = lines[int(rng.integers(len(lines)))]
    found = run_fresh(command, arguments, Surroundings(folder, environment)).finding()
    return found.where(f"cbs-{command} {arguments} with {environment}")
