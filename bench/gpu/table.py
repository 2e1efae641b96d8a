"""The table of what was measured: on the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from cbs_opt.bench.gpu.measure import Row

COMMAND = "python -m cbs_opt.bench.gpu"

NOT_RUN = f"""# One card

Not run: no card was at hand yet. `{COMMAND}` measures everything that this page is to hold within 8 minutes, and
writes it here; see [docs/gpu.md](../../docs/gpu.md).
"""
"""The page until a card has been measured."""

_HISTORY = "history: "
_CORE = "one core"


def comparisons(rows: Sequence[Row], tiny: bool = False) -> list[Row]:
    """Rows that follow from two others: the card against one core, and errors of layers."""
    by_name = {row.what: row for row in rows if row.value is not None}

    def found(*parts: str) -> Row | None:
        return next((row for what, row in by_name.items() if all(part in what for part in parts)), None)

    out = []
    for here, there, what, other in (
        (found("cbs on mlpnet", "one core"), found("cbs on MLPNet", "card", "loss"), "cbs on MLPNet, loss", _CORE),
        (found("search on resnet20", "one core"), found("search on resnet20", "card"), "ResNet20, loss", _CORE),
        (found("search on mlpnet", "one core"), found("search on mlpnet", "card"), "MLPNet, loss", _CORE),
        (found("schedule of ALPS", "error"), found("joint, first", "error"), "first layer, error", "ALPS"),
    ):
        if here is not None and there is not None and here.value and there.value is not None:
            ratio = there.value / here.value
            goal: tuple[str, bool | None] = ("", None) if tiny else ("≤ 1", ratio <= 1.0)
            out.append(Row("comparison", f"{what}: card over {other}", ratio, "", *goal))
    return out


def number(value: float | None) -> str:
    """Four digits."""
    return "—" if value is None else f"{value:.4g}"


def lines(rows: Sequence[Row]) -> list[str]:
    """The short table for the terminal."""
    shown = [row for row in rows if not row.what.startswith(_HISTORY)]
    if not shown:
        return ["nothing was measured"]
    width = max(len(row.what) for row in shown)
    out = []
    for row in shown:
        verdict = {True: "yes", False: "NO", None: ""}[row.met]
        line = f"{row.what:<{width}}  {number(row.value):>10} {row.unit:<9} {row.target:<9} {verdict:<4}{row.note}"
        out.append(line.rstrip())
    return out


def markdown(rows: Sequence[Row], about: str) -> str:
    """The page of results."""
    out = ["# One card", "", about, "", f"Command: `{COMMAND}`.", ""]
    parts = list(dict.fromkeys(row.part for row in rows))
    for part in parts:
        mine = [row for row in rows if row.part == part and not row.what.startswith(_HISTORY)]
        if not mine:
            continue
        out += [f"## {part}", "", "| what | value | unit | target | met | note |", "|---|---|---|---|---|---|"]
        for row in mine:
            met = {True: "yes", False: "no", None: ""}[row.met]
            cells = (row.what, number(row.value), row.unit, row.target, met, row.note)
            out.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
        out.append("")
    histories = [row for row in rows if row.what.startswith(_HISTORY)]
    if histories:
        out += ["## Loss over time", "", "| run | seconds | loss |", "|---|---|---|"]
        out += [f"| {row.what.removeprefix(_HISTORY)} | {row.note} | {number(row.value)} |" for row in histories]
        out.append("")
    return "\n".join(out)


def csv_text(rows: Sequence[Row]) -> str:
    """All rows with all digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["part", "what", "value", "unit", "target", "met", "note"])
    for row in rows:
        value = "" if row.value is None else repr(row.value)
        writer.writerow([row.part, row.what, value, row.unit, row.target, row.met, row.note])
    return text.getvalue()
