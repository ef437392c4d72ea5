"""llama.cpp's `llama-server`, built for this machine's instructions, asked over HTTP.

Continuous batching in 64 slots over one unified KV cache, flash attention, a thread for each core;
weights and KV cache in bfloat16. `--cache-ram 0`: prompts of slots that end are not copied aside.
Twice as many clients as slots keep all slots busy.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measure import main


class LlamaServer:
    """A server with a model, and clients that keep all its slots busy."""

    def __init__(self, model: Path, device: str, options: dict[str, Any]) -> None:
        binary = options.pop("binary")
        slots = options.pop("slots", 64)
        cores = len(os.sched_getaffinity(0))
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self._port = found.getsockname()[1]
        chosen = {
            "--threads": cores,
            "--threads-batch": cores,
            "--parallel": slots,
            "--ctx-size": 65536,
            "--batch-size": 2048,
            "--ubatch-size": 512,
            "--flash-attn": "on",
            "--cache-type-k": "bf16",
            "--cache-type-v": "bf16",
            "--cache-ram": 0,
            **options,
        }
        self.settings = {**chosen, "--kv-unified": True, "--cont-batching": True}
        flags = [str(part) for pair in chosen.items() for part in pair]
        where = ["--model", str(model), "--host", "127.0.0.1", "--port", str(self._port)]
        self._server = subprocess.Popen(
            [binary, *where, "--kv-unified", "--cont-batching", "--no-ui", *flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if not os.environ.get("PEER_LOG") else None,
        )
        self._slots = slots
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
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
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
            wanted = {"prompt": prompt, "n_predict": count, "ignore_eos": True, "temperature": 0}
            status, answer = self._ask("POST", "/completion", {**wanted, "cache_prompt": True})
            if status != 200:
                raise RuntimeError(f"llama-server: {answer}")
            return int(answer["tokens_predicted"])

        # More askers than slots, so that a slot that becomes free finds work waiting.
        with ThreadPoolExecutor(2 * self._slots) as pool:
            return list(pool.map(one, prompts, counts))

    def close(self) -> None:
        """End the server."""
        self._server.terminate()
        self._server.wait()


if __name__ == "__main__":
    main(LlamaServer, [])
