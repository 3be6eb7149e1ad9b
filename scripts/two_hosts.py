"""Train on two hosts, kill a worker of one with SIGKILL, and check that the resumed run yields the same bits.

The hosts are two network namespaces of this machine, joined by a veth pair; each starts torchrun with one process. For
each strategy, one run is uninterrupted. In another one, the worker of the second host is killed between two
checkpoints; both torchrun agents start new workers, which resume from the last sharded checkpoint. Masks and weights of
the two runs are compared.

Namespaces need Linux, iproute2 and util-linux, and root or a kernel that lets users create user namespaces. Without
them, --localhost starts both torchrun agents on the loopback interface.

    python scripts/two_hosts.py --strategies ddp fsdp2 zero1 zero2 zero3
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from lit_prune.checkpoint.files import load_tensors
from lit_prune.checkpoint.masks import load_masks

STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
ADDRESSES = {"first": "10.77.0.1", "second": "10.77.0.2"}
"""Host names, which torchrun resolves, and their addresses."""
EVERY = 8
"""Optimizer steps between two checkpoints."""
_INSIDE = "LIT_PRUNE_NAMESPACES"
"""Environment variable of this script after it has moved to namespaces of its own."""


class Hosts:
    """Two hosts: network namespaces, or this machine twice."""

    def __init__(self, localhost: bool) -> None:
        """Create the second network namespace and the link to it, unless both hosts are this machine."""
        self.first = "localhost" if localhost else "first"
        self.interfaces = ("lo", "lo") if localhost else ("veth0", "veth1")
        self.prefixes: tuple[list[str], list[str]] = ([], [])
        self._second: subprocess.Popen[bytes] | None = None
        if not localhost:
            self._second = subprocess.Popen(["unshare", "--net", "--uts", "sleep", "infinity"])
            second = self._second.pid
            _wait(lambda: os.readlink(f"/proc/{second}/ns/net") != os.readlink("/proc/self/ns/net"), 10)
            self.prefixes = ([], ["nsenter", f"--target={second}", "--net", "--uts"])
            self._link(second)

    def _link(self, second: int) -> None:
        with tempfile.NamedTemporaryFile("w") as names:
            names.write("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in ADDRESSES.items()))
            names.flush()
            _run(f"mount --bind {names.name} /etc/hosts")
        _run("ip link add name veth0 type veth peer name veth1")
        _run(f"ip link set veth1 netns {second}")
        for prefix, interface, (name, address) in zip(self.prefixes, self.interfaces, ADDRESSES.items(), strict=True):
            for command in (
                f"hostname {name}",
                "ip link set lo up",
                f"ip addr add {address}/24 dev {interface}",
                f"ip link set {interface} up",
            ):
                _run(command, prefix)

    def start(self, host: int, command: list[str], folder: Path, log: Path) -> subprocess.Popen[bytes]:
        """Start a command on a host, with its output in ``log``."""
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": self.interfaces[host], "OMP_NUM_THREADS": "1"}
        # Workers would otherwise share a store with torchrun, and find the addresses of killed workers in it.
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        with log.open("wb") as file:
            command = [*self.prefixes[host], *command]
            return subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)

    def close(self) -> None:
        """End the second host."""
        if self._second:
            self._second.kill()
            self._second.wait()


def torchrun(hosts: Hosts, port: int, arguments: list[str], restarts: int) -> list[str]:
    """Return the command that starts one process of lit-prune on each host."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts.first}:{port}", "--max-restarts", str(restarts)),
        *("-m", "lit_prune", *arguments, "--trainer.num_nodes", "2", "--trainer.devices", "1"),
    ]


def write_run(path: Path, steps: int) -> None:
    """Write the configuration of the run: a tiny Llama, pruned at the start and again in the middle."""
    llama = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 97}
    plan = {
        "pattern": {"class_path": "Unstructured", "init_args": {"sparsity": 0.5}},
        "scorer": {"class_path": "Wanda"},
    }
    schedule = {"class_path": "Step", "init_args": {"every": EVERY + EVERY // 2, "times": 2}}
    checkpoints = {"dirpath": "checkpoints", "filename": "{step}", "every_n_train_steps": EVERY, "save_last": "link"}
    run = {
        "model": {"pretrained": "random", "config": {**llama, "num_attention_heads": 4, "num_key_value_heads": 2}},
        "data": {"dataset": "embedded", "sequences": 4, "seqlen": 64, "max_windows": 64},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": steps,
            "logger": False,
            "enable_progress_bar": False,
            "limit_val_batches": 1,
            "callbacks": [
                {"class_path": "Prune", "init_args": {"plan": plan, "schedule": schedule}},
                {"class_path": "KeepMasks"},
                {"class_path": "Export", "init_args": {"output": "trained"}},
                {"class_path": "ModelCheckpoint", "init_args": {**checkpoints, "save_top_k": -1}},
            ],
        },
    }
    path.write_text(yaml.safe_dump(run))


def fit(hosts: Hosts, folder: Path, options: argparse.Namespace, strategy: str, kill: bool) -> int | None:
    """Train on both hosts; return the step of the checkpoint before which the worker was killed.

    Raises:
        RuntimeError: if torchrun failed on a host; the message names the log.
    """
    folder.mkdir(parents=True)
    write_run(folder / "run.yaml", options.steps)
    arguments = ["fit", "-c", "run.yaml", "-c", f"strategies/{strategy}", "--ckpt_path", "last"]
    port = _free_port()
    command = torchrun(hosts, port, arguments, restarts=int(kill))
    agents = [hosts.start(host, command, folder, folder / f"{host}.log") for host in (0, 1)]
    killed = None
    try:
        if kill:
            last = folder / "checkpoints" / "last.ckpt"
            _wait(lambda: last.exists() or any(agent.poll() is not None for agent in agents), options.patience)
            if not last.exists():
                raise RuntimeError(f"torchrun ended before the first checkpoint: see {folder}/*.log")
            killed = _step(last)
            _kill_worker(agents[1].pid)
        _wait(lambda: all(agent.poll() is not None for agent in agents), options.patience)
    finally:
        for agent in agents:
            agent.terminate()  # torchrun ends its worker
    if any(agent.returncode for agent in agents):
        raise RuntimeError(f"torchrun ended with {[agent.returncode for agent in agents]}: see {folder}/*.log")
    return killed


def _kill_worker(agent: int) -> None:
    children = psutil.Process(agent).children(recursive=True)
    alive = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
    workers = [child for child in alive if "lit_prune" in child.cmdline()]
    if not workers:
        raise RuntimeError("there is no worker to kill: the run ended before its first checkpoint")
    workers[0].kill()


def _step(checkpoint: Path) -> int:
    return int(checkpoint.resolve().stem.partition("=")[2])


def compare(straight: Path, resumed: Path) -> tuple[bool, float, int, int]:
    """Return whether the masks are equal, the weights' largest difference, and the revived and pruned weights."""
    expected, found = (load_tensors(folder / "model.safetensors") for folder in (straight, resumed))
    known, others = load_masks(straight), load_masks(resumed)
    if expected.keys() != found.keys() or known.keys() != others.keys():
        raise RuntimeError(f"{resumed} has other tensors than {straight}")
    masks = all(torch.equal(others[name].bits, mask.bits) for name, mask in known.items())
    apart = max(float((found[name].double() - value.double()).abs().max()) for name, value in expected.items())
    pruned = {name: found[name][~mask.unpack()] for name, mask in others.items()}
    revived = sum(int(values.count_nonzero()) for values in pruned.values())
    return masks, apart, revived, sum(values.numel() for values in pruned.values())


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"waited {seconds:.0f} s in vain")
        time.sleep(0.01)


def _run(command: str, prefix: list[str] | None = None) -> None:
    subprocess.run([*(prefix or []), *command.split()], check=True, capture_output=True, text=True)


def enter_namespaces() -> None:
    """Start this script again in network and host-name namespaces of its own; return if it is there already."""
    if _INSIDE in os.environ:
        return
    unshare = ["unshare", "--user", "--map-root-user", "--net", "--uts", "--mount"]
    needs = "two hosts need Linux, iproute2, util-linux, and root or unprivileged user namespaces; or --localhost"
    try:
        probe = "ip link add name veth0 type veth peer name veth1 && command -v nsenter hostname"
        subprocess.run([*unshare, "sh", "-c", probe], check=True, capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"{needs} ({error})")
    except subprocess.CalledProcessError as error:
        sys.exit(f"{needs} ({' '.join((error.stderr or error.stdout).split())})")
    os.execvpe("unshare", [*unshare, sys.executable, *sys.argv], {**os.environ, _INSIDE: "1"})


def main() -> None:
    """Print a row for every strategy, and fail if a run differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--localhost", action="store_true", help="both hosts are this machine, without namespaces")
    parser.add_argument("--steps", type=int, default=5 * EVERY, help="optimizer steps of a run")
    parser.add_argument("--patience", type=float, default=300, help="seconds after which a run counts as hung")
    parser.add_argument("--work", type=Path, default=Path("out/two_hosts"), help="folder for what the runs write")
    options = parser.parse_args()
    if not options.localhost:
        enter_namespaces()
    hosts = Hosts(options.localhost)
    shutil.rmtree(options.work, ignore_errors=True)
    print("| strategy | killed after step | masks | largest difference of a weight | revived |", flush=True)
    print("|---|---|---|---|---|", flush=True)
    failed = False
    try:
        for strategy in options.strategies:
            folder = options.work / strategy
            fit(hosts, folder / "straight", options, strategy, kill=False)
            killed = fit(hosts, folder / "killed", options, strategy, kill=True)
            equal, apart, revived, pruned = compare(folder / "straight" / "trained", folder / "killed" / "trained")
            failed |= bool(not equal or apart or revived)
            masks, weights = "the same" if equal else "DIFFERENT", "0 (the same bits)" if not apart else f"{apart:.1e}"
            print(f"| {strategy} | {killed} | {masks} | {weights} | {revived} of {pruned:,} |", flush=True)
    except RuntimeError as error:
        sys.exit(f"two_hosts.py: {error}")
    finally:
        hosts.close()
    sys.exit(failed)


if __name__ == "__main__":
    main()
