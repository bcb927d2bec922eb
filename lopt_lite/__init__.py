"""lopt-lite: post-train language models that are larger than your memory, block by block (LoPT).

The operations below are the command line's, from Python::

    import lopt_lite
    outcome = lopt_lite.train(lopt_lite.TrainSettings(model="model.safetensors", data="data.jsonl"))

They are imported on first use, because torch takes seconds to load.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lopt_lite.settings import (
    EvaluateSettings,
    ExportSettings,
    GenerateSettings,
    PlanSettings,
    QuantizeSettings,
    ReportSettings,
    TrainSettings,
)

if TYPE_CHECKING:
    from lopt_lite.checkpoints.quantize import quantize
    from lopt_lite.results.evaluate import evaluate
    from lopt_lite.results.export import export
    from lopt_lite.results.generate import generate
    from lopt_lite.results.report import report
    from lopt_lite.results.status import status
    from lopt_lite.training.plan import plan
    from lopt_lite.training.start import train

__version__ = "0.1.0"

__all__ = [
    "EvaluateSettings",
    "ExportSettings",
    "GenerateSettings",
    "PlanSettings",
    "QuantizeSettings",
    "ReportSettings",
    "TrainSettings",
    "__version__",
    "evaluate",
    "export",
    "generate",
    "plan",
    "quantize",
    "report",
    "status",
    "train",
]

_OPERATIONS = {
    "evaluate": "lopt_lite.results.evaluate",
    "export": "lopt_lite.results.export",
    "generate": "lopt_lite.results.generate",
    "plan": "lopt_lite.training.plan",
    "quantize": "lopt_lite.checkpoints.quantize",
    "report": "lopt_lite.results.report",
    "status": "lopt_lite.results.status",
    "train": "lopt_lite.training.start",
}


def __getattr__(name: str) -> Any:
    if name in _OPERATIONS:
        return getattr(importlib.import_module(_OPERATIONS[name]), name)
    raise AttributeError(f"module 'lopt_lite' has no attribute {name!r}")
