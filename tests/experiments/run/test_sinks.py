"""Optional sinks: what reaches TensorBoard's files, and a stand-in of wandb.

wandb itself is not installed for the tests: its stand-in has the signatures of wandb
0.31 that the sink uses, and records the calls.
"""

import struct
import sys
import time
import types

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from experiments.run import sinks

ROW = {
    "image": 3,
    "file": "a.jpg",
    "readable": True,
    "layer": 5,
    "loss": 0.5,
    "alpha": 2.0,
    "num_outliers": 7,
    "finite": True,
    "skipped": 0.25,
}
UNREADABLE = ROW | {
    "image": 4,
    "readable": False,
    **dict.fromkeys(("layer", "loss", "alpha", "num_outliers", "finite")),
}
RGB = np.full((4, 6, 3), 200, np.uint8)


def config(*, tensorboard=False, wandb_project=""):
    return ConfigDict(
        {"lr": 0.1, "tensorboard": tensorboard, "wandb_project": wandb_project}
    )


def test_nothing_is_opened_unless_it_is_asked_for(tmp_path, capsys):
    with sinks.open_sinks(config(), tmp_path, start=0) as opened:
        opened.write(ROW)
        opened.picture("tokens", RGB, 3)
    assert not list(tmp_path.iterdir()) and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("package", "asked"),
    [("tensorboardX", {"tensorboard": True}), ("wandb", {"wandb_project": "sinder"})],
)
def test_a_missing_package_says_what_to_install(package, asked, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # importing it raises
    for check in (
        lambda: sinks.check_packages(config(**asked)),
        lambda: sinks.open_sinks(config(**asked), tmp_path, start=0),
    ):
        with pytest.raises(ValueError, match=f"pip install {package}") as caught:
            check()
        assert "\n" not in str(caught.value)


# --- One that fails ---------------------------------------------------------------


class Broken:
    def __init__(self, method):
        self.method, self.calls = method, []

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append(name)
            if name == self.method:
                raise ConnectionError("network\nis down")

        return call


@pytest.mark.parametrize("method", ["write", "picture", "close"])
def test_a_sink_that_fails_is_said_once_and_left_out(method, capsys):
    broken, whole = Broken(method), Broken("none")
    opened = sinks.Sinks()
    opened.add("broken", lambda: broken)
    opened.add("whole", lambda: whole)
    for _ in range(3):
        opened.write(ROW)
        opened.picture("tokens", RGB, 3)
    opened.close()
    opened.close()
    assert whole.calls == [*["write", "picture"] * 3, "close"]
    assert broken.calls.count(method) == 1 and broken.calls[-1] == method
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "broken failed, going on without it" in error


def test_a_sink_that_cannot_be_opened_is_said_and_left_out(tmp_path, capsys):
    pytest.importorskip("tensorboardX")
    (tmp_path / "tensorboard").write_text("in the way")
    with sinks.open_sinks(config(tensorboard=True), tmp_path, start=0) as opened:
        opened.write(ROW)
    assert "TensorBoard cannot be opened" in capsys.readouterr().err


# --- TensorBoard ------------------------------------------------------------------


def events(folder):
    """All events of all files, in the order in which TensorBoard reads them."""
    proto = pytest.importorskip("tensorboardX").proto
    for path in sorted((folder / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # TFRecord: length, its checksum, bytes, their checksum
            (length,) = struct.unpack_from("<Q", data, at)
            yield proto.event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4


def points(folder):
    """What TensorBoard shows: {tag: {step: value}}, with restarts as it treats them.

    That is `EventAccumulator._CheckForRestartAndMaybePurge` of tensorboard 2.21: a
    START at a step drops what there is from that step on.
    """
    shown = {}
    for event in events(folder):
        if event.session_log.status == 1:
            for steps in shown.values():
                for step in [step for step in steps if step >= event.step]:
                    del steps[step]
        for value in event.summary.value:
            assert event.step not in shown.get(value.tag, {}), "a point is there twice"
            shown.setdefault(value.tag, {})[event.step] = value
    return shown


def tensorboard(folder, start=0):
    pytest.importorskip("tensorboardX")
    return sinks.open_sinks(config(tensorboard=True), folder, start=start)


def test_numbers_reach_tensorboard_and_none_is_left_out(tmp_path):
    with tensorboard(tmp_path) as opened:
        opened.write(ROW)
        opened.write(UNREADABLE)
        opened.write(ROW | {"image": 5, "layer": -1, "loss": None})
    shown = points(tmp_path)
    values = {
        tag: {step: value.simple_value for step, value in steps.items()}
        for tag, steps in shown.items()
    }
    assert values["repair/loss"] == {3: 0.5}
    assert values["repair/layer"] == {3: 5.0}
    assert values["repair/readable"] == {3: 1.0, 4: 0.0, 5: 1.0}
    assert values["repair/skipped"] == {3: 0.25, 4: 0.25, 5: 0.25}
    assert "repair/file" not in values and "repair/image" not in values


def test_a_picture_reaches_tensorboard(tmp_path):
    with tensorboard(tmp_path) as opened:
        opened.picture("tokens", RGB, 20)
    image = points(tmp_path)["tokens"][20].image
    assert (image.height, image.width) == RGB.shape[:2]
    assert image.encoded_image_string.startswith(b"\x89PNG")


@pytest.mark.parametrize("start", [0, 2])
def test_a_resume_writes_no_point_twice(start, tmp_path):
    with tensorboard(tmp_path) as opened:  # killed after five images
        for image in range(5):
            opened.write(ROW | {"image": image, "loss": 1.0})
    with tensorboard(tmp_path, start) as opened:
        for image in range(start, 5):
            opened.write(ROW | {"image": image, "loss": 2.0})
    loss = points(tmp_path)["repair/loss"]
    assert [loss[i].simple_value for i in range(5)] == [1.0] * start + [2.0] * (
        5 - start
    )


def test_points_reach_the_disk_at_intervals(tmp_path, monkeypatch):
    monkeypatch.setattr(sinks, "FLUSH_SECONDS", 0)
    opened = tensorboard(tmp_path)
    opened.write(ROW)
    assert points(tmp_path)["repair/loss"]
    opened.close()


def test_a_full_disk_ends_tensorboard_not_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sinks, "FLUSH_SECONDS", 0)
    opened = tensorboard(tmp_path)
    record = opened._sinks["TensorBoard"]._events._py_recordio_writer

    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "flush", full)
    began = time.monotonic()
    for image in range(100):
        opened.write(ROW | {"image": image})
    opened.close()
    record._writer.close()
    assert time.monotonic() - began < 5
    assert "TensorBoard failed" in capsys.readouterr().err


# --- wandb, by its stand-in -------------------------------------------------------


class Server:
    """What wandb keeps, per run id: the content of each step."""

    def __init__(self, module):
        self.runs, self.options, self.online = {}, [], True
        module.init, module.Image, module.Settings = (
            self.init,
            self.image,
            self.settings,
        )

    def image(self, array, caption=None):
        return (array.shape, caption)

    def settings(self, *, console, finish_timeout):
        assert console == "off" and finish_timeout > 0
        return None

    def init(self, *, id, resume, allow_val_change, settings, mode=None, **options):
        if not self.online and mode != "offline":
            raise ConnectionError("api_key not configured (no-tty)")
        assert resume == "allow" and allow_val_change
        assert options.keys() == {"project", "name", "config", "dir"}
        self.options.append(options | {"mode": mode})
        return Run(self.runs.setdefault(id, {}))


class Run:
    def __init__(self, steps):
        self._steps, self.finished = steps, False
        self.starting_step = self.next = max(steps, default=-1) + 1

    def log(self, data, step):
        assert step >= self.next or step == self.next - 1, "wandb drops earlier steps"
        self._steps.setdefault(step, {}).update(data)
        self.next = step + 1

    def finish(self):
        self.finished = True


@pytest.fixture
def server(monkeypatch):
    module = types.ModuleType("wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    return Server(module)


def wandb(folder, start=0):
    return sinks.open_sinks(config(wandb_project="sinder"), folder, start=start)


def test_numbers_reach_wandb(server, tmp_path):
    with wandb(tmp_path) as opened:
        opened.write(ROW)
        opened.write(UNREADABLE)
    (steps,) = server.runs.values()
    assert steps[3]["repair/loss"] == 0.5 and steps[3]["repair/layer"] == 5.0
    assert steps[4] == {"repair/readable": 0.0, "repair/skipped": 0.25}
    (options,) = server.options
    assert (options["project"], options["name"]) == ("sinder", tmp_path.name)
    assert options["dir"] == str(tmp_path) and options["config"]["lr"] == 0.1


def test_a_picture_that_comes_before_its_rows_drops_none(server, tmp_path):
    with wandb(tmp_path) as opened:
        opened.write(ROW)
        opened.picture("tokens", RGB, 6)
        opened.write(ROW | {"image": 4})
    (steps,) = server.runs.values()
    assert steps[3]["tokens"] == (RGB.shape, "after 6 images")
    assert 4 in steps


def test_a_resumed_run_is_the_same_one_and_sends_nothing_twice(server, tmp_path):
    with wandb(tmp_path) as opened:
        for image in range(5):
            opened.write(ROW | {"image": image, "loss": 1.0})
    with wandb(tmp_path, start=2) as opened:
        for image in range(2, 7):
            opened.write(ROW | {"image": image, "loss": 2.0})
    ((_, steps),) = server.runs.items()
    assert [steps[i]["repair/loss"] for i in range(7)] == [1.0] * 5 + [2.0] * 2


@pytest.mark.parametrize("damage", [b"", b"\0" * 8, b"\xff"])
def test_a_damaged_id_is_replaced(damage, server, tmp_path):
    (tmp_path / "wandb_id").write_bytes(damage)
    for _ in range(2):
        wandb(tmp_path).close()
    assert len(server.runs) == 1


def test_another_workdir_is_another_run(server, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        wandb(tmp_path / name).close()
    assert len(server.runs) == 2


def test_without_network_it_is_written_offline(server, tmp_path, capsys):
    server.online = False
    with wandb(tmp_path) as opened:
        opened.write(ROW)
    assert server.options[0]["mode"] == "offline"
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "wandb sync" in error


def test_a_remote_workdir_keeps_no_offline_files(server, monkeypatch):
    monkeypatch.setattr(sinks, "_run_id", lambda workdir: "abc")
    wandb(epath.Path("gs://bucket/runs/giant")).close()
    assert (server.options[0]["dir"], server.options[0]["name"]) == (None, "giant")
