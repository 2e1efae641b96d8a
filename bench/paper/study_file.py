"""Studies: TOML files that say how a network is pruned, by which methods, and what was published.

::

    network = "mlpnet"
    sparsities = [0.5, 0.9]
    seeds = [0, 1, 2, 3, 4]
    choice_images = 5000

    [sources.fisher]          # options of an export, see `cbs_opt.instances.recipe.Recipe`
    images = 1000
    damping = 1e-3

    [published]               # accuracies in per cent
    sparsities = [0.5, 0.9]
    dense = 93.97
    CBS = [93.96, 93.14]

    [[methods]]
    name = "CBS"
    family = "as published"
    source = "fisher"
    select = "cbs"
    judge = "network"
    update = "best"

Methods of `cbs_opt.prune` have a table `pruning` of its options instead of `source`, `select` and so on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from cbs_opt.bench.paper.study import (
    BEST,
    FAMILIES,
    JUDGED,
    JUDGES,
    MODEL,
    NETWORK,
    NONE,
    PRUNE,
    UPDATES,
    Method,
    Source,
    Study,
)
from cbs_opt.bench.runs.toml_file import (
    SEEDS,
    TEXT,
    WHOLE,
    Check,
    TomlFile,
    is_list,
    is_number,
    is_whole,
    open_toml,
)
from cbs_opt.errors import CbsError, UsageError
from cbs_opt.registry import get_solver, solver_names
from cbs_opt.solver import OBJECTIVES, parse_parameters


def shipped_studies() -> dict[str, Path]:
    """The shipped studies, by name."""
    folder = Path(str(resources.files("cbs_opt.bench.paper")))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_study(source: Path | str) -> Study:
    """Read a study: a TOML file, or the name of a shipped one.

    Raises
    ------
    UsageError
        For errors in it, with file and line.
    """
    return _Reader(open_toml(source, shipped_studies(), "methods")).read()


_SPARSITIES: Check = (
    lambda v: is_list(v, lambda s: is_number(s, 0, 1)) and len(set(v)) == len(v),
    "a list of different numbers between 0 and 1",
)
_NUMBERS: Check = (lambda v: is_list(v, lambda s: is_number(s, -1e9, 1e9)), "a list of numbers")
_TABLE: Check = (lambda v: isinstance(v, dict), "a table")
_COUNT: Check = (lambda v: is_whole(v, 1), f"{WHOLE} ≥ 1")
_TOP: dict[str, Check] = {
    "title": TEXT,
    "description": TEXT,
    "network": TEXT,
    "mean": _NUMBERS,
    "std": _NUMBERS,
    "training_images": _COUNT,
    "choice_images": _COUNT,
    "threads": _COUNT,
    "sparsities": _SPARSITIES,
    "seeds": SEEDS,
    "notes": (lambda v: is_list(v, lambda s: isinstance(s, str) and bool(s)), "a list of texts"),
    "sources": (
        lambda v: isinstance(v, dict) and bool(v) and all(isinstance(s, dict) for s in v.values()),
        "tables: [sources.NAME]",
    ),
    "published": _TABLE,
    "methods": (lambda v: is_list(v, lambda s: isinstance(s, dict)), "tables: [[methods]]"),
}
_METHOD: dict[str, Check] = {
    "name": TEXT,
    "family": (lambda v: v in FAMILIES, " or ".join(f"'{family}'" for family in FAMILIES)),
    "source": TEXT,
    "select": TEXT,
    "objective": (lambda v: v in OBJECTIVES, "'selection' or 'joint'"),
    "judge": (lambda v: v in JUDGES, " or ".join(f"'{judge}'" for judge in JUDGES)),
    "parameters": _TABLE,
    "update": (lambda v: v in UPDATES, " or ".join(f"'{update}'" for update in UPDATES)),
    "time_limit": (lambda v: is_number(v, 1e-3, 1e9), "seconds, at least 0.001"),
    "iterations": _COUNT,
    "sparsities": _SPARSITIES,
    "seeds": SEEDS,
    "published": TEXT,
    "pruning": _TABLE,
}
_NEEDED = ("name", "family")
_OF_PRUNING = ("name", "family", "pruning", "sparsities", "seeds", "published")


class _Reader:
    """Checks the content of one file; its complaints name the line."""

    def __init__(self, file: TomlFile) -> None:
        self.file = file

    def read(self) -> Study:
        file, content = self.file, self.file.content
        file.check(content, _TOP)
        file.require(content, _TOP, ("network", "sparsities", "seeds", "choice_images", "sources", "methods"))
        sources = {name: self._source(name, table) for name, table in content["sources"].items()}
        published, dense = self._published(content.get("published", {}))
        methods = [
            self._method(number, table, content, sources, published)
            for number, table in enumerate(content["methods"])
        ]
        seen: dict[Any, int] = {}
        for number, method in enumerate(methods):
            what = (method.select, method.objective, method.settings, method.time_limit)
            for key in (method.name, what):
                if key in seen:
                    raise self._error(number, "name", f"method '{method.name}' is here twice")
                seen[key] = number
        study = Study(
            name=file.path.stem,
            title=content.get("title", f"{content['network']}, pruned one-shot"),
            network=content["network"],
            mean=None if "mean" not in content else tuple(map(float, content["mean"])),
            std=None if "std" not in content else tuple(map(float, content["std"])),
            training_images=content.get("training_images"),
            choice_images=content["choice_images"],
            threads=content.get("threads", 1),
            methods=tuple(methods),
            published=published,
            dense=dense,
            notes=tuple(content.get("notes", ())),
        )
        if study.training_images is not None and study.images > study.training_images:
            raise self._error(
                None,
                "training_images",
                f"`training_images` must be at least {study.images}, those of the largest source and "
                f"`choice_images` together, got {study.training_images}",
            )
        return study

    def _source(self, name: str, table: Mapping[str, Any]) -> Source:
        from cbs_opt.instances.recipe import Recipe

        options = dict(table)
        images = options.pop("images", None)
        if not is_whole(images, 1):
            raise self._error(None, name, f"source '{name}': `images` must be {WHOLE} ≥ 1, got {images!r}")
        for key in ("sparsity", "nm", "layers", "memory", "seed"):
            if key in options:
                raise self._error(None, key, f"source '{name}': `{key}` is set by the study")
        try:
            Recipe(**options)
        except TypeError:
            known = ", ".join(key for key in Recipe.__dataclass_fields__ if key not in ("form", "entry"))
            unknown = next((key for key in options if key not in Recipe.__dataclass_fields__), "")
            raise self._error(
                None, unknown or name, f"source '{name}' has no option `{unknown}`; known: images, {known}"
            ) from None
        except UsageError as error:
            raise self._error(None, name, f"source '{name}': {error}") from None
        return Source(name, images, json.dumps(options, sort_keys=True, separators=(",", ":")))

    def _published(self, table: Mapping[str, Any]) -> tuple[dict[str, dict[float, float]], float | None]:
        columns = dict(table)
        dense, sparsities = columns.pop("dense", None), columns.pop("sparsities", [])
        if dense is not None and not is_number(dense, 0, 100):
            raise self._error(None, "dense", f"`dense` must be per cent, got {dense!r}")
        if columns and not _SPARSITIES[0](sparsities):
            raise self._error(None, "published", f"`sparsities` of published figures must be {_SPARSITIES[1]}")
        for name, values in columns.items():
            if not is_list(values, lambda v: is_number(v, 0, 100)) or len(values) != len(sparsities):
                raise self._error(
                    None, name, f"the published column '{name}' must have {len(sparsities)} figures in per cent"
                )
        return {name: dict(zip(sparsities, values, strict=True)) for name, values in columns.items()}, dense

    def _method(
        self,
        number: int,
        table: Mapping[str, Any],
        top: Mapping[str, Any],
        sources: Mapping[str, Source],
        published: Mapping[str, Any],
    ) -> Method:
        self.file.check(table, _METHOD, number, "of a method")
        for key in (*_NEEDED, *(() if "pruning" in table else ("source", "select"))):
            if key not in table:
                raise self._error(number, None, f"a method without `{key}`: {_METHOD[key][1]}")
        column = table.get("published")
        if column is not None and column not in published:
            known = ", ".join(published) or "none"
            raise self._error(number, "published", f"there is no published column '{column}'; known: {known}")
        if "pruning" in table:
            return self._staged(number, table, top)
        name, select, judge = table["name"], table["select"], table.get("judge", MODEL)
        if table["source"] not in sources:
            known = ", ".join(sources)
            raise self._error(number, "source", f"there is no source '{table['source']}'; known: {known}")
        if select not in solver_names():
            raise self._error(
                number, "select", f"there is no solver '{select}'; known: {', '.join(solver_names())}"
            )
        if judge == NETWORK and select not in JUDGED:
            raise self._error(number, "judge", f"the network judges {' and '.join(JUDGED)} only, not '{select}'")
        if judge == NETWORK and ("time_limit" in table or "iterations" in table):
            raise self._error(
                number, "judge", "methods that the network judges end by `parameters`, not by limits"
            )
        solver = get_solver(select)
        able = solver.supports.objectives
        objective = table.get("objective", next(kind for kind in OBJECTIVES if kind in able))
        if objective not in able:
            raise self._error(number, "objective", f"solver '{select}' does not minimise the {objective} loss")
        given = table.get("parameters", {})
        try:
            parse_parameters(select, solver.parameters_type, given)
        except CbsError as error:
            raise self._error(number, next(iter(given), "parameters"), str(error)) from None
        limit = table.get("time_limit")
        return Method(
            name=name,
            family=table["family"],
            source=sources[table["source"]],
            select=select,
            objective=objective,
            judge=judge,
            parameters=json.dumps(given, sort_keys=True, separators=(",", ":")),
            update=table.get("update", NONE),
            time_limit=None if limit is None else float(limit),
            iterations=table.get("iterations"),
            sparsities=tuple(table.get("sparsities", top["sparsities"])),
            seeds=tuple(table.get("seeds", top["seeds"])),
            published=column,
        )

    def _staged(self, number: int, table: Mapping[str, Any], top: Mapping[str, Any]) -> Method:
        """A method that `cbs_opt.prune` runs."""
        from cbs_opt.pruning.method import Method as Pruning

        for key in table:
            if key not in _OF_PRUNING:
                raise self._error(
                    number, key, f"`{key}` is not of a method with `pruning`, which has its own options"
                )
        options = table["pruning"]
        for key in ("sparsity", "seed", "threads", "held_out"):
            if key in options:
                raise self._error(number, key, f"`{key}` is set by the study")
        try:
            Pruning(**options)
        except TypeError as error:
            unknown = next((key for key in options if key not in Pruning.__dataclass_fields__), "pruning")
            known = ", ".join(key for key, field in Pruning.__dataclass_fields__.items() if field.init)
            sentence = f"there is no option `{unknown}` of pruning; known: {known}"
            raise self._error(number, unknown, sentence if unknown != "pruning" else str(error)) from None
        except UsageError as error:
            raise self._error(number, "pruning", str(error)) from None
        return Method(
            name=table["name"],
            family=table["family"],
            source=Source("all training images", 0, "{}"),
            select=PRUNE,
            objective="joint",
            judge=NETWORK,
            parameters="{}",
            update=BEST,
            time_limit=None,
            iterations=None,
            sparsities=tuple(table.get("sparsities", top["sparsities"])),
            seeds=tuple(table.get("seeds", top["seeds"])),
            published=table.get("published"),
            pruning=json.dumps(options, sort_keys=True, separators=(",", ":")),
        )

    def _error(self, number: int | None, key: str | None, sentence: str) -> CbsError:
        return self.file.error(number, key, sentence)
