"""What `MoEConfig` takes and says."""

from __future__ import annotations

import pytest

from hfkv import MoEConfig


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("auto", MoEConfig()),
        ("none", MoEConfig()),
        ("int8", MoEConfig("int8")),
        ("int4+offload", MoEConfig("int4", offload=True)),
        ("offload+device_budget:2GiB+eviction:lfu", MoEConfig(offload=True, device_budget=2**31, eviction="lfu")),
    ],
)
def test_words_and_fields_say_the_same(text: str, config: MoEConfig) -> None:
    assert MoEConfig.parse(text) == config
    assert MoEConfig.parse(str(config)) == config
    assert MoEConfig.of(text) == MoEConfig.of(config) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int9", "unknown word 'int9'; allowed: auto, none, int8, int4, offload"),
        ("int8+int4", "gives codec twice"),
        ("int8+device_budget:1GiB", "device_budget needs offload=True"),
        ("int8+eviction:lfu", "eviction needs offload=True"),
        ("offload+device_budget:much", "takes a size such as"),
        ("offload+eviction:random", "eviction must be one of"),
        ("offload:8", "unknown word 'offload:8'"),
    ],
)
def test_what_is_not_understood_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig.parse(text)


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match=r"moe must be an hfkv\.MoEConfig"):
        MoEConfig.of(8)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="offload must be True or False"):
        MoEConfig(offload="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="codec must be one of none, int8, int4"):
        MoEConfig("fp8")
