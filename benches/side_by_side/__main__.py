"""Measures rolecache beside what one would use instead of it. Usage: scripts/bench [--quick] [--document] [ROW...]"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import document
import machine
import memory
import plots
import reads
import servers
import watches
import writes
from bench import Bench, say
from growth import GROWTH

ROOT = Path(__file__).resolve().parents[2]
ROWS = reads.ROWS + writes.ROWS + watches.ROWS + memory.ROWS
FILE = "benchmarks.json"


def arguments():
    names = [row.name for row in ROWS] + [f"growth-{name}" for name in GROWTH]
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__.split(". ")[0] + ".")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="all without one: " + ", ".join(names))
    parser.add_argument("--quick", action="store_true", help="whether everything can be measured; into target/bench")
    parser.add_argument("--document", action="store_true", help="measure nothing, write the document again")
    asked = parser.parse_args()
    unknown = set(asked.rows) - set(names)
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return asked


def build():
    """The server as it is deployed, and the load generator beside it; apart, or the one would have the features of the other."""
    found = {}
    for what, name in [("--bin", "rolecache"), ("--bench", "peers")]:
        command = ["cargo", "build", "--locked", "--profile", "dist", what, name, "--message-format", "json-render-diagnostics"]
        told = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        for line in map(json.loads, told.splitlines()):
            if line.get("executable") and line["target"]["name"] == name:
                found[name] = line["executable"]
    return found["rolecache"], found["peers"]


def versions(rolecache):
    """Of what is there, in its own words."""
    asked = {
        "rolecache": [rolecache, "--version"],
        "Redis": ["redis-server", "--version"],
        "etcd": ["etcd", "--version"],
        "PostgreSQL": ["postgres", "--version"],
    }
    found = {}
    for name, (program, flag) in asked.items():
        try:
            program = servers.find(program, "usr/lib/postgresql/*/bin", "usr/pgsql-*/bin")
            found[name] = re.search(r"\d+\.\d+(\.\d+)?", machine.output(program, flag))[0]
        except servers.Missing:
            found[name] = "not installed"
    lock = (ROOT / "Cargo.lock").read_text()
    tonic = re.search(r'name = "tonic"\nversion = "(.*?)"', lock)[1]
    return {**found, "tonic": tonic, "commit": machine.output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")}


def measure(bench, what, name, of):
    """The result, or why there is none."""
    say(f"{name}: {what}")
    begun = time.monotonic()
    try:
        result = of(bench)
    except servers.Missing as missing:
        result = {"failed": str(missing), "missing": True}
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or ""
        result = {"failed": f"{error} {said}".strip(), "missing": False}
    if "failed" in result:
        say(f"   {result['failed']}")
    elif "median" in result:
        say(f"   {result['median']:.2f} ({result['min']:.2f} to {result['max']:.2f})")
    say(f"   in {time.monotonic() - begun:.0f} s")
    return result


def main():
    asked = arguments()
    # So that whoever ends it ends what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    place = ROOT / "target" / "bench" if asked.quick else ROOT / "docs"
    place.mkdir(parents=True, exist_ok=True)
    file = place / FILE
    results = json.loads(file.read_text()) if file.exists() else {"rows": {}, "growth": {}}
    if not asked.document:
        binaries = build()
        with Bench(binaries, asked.quick) as bench:
            results.update(
                machine=machine.facts(),
                versions=versions(binaries[0]),
                measured=time.strftime("%Y-%m-%d", time.gmtime()),
                quick=asked.quick,
                roundsOfRow=bench.rounds,
                secondsOfRound=bench.seconds,
            )
            wanted = [row for row in ROWS if not asked.rows or row.name in asked.rows]
            for row in wanted:
                results["rows"][row.name] = measure(bench, row.what, row.name, row.measure)
                results["rows"][row.name]["commit"] = results["versions"]["commit"]
                file.write_text(json.dumps(results, indent=1))
            for name, of in GROWTH.items():
                if not asked.rows or f"growth-{name}" in asked.rows:
                    results["growth"][name] = measure(bench, of.__doc__, f"growth-{name}", of)
                    file.write_text(json.dumps(results, indent=1))
    if not results["rows"]:
        sys.exit(f"nothing has been measured yet: there is no {file}")
    pictures = plots.draw(results["growth"], place / "img")
    pictures = {name: os.path.join("img", picture) for name, picture in pictures.items()}
    page = place / "benchmarks.md"
    document.write(page, {**results, "table": ROWS, "file": FILE}, pictures)
    say(f"written: {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
