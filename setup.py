"""The packages of the wheel: the code, and the config files under `dinosae_jax/share/configs`.

Everything else stands in pyproject.toml, which can either find packages or map one to another
folder, not both.
"""

from setuptools import find_packages, setup

CONFIGS = "dinosae_jax.share.configs"
setup(
    packages=[*find_packages(include=["dinosae_jax*", "weights_conversion*"]), CONFIGS],
    package_dir={CONFIGS: "configs"},
    package_data={"dinosae_jax": ["py.typed"]},
)
