"""A named few architectures, tiny and written by hand, for the tests that run every day.

`NAMED` maps a name to a function that makes a `Sample`. Architectures that the installed transformers lacks are left
out.
"""

import dataclasses
import functools

import torch
import transformers

from . import configs, tokens
from .models import NUM_PADDED, instantiate, prompt

WINDOW = 6

_DECODER = {
    "vocab_size": tokens.VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": tokens.PAD_TOKEN,
    "bos_token_id": tokens.BOS_TOKEN,
    "eos_token_id": tokens.EOS_TOKEN,
    "tie_word_embeddings": False,
}
_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MANY_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_GPT = {
    "vocab_size": tokens.VOCAB_SIZE,
    "n_positions": 128,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "pad_token_id": tokens.PAD_TOKEN,
    "bos_token_id": tokens.BOS_TOKEN,
    "eos_token_id": tokens.EOS_TOKEN,
    "tie_word_embeddings": False,
}
_ENCODER_DECODER = {
    "vocab_size": tokens.VOCAB_SIZE,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": tokens.PAD_TOKEN,
    "bos_token_id": tokens.BOS_TOKEN,
    "eos_token_id": tokens.EOS_TOKEN,
    "decoder_start_token_id": tokens.BOS_TOKEN,
    "tie_word_embeddings": False,
}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": configs.IMAGE_SIZE,
    "patch_size": configs.PATCH_SIZE,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# Name: (model class, its config class, fields added to `_DECODER`).
_DECODERS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_SLIDING, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_SLIDING, "query_pre_attn_scalar": 16}),
    "phi": ("PhiForCausalLM", "PhiConfig", {}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {}),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", {}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {"attention_multiplier": 0.25}),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", {}),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", {"sliding_window": WINDOW}),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", {**_SLIDING, "logit_scale": 1.0}),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", {}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _EXPERTS),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _MANY_EXPERTS),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**_SLIDING, **_EXPERTS, "rope_parameters": _ROPE}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 64,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 24,
        },
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            **_MANY_EXPERTS,
            "layer_types": ["linear_attention", "full_attention"],
            "shared_expert_intermediate_size": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
}
# Name: (model class, its config class, fields).
_OTHERS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    "bloom": ("BloomForCausalLM", "BloomConfig", {**_GPT, "hidden_size": 64}),
    "falcon": ("FalconForCausalLM", "FalconConfig", {k: v for k, v in _DECODER.items() if k != "head_dim"}),
    "opt": ("OPTForCausalLM", "OPTConfig", {**_DECODER, "ffn_dim": 64, "word_embed_proj_dim": 64}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": tokens.VOCAB_SIZE,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "pad_token_id": tokens.PAD_TOKEN,
            "eos_token_id": tokens.EOS_TOKEN,
            "decoder_start_token_id": tokens.BOS_TOKEN,
            "tie_word_embeddings": False,
        },
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**_ENCODER_DECODER, "max_position_embeddings": 128}),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **_ENCODER_DECODER,
            "num_mel_bins": 16,
            "max_source_positions": 32,
            "max_target_positions": 128,
            "begin_suppress_tokens": None,
        },
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **_DECODER},
            "vision_config": {"model_type": "clip_vision_model", **_VISION},
            "image_token_index": tokens.IMAGE_TOKEN,
            "tie_word_embeddings": False,
        },
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "text_config": {**_DECODER, "rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}},
            "vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "patch_size": 14},
            "image_token_id": tokens.IMAGE_TOKEN,
            "vision_start_token_id": tokens.VISION_START_TOKEN,
            "vision_end_token_id": tokens.VISION_END_TOKEN,
            "tie_word_embeddings": False,
        },
    ),
    "mllama": (
        "MllamaForConditionalGeneration",
        "MllamaConfig",
        {
            "text_config": {**_DECODER, "cross_attention_layers": [1]},
            "vision_config": {
                **_VISION,
                "attention_heads": 4,
                "num_global_layers": 1,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 128,
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
            },
            "image_token_index": tokens.IMAGE_TOKEN,
        },
    ),
}


@dataclasses.dataclass
class Sample:
    """A tiny model and inputs for its `generate`: two rows, the first of them left-padded where there is text."""

    model: torch.nn.Module
    inputs: dict


def _sample(class_name, config_name, fields, seed):
    model = instantiate(getattr(transformers, class_name), getattr(transformers, config_name)(**fields), seed)
    inputs = prompt(model)
    add_image = _IMAGES.get(model.config.model_type)
    if add_image is not None:
        add_image(inputs, torch.Generator().manual_seed(1))
    return Sample(model, inputs)


def _add_llava_image(inputs, generator):
    num_patches = (configs.IMAGE_SIZE // configs.PATCH_SIZE) ** 2
    inputs["input_ids"][:, NUM_PADDED : NUM_PADDED + num_patches] = tokens.IMAGE_TOKEN
    inputs["pixel_values"] = torch.randn(2, 3, configs.IMAGE_SIZE, configs.IMAGE_SIZE, generator=generator)


def _add_qwen2_vl_image(inputs, generator):
    """A still of 2 x 2 patches in 2 equal frames, which the model merges to a single token."""
    still = [tokens.VISION_START_TOKEN, tokens.IMAGE_TOKEN, tokens.VISION_END_TOKEN]
    inputs["input_ids"][:, NUM_PADDED : NUM_PADDED + len(still)] = torch.tensor(still)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == tokens.IMAGE_TOKEN).int()
    inputs["image_grid_thw"] = torch.tensor([[1, 2, 2]] * 2)
    inputs["pixel_values"] = torch.randn(2 * 4, 2 * 3 * configs.PATCH_SIZE**2, generator=generator)


def _add_mllama_image(inputs, generator):
    ids = inputs["input_ids"]
    ids[:, NUM_PADDED] = tokens.IMAGE_TOKEN
    inputs["pixel_values"] = torch.randn(2, 1, 1, 3, configs.IMAGE_SIZE, configs.IMAGE_SIZE, generator=generator)
    inputs["aspect_ratio_ids"] = torch.ones(2, 1, dtype=torch.long)
    inputs["aspect_ratio_mask"] = torch.ones(2, 1, 1, dtype=torch.long)
    sees_image = (torch.arange(ids.shape[1]) >= NUM_PADDED).long()
    inputs["cross_attention_mask"] = sees_image[None, :, None, None].repeat(2, 1, 1, 1)


_IMAGES = {"llava": _add_llava_image, "qwen2_vl": _add_qwen2_vl_image, "mllama": _add_mllama_image}

# Where seed 0 happens to repeat itself.
_SEEDS = {"bart": 2, "whisper": 2}

_CONFIGS = {
    **{name: (model, config, _DECODER | fields) for name, (model, config, fields) in _DECODERS.items()},
    **_OTHERS,
}
NAMED = {
    name: functools.partial(_sample, class_name, config_name, fields, _SEEDS.get(name, 0))
    for name, (class_name, config_name, fields) in _CONFIGS.items()
    if hasattr(transformers, class_name) and hasattr(transformers, config_name)
}
