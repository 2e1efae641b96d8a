"""All stages of a run: `prune`."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cbs_opt.budget import Budget
from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.files.atomic import check_writable
from cbs_opt.instance import Instance
from cbs_opt.instances.budgets import check_room, keeping
from cbs_opt.instances.data import SampleSource
from cbs_opt.instances.dense import dense_scores
from cbs_opt.instances.export import Progress
from cbs_opt.instances.fisher_terms import FisherError, has_temperature
from cbs_opt.instances.gradients import CHUNK_BYTES
from cbs_opt.instances.losses import LossLike, SampleLoss, declared
from cbs_opt.instances.metrics import MetricLike
from cbs_opt.instances.modes import outside_inference
from cbs_opt.instances.plan import make_plan, with_zeros
from cbs_opt.instances.recipe import Fisher
from cbs_opt.instances.reconstruction import passes
from cbs_opt.instances.scores import Judge, Score, torch_device
from cbs_opt.pruning.gauss_newton import OWN_OPERATIONS, OWN_STEPS, operations
from cbs_opt.pruning.method import TEMPERATURE, Method
from cbs_opt.pruning.network import WorkingCopy, working_copy
from cbs_opt.pruning.outcome import Pruned, Stage
from cbs_opt.pruning.problem import exported, problems
from cbs_opt.pruning.samples import divided, in_memory
from cbs_opt.pruning.schedule import part_of, share
from cbs_opt.pruning.stage import Choice, Scorer, Stopped, best
from cbs_opt.pruning.state import DataFacts, Stored, fingerprint, read_state, write_state
from cbs_opt.pruning.targets import with_dense_targets
from cbs_opt.typing import BoolArray

logger = logging.getLogger("cbs_opt")

_JUDGED = 1000  # samples by which the loss is found and checked
_COUNTED = 8  # samples of which operations are counted, at most


class Run:
    """A network that is pruned stage by stage; its arguments are checked before the work.

    Parameters
    ----------
    model : torch.nn.Module
        Not changed.
    source : SampleSource
        Training samples.
    method : Method
    names, exclude : sequence of str, optional
        See `cbs_opt.instances.prunable`.
    loss, metric, output_key : optional
        See `cbs_opt.instances.scores.Judge`.
    held_out : SampleSource, optional
        Samples for the choices; by default some of the training samples, see `Method.held_out`.
    device : {"auto", "cpu", "cuda"}
    state : Path or str, optional
        A file that is written after every stage; a run with the same arguments continues from it.
    first_model : Instance, optional
        The `first_model` of a run in one shot that differs in nothing but its budget: it is not made again.
    trials : int
        Choices that a stage may make, see `search.sparsest`: so many share its Gauss-Newton steps.
    progress : callable, optional
        See `cbs_opt.instances.export.Progress`.
    on_stage : callable, optional
        Called with every `Stage`, those read from `state` included.
    should_stop : callable, optional
        True ends the run with the network of the last stage; in the first stage of one shot, with the best
        selection so far.

    Attributes
    ----------
    copy : WorkingCopy
        The network as it is now.
    pool : Pool
    names : list of str
        Of the tensors that are pruned.
    budget : Budget
        The final one.
    n : int
        Number of weights that can be pruned.
    stages : list of Stage
        Those done.
    pruned : bool (n,)
    first_model : Instance or None
        The quadratic model of one shot, once it is made.
    before, score : Score or None
        Of the dense network and of the copy, on the held-out samples.

    Raises
    ------
    UsageError, InstanceError
        For data that do not fit the network, options that do not fit it, or a `state` of another run.
    """

    @outside_inference()
    def __init__(
        self,
        model: nn.Module,
        source: SampleSource,
        method: Method,
        *,
        names: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        loss: LossLike | None = None,
        metric: MetricLike | None = None,
        output_key: str | None = None,
        held_out: SampleSource | None = None,
        device: str = "auto",
        state: Path | str | None = None,
        first_model: Instance | None = None,
        trials: int = 1,
        progress: Progress | None = None,
        on_stage: Callable[[Stage], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        if state is not None:
            check_writable(state)
        self._state_path = state
        self._device = torch_device(device)
        self._progress, self._on_stage, self._should_stop = progress, on_stage, should_stop
        number = 0 if held_out is not None else method.held_out
        self.pool, own = divided(source, number, method.seed, method.mirror)
        self._held_out = held_out if held_out is not None else own
        self.method = method = method.for_pool(len(self.pool))
        labelled = self._held_out is not None and self._held_out.labels is not None
        self._held_out = self._held_out if labelled else None
        if method.chooses and self._held_out is None:
            logger.info("no labelled samples are held out: of several options the first is taken")
        plan = make_plan(
            model, names, exclude, source=method.source, run=lambda network: passes(network, source.inputs)
        )
        self.copy: WorkingCopy = working_copy(model, plan)
        self.copy.model.to(self._device)
        self.names = plan.names
        self._sizes = [place.layout.size for place in plan.places]
        shapes = [place.layout.rows_shape for place in plan.places]
        self._base = plan.fixed(method.keep_mask)
        recipe = method.recipe()
        self.budget = with_zeros(recipe.budget(shapes, plan.names), self._base)
        if method.keep_at_least is not None:
            weights = plan.weights
            self.budget, _ = keeping(self.budget, weights, self._sizes, method.keep_at_least, self._base)
        self.n = int(plan.weights.size)
        self.method = method = method.limited(self.n)
        self._judge = self._judged(loss, metric, output_key)
        self._scorer = Scorer(
            self._held_out, self._judge.loss, metric, output_key, self._device, self._should_stop
        )
        self._fisher: Fisher | None = method.fisher
        self._own_temperature = TEMPERATURE
        self._facts: Mapping[str, Any] = {}
        self.dense = self.copy.state()
        self.method = method = replace(method, gauss_newton=self._steps(method, trials))
        aims = method.targets == "dense" or method.refit != "no" or method.most_steps > 0
        self._dense = copy.deepcopy(self.copy.model) if aims else None
        self.before: Score | None = None
        self.score: Score | None = None
        self.stages: list[Stage] = []
        self.pruned: BoolArray = np.zeros(self.n, dtype=bool)
        self.first_model = first_model if method.stages == 1 else None
        self.interrupted = False

    def _steps(self, method: Method, trials: int) -> int:
        """How many Gauss-Newton steps there are at most after each stage, or each of its trials."""
        judged = self._scorer.source is not None and isinstance(self._scorer.loss, SampleLoss)
        if method.most_steps and not judged:
            logger.warning(
                "no Gauss-Newton steps: they are judged by the loss on labelled samples that are held out"
            )
        if not (method.takes_own_steps and judged):
            return method.most_steps
        each = operations(self.copy.model, in_memory(self.pool.drawn(1, _COUNTED)), method.samples or 1)
        wanted = max(1, OWN_STEPS // method.stages)
        if each is None:
            logger.info(
                "no Gauss-Newton steps, as the operations of the network cannot be counted: `--gauss-newton N` "
                "takes at most N"
            )
            return 0
        affordable = int(OWN_OPERATIONS / (each * method.stages * trials))
        if affordable < wanted:
            logger.info(
                f"{affordable} Gauss-Newton steps after each stage, as one takes about {each:.0e} operations: "
                "`--gauss-newton N` takes at most N"
            )
        return min(wanted, affordable)

    def _judged(self, loss: LossLike | None, metric: MetricLike | None, output_key: str | None) -> Judge:
        """A judge that knows the loss: the dense network is scored once, on some of the samples."""
        judge = Judge(loss, metric, output_key)
        drawn = self.pool.drawn(1, min(_JUDGED, self.method.samples or _JUDGED))
        needed = self.method.needs_labels
        if drawn.labels is None:
            if needed:
                raise InstanceError(
                    "the data have no labels, which the gradients of the loss need: give (inputs, labels), or "
                    "take kfac with `--fisher exact` or sampled and `--targets dense` or none, or reconstruction"
                )
            judge.loss = judge.loss or declared("cross-entropy", output_key)
            return judge
        try:
            dense_scores(self.copy.model, drawn.inputs, drawn.labels, judge, chunk_bytes=CHUNK_BYTES)
        except (InstanceError, UsageError) as error:
            optional = self.method.source == "reconstruction" and judge.loss is None
            if needed or loss is not None or (self._held_out is not None and not optional):
                raise
            if self._held_out is not None:
                logger.warning(
                    f"the held-out samples are not scored, and of several options the first is taken: {error}"
                )
                self._held_out = None
            judge.loss = declared("cross-entropy", output_key)
        return judge

    @property
    def held_out(self) -> int:
        """Number of samples held out."""
        return 0 if self._held_out is None else len(self._held_out)

    @outside_inference()
    def __call__(self) -> Pruned:
        """Do the work; the model of the result is the copy."""
        try:
            for _ in self.steps():
                pass
        except Stopped:
            self.interrupted = True
        return self.outcome()

    @outside_inference()
    def score_dense(self) -> None:
        """Score the dense network on the held-out samples."""
        self.before = self.score = self._scorer(self.copy)

    def steps(self) -> Iterator[Stage]:
        """Do the work stage by stage; the copy is the network after the stage that was yielded last.

        Raises
        ------
        Stopped
            When it was asked to stop before a stage ended.
        """
        method = self.method
        loss = "" if self._judge.loss is None else self._judge.loss.name
        path, stored, data, run = self._state_path, None, None, ""
        if path is not None:
            sizes = len(self.pool), self.held_out
            run = fingerprint(method, self.copy.model, self.dense, self.names, *sizes, loss)
            data = DataFacts.of(self.pool, self._held_out)
            stored = read_state(path, run)
        self.score_dense()
        dense_loss = None if self.before is None else self.before.loss
        if stored is not None:
            assert path is not None and data is not None
            stored.check_same(path, data, dense_loss)
            logger.info(f"{self._state_path}: continues after stage {len(stored.stages)} of {method.stages}")
            self.copy.restore(stored.tensors)
            self.pruned = stored.pruned
            self.score = self._scorer(self.copy)
            for stage in stored.stages:
                self.stages.append(stage)
                self.tell(stage)
            yield self.stages[-1]
        for number in range(len(self.stages) + 1, method.stages + 1):
            self.advance(number, self.part(number))
            if path is not None and data is not None:
                done = Stored(tuple(self.stages), self.copy.state(), self.pruned, dense_loss, data)
                write_state(path, done, run)
            self.tell(self.stages[-1])  # what has been told is stored
            yield self.stages[-1]

    @outside_inference()
    def advance(self, number: int, part: float) -> None:
        """Do one stage, up to a part of the budget.

        Raises
        ------
        Stopped
            When it was asked to stop; the copy is then as it was before.
        """
        started = time.perf_counter()
        samples = self.samples_of(number)
        model = self.first_model
        if model is None:
            model = self.model_around(number, samples)
            self.first_model = model if self.method.stages == 1 else None
        self._facts = model.metadata
        choice = self.choice(number, part, samples, model)
        self.take(number, choice, time.perf_counter() - started)

    def samples_of(self, number: int, step: int = 0) -> SampleSource:
        """The samples of a stage, or those of its Gauss-Newton steps 1, 2, …."""
        method = self.method
        return in_memory(self.pool.drawn((number - 1) * (1 + method.most_steps) + 1 + step, method.samples or 1))

    @outside_inference()
    def choice(self, number: int, part: float, samples: SampleSource, instance: Instance) -> Choice:
        """The best network of a stage that prunes a part of the budget; raises `Stopped` as `advance` does."""
        budget, fixed = self.budget_of(part, self.pruned, instance)
        found = best(
            self.copy,
            problems(instance, self.method, self.dampings),
            budget,
            fixed,
            self.method,
            self._scorer,
            samples,
            seed=self.method.seed + number - 1,
            should_stop=self._should_stop,
            dense=self._dense,
            fresh=lambda step: self.samples_of(number, step),
            progress=self._progress or (lambda what, done, total: None),
        )
        if found is None or (self._should_stop() and self.method.stages > 1):
            raise Stopped
        return found

    def take(self, number: int, choice: Choice, seconds: float) -> None:
        """Let the copy be the network of a choice, and record it."""
        self.copy.restore(choice.state)
        self.stages.append(self._record(number, choice, self.score, seconds))
        self.pruned, self.score = choice.pruned, choice.score

    @outside_inference()
    def outcome(self) -> Pruned:
        """The result, for the network as it is now."""
        self.copy.model.cpu()
        now = self.copy.state()
        changed = {name: tensor for name, tensor in now.items() if not torch.equal(tensor, self.dense[name])}
        # A tensor that is pruned but not changed is told nevertheless: it may be stored in another form.
        changed |= {name: now[name] for name in self.names}
        used = sum(stage.samples for stage in self.stages)
        return Pruned(
            self.copy.model,
            self.copy.masks(self.pruned),
            tuple(self.stages),
            self.before,
            self.score,
            self.method,
            min(used, self.pool.indices.size),
            self.held_out,
            self.interrupted or self._should_stop(),
            changed,
        )

    def tell(self, stage: Stage) -> None:
        """Log a stage, and call `on_stage`."""
        logger.info(stage.line())
        if self._on_stage is not None:
            self._on_stage(stage)

    def _checked_progress(self, what: str, done: int, total: int) -> None:
        if self._should_stop():
            raise Stopped
        if self._progress is not None:
            self._progress(what, done, total)

    # One stage ------------------------------------------------------------------------------------------------

    def part(self, number: int) -> float:
        """The part of the budget that is pruned after a stage."""
        method = self.method
        growing = method.stages - method.final_stages + 1
        final = self.budget.total / max(self.n, 1)
        return share(method.schedule, min(number, growing), growing, final)

    @property
    def dampings(self) -> tuple[float, ...]:
        """Those of the grid, the largest first: a relative one can be made from it, from 0 it cannot."""
        return tuple(sorted(self.method.dampings, reverse=True))

    @outside_inference()
    def model_around(self, number: int, samples: SampleSource) -> Instance:
        """The quadratic model around the present weights, with the first damping."""
        method = self.method
        first = self.dampings[0]
        given: Mapping[str, Any] = {"relative_damping": first} if method.relative else {"damping": first}
        fisher = self._fisher
        if method.source == "kfac" and fisher is None:
            fisher = "exact"
        if method.temperature not in (None, 1.0) and not has_temperature("sampled", self._judge.loss):
            raise UsageError(
                "`temperature` is of class probabilities, which cross entropy and negative log likelihood have: "
                "leave it out"
            )
        weaker: dict[str, Fisher] = {"exact": "sampled", "sampled": "empirical"}
        while True:
            temperature = self._temperature(fisher)
            recipe = replace(method.recipe(fisher, number, temperature), **given)
            try:
                made = exported(
                    self.copy.model,
                    samples,
                    self.names,
                    recipe,
                    self._judge,
                    dense=number == 1,
                    device=self._device.type,
                    progress=self._checked_progress,
                )
                if method.targets != "dense" or self._dense is None:
                    return made
                return with_dense_targets(made, self.copy.model, self._dense, samples)
            except FisherError as error:
                if method.fisher == "exact" and method.temperature is None and temperature != 1:
                    self._own_temperature = 1.0
                    continue
                if method.fisher is not None or fisher not in weaker:
                    raise
                fisher = self._fisher = weaker[str(fisher)]
                if fisher == "empirical" and samples.labels is None:
                    raise InstanceError(
                        f"the data have no labels, and none can be drawn, as {error}: give (inputs, labels), or "
                        "take `--source reconstruction` (from Python `source=`), which needs none"
                    ) from error
                logger.info(f"kfac takes `--fisher {fisher}`: {error}")

    def _temperature(self, fisher: Fisher | None) -> float:
        """Of the class probabilities for kfac."""
        method = self.method
        if method.temperature is not None:
            return method.temperature
        applies = method.source == "kfac" and method.targets != "loss"
        return self._own_temperature if applies and has_temperature(fisher, self._judge.loss) else 1.0

    def budget_of(
        self, part: float, pruned: BoolArray, instance: Instance
    ) -> tuple[Budget, NDArray[np.int8] | None]:
        """Budget and fixed weights of a stage that prunes a part of the whole budget."""
        method = self.method
        fixed = None if self._base is None else self._base.copy()
        if method.masks == "grow" and pruned.any():
            fixed = np.zeros(self.n, np.int8) if fixed is None else fixed
            fixed[pruned] = 1
        budget = part_of(self.budget, part)
        if method.keep_at_least is not None:
            budget, fixed = keeping(budget, instance.weights, self._sizes, method.keep_at_least, fixed, log=False)
        return _raised(budget, fixed), fixed

    def _record(self, number: int, choice: Choice, before: Score | None, seconds: float) -> Stage:
        errors = self.method.source == "reconstruction" or choice.split == "normalised"
        softened = "temperature" in self._facts  # then the model is not of the loss
        known = before is not None and not (errors or softened) and self.method.targets != "dense"
        score = choice.score
        return Stage(
            number,
            float(choice.pruned.mean()),
            int(choice.pruned.sum()),
            min((self.method.samples or 0) * (1 + choice.gauss_newton), len(self.pool)),
            choice.predicted,
            before.loss + choice.predicted if known and before is not None else None,
            None if score is None or not math.isfinite(score.loss) else score.loss,
            None if score is None else score.value,
            None if score is None else score.metric,
            choice.damping,
            choice.update_scale,
            choice.split,
            choice.recalibrated,
            choice.status,
            seconds,
            choice.first_order_scale,
            choice.refitted,
            choice.gauss_newton,
        )


def _raised(budget: Budget, fixed: NDArray[np.int8] | None) -> Budget:
    """The budget, raised where more weights must stay zero than it would prune."""
    if fixed is None:
        return budget
    if budget.cross_groups is not None:
        check_room(budget, fixed, "keeping the weights at zero that an earlier stage pruned")
        return budget
    n = fixed.size
    least = np.bincount(budget.group_of(n)[fixed == 1], minlength=budget.number_of_groups)
    counts = np.maximum(budget.per_group, least)
    if budget.groups is None:
        return Budget(int(counts[0]))
    return Budget(int(counts.sum()), budget.groups, counts)
