"""Samples the next token of each request from the model's logits.

Knows logits, parameters and masks of ids. Knows nothing of pages or text; a grammar is anything that gives a mask.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from .sampling_params import MOST_LOGPROBS, Logprob, SampledToken, SamplingState

log = logging.getLogger(__name__)

# Below this temperature the softmax is a one-hot vector in float32.
GREEDY_BELOW = 1e-4
# Above this one all finite logits have the same weight, and -inf still has none.
HOT = 1e30
# The vocabulary is searched by blocks: their sums and maxima show where to look, at a tenth of the cost of a sort.
BLOCK = 32
# top_k, top_p and min_p first consider this many tokens, then all. A nucleus is rarely larger.
CANDIDATES = 128


class SampleError(Exception):
    """No token for this request: logits or parameters without a finite maximum, or a grammar that failed."""


def sample(logits: torch.Tensor, states: Sequence[SamplingState]) -> list[SampledToken | SampleError]:
    """The next token of each row, or an error. logits: (rows, vocab), float32; may be changed in place.

    A row depends only on its own logits, parameters and random stream. The steps, in this order:
    1. repetition_penalty on tokens of prompt and answer (a logit > 0 is divided by it, else multiplied: CTRL,
       arXiv:1909.05858); then frequency_penalty * count and presence_penalty are subtracted for generated tokens
       (OpenAI);
    2. logit_bias is added;
    3. tokens that the grammar does not allow are excluded;
    4. temperature; below 1e-4, or with top_k 1, or with a top_p so small (1 / vocab) that it keeps one token, the first
       of the most likely tokens is taken without a random draw;
    5. top_k keeps a token if fewer than k tokens are more likely; a k beyond the vocabulary has no effect;
    6. top_p, on the tokens that top_k kept, keeps a token if the more likely ones have less than top_p together;
    7. min_p keeps a token if it is at least min_p times as likely as the most likely one.
    Equally likely tokens are kept or excluded together. Every draw takes one number from the request's stream.
    logprobs are those of the logits as given. A faulty row does not affect others: a NaN or +inf, no logit above -inf,
    an id outside the vocabulary, a grammar that raises or allows no token.
    """
    rows, vocab = logits.shape
    if not rows:
        return []
    logits = logits.float().contiguous()
    if vocab % BLOCK:
        logits = functional.pad(logits, (0, -vocab % BLOCK), value=-math.inf)
    faults: dict[int, SampleError] = {
        i: SampleError("a parameter names a token outside the vocabulary")
        for i, state in enumerate(states)
        if state.highest >= vocab
    }
    # 1. The raw distribution of the rows with logprobs.
    asking = [i for i, state in enumerate(states) if state.sampling.logprobs is not None and i not in faults]
    if asking:
        chosen_from = torch.tensor(asking, device=logits.device)
        # Not logsumexp: it adds up a single row in another order than a row of many.
        raw = (logits if len(asking) == rows else logits[chosen_from]).log_softmax(-1)
    # 2. Apply the parameters and grammars; find the most likely token of every row.
    _shape(logits, states, vocab, faults)
    peaks, picks = _argmax(logits)  # (rows,)
    # 3. Rows that draw: those without a filter from the whole distribution, the others from its head.
    plain: list[int] = []
    cut: list[int] = []
    for i, state in enumerate(states):
        params = state.sampling
        if i in faults or params.temperature < GREEDY_BELOW or params.top_k == 1 or params.top_p * vocab <= 1:
            continue
        (cut if params.top_p < 1 or params.min_p > 0 or 0 < params.top_k < vocab else plain).append(i)
    for part, draw_part in ((plain, _draw), (cut, _draw_cut)):
        if part:
            table = [
                (min(s.temperature, HOT), min(s.top_k, vocab), s.top_p, s.min_p, states[i].random.random())
                for i, s in ((i, states[i].sampling) for i in part)
            ]
            wanted = torch.tensor(table, dtype=torch.double).to(logits.device, non_blocking=True)
            where = torch.tensor(part).to(logits.device, non_blocking=True)
            weights = _weights(logits, peaks, where, wanted[:, :1])
            picks[where] = draw_part(weights, wanted)
    # 4. One transfer: picks, peaks and the requested logprobs.
    packed = [torch.stack([picks.double(), peaks.double()], dim=1).flatten()]
    if asking:
        values, ids = _highest(raw, min(MOST_LOGPROBS, vocab))
        chosen = raw.gather(1, picks[chosen_from, None])
        packed += [part.double().flatten() for part in (chosen, values, ids)]
    results = torch.cat(packed).cpu().numpy()
    # 5. Tokens and faults; each state records its token.
    choices: list[SampledToken | SampleError] = []
    chances = _logprobs(results[2 * rows :], asking, states) if asking else {}
    for i, state in enumerate(states):
        token, peak = int(results[2 * i]), results[2 * i + 1]
        if i not in faults and not math.isfinite(peak):
            empty = peak == -math.inf and state.grammar is not None
            faults[i] = SampleError("the grammar allows no token" if empty else "the model's logits were not finite")
        if i not in faults:
            try:
                state.take(token)
            except Exception as error:
                log.exception("a grammar failed; its request ends with an error")
                faults[i] = SampleError(f"the grammar failed: {type(error).__name__}")
        choices.append(faults.get(i) or SampledToken(token, chances.get(i)))
    return choices


def _shape(logits: torch.Tensor, states: Sequence[SamplingState], vocab: int, faults: dict[int, SampleError]) -> None:
    """Penalties, bias and grammar, in place. Adds to `faults`."""
    well = [(i, state) for i, state in enumerate(states) if i not in faults]
    penalised = [(i, state) for i, state in well if state.sampling.penalises and len(state.seen[0])]
    biased = [(i, state) for i, state in well if len(state.bias_ids)]
    width, device = logits.shape[1], logits.device
    allowed, masked = _allowed(well, width, vocab, faults)
    flat = logits.view(-1)

    def spread(values: Sequence[object], sizes: list[int]) -> torch.Tensor:
        return torch.from_numpy(np.repeat(np.asarray(values), sizes)).to(device, non_blocking=True)

    def joined(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(device, non_blocking=True)

    if penalised:
        seen = [state.seen for _, state in penalised]
        sizes = [len(ids) for ids, _ in seen]
        places = joined([ids for ids, _ in seen]) + spread([i * width for i, _ in penalised], sizes)
        counts = joined([counts for _, counts in seen])
        settings = [state.sampling for _, state in penalised]
        repetition = spread([np.float32(s.repetition_penalty) for s in settings], sizes)
        frequency = spread([np.float32(s.frequency_penalty) for s in settings], sizes)
        presence = spread([np.float32(s.presence_penalty) for s in settings], sizes)
        values = flat[places]
        values = torch.where(values > 0, values / repetition, values * repetition)
        flat[places] = values - (counts * frequency + (counts > 0) * presence)
    if biased:
        sizes = [len(state.bias_ids) for _, state in biased]
        places = joined([state.bias_ids for _, state in biased]) + spread([i * width for i, _ in biased], sizes)
        flat[places] += joined([state.biases for _, state in biased])
    if masked:
        octets = allowed.view(torch.uint8).flatten().to(device, non_blocking=True)
        shut = _octets(device).index_select(0, octets.int()).view(len(masked), width)
        logits.index_add_(0, torch.tensor(masked, device=device), shut)


def _allowed(
    well: list[tuple[int, SamplingState]], width: int, vocab: int, faults: dict[int, SampleError]
) -> tuple[torch.Tensor, list[int]]:
    """What the grammars allow: (masks, width / 32) int32, and the row of each mask. Adds to `faults`."""
    held = [(i, state) for i, state in well if state.grammar is not None]
    masks = torch.full((len(held), width // 32), -1, dtype=torch.int32)
    masked: list[int] = []
    for i, state in held:
        state.prepare(vocab)
        if state.fault is not None:
            faults[i] = SampleError(f"the grammar failed: {type(state.fault).__name__}")
        elif state.mask is not None:
            masks[len(masked), : len(state.mask)] = state.mask
            masked.append(i)
    return masks[: len(masked)], masked


@functools.cache
def _octets(device: torch.device) -> torch.Tensor:
    """(256, 8): for every byte of a mask 0 where its bit is set, -inf where not; lowest bit first."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return torch.where(bits > 0, 0.0, -math.inf).to(device)


def _argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(maximum, its first id) of each row, (rows,) both. Through blocks: torch's own takes 1.6 ms for 32 rows."""
    blocks = logits.reshape(len(logits), -1, BLOCK)  # (rows, blocks, BLOCK)
    block = blocks.amax(-1).argmax(-1)  # (rows,)
    row = torch.arange(len(logits), device=logits.device)
    inside = blocks[row, block]  # (rows, BLOCK)
    offset = inside.argmax(-1)
    return inside[row, offset], block * BLOCK + offset


def _highest(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` highest values of each row, best first, and their ids: (rows, count) both.

    They lie in the `count` blocks of the highest maxima, so that only these are searched.
    """
    blocks = values.reshape(len(values), -1, BLOCK)  # (rows, blocks, BLOCK)
    if blocks.shape[1] <= count:
        return values.topk(count)
    _, block = blocks.amax(-1).topk(count, sorted=False)  # (rows, count)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).flatten(1)  # (rows, count * BLOCK)
    best, places = inside.topk(count)
    return best, block.gather(1, places // BLOCK) * BLOCK + places % BLOCK


def _weights(logits: torch.Tensor, peaks: torch.Tensor, where: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
    """Each token's probability divided by that of the most likely one, (part, width); of all rows in place. Peaks are
    subtracted first, because logit / 1e-4 is coarse."""
    weights = logits if len(where) == len(logits) else logits[where]
    return weights.sub_(peaks[where, None]).div_(heat.float()).exp_()


def _draw(weights: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """One id of each row by inverse CDF, first to a block and then inside it: (part,)."""
    blocks = weights.reshape(len(weights), -1, BLOCK)
    # float64: 49,152 terms of a float32 sum lose the tail.
    sums = blocks.sum(-1).double()  # (part, blocks)
    block, rest = _land(sums, wanted[:, 4:])
    inside = blocks[torch.arange(len(weights), device=weights.device), block[:, 0]].double()  # (part, BLOCK)
    offset, _ = _land(inside, rest)
    return (block * BLOCK + offset)[:, 0]


def _land(masses: torch.Tensor, share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The place at which `share` (part, 1) in [0, 1) of each row's mass is reached, and the share inside it, (part, 1)
    both. Never a place without mass. masses: (part, places), float64.
    """
    heaped = masses.cumsum(-1)
    # At most 1 - 2**-53 of the whole, which float64 never rounds up to it: behind it lie places without mass.
    point = share * heaped[:, -1:]
    place = torch.searchsorted(heaped, point, right=True).clamp_(max=masses.shape[1] - 1)
    mass = masses.gather(1, place)
    return place, ((point - heaped.gather(1, place) + mass) / mass).clamp_(0, 1)


def _draw_cut(weights: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """One id of each row after top_k, top_p and min_p: (part,). From the best few if the cut falls among them."""
    count = min(CANDIDATES, weights.shape[1])
    total = weights.reshape(len(weights), -1, BLOCK).sum(-1).double().sum(-1, keepdim=True)
    values, ids = _highest(weights, count)
    least, known = _least(values, total, wanted)  # (part, 1)
    place, _ = _land(values.where(values >= least, 0).double(), wanted[:, 4:])
    picks = ids.gather(1, place)[:, 0]
    # A row of NaN fails anyway and need not be searched further.
    unknown = (~known & (total >= 0)).nonzero()[:, 0]
    if len(unknown) and count < weights.shape[1]:
        weights, wanted = weights[unknown], wanted[unknown]
        least = _least_of_many(weights, total[unknown], wanted, 16 * count)
        picks[unknown] = _draw(weights.where(weights >= least, 0), wanted)
    return picks


def _least_of_many(weights: torch.Tensor, total: torch.Tensor, wanted: torch.Tensor, count: int) -> torch.Tensor:
    """The smallest weight that the row keeps, (part, 1): from its `count` highest, or else from all."""
    least, known = _least(_descending(weights, count), total, wanted)
    unknown = (~known).nonzero()[:, 0]
    if len(unknown) and count < weights.shape[1]:
        least[unknown] = _least_of_many(weights[unknown], total[unknown], wanted[unknown], weights.shape[1])
    return least


def _least(values: torch.Tensor, total: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest weight that top_k, top_p and min_p keep, and whether the row's highest `values` are enough to know.

    values: (part, n), descending; total: (part, 1), of the whole row; both results (part, 1).
    """
    n = values.shape[1]
    heaped = values.cumsum(-1, dtype=torch.double)
    top_k = wanted[:, 1:2].long()
    kth = values.gather(1, (top_k - 1).clamp_(0, n - 1)).where(top_k > 0, 0)
    left = (values >= kth).sum(-1, keepdim=True)  # tokens as likely as the k-th are kept too
    total = heaped.gather(1, (left - 1).clamp_(min=0)).where(top_k > 0, total)
    # The last token with less than top_p before it is the first with top_p or more up to itself.
    last = torch.searchsorted(heaped, wanted[:, 2:3] * total).clamp_(max=n - 1)
    nucleus = values.gather(1, last).where(wanted[:, 2:3] < 1, 0)
    least = torch.maximum(torch.maximum(kth, nucleus), wanted[:, 3:4].float())
    # Tokens as likely as the least one may lie outside, as may the k-th of a large top_k.
    return least, (values[:, -1:] < least) & (top_k <= n)


def _descending(weights: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` highest values. numpy uses vector instructions: 20 times as fast as torch."""
    if weights.is_cuda:
        return weights.sort(-1, descending=True).values[:, :count]
    values = weights.numpy()
    if count < values.shape[1]:
        values = np.partition(values, -count, axis=-1)[:, -count:]
    return torch.from_numpy(np.sort(values, axis=-1)).flip(-1)


def _logprobs(results: np.ndarray, asking: list[int], states: Sequence[SamplingState]) -> dict[int, Logprob]:
    """By row, from the flat transfer: chosen (asking,), the best (asking, n), their ids (asking, n)."""
    chosen, rest = results[: len(asking)], results[len(asking) :]
    best, ids = rest.reshape(2, len(asking), -1)
    made = {}
    for place, i in enumerate(asking):
        pairs = zip(ids[place].astype(int).tolist(), best[place].tolist(), strict=True)
        top = [(token, chance) for token, chance in pairs if chance > -math.inf]
        made[i] = Logprob(float(chosen[place]), top[: states[i].sampling.logprobs])
    return made
