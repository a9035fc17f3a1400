"""Printing ends no run: closed streams, readers that left, full disks, and terminals that are gone."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gcompute.cli.consoles import plain_console
from gcompute.cli.pictures import try_to_draw
from gcompute.cli.signals import stop_signals
from gcompute.cli.streams import Enduring

COMMAND = (sys.executable, "-m", "gcompute")


def unread_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("any_error", [True, False])
def test_what_nobody_reads_is_written_to_nothing(any_error: bool):
    descriptor = unread_pipe()
    stream = Enduring(descriptor, any_error=any_error)
    assert stream.write(b"lost") == 4
    nothing = os.open(os.devnull, os.O_WRONLY)
    assert os.fstat(descriptor).st_rdev == os.fstat(nothing).st_rdev
    assert stream.write(b"lost too") == 8
    for one in (descriptor, nothing):
        os.close(one)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_ends_an_answer_and_no_message():
    with open("/dev/full", "wb") as full:
        assert Enduring(os.dup(full.fileno()), any_error=True).write(b"message") == 7
        with pytest.raises(OSError, match="No space"):
            Enduring(full.fileno(), any_error=False).write(b"answer")


def test_a_command_whose_reader_left_ends_well():
    writer = unread_pipe()
    ended = subprocess.run([*COMMAND, "chips"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream(closed: str, tmp_path: Path):
    other = tmp_path / "other"
    # The error goes to standard error, the list to standard output: neither may land in a file opened later.
    script = f'"$0" -m gcompute chips {closed} && "$0" -m gcompute chips nope {closed}; echo "status $?" > {other}'
    subprocess.run(["sh", "-c", script, sys.executable], check=True, capture_output=True)
    assert other.read_text() == "status 2\n"


def test_characters_that_the_locale_lacks_are_escapes():
    code = "from gcompute.cli.streams import endure; endure(); print('q \\u65e5 \\udcff')"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "latin-1"}, check=True
    )
    assert ended.stdout == b"q \\u65e5 \\udcff\n"


def test_a_hang_up_that_nohup_ignored_stays_ignored():
    assert signal.SIGHUP in stop_signals()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stop_signals() == (signal.SIGINT, signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_square_brackets_are_text():
    shown = io.StringIO()
    plain_console(file=shown).print("q[red]x and [/]")
    assert shown.getvalue() == "q[red]x and [/]\n"


def test_a_picture_that_fails_is_one_line(tmp_path: Path):
    said: list[str] = []

    def draw() -> None:
        raise RuntimeError("no\nfont")

    assert not try_to_draw(draw, tmp_path / "loss.png", said.append)
    assert said == [f"{tmp_path / 'loss.png'} could not be drawn (no font); all else is kept."]


def test_a_log_is_not_as_narrow_as_the_terminal_that_started_it(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert plain_console(file=io.StringIO()).width == 80
    assert plain_console(file=io.StringIO(), force_terminal=True).width == 20
