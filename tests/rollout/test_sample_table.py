"""Samples as columns against the plain way: lists of samples, a row at a time."""

import json
import math
import random

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from RL2.datasets import collate
from RL2.distributed import rank
from RL2.distributed.traffic import Traffic
from RL2.engines.protocol import Completion
from RL2.rollout.sample_table import SampleTable, dump, gather_samples, summarise, to_batch
from RL2.rollout.samples import (
    NOT_THE_POLICY,
    Group,
    Sample,
    Turn,
    add_reward,
    extend,
    start_sequence,
)
from tests.ranks import run_on_ranks

N_RESPONSES = 4


def make_sample(position, response):
    """One to three turns in one or two sequences; some fail, some before their first turn."""
    draw = random.Random(f"{position}/{response}")
    sample = Sample(position, response, prompt=f"Frage {position}: 你好 🙂", answer={"n": position})
    if draw.random() < 0.15:
        sample.fail("lost\nits way", "env")
    if sample.error is None or draw.random() < 0.5:
        for turn in range(draw.randint(1, 3)):
            action = draw.choice(["", "ja", "né 🙂", "a\nb"])
            reason = draw.choice(["stop", "length"])
            # Group 2 has equal rewards; 0.1 is no sum of powers of two.
            reward = 0.1 if position == 2 else draw.choice([0.1, 0.7, -0.3])
            sample.turns.append(
                Turn(f"s{turn}", action, len(action), reason, reward, draw.random())
            )
        if position == 2:
            sample.turns = sample.turns[:1]
    for _ in range(draw.randint(1, 2) if sample.turns else draw.randint(0, 1)):
        n = draw.randint(1, 9)
        mask = [False] + [draw.random() < 0.5 for _ in range(n - 1)]
        sample.sequences.append(
            {
                "token_ids": [draw.randrange(200_000) for _ in range(n)],
                "action_mask": mask,
                "llm_logps": [-draw.expovariate(1.0) if m else 0.0 for m in mask],
                "rewards": [draw.random() if m else 0.0 for m in mask],
                "weight_versions": [draw.randrange(9) if m else NOT_THE_POLICY for m in mask],
            }
        )
    n, k = sum(sum(one["action_mask"]) for one in sample.sequences), len(sample.turns)
    for i, turn in enumerate(sample.turns):
        turn.length = n * (i + 1) // k - n * i // k
    return sample


def turns_of(sample):
    """The turn of each token of a sample's sequences but their first, -1 of no turn."""
    lengths = [turn.length for turn in sample.turns if turn.length]
    ids = iter([i for i, length in enumerate(lengths) for _ in range(length)])
    of_tokens = [
        [next(ids, 0) if m else -1 for m in one["action_mask"]] for one in sample.sequences
    ]
    return [torch.tensor(one[1:]).long() for one in of_tokens]


def make_samples(positions):
    samples = [make_sample(p, r) for p in positions for r in range(N_RESPONSES)]
    random.Random(len(samples)).shuffle(samples)
    return samples


# ------------------------------------------------------------------------ the plain way


def in_order(samples):
    return sorted(samples, key=lambda sample: (sample.position, sample.response))


def plain_batch(samples):
    rows = [(sample, one) for sample in samples for one in sample.sequences]
    batch = collate([{k: v for k, v in one.items() if k != "weight_versions"} for _, one in rows])
    versions = [torch.tensor(one["weight_versions"][1:]).long() for _, one in rows]
    turns = [row for sample in samples for row in turns_of(sample)]
    rewards = [torch.tensor(one["rewards"][1:], dtype=torch.float64) for _, one in rows]
    return batch | {
        "sample_ids": torch.tensor([s.position * N_RESPONSES + s.response for s, _ in rows]),
        "group_ids": torch.tensor([s.position for s, _ in rows]),
        "rewards": pad_sequence(rewards, True),
        "correct": torch.tensor([s.reward > 0 for s, _ in rows]),
        "turn_ids": pad_sequence(turns, True, -1),
        "weight_versions": pad_sequence(versions, True, NOT_THE_POLICY),
        "prompt_index": torch.tensor([s.index for s, _ in rows]),
    }


def plain_metrics(samples):
    def mean(values):
        return math.fsum(values) / len(samples)

    return {
        "train/n_samples": float(len(samples)),
        "train/score": mean(s.score for s in samples),
        "train/reward": mean(s.reward for s in samples),
        "train/avg_response_length": mean(s.length for s in samples),
        "train/length_clip_ratio": mean(
            any(turn.finish_reason == "length" for turn in s.turns) for s in samples
        ),
        "train/n_turns": mean(len(s.turns) for s in samples),
        "train/empty_actions": float(sum(not turn.action for s in samples for turn in s.turns)),
    }


def plain_record(sample):
    good = sample.error is None
    record = {
        "group": sample.position,
        "response_index": sample.response,
        "prompt": sample.prompt,
        "response": "".join(turn.action for turn in sample.turns),
        "score": sample.score if good else None,
        "reward": sample.reward if good else None,
        "length": sample.length,
        "finish_reason": sample.turns[-1].finish_reason if sample.turns else None,
        "n_turns": len(sample.turns),
    }
    if len(sample.turns) > 1:
        record["turns"] = [vars(turn) for turn in sample.turns]
    return record | ({} if good else {"error": sample.error}) | {"answer": sample.answer}


def same(batch, expected):
    assert list(batch) == list(expected)
    for name, field in expected.items():
        assert batch[name].dtype == field.dtype, name
        assert torch.equal(batch[name], field), name


# ------------------------------------------------------------------------ ranks


# Positions of each rank; some have nothing.
SPREADS = [[[0, 1, 2, 3, 4]], [[0, 2, 4], [1, 3]], [[], [0, 1, 2, 3, 4]], [[4, 1], [], [2, 0, 3]]]


def on_rank(spread, folder):
    traffic = Traffic()
    table = SampleTable.of(make_samples(spread[rank()]), lines=True)
    table = gather_samples(table, len(spread), None, traffic)
    n_bytes = traffic.pop()["comm/samples_bytes"]
    if table is None:
        return n_bytes
    table = table.sorted()
    dump(table, folder / "new" / "dump.jsonl")
    good = table.good()
    kept, ratio = good.without_equal_groups()
    batches = [to_batch(one, N_RESPONSES) for one in (good, kept)]
    return n_bytes, summarise(good, "train"), batches, ratio


@pytest.mark.parametrize("spread", SPREADS, ids=str)
def test_the_same_as_sample_by_sample(spread, tmp_path):
    results = run_on_ranks(len(spread), on_rank, spread, tmp_path)
    n_bytes, metrics, (batch, kept_batch), ratio = results[0]

    samples = in_order(sample for positions in spread for sample in make_samples(positions))
    good = [sample for sample in samples if sample.error is None]
    assert 0 < len(good) < len(samples)
    assert metrics == plain_metrics(good)  # to the last bit
    same(batch, plain_batch(good))
    same(kept_batch, plain_batch([sample for sample in good if sample.position != 2]))
    assert ratio == 1 / 5
    lines = "".join(json.dumps(plain_record(s), ensure_ascii=False) + "\n" for s in samples)
    assert (tmp_path / "new" / "dump.jsonl").read_bytes() == lines.encode()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["dump.jsonl"]

    expected = 0
    for positions in spread[1:]:
        sent = make_samples(positions)
        sequences = [one for sample in sent for one in sample.sequences]
        text = "".join(json.dumps(plain_record(s), ensure_ascii=False) + "\n" for s in sent)
        n_tokens = sum(len(one["token_ids"]) for one in sequences)
        one = 104 * len(sent) + 16 * len(sequences) + 21 * n_tokens + len(text.encode())
        expected += -(-one // 8) * 8
    # the table of sizes: five numbers of each rank, there and back to all
    n = len(spread)
    expected += (n - 1) * (n + 1) * 5 * 8
    assert n_bytes == expected and results[1:] == [expected] * (n - 1)


# ------------------------------------------------------------------------ edges


def test_nothing_is_nothing(tmp_path):
    table = SampleTable.of([], lines=True).sorted().good()
    assert summarise(table, "train") == {"train/n_samples": 0.0}
    assert to_batch(table, 4) is None
    kept, ratio = table.without_equal_groups()
    assert (len(kept), ratio) == (0, 0)
    dump(table, tmp_path / "empty.jsonl")
    assert (tmp_path / "empty.jsonl").read_bytes() == b""


def test_half_a_surrogate_pair_in_an_answer_is_written_down(tmp_path):
    dump(SampleTable.of([Sample(0, 0, answer="5\ud83d")], lines=True), tmp_path / "one.jsonl")
    assert json.loads((tmp_path / "one.jsonl").read_text("utf-8"))["answer"] == "5\ud83d"


@pytest.mark.parametrize("value", ['quo"ted-secret', "back\\slash-secret", "two-lines-\nof-secret"])
def test_a_secret_is_not_saved_by_its_escapes(tmp_path, monkeypatch, value):
    monkeypatch.setenv("JUDGE_PASSWORD", value)
    sample = Sample(0, 0, answer={"said": f"no: {value}!"}, error=f"refused {value}", cause="env")
    dump(SampleTable.of([sample], lines=True), tmp_path / "one.jsonl")
    row = json.loads((tmp_path / "one.jsonl").read_text())
    assert (row["answer"], row["error"]) == ({"said": "no: ***!"}, "refused ***")


def test_a_dumped_line_is_one_line_for_everybody(tmp_path):
    """Whatever an answer holds, also for `str.splitlines`."""
    answer = "".join(map(chr, [*range(0x100), 0x2028, 0x2029, 0x4E00]))
    assert len(answer.splitlines()) > 5
    samples = [Sample(0, i, answer=answer) for i in range(2)]
    dump(SampleTable.of(samples, lines=True), tmp_path / "two.jsonl")
    lines = (tmp_path / "two.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["answer"] for line in lines] == [answer] * 2
    assert "\u4e00" in lines[0]  # what can be read is left as it is


@pytest.mark.parametrize(
    ("rewards", "equal"),
    [
        (([0.3], [0.3]), True),
        (([0.1, 0.2], [0.3]), True),
        (([0.3], [math.nextafter(0.3, 1)]), True),
        (([0.1, 0.2, -0.3], [0.0]), True),
        (([-0.1, -0.2], [-0.3]), True),
        (([0.0], [1e-9]), False),
        (([1.0], [1.000001]), False),
        (([-1e-9], [1e-9]), False),
    ],
)
def test_groups_whose_rewards_are_equal_on_paper_teach_nothing(rewards, equal):
    """The table of the whole step and the count of each driver agree."""
    samples = [
        Sample(0, i, turns=[Turn("", "a", 1, "stop", reward, 0.0) for reward in of_turns])
        for i, of_turns in enumerate(rewards)
    ]
    kept, ratio = SampleTable.of(samples).without_equal_groups()
    assert (len(kept), ratio) == ((0, 1.0) if equal else (2, 0.0))
    group = Group(0, {}, samples)
    assert group.teaches(filtering=True) == (not equal) and group.teaches(filtering=False)
    for sample in samples:
        sample.fail("no answer", "env")
    assert not group.teaches(filtering=True) and not group.teaches(filtering=False)


def test_a_sum_that_is_zero_on_paper_is_no_correct_sample():
    """Its 5.6e-17 would be a whole step of an optimizer that normalises."""
    sequence = start_sequence([1, 2])
    for n, reward in enumerate((0.1, 0.2, -0.3)):
        extend(sequence, [3 + n], Completion([3 + n], [-1.0], "stop", [0]))
        add_reward(sequence, reward)
    turns = [Turn("", "a", 1, "stop", reward, 0.0) for reward in (0.1, 0.2, -0.3)]
    assert sum(turn.reward for turn in turns) > 0
    sample = Sample(0, 0, turns=turns, sequences=[sequence])
    batch = to_batch(SampleTable.of([sample]), 1)
    assert sample.reward == 0.0 and not batch["correct"].any()
    assert batch["rewards"].dtype == torch.float64 and batch["rewards"][0, 1] == 0.1


def test_a_sequence_with_a_column_too_short_is_refused():
    sample = next(s for s in make_samples(range(5)) if s.sequences)
    sample.sequences[0]["llm_logps"].pop()
    with pytest.raises(ValueError, match="does not have as many llm_logps as tokens"):
        SampleTable.of([sample])
