"""The diagnosis: what tells a singular defect from tokens that are merely odd."""

import dataclasses

import jax
import numpy as np
import pytest

from photos import crop, normalize
from sinder_jax import defects, planted
from sinder_jax.analysis import diagnosis, forecast
from sinder_jax.analysis.diagnosis import NOWHERE, Look
from sinder_jax.data import decode, listing

SIDE = 8


def look(*blocks: tuple[int, int]) -> Look:
    """Blocks with so many long tokens, and so many tokens along ν: the first ones."""
    norms, angles, outliers = [], [], []
    for long, along in blocks:
        order = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)
        norms.append(np.where(order < long, 5.0, 1.0))
        angles.append(np.where(order < along, 10.0, 80.0))
        outliers.append(order < along)
    return Look(np.stack(norms), np.stack(angles), np.stack(outliers))


def sighting(*blocks: tuple[int, int], **changes) -> diagnosis.Sighting:
    return diagnosis.sighting(look(*blocks))._replace(**changes)


# --- One photograph -------------------------------------------------------------------


def test_long_tokens_along_nu_are_a_defect_from_their_block_on():
    seen = sighting((0, 0), (1, 3), (7, 7), (9, 7), (0, 9))
    assert (seen.block, seen.last_block) == (2, 3)
    assert seen.first_outliers == 1  # three outliers that are not long stop a repair
    assert seen.large.tolist() == [0, 1, 7, 9, 0]
    assert seen.outliers.tolist() == [0, 3, 7, 7, 9]
    assert seen.defective.tolist() == [0, 1, 7, 7, 0]
    assert seen.norm_ratio.tolist() == [1, 5, 5, 5, 1]
    assert (seen.patches, seen.angle) == (SIDE**2, 10.0)


@pytest.mark.parametrize(
    "block", [(7, 0), (0, 7), (2, 9)], ids=["long", "along", "fewer-than-3"]
)
def test_one_sign_alone_is_no_defect(block):
    seen = sighting(block, block)
    assert (seen.block, seen.last_block) == (NOWHERE, NOWHERE)
    assert np.isnan(seen.angle)


def test_fewer_tokens_are_enough_if_the_repair_takes_fewer():
    found = look((0, 0), (2, 2))
    assert diagnosis.sighting(found, min_outliers=2).block == 1


@pytest.mark.parametrize(
    ("there", "run"),
    [([], (-1, -1)), ([0, 0], (-1, -1)), ([1, 0, 1, 1], (2, 3)), ([1, 0, 1], (0, 0))],
)
def test_longest_run_is_the_first_of_the_longest(there, run):
    assert diagnosis.longest_run(np.array(there, bool)) == run


# --- All photographs ------------------------------------------------------------------


def test_block_is_that_of_most_photographs_and_earlier_stops_are_false_alarms():
    usual = [(0, 0), (0, 0), (7, 7)]
    looks = [usual, usual, [(0, 3), (0, 0), (7, 7)], [(0, 0), (7, 7), (7, 7)]]
    seen = diagnosis.over_all([sighting(*each) for each in looks])
    assert (seen.photographs, seen.with_defect, seen.block) == (4, 4, 2)
    assert seen.false_alarms == 2
    assert seen.angle == 10.0 and seen.norm_ratio.tolist() == [1, 5, 5]


def test_nothing_is_a_false_alarm_where_there_is_no_block():
    seen = diagnosis.over_all([sighting((0, 3), (0, 0))])
    assert (seen.with_defect, seen.block, seen.false_alarms) == (0, NOWHERE, 0)
    assert np.isnan(seen.angle)


@pytest.mark.parametrize(
    ("forecast", "photographs", "with_defect", "ratio", "want"),
    [
        (True, 16, 16, 9.0, "defect"),
        (False, 16, 8, 9.0, "defect"),  # tokens count for more than weights
        (True, 16, 7, 9.0, "traces"),
        (False, 16, 1, 1.2, "traces"),
        (False, 16, 0, 3.1, "traces"),
        (True, 16, 0, 1.2, "traces"),
        (False, 16, 0, 2.9, "sound"),
        (True, 0, 0, 1.0, "defect"),
        (False, 0, 0, 1.0, "sound"),
    ],
)
def test_condition(forecast, photographs, with_defect, ratio, want):
    assert diagnosis.condition(forecast, photographs, with_defect, ratio) == want


# --- Models ---------------------------------------------------------------------------


def diagnose(config, params, count: int = 4) -> tuple[forecast.Forecast, str, int]:
    """Forecast, condition and block of a model, on photographs."""
    found = defects.singular_defects(config, params)
    told = forecast.forecast(config, params, found=found)
    files = listing.sample_images()[:count]
    looks = [
        jax.device_get(
            diagnosis.look(
                config,
                params,
                normalize(crop(decode.read_rgb(file), 224)),
                found.directions.astype(np.float32),
            )
        )
        for file in files
    ]
    seen = diagnosis.over_all([diagnosis.sighting(each) for each in looks])
    facts = (seen.photographs, seen.with_defect, float(seen.norm_ratio[-1]))
    return told, diagnosis.condition(told.has_defect, *facts), seen.block


def with_registers(made: planted.PlantedModel) -> planted.PlantedModel:
    config = dataclasses.replace(made.config, num_register_tokens=4)
    tokens = np.random.default_rng(0).normal(0, 0.5, (1, 4, config.embed_dim))
    params = made.params | {"register_tokens": tokens.astype(np.float32)}
    return made._replace(config=config, params=params)


@pytest.mark.parametrize("registers", [False, True], ids=["plain", "registers"])
def test_planted_defect_is_named_with_its_block(registers):
    made = planted.planted_model(3)
    made = with_registers(made) if registers else made
    told, condition, block = diagnose(made.config, made.params)
    assert (condition, block, told.block) == ("defect", made.block, made.block)


def test_planted_model_without_its_unit_is_sound():
    made = planted.planted_model(3)
    made.params["blocks"]["mlp"]["w3"]["kernel"][made.block][0] = 0
    _, condition, block = diagnose(made.config, made.params)
    assert (condition, block) == ("sound", NOWHERE)


def test_odd_tokens_of_the_position_embedding_are_no_singular_defect():
    """They are as long as a defect's and the same in every image, but not along ν."""
    made = planted.planted_model(3)
    made.params["blocks"]["mlp"]["w3"]["kernel"][made.block][0] = 0
    rng = np.random.default_rng(0)
    odd = rng.normal(size=made.config.embed_dim)
    spots = 1 + rng.choice(made.config.grid_size**2, 6, replace=False)
    made.params["pos_embed"][0, spots] += 60 * odd / np.linalg.norm(odd)
    told, condition, block = diagnose(made.config, made.params)
    assert (condition, block) == ("traces", NOWHERE) and not told.has_defect


def test_known_directions_are_not_computed_again(monkeypatch):
    made = planted.planted_model(0)
    found = defects.singular_defects(made.config, made.params)
    want = forecast.forecast(made.config, made.params)
    monkeypatch.delattr(defects, "singular_defects")
    told = forecast.forecast(made.config, made.params, found=found)
    assert told.blamed == want.blamed and np.array_equal(told.gaps, want.gaps)
