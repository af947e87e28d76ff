"""run/claim.py: one owner at a time, and nothing written by those who lost."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import bucket as buckets
from experiments.run import alive, sinks
from experiments.run import claim as claims
from experiments.run.claim import Claim, LostError
from experiments.run.heartbeat import Heartbeat
from experiments.run.workdir import Workdir
from sinder_jax.storage import files, paths, run_files


@pytest.fixture(params=["disk", "bucket"])
def workdir(request, tmp_path, monkeypatch):
    if request.param == "disk":
        return tmp_path
    buckets.install(monkeypatch, tmp_path / "cloud")
    monkeypatch.setattr(claims, "EVERY", 0.0)  # looks into the bucket each time
    return paths.as_path("gs://bucket/run")


def contents(folder):
    return {
        str(path.relative_to(folder)): path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


def elsewhere(monkeypatch, host="another"):
    """This process as another machine sees it: only its signs of life count."""
    facts = alive.this_process() | {"host": host, "process": None}
    monkeypatch.setattr(alive, "this_process", lambda: {**facts})
    monkeypatch.setattr(alive, "SILENT", -1.0)  # and are too old at once


def taken(workdir) -> Claim:
    """The claim of a run that takes the workdir over and has written already."""
    claim = Claim(workdir)
    claim.check()
    return claim


# --- One owner ------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(3))
def test_of_many_starts_at_the_same_moment_one_goes_on(number, workdir, monkeypatch):
    """All find out that nobody is alive before the first one claims the workdir."""
    count = 8
    barrier = threading.Barrier(count)
    monkeypatch.setattr(alive, "refuse_if_alive", lambda *_: barrier.wait(30))

    def start(_):
        try:
            return Claim(workdir)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(start, range(count)))
    (owner,) = (each for each in found if isinstance(each, Claim))
    owner.check()
    refused = [each for each in found if each is not owner]
    assert set(refused) == {
        f"another run was started in {workdir} at the same moment: "
        f"{claims._named(owner._facts)}; stop it, or choose another --workdir"
    }


def test_a_request_that_was_repeated_counts_as_one(workdir, monkeypatch):
    """A bucket's client sends it again if no answer comes: the second one conflicts."""
    create = files.create

    def twice(path, content):
        create(path, content)
        create(path, content)

    monkeypatch.setattr(files, "create", twice)
    Claim(workdir).check()


def test_a_run_that_has_not_yet_told_its_phase_is_alive(tmp_path):
    """From the first moment on: its claim says which process it is."""
    program = (
        "import sys; from experiments.run.workdir import Workdir\n"
        "workdir = Workdir(sys.argv[1]); print(flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        other.stdout.readline()
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=f"process {other.pid} on .*, starting;"):
            Workdir(tmp_path)
        assert contents(tmp_path) == before
    finally:
        other.communicate()
    with Workdir(tmp_path) as workdir:  # gone: nobody has to wait
        workdir.check()
        left = sorted(os.listdir(tmp_path / "claims"))
        assert left == ["00000001.partial", "00000002"]  # the first one is shut out
        assert (tmp_path / "claims" / left[0]).is_file()


def test_a_run_that_has_ended_is_followed_at_once_also_from_elsewhere(
    workdir, monkeypatch
):
    first = taken(workdir)
    first.release()
    elsewhere(monkeypatch)
    monkeypatch.setattr(alive, "SILENT", 1e9)  # only its own word counts
    assert taken(workdir).number == 2
    assert paths.names(workdir / "claims") == ["00000002"]  # nothing is left of it


def test_a_start_that_writes_nothing_leaves_nothing(workdir, tmp_path):
    Claim(workdir).release()
    assert paths.names(workdir) == []
    taken(workdir).release()
    before = contents(tmp_path)
    Claim(workdir).release()
    assert contents(tmp_path) == before
    assert taken(workdir).number == 2


def test_a_sign_of_life_of_the_owner_counts_that_of_an_earlier_run_does_not(tmp_path):
    earlier = taken(tmp_path)
    with Heartbeat(tmp_path, claim=earlier) as beating:
        beating.phase("repairing")
        while not (tmp_path / "alive.json").exists():
            time.sleep(0.01)
    sign = json.loads((tmp_path / "alive.json").read_text())
    assert sign["claim"] == 1 and sign["phase"] == "finished"
    later = taken(tmp_path)
    facts = later._facts | {"pid": 1, "host": "another", "process": None}
    (tmp_path / "claims" / "00000002").write_text(json.dumps(facts))
    newest = alive._newest_sign(tmp_path, facts)
    assert newest["host"] == "another"  # alive.json is of claim 1
    (tmp_path / "alive.json").write_text(json.dumps(sign | {"claim": 2}))
    assert alive._newest_sign(tmp_path, facts)["phase"] == "finished"


@pytest.mark.parametrize("left", [b"", b"\0" * 90, b'{"host": "a', b"{}", b"[]"])
def test_a_claim_that_a_power_loss_damaged_is_followed(left, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "READS", 1)
    taken(tmp_path)
    (tmp_path / "claims" / "00000001").write_bytes(left)
    assert taken(tmp_path).number == 2


# --- Nothing written after it ---------------------------------------------------------


def test_a_run_that_was_taken_over_writes_nothing_more(workdir, tmp_path, monkeypatch):
    first = Workdir(workdir)
    first.append_metrics([{"image": 0}])
    first.save_state(1, {"x": np.zeros(3)})
    first.wait()
    elsewhere(monkeypatch)
    second = Workdir(workdir)
    second.check()
    before = contents(tmp_path)
    for write in (
        lambda: first.append_metrics([{"image": 1}]),
        lambda: first.rewind_metrics(0),
        lambda: first.save_state(2, {"x": np.zeros(3)}),
        lambda: first.load_state(),
        lambda: first.write_summary({"finished": True}),
        lambda: first.output("a.png").__enter__(),
        lambda: first.checkpoint("frozen").__enter__(),
    ):
        with pytest.raises(LostError) as caught:
            write()
        owner = f"another pid {os.getpid()}, started 20"
        assert str(caught.value).startswith(f"this run lost {workdir} to {owner}")
        assert str(caught.value).endswith(": nothing more is written here")
    with Heartbeat(workdir, claim=first.claim) as beating:
        beating.phase("repairing")
    with contextlib.suppress(LostError):
        first.__exit__(None, None, None)
    assert contents(tmp_path) == before
    second.append_metrics([{"image": 1}])
    second.close()


def test_what_it_was_writing_does_not_appear(workdir, tmp_path, monkeypatch):
    first = Claim(workdir)
    elsewhere(monkeypatch)
    with pytest.raises(LostError), first.output("pictures/a.png") as path:
        path.write_bytes(b"png")
        taken(workdir)
        before = contents(tmp_path)
        if first.staging is not None:  # on a disk it cannot even go on
            with pytest.raises(NotADirectoryError):
                path.write_bytes(b"more")
    assert contents(tmp_path) == before


def test_a_folder_that_comes_back_is_shut_out_all_the_same(tmp_path, monkeypatch):
    """TensorStore makes the folders of a file anew, whoever removed them."""
    first = taken(tmp_path)
    first.staging.mkdir()
    elsewhere(monkeypatch)
    rename, back = os.rename, []

    def renamed(source, target):
        rename(source, target)
        if not back:
            back.append(True)
            (first.staging / "arrays_0").mkdir(parents=True)

    monkeypatch.setattr(claims.os, "rename", renamed)
    taken(tmp_path)
    assert back and first.staging.is_file()
    with pytest.raises(NotADirectoryError):
        (first.staging / "arrays_0").mkdir(parents=True)


def test_a_state_on_its_way_does_not_appear(workdir, tmp_path, monkeypatch):
    """Nor is what the next owner is saving removed: in a bucket, it is in its place."""
    first = Workdir(workdir)
    first.save_state(1, {"x": np.zeros(3)})
    first.wait()
    ready, go, check = threading.Event(), threading.Event(), Claim.check

    def held(self):
        if threading.current_thread() is not threading.main_thread():
            ready.set()
            go.wait(30)
        check(self)

    monkeypatch.setattr(first.claim, "check", held.__get__(first.claim))
    first._states.close()
    first._states = None
    first.save_state(2, {"x": np.zeros(3)})
    assert ready.wait(30)
    elsewhere(monkeypatch)
    second = Workdir(workdir)
    second.check()
    unfinished = workdir / "states" / "00000003" / "arrays_0"
    unfinished.mkdir(parents=True, exist_ok=True)
    (unfinished / "x").write_bytes(b"1")
    before = contents(tmp_path)
    go.set()
    with pytest.raises(LostError):
        first.__exit__(None, None, None)
    assert contents(tmp_path) == before
    complete = [path.name for path in run_files.numbered(workdir / "states")]
    # On a disk the unfinished one would have another name.
    assert complete in (["00000001"], ["00000001", "00000003"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_event_of_a_run_that_was_taken_over_is_written(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    first = Workdir(tmp_path)
    boards = sinks.Sinks()
    boards.add("TensorBoard", lambda: sinks.TensorBoard(tmp_path / "tensorboard", 0))
    for image in range(50):
        boards.write({"image": image, "loss": 0.5})
    elsewhere(monkeypatch)
    taken(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(LostError), boards:
        first.check()
    del boards  # nor by what Python does at the end
    assert contents(tmp_path) == before
