"""Tiny models trained through the entry points: what a run says, does and leaves behind."""

import json
import math
import re

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.faults.support import Run
from tests.trainer.support import (
    N_ROWS,
    checkpoint_weights,
    command,
    overrides,
    rows_of,
    same_weights,
    train,
    weights,
    write_env,
    write_files,
    write_model,
)

STEPS = N_ROWS // 8  # of an epoch


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def finite(rows):
    return all(math.isfinite(value) for row in rows for value in row.values())


# ------------------------------------------------------------------------------ one whole run


@pytest.fixture(scope="module")
def spo_run(files, tmp_path_factory):
    """spo by its command, two epochs, with evaluations and checkpoints."""
    save_dir = tmp_path_factory.mktemp("spo")
    done = command(
        "spo",
        overrides(
            files, "spo", save_dir, trainer__n_epochs=2, trainer__test_freq=2,
            trainer__save_freq=4, test_data__path=files / "rows.jsonl",
            test_data__max_examples=10, actor__lr="1e-2", actor__use_liger_kernel="true",
        ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return save_dir, done


EVERY_STEP = {
    "train/score", "train/reward", "train/avg_response_length", "train/length_clip_ratio",
    "train/n_turns", "rollout/tokens_per_s", "timing/rollout", "timing/update_actor",
    "timing/update_rollout", "timing/step", "memory/peak_gib",
}  # fmt: skip
EVERY_UPDATE = {"actor/loss", "actor/entropy", "actor/p_max", "actor/grad_norm", "actor/lr",
                "actor/skipped", "rollout/llm_kl"}  # fmt: skip
EVALUATION = {"test/score", "test/avg_response_length", "timing/evaluate"}


def test_metrics_have_the_names_of_the_contract(spo_run):
    rows = rows_of(spo_run[0])
    assert [row["step"] for row in rows] == list(range(2 * STEPS + 1))
    assert finite(rows)
    for row in rows:
        assert (EVALUATION <= row.keys()) == (row["step"] % 2 == 0)
    for row in rows[1:]:
        assert EVERY_STEP <= row.keys()
        # nothing is said about an update that did not happen
        assert EVERY_UPDATE <= row.keys() or row["actor/skipped"] == 1
    assert EVERY_STEP & rows[0].keys() == {"memory/peak_gib"}  # before training: evaluation only
    assert sum(row["actor/skipped"] for row in rows[1:]) < STEPS
    assert 0 < sum(row["train/score"] for row in rows[1:]) < 2 * STEPS


def test_one_line_a_step_and_one_warning_for_what_cannot_take_effect(spo_run):
    lines = spo_run[1].stderr.splitlines()
    for step in range(2 * STEPS + 1):
        assert sum(f"step {step}/{2 * STEPS}  " in line for line in lines) == 1
        (line,) = [line for line in lines if f"step {step}/{2 * STEPS}  " in line]
        named = set(re.findall(r"(\w+/\w+) [\d.e+-]+", line))  # as in metrics.jsonl
        assert named and named <= rows_of(spo_run[0])[step].keys(), line
        assert "  elapsed 0:0" in line and ("  left 0:" in line) == (0 < step < 2 * STEPS)
    liger = [line for line in lines if "use_liger_kernel" in line]
    assert len(liger) == (0 if torch.cuda.is_available() else 1)
    assert "Traceback" not in spo_run[1].stderr and "Warning" not in spo_run[1].stderr


def test_what_it_is_is_said_before_and_answers_are_shown(spo_run):
    save_dir, done = spo_run
    text = done.stderr
    assert (
        "parameters trained by max_target_kl in float32 on CPU" in text or torch.cuda.is_available()
    )
    assert f"{N_ROWS} training rows, 10 test rows" in text
    assert f"steps 1 to {2 * STEPS}, 8 prompts x 1 responses" in text
    assert text.index("parameters trained by") < text.index("step 0/")
    assert text.count("answer to prompt 0: score ") == STEPS + 1  # with each evaluation
    assert text.count("answer to prompt 1: score ") == STEPS + 1
    assert "answer to prompt 2: " not in text and "  prompt | 0 + 0 = " in text
    config = OmegaConf.load(save_dir / "config.yaml")
    assert config.actor.lr == 1e-2 and config.trainer.save_dir == str(save_dir)
    assert "RL2.trainer.spo" in json.loads((save_dir / "run.json").read_text())["command"]


def test_final_is_a_plain_folder_with_the_weights_of_the_last_checkpoint(spo_run, files):
    save_dir, _ = spo_run
    final = weights(save_dir / "final")
    assert not same_weights(final, weights(files / "model"))
    assert same_weights(final, checkpoint_weights(save_dir / f"checkpoints/step{2 * STEPS:06d}"))
    model = AutoModelForCausalLM.from_pretrained(save_dir / "final")
    tokenizer = AutoTokenizer.from_pretrained(save_dir / "final")
    assert model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size and tokenizer.chat_template
    assert (save_dir / "checkpoints/latest").read_text() == f"step{2 * STEPS:06d}"
    left = sorted({path.name for path in save_dir.rglob(".*")} - {".metadata", ".lock"})
    assert left == []  # no half-written folder


def test_every_rollout_is_dumped_and_the_last_evaluation_is_the_final_models(spo_run):
    """Greedy answers of `final`, made here without the library, are those of the last dump:
    the engine got the weights of every update."""
    save_dir, _ = spo_run
    dumps = sorted(path.name for path in (save_dir / "rollouts").iterdir())
    expected = [f"step{step:06d}_train.jsonl" for step in range(1, 2 * STEPS + 1)]
    expected += [f"step{step:06d}_test.jsonl" for step in range(0, 2 * STEPS + 1, 2)]
    assert dumps == sorted(expected)
    last = save_dir / f"rollouts/step{2 * STEPS:06d}_test.jsonl"
    records = [json.loads(line) for line in last.read_text().splitlines()]
    assert len(records) == 10
    assert {"prompt", "response", "score", "reward", "length"} <= records[0].keys()
    model = AutoModelForCausalLM.from_pretrained(save_dir / "final")
    tokenizer = AutoTokenizer.from_pretrained(save_dir / "final")
    first = save_dir / "rollouts/step000000_test.jsonl"
    assert first.read_text() != last.read_text()
    for record in records:
        ids = tokenizer(record["prompt"], add_special_tokens=False, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=6, do_sample=False)[0]
        text = tokenizer.decode(out[ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text == record["response"]
    score = sum(record["score"] for record in records) / len(records)
    assert rows_of(save_dir)[-1]["test/score"] == pytest.approx(score)


def test_the_engine_serves_the_weights_that_are_trained(spo_run):
    """KL between what sampled and what trains; 1e-3 and more if an update were not published."""
    rows = [row for row in rows_of(spo_run[0]) if "rollout/llm_kl" in row]
    assert len(rows) >= STEPS
    assert max(row["rollout/llm_kl"] for row in rows) < 1e-8


# ------------------------------------------------------------------------------ sft


def test_sft_learns_its_data(files, tmp_path):
    rows = train(files, "sft", tmp_path, trainer__n_epochs=6, actor__lr="1e-2")
    assert [row["step"] for row in rows] == list(range(1, 6 * STEPS + 1))
    assert finite(rows)
    assert rows[-1]["actor/loss"] < 0.5 * rows[0]["actor/loss"]
    names = {"actor/loss", "actor/entropy", "actor/grad_norm", "actor/lr", "timing/step"}
    assert names <= rows[0].keys() and not (tmp_path / "rollouts").exists()
    assert same_weights(
        weights(tmp_path / "final"), checkpoint_weights(tmp_path / f"checkpoints/step{18:06d}")
    )
    lrs = [row["actor/lr"] for row in rows]
    assert max(lrs) == pytest.approx(1e-2) and lrs[-1] < 1e-3  # warm-up, then cosine


# ------------------------------------------------------------------------------ what keys do

# Variants of one first step: same prompts, same weights, same samples.


@pytest.fixture(scope="module")
def first_step(files, tmp_path_factory):
    """Metrics of step 1 under the given changes, computed once each."""
    cache = {}

    def metrics(trainer, **changes):
        key = (trainer, *sorted(changes.items()))
        if key not in cache:
            folder = tmp_path_factory.mktemp("step")
            cache[key] = train(files, trainer, folder, trainer__max_steps=1, **changes)[0]
        return cache[key]

    return metrics


def test_avg_level_decides_what_divides_the_loss(first_step):
    token, sequence, correct = (
        first_step("spo", actor__avg_level=level) for level in ("token", "sequence", "correct")
    )
    n_correct = 8 * sequence["train/score"]
    assert 0 < n_correct < 8 and sequence["actor/loss"] > 0
    assert correct["actor/loss"] * n_correct == pytest.approx(8 * sequence["actor/loss"], rel=1e-5)
    assert token["actor/loss"] > 0 and token["actor/loss"] != correct["actor/loss"]


@pytest.mark.parametrize("coef", [0.3, -0.3])
def test_entropy_coef_of_either_sign_enters_the_loss(first_step, coef):
    without = first_step("spo", actor__avg_level="token")
    row = first_step("spo", actor__avg_level="token", actor__entropy__coef=coef)
    expected = without["actor/loss"] - coef * without["actor/entropy"]
    assert row["actor/loss"] == pytest.approx(expected, rel=1e-5)


def test_tis_coef_caps_the_ratio_of_trainer_to_engine(first_step):
    """Engine and trainer agree, the ratio is 1: a cap of 2 changes nothing, one of 0.5 halves."""
    without, capped = first_step("spo"), first_step("spo", actor__tis_coef=0.5)
    assert capped["actor/loss"] == pytest.approx(without["actor/loss"] / 2, rel=1e-4)
    at_two = first_step("spo", actor__tis_coef=2.0)
    assert at_two["actor/loss"] == pytest.approx(without["actor/loss"], rel=1e-4)


def test_spo_0p5_differs_from_spo_by_its_loss_alone(first_step, files):
    """With a model that is sure of its tokens: the loss acts on probabilities above 0.5."""
    sure = write_model(files / "sure", std=1.0)
    spo, half = (first_step(name, actor__model_name=sure) for name in ("spo", "spo_0p5"))
    assert half["train/score"] == spo["train/score"]
    assert half["actor/loss"] > 0 and half["actor/grad_norm"] > 0
    assert half["actor/loss"] != spo["actor/loss"]


@pytest.mark.parametrize("kind", ["loss", "reward", "advantage"])
def test_ppo_with_a_reference_and_several_updates_a_rollout(files, tmp_path, kind):
    changes = {
        "train_data__responses_per_prompt": 4, "actor__update_per_rollout": 2,
        "rollout__dynamic_filtering": "false", "trainer__max_steps": 2,
    }  # fmt: skip
    rows = train(
        files, "ppo", tmp_path / "kl", actor__kl__type=kind, actor__kl__coef=0.5, **changes
    )
    without = train(files, "ppo", tmp_path / "plain", **changes)
    assert finite(rows)
    assert all({"actor/kl", "actor/clip_ratio"} <= row.keys() for row in rows)
    timed = {"timing/compute_old_logps", "timing/compute_ref_logps"}
    assert timed <= rows[0].keys()
    assert "actor/kl" not in without[0] and "timing/compute_ref_logps" not in without[0]
    assert rows[1]["actor/kl"] > rows[0]["actor/kl"] > 0  # the policy leaves its reference
    assert rows[1]["actor/loss"] != without[1]["actor/loss"]


def test_nothing_left_by_dynamic_filtering_steps_over_cleanly(files, tmp_path):
    flat = write_env(
        tmp_path / "flat.py",
        "async def step(state, action, extra_info):\n"
        "    return {'next_state': None, 'reward': 1.0, 'score': 1.0, 'done': True}\n",
    )
    rows = train(
        files, "ppo", tmp_path / "run", rollout__env_path=flat,
        train_data__responses_per_prompt=2, actor__kl__type="reward", actor__kl__coef=0.1,
    )  # fmt: skip
    assert [row["actor/skipped"] for row in rows] == [1.0] * STEPS
    assert [row["rollout/dynamic_filtering_ratio"] for row in rows] == [1.0] * STEPS
    assert all("actor/loss" not in row for row in rows)
    assert same_weights(weights(tmp_path / "run/final"), weights(files / "model"))


def test_no_correct_sample_steps_over_cleanly(files, tmp_path):
    never = write_env(
        tmp_path / "never.py",
        "async def step(state, action, extra_info):\n"
        "    return {'next_state': None, 'reward': 0.0, 'score': 0.0, 'done': True}\n",
    )
    rows = train(files, "spo", tmp_path / "run", rollout__env_path=never)
    assert [row["actor/skipped"] for row in rows] == [1.0] * STEPS
    assert same_weights(weights(tmp_path / "run/final"), weights(files / "model"))


def test_freeze_steps_sample_but_do_not_train(files, tmp_path):
    rows = train(
        files, "spo", tmp_path, actor__freeze_steps=2, trainer__save_freq=1, actor__lr="1e-2"
    )
    start = weights(files / "model")
    assert ["actor/loss" in row for row in rows] == [False, False, True]
    assert all("train/score" in row for row in rows)
    assert same_weights(start, checkpoint_weights(tmp_path / "checkpoints/step000002"))
    assert not same_weights(start, checkpoint_weights(tmp_path / "checkpoints/step000003"))


# ------------------------------------------------------------------------------ a stranger's files


def test_presets_train_and_what_they_need_of_the_whole_batch_is_computed(files, tmp_path):
    """Two of them: a loss that selects tokens, and importance weights of sequences."""
    chosen = {"algorithm": "[entropy_80_20,rejection]", "rollout__dynamic_filtering": "false"}
    (row,) = train(files, "ppo", tmp_path, **chosen, trainer__max_steps=1)
    assert 0.15 < row["actor/selected"] <= 0.25  # a fifth, rounded down; equal ones included
    assert {"actor/clip_ratio", "actor/tis_masked", "timing/compute_old_logps"} <= row.keys()


def test_a_strangers_loss_trains(files, tmp_path):
    loss = tmp_path / "my_loss.py"
    loss.write_text(
        "def my_loss(logps, log1mps, advantages, *, beta=1.0):\n"
        "    return -beta * advantages * logps, {'surprise': -logps}\n"
    )
    changes = {
        "actor__loss__import_path": f"{loss}:my_loss", "trainer__max_steps": 2,
        "actor__avg_level": "token",
    }  # fmt: skip
    plain = train(files, "spo", tmp_path / "plain", **changes)
    double = train(files, "spo", tmp_path / "double", **changes, actor__loss__options__beta=2.0)
    assert double[0]["actor/loss"] == pytest.approx(2 * plain[0]["actor/loss"], rel=1e-6)
    assert plain[0]["actor/surprise"] > 0
    assert not same_weights(weights(tmp_path / "plain/final"), weights(files / "model"))
    changes["actor__loss__import_path"] = "my_loss.py:my_loss"
    done = command(
        "spo",
        [*overrides(files, "spo", "out", **changes), "+actor.loss.options.beta=2.0"],
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    again = rows_of(tmp_path / "out")
    assert [row["actor/loss"] for row in again] == [row["actor/loss"] for row in double]


TWO_TURNS = """
async def reset(extra_info):
    return "Guess: ", {"turn": 0}


async def step(state, action, extra_info):
    turn = extra_info["turn"] + 1
    following = state + action + " again: " if KEEP else "Guess anew: "
    reward = float(sum(map(ord, action)) % 2)
    return {"next_state": following, "reward": reward, "score": reward, "done": turn == 2,
            "extra_info": {"turn": turn}}
"""


@pytest.mark.parametrize("keep", [True, False], ids=["one sequence", "two sequences"])
def test_an_environment_of_several_turns_that_writes_its_own_prompts(files, tmp_path, keep):
    env = write_env(tmp_path / "turns.py", TWO_TURNS.replace("KEEP", str(keep)))
    rows = train(
        files, "spo", tmp_path / "run", rollout__env_path=env, train_data__path="null",
        rollout__max_turns=3, trainer__n_epochs=2, actor__avg_level="correct",
    )  # fmt: skip
    assert [row["train/n_turns"] for row in rows] == [2.0, 2.0]
    assert finite(rows) and all("actor/loss" in row for row in rows)
    dump = (tmp_path / "run/rollouts/step000001_train.jsonl").read_text().splitlines()
    assert len(dump) == 8 and all(len(json.loads(line)["turns"]) == 2 for line in dump)


# ------------------------------------------------------------------------------ best

LETTERS = """
async def step(state, action, extra_info):
    share = sum("a" <= character <= "z" for character in action) / max(1, len(action))
    return {"next_state": None, "reward": share, "score": SCORE, "done": True}
"""


@pytest.mark.parametrize("rises", [True, False])
def test_best_is_kept_exactly_if_an_evaluation_beats_the_start(tmp_path, files, rises, caplog):
    caplog.set_level("INFO", "RL2")
    write_model(tmp_path / "model", std=0.02)
    env = write_env(tmp_path / "letters.py", LETTERS.replace("SCORE", "share" if rises else "0.5"))
    rows = train(
        files, "ppo", tmp_path / "run", rollout__env_path=env, trainer__n_epochs=4,
        actor__model_name=tmp_path / "model", actor__lr="1e-2", trainer__save_freq=1,
        train_data__responses_per_prompt=8, test_data__path=files / "rows.jsonl",
        trainer__test_freq=3,
    )  # fmt: skip
    scores = {row["step"]: row["test/score"] for row in rows if "test/score" in row}
    assert list(scores) == [0, 3, 6, 9, 12]
    assert (tmp_path / "run/best").exists() == rises
    (said,) = [line for line in caplog.messages if "no evaluation" in line or "best eval" in line]
    if rises:
        step = max(scores, key=scores.get)
        assert said == f"best evaluation: test/score {scores[step]:.4f} at step {step} (in best)"
        assert scores[step] > scores[0] + 0.1
        best = weights(tmp_path / "run/best")
        assert same_weights(best, checkpoint_weights(tmp_path / f"run/checkpoints/step{step:06d}"))
        AutoModelForCausalLM.from_pretrained(tmp_path / "run/best")
    else:
        assert set(scores.values()) == {0.5}
        assert said == "no evaluation beat the start: test/score was 0.5000 before training"


# ------------------------------------------------------------------------------ two processes

PPO = {
    "train_data__responses_per_prompt": 4, "actor__update_per_rollout": 2,
    "actor__kl__type": "loss", "actor__kl__coef": 0.1, "rollout__dynamic_filtering": "false",
    "test_data__max_examples": 7, "trainer__test_freq": 1, "trainer__test_sampled": "true",
}  # fmt: skip


@pytest.mark.parametrize(
    ("trainer", "changes"),
    [
        ("spo", {"actor__avg_level": "correct", "actor__entropy__coef": -0.1}),
        ("ppo", PPO),
        ("spo", {"actor__avg_level": "correct", "two": {"actor__tp_size": 2}}),
        ("ppo", PPO | {"two": {"actor__sp_size": 2, "actor__max_length_per_device": 40}}),
    ],
    ids=["spo", "ppo", "tensor parallel", "sequence parallel"],
)
def test_two_processes_give_the_numbers_of_one(files, tmp_path, trainer, changes):
    """And two processes continue what one has begun."""
    changes = dict(changes)
    spread = changes.pop("two", {})
    if "trainer__test_freq" in changes:
        changes["test_data__path"] = files / "rows.jsonl"
    one = train(files, trainer, tmp_path / "one", **changes, trainer__save_freq=2)

    def on_two(name, **more):
        Run(files, trainer, tmp_path / name, 2, **changes | spread | more).finish()
        return rows_of(tmp_path / name)

    two = on_two("two")
    assert [row["step"] for row in two] == [row["step"] for row in one]
    pairs = list(zip(one, two, strict=True))
    if trainer == "spo":
        checkpoint = tmp_path / "one/checkpoints/step000002"
        resumed = on_two("resumed", trainer__load_ckpt_from=checkpoint)
        assert [row["step"] for row in resumed] == [3]
        pairs.append((one[-1], resumed[0]))
    names = ["actor/loss", "actor/grad_norm", "actor/entropy", "actor/lr", "actor/kl",
             "train/score", "train/avg_response_length", "test/score",
             "test/sampled_score"]  # fmt: skip
    for row, other in pairs:
        for name in names:
            assert (name in row) == (name in other)
            if name in row:
                # The absolute part is for ppo's loss, in which advantages of zero mean cancel.
                expected = pytest.approx(row[name], rel=1e-5, abs=1e-7)
                assert other[name] == expected, (name, row["step"])
    assert sum("actor/loss" in row for row in two) == 3
    sampled = [row["test/sampled_score"] for row in two if "test/sampled_score" in row]
    assert len(sampled) == 4 * ("trainer__test_sampled" in changes)
    for name, weight in weights(tmp_path / "one/final").items():
        torch.testing.assert_close(weights(tmp_path / "two/final")[name], weight, rtol=0, atol=5e-5)
    # nothing of this run is alive: the folder in its command line is ours alone
    ours = str(files).encode()
    assert ours not in b"".join(command_lines())


def command_lines():
    from pathlib import Path

    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes()
        except OSError:  # ended meanwhile
            continue
