"""llama.cpp's `llama-server`, built for this machine's instructions, asked over HTTP.

- Continuous batching and prompt caching, its defaults; flash attention; a thread for each core.
- Weights in bfloat16; the KV cache in float16, its default: as wide, and its fast attention on a
  CPU (tiles of queries) knows float16 and float32 alone, so bfloat16 there would slow it down.
- 16 slots with 2,048 tokens of KV cache each, room for every workload's sequences, and the best of
  what was tried. 48 mixed rows, completion tokens/s by slots, each with a cache of its own: 8: 88,
  16: 95, 32: 90, 64: 78; over one unified cache, where a sequence's attention walks all the others'
  tokens too, 8: 78, 16: 83, 32: 87.
- `--cache-ram 0`: prompts of slots that end are not copied aside.
- Sampling is top-k with k = 1 alone: greedy, without sorting the vocabulary for other samplers.
- Twice as many clients as slots, and threads for all of them, keep the slots busy.

Prompts are the tokens that all other peers see: the converted model says to add none in front.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measure import main

SLOTS = 16
_CONTEXT = 2048  # tokens of a slot
_GREEDY = {"temperature": 0, "samplers": ["top_k"], "top_k": 1}


class LlamaServer:
    """A server with a model, and clients that keep all its slots busy."""

    def __init__(self, model: Path, device: str, options: dict[str, Any]) -> None:
        binary = options.pop("binary")
        self._slots = options.pop("--parallel", SLOTS)
        cores = len(os.sched_getaffinity(0))
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self._port = found.getsockname()[1]
        self.settings = {
            "--threads": cores,
            "--threads-batch": cores,
            "--parallel": self._slots,
            "--ctx-size": _CONTEXT * self._slots,
            "--flash-attn": "on",
            "--cache-ram": 0,
            "--threads-http": 2 * self._slots + 2,
            **options,
        }
        flags = [str(part) for pair in self.settings.items() for part in pair]
        where = ["--model", str(model), "--host", "127.0.0.1", "--port", str(self._port)]
        how = ["--no-kv-unified", "--no-ui", "--log-verbosity", "1"]  # 1: errors
        self.settings |= {"--no-kv-unified": True, **_GREEDY}
        self._server = subprocess.Popen([binary, *where, *how, *flags])
        while not self._healthy():
            if self._server.poll() is not None:
                raise RuntimeError(f"llama-server ended with {self._server.returncode}")
            time.sleep(0.1)

    def _healthy(self) -> bool:
        try:
            return self._ask("GET", "/health", None)[0] == 200
        except OSError:
            return False

    def _ask(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def run(self, prompts: Sequence[str], counts: Sequence[int]) -> list[int]:
        """Ask for all; answers come in the prompts' order."""

        def one(prompt: str, count: int) -> int:
            wanted = {"prompt": prompt, "n_predict": count, "ignore_eos": True, **_GREEDY}
            status, answer = self._ask("POST", "/completion", wanted)
            if status != 200:
                raise RuntimeError(f"llama-server: {answer}")
            if answer["truncated"]:
                raise RuntimeError("llama-server: a prompt was cut")
            return int(answer["tokens_predicted"])

        # More askers than slots, so that a slot that becomes free finds work waiting.
        with ThreadPoolExecutor(2 * self._slots) as pool:
            return list(pool.map(one, prompts, counts))

    def close(self) -> None:
        """End the server."""
        self._server.terminate()
        self._server.wait()


def built(options: dict[str, Any]) -> dict[str, str]:
    """The version that the server tells of itself."""
    told = subprocess.run(
        [options["binary"], "--version"], capture_output=True, text=True, check=True
    )
    found = re.search(r"version: (.+)", told.stdout + told.stderr)
    return {"llama.cpp": found[1] if found else "unknown"}


if __name__ == "__main__":
    main(LlamaServer, [], built)
