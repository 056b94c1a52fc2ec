"""`ExpertFile`: the experts of one module in a file, mapped into memory and checked as they are first read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Callable
from functools import partial
from typing import BinaryIO

import torch
from torch import nn

from hfkv.experts.config import MoEConfig
from hfkv.experts.families import experts_of, weight_names
from hfkv.experts.offload.eviction import Eviction
from hfkv.experts.offload.expert_header import (
    FORMAT,
    HALVES,
    KEY,
    PORTABLE,
    ExpertHeader,
    Shape,
    bytes_of,
    checksum,
    cpu_order_name,
)
from hfkv.experts.offload.expert_source import ExpertSource
from hfkv.experts.offload.offloaded import OffloadedWeights
from hfkv.experts.offload.present import PresentWeights, bus_for, codec_of
from hfkv.experts.offload.slots import ExpertSlots
from hfkv.experts.offload.trace import ExpertTrace
from hfkv.experts.weights import ExpertWeights
from hfkv.models.mapped_file import DTYPE_NAMES, DTYPES, MappedFile

_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
# What yields the planes of one expert: "up" or "down", and its index.
Produce = Callable[[str, int], dict[str, torch.Tensor]]
Pair = tuple[ExpertWeights, ExpertWeights]


class ExpertFile:
    """The experts of one module, mapped into memory.

    Args:
        path: the file.

    Attributes:
        header: the file's header.
        digest: a digest of the header, which holds a check of every expert: so of all that the file says and holds.

    Raises:
        ValueError: the file is damaged, cut short, or something else.
        FileNotFoundError: the file is not there.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._file = MappedFile(path)
            text = self._file.metadata.get(KEY)
            if not isinstance(text, str):
                raise ValueError(f"it is a safetensors file, but not of the format {FORMAT!r}")
            self.header = ExpertHeader.from_text(text)
            # What the header may say is told by a few fields: any other byte is damage.
            if self.header.to_bytes() != self._file.header:
                raise ValueError("its header is damaged: it does not agree with itself")
            self._planes = {name: self._file.tensor(name) for name in self.header.shapes()}
        except ValueError as error:
            raise ValueError(
                f"{path!r} holds no experts that can be read: {error}. Remove it and write it anew"
            ) from error
        self.digest = hashlib.blake2b(self._file.header, digest_size=16).digest()
        self._checked: set[tuple[str, int]] = set()

    def source(self, half: str) -> ExpertSource:
        """The source of one projection, ``"up"`` or ``"down"``.

        Raises:
            ValueError: the file's nibbles are in the order of another kind of processor.
        """
        header = self.header
        if header.order not in (PORTABLE, cpu_order_name()):
            raise ValueError(
                f"{self.path!r} was written for another kind of processor ({header.order}, and this one is "
                f"{cpu_order_name()}); hfkv.experts.offload.expert_file.save_experts writes files for any"
            )
        planes = {
            name.removeprefix(f"{half}."): plane for name, plane in self._planes.items() if name.startswith(f"{half}.")
        }
        return ExpertSource(
            header.codec,
            getattr(header, half),
            DTYPES[header.dtype],
            planes,
            has_cpu_order=header.order != PORTABLE,
            path=self.path,
            digest=torch.tensor(list(self.digest + half.encode()), dtype=torch.uint8),
            verify=partial(self._verify, half, planes),
            reopen=partial(_source, self.path, half),
        )

    def verify_all(self) -> None:
        """Reads the whole file, and raises ValueError where an expert is damaged."""
        for half in HALVES:
            verify = self.source(half).verify
            assert verify is not None
            for expert in range(self.header.up[0]):
                verify(expert)

    def _verify(self, half: str, planes: dict[str, torch.Tensor], expert: int) -> None:
        if (half, expert) in self._checked:
            return
        if checksum({name: plane[expert] for name, plane in planes.items()}) != self.header.checks[half][expert]:
            raise ValueError(
                f"{self.path!r} is damaged: the {half} projection of expert {expert} of {self.header.module} is not "
                "what was written. Remove the file and write it anew"
            )
        self._checked.add((half, expert))


def _source(path: str, half: str) -> ExpertSource:
    return ExpertFile(path).source(half)


def write_experts(
    path: str,
    module: str,
    codec: str,
    dtype: torch.dtype,
    up: Shape,
    down: Shape,
    produce: Produce,
    *,
    origin: str,
    has_cpu_order: bool = False,
) -> None:
    """Writes a file one expert at a time, beside `path`, and puts it in its place: whole, or not at all.

    Args:
        path: the file; its folder exists.
        module: the module's name in the model.
        codec, dtype: the weights' codec and dtype.
        up, down: the shapes (E, N, K).
        produce: gives the planes of each expert.
        origin: see `ExpertHeader`.
        has_cpu_order: whether nibbles come in the order of this processor's products.

    Raises:
        OSError: it cannot be written.
    """
    checks = {half: ["0" * 16] * up[0] for half in HALVES}
    order = cpu_order_name() if has_cpu_order else PORTABLE
    header = ExpertHeader(module, codec, DTYPE_NAMES[dtype], up, down, order, origin, checks)
    beside = os.path.join(os.path.dirname(os.path.realpath(path)), f".hfkv-{secrets.token_hex(8)}.tmp")
    try:
        with open(beside, "xb") as file:
            _write(file, header, produce)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(beside)
        if isinstance(error, OSError) and error.errno in _FULL:
            num_bytes = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in header.shapes().values())
            raise OSError(
                error.errno,
                f"{error.strerror}: the experts of {module} take {num_bytes:,} bytes. Make room, use a smaller codec "
                "or another folder; files of other modules are as they were",
                path,
            ) from error
        raise


def _write(file: BinaryIO, header: ExpertHeader, produce: Produce) -> None:
    begins = {}
    length = end = len(header.to_bytes()) + 8
    for name, (shape, dtype) in header.shapes().items():
        begins[name], end = end, end + torch.Size(shape).numel() * dtype.itemsize
    file.truncate(end)
    for expert in range(header.up[0]):
        for half in HALVES:
            planes = produce(half, expert)
            header.checks[half][expert] = checksum(planes)
            for name, plane in planes.items():
                content = bytes_of(plane).numpy()
                file.seek(begins[f"{half}.{name}"] + expert * len(content))
                file.write(content.data)
    text = header.to_bytes()  # as long as before: checks are of a fixed length
    assert len(text) + 8 == length
    file.seek(0)
    file.write(len(text).to_bytes(8, "little") + text)


def save_experts(model: nn.Module, folder: str | os.PathLike[str], codec: str | None = None) -> None:
    """Writes the experts of each module of a model to a file of its own, that any machine can read.

    Args:
        model: its experts may be plain, compressed or offloaded; compressed ones are written as they are.
        folder: made where it is missing.
        codec: the codec for experts that are not compressed; None for none.

    Raises:
        ValueError: there are no experts, or they are compressed in another codec.
        OSError: a file cannot be written; the files before it are whole.
    """
    modules = experts_of(model)
    if not modules:
        raise ValueError(f"{type(model).__name__} has no experts that transformers' interface runs")
    for name, module in modules.items():
        given = [PresentWeights.of(module, parameter) for parameter in weight_names(module)]
        own = codec_of(MoEConfig(codec=codec or given[0].codec or "none"), given, name)
        _write_module(os.fspath(folder), name, given, own, has_cpu_order=False)


def load_experts(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    num_slots: int | None = None,
    eviction: str | Callable[[], Eviction] = "lru",
    trace: ExpertTrace | None = None,
) -> dict[str, Pair]:
    """Loads experts from files that `save_experts` or a patch wrote, for the modules of a model.

    Args:
        model: a model of the same architecture, left as it is; its own experts may be on meta.
        folder: the folder of the files.
        num_slots: slots a layer, which makes the experts offloaded; None puts all on the module's device.
        eviction, trace: the policy and the trace of offloaded experts.

    Returns:
        The weights into an expert and out of it, by the name of the experts module.

    Raises:
        FileNotFoundError: a module has no file.
        ValueError: a file is damaged, or of experts of other shapes.
    """
    found: dict[str, Pair] = {}
    for name, module in experts_of(model).items():
        file = ExpertFile(_path(os.fspath(folder), name))
        given = [PresentWeights.of(module, parameter, needs_numbers=False) for parameter in weight_names(module)]
        _check_file(file, name, given)
        sources = [file.source("up"), file.source("down")]
        device = given[0].device
        if num_slots is None:
            up, down = (source.resident(device, source.dtype) for source in sources)
            found[name] = up, down
            continue
        slots = ExpertSlots(sources[0], sources[1], num_slots, eviction, device, bus_for(device))
        if trace is not None:
            trace.add(name, slots.layer)
        found[name] = OffloadedWeights(slots, 0), OffloadedWeights(slots, 1)
    return found


def _path(folder: str, name: str) -> str:
    return os.path.join(folder, f"{name or 'experts'}.safetensors")


def file_of(folder: str, name: str, given: list[PresentWeights], codec: str, *, has_cpu_order: bool) -> ExpertFile:
    """The file of a module; it is written where it is not there."""
    path = _path(folder, name)
    if not os.path.exists(path):
        _write_module(folder, name, given, codec, has_cpu_order=has_cpu_order)
        return ExpertFile(path)
    file = ExpertFile(path)
    _check_file(file, name, given)
    if file.header.codec != codec or file.header.origin != _origin(given):
        raise ValueError(
            f"{path!r} holds experts of other weights, or in {file.header.codec} instead of {codec}; give another "
            "path, or remove it and they are written anew"
        )
    return file


def _origin(given: list[PresentWeights]) -> str:
    return "-".join(each.origin() for each in given)


def _write_module(folder: str, name: str, given: list[PresentWeights], codec: str, *, has_cpu_order: bool) -> None:
    os.makedirs(folder, exist_ok=True)
    up, down = given
    produce = {
        "up": up.planes(codec, up.device, has_cpu_order=has_cpu_order),
        "down": down.planes(codec, down.device, has_cpu_order=has_cpu_order),
    }
    write_experts(
        _path(folder, name),
        name,
        codec,
        up.dtype,
        up.shape,
        down.shape,
        lambda half, expert: produce[half](expert),
        origin=_origin(given),
        has_cpu_order=has_cpu_order,
    )


def _check_file(file: ExpertFile, name: str, given: list[PresentWeights]) -> None:
    header = file.header
    found = header.module, header.up, header.down
    wanted = name, *(each.shape for each in given)
    if found != wanted:
        raise ValueError(
            f"{file.path!r} holds {found[0]!r} of {found[1]} and {found[2]}, and {name!r} here is of {wanted[1]} and "
            f"{wanted[2]}: it is of another model"
        )
