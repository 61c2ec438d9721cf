"""Random configs, killed and stopped at random: each run ends as the one that nobody disturbed.

A walk is a function of its seed, which is the test's parameter: `-k "[17]"` repeats one, and
RL2_FAULTS=long takes many.
"""

import random
import signal
import time

import pytest

from tests.faults.support import Run, assert_nothing_half, assert_same_run, points
from tests.trainer.support import write_files

COMMON = {
    "trainer__max_steps": 5, "trainer__n_epochs": 9, "trainer__save_freq": 1,
    "trainer__keep_last": 2, "test_data__max_examples": 4, "actor__lr": "1e-2",
    "trainer__health__no_signal_steps": "null", "train_data__prompts_per_rollout": 4,
}  # fmt: skip
# Values of each key that are valid with all the others.
VALUES = {
    "actor__freeze_steps": [0, 0, 1, 3],
    "actor__update_per_rollout": [1, 2, 4],
    "actor__scheduler": ["constant", "linear", "cosine", "inverse_sqrt"],
    "actor__warmup_ratio": [0.0, 0.3],
    "actor__weight_decay": [0.0, 0.1],
    "actor__max_grad_norm": [0.1, 1.0],
    "actor__gradient_checkpointing": ["true", "false"],
    "actor__offload_model": ["true", "false"],
    "actor__entropy__coef": [0.0, 0.01],
    "actor__max_length_per_device": [64, 512],
    "train_data__responses_per_prompt": [2, 3],
    "adv__norm_var": ["true", "false"],
    "rollout__dynamic_filtering": ["true", "false"],
    "rollout__staleness": [0, 1],
    "rollout__max_batch_size": [3, 256],
    "rollout__env_workers": [0, 1],
    "rollout__train_sampling_params__top_p": [0.8, 1.0],
    "trainer__async_save": ["true", "false"],
    "trainer__test_freq": [1, 2, 9],
    "trainer__keep_best": ["true", "false"],
}  # fmt: skip
# Keys that go together.
GROUPS = [
    [{}, {"actor__kl__coef": 0.1, "actor__kl__type": "loss"},
     {"actor__kl__coef": 0.1, "actor__kl__type": "reward"},
     {"actor__kl__coef": 0.1, "actor__kl__type": "advantage"}],
    [{}, {"actor__lora__rank": 2}],
    [{"actor__avg_level": "token"}, {"actor__avg_level": "sequence"},
     {"actor__avg_level": "correct"}],
]  # fmt: skip
SPREADS = [(1, {}), (2, {}), (2, {"actor__ddp_size": 2}), (2, {"actor__tp_size": 2}),
           (2, {"actor__sp_size": 2})]  # fmt: skip


def drawn(chance):
    """Ranks and changes of a run."""
    n_ranks, changes = chance.choice(SPREADS)
    for key, values in VALUES.items():
        changes = changes | {key: chance.choice(values)}
    for alternatives in GROUPS:
        changes = changes | chance.choice(alternatives)
    return n_ranks, COMMON | changes


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize("seed", points(few=2, many=100))
def test_a_random_run_disturbed_at_random(files, tmp_path, seed):
    chance = random.Random(f"walk {seed}")
    n_ranks, changes = drawn(chance)
    changes |= {"test_data__path": files / "rows.jsonl"}
    told = " ".join(f"{key.replace('__', '.')}={value}" for key, value in changes.items())
    print(f"seed {seed}, {n_ranks} ranks: {told}")
    begin = time.monotonic()
    Run(files, "ppo", tmp_path / "whole", n_ranks, **changes).finish()
    seconds = time.monotonic() - begin
    folder = tmp_path / "run"
    run = Run(files, "ppo", folder, n_ranks, **changes)
    for _ in range(chance.randint(1, 4)):
        time.sleep(chance.uniform(0.3, 1) * seconds)
        if chance.random() < 0.5:
            run.kill()
        else:
            for process in run.ranks:
                process.terminate()
            allowed = {0, 128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL}
            codes = {*run.wait()}
            assert codes <= allowed or -signal.SIGTERM in codes, run.output()
        assert_nothing_half(folder)
        run = Run(files, "ppo", folder, n_ranks, trainer__load_ckpt_from="latest", **changes)
    run.finish()
    assert_same_run(folder, tmp_path / "whole")
