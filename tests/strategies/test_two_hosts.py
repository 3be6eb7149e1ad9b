"""A worker of one host is killed, and torchrun's new workers resume from the sharded checkpoint."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "two_hosts.py"


@pytest.mark.timeout(900)  # four processes of torchrun, each started twice, on a machine that may be busy
def test_two_hosts_resume_to_the_same_bits_after_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--strategies", "fsdp2", "--work", str(tmp_path / "work")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.stderr.startswith("two hosts need "):  # no namespaces here
        ended = subprocess.run([*command, "--localhost"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    killed, masks, weights, revived = ended.stdout.splitlines()[-1].split(" | ")[1:]
    assert int(killed) >= 8 and masks == "the same" and weights == "0 (the same bits)"
    count, pruned = revived.removesuffix(" |").replace(",", "").split(" of ")
    assert int(count) == 0 and int(pruned) > 10_000
