"""The benchmarks that take steps: what they start, count and print."""

import argparse
import resource
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from benchmarks import scaling, step
from benchmarks.processes import Process, peak_gib

ECHO = """
from benchmarks.processes import orders_and_answer
orders, answer = orders_and_answer()
print({"not": "an answer"})
for order in orders:
    if order.get("die"):
        raise SystemExit(3)
    answer({"got": order})
"""


def options(*words: str, **changes) -> argparse.Namespace:
    tiny = {
        "vocab": 64, "hidden": 64, "layers": 1, "prompts": 2, "responses": 2, "prompt_length": 6,
        "new_tokens": 5,
    }  # fmt: skip
    parsed = step.parser().parse_args(words)
    return argparse.Namespace(**vars(parsed) | tiny | changes)


def test_a_process_answers_orders_and_nothing_it_prints_is_an_answer():
    process = Process([sys.executable, "-c", ECHO], PYTHONPATH=str(step.ROOT))
    assert process.ask({"n": 1}) == {"got": {"n": 1}}
    assert process.ask({"n": 2}) == {"got": {"n": 2}}
    process.close()


def test_a_process_that_ends_is_an_error():
    process = Process([sys.executable, "-c", ECHO], PYTHONPATH=str(step.ROOT))
    with pytest.raises(RuntimeError, match="ended with 3"):
        process.ask({"die": True})


def test_peak_memory_is_that_of_the_process():
    told = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert peak_gib() == pytest.approx(told, rel=0.05)


@pytest.mark.slow
def test_two_ranks_take_steps_of_the_length_asked_for(tmp_path):
    """The whole trainer, as both benchmarks run it."""
    sizes = options(sequences=4)
    step.write_files(tmp_path, sizes)
    run = scaling.Run(tmp_path, sizes, "two", 2)
    answers = [run.step() for _ in range(2)]
    run.close()
    for answer in answers:
        assert answer["tokens"] == 2 * 2 * 5
        assert {*step.PHASES} <= answer["phases"].keys()
        # What was waited for an order is in no phase.
        assert 0 < sum(answer["phases"][phase] for phase in step.PHASES) <= answer["seconds"]
        assert 0 < answer["cpu"] and 0.1 < answer["peak_gib"]


def test_a_source_waits_for_an_order_before_it_collects():
    seen = []
    source = SimpleNamespace(collect=lambda number, last: seen.append(number), publish="own")
    on_order = step.OnOrder(
        source, iter([{}, {}]), lambda took, waited: seen.append((took, waited))
    )
    assert on_order.publish == "own"
    on_order.collect(1)
    assert seen == [1]
    time.sleep(0.02)
    on_order.collect(2)
    (took, waited) = seen[1]
    assert took["seconds"] >= 0.02 > waited and seen[2:] == [2]
    with pytest.raises(SystemExit):
        on_order.collect(3)


def steps(*seconds: float) -> list[dict]:
    return [
        {"seconds": s, "cpu": s, "peak_gib": 1.0, "phases": {"rollout": s / 2}} for s in seconds
    ]


def test_the_fastest_of_either_side_are_compared(capsys):
    step.print_table(
        {
            "RL2, 8": steps(9.0, 9.0, 9.0), "RL2, 4": steps(1.0, 2.0, 3.0),
            "trl, 8": steps(2.0, 6.0, 3.0), "trl, 4": steps(9.0, 9.0, 9.0),
        },
        n_samples=16,
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "RL2, 4 makes 2.00 times the samples/s of trl, 8 (1.00–3.00 in single rounds)" in printed
    assert "| RL2, 4 | 2.00 (1.00–3.00) | 1.00 | 1.00 | 0.000 | 2.00 | 8.0 | 1.00 |" in printed


def test_efficiency_is_relative_to_the_work_of_a_process():
    one, two = steps(4.0, 4.0, 5.0), steps(2.0, 4.0, 2.5)
    assert scaling.efficiency(one, two, "step", share=0.5) == 1.0
    assert scaling.efficiency(one, two, "rollout", share=1.0) == 2.0


def test_the_sampler_says_which_phase_and_line_works():
    """Phases are those of the main thread, the work may be another one's."""
    done = threading.Event()

    def spin():
        while not done.is_set():
            sum(range(100))

    class Loop:
        def update(self):
            time.sleep(0.2)

        def _step(self):
            self.update()

    worker = threading.Thread(target=spin)
    with step.StackSampler(interval=0.002) as sampler:
        worker.start()
        Loop()._step()
        done.set()
        worker.join()
    assert sampler.seconds["update_actor"] > 0.1
    assert "update_actor" in sampler.table()
    assert any("spin" in where for _, where in sampler.own)
