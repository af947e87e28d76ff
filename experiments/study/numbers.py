"""The numbers of models and photographs: steps whose arrays a cache keeps.

    weights --forecast, spectra, changes--> numbers that need no photograph
    weights, photograph --look, panels, growth, clamped, seen--> what tokens show

Tokens of all blocks are large: the cache keeps what is read off them, never the tokens.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.study.cache import Arrays, Cache, Step
from experiments.study.options import Options
from experiments.study.photos import Photo
from sinder_jax import defects, families, loss, vit
from sinder_jax.analysis import forecast, spectra
from sinder_jax.analysis.pca import pca_basis, pca_rgb
from sinder_jax.analysis.tokens import (
    angles,
    growth,
    last_patches,
    learning_targets,
    patch_tokens,
    random_directions,
    token_norms,
)
from sinder_jax.data import decode
from sinder_jax.model import Model
from sinder_jax.remedies import clamping

HIGHEST = 3  # tokens of each image whose direction is measured
NUM_RANDOM = 200  # random directions, of which figure 8 shows the first
LEADING = 10  # singular values whose change is computed, of each kernel
TEMPERATURES = (0.01, 0.1, 1.0)  # τ, of figure 6

# What is kept of a `Forecast`, and of its `Blame`s in the order of their fields.
FORECAST = "has_defect block directions gaps growth turns gain verdict".split()
BLAMED = {"block": int, "kernel": str, "index": int, "value": float, "share": float}


class Subject(NamedTuple):
    """A model under the name that figures and report give it."""

    name: str
    model: Model


class Study:
    """Models and photographs that are studied under the same options.

    The first model's directions are the yardstick for all.

    Args:
      subjects: the model, and the repaired model if there is one; of one architecture.
      registers: a model with registers, of which only the last tokens are shown; or
        None.
      photos: empty to study the weights alone.
      options: see `Options`.
      cache: returns the arrays of a step.
      progress: called during a long step as `progress(done, total)`.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        registers: Subject | None,
        photos: Sequence[Photo],
        options: Options,
        cache: Cache,
        progress: "Callable[[int, int], Any] | None" = None,
    ):
        self.cache = cache
        self.subjects, self.registers = list(subjects), registers
        self.photos, self.options = list(photos), options
        self._progress = progress
        self._current: Subject | None = None
        self._on_device: Any = None
        self._held: tuple[Any, Any] = (None, None)
        self._clamping: Iterator[tuple[float, Any]] | None = None
        self._clamped: tuple[float, Any] | None = None

    @property
    def first(self) -> Subject:
        """The model whose directions are the yardstick for all."""
        return self.subjects[0]

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks shown one by one."""
        return self.options.chosen_blocks(self.first.model.config.depth)

    def _turn_to(self, subject: Subject) -> None:
        """Drops the weights and tokens of the other models: one is held at a time."""
        if subject is self._current:
            return
        for other in (*self.subjects, self.registers):
            if other is not None and other is not subject:
                other.model.forget()
        self._current, self._on_device = subject, None
        self._held, self._clamping, self._clamped = (None, None), None, None

    def _placed(self, subject: Subject) -> Any:
        """A model's params on the device."""
        self._turn_to(subject)
        if self._on_device is None:
            self._on_device = jax.device_put(subject.model.params)
        return self._on_device

    # --- Weights ---

    def forecast(self, subject: Subject) -> Step:
        """The arrays of `forecast.forecast`; the verdict is an array of one text."""

        def compute() -> Arrays:
            self._turn_to(subject)
            config, params = subject.model.config, subject.model.params
            found = forecast.forecast(config, params, progress=self._progress)
            arrays = {name: np.asarray(getattr(found, name)) for name in FORECAST}
            for i, (name, kind) in enumerate(BLAMED.items()):
                column = [each[i] for each in found.blamed]
                arrays[f"blamed_{name}"] = np.array(column, kind)
            return arrays

        label = f"{subject.name}: forecast from the weights"
        return Step(label, "forecast", {"model": subject.model.digest}, compute)

    def directions(self) -> Step:
        """ν_i of every block of the first model, by the method of the options."""
        subject, options = self.first, self.options
        if options.method == "analytic":
            return self.forecast(subject)

        def compute() -> Arrays:
            found = defects.singular_defect_directions(
                subject.model.config,
                subject.model.params,
                options.method,
                key=jax.random.key(options.seed),
                num_probes=options.num_probes,
            )
            return {"directions": np.asarray(found)}

        label = f"{subject.name}: directions from {options.num_probes:,} random probes"
        return Step(label, "directions", self._direction_key(), compute)

    def _direction_key(self) -> dict[str, Any]:
        options = self.options
        key = {"model": self.first.model.digest, "method": options.method}
        if options.method == "analytic":
            return key
        return {**key, "num_probes": options.num_probes, "seed": options.seed}

    def spectra(self, subject: Subject) -> Step:
        """Singular values of the kernels; spectra of the block maps."""

        def compute() -> Arrays:
            config, params = subject.model.config, subject.model.params
            kernels = spectra.kernel_spectra(config, params)
            maps = spectra.block_maps(config, params, progress=self._progress)
            decay = spectra.decay(maps.eigenvalues)
            return {f"kernel {name}": x for name, x in kernels.items()} | {
                **maps._asdict(),
                **decay._asdict(),
            }

        label = f"{subject.name}: spectra of kernels and block maps"
        return Step(label, "spectra", {"model": subject.model.digest}, compute)

    def changes(self) -> Step:
        """Learned minus original singular values, the leading ones of each kernel."""
        before, after = self.subjects

        def compute() -> Arrays:
            leading = min(LEADING, before.model.config.embed_dim)
            return spectra.singular_value_changes(
                before.model.config,
                before.model.params,
                after.model.params,
                leading,
                progress=self._progress,
            )

        key = {"before": before.model.digest, "after": after.model.digest}
        return Step("what the repair changed of the kernels", "changes", key, compute)

    # --- Tokens ---

    def look(self, subject: Subject, photo: Photo) -> Step:
        """Of every block: norms, angles, detection logits, the highest-norm tokens.

        "norms", "angles", "logits" and "random" (angles to a random direction) are
        [L, H, W]; "highest" is [L, HIGHEST, D]; "pca" [H, W, 3] is the last block's;
        "cosines" [NUM_RANDOM, H, W] are |cos| of its tokens to random directions.
        """

        def compute() -> Arrays:
            self._turn_to(subject)
            tokens = self._tokens(subject, photo)
            nu = jnp.asarray(self._nu(), jnp.float32)
            random = random_directions(
                jax.random.key(self.options.seed), NUM_RANDOM, nu.shape[1]
            )
            rows = [_look(x, nu[i], random[0]) for i, x in enumerate(tokens)]
            found = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            pca, cosines = _last(tokens[-1], random)
            return found | {"pca": np.asarray(pca), "cosines": np.asarray(cosines)}

        key = self._photo_key(
            subject, photo, directions=self._direction_key(), seed=self.options.seed
        )
        return Step(f"{subject.name}: tokens of {photo.name}", "look", key, compute)

    def panels(self, photo: Photo) -> Step:
        """PCA of tokens and learning targets of the chosen blocks, first model.

        "pca" is [k, H, W, 3], "targets" [k, τ, H, W, 3]; the targets of one block share
        their colors.
        """

        def compute() -> Arrays:
            tokens = self._tokens(self.first, photo)
            nu = jnp.asarray(self._nu(), jnp.float32)
            window = self.options.window
            found = [_panels(tokens[i], nu[i], window) for i in self.blocks]
            pca, targets = zip(*found, strict=True)
            return {"pca": np.stack(pca), "targets": np.stack(targets)}

        key = self._photo_key(
            self.first,
            photo,
            directions=self._direction_key(),
            blocks=self.blocks,
            window=self.options.window,
            temperatures=TEMPERATURES,
        )
        return Step(f"learning targets of {photo.name}", "panels", key, compute)

    def growth(self, photo: Photo) -> Step:
        """Growth of the first model's tokens along the direction of the last block."""

        def compute() -> Arrays:
            subject = self.first
            found = growth(
                subject.model.config,
                self._placed(subject),
                _normalized(subject.model.config, photo)[None],
                np.asarray(self._nu()[-1], np.float32),
            )
            # The axis of the images, of which there is one, is the third from the end.
            return {
                name: np.asarray(x)[..., 0, :, :] for name, x in found._asdict().items()
            }

        key = self._photo_key(self.first, photo, directions=self._direction_key())
        return Step(f"what each block adds to {photo.name}", "growth", key, compute)

    def clamped(self, gamma: float, photo: Photo) -> Step:
        """PCA and norms of the last block's tokens, the first model clamped at γ."""

        def compute() -> Arrays:
            return self._seen(self.first.model.config, self._params_at(gamma), photo)

        key = self._photo_key(self.first, photo, gamma=gamma)
        return Step(f"{photo.name} clamped at {gamma:g}", "clamped", key, compute)

    def seen(self, subject: Subject, photo: Photo) -> Step:
        """PCA and norms of the last block's tokens."""

        def compute() -> Arrays:
            self._turn_to(subject)
            return self._seen(subject.model.config, self._placed(subject), photo)

        key = self._photo_key(subject, photo)
        return Step(f"{subject.name}: {photo.name}", "seen", key, compute)

    def detected(self, look: Arrays) -> np.ndarray:
        """Outliers [L, H, W] along the first model's directions (equation 5)."""
        masks = _masks(look["logits"], self.options.mask_thr, self.options.window)
        return np.asarray(masks)

    def _photo_key(self, subject: Subject, photo: Photo, **more: Any) -> dict[str, Any]:
        config = subject.model.config
        return {
            "model": subject.model.digest,
            "resampling": [config.interpolate_antialias, config.interpolate_offset],
            **config.own,
            "photo": photo.digest,
            "image_size": self.options.image_size,
            **more,
        }

    def _nu(self) -> np.ndarray:
        return self.cache(self.directions())["directions"]

    def _tokens(self, subject: Subject, photo: Photo) -> jax.Array:
        """Patch tokens of all blocks [L, H, W, D]; holds those of one photograph."""
        if self._held[0] != (subject.name, photo.name):
            self._held = (None, None)  # before the next ones need the room
            image = _normalized(subject.model.config, photo)
            tokens = patch_tokens(subject.model.config, self._placed(subject), image)
            _check_finite(photo, tokens[-1])
            self._held = ((subject.name, photo.name), tokens)
        return self._held[1]

    def _params_at(self, gamma: float) -> Any:
        """The first model clamped at γ, on the device; call it in the order of γ."""
        if self._clamped is None or self._clamped[0] != gamma:
            self._clamped = None  # before the next one needs the room
            if self._clamping is None:
                gammas = self.options.gammas
                self._clamping = clamping.clamp_all(
                    self.first.model.config,
                    self.first.model.params,
                    gammas[gammas.index(gamma) :],
                    progress=self._progress,
                )
            params = next(params for at, params in self._clamping if at == gamma)
            self._clamped = (gamma, jax.device_put(params))
        return self._clamped[1]

    @staticmethod
    def _seen(config: vit.ViTConfig, params: Any, photo: Photo) -> Arrays:
        tokens = last_patches(config, params, _normalized(config, photo))
        _check_finite(photo, tokens)
        norms, pca = token_norms(tokens), _pca_rgb(tokens)
        return {"norms": np.asarray(norms), "pca": np.asarray(pca)}


def _normalized(config: vit.ViTConfig, photo: Photo) -> np.ndarray:
    return decode.normalize(photo.pixels, families.of(config).statistics)


def _check_finite(photo: Photo, tokens: Array) -> None:
    if not np.isfinite(np.asarray(tokens)).all():
        raise FloatingPointError(
            f"{photo.path}: the model returns tokens that are not finite"
        )


# --- Of tokens ------------------------------------------------------------------------

_pca_rgb = jax.jit(pca_rgb)


@jax.jit
def _look(
    tokens: Float[Array, "H W D"],
    direction: Float[Array, " D"],
    random: Float[Array, " D"],
) -> dict[str, Array]:
    """The arrays of one block, see `Study.look`."""
    norms = token_norms(tokens)
    rows = tokens.reshape(-1, tokens.shape[-1])
    _, highest = jax.lax.top_k(norms.ravel(), min(HIGHEST, len(rows)))
    return {
        "norms": norms,
        "angles": angles(tokens, direction),
        "logits": loss.outlier_logits(tokens, direction),
        "random": angles(tokens, random),
        "highest": rows[highest],
    }


@jax.jit
def _last(
    tokens: Float[Array, "H W D"], random: Float[Array, "count D"]
) -> tuple[Array, Array]:
    """PCA of the last block's tokens, and their |cos| to random directions."""
    cosines = jnp.einsum(
        "hwd,nd->nhw",
        loss.normalize(tokens),
        random,
        precision=jax.lax.Precision.HIGHEST,
    )
    return pca_rgb(tokens), jnp.abs(cosines)


@functools.partial(jax.jit, static_argnums=2)
def _panels(
    tokens: Float[Array, "H W D"], direction: Float[Array, " D"], window: int
) -> tuple[Array, Array]:
    """PCA of a block's tokens; PCA of their learning targets in shared colors."""
    targets = learning_targets(tokens, direction, TEMPERATURES, window=window)
    basis = pca_basis(targets)
    return pca_rgb(tokens), pca_rgb(targets, basis)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _masks(logits: Float[Array, "L H W"], mask_thr: float, window: int) -> Array:
    return jax.vmap(
        lambda each: loss.outlier_mask(each, mask_thr=mask_thr, window=window)
    )(logits)
