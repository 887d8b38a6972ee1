"""Watches: how long it takes until all have been told, and what it costs."""

from contextlib import contextmanager

import machine
import servers
from bench import settle
from row import Row

USERS = 100_000
WATCHERS = 10_000
CONNECTIONS = 100


@contextmanager
def rolecache(bench, core=machine.SERVER_CORE):
    cluster = bench.postgres()
    name = f"watches_{bench.new_directory().name}"
    with servers.Rolecache(bench, cluster.new_database(name, USERS, "'user'"), core) as server:
        server.changed = 0
        yield server


# After a change watchers are left alone for a moment, so that changes in a row are told together: each is alone here.
ALONE = ["--interval", 50]


def fanout(bench, feed, server, watchers, times, burst=1, *more, core=machine.LOAD_CORE):
    arguments = ["--address", server.address, "--subscribers", watchers, "--times", times, "--burst", burst]
    arguments += ["--connections", min(watchers, CONNECTIONS), "--server-pid", server.pid]
    if feed == "rolecache":
        # Who was made an admin already would stay one.
        arguments += ["--first", 1 + server.changed]
        server.changed += times * burst
    return bench.peer("fanout", feed, *arguments, *more, core=core)


def against(bench, feed, other, burst, ratio, *more):
    times = bench.few(30 if burst == 1 else 10)
    with rolecache(bench) as server, other(bench) as peer:
        return bench.compare(
            [server.pid, peer.pid, bench.postgres().pid],
            lambda _: fanout(bench, "rolecache", server, WATCHERS, times, burst, *more),
            lambda _: fanout(bench, feed, peer, WATCHERS, times, burst, *more),
            ratio,
        )


def time_ratio(ours, theirs):
    return ours["all"]["p50"] / theirs["all"]["p50"]


def deliveries_ratio(ours, theirs):
    """Of deliveries per second of a processor."""
    return theirs["serverCpu"] / ours["serverCpu"]


def fanout_time(bench):
    return against(bench, "redis", servers.redis, 1, time_ratio)


def fanout_cpu(bench):
    return against(bench, "redis", servers.redis, 1, deliveries_ratio)


def fanout_ten(bench):
    return against(bench, "redis", servers.redis, 10, deliveries_ratio, "--in-a-row")


def fanout_ten_at_once(bench):
    return against(bench, "redis", servers.redis, 10, deliveries_ratio)


def fanout_etcd(bench):
    return against(bench, "etcd", servers.etcd, 1, time_ratio)


def to_watcher(bench):
    with rolecache(bench, core=None) as server:

        def measure(_):
            told = fanout(bench, "rolecache", server, 1, bench.few(100), 1, *ALONE, core=None)
            return {"ours": told, "value": told["allAfterAnswer"]["p50"] / 1000}

        return bench.values([server.pid, bench.postgres().pid], measure)


def stuck(bench):
    with rolecache(bench, core=None) as server:
        times = bench.few(30)

        def set_role(watchers, stuck):
            more = ["--stuck", stuck, "--interval", 1000]
            return fanout(bench, "rolecache", server, watchers, times, 1, *more, core=None)

        return bench.compare(
            [server.pid, bench.postgres().pid],
            lambda _: set_role(WATCHERS, WATCHERS // 10),
            lambda _: set_role(0, 0),
            lambda ours, theirs: ours["answer"]["p50"] / theirs["answer"]["p50"],
        )


def watcher_memory(bench):
    def measure(_):
        # A new server each time: what one has once had, it keeps.
        with rolecache(bench) as server:
            settle(1)
            before, sockets = machine.resident(server.pid), machine.socket_memory()
            with bench.hold(server, WATCHERS, CONNECTIONS):
                # More than one heartbeat.
                settle(3 if bench.quick else 25)
                held = machine.resident(server.pid) - before
                kernel = machine.socket_memory() - sockets
        return {"value": held / WATCHERS / 1024, "kernelOfBothEnds": kernel / WATCHERS / 1024}

    return bench.values([bench.postgres().pid], measure, rounds=1 if bench.quick else 3)


ROWS = [
    Row("to-watcher", "commit to watcher, p50 over the SetRole answer, 1 watcher", to_watcher, 1, more=False, unit="ms"),
    Row("fanout-time", "one change to 10,000 watchers on 100 connections: time until all have it, against Redis PUBLISH to "
        "10,000 subscribers", fanout_time, 2, more=False),
    Row("fanout-cpu", "the same: deliveries per second of a processor", fanout_cpu, 0.5, 1.0),
    Row("fanout-ten", "the same, ten changes in a row, each asked for once the one before is answered", fanout_ten, 3),
    Row("fanout-ten-at-once", "the same, ten changes at once", fanout_ten_at_once),
    Row("fanout-etcd", "one change to 10,000 watchers on 100 connections: time until all have it, against etcd",
        fanout_etcd, more=False),
    Row("stuck", "SetRole p50 with 10,000 watchers, a tenth of them stuck, one write per second, against none", stuck, 1.2,
        more=False),
    Row("watcher-memory", "memory per idle watcher", watcher_memory, 12, more=False, unit="KiB"),
]
