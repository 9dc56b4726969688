"""The forward of the Llama family (Llama, Mistral, Qwen2, Qwen3, SmolLM) in torch, for serving.

The tokens of all requests of a step form one flat batch: linear layers compute one matrix, attention uses each
request's own pages. On two cores transformers' forward spends more than half of a decode step in small operators, masks
and copies for each layer. Knows weights and tensors. Knows nothing of requests, queues or files.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import embedding, scaled_dot_product_attention, silu

from ..engine.kv_pages import PAGE_TOKENS
from ..engine.runner import Span
from ..weights.llama import LlamaWeights
from .cuda_graphs import CudaGraphs, next_power_of_two
from .pool import pool_zeros

# From this number of rows on, matrix products of all rows are faster than torch's attention, which handles each row and
# head separately.
MANY_ROWS = 5
Attend = Callable[[int, torch.Tensor], torch.Tensor]  # (layer, queries) -> attention's result


class LlamaRunner:
    """Weights with a pool of pages. `prefill` and `decode` give logits as (rows, vocab), float32."""

    batch_invariant = False  # torch's products of few rows may round differently from those of many

    def __init__(self, weights: LlamaWeights, device: torch.device, kv_dtype: torch.dtype) -> None:
        """kv_dtype: of keys and values in the pool."""
        self._weights = w = weights
        self.device, self.dtype, self._kv_dtype = device, w.dtype, kv_dtype
        self.context, self.vocab = w.context, len(w.embedding)
        self.graphs = CudaGraphs(self.step, device) if device.type == "cuda" else None

    @property
    def kind(self) -> str:
        """The dtype of the weights."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def bytes(self) -> int:
        """Size of the weights."""
        return self._weights.bytes

    @property
    def token_bytes(self) -> int:
        """Size of the keys and values of one token."""
        w = self._weights
        return len(w.layers) * 2 * w.kv_heads * w.head_dim * self._kv_dtype.itemsize

    def allocate(self, pages: int) -> None:
        w = self._weights
        rows = min(self.context, pages * PAGE_TOKENS)  # a model may name a context of millions
        angles = torch.arange(rows, dtype=torch.float32)[:, None] * w.rotations.float().cpu()[None]
        # (context, head_dim / 2), complex: a head's pairs are turned by one product.
        self._turns = torch.polar(torch.full_like(angles, w.rotation_scale), angles).to(self.device)
        # As long as the next power of two of pages: cuda_graphs rounds up.
        self._columns = torch.arange(next_power_of_two(-(-rows // PAGE_TOKENS)) * PAGE_TOKENS, device=self.device)
        # By head, keys before values: each layer needs one write and one gather, and the data of a head is contiguous.
        shape = (len(w.layers), 2 * w.kv_heads, pages * PAGE_TOKENS, w.head_dim)
        self._pool = pool_zeros(shape, self._kv_dtype, self.device)
        self._pages = self._pool.view(len(w.layers), 2 * w.kv_heads, pages, -1)
        self._layers = list(zip(self._pool.unbind(), self._pages.unbind(), strict=True))

    # ---- the engine's calls

    @property
    def pool_bytes(self) -> int:
        """Size of the pool of pages."""
        return self._pool.nbytes

    def prefill(self, ids: Sequence[int], spans: Sequence[Span]) -> torch.Tensor:
        """Compute the spans' tokens, whose `ids` follow each other. The logits of each span's last token."""
        ends = torch.tensor([span.stop - span.start for span in spans]).cumsum(0) - 1
        return self._logits(self._prefill(ids, spans).index_select(0, ends.to(self.device)))

    def all_logits(self, ids: Sequence[int], pages: Sequence[int], start: int = 0) -> torch.Tensor:
        return self._logits(self._prefill(ids, [Span(start, start + len(ids), pages)]))

    def decode(self, ids: Sequence[int], positions: Sequence[int], pages: Sequence[Sequence[int]]) -> torch.Tensor:
        """One more token for each row. positions: of these tokens in their texts."""
        if self.graphs is not None:
            return self.graphs.decode(ids, positions, pages)
        device = self.device
        where = torch.tensor(positions, device=device)
        write = torch.tensor(
            [row[p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS for row, p in zip(pages, positions, strict=True)],
            device=device,
        )
        groups = [self._group(members, positions, pages) for members in group_by_length(positions)]
        x = self._embed(torch.tensor(ids, device=device))

        def attend(layer: int, q: torch.Tensor) -> torch.Tensor:
            if len(groups) == 1:
                return self._look(layer, q, groups[0])
            out = torch.empty(len(q), q[0].numel(), dtype=self._kv_dtype, device=device)
            for group in groups:
                out[group.members] = self._look(layer, q[group.members], group)
            return out

        return self._logits(self._through(x, where, write, attend))

    def step(
        self, ids: torch.Tensor, where: torch.Tensor, write: torch.Tensor, read: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """`decode` of one shape, tensors alone: what cuda_graphs records."""
        hidden = self._columns[: read.shape[1] * PAGE_TOKENS] >= lengths[:, None]
        mask = torch.zeros(hidden.shape, dtype=self._kv_dtype, device=self.device).masked_fill_(hidden, -math.inf)
        group = Group(ids, read.flatten(), 0, mask[:, None, None], many=False)
        x = self._through(self._embed(ids), where, write, lambda layer, q: self._look(layer, q, group))
        return self._logits(x)

    def zero_pages(self, pages: Sequence[int]) -> None:
        self._pages.index_fill_(2, torch.tensor(pages, device=self.device), 0)

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
        read = torch.cat(owners).to(device)
        units = [list(split_at_pages(span)) for span in spans]
        masks = [[self._mask(start, stop) for start, stop in each] for each in units]
        x = self._embed(torch.tensor(ids, device=device))

        def attend(layer: int, q: torch.Tensor) -> torch.Tensor:
            q = q.to(self._kv_dtype)
            out, at, first = torch.empty_like(q), 0, 0
            group = q.shape[2]
            gathered = self._gather(layer, read)
            for pages, span_units, span_masks in zip(owners, units, masks, strict=True):
                kv = gathered[:, first : first + len(pages) * PAGE_TOKENS].unsqueeze(1).expand(-1, group, -1, -1)
                first += len(pages) * PAGE_TOKENS
                for (start, stop), mask in zip(span_units, span_masks, strict=True):
                    rows = slice(at, at + stop - start)
                    query = q[rows].permute(1, 2, 0, 3)
                    keys, values = kv[: w.kv_heads, :, :stop], kv[w.kv_heads :, :, :stop]
                    seen = scaled_dot_product_attention(query, keys, values, attn_mask=mask)
                    out[rows] = seen.permute(2, 0, 1, 3)
                    at += stop - start
            return out.view(len(out), -1)

        return self._through(x, where.to(device), write, attend)

    def _mask(self, start: int, stop: int) -> torch.Tensor:
        """The causal mask of tokens [start, stop): (new, keys), 0 or -inf."""
        hidden = self._columns[:stop] > self._columns[start:stop, None]
        return torch.zeros(hidden.shape, dtype=self._kv_dtype, device=self.device).masked_fill_(hidden, -math.inf)

    def _through(self, x: torch.Tensor, where: torch.Tensor, write: torch.Tensor, attend: Attend) -> torch.Tensor:
        """All layers. x: (tokens, width); where and write: (tokens,)."""
        w = self._weights
        rows, both = len(x), w.heads + w.kv_heads
        turns = self._turns[where][:, None]  # (tokens, 1, head_dim / 2)
        for index, layer in enumerate(w.layers):
            # 1. Queries, keys and values; the first two turned by their positions, as complex numbers.
            qkv = layer.qkv(x).view(rows, -1, w.head_dim)
            if layer.query_norm is not None and layer.key_norm is not None:
                qkv[:, : w.heads] = layer.query_norm(qkv[:, : w.heads])
                qkv[:, w.heads : both] = layer.key_norm(qkv[:, w.heads : both])
            qkv = qkv.float()
            torch.view_as_complex(qkv.view(rows, -1, w.head_dim // 2, 2))[:, :both].mul_(turns)
            # 2. Into the pages, and attention over them.
            self._layers[index][0].index_copy_(1, write, qkv[:, w.heads :].transpose(0, 1).to(self._kv_dtype))
            seen = attend(index, qkv[:, : w.heads].view(rows, w.kv_heads, -1, w.head_dim))
            x = x + layer.output(seen.to(w.dtype))
            # 3. The MLP.
            gate, up = layer.gate_up(x).chunk(2, -1)
            x = x + layer.down(silu(gate).mul_(up))
        return x

    def _gather(self, layer: int, read: torch.Tensor) -> torch.Tensor:
        """The pages' keys and values, one page after the other: (2 * kv_heads, tokens, head_dim)."""
        w = self._weights
        return self._layers[layer][1].index_select(1, read).view(2 * w.kv_heads, -1, w.head_dim)

    def _look(self, layer: int, q: torch.Tensor, group: Group) -> torch.Tensor:
        """Attention of one new token a row. q: (rows, kv_heads, group, head_dim); (rows, heads * head_dim).

        The query heads that share a key head are treated as a sequence: keys are read once for all of them.
        """
        w = self._weights
        kv = self._gather(layer, group.read).view(2, w.kv_heads, len(q), -1, w.head_dim)
        if not group.many:
            keys, values = (kv.narrow(3, 0, group.length) if group.length else kv).transpose(1, 2).unbind()
            seen = scaled_dot_product_attention(q.to(self._kv_dtype), keys, values, attn_mask=group.mask)
            return seen.reshape(len(q), -1)
        keys, values = kv.flatten(1, 2).unbind()  # (kv_heads * rows, keys, head_dim)
        query = q.transpose(0, 1).to(self._kv_dtype, memory_format=torch.contiguous_format).flatten(0, 1)
        scores = torch.baddbmm(group.mask, query, keys.transpose(1, 2), alpha=w.head_dim**-0.5)  # type: ignore[arg-type]
        seen = torch.bmm(scores.softmax(-1), values)
        return seen.view(w.kv_heads, len(q), -1).transpose(0, 1).reshape(len(q), -1)

    def _group(self, members: list[int], positions: Sequence[int], pages: Sequence[Sequence[int]]) -> Group:
        lengths = [positions[i] + 1 for i in members]
        longest = max(lengths)
        blocks = -(-longest // PAGE_TOKENS)
        read = torch.tensor([page for i in members for page in [*pages[i][:blocks], *[0] * (blocks - len(pages[i]))]])
        many = len(members) >= MANY_ROWS and self.device.type == "cpu"
        mask = None
        if many or min(lengths) < longest:
            columns = self._columns[: blocks * PAGE_TOKENS if many else longest]
            hidden = columns >= torch.tensor(lengths, device=self.device)[:, None]
            mask = torch.zeros(hidden.shape, dtype=self._kv_dtype, device=self.device).masked_fill_(hidden, -math.inf)
            if many:
                w = self._weights
                mask = mask.repeat(w.kv_heads, 1)[:, None].expand(-1, w.heads // w.kv_heads, -1).contiguous()
            else:
                mask = mask[:, None, None]
        return Group(torch.tensor(members, device=self.device), read.to(self.device), longest, mask, many)

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return embedding(ids, self._weights.embedding)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        return self._weights.head(x).float()


@dataclass(frozen=True)
class Group:
    """Rows of similar length that decode together.

    length: of the longest, 0: all that `read` holds. mask: 0 or -inf, (rows, 1, 1, length), or None where all are as
    long; of `many`, (kv_heads * rows, 1, length): on the CPU torch's one operator for attention takes longer for many
    small problems than three of its matrix products.
    """

    members: torch.Tensor
    read: torch.Tensor
    length: int
    mask: torch.Tensor | None
    many: bool


def group_by_length(positions: Sequence[int]) -> list[list[int]]:
    """Rows in groups whose shortest row is at least half as long as the longest, so that padding is less than half."""
    groups: list[list[int]] = []
    for i in sorted(range(len(positions)), key=lambda i: -positions[i]):
        if groups and 2 * (positions[i] + 2 * PAGE_TOKENS) >= positions[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [sorted(group) for group in groups]


def split_at_pages(span: Span) -> list[tuple[int, int]]:
    """The span in units that begin at whole pages, so that a token's attention is computed in the same way wherever the
    prefill began."""
    edges = [span.start, *range((span.start // PAGE_TOKENS + 1) * PAGE_TOKENS, span.stop, PAGE_TOKENS), span.stop]
    return list(itertools.pairwise(edges))
