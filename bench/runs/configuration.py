"""Configurations of benchmarks: a TOML file of instances and solvers, read into tasks.

Instances are paths relative to the file, with wildcards, or `library:NAME`, with wildcards too. At the top stand
the settings of all solvers; each `[[solvers]]` may replace them::

    instances = ["library:mlp-output-*", "data/*.npz"]
    sparsities = [0.5, "file"]
    seeds = [0, 1, 2]
    time_limit = 10.0

    [[solvers]]
    name = "exact"
    seeds = [0]

    [[solvers]]
    name = "ls"
    label = "ls, fine"
    parameters = { epsilon_relative = 1e-6 }
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from cbs_opt.bench.peers import PEERS
from cbs_opt.errors import CbsError, SolverError, UsageError
from cbs_opt.registry import get_solver, solver_names
from cbs_opt.solver import OBJECTIVES, parse_parameters

Sparsity = float | str
"""A fraction, or "file" for the budget of the instance."""


@dataclass(frozen=True)
class SolverEntry:
    """A solver of a benchmark with its settings.

    Attributes
    ----------
    name, label : str
    parameters : str
        Canonical JSON of those that were given, converted to their types.
    objective : {"selection", "joint"}
    sparsities : tuple of float or "file"
    seeds : tuple of int
    time_limit : float or None
        Seconds.
    most_weights : int or None
        Larger instances are not given to it.
    """

    name: str
    label: str
    parameters: str
    objective: str
    sparsities: tuple[Sparsity, ...]
    seeds: tuple[int, ...]
    time_limit: float | None
    most_weights: int | None


@dataclass(frozen=True)
class Configuration:
    """A benchmark: instances, solvers, and threads of each run."""

    name: str
    instances: tuple[str, ...]
    folder: Path
    threads: int
    solvers: tuple[SolverEntry, ...]


def shipped() -> dict[str, Path]:
    """The shipped configurations, by name."""
    folder = Path(str(resources.files("cbs_opt.bench.runs"))) / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_configuration(source: Path | str, time_limit: float | None = None) -> Configuration:
    """Read a benchmark.

    Parameters
    ----------
    source : Path or str
        A TOML file, or the name of a shipped configuration.
    time_limit : float, optional
        Instead of every time limit of the file.

    Raises
    ------
    UsageError
        For errors in it, with file and line.
    """
    path = Path(source)
    if path.suffix != ".toml" and not path.is_file():
        if str(source) not in shipped():
            raise UsageError(f"{source}: is neither a file nor one of the configurations {', '.join(shipped())}")
        path = shipped()[str(source)]
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # not UTF-8, or not TOML: the sentence has the line
        raise UsageError(f"{path}: is no TOML file: {error}") from None
    return _Reader(path, text).read(content, time_limit)


_WHOLE = "a whole number"
_MOST_SEED = 2**63  # what a store holds

_Check = tuple[Callable[[Any], bool], str]


def _is_whole(value: Any, lowest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest


def _is_number(value: Any, lowest: float, highest: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and lowest <= value <= highest


def _is_list(value: Any, item: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(item(entry) for entry in value)


_SETTINGS: dict[str, _Check] = {
    "sparsities": (
        lambda v: _is_list(v, lambda s: s == "file" or _is_number(s, 0, 1)),
        'a list of numbers between 0 and 1, or of "file" for the budget of the file',
    ),
    "seeds": (
        lambda v: _is_list(v, lambda s: _is_whole(s, 0) and s < _MOST_SEED) and len(set(v)) == len(v),
        "a list of different whole numbers ≥ 0 and below 2^63",
    ),
    "time_limit": (lambda v: _is_number(v, 1e-3, 1e9), "seconds, at least 0.001"),
    "objective": (lambda v: v in OBJECTIVES, "'selection' or 'joint'"),
    "most_weights": (lambda v: _is_whole(v, 1), f"{_WHOLE} ≥ 1"),
}
_TOP: dict[str, _Check] = {
    "name": (lambda v: isinstance(v, str) and bool(v), "a text"),
    "description": (lambda v: isinstance(v, str), "a text"),
    "instances": (lambda v: _is_list(v, lambda s: isinstance(s, str) and bool(s)), "a list of paths"),
    "threads": (lambda v: _is_whole(v, 1), f"{_WHOLE} ≥ 1"),
    "solvers": (lambda v: _is_list(v, lambda s: isinstance(s, dict)), "tables: [[solvers]]"),
    **_SETTINGS,
}
_OF_SOLVER: dict[str, _Check] = {
    "name": (lambda v: isinstance(v, str) and bool(v), "the name of a solver"),
    "label": (lambda v: isinstance(v, str) and bool(v), "a text"),
    "parameters": (lambda v: isinstance(v, dict), "a table of parameters"),
    **_SETTINGS,
}
_DEFAULTS: dict[str, Any] = {
    "sparsities": ["file"],
    "seeds": [0],
    "time_limit": None,
    "objective": None,
    "most_weights": None,
}


class _Reader:
    """Checks the content of one file; its complaints name the line."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.lines = text.splitlines()
        self.heads = [i for i, line in enumerate(self.lines) if re.match(r"\s*\[\[\s*solvers\s*\]\]", line)]

    def read(self, content: dict[str, Any], time_limit: float | None) -> Configuration:
        self._check(content, _TOP, None)
        for key in ("instances", "solvers"):
            if key not in content:
                raise UsageError(f"{self.path}: `{key}` is missing: {_TOP[key][1]}")
        entries = [self._solver(number, table, content) for number, table in enumerate(content["solvers"])]
        seen: dict[tuple[Any, ...], int] = {}
        for number, entry in enumerate(entries):
            what = (entry.name, entry.parameters, entry.objective, entry.time_limit)
            label = (entry.label, entry.objective)
            if what in seen:
                raise self._error(number, "name", f"solver '{entry.name}' is here twice with the same settings")
            if label in seen:
                raise self._error(number, "name", f"two solvers are labelled '{entry.label}': give each a `label`")
            seen[what] = seen[label] = number
        if time_limit is not None:
            entries = [dataclasses.replace(entry, time_limit=time_limit) for entry in entries]
        return Configuration(
            name=content.get("name", self.path.stem),
            instances=tuple(content["instances"]),
            folder=self.path.resolve().parent,
            threads=content.get("threads", 1),
            solvers=tuple(entries),
        )

    def _solver(self, number: int, table: dict[str, Any], top: dict[str, Any]) -> SolverEntry:
        self._check(table, _OF_SOLVER, number)
        if "name" not in table:
            raise self._error(number, None, "a solver without `name`")
        settings = _DEFAULTS | {key: value for key, value in {**top, **table}.items() if key in _DEFAULTS}
        name, objective = table["name"], settings["objective"]
        given: Mapping[str, Any] = table.get("parameters", {})
        if name in PEERS:
            if given:
                raise self._error(number, next(iter(given)), f"peer '{name}' has no parameters")
            objectives: frozenset[str] = frozenset({"selection"})
        elif name not in solver_names():
            known = ", ".join([*solver_names(), *PEERS])
            raise self._error(number, "name", f"there is no solver '{name}'; known: {known}")
        else:
            try:
                objectives = get_solver(name).supports.objectives
                given = self._parameters(number, name, given)
            except SolverError:  # something it needs is not installed: reported by `unavailable`
                objectives = frozenset(OBJECTIVES)
        if objective is None:
            objective = next(kind for kind in OBJECTIVES if kind in objectives)
        elif objective not in objectives:
            able = " and ".join(sorted(objectives))
            where = "objective" if "objective" in table else "name"
            raise self._error(number, where, f"solver '{name}' minimises {able} only, not '{objective}'")
        return SolverEntry(
            name=name,
            label=table.get("label", name),
            parameters=json.dumps(given, sort_keys=True, separators=(",", ":")),
            objective=objective,
            sparsities=tuple(settings["sparsities"]),
            seeds=tuple(settings["seeds"]),
            time_limit=None if settings["time_limit"] is None else float(settings["time_limit"]),
            most_weights=settings["most_weights"],
        )

    def _parameters(self, number: int, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """The given parameters, converted to their types: equal settings get equal keys."""
        kind = get_solver(name).parameters_type
        for key, value in given.items():
            try:
                parse_parameters(name, kind, {key: value})
            except UsageError as error:
                raise self._error(number, key, str(error)) from None
        try:
            parsed = dataclasses.asdict(parse_parameters(name, kind, given))
        except UsageError as error:
            raise self._error(number, "parameters", str(error)) from None
        return {key.replace("-", "_"): parsed[key.replace("-", "_")] for key in given}

    def _check(self, table: dict[str, Any], known: dict[str, _Check], number: int | None) -> None:
        for key, value in table.items():
            if key not in known:
                what = "here" if number is None else "of a solver"
                raise self._error(number, key, f"there is no key `{key}` {what}; known: {', '.join(known)}")
            holds, expected = known[key]
            if not holds(value):
                raise self._error(number, key, f"`{key}` must be {expected}, got {str(value)[:60]!r}")

    def _error(self, number: int | None, key: str | None, sentence: str) -> CbsError:
        return UsageError(f"{self.path}, line {self._line(number, key)}: {sentence}")

    def _line(self, number: int | None, key: str | None) -> int:
        """The line of a key at the top, or of the solver with this number, from 1; TOML readers do not tell."""
        whole = (0, len(self.lines))
        if len(self.heads) <= (number or 0):
            start, stop = whole  # solvers written as one inline array
        elif number is None:
            start, stop = 0, self.heads[0]
        else:
            ends = [*self.heads[1:], len(self.lines)]
            start, stop = self.heads[number], ends[number]
        if key is not None:
            for first, last in ((start, stop), whole):
                for i in range(first, last):
                    code = self.lines[i].partition("#")[0]
                    if re.search(rf"(^|[\s{{,.\[])[\"']?{re.escape(key)}[\"']?\s*(=|\.|\]|$)", code):
                        return i + 1
        return start + 1


def unavailable(entry: SolverEntry) -> str | None:
    """Why this solver cannot run here at all, or None: peers and outside solvers need not be installed."""
    from cbs_opt.bench.runs.warm_up import tiny_instance
    from cbs_opt.solver import Context

    if entry.name in PEERS:
        import importlib.util

        try:
            found = importlib.util.find_spec("dwave.samplers")
        except ModuleNotFoundError:
            found = None
        return None if found else 'dwave-samplers is not installed: pip install "cbs-opt[peers]"'
    try:
        solver = get_solver(entry.name)(json.loads(entry.parameters))
        solver.check_supports(tiny_instance("hessian"), Context(entry.objective))
    except CbsError as error:
        return str(error)
    return None
