"""The child process that serves: waited for, explained when it dies, stopped with all that it has started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ports import free_port
from preskip import PreskipError
from preskip.serve import server

# Starts a child of its own, answers /health, and ends by itself after as many answers as it is told.
ENGINE = """
import http.server, os, signal, subprocess, sys
port, answers, stubborn, children = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "stubborn", sys.argv[4]
if stubborn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal, sys; print('ready', flush=True); signal.pause()"],
                         stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
open(children, "w").write(str(child.pid))
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
print("INFO 11-29 02:20:34 [x.py:1] listening", flush=True)
listening = http.server.HTTPServer(("127.0.0.1", port), Answer)
for _ in range(answers):
    listening.handle_request()
"""


def engine(tmp_path, *, answers=1000, kind="plain") -> tuple[list[str], str, Path]:
    """Command, health check and the file with the child's pid."""
    port = free_port()
    arguments = [sys.executable, "-c", ENGINE, str(port), str(answers), kind, str(tmp_path / "child")]
    return arguments, f"http://127.0.0.1:{port}/health", tmp_path / "child"


@pytest.mark.parametrize("kind", ["plain", "stubborn"])
def test_all_that_a_server_has_started_ends_with_it(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "GRACE", 30.0 if kind == "plain" else 0.5)
    arguments, url, child = engine(tmp_path, kind=kind)
    notes = []
    with server.running(arguments, tmp_path / "log") as process:
        server.wait(process, tmp_path / "log", url, notes.append)
        pid = int(child.read_text())
        assert psutil.pid_exists(pid)
        assert server.is_healthy(url)
    assert process.returncode is not None
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert not server.is_healthy(url)
    assert server.last_line(tmp_path / "log") == "listening"


def test_a_proxy_of_the_environment_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    arguments, url, _ = engine(tmp_path)
    with server.running(arguments, tmp_path / "log"):
        for _ in range(100):
            if server.is_healthy(url):
                break
            time.sleep(0.2)
        else:
            pytest.fail("the server was asked through the proxy")


def test_an_error_in_the_block_ends_the_server_too(tmp_path):
    arguments, url, _ = engine(tmp_path)

    def interrupted(note):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), server.running(arguments, tmp_path / "log") as process:
        server.wait(process, tmp_path / "log", url, interrupted)
    assert process.returncode is not None


def test_ctrl_c_at_the_moment_of_its_start_ends_the_server_too(tmp_path, monkeypatch):
    started = []

    def start(*arguments, **options):
        started.append(popen(*arguments, **options))
        signal.raise_signal(signal.SIGINT)  # before anything here knows of the process
        return started[-1]

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    before = signal.getsignal(signal.SIGTERM)
    arguments, *_ = engine(tmp_path)
    own = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test before may have left another
    try:
        with pytest.raises(KeyboardInterrupt), server.running(arguments, tmp_path / "log"):
            raise AssertionError("the block was entered")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, own)
    assert started[0].returncode is not None
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_ctrl_c_waits_until_all_has_ended(tmp_path, monkeypatch):
    """It comes while a stubborn engine has its time to go."""
    monkeypatch.setattr(server, "GRACE", 0.5)
    arguments, url, child = engine(tmp_path, kind="stubborn")
    own = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test before may have left another
    try:
        with server.running(arguments, tmp_path / "log") as process:
            server.wait(process, tmp_path / "log", url, lambda note: None)
            pid = int(child.read_text())
            wait = process.wait

            def interrupted(*args):
                monkeypatch.setattr(process, "wait", wait)
                signal.raise_signal(signal.SIGINT)
                return wait(*args)

            monkeypatch.setattr(process, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                server.stop(process)
            assert process.returncode == -signal.SIGKILL
            assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    finally:
        signal.signal(signal.SIGINT, own)


def test_an_ignored_signal_hides_none_that_comes_after_it(monkeypatch):
    own = {signal.SIGHUP: signal.SIG_IGN, signal.SIGINT: signal.default_int_handler}
    own = {number: signal.signal(number, handler) for number, handler in own.items()}
    try:
        release = server._hold_signals()
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            release()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in own.items():
            signal.signal(number, handler)


def test_a_server_that_dies_says_why_in_one_line(tmp_path):
    code = (
        "print('(EngineCore pid=8) ERROR 11-29 02:37:15 [core.py:9] ValueError: not enough memory for the cache')\n"
        "raise RuntimeError('Engine core initialization failed. See root cause above.')"
    )
    arguments = [sys.executable, "-c", code]
    with (
        pytest.raises(PreskipError, match="ended before it answered: ValueError: not enough memory for the") as error,
        server.running(arguments, tmp_path / "log") as process,
    ):
        server.wait(process, tmp_path / "log", "http://127.0.0.1:9/health", lambda note: None)
    assert str(tmp_path / "log") in str(error.value)
    assert "\n" not in str(error.value)


def test_an_option_that_the_engine_refuses_is_said(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "Traceback (most recent call last):\n"
        "(APIServer pid=7) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "(APIServer pid=7)   Value error, max_model_len (4096) is greater than 512. [type=value_error]\n"
        "(APIServer pid=7)     For further information visit https://errors.pydantic.dev\n"
    )
    assert server.reason_in(log) == f"ValueError: Value error, max_model_len (4096) is greater than 512. (log: {log})"
    log.write_text(
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for CacheConfig\n"
        "block_size\n  Input should be 16 or 32 [type=literal_error, input_value=7]\n"
    )
    assert server.reason_in(log) == f"ValueError: block_size; Input should be 16 or 32 (log: {log})"


def test_a_port_in_use_and_too_little_memory_are_refused(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PreskipError, match=rf"port {port} of 127.0.0.1 cannot be used \(Address already in use\)"):
            server.check_port("127.0.0.1", port)
    server.check_port("127.0.0.1", port)
    for host in ("no such host", "192.0.2.1"):
        with pytest.raises(PreskipError, match=f"--host {host} is unknown, or no address of this machine"):
            server.check_port(host, port)
    server.check_memory(1 << 20, "cpu", "vllm")
    with pytest.raises(PreskipError, match=r"the weights take 1024\.0 GiB and .* GiB of cpu memory are free"):
        server.check_memory(1 << 40, "cpu", "vllm")


def test_weights_are_held_against_the_gpus_that_share_them(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda place=0: (3 << 30, 4 << 30))
    server.check_memory(5 << 30, "cuda", "transformers")
    server.check_memory(2 << 30, "cuda", "vllm")
    for more in ([], ["--max-model-len", "4096"]):
        with pytest.raises(PreskipError, match=r"the weights take 5\.0 GiB and 3\.0 GiB of cuda memory are free"):
            server.check_memory(5 << 30, "cuda", "vllm", more)
    for more in ("--tensor-parallel-size 2", "-tp 2", "--pipeline_parallel_size=2", "--quantization fp8"):
        server.check_memory(5 << 30, "cuda", "vllm", more.split())


def test_commands_and_environment(monkeypatch):
    more = {"host": "::1", "port": 1, "name": "n", "dtype": "bfloat16", "more": ["--max-model-len", "8"]}
    vllm = server.command("vllm", Path("/c"), device="cpu", **more)
    assert vllm[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert "--enforce-eager" in vllm
    assert vllm[-2:] == ["--max-model-len", "8"]
    assert "--enforce-eager" not in server.command("vllm", Path("/c"), device="cuda", **more)
    assert server.command("transformers", Path("/c"), device="cpu", **more)[2] == "preskip.serve.transformers_server"
    monkeypatch.setitem(os.environ, "VLLM_CPU_KVCACHE_SPACE", "7")
    assert server.environment()["VLLM_CPU_KVCACHE_SPACE"] == "7"
