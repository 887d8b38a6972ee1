"""What machines of more cores would do, by calculation from what an operation costs on this one."""

from bench import median_of

MACHINES = [2, 8, 64]
WATCHERS = 10_000


def costs(rows):
    """Microseconds of a processor for each operation, as far as they were measured."""
    found = {}

    def take(name, row, side, *path):
        result = rows.get(row, {})
        if "rounds" in result:
            found[name] = median_of(result["rounds"], side, *path)

    take("get", "get-empty", "ours", "serverCpu")
    take("getAlone", "one-in-flight", "ours", "serverCpu")
    take("batch", "batch", "ours", "serverCpu")
    take("set", "set-callers", "ours", "serverCpu")
    take("setStore", "set-callers", "ours", "storeCpu")
    take("setRate", "set-callers", "ours", "perSecond")
    take("delivery", "fanout-cpu", "ours", "serverCpu")
    take("deliveryOfTen", "fanout-ten", "ours", "serverCpu")
    return found


def machines(costs):
    """A line for each question: its name, and the answer for each machine."""
    lines = []

    def line(what, needs, answer):
        if all(need in costs for need in needs):
            lines.append((what, [answer(cores) for cores in MACHINES]))

    line("GetRole, 16 calls in flight on a connection, calls/s", ["get"], lambda n: thousands(n * 1e6 / costs["get"]))
    line("GetRole, one call in flight on a connection, calls/s", ["getAlone"],
         lambda n: thousands(n * 1e6 / costs["getAlone"]))
    line("BatchGetRoles(1000), roles/s", ["batch"], lambda n: thousands(n * 1e9 / costs["batch"]))
    line("SetRole, of which the server's processors could do, writes/s", ["set"],
         lambda n: thousands(min(n, WRITER_CORES) * 1e6 / costs["set"]))
    line("SetRole, of which PostgreSQL's processors could do, writes/s", ["setStore"],
         lambda n: thousands(n * 1e6 / costs["setStore"]))
    line(f"one change to {WATCHERS:,} watchers: until all have it, ms", ["delivery"],
         lambda n: f"{WATCHERS * costs['delivery'] / n / 1000:.1f}")
    line("deliveries/s, a change at a time", ["delivery"], lambda n: thousands(n * 1e6 / costs["delivery"]))
    line("deliveries/s, ten changes at a time", ["deliveryOfTen"], lambda n: thousands(n * 1e6 / costs["deliveryOfTen"]))
    return lines


# One task writes, and one reads the log: beside them, connections are served by the others.
WRITER_CORES = 2


def thousands(number):
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.0f} k"
