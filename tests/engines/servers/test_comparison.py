"""What a server holds against what was published."""

import pytest

from RL2.engines.servers.comparison import first_difference

CHECKSUMS = {"model.embed_tokens.weight": 2**64 - 7, "q.weight": 11, "k.weight": 13, "n.weight": 5}
SIZES = {"model.embed_tokens.weight": 100, "q.weight": 8, "k.weight": 4, "n.weight": 2}


def parts(**changes):
    """What a server of one rank holds, keyed by the last name."""
    told = {
        "embedding": (("model.embed_tokens.weight",), 100, 2**64 - 7),
        "q": (("q.weight",), 8, 11),
        "k": (("k.weight",), 4, 13),
        "n": (("n.weight",), 2, 5),
    } | changes
    return [part for part in told.values() if part is not None]


def test_equal_weights_have_no_difference():
    assert first_difference(parts(), CHECKSUMS, SIZES) is None


def test_a_fused_parameter_that_cannot_be_cut_is_compared_as_a_sum():
    fused = parts(q=(("q.weight", "k.weight"), 12, 24), k=None)
    assert first_difference(fused, CHECKSUMS, SIZES) is None
    fused = parts(q=(("q.weight", "k.weight"), 12, 25), k=None)
    assert first_difference(fused, CHECKSUMS, SIZES) == "q.weight + k.weight differs"


def test_shards_add_up_and_copies_repeat():
    # n is whole on both workers, the rest is cut; sums wrap around at 2^64.
    first = parts(
        embedding=(("model.embed_tokens.weight",), 60, 3), q=(("q.weight",), 4, 1),
        k=(("k.weight",), 2, 6),
    )  # fmt: skip
    second = parts(
        embedding=(("model.embed_tokens.weight",), 40, 2**64 - 10), q=(("q.weight",), 4, 10),
        k=(("k.weight",), 2, 7),
    )  # fmt: skip
    assert first_difference(first + second, CHECKSUMS, SIZES) is None
    wrong = parts(**{"n": (("n.weight",), 2, 6), "embedding": second[0], "q": second[1]})
    wrong[2] = second[2]
    assert first_difference(first + wrong, CHECKSUMS, SIZES) == "n.weight differs"


def test_a_tied_head_is_compared_with_the_embedding():
    tied = parts(head=(("lm_head.weight",), 100, 2**64 - 7))
    assert first_difference(tied, CHECKSUMS, SIZES) is None
    stale = parts(head=(("lm_head.weight",), 100, 1))
    assert first_difference(stale, CHECKSUMS, SIZES) == "lm_head.weight differs"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": (("k.weight",), 4, 14)}, "k.weight differs"),
        ({"k": None}, "k.weight was published and is not in the server"),
        ({"x": (("x.weight",), 4, 1)}, "x.weight is in the server and was not published"),
        (
            {"k": (("k.weight",), 3, 13)},
            "k.weight has 3 elements in the server, and 4 were published",
        ),
        ({"k": (("k.weight",), 0, 0)}, "k.weight has 0 elements in the server"),
    ],
)
def test_a_difference_names_the_parameter(changes, message):
    assert first_difference(parts(**changes), CHECKSUMS, SIZES).startswith(message)
