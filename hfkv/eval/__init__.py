"""Measures of what a cache costs a model: loss, KL divergence, top-1 agreement, attention similarity and pass keys."""

from hfkv.eval.compare import CacheReport, compare
from hfkv.eval.divergence import kl_divergence
from hfkv.eval.fidelity import FoundCodecs, find_codecs
from hfkv.eval.harness import lm_eval_model
from hfkv.eval.loss import LossReport, held_out_loss, perplexity, top1_agreement
from hfkv.eval.passkey import pass_key_accuracy, pass_key_prompt
from hfkv.eval.passkey_grid import even_depths, pass_key_grid
from hfkv.eval.plots import write_plots
from hfkv.eval.similarity import attention_similarity

__all__ = [
    "CacheReport",
    "FoundCodecs",
    "LossReport",
    "attention_similarity",
    "compare",
    "even_depths",
    "find_codecs",
    "held_out_loss",
    "kl_divergence",
    "lm_eval_model",
    "pass_key_accuracy",
    "pass_key_grid",
    "pass_key_prompt",
    "perplexity",
    "top1_agreement",
    "write_plots",
]
