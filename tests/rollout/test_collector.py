import json

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from RL2.algorithms.estimator import resolve_advantage
from RL2.engines.protocol import Completion, SamplingParams
from RL2.engines.transformers.engine import TransformersEngine
from RL2.rollout import Collector
from RL2.rollout.samples import stable_seed
from RL2.runtime.errors import EngineError, EnvError
from tests.ranks import run_on_ranks
from tests.rollout.support import EOS, THINK_END, action_text, make_tokenizer, reference_logps

# Right when the action has an odd number of characters.
ODD = """
async def step(state, action, extra_info):
    right = float(len(action) % 2)
    return {"next_state": state + action, "reward": right, "score": 10 * right, "done": True,
            "extra_info": extra_info}
"""
# Two turns in one sequence, then a third that begins anew.
TURNS = """
async def reset(extra_info):
    return "Play:", {"turn": 0}

async def step(state, action, extra_info):
    turn = extra_info["turn"] + 1
    next_state = state + action + "<eos>Go on." if turn == 1 else "Afresh:"
    return {"next_state": next_state, "reward": float(turn), "score": 1.0, "done": turn == 3,
            "extra_info": {"turn": turn}}
"""


def make_config(env_path, **overrides):
    return OmegaConf.merge(
        {
            "env_path": str(env_path), "env_timeout": 5.0, "env_workers": 1, "max_env_errors": 0.5,
            "max_turns": 1,
            "responses_per_prompt": 4, "dynamic_filtering": False, "max_resampled": 0,
            "max_malformed": 16, "max_in_flight": 1024, "partial_rollout": False,
            "over_sampling": None,
            "train_sampling_params": {
                "temperature": 1.0, "max_new_tokens": 12, "stop": None, "no_stop_trim": True,
                "top_p": 1.0,
            },
            "test_sampling_params": {
                "temperature": 0.0, "max_new_tokens": 12, "stop": None, "no_stop_trim": True,
                "top_p": 1.0,
            },
        },
        overrides,
    )  # fmt: skip


def make_items(n):
    tokenizer = make_tokenizer()
    prompts = ["q" * (1 + 5 * i % 13) + str(i) for i in range(n)]
    return [
        {"prompt": p, "prompt_ids": tokenizer.encode(p), "extra_info": {"answer": i}, "index": i}
        for i, p in enumerate(prompts)
    ]


@pytest.fixture
def make(tmp_path, byte_model, byte_tokenizer):
    """make(environment source, config overrides, constructor arguments) -> Collector"""
    collectors = []

    def make(source, config=None, **options):
        path = tmp_path / "env.py"
        path.write_text(source)
        engine = TransformersEngine(byte_model, tokenizer=byte_tokenizer)
        collector = Collector(
            make_config(path, **(config or {})), byte_tokenizer, engine, **{"seed": 1} | options
        )
        collectors.append(collector)
        return collector

    yield make
    for collector in collectors:
        collector.close()


# ------------------------------------------------------------------------ one turn


def test_batch_holds_what_was_sampled(make, byte_model):
    items = make_items(6)
    batch, metrics = make(ODD).collect(items, step=3, train=True)
    assert batch["sample_ids"].tolist() == list(range(24))
    assert batch["group_ids"].tolist() == [i for i in range(6) for _ in range(4)]
    model = AutoModelForCausalLM.from_pretrained(byte_model).eval()
    for row, item in enumerate(item for item in items for _ in range(4)):
        n, n_prompt = batch["lengths"][row].item() + 1, len(item["prompt_ids"])
        ids = batch["states"][row, :1].tolist() + batch["actions"][row, : n - 1].tolist()
        assert ids[:n_prompt] == item["prompt_ids"]
        response = ids[n_prompt:]
        mask = batch["action_mask"][row]
        assert mask.nonzero().squeeze(1).tolist() == list(range(n_prompt - 1, n - 1))
        expected = reference_logps(model, item["prompt_ids"], response, 1.0)
        assert torch.allclose(batch["llm_logps"][row][mask], expected, atol=1e-5)
        # The reward stands on the last action token and nowhere else.
        rewards = batch["rewards"][row]
        assert rewards[n - 2] == rewards.sum()
        assert batch["correct"][row] == (rewards.sum() > 0)
        for name in ("llm_logps", "rewards"):
            assert not batch[name][row][~mask].any()
    assert 0 < batch["correct"].sum() < 24
    assert metrics["train/reward"] == pytest.approx(batch["rewards"].sum().item() / 24)
    assert metrics["train/score"] == pytest.approx(10 * metrics["train/reward"])
    lengths = batch["action_mask"].sum(1).float()
    assert metrics["train/avg_response_length"] == pytest.approx(lengths.mean().item())
    assert 0 < metrics["train/length_clip_ratio"] < 1
    assert metrics["train/n_turns"] == 1
    assert metrics["train/n_samples"] == 24
    assert metrics["rollout/tokens"] == lengths.sum().item()
    assert metrics["rollout/tokens_per_s"] > 0
    assert metrics["rollout/env_errors"] == 0
    assert "rollout/dynamic_filtering_ratio" not in metrics
    assert all(isinstance(value, float) for value in metrics.values())


def test_samples_repeat_by_seed_and_step(make):
    items = make_items(3)
    first, _ = make(ODD).collect(items, step=3, train=True)
    again, _ = make(ODD).collect(items, step=3, train=True)
    assert all(torch.equal(first[name], again[name]) for name in first)
    later, _ = make(ODD).collect(items, step=4, train=True)
    other, _ = make(ODD, seed=2).collect(items, step=3, train=True)
    for batch in (later, other):
        assert batch["actions"].shape != first["actions"].shape or not torch.equal(
            batch["actions"], first["actions"]
        )
    # The answers to one prompt differ from each other, too.
    assert len({tuple(row) for row in first["actions"][:4].tolist()}) == 4


def test_evaluation_is_greedy_and_trains_nothing(make, byte_model, tmp_path):
    items = make_items(3)
    collector = make(ODD, rollouts_dir=tmp_path / "rollouts")
    batch, metrics = collector.collect(items, step=0, train=False)
    assert batch is None
    assert metrics["test/n_samples"] == 3
    failures = {"rollout/env_errors", "rollout/malformed"}
    assert {name for name in metrics if name.startswith("rollout/")} == failures
    model = AutoModelForCausalLM.from_pretrained(byte_model).eval()
    lines = (tmp_path / "rollouts" / "step000000_test.jsonl").read_text().splitlines()
    for item, line in zip(items, lines, strict=True):
        ids = model.generate(
            torch.tensor([item["prompt_ids"]]), max_new_tokens=12, do_sample=False, pad_token_id=0
        )[0, len(item["prompt_ids"]) :]
        assert json.loads(line)["length"] == len(ids)
    assert (
        collector.collect(items, 0, train=False, responses_per_prompt=2)[1]["test/n_samples"] == 6
    )


def test_an_evaluation_may_sample_as_training_does(make, tmp_path):
    """With noise of its own, into a file of its own; the greedy one stays as it is."""
    items = make_items(3)
    collector = make(ODD, rollouts_dir=tmp_path)
    greedy = collector.collect(items, step=1, train=False)
    batch, metrics = collector.collect(items, step=1, train=False, sampled=True)
    assert batch is None and metrics["test/n_samples"] == 3
    again = collector.collect(items, step=1, train=False)
    assert again[1] == greedy[1]
    collector.collect(items, step=1, train=True)
    responses = {
        name: [
            json.loads(line)["response"]
            for line in (tmp_path / f"step000001_{name}.jsonl").read_text().splitlines()
        ]
        for name in ("test", "sampled", "train")
    }
    assert responses["sampled"] != responses["test"]
    assert responses["sampled"] != responses["train"][:: len(responses["train"]) // 3]


def test_rollouts_are_dumped(make, tmp_path):
    folder = tmp_path / "rollouts"
    items = make_items(2)
    items[1]["extra_info"]["answer"] = {1, 2}  # not JSON
    batch, _ = make(ODD, rollouts_dir=folder).collect(items, step=12, train=True)
    assert [path.name for path in folder.iterdir()] == ["step000012_train.jsonl"]
    records = [json.loads(line) for line in (folder / "step000012_train.jsonl").open()]
    assert [r["prompt"] for r in records] == [i["prompt"] for i in items for _ in range(4)]
    assert [r["length"] for r in records] == batch["action_mask"].sum(1).tolist()
    assert [r["reward"] for r in records] == batch["rewards"].sum(1).tolist()
    for record in records:
        assert record["score"] == 10 * (len(record["response"]) % 2)
        assert record["finish_reason"] in ("stop", "length")
        assert record["n_turns"] == 1
    assert [r.get("answer") for r in records] == [0] * 4 + [None] * 4


# ------------------------------------------------------------------------ turns


def test_turns_stay_one_sequence_where_the_state_goes_on(make, byte_tokenizer):
    collector = make(TURNS, {"max_turns": 5, "responses_per_prompt": 8})
    batch, metrics = collector.collect([{"extra_info": {}}] * 2, step=1, train=True)
    assert batch["sample_ids"].tolist() == [i for i in range(16) for _ in range(2)]
    assert batch["group_ids"].tolist() == [0] * 16 + [1] * 16
    assert metrics["train/n_turns"] == 3
    assert metrics["train/reward"] == 6
    assert metrics["train/score"] == 3
    assert batch["correct"].all()
    play, go_on, afresh = (byte_tokenizer.encode(t) for t in ("Play:", "Go on.", "Afresh:"))
    for row in range(0, 32, 2):
        n = batch["lengths"][row]
        ids = batch["states"][row, :1].tolist() + batch["actions"][row, :n].tolist()
        mask = [False] + batch["action_mask"][row, :n].tolist()
        assert ids[: len(play)] == play
        assert not any(mask[: len(play)])
        between = [i for i in range(len(play), len(ids)) if not mask[i]]
        assert between == list(range(between[0], between[-1] + 1))
        first_end = ids[between[0] - 1]
        # The end token comes once: from the policy, or from the environment after other ends.
        assert [ids[i] for i in between] == ([] if first_end == EOS else [EOS]) + go_on
        rewards = [0.0] + batch["rewards"][row, :n].tolist()
        assert {i: r for i, r in enumerate(rewards) if r} == {
            between[0] - 1: 1.0,
            len(ids) - 1: 2.0,
        }
        n = batch["lengths"][row + 1]
        ids = batch["states"][row + 1, :1].tolist() + batch["actions"][row + 1, :n].tolist()
        assert ids[: len(afresh)] == afresh
        assert batch["rewards"][row + 1].sum() == batch["rewards"][row + 1, n - 1] == 3.0
    length = batch["action_mask"].sum().item() / 16
    assert metrics["train/avg_response_length"] == pytest.approx(length)


def test_an_end_token_that_the_environment_repeats_comes_once(tmp_path, byte_tokenizer):
    ids = byte_tokenizer.encode("ab<eos>")
    completion = Completion(ids, [-1.0] * 3, "stop", [0] * 3)
    collector = scripted(tmp_path, byte_tokenizer, completion, TURNS, max_turns=2)
    batch, _ = collector.collect([{"extra_info": {}}], step=1, train=True)
    collector.close()
    assert byte_tokenizer.decode(batch["actions"][0]) == "lay:ab<eos>Go on.ab<eos>"


def test_max_turns_ends_a_sample(make):
    collector = make(TURNS, {"max_turns": 2})
    batch, metrics = collector.collect([{"extra_info": {}}], step=1, train=True)
    assert metrics["train/n_turns"] == 2
    assert len(batch["states"]) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_which_requests_share_a_batch_does_not_depend_on_the_environments_speed(make, workers):
    """The last bits of what they give do depend on it."""
    slow = "import asyncio\n" + TURNS.replace(
        "turn = extra", "await asyncio.sleep(0.3 * (len(action) % 2)); turn = extra"
    )
    results = []
    for source, n in ((TURNS, 0), (slow, workers)):
        collector = make(source, {"max_turns": 3, "env_workers": n})
        complete, batches = collector.engine.decoder.complete, []

        def recorded(batch, so_far, complete=complete, batches=batches):
            batches.append([request.token_ids for request in batch])
            return complete(batch, so_far)

        collector.engine.decoder.complete = recorded
        items = [item | {"prompt": None} for item in make_items(3)]
        batch, _ = collector.collect(items, step=1, train=True)
        results.append((batches, batch))
    (batches, batch), (others, other) = results
    assert batches == others and len(batches) == 3
    for name in batch:
        assert torch.equal(batch[name], other[name]), name


def test_a_sample_ends_where_the_next_turn_might_not_fit(make):
    endless = """
async def step(state, action, extra_info):
    return {"next_state": state + action + "more" * 5, "reward": 0.0, "score": 0.0, "done": False}
"""
    batch, metrics = make(endless, {"max_turns": 100}, max_length=100).collect(
        make_items(2), step=1, train=True
    )
    assert 2 < metrics["train/n_turns"] < 100
    assert batch["lengths"].max() < 100
    assert batch["action_mask"][torch.arange(8), batch["lengths"] - 1].all()  # ends with an action
    # Without a limit of its own it keeps to the model's context of 256.
    batch, _ = make(endless, {"max_turns": 100}).collect(make_items(1), step=1, train=True)
    assert 200 < batch["lengths"].max() < 256


# ------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        ("raise KeyError('gone')", "raised KeyError: 'gone'"),
        ("await asyncio.sleep(60)", "timed out after 0.3 s"),
        ("return ODD | {'reward': float('nan')}", "reward=nan is not finite"),
        ("return ODD | {'reward': 1e39}", "reward=1e+39 is too large"),
    ],
)
def test_a_failing_environment_drops_its_sample_by_name(make, tmp_path, caplog, failure, said):
    source = f"""
import asyncio
ODD = {{"next_state": "", "reward": 1.0, "score": 1.0, "done": True}}
async def step(state, action, extra_info):
    if extra_info["answer"] == 1 and len(action) % 2:
        {failure}
    return ODD
"""
    folder = tmp_path / "rollouts"
    collector = make(source, {"env_timeout": 0.3}, rollouts_dir=folder)
    batch, metrics = collector.collect(make_items(3), step=1, train=True)
    failed = int(metrics["rollout/env_errors"])
    assert 0 < failed < 4
    assert len(batch["states"]) == metrics["train/n_samples"] == 12 - failed
    assert metrics["train/score"] == 1.0  # of those that were judged
    assert batch["group_ids"].tolist().count(1) == 4 - failed
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1  # one line for one kind of failure, however often
    assert warnings[0].startswith(
        "sample dropped: " if failed == 1 else f"{failed} samples dropped, the first of them: "
    )
    assert said in warnings[0] and "prompt 1," in warnings[0] and "env.py" in warnings[0]
    records = [json.loads(line) for line in (folder / "step000001_train.jsonl").open()]
    errors = [record for record in records if "error" in record]
    assert len(errors) == failed
    assert all(said in e["error"] and e["score"] is None for e in errors)


def test_keys_that_nobody_reads_are_named_once(make, caplog):
    source = """
async def step(state, action, extra_info):
    return {"next_state": "", "reward": 1.0, "score": 1.0, "done": True, "extra_inf": {}}
"""
    collector = make(source)
    for step in (1, 2):
        collector.collect(make_items(2), step=step, train=True)
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert line.endswith("keys that are not used: 'extra_inf' (did you mean extra_info?)")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failed_sample_is_in_neither_baseline_nor_batch(make, workers):
    """What is left is what the same step gives whose environment never fails."""
    fails = ODD.replace("right =", "1 / (len(action) % 3); right =")
    whole, _ = make(ODD).collect(make_items(6), step=1, train=True)
    config = {"env_workers": workers, "max_env_errors": None}
    batch, _ = make(fails, config).collect(make_items(6), step=1, train=True)
    left = [whole["sample_ids"].tolist().index(i) for i in batch["sample_ids"].tolist()]
    assert 6 < len(left) < 24
    for name in ("group_ids", "rewards", "llm_logps", "actions", "action_mask"):
        width = batch[name].shape[-1] if batch[name].dim() > 1 else None
        assert torch.equal(batch[name], whole[name][left][..., :width]), name
    estimator = resolve_advantage({"estimator": "reinforce"})
    advantages = estimator(batch)["advantages"]
    rewards = batch["rewards"].sum(-1)
    for row, group in enumerate(batch["group_ids"].tolist()):
        baseline = rewards[batch["group_ids"] == group].mean()
        found = advantages[row][batch["action_mask"][row]]
        assert torch.allclose(found, rewards[row] - baseline)


def test_too_many_failures_in_a_step_stop_the_run(make):
    source = ODD.replace("right = ", "1 / extra_info['answer']; right = ")
    for bound in (4, 0.5):  # of the 8 samples of a step
        collector = make(source, {"max_env_errors": bound})
        for step in (1, 2, 3):  # what earlier steps lost does not count
            _, metrics = collector.collect(make_items(2), step=step, train=True)
            assert metrics["rollout/env_errors"] == 4 * step
    for bound in (3, 0.4):
        collector = make(source, {"max_env_errors": bound})
        message = f"max_env_errors={bound}: the environment failed for 4 of 8 samples.*ZeroDivision"
        with pytest.raises(EnvError, match=message):
            collector.collect(make_items(2), step=3, train=True)
    patient = make(source, {"max_env_errors": None})
    batch, metrics = patient.collect(make_items(1), step=1, train=True)
    assert batch is None
    assert metrics["train/n_samples"] == 0
    assert "train/score" not in metrics
    # The collector works on.
    assert patient.collect(make_items(2), step=2, train=True)[0] is not None


def test_an_engine_error_stops_the_step(make):
    items = make_items(3)
    items[1] |= {"prompt": "q" * 300, "prompt_ids": [20] * 300}
    collector = make(ODD)
    with pytest.raises(EngineError, match="context of 256"):
        collector.collect(items, step=1, train=True)
    assert collector.collect(make_items(2), step=1, train=True)[0] is not None


class ScriptedEngine:
    """Gives one prepared completion; for replies that the real engine does not give."""

    context_length = None

    def __init__(self, completion):
        self.completion = completion

    def metrics(self):
        return {}

    async def start(self, settled=None):
        pass

    async def generate(self, token_ids, sampling, *, seed):
        return self.completion

    async def close(self):
        pass


def scripted(tmp_path, tokenizer, completion, source=ODD, **config):
    path = tmp_path / "env.py"
    path.write_text(source)
    return Collector(make_config(path, **config), tokenizer, ScriptedEngine(completion), seed=1)


def test_an_action_without_text_is_counted(tmp_path, byte_tokenizer):
    collector = scripted(tmp_path, byte_tokenizer, Completion([EOS], [-1.0], "stop", [0]))
    batch, metrics = collector.collect(make_items(2), step=1, train=True)
    collector.close()
    collector.close()  # twice does no harm
    assert batch["action_mask"].sum() == 8
    assert metrics["train/empty_actions"] == 8
    assert metrics["train/avg_response_length"] == 1


def test_an_aborted_completion_is_dropped(tmp_path, byte_tokenizer):
    collector = scripted(tmp_path, byte_tokenizer, Completion([5], [-1.0], "abort", [0]))
    batch, metrics = collector.collect(make_items(1), step=1, train=True)
    collector.close()
    assert batch is None
    assert metrics["rollout/env_errors"] == 0


# ------------------------------------------------------------------------ filtering


def test_groups_of_equal_rewards_are_filtered(make):
    source = """
async def step(state, action, extra_info):
    reward = [1.0, 0.0, float(len(action) % 2)][extra_info["answer"] % 3]
    return {"next_state": "", "reward": reward, "score": reward, "done": True}
"""
    items = make_items(3)
    batch, metrics = make(source, {"dynamic_filtering": True}).collect(items, 1, train=True)
    assert batch["group_ids"].tolist() == [2] * 4
    assert batch["sample_ids"].tolist() == [8, 9, 10, 11]
    assert metrics["rollout/dynamic_filtering_ratio"] == pytest.approx(2 / 3)
    assert metrics["train/n_samples"] == 12  # the other metrics are of all samples
    batch, metrics = make(source, {"dynamic_filtering": True}).collect(items[:2], 1, train=True)
    assert batch is None
    assert metrics["rollout/dynamic_filtering_ratio"] == 1
    # One answer per prompt leaves nothing to compare.
    one = {"dynamic_filtering": True, "responses_per_prompt": 1}
    batch, metrics = make(source, one).collect(items, 1, train=True)
    assert len(batch["states"]) == 3
    assert "rollout/dynamic_filtering_ratio" not in metrics


# ------------------------------------------------------------------------ truncated samples

TOLD = """
async def step(state, action, extra_info, finish_reason):
    score = 7.0 * (finish_reason == "stop")
    return {"next_state": "", "reward": 1.0 + len(action) % 2, "score": score, "done": True}
"""


def test_what_becomes_of_samples_that_were_cut_off(make, tmp_path):
    items, batches, metrics, lines = make_items(6), {}, {}, {}
    for kind in ("keep", "mask", "zero"):
        collector = make(TOLD, {"truncated": kind}, rollouts_dir=tmp_path / kind)
        batches[kind], metrics[kind] = collector.collect(items, 1, train=True)
        dump = (tmp_path / kind / "step000001_train.jsonl").read_text().splitlines()
        lines[kind] = [json.loads(line) for line in dump]
    keep, mask, zero = batches.values()
    cut = torch.tensor([line["finish_reason"] == "length" for line in lines["keep"]])
    assert 0 < cut.sum() < 24
    scores = [7.0 * (not one) for one in cut.tolist()]
    for kind in batches:
        assert [line["score"] for line in lines[kind]] == scores
        same = ("train/n_samples", "train/score", "train/length_clip_ratio")
        assert [metrics[kind][name] for name in same] == [metrics["keep"][name] for name in same]
    assert len(keep["states"]) == 24 and bool(keep["correct"].all())
    # Left out of the batch, and so of all that is summed or averaged over it.
    assert mask["sample_ids"].tolist() == (~cut).nonzero().squeeze(1).tolist()
    assert torch.equal(mask["rewards"].sum(1), keep["rewards"].sum(1)[~cut])
    assert metrics["mask"]["train/reward"] == metrics["keep"]["train/reward"]
    assert torch.equal(zero["rewards"].sum(1), keep["rewards"].sum(1) * ~cut)
    assert torch.equal(zero["correct"], ~cut)
    assert torch.equal(zero["states"], keep["states"])
    assert [line["reward"] == 0 for line in lines["zero"]] == cut.tolist()
    assert metrics["zero"]["train/reward"] == pytest.approx(zero["rewards"].sum().item() / 24)


def test_masked_samples_do_not_make_a_group_teach(make):
    """All whole answers have the same reward: nothing to compare, whatever those cut off got."""
    source = TOLD.replace("1.0 + len(action) % 2", "float(finish_reason == 'stop')")
    settings = {"dynamic_filtering": True, "truncated": "mask"}
    batch, metrics = make(source, settings).collect(make_items(6), 1, train=True)
    assert batch is None and 0 < metrics["train/score"] < 7
    assert metrics["rollout/dynamic_filtering_ratio"] == 1
    batch, metrics = make(source, settings | {"truncated": "keep"}).collect(
        make_items(6), 1, train=True
    )
    assert batch is not None


# ------------------------------------------------------------------------ text


@pytest.mark.parametrize(
    ("ids", "reason", "stop", "no_trim", "text"),
    [
        ("ab</think>c<eos>", "stop", (), True, "ab</think>c"),
        ("ab</think>", "stop", (), True, "ab</think>"),
        ("ab<eos>", "length", (), True, "ab<eos>"),
        ("a<eos>b<eos>", "stop", (), True, "a<eos>b"),
        ("abc", "stop", ("bc",), True, "abc"),
        ("abcd", "stop", ("bc",), False, "a"),
        ("abc", "length", ("bc",), False, "abc"),
        ("abc<eos>", "stop", ("zz",), False, "abc"),
        # A stop text that special tokens spell says nothing: it is never kept.
        ("ab<eos>", "stop", ("<eos>",), True, "ab"),
        ("ab<pad>", "stop", ("<pad>",), True, "ab"),
        ("ab<pad><pad>", "stop", ("<pad><pad>",), True, "ab"),
        ("ab<pad>\n", "stop", ("<pad>\n",), True, "ab"),
        ("ab</think>", "stop", ("</think>",), True, "ab</think>"),
        ("ab<pad>", "stop", ("c",), True, "ab"),  # nothing but a token that we do not know ended it
        ("cb<pad>", "stop", ("c",), True, "cb<pad>"),
        ("ab<pad>", "stop", ("b<pad>",), True, "ab<pad>"),
        ("ab<pad>", "stop", ("b<pad>",), False, "a"),
        ("ab<eos>", "stop", ("b<eos>",), False, "a"),
        ("ab<eos>", "stop", ("<eos>",), False, "ab"),
        ("a  , b .<eos>", "stop", (), True, "a  , b ."),
        ("", "stop", (), True, ""),
    ],
)
def test_action_text(byte_tokenizer, ids, reason, stop, no_trim, text):
    ids = byte_tokenizer.encode(ids)
    completion = Completion(ids, [0.0] * len(ids), reason, [0] * len(ids))
    sampling = SamplingParams(1.0, 10, stop, no_trim)
    assert action_text(completion, sampling, byte_tokenizer) == text
    assert completion.token_ids == ids
    assert THINK_END not in byte_tokenizer.all_special_ids


def test_stop_strings_reach_engine_and_environment(make, tmp_path, byte_tokenizer):
    source = ODD.replace("float(len(action) % 2)", "float(';' in action)")
    folder = tmp_path / "rollouts"
    for no_trim in (True, False):
        sampling = {"stop": ";", "no_stop_trim": no_trim, "max_new_tokens": 60, "temperature": 3.0}
        batch, metrics = make(
            source, {"train_sampling_params": sampling, "responses_per_prompt": 300},
            rollouts_dir=folder,
        ).collect(make_items(2), step=1, train=True)  # fmt: skip
        semicolon = byte_tokenizer.encode(";")[0]
        stopped = (batch["actions"] == semicolon).any(1)
        assert stopped.sum() > 0
        last = batch["actions"][torch.arange(600), batch["lengths"] - 1]
        assert torch.equal(last == semicolon, stopped)  # it ends the row, and its token stays
        assert torch.equal(batch["correct"], stopped & no_trim)


# ------------------------------------------------------------------------ ranks


def test_seeds_are_stable_and_spread():
    assert stable_seed(1, 2, 3) == stable_seed(1, 2, 3)
    assert stable_seed(0, 0, 1, 0, 0, 0) == 9185766571780549453  # in every process, for ever
    seeds = {
        stable_seed(seed, step, train, position, response, 0)
        for seed in range(4)
        for step in range(4)
        for train in range(2)
        for position in range(16)
        for response in range(16)
    }
    assert len(seeds) == 4 * 4 * 2 * 16 * 16
    assert all(0 <= seed < 1 << 63 for seed in seeds)


TWO_TURNS = """
async def step(state, action, extra_info):
    if extra_info["answer"] == FAILS:
        raise ValueError("lost")
    return {"next_state": state + action + " go on", "reward": float(len(action) % 2),
            "score": 1.0, "done": False, "extra_info": extra_info}
"""


def collect_on_rank(env_path, failing_env_path, model, folder):
    """What one rank gets from two steps of training and evaluation, and from failing."""
    tokenizer = make_tokenizer()

    def collector(path, folder):
        engine = TransformersEngine(model, tokenizer=tokenizer)
        return Collector(
            make_config(path, max_turns=2, max_env_errors=1), tokenizer, engine, seed=1,
            rollouts_dir=folder, n_ranks=torch.distributed.get_world_size(),
            rank=torch.distributed.get_rank(),
        )  # fmt: skip

    good = collector(env_path, folder)
    results = []
    for step in range(2):
        results.append(good.collect(make_items(5), step, train=True))
        results.append(good.collect(make_items(3), step, train=False))
    good.close()
    failures = []
    failing = collector(failing_env_path, None)
    with pytest.raises(EnvError) as error:
        failing.collect(make_items(2), 0, train=True)
    failures.append(str(error.value))
    items = make_items(2)
    items[1] |= {"prompt": "q" * 300, "prompt_ids": [20] * 300}
    with pytest.raises(EngineError) as error:
        failing.collect(items, 0, train=True)
    failures.append(str(error.value))
    failing.close()
    return results, failures


def test_the_number_of_ranks_changes_nothing(tmp_path, byte_model):
    good, failing = tmp_path / "good.py", tmp_path / "failing.py"
    good.write_text(TWO_TURNS.replace("FAILS", "-1"))
    failing.write_text(TWO_TURNS.replace("FAILS", "1"))  # prompt 1 is rank 1's
    paths = (good, failing, byte_model)
    [(alone, _)] = run_on_ranks(1, collect_on_rank, *paths, tmp_path / "1")
    (main, failures), (other, other_failures) = run_on_ranks(
        2, collect_on_rank, *paths, tmp_path / "2"
    )
    assert other == [(None, {})] * 4
    assert len(main) == 4
    for (batch, metrics), (expected, expected_metrics) in zip(main, alone, strict=True):
        assert (batch is None) == (expected is None)
        for name in expected or {}:
            if name == "llm_logps":
                assert torch.allclose(batch[name], expected[name], atol=1e-5)
            else:
                assert torch.equal(batch[name], expected[name])
        expected_metrics.pop("rollout/tokens_per_s", None)
        metrics.pop("rollout/tokens_per_s", None)
        assert expected_metrics.pop("comm/samples_bytes", 0) == 0
        assert (metrics.pop("comm/samples_bytes", 0) > 0) == (batch is not None)
        assert metrics == pytest.approx(expected_metrics)
    names = sorted(p.name for p in (tmp_path / "1").iterdir())
    assert len(names) == 4
    for name in names:
        assert (tmp_path / "2" / name).read_text() == (tmp_path / "1" / name).read_text()
    # A failure on one rank stops all of them.
    for env_failure, engine_failure in (failures, other_failures):
        assert "max_env_errors=1" in env_failure
        assert "failed for 2 of 8 samples of a step" in env_failure
        assert "ValueError: lost" in env_failure
        assert "context of 256" in engine_failure
    assert "because rank 1 failed" in failures[1]
