"""metrics.jsonl: every step once, whatever happens to the file."""

import math
import shutil

import pytest

from RL2.trainer.sinks.metrics import Metrics
from tests.trainer.sinks.support import config_of
from tests.trainer.support import rows_of


def test_rows_that_were_damaged_are_dropped_and_named(tmp_path, caplog):
    """Those beyond the resumed step come again."""
    good = ['{"step": 1, "a": 1.5}', '{"step": 2, "a": NaN}']
    bad = [b"5", b"{}", b'{"step": "2"}', b"\x00\xff\xfe", b'{"step": 2, "a": 1', b"[]", b"null"]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([good[0].encode(), *bad, good[1].encode(), b'{"step": 3}', b""]))
    Metrics(config_of(tmp_path), 2, None).close()
    assert path.read_text().splitlines() == good
    assert sum("not a step was dropped" in line for line in caplog.messages) == len(bad)


def test_what_json_has_no_number_for_is_left_out_and_named_once(tmp_path, caplog):
    """Readers of strict JSON, such as jq, would end at the first NaN."""
    metrics = Metrics(config_of(tmp_path), 0, None)
    caplog.set_level("INFO")
    for step, kl in enumerate((math.inf, 0.5, math.nan), start=1):
        metrics.log(step, 3, {"actor/kl": kl, "actor/loss": -math.inf, "actor/lr": 1.0})
    metrics.close()
    first, second, third = rows_of(tmp_path)
    assert first == {"step": 1, "actor/lr": 1.0} and third == {"step": 3, "actor/lr": 1.0}
    assert second == {"step": 2, "actor/kl": 0.5, "actor/lr": 1.0}
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [line.partition(",")[0] for line in warnings] == [
        "actor/kl is inf in step 1", "actor/loss is -inf in step 1",
    ]  # fmt: skip
    assert "actor/loss -inf" in caplog.text  # the line of the step has it


@pytest.mark.parametrize("loss", ["deleted", "moved", "replaced"])
def test_rows_survive_what_somebody_does_with_the_folder(tmp_path, caplog, loss):
    run = tmp_path / "run"
    metrics = Metrics(config_of(run), 0, None)
    metrics.log(1, 3, {"x": 1.0})
    if loss == "deleted":
        shutil.rmtree(run)
    elif loss == "moved":
        run.rename(tmp_path / "elsewhere")
    else:  # as editors save
        (run / "edited").write_text((run / "metrics.jsonl").read_text())
        (run / "edited").replace(run / "metrics.jsonl")
    for step in (2, 3):
        metrics.log(step, 3, {"x": 1.0})
    metrics.close()
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3]
    told = [line for line in caplog.messages if "was deleted, moved or replaced" in line]
    assert len(told) == 1 and str(run / "metrics.jsonl") in told[0]
