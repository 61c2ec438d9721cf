"""Rollouts: engines that write token ids, environments that judge them, and the collector."""

from RL2.rollout.collector import Collector
from RL2.rollout.engine import ENGINES, Completion, Engine, SamplingParams, build_engine
from RL2.rollout.environments import Environment, Step, load_environment

__all__ = [
    "ENGINES",
    "Collector",
    "Completion",
    "Engine",
    "Environment",
    "SamplingParams",
    "Step",
    "build_engine",
    "load_environment",
]
