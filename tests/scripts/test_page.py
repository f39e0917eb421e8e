"""The page of a report: what stands in it, and that no text of a run is ever more than text."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import tostring

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_soo import cli
from hf_soo.runs import report, svg
from hf_soo.runs.markdown import element, label, plain, sound
from hf_soo.runs.page import page
from hf_soo.runs.record import RunRecord
from tests.scripts.test_glue_table import record
from tests.scripts.test_report import run, runs
from tests.search.trials import chosen, confirmed

pytest.importorskip("matplotlib")
pytest.importorskip("markdown_it")

HOSTILE = (
    "</script></style></svg><img src=x onerror=alert(1)>\"'&amp;$\\alpha_$ \x01\ud800|`a` [b](http://c.d) <!-- &#1; ]]>"
)
HEALTH = {"cos_median": 0.7, "cos_min": 0.2, "distance_median": 1.5, "noise_layers": 1.0}


class Read(HTMLParser):
    """A page as a browser splits it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.parts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def of(self, key: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == key]

    def check(self) -> None:
        """Nothing runs, nothing is loaded, names are used once, and each picture has a text."""
        assert not set(self.tags) & {
            "script",
            "img",
            "a",
            "iframe",
            "object",
            "link",
            "base",
            "form",
            "image",
            "foreignobject",
        }
        assert not [key for _, key, _ in self.attributes if key.startswith("on") or key in ("src", "action", "srcdoc")]
        assert all(value.startswith("#") for value in self.of("href") + self.of("xlink:href"))
        assert all(
            place.startswith("#") for _, _, value in self.attributes for place in re.findall(r"url\((.*?)\)", value)
        )
        names = self.of("id")
        assert len(names) == len(set(names)) and {value[1:] for value in self.of("href")} <= set(names)
        pictures = self.of("role").count("img")
        assert pictures + self.of("aria-hidden").count("true") == self.tags["svg"] and self.tags["figure"] == pictures
        assert self.of("content")[0].startswith("default-src 'none'; style-src 'unsafe-inline'; ")
        assert self.tags["html"] == self.tags["body"] == self.tags["style"] == self.tags["title"] == 1


def made(*arguments: Any) -> Read:
    read = Read(page(*arguments))
    read.check()
    return read


def with_health() -> list[RunRecord]:
    found = runs()
    for each in found:
        for point in each.curve:
            point["train_loss"] = 9.0
        if each.optimizer == "mkor":
            each.curve[1]["health"] = each.health = HEALTH
            each.curve[2]["health"] = HEALTH | {"cos_min": 0.25}
            each.routing = {"mkor -> Lamb": {"parameters": 12, "first": ["a.weight"]}}
    return found


def test_a_page_has_curves_table_health_routing_and_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for each in with_health():
        each.write(tmp_path / "wiki")
    assert cli.main(["report", str(tmp_path / "wiki"), "--html", str(tmp_path / "new" / "r.html")]) == 0
    assert capsys.readouterr().out == report.table(with_health())
    text = (tmp_path / "new" / "r.html").read_text(encoding="utf-8")
    read = Read(text)
    read.check()
    assert read.text.startswith("\nReport of wiki") and "5 runs: 4 completed, 1 diverged." in read.text
    pictures = [text for text in read.of("aria-label") if " against optimizer steps. " in text]
    assert [text.partition(" against optimizer")[0] for text in pictures] == [
        "evaluation loss", "training loss", "cos(G, P), median over layers", "cos(G, P), lowest of all layers",
        "|F - I|, median over layers", "layers with a side of noise",
    ]  # fmt: skip
    assert (
        "lamb, lr 0.01: 7.000; 3 points, first 10 at 0, last 7 at 100, lowest 7 at 100, highest 10 at 0." in pictures[0]
    )
    assert "mkor over lamb, lr 0.02; 2 points, first 0.2 at 50, last 0.25 at 100, lowest" in pictures[3]
    assert "lamb, lr 0.01; 3 points" in pictures[1], "the legend's loss is of an evaluation, the curve of training"
    assert "evaluation loss against seconds of training. mkor over lamb, lr 0.02: 6.000; 3 points" in text
    assert (
        "<td>mkor -&gt; Lamb</td>" not in text
        and '<th scope="row">mkor -&gt; Lamb</th><td>12</td><td>a.weight</td>' in text
    )
    assert "lamb-lamb-0.01, muon-muon-0.02: not recorded." in read.text
    assert "<tr>" + "".join(f'<th scope="col">{key}</th>' for key in (
        "run", "status", "steps", "seconds", "base", "learning_rate", "optim_args.rest_lr", "optimizer",
    )) in text  # fmt: skip
    assert '<th scope="row">max_steps</th><td>100</td>' in text
    assert cli.main(["report", str(tmp_path / "wiki"), "--html", str(tmp_path / "a.html"), "--title", "A <title>"]) == 0
    again = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert again.replace("A &lt;title&gt;", "Report of wiki") == text, "the same runs, the same page"


def test_of_several_seeds_one_is_drawn() -> None:
    """The one that most runs have, not the luckiest."""
    found = [
        run("lamb", "lamb", 0.1, [3.0, 2.0]),
        run("mkor", "lamb", 0.1, [3.0, 1.0]),
        run("mkor", "lamb", 0.1, [3.0, 0.5]),
    ]
    found[2].seed = 1
    read = made("", "", [], {"A task": found})
    assert "Evaluation loss: the best run of each method with seed 0" in read.text
    spoken = next(text for text in read.of("aria-label") if "against optimizer steps" in text)
    assert "mkor over lamb, lr 0.1: 1.000; 2 points" in spoken and "0.500" not in spoken
    assert "All runs: not recorded." in read.text and "3 runs, and the settings that differ" in read.text


def test_a_page_that_cannot_be_written_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for each in runs():
        each.write(tmp_path)
    assert cli.main(["report", str(tmp_path), "--html", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"hf-soo: error: --html='{tmp_path}' is a folder; give the name of a file, such as '{tmp_path}/report'.\n"
    )


def stored(folder: Path, found: list[RunRecord]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, each in enumerate(found):
        (folder / f"{number}.json").write_text(json.dumps(asdict(each)))


def hostile(text: str, optimizer: str = "lamb") -> RunRecord:
    """A run of which every string, key or value, is one text."""
    odd = {text: text, "betas": [text]}
    found = run(optimizer, text, 0.1, [3.0, 2.0], config={"optim_args": odd, "precondition_exclude": [text], text: odd})
    found.name, found.device, found.commit, found.code, found.versions = text, text, text, text, {"torch": text}
    found.health = found.curve[1]["health"] = {text: 1.0}
    found.final |= {text: 0.5}
    found.routing = {text: {"parameters": 1, "first": [text]}}
    return found


def folder_of_runs(text: str, folder: Path) -> None:
    stored(folder, [hostile(text), hostile(text, text)])
    (folder / "bad.json").write_text(json.dumps(asdict(hostile(text)) | {"status": text}))


def folder_of_glue(text: str, folder: Path) -> None:
    odd = {"model": {"name": text}, "optim_args": {text: text}}
    stored(folder, [record("rte", {"accuracy": 0.5 + seed / 10}, text, seed, **odd) for seed in (0, 1)])


def folder_of_search(text: str, folder: Path) -> None:
    more: dict[str, Any] = {"search": {"study": text, "space": text}, "config": {text: text}, "device": text}
    stored(folder, [*chosen("muon", {0.01: 2.0, 0.02: 1.9}, **more), *confirmed("muon", [1.9, 1.8], **more)])


def folder_of_bench(text: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    row = {"optimizer": text, "base": "lamb", "set": {text: text}, "step_ratio": 1.0, "train_step_ratio": 1.1}
    about = {"kind": "bench", "preset": text, "parameters": 1, "device": text, "rows": [row]}
    reference = {"adamw_foreach_seconds": 0.2, "adamw_fused_ratio": 0.5}
    for name, more in (("a", {}), ("b", {"curve": {"over": "width", "at": 2}})):
        (folder / f"{name}.json").write_text(json.dumps(about | {"reference": reference} | more))


def folder_of_reproduction(text: str, folder: Path) -> None:
    for part in ("phase1", "phase2", "squad"):
        stored(folder / part, [hostile(text)])


FOLDERS = {"runs": folder_of_runs, "glue": folder_of_glue, "search": folder_of_search, "bench": folder_of_bench,
           "reproduction": folder_of_reproduction}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("kind", FOLDERS)
def test_no_text_of_a_run_is_markup(tmp_path: Path, kind: str) -> None:
    pages = []
    for number, text in enumerate((HOSTILE, "harmless")):
        FOLDERS[kind](text, tmp_path / str(number))
        file = tmp_path / f"{number}.html"
        assert cli.main(["report", str(tmp_path / str(number)), "--html", str(file), "--title", text]) == 0
        pages.append(Read(file.read_text(encoding="utf-8")))
        pages[-1].check()
    attacked, usual = pages
    assert attacked.tags == usual.tags, "the same elements, whatever the texts are"
    shown = HOSTILE.replace("\x01", "\ufffd").replace("\ud800", "\ufffd")
    assert " ".join(attacked.text.split()).count(" ".join(shown.split())) >= 3
    assert {key for _, key, _ in attacked.attributes} == {key for _, key, _ in usual.attributes}


TEXTS = st.text(
    alphabet=st.sampled_from("ab\\|<>&;*_`[]($)\n\r #!~{}.\x00\x0b\ud800\ufffe\"'/=-"), max_size=20
) | st.text(max_size=20)


@settings(deadline=None)
@given(TEXTS)
def test_any_text_is_text(text: str) -> None:
    """In tables out of Markdown, in those of settings, in headings and in attributes."""
    odd = hostile(f"a{text}b")
    odd.curve = []
    usual = hostile("ab")
    usual.curve = []
    read = made(text, f"| {plain(text)} |\n|---|\n| {plain(text)} |\n", [], {f"c{text}": [odd]})
    assert read.tags == made("", "| a |\n|---|\n| a |\n", [], {"c": [usual]}).tags


def drawn(text: str) -> Read:
    """A picture whose legend, ticks and title have a text."""
    figure = report.figure_of(2, 2)
    axis = figure.subplots()
    axis.plot([0, 1], [1, 2], label=label(f"a{text}"))
    axis.set_xticks([0, 1], [label(f"b{text}"), "c"])
    return Read(
        tostring(svg.picture(report.with_legend(figure, 1, f"d{text}"), "p"), encoding="unicode", method="html")
    )


@pytest.mark.filterwarnings("ignore:Glyph")
@settings(deadline=None, max_examples=20)
@given(TEXTS)
def test_any_text_is_text_in_a_picture(text: str) -> None:
    """Neither XML nor mathematics."""
    found, usual = drawn(text), drawn("")
    assert found.tags == usual.tags
    said = {start: " ".join(sound(start + text).split()) for start in "abd"}
    parts = [" ".join(part.split()) for part in found.parts]
    assert parts.count(said["a"]) == 1 and parts.count(said["b"]) == 1 and parts.count(said["d"]) == 1
    assert f" {said['a']}; {said['b']} 1, c 2." in found.of("aria-label")[0]


def test_elements_keep_texts_in_their_places() -> None:
    found = element("p", "a", element("b", "c"), "d", 1, class_="x", aria_label="<")
    assert (found.text, found[0].text, found[0].tail, found.attrib) == (
        "a",
        "c",
        "d1",
        {"class": "x", "aria-label": "<"},
    )


def test_panels_of_one_row_say_what_they_measure() -> None:
    shown = svg.picture(report.figure(runs(), "Title"), "p", "another title")
    assert shown.find("h3").text == "Title"  # type: ignore[union-attr]
    captions = [each.text for each in shown.iter("figcaption")]
    assert captions == ["evaluation loss against optimizer steps", "evaluation loss against seconds of training"]
    legend = [("".join(each.itertext())).strip() for each in shown.iter("li")][:3]
    assert legend == ["mkor over lamb, lr 0.02: 6.000", "lamb, lr 0.01: 7.000", "muon, lr 0.02, rest_lr 0.001: 8.000"]
    ticks = [
        {"".join(each.itertext()) for each in panel.iter("text")} for panel in shown.iter("svg") if panel.get("role")
    ]
    assert ticks[0] & ticks[1] >= {"6.0", "7.0", "8.0", "9.0"}, "both panels have the ticks of the axis that they share"
