"""How a network is pruned: the options of `prune`, checked, with their defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from cbs_opt.engines import make_engine
from cbs_opt.errors import UsageError
from cbs_opt.instances.recipe import (
    Along,
    Fisher,
    Form,
    Recipe,
    Source,
    check_options,
    checked_temperature,
    one_of,
)
from cbs_opt.pruning.schedule import SCHEDULES
from cbs_opt.scalars import checked_seed, is_finite, is_integer

Schedule = Literal["cubic", "exponential", "linear"]
Masks = Literal["grow", "return"]
Recalibrate = Literal["auto", "yes", "no"]
Refit = Literal["auto", "yes", "no"]
Split = Literal["global", "layer", "normalised", "auto"]
Targets = Literal["loss", "dense", "none"]

BATCH = 16
LARGEST_BATCH = 64
BATCHES = 500
SAMPLES = 2000
ROW_DAMPINGS = (0.001, 0.01)
FISHER_DAMPINGS = (0.1, 1.0, 10.0)
STAGE_DAMPINGS = (1.0, 10.0, 100.0)
STEPS = (0.1, 0.3, 1.0)
KFAC_STEPS = (0.02, 0.05, 0.1)
TEMPERATURE = 4.0
TIME_LIMITS = (10.0, 30.0)  # for the smallest networks and for large ones; kernels may have to be compiled
STAGE_TIME_LIMITS = (5.0, 10.0)
WEIGHTS_A_SECOND = 1000


_IN_PYTHON = {  # names that one might try
    "no_update": "update_scale=0",
    "update": "update_scale",
    "tensors": "names",
    "test_data": "held_out",
}
_LEAST = (
    ("stages", 1), ("final_stages", 1), ("samples", 1), ("batch", 1), ("held_out", 0), ("gauss_newton", 0),
)  # fmt: skip


@dataclass(frozen=True)
class Method:
    """How a network is pruned; what is not given gets a default that depends on the rest.

    Parameters
    ----------
    sparsity : float, optional
        Fraction of the weights to prune in the end; 0.9 by default, without `nm` and `layers`.
    stages : int
        1: one shot. More: each stage makes a new quadratic model of the network that the last one left.
    schedule : {"cubic", "exponential", "linear"}
        See `schedule.share`.
    final_stages : int
        How many of the stages have the final sparsity; at least the last one does.
    source : {"kfac", "fisher", "reconstruction"}
        Of H, see `cbs_opt.instances.recipe.Recipe`.
    fisher : {"exact", "sampled", "empirical"}, optional
        Labels of kfac; by default exact for classifiers with one class a sample, of at most 100 classes at a
        temperature above 1, else sampled.
    temperature : float, optional
        Of the class probabilities that kfac draws labels from, see `instances.fisher_terms`; for networks with
        class scores 4 by default, without the gradient of the loss as first-order term, else 1. That of the
        Gauss-Newton steps is another one.
    samples : int, optional
        Training samples of each stage; drawn anew for each. 2000 by default; for the Fisher matrix 1000 single
        samples in one shot, and 500 mini-batches in stages.
    batch : int, optional
        Samples whose mean gradient is a row of the Fisher matrix. H, first-order term and damping have the scale
        of single samples whatever it is. 1 in one shot by default; in stages 16, or, where `samples` is not given
        either, a 500th of the training samples, at most 64.
    targets : {"loss", "dense", "none"}, optional
        Where the first-order term comes from: the gradient of the loss on the samples of H ("loss"), or, for
        reconstruction and kfac, the outputs that each layer has in the dense network ("dense"), so that errors of
        earlier stages are made up for. By default "none" in one shot, and in stages "loss" for the Fisher matrix
        and "dense" for the others.
    first_order_scale : float or sequence of float, optional
        For the gradient of the loss: it is multiplied by this; of several the best is taken as for `damping`. 1 by
        default; for kfac 0.02, 0.05 and 0.1, as its H leaves out how rows and layers depend on each other, and is
        too small along the gradient.
    sequential : bool
        For reconstruction and kfac: layers are solved one after the other, each with the inputs that the layers
        pruned before give it, and the outputs of the dense network as targets.
    damping, relative_damping : float or sequence of float, optional
        Of H, see `Recipe`; of several the best one on the held-out samples is taken in every stage. By default
        relative: 0.001 and 0.01 of the mean diagonal of XXᵀ/m for reconstruction and kfac; 0.1, 1 and 10 times
        that of H for the Fisher matrix, 1, 10 and 100 times in stages.
    update_scale : float or sequence of float
        The update of the kept weights is multiplied by this; 0 for none. Of several the best is taken likewise. 1
        by default; for the Fisher matrix with the gradient of the loss 0.1, 0.3 and 1, as a whole step may be too
        long.
    refit : {"auto", "yes", "no"}, optional
        Whether the kept weights are then fitted, layer after layer, to the outputs of the dense network, see
        `refits.refit`; batch norms may take their statistics on the way. "auto", the default for kfac and
        reconstruction, decides by the loss on the held-out samples; "no" is that for the Fisher matrix.
    gauss_newton : int, optional
        After each stage, at most so many steps of all kept weights together towards the outputs of the dense
        network, see `gauss_newton.steps`; each on `samples` new training samples, and only as far as it lowers the
        loss on the held-out samples, without which there are none. For kfac and reconstruction, and for kfac by
        default: four in one shot, four divided by the stages, at least one, in stages, and fewer or none where
        they would take more than `gauss_newton.OWN_OPERATIONS`.
    curvature, blocks : optional
        Form and blocks of H, see `Recipe`.
    solver, objective : str, optional
        Of `cbs_opt.solve`; `joint` for the joint objective by default, but for stages and transposable patterns
        with the Fisher matrix `magnitude`, with an update.
    time_limit, max_iterations : optional
        Of each solve. Unless one of them is given: 10 to 30 seconds in one shot and 5 to 10 in a stage, by the
        number of weights.
    masks : {"grow", "return"}, optional
        Whether weights that an earlier stage pruned stay pruned. "grow" by default for the Fisher matrix, "return"
        for the others.
    recalibrate_bn : {"auto", "yes", "no"}
        Whether the statistics of batch norms are re-estimated on the training samples of the stage; "auto" decides
        by the loss on the held-out samples.
    split : {"global", "layer", "normalised", "auto"}
        One budget over all weights; the same fraction of each layer; one budget, with the errors of each layer
        divided by the size of its output; or the best of the three on the held-out samples.
    held_out : int, optional
        Training samples on which the choices are made, never used otherwise; a tenth, at most 5000, by default.
    per_layer, layers, nm, nm_along, keep_at_least, keep_mask : optional
        Budgets, see `Recipe`.
    seed : int
    threads : int, optional
        Of the solver.
    engine : {"serial", "processes", "ray"}
        Whether the workers of an engine solve the layers, see `cbs_opt.solve`; for reconstruction and kfac.
    workers : int, optional
        Of the engine.
    memory : int, optional
        Bytes that the export may use.
    keep : int, optional
        Weights that stay in the end, instead of `sparsity`.
    mirror : bool
        Whether the mirror image, left to right, of each training image is a sample of its own: for few images that
        mean the same either way. Those held out are not mirrored.

    Raises
    ------
    UsageError
        For options that make no sense, alone or together.
    """

    sparsity: float | None = None
    stages: int = 1
    schedule: Schedule = "cubic"
    final_stages: int = 1
    source: Source = "kfac"
    fisher: Fisher | None = None
    samples: int | None = None
    batch: int | None = None
    targets: Targets | None = None
    sequential: bool = False
    damping: float | Sequence[float] | None = None
    relative_damping: float | Sequence[float] | None = None
    first_order_scale: float | Sequence[float] | None = None
    update_scale: float | Sequence[float] | None = None
    refit: Refit | None = None
    gauss_newton: int | None = None
    curvature: Form | None = None
    blocks: str | int | None = None
    solver: str | None = None
    objective: str | None = None
    time_limit: float | None = None
    max_iterations: int | None = None
    masks: Masks | None = None
    recalibrate_bn: Recalibrate = "auto"
    split: Split = "global"
    held_out: int | None = None
    per_layer: bool = False
    layers: Mapping[str, float] | None = None
    nm: tuple[int, int] | None = None
    nm_along: Along = "inputs"
    keep_at_least: float | None = None
    keep_mask: bool = False
    seed: int = 0
    threads: int | None = None
    engine: str = "serial"
    workers: int | None = None
    memory: int | None = None
    keep: int | None = None
    temperature: float | None = None
    mirror: bool = False
    own_batch: bool = field(init=False)
    dampings: tuple[float, ...] = field(init=False)
    scales: tuple[float, ...] = field(init=False)
    first_order_scales: tuple[float, ...] = field(init=False)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Method:
        """The method with some options; raises `UsageError` for one that there is not, with the nearest name."""
        check_options("prune", options, [option.name for option in fields(cls) if option.init], _IN_PYTHON)
        return cls(**options)

    def __post_init__(self) -> None:
        one_of("schedule", self.schedule, SCHEDULES)
        if self.masks is None:
            self._set(masks="grow" if self.source == "fisher" else "return")
        one_of("masks", self.masks, ("grow", "return"))
        one_of("recalibrate_bn", self.recalibrate_bn, ("auto", "yes", "no"))
        if self.refit is None:
            self._set(refit="no" if self.source == "fisher" else "auto")
        one_of("refit", self.refit, ("auto", "yes", "no"))
        one_of("split", self.split, ("global", "layer", "normalised", "auto"))
        self._set(seed=checked_seed(self.seed))
        for name, least in _LEAST:
            value = getattr(self, name)
            if value is not None and (not is_integer(value) or value < least):
                raise UsageError(f"`{name}` must be a whole number of at least {least}, got {value!r}")
            if value is not None:
                self._set(**{name: int(value)})
        if self.final_stages > self.stages:
            raise UsageError(
                f"`final_stages` are some of the stages, at most {self.stages}, got {self.final_stages}"
            )
        if self.nm_along == "both" and self.stages > self.final_stages:
            raise UsageError(
                "`nm_along` both fixes how many weights each tile loses, so that no stage can prune fewer: "
                f"`stages` and `final_stages` must be equal, got {self.stages} and {self.final_stages}"
            )
        if self.split != "global" and (self.nm or self.layers or self.per_layer):
            raise UsageError("`split` divides one budget over the layers: it goes without `nm`, `layers` and "
                             "`per_layer`")  # fmt: skip
        if self.workers is not None and self.engine == "serial":
            raise UsageError("`workers` needs the engine processes or ray")
        if self.engine != "serial" and self.source == "fisher":
            raise UsageError(
                f"the engine {self.engine} divides layers whose rows share a Hessian: `source` reconstruction or "
                "kfac, got fisher"
            )
        if self.engine != "serial" and self.nm_along == "both":
            raise UsageError(
                f"the engine {self.engine} divides layers with one partition into groups: `nm_along` inputs or "
                "outputs, got both"
            )
        make_engine(self.engine, self.workers)
        self._set_source()
        self._set_solver()
        self._set_grids()
        self.recipe()

    def _set_source(self) -> None:
        by_rows = self.source != "fisher"
        staged = self.stages > 1
        if self.sequential and not by_rows:
            raise UsageError("`sequential` goes layer by layer: `source` reconstruction or kfac, got fisher")
        if self.gauss_newton and not by_rows:
            raise UsageError("`gauss_newton` is for `source` reconstruction and kfac, got fisher")
        targets = self.targets
        if targets is None:
            own: Targets = "dense" if by_rows else "loss"
            targets = "dense" if self.sequential else own if staged else "none"
        one_of("targets", targets, ("loss", "dense", "none"))
        if targets == "dense" and not by_rows:
            raise UsageError("`targets` dense are the outputs of layers: `source` reconstruction or kfac")
        if self.temperature is not None:
            self._set(temperature=checked_temperature(self.temperature))
        without = self.source != "kfac" or self.fisher == "empirical"
        if self.temperature not in (None, 1.0) and without:
            raise UsageError(
                "`temperature` is of the class probabilities of `source` kfac with `fisher` sampled or exact, got "
                f"{self.source if self.source != 'kfac' else 'empirical'}"
            )
        if targets == "loss" and self.source == "reconstruction":
            raise UsageError(
                "`targets` loss has the scale of the loss, which reconstruction has not: `source` kfac or fisher"
            )
        batch = self.batch
        self._set(own_batch=batch is None and self.samples is None and staged and not by_rows)
        if batch is None:
            batch = BATCH if staged and not by_rows else 1
        samples = self.samples
        if samples is None:
            samples = SAMPLES if by_rows else BATCHES * batch if batch > 1 else SAMPLES // 2
        if samples < batch:
            raise UsageError(f"`samples` {samples} is less than one `batch` of {batch}")
        form = self.curvature
        if form is None:
            form = "hessian" if by_rows else "gradients"
        self._set(targets=targets, batch=batch, samples=samples - samples % batch, curvature=form)

    def _set_solver(self) -> None:
        solver, objective = self.solver, self.objective
        if objective is not None:
            one_of("objective", objective, ("selection", "joint"))
        if solver is None and objective is None:
            cheap = self.source == "fisher" and (self.stages > 1 or self.nm_along == "both")
            solver, objective = ("magnitude", "selection") if cheap else ("joint", "joint")
        elif solver is None:
            solver = "joint" if objective == "joint" else "search"
        self._set(solver=solver, objective=objective)

    def _set_grids(self) -> None:
        if self.damping is not None and self.relative_damping is not None:
            raise UsageError("`damping` and `relative_damping` exclude each other")
        dampings = _grid("damping", self.damping) or _grid("relative_damping", self.relative_damping)
        if not dampings:
            steps = FISHER_DAMPINGS if self.stages == 1 else STAGE_DAMPINGS
            dampings = steps if self.source == "fisher" else ROW_DAMPINGS
            self._set(relative_damping=dampings)
        scales = _grid("update_scale", self.update_scale)
        if self.update_scale is None:
            scales = STEPS if self.targets == "loss" and self.source == "fisher" else (1.0,)
            self._set(update_scale=scales)
        if len(dampings) > 1 and self.curvature == "inverse-hessian":
            raise UsageError("several dampings need `curvature` hessian or gradients, got inverse-hessian")
        first_order = _grid("first_order_scale", self.first_order_scale)
        if self.first_order_scale is not None and self.targets != "loss":
            raise UsageError(f"`first_order_scale` is for `targets` loss, got {self.targets}")
        if self.first_order_scale is None:
            first_order = KFAC_STEPS if self.targets == "loss" and self.source == "kfac" else (1.0,)
        if self.refit == "yes" and not any(scales):
            raise UsageError("`refit` changes the kept weights: it goes without `update_scale` 0")
        if self.gauss_newton and not any(scales):
            raise UsageError("`gauss_newton` changes the kept weights: it goes without `update_scale` 0")
        self._set(dampings=dampings, scales=scales, first_order_scales=first_order)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def for_pool(self, count: int) -> Method:
        """The same method for so many training samples: mini-batches as large as 500 of them allow, at most 64.

        Only where neither `batch` nor `samples` was given: larger batches make a less noisy first-order term.
        """
        if not self.own_batch:
            return self
        batch = max(1, min(LARGEST_BATCH, count // BATCHES))
        return replace(self, batch=batch, samples=batch * min(BATCHES, max(1, count // batch)))

    @property
    def relative(self) -> bool:
        """Whether the dampings are multiples of the mean diagonal."""
        return self.damping is None

    @property
    def chooses(self) -> bool:
        """Whether there is something that held-out samples choose."""
        several = max(len(self.dampings), len(self.scales), len(self.first_order_scales)) > 1
        return several or self.most_steps > 0 or "auto" in (self.recalibrate_bn, self.split, self.refit)

    def limited(self, n: int) -> Method:
        """The method for n weights: with its default of the time limit, unless a limit is given."""
        if self.time_limit is not None or self.max_iterations is not None:
            return self
        least, most = TIME_LIMITS if self.stages == 1 else STAGE_TIME_LIMITS
        return replace(self, time_limit=min(least + n / WEIGHTS_A_SECOND, most))

    @property
    def needs_labels(self) -> bool:
        """Whether the labels of the training samples enter H or the first-order term."""
        return self.recipe("exact" if self.fisher is None else None).needs_labels

    @property
    def most_steps(self) -> int:
        """Of Gauss-Newton, after each stage."""
        return self.gauss_newton or 0

    @property
    def takes_own_steps(self) -> bool:
        """Whether the run decides how many Gauss-Newton steps there are."""
        return self.gauss_newton is None and self.source == "kfac" and self.updates

    @property
    def updates(self) -> bool:
        """Whether the kept weights change."""
        return self.scales != (0.0,)

    def recipe(self, fisher: Fisher | None = None, stage: int = 1, temperature: float = 1.0) -> Recipe:
        """The export of a stage, with the final budget and the first damping.

        Parameters
        ----------
        fisher : {"exact", "sampled", "empirical"}, optional
            In place of its own.
        stage : int
            Sets the seed of labels that are drawn.
        temperature : float
            Of the class probabilities.
        """
        damping = self.dampings[0]
        return Recipe(
            source=self.source,
            curvature=self.curvature,
            blocks=self.blocks,
            batch=self.batch or 1,
            damping=None if self.relative else damping,
            relative_damping=damping if self.relative else None,
            sparsity=self.sparsity,
            per_layer=self.per_layer,
            nm=self.nm,
            nm_along=self.nm_along,
            layers=self.layers,
            keep_at_least=self.keep_at_least,
            keep_mask=self.keep_mask,
            first_order=self.targets == "loss",
            fisher=(fisher or self.fisher) if self.source == "kfac" else None,
            seed=self.seed + stage - 1,
            memory=self.memory,
            keep=self.keep,
            temperature=temperature,
        )

    def to_dict(self) -> dict[str, Any]:
        """All options as JSON types, defaults included."""
        content = asdict(self)
        grids = ("dampings", "scales", "first_order_scales")
        for name in ("own_batch", *grids, "memory", "threads", "engine", "workers"):
            del content[name]
        # States of earlier versions have no such options.
        later = {"keep": self.keep is None, "refit": self.refit == "no", "mirror": not self.mirror}
        later["temperature"] = self.temperature is None and self.source != "kfac"
        later["gauss_newton"] = not self.gauss_newton
        later["first_order_scale"] = self.first_order_scale is None
        for name in (name for name, unused in later.items() if unused):
            del content[name]
        return {
            name: list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
            for name, value in content.items()
        }


def _grid(name: str, value: float | Sequence[float] | None) -> tuple[float, ...]:
    if value is None:
        return ()
    numbers = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not numbers:
        raise UsageError(f"`{name}` must have at least one number, got none; leave it out for the default")
    for number in numbers:
        if not is_finite(number) or number < 0:
            raise UsageError(f"`{name}` must be finite numbers ≥ 0, got {number!r}")
    return tuple(float(number) for number in numbers)
