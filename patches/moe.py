"""Gives a model the ``"hfkv"`` experts, and writes their weights as they are to be kept."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hfkv.experts.checkpoint import CODECS, ExpertsConfig, ExpertsQuantizer
from hfkv.experts.config import MoEConfig
from hfkv.experts.families import experts_of, no_experts, others_of, weight_names
from hfkv.experts.implementation import NAME
from hfkv.experts.offload.place import offload_experts, slots_for_budget
from hfkv.experts.offload.trace import ExpertTrace
from hfkv.experts.packed import PackedWeights, why_plain
from hfkv.experts.report import MoEReport, Swap
from hfkv.experts.stack import ExpertStack, as_parameter
from hfkv.experts.weights import ExpertWeights, PlainWeights
from hfkv.models.weights_at_rest import bring_no_more
from hfkv.patches.configs import own_configs
from hfkv.patches.expert_lora import set_expert_lora
from hfkv.patches.saving import set_saving
from hfkv.patches.undo import Undo
from hfkv.patches.upcycle import ENTRY as UPCYCLED

logger = logging.getLogger("hfkv")


def set_experts(model: PreTrainedModel, moe: MoEConfig, undo: Undo) -> MoEReport:
    """Makes every experts module of `model` use the ``"hfkv"`` experts; its router is its own.

    Args:
        model: a model with experts that transformers' interface runs.
        moe: how their weights are kept.
        undo: the patch's undo.

    Returns:
        What was changed, and what was not.

    Raises:
        ValueError: there are no such experts, or their weights cannot be kept in this form.
    """
    named = experts_of(model)
    if not named:
        raise ValueError(f"moe={str(moe)!r}: {no_experts(model)}")
    _check_weights(named, moe)
    own_configs(model, undo)
    swaps = []
    keeper = _Keeper(moe, undo, named)
    for name, experts in named.items():
        if isinstance(experts.config, PreTrainedConfig):
            experts.config._experts_implementation_internal = NAME  # a copy, that goes with the patch
        else:
            undo.set(experts.config, "_experts_implementation", NAME)
        with torch.inference_mode(False), torch.no_grad():  # weights outlive the mode they are written in
            swaps.append(keeper.keep(name, experts))
    if moe.codec in CODECS and not moe.offload:
        _say_how_to_save(model, moe, undo)
    if any(swap.form != PlainWeights.form for swap in swaps):
        set_saving(model, undo)
    set_expert_lora(model, undo)
    report = MoEReport(tuple(swaps), others_of(model), keeper.trace)
    for name, why in report.kept.items():
        logger.warning("%s keeps its own experts: %s", name, why)
    return report


def _say_how_to_save(model: PreTrainedModel, moe: MoEConfig, undo: Undo) -> None:
    """Makes `save_pretrained` write the experts in the bytes that they have now."""
    if getattr(model, "hf_quantizer", None) is not None:
        logger.warning(
            "save_pretrained follows the quantisation that the model was loaded with, not that of its experts"
        )
        return
    if hasattr(model.config, UPCYCLED):
        return  # who loads it builds its layers by hand, and has plain tensors for them
    quantizer = ExpertsQuantizer(ExpertsConfig(moe.codec))
    undo.set(model, "hf_quantizer", quantizer)
    undo.set(model.config, "quantization_config", quantizer.quantization_config)


class _Keeper:
    """Writes the experts of one module after the other in the form that `moe` asks for.

    Attributes:
        trace: which offloaded experts were chosen, and what travelled.
    """

    def __init__(self, moe: MoEConfig, undo: Undo, named: dict[str, Any]) -> None:
        self.moe, self._undo = moe, undo
        self._replaced: dict[int, Any] = {}
        self.trace = ExpertTrace() if moe.offload else None
        if moe.offload:
            budget = None if moe.device_budget is None else int(moe.device_budget)
            self._num_slots = slots_for_budget(named.values(), budget, moe.codec)

    def keep(self, name: str, experts: Any) -> Swap:
        """Replaces parameters by stacks, where they are to be kept in another form."""
        names = weight_names(experts)
        given = [experts._parameters[parameter] for parameter in names]
        stacks = [self._replaced.get(id(one)) for one in given]
        why = "shared with another layer"
        if None in stacks:
            if self.moe.offload:
                stacks, why = self._offloaded(name, experts)
            else:
                for index, one in enumerate(given):
                    if stacks[index] is None:
                        stacks[index], why = _stack_of(experts, one, self.moe)
            self._replaced |= {id(one): stack for one, stack in zip(given, stacks, strict=True)}
        before, after = sum(map(_num_bytes, given)), sum(map(_num_bytes, stacks))
        for parameter, one, stack in zip(names, given, stacks, strict=True):
            if stack is not one:
                self._undo.set_parameter(experts, parameter, stack)
        form = stacks[0].weights.form if isinstance(stacks[0], ExpertStack) else PlainWeights.form
        return Swap(name, type(experts).__name__, len(stacks[0]), form, why, before, after)

    def _offloaded(self, name: str, experts: Any) -> tuple[list[Any], str]:
        weights = offload_experts(experts, self.moe, self._num_slots, self.trace, name=name)
        requires_grad = [experts._parameters[parameter].requires_grad for parameter in weight_names(experts)]
        self._undo.call(bring_no_more(experts, *weight_names(experts)))
        stacks = [
            as_parameter(ExpertStack(each, experts.is_transposed), requires_grad=requires)
            for each, requires in zip(weights, requires_grad, strict=True)
        ]
        return stacks, f"{self._num_slots} slots; the others in {self.moe.path or 'host memory'}"


def _stack_of(experts: Any, given: Any, moe: MoEConfig) -> tuple[Any, str]:
    """The stack that is to replace a parameter, or the parameter itself, and why."""
    if isinstance(given, ExpertStack):
        return given, "as it was loaded"
    if moe.codec == "none":
        why = _why_plain(experts, given)
        if why is not None:
            return given, why
    local = given.to_local() if hasattr(given, "to_local") else given
    matrices = local.detach().transpose(1, 2) if experts.is_transposed else local.detach()
    weights: ExpertWeights
    if moe.codec == "none":
        weights, why = PackedWeights(matrices), "a CPU reads oneDNN's order faster; the numbers are the same"
    else:
        weights = CODECS[moe.codec](tuple(matrices.shape), matrices.dtype, matrices.device)
        weights.write_all(matrices)
        why = "as asked for"
    return as_parameter(ExpertStack(weights, experts.is_transposed), given.requires_grad), why


def _why_plain(experts: Any, given: Any) -> str | None:
    """Why a parameter stays the tensor that it is, where nothing else was asked for."""
    if given.device.type == "meta":
        return "put away by accelerate, which brings it back for each forward"
    if hasattr(given, "to_local"):
        return "a part of a tensor that is spread over processes"
    if given.device.type != "cpu":
        return "kernels read it as it is"
    if experts.training:
        return "in training mode: packed experts get no gradients"
    return why_plain(given)


def _check_weights(named: dict[str, Any], moe: MoEConfig) -> None:
    for name, experts in named.items():
        for parameter in weight_names(experts):
            given = experts._parameters.get(parameter)
            if given is None:
                raise ValueError(
                    f"{name}.{parameter} is no plain parameter (it is parametrised, quantised by another library, or "
                    "in PEFT's modules_to_save); hfkv reads plain ones: load the model without that"
                )
            if isinstance(given, ExpertStack) and moe.codec not in ("none", given.weights.form):
                raise ValueError(
                    f"{name}.{parameter} is {given.weights.form} already, and would lose more as {moe.codec}; use "
                    'moe="auto"'
                )
            if moe.codec == "none" or moe.offload or isinstance(given, ExpertStack):
                continue
            if given.device.type == "meta":
                raise ValueError(
                    f"{name}.{parameter} is put away by accelerate (on meta), so it cannot be written as {moe.codec} "
                    f'in place; use moe="{moe.codec}+offload", or load the model without offloading its experts'
                )
            if given.dtype not in (torch.bfloat16, torch.float16, torch.float32):
                raise ValueError(
                    f"{name}.{parameter} is {given.dtype}; moe={str(moe)!r} takes bfloat16, float16 and float32"
                )


def _num_bytes(given: torch.Tensor) -> int:
    if isinstance(given, ExpertStack):
        return given.weights.nbytes()
    local = given.to_local() if hasattr(given, "to_local") else given
    return 0 if local.device.type == "meta" else PlainWeights(local).nbytes()
