"""One forward pass of a model, and the parametric calls that were made in it.

Nothing is attached to the model: a `TorchFunctionMode` around the forward sees every ``F.linear``, ``F.conv2d``, … with
the very weight it used, so functional calls, reused, tied and parametrised weights are seen as they are.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradpen import _checks, _graph
from gradpen._attributes import attributes_kept


class Call(NamedTuple):
    """One call of a layer function: output = op(input, weight, bias, **options)."""

    op: str
    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    options: dict[str, Any]
    output: (
        Any  # where ∂f/∂output arrives: a GradientEdge (a tensor may be changed in place later), or a copy (`traced`)
    )
    output_shape: torch.Size
    input_version: int | None  # None: `input` is a copy that nobody else has

    def checked_input(self) -> Tensor:
        """The input as the layer saw it; an in-place change since then is an error, as it is in autograd."""
        if self.input_version is not None and self.input._version != self.input_version:
            raise RuntimeError(
                f"the input of a {self.op} call, of shape {tuple(self.input.shape)}, was changed in place after the "
                "layer had used it; its value is needed for the gradient of the weight. Replace the in-place "
                "operation (`x += …`) by an ordinary one (`x = x + …`)"
            )
        return self.input


@dataclass
class Recording:
    """What one forward pass left behind.

    Attributes:
        output: what the model returned.
        inputs: the floating-point input tensors that the model was fed, in order; they require grad if asked to.
        calls: the parametric calls in the order in which they were made.
        gate: to be closed when all gradients with respect to the inputs have been taken.
        is_hooked: somebody waits for gradients within the model, or for what its graph saves.
    """

    output: Any
    inputs: list[Tensor]
    calls: list[Call] = field(default_factory=list)
    gate: InputGate = field(default_factory=lambda: InputGate([]))
    is_hooked: bool = False


def record_forward(model: nn.Module, x: Any, *, input_grad: bool, calls: bool) -> Recording:
    """Run ``model(x)`` once.

    Args:
        model: any module.
        x: a tensor, a tuple (passed as ``model(*x)``) or a dict (``model(**x)``).
        input_grad: make the floating-point inputs require grad (on detached aliases unless they do already).
        calls: record the parametric calls.

    Raises:
        TypeError: if `input_grad` and no input is a floating-point tensor.
        RuntimeError: if `input_grad` and the model changes its input in place.
    """
    fed = requiring_grad_apart(x) if input_grad else x
    inputs = float_tensors(fed)
    if input_grad and not inputs:
        way = "convert it (x.float()), or penalise an embedding instead of integer indices"
        if any(tensor.is_complex() for tensor in tensors_of(x)):
            way = "give torch.view_as_real(x) to a model that puts it together again (torch.view_as_complex)"
        raise TypeError(
            "expected at least one floating-point input tensor to differentiate with respect to, got "
            f"{_describe(x)}: {way}"
        )
    if not (calls or input_grad):
        return Recording(call_model(model, fed), inputs)
    # torch would compile modules piece by piece under a mode
    if not calls and any(map(_checks.is_compiled, model.modules())):
        with in_place_explained(inputs if input_grad else []):
            return Recording(call_model(model, fed), inputs)
    given = {id(tensor) for tensor in float_tensors(x)}
    gate = InputGate([tensor for tensor in inputs if input_grad and tensor.is_leaf and id(tensor) not in given])
    with CallRecorder(gate) as recorder, in_place_explained(inputs if input_grad else []):
        output = call_model(model, fed)
    return Recording(output, inputs, recorder.calls, gate, recorder.is_hooked or saved_tensors_are_hooked())


@contextlib.contextmanager
def in_place_explained(inputs: Sequence[Tensor], who: str = "the model") -> Iterator[None]:
    """What PyTorch says of "leaf variables" means the input, which the user may never have asked to require grad.

    Of inputs that are no leaves it says nothing, and differentiates with respect to what they have become.
    """
    refusal = (
        f"{who} changes its input in place (`x += …`, or nn.ReLU(inplace=True) as its first layer), so that the "
        "values are lost at which its gradient is wanted: replace the operation by an ordinary one (`x = x + …`)"
    )
    versions = [tensor._version for tensor in inputs]
    try:
        yield
    except RuntimeError as error:
        if not (inputs and "leaf Variable that requires grad" in str(error) and "in-place" in str(error)):
            raise
        raise RuntimeError(refusal) from error
    if versions != [tensor._version for tensor in inputs]:
        raise RuntimeError(refusal)


def call_model(model: Callable[..., Any], x: Any) -> Any:
    """``model(x)``, ``model(*x)`` for a tuple or list, ``model(**x)`` for a mapping."""
    if isinstance(x, Tensor):  # found at once; to look for the others takes as long as a small kernel
        return model(x)
    if isinstance(x, Mapping):
        return model(**x)
    if isinstance(x, (tuple, list)):
        return model(*x)
    return model(x)


def map_leaves(x: Any, function: Callable[[Any], Any]) -> Any:
    """Apply `function` to every leaf of an input (dicts, tuples, named or not, and lists are taken apart)."""
    if isinstance(x, Mapping):
        return {key: map_leaves(value, function) for key, value in x.items()}
    if isinstance(x, (tuple, list)):
        values = [map_leaves(value, function) for value in x]
        if isinstance(x, list):
            return values
        make: Any = getattr(type(x), "_make", tuple)  # that of named tuples, which may have other constructors
        return make(values)
    return function(x)


def map_tensors(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply `function` to every tensor of an input, leave the rest as it is."""
    if isinstance(x, Tensor):
        return function(x)
    return map_leaves(x, lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf)


def map_floats(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply `function` to every floating-point tensor of an input."""
    return map_tensors(x, lambda tensor: function(tensor) if tensor.is_floating_point() else tensor)


def tensors_of(x: Any) -> list[Tensor]:
    """The tensors of an input, in the order in which `map_tensors` visits them."""
    return [leaf for leaf in _leaves(x) if isinstance(leaf, Tensor)]


def _leaves(x: Any) -> Iterator[Any]:
    if isinstance(x, (Mapping, tuple, list)):
        for value in x.values() if isinstance(x, Mapping) else x:
            yield from _leaves(value)
    else:
        yield x


def float_tensors(x: Any) -> list[Tensor]:
    """The floating-point tensors of an input, in the order in which `map_floats` visits them."""
    return [tensor for tensor in tensors_of(x) if tensor.is_floating_point()]


def copied_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Name → a copy of the buffer as it is now."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def call_with(
    model: nn.Module,
    replaced: Mapping[str, Tensor],
    x: Any,
    buffers: Mapping[str, Tensor] | None = None,
    then: Callable[[Any], Any] | None = None,
) -> Any:
    """``model(x)`` with other tensors in place of the named parameters, and copies in place of the buffers.

    A second forward pass must not be counted twice in running statistics, and what it leaves in attributes of modules is
    not what their owner expects to find there. To repeat a pass that updates what it depends on (the power iteration of
    spectral_norm) it has to start from the buffers of then: `buffers`, instead of those of now.

    Args:
        model: any module.
        replaced: name → tensor.
        x: a tensor, a tuple or a dict.
        buffers: name → buffer.
        then: done to the output while everything is still in place: checkpoints look for the tensors again in a backward
            pass, and criteria for attributes that the model has left.
    """
    copies = copied_buffers(model) if buffers is None else {name: buffer.clone() for name, buffer in buffers.items()}
    tensors = _at_all_places(model, copies | dict(replaced))
    kept = contextlib.nullcontext() if torch.compiler.is_compiling() else _attributes_of_second_pass(model)
    with kept:
        whole = model
        if then is not None or not torch.compiler.is_compiling():
            whole, tensors = _AndThen(model, then), {f"model.{name}": tensor for name, tensor in tensors.items()}
        if not tensors:
            return call_model(whole, x)
        if isinstance(x, Mapping):
            return torch.func.functional_call(whole, tensors, (), dict(x), tie_weights=False)
        args = tuple(x) if isinstance(x, (tuple, list)) else (x,)
        return torch.func.functional_call(whole, tensors, args, tie_weights=False)


@contextlib.contextmanager
def _attributes_of_second_pass(model: nn.Module) -> Iterator[None]:
    """`attributes_kept`; the first pass has shortened rows of Embedding(max_norm=…), and displaced ones stay as they are."""
    with attributes_kept(list(model.modules())):
        for module in model.modules():
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                module.max_norm = None
        yield


class _AndThen(nn.Module):
    """A model, and something done to its output, if anything."""

    def __init__(self, model: nn.Module, then: Callable[[Any], Any] | None) -> None:
        super().__init__()
        self.model = model
        self.then = then

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _graph.compiled_for_several_passes():
            output = self.model(*args, **kwargs)
        if not torch.compiler.is_compiling() and any(map(_checks.is_compiled, self.model.modules())):
            for tensor in float_tensors(output):
                _graph.runs_only_once(tensor)  # for a later loss.backward(retain_graph=True)
        return output if self.then is None else self.then(output)


def _at_all_places(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names of all places at which the parameters or buffers are found that they replace.

    Every place has one name, also in a module that has several: `torch.func.functional_call` visits every name that it
    finds for a tied tensor, and after the second visit of a place it puts back what the first one had put there.
    """
    places = names_of_tensors(model, modules_once=True)
    found = dict(tensors)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in tensors:
            found |= dict.fromkeys(places.get(id(tensor), ()), tensors[name])
    return found


def names_of_tensors(model: nn.Module, *, modules_once: bool = False) -> dict[int, list[str]]:
    """id of a parameter or buffer → all its names: tied ones have several, as have those of modules that do.

    Args:
        model: any module.
        modules_once: by the first name of a module alone.
    """
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=modules_once):
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    names.setdefault(id(tensor), []).append(f"{prefix}.{name}" if prefix else name)
    return names


class RngState(NamedTuple):
    """The state of the generators, so that a second forward pass draws the same dropout masks and skips the same layers."""

    cpu: Tensor
    cuda: list[Tensor]
    numpy: Any = None  # None: not read
    python: Any = None

    @classmethod
    def capture(cls, *, torch_alone: bool = False) -> RngState:
        """Read the state as it is now: torch's generators, and those of NumPy and Python."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        others = () if torch_alone else (np.random.get_state(), random.getstate())
        return cls(torch.get_rng_state(), cuda, *others)

    def others_moved(self) -> bool:
        """Whether numbers of NumPy's or Python's stream, if these were read, have been drawn since."""
        if self.python is None:
            return False
        kind, keys, *rest = np.random.get_state()
        before_kind, before_keys, *before_rest = self.numpy
        same = (kind, rest) == (before_kind, before_rest) and np.array_equal(keys, before_keys)
        return not same or random.getstate() != self.python

    def restore(self) -> None:
        """Put the generators back."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        if self.python is not None:
            np.random.set_state(self.numpy)
            random.setstate(self.python)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw the same random numbers again inside the block; afterwards the streams stand where they stood."""
        now = RngState.capture(torch_alone=self.python is None)
        self.restore()
        try:
            yield
        finally:
            now.restore()


class InputGate:
    """Whether gradients still flow back into input aliases that only gradpen knows of.

    They are needed for ∇_x f. The backward pass of the loss would compute them too, for nobody: one product with the
    first layer's weight, a third of the step of a wide MLP.
    """

    def __init__(self, aliases: list[Tensor]) -> None:
        self._aliases = {id(alias) for alias in aliases}
        self.closed = False
        self.inputs_only = False

    @contextlib.contextmanager
    def towards_inputs(self) -> Iterator[None]:
        """Within the block a backward pass wants gradients of inputs and outputs of layers, not of parameters."""
        self.inputs_only = True
        try:
            yield
        finally:
            self.inputs_only = False

    def admits(self, tensor: Tensor) -> bool:
        """Whether `tensor` is one of the aliases or a view of one, so that nothing but x lies behind it."""
        if not (self._aliases and _graph.EDGES_KEEP_PYTHON_NODES):
            return False
        if torch.is_autocast_enabled(tensor.device.type):  # autocast would cast inside F.linear
            return False
        if torch._C._functorch.peek_interpreter_stack() is not None:  # torch.vmap within the model
            return False
        if (
            saved_tensors_are_hooked()
        ):  # a checkpoint runs F.linear again in the backward pass and compares what is saved
            return False
        return self._is_alias(tensor)

    def without_aliases(self, call: Call) -> Call:
        """The call with an input that nothing is differentiated by, if that is an alias: ∂‖h‖²/∂x is wanted by nobody."""
        if not (self._aliases and call.input.requires_grad and self._is_alias(call.input)):
            return call
        return call._replace(input=call.input.detach())

    def _is_alias(self, tensor: Tensor) -> bool:
        """Whether `tensor` is one of the aliases or a view of one."""
        node = tensor.grad_fn
        while node is not None and type(node).__name__ in _graph.VIEW_NODES:
            node = node.next_functions[0][0]
        leaf = tensor if tensor.is_leaf else getattr(node, "variable", None)
        return id(leaf) in self._aliases


def saved_tensors_are_hooked() -> bool:
    """Whether saved tensors go through hooks (checkpoints, offloading); torch before 2.8 cannot tell, so they may."""
    if torch.compiler.is_dynamo_compiling():  # it does not trace the question
        return True
    top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top_hooks is None or top_hooks(False) is not None


class _EntryLinear(torch.autograd.Function):
    """F.linear on an input alias: the same products, but none towards the input once the gate is closed."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, gate: InputGate) -> Tensor:
        ctx.save_for_backward(h, weight)
        ctx.gate = gate
        ctx.of_leaves = weight.is_leaf and (bias is None or bias.is_leaf)  # others may be made of x, or by other layers
        return F.linear(h, weight, bias)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        h, weight = ctx.saved_tensors
        to_input, to_weight, to_bias = ctx.needs_input_grad[:3]
        gate = ctx.gate
        skips_parameters = gate.inputs_only and ctx.of_leaves
        return (
            delta @ weight if to_input and not gate.closed else None,
            delta.t() @ h if to_weight and not skips_parameters else None,
            delta.sum(0) if to_bias and not skips_parameters else None,
            None,
        )


class CallRecorder(TorchFunctionMode):
    """Within its block, keeps the calls of the layer functions whose outputs carry gradients."""

    def __init__(self, gate: InputGate | None = None) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.is_hooked = False
        self._gate = gate or InputGate([])

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        read_arguments = LAYER_FUNCTIONS.get(func)
        if read_arguments is None:
            self.is_hooked |= func in _HOOKING
            return func(*args, **(kwargs or {}))
        op, input, weight, bias, options = read_arguments(*args, **(kwargs or {}))
        if any(map(_changes_functions, (weight, bias))):
            op = ""
        if op == "linear" and input.dim() == 2 and weight is not None and self._gate.admits(input):
            output = _EntryLinear.apply(input, weight, bias, self._gate)
        else:
            output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.requires_grad:
            edge = _graph.edge_of(output)
            self.calls.append(Call(op, input, weight, bias, options, edge, output.shape, input._version))
        return output


def _changes_functions(tensor: Tensor | None) -> bool:
    """Whether a tensor's type decides what torch's functions do with it: quantise it first, say."""
    if tensor is None or type(tensor) in (Tensor, nn.Parameter):
        return False
    own = getattr(type(tensor).__torch_function__, "__func__", None)  # None: that of parameters, which does nothing
    return own not in (None, getattr(Tensor.__torch_function__, "__func__"))


_HOOKING = (Tensor.register_hook, Tensor.retain_grad)
_Arguments = tuple[str, Tensor, Tensor | None, Tensor | None, dict[str, Any]]


# An op "" is one whose parameters have no closed form, and that is no dense layer.


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Arguments:
    # F.linear takes a vector as weight, and a bias that it broadcasts over the outputs
    dense = weight.dim() == 2 and (bias is None or bias.shape == weight.shape[:1])
    return "linear" if dense else "", input, weight, bias, {}


def _conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> _Arguments:
    return "conv", input, weight, bias, dict(stride=stride, padding=padding, dilation=dilation, groups=groups)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> _Arguments:
    # gradients scaled by frequency in the batch are no sum over samples
    op = "" if scale_grad_by_freq else "embedding"
    return op, input, weight, None, dict(padding_idx=padding_idx)


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> _Arguments:
    return "layer_norm", input, weight, bias, dict(normalized_shape=tuple(normalized_shape), eps=eps)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> _Arguments:
    return "group_norm", input, weight, bias, dict(num_groups=num_groups, eps=eps)


LAYER_FUNCTIONS: dict[Callable[..., Any], Callable[..., _Arguments]] = {
    F.linear: _linear,
    F.conv1d: _conv,
    F.conv2d: _conv,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
}


def requiring_grad(tensor: Tensor) -> Tensor:
    """The tensor itself if it requires grad, else an alias that does."""
    if tensor.requires_grad:
        return tensor
    return (tensor.clone() if tensor.is_inference() else tensor.detach()).requires_grad_()


def requiring_grad_apart(x: Any) -> Any:
    """An input whose floating-point tensors require grad, and are neither one tensor nor functions of each other."""
    several = sum(tensor.requires_grad for tensor in float_tensors(x)) > 1
    return map_floats(x, lambda t: t.view_as(t) if several and t.requires_grad else requiring_grad(t))


def _describe(x: Any) -> str:
    found = [str(tensor.dtype) for tensor in tensors_of(x)]
    return f"input of dtype {', '.join(found)}" if found else type(x).__name__
