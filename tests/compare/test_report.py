"""The report: what is in it, that nothing in it can run or fetch, and that hostile names and answers stay text."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import pytest
from tests.compare.made import BASE, INPUTS, grid_of, rights, write_cell
from tests.compare.shown import HOSTILE, TEXT, losses, write_all

from tunesmith.compare.plots import Point, curves, scale, scatter, spread, thinned, tick
from tunesmith.compare.publish import publish
from tunesmith.compare.read import folder_of
from tunesmith.compare.style import POLICY

VOID = {"meta", "br", "img", "input", "hr", "link", "circle", "path", "polyline"}


class Page(HTMLParser):
    """A page's elements, with the text below them; a tag that is closed by another one is a fault."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.faults: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        self.faults += [f"{tag} is left open" for tag in self._open]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        elif tag == "circle":
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self._open or self._open[-1] != tag:
            self.faults.append(f"{tag} closes {self._open[-1:]}")
        else:
            self._open.pop()

    def handle_data(self, data):
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report with everything in it; (folder, table). Do not change it."""
    folder = tmp_path_factory.mktemp("report")
    return folder, write_all(folder)[1]


@pytest.fixture(scope="module")
def html(made):
    return (made[0] / "report.html").read_text(encoding="utf-8")


def check_is_harmless(text: str) -> Page:
    page = Page(text)
    assert page.faults == []
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == names.count("style") == 1
    assert not {"img", "iframe", "link", "object", "embed", "base", "form", "a", "input"} & set(names)
    for tag, attributes in page.tags:
        assert not [
            name for name in attributes if name.startswith("on") or name in ("src", "href", "action", "style")
        ], tag
    assert "url(" not in text and "@import" not in text and "://" not in text
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == POLICY and policy.startswith("default-src 'none';") and "unsafe" not in policy
    for tag in ("script", "style"):
        digest = hashlib.sha256("".join(page.texts[tag]).encode()).digest()
        assert f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    return page


def test_the_page_is_well_formed_and_can_neither_fetch_nor_run_anything_else(html):
    check_is_harmless(html)


@pytest.mark.parametrize("where", ["answers", "names"])
def test_hostile_names_and_answers_stay_text(tmp_path, where):
    text = TEXT
    if where == "names":
        text = text.replace("Sentiment, small", json.dumps(HOSTILE)).replace("prompt tuning", json.dumps(HOSTILE))
        text = text.replace("{name: LoRA", '{name: "=cmd|x"')
    write_all(tmp_path, text, HOSTILE if where == "answers" else "negative")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = check_is_harmless(html)
    assert "<img" not in html and "&lt;img src=x onerror=alert(2)&gt;" in html
    shown = " ".join(text for parts in page.texts.values() for text in parts)
    assert "</script><script>alert(1)</script>" in shown
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<img" not in markdown and "<script" not in markdown and not re.search(r"(?<!\\)\]\(", markdown)
    for part in markdown.split("\n\n"):
        rows = [line for line in part.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1
    for name in ("report.csv", "cells.csv"):
        rows = list(csv.reader(io.StringIO((tmp_path / name).read_text(encoding="utf-8"))))
        assert len({len(row) for row in rows}) == 1
        assert not [cell for row in rows for cell in row if cell[:1] in ("=", "@", "+")]


def test_every_section_is_there(html):
    titles = re.findall(r"<h2>(.*?)</h2>", html)
    assert titles == [
        "Results", "LoRA: accuracy", "What it costs", "Loss", "Samples", "What was compared", "What was measured",
        "How", "The search for learning rates", "What was not compared", "Held fixed",
    ]  # fmt: skip
    assert len(re.findall("<figure>", html)) == 4 + 2 * 3  # costs, and two kinds of curves of three methods


def test_values_with_a_comma_of_their_own_are_told_apart(tmp_path):
    grid = grid_of(tmp_path, BASE + "methods: [{name: 'full, decay', kind: full}, lora]\naxes: {data.limit: [5, 6]}\n")
    publish(grid, tmp_path / "out", INPUTS)
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| methods | full, decay; lora |" in text and "| limit (data.limit) | 5, 6 |" in text


def test_the_best_line_and_those_that_are_not_told_apart(made):
    _, table = made
    best = next(line for line in table.lines if line.best)
    assert best.name == "full" and best.letter == "J"
    found = [line.p for line in table.lines if line.p is not None]
    # The rows that a line has right are among the best's: of the last two, 4 and 8 are missing, all on one side.
    assert found[-2:] == [pytest.approx(2 * 2 / 2**8), pytest.approx(2 / 2**4)] and max(found[:-1]) < 0.05
    # the best has one seed: its rows are paired with those of that seed; the others' two are held against the base
    assert table.tests == ["McNemar", "seeds"]


def test_every_line_is_held_against_the_untuned_base(made, tmp_path):
    folder, table = made
    base = {name: figure.mean for name, figure in table.untuned[0].figures.items()}
    for line in table.lines:
        gain = line.gains["accuracy"]
        assert gain.mean == pytest.approx(line.figures["accuracy"].mean - base["accuracy"])
        assert gain.half > 0
        lower = base["eval_loss"] - line.figures["eval_loss"].mean
        assert line.gains["eval_loss"].mean == pytest.approx(lower)  # lower is better
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "gain: accuracy" in text and "No better than the untuned base" not in text
    grid, _ = write_all(tmp_path)
    for cell in grid.bases.values():
        outcomes = {"accuracy": rights(0.79), "eval_loss": losses(2.0), "general accuracy": rights(0.55)}
        write_cell(cell, tmp_path, outcomes, forgetting=("general accuracy",))
    worse = publish(grid, tmp_path, INPUTS)
    assert max(line.figures["accuracy"].mean for line in worse.lines) < 0.79
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "No better than the untuned base, as far as these rows tell: A, B, C, D, E, F, G, H, I, J." in text


def test_cells_over_their_budget_and_figures_without_rows_are_said(tmp_path):
    text = BASE + "methods: [lora, prompt, full]\nmeasure: {metrics: [perplexity]}\n"
    grid = grid_of(tmp_path, text, "budget.memory=4", "budget.seconds=2")
    for cell, peak, speed in zip(grid.cells, (4.05, 5.0, 3.0), (320, 640, 160), strict=True):  # of 640 tokens
        write_cell(cell, tmp_path, {}, whole={"perplexity": 2.0}, peak=peak, speed=speed)
    publish(grid, tmp_path, INPUTS)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert re.findall(r".*over its budget.*", text) == [
        "- B took 5 GiB, over its budget of 4 GiB.",
        "- C took 4 s, over its budget of 2 s.",
    ]
    assert "Nothing was tested: perplexity is not kept row by row" in text


def test_lines_that_were_measured_on_other_rows_are_named(made, tmp_path):
    """As a single file's are, out of which each size holds other rows."""
    assert "Measured on other rows" not in (made[0] / "report.md").read_text(encoding="utf-8")
    grid, _ = write_all(tmp_path)
    cell = next(one for one in grid.cells if one.method == "prompt tuning")
    path = folder_of(cell, tmp_path, INPUTS) / "result.json"
    found = json.loads(path.read_text())
    found["figures"]["accuracy"]["items"] = "others"
    del found["sha256"]
    path.write_text(json.dumps(found))
    table = publish(grid, tmp_path, INPUTS)
    line = next(one for one in table.lines if one.name == cell.line)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (
        f"Measured on other rows than the best, wholly or in part, so not to be compared with it: {line.letter}."
        in text
    )


def test_what_was_forgotten_is_against_the_untuned_base(made):
    folder, table = made
    assert all(table.forgotten(line).mean == pytest.approx(0.05) for line in table.lines)
    assert all(0.01 < table.forgotten(line).half < 0.1 for line in table.lines)
    row = next(csv.DictReader(io.StringIO((folder / "report.csv").read_text(encoding="utf-8"))))
    assert float(row["lost: general accuracy"]) == pytest.approx(0.05)


def test_markdown_says_what_was_compared_and_what_was_not(made):
    text = (made[0] / "report.md").read_text(encoding="utf-8")
    assert "19 of 20 cells are finished: 10 lines, 2 seeds." in text
    assert "| full\\_seed=1 | failed | diverged: the loss is nan negative |" in text
    assert "| train.weight\\_decay | 0.1 |" in text
    assert "Budget of a cell: 64 examples, 4 GiB." in text
    assert "| LoRA | 0.0003 | eval\\_loss 0.5003 (64 examples, 0.6 s) |" in text
    assert "| rank \\\\ dropout | 0 | 0.1 |" in text
    assert "A method's other lines use the rate that was found for its first: LoRA\\_rank=1\\_dropout=0," in text
    assert "LoRA\\_rank=1\\_dropout=0: the lowest rate that was tried was the best" in text
    assert "| general | accuracy; g; test |" in text or "| general | accuracy; g |" in text
    assert "forgotten: the mean of what was lost on general accuracy; positive is lost." in text


def test_csv_has_every_cell_with_plain_numbers(made):
    rows = list(csv.DictReader(io.StringIO((made[0] / "cells.csv").read_text(encoding="utf-8"))))
    assert len(rows) == 19 + 1
    assert {(row["line"], row["seed"]) for row in rows} >= {("A", "0"), ("A", "1"), ("J", "0"), ("0", "")}
    assert float(rows[0]["accuracy"]) == pytest.approx(0.6) and float(rows[0]["peak_gib"]) == 0.5
    lines = list(csv.DictReader(io.StringIO((made[0] / "report.csv").read_text(encoding="utf-8"))))
    assert [row["line"] for row in lines] == [*"ABCDEFGHIJ", "0"]
    assert float(lines[0]["accuracy"]) == pytest.approx(0.605) and float(lines[0]["accuracy interval"]) > 0.06


def test_cells_of_the_table_sort_by_plain_numbers(html):
    values = re.findall(r'<td class="number" data-v="([^"]*)">([^<]*)', html)
    assert values and all(key == "" or float(key) is not None for key, _ in values)


def test_the_same_folders_give_the_same_bytes(made):
    folder, table = made
    before = {name: (folder / name).read_bytes() for name in ("report.html", "report.md", "report.csv", "cells.csv")}
    publish(table.grid, folder, INPUTS)
    assert all((folder / name).read_bytes() == data for name, data in before.items())


def test_a_grid_without_a_result_has_a_report_too(tmp_path):
    grid = grid_of(tmp_path, BASE)
    publish(grid, tmp_path, INPUTS)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    check_is_harmless(html)
    assert "No cell is finished yet." in html and "not run yet" in html


def test_one_finished_line_needs_no_test_and_no_front(tmp_path):
    grid = grid_of(tmp_path, BASE + "measure: {metrics: [accuracy]}\n")
    write_cell(grid.cells[0], tmp_path, {"accuracy": rights(1.0)})
    table = publish(grid, tmp_path, INPUTS)
    assert table.lines[0].best and table.tests == []
    check_is_harmless((tmp_path / "report.html").read_text(encoding="utf-8"))


class TestPlots:
    def test_ticks_are_round_and_hold_all_values(self):
        for values in ([0.61, 0.87], [0.0], [3.0, 3.0], [1e-5, 2e-5], [-4, 1e6], [0.9999, 1.0]):
            made = scale(values, 0, 100)
            assert made.low <= min(values) and made.high >= max(values) and 2 <= len(made.ticks) <= 8
            assert len({tick(value, made) for value in made.ticks}) == len(made.ticks)

    def test_many_points_are_thinned_to_their_means(self):
        points = thinned([(i, float(i)) for i in range(1000)])
        assert len(points) <= 120 and sum(y for _, y in points[:10]) == pytest.approx(sum(x for x, _ in points[:10]))
        assert thinned([(1, 2.0), (2, 3.0)]) == [(1, 2.0), (2, 3.0)]

    def test_labels_at_the_ends_of_lines_stand_apart(self):
        for places in ([100.0] * 6, [15, 16, 17, 200, 219, 220]):
            found = spread(sorted(places))
            assert all(b - a >= 12.9 for a, b in zip(found, found[1:], strict=False))
            assert min(found) >= 14 and max(found) <= 220

    def test_letters_of_points_that_lie_close_do_not_cover_each_other(self):
        points = [Point(1 + i / 50, 0.5 + i / 100, letter, 0) for i, letter in enumerate("ABCD")]
        points += [Point(9, 0.9, "E", 0)]
        drawn = scatter("t", "x", "y", points)
        places = [(float(x), float(y)) for x, y in re.findall(r'class="letter" x="([\d.]+)" y="([\d.]+)"', drawn)]
        assert len(places) == 5
        apart = [abs(a[0] - b[0]) >= 7 or abs(a[1] - b[1]) >= 9 for a in places for b in places if a < b]
        assert all(apart)

    def test_a_curve_of_one_point_is_left_out(self):
        assert curves("t", "y", [("A", [(1, 1.0)])]) == ""
