"""`cbs-solve` as a user runs it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from cbs_opt import Solution, evaluate, read_instance, read_solution, write_instance, write_solution
from cbs_opt.cli.solve import main
from cbs_opt.solve import DEFAULT_SOLVERS

OPTIONS = [
    *("--solver", "--objective", "--sparsity", "--budget", "--update", "--damping", "--seed", "--set", "--config"),
    *("--time-limit", "--max-iterations", "--no-improvement", "--target", "--gap", "--list-solvers", "--check"),
    *("--device", "--threads", "--batch-size", "--solution", "--warm-start", "--json", "--history", "-q", "-v"),
]
KEYS = {
    "schema",
    "instance",
    "solver",
    "objective_kind",
    "parameters",
    "seed",
    "status",
    "objective",
    "selection_loss",
    "joint_loss",
    "bound",
    "gap",
    "pruned_count",
    "iterations",
    "runtime",
    "history",
    "environment",
}


@pytest.fixture
def solved(instance_file, capsys):
    """`solved("--solver", "ls", ...)`: exit code 0, and the JSON of the solve."""

    def call(*arguments):
        code = main([str(instance_file), *map(str, arguments), "--json", "-"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out)

    return call


@pytest.fixture
def refused(capsys):
    """`refused(code, ...)`: that exit code, one sentence on stderr, nothing on stdout; returns the sentence."""

    def call(code, *arguments):
        capsys.readouterr()
        assert main([*map(str, arguments)]) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("cbs-solve: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        assert "unexpected" not in err
        return err

    return call


def test_default_run_in_a_process(run, instance_file):
    done = run("solve", instance_file)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].split()[0] == "status"
    assert lines[1].split(maxsplit=1)[1] == "6 of 12 weights"
    assert "incumbent" in done.stderr
    assert f"solver {DEFAULT_SOLVERS['selection']}: " in done.stderr
    assert "Traceback" not in done.stderr


def test_json_on_stdout_is_one_object_and_nothing_else(run, instance_file):
    done = run("solve", instance_file, "--solver", "cbs", "--update", "--json", "-", "-v")
    assert done.returncode == 0
    content = json.loads(done.stdout, parse_constant=pytest.fail)
    assert set(content) >= KEYS
    instance = read_instance(instance_file)
    assert content["schema"] == 1
    assert content["instance"] == {
        "path": str(instance_file),
        "sha256": instance.sha256,
        "n": 12,
        "blocks": 1,
        "budget": 6,
    }
    assert (content["solver"], content["objective_kind"], content["seed"]) == ("cbs", "selection", 0)
    assert content["status"] == "converged"
    assert content["pruned_count"] == 6
    assert content["bound"] is None
    assert content["gap"] is None
    assert content["objective"] == content["selection_loss"] >= content["joint_loss"] >= 0
    assert set(content["runtime"]) == {"read_s", "build_s", "solve_s", "evaluate_s"}
    assert all(seconds >= 0 for seconds in content["runtime"].values())
    assert all(len(row) == 4 for row in content["history"])
    assert content["history"][-1][2] == pytest.approx(content["objective"])
    assert {"cbs_opt", "python", "numpy"} <= set(content["environment"])


def test_quiet_says_nothing_on_stderr(run, instance_file):
    done = run("solve", instance_file, "--solver", "magnitude", "-q", "--json", "-")
    assert done.returncode == 0
    assert done.stderr == ""
    json.loads(done.stdout)


def test_no_traceback_in_a_process(run, tmp_path):
    done = run("solve", tmp_path / "missing.npz")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"cbs-solve: {tmp_path / 'missing.npz'}: no such file\n"
    assert "Traceback" in run("solve", tmp_path / "missing.npz", "--debug").stderr


def test_numbers_that_overflow_are_a_sentence_without_warnings(run, problem, with_instance, tmp_path):
    case = with_instance(problem(1), weights=np.full(8, 1e200))
    write_instance(tmp_path / "i.npz", case.instance)
    done = run("solve", tmp_path / "i.npz", "--solver", "obd", "-q")
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.count("\n") == 1
    assert "exceeds the range of float64" in done.stderr


def test_help_and_version(run):
    done = run("solve", "--help")
    assert done.returncode == 0
    for option in OPTIONS:
        assert option in done.stdout
    assert run("solve", "--version").stdout.startswith("cbs-solve ")


def test_list_solvers(run):
    done = run("solve", "--list-solvers")
    assert done.returncode == 0
    for name in ("random", "magnitude", "obd", "obs", "rmp", "ls", "cbs", "brute"):
        assert any(line.startswith(f"{name} ") for line in done.stdout.splitlines())
    assert "--set epsilon_relative=" in done.stdout
    ascii_only = subprocess.run(
        [sys.executable, "-m", "cbs_opt.cli.solve", "--list-solvers"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        timeout=60,
    )
    assert ascii_only.returncode == 0
    assert b"magnitude" in ascii_only.stdout


@pytest.mark.parametrize(
    ("options", "budget"),
    [(["--budget", "3"], 3), (["--sparsity", "0.9"], 11), (["--sparsity", "0"], 0), (["--budget", "12"], 12)],
)
def test_budget_and_sparsity(solved, options, budget):
    content = solved("--solver", "magnitude", *options)
    assert content["instance"]["budget"] == content["pruned_count"] == budget


def test_objective(solved, instance_file):
    content = solved("--solver", "brute", "--objective", "joint")
    assert content["objective_kind"] == "joint"
    assert content["objective"] == content["joint_loss"]
    assert content["bound"] == pytest.approx(content["objective"], rel=1e-6)
    assert content["status"] == "optimal"
    assert 0 <= content["gap"] <= 1e-6
    assert content["objective"] <= solved("--solver", "brute")["joint_loss"] + 1e-12


def test_damping(solved, problem):
    small, large = (solved("--solver", "magnitude", "--damping", text)["objective"] for text in ("0", "100"))
    w = np.sort(np.abs(problem(3, n=12).w))[:6]
    assert large - small == pytest.approx(50 * (w**2).sum())


def test_limits(solved):
    assert solved("--solver", "rmp", "--max-iterations", 7)["iterations"] == 7
    assert solved("--solver", "rmp", "--max-iterations", 7)["status"] == "iteration_limit"
    assert solved("--solver", "rmp", "--time-limit", 0, "--set", "draws=1000")["status"] == "time_limit"
    assert solved("--solver", "rmp", "--target", 1e9, "--set", "draws=1000")["status"] == "target_reached"
    stalled = solved("--solver", "rmp", "--no-improvement", 3, "--set", "draws=9999", "--batch-size", 1)
    assert stalled["status"] == "no_improvement"
    assert stalled["iterations"] < 9999
    assert stalled["iterations"] - stalled["history"][-1][1] >= 3
    assert solved("--solver", "rmp", "--gap", 0.1)["status"] == "converged"


def test_seed(solved):
    first, again, other = (solved("--solver", "random", "--seed", seed) for seed in (4, 4, 5))
    assert first["objective"] == again["objective"] != other["objective"]
    assert first["seed"] == 4


def test_set_takes_dashes_and_underscores_and_reports_them(solved):
    for key in ("epsilon-relative", "epsilon_relative"):
        content = solved("--solver", "ls", "--set", f"{key}=0.25", "--set", "rho=3")
        assert content["parameters"]["epsilon_relative"] == 0.25
        assert content["parameters"]["rho"] == 3
        assert content["parameters"]["tau"] == 20


def test_underscores_in_options(instance_file, capsys):
    arguments = [str(instance_file), "--solver", "rmp", "--max_iterations", "3", "--batch_size=2", "--json=-"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["iterations"] == 3


def test_threads_and_device(solved):
    content = solved("--solver", "rmp", "--threads", 1, "--device", "cpu", "--batch-size", 8)
    assert content["environment"]["threads"] == 1
    assert content["environment"]["device"] == "cpu"


def test_threads_hold_for_torch_where_it_is_loaded(process_environment, instance_file):
    code = (
        "import torch, cbs_opt\n"
        "seen = []\n"
        "torch.set_num_threads(2)\n"
        "from cbs_opt.solvers.paper.batch_evaluator import BatchEvaluator\n"
        "values = BatchEvaluator.values\n"
        "def spy(self, selections):\n"
        "    seen.append(torch.get_num_threads()); return values(self, selections)\n"
        "BatchEvaluator.values = spy\n"
        f"cbs_opt.solve(cbs_opt.read_instance({str(instance_file)!r}), 'rmp', threads=1)\n"
        "assert set(seen) == {1} and torch.get_num_threads() == 2, seen\n"
    )
    environment = process_environment | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


def test_history_file(solved, tmp_path):
    content = solved("--solver", "brute", "--history", tmp_path / "h.csv")
    with (tmp_path / "h.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["seconds", "iteration", "objective", "bound"]
    as_json = [[None if text == "" else float(text) for text in row] for row in rows[1:]]
    assert as_json == [[None if v is None else float(v) for v in row] for row in content["history"]]
    assert as_json[0][3] is None
    assert as_json[-1][3] == pytest.approx(content["bound"])


def test_json_file_and_text_on_stdout(instance_file, tmp_path, capsys):
    assert main([str(instance_file), "--solver", "obd", "--json", str(tmp_path / "r.json")]) == 0
    assert capsys.readouterr().out.startswith("status")
    assert set(json.loads((tmp_path / "r.json").read_text())) >= KEYS


def test_solution_then_check_then_warm_start(instance_file, tmp_path, capsys, solved):
    path = tmp_path / "s.npz"
    content = solved("--solver", "brute", "--update", "--solution", path)
    instance = read_instance(instance_file)
    solution = read_solution(path, instance)
    assert solution.pruned.sum() == 6
    assert solution.weights == pytest.approx(evaluate(instance, solution.pruned).weights)
    assert solution.result["objective"] == content["objective"]
    assert main([str(instance_file), "--check", str(path), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["valid"] is True
    assert found["problems"] == []
    assert found["selection_loss"] == content["selection_loss"]
    assert found["weights_loss"] == pytest.approx(content["joint_loss"])
    for solver in ("ls", "cbs"):
        warm = solved("--solver", solver, "--warm-start", path)
        assert warm["objective"] == pytest.approx(content["objective"])
    assert solved("--solver", "cbs", "--warm-start", path, "--time-limit", 0)["objective"] == pytest.approx(
        content["objective"]
    )


def test_no_weights_without_update(solved, tmp_path):
    solved("--solver", "obd", "--solution", tmp_path / "s.npz")
    assert read_solution(tmp_path / "s.npz").weights is None


def test_check_of_a_solution_for_another_budget(solved, instance_file, tmp_path, capsys):
    solved("--solver", "obd", "--budget", 3, "--solution", tmp_path / "s.npz")
    assert main([str(instance_file), "--check", str(tmp_path / "s.npz")]) == 0
    assert "feasible        yes" in capsys.readouterr().out


def spoil(solution, **changes):
    parts = {
        "pruned": solution.pruned,
        "instance_sha256": solution.instance_sha256,
        "weights": solution.weights,
        "result": solution.result,
    }
    return Solution(**(parts | changes))


TAMPERED = {
    "one weight too many": (lambda s: {"pruned": s.pruned | (np.arange(12) == np.argmin(s.pruned))}, "budget"),
    "another selection": (lambda s: {"pruned": s.pruned[::-1].copy()}, "`selection_loss` is"),
    "better loss": (lambda s: {"result": {**s.result, "selection_loss": 1e-9}}, "`selection_loss` is"),
    "better joint loss": (lambda s: {"result": {**s.result, "joint_loss": 0}}, "`joint_loss` is"),
    "better objective": (lambda s: {"result": {**s.result, "objective": 1e-9}}, "`objective` is"),
    "loss as text": (lambda s: {"result": {**s.result, "selection_loss": "low"}}, "`selection_loss` is"),
    "huge loss": (lambda s: {"result": {**s.result, "selection_loss": 10**400}}, "`selection_loss` is"),
    "count": (lambda s: {"result": {**s.result, "pruned_count": 5}}, "`pruned_count` is 6"),
    "bound above": (lambda s: {"result": {**s.result, "bound": 1e9}}, "claimed bound"),
    "bound as text": (lambda s: {"result": {**s.result, "bound": "high"}}, "claimed bound"),
    "pruned but not zero": (lambda s: {"weights": s.weights + 1.0}, "`weights` is not zero"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_check_finds_what_was_tampered_with(case, solved, instance_file, tmp_path, capsys):
    change, text = TAMPERED[case]
    solved("--solver", "obd", "--update", "--solution", tmp_path / "s.npz")
    solution = read_solution(tmp_path / "s.npz")
    write_solution(tmp_path / "t.npz", spoil(solution, **change(solution)))
    assert main([str(instance_file), "--check", str(tmp_path / "t.npz"), "--json", "-"]) == 3
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["valid"] is False
    assert any(text in line for line in found["problems"])
    assert text in err
    assert "Traceback" not in err


@pytest.mark.parametrize("key", ["selection_loss", "joint_loss", "objective"])
@pytest.mark.parametrize(("factor", "code"), [(1 + 5e-7, 0), (1 - 5e-7, 0), (1 + 2e-6, 3), (1 - 2e-6, 3)])
def test_check_agrees_to_one_in_a_million(key, factor, code, solved, instance_file, tmp_path, capsys):
    solved("--solver", "obd", "--update", "--solution", tmp_path / "s.npz")
    solution = read_solution(tmp_path / "s.npz")
    result = {**solution.result, key: solution.result[key] * factor}
    write_solution(tmp_path / "t.npz", spoil(solution, result=result))
    assert main([str(instance_file), "--check", str(tmp_path / "t.npz"), "-q"]) == code
    capsys.readouterr()
    result = {**solution.result, "bound": solution.result["objective"] * factor}
    write_solution(tmp_path / "t.npz", spoil(solution, result=result))
    assert main([str(instance_file), "--check", str(tmp_path / "t.npz"), "-q"]) == (code if factor > 1 else 0)


def test_check_where_fixed_forbids_the_stored_budget(problem, tmp_path, capsys):
    write_instance(tmp_path / "i.npz", problem(1, fixed=True).instance)
    instance = read_instance(tmp_path / "i.npz")
    pruned = np.ones(8, dtype=bool)
    write_solution(tmp_path / "s.npz", Solution(pruned, instance.sha256, None, {"instance": {"budget": 8}}))
    assert main([str(tmp_path / "i.npz"), "--check", str(tmp_path / "s.npz")]) == 3
    assert "does not meet the budget" in capsys.readouterr().err


def test_check_of_weights_whose_loss_overflows(problem, tmp_path, capsys):
    write_instance(tmp_path / "i.npz", problem(1).instance)
    instance = read_instance(tmp_path / "i.npz")
    pruned = np.arange(8) < 4
    weights = np.where(pruned, 0.0, 1e300)
    write_solution(tmp_path / "s.npz", Solution(pruned, instance.sha256, weights))
    main([str(tmp_path / "i.npz"), "--check", str(tmp_path / "s.npz"), "--json", "-"])
    assert json.loads(capsys.readouterr().out)["weights_loss"] is None


def test_solution_files_that_are_wrong(refused, problem, instance_file, tmp_path, solved):
    write_instance(tmp_path / "other.npz", problem(9, n=12).instance)
    assert main([str(tmp_path / "other.npz"), "-q", "--solver", "obd", "--solution", str(tmp_path / "s.npz")]) == 0
    for option in ("--check", "--warm-start"):
        text = refused(3, instance_file, option, tmp_path / "s.npz", "-q")
        assert "belongs to another instance" in text
        assert "no such file" in refused(3, instance_file, option, tmp_path / "none.npz", "-q")
        assert "`format`" in refused(3, instance_file, option, instance_file, "-q")
    solved("--solver", "obd", "--budget", 3, "--solution", tmp_path / "three.npz")
    text = refused(2, instance_file, "--warm-start", tmp_path / "three.npz", "-q")
    assert "does not meet the budget of 6" in text


USAGE = {
    "no instance": ([], "an instance file is needed"),
    "unknown option": (["{i}", "--frobnicate"], "--frobnicate"),
    "abbreviation": (["{i}", "--solv", "ls"], "--solv"),
    "two instances": (["{i}", "{i}"], "unrecognized arguments"),
    "unknown parameter": (["{i}", "--solver", "ls", "--set", "eps=1"], "no parameter 'eps'; known: epsilon, "),
    "no parameters": (["{i}", "--solver", "magnitude", "--set", "x=1"], "known: none"),
    "set without value": (["{i}", "--set", "rho"], "KEY=VALUE"),
    "set not a number": (["{i}", "--solver", "ls", "--set", "rho=ten"], "'rho' of solver 'ls' must be a int"),
    "set NaN": (["{i}", "--solver", "ls", "--set", "epsilon=nan"], "'epsilon' of solver 'ls'"),
    "set out of range": (["{i}", "--solver", "ls", "--set", "rho=0"], "`rho` must be at least 1"),
    "both epsilons": (["{i}", "--solver=ls", "--set=epsilon=1", "--set=epsilon-relative=1"], "exclude each other"),
    "sparsity above one": (["{i}", "--sparsity", "1.5"], "--sparsity"),
    "sparsity NaN": (["{i}", "--sparsity", "nan"], "--sparsity"),
    "budget and sparsity": (["{i}", "--sparsity", "0.5", "--budget", "2"], "exclude each other"),
    "budget negative": (["{i}", "--budget", "-1"], "--budget"),
    "budget fraction": (["{i}", "--budget", "2.5"], "--budget"),
    "time limit negative": (["{i}", "--time-limit", "-1"], "--time-limit"),
    "time limit infinite": (["{i}", "--time-limit", "inf"], "--time-limit"),
    "iterations text": (["{i}", "--max-iterations", "many"], "--max-iterations"),
    "no improvement zero": (["{i}", "--no-improvement", "0"], "--no-improvement"),
    "target NaN": (["{i}", "--target", "nan"], "--target"),
    "gap negative": (["{i}", "--gap", "-0.1"], "--gap"),
    "seed negative": (["{i}", "--seed", "-3"], "--seed"),
    "threads zero": (["{i}", "--threads", "0"], "--threads"),
    "batch zero": (["{i}", "--batch-size", "0"], "--batch-size"),
    "device": (["{i}", "--device", "tpu"], "--device"),
    "objective": (["{i}", "--objective", "both"], "--objective"),
    "quiet and verbose": (["{i}", "-q", "-v"], "exclude each other"),
    "huge number": (["{i}", "--budget", "9" * 5000], "--budget"),
    "output is input": (["{i}", "--solution", "{i}"], "is an input"),
    "output is input, json": (["{i}", "--json", "{i}"], "is an input"),
    "outputs equal": (["{i}", "--json", "{d}/x", "--history", "{d}/x"], "two outputs"),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage(case, refused, instance_file, tmp_path):
    arguments, text = USAGE[case]
    before = instance_file.read_bytes()
    sentence = refused(2, *(a.format(i=instance_file, d=tmp_path) for a in arguments))
    assert text in sentence
    assert instance_file.read_bytes() == before
    assert len(sentence) < 1000 or "huge" in case


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--budget", "13"], 2, "`budget` must be in [0, 12], got 13"),
        (["--solver", "cbz"], 4, "there is no solver 'cbz'; known: random, magnitude"),
        (["--solver", "ls", "--objective", "joint"], 4, "'ls' minimises selection only"),
        (["--solver", "ls", "--batch-size", "3"], 4, "'ls' cannot take a batch size"),
        (["--solver", "obd", "--device", "cuda"], 4, "'obd' cannot take the device 'cuda'"),
        (["--solver", "obd", "--warm-start", "{s}"], 4, "'obd' cannot take a warm start"),
        (["--solver", "obs", "--damping", "0"], 0, ""),
    ],
)
def test_refused_after_reading(arguments, code, text, refused, solved, instance_file, tmp_path, capsys):
    solved("--solver", "obd", "--solution", tmp_path / "s.npz")
    arguments = [str(instance_file), "-q", *(a.format(s=tmp_path / "s.npz") for a in arguments)]
    if code:
        assert text in refused(code, *arguments)
    else:
        assert main(arguments) == 0


def test_singular_hessian_and_obs(refused, problem, tmp_path):
    write_instance(tmp_path / "i.npz", problem(1, m=2, damping=0.0).instance)
    sentence = refused(4, tmp_path / "i.npz", "--solver", "obs", "-q")
    assert "solver 'obs' cannot take the instance: block 0 of the Hessian is singular" in sentence


def test_budget_of_patterns_and_damping_of_dense_blocks_cannot_change(refused, problem, tmp_path):
    instance = problem(1, groups="2:4", kind="hessian").instance
    write_instance(tmp_path / "i.npz", replace(instance, metadata={"nm": "2:4"}))
    assert "has the pattern 2:4" in refused(2, tmp_path / "i.npz", "--budget", "2", "-q")
    assert "already inside dense" in refused(2, tmp_path / "i.npz", "--damping", "1", "-q")
    assert main([str(tmp_path / "i.npz"), "--budget", "4", "--solver", "obd", "-q"]) == 0


@pytest.mark.parametrize("option", ["--solution", "--json", "--history"])
def test_outputs_that_cannot_be_written_are_found_before_the_work(option, refused, tmp_path, monkeypatch):
    def no_reading(path):
        pytest.fail("the instance was read before the outputs were checked")

    monkeypatch.setattr("cbs_opt.cli.solve.read_instance", no_reading)
    (tmp_path / "file").write_text("x")
    for target in (tmp_path, tmp_path / "none" / "out", tmp_path / "file" / "out"):
        assert f"{target}: cannot be written" in refused(3, tmp_path / "i.npz", option, target)


def test_output_through_a_link_to_the_input_is_refused(refused, instance_file, tmp_path):
    (tmp_path / "link.npz").symlink_to(instance_file)
    assert "is an input" in refused(2, instance_file, "--solution", tmp_path / "link.npz")


def test_failed_write_keeps_the_old_file_and_the_other_outputs(instance_file, tmp_path, monkeypatch, capsys):
    import cbs_opt.files.npz as npz

    (tmp_path / "s.npz").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(npz.npy_format, "write_array_header_1_0", full)
    arguments = ["--solver", "obd", "-q", "--solution", tmp_path / "s.npz", "--json", tmp_path / "r.json"]
    assert main([str(instance_file), *map(str, arguments)]) == 3
    assert "No space left on device" in capsys.readouterr().err
    assert (tmp_path / "s.npz").read_text() == "old"
    assert json.loads((tmp_path / "r.json").read_text())["pruned_count"] == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["instance.npz", "r.json", "s.npz"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="NOT TESTED: needs /dev/full")  # noqa: PTH110
def test_devices_stay_devices(run, instance_file):
    for arguments in (["--history", "/dev/null"], ["--json", "/dev/null"], ["--solution", "/dev/null"]):
        assert run("solve", instance_file, "--solver", "obd", *arguments).returncode == 0
        assert not os.path.isfile("/dev/null")  # noqa: PTH113
    done = run("solve", instance_file, "--solver", "obd", "-q", "--json", "/dev/full")
    assert done.returncode == 3
    assert "No space left" in done.stderr
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, "-m", "cbs_opt.cli.solve", str(instance_file), "--solver", "obd", "-q"],
            stdout=full,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            timeout=60,
        )
    assert done.returncode == 3
    assert done.stderr.decode() == "cbs-solve: stdout: cannot be written: No space left on device\n"


@pytest.mark.parametrize("arguments", [["--json", "-"], ["--json", "r.json"], ["--list-solvers"]])
def test_broken_pipe_is_silent(arguments, instance_file, tmp_path, process_environment):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "cbs_opt.cli.solve", instance_file, "--solver", "obd", "-q"),
                *("--solution", tmp_path / "s.npz", *arguments),
            ],
            stdout=writer,
            stderr=subprocess.PIPE,
            env=process_environment,
            cwd=tmp_path,
            timeout=60,
        )
    finally:
        os.close(writer)
    assert done.stderr.decode() == ""
    assert done.returncode == 0
    if "--list-solvers" not in arguments:
        assert read_solution(tmp_path / "s.npz").pruned.sum() == 6
    assert (tmp_path / "r.json").is_file() == ("r.json" in arguments)


def test_config(instance_file, tmp_path, capsys):
    config = tmp_path / "c.toml"
    config.write_text(
        'solver = "ls"\nmax_iterations = 4\nbudget = 5\nupdate = true\nquiet = false\n'
        "[set]\nepsilon-relative = 0.5\nrho = 7\n"
    )
    base = [str(instance_file), "--config", str(config), "--json", "-"]
    assert main(base) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["solver"] == "ls"
    assert content["pruned_count"] == 5
    assert (content["parameters"]["rho"], content["parameters"]["epsilon_relative"]) == (7, 0.5)
    assert main([*base, "--sparsity", "0.25", "--set", "rho=2"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["pruned_count"] == 3
    assert (content["parameters"]["rho"], content["parameters"]["epsilon_relative"]) == (2, 0.5)
    config.write_text('solver = "ls"\n')
    assert main([*base, "--solver", "obd"]) == 0
    assert json.loads(capsys.readouterr().out)["solver"] == "obd"


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("solver = ", 3, "is not valid TOML"),
        ('solvr = "ls"', 2, "'solvr' is not an option; known: batch-size, budget"),
        ("budget = [1]", 2, "'budget' must be a text or a number"),
        ("update = 1", 2, "'update' must be true or false"),
        ("set = 3", 2, "'set' must be a table"),
        ("seed = -1", 2, "--seed"),
        ("seed = true", 2, "--seed"),
        ('check = "x"', 2, "'check' is not an option"),
        ('solver = "rmp"\n[set]\nwrong = 1', 2, "no parameter 'wrong'; known: draws"),
    ],
)
def test_bad_config(text, code, words, refused, instance_file, tmp_path):
    (tmp_path / "c.toml").write_text(text)
    assert words in refused(code, instance_file, "--config", tmp_path / "c.toml", "-q")


def test_config_that_cannot_be_read(refused, instance_file, tmp_path):
    assert "cannot be read" in refused(3, instance_file, "--config", tmp_path / "none.toml")
    (tmp_path / "c.toml").write_bytes(b"\xff\xfe")
    assert "cannot be read" in refused(3, instance_file, "--config", tmp_path / "c.toml")


def test_gap_without_a_bound_warns(instance_file, capsys):
    assert main([str(instance_file), "--solver", "rmp", "--gap", "0.1", "-q"]) == 0
    assert "warning: solver 'rmp' proves no bound" in capsys.readouterr().err


@pytest.mark.parametrize("output", [".", ""])
def test_a_folder_as_the_solutions_of_a_path(output, instance_file, capsys):
    code = main([str(instance_file), "--sparsity", ".5", ".6", "--solution", output, "-q"])
    assert code == 3 and "cannot be written: it is a directory" in capsys.readouterr().err
