"""Charts as SVG text: lines with intervals and levels, scatter plots, bars.

Every chart is 360 units wide, as a phone's screen, and pages draw it no smaller. Texts are placed
by an upper estimate of their width, so that they do not meet. Colors are Okabe and Ito's, which
people with any color vision tell apart, from CSS variables that a page sets for light and for
dark; `standalone` makes a file of its own.
"""

import html
import math
from collections.abc import Sequence

import numpy as np

WIDTH = 360
SIZE = 11  # of text
MAX_LINES = 14  # drawn in one chart
MAX_GROUPS = 40  # named below a scatter plot
_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")
_DARK = ("#56b4e9", "#e69f00", "#2fc79b", "#f0b6da", "#e8743b", "#5b8fe0", "#d8d8d8")
COLORS = len(_LIGHT)


def _variables(colors: Sequence[str], *, paper: str, ink: str, faint: str, rule: str) -> str:
    series = "".join(f"--s{i}:{color};" for i, color in enumerate(colors))
    return f":root{{--paper:{paper};--ink:{ink};--faint:{faint};--rule:{rule};{series}}}"


_LIGHT_VARIABLES = _variables(
    _LIGHT, paper="#ffffff", ink="#1b2430", faint="#566070", rule="#dfe3e8"
)
_DARK_VARIABLES = _variables(_DARK, paper="#14181d", ink="#e4e8ee", faint="#a3adba", rule="#343c46")
_SERIES = "".join(f".s{i}{{--c:var(--s{i})}}" for i in range(COLORS))
STYLE = f"""
:root{{color-scheme:light dark}}
{_LIGHT_VARIABLES}
@media(prefers-color-scheme:dark){{{_DARK_VARIABLES}}}
{_SERIES}
svg text{{font:{SIZE}px system-ui,sans-serif;fill:var(--faint)}}
svg text.n{{fill:var(--ink);font-weight:600;stroke:var(--paper);stroke-width:3;paint-order:stroke}}
.g{{stroke:var(--rule);fill:none}}
.l{{stroke:var(--c);stroke-width:1.8;fill:none;stroke-linejoin:round}}
.r{{stroke-dasharray:7 3}}
.a{{fill:var(--c);opacity:.2}}
.p{{fill:var(--c)}}
.v{{stroke:var(--faint);stroke-dasharray:5 4;fill:none}}
.m{{stroke:var(--faint);stroke-dasharray:1.5 3;fill:none}}
.o{{stroke:var(--c);stroke-width:4.5;stroke-linecap:round;opacity:.75;fill:none}}
.q{{stroke-linecap:square}}
.w{{stroke:var(--ink);stroke-width:1.5;fill:none}}
"""
_DASHED_KEY = '<path class="v" d="M0 -4H20"/>'  # in a legend


def escape(text) -> str:
    """Text from data as text of a page: no tag, no entity, and no control character, which XML
    forbids.
    """
    printable = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(text))
    return html.escape(printable)


def width_of(text: str) -> float:
    """How wide a text of size SIZE is at most, in units: the widths of a wide font, DejaVu Sans."""
    return SIZE * sum(map(_advance, text))


def _advance(character: str) -> float:
    if character in "iljtfrI.,:;'|!()[]- ":
        return 0.4
    if character in "mwMW%@" or ord(character) > 767:
        return 1.0
    return 0.68


def cut(text: str, room: float) -> str:
    """A text that is not wider than `room`, with an ellipsis where something is missing."""
    if width_of(text) <= room:
        return text
    while text and width_of(text) + SIZE > room:
        text = text[:-1]
    return text + "…"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that cover [low, high]."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = min((m * unit for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_texts(values: Sequence[float]) -> list[str]:
    """Round numbers as text, all with the same decimals: `0.25`, `1,500`, `20k`, `3e-4`."""
    most = max(map(abs, values))
    if 0 < most < 1e-2:
        return [f"{v:.2g}".replace("e-0", "e-") for v in values]
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if most >= max(unit, 1e4):
            return [f"{v / unit:g}{letter}" if v else "0" for v in values]
    decimals = 0
    while decimals < 6 and not _exact(values, decimals):
        decimals += 1
    return [f"{v:,.{decimals}f}" for v in values]


def _exact(values: Sequence[float], decimals: int) -> bool:
    tolerance = 1e-9 * max(map(abs, values)) + 1e-15
    return all(abs(v - round(v, decimals)) < tolerance for v in values)


def thin(points: list, most: int) -> list:
    """At most about `most` of many (x, y, ...) points: the lowest and the highest y of each
    stretch, and both ends.
    """
    if len(points) <= most:
        return points
    edges = np.linspace(1, len(points) - 1, max(most // 2, 2)).astype(int)
    kept = {0, len(points) - 1}
    for a, b in zip(edges, edges[1:], strict=False):
        ys = [p[1] for p in points[a:b]]
        kept |= {a + int(np.argmin(ys)), a + int(np.argmax(ys))}
    return [points[i] for i in sorted(kept)]


def _finite(points) -> list:
    return [p for p in points if all(v is not None and math.isfinite(v) for v in p)]


class _Axes:
    """A frame with round numbers on both axes, and where its points lie."""

    def __init__(
        self,
        x_range,
        y_range,
        x_label: str,
        y_label: str,
        *,
        height: float = 168,
        whole: bool = False,
    ):
        self.x0, self.x1 = x_range
        self.y0, self.y1 = y_range
        self.whole = whole
        ys = ticks(self.y0, self.y1)
        texts = tick_texts(ys)
        self.left = max(map(width_of, texts), default=0) + 10
        self.right = WIDTH - 12
        self.top = 24
        self.bottom = self.top + height
        self.out = [f'<text x="2" y="{SIZE}">{escape(cut(y_label, WIDTH - 4))}</text>']
        for y, text in zip(ys, texts, strict=True):
            at = self.py(y)
            self.out.append(f'<path class="g" d="M{self.left:.0f} {at:.1f}H{self.right}"/>')
            self.out.append(
                f'<text x="{self.left - 6:.0f}" y="{at + 4:.1f}" text-anchor="end">{text}</text>'
            )
        for x, text in self._x_ticks():
            self.out.append(
                f'<text x="{self.px(x):.1f}" y="{self.bottom + 18:.0f}"'
                f' text-anchor="middle">{text}</text>'
            )
        middle = (self.left + self.right) / 2
        label = escape(cut(x_label, self.right - self.left))
        self.out.append(
            f'<text x="{middle:.0f}" y="{self.bottom + 33:.0f}" text-anchor="middle">{label}</text>'
        )
        self.below = self.bottom + 41

    def _x_ticks(self) -> list[tuple[float, str]]:
        for count in (6, 5, 4, 3, 2, 1):
            xs = [x for x in ticks(self.x0, self.x1, count) if x == int(x) or not self.whole]
            texts = tick_texts(xs) if xs else []
            needed = max(map(width_of, texts), default=0) + 10
            gap = self.px(xs[1]) - self.px(xs[0]) if len(xs) > 1 else math.inf
            if needed <= gap:
                break
        # The outermost numbers must not leave the drawing.
        return [
            (x, text)
            for x, text in zip(xs, texts, strict=True)
            if width_of(text) / 2 <= self.px(x) <= WIDTH - width_of(text) / 2
        ]

    def px(self, x: float) -> float:
        return self.left + (x - self.x0) / (self.x1 - self.x0) * (self.right - self.left)

    def py(self, y: float) -> float:
        return self.bottom - (y - self.y0) / (self.y1 - self.y0) * (self.bottom - self.top)

    def place(self, points) -> str:
        return " ".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in points)

    def ranges(self) -> tuple:
        return self.x0, self.x1, self.left, self.right, self.y0, self.y1, self.bottom, self.top


def _drawing(
    title: str, out: list[str], below: float, entries: list[tuple[str, str]], ranges=()
) -> str:
    """The chart with a legend of (swatch, text) below it, in as many rows as that takes.

    `ranges` are those of the data and where these lie, for whoever reads numbers off the drawing.
    """
    legend = []
    x = 2.0
    y = below + SIZE
    for swatch, text in entries:
        text = cut(text, WIDTH - 34)
        wide = 26 + width_of(text) + 10
        if x > 2 and x + wide > WIDTH:
            x = 2.0
            y += 16
        legend.append(
            f'<g transform="translate({x:.0f} {y:.0f})">{swatch}'
            f'<text x="26" y="0">{escape(text)}</text></g>'
        )
        x += wide
    height = y + 6 if entries else below
    axes = f' data-axes="{" ".join(f"{v:.10g}" for v in ranges)}"' if ranges else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img"'
        f' aria-label="{escape(title)}"{axes}>{"".join(out + legend)}</svg>'
    )


def _and_more(left_out: int) -> list[tuple[str, str]]:
    return [("", f"and {left_out} more")] if left_out > 0 else []


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    # A range far below the values' size would make noise look like a change.
    pad = max((high - low) * share, (0.01 * max(abs(low), abs(high)) - (high - low)) / 2)
    pad = pad if pad > 0 else 0.01
    return low - pad if low < 0 else max(low - pad, 0.0), high + pad


def _frame_of(series: dict, bands: dict, levels: dict, ceiling: float) -> tuple:
    xs = [p[0] for line in series.values() for p in line]
    low = min(xs)
    high = max(xs)
    if high == low:
        low, high = low - 0.5, high + 0.5
    heights = {name: [p[1] for p in line] for name, line in series.items()}
    near = [ys for ys in heights.values() if np.median(ys) <= ceiling] or list(heights.values())
    ys = [y for line in near for y in line] + list(levels.values())
    ys += [value for band in bands.values() for p in band for value in p[1:]]
    return (low, high), _padded(min(ys), max(ys), 0.05)


def lines(
    title: str,
    series: dict[str, list[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    levels: dict[str, float] | None = None,
    marks: dict[str, list[float]] | None = None,
    bands: dict[str, list[tuple[float, float, float]]] | None = None,
    frame: tuple[tuple[float, float], tuple[float, float]] | None = None,
    diagonal: str | None = None,
    values: bool = True,
    most: int = 300,
    ceiling: float = math.inf,
) -> str:
    """A line chart as SVG.

    Args:
        title: what it shows, for readers that cannot see it.
        series: (x, y) points by name; those that are not finite are left out.
        x_label, y_label: of the axes, with the unit.
        levels: horizontal lines by name, as a loss at chance.
        marks: vertical lines by name, as the steps at which a run was resumed.
        bands: (x, low, high) by the name of a series: the interval around it.
        frame: the range of x and that of y; unset: what holds everything.
        values: whether the legend gives the last y of each line, and its interval.
        diagonal: the name of a line from the lower left to the upper right corner.
        most: points that are drawn of a line; of more, the extremes of every stretch.
        ceiling: a line whose median is above would flatten the others: it may leave the frame.
    """
    levels = levels or {}
    marks = marks or {}
    series = {name: _finite(line) for name, line in series.items()}
    series = {name: line for name, line in series.items() if line}
    if not series:
        return ""
    left_out = len(series) - MAX_LINES
    series = dict(list(series.items())[:MAX_LINES])
    bands = {name: _finite(band) for name, band in (bands or {}).items() if name in series}
    frame = frame or _frame_of(series, bands, levels, ceiling)
    low, high = frame[0]
    steps = [p[0] for line in series.values() for p in line]
    whole = high > 1 and all(float(x).is_integer() for x in steps)
    axes = _Axes(*frame, x_label, y_label, whole=whole)
    out = axes.out
    entries = []
    for i, name in enumerate(series):
        if bands.get(name):
            out.append(_band(axes, thin(bands[name], most), f"s{i % COLORS}"))
    for name, places in marks.items():
        drawn = "".join(
            f"M{axes.px(x):.1f} {axes.top}V{axes.bottom:.0f}"
            for x in sorted(set(places))
            if low <= x <= high
        )
        if drawn:
            out.append(f'<path class="m" d="{drawn}"/>')
            entries.append(('<path class="m" d="M10 -11V2"/>', name))
    for name, y in levels.items():
        out.append(f'<path class="v" d="M{axes.left:.0f} {axes.py(y):.1f}H{axes.right}"/>')
        entries.append((_DASHED_KEY, f"{name} {y:.4g}"))
    if diagonal:
        out.append(
            f'<path class="v" d="M{axes.left:.0f} {axes.bottom:.0f}L{axes.right} {axes.top}"/>'
        )
        entries.append((_DASHED_KEY, diagonal))
    named = []
    for i, (name, line) in enumerate(series.items()):
        color = f"s{i % COLORS}" + " r" * (i >= COLORS)
        points = [(x, min(y, frame[1][1])) for x, y in thin(line, most)]
        if len(points) > 1:
            out.append(f'<polyline class="l {color}" points="{axes.place(points)}"/>')
        if len(points) <= 30:
            dots = "".join(
                f'<circle cx="{axes.px(x):.1f}" cy="{axes.py(y):.1f}" r="2.2"/>' for x, y in points
            )
            out.append(f'<g class="p {color}">{dots}</g>')
        text = name
        if values:
            text += f" {line[-1][1]:.4g}"
            if bands.get(name):
                text += f" ({bands[name][-1][1]:.4g} to {bands[name][-1][2]:.4g})"
        named.append((f'<path class="l {color}" d="M0 -4H20"/>', text))
    legend = named + _and_more(left_out) + entries
    return _drawing(title, out, axes.below, legend, axes.ranges())


def _band(axes: _Axes, band: list, color: str) -> str:
    if len(band) == 1:
        x, low, high = band[0]
        where = f"M{axes.px(x):.1f} {axes.py(low):.1f}V{axes.py(high):.1f}"
        return f'<path class="l {color}" d="{where}"/>'
    lower = axes.place([(x, low) for x, low, _ in band])
    upper = axes.place([(x, high) for x, _, high in reversed(band)])
    return f'<polygon class="a {color}" points="{lower} {upper}"/>'


def scatter(
    title: str,
    points: np.ndarray,
    groups: Sequence[int],
    names: Sequence[str],
    *,
    x_label: str,
    y_label: str,
    labels: bool = False,
) -> str:
    """Points as SVG, a color and a shape for each group.

    Args:
        points: (n, 2) numbers; those that are not finite, or absurd, are left out.
        groups: (n,) indices into `names`; -1: of no group.
        names: of the groups, for the legend; or, with `labels`, written where each group's median
            lies.
    """
    points = np.asarray(points, float)
    usable = (np.abs(points) < 1e100).all(1)
    points = points[usable]
    groups = np.asarray(groups)[usable]
    if not len(points):
        return ""
    low, high = np.quantile(points, [0.01, 0.99], axis=0)
    frame = [_padded(a, b, 0.06) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    axes = _Axes(*frame, x_label, y_label, height=300)
    entries = []
    placed = np.clip(points, *np.array(frame).T)  # what lies far out is drawn on the edge
    for g in [-1, *range(len(names))]:
        members = placed[groups == g]
        if not len(members):
            continue
        look = f"o s{g % COLORS if g >= 0 else COLORS - 1}" + " q" * (g // COLORS % 2 == 1)
        spots = "".join(f"M{axes.px(x):.1f} {axes.py(y):.1f}h0" for x, y in members)
        axes.out.append(f'<path class="{look}" d="{spots}"/>')
        if not labels:
            name = names[g] if g >= 0 else "no label"
            entries.append((f'<path class="{look}" d="M10 -4h0"/>', f"{name} ({len(members)})"))
    if labels:
        present = [g for g in range(len(names)) if (groups == g).any()]
        medians = [np.median(placed[groups == g], axis=0) for g in present]
        anchors = [(axes.px(x), axes.py(y)) for x, y in medians]
        texts = [names[g] for g in present]
        for text, (x, y) in zip(texts, apart(anchors, texts, axes), strict=True):
            axes.out.append(
                f'<text class="n" x="{x:.1f}" y="{y + 4:.1f}"'
                f' text-anchor="middle">{escape(text)}</text>'
            )
    legend = entries[:MAX_GROUPS] + _and_more(len(entries) - MAX_GROUPS)
    return _drawing(title, axes.out, axes.below, legend, axes.ranges())


def apart(
    anchors: list[tuple[float, float]], texts: Sequence[str], axes: _Axes
) -> list[tuple[float, float]]:
    """Places near the anchors at which no two texts overlap, as far as there is room.

    Each is the first that is free on a spiral around its anchor.
    """
    taken = []
    for (x, y), text in zip(anchors, texts, strict=True):
        half = width_of(text) / 2 + 2
        for turn in range(600):
            angle = 2.4 * turn
            radius = 2.2 * math.sqrt(turn)
            u = min(max(x + radius * math.cos(angle), axes.left + half), axes.right - half)
            v = min(max(y + radius * math.sin(angle), axes.top + 8), axes.bottom - 8)
            if all(abs(u - a) >= half + other or abs(v - b) >= 17 for a, b, other in taken):
                break
        taken.append((u, v, half))
    return [(u, v) for u, v, _ in taken]


def bars(
    title: str,
    rows: list[tuple[str, float, float, float]],
    *,
    label: str,
    levels: dict[str, float] | None = None,
) -> str:
    """Horizontal bars as SVG from 0 to 1: a name, a share and its interval a row.

    `levels` are vertical lines.
    """
    widest = max((width_of(name) for name, *_ in rows), default=0.0)
    left = min(widest + 10, WIDTH / 2)
    right = WIDTH - 48.0
    step = 22
    bottom = 8 + step * len(rows)

    def px(value: float) -> float:
        return left + min(max(value, 0.0), 1.0) * (right - left)

    out = []
    for x in (0, 0.25, 0.5, 0.75, 1):
        out.append(f'<path class="g" d="M{px(x):.1f} 4V{bottom}"/>')
        out.append(f'<text x="{px(x):.1f}" y="{bottom + 14}" text-anchor="middle">{x:g}</text>')
    out.append(
        f'<text x="{(left + right) / 2:.0f}" y="{bottom + 29}"'
        f' text-anchor="middle">{escape(label)}</text>'
    )
    for i, (name, value, low, high) in enumerate(rows):
        y = 8 + step * i
        a = px(low)
        b = px(high)
        wide = max(px(value) - left, 0.5)
        out.append(
            f'<text x="{left - 6}" y="{y + 14}"'
            f' text-anchor="end">{escape(cut(name, left - 8))}</text>'
        )
        out.append(
            f'<rect class="p s0" x="{left}" y="{y + 3}" width="{wide:.1f}" height="14"'
            ' opacity=".6"/>'
        )
        out.append(
            f'<path class="w" d="M{a:.1f} {y + 10}H{b:.1f}M{a:.1f} {y + 6}v8M{b:.1f} {y + 6}v8"/>'
        )
        out.append(f'<text x="{right + 6}" y="{y + 14}">{value:.3f}</text>')
    entries = []
    if rows:
        entries.append(('<path class="w" d="M0 -4H20M0 -8v8M20 -8v8"/>', "95 % interval"))
    for name, value in (levels or {}).items():
        out.append(f'<path class="v" d="M{px(value):.1f} 2V{bottom}"/>')
        entries.append(('<path class="v" d="M10 -11V2"/>', f"{name} {value:.3g}"))
    return _drawing(title, out, bottom + 37, entries)


def standalone(svg: str) -> str:
    """A chart as a file of its own, with the colors that a page gives once for all its charts."""
    head, rest = svg.split(">", 1)
    return f"{head}><style>{STYLE}svg{{background:var(--paper)}}</style>{rest}"
