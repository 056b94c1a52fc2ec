"""`ExpertHeader`: what the file of a module's experts says besides its tensors, and the checks of these."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch

from hfkv.experts.int4 import TORCH, Int4Weights
from hfkv.experts.offload.expert_source import plane_shapes
from hfkv.models.mapped_file import DTYPES, header_of

FORMAT, VERSION, KEY = "hfkv-experts", 1, "hfkv"
HALVES = ("up", "down")
PORTABLE = "portable"
_CODECS = ("none", "int8", "int4")
# Sums are taken of pages of this many bytes, so that a page in the place of another is found.
_PAGE = 4096
_MOST = 1 << 40

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class ExpertHeader:
    """The header of a file of experts.

    Attributes:
        module: the name of the experts module.
        codec: ``"none"``, ``"int8"`` or ``"int4"``.
        dtype: the dtype of the numbers they stand for, as safetensors names it.
        up, down: the shapes (E, N, K).
        order: the order of int4's nibbles: ``"portable"``, or one kind of processor's; see `cpu_order_name`.
        origin: a mark of the weights they were written from; see `contents_digest`.
        checks: a checksum for each half of each expert.
    """

    module: str
    codec: str
    dtype: str
    up: Shape
    down: Shape
    order: str
    origin: str
    checks: dict[str, list[str]]

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Every tensor of the file in order, the widest numbers first: so each begins at a multiple of its width."""
        found = {
            f"{half}.{name}": plane
            for half in HALVES
            for name, plane in plane_shapes(self.codec, getattr(self, half), DTYPES[self.dtype]).items()
        }
        return dict(sorted(found.items(), key=lambda item: (-item[1][1].itemsize, item[0])))

    def to_bytes(self) -> bytes:
        """The header of the file, with a digest of itself."""
        text = _canonical({"format": FORMAT, "version": VERSION, **asdict(self)})
        digest = hashlib.sha256(text.encode()).hexdigest()
        return header_of(self.shapes(), {KEY: text, "digest": digest})

    @classmethod
    def from_text(cls, text: str) -> ExpertHeader:
        """Reads a header. Raises ValueError where the text is none."""
        try:
            given = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError("its metadata is no JSON") from error
        if not isinstance(given, dict) or given.get("format") != FORMAT:
            raise ValueError(f"its metadata is not of the format {FORMAT!r}")
        if given.get("version") != VERSION:
            raise ValueError(f"it is of version {given.get('version')!r}, and this hfkv reads {VERSION}; write it anew")
        names = set(cls.__dataclass_fields__)
        if given.keys() != {"format", "version", *names}:
            raise ValueError(f"its metadata does not have {', '.join(sorted(names))}")
        header = cls(**{name: given[name] for name in names})
        words = (header.module, header.order, header.origin)
        is_known = header.codec in _CODECS and header.dtype in DTYPES and DTYPES[header.dtype].is_floating_point
        if not is_known or not all(isinstance(word, str) for word in words):
            raise ValueError(f"it is of codec {header.codec!r}, dtype {header.dtype!r}")
        header = replace(header, up=_shape(header.up), down=_shape(header.down))
        checks = header.checks
        if not isinstance(checks, dict) or set(checks) != set(HALVES):
            raise ValueError("it has no checks")
        if any(not isinstance(of_half, list) or len(of_half) != header.up[0] for of_half in checks.values()):
            raise ValueError("its checks are not one for each expert")
        return header


def checksum(planes: dict[str, torch.Tensor]) -> str:
    """The checksum of one expert's bytes, at the speed of memory: sums over every page, and every place of a page."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(planes):
        content = bytes_of(planes[name])
        whole = len(content) // _PAGE * _PAGE
        digest.update(f"{name} {len(content)}".encode() + content[whole:].numpy().tobytes())
        if whole:
            pages = content[:whole]
            # A mapped plane need not begin where eight bytes do.
            pages = pages.clone() if pages.data_ptr() % 8 else pages
            sums = pages.view(torch.int64).view(-1, _PAGE // 8)
            digest.update(sums.sum(dim=1).numpy().tobytes() + sums.sum(dim=0).numpy().tobytes())
    return digest.hexdigest()


@cache
def cpu_order_name() -> str:
    """Names the order in which this processor's products read nibbles, by their result for a pattern."""
    nibbles = torch.arange(64 * 16, dtype=torch.int32).mul_(2654435761 % 8191).remainder_(251).to(torch.uint8)
    weights = Int4Weights((1, 128, 32), torch.bfloat16, torch.device("cpu"), order=TORCH)
    planes = {name: plane.clone() for name, plane in weights.planes().items()}
    planes["nibbles"] = nibbles.repeat(2)[: planes["nibbles"].numel()].view(planes["nibbles"].shape)
    ordered = Int4Weights.of_planes(planes, torch.bfloat16, order=TORCH).nibbles
    return f"cpu-{hashlib.blake2b(ordered.numpy().tobytes(), digest_size=8).hexdigest()}"


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in order, uint8 `[bytes]`; a contiguous one shares its memory."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _shape(value: Any) -> Shape:
    is_shape = isinstance(value, list) and len(value) == 3
    if not is_shape or not all(isinstance(size, int) and 1 <= size <= _MOST for size in value):
        raise ValueError(f"the shape of its experts is {ascii(value)[:60]}")
    return value[0], value[1], value[2]
