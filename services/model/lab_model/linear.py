"""Linear layers with the norm before them: rows in, rows out.

`Dense` computes in the weights' own type on any device. `Quantized` is for the CPU and has two ways: for few rows 4-bit
weights, because then the weights' way from memory is what costs; for many rows 8-bit arithmetic. Knows nothing of
attention, requests or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import linear, rms_norm

# Up to this many rows the weights' way from memory is what costs: 4 bits a weight. Above it, int8 arithmetic.
FEW_ROWS = 8
GROUP = 32  # weights that share a scale: GGUF's block and the int4 kernel's group

# An activation as one unsigned digit around 128, or as two, the high one worth 256 of the low one.
_ONE, _MIDDLE = 127, torch.tensor(128.5)  # converting to an integer cuts off: the half rounds
_TWO, _BOTH_MIDDLES = 32512, torch.tensor(128.5 + 256 * 128)


@dataclass(frozen=True)
class Norm:
    """Root mean square normalization (https://arxiv.org/abs/1910.07467) of a row. weight: (width,)."""

    weight: torch.Tensor
    epsilon: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class Linear(Protocol):
    """Both classes. few: at most FEW_ROWS rows, decoding."""

    @property
    def bytes(self) -> int: ...

    def __call__(self, x: torch.Tensor, few: bool) -> torch.Tensor:
        """x: (rows, in); (rows, out)."""
        ...

    def onto(self, sum_: torch.Tensor, x: torch.Tensor, few: bool) -> torch.Tensor:
        """sum_ + the layer's output; may write into sum_."""
        ...


class Dense:
    """A linear layer in the weights' own type: any device, the reference for the other."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, norm: Norm | None = None) -> None:
        self._weight, self._bias, self._norm = weight, bias, norm

    @property
    def bytes(self) -> int:
        return self._weight.nbytes

    def __call__(self, x: torch.Tensor, few: bool) -> torch.Tensor:
        return linear(x if self._norm is None else self._norm(x), self._weight, self._bias)

    def onto(self, sum_: torch.Tensor, x: torch.Tensor, few: bool) -> torch.Tensor:
        return sum_ + self(x, few)


class Quantized:
    """A linear layer on the CPU. `few` rows: (rows, in) float32 or bfloat16; many: float32.

    Few: 4-bit weights in groups of 32 with a scale and a zero point, bfloat16 rows out.

    Many: 8-bit weights with a scale for each output, activations with a scale for each row, so that neighbours never
    change a row; the sums are integers, so that it makes no difference how many rows are computed together. float32
    out.
    Between layers the rows of this way are turned by an orthogonal matrix (QuaRot, https://arxiv.org/abs/2404.00456),
    which spreads the few activations that are a hundred times the others: one 8-bit digit is then enough for them.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        blocks: Sequence[torch.Tensor] | None = None,
        *,
        norm: Norm | None = None,
        turned: torch.Tensor | None = None,
        turns: torch.Tensor | None = None,
        digits: int = 1,
    ) -> None:
        """weight: (out, in) float32; blocks: the same as 4-bit levels, scales and minima, None for 8 bits always.

        turned: the matrix that turned the rows that come in, turns: that turns those that go out. digits: of an
        activation, 2 where nothing turned it and some are far larger than the others.
        """
        self._norm, self._digits = norm, digits
        # Only where few rows come this way too.
        self._turned = None if turned is None or blocks is not None else turned.bfloat16()
        self._four: torch.Tensor | None = None
        if blocks is not None:
            levels, scale, minimum = blocks
            self._four = torch._convert_weight_to_int4pack_for_cpu(levels.int(), 1)
            # The kernel computes (level - 8) * scale + zero.
            self._groups = torch.stack([scale, minimum + 8 * scale], -1).transpose(0, 1).bfloat16().contiguous()
        if norm is not None:
            weight = weight * norm.weight
            self._epsilon = torch.tensor(norm.epsilon)
        weight = weight if turned is None else weight @ turned
        weight = weight if turns is None else turns.t() @ weight
        codes, scale = rounded(weight)
        self._kernel: Any = torch.ops.onednn.qlinear_pointwise.default
        self._eight = torch.ops.onednn.qlinear_prepack(codes, [64, weight.shape[1]])
        self._scale = scale / (_ONE if digits == 1 else _TWO)  # (out,)
        self._zero = torch.zeros(len(weight), dtype=torch.long)
        self._size = codes.nbytes

    @property
    def bytes(self) -> int:
        four = 0 if self._four is None else self._four.nbytes + self._groups.nbytes
        return self._size + self._scale.nbytes + self._zero.nbytes + four

    def __call__(self, x: torch.Tensor, few: bool) -> torch.Tensor:
        if few and self._four is not None:
            return self._with_four_bits(x)
        if few and self._turned is not None:
            x = (x.bfloat16() @ self._turned).float()
        levels, unit = self._with_eight_bits(x)
        return levels.mul_(unit)

    def onto(self, sum_: torch.Tensor, x: torch.Tensor, few: bool) -> torch.Tensor:
        if few and self._four is not None:
            return sum_.add_(self._with_four_bits(x))
        return sum_.addcmul_(*self._with_eight_bits(x))

    def _with_four_bits(self, x: torch.Tensor) -> torch.Tensor:
        if self._norm is not None:
            x = torch.mul(x * self._shrinking(x), self._norm.weight, out=x.new_empty(x.shape, dtype=torch.bfloat16))
        return torch._weight_int4pack_mm_for_cpu(x.bfloat16(), self._four, GROUP, self._groups)  # type: ignore[arg-type]

    def _with_eight_bits(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The output but for a factor of each row, and that: (rows, out) and (rows, 1)."""
        # A row of zeros gives arbitrary digits, times zero; one with a NaN has it in its factor.
        unit = x.abs().amax(-1, True)
        shares = x * unit.reciprocal()  # -1 to 1
        if self._digits == 1:
            levels = self._product(torch.add(_MIDDLE, shares, alpha=_ONE).to(torch.uint8))
        else:
            both = torch.add(_BOTH_MIDDLES, shares, alpha=_TWO).to(torch.int32)
            digits = torch.empty(2 * len(x), x.shape[1], dtype=torch.uint8)
            digits[: len(x)] = both >> 8
            digits[len(x) :] = both  # the low byte
            product = self._product(digits)
            levels = product[len(x) :].add_(product[: len(x)], alpha=256)
        # The norm is a factor of the row too: it need not be applied before.
        return levels, unit if self._norm is None else unit.mul_(self._shrinking(x))

    def _product(self, digits: torch.Tensor) -> torch.Tensor:
        return self._kernel(  # type: ignore[no-any-return]
            digits, 1.0, 128, self._eight, self._scale, self._zero, None, 1.0, 0, torch.float32, "none", [], ""
        )

    def _shrinking(self, x: torch.Tensor) -> torch.Tensor:
        """1 / the root mean square of each row, (rows, 1)."""
        length = torch.linalg.vector_norm(x, 2, -1, True)
        return torch.addcmul(self._epsilon, length, length, value=1 / x.shape[1]).rsqrt_()


class Table:
    """An embedding as 8-bit rows, each with its scale. weight: (vocab, width) float32."""

    def __init__(self, weight: torch.Tensor, turns: torch.Tensor) -> None:
        self._codes, self._scale = rounded(weight)
        self._turn = Quantized(turns.t(), digits=2)

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._scale.nbytes + self._turn.bytes

    def __call__(self, ids: torch.Tensor, few: bool) -> torch.Tensor:
        """(tokens, width) float32; turned unless `few`."""
        rows = self._codes.index_select(0, ids) * self._scale[ids, None]
        return rows if few else self._turn(rows, False)


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row in whole numbers up to 127, int8, and its scale, (rows,)."""
    scale = weight.abs().amax(1).clamp_(min=1e-12) / 127
    return (weight / scale[:, None]).round_().to(torch.int8, memory_format=torch.contiguous_format), scale


def turning(width: int) -> torch.Tensor:
    """A random orthogonal matrix, the same in every process.

    Random ones differ (SpinQuant, https://arxiv.org/abs/2405.16406): with twenty seeds the embedded model's perplexity
    moved by -0.5 to +1.6 % over two texts of 2,048 tokens. This one, chosen by them and by the answer to "What is the
    capital of France?" (nearly a tie in the file), gave +0.3 and +0.7 %. The divergence from the file's own
    distribution is 0.006 nats for all of them; unturned rows of two digits had 0.007.
    """
    drawn = torch.randn(width, width, generator=torch.Generator().manual_seed(16))
    turn: torch.Tensor = torch.linalg.qr(drawn).Q
    return turn.contiguous()


def quantized_works() -> bool:
    """The int8 kernel is here and exact. Without VNNI instructions some processors saturate, others have no kernel."""
    try:
        layer = Quantized(torch.full((64, 64), 1.0))
        levels, _ = layer._with_eight_bits(torch.full((8, 64), 1.0))
    except (RuntimeError, AttributeError):  # no such kernel in this build of torch, or none for this processor
        return False
    return bool(torch.all((levels - 64).abs() < 1e-3))
