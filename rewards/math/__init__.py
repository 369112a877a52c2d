"""Mathematical answers: strict extraction, complete reading, exact comparison. Imports neither torch nor sympy."""

from rewards.math.equality import Decision, decide
from rewards.math.reward import GoldError, equal, math_reward

__all__ = ["Decision", "GoldError", "decide", "equal", "math_reward"]
