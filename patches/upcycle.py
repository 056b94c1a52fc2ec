"""`upcycle`: the dense feed-forward modules of a model become mixtures of experts that start out as copies of them."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from hfkv.codecs.autocast import in_own_precision
from hfkv.sparse_moe.ffn import DenseFFN, add_noise, decoder_layers, dense_ffn
from hfkv.sparse_moe.layer import ROUTER_STD, Z_COEF, SparseMoE
from hfkv.sparse_moe.routing import Gate, Routing
from hfkv.sparse_moe.upcycling import convert

# Where the config of a model notes how it was upcycled.
ENTRY = "hfkv_upcycle"
# Largest difference between a dense module and its mixture, of the largest output, by dtype.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
CHECKED_TOKENS = 16


@in_own_precision
def upcycle(
    model: PreTrainedModel,
    num_experts: int = 8,
    top_k: int = 2,
    *,
    layers: str | slice | Sequence[int] | None = None,
    noise: float = 0.0,
    router_std: float = ROUTER_STD,
    to: Literal["mixtral", "qwen3_moe"] | None = None,
    routing: Routing = "hard",
    gate: Gate = "softmax",
    balance: Literal["loss", "bias"] | None = "loss",
    balance_coef: float | None = None,
    z_coef: float = Z_COEF,
    bias_update_rate: float | None = None,
) -> PreTrainedModel:
    """Turns dense feed-forward modules into mixtures of `num_experts` copies of themselves (sparse upcycling).

    The weights of a token sum to 1, so until it is trained the model computes what it computed before (in float32
    within 1e-5 of the largest logit), with `top_k` times the work in these modules. The modules are found by their form
    (gate, up and down maps; up and down maps), and each is compared with its mixture on random tokens before any is
    swapped.

    Without `to` the model is changed in place, and there is no way back. With it the model is left alone, and a stock
    model of transformers comes back, whose config, files and loss are transformers' own.

    `save_pretrained` of a model changed in place writes its weights, and into its config an entry ``hfkv_upcycle``.
    Load it with `hfkv.patches.upcycle.load_upcycled`: ``from_pretrained`` would build the dense model, and report
    weights that do not fit.

    Args:
        model: a dense transformers model with a decoder, on one device, neither patched by hfkv, nor quantised, nor
            wrapped by PEFT.
        num_experts: E.
        top_k: K, 2 or more: with one expert a token either the weight is always 1, and the router learns nothing, or
            the model does not start out equal.
        layers: which decoder layers: None for all, a slice, a sequence of indices, or ``"every:N"`` for the N-th, the
            2N-th, and so on.
        noise: standard deviation of what is added to every copy except the first, as a share of each matrix's own.
            Above 0 the model does not start out equal.
        router_std: standard deviation of the routers' weights, drawn from torch's global generator.
        to: None, or a stock architecture: ``"mixtral"`` for Llama and Mistral, ``"qwen3_moe"`` for Qwen3. Routing and
            losses are then that architecture's, with `balance_coef` as its ``router_aux_loss_coef``.
        routing, gate, balance, balance_coef, z_coef, bias_update_rate: see `hfkv.SparseMoE`.

    Returns:
        The model itself, or with `to` a new one, in the same dtype, on the same device, in the same mode.

    Raises:
        TypeError: the model is no transformers model, or an argument has another type.
        ValueError: an argument is not allowed, or a layer cannot be upcycled, with the reason.
        RuntimeError: the model is patched, or upcycled already, or a mixture did not compute what its module computed.
    """
    check_model(model)
    if routing == "hard" and top_k == 1:
        raise ValueError(
            "top_k=1 cannot be upcycled: with weights that sum to 1 the weight is always 1 and the router gets no "
            "gradient, and with others the model does not start out equal to the dense one; use top_k=2 or more"
        )
    for name, value in (("noise", noise), ("router_std", router_std)):
        if not value >= 0:
            raise ValueError(f"{name} takes 0 or more, got {value!r}")
    all_layers = decoder_layers(model)
    chosen = chosen_layers(layers, len(all_layers))
    ffns = {index: _dense(model, index, all_layers[index]) for index in chosen}
    own: dict[str, Any] = {"routing": routing, "gate": gate, "balance": balance, "bias_update_rate": bias_update_rate}
    own["z_coef"] = z_coef
    if to is not None:
        changed = [name for name, value in own.items() if value != inspect.signature(upcycle).parameters[name].default]
        if changed:
            raise ValueError(f"to={to!r} has that architecture's routing and losses; leave out {', '.join(changed)}")
        return convert(model, to, ffns, num_experts, top_k, noise, router_std, balance_coef)
    options = {"num_experts": num_experts, "top_k": top_k, **own, "balance_coef": balance_coef}
    mixtures = {index: _mixture(ffn, f"layer {index}", router_std, options) for index, ffn in ffns.items()}
    for index, mixture in mixtures.items():
        add_noise(mixture.experts, noise)
        mixture.train(ffns[index].module.training)
        setattr(all_layers[index], ffns[index].name, mixture)
    setattr(model.config, ENTRY, {**options, "layers": chosen})
    return model


def load_upcycled(folder: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Loads what ``save_pretrained`` wrote of a model that was upcycled in place.

    Args:
        folder: where it was saved.
        dtype: the weights' dtype; None for the one they were saved in.

    Returns:
        The model, in evaluation mode, on the CPU.

    Raises:
        ValueError: the config there has no entry of an upcycled model, or weights are missing or left over.
    """
    folder = Path(folder)
    config = AutoConfig.from_pretrained(folder)
    options = getattr(config, ENTRY, None)
    if options is None:
        raise ValueError(f"the config in {folder} has no entry {ENTRY!r}: load it with from_pretrained")
    delattr(config, ENTRY)
    model_class = getattr(transformers, config.architectures[0])
    model = model_class._from_config(config, dtype=dtype or config.dtype or torch.float32)
    upcycle(model, **options)
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    missing, unexpected = model.load_state_dict(state, strict=False)
    # Tied weights are saved once, under one of their names.
    parameters = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    loaded = {id(parameters[name]) for name in state if name in parameters}
    missing = [name for name in missing if id(parameters[name]) not in loaded]
    if missing or unexpected:
        raise ValueError(f"the weights in {folder} do not fit: missing {missing}, left over {unexpected}")
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def check_model(model: Any) -> None:
    """Refuses a model that cannot be upcycled at all."""
    if not isinstance(model, PreTrainedModel):
        hint = "; merge its adapters first: model.merge_and_unload()" if hasattr(model, "peft_config") else ""
        raise TypeError(f"hfkv.upcycle takes a transformers model, got {type(model).__name__}{hint}")
    name = type(model).__name__
    if "hfkv" in vars(model):
        raise RuntimeError(f"{name} is patched by hfkv; hfkv.unpatch(model), upcycle it, and patch it again")
    if any(isinstance(module, SparseMoE) for module in model.modules()):
        raise RuntimeError(f"{name} has SparseMoE layers already; give all layers to upcycle in one call")
    places = set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    if len(places) > 1:
        raise ValueError(
            f"{name} is spread over {', '.join(sorted(places))} by a device_map, whose hooks know nothing of new "
            "modules; load it onto one device, upcycle it, and dispatch it then (accelerate.dispatch_model)"
        )


def chosen_layers(layers: str | slice | Sequence[int] | None, num_layers: int) -> list[int]:
    """The indices, ascending, that `layers` names among `num_layers`.

    Raises:
        TypeError, ValueError: `layers` names none, or some that are not there.
    """
    if layers is None:
        layers = slice(None)
    if isinstance(layers, slice):
        chosen = list(range(num_layers))[layers]
    elif isinstance(layers, str):
        match = re.fullmatch(r"every:([1-9][0-9]*)", layers)
        if match is None:
            raise ValueError(f'layers takes None, a slice, indices or "every:N", got {layers!r}')
        step = int(match[1])
        chosen = list(range(step - 1, num_layers, step))
    elif isinstance(layers, Sequence):
        chosen = [operator.index(index) for index in layers]
    else:
        raise TypeError(f'layers takes None, a slice, indices or "every:N", got {layers!r}')
    outside = [index for index in chosen if not -num_layers <= index < num_layers]
    if outside or not chosen:
        raise ValueError(
            f"layers={layers!r}: there are {num_layers} layers, 0 to {num_layers - 1}; got {outside or 'none'}"
        )
    return sorted({index % num_layers for index in chosen})


def _dense(model: PreTrainedModel, index: int, layer: nn.Module) -> DenseFFN:
    ffn = dense_ffn(layer)
    if isinstance(ffn, str):
        raise ValueError(f"layer {index} of {type(model).__name__} cannot be upcycled: {ffn}")
    return ffn


@torch.no_grad()
def _mixture(ffn: DenseFFN, place: str, router_std: float, options: dict[str, Any]) -> SparseMoE:
    weight = ffn.down.weight
    mixture = SparseMoE(
        ffn.down.out_features,
        ffn.intermediate_size,
        gated=ffn.gated,
        activation=ffn.activation,
        bias=ffn.has_bias,
        device=weight.device,
        dtype=weight.dtype,
        **options,
    )
    nn.init.normal_(mixture.gate.weight, std=router_std)
    for name, stack in ffn.stacks(mixture.num_experts).items():
        getattr(mixture.experts, name).copy_(stack)
    _check_equal(ffn, mixture.eval(), place)
    mixture.last_forward = None
    for parameter in mixture.experts.parameters():
        parameter.requires_grad_(weight.requires_grad)
    return mixture


def _check_equal(ffn: DenseFFN, mixture: SparseMoE, place: str) -> None:
    """Compares a module with its mixture: one that does more than its form says must not be swapped."""
    weight = ffn.down.weight
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(CHECKED_TOKENS, mixture.hidden_size, generator=generator).to(weight.device, weight.dtype)
    was_training = ffn.module.training
    expected = ffn.module.eval()(tokens)
    ffn.module.train(was_training)
    difference = (mixture(tokens) - expected).abs().max().item()
    allowed = TOLERANCES.get(weight.dtype, 0.0) * expected.abs().max().item()
    if not difference <= allowed:
        raise RuntimeError(
            f"{place}: a mixture of copies of {ffn.name} ({type(ffn.module).__name__}) differs from it by "
            f"{difference:.3g}, where {allowed:.3g} is allowed; it does more than its form says, and cannot be upcycled"
        )
