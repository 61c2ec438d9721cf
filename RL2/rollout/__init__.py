"""Rollouts: engine and environment play samples, and the collector makes batches of them."""

from RL2.rollout.collector import Collector

__all__ = ["Collector"]
