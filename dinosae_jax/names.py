"""The words that several parts share: roles, vocabularies of the config, shared constants.

Nothing is imported here, jax least of all: `rules` checks a config against these words in less
than a second. The tables of functions that the words name (`flow.samplers.SAMPLERS` and so on) are
typed with them, and `tests/test_names.py` compares each table with its words.
"""

from typing import Literal

PATCH_SIZE = 16  # pixels a side of the patch that a token stands for
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET_TRAIN_IMAGES = 1_281_167

AUTOENCODER_ROLES = ("stem", "vit", "decoder")
ENCODER_ROLES = ("stem", "vit")

Dtype = Literal["auto", "float32", "bfloat16"]
Schedule = Literal["constant", "cosine", "linear"]
Loss = Literal["l1", "lpips", "cosine", "mse", "gan"]
OnMismatch = Literal["refuse", "continue", "restart"]

Crop = Literal["random", "center", "resize_random", "random_resized"]
LatentFormat = Literal["bfloat16", "int8"]
LatentNorm = Literal["layernorm_affine", "layernorm"]
PixelRange = Literal["imagenet", "unit", "symmetric"]

StemKind = Literal["conv", "patch"]
DitModel = Literal["LightningDiT", "DiTDH"]
FlowPath = Literal["geodesic", "linear", "trigonometric", "projected_linear"]
TimeDistribution = Literal["uniform", "logit-normal"]
Jacobi = Literal["", "noise", "data"]
Sampler = Literal[
    "euler_projection", "rodrigues", "geodesic_midpoint", "geodesic_heun", "ab2", "dpm2m"
]

Uint8Conversion = Literal["truncate", "round", "round_signed"]
InceptionResize = Literal["tf1_bilinear", "half_pixel_bilinear"]
