"""What a run shows of itself: few lines in a log, a bar in a terminal, and a time left that is right."""

import re
import sys

import numpy as np
import pytest

from fnn.progress import progress_bar

NAMES = ("cost", "accuracy")


def shown(capsys, epochs, seconds, *, first=1, validation=True, examples=1440, names=NAMES):
    """What stands on standard error after epochs of made-up numbers that took so many seconds."""
    with progress_bar(epochs, names, show=True, steps=45, examples=examples) as show:
        for epoch, time in enumerate(seconds, start=first):
            show(epoch, (1 / epoch, 0.9), (1.5 / epoch, 0.8) if validation else (), time)
    out, err = capsys.readouterr()
    assert out == ""
    return err


def lines(capsys, *args, **options):
    return shown(capsys, *args, **options).splitlines()


@pytest.fixture
def terminal(monkeypatch):
    """Sets the width of what rich takes for a terminal."""

    def set_width(columns):
        monkeypatch.setenv("FORCE_COLOR", "1")  # rich's way of being told that this is a terminal
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", str(columns))

    set_width(120)
    return set_width


def last_frame(written):
    """The last line of a live bar, without the escapes."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written).rstrip().splitlines()[-1]


def test_line_has_epoch_step_numbers_speed_and_time_left(capsys):
    got = lines(capsys, 50, [3.0] + [0.05] * 49)
    assert got[1] == (
        "epoch  5/50  step  225  cost 0.2000 (0.3000)  accuracy 0.9000 (0.8000)  28,800 examples/s  0:02 left"
    )
    assert got[-1] == (
        "epoch 50/50  step 2250  cost 0.0200 (0.0300)  accuracy 0.9000 (0.8000)  28,800 examples/s"
    )


def test_line_without_validation_data_has_no_brackets(capsys):
    got = lines(capsys, 2, [1.0, 1.0], validation=False)
    assert got[1] == "epoch 2/2  step 90  cost 0.5000  accuracy 0.9000  1,440 examples/s"


def test_first_time_is_a_bound_until_there_is_another(capsys):
    """It includes compilation: 16 s of which 15 are no part of the epochs to come."""
    one, two = lines(capsys, 10, [16.0, 1.0])
    assert one.endswith(">90 examples/s  <2:24 left") and two.endswith("  1,440 examples/s  0:08 left")


def test_one_slow_epoch_does_not_change_the_speed(capsys):
    got = lines(capsys, 10, [9.0, 1.0, 1.0, 60.0, 1.0])
    assert got[-1].endswith("1,440 examples/s  0:05 left")


def test_speed_follows_the_last_epochs(capsys):
    got = lines(capsys, 40, [1.0] * 20 + [2.0] * 20)
    assert "1,440 examples/s  0:20 left" in got[5] and "  720 examples/s  0:32 left" in got[6]


def test_epochs_of_one_call_come_in_a_burst(capsys):
    got = lines(capsys, 1000, [5.0] + [0.002] * 9 + [0.001] * 90)
    assert got[-1].startswith("epoch  100/1000") and got[-1].endswith("1,440,000 examples/s  0:01 left")


@pytest.mark.parametrize("epochs", (1, 2, 9, 10, 11, 19, 20, 21, 99, 100, 101, 995, 1000, 2345))
def test_log_of_a_run_is_about_ten_lines_with_the_first_and_the_last(capsys, epochs):
    got = lines(capsys, epochs, [0.1] * epochs)
    assert min(epochs, 6) <= len(got) <= 11
    width = len(str(epochs))
    assert got[0].startswith(f"epoch {1:>{width}}/{epochs} ")
    assert got[-1].startswith(f"epoch {epochs}/{epochs} ")


def test_there_may_be_fewer_numbers_of_the_training_data(capsys):
    """Of a stream only the cost is known."""
    with progress_bar(1, NAMES, show=True, steps=45, examples=1440) as show:
        show(1, [0.5], [0.75, 0.8], 1.0)
    assert "  cost 0.5000 (0.7500)  accuracy (0.8000)  " in capsys.readouterr().err


def test_speed_is_in_steps_where_examples_are_not_counted(capsys):
    assert lines(capsys, 3, [1.0] * 3, examples=0)[1].endswith("  45 steps/s  0:01 left")


def test_run_that_ends_early_says_where(capsys):
    got = lines(capsys, 50, [0.1] * 37)
    assert [line[6:8] for line in got[-2:]] == ["35", "37"]
    with pytest.raises(KeyboardInterrupt):
        with progress_bar(50, ("cost",), show=True, steps=3, examples=30) as show:
            for epoch in range(1, 5):
                show(epoch, [1.0], [], 0.1)
            raise KeyboardInterrupt
    assert capsys.readouterr().err.splitlines()[-1].startswith("epoch  4/50 ")


def test_resumed_run_says_where_it_goes_on(capsys):
    got = lines(capsys, 50, [0.1] * 14, first=37)
    assert [line[6:8] for line in got] == ["37", "40", "45", "50"]


def test_length_that_is_not_known_has_no_total_and_no_time_left(capsys):
    got = lines(capsys, None, [3.0] + [0.1] * 119)
    assert [int(line.split()[1]) for line in got] == [1, 2, 5, 10, 20, 50, 100, 120]
    assert got[3] == ("epoch 10  step 450  cost 0.1000 (0.1500)  accuracy 0.9000 (0.8000)  14,400 examples/s")
    assert not any("left" in line or "/" in line.split("  ")[0] for line in got)


@pytest.mark.parametrize(
    "seconds, left", ((0.2, "0:02 left"), (60.0, "9:00 left"), (1000.0, "2:30:00 left"), (0.0, "0:00 left"))
)
def test_time_left_is_read_as_a_clock(capsys, seconds, left):
    assert lines(capsys, 11, [seconds] * 2)[-1].endswith(f"  {left}")


@pytest.mark.parametrize("seconds, speed", ((10.0, "144"), (576.0, "2.50"), (1440 / 31_200, "31,200")))
def test_speed_has_as_many_digits_as_it_needs(capsys, seconds, speed):
    assert f"  {speed} examples/s" in lines(capsys, 11, [seconds] * 2)[-1]


@pytest.mark.parametrize(
    "number, text",
    (
        (0.0, "0.0000"),
        (-0.25, "-0.2500"),
        (1.5e-5, "1.500e-05"),
        (-2e6, "-2.000e+06"),
        (np.nan, "nan"),
        (np.inf, "inf"),
    ),
)
def test_numbers_too_small_or_too_large_for_four_digits_have_a_power_of_ten(capsys, number, text):
    with progress_bar(1, ("cost",), show=True, steps=1, examples=1) as show:
        show(1, [number], [number], 1.0)
    assert f"  cost {text} ({text})  " in capsys.readouterr().err


def test_without_rich_there_are_plain_lines(capsys, monkeypatch, terminal):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert len(lines(capsys, 3, [0.1] * 3)) == 3


def test_nothing_is_shown_unless_asked_for(capsys, terminal):
    with progress_bar(3, NAMES, show=False, steps=45, examples=1440) as show:
        show(1, (1.0, 0.5), (), 0.1)
    assert capsys.readouterr() == ("", "")


def test_bar_in_a_terminal_shows_what_a_line_does(capsys, terminal):
    frame = last_frame(shown(capsys, 50, [3.0] + [0.5] * 9))
    assert re.match(r"10/50 \S+ 0:20 left step  450  cost 0.1000 \(0.1500\)  accuracy", frame)
    assert frame.endswith("2,880 examples/s")


def test_bar_stays_and_numbers_are_cut_where_the_terminal_is_narrow(capsys, terminal):
    wide = last_frame(shown(capsys, 50, [0.5] * 10))
    terminal(44)
    narrow = last_frame(shown(capsys, 50, [0.5] * 10))
    assert narrow.endswith("…") and wide.startswith(narrow[:-1]) and len(narrow) <= 44
    assert "━" * 12 in narrow.replace("╸", "━").replace("╺", "━") and "0:20 left" in narrow


def test_bar_of_a_length_that_is_not_known_is_full_at_the_end(capsys, terminal):
    written = shown(capsys, None, [0.5] * 10)
    assert "/?" in written and last_frame(written).startswith("10/10 ") and "left" not in written


def test_bar_takes_a_name_as_it_is(capsys, terminal):
    assert "top[5] 0.9000" in last_frame(shown(capsys, 2, [1.0, 1.0], names=("cost", "top[5]")))
