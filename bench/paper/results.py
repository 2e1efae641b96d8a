"""The rows of a study by method and sparsity, and the means that tables and pictures show."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cbs_opt.bench.paper.study import Method, Study
from cbs_opt.bench.runs.store import OK, Row, Store, StoredInstance
from cbs_opt.errors import CbsError


@dataclass(frozen=True)
class Mean:
    """Mean and standard deviation over seeds.

    Attributes
    ----------
    mean : float
    deviation : float or None
        Of a sample, with n − 1; None for one seed.
    count : int
        Seeds.
    """

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Results:
    """A study and its rows.

    Attributes
    ----------
    study : Study
    path : Path
        Of the store.
    rows : mapping of (str, float) to list of Row
        Valid rows by method and sparsity, in the order of the seeds.
    failed : list of Row
    environments : list of mapping
        Machines and versions.
    instances : list of StoredInstance
    """

    study: Study
    path: Path
    rows: dict[tuple[str, float], list[Row]]
    failed: list[Row]
    environments: list[dict[str, Any]]
    instances: list[StoredInstance]

    @property
    def methods(self) -> list[Method]:
        """Those with a row."""
        return [m for m in self.study.methods if any((m.name, s) in self.rows for s in m.sparsities)]

    def mean(self, method: str, sparsity: float, what: Callable[[dict[str, Any], Row], float]) -> Mean | None:
        """Of what a function makes of the scores and the row; None where nothing was run."""
        rows = self.rows.get((method, sparsity))
        return mean_of([what(dict(row.scores or {}), row) for row in rows]) if rows else None

    def accuracy(self, method: str, sparsity: float) -> Mean | None:
        """In per cent, on the test images."""
        return self.mean(method, sparsity, lambda scores, row: 100 * float(scores["accuracy"]))

    def increases(self, method: Method, sparsity: float) -> list[tuple[float, float]]:
        """Predicted and measured increase of the training loss, a pair for each seed that has both."""
        if not method.predicts_loss:
            return []
        return [
            (float(row.objective), increase(row))
            for row in self.rows.get((method.name, sparsity), [])
            if row.objective is not None
        ]


def increase(row: Row) -> float:
    """By how much the loss on training images rose."""
    scores = row.scores or {}
    return float(scores["training_loss"]) - float(scores["dense_training_loss"])


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and deviation of at least one value; not finite where one of them is not."""
    array = np.asarray(values, dtype=np.float64)
    return Mean(float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else None, array.size)


def ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """Median of measured / predicted; NaN where nothing was predicted."""
    found = [measured / predicted for predicted, measured in pairs if predicted > 0]
    return float(np.median(found)) if found else math.nan


def read_results(path: Path | str) -> Results:
    """Read a store that `cbs-bench paper` wrote.

    Raises
    ------
    StoreError
        For a store that cannot be read.
    CbsError
        For a store without a study, or without rows of it.
    """
    with Store(path) as store:
        text = store.meta.get("study")
        if text is None:
            raise CbsError(f"{path}: holds no study of pruned networks: `cbs-bench paper` writes such stores")
        study = Study.from_json(text)
        rows, environments, instances = store.rows(), store.environments(), store.instances()
    wanted = {(method.name, method.settings): method for method in study.methods}
    found: dict[tuple[str, float], list[Row]] = {}
    failed, seen = [], set()
    for row in sorted(rows, key=lambda row: row.seed):
        method = wanted.get((row.label, row.parameters))
        if method is None or row.seed not in method.seeds or row.time_limit != method.time_limit:
            continue  # of an earlier form of the study
        seen.add(row.instance_sha256)
        if row.kind == OK and row.scores is not None:
            found.setdefault((row.label, row.sparsity), []).append(row)
        else:
            failed.append(row)
    if not found:
        raise CbsError(f"{path}: the store has no rows of its study yet: there is nothing to report")
    return Results(
        study,
        Path(path),
        found,
        failed,
        list(environments.values()),
        [instance for sha256, instance in instances.items() if sha256 in seen],
    )
