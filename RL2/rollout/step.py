"""The request of a training step or an evaluation to the collector."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from RL2.engines.protocol import SamplingParams
from RL2.rollout.samples import Group

Item = dict[str, Any]
Draw = Callable[[int], list[Item]]


@dataclass(frozen=True)
class Step:
    """One call of the collector.

    draw: returns the next prompts. wanted: number of groups that must teach something. spare: more
    prompts in flight. budget: most prompts to draw in place of those that teach nothing.
    filtering: whether groups with equal rewards count as teaching nothing. carries: whether the
    step ends when it has the wanted groups, and the others continue in the next. sampled: whether
    an evaluation samples as training does.
    """

    number: int
    train: bool
    n_responses: int
    draw: Draw
    sampling: SamplingParams
    wanted: int
    spare: int = 0
    budget: int = 0
    filtering: bool = False
    carries: bool = False
    sampled: bool = False

    def new_group(self, position: int, item: Item) -> Group:
        return Group.begin(position, item, self.n_responses, self.number)
