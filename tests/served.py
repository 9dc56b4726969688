"""The models that the tests' model service has, and how long it may take to start."""

from __future__ import annotations

CHAT, EMBEDDING, TINY = "smollm2-135m-instruct", "all-minilm-l6-v2", "tiny"
# Two replicas, and a context so long that an answer may be as good as endless: for what breaks off.
PAIR = "pair"
# Ray Serve and the embedded models on two busy cores.
MODEL_START_SECONDS = 270
