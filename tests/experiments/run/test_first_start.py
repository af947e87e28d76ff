"""run/first_start.py: what a later start has in common with the first one."""

import dataclasses
import json
import os
import shutil

import pytest
from PIL import Image

import convert
from convert.files import writing
from experiments import config as config_files
from experiments import repair
from experiments.run import first_start, inputs
from experiments.run.workdir import Workdir
from sinder_jax import checkpoint, param_tree
from small_runs import PLAIN, config, names, started, weights

# --- The config -----------------------------------------------------------------------


def test_the_first_start_stores_the_config_with_images_per_step(tmp_path):
    first = config(images_per_step=0, lr=0.125)
    first_start.settle_config(Workdir(str(tmp_path)), first, images_per_step=8)
    assert first.images_per_step == 8
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored == first.to_dict()
    assert names(tmp_path) == ["config.json"]


def test_images_per_step_of_the_config_goes_before_the_devices(tmp_path):
    first = config(images_per_step=2)
    first_start.settle_config(Workdir(str(tmp_path)), first, images_per_step=8)
    assert first.images_per_step == 2


def test_another_start_takes_images_per_step_from_the_first(tmp_path):
    workdir = started(tmp_path, images_per_step=0)
    again = config(images_per_step=0)
    first_start.settle_config(workdir, again, images_per_step=8)  # on more devices
    assert again.images_per_step == 3


def test_a_changed_config_is_refused_with_all_differences(tmp_path):
    workdir = started(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ValueError) as caught:
        first_start.settle_config(
            workdir, config(lr=0.5, data="photos", log_every=7), images_per_step=3
        )
    assert str(caught.value) == (
        f"{tmp_path} holds a run with another config: data was 'sample' and is "
        "'photos'; lr was 0.02 and is 0.5; choose another --workdir, or use the "
        "config of the first start, or --force to resume with the new one"
    )
    with pytest.raises(ValueError, match="images_per_step was 3 and is 2"):
        first_start.settle_config(workdir, config(images_per_step=2), images_per_step=3)
    assert (tmp_path / "config.json").read_bytes() == before


def test_every_key_is_either_free_or_held(tmp_path):
    """A key that changes the result must not slip through, nor a free one be held."""
    workdir = started(tmp_path)
    for key, value in config().items():
        other = {bool: True, int: 77, float: 0.77, str: "other"}[type(value)]
        other = not value if isinstance(value, bool) else other
        changed = config(**{key: other})
        if key in first_start.FREE_KEYS:
            first_start.settle_config(workdir, changed, images_per_step=3)
            continue
        with pytest.raises(ValueError, match=f"{key} was .* and is "):
            first_start.settle_config(workdir, changed, images_per_step=3)
    assert set(first_start.FREE_KEYS) <= set(config().keys())


def test_before_anything_is_computed_the_config_may_still_change(tmp_path):
    """A first start that ended with an error must not tie the folder to its mistake."""
    workdir = Workdir(str(tmp_path))
    first_start.settle_config(workdir, config(model="dinov2_vits14"), images_per_step=1)
    first_start.settle_config(workdir, config(lr=0.5), images_per_step=1)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (stored["model"], stored["lr"]) == ("planted", 0.5)


def test_force_goes_on_with_the_new_config_and_keeps_the_ones_before(tmp_path, capsys):
    workdir = started(tmp_path)
    first = (tmp_path / "config.json").read_bytes()
    first_start.settle_config(
        workdir, config(), images_per_step=3, force=True
    )  # nothing changed
    assert capsys.readouterr().err == ""
    for lr in (0.5, 0.25):
        first_start.settle_config(
            Workdir(tmp_path), config(lr=lr), images_per_step=3, force=True
        )
    warned = capsys.readouterr().err.splitlines()
    assert "lr was 0.02 and is 0.5" in warned[0] and "config.json.before_1" in warned[0]
    assert "lr was 0.5 and is 0.25" in warned[1] and len(warned) == 2
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.25
    assert (tmp_path / "config.json.before_1").read_bytes() == first
    before = json.loads((tmp_path / "config.json.before_2").read_text())
    assert before["lr"] == 0.5
    first_start.settle_config(
        workdir, config(lr=0.25), images_per_step=3
    )  # the one that holds now


@pytest.mark.parametrize("key", first_start.FROZEN_KEYS)
def test_force_does_not_pretend_to_change_what_is_stored(key, tmp_path):
    """The stored model, factors and directions stay as they were made."""
    workdir = started(tmp_path)
    old = config()[key]
    other = (
        not old if isinstance(old, bool) else 77 if isinstance(old, int) else "other"
    )
    with pytest.raises(ValueError, match=f"{key} was .* config of the first start$"):
        first_start.settle_config(workdir, config(**{key: other}), 3, force=True)


def test_a_process_that_does_not_write_settles_the_same_and_changes_nothing(tmp_path):
    reader = Workdir(tmp_path, writes=False)
    first = config(images_per_step=0)
    first_start.settle_config(reader, first, images_per_step=3)
    assert first.images_per_step == 3 and names(tmp_path) == []
    started(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    again = config(images_per_step=0)
    first_start.settle_config(reader, again, images_per_step=8)
    assert again.images_per_step == 3
    with pytest.raises(ValueError, match="lr was 0.02 and is 0.5"):
        first_start.settle_config(reader, config(lr=0.5), images_per_step=3)
    first_start.settle_config(reader, config(lr=0.5), images_per_step=3, force=True)
    assert (tmp_path / "config.json").read_bytes() == before
    assert names(tmp_path) == ["config.json", "frozen"]


def test_a_damaged_config_is_named(tmp_path):
    workdir = started(tmp_path)
    (tmp_path / "config.json").write_text('{"lr"')
    with pytest.raises(ValueError, match="config.json is damaged"):
        first_start.settle_config(workdir, config(), images_per_step=3)


# --- Weights and photographs ---------------------------------------------------------


@pytest.fixture
def begun(small_hub, photos, tmp_path) -> list[str]:
    """The command of a run that was started on a small model.

    The model is `tmp_path / "first"`, its weights are `weights(PLAIN)`.
    """
    checkpoint.save(tmp_path / "first", PLAIN, weights(PLAIN))
    command = [
        "--config=small.py",
        f"--workdir={tmp_path / 'run'}",
        f"--config.checkpoint={tmp_path / 'first'}",
        f"--config.data={photos}",
        "--config.image_size=28",
        "--config.images_per_step=1",
    ]
    settings = config_files.load("small.py")
    config_files.override(settings, command[2:])
    with Workdir(tmp_path / "run") as workdir:
        first_start.settle_config(workdir, settings, 1)
        train, _ = inputs.photographs(settings, say=print)
        first_start.settle_photographs(workdir, first_start.stamps(train))
        inputs.prepare(inputs.Weights(settings, workdir, None, print))
    return command


class GoesOn(Exception):
    """A run has accepted what it was started with."""


def resume(command: list[str], *arguments: str) -> str:
    """Error of a start with the same command, plus arguments; empty if it goes on."""

    def choose_devices(*_):
        raise GoesOn

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(repair, "choose_devices", choose_devices)
        try:
            repair.main([*command, *arguments])
        except GoesOn:
            return ""
        except (ValueError, OSError) as error:
            assert "\n" not in str(error)
            return str(error)
    raise AssertionError("neither refused nor accepted")


@pytest.mark.parametrize("same_path", [False, True])
def test_other_weights_at_resume_are_refused_with_both_paths_and_digests(
    same_path, begun, tmp_path
):
    other = tmp_path / ("first" if same_path else "second")
    shutil.rmtree(other, ignore_errors=True)
    checkpoint.save(other, PLAIN, weights(PLAIN, seed=1))
    line = resume(begun, f"--config.checkpoint={other}")
    digests = (param_tree.digest(weights(PLAIN, seed=seed))[:12] for seed in (0, 1))
    assert line.startswith(
        f"{tmp_path / 'run'} holds a run that started from other weights: "
        f"{tmp_path / 'first'} with digest {next(digests)}, now {other} with digest "
        f"{next(digests)}; choose another --workdir"
    )
    assert resume(begun, f"--config.checkpoint={other}", "--force") == line
    assert not resume(begun, "--config.checkpoint=")


def test_the_same_weights_may_lie_anywhere_or_be_gone_at_resume(
    begun, tmp_path, capsys
):
    state = convert.to_torch(PLAIN, weights(PLAIN))
    writing.write_state_dict(tmp_path / "same.safetensors", state)
    assert not resume(begun)
    assert not resume(begun, f"--config.checkpoint={tmp_path / 'same.safetensors'}")
    assert capsys.readouterr().err == ""
    shutil.rmtree(tmp_path / "first")
    assert not resume(begun)
    assert capsys.readouterr().err == (
        f"warning: {tmp_path / 'first'} is gone: resuming with the model stored in "
        f"{tmp_path / 'run' / 'frozen'}\n"
    )
    nowhere = f"--config.checkpoint={tmp_path / 'nowhere'}"
    assert str(tmp_path / "nowhere") in resume(begun, nowhere)


@pytest.mark.parametrize(
    "own", [{"norm_epsilon": 1e-3}, {"statistics": ((0.5,) * 3, (0.2,) * 3)}], ids=str
)
def test_the_same_tensors_with_another_function_are_refused(own, begun, tmp_path):
    other = dataclasses.replace(PLAIN, **own)
    checkpoint.save(tmp_path / "second", other, weights(PLAIN))
    line = resume(begun, f"--config.checkpoint={tmp_path / 'second'}")
    (name,) = own
    assert f"{tmp_path / 'first'} with {name} " in line
    assert f", now {tmp_path / 'second'} with " in line


def test_other_photographs_at_resume_are_refused_until_forced(
    begun, photos, tmp_path, capsys
):
    (photos / "b.png").rename(photos / "aa.png")
    Image.new("RGB", (30, 20)).save(photos / "g.png")
    line = resume(begun)
    assert line.startswith(
        f"{tmp_path / 'run'} holds a run with other photographs: 5 then, 6 now (the "
        f"first that differs: image 1 was {photos / 'b.png'} and is "
        f"{photos / 'aa.png'}); choose another --workdir"
    )
    assert resume(begun) == line
    assert not resume(begun, "--force")
    assert "other photographs: 5 then, 6 now" in capsys.readouterr().err
    assert (tmp_path / "run" / "photographs.json.before_1").exists()
    assert not resume(begun)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("more", [True, False])
def test_a_longer_or_shorter_list_is_another_one(more, begun, photos):
    if more:
        Image.new("RGB", (30, 20)).save(photos / "g.png")
        assert f"image 5 was none and is {photos / 'g.png'}" in resume(begun)
    else:
        (photos / "f.png").unlink()
        assert f"image 4 was {photos / 'f.png'} and is none" in resume(begun)


def test_a_photograph_replaced_under_its_name_is_told_once(begun, photos, capsys):
    assert not resume(begun)
    assert capsys.readouterr().err == ""
    Image.new("RGB", (60, 40)).save(photos / "e.png")
    os.utime(photos / "f.png", ns=(0, 0))
    assert not resume(begun)
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "2 of 5 photographs replaced under their names" in told
    assert f"(the first is {photos / 'e.png'})" in told
    assert not resume(begun)
    assert capsys.readouterr().err == ""


def test_a_run_without_a_list_takes_the_photographs_that_are_there_and_says_so(
    begun, tmp_path, capsys
):
    file = tmp_path / "run" / "photographs.json"
    file.unlink()
    assert not resume(begun)
    assert f"warning: {file} is missing: the photo" in capsys.readouterr().err
    assert file.exists()
    assert not resume(begun)
    assert capsys.readouterr().err == ""


def test_photographs_are_compared_where_only_a_state_is_left(begun, photos, tmp_path):
    (tmp_path / "run" / "states" / "00000002").mkdir(parents=True)
    shutil.rmtree(tmp_path / "run" / "frozen")
    (photos / "b.png").rename(photos / "aa.png")
    assert "holds a run with other photographs" in resume(begun)


@pytest.mark.parametrize("content", ["", "{}", '{"photographs": [["a.png"]]}', "\0"])
def test_a_damaged_list_of_photographs_is_one_line(content, begun, tmp_path):
    file = tmp_path / "run" / "photographs.json"
    file.write_text(content)
    line = resume(begun)
    assert line.startswith(f"{file} is damaged (") and line.count(str(file)) == 1


# --- In a bucket ----------------------------------------------------------------------
