"""The one entry point: flags, the config check, what is missing, the distributed start, the job.

    python -m dinosae_jax.main --config=configs/X.py[:variant] [--workdir=DIR] [--config.key=value]

`dinosae` is the same command where the package is installed. `configs/X.py` is a file here, or one
that came with the package. Without `--workdir` a run goes to runs/X, or runs/X_variant.

Exit codes: 0 done, or saved after SIGTERM; 2 a rule was broken (one line says which; with
DINOSAE_TRACEBACK=1 in the environment, where) or something is missing (numbered commands make it);
130 Ctrl-C; any other code where the run broke. When one of several processes is lost the others end
too, within JAX's heartbeat timeout of 100 s.
"""

from __future__ import annotations

from dinosae_jax.runtime import terminal

if __name__ == "__main__":
    terminal.end_on_keyboard()  # before the imports that take time

import contextlib
import difflib
import errno
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, configs/X.py[:variant].")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Output folder, runs/X where not given. Run again with it to resume."
)

# Jobs that use no device of their own: `plan` compiles for others, `card` starts processes.
DEVICELESS = ("plan", "card")
OUR_FLAGS = ("config", "workdir", "help")
# Errors that the user can fix: one line instead of a traceback.
MISTAKES = (ValueError, FileNotFoundError, FloatingPointError, OSError)


def main(argv: Sequence[str]) -> None:
    """Checks the config and runs its job."""
    logging.set_verbosity(logging.WARNING)
    try:
        _run(argv)
    except Exception as error:
        if not _is_mistake(error) or os.environ.get("DINOSAE_TRACEBACK"):
            raise
        sys.exit(_refuse(error))


def _is_mistake(error: BaseException) -> bool:
    """Whether one line tells what the user can do; also of what a bucket's library raises."""
    from dinosae_jax.runtime import buckets

    return isinstance(error, MISTAKES) or buckets.is_failure(error)


def _adopt_model(config: ml_collections.ConfigDict) -> list[str]:
    """Gives a flow the model of its autoencoder; flags of the command line come first."""
    from dinosae_jax.runtime import files

    of_a_flow = config.job == "train" and "flow" in config and config.init_from
    if not of_a_flow or not files.path(config.init_from).exists():  # which `preflight` tells
        return []
    from dinosae_jax.weights import weight_source

    explicit = config_flags.get_override_values(flags.FLAGS["config"])
    return weight_source.adopt_model(config, explicit)


def _run(argv: Sequence[str]) -> None:
    from dinosae_jax import config as config_lib
    from dinosae_jax import config_files, preflight, rules
    from dinosae_jax.runtime import buckets, files

    if len(argv) > 1:
        raise ValueError(f"only flags are understood; got {argv[1]!r}; see --help")
    if not _CONFIG.value:
        raise ValueError("--config is needed; got none; as in --config=configs/quickstart.py")
    config = _CONFIG.value
    config_lib.expand_home(config)
    adopted = _adopt_model(config)
    rules.validate(config)
    named = flags.FLAGS["config"].config_filename  # type: ignore[attr-defined]
    given = _WORKDIR.value or config_files.default_workdir(named)
    rules.check_url("--workdir", given)
    workdir = files.path(given)
    buckets.require(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir names a folder; got {workdir}, a file; name another one")
    preflight.check(config, workdir, sys.argv)

    import jax

    from dinosae_jax.runtime import console, distributed, lease, stopping

    distributed.start()
    if config.job not in DEVICELESS:
        distributed.require_devices()
        if not _WORKDIR.value:
            console.report(f"This run's folder is {workdir} (--workdir names another)")
    distributed.keep_programs(config.compile_cache)
    if adopted:
        console.report(f"From init_from={config.init_from}: {', '.join(adopted)}")
    job = importlib.import_module(f"dinosae_jax.jobs.{config.job}")
    try:
        with contextlib.nullcontext() if config.job in DEVICELESS else lease.hold(workdir):
            job.run(config, workdir)
    except stopping.Interrupted as stop:
        if jax.process_index() == 0:
            print(f"{stop}; run the same command again to resume.")
        sys.exit(130 if stop.by_keyboard else 0)
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        explained = _is_mistake(error) and not os.environ.get("DINOSAE_TRACEBACK")
        if not explained:
            traceback.print_exc()
        distributed.abandon(_refuse(error) if explained else 1)


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; a mistake becomes one line that names the nearest key."""
    from dinosae_jax import config_files

    try:
        value = _flags_in(argv).get("config", "")
        if value:
            file, colon, variants = value.partition(":")
            path = config_files.find(file)
            config_files.open_package(path)
            argv = _replace_flag(argv, "config", f"{path}{colon}{variants}")
        return flags.FLAGS(argv)
    except SystemExit:
        sys.exit(0)  # the help was shown, which absl counts as a failure
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, *MISTAKES) as error:
        if os.environ.get("DINOSAE_TRACEBACK"):
            raise
        sys.exit(_refuse(_explain(argv, error)))


def _explain(argv: Sequence[str], error: Exception) -> Exception:
    """What was wrong with the flags, in one line: one that does not exist, or does not fit."""
    given = _flags_in(argv)
    file, _, argument = given.get("config", "").partition(":")
    config = None
    if file:
        try:
            config = _load(file, argument)
        except Exception:
            return ValueError(_last_line(error))
    for name, value in given.items():
        wrong = (
            _wrong_override(config, name, value, error)
            if name.startswith("config.") and config is not None
            else _wrong_flag(config, name)
        )
        if wrong:
            return wrong
    return ValueError(_last_line(error))


def _load(file: str, argument: str) -> Any:
    spec = importlib.util.spec_from_file_location("config", file)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module.get_config(argument or None)


def _flags_in(argv: Sequence[str]) -> dict[str, str]:
    """Flag -> value, from `--flag=value` and `--flag value`."""
    found = {}
    for here, following in zip(argv, [*argv[1:], ""], strict=True):
        if here.startswith("-"):
            name, equals, value = here.lstrip("-").partition("=")
            found[name] = value if equals else following
    return found


def _replace_flag(argv: Sequence[str], name: str, value: str) -> list[str]:
    """The arguments with `--name` given once more, at its first place, with another value."""
    bare = (f"--{name}", f"-{name}")
    found, position = [], 0
    while position < len(argv):
        here = argv[position]
        if here in bare:
            found += [here, value]
            position += 1
        else:
            joined = here.startswith(tuple(f"{flag}=" for flag in bare))
            found.append(f"--{name}={value}" if joined else here)
        position += 1
    return found


def _wrong_flag(config: Any, name: str) -> Exception | None:
    """What is wrong with a flag outside the config, or None."""
    from dinosae_jax import spelling

    head, dot, rest = name.partition(".")
    if not head.isidentifier() or head in flags.FLAGS or head.removeprefix("no") in flags.FLAGS:
        return None
    close = difflib.get_close_matches(head, OUR_FLAGS, n=1, cutoff=0.7)
    meant = f"--{close[0]}{dot}{rest}" if close else None
    if config is not None and not meant:
        meant = spelling.nearest_flag(config, name)
    return ValueError(
        f"--{name} is not a flag; {f'did you mean {meant}?' if meant else 'see --help'}"
    )


def _wrong_override(config: Any, name: str, value: str, error: Exception) -> Exception | None:
    """What is wrong with `--config.a.b=value`, or None."""
    from dinosae_jax import spelling

    key = name.removeprefix("config.")
    node, seen = config, "config"
    for part in key.split("."):
        keys = list(node.keys()) if hasattr(node, "keys") else []
        if part not in keys:
            return ValueError(f"{seen} has no key {part!r}{spelling.nearest_key(config, key)}")
        node, seen = node[part], f"{seen}.{part}"
    if hasattr(node, "keys"):
        return ValueError(
            f"{seen} is a group of fields; got {value!r}; set one, --{seen}.{next(iter(node))}=..."
        )
    rejected = isinstance(error, flags.IllegalFlagValueError) and f"--{name}=" in str(error)
    if rejected or isinstance(error, TypeError):
        return ValueError(f"{seen} takes {type(node).__name__}; got {value!r}; as in {node!r}")
    return None


def _last_line(error: BaseException) -> str:
    """The message of an error that absl may have wrapped in a traceback: its last line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip().removeprefix("ValueError: ")


def _refuse(error: BaseException) -> int:
    """Prints an error that the user can fix: every missing input, or one line for other errors."""
    from dinosae_jax import preflight
    from dinosae_jax.runtime import buckets

    message = str(error) if isinstance(error, preflight.Missing) else _last_line(error)
    if buckets.is_failure(error) and getattr(error, "errno", None) is None:
        message = buckets.one_sentence(error)
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
