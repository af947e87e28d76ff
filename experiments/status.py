"""Shows how far a run is and if it is alive: one screen, from the run's files alone.

    workdir/{config,alive,summary}.json, metrics.jsonl, states/ --read--> dict
    dict --lines--> text        (--json: the same numbers for a program)

Does not start JAX: works on any machine, at any time.
"""

import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from experiments.run.alive import ENDS, SILENT, judge
from experiments.run.progress import duration
from sinder_jax import cli, launch
from sinder_jax.storage import run_files
from sinder_jax.storage.paths import AnyPath, as_path

WINDOW = 100  # a median loss is over at most this many images with a defect
NAMED = 5  # at most this many bad files are named
BARS = "▁▂▃▄▅▆▇█"
ESSENTIALS = ("lr", "momentum", "mask_thr", "active_blocks", "images_per_step")
DIAGNOSIS = ("verdict", "block", "photographs", "with_defect")
# What a repair from the weights alone has none of.
OF_IMAGES = ("config", "images", "stops", "defects", "loss", "bad", "log", "saved")
EXAMPLE = """\
examples:
  python -m experiments.status runs/giant
  python -m experiments.status gs://bucket/runs/giant --json

Exit codes: 0 whatever state the run is in; 2 for a folder that holds no run.
"""

Row = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the status of a workdir; returns 0.

    Raises:
      ValueError, OSError: the folder holds no run or cannot be read.
    """
    parser = cli.Parser(
        prog="python -m experiments.status",
        description="Show where a repair stands and if it is alive.",
        epilog=EXAMPLE,
    )
    parser.add_argument("workdir", metavar="WORKDIR", help="folder or gs://BUCKET/NAME")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    status = read(as_path(args.workdir), now=time.time())
    shown = map(cli.shown, lines(status))
    print(json.dumps(status, indent=2) if args.json else "\n".join(shown))
    return 0


# --- Reading --------------------------------------------------------------------------


def read(workdir: AnyPath, *, now: float) -> dict[str, Any]:
    """Everything known about a run, as JSON values; None if not known yet.

    Args:
      workdir: a folder of a disk or a bucket.
      now: seconds, Unix time.

    Raises:
      ValueError: `workdir` is not a folder, or holds no file of a run.
    """
    if not workdir.is_dir() or not run_files.is_workdir(workdir):
        reason = "holds no run" if workdir.is_dir() else "is not a folder"
        raise ValueError(f"{workdir} {reason}: give the --workdir of a repair")
    names = (run_files.CONFIG, run_files.ALIVE, run_files.SUMMARY, run_files.DIAGNOSIS)
    config, alive, summary, diagnosis = (_read_json(workdir / name) for name in names)
    rows = run_files.read_metrics(workdir)
    folder = workdir / run_files.STATES
    states = [int(path.name) for path in run_files.numbered(folder)]
    # A bucket's metrics are written with each state only; the sign of life is newer.
    logged = max([0, *states, *(row["image"] + 1 for row in rows[-1:])])
    alive_at = alive.get("images")
    images = max(logged, alive_at if isinstance(alive_at, int) else 0)
    finished = summary.get("finished") is True
    limit = config.get("max_iter")
    return {
        "workdir": str(workdir),
        **{key: config.get(key) for key in ("model", "checkpoint", "data")},
        **{key: config.get(key) for key in ESSENTIALS},
        "repair": config.get("repair", "sinder"),
        **{key: diagnosis.get(key, summary.get(key)) for key in DIAGNOSIS},
        "prepared": (workdir / run_files.FROZEN).exists(),
        **_life(alive, finished, now),
        "images": images,
        "max_iter": limit,
        **_pace(alive.get("history") or [], images, None if finished else limit),
        "share_without_defect": rows[-1].get("skipped") if rows else None,
        "history": config.get("history"),
        "stop_share": config.get("stop_share"),
        **_metrics(rows),
        "lacking": run_files.lacking((row["image"] for row in rows), logged),
        "newest_state": max(states, default=None),
        "images_lost_if_killed": 0 if finished else images - max(states, default=0),
        "damaged_states": sorted(path.name for path in folder.glob("*.damaged")),
        "finished": finished,
        "files": summary.get("files") or [],
        "go_on": summary.get("go_on"),
    }


def _read_json(path: AnyPath) -> dict[str, Any]:
    """The JSON object of a file; empty if the file is missing or incomplete."""
    try:
        return run_files.read_json(path)
    except (FileNotFoundError, ValueError):
        return {}


# --- Counting -------------------------------------------------------------------------


def _life(alive: Row, finished: bool, now: float) -> dict[str, Any]:
    life = running = None
    try:
        if alive:
            life = judge(alive, now=now)
            end = now if life.alive and not finished else alive["time"]
            running = max(0.0, end - alive["started"])
    except (KeyError, TypeError, AttributeError):  # written by another version
        alive, life = {}, None
    return {
        "phase": "finished" if finished else alive.get("phase"),
        "alive": None if life is None else life.alive and not finished,
        "sign_of_life_seconds_ago": None if life is None else round(life.age, 1),
        "process_was_looked_for": life is not None and life.seen,
        **{key: alive.get(key) for key in ("host", "pid", "devices", "processes")},
        "running_seconds": running,
        "command": alive.get("command"),
    }


def _pace(
    history: Sequence[Sequence[float]], images: int, limit: int | None
) -> dict[str, Any]:
    """Images per second over the last minutes, and the longest time that is left."""
    rate = left = None
    if len(history) > 1:
        (begin, first), (end, last) = history[0], history[-1]
        rate = (last - first) / (end - begin) if end > begin else None
    if rate and limit is not None:
        left = (limit - images) / rate
    return {"images_per_second": rate, "seconds_left_at_most": left}


def _metrics(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts of defects and bad images, and the loss at the start and now."""
    # layer is None for an unreadable image, -1 for an image without a defect.
    found = [row for row in rows if row.get("layer") not in (None, -1)]
    counts = Counter(row["layer"] for row in found)
    losses = [row["loss"] for row in found if row.get("loss") is not None]
    window = min(WINDOW, (len(losses) + 1) // 2)  # start and now do not overlap
    values: dict[str, Any] = {
        "images_with_defect": len(found),
        "defects_by_block": {str(block): counts[block] for block in sorted(counts)},
        "loss_at_start": statistics.median(losses[:window]) if losses else None,
        "loss_now": statistics.median(losses[-window:]) if losses else None,
        "loss_window": window,
    }
    for name, key in (("not_finite", "finite"), ("unreadable", "readable")):
        bad = [str(row.get("file")) for row in rows if row.get(key) is False]
        values[f"images_{name}"] = len(bad)
        values[f"files_{name}"] = list(dict.fromkeys(bad))[:NAMED]
    return values


# --- One screen -----------------------------------------------------------------------


def lines(status: Mapping[str, Any]) -> list[str]:
    """The status as text, one labelled line per topic; leaves out what is unknown."""
    now = SimpleNamespace(**status)
    many = (now.processes or 1) > 1
    source = f" from {now.checkpoint}" if now.checkpoint else ""
    model = f"{now.model}{source}"
    model += f", photographs of {now.data}" if now.data else ""
    known = [f"{key} {status[key]}" for key in ESSENTIALS if status[key] is not None]
    devices = f"{now.devices}{f' of {now.processes} processes' if many else ''}"
    stops = loss = ""
    if now.history is not None and now.stop_share is not None:
        share = now.share_without_defect
        needed = math.ceil(now.stop_share * now.history - 1e-9)
        stops = "" if share is None else f"{share:.0%} now; "
        stops += f"when {needed} of the last {now.history} had no defect"
    if now.loss_now is not None:
        loss = f"{now.loss_at_start:.3f} at the start, {now.loss_now:.3f} now "
        loss += f"(medians of {now.loss_window} images)"
    bad = (
        f"{now.images_not_finite} not finite{_list(': ', now.files_not_finite)}; "
        f"{now.images_unreadable} unreadable{_list(': ', now.files_unreadable)}"
    )
    saved = "no state yet"
    if now.newest_state is not None:
        saved = f"state after {now.newest_state} images"
    if not now.finished and now.alive is not False:
        saved += f"; a kill now would lose {now.images_lost_if_killed}"
    elif now.images_lost_if_killed:
        saved += f"; {now.images_lost_if_killed} after it will be seen again"
    saved += _list("; set aside as damaged: ", now.damaged_states)
    command = f": the first command again, --workdir={now.workdir}"
    if now.command:
        command = f"{' on every host' if many else ''}: {now.command}"
    next_ = "" if now.alive else f"to resume{command}"
    if now.finished:
        files = ", ".join([*map(str, now.files), run_files.SUMMARY])
        next_ = f"results in {now.workdir}: {files}"
        if not now.files and now.go_on:
            next_ = f"nothing was repaired; {now.go_on}"
    shown = {
        "run": now.workdir,
        "model": model if now.model is not None else "not known yet: no config.json",
        "config": "  ".join(known),
        "verdict": _verdict(now),
        "state": _state(now),
        "devices": devices if now.devices else "",
        "images": _images(now),
        "stops": stops,
        "defects": _defects(now),
        "loss": loss,
        "bad": bad,
        "log": f"{now.lacking}; none of these is counted above" if now.lacking else "",
        "saved": saved,
        "next": next_,
    }
    if now.repair != "sinder":
        shown = {label: x for label, x in shown.items() if label not in OF_IMAGES}
    return [f"{label:<9}{text}" for label, text in shown.items() if text]


def _state(now: SimpleNamespace) -> str:
    ago = now.sign_of_life_seconds_ago
    if now.finished:
        return "finished"
    if ago is None:
        return f"unknown: no {run_files.ALIVE}"
    seen = f"last sign of life {duration(ago)} ago"
    where = f"process {now.pid} on {now.host}"
    if now.alive:
        silent = ", silent but there" if ago > SILENT else ""
        running = duration(now.running_seconds)
        return f"alive{silent}: {now.phase}; {where} for {running}, {seen}"
    if now.phase.startswith(ENDS):
        return f"not running: {now.phase}; {seen}"
    gone = "is gone" if now.process_was_looked_for else "is silent"
    return f"DEAD while {now.phase}: {where} {gone}, {seen}"


def _verdict(now: SimpleNamespace) -> str:
    if now.verdict is None:
        return ""
    where = "" if now.block in (None, -1) else f" in block {now.block}"
    shown = "said by the weights alone"
    if now.photographs is not None:
        shown = f"{now.with_defect} of {now.photographs} photographs show it"
    return f"{now.verdict}{where}: {shown}"


def _images(now: SimpleNamespace) -> str:
    limit = "" if now.max_iter is None else f" of at most {now.max_iter}"
    text = f"{now.images}{limit}"
    if not now.images and not now.prepared:
        return f"{text}; directions and singular values are not stored yet"
    if now.images_per_second and now.alive:
        text += f"  {now.images_per_second:.2f} img/s"
        if now.seconds_left_at_most is not None:
            text += f"  at most {duration(now.seconds_left_at_most)} left"
    return text


def _defects(now: SimpleNamespace) -> str:
    counts = {int(block): n for block, n in now.defects_by_block.items()}
    if not counts:
        return "none yet" if now.images else ""
    first, last, most = min(counts), max(counts), max(counts.values())
    top = len(BARS) - 1
    bars = "".join(
        BARS[math.ceil(top * counts[block] / most)] if block in counts else "·"
        for block in range(first, last + 1)
    )
    often = sorted(counts, key=lambda block: -counts[block])[:3]
    worst = ", ".join(f"{counts[block]} in {block}" for block in often)
    unicode = (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
    shown = f"blocks {first} to {last} {bars}" if unicode else "by block"
    return f"{now.images_with_defect} images; {shown}  most: {worst}"


def _list(before: str, names: Sequence[str]) -> str:
    return before + ", ".join(names) if names else ""


if __name__ == "__main__":
    launch.exit_on_error(main)
