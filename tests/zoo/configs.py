"""Tiny configurations, made by rules from a config class's own defaults.

Every architecture spells its sizes differently, so the sizes are a table of (name pattern, value): a field
whose name matches is set to the value when its default is a number. Nested configs are shrunk the same way, layer type
lists are cut to one layer of each type, and what no rule reaches is listed by model type in `overrides`.
"""

import copy
import dataclasses
import re

from .overrides import OVERRIDES
from .tokens import BOS_TOKEN, EOS_TOKEN, IMAGE_TOKEN, PAD_TOKEN, VISION_END_TOKEN, VISION_START_TOKEN, VOCAB_SIZE

IMAGE_SIZE, PATCH_SIZE = 28, 14

# The first pattern that matches the whole name decides.
_SIZES = [
    # Widths.
    ("hidden_size|n_embd|n_embed|d_model|embed_dim|dim|word_embed_proj_dim|embedding_size|embedding_dim|emb_dim", 64),
    ("text_embed_dim|text_hidden_size|hidden_dim|attention_hidden_size|lm_head_size|width|out_hidden_size", 64),
    ("projection_dim|backbone_hidden_size|lru_width|hidden_size_global|audio_hidden_size|ple_embed_dim", 64),
    ("adapter_in_dim|adapter_out_dim|adapter_input_size|downsample_hidden_size|router_hidden_size", 64),
    ("intermediate_size|dense_intermediate_size|intermediate_size_mlp|shared_intermediate_size|mlp_dim|n_inner", 64),
    ("ffn_dim|d_ff|encoder_ffn_dim|decoder_ffn_dim|ffn_hidden_size|block_auto_adjust_ff_dim", 64),
    ("moe_intermediate_size|shared_expert_intermediate_size|moe_shared_expert_intermediate_size", 64),
    ("shared_experts_intermediate_size|speech_encoder_intermediate_size|moe_hidden_size", 64),
    ("moe_ffn_hidden_size|expert_ffn_hidden_size|expert_intermediate_size|expert_ff_dim|moe_latent_size", 64),
    ("hidden_size_per_layer_input", 16),
    # Depths.
    ("num_hidden_layers|num_hidden_layers_.*|num_layers|n_layers?|depth", 2),
    ("encoder_layers|decoder_layers|speech_encoder_layers|num_encoder_layers|num_decoder_layers", 2),
    ("num_kv_shared_layers|num_nextn_predict_layers|num_mtp_layers", 0),
    ("num_mem_blocks", 1),
    # Attention.
    ("num_attention_heads|num_heads|n_heads?|(encoder|decoder)_attention_heads", 4),
    ("speech_encoder_attention_heads|num_encoder_attention_heads|num_decoder_attention_heads", 4),
    ("num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num", 2),
    ("swa_num_key_value_heads|num_global_key_value_heads", 2),
    ("head_dim|global_head_dim|swa_head_dim|swa_v_head_dim|attention_head_dim|attention_head_size", 16),
    ("kv_channels|d_kv", 16),
    ("rotary_dim|attention_chunk_size", 8),
    ("sliding_window", 6),
    ("attention_window_size|window_size", 6),
    ("rotary_emb_base", 10000),
    # Latent and indexed attention.
    ("q_lora_rank|attention_latent|latent_size|qk_head_dim", 32),
    ("kv_lora_rank", 32),
    ("qk_rope_head_dim|qk_nope_head_dim|o_lora_rank|index_head_dim", 16),
    ("v_head_dim", 24),
    ("index_n_heads", 4),
    ("index_topk", 4),
    # Experts.
    ("num_experts|num_local_experts|num_routed_experts|n_routed_experts|n_experts|moe_num_experts", 4),
    ("num_experts_per_tok|num_experts_per_token|num_selected_experts|moe_k|moe_top_?k|top_k_experts", 2),
    ("n_group|topk_group|num_expert_group", 1),
    ("n_shared_experts|moe_num_shared_experts|num_shared_experts?", 1),
    ("first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    # Linear attention and state spaces.
    ("linear_num_key_heads|linear_num_value_heads", 4),
    ("linear_key_head_dim|linear_value_head_dim", 16),
    ("mamba_d_state|state_size|ssm_state_size|mamba_d_ssm|mamba_dt_rank|time_step_rank", 16),
    ("mamba_n_heads|mamba_num_heads", 8),
    ("mamba_d_head|mamba_head_dim|mamba_headdim", 16),
    ("mamba_n_groups?|mamba_ngroups|n_groups", 1),
    ("mamba_expand|n_mamba_heads", 2),
    ("mamba_chunk_size.*|chunk_size", 8),
    # Gemma 3n.
    ("altup_num_inputs", 2),
    ("laurel_rank|adapter_rank", 8),
    # Vocabularies, lengths, images and audio.
    ("vocab_size|vocab_size_per_layer_input|text_vocab_size|n_vocab|codebook_size", VOCAB_SIZE),
    ("embedding_vocab_size|decoder_vocab_size", VOCAB_SIZE),
    ("max_position_embeddings|n_positions|n_ctx|max_target_positions|max_source_positions", 128),
    ("max_seq_len|max_sequence_length|seq_length", 128),
    ("image_size|img_size", IMAGE_SIZE),
    ("patch_size", PATCH_SIZE),
    ("num_mel_bins", 16),
    ("audio_channels", 1),
    # Special tokens.
    ("pad_token_id", PAD_TOKEN),
    ("bos_token_id|decoder_start_token_id|mask_token_id", BOS_TOKEN),
    ("eos_token_id|sep_token_id", EOS_TOKEN),
    ("image_token_id|image_token_index", IMAGE_TOKEN),
    ("video_token_id|video_token_index", 91),
    ("audio_token_id|audio_token_index", 92),
    ("vision_start_token_id|boi_token_id|boi_token_index", VISION_START_TOKEN),
    ("vision_end_token_id|eoi_token_id|eoi_token_index", VISION_END_TOKEN),
    ("boa_token_id|boa_token_index", 95),
    ("eoa_token_id|eoa_token_index", 96),
    ("eov_token_id|boc_token_id", 97),
]

# Set although their default is None, when a config is built with `fill=True`.
_FILLED = (
    "head_dim|num_key_value_heads|kv_channels|n_routed_experts|num_local_experts|num_experts|num_experts_per_tok|n_group"
    "|topk_group"
)


def tiny_config(config_class, fill=False):
    """Build a tiny configuration.

    Args:
        config_class: a subclass of `PreTrainedConfig`.
        fill: also set sizes whose default is None (head_dim, num_experts, ...), which most classes derive themselves.

    Returns:
        An instance of `config_class` with 2 layers, or one of each layer type, of width 64.

    Raises:
        Exception: whatever the class raises on its own defaults or on the tiny values.
    """
    return config_class(**_tiny_fields(config_class(), fill))


def _tiny_fields(default, fill):
    config_class = type(default)
    nested = config_class.sub_configs or {}
    fields = {}
    for name in sorted(_field_names(default) - set(nested)):
        value = _tiny_size(name, _read(default, name), fill)
        if value is not None:
            fields[name] = value
    fields |= _tiny_layers(default, fields)
    if "tie_word_embeddings" in _field_names(default):
        fields["tie_word_embeddings"] = False  # a tied head of a random model repeats the last token
    if fields.get("kv_lora_rank") and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = fields.get("num_attention_heads", 4)  # latent attention has no grouping
    rope = _tiny_rope(_read(default, "rope_parameters"))
    if rope is not None:
        fields["rope_parameters"] = rope
    for name in nested:
        sub_config = _read(default, name)
        if sub_config is not None:
            fields[name] = _tiny_fields(sub_config, fill) | {"model_type": sub_config.model_type}
    return _merge(fields, OVERRIDES.get(config_class.model_type, {}))


def _field_names(config):
    names = set(config.to_dict())
    if dataclasses.is_dataclass(config):
        names |= {field.name for field in dataclasses.fields(config)}
    return names


def _read(config, name):
    try:
        return getattr(config, name, None)
    except Exception:  # a per-layer value read on the whole config
        return config.to_dict().get(name)


def _tiny_size(name, default, fill):
    for pattern, value in _SIZES:
        if re.fullmatch(pattern, name):
            is_number = isinstance(default, int | float) and not isinstance(default, bool)
            is_filled = default is None and fill and re.fullmatch(_FILLED, name)
            return value if is_number or is_filled else None
    return None


def _tiny_layers(default, fields):
    """One layer of each type, and the number of layers that makes."""
    names = _field_names(default)
    listed = {}
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        types = _read(default, name)
        if name in names and isinstance(types, list | tuple) and types:
            listed[name] = list(dict.fromkeys(types))
    key = next((name for name in ("layer_types", "layers_block_type") if name in listed), None)
    num_layers = max(2, len(listed[key])) if key else 2
    layers = {
        name: (types * num_layers)[:num_layers] for name, types in listed.items() if name in (key, "mlp_layer_types")
    }
    for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        if name in fields:
            layers[name] = num_layers
    return layers


def _tiny_rope(parameters):
    """Rope parameters whose multimodal sections fit 8 rotary frequencies, or None if they have none."""
    if not isinstance(parameters, dict) or "mrope_section" not in str(parameters):
        return None
    parameters = copy.deepcopy(parameters)
    for section in [parameters, *parameters.values()]:
        if isinstance(section, dict) and len(section.get("mrope_section") or ()) == 3:
            section["mrope_section"] = [2, 3, 3]
    return parameters


def _merge(fields, changes):
    merged = dict(fields)
    for name, value in changes.items():
        is_nested = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if is_nested else value
    return merged
