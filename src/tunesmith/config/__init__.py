"""Configuration: defaults < YAML < key=value overrides < flags, read into one strict, frozen `Run`."""

from tunesmith.config.attention import AttentionSettings
from tunesmith.config.load import load_run
from tunesmith.config.sections import (
    SECTIONS,
    STRICT,
    DataSection,
    EvaluateSection,
    LogSection,
    ModelSection,
    QuantSection,
    Run,
    TrainSection,
)
from tunesmith.config.source import Located
from tunesmith.config.validate import validate_section

__all__ = [
    "SECTIONS",
    "STRICT",
    "AttentionSettings",
    "DataSection",
    "EvaluateSection",
    "Located",
    "LogSection",
    "ModelSection",
    "QuantSection",
    "Run",
    "TrainSection",
    "load_run",
    "validate_section",
]
