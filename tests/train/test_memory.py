"""Memory of this process and of models, against published counts and the model itself."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tunesmith.model.config import ModelConfig
from tunesmith.model.llama import Llama
from tunesmith.train.memory import available_memory, parameter_count, peak_memory, resident_memory

SMOLLM2 = ModelConfig(
    model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip
LLAMA_7B = ModelConfig(
    model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32, head_dim=128,
)  # fmt: skip


def test_parameters_of_published_models():
    assert parameter_count(SMOLLM2) == 134_515_008
    assert parameter_count(LLAMA_7B) == 6_738_415_616


@pytest.mark.parametrize(
    "change",
    [{"qkv_bias": True}, {"o_bias": True}, {"mlp_bias": True}, {"qk_norm": True}, {"tie_word_embeddings": False}],
)
def test_parameters_agree_with_the_model_itself(change):
    config = replace(SMOLLM2, num_hidden_layers=2, vocab_size=100, **change)
    with torch.device("meta"):
        model = Llama(config)
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())


def test_memory_of_this_process():
    now, peak = resident_memory()
    assert 0 < now <= peak and peak == pytest.approx(peak_memory("cpu"), rel=0.5)
    assert available_memory("cpu") > 0
    with mmap.mmap(-1, 64 * 2**20) as block:  # fresh pages: an allocator might give again what it still holds
        block.write(b"1" * 64 * 2**20)
        assert peak_memory("cpu") >= peak and resident_memory()[0] >= now + 32 * 2**20


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux's high-water mark")
def test_peak_remembers_what_was_freed():
    before = resident_memory()[0]
    block = torch.ones(128 * 2**18)
    del block
    assert resident_memory()[1] >= before + 100 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's limits")
@pytest.mark.parametrize("limit", ["RLIMIT_DATA", "RLIMIT_AS"])
def test_a_limit_of_the_process_is_what_is_available(limit):
    code = (
        "import resource; from tunesmith.hardware import memory; "
        f"resource.setrlimit(resource.{limit}, (3 << 30, 3 << 30)); print(*memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    total, available = map(int, done.stdout.split())
    assert total <= 3 << 30 and 2 << 30 < available < 3 << 30
