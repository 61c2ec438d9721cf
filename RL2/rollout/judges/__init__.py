"""Judges: functions that evaluate a prompt's finished samples before these become a batch.

    async def agreement(group, engine):
        last = [sample.turns[-1].action.strip().splitlines()[-1:] for sample in group.samples]
        return {"agreement": [last.count(one) / len(last) for one in last]}

    agreement.fields = ("agreement",)

is in its own file and is chosen by `rollout.judges=[my_judge.py:agreement]`. The losses and
advantage estimators of the run can use the names in `fields`, with one number per token. The values
are also written to the rollouts' files. A judge with the field `reward` sets the samples' rewards.

`group` (`RL2.rollout.samples.Group`) has the samples of one prompt that did not fail, all finished:
`prompt`, `turns`, `sequences`, `reward`, `score`. Each returned list has one entry per sample: a
number, or a list with one number for each token that the policy wrote. `engine`
(`RL2.rollout.judges.asking.Asking`) answers more prompts with the weights of the step.

Judges run in training, not in evaluations, on the rank that has the group, in the event loop of all
requests: a call that blocks holds up all of them. A judge that raises, or returns something else,
fails the prompt's samples as an environment would (`rollout.max_env_errors`).
"""

from RL2.rollout.judges.agreement import agreement
from RL2.rollout.judges.greedy import greedy
from RL2.rollout.judges.judge import JUDGES, Judge, judge_group, resolve_judges

__all__ = ["JUDGES", "Judge", "agreement", "greedy", "judge_group", "resolve_judges"]
