import pytest
import torch

from RL2.distributed import broadcast, gather, rank, scatter, sum_over_ranks
from RL2.distributed.comm import ScatterPlan
from tests.ranks import run_on_ranks


def make_batch(lengths):
    generator = torch.Generator().manual_seed(0)
    n_tokens = max(lengths)
    valid = torch.arange(n_tokens) < torch.tensor(lengths)[:, None]
    shape = (len(lengths), n_tokens)
    return {
        "states": torch.randint(1, 100, shape, generator=generator) * valid,
        "values": torch.rand(shape, generator=generator) * valid,
        "action_mask": (torch.rand(shape, generator=generator) < 0.5) & valid,
        "lengths": torch.tensor(lengths),
    }


def round_trip(lengths, max_length):
    batch = make_batch(lengths) if rank() == 0 else None
    micro_batches, plan = scatter(batch, ("states", "values", "action_mask"), max_length)
    total = sum_over_ranks(sum(m["values"].sum() for m in micro_batches))
    sizes = [len(m["states"]) for m in micro_batches]
    n_filler = sum(int((m["states"] == 0).sum()) for m in micro_batches)
    own_lengths = [m["lengths"].tolist() for m in micro_batches]
    dtypes = {name: field.dtype for name, field in micro_batches[0].items()}
    back = gather([m["values"] for m in micro_batches], plan)
    return total, sizes, own_lengths, dtypes, n_filler, back


CASES = [([5, 3, 9, 1, 7], 10), ([4], 8), ([8, 8, 8], 8)]


def all_cases():
    return [round_trip(*case) for case in CASES]


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_scatter_and_gather_give_the_batch_back(n_ranks):
    by_rank = run_on_ranks(n_ranks, all_cases)
    for i, (lengths, max_length) in enumerate(CASES):
        batch = make_batch(lengths)
        results = [cases[i] for cases in by_rank]
        assert torch.equal(results[0][-1], batch["values"])
        assert all(back is None for *_, back in results[1:])
        for total, sizes, own_lengths, dtypes, *_ in results:
            torch.testing.assert_close(total, batch["values"].sum())
            assert all(size <= max_length for size in sizes)
            assert sizes == [sum(pack) for pack in own_lengths]
            assert dtypes["states"] == torch.int64 and dtypes["action_mask"] == torch.bool
        # every rank runs the same number of micro-batches, and every token arrives once
        assert len({len(sizes) for _, sizes, *_ in results}) == 1
        n_filler = sum(result[-2] for result in results)
        assert sum(sum(sizes) for _, sizes, *_ in results) == sum(lengths) + n_filler


def test_an_empty_pack_is_one_filler_token():
    plan = ScatterPlan(packs=((0, 1), ()), lengths=(3, 2))
    assert plan.pack_size(plan.packs[0]) == 5
    assert plan.pack_size(()) == 1
    assert plan.of_rank(1, 2) == ((),)


def share_an_object():
    return broadcast({"a": [1, None]} if rank() == 0 else None)


def test_broadcast_gives_rank_0s_object_to_all():
    assert run_on_ranks(2, share_an_object) == [{"a": [1, None]}] * 2
