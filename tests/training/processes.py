"""The command line as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """``lopt-lite`` with ``arguments``, computing with one thread."""
    return subprocess.Popen(
        [sys.executable, "-c", "from lopt_lite_cli.main import run; run()", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
