"""The start of a program: Ctrl-C and errors while it imports, then JAX's devices.

    python -m package.module --guard--> Ctrl-C ends at once, an error is one line
    arguments parsed --start_jax--> devices are there, Ctrl-C raises KeyboardInterrupt

Imports next to nothing, so that it is there before Ctrl-C is.
"""

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any, NoReturn

INTERRUPTED = 130  # exit code after Ctrl-C, also before `cli` is imported

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
        os._exit(INTERRUPTED)


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
