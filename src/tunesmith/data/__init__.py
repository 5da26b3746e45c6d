"""Data: row schemas and sources, prompt templates, tokens with their targets, packs."""
