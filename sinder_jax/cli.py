"""What every command line shares: errors in one line, exit codes, a strict parser.

    main() --run--> exit code; an error meant for the user is one line on stderr

Nothing here imports JAX: `--help` answers at once.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

# What our code raises for users; anything else is a bug and shows its traceback.
# ImportError: an optional package is missing, such as torch for a .pth file.
USER_ERRORS = (ValueError, KeyError, OSError, FloatingPointError, ImportError)

TRACEBACK = "SINDER_TRACEBACK"

# Exit codes. 75 is EX_TEMPFAIL of sysexits.h: not finished, start me again.
USER_ERROR, TRY_AGAIN, INTERRUPTED = 2, 75, 130


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
