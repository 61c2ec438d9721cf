"""Log-probabilities kept for each row, and the KL that KTO takes, against plain transformers."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from RL2.datasets import collate
from RL2.trainer.references import KeptReferences, MismatchKL, Resumable
from RL2.workers import ShardedModel
from tests.ranks import run_on_ranks
from tests.workers.test_actor import actor_config, make_model

FIELDS = {"ref_logps": "logps"}
# prompts and answers, all of different lengths
TEXTS = [([5, 6], [7, 8, 9]), ([10], [11, 12]), ([13, 14, 15], [16]), ([17], [18, 19, 20, 21])]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy, and a reference that is far from it."""
    folder = tmp_path_factory.mktemp("models")
    model = AutoModelForCausalLM.from_pretrained(make_model(folder / "policy"))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder / "reference")
    return str(folder / "policy"), str(folder / "reference")


def batch_of(*texts, **fields):
    masks = [[False] * len(prompt) + [True] * len(answer) for prompt, answer in texts]
    return (
        collate(
            [
                {"token_ids": [*prompt, *answer], "action_mask": mask}
                for (prompt, answer), mask in zip(texts, masks, strict=True)
            ]
        )
        | fields
    )


def logps(folder, prompt, answer):
    """Of each token of the answer, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0] / 0.9
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return rows.gather(-1, torch.tensor(answer)[:, None])[:, 0]


def frozen(folder):
    return ShardedModel(actor_config(folder), torch.device("cpu"))


# ---------------------------------------------------------------- kept references


def ask(folder, batches, origins=("one",) * 2):
    """What it says of each batch, and how many rows each forward took. After the first one a
    checkpoint is written, which another one goes on from."""
    model, counts = frozen(folder), []
    annotate = model.annotate

    def counted(batch, fields):
        counts.append(len(batch["states"]))
        return annotate(batch, fields)

    model.annotate = counted
    first = KeptReferences(model, origins[0])
    found = [first(batches[0], FIELDS)["ref_logps"]]
    second = KeptReferences(model, origins[1])
    second.load_state_dict(first.state_dict())
    found += [second(batch, FIELDS)["ref_logps"] for batch in batches[1:]]
    return found, counts


def check(found, batch, folder, texts):
    for values, mask, text in zip(found, batch["action_mask"], texts, strict=True):
        torch.testing.assert_close(
            values[mask].double(), logps(folder, *text), rtol=1e-5, atol=1e-6
        )
        assert not values[~mask].any()


def test_each_row_is_looked_at_once(models):
    """In any order, company and padding, and after a checkpoint."""
    folder, (a, b, c, d) = models[1], TEXTS
    texts = [[a, b, c], [b], [c, d, a]]
    batches = [batch_of(*one) for one in texts]
    ((found, counts),) = run_on_ranks(1, ask, folder, batches)
    assert counts == [3, 1]
    for values, batch, own in zip(found, batches, texts, strict=True):
        check(values, batch, folder, own)


def test_rows_that_are_almost_alike(models):
    """The last token alone differs, or what is learned of the same tokens."""
    texts = [([5, 6], [7, 8]), ([5, 6], [7, 9]), ([5], [6, 7, 8]), ([5, 6, 7], [8])]
    ((found, counts),) = run_on_ranks(1, ask, models[1], [batch_of(*texts), batch_of(*texts)])
    assert counts == [4]
    check(found[1], batch_of(*texts), models[1], texts)


def test_those_of_another_reference_are_not_taken(models):
    batch = batch_of(*TEXTS)
    ((_, counts),) = run_on_ranks(1, ask, models[1], [batch, batch], ("one", "another"))
    assert counts == [4, 4]


class Source:
    def load_state_dict(self, states):
        self.states = states


def test_a_position_has_them_on_the_first_rank(models):
    def go_on(folder):
        model, batch = frozen(folder), batch_of(*TEXTS)
        kept, other, source = KeptReferences(model), KeptReferences(model), Source()
        expected = kept(batch, FIELDS)["ref_logps"]
        state = Resumable(source, kept).complete({"row": 3})
        Resumable(source, other).load_state_dict([state, {"row": 4}])
        model.annotate = None  # it is not asked again
        return source.states, torch.equal(other(batch, FIELDS)["ref_logps"], expected)

    assert run_on_ranks(1, go_on, models[1]) == [([{"row": 3}, {"row": 4}], True)]


# ---------------------------------------------------------------- the KL of unrelated answers


def mismatch(policy, reference, batch, max_length):
    found = MismatchKL(frozen(policy), frozen(reference).annotate, max_length)(batch, {})
    return found["mismatch_kl"]


def expected_kl(policy, reference, texts, max_length):
    """Each prompt with the answer before it."""
    sums = []
    for (prompt, _), (_, answer) in zip(texts, [texts[-1], *texts[:-1]], strict=True):
        answer = answer[: max_length - len(prompt)]
        sums.append((logps(policy, prompt, answer) - logps(reference, prompt, answer)).sum())
    return torch.stack(sums).mean().item()


@pytest.mark.parametrize("max_length", [64, 4])
def test_the_mean_log_ratio_of_each_prompt_with_the_answer_before(models, max_length):
    policy, reference = models
    expected = expected_kl(policy, reference, TEXTS, max_length)
    batch = batch_of(*TEXTS)
    for models in ((policy, reference), (reference, policy)):
        (found,) = run_on_ranks(1, mismatch, *models, batch, max_length)
        assert found.shape == batch["action_mask"].shape
        sign = 1 if models[0] == policy else -1
        assert found.unique().tolist() == pytest.approx([max(0.0, sign * expected)], rel=1e-5)
    assert abs(expected) > 0.1


def test_of_pairs_the_chosen_ones_come_first(models):
    policy, reference = sorted(models, reverse=expected_kl(*models, TEXTS, 64) < 0)
    a, b, c, d = TEXTS
    expected = expected_kl(policy, reference, TEXTS, 64)
    batch = batch_of(a, c, b, d, chosen=torch.tensor([True, False, True, False]))
    (found,) = run_on_ranks(1, mismatch, policy, reference, batch, 64)
    assert found[0, 0].item() == pytest.approx(expected, rel=1e-5) and expected > 0


def test_of_one_prompt_there_is_none(models):
    batch = batch_of(*TEXTS) | {"group_ids": torch.zeros(4, dtype=torch.int64)}
    (found,) = run_on_ranks(1, mismatch, *models, batch, 64)
    assert not found.any()
