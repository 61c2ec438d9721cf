"""The share of a prompt's answers that end alike."""

from RL2.rollout.samples import Group


async def agreement(group: Group, engine: object) -> dict[str, list[float]]:
    """The share of the prompt's samples, including this one, that end with the same line: 1 if all
    agree."""
    ends = [sample.turns[-1].action.strip().rpartition("\n")[2] for sample in group.samples]
    return {"agreement": [ends.count(end) / len(ends) for end in ends]}


agreement.fields = ("agreement",)
