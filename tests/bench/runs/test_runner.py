"""Running a benchmark: every row once, judged from outside, whatever happens to the solver or to the run."""

import itertools
import json
import random
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cbs_opt import (
    InstanceError,
    Solver,
    SolverError,
    Status,
    UsageError,
    evaluate,
    get_solver,
    register,
    registry,
    solve,
    solver_names,
    write_instance,
)
from cbs_opt.bench.anytime import CLOCKS
from cbs_opt.bench.reports.metrics import slack
from cbs_opt.bench.runs.configuration import read_configuration
from cbs_opt.bench.runs.runner import due, make_plan, refute, run_plan, summary
from cbs_opt.bench.runs.store import Row, Store, StoreError
from cbs_opt.bench.runs.task import TRACE_STEP, Task, run_on, run_task, thinned
from cbs_opt.engines import Processes, Serial
from cbs_opt.solver import Capabilities


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """Solvers registered by a test are forgotten after it; the package's own are loaded before."""
    for name in solver_names():
        with suppress(SolverError):
            get_solver(name)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


@pytest.fixture
def folder(tmp_path, problem):
    """Two small instances: a, of one block; b, with two groups."""
    write_instance(tmp_path / "a.npz", problem(3, n=12, kind="gradients").instance)
    write_instance(tmp_path / "b.npz", problem(4, n=10, kind="hessian", groups="rows").instance)
    return tmp_path


@pytest.fixture
def plan(folder):
    """`plan(text)`: the plan of a configuration that lies beside the instances."""

    def make(text, instances='["a.npz"]'):
        path = folder / "bench.toml"
        path.write_text(f"instances = {instances}\n{text}")
        return make_plan(read_configuration(path))

    return make


def made_by(name, run, **capabilities):
    """Register a solver whose `run` is the function given."""

    @register(name)
    class Made(Solver):
        summary = "made for a test"
        supports = Capabilities(**capabilities)

        def run(self, instance, context):
            return run(instance, context)

    return Made


def magnitude(instance):
    return instance.budget.cheapest(np.abs(instance.weights), instance.fixed)


def only_row(plan, solver):
    made = plan(f"[[solvers]]\nname = '{solver}'")
    with Store(Path(made.tasks[0].path).with_name("rows.sqlite"), "w") as store:
        outcome = run_plan(made, store)
        (row,) = store.rows(traces=True)
    assert outcome.made == 1
    assert outcome.kinds == {row.kind: 1}
    return row


def test_rows_are_the_product_of_the_settings(plan):
    made = plan(
        "sparsities = [0.5, 0.75, 'file']\nseeds = [0, 1]\ntime_limit = 2\n"
        "[[solvers]]\nname = 'random'\n"
        "[[solvers]]\nname = 'exact'\nobjective = 'joint'\nseeds = [7]\ntime_limit = 3.5\n"
        "[[solvers]]\nname = 'ls'\nparameters = { epsilon-relative = 1 }\nmost_weights = 11\n",
        '["*.npz"]',
    )
    found = {(Path(t.path).stem, t.solver, t.objective, t.budget, t.seed, t.time_limit) for t in made.tasks}
    assert found == {
        *(("a", "random", "selection", budget, seed, 2.0) for budget in (6, 9) for seed in (0, 1)),
        *(("a", "exact", "joint", budget, 7, 3.5) for budget in (6, 9)),
        # A budget per group leaves one problem.
        *(("b", "random", "selection", 5, seed, 2.0) for seed in (0, 1)),
        ("b", "exact", "joint", 5, 7, 3.5),
        ("b", "ls", "selection", 5, 0, 2.0),
        ("b", "ls", "selection", 5, 1, 2.0),
    }
    assert len(made.tasks) == len(found)
    assert {t.parameters for t in made.tasks if t.solver == "ls"} == {'{"epsilon_relative":1.0}'}
    assert [(i.name, i.n, i.curvature) for i in made.instances] == [("a", 12, "gradients"), ("b", 10, "hessian")]


def test_an_instance_counts_once_under_whatever_names(plan, folder):
    (folder / "copy.npz").write_bytes((folder / "a.npz").read_bytes())
    (folder / "deep").mkdir()
    (folder / "deep" / "b.npz").write_bytes((folder / "a.npz").read_bytes())
    made = plan(
        "[[solvers]]\nname = 'obs'", '["*.npz", "a.npz", "**/*.npz", "library:mlp-output-2?", "library:conv-18"]'
    )
    assert [instance.name for instance in made.instances] == ["a", "b", "mlp-output-20", "conv-18"]
    assert len(made.tasks) == 4


def test_a_row_holds_what_the_evaluator_says(plan):
    row = only_row(plan, "exact")
    from cbs_opt import read_instance

    instance = read_instance(Path(plan("[[solvers]]\nname='obs'").tasks[0].path))
    result = solve(instance, "exact")
    losses = evaluate(instance, result.pruned)
    assert row.kind == "ok"
    assert row.status == "optimal"
    assert (row.objective, row.selection_loss, row.joint_loss) == pytest.approx(
        (losses.selection_loss, losses.selection_loss, losses.joint_loss), rel=1e-12
    )
    assert row.bound <= row.objective
    assert row.gap <= 1e-6
    assert row.claimed_objective == pytest.approx(row.objective, rel=1e-9)
    assert row.nodes > 0
    assert row.trace[-1][1] == pytest.approx(row.objective, rel=1e-9)
    assert all(0 <= second <= row.solve_s + 1e-6 for second, _, _ in row.trace)
    assert row.row_s >= row.build_s + row.solve_s > 0
    assert row.cpu_s > 0
    assert row.started.endswith("+00:00")


def test_answers_that_are_wrong_are_rows_of_their_own_kind(plan):
    def boast(instance, context):
        context.monitor.report(1e-9, magnitude(instance))
        return Status.CONVERGED

    def overbound(instance, context):
        pruned = magnitude(instance)
        value = evaluate(instance, pruned).selection_loss
        context.monitor.report(value, pruned)
        context.monitor.report_bound(1.5 * value)
        return Status.OPTIMAL

    def short(instance, context):
        pruned = np.zeros(instance.n, dtype=bool)
        pruned[:2] = True
        context.monitor.report(evaluate(instance, pruned).selection_loss, pruned)
        return Status.CONVERGED

    def misshapen(instance, context):
        context.monitor.report(1.0, np.zeros(3, dtype=bool))
        return Status.CONVERGED

    for name, run in (("boast", boast), ("overbound", overbound), ("short", short), ("misshapen", misshapen)):
        made_by(name, run, bound=True)
    made = plan(
        "".join(f"[[solvers]]\nname = '{name}'\n" for name in ("boast", "overbound", "short", "misshapen"))
    )
    with Store(Path(made.tasks[0].path).with_name("rows.sqlite"), "w") as store:
        outcome = run_plan(made, store)
        rows = {row.label: row for row in store.rows()}
    assert {label: row.kind for label, row in rows.items()} == {
        "boast": "wrong",
        "overbound": "wrong",
        "short": "infeasible",
        "misshapen": "infeasible",
    }
    assert outcome.kinds == Counter(wrong=2, infeasible=2)
    assert rows["boast"].claimed_objective == 1e-9
    assert "claims the loss 1e-09, it is" in rows["boast"].message
    assert "claims the bound" in rows["overbound"].message
    assert rows["overbound"].bound > rows["overbound"].objective
    assert "misses the budget of 6" in rows["short"].message
    assert "must be bool (12,), got bool (3,)" in rows["misshapen"].message


def test_failures_are_rows_too(plan):
    def fall(instance, context):
        raise RuntimeError("no memory of it")

    def stumble(instance, context):
        pruned = magnitude(instance)
        context.monitor.report(evaluate(instance, pruned).selection_loss, pruned)
        raise ValueError("late")

    made_by("fall", fall)
    made_by("stumble", stumble)
    made_by("choosy", fall, groups=False)
    made = plan("".join(f"[[solvers]]\nname = '{name}'\n" for name in ("fall", "stumble", "choosy")), '["b.npz"]')
    with Store(Path(made.tasks[0].path).with_name("rows.sqlite"), "w") as store:
        run_plan(made, store)
        rows = {row.label: row for row in store.rows()}
    assert {label: row.kind for label, row in rows.items()} == {
        "fall": "error",
        "stumble": "error",
        "choosy": "unsupported",
    }
    assert rows["fall"].message == "RuntimeError: no memory of it"
    assert rows["fall"].objective is None
    assert rows["stumble"].message == "ValueError: late"
    assert rows["stumble"].objective == rows["stumble"].claimed_objective
    assert rows["choosy"].message == "solver 'choosy' cannot take a budget per group (`groups`)"


def test_a_solver_that_found_nothing_in_time_has_the_selection_of_solve(plan):
    made_by("slow", lambda instance, context: Status.TIME_LIMIT)
    row, magnitudes = only_row(plan, "slow"), plan("[[solvers]]\nname = 'magnitude'").tasks
    assert row.kind == "ok"
    assert row.status == "time_limit"
    assert row.objective == run_task(magnitudes[0]).row.objective


def test_a_bound_that_another_row_refutes_is_wrong(plan, caplog):
    def optimist(instance, context):
        """Twice magnitude's loss, by the same selection mirrored, with a bound just below it."""
        pruned = instance.budget.cheapest(-np.abs(instance.weights))
        value = evaluate(instance, pruned).selection_loss
        context.monitor.report(value, pruned)
        context.monitor.report_bound(0.999 * value)
        return Status.CONVERGED

    made_by("optimist", optimist, bound=True)
    made = plan("[[solvers]]\nname = 'optimist'\n[[solvers]]\nname = 'exact'\n")
    with Store(Path(made.tasks[0].path).with_name("rows.sqlite"), "w") as store:
        outcome = run_plan(made, store)
        rows = {row.label: row for row in store.rows()}
    assert outcome.refuted == 1
    assert rows["exact"].kind == "ok"
    assert rows["optimist"].kind == "wrong"
    assert "exact has the loss" in rows["optimist"].message


@pytest.mark.parametrize(("above", "refuted"), [(0.9, 0), (1.1, 1), (1.9, 1)])
def test_a_bound_is_refuted_beyond_the_slack(above, refuted, tmp_path):
    """By the best loss of the same problem, not of another budget or objective, and not by half of the slack."""
    key = {"instance_sha256": "ab", "parameters": "{}", "objective_kind": "joint", "budget": 4, "seed": 0}
    common = key | {"time_limit": None, "sparsity": 0.5, "kind": "ok"}
    best = Row(solver="good", label="good", objective=2.0, **common)
    bound = 2.0 + above * slack(2.0, 2.0, 3.0)
    rows = [
        Row(solver="proud", label="proud", objective=3.0, bound=bound, **common),
        best,
        Row(solver="good", label="low", objective=1.0, **common | {"budget": 3}),
        Row(solver="good", label="low", objective=1.0, **common | {"objective_kind": "selection"}),
        Row(solver="good", label="low", objective=1.0, **common | {"instance_sha256": "cd"}),
    ]
    with Store(tmp_path / "rows.sqlite", "w") as store:
        for row in rows:
            store.add(row)
        assert refute(store) == refuted
        assert [row.kind for row in store.rows()] == ["wrong" if refuted else "ok", *["ok"] * 4]


def test_finished_keys_are_skipped_and_some_are_made_again_on_demand(plan, folder):
    calls = Counter()

    def once(instance, context):
        calls[context.seed] += 1
        context.monitor.report(evaluate(instance, magnitude(instance)).selection_loss, magnitude(instance))
        if context.seed == 2 and calls[2] == 1:
            raise RuntimeError("at first")
        return Status.TIME_LIMIT if context.seed == 1 else Status.CONVERGED

    made_by("once", once)
    made = plan("seeds = [0, 1, 2]\n[[solvers]]\nname = 'once'\n")
    calls.clear()
    with Store(folder / "rows.sqlite", "w") as store:

        def go(**again):
            outcome = run_plan(made, store, **again)
            # The first row of a process is warmed up: a call on a tiny instance.
            return outcome.made, outcome.there

        assert go() == (3, 0)
        before = store.rows()
        assert go() == (0, 3)
        assert go(rerun_timeouts=True) == (1, 2)
        assert [row.id for row in store.rows()][:2] == [before[0].id, before[2].id]
        assert go(rerun_errors=True) == (1, 2)
        assert [row.kind for row in store.rows()] == ["ok"] * 3
        assert go(rerun_errors=True) == (0, 3)
        assert len({row.key for row in store.rows()}) == 3
        assert [task.seed for task in due(made, store.keys(), True, True)] == [1]
    wider = plan("seeds = [0, 1, 2, 3]\n[[solvers]]\nname = 'once'\n")
    assert "4 rows on 1 instances, 1 of them to be made" in "\n".join(
        summary(wider, due(wider, Store(folder / "rows.sqlite").keys(), False, False))
    )


def test_an_interrupt_leaves_finished_rows_only(plan, folder):
    made_by(
        "quick", lambda instance, context: context.monitor.report(1.0, magnitude(instance)) or Status.CONVERGED
    )
    made = plan("seeds = [0, 1, 2, 3]\n[[solvers]]\nname = 'magnitude'\n")
    asked = []

    class Two:
        rows = 0

        def start(self, total):
            assert total == 4

        def row(self, row):
            self.rows += 1
            if self.rows == 2:
                asked.append(True)

    with Store(folder / "rows.sqlite", "w") as store:
        outcome = run_plan(made, store, should_stop=lambda: bool(asked), progress=Two())
        assert outcome.interrupted
        assert [row.seed for row in store.rows()] == [0, 1]
        asked.clear()
        assert not run_plan(made, store).interrupted
        assert [row.seed for row in store.rows()] == [0, 1, 2, 3]


def test_a_run_that_an_interrupt_cut_short_is_no_row(plan, folder):
    def waits(instance, context):
        context.monitor.report(evaluate(instance, magnitude(instance)).selection_loss, magnitude(instance))
        while not context.monitor.should_stop():
            pass
        return Status.CONVERGED

    made_by("waits", waits)
    made = plan("[[solvers]]\nname = 'waits'\n")
    calls = []
    with Store(folder / "rows.sqlite", "w") as store:
        outcome = run_plan(made, store, should_stop=lambda: calls.append(1) or len(calls) > 3)
        assert store.rows() == []
    assert outcome.interrupted


def test_a_file_that_changes_while_it_is_used_gives_no_wrong_row(plan, folder, problem):
    made = plan("[[solvers]]\nname = 'magnitude'\n")
    write_instance(folder / "a.npz", problem(99, n=12).instance)
    row = run_task(made.tasks[0]).row
    assert row.kind == "error"
    assert "is not the file that it was" in row.message


@pytest.mark.skipif(sys.platform == "win32", reason="workers are killed by signals of Unix")
def test_processes_make_the_rows_that_serial_makes_though_one_is_killed(plan, folder, monkeypatch):
    from cbs_opt.bench.runs import runner

    made = plan("seeds = [0, 1, 2]\n[[solvers]]\nname = 'random'\n[[solvers]]\nname = 'obs'\n", '["*.npz"]')
    with Store(folder / "serial.sqlite", "w") as store:
        run_plan(made, store, Serial())
        wanted = {row.key: (row.kind, row.objective, row.joint_loss) for row in store.rows()}
    fatal = str(folder / "fatal")

    def killed_once(task):
        import os
        import pathlib
        import signal

        from cbs_opt.bench.runs.task import run_task

        if task.seed == 1 and task.solver == "random" and not pathlib.Path(fatal).exists():
            pathlib.Path(fatal).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return run_task(task)

    monkeypatch.setattr(runner, "run_task", killed_once)
    with Store(folder / "processes.sqlite", "w") as store:
        run_plan(made, store, Processes(2))
        rows = store.rows()
    assert Path(fatal).exists()
    assert {row.key: (row.kind, row.objective, row.joint_loss) for row in rows} == wanted
    assert len(rows) == len(wanted) == 12


def test_a_row_that_kills_every_worker_is_lost_and_says_so(plan, folder, monkeypatch):
    from cbs_opt.bench.runs import runner

    made = plan("seeds = [0, 1]\n[[solvers]]\nname = 'random'\n")

    class Losing:
        def run(self, tasks, work, should_stop):
            for task in tasks:
                yield task, None if task.seed == 1 else work(task)

    monkeypatch.setattr(runner, "Serial", Serial)
    with Store(folder / "rows.sqlite", "w") as store:
        outcome = run_plan(made, store, Losing())
        assert [(row.seed, row.kind) for row in store.rows()] == [(0, "ok"), (1, "lost")]
        assert outcome.kinds == Counter(ok=1, lost=1)


@pytest.mark.skipif(sys.platform == "win32", reason="processes are killed by signals of Unix")
@pytest.mark.parametrize(("engine", "kills"), [("serial", 4), ("processes", 2)])
def test_runs_killed_at_random_moments_lose_and_repeat_nothing(folder, engine, kills, process_environment):
    seeds = 40
    config, path = folder / "bench.toml", folder / "rows.sqlite"
    config.write_text(
        f"instances = ['*.npz']\nseeds = {list(range(seeds))}\n"
        "[[solvers]]\nname = 'random'\n[[solvers]]\nname = 'brute'\nobjective = 'joint'\n"
    )
    command = [sys.executable, "-m", "cbs_opt.cli.bench", "run", str(config), "-o", str(path), "-q"]
    command += ["--engine", engine, "--workers", "1"]
    wanted = {task.key for task in make_plan(read_configuration(config)).tasks}
    assert len(wanted) == 4 * seeds
    dice = random.Random(1)
    known, cut_short = {}, 0
    for _ in range(kills):
        process = subprocess.Popen(
            command, env=process_environment, stdout=subprocess.DEVNULL, start_new_session=True
        )
        more = len(known) + dice.randrange(1, seeds // kills)
        while process.poll() is None and count(path) < more:
            time.sleep(0.005)
        time.sleep(dice.uniform(0, 0.04))
        workers = children(process.pid)
        process.kill()
        process.wait(timeout=30)
        with Store(path) as store:
            rows = {row.key: row for row in store.rows()}
            assert len(rows) == len(store.rows())
        assert rows.keys() <= wanted
        assert all(rows[key] == row for key, row in known.items())
        assert len(rows) >= min(more, len(wanted))
        cut_short += len(rows) < len(wanted)
        known = rows
        assert all_end(workers)
    assert cut_short > 0
    done = subprocess.run(
        command, env=process_environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert f"{len(wanted) - len(known)} rows made" in done.stdout
    with Store(path) as store:
        rows = store.rows()
    assert Counter(row.key for row in rows) == dict.fromkeys(wanted, 1)
    assert {row.kind for row in rows} == {"ok"}
    assert all(row in rows for row in known.values())


def count(path):
    """Rows of a store that may not be there yet."""
    try:
        with Store(path) as store:
            return len(store.keys())
    except StoreError:
        return 0


def children(pid):
    """Processes that a process has started, where the system tells."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def all_end(pids):
    """Whether these processes end within some seconds."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not any(runs(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_peers_are_rows_like_others(plan):
    pytest.importorskip("dwave.samplers", reason="NOT TESTED: dwave-samplers is not installed")
    made = plan("time_limit = 0.05\n[[solvers]]\nname = 'dwave-tabu'\n[[solvers]]\nname = 'dwave-annealing'\n")
    for task in made.tasks:
        row = run_task(task).row
        assert row.kind == "ok", row.message
        assert row.solve_s > 0
        assert row.trace[-1][1] == pytest.approx(row.objective)
        assert row.bound is None
    row = run_task(replace(made.tasks[0], time_limit=None)).row
    assert (row.kind, row.message) == ("unsupported", "'dwave-tabu' needs a time limit: it has no end of its own")
    grouped = plan("time_limit = 1.0\n[[solvers]]\nname = 'dwave-tabu'\n", '["b.npz"]').tasks[0]
    assert run_task(grouped).row.kind == "unsupported"


def test_solvers_that_are_not_installed_are_skipped_with_a_reason(plan, caplog):
    made = plan(
        "[[solvers]]\nname='obs'\n[[solvers]]\nname='pyomo'\nparameters={solver='absent'}\nlabel='absent'\n"
    )
    assert [task.solver for task in made.tasks] == ["obs"]
    assert made.skipped == ("absent",)


def test_an_instance_at_hand_gives_the_row_of_its_file(plan, problem, monkeypatch):
    instance = problem(3, n=12, kind="gradients").instance
    task = Task.of(instance, "exact", "by hand", objective="joint", seed=7, clock="processor")
    ticks = itertools.count()
    monkeypatch.setitem(CLOCKS, "processor", lambda: next(ticks))
    row = run_on(instance, task)
    (of_file,) = plan("[[solvers]]\nname = 'exact'\nobjective = 'joint'\nseeds = [7]").tasks
    assert row.objective == run_task(of_file).row.objective == row.joint_loss
    assert (row.label, row.seed, row.budget, row.sparsity, row.status) == ("by hand", 7, 6, 0.5, "optimal")
    assert row.build_s == int(row.build_s) > 0
    assert row.solve_s == int(row.solve_s) > 0


def test_a_row_at_hand_keeps_all_events_and_the_store_those_a_millisecond_apart(plan, folder):
    def hurried(instance, context):
        pruned = magnitude(instance)
        value = evaluate(instance, pruned).selection_loss
        for k in range(50, -1, -1):
            context.monitor.report(value * (1 + k / 10), pruned)
        return Status.CONVERGED

    made_by("hurried", hurried)
    (task,) = plan("[[solvers]]\nname = 'hurried'").tasks
    assert len(run_task(task).row.trace) == 51
    assert 2 <= len(only_row(plan, "hurried").trace) < 51


def test_traces_are_thinned_to_a_millisecond():
    step = TRACE_STEP / 10
    events = [(step * k, 100.0 - k, None if k < 50 else float(k - 50)) for k in range(100)]
    kept = thinned(events)
    assert kept[0] == events[0]
    assert kept[-1] == pytest.approx(events[-1])
    assert len(kept) <= 2 * 100 * step / TRACE_STEP + 2
    assert thinned([(0.0, np.inf, np.nan)]) == [(0.0, None, None)]
    assert json.loads(json.dumps(kept)) == [list(event) for event in kept]


@pytest.mark.parametrize(
    ("instances", "error", "sentence"),
    [
        ('["none.npz"]', InstanceError, "none.npz"),
        ('["*.bin"]', UsageError, "no file matches"),
        ('["library:none-*"]', UsageError, "library:none-\\* matches none"),
        ('["broken.npz"]', InstanceError, "broken.npz"),
    ],
)
def test_unreadable_instances_are_told_before_anything_runs(plan, folder, instances, error, sentence):
    (folder / "broken.npz").write_bytes(b"no zip file")
    with pytest.raises(error, match=sentence):
        plan("[[solvers]]\nname = 'obs'", instances)
