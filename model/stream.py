"""Tensors of safetensors files as ranges of bytes: copied and compared in pieces, so that no file and no tensor need be in memory.

safetensors' own save_file holds a file's tensors, and its mapped pages count as resident; a grown model is several times its
source. The format (https://github.com/huggingface/safetensors#format): 8 bytes of the header's length, the header as JSON,
{name: {dtype, shape, data_offsets}}, then the tensors' bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from model.checkpoint import open_safetensors, weight_files
from study.errors import LetheError
from study.folder import replacing

CHUNK = 4 * 2**20
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Content = Callable[[], Iterator[bytes | memoryview]]


class Piece(NamedTuple):
    """A tensor where it lies."""

    file: Path
    begin: int  # in the file
    nbytes: int
    dtype: str  # as safetensors writes it: "BF16"
    shape: tuple[int, ...]


def pieces_of(folder: Path) -> dict[str, Piece]:
    """Every tensor of a model folder by its name. Raises LetheError for a missing, cut or foreign file, and a quantised tensor."""
    found = {}
    for file in weight_files(folder):
        with open_safetensors(file):  # which checks the header, and that the file is as long as it says
            pass
        with open(file, "rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if entry["dtype"] not in DTYPES:
                raise LetheError(f"{file}: {name} is {entry['dtype']}; weights are {', '.join(DTYPES)} here, so dequantise the model first")
            found[name] = Piece(file, 8 + size + begin, end - begin, entry["dtype"], tuple(entry["shape"]))
    return found


def chunks(piece: Piece) -> Iterator[bytes]:
    """The tensor's bytes, at most CHUNK at a time."""
    left = piece.nbytes
    with open(piece.file, "rb") as handle:
        handle.seek(piece.begin)
        while left:
            block = handle.read(min(CHUNK, left))
            if not block:
                raise LetheError(f"{piece.file} became shorter while it was read; fetch it again")
            left -= len(block)
            yield block


def zeros(nbytes: int) -> Iterator[bytes]:
    """Like chunks, of a tensor that is zero."""
    block = bytes(min(CHUNK, nbytes))
    for begin in range(0, nbytes, CHUNK):
        yield block[: nbytes - begin]


def tensor_at(piece: Piece) -> torch.Tensor:
    """The tensor, mapped by itself: the memory of what was read of it is given back with it. To be read only."""
    content = np.memmap(piece.file, np.uint8, "c", piece.begin, (piece.nbytes,))
    return torch.from_numpy(content).view(DTYPES[piece.dtype]).view(piece.shape)


def same_bytes(piece: Piece, content: Iterator[bytes | memoryview]) -> bool:
    """Whether the tensor is these bytes, all of them and no more. The content may come in chunks of any length."""
    written = 0
    with open(piece.file, "rb") as handle:
        handle.seek(piece.begin)
        for block in content:
            block = memoryview(block)
            for begin in range(0, len(block), CHUNK):
                part = block[begin : begin + CHUNK]
                if handle.read(len(part)) != part:
                    return False
                written += len(part)
    return written == piece.nbytes


def write_stream(file: Path, tensors: list[tuple[str, Piece, Content]], done: Callable[[], None]) -> None:
    """Writes a safetensors file, atomically. Of each tensor: its name, a piece of its dtype, shape and size, and its content.

    done is called after each. Raises LetheError where the disk refuses, or a content is of another size.
    """
    # Wide dtypes first, as safetensors orders them, so that every tensor begins at a multiple of its items' size.
    tensors = sorted(tensors, key=lambda entry: -DTYPES[entry[1].dtype].itemsize)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, piece, _ in tensors:
        header[name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": [end, end + piece.nbytes]}
        end += piece.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with replacing(file) as temporary, open(temporary, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for _, _, content in tensors:
            for block in content():
                handle.write(block)
            done()
        handle.flush()
        if handle.tell() != 8 + len(text) + end:
            raise LetheError(f"{file}: wrote {handle.tell()} bytes instead of {8 + len(text) + end}; a source changed meanwhile")
