"""How cost grows with users, watchers, callers, replicas, and with the share of what a server can do."""

import json
import subprocess
import time
from contextlib import ExitStack

import machine
import reads
import servers
import watches
from bench import settle

# Calls in flight of a connection, where callers share one.
SHARED = 16


def steps(bench, counts):
    return [count for count in counts if not bench.quick or count <= 10_000]


def by_users(bench):
    """GetRole and memory, of a lazy cache that has so many users."""
    points = []
    url = bench.postgres().new_database(f"growth_{bench.new_directory().name}", 1_000, "'user'")
    for users in steps(bench, [10**3, 10**4, 10**5, 10**6, 10**7]):
        with servers.Rolecache(bench, url) as server:
            settle(1)
            before = machine.resident(server.pid)
            filled = bench.fill(server, users)
            settle(1)
            held = machine.resident(server.pid) - before
            told = bench.load("get", server, 4, SHARED, "--users", users)
            points.append({"x": users, "get": told, "residentBytes": held, "fillSeconds": filled["seconds"]})
    return points


def by_watchers(bench):
    """One change, until all have it; and ten at once."""
    points = []
    with watches.rolecache(bench) as server, servers.redis(bench) as redis:
        for watchers in steps(bench, [1, 10, 100, 1_000, 10_000]):
            times = bench.few(50)
            points.append({
                "x": watchers,
                "rolecache": watches.fanout(bench, "rolecache", server, watchers, times, 1, *watches.ALONE),
                "redis": watches.fanout(bench, "redis", redis, watchers, times, 1, *watches.ALONE),
                "ten": watches.fanout(bench, "rolecache", server, watchers, max(3, times // 5), 10),
            })
    return points


def by_callers(bench):
    """GetRole by callers who share connections, and by callers who have one each; and Redis GET."""
    points = []
    with reads.rolecache(bench) as server, reads.redis(bench) as redis:
        for callers in [1, 4, 16, 64, 256, 1_000]:
            shared = (-(-callers // SHARED), min(callers, SHARED))
            users = ["--users", reads.USERS]
            points.append({
                "x": callers,
                "shared": bench.load("get", server, *shared, *users),
                "own": bench.load("get", server, callers, 1, *users),
                "redis": bench.load("redis-get", redis, callers, 1, *users),
            })
    return points


def by_writers(bench):
    """SetRole by so many callers."""
    points = []
    users = 20_000
    with watches.rolecache(bench, core=None) as server:
        cluster = bench.postgres()
        for number, callers in enumerate([1, 4, 16, 64, 256]):
            shared = (-(-callers // SHARED), min(callers, SHARED))
            before = machine.worked(cluster.pid)
            told = bench.load("set", server, *shared, "--first", 1 + number * users, "--users", users, core=None)
            worked = (machine.worked(cluster.pid) - before) * bench.seconds / (bench.seconds + bench.warm_up)
            points.append({"x": callers, "set": told, "storeCpu": worked * 1e6 / max(1, told["calls"])})
    return points


def by_replicas(bench):
    """Writes through one of so many servers on one database, and the time until a watcher of the last one is told."""
    points = []
    users = 10_000
    cluster = bench.postgres()
    name = f"replicas_{bench.new_directory().name}"
    url = cluster.new_database(name, 10 * users, "'user'")
    with ExitStack() as stack:
        replicas = []
        for count in range(1, 5):
            replicas.append(stack.enter_context(servers.Rolecache(bench, url, core=None)))
            pids = [replica.pid for replica in replicas]
            of_step = ["--first", 1 + 2 * count * users, "--users", users]
            told = bench.load("set", replicas[0], 4, SHARED, *of_step, pids=pids, core=None)
            watched = bench.peer(
                "fanout", "rolecache", "--address", replicas[-1].address, "--publish-at", replicas[0].address,
                "--subscribers", 1, "--connections", 1, "--times", bench.few(100), *watches.ALONE,
                "--first", 1 + (2 * count - 1) * users, core=None,
            )
            points.append({"x": count, "set": told, "watch": watched})
    return points


def by_rate(bench):
    """Latency where calls come at their time, whether or not the server keeps up, by the client that bots have."""
    points = []
    with reads.rolecache(bench) as server:
        most = in_rolecache_bench(bench, server, 0)
        for share in [0.25, 0.5, 0.7, 0.9]:
            told = in_rolecache_bench(bench, server, round(most["perSecond"] * share))
            points.append({"x": 100 * share, "get": told})
    return points


def in_rolecache_bench(bench, server, rate):
    command = [*machine.on_core(machine.LOAD_CORE), bench.rolecache, "bench", "get", "--address", server.address]
    command += ["--first-user", "1", "--users", str(reads.USERS), "--rate", str(rate), "--output", "json"]
    command += ["--duration", f"{bench.seconds:g}s", "--server-pid", str(server.pid)]
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)
    if told["failures"]:
        raise RuntimeError(f"calls failed: {told['failures']}")
    return told


GROWTH = {
    "users": by_users,
    "watchers": by_watchers,
    "callers": by_callers,
    "writers": by_writers,
    "replicas": by_replicas,
    "rate": by_rate,
}
