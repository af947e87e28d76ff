"""Two runs in one workdir: started at once, or one suspended while the other goes on.

    python -m benchmarks.faults.double_starts [--seed=0] [--starts=100] [--resumes=20]
        [--pauses=10] [--keep=DIR]

A double start is two processes of `experiments.repair`, at the same moment or up to
three seconds apart: one must go on and end with the files of a lone run, the other end
in one line with exit code 2. The first of them are resumes of a run that was stopped or
killed. For a pause, SIGSTOP suspends a process at a random moment. A second one, to
which the first seems to run on another host, takes the workdir over and finishes. Then
the first is woken up: it must end in one line with exit code 2, and no file may change.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

SHORT = (
    "--config=tiny.py",
    "--config.images_per_step=1",
    "--config.max_iter=20",
    "--config.checkpoint_every=3",
    "--config.picture_every=10",
    "--config.measure_images=1",
)
COMPARED = ("metrics.jsonl", "before_after.png", "planted.safetensors", "repaired.*")
SPREAD = 3.0  # seconds between two starts, at most
SILENT = 2.0  # seconds until a process of another host counts as dead
LIMIT = 600  # seconds until a process counts as hanging

# Children of a process that has imported the program: they start within milliseconds.
processes = multiprocessing.get_context("forkserver")


class Run:
    """A process that repairs; `away` lets it seem to run on another host."""

    def __init__(self, workdir: Path, cache: Path, *, away: bool = False):
        workdir.parent.mkdir(parents=True, exist_ok=True)
        self.told = Path(tempfile.mkdtemp(dir=workdir.parent))
        arguments = [*SHORT, f"--workdir={workdir}", f"--compilation-cache={cache}"]
        self.process = processes.Process(
            target=repair, args=(arguments, self.told, away)
        )
        self.process.start()

    def end(self) -> int | None:
        """Waits; returns the exit code, None if it hung."""
        self.process.join(LIMIT)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
        return code

    def read(self, name: str) -> str:
        return (self.told / name).read_text()

    def is_refused(self, message: str) -> bool:
        """True if it said nothing but one line and ended with exit code 2."""
        lines = self.read("stderr").splitlines()
        return self.end() == 2 and len(lines) == 1 and message in lines[0]


def repair(arguments: list[str], told: Path, away: bool) -> None:
    """What a child runs."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(told / name, os.O_WRONLY | os.O_CREAT), number)
    from experiments import repair
    from experiments.run import alive
    from sinder_jax import launch

    if away:
        name = socket.gethostname()
        socket.gethostname = lambda: f"not-{name}"  # type: ignore[assignment]
        alive.SILENT = SILENT
    launch.exit_on_error(lambda: repair.main(arguments))


def results(workdir: Path) -> dict[str, str]:
    """SHA-256 of the files that must be those of a lone run, and its summary."""
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in COMPARED
        for path in workdir.glob(pattern)
        if path.is_file()
    }
    summary = json.loads((workdir / "summary.json").read_text())
    return found | {"summary": json.dumps({**summary, "seconds": 0})}


def contents(folder: Path) -> dict[str, tuple]:
    """Every file and folder, with the time of a file's last change."""
    return {
        str(path.relative_to(folder)): (
            (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else ()
        )
        for path in folder.rglob("*")
    }


def lines(workdir: Path) -> int:
    """Number of images in the metrics."""
    metrics = workdir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def cut_short(workdir: Path, cache: Path, number: int) -> Path:
    """A workdir whose run was ended by a signal after ten images."""
    run = Run(workdir, cache)
    while lines(workdir) < 10 and run.process.exitcode is None:
        time.sleep(0.01)
    os.kill(run.process.pid, number)
    run.end()
    return workdir


def double_start(workdir: Path, cache: Path, apart: float, want: dict) -> str:
    """Starts two runs; says what came of it."""
    first = Run(workdir, cache)
    time.sleep(apart)
    second = Run(workdir, cache)
    runs = sorted((first, second), key=lambda run: run.end() or 0)
    codes = [run.end() for run in runs]
    if codes == [0, 0] and " is finished" in second.read("stdout"):
        return "the second came after the end of the first"
    if codes != [0, 2]:
        return f"WRONG: exit codes {codes}: {[run.read('stderr') for run in runs]}"
    if not runs[1].is_refused("error: another run "):
        return f"WRONG: refused with {runs[1].read('stderr')!r}"
    if results(workdir) != want:
        return "WRONG: other files than those of a lone run"
    return "one went on, with the files of a lone run"


def pause(workdir: Path, cache: Path, moment: float, want: dict) -> str:
    """Suspends a run some seconds after its claim, lets another take over, wakes it."""
    first = Run(workdir, cache)
    while not (workdir / "claims").exists() and first.process.exitcode is None:
        time.sleep(0.001)
    time.sleep(moment)
    with contextlib.suppress(ProcessLookupError):
        os.kill(first.process.pid, signal.SIGSTOP)
    if first.process.exitcode is not None:
        return "it had finished before"
    if (workdir / "summary.json").exists():
        os.kill(first.process.pid, signal.SIGCONT)
        first.end()
        return "it had finished before"
    at = lines(workdir)
    second = Run(workdir, cache, away=True)
    code = second.end()
    same = code == 0 and results(workdir) == want
    before = contents(workdir)
    os.kill(first.process.pid, signal.SIGCONT)
    first.end()
    after = contents(workdir)
    if not same:
        return f"WRONG: the second ended with {code}, {second.read('stderr')!r}"
    if before != after:
        changed = {n for n in before | after if before.get(n) != after.get(n)}
        return f"WRONG: woken after {moment:.3f} s, {at} images, it wrote {changed}"
    if not first.is_refused(f"error: this run lost {workdir} to not-"):
        told = first.end(), first.read("stderr")
        return f"WRONG: woken after {moment:.3f} s, {at} images, it ended with {told}"
    return "the woken run wrote nothing and ended in one line with exit code 2"


def main() -> int:
    """Prints how often each outcome was seen; returns 1 if one was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, count in (("starts", 100), ("resumes", 20), ("pauses", 10)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the workdirs gone wrong")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    processes.set_forkserver_preload(["experiments.repair"])
    seen: collections.Counter[str] = collections.Counter()

    with tempfile.TemporaryDirectory() as folder:
        top, cache = Path(folder), Path(folder) / "cache"
        cut = [
            cut_short(top / f"cut_{number}", cache, number)
            for number in (signal.SIGKILL, signal.SIGTERM)
        ]
        began = time.monotonic()
        assert Run(top / "lone", cache).end() == 0
        took, want = time.monotonic() - began, results(top / "lone")

        def tell(kind: str, number: int, workdir: Path, outcome: str) -> None:
            seen[f"{kind}: {outcome}"] += 1
            print(f"{kind} {number}: {outcome}", flush=True)
            if "WRONG" in outcome and args.keep:
                shutil.copytree(workdir.parent, args.keep / f"{kind}_{number}")
            shutil.rmtree(workdir.parent)

        for number in range(args.starts):
            workdir = top / f"start_{number}" / "run"
            kind = "resume" if number < args.resumes else "start"
            if kind == "resume":
                shutil.copytree(rng.choice(cut), workdir)
            apart = rng.choice([0.0, rng.uniform(0, 0.1), rng.uniform(0, SPREAD)])
            outcome = double_start(workdir, cache, apart, want)
            tell(kind, number, workdir, outcome)
        done = 0
        while done < args.pauses:
            workdir = top / f"pause_{done}" / "run"
            outcome = pause(workdir, cache, rng.uniform(0, took), want)
            tell("pause", done, workdir, outcome)
            done += "before" not in outcome
    print("\n".join(f"{count} x {outcome}" for outcome, count in sorted(seen.items())))
    return int(any("WRONG" in outcome for outcome in seen))


if __name__ == "__main__":
    sys.exit(main())
