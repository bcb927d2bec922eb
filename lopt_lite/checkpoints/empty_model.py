"""A model of transformers with its parameters on the meta device, and what can be told from that alone."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lopt_lite.checkpoints.locate import ModelDescription
from lopt_lite.checkpoints.trial import first_line, is_the_models
from lopt_lite.errors import ModelError


def load_config(files: ModelDescription) -> Any:
    """The model's transformers config.

    Raises
    ------
    ModelError
        transformers does not know the architecture, or the config's values make no sense to it.
    """
    try:
        config = AutoConfig.from_pretrained(files.config_path.parent, trust_remote_code=False, local_files_only=True)  # nosec B615
    except Exception as error:
        if not is_the_models(error):
            raise
        raise ModelError(
            f"transformers cannot read {files.config_path}: {first_line(error)}",
            fix="check config.json, or install a transformers release that knows this architecture",
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        # The skeleton is the plain architecture; which tensors are NF4 is told by the files themselves.
        del config.quantization_config
    # The skeleton reads the model's outputs by their names, whatever the file asks for by default.
    config.return_dict = True
    config.output_attentions = config.output_hidden_states = False
    return config


def empty_model(config: Any, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    """The model that a config describes, its parameters on the meta device and its buffers real.

    Raises
    ------
    ModelError
        It is no decoder, or transformers cannot build it.
    """
    extra = {} if attention is None else {"attn_implementation": attention}
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **extra)
    except Exception as error:
        if not is_the_models(error):
            raise
        raise ModelError(
            f"no causal language model can be built from the config (model_type {config.model_type!r}): "
            f"{first_line(error)}",
            fix="check config.json; lopt-lite trains decoder-only language models that transformers knows",
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{type(model).__name__} has an encoder", expected="a decoder-only language model")
    # BERT and its kin can be built as causal models, and then still look at the tokens that they are to predict.
    if getattr(config, "is_decoder", True) is False and not any(
        getattr(m, "is_causal", False) for m in model.modules()
    ):
        raise ModelError(
            f"{type(model).__name__} is an encoder here (is_decoder is false in its config)",
            expected="a decoder-only language model",
            fix="bring a decoder; set is_decoder to true in config.json only if the model was trained as one",
        )
    return model.eval()


def check_kind(architecture: str, config: Any) -> None:
    """Refuse kinds of models that cannot be trained here, multimodal ones and those without attention."""
    if getattr(config, "get_text_config", lambda: config)() is not config:
        raise ModelError(
            f"{architecture} is a multimodal model",
            expected="a text-only causal language model",
            fix="bring the text model alone (a checkpoint whose config.json describes only the language model)",
        )
    if not getattr(config, "num_attention_heads", None):
        raise ModelError(
            f"{architecture} has no attention heads: its layers hand a state from token to token instead",
            expected="a decoder with attention, in all layers or (hybrid models) in some",
            fix="choose a model with attention layers",
        )


def find_layers(model: nn.Module, config: Any) -> tuple[str, nn.ModuleList]:
    """The outermost ModuleList with as many entries as the config has hidden layers."""
    count = getattr(config, "num_hidden_layers", None)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found or not count:
        raise ModelError(
            f"{type(model).__name__} has no list of {count} layers, so it cannot be cut into blocks",
            fix="check num_hidden_layers in config.json",
        )
    return min(found, key=lambda item: item[0].count("."))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a matrix product and nothing else, so that a 4-bit one or an adapter can take its place.

    Of classes that are made of ``nn.Linear``, Falcon's is, while the routers of Llama 4 and PhiMoE choose experts too.
    """
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear)
    try:
        output = module(torch.empty(1, module.in_features, device="meta", dtype=module.weight.dtype))
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        return False  # it needs more than its input's shape
    return isinstance(output, torch.Tensor) and tuple(output.shape) == (1, module.out_features)
