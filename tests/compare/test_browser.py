"""The report in headless Chromium: nothing on the console, nothing fetched, tables that sort, plots that can be read.

Needs Playwright (`pip install 'tunesmith[browser]'`) and a Chromium: Playwright's own, or the system's.
"""

from __future__ import annotations

import re

import pytest
from tests.browser import chromium
from tests.compare.shown import HOSTILE, TEXT, write_all

SMALLEST = 9  # pixels of the letters that a person can read


@pytest.fixture(scope="module")
def browser():
    yield from chromium()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report whose names and answers are hostile."""
    folder = tmp_path_factory.mktemp("report")
    write_all(folder, TEXT.replace("name: full", 'name: "<img src=//x.test/y>"'), HOSTILE)
    return folder / "report.html"


@pytest.fixture(params=[(1280, "light"), (400, "light"), (400, "dark")], ids=lambda one: f"{one[0]} {one[1]}")
def page(request, browser, report):
    """The report, opened from disk; what it said and asked for is held against nothing at all."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(report.as_uri())
    yield tab
    assert said == [] and asked == [report.as_uri()]
    context.close()


def column(page, title: str) -> list[str]:
    """The texts of a column of the main table, from top to bottom."""
    heads = page.locator("table.sortable th").all_inner_texts()
    at = next(i for i, head in enumerate(heads) if re.sub(r"\W+$", "", head) == title)
    return page.locator(f"table.sortable tbody td:nth-child({at + 1})").all_inner_texts()


def press(page, title: str) -> None:
    page.locator("table.sortable th button", has_text=re.compile(f"^{re.escape(title)}$")).click()


def test_nothing_is_said_asked_for_or_run(page):
    for summary in page.locator("summary").all():
        summary.click()
    assert page.locator("img").count() == 0
    assert "<img src=//x.test/y>" in page.inner_text("body") and "alert(1)" in page.inner_text("body")


def test_what_is_not_ours_cannot_run(page, report):
    """The policy is what stops it: with a handler planted into the page, nothing runs and Chromium says why."""
    planted = report.with_name("planted.html")
    text = report.read_text(encoding="utf-8")
    planted.write_text(text.replace("<h1>", "<script>document.title = 'run'</script><h1>"), encoding="utf-8")
    other = page.context.new_page()
    said = []
    other.on("console", lambda message: said.append(message.text))
    other.goto(planted.as_uri())
    assert other.title() != "run" and any("Content Security Policy" in line for line in said)


def test_tables_sort_by_any_head(page):
    numbers = [int(text.replace(",", "")) for text in column(page, "parameters") if text != "-"]
    press(page, "parameters")
    assert [int(t.replace(",", "")) for t in column(page, "parameters")[:-1]] == sorted(numbers)
    assert column(page, "parameters")[-1] == "-"  # what has no value comes last, either way
    press(page, "parameters")
    assert [int(t.replace(",", "")) for t in column(page, "parameters")[:-1]] == sorted(numbers, reverse=True)
    assert page.locator("th[aria-sort=descending]").count() == 1
    press(page, "method")
    assert column(page, "method") == sorted(column(page, "method"), key=str.casefold)
    page.keyboard.press("Enter")  # the head keeps the focus
    assert page.locator("th[aria-sort=descending]").count() == 1


def test_the_page_is_as_wide_as_the_screen(page):
    wide, screen = page.evaluate("[document.scrollingElement.scrollWidth, innerWidth]")
    assert wide <= screen
    cut = page.evaluate(
        """[...document.querySelectorAll("h1, h2, li, p, pre, figure, svg")]
           .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5).length"""
    )
    assert cut == 0


def test_plots_can_be_read(page):
    drawn = page.evaluate(
        """[...document.querySelectorAll("svg")].map(svg => ({
             box: svg.getBoundingClientRect().toJSON(),
             texts: [...svg.querySelectorAll("text")].map(t => ({
               text: t.textContent, name: t.getAttribute("class"), size: parseFloat(getComputedStyle(t).fontSize) *
                 svg.getBoundingClientRect().width / svg.viewBox.baseVal.width,
               box: t.getBoundingClientRect().toJSON()}))}))"""
    )
    assert len(drawn) == 10
    for plot in drawn:
        frame, texts = plot["box"], plot["texts"]
        assert frame["width"] >= 300 and min(text["size"] for text in texts) >= SMALLEST
        for text in texts:
            box = text["box"]
            inside = box["left"] >= frame["left"] - 1 and box["right"] <= frame["right"] + 1
            assert inside and box["top"] >= frame["top"] - 1 and box["bottom"] <= frame["bottom"] + 1, text
        for name in ("tick", "letter"):
            boxes = [text["box"] for text in texts if text["name"] == name]
            covered = [_covered(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
            assert max(covered, default=0) < 0.35, f"{name}s of a plot cover each other"


def test_dark_and_light_differ_and_both_have_contrast(page):
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert _contrast(ink, paper) >= 7
    dim = page.evaluate('getComputedStyle(document.querySelector(".dim")).color')
    assert _contrast(dim, paper) >= 4.5


def _covered(a, b) -> float:
    """Share of the smaller box that the other one covers."""
    wide = min(a["right"], b["right"]) - max(a["left"], b["left"])
    high = min(a["bottom"], b["bottom"]) - max(a["top"], b["top"])
    smaller = min(a["width"] * a["height"], b["width"] * b["height"])
    return max(wide, 0) * max(high, 0) / smaller if smaller else 0.0


def _contrast(one: str, two: str) -> float:
    """WCAG's contrast of two colours `rgb(r, g, b)`."""

    def light(colour: str) -> float:
        parts = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
        linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(one), light(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)
