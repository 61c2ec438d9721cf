import pytest
import torch

from RL2.algorithms import resolve_loss
from RL2.algorithms.losses.selection import (
    clip_cov,
    covariances,
    entropy_80_20,
    highest_covariances,
    highest_entropies,
    kl_cov,
    some_between,
)
from RL2.runtime.errors import ConfigError
from tests.algorithms.losses.support import extremes, gradient, near_policies

MASK = torch.tensor([[False, True, True, True], [True, True, False, False]])
LOGPS = torch.tensor([[9.0, -1.0, -3.0, -2.0], [-4.0, -5.0, 9.0, 9.0]])
ADVANTAGES = torch.tensor([[9.0, 2.0, 2.0, 2.0], [-3.0, -3.0, 9.0, 9.0]])
# logps - mean: 2 0 1 | -1 -2; A - mean: 2 2 2 | -3 -3
COVARIANCES = [4.0, 0.0, 2.0, 3.0, 6.0]


def test_covariances_by_hand():
    for shift in (0.0, 5.0):
        found = covariances(LOGPS - shift, ADVANTAGES + shift, MASK)
        assert found.tolist() == pytest.approx(COVARIANCES)


def test_the_highest_covariances():
    found = highest_covariances(LOGPS, ADVANTAGES, MASK, share=0.4)
    assert found.tolist() == [[0, 1, 0, 0], [0, 1, 0, 0]]
    least = highest_covariances(LOGPS, ADVANTAGES, MASK)  # 2e-3 of 5, but one at least
    assert least.tolist() == [[0, 0, 0, 0], [0, 1, 0, 0]]
    assert torch.equal(highest_covariances(LOGPS, ADVANTAGES, MASK, share=1.0).bool(), MASK)


def test_some_between():
    def drawn(**options):
        found = some_between(LOGPS, ADVANTAGES, MASK, **options)
        assert not found[~MASK].any()
        return found[MASK].tolist()

    assert drawn(share=1.0) == [1, 0, 1, 1, 0]  # 1 < 4, 2, 3 < 5
    assert drawn(share=1.0, min_covariance=2.5, max_covariance=9.0) == [1, 0, 0, 1, 1]
    two = drawn(share=0.4)
    assert sum(two) == 2 and two[1] == two[4] == 0 and two == drawn(share=0.4)
    assert sum(drawn()) == 1
    assert sum(drawn(min_covariance=7.0, max_covariance=9.0)) == 0


def test_which_are_drawn_is_chance():
    """Each of 60 eligible tokens about as often as any other."""
    counts = torch.zeros(60)
    for n in range(60, 360):  # another number of tokens, another seed
        logps = torch.zeros(1, n)
        logps[0, :30], logps[0, 30:60] = 2.0, -2.0
        advantages = logps.sign()
        counts += some_between(logps, advantages, torch.ones(1, n).bool(), share=6 / n)[0, :60]
    assert 290 * 5.9 < counts.sum() <= 300 * 6
    assert counts.min() > 10 and counts.max() < 52  # 30 expected, 5.2 off


def test_the_highest_entropies():
    entropy = torch.tensor([[9.0, 0.1, 0.5, 0.3], [0.2, 0.5, 9.0, 9.0]])
    found = highest_entropies(entropy, MASK, share=0.6)
    assert found.tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]
    # equal ones are selected together
    assert highest_entropies(entropy, MASK).tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]


@pytest.mark.parametrize("share", [0.07, 0.2, 0.29, 0.5, 1.0])
def test_entropies_from_the_quantile_on(share):
    for n in range(1, 40):
        entropy = torch.rand(1, n, dtype=torch.float64).argsort().double()
        wanted = entropy >= entropy.quantile(1 - share) - 1e-9
        assert torch.equal(highest_entropies(entropy, entropy >= 0, share=share).bool(), wanted)


@pytest.mark.parametrize("share", [0.0, 1.1, -1.0])
def test_a_share_out_of_range(share):
    for select in (some_between, highest_covariances):
        with pytest.raises(ValueError, match=f"share={share}: must be above 0 and at most 1"):
            select(LOGPS, ADVANTAGES, MASK, share=share)


def test_bounds_with_nothing_between_them():
    with pytest.raises(ValueError, match="min_covariance=2.0: must be below max_covariance=2.0"):
        some_between(LOGPS, ADVANTAGES, MASK, min_covariance=2.0, max_covariance=2.0)


def test_losses_by_hand():
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5])
    logps, old = ratio.log(), torch.zeros(4)
    advantages, selected = torch.tensor([1.0, 1.0, 2.0, 2.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    given = logps, old, advantages, selected
    losses, metrics = clip_cov(*given, clip_low=0.2, clip_high=0.2)
    torch.testing.assert_close(losses, torch.tensor([-1.2, 0, -1.0, 0]))
    # as in the authors' runs, without a clip up to a ratio of 2
    torch.testing.assert_close(clip_cov(*given)[0], torch.tensor([-1.5, 0, -1.0, 0]))
    assert metrics["clip_ratio"].tolist() == [1, 1, 0, 0]
    torch.testing.assert_close(entropy_80_20(*given)[0], torch.tensor([0, -1.2, 0, -1.0]))
    assert entropy_80_20(*given)[1]["clip_ratio"].tolist() == [0, 1, 0, 0]
    losses, metrics = kl_cov(*given, kl_weight=2.0)
    d = logps.abs()
    torch.testing.assert_close(
        losses, torch.stack([-ratio[0], 2 * d[1] - 1.5, -2 * ratio[2], 2 * d[3] - 1.0])
    )
    assert metrics["selected"] is selected
    found = gradient(lambda x: kl_cov(x, *given[1:], kl_weight=2.0), logps)
    torch.testing.assert_close(found, torch.tensor([-1.5, -1.5 + 2, -1.0, -1.0 - 2]))


@pytest.mark.parametrize("loss", [clip_cov, kl_cov, entropy_80_20])
def test_gradients_and_extremes(loss):
    logps, old_logps, advantages = near_policies()
    selected = (torch.arange(len(logps)) % 2).double()
    call = lambda x: loss(x, old_logps, advantages, selected)[0]  # noqa: E731
    leaf = logps.clone().requires_grad_()
    assert torch.autograd.gradcheck(call, leaf, eps=1e-6, atol=1e-8, rtol=1e-6)
    wide, old, a = extremes()
    for chosen in (torch.zeros_like(wide), torch.ones_like(wide)):
        call = lambda x: loss(x, old, a, chosen)  # noqa: B023, E731
        assert call(wide)[0].isfinite().all() and gradient(call, wide).isfinite().all()


def test_options_go_to_both_functions():
    loss = resolve_loss({"name": "clip_cov", "share": 1.0, "max_covariance": 3.5, "clip_low": 0.5})
    batch = {"old_logps": LOGPS, "advantages": ADVANTAGES, "action_mask": MASK}
    assert loss.selection(batch)["selections"][MASK].tolist() == [0, 0, 1, 1, 0]
    assert loss.function.keywords == {"clip_low": 0.5}
    assert loss.selection.fields == {name: name for name in loss.selection.inputs}
    assert resolve_loss({"name": "entropy_80_20"}).selection.fields["entropy"] == "old_entropy"
    with pytest.raises(ConfigError, match="actor.loss.shaer=1: no option of .*did you mean share?"):
        resolve_loss({"name": "kl_cov", "shaer": 1})
    with pytest.raises(ConfigError, match=r"share=2: must be above 0 and at most 1 \(selection.py"):
        resolve_loss({"name": "kl_cov", "options": {"share": 2}})


MINE = """
def mine(logps, selected, *, scale=1.0):
    return -scale * logps * selected

def likely(old_logps, action_mask, *, above=-1.0):
    return (old_logps > above).float()

def unselected(logps, selected):
    return -logps * selected

def short(old_logps):
    return old_logps.sum(-1)

mine.select = likely

def wrong(logps, selected):
    return -logps * selected
wrong.select = short
"""


def test_a_loss_of_your_own_may_select(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    own = {"import_path": f"{tmp_path / 'mine.py'}:mine", "options": {"above": -2.0, "scale": 3}}
    loss = resolve_loss(own)
    batch = {"old_logps": LOGPS, "action_mask": MASK}
    assert loss.selection(batch)["selections"][MASK].tolist() == [1, 0, 0, 0, 0]
    given = {"logps": torch.tensor([-1.0, -2.0]), "selected": torch.tensor([1.0, 0.0])}
    assert loss(given)[0].tolist() == [3, 0]
    for name, message in (
        ("unselected", "its parameter selected is neither a token statistic nor a batch field"),
        ("wrong", r"selections of 5 rows came back as \[5\], expected a tensor"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve_loss({"import_path": f"{tmp_path / 'mine.py'}:{name}"})
