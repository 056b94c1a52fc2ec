"""`encode`: the planes of a prompt, by the kernel that writes new tokens, and the bits of the codec."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import hfkv
from hfkv.codecs import CODECS, Codecs
from hfkv.codecs.base import Codec
from hfkv.kernels.encoding import encode
from hfkv.kernels.native.library import library, why_not
from tests.tiny import llama_config


@pytest.mark.parametrize("codec", [*CODECS, "k:int4+v:none", "k:none+v:int8"])
@pytest.mark.parametrize("count", [0, 1, 70])
def test_planes_are_the_codecs_own(codec: str, count: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        keys = torch.randn(2, count, 3, 48).to(dtype).transpose(1, 2)  # as models give them
        values = torch.randn(2, 3, count, 7).to(dtype)
        codecs = Codecs.named(codec)
        found = encode(codecs, keys, values)
        expected = codecs.key.encode(keys) + codecs.value.encode(values)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            assert one.shape == other.shape
            assert count == 0 or torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.skipif(library() is None, reason=why_not() or "none")
def test_a_prompt_is_encoded_by_the_kernel() -> None:
    cache = hfkv.QuantizedCache(llama_config(), codec="int4")
    states = torch.randn(1, 2, 40, 32)
    with mock.patch.object(Codec, "encode", autospec=True, side_effect=Codec.encode) as by_torch:
        cache.update(states, states, 0)
    # Of no tokens, to find out how wide planes are, if that is not known yet.
    assert {call.args[1].shape[2] for call in by_torch.call_args_list} <= {0}
