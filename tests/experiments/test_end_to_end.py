"""experiments/repair.py from command line to last file, on the planted model."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

import convert
from convert.__main__ import main as convert_main
from convert.files import writing
from experiments import repair, status
from experiments.run import inputs, results
from photos import save_noise
from samples import read_state_dict
from sinder_jax import checkpoint, kernels, launch, model, planted, vit
from sinder_jax.data import listing
from sinder_jax.model import Model

# One image per step: the authors' step. By default it would be one per device, so two.
AUTHORS = "--config.images_per_step=1"
TINY = ("--config=tiny.py", AUTHORS)
# The options of test_survival.py and test_power_loss.py: a step is compiled for each.
FEW = (*TINY, "--config.max_iter=12")
NO_PICTURES = "--config.picture_every=100000"
FILES = {
    "alive.json",
    "before_after.png",
    "claims",
    "config.json",
    "diagnosis.json",
    "frozen",
    "metrics.jsonl",
    "photographs.json",
    "pictures",
    "planted.safetensors",
    "repaired",
    "repaired.pth",
    "repaired.safetensors",
    "repaired.patch.safetensors",
    "states",
    "summary.json",
}


class Run(NamedTuple):
    path: Path
    output: str


def run(workdir: Path, *arguments: str) -> Run:
    """A call of the main job that has to end well."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert repair.main([*arguments, f"--workdir={workdir}"]) == 0
    return Run(workdir, output.getvalue())


def summary(run: Run) -> dict:
    return json.loads((run.path / "summary.json").read_text())


def rows(workdir: Path) -> list[dict]:
    """Lines of the metrics; JSON knows no NaN, so none may be in there."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def assert_same_run(one: Path, two: Path):
    """The same trajectory, to the last bit of every exported file."""
    names = ["metrics.jsonl", "repaired.safetensors"]
    names += [name for name in ["repaired.pth"] if (two / name).exists()]
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    saved = [checkpoint.load(path / "repaired") for path in (one, two)]
    assert saved[0][0] == saved[1][0]
    assert jax.tree.all(jax.tree.map(np.array_equal, saved[0][1], saved[1][1]))


def interrupt(monkeypatch, image: int, error: BaseException):
    """Makes the step raise that is to take this image."""
    step = repair.Runner.step

    def interrupted(self, batch):
        if image in batch.positions:
            raise error
        return step(self, batch)

    monkeypatch.setattr(repair.Runner, "step", interrupted)


# --- A whole run ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    """tiny.py from its start to its end; no test may change it."""
    return run(tmp_path_factory.mktemp("finished") / "deep" / "run", *TINY)


def test_the_run_ends_by_the_stopping_rule_with_all_its_files(finished):
    names = {path.name for path in finished.path.iterdir()}
    assert {name for name in names if not name.endswith(".sha256")} | {
        "repaired.pth"
    } == FILES
    for name in names:  # every file of weights that PyTorch reads has its digest
        exported = name.endswith((".safetensors", ".pth")) and "patch" not in name
        assert (f"{name}.sha256" in names) == exported
    told = summary(finished)
    assert told["finished"] is True and told["model"] == "planted"
    assert told["images"] < 400 and told["images_with_defect"] >= 4
    assert told["share_of_last_images_without_defect"] >= 0.75
    assert told["images_not_finite"] == 0 and told["unreadable_files"] == []
    assert set(told["files"]) == {
        name for name in FILES if name.startswith(("repaired", "before"))
    } & {path.name for path in finished.path.iterdir()}


@pytest.mark.parametrize("taken", ["from the run", "left by the run"])
def test_the_patch_of_a_run_gives_its_repaired_model_bit_for_bit(
    taken, finished, tmp_path, capsys
):
    made = finished.path / "repaired.patch.safetensors"
    if taken == "from the run":
        made = tmp_path / "made.safetensors"
        assert convert_main(["diff", str(finished.path), str(made)]) == 0
        assert (
            f"ε after {summary(finished)['images']} images" in capsys.readouterr().out
        )
    assert made.stat().st_size < 100_000
    base, done = finished.path / "planted.safetensors", tmp_path / "done.safetensors"
    assert convert_main(["apply", str(base), str(made), str(done)]) == 0
    want = read_state_dict(finished.path / "repaired.safetensors")
    got = read_state_dict(done)
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert got[key].tobytes() == tensor.tobytes(), key


@pytest.mark.parametrize("photographs", ["repaired_on", "held_out"])
def test_defects_are_gone_and_other_tokens_are_as_they_were(photographs, finished):
    told = summary(finished)[photographs]
    assert told["photographs"] == len(told["each"]) == 4
    for kind in ("direction", "norm"):
        count = told[f"defective_patches_by_{kind}"]
        assert count["before"] >= 3
        assert count["after"] <= count["before"] / 10
    for numbers in told["each"].values():
        assert min(numbers["outliers_before"], numbers["large_norms_before"]) >= 3
    assert told["largest_to_median_norm"]["before"] > 5
    assert told["largest_to_median_norm"]["after"] < 3
    assert told["cosine_of_sound_tokens"] >= 0.95


def test_the_photographs_of_the_two_sets_are_all_samples_once(finished):
    told = summary(finished)
    files = [*told["repaired_on"]["each"], *told["held_out"]["each"]]
    assert sorted(files) == sorted(map(str, listing.sample_images()))


def test_the_summary_counts_what_the_metrics_list(finished):
    told, lines = summary(finished), rows(finished.path)
    assert [row["image"] for row in lines] == list(range(told["images"]))
    with_defect = [row for row in lines if row["layer"] >= 0]
    assert len(with_defect) == told["images_with_defect"]
    train, _ = inputs.photographs(repair.config_files.load("tiny.py"))
    for row in lines:
        assert row["file"] == train[row["image"] % 4].name  # walked cyclically
        assert row["readable"] and row["finite"] and 0 <= row["skipped"] <= 1
    for row in with_defect:
        assert row["layer"] == planted.BLOCK and row["num_outliers"] >= 3
        assert row["loss"] > 0 and row["alpha"] > 0
    for row in lines:
        assert (row["loss"] is None) == (row["alpha"] is None) == (row["layer"] == -1)
    assert with_defect[0] == lines[0]
    assert with_defect[-1]["loss"] < with_defect[0]["loss"] / 2
    assert lines[-1]["skipped"] == told["share_of_last_images_without_defect"]


def test_the_output_tells_the_way_and_the_result(finished):
    lines = finished.output.splitlines()
    assert lines[0] == "4 photographs to repair on, 4 others held out"
    assert lines[1].startswith("1 image per step on 1 x ")
    progress = [line for line in lines if re.match(r"image \d+/400  ", line)]
    assert len(progress) == summary(finished)["images"] // 10  # log_every
    assert progress[0].startswith(f"image 10/400  block {planted.BLOCK}  loss ")
    assert lines[-3].startswith("repaired on, 4 photographs: defective patches each 7")
    assert lines[-2].startswith("held out, 4 photographs: defective patches each 7")
    assert lines[-1].startswith(f"finished after {summary(finished)['images']} images")
    assert lines[-1].endswith(f"{finished.path}/summary.json")


def test_pictures_are_made_on_the_way_and_at_the_end(finished):
    made = sorted(path.name for path in (finished.path / "pictures").iterdir())
    images = summary(finished)["images"]
    assert made == [f"image_{k:08d}.png" for k in range(20, images, 20)]
    sizes = []
    for file in [
        *(finished.path / "pictures" / name for name in made),
        finished.path / "before_after.png",
    ]:
        with Image.open(file) as picture:
            picture.load()
            assert picture.format == "PNG" and picture.mode == "RGB"
            sizes.append(picture.size)
            colors = picture.resize((64, 64)).getcolors(64 * 64)
        assert len(colors) > 100  # not blank
    assert len(set(sizes[:-1])) == 1
    width, height = sizes[0]
    assert 500 < height < width < 3000
    # One photograph repaired on, one held out, below each other.
    assert sizes[-1] == (width, 2 * height)


# --- The repaired model ---------------------------------------------------------------


def test_the_safetensors_file_is_the_checkpoint(finished):
    config, params = checkpoint.load(finished.path / "repaired")
    assert config == dataclasses.replace(planted.CONFIG, interpolate_antialias=True)
    stored = read_state_dict(finished.path / "repaired.safetensors")
    again, again_params = convert.from_torch(stored, interpolate_antialias=True)
    assert again == config
    assert jax.tree.all(jax.tree.map(np.array_equal, params, again_params))


def test_the_pth_file_holds_the_same_tensors_under_the_same_names(finished):
    torch = pytest.importorskip("torch")
    loaded = torch.load(finished.path / "repaired.pth", weights_only=True)
    stored = read_state_dict(finished.path / "repaired.safetensors")
    assert loaded.keys() == stored.keys()
    for key, tensor in loaded.items():
        assert tensor.dtype == torch.float32
        np.testing.assert_array_equal(tensor.numpy(), stored[key], err_msg=key)


def test_only_trainable_kernels_of_changed_blocks_have_other_bits(finished):
    changed = summary(finished)["changed_blocks"]
    assert changed == list(range(planted.BLOCK + 1))  # within ten of the defect
    before, after = (
        read_state_dict(finished.path / f"{name}.safetensors")
        for name in ("planted", "repaired")
    )
    width = planted.CONFIG.embed_dim
    assert before.keys() == after.keys()
    trainable = (
        "attn.qkv.weight",
        "attn.proj.weight",
        "mlp.w12.weight",
        "mlp.w3.weight",
    )
    moved = []
    for key in before:
        block = re.match(r"blocks\.(\d+)\.", key)
        old, new = before[key], after[key]
        if block and int(block[1]) in changed and key.endswith(trainable):
            if "qkv" in key:  # queries and keys are frozen, only the value third trains
                np.testing.assert_array_equal(old[: 2 * width], new[: 2 * width])
                old, new = old[2 * width :], new[2 * width :]
            moved.append(not np.array_equal(old, new))
        else:
            assert old.tobytes() == new.tobytes(), key
    assert len(moved) == 4 * len(changed) and all(moved)


def test_the_summary_says_how_far_the_singular_values_moved(finished):
    """Against an SVD of the exported kernels: ε is a change of singular values."""
    told = summary(finished)["largest_change_of_a_singular_value"]
    config, params = checkpoint.load(finished.path / "repaired")
    assert set(told) == set(kernels.names(config))
    original = planted.planted_model(1).params
    both = [
        p["blocks"]["mlp"]["w3"]["kernel"][planted.BLOCK] for p in (original, params)
    ]
    largest = [np.linalg.svd(kernel, compute_uv=False)[0] for kernel in both]
    # The planted column is the largest singular vector of its kernel, and shrinks.
    assert 0.1 < largest[0] - largest[1] <= told["mlp/w3"] * (1 + 1e-4)


# --- Started again --------------------------------------------------------------------


def test_a_finished_run_is_left_as_it_is(finished):
    before = contents(finished.path)
    again = run(finished.path, *TINY)
    assert (
        again.output
        == f"{finished.path} is finished: see {finished.path}/summary.json\n"
    )
    # What does not change the result may differ.
    assert run(finished.path, *TINY, "--config.log_every=3").output == again.output
    # So may the number of devices: it is the stored images per step that counts.
    assert run(finished.path, "--config=tiny.py").output == again.output
    assert contents(finished.path) == before


def test_another_config_is_refused_with_the_difference(finished, capsys):
    before = contents(finished.path)
    line = failure(
        capsys, *TINY, "--config.lr=0.5", "--config.seed=2", workdir=finished.path
    )
    assert (
        "holds a run with another config: lr was 0.02 and is 0.5; seed was 1 and is 2;"
        in line
    )
    assert contents(finished.path) == before


@pytest.mark.slow
def test_a_run_interrupted_everywhere_is_the_uninterrupted_one(
    finished, tmp_path, monkeypatch
):
    """Before the first state, between two states, and while the result is written."""
    workdir = tmp_path / "run"
    for image, error, lines in [(7, KeyboardInterrupt(), 6), (33, SystemExit(1), 32)]:
        with monkeypatch.context() as patched, pytest.raises(type(error)):
            interrupt(patched, image, error)
            run(workdir, *TINY, NO_PICTURES)
        assert len(rows(workdir)) == lines  # metrics are written one step late
        assert not (workdir / "summary.json").exists()
        assert not (workdir / "repaired").exists()
    assert sorted(os.listdir(workdir / "states")) == ["00000020"]

    def cut_short(*_, **__):
        raise KeyboardInterrupt

    output = io.StringIO()
    with monkeypatch.context() as patched, contextlib.redirect_stdout(output):
        patched.setattr(results.saving, "save", cut_short)
        with pytest.raises(KeyboardInterrupt):
            # Keys that do not change the result may be changed at a restart.
            free = ["--config.log_every=5", "--config.checkpoint_every=7"]
            repair.main([*TINY, NO_PICTURES, *free, f"--workdir={workdir}"])
    assert "resuming after 20 images\n" in output.getvalue()
    assert "directions of" not in output.getvalue()  # computed once
    assert (workdir / "repaired").exists() and not (workdir / "summary.json").exists()

    last = run(workdir, *TINY, NO_PICTURES)
    images = summary(finished)["images"]
    assert f"resuming after {images} images\n" in last.output
    assert_same_run(workdir, finished.path)
    told, expected = summary(last), summary(finished)
    del told["seconds"], expected["seconds"]
    assert told == expected


# --- Several devices ------------------------------------------------------------------


@pytest.mark.slow
def test_two_devices_share_the_images_of_a_step(tmp_path, monkeypatch):
    """Images per step define the run; devices may come and go."""
    if jax.local_device_count() != 2:
        pytest.skip("needs two devices")
    arguments = ("--config=tiny.py", NO_PICTURES, "--config.measure_images=2")
    both = run(tmp_path / "both", *arguments)
    assert "2 images per step on 2 x " in both.output
    stored = json.loads((both.path / "config.json").read_text())
    assert stored["images_per_step"] == 2
    told, lines = summary(both), rows(both.path)
    assert [row["image"] for row in lines] == list(range(told["images"]))
    assert lines[0]["layer"] == lines[1]["layer"] == planted.BLOCK
    for photographs in ("repaired_on", "held_out"):
        for kind in ("direction", "norm"):
            count = told[photographs][f"defective_patches_by_{kind}"]
            assert count["before"] >= 3 and count["after"] <= count["before"] / 10

    again, alone = tmp_path / "again", tmp_path / "alone"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt(patched, 25, KeyboardInterrupt())
        run(again, *arguments)
    shutil.copytree(again, alone)
    resumed = run(again, *arguments)
    assert "resuming after 20 images" in resumed.output
    assert_same_run(again, both.path)

    devices = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda *_, **__: devices)
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    resumed = run(alone, *arguments)
    assert "2 images per step on 1 x " in resumed.output
    assert_same_trajectory(alone, both.path)


def assert_same_trajectory(one: Path, two: Path):
    """The same blocks and counts; numbers up to float32 rounding."""
    lines = rows(one), rows(two)
    for key in ("image", "layer", "num_outliers", "skipped"):
        assert [row[key] for row in lines[0]] == [row[key] for row in lines[1]]
    for key in ("loss", "alpha"):
        values = [np.array([row[key] for row in part], float) for part in lines]
        np.testing.assert_allclose(*values, rtol=1e-5)  # 4e-7 measured
    models = [read_state_dict(path / "repaired.safetensors") for path in (one, two)]
    for key, tensor in models[0].items():
        distance = np.linalg.norm(tensor - models[1][key])
        assert distance <= 1e-6 * np.linalg.norm(tensor), key  # 3e-8 measured


# --- Other models and photographs -----------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Path:
    """The planted model as a hub file, and its architecture under two hub names."""
    monkeypatch.setitem(vit.CONFIGS, "dinov2_vits14", planted.CONFIG)
    registers = dataclasses.replace(
        planted.CONFIG,
        num_register_tokens=4,
        interpolate_antialias=True,
        interpolate_offset=0.0,
    )
    monkeypatch.setitem(vit.CONFIGS, "dinov2_vits14_reg", registers)
    made = planted.planted_model(1)
    file = tmp_path / "hub.safetensors"
    writing.write_state_dict(file, convert.to_torch(made.config, made.params))
    return file


SMALL = (
    "--config=small.py",
    "--config.data=sample",
    "--config.num_images=4",
    "--config.image_size=224",
    "--config.measure_images=1",
    AUTHORS,
)


@pytest.mark.slow
def test_a_model_with_registers_is_repaired(hub, tmp_path):
    made = planted.planted_model(1)
    rng = np.random.default_rng(0)
    register_tokens = rng.normal(0, 0.5, (1, 4, planted.CONFIG.embed_dim))
    params = made.params | {"register_tokens": register_tokens.astype(np.float32)}
    config = vit.CONFIGS["dinov2_vits14_reg"]
    checkpoint.save(tmp_path / "registers", config, params)
    done = run(
        tmp_path / "run",
        *SMALL,
        "--config.model=dinov2_vits14_reg",
        f"--config.checkpoint={tmp_path / 'registers'}",
        "--config.max_iter=2",
    )
    told = summary(done)
    assert told["images"] == told["images_with_defect"] == 2
    assert [row["layer"] for row in rows(done.path)] == [planted.BLOCK] * 2
    saved, repaired = checkpoint.load(done.path / "repaired")
    assert saved == config
    np.testing.assert_array_equal(
        repaired["register_tokens"], register_tokens.astype("f")
    )
    assert not (done.path / "planted.safetensors").exists()


def test_unreadable_photographs_are_skipped_counted_and_named(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, file in enumerate(listing.sample_images()[:2]):
        shutil.copy(file, photos / f"{i}{file.suffix}")
    (photos / "broken.jpg").write_bytes(b"no image")
    whole = (photos / "0.png").read_bytes()
    (photos / "0_cut.png").write_bytes(whole[: len(whole) // 2])
    done = run(
        tmp_path / "run",
        *FEW,
        NO_PICTURES,
        f"--config.data={photos}",
        "--config.num_images=30000",
        "--config.measure_images=4",
    )
    told = summary(done)
    broken = [str(photos / name) for name in ("0_cut.png", "broken.jpg")]
    assert told["unreadable_files"] == broken
    for file, times in zip(broken, (3, 3), strict=True):  # as often as it came
        assert done.output.count(f"skipped, unreadable: {file}: ") == times
    assert "finished after 12 images, 2 unreadable files skipped in " in done.output
    lines = rows(done.path)
    assert [row["readable"] for row in lines] == 3 * [True, False, True, False]
    for row in lines:
        assert (row["layer"] is None) == (not row["readable"])
    assert told["images"] == 12 and told["images_with_defect"] == 6
    assert told["repaired_on"]["photographs"] == 2 and told["held_out"] is None
    assert "held out: no photographs" in done.output


def test_names_that_are_not_utf_8_are_repaired_on_and_recorded(tmp_path, capsys):
    raw = [b"a\nb.png", b"caf\xe9.jpg", b"lost\xe9.gif"]
    for name in raw[:2]:
        save_noise(tmp_path / "in" / os.fsdecode(name), width=90, height=80)
    (tmp_path / "in" / os.fsdecode(raw[2])).write_bytes(b"no image")
    done = run(
        tmp_path / "out",
        *FEW,
        f"--config.data={tmp_path / 'in'}",
        "--config.num_images=3",
    )
    assert (done.path / "metrics.jsonl").read_bytes().isascii()
    names = [Path(os.fsdecode(row["file"])).name for row in rows(done.path)]
    assert names == 4 * [*map(os.fsdecode, raw)]
    (lost,) = summary(done)["unreadable_files"]
    assert os.fsencode(lost) == os.fsencode(tmp_path / "in") + b"/" + raw[2]
    assert rf"skipped, unreadable: {tmp_path}/in/lost\udce9.gif: " in done.output
    assert status.main([str(done.path)]) == 0
    assert r"lost\udce9.gif" in capsys.readouterr().out


def test_a_file_behind_the_end_of_the_run_is_not_in_its_metrics(tmp_path):
    """A step is dispatched before one knows that the run has ended."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(12):
        shutil.copy(listing.sample_images()[0], photos / f"{i:02}.png")
    (photos / "12.png").write_bytes(b"no image")
    done = run(
        tmp_path / "run",
        *FEW,
        NO_PICTURES,
        f"--config.data={photos}",
        "--config.num_images=13",
        "--config.measure_images=1",
    )
    assert [row["image"] for row in rows(done.path)] == [*range(12)]
    assert summary(done)["unreadable_files"] == []


# --- Bad input ------------------------------------------------------------------------


def failure(capsys, *arguments: object, workdir: Path | None = None) -> str:
    """The one line on stderr of a call that ends with code 2."""
    capsys.readouterr()
    call = [str(argument) for argument in arguments]
    call += [] if workdir is None else [f"--workdir={workdir}"]
    with pytest.raises(SystemExit) as caught:
        launch.exit_on_error(lambda: repair.main(call))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.endswith("\n")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config=tiny.py"], "required: --workdir"),
        (["--workdir=run"], "required: --config"),
        (["--config=huge.py"], "no config huge.py; give a path or one of base.py, dat"),
        (["--config=broken.py"], "broken.py cannot be used: SyntaxError: .*line 2"),
        (["--config=notes.py"], "notes.py defines no get_config"),
        (["--config=tiny.py", "--config.lrr=1"], r"no key lrr: did you mean lr\?"),
        (["--config=tiny.py", "--config.lr=fast"], "--config.lr must be a number"),
        (["--config=tiny.py", "--config.lr", "-1"], "lr must be above 0, got -1"),
        (["--config=tiny.py", "--config.window=4"], "window"),
        (["--config=tiny.py", "--config.seed=99999999999"], "config.seed must be"),
        (["--config=tiny.py", "--verbose"], "unknown argument --verbose"),
        (["--config=tiny.py", "--conf=giant.py"], "unknown argument --conf"),
        (
            ["--config=tiny.py", "--config.image_size=200"],
            "image_size: got 200.* 196 or",
        ),
        (["--config=tiny.py", "--config.data="], "no photographs: add --config.data="),
        (["--config=tiny.py", "--config.data=nowhere"], "no such image folder: nowh"),
        (["--config=tiny.py", "--config.data=empty"], "no images in empty: looked"),
        (
            ["--config=tiny.py", "--config.data=notes.py"],
            "got the file notes.py, ",
        ),
        (["--config=tiny.py", "--config.data=bad"], "none of the 2 images of bad can"),
        (["--config=tiny.py", "--config.model=x"], "config.model=x is unknown"),
        (["--config=giant.py"], "no weights of dinov2_vitg14; fetch"),
        (
            ["--config=giant.py", "--config.data=sample"],
            "no weights of dinov2_vitg14; fetch https://.*/dinov2_vitg14/dinov2_vitg14_"
            "pretrain.pth, run `python -m convert to-jax dinov2_vitg14_pretrain.pth "
            "dinov2_vitg14` and add --config.checkpoint=dinov2_vitg14",
        ),
        (
            ["--config=large.py", "--config.model=dinov2_vitl14_reg"]
            + ["--config.data=sample", "--config.checkpoint=nowhere"],
            "nowhere does not exist; fetch https://.*/dinov2_vitl14/dinov2_vitl14_reg4_"
            "pretrain.pth, run `python -m convert to-jax dinov2_vitl14_reg4_pretrain",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_gives_one_line_and_no_workdir(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("import this_is\ndef get_config(:\n")
    (tmp_path / "notes.py").write_text("lr = 0.01\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    for name in ("a.png", "b.jpg"):
        (tmp_path / "bad" / name).write_bytes(b"no image")
    before = sorted(tmp_path.rglob("*"))
    given = any(argument.startswith("--workdir") for argument in arguments)
    workdir = None if given or "required: --workdir" in message else Path("run")
    assert re.search(message, failure(capsys, *arguments, workdir=workdir))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["file", "file/below", "/proc/self/run"])
def test_a_workdir_that_cannot_be_written_to(name, tmp_path, capsys):
    if name.startswith("/proc") and not Path("/proc/self").is_dir():
        pytest.skip("needs Linux")
    (tmp_path / "file").write_text("mine")
    workdir = tmp_path / name
    assert str(workdir.parent) in failure(capsys, *TINY, workdir=workdir)
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


class Evil:
    """A pickle of it makes a folder when it is read."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def bad_checkpoint(kind: str, hub: Path, folder: Path) -> Path:
    """Something that `config.checkpoint` might point to by mistake, or worse."""
    target = folder / kind
    state_dict = read_state_dict(hub)
    if kind == "empty_folder":
        target.mkdir()
    elif kind == "photo.png":
        Image.new("RGB", (9, 9)).save(target)
    elif kind == "truncated.safetensors":
        target.write_bytes(hub.read_bytes()[:-1000])
    elif kind == "truncated_checkpoint":
        config, params = convert.from_torch(state_dict)
        checkpoint.save(target, config, params)
        largest = max(target.rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    elif kind == "hf.safetensors":
        renamed = {
            k.replace("blocks.", "encoder.layer."): x for k, x in state_dict.items()
        }
        writing.write_state_dict(target, renamed)
    elif kind == "nan.safetensors":
        bias = state_dict["blocks.3.mlp.w3.bias"].copy()
        bias[5] = np.nan
        writing.write_state_dict(target, state_dict | {"blocks.3.mlp.w3.bias": bias})
    elif kind == "nan_checkpoint":
        config, params = convert.from_torch(state_dict)
        params["norm"]["bias"][5] = np.nan
        model.save(target, Model.of(config, params))  # unchecked
    elif kind == "cut.safetensors":
        del state_dict["blocks.7.ls2.gamma"]
        writing.write_state_dict(target, state_dict)
    elif kind in ("evil.pth", "truncated.pth"):
        torch = pytest.importorskip("torch")
        if kind == "evil.pth":
            torch.save({"cls_token": Evil(folder / "executed")}, target)
        else:
            writing.write_state_dict(target, state_dict)
            target.write_bytes(target.read_bytes()[:-1000])
    return target


@pytest.mark.parametrize(
    "kind, message",
    [
        ("empty_folder", "empty_folder: not a checkpoint, but a directory"),
        ("photo.png", "photo.png: a picture; give the same model"),
        ("truncated.safetensors", "truncated.safetensors: damaged"),
        ("truncated.pth", "truncated.pth: damaged"),
        ("truncated_checkpoint", "truncated_checkpoint: the checkpoint is damaged"),
        ("hf.safetensors", "hf.safetensors: not a DINOv2 model"),
        ("nan.safetensors", "1 with NaN or infinity .*blocks.3.mlp.w3.bias"),
        ("nan_checkpoint", "nan_checkpoint: .*norm/bias holds NaN"),
        ("cut.safetensors", "1 missing: blocks.7.ls2.gamma"),
        ("evil.pth", "evil.pth: refused, it would run code"),
    ],
)
def test_a_bad_checkpoint_gives_one_line_and_runs_nothing(
    kind, message, hub, tmp_path, capsys
):
    source = bad_checkpoint(kind, hub, tmp_path)
    line = failure(
        capsys, *SMALL, f"--config.checkpoint={source}", workdir=tmp_path / "run"
    )
    assert re.search(message, line)
    assert not (tmp_path / "executed").exists()
    made = sorted(os.listdir(tmp_path / "run"))
    assert made == ["alive.json", "claims", "config.json", "photographs.json"]


def test_the_checkpoint_of_another_model_is_named_with_the_differences(
    hub, tmp_path, capsys
):
    line = failure(
        capsys,
        *SMALL,
        f"--config.checkpoint={hub}",
        "--config.model=dinov2_vitb14",
        workdir=tmp_path / "run",
    )
    assert (
        "is not dinov2_vitb14: they differ in embed_dim (128 and 768), num_heads"
        in line
    )
    # And the mistake can be mended in the same workdir.
    mended = (*FEW, NO_PICTURES, "--config.measure_images=1")
    model = ("--config.model=dinov2_vits14", f"--config.checkpoint={hub}")
    done = run(tmp_path / "run", *mended, *model)
    assert summary(done)["model"] == "dinov2_vits14" and summary(done)["images"] == 12


def test_a_pth_without_torch_says_what_to_install(hub, tmp_path, monkeypatch, capsys):
    (tmp_path / "model.pth").write_bytes(b"PK\x03\x04")
    monkeypatch.setitem(sys.modules, "torch", None)
    given = f"--config.checkpoint={tmp_path / 'model.pth'}"
    line = failure(capsys, *SMALL, given, workdir=tmp_path / "run")
    assert "pip install 'sinder_jax[torch]'" in line


@pytest.mark.slow
def test_a_run_that_explodes_ends_with_the_reason(tmp_path, capsys):
    workdir = tmp_path / "run"
    line = failure(
        capsys,
        *TINY,
        NO_PICTURES,
        "--config.lr=1e30",
        "--config.max_bad_steps=3",
        workdir=workdir,
    )
    assert line.startswith(
        "error: 3 images in a row gave tokens, loss or gradient that"
    )
    assert "the last " in line and "(config.lr=1e+30, config.max_bad_steps)" in line
    assert [row["finite"] for row in rows(workdir)] == [True] + 3 * [False]
    assert not (workdir / "repaired").exists()


def test_photographs_that_vanish_end_the_run(tmp_path, monkeypatch, capsys):
    """As when a disk goes away: as many unreadable ones in a row as there are files."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(3):
        Image.new("RGB", (60, 60), (80 * i, 0, 0)).save(photos / f"{i}.png")

    def go_away(*arguments, prepare=repair.inputs.prepare):
        prepare(*arguments)
        for file in photos.iterdir():
            file.unlink()

    monkeypatch.setattr(repair.inputs, "prepare", go_away)
    line = failure(
        capsys, *TINY, NO_PICTURES, f"--config.data={photos}", workdir=tmp_path / "run"
    )
    assert f"none of the 3 images of {photos} can be read" in line


# --- The program ----------------------------------------------------------------------


def program(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.repair", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_help_shows_real_calls():
    done = program("--help")
    assert done.returncode == 0 and done.stderr == ""
    for config in ("tiny.py", "giant.py"):
        assert (
            f"python -m experiments.repair --config={config} --workdir=" in done.stdout
        )
    assert "--config.KEY=VALUE" in done.stdout


def test_the_program_ends_with_code_2_and_one_line(tmp_path):
    """A process of its own: nothing else writes to stderr."""
    done = program("--config", "giant.py", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: no weights of dinov2_vitg14; fetch https")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def command_line_examples() -> list[list[str]]:
    """The calls of `--help`, each as the arguments that a shell makes of it."""
    lines = repair.EXAMPLE.replace("\\\n", " ").splitlines()
    start = "python -m experiments.repair "
    calls = [line.strip() for line in lines if line.strip().startswith(start)]
    return [shlex.split(call, comments=True)[3:] for call in calls]


@pytest.mark.parametrize("call", command_line_examples(), ids=lambda call: call[0])
def test_the_examples_of_the_help_are_understood(call):
    args, config = repair.settings(call)
    if "repair" not in config:
        inputs.repair_options(config)
    assert args.workdir.startswith("runs/")
