"""The keys of `data.augment`: how the views of an image differ from it. Importing this imports nothing that computes."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, model_validator

from trainer.mistakes import Mistake
from trainer.recipe.faults import Entry

Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(gt=0, le=10)]


class RandomResizedCrop(Entry):
    """A random part of the whole picture, resized to the input (Szegedy et al. 2015).

    Attributes:
        scale: Least and greatest share of the picture's area.
        ratio: Least and greatest ratio of its width to its height, over that of the input. A part that would not fit
            in the picture is made smaller.

    With `resize_mode: squash` the ratio is over that of the picture, and the part is stretched as the images are that are
    measured. With `pad` it is a part of the picture with its background, and shows as much of the picture as it can.

    Acted on by `data.crops`.
    """

    model_config = ConfigDict(frozen=True)

    scale: tuple[Share, Share] = (0.35, 1.0)
    ratio: tuple[Ratio, Ratio] = (0.75, 1.33)

    @model_validator(mode="after")
    def _in_order(self) -> "RandomResizedCrop":
        for name in ("scale", "ratio"):
            least, greatest = getattr(self, name)
            if least > greatest:
                raise Mistake(f"{name}: got [{least:g}, {greatest:g}]; the smaller number comes first")
        return self


class RandAugment(Entry):
    """So many operations of a list, drawn for each image, all of one strength (Cubuk et al. 2020).

    Attributes:
        ops: How many.
        magnitude: The strength, 0 to 30.

    Acted on by `data.policies`.
    """

    model_config = ConfigDict(frozen=True)

    ops: Annotated[int, Field(ge=1, le=14)] = 2
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9


class Augment(Entry):
    """Augmentation: how the views of an image differ from it. Amounts are uniform at random; everything is off by default.

    Pixels from outside the image are 0. Interpolation is bilinear; `shift` and `flip` alone are exact. `light` and
    `strong` stand for settings that suit photographs (`recipe.augment.NAMED`).

    Acted on by `data.views`.
    """

    model_config = ConfigDict(frozen=True)

    flip: bool = Field(False, description="mirror left and right, with probability 1/2")
    shift: NonNegativeInt = Field(0, description="largest shift in each direction, in whole pixels")
    rotate: Annotated[float, Field(ge=0, le=180)] = Field(
        0.0, description="largest angle in either direction, in degrees"
    )
    scale: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="0.1: between 0.9 and 1.1 times the size"
    )
    shear: Annotated[float, Field(ge=0, le=60)] = Field(
        0.0, description="largest angle either way, in degrees"
    )
    elastic: NonNegativeFloat = Field(
        0.0,
        description="largest shift of the 4 x 4 control points of a smooth warp in each direction, in pixels",
    )
    brightness: Fraction = Field(0.0, description="0.2: values times a factor between 0.8 and 1.2")
    contrast: Fraction = Field(
        0.0, description="0.2: distance from the image's mean times a factor between 0.8 and 1.2"
    )
    erase: Fraction = Field(
        0.0,
        description="fraction of the images in which a rectangle is set to 0, of 2 to 33 % of the area "
        "and with sides in a ratio of 0.3 to 3.3 (Zhong et al. 2020)",
    )
    random_resized_crop: RandomResizedCrop | None = Field(
        None, description="a random part of the whole picture, resized to the input; {} for the default part"
    )
    saturation: Fraction = Field(
        0.0, description="0.2: distance from the grey image times a factor between 0.8 and 1.2"
    )
    hue: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.0, description="largest turn of the hues in either direction, as a fraction of the colour circle"
    )
    grayscale: Fraction = Field(0.0, description="fraction of the images that lose their colour")
    blur: NonNegativeFloat = Field(
        0.0, description="largest standard deviation of a Gaussian blur, in pixels"
    )
    rand_augment: RandAugment | None = Field(
        None, description="several operations of a list, drawn for each image; {} for the paper's numbers"
    )
    trivial_augment: bool = Field(
        False, description="one operation of a list, of a random strength (Müller and Hutter 2021)"
    )

    @model_validator(mode="after")
    def _one_policy(self) -> "Augment":
        if self.rand_augment is not None and self.trivial_augment:
            raise Mistake(
                "rand_augment and trivial_augment draw from the same operations: one of them is allowed"
            )
        return self

    def facts(self) -> dict[str, Any]:
        """Returns the settings that views depend on. Those that came later are left out while they are off, so that
        what earlier versions kept is still found."""
        return self.model_dump(exclude={name for name in _LATER if not getattr(self, name)})


_LATER = (
    "random_resized_crop",
    "saturation",
    "hue",
    "grayscale",
    "blur",
    "rand_augment",
    "trivial_augment",
)

# RESULTS, "Views of photographs", says what is known of them.
NAMED = {
    "light": Augment(flip=True, random_resized_crop=RandomResizedCrop(), brightness=0.2, contrast=0.2),
    "strong": Augment(
        flip=True, random_resized_crop=RandomResizedCrop(scale=(0.2, 1.0)), trivial_augment=True, erase=0.25
    ),
}


def _named(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    if given not in NAMED:
        raise Mistake(f"got {given!r}; light, strong or a mapping of settings is allowed")
    return NAMED[given]


AugmentKey = Annotated[
    Augment, BeforeValidator(_named, json_schema_input_type=Literal["light", "strong"] | Augment)
]
