"""A run that is stopped, killed or moved ends as if nothing had happened.

All on the planted model: in this process where that is enough, else in processes of
their own. `test_processes.py` has runs of several processes.
"""

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import bucket
import places
from experiments import repair, status
from experiments.run import compiled
from sinder_jax import checkpoint, cli, launch, param_tree

STEPS = 12
# A run of twelve steps, saved after every third image.
SHORT = (
    "--config=tiny.py",
    "--config.images_per_step=1",
    f"--config.max_iter={STEPS}",
    "--config.checkpoint_every=3",
    "--config.picture_every=1000",
    "--config.measure_images=1",
)


def run(workdir, *arguments, code=0):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert repair.main([*arguments, f"--workdir={workdir}"]) == code
    return output.getvalue()


def state_of(workdir):
    newest = checkpoint.load_newest(workdir / "states")
    return {name: np.asarray(x) for name, x in param_tree.flatten(newest.tree).items()}


def assert_same(one, two):
    assert (one / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()
    got, want = state_of(one), state_of(two)
    assert got.keys() == want.keys() and "num_images" in got
    for name in want:
        assert got[name].tobytes() == want[name].tobytes(), name
    files = [path / "repaired.safetensors" for path in (one, two)]
    assert files[0].read_bytes() == files[1].read_bytes()


def begun(workdir, like):
    """A workdir whose frozen model is computed already: a second less for each test."""
    workdir.mkdir()
    for name in ("frozen", "config.json", "photographs.json", "planted.safetensors"):
        source = like / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, workdir / name)
    return workdir


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    run(workdir, *SHORT)
    rows = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == list(range(STEPS))
    assert sum(row["layer"] >= 0 for row in rows) >= 10  # it repairs all the way
    return workdir


def signal_at(monkeypatch, image, number):
    """Sends this process a signal when the step is to take that image."""
    step = repair.Runner.step

    def interrupted(self, batch):
        if image in batch.positions:
            os.kill(os.getpid(), number)
        return step(self, batch)

    monkeypatch.setattr(repair.Runner, "step", interrupted)


# --- Told to stop ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "k",
    [
        pytest.param(k, marks=[] if k == 12 else pytest.mark.slow)
        for k in range(1, STEPS + 1)
    ],
)
def test_stopped_after_any_step_it_goes_on_to_the_same_bits(
    k, whole, tmp_path, monkeypatch
):
    workdir = begun(tmp_path / "run", whole)
    with monkeypatch.context() as patched:
        signal_at(patched, k - 1, [signal.SIGTERM, signal.SIGINT][k % 2])
        output = run(workdir, *SHORT, code=cli.TRY_AGAIN)
    assert f"stopped after {k} images, all saved in {workdir}" in output
    told = json.loads((workdir / "summary.json").read_text())
    assert told["finished"] is False and told["images"] == k
    assert told["stopped_by"] in ("SIGTERM", "SIGINT")
    assert not (workdir / "repaired").exists()
    assert int(state_of(workdir)["num_images"]) == k
    assert f"resuming after {k} images" in run(workdir, *SHORT)
    assert_same(workdir, whole)
    assert json.loads((workdir / "summary.json").read_text())["finished"] is True


def test_stopped_before_its_first_step_it_has_nothing_to_save(
    whole, tmp_path, monkeypatch, capsys
):
    workdir = begun(tmp_path / "run", whole)
    with monkeypatch.context() as patched:
        patched.setattr(
            repair.inputs.original,
            "load",
            lambda _: os.kill(os.getpid(), signal.SIGTERM),
        )
        run(workdir, *SHORT, code=cli.TRY_AGAIN)
    assert (
        "stopped by SIGTERM: run the same command to resume" in capsys.readouterr().err
    )
    assert not (workdir / "metrics.jsonl").exists()
    run(workdir, *SHORT)
    assert_same(workdir, whole)


def test_stopped_while_it_exports_it_exports_the_next_time(
    whole, tmp_path, monkeypatch
):
    workdir = begun(tmp_path / "run", whole)
    with monkeypatch.context() as patched:
        patched.setattr(
            repair.results,
            "export_delta",
            lambda *_: os.kill(os.getpid(), signal.SIGTERM),
        )
        run(workdir, *SHORT, code=cli.TRY_AGAIN)
    assert f"resuming after {STEPS} images" in run(workdir, *SHORT)
    assert_same(workdir, whole)


def test_a_second_interrupt_stops_at_once(whole, tmp_path, monkeypatch):
    workdir = begun(tmp_path / "run", whole)

    def interrupted(self, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(repair.Runner, "step", interrupted)
        run(workdir, *SHORT)
    run(workdir, *SHORT)
    assert_same(workdir, whole)


# --- Faults ---------------------------------------------------------------------------


def test_an_image_that_is_not_finite_changes_nothing_and_is_named(
    whole, tmp_path, monkeypatch
):
    workdir = begun(tmp_path / "run", whole)
    step = repair.Runner.step

    def poisoned(self, batch):
        if 4 in batch.positions:
            batch = batch._replace(images=np.full_like(batch.images, np.nan))
        return step(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(repair.Runner, "step", poisoned)
        output = run(workdir, *SHORT)
    rows = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows if not row["finite"]] == [4]
    named = rows[4]["file"]
    assert f"skipped, not finite: {named}\n" in output
    told = json.loads((workdir / "summary.json").read_text())
    assert told["images_not_finite"] == 1 and told["files_not_finite"] == [named]
    assert rows[3]["loss"] is not None and rows[4]["loss"] is None


def test_images_that_are_not_finite_end_the_run_after_some_in_a_row(
    whole, tmp_path, monkeypatch, capsys
):
    workdir = begun(tmp_path / "run", whole)
    step = repair.Runner.step

    def poisoned(self, batch):
        if batch.positions[0] >= 2:
            batch = batch._replace(images=np.full_like(batch.images, np.nan))
        return step(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(repair.Runner, "step", poisoned)
        line = failure(workdir, capsys, "--config.max_bad_steps=3")
    assert "3 images in a row gave tokens, loss or gradient that are not fin" in line
    assert "the last " in line and "(config.lr=0.02, config.max_bad_steps)" in line
    rows = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["finite"] for row in rows] == [True, True, False, False, False]
    assert not (workdir / "repaired").exists()


def failure(workdir, capsys, *arguments):
    """What a run says on stderr that ends with exit code 2; one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        launch.exit_on_error(
            lambda: repair.main([*SHORT, *arguments, f"--workdir={workdir}"])
        )
    assert ending.value.code == cli.USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def at_image(monkeypatch, image, act):
    step = repair.Runner.step

    def acting(self, batch):
        if image in batch.positions:
            act()
        return step(self, batch)

    monkeypatch.setattr(repair.Runner, "step", acting)


def test_a_full_disk_ends_the_run_and_leaves_the_last_state(
    whole, tmp_path, monkeypatch, capsys
):
    """No file may grow any more: the same errors as those of a full disk."""
    workdir = begun(tmp_path / "run", whole)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patched:
        at_image(
            patched,
            7,
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1])),
        )
        try:
            line = failure(workdir, capsys)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(workdir) in line and "File too large" in line
    saved = int(state_of(workdir)["num_images"])
    assert saved in (3, 6)  # the last one was perhaps being written
    assert f"resuming after {saved} images" in run(workdir, *SHORT)
    assert_same(workdir, whole)


def test_a_workdir_that_vanishes_ends_the_run_and_is_not_made_anew(
    whole, tmp_path, monkeypatch, capsys
):
    workdir = begun(tmp_path / "run", whole)

    def vanish():
        while not (workdir / "states" / "00000003").exists():  # saved behind the steps
            time.sleep(0.01)
        workdir.rename(tmp_path / "elsewhere")

    with monkeypatch.context() as patched:
        at_image(patched, 5, vanish)
        line = failure(workdir, capsys)
    assert f"{workdir} was removed during the run" in line
    assert not workdir.exists()
    assert int(state_of(tmp_path / "elsewhere")["num_images"]) == 3


def test_a_run_that_was_taken_over_ends_in_one_line_and_writes_nothing_more(
    whole, tmp_path, monkeypatch, capsys
):
    """As if it had been suspended between two steps, while another host went on."""
    workdir, before = begun(tmp_path / "run", whole), {}

    def take_over():
        while not (workdir / "states" / "00000003").exists():  # saved behind the steps
            time.sleep(0.01)
        (workdir / "claims").mkdir(exist_ok=True)
        facts = {"host": "another", "pid": 7, "process": None, "phase": "starting"}
        facts |= {"claim": 2, "time": time.time(), "started": time.time()}
        (workdir / "claims" / "00000002").write_text(json.dumps(facts))
        (workdir / "claims" / "00000001").unlink(missing_ok=True)
        before.update(contents(workdir))

    with monkeypatch.context() as patched:
        at_image(patched, 5, take_over)
        line = failure(workdir, capsys)
    assert line.startswith(f"error: this run lost {workdir} to another pid 7, started ")
    assert line.endswith(": nothing more is written here")
    assert contents(workdir) == before


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


# --- Options of a start ---------------------------------------------------------------


def test_programs_are_kept_in_a_folder_of_this_users_own(
    whole, tmp_path, monkeypatch, capsys
):
    cache = tmp_path / "cache"
    told = jax.config.jax_compilation_cache_dir
    try:
        compiled.keep(str(cache))
        assert cache.stat().st_mode & 0o777 == 0o700
        assert jax.config.jax_compilation_cache_dir == str(cache)
    finally:
        jax.config.update("jax_compilation_cache_dir", told)
    cache.chmod(0o777)
    line = failure(tmp_path / "run", capsys, f"--compilation-cache={cache}")
    assert "nobody else may write to it" in line and not (tmp_path / "run").exists()
    assert told is None  # off by default


def test_a_run_can_be_traced_and_shown_in_tensorboard(whole, tmp_path):
    pytest.importorskip("tensorboardX")
    workdir = begun(tmp_path / "run", whole)
    run(workdir, *SHORT, "--profile=3:5", "--config.tensorboard=true")
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    assert list((workdir / "tensorboard").iterdir())
    assert_same(workdir, whole)
    alive = json.loads((workdir / "alive.json").read_text())
    assert alive["phase"] == "finished" and alive["images"] == STEPS


# --- Another number of devices --------------------------------------------------------


def start(workdir, *arguments, devices=2, stop_at=-1, **options):
    """The main job in a process of its own, stopped by SIGTERM at an image."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "NPROC": "8",  # the size of XLA's thread pool, which changes bits
    }
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.support.stopped_at", str(stop_at)),
            *arguments,
            f"--workdir={workdir}",
        ],
        env=environment,
        cwd=places.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def ended(process, code=0):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return output, errors


@pytest.mark.slow
@pytest.mark.parametrize("split", ["false", "true"])
def test_devices_may_come_and_go(split, whole, tmp_path):
    arguments = [*SHORT, "--config.images_per_step=8", f"--config.split_model={split}"]
    arguments += ["--config.max_iter=48", "--config.checkpoint_every=8"]
    alone = tmp_path / "alone"
    ended(start(alone, *arguments, devices=8))
    moved = tmp_path / "moved"
    for devices, stop_at, code in ((4, 8, 75), (1, 24, 75), (8, -1, 0)):
        process = start(moved, *arguments, devices=devices, stop_at=stop_at)
        output, _ = ended(process, code)
        assert f"8 images per step on {devices} x " in output
    assert_same(moved, alone)


# --- Killed ---------------------------------------------------------------------------


def test_a_killed_process_goes_on_to_the_same_bits(whole, tmp_path):
    """SIGKILL: nothing is cleaned up, no buffer is flushed, whatever it was doing."""
    workdir = begun(tmp_path / "run", whole)
    command = [sys.executable, "-m", "experiments.repair", *SHORT]
    process = subprocess.Popen(
        [*command, f"--workdir={workdir}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= 4:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert 4 <= len(metrics.read_text().splitlines()) <= STEPS
    assert not (workdir / "summary.json").exists()
    run(workdir, *SHORT)
    assert_same(workdir, whole)


@pytest.mark.slow
def test_thirty_kills_lose_at_most_a_save_interval_each(whole, tmp_path):
    """At random moments: while it starts, computes, saves, removes old states."""
    every, images = 2, 600
    arguments = [*SHORT, f"--config.max_iter={images}", "--config.history=600"]
    arguments += ["--config.stop_share=1.0", f"--config.checkpoint_every={every}"]
    workdir, alone = begun(tmp_path / "run", whole), begun(tmp_path / "alone", whole)
    for each in (workdir, alone):  # of another config
        ended(start(each, *arguments, "--force", stop_at=0), 75)
    moments = random.Random(0)
    metrics = workdir / "metrics.jsonl"

    def done():
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    resumes, before = 0, done()
    while resumes < 30:
        process = start(workdir, *arguments)
        deadline = time.monotonic() + 60
        # From the start of the process on, or once it takes steps.
        if moments.random() < 0.8:
            began = done()
            while done() <= began and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        time.sleep(moments.uniform(0, 1.0))
        process.send_signal(signal.SIGKILL)
        output, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        resumes += 1
        newest = checkpoint.load_newest(workdir / "states")
        assert not newest.damaged
        saved = int(newest.tree["num_images"])
        # A step's metrics come a step late, a save is written behind the next steps.
        assert saved >= done() - 2 * every, (saved, done())
        assert saved >= before
        before = saved
    ended(start(workdir, *arguments, stop_at=before + 4), 75)
    ended(start(alone, *arguments, stop_at=before + 4), 75)
    one, two = (path / "metrics.jsonl" for path in (workdir, alone))
    assert one.read_bytes() == two.read_bytes()
    got, want = state_of(workdir), state_of(alone)
    for name in want:
        assert got[name].tobytes() == want[name].tobytes(), name
    assert jax.tree.structure(got) == jax.tree.structure(want)


# --- In a bucket ----------------------------------------------------------------------


def test_a_run_in_a_bucket_is_stopped_and_goes_on_to_the_same_bits(
    whole, tmp_path, monkeypatch
):
    """Against a stand-in (`tests/support/bucket.py`): no real bucket was reached."""
    cloud = tmp_path / "cloud"
    bucket.install(monkeypatch, cloud)
    place = "gs://bucket/run"
    with monkeypatch.context() as patched:
        signal_at(patched, 6, signal.SIGTERM)
        run(place, *SHORT, code=cli.TRY_AGAIN)
    assert "resuming after 7 images" in run(place, *SHORT)
    stored = cloud / "bucket" / "run"
    for name in ("metrics.jsonl", "repaired.safetensors", "before_after.png"):
        assert (stored / name).read_bytes() == (whole / name).read_bytes(), name
    assert status.main([place]) == 0
    assert run(place, *SHORT).startswith(f"{place} is finished")
