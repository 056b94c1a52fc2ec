"""Files of experts: written whole, mapped, checked."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import hfkv
from hfkv.experts.config import MoEConfig
from hfkv.experts.families import experts_of
from hfkv.experts.offload import expert_file, expert_header
from hfkv.experts.offload.expert_file import ExpertFile, load_experts, save_experts
from hfkv.experts.offload.place import offload_experts
from hfkv.experts.offload.trace import ExpertTrace
from tests.experts_to_offload import CODECS
from tests.models_to_offload import NAME, compressed, logits, model, put
from tests.moe_models import model_of


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_come_back_as_they_were(codec: str, kind: str, tmp_path: Path) -> None:
    plain = model(kind)
    save_experts(plain, tmp_path, codec)
    assert {path.name for path in tmp_path.iterdir()} == {f"{NAME.format(layer)}.safetensors" for layer in (0, 1)}
    loaded = {slots: load_experts(plain, tmp_path, num_slots=slots, trace=ExpertTrace()) for slots in (None, 2)}
    expected = logits(compressed(plain, codec))
    for pairs in loaded.values():
        put(plain, pairs)
        assert torch.equal(logits(plain), expected)
    # Compressed and offloaded ones are written as they are.
    save_experts(plain, tmp_path / "again", codec)
    for layer in (0, 1):
        first, second = (
            ExpertFile(str(folder / f"{NAME.format(layer)}.safetensors")) for folder in (tmp_path, tmp_path / "again")
        )
        assert first.header.checks == second.header.checks
        second.verify_all()


def test_a_file_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    plain = model()
    save_experts(plain, tmp_path)
    with safe_open(tmp_path / f"{NAME.format(1)}.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"up.matrices", "down.matrices"}
        assert torch.equal(file.get_tensor("down.matrices"), plain.model.layers[1].mlp.experts.down_proj)


def path_of(folder: Path) -> Path:
    return folder / f"{NAME.format(0)}.safetensors"


@pytest.mark.parametrize("codec", CODECS)
def test_a_file_that_was_cut_short_or_changed_is_refused(codec: str, tmp_path: Path) -> None:
    plain = model()
    save_experts(plain, tmp_path, codec)
    path = path_of(tmp_path)
    content = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    for length in (0, 4, 8, 100, header_end - 1, header_end, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="holds no experts that can be read"):
            ExpertFile(str(path))
    for more in (b"\0", content):
        path.write_bytes(content + more)
        with pytest.raises(ValueError, match="holds no experts that can be read"):
            ExpertFile(str(path))
    for place in (0, 3, 7, *range(8, header_end, 97), header_end - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match="holds no experts that can be read"):
            ExpertFile(str(path))
    step = (len(content) - header_end) // 7
    for place in (header_end, len(content) - 1, *range(header_end + step, len(content), step)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"is damaged: the (up|down) projection of expert \d of model"):
            ExpertFile(str(path)).verify_all()


def test_pages_in_each_others_place_are_found() -> None:
    planes = {"a": torch.randint(0, 255, (3 * 4096 + 5,), dtype=torch.uint8)}
    first = expert_header.checksum(planes)
    swapped = planes["a"].clone()
    swapped[:4096], swapped[4096:8192] = planes["a"][4096:8192], planes["a"][:4096]
    tail = planes["a"].clone()
    tail[-1] += 1
    assert len({first, *(expert_header.checksum({"a": each}) for each in (swapped, tail))}) == 3
    # Wherever it lies, and in whatever dtype it is.
    assert expert_header.checksum({"a": torch.cat([tail[:3], planes["a"]])[3:]}) == first


def test_an_expert_that_is_damaged_does_not_reach_a_slot(tmp_path: Path) -> None:
    plain = model()
    save_experts(plain, tmp_path, "int8")
    path = path_of(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of the last expert
    path.write_bytes(content)
    up, _ = load_experts(plain, tmp_path, num_slots=2)[NAME.format(0)]
    slots = up.slots  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="is damaged"):
        slots.bring([0, 3])
    assert (list(slots.table.slot_of), slots.table.counts.misses) == ([0], 1)
    assert slots.bring([0, 1]) == [slots.table.slot_of[0], slots.table.slot_of[1]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda header: header.update(format="other"), "not of the format"),
        (lambda header: header.update(version=2), "of version 2, and this hfkv reads 1"),
        (lambda header: header.pop("codec"), "does not have"),
        (lambda header: header.update(codec="int3"), "of codec 'int3'"),
        (lambda header: header.update(dtype="U8"), "dtype 'U8'"),
        (lambda header: header.update(up=[4, -1, 32]), "the shape of its experts"),
        (lambda header: header.update(up=[4, 32]), "the shape of its experts"),
        (lambda header: header.update(checks={}), "no checks"),
        (lambda header: header["checks"].update(up=["0" * 16]), "not one for each expert"),
        (lambda header: header.update(module="other"), "does not agree with itself"),
    ],
)
def test_a_header_that_says_something_else_is_refused(change: Callable[[Any], Any], words: str, tmp_path: Path) -> None:
    save_experts(model(), tmp_path)
    path = path_of(tmp_path)
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    text = json.loads(metadata["hfkv"])
    change(text)
    save_file(tensors, path, {**metadata, "hfkv": json.dumps(text)})
    with pytest.raises(ValueError, match=words):
        ExpertFile(str(path))


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    plain = model()
    with pytest.raises(FileNotFoundError):
        load_experts(plain, tmp_path)
    save_file({"a": torch.zeros(3)}, path_of(tmp_path))
    with pytest.raises(ValueError, match="not of the format"):
        load_experts(plain, tmp_path)
    save_experts(plain, tmp_path)
    os.replace(tmp_path / f"{NAME.format(1)}.safetensors", path_of(tmp_path))
    with pytest.raises(ValueError, match="it is of another model"):
        load_experts(plain, tmp_path)
    with pytest.raises(ValueError, match="has no experts"):
        save_experts(nn.Linear(2, 2), tmp_path)


def test_a_folder_keeps_what_was_written_for_these_weights_only(tmp_path: Path) -> None:
    module = model().model.layers[0].mlp.experts
    config = MoEConfig(codec="int4", offload=True, path=str(tmp_path))
    offload_experts(module, config, 2)
    (path,) = tmp_path.iterdir()
    before = path.stat().st_mtime_ns
    offload_experts(module, config, 2)
    assert path.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="in int4 instead of int8; give another path"):
        offload_experts(module, MoEConfig(codec="int8", offload=True, path=str(tmp_path)), 2)
    module.down_proj[3] += 1
    with pytest.raises(ValueError, match="holds experts of other weights"):
        offload_experts(module, config, 2)


def test_nibbles_of_another_processor_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = model().model.layers[0].mlp.experts
    config = MoEConfig(codec="int4", offload=True, path=str(tmp_path))
    assert offload_experts(module, config, 2)[0].source.has_cpu_order
    monkeypatch.setattr(expert_file, "cpu_order_name", lambda: "cpu-other")
    with pytest.raises(ValueError, match="another kind of processor"):
        offload_experts(module, config, 2)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = model()
    save_experts(plain, tmp_path)
    before = path_of(tmp_path).read_bytes()

    def full(tensor: torch.Tensor) -> torch.Tensor:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(expert_file, "bytes_of", full)
    with pytest.raises(OSError, match=r"the experts of model\.layers\.0\.mlp\.experts take [\d,]+ bytes"):
        save_experts(plain, tmp_path, "int8")
    assert path_of(tmp_path).read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_files_of_other_weights_are_refused_whatever_differs(tmp_path: Path) -> None:
    moe = hfkv.MoEConfig(offload=True, path=str(tmp_path))
    hfkv.patch(model_of("mixtral"), moe=moe).undo()
    other = model_of("mixtral")
    experts = next(iter(experts_of(other).values()))
    experts.down_proj.data[3, 0, 0] += 1
    with pytest.raises(ValueError, match="other weights"):
        hfkv.patch(other, moe=moe)
