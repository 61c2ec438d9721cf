import random

import pytest
import torch

from RL2.distributed import Layout, ScatterPlan, broadcast, gather, rank, scatter, sum_over_ranks
from RL2.distributed.comm import concatenate_on_rank_0, whole_packs
from RL2.distributed.mesh import sequence_parallel_mesh
from RL2.distributed.traffic import Traffic
from RL2.ops import plan_packs
from tests.ranks import run_on_ranks

FIELDS = ("states", "values", "action_mask", "wide", "half", "top", "top_ids")
N_TOP = 3
# (dp, sp, tp)
SHAPES = [
    (1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (3, 1, 1), (1, 3, 1),
    (2, 2, 1), (2, 1, 2), (1, 2, 2), (4, 1, 1), (1, 4, 1), (1, 1, 4),
]  # fmt: skip


def make_batch(lengths, width=None):
    generator = torch.Generator().manual_seed(0)
    shape = (len(lengths), width or max(lengths))
    valid = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    return {
        "states": torch.randint(1, 100, shape, generator=generator) * valid,
        "values": torch.rand(shape, generator=generator) * valid,
        "action_mask": (torch.rand(shape, generator=generator) < 0.5) & valid,
        "wide": torch.randint(-(2**40), 2**40, shape, generator=generator) * valid,
        "half": torch.rand(shape, generator=generator).bfloat16() * valid,
        "top": torch.rand(*shape, N_TOP, generator=generator) * valid[..., None],
        "top_ids": (10 * torch.rand(*shape, N_TOP, generator=generator)).int() * valid[..., None],
        "lengths": torch.tensor(lengths),
    }


def random_lengths(seed):
    generator = random.Random(seed)
    return [generator.randint(1, 12) for _ in range(generator.randint(1, 14))]


CASES = [
    ([5, 3, 9, 1, 7], 10),
    ([4], 8),
    ([8, 8, 8], 8),
    ([3, 0, 2], 4),
    *((random_lengths(seed), 12 + seed) for seed in range(6)),
]


def layout_of(shape):
    dp, sp, tp = shape
    return Layout(world_size=dp * sp * tp, sp_size=sp, tp_size=tp)


def there_and_back(lengths, max_length, layout, width=None):
    batch = make_batch(lengths, width) if rank() == 0 else {"states": "ignored"}
    traffic = Traffic()
    micro_batches, plan = scatter(batch, FIELDS, max_length, layout, 0.01, traffic)
    backs = [
        gather([m[name] for m in micro_batches], plan, traffic)
        for name in ("values", "states", "top")
    ]
    return micro_batches, backs, traffic.pop()


def all_cases(shape):
    return [there_and_back(*case, layout_of(shape)) for case in CASES]


def expected_packs(batch, lengths, max_length, layout):
    """The whole padded packs, as lists of python numbers, and their lengths."""
    for pack in plan_packs(lengths, max_length * layout.sp_size, layout.dp_size, 0.01):
        n = sum(lengths[row] for row in pack)
        n_filler = -n % layout.sp_size if n else layout.sp_size
        flat = {
            name: [x for row in pack for x in batch[name][row, : lengths[row]].tolist()]
            + [0] * n_filler
            for name in FIELDS
        }
        for name in ("top", "top_ids"):
            flat[name] = [[0] * N_TOP if x == 0 else x for x in flat[name]]
        yield flat | {"lengths": [lengths[row] for row in pack] + [n_filler] * (n_filler > 0)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slices_are_those_of_the_packs_and_come_back(shape):
    layout = layout_of(shape)
    by_rank = run_on_ranks(layout.world_size, all_cases, shape)
    for i, (lengths, max_length) in enumerate(CASES):
        batch = make_batch(lengths)
        packs = list(expected_packs(batch, lengths, max_length, layout))
        for which, (micro_batches, backs, _) in enumerate(cases[i] for cases in by_rank):
            dp, sp, _ = layout.coordinates(which)
            own = packs[dp :: layout.dp_size]
            assert len(micro_batches) == len(own) == len(packs) // layout.dp_size
            for micro_batch, pack in zip(micro_batches, own, strict=True):
                n = len(pack["states"]) // layout.sp_size
                assert n <= max_length
                assert (type(micro_batch["start"]), micro_batch["start"]) == (int, sp * n)
                assert micro_batch["lengths"].tolist() == pack["lengths"]
                for name in FIELDS:
                    assert micro_batch[name].dtype == batch[name].dtype
                    assert micro_batch[name].tolist() == pack[name][sp * n :][:n]
            if which == 0:
                assert torch.equal(backs[0], batch["values"])
                assert torch.equal(backs[1], batch["states"])
                assert torch.equal(backs[2], batch["top"])
            else:
                assert backs == [None, None, None]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_counted(shape):
    layout = layout_of(shape)
    n_ranks = layout.world_size
    by_rank = run_on_ranks(n_ranks, all_cases, shape)
    for i, (lengths, _) in enumerate(CASES):
        shares = [sum(len(m["states"]) for m in cases[i][0]) for cases in by_rank]
        n_packs = len(by_rank[0][i][0]) * layout.dp_size
        # int32, float32, bool, int64, bfloat16, several float32 and int32; in multiples of 8
        width = -(-max(shares) * (4 + 4 + 1 + 8 + 2 + 2 * N_TOP * 4) // 8) * 8
        table = 8 * (2 + 3 * len(FIELDS)) + 8 * (2 * len(lengths) + n_packs)
        counted = sum(shares[layout.tp_size :: layout.tp_size])
        expected = {
            "comm/scatter_bytes": float((n_ranks - 1) * (width + table)),  # 0 for one rank
            "comm/gather_bytes": float(counted * (4 + 8 + 4 * N_TOP)),
        }
        for cases in by_rank:
            assert cases[i][2] == expected


def units_and_rows(shape):
    lengths, layout = [5, 3, 9, 1, 7], layout_of(shape)
    batch, units = None, None
    if rank() == 0:
        batch = make_batch(lengths) | {"row": torch.arange(5), "odd": torch.arange(5) % 2 == 1}
        units = torch.tensor([4, 0, 4, 0, 0])
    micro_batches, _ = scatter(batch, FIELDS, 14, layout, row_fields=("row", "odd"), units=units)
    group = None
    if layout.sp_size > 1:
        group = sequence_parallel_mesh("cpu", layout).get_group()
    return micro_batches, whole_packs(micro_batches, ("values", "action_mask"), group)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 3, 1), (1, 1, 2), (2, 2, 1)]
)
def test_rows_of_a_unit_share_a_pack_whose_rows_and_tokens_all_its_ranks_have(shape):
    layout, batch = layout_of(shape), make_batch([5, 3, 9, 1, 7])
    seen = []
    for which, (micro_batches, whole) in enumerate(
        run_on_ranks(layout.world_size, units_and_rows, shape)
    ):
        _, sp, tp = layout.coordinates(which)
        for micro_batch, pack in zip(micro_batches, whole, strict=True):
            rows = micro_batch["row"].tolist()
            assert rows in ([0, 2], [1, 3, 4], [0, 1, 2, 3, 4], [])
            assert micro_batch["odd"].tolist() == [row % 2 for row in rows]
            n = int(micro_batch["lengths"][: len(rows)].sum())
            for name, values in pack.items():
                flat = [
                    x for row in rows for x in batch[name][row, : batch["lengths"][row]].tolist()
                ]
                assert values.dtype == batch[name].dtype
                assert values.tolist() == flat + [0] * (len(values) - n)
                size = len(micro_batch[name])
                assert torch.equal(values[sp * size :][:size], micro_batch[name])
            seen += rows if sp == tp == 0 else []
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_a_batch_may_be_wider_than_its_rows():
    ((micro_batches, (back, *_), _),) = run_on_ranks(
        1, there_and_back, [3, 2], 8, Layout(), 7
    )  # as parts of a batch are
    assert micro_batches[0]["values"].shape == (5,)
    assert torch.equal(back, make_batch([3, 2], 7)["values"][:, :3])


def without_layout():
    batch = make_batch([5, 3, 9]) if rank() == 0 else None
    micro_batches, plan = scatter(batch, FIELDS, 10)
    total = sum_over_ranks(sum(m["values"].double().sum() for m in micro_batches))
    return total, plan.layout, gather([m["values"] * 2 for m in micro_batches], plan)


def test_data_parallel_without_a_layout():
    batch = make_batch([5, 3, 9])
    for which, (total, layout, back) in enumerate(run_on_ranks(3, without_layout)):
        torch.testing.assert_close(total, batch["values"].double().sum())
        assert layout == Layout(world_size=3)
        assert back is None if which else torch.equal(back, batch["values"] * 2)


def test_the_packs_of_a_turn_are_of_about_one_size():
    lengths = torch.tensor([9, 8, 7, 6, 5, 4, 3, 2])
    plan = ScatterPlan.make(lengths, 11, Layout(world_size=2))
    own, other = ([size for size, _, _ in plan.slices(which)] for which in (0, 1))
    assert len(own) == 2 and sum(own) == sum(other) == 22
    assert max(abs(a - b) for a, b in zip(own, other, strict=True)) <= 1


def concatenated(sizes):
    values = torch.full((sizes[rank()],), rank())
    return concatenate_on_rank_0(values, sizes)


@pytest.mark.parametrize("sizes", [[2], [1, 2], [0, 3], [2, 0], [0, 0]])
def test_each_rank_sends_what_it_has(sizes):
    results = run_on_ranks(len(sizes), concatenated, sizes)
    assert results[0].tolist() == [r for r, size in enumerate(sizes) for _ in range(size)]
    assert results[1:] == [None] * (len(sizes) - 1)


def share_an_object():
    return broadcast({"a": [1, None]} if rank() == 0 else None)


def test_broadcast_gives_rank_0s_object_to_all():
    assert run_on_ranks(2, share_an_object) == [{"a": [1, None]}] * 2
