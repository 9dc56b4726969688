"""The unmodified forward of any causal LM of transformers, as the engine's runner.

`PagedCache` takes the place of transformers' cache, and the mask is complete (4-D), which every attention
implementation accepts. Slower than `llama`, and the reference for it. Knows transformers. Knows nothing of requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..engine.kv_pages import PAGE_TOKENS
from ..engine.runner import Span
from .pool import pool_zeros

CHECKED_TOKENS = 48
MOST_ERROR = 0.1  # relative to the logits: bfloat16 rounding gives some hundredths, a wrong position or mask about 1


class PagedCache:
    """Keys and values of all running requests: one pool of pages for each layer, and one more page for padding.

    Padding is computed with its row and may give NaN. Its results go to that extra page, which is never read; page 0,
    which short rows read, stays zero.

    Replaces a transformers cache in one forward; `set_places` sets where the step writes and what it reads.
    """

    def __init__(self, config: Any, pages: int, device: torch.device, dtype: torch.dtype) -> None:
        heads, dim = heads_and_dim(config)
        self.padding = pages * PAGE_TOKENS  # the place
        shape = (config.num_hidden_layers, (pages + 1) * PAGE_TOKENS, heads, dim)
        self.keys, self.values = pool_zeros(shape, dtype, device), pool_zeros(shape, dtype, device)
        self._write = self._read = torch.empty(0, dtype=torch.long)
        self._rows = 0

    def set_places(self, write: torch.Tensor, read: torch.Tensor) -> None:
        """Before a forward. write: (rows, new) places in the pool; read: (rows, blocks) page numbers."""
        self._write, self._read, self._rows = write.flatten(), read.flatten(), read.shape[0]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store (rows, heads, new, dim); return each row's (rows, heads, blocks * page, dim), called by the model."""
        return self._exchange(self.keys[layer_idx], keys), self._exchange(self.values[layer_idx], values)

    def _exchange(self, pool: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        _, heads, _, dim = new.shape
        pool.index_copy_(0, self._write, new.transpose(1, 2).reshape(-1, heads, dim))
        pages = pool.view(-1, PAGE_TOKENS, heads, dim).index_select(0, self._read)
        return pages.view(self._rows, -1, heads, dim).transpose(1, 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Called by some models although positions are given; the value is not used."""
        return 0


class TransformersRunner:
    """A transformers model with a language head. Shorter rows are padded on the left: the last column is the newest."""

    batch_invariant = False

    def __init__(self, model: Any) -> None:
        self._model = model
        self._config = config = model.config.get_text_config()
        self.context: int = config.max_position_embeddings
        # Sliding window: in some models all layers, or those that `layer_types` names, attend only to the newest
        # tokens.
        uses = getattr(config, "use_sliding_window", True)
        self._window: int | None = getattr(config, "sliding_window", None) if uses else None
        self._by_type = bool(getattr(config, "layer_types", None)) and self._window is not None
        self.vocab: int = len(model.get_input_embeddings().weight)

    @property
    def kind(self) -> str:
        """The dtype of the weights."""
        return str(self._model.dtype).removeprefix("torch.")

    @property
    def bytes(self) -> int:
        """Size of the weights."""
        return sum(parameter.nbytes for parameter in self._model.parameters())

    @property
    def token_bytes(self) -> int:
        """Size of the keys and values of one token."""
        heads, dim = heads_and_dim(self._config)
        return int(2 * self._config.num_hidden_layers * heads * dim * self._model.dtype.itemsize)

    def allocate(self, pages: int) -> None:
        self._cache = PagedCache(self._config, pages, self._model.device, self._model.dtype)

    @torch.inference_mode()
    def check(self) -> None:
        """Compare the logits over pages with those of the model's own forward, for a short text.

        Raises ValueError if they differ: the forward then needs something that pages, masks and positions lack."""
        generator = torch.Generator().manual_seed(1)
        length = min(CHECKED_TOKENS, self.context)
        ids = torch.randint(0, self.vocab, (length,), generator=generator).tolist()
        pages = list(range(1, 2 + length // PAGE_TOKENS))
        self.allocate(len(pages) + 1)
        given = torch.tensor([ids], device=self._model.device)
        expected = self._model(input_ids=given, use_cache=False).logits[0].float()
        first = length - 4
        parts = [self.all_logits(ids[:first], pages)]
        parts += [self.decode([ids[place]], [place], [pages]) for place in range(first, length)]
        found = torch.cat(parts)
        error = float((found - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm())
        if not error < MOST_ERROR:
            raise ValueError(f"its logits over the engine's pages differ from its own forward's by {error:.0%}")

    @property
    def pool_bytes(self) -> int:
        """Size of the pool of pages."""
        return self._cache.keys.nbytes + self._cache.values.nbytes

    def prefill(self, ids: Sequence[int], spans: Sequence[Span]) -> torch.Tensor:
        rows, at = [], 0
        for span in spans:
            rows.append(list(ids[at : at + span.stop - span.start]))
            at += span.stop - span.start
        places = [range(span.start, span.stop) for span in spans]
        return self._forward(rows, places, [span.pages for span in spans])[:, -1]

    def all_logits(self, ids: Sequence[int], pages: Sequence[int], start: int = 0) -> torch.Tensor:
        return self._forward([list(ids)], [range(start, start + len(ids))], [pages], keep=0)[0]

    def decode(self, ids: Sequence[int], positions: Sequence[int], pages: Sequence[Sequence[int]]) -> torch.Tensor:
        return self._forward([[token] for token in ids], [range(p, p + 1) for p in positions], pages)[:, -1]

    def zero_pages(self, pages: Sequence[int]) -> None:
        where = torch.tensor(pages, device=self._model.device)
        for pool in (self._cache.keys, self._cache.values):
            layers, _, *rest = pool.shape
            pool.view(layers, -1, PAGE_TOKENS, *rest).index_fill_(1, where, 0)

    def _forward(
        self, ids: list[list[int]], places: list[range], pages: Sequence[Sequence[int]], keep: int = 1
    ) -> torch.Tensor:
        """Logits of the last `keep` columns, 0: of all, (rows, columns, vocab).

        Padding attends to its row's first key; its result is not read."""
        width = max(map(len, ids))
        blocks = max(math.ceil(place.stop / PAGE_TOKENS) for place in places)
        device = self._model.device
        padding = [[0] * (width - len(row)) for row in ids]
        write = [
            [row[p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS for p in place]
            for row, place in zip(pages, places, strict=True)
        ]
        where = torch.tensor([[*pad, *place] for pad, place in zip(padding, places, strict=True)], device=device)
        self._cache.set_places(
            torch.tensor(
                [[self._cache.padding] * len(pad) + row for pad, row in zip(padding, write, strict=True)], device=device
            ),
            torch.tensor([([*row[:blocks]] + [0] * blocks)[:blocks] for row in pages], device=device),
        )
        keys, queries = torch.arange(blocks * PAGE_TOKENS, device=device), where[:, None, :, None]
        visible: Any = keys <= queries  # (rows, 1, width, keys)
        if self._window is not None:
            within = visible & (keys > queries - self._window)
            visible = {"full_attention": visible, "sliding_attention": within} if self._by_type else within
        output = self._model(
            input_ids=torch.tensor([pad + row for pad, row in zip(padding, ids, strict=True)], device=device),
            position_ids=where,
            attention_mask=visible,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        return output.logits.float()  # type: ignore[no-any-return]


def heads_and_dim(config: Any) -> tuple[int, int]:
    """Key heads and their width."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
