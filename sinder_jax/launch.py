"""The start and the end of a program, from its first import to its exit code.

    python -m package.module --guard--> Ctrl-C ends at once, an error is one line
    arguments parsed --start_jax--> devices are there, Ctrl-C raises KeyboardInterrupt

Imports next to nothing, so that it is there before Ctrl-C is.
"""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NoReturn

# JAX's switches that stop a program or change its bits, and what every program has.
# Others that people set were tried: they change no bit (tests/sinder_jax/test_launch).
SWITCHES = {
    "jax_enable_x64": False,
    "jax_disable_jit": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_transfer_guard": None,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
}


def guard(package: str) -> None:
    """Until `start_jax`, ends a program without a traceback: by Ctrl-C, or in one line.

    A package calls this as the first thing that it does, because a program spends its
    first seconds importing. Changes nothing if another program imports the package.

    Args:
      package: its name; the program is `python -m package.module`.
    """
    # While Python looks for the module that follows -m, sys.argv[0] is "-m".
    names = {argument.partition(".")[0] for argument in sys.orig_argv}
    if sys.argv[:1] != ["-m"] or package not in names:
        return
    sys.excepthook, sys.unraisablehook = _show, _send_again
    end_on_interrupt()


def is_ours() -> bool:
    """True in a program of this project, False where another one imports it."""
    return sys.excepthook is _show


def end_on_interrupt() -> None:
    """From now on Ctrl-C ends our program at once: there is nothing to clean up."""
    if is_ours() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    try:
        os.write(2, b"interrupted\n")
    finally:
        os._exit(128 + number)  # `cli.INTERRUPTED`, perhaps not imported yet


def _show(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Shows an error of an import, such as JAX's of a wrong JAX_... in one line."""
    from sinder_jax import cli

    if not cli.is_for_user(error):
        sys.__excepthook__(kind, error, trace)
        return
    print(f"error: {cli.one_line(error)}", file=sys.stderr, flush=True)
    os._exit(cli.USER_ERROR)


def _send_again(lost: Any) -> None:
    """Sends a signal again whose exception came where Python drops exceptions.

    JAX runs Python code whenever garbage is collected, which is a likely moment.
    """
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    import threading

    stops = callable(signal.getsignal(signal.SIGTERM))  # a second SIGINT would abort
    number = signal.SIGTERM if stops else signal.SIGINT
    threading.Timer(0.1, signal.raise_signal, [number]).start()


def start_jax() -> None:
    """Starts JAX on its devices; call before a command computes or reads a model.

    `SWITCHES` are set back, with a warning: the same command gives the same bits. From
    here on Ctrl-C raises KeyboardInterrupt.

    Raises:
      ValueError: there is no device of the kind that JAX_PLATFORMS names, or it cannot
        be used; one line.
    """
    import jax

    from sinder_jax import cli

    found = {name: getattr(jax.config, name) for name in SWITCHES}
    if changed := [name for name in SWITCHES if found[name] != SWITCHES[name]]:
        named = ", ".join(f"{name.upper()}={found[name]}" for name in changed)
        cli.warn(f"{named}: ignored, so that the same command gives the same bits")
        for name in changed:
            jax.config.update(name, SWITCHES[name])
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX has no error of its own
        older = "JAX_PLATFORM_NAME"  # goes before the newer one
        name = older if os.environ.get(older) else "JAX_PLATFORMS"
        asked = os.environ.get(name, "")
        reason = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS")[0]
        raise ValueError(
            f"JAX finds no {asked or 'usable'} device here ({name}={asked}): unset "
            f"{name} to use what there is, or install JAX for that device, such as "
            f"jax[cuda13]{'; it says: ' * bool(reason)}{reason.removesuffix('.')}"
        ) from None
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# --- The end --------------------------------------------------------------------------


def exit_on_error(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` as `cli.run` does and ends the process with its exit code.

    What is printed to a pipe that nobody reads any more (`| head -1`, a `tee` that was
    killed) is dropped: the results of a command are its files and its exit code.
    """
    from sinder_jax import cli

    for name in ("stdout", "stderr"):
        output = getattr(sys, name)
        if output is not None and output is getattr(sys, f"__{name}__"):
            setattr(sys, name, _outlasting_its_reader(output))
    try:
        code = cli.run(main)
    except BaseException:
        if not _is_connected():
            raise
        import traceback

        traceback.print_exc()
        code = 1
    end_on_interrupt()
    if (code == cli.INTERRUPTED and is_ours()) or (code and _is_connected()):
        # At exit JAX would wait for the other processes, which wait for this one; and
        # what was interrupted may still be running in other threads.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # a full disk, which was told; at exit Python would try again
        os._exit(code or cli.USER_ERROR)
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
