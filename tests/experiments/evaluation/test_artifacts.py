"""The meter of remedies from its command line, on the tiny planted model."""

import json

import pytest

import photos
import planted_models
from experiments import evaluate
from experiments.evaluation import artifacts, images, remedied
from sinder_jax import cli
from sinder_jax.evals import features

SMALL = [
    *("--config.image_size=224", "--config.num_images=4", "--config.batch_size=1"),
    *("--config.remedy_images=2", "--config.resamples=50"),
]
REMEDIES = "--config.remedies=ablation,test-time registers"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A planted model, its truth, and seven photographs."""
    root = tmp_path_factory.mktemp("meter")
    planted_models.save(root)
    for i in range(7):
        photos.save_noise(root / f"data/{i}.png", 260, 240, seed=i)
    return root


def run(places, out, *arguments, checkpoints=("planted",)):
    named = [f"--checkpoint={places / name}" for name in checkpoints]
    given = ["--config=artifacts.py", f"--config.data={places / 'data'}"]
    return evaluate.main([*given, f"--workdir={out}", *named, *SMALL, *arguments])


def results(out):
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def measured(places, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    truth = f"--config.truth={places / 'truth'}"
    both = ("planted", "truth")
    assert run(places, out, REMEDIES, truth, checkpoints=both) == 0
    return out


def test_remedies_mend_and_the_model_itself_does_not(measured, places):
    rows = results(measured)
    start = str(places / "planted")
    assert [row["checkpoint"] for row in rows] == [
        start,
        f"{start} + ablation",
        f"{start} + test-time registers",
        str(places / "truth"),
    ]
    found = [row["metrics"] for row in rows]
    assert found[0]["mending"] == 0 and abs(found[0]["damage"]) < 1e-5
    assert found[0]["defective by norm"] > 0 and found[0]["norm ratio"] > 3
    for mended in found[1:]:
        assert mended["mending"] == 1 and mended["defective by norm"] == 0
        assert mended["norm ratio"] < found[0]["norm ratio"] / 2
        assert mended["tail"] < found[0]["tail"]
        assert mended["truth, thrown"] > 0.9 > found[0]["truth, thrown"]
        assert 0 < mended["damage"] < 0.05
    assert found[3]["truth, sound"] == pytest.approx(1, abs=1e-5)
    assert found[3]["truth, thrown"] == pytest.approx(1, abs=1e-5)


def test_every_number_has_an_interval_and_a_remedy_its_cost(measured):
    rows = results(measured)
    for row in rows:
        assert set(row["intervals"]) == set(row["metrics"])
        for name, (low, high) in row["intervals"].items():
            assert low - 1e-6 <= row["metrics"][name] <= high + 1e-6
    assert "remedy" not in rows[0] and rows[1]["remedy"] == "ablation"
    assert rows[1]["evaluated"]["photographs it read"] == 0
    assert rows[2]["evaluated"]["photographs it read"] == 2
    assert rows[2]["evaluated"]["seconds of the remedy"] > 0
    table = (measured / "results.md").read_text()
    assert "| damage |" in table and "is better" not in table
    assert "\nIn brackets: 95 % intervals" in table
    assert (measured / "results.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_numbers(places, tmp_path, monkeypatch):
    out, write, begun = tmp_path / "out", images._write, []
    monkeypatch.setattr(images, "LEAST_CHUNK", 2)

    def write_some(*arguments):
        if len(begun) == 3:
            raise KeyboardInterrupt
        begun.append(arguments)
        write(*arguments)

    monkeypatch.setattr(images, "_write", write_some)
    with pytest.raises(KeyboardInterrupt):
        run(places, out, REMEDIES)
    monkeypatch.setattr(images, "_write", write)
    run(places, out, REMEDIES)
    after = results(out)
    monkeypatch.setattr(features, "make_extract", None)  # calling it would raise
    run(places, out, REMEDIES)
    assert results(out) == after
    monkeypatch.undo()
    run(places, tmp_path / "whole", REMEDIES)
    whole = results(tmp_path / "whole")
    assert [x["metrics"] for x in whole] == [x["metrics"] for x in after]
    assert [x["intervals"] for x in whole] == [x["intervals"] for x in after]


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("--config.image_size=28", "at least three patches, 42"),
        ("--config.num_images=0", "config.num_images: got 0"),
        ("--config.mask_thr=0", "mask_thr"),
    ],
)
def test_a_wrong_setting_is_told_in_one_line(places, tmp_path, capsys, argument, told):
    assert cli.run(lambda: run(places, tmp_path / "out", argument)) == cli.USER_ERROR
    lines = capsys.readouterr().err.splitlines()
    assert [told in x for x in lines if x.startswith("error: ")] == [True]
    assert not (tmp_path / "out").exists()


def test_photographs_that_remedies_read_are_not_measured(places):
    config = evaluate._config("artifacts.py", SMALL)
    config.data = str(places / "data")
    config.remedies, config.num_images = "ablation", 7
    assert len(artifacts.chosen(config)) == 7
    config.remedies = "test-time registers"
    read = {x.name for x in remedied.prepare(config).photographs}
    measured = {x.name for x in artifacts.chosen(config)}
    assert len(read) == 2 and len(measured) == 5 and not read & measured
    config.remedy_images = 7
    with pytest.raises(ValueError, match="read 7 photographs, and .* has no other"):
        artifacts.chosen(config)
    config.remedy_data = f"{places}/./data"  # the same in another spelling
    with pytest.raises(ValueError, match="read 7 photographs, and .* has no other"):
        artifacts.chosen(config)
    config.remedy_data = "sample"
    assert len(artifacts.chosen(config)) == 7
