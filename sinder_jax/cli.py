"""What every command line shares: errors in one line, exit codes, a strict parser.

    main() --run--> exit code; an error meant for the user is one line on stderr

Nothing here imports JAX: `--help` answers at once.
"""

import argparse
import errno
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from sinder_jax import launch

# What our code raises for users; anything else is a bug and shows its traceback.
# ImportError: an optional package is missing, such as torch for a .pth file.
USER_ERRORS = (ValueError, KeyError, OSError, FloatingPointError, ImportError)

TRACEBACK = "SINDER_TRACEBACK"

# Exit codes. 75 is EX_TEMPFAIL of sysexits.h: not finished, start me again.
USER_ERROR, TRY_AGAIN, INTERRUPTED = 2, 75, launch.INTERRUPTED


def run(main: Callable[[], int | None]) -> int:
    """Runs `main` and returns the exit code of the process.

    An error meant for the user becomes one line, `error: ...`, on stderr and exit code
    2; Ctrl-C becomes 130. The environment variable SINDER_TRACEBACK=1 shows the
    traceback instead.
    """
    try:
        return main() or 0
    except (*USER_ERRORS, KeyboardInterrupt) as error:
        if not is_for_user(error):
            raise
        if isinstance(error, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        print(f"error: {one_line(error)}", file=sys.stderr)
        return USER_ERROR


def is_for_user(error: BaseException) -> bool:
    """True for an error that one line tells, False for one whose traceback is shown."""
    wanted = os.environ.get(TRACEBACK) == "1"
    return isinstance(error, (*USER_ERRORS, KeyboardInterrupt)) and not wanted


def exit_on_error(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` as `run` does and ends the process with its exit code.

    What is printed to a pipe that nobody reads any more (`| head -1`, a `tee` that was
    killed) is dropped: the results of a command are its files and its exit code.
    """
    for name in ("stdout", "stderr"):
        output = getattr(sys, name)
        if output is not None and output is getattr(sys, f"__{name}__"):
            setattr(sys, name, _outlasting_its_reader(output))
    try:
        code = run(main)
    except BaseException:
        if not _is_connected():
            raise
        traceback.print_exc()
        code = 1
    launch.end_on_interrupt()
    if (code == INTERRUPTED and launch.is_ours()) or (code and _is_connected()):
        # At exit JAX would wait for the other processes, which wait for this one; and
        # what was interrupted may still be running in other threads.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # a full disk, which was told; at exit Python would try again
        os._exit(code or USER_ERROR)
    sys.exit(code)


class _Output(io.FileIO):
    """Standard output or error, which takes everything once its reader is gone."""

    def __init__(self, number: int):
        super().__init__(number, "w", closefd=False)
        # A pipe breaks; a terminal that was closed answers with an input/output error.
        self._gone = (errno.EPIPE, errno.EIO) if self.isatty() else (errno.EPIPE,)

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in self._gone:
                raise
            return len(data)


def _outlasting_its_reader(output: Any) -> io.TextIOWrapper:
    output.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(output.fileno())),
        encoding=output.encoding,
        # Escapes a file name that the terminal's encoding lacks. By lines: what a pipe
        # or log shows keeps the order of stdout and stderr.
        errors="backslashreplace",
        line_buffering=True,
    )


def _is_connected() -> bool:
    """True if JAX in this process is connected to the other processes of a run."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def one_line(error: BaseException) -> str:
    """An error's message in one line, without error numbers and quotes around it."""
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror
        if error.filename is not None:
            message = f"{error.filename}: {message}"
    elif isinstance(error, KeyError) and error.args:
        message = str(error.args[0])  # str(KeyError) is the repr of its message
    else:
        message = str(error)
    return shown(" ".join(message.split())) or type(error).__name__


def warn(text: str) -> None:
    """Prints a warning of one line on stderr."""
    print(f"warning: {shown(' '.join(text.split()))}", file=sys.stderr)


def shown(text: object) -> str:
    r"""Text, such as a file name, with all that cannot be printed escaped.

    A line break becomes \n; a byte of a name that is not UTF-8, such as e9, \udce9.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)
    )


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one line and guesses nothing."""

    def __init__(self, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Takes ~ for a home folder where a value begins: no shell does behind `=`."""
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._at_home(x) for x in given], namespace)

    def _at_home(self, argument: str) -> str:
        name, equals, value = argument.partition("=")
        if not (name.startswith("-") and equals):
            name, equals, value = "", "", argument
        if not value.startswith("~"):
            return argument
        from sinder_jax.storage import paths

        try:
            return name + equals + paths.expanded(value)
        except ValueError as error:
            self.error(str(error))

    def error(self, message: str) -> NoReturn:
        """Prints one line that points to --help and exits with code 2."""
        self.exit(USER_ERROR, f"error: {message} (see {self.prog} --help)\n")
