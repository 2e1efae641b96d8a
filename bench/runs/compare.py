"""Comparison of two stores, run by run: ratios of time and loss, geometric means, sign tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cbs_opt.bench.runs.store import OK, Key, Row, Store

TIME_FLOOR = 1e-3
"""Seconds below which times count as equal: clocks and caches decide there."""

SAME = 1e-6
"""Relative difference up to which losses, gaps and times count as equal."""


@dataclass(frozen=True)
class Sign:
    """How often the new value is less or more than the old one, and the two-sided sign test of that.

    Attributes
    ----------
    less, more, same : int
    p : float
        Probability of a split as uneven as this where both ways are equally likely; ties are left out.
    """

    less: int
    more: int
    same: int
    p: float


@dataclass(frozen=True)
class Line:
    """Old against new for the rows of one solver, or of all.

    Attributes
    ----------
    label, objective_kind : str
    keys : int
        Rows that are `ok` in both stores.
    time_ratio : float or None
        Geometric mean over keys of new / old seconds of solving, each at least `TIME_FLOOR`.
    time : Sign
    loss_ratio : float or None
        Geometric mean of new / old loss, where both are positive.
    loss : Sign
    gap_ratio : float or None
        Geometric mean of (1 + new gap) / (1 + old gap), where both are proven.
    gap : Sign
    """

    label: str
    objective_kind: str
    keys: int
    time_ratio: float | None
    time: Sign
    loss_ratio: float | None
    loss: Sign
    gap_ratio: float | None
    gap: Sign


@dataclass(frozen=True)
class Comparison:
    """The comparison of two stores.

    Attributes
    ----------
    whole : Line
    lines : tuple of Line
        One for each solver and objective.
    only_old, only_new : tuple of Row
        Rows whose key the other store lacks.
    failed, mended : tuple of (Row, Row)
        Old and new row where only the first, or only the second, is `ok`.
    slower, worse : tuple of (Row, Row)
        The pairs with the largest ratios of time, and with the largest rise of the loss.
    names : dict of str to str
        Names of instances by hash.
    versions : tuple of str
        Versions of the package that made the rows, old and new.
    """

    whole: Line
    lines: tuple[Line, ...]
    only_old: tuple[Row, ...]
    only_new: tuple[Row, ...]
    failed: tuple[tuple[Row, Row], ...]
    mended: tuple[tuple[Row, Row], ...]
    slower: tuple[tuple[Row, Row], ...]
    worse: tuple[tuple[Row, Row], ...]
    names: dict[str, str] = field(default_factory=dict)
    versions: tuple[str, str] = ("", "")

    def exceeds(self, ratio: float) -> list[str]:
        """Sentences for what is worse than `ratio` allows: ratios of time or loss, rows that broke, no pair."""
        found = [] if self.whole.keys else ["no row is ok in both stores: nothing was compared"]
        for line in (self.whole, *self.lines):
            for what, value in (("time", line.time_ratio), ("loss", line.loss_ratio)):
                if value is not None and value > ratio:
                    found.append(f"{line.label} ({line.objective_kind}): mean ratio of {what} {value:.3f}")
        if self.failed:
            found.append(f"{len(self.failed)} rows were ok and are not any more")
        return found


def compare_stores(old: Path | str, new: Path | str) -> Comparison:
    """Join two stores by key.

    Raises
    ------
    StoreError
        For a store that cannot be read.
    """
    with Store(old) as first, Store(new) as second:
        names = {sha: found.name for store in (first, second) for sha, found in store.instances().items()}
        versions = _versions(first), _versions(second)
        return compare_rows(first.rows(), second.rows(), names, versions)


def compare_rows(
    old: Iterable[Row],
    new: Iterable[Row],
    names: dict[str, str] | None = None,
    versions: tuple[str, str] = ("", ""),
    extremes: int = 10,
) -> Comparison:
    """Join rows by key; O(rows) time."""
    before: dict[Key, Row] = {row.key: row for row in old}
    after: dict[Key, Row] = {row.key: row for row in new}
    pairs = [(before[key], after[key]) for key in before if key in after]
    good = [(a, b) for a, b in pairs if a.kind == OK and b.kind == OK]
    groups: dict[tuple[str, str], list[tuple[Row, Row]]] = {}
    for pair in good:
        groups.setdefault((pair[1].label, pair[1].objective_kind), []).append(pair)
    slower = sorted(good, key=lambda pair: _ratio(pair, _seconds) or 0.0, reverse=True)
    worse = sorted(good, key=lambda pair: _rise(pair, _loss), reverse=True)
    return Comparison(
        whole=_line("all", "both" if len({kind for _, kind in groups}) > 1 else _only_kind(groups), good),
        lines=tuple(_line(label, kind, group) for (label, kind), group in groups.items()),
        only_old=tuple(row for key, row in before.items() if key not in after),
        only_new=tuple(row for key, row in after.items() if key not in before),
        failed=tuple((a, b) for a, b in pairs if a.kind == OK != b.kind),
        mended=tuple((a, b) for a, b in pairs if a.kind != OK == b.kind),
        slower=tuple(pair for pair in slower[:extremes] if (_ratio(pair, _seconds) or 0.0) > 1.0 + SAME),
        worse=tuple(pair for pair in worse[:extremes] if _rise(pair, _loss) > SAME),
        names=names or {},
        versions=versions,
    )


def _only_kind(groups: dict[tuple[str, str], Any]) -> str:
    return next((kind for _, kind in groups), "none")


def _line(label: str, kind: str, pairs: list[tuple[Row, Row]]) -> Line:
    return Line(
        label,
        kind,
        len(pairs),
        _mean(pairs, _seconds),
        _sign(pairs, _seconds),
        _mean(pairs, _loss),
        _sign(pairs, _loss),
        _mean(pairs, _one_and_gap),
        _sign(pairs, _one_and_gap),
    )


_Value = Callable[[Row], float | None]


def _seconds(row: Row) -> float | None:
    return None if row.solve_s is None else max(row.solve_s, TIME_FLOOR)


def _loss(row: Row) -> float | None:
    return row.objective


def _one_and_gap(row: Row) -> float | None:
    return None if row.gap is None else 1.0 + row.gap


def _ratio(pair: tuple[Row, Row], value: _Value) -> float | None:
    """New / old, where both are known and positive."""
    old, new = value(pair[0]), value(pair[1])
    return new / old if old is not None and new is not None and old > 0 and new > 0 else None


def _rise(pair: tuple[Row, Row], value: _Value) -> float:
    """(new − old) / max(|old|, |new|); 0 where one is unknown."""
    old, new = value(pair[0]), value(pair[1])
    if old is None or new is None:
        return 0.0
    return (new - old) / max(abs(old), abs(new), 1e-300)


def _mean(pairs: list[tuple[Row, Row]], value: _Value) -> float | None:
    logs = [math.log(ratio) for pair in pairs if (ratio := _ratio(pair, value)) is not None]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None


def _sign(pairs: list[tuple[Row, Row]], value: _Value) -> Sign:
    rises = [_rise(pair, value) for pair in pairs if value(pair[0]) is not None and value(pair[1]) is not None]
    more = sum(rise > SAME for rise in rises)
    less = sum(rise < -SAME for rise in rises)
    p = 1.0
    if less + more:
        from scipy.stats import binomtest

        p = float(binomtest(less, less + more).pvalue)
    return Sign(less, more, len(rises) - less - more, p)


def _versions(store: Store) -> str:
    found = sorted({str(content.get("cbs_opt", "?")) for content in store.environments().values()})
    return ", ".join(found) or store.meta.get("cbs_opt", "?")


def comparison_text(comparison: Comparison, old: str, new: str) -> str:
    """The comparison as Markdown."""
    lines = [
        f"# {new} against {old}",
        "",
        f"cbs-opt {comparison.versions[1]} against {comparison.versions[0]}. Ratios are geometric means of "
        "new / old: above 1 the new one is slower, or worse. `- = +`: on how many keys the new value is less, the "
        "same, more; p: the two-sided sign test of that. Times below "
        f"{1000 * TIME_FLOOR:g} ms count as that.",
        "",
        "| solver | objective | keys | time | - = + | p | loss | - = + | p | 1 + gap | - = + | p |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *[_text(line) for line in (*comparison.lines, comparison.whole)],
        "",
    ]
    name = comparison.names
    for title, pairs in (("Slowest", comparison.slower), ("Worst", comparison.worse)):
        if pairs:
            lines += [f"## {title}", "", "| what | seconds | loss |", "|---|---|---|"]
            lines += [
                f"| {_what(b, name)} | {_number(a.solve_s)} → {_number(b.solve_s)} "
                f"| {_number(a.objective)} → {_number(b.objective)} |"
                for a, b in pairs
            ]
            lines.append("")
    for title, pairs in (("Not ok any more", comparison.failed), ("Ok now", comparison.mended)):
        if pairs:
            lines += [f"## {title}: {len(pairs)}", ""]
            lines += [f"- {_what(b, name)}: {a.kind} → {b.kind}. {b.message or a.message or ''}" for a, b in pairs]
            lines.append("")
    for title, rows in ((f"Only in {old}", comparison.only_old), (f"Only in {new}", comparison.only_new)):
        if rows:
            lines += [f"## {title}: {len(rows)} rows", "", *[f"- {_what(row, name)}" for row in rows[:20]]]
            lines += ["- …"] if len(rows) > 20 else []
            lines.append("")
    return "\n".join(lines)


def _text(line: Line) -> str:
    cells = [line.label, line.objective_kind, str(line.keys)]
    for ratio, sign in ((line.time_ratio, line.time), (line.loss_ratio, line.loss), (line.gap_ratio, line.gap)):
        cells.append("–" if ratio is None else f"{ratio:.4f}")
        cells += [f"{sign.less} {sign.same} {sign.more}", f"{sign.p:.2g}"]
    return "| " + " | ".join(cells) + " |"


def _what(row: Row, names: dict[str, str]) -> str:
    limit = "" if row.time_limit is None else f", {row.time_limit:g} s"
    name = names.get(row.instance_sha256, row.instance_sha256[:8])
    return f"{name} {row.sparsity:.3g} {row.label} ({row.objective_kind}{limit}), seed {row.seed}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
