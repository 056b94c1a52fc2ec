"""Damaged files: each either raises ValueError or gives exactly what was saved. Never a crash, never other content."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hfkv
from hfkv import KVCache
from hfkv.sharing.files import cache_file as files
from hfkv.sharing.files.header import canonical
from hfkv.sharing.files.tensor_file import digest_of
from tests.tiny import llama, prompt
from tests.unit.test_files import everything, text_of

# One layer, one kv head of 4 dims, two rows: a header of less than 1,500 bytes, every byte of which is tried.
TINY = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "hidden_size": 8}


class Saved:
    """A saved cache, and a count of what became of its mutations."""

    def __init__(self, path: Path, kv: str = "int8", tokens: int = 5, **changes: Any) -> None:
        self.path, self.model = path, llama(**(TINY | changes))
        with hfkv.patch(self.model, kv):
            cache = KVCache(self.model, kv)
            self.model(**prompt(length=tokens, padding=2), past_key_values=cache)
            cache.save(path)
        self.whole, self.original = path.read_bytes(), everything(cache)
        assert everything(KVCache.load(path, self.model)) == self.original
        self.header_end = 8 + int.from_bytes(self.whole[:8], "little")
        self.outcomes: Counter[str] = Counter()
        self.digests = 0  # how many were refused because of the digest

    def result(self) -> tuple[KVCache | None, str]:
        try:
            return KVCache.load(self.path, self.model), ""
        except ValueError as error:
            return None, str(error)

    def load(self, what: object) -> str:
        """ "refused" or "same"; anything else fails the test."""
        loaded, refusal = self.result()
        if loaded is not None:
            assert everything(loaded) == self.original, what
            self.outcomes["same"] += 1
            return "same"
        assert str(self.path) in refusal, what
        assert any(remedy in refusal for remedy in ("Use a whole copy", "update hfkv")), what
        self.digests += "its digest is not" in refusal
        self.outcomes["refused"] += 1
        return "refused"

    def try_bytes(self, mutant: bytes, what: object) -> str:
        assert mutant != self.whole, what
        self.path.write_bytes(mutant)
        return self.load(what)

    def flip(self, index: int, bits: int) -> str:
        return self.try_bytes(self.whole[:index] + bytes([self.whole[index] ^ bits]) + self.whole[index + 1 :], index)

    def try_tensors(self, tensors: dict[str, torch.Tensor], what: object) -> str:
        save_file(
            {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
            self.path,
            {"hfkv": self.text},
        )
        return self.load(what)

    @property
    def text(self) -> str:
        self.__dict__.setdefault("_text", None)
        if self._text is None:
            self.path.write_bytes(self.whole)
            self._text = text_of(self.path)
        return self._text

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        self.path.write_bytes(self.whole)
        return {name: tensor.clone() for name, tensor in load_file(self.path).items()}


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return Saved(tmp_path / "chat.safetensors")


def test_every_byte_of_the_header_flipped(saved: Saved) -> None:
    assert saved.header_end < 1_500, "try a sample of its bytes instead, and say so"
    for index in range(saved.header_end):
        for bits in (0xFF, 0x01):
            saved.flip(index, bits)
    assert saved.outcomes.total() == 2 * saved.header_end > 2_000
    assert saved.outcomes["refused"] > 0.99 * saved.outcomes.total()


def test_every_value_of_every_byte_of_the_length(saved: Saved) -> None:
    for index in range(8):
        for bits in range(1, 256):
            assert saved.flip(index, bits) == "refused"
    assert saved.outcomes == {"refused": 8 * 255}


def test_every_byte_of_the_data_flipped(saved: Saved) -> None:
    for index in range(saved.header_end, len(saved.whole)):
        assert saved.flip(index, 0x01) == "refused"
    count = len(saved.whole) - saved.header_end
    assert count > 100
    assert saved.outcomes == {"refused": count}
    assert saved.digests == count, "nothing but the digest sees these"


def test_without_the_digest_flipped_data_would_be_other_content(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = json.loads(saved.text)["digest"]
    monkeypatch.setattr(files, "digest_of", lambda *_: digest)
    different = 0
    for index in range(saved.header_end, len(saved.whole)):
        mutant = bytearray(saved.whole)
        mutant[index] ^= 0x01
        saved.path.write_bytes(mutant)
        loaded, _ = saved.result()
        assert loaded is not None
        different += everything(loaded) != saved.original
    assert different == len(saved.whole) - saved.header_end, "everything that is written down is compared"


def test_truncated_and_extended_at_every_length(saved: Saved) -> None:
    for length in range(len(saved.whole)):
        assert saved.try_bytes(saved.whole[:length], length) == "refused"
    for rest in (b"\0", b" ", b"\0" * 8, saved.whole):
        assert saved.try_bytes(saved.whole + rest, rest) == "refused"
    assert saved.outcomes == {"refused": len(saved.whole) + 4}


def test_the_same_tensors_in_another_order_are_the_same_cache(saved: Saved) -> None:
    tensors = saved.tensors
    for names in (sorted(tensors), sorted(tensors, reverse=True)):
        assert saved.try_tensors({name: tensors[name] for name in names}, names) == "same"
    header = json.loads(saved.whole[8 : saved.header_end])
    for spaces in range(1, 9):
        text = json.dumps(dict(reversed(header.items())), indent=spaces).encode()
        mutant = len(text).to_bytes(8, "little") + text + saved.whole[saved.header_end :]
        assert saved.try_bytes(mutant, spaces) == "same"
    assert saved.outcomes == {"same": 10}


def test_other_tensors_under_the_same_text(saved: Saved) -> None:
    tensors = saved.tensors
    for name, tensor in tensors.items():
        others = {key: value for key, value in tensors.items() if key != name}
        for changed in mutants(tensor):
            assert saved.try_tensors({**others, name: changed}, name) == "refused"
        assert saved.try_tensors(others, name) == "refused"
        assert saved.try_tensors({**tensors, f"{name}.more": tensor}, name) == "refused"
        for other in (f"{name}0", "", "x", *(others if name < "2" else ())):
            if other not in others:
                assert saved.try_tensors({**others, other: tensor}, (name, other)) == "refused"
            elif tensors[other].shape != tensor.shape or not torch.equal(tensors[other], tensor):
                swapped = {**others, name: tensors[other].clone(), other: tensor}
                assert saved.try_tensors(swapped, (name, other)) == "refused"
    assert saved.outcomes["refused"] == saved.outcomes.total() > 60
    assert saved.digests > 40


def mutants(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Others of another shape or dtype, or with other numbers."""
    yield tensor[..., :-1]
    yield tensor[:1]
    yield tensor.flatten()
    yield tensor.unsqueeze(0)
    yield tensor.transpose(0, 1).contiguous() if tensor.shape[0] != tensor.shape[1] else tensor[..., None]
    yield torch.cat([tensor, tensor], dim=-1)
    yield tensor.new_zeros(())
    for dtype in (torch.float32, torch.float16, torch.int32, torch.uint8, torch.complex64):
        if tensor.dtype != dtype:
            yield tensor.to(dtype)
    if tensor.element_size() == 1:
        yield tensor.view(torch.float8_e5m2)


def tokens_of(found: list[Any]) -> list[Any]:
    """What `everything` says but for the config and the pads."""
    return [value for value in found[1:] if not (isinstance(value, tuple) and isinstance(value[0], int))]


GARBAGE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 10**30, 1.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "none", "\0"),
    *([], {}, [[]], [None], [0], [-1, 2], [[1, 2], [3]], {"": None}, {"0": {}}, {"codec": "none"}, [[[[[[[0]]]]]]]),
]


def places(value: Any, put: Callable[[Any], Any]) -> Iterator[Callable[[Any], Any]]:
    """Ways to replace each part of a JSON value."""
    yield put
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in pairs:

        def inside(new: Any, key: Any = key) -> Any:
            changed = value.copy()
            changed[key] = new
            return put(changed)

        yield from places(part, inside)


@pytest.mark.parametrize("kv", ["int8", "window:4+sinks:1+global_heads:0=1+paged+page_size:2"])
def test_garbage_under_a_digest_that_is_right(kv: str, tmp_path: Path) -> None:
    saved = Saved(tmp_path / "chat.safetensors", kv, num_key_value_heads=2)
    given, tensors = json.loads(saved.text), saved.tensors
    del given["digest"]
    deep: Any = 0
    for _ in range(400):
        deep = [deep]
    same = []
    for place in places(given, lambda new: new):
        for garbage in (*GARBAGE, deep):
            header = place(garbage)
            if canonical(header) == canonical(given) or not isinstance(header, dict):
                continue
            text = canonical({**header, "digest": digest_of(canonical(header), tensors)})
            save_file(tensors, saved.path, {"hfkv": text})
            loaded, refusal = saved.result()
            if loaded is None:
                assert str(saved.path) in refusal, text
                saved.outcomes["refused"] += 1
                continue
            # Other policies or padding that make sense are no garbage; the tokens, keys and values are the same.
            assert tokens_of(everything(loaded)) == tokens_of(saved.original), text
            same.append(text)
    assert saved.digests == 0
    assert saved.outcomes["refused"] > 1_000
    assert 0 < len(same) < 20


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["none", "int4+window:4+sinks:1+paged+page_size:2"])
def test_many_random_edits(kv: str, tmp_path: Path) -> None:
    saved = Saved(tmp_path / "chat.safetensors", kv, tokens=12, num_hidden_layers=2, num_key_value_heads=2)
    drawn = random.Random(0)
    for number in range(20_000):
        mutant = bytearray(saved.whole)
        end = saved.header_end if number % 2 else len(mutant)
        for _ in range(drawn.randint(1, 3)):
            begin, length = drawn.randrange(end), drawn.choice((1, 1, 1, 2, 8, 64))
            edit = drawn.choice(("set", "digit", "cut", "insert", "copy"))
            new = bytes(drawn.randrange(256) for _ in range(length))
            if edit == "digit":
                new = bytes(drawn.choice(b'0123456789-.,:[]{}" ') for _ in range(length))
            elif edit == "copy":
                new = bytes(mutant[(other := drawn.randrange(end)) : other + length])
            mutant[begin : begin + (0 if edit == "insert" else length)] = b"" if edit == "cut" else new
        if mutant != saved.whole:
            saved.try_bytes(bytes(mutant), bytes(mutant))
    assert saved.outcomes.total() > 19_000
    assert saved.outcomes["refused"] > 0.9 * saved.outcomes.total()
