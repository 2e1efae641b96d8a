"""`check_solver` accepts an honest solver and finds each kind of dishonest one."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest

from cbs_opt import Capabilities, Solver, Status
from cbs_opt.losses import joint_loss, selection_loss
from cbs_opt.testing import CASES, ContractError, check_solver, solver_checks, solver_contract

FEW = {case: CASES[case] for case in ("hessian", "gradients", "everything")}


class Honest(Solver):
    """Magnitude, by hand."""

    name = "honest"
    summary = "an honest solver"
    supports = Capabilities(objectives=frozenset({"selection", "joint"}), warm_start=True)

    def select(self, instance, context):
        if context.warm_start is not None:
            return context.warm_start
        return instance.budget.cheapest(np.abs(instance.weights), instance.fixed)

    def loss(self, instance, context, pruned):
        return (selection_loss if context.objective == "selection" else joint_loss)(instance, pruned)

    def run(self, instance, context):
        pruned = self.select(instance, context)
        context.monitor.advance()
        context.monitor.report(self.loss(instance, context, pruned), pruned)
        return Status.CONVERGED


def test_honest_solver_passes():
    names = check_solver(Honest, cases=FEW)
    assert {"declaration", "refusals", "selection: time limit", "joint: result, everything"} <= {*names}
    assert names == [str(check) for check in solver_checks(Honest, cases=FEW)]


class ForgetsGroups(Honest):
    def select(self, instance, context):
        pruned = np.zeros(instance.n, dtype=bool)
        pruned[np.argsort(np.abs(instance.weights))[: instance.budget.total]] = True
        return pruned


class Flatters(Honest):
    def loss(self, instance, context, pruned):
        return 0.5 * super().loss(instance, context, pruned)


class ClaimsOptimality(Honest):
    def run(self, instance, context):
        super().run(instance, context)
        return Status.OPTIMAL


class BoundsWithoutProof(Honest):
    supports = Capabilities(objectives=frozenset({"selection"}), warm_start=True, bound=True)

    def run(self, instance, context):
        super().run(instance, context)
        context.monitor.report_bound(context.monitor.objective)
        return Status.CONVERGED


class BoundsWithoutClaim(Honest):
    def run(self, instance, context):
        super().run(instance, context)
        context.monitor.report_bound(-1e9)
        return Status.CONVERGED


class Gambles(Honest):
    def select(self, instance, context):
        if context.warm_start is not None:
            return context.warm_start
        return instance.budget.cheapest(np.random.default_rng().random(instance.n), instance.fixed)


class TakesItsTime(Honest):
    def run(self, instance, context):
        status = super().run(instance, context)
        if context.monitor.stop.time_limit == 0.2:
            time.sleep(0.5)
        return status


class NeverEnds(Honest):
    def run(self, instance, context):
        super().run(instance, context)
        while not context.monitor.should_stop():
            pass
        return Status.CONVERGED


class WritesToTheInstance(Honest):
    def run(self, instance, context):
        if instance.curvature.kind == "hessian":
            instance.curvature.flat *= 2
        return super().run(instance, context)


class SpeaksBinary(Honest):
    def run(self, instance, context):
        context.extras["when"] = object()
        return super().run(instance, context)


class HasNoSummary(Honest):
    summary = ""


class AcceptsNothing(Honest):
    supports = Capabilities(objectives=frozenset({"speed"}))


@pytest.mark.parametrize(
    ("solver", "sentence"),
    [
        (ForgetsGroups, "does not meet the budget"),
        (Flatters, "the last incumbent of the history is wrong"),
        (ClaimsOptimality, "status 'optimal' needs a bound"),
        (BoundsWithoutProof, "must not exceed the optimum"),
        (BoundsWithoutClaim, "a bound must be claimed"),
        (Gambles, "the same seed and iteration limit must give the same history"),
        (TakesItsTime, "a time limit of 0.2 s must be kept"),
        (WritesToTheInstance, "must not change the instance"),
        (SpeaksBinary, "must be JSON"),
        (HasNoSummary, "`summary` must be one line"),
        (AcceptsNothing, "`supports.objectives` must hold"),
    ],
)
def test_dishonest_solver_is_found(solver, sentence, monkeypatch):
    if solver is TakesItsTime:
        monkeypatch.setattr(solver_contract, "_GRACE", 0.4)
    checks = solver_checks(solver, cases=FEW)
    failures = []
    wanted = "selection: time limit" if solver is TakesItsTime else ""
    for check in checks:
        if wanted in check.name and "random" not in check.name:
            try:
                check()
            except Exception as error:
                failures.append(str(error))
    assert any(sentence in failure for failure in failures), failures


def test_run_without_end_is_stopped_and_found():
    case = {"hessian": CASES["hessian"]}
    (check,) = [c for c in solver_checks(NeverEnds, cases=case, patience=0.1) if "selection: result" in c.name]
    with pytest.raises(ContractError, match="must come to its own end, got status 'interrupted'"):
        check()


def test_every_failure_has_its_line():
    with pytest.raises(ContractError, match=r"solver 'honest' fails \d+ of \d+ checks") as failure:
        check_solver(ClaimsOptimality, cases=FEW)
    lines = str(failure.value).splitlines()
    assert sum("joint: result, hessian: " in line for line in lines) == 1
    assert len(lines) > 5


def test_module_needs_no_pytest(process_environment):
    code = (
        "import sys; sys.modules['pytest'] = None; sys.modules['hypothesis'] = None\n"
        "from cbs_opt.testing import check_solver\n"
        "print(len(check_solver('obd', cases={})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=process_environment, check=True
    )
    assert int(done.stdout) > 10
