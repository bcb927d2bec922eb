"""A tiny model opened the way a run opens it, for tests that drive layers directly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lopt_lite.checkpoints.build_store import DTYPES, StoreBuilder
from lopt_lite.checkpoints.locate import describe_model, locate_model
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store import Store
from lopt_lite.residency.choices import Residence
from lopt_lite.residency.head import place_head
from lopt_lite.residency.pool import MicroBatch, ResidentLayers
from lopt_lite.residency.shapes import ModelShapes
from lopt_lite.settings import TrainSettings
from lopt_lite.training.checkpoint import save_lazily
from lopt_lite.training.model_facts import facts_of
from lopt_lite.training.trained import SavedTensor
from tests.tiny_models import make_config

CPU = torch.device("cpu")


def shapes_on_paper(directory: Path, settings: TrainSettings, vocabulary: int, **config: Any) -> ModelShapes:
    """Shapes of a Llama of any size, from its config alone, which is written to ``directory``."""
    make_config("llama", vocabulary, **config).save_pretrained(directory)
    skeleton = Skeleton(describe_model(str(directory)), dtype=torch.bfloat16)
    return facts_of(skeleton, settings).shapes


def residence(mode: str, *, layers: int = 2, micro_batch_tokens: int = 2048, **changes: Any) -> Residence:
    """A way of working by the name that :attr:`Residence.mode` gives it, or ``"offloaded"``: streamed, and tighter."""
    resident = {"streamed": 0, "offloaded": 0, "partly streamed": max(1, layers // 2)}.get(mode, layers)
    offloaded = mode == "offloaded"
    values: dict[str, Any] = {
        "layers": layers,
        "resident_layers": resident,
        "dequantised": mode in ("dequantised", "streamed"),
        "recompute": mode not in ("dequantised", "resident"),
        "micro_batch_tokens": micro_batch_tokens,
        "forward_tokens": 2 * micro_batch_tokens,
        "group_tokens": (2 if resident == layers else 16) * micro_batch_tokens,
        "logit_elements": 2**20 if micro_batch_tokens < 2048 else 2**24,
        "head_slice_rows": None,
        "boundary_bytes": 0 if offloaded else 2**30,
        "boundary_host_bytes": 0,
        "offload_state": offloaded,
        "cache_keep_bytes": 0,
        "predicted_bytes": 0,
        "predicted_host_bytes": 0,
        "state_host_bytes": 0,
    }
    return Residence(**{**values, **changes})


@dataclass
class Rig:
    """An open store and its skeleton, head and root tensors placed."""

    store: Store
    skeleton: Skeleton
    builder: StoreBuilder

    def layers(
        self, first: int = 0, end: int | None = None, *, dequantize: bool = False, **kwargs: Any
    ) -> ResidentLayers:
        """A resident range of layers; the whole model by default."""
        stop = self.skeleton.layer_count if end is None else end
        return ResidentLayers(self.store, self.skeleton, first, stop, device=CPU, dequantize=dequantize, **kwargs)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Logits [rows, tokens, vocabulary] by our own layer-by-layer pass."""
        recording = self.skeleton.record(ids, embed=True)
        with self.layers(**kwargs) as pool:
            hidden = pool.forward(MicroBatch(recording.hidden, recording.calls))
        return torch.stack([self.skeleton.logits(row) for row in hidden])


def open_rig(model: Path, store: Path, *, quantize: str, dtype: str, attention: str | None = None) -> Rig:
    """Build the store of ``model`` and open it."""
    builder = StoreBuilder(locate_model(str(model)), store, quantize=quantize, dtype=dtype, device=CPU)
    builder.build()
    skeleton = Skeleton(locate_model(str(store)), dtype=DTYPES[dtype], attention=attention)
    opened = Store(store)
    skeleton.set_embedding_reader(lambda ids: opened.embedding_rows(skeleton, ids))
    skeleton.place_root_tensors(opened.root(skeleton), CPU)
    place_head(skeleton, opened, CPU)
    return Rig(opened, skeleton, builder)


def plain_kernels(model: torch.nn.Module) -> torch.nn.Module:
    """Keep bitsandbytes from repacking weights for a second CPU kernel with other rounding."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write tensors that are there as a run writes its own; returns the file's sha256."""
    saved = {n: SavedTensor(n, t.dtype, tuple(t.shape), partial(torch.Tensor.detach, t)) for n, t in tensors.items()}
    return save_lazily(path, saved, metadata)
