"""From a command line to a run: what is set before anything heavy is loaded."""

import logging

from RL2.trainer.main import prepare
from tests.trainer.support import composed, overrides, write_files


def test_other_ranks_tell_of_their_own_servers_and_of_nothing_else(tmp_path, monkeypatch):
    rooms = ("engines", "environments", "rollout")
    loggers = [logging.getLogger(name) for name in ("RL2", *(f"RL2.{room}" for room in rooms))]
    levels = [one.level for one in loggers]
    monkeypatch.setenv("RANK", "1")
    files = write_files(tmp_path)
    try:
        prepare(composed("spo", overrides(files, "spo", tmp_path / "run")))
        assert not logging.getLogger("RL2.trainer.loop").isEnabledFor(logging.WARNING)
        for module in ("engines.servers.server", "environments.processes", "rollout.failures"):
            assert logging.getLogger(f"RL2.{module}").isEnabledFor(logging.WARNING), module
            assert not logging.getLogger(f"RL2.{module}").isEnabledFor(logging.INFO), module
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
