from RL2.distributed.traffic import Traffic


def test_counts_by_name_until_asked():
    traffic = Traffic()
    traffic.add("scatter", 3)
    traffic.add("gather", 10)
    traffic.add("scatter", 4)
    metrics = traffic.pop()
    assert metrics == {"comm/scatter_bytes": 7.0, "comm/gather_bytes": 10.0}
    assert all(isinstance(value, float) for value in metrics.values())
    assert traffic.pop() == {}


def test_nothing_counts_while_paused():
    traffic = Traffic()
    traffic.add("scatter", 3)
    with traffic.paused():
        traffic.add("scatter", 4)
        traffic.add("gather", 5)
    assert traffic.pop() == {"comm/scatter_bytes": 3.0}
