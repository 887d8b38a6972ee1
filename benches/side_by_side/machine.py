"""The machine: what it is, how its processors are shared out, and what else they were busy with."""

import os
import platform
import re
import subprocess
import time
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")

# One core for the server, the other for what asks it.
SERVER_CORE, LOAD_CORE = 0, 1


def output(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return (done.stdout or done.stderr).strip()


def facts():
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = int(re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())[1])
    distribution = re.search(r'PRETTY_NAME="(.*)"', Path("/etc/os-release").read_text())
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "memoryGiB": round(memory / 2**20, 1),
        "kernel": platform.release(),
        "distribution": distribution[1] if distribution else platform.system(),
        "hypervisor": "hypervisor" in Path("/proc/cpuinfo").read_text(),
        "rust": output("rustc", "--version"),
    }


def on_core(core):
    """The beginning of a command that runs on one core; on all of them for None."""
    return [] if core is None else ["taskset", "--cpu-list", str(core)]


def tree(pid):
    """A process and all that it has started."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, left = [], [pid]
    while left:
        found.append(left.pop())
        left += children.get(found[-1], [])
    return found


def pin(pid, core):
    """Moves a process and all that it has started to one core; to all of them for None."""
    cores = range(os.cpu_count()) if core is None else [core]
    for process in tree(pid):
        try:
            os.sched_setaffinity(process, cores)
        except ProcessLookupError:
            pass


def worked(pid):
    """Seconds that processors have worked for a process and its own."""
    total = 0
    for process in tree(pid):
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        total += sum(map(int, fields[11:15]))
    return total / TICKS


def resident(pid):
    """Bytes of its memory that are there."""
    return 1024 * int(re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


def socket_memory():
    """Bytes that the kernel holds for all sockets of TCP."""
    pages = int(re.search(r"TCP: .* mem (\d+)", Path("/proc/net/sockstat").read_text())[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Foreign:
    """What processors were busy with beside us while something was measured, and what the host took: shares of one core.

    `pids` are the servers; what we start meanwhile and wait for is counted as ours."""

    # By this a round counts or does not, whatever came out of it.
    MOST = 0.10

    def __init__(self, pids):
        self.pids = pids

    def __enter__(self):
        self.begun, self.before = time.monotonic(), self.now()
        return self

    def __exit__(self, *_):
        took = time.monotonic() - self.begun
        busy, stolen, ours = (after - before for after, before in zip(self.now(), self.before))
        self.share = max(0.0, busy - ours) / took
        self.stolen = stolen / took

    @property
    def is_quiet(self):
        return self.share <= self.MOST and self.stolen <= self.MOST

    def told(self):
        return {"foreign": round(self.share, 3), "stolen": round(self.stolen, 3)}

    def now(self):
        user, nice, system, _, _, irq, soft, steal = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
        times = os.times()
        ours = sum(map(worked, self.pids)) + times.user + times.system + times.children_user + times.children_system
        return (user + nice + system + irq + soft) / TICKS, steal / TICKS, ours
