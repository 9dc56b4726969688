"""The kernels of each kind of processor, as far as this machine can run them, and which one a processor takes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counts import cases
from fixtures_embedded import kernels, missing
from lab_model.engine.runner import Span
from lab_model.runners import kernels as c_kernels
from lab_model.runners.cpu import CpuRunner
from lab_model.runners.llama import LlamaRunner
from lab_model.text import gguf_tokenizer
from lab_model.weights import gguf
from lab_model.weights import llama as llama_weights
from tiny import one_thread  # noqa: F401 - of all tests here

CPU = torch.device("cpu")
PAGES = [[1, 2, 3, 4], [5, 6, 7, 8]]
LENGTH = 100


@pytest.fixture(scope="module")
def ids(file: gguf.GGUFFile) -> list[list[int]]:
    """Two texts of 100 tokens."""
    tokenizer = gguf_tokenizer.build_tokenizer(file.metadata)
    assert tokenizer
    texts = (
        "A cache answers the same question twice and works once. 서울은 대한민국의 수도이다. def add(a, b): a + b\n",
        "Whoever measures a server measures its queue as well: one request in flight is latency, 64 are throughput.\n",
    )
    return [tokenizer.encode(text * 9).ids[:LENGTH] for text in texts]


@pytest.fixture(scope="module", params=c_kernels.VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every one that this machine can run, taken by what starts while it is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_KERNELS", request.param)
        c_kernels.library.cache_clear()
        if lack := missing():
            pytest.skip(f"{request.param}: {lack}")
        c_kernels.library()
        yield request.param
    c_kernels.library.cache_clear()


@pytest.fixture(scope="module")
def runner(variant: str, file: gguf.GGUFFile) -> CpuRunner:
    made = CpuRunner(file, 2)
    made.allocate(10)
    return made


# ---- what they compute


@pytest.fixture(scope="module")
def logits(runner: CpuRunner, ids: list[list[int]]) -> list[torch.Tensor]:
    """Of every token of both texts, each text alone. (100, vocab)"""
    return [runner.all_logits(text, pages) for text, pages in zip(ids, PAGES, strict=True)]


@pytest.fixture(scope="module")
def expected(file: gguf.GGUFFile, ids: list[list[int]]) -> torch.Tensor:
    """The first text's logits by our own forward over the file in float32, which test_embedded.py compares with
    transformers."""
    dense = LlamaRunner(llama_weights.from_file(file, torch.float32, CPU), CPU, torch.float32)
    dense.allocate(max(PAGES[0]) + 1)
    with torch.inference_mode():
        return dense.all_logits(ids[0], PAGES[0])


@pytest.fixture(scope="module")
def seen() -> dict[str, list[torch.Tensor]]:
    """What the variants before this one gave."""
    return {}


def test_logits_are_near_those_of_the_file(expected: torch.Tensor, logits: list[torch.Tensor]) -> None:
    """Though activations have 8 bits: in direction, and in what they say of the next token."""
    assert torch.nn.functional.cosine_similarity(expected, logits[0]).median() > 0.9999
    of_file, ours = expected.log_softmax(-1), logits[0].log_softmax(-1)
    assert (of_file.exp() * (of_file - ours)).sum(-1).mean() < 0.001


def test_all_processors_give_the_same_bits(
    variant: str, logits: list[torch.Tensor], seen: dict[str, list[torch.Tensor]]
) -> None:
    """So an answer may be cached on one machine and served on another."""
    seen[variant] = logits
    for other in seen.values():
        assert all(torch.equal(a, b) for a, b in zip(logits, other, strict=True))


@pytest.mark.parametrize("count", [*range(1, 10), 33])
def test_a_row_is_the_same_alone_and_in_any_batch(
    runner: CpuRunner, ids: list[list[int]], logits: list[torch.Tensor], count: int
) -> None:
    """To the last bit: decoded among `count` rows of both texts as in the prefill of its text alone."""
    rows = [(row % 2, 40 + row) for row in range(count)]  # (text, position)
    got = runner.decode([ids[text][at] for text, at in rows], [at for _, at in rows], [PAGES[text] for text, _ in rows])
    assert torch.equal(got, torch.stack([logits[text][at] for text, at in rows]))


@pytest.mark.parametrize("start", [31, 32])
def test_a_prefill_of_both_is_that_of_each(
    runner: CpuRunner, ids: list[list[int]], logits: list[torch.Tensor], start: int
) -> None:
    """Also where the beginning is there from before. Attention takes rows in twos: from 31 on the first two lie on two
    pages, and one two is of both texts."""
    spans = [Span(start, LENGTH, PAGES[0]), Span(0, LENGTH, PAGES[1])]
    got = runner.prefill(ids[0][start:] + ids[1], spans)
    assert torch.equal(got, torch.stack([logits[0][-1], logits[1][-1]]))


@dataclass(frozen=True)
class Known:
    """A weight of known levels, (out, in), as the file's tensors show theirs."""

    levels: torch.Tensor
    bits: int = 8
    minimum: float = 0.0  # in levels
    scale: float | torch.Tensor = 1.0  # (out, 1)
    broken: int | None = None  # a row whose scales are no numbers

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.levels.shape)

    def dense(self) -> torch.Tensor:
        return self.levels.float()

    def octets(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scale = torch.ones(self.shape[0], self.shape[1] // 32) * self.scale
        if self.broken is not None:
            scale[self.broken] = torch.nan
        return self.levels.to(torch.uint8), scale, scale * self.minimum

    def blocks(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        return self.octets() if self.bits == 4 else None


@pytest.mark.parametrize("peaks", ["none", "far above their row", "where a square is 0"])
@pytest.mark.parametrize("bits", [4, 8])
def test_sums_of_products_are_exact(variant: str, bits: int, peaks: str) -> None:
    """Levels from 0 to 255, the highest with the largest digits of either sign among them: every integer as numpy's.
    And every peak, which is added after all digits, as a float.

    A model without layers whose table holds 1 and -1: what the head multiplies are the norm's weights.
    """
    random, rows, width = np.random.default_rng(bits), 32, 2112
    signs = random.choice([-1, 1], (rows, width))
    signs[0], signs[1] = 1, -1
    values = random.integers(-127, 128, width)
    values[::32] = 127  # then a block's digits are whole
    values[:32] = 127
    taken, worth = np.arange(0), 1.0
    if peaks == "far above their row":
        taken = np.array([*range(33, 33 * 32, 33), width - 1])  # at all places of a block but the first
        values[64:96] = 0  # but for a peak
        values[taken] = random.integers(20_000, 30_000, len(taken))
        assert values[taken].min() > 4 * np.sqrt(np.mean(values**2.0))
    if peaks == "where a square is 0":  # then each value is one, while there is room
        taken, worth = np.arange(width // 16), 2.0**-100
        values[taken] |= 1
        values[len(taken) : 160] = 0  # to the end of the block
    levels = random.integers(0, 2**bits, (rows, width))
    levels[0], levels[1] = 2**bits - 1, 0
    levels[2] = np.where(signs[2] > 0, 2**bits - 1, 0)
    scale = np.float32(0.5) ** (np.arange(rows)[:, None] % 5)  # other ones beside each other

    stub: Any = type("Stub", (), {})()
    stub.metadata = {
        "block_count": 0, "attention.head_count": 1, "embedding_length": width, "context_length": rows,
        "attention.layer_norm_rms_epsilon": 0.0,
    }  # fmt: skip
    stub.tensors = {
        "token_embd.weight": Known(torch.from_numpy(signs + 1), minimum=-1.0),
        "output_norm.weight": Known(torch.from_numpy(values * worth)),
        "output.weight": Known(torch.from_numpy(levels), bits, minimum=-8.0, scale=torch.from_numpy(scale)),
        "blk.0.ffn_down.weight": Known(torch.zeros(32, 32)),
    }
    runner = CpuRunner(stub, 1)
    runner.allocate(1)
    got = runner.all_logits(range(rows), [0]).numpy()

    digits = signs * values
    digits[:, taken] = 0
    want = np.zeros((rows, rows), np.float32)
    for at in range(0, width, 32):
        block = digits[:, at : at + 32]
        want = (want + block @ levels[:, at : at + 32].T * scale.T.astype(float)).astype(np.float32)
        want = (want + np.outer(block.sum(1), -8 * scale.astype(float))).astype(np.float32)
    for at in taken:
        peak = np.outer(signs[:, at] * values[at], (levels[:, at] - 8) * scale[:, 0].astype(float))
        want = (want + peak).astype(np.float32)
    assert np.abs(want).max() > 255 / 16 * 2 ** (bits - 4) * 127 * 32
    assert np.array_equal(got, want * np.float32(worth))


def layered(heads: int, kv_heads: int, dim: int, broken: int | None = None) -> CpuRunner:
    """A model of two layers with random weights, and room for 64 tokens. Each token has peaks elsewhere."""
    random = torch.Generator().manual_seed(dim)
    wide = 2112

    def weight(out: int, width: int, broken: int | None = None) -> Known:
        return Known(torch.randint(0, 256, (out, width), generator=random), 8, -128.0, 2.0**-11, broken)

    table = weight(64, wide, broken)
    table.levels.div_(32, rounding_mode="floor").add_(124)[torch.rand(64, wide, generator=random) < 0.004] = 255
    stub: Any = type("Stub", (), {})()
    stub.metadata = {
        "block_count": 2, "attention.head_count": heads, "attention.head_count_kv": kv_heads, "embedding_length": wide,
        "attention.key_length": dim, "context_length": 64, "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    norm = Known(torch.ones(wide))
    stub.tensors = {"token_embd.weight": table, "output_norm.weight": norm}
    for at in ("blk.0", "blk.1"):
        stub.tensors |= {
            f"{at}.attn_norm.weight": norm,
            f"{at}.attn_q.weight": weight(heads * dim, wide),
            f"{at}.attn_k.weight": weight(kv_heads * dim, wide),
            f"{at}.attn_v.weight": weight(kv_heads * dim, wide),
            f"{at}.attn_output.weight": weight(wide, heads * dim),
            f"{at}.ffn_norm.weight": norm,
            f"{at}.ffn_gate.weight": weight(96, wide),
            f"{at}.ffn_up.weight": weight(96, wide),
            f"{at}.ffn_down.weight": weight(wide, 96),
        }
    made = CpuRunner(stub, 1)
    made.allocate(3)
    return made


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(1, 1, 32), (2, 1, 256), (6, 2, 64), (4, 1, 96), (10, 2, 32), (6, 1, 32), (7, 1, 32), (8, 1, 64)],
)
def test_rows_that_are_computed_together_are_as_alone(variant: str, heads: int, kv_heads: int, dim: int) -> None:
    """To the last bit, with each number of heads that share keys: one, two and three of them take rows in twos."""
    runner = layered(heads, kv_heads, dim)
    ids = torch.randint(0, 64, (63,), generator=torch.Generator().manual_seed(1)).tolist()
    together = runner.all_logits(ids, [1, 2])
    assert together.isfinite().all()
    assert len(together.unique(dim=0)) == 63
    for at in sorted({*range(1, 63, cases(3, 1)), 0, 32, 62}):  # first and second rows of a two, both pages
        assert torch.equal(runner.decode([ids[at]], [at], [[1, 2]])[0], together[at]), f"token {at}"


def test_what_is_no_number_reaches_no_token_before_it(variant: str) -> None:
    """Nor the one that is computed together with it."""
    runner = layered(6, 2, 64, broken=0)
    ids = torch.randint(1, 64, (63,), generator=torch.Generator().manual_seed(1)).tolist()
    clean = runner.all_logits(ids[:41], [1, 2])[:, 1:]  # the table is the head as well: the first logit is none
    ids[41] = 0
    got = runner.all_logits(ids, [1, 2])[:, 1:]
    assert clean.isfinite().all()
    assert torch.equal(got[:41], clean)
    assert got[41:].isnan().all()


# ---- which one a processor takes


@pytest.fixture
def processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands in for /proc/cpuinfo; nobody asks for a variant."""
    monkeypatch.setattr(c_kernels, "PROCESSOR", tmp_path / "cpuinfo")
    monkeypatch.delenv("LAB_KERNELS", raising=False)
    return tmp_path / "cpuinfo"


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the sources and nothing compiled. What is compiled there need not be fast."""
    monkeypatch.setattr(c_kernels, "FLAGS", ["-O0" if flag == "-O3" else flag for flag in c_kernels.FLAGS])
    for source in c_kernels.SOURCE.parent.glob("*.[ch]"):
        shutil.copy(source, tmp_path)
    monkeypatch.setattr(c_kernels, "SOURCE", tmp_path / "kernels.c")
    c_kernels.library.cache_clear()
    yield tmp_path
    c_kernels.library.cache_clear()


AVX2 = "sse4_2 fma avx f16c avx2"
AVX512 = f"{AVX2} avx512f avx512dq avx512bw avx512vl"


@pytest.mark.parametrize(
    ("flags", "takes"),
    [
        (f"{AVX512} avx512_vnni", ["avx512", "avx2"]),
        (f"{AVX512} avx512_vnni avx_vnni", ["avx512", "avxvnni", "avx2"]),
        (f"{AVX2} avx_vnni", ["avxvnni", "avx2"]),
        (AVX512, ["avx2"]),
        (AVX2, ["avx2"]),
    ],
)
def test_a_processor_takes_the_best_that_it_has(processor: Path, flags: str, takes: list[str]) -> None:
    processor.write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\nbugs\t\t: avx512_vnni\n")
    assert c_kernels._runnable() == takes


def test_all_cores_must_have_it(processor: Path) -> None:
    processor.write_text(f"flags : {AVX512} avx512_vnni\nflags : {AVX2}\n")
    assert c_kernels._runnable() == ["avx2"]


def test_what_a_processor_lacks_is_named(processor: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own name; the same where a variant is asked for that it lacks, or that there is not."""
    with pytest.raises(c_kernels.KernelError, match="cpuinfo"):
        c_kernels._runnable()
    processor.write_text("flags : fpu avx f16c\n")
    with pytest.raises(c_kernels.KernelError, match=r"this processor has no avx2, fma$"):
        c_kernels._runnable()
    processor.write_text(f"flags : {AVX2}\n")
    monkeypatch.setenv("LAB_KERNELS", "avxvnni")
    with pytest.raises(c_kernels.KernelError, match=r"this processor has no avx_vnni$"):
        c_kernels._runnable()
    monkeypatch.setenv("LAB_KERNELS", "neon")
    with pytest.raises(c_kernels.KernelError, match="LAB_KERNELS must be one of avx512, avxvnni, avx2"):
        c_kernels._runnable()


def compiler(folder: Path, refuses: str) -> str:
    """One that knows no flag like this."""
    path = folder / "cc"
    path.write_text(f'#!/bin/sh\ncase "$*" in {refuses}) echo "unknown option" >&2; exit 1;; esac\nexec cc "$@"\n')
    path.chmod(0o755)
    return str(path)


@kernels
def test_an_old_compiler_makes_the_next_best(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not know the newer instructions: the start goes on with those it knows, and compiles nothing else."""
    monkeypatch.setenv("CC", compiler(empty, "*-mavx512*|*-mavxvnni*"))
    assert c_kernels.library()
    assert len(list(empty.glob("__pycache__/*.so"))) == 1


@pytest.mark.skipif(not c_kernels._compiler(), reason="no compiler here")
def test_all_are_compiled_for_an_image(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for each, whatever this processor has; 1 only where a compiler makes none of them, and none is kept."""
    known = empty / "known"
    known.mkdir()
    monkeypatch.setenv("CC", compiler(empty, "*-mavxvnni*"))
    assert c_kernels.main(str(known)) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()][-3:] == list(c_kernels.VARIANTS)
    assert len(list(empty.glob("__pycache__/kernels-*.so"))) == 2
    for made in empty.glob("__pycache__/*"):
        made.unlink()
    monkeypatch.setenv("CC", compiler(empty, "*"))
    assert c_kernels.main(str(known)) == 0
    assert len(list(empty.glob("__pycache__/kernels-*.so"))) == 2
    for made in empty.glob("__pycache__/*"):
        made.unlink()
    capsys.readouterr()
    assert c_kernels.main() == 1
    assert capsys.readouterr().out.count("unknown option") == 3
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", os.devnull)
    assert c_kernels.main() == 0


@pytest.mark.skipif(not c_kernels._compiler(), reason="no compiler here")
def test_kernels_that_cannot_be_kept_are_compiled_all_the_same(
    empty: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(c_kernels, "VARIANTS", {"avx2": c_kernels.VARIANTS["avx2"]})
    assert c_kernels.main(str(empty / "missing")) == 0
    assert len(list(empty.glob("__pycache__/kernels-*.so"))) == 1
    assert "cannot be kept" in caplog.text
