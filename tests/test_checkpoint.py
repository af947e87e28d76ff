import hashlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sinder_jax import checkpoint, vit

CONFIG = vit.ViTConfig(64, 3, 1, "swiglu", img_size=28, num_register_tokens=2)
TREE = {
    "a": {"float32": np.arange(6, dtype=np.float32).reshape(2, 3)},
    "b": {
        "float64": np.array([1e300, -0.0]),
        "int64": np.array([2**60]),
        "bool": np.array([True, False]),
        "bfloat16": np.array([1.5, -2.0], ml_dtypes.bfloat16),
        "deep": {"scalar": np.asarray(np.float32(0.1))},
    },
}


def random_params(config=CONFIG, seed=0):
    rng = np.random.default_rng(seed)
    shapes = checkpoint.flatten(vit.param_shapes(config))
    return checkpoint.unflatten(
        {
            path: rng.standard_normal(leaf.shape, np.float32)
            for path, leaf in shapes.items()
        }
    )


def assert_same_tree(got, want):
    got, want = checkpoint.flatten(got), checkpoint.flatten(want)
    assert got.keys() == want.keys()
    for path in want:
        expected = np.asarray(want[path])
        assert type(got[path]) is np.ndarray, path
        assert got[path].dtype == expected.dtype, path
        assert got[path].shape == expected.shape, path
        assert got[path].tobytes() == expected.tobytes(), path


def error_of(call, *args, kind=ValueError):
    """The message of the error that a call ends with, which must be one line."""
    with pytest.raises(kind) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "model"
    checkpoint.save(path, CONFIG, random_params())
    return path


@pytest.fixture
def model(stored, tmp_path):
    """A copy of a stored model, to damage."""
    return Path(shutil.copytree(stored, tmp_path / "model"))


# --- Round trips ------------------------------------------------------------------


def test_flatten_and_unflatten_are_inverse():
    flat = checkpoint.flatten(TREE)
    assert set(flat) >= {"a/float32", "b/deep/scalar"}
    assert checkpoint.unflatten(flat) == TREE


@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglu"])
def test_model_comes_back_with_the_same_bytes(ffn_layer, tmp_path):
    config = vit.ViTConfig(64, 2, 2, ffn_layer, 42, 14, 4, True, 0.0)
    params = random_params(config)
    checkpoint.save(tmp_path / "model", config, params)
    got_config, got_params = checkpoint.load(str(tmp_path / "model"))
    assert got_config == config
    assert_same_tree(got_params, params)


def test_jax_arrays_come_back_as_numpy(tmp_path):
    params = random_params()
    checkpoint.save(tmp_path / "model", CONFIG, jax.tree.map(jnp.asarray, params))
    assert_same_tree(checkpoint.load(tmp_path / "model")[1], params)


def test_any_tree_comes_back_with_its_number_formats(tmp_path):
    metadata = {"step": 3, "names": ["a", "ε"], "nested": {"offset": 0.1, "none": None}}
    checkpoint.save_tree(tmp_path / "tree", TREE, metadata)
    tree, got = checkpoint.load_tree(tmp_path / "tree")
    assert_same_tree(tree, TREE)
    assert got == metadata


def test_orbax_alone_reads_the_arrays(tmp_path):
    checkpoint.save_tree(tmp_path / "tree", TREE, {})
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        like = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), TREE)
        args = ocp.args.PyTreeRestore(restore_args=like)
        assert_same_tree(checkpointer.restore(tmp_path / "tree/arrays_0", args), TREE)


def test_relative_path_is_below_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save_tree("tree", TREE, {})
    assert_same_tree(checkpoint.load_tree("tree")[0], TREE)
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


# --- What cannot be saved ---------------------------------------------------------


def test_existing_path_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    message = error_of(
        checkpoint.save,
        tmp_path / "model",
        CONFIG,
        random_params(),
        kind=FileExistsError,
    )
    assert str(tmp_path / "model") in message
    assert not list((tmp_path / "model").iterdir())


def test_missing_directory_is_refused(tmp_path):
    path = tmp_path / "none" / "model"
    error_of(checkpoint.save, path, CONFIG, random_params(), kind=FileNotFoundError)
    assert not path.parent.exists()


def test_params_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path):
    params = random_params()
    del params["norm"]["bias"]
    params["extra"] = np.ones(2, np.float32)
    params["cls_token"] = params["cls_token"][0]
    message = error_of(checkpoint.save, tmp_path / "model", CONFIG, params)
    for path in ("norm/bias", "extra", "cls_token"):
        assert path in message
    assert not list(tmp_path.iterdir())


def test_all_params_that_are_not_finite_float32_are_named(tmp_path):
    params = random_params()
    params["cls_token"] = params["cls_token"].astype(np.float64)
    params["blocks"]["ls1"]["gamma"][2, 5] = np.inf
    params["norm"]["scale"][0] = np.nan
    message = error_of(checkpoint.save, tmp_path / "model", CONFIG, params)
    assert "cls_token is float64" in message
    assert "blocks/ls1/gamma holds" in message and "norm/scale holds" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"a": np.ones((0, 3))},
        {"a": np.array(["text"])},
        {"a": np.array([object()])},
        {"a": None},
        {"a/b": np.ones(2)},
        {"a": {3: np.ones(2)}},
    ],
    ids=["nothing", "empty", "text", "object", "none", "slash", "number"],
)
def test_tree_that_would_not_come_back_is_refused(tree, tmp_path):
    error_of(checkpoint.save_tree, tmp_path / "tree", tree, {})
    assert not list(tmp_path.iterdir())


def test_metadata_that_is_no_json_is_refused(tmp_path):
    for value in (np.ones(2), float("nan")):
        message = error_of(checkpoint.save_tree, tmp_path / "tree", TREE, {"x": value})
        assert "JSON" in message
    assert not list(tmp_path.iterdir())


def test_failed_saving_leaves_nothing(tmp_path, monkeypatch):
    save = ocp.Checkpointer.save

    def save_and_fail(self, path, *args, **kwargs):
        save(self, path, *args, **kwargs)
        raise ValueError("disk full")

    monkeypatch.setattr(ocp.Checkpointer, "save", save_and_fail)
    message = error_of(checkpoint.save_tree, tmp_path / "tree", TREE, {}, kind=OSError)
    assert "disk full" in message
    assert not list(tmp_path.iterdir())


# --- What cannot be loaded --------------------------------------------------------


def test_missing_path_is_named(tmp_path):
    message = error_of(checkpoint.load, tmp_path / "none", kind=FileNotFoundError)
    assert str(tmp_path / "none") in message


def test_file_in_place_of_a_directory_names_the_converter(tmp_path):
    (tmp_path / "model.pth").write_bytes(b"x")
    assert "convert to-jax" in error_of(checkpoint.load, tmp_path / "model.pth")


def test_directory_of_something_else_is_refused(tmp_path):
    assert "no checkpoint" in error_of(checkpoint.load, tmp_path)
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "metadata").write_text('{"format": "other"}')
    assert "no checkpoint" in error_of(checkpoint.load, tmp_path)


def test_tree_without_a_config_is_no_model(tmp_path):
    checkpoint.save_tree(tmp_path / "tree", TREE, {"step": 1})
    assert "no checkpoint of a model" in error_of(checkpoint.load, tmp_path / "tree")


def edit_header(model, edit):
    """Changes the metadata as somebody would who also knows of their digest."""
    path = model / "metadata" / "metadata"
    header = json.loads(path.read_text())
    edit(header)
    del header["sha256"]
    text = json.dumps(header, sort_keys=True)
    header["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(header))


def test_another_version_of_the_format_is_refused(model):
    edit_header(model, lambda header: header.update(version=99))
    assert "version is 99" in error_of(checkpoint.load, model)


@pytest.mark.parametrize(
    ("field", "value"),
    [("embed_dim", 128), ("depth", 4), ("ffn_layer", "mlp"), ("num_heads", 7)],
)
def test_shapes_that_contradict_the_config_are_refused(field, value, model):
    edit_header(
        model, lambda header: header["metadata"]["config"].update({field: value})
    )
    message = error_of(checkpoint.load, model)
    assert str(model) in message


def test_unknown_field_of_the_config_is_refused(model):
    edit_header(model, lambda header: header["metadata"]["config"].update(width=3))
    assert "width" in error_of(checkpoint.load, model)


def test_array_that_contradicts_its_metadata_is_refused(model):
    def edit(header):
        header["arrays"]["norm/bias"]["shape"] = [65]

    edit_header(model, edit)
    assert "norm/bias" in error_of(checkpoint.load, model)


def test_listed_array_that_is_not_stored_is_refused(model):
    def edit(header):
        header["arrays"]["norm/more"] = header["arrays"]["norm/bias"]

    edit_header(model, edit)
    assert "norm/more" in error_of(checkpoint.load, model)


def test_not_finite_values_in_a_stored_model_are_named(tmp_path):
    params = random_params()
    params["norm"]["scale"][3] = np.nan
    with checkpoint.ModelWriter(tmp_path / "model", CONFIG) as writer:  # unchecked
        for name, array in checkpoint.flatten(params).items():
            writer.write(name, array)
    assert "norm/scale holds NaN" in error_of(checkpoint.load, tmp_path / "model")


@pytest.mark.parametrize("damage", ["deleted", "empty", "half", "short"])
def test_no_damaged_file_is_read_as_something_else(damage, model, capfd):
    """Either one line says so, or the file did not matter and all bytes are right."""
    params = random_params()
    files = sorted(path for path in model.rglob("*") if path.is_file())
    refused = []
    for path in files:
        data = path.read_bytes()
        if damage == "deleted":
            path.unlink()
        else:
            kept = {"empty": 0, "half": len(data) // 2, "short": len(data) - 1}[damage]
            path.write_bytes(data[:kept])
        try:
            config, got = checkpoint.load(model)
        except ValueError as error:
            assert "\n" not in str(error) and str(model) in str(error)
            refused.append(path)
        else:
            assert config == CONFIG
            assert_same_tree(got, params)
        path.write_bytes(data)
    # At least the metadata, the list of arrays and, short of its padding, the data.
    assert len(refused) >= 3
    assert model / "metadata" / "metadata" in refused
    assert "Traceback" not in capfd.readouterr().err
