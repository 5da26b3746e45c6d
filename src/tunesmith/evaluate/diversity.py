"""How much generations differ from each other.

distinct-n = different n-grams / all n-grams                        (arXiv:1510.03055)
unique     = different strings among the generations of a problem, passing and failing apart     (arXiv:2405.09673)
"""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.evaluate.figures import Figure, mean


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct-n over all the texts together, whose words are parted by white space; 0 where no text has n words."""
    words = [text.split() for text in texts]
    grams = [tuple(line[i : i + n]) for line in words for i in range(len(line) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def unique_strings(generations: Sequence[Sequence[str]], passed: Sequence[Sequence[bool]]) -> dict[str, Figure]:
    """`unique`, `unique_passing`, `unique_failing`: the mean over problems of how many of their strings differ.

    `generations[i]` are those of problem i, `passed[i]` whether each passed. A problem without a passing generation
    counts 0 among the passing.
    """
    pairs = [list(zip(texts, right, strict=True)) for texts, right in zip(generations, passed, strict=True)]
    counts = {
        "unique": [len({text for text, _ in problem}) for problem in pairs],
        "unique_passing": [len({text for text, right in problem if right}) for problem in pairs],
        "unique_failing": [len({text for text, right in problem if not right}) for problem in pairs],
    }
    return {name: mean(values) for name, values in counts.items()}
