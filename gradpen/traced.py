"""Squared gradient norms within `torch.compile`: what eager mode finds out about the model, and arithmetic alone.

In eager mode gradpen walks the autograd graph, tries out which rows belong to one sample, and reads the generators' state.
None of that can be part of a compiled graph, and none of it has to be: it depends on the model, its code and the shapes, for
which `torch.compile` has guards. Once per compilation `_known` looks at the real model with the real batch in eager mode,
and its answer is a constant of the graph. What is traced is one forward pass, `torch.autograd.grad` and the closed forms.

Importing this file imports `torch._dynamo`, so it is done when a compilation needs it.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import gc
import itertools
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.variables.base import VariableTracker
from torch._guards import TracingContext
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

from gradpen import (
    _checks,
    _graph,
    chain_terms,
    evaluation,
    finite_difference,
    gradients,
    mixing,
    param_norms,
    recording,
    traced_chain,
)
from gradpen.criteria import Criterion, scalar_per_sample
from gradpen.evaluation import Evaluation
from gradpen.isolation import state_kept
from gradpen.recording import Call, Recording, RngState, call_model, call_with, float_tensors, tensors_of
from gradpen.terms import GroupNorms, InputTerm, ParamTerm, Term, select_parameters

# put into the graph as they are: Dynamo refuses `torch.autograd.grad` and `requires_grad_`, the compiler behind it does not
torch.compiler.allow_in_graph(_graph.differentiate)
torch.compiler.allow_in_graph(_graph.differentiate_rows)
torch.compiler.allow_in_graph(recording.requiring_grad)

# These versions skip guards that would tell that a parameter has been frozen; later ones do not.
if "2.9" <= torch.__version__ < "2.12":
    torch._dynamo.config.use_recursive_dict_tags_for_guards = False

CallSignature = tuple[str, tuple[int, ...] | None]
Uses = tuple[tuple[str, tuple[tuple[int, str], ...]], ...]  # name → the calls that use it
Plan = tuple[Uses, tuple[str, ...]]
NO_PLAN: Plan = ((), ())


class Known(NamedTuple):
    """What eager mode found out. Nothing but numbers and strings, so that it can be a constant of the graph."""

    scalars: tuple[int, ...]  # for every term, the number of its f: terms of one f share a backward pass
    parameters: tuple[tuple[str, ...], ...]  # for every term, the names of the parameters that count
    plans: tuple[Plan, ...]  # for every term, what `param_norms.ParameterPlan` holds
    calls: tuple[CallSignature, ...]  # the layer calls of the forward pass, to be met again in the traced one
    attributes: tuple[tuple[str, str], ...]  # (module, attribute) that a forward pass sets
    chain: tuple[Any, ...]  # a `traced_chain.ChainPlan`, if the model is a chain with formulas for all terms; else ()
    leaves: tuple[str, ...]  # the parameters of the chain
    are_all: bool  # whether the data loss depends on nothing else that could be differentiated by
    entry: int  # which of the calls is the first layer of the chain
    are_squared: tuple[bool, ...]  # for every term, whether the chain gives squared norms


def evaluate_terms(
    model: nn.Module,
    x: Any,
    y: Any,
    terms: Sequence[tuple[Term, Criterion]],
    *,
    means: Sequence[bool] = (),
    data: Criterion | None = None,
    create_graph: bool = True,
) -> Evaluation:
    """`evaluation.evaluate_terms` for the tracer of `torch.compile`.

    Raises:
        RuntimeError: as `evaluation.evaluate_terms`, and for what only eager mode can do: batches whose layout has to be
            verified every time, random numbers that a second forward pass draws again, a loop over the samples.
    """
    if not terms:
        return Evaluation(call_model(model, x), [])
    trace = _number_of_trace()
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        id(parameter)  # a guard: the plans do not hold any more if weights are tied later
    _spare_inputs()
    tensors: list[Tensor] = []
    layouts = _pack(x, tensors), _pack(y, tensors)
    known = Known(
        *_known(
            id(model),
            tuple(id(term) for term, _ in terms),
            tuple(id(criterion) for _, criterion in terms),
            None if data is None else id(data),
            tuple([bool(mean) for mean in means]),
            bool(create_graph),
            layouts,
            *tensors,
        )
    )
    forward = _record(
        model,
        x,
        input_grad=any(isinstance(term, InputTerm) for term, _ in terms),
        calls=bool(known.chain) or any(evaluation.needs_deltas(term) for term, _ in terms),
    )
    _check_one_trace(trace)
    _check_same_calls(forward, known, parameters)
    if known.chain:
        return _evaluate_chain(forward, y, terms, data, known, parameters, trace, create_graph=create_graph)
    found: dict[int, tuple[Tensor, gradients.SampleGradients]] = {}
    norms = []
    for index, (term, criterion) in enumerate(terms):
        number = known.scalars[index]
        if number not in found:
            sharing = [other for (other, _), scalar in zip(terms, known.scalars, strict=True) if scalar == number]
            found[number] = _scalar_gradients(forward, _scalar(term, criterion, y), sharing, trace)
        f, rows = found[number]
        chosen = {name: parameters[name] for name in known.parameters[index]}
        replay = functools.partial(_attributes_kept, model, known.attributes)
        norms.append(_group_norms(model, x, y, forward, term, criterion, f, rows, chosen, known.plans[index], replay))
        if not create_graph:  # so that nothing is compiled for derivatives that nobody wants
            norms[-1].values = norms[-1].values.detach()
    _check_one_trace(trace)
    return Evaluation(forward.output, norms)


def _evaluate_chain(
    forward: Recording,
    y: Any,
    terms: Sequence[tuple[Term, Criterion]],
    data: Criterion | None,
    known: Known,
    parameters: Mapping[str, Tensor],
    trace: int,
    *,
    create_graph: bool,
) -> Evaluation:
    """By formulas. Model and criteria are traced for the sake of the guards; what they compute, the compiler removes."""
    leaves = [parameters[name] for name in known.leaves]
    entry = forward.calls[known.entry].input.detach()
    output, *found = traced_chain.evaluate(known.chain, entry, y, *leaves)
    values = found[: len(known.are_squared)]  # the data loss may follow
    for criterion in [criterion for term, criterion in terms if term.method != "projection"]:
        criterion.per_sample(forward.output, y)
    if data is not None and len(found) > len(terms):  # else the objective calls it, and once is enough
        data.per_sample(forward.output, y)
    _check_one_trace(trace)
    norms = [
        GroupNorms(value if create_graph else value.detach(), are_squared=squared)
        for value, squared in zip(values, known.are_squared, strict=True)
    ]
    known_leaves = [leaf for leaf in leaves if leaf.requires_grad] if known.are_all else []
    return Evaluation(output, norms, found[-1] if len(found) > len(norms) else None, known_leaves)


def is_backward_pass_free() -> bool:
    """Whether nobody has plans for the backward pass: a graph around this one, whoever looks for NaN, compiled autograd."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_anomaly_enabled()
        or torch._dynamo.config.compiled_autograd
        or compiled_autograd.compiled_autograd_enabled
    )


def gradients_at_once(loss: Tensor, leaves: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """∂loss/∂leaf in the graph that computes the loss, and the leaves that there is one for."""
    found = [
        (grad, leaf) for grad, leaf in zip(_graph.differentiate(loss, leaves), leaves, strict=True) if grad is not None
    ]
    return [grad for grad, _ in found], [leaf for _, leaf in found]


def advance(penalty: Any, training: bool) -> float | None:
    """`GradPenalty.advance` with a step counter that the graph takes as a variable.

    An int in a module, or in anything that a global variable leads to, is a constant to `torch.compile`: every step would be
    another graph.

    Raises:
        RuntimeError: if this torch cannot be told so.
    """
    if not _COMPILES_PENALTIES:
        _refuse(_TOO_OLD)
    _take_for_variables(_COUNTERS, True)
    try:
        is_left_out = training and penalty.num_calls % penalty.every_n_steps != 0
        # a number that is looked at and not computed with would be a constant of the graph, and of those compiled later
        factor = None if is_left_out and _has_number_for_weight(id(penalty)) else penalty.factor_now(training)
        if training:
            penalty.num_calls += 1
    finally:
        _take_for_variables(_COUNTERS, False)
    return factor


@torch.compiler.assume_constant_result
def _has_number_for_weight(penalty_id: int) -> bool:
    return not callable(_alive({penalty_id})[penalty_id].weight)


def check_version() -> None:
    """Penalties can be compiled.

    Raises:
        RuntimeError: if this torch cannot compile them.
    """
    if not _COMPILES_PENALTIES:
        raise RuntimeError(_TOO_OLD)


_COMPILES_PENALTIES = torch.__version__ >= "2.8"  # torch compares versions, not strings
_TOO_OLD = (
    f"gradient penalties can be compiled from torch 2.8 on, got {torch.__version__}: call the objective without "
    "torch.compile or compiled()"
)
_COUNTERS = r".*\.num_calls"


@torch.compiler.assume_constant_result
def _take_for_variables(sources: str, whether: bool) -> None:
    """From here on, while tracing, let ints whose source matches a pattern be variables of the graph, or no longer so."""
    others = [pattern for pattern in torch.compiler.config.dynamic_sources.split(",") if pattern not in ("", sources)]
    torch.compiler.config.dynamic_sources = ",".join([*others, sources] if whether else others)


def _scalar(term: Term, criterion: Criterion, target: Any) -> Callable[[Any], Tensor]:
    """The model's output → f, (B,)."""
    if isinstance(term, InputTerm) and callable(term.of):
        of = term.of
        return lambda output: scalar_per_sample(of, output, target)
    return lambda output: criterion.per_sample(output, target)


def _scalar_gradients(
    forward: Recording, scalar: Callable[[Any], Tensor], sharing: Sequence[Term], trace: int
) -> tuple[Tensor, gradients.SampleGradients]:
    """f, and its gradients as far as the terms that share it need them."""
    if all(isinstance(term, InputTerm) and term.of == "output" for term in sharing):
        return torch.zeros(()), gradients.SampleGradients([], {})
    f = scalar(forward.output)
    _check_one_trace(trace)
    inputs = any(isinstance(term, InputTerm) and term.of != "output" and term.method == "exact" for term in sharing)
    deltas = any(evaluation.needs_deltas(term) for term in sharing)
    if not (inputs or deltas):
        return f, gradients.SampleGradients([], {})
    return f, gradients.sample_gradients(f.sum(), forward, inputs=inputs, deltas=deltas)


def _group_norms(
    model: nn.Module,
    x: Any,
    y: Any,
    forward: Recording,
    term: Term,
    criterion: Criterion,
    f: Tensor,
    rows: gradients.SampleGradients,
    parameters: Mapping[str, Tensor],
    plan: Plan,
    replay: finite_difference.Replay,
) -> GroupNorms:
    if isinstance(term, InputTerm):
        sq_norms = _input_sq_norms(model, x, y, forward, term, criterion, f, rows, replay)
        return GroupNorms(sq_norms)
    batch_size = f.shape[0]
    group_size = term.group_size(batch_size)
    if term.method == "finite_difference":
        norm = _displaced_param_norm(model, x, term, _scalar(term, criterion, y), f, parameters, replay)
        return GroupNorms(norm.reshape(1), are_squared=False)
    if term.over == "batch":
        sq_norms = param_norms.batch_param_sq_norm(f, list(parameters.values()))
    else:
        uses, mapped = plan
        closed = param_norms.ParameterPlan({name: list(calls) for name, calls in uses}, [])
        sq_norms = param_norms.closed_param_sq_norm(forward, rows, closed, batch_size, group_size, f.device)
        if mapped:
            chosen = {name: parameters[name] for name in mapped}
            scalar = _scalar(term, criterion, y)
            found = param_norms.run_mapped(model, x, scalar, chosen, batch_size, group_size, replay)
            sq_norms = sq_norms + found.sq_norm()
    return GroupNorms(sq_norms, term.group_sizes(batch_size, f))


def _input_sq_norms(
    model: nn.Module,
    x: Any,
    y: Any,
    forward: Recording,
    term: InputTerm,
    criterion: Criterion,
    f: Tensor,
    rows: gradients.SampleGradients,
    replay: finite_difference.Replay,
) -> Tensor:
    if term.of == "output":
        if term.method == "exact":
            return gradients.jacobian_sq_norm(forward.output, forward)
        return gradients.projected_jacobian_sq_norm(forward.output, forward, term.num_projections, term.generator)
    if term.method == "exact":
        return gradients.input_sq_norm(rows.inputs)
    return finite_difference.input_norm(
        model,
        x,
        f,
        _scalar(term, criterion, y),
        forward.inputs,
        scheme=term.scheme,
        step=term.step,
        replay=replay,
    ).square()


def _displaced_param_norm(
    model: nn.Module,
    x: Any,
    term: ParamTerm,
    scalar: Callable[[Any], Tensor],
    f: Tensor,
    parameters: Mapping[str, Tensor],
    replay: finite_difference.Replay = contextlib.nullcontext,
) -> Tensor:
    """‖∇_θ mean_i f_i‖ with a gradient from first derivatives: 0-dim. The model is known to draw no random numbers."""
    loss = f.mean()
    found = zip(parameters, _graph.differentiate(loss, list(parameters.values())), strict=True)
    gradients = {name: gradient for name, gradient in found if gradient is not None}
    return finite_difference.param_norm(
        model,
        x,
        loss,
        gradients,
        scalar,
        parameters,
        scheme=term.scheme,
        step=term.step,
        replay=replay,
    )


@contextlib.contextmanager
def _attributes_kept(model: nn.Module, attributes: Sequence[tuple[str, str]]) -> Iterator[None]:
    """What a second forward pass leaves in these attributes is not what the data loss, or their owner, expects there."""
    modules = [(model.get_submodule(path), name) for path, name in attributes]
    kept = [(module, name, hasattr(module, name), getattr(module, name, None)) for module, name in modules]
    yield
    for module, name, was_there, value in kept:
        if was_there:
            setattr(module, name, value)
        else:
            delattr(module, name)


# ---- the traced forward pass ----------------------------------------------------------------------------------------


class _Recorder(TorchFunctionMode):
    """`CallRecorder` in operations that can be traced.

    Where that one notes places in the autograd graph and versions of tensors, this one keeps copies, so that an in-place
    change is of no consequence. The compiler removes those that are not needed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in recording.LAYER_FUNCTIONS:
            return func(*args, **(kwargs or {}))
        op, input, weight, bias, options = recording.LAYER_FUNCTIONS[func](*args, **(kwargs or {}))
        before = input.clone()
        output = func(*args, **(kwargs or {}))
        if not output.requires_grad:
            return output
        self.calls.append(Call(op, before, weight, bias, options, output, output.shape, None))
        return output.clone()


def _record(model: nn.Module, x: Any, *, input_grad: bool, calls: bool) -> Recording:
    fed = recording.requiring_grad_apart(x) if input_grad else x
    if not calls:
        return Recording(call_model(model, fed), float_tensors(fed))
    recorder = _Recorder()
    with recorder:
        output = call_model(model, fed)
    return Recording(output, float_tensors(fed), recorder.calls)


def _check_same_calls(forward: Recording, known: Known, parameters: Mapping[str, Tensor]) -> None:
    """The plan was made for the calls of an eager forward pass: the traced one has to consist of the same."""
    same = len(forward.calls) == len(known.calls)
    if same:
        for call, (op, shape) in zip(forward.calls, known.calls, strict=True):
            same = same and call.op == op and _weight_shape(call) == shape
        for uses, _ in known.plans:
            for name, places in uses:
                for index, role in places:
                    call = forward.calls[index]
                    same = same and (call.weight if role == "weight" else call.bias) is parameters[name]
    if not same:
        _refuse(
            "expected the model to call the same layers while torch.compile traces it as it does in eager mode, but it does "
            "not, so which parameters have a closed form is not known: does it ask torch.compiler.is_compiling()? Call the "
            "objective without torch.compile"
        )


def _weight_shape(call: Call) -> tuple[int, ...] | None:
    return None if call.weight is None else tuple(call.weight.shape)


@torch.compiler.assume_constant_result
def _number_of_trace() -> int:
    """One for every graph that is being traced; 0 where none is."""
    context = TracingContext.try_get()
    return 0 if context is None else _traces.setdefault(context, next(_trace_numbers))


_traces: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_trace_numbers = itertools.count(1)


def _check_one_trace(trace: int) -> None:
    """Without ``fullgraph=True`` a graph may end within the model, and to the next one its activations are constants."""
    if trace == 0 or _number_of_trace() != trace:
        _refuse(
            "expected the model and the criterion within one graph of torch.compile, but the graph breaks within them "
            "(where Python branches on the value of a tensor, say), and no gradient leads from one graph to the other: "
            "torch.compile(…, fullgraph=True) says where. Call the objective without torch.compile"
        )


@torch.compiler.assume_constant_result
def _spare_inputs() -> None:
    """Have what was computed within the compiled function before it came here be computed from copies.

    For `_known` the compiler runs those operations on the real tensors, and if one is in place, runs it again later.
    """
    output = InstructionTranslator.current_tx().output
    for node in output.graph.find_nodes(op="placeholder"):
        example = node.meta.get("example_value")
        if isinstance(example, Tensor) and example._version > 0 and "grapharg" in node.meta:
            output.real_value_cache.setdefault(node, _copied(node.meta["grapharg"].example))


def _copied(tensor: Tensor) -> Tensor:
    """With the graph behind it, if there is one."""
    if tensor.requires_grad and not tensor.is_leaf:
        return tensor.clone()
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def renew_criteria(owner: nn.Module) -> None:
    """Have criteria be taken apart again that are others by now: what does that cannot be traced."""
    _renew_criteria(id(owner))


@torch.compiler.assume_constant_result
def _renew_criteria(owner_id: int) -> None:
    for module in _alive({owner_id})[owner_id].modules():
        if hasattr(module, "_criterion"):
            criterion = module._criterion = module.renewed_criterion()
            if isinstance(criterion.source, nn.Module) and criterion.reduction is not None:
                # what is traced sets it and puts it back, and a guard says that there was none if it is one of the class
                vars(getattr(criterion.source, "_orig_mod", criterion.source)).setdefault(
                    "reduction", criterion.reduction
                )


@torch.compiler.assume_constant_result
def _refuse(message: str) -> None:
    """Raise while tracing: of what traced code raises, not every torch shows the message."""
    raise RuntimeError(message)


# ---- what eager mode knows ------------------------------------------------------------------------------------------


def _pack(x: Any, tensors: list[Tensor]) -> Any:
    """The structure of an input as a constant; its tensors are appended to `tensors`."""
    if isinstance(x, Tensor):
        tensors.append(x)
        return ("tensor", len(tensors) - 1)
    if isinstance(x, (int, float)) and not isinstance(x, (bool, enum.Enum)):  # to the compiler perhaps a variable
        tensors.append(torch.tensor(x, dtype=torch.int64 if isinstance(x, int) else torch.float64))
        return ("number", len(tensors) - 1)
    if isinstance(x, Mapping):
        return ("dict", tuple((key, _pack(value, tensors)) for key, value in x.items()))
    if isinstance(x, (tuple, list)):
        kind = type(x) if hasattr(x, "_fields") else "list" if isinstance(x, list) else "tuple"
        return (kind, tuple(_pack(value, tensors) for value in x))
    return ("constant", x)


def _unpack(layout: Any, tensors: Sequence[Tensor]) -> Any:
    kind, content = layout
    match kind:
        case "tensor":
            return tensors[content]
        case "number":
            return tensors[content].item()
        case "list":
            return [_unpack(value, tensors) for value in content]
        case "dict":
            return {key: _unpack(value, tensors) for key, value in content}
        case "tuple":
            return tuple(_unpack(value, tensors) for value in content)
        case "constant":
            return content
    return kind._make(_unpack(value, tensors) for value in content)  # a NamedTuple


@torch.compiler.assume_constant_result
def _known(
    model_id: int,
    term_ids: tuple[int, ...],
    criterion_ids: tuple[int, ...],
    data_id: int | None,
    means: tuple[bool, ...],
    create_graph: bool,
    layouts: tuple[Any, Any],
    *tensors: Tensor,
) -> tuple[Any, ...]:
    """Look at the model with the batch that is at hand; called in eager mode, once for every compilation.

    Modules cannot be arguments of a function whose result is a constant before torch 2.15, but their ids can.
    """
    objects = _alive({model_id, *term_ids, *criterion_ids, *(() if data_id is None else (data_id,))})
    model = cast(nn.Module, objects[model_id])
    terms = [cast(Term, objects[term_id]) for term_id in term_ids]
    criteria = [cast(Criterion, objects[criterion_id]) for criterion_id in criterion_ids]
    data = None if data_id is None else cast(Criterion, objects[data_id])
    copies = [_copied(tensor) for tensor in tensors]  # the model may change its input in place
    x, y = (_unpack(layout, copies) for layout in layouts)
    parameters = evaluation.check_call(model, terms)
    with state_kept(model):
        rng, versions, before = RngState.capture(), evaluation.versions_of(x), _attributes_of(model)
        requests = [
            evaluation.request_of(model, term, criterion, y, as_mean)
            for term, criterion, as_mean in zip(terms, criteria, means or [False] * len(terms), strict=True)
        ]
        once = data is not None and evaluation.one_backward_pass_does(requests, data, create_graph)
        has_formulas = chain_terms.have_formulas(requests, first_order=once)
        with_deltas = any(evaluation.needs_deltas(term) for term in terms)
        forward = recording.record_forward(
            model, x, input_grad=any(isinstance(term, InputTerm) for term in terms), calls=has_formulas or with_deltas
        )
        attributes = _changed(before, _attributes_of(model))
        drawn = not _same_state(rng, RngState.capture())
        if any(term.method == "finite_difference" for term in terms):
            evaluation.check_unchanged(x, versions)
        if any(term.method == "finite_difference" for term in terms) and not drawn:
            _check_repeats(model, x, forward.output)
        plans = tuple(
            _plan(model, x, y, forward, term, criterion, drawn) for term, criterion in zip(terms, criteria, strict=True)
        )
        chain = None
        if has_formulas and not forward.is_hooked and not any(tensor.requires_grad for tensor in tensors_of(x)):
            pairs = zip(requests, parameters, strict=True)
            requests = [request._replace(parameters=chosen) for request, chosen in pairs]
            chain = _chain_plan(model, forward, requests, data, y, create_graph=create_graph)
    numbers: dict[Any, int] = {}
    keys = [evaluation.scalar_key(term, criterion) for term, criterion in zip(terms, criteria, strict=True)]
    return tuple(
        Known(
            scalars=tuple(numbers.setdefault(key, len(numbers)) for key in keys),
            parameters=tuple(
                tuple(select_parameters(model, term.parameters)) if isinstance(term, ParamTerm) else ()
                for term in terms
            ),
            plans=plans if chain is None else ((chain.uses, ()),),
            calls=tuple((call.op, _weight_shape(call)) for call in forward.calls if chain is not None or with_deltas),
            attributes=attributes,
            chain=() if chain is None else tuple(chain),
            leaves=() if chain is None else tuple(chain.names),
            are_all=chain is not None and chain.reduction is not None,
            entry=0 if chain is None else chain.calls[0],
            are_squared=() if chain is None else chain.are_squared,
        )
    )


def _chain_plan(
    model: nn.Module,
    forward: Recording,
    requests: Sequence[chain_terms.Request],
    data: Criterion | None,
    target: Any,
    *,
    create_graph: bool,
) -> traced_chain.ChainPlan | None:
    """How to get all that is asked for by formulas, if the model is a chain and it can be had that way."""
    chain = chain_terms.chain_of(forward)
    if chain is None:
        return None
    return traced_chain.plan_of(chain, model, forward.calls, requests, data, target, create_graph=create_graph)


def _attributes_of(model: nn.Module) -> dict[tuple[str, str], Any]:
    """(module, attribute) → what is there, parameters, buffers and modules aside."""
    return {(path, name): value for path, module in model.named_modules() for name, value in vars(module).items()}


def _changed(
    before: Mapping[tuple[str, str], Any], after: Mapping[tuple[str, str], Any]
) -> tuple[tuple[str, str], ...]:
    return tuple(place for place, value in after.items() if place not in before or before[place] is not value)


def _alive(ids: set[int]) -> dict[int, Any]:
    """id → object."""
    found = {
        id(candidate): candidate
        for candidate in gc.get_objects()
        if id(candidate) in ids and not isinstance(candidate, VariableTracker)  # of what is built while it is traced
    }
    if len(found) < len(ids):
        raise RuntimeError(
            "within torch.compile, expected a model and penalties that were built before: build PenalizedLoss or the "
            "penalty outside the compiled function"
            + (", and call gc.unfreeze(), since gc.freeze() has hidden them" if gc.get_freeze_count() else "")
        )
    return found


def _same_state(before: RngState, after: RngState) -> bool:
    """Whether no random number was drawn in between."""
    if len(before.cuda) != len(after.cuda):  # the first use of the device
        return False
    return all(torch.equal(a, b) for a, b in zip((before.cpu, *before.cuda), (after.cpu, *after.cuda), strict=True))


def _check_derivable_twice(walk: _graph.GraphWalk, places: Collection[Tensor]) -> None:
    """Besides what eager mode cannot: to the compiler the backward of a Python function is a constant."""
    _graph.check_derivable_twice(walk, places)
    functions = {}
    for node in walk.nodes:
        function = getattr(node, "_forward_cls", None) if isinstance(node, BackwardCFunction) else None
        if function in (None, recording._EntryLinear) or function.__module__.startswith("torch._higher_order_ops"):
            continue  # the last ones are known to the compiler
        functions[node] = function.__name__
    if walk.leads_through_any(functions, places):
        raise RuntimeError(
            'method="exact" differentiates a gradient, and torch.compile takes the backward of a torch.autograd.Function '
            f"for a constant, so that {', '.join(sorted(set(functions.values())))} cannot be differentiated twice: use "
            'method="finite_difference", write the function in ordinary operations, or call the objective without '
            "torch.compile"
        )


def _check_nothing_drawn(drawn: bool, reason: str, who: str = "the model") -> None:
    """A graph cannot put the generators back for a second forward pass."""
    if drawn:
        raise RuntimeError(
            f"{who} draws random numbers (dropout masks), and {reason}: that takes a second forward pass with the same "
            "ones, which is not possible within torch.compile. Put dropout into eval mode, or call the objective without "
            "torch.compile"
        )


def _check_repeats(model: nn.Module, x: Any, output: Any) -> None:
    """A finite difference compares with a second forward pass, which a graph starts from the buffers of after the first."""
    again = float_tensors(call_with(model, {}, x))
    for first, second in zip(float_tensors(output), again, strict=True):
        tolerance = 64 * torch.finfo(first.dtype).eps  # the difference is divided by the step
        if not torch.allclose(first, second, rtol=tolerance, atol=tolerance, equal_nan=True):
            raise RuntimeError(
                "a second forward pass gives another output (its buffers are updated, as spectral_norm's are in training "
                'mode, or it draws numbers from a generator of its own), so method="finite_difference" is not possible '
                "within torch.compile: call the objective without torch.compile"
            )


def _plan(model: nn.Module, x: Any, y: Any, forward: Recording, term: Term, criterion: Criterion, drawn: bool) -> Plan:
    """The checks of one term; for parameters, how their gradients are had."""
    if term.method == "finite_difference":
        _check_nothing_drawn(drawn, 'method="finite_difference" displaces its input or parameters')
    if isinstance(term, InputTerm) and term.of == "output":
        if term.generator is not None:
            raise RuntimeError(
                "expected no generator within torch.compile, which cannot draw from one: leave it out and seed torch, or "
                "call the objective without torch.compile"
            )
        combination = evaluation.generic_combination(evaluation.check_output(forward))
        _check_derivable_twice(_graph.walk_graph(combination), forward.inputs)
        _checked_mixed_calls(model, combination, evaluation.generic_combination, forward, deltas=False)
        return NO_PLAN
    scalar = term.scalar(criterion, y)
    rng = RngState.capture()
    f = scalar(forward.output)
    if term.method == "finite_difference":
        _check_nothing_drawn(
            not _same_state(rng, RngState.capture()), 'method="finite_difference" calls it again', who="the criterion"
        )
    if term.method == "exact":
        places = forward.inputs if isinstance(term, InputTerm) else select_parameters(model, term.parameters).values()
        _check_derivable_twice(_graph.walk_graph(f), places)
    if isinstance(term, InputTerm):
        _checks.check_input_rows(forward.inputs, f.shape[0])
        _checked_mixed_calls(model, f, scalar, forward, deltas=False)
        return NO_PLAN
    gradients.check_differentiable(f)
    batch_size = f.shape[0]
    group_size = term.group_size(batch_size)
    if not evaluation.needs_deltas(term):
        if group_size < batch_size:
            raise RuntimeError(
                f'method="finite_difference" with over={term.over!r} runs the model for every group of samples by itself, '
                'which gradpen does not do within torch.compile: use method="exact", over="batch", or no torch.compile'
            )
        _check_whole_batch(model, x, f, scalar, term)
        return NO_PLAN
    mixed = _checked_mixed_calls(model, f, scalar, forward, deltas=True)
    parameters = select_parameters(model, term.parameters)
    plan = param_norms.plan_parameters(forward, _graph.walk_graph(f), parameters, mixed, batch_size)
    if plan.mapped:
        _check_nothing_drawn(drawn, f"{', '.join(plan.mapped)} have no closed form for single samples")
        _check_mapped(model, x, f, scalar, {name: parameters[name] for name in plan.mapped}, group_size)
    return tuple((name, tuple(uses)) for name, uses in plan.closed.items()), tuple(plan.mapped)


def _check_whole_batch(model: nn.Module, x: Any, f: Tensor, scalar: Callable[[Any], Tensor], term: ParamTerm) -> None:
    """Errors of eager mode for gradients of the whole batch."""
    parameters = select_parameters(model, term.parameters)
    if term.method == "exact":
        param_norms.batch_param_sq_norm(f, list(parameters.values()), create_graph=False)
        return
    _displaced_param_norm(model, x, term, scalar, f, parameters)


def _check_mapped(
    model: nn.Module,
    x: Any,
    f: Tensor,
    scalar: Callable[[Any], Tensor],
    parameters: Mapping[str, Tensor],
    group_size: int,
) -> None:
    """Parameters without a closed form go through torch.func.vmap, here as in eager mode, or not at all."""
    param_norms.check_rows(x, f.shape[0])
    try:
        mapped = param_norms.run_mapped(model, x, scalar, parameters, f.shape[0], group_size, contextlib.nullcontext)
    except (RuntimeError, ValueError) as error:
        obstacle = f"torch.func.vmap cannot run the model: {error}".partition("\n")[0]
    else:
        obstacle = param_norms.find_obstacle(f, mapped, parameters, same_values=False)
    if obstacle:
        param_norms.check_rows_apart(model, x, f.shape[0], scalar, list(parameters), RngState.capture())
        raise RuntimeError(
            f"the gradients of {', '.join(parameters)} have no closed form for single samples, and within torch.compile "
            f'they cannot be had otherwise, because {obstacle}. Leave them out with parameters=…, use over="batch", or '
            "call the objective without torch.compile"
        )


def _checked_mixed_calls(
    model: nn.Module, f: Tensor, scalar: Callable[[Any], Tensor], forward: Recording, *, deltas: bool
) -> frozenset[int]:
    """`mixing.find_mixed_calls`, to hold for all batches of these shapes."""
    if chain_terms.chain_of(forward) is not None:
        mixing.check_scalar_rows(f, forward.output)
        return frozenset()
    rows = gradients.sample_gradients(f.sum(), forward, inputs=not deltas, deltas=deltas, create_graph=False)
    return mixing.find_mixed_calls_for_good(model, f, scalar, forward, rows)
