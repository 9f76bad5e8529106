"""Tables and a plot of what `ordinary.py` found; needs its JSON only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from revhooks.record import human_bytes

Row = dict[str, Any]


def show(result: dict[str, Any], console: Console) -> None:
    """Every part that there is."""
    where = f"torch {result['torch']}, {result['device']}, {result['threads']} threads"
    if result["quick"]:
        where += "; SMALL MODELS, the goals are for large ones"
    if "ordinary" in result:
        console.print(_ordinary(result["ordinary"], where))
    if "replay" in result:
        for model in result["replay"]:
            console.print(_replay(model, where))
    for curve in result.get("budget", []):
        console.print(_curve(curve, where))
        console.print(_against(curve))


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    return table


def _ordinary(rows: list[Row], where: str) -> Table:
    columns = ("", "packed", "held", "spared", "peak plain", "peak", "time / plain", "gradients")
    table = _table(f"ordinary models, nothing named: {where}", columns)
    for row in rows:
        if "skipped" in row:
            table.add_row(row["name"], row["skipped"])
            continue
        table.add_row(
            row["name"],
            human_bytes(row["packed_bytes"]),
            human_bytes(row["held_bytes"]),
            f"{row['spared']:.1%}, {_goal('>=', row['goal_spared'], row['spared'] >= row['goal_spared'])}",
            human_bytes(row["plain_peak_bytes"]),
            human_bytes(row["peak_bytes"]),
            _timed(row["time_over_plain"], row["goal_time"]),
            _gradients(row),
        )
    return table


def _replay(model: Row, where: str) -> Table:
    columns = ("", "live after forward", "peak", "blocks rebuilt", "resident", "time / plain", "time / checkpoint", "gradients")
    table = _table(f"{model['name']}, each layer run again in backward: {where}", columns)
    for row in model["contenders"]:
        resident = row["resident_peak_bytes"]
        table.add_row(
            row["name"],
            human_bytes(row["live_after_forward_bytes"]),
            human_bytes(row["peak_bytes"]),
            _count(row["rebuilt"]),
            "-" if resident is None else human_bytes(resident),
            _ratio(row["time_over_plain"]),
            _ratio(row["time_over_checkpoint"]),
            _gradients(row),
        )
    return table


def _curve(curve: Row, where: str) -> Table:
    table = _table(f"{curve['name']}, by budget: {where}", ("", "budget", "peak", "blocks rebuilt", "time / plain", "gradients"))
    for point in sorted(curve["points"], key=lambda point: point["peak_bytes"]):
        budget = point["budget_bytes"]
        shown = "-" if budget is None else human_bytes(budget)
        table.add_row(
            point["name"],
            shown,
            human_bytes(point["peak_bytes"]),
            _count(point["rebuilt"]),
            _ratio(point["time_over_plain"]),
            _gradients(point),
        )
    return table


def _against(curve: Row) -> Table:
    table = _table(f"{curve['name']}, a budget with the peer's peak over the peer", ("", "peak", "time"))
    for name, row in curve["against"].items():
        table.add_row(name, _ratio(row["peak_over_peer"]), _timed(row["time_over_peer"], row["goal_time"]))
    return table


def _count(count: int | None) -> str:
    return "-" if count is None else str(count)


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"


def _timed(ratio: float | None, goal: float) -> str:
    return "-" if ratio is None else f"{ratio:.3f}, {_goal('<=', goal, ratio <= goal)}"


def _goal(sign: str, goal: float, met: bool) -> str:
    return f"{sign} {goal:g} {'met' if met else 'MISSED'}"


def _gradients(row: Row) -> str:
    return "bitwise" if row["gradient_difference"] == 0 else f"{row['gradient_difference']:.1e}"


def plot(curves: list[Row], path: Path) -> None:
    """Step time over peak, a panel a model: the curve of the budgets and the peers' points."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(curves), figsize=(5.5 * len(curves), 4), layout="constrained")
    for panel, curve in zip(panels, curves, strict=True):
        points = sorted(curve["points"], key=lambda point: point["peak_bytes"])
        own = [point for point in points if point["budget_bytes"] is not None or point["name"] == "inf"]
        panel.plot(*_places(own), "o-", color="tab:blue", markersize=4, label="reversible(budget=...)")
        others = [point for point in points if point not in own]
        for point, marker in zip(others, "sD^v", strict=True):
            panel.plot(*_places([point]), marker, color="black", fillstyle="none", label=point["name"])
        panel.set(title=curve["name"], xlabel="accounted peak of a step, MiB", ylabel="step time / plain")
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _places(points: list[Row]) -> tuple[list[float], list[float]]:
    return [point["peak_bytes"] / 2**20 for point in points], [point["time_over_plain"] for point in points]
