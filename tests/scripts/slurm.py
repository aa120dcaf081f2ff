"""A Slurm cluster of one node, this machine, for as long as it is wanted: Debian's slurm-wlm and munge, as root.

Its configuration is in /etc/slurm, since what Snakemake starts does not look elsewhere; where there is one, nothing is
touched.

``python tests/scripts/slurm.py COMMAND ...`` runs a command beside it.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
PLACE = Path("/etc/slurm/slurm.conf")
CONFIGURATION = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,defer
MinJobAge=3600
KillWait=5
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory={megabytes} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def is_installed() -> bool:
    there = all(shutil.which(name, path=_path()) for name in NEEDED)
    return there and os.geteuid() == 0 and not PLACE.exists()


@contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """Start it, yield the environment in which ``sbatch`` finds it, and stop it with all its jobs."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        here = Path(folder)
        for name in ("state", "spool"):
            (here / name).mkdir()
        settings = {
            **{"host": socket.gethostname(), "folder": folder, "cores": os.cpu_count()},
            **{"controller": _free_port(), "node": _free_port()},
            "megabytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20,
        }
        PLACE.parent.mkdir(exist_ok=True)
        PLACE.write_text(CONFIGURATION.format(**settings))
        stack.callback(PLACE.unlink)
        (here / "key").write_bytes(os.urandom(128))
        (here / "key").chmod(0o400)
        environment = os.environ | {"PATH": _path()}
        for name in ("pid", "log", "seed"):
            (here / f"munge.{name}").touch()
        munged = [f"--{name}-file={here}/munge.{name}" for name in ("pid", "log", "seed")]
        munged += [f"--key-file={here}/key", f"--socket={here}/munge.socket", "--force", "--foreground"]
        for daemon in (["munged", *munged], ["slurmctld", "-D"], ["slurmd", "-D"]):
            process = subprocess.Popen(
                daemon, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
            stack.callback(_stop, process)
        stack.callback(subprocess.run, ["scancel", "--full", "--user=root"], env=environment, capture_output=True)
        _wait_for_node(environment, here)
        yield environment


def _wait_for_node(environment: dict[str, str], here: Path) -> None:
    for _ in range(60):
        asked = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True)
        if asked.stdout.strip() == "idle":
            return
        time.sleep(1)
    logs = "\n".join(path.read_text()[-2000:] for path in here.glob("*.log"))
    raise RuntimeError(f"Slurm's node did not come up: {asked.stdout}{asked.stderr}\n{logs}")


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _path() -> str:
    """With the folders of daemons, which a user's path may lack."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


if __name__ == "__main__":
    with cluster() as found:
        sys.exit(subprocess.run(sys.argv[1:], env=found).returncode)
