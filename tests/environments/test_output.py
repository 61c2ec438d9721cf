"""What an environment prints: it and its programs, line by line, without secrets and escapes."""

import asyncio
import os
import time

from RL2.environments.output import passed_on
from RL2.environments.processes import Processes

PRINTS = """
import os, subprocess, sys

print("imported")


async def step(state, action, extra_info):
    print("key", os.environ["SOME_API_KEY"], "\\x1b[2J")
    print("to stderr", os.environ["SOME_API_KEY"], "\\x07", file=sys.stderr)
    subprocess.run(["sh", "-c", "printf 'of a program %s' $SOME_API_KEY"])
    return {"next_state": None, "reward": 0.0, "score": 0.0, "done": True}
"""


def test_prints_come_without_secrets_and_escapes(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SOME_API_KEY", "not-for-the-terminal")
    path = tmp_path / "env.py"
    path.write_text(PRINTS)

    async def run():
        processes = Processes(str(path), 10, 1)
        await processes.call(0, "step", ("state", "action", "stop"), {})
        await processes.close()

    asyncio.run(run())
    out, err = capfd.readouterr()
    assert out == "imported\nkey *** \\x1b[2J\nof a program ***\n"
    assert err == "to stderr *** \\x07\n"


def test_lines_are_not_waited_for_without_end_and_no_target_blocks(tmp_path):
    path = tmp_path / "out"
    with path.open("wb") as file:
        writes, thread = passed_on(file.fileno())
        with open(writes, "wb", buffering=0) as pipe:
            pipe.write(b"10%\r20%\r\n\xff" + b"x" * 3 * 2**16)
            end = time.monotonic() + 10
            while path.stat().st_size < 2**16 and time.monotonic() < end:
                time.sleep(0.01)
            assert path.stat().st_size >= 2**16  # though the line has no end yet
        thread.join(10)
    text = path.read_text()
    assert text.startswith("10%\n20%\n\\xffx") and text.count("x") == 3 * 2**16 + 1
    full = os.open("/dev/full", os.O_WRONLY)
    writes, thread = passed_on(full)
    with open(writes, "wb", buffering=0) as pipe:
        pipe.write(b"y\n" * 2**17)  # more than a pipe holds
    thread.join(10)
    assert not thread.is_alive()
    os.close(full)
