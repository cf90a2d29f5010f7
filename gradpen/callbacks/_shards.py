"""One report of the whole probe, whose samples several processes share out among them.

Each process evaluates the rows that are its share. Per-sample tensors are gathered, in the order of the samples; the
gradient of the mean is summed before it is squared, since ‖∇_θ mean_i f_i‖² is no mean of the processes' values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import CatMetric

from gradpen._numerics import sum_tensors, widest_float
from gradpen.inequality import NotFiniteError, evaluate_inequality
from gradpen.recording import call_model, map_tensors, tensors_of
from gradpen.report import InequalityReport, LayerTerms
from gradpen.sides import mean_gradient, output_cotangents
from gradpen.terms import select_parameters


def num_processes() -> int:
    """How many processes there are to share the work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def take_buffers_of_first_process(module: nn.Module) -> None:
    """Running statistics differ from process to process until the next forward pass; checkpoints hold the first one's."""
    for buffer in module.buffers():
        dist.broadcast(buffer, src=0)


def evaluate_shared(
    model: nn.Module,
    x: Any,
    y: Any,
    *,
    criterion: Callable[..., Tensor],
    of: str | Callable[[Any, Any], Tensor],
    delta: float,
    **options: Any,
) -> InequalityReport:
    """`evaluate_inequality`, of which every process does its share and gets the whole.

    Raises:
        ValueError: if there are fewer samples than processes.
        NotFiniteError: on all processes if one of them has samples whose outputs are not finite.
        RuntimeError: on all processes if one of them failed.
    """
    rank, processes = dist.get_rank(), dist.get_world_size()
    count = tensors_of(x)[0].shape[0]
    if count < processes:
        raise ValueError(
            f"expected a probe of at least one sample for each of {processes} processes, got {count}: raise num_samples"
        )
    rows = slice(rank * count // processes, (rank + 1) * count // processes)
    x_share, y_share = (map_tensors(value, lambda tensor: tensor[rows]) for value in (x, y))
    share = (rows.stop - rows.start) / count  # of all brackets, so that each fails as rarely as in one process
    part, error = None, None
    try:
        part = evaluate_inequality(model, x_share, y_share, criterion=criterion, of=of, delta=delta * share, **options)
    except Exception as raised:  # told to the others, who would wait for ever, and raised again
        error = raised
    told = None if error is None else f"{type(error).__name__}: {error}"
    outcomes = _told_to_all((_structure(part), told, isinstance(error, NotFiniteError)))
    if error is not None:
        raise error
    for other, (_, message, diverged) in enumerate(outcomes):
        if message is not None:
            kind = NotFiniteError if diverged else RuntimeError
            raise kind(f"the inequality could not be evaluated on process {other}: {message}")
    if part is None or any(outcome != outcomes[0] for outcome in outcomes):
        # a layer need not show on every row that it does not cut the graph, and the verdict is about all rows
        return evaluate_inequality(model, x, y, criterion=criterion, of=of, delta=delta, **options)
    whole = _gathered_report(part)
    batch_sq_norm = _batch_sq_norm(model, x_share, y_share, of, criterion, count)
    return replace(whole, batch_grad_sq_norm=batch_sq_norm, delta=delta)


def refuse_sharded(module: nn.Module) -> None:
    """Parameters that are only a part of themselves, whoever made them so.

    Raises:
        RuntimeError: if there is one.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed.tensor import DTensor  # not in every build of torch

    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            raise sharded_error(f"what made {name!r} a DTensor")


def sharded_error(who: str) -> RuntimeError:
    """No process has the matrices whose norms are asked for."""
    return RuntimeError(
        f"InequalityMonitor needs whole weight matrices, and {who} gives every process only a shard of them: "
        'use strategy="ddp" or a single device, or evaluate a checkpoint with gradpen.evaluate_inequality'
    )


def _structure(report: InequalityReport | None) -> list[Any] | None:
    """The layers in the sum, and what is known of each."""
    if report is None:
        return None
    return [[layer.name for layer in report.layers], [list(_per_sample(part)) for part in _parts(report)]]


def _told_to_all(value: Any) -> list[Any]:
    """The values of all processes."""
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, value)
    return told


def _gathered_report(share: InequalityReport) -> InequalityReport:
    """All samples' values in place of the share's."""
    parts = _parts(share)
    columns = [_per_sample(part) for part in parts]
    table = torch.stack([widest_float(values) for values_of in columns for values in values_of.values()], 1)
    gathered = iter(_below_each_other(table).unbind(1))
    network, *layers = (
        replace(part, **{name: next(gathered).to(values.dtype) for name, values in values_of.items()})
        for part, values_of in zip(parts, columns, strict=True)
    )
    return replace(network, layers=layers)


def _parts(report: InequalityReport) -> list[Any]:
    return [report, *report.layers]


def _per_sample(part: InequalityReport | LayerTerms) -> dict[str, Tensor]:
    """The tensors (B,)."""
    values = {field.name: getattr(part, field.name) for field in fields(part)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor) and value.dim() == 1}


def _batch_sq_norm(
    model: nn.Module,
    x: Any,
    y: Any,
    of: str | Callable[[Any, Any], Tensor],
    criterion: Callable[..., Tensor],
    count: int,
) -> Tensor:
    """‖∇_θ mean_i f_i‖² over the samples of all processes: 0-dim."""
    output = call_model(model, x)
    parameters = select_parameters(model, None)
    cotangents = output_cotangents(output, y, of, criterion)
    norms = []
    for direction, scale in zip(cotangents.directions, cotangents.scales, strict=True):
        gradient = torch.cat(
            [g.reshape(1, -1) for g in mean_gradient(output, direction, scale, parameters, count=count)], 1
        )
        norms.append(_below_each_other(gradient).sum(0).square().sum())
    return sum_tensors(norms)


def _below_each_other(rows: Tensor) -> Tensor:
    """The rows of all processes, first those of the first one."""
    metric = CatMetric(nan_strategy="disable").set_dtype(rows.dtype).to(rows.device)
    metric.update(rows)
    return metric.compute()
