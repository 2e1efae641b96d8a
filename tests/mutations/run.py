"""Does a wrong line fail a test? Applies the patches of `patches.toml` one by one to a copy of the package.

    python tests/mutations/run.py [--all] [--workers N] [--list] [NAME …]

Each patch replaces a piece of text that must occur exactly once, so that a patch which no longer fits the code is
an error and not a success. Its tests must pass without it and fail with it. Patches marked `extra` are left out
without `--all` or their names, but must fit the code too. Exit code 0 if every patch fails a test, 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("cbs_opt", "solvers", "instances", "pruning", "bench", "tests", "pyproject.toml")
TIMEOUT = 300  # seconds for the tests of one patch
PASSED, FAILED = 0, 1  # exit codes of pytest


class PatchError(Exception):
    """The patch is not applicable, or its tests do not run."""


@dataclass(frozen=True)
class Patch:
    """One wrong line and the tests that must notice.

    Attributes
    ----------
    name : str
    path : str
        Relative to the repository.
    old, new : str
    tests : tuple of str
        Arguments of pytest: files, or nodes as `file::name`.
    extra : bool
    """

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]
    extra: bool = False


def read_patches(path: Path) -> list[Patch]:
    """The patches of a TOML file; `files` and `tests` are tables of short names."""
    table = tomllib.loads(path.read_text())
    patches = []
    for entry in table["patch"]:
        unknown = entry.keys() - {"name", "file", "old", "new", "tests", "extra"}
        if unknown:
            raise PatchError(f"{path.name}: {entry.get('name')}: unknown keys {sorted(unknown)}")
        tests = tuple(test for name in entry["tests"] for test in table["tests"][name])
        where = table["files"][entry["file"]]
        patches.append(Patch(entry["name"], where, entry["old"], entry["new"], tests, entry.get("extra", False)))
    names = [patch.name for patch in patches]
    if len(set(names)) != len(names):
        raise PatchError(f"{path.name}: a name occurs twice")
    return patches


def patched(patch: Patch, root: Path) -> str:
    """The text of the file with the patch applied; raises `PatchError` where it does not fit."""
    path = root / patch.path
    if not path.is_file():
        raise PatchError(f"{patch.path} is not there: point the patch to where the code went")
    text = path.read_text()
    count = text.count(patch.old)
    if count != 1:
        raise PatchError(
            f"the old text occurs {count} times in {patch.path}, not once: adapt the patch to the code"
        )
    if patch.old == patch.new:
        raise PatchError("old and new text are the same")
    return text.replace(patch.old, patch.new)


def misfits(patches: list[Patch], root: Path) -> list[str]:
    """A sentence for each patch that does not fit the code."""
    problems = []
    for patch in patches:
        try:
            patched(patch, root)
        except PatchError as error:
            problems.append(f"{patch.name}: {error}")
    return problems


def copy_of_the_package(folder: Path) -> Path:
    """The package and its tests in a folder of their own."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "results")
            )
        else:
            shutil.copy2(source, folder / name)
    return folder


def run_tests(tests: tuple[str, ...], root: Path) -> tuple[int, str]:
    """Exit code of pytest on a copy, and what it printed."""
    paths = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", "--tb=line", *tests]
    command.append("--hypothesis-profile=mutations")
    try:
        done = subprocess.run(
            command, cwd=root, env=paths, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise PatchError(f"the tests ran for more than {TIMEOUT} seconds") from None
    return done.returncode, done.stdout + done.stderr


def check(patch: Patch, root: Path) -> bool:
    """Whether a test of the patch fails with it."""
    path = root / patch.path
    mutated, original = patched(patch, root), path.read_text()
    path.write_text(mutated)
    try:
        code, output = run_tests(patch.tests, root)
    finally:
        path.write_text(original)
    if code not in (PASSED, FAILED):
        raise PatchError(f"pytest ended with exit code {code}:\n{output[-2000:]}")
    return code == FAILED


def check_originals(patches: list[Patch], root: Path) -> None:
    """The tests run on the copy, and pass without a patch."""
    code = "import cbs_opt, pathlib; print(pathlib.Path(cbs_opt.__file__).resolve().parents[1])"
    where = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    if Path(where.stdout.strip()) != root.resolve():
        raise PatchError(f"python imports the package from {where.stdout.strip()}, not from the copy")
    code, output = run_tests(tuple(dict.fromkeys(test for patch in patches for test in patch.tests)), root)
    if code != PASSED:
        raise PatchError(f"the tests do not pass without a patch:\n{output[-4000:]}")


def main(arguments: list[str] | None = None) -> int:
    """Run the patches; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only patches whose name contains this")
    parser.add_argument("--all", action="store_true", help="those marked `extra` too")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="list the patches and check that they fit the code")
    parser.add_argument("--patches", type=Path, default=Path(__file__).with_name("patches.toml"))
    options = parser.parse_args(arguments)
    try:
        patches = read_patches(options.patches)
    except PatchError as error:
        print(f"mutations: {error}", file=sys.stderr)
        return 1
    problems = misfits(patches, ROOT)
    if options.names:
        patches = [patch for patch in patches if any(name in patch.name for name in options.names)]
    elif not options.all:
        patches = [patch for patch in patches if not patch.extra]
    if not patches:
        print("mutations: no patch has such a name", file=sys.stderr)
        return 1
    if options.list or problems:
        for patch in patches if options.list else []:
            print(f"{patch.path:45} {patch.name}")
        for problem in problems:
            print(f"mutations: {problem}", file=sys.stderr)
        return 1 if problems else 0
    return run_all(patches, options.workers)


def run_all(patches: list[Patch], workers: int) -> int:
    """Check the patches, several at a time, each in a copy that one worker owns."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copies: Queue[Path] = Queue()
        for k in range(workers):
            copies.put(copy_of_the_package(Path(folder) / str(k)))

        def work(patch: Patch) -> str | None:
            root = copies.get()
            begun = time.perf_counter()
            try:
                noticed = check(patch, root)
                problem = None if noticed else f"{patch.name}: no test fails ({patch.path})"
            except PatchError as error:
                problem = f"{patch.name}: {error}"
            finally:
                copies.put(root)
            print(f"{'fails' if problem is None else 'NOT NOTICED':12} {time.perf_counter() - begun:5.1f} s  "
                  f"{patch.path}: {patch.name}", flush=True)  # fmt: skip
            return problem

        try:
            first = copies.get()
            check_originals(patches, first)
            copies.put(first)
        except PatchError as error:
            print(f"mutations: {error}", file=sys.stderr)
            return 1
        with ThreadPoolExecutor(workers) as pool:
            problems = [problem for problem in pool.map(work, patches) if problem is not None]
    print(
        f"{len(patches)} patches, {len(problems)} not noticed, {time.perf_counter() - started:.0f} s", flush=True
    )
    for problem in problems:
        print(f"mutations: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
