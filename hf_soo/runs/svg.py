"""A figure of matplotlib as part of a page: each panel an SVG, what it shows in numbers, and the legend.

Panels are cut apart, so that a page lays them out by its width, and letters stay letters, in the page's font.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from io import StringIO
from typing import Any
from xml.etree.ElementTree import Element, fromstring

from hf_soo.runs.markdown import element, label, unlabelled

_WIDTH, _HEIGHT = 4.8, 3.4  # of a panel, in inches: a phone shows its letters


def picture(drawn: Any, name: str, title: str = "") -> Element:
    """The elements of a figure.

    Args:
        drawn: of matplotlib; it is taken apart.
        name: of the picture in its page: what all names inside begin with.
        title: above it; that of the figure where it has one.
    """
    legend = [entry for each in drawn.legends for entry in zip(each.legend_handles, each.get_texts(), strict=True)]
    heading = unlabelled(drawn.get_suptitle()) or title
    for each in list(drawn.legends):
        each.remove()
    drawn.suptitle("")
    drawn.set_layout_engine("none")  # each panel is cut to what it shows
    shown = [axes for axes in drawn.axes if axes.get_visible() and axes.axison]
    grid = shown[0].get_gridspec()
    drawn.set_size_inches(_WIDTH * grid.ncols, _HEIGHT * grid.nrows)
    panels, measured = [], ""
    for number, axes in enumerate(shown):
        measured = unlabelled(axes.get_ylabel()) or measured  # said once in a row of panels
        panels.append(_panel(drawn, axes, f"{name}-{number}", measured))
    entries = (element("li", _swatch(handle), " ", unlabelled(text.get_text())) for handle, text in legend)
    above = [element("h3", heading)] if heading else []
    above += [element("ul", *entries, class_="legend")] if legend else []
    return element("section", *above, element("div", *panels, class_="panels"))


def _panel(drawn: Any, axes: Any, name: str, measured: str) -> Element:
    caption = unlabelled(axes.get_title()) or " against ".join(filter(None, (measured, unlabelled(axes.get_xlabel()))))
    axes.set_title("")
    axes.set_ylabel(label(measured))
    axes.tick_params(labelleft=True)  # panels of one row may share those of the first
    for other in drawn.axes:
        other.set_visible(other is axes)
    numbers = list(_numbers(axes)) or ["Nothing was measured."]
    svg = _svg(drawn, name)
    svg.attrib |= element("svg", role="img", aria_label=f"{caption}. {' '.join(numbers)}").attrib
    listed = element("ul", *(element("li", each) for each in numbers))
    told = element("details", element("summary", "In numbers"), listed)
    return element("figure", element("figcaption", caption), svg, told)


def _svg(drawn: Any, name: str) -> Element:
    """What is visible of a figure; none of its names is used twice in a page, and nothing in it is a style sheet."""
    from matplotlib import rc_context

    text = StringIO()
    # the same picture has the same names, and the page says the font
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.sans-serif": ["DejaVu Sans"]}):
        drawn.savefig(text, format="svg", bbox_inches="tight", transparent=True)
    svg = fromstring(text.getvalue())
    for each in list(svg.iter()):
        each.tag = each.tag.rpartition("}")[2]
        each.attrib = {key.rpartition("}")[2]: _own(key, value, name) for key, value in each.attrib.items()}
        for child in list(each):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                each.remove(child)
    del svg.attrib["width"], svg.attrib["height"]
    return svg


def _own(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    return re.sub(r"^#|(?<=url\()#", f"#{name}-", value) if key.endswith(("href", "clip-path", "style")) else value


def _numbers(axes: Any) -> Iterator[str]:
    """What the lines of a panel show."""
    from matplotlib.ticker import FixedLocator

    named = isinstance(axes.xaxis.get_major_locator(), FixedLocator)
    texts = (unlabelled(text.get_text()) for text in axes.get_xticklabels())
    ticks = list(zip(axes.get_xticks(), texts, strict=True))
    for line in axes.get_lines():
        pairs = [(float(x), float(y)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]
        points = [point for point in pairs if all(map(math.isfinite, point))]
        if not points or re.fullmatch(r"_child\d+", str(line.get_label())):
            continue
        said = _each(points, ticks) if named else _course(points)
        yield f"{unlabelled(line.get_label())}; {said}."


def _each(points: Sequence[tuple[float, float]], ticks: Sequence[tuple[float, str]]) -> str:
    """Every point, by the name of the tick that it stands at."""
    near = (min(ticks, key=lambda tick: abs(tick[0] - x))[1] for x, _ in points)
    return ", ".join(f"{name} {y:.4g}" for name, (_, y) in zip(near, points, strict=True))


def _course(points: Sequence[tuple[float, float]]) -> str:
    """Where a line begins and ends, and its lowest and highest point."""
    low, high = (choose(points, key=lambda point: point[1]) for choose in (min, max))
    told = {"first": points[0], "last": points[-1], "lowest": low, "highest": high}
    count = f"{len(points)} point{'s' * (len(points) != 1)}"
    return f"{count}, " + ", ".join(f"{what} {y:.4g} at {x:.4g}" for what, (x, y) in told.items())


def _swatch(handle: Any) -> Element:
    """A line of a legend: its colour, its dashes and its marker."""
    from matplotlib.colors import to_hex
    from matplotlib.markers import MarkerStyle

    marker = MarkerStyle(handle.get_marker())
    outline: Any = marker.get_path().transformed(marker.get_transform()).to_polygons(closed_only=False)
    shapes = [" ".join(f"{x:.2f},{-y:.2f}" for x, y in polygon) for polygon in outline]
    drawn = [element("polyline", points=points) for points in shapes]
    if handle.get_linestyle() in ("-", "--"):
        dashes = {"-": "none", "--": ".5 .3"}[handle.get_linestyle()]
        drawn.insert(0, element("polyline", points="-1.5,0 1.5,0", stroke_dasharray=dashes))
    colours = {"stroke": to_hex(handle.get_color()), "fill": to_hex(handle.get_markerfacecolor())}
    return element("svg", *drawn, viewBox="-1.5 -.8 3 1.6", aria_hidden="true", **colours)
