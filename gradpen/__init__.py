"""Gradient penalties for PyTorch, and the inequality that joins them.

``InputGradPenalty`` and ``ParamGradPenalty`` are losses that one adds to any training loop; ``evaluate_inequality`` reports
both sides of ‖∇_x f‖² · Σ_t (1+‖h_t‖²)/(‖W_t‖²‖J_t‖²) <= ‖∇_θ f‖². Lightning callbacks live in `gradpen.callbacks`.
"""

from gradpen.inequality import evaluate_inequality
from gradpen.penalties import InputGradPenalty, ParamGradPenalty, PenalizedLoss

__version__ = "0.1.0"

__all__ = ["InputGradPenalty", "ParamGradPenalty", "PenalizedLoss", "evaluate_inequality"]
