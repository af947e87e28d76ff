"""k-NN from its command line: results, comparison, cache, resume, wrong inputs."""

import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from evaluations import results
from experiments import evaluate, repair
from experiments.evaluation import images
from samples import error_of, random_params
from sinder_jax import checkpoint, cli, model, vit
from sinder_jax.evals import features
from small_runs import started

CONFIG = vit.ViTConfig(32, 2, 1, "mlp", img_size=28, patch_size=14)
SMALL = ["--config.resize=28", "--config.image_size=28", "--config.ks=1,3"]
CLASSES = ("dark", "light", "red")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("first", "second")):
        params = random_params(CONFIG, seed)
        params["patch_embed"]["kernel"] *= 0.05  # so that pixels do not drown the rest
        params["norm"]["scale"] = np.ones_like(params["norm"]["scale"])
        checkpoint.save(folder / name, CONFIG, params)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three classes of noise around a color, 10 photographs each to train, 4 to val."""
    root = tmp_path_factory.mktemp("data")
    colors = {"dark": (40, 40, 40), "light": (200, 200, 200), "red": (220, 30, 30)}
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 4)):
        for name, color in colors.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(-30, 30, (30, 40, 3)) + color
                pixels = noise.clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def run(out, data, *checkpoints, arguments=SMALL):
    named = [f"--checkpoint={each}" for each in checkpoints]
    given = ["--config=knn.py", f"--workdir={out}", f"--config.data={data}"]
    return evaluate.main([*given, *named, *arguments])


def cached(out):
    return sorted((out / "features").glob("*/rows.bin"))


def failure(capsys, *arguments, **options):
    """The one line on stderr that a wrong command ends with."""
    code = cli.run(lambda: run(*arguments, **options))
    assert code == cli.USER_ERROR
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    return line.removeprefix("error: ")


def test_two_models_are_compared(models, data, tmp_path, capsys):
    paths = [models / "first", models / "second"]
    assert run(tmp_path / "out", data, *paths) == 0
    rows = results(tmp_path / "out")
    assert [row["checkpoint"] for row in rows] == list(map(str, paths))
    digests = [model.open_checkpoint(path).digest for path in paths]
    assert [row["digest"] for row in rows] == digests
    for row in rows:
        assert row["protocol"] == "knn"
        found = row["metrics"]
        assert set(found) == {
            "top1",
            "top5",
            *(f"top{n}_k{k}" for n in (1, 5) for k in (1, 3)),
        }
        assert found["top1"] == max(found["top1_k1"], found["top1_k3"])
        assert found["top1"] > 70 and found["top5"] == 100  # percent; three classes
        assert row["evaluated"]["images"] == 12
        low, high = row["intervals"]["top1"]
        assert low <= found["top1"] <= high
    difference = rows[1]["metrics"]["top1"] - rows[0]["metrics"]["top1"]
    assert rows[1]["differences"]["top1"] == pytest.approx(difference)
    assert rows[0]["differences"] == {}
    output = capsys.readouterr().out
    assert f"{paths[0]}: top1 {rows[0]['metrics']['top1']:.2f} %" in output
    assert "images: 12" in output
    table = (tmp_path / "out/results.md").read_text()
    assert f"minus {paths[0]}" in table and "95 % intervals" in table
    assert (tmp_path / "out/results.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_computes_no_feature(models, data, tmp_path, monkeypatch):
    run(tmp_path / "out", data, models / "first")
    before = results(tmp_path / "out")
    monkeypatch.setattr(features, "make_extract", None)  # calling it would raise
    run(tmp_path / "out", data, models / "first")
    assert results(tmp_path / "out") == before


def test_a_killed_pass_is_resumed_to_the_same_bits(models, data, tmp_path, monkeypatch):
    given = [*SMALL, "--config.batch_size=4"]
    run(tmp_path / "whole", data, models / "first", arguments=given)

    monkeypatch.setattr(images, "LEAST_CHUNK", 8)
    write, written = images._write, []

    def write_two(*arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(arguments)
        write(*arguments)

    monkeypatch.setattr(images, "_write", write_two)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", data, models / "first", arguments=given)
    assert len(cached(tmp_path / "killed")) == 1
    monkeypatch.setattr(images, "_write", write)
    run(tmp_path / "killed", data, models / "first", arguments=given)
    for one, other in zip(
        *map(cached, (tmp_path / "whole", tmp_path / "killed")), strict=True
    ):
        assert one.parent.name == other.parent.name
        assert one.read_bytes() == other.read_bytes()
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


def test_a_flipped_bit_is_noticed_and_mended(models, data, tmp_path, capsys):
    run(tmp_path / "out", data, models / "first")
    before, kept = results(tmp_path / "out"), {}
    for file in cached(tmp_path / "out"):
        kept[file] = file.read_bytes()
        file.write_bytes(bytes([kept[file][0] ^ 64]) + kept[file][1:])
    run(tmp_path / "out", data, models / "first")
    assert "1 chunks of features are damaged, and computed again" in (
        " ".join(capsys.readouterr().err.split())
    )
    assert results(tmp_path / "out") == before
    assert all(file.read_bytes() == content for file, content in kept.items())


def test_float16_says_how_far_features_move(models, data, tmp_path, capsys):
    given = [*SMALL, "--config.cache_dtype=float16"]
    run(tmp_path / "out", data, models / "first", arguments=given)
    assert "as float16 each is moved by at most" in capsys.readouterr().err
    sizes = [file.stat().st_size for file in cached(tmp_path / "out")]
    assert sorted(sizes) == [12 * 32 * 2, 30 * 32 * 2]


def test_features_of_another_model_in_the_cache_are_refused(
    models, data, tmp_path, capsys
):
    run(tmp_path / "out", data, models / "first")
    run(tmp_path / "other", data, models / "second")
    by_size = [
        sorted(cached(tmp_path / name), key=lambda file: file.stat().st_size)
        for name in ("out", "other")
    ]
    for theirs, ours in zip(*by_size, strict=True):
        for name in ("header.json", "chunks.jsonl", "rows.bin"):
            os.replace(theirs.with_name(name), ours.with_name(name))
    message = failure(capsys, tmp_path / "other", data, models / "second")
    assert "holds the features of another model: remove it" in message


def test_photographs_that_changed_are_read_again(models, data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data")
    run(tmp_path / "out", copy, models / "first")
    Image.new("RGB", (30, 30)).save(copy / "val/red/0.png")
    run(tmp_path / "out", copy, models / "first")
    assert len(cached(tmp_path / "out")) == 3


@pytest.mark.parametrize(
    "changed, message",
    [
        ("--config.ks=1,31", "config.ks: got K = 31, but the bank has only 30 rows"),
        ("--config.ks=1,x", "config.ks: got '1,x', expected whole numbers"),
        ("--config.temperature=0", "config.temperature: got temperature=0.0, expected"),
        ("--config.image_size=30", "expected a multiple of the patch size 14"),
        ("--config.resize=14", "config.resize: got 14, expected config.image_size"),
        ("--config.seed=-1", "config.seed: got -1, expected at least 0"),
        ("--config.batch_size=0", "config.batch_size: got 0, expected at least 1"),
        ("--config.cache_dtype=int8", "expected one of float32, float16"),
        ("--config.matmul_precision=low", "expected one of highest, high, default"),
        ("--config.cache=gs://bucket/x", "expected a folder of a disk"),
        ("--config.protocol=linear", "choose the protocol by --config="),
        ("--config.temprature=1", "did you mean temperature?"),
        ("--config.data=", "no data given: --config.data= takes a folder with"),
        ("--config.data=nowhere", "no folder nowhere/train: expected nowhere/train/"),
        ("--workdir=gs://bucket/x", "got a bucket, expected a folder"),
    ],
)
def test_a_wrong_setting_is_one_line(models, data, tmp_path, capsys, changed, message):
    given = [*SMALL, changed]
    found = failure(capsys, tmp_path / "out", data, models / "first", arguments=given)
    assert message in found
    assert not (tmp_path / "out").exists()


def test_an_unreadable_photograph_is_one_line(models, data, tmp_path, capsys):
    copy = shutil.copytree(data, tmp_path / "data")
    (copy / "train/red/0.png").write_bytes(b"not a picture")
    message = failure(capsys, tmp_path / "out", copy, models / "first")
    assert message.startswith(f"{copy}/train/red/0.png: not an image")


def test_a_model_that_gives_nan_is_one_line(data, tmp_path, capsys):
    params = random_params(CONFIG)
    params["norm"]["scale"] = np.full_like(params["norm"]["scale"], 3e38)
    checkpoint.save(tmp_path / "model", CONFIG, params)
    message = failure(capsys, tmp_path / "out", data, tmp_path / "model")
    assert "train/dark/0.png are not finite" in message


@pytest.mark.parametrize("twice", [True, False])
def test_a_checkpoint_that_is_wrong_is_one_line(models, data, tmp_path, capsys, twice):
    paths = [models / "first", models / "first" if twice else models / "third"]
    message = failure(capsys, tmp_path / "out", data, *paths)
    assert ("more than once" if twice else "third") in message


def test_a_checkpoint_in_another_spelling_is_the_same(models, tmp_path, monkeypatch):
    first = models / "first"
    (tmp_path / "link").symlink_to(first)
    monkeypatch.chdir(models)
    for spelling in (f"{first}/", f"{models}/./first", "first", str(tmp_path / "link")):
        said = error_of(evaluate.open_models, [str(first), spelling])
        told = f"--checkpoint={spelling} more than once, first as {first}"
        assert told in said


def test_other_results_are_not_overwritten(models, data, tmp_path, capsys):
    out = tmp_path / "out"
    run(out, data, models / "first")
    before = results(out)
    message = failure(capsys, out, data, models / "second")
    assert f"holds the results of {models / 'first'}" in message
    ks = [*SMALL, "--config.ks=5"]
    message = failure(capsys, out, data, models / "first", arguments=ks)
    assert "by other settings (ks '1,3' then, '5' now)" in message
    assert results(out) == before
    run(out, data, models / "first", models / "second")  # keeps what there was
    assert results(out)[0] == before[0]
    message = failure(capsys, out, data, models / "second")
    assert f"holds the results of {models / 'first'}" in message
    run(out, data, models / "second", arguments=[*SMALL, "--overwrite"])
    assert len(results(out)) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    message = failure(capsys, tmp_path / "mine", data, models / "first")
    assert "mine holds something else: choose another --workdir" in message


def test_models_that_resample_differently_are_told(models, data, tmp_path, capsys):
    given, other = model.open_checkpoint(models / "first"), tmp_path / "other"
    config = dataclasses.replace(given.config, interpolate_antialias=True)
    checkpoint.save(other, config, given.params)
    run(tmp_path / "out", data, models / "first", other)
    said = capsys.readouterr().err
    assert f"warning: {models / 'first'} resamples its position" in said
    assert f"{other} with antialias" in said
    run(tmp_path / "same", data, models / "first", models / "second")
    assert "resamples" not in capsys.readouterr().err


def test_a_workdir_that_is_something_else_is_one_line(models, data, tmp_path, capsys):
    (tmp_path / "file").touch()
    message = failure(capsys, tmp_path / "file", data, models / "first")
    assert "file: got a file, expected a folder" in message
    run(tmp_path / "out", data, models / "first")
    kept = tmp_path / "out/config.json"
    settings = json.loads(kept.read_text())
    for there in ("[1]", "3", "null", '"x"', "{"):
        kept.write_text(there)
        message = failure(capsys, tmp_path / "out", data, models / "first")
        assert "holds files that are damaged" in message
    kept.write_text(json.dumps(settings | {"old": 1}))
    message = failure(capsys, tmp_path / "out", data, models / "first")
    assert "by other settings (old 1 then, unknown now)" in message
    for rows in ("[3]", '{"a": 1}', "["):
        kept.write_text(json.dumps(settings))
        (tmp_path / "out/results.json").write_text(rows)
        message = failure(capsys, tmp_path / "out", data, models / "first")
        assert "holds files that are damaged" in message


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("config", ["tiny.py", "datafree.py"])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_repair_is_not_written_into_an_evaluation(
    models, data, tmp_path, capsys, config, force
):
    run(tmp_path, data, models / "first")
    before = contents(tmp_path)
    capsys.readouterr()
    command = [f"--config={config}", f"--workdir={tmp_path}", *force]
    command += ["--config.model=planted"]
    assert cli.run(lambda: repair.main(command)) == cli.USER_ERROR
    assert capsys.readouterr().err == (
        f"error: {tmp_path} holds an evaluation (knn): choose another --workdir\n"
    )
    assert contents(tmp_path) == before and not (tmp_path / "claims").exists()


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_an_evaluation_is_not_written_into_a_repair(
    models, data, tmp_path, capsys, overwrite
):
    started(tmp_path).close()
    before = contents(tmp_path)
    for _ in ("whole", "damaged"):
        given = [*SMALL, *overwrite]
        assert failure(capsys, tmp_path, data, models / "first", arguments=given) == (
            f"{tmp_path} holds a repair: choose another --workdir"
        )
        assert contents(tmp_path) == before
        (tmp_path / "config.json").write_text("{")
        before = contents(tmp_path)


def test_a_config_of_something_else_is_replaced_only_with_overwrite(
    models, data, tmp_path, capsys
):
    (tmp_path / "config.json").write_text('{"hidden_size": 384}')
    message = failure(capsys, tmp_path, data, models / "first")
    assert "something else: choose another --workdir or add --overwrite" in message
    assert run(tmp_path, data, models / "first", arguments=[*SMALL, "--overwrite"]) == 0


def test_a_workdir_in_use_is_refused(models, data, tmp_path, capsys):
    run(tmp_path, data, models / "first", arguments=[*SMALL, "--overwrite"])
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    message = failure(capsys, tmp_path, data, models / "first")
    os.close(folder)
    assert message.startswith(f"another process evaluates in {tmp_path}")


@pytest.mark.slow
def test_any_number_of_devices_gives_the_same_bytes(models, data, tmp_path):
    one = tmp_path / "1"
    for devices in (1, 2, 4):
        flags = f"--xla_force_host_platform_device_count={devices}"
        # XLA's thread pool has a thread for each core or device, whichever are more.
        environment = {**os.environ, "XLA_FLAGS": flags, "NPROC": "4"}
        out, given = tmp_path / str(devices), [*SMALL, "--config.batch_size=2"]
        command = [sys.executable, "-m", "experiments.evaluate", "--config=knn.py"]
        command += [f"--checkpoint={models / 'first'}", f"--workdir={out}", *given]
        command += [f"--config.data={data}"]
        subprocess.run(command, env=environment, check=True)
        assert results(out) == results(one)
        for file, expected in zip(cached(out), cached(one), strict=True):
            assert file.read_bytes() == expected.read_bytes()


@pytest.mark.real
def test_k_nn_tells_of_which_photograph_a_crop_is(tmp_path):
    """400 crops in the bank, 200 others classified; chance is 12.5 percent."""
    import real

    # A quarter of the protocol's pixels, to be done in a minute: 98.5 percent, at 224
    # pixels 98.0.
    small = ["--config.resize=128", "--config.image_size=112", "--config.ks=10,200"]
    run(tmp_path, "sample:crops", real.backbone(), arguments=small)
    assert results(tmp_path)[0]["metrics"]["top1"] > 90
