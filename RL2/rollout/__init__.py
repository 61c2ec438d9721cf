"""Rollouts: samples played by engine and environment, and the collector that makes batches of
them."""

from RL2.rollout.collector import Collector

__all__ = ["Collector"]
