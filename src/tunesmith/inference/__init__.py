"""Generation, label scoring and chat with a base model and its adapters."""

from tunesmith.inference.answers import Generation, Piece
from tunesmith.inference.chat import run_chat
from tunesmith.inference.generate import generate, stream
from tunesmith.inference.prompts import prompt_row, read_prompts
from tunesmith.inference.sample import GenerationSettings
from tunesmith.inference.score import Scored, score_continuations, score_pairs
from tunesmith.inference.session import ChatSession

__all__ = [
    "ChatSession",
    "Generation",
    "GenerationSettings",
    "Piece",
    "Scored",
    "generate",
    "prompt_row",
    "read_prompts",
    "run_chat",
    "score_continuations",
    "score_pairs",
    "stream",
]
