"""`make train-probe`: fits the sentiment probe on the embedded model's vectors and writes sentiment.json.

A logistic regression with an L2 penalty. The sentences are the lab's own (bench/tasks), without those of the test
files. The same sentences and weights give the same file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from lab_model.encoders.embedder import Embedder
from lab_model.encoders.probe import FILE
from lab_model.models.catalogue import load_catalogue
from lab_model.models.sources import resolve_source
from lab_model.models.tokenizers import read_tokenizer
from transformers import AutoModel

FOLDER = Path(__file__).parent
PENALTY = 3e-4  # the best of 1e-4 to 3e-3 in six-fold cross-validation
FOLDS = 6
BATCH = 32  # sentences of one forward
CHECK_TEXT = "The quick brown fox jumps over the lazy dog."


def sentences(name: str) -> list[tuple[str, bool]]:
    """(text, positive) of each line of a file: `+ text` or `- text`."""
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    return [(line[2:], line.startswith("+")) for line in lines if line]


def vectors(texts: Sequence[str]) -> torch.Tensor:
    """The embedded model's sentence vectors, (texts, dimensions), float64."""
    entry = next(entry for entry in load_catalogue(None) if entry.kind == "embedding")
    source = resolve_source(entry)
    model = AutoModel.from_pretrained(source.folder, dtype=torch.float32, **source.arguments()).eval()
    tokenizer, embedder = read_tokenizer(source), Embedder(model, 256)
    rows = [tokenizer.encode(text) for text in texts]
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    found = torch.empty(len(rows), embedder.dimensions, dtype=torch.double)
    for first in range(0, len(rows), BATCH):
        places = order[first : first + BATCH]
        found[places] = torch.tensor(embedder.forward([rows[place] for place in places])).double()
    return found


def fit(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (dimensions,) and bias (1,) of the regression. x: (texts, dimensions); y: (texts,), 0 or 1."""
    weights = torch.zeros(x.shape[1], dtype=torch.double, requires_grad=True)
    bias = torch.zeros(1, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        error = torch.nn.functional.binary_cross_entropy_with_logits(x @ weights + bias, y)
        total = error + PENALTY * (weights * weights).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weights.detach(), bias.detach()


def accuracy(model: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> float:
    return float((((x @ model[0] + model[1]) > 0).double() == y).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FILE)
    out: Path = parser.parse_args().out
    rows = [*sentences("sentiment-train.en.txt"), *sentences("sentiment-train.ko.txt")]
    x, y = vectors([text for text, _ in rows]), torch.tensor([label for _, label in rows]).double()
    # Two successive lines are a positive sentence and its negative counterpart, so they stay in one fold.
    fold = torch.arange(len(rows)) // 2 % FOLDS
    folds = [accuracy(fit(x[fold != k], y[fold != k]), x[fold == k], y[fold == k]) for k in range(FOLDS)]
    weights, bias = fit(x, y)
    check = vectors([CHECK_TEXT])[0]
    fields = {
        "check": {"text": CHECK_TEXT, "vector": [round(value, 5) for value in check[:16].tolist()]},
        "bias": round(float(bias), 5),
        "weights": [round(value, 5) for value in weights.tolist()],
    }
    out.write_text(json.dumps(fields) + "\n", encoding="utf-8")
    print(f"{len(rows)} sentences; {sum(folds) / FOLDS:.1%} correct in cross-validation; wrote {out}")  # noqa: T201


if __name__ == "__main__":
    main()
