"""Every token loss on data tokens ("Exploring Paths", section 4.4): `RL2.trainer.sft`."""

import inspect
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from RL2.algorithms import LOSSES
from RL2.ops import STATISTICS
from tests.trainer.support import N_ROWS, train, write_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def data(files):
    """(token ids, first position whose next token is learned) of each row."""
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    rows = [json.loads(line) for line in (files / "rows.jsonl").read_text().splitlines()]
    prompts, responses = (
        [tokenizer(row[key], add_special_tokens=False)["input_ids"] for row in rows]
        for key in ("prompt", "response")
    )
    pairs = zip(prompts, responses, strict=True)
    return [(p + r + [tokenizer.eos_token_id], len(p) - 1) for p, r in pairs]


def probabilities(model, data):
    """`[N, V]` at the data tokens, and those tokens `[N]`."""
    rows, tokens = [], []
    for ids, first in data:
        ids = torch.tensor(ids)
        rows.append(model(ids[None, :-1]).logits[0, first:].softmax(-1))
        tokens.append(ids[first + 1 :])
    return torch.cat(rows), torch.cat(tokens)


# The losses as they are defined, on whole distributions in float64.


def bernoulli_kl(q, p):
    return q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()


def nll(p, a):
    return -p.gather(-1, a[:, None])[:, 0].log()


def max_target_kl(p, a, detach=False):
    p_max = p.max(-1).values
    return bernoulli_kl(p_max.detach() if detach else p_max, p.gather(-1, a[:, None])[:, 0])


def fixed_target_kl(p, a, q):
    return bernoulli_kl(torch.tensor(q), p.gather(-1, a[:, None])[:, 0])


def rank_jsd(p, a, max_rank=8, detach=True):
    """Token by token: the sampled one goes to the front, those before it move back by one."""
    losses = []
    for row, token in zip(p, a.tolist(), strict=True):
        order = row.detach().argsort(descending=True).tolist()
        chain = [*order[: min(order.index(token), max_rank)], token]
        here, target = row[chain], row[[*chain[1:], chain[0]]]
        # the last above takes the token's probability, and the token that of the first
        target = target.detach() if detach else target
        m = (here + target) / 2
        losses.append(((here * (here / m).log()) + (target * (target / m).log())).sum() / 2)
    return torch.stack(losses)


CASES = {
    "nll": (nll, {"name": "nll"}),
    "max_target_kl": (max_target_kl, {"name": "max_target_kl"}),
    "max_target_kl, detached": (
        lambda p, a: max_target_kl(p, a, detach=True),
        {"name": "max_target_kl", "detach_target": "true"},
    ),
    "fixed_target_kl, every token": (
        lambda p, a: fixed_target_kl(p, a, 0.3),
        {"name": "fixed_target_kl", "target": 0.3, "gate": "false"},
    ),
    "rank_jsd": (rank_jsd, {"name": "rank_jsd"}),
    "rank_jsd, attached, capped": (
        lambda p, a: rank_jsd(p, a, max_rank=4, detach=False),
        {"name": "rank_jsd", "max_rank": 4, "detach_target": "false"},
    ),
}


@pytest.mark.parametrize("token_stats", ["naive", "tiled"])
@pytest.mark.parametrize("case", CASES)
def test_first_step_is_the_definition_on_whole_distributions(
    files, data, case, token_stats, tmp_path
):
    definition, options = CASES[case]
    changes = {f"actor__loss__{key}": value for key, value in options.items()}
    changes["actor__token_stats"] = token_stats
    (row,) = train(files, "sft", tmp_path, data__batch_size=N_ROWS, trainer__max_steps=1, **changes)

    model = AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float64)
    loss = definition(*probabilities(model, data)).mean()
    loss.backward()
    squares = sum(weight.grad.square().sum() for weight in model.parameters())
    assert loss > 1e-3
    assert row["actor/loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert row["actor/grad_norm"] == pytest.approx(squares.sqrt().item(), rel=1e-3)


def test_a_case_for_every_loss_that_needs_no_rollout():
    def of_statistics(loss) -> bool:
        parameters = inspect.signature(loss).parameters.values()
        return {p.name for p in parameters if p.kind is not p.KEYWORD_ONLY} <= {*STATISTICS}

    of_data = {name for name, loss in LOSSES.items() if of_statistics(loss)}
    assert {options["name"] for _, options in CASES.values()} == of_data


@pytest.mark.parametrize("name", ["max_target_kl", "rank_jsd"])
def test_greedy_losses_make_the_data_the_first_choice(files, data, name, tmp_path):
    def greedy(folder):
        with torch.no_grad():
            p, a = probabilities(AutoModelForCausalLM.from_pretrained(folder), data)
        return (p.argmax(-1) == a).float().mean().item()

    rows = train(
        files, "sft", tmp_path, actor__loss__name=name, actor__loss__detach_target="true",
        actor__lr="1e-2", trainer__n_epochs=20,
    )  # fmt: skip
    assert rows[-1]["actor/loss"] < 0.5 * rows[0]["actor/loss"]
    assert greedy(files / "model") < 0.1 and greedy(tmp_path / "final") > 0.25
