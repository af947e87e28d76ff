"""The status of a run: every number from files that a test wrote by hand."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from etils import epath

from experiments import status
from experiments.run import alive as judged
from loading import loaded

CONFIG = {
    "model": "planted",
    "checkpoint": "",
    "data": "sample",
    "lr": 0.02,
    "momentum": 0.9,
    "mask_thr": 4.0,
    "active_blocks": 10,
    "images_per_step": 1,
    "max_iter": 400,
    "history": 40,
    "stop_share": 0.75,
}


def row(image, layer=5, loss=1.0, **changes):
    readable = layer is not None
    usual = {
        "image": image,
        "file": f"photos/{image}.jpg",
        "readable": readable,
        "layer": layer,
        "loss": loss if readable and layer >= 0 else None,
        "alpha": 3.0,
        "num_outliers": 7,
        "finite": True if readable else None,
        "skipped": 0.25,
    }
    return usual | changes


ROWS = [
    *(row(i, layer=5, loss=8.0 - i) for i in range(4)),
    row(4, layer=-1),
    row(5, layer=None),
    row(6, layer=7, loss=0.5),
    row(7, layer=7, loss=None, finite=False),
]


def make(workdir, *, rows=ROWS, states=(), config=CONFIG, alive=None, summary=None):
    """A workdir as a run leaves it."""
    workdir.mkdir(exist_ok=True)
    if config:
        (workdir / "config.json").write_text(json.dumps(config))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (workdir / "metrics.jsonl").write_text(text)
    for name in states:
        (workdir / "states" / name).mkdir(parents=True)
    for name, facts in (("alive", alive), ("summary", summary)):
        if facts is not None:
            (workdir / f"{name}.json").write_text(json.dumps(facts))
    return epath.Path(workdir)


def sign(**changes):
    usual = {
        "host": "another",
        "pid": 17,
        "process": None,
        "started": 900.0,
        "time": 990.0,
        "phase": "repairing",
        "images": 8,
        "history": [[980.0, 0], [982.0, 4], [984.0, 8]],
        "devices": "8 x TPU v4",
        "processes": 2,
        "command": "python -m experiments.repair --config=giant.py --workdir=w",
    }
    return usual | changes


def read(workdir, now=1000.0):
    return status.read(workdir, now=now)


def screen(workdir, now=1000.0):
    """Lines by their label."""
    text = status.lines(read(workdir, now))
    assert len(text) <= 24
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in text}


def test_what_the_metrics_say_is_counted(tmp_path):
    got = read(make(tmp_path))
    assert (got["images"], got["max_iter"]) == (8, 400)
    assert got["images_with_defect"] == 6
    assert got["defects_by_block"] == {"5": 4, "7": 2}
    assert (got["images_not_finite"], got["images_unreadable"]) == (1, 1)
    assert got["files_not_finite"] == ["photos/7.jpg"]
    assert got["files_unreadable"] == ["photos/5.jpg"]
    assert got["share_without_defect"] == 0.25
    # five losses, 8 7 6 5 0.5: the first three, the last three
    assert (got["loss_at_start"], got["loss_now"], got["loss_window"]) == (7, 5, 3)


def test_lines_that_are_lacking_are_told(tmp_path):
    text = json.dumps(ROWS[7])[:-9].replace('"image": 7', '"image": 9')
    workdir = make(tmp_path, rows=[*ROWS[:3], *ROWS[5:]], states=["00000010"])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(bytes(50) + b"\n" + text.encode() + b"\n")
    got = read(workdir)
    assert (got["images"], got["images_with_defect"]) == (10, 5)
    told = "metrics.jsonl lacks 4 of 10 images: 3-4, 8-9"
    assert got["lacking"] == told
    assert screen(workdir)["log"].startswith(told)
    assert "log" not in screen(make(tmp_path / "whole"))


def test_losses_are_medians_of_the_first_and_last_hundred(tmp_path):
    rows = [row(i, loss=float(i)) for i in range(1000)]
    got = read(make(tmp_path, rows=rows))
    assert (got["loss_at_start"], got["loss_now"]) == (49.5, 949.5)


def test_a_finished_run_grows_no_older_and_has_nothing_left(tmp_path):
    ended = sign(phase="finished")
    workdir = make(tmp_path, alive=ended, summary={"finished": True})
    for now in (1000.0, 10_000.0):
        got = read(workdir, now)
        assert (got["running_seconds"], got["seconds_left_at_most"]) == (90.0, None)


def test_a_stopped_run_has_nothing_more_to_lose(tmp_path):
    make(tmp_path, states=["6"], alive=sign(phase="stopped: SIGTERM"))
    saved = screen(epath.Path(tmp_path))["saved"]
    assert saved == "state after 6 images; 2 after it will be seen again"


def test_many_bad_files_are_counted_and_five_named(tmp_path):
    rows = [row(i, layer=None, file=f"photos/{i % 9}.jpg") for i in range(20)]
    got = read(make(tmp_path, rows=rows))
    assert got["images_unreadable"] == 20
    assert got["files_unreadable"] == [f"photos/{i}.jpg" for i in range(5)]


def test_rate_and_time_left_come_from_the_history(tmp_path):
    got = read(make(tmp_path, alive=sign()))
    assert got["images_per_second"] == 2.0
    assert got["seconds_left_at_most"] == (400 - 8) / 2.0
    shown = screen(epath.Path(tmp_path))["images"]
    assert shown == "8 of at most 400  2.00 img/s  at most 3 min 16 s left"


def test_a_run_elsewhere_is_alive_by_its_age(tmp_path):
    workdir = make(tmp_path, alive=sign())
    assert read(workdir, now=1000.0)["alive"] is True
    shown = screen(workdir)
    assert shown["state"] == (
        "alive: repairing; process 17 on another for 1 min 40 s, last sign of life "
        "10 s ago"
    )
    assert shown["devices"] == "8 x TPU v4 of 2 processes"
    assert "next" not in shown


def test_a_dead_run_says_how_to_go_on(tmp_path):
    shown = screen(make(tmp_path, alive=sign()), now=2000.0)
    assert shown["state"] == (
        "DEAD while repairing: process 17 on another is silent, last sign of life "
        "16 min 50 s ago"
    )
    assert shown["next"] == f"to resume on every host: {sign()['command']}"
    assert "img/s" not in shown["images"]


def test_a_dead_process_of_this_host_is_seen_at_once(tmp_path):
    own = judged._process(os.getpid())
    if own is None:
        pytest.skip("no /proc here")
    gone = sign(host=socket.gethostname(), process=own | {"start": "1"}, time=999.0)
    shown = screen(make(tmp_path, alive=gone))
    assert "process 17 on" in shown["state"] and "is gone" in shown["state"]


@pytest.mark.parametrize("phase", ["stopped: preempted", "failed: the loss is nan"])
def test_a_run_that_ended_says_why_and_how_to_go_on(phase, tmp_path):
    shown = screen(make(tmp_path, alive=sign(phase=phase, processes=1, command="")))
    assert shown["state"].startswith(f"not running: {phase}")
    assert shown["next"].startswith("to resume: the first command again")


def test_a_finished_run_says_where_its_results_are(tmp_path):
    summary = {"finished": True, "files": ["repaired", "before_after.png"]}
    workdir = make(tmp_path, alive=sign(phase="exporting"), summary=summary)
    got, shown = read(workdir), screen(workdir)
    assert got["finished"] and got["alive"] is False
    assert got["images_lost_if_killed"] == 0
    assert shown["state"] == "finished"
    assert shown["next"].endswith("repaired, before_after.png, summary.json")


def test_a_summary_of_a_run_that_was_stopped_is_not_the_end(tmp_path):
    alive = sign(phase="stopped: preempted")
    workdir = make(tmp_path, alive=alive, summary={"finished": False, "images": 8})
    assert not read(workdir)["finished"]
    assert screen(workdir)["next"].startswith("to resume")


def test_where_metrics_come_late_the_sign_of_life_counts_the_images(tmp_path):
    workdir = make(tmp_path, states=["6"], alive=sign(images=11))
    got = read(workdir)
    assert (got["images"], got["images_lost_if_killed"]) == (11, 5)


def test_saved_states_and_what_a_kill_would_lose(tmp_path):
    names = ("00000002", "6", "00000007.damaged", ".partial", "x")
    workdir = make(tmp_path, states=names)
    got = read(workdir)
    assert (got["newest_state"], got["images_lost_if_killed"]) == (6, 2)
    assert got["damaged_states"] == ["00000007.damaged"]
    assert screen(workdir)["saved"] == (
        "state after 6 images; a kill now would lose 2; set aside as damaged: "
        "00000007.damaged"
    )


def test_the_stopping_rule_and_the_defects_by_block(tmp_path):
    shown = screen(make(tmp_path))
    assert shown["stops"] == "25% now; when 30 of the last 40 had no defect"
    assert shown["defects"].startswith("6 images; ")
    assert shown["defects"].endswith("most: 4 in 5, 2 in 7")


# --- Files that are not yet, or no longer, whole ----------------------------------


@pytest.mark.parametrize(
    "end", ['{"image": 8, "lay', "\x00\x00\n", '"text"\n', "[1]\n"]
)
def test_a_line_that_is_not_whole_is_passed_over(end, tmp_path):
    workdir = make(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(end)
    assert read(workdir)["images"] == 8


def test_half_a_character_at_the_end_is_passed_over(tmp_path):
    workdir = make(tmp_path)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write('{"image": 8, "file": "ü'.encode()[:-1])
    assert read(workdir)["images"] == 8


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "{}", '{"phase": 3}'])
@pytest.mark.parametrize("name", ["config.json", "alive.json", "metrics.jsonl"])
def test_any_file_may_be_broken(name, text, tmp_path):
    make(tmp_path, alive=sign())
    (tmp_path / name).write_text(text)
    assert screen(epath.Path(tmp_path))["run"] == str(tmp_path)


KNOWN = ("config.json", "alive.json", "metrics.jsonl", "frozen", "states")


@pytest.mark.parametrize("name", KNOWN)
def test_a_run_just_begun_has_a_status(name, tmp_path):
    if "." in name:
        (tmp_path / name).write_text("")
    else:
        (tmp_path / name).mkdir()
    got, shown = read(epath.Path(tmp_path)), screen(epath.Path(tmp_path))
    assert (got["images"], got["alive"], got["newest_state"]) == (0, None, None)
    assert shown["state"] == "unknown: no alive.json"


# --- The command ------------------------------------------------------------------


def command(*arguments):
    program = [sys.executable, "-m", "experiments.status", *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True)


def test_the_command_prints_one_screen(tmp_path):
    make(tmp_path, alive=sign(time=time.time()))
    done = command(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "alive: repairing" in done.stdout and done.stdout.count("\n") <= 24


def test_json_is_what_read_gives(tmp_path):
    workdir = make(tmp_path)
    assert json.loads(command(tmp_path, "--json").stdout) == read(workdir)


@pytest.mark.parametrize("kind", ["empty", "other", "file", "missing"])
def test_a_folder_that_is_no_workdir_is_one_line(kind, tmp_path):
    path = tmp_path / "x"
    if kind == "file":
        path.write_text("")
    elif kind != "missing":
        path.mkdir()
    if kind == "other":
        (path / "notes.txt").write_text("")
    done = command(path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_jax_is_not_started(tmp_path):
    make(tmp_path)
    _, names = loaded("experiments.status", main=[str(tmp_path)])
    assert "experiments" in names and not {"jax", "flax", "orbax"} & names
