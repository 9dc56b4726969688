"""POST /v1/tasks/...: the lecture's pipelines, with the models of the catalogue.

Knows texts, labels, spans and the method for each kind of model. Does not compute models.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import torch
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..encoders.probe import NEGATIVE, POSITIVE
from ..encoders.reader import best_span
from ..engine.request import Request
from ..engine.sampling_params import SamplingParams
from ..errors import BadRequestError
from ..text.choice import Choice, Piece
from ..text.grammar import GrammarError, span_source
from ..text.windows import PairWindows, Window
from .completions import check_capacity
from .embeddings import EncoderClient, encode
from .generator import EngineClient, EngineWork, OutputCollector, OutputSink
from .http.deadline import deadline_of
from .http.record import Record
from .http.service import Json, until_disconnect
from .inputs import check_model, tokenize_all
from .inspect import RawOutput
from .wire.tasks import (
    DEFAULT_NEW_TOKENS,
    MOST_GENERATED,
    AnswerParameters,
    GenerationParameters,
    GenerationRequest,
    LabelRequest,
    Question,
    QuestionRequest,
    ZeroShotRequest,
    task_answer,
)

Object = dict[str, Any]
MOST_ROWS = 2048  # windows over all contexts of a request
LONGEST_ANSWER = 24  # tokens
# Cosines of short texts and their labels differ by hundredths. This difference makes a label e times as likely.
COSINE_UNIT = 0.05
COSINE_HALF = 0.25  # with multi_label: the cosine of a label with probability 1/2
# The best of five prompts on bench/tasks/questions-train.jsonl: the examples teach a small model to answer in a few
# words. There an answer with a probability below ABSTAIN_SCORE was more often wrong than right.
EXAMPLES = (
    "Text: The cat of our neighbour Tom is called Molly. She is three years old.\n"
    "Question: What is the cat called?\nAnswer: Molly\n\n"
    "Text: Ice melts at zero degrees. Water boils at 100 degrees.\n"
    "Question: When does water boil?\nAnswer: at 100 degrees\n\n"
)
ABSTAIN_SCORE = 0.02


# ---- labels


async def sentiment_analysis(model: EncoderClient, http: HttpRequest, request: LabelRequest) -> Response:
    """Answers with the classifier, or with the probe on an embedding model's vectors."""
    check_model(http, request.model or model.name, model.name)
    if model.kind == "embedding" and model.probe is None:
        raise BadRequestError(
            f"{model.name} is not the embedding model for which the sentiment probe was trained.", param="model"
        )
    rows = await tokenize_all(model.text, model.text.vocab_size, [*request.texts], "inputs")
    outputs = await encode(model, http, rows, "inputs")
    top = request.parameters.top_k if request.parameters else None
    if model.probe is not None:
        method = "linear probe over sentence vectors"
        chances = [model.probe.positive(vector) for vector in outputs]
        scores = [{POSITIVE: chance, NEGATIVE: 1 - chance} for chance in chances]
    else:
        method, encoder = "classifier", model.queue.encoder
        scores = [dict(zip(encoder.labels, each, strict=True)) for each in outputs]  # type: ignore[attr-defined]
    results = [ranked(each, top) for each in scores]
    return Json(task_answer(model.name, method, results, [len(row) for row in rows]))


async def zero_shot_classification(model: EncoderClient, http: HttpRequest, request: ZeroShotRequest) -> Response:
    """Answers by the cosine between the text's vector and the vector of a sentence about each label."""
    check_model(http, request.model or model.name, model.name)
    labels, parameters = request.parameters.candidate_labels, request.parameters
    template = parameters.hypothesis_template or "This text is about {}."
    rows = await tokenize_all(model.text, model.text.vocab_size, [*request.texts], "inputs")
    sentences = await tokenize_all(
        model.text,
        model.text.vocab_size,
        [template.replace("{}", label) for label in labels],
        "parameters.candidate_labels",
    )
    # The labels are computed together with the texts but not metered: usage counts the tokens of the inputs.
    count = sum(map(len, rows))
    outputs = await encode(model, http, [*rows, *sentences], "inputs", metered=count)
    vectors, label_vectors = outputs[: len(rows)], outputs[len(rows) :]

    def compare() -> list[list[Object]]:
        found = []
        for cosines in (torch.tensor(vectors) @ torch.tensor(label_vectors).T).tolist():  # (inputs, labels)
            if parameters.multi_label:
                scores = [1 / (1 + math.exp((COSINE_HALF - cosine) / COSINE_UNIT)) for cosine in cosines]
            else:
                peak = max(cosines)
                weights = [math.exp((cosine - peak) / COSINE_UNIT) for cosine in cosines]
                scores = [weight / sum(weights) for weight in weights]
            found.append(ranked(dict(zip(labels, scores, strict=True)), None))
        return found

    results = await asyncio.to_thread(compare)  # up to 2,048 inputs and 100 labels
    method = "cosine of sentence vectors"
    return Json(task_answer(model.name, method, results, [len(row) for row in rows]))


def ranked(scores: dict[str, float], top: int | None) -> list[Object]:
    """Labels with their scores, the best first."""
    order = sorted(scores.items(), key=lambda item: -item[1])
    return [{"label": label, "score": score} for label, score in order[:top]]


# ---- answers


async def question_answering(
    model: EncoderClient | EngineClient, http: HttpRequest, request: QuestionRequest
) -> Response:
    """Answers with the reader, or with the chat model, restricted by a grammar to words of the context."""
    check_model(http, request.model or model.name, model.name)
    parameters = request.parameters or AnswerParameters()
    if isinstance(model, EncoderClient):
        return await _read(model, http, request.questions, parameters)
    return await _ask(model, http, request.questions, parameters)


async def _read(
    model: EncoderClient, http: HttpRequest, questions: Sequence[Question], parameters: AnswerParameters
) -> Response:
    context = model.queue.encoder.context

    def cut() -> list[list[Window]]:
        windows = PairWindows(model.text, context)
        found = []
        for index, each in enumerate(questions):
            if windows.question_tokens(each.question) > context // 2:
                raise BadRequestError(
                    f"The question of input {index} takes more than half of this model's context of {context} tokens.",
                    param=f"inputs[{index}].question",
                    code="context_length_exceeded",
                )
            found.append(windows.cut(each.question, each.context))
        return found

    cuts = await asyncio.to_thread(cut)
    rows = [window.ids for each in cuts for window in each]
    if len(rows) > MOST_ROWS:
        raise BadRequestError(
            f"The contexts make {len(rows)} windows of {context} tokens; at most {MOST_ROWS}. Send fewer inputs.",
            param="inputs",
            code="invalid_value",
        )
    outputs = iter(await encode(model, http, rows, "inputs"))
    longest = parameters.max_answer_tokens or LONGEST_ANSWER

    def choose() -> list[Object]:
        found = []
        for each, given in zip(cuts, questions, strict=True):
            spans = [(best_span(next(outputs), w.first, w.stop, longest), w) for w in each]
            none = min((span.none for span, _ in spans), default=1.0)
            if not spans:  # a context without tokens, such as blanks
                found.append(answer_of("", 0.0, 0, none))
                continue
            span, window = max(spans, key=lambda pair: pair[0].score)
            start, end = window.offsets[span.first][0], window.offsets[span.last][1]
            text = given.context[start:end]
            start += len(text) - len(text.lstrip())  # SentencePiece counts the blank before a word to the word
            abstains = none > span.score and parameters.handle_impossible_answer is not False
            found.append(answer_of("" if abstains else text.strip(), span.score, 0 if abstains else start, none))
        return found

    results = await asyncio.to_thread(choose)
    counts = [sum(len(window.ids) for window in each) for each in cuts]
    return Json(task_answer(model.name, "reader", results, counts))


async def _ask(
    model: EngineClient, http: HttpRequest, questions: Sequence[Question], parameters: AnswerParameters
) -> Response:
    check_capacity(model, len(questions), "inputs")
    if len(questions) > MOST_GENERATED:
        raise BadRequestError(
            f"{len(questions)} questions: a model that generates accepts at most {MOST_GENERATED} at once.",
            param="inputs",
            code="invalid_value",
        )
    # 1. Prompts, and grammars that confine each answer to its context.
    limit, deadline = parameters.max_answer_tokens or LONGEST_ANSWER, deadline_of(http)
    texts = [f"{EXAMPLES}Text: {each.context}\nQuestion: {each.question}\nAnswer:" for each in questions]
    prompts = await tokenize_all(model.text, model.vocab_size, [*texts], "inputs")
    for index, ids in enumerate(prompts):
        check_room(model, len(ids), limit, f"inputs[{index}].context", "parameters.max_answer_tokens")
    sources = [span_source(each.context) for each in questions]
    try:
        grammars = await model.grammar(lambda known: [known.make(source) for source in sources])
    except GrammarError as error:
        raise BadRequestError(f"An answer cannot be confined to this context: {error}", param="inputs") from None
    # 2. The answers, which end at the line break.
    line_end = model.text.encode("\n", special=False)
    stops = model.stop_ids | (frozenset(line_end) if len(line_end) == 1 else frozenset())
    requests = [
        Request(ids, limit, stops, SamplingParams(logprobs=0), grammar=grammar, deadline=deadline)
        for ids, grammar in zip(prompts, grammars, strict=True)
    ]
    outputs = [RawOutput() for _ in requests]
    _, counts = await generated(model, http, requests, outputs)
    # 3. Their positions in the context.
    results = []
    for given, output in zip(questions, outputs, strict=True):
        found = b"".join(map(model.text.bytes_of, output.tokens)).decode(errors="ignore").strip()
        answer = found.rstrip(".,;:!?").strip() or found
        score = math.exp(sum(each.logprob for each in output.logprobs)) if answer else 0.0
        abstains = score < ABSTAIN_SCORE and parameters.handle_impossible_answer is not False
        start = 0 if abstains else max(given.context.find(answer), 0)
        results.append(answer_of("" if abstains else answer, score, start, ABSTAIN_SCORE))
    method = "generation confined to the words of the context"
    return Json(task_answer(model.name, method, results, [len(ids) for ids in prompts], counts))


def answer_of(answer: str, score: float, start: int, none: float) -> Object:
    """The JSON of an answer. score: of the best span, even if the answer is empty because `abstain_score` is higher."""
    return {"answer": answer, "score": score, "start": start, "end": start + len(answer), "abstain_score": none}


async def text_generation(model: EngineClient, http: HttpRequest, request: GenerationRequest) -> Response:
    """Continues the text; a chat model does so without its chat template."""
    check_model(http, request.model or model.name, model.name)
    parameters = request.parameters or GenerationParameters()
    check_capacity(model, len(request.texts), "inputs")
    prompts = await tokenize_all(model.text, model.vocab_size, [*request.texts], "inputs")
    sampling = SamplingParams(
        temperature=parameters.temperature or 0.0,
        top_p=1.0 if parameters.top_p is None else parameters.top_p,
        top_k=max(parameters.top_k or 0, 0),
        repetition_penalty=parameters.repetition_penalty or 1.0,
        seed=parameters.seed,
    )
    limit, deadline = parameters.max_new_tokens or DEFAULT_NEW_TOKENS, deadline_of(http)
    for index, ids in enumerate(prompts):
        check_room(model, len(ids), limit, f"inputs[{index}]", "parameters.max_new_tokens")
    requests = [Request(ids, limit, model.stop_ids, sampling, deadline=deadline) for ids in prompts]
    choices = [Choice(index, model.text, parameters.stop or ()) for index in range(len(requests))]
    texts, counts = await generated(model, http, requests, choices)
    full = parameters.return_full_text is not False
    results = [
        {"generated_text": given + text if full else text} for given, text in zip(request.texts, texts, strict=True)
    ]
    method = "continuation of the text"
    return Json(task_answer(model.name, method, results, [len(ids) for ids in prompts], counts))


def check_room(model: EngineClient, count: int, limit: int, param: str, limit_name: str) -> None:
    """Raises BadRequestError if a prompt of `count` tokens and the answer do not fit into the context."""
    if count + limit > model.engine.context:
        raise BadRequestError(
            f"This model's context is {model.engine.context} tokens; {count} in {param} and {limit} for the answer "
            f"({limit_name}) do not fit.",
            param=param,
            code="context_length_exceeded",
        )


async def generated(
    model: EngineClient, http: HttpRequest, requests: Sequence[Request], choices: Sequence[OutputSink]
) -> tuple[list[str], list[int]]:
    """The whole text of each request, and the number of tokens that were generated for it.

    Raises ApiError; a disconnect cancels all of them.
    """
    record: Record = http.scope["record"]
    record.prompt_tokens = sum(len(request.prompt) for request in requests)
    record.work = work = EngineWork(requests, 1)
    collector = OutputCollector(work, choices, record, stream=False)
    texts = [""] * len(requests)

    async def collect() -> None:
        pieces: list[Piece]
        async for pieces in model.run(collector):
            for piece in pieces:
                texts[piece.index] += piece.text

    await until_disconnect(http.receive, collect())
    record.cached_tokens = sum(request.prefix_hit_tokens for request in requests)
    return texts, [work.counted[index] for index in range(len(requests))]
