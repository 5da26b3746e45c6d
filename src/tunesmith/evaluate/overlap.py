"""How much of a reference is in an answer, by torchmetrics (extra `overlap`).

rouge_l     F1 of the longest common subsequence of words              (ROUGE-L, Lin 2004)
token_f1    F1 of the words in common, each as often as it occurs      (SQuAD, arXiv:1606.05250)
squad_match share that are equal, case, punctuation and articles aside (SQuAD)
"""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.evaluate.subject import Subject
from tunesmith.inference.answers import Generation

LIBRARY = "torchmetrics"


def overlap(answers: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """`rouge_l`, `token_f1` and `squad_match` of each answer, in [0, 1]."""
    from torchmetrics.functional.text import rouge_score, squad

    found: dict[str, list[float]] = {"rouge_l": [], "token_f1": [], "squad_match": []}
    for answer, reference in zip(answers, references, strict=True):
        rouge = rouge_score(answer, reference, rouge_keys="rougeL")
        asked = {"prediction_text": answer, "id": ""}
        by_words = squad([asked], [{"answers": {"answer_start": [0], "text": [reference]}, "id": ""}])
        found["rouge_l"].append(float(rouge["rougeL_fmeasure"]))
        found["token_f1"].append(float(by_words["f1"]) / 100)
        found["squad_match"].append(float(by_words["exact_match"]) / 100)
    return found


def overlap_rates(subject: Subject, answers: Sequence[Generation]) -> dict[str, float]:
    """The means of `overlap` over greedy answers and the rows' own."""
    found = overlap([a.text for a in answers], [row.turns[-1].text for row in subject.rows])
    return {name: sum(values) / len(values) for name, values in found.items()}
