"""The suite ``prefill``: a whole prompt to its first new token, of ``generate()`` on a model of the shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from hfkv.bench.contenders import DYNAMIC, Contender
from hfkv.bench.gate import Errors
from hfkv.bench.shapes import share_weights
from hfkv.bench.step import StepClock, check_logits
from hfkv.bench.tokens import allocated_bytes, held_bytes
from hfkv.patches.patch import patch

# A prompt takes long: fewer turns than of steps are waited for.
LEAST_TURNS = 3


@dataclass
class Prompt:
    """A left-padded batch of random tokens, and DynamicCache's logits after it.

    Attributes:
        model: with the weights.
        ids: `[B, T]`.
        mask: 1 where a token is real, `[B, T]`.
        standard: `[B, V]`, once DynamicCache has read it; it is the first.
    """

    model: PreTrainedModel
    ids: torch.Tensor
    mask: torch.Tensor
    standard: torch.Tensor | None = None

    @classmethod
    def draw(cls, model: PreTrainedModel, lengths: Sequence[int], seed: int) -> Prompt:
        """A prompt whose rows have so many real tokens."""
        device = model.device
        generator = torch.Generator(device).manual_seed(seed)
        shape = (len(lengths), max(lengths))
        ids = torch.randint(model.config.vocab_size, shape, device=device, generator=generator)
        columns = torch.arange(max(lengths), device=device)
        mask = columns >= max(lengths) - torch.tensor(lengths, device=device)[:, None]
        return cls(model, ids * mask, mask.long())


class PrefillLane:
    """One contender's model, over the same weights as everyone's.

    Args:
        contender: whose.
        prompt: what it reads.
    """

    def __init__(self, contender: Contender, prompt: Prompt) -> None:
        self.contender = contender
        self.name = contender.name
        self.prompt = prompt
        self.model = share_weights(prompt.model)
        self.cache: Any = None
        self.logits: torch.Tensor | None = None
        if contender.is_ours:
            patch(self.model, contender.kv)

    def open(self) -> None:
        """Reads the prompt a first time; every turn does so anew."""
        self.turn()

    def check(self) -> Errors:
        """The first new token's logits against DynamicCache's."""
        logits = self.logits
        assert logits is not None
        if self.contender.name == DYNAMIC:
            self.prompt.standard = logits
        assert self.prompt.standard is not None
        return check_logits(self.contender, self.model, logits, self.prompt.standard)

    def warm_up(self) -> None:
        """Nothing: `open` has read the prompt."""

    def turn(self) -> list[float]:
        """The prompt once, in ms."""
        return self.read(self.prompt.ids, self.prompt.mask)

    def read(self, ids: torch.Tensor, mask: torch.Tensor) -> list[float]:
        """A prompt `[B, T]` with its mask to the first new token, in ms."""
        clock = StepClock()
        self.cache = None
        given: dict[str, Any] = {}
        if not self.contender.is_ours and self.contender.name != DYNAMIC and self.contender.new_cache is not None:
            given["past_key_values"] = self.contender.new_cache(self.model, ids.shape[1] + 1)
        output: Any = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=1,
            do_sample=False,
            streamer=clock,
            return_dict_in_generate=True,
            output_logits=True,
            **given,
        )
        self.cache, self.logits = output.past_key_values, output.logits[0]
        return clock.milliseconds

    def held_bytes(self) -> int:
        """Of all layers, as the last turn left them."""
        return held_bytes(self.cache, self.model.config.num_hidden_layers)

    def allocated_bytes(self) -> int:
        """Of all layers, as the last turn left them."""
        return allocated_bytes(self.cache, self.model.config.num_hidden_layers)

    def bus_bytes(self) -> None:
        """Nothing is said of it."""

    def read_bytes(self) -> None:
        """Reading a prompt is arithmetic, not bytes: it has no floor here."""
        return None

    def close(self) -> None:
        """Lets go of the cache."""
        self.cache = None
