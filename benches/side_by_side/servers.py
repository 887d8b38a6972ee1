"""The servers that are measured: each on a free port of loopback, with its data in a temporary directory."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import machine

# Until a server answers, or has ended.
PATIENCE = 60


class Missing(Exception):
    """A peer that is not on this machine."""


def find(name, *directories):
    found = shutil.which(name) or next((path for at in directories for path in Path("/").glob(f"{at}/{name}")), None)
    if not found:
        raise Missing(f"{name} is not installed")
    return str(found)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """A process with a port, until the end of a `with`."""

    # What ends it, and how long each may take.
    signals = [(signal.SIGTERM, 15), (signal.SIGKILL, 5)]

    def __init__(self, command, directory, port, core=None, env=None):
        self.port, self.address = port, f"127.0.0.1:{port}"
        self.log = directory / "log"
        with self.log.open("ab") as log:
            command = [*machine.on_core(core), *map(str, command)]
            self.process = subprocess.Popen(
                command, cwd=directory, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.pid = self.process.pid

    def __enter__(self):
        try:
            self.wait_until(self.accepts)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    def accepts(self):
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            return True
        except OSError:
            return False

    def wait_until(self, is_so):
        end = time.monotonic() + PATIENCE
        while not is_so():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self.process.args} did not start:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.02)

    def stop(self):
        for sign, patience in self.signals:
            if self.process.poll() is None:
                self.process.send_signal(sign)
                try:
                    self.process.wait(patience)
                except subprocess.TimeoutExpired:
                    continue


def empty(bench, core=machine.SERVER_CORE):
    """The empty RPC of stock tonic."""
    port = free_port()
    return Server([bench.peers, "empty", "--listen", f"127.0.0.1:{port}"], bench.new_directory(), port, core)


def redis(bench, core=machine.SERVER_CORE, *more):
    """In memory alone, unless `more` says otherwise."""
    port, directory = free_port(), bench.new_directory()
    options = ["--bind", "127.0.0.1", "--port", port, "--save", "", "--maxclients", "11000", "--dir", directory, *more]
    return Server([find("redis-server"), *options], directory, port, core)


def etcd(bench, core=machine.SERVER_CORE):
    port, peer, directory = free_port(), free_port(), bench.new_directory()
    urls = [f"--{kind}-urls=http://127.0.0.1:{at}" for kind, at in [
        ("listen-client", port), ("advertise-client", port), ("listen-peer", peer), ("initial-advertise-peer", peer),
    ]]
    cluster = f"--initial-cluster=default=http://127.0.0.1:{peer}"
    command = [find("etcd"), f"--data-dir={directory}/data", "--log-level=error", *urls, cluster]
    return Server(command, directory, port, core)


class Rolecache(Server):
    """As it is deployed, with the settings that it has by itself, on a database of PostgreSQL."""

    def __init__(self, bench, url, core=machine.SERVER_CORE, arguments=()):
        port = free_port()
        env = {name: value for name, value in os.environ.items() if not name.startswith(("ROLECACHE_", "DATABASE_URL"))}
        self.started = time.monotonic()
        command = [bench.rolecache, "serve", "--listen", f"127.0.0.1:{port}", "--log-format", "text", *arguments]
        super().__init__(command, bench.new_directory(), port, core, {**env, "DATABASE_URL": url})

    def __enter__(self):
        super().__enter__()
        try:
            self.wait_until(lambda: " ready " in self.log.read_text())
        except BaseException:
            self.stop()
            raise
        self.took = time.monotonic() - self.started
        return self


class Postgres(Server):
    """A new cluster as its packages set it up: durable."""

    # By SIGTERM it would wait for its clients.
    signals = [(signal.SIGINT, 60), (signal.SIGQUIT, 10), (signal.SIGKILL, 5)]

    def __init__(self, bench):
        found = find("initdb", "usr/lib/postgresql/*/bin", "usr/pgsql-*/bin", "usr/libexec/postgresql*")
        self.bin = Path(found).resolve().parent
        directory, port = bench.new_directory(), free_port()
        user = unprivileged(directory)
        initdb = ["--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "-D", directory / "data"]
        subprocess.run([*user, self.bin / "initdb", *initdb], check=True, capture_output=True, timeout=120)
        options = ["-p", port, "-k", directory, "-c", "listen_addresses=127.0.0.1", "-c", "max_connections=300"]
        super().__init__([*user, self.bin / "postgres", "-D", directory / "data", *options], directory, port)

    def accepts(self):
        ready = [self.bin / "pg_isready", "--quiet", "--host", "127.0.0.1", "--port", str(self.port)]
        return subprocess.run(ready, timeout=10).returncode == 0

    def url(self, database):
        return f"postgres://postgres@127.0.0.1:{self.port}/{database}"

    def psql(self, sql, database="postgres"):
        command = [self.bin / "psql", "-qX", "-v", "ON_ERROR_STOP=1", "-At", self.url(database)]
        return subprocess.run(command, input=sql, check=True, capture_output=True, text=True, timeout=600).stdout

    def new_database(self, name, users, role):
        """A table of users that a bot could have, each with a role by the SQL expression `role` of i."""
        self.psql(f"create database {name}")
        self.psql(
            f"""create table users (user_id bigint primary key, role text, username text);
            insert into users (user_id, role) select i, {role} from generate_series(1, {users}) i;
            vacuum analyze users;
            checkpoint;""",
            name,
        )
        return self.url(name)


def unprivileged(directory):
    """PostgreSQL refuses to run as root."""
    if os.getuid() != 0:
        return []
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    os.chown(directory, user.pw_uid, user.pw_gid)
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
