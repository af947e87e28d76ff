"""The scripts: all are Bash without errors of syntax; `until_done.sh` also behaves.

The commands for a TPU slice and for Slurm are tried against stand-ins of `gcloud`,
`srun` and `scontrol` that write down what they are called with.
"""

import os
import signal
import subprocess
import sys
import time

import pytest

import places

ROOT = places.ROOT
SCRIPTS = sorted((ROOT / "scripts").iterdir())
UNTIL_DONE = ROOT / "scripts" / "until_done.sh"
EXITS = (sys.executable, places.SUPPORT / "exits.py")
STOPPABLE = (sys.executable, places.SUPPORT / "stoppable.py")
INTERRUPTIBLE = (sys.executable, places.SUPPORT / "interruptible.py")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_has_no_errors_of_syntax(path):
    subprocess.run(["bash", "-n", path], check=True)


def until_done(*command, **options):
    environment = os.environ | {"WAIT": "0", "TRIES": "3"}
    return subprocess.Popen([UNTIL_DONE, *command], env=environment, **options)


@pytest.mark.parametrize(
    ("codes", "last", "starts"),
    [
        ("0", 0, 1),
        ("2", 2, 1),
        ("1", 1, 1),
        ("130", 130, 1),
        ("75,75,75,75,0", 0, 5),  # a stop is no crash, however often
        ("75,2", 2, 2),
        ("134,0", 0, 2),  # ended by JAX, since another process died
        ("137,134,0", 0, 3),
        ("134,137,134", 134, 3),  # a crash loop
        ("134,137,75,134,134,0", 0, 6),  # crashes, but not in a row
    ],
)
def test_a_stopped_or_killed_command_is_started_again(codes, last, starts, tmp_path):
    counter = tmp_path / "starts"
    process = until_done(*EXITS, counter, codes, stderr=subprocess.PIPE)
    error = process.communicate(timeout=30)[1].decode()
    assert process.returncode == last
    assert len(counter.read_text()) == starts
    assert error.count("starting again") == starts - 1
    assert ("3 times in a row: giving up" in error) == (codes == "134,137,134")


def stopped_by(number, *command, ready):
    """Exit code and stderr after a signal, sent once the file `ready` exists."""
    process = subprocess.Popen(
        [*INTERRUPTIBLE, UNTIL_DONE, *command], stderr=subprocess.PIPE
    )
    end = time.monotonic() + 20
    while not ready.exists():
        assert time.monotonic() < end, "the command was not started"
        time.sleep(0.01)
    process.send_signal(number)
    return process.wait(timeout=20), process.communicate()[1].decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_command_which_is_not_started_again(number, tmp_path):
    ready, stopped = tmp_path / "ready", tmp_path / "stopped"
    code, error = stopped_by(number, *STOPPABLE, ready, stopped, ready=ready)
    assert (code, stopped.read_text()) == (75, number.name)
    assert "starting again" not in error


def test_ctrl_c_reaches_a_command_without_a_handler(tmp_path):
    ready = tmp_path / "ready"
    code, error = stopped_by(signal.SIGINT, *STOPPABLE, ready, ready=ready)
    assert code == 130 and "KeyboardInterrupt" in error


def test_without_a_command_it_says_how_to_use_it():
    process = until_done(stderr=subprocess.PIPE)
    assert b"usage" in process.communicate(timeout=20)[1]
    assert process.returncode == 2


def stand_ins(folder, **programs):
    """An environment whose programs are these lines of Bash."""
    for name, line in programs.items():
        path = folder / name
        path.write_text(f"#!/usr/bin/env bash\n{line}\n")
        path.chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        (0, 0, False),
        (2, 0, False),
        (75, 0, True),
        (75, 99, True),
        (134, 0, True),
        (137, 4, True),
        (134, 5, False),  # the job died early, and often
    ],
)
def test_slurm_requeues_a_stopped_or_killed_job(code, restarts, requeued, tmp_path):
    environment = stand_ins(
        tmp_path,
        srun=f'echo "srun $*"; exit {code}',
        scontrol='echo "scontrol $*"',
    ) | {
        "SLURM_JOB_ID": "17",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_RESTART_COUNT": str(restarts),
    }
    script = ROOT / "scripts" / "slurm.sbatch"
    done = subprocess.run(
        ["bash", script, "--config=tiny.py", "--workdir=a b"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert "-m experiments.repair --config=tiny.py --workdir=a b" in done.stdout
    assert ("scontrol requeue 17" in done.stdout) == requeued


@pytest.mark.parametrize("command", ["create", "setup", "run", "log", "stop", "delete"])
def test_every_command_for_a_tpu_slice_names_it(command, tmp_path):
    environment = stand_ins(tmp_path, gcloud='echo "gcloud $*"', git="exit 0") | {
        "TPU": "sinder",
        "ZONE": "zone",
        "TYPE": "v5litepod-32",
        "IMAGE": "v2-alpha-tpuv5-lite",
    }
    script = ROOT / "scripts" / "tpu_pod.sh"
    arguments = ["--config=tiny.py", "--workdir=gs://b/x y"] if command == "run" else []
    done = subprocess.run(
        [script, command, *arguments], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "gcloud compute tpus tpu-vm" in done.stdout
    assert "sinder" in done.stdout and "--zone=zone" in done.stdout
    assert ("--worker=all" in done.stdout) == (command not in ("create", "delete"))
    if command == "run":
        assert "--workdir=gs://b/x\\ y" in done.stdout


def test_what_a_host_is_told_to_run_keeps_its_arguments(tmp_path):
    home, told = tmp_path / "home", tmp_path / "told"
    (home / "sinder" / "scripts").mkdir(parents=True)
    host = home / "sinder" / "scripts" / "until_done.sh"
    host.write_text(f"#!/usr/bin/env bash\nprintf '%s\\n' \"$@\" >{told}\n")
    host.chmod(0o755)
    on_host = (
        'for last; do :; done; cd "$HOST" && HOME=$HOST bash -c "${last#--command=}"'
    )
    environment = stand_ins(tmp_path, gcloud=on_host) | {
        "TPU": "x",
        "ZONE": "y",
        "HOST": str(home),
    }
    script = ROOT / "scripts" / "tpu_pod.sh"
    arguments = ["--config=tiny.py", "--workdir=gs://b/x y", "--config.data=$a'b"]
    subprocess.run([script, "run", *arguments], env=environment, check=True)
    assert int((home / "repair.pid").read_text()) > 0
    end = time.monotonic() + 20
    while not told.exists() or len(told.read_text().splitlines()) < 6:
        assert time.monotonic() < end, "nothing was started"
        time.sleep(0.01)
    start = [".venv/bin/python", "-m", "experiments.repair"]
    assert told.read_text().splitlines() == [*start, *arguments]


def test_an_unknown_command_for_a_tpu_slice_is_refused(tmp_path):
    environment = stand_ins(tmp_path, gcloud="exit 1") | {"TPU": "x", "ZONE": "y"}
    script = ROOT / "scripts" / "tpu_pod.sh"
    done = subprocess.run([script, "start"], env=environment, capture_output=True)
    assert done.returncode == 2 and b"usage" in done.stderr
