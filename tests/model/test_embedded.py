"""The embedded model's file by our own reader, operators and kernels, against transformers reading the same file."""

from __future__ import annotations

import logging
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counts import cases
from fixtures_embedded import kernels
from gguf import GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab_model.engine.kv_pages import PAGE_TOKENS
from lab_model.engine.request import Request, StepOutput
from lab_model.engine.runner import Runner, Span
from lab_model.engine.sampling_params import SamplingParams
from lab_model.engine.scheduler import Scheduler
from lab_model.models.catalogue import load_catalogue
from lab_model.models.causal import load_causal
from lab_model.models.sources import Source
from lab_model.models.tokenizers import read_gguf_tokenizer
from lab_model.runners import cpu
from lab_model.runners import kernels as c_kernels
from lab_model.runners.cpu import MOST_ROWS, CpuRunner
from lab_model.runners.llama import LlamaRunner
from lab_model.text import gguf_tokenizer
from lab_model.weights import gguf, headers
from lab_model.weights import llama as llama_weights
from processes import GENEROUS_SECONDS
from tiny import one_thread  # noqa: F401 - of all tests here
from transformers import AutoTokenizer

CPU = torch.device("cpu")
TEXT = (
    "A cache answers the same question twice and works once. It must know what makes two questions the same, how long "
    "an answer stays true, and whom it may be shown to. Whoever measures a server measures its queue as well: at one "
    "request in flight the figure is latency, at sixty-four it is throughput, and between them lies the choice that an "
    "operator has to make. 서울은 대한민국의 수도이다. def add(a, b): return a + b"
)


@pytest.fixture(scope="module")
def packed(file: gguf.GGUFFile) -> CpuRunner:
    """Its weights are packed once; an engine allocates a pool of its own. One thread: on busy cores two wait for each
    other at every phase of a step."""
    return CpuRunner(file, 1)


@pytest.fixture
def runner(packed: CpuRunner) -> CpuRunner:
    """With a new pool of 80 pages."""
    packed.allocate(80)
    return packed


@pytest.fixture(scope="module")
def ids(file: gguf.GGUFFile) -> list[int]:
    tokenizer = gguf_tokenizer.build_tokenizer(file.metadata)
    assert tokenizer
    return list(tokenizer.encode(TEXT * 3).ids)


def answers(runner: Runner, *requests: Request, context: int = 2048) -> list[list[int]]:
    """What a fresh engine answers to these together."""
    ended, got = threading.Event(), {request: [] for request in requests}  # type: dict[Request, list[int]]
    open_ = set(requests)

    def deliver(events: list[StepOutput]) -> None:
        for event in events:
            assert event.error is None
            got[event.request] += event.tokens
            if event.finish:
                open_.discard(event.request)
        if not open_:
            ended.set()

    engine = Scheduler(runner, deliver, kv_tokens=context)
    engine.start()
    try:
        engine.submit(*requests)
        assert ended.wait(GENEROUS_SECONDS), "not finished"
    finally:
        engine.close()
    return [got[request] for request in requests]


def test_tokenizer_is_that_of_transformers(source: Source, file: gguf.GGUFFile) -> None:
    """Same ids for words, code, Korean, emoji, white space and special tokens; decoding gives the text back.

    But for white space before digits: the file names its pre-tokenizer (smollm: every digit alone), transformers does
    not read the name.
    """
    theirs, ours = (
        AutoTokenizer.from_pretrained(source.folder, gguf_file=source.gguf_file),
        gguf_tokenizer.build_tokenizer(file.metadata),
    )
    assert ours
    for text in (TEXT, "<|im_start|>user\nhi<|im_end|>\n", "it's 1234.50\t\n\n x", "naïve 🎉 ß", "", "<|im_end"):
        mine = ours.encode(text, add_special_tokens=False).ids
        assert mine == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ours.decode(mine, skip_special_tokens=False) == text


def test_greedy_equals_generate_in_float32(reference: Any, file: gguf.GGUFFile, ids: list[int]) -> None:
    """Our forward over our reading of the file answers token by token what transformers' `generate` answers."""
    count = cases(12, 24)
    asked = [Request(ids[:length], count, stop_ids=frozenset({2})) for length in (7, 64, 150)]
    got = answers(LlamaRunner(llama_weights.from_file(file, torch.float32, CPU), CPU, torch.float32), *asked)
    for request, answer in zip(asked, got, strict=True):
        prompt = torch.tensor([request.prompt])
        out = reference.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False)
        want = out[0, len(request.prompt) :].tolist()
        assert answer == (want[: want.index(2)] if 2 in want else want)


def test_tensors_are_those_of_transformers(reference: Any, file: gguf.GGUFFile) -> None:
    """Every block unpacks to the same value, 4-bit levels times scale plus minimum included."""
    tensor = file.tensors["blk.3.ffn_up.weight"]
    want = reference.model.layers[3].mlp.up_proj.weight
    assert torch.equal(tensor.dense(), want)
    blocks = tensor.blocks()
    assert blocks
    levels, scale, minimum = blocks
    unpacked = levels.view(*scale.shape, 32) * scale[..., None] + minimum[..., None]
    assert torch.equal(unpacked.view_as(want), want)


@kernels
def test_quantized_stays_close_to_the_file(reference: Any, runner: CpuRunner, ids: list[int]) -> None:
    """Perplexity within 1 % of the dequantized file's in float32, and its distributions nearly the same."""

    def perplexity(logits: torch.Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1 : len(logits)])).exp())

    with torch.inference_mode():
        want, got = reference(torch.tensor([ids])).logits[0], runner.all_logits(ids, range(1, 20))
    assert perplexity(got) == pytest.approx(perplexity(want), rel=0.01)
    ours, theirs = got.log_softmax(-1), want.log_softmax(-1)
    # 0.0007 nats over long texts; without peaks, 0.003.
    assert (theirs.exp() * (theirs - ours)).sum(-1).mean() < 0.001


@kernels
def test_a_file_without_4_bit_blocks(
    reference: Any, file: gguf.GGUFFile, runner: CpuRunner, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps 8 bits a weight."""
    monkeypatch.setattr(gguf.Tensor, "four_bits", False)
    eight = CpuRunner(file, 2)
    eight.allocate(3)
    with torch.inference_mode():
        want, got = reference(torch.tensor([ids[:24]])).logits[0], eight.all_logits(ids[:24], [1])
    assert torch.nn.functional.cosine_similarity(want, got).min() > 0.999
    assert eight.bytes > 1.4 * runner.bytes


@kernels
@pytest.mark.parametrize("threads", [2, 3])
def test_rows_do_not_see_their_neighbours(file: gguf.GGUFFile, runner: CpuRunner, ids: list[int], threads: int) -> None:
    """To the last bit: a prompt alone, among others, in pieces, token by token, in batches of each size, whichever the
    number of threads (alone: one)."""
    other = CpuRunner(file, threads)
    other.allocate(80)
    first, second = ids[:100], ids[20:90]
    alone = runner.all_logits(first, [1, 2, 3, 4])
    together = other.prefill(second + first, [Span(0, 70, [5, 6, 7]), Span(0, 100, [8, 9, 10, 11])])
    assert torch.equal(together[1], alone[-1])
    assert torch.equal(other.prefill(first[64:], [Span(64, 100, [8, 9, 12, 13])])[0], alone[-1])
    for place in range(80, 100, cases(5, 1)):
        step = other.decode([first[place]], [place], [[8, 9, 10, 11]])
        assert torch.equal(step[0], alone[place])
    for rows in (2, 3, 4, 5, 7, 8, 9, 33):
        pages = [[8, 9, 10, 20 + row] for row in range(rows)]
        other._pool[:, 20 : 20 + rows] = other._pool[:, 11:12]
        step = other.decode([first[99 - row % 4] for row in range(rows)], [99 - row % 4 for row in range(rows)], pages)
        for row in range(rows):
            assert torch.equal(step[row], alone[99 - row % 4]), f"row {row} of {rows}"


@kernels
def test_more_rows_than_one_call_takes(runner: CpuRunner, ids: list[int]) -> None:
    """A long piece goes in several calls; the logits asked for are those of the right rows."""
    long = (ids * 4)[: 2 * MOST_ROWS + 40]
    pages = list(range(1, len(long) // PAGE_TOKENS + 2))
    whole = runner.all_logits(long, pages)
    ends = [span.stop for span in (Span(0, 300, pages), Span(300, len(long), pages))]
    some = runner.prefill(long, [Span(0, 300, pages), Span(300, len(long), pages)])
    assert torch.equal(some, whole[[end - 1 for end in ends]])
    assert whole.isfinite().all()


@kernels
def test_a_row_that_is_no_number_stays_alone(runner: CpuRunner, ids: list[int]) -> None:
    """Of one request a key, of another a value is none: their logits are, and no neighbour's; nor an heir's."""
    for first in (1, 2, 3):
        runner.prefill(ids[:20], [Span(0, 20, [first])])
    want = runner.decode([5, 5, 5], [20, 20, 20], [[1], [2], [3]])
    half = runner._pool.shape[2] // 2
    runner._pool[7, 1, 3] = torch.nan
    runner._pool[7, 3, half // 3 + 10] = torch.nan
    got = runner.decode([5, 5, 5], [20, 20, 20], [[1], [2], [3]])
    assert not got[0].isfinite().any()
    assert not got[2].isfinite().any()
    assert torch.equal(got[1], want[1])
    runner._pool[:, 1] = torch.nan
    runner.prefill(ids[:20], [Span(0, 20, [1])])
    assert torch.equal(runner.decode([5], [20], [[1]])[0], want[0])


@kernels
def test_repeats_itself_with_its_prefix_cached_or_not(packed: CpuRunner, ids: list[int]) -> None:
    """A seeded request on an idle service: the same tokens cold, warm, and after others have filled the cache."""

    def asked() -> Request:
        return Request(ids[:150], 20, sampling=SamplingParams(1.0, seed=11))

    cold = answers(packed, asked())[0]
    ended: list[StepOutput] = []
    engine = Scheduler(packed, ended.extend, kv_tokens=2048)
    with torch.inference_mode():
        for other in (Request(ids[:150], 3), Request(ids[:70] + ids[:40], 3)):
            engine.run_alone(other, ended)
        warm = asked()
        engine.run_alone(warm, ended)
    assert warm.prefix_hit_tokens == 128
    assert warm.tokens[150:] == cold


@kernels
def test_the_next_turn_finds_the_answer_before_it(packed: CpuRunner, ids: list[int]) -> None:
    """Decoded pages are as good as prefilled ones: a conversation that goes on computes only what is new, and answers
    what a fresh engine answers."""
    ended: list[StepOutput] = []
    engine = Scheduler(packed, ended.extend, kv_tokens=2048)
    with torch.inference_mode():
        first = Request(ids[:50], 70, sampling=SamplingParams(1.0, seed=5))
        engine.run_alone(first, ended)
        second = Request(first.tokens + ids[:20], 20, sampling=SamplingParams(1.0, seed=6))
        engine.run_alone(second, ended)
    assert len(first.tokens) == 120
    assert second.prefix_hit_tokens == 96
    fresh = answers(packed, Request(first.tokens + ids[:20], 20, sampling=SamplingParams(1.0, seed=6)))[0]
    assert second.tokens[140:] == fresh


@kernels
def test_a_seeded_request_answers_the_same_in_any_batch(packed: CpuRunner, ids: list[int]) -> None:
    """Quantized too: others join, prefill and leave around it."""

    def asked() -> Request:
        return Request(ids[:60], 40, sampling=SamplingParams(1.0, seed=3))

    alone = answers(packed, asked())[0]
    others = [Request(ids[at : at + 5 + 9 * at], 3 + 2 * at) for at in range(20)]
    assert answers(packed, *others[:10], asked(), *others[10:], context=8192)[10] == alone


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_without_kernels_the_file_is_unpacked(
    source: Source, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, dtype: str
) -> None:
    """No compiler, another processor: torch's operators run the same file, and the log says why and what to do."""
    monkeypatch.setattr(c_kernels, "why_unavailable", lambda: "there is no C compiler")
    entry = load_catalogue(None)[0].model_copy(update={"dtype": dtype})
    with caplog.at_level(logging.WARNING):
        runner, _, _ = load_causal(entry, source, CPU)
    assert (type(runner), runner.kind) == (LlamaRunner, "bfloat16" if dtype == "auto" else "float32")
    assert ("there is no C compiler" in caplog.text) == (dtype == "auto")
    runner.allocate(2)
    with torch.inference_mode():
        assert runner.prefill([1, 2, 3], [Span(0, 3, [1])]).isfinite().all()


def test_files_of_other_models_are_left_to_transformers(file: gguf.GGUFFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias, stretched rotations, another architecture: nothing of a file is passed over in silence."""
    assert llama_weights.can_read(file)
    with monkeypatch.context() as patch:
        patch.setitem(file.tensors, "blk.0.attn_q.bias", file.tensors["blk.0.attn_norm.weight"])
        assert not llama_weights.can_read(file)
        assert not cpu.can_run(file)
    said = file.metadata
    for key, value in (
        ("llama.rope.scaling.type", "yarn"),
        ("llama.rope.dimension_count", 32),
        ("general.architecture", "qwen2"),
        ("llama.attention.head_count", [9] * 30),
        ("llama.attention.head_count_kv", 2),
        ("llama.feed_forward_length", 1504),
        ("llama.embedding_length", 0),
        ("tokenizer.ggml.tokens", [*said["tokenizer.ggml.tokens"], "one more"]),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(said, key, value)
            assert not llama_weights.can_read(file), key
            assert not cpu.can_run(file), key
    for key in ("llama.block_count", "llama.attention.layer_norm_rms_epsilon"):
        with monkeypatch.context() as patch:
            patch.delitem(said, key)
            assert not llama_weights.can_read(file), key
    with monkeypatch.context() as patch:
        patch.delitem(file.tensors, "blk.29.ffn_up.weight")
        assert not llama_weights.can_read(file)
        assert not cpu.can_run(file)


@kernels
def test_c_is_given_no_token_that_is_not_there(runner: CpuRunner) -> None:
    for ids, position in (([49152], 0), ([-1], 0), ([5], 80 * PAGE_TOKENS)):
        with pytest.raises(IndexError):
            runner.decode(ids, [position], [list(range(80))])
    runner.decode([49151], [80 * PAGE_TOKENS - 1], [list(range(80))])


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
        with pytest.raises(headers.GGUFError, match=name):
            gguf.GGUFFile(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small GGUF of every kind of value, with two tensors."""
    path = tmp_path_factory.mktemp("gguf") / "small"
    writer = GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_float32("a.float", 1.5)
    writer.add_bool("a.truth", True)
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_array("some.words", ["one", "two"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b", "ab", "<end>"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_tensor("token_embd.weight", np.ones((4, 64), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(64, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content, whole = path.read_bytes(), gguf.GGUFFile(path)
    assert set(whole.tensors) == {"token_embd.weight", "output_norm.weight"}
    tokenizer = gguf_tokenizer.build_tokenizer(whole.metadata)
    assert tokenizer
    assert tokenizer.encode("ab<end>").ids == [2, 3]
    return content


# Every number in the header is smaller than 2^32 where it is sensible: high bytes make it huge.
@settings(max_examples=cases(200, 1500), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 1000), put=st.binary(min_size=1, max_size=8), cut=st.integers(0, 2000))
def test_a_file_of_any_content_is_read_or_refused(small: bytes, tmp_path: Path, at: int, put: bytes, cut: int) -> None:
    """Bytes changed or cut off: a GGUFError with the path or a file, never another exception."""
    path = tmp_path / "any"
    path.write_bytes((small[:at] + put + small[at + len(put) :])[: cut if cut < 1200 else None])
    refused = ""
    try:
        file = gguf.GGUFFile(path)
        with headers.naming_file(path):
            read_gguf_tokenizer(file)
            cpu.can_run(file)
            for tensor in file.tensors.values():
                tensor.dense()
    except headers.GGUFError as error:
        refused = str(error)
    assert not refused or refused.startswith(str(path))
