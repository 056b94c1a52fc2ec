"""Layers of experts for the suite ``moe``: who takes part, their weights, and what is right."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from hfkv.bench.contenders import Contender, named
from hfkv.bench.setting import BenchError
from hfkv.experts.config import MoEConfig
from hfkv.models.layer_shapes import MoEShape
from hfkv.patches.patch import patch

GROUPED, BATCHED, EAGER, PEFT = "grouped_mm", "batched_mm", "eager", "PEFT"
MOE_PEERS = (GROUPED, BATCHED, EAGER, PEFT)
LORA = "+lora"  # behind a config: with adapters on the experts
RANK, ALPHA = 8, 16
# Of adapters' numbers: with them a layer's output moves by a tenth, far more than any rounding.
ADAPTER_STD = 0.02
NAMES = "gate_up_proj", "down_proj"


def ours(text: str) -> Contender:
    """hfkv's experts of a config such as ``"int8"``, with `LORA` behind it under adapters; else a `BenchError`."""
    try:
        moe = MoEConfig.parse(text.removesuffix(LORA))
    except (TypeError, ValueError) as error:
        raise BenchError(f"moe {error}; behind it {LORA} puts adapters on the experts") from error
    if moe.offload:
        raise BenchError(f"moe {text!r}: the suite moe measures experts that are on their device; leave offload out")
    name = "hfkv" if str(moe) == "auto" else f"hfkv {moe}"
    if not text.endswith(LORA):
        return Contender(name, moe=moe)
    return Contender(f"{name} + LoRA", moe=moe, bare=name, reason=_peft_reason())


def peers(names: Sequence[str] | None, device: torch.device) -> list[Contender]:
    """Transformers' own of these names, None for all but `EAGER`; first those that the others are compared with."""
    wanted = {BATCHED, PEFT} if names is None else named(names, MOE_PEERS)
    wanted |= {GROUPED} if device.type == "cpu" else {GROUPED, BATCHED}
    known = {name: Contender(name, implementation=name) for name in MOE_PEERS}
    known[PEFT] = Contender(PEFT, implementation=GROUPED, bare=GROUPED, reason=_peft_reason())
    return [contender for name, contender in known.items() if name in wanted]


def _peft_reason() -> str | None:
    is_there = importlib.util.find_spec("peft") is not None
    return None if is_there else 'needs PEFT, which is not installed: pip install "hfkv[lora]"'


def stock_model(shape: MoEShape, dtype: torch.dtype, device: torch.device, seed: int) -> PreTrainedModel:
    """A Mixtral of one layer whose experts are of the shape; what else it has is small."""
    config = MixtralConfig(
        vocab_size=16,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        initializer_range=0.02,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation=GROUPED).eval()


class Adapters:
    """The LoRA of one run: of each parameter A `[E r, inputs]` and B `[outputs, r E]`, as PEFT keeps them."""

    def __init__(self, shape: MoEShape, device: torch.device, seed: int) -> None:
        self.num_experts = shape.experts
        generator, rank = torch.Generator().manual_seed(seed), RANK * shape.experts
        widths = zip(NAMES, (shape.hidden, shape.intermediate), (2 * shape.intermediate, shape.hidden), strict=True)
        self.factors = {
            name: tuple(
                (torch.randn(size, generator=generator) * ADAPTER_STD).to(device)
                for size in ((rank, inputs), (outputs, rank))
            )
            for name, inputs, outputs in widths
        }

    def add_to(self, model: PreTrainedModel) -> Any:
        """Puts them on the experts of a model with PEFT, and returns what PEFT makes of it."""
        targets = [f"mlp.experts.{name}" for name in NAMES]
        with warnings.catch_warnings():
            # PEFT calls what transformers deprecates, and imports bitsandbytes, which misses kernels nothing here uses.
            warnings.simplefilter("ignore")
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=targets)
            wrapped = get_peft_model(model, lora).eval()
        wrapper = experts_of(model)
        while hasattr(wrapper, "parameter_name"):
            name = wrapper.parameter_name
            for layers, factor in zip((wrapper.lora_A, wrapper.lora_B), self.factors[name], strict=True):
                weight = layers["default"].weight
                if weight.shape != factor.shape:
                    shapes = f"{list(weight.shape)}, not as {list(factor.shape)}"
                    raise BenchError(f"this PEFT keeps {name}'s adapter as {shapes}; pip install --upgrade peft")
                weight.detach().copy_(factor)
            wrapper = wrapper.base_layer
        return wrapped

    def delta(self, name: str, expert: int) -> torch.Tensor:
        """What they add to one expert's matrix, in float32."""
        a, b = self.factors[name]
        a, b = a.view(self.num_experts, RANK, -1)[expert], b.view(b.shape[0], RANK, self.num_experts)[..., expert]
        return ALPHA / RANK * (b @ a)


def experts_of(model: Any) -> Any:
    """The experts module of a model's only layer, or what PEFT has wrapped around it."""
    return model.model.layers[0].mlp.experts


class Layer(NamedTuple):
    """A contender's experts, the bytes of their weights and adapters, and how hfkv keeps them and why."""

    experts: Any
    held_bytes: int
    form: str | None = None


def build_layer(contender: Contender, stock: PreTrainedModel, adapters: Adapters) -> Layer:
    """A contender's layer, with weights of its own: what one has read does not lie in a cache for the next."""
    model = copy.deepcopy(stock)
    held = sum(getattr(experts_of(model), name).nbytes for name in NAMES)
    if contender.implementation is not None:
        model.set_experts_implementation(contender.implementation)
    whole: Any = adapters.add_to(model) if contender.bare else model
    form = None
    if contender.moe is not None:
        report = patch(whole, moe=contender.moe).moe
        assert report is not None
        held, swap = report.bytes_after, report.swapped[0]
        form = f"{swap.form}: {swap.why}"
    if contender.bare:
        held += sum(parameter.nbytes for name, parameter in model.named_parameters() if "lora_" in name)
    return Layer(experts_of(model), held, form)


def reference(stock: PreTrainedModel, adapters: Adapters | None) -> Any:
    """The experts in fp32 as transformers' eager code runs them, one expert's matrices in fp32 at a time."""
    given = experts_of(stock)
    with torch.device("meta"):
        experts: Any = type(given)(copy.deepcopy(given.config)).eval()
    experts.config._experts_implementation = EAGER
    for name in NAMES:
        delattr(experts, name)
        setattr(experts, name, _InFloat(getattr(given, name).detach(), name, adapters))
    return experts


class _InFloat(nn.Module):
    """Stands in the place of a parameter `[E, N, K]` that is only ever asked for one expert."""

    def __init__(self, matrices: torch.Tensor, name: str, adapters: Adapters | None) -> None:
        super().__init__()
        self.matrices, self.name, self.adapters = matrices, name, adapters

    def __getitem__(self, expert: torch.Tensor | int) -> torch.Tensor:
        matrix = self.matrices[int(expert)].float()
        return matrix if self.adapters is None else matrix + self.adapters.delta(self.name, int(expert))
