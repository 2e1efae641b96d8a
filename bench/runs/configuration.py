"""Configurations of benchmarks: a TOML file of instances and solvers, read into tasks.

Instances are paths relative to the file, with wildcards, or `library:NAME`, with wildcards too. At the top stand
the settings of all solvers; each `[[solvers]]` may replace them::

    instances = ["library:mlp-output-*", "data/*.npz"]
    sparsities = [0.5, "file"]    # or keep = [5, 10], numbers of weights that stay
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
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from cbs_opt.bench.peers import PEERS
from cbs_opt.bench.runs.toml_file import SEEDS, WHOLE, Check, TomlFile, is_list, is_number, is_whole, open_toml
from cbs_opt.bench.subset_peers import SUBSET_PEERS, unavailable_peer
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
    keep : tuple of int
        Numbers of weights that stay; further budgets, after those of `sparsities`.
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
    keep: tuple[int, ...]
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
    return _Reader(open_toml(source, shipped(), "solvers")).read(time_limit)


_SETTINGS: dict[str, Check] = {
    "sparsities": (
        lambda v: is_list(v, lambda s: s == "file" or is_number(s, 0, 1)),
        'a list of numbers between 0 and 1, or of "file" for the budget of the file',
    ),
    "keep": (lambda v: is_list(v, lambda k: is_whole(k, 0)), "a list of whole numbers ≥ 0, of weights that stay"),
    "seeds": SEEDS,
    "time_limit": (lambda v: is_number(v, 1e-3, 1e9), "seconds, at least 0.001"),
    "objective": (lambda v: v in OBJECTIVES, "'selection' or 'joint'"),
    "most_weights": (lambda v: is_whole(v, 1), f"{WHOLE} ≥ 1"),
}
_TOP: dict[str, Check] = {
    "name": (lambda v: isinstance(v, str) and bool(v), "a text"),
    "description": (lambda v: isinstance(v, str), "a text"),
    "instances": (lambda v: is_list(v, lambda s: isinstance(s, str) and bool(s)), "a list of paths"),
    "threads": (lambda v: is_whole(v, 1), f"{WHOLE} ≥ 1"),
    "solvers": (lambda v: is_list(v, lambda s: isinstance(s, dict)), "tables: [[solvers]]"),
    **_SETTINGS,
}
_OF_SOLVER: dict[str, Check] = {
    "name": (lambda v: isinstance(v, str) and bool(v), "the name of a solver"),
    "label": (lambda v: isinstance(v, str) and bool(v), "a text"),
    "parameters": (lambda v: isinstance(v, dict), "a table of parameters"),
    **_SETTINGS,
}
_DEFAULTS: dict[str, Any] = {
    "sparsities": None,
    "keep": (),
    "seeds": [0],
    "time_limit": None,
    "objective": None,
    "most_weights": None,
}


class _Reader:
    """Reads the content of one file; its complaints name the line."""

    def __init__(self, file: TomlFile) -> None:
        self.file, self.path = file, file.path

    def read(self, time_limit: float | None) -> Configuration:
        content = self.file.content
        self.file.check(content, _TOP, None)
        self.file.require(content, _TOP, ("instances", "solvers"))
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
        self.file.check(table, _OF_SOLVER, number, "of a solver")
        if "name" not in table:
            raise self._error(number, None, "a solver without `name`")
        settings = _DEFAULTS | {key: value for key, value in {**top, **table}.items() if key in _DEFAULTS}
        name, objective = table["name"], settings["objective"]
        given: Mapping[str, Any] = table.get("parameters", {})
        if name in PEERS or name in SUBSET_PEERS:
            if given:
                raise self._error(number, next(iter(given)), f"peer '{name}' has no parameters")
            objectives: frozenset[str] = frozenset({"selection" if name in PEERS else "joint"})
        elif name not in solver_names():
            known = ", ".join([*solver_names(), *PEERS, *SUBSET_PEERS])
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
            sparsities=tuple(_sparsities(settings)),
            keep=tuple(settings["keep"]),
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

    def _error(self, number: int | None, key: str | None, sentence: str) -> CbsError:
        return self.file.error(number, key, sentence)


def _sparsities(settings: Mapping[str, Any]) -> list[Sparsity]:
    """What is asked for; the budget of the file where neither sparsities nor numbers of kept weights are."""
    if settings["sparsities"] is not None:
        return list(settings["sparsities"])
    return [] if settings["keep"] else ["file"]


def unavailable(entry: SolverEntry) -> str | None:
    """Why this solver cannot run here at all, or None: peers and outside solvers need not be installed."""
    from cbs_opt.bench.runs.warm_up import tiny_instance
    from cbs_opt.solver import Context

    if entry.name in SUBSET_PEERS:
        return unavailable_peer(entry.name)
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
