"""The requests of /v1/tasks: fields, their limits, and the answer's frame.

Knows shapes. Knows nothing of HTTP servers, tokenizers or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from ...errors import BadRequestError
from .requests import MOST_INPUTS, Checked, StopString, Text, Whole

MOST_CHARACTERS = 50_000  # characters of one text or context
MOST_GENERATED = 64  # inputs of a request whose answers are generated
MOST_LABELS = 100
MOST_LABEL_CHARACTERS = 200
DEFAULT_NEW_TOKENS = 64

BoundedText = Annotated[str, StringConstraints(min_length=1, max_length=MOST_CHARACTERS)]
Label = Annotated[str, StringConstraints(min_length=1, max_length=MOST_LABEL_CHARACTERS, strip_whitespace=True)]


class Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class LabelParameters(Parameters):
    """top_k: number of best labels in the answer; default: all."""

    top_k: Annotated[Whole, Field(ge=1)] | None = None


class ZeroShotParameters(Parameters):
    """hypothesis_template: a sentence in which `{}` is replaced by the label.
    multi_label: scores of labels are independent, instead of adding up to 1."""

    candidate_labels: Annotated[list[Label], Field(fail_fast=True, min_length=1, max_length=MOST_LABELS)]
    hypothesis_template: Annotated[str, StringConstraints(max_length=MOST_LABEL_CHARACTERS)] | None = None
    multi_label: bool | None = None


class AnswerParameters(Parameters):
    """max_answer_tokens: in tokens of the model. handle_impossible_answer: whether the answer may be empty, which means
    that the context has none."""

    max_answer_tokens: Annotated[Whole, Field(ge=1, le=256)] | None = None
    handle_impossible_answer: bool | None = None


class GenerationParameters(Parameters):
    """temperature: default 0, so that an answer can be repeated and cached."""

    max_new_tokens: Annotated[Whole, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, lt=2**31)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[StopString], Field(fail_fast=True, max_length=16)] | None = None
    return_full_text: bool | None = None
    num_return_sequences: Literal[1] | None = None


class TaskRequest(Checked):
    """model: default is the first suitable model of the catalogue."""

    model: Text | None = None


class LabelRequest(TaskRequest):
    inputs: BoundedText | Annotated[list[BoundedText], Field(fail_fast=True, min_length=1, max_length=MOST_INPUTS)]
    parameters: LabelParameters | None = None

    @property
    def texts(self) -> list[str]:
        return [self.inputs] if isinstance(self.inputs, str) else self.inputs


class ZeroShotRequest(TaskRequest):
    inputs: BoundedText | Annotated[list[BoundedText], Field(fail_fast=True, min_length=1, max_length=MOST_INPUTS)]
    parameters: ZeroShotParameters

    @property
    def texts(self) -> list[str]:
        return [self.inputs] if isinstance(self.inputs, str) else self.inputs

    def check(self) -> None:
        labels, template = self.parameters.candidate_labels, self.parameters.hypothesis_template
        if len(set(labels)) < len(labels):
            raise BadRequestError(
                "'parameters.candidate_labels' contains a label twice.",
                param="parameters.candidate_labels",
                code="invalid_value",
            )
        if template is not None and template.count("{}") != 1:
            raise BadRequestError(
                "'parameters.hypothesis_template' must contain {} once; it is replaced by the label.",
                param="parameters.hypothesis_template",
                code="invalid_value",
            )


class Question(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    question: Annotated[str, StringConstraints(min_length=1, max_length=2_000)]
    context: BoundedText


class QuestionRequest(TaskRequest):
    inputs: Question | Annotated[list[Question], Field(fail_fast=True, min_length=1, max_length=MOST_INPUTS)]
    parameters: AnswerParameters | None = None

    @property
    def questions(self) -> list[Question]:
        return [self.inputs] if isinstance(self.inputs, Question) else self.inputs


class GenerationRequest(TaskRequest):
    inputs: BoundedText | Annotated[list[BoundedText], Field(fail_fast=True, min_length=1, max_length=MOST_GENERATED)]
    parameters: GenerationParameters | None = None

    @property
    def texts(self) -> list[str]:
        return [self.inputs] if isinstance(self.inputs, str) else self.inputs


def task_answer(
    model: str, method: str, results: Sequence[Any], prompts: Sequence[int], completions: Sequence[int] | None = None
) -> dict[str, Any]:
    """The answer of a task: one result for each input, in their order. prompts, completions: tokens of each input,
    which a cache of single inputs needs."""
    made = [0] * len(prompts) if completions is None else list(completions)
    usage = {"prompt_tokens": sum(prompts), "completion_tokens": sum(made), "total_tokens": sum(prompts) + sum(made)}
    usage_by_input = {"per_input_tokens": list(prompts), "per_input_completion_tokens": made}
    return {"model": model, "method": method, "results": list(results), "usage": usage | usage_by_input}
