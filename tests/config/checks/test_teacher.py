"""The teacher, and runs without rewards: what has no effect, or needs what is not there."""

import pytest

from RL2.config import validate

FREE = ("rollout.env_path=null", "rollout.dynamic_filtering=false")
POLICY = ("teacher.model_name=policy",)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("teacher.model_name=nowhere",), "teacher.model_name=nowhere: "),
        (("teacher.use_liger_kernel=maybe",), "teacher.use_liger_kernel=maybe: must be auto"),
        (("teacher.tp_size=2",), "teacher.tp_size=2: must divide world_size=1; use 1"),
        (
            ("teacher.model_name=a/b", "teacher.max_inference_length_per_device=8"),
            "teacher.max_inference_length_per_device=8: must be at least "
            "actor.max_length_per_device=512",
        ),
        (POLICY, "teacher.model_name=policy: teaches the policy nothing unless it sees more"),
        (
            (*POLICY, 'teacher.context="{answer}"', "teacher.dtype=bfloat16"),
            "teacher.dtype=bfloat16: has no effect with teacher.model_name=policy, which is the "
            "actor itself; leave it out, or set actor.dtype",
        ),
        (
            ("teacher.offload_model=true",),
            "teacher.offload_model=true: has no effect without teacher.model_name; set that",
        ),
        (('teacher.context="{answer}"',), "teacher.context={answer}: has no effect without"),
        (
            (*POLICY, 'teacher.context="{answer}"', "teacher.import_path=a.py:f"),
            "teacher.import_path=a.py:f: is used instead of teacher.context",
        ),
        (
            (*POLICY, "teacher.import_path=a.py:f", "rollout.max_turns=2"),
            "teacher.import_path=a.py:f: replaces the prompt of a single turn, but "
            "rollout.max_turns=2; use 1",
        ),
        (
            (*POLICY, "teacher.import_path=a.py:f", "train_data.path=null"),
            "teacher.import_path=a.py:f: replaces prompts of train_data.path, which is null",
        ),
        (
            ("rollout.env_path=null", "train_data.responses_per_prompt=2"),
            "rollout.dynamic_filtering=true: leaves out prompts whose samples all got the same",
        ),
        ((*FREE, "actor.avg_level=correct"), "actor.avg_level=correct: learns from samples with a"),
        (
            (*FREE, "test_data.path=test@openai/gsm8k:main", "trainer.test_freq=1"),
            "test_data.path=test@openai/gsm8k:main: has nothing to score with",
        ),
        ((*FREE, "train_data.path=null"), "train_data.path=null: needs an environment that writes"),
    ],
)
def test_bad_teachers(message, overrides, said):
    assert message("ppo", *overrides).startswith(said)


def test_good_ones(composed):
    validate(composed("sft"), 1)
    validate(composed("ppo", "teacher.model_name=a/b", *FREE), 1)
    validate(composed("ppo", *POLICY, 'teacher.context="{prompt} {answer}"', *FREE), 1)
    validate(composed("sft", "teacher.model_name=a/b"), 1)
