"""Steps that overlap, carry samples over or draw more prompts: order, ages, and resuming."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from RL2.datasets.end_of_turn import end_tokens
from RL2.engines.protocol import Completion
from RL2.runtime.errors import EnvError
from RL2.trainer.sources import rollouts
from RL2.trainer.sources.rollouts import RolloutSource
from RL2.trainer.startup.models import load_tokenizer
from RL2.workers import Actor
from tests.faults.support import Run
from tests.ranks import run_on_ranks
from tests.rollout.scripted_engine import ScriptedEngine
from tests.trainer.support import (
    composed,
    environ,
    lasting,
    overrides,
    rows_of,
    same_weights,
    train,
    weights,
    write_env,
    write_files,
)

TWO = {"train_data__responses_per_prompt": 2}
STALE = {"rollout__staleness": 1}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(autouse=True)
def lines_of_the_library(caplog):
    caplog.set_level(logging.INFO, logger="RL2")


def prompts_of(folder, step):
    """One for each group, in order."""
    lines = (folder / f"rollouts/step{step:06d}_train.jsonl").read_text().splitlines()
    return list({r["group"]: r["prompt"] for r in map(json.loads, lines)}.values())


# ------------------------------------------------------------------------ one step ahead


def test_the_next_step_is_generated_with_the_weights_before(files, tmp_path):
    """Same prompts as on-policy; the second step's answers are those of the first weights."""
    changes = {"trainer__n_epochs": 2, "actor__lr": "1e-2", "trainer__save_freq": 1,
               "actor__warmup_ratio": 0.0, "actor__avg_level": "token"}  # fmt: skip
    fresh = train(files, "spo", tmp_path / "fresh", **changes)
    stale = train(files, "spo", tmp_path / "stale", **changes, **STALE)
    assert [row["rollout/staleness"] for row in fresh] == [0.0] * 6
    assert [row["rollout/staleness"] for row in stale] == [0.0] + [1.0] * 5
    for step in range(1, 7):
        assert prompts_of(tmp_path / "fresh", step) == prompts_of(tmp_path / "stale", step)
    dump = "rollouts/step000002_train.jsonl"
    frozen = tmp_path / "frozen"
    train(files, "spo", frozen, **changes, actor__freeze_steps=6, trainer__max_steps=2)
    assert (tmp_path / "stale" / dump).read_text() == (frozen / dump).read_text()
    assert (tmp_path / "fresh" / dump).read_text() != (frozen / dump).read_text()
    assert max(row["rollout/llm_kl"] for row in fresh if "rollout/llm_kl" in row) < 1e-8
    assert max(row["rollout/llm_kl"] for row in stale if "rollout/llm_kl" in row) > 1e-4


SLOW = """
import asyncio
async def step(state, action, extra_info):
    await asyncio.sleep(0.7)
    good = float(sum(map(ord, action)) % 2)
    return {"next_state": None, "reward": good, "score": good, "done": True}
"""


def test_generation_and_training_overlap(files, tmp_path, monkeypatch):
    """Both take 0.7 s and more a step."""
    update = Actor.update

    def slow_update(self, batch, step):
        time.sleep(0.7)
        return update(self, batch, step)

    monkeypatch.setattr(Actor, "update", slow_update)
    changes = {"rollout__env_path": write_env(tmp_path / "slow.py", SLOW), "trainer__n_epochs": 2}
    seconds = {}
    for name, more in (("one after the other", {}), ("together", STALE)):
        rows = train(files, "spo", tmp_path / name, **changes, **more)
        seconds[name] = sum(row["timing/step"] for row in rows)
    assert seconds["one after the other"] > 6 * 1.4
    # the first step has nothing to overlap with
    assert seconds["together"] < seconds["one after the other"] - 5 * 0.5


def test_an_evaluation_waits_for_what_is_ahead_and_sees_the_new_weights(files, tmp_path):
    changes = {"test_data__path": files / "rows.jsonl", "trainer__test_freq": 1,
               "actor__lr": "1e-2", "actor__warmup_ratio": 0.0, "test_data__max_examples": 6,
               "trainer__max_steps": 2, "trainer__save_freq": 1}  # fmt: skip
    train(files, "spo", tmp_path / "stale", **changes, **STALE)
    final = tmp_path / "again"  # the final weights, evaluated alone
    train(files, "spo", final, **changes, actor__model_name=tmp_path / "stale/final",
          actor__freeze_steps=2)  # fmt: skip
    last, first = "rollouts/step000002_test.jsonl", "rollouts/step000000_test.jsonl"
    assert (tmp_path / "stale" / last).read_text() == (final / first).read_text()
    assert (tmp_path / "stale" / last).read_text() != (tmp_path / "stale" / first).read_text()


@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_resumed_run_has_what_was_generated_ahead(files, tmp_path, step):
    """By weights that are nowhere any more, so it must be in the checkpoint."""
    changes = {"trainer__n_epochs": 2, "trainer__save_freq": 1, "actor__lr": "1e-2"} | STALE
    rows = train(files, "spo", tmp_path / "whole", **changes)
    checkpoint = tmp_path / f"whole/checkpoints/step{step:06d}"
    part = tmp_path / "part"
    train(files, "spo", part, **changes, trainer__load_ckpt_from=checkpoint)
    for row, other in zip(rows[step:], rows_of(part), strict=True):
        assert lasting(row) == lasting(other)
    assert same_weights(weights(tmp_path / "whole/final"), weights(part / "final"))


def test_an_error_of_what_is_ahead_stops_the_run(files, tmp_path):
    env = write_env(
        tmp_path / "env.py",
        "calls = 0\n"
        "async def step(state, action, extra_info):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    return {'next_state': None, 'reward': 1 / (calls < 10), 'score': 1.0, 'done': True}\n",
    )
    with pytest.raises(EnvError, match="max_env_errors=0"):
        train(files, "spo", tmp_path / "run", rollout__env_path=env, rollout__max_env_errors=0,
              rollout__env_workers=1, **STALE)  # fmt: skip
    names = [thread.name for thread in threading.enumerate()]
    assert "rollout-loop" not in names and "rollout-ahead" not in names


def test_two_processes_one_step_ahead_give_the_numbers_of_one(files, tmp_path):
    changes = {"trainer__n_epochs": 2} | STALE
    one = train(files, "spo", tmp_path / "one", **changes)
    Run(files, "spo", tmp_path / "two", 2, **changes).finish()
    for row, other in zip(one, rows_of(tmp_path / "two"), strict=True):
        assert other["rollout/staleness"] == row["rollout/staleness"]
        for name in ("train/score", "actor/loss", "actor/grad_norm"):
            assert (name in row) == (name in other)
            if name in row:
                assert other[name] == pytest.approx(row[name], rel=1e-4, abs=1e-7)


# ------------------------------------------------------------------------ more prompts


RESAMPLE = TWO | {"rollout__max_resampled": 20, "trainer__max_steps": 6, "trainer__n_epochs": 9,
                  "trainer__save_freq": 1, "actor__lr": "1e-2"}  # fmt: skip


def test_resampled_batches_are_full_and_resume_exactly(files, tmp_path):
    """From every checkpoint, so also in the middle of a loader's batch."""
    whole = tmp_path / "whole"
    rows = train(files, "ppo", whole, **RESAMPLE)
    assert sum(row["rollout/resampled"] for row in rows) > 6
    for row in rows:
        n = 8 + row["rollout/resampled"]
        assert row["train/n_samples"] == 2 * n
        assert row["rollout/dynamic_filtering_ratio"] == pytest.approx(1 - 8 / n)
    seen = [prompt for step in range(1, 7) for prompt in prompts_of(whole, step)]
    for start in range(0, len(seen) - 24, 24):  # epoch after epoch, none left out
        assert len(set(seen[start : start + 24])) == 24
    for step in range(1, 6):
        part = tmp_path / f"from{step}"
        checkpoint = whole / f"checkpoints/step{step:06d}"
        train(files, "ppo", part, **RESAMPLE, trainer__load_ckpt_from=checkpoint)
        for row, other in zip(rows[step:], rows_of(part), strict=True):
            assert lasting(row) == lasting(other)
        assert same_weights(weights(whole / "final"), weights(part / "final"))


PARTIAL = {"rollout__partial_rollout": "true", "rollout__over_sampling": 6,
           "rollout__max_batch_size": 16, "trainer__n_epochs": 2, "trainer__save_freq": 1,
           "train_data__prompts_per_rollout": 4,
           "rollout__train_sampling_params__max_new_tokens": 40}  # fmt: skip


def written(state):
    """Tokens that the samples of a checkpoint have so far."""
    carried = [group for rank in state["source"] for group in rank["rollout"]["carried"]]
    return sum(
        sum(map(sum, (one["action_mask"] for one in sample["sequences"])))
        + len(sample["written"]["token_ids"] if sample["written"] else [])
        for group in carried
        for sample in group["samples"]
    )


def test_what_is_unfinished_at_a_checkpoint_goes_on_in_the_run_that_resumes(files, tmp_path):
    whole = tmp_path / "whole"
    rows = train(files, "spo", whole, **PARTIAL)
    assert len(rows) == 12 and all(row["train/n_samples"] == 4 for row in rows)
    assert all(row["rollout/unfinished"] == 6 for row in rows)
    assert any(0 < row.get("rollout/staleness", 0) for row in rows)

    def unfinished(folder, step):
        state = torch.load(folder / f"checkpoints/step{step:06d}/rank0.pt", weights_only=True)
        return [group["index"] for group in state["source"][0]["rollout"]["carried"]]

    part, begun = tmp_path / "part", unfinished(whole, 3)
    assert len(begun) == 6
    saved = torch.load(whole / "checkpoints/step000003/rank0.pt", weights_only=True)
    assert written(saved) > 0
    checkpoint = whole / "checkpoints/step000003"
    train(files, "spo", part, **PARTIAL, trainer__load_ckpt_from=checkpoint)
    texts = [json.loads(line)["prompt"] for line in (files / "rows.jsonl").open()]
    done = [prompt for step in (1, 2, 3) for prompt in prompts_of(whole, step)]
    assert len(set(done)) == 12 and not {texts[index] for index in begun} & set(done)
    done += [prompt for step in range(4, 13) for prompt in prompts_of(part, step)]
    done += [texts[index] for index in unfinished(part, 12)]
    # Two epochs of 24 prompts and 6 of the third: none lost and none twice at the checkpoint.
    assert len(done) == 54
    assert {done.count(text) for text in texts} <= {2, 3}
    # What was written is kept: the samples that were begun end with the fourth step's weights.
    assert max(row.get("rollout/staleness", 0) for row in rows_of(part)[:3]) > 0


def test_a_run_of_whole_rollouts_draws_what_was_begun_by_one_of_partial_ones(files, tmp_path):
    train(files, "spo", tmp_path / "run", **PARTIAL, trainer__max_steps=2)
    changes = PARTIAL | {"rollout__partial_rollout": "false", "rollout__over_sampling": "null"}
    rows = train(
        files, "spo", tmp_path / "run", **changes, trainer__load_ckpt_from="latest",
        trainer__max_steps=12,
    )  # fmt: skip
    texts = [json.loads(line)["prompt"] for line in (files / "rows.jsonl").open()]
    done = [prompt for step in range(1, 13) for prompt in prompts_of(tmp_path / "run", step)]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert {done.count(text) for text in texts} == {2}


# ------------------------------------------------------------------------ alarm, sleep, drivers


def test_a_run_with_stale_weights_sets_off_the_alarm(files, tmp_path, caplog):
    changes = {"actor__lr": "1e-1", "actor__warmup_ratio": 0.0, "trainer__n_epochs": 2,
               "actor__avg_level": "token"}  # fmt: skip
    rows = train(files, "spo", tmp_path / "fresh", **changes)
    assert {row.get("rollout/llm_kl_alarm", 0.0) for row in rows} == {0.0}
    assert not any("llm_kl_alarm" in line for line in caplog.messages)
    rows = train(files, "spo", tmp_path / "stale", **changes, **STALE)
    assert 1.0 in {row.get("rollout/llm_kl_alarm") for row in rows}
    assert any("llm_kl_alarm" in line for line in caplog.messages)


class LoggedEngine(ScriptedEngine):
    async def generate(self, token_ids, sampling, *, seed):
        if self.log[-1] != "generate":
            self.log.append("generate")
        return await super().generate(token_ids, sampling, seed=seed)


@pytest.mark.parametrize("sleep", [True, False])
def test_an_engine_sleeps_while_the_actor_trains(files, tmp_path, monkeypatch, sleep):
    engine = LoggedEngine(lambda *_: Completion([5], [-1.0], "stop", [0]))
    monkeypatch.setattr(rollouts, "build_engine", lambda *_: engine)
    config = composed(
        "spo", overrides(files, "spo", tmp_path, test_data__path=files / "rows.jsonl")
    )
    config.rollout.sleep = sleep
    tokenizer = load_tokenizer(config)
    source = RolloutSource(config, tokenizer, end_tokens(tokenizer))
    source.start(torch.device("cpu"), torch.float32)
    source.collect(1, last=False)
    source.publish(SimpleNamespace(weights=torch.nn.Linear(2, 2).named_parameters), 1)
    source.evaluate(1)
    source.collect(2, last=True)
    source.close()
    expected = ["start", "wake", "generate", "sleep", "wake", "weights 1", "wake", "generate",
                "wake", "generate", "sleep", "close"]  # fmt: skip
    assert engine.log == [
        name for i, name in enumerate(expected)
        if sleep or (name not in ("wake", "sleep") and i != 9)  # two in a row count once
    ]  # fmt: skip


def drivers_on_rank(files, engine, local_ranks):
    own = torch.distributed.get_rank()
    before = os.environ["LOCAL_RANK"]
    os.environ["LOCAL_RANK"] = str(local_ranks[own])
    try:
        source = RolloutSource.__new__(RolloutSource)
        source.config = composed("spo", overrides(files, "spo", "x", rollout__engine=engine))
        return source._drivers()
    finally:
        os.environ["LOCAL_RANK"] = before


def test_servers_are_driven_by_one_rank_of_each_machine(files):
    assert run_on_ranks(4, drivers_on_rank, files, "vllm", [0, 1, 0, 1]) == [(0, 2)] * 4
    assert run_on_ranks(4, drivers_on_rank, files, "sglang", [0, 1, 2, 3]) == [(0,)] * 4
    every = [(0, 1, 2, 3)] * 4
    assert run_on_ranks(4, drivers_on_rank, files, "transformers", [0, 1, 0, 1]) == every


# ------------------------------------------------------------------------ interrupted

HANGS = """
import asyncio
from pathlib import Path

calls = 0

async def step(state, action, extra_info):
    global calls
    calls += 1
    if calls > 8:
        Path(__file__).with_name("hangs").touch()
        await asyncio.sleep(600)
    return {"next_state": None, "reward": 1.0, "score": 1.0, "done": True}
"""


@pytest.mark.parametrize("staleness", [0, 1])
def test_ctrl_c_ends_a_run_that_waits_for_its_environment(files, tmp_path, staleness):
    """In the second step's rollout, which with staleness 1 runs beside the training."""
    env = write_env(tmp_path / "env.py", HANGS)
    lines = overrides(files, "spo", tmp_path / "run", rollout__env_path=env,
                      rollout__env_timeout=900, rollout__env_workers=1,
                      rollout__staleness=staleness)  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "RL2.trainer.spo", *lines], env=environ(),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "hangs").exists() and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        time.sleep(1.0)  # the training of step 1 is over: what is waited for is the rollout
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=15)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGINT
    assert "asked to stop: step 1 is in" in stderr and "Traceback" not in stderr
    assert "Task was destroyed" not in stderr
    assert "was never awaited" not in stderr
