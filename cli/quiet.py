"""Keep other libraries' bars, banners and warnings off the screen; what they mean for the user comes as our notices.

This has to run before torch, transformers, bitsandbytes, peft and huggingface_hub are imported: most of them read
their settings then. ``LOPT_LITE_DEBUG=1`` leaves everything as the libraries have it.
"""

from __future__ import annotations

import logging
import os
import warnings

#: Read by the libraries when they are imported. A value that the user has set stays.
_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "BITSANDBYTES_NOWELCOME": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}

#: bitsandbytes says on the CPU that it cannot load an optional kernel, and some of it as an error.
_LOGGERS = {
    "bitsandbytes": logging.CRITICAL,
    "transformers": logging.ERROR,
    "huggingface_hub": logging.ERROR,
    "peft": logging.ERROR,
    "accelerate": logging.ERROR,
    "datasets": logging.ERROR,
    "lm_eval": logging.ERROR,
    "matplotlib": logging.ERROR,
    "torch": logging.ERROR,
    "httpx": logging.ERROR,
    "urllib3": logging.ERROR,
}


def debugging() -> bool:
    """Whether ``LOPT_LITE_DEBUG`` asks for everything: tracebacks, and what the libraries print."""
    return os.environ.get("LOPT_LITE_DEBUG", "") not in ("", "0")


def silence_libraries() -> None:
    """Turn the libraries' own output off, unless debugging."""
    if debugging():
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name, level in _LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    warnings.simplefilter("ignore")
