"""`cbs-info`: pages, JSON and pictures of instances, solutions and certificates."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

import cbs_opt
from cbs_opt import Solution, read_instance, solve, write_instance, write_solution
from cbs_opt.cli.info import main


@pytest.fixture
def golden(repository):
    return repository / "tests" / "data" / "v1"


@pytest.fixture
def solution(tmp_path):
    path = tmp_path / "solution.npz"
    write_solution(path, solve("library:mlp-output-20", "obd", seed=7, update=True))
    return path


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    path = tmp_path_factory.mktemp("certificate") / "proof.npz"
    solve("library:mlp-output-12", "exact", parameters={"certificate": str(path)})
    return path


def page_of(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 0
    text = capsys.readouterr().out
    assert r"\u" not in text
    assert re.search(r"\d\.\d{10}", text) is None, "no number has ten decimals"
    assert re.search(r"[{}\[\]]", text) is None, "no JSON on a page"
    return text


def rows_of(text):
    """The lines of two columns, by name."""
    return dict(re.split(r"  +", line.strip(), maxsplit=1) for line in text.splitlines() if "  " in line.strip())


def test_instance_as_json(golden, capsys):
    assert main([str(golden / "inverse-hessian.npz"), "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    expected = {
        "format": "cbs-instance",
        "weights": 4,
        "budget": 2,
        "sparsity": 0.5,
        "curvature": "inverse_hessian",
        "blocks": 2,
        "block_sizes": [2, 2],
        "groups": 2,
        "group_budgets": [1, 1],
        "linear": True,
        "fixed": 2,
        "best_known": {},
    }
    assert expected.items() <= content.items()
    assert content["metadata"]["network"] == "golden"


def test_page_of_an_instance_of_the_library(capsys):
    rows = rows_of(text := page_of(capsys, "library:digits-mlp"))
    assert rows["weights"] == "3,560"
    assert rows["budget"] == "3,204 to prune of 3,560 (90.0 %)"
    assert rows["blocks"] == "70: 40 of 64, 20 of 40, 10 of 20 weights"
    assert rows["damping"].startswith("λ = 1e-05 (loss per squared unit of weight)")
    assert rows["selection loss"] == "3.126530e-03  proven optimal"
    assert rows["samples"] == "1,000"
    assert "8×8 digits of scikit-learn" in rows["data"]
    table = [line.split() for line in text.splitlines() if line.startswith(("0.weight", "all "))]
    assert table == [
        ["0.weight", "40", "×", "64", "2,560", "40", "open", "-"],
        ["all", "3,560", "70", "3,204", "90.0", "%"],
    ]


def test_budgets_of_tensors_where_groups_settle_them(problem, with_instance, tmp_path, capsys):
    def write(groups, cut):
        tensors = [{"name": "a", "shape": [cut], "offset": 0}, {"name": "b", "shape": [12 - cut], "offset": cut}]
        given = with_instance(problem(0, n=12, groups=groups), metadata={"tensors": tensors})
        write_instance(tmp_path / "i.npz", given.instance)
        assert main([str(tmp_path / "i.npz"), "--json", "-"]) == 0
        return [tensor["budget"] for tensor in json.loads(capsys.readouterr().out)["tensors"]]

    assert write("layers", 4) == [2, 4]
    assert write("layers", 5) == [None, None]
    assert write("2:4", 8) == [4, 2]
    assert write(None, 4) == [None, None]
    page = page_of(capsys, tmp_path / "i.npz")
    assert "open: the budget covers several tensors" in page


def test_unusual_metadata_are_shown_as_text(problem, with_instance, tmp_path, capsys):
    metadata = {
        "tensors": "none",
        "note": "ä…\n",
        "schedule": {"warm_up": True, "rate": 0.1234567890123},
        "list": list(range(30)),
        "nothing": None,
        "long": "x" * 1000,
    }
    write_instance(
        tmp_path / "i.npz", with_instance(problem(0, fixed=True, linear=True), metadata=metadata).instance
    )
    text = page_of(capsys, tmp_path / "i.npz")
    rows = rows_of(text)
    assert rows["schedule"] == "rate 0.1235, warm up yes"
    assert rows["list"] == "0, 1, 2, 3, 4, 5, 6, 7, … (30 in all)"
    assert rows["fixed"] == "1 must be pruned, 1 must stay"
    assert max(map(len, text.splitlines())) < 400


def test_solution(golden, capsys):
    assert main([str(golden / "solution.npz"), "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["pruned"] == 2
    assert content["weights"] == 4
    assert content["updated_weights"] is True
    assert content["selection_loss"] == 0.25


def test_page_of_a_solution(solution, capsys):
    rows = rows_of(page_of(capsys, solution))
    assert rows["pruned"] == "16 of 20 weights (80.0 %), and the kept weights updated"
    assert rows["solver"] == "obd, seed 7"
    assert rows["status"] == "converged"
    assert re.fullmatch(r"\d\.\d{6}e-\d\d  \(selection\)", rows["objective"])


@pytest.mark.parametrize("result", [{}, {"objective": "x", "gap": True, "bound": None, "runtime": 3, "solver": 4}])
def test_page_of_a_solution_with_odd_claims(result, tmp_path, capsys):
    write_solution(tmp_path / "s.npz", Solution(np.array([True, False]), result=result))
    assert "1 of 2 weights" in page_of(capsys, tmp_path / "s.npz")


def test_solution_beside_its_instance(solution, capsys):
    text = page_of(capsys, "library:mlp-output-20", "--solution", solution)
    assert text.count("4.weight") == 2
    assert ["4.weight", "10", "×", "20", "20", "16", "80.0", "%"] in [line.split() for line in text.splitlines()]
    assert main(["library:mlp-output-20", "--solution", str(solution), "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["format"] == "cbs-instance"
    assert content["solution"]["tensors"][0]["pruned"] == 16
    assert main(["library:mlp-output-12", "--solution", str(solution)]) == 3


def test_page_of_a_certificate(certificate, capsys):
    rows = rows_of(page_of(capsys, certificate))
    assert rows["pruned"] == "10 of 12 weights (83.3 %)"
    assert rows["gap"] == "0.00 %"
    assert "node" in rows["proof"]
    assert main([str(certificate), "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["format"] == "cbs-certificate"
    assert content["objective"] == pytest.approx(solve("library:mlp-output-12", "brute").objective)


def is_drawn(path):
    """Whether a picture has more than one colour."""
    with Image.open(path) as image:
        assert min(image.size) > 300
        return len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 50


@pytest.mark.parametrize("case", ["blocks", "one weight", "zero weights", "singular"])
def test_picture_of_every_kind(case, problem, with_instance, tmp_path, capsys):
    given = {
        "blocks": problem(1, n=30, blocks=20, kind="inverse_hessian", groups="layers"),
        "one weight": problem(3, n=1, budget=1),
        "zero weights": problem(4, n=5, weights=np.zeros(5)),
        "singular": problem(5, n=8, m=2, damping=0.0, zero_columns=(0, 1)),
    }[case]
    write_instance(tmp_path / "i.npz", given.instance)
    out = tmp_path / "p.png"
    text = page_of(capsys, tmp_path / "i.npz", "--picture", out)
    assert "weights" in text
    assert is_drawn(out)


def test_picture_with_a_solution_counts_what_is_cut(solution, tmp_path, capsys):
    from cbs_opt.view.instance_picture import draw_instance

    instance = cbs_opt.library("mlp-output-20")
    pruned = solve(instance, "obd").pruned
    graph = instance.interaction_graph(max_pairs=30, cancelling=True)
    kinds = [int(pruned[i]) + int(pruned[j]) for i, j in graph.edges]
    axes = draw_instance(instance, pruned).axes
    legend = next(a.get_legend() for a in axes if a.get_legend() is not None)
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts[0].startswith(f"{kinds.count(2)} both pruned")
    assert texts[1].startswith(f"{kinds.count(1)} cut")
    assert texts[2].startswith(f"{kinds.count(0)} both kept")
    out = tmp_path / "p.svg"
    page_of(capsys, "library:mlp-output-20", "--solution", solution, "--picture", out)
    assert "<svg" in out.read_text()


def test_names_of_tensors_are_drawn_as_they_stand(problem, with_instance):
    from cbs_opt.view.instance_picture import draw_instance

    tensors = [{"name": "_a$", "shape": [4], "offset": 0}, {"name": "b$_{c", "shape": [8], "offset": 4}]
    given = with_instance(problem(0, n=12), metadata={"tensors": tensors})
    figure = draw_instance(given.instance)
    figure.canvas.draw()  # a broken formula would raise here
    legend = next(a.get_legend() for a in figure.axes if a.get_legend() is not None)
    assert [text.get_text() for text in legend.get_texts()] == [r" _a\$", r"b\$_{c"]


def test_text_in_a_process(run, golden, tmp_path):
    done = run("info", golden / "gradients.npz", "--picture", tmp_path / "p.png")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "gradients" in done.stdout
    assert "damping" in done.stdout
    assert (tmp_path / "p.png").stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.png"]


def test_bad_files(run, tmp_path, capsys):
    done = run("info", tmp_path / "none.npz")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"cbs-info: {tmp_path / 'none.npz'}: no such file\n"
    (tmp_path / "bad.npz").write_bytes(b"PK")
    assert main([str(tmp_path / "bad.npz")]) == 3
    assert main([]) == 2
    np.savez(tmp_path / "other.npz", format=np.array("other"))
    assert main([str(tmp_path / "other.npz")]) == 3
    assert "Traceback" not in capsys.readouterr().err


def test_bad_options(solution, certificate, tmp_path, capsys):
    for arguments, text in (
        (
            [str(solution), "--picture", str(tmp_path / "p.png")],
            "`--picture` needs an instance, and this is a solution",
        ),
        ([str(certificate), "--solution", str(solution)], "`--solution` needs an instance"),
        (["library:mlp-output-20", "--picture", str(tmp_path / "p.gif")], "is written as .png, .svg or .pdf"),
        ([str(solution), "--json", str(solution)], "is an input"),
    ):
        assert main(arguments) == 2
        assert text in capsys.readouterr().err
    assert main(["library:mlp-output-20", "--picture", str(tmp_path / "none" / "p.png")]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["solution.npz"]
    assert read_instance(cbs_opt.library_path("mlp-output-20")).n == 20
