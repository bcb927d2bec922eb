"""Other libraries' noise does not reach the screen, unless it is asked for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

#: What libraries do while they are imported and used: warn, log, draw bars.
_NOISE = """
import lopt_lite_cli.quiet
lopt_lite_cli.quiet.silence_libraries()
import logging, warnings
import torch, bitsandbytes, transformers, peft, huggingface_hub
from tqdm.auto import tqdm
warnings.warn("a warning")
logging.getLogger("transformers.modeling_utils").warning("some weights are new")
logging.getLogger("huggingface_hub.utils").warning("not authenticated")
import matplotlib.pyplot
list(tqdm(range(3), desc="Loading weights"))
layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
layer(torch.randn(2, 64, dtype=torch.bfloat16))
"""


def _stderr(debug: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRANSFORMERS_", "HF_", "TQDM_"))}
    done = subprocess.run(
        [sys.executable, "-c", _NOISE],
        # A directory that nobody can make: Matplotlib warns of that.
        env={**environment, "LOPT_LITE_DEBUG": debug, "MPLCONFIGDIR": f"{__file__}/not a directory"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stderr


def test_libraries_are_silent():
    assert _stderr("") == ""


@pytest.fixture(scope="module")
def with_debugging() -> str:
    return _stderr("1")


@pytest.mark.parametrize("said", ["a warning", "some weights are new", "Matplotlib", "Loading weights"])
def test_debugging_lets_libraries_speak(with_debugging, said):
    assert said in with_debugging
