"""run/progress.py: a line at intervals, a live one on a terminal."""

import pytest

from experiments import config as config_files
from experiments.run import progress as progress_module
from experiments.run.progress import LiveLine, duration

DEFECT = {"layer": 5, "loss": 0.3125, "num_outliers": 9, "skipped": 0.48}
NO_DEFECT = {"layer": -1, "loss": None, "num_outliers": 0, "skipped": 0.5}
UNREADABLE = {"layer": None, "loss": None, "num_outliers": None, "skipped": 0.5}


class Clock:
    """Stands in for `time.monotonic`."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def config(**changes):
    changed = config_files.load("tiny.py")
    changed.update({"max_iter": 1_200, "history": 40, "log_every": 10} | changes)
    return changed


def test_a_line_says_block_loss_outliers_share_rate_and_time_left(clock, capsys):
    with LiveLine(config(), start=0) as progress:
        clock.now += 5
        progress.update(10, DEFECT)  # 2 images a second
    assert capsys.readouterr().out == (
        "image 10/1200  block 5  loss 0.312  outliers 9  skipped 48% of 40  "
        "2.00 img/s  at most 9 min 55 s left\n"
    )


@pytest.mark.parametrize(
    "row, text",
    [
        (NO_DEFECT, "image 10/1200  no defect  skipped 50% of 40  "),
        (UNREADABLE, "image 10/1200  no defect  skipped 50% of 40  "),
        (DEFECT | {"loss": None}, "image 10/1200  block 5  loss nan  outliers 9  "),
    ],
)
def test_an_image_without_defect_or_loss_has_a_line_too(row, text, clock, capsys):
    with LiveLine(config(), start=0) as progress:
        progress.update(10, row)
    assert capsys.readouterr().out.startswith(text)


@pytest.mark.parametrize(
    "start, batch, printed",
    [
        (0, 1, [10, 20, 30]),
        (0, 4, [12, 20, 32]),  # the first one past each multiple
        (25, 1, [30]),  # a run that goes on
        (20, 7, [34]),
    ],
)
def test_a_line_stays_at_every_interval(start, batch, printed, clock, capsys):
    with LiveLine(config(), start=start) as progress:
        for position in range(start + batch, 36, batch):
            clock.now += 1
            progress.update(position, DEFECT)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0] for line in lines] == [f"image {n}" for n in printed]


def test_the_rate_is_that_of_the_last_images(clock, capsys):
    window = progress_module.WINDOW
    with LiveLine(config(log_every=200), start=0) as progress:
        for position in range(1, 201):
            clock.now += 10 if position <= 200 - window else 0.25
            progress.update(position, DEFECT)
    assert "  4.00 img/s  at most 4 min 10 s left" in capsys.readouterr().out


def test_messages_are_printed_as_they_are(clock, capsys):
    with LiveLine(config(), start=0) as progress:
        progress.print("skipped, unreadable: a[red]b.png: " + "long " * 60)
    out = capsys.readouterr().out
    assert out.startswith("skipped, unreadable: a[red]b.png: ") and out.count("\n") == 1


def test_on_a_terminal_the_line_lives_and_goes_away(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the output for a terminal
    with LiveLine(config(), start=0) as progress:
        for position in range(1, 10):
            progress.update(position, DEFECT | {"num_outliers": position})
    out = capsys.readouterr().out
    assert "outliers 9" in out  # the last update is shown
    assert "\x1b[2K" in out.rpartition("outliers 9")[2]  # and erased at the end


def test_an_error_inside_takes_the_live_line_away(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with pytest.raises(KeyboardInterrupt), LiveLine(config(), start=0):
        raise KeyboardInterrupt
    assert "\x1b[?25h" in capsys.readouterr().out  # the cursor is back


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (59.6, "1 min 0 s"),
        (61, "1 min 1 s"),
        (3599.7, "1 h 0 min"),
        (3600 * 30 + 59, "30 h 0 min"),
    ],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text
