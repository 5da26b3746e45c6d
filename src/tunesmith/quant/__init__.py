"""Codes of few bits and the storages that hold frozen weights in them. A quantized Linear is the same Linear."""
