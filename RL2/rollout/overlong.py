"""DAPO's overlong shaping: a penalty for answers that come close to the token limit."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Overlong:
    """Yu et al. 2025, equation 13. buffer: the last tokens before the limit; 0: no penalty.
    penalty: that of an answer at the limit."""

    buffer: int = 0
    penalty: float = 1.0

    def of_turn(self, length: int, limit: int) -> float:
        """0 up to limit - buffer tokens, then linear, -penalty at the limit."""
        excess = length - (limit - self.buffer)
        return -self.penalty * min(1.0, excess / self.buffer) if self.buffer and excess > 0 else 0.0
