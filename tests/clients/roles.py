"""A bot's view of the service, through Python's grpcio and code generated from the contract.

Usage: roles.py HOST:PORT, with grpcio and grpcio-tools installed. Sets roles, reads them, watches, loses the watch,
and resumes it.
"""

import sys
import tempfile
from pathlib import Path

import grpc
from grpc_tools import protoc

PROTO = Path(__file__).resolve().parents[2] / "proto"
SECONDS = 10
BOT, FRIEND = 7_000_001, -7_000_002


def generate(directory):
    includes = [f"-I{PROTO}", f"-I{Path(protoc.__file__).parent / '_proto'}"]
    out = [f"--python_out={directory}", f"--grpc_python_out={directory}"]
    status = protoc.main(["protoc", *includes, *out, "rolecache/v1/rolecache.proto"])
    assert status == 0, "the contract compiles"
    sys.path.insert(0, directory)


def next_commit(watch):
    """The next whole commit of a watch: its changes, and the token to resume after it."""
    changes = []
    for message in watch:
        if message.WhichOneof("event") == "commit":
            changes.extend(message.commit.changes)
            if not message.commit.partial:
                return changes, message.commit.resume_token
    raise AssertionError("the watch ended")


def main(address, directory):
    generate(directory)
    from rolecache.v1 import rolecache_pb2 as pb
    from rolecache.v1 import rolecache_pb2_grpc as rpc

    with grpc.insecure_channel(address) as channel:
        service = rpc.RoleCacheServiceStub(channel)

        def role(user, revision=0):
            request = pb.GetRoleRequest(user_id=user, min_revision=revision)
            return service.GetRole(request, timeout=SECONDS).role

        def set_role(user, role, **more):
            return service.SetRole(pb.SetRoleRequest(user_id=user, role=role, **more), timeout=SECONDS)

        assert role(BOT) == "user"

        watch = service.WatchRoleChanges(pb.WatchRoleChangesRequest(), timeout=SECONDS)
        assert next(watch).started.resume_token
        first = set_role(BOT, "admin", request_id="roles.py-1")
        changes, token = next_commit(watch)
        assert [(c.user_id, c.new_role) for c in changes] == [(BOT, "admin")], changes
        assert changes[0].kind == pb.CHANGE_KIND_ADMIN_ADDED and changes[0].revision == first.revision
        assert role(BOT) == "admin", "who hears of a change reads it"
        watch.cancel()

        again = set_role(BOT, "admin", request_id="roles.py-1")
        assert again == first, "the same request id gets the first answer"

        # Nobody watches now.
        set_role(FRIEND, "admin")
        last = set_role(BOT, "user", expected_role="admin")
        assert role(BOT, last.revision) == "user"

        resumed = service.WatchRoleChanges(pb.WatchRoleChangesRequest(after=token), timeout=SECONDS)
        started = next(resumed).started
        assert started.resumed and started.revision == first.revision, started
        missed = [next_commit(resumed)[0] for _ in range(2)]
        seen = [[(c.user_id, c.new_role) for c in changes] for changes in missed]
        assert seen == [[(FRIEND, "admin")], [(BOT, "user")]], seen
        resumed.cancel()

        batch = pb.BatchGetRolesRequest(user_ids=[BOT, FRIEND, BOT])
        answer = service.BatchGetRoles(batch, timeout=SECONDS)
        assert [answer.roles[index] for index in answer.role_indexes] == ["user", "admin", "user"]

        try:
            set_role(BOT, "admin", expected_role="helper")
            raise AssertionError("a role that the user has not was accepted as expected")
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.FAILED_PRECONDITION, error

    print("   Python's grpcio sets, gets, watches and resumes")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as generated:
        main(sys.argv[1], generated)
