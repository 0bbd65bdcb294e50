"""What the tests of leases on a disk and in a bucket share."""

import subprocess
import sys
import threading

from dinosae_jax.runtime import lease

# Of a run on another machine.
OWNER = {
    "token": "theirs",
    "host": "elsewhere",
    "machine": "other",
    "pid": 7,
    "process_start": "1",
    "since": "yesterday",
}
PRELUDE = "import sys\nfrom dinosae_jax.runtime import files, lease, terminal\n"
HOLD = "with lease.hold(files.path(sys.argv[1])):\n    print('held', flush=True)\n    "


def start(folder, before="", then="input()"):
    """A process that holds a folder, prints 'held' and waits."""
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + before + HOLD + then, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def take_at_once(folder, count):
    """Tokens of those among so many threads that got the folder; they count as given back."""
    barrier, won = threading.Barrier(count), []

    def take():
        barrier.wait()
        try:
            won.append(lease._take(folder))
        except ValueError:
            won.append(None)

    threads = [threading.Thread(target=take) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tokens = set(filter(None, won))
    lease._held.difference_update(tokens)
    return tokens


def ends_when_taken_over(folder, monkeypatch, take_over, heartbeat, seconds):
    """Whether a run that holds the folder ends itself after `take_over`."""
    monkeypatch.setattr(lease, "HEARTBEAT", heartbeat)
    ended = threading.Event()
    monkeypatch.setattr(lease.distributed, "abandon", lambda code: ended.set())
    with lease.hold(folder):
        take_over()
        return ended.wait(seconds)
