"""Output decides nothing, and Ctrl-C ends at once with one line."""

import signal
import subprocess
import sys
import time

import pytest

# A shell's job in the background is born with Ctrl-C ignored, and so are its children.
PRELUDE = (
    "import signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from dinosae_jax.runtime import terminal\n"
)


def start(code, **options):
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_reader_that_goes_away_ends_nothing():
    process = start(
        "terminal.outlive_readers()\n"
        "for number in range(20000): print('line', number, flush=number % 7 == 0)\n"
        "sys.exit(3)"
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 3
    assert process.stderr.read() == ""


def test_a_full_disk_under_the_output_ends_nothing():
    with open("/dev/full", "w") as full:
        code = "terminal.outlive_readers(); print('x', flush=True); sys.exit(3)"
        process = subprocess.Popen([sys.executable, "-c", PRELUDE + code], stdout=full, stderr=full)
        assert process.wait(timeout=60) == 3


@pytest.mark.parametrize("swallowing", [False, True])
def test_ctrl_c_is_one_line(swallowing):
    loop = "    while True: time.sleep(0.01)\n"
    if swallowing:  # as callbacks of other libraries do
        loop = (
            "    while True:\n        try: time.sleep(0.01)\n        except BaseException: pass\n"
        )
    process = start("terminal.end_on_keyboard(); print('ready', flush=True)\nif True:\n" + loop)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert process.stderr.read() == " stopped; what was finished is kept\n"
