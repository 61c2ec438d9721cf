import logging

import pytest

from RL2.rollout.failures import Failure, FailureCount
from RL2.rollout.reports import Report, Reports
from RL2.runtime.errors import EngineError, EnvError, Interrupted

FAILED = Failure("env", (1, 0), 0, "env.py: step raised ValueError: no")


@pytest.fixture
def reports():
    failures = FailureCount({"env": 1, "malformed": None})
    failures.begin(8)
    return Reports(failures, "env.py", rank=0, n_ranks=1, group=None)


def test_a_report_that_is_fine_comes_back(reports):
    report = Report(n_teach=2, failed=[FAILED])
    assert reports.exchange(report, None) == [report]
    assert reports.failures.of_run["env"] == 1


def test_who_was_asked_to_stop_says_so_whatever_failed(reports):
    failure = EngineError("the servers are gone")
    with pytest.raises(Interrupted) as raised:
        reports.exchange(Report(interrupted=True, failure="gone"), failure)
    assert raised.value.__cause__ is failure


def test_a_failure_of_this_rank_is_raised_as_it_is(reports):
    failure = EngineError("no server is left")
    with pytest.raises(EngineError) as raised:
        reports.exchange(Report(failure="EngineError: no server is left"), failure)
    assert raised.value is failure


def test_too_many_failed_samples_end_the_step(reports):
    with pytest.raises(EnvError, match="rollout.max_env_errors=1: .* 2 of 8 samples"):
        reports.exchange(Report(failed=[FAILED, FAILED]), None)


def test_what_was_dropped_is_said_and_unknown_keys_once(reports, caplog):
    caplog.set_level(logging.WARNING, logger="RL2")
    reports.exchange(Report(failed=[FAILED], unknown=["scores"]), None)
    reports.exchange(Report(unknown=["scores"]), None)
    dropped, unknown = caplog.messages
    assert "sample dropped: prompt 0, response 0 of step 1: env.py: step raised" in dropped
    assert unknown.startswith("env.py: step returned keys that are not used: scores")
