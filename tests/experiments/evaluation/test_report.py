import json

import numpy as np
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
