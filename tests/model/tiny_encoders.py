"""Tiny seeded encoders with heads: random weights, a real WordPiece tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = (
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ate",
    "on",
    "mat",
    "hat",
    "and",
    "is",
    "was",
    "big",
    "good",
    "not",
    "?",
    ".",
    ",",
)


def tokenizer() -> Any:
    """WordPiece over a few words and all letters, with BERT's special tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {name: place for place, name in enumerate(dict.fromkeys(names))}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def model(head: str, architecture: str = "bert") -> Any:
    """head: `classifier` with three labels, `reader` or `embedding`. The same weights each time."""
    import torch
    import transformers

    torch.manual_seed(0)
    shape = {"vocab_size": 128, "max_position_embeddings": 64}
    labels: dict[str, Any] = {"id2label": {0: "bad", 1: "fair", 2: "good"}} if head == "classifier" else {}
    config: Any
    if architecture == "distilbert":
        config = transformers.DistilBertConfig(**shape, **labels, dim=32, hidden_dim=64, n_layers=2, n_heads=2)
    else:
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.BertConfig(**shape, **labels, **small)
    of: Any = {
        "classifier": transformers.AutoModelForSequenceClassification,
        "reader": transformers.AutoModelForQuestionAnswering,
        "embedding": transformers.AutoModel,
    }[head]
    made = of.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)  # fresh weights are so small that every label is as likely as the next
    return made


def write(folder: Path, head: str, architecture: str = "bert") -> Path:
    """A Hugging Face folder that `from_pretrained` reads."""
    model(head, architecture).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
