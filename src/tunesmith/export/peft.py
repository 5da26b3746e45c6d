"""An adapter as Hugging Face PEFT's folder, with the tokenizer and the chat template that it was trained with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tunesmith.adapters.base import Exchangeable
from tunesmith.adapters.peft_format import save_adapter
from tunesmith.errors import CannotExchange, ConfigError
from tunesmith.export.fold import merged_weights
from tunesmith.export.hf import write_model
from tunesmith.export.subject import Subject, with_chat_template
from tunesmith.model.hf_weights import SINGLE


def write_peft(folder: Path, subject: Subject, chat_template: str | None) -> None:
    """Write the adapter into `folder`. Raises CannotExchange, with the reason, where PEFT would compute otherwise."""
    adapter = subject.adapter
    if adapter is None:
        raise ConfigError(f"--to peft: {subject.name} has no adapter; give a run folder or an adapter folder")
    if not isinstance(adapter.method, Exchangeable):
        raise CannotExchange(
            f"--to peft: PEFT has no such method ({adapter.kind}); where it folds into weights, --to hf merges it"
        )
    adapter.method.to_peft(adapter)  # raises, with the reason
    info = subject.info
    save_adapter(
        folder,
        adapter,
        base=subject.name,
        identity=subject.identity,
        template=None if info is None else info.template,
        tokenizer=None if info is None else info.tokenizer,
        notes=None if info is None else info.notes,
        attention=None if info is None else info.attention,
    )
    with_chat_template(subject.tokenizer, chat_template).save(folder)


@contextmanager
def base_folder(subject: Subject) -> Iterator[Path]:
    """The base as a folder that transformers loads with the same numbers: its own, or a copy while it is needed."""
    if subject.quantized is None and subject.path.is_dir() and any(subject.path.glob(f"{SINGLE[:5]}*.safetensors")):
        yield subject.path
        return
    with TemporaryDirectory(prefix="tunesmith-base-") as name:
        tensors, _, config = merged_weights(subject.model, None, torch.float32)
        write_model(Path(name), config, tensors, subject.tokenizer, torch.float32)
        del tensors
        yield Path(name)
