"""Measures of what a cache costs a model: held-out loss, top-1 agreement and pass keys."""

from hfkv.eval.loss import LossReport, held_out_loss, top1_agreement
from hfkv.eval.passkey import pass_key_accuracy, pass_key_prompt

__all__ = ["LossReport", "held_out_loss", "pass_key_accuracy", "pass_key_prompt", "top1_agreement"]
