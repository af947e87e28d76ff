"""run/inputs.py: photographs, weights, and how to get what is missing."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

import bucket
import convert
from convert.files import writing
from experiments import config as config_files
from experiments.run import inputs
from samples import read_state_dict
from sinder_jax import checkpoint, families, param_tree, planted, vit
from sinder_jax.data import listing
from small_runs import PLAIN, REGISTERS, weights


def config(name: str = "small.py", **changes):
    changed = config_files.load(name)
    changed.update(changes)
    return changed


def assert_same(params, expected):
    params, expected = param_tree.flatten(params), param_tree.flatten(expected)
    assert params.keys() == expected.keys()
    for path in expected:
        np.testing.assert_array_equal(params[path], expected[path], err_msg=path)


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


def test_a_defect_is_planted_on_whole_photographs_of_both_kinds(photos):
    given = config("planted_small.py")  # crops, of half of the photographs held out
    found = [file.name for file in inputs.varied(given)]
    assert sorted(found) == [file.name for file in listing.open_photographs("sample")]
    train, held_out = inputs.photographs(given)
    assert found[:2] == [train[0].file.name, held_out[0].file.name]
    # those of a folder are whole already
    (photos / "g.png").write_bytes(b"no image")
    given = config(data=str(photos), num_images=3)
    names = [os.path.relpath(file.name, photos)[0] for file in inputs.varied(given)]
    assert names == ["a", "b", "c", "e", "f"]


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


# --- DINOv2's relatives ---------------------------------------------------------------


def test_a_relative_is_repaired_by_its_name(tmp_path, monkeypatch):
    small = families.Relative(families.Size(24, 2, 2, "swiglu"), 64, 16, 8, "all")
    monkeypatch.setitem(families.RELATIVES, "Virchow2", small)
    made = vit.ViTConfig(**small.fields, layer_scale=False)
    params = weights(made)
    checkpoint.save(tmp_path / "model", made, params)
    given = config(model="Virchow2", checkpoint=str(tmp_path / "model"))
    inputs.check_weights_given(given)
    assert inputs.architecture(given).patch_size == 16
    model = inputs.load_model(given)
    assert model.config.positions == "all" and not families.of(model.config).layer_scale
    given.model = "UNI2-h"
    with pytest.raises(ValueError, match=r"is not UNI2-h: they differ in embed_dim"):
        inputs.load_model(given)
    given.checkpoint = ""
    with pytest.raises(ValueError, match=r"no weights of UNI2-h; fetch its files"):
        inputs.check_weights_given(given)
