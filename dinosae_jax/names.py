"""The words that several parts share: roles, vocabularies of the config, shared constants.

Nothing is imported here, jax least of all: `rules` checks a config against these words in less
than a second. The tables of functions that the words name (`flow.samplers.SAMPLERS` and so on) are
typed with them, and `tests/test_names.py` compares each table with its words.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

PATCH_SIZE = 16  # pixels per side of a token's patch
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET_TRAIN_IMAGES = 1_281_167

SCHEMES = {"gs": "gcsfs", "s3": "s3fs"}  # of buckets, and the package that each needs

AUTOENCODER_ROLES = ("stem", "vit", "decoder")
ENCODER_ROLES = ("stem", "vit")

Dtype = Literal["auto", "float32", "bfloat16"]
MatmulPrecision = Literal["auto", "default", "high", "highest"]
Schedule = Literal["constant", "cosine", "linear"]
Loss = Literal["l1", "lpips", "cosine", "mse", "gan"]
OnMismatch = Literal["refuse", "continue", "restart"]

Crop = Literal["random", "center", "resize_random", "random_resized"]
LatentFormat = Literal["bfloat16", "int8"]
LatentNorm = Literal["layernorm_affine", "layernorm"]
PixelRange = Literal["imagenet", "unit", "symmetric"]

StemKind = Literal["conv", "patch"]
DecoderKind = Literal["conv", "vit"]
Encoder = Literal[
    "dinov3",
    "dinov2",
    "siglip2",
    "mae",
    "eupe",
    "rae_dinov2",
    "rae_siglip2",
    "rae_mae",
    "raev2_dinov3",
    "raev2_dinov2",
    "raev2_siglip2",
    "raev2_eupe",
]
Positions = Literal["rope", "learned", "sincos"]
Resize = Literal["bicubic", "bicubic_antialias", "bilinear", "bilinear_antialias"]
TableResize = Literal["bicubic", "bicubic_antialias", "bicubic_offset"]
DitModel = Literal["LightningDiT", "DiTDH"]
FlowPath = Literal["geodesic", "linear", "trigonometric", "projected_linear"]
TimeDistribution = Literal["uniform", "logit-normal"]
Jacobi = Literal["", "noise", "data"]
Sampler = Literal[
    "euler_projection", "rodrigues", "geodesic_midpoint", "geodesic_heun", "ab2", "dpm2m"
]

CardRow = Literal[  # of configs/bench.py:card, in the order in which they are measured
    "rfm_dit",
    "rfm_ddt",
    "sample_dit",
    "encode",
    "attention",
    "heads",
    "bias",
    "loader",
    "sae_stage1",
    "sae_stage2",
    "repeat_dit",
    "repeat_sae",
    "sample_ddt",
    "sae_stage3",
    "sae_stage4",
]
CARD_ROWS: tuple[CardRow, ...] = get_args(CardRow)
Effort = Literal["default", "O0", "O1", "O2", "O3"]  # XLA's levels of optimisation
Uint8Conversion = Literal["truncate", "round", "round_signed"]
InceptionResize = Literal["tf1_bilinear", "half_pixel_bilinear"]


class Conversion(NamedTuple):
    """How the weights of a published network are converted.

    Attributes:
      network: its name, for messages.
      kind: of `weights_conversion.convert`.
      files: as their authors name them.
      folder: where the documentation puts the result.
    """

    network: str
    kind: str
    files: str
    folder: str

    def command(self, files: str = "", folder: str = "") -> str:
        """The command line, of other files or into another folder where they are given."""
        return (
            f"python -m weights_conversion.convert --kind={self.kind} "
            f"--input={files or self.files} --output={folder or self.folder}"
        )


ENCODER_CONVERSIONS = {  # kind of an encoder -> its conversion, in the place of DINOv3's
    "dinov2": Conversion("DINOv2 ViT", "dinov2", "model.safetensors", "weights/dinov2"),
    "siglip2": Conversion("SigLIP2 ViT", "siglip2", "model.safetensors", "weights/siglip2"),
    "mae": Conversion("MAE ViT", "mae", "model.safetensors", "weights/mae"),
    "eupe": Conversion("EUPE ViT", "eupe", "EUPE-ViT-B.pt", "weights/eupe"),
}
CONVERSIONS = {  # field of config.weights ->
    "vit": Conversion(
        "DINOv3 ViT", "dinov3", "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth", "weights/dinov3"
    ),
    "lpips": Conversion(
        "LPIPS VGG16", "lpips_vgg16", "vgg16-397923af.pth,vgg.pth", "weights/lpips"
    ),
    "dino": Conversion(
        "DINO discriminator backbone",
        "dino_discriminator",
        "dino_deitsmall8_pretrain.pth",
        "weights/dino",
    ),
    "inception": Conversion(
        "FID's Inception",
        "inception_fid",
        "pt_inception-2015-12-05-6726825d.pth",
        "weights/inception",
    ),
    "efficientnet": Conversion(
        "EfficientNet-Lite0",
        "efficientnet_lite0",
        "efficientnet-lite0.pth",
        "weights/efficientnet",
    ),
}
