"""Where growth stops being linear, found in the points, and why."""

# Past so much of a core there is nothing left to grow into.
BUSY = 0.9


def users(points):
    first, last = points[0], points[-1]
    per_user = [(point["x"], point["residentBytes"] / point["x"]) for point in points if point["x"] >= 100_000]
    bytes_told = ", ".join(f"{held:.0f} at {users:,}" for users, held in per_user) or "too few here to tell"
    grown = last["get"]["serverCpu"] / first["get"]["serverCpu"]
    why = ": a table that no cache of the processor holds costs a walk to memory, once for each call" if grown > 1.05 else ""
    return (
        f"A call costs {first['get']['serverCpu']:.2f} us of a processor with {first['x']:,} users and "
        f"{last['get']['serverCpu']:.2f} us with {last['x']:,}{why}. Bytes for each user go up and down ({bytes_told}), for the table "
        "doubles when it is full."
    )


def watchers(points):
    first, last = points[0], points[-1]
    slope = (last["rolecache"]["all"]["p50"] - first["rolecache"]["all"]["p50"]) / (last["x"] - first["x"])
    fixed = first["rolecache"]["all"]["p50"]
    from_here = next((point["x"] for point in points if point["x"] * slope >= fixed), None)
    turns = f"from about {from_here:,} watchers on" if from_here else "nowhere here"
    return (
        f"One watcher is told {fixed / 1000:.2f} ms after the change was asked for, most of which is the commit; each further one adds "
        f"{slope:.2f} us, which is what counts {turns}. A delivery costs {last['rolecache']['serverCpu']:.2f} us of a processor "
        f"at {last['x']:,} watchers ({last['redis']['serverCpu']:.2f} us of Redis), and {last['ten']['serverCpu']:.2f} us "
        "where ten changes come at once."
    )


def callers(points):
    def full(kind):
        at = next((point for point in points if point[kind]["serverBusy"] >= BUSY), None)
        return f"the core is full with {at['x']} callers" if at else "the core is never full"

    best = max(points, key=lambda point: point["shared"]["perSecond"])
    return (
        f"Who share connections: {full('shared')}, and {best['x']} of them get the most, {best['shared']['perSecond']:,.0f} "
        f"calls/s. With a connection each: {full('own')}; then it is {points[-1]['own']['serverCpu']:.1f} us for a call with "
        f"{points[-1]['x']:,} callers, against {points[-1]['shared']['serverCpu']:.1f} us where they share, for every call is a read "
        "and a write of its own. Past a full core, more callers wait longer and get no more."
    )


def writers(points):
    first, best = points[0], max(points, key=lambda point: point["set"]["perSecond"])
    return (
        f"One caller gets {first['set']['perSecond']:,.0f} writes/s, a commit each; {best['x']} get "
        f"{best['set']['perSecond']:,.0f}, since what waits is committed together. There PostgreSQL takes {best['storeCpu']:.0f} us of a "
        f"processor for each, and rolecache {best['set']['serverCpu']:.0f}."
    )


def replicas(points):
    first, last = points[0], points[-1]
    each = (last["set"]["serverCpu"] - first["set"]["serverCpu"]) / (last["x"] - first["x"])
    return (
        f"Every server reads every change: each one more costs {each:.1f} us of a processor for each write, and no read anything. A watcher "
        f"of the last one has a change {last['watch']['all']['p50'] / 1000:.2f} ms after it was asked for at the first "
        f"(p50, {last['x']} servers)."
    )


def rate(points):
    told = ", ".join(f"{point['get']['p50'] / 1000:.2f} ms and {point['get']['p99'] / 1000:.2f} ms at {point['x']:.0f} %"
                     for point in points)
    return (
        "Calls that are due at their time, whether or not the server keeps up, and are counted from then; by tonic's client, whose core "
        f"is full before the server's is. p50 and p99: {told}."
    )


SENTENCES = {"users": users, "watchers": watchers, "callers": callers, "writers": writers, "replicas": replicas, "rate": rate}
