"""Text to token ids and back: one thin class over `tokenizers` (tokenizer.json, byte-level GGUF) and sentencepiece."""

from tunesmith.tokenizer.base import Streamer, Tokenizer
from tunesmith.tokenizer.load import check_fits, load_tokenizer

__all__ = ["Streamer", "Tokenizer", "check_fits", "load_tokenizer"]
