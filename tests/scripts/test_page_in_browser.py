"""Pages of the committed results in headless Chromium: no error, no request, nothing overflows, texts for pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_soo import cli
from tests.scripts.browser import Browser, browser, found
from tests.scripts.test_page import FOLDERS, HOSTILE

pytest.importorskip("matplotlib")
if found() is None:
    pytest.skip("no Chromium on the PATH or in HF_SOO_BROWSER", allow_module_level=True)

RESULTS = Path(__file__).resolve().parents[2] / "results"
PAGES = ("reproduce_mini", "bert_mini_wiki", "evidence/byte_gpt", "bench", "glue_minilm")
# Everything unfolded; what is wider than the page and in no box that scrolls; what a reader of the screen cannot tell.
LOOK = """(() => {
  const all = (selector, of = document) => [...of.querySelectorAll(selector)];
  const box = each => each.getBoundingClientRect();
  const letters = each => all("text", each).map(box).filter(own => own.width);
  const beyond = (own, left, right, more) => own.left < left - more || own.right > right + more;
  all("details").forEach(each => each.open = true);
  const scrolls = each => each.parentElement.closest(".wide");
  const pictures = all("svg[role=img]");
  const said = each => each.getAttribute("aria-label");
  return {
    scroll: document.documentElement.scrollWidth,
    width: window.innerWidth,
    wide: all("body *").filter(each => !scrolls(each) && !each.closest("svg") && beyond(box(each), 0, innerWidth, 1))
      .map(each => each.tagName + " " + each.textContent.slice(0, 60)),
    cut: pictures.filter(each => letters(each).some(own => beyond(own, box(each).left, box(each).right, 4))).map(said),
    pictures: pictures.length,
    silent: pictures.filter(each => !/[0-9]/.test(said(each))).map(said),
    tables: all(".wide > table").length,
    loose: all("table").length - all(".wide > table").length,
    foreign: all("script, img, iframe, object, link").length,
    paper: getComputedStyle(document.body).backgroundColor,
  };
})()"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as started:
        yield started


def check(browser: Browser, file: Path, width: int) -> dict[str, Any]:
    browser.open(file, width)
    look: dict[str, Any] = browser.value(LOOK)
    assert browser.happened("Log.entryAdded") == browser.happened("Runtime.exceptionThrown") == []
    requests = browser.happened("Network.requestWillBeSent")
    assert [each["request"]["url"] for each in requests] == [file.resolve().as_uri()]
    assert look["wide"] == look["cut"] == [] and look["scroll"] <= look["width"] == width
    assert look["pictures"] > 0 and look["silent"] == [] and look["foreign"] == 0
    assert look["tables"] > 0 and look["loose"] == 0
    return look


@pytest.mark.parametrize("name", PAGES)
def test_a_page_of_results(shown: Browser, tmp_path: Path, name: str) -> None:
    file = tmp_path / "page.html"
    assert cli.main(["report", str(RESULTS / name), "--html", str(file)]) == 0
    wide, narrow = (check(shown, file, width) for width in (1280, 390))
    assert wide["pictures"] == narrow["pictures"]
    shown.open(file, 1280, dark=True)
    assert (wide["paper"], shown.value(LOOK)["paper"]) == ("rgb(255, 255, 255)", "rgb(13, 17, 23)")


@pytest.mark.filterwarnings("ignore:Glyph")
def test_a_hostile_page(shown: Browser, tmp_path: Path) -> None:
    FOLDERS["runs"](HOSTILE, tmp_path / "runs")
    file = tmp_path / "page.html"
    assert cli.main(["report", str(tmp_path / "runs"), "--html", str(file), "--title", HOSTILE]) == 0
    for width in (1280, 390):
        check(shown, file, width)
    assert shown.value("document.title").startswith("</script></style></svg><img src=x onerror=alert(1)>")
