"""What the command lines share: errors in one line, exit codes, a strict parser."""

import argparse
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

# What our code raises for users; anything else is a bug and shows its traceback.
# ImportError: an optional package, such as torch for a .pth.
USER_ERRORS = (ValueError, KeyError, OSError, FloatingPointError, ImportError)

TRACEBACK = "SINDER_TRACEBACK"

# Exit codes. 75 is EX_TEMPFAIL of sysexits.h: not done, start me again.
USER_ERROR, TRY_AGAIN, INTERRUPTED = 2, 75, 130


def exit_on_error(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` and ends the process with its exit code.

    An error meant for the user becomes one line, `error: ...`, on stderr and exit code
    2; Ctrl-C becomes 130. With the environment variable SINDER_TRACEBACK=1 the
    traceback is shown instead.
    """
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            # A file name no encoding covers is shown escaped, not turned into an error.
            output.reconfigure(errors="backslashreplace")
    try:
        code = main() or 0
    except USER_ERRORS as error:
        if os.environ.get(TRACEBACK) == "1":
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        code = USER_ERROR
    except KeyboardInterrupt:
        if os.environ.get(TRACEBACK) == "1":
            raise
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Ends the process; at once where JAX is connected to processes that go on.

    JAX would take leave of them at exit, and end by a signal if they are gone.
    """
    jax = sys.modules.get("jax")
    if code and jax is not None and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def one_line(error: BaseException) -> str:
    """An error's message for a person: no error number, no quotes around, no breaks."""
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror
        if error.filename is not None:
            message = f"{error.filename}: {message}"
    elif isinstance(error, KeyError) and error.args:
        message = str(error.args[0])  # str(KeyError) is the repr of its message
    else:
        message = str(error)
    return " ".join(message.split()) or type(error).__name__


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistake in one line and guesses nothing."""

    def __init__(self, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Prints one line that points to --help and exits with code 2."""
        self.exit(USER_ERROR, f"error: {message} (see {self.prog} --help)\n")
