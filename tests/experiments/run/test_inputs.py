"""run/inputs.py: photographs, weights, and how to get what is missing."""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import bucket
import convert
from convert.files import writing
from experiments import config as config_files
from experiments import repair
from experiments.run import inputs
from experiments.run.workdir import Workdir
from samples import read_state_dict
from sinder_jax import checkpoint, families, param_tree, planted, vit
from sinder_jax.data import listing

PLAIN = vit.ViTConfig(64, 2, 1, "swiglu", img_size=28)
REGISTERS = dataclasses.replace(
    PLAIN, num_register_tokens=4, interpolate_antialias=True, interpolate_offset=0.0
)


def config(name: str = "small.py", **changes):
    changed = config_files.load(name)
    changed.update(changes)
    return changed


def weights(architecture: vit.ViTConfig, seed: int = 0):
    rng = np.random.default_rng(seed)
    shapes = param_tree.flatten(param_tree.shapes(architecture))
    params = {p: rng.normal(size=x.shape).astype(np.float32) for p, x in shapes.items()}
    return param_tree.unflatten(params)


def assert_same(params, expected):
    params, expected = param_tree.flatten(params), param_tree.flatten(expected)
    assert params.keys() == expected.keys()
    for path in expected:
        np.testing.assert_array_equal(params[path], expected[path], err_msg=path)


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    for i, name in enumerate(["a.png", "b.png", "c/d.png", "e.png", "f.png"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), (i, i, i)).save(folder / name)
    return folder


@pytest.fixture
def small_hub(monkeypatch):
    """Two hub names that mean models small enough to be written here."""
    monkeypatch.setitem(vit.CONFIGS, "dinov2_vits14", PLAIN)
    monkeypatch.setitem(vit.CONFIGS, "dinov2_vits14_reg", REGISTERS)


# --- Photographs ----------------------------------------------------------------------


@pytest.mark.parametrize("num_images, names", [(2, "a c f"), (30_000, "a b c e f")])
def test_the_training_list_and_the_rest_of_a_folder(num_images, names, photos):
    train, held_out = inputs.photographs(
        config(data=str(photos), num_images=num_images)
    )
    files = listing.open_photographs(str(photos))
    assert train == [
        file for file in files if os.path.relpath(file.name, photos)[0] in names
    ]
    assert held_out == [file for file in files if file not in train]


def test_a_shuffled_list_holds_the_same_photographs_in_another_order(photos):
    given = config(data=str(photos), num_images=3)
    train, held_out = inputs.photographs(given)
    given.shuffle_seed = 3
    shuffled, same = inputs.photographs(given)
    assert shuffled != train and set(shuffled) == set(train) and same == held_out


def test_a_photograph_listed_twice_is_not_held_out_from_itself(photos):
    (photos / "list.txt").write_text("a.png\nb.png\na.png\na.png\ne.png\nb.png\n")
    given = config(data=f"list:{photos}/list.txt", num_images=3)
    train, held_out = inputs.photographs(given)
    assert [Path(one.name).name for one in train] == ["a.png", "a.png", "e.png"]
    assert [Path(one.name).name for one in held_out] == ["b.png", "b.png"]


@pytest.mark.parametrize("num_images, said", [(6, True), (5, False), (2, False)])
def test_fewer_photographs_than_asked_for_is_said_once(
    num_images, said, photos, capsys
):
    inputs.photographs(config(data=str(photos), num_images=num_images))
    assert capsys.readouterr().out == said * (
        f"only 5 photographs in {photos}, 6 asked for: all are used, over and over\n"
    )


def test_sample_means_the_photographs_of_scikit_image():
    train, held_out = inputs.photographs(config("tiny.py"))
    assert {one.name for one in train + held_out} == {
        *map(str, listing.sample_images())
    }
    assert len(train) == len(held_out) == 4


def test_no_data_says_what_to_give():
    with pytest.raises(
        ValueError, match=r"--config\.data=FOLDER.*--config\.data=sample"
    ):
        inputs.photographs(config())


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"data": "nowhere"}, FileNotFoundError, "no such image folder: nowhere"),
        ({"data": "empty"}, ValueError, "no images in empty"),
        (
            {"data": "photos/a.png"},
            ValueError,
            "got the file photos/a",
        ),
        ({"num_images": 0}, ValueError, "got num_images=0"),
        ({"image_size": 200}, ValueError, "config.image_size: got 200 .*196 or 210"),
        ({"image_size": 0}, ValueError, "config.image_size: got 0"),
        ({"resize": "squeeze"}, ValueError, "'squeeze', expected crop or keep"),
        ({"resize": "keep"}, ValueError, "add --config.images_per_step=1"),
        ({"data": "list:no.txt"}, FileNotFoundError, "no such list of images: no.txt"),
        ({"data": "tfds:mnist"}, FileNotFoundError, "tfds build mnist --file_format"),
    ],
)
def test_photographs_that_cannot_be_had_raise(
    change, error, message, photos, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=message):
        inputs.photographs(config(**{"data": "photos"} | change))


def test_whole_photographs_are_for_one_image_a_step(photos):
    given = config(data=str(photos), resize="keep", images_per_step=1)
    assert len(inputs.photographs(given)[0]) == 5


def test_one_readable_photograph_on_the_list_is_enough(photos):
    given = config(data=str(photos), num_images=2)
    for name in ("a.png", "c/d.png"):
        (photos / name).write_bytes(b"no image")
    train, _ = inputs.photographs(given)
    assert [Path(file.name).name for file in train] == ["a.png", "d.png", "f.png"]
    (photos / "f.png").write_bytes(b"no image")  # the last one; held out ones are left
    with pytest.raises(ValueError) as caught:
        inputs.photographs(given)
    assert str(caught.value) == (
        f"none of the 3 images of {photos} can be read, the first is {photos}/a.png"
    )


# --- Weights: what is missing is said before anything is written ----------------------


@pytest.mark.parametrize("name", vit.CONFIGS)
def test_the_way_to_the_weights_names_file_command_and_option(name):
    size, registers = name[len("dinov2_vit") :][0], name.endswith("_reg")
    file = f"dinov2_vit{size}14{'_reg4' if registers else ''}_pretrain.pth"
    assert inputs.how_to_get(name) == (
        f"fetch https://dl.fbaipublicfiles.com/dinov2/dinov2_vit{size}14/{file}, run "
        f"`python -m convert to-jax {file} {name}` and add --config.checkpoint={name}"
    )


def test_the_way_to_the_large_model_with_registers():
    """Written out: the folder has no suffix, the file has the number of registers."""
    text = inputs.how_to_get("dinov2_vitl14_reg")
    assert "/dinov2/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth" in text
    assert "to-jax dinov2_vitl14_reg4_pretrain.pth dinov2_vitl14_reg`" in text


@pytest.mark.parametrize("name", vit.CONFIGS)
def test_a_missing_checkpoint_says_how_to_get_it(name, tmp_path):
    way = inputs.how_to_get(name)
    with pytest.raises(ValueError) as caught:
        inputs.check_weights_given(config(model=name))
    assert str(caught.value) == f"no weights of {name}; {way}"
    missing = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError) as caught:
        inputs.check_weights_given(config(model=name, checkpoint=missing))
    assert str(caught.value) == f"{missing} does not exist; {way}"


def test_an_unknown_model_lists_the_known_ones():
    with pytest.raises(ValueError, match="vitx14 is unknown.*planted.*dinov2_vitg14"):
        inputs.check_weights_given(config(model="dinov2_vitx14"))


def test_planted_weights_and_a_checkpoint_contradict_each_other(tmp_path):
    given = config("tiny.py", checkpoint=str(tmp_path))
    with pytest.raises(ValueError, match="planted makes its own.*--config.model"):
        inputs.check_weights_given(given)


# --- Weights: loaded ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["directory", ".safetensors", ".pth"])
@pytest.mark.parametrize("model", ["dinov2_vits14", "dinov2_vits14_reg"])
def test_a_checkpoint_of_any_kind_gives_the_same_model(
    kind, model, small_hub, tmp_path
):
    architecture = vit.CONFIGS[model]
    params = weights(architecture)
    source = tmp_path / f"model{kind}"
    if kind == "directory":
        checkpoint.save(source, architecture, params)
    else:
        if kind == ".pth":
            pytest.importorskip("torch")
        writing.write_state_dict(source, convert.to_torch(architecture, params))
    given = config(model=model, checkpoint=str(source))
    inputs.check_weights_given(given)
    model = inputs.load_model(given, tmp_path / "planted.safetensors")
    # The authors' antialias; registers keep the offset they were trained with.
    assert model.config == dataclasses.replace(architecture, interpolate_antialias=True)
    assert_same(model.params, params)
    given.interpolate_antialias = False
    config_ = inputs.load_model(given, tmp_path / "planted.safetensors").config
    assert config_ == dataclasses.replace(architecture, interpolate_antialias=False)
    assert not (tmp_path / "planted.safetensors").exists()


@pytest.mark.parametrize(
    "architecture, model, message",
    [
        (PLAIN, "dinov2_vits14_reg", "num_register_tokens (0 and 4)"),
        (REGISTERS, "dinov2_vits14", "num_register_tokens (4 and 0)"),
        (
            PLAIN,
            "dinov2_vitl14_reg",
            "embed_dim (64 and 1024), depth (2 and 24), num_heads (1 and 16), "
            "ffn_layer (swiglu and mlp), num_register_tokens (0 and 4)",
        ),
    ],
)
def test_the_checkpoint_of_another_model_is_refused(
    architecture, model, message, small_hub, tmp_path
):
    checkpoint.save(tmp_path / "other", architecture, weights(architecture))
    given = config(model=model, checkpoint=str(tmp_path / "other"))
    with pytest.raises(ValueError) as caught:
        inputs.load_model(given, tmp_path / "planted.safetensors")
    assert (
        str(caught.value)
        == f"{tmp_path / 'other'} is not {model}: they differ in {message}"
    )


def test_a_checkpoint_of_another_image_size_is_still_that_model(small_hub, tmp_path):
    architecture = dataclasses.replace(PLAIN, img_size=56)
    checkpoint.save(tmp_path / "fine", architecture, weights(architecture))
    given = config(model="dinov2_vits14", checkpoint=str(tmp_path / "fine"))
    model = inputs.load_model(given, tmp_path / "planted.safetensors")
    assert model.config.img_size == 56
    assert model.params["pos_embed"].shape == (1, 17, 64)


def test_a_model_with_its_own_statistics_and_epsilon_is_still_that_model(
    small_hub, tmp_path
):
    own = {"statistics": ((0.5, 0.6, 0.7), (0.1, 0.2, 0.3)), "norm_epsilon": 1e-5}
    architecture = dataclasses.replace(PLAIN, **own)
    checkpoint.save(tmp_path / "fine", architecture, weights(architecture))
    given = config(model="dinov2_vits14", checkpoint=str(tmp_path / "fine"))
    family = families.of(inputs.load_model(given).config)
    assert family.statistics == own["statistics"]
    assert family.norm_epsilon == own["norm_epsilon"]


@pytest.mark.parametrize("seed", [1, 2])
def test_planted_weights_go_through_a_file_in_hub_layout(seed, tmp_path):
    file = tmp_path / "planted.safetensors"
    given = config("tiny.py", seed=seed)
    model = inputs.load_model(given, file)
    made = planted.planted_model(seed)
    assert model.config == dataclasses.replace(made.config, interpolate_antialias=True)
    assert_same(model.params, made.params)
    assert_same(convert.from_torch(read_state_dict(file))[1], made.params)
    inputs.load_model(given, file)  # again, after a start that was cut short


# --- Weights and photographs of a run that goes on ------------------------------------


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
        workdir.settle_config(settings, 1)
        if hasattr(inputs, "stamps"):
            train, _ = inputs.photographs(settings, say=print)
            workdir.settle_photographs(inputs.stamps(train))
        inputs.prepare(settings, workdir, print)
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


def test_a_run_of_an_earlier_version_takes_the_photographs_that_are_there(
    begun, tmp_path, capsys
):
    (tmp_path / "run" / "photographs.json").unlink()
    assert not resume(begun)
    assert capsys.readouterr().err == ""
    assert (tmp_path / "run" / "photographs.json").exists()


@pytest.mark.parametrize("content", ["", "{}", '{"photographs": [["a.png"]]}', "\0"])
def test_a_damaged_list_of_photographs_is_one_line(content, begun, tmp_path):
    file = tmp_path / "run" / "photographs.json"
    file.write_text(content)
    assert resume(begun).startswith(f"{file} is damaged (")


# --- In a bucket ----------------------------------------------------------------------


def test_a_checkpoint_may_lie_in_a_bucket_but_not_a_pytorch_file(
    small_hub, tmp_path, monkeypatch
):
    bucket.install(monkeypatch, tmp_path / "cloud")
    params = weights(PLAIN)
    checkpoint.save("gs://bucket/model", PLAIN, params)
    settings = config(model="dinov2_vits14", checkpoint="gs://bucket/model")
    inputs.check_weights_given(settings)
    assert_same(inputs.load_model(settings).params, params)
    with pytest.raises(FileNotFoundError, match="gs://bucket/other does not exist"):
        inputs.check_weights_given(config(checkpoint="gs://bucket/other"))
    with pytest.raises(ValueError, match="are read from a disk"):
        inputs.check_weights_given(config(checkpoint="gs://bucket/model.pth"))
