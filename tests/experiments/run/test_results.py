"""run/results.py: measures over photographs, pictures and the files of a repair."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import convert
from experiments.run import results
from experiments.run.workdir import Workdir
from forward import tokens_after
from photos import crop, normalize, save_noise
from samples import read_state_dict
from sinder_jax import checkpoint, families, param_tree, vit
from sinder_jax.analysis import defective
from sinder_jax.data import listing
from sinder_jax.model import Model
from sinder_jax.plots import pictures

CONFIG = vit.ViTConfig(64, 3, 1, "mlp", img_size=56)
SIZE = 112


def weights(config: vit.ViTConfig, seed: int):
    rng = np.random.default_rng(seed)
    shapes = param_tree.flatten(param_tree.shapes(config))
    flat = {p: rng.normal(0, 0.2, x.shape) for p, x in shapes.items()}
    return param_tree.unflatten({p: x.astype(np.float32) for p, x in flat.items()})


@pytest.fixture(scope="module")
def two_models():
    return weights(CONFIG, 0), weights(CONFIG, 1)


@pytest.fixture(scope="module")
def direction():
    vector = np.random.default_rng(2).normal(size=64).astype(np.float32)
    return jnp.asarray(vector / np.linalg.norm(vector))


@pytest.fixture
def photos(tmp_path) -> list[listing.File]:
    """Six photographs; two have the same file name, and the fourth is broken."""
    files = []
    for i, name in enumerate(
        ["a.png", "x/b.png", "y/b.png", "c.png", "d.png", "e.png"]
    ):
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (120, 130, 3), np.uint8)
        Image.fromarray(pixels).save(file)
        files.append(listing.File(str(file)))
    Path(files[3].name).write_bytes(b"no image")
    return files


def observer(two_models, direction, mask_thr=1.5) -> results.Observer:
    config = ConfigDict({"mask_thr": mask_thr, "image_size": SIZE})
    return results.Observer(CONFIG, two_models[0], direction, config)


def tokens_of(params, file: listing.File) -> jax.Array:
    """The same steps written out: photograph to last block's patch tokens."""
    image = normalize(crop(file.read(), SIZE))
    (tokens,) = tokens_after(CONFIG, params, image[None], (CONFIG.depth - 1,))
    return tokens[0, 1:].reshape(8, 8, 64)


# --- results: several photographs -----------------------------------------------------


def test_measures_of_photographs_are_means_and_maxima(two_models, direction, photos):
    measured = observer(two_models, direction).measure(photos, two_models[1], 6)
    readable = [file for i, file in enumerate(photos) if i != 3]
    each = [
        defective.measure(
            *(tokens_of(params, file) for params in two_models), direction, mask_thr=1.5
        )
        for file in readable
    ]
    # By path: two of them have the same name.
    assert list(measured["each"]) == [file.name for file in readable]
    assert measured["photographs"] == 5
    for mine, expected in zip(measured["each"].values(), each, strict=True):
        assert mine == pytest.approx(expected, rel=1e-4)  # float32, fused differently
    for kind, name in [("direction", "outliers"), ("norm", "large_norms")]:
        for time in ("before", "after"):
            expected = np.mean([numbers[f"{name}_{time}"] for numbers in each])
            assert measured[f"defective_patches_by_{kind}"][time] == expected
    for time in ("before", "after"):
        assert measured["largest_to_median_norm"][time] == pytest.approx(
            max(numbers[f"norm_ratio_{time}"] for numbers in each), rel=1e-4
        )
    outliers = measured["defective_patches_by_direction"]
    assert outliers["before"] != outliers["after"]  # so that they could be confused


def test_the_same_model_twice_changes_nothing(two_models, direction, photos):
    measured = observer(two_models, direction).measure(photos, two_models[0], 2)
    assert measured["photographs"] == 2
    for name in ("defective_patches_by_direction", "largest_to_median_norm"):
        assert measured[name]["before"] == measured[name]["after"]
    assert measured["cosine_of_sound_tokens"] == pytest.approx(1, abs=1e-6)


def test_without_a_readable_photograph_there_are_no_measures(
    two_models, direction, photos
):
    observe_none = observer(two_models, direction).measure
    assert observe_none([], two_models[1], 8) is None
    assert observe_none([photos[3]], two_models[1], 8) is None
    assert results.describe("held out", None) == "held out: no photographs"


def test_measures_are_described_in_one_line():
    measures = {
        "photographs": 4,
        "defective_patches_by_direction": {"before": 7.0, "after": 0.25},
        "defective_patches_by_norm": {"before": 6.5, "after": 0.0},
        "largest_to_median_norm": {"before": 15.988, "after": 1.4731},
        "cosine_of_sound_tokens": 0.99965,
    }
    assert results.describe("held out", measures) == (
        "held out, 4 photographs: defective patches each 7.00 -> 0.25 by direction, "
        "6.50 -> 0.00 by norm; largest to median norm 15.99 -> 1.47; cosine of sound "
        "tokens 0.9997"
    )


# --- results: which photographs -------------------------------------------------------


@pytest.mark.parametrize(
    "most, chosen",
    [
        (1, [0]),
        (2, [0, 4]),
        (3, [0, 2, 4]),
        (6, [0, 1, 2, 4, 5]),
        (99, [0, 1, 2, 4, 5]),
    ],
)
def test_photographs_are_spread_and_readable(most, chosen, photos):
    """The fourth is broken: the next of its part stands in, if there is one."""
    assert results.spread(photos, most) == [photos[i] for i in chosen]


def test_no_more_photographs_are_decoded_than_needed(photos, monkeypatch):
    read = []
    monkeypatch.setattr(results, "is_readable", lambda one, _: read.append(one) or 1)
    assert results.spread(photos * 100_000, 2) == [photos[0], photos[0]]
    assert len(read) == 2
    assert results.spread([], 8) == []


# --- results: pictures ----------------------------------------------------------------


def test_a_figure_shows_photograph_before_and_now(two_models, direction, photos):
    look = observer(two_models, direction)
    one = look.picture(photos[:1], two_models[1])
    assert one.dtype == np.uint8 and one.ndim == 3 and one.shape[2] == 3
    assert not np.array_equal(one, look.picture(photos[:1], two_models[0]))
    two = look.picture(photos[:2], two_models[1])
    assert two.shape == (2 * one.shape[0], *one.shape[1:])


def test_figures_are_upright_and_measures_are_of_what_is_repaired_on(
    two_models, direction, tmp_path, monkeypatch
):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pixels = save_noise(tmp_path / "turned.png", SIZE, SIZE, exif=exif)
    save_noise(tmp_path / "plain.png", SIZE, SIZE)
    turned, plain = (
        listing.File(str(tmp_path / name)) for name in ("turned.png", "plain.png")
    )
    look, draw, drawn = observer(two_models, direction), pictures.token_rows, []
    monkeypatch.setattr(
        pictures, "token_rows", lambda looks: drawn.extend(looks) or draw(looks)
    )
    look.picture([turned], two_models[1])
    np.testing.assert_array_equal(drawn[0][0], pixels[::-1, ::-1])
    each = [look.measure([photo], two_models[1], 1) for photo in (turned, plain)]
    assert each[0]["each"][turned.name] == each[1]["each"][plain.name]


def test_a_picture_is_written_as_png_whole_or_not_at_all(tmp_path, monkeypatch):
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    results.save_png(tmp_path / "a.png", rgb[::-1])
    results.save_png(tmp_path / "a.png", rgb)
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.format == "PNG"
        np.testing.assert_array_equal(np.asarray(saved), rgb)

    def full_disk(self, file, **options):
        Path(file).write_bytes(b"half a picture")
        raise OSError(28, "No space left on device")

    content = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        results.save_png(tmp_path / "a.png", rgb[::-1])
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == content


# --- results: the repaired model ------------------------------------------------------


def exported(workdir: Path) -> list[Path]:
    return sorted(path for path in workdir.iterdir() if path.name != "claims")


PROVENANCE = {"source": "hub.pth", "steps": ["to-jax"]}
ORIGINAL = Model.of(CONFIG, weights(CONFIG, 0), PROVENANCE)


def test_the_exported_files_hold_the_same_model(two_models, tmp_path):
    workdir = Workdir(str(tmp_path))
    names = results.export(workdir, ORIGINAL, two_models[0])
    has_torch = importlib.util.find_spec("torch") is not None
    files = ["repaired.safetensors", *(["repaired.pth"] if has_torch else [])]
    assert names == ["repaired", *files]
    sides = [f"{file}.sha256" for file in files]
    assert [path.name for path in exported(tmp_path)] == sorted(names + sides)
    config, params = checkpoint.load(tmp_path / "repaired")
    assert config == CONFIG
    assert jax.tree.all(jax.tree.map(np.array_equal, params, two_models[0]))
    for file in files:
        _, params = convert.from_torch(read_state_dict(tmp_path / file))
        assert jax.tree.all(jax.tree.map(np.array_equal, params, two_models[0]))


def test_exports_keep_statistics_and_what_the_files_said(two_models, tmp_path):
    statistics = ((0.5, 0.6, 0.7), (0.1, 0.2, 0.3))
    config = dataclasses.replace(CONFIG, statistics=statistics)
    told = PROVENANCE | {"contents": {"config.json": {"organ": "liver"}}}
    original = Model.of(config, ORIGINAL.params, told)
    for name in results.export(Workdir(str(tmp_path)), original, two_models[0]):
        model = convert.open_model(tmp_path / name)
        assert families.of(model.config).statistics == statistics
        assert model.provenance["contents"] == told["contents"]


def test_photographs_are_normalized_by_the_model_s_statistics(
    two_models, direction, photos
):
    config = dataclasses.replace(CONFIG, statistics=((0, 0, 0), (0.1, 0.1, 0.1)))
    options = ConfigDict({"mask_thr": 1.0, "image_size": SIZE})
    seen = [
        results.Observer(each, two_models[0], direction, options).measure(
            photos[:1], two_models[1], 1
        )
        for each in (CONFIG, config)
    ]
    first, second = (each["largest_to_median_norm"]["before"] for each in seen)
    assert first != second


def test_exports_say_where_the_weights_come_from(two_models, tmp_path):
    results.export(Workdir(str(tmp_path)), ORIGINAL, two_models[0])
    digests = set()
    for path in exported(tmp_path):
        if path.suffix == ".sha256":
            continue
        model = convert.open_model(path)
        assert model.provenance["source"] == "hub.pth"
        assert model.provenance["steps"][0] == "to-jax"
        assert "repaired by sinder_jax" in model.provenance["steps"][1]
        digests.add(model.digest)
    assert len(digests) == 1 and None not in digests


def test_without_torch_no_pth_is_written(two_models, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    names = results.export(Workdir(str(tmp_path)), ORIGINAL, two_models[0])
    assert names == ["repaired", "repaired.safetensors"]
    files = [path.name for path in exported(tmp_path)]
    assert files == [*names, "repaired.safetensors.sha256"]


def test_an_export_that_was_cut_short_is_completed(two_models, tmp_path):
    workdir = Workdir(str(tmp_path))
    results.export(workdir, ORIGINAL, two_models[0])
    expected = (tmp_path / "repaired.safetensors").read_bytes()
    (tmp_path / "repaired.safetensors").write_bytes(b"half")
    results.export(workdir, ORIGINAL, two_models[0])
    assert (tmp_path / "repaired.safetensors").read_bytes() == expected
