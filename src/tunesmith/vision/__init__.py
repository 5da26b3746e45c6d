"""Images: read safely, and turned into features by frozen encoders, once, with what they gave kept on the disk.

file, bytes or data URL -> images.py -> encoders.py (efficientnet.py, huggingface.py) -> cache.py -> a Picture (open.py)
"""
