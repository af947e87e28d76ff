"""What is computed of models and photographs: steps whose arrays a cache keeps.

    weights --forecast, spectra, changes--> what needs no photograph
    weights, photograph --look, panels, growth, clamped, seen--> what tokens show

Tokens of all blocks are large and never kept, only what is read off them.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.study.cache import Arrays, Cache, Step
from experiments.study.subjects import Options, Photo, Subject
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

HIGHEST = 3  # tokens of each image whose direction is measured
NUM_RANDOM = 200  # random directions, of which figure 8 shows the first
LEADING = 10  # singular values whose change is computed, of each kernel
TEMPERATURES = (0.01, 0.1, 1.0)  # τ, of figure 6


class Study:
    """Models and photographs that are looked at under the same options.

    The first model's directions are the yardstick for all.

    Args:
      subjects: the model, and the repaired one if there is one; of one architecture.
      registers: a model with registers, whose tokens are only seen; or None.
      photos: may be empty, then the weights are all there is.
      options: see `Options`.
      cache: gives the arrays of a step.
      progress: told how far a long step is, as `progress(done, total)`.
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
        self._held: tuple[Any, Any] = (None, None)
        self._clamping: Iterator[tuple[float, Any]] | None = None
        self._clamped: tuple[float, Any] | None = None

    @property
    def first(self) -> Subject:
        """The model whose directions are the yardstick."""
        return self.subjects[0]

    @property
    def blocks(self) -> tuple[int, ...]:
        """Those shown one by one."""
        if self.options.blocks is not None:
            return self.options.blocks
        depth = self.first.config.depth
        return tuple(sorted({max(k * depth // 4 - 1, 0) for k in (1, 2, 3, 4)}))

    def _turn_to(self, subject: Subject) -> None:
        """Holds one model's weights at a time: others', and tokens, are dropped."""
        if subject is not self._current:
            self._current = subject
            self._held, self._clamping, self._clamped = (None, None), None, None
            others = [*self.subjects, *([self.registers] if self.registers else [])]
            for other in others:
                if other is not subject:
                    other.forget()

    # --- Weights ---

    def forecast(self, subject: Subject) -> Step:
        """What `analysis.forecast` says; its verdict as an array of one text."""

        def compute() -> Arrays:
            self._turn_to(subject)
            found = forecast.forecast(
                subject.config, subject.params, progress=self._progress
            )
            blamed = found.blamed
            return {
                "has_defect": np.array(found.has_defect),
                "block": np.array(found.block),
                "directions": found.directions,
                "gaps": found.gaps,
                "growth": found.growth,
                "turns": found.turns,
                "gain": np.array(found.gain),
                "blamed_block": np.array([each.block for each in blamed], int),
                "blamed_kernel": np.array([each.kernel for each in blamed], str),
                "blamed_index": np.array([each.index for each in blamed], int),
                "blamed_value": np.array([each.singular_value for each in blamed]),
                "blamed_share": np.array([each.share for each in blamed]),
                "verdict": np.array(found.verdict),
            }

        label = f"{subject.name}: forecast from the weights"
        return Step(label, "forecast", {"model": subject.digest}, compute)

    def directions(self, subject: Subject) -> Step:
        """ν_i of every block, by the method asked for."""
        options = self.options
        if options.method == "analytic":
            return self.forecast(subject)

        def compute() -> Arrays:
            found = defects.singular_defect_directions(
                subject.config,
                subject.params,
                options.method,
                key=jax.random.key(options.seed),
                num_probes=options.num_probes,
            )
            return {"directions": np.asarray(found)}

        label = f"{subject.name}: directions from {options.num_probes:,} random probes"
        return Step(label, "directions", self._direction_key(subject), compute)

    def _direction_key(self, subject: Subject) -> dict[str, Any]:
        key: dict[str, Any] = {"model": subject.digest, "method": self.options.method}
        if self.options.method != "analytic":
            key |= {"num_probes": self.options.num_probes, "seed": self.options.seed}
        return key

    def spectra(self, subject: Subject) -> Step:
        """Singular values of the kernels; spectra of the block maps."""

        def compute() -> Arrays:
            config, params = subject.config, subject.params
            kernels = spectra.kernel_spectra(config, params)
            maps = spectra.block_maps(config, params, progress=self._progress)
            decay = spectra.decay(maps.eigenvalues)
            return {f"kernel {name}": x for name, x in kernels.items()} | {
                **maps._asdict(),
                **decay._asdict(),
            }

        label = f"{subject.name}: spectra of kernels and block maps"
        return Step(label, "spectra", {"model": subject.digest}, compute)

    def changes(self) -> Step:
        """Learned minus original singular values, the leading ones of each kernel."""
        before, after = self.subjects

        def compute() -> Arrays:
            leading = min(LEADING, before.config.embed_dim)
            return spectra.singular_value_changes(
                before.config,
                before.params,
                after.params,
                leading,
                progress=self._progress,
            )

        key = {"before": before.digest, "after": after.digest}
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

        key = self._photo_key(subject, photo) | {
            "directions": self._direction_key(self.first),
            "seed": self.options.seed,
        }
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

        key = self._photo_key(self.first, photo) | {
            "directions": self._direction_key(self.first),
            "blocks": self.blocks,
            "window": self.options.window,
            "temperatures": TEMPERATURES,
        }
        return Step(f"learning targets of {photo.name}", "panels", key, compute)

    def growth(self, photo: Photo) -> Step:
        """What each block adds to the tokens along the last direction, first model."""

        def compute() -> Arrays:
            subject = self.first
            found = growth(
                subject.config,
                subject.placed,
                _normalized(subject.config, photo)[None],
                np.asarray(self._nu()[-1], np.float32),
            )
            attention, ffn = np.asarray(found.attention), np.asarray(found.ffn)
            start, end = np.asarray(found.start), np.asarray(found.end)
            return {
                "start": start[0],
                "attention": attention[:, 0],
                "ffn": ffn[:, 0],
                "end": end[0],
            }

        key = self._photo_key(self.first, photo) | {
            "directions": self._direction_key(self.first)
        }
        return Step(f"what each block adds to {photo.name}", "growth", key, compute)

    def clamped(self, gamma: float, photo: Photo) -> Step:
        """PCA and norms of the last block's tokens, the first model clamped at γ."""

        def compute() -> Arrays:
            return self._seen(self.first.config, self._params_at(gamma), photo)

        key = self._photo_key(self.first, photo) | {"gamma": gamma}
        return Step(f"{photo.name} clamped at {gamma:g}", "clamped", key, compute)

    def seen(self, subject: Subject, photo: Photo) -> Step:
        """PCA and norms of the last block's tokens."""

        def compute() -> Arrays:
            self._turn_to(subject)
            return self._seen(subject.config, subject.placed, photo)

        key = self._photo_key(subject, photo)
        return Step(f"{subject.name}: {photo.name}", "seen", key, compute)

    def detected(self, look: Arrays) -> np.ndarray:
        """Outliers [L, H, W] along the first model's directions (equation 5)."""
        masks = _masks(look["logits"], self.options.mask_thr, self.options.window)
        return np.asarray(masks)

    def _photo_key(self, subject: Subject, photo: Photo) -> dict[str, Any]:
        config = subject.config
        return {
            "model": subject.digest,
            "resampling": [config.interpolate_antialias, config.interpolate_offset],
            "photo": photo.digest,
            "image_size": self.options.image_size,
        }

    def _nu(self) -> np.ndarray:
        return self.cache(self.directions(self.first))["directions"]

    def _tokens(self, subject: Subject, photo: Photo) -> jax.Array:
        """All blocks' patch tokens [L, H, W, D]; the last ones asked for are held."""
        if self._held[0] != (subject.name, photo.name):
            self._held = (None, None)  # before the next ones need the room
            image = _normalized(subject.config, photo)
            tokens = patch_tokens(subject.config, subject.placed, image)
            _check_finite(photo, tokens[-1])
            self._held = ((subject.name, photo.name), tokens)
        return self._held[1]

    def _params_at(self, gamma: float) -> Any:
        """The first model clamped at γ, on the device; asked for in the order of γ."""
        if self._clamped is None or self._clamped[0] != gamma:
            self._clamped = None  # before the next one needs the room
            if self._clamping is None:
                gammas = self.options.gammas
                self._clamping = spectra.clamp_all(
                    self.first.config,
                    self.first.params,
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
            f"{photo.path}: the model gives tokens that are not finite"
        )


# --- Of tokens ------------------------------------------------------------------------

_pca_rgb = jax.jit(pca_rgb)


@jax.jit
def _look(
    tokens: Float[Array, "H W D"],
    direction: Float[Array, " D"],
    random: Float[Array, " D"],
) -> dict[str, Array]:
    """What is kept of one block's tokens, see `Study.look`."""
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
