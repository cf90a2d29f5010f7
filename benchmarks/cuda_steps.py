"""Microseconds a step on a GPU: plain, penalised, and both compiled into CUDA graphs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from contenders import INPUT_WEIGHT, PARAM_WEIGHT
from torch import Tensor, nn
from workload import Workload

from gradpen import InputGradPenalty, ParamGradPenalty, PenalizedLoss

ROUNDS, CALLS = 30, 50


def cuda_table(work: Workload) -> dict[str, Any] | None:
    """Objective → {"eager": µs, "compiled": µs or the first line of the error}; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    work = replace(work, model=work.model.cuda(), x=work.x.cuda(), y=work.y.cuda())
    objectives: dict[str, Callable[[], nn.Module]] = {
        "plain": lambda: PenalizedLoss(F.cross_entropy),
        "input": lambda: PenalizedLoss(F.cross_entropy, InputGradPenalty(INPUT_WEIGHT)),
        "param": lambda: PenalizedLoss(F.cross_entropy, ParamGradPenalty(PARAM_WEIGHT)),
        "both": lambda: PenalizedLoss(F.cross_entropy, InputGradPenalty(INPUT_WEIGHT), ParamGradPenalty(PARAM_WEIGHT)),
    }
    table: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    for name, build in objectives.items():
        table[name] = {"eager": _microseconds(work.copied(), build())}
        try:
            compiled = torch.compile(build(), fullgraph=True, mode="reduce-overhead")
            table[name]["compiled"] = _microseconds(work.copied(), compiled)
        except Exception as error:  # whatever the compiler raises belongs into the table
            table[name]["compiled"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return table


def _microseconds(work: Workload, objective: Callable[..., Any]) -> float:
    """Median over rounds, all work done."""

    def step() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        work.model.zero_grad()
        loss: Tensor = objective(work.model, work.x, work.y).loss
        loss.backward()
        return loss

    def seconds_per_call() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            step()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / CALLS

    seconds_per_call()
    return 1e6 * statistics.median(seconds_per_call() for _ in range(ROUNDS))
