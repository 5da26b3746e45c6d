"""`tunesmith evaluate tournament`: one command from published files to the tables, whatever the files are called."""

from __future__ import annotations

import json

import pytest
from tests.evaluate.tournament.published_files import answers, pairwise, relative, write_folder, write_zip

RULES = ("--reference", "beta", "--orderings", "50", "--games", "10", "--resamples", "50", "--seed", "7")


def test_both_ways_to_call_it(command, tmp_path) -> None:
    write_folder(tmp_path / "answers", answers())
    write_zip(tmp_path / "ratings.zip", {**pairwise(), **relative()})
    code, printed, err = command("evaluate", "tournament", tmp_path, *RULES)
    assert code == 0, err
    assert command("tournament", tmp_path, *RULES)[1] == printed
    assert [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")][2:5] == [
        "alpha", "beta", "gamma"
    ]  # fmt: skip
    assert "36 verdicts, 1 of them unparsed and dropped; 24 pairs of scores, 0 unparsed; 6 questions." in printed


def test_the_shares_are_those_of_the_rule(command, tmp_path) -> None:
    """alpha: 9 of 7.5 when beta is first, 9.5 of 7 otherwise; pooled 18.5 of 14.5."""
    write_folder(tmp_path, {**relative(), **answers()})
    report = json.loads(command("evaluate", "tournament", tmp_path, *RULES, "--json")[1])
    alpha, gamma = report["shares"]
    assert alpha["reference_first"] == pytest.approx(100 * 9 / 7.5) and alpha["error"] == pytest.approx(0)
    assert alpha["reference_second"] == pytest.approx(100 * 9.5 / 7) and alpha["mean"] == pytest.approx(
        100 * 18.5 / 14.5
    )
    assert gamma["mean"] == pytest.approx(100 * 8.5 / 14.5)
    assert report["position"][0]["advantage"] == pytest.approx(0.5)


def test_a_hostile_copy_prints_the_same(command, tmp_path) -> None:
    known = write_zip(tmp_path / "answers.zip", answers())
    files = {**pairwise(), **relative()}
    names = list(files)
    honest = command("tournament", write_zip(tmp_path / "a.zip", files), known, *RULES)
    turned = dict(zip(names, [files[name] for name in [*names[3:], *names[:3]]], strict=True))
    assert command("tournament", write_zip(tmp_path / "b.zip", turned), known, *RULES) == honest
    code, _, err = command("tournament", write_folder(tmp_path / "b", turned), known, "--reference", "bet")
    assert code == 2 and "did you mean 'beta'" in err
