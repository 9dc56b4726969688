"""The forward of the Llama family (Llama, Mistral, Qwen2, Qwen3, SmolLM) as a server needs it.

All tokens of a step lie in one flat row, whoever they belong to: linear layers see one matrix, attention each request's
own pages. Knows weights and tensors; knows nothing of requests, queues or files.

Why not the model's own code: on two cores more than half of a decode step was small operators, masks and copies that
transformers makes for every layer, and its linear layers know no kernel for few rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from .engine import Span
from .graphs import Graphs, rounded
from .pages import PAGE_TOKENS

# Up to this many rows the weights' way from memory is what costs: 4 bits a weight. Above it, int8 arithmetic.
FEW_ROWS = 4
Attend = Callable[[int, torch.Tensor], torch.Tensor]  # (layer, queries) -> what they saw

LEVELS = 32000  # the largest activation level; 128 more still fit 16 bits
GROUP = 32  # weights that share a scale: GGUF's block and the int4 kernel's group


class Dense:
    """A linear layer in the weights' own type: any device, the reference for the other."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight, self._bias = weight, bias

    @property
    def bytes(self) -> int:
        return self._weight.nbytes

    def __call__(self, x: torch.Tensor, _few: bool) -> torch.Tensor:
        return linear(x, self._weight, self._bias)

    def onto(self, sum_: torch.Tensor, x: torch.Tensor, _few: bool) -> torch.Tensor:
        """sum_ + the layer's output."""
        return sum_ + linear(x, self._weight, self._bias)


class Quantized:
    """A linear layer on the CPU: 4-bit weights for few rows, 8-bit arithmetic for many.

    int4, bfloat16 rows in and out: groups of 32 weights with a scale and a zero point. int8, float32 rows in and out: a
    scale for each output channel and one for each row, so that neighbours never change a row; the sums are integers, so
    that it makes no difference how many rows are computed together.
    """

    def __init__(self, weight: torch.Tensor, blocks: Sequence[torch.Tensor] | None) -> None:
        """weight: (out, in) float32; blocks: the same as 4-bit levels, scales and minima, None for 8 bits always."""
        self._scale = weight.abs().amax(1).clamp_(min=1e-12) / 127  # (out,)
        self._int8 = (weight / self._scale[:, None]).round_().to(torch.int8).t()  # by columns: the kernel's own order
        self._int4: torch.Tensor | None = None
        if blocks is not None:
            levels, scale, minimum = blocks
            self._int4 = torch._convert_weight_to_int4pack_for_cpu(levels.int(), 1)
            # The kernel computes (level - 8) * scale + zero.
            self._groups = torch.stack([scale, minimum + 8 * scale], -1).transpose(0, 1).bfloat16().contiguous()

    @property
    def bytes(self) -> int:
        few = 0 if self._int4 is None else self._int4.nbytes + self._groups.nbytes
        return self._int8.nbytes + self._scale.nbytes + few

    def __call__(self, x: torch.Tensor, few: bool) -> torch.Tensor:
        return self._four(x) if few and self._int4 is not None else self._eight(x).mul_(self._scale)

    def onto(self, sum_: torch.Tensor, x: torch.Tensor, few: bool) -> torch.Tensor:
        """sum_ + the layer's output; writes into sum_."""
        if few and self._int4 is not None:
            return sum_.add_(self._four(x))
        return sum_.addcmul_(self._eight(x), self._scale)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """As an embedding: the weights of these output channels. (tokens, in), float32."""
        return self._int8.t().index_select(0, ids) * self._scale[ids, None]

    def _four(self, x: torch.Tensor) -> torch.Tensor:
        return torch._weight_int4pack_mm_for_cpu(x.bfloat16(), self._int4, GROUP, self._groups)  # type: ignore[arg-type]

    def _eight(self, x: torch.Tensor) -> torch.Tensor:
        """The output but for the channels' scales."""
        digits, scale = quantize(x.float())
        product = torch._int_mm(digits, self._int8)
        return product[len(x) :].add_(product[: len(x)], alpha=256) * scale


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row as 16-bit levels, in two int8 digits, (2 * rows, in): first all high ones, then all low; and its scale.

    One digit for an activation costs 4 % of perplexity: a few of them are a hundred times the others. Scaled by the
    row's length rather than by its maximum, a product with int8 weights stays below 127 * sqrt(in) * LEVELS < 2**31.
    """
    length = torch.linalg.vector_norm(x, 2, -1, True).add_(1e-12)
    levels = x.mul(LEVELS / length).to(torch.int16)
    digits = torch.empty(2 * len(x), x.shape[1], dtype=torch.int8)
    digits[len(x) :] = levels  # the low byte, as a signed number; the high one makes up for its sign
    digits[: len(x)] = levels.add_(128).bitwise_right_shift_(8)
    return digits, length.mul_(1 / LEVELS)


@dataclass
class Layer:
    attention_norm: torch.Tensor
    qkv: Any  # Dense or Quantized
    query_norm: torch.Tensor | None  # Qwen3: over each head
    key_norm: torch.Tensor | None
    output: Any
    mlp_norm: torch.Tensor
    gate_up: Any
    down: Any


@dataclass
class Weights:
    """dtype: of the rows between the layers. rotations: (head_dim / 2,) inverse frequencies."""

    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    context: int
    rotations: torch.Tensor
    rotation_scale: float
    embedding: torch.Tensor | Quantized
    layers: list[Layer]
    norm: torch.Tensor
    head: Any

    @property
    def bytes(self) -> int:
        linears = [part for layer in self.layers for part in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        total = sum(part.bytes for part in [*linears, self.head])
        return int(total + (self.embedding.nbytes if isinstance(self.embedding, torch.Tensor) else 0))


class Llama:
    """Weights with a pool of pages. `prefill` and `decode` give logits as (rows, vocab), float32."""

    def __init__(self, weights: Weights, device: torch.device, kv_dtype: torch.dtype) -> None:
        """kv_dtype: of keys and values in the pool."""
        self._weights = w = weights
        self.device, self.dtype, self._kv_dtype = device, w.dtype, kv_dtype
        self.exact = isinstance(w.head, Quantized)
        self.context = w.context
        angles = torch.arange(w.context, dtype=torch.float32)[:, None] * w.rotations.float().cpu()[None]
        angles = torch.cat([angles, angles], -1)
        sign = torch.ones(w.head_dim)
        sign[: w.head_dim // 2] = -1
        self._cos = (angles.cos() * w.rotation_scale).to(device, w.dtype)  # (context, head_dim)
        self._sin = (angles.sin() * w.rotation_scale * sign).to(device, w.dtype)
        # As long as the next power of two of pages: graphs.py rounds up.
        self._columns = torch.arange(rounded(-(-w.context // PAGE_TOKENS)) * PAGE_TOKENS, device=device)
        self.graphs = Graphs(self.step, device) if device.type == "cuda" else None

    @property
    def kind(self) -> str:
        """What the weights are, in a word."""
        return "int4+int8" if self.exact else str(self.dtype).removeprefix("torch.")

    @property
    def bytes(self) -> int:
        """Of the weights."""
        return self._weights.bytes

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token."""
        w = self._weights
        return len(w.layers) * 2 * w.kv_heads * w.head_dim * self._kv_dtype.itemsize

    def allocate(self, pages: int) -> None:
        w = self._weights
        # A token's keys and values lie side by side: one write and one gather a layer.
        shape = (len(w.layers), pages * PAGE_TOKENS, 2 * w.kv_heads, w.head_dim)
        self._pool = torch.zeros(shape, dtype=self._kv_dtype, device=self.device)
        self._pages = self._pool.view(len(w.layers), pages, -1)

    # ---- what the engine asks

    def prefill(self, ids: Sequence[int], spans: Sequence[Span]) -> torch.Tensor:
        """Compute the spans' tokens, `ids` one after the other; logits of each span's last token."""
        ends = torch.tensor([span.stop - span.start for span in spans]).cumsum(0) - 1
        return self._logits(self._prefill(ids, spans).index_select(0, ends.to(self.device)), False)

    def every(self, ids: Sequence[int], pages: Sequence[int]) -> torch.Tensor:
        return self._logits(self._prefill(ids, [Span(0, len(ids), pages)]), False)

    def decode(self, ids: Sequence[int], positions: Sequence[int], pages: Sequence[Sequence[int]]) -> torch.Tensor:
        """One more token for each row. positions: their places in the rows' texts."""
        if self.graphs is not None:
            return self.graphs.decode(ids, positions, pages)
        device = self.device
        where = torch.tensor(positions, device=device)
        write = torch.tensor(
            [row[p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS for row, p in zip(pages, positions, strict=True)],
            device=device,
        )
        groups = [self._group(members, positions, pages) for members in alike(positions)]
        few = len(ids) <= FEW_ROWS
        x = self._embed(torch.tensor(ids, device=device))

        def attend(layer: int, q: torch.Tensor) -> torch.Tensor:
            if len(groups) == 1:
                return self._look(layer, q, groups[0])
            out = torch.empty_like(q)
            for group in groups:
                out[group.members] = self._look(layer, q[group.members], group)
            return out

        return self._logits(self._through(x, where, write, attend, few), few)

    def step(
        self, ids: torch.Tensor, where: torch.Tensor, write: torch.Tensor, read: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """`decode` of one shape, tensors alone: what graphs.py records."""
        hidden = self._columns[: read.shape[1] * PAGE_TOKENS] >= lengths[:, None]
        mask = torch.zeros(hidden.shape, dtype=self._kv_dtype, device=self.device).masked_fill_(hidden, -math.inf)
        group = Group(ids, read.flatten(), 0, mask[:, None, None])
        x = self._through(self._embed(ids), where, write, lambda layer, q: self._look(layer, q, group), False)
        return self._logits(x, False)

    def wipe(self, pages: Sequence[int]) -> None:
        """Zero these pages: a masked NaN still spoils attention, because 0 * NaN is NaN."""
        for page in pages:
            self._pool[:, page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS].zero_()

    # ---- inside

    def _prefill(self, ids: Sequence[int], spans: Sequence[Span]) -> torch.Tensor:
        device, w = self.device, self._weights
        where = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        owners = [torch.tensor(span.pages) for span in spans]
        write = torch.cat(
            [
                pages[(place := torch.arange(span.start, span.stop)) // PAGE_TOKENS] * PAGE_TOKENS + place % PAGE_TOKENS
                for span, pages in zip(spans, owners, strict=True)
            ]
        ).to(device)
        reads = [pages.to(device) for pages in owners]
        units = [list(cut(span)) for span in spans]
        masks = [[self._mask(start, stop) for start, stop in each] for each in units]
        x = self._embed(torch.tensor(ids, device=device))
        group = w.heads // w.kv_heads
        shape = (group, w.head_dim)

        def attend(layer: int, q: torch.Tensor) -> torch.Tensor:
            out, at = torch.empty_like(q), 0
            for read, span_units, span_masks in zip(reads, units, masks, strict=True):
                kv = self._pages[layer].index_select(0, read).view(-1, 2 * w.kv_heads, w.head_dim).transpose(0, 1)
                kv = kv.unsqueeze(1).expand(-1, group, -1, -1)
                for (start, stop), mask in zip(span_units, span_masks, strict=True):
                    rows = slice(at, at + stop - start)
                    asked = q[rows].view(-1, w.kv_heads, *shape).permute(1, 2, 0, 3)
                    keys, values = kv[: w.kv_heads, :, :stop], kv[w.kv_heads :, :, :stop]
                    seen = scaled_dot_product_attention(asked, keys, values, attn_mask=mask)
                    out[rows].view(-1, w.kv_heads, *shape).copy_(seen.permute(2, 0, 1, 3))
                    at += stop - start
            return out

        return self._through(x, where.to(device), write, attend, False)

    def _mask(self, start: int, stop: int) -> torch.Tensor:
        """What tokens [start, stop) may see: (new, keys), 0 or -inf."""
        hidden = self._columns[:stop] > self._columns[start:stop, None]
        return torch.zeros(hidden.shape, dtype=self._kv_dtype, device=self.device).masked_fill_(hidden, -math.inf)

    def _through(
        self, x: torch.Tensor, where: torch.Tensor, write: torch.Tensor, attend: Attend, few: bool
    ) -> torch.Tensor:
        """All layers. x: (tokens, width); where and write: (tokens,)."""
        w = self._weights
        both = w.heads + w.kv_heads
        inner = torch.bfloat16 if few and self.exact else self.dtype  # of what the int4 kernel takes and gives
        cos, sin = self._cos[where].to(inner)[:, None], self._sin[where].to(inner)[:, None]  # (tokens, 1, head_dim)
        for index, layer in enumerate(w.layers):
            # 1. Queries, keys and values; the first two turned by their positions.
            qkv = layer.qkv(norm(x, layer.attention_norm, w.epsilon, inner), few).view(len(x), -1, w.head_dim)
            if layer.query_norm is not None and layer.key_norm is not None:
                qkv[:, : w.heads] = norm(qkv[:, : w.heads], layer.query_norm, w.epsilon, inner)
                qkv[:, w.heads : both] = norm(qkv[:, w.heads : both], layer.key_norm, w.epsilon, inner)
            turned = qkv[:, :both]
            swapped = turned.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
            turned.mul_(cos).addcmul_(swapped, sin)
            # 2. Into the pages, and attention over them.
            self._pool[index].index_copy_(0, write, qkv[:, w.heads :].to(self._kv_dtype))
            seen = attend(index, qkv[:, : w.heads].to(self._kv_dtype)).reshape(len(x), -1)
            x = layer.output.onto(x, seen.to(inner), few)
            # 3. The MLP.
            gate, up = layer.gate_up(norm(x, layer.mlp_norm, w.epsilon, inner), few).chunk(2, -1)
            x = layer.down.onto(x, silu(gate).mul_(up), few)
        return x

    def _look(self, layer: int, q: torch.Tensor, group: Group) -> torch.Tensor:
        """Attention of one new token a row. q: (rows, heads, head_dim), and so is what returns.

        The query heads that share a key head go as if they were a sequence: keys are read once for all of them.
        """
        w = self._weights
        kv = self._pages[layer].index_select(0, group.read).view(len(q), -1, 2 * w.kv_heads, w.head_dim).transpose(1, 2)
        if group.mask is None:
            kv = kv[:, :, : group.length]
        asked = q.view(len(q), w.kv_heads, -1, w.head_dim)
        seen = scaled_dot_product_attention(asked, kv[:, : w.kv_heads], kv[:, w.kv_heads :], attn_mask=group.mask)
        return seen.reshape(q.shape)

    def _group(self, members: list[int], positions: Sequence[int], pages: Sequence[Sequence[int]]) -> Group:
        lengths = [positions[i] + 1 for i in members]
        longest = max(lengths)
        blocks = -(-longest // PAGE_TOKENS)
        read = torch.tensor([page for i in members for page in [*pages[i][:blocks], *[0] * (blocks - len(pages[i]))]])
        mask = None
        if min(lengths) < longest:
            hidden = self._columns[: blocks * PAGE_TOKENS] >= torch.tensor(lengths, device=self.device)[:, None]
            mask = torch.zeros(hidden.shape, dtype=self._pool.dtype, device=self.device)
            mask = mask.masked_fill_(hidden, -math.inf)[:, None, None]
        return Group(torch.tensor(members, device=self.device), read.to(self.device), longest, mask)

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        table = self._weights.embedding
        return table.rows(ids) if isinstance(table, Quantized) else embedding(ids, table)

    def _logits(self, x: torch.Tensor, few: bool) -> torch.Tensor:
        w = self._weights
        return w.head(norm(x, w.norm, w.epsilon, self.dtype), few).float()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Group:
    """Rows of about one length that decode together. mask: (rows, 1, 1, keys), None where all are `length` long."""

    members: torch.Tensor
    read: torch.Tensor
    length: int
    mask: torch.Tensor | None


def alike(positions: Sequence[int]) -> list[list[int]]:
    """Rows in groups whose shortest is at least half as long as the longest: padding stays below the work itself."""
    groups: list[list[int]] = []
    for i in sorted(range(len(positions)), key=lambda i: -positions[i]):
        if groups and 2 * (positions[i] + 2 * PAGE_TOKENS) >= positions[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [sorted(group) for group in groups]


def cut(span: Span) -> list[tuple[int, int]]:
    """The span in units that begin at whole pages: a token's attention is computed alike wherever a prefill began."""
    edges = [span.start, *range((span.start // PAGE_TOKENS + 1) * PAGE_TOKENS, span.stop, PAGE_TOKENS), span.stop]
    return list(itertools.pairwise(edges))


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, dtype: torch.dtype) -> torch.Tensor:
    """Root mean square normalization (https://arxiv.org/abs/1910.07467) of the last dimension, as `dtype`."""
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return rms_norm(x, (x.shape[-1],), weight, epsilon).to(dtype)
    # torch's own is the same in six operators.
    length = torch.linalg.vector_norm(x, 2, -1, True)
    scale = length.square_().mul_(1 / x.shape[-1]).add_(epsilon).rsqrt_()
    return torch.mul(x * scale, weight, out=torch.empty_like(x, dtype=dtype))
