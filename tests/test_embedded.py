"""The embedded model's file by our own reader and kernels, against transformers reading the same file."""

from __future__ import annotations

import math
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_model import gguf, weights
from lab_model.catalogue import Source, load_catalogue, locate
from lab_model.engine import Engine, Event, Request, Runner, Span
from lab_model.linear import FEW_ROWS, Quantized, quantized_works, turning
from lab_model.llama import Llama
from lab_model.pages import PAGE_TOKENS
from lab_model.sampling import Sampling
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

CPU = torch.device("cpu")
TEXT = (
    "A cache answers the same question twice and works once. It must know what makes two questions the same, how long "
    "an answer stays true, and whom it may be shown to. Whoever measures a server measures its queue as well: at one "
    "request in flight the figure is latency, at sixty-four it is throughput, and between them lies the choice that an "
    "operator has to make. 서울은 대한민국의 수도이다. def add(a, b): return a + b"
)


@pytest.fixture(scope="module")
def source() -> Source:
    return locate(load_catalogue(None)[0])


@pytest.fixture(scope="module")
def file(source: Source) -> gguf.File:
    assert source.gguf_file
    return gguf.File(Path(source.folder) / source.gguf_file)


@pytest.fixture(scope="module")
def reference(source: Source) -> Any:
    """transformers' own reading, dequantized to float32."""
    config = GgufConfig(gguf_file=source.gguf_file, dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        source.folder, gguf_file=source.gguf_file, dtype=torch.float32, quantization_config=config
    ).eval()


@pytest.fixture(scope="module")
def quantized(file: gguf.File) -> weights.Weights:
    return weights.from_file(file)


@pytest.fixture(scope="module")
def ids(file: gguf.File) -> list[int]:
    tokenizer = gguf.tokenizer(file)
    assert tokenizer
    return list(tokenizer.encode(TEXT * 3).ids)


def answers(runner: Runner, *requests: Request, context: int = 2048) -> list[list[int]]:
    """What a fresh engine answers to these together."""
    ended, got = threading.Event(), {request: [] for request in requests}  # type: dict[Request, list[int]]
    open_ = set(requests)

    def deliver(events: list[Event]) -> None:
        for event in events:
            assert event.error is None
            got[event.request] += event.tokens
            if event.finish:
                open_.discard(event.request)
        if not open_:
            ended.set()

    engine = Engine(runner, deliver, kv_tokens=context)
    engine.start()
    try:
        engine.submit(*requests)
        assert ended.wait(100)
    finally:
        engine.close()
    return [got[request] for request in requests]


def test_tokenizer_is_that_of_transformers(source: Source, file: gguf.File) -> None:
    """Same ids for words, code, Korean, emoji, white space and special tokens; decoding gives the text back.

    But for white space before digits: the file names its pre-tokenizer (smollm: every digit alone), transformers does
    not read the name.
    """
    theirs, ours = AutoTokenizer.from_pretrained(source.folder, gguf_file=source.gguf_file), gguf.tokenizer(file)
    assert ours
    for text in (TEXT, "<|im_start|>user\nhi<|im_end|>\n", "it's 1234.50\t\n\n x", "naïve 🎉 ß", "", "<|im_end"):
        mine = ours.encode(text, add_special_tokens=False).ids
        assert mine == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ours.decode(mine, skip_special_tokens=False) == text


def test_greedy_equals_generate_in_float32(reference: Any, ids: list[int]) -> None:
    """Our forward over the same dequantized weights answers token by token what `generate` answers."""
    runner = Llama(weights.from_model(reference), CPU, torch.float32)
    for length in (7, 64, 150):
        prompt = torch.tensor([ids[:length]])
        out = reference.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
        want = out[0, length:].tolist()
        got = answers(runner, Request(ids[:length], 24, stop_ids=frozenset({2})))[0]
        assert got == (want[: want.index(2)] if 2 in want else want)


def test_tensors_are_those_of_transformers(reference: Any, file: gguf.File) -> None:
    """Every block unpacks to the same value, 4-bit levels times scale plus minimum included."""
    tensor = file.tensors["blk.3.ffn_up.weight"]
    want = reference.model.layers[3].mlp.up_proj.weight
    assert torch.equal(tensor.dense(), want)
    blocks = tensor.blocks()
    assert blocks
    levels, scale, minimum = blocks
    unpacked = levels.view(*scale.shape, 32) * scale[..., None] + minimum[..., None]
    assert torch.equal(unpacked.view_as(want), want)


def test_quantized_stays_within_one_percent_of_the_file(reference: Any, quantized: Any, ids: list[int]) -> None:
    """Perplexity of int8 prefill, and of int4 decoding of the same text, against the dequantized file in float32."""

    def perplexity(logits: torch.Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1 : len(logits)])).exp())

    runner = Llama(quantized, CPU, torch.bfloat16)
    pages = list(range(1, len(ids) // PAGE_TOKENS + 2))
    with torch.inference_mode():
        want = reference(torch.tensor([ids])).logits[0]
        runner.allocate(len(pages) + 1)
        assert perplexity(runner.every(ids, pages)) == pytest.approx(perplexity(want), rel=0.01)
        few = torch.cat([runner.decode([token], [place], [pages]) for place, token in enumerate(ids[:160])])
        assert perplexity(few) == pytest.approx(perplexity(want[:160]), rel=0.02)  # 160 tokens: a coarse measure


def test_a_file_without_4_bit_blocks_decodes_as_it_prefills(
    file: gguf.File, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """8-bit arithmetic for any number of rows: the few rows' way needs every layer's blocks."""
    monkeypatch.setattr(gguf.Tensor, "four_bits", False)
    runner = Llama(weights.from_file(file), CPU, torch.bfloat16)
    runner.allocate(3)
    with torch.inference_mode():
        want = runner.every(ids[:24], [1])
        got = torch.cat([runner.decode([token], [place], [[2]]) for place, token in enumerate(ids[:24])])
    assert torch.nn.functional.cosine_similarity(want, got).min() > 0.99


def test_quantized_prefill_of_one_row_does_not_see_its_neighbours(quantized: Any, ids: list[int]) -> None:
    """To the last bit: alone, among others, and with its first pages taken from before."""
    runner = Llama(quantized, CPU, torch.bfloat16)
    runner.allocate(40)
    first, second = ids[:100], ids[20:90]
    with torch.inference_mode():
        alone = runner.prefill(first, [Span(0, 100, [1, 2, 3, 4])])
        together = runner.prefill(second + first, [Span(0, 70, [5, 6, 7]), Span(0, 100, [8, 9, 10, 11])])
        assert torch.equal(alone[0], together[1])
        rest = runner.prefill(first[64:], [Span(64, 100, [8, 9, 12, 13])])
        assert torch.equal(alone[0], rest[0])


def test_quantized_repeats_itself_with_its_prefix_cached_or_not(quantized: Any, ids: list[int]) -> None:
    """A seeded request on an idle service: the same tokens cold, warm, and after others have filled the cache."""

    def asked() -> Request:
        return Request(ids[:150], 20, sampling=Sampling(1.0, seed=11))

    cold = answers(Llama(quantized, CPU, torch.bfloat16), asked())[0]
    ended: list[Event] = []
    engine = Engine(Llama(quantized, CPU, torch.bfloat16), ended.extend, kv_tokens=2048)
    with torch.inference_mode():
        for other in (Request(ids[:150], 3), Request(ids[:70] + ids[:40], 3)):
            engine.run_alone(other, ended)
        warm = asked()
        engine.run_alone(warm, ended)
    assert warm.reused == 128
    assert warm.tokens[150:] == cold


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
def test_kernels_agree(quantized: Any, rows: int) -> None:
    """int4 and int8 of one layer give the same within the weights' own rounding, whichever the number of rows picks."""
    layer, turn = quantized.layers[5].gate_up, turning(576)
    x = torch.randn(rows, 576, generator=torch.Generator().manual_seed(1))
    four, eight = layer(x, True).float(), layer(x @ turn, False)
    assert torch.nn.functional.cosine_similarity(four, eight).min() > 0.9995


def test_a_turning_matrix_turns_back() -> None:
    turn = turning(96)
    assert torch.allclose(turn @ turn.t(), torch.eye(96), atol=1e-5)


@pytest.mark.parametrize(("digits", "within"), [(1, 1 / 127), (2, 1 / 30_000)])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e10])
def test_digits_hold_every_row(digits: int, within: float, scale: float) -> None:
    """Rows of any size, zero and outliers among them, come back from their digits; no level leaves its range."""
    assert quantized_works()
    x = torch.randn(5, 64) * scale
    x[1] = 0
    x[2, 3] = 1000 * scale
    x[3, 4] = -1000 * scale
    back = Quantized(torch.eye(64), digits=digits)(x, False)
    assert torch.all((back - x).abs() <= x.abs().amax(1, keepdim=True) * within)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_row_that_is_not_finite_stays_alone(wrong: float) -> None:
    x = torch.randn(6, 64)
    layer = Quantized(torch.randn(32, 64), digits=2)
    want = layer(x, False)
    x[2, 5] = wrong
    got = layer(x, False)
    assert not got[2].isfinite().any()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(got[others], want[others])


@pytest.mark.parametrize("cut", [3, 40, 5000])
def test_a_damaged_file_says_so(tmp_path: Path, source: Source, cut: int) -> None:
    """Cut short, or no GGUF at all: GGUFError with the path, never another exception."""
    assert source.gguf_file
    content = (Path(source.folder) / source.gguf_file).read_bytes()[:cut]
    for name, data in (
        ("short", content),
        ("other", b"PK\x03\x04" + content),
        ("huge", b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60)),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(gguf.GGUFError, match=name):
            gguf.File(path)
