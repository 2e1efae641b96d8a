"""`cbs-bench`: configurations and their mistakes, runs, interrupts, comparisons."""

import json
import signal
import subprocess
import sys
import time

import pytest

from cbs_opt import UsageError
from cbs_opt.bench.runs.configuration import read_configuration, shipped
from cbs_opt.bench.runs.runner import make_plan
from cbs_opt.bench.runs.show import duration
from cbs_opt.bench.runs.store import Store
from cbs_opt.cli.bench import main

GOOD = """# a comment
instances = ["instance.npz"]
seeds = [0, 1]

[[solvers]]
name = "magnitude"

[[solvers]]
name = "ls"
parameters = { epsilon_relative = 1e-6 }  # the published value is absolute
"""


@pytest.fixture
def config(tmp_path, instance_file):
    path = tmp_path / "bench.toml"
    path.write_text(GOOD)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "line", "sentence"),
    [
        ("seeds =", "seedz =", 3, "there is no key `seedz` here; known: name, description, instances,"),
        ('name = "ls"', 'name = "lz"', 9, "there is no solver 'lz'; known: random, magnitude"),
        ("epsilon_relative = 1e-6", "epsilom = 1", 10, "solver 'ls' has no parameter 'epsilom'; known: epsilon,"),
        ("1e-6", '"small"', 10, "parameter 'epsilon_relative' of solver 'ls' must be a float, got 'small'"),
        ("epsilon_relative = 1e-6", "epsilon = 1, epsilon_relative = 1", 10, "epsilon"),
        ("parameters =", "parameter =", 10, "there is no key `parameter` of a solver"),
        (
            "seeds = [0, 1]",
            "seeds = [0, 0]",
            3,
            "`seeds` must be a list of different whole numbers ≥ 0 and below 2^63, got '[0, 0]'",
        ),
        ("seeds = [0, 1]", "time_limit = 0", 3, "`time_limit` must be seconds, at least 0.001, got '0'"),
        ("seeds = [0, 1]", "sparsities = [1.5]", 3, "`sparsities` must be a list of numbers between 0 and 1"),
        ("seeds = [0, 1]", 'objective = "loss"', 3, "`objective` must be 'selection' or 'joint', got 'loss'"),
        ("seeds = [0, 1]", 'objective = "joint"', 9, "solver 'ls' minimises selection only, not 'joint'"),
        ('name = "ls"', 'name = "ls"\nobjective = "joint"', 10, "solver 'ls' minimises selection only"),
        ('name = "ls"', "", 8, "a solver without `name`"),
        (
            '"ls"\nparameters = { epsilon_relative = 1e-6 }',
            '"magnitude"',
            9,
            "is here twice with the same settings",
        ),
        ('name = "ls"', 'name = "ls"\nlabel = "magnitude"', 9, "two solvers are labelled 'magnitude'"),
        ('name = "ls"', 'name = "dwave-tabu"', 10, "peer 'dwave-tabu' has no parameters"),
        ("seeds = [0, 1]", "seeds = [0, 1", 5, "is not valid TOML"),
    ],
)
def test_mistakes_are_told_with_their_line(config, old, new, line, sentence):
    assert old in GOOD
    config.write_text(GOOD.replace(old, new))
    with pytest.raises(UsageError) as caught:
        read_configuration(config)
    text = str(caught.value)
    assert text.startswith(str(config))
    assert f"line {line}" in text
    assert sentence in text


def test_other_ways_to_write_the_same_are_found_too(config):
    config.write_text('instances = ["a"]\nsolvers = [\n  { name = "obs" },\n  { name = "obz" },\n]\n')
    with pytest.raises(UsageError, match=r"line \d: there is no solver 'obz'"):
        read_configuration(config)
    config.write_text('instances = ["a"]\n[[solvers]]\nname = "ls"\n[solvers.parameters]\nrho = 3\ntau = "x"\n')
    with pytest.raises(UsageError, match="line 6: parameter 'tau'"):
        read_configuration(config)
    config.write_text('instances = ["a"]\n')
    with pytest.raises(UsageError, match="`solvers` is missing"):
        read_configuration(config)
    with pytest.raises(
        UsageError,
        match="is neither a file nor one of the configurations best-subset, digits, exact, small-exact, smoke",
    ):
        read_configuration("smok")
    config.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is not UTF-8 text"):
        read_configuration(config)


@pytest.mark.parametrize("name", ["smoke", "small-exact", "exact", "digits", "best-subset"])
def test_what_ships_is_complete(name):
    configuration = read_configuration(name)
    plan = make_plan(configuration)
    assert configuration.name == name
    assert {entry.label for entry in configuration.solvers} == {task.label for task in plan.tasks} | set(
        plan.skipped
    )
    assert all(task.time_limit is not None for task in plan.tasks)
    if name == "smoke":
        assert len(plan.tasks) < 120
        assert sum(task.time_limit for task in plan.tasks) < 100
    if name == "exact":
        sizes = {instance.sha256: instance.n for instance in plan.instances}
        assert max(sizes[task.instance_sha256] for task in plan.tasks) == 200
    if name == "small-exact":
        assert len(plan.instances) >= 20
        assert {"exact", "highs", "scip", "gurobi", "dwave-tabu"} <= {
            entry.label for entry in configuration.solvers
        }
    assert set(shipped()) == {"smoke", "small-exact", "exact", "digits", "best-subset"}


def test_a_run_goes_on_where_it_ended(config, here, capsys):
    assert main(["run", "bench.toml", "-q", "--dry-run"]) == 0
    assert "bench: 4 rows on 1 instances, 4 of them to be made" in capsys.readouterr().out
    assert main(["run", "bench.toml", "-q", "--time-limit", "5"]) == 0
    assert capsys.readouterr().out.startswith("bench.sqlite: 4 rows made in ")
    assert main(["run", "bench.toml", "-q", "--time-limit", "5"]) == 0
    assert "0 rows made" in (out := capsys.readouterr().out)
    assert "4 were there" in out
    with Store("bench.sqlite") as store:
        rows = store.rows(traces=True)
        (instance,) = store.instances().values()
        (environment,) = store.environments().values()
    assert [(row.label, row.seed, row.kind, row.time_limit) for row in rows] == [
        ("magnitude", 0, "ok", 5.0),
        ("ls", 0, "ok", 5.0),
        ("magnitude", 1, "ok", 5.0),
        ("ls", 1, "ok", 5.0),
    ]
    assert instance.name == "instance"
    assert environment["threads"] == 1
    assert environment["numpy"]


def test_a_busy_store_is_refused(config, here, run, tmp_path):
    with Store("rows.sqlite", "w"):
        done = run("bench", "run", "bench.toml", "-o", "rows.sqlite", cwd=tmp_path)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "rows.sqlite: another cbs-bench writes to it at this moment" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["run", "nothing"], 2, "nothing: is neither a file nor one of the configurations"),
        (["run", "bench.toml", "--workers", "0"], 2, "--workers: must be a whole number ≥ 1"),
        (["run", "bench.toml", "--engine", "serial", "--workers", "2"], 2, "`serial` has one worker, not 2"),
        (["run", "bench.toml", "-o", "no/rows.sqlite"], 3, "there is no directory no"),
        (["run", "bench.toml", "-o", "bench.toml"], 3, "bench.toml: cannot be read as a store"),
        (["compare", "bench.toml", "none"], 3, "bench.toml: cannot be read as a store"),
        (["compare", "none", "none"], 3, "none: there is no such store"),
        (["compare", "none", "bench.toml", "--json", "./bench.toml"], 2, "is an input"),
        (["report", "bench.toml", "--profile", "bench.toml"], 2, "is an input"),
        ([], 2, "run | paper | report | compare"),
    ],
)
def test_bad_commands_are_one_sentence(config, here, capsys, arguments, code, sentence):
    assert main(arguments) == code
    told = capsys.readouterr()
    assert sentence in told.err
    assert told.err.count("\n") == 1
    assert "Traceback" not in told.err
    assert told.out == ""


def test_comparison_and_its_exit_code(config, here, capsys):
    for name in ("old", "new"):
        assert main(["run", "bench.toml", "-q", "-o", name]) == 0
    capsys.readouterr()
    with Store("new", "w") as store:
        for row in store.rows():
            row.objective *= 3.0
            store.add(row, replace=True)
    assert main(["compare", "old", "new", "-q"]) == 0
    assert "| all | selection | 4 |" in capsys.readouterr().out
    assert main(["compare", "old", "new", "-q", "--fail-above", "2", "--json", "-"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["whole"]["loss_ratio"] == pytest.approx(3.0)
    assert main(["compare", "new", "old", "-q", "--fail-above", "1000"]) == 0
    assert main(["list"]) == 0
    assert "small-exact" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="signals are of Unix")
def test_the_first_interrupt_keeps_every_finished_row(config, tmp_path, process_environment):
    config.write_text(
        "instances = ['instance.npz']\n[[solvers]]\nname = 'magnitude'\nsparsities = [0.5, 0.75]\n"
        "[[solvers]]\nname = 'joint'\ntime_limit = 60\nseeds = [0, 1]\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "cbs_opt.cli.bench", "run", str(config), "-o", str(tmp_path / "rows.sqlite")],
        env=process_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(rows_of(tmp_path / "rows.sqlite")) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "2 rows made" in out
    assert "interrupted: 2 rows are left" in out
    assert "every finished row is kept" in err
    assert [row.label for row in rows_of(tmp_path / "rows.sqlite")] == ["magnitude", "magnitude"]


def rows_of(path):
    if not path.is_file() or path.stat().st_size == 0:
        return []
    with Store(path) as store:
        return store.rows()


def test_durations():
    assert [duration(s) for s in (0.2, 99, 130, 7200)] == ["0 s", "99 s", "2 min", "2.0 h"]


def test_from_a_configuration_to_a_report(config, here, capsys, tmp_path):
    assert main(["run", "bench.toml", "-q", "-o", "rows.sqlite"]) == 0
    capsys.readouterr()
    assert main(["report", "rows.sqlite", "-q", "-o", "told", "--title", "Two solvers", "--profile", "p.svg"]) == 0
    assert capsys.readouterr().out == "told.md\ntold.html\np.svg\n"
    assert "Two solvers" in (tmp_path / "told.md").read_text(encoding="utf-8")
    assert "<svg" in (tmp_path / "p.svg").read_text(encoding="utf-8")
    assert main(["report", "none.sqlite", "-q"]) == 3
    assert "there is no such store" in capsys.readouterr().err
