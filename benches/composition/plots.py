"""Plots of the sweeps, one for each, as PNG and SVG."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Row = dict[str, Any]
_MIB = 1 << 20
# Told apart without colours, too.
_STYLES = {
    "qwenlora": {"color": "#0b6e4f", "marker": "o", "label": "qwenlora"},
    "existing": {"color": "#c1440e", "marker": "s", "label": "existing loader"},
    "repack": {"color": "#5c5c8a", "marker": "^", "label": "unpack, join, repack"},
}
_NAMES = {"rank": "rank", "LoRAs": "LoRAs:", "blocks": "blocks:"}
_SUBJECTS = {
    "rank": "rank",
    "LoRAs": "number of LoRAs",
    "blocks": "number of trained blocks",
    "threads": "number of reading threads",
}


def save_plots(document: Row, folder: Path) -> list[Path]:
    """Draw every sweep of a bench's document; returns the files."""
    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in document["rows"] if row["suite"] == "scaling"]
    paths = []
    for sweep in dict.fromkeys(row["sweep"] for row in rows):
        own = [row for row in rows if row["sweep"] == sweep]
        with plt.rc_context({"font.size": 11, "svg.fonttype": "none"}):
            figure = _draw(sweep, own, document)
            for suffix in ("png", "svg"):
                paths.append(folder / f"composition-{sweep.lower()}.{suffix}")
                figure.savefig(
                    paths[-1], dpi=150, metadata={"Date": None} if suffix == "svg" else {}
                )
            plt.close(figure)
    return paths


def _draw(sweep: str, rows: Sequence[Row], document: Row) -> Any:
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    threads = sweep == "threads"
    for engine in dict.fromkeys(row["engine"] for row in rows):
        own = [row for row in rows if row["engine"] == engine]
        xs = [row["x"] if threads else row["bytes"] / _MIB for row in own]
        medians = [1e3 * row["median_s"] for row in own]
        low = [1e3 * (row["median_s"] - row["min_s"]) for row in own]
        high = [1e3 * (row["max_s"] - row["median_s"]) for row in own]
        style = {"linewidth": 1.6, "markersize": 5, "capsize": 3, **_STYLES[engine]}
        axes.errorbar(xs, medians, yerr=[low, high], **style)
        if engine == "qwenlora" and not threads:
            _name_points(axes, sweep, own, xs)
    _floor(axes, rows, document["floors"], threads=threads)
    axes.set_xscale("log", base=2 if threads else 10)
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        # 1, 2 and 5 of each decade: a sweep may span less than one.
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=20))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_formatter(NullFormatter())
    if threads:
        axes.set_xticks([row["x"] for row in rows], minor=False)
    axes.set_xlabel("reading threads" if threads else "LoRA files, MiB")
    axes.set_ylabel("first composition, ms")
    machine = document["machine"]
    axes.set_title(
        f"First composition by {_SUBJECTS[sweep]}\n{machine['device']}, {machine['cores']} cores,"
        f" {document['blocks']} blocks, base rank {rows[0]['base_rank']}, page cache hot",
        fontsize=11,
    )
    axes.grid(visible=True, which="major", alpha=0.35)
    axes.grid(visible=True, which="minor", alpha=0.12)
    handles, labels = axes.get_legend_handles_labels()
    # Lines come before error bars there; the floor belongs below them.
    axes.legend([*handles[1:], handles[0]], [*labels[1:], labels[0]], frameon=False, loc="best")
    return figure


def _name_points(axes: Any, sweep: str, rows: Sequence[Row], xs: Sequence[float]) -> None:
    """Write the swept variable above the points, at the first with its name."""
    for index, (row, x) in enumerate(zip(rows, xs, strict=True)):
        axes.annotate(
            f"{_NAMES[sweep]} {row['x']}" if index == 0 else f"{row['x']}",
            (x, 1e3 * row["max_s"]),
            textcoords="offset points",
            xytext=(0, 5),
            ha="center",
            fontsize=9,
            color=_STYLES["qwenlora"]["color"],
        )


def _floor(axes: Any, rows: Sequence[Row], floors: Row, *, threads: bool) -> None:
    """The slowest stage that the bytes pass: no composition of a first file can be faster."""
    own = [row for row in rows if row["engine"] == "qwenlora"]
    if threads:
        other = min(floors.get("transfer", float("inf")), floors["copy"])
        points = {
            row["x"]: row["bytes"] / min(floors["read"][str(row["x"])], other)
            for row in own
            if str(row["x"]) in floors["read"]
        }
    else:
        points = {row["bytes"] / _MIB: row["bytes"] / floors["slowest"] for row in own}
    axes.plot(
        list(points),
        [1e3 * seconds for seconds in points.values()],
        color="#333333",
        linestyle="--",
        linewidth=1.2,
        label="floor: the slowest of read, transfer, copy",
    )
