"""A file of named tensors and one JSON text, in the safetensors format: written whole or not at all, with a digest."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

KEY = "hfkv"
# How safetensors names the dtypes that planes, tokens and padding are of.
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
}

# No space left, a file too large, a quota used up.
_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


def digest_of(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """The digest of all that a file says and holds."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, _NAMES[tensor.dtype], list(tensor.shape)]).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def write_file(name: str, tensors: Mapping[str, torch.Tensor], text: str) -> None:
    """Writes a file beside `name` and puts it in its place: a crash leaves what was there whole.

    Args:
        name: the file's path. A file that is there already keeps its permissions.
        tensors: contiguous tensors, on the CPU.
        text: kept as the metadata ``"hfkv"``.

    Raises:
        OSError: it cannot be written.
    """
    name = os.path.realpath(name)
    if os.path.isdir(name):
        raise IsADirectoryError(f"{name!r} is a folder; name a file in it")
    if not os.path.isdir(os.path.dirname(name)):
        raise FileNotFoundError(f"{name!r}: there is no folder {os.path.dirname(name)!r}; make it, or name another")
    beside = os.path.join(os.path.dirname(name), f".{KEY}-{secrets.token_hex(8)}.tmp")
    try:
        with open(beside, "xb") as file:
            _write(file, tensors, text)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(name, beside)
        os.replace(beside, name)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(beside)
        if isinstance(error, OSError) and error.errno in _FULL:
            num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            raise OSError(
                error.errno,
                f"{error.strerror}: {num_bytes:,} bytes do not fit. What was there before is as it was, and so is the "
                "cache: make room, or save it elsewhere",
                name,
            ) from error
        raise


def _write(file: BinaryIO, tensors: Mapping[str, torch.Tensor], metadata: str) -> None:
    """Writes the safetensors format, whose own writer puts files beside the target and keeps no permissions."""
    # The widest first: then each begins at a multiple of its width.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": {KEY: metadata}}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        file.write(_bytes(tensor))


def read_file(name: str) -> tuple[dict[str, torch.Tensor], str]:
    """Reads a file: its tensors, mapped into memory, and its text; neither is checked.

    Raises:
        ValueError: the file is not whole, or not such a file; the message does not name it.
        OSError: it cannot be opened.
    """
    with open(name, "rb"):
        pass  # what is not there, or may not be read, says so itself
    try:
        with safe_open(name, framework="pt", device="cpu") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
    except OSError:
        raise
    except Exception as error:  # of safetensors, and torch's about dtypes and offsets
        raise ValueError(f"it is no whole safetensors file ({error})") from error
    if metadata is None or metadata.keys() != {KEY} or any(tensor.dtype not in _NAMES for tensor in tensors.values()):
        raise ValueError("it is a safetensors file, but holds no hfkv cache")
    return tensors, metadata[KEY]
