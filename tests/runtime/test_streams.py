"""Real processes whose output goes somewhere that fails."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import RL2.runtime.streams

BEGIN = f"""
import importlib.util, os, subprocess, sys, time
spec = importlib.util.spec_from_file_location("streams", {RL2.runtime.streams.__file__!r})
streams = importlib.util.module_from_spec(spec)
spec.loader.exec_module(streams)
streams.keep_streams()
"""
# More than any buffer holds, and a status of its own at the end.
TALK = """
for _ in range(3):
    print("x" * 200_000)
    print("y" * 200_000, file=sys.stderr)
    sys.stdout.flush()
sys.exit(3)
"""


def talk(redirection, text=TALK, **options):
    """Runs Python under a shell that redirects it; only the standard library is there."""
    words = ["bash", "-c", f'"$0" -S -c "$1" {redirection}', sys.executable, BEGIN + text]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, **options)


REDIRECTIONS = [
    ">/dev/full", "2>/dev/full", ">/dev/full 2>&1", ">&-", "2>&-", ">&- 2>&- <&-",
    "2>&1 | head -c 5; exit ${PIPESTATUS[0]}", "> >(true) 2>&1",
]  # fmt: skip


@pytest.mark.parametrize("redirection", REDIRECTIONS)
def test_nothing_is_raised_and_the_status_is_its_own(redirection):
    done = talk(redirection)
    assert done.returncode == 3 and "Error" not in done.stdout + done.stderr


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_without_it_they_fail(redirection):
    text = "os.write(2, b'x')" if "-" in redirection else "sys.__stderr__.buffer.raw.write(b'x')"
    words = f'"$0" -I -S -c "import os, sys; {text}" {redirection}'
    assert subprocess.run(["bash", "-c", words, sys.executable]).returncode != 0


def test_what_can_be_read_is_all_there():
    done = talk("", "print('out', 'ä'); print('err', file=sys.stderr); os.write(1, b'')")
    assert (done.stdout, done.stderr) == ("out ä\n", "err\n")


def test_closing_them_closes_nothing():
    text = "sys.stdout.close(); sys.stderr.close(); print('out'); print('err', file=sys.stderr)"
    done = talk("", text)
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "err\n")


def test_a_closed_number_is_given_to_no_other_file(tmp_path):
    text = f"file = open({str(tmp_path / 'checkpoint')!r}, 'w'); os.write(2, b'noise')"
    assert talk(">&- 2>&-", text).returncode == 0
    assert (tmp_path / "checkpoint").read_text() == ""


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_what_the_encoding_cannot_show_is_escaped(encoding):
    done = talk("", "print('é', chr(0xd800))", env=os.environ | {"PYTHONIOENCODING": encoding})
    assert done.stdout == ("\\xe9 \\ud800\n" if encoding == "ascii" else "é \\ud800\n")


def test_a_closed_terminal(tmp_path):
    """Its processes are told by SIGHUP, which these have ignored, and then by EIO."""
    ours, theirs = pty.openpty()
    text = BEGIN + f"print('here', flush=True); sys.stdin.buffer.read(1)\n{TALK}"
    words = [sys.executable, "-I", "-S", "-c", text]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        assert os.read(ours, 6) == b"here\r\n"
        os.close(ours)
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.wait(60) == 3


def test_processes_that_it_starts_find_a_stream_that_works():
    text = (
        "time.sleep(0.2); streams.replace_broken_streams(); "
        "subprocess.run(['echo', 'x'], check=True)"
    )
    assert talk("> >(true)", text).returncode == 0
    assert talk("> >(true)", text.replace("streams.replace_broken_streams()", "0")).returncode != 0


def test_a_slow_reader_gets_everything():
    """Somebody who shares the pipe has made it non-blocking."""
    text = "os.set_blocking(1, False); print('x' * 300_000); sys.exit(0)"
    assert len(talk("| (sleep 0.5; cat)", text).stdout) == 300_001


@pytest.mark.parametrize("blocks", [True, False])
def test_nobody_waits_for_a_stopped_reader_at_the_end(blocks):
    """A terminal that Ctrl-S holds, or a pager."""
    text = f"""
import signal
signal.signal(signal.SIGTERM, lambda *_: streams.hurry_streams())
os.set_blocking(1, {blocks})
os.write(2, b"begins")
print("x" * 300_000)
print("y" * 300_000)
sys.exit(3)
"""
    words = [sys.executable, "-I", "-S", "-c", BEGIN + text]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr.read(6) == b"begins"
        if blocks:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
        process.terminate()
        assert process.wait(20) == 3
        assert process.stdout.read().startswith(b"x" * 65536)


def test_a_disk_that_has_room_again(small_disk):
    disk = small_disk("64k")
    filler = disk / "filler"
    text = f"""
open({str(filler)!r}, "wb").write(b"x" * 65536)
print("lost", flush=True)
os.truncate({str(filler)!r}, 0)
print("kept", flush=True)
"""
    log = disk / "log"
    assert talk(f">{log}", text).returncode == 0
    assert Path(log).read_text() == "kept\n"
