"""How a step's batch comes together: filtering, resampling, partial rollouts, faults, drivers."""

import asyncio
import json
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from RL2.engines.protocol import Completion, MalformedReply
from RL2.engines.transformers.engine import TransformersEngine
from RL2.rollout import Collector
from RL2.rollout.player import end_at_stop
from RL2.rollout.samples import Sample, staleness
from RL2.runtime.errors import EngineError
from tests.ranks import run_on_ranks
from tests.rollout.scripted_engine import ScriptedEngine, Typist
from tests.rollout.support import EOS, make_model, make_tokenizer, reference_logps
from tests.rollout.test_collector import ODD, make_config, make_items

LAST = """
async def step(state, action, extra_info):
    right = float(ord(action[-1]) % 2)
    return {"next_state": None, "reward": right, "score": right, "done": True}
"""


class Stream:
    """Draws prompts from a list and counts them."""

    def __init__(self, items):
        self.items, self.n = items, 0

    def __call__(self, n):
        drawn = self.items[self.n : self.n + n]
        self.n += len(drawn)
        return drawn


@pytest.fixture
def make(tmp_path, byte_tokenizer):
    """make(environment source, engine, config overrides, constructor arguments) -> Collector"""
    collectors = []

    def make(source, engine, config=None, **options):
        path = tmp_path / f"env{len(collectors)}.py"
        path.write_text(source)
        collectors.append(
            Collector(make_config(path, **(config or {})), byte_tokenizer, engine,
                      **{"seed": 1} | options)
        )  # fmt: skip
        return collectors[-1]

    yield make
    for collector in collectors:
        collector.close()


def letter(token_ids, sampling, seed):
    """One letter, by the seed."""
    return Completion([10 + seed % 64], [-1.0], "stop", [0])


def same(batch, other):
    return batch.keys() == other.keys() and all(torch.equal(batch[k], other[k]) for k in batch)


# ------------------------------------------------------------------------ resampling

RESAMPLE = {"dynamic_filtering": True, "max_resampled": 30, "responses_per_prompt": 2}


def test_the_batch_is_the_first_groups_that_teach_whatever_comes_first(make):
    items = make_items(60)
    every, _ = make(LAST, ScriptedEngine(letter), {"responses_per_prompt": 2}).collect(
        items, step=3, train=True
    )
    rewards = every["rewards"].sum(1).view(-1, 2)
    teach = (rewards[:, 0] != rewards[:, 1]).nonzero().squeeze(1).tolist()
    expected = teach[:8]
    n_launched = expected[-1] + 1
    assert 8 < n_launched < 30
    for jitter in range(6):
        engine, stream = ScriptedEngine(letter, jitter), Stream(items)
        batch, metrics = make(LAST, engine, RESAMPLE).collect_step(stream, 8, step=3)
        assert batch["group_ids"].tolist() == [p for p in expected for _ in range(2)]
        assert stream.n == n_launched and len(engine.calls) == 2 * n_launched
        assert metrics["rollout/resampled"] == n_launched - 8
        ratio = 1 - 8 / n_launched
        assert metrics["rollout/dynamic_filtering_ratio"] == pytest.approx(ratio)
        rows = (every["group_ids"][:, None] == torch.tensor(expected)).any(1)
        assert batch["rewards"].sum(1).tolist() == every["rewards"][rows].sum(1).tolist()


def test_resampling_is_bounded(make):
    items = make_items(60)
    flat = LAST.replace("ord(action[-1]) % 2", "1")
    for limit in (0, 5):
        stream = Stream(items)
        collector = make(flat, ScriptedEngine(letter), RESAMPLE | {"max_resampled": limit})
        batch, metrics = collector.collect_step(stream, 8, step=1)
        assert batch is None and stream.n == 8 + limit
        assert metrics["rollout/resampled"] == limit
        assert metrics["rollout/dynamic_filtering_ratio"] == 1
    stream = Stream(items)  # nothing is compared with one answer, so nothing is replaced
    collector = make(flat, ScriptedEngine(letter), RESAMPLE | {"responses_per_prompt": 1})
    batch, _ = collector.collect_step(stream, 8, step=1)
    assert len(batch["states"]) == stream.n == 8


def test_a_replacement_does_not_wait_for_the_slowest(make):
    """The engine answers the last of the first prompts only when a replacement has come."""
    came = asyncio.Event()

    class Slow(ScriptedEngine):
        async def generate(self, token_ids, sampling, *, seed):
            if token_ids == items[3]["prompt_ids"]:
                await asyncio.wait_for(came.wait(), 10)
            if token_ids == items[4]["prompt_ids"]:
                came.set()
            return await super().generate(token_ids, sampling, seed=seed)

    items = make_items(9)
    flat = LAST.replace("ord(action[-1]) % 2", "extra_info['answer'] > 2 and ord(action[-1]) % 2")
    make(flat, Slow(letter), RESAMPLE).collect_step(Stream(items), 4, step=1)
    assert came.is_set()


def resample_on_rank(path, model, drivers):
    """Three steps of resampling, and how many prompts this rank drew."""
    tokenizer = make_tokenizer()
    rank, n_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    drives = drivers is None or rank in drivers
    engine = TransformersEngine(model, tokenizer=tokenizer) if drives else None
    collector = Collector(
        make_config(path, **RESAMPLE), tokenizer, engine, seed=1, n_ranks=n_ranks, rank=rank,
        drivers=drivers,
    )  # fmt: skip
    stream, results = Stream(make_items(80)), []
    weights = AutoModelForCausalLM.from_pretrained(model).named_parameters()
    drawn = [0]

    def counted():
        for pair in weights:
            drawn[0] += 1
            yield pair

    collector.update_weights(counted(), version=4)
    for step in range(3):
        results.append(collector.collect_step(stream, 6, step))
    collector.close()
    return results, stream.n, drawn[0]


@pytest.mark.parametrize("drivers", [None, (0,)], ids=["both drive", "one drives"])
def test_ranks_draw_and_train_on_the_same_prompts(tmp_path, byte_model, drivers):
    path = tmp_path / "env.py"
    path.write_text(ODD)
    [(alone, n_drawn, _)] = run_on_ranks(1, resample_on_rank, path, byte_model, None)
    (main, n_main, w_main), (other, n_other, w_other) = run_on_ranks(
        2, resample_on_rank, path, byte_model, drivers
    )
    assert n_main == n_other == n_drawn > 18
    assert w_main == w_other > 0  # a rank without an engine takes part in the gathering
    assert other == [(None, {})] * 3
    for (batch, metrics), (expected, expected_metrics) in zip(main, alone, strict=True):
        assert batch["weight_versions"].max() == 4
        for name in expected:
            if name == "llm_logps":
                assert torch.allclose(batch[name], expected[name], atol=1e-5)
            else:
                assert torch.equal(batch[name], expected[name]), name
        assert metrics.pop("comm/samples_bytes") > expected_metrics.pop("comm/samples_bytes") == 0
        for each in (metrics, expected_metrics):
            del each["rollout/tokens_per_s"]
        assert metrics == pytest.approx(expected_metrics)


# ------------------------------------------------------------------------ in flight


def test_requests_in_flight_are_bounded_and_environments_are_not(make):
    source = """
import asyncio
open_calls = [0, 0]
async def step(state, action, extra_info):
    open_calls[0] += 1
    open_calls[1] = max(open_calls)
    await asyncio.sleep(0.05)
    open_calls[0] -= 1
    return {"next_state": None, "reward": 1.0, "score": float(open_calls[1]), "done": True}
"""
    engine = ScriptedEngine(letter, jitter=0)
    _, metrics = make(source, engine, {"max_in_flight": 5}).collect(make_items(10), 1, train=True)
    assert engine.most_open == 5
    assert metrics["train/score"] > 5


# ------------------------------------------------------------------------ sums over turns

TURNS = """
async def step(state, action, extra_info):
    n = extra_info["n"] = extra_info.get("n", -1) + 1
    large = extra_info["answer"] == 1
    reward, score = REWARDS[n] if large else (1.0, 1.0)
    return {
        "next_state": state + action, "reward": reward, "score": score, "done": n == 2,
        "extra_info": extra_info,
    }
"""


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ([(2e38, 0), (2e38, 0), (0, 0)], "the rewards of 2 turns add up to 4e+38"),
        ([(0, -1.5e38), (0, -1.5e38), (0, -1.5e38)], "scores of 3 turns add up to -4.5e+38"),
        ([(3e38, 3e38), (-3e38, -3e38), (3e38, 3e38)], None),
    ],
)
def test_turns_that_add_up_to_more_than_a_float32_fail(make, caplog, rewards, said, train):
    source = f"REWARDS = {rewards}\n{TURNS}"
    collector = make(source, ScriptedEngine(letter), {"max_turns": 3, "responses_per_prompt": 2},
                     test_responses_per_prompt=2)  # fmt: skip
    batch, metrics = collector.collect(make_items(2), 1, train=train)
    n_bad = 0 if said is None else 2
    assert metrics["rollout/env_errors"] == n_bad
    assert metrics["train/n_samples" if train else "test/n_samples"] == 4 - n_bad
    assert sum(message.count("too large: beyond") for message in caplog.messages) == n_bad // 2
    assert all(said in message and "step: " in message for message in caplog.messages)
    if train:
        assert batch["rewards"].float().isfinite().all()


# ------------------------------------------------------------------------ replies without sense


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Completion([5, 6], [-1.0], "stop", [0, 0]), "2 tokens, 1 log-prob"),
        (Completion([5, 6], [-1.0, -1.0], "stop", [0]), "1 weight versions"),
        (Completion([5], [math.nan], "stop", [0]), "not finite"),
        (Completion([5], [-math.inf], "stop", [0]), "not finite"),
        (Completion([5], [-1e39], "stop", [0]), "log-probability -1e+39"),
        (Completion([5], [3.5], "stop", [0]), "log-probability 3.5"),
        (Completion([], [], "stop", []), "no token"),
        (MalformedReply("server 1: the body is no JSON"), "no JSON"),
        (Completion([5], [-1.0], "len", [0]), "the finish reason 'len', which is not stop, length"),
    ],
)
def test_a_reply_without_sense_trains_nothing(make, tmp_path, caplog, reply, said):
    """It goes alone: the other answers to its prompt are compared among each other."""
    items = make_items(3)

    def some(token_ids, sampling, seed):
        bad = token_ids == items[1]["prompt_ids"] and seed // 97 % 2
        return reply if bad else letter(token_ids, sampling, seed)

    config = {"responses_per_prompt": 8, "dynamic_filtering": True}
    good, _ = make(LAST, ScriptedEngine(letter), config).collect(items, 1, train=True)
    collector = make(LAST, ScriptedEngine(some), config, rollouts_dir=tmp_path)
    batch, metrics = collector.collect(items, 1, train=True)
    n_bad = int(metrics["rollout/malformed"])
    assert 0 < n_bad < 8 and metrics["train/n_samples"] == 24 - n_bad
    assert metrics["rollout/env_errors"] == 0
    kept = [row for row, one in enumerate(good["sample_ids"].tolist())
            if one in batch["sample_ids"].tolist()]  # fmt: skip
    for name in ("states", "actions", "rewards", "sample_ids"):
        assert torch.equal(good[name][kept], batch[name])
    assert len(kept) == len(good["states"]) - n_bad
    (line,) = [message for message in caplog.messages if said in message]
    assert line.startswith("sample dropped" if n_bad == 1 else f"{n_bad} samples dropped")
    records = [json.loads(line) for line in (tmp_path / "step000001_train.jsonl").open()]
    assert sum(said in record.get("error", "") for record in records) == n_bad
    # counted over the run
    _, metrics = collector.collect(items, 2, train=False)
    assert metrics["rollout/malformed"] >= n_bad


def test_too_many_replies_without_sense_stop_the_run(make):
    reply = MalformedReply("no JSON")
    collector = make(LAST, ScriptedEngine(lambda *_: reply), {"max_malformed": 6})
    for step in (1, 2):
        _, metrics = collector.collect(make_items(1), step, train=True)
        assert metrics["rollout/malformed"] == 4 * step
    with pytest.raises(EngineError, match="max_malformed=6: .* 8 of 8 samples .* no JSON") as error:
        collector.collect(make_items(2), 3, train=True)
    assert not isinstance(error.value, MalformedReply)
    patient = make(LAST, ScriptedEngine(lambda *_: reply), {"max_malformed": None})
    assert patient.collect(make_items(9), 1, train=True)[1]["rollout/malformed"] == 36


def test_another_error_of_the_engine_stops_the_step_at_once(make):
    def some(token_ids, sampling, seed):
        return EngineError("no server left") if seed % 5 == 0 else letter(token_ids, sampling, seed)

    engine = ScriptedEngine(some, jitter=1)
    collector = make(LAST, engine)
    with pytest.raises(EngineError, match="no server left"):
        collector.collect(make_items(20), 1, train=True)
    assert engine.open == 0  # what was in flight is cancelled, not left behind


# ------------------------------------------------------------------------ partial rollouts

PARTIAL = {
    "partial_rollout": True,
    "env_workers": 0,  # answers within a known number of the event loop's turns
    "over_sampling": 2,
    "responses_per_prompt": 1,
    "train_sampling_params": {"max_new_tokens": 200},
}
DIGITS = """
async def step(state, action, extra_info):
    return {"next_state": None, "reward": 1.0, "score": 1.0, "done": True}
"""


def text_items(texts, tokenizer):
    return [
        {"prompt": f"{name}:", "prompt_ids": tokenizer.encode(f"{name}:"), "extra_info": {},
         "index": index}
        for index, name in enumerate(texts)
    ]  # fmt: skip


def actions_of(batch, tokenizer):
    """{prompt: (action text, versions of its tokens)} of a batch."""
    found = {}
    for row in range(len(batch["states"])):
        n = int(batch["lengths"][row])
        mask = batch["action_mask"][row, :n]
        prompt = tokenizer.decode(batch["states"][row, : n - int(mask.sum()) + 1])
        text = tokenizer.decode(batch["actions"][row, :n][mask])
        found[prompt[:-1]] = (text, batch["weight_versions"][row, :n][mask].tolist())
        assert (batch["weight_versions"][row][~batch["action_mask"][row]] == -1).all()
    return found


def test_unfinished_samples_go_on_in_the_next_step(make, byte_tokenizer, tmp_path):
    lengths = {"a": 4, "b": 30, "c": 5, "d": 6, "e": 8, "f": 25, "g": 9, "h": 7, "i": 15, "j": 26,
               "k": 13, "l": 9, "m": 20, "n": 21, "o": 17, "p": 3, "q": 30}  # fmt: skip
    engine = Typist(lambda prompt: prompt * lengths[prompt], byte_tokenizer, EOS)
    collector = make(DIGITS, engine, PARTIAL, rollouts_dir=tmp_path)
    stream = Stream(text_items(lengths, byte_tokenizer))
    seen, versions, unfinished = [], {}, []
    for step in (1, 2, 3, 4):
        batch, metrics = collector.collect_step(stream, 3, step)
        found = actions_of(batch, byte_tokenizer)
        for prompt, (text, by) in found.items():
            # As if it had never been cut, and with one end token.
            assert text == prompt * lengths[prompt] + "<eos>"
            versions[prompt] = by
        assert batch["group_ids"].tolist() == sorted(set(batch["group_ids"].tolist()))
        unfinished.append([item["prompt"][0] for item in collector.carried])
        assert metrics["rollout/unfinished"] == len(unfinished[-1])
        seen += found
        # Nothing is written between two steps.
        before = len(engine.calls)
        collector.update_weights(iter([]), version=step)
        assert len(engine.calls) == before and engine.aborts >= step
        if step == 2:
            # An evaluation in between disturbs nothing.
            items = text_items("aceg", byte_tokenizer)
            assert collector.collect(items, 2, train=False)[1]["test/n_samples"] == 4
    assert len(seen) == len(set(seen))  # none twice
    assert set(unfinished[0]) & {"b", "f"} == {"b"}
    assert stream.n == len(seen) + len(unfinished[-1])  # none lost
    cut = [by for by in versions.values() if len(set(by)) > 1]
    assert cut and all(by == sorted(by) for by in cut)
    dumps = [path.read_text() for path in sorted(tmp_path.glob("*_train.jsonl"))]
    dumped = [json.loads(line)["prompt"][0] for line in "".join(dumps).splitlines()]
    assert sorted(dumped) == sorted(seen)


def test_a_continuation_has_a_seed_of_its_own_and_less_room(make, byte_tokenizer):
    engine = Typist(lambda prompt: prompt * (100 if prompt == "b" else 15), byte_tokenizer, EOS)
    collector = make(DIGITS, engine, PARTIAL | {"train_sampling_params": {"max_new_tokens": 60}})
    stream = Stream(text_items("bcdefghijklmnopqrst", byte_tokenizer))
    for step in range(1, 16):
        batch, _ = collector.collect_step(stream, 1, step)
        found = actions_of(batch, byte_tokenizer)
        if "b" in found:
            break
    text, _ = found["b"]
    assert text == "b" * 60  # the limit is that of the whole action
    calls = [call for call in engine.calls if call[0][0] == byte_tokenizer.encode("b")[0]]
    assert len(calls) > 2
    written = [len(ids) - 2 for ids, _, _ in calls]
    assert written == sorted(written) and written[0] == 0
    assert [sampling.max_new_tokens for _, sampling, _ in calls] == [60 - n for n in written]
    assert (
        len({(n, seed) for n, (_, _, seed) in zip(written, calls, strict=True)})
        == len(set(written))
        == len({seed for _, _, seed in calls})
    )


def test_an_environment_that_is_at_work_goes_on_between_the_steps(make, byte_tokenizer):
    source = """
import asyncio
async def step(state, action, extra_info):
    if action.startswith("b"):
        await asyncio.sleep(0.3)
    return {"next_state": None, "reward": 1.0, "score": 1.0, "done": True}
"""
    engine = Typist(lambda prompt: prompt * 3, byte_tokenizer, EOS)
    collector = make(source, engine, PARTIAL)
    stream = Stream(text_items("bcdefghijk", byte_tokenizer))
    batch, _ = collector.collect_step(stream, 2, 1)
    assert "b" not in actions_of(batch, byte_tokenizer)
    n_calls = sum(call[0][0] == byte_tokenizer.encode("b")[0] for call in engine.calls)
    collector.run(asyncio.sleep(0.4))
    batch, _ = collector.collect_step(stream, 2, 2)
    assert "b" in actions_of(batch, byte_tokenizer)
    assert sum(call[0][0] == byte_tokenizer.encode("b")[0] for call in engine.calls) == n_calls


def test_a_stop_string_across_the_cut_ends_the_action(make, byte_tokenizer):
    """Whatever the cut: the typist ends later only because it does not see the beginning."""
    text = "x" * 6 + "STOP" + "y" * 60
    engine = Typist(lambda prompt: text if prompt == "b" else prompt * 2, byte_tokenizer, EOS)
    seen = set()
    for n_long in range(1, 12):
        sampling = {"max_new_tokens": 100, "stop": ["STOP"]}
        collector = make(DIGITS, engine, PARTIAL | {"train_sampling_params": sampling})
        engine.text = lambda prompt, n=n_long: text if prompt == "b" else prompt * n
        stream = Stream(text_items("bcdefghijklmnopq", byte_tokenizer))
        for step in range(1, 9):
            start = len(engine.calls)
            batch, _ = collector.collect_step(stream, 1, step)
            found = actions_of(batch, byte_tokenizer)
            for ids, _, _ in engine.calls[start:]:
                match = re.fullmatch(r"b:(x*S?T?O?P?)", byte_tokenizer.decode(ids))
                seen |= {match[1]} if match else set()
            if "b" in found:
                break
        assert found["b"][0] == "x" * 6 + "STOP"
    assert any(0 < len(part) - 6 < 4 for part in seen), seen  # some cut went through the stop


def test_end_at_stop(byte_tokenizer):
    def completion(text):
        ids, n = byte_tokenizer.encode(text), len(text)
        return Completion(ids, [-float(i) for i in range(n)], "length", list(range(n)))

    joined = end_at_stop(completion("ab12cdef"), 3, ("zz", "12"), byte_tokenizer)
    assert joined == Completion(
        byte_tokenizer.encode("ab12"), [0.0, -1.0, -2.0, -3.0], "stop", [0, 1, 2, 3]
    )
    for stop in ((), ("zz",)):
        assert end_at_stop(completion("ab12"), 3, stop, byte_tokenizer) == completion("ab12")


def test_logps_are_those_of_the_weights_that_wrote_each_token(make, tmp_path, byte_tokenizer):
    """With the real engine: a cut sample's tokens before and after the update, each under the
    weights of its version."""
    folders = [make_model(tmp_path / f"v{v}", seed=v, eos_token_id=[EOS, *range(60, 66)])
               for v in range(4)]  # fmt: skip
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]
    engine = TransformersEngine(folders[0], tokenizer=byte_tokenizer, max_batch_size=8, eager=True)
    config = PARTIAL | {"over_sampling": 6, "train_sampling_params": {"max_new_tokens": 120}}
    collector = make(DIGITS, engine, config)
    stream, n_cut = Stream(make_items(60)), 0
    for step in range(1, 5):
        batch, _ = collector.collect_step(stream, 3, step)
        assert len(batch["states"]) == 3
        for row in range(3):
            n = int(batch["lengths"][row])
            ids = [int(batch["states"][row, 0]), *batch["actions"][row, :n].tolist()]
            mask = batch["action_mask"][row, :n]
            first = int(mask.nonzero()[0]) + 1
            versions = batch["weight_versions"][row, :n][mask]
            expected = torch.stack([reference_logps(m, ids[:first], ids[first:], 1.0)
                                    for m in models]).gather(0, versions[None])[0]  # fmt: skip
            assert torch.allclose(batch["llm_logps"][row, :n][mask], expected, atol=1e-4)
            n_cut += len(versions.unique()) > 1
        if step < 4:
            collector.update_weights(models[step].named_parameters(), version=step)
    assert n_cut > 0


def partial_on_rank(path, n_steps, begin=1, n_drawn=0, states=None):
    """Steps of partial rollouts on drivers of unequal speed, from the states of other ones."""
    tokenizer = make_tokenizer()
    rank, n_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    names = [chr(ord("a") + i) for i in range(26)]
    engine = Typist(lambda prompt: prompt * (3 + 37 * (ord(prompt) % 3)), tokenizer, EOS)
    collector = Collector(
        make_config(path, **PARTIAL), tokenizer, engine, seed=1, n_ranks=n_ranks, rank=rank
    )
    stream, seen, carried = Stream(text_items(names, tokenizer)), {}, []
    if states is not None:
        stream.n = n_drawn
        items = [stream.items[group["index"]] for state in states for group in state["carried"]]
        collector.load_state_dict(states, items)
    for step in range(begin, begin + n_steps):
        collector.update_weights(iter([]), version=step - 1)
        batch, _ = collector.collect_step(stream, 4, step)
        if batch is not None:
            assert len(batch["states"]) == 4
            found = actions_of(batch, tokenizer)
            assert all(text == p * (3 + 37 * (ord(p) % 3)) + "<eos>"
                       for p, (text, _) in found.items())  # fmt: skip
            seen |= found
        carried.append([item["index"] for item in collector.carried])
    state = collector.state_dict()
    collector.close()
    return seen, stream.n, carried, state


def test_partial_rollouts_of_two_drivers_lose_and_repeat_nothing(tmp_path):
    path = tmp_path / "env.py"
    path.write_text(DIGITS)
    (seen, n_drawn, carried, _), (_, n_other, carried_other, _) = run_on_ranks(
        2, partial_on_rank, path, 4
    )
    assert len(seen) == len(set(seen)) == 16
    assert n_drawn == n_other and carried == carried_other  # the same books on both ranks
    assert sorted([ord(p) - ord("a") for p in seen] + carried[-1]) == list(range(n_drawn))


@pytest.mark.parametrize("numbers", [(1, 1), (2, 2), (1, 2), (2, 1)])
def test_unfinished_samples_go_on_in_another_process(tmp_path, numbers):
    """Of as many drivers or of others: nothing lost, nothing twice, what is written is kept."""
    path = tmp_path / "env.py"
    path.write_text(DIGITS)
    first = run_on_ranks(numbers[0], partial_on_rank, path, 2)
    states = [torch_saved(state, tmp_path) for *_, state in first]
    seen, n_drawn, carried, _ = first[0]
    begun = [group for state in states for group in state["carried"]]
    assert [group["index"] for group in begun] == carried[-1]
    cut = [
        chr(ord("a") + group["index"])
        for group in begun
        for sample in group["samples"]
        if not sample["ended"] and sample["written"]["token_ids"]
    ]
    assert cut
    rest = run_on_ranks(numbers[1], partial_on_rank, path, 4, 3, n_drawn, states)
    more, n_drawn, carried, _ = rest[0]
    assert not seen.keys() & more.keys()
    assert sorted([ord(p) - ord("a") for p in seen | more] + carried[-1]) == list(range(n_drawn))
    assert {min(more[prompt][1]) for prompt in cut if prompt in more} <= {0, 1}
    assert any(max(more[prompt][1]) >= 2 for prompt in cut if prompt in more)


def torch_saved(state, folder):
    """As a checkpoint gives it back."""
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def test_a_sample_whose_environment_keeps_an_object_begins_again(tmp_path):
    sample = Sample(3, 1, born=(2, 3), state="x", extra_info={"game": object()}, prompt="x")
    assert Sample.from_state_dict(0, sample.state_dict()) == Sample(0, 1, born=(2, 3))
    sample.extra_info = {"game": [1, (2.0, None)]}
    again = Sample.from_state_dict(3, torch_saved(sample.state_dict(), tmp_path))
    assert again == sample and again.extra_info is not sample.extra_info


# ------------------------------------------------------------------------ ages


def test_staleness_is_the_mean_over_action_tokens():
    batch = {
        "action_mask": torch.tensor([[False, True, True], [False, True, False]]),
        "weight_versions": torch.tensor([[-1, 3, 4], [-1, 5, -1]]),
    }
    assert staleness(batch, 5) == 1.0
    assert staleness(batch | {"action_mask": torch.zeros(2, 3, dtype=torch.bool)}, 5) == 0.0


# ------------------------------------------------------------------------ the end


def test_close_ends_everything_at_any_time(make, byte_tokenizer):
    engine = Typist(lambda prompt: prompt * 150, byte_tokenizer, EOS)
    engine.text = lambda prompt: prompt * (2 if prompt == "a" else 150)
    collector = make(DIGITS, engine, PARTIAL)
    collector.collect_step(Stream(text_items("abcdef", byte_tokenizer)), 1, 1)
    assert len(collector.carried) == 2
    thread = collector._loop._thread
    collector.close()
    collector.close()
    assert engine.log[0] == "start" and engine.log[-1] == "close" and not thread.is_alive()


def test_an_engine_that_does_not_start_is_closed(make):
    class Broken(ScriptedEngine):
        async def start(self, settled=None):
            raise EngineError("no GPU")

    engine = Broken(letter)
    with pytest.raises(EngineError, match="no GPU"):
        make(LAST, engine)
    assert engine.log == ["close"]
