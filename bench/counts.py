"""docs/counts.md: what every method trains in models whose counts are known from elsewhere.

python -m bench.counts            print the page
python -m bench.counts --write    write it to docs/counts.md

Each row is one `tunesmith inspect`; the expected figure stands beside what it counts.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tunesmith.cli.show import method_settings
from tunesmith.export.counts import count
from tunesmith.model.shapes import shapes

PAGE = Path(__file__).parents[1] / "docs" / "counts.md"


@dataclass(frozen=True)
class Row:
    """One count: `words` are the method's settings, `expected` the figure and `source` where it comes from.

    A figure that a paper prints rounded, such as 37.7M, is a text. `note` flags one that its formula does not give.
    """

    model: str
    method: str
    words: str
    expected: int | str
    source: str
    note: str = ""

    @property
    def command(self) -> str:
        """The command that prints this count."""
        return f"tunesmith inspect --model {self.model} --method {self.method} {self.words}".rstrip()

    def count(self) -> dict[str, Any]:
        """What that command prints."""
        return counted(self.model, self.method, self.words)


@cache
def counted(model: str, method: str | None = None, words: str = "") -> dict[str, Any]:
    """What `tunesmith inspect` counts for these words."""
    return count(model, method, method_settings(shlex.split(words)))


QV = "target_modules=[q_proj,v_proj]"
LORA, ADAPTER, V2, REFT = "arXiv:2106.09685", "arXiv:2303.16199", "arXiv:2304.15010", "arXiv:2404.03592"
GPT3 = f"{LORA}, table 4 and appendix D"
L, F, D = 32, 11008, 4096  # of LLaMA-7B
LITE = 24 + 40 + 112 + 1280  # features of EfficientNet-Lite0 at four scales
W = 768  # of the published transformer over visual tokens
CLIP, IMAGE = "encoder=openai/clip-vit-large-patch14", "409,920 for ten layers, and d (1,456 + 1) for the projection"

ROWS = [
    Row("llama-7b", "lora", f"rank=8 {QV}", L * 8 * 2 * (D + D), f"{LORA}: sum of r (in + out)"),
    Row("llama-7b", "lora", "rank=16 target_modules=[q_proj,k_proj,v_proj,o_proj]", 16_777_216, "alpaca-lora"),
    Row("llama-7b", "lora", "rank=64", 159_907_840, "arXiv:2305.14314: all seven linears"),
    Row("llama-7b", "lora", "rank=256", 639_631_360, f"{LORA}: sum of r (in + out), all seven linears"),
    Row("llama-13b", "lora", f"rank=8 {QV}", 6_553_600, f"{LORA}: sum of r (in + out)"),
    Row("llama-65b", "lora", "rank=64", 799_539_200, "arXiv:2305.14314: all seven linears"),
    Row("llama-2-70b", "lora", f"rank=8 {QV}", 16_384_000, f"{LORA}: k and v have 8 of 64 heads"),
    Row("smollm2-135m", "lora", f"rank=8 {QV}", 460_800, f"{LORA}: sum of r (in + out)"),
    Row("smollm2-135m", "lora", "rank=16", 4_884_480, f"{LORA}: sum of r (in + out)"),
    Row("llama-7b", "dora", f"rank=8 {QV}", L * (8 * 4 * D + 2 * D), "arXiv:2402.09353: LoRA and a magnitude a row"),
    Row("llama-7b", "adalora", "", 12 * L * (8 * D + 3 * (D + F) + 7), "arXiv:2303.10512: r (in + out + 1), r = 12"),
    Row("llama-7b", "ia3", "", L * (D + D + F), "arXiv:2205.05638: L (2 d_k + d_ff)"),
    Row("llama-7b", "bottleneck", "variant=houlsby width=64", 2 * L * (2 * 64 * D + 64 + D), "arXiv:1902.00751"),
    Row("llama-7b", "bottleneck", "variant=pfeiffer width=64", L * (2 * 64 * D + 64 + D), "arXiv:2005.00247"),
    Row("llama-7b", "bitfit", "", L * (5 * D + 2 * F), "arXiv:2106.10199, on biases that are added to the linears"),
    Row("llama-7b", "bitfit", "norms=true", L * (5 * D + 2 * F) + 65 * D, "and on biases added to the norms"),
    Row("llama-7b", "norms", "", 65 * D, "arXiv:2312.11420: two norms a layer and the last"),
    Row("llama-7b", "last_layers", "layers=2 norm=false", 2 * (4 * D * D + 3 * D * F + 2 * D), "closed form"),
    Row("llama-7b", "prompt", "virtual_tokens=8", 32_768, "arXiv:2104.08691: V d"),
    Row("llama-7b", "prompt", "virtual_tokens=25", 102_400, "arXiv:2104.08691: V d"),
    Row("llama-7b", "prompt", "virtual_tokens=80", 327_680, "arXiv:2104.08691: V d"),
    Row("llama-7b", "prefix", "virtual_tokens=8", 2_097_152, "arXiv:2101.00190: 2 L V d_kv"),
    Row(
        "llama-7b",
        "mixed",
        "'parts=[{kind: prefix, virtual_tokens: 8}, {kind: lora, rank: 8}]'",
        2_097_152 + 19_988_480,
        "their sum",
    ),
    Row("llama-7b", "reft", "rank=4 tied=true layers_to_transform=[3]", 32_772, f"{REFT}: 2 r d + r a place"),
    Row("llama-7b", "reft", "rank=8 tied=true", L * (2 * 8 * D + 8), f"{REFT}: 0.031% of the model"),
    Row("llama-7b", "reft", "rank=4", 63 * 32_772, "first and last tokens apart, last ones alone in the last layer"),
    Row("llama-7b", "full", "", 6_738_415_616, "arXiv:2302.13971: 6.7B"),
    Row("smollm2-135m", "full", "", 134_515_008, "its safetensors files"),
    Row("llama-7b", "llama_adapter", "", 1_229_760, f"{ADAPTER}: 30 (10 d + heads); 1.2M, 4.9 MB"),
    Row("llama-7b", "llama_adapter", "gate=scalar", 1_228_830, "Hugging Face PEFT: one gate a layer"),
    Row("smollm2-135m", "llama_adapter", "", 161_532, "28 (10 d + heads)"),
    Row("smollm2-135m", "llama_adapter", "gate=scalar", 161_308, "28 (10 d + 1)"),
    Row("llama-7b", "llama_adapter_v2", "", 4_279_744, f"{V2}: v1, the norms, a scale and a bias on every linear"),
    *(
        Row("llama-7b", "llama_adapter_image", f"layers={n}", n * 40_992 + D * (LITE + 1), f"{ADAPTER}: {IMAGE}")
        for n in (10, 20, 30)
    ),
    Row("llama-7b", "llama_adapter_image", CLIP, 1_229_760 + D * (4 * 1024 + 1), "four scales of CLIP ViT-L/14"),
    Row(
        "llama-7b",
        "llama_adapter_v2_image",
        f"{CLIP} vision_width=768 vision_depth=8 vision_heads=16",
        4_279_744 + 2 * 32 + 8 * 12 * (W * W + W) + W * (1024 + 1) + 12 * W + D * (W + 3),
        f"{V2}: v2, two gated layers, 8 blocks of 12 (w^2 + w), w = 768, 10 queries, both ends",
    ),
    Row("llama-7b", "image_projection", CLIP, D * (1024 + 1), "arXiv:2304.08485: one matrix and a bias"),
]

# The table of GPT-3's adaptation in the LoRA paper (d = 12,288, 96 layers), on a LLaMA of that width and depth.
GPT3_ROWS = [
    Row("gpt3-shaped", "lora", f"rank=1 {QV}", "4.7M", GPT3),
    Row("gpt3-shaped", "lora", f"rank=8 {QV}", "37.7M", GPT3),
    Row("gpt3-shaped", "bottleneck", "variant=houlsby width=1", "7.1M", GPT3),
    Row("gpt3-shaped", "bottleneck", "variant=houlsby width=4", "21.2M", GPT3),
    Row("gpt3-shaped", "bottleneck", "variant=houlsby width=8", "40.1M", GPT3),
    Row("gpt3-shaped", "bottleneck", "variant=houlsby width=16", "77.9M", GPT3),
    Row("gpt3-shaped", "bottleneck", "variant=houlsby width=64", "304.4M", GPT3),
    Row("gpt3-shaped", "prompt", "virtual_tokens=256 infix_tokens=8", "3.2M", GPT3),
    Row(
        "gpt3-shaped",
        "prefix",
        "virtual_tokens=8",
        "20.2M",
        GPT3,
        "the paper's own formula, L d (8 + 8), gives 18.87M, as does this count (8 keys and 8 values a layer)",
    ),
    Row(
        "gpt3-shaped",
        "bitfit",
        "",
        "14.2M",
        GPT3,
        "14.2M is 12 d L = 14,155,776, but the biases of GPT-3's linears and norms are 11 d L = 12,976,128; "
        "a LLaMA has no biases, and those added to its linears are 5 d + 2 f a layer",
    ),
]

HEAD = """# Parameter counts

What a method trains and saves is counted from names and shapes alone: no weights are needed, and none are made.

    tunesmith inspect --model llama-7b --method llama_adapter --json

`--model` takes a name (they stand at the end), a model folder or a `.gguf` file; `--method` any `kind`, whose settings
follow as `key=value`. It prints `trainable_parameters`, `total_parameters` (the base and what the method adds),
`file_bytes` (the adapter's tensors in float32, as they are saved), `header_bytes` (what the safetensors file has before
them) and the trained parameters by module. [test_counts.py](../tests/export/test_counts.py) holds every row to its
expected figure, and this page to what `python -m bench.counts` prints.

## Methods
"""

GPT3_HEAD = """## The LoRA paper's table for GPT-3

`gpt3-shaped` is a LLaMA with GPT-3's width and depth (12,288 and 96). What LoRA on q and v, bottleneck adapters,
prompts and prefixes train depends on nothing else. Its MLP has three matrices of 8d/3 instead of two of 4d.
"""


def table(rows: list[Row]) -> Iterator[str]:
    """A Markdown table; rows whose expected figure does not follow from its formula have their note below."""
    yield "| command | trained | MB | expected | where |"
    yield "|---|---:|---:|---:|---|"
    notes = []
    for row in rows:
        found = row.count()
        said = f"{row.expected:,}" if isinstance(row.expected, int) else row.expected
        mark = ""
        if row.note:
            notes.append(row.note)
            mark = f" [{len(notes)}]"
        yield (
            f"| `{row.command}` | {found['trainable_parameters']:,} | {found['file_bytes'] / 1e6:.2f} "
            f"| {said}{mark} | {row.source} |"
        )
    if notes:
        yield ""
        yield from (f"[{i}] Printed and formula differ: {note}." for i, note in enumerate(notes, 1))


def page() -> str:
    """The whole of docs/counts.md."""
    lines = [HEAD, *table(ROWS), "", GPT3_HEAD, *table(GPT3_ROWS), "", "## Models by name", ""]
    lines += ["| command | parameters | of them in the layers' linears |", "|---|---:|---:|"]
    for name in shapes():
        found = counted(name)
        base, linears = found["base_parameters"], found["linear_parameters"]
        lines.append(f"| `tunesmith inspect --model {name}` | {base:,} | {linears:,} |")
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None) -> int:
    """Print the page or write it."""
    parser = argparse.ArgumentParser(prog="python -m bench.counts", description="Write docs/counts.md.")
    parser.add_argument("--write", action="store_true", help="write docs/counts.md instead of printing it")
    if parser.parse_args(words).write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
