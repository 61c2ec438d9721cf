"""Judges: they look at a prompt's finished samples before these become a batch.

    async def agreement(group, engine):
        last = [sample.turns[-1].action.strip().splitlines()[-1:] for sample in group.samples]
        return {"agreement": [last.count(one) / len(last) for one in last]}

    agreement.fields = ("agreement",)

lies in a file of its own and is named by `rollout.judges=[my_judge.py:agreement]`. The names in
`fields` are known to the losses and advantage estimators of the run, one number a token, and stand
in the rollouts' files. A judge called `reward` among its fields sets the samples' rewards.

`group` (`RL2.rollout.samples.Group`) has the samples of one prompt that did not fail, each played
to its end: `prompt`, `turns`, `sequences`, `reward`, `score`. What comes back has one entry for
each of them: a number, or a list of one number for each token that the policy wrote. `engine`
(`RL2.rollout.judges.asking.Asking`) answers further prompts with the weights of the step.

Judges run for training, not in evaluations, on the rank that has the group, in the event loop that
all requests go through: a call that blocks holds all of them up. One that raises, or returns
something else, fails the prompt's samples as an environment would (`rollout.max_env_errors`).
"""

from RL2.rollout.judges.agreement import agreement
from RL2.rollout.judges.judge import JUDGES, Judge, judge_group, resolve_judges

__all__ = ["JUDGES", "Judge", "agreement", "judge_group", "resolve_judges"]
