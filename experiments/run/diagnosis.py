"""The diagnosis with which a repair begins: is there a singular defect, and where?

    weights --forecast--> gap, block
    weights, MOST photographs --look--> long tokens, outliers along ν, block by block
    both --verdict--> diagnosis.json and five lines; without a defect the run ends

`analysis.diagnosis` has the rule. A run diagnoses once: started again, it goes by
what it stored.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from experiments.run.cluster import Cluster
from experiments.run.inputs import AUTO, Weights
from experiments.run.workdir import Workdir
from sinder_jax import cli, families, repair
from sinder_jax.analysis import diagnosis, forecast
from sinder_jax.analysis.diagnosis import CONDITIONS, NOWHERE
from sinder_jax.data import decode
from sinder_jax.data.listing import Photograph
from sinder_jax.placement import on_host
from sinder_jax.storage import run_files

MOST = 16  # photographs
OPTIONS = "image_size mask_thr window min_outliers method num_probes seed".split()
ALL_THE_SAME = "to repair it all the same, add --config.diagnose=off"

Facts = dict[str, Any]  # the content of diagnosis.json


class Diagnosis(NamedTuple):
    """What a start knows of its diagnosis.

    Attributes:
      facts: the content of diagnosis.json; empty if the run has none.
      ends: True if the run ends here, since there is nothing to repair.
    """

    facts: Facts
    ends: bool = False

    def options(
        self, options: repair.RepairOptions, first_block: int
    ) -> repair.RepairOptions:
        """The options of the step, with the diagnosed block for `first_block=auto`.

        Raises:
          ValueError: no block was diagnosed.
        """
        if first_block != AUTO:
            return options
        if self.facts["block"] == NOWHERE:
            raise ValueError(
                "config.first_block=auto: the diagnosis found "
                f"{self.facts['verdict']} and names no block; give --config.first_block"
                "=0, as the authors do, or another number"
            )
        return dataclasses.replace(options, first_block=self.facts["block"])

    def summary(self, workdir: Workdir) -> dict[str, Any]:
        """What the summary of a finished repair says of the diagnosis.

        "false_alarms" counts the images whose first outliers lay in front of the block.
        """
        if not self.facts:
            return {}
        block, rows = self.facts["block"], run_files.read_metrics(workdir.path)
        stops = [row["layer"] for row in rows if row["layer"] is not None]
        return {
            "verdict": self.facts["verdict"],
            "block": block,
            "false_alarms": sum(NOWHERE < stop < block for stop in stops),
        }


def of_all(
    processes: Cluster, weights: Weights, train: Sequence[Photograph]
) -> Diagnosis:
    """Reads the diagnosis, made by process 0 where there is none yet; prints it.

    A run that has begun to repair goes on whatever the diagnosis says.

    Args:
      processes: of the run.
      weights: the model to repair; says config and workdir, too.
      train: the training list, of which at most `MOST` photographs are read.

    Raises:
      FloatingPointError: no photograph gives tokens that are finite.
      ValueError: as `Weights`.
    """
    config, workdir = weights.config, weights.workdir
    path = workdir.path / run_files.DIAGNOSIS
    if config.diagnose == "off":
        return Diagnosis({})
    begun = processes.is_first and weights.have_begun
    known = processes.is_first and _is_known(
        workdir, begun, lambda: _of(weights, train)
    )
    skip = begun and not known and config.first_block != AUTO  # began without one
    if processes.from_first(np.array(skip)):  # also: a damaged one is out of the way
        return Diagnosis({})
    if processes.is_first and not known:
        began = time.monotonic()
        facts = diagnose(weights, train)
        facts["seconds"] = round(time.monotonic() - began, 1)
        workdir.write_json(path.name, {**facts, "sha256": _digest(facts)})
    while not path.exists():  # not in a collective, which may time out
        time.sleep(1.0)
    processes.barrier()
    facts = run_files.read_json(path)
    ends = facts["verdict"] == CONDITIONS["sound"] and not begun
    ends = bool(processes.from_first(np.array(ends)))
    shown = lines(facts)
    processes.say("\n".join(shown if ends or not known else shown[-1:]))
    return Diagnosis(facts, ends)


def _is_known(workdir: Workdir, begun: bool, of: Callable[[], Facts]) -> bool:
    """True if there is a whole diagnosis of this run; removes any other.

    Raises:
      ValueError: the run ended with a diagnosis of other weights.
    """
    path = workdir.path / run_files.DIAGNOSIS
    try:
        facts = run_files.read_json(path)
        damage = f"{path} is damaged (its SHA-256 is another)"
        damage = "" if facts.pop("sha256", None) == _digest(facts) else damage
    except FileNotFoundError:
        return False
    except ValueError as error:
        damage = str(error)
    if not damage:
        then, now = facts["of"], facts["of"] if begun else of()
        if then == now:
            return True
        if workdir.summary.exists() and then["digest"] != now["digest"]:
            raise ValueError(
                f"{workdir.path} holds a diagnosis of other weights: their digest was "
                f"{then['digest'][:12]} and is {now['digest'][:12]}; choose another "
                "--workdir, or give the weights of the first start"
            )
    workdir.check()
    path.unlink()
    reason = damage or f"{path} is of other weights, photographs or settings"
    cli.warn(f"{reason}; diagnosed again")
    return False


def _digest(facts: Facts) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _of(weights: Weights, train: Sequence[Photograph]) -> Facts:
    """All that a diagnosis depends on."""
    names = "\n".join(photograph.name for photograph in train)
    encoded = names.encode(errors="surrogatepass")  # names that are not UTF-8
    return {
        "digest": weights.model.digest,
        "architecture": weights.model.config.as_dict(),
        "photographs": hashlib.sha256(encoded).hexdigest(),
        **{name: weights.config[name] for name in OPTIONS},
    }


def diagnose(weights: Weights, train: Sequence[Photograph]) -> Facts:
    """Forecasts from the weights and looks at photographs.

    Returns:
      The content of diagnosis.json, JSON values; shares are of all patches of all
      photographs, by block.

    Raises:
      FloatingPointError: no photograph can be read and gives finite tokens.
    """
    model, config = weights.model.config, weights.config
    told = forecast.forecast(model, weights.model.params, found=weights.found)
    weights.show_phase("diagnosing")
    by_name = {}
    with on_host() if config.split_model else nullcontext():
        params = jax.device_put(weights.model.params)
        directions = jax.device_put(told.directions.astype(np.float32))
        for name, photograph in _some(train):
            crop = decode.training_crop(
                photograph, config.image_size, patch_size=model.patch_size
            )
            image = decode.normalize(crop, families.of(model).statistics)
            look = diagnosis.look(
                model,
                params,
                image,
                directions,
                mask_thr=config.mask_thr,
                window=config.window,
            )
            found = jax.device_get(look)
            if np.isfinite(found.norms).all():
                by_name[name] = diagnosis.sighting(
                    found, min_outliers=config.min_outliers
                )
    if not by_name:
        raise FloatingPointError(
            "none of the photographs looked at can be read and gives finite tokens: "
            "the weights, or the photographs, may be damaged"
        )
    return _facts(told, by_name) | {"of": _of(weights, train)}


def _some(train: Sequence[Photograph]) -> Iterator[tuple[str, Image.Image]]:
    """Names and pixels of the first readable photograph of each of `MOST` parts."""
    for part in np.array_split(np.arange(len(train)), min(MOST, len(train))):
        for i in part:
            try:
                image = train[i].read()
            except decode.UnreadableImage:
                continue  # the repair tells, when it comes to the photograph
            yield train[i].name, image
            break


def _facts(
    told: forecast.Forecast, by_name: dict[str, diagnosis.Sighting]
) -> dict[str, Any]:
    each = list(by_name.values())
    seen = diagnosis.over_all(each)
    condition = diagnosis.condition(
        told.has_defect, seen.photographs, seen.with_defect, float(seen.norm_ratio[-1])
    )
    patches = sum(one.patches for one in each)
    shares = {
        f"{name}_share": (sum(getattr(one, name) for one in each) / patches).tolist()
        for name in ("large", "outliers", "defective")
    }
    return {
        "verdict": CONDITIONS[condition],
        "block": told.block if seen.block == NOWHERE else seen.block,
        "forecast": {"block": told.block, "gaps": told.gaps.tolist()},
        "photographs": seen.photographs,
        "with_defect": seen.with_defect,
        "false_alarms": seen.false_alarms,
        "angle": seen.angle if seen.with_defect else None,
        "norm_ratio": seen.norm_ratio.tolist(),
        **shares,
        "blocks": {name: one.block for name, one in by_name.items()},
        "first_outliers": {name: one.first_outliers for name, one in by_name.items()},
    }


def finish(workdir: Workdir, config: ConfigDict, diagnosed: Diagnosis) -> None:
    """Writes the summary of a run that ends with its diagnosis, and says so."""
    workdir.write_summary(
        {
            "finished": True,
            "verdict": diagnosed.facts["verdict"],
            "model": config.model,
            "images": 0,
            "files": [],
            "diagnosis": diagnosed.facts,
            "go_on": ALL_THE_SAME,
        }
    )
    print(f"finished: nothing to repair, nothing exported; {ALL_THE_SAME}")


# --- Words ----------------------------------------------------------------------------


def lines(facts: Facts) -> list[str]:
    """The five lines of a diagnosis."""
    block, gaps = facts["block"], facts["forecast"]["gaps"]
    all_ = f"{facts['photographs']} photographs"
    forecast_block = facts["forecast"]["block"]
    weights = f"a defect from block {forecast_block} on"
    if forecast_block == NOWHERE:
        weights = f"no defect (one is forecast from {forecast.MIN_GAP:g} on)"
    seen = f"none of {all_} shows a defect"
    if facts["with_defect"]:
        seen = (
            f"{facts['with_defect']} of {all_} show a defect, "
            f"{facts['angle']:.0f}° from ν; false alarms in front of block {block} in "
            f"{facts['false_alarms']}"
        )
    where = "" if block == NOWHERE else f" in block {block}"
    return [
        f"weights   gap {max(gaps):.2f}: {weights}",
        f"tokens    {seen}",
        f"by norm   {_by_block(facts['large_share'])} of the patches",
        f"along ν   {_by_block(facts['outliers_share'])} of the patches",
        f"verdict   {facts['verdict']}{where} ({run_files.DIAGNOSIS})",
    ]


def _by_block(shares: Sequence[float]) -> str:
    percents = " ".join(f"{100 * share:.2g}" for share in shares)
    return f"blocks 0 to {len(shares) - 1}: {percents} %"
