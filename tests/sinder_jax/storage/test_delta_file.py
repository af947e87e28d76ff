"""Delta files: what was saved is what is loaded, to the last bit, or an error."""

import json
import os

import numpy as np
import pytest
import safetensors.numpy

from deltas import SWIGLU, assert_same_delta, random_delta
from sinder_jax import delta, kernels, param_tree, planted, vit
from sinder_jax.storage import delta_file

PROVENANCE = {"source": "ε of the demo", "steps": ["to-jax"]}


@pytest.fixture
def saved(tmp_path):
    """(path, delta) of a delta file."""
    path = tmp_path / "giant.safetensors"
    delta_file.save(path, random_delta(SWIGLU), PROVENANCE)
    return path, random_delta(SWIGLU)


def test_a_saved_delta_is_loaded_bit_for_bit(saved):
    path, want = saved
    got, metadata = delta_file.load(path)
    assert_same_delta(got, want)
    assert metadata["writer"].startswith("sinder_jax")
    assert metadata["provenance"] == PROVENANCE
    assert os.listdir(path.parent) == [path.name]
    assert set(safetensors.numpy.load_file(path)) == {
        f"{part}/{name}" for part in ("eps", "probe") for name in want.eps
    }


def test_what_was_loaded_can_be_saved_again_byte_for_byte(saved, tmp_path):
    path, want = saved
    found, metadata = delta_file.load(path)
    delta_file.save(tmp_path / "again.safetensors", found, metadata["provenance"])
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    again, metadata = delta_file.load(tmp_path / "again.safetensors")
    assert_same_delta(again, want)
    assert metadata == delta_file.load(path)[1]


def test_an_existing_path_is_kept(saved):
    path, found = saved
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists"):
        delta_file.save(path, found)
    assert path.read_bytes() == before
    with pytest.raises(FileNotFoundError):
        delta_file.save(path.parent / "missing" / "a.safetensors", found)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        delta_file.save(tmp_path / "a.safetensors", random_delta(SWIGLU))
    assert not os.listdir(tmp_path)


def test_every_flipped_bit_is_detected_or_harmless(saved):
    path, want = saved
    metadata = delta_file.load(path)[1]
    content = path.read_bytes()
    rng = np.random.default_rng(4)
    # half of them in the header, which is a small part of the file
    header = 8 + int.from_bytes(content[:8], "little")
    positions = np.concatenate(
        [rng.integers(0, 8 * header, 100), rng.integers(0, 8 * len(content), 100)]
    )
    detected = 0
    for bit in positions:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            got, found = delta_file.load(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            detected += 1
        else:
            assert_same_delta(got, want)
            assert found == metadata
    # a space in the header's padding may become another JSON space, hardly more
    assert detected >= 195


def test_a_truncated_file_is_refused(saved):
    path, _ = saved
    content = path.read_bytes()
    for length in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="not a delta"):
            delta_file.load(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="not a delta"):
        delta_file.load(path)


def test_what_is_no_delta_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        delta_file.load(tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match="is not a file"):
        delta_file.load(tmp_path)
    text = tmp_path / "readme.safetensors"
    text.write_text("a text")
    with pytest.raises(ValueError, match="not a delta"):
        delta_file.load(text)
    model = tmp_path / "model.safetensors"
    weights = {"norm.weight": np.ones(3, np.float32)}
    for metadata in (None, {"format": "pt"}):
        safetensors.numpy.save_file(weights, model, metadata)
        with pytest.raises(ValueError, match="its format is (None|'pt'), not"):
            delta_file.load(model)


def test_a_large_file_is_refused_unread(tmp_path):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.truncate(4 * 2**30)  # takes no space on the disk
    with pytest.raises(ValueError, match="4,096 MiB and a delta at most 64"):
        delta_file.load(path)


def rewritten(path, **changes):
    """The file with other metadata or tensors, and a digest that is right."""
    with safetensors.safe_open(path, "numpy") as file:
        header = file.metadata()
    tensors = safetensors.numpy.load_file(path)
    for name, value in changes.items():
        name = name.replace("__", "/")
        target = header if isinstance(value, str) else tensors
        target[name] = value
        if value is None:
            del target[name]
    header["digest"] = delta_file._content_digest(tensors, header)
    path.write_bytes(safetensors.numpy.save(tensors, header))


def config_json(**changes):
    return json.dumps(SWIGLU.as_dict() | changes)


CONTENTS = {
    "version": ({"version": "2"}, "version is '2', this program reads 1"),
    "config-of-another": ({"config": config_json(depth=6)}, "eps must hold"),
    "config-of-huge": ({"config": config_json(depth=10**12)}, "eps must hold"),
    "config-of-nobody": ({"config": config_json(num_heads=3)}, "num_heads=3 must"),
    "config-no-json": ({"config": "{"}, "JSONDecodeError"),
    "config-no-dict": ({"config": "[]"}, "TypeError"),
    "config-surplus": ({"config": config_json(colour=1)}, "TypeError"),
    "provenance-no-json": ({"provenance": "{"}, "JSONDecodeError"),
    "provenance-no-dict": ({"provenance": "[1]"}, "TypeError"),
    "base": ({"base": "1234"}, "must be a SHA-256"),
    "missing": ({"eps__mlp/w3": None}, "eps must hold"),
    "surplus": ({"gain__mlp/w3": np.zeros((5, 16), np.float32)}, "KeyError"),
    "no-part": ({"eps": np.zeros((5, 16), np.float32)}, "ValueError"),
    "shape": ({"eps__mlp/w3": np.zeros((5, 15), np.float32)}, "eps must hold"),
    "format": ({"eps__mlp/w3": np.zeros((5, 16), np.float64)}, "finite float32"),
    "nan": ({"eps__mlp/w3": np.full((5, 16), np.nan, np.float32)}, "finite float32"),
    "probe": (
        {"probe__mlp/w3": np.full((5, 4), np.inf, np.float32)},
        "probe of mlp/w3",
    ),
    "probe-shape": ({"probe__mlp/w3": np.zeros((5, 3), np.float32)}, "probe must hold"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_content_that_does_not_fit_is_refused(saved, case):
    changes, message = CONTENTS[case]
    path, _ = saved
    rewritten(path)
    delta_file.load(path)  # the control: unchanged it passes
    rewritten(path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        delta_file.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_invalid_delta_is_not_saved(tmp_path):
    path, found = tmp_path / "a.safetensors", random_delta(SWIGLU)
    broken = found._replace(base="unknown")
    with pytest.raises(ValueError, match="must be a SHA-256"):
        delta_file.save(path, broken)
    assert not os.listdir(tmp_path)


def delta_bytes(config, path):
    """Size of a delta with every ε of a model."""
    shape = (config.depth, config.embed_dim)
    names = kernels.names(config)
    probe = (config.depth, delta.NUM_PROBES)
    full = delta.Delta(
        config,
        {name: np.ones(shape, np.float32) for name in names},
        "0" * 64,
        {name: np.ones(probe, np.float32) for name in names},
    )
    delta_file.save(path, full)
    assert sum(e.size for e in delta_file.load(path)[0].eps.values()) == 4 * np.prod(
        shape
    )
    return path.stat().st_size


def test_deltas_are_small(tmp_path):
    assert delta_bytes(planted.CONFIG, tmp_path / "tiny.safetensors") < 100_000
    giant = vit.CONFIGS["dinov2_vitg14"]
    assert 4 * giant.depth * giant.embed_dim == 245_760
    assert delta_bytes(giant, tmp_path / "giant.safetensors") < 1_000_000
    for name, config in vit.CONFIGS.items():  # every S is D
        shapes = param_tree.flatten(param_tree.shapes(config))
        for kernel in kernels.names(config):
            path = "attn/qkv" if kernel == "attn/v" else kernel
            shape = shapes[f"blocks/{path}/kernel"].shape
            assert min(shape[1:]) == config.embed_dim, (name, kernel)
