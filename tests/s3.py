"""An S3 on the loopback, as a process speaks to it: over HTTP, with credentials from variables."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.fs
import pytest
from moto.server import ThreadedMotoServer

from batchrun.objectstore import client
from batchrun.objectstore.paths import ObjectPath

_numbers = itertools.count()


class S3:
    """A server with one bucket; what it holds outlives `stop`.

    Attributes:
        bucket: The bucket.
    """

    def __init__(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        _, self._port = self._server.get_host_and_port()
        self._system = pyarrow.fs.S3FileSystem(
            access_key="me",
            secret_key="secret",
            region="us-east-1",
            endpoint_override=f"127.0.0.1:{self._port}",
            scheme="http",
            allow_bucket_creation=True,
        )
        self.bucket = ObjectPath(f"s3://rows-{next(_numbers)}")
        self._system.create_dir(self.bucket.parts[0])

    @property
    def variables(self) -> dict[str, str]:
        """What a process needs to find it."""
        return {
            "AWS_ACCESS_KEY_ID": "me",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
        }

    def put(self, name: str, data: bytes = b"") -> ObjectPath:
        """Make an object."""
        path = self.bucket / name
        with self._system.open_output_stream("/".join(path.parts), compression=None) as file:
            file.write(data)
        return path

    def get(self, path: ObjectPath) -> bytes:
        """An object's bytes."""
        with self._system.open_input_file("/".join(path.parts)) as file:
            data: bytes = file.read()
        return data

    def names(self) -> list[str]:
        """What is in the bucket."""
        everything = pyarrow.fs.FileSelector(self.bucket.parts[0], recursive=True)
        found = self._system.get_file_info(everything)
        return sorted(info.path for info in found if info.type == pyarrow.fs.FileType.File)

    def stop(self) -> None:
        """Answer no more."""
        self._server.stop()

    def start(self) -> None:
        """Answer again, at the same address."""
        self._server = ThreadedMotoServer("127.0.0.1", self._port, verbose=False)
        self._server.start()


@contextmanager
def running() -> Iterator[S3]:
    """A server, and this process's variables set to find it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = S3()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.variables.items():
            patch.setenv(name, value)
        client._arrow_system.cache_clear()
        client._answered.clear()
        try:
            yield server
        finally:
            server.stop()
