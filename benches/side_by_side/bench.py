"""What rows are measured with: binaries, temporary directories, rounds."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
from servers import Postgres

# Rounds that were too noisy are measured again, up to as many more.
NOISY = 1.0


class Bench:
    def __init__(self, binaries, quick):
        self.rolecache, self.peers = binaries
        self.quick = quick
        self.rounds = 2 if quick else 7
        self.seconds = 1.0 if quick else 5.0
        self.warm_up = 0.3 if quick else 1.0
        self._cluster = None

    def __enter__(self):
        self._root = tempfile.TemporaryDirectory(prefix="rolecache-bench-")
        self.root = Path(self._root.name)
        # PostgreSQL runs as somebody else.
        self.root.chmod(0o755)
        self._directories = 0
        return self

    def __exit__(self, *_):
        if self._cluster:
            self._cluster.stop()
        self._root.cleanup()

    def new_directory(self):
        self._directories += 1
        directory = self.root / str(self._directories)
        directory.mkdir()
        return directory

    def of_size(self, count):
        """So many; in a quick run a tenth."""
        return count // 10 if self.quick else count

    def few(self, often):
        """So often; in a quick run less."""
        return max(3, often // 10) if self.quick else often

    def postgres(self, core=None):
        """The one cluster of all rows, on a core or on all of them."""
        if self._cluster is None:
            self._cluster = Postgres(self).__enter__()
        machine.pin(self._cluster.pid, core)
        return self._cluster

    def peer(self, *arguments, core=machine.LOAD_CORE, patience=300):
        """What the load generator tells."""
        command = [*machine.on_core(core), self.peers, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience)
        if done.returncode != 0:
            raise RuntimeError(f"peers {' '.join(map(str, arguments))}: {done.stderr.strip()}")
        told = json.loads(done.stdout)
        if told.get("wrong"):
            raise RuntimeError(f"{told['wrong']} of {told['calls']} calls were answered otherwise than asked")
        return told

    def load(self, work, server, connections, in_flight, *more, pids=None, core=machine.LOAD_CORE, seconds=None):
        pids = [server.pid] if pids is None else pids
        arguments = ["--address", server.address, "--connections", connections, "--in-flight", in_flight]
        arguments += ["--seconds", seconds or self.seconds, "--warm-up", self.warm_up]
        return self.peer("load", work, *arguments, *(f"--server-pid={pid}" for pid in pids), *more, core=core)

    def fill(self, server, users, first=1):
        return self.peer("fill", "--address", server.address, "--first", first, "--users", users, patience=900)

    def hold(self, server, watchers, connections=100):
        return Hold(self, server, watchers, connections)

    def rounds_of(self, pids, measure, rounds):
        """A round after the other: what `measure` gives for its number, without those that were too noisy."""
        kept, noisy = [], []
        while len(kept) < rounds:
            number = len(kept) + len(noisy)
            with machine.Foreign(pids) as foreign:
                told = measure(number)
            told["noise"] = foreign.told()
            if self.quick or foreign.is_quiet:
                kept.append(told)
            else:
                noisy.append(told)
            if len(kept) + len(noisy) >= rounds * (1 + NOISY):
                break
        # Where there was no quiet, noise is told instead of nothing.
        return kept + noisy[: rounds - len(kept)], len(noisy)

    def compare(self, pids, ours, theirs, ratio):
        """Rounds of both, in turn; the one that begins is the other one each time."""

        def measure(number):
            if number % 2 == 0:
                a = ours(number)
                b = theirs(number)
            else:
                b = theirs(number)
                a = ours(number)
            return {"ours": a, "theirs": b, "value": ratio(a, b)}

        return summary(*self.rounds_of(pids, measure, self.rounds))

    def values(self, pids, measure, rounds=None):
        """Rounds of something that is a number by itself."""
        return summary(*self.rounds_of(pids, measure, rounds or self.rounds))


class Hold:
    """Watchers that are there, and are told of nothing, until the end of a `with`."""

    def __init__(self, bench, server, watchers, connections):
        command = [*machine.on_core(machine.LOAD_CORE), bench.peers, "fanout", "rolecache", "--hold"]
        command += ["--address", server.address, "--subscribers", str(watchers), "--connections", str(connections)]
        self.command, self.process = command, None

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if not self.process.stdout.readline():
            self.__exit__()
            raise RuntimeError(f"{self.command} did not begin")
        return self

    def __exit__(self, *_):
        try:
            self.process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def summary(rounds, noisy):
    values = [one["value"] for one in rounds]
    return {
        "rounds": rounds,
        "noisyRounds": noisy,
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def median_of(rounds, *path):
    """Of all rounds, what is at this path of each."""
    values = []
    for one in rounds:
        for key in path:
            one = one[key]
        values.append(one)
    return statistics.median(values)


def settle(seconds):
    """Until what was begun has come to rest: memory is given back, heartbeats have gone out."""
    time.sleep(seconds)


def say(text):
    print(text, file=sys.stderr, flush=True)
