"""One run of a solver: what the clock counts, what an error leaves, whose losses count."""

import numpy as np
import pytest

from cbs_opt import (
    Context,
    InstanceError,
    Monitor,
    Solver,
    SolverError,
    Status,
    Stop,
    evaluate,
    register,
    registry,
    solve,
)
from cbs_opt.interrupt import checkpoint
from cbs_opt.run import run_solver
from cbs_opt.solver import Capabilities


class Told(Solver):
    """Does in each phase what the test says."""

    name, summary, supports = "told", "made for a test", Capabilities()
    before = during = staticmethod(lambda instance, monitor: None)

    def prepare(self, instance, context):
        self.before(instance, context.monitor)

    def run(self, instance, context):
        return self.during(instance, context.monitor) or Status.CONVERGED


@pytest.fixture
def told(problem, monkeypatch):
    """`told(before, during, stop)`: the instance and the run of a solver that does that."""

    def run(before=None, during=None, stop=None, clock=None):
        for name, phase in (("before", before), ("during", during)):
            if phase is not None:
                monkeypatch.setattr(Told, name, staticmethod(phase))
        instance = problem(2).instance
        monitor = Monitor(stop) if clock is None else Monitor(stop, clock=clock)
        return instance, run_solver(Told(), instance, Context(monitor=monitor))

    return run


def selection(instance):
    return instance.budget.cheapest(-np.abs(instance.weights))


def report(instance, monitor):
    monitor.report(1.0, selection(instance))


def fail(instance, monitor):
    raise ValueError("late")


def test_the_solve_clock_starts_after_the_preparation(told):
    now = [100.0]

    def wait(seconds):
        return lambda instance, monitor: now.__setitem__(0, now[0] + seconds)

    _, run = told(wait(7.0), wait(2.0), clock=lambda: now[0])
    assert (run.build_seconds, run.solve_seconds) == (7.0, 2.0)


def test_losses_are_those_of_the_evaluator_not_the_claim(told):
    instance, run = told(during=report)
    assert run.monitor.objective == 1.0
    assert run.losses.selection_loss == evaluate(instance, selection(instance)).selection_loss != 1.0
    assert (run.status, run.error) == (Status.CONVERGED, None)


def test_an_error_keeps_the_incumbent(told):
    instance, run = told(during=lambda *given: report(*given) or fail(*given))
    assert run.status is Status.ERROR
    assert str(run.error) == "late"
    assert np.array_equal(run.pruned, selection(instance))
    assert run.losses is not None


def test_an_error_of_the_preparation_keeps_what_it_had_reported(told, monkeypatch):
    instance, run = told(lambda *given: report(*given) or fail(*given))
    assert run.solve_seconds is None
    assert np.array_equal(run.pruned, selection(instance))
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    register("told")(Told)
    result = solve(instance, "told")
    assert (result.status, result.solve_seconds) == (Status.ERROR, 0.0)
    assert np.array_equal(result.pruned, selection(instance))


def test_a_warm_start_survives_what_happens_before_the_first_report(problem, monkeypatch):
    instance = problem(2).instance
    start = selection(instance)
    for phase, stop in (("during", None), ("before", None), ("before", Stop(should_stop=lambda: True))):
        with monkeypatch.context() as patch:
            what = fail if stop is None else lambda instance, monitor: monitor.should_stop() and None
            patch.setattr(Told, phase, staticmethod(what))
            patch.setattr(Told, "supports", Capabilities(warm_start=True))
            run = run_solver(Told(), instance, Context(monitor=Monitor(stop), warm_start=start))
        assert np.array_equal(run.pruned, start)
        assert run.status is (Status.ERROR if stop is None else Status.INTERRUPTED)


def test_an_error_without_an_incumbent_has_no_selection(told):
    _, run = told(during=fail)
    assert (run.status, run.pruned, run.losses) == (Status.ERROR, None, None)


def test_a_run_stopped_before_its_first_selection_has_that_of_magnitude(told):
    instance, run = told(
        during=lambda instance, monitor: monitor.should_stop() and None, stop=Stop(max_iterations=0)
    )
    assert run.status is Status.ITERATION_LIMIT
    assert np.array_equal(run.pruned, instance.budget.cheapest(np.abs(instance.weights)))
    assert run.losses.selection_loss == evaluate(instance, run.pruned).selection_loss


def test_a_proof_takes_precedence_over_the_rule_that_stopped_the_run(told):
    def prove(instance, monitor):
        report(instance, monitor)
        return monitor.should_stop() and Status.OPTIMAL

    assert told(during=prove, stop=Stop(max_iterations=0))[1].status is Status.OPTIMAL


def test_a_selection_of_a_wrong_shape_has_no_losses(told):
    _, run = told(during=lambda instance, monitor: monitor.report(1.0, np.ones(3, dtype=bool)) and None)
    assert run.pruned.shape == (3,)
    assert run.losses is None


def test_an_instance_that_the_solver_cannot_take_is_refused_before_the_run(problem):
    with pytest.raises(SolverError, match="the device 'cuda'"):
        run_solver(Told(), problem(4).instance, Context(device="cuda"))


def test_errors_of_the_package_are_kept_as_they_are(told):
    def refuse(instance, monitor):
        raise InstanceError("too large")

    assert isinstance(told(refuse)[1].error, InstanceError)


def test_the_preparation_counts_as_part_of_the_time_limit(told):
    now = [0.0]

    def prepare(instance, monitor):
        now[0] = 7.0

    def ask(instance, monitor):
        assert (monitor.elapsed, monitor.remaining) == (0.0, 3.0)
        now[0] = 11.0
        assert monitor.should_stop()

    assert told(prepare, ask, Stop(time_limit=10.0), clock=lambda: now[0])[1].status is Status.TIME_LIMIT


def test_a_preparation_ends_at_the_time_limit(told):
    now = [0.0]

    def prepare(instance, monitor):
        now[0] = 7.0
        checkpoint()

    instance, run = told(prepare, fail, Stop(time_limit=5.0), clock=lambda: now[0])
    assert (run.status, run.error) == (Status.TIME_LIMIT, None)
    assert np.array_equal(run.pruned, instance.budget.cheapest(np.abs(instance.weights)))


def test_the_time_limit_of_a_benchmark_starts_after_the_preparation(problem, monkeypatch):
    now = [0.0]

    def prepare(instance, monitor):
        now[0] = 7.0
        assert monitor.should_stop()  # a wait for kernels ends
        checkpoint()

    monkeypatch.setattr(Told, "before", staticmethod(prepare))
    monkeypatch.setattr(Told, "during", staticmethod(report))
    monitor = Monitor(Stop(time_limit=5.0), clock=lambda: now[0])
    run = run_solver(Told(), problem(2).instance, Context(monitor=monitor), lambda: None)
    assert (run.status, run.monitor.objective) == (Status.CONVERGED, 1.0)


def test_a_joint_loss_that_is_not_the_objective_is_left_out_after_the_limit(told, problem, monkeypatch):
    now = [0.0]

    def late(instance, monitor):
        report(instance, monitor)
        now[0] = 20.0

    _, run = told(during=late, stop=Stop(time_limit=10.0), clock=lambda: now[0])
    assert run.losses.joint_loss is None
    assert run.losses.selection_loss > 0
    for wanted in ({"update": True}, {"objective": "joint"}):
        now[0] = 0.0
        monkeypatch.setattr(Told, "supports", Capabilities(objectives=frozenset({"selection", "joint"})))
        monitor = Monitor(Stop(time_limit=10.0), clock=lambda: now[0])
        run = run_solver(Told(), problem(2).instance, Context(monitor=monitor, **wanted))
        assert run.losses.joint_loss is not None


def test_no_optimum_is_claimed_that_the_evaluated_loss_does_not_reach(told, caplog):
    def closed(factor):
        def during(instance, monitor):
            loss = evaluate(instance, selection(instance)).selection_loss
            monitor.report(loss * factor, selection(instance))
            monitor.report_bound(loss * factor)
            return Status.OPTIMAL

        return during

    assert told(during=closed(1.0))[1].status is Status.OPTIMAL and not caplog.text
    assert told(during=closed(0.9))[1].status is Status.CONVERGED
    assert "is above the one that the solver proved optimal" in caplog.text
