"""experiments/visualize.py and the error handling of sinder_jax/cli.py."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import visualize
from forward import tokens_after
from loading import loaded
from sinder_jax import checkpoint, defects, families, launch, loss, param_tree, vit
from sinder_jax.data import decode
from sinder_jax.model import Model

CONFIG = vit.ViTConfig(embed_dim=32, depth=3, num_heads=2, ffn_layer="mlp", img_size=56)


def make_params(config: vit.ViTConfig, seed: int):
    """Random NumPy weights; nothing is compiled for them."""
    rng = np.random.default_rng(seed)

    def weights(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        return rng.normal(0, 0.2, shape.shape).astype(np.float32)

    return jax.tree.map(weights, param_tree.shapes(config))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Small random models by name: first, second (same architecture), deep, wide."""
    folder = tmp_path_factory.mktemp("checkpoints")
    configs = {
        "first": CONFIG,
        "second": CONFIG,
        "deep": dataclasses.replace(CONFIG, depth=4),
        "wide": dataclasses.replace(CONFIG, embed_dim=48, num_register_tokens=4),
        "offset": dataclasses.replace(
            CONFIG, interpolate_antialias=True, interpolate_offset=0.0
        ),
    }
    for seed, (name, config) in enumerate(configs.items()):
        checkpoint.save(folder / name, config, make_params(config, seed))
    return {name: folder / name for name in configs}


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    for i, name in enumerate(["b.png", "a.JPG", "sub/b.png"]):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (50, 70 + i, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def run(*arguments) -> int:
    return visualize.main([str(argument) for argument in arguments])


def exit_code(*arguments) -> int:
    """Runs as the command line does: errors become one line and a code."""
    with pytest.raises(SystemExit) as caught:
        launch.exit_on_error(lambda: run(*arguments))
    return caught.value.code


# --- Pictures from photographs --------------------------------------------------------


def test_folders_and_files_each_give_a_picture_with_a_name_of_its_own(
    photos, checkpoints, tmp_path, capsys
):
    out = tmp_path / "deep" / "out"
    code = run(
        photos,
        photos / "a.JPG",  # is in the folder already
        f"--checkpoint={checkpoints['first']}",
        f"--out={out}",
        "--short-side=56",
    )
    assert code == 0
    assert sorted(os.listdir(out)) == ["a.png", "b-2.png", "b.png"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{photos / 'a.JPG'}: ")
    assert lines[0].endswith(f" x median: {out / 'a.png'}")
    assert "outlier" in lines[0] and "max norm" in lines[0]
    assert lines[-1] == f"3 of 3 pictures written to {out}"
    for name in os.listdir(out):
        with Image.open(out / name) as picture:
            assert picture.width > picture.height > 400


def test_compare_draws_a_second_row(photos, checkpoints, tmp_path, capsys):
    arguments = [photos / "b.png", f"--checkpoint={checkpoints['first']}"]
    arguments += ["--short-side=56"]
    assert run(*arguments, f"--out={tmp_path / 'one'}") == 0
    assert " -> " not in capsys.readouterr().out
    arguments += [f"--compare={checkpoints['second']}"]
    assert run(*arguments, f"--out={tmp_path / 'two'}") == 0
    assert " x median -> " in capsys.readouterr().out
    with (
        Image.open(tmp_path / "one" / "b.png") as one,
        Image.open(tmp_path / "two" / "b.png") as two,
    ):
        assert two.height > 1.7 * one.height


def test_what_is_drawn_is_computed_from_the_last_block():
    """Against the same steps written out, for another image shape than the grid's."""
    statistics = ((0.5, 0.6, 0.7), (0.1, 0.2, 0.3))  # of the second model
    configs = [CONFIG, dataclasses.replace(CONFIG, statistics=statistics)]
    models = [Model.of(each, make_params(CONFIG, i)) for i, each in enumerate(configs)]
    pixels = np.random.default_rng(3).integers(0, 256, (112, 140, 3), np.uint8)
    maps = visualize.observer(models, mask_thr=1.5)(pixels)
    direction = defects.singular_defect_directions(models[0].config, models[0].params)[
        -1
    ]
    assert len(maps) == 2
    for model, drawn in zip(models, maps, strict=True):
        image = decode.normalize(pixels, families.of(model.config).statistics)
        (tokens,) = tokens_after(model.config, model.params, image[None], (2,))
        grid = tokens[0, 1:].reshape(8, 10, 32)
        np.testing.assert_allclose(
            drawn.norms, np.linalg.norm(grid, axis=-1), rtol=1e-5
        )  # float32, fused differently
        # The first model's direction, for the second model too.
        _, aux = loss.neighbor_loss(grid, direction, mask_thr=1.5)
        np.testing.assert_array_equal(drawn.mask, aux.mask)
        assert drawn.mask.any() and not drawn.mask.all()
        assert drawn.pca.shape == (8, 10, 3) and drawn.pca.dtype == np.uint8
    own = defects.singular_defect_directions(models[1].config, models[1].params)[-1]
    assert abs(float(own @ direction)) < 0.9  # so that the two could be confused
    assert (maps[0].mask != maps[1].mask).any()


def test_registers_are_no_patches():
    config = dataclasses.replace(CONFIG, num_register_tokens=4)
    params = make_params(config, 0)
    params["register_tokens"] = params["register_tokens"] + 1e3
    pixels = np.zeros((28, 42, 3), np.uint8)
    (maps,) = visualize.observer([Model.of(config, params)], mask_thr=4.0)(pixels)
    assert maps.norms.shape == (2, 3) and maps.norms.max() < 100


def test_two_ways_of_resampling_positions_may_be_compared(
    photos, checkpoints, tmp_path
):
    code = run(
        photos / "b.png",
        f"--checkpoint={checkpoints['first']}",
        f"--compare={checkpoints['offset']}",
        f"--out={tmp_path / 'out'}",
        "--short-side=70",
    )
    assert code == 0


# --- Files that are there, and files that cannot be read ------------------------------


def test_existing_pictures_are_kept_unless_told(photos, checkpoints, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "b.png").write_text("mine")
    arguments = [photos, f"--checkpoint={checkpoints['first']}", f"--out={out}"]
    arguments += ["--short-side=56"]
    assert exit_code(*arguments) == 2
    assert "b.png exists: add --overwrite" in capsys.readouterr().err
    assert os.listdir(out) == ["b.png"] and (out / "b.png").read_text() == "mine"
    assert run(*arguments, "--overwrite") == 0
    assert (out / "b.png").read_bytes().startswith(b"\x89PNG")


def test_names_of_any_bytes_and_other_suffixes_in_a_folder(
    photos, checkpoints, tmp_path, capsys
):
    odd = tmp_path / os.fsdecode(b"pi\xf1as")
    photos.rename(odd)
    names = [b"caf\xe9.png", b"a\nb.png", b"x" * 251 + b".png", b"100%{}$a$.png"]
    for raw in names:
        shutil.copy(odd / "b.png", odd / os.fsdecode(raw))
    (odd / os.fsdecode(b"broken\xe9.tif")).write_bytes(b"no image")
    (odd / "notes.txt").touch()
    out = tmp_path / os.fsdecode(b"\xe9ut")
    first = f"--checkpoint={checkpoints['first']}"
    assert exit_code(odd, first, "--short-side=56", f"--out={out}") == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        rf"{tmp_path}/pi\udcf1as: 1 file of other suffixes left out (.txt 1)",
        rf"skipped, unreadable: {tmp_path}/pi\udcf1as/broken\udce9.tif: "
        f"not an image in one of the formats {', '.join(decode.FORMATS)}",
    ]
    assert len(printed.out.splitlines()) == 8
    assert r"pi\udcf1as/a\nb.png: " in printed.out
    made = {os.fsencode(name) for name in os.listdir(out)}
    assert made >= {b"caf\xe9.png", b"a\nb.png", b"100%{}$a$.png", b"b-2.png"}


def test_unreadable_images_are_named_counted_and_skipped(
    photos, checkpoints, tmp_path, capsys
):
    (photos / "a.JPG").write_bytes(b"no image")
    arguments = [f"--checkpoint={checkpoints['first']}", "--short-side=56"]
    assert run(photos, *arguments, f"--out={tmp_path / 'out'}") == 0
    printed = capsys.readouterr()
    assert printed.err.startswith(
        f"skipped, unreadable: {photos / 'a.JPG'}: not an image"
    )
    assert "2 of 3 pictures written" in printed.out
    assert "1 unreadable and skipped" in printed.out
    assert sorted(os.listdir(tmp_path / "out")) == ["b-2.png", "b.png"]
    assert run(photos / "a.JPG", *arguments, f"--out={tmp_path / 'none'}") == 2
    assert os.listdir(tmp_path / "none") == []


# --- Mistakes on the command line -----------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--checkpoint": "nowhere"}, "nowhere"),
        ({"--checkpoint": "photos"}, "photos"),
        ({"--compare": "nowhere"}, "nowhere"),
        ({"--compare": "{deep}"}, "different architectures: depth \\(3 and 4"),
        (
            {"--compare": "{wide}"},
            "embed_dim \\(32 and 48\\), num_register_tokens \\(0 and",
        ),
        ({"--short-side": "60"}, "--short-side: got 60 pixels.* such as 56 or 70"),
        ({"--short-side": "wide"}, "--short-side: invalid int"),
        ({"--mask-thr": "0"}, "mask_thr must be above 0"),
        ({"--out": "photos/b.png"}, "photos/b.png: "),
        ({"--short_side": "56"}, "unrecognized arguments: --short_side"),
        ({"--over": "1"}, "unrecognized arguments: --over"),
        ({"IMAGE": "nowhere.jpg"}, "no such image or folder: nowhere.jpg"),
        ({"IMAGE": "empty"}, "no images in empty"),
    ],
)
def test_a_mistake_gives_one_line_and_code_2(
    photos, checkpoints, tmp_path, monkeypatch, capsys, change, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    options = {
        "IMAGE": "photos",
        "--checkpoint": str(checkpoints["first"]),
        "--short-side": "56",
        "--out": "out",
    } | {key: value.format(**checkpoints) for key, value in change.items()}
    image = options.pop("IMAGE")
    assert exit_code(image, *[f"{key}={value}" for key, value in options.items()]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ") and printed.out == ""
    assert re.search(message, line)
    assert not (tmp_path / "out").exists()


def test_help_shows_a_call_and_needs_no_jax():
    output, names = loaded("experiments.visualize", main=["--help"])
    assert "python -m experiments.visualize photos/" in output
    assert "jax" not in names


def test_the_command_ends_with_its_code_and_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "experiments.visualize"]
    command += [str(tmp_path / "nowhere.jpg"), "--checkpoint=nowhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: no such image or folder: {tmp_path}/nowhere.jpg\n"


# --- cli.py ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("lr is -1,\n  must be above 0"), "lr is -1, must be above 0"),
        (KeyError("no model 'vitx'"), "no model 'vitx'"),
        (FileNotFoundError(2, "No such file or directory", "a.png"),
         "a.png: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (FileNotFoundError("no such folder: a"), "no such folder: a"),
        (decode.UnreadableImage("a.png: truncated"), "a.png: truncated"),
        (FloatingPointError("10 bad steps"), "10 bad steps"),
        (ValueError(), "ValueError"),
    ],
)  # fmt: skip
def test_errors_for_users_become_one_line_and_code_2(error, line, capsys, monkeypatch):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        launch.exit_on_error(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {line}\n"

    monkeypatch.setenv("SINDER_TRACEBACK", "1")
    with pytest.raises(type(error)):
        launch.exit_on_error(main)


@pytest.mark.parametrize("result, code", [(None, 0), (0, 0), (2, 2), (75, 75)])
def test_the_result_of_main_is_the_exit_code(result, code):
    with pytest.raises(SystemExit) as caught:
        launch.exit_on_error(lambda: result)
    assert caught.value.code == code


def test_ctrl_c_is_130_and_a_bug_keeps_its_traceback(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        launch.exit_on_error(interrupted)
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(ZeroDivisionError):
        launch.exit_on_error(lambda: 1 // 0)


def test_a_file_name_no_encoding_covers_is_printed_escaped(tmp_path):
    code = (
        "from sinder_jax import launch; import os\n"
        "launch.exit_on_error(lambda: print(os.fsdecode(b'\\xff.jpg')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"\\udcff.jpg\n")
