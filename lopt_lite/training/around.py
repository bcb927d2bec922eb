"""What the paper trains around the layers: token embeddings with the first block, final norm and LM head with the last.

The embedding stays in host memory whatever the device: a batch reads only some of its rows. An LM head that the model
ties to its embedding becomes a tensor of its own, since no gradient of the last block may reach the first.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store import Store
from lopt_lite.residency.head import output_parameters
from lopt_lite.training.checkpoint import save_lazily
from lopt_lite.training.trained import TrainedParameters

EMBEDDING, OUTPUT = "embedding", "output"


class Around:
    """Embedding, final norm and LM head as trainable parameters, until :meth:`close`.

    Parameters
    ----------
    store:
        Has their values; they are trained in the skeleton's dtype.
    trained:
        Takes them under control, as the groups :data:`EMBEDDING` and :data:`OUTPUT`.

    The LM head and the final norm must be on the device already.
    """

    def __init__(self, store: Store, skeleton: Skeleton, trained: TrainedParameters) -> None:
        self._store, self._skeleton = store, skeleton
        self._trained = trained
        weight = nn.Parameter(store.tensor(skeleton.embedding_name).to(skeleton.dtype))
        skeleton.set_embedding_reader(lambda ids: weight[ids])
        trained.add(EMBEDDING, {skeleton.embedding_name: weight})
        self.output = output_parameters(skeleton)
        trained.add(OUTPUT, dict(self.output))

    def write(self, path: Path) -> str:
        """Write all of them durably to one file, by their full names; returns its sha256."""
        tensors = {t.name: t for t in self._trained.parameters(lambda group: group in (EMBEDDING, OUTPUT))}
        return save_lazily(path, tensors)

    def close(self) -> None:
        """Let the skeleton read untouched embeddings again."""
        store, skeleton = self._store, self._skeleton
        skeleton.set_embedding_reader(lambda ids: store.embedding_rows(skeleton, ids))
