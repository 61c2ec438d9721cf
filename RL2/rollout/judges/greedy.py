"""The reward of a prompt's greedy answer, which ReMax takes as its baseline."""

from RL2.rollout.judges.asking import Asking
from RL2.rollout.samples import Group


async def greedy(group: Group, engine: Asking) -> dict[str, list[float]]:
    """The reward of one more answer to the prompt, at temperature 0 and over all its turns, for
    each of the prompt's samples."""
    answer = await engine.play(group.item, temperature=0.0)
    return {"greedy_reward": [answer.reward] * len(group.samples)}


greedy.fields = ("greedy_reward",)
