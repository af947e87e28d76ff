"""sinder_jax/cli.py: its parser, and what it prints to.

test_visualize.py tests its errors and exit codes.
"""

import argparse
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from convert import __main__ as main_of_convert
from experiments import analyze, repair, visualize
from sinder_jax import cli, launch


def parser() -> cli.Parser:
    made = cli.Parser(prog="python -m job", epilog="example:\n  job --workdir=runs/a")
    made.add_argument("--workdir", required=True)
    return made


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: --workdir"),
        (["--workdir"], "argument --workdir: expected one argument"),
        (["--workdir=a", "--size=1"], "unrecognized arguments: --size=1"),
        (["--work=a", "--workdir=b"], "unrecognized arguments: --work=a"),
    ],
)
def test_a_mistake_is_one_line_that_points_to_the_help(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(arguments)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"error: {message} (see python -m job --help)\n"


def test_help_keeps_the_lines_of_the_example(capsys):
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(["--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.endswith("example:\n  job --workdir=runs/a\n")


def test_names_are_shown_in_one_line_whatever_their_bytes(capsys):
    name = os.fsdecode(b"a\nb\x1b[31m\xe9 \xc3\xa9")
    assert cli.shown(name) == r"a\nb\x1b[31m\udce9 é"
    assert cli.one_line(ValueError(f"{name}\n is no image")).count("\n") == 0
    cli.warn(name)
    assert capsys.readouterr().err == "warning: a b\\x1b[31m\\udce9 é\n"


def test_a_missing_optional_package_is_for_the_user(capsys):
    def main():
        raise ImportError("model.pth: needs PyTorch,\n  pip install it")

    with pytest.raises(SystemExit) as caught:
        launch.exit_on_error(main)
    assert caught.value.code == 2
    assert (
        capsys.readouterr().err == "error: model.pth: needs PyTorch, pip install it\n"
    )


# --- Home folders ---------------------------------------------------------------------


def parsers() -> dict[str, cli.Parser]:
    """Every parser of the project, with its required arguments given once."""
    found = {"convert": main_of_convert._parser(), "repair": repair._parser()}
    found |= {"analyze": analyze._parser(), "visualize": visualize._parser()}
    return found


def paths_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Arguments that take a text or a path."""
    takes = (None, str, Path)
    return [
        action
        for action in parser._actions
        if action.type in takes and action.nargs != 0 and action.dest != "command"
    ]


def calls() -> list[tuple[cli.Parser, list[str], str]]:
    """A parser, arguments with ~ for each path, and the name of each path."""
    found = []
    for name, parser in parsers().items():
        subs = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        every = subs[0].choices if subs else {"": parser}
        for command, one in every.items():
            actions = paths_of(one)
            needed = [a for a in actions if not a.option_strings or a.required]
            for action in actions:
                given = [command] if command else []
                for other in [*needed, *([] if action in needed else [action])]:
                    flag = other.option_strings[-1:]
                    value = "~/x" if other is action else "y"
                    given.append(f"{flag[0]}={value}" if flag else value)
                found.append(
                    pytest.param(parser, given, action.dest, id=f"{name} {given}")
                )
    return found


@pytest.mark.parametrize("parser, arguments, name", calls())
def test_every_argument_takes_a_tilde_for_the_home_folder(
    parser, arguments, name, monkeypatch
):
    monkeypatch.setenv("HOME", "/home/me")
    value = getattr(parser.parse_args(arguments), name)
    value = value[0] if isinstance(value, list) else value
    assert str(value) == "/home/me/x"


def test_overrides_and_separate_values_take_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = ["--workdir", "~", "--config.data=~/photos", "--config.x=a~b", "./~c"]
    args, rest = parser().parse_known_args(given)
    assert args.workdir == "/home/me"
    assert rest == ["--config.data=/home/me/photos", "--config.x=a~b", "./~c"]


def test_a_home_folder_that_is_not_there_is_one_line(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--workdir=~nobody_of_this_name/runs"])
    assert capsys.readouterr().err == (
        "error: ~nobody_of_this_name/runs: there is no home folder "
        "~nobody_of_this_name; if that is the name of a file or folder, write "
        "./~nobody_of_this_name/runs (see python -m job --help)\n"
    )


# --- A reader that is gone ------------------------------------------------------------


def end_of_a_pipe_without_a_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_a_pipe_that_nobody_reads_ends_a_command_quietly(tmp_path):
    """As with `| head -1`, on stdout and on stderr."""
    (tmp_path / "config.json").write_text("{}")
    writer = end_of_a_pipe_without_a_reader()
    for folder, code in [(tmp_path, 0), (tmp_path / "none", 2)]:
        call = [sys.executable, "-m", "experiments.status", str(folder)]
        done = subprocess.run(call, stdout=writer, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (code, code // 2)
        assert subprocess.run(call, stdout=writer, stderr=writer).returncode == code
    os.close(writer)


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_what_is_printed_to_nobody_is_dropped(kind):
    """A run goes on when the `tee` of its progress, or its terminal, is gone."""
    if kind == "pipe":
        writer = end_of_a_pipe_without_a_reader()
        output = launch._Output(writer)
    else:
        try:
            reader, writer = pty.openpty()
        except OSError:
            pytest.skip("no terminals to be had here")
        output = launch._Output(writer)
        os.close(reader)
    assert output.write(b"step 1200") == 9
    os.close(writer)


def test_a_full_disk_is_not_taken_for_a_reader_that_is_gone():
    with open("/dev/full", "wb") as full, pytest.raises(OSError, match="No space"):
        launch._Output(full.fileno()).write(b"step 1200")


def test_a_full_disk_behind_stdout_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    call = [sys.executable, "-m", "experiments.status", str(tmp_path)]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(call, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")
