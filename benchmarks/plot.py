"""A record as a picture: bars with their spread, as an SVG that is the same on every machine.

Drawn by hand, since a plotting library's version would change its bytes and the page's test with
it. Knows `frame` alone.
"""

from __future__ import annotations

from xml.sax.saxutils import escape

from frame import OURS, Measure, Record, Row, figure, spread

_WIDTH, _LABELS, _ROW, _HEAD, _GAP = 900, 250, 24, 34, 14
_OURS, _OTHERS, _INK, _GREY = "#1f6fb4", "#9aa7b3", "#222222", "#666666"
_FONT = "font-family='system-ui, sans-serif'"
_MOST = 3
_TOLD = 92
"""Px beside a bar for its figure."""


def draw(record: Record) -> str:
    """The record's compared measures, a panel each, at most three; empty if there is nothing."""
    rows = [row for row in record.rows if row.turns]
    panels = [m for m in record.measures if m.more is not None and _compared(rows, m)][:_MOST]
    if not panels:
        return ""
    height = _HEAD + _ROW * len(rows) + 6
    width = (_WIDTH - _LABELS) / len(panels)
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {height}' {_FONT} "
        f"font-size='12' role='img'>",
        f"<title>{escape(record.title)}</title>",
        f"<rect width='{_WIDTH}' height='{height}' fill='white'/>",
    ]
    for at, row in enumerate(rows):
        label = row.label.replace("`", "")
        parts.append(_text(_LABELS - 8, _middle(at), label, "end", bold=_is_ours(row)))
    for number, measure in enumerate(panels):
        parts += _panel(rows, measure, _LABELS + number * width, width - _GAP)
    return "\n".join([*parts, "</svg>", ""])


def _compared(rows: list[Row], measure: Measure) -> bool:
    return sum(1 for row in rows if row.values(measure.key)) > 1


def _is_ours(row: Row) -> bool:
    return row.name == OURS or row.label.startswith("autoglm-gguf")


def _panel(rows: list[Row], measure: Measure, left: float, width: float) -> list[str]:
    """A measure's bars, and which way is better."""
    unit = f", {measure.unit}" if measure.unit and measure.unit != "B" else ""
    better = "more is better" if measure.more else "less is better"
    parts = [
        _text(left, 14, f"{measure.label}{unit}", "start", bold=True),
        _text(left, 27, better, "start", fill=_GREY, size=10),
    ]
    found = {row.name: row.values(measure.key) for row in rows}
    most = max((max(values) for values in found.values() if values), default=0) or 1
    scale = (width - _TOLD) / most
    for at, row in enumerate(rows):
        values = found[row.name]
        if not values:
            continue
        s, y = spread(values), _middle(at)
        fill = _OURS if _is_ours(row) else _OTHERS
        bar = max(1.0, s["median"] * scale)
        parts.append(
            f"<rect x='{left:.1f}' y='{y - 11:.1f}' width='{bar:.1f}' height='14' fill='{fill}'/>"
        )
        low, high = left + s["min"] * scale, left + s["max"] * scale
        if high - low >= 1:
            parts.append(
                f"<path d='M{low:.1f} {y - 4:.1f}H{high:.1f}' stroke='{_INK}' stroke-width='1.5'/>"
            )
        end = max(left + bar, high) + 5
        parts.append(_text(end, y, figure(s["median"], measure.unit), "start"))
    return parts


def _middle(at: int) -> float:
    """Where a row's text stands."""
    return _HEAD + at * _ROW + 15


def _text(
    x: float,
    y: float,
    text: str,
    anchor: str,
    *,
    bold: bool = False,
    fill: str = _INK,
    size: int = 0,
) -> str:
    style = (" font-weight='600'" if bold else "") + (f" font-size='{size}'" if size else "")
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' fill='{fill}'{style}>"
        f"{escape(text)}</text>"
    )
