"""Writes, durable: on all cores, for PostgreSQL has to have its part."""

import re
import subprocess
from contextlib import contextmanager

import servers
from reads import p50, per_second
from row import Row

USERS = 20_000
# Of each round its own: everybody is a user there at first.
ROUNDS = 20

TOGGLE = """\\set id random({first}, {last})
update users set role = case role when 'admin' then 'user' else 'admin' end where user_id = :id;
"""


def first(number):
    return 1 + number * USERS


@contextmanager
def databases(bench):
    """One that a server is on, and one with the same triggers that it has set up and left."""
    cluster = bench.postgres()
    served, plain = (f"{kind}_{bench.new_directory().name}" for kind in ["served", "plain"])
    urls = [cluster.new_database(name, USERS * ROUNDS, "'user'") for name in [served, plain]]
    migrate = [bench.rolecache, "migrate", "--database-url", urls[1]]
    subprocess.run(migrate, check=True, capture_output=True, timeout=60)
    with servers.Rolecache(bench, urls[0], core=None) as server:
        yield cluster, server, plain


def pgbench(bench, cluster, database, users, clients):
    script = bench.new_directory() / "update.sql"
    script.write_text(TOGGLE.format(first=users, last=users + USERS - 1))
    command = [servers.find("pgbench", "usr/lib/postgresql/*/bin", "usr/pgsql-*/bin"), "-n", "-M", "prepared"]
    command += ["-c", str(clients), "-j", "2", "-T", str(max(1, round(bench.seconds))), "-f", str(script)]
    before = servers.machine.worked(cluster.pid)
    told = subprocess.run([*command, cluster.url(database)], check=True, capture_output=True, text=True, timeout=120).stdout
    worked = servers.machine.worked(cluster.pid) - before
    done = int(re.search(r"actually processed: (\d+)", told)[1])
    latency = float(re.search(r"latency average = ([\d.]+) ms", told)[1])
    failed = re.search(r"number of failed transactions: (\d+)", told)
    if failed and int(failed[1]):
        raise RuntimeError(f"pgbench: {failed[0]}")
    return {
        "connections": clients,
        "inFlight": 1,
        "calls": done,
        "perSecond": float(re.search(r"tps = ([\d.]+)", told)[1]),
        "latency": {"mean": latency * 1000},
        "serverCpu": worked * 1e6 / done,
    }


def set_callers(bench):
    with databases(bench) as (cluster, server, plain):

        def ours(number):
            users = ["--first", first(number), "--users", USERS]
            before = servers.machine.worked(cluster.pid)
            told = bench.load("set", server, 4, 16, *users, core=None)
            # With its warm-up, which it does not count.
            worked = (servers.machine.worked(cluster.pid) - before) * bench.seconds / (bench.seconds + bench.warm_up)
            return {**told, "storeCpu": worked * 1e6 / max(1, told["calls"])}

        return bench.compare(
            [server.pid, cluster.pid],
            ours,
            lambda number: pgbench(bench, cluster, plain, first(number), 64),
            per_second,
        )


def set_one(bench):
    with databases(bench) as (cluster, server, plain):

        def one_user(number):
            return ["--first", first(number), "--users", 1]

        return bench.compare(
            [server.pid, cluster.pid],
            lambda number: bench.load("set", server, 1, 1, *one_user(number), core=None),
            lambda number: bench.load(
                "postgres-update", cluster, 1, 1, *one_user(number), "--database", plain, core=None
            ),
            p50,
        )


def set_etcd(bench):
    with databases(bench) as (cluster, server, _), servers.etcd(bench, core=None) as other:
        return bench.compare(
            [server.pid, cluster.pid, other.pid],
            lambda number: bench.load("set", server, 4, 16, "--first", first(number), "--users", USERS, core=None),
            lambda number: bench.load("etcd-put", other, 4, 16, "--first", first(number), "--users", USERS, core=None),
            per_second,
        )


def set_redis(bench):
    durable = ["--appendonly", "yes", "--appendfsync", "always"]
    with databases(bench) as (cluster, server, _), servers.redis(bench, None, *durable) as other:
        return bench.compare(
            [server.pid, cluster.pid, other.pid],
            lambda number: bench.load("set", server, 4, 16, "--first", first(number), "--users", USERS, core=None),
            lambda number: bench.load("redis-set", other, 64, 1, "--first", first(number), "--users", USERS, core=None),
            per_second,
        )


ROWS = [
    Row("set-callers", "SetRole, 64 callers, durable on PostgreSQL, against pgbench single-row UPDATE with 64 clients and "
        "the same triggers", set_callers, 3, 5),
    Row("set-one", "SetRole, one caller: p50 against UPDATE and COMMIT of the same row with the same triggers", set_one,
        3, 2, more=False),
    Row("set-etcd", "SetRole, 64 callers, against etcd Put", set_etcd),
    Row("set-redis", "SetRole, 64 callers, against Redis SET, 64 clients, synced to disk each time", set_redis),
]
