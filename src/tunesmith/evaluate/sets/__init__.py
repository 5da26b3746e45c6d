"""Published sets of multiple-choice questions, one file each: how their rows are read, and how a question is put."""

from tunesmith.evaluate.sets.arc import ARC_CHALLENGE, ARC_EASY, OPENBOOKQA
from tunesmith.evaluate.sets.boolq import BOOLQ
from tunesmith.evaluate.sets.hellaswag import HELLASWAG
from tunesmith.evaluate.sets.mmlu import MMLU
from tunesmith.evaluate.sets.own import CHOICE
from tunesmith.evaluate.sets.scienceqa import SCIENCEQA
from tunesmith.evaluate.sets.winogrande import WINOGRANDE

SETS = (HELLASWAG, WINOGRANDE, ARC_EASY, ARC_CHALLENGE, OPENBOOKQA, BOOLQ, MMLU, SCIENCEQA, CHOICE)

__all__ = ["SETS"]
