"""Which part of a batch is x and which is y, and which part of a LightningModule is the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

Getter = str | int | Callable[[Any], Any] | None

_INPUT_KEYS = ("x", "input", "inputs", "image", "images", "pixel_values", "features")
_TARGET_KEYS = ("y", "target", "targets", "label", "labels")


INTEGER_TARGETS = "integer targets"  # why cross entropy was chosen


def split_batch(batch: Any, inputs: Getter, targets: Getter) -> tuple[Any, Any]:
    """(x, y) of a batch.

    Args:
        batch: (x, y), or a dict with keys of the usual names, or anything if both getters are given.
        inputs: key, index or callable of the batch that gives x; None finds it.
        targets: likewise for y.

    Raises:
        ValueError: if the batch has another form and no getter says what to take.
    """
    x = _get(batch, inputs, "inputs") if inputs is not None else _find(batch, 0, _INPUT_KEYS, "inputs")
    y = _get(batch, targets, "targets") if targets is not None else _find(batch, 1, _TARGET_KEYS, "targets")
    return x, y


def find_model(module: nn.Module, model: str | Callable[[nn.Module], nn.Module] | nn.Module | None) -> nn.Module:
    """The part of a LightningModule that maps x to the output.

    The module itself if it defines ``forward``, else its only child with parameters, or what is found likewise within that.

    Raises:
        ValueError: if neither is the case, or there is no part of the name that is given.
    """
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, str):
        try:
            return module.get_submodule(model)
        except AttributeError as error:
            raise ValueError(f"expected model={model!r} to name a part of {type(module).__name__}: {error}") from error
    if model is not None:
        return model(module)
    if _has_forward(module):
        return module
    children = {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}
    if len(children) == 1:
        return find_model(next(iter(children.values())), None)
    raise ValueError(
        f"expected {type(module).__name__} to define forward(x), or to have one child module with parameters, got "
        f"children {sorted(children)}: say which part maps x to the output with model='name'"
    )


def _has_forward(module: nn.Module) -> bool:
    """Whether a module can be called: LightningModules need not be, and containers are not."""
    forward = getattr(type(module), "forward", None)  # None of what torch.jit.script has made
    if forward is nn.Module.forward:
        return "forward" in vars(module)  # where torch.compile puts it
    return getattr(forward, "__module__", "").partition(".")[0] not in ("lightning", "pytorch_lightning")


def find_criterion(module: nn.Module, criterion: Any, y: Any) -> tuple[Callable[..., Tensor], str]:
    """The criterion, and how it was found.

    The module's attribute ``criterion`` or ``loss_fn``, else cross entropy for integer targets and the mean squared
    error for floating-point ones.

    Raises:
        ValueError: if there is no attribute of the name that is given, the one that is found takes no output and target, or
            targets of several tensors leave the choice open.
    """
    if isinstance(criterion, str):
        if not hasattr(module, criterion):
            raise ValueError(
                f"expected criterion={criterion!r} to name an attribute of {type(module).__name__}, got none"
            )
        return getattr(module, criterion), f"attribute {criterion!r}"
    if criterion is not None:
        return criterion, "given"
    for name in ("criterion", "loss_fn"):
        found = getattr(module, name, None)
        if callable(found):
            _check_takes_two(found, f"{type(module).__name__}.{name}")
            return found, f"attribute {name!r}"
    if isinstance(y, Tensor) and not y.is_floating_point():
        return F.cross_entropy, INTEGER_TARGETS
    if isinstance(y, Tensor):
        return mse_loss, "floating-point targets"
    raise ValueError(
        f"expected targets of one tensor to choose a criterion for, got {type(y).__name__}: give criterion=…"
    )


def _check_takes_two(criterion: Callable[..., Any], name: str) -> None:
    """A method may be called like a criterion and take a batch."""
    try:
        signature = inspect.signature(criterion)
    except (TypeError, ValueError):  # of what is not written in Python
        return
    try:
        signature.bind(None, None)
    except TypeError:
        raise ValueError(
            f"expected {name} to be a criterion of (output, target), as its name says, got {name}{signature}: say what the "
            "loss is with criterion=…"
        ) from None


def mse_loss(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """The mean squared error, also of outputs (B, 1) and targets (B,), of which torch would compare each with each."""
    if [n for n in output.shape[1:] if n != 1] == [n for n in target.shape[1:] if n != 1]:
        output = output.reshape(len(output), *target.shape[1:])
    return F.mse_loss(output, target, reduction=reduction)


def input_place(batch: Any, inputs: Getter) -> Any:
    """Key or index of x in the batch; None if only a callable knows.

    Raises:
        ValueError: as `split_batch`.
    """
    if callable(inputs):
        return None
    return _place(batch, 0, _INPUT_KEYS, "inputs") if inputs is None else inputs


def _get(batch: Any, getter: str | int | Callable[[Any], Any], argument: str) -> Any:
    if callable(getter):
        return getter(batch)
    try:
        return batch[getter]
    except (TypeError, KeyError, IndexError) as error:
        form = f"the keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else f"{type(batch).__name__}"
        length = f" of {len(batch)} items" if isinstance(batch, (tuple, list)) else ""
        raise ValueError(
            f"expected a batch with an item {getter!r}, as {argument}= says, got {form}{length}"
        ) from error


def _find(batch: Any, position: int, keys: Sequence[str], argument: str) -> Any:
    return batch[_place(batch, position, keys, argument)]


def _place(batch: Any, position: int, keys: Sequence[str], argument: str) -> Any:
    if isinstance(batch, Mapping):
        found = [key for key in keys if key in batch]
        if len(found) == 1:
            return found[0]
        raise ValueError(
            f"expected exactly one of the keys {', '.join(keys)} in a batch dict, got {sorted(map(str, batch))}: give "
            f"{argument}='key' or a callable of the batch"
        )
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return position
    came = f"{len(batch)} items" if isinstance(batch, (tuple, list)) else type(batch).__name__
    raise ValueError(f"expected a batch (x, y) or a dict, got {came}: give {argument}=index or a callable of the batch")
