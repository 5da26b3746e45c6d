"""The model card (README.md) that is saved with every adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def model_card(own: Mapping[str, Any], *, peft: bool) -> str:
    """Return the card of an adapter described by `own` (tunesmith.json); `peft`: can Hugging Face PEFT load it?"""
    base, kind = str(own["base"]["name"]), str(own["kind"])
    identity = own["base"]["identity"].get("sha256", "unknown")
    settings = {key: value for key, value in own["settings"].items() if value not in (None, {}, [], "")}
    rows = {
        "base model": f"`{base}`",
        "base identity": f"`{identity}`",
        "method": f"`{kind}`",
        "settings": f"`{json.dumps(settings)}`" if settings else "none",
        **_attention(own.get("attention")),
        "trained parameters": f"{own['parameters']:,}",
        "prompt template": f"`{(own['template'] or {}).get('name', 'not recorded')}`",
        **{str(key).replace("_", " "): _shown(value) for key, value in own["notes"].items()},
        "made with": ", ".join(f"{name} {version}" for name, version in own["versions"].items()),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    head = ["base_model: " + json.dumps(base)] if peft else []
    head += ["library_name: peft"] if peft else ["library_name: tunesmith"]
    head += ["pipeline_tag: text-generation", f"tags: [{kind}, tunesmith]"]
    front = "\n".join(head)
    use = _PEFT.format(base=json.dumps(base)) if peft else _OWN
    return f"---\n{front}\n---\n\n# {kind} adapter for {base}\n\n| | |\n|---|---|\n{table}\n\n{_USE}\n{use}"


def _attention(settings: Mapping[str, Any] | None) -> dict[str, str]:
    """Sparse attention, which other tools do not know of."""
    if not settings:
        return {}
    evaluated = "in training only" if settings.get("pattern") == "s2" else "other tools would compute full attention"
    return {"attention": f"`{json.dumps(dict(settings))}` ({evaluated})"}


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")


_USE = """## Use

With Tunesmith, which takes the prompt template and the tokenizer from this folder and refuses another base:

```sh
tunesmith chat FOLDER
tunesmith verify FOLDER
```
"""
_PEFT = """With Hugging Face PEFT (use the prompt template named above):

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), "FOLDER")
```
"""
_OWN = "Hugging Face PEFT cannot hold it: `adapter.safetensors` and `tunesmith.json` are Tunesmith's own format.\n"
