"""Computes the memory that a model will take from the headers of its files, before it is loaded.

Knows file formats and configurations. Imports no torch, because the process that decides what is loaded has none.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from ..errors import CatalogueError
from ..weights.headers import GGUFError, GGUFHeader, SafetensorsError, naming_file, safetensors_shapes
from .catalogue import Entry
from .kinds import KINDS
from .sources import Source

# A replica without its model: Python, torch, transformers and Ray, less the pages that processes share. Measured as PSS
# of three replicas that ran at the same time.
PROCESS_BYTES = 340 << 20
LEAST_KV_TOKENS = 512
FOUR_BITS = {GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1}
# Bytes of one weight as the C kernels hold it: 32 levels of 4 or 8 bits, and two float16 numbers.
PACKED_4, PACKED_8 = 20 / 32, 36 / 32


@dataclass(frozen=True)
class Size:
    """disk: bytes of the files. weights: bytes in memory. token: bytes of one token's keys and values, 0 for models
    without a KV cache. context: tokens that the weights allow, 0: unknown."""

    disk: int
    parameters: int
    weights: int
    token: int = 0
    context: int = 0

    def memory(self, kv_tokens: int) -> int:
        """Bytes of the model's process with a KV cache of so many tokens."""
        return PROCESS_BYTES + self.weights + self.token * kv_tokens

    @property
    def copy(self) -> int:
        """Bytes of the process of a second copy in float32, for `inspector`."""
        return PROCESS_BYTES + 4 * self.parameters

    @property
    def least(self) -> int:
        """Bytes without which it cannot be loaded at all."""
        return self.memory(LEAST_KV_TOKENS)


def size_of(entry: Entry, source: Source) -> Size:
    """The size of a model, from the headers only. Raises CatalogueError for damaged or missing files."""
    try:
        return _of_gguf(entry, source) if source.gguf_file else _of_folder(entry, Path(source.folder))
    except (GGUFError, SafetensorsError) as error:
        raise CatalogueError(f"{entry.id}: {error}") from None
    except OSError as error:
        raise CatalogueError(f"{entry.id}: {error.filename}: {error.strerror}") from None


def _of_gguf(entry: Entry, source: Source) -> Size:
    path = Path(source.folder) / str(source.gguf_file)
    file = GGUFHeader(path)
    with naming_file(path):
        arch = file.metadata["general.architecture"]
        values = {name.removeprefix(f"{arch}."): value for name, value in file.metadata.items()}
        counts = {name: math.prod(tensor.shape) for name, tensor in file.tensors.items()}
        if arch == "llama" and entry.dtype == "auto":  # for the C kernels; torch, if they cannot run, takes more
            weights = sum(
                count * (PACKED_4 if file.tensors[name].kind in FOUR_BITS else PACKED_8)
                for name, count in counts.items()
            )
        else:
            weights = sum(counts.values()) * _width(entry)
        heads = _largest(values.get("attention.head_count"))
        dim = values.get("attention.key_length") or values["embedding_length"] // max(1, heads)
        kv_heads = _largest(values.get("attention.head_count_kv")) or heads
        token = values["block_count"] * 2 * kv_heads * dim * 2
        return Size(path.stat().st_size, sum(counts.values()), int(weights), token, int(values["context_length"]))


def _of_folder(entry: Entry, folder: Path) -> Size:
    config = read_json(folder / "config.json")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CatalogueError(f"{entry.id}: {folder} contains no .safetensors file; other formats are not read")
    shapes = [shape for file in files for shape in safetensors_shapes(file).values()]
    parameters = sum(math.prod(shape) for shape in shapes)
    disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else None
    values: dict[str, Any] = text or config
    context = values.get("max_position_embeddings") or values.get("n_positions") or 0
    token = 0
    if KINDS[entry.kind].loader == "causal":
        heads = values.get("num_attention_heads") or values.get("n_head") or 0
        width = values.get("hidden_size") or values.get("n_embd") or 0
        layers = values.get("num_hidden_layers") or values.get("n_layer") or 0
        dim = values.get("head_dim") or (width // heads if heads else 0)
        token = layers * 2 * (values.get("num_key_value_heads") or heads) * dim * _width(entry)
    return Size(disk, parameters, parameters * _width(entry), token, context)


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file. Raises CatalogueError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CatalogueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise CatalogueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise CatalogueError(f"{path} is not a JSON object")
    return found


def _width(entry: Entry) -> int:
    return 4 if entry.dtype == "float32" else 2


def _largest(value: Any) -> int:
    """The largest number in a value that some architectures have for each layer."""
    return max(value, default=0) if isinstance(value, list) else int(value or 0)
