"""Models of other makes, tiny and seeded, saved by transformers: served as transformers computes them, or refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from gguf import GGUFWriter
from lab_model.encoders.embedder import Embedder
from lab_model.engine.kv_pages import PAGE_TOKENS
from lab_model.errors import CatalogueError
from lab_model.models.catalogue import Entry
from lab_model.models.causal import load_causal
from lab_model.models.encoder import pooling_of
from lab_model.models.sources import resolve_source
from lab_model.models.tokenizers import read_gguf_tokenizer
from lab_model.text.gguf_tokenizer import build_tokenizer
from lab_model.weights import gemma
from lab_model.weights.gguf import GGUFFile
from tiny import one_thread  # noqa: F401

MARGIN = 1e-3  # of the largest logit over the next: below it rounding decides
KOREAN_AND_ENGLISH = "안녕하세요 세계, the cat sat on the mat. 오늘은 고양이가 the dog와 함께 ate the hat. "

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": tiny.VOCABULARY}
LONG = {"max_position_embeddings": tiny.CONTEXT, "num_key_value_heads": 2}


def config(name: str) -> Any:
    if name in ("llama", "qwen2", "qwen3", "gpt2"):
        return tiny.config(name)
    if name == "gemma3":
        return transformers.Gemma3TextConfig(
            **SHAPE, **ENDS, **LONG, head_dim=16, sliding_window=32, layer_types=["sliding_attention", "full_attention"]
        )
    if name == "phi3":
        return transformers.Phi3Config(**SHAPE, **ENDS, **LONG, sliding_window=48)
    if name == "olmo2":
        return transformers.Olmo2Config(**SHAPE, **ENDS, **LONG)
    if name == "qwen2-window":
        return transformers.Qwen2Config(
            **SHAPE, **ENDS, **LONG, use_sliding_window=True, sliding_window=40, max_window_layers=1
        )
    if name == "mistral":
        return transformers.MistralConfig(**SHAPE, **ENDS, **LONG, sliding_window=24)
    if name == "roberta":
        return transformers.RobertaConfig(**SHAPE, **ENDS, max_position_embeddings=tiny.CONTEXT, is_decoder=True)
    assert name == "mamba"
    return transformers.MambaConfig(hidden_size=64, num_hidden_layers=2, **ENDS)


def write(folder: Path, name: str) -> tuple[Entry, Any]:
    """A folder of a seeded model of this architecture, and the model, in float32."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(name)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
            else:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return Entry(id=name, kind="base", source=f"file:{folder}", dtype="float32"), model


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "gpt2", "gemma3", "phi3", "olmo2", "qwen2-window", "mistral"]
)
@torch.inference_mode()
def test_a_model_of_transformers_is_served_right(tmp_path: Path, name: str) -> None:
    """Teacher-forced over 200 tokens, prefilled and decoded, past every sliding window: the same token is the likeliest
    wherever the margin is not rounding."""
    entry, model = write(tmp_path, name)
    runner, tokenizer, _ = load_causal(entry, resolve_source(entry), torch.device("cpu"))
    ids = (tokenizer.encode(KOREAN_AND_ENGLISH) * 10)[:200]
    expected = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    pages = list(range(1, 2 + len(ids) // PAGE_TOKENS))
    runner.allocate(len(pages) + 1)
    prefilled = 150
    parts = [runner.all_logits(ids[:prefilled], pages)]
    parts += [runner.decode([ids[place]], [place], [pages]) for place in range(prefilled, len(ids))]
    found = torch.cat(parts)
    two = expected.topk(2).values
    clear = two[:, 0] - two[:, 1] > MARGIN
    assert clear.sum() > 150
    assert torch.equal(found.argmax(-1)[clear], expected.argmax(-1)[clear])


@pytest.mark.parametrize("name", ["roberta", "mamba"])
def test_a_model_that_pages_cannot_hold_is_refused_by_name(tmp_path: Path, name: str) -> None:
    entry, model = write(tmp_path, name)
    with pytest.raises(CatalogueError, match=type(model).__name__.partition("For")[0]):
        load_causal(entry, resolve_source(entry), torch.device("cpu"))


def test_the_ends_are_those_of_the_generation_config(tmp_path: Path) -> None:
    """Lists too: chat models end a turn by another token than a text."""
    entry, _ = write(tmp_path, "llama")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    _, tokenizer, ends = load_causal(entry, resolve_source(entry), torch.device("cpu"))
    assert tokenizer.stop_ids(ends) == {0, 2, 7}


ENCODER = {**SHAPE, "vocab_size": tiny.VOCABULARY, "max_position_embeddings": 66, "attn_implementation": "sdpa"}


@pytest.mark.parametrize(
    "config",
    [
        transformers.BertConfig(**ENCODER | {"max_position_embeddings": 64}),
        transformers.RobertaConfig(**ENCODER),
        transformers.DistilBertConfig(
            dim=64, hidden_dim=128, n_layers=2, n_heads=4, vocab_size=tiny.VOCABULARY, max_position_embeddings=64
        ),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "max"])
@torch.inference_mode()
def test_an_encoders_vectors_do_not_depend_on_padding(config: Any, pooling: Any) -> None:
    """Each text's vector among others is the one that transformers gives for it alone, up to the longest text."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).float().eval()
    embedder = Embedder(model, 512, pooling, normalize=False)
    assert embedder.context == 64
    rows = [[5, 6, 7], list(range(10, 74)), [9]]
    for row, vector in zip(rows, embedder.forward(rows), strict=True):
        hidden = model(torch.tensor([row])).last_hidden_state[0]
        expected = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1], "max": hidden.amax(0)}[pooling]
        torch.testing.assert_close(torch.tensor(vector), expected, atol=1e-4, rtol=1e-3)


def test_pooling_and_normalization_are_those_of_the_folder(tmp_path: Path) -> None:
    assert pooling_of(tmp_path) == ("mean", True)
    modules = [{"type": "sentence_transformers.models.Transformer"}, {"type": "sentence_transformers.models.Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    place = tmp_path / "1_Pooling"
    place.mkdir()
    config = {"word_embedding_dimension": 64, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (place / "config.json").write_text(json.dumps(config))
    assert pooling_of(tmp_path) == ("cls", False)
    (place / "config.json").write_text(json.dumps({"pooling_mode_weightedmean_tokens": True}))
    with pytest.raises(CatalogueError, match="pooling_mode_weightedmean_tokens is not supported"):
        pooling_of(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([*modules, {"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(CatalogueError, match="modules of type Dense"):
        pooling_of(tmp_path)


# GGUF files


def gguf_of(path: Path, model: Any) -> None:
    """A Gemma 3 as llama.cpp's converter writes it: its names of tensors, and norms that hold 1 + weight."""
    config = model.config
    writer = GGUFWriter(path, "gemma3")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(PIECES)
    writer.add_token_scores(SCORES)
    writer.add_token_types([3 if piece.startswith("<|") else 6 if piece.startswith("<0x") else 1 for piece in PIECES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    parts = {name: part for part, name in gemma.PARTS.items()}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        kept = name.removeprefix("model.").removesuffix(".weight")
        layer = re.match(r"layers\.(\d+)\.(.*)", kept)
        names = {"embed_tokens": "token_embd", "norm": "output_norm"}
        stored = f"blk.{layer[1]}.{parts[layer[2]]}" if layer else names[kept]
        writer.add_tensor(f"{stored}.weight", (value + 1 if kept.endswith("norm") else value).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


PIECES = ["<|unk|>", "<|begin|>", "<|end|>", *[f"<0x{byte:02X}>" for byte in range(256)]]
PIECES += ["▁", "c", "a", "t", "at", "cat", "▁cat", "▁c"]
PIECES += [f"w{number}" for number in range(tiny.VOCABULARY - len(PIECES))]
SCORES = [-float(place) for place in range(len(PIECES))]


@torch.inference_mode()
def test_a_gemma_of_a_gguf_file_is_read_right(tmp_path: Path) -> None:
    """Six layers, of which one sees everything; its tokenizer; the begin and end that the file asks for."""
    torch.manual_seed(0)
    shape = SHAPE | {"num_hidden_layers": 6}
    ends = ENDS | {"bos_token_id": 1, "eos_token_id": 2}
    made = transformers.Gemma3TextConfig(
        **shape, **ends, **LONG, head_dim=16, sliding_window=32, query_pre_attn_scalar=16
    )
    model = transformers.Gemma3ForCausalLM(made).float().eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.2)
    gguf_of(tmp_path / "g.gguf", model)
    entry = Entry(id="g", kind="base", source=f"file:{tmp_path}/g.gguf", dtype="float32")
    runner, tokenizer, stops = load_causal(entry, resolve_source(entry), torch.device("cpu"), folder=tmp_path)
    assert stops == {2}
    assert runner.context == tiny.CONTEXT
    ids = [1, *torch.randint(3, tiny.VOCABULARY, (120,)).tolist()]
    runner.allocate(12)
    found = runner.all_logits(ids, list(range(1, 11)))
    torch.testing.assert_close(found, model(torch.tensor([ids])).logits[0], atol=1e-3, rtol=1e-3)
    cat, space = PIECES.index("▁cat"), PIECES.index("▁")
    assert tokenizer.encode("cat cat") == [1, PIECES.index("cat"), cat]
    assert tokenizer.encode("é ") == [1, 3 + 0xC3, 3 + 0xA9, space]
    assert tokenizer.decode(tokenizer.encode("a cat é 안")) == "a cat é 안"


def test_a_large_tokenizer_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab_model.models.tokenizers.MANY_TOKENS", 10)
    model = transformers.Gemma3ForCausalLM(config("gemma3"))
    gguf_of(tmp_path / "g.gguf", model)
    file = GGUFFile(tmp_path / "g.gguf")
    first = read_gguf_tokenizer(file, tmp_path)
    monkeypatch.setattr("lab_model.models.tokenizers.build_tokenizer", lambda _: pytest.fail("it is converted again"))
    again = read_gguf_tokenizer(file, tmp_path)
    assert first
    assert again
    assert first.encode("cat é") == again.encode("cat é")


def test_llama_3_takes_whole_words_and_begins_texts() -> None:
    """`ignore_merges`: a word of the vocabulary is its token even where merges lead elsewhere; `add_bos_token`."""
    tokens = ["a", "b", "c", "ab", "bc", "abc", "<begin>"]
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1, 1, 1, 1, 1, 1, 3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 6,
    }
    llama = build_tokenizer(values | {"tokenizer.ggml.pre": "llama-bpe"})
    other = build_tokenizer(values | {"tokenizer.ggml.pre": "qwen2"})
    asked = build_tokenizer(values | {"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.add_bos_token": True})
    assert llama
    assert other
    assert asked
    assert llama.encode("abc").ids == [6, 5]
    assert other.encode("abc").ids == [3, 2]
    assert asked.encode("abc").ids == [6, 3, 2]
    assert llama.encode("abc", add_special_tokens=False).ids == [5]
