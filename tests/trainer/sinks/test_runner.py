"""What the process of a sink reads."""

from RL2.trainer.sinks.runner import new_rows


def test_half_a_row_is_read_when_it_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    with path.open("rb") as file:
        assert [*new_rows(file)] == [{"step": 1}]
        with path.open("ab") as growing:
            growing.write(b'ep": 2}\n{"step": 3}\n')
        assert [*new_rows(file)] == [{"step": 2}, {"step": 3}]
        assert [*new_rows(file)] == []
