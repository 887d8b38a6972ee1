"""What users cost in memory, in time at the start, and while nobody asks for anything."""

import subprocess
import time

import machine
import servers
from bench import settle
from row import Row

IDLE_USERS, IDLE_WATCHERS = 1_000_000, 1_000


def resident_after(server):
    settle(2)
    return machine.resident(server.pid)


def lazy(users):
    """Everybody is asked for once. The store need not know them: who has the default role is cached as well."""

    def measure(bench):
        url = bench.postgres().new_database(f"lazy_{bench.new_directory().name}", 1_000, "'user'")
        count = bench.of_size(users)

        def once(_):
            with servers.Rolecache(bench, url) as server:
                before = resident_after(server)
                filled = bench.fill(server, count)
                return {"value": (resident_after(server) - before) / count, "users": count, "seconds": filled["seconds"]}

        return bench.values([bench.postgres().pid], once, rounds=1)

    return measure


def complete_memory(bench):
    cluster, users = bench.postgres(), bench.of_size(10_000_000)
    name = bench.new_directory().name
    roles = {"few": (users, "case when i % 100 = 0 then 'admin' else 'user' end"), "none": (1_000, "'user'")}
    urls = {kind: cluster.new_database(f"{kind}_{name}", *of) for kind, of in roles.items()}

    def once(_):
        taken = {}
        for kind, url in urls.items():
            with servers.Rolecache(bench, url, arguments=["--cache", "complete"]) as server:
                taken[kind] = resident_after(server)
        return {"value": (taken["few"] - taken["none"]) / users, "users": users}

    try:
        return bench.values([cluster.pid], once, rounds=1 if bench.quick else 3)
    finally:
        cluster.psql(f"drop database few_{name} with (force)")


def complete_start(bench):
    cluster, users = bench.postgres(), bench.of_size(1_000_000)
    url = cluster.new_database(f"start_{bench.new_directory().name}", users, "'admin'")
    copy = "copy (select user_id, role from users where role <> 'user') to stdout (format binary)"

    def start(_):
        with servers.Rolecache(bench, url, core=None, arguments=["--cache", "complete"]) as server:
            return {"seconds": server.took, "users": users}

    def nowhere(_):
        begun = time.monotonic()
        subprocess.run([cluster.bin / "psql", "-qX", url, "-c", copy], check=True, stdout=subprocess.DEVNULL, timeout=120)
        return {"seconds": time.monotonic() - begun, "users": users}

    return bench.compare([cluster.pid], start, nowhere, lambda ours, theirs: ours["seconds"] / theirs["seconds"])


def idle(bench):
    url = bench.postgres().new_database(f"idle_{bench.new_directory().name}", 1_000, "'user'")
    users, seconds = bench.of_size(IDLE_USERS), 10 if bench.quick else 60
    with servers.Rolecache(bench, url) as server:
        bench.fill(server, users)
        with bench.hold(server, IDLE_WATCHERS):
            settle(2 if bench.quick else 15)

            def once(_):
                before = machine.worked(server.pid)
                time.sleep(seconds)
                worked = machine.worked(server.pid) - before
                return {"value": 100 * worked / seconds, "users": users, "watchers": IDLE_WATCHERS, "seconds": seconds}

            return bench.values([server.pid, bench.postgres().pid], once, rounds=1 if bench.quick else 3)


ROWS = [
    Row("lazy-1m", "bytes per cached user, lazy, 1 M users (RSS)", lazy(1_000_000), 26, more=False, unit="bytes"),
    Row("lazy-1.9m", "the same, 1.9 M users", lazy(1_900_000), 26, more=False, unit="bytes"),
    Row("lazy-10m", "the same, 10 M users", lazy(10_000_000), 26, more=False, unit="bytes"),
    Row("complete-memory", "complete mode, 10 M users of whom 1 % have a role, bytes per user", complete_memory, 1,
        more=False, unit="bytes"),
    Row("complete-start", "start in complete mode, 1 M users with a role, against psql's binary COPY of the same rows to "
        "nowhere", complete_start, 1.5, more=False),
    Row("idle", "idle server, 1 M users cached, 1,000 watchers, heartbeats included", idle, 0.5, more=False,
        unit="percent"),
]
