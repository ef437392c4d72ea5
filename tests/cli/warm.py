"""Commands that load torch only to look at a model, in forks of a process that has loaded it.

They are the real commands with arguments, folder, environment and streams of their own; what is
spared is three to five seconds of imports each. A run is started anew all the same.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile

_LARGEST = 1 << 20  # bytes of a request
_LOADED = (
    *("batchrun.cli.run", "batchrun.cli.plan", "batchrun.cli.piped", "batchrun.submission"),
    "batchrun.estimate.forecast",
)


class Warm:
    """The process; its first command starts it."""

    def __init__(self) -> None:
        self._held = ExitStack()
        self._socket: socket.socket | None = None

    def run(
        self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> tuple[int, str, str]:
        """Exit code, output and messages of a command."""
        if self._socket is None:
            self._socket = self._started()
        with TemporaryFile() as out, TemporaryFile() as err:
            request = json.dumps([arguments, str(folder), dict(environment)]).encode()
            socket.send_fds(self._socket, [request], [out.fileno(), err.fileno()])
            code = json.loads(self._socket.recv(_LARGEST))
            out.seek(0)
            err.seek(0)
            return code, out.read().decode(), err.read().decode()

    def close(self) -> None:
        """End it."""
        self._held.close()

    def _started(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.cli.warm", str(theirs.fileno())],
                cwd=Path(__file__).parents[2],
                env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
                pass_fds=[theirs.fileno()],
            )
        self._held.callback(process.wait)
        self._held.callback(ours.close)
        return ours


def _serve(requests: socket.socket) -> None:
    for name in _LOADED:
        import_module(name)
    gc.freeze()  # else each fork's collections copy all of torch
    while True:
        request, handles, _, _ = socket.recv_fds(requests, _LARGEST, 2)
        if not request:
            return
        child = os.fork()
        if child == 0:
            requests.close()
            _be_command(*json.loads(request), handles)
        for handle in handles:
            os.close(handle)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        requests.send(json.dumps(code).encode())


def _be_command(
    arguments: list[str], folder: str, environment: dict[str, str], handles: list[int]
) -> None:
    from batchrun.cli import main  # noqa: PLC0415

    for handle, number in zip(handles, (1, 2), strict=True):
        os.dup2(handle, number)
        os.close(handle)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["batchrun", *arguments]
    main()


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
