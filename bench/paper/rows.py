"""The rows of a study: one network pruned by one method at one sparsity for one seed, and scored.

Rows go to the store of `cbs_opt.bench.runs`; tasks of one process that follow each other share the network, its
instances and selections.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from cbs_opt.bench.paper.pruning import Selected, images_seen, select, update
from cbs_opt.bench.paper.study import NONE, Method, Study
from cbs_opt.bench.paper.subject import Figures, Files, Subject, open_network
from cbs_opt.bench.runs import store
from cbs_opt.bench.runs.runner import Plan
from cbs_opt.bench.runs.store import Key, Row, StoredInstance
from cbs_opt.bench.runs.task import Made, guarded
from cbs_opt.budget import number_of
from cbs_opt.errors import UsageError
from cbs_opt.instance import Instance
from cbs_opt.losses import selection_loss
from cbs_opt.typing import FloatArray

T = TypeVar("T")


@dataclass(frozen=True)
class PruningTask:
    """A row to be made.

    Attributes
    ----------
    study : Study
    files : Files
    method : Method
    sparsity : float
    seed : int
    budget : int
    identity : str
        Of network, images and seed, SHA-256.
    """

    study: Study
    files: Files
    method: Method
    sparsity: float
    seed: int
    budget: int
    identity: str

    @property
    def label(self) -> str:
        """The method's name."""
        return self.method.name

    @property
    def time_limit(self) -> float | None:
        """Of the solver."""
        return self.method.time_limit

    @property
    def key(self) -> Key:
        """The key of its row."""
        method = self.method
        return Key(
            self.identity,
            method.select,
            method.settings,
            "selection" if method.update == NONE else "joint",
            self.budget,
            self.seed,
            method.time_limit,
        )

    def row(self, kind: str, message: str | None = None) -> Row:
        """A row of this task without results."""
        return Row(*self.key, label=self.label, sparsity=self.sparsity, kind=kind, message=message)


def plan_study(study: Study, files: Files) -> Plan:
    """List every row: seed by seed, and so that rows of one instance follow each other.

    Parameters
    ----------
    study : Study
    files : Files

    Raises
    ------
    UsageError, InstanceError
        For files that do not fit the network.
    """
    network = open_network(study, files)
    parameters = dict(network.model.named_parameters())
    n = sum(parameters[name].numel() for name in network.prunable)
    identities = {seed: _identity(study, files, seed) for seed in study.seeds}
    tasks = []
    for seed in study.seeds:
        for source in dict.fromkeys(method.source for method in study.methods):
            for sparsity in study.sparsities:
                for method in study.methods:
                    if method.source == source and seed in method.seeds and sparsity in method.sparsities:
                        budget = number_of(sparsity, n)
                        tasks.append(PruningTask(study, files, method, sparsity, seed, budget, identities[seed]))
    if not tasks:
        raise UsageError(f"{study.name}: no method is left for these seeds and sparsities")
    return Plan(
        study.name,
        study.threads,
        tuple(tasks),
        tuple(
            StoredInstance(
                identities[seed], f"{study.name}, seed {seed}", n, 1, "network", _metadata(study, files, seed)
            )
            for seed in study.seeds
        ),
        (),
    )


def _metadata(study: Study, files: Files, seed: int) -> dict[str, Any]:
    """What a row's network and images are; JSON types only, no folders."""

    def name(path: Path | str | None) -> str | None:
        return None if path is None else Path(path).name

    return {
        "network": study.network,
        "normalisation": [study.mean, study.std],
        "files": {key: [name(path), _hash(path)] for key, path in dataclasses.asdict(files).items()},
        "training_images": study.training_images,
        "choice_images": study.choice_images,
        "seed": seed,
    }


@cache
def _hash(path: Path | str | None) -> str | None:
    """SHA-256 of a file, or the name of what is none: a folder, a data set of the package."""
    from cbs_opt.instances.checkpoints import checkpoint_sha256

    if path is None or not Path(path).is_file():
        return None if path is None else Path(path).name
    return checkpoint_sha256(path)


def _identity(study: Study, files: Files, seed: int) -> str:
    content = _metadata(study, files, seed)
    content["files"] = {key: digest for key, (_, digest) in content["files"].items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def restricted(
    study: Study,
    seeds: Sequence[int] | None = None,
    sparsities: Sequence[float] | None = None,
    methods: Iterable[str] | None = None,
) -> Study:
    """A study of fewer seeds, sparsities or methods.

    Raises
    ------
    UsageError
        For a method that the study does not have.
    """
    chosen = list(study.methods)
    if methods is not None:
        known = {method.name: method for method in study.methods}
        for name in (wanted := list(methods)):
            if name not in known:
                raise UsageError(f"{study.name}: there is no method '{name}'; known: {', '.join(known)}")
        chosen = [known[name] for name in known if name in wanted]
    return dataclasses.replace(
        study,
        methods=tuple(
            dataclasses.replace(
                method,
                seeds=method.seeds if seeds is None else tuple(seeds),
                sparsities=method.sparsities
                if sparsities is None
                else tuple(s for s in method.sparsities if s in sparsities),
            )
            for method in chosen
        ),
    )


def run_pruning(task: PruningTask) -> Made:
    """Prune and score; makes the row of a task. This never raises, whatever the method does."""
    return guarded(task, lambda: (_pruned(task), "cpu"))


def _pruned(task: PruningTask) -> Row:
    method, seed = task.method, task.seed
    subject = _subjects.get(task.identity, lambda: Subject(task.study, task.files, seed))
    study = task.study
    where = study.network, study.mean, study.std, task.files, study.training_images and seed
    dense = _scores.get((*where, None), lambda: subject.dense_test)
    if method.pruning is not None:
        made = subject.prune(task.sparsity, method.pruning)
        row = task.row(store.OK)
        row.status, row.objective = made.status, made.predicted
        row.solve_s = row.cpu_s = made.seconds
        row.scores = _figures(subject, dense, made.test, made.choice) | {"images": made.images}
        return row
    instance = _instances.get((task.identity, method.source), lambda: subject.export(method.source))
    problem = instance.with_budget(task.budget)

    def loss(weights: FloatArray) -> float:
        return subject.on_choice(weights).loss

    how = method.select, method.objective, method.judge, method.parameters, method.time_limit, method.iterations
    what = task.identity, method.source, task.budget, *how
    chosen = _selections.get(what, lambda: select(method, problem, loss, seed, task.study.threads))
    updated = update(method, problem, chosen.pruned, loss)
    test = _scores.get((*where, _digest(updated.weights)), lambda: subject.on_test(updated.weights))
    training = subject.on_choice(updated.weights)
    row = task.row(store.OK)
    row.status, row.iterations = chosen.status, chosen.iterations
    row.selection_loss = selection_loss(problem, chosen.pruned)
    row.objective = updated.predicted
    row.joint_loss = None if method.update == NONE else updated.predicted
    row.solve_s = row.cpu_s = chosen.seconds + updated.seconds
    row.scores = _figures(subject, dense, test, training) | {
        "images": images_seen(method, task.study.choice_images),
        "select_s": chosen.seconds,
        "update_s": updated.seconds,
        "scale": updated.scale,
        "judgements": chosen.judgements,
        "swaps": chosen.swaps,
    }
    return row


def _figures(subject: Subject, dense: Figures, test: Figures, training: Figures) -> dict[str, Any]:
    """The scores that every row has."""
    return {
        "accuracy": test.accuracy,
        "test_loss": test.loss,
        "training_loss": training.loss,
        "dense_accuracy": dense.accuracy,
        "dense_test_loss": dense.loss,
        "dense_training_loss": subject.dense_choice.loss,
        "test_images": subject.test_images,
    }


def _digest(weights: FloatArray) -> str:
    return hashlib.sha256(weights.tobytes()).hexdigest()


class _Kept(Generic[T]):
    """The last few results of one kind of this process."""

    def __init__(self, size: int) -> None:
        self._size, self._held = size, OrderedDict[Hashable, T]()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result for this key, made if it is not there; the oldest one goes first, for memory."""
        if key not in self._held:
            while len(self._held) >= self._size:
                self._held.popitem(last=False)
            self._held[key] = make()
        self._held.move_to_end(key)
        return self._held[key]


_subjects: _Kept[Subject] = _Kept(1)
_instances: _Kept[Instance] = _Kept(1)
_selections: _Kept[Selected] = _Kept(16)
_scores: _Kept[Figures] = _Kept(128)
"""On test images, by weights: magnitude's do not depend on the seed, and a scale of 1 is the whole update."""
