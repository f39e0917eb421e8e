"""A report as one page of HTML that loads nothing and runs nothing: tables, pictures, and what the runs were.

The page is a tree of elements, so one serializer escapes every text. Tables come out of Markdown by markdown-it with
its HTML off, pictures out of matplotlib; both are read as XML into the same tree.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element, fromstring, tostring

from hf_soo.runs import report, svg
from hf_soo.runs.markdown import element, sound
from hf_soo.runs.record import RunRecord, differing
from hf_soo.runs.stored import flat

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_OPEN_ROWS = 12  # a longer table of settings is folded
_VERSIONS = ("hf-soo", "torch", "transformers")
_STYLE = """
:root{color-scheme:light dark;--line:#d0d7de;--soft:#f6f8fa;--ink:#1f2328;--paper:#fff;--dim:#59636e}
@media(prefers-color-scheme:dark){
:root{--line:#3d444d;--soft:#151b23;--ink:#e6edf3;--paper:#0d1117;--dim:#9198a1}
svg{filter:invert(1) hue-rotate(180deg)}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:80rem;margin:auto;padding:1rem;overflow-wrap:anywhere}
h1{font-size:1.6rem}h2{font-size:1.3rem;margin-top:2.5rem;border-bottom:1px solid var(--line)}h3{font-size:1.05rem}
.wide{overflow-x:auto;max-width:100%;margin:.5rem 0}
table{border-collapse:collapse;font-size:.8125rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{border:1px solid var(--line);padding:.2rem .45rem;text-align:left;vertical-align:top;max-width:26rem}
thead th{background:var(--soft)}
@media(max-width:48rem){table{width:max-content}th,td{max-width:15rem}}
.panels{display:flex;flex-wrap:wrap;gap:1.5rem 1rem}
figure{margin:0;flex:1 1 22rem;min-width:0;max-width:31rem}
figure svg{width:100%;height:auto;display:block}
svg *{stroke-linejoin:round;stroke-linecap:butt}
svg text{font-family:inherit!important}
figcaption{font-size:.875rem;font-weight:600}
details{margin:.5rem 0;font-size:.875rem}summary{cursor:pointer;color:var(--dim)}
.legend{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;font-size:.875rem}
.legend li{display:flex;gap:.4rem}
.legend svg{width:2.2rem;height:1.17rem;margin-top:.1rem;flex:none;stroke-width:.2}
"""


def page(title: str, text: str, figures: Sequence[Any], parts: Mapping[str, Sequence[RunRecord]]) -> str:
    """The page.

    Args:
        title: of the page.
        text: the tables, in Markdown.
        figures: pictures of all runs together.
        parts: runs that can be compared, by title; each part has its curves, its layers' health and its settings.

    Raises:
        ValueError: matplotlib or markdown-it is not installed.
    """
    names = (f"picture{number}" for number in itertools.count(1))
    runs = [run for part in parts.values() for run in part]
    body = [element("h1", title), *_facts(runs), element("h2", "Table"), *_tables(text)]
    if figures:
        body += [element("h2", "Pictures"), *(svg.picture(each, next(names)) for each in figures)]
    for part, own in parts.items():
        body += [element("h2", part or "The runs"), *_part(own, names)]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", _STYLE),
    )
    whole = element("html", head, element("body", element("main", *body)), lang="en")
    return "<!doctype html>\n" + tostring(whole, encoding="unicode", method="html") + "\n"


def _facts(runs: Sequence[RunRecord]) -> list[Element]:
    """How many runs there are, how they ended, and where they ran."""
    if not runs:
        return []
    ends = ", ".join(f"{count} {status}" for status, count in Counter(run.status for run in runs).most_common())
    where = sorted({run.device for run in runs} - {""})
    for name in _VERSIONS:
        used = sorted({str(run.versions[name]) for run in runs if name in run.versions})
        where += [f"{name} {' and '.join(used)}"] if used else []
    return [element("p", f"{_count(runs)}: {ends}. {'; '.join(where)}.")]


def _tables(text: str) -> list[Element]:
    """Markdown as elements; tables scroll in boxes of their own."""
    try:
        from markdown_it import MarkdownIt
    except ImportError as error:
        raise ValueError("The page needs markdown-it-py; pip install 'hf-soo[report]'.") from error
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    reader.disable(["link", "image", "autolink", "reference"])
    found = list(fromstring(f"<div>{reader.render(sound(text))}</div>"))
    return [_scrolling(each, "Table") if each.tag == "table" else each for each in found]


def _scrolling(table: Element, caption: str) -> Element:
    return element("div", table, class_="wide", tabindex="0", role="region", aria_label=caption)


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Element:
    """Texts as a table; a row's first cell is its name."""
    top = element("thead", element("tr", *(element("th", cell, scope="col") for cell in head)))
    lines = []
    for name, *cells in rows:
        lines.append(element("tr", element("th", name, scope="row"), *(element("td", cell) for cell in cells)))
    return _scrolling(element("table", top, element("tbody", *lines)), caption)


def _part(runs: Sequence[RunRecord], names: Iterator[str]) -> Iterator[Element]:
    """Curves, the health of the layers, the routing and the settings of runs that can be compared."""
    seeds = Counter(run.seed for run in runs)
    seed = max(seeds, key=lambda each: (seeds[each], -each))  # the best of several seeds would be the luckiest
    drawn = [run for run in runs if run.seed == seed]
    figures = {
        title: report.figure(drawn, free=None, loss=key)
        for key, title in (("eval_loss", "Evaluation loss"), ("train_loss", "Training loss"))
        if any(point[key] is not None for run in drawn for point in run.curve)
    }
    if health := report.health_figure(drawn, free=None):
        figures["Health of the layers"] = health
    which = "the best run of each method" + (f" with seed {seed}" if len(seeds) > 1 else "")
    for title, figure in figures.items():
        yield svg.picture(figure, next(names), f"{title}: {which}")
    yield from _health(runs)
    yield from _routing(runs)
    yield from _settings(runs)


def _health(runs: Sequence[RunRecord]) -> Iterator[Element]:
    keys = list(dict.fromkeys(key for run in runs for key in run.health))
    rows = [[run.name, *(_number(run.health.get(key)) for key in keys)] for run in runs if run.health]
    if rows:
        yield element("h3", "Health of the layers at the end")
        yield _table("Health of the layers", ["run", *(report.HEALTH.get(key, key) for key in keys)], rows)


def _routing(runs: Sequence[RunRecord]) -> Iterator[Element]:
    """Which rule moved which parameters, once for all runs in which it is the same."""
    alike: dict[str, list[str]] = {}
    for run in runs:
        alike.setdefault(json.dumps(run.routing), []).append(run.name)
    yield element("h3", "Routing: which rule moves which parameters")
    for routing, names in alike.items():
        rows = [[rule, said["parameters"], ", ".join(said["first"])] for rule, said in json.loads(routing).items()]
        who = "All runs" if len(names) == len(runs) else ", ".join(names)
        yield element("p", who, ":" if rows else ": not recorded.")
        if rows:
            yield _table("Routing", ["rule", "parameters", "the first of them"], rows)


def _settings(runs: Sequence[RunRecord]) -> Iterator[Element]:
    """What differs between the runs, beside how each ended, and what does not."""
    about = (
        {"device": run.device, "versions": run.versions, "commit": (run.commit or "")[:12], "code": run.code}
        for run in runs
    )
    settings = [dict(flat(run.settings | more)) for run, more in zip(runs, about, strict=True)]
    keys = differing(*settings)
    head = ["run", "status", "steps", "seconds", *keys]
    rows = [
        [run.name, run.status, run.steps, f"{run.seconds:.0f}", *(own.get(key, "") for key in keys)]
        for run, own in zip(runs, settings, strict=True)
    ]
    title = f"{_count(runs)}, and the settings that differ" if keys else _count(runs)
    opened = {"open": ""} if len(runs) <= _OPEN_ROWS else {}
    yield element("h3", "Settings")
    yield element("details", element("summary", title), _table(title, head, rows), **opened)
    shared = [[key, value] for key, value in sorted(settings[0].items()) if key not in keys]
    title = f"{len(shared)} settings that are the same"
    yield element("details", element("summary", title), _table(title, ["setting", "value"], shared))


def _count(runs: Sequence[RunRecord]) -> str:
    return f"{len(runs)} run{'s' * (len(runs) != 1)}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
