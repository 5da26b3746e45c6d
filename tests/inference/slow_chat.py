"""`tunesmith chat MODEL` with a model that takes 20 ms for every token: `python slow_chat.py MODEL`."""

import sys
import time

from tunesmith import api

loaded = api.load(sys.argv[1], dtype="float32", device="cpu")
run = loaded.model.run


def slowly(*given, **named):
    time.sleep(0.02)
    return run(*given, **named)


loaded.model.run = slowly
api.chat(loaded, max_new_tokens=150, temperature=1.0, seed=0)
