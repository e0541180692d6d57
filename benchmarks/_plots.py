"""The plots of docs/performance.md: transparent, in colours that differ for everybody on light and dark."""

from __future__ import annotations

import statistics
from textwrap import fill
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from _frame import Row
    from _report import Results

INK = "#767676"
OURS, DURABLE, MEMORY, FLOOR = "#0a84d6", "#009e73", "#d55e00", INK
"""From the palette of Okabe and Ito, with the same contrast to white and to black."""
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "grid.alpha": 0.35,
    "grid.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "perqueue",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
_SHORT = {
    "httpx.AsyncClient, shared": "httpx.AsyncClient",
    "httpx.AsyncClient over httpx-aiohttp": "httpx-aiohttp",
}


def _median(row: Row, metric: str) -> float:
    return statistics.median(row.metrics[metric])


def _rows(results: Results, benchmark: str, group: str) -> dict[str, Row]:
    found = results.get(benchmark, {"rows": []})["rows"]
    return {row.case: row for row in found if row.group == group}


def _plain(axis: Any) -> None:
    axis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(mpl.ticker.NullFormatter())


def _is_ours(case: str) -> bool:
    return case.startswith(("perqueue", "record()"))


def drain_cpu(results: Results) -> Any:
    """CPU for each delivery, of every way to send it."""
    plain = _rows(results, "drain", "0 ms, 32 in flight")
    tls = _rows(results, "drain", "0 ms, 32 in flight, TLS")
    if not plain:
        return None
    metric = "CPU µs/request"
    cases = sorted(plain, key=lambda case: -_median(plain[case], metric))
    figure, axes = plt.subplots(figsize=(8, 0.36 * len(cases) + 1.2))
    for place, case in enumerate(cases):
        colour = OURS if _is_ours(case) else FLOOR if "bare" in case else MEMORY
        value = _median(plain[case], metric)
        points = [value]
        if case in tls:
            points.append(_median(tls[case], metric))
            axes.plot(points, [place] * 2, color=colour, lw=1.5)
            axes.plot(points[1], place, "D", mfc="none", mec=colour, ms=7, mew=1.5)
        axes.plot(value, place, "o", color=colour, ms=9)
        weight = "bold" if _is_ours(case) else "normal"
        axes.text(min(points) / 1.12, place, f"{value:,.0f}", va="center", ha="right", weight=weight)
    axes.plot([], [], "o", color=INK, ms=9, label="plain HTTP (its figure on the left)")
    axes.plot([], [], "D", mfc="none", mec=INK, ms=7, mew=1.5, label="over TLS")
    axes.set_yticks(range(len(cases)), cases)
    axes.set_xscale("log")
    axes.set_xlim(left=axes.get_xlim()[0] / 1.5)
    _plain(axes.xaxis)
    axes.set_xlabel("CPU of the client for each request, µs (logarithmic; less is better)")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def drain_in_flight(results: Results) -> Any:
    """Throughput and CPU with more requests in flight, where each takes 50 ms."""
    in_flight = (8, 32, 128)
    found = {many: _rows(results, "drain", f"50 ms, {many} in flight") for many in in_flight}
    styles = {
        "perqueue": (OURS, "o-"),
        "perqueue[fast]": (OURS, "s--"),
        "aiohttp": (DURABLE, "^-"),
        "httpx.AsyncClient over httpx-aiohttp": (MEMORY, "v-"),
        "httpx.AsyncClient, HTTP/2": ("#cc79a7", "P-"),
        "httpx.AsyncClient, shared": (MEMORY, "X:"),
    }
    if not any(found.values()):
        return None
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.9))
    for axes, metric in zip(panels, ("% of in flight/RTT", "CPU µs/request"), strict=True):
        for case, (colour, style) in styles.items():
            points = [(many, _median(found[many][case], metric)) for many in in_flight if case in found[many]]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=colour, label=_SHORT.get(case, case), ms=7)
        axes.set_xscale("log", base=2)
        axes.set_xticks(in_flight)
        _plain(axes.xaxis)
        axes.set_xlabel("requests in flight")
    panels[0].set_ylim(0, 105)
    panels[0].set_title("throughput, % of in flight / RTT (more is better)")
    panels[1].set_yscale("log")
    panels[1].yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
    _plain(panels[1].yaxis)
    panels[1].set_title("CPU of each request, µs (less is better)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def record(results: Results) -> Any:
    """What recording one event costs, with its tail."""
    rows = _rows(results, "record", "one event, one thread")
    if not rows:
        return None
    cases = sorted(rows, key=lambda case: -_median(rows[case], "p50"))
    figure, axes = plt.subplots(figsize=(8, 0.33 * len(cases) + 1.6))
    marks = {"p50": ("o", 8), "p99": ("|", 10), "p99.9": ("D", 5)}
    for place, case in enumerate(cases):
        row = rows[case]
        colour = OURS if _is_ours(case) else DURABLE if _survives(row) else MEMORY
        values = [_median(row, metric) for metric in marks]
        axes.plot(values, [place] * len(values), color=colour, lw=1.2)
        for (mark, size), value in zip(marks.values(), values, strict=True):
            axes.plot(value, place, mark, color=colour, ms=size, mew=2 if mark == "|" else 1)
    for metric, (mark, size) in marks.items():
        axes.plot([], [], mark, color=INK, ms=size, mew=2 if mark == "|" else 1, label=metric)
    for label, colour in (("perqueue", OURS), ("survives kill -9", DURABLE), ("in memory", MEMORY)):
        axes.plot([], [], "s", color=colour, label=label)
    axes.set_yticks(range(len(cases)), cases)
    axes.set_xscale("log")
    _plain(axes.xaxis)
    axes.set_xlabel("µs for each call (logarithmic; less is better)")
    figure.legend(loc="outside lower center", ncols=6)
    return figure


def _survives(row: Row) -> bool:
    return row.survives not in (None, "nothing")


def growth(results: Results) -> Any:
    """How many times as much each operation costs on a large outbox as on an empty one."""
    found = results.get("growth", {"rows": []})["rows"]
    large = [row for row in found if "ratio p50" in row.metrics and row.case != "empty"]
    if not large:
        return None
    operations = list(dict.fromkeys(row.group for row in large))
    cases = list(dict.fromkeys(row.case for row in large))
    figure, axes = plt.subplots(figsize=(8, 3.2))
    for number, (case, colour) in enumerate(zip(cases, (OURS, DURABLE), strict=False)):
        rows = {row.group: row for row in large if row.case == case}
        middle = [_median(rows[name], "ratio p50") for name in operations]
        ends = [rows[name].metrics["ratio p50"] for name in operations]
        places = [place + (number - 0.5) * 0.36 for place in range(len(operations))]
        axes.bar(places, middle, width=0.34, color=colour, label=case)
        errors = [
            [value - min(all_rounds) for value, all_rounds in zip(middle, ends, strict=True)],
            [max(all_rounds) - value for value, all_rounds in zip(middle, ends, strict=True)],
        ]
        axes.errorbar(places, middle, errors, fmt="none", ecolor=INK, capsize=3)
    axes.axhline(1, color=INK, ls=":")
    labels = [fill(name.partition(", ")[0], 12) for name in operations]
    axes.set_xticks(range(len(operations)), labels)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("times an empty outbox")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def rate_limit(results: Results) -> Any:
    """What a server that takes so many requests a second gets to see."""
    rows = _rows(results, "drain", "rate limit, second by second")
    if not rows:
        return None
    (row,) = rows.values()
    limit = float(row.case.split()[0])
    figure, axes = plt.subplots(figsize=(8, 3.2))
    taken, refused = row.metrics["taken"][:-1], row.metrics["refused"][:-1]
    seconds = range(len(taken))
    axes.axhline(limit, color=INK, ls=":", label="what the server takes")
    axes.step(seconds, taken, where="mid", color=OURS, lw=2, label="taken")
    axes.bar(seconds, refused, color=MEMORY, label="refused (429)")
    axes.set_xlabel("seconds since the start")
    axes.set_ylabel("requests/s")
    axes.legend(loc="upper right")
    return figure


PLOTS: dict[str, Callable[[Results], Any]] = {
    "record": record,
    "growth": growth,
    "drain-cpu": drain_cpu,
    "drain-in-flight": drain_in_flight,
    "rate-limit": rate_limit,
}


def draw(results: Results, folder: Path) -> None:
    """Write each plot whose figures there are."""
    folder.mkdir(parents=True, exist_ok=True)
    mpl.use("svg")
    for name, plot in PLOTS.items():
        with mpl.rc_context(_STYLE):
            figure = plot(results)
            if figure is not None:
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
                plt.close(figure)
