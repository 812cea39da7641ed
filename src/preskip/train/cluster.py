"""Tasks on a Ray cluster, each in a process of its own; one whose process or machine is lost is given to another.

A task works in a folder that all machines share, and goes on from what its predecessor left there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from preskip.errors import LostWorkersError, PreskipError, one_line
from preskip.runs import environment
from preskip.train.distributed import world_size

EXECUTORS = ("local", "ray")
# How often a task whose process is lost is given to another one.
RETRIES = 3
# Environment variables of this process that tasks on other machines need, too.
ENVIRONMENT = ("PRESKIP_", "HF_", "TRANSFORMERS_", "TOKENIZERS_")
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}


def check_executor(kind: str, address: str | None) -> None:
    """Refuse, before anything is written, an executor that cannot be had.

    Args:
        kind: one of `EXECUTORS`.
        address: of a Ray cluster, or None.

    Raises:
        PreskipError: the kind is unknown, Ray is not installed, an address is given without Ray, or a launcher has
            started several processes, too.
    """
    if kind not in EXECUTORS:
        raise PreskipError(f"--executor {kind!r} is unknown: choose {' or '.join(EXECUTORS)}")
    if kind == "ray":
        _import_ray()
        if world_size() > 1:
            raise PreskipError("--executor ray starts its own processes: leave out torchrun or accelerate launch")
    elif address is not None:
        raise PreskipError("--ray-address goes with --executor ray")


class RayPool:
    """A connection to a Ray cluster.

    A task takes as many cores as this process has threads, so that its sums are those of this process, and a GPU where
    `device` is "cuda".

    Args:
        address: of a cluster (`auto`, `host:port`, `ray://host:port`); None starts one on this machine.
        device: "cpu" or "cuda".

    Raises:
        PreskipError: Ray is not installed, the cluster cannot be reached, or none of its machines has a GPU.
    """

    def __init__(self, address: str | None, device: str) -> None:
        import torch

        self.ray = _import_ray()
        self.gpus = int(device == "cuda")
        try:
            if address is None:
                # Ray's own default is 15: its workers would starve beside anything else on the machine.
                os.environ.setdefault("RAY_worker_niceness", "0")
                # "local": else Ray joins a cluster that runs on this machine, and refuses the number of cores.
                self.ray.init(address="local", num_cpus=environment.usable_cores(), include_dashboard=False, **QUIET)
            else:
                settings = {key: value for key, value in os.environ.items() if key.startswith(ENVIRONMENT)}
                self.ray.init(address=address, runtime_env={"env_vars": settings}, **QUIET)
        except Exception as error:  # Ray raises a bare one where its own processes do not start in time
            self.close()
            where = "on this machine" if address is None else f"at --ray-address {address}"
            reason = one_line(error, 200) or type(error).__name__
            raise LostWorkersError(f"no Ray cluster {where}: {reason}") from error
        machines = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        if not any(machine.get("GPU", 0) >= self.gpus for machine in machines):
            self.close()
            raise PreskipError("--executor ray: no machine of the cluster offers a GPU: give --device cpu")
        self.threads = min(torch.get_num_threads(), int(max(machine.get("CPU", 1) for machine in machines)))

    def outcomes(
        self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], names: Sequence[str]
    ) -> Iterator[tuple[int, Any]]:
        """Call a function once per task.

        Args:
            function: importable by the workers, or defined within a function.
            calls: its arguments for every task.
            names: of the tasks, for messages.

        Returns:
            The index and the result of every task, as they are done.

        Raises:
            PreskipError: a task's workers were lost again and again. An error of the function itself is raised as it
                is. The other tasks are ended then.
        """
        ray = self.ray
        task = ray.remote(_run).options(num_cpus=self.threads, num_gpus=self.gpus, max_retries=RETRIES)
        waiting = {task.remote(self.threads, function, *call): index for index, call in enumerate(calls)}
        try:
            while waiting:
                (done,), _ = ray.wait(list(waiting), num_returns=1)
                index = waiting.pop(done)
                try:
                    yield index, ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                except ray.exceptions.RayError as error:
                    reason = str(error).strip().splitlines()[0]
                    raise LostWorkersError(
                        f"{names[index]}: Ray lost its worker {RETRIES + 1} times: {reason}"
                    ) from error
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)

    def close(self) -> None:
        """Leave the cluster, and end it if it was started here."""
        self.ray.shutdown()


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise PreskipError("--executor ray needs Ray, which is not installed: pip install 'preskip[ray]'") from None
    return ray


def _run(threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
    import torch

    torch.set_num_threads(threads)
    return function(*arguments)
