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


def _palette(colors: Sequence[str], paper: str, ink: str, faint: str, rule: str) -> str:
    named = "".join(f"--s{i}:{color};" for i, color in enumerate(colors))
    return f"--paper:{paper};--ink:{ink};--faint:{faint};--rule:{rule};{named}"


STYLE = (
    f":root{{color-scheme:light"
    f" dark;{_palette(_LIGHT, '#ffffff', '#1b2430', '#566070', '#dfe3e8')}}}"
    f"@media(prefers-color-scheme:dark){{:root{{{_palette(_DARK, '#14181d', '#e4e8ee', '#a3adba', '#343c46')}}}}}"
    + "".join(f".s{i}{{--c:var(--s{i})}}" for i in range(COLORS))
    + f"svg text{{font:{SIZE}px system-ui,sans-serif;fill:var(--faint)}}svg"
    f" text.n{{fill:var(--ink);font-weight:600;"
    "stroke:var(--paper);stroke-width:3;paint-order:stroke}"
    ".g{stroke:var(--rule);fill:none}.l{stroke:var(--c);stroke-width:1.8;fill:none;stroke-linejoin:round}"
    ".r{stroke-dasharray:7 3}.a{fill:var(--c);opacity:.2}.p{fill:var(--c)}"
    ".v{stroke:var(--faint);stroke-dasharray:5"
    " 4;fill:none}.m{stroke:var(--faint);stroke-dasharray:1.5 3;fill:none}"
    ".o{stroke:var(--c);stroke-width:4.5;stroke-linecap:round;opacity:.75;fill:none}.q{stroke-linecap:square}"
    ".w{stroke:var(--ink);stroke-width:1.5;fill:none}"
)


def escape(text) -> str:
    """Text from data as text of a page: no tag, no entity, and no control character, which XML
    forbids.
    """
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(text))
    return html.escape(shown)


def width_of(text: str) -> float:
    """How wide a text of size SIZE is at most, in units: the widths of a wide font, DejaVu Sans."""
    return SIZE * sum(
        0.4 if c in "iljtfrI.,:;'|!()[]- " else 1.0 if c in "mwMW%@" or ord(c) > 767 else 0.68
        for c in text
    )


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
    if most >= 1e4:
        unit, letter = next((u, s) for u, s in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if most >= u)
        return [f"{v / unit:g}{letter}" if v else "0" for v in values]
    decimals = next(
        (d for d in range(6) if all(abs(v - round(v, d)) < 1e-9 * most + 1e-15 for v in values)), 6
    )
    return [f"{v:,.{decimals}f}" for v in values]


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


def _finite(line) -> list:
    return [p for p in line if all(v is not None and math.isfinite(v) for v in p)]


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
        (self.x0, self.x1), (self.y0, self.y1), self.whole = x_range, y_range, whole
        ys = ticks(self.y0, self.y1)
        texts = tick_texts(ys)
        self.left = max(map(width_of, texts), default=0) + 10
        self.right, self.top = WIDTH - 12, 24
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

    def _x_ticks(self):
        for count in (6, 5, 4, 3, 2, 1):
            xs = [x for x in ticks(self.x0, self.x1, count) if x == int(x) or not self.whole]
            texts = tick_texts(xs) if xs else []
            needed = max(map(width_of, texts), default=0) + 10
            gap = (self.px(xs[1]) - self.px(xs[0])) if len(xs) > 1 else math.inf
            if needed <= gap:
                break
        found = list(zip(xs, texts, strict=True))
        # The outermost numbers must not leave the drawing.
        return [
            (x, t)
            for x, t in found
            if self.px(x) + width_of(t) / 2 <= WIDTH and self.px(x) >= width_of(t) / 2
        ]

    def px(self, x: float) -> float:
        return self.left + (x - self.x0) / (self.x1 - self.x0) * (self.right - self.left)

    def py(self, y: float) -> float:
        return self.bottom - (y - self.y0) / (self.y1 - self.y0) * (self.bottom - self.top)

    def place(self, points) -> str:
        return " ".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in points)

    def facts(self) -> tuple:
        return self.x0, self.x1, self.left, self.right, self.y0, self.y1, self.bottom, self.top


def _drawing(
    title: str, out: list[str], below: float, entries: list[tuple[str, str]], facts=()
) -> str:
    """The chart with a legend of (swatch, text) below it, in as many rows as that takes; `facts`
    are the ranges of data and where these lie, for whoever reads numbers off the drawing.
    """
    rows, x, y = [], 2.0, below + SIZE
    for swatch, text in entries:
        text = cut(text, WIDTH - 34)
        wide = 26 + width_of(text) + 10
        if x > 2 and x + wide > WIDTH:
            x, y = 2.0, y + 16
        rows.append(
            f'<g transform="translate({x:.0f} {y:.0f})">{swatch}<text x="26"'
            f' y="0">{escape(text)}</text></g>'
        )
        x += wide
    height = y + 6 if entries else below
    axes = f' data-axes="{" ".join(f"{v:.10g}" for v in facts)}"' if facts else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img"'
        f' aria-label="{escape(title)}"{axes}>{"".join(out + rows)}</svg>'
    )


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    # A range far below the values' size would make noise look like a change.
    pad = max((high - low) * share, (0.01 * max(abs(low), abs(high)) - (high - low)) / 2)
    pad = pad if pad > 0 else 0.01
    return low - pad if low < 0 else max(low - pad, 0.0), high + pad


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
    """
    levels, marks, bands = levels or {}, marks or {}, bands or {}
    series = {
        name: line for name, line in ((n, _finite(line)) for n, line in series.items()) if line
    }
    left_out = len(series) - MAX_LINES
    series = dict(list(series.items())[:MAX_LINES])
    bands = {name: _finite(band) for name, band in bands.items() if name in series}
    if not series:
        return ""
    if frame is None:
        xs = [p[0] for line in series.values() for p in line]
        ys = [p[1] for line in series.values() for p in line] + list(levels.values())
        ys += [v for band in bands.values() for p in band for v in p[1:]]
        low, high = min(xs), max(xs)
        frame = (
            (low, high) if high > low else (low - 0.5, high + 0.5),
            _padded(min(ys), max(ys), 0.05),
        )
    whole = (
        all(float(p[0]).is_integer() for line in series.values() for p in line) and frame[0][1] > 1
    )
    axes, entries, (low, high) = _Axes(*frame, x_label, y_label, whole=whole), [], frame[0]
    out = axes.out
    for i, name in enumerate(series):
        if bands.get(name):
            band = thin(bands[name], most)
            edge = (
                axes.place([p[:2] for p in band])
                + " "
                + axes.place([(p[0], p[2]) for p in reversed(band)])
            )
            if len(band) == 1:
                x, a, b = axes.px(band[0][0]), axes.py(band[0][1]), axes.py(band[0][2])
                out.append(f'<path class="l s{i % COLORS}" d="M{x:.1f} {a:.1f}V{b:.1f}"/>')
            else:
                out.append(f'<polygon class="a s{i % COLORS}" points="{edge}"/>')
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
        entries.append(('<path class="v" d="M0 -4H20"/>', f"{name} {y:.4g}"))
    if diagonal:
        out.append(
            f'<path class="v" d="M{axes.left:.0f} {axes.bottom:.0f}L{axes.right} {axes.top}"/>'
        )
        entries.append(('<path class="v" d="M0 -4H20"/>', diagonal))
    named = []
    for i, (name, line) in enumerate(series.items()):
        color = f"s{i % COLORS}" + " r" * (i >= COLORS)
        shown = thin(line, most)
        if len(shown) > 1:
            out.append(f'<polyline class="l {color}" points="{axes.place(shown)}"/>')
        if len(shown) <= 30:
            dots = "".join(
                f'<circle cx="{axes.px(x):.1f}" cy="{axes.py(y):.1f}" r="2.2"/>' for x, y in shown
            )
            out.append(f'<g class="p {color}">{dots}</g>')
        interval = (
            f" ({bands[name][-1][1]:.4g} to {bands[name][-1][2]:.4g})" if bands.get(name) else ""
        )
        last = f" {line[-1][1]:.4g}{interval}" * values
        named.append((f'<path class="l {color}" d="M0 -4H20"/>', f"{name}{last}"))
    more = [("", f"and {left_out} more")] if left_out > 0 else []
    return _drawing(title, out, axes.below, named + more + entries, axes.facts())


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
        points: (n, 2) numbers.
        groups: (n,) indices into `names`; -1: of no group.
        names: of the groups, for the legend; or, with `labels`, written where each group's median
            lies.
    """
    points, groups = np.asarray(points, float), np.asarray(groups)
    low, high = np.quantile(points, [0.01, 0.99], axis=0)
    frame = [_padded(a, b, 0.06) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    axes, entries, out = _Axes(*frame, x_label, y_label, height=300), [], []
    edges = np.array(frame).T
    placed = np.clip(points, *edges)  # what lies far out is drawn on the edge
    for g in [-1, *range(len(names))]:
        own = placed[groups == g]
        if len(own):
            look = f"o s{g % COLORS if g >= 0 else COLORS - 1}" + " q" * (g // COLORS % 2 == 1)
            spots = "".join(f"M{axes.px(x):.1f} {axes.py(y):.1f}h0" for x, y in own)
            out.append(f'<path class="{look}" d="{spots}"/>')
            if not labels:
                name = f"{names[g]}" if g >= 0 else "no label"
                entries.append((f'<path class="{look}" d="M10 -4h0"/>', f"{name} ({len(own)})"))
    axes.out += out
    if labels:
        present = [g for g in range(len(names)) if (groups == g).any()]
        middles = [np.median(placed[groups == g], axis=0) for g in present]
        anchors = [(axes.px(x), axes.py(y)) for x, y in middles]
        for g, (x, y) in zip(
            present, apart(anchors, [names[g] for g in present], axes), strict=True
        ):
            axes.out.append(
                f'<text class="n" x="{x:.1f}" y="{y + 4:.1f}"'
                f' text-anchor="middle">{escape(names[g])}</text>'
            )
    more = [("", f"and {len(entries) - MAX_GROUPS} more")] if len(entries) > MAX_GROUPS else []
    return _drawing(title, axes.out, axes.below, entries[:MAX_GROUPS] + more, axes.facts())


def apart(
    anchors: list[tuple[float, float]], texts: Sequence[str], axes
) -> list[tuple[float, float]]:
    """Places near the anchors at which no two texts overlap, as far as there is room: the first
    that is free on a spiral around its anchor.
    """
    taken, found = [], []
    for (x, y), text in zip(anchors, texts, strict=True):
        half = width_of(text) / 2 + 2
        for turn in range(600):
            angle, radius = 2.4 * turn, 2.2 * math.sqrt(turn)
            u = min(max(x + radius * math.cos(angle), axes.left + half), axes.right - half)
            v = min(max(y + radius * math.sin(angle), axes.top + 8), axes.bottom - 8)
            if all(abs(u - a) >= half + other or abs(v - b) >= 17 for a, b, other in taken):
                break
        taken.append((u, v, half))
        found.append((u, v))
    return found


def bars(
    title: str,
    rows: list[tuple[str, float, float, float]],
    *,
    label: str,
    levels: dict[str, float] | None = None,
) -> str:
    """Horizontal bars as SVG from 0 to 1: a name, a share and its interval a row; `levels` are
    vertical lines.
    """
    left, right, step = 112.0, WIDTH - 48.0, 22
    out, bottom = [], 8 + step * len(rows)

    def px(value):
        return left + min(max(value, 0.0), 1.0) * (right - left)

    for x in (0, 0.25, 0.5, 0.75, 1):
        out.append(f'<path class="g" d="M{px(x):.1f} 4V{bottom}"/>')
        out.append(f'<text x="{px(x):.1f}" y="{bottom + 14}" text-anchor="middle">{x:g}</text>')
    out.append(
        f'<text x="{(left + right) / 2:.0f}" y="{bottom + 29}"'
        f' text-anchor="middle">{escape(label)}</text>'
    )
    for i, (name, value, low, high) in enumerate(rows):
        y = 8 + step * i
        out.append(
            f'<text x="{left - 6}" y="{y + 14}"'
            f' text-anchor="end">{escape(cut(name, left - 8))}</text>'
        )
        wide, a, b = max(px(value) - left, 0.5), px(low), px(high)
        out.append(
            f'<rect class="p s0" x="{left}" y="{y + 3}" width="{wide:.1f}" height="14"'
            ' opacity=".6"/>'
        )
        out.append(
            f'<path class="w" d="M{a:.1f} {y + 10}H{b:.1f}M{a:.1f} {y + 6}v8M{b:.1f} {y + 6}v8"/>'
        )
        out.append(f'<text x="{right + 6}" y="{y + 14}">{value:.3f}</text>')
    entries = [('<path class="w" d="M0 -4H20M0 -8v8M20 -8v8"/>', "95 % interval")] if rows else []
    for name, value in (levels or {}).items():
        out.append(f'<path class="v" d="M{px(value):.1f} 2V{bottom}"/>')
        entries.append(('<path class="v" d="M10 -11V2"/>', f"{name} {value:.3g}"))
    return _drawing(title, out, bottom + 37, entries)


def standalone(svg: str) -> str:
    """A chart as a file of its own: with the colors, which a page gives once for all of its
    charts.
    """
    head, rest = svg.split(">", 1)
    return f"{head}><style>{STYLE}svg{{background:var(--paper)}}</style>{rest}"
