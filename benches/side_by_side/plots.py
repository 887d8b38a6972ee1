"""The plots of how cost grows, as SVG."""

import matplotlib

matplotlib.use("svg")
# The same picture from the same figures, byte for byte.
matplotlib.rcParams["svg.hashsalt"] = "rolecache"
matplotlib.rcParams["font.size"] = 9

import matplotlib.pyplot as pyplot  # noqa: E402


def draw(growth, directory):
    """Writes what there is; the names of the files."""
    directory.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, points in growth.items():
        if not isinstance(points, list):
            continue
        figure = PLOTS[name](points)
        for axis in figure.axes:
            if axis.get_yscale() == "linear":
                axis.set_ylim(bottom=0)
        figure.tight_layout()
        figure.savefig(directory / f"{name}.svg", metadata={"Date": None})
        pyplot.close(figure)
        drawn[name] = f"{name}.svg"
    return drawn


def panels(points, label, *titles, scale="log"):
    figure, axes = pyplot.subplots(1, len(titles), figsize=(4.2 * len(titles), 3.2))
    for axis, title in zip(axes, titles):
        axis.set_title(title)
        axis.set_xlabel(label)
        axis.set_xscale(scale)
        axis.grid(True, alpha=0.3)
    return figure, axes, [point["x"] for point in points]


def line(axis, x, y, label=None, scale="linear"):
    axis.plot(x, y, marker="o", markersize=3, label=label)
    axis.set_yscale(scale)
    if label:
        axis.legend(fontsize=8)


def of(points, *path):
    values = []
    for value in points:
        for key in path:
            value = value[key]
        values.append(value)
    return values


def of_processor(points, side):
    """Without what is too little for the system's clock of a hundredth of a second."""
    told = [point[side] for point in points]
    return [one["serverCpu"] if one["serverBusy"] * one["seconds"] >= 0.1 else None for one in told]


def users(points):
    figure, (calls, cost, memory), x = panels(
        points, "users in the cache", "GetRole, calls/s", "processor, us per call", "memory, MiB"
    )
    line(calls, x, of(points, "get", "perSecond"))
    line(cost, x, of(points, "get", "serverCpu"))
    line(memory, x, [held / 2**20 for held in of(points, "residentBytes")], scale="log")
    return figure


def watchers(points):
    figure, (time, cost), x = panels(points, "watchers", "until all have one change, ms", "processor, us per delivery")
    for peer in ["rolecache", "redis"]:
        line(time, x, [p50 / 1000 for p50 in of(points, peer, "all", "p50")], peer, "log")
        line(cost, x, of_processor(points, peer), peer, "log")
    line(cost, x, of_processor(points, "ten"), "rolecache, ten at once", "log")
    return figure


def callers(points):
    figure, (calls, p50, cost), x = panels(
        points, "callers", "calls/s", "p50, ms", "processor, us per call"
    )
    names = {"shared": "GetRole, 16 to a connection", "own": "GetRole, one to a connection", "redis": "Redis GET"}
    for key, name in names.items():
        line(calls, x, of(points, key, "perSecond"), name)
        line(p50, x, [value / 1000 for value in of(points, key, "latency", "p50")], name)
        line(cost, x, of(points, key, "serverCpu"), name)
    return figure


def writers(points):
    figure, (calls, p50, cost), x = panels(points, "callers", "SetRole, writes/s", "p50, ms", "processor, us per write")
    line(calls, x, of(points, "set", "perSecond"))
    line(p50, x, [value / 1000 for value in of(points, "set", "latency", "p50")])
    line(cost, x, of(points, "set", "serverCpu"), "rolecache")
    line(cost, x, of(points, "storeCpu"), "PostgreSQL")
    return figure


def replicas(points):
    figure, (calls, cost, watch), x = panels(
        points, "servers on one database", "SetRole, writes/s", "processor of all servers, us per write",
        "p50 until another server's watcher has it, ms", scale="linear",
    )
    line(calls, x, of(points, "set", "perSecond"))
    line(cost, x, of(points, "set", "serverCpu"))
    line(watch, x, [value / 1000 for value in of(points, "watch", "all", "p50")])
    return figure


def rate(points):
    figure, (latency, cost), x = panels(
        points, "% of the most calls/s", "GetRole, ms", "processor, us per call", scale="linear"
    )
    for quantile, name in [("p50", "p50"), ("p99", "p99"), ("p999", "p99.9")]:
        line(latency, x, [value / 1000 for value in of(points, "get", quantile)], name)
    line(cost, x, of(points, "get", "serverCpu"))
    return figure


PLOTS = {"users": users, "watchers": watchers, "callers": callers, "writers": writers, "replicas": replicas, "rate": rate}
