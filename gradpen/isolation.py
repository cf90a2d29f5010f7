"""Looking at a model without leaving a trace."""

from __future__ import annotations

import contextlib
import contextvars
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradpen._attributes import attributes_kept
from gradpen.recording import RngState, map_tensors


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[RngState]:
    """Everything that a forward pass may change is put back, also after an exception. Yields the random streams' state.

    Inside: gradients are on (also within ``torch.inference_mode``), autocast is off, compiled modules run eagerly, attention
    and recurrent layers run in operations that can be differentiated twice. Afterwards: train/eval flags, buffers (the very
    tensors, with their contents), attributes, embeddings with ``max_norm``, and the random streams of torch (CPU and CUDA),
    NumPy and Python, and of generators that are attributes, are as before. ``.grad``, hooks and ``requires_grad`` are never
    touched. Of attributes, the lists, dicts and sets have the items that they had, tensors their contents; what a forward
    pass changes deeper inside, or in place in a parameter, stays changed.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(_runs_eagerly.reset, _runs_eagerly.set(True))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for device_type in {tensor.device.type for tensor in model.parameters()}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):  # cuDNN's are differentiated only once
            _set_for_now(stack, torch.backends.cudnn, "enabled", False)
        yield stack.enter_context(state_kept(model))


@contextlib.contextmanager
def unrounded_float32() -> Iterator[None]:
    """Products of float32 are made in float32, also where TF32 or bfloat16 is allowed for them, as it is for convolutions.

    Those round each factor by up to 5e-4, which is more than a bracket or the comparison of both sides allows for.
    """
    backends: Any = torch.backends
    with contextlib.ExitStack() as stack:
        if hasattr(backends.cuda.matmul, "fp32_precision"):  # torch 2.9
            if backends.cudnn.conv.fp32_precision == backends.cudnn.rnn.fp32_precision == "tf32":
                # One flag for both, if that is how they were set: then a model can still use `cudnn.flags`, which reads it.
                with contextlib.suppress(RuntimeError):
                    _set_for_now(stack, backends.cudnn, "allow_tf32", False)
            settings = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
            settings += [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
            for setting in settings:
                if setting.fp32_precision in ("tf32", "bf16"):
                    _set_for_now(stack, setting, "fp32_precision", "ieee")
        else:
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
            _set_for_now(stack, backends.cudnn, "allow_tf32", False)
        yield


def _set_for_now(stack: contextlib.ExitStack, settings: Any, name: str, value: Any) -> None:
    stack.callback(setattr, settings, name, getattr(settings, name))
    setattr(settings, name, value)


_runs_eagerly = contextvars.ContextVar("_runs_eagerly", default=False)


def runs_eagerly() -> bool:
    """Whether compiled modules run as if they were not, so that they can be differentiated twice: within `untouched`."""
    return _runs_eagerly.get()


@contextlib.contextmanager
def state_kept(model: nn.Module) -> Iterator[RngState]:
    """Flags and other attributes, buffers, weights of Embedding(max_norm=…), random streams are afterwards as before.

    Yields the random streams' state.
    """
    modules = list(model.modules())
    renormed = [  # embeddings whose forward pass shortens rows of the weight in place
        (module.weight, module.weight.detach().clone())
        for module in modules
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
    ]
    buffers = [(module, dict(module._buffers.items())) for module in modules]
    copies: dict[int, Tensor] = {}  # one for a buffer that several modules share
    try:
        with random_streams_kept() as rng, attributes_kept(modules):
            for module, found in buffers:  # the originals may be part of a graph that is still to be used
                for name, buffer in found.items():
                    if buffer is not None:
                        module._buffers[name] = _copy_once(buffer, copies)
            _copy_tensor_attributes(modules)
            yield rng
    finally:
        for module, found in buffers:
            for name in set(module._buffers.keys()) - found.keys():  # made in the first forward pass
                del module._buffers[name]
                module._non_persistent_buffers_set.discard(name)
            for name, buffer in found.items():
                module._buffers[name] = buffer
        with torch.no_grad():
            for weight, before in renormed:
                if not torch.equal(weight, before):
                    weight.copy_(before)


def _copy_tensor_attributes(modules: Sequence[nn.Module]) -> None:
    """What a forward pass changes in place is a copy then. One that several modules have stays one."""
    copies: dict[int, Tensor] = {}
    for module in modules:
        tensors = {name: value for name, value in vars(module).items() if type(value) is Tensor}
        vars(module).update({name: _copy_once(value, copies) for name, value in tensors.items()})


def _copy_once(tensor: Tensor, copies: dict[int, Tensor]) -> Tensor:
    """The tensor's copy among those that there are, by id, or a new one."""
    if id(tensor) not in copies:
        copies[id(tensor)] = tensor.clone()
    return copies[id(tensor)]


@contextlib.contextmanager
def random_streams_kept(seed: int | None = None) -> Iterator[RngState]:
    """The random streams of torch (CPU and CUDA), NumPy and Python stand afterwards where they stood.

    Inside they go on from there, or start from `seed` if one is given. Yields where they stood.
    """
    rng = RngState.capture()
    try:
        if seed is not None:
            _seed_streams(seed)
        yield rng
    finally:
        rng.restore()


def outside_inference(value: Any) -> Any:
    """Tensors made in inference mode cannot be saved for a backward pass; copies of them can."""
    return map_tensors(value, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


def _seed_streams(seed: int) -> None:
    """Not by ``torch.manual_seed`` where CUDA still sleeps: it would be seeded when it wakes up, after the block."""
    if torch.cuda.is_initialized():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
