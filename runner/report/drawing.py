"""Matplotlib figures as SVG for a page and as PDF for a paper, with reproducible bytes.

Figures are drawn in the colors named here. In the SVG, each color becomes a class, so that the
page's style sheet can set it for light, dark and print. All `style` attributes are removed, because
the page's Content-Security-Policy allows none.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from runner.report.labels import hide_paths
from runner.text import clean, cut

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK: Final = "#1c2128"
MUTED: Final = "#6a737d"
RULE: Final = "#d5d9de"
BAND: Final = "#e6e9ed"
GREYED: Final = "#a3abb5"
PAPER: Final = "#ffffff"
# Okabe and Ito's colors for color-blind readers, without their yellow, which is faint on white
PALETTE: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6a3f")
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")
LINES: Final = ("-", "--", "-.", ":")

# Color -> its class in the style sheet, after the prefix `f-` (fill) or `s-` (stroke)
_CLASSES: Final[Mapping[str, str]] = {
    INK: "ink",
    "#000000": "ink",
    MUTED: "muted",
    RULE: "rule",
    BAND: "band",
    GREYED: "greyed",
    PAPER: "paper",
    **{color: f"c{number}" for number, color in enumerate(PALETTE)},
}
_MAX_LABEL: Final = 60
_SETTINGS: Final[Mapping[str, Any]] = {
    "svg.fonttype": "none",  # text stays text: smaller, and searchable in the page
    "pdf.fonttype": 42,
    "text.parse_math": False,  # a `$` in a name is a dollar sign
    "path.simplify": False,  # would drop dots, which are lines of length 0
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.3,
}


@dataclass(frozen=True, eq=False)
class Drawing:
    """One figure of a page, with its texts."""

    name: str  # of its PDF, without the suffix
    title: str
    alternative: str  # text for readers who cannot see the figure
    caption: str
    figure: Figure

    @property
    def is_small(self) -> bool:
        """True if it has only one panel, which would be huge at full width."""
        return bool(self.figure.get_figwidth() < 6)

    def as_svg(self) -> str:
        """The figure as an inline element of a page, with its colors as classes."""
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        content = self._print(FigureCanvasSVG(self.figure).print_svg, nothing)
        return _adapt_to_page(content.decode(), self.title, self.alternative)

    def as_pdf(self) -> bytes:
        """The figure as PDF, for a paper."""
        nothing = {
            "CreationDate": None,
            "Creator": None,
            "Producer": None,
            "Title": label(self.title),
        }
        from matplotlib.backends.backend_pdf import FigureCanvasPdf

        return self._print(FigureCanvasPdf(self.figure).print_pdf, nothing)

    def _print(self, print_figure: Callable[..., Any], metadata: Mapping[str, Any]) -> bytes:
        """The output of a canvas; `savefig` would draw everything twice."""
        stream = io.BytesIO()
        with _settings(self.name):
            print_figure(stream, metadata=metadata)
        self.figure.set_layout_engine("none")  # another layout pass would shift everything slightly
        return stream.getvalue()


@contextmanager
def drawing_figure(width: float, height: float) -> Iterator[Figure]:
    """Yield a new figure of this size in inches, within the common settings of all figures."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with _settings(""):
        layout: Any = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.05, wspace=0.03, hspace=0.04)
        yield Figure(figsize=(width, height), dpi=72, layout=layout)  # the dpi of SVG and PDF


def label(text: str, width: int = _MAX_LABEL) -> str:
    """A text from data for a figure: one line, no controls, no folders, cut to `width`.

    >>> label("a\\x1b[2Jb"), len(label("x" * 1_000_000))
    ('a�[2Jb', 60)
    """
    return cut(clean(hide_paths(text[: 8 * width])), width)


def draw_dots(axes: Any, xs: Any, ys: Any, *, color: str, size: float = 3.2) -> None:
    """Draw dots as one path: an element for each would add hundreds of kilobytes to a page."""
    import numpy as np
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    points = np.repeat(np.column_stack([xs, ys]), 2, axis=0)
    if len(points) == 0:
        return
    codes = np.tile([Path.MOVETO, Path.LINETO], len(points) // 2)
    axes.add_patch(
        PathPatch(
            Path(points, codes), fill=False, edgecolor=color, linewidth=size, capstyle="round"
        )
    )


@contextmanager
def _settings(salt: str) -> Iterator[None]:
    import matplotlib

    settings = {**matplotlib.rcParamsDefault, **_SETTINGS, "svg.hashsalt": f"report {salt}"}
    settings.pop("backend")
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


_STYLE = re.compile(r' style="([^"]*)"')
_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_GROUP_ID = re.compile(r'<g id="[^"]*"')
_KEPT: Final = frozenset(
    {
        "fill-opacity",
        "font-size",
        "font-style",
        "font-weight",
        "opacity",
        "stroke-dasharray",
        "stroke-dashoffset",
        "stroke-linecap",
        "stroke-opacity",
        "stroke-width",
        "text-anchor",
    }
)


def _adapt_to_page(svg: str, title: str, alternative: str) -> str:
    from markupsafe import escape

    body = svg[svg.index("<svg ") :]
    size = re.search(r'viewBox="([^"]*)"', body)
    assert size is not None
    body = body[body.index(">") + 1 : body.rindex("</svg>")]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = _STYLE.sub(_move_style, body)
    parts = []
    for at, part in enumerate(re.split(r"(<text[^>]*>[^<]*</text>)", body)):
        if at % 2 == 0:  # outside of texts, which are not changed
            part = _NUMBER.sub(_round, _GROUP_ID.sub("<g", part))
            part = re.sub(r"\s*\n\s*", " ", part)
        else:
            opening, rest = part.split(">", 1)
            opening = re.sub(r' transform="rotate\(-0 [^"]*"', "", opening)
            part = f"{_NUMBER.sub(_round, opening)}>{rest}"
        parts.append(part)
    width = float(size[1].split()[2])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' viewBox="{size[1]}" width="{width * 4 / 3:.0f}" role="img"'
        f' aria-label="{escape(label(f"{title}. {alternative}", 1_000))}">{"".join(parts)}</svg>'
    )


def _move_style(match: re.Match[str]) -> str:
    """Replace a `style` attribute by a class and separate attributes."""
    classes, attributes = [], []
    for declaration in match[1].split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name in ("fill", "stroke"):
            if value == "none":
                attributes.append(f'{name}="none"')
            else:
                known = _CLASSES.get(value)
                classes += [f"{name[0]}-{known}"] if known else []
                attributes += [] if known else [f'{name}="{value}"']
        elif name in _KEPT:
            attributes.append(f'{name}="{value}"')
    listed = [f'class="{" ".join(classes)}"'] if classes else []
    return "".join(f" {one}" for one in [*listed, *attributes])


def _round(match: re.Match[str]) -> str:
    """Round to a hundredth of a point, which is finer than a screen shows.

    >>> _round(re.match(".*", "-12.3456"))
    '-12.35'
    """
    return f"{float(match[0]):.2f}".rstrip("0").rstrip(".")
