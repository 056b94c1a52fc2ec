"""Tiny models with random weights for every architecture that generates text, and prompts for them."""

import dataclasses
import re

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from . import configs, tokens

MAX_PARAMETERS = 20_000_000
NUM_PADDED = 3
NUM_SAMPLES = 4000

# The gain keeps attention scores and residual branches large, so that a token depends on which keys were attended.
_GAIN = 1.5
# Cross-attention sees the same states at every step: at the full gain it drowns what the decoder has written.
_CROSS_GAIN = 1.0
_CROSS_ATTENTION = re.compile("encoder_attn|EncDecAttention|cross_?att")
_EMBEDDING_STD = 0.5
# Far smaller than a branch's output: a tied head would otherwise repeat the last token.
_TIED_EMBEDDING_STD = 0.02

_MAPPINGS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "s2s": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "speech": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    "vl": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}


class CannotBuild(Exception):  # noqa: N818 - a refusal that tests skip on, not an error
    """The architecture has no tiny model; the message says why."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A generating model class of transformers, under the auto mapping that lists it first."""

    mapping: str
    model_type: str
    class_name: str

    def __str__(self):
        return f"{self.mapping}-{self.model_type}"


def architectures():
    """List the architectures of transformers' auto mappings for text generation, each class and model type once."""
    found = {}
    for mapping, class_names in _MAPPINGS.items():
        for model_type, class_name in class_names.items():
            found.setdefault((model_type, class_name), Architecture(mapping, model_type, class_name))
    return list(found.values())


def build(architecture, seed=0):
    """Build a tiny model of an architecture.

    Args:
        architecture: an `Architecture`.
        seed: of the weights.

    Returns:
        The model, as `instantiate` returns it.

    Raises:
        CannotBuild: the classes reject the tiny configuration, or the model has more than `MAX_PARAMETERS`.
    """
    reasons = []
    for fill in (False, True):
        try:
            config_class = CONFIG_MAPPING[architecture.model_type]
            model_class = getattr(transformers, architecture.class_name)
            config = _config_of(configs.tiny_config(config_class, fill), model_class)
            num_parameters = _count_parameters(model_class, config)
            if num_parameters <= MAX_PARAMETERS:
                return instantiate(model_class, config, seed)
            reasons.append(f"too large: {num_parameters / 1e6:.0f}M parameters")
        except Exception as error:
            reasons.append(" ".join(f"{type(error).__name__}: {error}".split()))
    raise CannotBuild(reasons[0])


def _config_of(config, model_class):
    """The config itself, or the nested one a text model listed under the whole's config is made of."""
    nested = [getattr(config, name) for name in config.sub_configs]
    return next((part for part in nested if type(part) is model_class.config_class), config)


def _count_parameters(model_class, config):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model_class(config).parameters())


def instantiate(model_class, config, seed=0):
    """Make a model of a configuration with random weights.

    Args:
        model_class: a model class of transformers.
        config: its configuration.
        seed: of the weights.

    Returns:
        The model: fp32, CPU, eval mode, weights from `randomize`, no end token.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).float().eval()
    randomize(model, seed)
    generation = model.generation_config
    generation.num_return_sequences = 1  # some classes with a generate() of their own count on a number
    generation.pad_token_id = tokens.PAD_TOKEN
    generation.bos_token_id = generation.decoder_start_token_id = tokens.BOS_TOKEN
    generation.eos_token_id = generation.forced_bos_token_id = generation.forced_eos_token_id = None
    return model


@torch.no_grad()
def randomize(model, seed=0):
    """Redraw, in place and larger, the weights that a constructor drew around zero.

    At the default standard deviation of 0.02 tiny models repeat one token whatever they attend to. Weights set to a
    constant, a sinusoid or a decay are left as they are; gates that start closed are opened.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    head = model.get_output_embeddings()
    head_weights = set() if head is None else {id(parameter) for parameter in head.parameters()}
    for name, parameter in model.named_parameters():
        is_embedding = id(parameter) in embeddings and parameter.shape[-1] >= 16
        if parameter.numel() == 1 and parameter == 0:
            parameter.fill_(0.5)  # a gate, closed, hides the attention behind it
        elif is_embedding and _is_around_zero(parameter):
            std = _TIED_EMBEDDING_STD if id(parameter) in head_weights else _EMBEDDING_STD
            parameter.normal_(0, std, generator=generator)
        elif not _is_bias(name, parameter) and _is_around_zero(parameter) and parameter.std() < 0.3:
            gain = _CROSS_GAIN if _CROSS_ATTENTION.search(name) else _GAIN
            parameter.normal_(0, gain * _fan_in(parameter) ** -0.5, generator=generator)


def _is_bias(name, parameter):
    return name.endswith("bias") and parameter.ndim == 1


def _is_around_zero(parameter):
    return parameter.numel() > 1 and parameter.std() > 0 and parameter.mean().abs() < 0.1


def _fan_in(parameter):
    is_convolution = parameter.ndim >= 3 and parameter.shape[-1] < 16
    return parameter[0].numel() if is_convolution else parameter.shape[-1]


def prompt(model, batch=2, length=9, left_padding=True):
    """Make inputs for `model.generate` that fit the architecture.

    Args:
        model: a model from `build` or `instantiate`.
        batch: B.
        length: tokens of the prompt (of the encoder's, for encoder-decoders).
        left_padding: pad row 0 with `NUM_PADDED` tokens. Encoder-decoders over audio have no text to pad.

    Returns:
        A dict of tensors: input_ids [B, length] and attention_mask [B, length] for text; the sound or the image alone
        for encoder-decoders over those; both for the decoders that do not run without an image.

    Raises:
        KeyError: the main input of the model is of another kind.
    """
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(tokens.FIRST_TOKEN, tokens.LAST_TOKEN + 1, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if left_padding:
        mask[0, :NUM_PADDED] = 0
        ids[0, :NUM_PADDED] = tokens.PAD_TOKEN
    text = {"input_ids": ids, "attention_mask": mask}
    name = model.main_input_name
    if name == "input_ids" or (name == "input_features" and not model.config.is_encoder_decoder):
        return text
    shape = {
        "pixel_values": (3, configs.IMAGE_SIZE, configs.IMAGE_SIZE),
        "input_features": _feature_shape(model.config),
        "input_values": (NUM_SAMPLES,),
        "inputs": (NUM_SAMPLES,),
    }[name]
    seen = {name: torch.randn(batch, *shape, generator=generator)}
    return seen if model.config.is_encoder_decoder else text | seen


def _feature_shape(config):
    if config.model_type == "whisper":
        return config.num_mel_bins, 2 * config.max_source_positions
    return 40, getattr(config, "input_feat_per_channel", getattr(config, "feature_projection_input_dim", 16))


def generate(model, inputs, max_new_tokens=6, **kwargs):
    """Generate greedily, exactly `max_new_tokens` tokens.

    Args:
        model: a model.
        inputs: from `prompt`.
        max_new_tokens: N.
        kwargs: for `model.generate`, a `past_key_values` for example.

    Returns:
        (sequences, logits): token ids [B, *], with the prompt for decoder-only models, and logits [B, N, vocabulary].
    """
    output = model.generate(
        **inputs,
        **{
            "do_sample": False,
            "num_beams": 1,
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": max_new_tokens,
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        | kwargs,
    )
    return output.sequences, torch.stack(output.logits, dim=1)
