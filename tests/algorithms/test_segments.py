"""Sequences, groups and pairs: their sums, what they are made of, and losses that are of them."""

from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from RL2.algorithms import resolve_loss
from RL2.algorithms.segments import (
    Pairs,
    Segments,
    add_up,
    check_segments,
    count,
    fault_of,
    kept_together,
    segments_of,
)
from RL2.runtime.errors import ConfigError

INDEX = torch.tensor([1, 0, 1, 1, 2])


def test_sums_and_means_of_sequences_with_their_gradients():
    sequences = Segments(INDEX, 3)
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    rows = [x[INDEX == i] for i in range(3)]
    assert len(sequences) == 3 and sequences.sizes.tolist() == [1, 3, 1]
    torch.testing.assert_close(sequences.sum(x), torch.stack([row.sum() for row in rows]))
    torch.testing.assert_close(sequences.mean(x), torch.stack([row.mean() for row in rows]))
    assert torch.autograd.gradcheck(lambda x: sequences.mean(x).square(), x)
    spread = sequences.spread(torch.tensor([1.0, 2.0, 3.0], requires_grad=True))
    assert spread.tolist() == [2, 1, 2, 2, 3] and spread.requires_grad


def test_sums_are_added_up_in_float64_and_come_as_float32():
    x = torch.full((100_000,), 0.1).index_fill(0, torch.tensor([0]), 1e6)
    exact = x.double().sum().float()
    assert Segments(torch.zeros(len(x), dtype=torch.int64), 1).sum(x) == exact
    assert Segments(INDEX, 3).sum(torch.ones(5, dtype=torch.bool)).tolist() == [1.0, 3.0, 1.0]
    assert Segments(INDEX, 3).sum(torch.ones(5).half()).dtype == torch.float32


def test_pairs_are_chosen_less_rejected_and_a_side_without_tokens_is_0():
    pairs = Pairs(torch.tensor([0, 1, 1, 2]), torch.tensor([True, False, True, False]), 3)
    x = torch.tensor([5.0, 2.0, 3.0, 7.0], requires_grad=True)
    assert pairs.chosen(x).tolist() == [5, 3, 0] and pairs.rejected(x).tolist() == [0, 2, 7]
    assert pairs.difference(x).tolist() == [5, 1, -7] and pairs.sum(x).tolist() == [5, 5, 7]
    pairs.difference(x).sum().backward()
    assert x.grad.tolist() == [1, -1, 1, -1]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("sequences.sum(logps[:2])", "sequences.sum takes one value per token, [7], and was given"),
        ("sequences.mean(1.0)", "sequences.sum takes one value per token, [7], and was given f"),
        ("sequences.spread(logps)", "sequences.spread takes one value per sequence, [4], and was"),
        ("pairs.difference(logps)", "pairs.chosen takes one value per sequence, [4], and was g"),
    ],
)
def test_values_of_something_else_are_refused_with_the_line(tmp_path, call, said):
    with pytest.raises(ConfigError) as caught:
        resolved(tmp_path, f"def f(logps, sequences, pairs):\n    return {call}")
    assert said in str(caught.value) and "(my_loss.py:2)" in str(caught.value)


ROWS = {
    "sample_ids": torch.tensor([7, 7, 3, 5, 9]),
    "group_ids": torch.tensor([1, 1, 0, 1, 0]),
    "pair_ids": torch.tensor([4, 4, 2, 2, 4]),
    "chosen": torch.tensor([1, 1, 0, 1, 0]),
}


def test_what_belongs_together_is_read_from_the_rows():
    row = torch.tensor([0, 0, 1, 2, 4])  # row 3, sample 5, has no action token
    segments = segments_of(row, ROWS, ("groups", "pairs"), "cpu")
    sequences, groups, pairs = (segments[name] for name in ("sequences", "groups", "pairs"))
    assert (sequences.n, sequences.index.tolist()) == (3, [1, 1, 1, 0, 2])  # samples 3, 7, 9
    assert (groups.n, groups.index.tolist()) == (2, [0, 1, 0])
    assert (pairs.n, pairs.index.tolist()) == (2, [0, 1, 1])
    assert pairs.is_chosen.tolist() == [False, True, False]
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    of = {kind: add_up(weights, kind, segments).tolist() for kind in ("tokens", *segments)}
    assert of == {
        "tokens": weights.tolist(), "sequences": [4, 6, 5], "groups": [9, 6], "pairs": [4, 11],
    }  # fmt: skip
    mask = torch.tensor([[1, 1], [1, 0], [1, 0], [0, 0], [1, 0]]).bool()
    assert [count(ROWS | {"action_mask": mask}, kind) for kind in of] == [5, 3, 2, 2]
    none = segments_of(row[:0], {name: x[:0] for name, x in ROWS.items()}, ("pairs",), "cpu")
    assert [len(one) for one in none.values()] == [0, 0]


def test_rows_that_are_kept_together():
    batch = {
        "sample_ids": torch.tensor([5, 5, 1, 2, 3, 4]),
        "group_ids": torch.tensor([9, 9, 8, 9, 7, 7]),
        "pair_ids": torch.tensor([0, 0, 1, 2, 1, 2]),
    }
    assert kept_together(batch, ()).tolist() == [0, 0, 1, 2, 3, 4]
    assert kept_together(batch, ("groups",)).tolist() == [0, 0, 1, 0, 2, 2]
    assert kept_together(batch, ("pairs",)).tolist() == [0, 0, 1, 2, 1, 2]
    # By a group to a pair to a group.
    assert kept_together(batch, ("groups", "pairs")).tolist() == [0] * 6


BATCH = {
    "sample_ids": torch.tensor([0, 0, 1, 2, 3]),
    "group_ids": torch.tensor([6, 6, 6, 8, 8]),
    "lengths": torch.tensor([5, 4, 3, 2, 6]),
}
PAIRS = {"pair_ids": torch.tensor([3, 3, 3, 5, 5]), "chosen": torch.tensor([1, 1, 0, 0, 1]).bool()}
FAULTS = [
    (("sequences",), {}, 9, None),
    (("sequences", "groups"), {}, 12, None),
    (("sequences", "pairs"), PAIRS, 12, None),
    (("sequences",), {}, 8, "takes sequences whole, but the sample 0 has 9 tokens and a micro-ba"),
    (("groups",), {}, 11, "takes groups whole, but the group 6 has 12 tokens and a micro-batch 11; "
     "raise actor.max_length_per_device or actor.sp_size, whose product that is"),
    (("pairs",), PAIRS, 11, "takes pairs whole, but the pair 3 has 12 tokens"),
    (("pairs",), {}, 99, "names pairs, but this run's batches have no pair_ids and chosen; use a"),
    (("pairs",), {"pair_ids": PAIRS["pair_ids"]}, 99, "have no chosen; use a source that gives"),
    (("pairs",), PAIRS | {"pair_ids": torch.tensor([3, 3, 3, 3, 5])}, 99,
     "the pair 3 has 2 rejected samples; give every pair one that was chosen and one that"),
    (("pairs",), PAIRS | {"chosen": torch.zeros(5).bool()}, 99, "pair 3 has 0 chosen samples"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "fields", "max_length", "said"), FAULTS)
def test_what_a_batch_cannot_give_is_named(names, fields, max_length, said):
    fault = fault_of(BATCH | fields, names, max_length)
    assert fault is None if said is None else said in fault


# ------------------------------------------------------------- losses that name them, in a trial

GSPO = """def f(logps, old_logps, advantages, sequences):
    ratio = sequences.mean(logps - old_logps).exp()
    return -sequences.mean(advantages) * ratio, {"ratio": ratio}"""
DPO = """from torch.nn.functional import logsigmoid
def f(logps, ref_logps, sequences, pairs, *, beta=0.1):
    margin = pairs.difference(sequences.sum(logps - ref_logps))
    return -logsigmoid(beta * margin), {"margin": margin}"""
OF_GROUPS = """def f(logps, rewards, sequences, groups):
    return -groups.mean(sequences.mean(logps * rewards))"""
SPREAD = """def f(logps, sequences):
    return logps * sequences.spread(sequences.mean(logps))"""


def resolved(tmp_path, body):
    file = tmp_path / "my_loss.py"
    file.write_text(f"{body}\n")
    return resolve_loss({"name": None, "import_path": f"{file}:f"})


@pytest.mark.parametrize(
    ("body", "kind", "segments", "multiplied"),
    [
        (GSPO, "sequences", ("sequences",), False),
        (SPREAD, "tokens", ("sequences",), True),
        (OF_GROUPS, "groups", ("sequences", "groups"), False),
        (DPO, "pairs", ("sequences", "pairs"), False),
        (
            "def f(logps, sequences): return -sequences.sum(logps)",
            "sequences",
            ("sequences",),
            True,
        ),
        ("def f(logps): return -logps", "tokens", (), True),
    ],
)
def test_a_loss_shows_what_it_is_of(tmp_path, body, kind, segments, multiplied, caplog):
    loss = resolved(tmp_path, body)
    assert (loss.kind, loss.segments, loss.is_multiplied) == (kind, segments, multiplied)
    assert caplog.messages == []


WRONG = [
    (
        "def f(logps, sequences): return -logps.sum()",
        "on seven ordinary tokens, losses of 7 tokens or 4 sequences came back as [], expected a "
        "tensor [7] or [4]; return one value per token or sequence, without averaging",
    ),
    (
        "def f(logps, sequences, pairs): return -sequences.sum(logps)[:3]",
        "losses of 7 tokens, 4 sequences or 2 pairs came back as [3], expected a tensor [7], [4] "
        "or [2]; return one value per token, sequence or pair, without averaging",
    ),
    (
        "def f(logps, sequences): return -sequences.sum(logps), {'x': logps}",
        "x of 4 sequences came back as [7], expected a tensor [4]; return one value per sequence",
    ),
    (
        "def f(logps, sequences): return sequences.mean(logps.detach())",
        "its losses have no gradient; compute them from logps without detaching",
    ),
    (
        "def f(logps, sequences):\n    return -sequences.sum(logps).abs().sub(9).log()",
        "its losses are [nan, nan, nan, nan] (my_loss.py:2, log)",
    ),
    (
        "def f(logps, sequence): return -logps",
        "its parameter sequence is neither a token statistic nor a batch field; did you mean "
        "sequences? use logps, ",
    ),
    ("def f(sequences): return sequences.sizes", "takes no token statistic, so nothing can be"),
]


@pytest.mark.parametrize(("body", "said"), WRONG)
def test_a_loss_of_sequences_that_cannot_train_is_found(tmp_path, body, said):
    with pytest.raises(ConfigError) as caught:
        resolved(tmp_path, body)
    assert said in str(caught.value) and "\n" not in str(caught.value)


DEPENDS = {
    "sequence": "def f(logps, sequences):\n    x = sequences.mean(logps)\n    return x.mean() - x",
    "group": "def f(logps, sequences, groups):\n    x = groups.mean(sequences.mean(logps))\n"
    "    return x.mean() - x",
    "pair": "def f(logps, sequences, pairs):\n    x = pairs.difference(sequences.mean(logps))\n"
    "    return x.mean() - x",
}


@pytest.mark.parametrize("what", DEPENDS)
def test_a_loss_that_looks_beyond_its_own_is_warned_of(tmp_path, what, caplog):
    assert resolved(tmp_path, DEPENDS[what]).kind == f"{what}s"
    (line,) = caplog.messages
    assert f"the loss of a {what} depends on the others that it is called with" in line


# ------------------------------------------------------------------- what a run cannot give them

FITS = {"train_data": {"responses_per_prompt": 8}, "actor": {"max_length_per_device": 400},
        "rollout": {"train_sampling_params": {"max_new_tokens": 100}}}  # fmt: skip
ROLLOUTS = ("group_ids", "llm_logps", "advantages")
REFUSED = [
    (DPO, {}, ROLLOUTS, "names pairs, which trainer.source=rollouts does not bring (pair_ids, cho"),
    (DPO, {"actor": {"tis_coef": 2.0}}, (*ROLLOUTS, "pair_ids", "chosen"),
     "actor.tis_coef=2.0: has no effect with the loss f, which returns one value per pair; set it"),
    (OF_GROUPS, {"actor": {"kl": {"coef": 0.1, "type": "reward"}}}, ROLLOUTS,
     "actor.kl.type=reward: has no effect with the loss f, which returns one value per group and "
     "does not read the advantages; use actor.kl.type=loss"),
    (OF_GROUPS, {}, ROLLOUTS, "actor.max_length_per_device=400: the loss f takes groups whole, and "
     "8 answers (train_data.responses_per_prompt) of up to 100 tokens are more than 400"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "changes", "brought", "said"), REFUSED)
def test_what_a_run_cannot_give_is_refused_before_it(tmp_path, body, changes, brought, said):
    config = OmegaConf.merge(FITS, {"trainer": {"source": "rollouts"}}, changes)
    loss = resolved(tmp_path, body)
    with pytest.raises(ConfigError) as caught:
        check_segments(config, loss, brought)
    assert said in str(caught.value)


def test_what_a_run_can_give_is_not_refused(tmp_path):
    config = OmegaConf.merge(FITS, {"actor": {"sp_size": 2, "tis_coef": 2.0}})
    gspo = resolved(tmp_path, GSPO)
    check_segments(config, gspo, ROLLOUTS)
    check_segments(OmegaConf.create({"actor": {}}), resolved(tmp_path, DPO), ("pair_ids", "chosen"))
    config.actor.tis_coef = 0.0
    check_segments(config, resolved(tmp_path, OF_GROUPS), ROLLOUTS)
    with pytest.raises(ConfigError, match="^actor.sp_size=2: the loss f draws random numbers"):
        check_segments(config, replace(gspo, draws=True), ROLLOUTS)
