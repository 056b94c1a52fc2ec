"""Windows under any sequence of forwards, crops, reorders and assignments: always what brute force says."""

from __future__ import annotations

import functools
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hfkv
from hfkv import KVConfig, Window
from tests import brute_force
from tests.tiny import llama

SCHEDULES = {"none": None, "shrinks": lambda seen: 20 if seen < 18 else 4, "jumps": lambda seen: 2 + 5 * (seen % 4)}


@functools.cache
def patched() -> Any:
    """A float64 model with the hfkv attention, whatever the cache it is given."""
    model = llama().double()
    hfkv.patch(model)
    return model


@st.composite
def windows(draw: st.DrawFn) -> Window:
    schedule = SCHEDULES[draw(st.sampled_from(sorted(SCHEDULES)))]
    return Window(
        size=draw(st.integers(1, 12) if schedule is None else st.integers(10, 20)),
        sinks=draw(st.integers(0, 5)),
        sink_positions=draw(st.sampled_from(["absolute", "cache"])),
        schedule=schedule,
        global_heads=draw(st.sampled_from([{}, {1: [0]}])),
        **draw(
            st.one_of(
                st.just({}),
                st.fixed_dictionaries(
                    {
                        "summary": st.just("mean"),
                        "summary_pages": st.integers(1, 4),
                        "summary_page_size": st.integers(1, 6),
                    }
                ),
            )
        ),
    )


class Text:
    """A cache, and beside it the whole text it stands for."""

    def __init__(self, kv: KVConfig, pads: list[int], seed: int) -> None:
        self.kv, self.pads = kv, list(pads)
        self.cache = hfkv.KVCache(patched(), kv, rotary())
        self.generator = torch.Generator().manual_seed(seed)
        self.ids = torch.empty(len(pads), 0, dtype=torch.long)

    def forward(self, count: int) -> None:
        new = torch.randint(3, 99, (len(self.pads), count), generator=self.generator)
        self.ids = torch.cat((self.ids, new), dim=1)
        seen = self.ids.shape[1]
        pads = tuple(min(pad, seen) for pad in self.pads)
        inputs: dict[str, Any] = {"position_ids": brute_force.positions(self.ids, pads)[:, -count:]}
        if any(pads):
            inputs["attention_mask"] = (torch.arange(seen) >= torch.tensor(pads)[:, None]).long()
        ours = patched()(new, past_key_values=self.cache, **inputs).logits
        expected = brute_force.logits(patched(), self.ids, self.kv, pads)[:, -count:]
        real = torch.arange(seen - count, seen) >= torch.tensor(pads)[:, None]
        assert real.sum() == 0 or (ours - expected)[real].abs().max() <= 1e-9 * expected[real].abs().max()

    def crop(self, count: int) -> None:
        if count > self.ids.shape[1]:
            return
        try:
            self.cache.crop(-count)
        except RuntimeError as error:
            assert "the window has dropped tokens" in str(error)  # noqa: PT017
            return
        self.ids = self.ids[:, : self.ids.shape[1] - count]

    def reorder(self, seed: int) -> None:
        rows = torch.randint(len(self.pads), (len(self.pads),), generator=torch.Generator().manual_seed(seed))
        self.cache.reorder_cache(rows)
        self.ids, self.pads = self.ids[rows], [self.pads[row] for row in rows.tolist()]

    def assign(self) -> None:
        for layer in self.cache.layers:
            if layer.is_initialized and isinstance(layer, hfkv.cache.kv_cache.KVLayer):
                layer.keys, layer.values = layer.keys, layer.values

    def record(self) -> None:
        self.cache.activate_past_recording()


@functools.cache
def rotary() -> Any:
    return hfkv.models.probe.probe_rotary(patched())


ACTIONS = st.one_of(
    st.tuples(st.just("forward"), st.integers(1, 25)),
    st.tuples(st.just("forward"), st.integers(1, 3)),
    st.tuples(st.just("crop"), st.integers(0, 8)),
    st.tuples(st.just("reorder"), st.integers(0, 99)),
    st.tuples(st.just("assign")),
    st.tuples(st.just("record")),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    windows(),
    st.sampled_from(["none", "int8", "int4+paged+page_size:2", "k:int8+v:int4", "paged+page_size:8", "offload"]),
    st.lists(st.integers(0, 9), min_size=1, max_size=3),
    st.lists(ACTIONS, min_size=1, max_size=9),
    st.integers(0, 99),
)
def test_any_sequence_of_calls_gives_what_brute_force_gives(
    window: Window, policies: str, pads: list[int], actions: list[tuple[Any, ...]], seed: int
) -> None:
    kv = KVConfig.parse(policies)
    kv = KVConfig(kv.codec, window, kv.store, kv.page_size, kv.offload)
    if window.summary and kv.codec != "none":
        kv = KVConfig("none", window, kv.store, kv.page_size, kv.offload)  # the reference's means are not encoded
    with torch.no_grad():
        text = Text(kv, pads, seed)
        for name, *arguments in (("forward", 7), *actions, ("forward", 2)):
            getattr(text, name)(*arguments)
