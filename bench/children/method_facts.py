"""Which rows this checkout can carry out, at which default rate, and on which machine; model and data are fetched."""

from __future__ import annotations

from typing import Any

from bench.children.common import spec, tell


def main() -> None:
    """Look and tell."""
    wanted = spec()
    from tunesmith.data.catalog import resolve_data, resolve_model
    from tunesmith.hardware import describe

    resolve_model(wanted["model"])
    resolve_data(wanted["data"])
    found = describe()
    shown = {name: found["packages"][name] for name in ("torch", "numpy", "tokenizers") if name in found["packages"]}
    about = {
        "cpu": found["cpu"], "memory": found["memory"], "system": found["system"],
        "versions": {"tunesmith": found["tunesmith"], "commit": found["revision"], "python": found["python"], **shown},
    }  # fmt: skip
    rates, absent = look(wanted["rows"])
    tell("facts", about=about, rates=rates, absent=absent)


def look(rows: dict[str, dict[str, Any]]) -> tuple[dict[str, float], dict[str, str]]:
    """(default rate of each row's method, why a row cannot be carried out)."""
    from tunesmith.adapters import find_method
    from tunesmith.config import validate_section
    from tunesmith.errors import ConfigError

    rates, absent = {}, {}
    for name, adapter in rows.items():
        try:
            method = find_method(adapter["kind"])
            validate_section(method.settings, adapter, "adapter")
            rates[name] = method.learning_rate
        except ConfigError as error:
            absent[name] = str(error)
    return rates, absent


if __name__ == "__main__":
    main()
