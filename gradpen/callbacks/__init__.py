"""Lightning callbacks: a monitor of the inequality, and a penalty for a LightningModule that nobody edits."""

from gradpen.callbacks.monitor import InequalityMonitor
from gradpen.callbacks.penalty import GradPenaltyCallback

__all__ = ["GradPenaltyCallback", "InequalityMonitor"]
