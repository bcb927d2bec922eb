"""A Hugging Face model without weights, whose own ``forward`` is used for everything around the layers.

The model is built from its config with parameters on the meta device and buffers real. Its decoder layers are replaced
by proxies of the same number, so that *its* code makes masks, rotary embeddings, embedding scaling, sliding-window
patterns, soft-capping and per-layer arguments, whatever the architecture. Three things are asked of it:

* :meth:`Skeleton.record`: with which arguments would each layer be called, and what goes into the first one?
* :meth:`Skeleton.logits`: what do final norm and LM head make of a hidden state?
* :meth:`Skeleton.layer_template`: a layer module on the meta device, to be filled with weights.

Rows are padded on the right and no attention mask is passed: under causal attention no real token can see a padding
token that follows it, so the result for real tokens is the same and no dense mask is ever made for padding.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lopt_lite.checkpoints.empty_model import check_kind, empty_model, find_layers, is_linear, load_config
from lopt_lite.checkpoints.layer_calls import LayerCall, LayerProxy, Recording, StopForward, split_hidden
from lopt_lite.checkpoints.local_mask import without_dense_masks
from lopt_lite.checkpoints.locate import ModelDescription
from lopt_lite.checkpoints.positions import PROBED_TOKENS, PositionTables
from lopt_lite.checkpoints.probes import meta_root_on_cpu, what_layers_return
from lopt_lite.checkpoints.rotary import forget_longer_rows
from lopt_lite.checkpoints.row_embedding import ReadRows, RowEmbedding
from lopt_lite.checkpoints.trial import trial
from lopt_lite.errors import ModelError
from lopt_lite.recipe import ModelKind


class Skeleton:
    """A causal language model on the meta device, driven layer by layer.

    Parameters
    ----------
    files:
        The model's files; only the config is read.
    dtype:
        Compute dtype of hidden states.
    attention:
        An attention implementation of transformers, None for the model's default.

    Raises
    ------
    ModelError
        The architecture is unknown to transformers, is not a causal decoder, or does not fit this way of driving it.
    """

    def __init__(self, files: ModelDescription, *, dtype: torch.dtype, attention: str | None = None) -> None:
        self.dtype = dtype
        self.config = load_config(files)
        self.model = empty_model(self.config, dtype, attention)
        self.architecture = type(self.model).__name__
        with trial(self.architecture, "cannot be driven layer by layer"):
            self._take_apart()

    def _take_apart(self) -> None:
        """Replace layers and embedding, and find out how the model's own code calls them."""
        check_kind(self.architecture, self.config)
        forget_longer_rows(self.model)
        self.layers_path, layers = find_layers(self.model, self.config)
        self._templates = list(layers)
        self.layer_count = len(self._templates)
        self.hidden_size = int(self.config.hidden_size)
        self._layer_names = [[n for n, _ in layer.named_parameters()] for layer in self._templates]
        self._layer_shapes = [{n: tuple(p.shape) for n, p in layer.named_parameters()} for layer in self._templates]

        embedding = self.model.get_input_embeddings()
        head = self.model.get_output_embeddings()
        if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
            raise ModelError(f"{self.architecture} has no plain input embedding or LM head, which lopt-lite needs")
        self._head = head
        self.embedding_name = self._parameter_name(embedding)
        self.head_name = self._parameter_name(head)
        self.tied = bool(getattr(self.config, "tie_word_embeddings", False))
        self.vocabulary_rows = embedding.num_embeddings
        self.state_shapes = {n: tuple(t.shape) for n, t in self.model.state_dict().items()}
        self.root_names = [
            n
            for n in self.state_shapes
            if not n.startswith(self.layers_path + ".") and not (self.tied and n == self.head_name)
        ]

        proxies = [LayerProxy(template, i, self._layer_called) for i, template in enumerate(self._templates)]
        _set_module(self.model, self.layers_path, nn.ModuleList(proxies))
        self._embedding = RowEmbedding(embedding, self.dtype, lambda: self.root_device)
        self.model.set_input_embeddings(self._embedding)
        # Tying would share the (now absent) embedding parameter again whenever the library calls it.
        self._recorded: list[LayerCall] = []
        self._first_hidden: torch.Tensor | None = None
        self._inject: torch.Tensor | None = None
        self._as_layer_output = what_layers_return(self.model, proxies)
        self._check_arguments()
        #: Most tokens of a row, None where positions are not looked up in a table.
        self.most_positions = self._find_most_positions()

    # -- what the model is made of ------------------------------------------------------------------------------------

    def layer_prefix(self, index: int) -> str:
        """Prefix of the names of layer ``index``'s tensors, with its final dot."""
        return f"{self.layers_path}.{index}."

    def layer_parameters(self, index: int) -> dict[str, tuple[int, ...]]:
        """Names (within the layer) and shapes of layer ``index``'s parameters."""
        return dict(self._layer_shapes[index])

    def layer_template(self, index: int) -> nn.Module:
        """A fresh copy of layer ``index`` with parameters on the meta device and real buffers."""
        return copy.deepcopy(self._templates[index])

    def layer_buffer_names(self, index: int) -> set[str]:
        """Names (within the layer) of layer ``index``'s persistent buffers."""
        return set(self._templates[index].state_dict()) - set(self._layer_names[index])

    def linear_names(self, index: int) -> list[str]:
        """Names (within the layer) of the linear modules of layer ``index``: what NF4 quantises."""
        return [n for n, m in self._templates[index].named_modules() if is_linear(m)]

    def adaptable_names(self, index: int) -> list[str]:
        """Names (within the layer) of modules that can carry a LoRA adapter (linear ones and GPT-2's ``Conv1D``)."""
        modules = self._templates[index].named_modules()
        return [n for n, m in modules if isinstance(m, Conv1D) or is_linear(m)]

    def unquantizable_names(self) -> list[str]:
        """Last name parts of matrix modules that stay unquantised: GPT-2's ``Conv1D``, Llama 4's routers."""
        matrices = [(n, m) for t in self._templates for n, m in t.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
        return sorted({n.rpartition(".")[2] for n, m in matrices if not is_linear(m)})

    def root_linear_names(self) -> list[str]:
        """Full names of ``nn.Linear`` modules outside the layers (the LM head and, rarely, projections)."""
        return [n for n, m in self.model.named_modules() if isinstance(m, nn.Linear)]

    @contextlib.contextmanager
    def as_a_whole(self) -> Iterator[PreTrainedModel]:
        """Within the context, the model with its layers on the meta device: for code that asks for their shapes."""
        proxies = self.model.get_submodule(self.layers_path)
        _set_module(self.model, self.layers_path, nn.ModuleList(self._templates))
        try:
            yield self.model
        finally:
            _set_module(self.model, self.layers_path, proxies)

    def _parameter_name(self, module: nn.Module) -> str:
        for name, candidate in self.model.named_modules():
            if candidate is module:
                return f"{name}.weight"
        raise ModelError(f"{self.architecture}: embedding or LM head is not a submodule of the model")

    # -- weights outside the layers -----------------------------------------------------------------------------------

    def set_embedding_reader(self, read_rows: ReadRows) -> None:
        """Give the function that reads embedding rows: ids int64 [n] -> [n, hidden] on the CPU."""
        self._read_rows = read_rows

    def place_root_tensors(self, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
        """Put tensors outside the layers (position embeddings, norms) into the model, on ``device``."""
        self._placed_on = device
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != self.state_shapes[name]:
                raise ModelError(
                    f"tensor {name} has shape {list(tensor.shape)}",
                    expected=f"{list(self.state_shapes[name])}, from config.json",
                )
            value = tensor.to(device, self.dtype if tensor.is_floating_point() else tensor.dtype)
            owner_name, _, leaf = name.rpartition(".")
            owner = self.model.get_submodule(owner_name)
            if leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            else:
                owner._buffers[leaf] = value
        for module in self.model.modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None and buffer.device != device:
                    module._buffers[leaf] = buffer.to(device)

    def place_head(self, weight: torch.Tensor | None, bias: torch.Tensor | None = None) -> None:
        """Put the LM head's weight [rows, hidden] and bias [rows] on the device, or take both off again (None).

        ``rows`` may be fewer than the vocabulary: then :meth:`logits` makes the logits of just these rows.
        """
        shapes: dict[str, tuple[int, ...]] = {"weight": (self._head.out_features, self._head.in_features)}
        if self._head.bias is not None:
            shapes["bias"] = (self._head.out_features,)
        for (leaf, shape), value in zip(shapes.items(), (weight, bias), strict=False):
            placed = torch.empty(shape, device="meta", dtype=self.dtype) if value is None else value
            self._head._parameters[leaf] = nn.Parameter(placed, requires_grad=False)

    @contextlib.contextmanager
    def other_head(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Iterator[None]:
        """Within the context, logits are made by other rows of the head, as :meth:`place_head` puts them."""
        before = dict(self._head._parameters)
        self.place_head(weight, bias)
        try:
            yield
        finally:
            self._head._parameters.update(before)

    def replace_head(self, module: nn.Module) -> None:
        """Let ``module`` ([..., hidden] -> [..., vocabulary]) make the model's logits from now on, for generation."""
        _set_module(self.model, self.head_name.removesuffix(".weight"), module)

    # -- driving the model --------------------------------------------------------------------------------------------

    def record(self, input_ids: torch.Tensor, *, embed: bool, trains: bool = False) -> Recording:
        """Find out how each layer is called for a batch of right-padded rows.

        Parameters
        ----------
        input_ids:
            int64 [rows, tokens] on the compute device.
        embed:
            Whether to gather embedding rows; without, ``Recording.hidden`` is a placeholder of the right shape.
        trains:
            Whether ``Recording.hidden`` is to lead gradients back to the rows, if these require one.
        """
        self._embedding.read_rows = self._read_rows if embed else None
        return self._recording(input_ids, trains=trains)

    def _recording(self, input_ids: torch.Tensor, *, trains: bool) -> Recording:
        self._recorded, self._first_hidden, self._inject = [], None, None
        try:
            with torch.set_grad_enabled(trains):
                self.model.base_model(input_ids=input_ids, use_cache=False, return_dict=True)
        except StopForward:
            pass
        if len(self._recorded) != self.layer_count or self._first_hidden is None:
            raise ModelError(
                f"{self.architecture} called {len(self._recorded)} of its {self.layer_count} layers, "
                "so it cannot be driven layer by layer"
            )
        recording = Recording(self._first_hidden, without_dense_masks(self._recorded))
        self._recorded, self._first_hidden = [], None
        return recording

    def probe(self, tokens: int) -> list[LayerCall]:
        """How each layer is called for one row of ``tokens`` tokens; also before any weight is there."""
        ids = torch.zeros(1, tokens, dtype=torch.long, device=self.root_device)
        with trial(self.architecture, "cannot be driven layer by layer"), meta_root_on_cpu(self.model):
            return self.record(ids, embed=False).calls

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm, LM head, and what the architecture adds to them (soft-capping, scaling).

        Parameters
        ----------
        hidden:
            [tokens, hidden], output of the last layer. Each token is treated as a row of its own, so that no position
            matters.

        Returns
        -------
        torch.Tensor
            [tokens, vocabulary], or as many columns as the placed head has rows, in the compute dtype; differentiable
            in ``hidden``.
        """
        ids = torch.zeros(hidden.shape[0], 1, dtype=torch.long, device=hidden.device)
        self._embedding.read_rows = None
        self._inject = hidden[:, None]
        try:
            output = self.model(input_ids=ids, use_cache=False, return_dict=True)
        finally:
            self._inject, self._recorded, self._first_hidden = None, [], None
        # A view with a free backward; indexing would copy the gradient, which is as large as the logits.
        return output.logits.flatten(0, 1)

    def with_layers(self, layers: list[nn.Module]) -> PreTrainedModel:
        """The whole model with real layers in place of the proxies, for transformers' own generation.

        The skeleton itself cannot record or make logits afterwards.
        """
        _set_module(self.model, self.layers_path, nn.ModuleList(layers))
        self._embedding.read_rows = self._read_rows
        _say_device(self.model, self.root_device)
        return self.model

    @property
    def kind(self) -> ModelKind:
        """What the defaults ask of the model."""
        return ModelKind(self.architecture, self.hidden_size, self.layer_count)

    @property
    def root_device(self) -> torch.device:
        """Where the model's own buffers and root tensors are, and so where batches must be."""
        return next((b.device for b in self.model.buffers()), self._placed_on)

    _read_rows: ReadRows | None = None
    _placed_on = torch.device("cpu")

    def _layer_called(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call, hidden = split_hidden(args, kwargs)
        if self._inject is not None:
            return self._as_layer_output(self._inject if index == self.layer_count - 1 else hidden)
        if index == 0:
            self._first_hidden = hidden
        self._recorded.append(call)
        if index == self.layer_count - 1:
            raise StopForward
        return self._as_layer_output(hidden)

    def _check_arguments(self) -> None:
        """What layers are given beside the hidden state must not be made of the embedded tokens.

        Later blocks are driven without the embedding's rows, and would be given something else than in the whole model.
        """
        embedding = self._embedding
        width = embedding.weight.shape[1]
        embedding.read_rows = lambda ids: torch.ones(len(ids), width, requires_grad=True)
        with meta_root_on_cpu(self.model):
            calls = self._recording(torch.zeros(1, PROBED_TOKENS, dtype=torch.long), trains=True).calls
        given = [value for call in calls for value in tree_iter((call.args, call.kwargs))]
        if any(isinstance(value, torch.Tensor) and value.requires_grad for value in given):
            raise ModelError(
                f"{self.architecture} gives its layers more of the embedded tokens than the hidden state",
                expected="layers that are given what follows from the tokens' number and positions, and no embeddings",
                fix="choose another model: this one's later layers cannot be trained apart from its embedding",
            )

    def _find_most_positions(self) -> int | None:
        # Some models give padding tokens no position of their own.
        token = 1 if getattr(self.config, "pad_token_id", None) == 0 else 0
        ids = torch.full((1, PROBED_TOKENS), token)
        with meta_root_on_cpu(self.model), PositionTables() as tables:
            self.record(ids, embed=False)
        for template in self._templates:
            tables.note_layer(template)
        return tables.most_positions


def _say_device(model: PreTrainedModel, device: torch.device) -> None:
    """Make ``model.device`` this one. transformers asks its first parameter, which is nowhere until it is needed."""
    kind = type(model)
    model.__class__ = type(kind.__name__, (kind,), {"device": property(lambda _: device)})


def _set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
