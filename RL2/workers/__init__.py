"""Workers own a model on every rank and do one thing with it per step."""

from RL2.workers.actor import Actor

__all__ = ["Actor"]
