"""Each vocabulary is written once, in `names`; the tables of functions have all its words."""

from typing import get_args

import pytest

from dinosae_jax import names
from dinosae_jax.eval import features, image_quality
from dinosae_jax.flow import matching, samplers
from dinosae_jax.models import autoencoder, registry
from dinosae_jax.perf import card_rows, targets

TABLES = {
    "FlowPath": matching.PATHS,
    "Sampler": samplers.SAMPLERS,
    "Uint8Conversion": image_quality.UINT8_CONVERSIONS,
    "InceptionResize": features.PIPELINES,
    "PixelRange": autoencoder.PIXEL_RANGES,
    "StemKind": registry.CLASSES["stem"],
    "CardRow": card_rows.ROWS,
    "Effort": targets.EFFORT_LEVELS,
    "DitModel": registry.CLASSES["dit"],
}


@pytest.mark.parametrize("vocabulary", TABLES)
def test_a_table_has_the_words_of_its_vocabulary(vocabulary):
    assert set(TABLES[vocabulary]) == set(get_args(getattr(names, vocabulary)))
