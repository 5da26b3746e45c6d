"""`tunesmith quantize`: write a quantized copy of a model once, to be loaded as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.shell import app, command, out_report
from tunesmith.errors import ConfigError


@command(app, "quantize")
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub or catalog name, folder, or .gguf file.")],
    destination: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the quantized model to.")],
    kind: Annotated[str, typer.Option("--kind", "-k", help="nf4, fp4, nf3, nf2, int4, int8 or llm-int8.")] = "nf4",
    block_size: Annotated[
        int | None, typer.Option("--block-size", help="Weights that share a scale: 64, of GPTQ 128.")
    ] = None,
    double_quant: Annotated[
        bool, typer.Option("--double-quant/--no-double-quant", help="Hold the scales in 8 bits too.")
    ] = True,
    method: Annotated[
        str, typer.Option("--method", help="nearest (rounding), or gptq, which needs --text.")
    ] = "nearest",
    text: Annotated[
        Path | None, typer.Option("--text", "-t", help="Calibration text of GPTQ: a plain text file.")
    ] = None,
    bits: Annotated[int, typer.Option("--bits", help="Of GPTQ: 4, 3 or 2.")] = 4,
    act_order: Annotated[bool, typer.Option("--act-order", help="Of GPTQ: columns with large inputs first.")] = False,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Of GPTQ: windows of 2,048 tokens of text.")] = 16,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of the other weights; auto is the narrowest that is exact.")
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Write over a folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Quantize the linears of a model's blocks and write a folder that loads as it is, with hashes.

    \b
    tunesmith quantize smollm2-135m-instruct -o smollm2-nf4
    tunesmith train --model smollm2-nf4 --data movie-reviews
    tunesmith quantize smollm2-135m-instruct -o smollm2-gptq --method gptq --text sample.txt --bits 3
    """
    from tunesmith.config import QuantSection, validate_section
    from tunesmith.data.catalog import resolve_model
    from tunesmith.export.gptq import Gptq
    from tunesmith.export.quantize import calibrated, quantize_model
    from tunesmith.quant.storage import Spec

    if method not in ("nearest", "gptq"):
        raise ConfigError(f"--method: {method!r} is not known; use nearest or gptq")
    if (method == "gptq") != (text is not None):
        raise ConfigError("--text is the calibration text of --method gptq: give both, or neither")
    path = resolve_model(model)
    if text is not None:
        spec, by = Spec("gptq"), calibrated(path, text, Gptq(bits, block_size or 128, act_order), windows)
    else:
        given = {"kind": kind, "block_size": block_size or 64, "double_quant": double_quant}
        section = validate_section(QuantSection, given, "quant")
        spec, by = Spec(section.kind, section.block_size, section.double_quant), None
    report = quantize_model(path, destination, spec, dtype=dtype, force=force, by=by)
    out_report(report, destination, json)
