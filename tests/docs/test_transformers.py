"""The page about transformers, as a reader would follow it: every command, and the figures of its table."""

import json
import re
import shlex
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from cbs_opt.cli import apply, export, solve  # noqa: E402

COMMANDS = {"cbs-export": export.main, "cbs-solve": solve.main, "cbs-apply": apply.main}
POINTS = 3.0  # by which an accuracy may differ from one machine to another
SHARE = 0.05  # of a perplexity


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def table(page):
    rows = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 8 and cells[0] in ("encoder", "vit", "gpt"):
            rows[cells[0]] = [float(cell) for cell in cells[1:]]
    return rows


@pytest.mark.slow
def test_the_page_runs_and_its_figures_are_found(repository, tmp_path, monkeypatch, capsys):
    page = (repository / "docs" / "transformers.md").read_text(encoding="utf-8")
    (code,) = blocks(page, "python")
    (tmp_path / "three.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "three", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for line in "".join(blocks(page, "sh")).splitlines():
            name, *arguments = shlex.split(line)
            if name == "python":
                exec(compile(code, "three.py", "exec"), {"__name__": "__main__"})
            else:
                assert COMMANDS[name](arguments) == 0, (line, capsys.readouterr().err[-500:])
    finally:
        torch.set_num_threads(threads)
        sys.modules.pop("three", None)
    assert "lm_head.weight" in capsys.readouterr().err  # the log says what is left out
    rows = table(page)
    assert sorted(rows) == ["encoder", "gpt", "vit"]
    for name, (dense, *pruned) in rows.items():
        report = json.loads((tmp_path / f"{name}.json").read_text())
        scale, near = (1, dense * SHARE) if name == "gpt" else (100, POINTS)
        assert scale * report["before"]["value"] == pytest.approx(dense, abs=near)
        for k, trial in enumerate(report["path"]):
            assert trial["sparsity"] == pytest.approx((0.5, 0.6, 0.7)[k], abs=1e-4)
            ours, magnitudes = (scale * trial[key]["value"] for key in ("score", "magnitude"))
            assert ours == pytest.approx(pruned[2 * k], abs=near)
            assert ours < magnitudes if name == "gpt" else ours > magnitudes - POINTS
        assert report["sparsity"] >= 0.5
        cost = report["after"]["value"] - report["before"]["value"]
        assert cost <= 0.02 * report["before"]["value"] if name == "gpt" else cost >= -0.02
        # An independent look at the file that was written.
        before, after = (torch.load(f"{file}.pt", weights_only=True) for file in (name, f"{name}-sparse"))
        zeros = sum(int((after[key] == 0).sum()) - int((before[key] == 0).sum()) for key in after)
        if name == "gpt":
            assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])
        assert abs(zeros - report["pruned_count"]) <= report["pruned_count"] // 1000
