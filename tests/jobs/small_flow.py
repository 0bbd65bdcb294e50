"""The tiny flow at its smallest."""

from configs import rfm_dit


def small_flow(**changes):
    """Two steps of eight images; changes are {dotted field: value}."""
    config = rfm_dit.get_config("tiny")
    config.name = "flow"
    config.steps, config.batch_size = 2, 8
    config.eval.update({"every": 1, "batch_size": 8, "images": 8, "samples": 12})
    config.checkpoint.every, config.log_every = 2, 1
    config.sampling.steps = 4
    config.ema = 0.0  # so that two steps show in what is sampled
    config.model.dit.update({"hidden_size": 32, "depth": 1, "num_heads": 2})
    config.update_from_flattened_dict(changes)
    return config
