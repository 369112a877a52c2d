"""The demo's example: the Countdown task, its reward, the text of its base model and how that base is pre-trained."""

from rlzero.examples.countdown.reward import countdown_reward

__all__ = ["countdown_reward"]
