"""Reports of small stores whose every figure is known: measured rightly, told completely, shown as it stands."""

import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

import cbs_opt
from cbs_opt.bench.reports import report
from cbs_opt.bench.reports.analysis import analyse
from cbs_opt.bench.reports.limitations import limitations
from cbs_opt.bench.reports.report import make_document, profile_picture, write_report
from cbs_opt.bench.reports.tables import gap_text, quality, seconds_text, seeds_text, times
from cbs_opt.bench.runs.store import Row, Store, StoredInstance

ODD = "_a<b>|*$x^_$"  # a label that would be markup
MISSING = "the worker was killed by <signal> 9"


def row(label, objective=None, *, instance="a", budget=5, seed=0, kind="ok", bound=None, seconds=1.0, **others):
    """A row of a run that ends after `seconds`, built in a tenth of one."""
    content = {
        "solver": label,
        "parameters": "{}",
        "objective_kind": "selection",
        "time_limit": 10.0,
        "status": "time_limit",
        "build_s": 0.1,
        "solve_s": seconds,
        "cpu_s": seconds,
        "environment": 1,
        "started": "2026-01-02T03:04:05.000+00:00",
        "trace": None if objective is None else [(seconds / 2, 4 * objective, None), (seconds, objective, bound)],
    } | others
    found = {"objective": objective, "selection_loss": objective, "claimed_objective": objective, "bound": bound}
    return Row(
        instance_sha256=instance,
        budget=budget,
        seed=seed,
        label=label,
        sparsity=budget / 10,
        kind=kind,
        **content,
        **found,
    )


@pytest.fixture
def make(tmp_path):
    """`make(rows)`: a store of them, on two instances of ten weights."""

    def made(rows, name="store.sqlite"):
        path = tmp_path / name
        with Store(path, "w") as store:
            for sha256 in "ab":
                store.add_instance(
                    StoredInstance(sha256, f"problem_{sha256}", 10, 1, "hessian", {"origin": "by hand"})
                )
            store.add_environment({"processor": "P", "cores": 2, "threads": 1})
            for one in rows:
                store.add(one)
        return path

    return made


def measured(path):
    with Store(path) as store:
        return analyse(store)


def rows_of_three():
    """Exact proves both problems; quick reaches one; odd fails on one and is refused on the other."""
    yield row("exact", 1.0, bound=1.0, status="optimal", seconds=4.0)
    yield row("exact", 2.0, bound=1.9999999, instance="b", status="optimal", seconds=2.0)
    for seed in range(3):
        yield row("quick", 1.0 + 0.5 * (seed == 2), seed=seed)
        yield row("quick", 3.0, instance="b", seed=seed)
    yield row(ODD, kind="lost", message=MISSING)
    yield row(ODD, kind="unsupported", message="too large", instance="b")


def test_problems_and_runs_by_hand(make):
    (section,) = measured(make(rows_of_three())).sections
    first, second = section.problems
    assert (first.best, first.lower, first.proven) == (1.0, 1.0, True)
    assert (second.best, second.proven) == (2.0, True)
    assert [run.gap for run in second.runs["quick"]] == [0.5, 0.5, 0.5]
    assert [run.exact_s for run in first.runs["quick"]] == [1.1, 1.1, math.inf]  # building counts
    assert first.time("quick", "exact_s") == 1.1  # the median over seeds
    assert first.runs["exact"][0].proof_s == pytest.approx(4.1)
    assert first.runs[ODD][0].gap == math.inf
    assert second.refused == {ODD: 1}
    assert section.cap == 10.0


def test_tables_by_hand(make):
    (section,) = measured(make(rows_of_three())).sections
    rows = {cells[0]: cells[1:] for cells in quality(section).rows}
    assert list(rows) == ["exact", "quick", f"{ODD} *"]  # by what they reach; the star: one problem of two
    assert rows["exact"] == ["2 / 2", "2", "2 / 2", "2 / 2", "0", "0", "0", "0", "0"]
    # Gaps 0, 0, 0.5 and three times 0.5: the geometric mean is 1.5^(4/6) − 1.
    assert rows["quick"] == ["2 / 2", "6", "2 / 6", "2 / 6", "50 %", "31 %", "50 %", "–", "0"]
    assert rows[f"{ODD} *"] == ["1 / 2", "1", "0 / 1", "0 / 1", "∞", "–", "–", "–", "1"]
    seconds = {cells[0]: cells[1:] for cells in times(section).rows}
    # Seconds 4.1 and 2.1, shifted by 1; those who never get there count with the limit of 10 s.
    assert seconds["exact"][:3] == [f"{math.sqrt(5.1 * 3.1) - 1:.3g}"] * 3
    assert float(seconds["quick"][1]) == pytest.approx((2.1**2 * 11**4) ** (1 / 6) - 1, rel=5e-3)
    assert seconds[f"{ODD} *"][:2] == ["10", "10"]


def test_a_refuted_bound_and_a_refuted_optimum_are_wrong(make):
    path = make(
        [
            row("good", 1.0, bound=0.5),
            row("high", 1.5, bound=1.2),
            row("proud", 1.1, bound=0.9, status="optimal"),
            row("fine", 1.0 + 1e-7, bound=1.0, status="optimal"),
        ]
    )
    analysis = measured(path)
    (problem,) = analysis.problems
    kinds = {name: runs[0].row.kind for name, runs in problem.runs.items()}
    assert kinds == {"good": "ok", "high": "wrong", "proud": "wrong", "fine": "ok"}
    assert "1.2" in problem.runs["high"][0].row.message
    assert problem.proven
    assert problem.lower == 1.0
    assert problem.runs["high"][0].gap == math.inf


def test_not_proven_without_a_bound(make):
    (problem,) = measured(make([row("a", 1.0, status="optimal"), row("b", 1.0, bound=0.9)])).problems
    assert not problem.proven
    assert problem.lower == 0.9


def test_losses_of_zero_and_below_and_the_same_report_each_time(make):
    zero = [row("low", 0.0, bound=0.0), row("high", 1.0)]
    negative = [row("low", -2.0, bound=-2.0, instance="b"), row("high", 1.0, instance="b")]
    analysis = measured(make([*zero, *negative]))
    problems = {problem.instance.sha256: problem for problem in analysis.problems}
    assert all(problem.proven for problem in problems.values())
    assert {problem.runs["low"][0].gap for problem in problems.values()} == {0.0}
    assert problems["a"].runs["high"][0].gap == pytest.approx(1e12)
    assert problems["b"].runs["high"][0].gap == pytest.approx(1.5)
    document = make_document(analysis)
    assert not re.search(r"\bnan\b", document.markdown("pictures"))
    assert document.page() == make_document(analysis).page()


def test_names_tell_apart_what_a_label_does_not(make):
    path = make(
        [
            row("s", 1.0),
            row("s", 1.0, time_limit=60.0),
            row("t", 1.0, parameters='{"k":1}'),
            row("t", 1.0, parameters='{"k":2}'),
            row("u", 1.0, time_limit=None),
        ]
    )
    assert measured(path).solvers == ["s, 10 s", "s, 60 s", "t (t k=1)", "t (t k=2)", "u"]


def test_an_unreadable_row_is_a_failure_not_a_crash(make):
    analysis = measured(make([row("a", None), row("b", 1.0, kind="odd"), row("c", 1.0, instance="z", budget=4)]))
    assert [one.kind for one in analysis.rows] == ["error", "error", "ok"]
    assert [p.instance.n for p in analysis.problems if p.instance.sha256 == "z"] == [10]


class Balance(HTMLParser):
    """Checks that every element is closed where it should be, and collects what would be loaded."""

    empty = ("meta", "br", "link", "img")

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in self.empty:
            self.open.append(tag)
        loaded = [value for key, value in attributes if key in ("src", "href", "xlink:href") and value[:1] != "#"]
        self.loads += loaded + [tag] * (tag in ("script", "link", "img", "iframe"))

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Markdown, page and all files of a report on both objectives."""
    folder = tmp_path_factory.mktemp("report")
    with Store(folder / "s.sqlite", "w") as store:
        for sha256 in "ab":
            store.add_instance(
                StoredInstance(sha256, f"problem_{sha256}", 10 + 5 * (sha256 == "b"), 1, "hessian", {})
            )
        store.add_environment({"processor": "A <fast> one", "cores": 2, "threads": 1})
        for one in [*rows_of_three(), row("joint", 1.0, objective_kind="joint")]:
            store.add(one)
    files = write_report(folder / "s.sqlite", folder / "out.html", title="Of <two> & three")
    return files[0].read_text(), files[1].read_text(), files


def test_the_page_needs_nothing_else(written):
    balance = Balance()
    balance.feed(written[1])
    assert balance.open == []
    assert balance.loads == []
    assert "@import" not in written[1] and "url(http" not in written[1]
    assert "<title>Of &lt;two&gt; &amp; three</title>" in written[1]


def test_no_row_is_left_out(written):
    page = Balance()
    page.feed(written[1])
    for text in (" ".join(page.text), re.sub(r"\\(.)", r"\1", written[0])):
        for needed in (ODD, MISSING, "exact", "quick", "too large", "A <fast> one", "11 rows", "refused", "lost"):
            assert needed in text
        assert "2 of the 2 best known losses are proven optimal" in text
        assert "0 of the 1 best known losses are proven optimal" in text


def test_the_pictures_of_the_markdown_are_there(written):
    text, page, files = written
    named = re.findall(r"\]\((out-pictures/[^)]+)\)", text)
    assert sorted(named) == sorted(str(path.relative_to(files[0].parent)) for path in files[2:])
    assert len(named) == page.count("<figure>")
    assert all('fill="#ffffff"' in path.read_text() for path in files[2:])
    wanted = {"profile", "proofs", "gaps", "targets", "trajectories", "size"}
    assert {name.split("/")[1].rsplit("-", 1)[0] for name in named} >= wanted


def test_tables_of_the_markdown_are_rectangular(written):
    lines = written[0].splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) > 20
    for line, after in pairwise(lines):
        if line.startswith("|") and after.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == len(re.findall(r"(?<!\\)\|", after))


def test_only_failures_make_a_report_without_pictures(make, tmp_path):
    path = make([row("a", kind="error", message="no"), row("a", kind="unsupported", seed=1, message="never")])
    files = write_report(path)
    assert [file.name for file in files] == ["store.md", "store.html"]
    text = files[0].read_text()
    assert "1 of 1 problems have no valid row at all" in text
    assert "1 of 2 rows failed (1 error)" in text


def test_limitations_say_what_the_rows_show(make):
    rows = [row("slow", 1.0, cpu_s=0.2, seed=seed, instance=i) for seed in range(5) for i in "ab"]
    rows += [
        row("once", 2.0, trace=[(1.0, 2.0, None)]),
        row("once", 1.005, instance="b", trace=[(1.0, 1.005, None)]),
    ]
    rows += [row("part", 1.5, status="interrupted", time_limit=None)]
    text = "\n".join(limitations(measured(make(rows))))
    for part in (
        "2 of 2 best known losses are not proven",
        "2 of the unproven best known losses were found by one solver only",
        "not every solver was run on all 2 problems (part 1)",
        "1 runs were interrupted",
        "Time limits differ between rows (10 s, none)",
        "once, part were not run with 5 seeds",
        "trace of a single point, whose times to a target are too long: once 1",
        "other work shared the processor",
    ):
        assert part in text


def test_an_empty_store_and_bad_places_are_refused_in_one_sentence(make, tmp_path):
    with pytest.raises(cbs_opt.CbsError, match="no rows yet"):
        write_report(make([]))
    with pytest.raises(cbs_opt.CbsError, match="no such store"):
        write_report(tmp_path / "none.sqlite")
    path = make([row("a", kind="error")], "errors.sqlite")
    with pytest.raises(cbs_opt.CbsError, match="no directory"):
        write_report(path, tmp_path / "nowhere" / "report")
    with pytest.raises(cbs_opt.CbsError, match="no run is valid"):
        profile_picture(path, tmp_path / "p.png")
    with pytest.raises(cbs_opt.CbsError, match=r"must end in \.png"):
        profile_picture(path, tmp_path / "p.bmp")
    assert not (tmp_path / "p.png").exists()


def test_a_report_never_overwrites_its_store(make, tmp_path):
    for name in ("store.md", "store.html"):
        path = make([row("a", kind="error")], name)
        before = path.read_bytes()
        (tmp_path / f"link{path.suffix}").symlink_to(path)
        for output in (None, tmp_path / "store", path, tmp_path / "link"):
            with pytest.raises(cbs_opt.CbsError, match="is an input"):
                write_report(path, output)
        assert path.read_bytes() == before


def test_a_folder_takes_the_name_of_the_store(make, tmp_path):
    (tmp_path / "folder").mkdir()
    files = write_report(make([row("a", kind="error")]), tmp_path / "folder")
    assert [str(file.relative_to(tmp_path)) for file in files] == ["folder/store.md", "folder/store.html"]


def test_the_picture_of_the_profile(make, tmp_path):
    picture = profile_picture(make(rows_of_three()), tmp_path / "profile.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 150_000


def test_texts():
    assert [gap_text(g) for g in (None, math.inf, 1e-7, 3.21e-5, 0.00123, 0.5, 2.5, 1e5)] == [
        "–", "∞", "0", "3.2e-5", "0.12 %", "50 %", "250 %", "1.0e7 %",
    ]  # fmt: skip
    assert [seconds_text(t) for t in (None, 1e-4, 0.01234, 12.34, 12345.0)] == [
        "–", "< 0.001", "0.0123", "12.3", "12,345",
    ]  # fmt: skip
    assert seeds_text([3, 0, 1, 2, 7]) == "0-3, 7"


def test_bytes_of_names_that_are_no_text_are_written_out(tmp_path):
    path = report._write(tmp_path / "report.md", "the store \udc80.sqlite")
    assert path.read_text(encoding="utf-8") == "the store \\udc80.sqlite"
