"""`patch` and `unpatch`: the one line, and its complete undo."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from hfkv.codecs.autocast import in_own_precision
from hfkv.experts.config import MoEConfig
from hfkv.models.probe import base_model
from hfkv.patches.attention import set_attention
from hfkv.patches.generate import check_generate, set_generate_hooks
from hfkv.patches.graphs import set_graphs
from hfkv.patches.handle import Patch, inside, models_in
from hfkv.patches.hints import hint
from hfkv.patches.keys.means import wants_means
from hfkv.patches.keys.rotary import set_exact_rotary
from hfkv.patches.mla import set_latent_attention
from hfkv.patches.moe import set_experts
from hfkv.patches.prompt import set_prompt_hook
from hfkv.patches.recording import set_recording
from hfkv.policy.config import KVConfig
from hfkv.policy.ports import port
from hfkv.sharing.refusals import sharing_refusal

logger = logging.getLogger("hfkv")


@in_own_precision
def patch(
    model: Any,
    kv: KVConfig | str | None = None,
    *,
    moe: MoEConfig | str | None = None,
    exact_rotary: bool = False,
    graphs: bool = False,
    calibration: Any = None,
) -> Patch:
    """Gives every `generate` call of `model` a fresh hfkv cache, and the model the attention that reads it.

    Without `kv` nothing is lost: no token changes. Pipelines, PEFT adapters, streamers, beams and assistants
    go on as before. A cache passed as ``past_key_values`` is used as it is.

    Args:
        model: a transformers model that can generate, or a `PeftModel` around one.
        kv: a `KVConfig`, its string form such as ``"int8+window:4096"``, or None.
        moe: a `MoEConfig` or its string form: ``"auto"`` gives the experts of a sparse model their fast form, with the
            numbers they have (on a CPU the weights are packed, for inference and for adapters around them);
            ``"int8"`` and ``"int4"`` write them in fewer bytes; ``"offload"`` keeps only the last used ones on the
            device. The router is the model's own. None leaves the experts alone. See ``handle.moe``.
        exact_rotary: compute rotary angles in float64, exact at any position. This changes the last bits of results.
        graphs: capture the decode step in a CUDA graph and replay it. Where that cannot be, the reason is logged and
            the step runs as usual.
        calibration: with codecs below 8 bits, what the model reads once to find the mean of its keys, which is taken
            off them: token ids `[T]`, of which some hundred are enough, a str, or None for a text that comes with hfkv
            (random tokens, where there is no tokenizer beside the model). With ``kv="auto:0.5%"`` also what the codecs
            are found on; see `KVConfig.for_fidelity`. ``handle.kv`` is the config found.

    Returns:
        The handle: ``handle.undo()``, or use it in a ``with`` statement.

    Raises:
        TypeError: the model is not such a model, or `kv` no such value.
        ValueError: the model has no layered KV cache, `kv` does not fit its layers, the model has no experts that `moe`
            could be for, or it has no rotary embedding that could be made exact.
        RuntimeError: the model is patched already.
        NotImplementedError: a private method of transformers that the patch overrides has changed.
    """
    for name, given in (("exact_rotary", exact_rotary), ("graphs", graphs)):
        if not isinstance(given, bool):
            raise TypeError(f"hfkv.patch takes True or False for {name}, got {given!r}")
    base = _base_model(model)
    if "hfkv" in vars(base):
        raise RuntimeError(
            f"{type(base).__name__} is already patched ({base.hfkv!r}); take that off first: hfkv.unpatch(model)"
        )
    overlapping = [part for part in models_in(base) if part in inside or "hfkv" in vars(part)]
    if overlapping:
        raise RuntimeError(
            f"{type(base).__name__} is part of a patched model, or a part of it ({type(overlapping[0]).__name__}) is "
            "patched already; take that patch off first"
        )
    wanted = KVConfig.of(kv)
    experts = None if moe is None else MoEConfig.of(moe)
    if graphs and experts is not None and experts.offload:
        raise ValueError(
            f"moe={str(experts)!r} with graphs=True: offloaded experts are brought by the host in every step, which a "
            "CUDA graph cannot hold; leave one of them out"
        )
    check_generate(base)
    handle = Patch(base, _found(model, wanted, calibration))
    handle.exact_rotary, handle._calibration, handle._is_captured = exact_rotary, calibration, graphs
    probe = handle.new_cache()
    if handle.kv.reuse is not None:
        reason = sharing_refusal(base.config, probe)
        if reason is not None:
            raise ValueError(f"reuse: {reason}; leave reuse out")
    ours = probe.kv_layers
    handle.num_layers = len(probe.layers)
    handle.own_layers = {i: type(layer).__name__ for i, layer in enumerate(probe.layers) if layer not in ours}
    try:
        handle.own_attention = set_attention(base, handle._undo)
        if handle.own_attention is not None:
            _accept_own_attention(handle)
        else:
            handle.num_latent_layers = set_latent_attention(base, handle._undo)
        set_generate_hooks(base, handle._undo)
        if exact_rotary:
            set_exact_rotary(base, handle._undo)
        if graphs:
            handle.graphs = set_graphs(base, handle._undo)
        set_recording(base, handle._undo)
        if model is not base:
            set_prompt_hook(model, handle._undo)
        if experts is not None:
            # The last: what is written in fewer bytes cannot be taken back.
            handle.moe = set_experts(base, experts, handle._undo)
        handle._undo.settle()
        handle._undo.set(base, "hfkv", handle)
        inside.update(models_in(base))
    except BaseException:
        handle.undo()
        raise
    if handle.own_layers:
        kinds = sorted(set(handle.own_layers.values()))
        logger.warning("%s: layers of kind %s keep transformers' own cache", type(base).__name__, ", ".join(kinds))
    return handle


def unpatch(model: Any) -> None:
    """Takes the patch off a model.

    Raises:
        RuntimeError: the model is not patched.
    """
    base = _base_model(model)
    if "hfkv" not in vars(base):
        raise RuntimeError(f"{type(base).__name__} is not patched")
    base.hfkv.undo()


def _found(model: Any, kv: KVConfig, calibration: Any) -> KVConfig:
    """The config itself, or the one that keeps its promise."""
    if kv.loss_change is None:
        if calibration is not None and not wants_means(kv):
            raise ValueError(
                'calibration is what codecs are found on for a promise such as kv="auto:0.5%", and what the mean of '
                f"keys is taken over for codecs below 8 bits; kv={str(kv)!r} is neither: leave calibration out"
            )
        return kv
    found = port("find_codecs")(model, calibration, kv.loss_change, kv=replace(kv, loss_change=None))
    logger.info("%s: %s", kv, found)
    return found.kv


def _accept_own_attention(handle: Patch) -> None:
    name = type(handle.model).__name__
    if handle.kv.needs_own_attention:
        raise ValueError(
            f"{name} keeps its own attention ({handle.own_attention}), which knows nothing of a window or of recent "
            "tokens in more bits; leave the window, or recent, out"
        )
    logger.warning("%s keeps its own attention: %s; it reads decoded caches", name, handle.own_attention)


def _base_model(model: Any) -> PreTrainedModel:
    base = base_model(model)
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"hfkv.patch takes a transformers model or a PeftModel, got {type(model).__name__}; {hint(model)}"
        )
    return base
