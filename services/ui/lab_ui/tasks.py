"""The tasks page: pipelines in code of 2023, what that code does today, and the same task run by the lab.

Knows the formats of /v1/tasks. The exceptions are those of the versions that the lab installs; a test checks them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .wire import objects

MAX_LINES, MAX_TEXT = 100, 20_000


@dataclass(frozen=True)
class Then:
    """`code`: of 2023; `works`: whether it still runs; `error`: the exception that it raises; `now`: today's code."""

    code: str
    works: bool
    now: str
    error: str = ""


LESSONS: dict[str, Then] = {
    "generation": Then(
        "from transformers import pipeline\n\n"
        "generator = pipeline('text-generation', model='gpt2')\n"
        "generator('Large language models are', max_length=20)",
        works=True,
        now="from transformers import pipeline\n\n"
        'generator = pipeline("text-generation", model="gpt2")\n'
        'generator("Large language models are", max_new_tokens=20)',
    ),
    "sentiment": Then(
        "from transformers import pipeline\n\n"
        "classifier = pipeline('sentiment-analysis')\n"
        "classifier('I love learning about large language models!')",
        works=True,
        now="from transformers import pipeline\n\n"
        'model = "distilbert/distilbert-base-uncased-finetuned-sst-2-english"\n'
        'classifier = pipeline("text-classification", model=model)\n'
        'classifier("I love learning about large language models!")',
    ),
    "question": Then(
        "from transformers import pipeline\n\n"
        "qa = pipeline('question-answering')\n"
        "qa(question='What are large language models?', context='…')",
        works=False,
        error="KeyError: The task question-answering has been removed from transformers. Use the `text-generation` "
        "pipeline with a chat model instead.",
        now="from transformers import AutoModelForQuestionAnswering, AutoTokenizer\n\n"
        'name = "distilbert/distilbert-base-cased-distilled-squad"\n'
        "tokenizer = AutoTokenizer.from_pretrained(name)\n"
        "model = AutoModelForQuestionAnswering.from_pretrained(name)\n"
        'inputs = tokenizer("What are large language models?", "…", return_tensors="pt")\n'
        "found = model(**inputs)\n"
        "start, end = found.start_logits.argmax(), found.end_logits.argmax()\n"
        "tokenizer.decode(inputs.input_ids[0, start : end + 1])",
    ),
    "hand": Then(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "tokenizer = AutoTokenizer.from_pretrained('gpt2')\n"
        "model = AutoModelForCausalLM.from_pretrained('gpt2')\n"
        "inputs = tokenizer('The future of artificial intelligence is', return_tensors='pt')\n"
        "outputs = model.generate(**inputs, max_length=20)\n"
        "tokenizer.decode(outputs[0], skip_special_tokens=True)",
        works=True,
        now="from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("gpt2")\n'
        'model = AutoModelForCausalLM.from_pretrained("gpt2", dtype="auto")\n'
        'inputs = tokenizer("The future of artificial intelligence is", return_tensors="pt")\n'
        "outputs = model.generate(**inputs, max_new_tokens=20, do_sample=False)\n"
        "tokenizer.decode(outputs[0], skip_special_tokens=True)",
    ),
    "chat": Then(
        "import openai\n\n"
        "openai.ChatCompletion.create(\n"
        "    model='gpt-3.5-turbo',\n"
        "    messages=[{'role': 'user', 'content': 'Explain large language models.'}],\n"
        ")",
        works=False,
        error="APIRemovedInV1: You tried to access openai.ChatCompletion, but this is no longer supported in "
        "openai>=1.0.0",
        now="from openai import OpenAI\n\n"
        'client = OpenAI(base_url="$url/v1", api_key="any")\n'
        "client.chat.completions.create(\n"
        '    model="gpt-3.5-turbo",  # the lab answers under this name, too\n'
        '    messages=[{"role": "user", "content": "Explain large language models."}],\n'
        ")",
    ),
}

# Sentences written for this page, the same in both languages: (text, whether it is positive).
SENTENCES: dict[str, tuple[tuple[str, bool], ...]] = {
    "en": (
        ("I love learning about large language models!", True),
        ("The battery died after two days and nobody answered my mail.", False),
        ("The soup was warm, rich and full of flavour.", True),
        ("I would not recommend this hotel to anyone.", False),
        ("The teacher explains difficult things patiently.", True),
        ("The film is far too long and the story makes no sense.", False),
        ("Not bad at all, I was pleasantly surprised.", True),
        ("The update made the app slower than before.", False),
        ("What a beautiful evening by the river.", True),
        ("I waited an hour and the food was cold.", False),
        ("The new library is bright and quiet.", True),
        ("This is the worst chair I have ever owned.", False),
    ),
    "ko": (
        ("대규모 언어 모델을 배우는 것이 정말 즐거워요!", True),
        ("배터리가 이틀 만에 고장 났고 아무도 답장을 하지 않았습니다.", False),
        ("국물이 따뜻하고 진하고 맛이 아주 좋았어요.", True),
        ("이 호텔은 누구에게도 권하고 싶지 않습니다.", False),
        ("선생님이 어려운 것을 차근차근 설명해 주십니다.", True),
        ("영화가 너무 길고 이야기가 앞뒤가 맞지 않아요.", False),
        ("생각보다 나쁘지 않아서 기분 좋게 놀랐어요.", True),
        ("업데이트 뒤에 앱이 전보다 느려졌어요.", False),
        ("강가에서 보낸 참 아름다운 저녁이었어요.", True),
        ("한 시간을 기다렸는데 음식이 식어 있었어요.", False),
        ("새 도서관은 밝고 조용해서 좋아요.", True),
        ("지금까지 써 본 의자 중에 최악입니다.", False),
    ),
}
CONTEXTS: dict[str, tuple[str, str]] = {
    "en": (
        "Mina bought a red bicycle in Busan last spring. She rides it to work every day because the bus is crowded.",
        "Where did Mina buy the bicycle?",
    ),
    "ko": (
        "미나는 지난봄 부산에서 빨간 자전거를 샀다. 버스가 붐벼서 날마다 자전거로 출근한다.",
        "미나는 자전거를 어디에서 샀나?",
    ),
}


@dataclass(frozen=True)
class Label:
    name: str
    score: float


def labels(body: Mapping[str, Any]) -> list[list[Label]]:
    """The labels of each input, the best first; labels without a name or a score are left out."""
    results = body.get("results")
    return [
        [
            Label(str(each["label"]), float(each["score"]))
            for each in (row if isinstance(row, list) else [])
            if isinstance(each, Mapping) and "label" in each and isinstance(each.get("score"), int | float)
        ]
        for row in (results if isinstance(results, list) else [])
    ]


def accuracy(found: Sequence[Sequence[Label]], wanted: Sequence[bool]) -> tuple[int, int]:
    """Number of texts whose best label is correct, and number of texts that have a label."""
    pairs = [(row[0].name.upper() == "POSITIVE", want) for row, want in zip(found, wanted, strict=False) if row]
    return sum(got == want for got, want in pairs), len(pairs)


def answer(body: Mapping[str, Any]) -> tuple[str, float]:
    """The first answer and its score; the answer is empty if the context has none."""
    for each in objects(body, "results"):
        score = each.get("score")
        return str(each.get("answer") or ""), float(score) if isinstance(score, int | float) else 0.0
    return "", 0.0


def generated(body: Mapping[str, Any]) -> str:
    return next((str(each.get("generated_text") or "") for each in objects(body, "results")), "")


def lines(text: str) -> list[str]:
    """The inputs in the batch editor: one per line, without empty lines, at most MAX_LINES."""
    return [line.strip() for line in text.splitlines() if line.strip()][:MAX_LINES]
