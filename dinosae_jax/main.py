"""The one entry point: flags, the distributed start, the config check, the job.

    python -m dinosae_jax.main --config=configs/X.py[:variant] --workdir=DIR [--config.key=value]

Exit codes: 0 done, or saved after SIGTERM; 2 a rule was broken (one line says which; with
DINOSAE_TRACEBACK=1 in the environment, where); 130 Ctrl-C; another one where the run broke. When
one of several processes is lost the others end too, within JAX's heartbeat timeout of 100 s.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import pathlib
import pkgutil
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from dinosae_jax import jobs
from dinosae_jax.runtime import terminal

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, configs/X.py[:variant].")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; the same again goes on.")
JOBS = tuple(module.name for module in pkgutil.iter_modules(jobs.__path__))


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
    for flag, example in ((_CONFIG, "configs/quickstart.py"), (_WORKDIR, "runs/quickstart")):
        if not flag.value:
            raise ValueError(f"--{flag.name} is needed; got none; as in --{flag.name}={example}")
    workdir = pathlib.Path(str(_WORKDIR.value)).expanduser()
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir names a folder; got {workdir}, a file; name another one")
    config = _CONFIG.value
    if config.job not in JOBS:
        hint = rules.nearest(config.job, JOBS)
        raise ValueError(f"config.job: {config.job!r} is not known{hint}")
    rules.validate(config)

    import jax

    from dinosae_jax.runtime import distributed, stopping

    distributed.start(config.compile_cache)
    job = importlib.import_module(f"dinosae_jax.jobs.{config.job}")
    try:
        job.run(config, workdir)
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
        _check_config_file(_flags_in(argv).get("config", ""))
        return flags.FLAGS(argv)
    except SystemExit:
        sys.exit(0)  # the help was shown, which absl counts as a failure
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, *MISTAKES) as error:
        if os.environ.get("DINOSAE_TRACEBACK"):
            raise
        sys.exit(_refuse(_explain(argv, error)))


def _check_config_file(value: str) -> None:
    """Raises ValueError where `--config` names no file (absl says so late and less clearly)."""
    from dinosae_jax import rules

    file = value.partition(":")[0]
    if file and not pathlib.Path(file).is_file():
        known = [str(path) for path in pathlib.Path("configs").glob("*.py")]
        hint = rules.nearest(file, known) if known else "; start in the folder that holds configs/"
        raise ValueError(f"--config names a config file; got {file!r}{hint}")


def _explain(argv: Sequence[str], error: Exception) -> Exception:
    """Finds the override that does not exist in the config or fit it, if that went wrong."""
    given = _flags_in(argv)
    file, _, argument = given.get("config", "").partition(":")
    try:
        spec = importlib.util.spec_from_file_location("config", file)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        config = module.get_config(argument or None)
    except Exception:
        return error
    for name, value in given.items():
        if name.startswith("config."):
            wrong = _wrong_override(config, name, value, error)
            if wrong:
                return wrong
    return error


def _flags_in(argv: Sequence[str]) -> dict[str, str]:
    """Flag -> value, from `--flag=value` and `--flag value`."""
    found = {}
    for here, following in zip(argv, [*argv[1:], ""], strict=True):
        if here.startswith("-"):
            name, equals, value = here.lstrip("-").partition("=")
            found[name] = value if equals else following
    return found


def _wrong_override(config: Any, name: str, value: str, error: Exception) -> Exception | None:
    """What is wrong with `--config.a.b=value`, or None."""
    from dinosae_jax import rules

    *parents, last = name.split(".")[1:]
    node, seen = config, "config"
    for part in (*parents, last):
        keys = list(node.keys()) if hasattr(node, "keys") else []
        if part not in keys:
            return ValueError(f"{seen} has no key {part!r}{rules.nearest(part, keys)}")
        node, seen = node[part], f"{seen}.{part}"
    if hasattr(node, "keys"):
        return ValueError(
            f"{seen} is a group of fields; got {value!r}; set one, --{seen}.{next(iter(node))}=..."
        )
    rejected = isinstance(error, flags.IllegalFlagValueError) and f"--{name}=" in str(error)
    if rejected or isinstance(error, TypeError):
        return ValueError(f"{seen} takes {type(node).__name__}; got {value!r}; as in {node!r}")
    return None


def _refuse(error: BaseException) -> int:
    # absl wraps what a config file raises in a traceback; its last line is the message.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    message = lines[-1].strip().removeprefix("ValueError: ")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        message += "; what was saved before is whole: free some space, run the same command again"
    print(f"dinosae_jax: {message}", file=sys.stderr)
    return 2


def run() -> None:
    """The console entry."""
    terminal.end_on_keyboard()
    terminal.outlive_readers()
    terminal.quiet_libraries()
    app.run(main, flags_parser=_parse)


if __name__ == "__main__":
    run()
