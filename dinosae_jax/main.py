"""The one entry point: flags, the distributed start, the config check, the job.

    python -m dinosae_jax.main --config=configs/X.py[:variant] --workdir=DIR [--config.key=value]

Exit codes: 0 done, or saved after SIGTERM; 2 a rule was broken (one line says which; with
DINOSAE_TRACEBACK=1 in the environment, where); 130 Ctrl-C; another one where the run broke. When
one of several processes is lost the others end too, within JAX's heartbeat timeout of 100 s.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, configs/X.py[:variant].")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; the same again goes on.")
JOBS = (
    "train",
    "encode",
    "sample",
    "reconstruct",
    "evaluate",
    "probe",
    "pca",
    "export",
    "convert_images",
    "ablation",
    "bench",
    "plan",
    "paper",
)


# What a person can put right: one line instead of a traceback.
MISTAKES = (ValueError, FileNotFoundError, FloatingPointError, OSError)


def main(argv: Sequence[str]) -> None:
    """Checks the config and runs its job."""
    logging.set_verbosity(logging.WARNING)
    try:
        _run(argv)
    except MISTAKES as error:
        if os.environ.get("DINOSAE_TRACEBACK"):
            raise
        sys.exit(_refuse(error))


def _run(argv: Sequence[str]) -> None:
    from dinosae_jax import rules

    if len(argv) > 1:
        raise ValueError(f"only flags are understood; got {argv[1]!r}; see --help")
    config = _CONFIG.value
    if config.job not in JOBS:
        hint = rules.nearest(config.job, JOBS)
        raise ValueError(f"config.job: {config.job!r} is not known{hint}")
    rules.validate(config)

    import jax

    from dinosae_jax.train import distributed, stopping

    distributed.start(config.compile_cache)
    job = importlib.import_module(f"dinosae_jax.jobs.{config.job}")
    try:
        job.run(config, _WORKDIR.value)
    except stopping.Interrupted as stop:
        if jax.process_index() == 0:
            print(f"{stop}; run the same command again to go on.")
        sys.exit(130 if stop.by_keyboard else 0)
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        explained = isinstance(error, MISTAKES) and not os.environ.get("DINOSAE_TRACEBACK")
        if not explained:
            traceback.print_exc()
        distributed.abandon(_refuse(error) if explained else 1)


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; a mistake becomes one line that names the nearest key."""
    try:
        rest = flags.FLAGS(argv)
        flags.mark_flags_as_required(["config", "workdir"])
        return rest
    except flags.Error as error:
        sys.exit(_refuse(error))
    except (AttributeError, KeyError, TypeError, ValueError, FileNotFoundError) as error:
        if os.environ.get("DINOSAE_TRACEBACK"):
            raise
        sys.exit(_refuse(_explain(argv, error)))


def _explain(argv: Sequence[str], error: Exception) -> Exception:
    """Finds the override that does not exist in the config, if that is what went wrong."""
    from dinosae_jax import rules

    path = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), "")
    file, _, argument = path.partition(":")
    module = re.sub(r"[/\\]", ".", file.removesuffix(".py")).lstrip(".")
    try:
        config = importlib.import_module(module).get_config(argument or None)
    except Exception:
        return error
    for override in (a for a in argv if a.startswith("--config.")):
        name, _, value = override.removeprefix("--config.").partition("=")
        node, seen = config, "config"
        for part in name.split("."):
            if not hasattr(node, "keys") or part not in node:
                hint = rules.nearest(part, node.keys() if hasattr(node, "keys") else ())
                return ValueError(f"{seen} has no key {part!r}{hint}")
            node, seen = node[part], f"{seen}.{part}"
        if not isinstance(node, str) and isinstance(error, (TypeError, ValueError)):
            return ValueError(f"{seen} is a {type(node).__name__}; got {value!r} ({error})")
    return error


def _refuse(error: BaseException) -> int:
    # absl wraps what a config file raises in a traceback; its last line is the message.
    message = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
    print(f"dinosae_jax: {message}", file=sys.stderr)
    return 2


def run() -> None:
    """The console entry."""
    app.run(main, flags_parser=_parse)


if __name__ == "__main__":
    run()
