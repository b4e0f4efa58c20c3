"""The gradient noise scale: up to which batch size a larger batch, and so more devices, saves training steps.

Source: McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv 1812.06162, appendix A.1. At a batch of
that size a run takes about twice the steps of an ideal one, and twice the characters of a tiny batch's.
"""

import math
from dataclasses import dataclass

_DECAY = 0.9  # of the moving averages, per measurement


@dataclass
class NoiseScale:
    """Moving averages of the two unbiased estimates whose ratio is the noise scale.

    Attributes:
        noise: Trace of the covariance of one window's gradient.
        signal: Squared norm of the true gradient.
    """

    noise: float = 0.0
    signal: float = 0.0

    def measure(self, small_square: float, small: int, large_square: float, large: int) -> None:
        """Take in a pair of squared gradient norms at the same weights.

        Args:
            small_square: Mean squared norm of the gradients of batches of `small` windows.
            small: Windows.
            large_square: Squared norm of the gradient of `large` windows.
            large: Windows, more than `small`.
        """
        if not math.isfinite(small_square + large_square):  # a loss scaler skips such a step
            return
        noise = (small_square - large_square) / (1 / small - 1 / large)
        signal = (large * large_square - small * small_square) / (large - small)
        self.noise = _DECAY * self.noise + (1 - _DECAY) * noise
        self.signal = _DECAY * self.signal + (1 - _DECAY) * signal

    @property
    def windows(self) -> float | None:
        """The noise scale in windows of a batch; None while the estimates are too noisy to have a positive ratio."""
        return self.noise / self.signal if self.noise > 0 and self.signal > 0 else None
