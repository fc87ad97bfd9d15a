"""Rows as compact tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from composition.scaling import line_through

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Row = dict[str, Any]
_MIB = 1 << 20


def _time(row: Row | None) -> str:
    if row is None:
        return "-"
    if "skipped" in row:
        return "skipped"
    median, spread = 1e3 * row["median_s"], 1e3 * row["spread_s"]
    digits = 0 if median >= 100 else 1 if median >= 10 else 2 if median >= 0.1 else 4
    return f"{median:.{digits}f} ±{spread:.{digits}f} ({row['n']})"


def _ratio(ours: Row, theirs: Row | None) -> str:
    if theirs is None or "median_s" not in ours or "median_s" not in theirs:
        return ""
    ratio = theirs["median_s"] / ours["median_s"]
    return f"{ratio:.1f}x" if ratio < 100 else f"{ratio:.0f}x"


def _extra(row: Row, kind: str) -> str:
    mark = row.get("memory", {}).get(kind)
    return f"{mark['extra'] / _MIB:.0f}" if mark else ""


def _print(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    for row in table:
        first, rest = row[0].ljust(widths[0]), zip(row[1:], widths[1:], strict=True)
        print("  ".join([first, *(cell.rjust(width) for cell, width in rest)]))
    print()


def print_floors(floors: Row) -> None:
    """The machine's stages, for one file."""
    size = floors["bytes"]
    print(f"floors, for a file of {size / _MIB:.0f} MiB")
    stages = {f"read, {n} threads": rate for n, rate in floors["read"].items()}
    names = {
        "read_cold": "read, page cache cold",
        "pin": "allocate as much pinned memory",
        "transfer": "pinned memory to the device",
        "copy": "copy within the device",
    }
    stages |= {name: floors[key] for key, name in names.items() if key in floors}
    _print(
        ("stage", "ms", "GB/s"),
        ((name, f"{1e3 * size / rate:.1f}", f"{rate / 1e9:.1f}") for name, rate in stages.items()),
    )


def print_actions(rows: Sequence[Row], title: str) -> None:
    """Actions by engine, with ratios and what qwenlora held at the peak."""
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    others = [engine for engine in engines if engine != "qwenlora"]
    by_key = {(row["engine"], row["action"]): row for row in rows}
    kinds = [k for k in ("device", "pinned", "host") if any(k in r.get("memory", {}) for r in rows)]
    print(f"{title}: median ±spread in ms (times taken); MiB held at the peak only")
    lines, notes = [], []
    for action in dict.fromkeys(row["action"] for row in rows):
        ours = by_key.get(("qwenlora", action), {})
        cells = [action, _time(ours or None)]
        for engine in others:
            theirs = by_key.get((engine, action))
            cells += [_time(theirs), _ratio(ours, theirs)]
        lines.append([*cells, *(_extra(ours, kind) for kind in kinds)])
        found = [by_key[(e, action)] for e in engines if (e, action) in by_key]
        notes += [f"  {action}, {r['engine']}: {r['skipped']}" for r in found if "skipped" in r]
        notes += [_added(r) for r in found if "added_s" in r]
    columns = [column for engine in others for column in (engine, "ratio")]
    _print(("action", "qwenlora", *columns, *(f"+{kind}" for kind in kinds)), lines)
    for note in notes:
        print(note)
    if notes:
        print()


def _added(row: Row) -> str:
    mib = row["bus_bytes"] / _MIB
    return f"  added to the copies of a forward: {1e3 * row['added_s']:.1f} ms for {mib:.0f} MiB"


def print_scaling(rows: Sequence[Row]) -> None:
    """Each sweep's points, and the line through each engine's."""
    for sweep in dict.fromkeys(row["sweep"] for row in rows):
        own = [row for row in rows if row["sweep"] == sweep]
        engines = list(dict.fromkeys(row["engine"] for row in own))
        print(f"first composition against {sweep}: median ±spread in ms (times taken)")
        lines = []
        for x in dict.fromkeys(row["x"] for row in own):
            at = {row["engine"]: row for row in own if row["x"] == x}
            size = next(iter(at.values()))["bytes"] / _MIB
            lines.append((str(x), f"{size:.0f}", *(_time(at.get(engine)) for engine in engines)))
        _print((sweep, "MiB", *engines), lines)
        for engine in engines if sweep != "threads" else ():
            line = line_through([row for row in own if row["engine"] == engine])
            print(
                f"  {engine}: {line['bytes_per_s'] / 1e9:.2f} GB/s"
                f" and {1e3 * line['start_s']:.1f} ms; points within"
                f" {100 * line['largest_deviation']:.0f} % of that line"
            )
        print()
