import pytest

from experiments import config as config_files
from experiments.evaluation import protocols, schedule
from samples import error_of


def config_of(name, **changes):
    config = config_files.load(
        f"{name}.py",
        config_files.CONFIGS / "evals",
        lambda c: f"{protocols.check_name(c.protocol)}.py",
    )
    config.update(changes)
    return config


def settled(name, **changes):
    return schedule.settle(config_of(name, **changes))


def test_the_linear_protocol_is_the_published_one():
    found = settled("segmentation_linear", data="/data/ade")
    assert found[:7] == (512, 341, False, (0.5, 2.0), (1.0,), (False,), 16)
    assert found.options == schedule.SegmentationOptions()
    assert config_of("segmentation_linear").blocks == 1


def test_the_multiscale_protocol_is_the_published_one():
    found = settled("segmentation_multiscale", data="/data/ade")
    ratios = (1.0, 1.32, 1.73, 2.28, 3.0)
    assert found[:7] == (640, 320, False, (1.0, 3.0), ratios, (False, True), 16)
    assert found.options == schedule.SegmentationOptions()
    assert config_of("segmentation_multiscale").blocks == 4


def test_mosaics_have_a_short_schedule():
    found = settled("segmentation_linear", data="sample:mosaics")
    assert (found.crop, found.images_per_step) == (160, 8)
    assert (found.options.total_steps, found.options.warmup_steps) == (60, 2)
    given = settled("segmentation_linear", data="sample:mosaics", iterations=7, crop=64)
    assert (given.options.total_steps, given.crop, given.stride) == (7, 64, 42)
    assert settled("segmentation_multiscale", data="sample:mosaics").stride == 80


def test_settings_of_features_that_are_not_kept_are_told(capsys):
    settled("segmentation_linear", data="x")
    assert not capsys.readouterr().err
    settled("segmentation_linear", data="x", cache="a", cache_dtype="float16")
    told = " ".join(capsys.readouterr().err.split())
    assert "config.cache=a and config.cache_dtype=float16 without effect" in told


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"crop": -1}, "config.crop: got -1"),
        ({"crop": 5_000}, "config.crop: got 5000, expected 1 to 4096"),
        ({"stride": 600}, "config.stride: got 600, expected 1 to 512"),
        ({"iterations": -2}, "config.iterations: got -2"),
        ({"images_per_step": -2}, "config.images_per_step: got -2"),
        ({"lr": -1.0}, "config.lr: got -1.0, expected above 0"),
        ({"weight_decay": -1.0}, "config.weight_decay: got -1.0"),
        ({"num_classes": -3}, "config.num_classes: got -3, expected 0, or 2 to 255"),
        ({"seed": -1}, "config.seed: got -1"),
        ({"seed": 2**32}, "config.seed: got 4294967296, expected at most 4294967295"),
        ({"matmul_precision": "foo"}, "config.matmul_precision: got 'foo'"),
        ({"cache_dtype": "foo"}, "config.cache_dtype: got 'foo'"),
        ({"cache": "gs://a/b"}, "config.cache: got gs://a/b"),
        ({"ratios": "1.0;2"}, "config.ratios: got '1.0;2'"),
        ({"ratios": "0"}, "config.ratios"),
        ({"least_ratio": 3.0}, "config.least_ratio: got 3.0"),
        ({"greatest_ratio": 30.0}, "config.greatest_ratio: got 30.0"),
        ({"mode": "slid"}, "config.mode: got 'slid', expected slide or whole"),
        ({"seeds": 0}, "config.seeds: got 0"),
        ({"batch_size": 0}, "config.batch_size: got 0"),
        ({"resamples": -1}, "config.resamples: got -1"),
        ({"pictures": -1}, "config.pictures: got -1"),
    ],
)
def test_numbers_out_of_range_are_refused(changes, said):
    assert said in error_of(settled, "segmentation_linear", data="x", **changes)
