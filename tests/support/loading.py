"""Which packages a program loads, seen in a process of its own.

    python -m loading MODULE ... [-- ARGUMENT ...]

imports the modules and, after --, calls `main` of the last one with the arguments.
"""

import contextlib
import importlib
import json
import subprocess
import sys


def loaded(*modules: str, main: list[str] | None = None) -> tuple[str, set[str]]:
    """What such a program prints, and the top-level names of the modules it loads."""
    arguments = [] if main is None else ["--", *main]
    command = [sys.executable, "-m", "loading", *modules, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    output, _, names = ended.stdout.rstrip().rpartition("\n")
    return output, set(json.loads(names))


if __name__ == "__main__":
    modules, arguments = sys.argv[1:], None
    if "--" in modules:
        end = modules.index("--")
        modules, arguments = modules[:end], modules[end + 1 :]
    imported = [importlib.import_module(name) for name in modules]
    if arguments is not None:
        with contextlib.suppress(SystemExit):  # --help
            imported[-1].main(arguments)
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
