"""The schema of each endpoint's request: it validates requests, and the OpenAPI document is made from it.

Knows paths and schemas. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel

from .chat import ChatRequest
from .inspect import (
    AttentionRequest,
    DetokenizeRequest,
    DeviceRequest,
    LensRequest,
    MemoryRequest,
    NextTokenRequest,
    ScoreRequest,
    StepsRequest,
    TokenizeRequest,
)
from .requests import CompletionRequest, EmbeddingRequest
from .tasks import GenerationRequest, LabelRequest, QuestionRequest, ZeroShotRequest

REQUESTS: Mapping[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/inspect/tokenize": TokenizeRequest,
    "/v1/inspect/detokenize": DetokenizeRequest,
    "/v1/inspect/next-token": NextTokenRequest,
    "/v1/inspect/score": ScoreRequest,
    "/v1/inspect/generate-steps": StepsRequest,
    "/v1/inspect/logit-lens": LensRequest,
    "/v1/inspect/attention": AttentionRequest,
    "/v1/inspect/memory": MemoryRequest,
    "/v1/inspect/device": DeviceRequest,
    "/v1/tasks/text-generation": GenerationRequest,
    "/v1/tasks/sentiment-analysis": LabelRequest,
    "/v1/tasks/zero-shot-classification": ZeroShotRequest,
    "/v1/tasks/question-answering": QuestionRequest,
}
