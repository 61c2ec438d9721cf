import asyncio
import gc
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from RL2.environments import processes as env_processes
from RL2.environments.environment import load_environment
from RL2.runtime.errors import ConfigError, EnvError
from RL2.runtime.stop import NUMBERS
from tests.rollout.support import open_files, running, wait_until


@pytest.fixture(params=[0, 1], ids=["in process", "process"])
def workers(request):
    return request.param


def environment(tmp_path, body, timeout=5.0, workers=0):
    path = tmp_path / "env.py"
    path.write_text(body)
    return load_environment(path, timeout, workers)


def play(tmp_path, body, do, timeout=5.0, workers=1):
    """What the coroutine `do(environment)` returns; nothing of the environment is left then."""

    async def run():
        env = environment(tmp_path, body, timeout, workers)
        try:
            return await do(env)
        finally:
            await env.close()

    result = asyncio.run(run())
    assert not running(tmp_path)
    return result


def step(tmp_path, body, timeout=5.0, workers=0):
    return play(
        tmp_path, body, lambda env: env.step("state", "action", {"answer": 3}), timeout, workers
    )


def opened(extra_info):
    return pickle.loads(extra_info) if isinstance(extra_info, bytes) else extra_info


def answering(expression):
    return f"""
import asyncio, time
async def step(state, action, extra_info):
    answer = {expression}
    return answer
"""


GOOD = "'next_state': state + action, 'reward': 0.5, 'score': 1, 'done': False, 'extra_info': {}"


def test_a_good_answer_is_checked_and_kept(tmp_path, workers):
    answer = step(tmp_path, answering(f"{{{GOOD}}}"), workers=workers)
    assert (answer.next_state, answer.reward, answer.score) == ("stateaction", 0.5, 1.0)
    assert answer.done is False
    assert opened(answer.extra_info) == {}


@pytest.mark.parametrize(
    ("declared", "told"),
    [
        ("", None),
        (", finish_reason", "length"),
        (", *, finish_reason='stop'", "length"),
        (", **more", None),  # what it does not name may be no business of what it calls
    ],
)
def test_a_step_that_names_the_finish_reason_is_told(tmp_path, workers, declared, told):
    body = f"""
async def step(state, action, extra_info{declared}):
    told = locals().get("finish_reason")
    return {{{GOOD.replace("{}", "{'told': told, 'was': dict(extra_info)}")}}}
"""
    answer = play(
        tmp_path, body, lambda env: env.step("s", "a", {"answer": 3}, finish_reason="length"),
        workers=workers,
    )  # fmt: skip
    assert opened(answer.extra_info) == {"told": told, "was": {"answer": 3}}


def test_numpy_and_torch_scalars_are_numbers(tmp_path, workers):
    body = """
import numpy, torch
async def step(state, action, extra_info):
    return {"reward": numpy.float32(0.5), "score": torch.tensor(2), "done": numpy.bool_(True)}
"""
    answer = step(tmp_path, body, timeout=60, workers=workers)
    assert (answer.reward, answer.score, answer.done) == (0.5, 2.0, True)
    assert answer.next_state is None
    assert opened(answer.extra_info) == {"answer": 3}


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("None", "returned NoneType, not a dict"),
        ("{'reward': 1.0}", "lacks done, score"),
        (f"{{{GOOD}, 'reward': float('nan')}}", "reward=nan is not finite"),
        (f"{{{GOOD}, 'score': float('inf')}}", "score=inf is not finite"),
        (f"{{{GOOD}, 'reward': '1'}}", "reward='1' is not a number"),
        (f"{{{GOOD}, 'score': None}}", "score=None is not a number"),
        (f"{{{GOOD}, 'done': 'no'}}", "done='no' is not a bool"),
        (f"{{{GOOD}, 'next_state': None}}", "next_state=None is not a str"),
        (f"{{{GOOD}, 'next_state': chr(0xD800)}}", "next_state cannot be encoded"),
        (f"{{{GOOD}, 'next_state': 'x' * 2**30}}", "next_state is longer than 4194304 bytes"),
        (f"{{{GOOD}, 'reward': 10**400}}", "reward is too large: beyond 3.4e+38"),
        (f"{{{GOOD}, 'score': -(10**5000)}}", "score is too large"),  # has no text
        (f"{{{GOOD}, 'score': 1.7e308}}", "score=1.7e+308 is too large: beyond 3.4e+38"),
        (f"{{{GOOD}, 'reward': -3.5e38}}", "reward=-3.5e+38 is too large"),
        (f"{{{GOOD}, 'extra_info': []}}", "extra_info is list, not a dict"),
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ("exit(3)", "raised SystemExit: 3"),
        ("asyncio.current_task().cancel() and await asyncio.sleep(1)", "raised CancelledError"),
        ("await asyncio.sleep(60)", "timed out after 0.2 s"),
    ],
)
def test_a_wrong_answer_names_the_file_and_the_fault(tmp_path, expression, said, workers):
    with pytest.raises(EnvError) as error:
        step(tmp_path, answering(expression), timeout=0.2 if "sleep" in expression else 60,
             workers=workers)  # fmt: skip
    assert str(tmp_path / "env.py") in str(error.value)
    assert said in str(error.value)


HELPED = """
import json
async def step(state, action, extra_info):
    def judge(text):
        return WHAT
    return {"reward": judge(action), "score": 0.0, "done": True}
"""


@pytest.mark.parametrize(
    ("what", "place"),
    [
        ("extra_info['gold']", r"raised KeyError: 'gold' \(env.py:5\)"),
        ("json.loads(text)", r"raised JSONDecodeError: .* \(env.py:5, in decoder.py:\d+\)"),
    ],
)
def test_what_is_raised_names_the_line(tmp_path, what, place, workers):
    with pytest.raises(EnvError, match=place):
        step(tmp_path, HELPED.replace("WHAT", what), workers=workers)


def test_what_an_import_raises_names_the_line(tmp_path, workers):
    with pytest.raises(ConfigError, match=r"cannot import: KeyError: 'KEY_' \(env.py:2, in "):
        environment(tmp_path, "import os\nkey = os.environ['KEY_']\n", workers=workers)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (f"{{{GOOD}, 'scroe': 1, 'info': 2}}", None),
        ("{'rewards': 1.0, 'score': 1.0, 'done': True}", "lacks reward; unknown keys: 'rewar"),
        (f"{{{GOOD}, 'reward': None, 'rewards': 1}}", "reward=None is not a number; unknown keys"),
        ("{'next': 'x', 'reward': 0, 'score': 0, 'done': False}", "next_state=None is not a str; "),
        ("0.5", "returned float, not a dict with reward, score, done"),
    ],
)
def test_unknown_keys_of_an_answer_are_named(tmp_path, answer, said, workers):
    async def do(env):
        if said is None:
            for _ in range(2):
                await env.step("state", "action", {})
        else:
            with pytest.raises(EnvError) as error:
                await env.step("state", "action", {})
            assert said in str(error.value)
        return list(env.unknown)

    unknown = play(tmp_path, answering(answer), do, workers=workers)
    assert unknown == (["'scroe'", "'info'"] if said is None else [])


def test_a_call_that_blocks_too_long_in_the_trainers_process_fails_afterwards(tmp_path):
    with pytest.raises(EnvError, match="step blocked for 0.[3-9] s, over the limit of 0.2 s"):
        step(tmp_path, answering(f"time.sleep(0.3) or {{{GOOD}}}"), timeout=0.2)


def test_an_environments_own_timeout_is_not_ours(tmp_path):
    body = answering("1").replace("return answer", "raise TimeoutError")
    with pytest.raises(EnvError, match="raised TimeoutError"):
        step(tmp_path, body)


@pytest.mark.parametrize(
    ("returned", "state", "extra_info"),
    [("'go'", "go", {"seed": 3}), ("('go', {'n': 1})", "go", {"n": 1})],
)
def test_reset_gives_the_first_state(tmp_path, returned, state, extra_info, workers):
    body = answering("None") + f"async def reset(extra_info):\n    return {returned}\n"
    found, info = play(tmp_path, body, lambda env: env.reset({"seed": 3}), workers=workers)
    assert (found, opened(info)) == (state, extra_info)


def test_reset_is_checked(tmp_path, workers):
    body = answering("None")
    with pytest.raises(EnvError, match="defines no `async def reset`"):
        play(tmp_path, body, lambda env: env.reset({}), workers=workers)
    body += "async def reset(extra_info):\n    return 5\n"
    with pytest.raises(EnvError, match="reset returned 5"):
        play(tmp_path, body, lambda env: env.reset({}), workers=workers)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("x = 1", "must define `async def step"),
        ("def step(state, action, extra_info): pass", "must define `async def step"),
        ("import no_such_module_at_all", "cannot import: ModuleNotFoundError"),
        (
            "async def step(state, action): pass",
            "is called as step(state, action, extra_info), but",
        ),
        ("async def step(completions, **kwargs): pass", "defines step(completions, **kwargs); let"),
        (
            "class S:\n async def step(self, s, a, e): pass\nstep = S.step",
            "but defines step(self, ",
        ),
        (
            answering("1") + "async def reset(): pass",
            "called as reset(extra_info), but defines reset()",
        ),
        (
            "async def step(s, a, e): return 1.0",
            "step returns 1.0, not a dict with reward, score, d",
        ),
        ("async def step(s, a, e):\n if a: return s, 1.0\n", "returns a tuple, not a dict"),
        (
            "async def step(s, a, e):\n return {'rewards': 1, 'score': 1, 'done': True}",
            "lacks reward; unknown: 'rewards' (did you mean reward?) in line 2",
        ),
        ("async def step(s, a, e): return None", "step returns None, not a dict"),
        ("def broken(", "cannot import: SyntaxError"),
        ("exit(3)", "cannot import: SystemExit: 3"),
        (answering("1") + "def reset(extra_info): pass", "`reset` must be `async def`"),
    ],
)
def test_an_unusable_file_is_a_config_error(tmp_path, body, said, workers):
    with pytest.raises(ConfigError, match="rollout.env_path=") as error:
        environment(tmp_path, body, workers=workers)
    assert said in str(error.value)
    assert not running(tmp_path)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("import time; time.sleep(600)", "cannot import: not done after 1 s"),
        ("import os; os._exit(3)", r"cannot import: its process ended (exit code 3)"),
    ],
)
def test_a_file_that_hangs_or_ends_its_process_is_a_config_error(tmp_path, monkeypatch, body, said):
    monkeypatch.setattr(env_processes, "_IMPORT_SECONDS", 1.0)
    with pytest.raises(ConfigError, match="rollout.env_path=") as error:
        environment(tmp_path, body, timeout=0.5, workers=1)
    assert said in str(error.value)
    assert not running(tmp_path)


@pytest.mark.parametrize(
    "body",
    [
        "async def step(s, a, e, *more, finish_reason=None): raise ValueError",
        "async def step(*texts): return dict(zip(('reward', 'score', 'done'), (0, 0, True)))",
        # Another function's return, one that drops a sample on purpose, and what a decorator adds.
        "async def step(s, a, e):\n def f(): return 1.0\n if f(): return None\n return dict(e)",
        "def full(f):\n async def step(s, a, e): return {'done': True} | await f(s, a, e)\n"
        " return step\n@full\nasync def step(s, a, e): return {'reward': 1, 'score': 1}",
        "async def step(s, a, e): return {'reward': 1, **e}",
        "async def step(s, a, e): return 1.0\nbare = step\n"
        "async def whole(s, a, e): return {'reward': await bare(s, a, e)}\nstep = whole",
    ],
)
def test_files_in_which_nothing_is_wrong_for_sure(tmp_path, body):
    asyncio.run(environment(tmp_path, body).close())


def test_a_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="rollout.env_path=.*nowhere.py: no such file"):
        load_environment(tmp_path / "nowhere.py")


def test_files_may_hold_dataclasses_and_share_a_name(tmp_path):
    body = """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Kept:
    value: float = {value}
async def step(state, action, extra_info):
    return {{"reward": Kept().value, "score": 0, "done": True}}
"""
    rewards = []
    for value in (1.0, 2.0):
        folder = tmp_path / str(value)
        folder.mkdir()
        (folder / "env.py").write_text(body.format(value=value))
    for value in (1.0, 2.0):
        env = load_environment(tmp_path / str(value) / "env.py")
        rewards.append(asyncio.run(env.step("", "", {})).reward)
    assert rewards == [1.0, 2.0]
    assert math.isclose(sum(rewards), 3)


# ------------------------------------------------------------------------ processes of their own

# What a bad call does, and what is said of it. Good ones are on their way in the same process.
BAD = {
    "sleeps for ever": ("await asyncio.sleep(1000)", "timed out after 1 s"),
    "sleeps without awaiting": ("time.sleep(1000)", "blocked for 1 s without awaiting"),
    "will not be cancelled": (
        "while True:\n"
        "            try: await asyncio.sleep(1000)\n"
        "            except BaseException: pass",
        "timed out after 1 s",
    ),
    "never lets go of the loop": ("while True: await asyncio.sleep(0)", "timed out after 1 s"),
    "spins": ("while True: pass", "blocked for 1 s without awaiting; its process was killed"),
    "spins in a task of its own": (
        "async def spin():\n"
        "            while True: pass\n"
        "        await asyncio.gather(asyncio.sleep(0), spin())",
        "blocked for 1 s without awaiting",
    ),
    "spins in C": ("re.match('(a+)+$', 'a' * 64 + 'b')", "blocked for 1 s without awaiting"),
    "spins in C in a thread": (
        "await asyncio.to_thread(re.match, '(a+)+$', 'a' * 64 + 'b')",
        "blocked for 1 s without awaiting",
    ),
    "ends its process": ("os._exit(3)", "its process ended (exit code 3)"),
    "ends its process in a thread": (
        "await asyncio.to_thread(os._exit, 3)", "its process ended (exit code 3)"
    ),
    "ends its process a little later": (
        "threading.Timer(0.2, os._exit, [3]).start(); await asyncio.sleep(1000)",
        "its process ended (exit code 3)",
    ),
    "kills itself": ("os.kill(os.getpid(), 9)", "its process ended (killed"),
    "kills its group": ("os.killpg(0, 9)", "its process ended (killed"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "its process ended (signal 11)"),
    "exits": ("sys.exit(3)", "raised SystemExit: 3"),
    "exits in a task of its own": (
        "async def leave(): sys.exit(3)\n"
        "        asyncio.create_task(leave()); await asyncio.sleep(1000)",
        "its process ended (exit code 1)",
    ),
    "is interrupted": ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
    "recurses": ("(lambda f: f(f))(lambda f: f(f))", "raised RecursionError"),
    "stops the event loop": (
        "asyncio.get_running_loop().stop()\n        await asyncio.sleep(9)",
        "its process ended (exit code 1)",
    ),
    "closes its files": (
        "os.closerange(3, 1000)\n        await asyncio.sleep(1000)", "its process ended"
    ),
    "writes into its files": (
        # Up to 1000: the connection has the number that it has in this process.
        "for number in range(3, 1000):\n"
        "            try: os.write(number, b'x' * 100)\n"
        "            except OSError: pass\n"
        "        await asyncio.sleep(1000)",
        "its process ended",
    ),
    "writes a lot": ("print('x' * 2**20)", None),
    "exits in a thread": (
        "thread = threading.Thread(target=sys.exit, args=[3])\n        thread.start()", None
    ),
    "stops itself": ("os.kill(os.getpid(), signal.SIGSTOP)", "blocked for 1 s without awaiting"),
    "raises a gigabyte": ("raise ValueError('x' * 2**30)", "raised ValueError: xxx"),
    "returns a gigabyte": ("text = 'x' * 2**30", "next_state is longer than 4194304 bytes"),
    "keeps a gigabyte": (
        "extra_info['it'] = bytes(2**30)", "extra_info is longer than 4194304 bytes (pickled)"
    ),
    "keeps a file": (
        "extra_info['it'] = sys.stdin",
        "object); put plain data in it, or use "
        "rollout.env_workers=0",
    ),
}  # fmt: skip
MIXED = """
import asyncio, os, re, signal, sys, threading, time

calls = 0

async def step(state, action, extra_info):
    global calls
    calls += 1
    text = state + action
    if action == "bad":
        BAD
    else:
        await asyncio.sleep(0.3)
    return {"next_state": text, "reward": 1, "score": os.getpid(), "done": False}
"""


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_call_fails_alone(tmp_path, kind, capfd):
    """It holds up neither the event loop, nor does it leave anything behind."""
    does, said = BAD[kind]
    gaps = []

    async def tick():
        # CPU seconds of this thread: what others take does not count.
        while True:
            before = time.thread_time()
            await asyncio.sleep(0.001)
            gaps.append(time.thread_time() - before)

    async def both(env):
        ticking = asyncio.create_task(tick())
        actions = ["good", "good", "bad", "good", "good"]
        answers = await asyncio.gather(
            *(env.step("so ", action, {"n": 1}) for action in actions), return_exceptions=True
        )
        ticking.cancel()
        after = await env.step("so ", "good", {"n": 1})
        return answers, after

    gc.collect()
    files = open_files()
    # Only what has to time out: on a busy machine nothing else shall.
    timeout = 1.0 if " 1 s" in (said or "") else 60.0
    answers, after = play(tmp_path, MIXED.replace("BAD", does), both, timeout=timeout)
    bad = answers.pop(2)
    for answer in [*answers, after]:
        assert (answer.next_state, answer.reward) == ("so good", 1.0)
        assert opened(answer.extra_info) == {"n": 1}
    if said is None:
        assert bad.reward == 1.0
    else:
        assert isinstance(bad, EnvError) and said in str(bad), bad
        assert len(str(bad)) < 1000 and "\n" not in str(bad)
    assert max(gaps) < 0.1
    assert open_files() <= files


def test_many_bad_calls_harm_no_good_one(tmp_path):
    """All in one process, which each of the bad ones ends."""
    body = MIXED.replace("BAD", "await asyncio.sleep(0.1); os._exit(3)")

    async def all_at_once(env):
        calls = [env.step("", "bad" if n % 3 else "good", {}) for n in range(12)]
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = play(tmp_path, body, all_at_once, timeout=30)
    assert [isinstance(answer, EnvError) for answer in answers] == [bool(n % 3) for n in range(12)]


def test_a_process_that_somebody_kills_costs_nothing(tmp_path):
    async def do(env):
        calls = [asyncio.create_task(env.step("", "good", {})) for _ in range(8)]
        await asyncio.sleep(0.1)
        for pid in running(tmp_path):
            os.kill(pid, signal.SIGKILL)
        return await asyncio.gather(*calls)

    assert len(play(tmp_path, MIXED, do, timeout=30)) == 8


def test_calls_with_one_key_go_to_one_process(tmp_path):
    async def do(env):
        first = [await env.step("", "good", {}, key=7) for _ in range(2)]
        n_first = len(running(tmp_path))
        return first, n_first, await asyncio.gather(*(env.step("", "", {}, k) for k in range(12)))

    (one, two), n_first, answers = play(tmp_path, MIXED, do, timeout=30, workers=4)
    assert one.score == two.score and n_first == 2  # with its guard; others start when needed
    pids = [answer.score for answer in answers]
    assert len(set(pids)) == 4
    assert pids[:4] == pids[4:8] == pids[8:] and pids[3] == one.score


def test_a_call_does_not_pay_for_those_before_it(tmp_path):
    """Each blocks for less than its limit, all of them together for longer."""
    body = answering(f"time.sleep(0.5) or {{{GOOD}}}")

    async def do(env):
        return await asyncio.gather(*(env.step("", "", {}) for _ in range(6)))

    assert len(play(tmp_path, body, do, timeout=2.0)) == 6


def test_nobody_waits_for_a_cancelled_call(tmp_path):
    body = f"""
import asyncio
async def step(state, action, extra_info):
    try:
        if action:
            open({str(tmp_path / "begun")!r}, "w").close()
            await asyncio.sleep(1000)
    except asyncio.CancelledError:
        open({str(tmp_path / "cancelled")!r}, "w").close()
        raise
    return {{{GOOD}}}
"""

    async def do(env):
        call = asyncio.create_task(env.step("", "wait", {}))
        await asyncio.to_thread(wait_until, (tmp_path / "begun").exists)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await asyncio.to_thread(wait_until, (tmp_path / "cancelled").exists)
        return await env.step("", "", {})

    assert play(tmp_path, body, do, timeout=100).score == 1


ALARM = """
import signal

def late(*_):
    raise TimeoutError("the verifier gave up")

async def step(state, action, extra_info):
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    while True:
        pass
"""


def test_verifiers_may_use_alarms(tmp_path):
    """math-verify does."""
    with pytest.raises(EnvError, match="raised TimeoutError: the verifier gave up"):
        step(tmp_path, ALARM, timeout=60, workers=1)


def test_math_verify(tmp_path):
    pytest.importorskip("math_verify")
    body = """
from math_verify import parse, verify
async def step(state, action, extra_info):
    score = verify(parse("$1/2$"), parse("$0.5$"))
    return {"reward": score, "score": score, "done": True}
"""
    assert step(tmp_path, body, timeout=60, workers=1).score == 1.0


def test_signals_of_a_terminal_or_a_job_are_for_the_trainer(tmp_path):
    async def do(env):
        before = await env.step("", "good", {})
        for number in NUMBERS:
            os.kill(int(before.score), number)
        return before, await env.step("", "good", {})

    before, after = play(tmp_path, MIXED, do)
    assert after.score == before.score


@pytest.mark.parametrize("control", [["--control="], []])
def test_signals_of_a_job_are_for_the_trainer_and_not_for_its_guards(control):
    asked = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}  # after which a server's guard ends it
    numbers = NUMBERS if control else set(NUMBERS) - asked
    guarded = [str(os.getpid()), *control, "sleep", "60"]
    command = [sys.executable, "-I", "RL2/runtime/guard.py", *guarded]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as guard:
        caught = f"/proc/{guard.pid}/status"
        wait_until(lambda: all(_heeds(caught, number) for number in numbers))
        for number in numbers:
            guard.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            guard.wait(0.5)
        guard.send_signal(signal.SIGKILL if control else signal.SIGTERM)


def _heeds(status, number):
    """Whether a process handles or ignores a signal."""
    text = Path(status).read_text()
    masks = [
        int(line.split()[1], 16) for line in text.splitlines() if line[:6] in ("SigIgn", "SigCgt")
    ]
    return any(mask >> number - 1 & 1 for mask in masks)


def test_the_file_is_read_once(tmp_path):
    """A run's rewards do not change when the file is edited, whenever its processes start."""

    async def do(env):
        (tmp_path / "env.py").write_text("1 / 0")
        with pytest.raises(EnvError, match="exit code 3"):
            await env.step("", "bad", {})
        return await env.step("", "good", {})

    assert play(tmp_path, MIXED.replace("BAD", "os._exit(3)"), do).reward == 1.0


def test_a_file_finds_the_modules_that_the_trainer_finds(tmp_path, monkeypatch):
    (tmp_path / "neighbour.py").write_text("REWARD = 0.25")
    monkeypatch.syspath_prepend(tmp_path)
    body = "import neighbour\n" + answering(f"{{{GOOD}, 'reward': neighbour.REWARD}}")
    assert step(tmp_path, body, workers=1).reward == 0.25


def test_rows_that_cannot_go_to_a_process_name_the_way_out(tmp_path):
    with pytest.raises(EnvError, match="TypeError.*use rollout.env_workers=0"):
        play(tmp_path, MIXED, lambda env: env.step("", "", {"lock": threading.Lock()}))


def test_nothing_outlives_a_trainer_that_is_killed(tmp_path):
    """Neither a process that nobody can talk to, nor what it has started."""
    (tmp_path / "env.py").write_text("""
import re, subprocess, sys
async def step(state, action, extra_info):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)", __file__])
    open(__file__ + ".begun", "w").close()
    re.match('(a+)+$', 'a' * 64 + 'b')
""")
    trainer = """
import asyncio, sys
from RL2.environments.environment import load_environment
env = load_environment(sys.argv[1], 1000.0, 1)
asyncio.run(env.step("", "", {}))
"""
    process = subprocess.Popen([sys.executable, "-c", trainer, tmp_path / "env.py"])
    wait_until((tmp_path / "env.py.begun").exists, seconds=300)  # it imports torch first
    wait_until(lambda: len(running(tmp_path)) == 4)  # one that begins has no command line yet
    process.kill()
    process.wait()
    wait_until(lambda: not running(tmp_path))


def test_an_environment_that_is_forgotten_leaves_nothing_behind(tmp_path):
    env = environment(tmp_path, MIXED, workers=1)
    assert len(running(tmp_path)) == 2  # it and its guard
    del env
    gc.collect()
    assert not running(tmp_path)


def test_what_the_import_of_an_environment_changes_of_this_process_is_put_back(tmp_path):
    """Where it runs in the trainer itself; in a process of its own it may."""
    before = os.getcwd()
    path = tmp_path / "env.py"
    path.write_text(
        "import os\nos.chdir(os.sep)\n"
        "async def step(state, action, extra_info):\n"
        "    return {'next_state': None, 'reward': 0, 'score': 0, 'done': True}\n"
    )
    with pytest.raises(ConfigError, match="it called os.chdir, which changes the whole run"):
        load_environment(path, workers=0)
    assert os.getcwd() == before
