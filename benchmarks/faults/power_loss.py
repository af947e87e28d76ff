"""Power losses: does a run go on to the same results, or is it refused in one line?

    python -m benchmarks.faults.power_loss [--seed=0] [--losses=60] [--keep=FOLDER]

    a run --SIGKILL at a random moment of a phase--> workdir
    files of its last two seconds --emptied | cut | holes | removed--> started again

The planted model, six images, a state after every second one. All young files are lost,
some, or one, and having been flushed does not protect them: a disk that lies about it
is covered too. Every loss begins with a new workdir. The second start must end with the
files and counts of a run that nothing disturbed ("right"), or with exit code 2 and one
line ("refused"); lines that metrics.jsonl lacks must be told. Prints every refusal and
failure, and how each phase ended; exit code 1 if any failed. Linux only.
"""

import argparse
import collections
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import repair
from sinder_jax import checkpoint, launch

YOUNG = 2.0  # seconds
LONGEST = 180.0  # seconds that a start may take
RUN = (
    "--config=tiny.py",
    "--config.images_per_step=1",
    "--config.max_iter=6",
    "--config.checkpoint_every=2",
    "--config.picture_every=1000",
    "--config.measure_images=1",
)
PHASES = (
    "starting",
    "factors",
    "storing",
    "repairing",
    "saving",
    "exporting",
    "ending",
    "finished",
)
COUNTS = (
    "images",
    "images_with_defect",
    "images_not_finite",
    "images_unreadable",
    "files_not_finite",
    "unreadable_files",
    "share_of_last_images_without_defect",
)
BLOCK = 4096  # bytes that a disk writes at once
VERDICTS = ("right", "refused", "wrong", "traceback", "hang")

# --- Damage ---------------------------------------------------------------------------


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _holes(path: Path) -> None:
    """Zeros in place of every second block; of a small file, of its second half."""
    content = bytearray(path.read_bytes())
    block = min(BLOCK, len(content) // 2 or 1)
    for start in range(block, len(content), 2 * block):
        content[start : start + block] = bytes(len(content[start : start + block]))
    path.write_bytes(content)


FAULTS: dict[str, Callable[[Path], Any]] = {
    "emptied": lambda path: os.truncate(path, 0),
    "cut": _cut,
    "holes": _holes,
    "removed": Path.unlink,
}


def inflict(fault: str, path: Path) -> None:
    """Damages a file, or every file of a folder; "removed" takes the folder, too."""
    if fault == "removed" and path.is_dir():
        shutil.rmtree(path)
        return
    for each in path.rglob("*") if path.is_dir() else [path]:
        if each.is_file():
            FAULTS[fault](each)


def lose(workdir: Path, now: float, chance: random.Random) -> list[str]:
    """Damages files that were written in the two seconds before `now`.

    Returns:
      What was done, a line per file.
    """
    young = [
        path
        for path in sorted(workdir.rglob("*"))
        if path.is_file() and now - path.stat().st_mtime <= YOUNG
    ]
    lost = chance.choice((young, chance.choices(young, k=1) if young else []))
    if young and chance.random() < 0.4:
        lost = [path for path in young if chance.random() < 0.5]
    kinds = chance.choice((*FAULTS, "mixed"))
    told = []
    for path in lost:
        fault = chance.choice([*FAULTS]) if kinds == "mixed" else kinds
        inflict(fault, path)
        told.append(f"{fault} {path.relative_to(workdir)}")
    if kinds == "removed" and chance.random() < 0.5:  # their folders never existed
        for folder in sorted(workdir.rglob("*"), reverse=True):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    return told


# --- Runs -----------------------------------------------------------------------------


# Each run is a process of its own, forked from one that has imported everything.
forks = multiprocessing.get_context("forkserver")


def start(workdir: Path, cache: Path) -> BaseProcess:
    """Starts the run; what it prints on stderr goes to `told(workdir)`."""
    process = forks.Process(target=_run, args=(workdir, cache))
    process.start()
    return process


def _run(workdir: Path, cache: Path) -> None:
    for descriptor, path in ((1, Path(os.devnull)), (2, told(workdir))):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    arguments = [*RUN, f"--workdir={workdir}", f"--compilation-cache={cache}"]
    launch.exit_on_error(lambda: repair.main(arguments))


def told(workdir: Path) -> Path:
    """What the last start of a run printed on stderr."""
    return workdir.with_suffix(".stderr")


def reached(phase: str, workdir: Path) -> bool:
    """True if a run has come to a phase, from its files."""
    states = [path.name for path in (workdir / "states").glob("[0-9]*")]
    if phase == "starting":
        return workdir.exists()
    if phase == "saving":
        return bool(states)
    if phase == "ending":
        return (workdir / "repaired.safetensors").exists()
    if phase == "finished":
        return (workdir / "summary.json").exists()
    words = {
        "factors": ("directions", "singular values"),
        "storing": ("storing",),
        "repairing": ("repairing",),
        "exporting": ("exporting",),
    }[phase]
    try:
        shown = json.loads((workdir / "alive.json").read_text())["phase"]
    except (OSError, ValueError):
        return False
    return shown.startswith(words)


def kill_in(phase: str, workdir: Path, cache: Path, chance: random.Random) -> float:
    """Kills a new run in a phase, at a random moment; returns the time of its death."""
    process = start(workdir, cache)
    deadline = time.monotonic() + LONGEST
    while not reached(phase, workdir) and process.is_alive():
        assert time.monotonic() < deadline, f"{phase} was not reached"
        time.sleep(0.003)
    time.sleep(chance.uniform(0, 0.6))
    process.kill()
    now = time.time()
    process.join()
    return now


# --- Verdicts -------------------------------------------------------------------------


def differences(workdir: Path, alone: Path, text: str) -> list[str]:
    """In what a finished run differs from the one that nothing disturbed."""
    return [*_differences(workdir, alone, text)]


def _differences(workdir: Path, alone: Path, text: str) -> Iterator[str]:
    for name in sorted(path.name for path in alone.glob("repaired.*")):
        lost = not (workdir / name).exists()
        if lost or (workdir / name).read_bytes() != (alone / name).read_bytes():
            yield name
    (_, got), (_, want) = (
        checkpoint.load(path / "repaired") for path in (workdir, alone)
    )
    if not jax.tree.all(jax.tree.map(np.array_equal, got, want)):
        yield "repaired"
    summary, expected = (
        json.loads((path / "summary.json").read_text()) for path in (workdir, alone)
    )
    for name in COUNTS:
        if summary.get(name) != expected[name]:
            yield f"{name} of summary.json: {summary.get(name)}"
    lines, whole = (
        (path / "metrics.jsonl").read_text().splitlines() for path in (workdir, alone)
    )
    if lines != [each for each in whole if each in lines]:
        yield "metrics.jsonl holds other lines"
    if len(lines) < len(whole) and "metrics.jsonl lacks" not in text:
        yield "metrics.jsonl lacks lines, and nobody says so"


def judge(workdir: Path, alone: Path, cache: Path) -> tuple[str, str]:
    """Starts a run again; returns the verdict and what there is to say about it."""
    process = start(workdir, cache)
    process.join(LONGEST)
    if process.is_alive():
        process.kill()
        return "hang", ""
    text = told(workdir).read_text()
    errors = [line for line in text.splitlines() if not line.startswith("warning: ")]
    if "Traceback" in text:
        return "traceback", text
    if process.exitcode == 2 and len(errors) == 1 and errors[0].startswith("error: "):
        return "refused", errors[0]
    if process.exitcode or errors:
        return "wrong", f"exit code {process.exitcode}: {text}"
    found = differences(workdir, alone, text)
    return ("wrong", f"differs in {found}: {text}") if found else ("right", text)


def main() -> int:
    """Inflicts the losses; returns 1 if any ended badly."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of moments and damages")
    parser.add_argument("--losses", type=int, default=60, help="how many")
    parser.add_argument("--keep", type=Path, help="keep failed workdirs in this folder")
    args = parser.parse_args()
    verdicts: dict[str, collections.Counter[str]] = collections.defaultdict(
        collections.Counter
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone, cache = folder / "alone", folder / "cache"
        forks.set_forkserver_preload(["experiments.repair", "matplotlib.pyplot"])
        first = start(alone, cache)
        first.join()
        assert first.exitcode == 0, told(alone).read_text()
        for i in range(args.losses):
            chance = random.Random(f"{args.seed} {i}")
            phase, workdir = PHASES[i % len(PHASES)], folder / f"run{i}"
            lost = lose(workdir, kill_in(phase, workdir, cache, chance), chance)
            verdict, reason = judge(workdir, alone, cache)
            verdicts[phase][verdict] += 1
            if verdict != "right":
                print(f"{i} {phase}: {verdict}: {reason.strip()}", flush=True)
            if verdict not in ("right", "refused"):
                print("  " + "\n  ".join(lost), flush=True)
                if args.keep:
                    shutil.copytree(workdir, args.keep / workdir.name)
            shutil.rmtree(workdir)
    print(f"{'':10}" + "".join(f"{verdict:>10}" for verdict in VERDICTS))
    total = sum(verdicts.values(), start=collections.Counter[str]())
    for phase, counts in [*verdicts.items(), ("all", total)]:
        print(f"{phase:10}" + "".join(f"{counts[verdict]:10}" for verdict in VERDICTS))
    return int(any(total[verdict] for verdict in VERDICTS[2:]))


if __name__ == "__main__":
    sys.exit(main())
