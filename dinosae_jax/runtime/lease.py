"""A folder belongs to one run at a time: a lease with its owner and a heartbeat.

The lease is the file `.lease` in the folder. Its owner touches it every `HEARTBEAT` seconds and
removes it at the end. A lease is stale where its process has ended (seen on the same machine at
once), or where it was not touched for `STALE` seconds (seen from another machine, by the clock of
the file system). A stale lease is taken over with a line. Of several processes of one run the first
alone holds it.

In a bucket every change of the lease is a conditional write, which fails where somebody else has
changed it since it was read; a lease that was given back is the empty record `FREE`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath

from dinosae_jax.runtime import agreement, buckets, console, distributed, files, terminal

FILE = ".lease"
HEARTBEAT = 5.0  # seconds
STALE = 60.0  # seconds
FREE = b"{}"  # in a bucket
LOST = 3  # exit code of a run whose folder was taken over

_held: set[str] = set()  # tokens of this process: a chain and its stage may be one folder


@contextlib.contextmanager
def hold(folder: epath.Path) -> Iterator[None]:
    """Holds a folder, made if missing, for this run.

    Raises:
      ValueError: on every process, where another run holds the folder.
      OSError: where the folder cannot be written.
    """
    token: str | None = agreement.from_first(lambda: _take(folder))
    if not token or token not in _held:  # held by an outer lease, or by the first process
        yield
        return
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(folder, token, ended), daemon=True)
    beat.start()
    last_act = functools.partial(release, folder, token)
    terminal.before_end.append(last_act)
    try:
        yield
    finally:
        ended.set()
        beat.join()
        terminal.before_end.remove(last_act)
        _held.discard(token)
        release(folder, token)


def release(folder: epath.Path, token: str) -> None:
    """Removes a lease of this run; one that is somebody else's by now is left alone."""
    path = folder / FILE
    with contextlib.suppress(OSError):
        if not buckets.is_bucket(path):
            if _read(path).get("token") == token:
                path.unlink()
            return
        found, version = buckets.read_version(path)
        if _parse(found).get("token") == token:
            buckets.write_if(path, FREE, version)


def _take(folder: epath.Path) -> str | None:
    """The token of a new lease; None where this process holds the folder already."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    token = uuid.uuid4().hex
    waited = False
    while not _create(path, token):
        try:
            owner = _read(path)
            age = _age(path)
        except FileNotFoundError:
            continue  # released in this moment
        if owner.get("token") == token:
            break  # a conditional write that succeeded, but whose answer was lost
        if owner.get("token") in _held:
            return None
        name = _name(owner)
        ended = _has_ended(owner)
        if ended or age > STALE:
            if _take_over(path, owner, token):
                why = "has ended" if ended else f"gave no sign for {age:.0f} s"
                console.report(f"{folder} is taken over from {name}, which {why}")
                break
            continue
        if ended is None and not waited and age > 2 * HEARTBEAT:  # on another machine, quiet
            console.report(f"{folder} is held by {name}: waiting up to {STALE:.0f} s for a sign")
            waited = True
        if ended is None and waited and age > 2 * HEARTBEAT:
            time.sleep(1.0)
            continue
        raise ValueError(
            f"a workdir belongs to one run at a time; got {folder}, which {name} is using; wait "
            "for it, stop it, or use another --workdir"
        )
    _held.add(token)
    return token


def _owner(token: str) -> dict[str, Any]:
    return {
        "token": token,
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "process_start": _process_start(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def _create(path: epath.Path, token: str) -> bool:
    """Creates a lease, whole or not at all; False where there is one already."""
    owner = json.dumps(_owner(token))
    if buckets.is_bucket(path):
        found, version = buckets.read_version(path)
        return found in (b"", FREE) and buckets.write_if(path, owner.encode(), version)
    partial = path.with_name(f"{FILE}.{token}")
    partial.write_text(owner)
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            with open(path, "x") as file:
                file.write(owner)
        except FileExistsError:
            return False
    finally:
        partial.unlink()
    return True


def _take_over(path: epath.Path, owner: dict[str, Any], token: str) -> bool:
    """Replaces the stale lease of `owner` by ours; False where somebody else was quicker.

    Only who has created the file `.lease.after.<token of the owner>` may replace that owner's
    lease, and looks once more that it is still there: of many that found it stale one goes on.
    """
    if buckets.is_bucket(path):
        found, version = buckets.read_version(path)
        ours = json.dumps(_owner(token)).encode()
        return _parse(found) == owner and buckets.write_if(path, ours, version)
    claim = path.with_name(f"{FILE}.after.{owner.get('token', '')}")
    try:
        if not _create(claim, token):
            if _age(claim) > STALE:  # its maker ended in between
                claim.unlink()
            time.sleep(0.01)
            return False
    except FileNotFoundError:
        return False
    try:
        if _read(path) != owner:
            return False
        files.write_text(path, json.dumps(_owner(token)))
        return True
    except FileNotFoundError:  # released in this moment
        return False
    finally:
        claim.unlink(missing_ok=True)


def _beat(folder: epath.Path, token: str, ended: threading.Event) -> None:
    """Touches the lease until the run ends; ends the run where the lease was taken over."""
    while not ended.wait(HEARTBEAT):
        try:
            owner = _read(folder / FILE)
            if owner.get("token") == token:
                _touch(folder / FILE)
                continue
        except FileNotFoundError:
            owner = {}
        except OSError:
            continue  # a server that is away for a moment
        if ended.is_set():
            return
        if not owner and _create(folder / FILE, token):  # somebody tidied up
            continue
        print(
            f"dinosae_jax: {folder} was taken over by {_name(owner)} while this run gave no sign; "
            "this run ends, and writes nothing more",
            file=sys.stderr,
        )
        distributed.abandon(LOST)


def _touch(path: epath.Path) -> None:
    """Makes the lease look new; in a bucket only where nobody changes it at the same time."""
    if not buckets.is_bucket(path):
        os.utime(path)
        return
    found, version = buckets.read_version(path)
    owner = _parse(found)
    beaten = owner | {"beats": owner.get("beats", 0) + 1}  # a version of its own
    buckets.write_if(path, json.dumps(beaten).encode(), version)  # the next beat sees the result


def _read(path: epath.Path) -> dict[str, Any]:
    if not buckets.is_bucket(path):
        return _parse(path.read_bytes())
    found, version = buckets.read_version(path)
    if version is None:
        raise FileNotFoundError(str(path))
    return _parse(found)


def _parse(text: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except ValueError:
        return {}  # half written, on a file system without links


def _age(path: epath.Path) -> float:
    """Seconds since the lease was touched, both times by the clock of where it is."""
    probe = path.with_name(f"{FILE}.{uuid.uuid4().hex}")
    with buckets.as_oserror(probe):
        probe.write_bytes(b"")
        try:
            return files.modified(probe) - files.modified(path)
        finally:
            probe.unlink()


def _has_ended(owner: dict[str, Any]) -> bool | None:
    """Whether the owner's process has ended; None where that cannot be seen from here."""
    if not owner or owner["machine"] != _machine():
        return None
    start = _process_start(owner["pid"])
    return start is None or start != owner["process_start"]


def _machine() -> str:
    """What tells the process numbers of this machine, or container, from those of others."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _process_start(pid: int) -> str | None:
    """When a process of this machine was started; None where there is none, or only a zombie."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if pathlib.Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "unknown"
    return None if fields[0] in "ZX" else fields[19]


def _name(owner: dict[str, Any]) -> str:
    if not owner:
        return "another run"
    return f"process {owner['pid']} on {owner['host']} (since {owner['since']})"
