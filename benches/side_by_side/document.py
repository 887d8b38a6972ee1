"""`docs/benchmarks.md`, from the results and nothing else: it can be written again without measuring."""

import capacity
import turning
from bench import median_of

HEAD = """# Benchmarks

rolecache beside what one would use instead of it, on one machine, in one run. `scripts/bench` measures it and writes this
page; every figure is from {results}, so that `scripts/bench --document` writes it again.

"""

METHOD = """## How it is measured

- **Ratios in one run.** Both servers run beside each other, and are asked in turn, round by round; the one that begins is the
  other one each time. A ratio is of one round; what is told is the median of {rounds} rounds, and the least and the most.
- **One core for the server, one for what asks it**, in the rows that say so and in those of watches: `taskset`. Rows of writes
  have all cores, for PostgreSQL needs its part.
- **One load generator for all** (`benches/peers`): a closed loop of so many connections with so many calls in flight, which
  speaks RESP, PostgreSQL's protocol, or gRPC over HTTP/2, in a fraction of the time that a whole client takes: so one core
  can keep a server on another one busy. Each answer is looked at; one that is none (an error, a miss, a write that changed
  nothing) fails the row.
- **Servers as their packages set them up**, rolecache as it is deployed (profile `dist`) with its default settings: every layer
  on, rate limits too. Redis holds its data in memory alone, unless the row says otherwise; PostgreSQL and etcd sync to disk.
- **Processor** is the time of the server's processes, and the kernel's for them, for each operation (`/proc/PID/stat`).
- **Noise.** Of each round it is counted what processors did for others, and what the host took. A round with more than a tenth of a
  core of either is measured again, by that rule alone.
"""


def write(path, results, pictures):
    """Writes the page; `pictures` are the plots by name, as paths from where it is."""
    rows = results["rows"]
    text = HEAD.format(results=f"[{results['file']}]({results['file']})")
    if results["quick"]:
        text += "**A quick run:** it shows that everything can be measured, and says little about speed.\n\n"
    text += goals(results) + figures(rows)
    text += METHOD.format(rounds=results["roundsOfRow"])
    text += machine(results) + growth(results["growth"], pictures) + larger(rows)
    path.write_text(text)


def table(head, *lines):
    text = f"| {' | '.join(head)} |\n|{'---|' * len(head)}\n"
    return text + "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines) + "\n"


def goals(results):
    lines, compared = [], []
    for row in results["table"]:
        result = results["rows"].get(row.name)
        if result is None:
            continue
        if "failed" in result:
            out, verdict = result["failed"].splitlines()[0], "MISSING" if result["missing"] else "FAILED"
        else:
            out = f"**{row.value(result['median'])}** ({row.value(result['min'])} to {row.value(result['max'])})"
            verdict = row.verdict(result["median"])
            if result["noisyRounds"] and len(result["rounds"]) + result["noisyRounds"] >= 2 * results["roundsOfRow"]:
                out += ", noisy"
        if row.goal is None:
            compared.append((f"`{row.name}`", row.what, out))
        else:
            goal = row.bound(row.goal) + (f"; stretch {row.stretch:g}" if row.stretch is not None else "")
            lines.append((f"`{row.name}`", row.what, goal, out, f"**{verdict}**"))
    text = "## What came out\n\n" + table(["Row", "What", "Goal", "Came out", ""], *lines)
    commits = {result["commit"] for result in results["rows"].values()}
    if len(commits) > 1:
        text += f"Rows were measured at more than one commit: {', '.join(sorted(commits))}.\n\n"
    if compared:
        text += "Without a goal, for comparison:\n\n" + table(["Row", "What", "Came out, times"], *compared)
    return text


def figures(rows):
    """What stands behind the ratios."""
    calls, changes = [], []
    for name, result in rows.items():
        rounds = result.get("rounds", [])
        for side in ["ours", "theirs"]:
            told = rounds[0].get(side) if rounds else None
            if told is None:
                continue
            who = f"`{name}`, {'rolecache' if side == 'ours' else 'the other'}"
            if "perSecond" in told:
                calls.append((who, shape(told), f"{median_of(rounds, side, 'perSecond'):,.0f}", *latencies(rounds, side),
                              f"{median_of(rounds, side, 'serverCpu'):.2f}"))
            elif "all" in told:
                moments = ["answer", "first", "all"] if told["deliveries"] else ["answer"]
                shown = [f"{median_of(rounds, side, moment, 'p50') / 1000:.2f}" for moment in moments]
                shown += [f"{median_of(rounds, side, 'serverCpu'):.2f}"] if told["deliveries"] else [""] * 3
                watchers = f"{told['subscribers']:,}" + (f", {told['stuck']:,} of them stuck" if told["stuck"] else "")
                changes.append((who, watchers, told["burst"], *shown))
    text = "### Behind the ratios\n\nMedians of all rounds. Times are in milliseconds, processor in microseconds for each.\n\n"
    text += table(["Row", "Connections x in flight", "Calls/s", "p50", "p99", "p99.9", "most", "Processor"], *calls)
    text += table(["Row", "Watchers", "Changes", "p50 answer", "p50 first told", "p50 all told",
                   "Processor, for each delivery"], *changes)
    return text


def shape(told):
    return f"{told['connections']} x {told['inFlight']}"


def latencies(rounds, side):
    told = rounds[0][side]["latency"]
    if "mean" in told:
        return f"mean {median_of(rounds, side, 'latency', 'mean') / 1000:.2f}", "", "", ""
    return [f"{median_of(rounds, side, 'latency', at) / 1000:.3f}" for at in ["p50", "p99", "p999", "max"]]


def machine(results):
    facts, versions = results["machine"], results["versions"]
    of = "a virtual machine" if facts["hypervisor"] else "no virtual machine"
    lines = [
        ("Processor", f"{facts['cpu']}, {facts['cores']} cores, {of}"),
        ("Memory", f"{facts['memoryGiB']} GiB"),
        ("System", f"{facts['distribution']}, Linux {facts['kernel']}"),
        ("Compiler", facts["rust"]),
        ("Measured", results["measured"]),
    ]
    lines += [(name, version) for name, version in versions.items()]
    text = "## The machine\n\n" + table(["", ""], *lines)
    return text + "```console\n$ scripts/bench              # all of it\n$ scripts/bench get-redis    # one row\n" \
        "$ scripts/bench --quick      # whether everything can be measured\n```\n\n"


def growth(growth, pictures):
    text = "## How cost grows\n\n"
    if not growth:
        return text + "Not measured in this run.\n\n"
    for name, points in growth.items():
        if isinstance(points, dict):
            text += f"`{name}`: {points['failed'].splitlines()[0]}\n\n"
            continue
        text += f"![{name}]({pictures[name]})\n\n" + turning.SENTENCES[name](points) + "\n\n"
    return text


def larger(rows):
    costs = capacity.costs(rows)
    lines = capacity.machines(costs)
    if not lines:
        return ""
    heads = ["", *(f"{cores} cores" for cores in capacity.MACHINES)]
    return (
        "## Larger machines\n\n"
        "By calculation: what an operation costs above, and cores that do nothing else. What asks is on other machines. Reads and "
        "watches share nothing that is written for each call beside counters; the kernel's part is in the figures, that of a network "
        f"card is not. Of writes, one task commits and one reads the log: no more than {capacity.WRITER_CORES} cores count for them, "
        "and a disk that syncs more slowly than this one makes groups larger before it makes writes fewer.\n\n"
        + table(heads, *((what, *answers) for what, answers in lines))
    )
