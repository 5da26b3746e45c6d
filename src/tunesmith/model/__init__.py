"""The model: a LLaMA of our own with seams, its layouts, its cache, and its loaders."""
