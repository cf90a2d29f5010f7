"""Lightning callbacks: a monitor of the inequality, and a penalty for a LightningModule that nobody edits."""

from gradpen.callbacks.monitor import InequalityMonitor

__all__ = ["InequalityMonitor"]
