"""Damaged and hostile input: is every piece taken rightly, or refused in one line?

    python -m benchmarks.faults.mutations [--seed=0] [--only=safetensors,pth]
        [--count=N] [--keep=FOLDER]

    kind --trials--> command lines --run in a watched process--> verdicts, counted

Every kind in `kinds()` makes its inputs from the seed. A worker process runs the
program's own `main` on each, within 10 seconds and a memory of twice the input and
64 MB. Prints a table of the verdicts and every trial that failed; exit code 1 if any
did. Linux only: peak memory is read from /proc.
"""

import argparse
import collections
import contextlib
import functools
import importlib
import io
import json
import math
import os
import select
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.faults.trial import Trial
from sinder_jax import cli

SECONDS = 10.0
START = 120.0  # seconds that a new worker may take to import everything
SPARE = 64 * 2**20  # bytes of memory, beside twice the input
ACCEPTED = ("right", "as stored", "refused")
REFUSALS = ("error: ", "skipped, unreadable: ")  # the second of a photograph
VERDICTS = (*ACCEPTED, "wrong", "traceback", "hang", "memory", "crash")


class Kind(NamedTuple):
    """A kind of input.

    Attributes:
      count: number of trials.
      module: the program, whose `main` takes a list of arguments.
      trials: makes the trials in a folder, without end; the first one's input is not
        mutated and stays, that of the others may go when the next is asked for.
      seconds: that one trial may take; None: `SECONDS`.
      spare: bytes of memory that one may take, beside twice the input.
    """

    count: int
    module: str
    trials: Callable[[Path, np.random.Generator], Iterator[Trial]]
    seconds: float | None = None
    spare: float = SPARE


def kinds() -> dict[str, Kind]:
    """All kinds of input by name; imported here, so that a worker need not."""
    from benchmarks.faults import (
        mutated_config,
        mutated_images,
        mutated_pth,
        mutated_safetensors,
    )

    convert = "convert.__main__"
    return {
        "safetensors": Kind(500, convert, mutated_safetensors.trials),
        "pth": Kind(300, convert, mutated_pth.trials),
        "images": Kind(200, "experiments.visualize", mutated_images.trials),
        # A value that is taken may compile another step, at 100 MB and seconds.
        "config": Kind(
            300, "experiments.repair", mutated_config.trials, 4 * SECONDS, 4 * SPARE
        ),
    }


class Outcome(NamedTuple):
    """How one trial ended: its verdict, and what the program said."""

    what: str
    verdict: str
    said: str


def run(
    name: str, *, seed: int = 0, count: int | None = None, keep: Path | None = None
) -> list[Outcome]:
    """Runs the trials of one kind, the same for the same seed.

    Args:
      name: a key of `kinds()`.
      seed: of the mutations.
      count: number of trials; None: the kind's own.
      keep: folder for copies of the inputs that failed.
    """
    kind = kinds()[name]
    rng = np.random.default_rng([seed, *name.encode()])
    outcomes = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as workers:
        trials = kind.trials(Path(folder), rng)
        first, worker = next(trials), None
        for _ in range(kind.count if count is None else count):
            if worker is None:
                worker = workers.enter_context(_Worker(kind.module))
                # What the first run of a program imports and keeps does not count.
                verdict, said = worker.verdict(first, START, spare=math.inf)
                assert verdict == "right", f"{first.what}: {verdict}, {said}"
            trial = next(trials)
            seconds = kind.seconds or SECONDS
            verdict, said = worker.verdict(trial, seconds, kind.spare)
            outcomes.append(Outcome(trial.what, verdict, said))
            if keep and trial.input and verdict not in ACCEPTED:
                shutil.copy(trial.input, keep / f"{len(outcomes)}_{trial.input.name}")
            if verdict in ("hang", "crash"):
                worker = None
    return outcomes


class _Worker:
    """A process that runs the program on one input after the other."""

    def __init__(self, module: str):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.faults.mutations", "--worker", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._process.communicate()

    def verdict(
        self, trial: Trial, seconds: float = SECONDS, spare: float = SPARE
    ) -> tuple[str, str]:
        """Runs one trial; returns its verdict and what the program said."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "out")
            arguments = [each.replace("OUT", str(out)) for each in trial.arguments]
            answer = self._ask(arguments, seconds)
            if isinstance(answer, str):
                return answer, ""
            code, said, growth = answer
            size = trial.input.stat().st_size if trial.input else 0
            if isinstance(code, str):
                return "traceback", code
            if growth > 2 * size + spare:
                return "memory", f"{growth / 2**20:.0f} MB more; {said}"
            if code == 0:
                return trial.judge(out), said
        one_line = said.startswith(REFUSALS) and said.count("\n") == 1
        return ("refused" if code == 2 and one_line else "traceback"), said

    def _ask(self, arguments: list[str], seconds: float) -> Any:
        """[exit code or traceback, stderr, growth of memory]; "hang" or "crash"."""
        assert self._process.stdin and self._process.stdout
        print(json.dumps(arguments), file=self._process.stdin, flush=True)
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            self._process.kill()
            return "hang"
        line = self._process.stdout.readline()
        return json.loads(line) if line else "crash"


def work(module: str) -> None:
    """Runs `main` of a module on every line of stdin; see `_Worker`."""
    main = importlib.import_module(module).main
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for line in sys.stdin:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        before = _peak()
        with contextlib.redirect_stderr(io.StringIO()) as error:
            code: int | str | None
            try:
                arguments = json.loads(line)
                code = cli.run(functools.partial(main, arguments))
            except SystemExit as ended:  # argparse
                code = ended.code
            except BaseException:
                code = traceback.format_exc()
        growth = 1024 * (_peak() - before)
        print(json.dumps([code, error.getvalue(), growth]), file=answers)


def _peak() -> int:
    """Largest resident memory since the peak was last cleared, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> int:
    """Runs all kinds, or those asked for; 1 if a trial failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="kinds, separated by commas")
    parser.add_argument("--count", type=int, help="trials of each kind")
    parser.add_argument("--keep", type=Path, help="folder for inputs that failed")
    parser.add_argument("--worker", metavar="MODULE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return 0
    failed = []
    print("| kind | trials | " + " | ".join(VERDICTS) + " |")
    print("|---" * (2 + len(VERDICTS)) + "|")
    for name in options.only.split(",") if options.only else kinds():
        outcomes = run(name, seed=options.seed, count=options.count, keep=options.keep)
        counts = collections.Counter(outcome.verdict for outcome in outcomes)
        cells = " | ".join(str(counts[verdict]) for verdict in VERDICTS)
        print(f"| {name} | {len(outcomes)} | {cells} |", flush=True)
        failed += [x for x in outcomes if x.verdict not in ACCEPTED]
    for outcome in failed:
        print(f"\n{outcome.verdict}: {outcome.what}\n{outcome.said.strip()[-1500:]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
