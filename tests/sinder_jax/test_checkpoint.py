import hashlib
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

import bucket as buckets
from sinder_jax import checkpoint, param_tree, vit
from sinder_jax import model as models
from sinder_jax.storage import array_store

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
    shapes = param_tree.flatten(param_tree.shapes(config))
    return param_tree.unflatten(
        {
            path: rng.standard_normal(leaf.shape, np.float32)
            for path, leaf in shapes.items()
        }
    )


def assert_same_tree(got, want):
    got, want = param_tree.flatten(got), param_tree.flatten(want)
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
    flat = param_tree.flatten(TREE)
    assert set(flat) >= {"a/float32", "b/deep/scalar"}
    assert param_tree.unflatten(flat) == TREE


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
    assert "not a checkpoint" in error_of(checkpoint.load, tmp_path)
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "metadata").write_text('{"format": "other"}')
    assert "not a checkpoint" in error_of(checkpoint.load, tmp_path)


def test_tree_without_a_config_is_no_model(tmp_path):
    checkpoint.save_tree(tmp_path / "tree", TREE, {"step": 1})
    assert "not a model checkpoint" in error_of(checkpoint.load, tmp_path / "tree")


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
    models.save(tmp_path / "model", models.Model.of(CONFIG, params))  # unchecked
    assert "norm/scale holds NaN" in error_of(checkpoint.load, tmp_path / "model")


# --- Buckets ----------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    return buckets.install(monkeypatch, tmp_path / "cloud")


def test_a_model_in_a_bucket_comes_back_with_the_same_bytes(bucket):
    params = random_params()
    checkpoint.save("gs://b/models/one", CONFIG, params)
    config, got = checkpoint.load("gs://b/models/one")
    assert config == CONFIG
    assert_same_tree(got, params)
    (top,) = {name.rsplit("models/")[0] for name in bucket.objects()}
    assert top == "b/"  # nothing beside it


def test_a_path_of_a_bucket_is_as_good_as_its_name(bucket):
    place = epath.Path("gs://b") / "tree"
    checkpoint.save_tree(place, TREE, {"step": 3})
    tree, metadata = checkpoint.load_tree(str(place))
    assert_same_tree(tree, TREE)
    assert metadata == {"step": 3}


def test_a_bucket_s_checkpoint_is_that_of_a_disk(bucket, model):
    """Copied from one to the other it can be read."""
    shutil.copytree(model, bucket.place("gs://b/copied"))
    assert_same_tree(checkpoint.load("gs://b/copied")[1], random_params())
    checkpoint.save("gs://b/there", CONFIG, random_params())
    assert_same_tree(checkpoint.load(bucket.place("gs://b/there"))[1], random_params())


def test_what_is_in_a_bucket_is_refused_as_on_a_disk(bucket):
    checkpoint.save_tree("gs://b/tree", TREE, {})
    before = bucket.objects()
    message = error_of(
        checkpoint.save_tree, "gs://b/tree", TREE, {}, kind=FileExistsError
    )
    assert "gs://b/tree" in message
    assert bucket.objects() == before
    message = error_of(checkpoint.load, "gs://b/none", kind=FileNotFoundError)
    assert "gs://b/none" in message
    assert "not a model checkpoint" in error_of(checkpoint.load, "gs://b/tree")


def test_nobody_s_own_objects_are_taken_for_an_unfinished_checkpoint(bucket):
    bucket.put_object("gs://b/mine/arrays_0/x", b"1")
    bucket.put_object("gs://b/mine/thesis.tex", b"2")
    error_of(checkpoint.save_tree, "gs://b/mine", TREE, {}, kind=FileExistsError)
    bucket.put_object("gs://b/file", b"3")
    error_of(checkpoint.save_tree, "gs://b/file", TREE, {}, kind=FileExistsError)
    assert len(bucket.objects()) == 3


def test_a_kill_leaves_no_checkpoint_in_a_bucket_and_the_next_save_replaces_it(bucket):
    """After any number of objects: what can be read is whole."""
    outcomes = []
    for objects in range(20):
        bucket.stop_after(objects)
        try:
            checkpoint.save_tree("gs://b/tree", TREE, {"kill": objects})
        except buckets.Killed:
            bucket.stop_after(None)
            outcomes.append(len(bucket.objects("b/tree")))
            try:
                tree, metadata = checkpoint.load_tree("gs://b/tree")
            except FileNotFoundError:
                assert not bucket.objects()
            except ValueError as error:
                assert str(error) == (
                    "gs://b/tree: not a checkpoint, writing it was cut short"
                )
            else:
                assert_same_tree(tree, TREE)
                assert metadata == {"kill": objects}
                bucket.rm("b/tree", recursive=True)
            continue
        bucket.stop_after(None)
        break
    assert len(set(outcomes)) > 4, "it was never killed half-way"
    tree, metadata = checkpoint.load_tree("gs://b/tree")
    assert_same_tree(tree, TREE)
    assert metadata == {"kill": objects}


def test_failed_saving_leaves_nothing_in_a_bucket(bucket):
    with pytest.raises(ValueError, match="twice"):
        with array_store.writing("gs://b/tree", {}) as writer:
            writer.write("a", np.ones(2))
            writer._close_part()
            assert bucket.objects()
            writer.write("a", np.ones(2))
    assert not bucket.objects()


def test_damage_in_a_bucket_is_noticed(bucket):
    checkpoint.save("gs://b/model", CONFIG, random_params())
    place = bucket.place("gs://b/model/arrays_0/norm.bias/0")
    data = bytearray(place.read_bytes())
    data[5] ^= 1
    place.write_bytes(data)
    assert "norm/bias" in error_of(checkpoint.load, "gs://b/model")


def test_a_bucket_that_does_not_answer_is_told_in_one_line(bucket, monkeypatch):
    class AnonymousCredentialsError(Exception):
        pass

    def refuse(*_):
        raise AnonymousCredentialsError("no credentials\nwere found")

    monkeypatch.setattr(bucket, "info", refuse)
    monkeypatch.setattr(bucket, "exists", refuse)
    for call in (checkpoint.load, lambda path: checkpoint.save_tree(path, TREE, {})):
        message = error_of(call, "gs://b/model", kind=OSError)
        assert "gs://b/model" in message and "no credentials were found" in message


def test_without_gcsfs_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"pip install 'sinder_jax\[gcs\]'"):
        checkpoint.load("gs://b/model")
    with pytest.raises(ValueError, match="only paths on a disk and gs://"):
        checkpoint.load("s3://b/model")


@pytest.mark.parametrize("place", ["a\\b", "a\\b/model"])
def test_a_path_with_a_backslash_is_refused_before_anything_is_written(place, tmp_path):
    """TensorStore would write the arrays to a/b."""
    path = tmp_path / place
    if path.parent != tmp_path:
        path.parent.mkdir()
    before = sorted(tmp_path.rglob("*"))
    message = error_of(checkpoint.save_tree, path, {"x": np.ones(3)}, {})
    assert "backslash" in message
    assert sorted(tmp_path.rglob("*")) == before
    checkpoint.save_tree(tmp_path / "good", {"x": np.ones(3)}, {})
    (tmp_path / "good").rename(path)
    message = error_of(checkpoint.load_tree, path)
    assert "backslash" in message and "damaged" not in message
