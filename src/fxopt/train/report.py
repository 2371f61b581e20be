"""`report.html`: a run on one page, with its curves and samples. No scripts, nothing from elsewhere."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fxopt.runtime.files import replace_file
from fxopt.train.journal import TIMES, rows
from fxopt.train.samples import samples

WIDTH, HEIGHT, EDGE = 640, 220, 76
SHOWN = 40  # samples, the newest
PAGE_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:44rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
pre{overflow-x:auto;font-size:12px}table{border-collapse:collapse;font-variant-numeric:tabular-nums}td{white-space:pre-wrap;overflow-wrap:anywhere}td,th{padding:.1rem .8rem .1rem 0;text-align:left;vertical-align:top}
svg{width:100%;height:auto}svg text{font:11px system-ui,sans-serif;fill:#666}h2{margin:1.6rem 0 .3rem;font-size:1.05rem}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}svg text{fill:#999}}"""
_COLOURS = ("#2266bb", "#cc6622", "#228855", "#883399")


def write_report(folder: Path, settings: Mapping[str, Any], facts: Mapping[str, Any], model: str) -> Path:
    """Writes a run's report into its folder.

    Args:
        settings: of the trainer. facts: what is to stand at the top, by name. model: its summary, as text.
    """
    logged = rows(folder)
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in logged:
        for name, value in row.items():
            if name not in ("step", "epoch", "tokens", "items"):
                curves.setdefault(name, []).append((row["step"], value))
    losses = [name for name in curves if name in ("loss", "val_loss")]
    parts = [table(facts), "<h2>loss</h2>" + curve({name: curves[name] for name in losses})] if losses else [table(facts)]
    parts += [f"<h2>{html.escape(name)}</h2>" + curve({name: points}) for name, points in curves.items() if name not in losses and len(points) > 1]
    said = samples(folder)[-SHOWN:]
    parts += ["<h2>samples</h2>" + table({f"step {row['step']}, {row['name']}": row["text"] for row in reversed(said)})] if said else []
    times = rows(folder, TIMES)
    parts += ["<h2>seconds of a step</h2>" + curve({"seconds": [(row["step"], row["seconds"]) for row in times]})] if len(times) > 1 else []
    parts += ["<h2>model</h2>", f"<pre>{html.escape(model)}</pre>", "<h2>settings</h2>", table({name: value for name, value in settings.items() if value not in (None, [], {})})]
    page = f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>run</title><style>{PAGE_STYLE}</style><h1>run</h1>{''.join(parts)}</html>"
    replace_file(folder / "report.html", page.encode())
    return folder / "report.html"


def table(values: Mapping[str, Any]) -> str:
    lines = "".join(f"<tr><th scope=row>{html.escape(str(name))}</th><td>{html.escape(shown(value))}</td></tr>" for name, value in values.items())
    return f"<table>{lines}</table>"


def shown(value: Any) -> str:
    """A value as people read it."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def curve(lines: Mapping[str, Sequence[tuple[float, float]]], over: str = "step", mark: float | None = None) -> str:
    """Lines over the steps (or what `over` says; `mark`: a place on it) as an SVG: every point of short runs, of long ones the extremes of each pixel. Values that are not finite are
    left out, and the line is broken there."""
    finite = [(x, y) for points in lines.values() for x, y in points if math.isfinite(y)]
    if not finite:
        return "<p>no finite values</p>"
    left, right = min(x for x, _ in finite), max(x for x, _ in finite)
    low, high = min(y for _, y in finite), max(y for _, y in finite)
    across, up = (right - left) or 1.0, (high - low) or abs(high) or 1.0
    drawn = []
    for number, (name, points) in enumerate(lines.items()):
        path, pen = [], "M"
        for x, y in _thinned(points, left, across):
            if not math.isfinite(y):
                pen = "M"
                continue
            path.append(f"{pen}{EDGE + (x - left) / across * (WIDTH - EDGE - 8):.1f},{HEIGHT - 24 - (y - low) / up * (HEIGHT - 36):.1f}")
            pen = "L"
        colour = _COLOURS[number % len(_COLOURS)]
        drawn.append(f"<path d='{' '.join(path)}' fill=none stroke='{colour}' stroke-width=1.5 stroke-linejoin=round stroke-linecap=round><title>{html.escape(name)}</title></path>")
        if len(lines) > 1:
            drawn.append(f"<text x={EDGE + 90 * number} y=10 style='fill:{colour}'>{html.escape(name)}</text>")
    labels = "".join(f"<text x={x} y={y} text-anchor={side}>{text}</text>" for x, y, side, text in (
        (EDGE - 4, 16, "end", f"{high:.4g}"), (EDGE - 4, HEIGHT - 22, "end", f"{low:.4g}"), (EDGE, HEIGHT - 6, "start", f"{over} {left:g}"), (WIDTH - 8, HEIGHT - 6, "end", f"{right:g}")))
    if mark is not None:
        x = EDGE + (mark - left) / across * (WIDTH - EDGE - 8)
        drawn.append(f"<line x1={x:.1f} x2={x:.1f} y1=12 y2={HEIGHT - 24} stroke='#999' stroke-dasharray='3 3'><title>{shown(float(mark))}</title></line>")
    names = ", ".join(lines)
    return f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' role=img aria-label='{html.escape(names)} over {over} {left:g} to {right:g}'>{''.join(drawn)}{labels}</svg>"


def _thinned(points: Sequence[tuple[float, float]], left: float, across: float) -> list[tuple[float, float]]:
    if len(points) <= 2 * WIDTH:
        return list(points)
    columns: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        columns.setdefault(int((point[0] - left) / across * WIDTH), []).append(point)
    kept = []
    for column in columns.values():
        pair = {min(column, key=lambda point: point[1]), max(column, key=lambda point: point[1])}
        kept += sorted(pair)
    return kept
