"""Guards. Every message says what was expected, what came, and what to do."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module


class NotFiniteError(ValueError):
    """The network maps some samples to NaN or infinity, or its layers are out of range: neither side is defined."""


def check_weight(weight: float | Callable[[int], float]) -> None:
    """A number >= 0, or a callable of the step."""
    if callable(weight):
        return
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"weight must be a number >= 0 or a callable of the step, got {weight!r}")
    if not 0 <= weight < math.inf:  # false for NaN too, and torch.compile can trace it, unlike math.isnan
        raise ValueError(f"weight must be a finite number >= 0, got {weight}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """One of a few strings."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_positive_int(name: str, value: object) -> None:
    """An int >= 1 (True is not one)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int >= 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be an int >= 1, got {value}")


def check_positive(name: str, value: float) -> None:
    """A finite number > 0."""
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")


def check_norm_target(value: object) -> None:
    """A finite number >= 0."""
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
        raise ValueError(f"target must be a norm, a finite number >= 0, or None, got {value!r}")


def check_model(model: object) -> None:
    """An nn.Module; anything else has no parameters to look at."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected an nn.Module as model, got {type(model).__name__}: the order of the arguments is (model, x, y)"
        )


def check_grad_enabled() -> None:
    """Penalties are gradients, so they need autograd."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "a gradient penalty was called under torch.inference_mode(), where autograd records nothing: call "
            "it outside, or inside `with torch.inference_mode(False), torch.enable_grad():` with cloned inputs"
        )
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "a gradient penalty was called under torch.no_grad(), where autograd records nothing: call it "
            "outside, or inside `with torch.enable_grad():`"
        )


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile or ``module.compile()`` was applied to this very module."""
    return getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule"


def is_changed(module: Any) -> bool:
    """Whether anything is done when a module is called beside the forward of its class, hooks on all modules left aside."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        or module._compiled_call_impl is not None
    )


def has_global_hooks() -> bool:
    """Whether there are hooks on all modules."""
    return any(_GLOBAL_HOOKS)


_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


def check_not_static(model: nn.Module) -> None:
    """DistributedDataParallel(static_graph=True) takes a penalty's backward pass for that of the step."""
    if type(model).__name__ == "DistributedDataParallel" and getattr(model, "static_graph", False):
        raise RuntimeError(
            "a penalty takes gradients before the backward pass of the step, and DistributedDataParallel(static_graph=True) "
            "then no longer averages the step's own over the processes: leave static_graph out"
        )


def check_not_compiled(modules: Iterable[nn.Module], method: str) -> None:
    """PyTorch refuses double backward through a compiled module; say so before it does."""
    if any(is_compiled(module) for module in modules):
        raise RuntimeError(
            f'method="{method}" differentiates a gradient, and PyTorch cannot do that through a module '
            "compiled with torch.compile. Two ways work: pass the original (uncompiled) module, whose "
            'parameters are the same, or use method="finite_difference", which needs first derivatives only'
        )


def check_leaves(parameters: Mapping[str, Tensor]) -> None:
    """A difference quotient hands its gradient to the parameters, which must not be functions of others."""
    functions = [name for name, parameter in parameters.items() if not parameter.is_leaf]
    if functions:
        raise RuntimeError(
            f'method="finite_difference" needs parameters that are leaves of the graph, but {", ".join(functions)} were '
            'computed from other tensors (torch.func.functional_call, say): use method="exact", or leave them out with '
            "parameters=…"
        )


def warn_of_wrong_second_derivatives(modules: Mapping[str, nn.Module]) -> None:
    """The fused kernel of torch's weight_norm fails gradgradcheck: values are right, their gradients are not."""
    for name, module in modules.items():
        hooks = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
        if "_WeightNorm" in type(module).__name__ or "WeightNorm" in hooks:
            warnings.warn(
                f"layer {name!r} uses torch's weight_norm, whose second derivative is wrong in PyTorch: the penalty's value "
                'is right, its gradient is not. Use method="finite_difference", or a parametrisation in plain operations',
                stacklevel=2,
            )


def check_no_batch_statistics(model: nn.Module, quantity: str) -> None:
    """BatchNorm that normalises with the batch's own statistics makes f_i depend on the other samples."""
    check_none_mixes_samples(dict(model.named_modules()), quantity, is_penalty=False)


def check_none_mixes_samples(modules: Mapping[str, nn.Module], quantity: str, *, is_penalty: bool = True) -> None:
    """`check_no_batch_statistics` for the modules of a model, by name; of penalties, one is defined for batches as well."""
    for name, module in modules.items():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            ways = ["replace it by GroupNorm or LayerNorm"]
            if module.running_mean is not None:  # without them, eval mode takes the batch's, too
                ways.insert(0, "put it into eval mode")
            if is_penalty:
                ways.append('use ParamGradPenalty(over="batch")')
            reason = "without running statistics" if module.running_mean is None else "in training mode"
            raise RuntimeError(
                f"{quantity} is defined sample by sample, but layer {name!r} ({type(module).__name__} {reason}) "
                f"mixes the samples of a batch: {', or '.join(ways)}"
            )


def check_batch_sizes(output: Any, target: Any) -> None:
    """Output and target speak of the same samples."""
    if not (isinstance(output, Tensor) and isinstance(target, Tensor)):
        return
    if output.dim() == 0:
        raise ValueError(
            "expected the model's output to have one row per sample, got a 0-dim tensor: gradient penalties "
            "need the values of the single samples"
        )
    check_not_empty(output)
    if target.dim() > 0 and output.shape[0] != target.shape[0]:
        raise ValueError(
            "expected output and target of the same batch size (dimension 0), got an output of shape "
            f"{tuple(output.shape)} and a target of shape {tuple(target.shape)}"
        )


def check_not_empty(output: Tensor) -> None:
    """There is a sample."""
    if output.shape[0] == 0:
        raise ValueError(
            f"expected at least one sample, got an empty batch: an output of shape {tuple(output.shape)}. Skip empty batches"
        )


def check_input_rows(inputs: Sequence[Tensor], batch_size: int) -> None:
    """Dimension 0 of every penalised input counts the samples."""
    for tensor in inputs:
        if tensor.dim() == 0 or tensor.shape[0] != batch_size:
            raise ValueError(
                f"expected one row of every input per sample, that is dimension 0 of size {batch_size} (the "
                f"batch size of the output), got an input of shape {tuple(tensor.shape)}"
            )


def check_names_unique(names: Sequence[str]) -> None:
    """Penalties are told apart by name."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"expected penalties of different names, got {', '.join(map(repr, repeated))} more than once: give "
            "one of them another name with name=…"
        )
