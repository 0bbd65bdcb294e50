"""What encoder, cache, flow and decoder agree on about latents; saved, and compared at load."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args

from dinosae_jax import encoders, names


@dataclasses.dataclass(frozen=True)
class LatentConvention:
    """The meaning of a latent [b, n, d].

    Attributes:
      tokens: n, the patch tokens of an image.
      width: d, the channels of a token.
      radius: R of the sphere the flow runs on; sqrt(d) by default of the configs.
      decode_radius: token norm that the decoder is given; None until it is measured.
      norm: the encoder's last layer: 'layernorm_affine' (DINOv3) or 'layernorm' (no scale).
      encoder: the encoder and its reading where that is not DINOv3's, see `encoders.reading`.
      pixels: what the decoder emits: 'imagenet' (mean/std normalised), 'unit' (in [0, 1]) or
        'symmetric' (in [-1, 1]).

    Raises:
      ValueError: for counts or radii that are not positive, or unknown names.
    """

    tokens: int
    width: int
    radius: float
    decode_radius: float | None = None
    norm: str = "layernorm_affine"
    pixels: str = "imagenet"
    encoder: str = ""

    def __post_init__(self) -> None:
        """Checks ranges and names."""
        for name in ("tokens", "width", "radius", "decode_radius"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is None and name == "decode_radius":
                continue
            if not number or not 0 < value < math.inf:
                raise ValueError(
                    f"latent convention: {name} must be a positive number; got {value!r}; "
                    "take the encoder's value"
                )
        for name, known in (
            ("norm", get_args(names.LatentNorm)),
            ("pixels", get_args(names.PixelRange)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"latent convention: {name} is one of {', '.join(known)}; got "
                    f"{getattr(self, name)!r}; choose one of these"
                )

    @classmethod
    def of(cls, config: Any, decode_radius: float | None = None) -> LatentConvention:
        """Makes the convention of a training config: an autoencoder's stage or a flow.

        Args:
          config: data.image_size and model; for a flow also flow.
          decode_radius: measured; the config's own where it is None, if it has one.
        """
        width = config.model.vit.embed_dim
        flow = config.get("flow", {})
        return cls(
            tokens=(config.data.image_size // names.PATCH_SIZE) ** 2,
            width=width,
            radius=flow.get("radius") or math.sqrt(width),
            decode_radius=decode_radius or flow.get("decode_radius") or None,
            norm=norm_of(config.model.vit),
            pixels=config.model.pixel_range,
            encoder=encoders.reading(config.model),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON-ready values; without `encoder` where that is DINOv3."""
        fields = dataclasses.asdict(self)
        return fields if self.encoder else {n: v for n, v in fields.items() if n != "encoder"}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> LatentConvention:
        """Rebuilds from `to_dict`.

        Raises:
          ValueError: if a field is missing or unknown.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        given = {*fields, "encoder"}
        if given != known:
            raise ValueError(
                f"latent convention: its fields are {', '.join(sorted(known))}; got missing "
                f"{sorted(known - given)}, unknown {sorted(given - known)}; another version wrote "
                "it, save it again"
            )
        return cls(**fields)

    def check_equal(
        self,
        other: LatentConvention,
        here: str = "this",
        there: str = "other",
        leave_out: tuple[str, ...] = (),
    ) -> None:
        """Compares two conventions; a decode radius that is not measured yet agrees with any.

        Args:
          other: the convention to compare with.
          here: name of this part for the message, such as "flow".
          there: name of the other part, such as "autoencoder".
          leave_out: fields that may differ, such as the radius between a flow and its
            autoencoder, of which nothing depends on it.

        Raises:
          ValueError: one line that names every differing field with both values.
        """
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        differing = [
            f"{name} {_shown(mine[name])} != {_shown(theirs[name])}"
            for name in mine
            if name not in leave_out and not _agree(mine[name], theirs[name])
        ]
        if None in (self.decode_radius, other.decode_radius):
            differing = [line for line in differing if not line.startswith("decode_radius ")]
        if differing:
            raise ValueError(
                f"latent conventions of {here} and {there} must agree; got "
                f"{', '.join(differing)} ({here} != {there}); load parts that were trained together"
            )


def norm_of(vit: Any) -> str:
    """The name of the norm of a config of `model.vit`."""
    return "layernorm" if vit.get("final_norm") == "plain" else "layernorm_affine"


def _shown(value: Any) -> Any:
    return value if value != "" else "dinov3"


def _agree(a: Any, b: Any) -> bool:
    """Whether two values are equal, floats up to float32 rounding."""
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b
