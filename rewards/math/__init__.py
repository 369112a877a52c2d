"""Mathematical answers: strict extraction, exact comparison, Math-Verify behind guards. Imports neither torch nor
sympy.
"""

from rewards.math.equality import Decision, decide, equal
from rewards.math.reward import math_reward
from rewards.math.verify import VerifierError

__all__ = ["Decision", "VerifierError", "decide", "equal", "math_reward"]
