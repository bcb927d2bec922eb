"""config.json as users bring it: what in it must be refused before any weight is looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lopt_lite.errors import ModelError
from lopt_lite.events import Notice, OnEvent
from lopt_lite.files import read_json

_GET_CONFIG = "get config.json from where the model came from, or name its directory with --config DIR"
_BRING_PLAIN = "bring the unquantised checkpoint (bfloat16, float16 or float32); it is quantised to 4 bits here"


def read_config(path: Path, on_event: OnEvent) -> dict[str, Any]:
    """Parse and check a model's config.json.

    Raises
    ------
    ModelError
        Not a JSON object with a ``model_type``, custom code for an architecture that transformers does not have, or a
        quantisation other than bitsandbytes NF4.
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
        for key in ("quantization_config", "compression_config"):
            if part.get(key) is not None:
                _check_quantization(path, part[key])
    return config


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
