"""One line names what differs between two ranks."""

from RL2.distributed.same_start import Fact, difference, packed, unpacked

HOSTS = ["a", "a", "b"]


def facts(**values):
    return {key: Fact(value, "start all alike") for key, value in values.items()}


def test_alike():
    assert difference([facts(lr="1", seed="0"), facts(seed="0", lr="1")], HOSTS) is None
    assert difference([facts()], HOSTS) is None


def test_the_first_rank_and_key_that_differ():
    all_facts = [facts(lr="1", seed="0"), facts(lr="1", seed="0"), facts(lr="2", seed="5")]
    line = "lr: rank 0 on a has 1, rank 2 on b has 2 (and seed); start all alike"
    assert difference(all_facts, HOSTS) == line
    many = facts(**{f"k{i}": "1" for i in range(9)})
    assert "(and k1, k2, k3, k4, ...); " in difference([many, facts()], HOSTS)


def test_what_only_one_has():
    line = "TF32: rank 0 on a has none, rank 1 on a has 1; start all alike"
    assert difference([facts(), facts(TF32="1")], HOSTS) == line
    line = "TF32: rank 0 on a has 1, rank 1 on a has none; start all alike"
    assert difference([facts(TF32="1"), facts()], HOSTS) == line


def test_a_value_that_is_hidden_or_too_long_to_show():
    one, other = ({"url": Fact("***", "start all alike", digest)} for digest in "xy")
    line = "url: rank 0 on a has ***, rank 1 on a has a different one; start all alike"
    assert difference([one, other], HOSTS) == line
    # A rank that knows a secret shows less of the same value.
    assert difference([one, {"url": Fact("abc", "start all alike", "x")}], HOSTS) is None
    assert len(difference([facts(stop="x" * 5000), facts(stop="y")], HOSTS)) < 300


def test_facts_travel():
    some = {"url": Fact("***", "start all alike", "x")} | facts(lr="1")
    assert unpacked(packed(some)) == some
