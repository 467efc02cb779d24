"""A codec that misbehaves, for processes started with this folder on PYTHONPATH: a PNG says in a text chunk how to treat its decoder."""

import os
import re
import signal
import time

from PIL import PngImagePlugin

_load = PngImagePlugin.PngImageFile.load


def load(self: PngImagePlugin.PngImageFile):
    how = self.info.get("test-codec")
    if how == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "eat":
        eaten = [bytearray(os.urandom(1) * (32 * 2**20)) for _ in range(int(self.info["test-mib"]) // 32)]
        time.sleep(len(eaten) / 16)
        del eaten
    if how == "hang":
        time.sleep(3600)
    if how == "hold":
        re.match(r"(a+)+$", "a" * 64 + "b")  # for longer than anyone lives, with the interpreter's lock
    return _load(self)


PngImagePlugin.PngImageFile.load = load
