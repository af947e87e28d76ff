"""sinder_jax/cli.py: its parser; test_visualize.py tests its errors and exit codes."""

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


def test_a_missing_optional_package_is_for_the_user(capsys):
    def main():
        raise ImportError("model.pth: needs PyTorch,\n  pip install it")

    with pytest.raises(SystemExit) as caught:
        cli.exit_on_error(main)
    assert caught.value.code == 2
    assert (
        capsys.readouterr().err == "error: model.pth: needs PyTorch, pip install it\n"
    )
