"""What `hfkv doctor` says of the mean that is taken off keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from hfkv.policy.config import KVConfig


def note_of(kv: KVConfig, config: PreTrainedConfig) -> tuple[bool, str | None]:
    """Whether `hfkv.patch` takes a mean off the keys of a model, as its config says, and a sentence about it."""
    from hfkv.models.latents import widths_of
    from hfkv.models.probe import refusal_by_config
    from hfkv.patches.keys.means import wants_means

    if not wants_means(kv):
        return False, None
    decoder = config.get_text_config(decoder=True)
    reason = "its keys are latents" if widths_of(decoder, 0) is not None else refusal_by_config(config)
    if reason is not None:
        return False, f"no mean is taken off its keys, and codecs below 8 bits lose more: {reason}"
    return True, (
        "by default, hfkv.patch and hfkv generate take the mean of its keys off where a codec has less than 8 bits, if "
        "the device's kernels know of it and the model's rotation is understood (key_mean:off leaves keys as they are)"
    )
