"""`MappedFile`: a safetensors file mapped into memory, to be read only; nothing is read before it is asked for."""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import warnings
from typing import Any

import torch

# How safetensors names the dtypes that weights and their codes are of.
DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# More than any header of experts takes; the length of a damaged file may be anything.
_LONGEST_HEADER = 1 << 28


def map_bytes(path: str) -> torch.Tensor:
    """Maps a file as uint8 `[bytes]`. It must not be written to, nor the file cut while it is mapped.

    The pages are the file's own: a machine that needs memory takes them back, and they are no memory of the process.
    """
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return torch.empty(0, dtype=torch.uint8)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(mapped, dtype=torch.uint8)


class MappedFile:
    """The tensors of a safetensors file.

    Args:
        path: the file.

    Attributes:
        header: the header, as bytes.
        metadata: the header's metadata.
        data: all bytes behind the header.

    Raises:
        ValueError: the file is not whole, or no safetensors file; the message does not name it.
        OSError: it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        content = map_bytes(path)
        if len(content) < 8:
            raise ValueError(f"{len(content)} bytes are no safetensors file")
        length = int.from_bytes(content[:8].numpy().tobytes(), "little")
        if not 2 <= length <= min(len(content) - 8, _LONGEST_HEADER):
            raise ValueError(f"a header of {length:,} bytes does not fit into its {len(content):,} bytes")
        self.header = content[8 : 8 + length].numpy().tobytes()
        self.data = content[8 + length :]
        try:
            entries = json.loads(self.header)
            self.metadata: dict[str, str] = entries.pop("__metadata__", {})
            self._entries: dict[str, Any] = entries
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (ValueError, RecursionError, AttributeError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"its header is damaged ({type(error).__name__})") from error
        if end != len(self.data):
            raise ValueError(f"it holds {len(self.data):,} bytes of tensors, and its header tells of {end:,}")

    def tensor(self, name: str) -> torch.Tensor:
        """Maps one of the file's tensors.

        Raises:
            KeyError: there is none of that name.
            ValueError: its entry is damaged, or of a dtype that no weights have.
        """
        entry = self._entries[name]
        try:
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            part = self.data[begin:end]
            if math.prod(shape) * dtype.itemsize != end - begin or len(part) != end - begin:
                raise ValueError("its size is not that of its shape")
            if part.data_ptr() % dtype.itemsize:
                part = part.clone()  # not where its numbers could be read: of other libraries' files only
            return part.view(dtype).view(shape)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"its tensor {name!r} is damaged, or of no dtype that weights have ({error})") from error


def header_of(shapes: dict[str, tuple[tuple[int, ...], torch.dtype]], metadata: dict[str, str]) -> bytes:
    """The header of a file, the same for the same arguments; with its length before it a multiple of 64 bytes."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (shape, dtype) in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-(len(text) + 8) % 64)


def will_need(tensor: torch.Tensor) -> None:
    """Asks the system to read the pages of a mapped tensor, without waiting for them."""
    advise = getattr(_LIBC, "madvise", None)
    if advise is None or not tensor.numel():
        return
    begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.nbytes - begin
    # It is advice: a system that does not take it reads the pages when they are touched.
    advise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_WILLNEED)


_LIBC = ctypes.CDLL(None) if hasattr(mmap, "MADV_WILLNEED") else None
