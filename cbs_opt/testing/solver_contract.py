"""The contract of a solver, with enumeration as the reference."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from cbs_opt.arguments import as_solver
from cbs_opt.compilation import finish_compilation
from cbs_opt.errors import CbsError, SolverError
from cbs_opt.instance import Instance
from cbs_opt.losses import evaluate
from cbs_opt.result import Result, Status
from cbs_opt.solve import solve
from cbs_opt.solver import OBJECTIVES, Capabilities, Solver
from cbs_opt.stop import Stop
from cbs_opt.testing.contract import Check, require, require_close, run_all
from cbs_opt.testing.problems import CASES, Problem, make_problem
from cbs_opt.testing.statuses import require_true_status
from cbs_opt.typing import BoolArray

_ENDS: Mapping[str, Stop] = {
    "a time limit of 0": Stop(time_limit=0),
    "an iteration limit of 0": Stop(max_iterations=0),
    "an interrupt": Stop(should_stop=lambda: True),
    "a target that every selection meets": Stop(target=1e30),
    "no patience": Stop(no_improvement=0),
}
_NEEDS: Mapping[str, Callable[[Instance], bool]] = {
    "groups": lambda instance: instance.budget.groups is not None,
    "cross_groups": lambda instance: instance.budget.cross_groups is not None,
    "several_blocks": lambda instance: instance.curvature.number_of_blocks > 1,
    "linear": lambda instance: instance.linear is not None,
    "fixed": lambda instance: instance.fixed is not None,
    "indefinite": lambda instance: not instance.curvature.is_convex,
}
_GRACE = 5.0  # seconds that a run with a limit of 0.2 s may take, on a busy machine too
_BROKEN = (Status.ERROR, Status.INTERRUPTED)


def _within(seconds: float) -> Stop:
    """A rule that ends what does not come to its own end."""
    deadline = time.monotonic() + seconds
    return Stop(should_stop=lambda: time.monotonic() > deadline)


def check_solver(
    solver: str | type[Solver],
    *,
    parameters: Mapping[str, Any] | None = None,
    cases: Mapping[str, Mapping[str, Any]] = CASES,
    patience: float = 15.0,
) -> list[str]:
    """Check that a solver meets its contract, on problems small enough for enumeration.

    Parameters
    ----------
    solver : str or subclass of Solver
    parameters : mapping, optional
        Parameters of the solver.
    cases : mapping
        Problems, as arguments of `make_problem` by name.
    patience : float
        Seconds after which a solver that should terminate by itself is stopped, and fails.

    Returns
    -------
    list of str
        The names of the checks.

    Raises
    ------
    ContractError
        With a line for each check that failed.
    """
    checks = solver_checks(solver, parameters=parameters, cases=cases, patience=patience)
    return run_all(f"solver '{as_solver(solver).name}'", checks)


def solver_checks(
    solver: str | type[Solver],
    *,
    parameters: Mapping[str, Any] | None = None,
    cases: Mapping[str, Mapping[str, Any]] = CASES,
    patience: float = 15.0,
) -> list[Check]:
    """The checks of `check_solver`, one by one, for a test runner.

    Each objective that the solver minimises has its own; so has each case.
    """
    kind = as_solver(solver)
    checks = [
        Check("declaration", lambda: _declares_itself(kind)),
        Check("refusals", lambda: _refuses_what_it_does_not_claim(kind)),
    ]
    for objective in sorted(kind.supports.objectives & {*OBJECTIVES}):
        contract = _Contract(kind, objective, parameters, patience)
        checks += [Check(f"{objective}: {name}", body) for name, body in contract.checks(cases)]
    return checks


class _Contract:
    """The checks of one solver for one objective."""

    def __init__(
        self, solver: type[Solver], objective: str, parameters: Mapping[str, Any] | None, patience: float
    ) -> None:
        self.solver, self.objective, self.parameters, self.patience = solver, objective, parameters, patience
        self._warm = False

    def checks(self, cases: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Callable[[], None]]]:
        """Names and bodies; cases that the solver does not support must be refused."""
        some = ("gradients", "hessian, blocks", "everything")
        starts = ("gradients", "everything", "inverse hessian, blocks")
        families: list[tuple[str, int, Callable[[Problem], None], tuple[str, ...]]] = [
            ("result", 17, self.result_against_enumeration, tuple(cases)),
            ("same seed, same history", 5, self.same_seed_same_history, some),
            ("stop rules", 7, self.statuses_are_true, ("gradients",)),
            ("stopped at once", 6, self.feasible_when_stopped_at_once, ("gradients", "everything", "2:4")),
            ("warm start", 8, self.never_worse_than_its_start, starts if self.solver.supports.warm_start else ()),
        ]
        for name, seed, body, wanted in families:
            for case in wanted:
                if case in cases:
                    yield f"{name}, {case}", self._if_claimed(body, seed, cases[case])
        for seed in range(5):
            yield f"random problems {seed}", partial(self.random_problems, seed)
        large = {"n": 22, "kind": "hessian"}
        yield "time limit", self._if_claimed(self.keeps_a_time_limit, 9, large)
        singular = {"n": 8, "m": 2, "damping": 0.0}
        yield "singular Hessian", self._if_claimed(self.singular_hessian, 10, singular)
        yield "JSON", self._if_claimed(self.reports_json, 2, {})

    # Helpers -----------------------------------------------------------------------------------------------

    def solve(self, instance: Instance, stop: Stop | None = None, **options: Any) -> Result:
        """Solve; without `stop` the solver must terminate by itself."""
        if not self._warm:  # imports and compilation, before time is measured
            self._warm = True
            for case in ("hessian", "gradients, blocks", "shared, everything"):
                with contextlib.suppress(CbsError):
                    self.solve(make_problem(0, **CASES[case]).instance)
                finish_compilation()
        if stop is None:
            stop = _within(self.patience)
        return solve(
            instance, self.solver, objective=self.objective, parameters=self.parameters, stop=stop, **options
        )

    def _if_claimed(
        self, body: Callable[[Problem], None], seed: int, arguments: Mapping[str, Any]
    ) -> Callable[[], None]:
        def check() -> None:
            problem = make_problem(seed, **arguments)
            if claims(self.solver, problem.instance) and (self.objective == "selection" or problem.convex):
                body(problem)
                return
            try:
                self.solve(problem.instance)
            except SolverError as refusal:
                _require_sentence(refusal)
                require(self.solver.name in str(refusal), f"the refusal must name the solver, got: {refusal}")
            else:
                require(False, "an instance that it does not claim to take must be refused")

        return check

    def _require_feasible(self, problem: Problem, pruned: BoolArray) -> None:
        require(pruned.dtype == np.bool_, f"`pruned` must be bool, got {pruned.dtype}")
        require(
            any(np.array_equal(pruned, allowed) for allowed in problem.selections()),
            "the selection must meet the budget, the groups and `fixed`",
        )

    # Checks ------------------------------------------------------------------------------------------------

    def result_against_enumeration(self, problem: Problem) -> None:
        """Losses, bound, status, history of a complete run."""
        instance, rounding = problem.instance, 1e-9 * problem.scale() + 1e-300
        before = _contents(instance)
        result = self.solve(instance, seed=3)
        require(before == _contents(instance), "the solver must not change the instance")
        self._require_feasible(problem, result.pruned)
        loss = problem.selection_loss(result.pruned)
        require_close(
            result.selection_loss, loss, "the selection loss", rel=1e-9, scale=abs(loss) + problem.scale()
        )
        if problem.convex:
            loss = problem.joint_loss(result.pruned)
            scale = abs(loss) + 1e3 * rounding
            require_close(result.joint_loss or 0.0, loss, "the joint loss", rel=1e-6, scale=scale)
        else:
            require(result.joint_loss is None, "an indefinite Hessian must have no joint loss")
        losses = evaluate(instance, result.pruned)
        require(
            (result.selection_loss, result.joint_loss) == (losses.selection_loss, losses.joint_loss),
            "the losses must be those of `evaluate`",
        )
        optimum = problem.optimum(self.objective)
        require(result.objective >= optimum - rounding, f"no selection costs less than {optimum:.9g}")
        self._require_sound_bound(result, optimum, rounding)
        self._require_own_end(result)
        require(
            (result.weights is not None) == (self.objective == "joint"),
            "updated weights must come with the joint objective, and only then",
        )
        require(
            (result.solver, result.objective_kind, result.seed) == (self.solver.name, self.objective, 3),
            "the result must name solver, objective and seed",
        )
        objectives = [row.objective for row in result.history if row.objective is not None]
        require(objectives == sorted(objectives, reverse=True), "the incumbents of the history must not get worse")
        require(bool(objectives), "the history must have the incumbent")
        require_close(
            objectives[-1], result.objective, "the last incumbent of the history", rel=1e-6,
            scale=abs(result.objective) + 1e6 * rounding,
        )  # fmt: skip
        bounds = [row.bound for row in result.history if row.bound is not None]
        require(bounds == sorted(bounds), "the bounds of the history must not get worse")

    def _require_own_end(self, result: Result) -> None:
        require(result.status not in _BROKEN, f"the run must come to its own end, got status '{result.status}'")

    def _require_sound_bound(self, result: Result, optimum: float, rounding: float) -> None:
        if result.bound is not None:
            require(self.solver.supports.bound, "a bound must be claimed in `supports`")
            require(
                result.bound <= optimum + rounding,
                f"the bound {result.bound:.9g} must not exceed the optimum {optimum:.9g}",
            )
        if result.status is Status.OPTIMAL:
            require(result.bound is not None, "status 'optimal' needs a bound")
            require(
                abs(result.objective - optimum) <= 1e-6 * abs(optimum) + rounding,
                f"status 'optimal' needs the optimum {optimum:.9g}, got {result.objective:.9g}",
            )

    def random_problems(self, seed: int) -> None:
        """Random sizes, forms and budgets, from nothing to everything."""
        rng = np.random.default_rng(seed)
        for trial in range(4):
            n = int(rng.integers(2, 10))
            kind = ("hessian", "inverse_hessian", "gradients")[trial % 3]
            problem = make_problem(100 * seed + trial, n=n, kind=kind, budget=int(rng.integers(0, n + 1)))
            result = self.solve(problem.instance, seed=seed)
            optimum, rounding = problem.optimum(self.objective), 1e-9 * problem.scale()
            self._require_feasible(problem, result.pruned)
            require(
                result.status not in _BROKEN, f"the run must come to its own end, got status '{result.status}'"
            )
            require(result.objective >= optimum - rounding, f"no selection costs less than {optimum:.9g}")
            self._require_sound_bound(result, optimum, rounding)

    def same_seed_same_history(self, problem: Problem) -> None:
        """Two runs with one seed and one iteration limit differ only in time."""
        first, second = (self.solve(problem.instance, Stop(max_iterations=20), seed=11) for _ in range(2))
        histories = [[row[1:] for row in run.history] for run in (first, second)]
        require(bool(histories[0]), "the history must have the incumbent")
        same = histories[0] == histories[1] and np.array_equal(first.pruned, second.pruned)
        require(same, "the same seed and iteration limit must give the same history and selection")
        require(
            (first.iterations, first.status) == (second.iterations, second.status),
            "the same seed and iteration limit must give the same iterations and status",
        )

    def statuses_are_true(self, problem: Problem) -> None:
        """A run that says which rule ended it says the truth, and no rule that holds is passed over for long."""
        whole = self.solve(problem.instance)
        target = whole.objective + 1e-6 * problem.scale()
        rules: list[dict[str, Any]] = [
            {"target": target}, {"gap": 0.5}, {"max_iterations": 1}, {"no_improvement": 1}, {"time_limit": 1e-9},
        ]  # fmt: skip
        for stop in (Stop(**rule) for rule in rules):
            result = self.solve(problem.instance, stop)
            self._require_feasible(problem, result.pruned)
            require_true_status(result, stop)

    def feasible_when_stopped_at_once(self, problem: Problem) -> None:
        """Every rule that ends a run before its start leaves a feasible selection."""
        for end, stop in _ENDS.items():
            result = self.solve(problem.instance, stop)
            self._require_feasible(problem, result.pruned)
            require(result.status is not Status.ERROR, f"{end} must not end in status '{result.status}'")
            loss = problem.loss(self.objective, result.pruned)
            require_close(result.objective, loss, f"the objective after {end}", rel=1e-6, scale=abs(loss))
            self._require_sound_bound(result, problem.optimum(self.objective), 1e-9 * problem.scale())

    def never_worse_than_its_start(self, problem: Problem) -> None:
        """Whatever limits a run, its result is at most its warm start."""
        best = min(problem.selections(), key=lambda pruned: problem.loss(self.objective, pruned))
        for limits in ({}, {"time_limit": 0.0}, {"max_iterations": 1}):
            for start in (best, _largest(problem.instance)):
                stop = Stop(**limits) if limits else None
                result = self.solve(problem.instance, stop, warm_start=start)
                loss = problem.loss(self.objective, start)
                require(
                    result.objective <= loss + 1e-9 * problem.scale(),
                    f"the result {result.objective:.9g} must not be worse than the warm start {loss:.9g}",
                )

    def keeps_a_time_limit(self, problem: Problem) -> None:
        """A limit of 0.2 s on 22 weights ends the run within a few seconds."""
        self.solve(make_problem(9).instance)
        started = time.perf_counter()
        self.solve(problem.instance, Stop(time_limit=0.2))
        seconds = time.perf_counter() - started
        require(seconds < _GRACE, f"a time limit of 0.2 s must be kept, the run took {seconds:.1f} s")

    def singular_hessian(self, problem: Problem) -> None:
        """Without damping there is a result, or a sentence with the word `singular`."""
        try:
            result = self.solve(problem.instance)
        except CbsError as refusal:
            _require_sentence(refusal)
            require("singular" in str(refusal), f"the refusal must say that the Hessian is singular: {refusal}")
            return
        self._require_feasible(problem, result.pruned)
        loss = problem.selection_loss(result.pruned)
        require_close(result.selection_loss, loss, "the selection loss", rel=1e-6, scale=abs(loss))
        if result.weights is not None:
            move = result.weights - problem.w
            gradient = (problem.H @ move)[~result.pruned]
            require_close(
                gradient, np.zeros(gradient.size), "the gradient on the kept weights", rel=1e-8, scale=1.0
            )

    def reports_json(self, problem: Problem) -> None:
        """Parameters, environment and extras are JSON."""
        result = self.solve(problem.instance)
        try:
            json.dumps([dict(result.parameters), dict(result.environment), dict(result.extras)], allow_nan=False)
        except (TypeError, ValueError) as error:
            require(False, f"`parameters`, `environment` and `extras` must be JSON: {error}")


def claims(solver: type[Solver], instance: Instance) -> bool:
    """Whether a solver declares support for the special features of an instance."""
    return all(getattr(solver.supports, what) or not applies(instance) for what, applies in _NEEDS.items())


def _declares_itself(solver: type[Solver]) -> None:
    require(isinstance(getattr(solver, "name", None), str) and bool(solver.name), "a solver must have a `name`")
    summary = getattr(solver, "summary", "")
    require(
        isinstance(summary, str) and bool(summary) and "\n" not in summary, "`summary` must be one line of text"
    )
    require(isinstance(solver.supports, Capabilities), "`supports` must be of type Capabilities")
    objectives = solver.supports.objectives
    require(
        bool(objectives) and objectives <= {*OBJECTIVES},
        f"`supports.objectives` must hold 'selection', 'joint' or both, got {sorted(objectives)}",
    )


def _refuses_what_it_does_not_claim(solver: type[Solver]) -> None:
    supports, instance = solver.supports, make_problem(1).instance
    options: list[tuple[bool, dict[str, Any]]] = [
        (not supports.warm_start, {"warm_start": _largest(instance)}),
        (not supports.batched, {"batch_size": 4}),
        (not supports.on_card, {"device": "cuda"}),
        *((objective not in supports.objectives, {"objective": objective}) for objective in OBJECTIVES),
    ]
    for applies, option in options:
        if not applies:
            continue
        (name,) = option
        try:
            solve(instance, solver, **option)
        except SolverError as refusal:
            _require_sentence(refusal)
            require(solver.name in str(refusal), f"the refusal must name the solver, got: {refusal}")
        else:
            require(False, f"`{name}` is not claimed, and must be refused")


def _require_sentence(error: CbsError) -> None:
    text = str(error)
    require(
        bool(text) and "\n" not in text and "Traceback" not in text,
        f"a refusal must be one sentence, got {text!r}",
    )


def _largest(instance: Instance) -> BoolArray:
    """A feasible selection that is poor: the largest weights."""
    return instance.budget.cheapest(-np.abs(instance.weights), instance.fixed)


def _contents(instance: Instance) -> list[bytes]:
    """The arrays of an instance, to detect changes."""
    curvature = instance.curvature
    blocks = [curvature.block(k).tobytes() for k in range(curvature.number_of_blocks)]
    linear = b"" if instance.linear is None else instance.linear.tobytes()
    return [instance.weights.tobytes(), linear, *blocks]
