"""An engine's OpenAI server as a child process: started, waited for, and stopped with all that it has started."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from preskip.errors import PreskipError

# Seconds that an engine has for its own shutdown before it is killed.
GRACE = 20.0
# Fewer bytes than this beside the weights are of no use: one request's cache and activations.
SPARE = 1 << 28
# A proxy, which the environment may name, does not know this machine's own addresses.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def check_port(host: str, port: int) -> None:
    """Refuse a port on which something listens already.

    Raises:
        PreskipError: it is in use, may not be used, or the host is none of this machine.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise PreskipError(f"--host {host} is unknown, or no address of this machine: as 127.0.0.1") from None
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise PreskipError(f"port {port} of {host} cannot be used ({reason}): choose another --port") from None


def check_memory(weight_bytes: int, device: str, engine: str, more: Sequence[str] = ()) -> None:
    """Refuse weights that do not fit into what is free now.

    Args:
        weight_bytes: of the checkpoint, in the dtype that it is served in.
        device: "cpu" or "cuda".
        engine: "vllm", which takes one GPU, or "transformers", which takes all.
        more: further arguments of the engine; nothing is refused where they split, offload or quantise the weights.

    Raises:
        PreskipError: too little memory, with both figures.
    """
    if any(re.match(r"-(tp|pp|dp|q)\b|--.*(parallel|offload|quantization)", argument) for argument in more):
        return
    if device == "cuda":
        import torch

        places = range(torch.cuda.device_count() if engine == "transformers" else 1)
        free = sum(torch.cuda.mem_get_info(place)[0] for place in places)
    else:
        import psutil

        free = psutil.virtual_memory().available
    if weight_bytes + SPARE > free:
        raise PreskipError(
            f"the weights take {weight_bytes / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of {device} memory are free: "
            "free some, or give --dtype bfloat16"
        )


def command(
    engine: str, checkpoint: Path, *, host: str, port: int, name: str, dtype: str, device: str, more: Sequence[str] = ()
) -> list[str]:
    """The command line of an engine's server.

    Args:
        engine: "vllm" or "transformers".
        checkpoint: what it serves.
        host: that it listens on.
        port: that it listens on.
        name: under which requests ask for the model.
        dtype: of weights and activations; "auto" is the checkpoint's.
        device: "cpu" or "cuda"; on a CPU vLLM compiles for minutes what then hardly gains.
        more: further arguments of the engine, which override these.
    """
    place = ["--host", host, "--port", str(port), "--dtype", dtype]
    if engine == "vllm":
        module, eager = "vllm.entrypoints.openai.api_server", ["--enforce-eager"] if device == "cpu" else []
        return [
            sys.executable, "-m", module, "--model", str(checkpoint), "--served-model-name", name, *place, *eager, *more
        ]  # fmt: skip
    return [sys.executable, "-m", "preskip.serve.transformers_server", name, str(checkpoint), *place, *more]


def new_log(what: str) -> Path:
    """A new file for what a server prints, in the system's folder for temporary files."""
    handle, name = tempfile.mkstemp(prefix=f"preskip-{what}-", suffix=".log")
    os.close(handle)
    return Path(name)


@contextmanager
def running(
    arguments: Sequence[str], log: Path, variables: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, and stop it with all its children when the block ends, however it ends.

    Args:
        arguments: the command line.
        log: what it prints goes there.
        variables: of its environment; None takes `environment()`.
    """
    release = _hold_signals()  # one that comes while the process starts would leave it behind
    try:
        with log.open("wb") as output:
            # A session of its own: Ctrl-C reaches this process alone, which then ends the other in order.
            server = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=variables or environment(),
                start_new_session=True,
            )
    except BaseException:
        release()
        raise
    try:
        release()
        yield server
    finally:
        stop(server)


def _hold_signals() -> Callable[[], None]:
    """Let Ctrl-C, SIGTERM and SIGHUP wait until the returned function is called; it handles what came."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda own, _: came.append(own)) for number in numbers}

    def release() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        for one in came:  # the first that is not ignored ends it
            signal.raise_signal(one)

    return release


def environment() -> dict[str, str]:
    """Of an engine's process: nothing buffered, and on a CPU a quarter of the free memory for keys and values."""
    import psutil

    space = max(1, min(4, psutil.virtual_memory().available // 2**32))
    return {"VLLM_CPU_KVCACHE_SPACE": str(space), **os.environ, "PYTHONUNBUFFERED": "1"}


def wait(server: subprocess.Popen[bytes], log: Path, url: str, note: Callable[[str], None]) -> None:
    """Wait until a server answers.

    Args:
        server: as `running` gives it.
        log: its log.
        url: of its health check.
        note: told the seconds so far and the log's last line, twice a second.

    Raises:
        PreskipError: it ended before it answered; the line says why, as far as its log tells.
    """
    begin = time.monotonic()
    while not is_healthy(url):
        if server.poll() is not None:
            raise PreskipError(f"the server ended before it answered: {reason_in(log)}")
        note(f"{time.monotonic() - begin:.0f} s: {last_line(log)}")
        time.sleep(0.5)


def stop(server: subprocess.Popen[bytes]) -> None:
    """End a server and every process that it has started; those that do not go are killed.

    Signals wait meanwhile: a second Ctrl-C would leave behind what has not gone yet.
    """
    release = _hold_signals()
    try:
        _end(server)
    finally:
        release()


def _end(server: subprocess.Popen[bytes]) -> None:
    import psutil

    family: list[Any] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(server.pid).children(recursive=True)
    family += [process for process in psutil.process_iter() if _session(process.pid) == server.pid]
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(GRACE)
    _, alive = psutil.wait_procs(family, timeout=2.0 if server.poll() is not None else 0.0)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    if server.poll() is None:
        server.kill()
    server.wait()
    psutil.wait_procs(alive, timeout=GRACE)


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def is_healthy(url: str) -> bool:
    """Whether a server answers its health check."""
    try:
        with _DIRECT.open(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def last_line(log: Path) -> str:
    """The last line of a log that says something, without colours and the engine's prefix."""
    lines = [line for line in (_plain(line) for line in _tail(log)) if line]
    return lines[-1] if lines else ""


def reason_in(log: Path) -> str:
    """Why a server ended, in one line: the first error of its log that says something, and where the log is."""
    lines = [_plain(line) for line in _tail(log)]
    # Pydantic, which checks vLLM's options, says what is wrong two lines on.
    for place, line in enumerate(lines):
        if re.search(r"\d+ validation errors? for \w+$", line):
            lines[place] = f"ValueError: {'; '.join(lines[place + 1 : place + 3]).partition(' [type=')[0]}"
    known = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    # What the engine's process died of comes before what that meant to the others.
    first = next((line for line in known if "Engine core" not in line and "failed to start" not in line), None)
    words = first or (known[-1] if known else next((line for line in reversed(lines) if line), "it printed nothing"))
    return f"{words[:300]} (log: {log})"


def _tail(log: Path, size: int = 1 << 18) -> list[str]:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - size))
        return re.split(r"[\r\n]+", file.read().decode(errors="replace"))


def _plain(line: str) -> str:
    line = re.sub(r"\x1b\[[0-9;]*m", "", line).strip()
    line = re.sub(r"^\([^)]*pid=\d+\)\s*", "", line)
    return re.sub(r"^(INFO|WARNING|ERROR|DEBUG) [\d: -]+(\[[^\]]*\])?\s*", "", line).strip()
