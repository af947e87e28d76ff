import json

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments.evaluation import report
from experiments.evaluation.job import Result

CONFIG = ConfigDict({"protocol": "depth", "resamples": 200, "seed": 0})


def score(total, images):
    return {"rmse": float(total / images), "absent": float("nan")}


def result(errors, lower=True):
    counts = np.asarray(errors, float)
    told = {"images": counts.shape[1], "mask": "640 x 480"}
    return Result(counts, score, ("rmse",), "m", told, lower)


def rows(*results, config=CONFIG):
    digests = ["ab" for _ in results]
    names = [f"model|{i}" for i in range(len(results))]
    return report.rows(config, names, digests, results)


ERRORS = np.random.default_rng(0).random((1, 50))


def test_json_has_null_for_what_is_no_number(tmp_path):
    report.write(tmp_path, rows(result(ERRORS), result(ERRORS + 0.1)))
    text = (tmp_path / "results.json").read_text()
    assert "NaN" not in text
    first, second = json.loads(text)
    assert first["metrics"]["absent"] is None
    assert first["intervals"]["absent"] == [None, None]
    assert abs(second["differences"]["rmse"] - 0.1) < 1e-9
    low, high = second["difference_intervals"]["rmse"]
    assert abs(low - 0.1) < 1e-9 and abs(high - 0.1) < 1e-9  # on every image the same
    assert first["checkpoint"] == "model|0" and first["digest"] == "ab"


def test_tables_and_lines_have_the_units_of_the_paper():
    found = rows(result(ERRORS), result(ERRORS + 0.1))
    mean = ERRORS.mean()
    text = report.markdown(found)
    assert f"| model\\|0 | {mean:.3f} [" in text
    assert "| minus model\\|0 | rmse (m) |" in text
    assert "| model\\|1 | +0.100 [+0.100, +0.100] |" in text
    assert "Lower is better." in text and "over the images evaluated." in text
    lines = report.lines(found)
    assert lines[0].startswith(f"model|0: rmse {mean:.3f} m [")
    assert lines[0].endswith("(images: 50, mask: 640 x 480)")
    assert lines[2] == "model|1 - model|0: rmse +0.100 m [+0.100, +0.100]"


def test_a_metric_of_several_seeds_is_their_mean():
    counts = np.stack([np.zeros(50), np.ones(50), np.ones(50)])
    (row,) = rows(result(counts))
    assert abs(row.metrics["rmse"] - 2 / 3) < 1e-12
    low, high = row.intervals["rmse"]
    assert low < 0.4 and high == 1  # all images are alike, seeds are not
    assert "over the images evaluated and 3 seeds." in report.markdown([row])


def test_without_resamples_there_are_no_intervals():
    config = ConfigDict({"protocol": "depth", "resamples": 0, "seed": 0})
    found = rows(result(ERRORS), result(ERRORS + 0.1), config=config)
    assert not found[0].intervals and not found[1].difference_intervals
    assert "[" not in report.markdown(found) + "".join(report.lines(found))


def test_what_is_undefined_reads_as_such():
    def undefined(total, images):
        del total, images
        return {"mending": float("nan"), "damage": -1e-9}

    told = Result(ERRORS, undefined, ("mending", "damage"), "", {}, None)
    found = rows(told, told)
    text = report.markdown(found)
    assert "| model\\|0 | – | 0.0000 [0.0000, 0.0000] |" in text
    assert "| model\\|1 | – | +0.0000 [+0.0000, +0.0000] |" in text
    assert "–: undefined, for want of anything to divide by" in text
    assert report.lines(found)[0].startswith("model|0: mending –, damage 0.0000 [")
    assert "undefined" not in report.markdown(rows(result(ERRORS)))


def test_an_interval_with_an_undefined_draw_is_undefined():
    def of_one(total, images):
        del images
        return {"mending": float(1 / total) if total else float("nan")}

    counts = np.zeros((1, 3))
    counts[0, 0] = 1  # some draws miss it
    (row,) = rows(Result(counts, of_one, ("mending",), "", {}))
    assert "| 1.0000 [–] |" in report.markdown([row])
    assert report.as_json(row)["intervals"]["mending"] == [None, None]


def test_other_protocols_are_columns_with_their_own_unit_images_and_draws():
    percent = Result(
        np.full((1, 7), 0.5), lambda total, n: {"top1": 100 * float(total / n)},
        ("top1",), "%", {"images": 7}, False,
    )  # fmt: skip
    first = result(ERRORS)._replace(also={"knn": percent})
    second = result(ERRORS + 0.1)._replace(also={"knn": percent})
    found = rows(first, second)
    text = report.markdown(found)
    assert "| checkpoint | rmse (m) | knn top1 (%) |" in text
    assert "| 50.00 [50.00, 50.00] |" in text and "| +0.00 [+0.00, +0.00] |" in text
    assert "mask: 640 x 480; knn: images: 7." in text
    told = report.as_json(found[1])
    assert told["metrics"]["knn top1"] == 50 and told["differences"]["knn top1"] == 0
    assert told["evaluated"]["knn"] == {"images": 7}
    assert report.lines(found)[2].endswith("knn top1 +0.00 points [+0.00, +0.00]")
    alone = rows(result(ERRORS), result(ERRORS + 0.1))
    assert found[1].intervals["rmse"] == alone[1].intervals["rmse"]


def test_pictures_are_named_by_model_and_remedy(tmp_path):
    def picture():
        figure = Figure(figsize=(1, 1))
        return {"scenes": figure}

    plain = result(ERRORS)._replace(figures=picture())
    after = result(ERRORS)._replace(figures=picture(), details={"remedy": "data-free"})
    names = ["a/vits14.safetensors", "a/vits14.safetensors + data-free"]
    found = report.rows(CONFIG, names, ["ab", "ab"], [plain, after])
    report.write(tmp_path, found)
    written = {file.name for file in (tmp_path / "pictures").iterdir()}
    assert written == {"vits14_scenes.png", "vits14_data-free_scenes.png"}
