"""What a forward pass leaves in the attributes of modules, and how they are put back."""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn


@contextlib.contextmanager
def attributes_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Attributes of the modules are afterwards as before; lists, dicts, sets and deques among them have their items again.

    Random generators among them stand where they stood. What changes deeper inside, or in place in a tensor, stays changed.
    """
    scripted = _scripted(modules)
    attributes = [(module, type(module), dict(vars(module))) for module in modules]
    containers = {id(value): (value, _items(value)) for *_, found in attributes for value in _containers(found)}
    rewinds = [rewind for *_, found in attributes for rewind in map(_rewind, found.values()) if rewind is not None]
    try:
        yield
    finally:
        for rewind in rewinds:
            rewind()
        for container, items in containers.values():
            _put_back(container, items)
        for module, kind, found in attributes:
            if type(module) is kind:  # a lazy one has become another module
                _put_back(vars(module), found)
        for module, name, value in scripted:
            setattr(module, name, value)


def _scripted(modules: Sequence[nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    """What torch.jit holds outside of Python, the train/eval flag too: module, name and value of every attribute."""
    found: list[tuple[nn.Module, str, Any]] = []
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            kind: Any = torch._C.ConcreteModuleType.from_jit_type(module._c._type())
            names = [name for name, (_, is_parameter) in kind.get_attributes().items() if not is_parameter]
            found += [(module, name, getattr(module, name)) for name in names]
    return found


def _rewind(value: Any) -> Callable[[], object] | None:
    """What puts a random generator back to where it stands now; None for anything else."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return partial(value.setstate, value.getstate()) if isinstance(value, random.Random) else None


def _containers(attributes: dict[str, Any]) -> list[Any]:
    """Lists, dicts, sets and deques, but for those in which torch keeps a module's parts."""
    return [value for name, value in attributes.items() if isinstance(value, _CONTAINERS) and name not in _PARTS]


_CONTAINERS = (list, dict, set, deque)
_PARTS = frozenset(vars(nn.Module()))


def _items(container: Any) -> Any:
    """What is in a container now."""
    if isinstance(container, dict):
        return dict(container)
    return set(container) if isinstance(container, set) else list(container)


def _put_back(container: Any, items: Any) -> None:
    """The very items that a container had, unless it still has them."""
    if isinstance(container, dict):
        if container.keys() == items.keys() and all(container[name] is value for name, value in items.items()):
            return
        container.clear()
        container.update(items)
    elif isinstance(container, set):
        container.clear()
        container.update(items)
    elif len(container) != len(items) or any(a is not b for a, b in zip(container, items, strict=True)):
        container.clear()
        container.extend(items)
