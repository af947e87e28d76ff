"""convert/commands/apply.py: all but the repaired kernels is as in the base."""

import collections
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
from conversions import KINDS, refusal, repair, run
from convert.files import reading, writing
from samples import assert_same_bytes, read_state_dict
from sinder_jax import delta, factor
from sinder_jax.storage import delta_file

KIND = "swiglu"
CONFIG = KINDS[KIND]
HEAD = {
    "classifier.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "classifier.bias": np.full(2, np.nan, np.float32),  # nobody's business
    "counter.num_batches_tracked": np.array(7, np.int64),
}


@pytest.fixture(scope="module")
def patch(tmp_path_factory):
    params, factors, eps, _ = repair(KIND)
    path = tmp_path_factory.mktemp("delta") / "made.safetensors"
    delta_file.save(path, delta.from_eps(CONFIG, params, factors, eps))
    return path


def states(layout, prefix="", head=HEAD):
    """Base and repaired state dict with a prefix, and a head beside the backbone."""
    params, _, _, repaired = repair(KIND)
    return (
        {
            **{prefix + k: x for k, x in convert.to_torch(CONFIG, p, layout).items()},
            **head,
        }
        for p in (params, repaired)
    )


def check_digest(path):
    """Reads all tensors: their digest must be the one in the file's metadata."""
    model = convert.open_model(path)
    assert model.known_digest
    dict(model.leaves())


def write_hugging_face(folder, state, *, shards=1):
    folder.mkdir()
    for i in range(shards):
        whole = "model.safetensors"
        name = whole if shards == 1 else f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {key: state[key] for key in list(state)[i::shards]}
        save_file(part, folder / name, metadata={"format": "pt", "made by": "test"})
    if shards > 1:
        weight_map = {
            key: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors"
            for i, key in enumerate(state)
        }
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    told = {
        "architectures": ["Dinov2ForImageClassification"],
        "model_type": "dinov2",
        "id2label": {"0": "cat"},
    }
    (folder / "config.json").write_text(json.dumps(told, indent=7))
    (folder / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 99}}')
    (folder / "README.md").write_text("# Cats\n")


@pytest.mark.parametrize("shards", [1, 3])
def test_a_fine_tuned_directory_keeps_all_else(shards, patch, tmp_path, capsys):
    base, want = states("hf", "dinov2.")
    write_hugging_face(tmp_path / "base", base, shards=shards)
    before = {x.name: x.read_bytes() for x in (tmp_path / "base").iterdir()}
    (tmp_path / "base" / "flax_model.msgpack").write_bytes(b"not repaired")
    (tmp_path / "base" / "onnx").mkdir()
    run("apply", tmp_path / "base", patch, tmp_path / "made")
    out = capsys.readouterr().out
    assert "written as they are: 3 entries, " in out
    assert "before its repair: flax_model.msgpack, onnx/." in out
    made = {x.name: x.read_bytes() for x in (tmp_path / "made").iterdir()}
    assert made.keys() == before.keys() | {"model.safetensors.sha256"}
    for name in before:
        if name.endswith(".safetensors"):
            old, new = (
                load_file(tmp_path / "base" / name),
                load_file(tmp_path / "made" / name),
            )
            assert_same_bytes({key: new[key] for key in old}, {k: want[k] for k in old})
            assert new.keys() == old.keys()
        else:
            assert made[name] == before[name], name
    metadata = reading.open_state_dict(tmp_path / "made").metadata
    assert metadata["made by"] == "test" and "sinder_jax" in metadata
    # The side file lists all files, and the digest in the file is that of its tensors.
    check_digest(tmp_path / "made")
    (tmp_path / "made" / "README.md").write_text("# Dogs\n")
    assert "README.md: damaged" in refusal(capsys, "inspect", tmp_path / "made")


@pytest.mark.parametrize(
    ("layout", "prefix", "dtype"),
    [
        ("dinov2", "teacher.backbone.", np.float32),
        ("timm", "module.", np.float16),
        ("hf", "backbone.", ml_dtypes.bfloat16),
        ("dinov2", "backbone._checkpoint_wrapped_module.", np.float64),
    ],
    ids=["float32", "float16", "bfloat16", "float64"],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_keeps_names_and_number_formats(
    suffix, layout, prefix, dtype, tmp_path, capsys
):
    if suffix == ".pth":
        pytest.importorskip("torch")
    base, _ = states(layout, prefix)
    base = {k: x.astype(dtype) if x.dtype == np.float32 else x for k, x in base.items()}
    if dtype == np.float64:  # more bits than float32 holds
        base = {k: x * (1 + 1e-12) if x.dtype == dtype else x for k, x in base.items()}
    path, made = tmp_path / f"base{suffix}", tmp_path / f"made{suffix}"
    writing.write_state_dict(path, base)
    params = convert.open_model(path).params
    factors, (_, _, eps, _) = factor.factorize(CONFIG, params), repair(KIND)
    delta_file.save(
        tmp_path / "delta.safetensors", delta.from_eps(CONFIG, params, factors, eps)
    )
    run("apply", path, tmp_path / "delta.safetensors", made)
    rounded = "are rounded to" in capsys.readouterr().out
    assert rounded == (np.dtype(dtype).itemsize == 2)

    before, after = (
        convert.to_torch(CONFIG, x, layout)
        for x in (params, factor.merge(params, factors, eps))
    )
    want = dict(base)
    for key, new in after.items():
        old = base[prefix + key]
        want[prefix + key] = np.where(before[key] == new, old, new.astype(dtype))
    got = read_state_dict(made)
    assert_same_bytes({key: got[key] for key in want}, want)
    assert list(got) == list(read_state_dict(path))
    assert sum(want[key].tobytes() != base[key].tobytes() for key in want) == 4
    check_digest(made)


def test_a_training_checkpoint_keeps_all_that_is_in_it(patch, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    base, want = states("dinov2", "backbone.", {})
    weights = collections.OrderedDict(
        (key, torch.nn.Parameter(torch.from_numpy(x))) for key, x in base.items()
    )
    weights["dino_head.weight"] = torch.ones(3)
    optimizer = {"state": {0: {"momentum": torch.arange(5)}}, "lr": 0.1}
    whole = {"teacher": weights, "iteration": 5, "optimizer": optimizer}
    torch.save(whole, tmp_path / "base.pth")
    run("apply", tmp_path / "base.pth", patch, tmp_path / "made.pth")
    made = torch.load(tmp_path / "made.pth", weights_only=True)
    assert list(made) == list(whole) and made["iteration"] == 5
    assert made["optimizer"]["state"][0]["momentum"].tolist() == [0, 1, 2, 3, 4]
    assert made["optimizer"]["lr"] == 0.1
    assert type(made["teacher"]) is collections.OrderedDict
    assert list(made["teacher"]) == list(weights)
    assert made["teacher"]["dino_head.weight"].tolist() == [1, 1, 1]
    got = {key: made["teacher"][key] for key in want}
    assert all(isinstance(x, torch.nn.Parameter) for x in got.values())
    assert_same_bytes({key: x.detach().numpy() for key, x in got.items()}, want)
    check_digest(tmp_path / "made.pth")
    # What another format cannot hold is refused, by name.
    line = refusal(
        capsys, "apply", tmp_path / "base.pth", patch, tmp_path / "x.safetensors"
    )
    assert "iteration, optimizer; write a .pth file" in line
    assert not (tmp_path / "x.safetensors").exists()


def test_a_directory_of_a_pickle_stays_one(patch, tmp_path):
    torch = pytest.importorskip("torch")
    base, want = states("hf", "", {})
    (tmp_path / "base").mkdir()
    state = {key: torch.from_numpy(x) for key, x in base.items()}
    torch.save(state, tmp_path / "base" / "pytorch_model.bin")
    run("apply", tmp_path / "base", patch, tmp_path / "made")
    names = {x.name for x in (tmp_path / "made").iterdir()}
    assert names == {"pytorch_model.bin", "model.safetensors.sha256"}
    assert_same_bytes(read_state_dict(tmp_path / "made"), want)


def test_a_base_that_does_not_exist_is_named_first(patch, tmp_path, capsys):
    line = refusal(capsys, "apply", tmp_path / "none", patch, tmp_path / "made")
    assert line == f"error: {tmp_path / 'none'}: no such file or directory\n"


def test_an_export_of_a_classifier_claims_no_classifier(tmp_path):
    """to-torch writes a backbone, wherever the weights came from."""
    base, _ = states("hf", "dinov2.")
    write_hugging_face(tmp_path / "base", base)
    run("to-jax", tmp_path / "base", tmp_path / "jax")
    for source in ("base", "jax"):
        run("to-torch", tmp_path / source, tmp_path / f"{source}_hf", "--layout=hf")
        told = json.loads((tmp_path / f"{source}_hf" / "config.json").read_text())
        assert told["architectures"] == ["Dinov2Model"]


@pytest.mark.slow  # imports transformers
def test_logits_of_a_classifier_are_those_of_the_repaired_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    import torch

    base, want = states("hf", "dinov2.", {})
    width = 2 * CONFIG.embed_dim
    head = {
        "classifier.weight": np.random.default_rng(0).standard_normal((5, width)),
        "classifier.bias": np.arange(5.0),
    }
    head = {key: x.astype(np.float32) for key, x in head.items()}
    write_hugging_face(tmp_path / "base", base | head)
    told = {
        "architectures": ["Dinov2ForImageClassification"],
        "model_type": "dinov2",
        "hidden_size": CONFIG.embed_dim,
        "num_hidden_layers": CONFIG.depth,
        "num_attention_heads": CONFIG.num_heads,
        "image_size": CONFIG.img_size,
        "patch_size": CONFIG.patch_size,
        "use_swiglu_ffn": True,
        "id2label": {str(i): f"class {i}" for i in range(5)},
    }
    (tmp_path / "base" / "config.json").write_text(json.dumps(told))
    shutil.copytree(tmp_path / "base", tmp_path / "repaired")
    save_file(want | head, tmp_path / "repaired/model.safetensors", {"format": "pt"})
    run("diff", tmp_path / "base", tmp_path / "repaired", tmp_path / "p.safetensors")
    run("apply", tmp_path / "base", tmp_path / "p.safetensors", tmp_path / "made")
    images = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    logits = {}
    for name in ("base", "repaired", "made"):
        model, info = transformers.Dinov2ForImageClassification.from_pretrained(
            tmp_path / name, output_loading_info=True
        )
        assert not info["missing_keys"]
        with torch.no_grad():
            logits[name] = model.eval()(images).logits.numpy()
    np.testing.assert_allclose(logits["made"], logits["repaired"], rtol=1e-5)
    assert np.abs(logits["base"] - logits["repaired"]).max() > 1e-3
