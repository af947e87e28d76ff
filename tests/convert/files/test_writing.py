import resource
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from convert.files import reading, writing, writing_pth
from convert.files.tensors import StateDict
from samples import (
    SMALL,
    assert_same_bytes,
    error_of,
    numpy_state,
    random_state,
    read_state_dict,
)

SUFFIXES = [".pth", ".pt", ".safetensors"]


def file_with(suffix, folder):
    if suffix != ".safetensors":
        pytest.importorskip("torch")
    return folder / f"model{suffix}"


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("number_format", ["float32", "float16", "bfloat16", "float64"])
def test_file_gives_back_the_bytes_and_the_number_format(
    suffix, number_format, tmp_path
):
    path = file_with(suffix, tmp_path)
    state = {
        key: array.astype(np.dtype(number_format))
        for key, array in random_state(SMALL["registers"]).items()
    }
    writing.write_state_dict(path, state)
    back = read_state_dict(path)
    assert_same_bytes({key: back[key] for key in state}, state)
    assert back.keys() == state.keys()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_views_are_written_as_what_they_show(suffix, tmp_path):
    path = file_with(suffix, tmp_path)
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    frozen = base[0].copy()
    frozen.flags.writeable = False
    state = {
        "turned": base.T,
        "part": base[:, ::2],
        "one": base[1, 1],
        "frozen": frozen,
    }
    writing.write_state_dict(path, {key: np.asarray(x) for key, x in state.items()})
    back = read_state_dict(path)
    for key, array in state.items():
        assert back[key].shape == array.shape
        np.testing.assert_array_equal(back[key], array)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bytes_of_a_file_do_not_depend_on_its_name(suffix, tmp_path):
    path = file_with(suffix, tmp_path)
    state = random_state(SMALL["swiglu"])
    writing.write_state_dict(path, state)
    writing.write_state_dict(tmp_path / f"other{suffix}", state)
    assert path.read_bytes() == (tmp_path / f"other{suffix}").read_bytes()


def test_pytorch_loads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    state = random_state(SMALL["mlp"])
    writing.write_state_dict(tmp_path / "model.pth", state)
    loaded = torch.load(tmp_path / "model.pth", weights_only=True)
    assert list(loaded) == list(state)
    assert all(tensor.dtype == torch.float32 for tensor in loaded.values())


def test_written_safetensors_name_the_format_that_transformers_asks_for(tmp_path):
    writing.write_state_dict(tmp_path / "a.safetensors", random_state(SMALL["mlp"]))
    with safe_open(tmp_path / "a.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}


def test_safetensors_have_the_bytes_that_the_library_writes(tmp_path):
    state = random_state(SMALL["registers"])
    state["half"] = np.ones((3, 5), np.float16)
    state["whole"] = np.arange(3)
    state["ü"] = np.ones((), np.float32)
    writing.write_state_dict(tmp_path / "ours.safetensors", state)
    save_file(state, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    theirs = (tmp_path / "theirs.safetensors").read_bytes()
    assert (tmp_path / "ours.safetensors").read_bytes() == theirs


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_metadata_come_back_and_pytorch_passes_over_them(suffix, tmp_path):
    path = file_with(suffix, tmp_path)
    state = random_state(SMALL["mlp"])
    writing.write_state_dict(path, state, metadata={"sinder_jax": "told ü"})
    assert reading.open_state_dict(path).metadata["sinder_jax"] == "told ü"
    if suffix != ".safetensors":
        torch = pytest.importorskip("torch")
        for mapped in (True, False):
            loaded = torch.load(path, weights_only=True, mmap=mapped)
            assert_same_bytes(numpy_state(loaded), state)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tensors_may_come_in_any_order(suffix, tmp_path):
    path, other = file_with(suffix, tmp_path), tmp_path / f"other{suffix}"
    state = random_state(SMALL["swiglu"])
    writing.write_state_dict(path, state)
    backwards = ((key, state[key]) for key in reversed(state))
    writing.write_tensors(other, StateDict.of(state).specs, backwards)
    assert path.read_bytes() == other.read_bytes()


# --- Hugging Face directories -----------------------------------------------------


def test_reads_what_pytorch_writes(tmp_path):
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(3, 2).to(torch.bfloat16)
    want = {key: tensor.float().numpy() for key, tensor in layer.state_dict().items()}
    for name, new in (("new.pth", True), ("old.pth", False)):
        torch.save(
            layer.state_dict(), tmp_path / name, _use_new_zipfile_serialization=new
        )
        back = read_state_dict(tmp_path / name)
        assert {array.dtype for array in back.values()} == {
            np.dtype(ml_dtypes.bfloat16)
        }
        for key, array in want.items():
            np.testing.assert_array_equal(back[key].astype(np.float32), array)


def test_parameters_and_shared_storage_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    x = torch.arange(6.0).reshape(2, 3)
    torch.save({"p": torch.nn.Parameter(x), "t": x.T}, tmp_path / "model.pt")
    back = read_state_dict(tmp_path / "model.pt")
    np.testing.assert_array_equal(back["p"], x.numpy())
    np.testing.assert_array_equal(back["t"], x.numpy().T)


def test_existing_file_is_replaced_only_when_asked(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"mine")
    state = random_state(SMALL["mlp"])
    message = error_of(writing.write_state_dict, path, state, kind=FileExistsError)
    assert str(path) in message and path.read_bytes() == b"mine"
    writing.write_state_dict(path, state, overwrite=True)
    assert_same_bytes(
        dict(sorted(read_state_dict(path).items())), dict(sorted(state.items()))
    )


def test_missing_directory_and_unknown_suffix_are_refused_before_writing(tmp_path):
    state = random_state(SMALL["mlp"])
    error_of(
        writing.write_state_dict,
        tmp_path / "none" / "model.safetensors",
        state,
        kind=FileNotFoundError,
    )
    assert ".safetensors" in error_of(
        writing.write_state_dict, tmp_path / "model.onnx", state
    )
    assert not list(tmp_path.iterdir())


def test_failed_writing_leaves_nothing(tmp_path, monkeypatch):
    def half_a_file(path, specs, tensors, metadata):
        path.write_bytes(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setitem(writing.WRITERS, ".safetensors", half_a_file)
    state = random_state(SMALL["mlp"])
    path = tmp_path / "model.safetensors"
    assert "disk full" in error_of(writing.write_state_dict, path, state, kind=OSError)
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"mine")
    error_of(writing.write_state_dict, path, state, overwrite=True, kind=OSError)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"mine"]


def test_missing_torch_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / "model.pth"
    path.write_bytes(b"anything")
    for call in (read_state_dict, lambda path: writing.write_state_dict(path, {})):
        message = error_of(call, path, kind=ImportError)
        assert "pip install 'sinder_jax[torch]'" in message


@pytest.mark.parametrize("room", [100, 20_000])
def test_a_full_disk_under_a_pth_names_the_file(room, tmp_path):
    """torch reports the bytes that are missing, not why they are."""
    torch = pytest.importorskip("torch")
    base = {"x": torch.ones(9000), "y": torch.ones(9000)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            with writing.file(tmp_path / "a.pth") as partial:
                writing_pth.write_whole(partial, base, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value).startswith(f"{tmp_path / 'a.pth'} cannot be written: ")
    assert "File too large" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_at_the_start_of_a_pth_names_the_file(tmp_path):
    pytest.importorskip("torch")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"a\.pth cannot be written: File too large"):
            writing.write_state_dict(tmp_path / "a.pth", {"x": np.ones(9000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
