"""Dense feed-forward modules of transformers' decoders: how they are found, and their weights as experts'."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

ACTIVATIONS = ("act_fn", "activation_fn", "act")


@dataclass(frozen=True)
class DenseFFN:
    """A feed-forward module of linear maps and an activation.

    Attributes:
        name: its attribute in the decoder layer.
        module: the module.
        up: its linear maps from the hidden size: gate and up, both in one, or up alone.
        down: its linear map back.
        gated: whether there is a gate.
        activation: the activation's module.
    """

    name: str
    module: nn.Module
    up: tuple[nn.Linear, ...]
    down: nn.Linear
    gated: bool
    activation: nn.Module

    @property
    def intermediate_size(self) -> int:
        return self.down.in_features

    @property
    def has_bias(self) -> bool:
        """Whether any of the maps has a bias."""
        return any(linear.bias is not None for linear in (*self.up, self.down))

    def stacks(self, num_experts: int) -> dict[str, torch.Tensor]:
        """`num_experts` copies of `expert_weights`, stacked: [E, 2I, H] and so on, views of one copy."""
        return {name: weight.expand(num_experts, *weight.shape) for name, weight in self.expert_weights().items()}

    def expert_weights(self) -> dict[str, torch.Tensor]:
        """The weights of one expert by the names of the stacks: [2I, H] or [I, H], [H, I], and biases.

        Biases that only some of the maps have are zero in the others.
        """
        name = "gate_up_proj" if self.gated else "up_proj"
        weights = {
            name: torch.cat([linear.weight.detach() for linear in self.up]),
            "down_proj": self.down.weight.detach(),
        }
        if self.has_bias:
            weights[f"{name}_bias"] = torch.cat([_bias(linear) for linear in self.up])
            weights["down_proj_bias"] = _bias(self.down)
        return weights


# names of the linear maps, the last of them the way back -> whether the form has a gate
FORMS: dict[tuple[str, ...], bool] = {
    ("gate_proj", "up_proj", "down_proj"): True,
    ("gate_up_proj", "down_proj"): True,
    ("up_proj", "down_proj"): False,
    ("fc1", "fc2"): False,
    ("dense_h_to_4h", "dense_4h_to_h"): False,
}


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a model's decoder.

    Raises:
        ValueError: no layers could be found.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no decoder with a list of layers, as causal decoders have")
    return layers


def dense_ffn(layer: nn.Module) -> DenseFFN | str:
    """The dense feed-forward module of a decoder layer, or why there is none."""
    for name, module in layer.named_children():
        children = dict(module.named_children())
        activations = [children.pop(key) for key in ACTIVATIONS if key in children]
        maps = tuple(children)
        if set(maps) in map(set, FORMS) and len(activations) == 1:
            form = next(form for form in FORMS if set(form) == set(maps))
            linears = [children[key] for key in form]
            reason = _refusal(name, dict(zip(form, linears, strict=True)))
            if reason is not None:
                return reason
            *up, down = linears
            return DenseFFN(name, module, tuple(up), down, FORMS[form], activations[0])  # type: ignore[arg-type]
    kinds = ", ".join(f"{name} ({type(module).__name__})" for name, module in layer.named_children())
    return f"none of its modules is a feed-forward module of a known form: {kinds}"


def _refusal(name: str, linears: dict[str, nn.Module]) -> str | None:
    for key, linear in linears.items():
        origin = type(linear).__module__.split(".")[0]
        if origin == "peft":
            return f"{name}.{key} holds an adapter ({type(linear).__name__}); merge it first: model.merge_and_unload()"
        if type(linear) is not nn.Linear:
            return (
                f"{name}.{key} is a {origin} {type(linear).__name__}, whose weight cannot be copied into a stack of "
                "experts; load the model without quantisation, upcycle it, and quantise the experts then"
            )
        if linear.weight.is_meta:
            return (
                f"the weight of {name}.{key} is on the meta device (offloaded, or never loaded), so there is nothing "
                "to copy; load the model onto one device, without offloading, and upcycle it there"
            )
        if hasattr(linear, "parametrizations"):
            return f"{name}.{key} is parametrised (an adapter, or weight norm); fold that in first"
    return None


def _bias(linear: nn.Linear) -> torch.Tensor:
    if linear.bias is None:
        return linear.weight.new_zeros(linear.out_features).detach()
    return linear.bias.detach()


@torch.no_grad()
def add_noise(experts: nn.Module, noise: float) -> None:
    """Adds normal noise, of `noise` times the standard deviation of each matrix, to every expert but the first.

    Args:
        experts: a module whose parameters are stacks [E, ...].
        noise: 0 for none.
    """
    if noise:
        for stack in experts.parameters():
            if stack.ndim == 3:
                stack[1:] += torch.randn_like(stack[1:]) * (noise * stack[0].float().std()).to(stack.dtype)
