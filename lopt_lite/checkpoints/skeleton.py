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
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lopt_lite.checkpoints.locate import ModelDescription
from lopt_lite.checkpoints.positions import PROBED_TOKENS, PositionTables
from lopt_lite.checkpoints.trial import does_not_fit, first_line, is_the_models, trial
from lopt_lite.errors import ModelError
from lopt_lite.recipe import ModelKind

ReadRows = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one layer for one batch, without the hidden state.

    ``hidden_keyword`` is None when the hidden state is the first positional argument.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_keyword: str | None

    def run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Call ``layer`` on ``hidden`` [rows, tokens, hidden]; returns the new hidden state, same shape."""
        args, kwargs = [_own(value) for value in self.args], {name: _own(value) for name, value in self.kwargs.items()}
        if self.hidden_keyword is None:
            output = layer(hidden, *args, **kwargs)
        else:
            output = layer(*args, **{self.hidden_keyword: hidden}, **kwargs)
        return output[0] if isinstance(output, tuple) else output


def _own(value: Any) -> Any:
    """A layer's own copy of a mapping that all layers are given.

    What it leaves there for others would keep its activations alive, and is not there when layers run one by one.
    """
    return copy.copy(value) if isinstance(value, MutableMapping) else value


@dataclass(frozen=True)
class Recording:
    """What one batch brings to the layers.

    Attributes
    ----------
    hidden:
        Input of the first layer, [rows, tokens, hidden] in the compute dtype; zeros when embeddings were not asked for.
    calls:
        One entry per layer of the model.
    """

    hidden: torch.Tensor
    calls: list[LayerCall]


class _StopForward(BaseException):
    """Leaves the model's forward once the last layer's arguments are known. Not an Exception, so nothing catches it."""


def _just_hidden(hidden: torch.Tensor) -> Any:
    return hidden


def _in_a_tuple(hidden: torch.Tensor) -> Any:
    return (hidden,)


def _with_attention_weights(hidden: torch.Tensor) -> Any:
    return hidden, None


#: What layers may return, as their model expects it.
_LAYER_OUTPUTS: tuple[Callable[[torch.Tensor], Any], ...] = (_just_hidden, _in_a_tuple, _with_attention_weights)


def words_of(layer: nn.Module) -> dict[str, str]:
    """What a layer says of its own kind, by attribute (Nemotron-H's ``block_type``): models ask their layers for it."""
    return {name: value for name, value in vars(layer).items() if isinstance(value, str)}


class _LayerProxy(nn.Module):
    """Stands in for one layer: notes its arguments and hands the hidden state on.

    Models may ask it what kind of layer it is (Nemotron-H's ``block_type``), but not for a part of it.
    """

    def __init__(self, owner: Skeleton, index: int) -> None:
        super().__init__()
        self._note: Callable[..., Any] = owner._layer_called
        self._index = index
        self._told = words_of(owner._templates[index])

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_told", ()):
            return self._told[name]
        raise AttributeError(
            f"a layer is asked for its {name!r}, which is not there while layers are driven one by one"
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._note(self._index, args, kwargs)


class _RowEmbedding(nn.Module):
    """The model's input embedding, fed with only the rows a batch needs.

    The embedding module itself runs (some scale their output), on a small matrix of the distinct rows.

    Parameters
    ----------
    device:
        Where batches are.
    """

    def __init__(self, module: nn.Embedding, dtype: torch.dtype, device: Callable[[], torch.device]) -> None:
        super().__init__()
        module.padding_idx = None  # matters to gradients only, and would be checked against the small matrix
        self._module = module
        self._dtype = dtype
        self._device = device
        self.read_rows: ReadRows | None = None

    @property
    def weight(self) -> torch.Tensor:
        """No rows, but the type and the device of some: Llama 4 asks where its embedding is."""
        return torch.empty(0, self._module.embedding_dim, dtype=self._dtype, device=self._device())

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.read_rows is None:
            width = self._module.embedding_dim
            return torch.zeros(1, 1, 1, dtype=self._dtype, device=input_ids.device).expand(*input_ids.shape, width)
        distinct, inverse = torch.unique(input_ids, return_inverse=True)
        rows = self.read_rows(distinct.cpu()).to(input_ids.device, self._dtype)
        return torch.func.functional_call(self._module, {"weight": rows}, (inverse,))


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
        self.model = _empty_model(self.config, dtype, attention)
        self.architecture = type(self.model).__name__
        with trial(self.architecture, "cannot be driven layer by layer"):
            self._take_apart()

    def _take_apart(self) -> None:
        """Replace layers and embedding, and find out how the model's own code calls them."""
        if getattr(self.config, "get_text_config", lambda: self.config)() is not self.config:
            raise ModelError(
                f"{self.architecture} is a multimodal model",
                expected="a text-only causal language model",
                fix="bring the text model alone (a checkpoint whose config.json describes only the language model)",
            )
        if not getattr(self.config, "num_attention_heads", None):
            raise ModelError(
                f"{self.architecture} has no attention heads: its layers hand a state from token to token instead",
                expected="a decoder with attention, in all layers or (hybrid models) in some",
                fix="choose a model with attention layers",
            )
        self.layers_path, layers = _find_layers(self.model, self.config)
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

        proxies = nn.ModuleList(_LayerProxy(self, i) for i in range(self.layer_count))
        _set_module(self.model, self.layers_path, proxies)
        self._embedding = _RowEmbedding(embedding, self.dtype, lambda: self.root_device)
        self.model.set_input_embeddings(self._embedding)
        # Tying would share the (now absent) embedding parameter again whenever the library calls it.
        self._recorded: list[LayerCall] = []
        self._first_hidden: torch.Tensor | None = None
        self._inject: torch.Tensor | None = None
        self._as_layer_output = self._find_out_what_layers_return()
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
        return [n for n, m in self._templates[index].named_modules() if _is_linear(m)]

    def adaptable_names(self, index: int) -> list[str]:
        """Names (within the layer) of modules that can carry a LoRA adapter (linear ones and GPT-2's ``Conv1D``)."""
        modules = self._templates[index].named_modules()
        return [n for n, m in modules if isinstance(m, Conv1D) or _is_linear(m)]

    def unquantizable_names(self) -> list[str]:
        """Last name parts of matrix modules that stay unquantised: GPT-2's ``Conv1D``, Llama 4's routers."""
        matrices = [(n, m) for t in self._templates for n, m in t.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
        return sorted({n.rpartition(".")[2] for n, m in matrices if not _is_linear(m)})

    def root_linear_names(self) -> list[str]:
        """Full names of ``nn.Linear`` modules outside the layers (the LM head and, rarely, projections)."""
        return [n for n, m in self.model.named_modules() if isinstance(m, nn.Linear)]

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
        except _StopForward:
            pass
        if len(self._recorded) != self.layer_count or self._first_hidden is None:
            raise ModelError(
                f"{self.architecture} called {len(self._recorded)} of its {self.layer_count} layers, "
                "so it cannot be driven layer by layer"
            )
        recording = Recording(self._first_hidden, self._recorded)
        self._recorded, self._first_hidden = [], None
        return recording

    def probe(self, tokens: int) -> list[LayerCall]:
        """How each layer is called for one row of ``tokens`` tokens; also before any weight is there."""
        ids = torch.zeros(1, tokens, dtype=torch.long, device=self.root_device)
        with trial(self.architecture, "cannot be driven layer by layer"), _meta_root_on_cpu(self.model):
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
        call, hidden = _split_hidden(args, kwargs)
        if self._inject is not None:
            return self._as_layer_output(self._inject if index == self.layer_count - 1 else hidden)
        if index == 0:
            self._first_hidden = hidden
        self._recorded.append(call)
        if index == self.layer_count - 1:
            raise _StopForward
        return self._as_layer_output(hidden)

    def _find_out_what_layers_return(self) -> Callable[[torch.Tensor], Any]:
        """Try all conventions on a tiny batch and look at what the code after the last layer receives."""
        raised: Exception | None = None
        for convention in _LAYER_OUTPUTS:
            try:
                if self._hidden_survives(convention):
                    return convention
            except Exception as error:
                if not is_the_models(error):
                    raise
                raised = raised or error
        found = "does not pass one hidden state from layer to layer, so lopt-lite cannot train it"
        if raised is not None:
            raise does_not_fit(self.architecture, found, raised) from raised
        raise ModelError(
            f"{self.architecture} {found}",
            expected="a decoder whose layers each take the hidden state of the one before and return their own",
            fix="choose another model",
        )

    def _check_arguments(self) -> None:
        """What layers are given beside the hidden state must not be made of the embedded tokens.

        Later blocks are driven without the embedding's rows, and would be given something else than in the whole model.
        """
        embedding = self._embedding
        width = embedding.weight.shape[1]
        embedding.read_rows = lambda ids: torch.ones(len(ids), width, requires_grad=True)
        with _meta_root_on_cpu(self.model):
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
        with _meta_root_on_cpu(self.model), PositionTables() as tables:
            self.record(ids, embed=False)
        for template in self._templates:
            tables.note_layer(template)
        return tables.most_positions

    def _hidden_survives(self, convention: Callable[[torch.Tensor], Any]) -> bool:
        shape = (2, 3, self.hidden_size)  # two rows, so that indexing a tensor as if it were a tuple shows
        seen: list[bool] = []

        def layer_called(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if seen and not seen[-1]:
                raise _StopForward
            _, hidden = _split_hidden(args, kwargs)
            seen.append(isinstance(hidden, torch.Tensor) and tuple(hidden.shape) == shape)
            return convention(hidden)

        def after_layers(module: nn.Module, args: tuple[Any, ...]) -> None:
            if len(seen) >= self.layer_count:
                value = args[0] if args else None
                seen.append(isinstance(value, torch.Tensor) and tuple(value.shape) == shape)
                raise _StopForward

        layers = self.model.get_submodule(self.layers_path)
        for proxy in layers:
            proxy._note = layer_called
        leaves = [m for m in self.model.modules() if not isinstance(m, _LayerProxy) and not list(m.children())]
        hooks = [leaf.register_forward_pre_hook(after_layers) for leaf in leaves]
        self._embedding.read_rows = None
        try:
            with torch.no_grad(), _meta_root_on_cpu(self.model):
                self.model.base_model(
                    input_ids=torch.zeros(shape[:2], dtype=torch.long), use_cache=False, return_dict=True
                )
        except _StopForward:
            pass
        finally:
            for hook in hooks:
                hook.remove()
            for proxy in layers:
                proxy._note = self._layer_called
        return len(seen) >= self.layer_count and all(seen)


class _meta_root_on_cpu:
    """For the length of a probe: small parameters outside the layers hold zeros on the CPU instead of being meta.

    Modules before the layers (position embeddings, embedding norms) run in the probe, and cannot on the meta device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._saved: list[tuple[nn.Module, str, nn.Parameter]] = []

    def __enter__(self) -> None:
        # LM head and input embedding are large, and neither runs: the embedding's stand-in gives zeros.
        unused = [self._model.get_output_embeddings(), *self._model.get_input_embeddings().children()]
        for module in self._model.modules():
            if any(module is other for other in unused):
                continue
            for leaf, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    self._saved.append((module, leaf, parameter))
                    module._parameters[leaf] = nn.Parameter(
                        torch.zeros(parameter.shape, dtype=parameter.dtype), requires_grad=False
                    )

    def __exit__(self, *exc: object) -> None:
        for module, leaf, parameter in self._saved:
            module._parameters[leaf] = parameter


def load_config(files: ModelDescription) -> Any:
    """The model's transformers config.

    Raises
    ------
    ModelError
        transformers does not know the architecture, or the config's values make no sense to it.
    """
    try:
        config = AutoConfig.from_pretrained(files.config_path.parent, trust_remote_code=False, local_files_only=True)  # nosec B615
    except Exception as error:
        if not is_the_models(error):
            raise
        raise ModelError(
            f"transformers cannot read {files.config_path}: {first_line(error)}",
            fix="check config.json, or install a transformers release that knows this architecture",
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        # The skeleton is the plain architecture; which tensors are NF4 is told by the files themselves.
        del config.quantization_config
    # The skeleton reads the model's outputs by their names, whatever the file asks for by default.
    config.return_dict = True
    config.output_attentions = config.output_hidden_states = False
    return config


def _empty_model(config: Any, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    extra = {} if attention is None else {"attn_implementation": attention}
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **extra)
    except Exception as error:
        if not is_the_models(error):
            raise
        raise ModelError(
            f"no causal language model can be built from the config (model_type {config.model_type!r}): "
            f"{first_line(error)}",
            fix="check config.json; lopt-lite trains decoder-only language models that transformers knows",
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{type(model).__name__} has an encoder", expected="a decoder-only language model")
    # BERT and its kin can be built as causal models, and then still look at the tokens that they are to predict.
    if getattr(config, "is_decoder", True) is False and not any(
        getattr(m, "is_causal", False) for m in model.modules()
    ):
        raise ModelError(
            f"{type(model).__name__} is an encoder here (is_decoder is false in its config)",
            expected="a decoder-only language model",
            fix="bring a decoder; set is_decoder to true in config.json only if the model was trained as one",
        )
    return model.eval()


def _find_layers(model: nn.Module, config: Any) -> tuple[str, nn.ModuleList]:
    """The outermost ModuleList with as many entries as the config has hidden layers."""
    count = getattr(config, "num_hidden_layers", None)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found or not count:
        raise ModelError(
            f"{type(model).__name__} has no list of {count} layers, so it cannot be cut into blocks",
            fix="check num_hidden_layers in config.json",
        )
    return min(found, key=lambda item: item[0].count("."))


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a matrix product and nothing else, so that a 4-bit one or an adapter can take its place.

    Of classes that are made of ``nn.Linear``, Falcon's is, while the routers of Llama 4 and PhiMoE choose experts too.
    """
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear)
    try:
        output = module(torch.empty(1, module.in_features, device="meta", dtype=module.weight.dtype))
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        return False  # it needs more than its input's shape
    return isinstance(output, torch.Tensor) and tuple(output.shape) == (1, module.out_features)


def _say_device(model: PreTrainedModel, device: torch.device) -> None:
    """Make ``model.device`` this one. transformers asks its first parameter, which is nowhere until it is needed."""
    kind = type(model)
    model.__class__ = type(kind.__name__, (kind,), {"device": property(lambda _: device)})


def _set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def _split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[LayerCall, Any]:
    """Separate the hidden state from a layer's other arguments."""
    if args:
        return LayerCall(args[1:], dict(kwargs), None), args[0]
    rest = dict(kwargs)
    hidden = rest.pop("hidden_states", None)
    return LayerCall((), rest, "hidden_states"), hidden
