"""Generation, label scoring and chat with a base model and its adapters."""

from tunesmith.inference.answers import Generation, Piece
from tunesmith.inference.generate import generate, stream
from tunesmith.inference.sample import GenerationSettings
from tunesmith.inference.score import score_continuations

__all__ = ["Generation", "GenerationSettings", "Piece", "generate", "score_continuations", "stream"]
