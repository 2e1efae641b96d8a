"""Comparing two stores: keys joined, ratios and tests as by hand."""

from dataclasses import replace

import pytest

from cbs_opt.bench.runs.compare import TIME_FLOOR, compare_rows, compare_stores, comparison_text
from cbs_opt.bench.runs.store import Row, Store, StoredInstance


def row(seed, seconds=1.0, loss=2.0, label="ls", **more):
    return Row(
        "ab",
        label,
        "{}",
        "selection",
        5,
        seed,
        None,
        label=label,
        sparsity=0.5,
        **{"kind": "ok", "objective": loss, "solve_s": seconds} | more,
    )


def test_ratios_are_geometric_means_over_common_keys():
    old = [row(0, 1.0, 2.0), row(1, 1.0, 2.0), row(2, 1.0, 2.0), row(9)]
    new = [row(1, 0.5, 2.0), row(0, 2.0, 2.0), row(2, 8.0, 4.0), row(8)]
    found = compare_rows(old, new)
    assert found.whole.keys == 3
    assert found.whole.time_ratio == pytest.approx((2.0 * 0.5 * 8.0) ** (1 / 3))
    assert found.whole.loss_ratio == pytest.approx(2.0 ** (1 / 3))
    time, loss = found.whole.time, found.whole.loss
    assert (time.less, time.more, time.same) == (1, 2, 0)
    assert (loss.less, loss.more, loss.same) == (0, 1, 2)
    assert time.p == 1.0
    assert loss.p == 1.0
    assert [r.seed for r in found.only_old] == [9]
    assert [r.seed for r in found.only_new] == [8]
    assert [pair[0].seed for pair in found.slower] == [2, 0]
    assert [pair[0].seed for pair in found.worse] == [2]


def test_the_sign_test_is_two_sided_and_leaves_ties_out():
    pairs = range(12)
    found = compare_rows([row(k) for k in pairs], [row(k, 1.0 if k < 2 else 1.1) for k in pairs])
    assert (found.whole.time.less, found.whole.time.same, found.whole.time.more) == (0, 2, 10)
    assert found.whole.time.p == pytest.approx(2 / 2**10)


def test_times_below_the_floor_are_the_same():
    found = compare_rows([row(0, TIME_FLOOR / 50)], [row(0, TIME_FLOOR / 2)])
    assert found.whole.time_ratio == 1.0
    assert found.whole.time.same == 1


def test_losses_that_have_no_ratio_are_still_compared():
    old, new = (
        [row(0, loss=-1.0), row(1, loss=0.0), row(2, loss=-1.0)],
        [
            row(0, loss=-0.5),
            row(1, loss=0.0),
            row(2, loss=-2.0),
        ],
    )
    found = compare_rows(old, new)
    assert found.whole.loss_ratio is None
    assert (found.whole.loss.less, found.whole.loss.same, found.whole.loss.more) == (1, 1, 1)
    assert [pair[0].seed for pair in found.worse] == [0]


def test_gaps_are_compared_where_both_are_known():
    old = [row(0, bound=1.0), row(1, bound=1.0)]  # gaps 1/2
    new = [row(0, bound=2.0), row(1)]
    found = compare_rows(old, new)
    assert found.whole.gap_ratio == pytest.approx(1 / 1.5)
    assert (found.whole.gap.less, found.whole.gap.same, found.whole.gap.more) == (1, 0, 0)


def test_a_line_for_each_solver_and_broken_rows_apart():
    old = [row(0), row(1), row(0, label="exact"), row(1, label="exact")]
    new = [
        row(0, 3.0),
        row(1, kind="wrong", message="claims the loss 1, it is 2"),
        row(0, label="exact"),
        row(1, label="exact"),
    ]
    found = compare_rows(old, new)
    assert [(line.label, line.keys) for line in found.lines] == [("ls", 1), ("exact", 2)]
    assert [(a.seed, b.kind) for a, b in found.failed] == [(1, "wrong")]
    assert found.mended == ()
    assert [(b.seed, a.kind) for b, a in compare_rows(new, old).mended] == [(1, "ok")]
    assert len(found.exceeds(1e9)) == 1
    sentences = found.exceeds(1.5)
    assert any(s.startswith("ls (selection): mean ratio of time 3.000") for s in sentences)
    assert not any(s.startswith("exact") for s in sentences)
    assert compare_rows(old, old).exceeds(1.0) == []


def test_stores_without_common_keys():
    found = compare_rows([row(0)], [row(1)])
    assert found.whole.keys == 0
    assert found.whole.time_ratio is None
    assert found.exceeds(1.0) == ["no row is ok in both stores: nothing was compared"]
    assert "only in" in comparison_text(found, "a", "b").lower()


def test_the_text_names_what_changed(tmp_path):
    for name, seconds in (("old", 1.0), ("new", 2.0)):
        with Store(tmp_path / name, "w") as store:
            store.add_instance(StoredInstance("ab", "layer", 10, 1, "hessian", {}))
            environment = store.add_environment({"cbs_opt": name})
            store.add(replace(row(0, seconds), environment=environment))
            store.add(row(1, kind="ok" if name == "old" else "lost", message="killed"))
    text = comparison_text(compare_stores(tmp_path / "old", tmp_path / "new"), "old", "new")
    assert text.startswith("# new against old\n\ncbs-opt new against old.")
    assert "| ls | selection | 1 | 2.0000 | 0 0 1 | 1 | 1.0000 | 0 1 0 | 1 | – | 0 0 0 | 1 |" in text
    assert "| layer 0.5 ls (selection), seed 0 | 1 → 2 | 2 → 2 |" in text
    assert "## Not ok any more: 1" in text
    assert "layer 0.5 ls (selection), seed 1: ok → lost. killed" in text
