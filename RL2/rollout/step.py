"""What a step of training, or an evaluation, asks of the engines."""

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

    draw: gives the next prompts. wanted: groups that shall teach something. spare: prompts in
    flight beyond those. budget: prompts to draw at most for those that teach nothing.
    filtering: whether groups of equal rewards teach nothing. carries: the step ends with the last
    group wanted, and the others go on in the next. sampled: an evaluation that samples as training
    does.
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
