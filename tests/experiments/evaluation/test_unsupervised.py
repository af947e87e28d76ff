"""From trained codes to matched clusters, with a tiny model and made scenes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scene_trees
from evaluations import command, results, tiny_model
from experiments import evaluate
from experiments.configs import evals
from experiments.evaluation import clusterings, matching, segmenter, unsupervised
from experiments.evaluation.job import Forward, Job
from experiments.evaluation.progress import Progress
from experiments.run.stopping import Stopping
from samples import error_of
from sinder_jax import model as models
from sinder_jax import vit
from sinder_jax.evals import bilinear, crf, probes

TINY = vit.ViTConfig(32, 2, 1, "mlp", img_size=28)
# % mIoU on the streets: clusters as large as the classes, but anywhere, have 7.2.
CHANCE = 8.5
SIZES = {"train_size": 28, "test_size": 42, "crops": "none"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return scene_trees.own(tmp_path_factory.mktemp("data"), train=3, val=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tiny_model(tmp_path_factory.mktemp("models"), TINY)
    return models.open_checkpoint(path)


def settings(root, **changes):
    config = evals.unsupervised()
    config.protocol, config.data = "stego_cityscapes", str(root)
    config.update({**SIZES, "batch_size": 2, **changes})
    return config


@pytest.fixture
def job(root, model, tmp_path):
    return made_job(root, model, tmp_path)


def made_job(root, model, folder, **changes):
    data = unsupervised.prepare(settings(root, **changes), [model], SIZES, {})
    with Progress() as progress:
        return Job(
            data.config, model, data, folder, folder / "cache", progress, Stopping()
        )


def first_channels(params, tokens):
    return tokens[..., :5] * params


def a_segmenter(classes=3):
    rng = np.random.default_rng(0)
    kernel, bias, centroids = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((5, classes), (classes,), (classes, 5))
    )
    linear = probes.Linear(jnp.asarray(kernel), jnp.asarray(bias))
    return segmenter.Segmenter(first_channels, np.float32(2), centroids, linear, 2.0)


def views(job):
    return [unsupervised.tokens(job, name) for name in ("val", "val mirrored")]


def labels(job):
    config = job.data.config
    return unsupervised.masks_of(job.data.found.val, config, config.test_size)


def test_a_remedied_model_counts_as_its_checkpoint_and_runs_its_own_way(
    root, model, tmp_path
):
    def ones(config, params, pixels, blocks):
        tokens = 1 + config.num_register_tokens + (pixels.shape[1] // 14) ** 2
        return [jnp.ones((len(pixels), tokens, config.embed_dim)) for _ in blocks]

    plain = made_job(root, model, tmp_path, backbone="sinder")
    other = models.Model.of(model.config, jax.tree.map(np.copy, model.params))
    after = plain._replace(model=other, origin=model, forward=Forward(ones, ("ones",)))
    assert unsupervised.backbone_of(after) == "sinder"
    assert np.abs(unsupervised.tokens(plain, "val")).max() > 0.1
    # What a LayerNorm makes of a token whose channels are all the same.
    bias = np.asarray(model.params["norm"]["bias"])
    found = unsupervised.tokens(after, "val")
    np.testing.assert_array_equal(found, np.broadcast_to(bias, found.shape))


# --- Predictions ----------------------------------------------------------------------


def test_predictions_are_those_of_mean_codes_after_the_crf(job):
    ours = a_segmenter()
    # Random tokens: those of this tiny model hardly change when an image is mirrored.
    both = list(np.random.default_rng(1).normal(size=(2, 3, 3, 3, 32)).astype("f4"))
    (found,) = segmenter.predictions(job, ours, both, [1])
    codes = (both[0][1, ..., :5] + both[1][1, :, ::-1, :5]) * 1.0
    dense = bilinear.resize(codes, (42, 42))
    kernel, bias = ours.linear
    raw = [
        jax.nn.softmax(2 * probes.cosines(dense, jnp.asarray(ours.centroids))),
        jax.nn.softmax(dense @ kernel + bias[None, None]),
    ]
    for kind in (0, 1):
        assert np.array_equal(found[1, kind], np.argmax(raw[kind], -1))
        pixels = unsupervised._square(
            job.data.found.val[1].read(), size=42, squash=False, mirrored=False
        )
        refined = crf.mean_field(raw[kind], pixels)
        assert np.mean(found[0, kind] == np.argmax(refined, -1)) > 0.999


def test_counts_of_a_start_after_a_kill(job, monkeypatch):
    ours, both, masks = a_segmenter(), views(job), labels(job)
    found = segmenter.counts(job, "seed0", ours, both, masks)
    assert list(found) == ["cluster", "linear", "cluster_raw", "linear_raw"]
    assert found["cluster"].shape == (3, 3, 3)
    assert found["cluster"].sum() == (masks < 255).sum()
    calls = []
    monkeypatch.setattr(
        segmenter,
        "predictions",
        lambda *args, of=segmenter.predictions: calls.append(args) or of(*args),
    )
    again = segmenter.counts(job, "seed0", ours, both, masks)
    assert not calls
    for name, each in found.items():
        assert np.array_equal(again[name], each)
    other = ours._replace(params=np.float32(-2))
    moved = segmenter.counts(job, "seed0", other, both, masks)
    assert calls and not np.array_equal(moved["cluster"], found["cluster"])


def test_quick_counts_are_those_without_a_crf(job):
    ours, both, masks = a_segmenter(), views(job), labels(job)
    quick = segmenter.quick_counts(job, ours, both[:1], masks)
    same = [both[0], both[0][:, :, ::-1]]
    whole = segmenter.counts(job, "same", ours, same, masks)
    drawn = np.random.default_rng(1).normal(size=both[1].shape).astype(np.float32)
    mirrored = segmenter.quick_counts(job, ours, [both[0], drawn], masks)
    kept = segmenter.counts(job, "both", ours, [both[0], drawn], masks)
    for name in ("cluster_raw", "linear_raw"):
        assert np.array_equal(quick[name], whole[name])
        assert np.array_equal(mirrored[name], kept[name])
        assert not np.array_equal(mirrored[name], quick[name])


def test_without_a_crf(root, model, tmp_path):
    job = made_job(root, model, tmp_path, crf=False)
    found = segmenter.counts(job, "seed0", a_segmenter(), views(job), labels(job))
    assert list(found) == ["cluster", "linear"]


def test_five_crops_are_trained_on_and_mirrored_images_are_mirrored(
    root, model, tmp_path
):
    job = made_job(root, model, tmp_path, crops="five")
    train = unsupervised.tokens(job, "train")
    assert train.shape == (15, 2, 2, 32)
    plain, mirrored = views(job)
    assert plain.shape == (3, 3, 3, 32) and not np.array_equal(plain, mirrored)


# --- Baselines, result ----------------------------------------------------------------


def test_kmeans_finds_what_is_apart(job):
    """Grays tell the classes of these scenes, so k-means of colors is right."""
    train, masks = unsupervised.tokens(job, "train"), labels(job)
    found = clusterings.counts(job, 0, train, views(job), masks)
    clusters = {"cluster": found["kmeans_tokens"], **found}
    total = np.stack([each.sum(0) for each in clusters.values()])
    scores = matching.score(tuple(clusters), total, 3)
    assert scores["kmeans_colors_acc"] > 95
    again = clusterings.counts(job, 0, train, views(job), masks)
    assert all(np.array_equal(again[name], found[name]) for name in found)


def test_result_tells_seeds_classes_and_masks(root, model, tmp_path):
    job = made_job(root, model, tmp_path, seeds=2)
    ours, both, masks = a_segmenter(), views(job), labels(job)
    seeds = [
        segmenter.counts(job, f"seed{i}", ours._replace(params=scale), both, masks)
        for i, scale in enumerate(np.float32([2, -2]))
    ]
    shown = segmenter.predictions(job, ours, both, [0, 1])
    found = matching.result(job, seeds, {"steps": 0}, shown)
    assert set(found.headline) <= set(found.metrics())
    assert found.evaluated["masks"] == "42 x 42 pixels, nearest neighbor"
    assert found.evaluated["CRF"] == "10 iterations"
    each = [scores["cluster_miou"] for scores in found.details["by_seed"]]
    assert found.metrics()["cluster_miou"] == pytest.approx(np.mean(each))
    assert found.evaluated["cluster_miou of seeds"] == f"{each[0]:.1f}, {each[1]:.1f}"
    assert list(found.details["iou"]) == ["0", "1", "2"]
    assert list(found.figures) == ["scenes"]


# --- Refusals -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"crops": "six"},
            "config.crops: got 'six', expected one of none, five, super",
        ),
        ({"train_size": 30}, "config.train_size: got 30 pixels, expected a multiple"),
        ({"seeds": 0}, "config.seeds: got 0, expected at least 1"),
        ({"pictures": -1}, "config.pictures: got -1, expected at least 0"),
    ],
)
def test_refused_settings(root, model, changes, said):
    config = settings(root, **changes)
    assert said in error_of(unsupervised.prepare, config, [model], SIZES, {})


def test_another_published_data_set_is_told(model, tmp_path, capsys):
    tiles = scene_trees.potsdam(tmp_path / "potsdam", train=2, val=2)
    for protocol, told in (("stego_cityscapes", True), ("stego_potsdam3", False)):
        config = settings(tiles, protocol=protocol)
        unsupervised.prepare(config, [model], SIZES, {})
        said = capsys.readouterr().err
        assert (f"{tiles} holds Potsdam-3" in said) == told, said


# --- The trained model ----------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize(
    "protocol, changes",
    [
        ("stego_cityscapes", {"backbone": "dinov2", "iterations": 100}),
        ("cause_cityscapes", {"front_door_epochs": 2}),
    ],
)
def test_tokens_in_a_random_order_tell_nothing(
    protocol, changes, tmp_path, monkeypatch
):
    """The control of all that is reported: with real tokens, more is found."""
    from real import backbone

    def scores(name):
        config = {**changes, "data": "sample:streets", "cache": tmp_path / "tokens"}
        config |= {"crf": "false", "resamples": 0, "pictures": 0}
        line = command(protocol, [backbone()], tmp_path / name, **config)
        code = evaluate.main(line)
        (row,) = results(tmp_path / name)
        assert code == 0
        return row["metrics"]

    found = scores("found")
    tokens = unsupervised.tokens

    def shuffled(job, split):
        kept = np.array(tokens(job, split))
        np.random.default_rng(0).shuffle(kept.reshape(-1, kept.shape[-1]))
        return kept

    monkeypatch.setattr(unsupervised, "tokens", shuffled)
    lost = scores("lost")
    assert lost["cluster_miou"] < CHANCE < found["cluster_miou"] - 5
    assert lost["linear_miou"] < CHANCE < found["linear_miou"] - 20
