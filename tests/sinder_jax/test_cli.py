"""sinder_jax/cli.py: its parser, and what it prints to.

test_visualize.py tests its errors and exit codes.
"""

import os
import pty
import subprocess
import sys

import pytest

from sinder_jax import cli


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
        cli.exit_on_error(main)
    assert caught.value.code == 2
    assert (
        capsys.readouterr().err == "error: model.pth: needs PyTorch, pip install it\n"
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
        output = cli._Output(writer)
    else:
        reader, writer = pty.openpty()
        output = cli._Output(writer)
        os.close(reader)
    assert output.write(b"step 1200") == 9
    os.close(writer)


def test_a_full_disk_is_not_taken_for_a_reader_that_is_gone():
    with open("/dev/full", "wb") as full, pytest.raises(OSError, match="No space"):
        cli._Output(full.fileno()).write(b"step 1200")
