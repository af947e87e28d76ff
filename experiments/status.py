"""Shows where a run stands and if it is alive: one screen, from its files alone.

    workdir/{config,alive,summary}.json, metrics.jsonl, states/ --read--> dict
    dict --lines--> text        (--json: the same numbers for a program)

JAX is not started: a status can be asked for on any machine, at any time.
"""

import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.run import heartbeat
from experiments.run.progress import duration
from sinder_jax import cli
from sinder_jax.storage import run_files
from sinder_jax.storage.paths import AnyPath, as_path

WINDOW = 100  # at most so many images with a defect make up a median loss
NAMED = 5  # so many bad files are named
BARS = "▁▂▃▄▅▆▇█"
ESSENTIALS = ("lr", "momentum", "mask_thr", "active_blocks", "images_per_step")
EXAMPLE = """\
examples:
  python -m experiments.status runs/giant
  python -m experiments.status gs://bucket/runs/giant --json

Exit codes: 0, whatever the run does; 2 for a folder that holds no run.
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
    parser.add_argument("workdir", metavar="WORKDIR", help="of the repair, local or gs")
    parser.add_argument("--json", action="store_true", help="for a program")
    args = parser.parse_args(argv)
    status = read(as_path(args.workdir), now=time.time())
    print(json.dumps(status, indent=2) if args.json else "\n".join(lines(status)))
    return 0


# --- Reading --------------------------------------------------------------------------


def read(workdir: AnyPath, *, now: float) -> dict[str, Any]:
    """Everything known of a run, as JSON values; None for what is not known yet.

    Args:
      workdir: a folder of a disk or a bucket.
      now: seconds, Unix time.

    Raises:
      ValueError: `workdir` is not a folder, or holds no file of a run.
    """
    if not workdir.is_dir():
        raise ValueError(f"{workdir} is no folder: give the --workdir of a repair")
    if not run_files.is_workdir(workdir):
        raise ValueError(f"{workdir} holds no run: give the --workdir of a repair")
    config, alive, summary = (
        _read_json(workdir / name)
        for name in (run_files.CONFIG, run_files.ALIVE, run_files.SUMMARY)
    )
    rows = run_files.read_metrics(workdir)
    folder = workdir / run_files.STATES
    states = [run_files.number_of(path) for path in run_files.numbered(folder)]
    # A bucket's metrics are written with each state only; the sign of life is newer.
    counts = (alive.get("images"), rows[-1]["image"] + 1 if rows else 0)
    images = max(0, *states, *(n for n in counts if isinstance(n, int)))
    finished = summary.get("finished") is True
    limit = config.get("max_iter")
    return {
        "workdir": str(workdir),
        **{key: config.get(key) for key in ("model", "checkpoint", "data")},
        **{key: config.get(key) for key in ESSENTIALS},
        "prepared": (workdir / run_files.FROZEN).exists(),
        **_life(alive, finished, now),
        "images": images,
        "max_iter": limit,
        **_pace(alive.get("history") or [], images, limit),
        "share_without_defect": rows[-1].get("skipped") if rows else None,
        "history": config.get("history"),
        "stop_share": config.get("stop_share"),
        **_defects(rows),
        **_bad(rows, "not_finite", "finite"),
        **_bad(rows, "unreadable", "readable"),
        "newest_state": max(states, default=None),
        "images_lost_if_killed": 0 if finished else images - max(states, default=0),
        "damaged_states": sorted(path.name for path in folder.glob("*.damaged")),
        "finished": finished,
        "files": summary.get("files") or [],
    }


def _read_json(path: AnyPath) -> dict[str, Any]:
    """A file's object; empty if there is none, or not a complete one yet."""
    try:
        return run_files.read_json(path)
    except (FileNotFoundError, ValueError):
        return {}


# --- Counting -------------------------------------------------------------------------


def _life(alive: Row, finished: bool, now: float) -> dict[str, Any]:
    life = running = None
    try:
        if alive:
            life = heartbeat.judge(alive, now=now)
            running = max(0.0, now - alive["started"])
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
    """Images per second over the last minutes, and how long the rest takes at most."""
    rate = left = None
    if len(history) > 1:
        (begin, first), (end, last) = history[0], history[-1]
        rate = (last - first) / (end - begin) if end > begin else None
    if rate and limit is not None:
        left = (limit - images) / rate
    return {"images_per_second": rate, "seconds_left_at_most": left}


def _defects(rows: Sequence[Row]) -> dict[str, Any]:
    # None: not readable; -1: no defect.
    found = [row for row in rows if row.get("layer") not in (None, -1)]
    counts = Counter(row["layer"] for row in found)
    losses = [row["loss"] for row in found if row.get("loss") is not None]
    window = min(WINDOW, (len(losses) + 1) // 2)  # start and now do not overlap
    return {
        "images_with_defect": len(found),
        "defects_by_block": {str(block): counts[block] for block in sorted(counts)},
        "loss_at_start": statistics.median(losses[:window]) if losses else None,
        "loss_now": statistics.median(losses[-window:]) if losses else None,
        "loss_window": window,
    }


def _bad(rows: Sequence[Row], name: str, key: str) -> dict[str, Any]:
    """Number of images whose `key` is false, and the first few different files."""
    bad = [str(row.get("file")) for row in rows if row.get(key) is False]
    files = list(dict.fromkeys(bad))[:NAMED]
    return {f"images_{name}": len(bad), f"files_{name}": files}


# --- One screen -----------------------------------------------------------------------


def lines(status: Mapping[str, Any]) -> list[str]:
    """The status as text, each line with its label."""
    shown = {
        "run": status["workdir"],
        "model": _model_line(status),
        "config": _config_line(status),
        "state": _life_line(status),
        "devices": _devices_line(status),
        "images": _images_line(status),
        "stops": _stops_line(status),
        "defects": _defects_line(status),
        "loss": _loss_line(status),
        "bad": _bad_line(status),
        "saved": _saved_line(status),
        "next": _next_line(status),
    }
    return [f"{label:<9}{text}" for label, text in shown.items() if text]


def _model_line(status: Row) -> str:
    if status["model"] is None:
        return "not known yet: no config.json"
    source = f" from {status['checkpoint']}" if status["checkpoint"] else ""
    return f"{status['model']}{source}, photographs of {status['data']}"


def _config_line(status: Row) -> str:
    known = [key for key in ESSENTIALS if status[key] is not None]
    return "  ".join(f"{key} {status[key]}" for key in known)


def _life_line(status: Row) -> str:
    ago = status["sign_of_life_seconds_ago"]
    if status["finished"]:
        return "finished"
    if ago is None:
        return f"unknown: no {run_files.ALIVE}"
    seen = f"last sign of life {duration(ago)} ago"
    where = f"process {status['pid']} on {status['host']}"
    if status["alive"]:
        silent = ", silent but there" if ago > heartbeat.SILENT else ""
        running = duration(status["running_seconds"])
        return f"alive{silent}: {status['phase']}; {where} for {running}, {seen}"
    if status["phase"].startswith(heartbeat.ENDS):
        return f"not running: {status['phase']}; {seen}"
    gone = "is gone" if status["process_was_looked_for"] else "is silent"
    return f"DEAD while {status['phase']}: {where} {gone}, {seen}"


def _devices_line(status: Row) -> str:
    if not status["devices"]:
        return ""
    several = (status["processes"] or 1) > 1
    processes = f" of {status['processes']} processes" if several else ""
    return f"{status['devices']}{processes}"


def _images_line(status: Row) -> str:
    limit, rate = status["max_iter"], status["images_per_second"]
    text = f"{status['images']}" + ("" if limit is None else f" of at most {limit}")
    if not status["images"] and not status["prepared"]:
        return f"{text}; directions and singular values are not stored yet"
    if rate and status["alive"]:
        text += f"  {rate:.2f} img/s"
        if status["seconds_left_at_most"] is not None:
            text += f"  at most {duration(status['seconds_left_at_most'])} left"
    return text


def _stops_line(status: Row) -> str:
    if status["history"] is None or status["stop_share"] is None:
        return ""
    share = status["share_without_defect"]
    now = "" if share is None else f"{share:.0%} now; "
    needed = math.ceil(status["stop_share"] * status["history"] - 1e-9)
    return f"{now}when {needed} of the last {status['history']} had no defect"


def _defects_line(status: Row) -> str:
    counts = {int(block): n for block, n in status["defects_by_block"].items()}
    if not counts:
        return "none yet" if status["images"] else ""
    first, last, most = min(counts), max(counts), max(counts.values())
    top = len(BARS) - 1
    bars = "".join(
        BARS[math.ceil(top * counts[block] / most)] if block in counts else "·"
        for block in range(first, last + 1)
    )
    often = sorted(counts, key=lambda block: -counts[block])[:3]
    worst = ", ".join(f"{counts[block]} in {block}" for block in often)
    shown = f"blocks {first} to {last} {bars}" if _is_unicode() else "by block"
    return f"{status['images_with_defect']} images; {shown}  most: {worst}"


def _loss_line(status: Row) -> str:
    if status["loss_now"] is None:
        return ""
    start, now = status["loss_at_start"], status["loss_now"]
    window = status["loss_window"]
    return f"{start:.3f} at the start, {now:.3f} now (medians of {window} images)"


def _bad_line(status: Row) -> str:
    parts = []
    for kind, name in (("not finite", "not_finite"), ("unreadable", "unreadable")):
        count, files = status[f"images_{name}"], status[f"files_{name}"]
        parts.append(f"{count} {kind}" + (f": {', '.join(files)}" if files else ""))
    return "; ".join(parts)


def _saved_line(status: Row) -> str:
    newest, lost = status["newest_state"], status["images_lost_if_killed"]
    text = "no state yet" if newest is None else f"state after {newest} images"
    if not status["finished"]:
        text += f"; a kill now would lose {lost}"
    if status["damaged_states"]:
        text += f"; set aside as damaged: {', '.join(status['damaged_states'])}"
    return text


def _next_line(status: Row) -> str:
    if status["finished"]:
        files = ", ".join(map(str, status["files"]))
        return f"results in {status['workdir']}: {files}, summary.json"
    if status["alive"]:
        return ""
    where = " on every host" if (status["processes"] or 1) > 1 else ""
    if status["command"]:
        return f"to go on{where}: {status['command']}"
    return f"to go on: the first command again, --workdir={status['workdir']}"


def _is_unicode() -> bool:
    return (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")


if __name__ == "__main__":
    cli.exit_on_error(main)
