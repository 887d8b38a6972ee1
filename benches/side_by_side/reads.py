"""Reads: one core for the server, the other for what asks it."""

import subprocess
from contextlib import ExitStack, contextmanager

import servers
from row import Row

USERS = 100_000
# Whose reads are slower anyway: fewer keys are there sooner.
ETCD_USERS = 2_000
BATCH = 1_000
ROLE = "case when i % 10 = 0 then 'admin' else 'user' end"


@contextmanager
def rolecache(bench, *arguments):
    """A server whose cache has everybody, on a database of its own."""
    cluster = bench.postgres()
    name = f"reads_{bench.new_directory().name}"
    with servers.Rolecache(bench, cluster.new_database(name, USERS, ROLE), arguments=arguments) as server:
        bench.fill(server, USERS)
        yield server


@contextmanager
def redis(bench, *arguments):
    with servers.redis(bench, servers.machine.SERVER_CORE, *arguments) as server:
        fill = f"for i = 1, {USERS} do redis.call('set', 'role:' .. i, i % 10 == 0 and 'admin' or 'user') end"
        command = [servers.find("redis-cli"), "-p", str(server.port), "eval", fill, "0"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        yield server


def per_second(ours, theirs):
    return ours["perSecond"] / theirs["perSecond"]


def p50(ours, theirs):
    return ours["latency"]["p50"] / theirs["latency"]["p50"]


def get(bench, ours, other, work, theirs, ratio=per_second, users=USERS):
    """GetRole by `ours` = (connections, in flight) beside `work` on another server by `theirs`."""
    with ExitStack() as stack:
        server = stack.enter_context(rolecache(bench))
        other = stack.enter_context(other(bench))
        asked = ["--users", users]
        return bench.compare(
            [server.pid, other.pid],
            lambda _: bench.load("get", server, *ours, "--users", USERS),
            lambda _: bench.load(work, other, *theirs, *asked),
            ratio,
        )


def get_empty(bench):
    return get(bench, (4, 16), servers.empty, "get", (4, 16))


def get_redis(bench):
    return get(bench, (4, 16), redis, "redis-get", (64, 1))


def get_postgres(bench):
    cluster = bench.postgres(servers.machine.SERVER_CORE)
    try:
        cluster.new_database("reads", USERS, ROLE)
        with rolecache(bench) as server:
            # The server's own connections are on all cores again.
            bench.postgres(servers.machine.SERVER_CORE)
            select = ["--users", USERS, "--database", "reads"]
            return bench.compare(
                [server.pid, cluster.pid],
                lambda _: bench.load("get", server, 4, 16, "--users", USERS),
                lambda _: bench.load("postgres-select", cluster, 16, 1, *select),
                per_second,
            )
    finally:
        cluster.psql("drop database if exists reads with (force)")
        bench.postgres()


@contextmanager
def etcd(bench):
    with servers.etcd(bench) as server:
        put = bench.load("etcd-put", server, 4, 16, "--users", ETCD_USERS, seconds=3)
        if put["calls"] < ETCD_USERS:
            raise RuntimeError(f"only {put['calls']} of {ETCD_USERS} keys were written in time")
        yield server


def get_etcd(bench):
    return get(bench, (4, 16), etcd, "etcd-range", (4, 16), users=ETCD_USERS)


def one_in_flight(bench):
    return get(bench, (64, 1), redis, "redis-get", (64, 1))


def one_caller(bench):
    return get(bench, (1, 1), redis, "redis-get", (1, 1), ratio=p50)


def batch(bench):
    with rolecache(bench) as server, redis(bench) as other:
        of_many = ["--users", USERS, "--batch", BATCH]
        return bench.compare(
            [server.pid, other.pid],
            lambda _: bench.load("batch", server, 4, 4, *of_many),
            lambda _: bench.load("redis-mget", other, 16, 1, *of_many),
            per_second,
        )


ROWS = [
    Row("get-empty", "GetRole hit, 4 connections x 16 in flight, calls/s on one core, against an empty RPC of stock tonic",
        get_empty, 0.95, 1.5),
    Row("get-redis", "the same against Redis GET, 64 clients, not pipelined", get_redis, 2.5),
    Row("get-postgres", "the same against PostgreSQL primary-key SELECT, prepared, 16 clients", get_postgres, 4),
    Row("get-etcd", "the same against etcd serializable Range", get_etcd, 10),
    Row("one-in-flight", "64 connections x 1 in flight against Redis GET", one_in_flight, 1.0),
    Row("one-caller", "one caller, one at a time: p50 against Redis GET by the same kind of client", one_caller, 2, 1.3,
        more=False),
    Row("batch", "BatchGetRoles(1000), roles/s against Redis MGET(1000)", batch, 5),
]
