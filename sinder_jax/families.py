"""Which models there are, as data: one `Family` for each recipe of pre-training.

    FAMILIES["dinov2"] --models--> {"dinov2_vitg14": fields of its ViTConfig, ...}
    ViTConfig --of--> its family: image mean and std, norm epsilon, hidden width, ...

A new family is a row of `FAMILIES` and nothing else: whatever differs between families
is read from here. This module imports neither JAX nor NumPy.
"""

import contextlib
import dataclasses
import difflib
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple, Protocol, runtime_checkable

DEFAULT = "dinov2"  # of a ViTConfig; the only name that stored configs leave out
LARGEST = 1e9  # of a mean or deviation; also refuses NaN


class Size(NamedTuple):
    """Shape of one model: width D, blocks L, heads M and kind of FFN."""

    embed_dim: int
    depth: int
    num_heads: int
    ffn_layer: str


class Variant(NamedTuple):
    """Models with the same number of registers, and how their grid is resampled.

    Attributes:
      suffix: end of the model's name, such as "_reg".
      file_suffix: the same in the name of its file.
      num_register_tokens: registers R.
      interpolate_antialias, interpolate_offset: see `pos_embed.resample`.
    """

    suffix: str
    file_suffix: str
    num_register_tokens: int
    interpolate_antialias: bool
    interpolate_offset: float


class HiddenWidth(NamedTuple):
    """FFN width F: `ratio` times D, cut to an integer, rounded up to a `multiple`."""

    ratio: Fraction
    multiple: int = 1

    def __call__(self, embed_dim: int) -> int:
        return -(-int(self.ratio * embed_dim) // self.multiple) * self.multiple


class Statistics(NamedTuple):
    """Mean and standard deviation of red, green and blue, for pixels in 0 to 1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(cls, pair: Any) -> "Statistics":
        """Statistics from mean and deviation as JSON files hold them, as lists.

        Raises:
          ValueError: not three finite numbers each, or a deviation not positive.
        """
        numbers: list[Any] = [None]
        with contextlib.suppress(TypeError, ValueError):  # of another shape
            (red, green, blue), deviations = pair
            numbers = [red, green, blue, *deviations]
        if (
            len(numbers) != 6
            or not all(type(x) in (int, float) and abs(x) < LARGEST for x in numbers)
            or min(numbers[3:]) <= 0
        ):
            raise ValueError(
                f"got image statistics {str(pair)[:200]}, expected a mean of three "
                "finite numbers and a deviation of three positive ones"
            )
        a, b, c, d, e, f = map(float, numbers)
        return cls((a, b, c), (d, e, f))


@dataclasses.dataclass(frozen=True)
class Family:
    """What the models of a family share.

    Attributes:
      sizes: by the letter that the model's name has.
      variants: the plain models, and those with registers.
      hidden_widths: by `ffn_layer`.
      patch_size: side of a patch in pixels.
      image_size: side in pixels of the images the position embedding is stored for.
      norm_epsilon: added to the variance by every LayerNorm.
      statistics: of the images that the models were trained on.
      layer_scale: False if the models have no LayerScale; the params then hold γ = 1.
      layouts: file layouts in which the models are published, see `convert`.
      model_name: pattern of `size`, `patch` and `suffix`.
      hub_url: where the PyTorch files are.
      hub_file: pattern of a file's address below `hub_url`.
    """

    sizes: Mapping[str, Size]
    variants: tuple[Variant, ...]
    hidden_widths: Mapping[str, HiddenWidth]
    patch_size: int
    image_size: int
    norm_epsilon: float
    statistics: Statistics
    layer_scale: bool
    layouts: tuple[str, ...]
    model_name: str
    hub_url: str
    hub_file: str

    def variant(self, num_register_tokens: int) -> Variant:
        """The variant that a model with so many registers is closest to."""
        return min(
            self.variants,
            key=lambda variant: (
                (variant.num_register_tokens > 0) != (num_register_tokens > 0),
                abs(variant.num_register_tokens - num_register_tokens),
            ),
        )

    def num_heads(self, embed_dim: int) -> int | None:
        """Heads of the family's model with this width; None if it has no such model."""
        heads = {size.embed_dim: size.num_heads for size in self.sizes.values()}
        return heads.get(embed_dim)


FAMILIES: dict[str, Family] = {
    "dinov2": Family(
        sizes={
            #          D,    L,  M,  FFN
            "s": Size(384, 12, 6, "mlp"),
            "b": Size(768, 12, 12, "mlp"),
            "l": Size(1024, 24, 16, "mlp"),
            "g": Size(1536, 40, 24, "swiglu"),
        },
        variants=(
            Variant("", "", 0, interpolate_antialias=False, interpolate_offset=0.1),
            Variant("_reg", "_reg4", 4, True, 0.0),
        ),
        hidden_widths={
            "mlp": HiddenWidth(Fraction(4)),
            "swiglu": HiddenWidth(Fraction(8, 3), multiple=8),
        },
        patch_size=14,
        image_size=518,
        norm_epsilon=1e-6,
        statistics=Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet
        layer_scale=True,
        layouts=("dinov2", "hf", "timm"),
        model_name="dinov2_vit{size}{patch}{suffix}",
        hub_url="https://dl.fbaipublicfiles.com/dinov2",
        hub_file="dinov2_vit{size}{patch}/dinov2_vit{size}{patch}{suffix}_pretrain.pth",
    ),
}
"""All families by name; `ViTConfig.family` is a key."""


class Relative(NamedTuple):
    """A model of DINOv2's architecture that others trained.

    Attributes:
      size: its shape.
      image_size, patch_size: in pixels.
      num_register_tokens, positions: as in `ViTConfig`.
      statistics: of its images, as its publishers state them.
    """

    size: Size
    image_size: int
    patch_size: int
    num_register_tokens: int = 0
    positions: str = "class"
    statistics: Statistics = FAMILIES["dinov2"].statistics

    @property
    def fields(self) -> dict[str, Any]:
        """Those of its `ViTConfig` that its tensors tell, and the number of heads."""
        return {
            **self.size._asdict(),
            "img_size": self.image_size,
            "patch_size": self.patch_size,
            "num_register_tokens": self.num_register_tokens,
            "positions": self.positions,
        }


H_AND_E = Statistics((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
RADIOGRAPHS = Statistics((0.5307,) * 3, (0.2583,) * 3)
RELATIVES = {
    "H-optimus-0": Relative(
        Size(1536, 40, 24, "swiglu"), 224, 14, 4, statistics=H_AND_E
    ),
    "H-optimus-1": Relative(
        Size(1536, 40, 24, "swiglu"), 224, 14, 4, statistics=H_AND_E
    ),
    "H0-mini": Relative(Size(768, 12, 12, "swiglu"), 224, 14, 4, statistics=H_AND_E),
    "UNI": Relative(Size(1024, 24, 16, "mlp"), 224, 16),
    "UNI2-h": Relative(Size(1536, 24, 24, "swiglu"), 224, 14, 8),
    "Virchow": Relative(Size(1280, 32, 16, "swiglu"), 224, 14),
    "Virchow2": Relative(Size(1280, 32, 16, "swiglu"), 224, 14, 4, "all"),
    "Prov-GigaPath": Relative(Size(1536, 40, 24, "swiglu"), 224, 16),
    "GPFM": Relative(Size(1024, 24, 16, "mlp"), 224, 14),
    "RAD-DINO": Relative(Size(768, 12, 12, "mlp"), 518, 14, statistics=RADIOGRAPHS),
    "Phikon-v2": Relative(Size(1024, 24, 16, "mlp"), 224, 16),
}
"""Relatives by name, from their publishers' pages; no file of theirs was read here."""


class Published(NamedTuple):
    """A model that can be fetched by name.

    Attributes:
      name: such as "dinov2_vitg14_reg".
      alias: the name as in that of its file, "dinov2_vitg14_reg4".
      hub_url: where the files of its family are.
      file: address of its PyTorch file below `hub_url`.
      fields: of its `ViTConfig`.
    """

    name: str
    alias: str
    hub_url: str
    file: str
    fields: dict[str, Any]


def published() -> dict[str, Published]:
    """All published models of all families by name, plain ones first."""
    found = [
        _publish(name, family, letter, variant)
        for name, family in FAMILIES.items()
        for variant in family.variants
        for letter in family.sizes
    ]
    return {model.name: model for model in found}


def _publish(name: str, family: Family, letter: str, variant: Variant) -> Published:
    patch = family.patch_size
    fields = {
        **family.sizes[letter]._asdict(),
        **variant._asdict(),
        "img_size": family.image_size,
        "patch_size": patch,
        "family": name,
    }
    suffix, file_suffix = fields.pop("suffix"), fields.pop("file_suffix")
    return Published(
        family.model_name.format(size=letter, patch=patch, suffix=suffix),
        family.model_name.format(size=letter, patch=patch, suffix=file_suffix),
        family.hub_url,
        family.hub_file.format(size=letter, patch=patch, suffix=file_suffix),
        fields,
    )


@runtime_checkable
class HasFamily(Protocol):
    """What `of` needs to know of a `vit.ViTConfig`."""

    @property
    def family(self) -> str: ...

    @property
    def own(self) -> dict[str, Any]: ...


def of(config: HasFamily) -> Family:
    """The family of a model, with the values that the model has of its own."""
    family = FAMILIES[config.family]
    return dataclasses.replace(family, **config.own) if config.own else family


def named(name: str) -> Family:
    """The family called `name`.

    Raises:
      ValueError: there is none; names the nearest ones.
    """
    if name not in FAMILIES:
        near = difflib.get_close_matches(str(name), FAMILIES) or sorted(FAMILIES)
        raise ValueError(f"got family {name!r}, expected {' or '.join(near)}")
    return FAMILIES[name]
