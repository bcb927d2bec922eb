"""config.json as users bring it: what in it must be refused before any weight is looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lopt_lite.errors import ModelError
from lopt_lite.events import Notice, OnEvent
from lopt_lite.files import read_json

_GET_CONFIG = "get config.json from where the model came from, or name its directory with --config DIR"
_BRING_PLAIN = "bring the unquantised checkpoint (bfloat16, float16 or float32); it is quantised to 4 bits here"

#: What configurations call their number of layers.
_LAYER_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "num_decoder_layers",
    "n_layer",
    "n_layers",
    "decoder_layers",
    "encoder_layers",
)
#: More layers than any model has by far. Each is made before anything else can be found wrong with them.
MOST_LAYERS = 1000


def read_config(path: Path, on_event: OnEvent) -> dict[str, Any]:
    """Parse and check a model's config.json.

    Raises
    ------
    ModelError
        Not a JSON object with a ``model_type``, more layers than any model has, custom code for an architecture that
        transformers does not have, or a quantisation other than bitsandbytes NF4.
    """
    config = read_json(path, what="the model's configuration", error=ModelError, fix=_GET_CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise ModelError(
            f"{path} is not a model's configuration",
            expected="a JSON object with a model_type, as transformers writes it",
            fix=_GET_CONFIG,
        )
    _check_code(path, config, on_event)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        _check_layer_count(path, part, MOST_LAYERS, f"{MOST_LAYERS} layers at most")
        for key in ("quantization_config", "compression_config"):
            if part.get(key) is not None:
                _check_quantization(path, part[key])
    return config


def check_layers_against_weights(path: Path, config: dict[str, Any], tensors: int) -> None:
    """See that config.json does not say more layers than the weights can have: a layer has a tensor at least.

    Parameters
    ----------
    tensors:
        How many the weights hold.

    Raises
    ------
    ModelError
        It does. (Weights that lack some tensor of a layer are found out when the model is known.)
    """
    _check_layer_count(path, config, tensors, f"no more layers than the weights have tensors, which is {tensors}")


def _check_layer_count(path: Path, config: dict[str, Any], most: int, expected: str) -> None:
    for name in _LAYER_COUNTS:
        count = config.get(name)
        if isinstance(count, (int, float)) and count > most:
            raise ModelError(
                f"{path} has {name} {count}",
                expected=expected,
                fix="get config.json from where the model came from, and check that it belongs to these weights",
            )


def _check_code(path: Path, config: dict[str, Any], on_event: OnEvent) -> None:
    if not config.get("auto_map"):
        return
    # Imported here: it takes a second, and few models need it.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"{path} needs remote code: it brings its own Python for the architecture {model_type!r}",
            expected="an architecture that transformers has itself; code that comes with a model is never run",
            fix="use a release of the model that transformers supports natively, or a newer transformers",
        )
    on_event(Notice(text=f"The model names code of its own; transformers' built-in {model_type} is used instead."))


def _check_quantization(path: Path, quantization: Any) -> None:
    if not isinstance(quantization, dict):
        raise ModelError(f"{path} has a quantization_config that is not an object", fix=_BRING_PLAIN)
    kind = _quantization_kind(quantization)
    if kind is not None:
        raise ModelError(
            f"{path}: the weights are already quantised ({kind})",
            expected="unquantised weights, or bitsandbytes 4-bit NF4",
            fix=_BRING_PLAIN,
        )


def _quantization_kind(quantization: dict[str, Any]) -> str | None:
    """What the quantisation is called, or None for the one that can be read: bitsandbytes NF4 in uint8."""
    method = quantization.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        return str(method)
    if quantization.get("load_in_8bit") or quantization.get("_load_in_8bit"):
        return "bitsandbytes int8"
    if not (quantization.get("load_in_4bit") or quantization.get("_load_in_4bit")):
        return "bitsandbytes, neither 4 nor 8 bits"
    # transformers' default, when the file does not say, is fp4.
    quant_type = quantization.get("bnb_4bit_quant_type", "fp4")
    if quant_type != "nf4":
        return f"bitsandbytes {quant_type}"
    storage = quantization.get("bnb_4bit_quant_storage") or "uint8"
    if storage not in ("uint8", "torch.uint8"):
        return f"bitsandbytes nf4 stored as {storage}"
    return None
