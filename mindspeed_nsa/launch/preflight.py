"""The doctor on every node before any starts: all nodes learn of one that cannot run, and start nothing."""

import json
import subprocess
import sys
import time
from datetime import timedelta
from socket import gethostname
from typing import Any

from mindspeed_nsa.launch.nodes import Nodes

# Seconds that a node waits for the others' doctors, and that node 0 stays for those that come late to bad news.
_PATIENCE = 600
_GRACE = 30


def preflight(nodes: Nodes, doctor: list[str], environment: dict[str, str], patience: float = _PATIENCE) -> None:
    """Run the doctor here and hear how it went on the other nodes.

    Node 0 keeps the verdicts at `master_addr:master_port`, the port that torchrun takes over afterwards.

    Args:
        nodes: of the job.
        doctor: its command line.
        environment: of the job.
        patience: seconds to wait for the other nodes.

    Raises:
        ValueError: a node cannot run the job, or is not heard from; one line that names it.
    """
    fault = _examine(doctor, environment)
    host = nodes.names[nodes.rank] if nodes.names else gethostname()
    verdicts = [{"rank": nodes.rank, "host": host, "fault": fault}]
    if nodes.nnodes > 1:
        verdicts = _exchange(nodes, verdicts[0], patience)
    if faults := [f"node {one['rank']} ({one['host']}): {one['fault']}" for one in verdicts if one["fault"]]:
        raise ValueError(f"preflight failed, nothing was started: {'; '.join(faults)}")


def _examine(doctor: list[str], environment: dict[str, str]) -> str:
    """Run the doctor; where it finds a fault, what it says is printed, and the first line that names one returned."""
    done = subprocess.run(doctor, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode == 0:
        return ""
    print(done.stdout, end="", file=sys.stderr, flush=True)
    lines = [" ".join(line.split()) for line in done.stdout.splitlines() if line.strip()]
    named = [line for line in lines if " FAULT " in line] or lines[-1:]
    return named[0] if named else f"the doctor ended with exit code {done.returncode}"


def _exchange(nodes: Nodes, verdict: dict[str, Any], patience: float) -> list[dict[str, Any]]:
    """Every node's verdict, or those so far once one is bad."""
    from torch.distributed import DistError, TCPStore

    place = f"{nodes.master_addr}:{nodes.master_port}"
    try:
        store = TCPStore(
            nodes.master_addr,
            nodes.master_port,
            is_master=nodes.rank == 0,
            wait_for_workers=False,
            timeout=timedelta(seconds=patience),
        )
        store.set(f"verdict/{nodes.rank}", json.dumps(verdict))
        verdicts = _wait(store, nodes, patience)
        store.set(f"seen/{nodes.rank}", "")
        if nodes.rank == 0:
            _linger(store, nodes)
    except DistError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"preflight: {nodes.title(0)}, MASTER_ADDR:MASTER_PORT {place}: {reason}") from None
    return verdicts


def _wait(store: Any, nodes: Nodes, patience: float) -> list[dict[str, Any]]:
    until = time.monotonic() + patience
    verdicts: dict[int, dict[str, Any]] = {}
    while len(verdicts) < nodes.nnodes and not any(verdict["fault"] for verdict in verdicts.values()):
        for rank in range(nodes.nnodes):
            if rank not in verdicts and store.check([f"verdict/{rank}"]):
                verdicts[rank] = json.loads(store.get(f"verdict/{rank}"))
        if time.monotonic() > until:
            missing = ", ".join(nodes.title(rank) for rank in range(nodes.nnodes) if rank not in verdicts)
            raise ValueError(f"preflight: not heard from within {patience:.0f} s: {missing}; is the launch running there?")
        time.sleep(0.1)
    return [verdicts[rank] for rank in sorted(verdicts)]


def _linger(store: Any, nodes: Nodes) -> None:
    """Node 0's store goes when all have read from it: those who have not would wait in vain."""
    until = time.monotonic() + _GRACE
    while time.monotonic() < until and not store.check([f"seen/{rank}" for rank in range(nodes.nnodes)]):
        time.sleep(0.05)
