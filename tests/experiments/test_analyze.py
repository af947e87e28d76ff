"""experiments/analyze.py and its parts: numbers, kept numbers, figures, errors.

Everything runs on the planted model, whose defect is known, or on smaller random ones
where only the machinery matters.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib.image import AxesImage
from PIL import Image

import convert
import reference
from convert.files import writing
from experiments import analyze
from experiments import config as config_files
from experiments.study import figures, token_figures, verdict, weight_figures
from experiments.study.cache import Cache, Step
from experiments.study.numbers import Study, Subject
from experiments.study.options import Options
from experiments.study.photos import Photo, read_photos
from forward import tokens_after
from loading import loaded
from photos import crop, normalize
from sinder_jax import checkpoint, launch, param_tree, planted, vit
from sinder_jax.analysis.defective import detect
from sinder_jax.data import decode, listing
from sinder_jax.model import Model
from sinder_jax.remedies import clamping

SMALL = vit.ViTConfig(embed_dim=32, depth=3, num_heads=2, ffn_layer="mlp", img_size=56)
OF_A_PHOTO = {"pca", "angles", "random", "blocks", "growth", "clamp"}
OF_ALL = {"norms", "theory", "forecast", "spectra", "eigenvalues", "changes"}


def options_of(**changes) -> Options:
    """The authors' options, some of them changed."""
    given = Options.of(config_files.load("giant.py"), gammas=(2.0, 1.5, 1.3))
    return dataclasses.replace(given, **changes)


def random_params(config, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32),
        param_tree.shapes(config),
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Small random models by name."""
    folder = tmp_path_factory.mktemp("models")
    configs = {
        "first": SMALL,
        "second": SMALL,
        "deep": dataclasses.replace(SMALL, depth=4),
        "registers": dataclasses.replace(SMALL, num_register_tokens=4),
        "fine": dataclasses.replace(SMALL, patch_size=7),
    }
    for seed, (name, config) in enumerate(configs.items()):
        checkpoint.save(folder / name, config, random_params(config, seed))
    return {name: folder / name for name in configs}


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, name in enumerate(["b.png", "a.png"]):
        pixels = np.random.default_rng(i).integers(0, 256, (60, 80, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def run(*arguments):
    assert analyze.main([str(argument) for argument in arguments]) == 0


def refusal(capsys, *arguments):
    """The one line of a command that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        launch.exit_on_error(lambda: analyze.main([str(each) for each in arguments]))
    assert caught.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


def small(folder, models, *arguments, model="first", config=True):
    """Arguments for a small model at a small size."""
    size = ["--config=tiny.py", "--config.image_size=56"] if config else []
    return [*arguments, f"--checkpoint={models[model]}", f"--out={folder}", *size]


def counts(capsys):
    """How many steps the last run computed, and how many it found."""
    line = capsys.readouterr().out.splitlines()[-1]
    words = line.split(": ")[1].split()
    return int(words[0]), int(words[2])


# --- The planted model, everything ----------------------------------------------------


@pytest.fixture(scope="module")
def planted_run(tmp_path_factory):
    """All figures and the report of the planted model, before and after clamping."""
    folder = tmp_path_factory.mktemp("planted")
    made = planted.planted_model(0)
    repaired = clamping.clamp_singular_values(made.config, made.params, 2.0)
    checkpoint.save(folder / "before", made.config, made.params, {"source": "made up"})
    checkpoint.save(folder / "after", made.config, repaired)
    photo = crop(decode.read_rgb(listing.sample_images()[0]), 224)
    photo.save(folder / "photo.png")
    arguments = [
        folder / "photo.png",
        f"--checkpoint={folder / 'before'}",
        f"--compare={folder / 'after'}",
        "--config=tiny.py",
        "--gamma=6,3",
        "--report",
        f"--out={folder / 'out'}",
    ]
    run(*arguments)
    return folder, arguments


@pytest.fixture(scope="module")
def out(planted_run) -> Path:
    return planted_run[0] / "out"


@pytest.fixture(scope="module")
def summary(out):
    return json.loads((out / "analysis.json").read_text())


@pytest.fixture(scope="module")
def tokens(planted_run):
    """Patch tokens [L, H, W, D] of the photograph, computed here."""
    made = planted.planted_model(0)
    image = normalize(decode.read_rgb(planted_run[0] / "photo.png"))
    blocks = tuple(range(made.config.depth))
    found = tokens_after(made.config, made.params, image[None], blocks)
    return np.stack([np.asarray(x[0, 1:]).reshape(16, 16, -1) for x in found])


def arrays(out, name):
    with np.load(out / f"{name}.npz") as found:
        return dict(found)


def test_every_figure_is_written_as_png_pdf_and_arrays(out):
    names = {f"{name}-photo" for name in OF_A_PHOTO} | OF_ALL
    for ending in ("png", "pdf", "npz"):
        assert {path.stem for path in out.glob(f"*.{ending}")} == names
    assert (out / "report.html").stat().st_size > 100_000
    for path in out.glob("*.png"):
        with Image.open(path) as picture:
            assert picture.width >= 200 * 3.3 and picture.info["dpi"][0] > 199


def test_norms_and_angles_are_those_of_the_tokens(out, tokens):
    norms = np.linalg.norm(tokens.astype(np.float64), axis=-1).reshape(12, -1)
    found = arrays(out, "norms")
    np.testing.assert_allclose(found["norms before"], norms, rtol=1e-5)  # float32
    assert not np.allclose(found["norms after"], norms, rtol=0.1)
    nu = arrays(out, "forecast")["directions"]
    units = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    cosines = np.abs(np.einsum("lhwd,ld->lhw", units.astype(np.float64), nu))
    angles = np.degrees(np.arccos(cosines)).reshape(12, -1)
    found = arrays(out, "angles-photo")
    # float32 tokens of two compilations, near 5 degrees the worst
    np.testing.assert_allclose(found["angles before"], angles, atol=2e-3)
    assert np.abs(arrays(out, "random-photo")["random before"] - angles).max() > 30


def test_detected_tokens_are_those_of_the_numpy_reference(out, tokens):
    nu = arrays(out, "forecast")["directions"]
    found = arrays(out, "blocks-photo")
    assert found["blocks"].tolist() == [2, 5, 8, 11]
    for block in found["blocks"]:
        logits = reference.outlier_logits(tokens[block], nu[block])
        mask = reference.outlier_mask(logits, mask_thr=4.0, window=3)
        np.testing.assert_array_equal(found["detected"][block], mask)
    assert found["detected"][5].sum() == 7


def test_heat_maps_and_masks_are_those_of_the_chosen_blocks(planted_run):
    """Seen in the figure itself: its arrays hold the angles of every block."""
    folder, _ = planted_run
    model = convert.open_model(folder / "before", interpolate_antialias=True)
    subject = Subject("before", model)
    options = options_of(image_size=224, seed=1)
    photos = list(read_photos([folder / "photo.png"], 224, 14))
    cache = Cache(folder / "out" / "cache")
    study = Study([subject], None, photos, options, cache)
    (drawn,) = figures.draw(study, ["blocks"])
    shown: dict[str, list] = {"cividis": [], "gray": []}
    for image in drawn.figure.findobj(AxesImage):
        if image.get_cmap().name in shown:
            shown[image.get_cmap().name].append(np.asarray(image.get_array()))
    chosen = [2, 5, 8, 11]
    np.testing.assert_array_equal(shown["cividis"], drawn.arrays["angles"][chosen])
    np.testing.assert_array_equal(shown["gray"], drawn.arrays["detected"][chosen])
    assert "params" not in vars(model)  # all was found in the cache


def test_forecast_and_photograph_name_the_planted_block(summary):
    before, after = summary["models"]
    assert before["forecast"]["has_defect"] and before["forecast"]["block"] == 5
    assert before["forecast"]["blamed"][0]["kernel"] == "mlp/w3"
    overall = before["overall"]
    assert (overall["with_defect"], overall["block"]) == (1, 5)
    assert overall["norm_ratio"] > 5 and overall["angle_to_theory"] < 15
    assert overall["auc"] > 0.99
    assert overall["random_auc"] == pytest.approx(0.5, abs=0.06)
    assert overall["defective_share"] == 7 / 256
    assert not after["forecast"]["has_defect"]
    assert after["overall"]["with_defect"] == 0 and after["overall"]["norm_ratio"] < 2
    assert before["digest"] == convert.open_model(before["path"]).digest


def test_verdict_changes_with_the_repair(summary):
    assert verdict.headline(summary) == (
        "Before, the model has a singular defect; after, it has no singular defect."
    )
    told = verdict.paragraphs(summary)
    assert list(told) == ["Before", "After", "Compared"]
    assert "The defect of the first model is gone in the second." in told["Compared"]
    smaller = [row for row in summary["kernels"] if row["after"] < row["before"]]
    assert summary["kernels"][0]["kernel"] == "mlp/w3"
    assert summary["kernels"][0]["after"] == pytest.approx(2.0, abs=1e-4)
    assert len(smaller) == len(summary["kernels"])


def test_clamping_lowers_the_norms_with_gamma(out):
    found = arrays(out, "clamp-photo")
    ratios = [
        (x := found[f"norms {name}"]).max() / np.median(x)
        for name in ("not clamped", "γ = 6", "γ = 3")
    ]
    assert ratios[0] > ratios[1] > ratios[2]


def test_growth_ends_where_the_tokens_are(out, tokens):
    found = arrays(out, "growth-photo")
    nu = arrays(out, "forecast")["directions"][-1]
    sums = found["start"] + (found["attention"] + found["ffn"]).sum(axis=0)
    along = tokens[-1].astype(np.float64) @ nu
    sign = np.sign((along * sums).sum())
    # 24 float32 additions of up to 100
    np.testing.assert_allclose(sign * sums, along, rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(
        found["tokens"], arrays(out, "blocks-photo")["detected"][-1]
    )


def test_measured_direction_meets_the_theory_from_the_planted_block_on(out):
    found = arrays(out, "theory")
    assert (found["to_theory"][5:] < 15).all() and found["to_theory"][:4].min() > 60
    assert (found["to_random"] > 60).all()
    assert found["pairwise"].shape == (12, 0)  # one photograph


def test_second_run_reads_no_weights_and_writes_the_same_bytes(
    planted_run, capsys, monkeypatch
):
    def forbidden(self):
        raise AssertionError("the weights were read")

    folder, arguments = planted_run
    files = [
        x for x in (folder / "out").iterdir() if x.is_file() and x.suffix != ".npz"
    ]
    before = {x: x.read_bytes() for x in files}
    monkeypatch.setattr(Model, "params", property(forbidden))
    run(*arguments, "--figures=norms,forecast,clamp")
    computed, found = counts(capsys)
    assert computed == 0 and found == 7
    for path, content in before.items():
        if path.name != "report.html":  # with fewer figures
            assert path.read_bytes() == content, path.name


def test_another_threshold_computes_no_more_than_it(planted_run, capsys):
    _, arguments = planted_run
    run(*arguments, "--figures=clamp", "--gamma=6,4")
    lines = capsys.readouterr().err.splitlines()
    told = [x.split("] ")[1] for x in lines if x.startswith("[")]
    assert told == ["photo clamped at 4"]


@pytest.mark.parametrize(
    ("change", "computed"),
    [
        ({"mask_thr": 3.0}, set()),
        ({"min_outliers": 9}, set()),
        ({"window": 5}, {"panels"}),
        ({"blocks": (0, 1)}, {"panels"}),
        ({"gammas": (2.0, 1.5, 1.4)}, {"clamped"}),
        ({"seed": 1}, {"look"}),
        ({"num_probes": 10}, set()),  # there are none
        ({"image_size": 42}, {"look", "panels", "growth", "clamped", "seen"}),
        ({"method": "monte_carlo"}, {"directions", "look", "panels", "growth"}),
    ],
)
def test_another_option_computes_no_more_than_it_must(
    models, tmp_path, change, computed
):
    subject, other, registers = (
        Subject(name, convert.open_model(models[name]))
        for name in ("first", "second", "registers")
    )
    cache = Cache(tmp_path / "cache")

    def files(options, photo):
        study = Study([subject, other], registers, [photo], options, cache)
        return {
            cache.path(step): step.kind
            for step in figures.plan(study, list(figures.KINDS))
        }

    photo = Photo("a", Path("a.png"), np.zeros((56, 56, 3), np.uint8), "digest")
    before = files(options_of(image_size=56), photo)
    after = files(dataclasses.replace(options_of(image_size=56), **change), photo)
    assert {kind for path, kind in after.items() if path not in before} == computed
    another = files(options_of(image_size=56), photo._replace(digest="another"))
    of_photos = {kind for path, kind in another.items() if path not in before}
    assert of_photos == {"look", "panels", "growth", "clamped", "seen"}


# --- Small models: the machinery ------------------------------------------------------


def test_weights_alone_need_no_image(models, tmp_path, capsys):
    run(*small(tmp_path / "out", models, "--figures=forecast,spectra", "--report"))
    assert {x.stem for x in (tmp_path / "out").glob("*.png")} == {"forecast", "spectra"}
    told = capsys.readouterr()
    assert "as far as the weights tell" in told.out
    # Without a terminal, progress is plain lines.
    assert told.err.splitlines()[:2] == [
        "[1/2] model: forecast from the weights",
        "[2/2] model: spectra of kernels and block maps",
    ]
    assert "<h2>Figures</h2>" in (tmp_path / "out" / "report.html").read_text()


def test_another_photograph_of_the_same_name_is_computed(
    models, photos, tmp_path, capsys
):
    arguments = small(tmp_path / "out", models, photos, "--figures=norms")
    run(*arguments)
    assert counts(capsys) == (3, 0)
    before = arrays(tmp_path / "out", "norms")
    Image.new("RGB", (80, 60), "red").save(photos / "a.png")
    run(*arguments)
    assert counts(capsys) == (1, 2)
    assert (arrays(tmp_path / "out", "norms")["norms"] != before["norms"]).any()


@pytest.mark.parametrize("kept", [0, 10, 300, -1])
def test_kept_numbers_that_are_damaged_are_computed_again(tmp_path, kept):
    counted = []
    numbers = {"attn/v": np.arange(99.0), "verdict": np.array("in words")}

    def compute():
        counted.append(1)
        return numbers

    step = Step("a step", "look", {"photo": "x"}, compute)
    Cache(tmp_path)(step)
    Cache(tmp_path)(step)
    assert len(counted) == 1
    path = Cache(tmp_path).path(step)
    path.write_bytes(path.read_bytes()[:kept])
    for _ in range(2):
        found = Cache(tmp_path)(step)
        assert list(found) == list(numbers)
        np.testing.assert_array_equal(found["attn/v"], numbers["attn/v"])
        assert found["verdict"] == "in words"
    assert len(counted) == 2
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_step_that_fails_keeps_nothing(tmp_path):
    def fail():
        raise FloatingPointError("not finite")

    cache = Cache(tmp_path / "cache")
    with pytest.raises(FloatingPointError):
        cache(Step("a step", "look", {"photo": "x"}, fail))
    assert not any((tmp_path / "cache").iterdir())


def test_photographs_of_one_name_have_figures_and_unreadable_ones_are_named(
    models, photos, tmp_path, capsys
):
    (photos / "sub").mkdir()
    Image.new("RGB", (80, 60), "red").save(photos / "sub" / "A.png")
    (photos / "b.png").write_bytes(b"no image")
    run(*small(tmp_path / "out", models, photos, "--figures=angles"))
    names = {x.name for x in (tmp_path / "out").glob("*.png")}
    assert names == {"angles-a.png", "angles-A-2.png"}
    assert f"skipped, unreadable: {photos / 'b.png'}" in capsys.readouterr().err


def test_model_with_registers_is_shown_beside(models, photos, tmp_path):
    arguments = small(tmp_path / "out", models, photos / "a.png", "--figures=pca")
    run(*arguments, f"--registers={models['registers']}")
    found = arrays(tmp_path / "out", "pca-a")
    assert set(found) == {"photograph", "pca model", "pca with registers"}
    assert found["pca with registers"].shape == (4, 5, 3)


def test_pytorch_file_named_by_the_config_gives_the_numbers_of_the_checkpoint(tmp_path):
    config = dataclasses.replace(SMALL, embed_dim=64, num_heads=1, depth=1)
    params = random_params(config, 0)
    paths = [tmp_path / "ours", tmp_path / "theirs.safetensors"]
    checkpoint.save(paths[0], config, params)
    writing.write_state_dict(paths[1], convert.to_torch(config, params))
    one, two = (convert.open_model(path) for path in paths)
    assert two.known_digest is None and one.digest == two.digest
    for path in paths:
        file = f"--config.checkpoint={path}"
        out = f"--out={tmp_path / path.stem}.out"
        run("--config=tiny.py", file, out, "--figures=forecast")
    ours, theirs = (arrays(tmp_path / f"{x.stem}.out", "forecast") for x in paths)
    np.testing.assert_array_equal(ours["gaps model"], theirs["gaps model"])


def test_kept_numbers_are_those_of_the_model_s_own_values(models, photos, tmp_path):
    """The digest is that of the weights, which the statistics are no part of."""
    model = convert.open_model(models["first"])
    own = dataclasses.replace(model.config, norm_epsilon=1e-3)
    read = list(read_photos([photos / "a.png"], 56, 14))
    paths = set()
    for config in (model.config, own):
        subject = Subject("model", dataclasses.replace(model, config=config))
        cache = Cache(tmp_path / "cache")
        study = Study([subject], None, read, options_of(), cache)
        paths.add(cache.path(study.look(subject, read[0])))
    assert len(paths) == 2


def test_config_decides_size_detection_and_resampling(models, photos, tmp_path):
    class Args:
        config, checkpoint = "giant.py", [str(models["first"])]
        compare = registers = None
        gamma, blocks = "2.0,2", "1,0"

    options, antialias, path = analyze._settings(Args, ["--config.mask_thr=5"])
    assert options == options_of(mask_thr=5.0, gammas=(2.0,), blocks=(0, 1))
    assert antialias is True and path == Args.checkpoint
    Args.config = None
    options, antialias, _ = analyze._settings(Args, [])
    assert options == options_of(gammas=(2.0,), blocks=(0, 1)) and antialias is None


def test_photographs_get_the_size_of_the_model_s_grid(models, photos, tmp_path):
    config = vit.ViTConfig(
        32, 2, 2, "swiglu", 64, 16, 8, statistics=((0.7, 0.6, 0.7), (0.2, 0.2, 0.2))
    )
    checkpoint.save(tmp_path / "model", config, random_params(config, 0))
    out = tmp_path / "out"
    arguments = [photos / "a.png", f"--checkpoint={tmp_path / 'model'}", f"--out={out}"]
    run(*arguments, "--figures=forecast,norms", "--report")
    told = json.loads((out / "analysis.json").read_text())
    assert told["options"]["image_size"] == 64  # patches of 16 pixels, 8 registers
    assert told["models"][0]["photographs"]["a"]["patches"] == 4 * 5
    assert (out / "report.html").exists()


def test_a_survey_has_a_line_for_each_model(models, tmp_path, capsys):
    made = planted.planted_model(0)
    checkpoint.save(tmp_path / "planted", made.config, made.params)
    paths = [models["first"], tmp_path / "planted", models["registers"]]
    arguments = [f"--checkpoint={path}" for path in paths] + ["--figures=forecast"]
    run(*arguments, f"--out={tmp_path / 'out'}")
    assert "| planted | " in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "survey.json").read_text())
    assert [row["name"] for row in rows] == ["first", "planted", "registers"]
    assert [row["block"] for row in rows] == [None, made.block, None]
    assert rows[1]["verdict"] == "singular defect"
    assert rows[0]["verdict"] == "no singular defect" and rows[2]["registers"] == 4
    # The named channels are the largest of the direction in the figure's numbers.
    nu = np.abs(arrays(tmp_path / "out" / "planted", "forecast")["directions"])
    channels = [channel for channel, _ in rows[1]["channels"]]
    assert channels == np.argsort(-nu[made.block])[:3].tolist()
    table = (tmp_path / "out" / "survey.md").read_text().splitlines()
    assert len(table) == 2 + len(paths)
    assert all(line.count("|") == table[0].count("|") for line in table)
    line = refusal(capsys, *arguments, f"--compare={models['second']}")
    assert "3 times --checkpoint" in line


@pytest.mark.parametrize(
    ("depth", "blocks"), [(40, [9, 19, 29, 39]), (12, [2, 5, 8, 11]), (2, [0, 1])]
)
def test_default_blocks_are_the_papers_at_the_same_fractions(depth, blocks):
    assert list(options_of().chosen_blocks(depth)) == blocks


@pytest.mark.slow
def test_probes_of_the_authors_give_other_directions(models, photos, tmp_path):
    arguments = small(tmp_path / "out", models, photos / "a.png", "--figures=angles")
    run(*arguments)
    analytic = arrays(tmp_path / "out", "angles-a")["angles"]
    arguments += ["--config.method=monte_carlo", "--config.num_probes=2000"]
    run(*arguments)
    probed = arrays(tmp_path / "out", "angles-a")["angles"]
    assert 0 < np.abs(probed - analytic).max() < 30


def test_ordinary_tokens_along_a_direction_are_no_defect(models, photos, tmp_path):
    """Two of 1,369 normal cosines pass for outliers: their norms tell them apart."""
    photo = photos / "a.png"
    run(
        *small(tmp_path / "out", models, photo, "--figures=norms"),
        "--config.mask_thr=1",
    )
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())["models"][0]
    one = found["photographs"]["a"]
    assert one["detected"] > 0 and one["defective"] == 0 and one["block"] == -1
    assert found["overall"]["auc"] is None  # no token of large norm


def test_tokens_too_many_to_be_outliers_are_defective_all_the_same(monkeypatch):
    """Of a quarter of the tokens, none is four standard deviations off the mean."""
    angles = np.full((2, 10, 10), 85.0)
    norms = np.ones((2, 10, 10))
    angles[1, :5, :5], norms[1, :5, :5] = 5.0, 50.0
    norms[1, 9, 9] = 50.0  # large, but along nothing
    look = {"angles": angles, "norms": norms, "cosines": np.cos(np.radians(angles))}
    study = Study([], None, [], options_of(), lambda step: look)
    monkeypatch.setattr(study, "detected", lambda look: np.zeros((2, 10, 10), bool))
    monkeypatch.setattr(study, "look", lambda subject, photo: None)
    photo = Photo("a", Path("a.png"), None, "")
    found = verdict._of_photo(study, None, photo)
    assert (found["block"], found["last_block"], found["defective"]) == (1, 1, 25)
    assert (found["detected"], found["large"]) == (0, 26)


def test_every_figure_of_the_table_is_drawn_by_a_function():
    functions = {**vars(token_figures), **vars(weight_figures)}
    drawn = [name for name in functions if name.startswith("draw_")]
    assert {f"draw_{name}" for name in figures.KINDS} == set(drawn)


def test_table_of_figures_says_of_each_what_it_needs():
    needs: dict[str, set[str]] = {}
    for name, kind in figures.KINDS.items():
        assert all(kind), name
        needs.setdefault(kind.needs, set()).add(name)
    assert needs == {
        "photograph": OF_A_PHOTO,
        "photographs": {"norms", "theory"},
        "weights": {"forecast", "spectra", "eigenvalues"},
        "compare": {"changes"},
    }
    assert set(figures.KINDS) == OF_A_PHOTO | OF_ALL


def test_help_is_shown_without_loading_jax():
    shown, modules = loaded("experiments.analyze", main=["--help"])
    assert not {"jax", "matplotlib"} & modules
    assert "--checkpoint=vitg14 --compare=run/repaired" in shown


# --- Mistakes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--figures=norm"], "no figure 'norm': choose of all, pca, norms"),
        (["--figures=norms"], "the figure norms needs an image"),
        (["--figures=changes"], "the figure changes needs --compare=DIR"),
        ([], "no images: give files or folders, or draw what the weights alone show by "
             "--figures=forecast,spectra,eigenvalues"),
        (["--figures=forecast", "--gamma=0"], "--gamma must be above 0, got 0"),
        (["--figures=forecast", "--gamma=1,-2"], "--gamma must be above 0, got -2"),
        (["--figures=forecast", "--gamma=x"], "--gamma must be numbers separated"),
        (["--figures=spectra", "--blocks=1,3"], "there is no block 3: the model has"),
        (["--figures=spectra", "--blocks=1.5"], "--blocks must be whole numbers"),
        (["--figures=forecast", "--config.widow=3"], "did you mean window"),
        (["--figures=forecast", "--config.window=4"], "window must be 3 or 5"),
        (["--figures=forecast", "--config.method=x"], "method must be one of"),
        (["nowhere.png"], "no such image or folder: nowhere.png"),
    ],
)  # fmt: skip
def test_mistake_gets_one_line(models, tmp_path, capsys, arguments, told):
    line = refusal(capsys, *small(tmp_path / "out", models, *arguments))
    assert told in line
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_go_together_get_one_line(models, photos, tmp_path, capsys):
    arguments = small(tmp_path / "out", models, photos, "--figures=norms")
    line = refusal(capsys, *arguments, f"--compare={models['deep']}")
    assert "have different architectures: depth (3 and 4)" in line
    line = refusal(capsys, *arguments, f"--registers={models['fine']}")
    assert "patches of different sizes: 14 and 7" in line
    line = refusal(capsys, *arguments, f"--compare={tmp_path / 'nowhere'}")
    assert f"{tmp_path / 'nowhere'}" in line


def test_missing_checkpoint_images_and_sizes_get_one_line(
    models, photos, tmp_path, capsys
):
    assert "--checkpoint=DIR" in refusal(capsys, photos)
    empty = tmp_path / "empty"
    empty.mkdir()
    line = refusal(capsys, *small(tmp_path / "out", models, empty))
    assert str(empty) in line
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of 1 images can be read"):
        run(*small(tmp_path / "out", models, broken))
    line = refusal(capsys, *small("x", models, photos), "--config.image_size=57")
    assert "such as 56 or 70" in line


def test_folder_of_something_else_is_left_alone(models, tmp_path, capsys):
    arguments = ["--figures=forecast"]
    (tmp_path / "notes.txt").write_text("mine")
    line = refusal(capsys, *arguments, *small(tmp_path, models))
    assert "holds something else: choose another --out or add --overwrite" in line
    out = tmp_path / "out"
    out.mkdir()  # empty: taken
    run(*arguments, *small(out, models))
    before = (out / "forecast.png").read_bytes()
    line = refusal(capsys, *arguments, *small(out, models, model="second"))
    assert "holds the analysis of another model" in line
    assert (out / "forecast.png").read_bytes() == before
    run(*arguments, *small(out, models, "--overwrite", model="second"))
    assert (out / "forecast.png").read_bytes() != before


def test_model_of_infinite_tokens_is_named_with_its_photograph(
    photos, tmp_path, capsys
):
    params = random_params(SMALL, 0)
    params["patch_embed"]["kernel"] = np.full_like(
        params["patch_embed"]["kernel"], 3e38
    )
    checkpoint.save(tmp_path / "model", SMALL, params)
    arguments = small(tmp_path / "out", {"first": tmp_path / "model"}, photos / "a.png")
    with pytest.raises(FloatingPointError, match=r"a\.png: .* not finite"):
        run(*arguments, "--figures=norms")


def test_detection_of_a_study_is_that_of_analysis():
    """The kept logits are enough to detect again with another threshold."""
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(2, 9, 8, 16)).astype(np.float32)
    nu = rng.normal(size=(2, 16)).astype(np.float32)
    logits = [detect(x, v).logits for x, v in zip(tokens, nu, strict=True)]
    for mask_thr in (1.5, 2.5):
        study = Study([], None, [], options_of(mask_thr=mask_thr, window=5), None)
        found = study.detected({"logits": np.stack(logits)})
        for mask, x, v in zip(found, tokens, nu, strict=True):
            want = detect(x, v, mask_thr=mask_thr, window=5).mask
            np.testing.assert_array_equal(mask, want)
