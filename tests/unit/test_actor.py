"""A worker's guard: a process that takes too much memory, or that a decoder blocks whole, ends itself."""

import os
import subprocess
import sys

import pytest

from dragonclf.data import images
from tests import codec

GUARDED = """
import sys, threading
from dragonclf.data import images
from dragonclf.engine import image_work
threading.Thread(target=image_work._guard, args=(int(sys.argv[1]), float(sys.argv[2])), daemon=True).start()
print(images.decode(sys.stdin.buffer.read()).shape)
"""
MIB = 2**20


@pytest.mark.parametrize(
    ("data", "max_s", "said"),
    [
        (codec.picture("eat", mib=1024), "30", "this worker takes"),
        (codec.picture("hold"), "1", "Timeout (0:00:02)!"),
    ],
    ids=["memory", "lock"],
)
def test_it_ends_a_process_that_cannot_help_itself(data: bytes, max_s: str, said: str):
    ended = subprocess.run(
        [sys.executable, "-c", GUARDED, str(1024 * MIB), max_s],
        input=data,
        env=os.environ | codec.ENVIRONMENT,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (1, b"")
    assert said in ended.stderr.decode()


def test_it_lets_others_be():
    ended = subprocess.run(
        [sys.executable, "-c", GUARDED, str(1024 * MIB), "30"],
        input=codec.picture("eat", mib=64),
        env=os.environ | codec.ENVIRONMENT,
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert ended.stdout.decode().strip() == str(images.decode(codec.picture("fine")).shape)
