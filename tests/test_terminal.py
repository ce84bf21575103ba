"""Text on a terminal: aligned tables, one live line, commands to type."""

import sys

import pytest
from programs import PROJECT

from cifar10_resnet import terminal


class Screen:
    """A terminal's lines as a person sees them after all output."""

    def __init__(self) -> None:
        self.lines, self.column = [""], 0

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        pass

    def fileno(self) -> int:
        raise OSError("no descriptor, and so 80 columns")

    def write(self, text: str) -> None:
        for char in text:
            if char == "\n":
                self.lines.append("")
            elif char != "\r":
                line = self.lines[-1].ljust(self.column)
                self.lines[-1] = line[: self.column] + char + line[self.column + 1 :]
            self.column = 0 if char in "\r\n" else self.column + 1

    @property
    def shown(self) -> list[str]:
        return [line.rstrip() for line in self.lines]


def watched(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """Puts a screen in stdout's place."""
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    return screen


def test_columns_are_as_wide_as_their_widest_cell_and_numbers_stand_to_the_right():
    rows = [("", "images", "share"), ("cat", 9, "0.5"), ("airplane", 1000, "0.125")]
    assert terminal.table(rows, "<>>", indent="").splitlines() == [
        "          images  share",
        "cat            9    0.5",
        "airplane    1000  0.125",
    ]


def test_a_short_row_ends_with_a_one_line_error_that_widens_nothing():
    rows = [("", "ms", "ratio"), ("one", "1.0", "1.00"), ("two", "skipped: no torch installed")]
    assert terminal.table(rows, "<>>").splitlines() == [
        "        ms  ratio",
        "  one  1.0   1.00",
        "  two  skipped: no torch installed",
    ]


def test_the_live_line_is_covered_by_a_shorter_one_and_gone_in_the_end(monkeypatch):
    screen = watched(monkeypatch)
    with terminal.LiveLine() as line:
        line.show(0.25, "a long fact", "another")
        assert screen.shown == [" 25% #####............... a long fact, another"]
        line.show(1.0, "short")
        assert screen.shown == ["100% #################### short"]
        line.write("a line that stays")
        assert screen.shown == ["a line that stays", "100% #################### short"]
    assert screen.shown == ["a line that stays", ""]


def test_one_line_covers_another_that_was_not_closed(monkeypatch):
    screen = watched(monkeypatch)
    with terminal.LiveLine() as outer, terminal.LiveLine() as inner:
        outer.show(0.5, "a long fact of the outer line")
        inner.show(0.25, "inner")
        assert screen.shown == [" 25% #####............... inner"]


def test_facts_that_have_no_room_are_left_out_from_the_last(monkeypatch):
    screen = watched(monkeypatch)
    facts = ("the first" * 6, "the second", "the third")
    with terminal.LiveLine() as line:
        line.show(0.5, *facts)
        assert screen.shown == [f" 50% ###.... {facts[0]}, {facts[1]}"]
        line.show(None, "no total is known")
        assert screen.shown == ["no total is known"]


def test_the_line_is_drawn_only_when_it_is_due(monkeypatch):
    screen = watched(monkeypatch)
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with terminal.LiveLine() as line:
        line.update(0.1, "at once")
        assert screen.shown == [""]
        now[0] += 0.6
        line.update(0.2, "later")
        line.update(0.3, "too soon")
        assert screen.shown == [" 20% ####................ later"]


def test_a_file_gets_a_line_for_each_tenth_if_it_is_asked_for(capsys):
    for plain in (True, False):
        with terminal.LiveLine(plain) as line:
            for i in range(1, 101):
                line.update(i / 100, f"read {i}")
    shown = capsys.readouterr().out.splitlines()
    assert shown == [f"{10 * i:3}%  read {10 * i}" for i in range(1, 11)]


def test_a_transfer_shows_bytes_speed_and_time_left():
    share, *facts = terminal.transfer(42_500_000, 170_000_000, 1_500_000)
    assert share == 0.25
    assert facts == ["42.5 of 170.0 MB", "1.5 MB/s", "0:01:25 left"]
    assert terminal.transfer(42_500_000, None, 0.0) == (None, "42.5 MB", "0.0 MB/s")


def test_a_command_is_printed_as_it_can_be_typed_in_the_folder(tmp_path, monkeypatch):
    for folder, script, package in (
        (PROJECT, "run_trainer.py", "-m cifar10_resnet export"),
        (PROJECT / "docs", "../run_trainer.py", "../cifar10_resnet export"),
        (tmp_path, f"{PROJECT}/run_trainer.py", f"{PROJECT}/cifar10_resnet export"),
    ):
        monkeypatch.chdir(folder)
        assert terminal.command("run_trainer.py", "--path=a b").endswith(f" {script} '--path=a b'")
        assert terminal.command("export").endswith(f" {package}")
        # In an environment that is entered, the interpreter has its short name.
        monkeypatch.setenv("PATH", str(PROJECT / "nowhere"))
        assert terminal.command("export").startswith(sys.executable)
        monkeypatch.undo()
