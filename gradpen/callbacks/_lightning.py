"""One base class for the users of ``lightning`` and of ``pytorch_lightning``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import Callback as _LightningCallback

if TYPE_CHECKING:
    Callback = _LightningCallback
else:
    try:
        from pytorch_lightning import Callback as _StandaloneCallback
    except ImportError:
        Callback = _LightningCallback
    else:

        class Callback(_LightningCallback, _StandaloneCallback):
            """A callback that the trainers and command lines of both packages take for one of theirs."""


__all__ = ["Callback"]
