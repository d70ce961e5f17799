"""Tests of etcd_fdw, against real servers: the program runs as a subprocess, as a user runs it.

The servers are those of ETCD_FDW_TEST_POSTGRES_DSN and ETCD_FDW_TEST_ETCD_DSN, else throw-away ones
of the programs that etcd_fdw.find_program finds. Each test has a database and a key prefix of its
own. The sections are the markers of .pytest.ini (pytest -m faults), but for the first, the harness:
servers, clients, the program; what etcd told (Recorder) against the mirror (assert_same) and
outcomes (assert_outcomes); Proxy, a bad network; Load.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import base64
import bisect
import collections
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
import xmlrpc.client
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import (
    ExitStack,
    closing,
    contextmanager,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Callable, ClassVar, NamedTuple, TypeVar

# Before gRPC is loaded: its handlers abort what the tests start as another user, now and then.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

# pytest-timeout cannot interrupt libpq: what waits for a lock for ever must fail by itself.
os.environ["PGOPTIONS"] = "-c lock_timeout=100s"

import grpc
import hypothesis
import psycopg2
import psycopg2.errors
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from psycopg2.extensions import make_dsn
from supervisor.xmlrpc import SupervisorTransport

import etcd_fdw
from etcd_fdw import Room, etcdrpc

SCRIPT = Path(etcd_fdw.__file__).resolve()
SCHEMA_SQL = etcd_fdw.SCHEMA_FILE.read_text(encoding="utf-8")
T = TypeVar("T")
RUN_ID = uuid.uuid4().hex[:6]  # servers from the environment may be shared with other runs
_numbers = itertools.count(1)

# ── harness ──────────────────────────────────────────────────────────────────

# A shell starts what it puts into the background with SIGINT ignored, nohup with SIGHUP: so would
# be the programs under test. A signal that is handled here has its default there.
for _signum in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(_signum) is signal.SIG_IGN:
        signal.signal(_signum, lambda *_: None)

# Machines under load have slow moments. The examples are the same in each run, unless
# ETCD_FDW_TEST_SEED is given.
hypothesis.settings.register_profile(
    "etcd_fdw",
    deadline=None,
    derandomize="ETCD_FDW_TEST_SEED" not in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("etcd_fdw")

WAIT_S = 90.0  # the deadline of every wait: it only turns a hang into a failure that says of what


def wait_until(message: str, predicate: Callable[[], T], timeout: float = WAIT_S) -> T:
    """Wait until predicate() is true; return what it returned. Raises TimeoutError(message)."""
    return etcd_fdw.wait_until(message, predicate, timeout)


@pytest.fixture
def seed() -> int:
    """What this test draws its random numbers from, shown if it fails, to repeat it."""
    number = int(os.environ.get("ETCD_FDW_TEST_SEED") or random.randrange(10**6))
    print(f"ETCD_FDW_TEST_SEED={number}")
    return number


class Closing:
    """What `with` closes."""

    close: Callable[[], None]

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Process:
    """What runs in a process, to be killed, frozen and thawed."""

    process: Any  # subprocess.Popen

    def signal(self, signum: signal.Signals) -> None:
        self.process.send_signal(signum)

    def kill(self) -> None:
        """End it at once, as a crash would (SIGKILL)."""
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        """Freeze it: its connections stay open and silent (SIGSTOP)."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)


# ─ servers that can fail ─

# UDP sockets on the numbers that free_port gave away last: while one is open, no other process
# gets that port from free_port, be its server not started yet or down for a while. Few enough to
# leave descriptors, and more than the servers of one test take.
_reserved_ports: collections.deque[socket.socket] = collections.deque(maxlen=100)


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on now, and no process was given lately."""
    # below the ephemeral range: there a client that keeps dialling a dead server's port can take
    # that port itself (or connect to itself), and the server cannot come back on it
    while True:
        port = random.randrange(20_000, 32_000)
        reserved = socket.socket(type=socket.SOCK_DGRAM)
        try:
            reserved.bind(("127.0.0.1", port))
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
        except OSError:
            reserved.close()
        else:
            _reserved_ports.append(reserved)
            return port


class Breakable(Process, etcd_fdw.LocalServer):
    """A throw-away server with more arguments, to be stopped, killed, frozen and started again."""

    free_port = staticmethod(free_port)
    args: list[str]  # after the server's own; a later option wins

    def command(self) -> list[str]:
        return [*super().command(), *self.args]

    def stop(self) -> None:
        """End the server in good order; kill it if that takes long."""
        if self.is_running():
            self.resume()  # a stopped process would not see the signal
            self.signal(signal.SIGINT)  # a fast shutdown of PostgreSQL
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        if self.process is not None:
            self.resume()
        super().close()


class LocalEtcd(Breakable, etcd_fdw.LocalEtcd):
    """An etcd; a member of a cluster if args say so with --initial-cluster (see peer_url)."""

    def __init__(self, args: Sequence[str] = (), name: str = "default", tls: bool = False) -> None:
        super().__init__()
        self.name = name
        self.args = [f"--name={name}", f"--initial-cluster={name}={self.peer_url}"]
        if tls:  # but for the health that is_ready asks for; the files go in args
            url = f"https://{self.endpoint}"
            self.args += [f"--listen-client-urls={url}", f"--advertise-client-urls={url}"]
        self.args += args


class LocalPostgres(Breakable, etcd_fdw.LocalPostgres):
    """A PostgreSQL; its superuser "postgres" has this password, or needs none."""

    started: ClassVar[set[str]] = set()  # host:port of each

    def __init__(self, args: Sequence[str] = (), password: str | None = None) -> None:
        super().__init__(password)
        self.args = ["-cmax_connections=200", "-cmax_prepared_transactions=20", *args]
        self.started.add(f"127.0.0.1:{self.port}")

    def start(self) -> None:
        while True:
            log_size = len(self.log())
            try:
                return super().start()
            except etcd_fdw.LocalServerError:
                # after kill -9 the old server's children may need a moment to notice
                if "is still in use" not in self.log()[log_size:]:
                    raise
                time.sleep(0.1)


# ─ data like the world's ─


class World:
    """What people keep in etcd. Whatever draws keys, values and leases draws them here."""

    KEYS: tuple[str, ...] = (  # what follows the prefix; "" is the prefix itself
        "app/timeout", "a", "a/", "a//b", " ", "  a  b ", "web 1.example", "%", "%41", "a%_\\b",
        "\t", "\n", "\\N", "\\.", "'\"", "\x01", "ä/ö", "/", "ключ", "鍵", "🐘", "e\u0301", "", "0",
    )  # fmt: skip
    JSON = '{"kind": "Pod", "labels": {"größe": "10 €"}, "ports": [80, 443], "spec": null}'
    TEXTS: tuple[str, ...] = (  # one to four bytes a character
        "", "0", "30s", "true", " ", "\\N", "\\.", "\\.\n", "a\tb\nc\rd\\e\\\\f", "'\"`$$%s%%{}",
        "größe: 10 €", "naïve 🐘 \u2028 \ufeff \U0010ffff", "日本語", JSON, f"---\n- {JSON}\n",
    )  # fmt: skip
    POD = base64.b64decode(  # protobuf in Kubernetes' envelope
        "azhzAAoJCgJ2MRIDUG9kEoUCCqgBCgV3ZWItMRIAGgdkZWZhdWx0IgAqBDNmMGMyADgAQggI3dOO2AYQAFoO"
        "CgNhcHASB2dyw7bDn2WKAUEKDGt1YmVjdGwtZWRpdBIGVXBkYXRlGgJ2MSIICN3TjtgGEAAyCEZpZWxkc1Yx"
        "Og8KDXsiZjpzcGVjIjp7fX1CAIoBKQoHa3ViZWxldBIGVXBkYXRlGgJ2MSIICN3TjtgGEAAyAEIGc3RhdHVz"
        "EkMSJQoDd2ViEgpuZ2lueDoxLjI5KgBCAGoAcgCAAQCIAQCQAQCiAQAaADIAQgBKAFIAWABgAGgAggEAigEA"
        "mgEAwgEAGhMKABoAIgAqADIASgBaAHIAiAEAGgAiAA=="
    )
    BYTES: tuple[bytes, ...] = (  # no text, as PostgreSQL has it
        POD,
        b"\0", b"\xff\xfe\x00", b"\xed\xa0\x80",  # a surrogate is no UTF-8
        bytes(range(256)), bytes.fromhex("1f8b0800000000000003"),
    )  # fmt: skip
    SIZES = (1, 10, 100, 1_000, 10_000, 100_000, 1_500_000)  # etcd takes requests of 1.5 MiB

    @classmethod
    def values(cls) -> list[bytes]:
        """Return each of them, of each size, and each byte by itself."""
        short = [*(text.encode() for text in cls.TEXTS), *(bytes([byte]) for byte in range(256))]
        return [
            *short,
            *cls.BYTES,
            *(b"x" * size for size in cls.SIZES),
            *map(os.urandom, cls.SIZES),
        ]

    @classmethod
    def text(cls, dice: random.Random, mark: str = "") -> str:
        """Return text that begins with the mark."""
        return mark + dice.choice(cls.TEXTS)

    @classmethod
    def value(cls, dice: random.Random, mark: str = "", largest: int = 100_000) -> bytes:
        """Return what begins with the mark: text, or no text, and now and then something large."""
        kind = dice.random()
        if kind < 0.02:
            size = dice.choice([size for size in cls.SIZES if size <= largest])
            return mark.encode() + dice.getrandbits(8 * size).to_bytes(size, "big")
        return mark.encode() + (dice.choice(cls.BYTES) if kind < 0.3 else cls.text(dice).encode())

    @classmethod
    def key(cls, number: int) -> str:
        """Return one of the keys: always the same of a number, never the same of two."""
        return f"{number}{cls.KEYS[number % len(cls.KEYS)]}"

    @staticmethod
    def lease(dice: random.Random) -> int:
        """Return an id for a lease; clients choose them, or leave it to etcd (0)."""
        return dice.choice((0, 1, -1)) * dice.randrange(1, 2**63)


ANY_TEXT = st.sampled_from(World.TEXTS) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0")
)


# ─ PostgreSQL ─


@pytest.fixture(scope="session")
def postgres_dsn() -> Iterator[str]:
    """The DSN of a PostgreSQL that all tests share."""
    if dsn := os.environ.get("ETCD_FDW_TEST_POSTGRES_DSN"):
        yield dsn
        return
    with LocalPostgres() as server:
        yield server.dsn()


@pytest.fixture
def db(postgres_dsn: str) -> Iterator[str]:
    """The DSN of an empty database, for this test alone."""
    name = f"etcd_fdw_{RUN_ID}_{next(_numbers)}"
    rows(postgres_dsn, f"CREATE DATABASE {name} ENCODING 'UTF8' TEMPLATE template0")
    yield make_dsn(postgres_dsn, dbname=name)
    rows(postgres_dsn, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def own_postgres() -> Iterator[LocalPostgres]:
    """A PostgreSQL for this test alone, to kill, pause and restart."""
    with LocalPostgres() as server:
        yield server


def connect(db: str, **options: Any) -> psycopg2.extensions.connection:
    """Open a connection in autocommit mode; options are libpq's, such as port=proxy.port."""
    conn = psycopg2.connect(make_dsn(db, **{"connect_timeout": 30, **options}))
    conn.autocommit = True
    return conn


@contextmanager
def session(db: str, *statements: str, **options: Any) -> Iterator[Any]:
    """A cursor of a session of its own, which has run the statements, such as BEGIN."""
    with closing(connect(db, **options)) as conn, conn.cursor() as cur:
        for sql in statements:
            cur.execute(sql)
        yield cur


_sessions: dict[tuple[int, str], psycopg2.extensions.connection] = {}  # by thread and DSN


def close_sessions() -> None:
    """Close what rows() has kept open."""
    while _sessions:
        _sessions.popitem()[1].close()


@pytest.fixture(autouse=True)
def _no_session_outlives_its_test() -> Iterator[None]:
    yield
    close_sessions()


def rows(db: str, sql: str, *args: Any) -> list[tuple[Any, ...]]:
    """Run one statement, committed; return its rows (bytea as bytes). Keeps the session."""
    conn = _sessions.pop(key := (threading.get_ident(), db), None)
    if conn is None or _has_ended(conn):
        conn = connect(db)
    try:
        with conn.cursor() as cur:
            cur.execute(sql, args or None)
            found = [] if cur.description is None else [_plain(row) for row in cur]
    except BaseException:
        conn.close()
        raise
    _sessions[key] = conn
    return found


def _has_ended(conn: psycopg2.extensions.connection) -> bool:
    """Whether PostgreSQL has closed a session: it sends nothing else to one that is idle."""
    if not conn.closed:
        poll = select.poll()
        poll.register(conn, select.POLLIN)
        if not poll.poll(0):
            return False
        conn.close()
    return True


def create_role(db: str, name: str) -> None:
    """Make a role that can log in as make_dsn(db, user=name) says, which keeps the password."""
    password = psycopg2.extensions.parse_dsn(db).get("password")
    rows(db, f"CREATE ROLE {name} LOGIN PASSWORD %s", password)


def scalar(db: str, sql: str, *args: Any) -> Any:
    """Return the first column of the first row, or None if there is no row."""
    return next(iter(rows(db, sql, *args)), (None,))[0]


def _plain(row: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(bytes(item) if isinstance(item, memoryview) else item for item in row)


# ─ etcd ─

DELETE = 1  # mvccpb.Event.DELETE, which etcdrpc does not export
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # no connection or backoff shared between clients
]


class Event(NamedTuple):
    """What happened to a key at a revision, as etcd tells it and as the mirror should have it."""

    revision: int
    key: bytes
    value: bytes | None  # None: deleted


def _bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def prefix_end(prefix: str | bytes) -> bytes:
    """Return the range_end that covers the keys with this prefix; the empty prefix covers all."""
    stem = _bytes(prefix).rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else b"\0"


class EtcdClient(Closing):
    """A bare client: raw stubs, no retries. Raises grpc.RpcError. Keys may be str or bytes."""

    def __init__(
        self,
        endpoint: str,
        user: str | None = None,
        password: str = "",
        credentials: grpc.ChannelCredentials | None = None,
        timeout: float = 30.0,
    ) -> None:
        self.endpoint, self.timeout = endpoint, timeout
        self.metadata: list[tuple[str, str]] = []
        if credentials is not None:
            self.channel = grpc.secure_channel(endpoint, credentials, options=CHANNEL_OPTIONS)
        else:
            self.channel = grpc.insecure_channel(endpoint, options=CHANNEL_OPTIONS)
        self.kv = etcdrpc.KVStub(self.channel)
        self.leases = etcdrpc.LeaseStub(self.channel)
        self.watches = etcdrpc.WatchStub(self.channel)
        self.maintenance = etcdrpc.MaintenanceStub(self.channel)
        self.auth = etcdrpc.AuthStub(self.channel)
        if user:
            answer = self.auth.Authenticate(
                etcdrpc.AuthenticateRequest(name=user, password=password), timeout=timeout
            )
            self.metadata = [("token", answer.token)]

    def call(self, method: Callable[..., Any], request: Any) -> Any:
        """Send one request, such as call(client.auth.UserAdd, etcdrpc.AuthUserAddRequest(…))."""
        return method(request, timeout=self.timeout, metadata=self.metadata)

    def put(self, key: str | bytes, value: str | bytes, lease: int = 0) -> int:
        """Return the revision."""
        return int(self.txn([self.put_op(key, value, lease)]).header.revision)

    def delete(self, key: str | bytes, prefix: bool = False) -> int:
        """Delete a key, or all with the prefix; return the number of keys deleted."""
        answer = self.txn([self.delete_op(key, prefix)])
        return int(answer.responses[0].response_delete_range.deleted)

    def get(self, key: str | bytes) -> Any:
        """Return the KeyValue (value, mod_revision, version, lease, …), or None."""
        answer = self.call(self.kv.Range, etcdrpc.RangeRequest(key=_bytes(key)))
        return answer.kvs[0] if answer.kvs else None

    def range(self, prefix: str | bytes, revision: int = 0) -> Any:
        """Return the RangeResponse for all keys with the prefix, now or at a revision."""
        request = etcdrpc.RangeRequest(
            key=_bytes(prefix) or b"\0", range_end=prefix_end(prefix), revision=revision
        )
        return self.call(self.kv.Range, request)

    def revision(self) -> int:
        """Return the store's revision."""
        request = etcdrpc.RangeRequest(key=b"\0", count_only=True)
        return int(self.call(self.kv.Range, request).header.revision)

    def txn(self, success: Sequence[Any], compare: Sequence[Any] = ()) -> Any:
        """Return the TxnResponse; see put_op, delete_op, txn_op, unchanged."""
        return self.call(self.kv.Txn, etcdrpc.TxnRequest(compare=compare, success=success))

    @staticmethod
    def put_op(key: str | bytes, value: str | bytes, lease: int = 0) -> Any:
        put = etcdrpc.PutRequest(key=_bytes(key), value=_bytes(value), lease=lease)
        return etcdrpc.RequestOp(request_put=put)

    @staticmethod
    def delete_op(key: str | bytes, prefix: bool = False) -> Any:
        request = etcdrpc.DeleteRangeRequest(key=_bytes(key))
        if prefix:
            request.key, request.range_end = _bytes(key) or b"\0", prefix_end(key)
        return etcdrpc.RequestOp(request_delete_range=request)

    @staticmethod
    def txn_op(success: Sequence[Any]) -> Any:
        return etcdrpc.RequestOp(request_txn=etcdrpc.TxnRequest(success=success))

    @staticmethod
    def unchanged(key: str | bytes, mod_revision: int) -> Any:
        """Compare: the key's version is still the one of mod_revision (0: there is no such key)."""
        target = etcdrpc.Compare.MOD
        return etcdrpc.Compare(key=_bytes(key), target=target, mod_revision=mod_revision)

    def grant(self, ttl: int, id_: int = 0) -> int:
        """Return the id of a new lease of ttl seconds; 0: etcd chooses it."""
        request = etcdrpc.LeaseGrantRequest(TTL=ttl, ID=id_)
        return int(self.call(self.leases.LeaseGrant, request).ID)

    def revoke(self, lease: int) -> None:
        self.call(self.leases.LeaseRevoke, etcdrpc.LeaseRevokeRequest(ID=lease))

    def compact(self, revision: int) -> None:
        """Forget what was superseded by the revision."""
        request = etcdrpc.CompactionRequest(revision=revision, physical=True)
        self.call(self.kv.Compact, request)

    def watch(self, start_revision: int, prefix: str = "") -> Any:
        """Return the call of a watch, which yields its responses until it is canceled."""
        create = etcdrpc.WatchCreateRequest(
            key=_bytes(prefix) or b"\0",
            range_end=prefix_end(prefix),
            start_revision=start_revision,
            progress_notify=True,
        )
        ended = threading.Event()  # the end of the requests would end the watch
        first = etcdrpc.WatchRequest(create_request=create)
        requests = itertools.chain([first], iter(ended.wait, True))
        call = self.watches.Watch(requests, metadata=self.metadata, wait_for_ready=True)
        call.add_callback(ended.set)
        return call

    def snapshot(self, path: Path) -> None:
        """Save the store as `etcdctl snapshot save` does (sha256 at the end, so restore checks)."""
        request = etcdrpc.SnapshotRequest()
        with path.open("wb") as file:
            for part in self.maintenance.Snapshot(request, timeout=60, metadata=self.metadata):
                file.write(part.blob)

    def close(self) -> None:
        self.channel.close()


class EtcdAddress(NamedTuple):
    """Where the shared etcd is."""

    endpoint: str  # host:port
    user: str | None = None
    password: str = ""

    def dsn(self, prefix: str) -> str:
        return etcd_dsn(self.endpoint, prefix, self.user, self.password)


def dsn_of(etcd: Any, prefix: str) -> str:
    """Return the --etcd-dsn for what has an endpoint (a server, a client, a proxy), or is one."""
    return etcd if isinstance(etcd, str) else etcd_dsn(etcd.endpoint, prefix)


def etcd_dsn(endpoint: str, prefix: str, user: str | None = None, password: str = "") -> str:
    """Return the --etcd-dsn for a prefix; endpoint is host:port[,host:port…]."""
    login = f"{urllib.parse.quote(user, '')}:{urllib.parse.quote(password, '')}@" if user else ""
    slash = not prefix or prefix.startswith("/")
    return f"etcd://{login}{endpoint}{'' if slash else '?prefix='}{urllib.parse.quote(prefix)}"


@pytest.fixture(scope="session")
def etcd_address() -> Iterator[EtcdAddress]:
    """The address of an etcd that all tests share: do not stop it, see own_etcd."""
    if dsn := os.environ.get("ETCD_FDW_TEST_ETCD_DSN"):
        target = etcd_fdw.parse_etcd_dsn(dsn)
        address = EtcdAddress(target.hosts[0], target.username, target.password or "")
        yield address
        with EtcdClient(*address) as client:
            forget_receipts(client)
        return
    with LocalEtcd() as server:
        yield EtcdAddress(server.endpoint)


def forget_receipts(client: EtcdClient) -> None:
    """Delete from etcd what the daemons of this run keep there for themselves, no other's."""
    for kv in client.range(etcd_fdw.RESERVED).kvs:
        if kv.key.endswith(b"/owner"):
            server, _, name = json.loads(kv.value)["database"].rpartition("/")
            if RUN_ID in name or server in LocalPostgres.started:
                client.delete(kv.key[: -len(b"owner")], prefix=True)


@pytest.fixture
def etcd(etcd_address: EtcdAddress) -> Iterator[EtcdClient]:
    """A bare client of the shared etcd."""
    with EtcdClient(*etcd_address) as client:
        yield client


@pytest.fixture
def prefix(etcd: EtcdClient) -> Iterator[str]:
    """A key prefix for this test alone, such as /t17-3fa9c0/; elsewhere/t17-3fa9c0/ is as well."""
    name = f"/t{next(_numbers)}-{RUN_ID}/"
    yield name
    for mine in (name, "elsewhere" + name):
        etcd.delete(mine, prefix=True)


@pytest.fixture
def own_etcd() -> Iterator[LocalEtcd]:
    """An etcd for this test alone, to kill, pause, restart and wipe."""
    with LocalEtcd() as server:
        yield server


@pytest.fixture
def own_client(own_etcd: LocalEtcd) -> Iterator[EtcdClient]:
    """A bare client of own_etcd."""
    with EtcdClient(own_etcd.endpoint) as client:
        yield client


@pytest.fixture
def own_cluster() -> Iterator[list[LocalEtcd]]:
    """An etcd cluster of three members for this test alone."""
    with ExitStack() as stack:
        members = [LocalEtcd(name=f"m{number}") for number in range(3)]
        cluster = ",".join(f"{member.name}={member.peer_url}" for member in members)
        for member in members:
            stack.callback(member.close)
            member.args += ["--initial-cluster", cluster]
            member.launch()  # none is ready before a majority is there
        for member in members:
            member.wait_ready()
        yield members


# ─ the program under test ─


def clean_environ(env: dict[str, str] | None = None) -> dict[str, str]:
    """Return this environment without what would configure the programs or libpq, and with env."""
    names = ("ETCD_FDW_", "PG", "PYTHONUNBUFFERED")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}


def run_script(
    *args: str,
    env: dict[str, str] | None = None,
    exit_code: int | None = None,
    script: Path = SCRIPT,
) -> subprocess.CompletedProcess[str]:
    """Run `etcd_fdw.py args` to its end, which must be with the exit code, if one is given."""
    done = subprocess.run(
        [sys.executable, str(script), *args],
        env=clean_environ(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert exit_code in (None, done.returncode), done.stdout + done.stderr
    return done


class Daemon(Process, Closing):
    """A running `etcd_fdw.py args`; its output goes to a log file."""

    def __init__(
        self, log_path: Path, *args: str, env: dict[str, str] | None = None, script: Path = SCRIPT
    ) -> None:
        self.log_path = log_path
        with log_path.open("ab") as log_file:
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                [sys.executable, str(script), *args],
                env=clean_environ(env),
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    close = Process.kill

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while the program runs."""
        return self.process.poll()

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def mark(self) -> int:
        """Return a position: wait_log(…, after=position) looks only at what is logged from now."""
        return len(self.log())

    def wait_log(self, pattern: str, after: int = 0) -> re.Match[str]:
        """Wait for a line that the regular expression finds; fail at once if the program ended."""

        def look() -> re.Match[str] | None:
            gone = self.returncode is not None  # before the look, or its last words are missed
            match = re.search(pattern, self.log()[after:], re.MULTILINE)
            assert match or not gone, f"ended ({self.returncode}) without logging {pattern!r}"
            return match

        match = wait_until(f"{pattern!r} was not logged", look)
        assert match is not None
        return match

    def wait_exit(self, timeout: float = WAIT_S) -> int:
        """Wait until the program ends by itself; return its exit code."""
        return self.process.wait(timeout)

    def stop(self) -> int:
        """Stop as supervisord does (SIGTERM); return the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait_exit()


# Options under which faults are over soon, and timeouts of etcd that a test does not wait for;
# without them a daemon has its defaults, which are slow.
FAST = ("--retry-initial", "50ms", "--retry-max", "200ms", "--poll-interval", "500ms")
FAST_ETCD = "?dial_timeout=1s&request_timeout=2s"

StartDaemon = Callable[..., Daemon]


@pytest.fixture
def daemon(
    request: pytest.FixtureRequest, tmp_path: Path, db: str, etcd_address: EtcdAddress, prefix: str
) -> Iterator[StartDaemon]:
    """Start daemons for this test's database and prefix; they end with it.

    daemon("--audit", "all"); daemon(postgres=other_dsn, etcd=own_etcd, env={…}), see dsn_of;
    ready=False: do not wait until it mirrors. The logs are shown if the test fails.
    """
    started: list[Daemon] = []
    failures_before = request.session.testsfailed

    def start(
        *args: str,
        postgres: Any = db,
        etcd: Any = "",
        query: str = "",
        ready: bool = True,
        **options: Any,
    ) -> Daemon:
        if not isinstance(postgres, str):
            postgres = make_dsn(db, host="127.0.0.1", port=postgres.port)
        dsn = dsn_of(etcd, prefix) or etcd_address.dsn(prefix)
        more = query.replace("?", "&") if "?" in dsn else query
        servers = ["-p", postgres, "-e", dsn + more]
        log_path = tmp_path / f"daemon{len(started) + 1}.log"
        started.append(Daemon(log_path, *servers, *args, **options))
        if ready:
            started[-1].wait_log("watching")
        return started[-1]

    yield start
    for one in started:
        one.kill()
        if request.session.testsfailed > failures_before:
            print(f"── {one.log_path.name}: exit code {one.returncode}\n{one.log()}")


def altered_script(tmp_path: Path, change: str) -> Path:
    """The program after a statement that changes it, such as "etcd_fdw.HEARTBEAT_S = 1"."""
    script = tmp_path / "altered.py"
    start = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import etcd_fdw"
    script.write_text(f"{start}\n{change}\nsys.exit(etcd_fdw.main())\n")
    return script


@pytest.fixture
def command(db: str, prefix: str, etcd_address: EtcdAddress) -> Callable[..., Any]:
    """Run a command for this test's database and prefix: command("status", "--check")."""

    def run(
        *args: str, postgres: str = db, etcd: Any = "", **options: Any
    ) -> subprocess.CompletedProcess[str]:
        servers = ["-p", postgres, "-e", dsn_of(etcd, prefix) or etcd_address.dsn(prefix)]
        return run_script(*servers, *args, **options)

    return run


@pytest.fixture
def db_network(db: str) -> Iterator[Proxy]:
    """The network between a daemon and this test's database: daemon(postgres=db_network)."""
    server = psycopg2.extensions.parse_dsn(db)
    with Proxy(f"{server['host']}:{server.get('port', 5432)}") as proxy:
        yield proxy


@pytest.fixture
def network(own_etcd: LocalEtcd) -> Iterator[Proxy]:
    """The network between a daemon and own_etcd."""
    with Proxy(own_etcd.endpoint) as proxy:
        yield proxy


SESSIONS = """
SELECT array_agg((pid, backend_start)::text) FROM pg_stat_activity
WHERE application_name LIKE 'etcd_fdw%' AND datname = current_database()
"""


def daemon_waits_on(db: str, event: str) -> bool:
    """Whether the daemon's session is in that wait event (pg_stat_activity)."""
    sql = """
        SELECT FROM pg_stat_activity
        WHERE application_name LIKE 'etcd_fdw%%' AND wait_event = %s
    """
    return bool(rows(db, sql, event))


def peak_mib(pid: int) -> float:
    """Return the largest resident memory that a process has had."""
    match = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    return int(match[1]) / 1024 if match else 0.0


def cpu_s(pid: int) -> float:
    """Return the processor time that a process has used, with its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


# ─ both sides compared ─


def store_revision(client: EtcdClient) -> int:
    """Return etcd's revision, 0 if it is not to be reached, or has no leader."""
    with suppress(grpc.RpcError):
        return client.revision()
    return 0


class Recorder(Closing):
    """An independent record of what etcd tells about a prefix from now on, by its own thread."""

    def __init__(self, client: EtcdClient, prefix: str) -> None:
        self.client, self.prefix = client, prefix.encode()
        self.events: list[Event] = []  # in order, appended by the thread
        # lease, create_revision and version by revision and key; 0: none
        self.metadata: dict[tuple[int, bytes], tuple[int, ...]] = {}
        self.revision = client.revision()  # all of it and before has been seen
        self.error: str | None = None  # a watch that etcd canceled
        self._closing = threading.Event()
        self._call: Any = None
        self._thread = threading.Thread(target=self._record, daemon=True)
        self._thread.start()

    def _record(self) -> None:
        while not self._closing.is_set() and self.error is None:
            # the whole key space, where each revision has an event: it tells how far this is
            self._call = self.client.watch(self.revision + 1)
            with suppress(grpc.RpcError):  # etcd may restart under the test
                for response in self._call:
                    self._take(response)
            self._closing.wait(0.05)

    def _take(self, response: Any) -> None:
        if response.canceled:
            self.error = f"{response.cancel_reason} (compacted: {response.compact_revision})"
            self._call.cancel()
        for event in response.events:  # whole revisions, since no fragments were asked for
            kv = event.kv
            if kv.key.startswith(self.prefix):
                deleted = event.type == DELETE
                metadata = (kv.lease, kv.create_revision, kv.version)
                self.metadata[kv.mod_revision, kv.key] = metadata
                self.events.append(Event(kv.mod_revision, kv.key, None if deleted else kv.value))
        if response.events:
            self.revision = response.events[-1].kv.mod_revision

    def sync(self) -> int:
        """Wait until all that etcd holds now is recorded; return its revision."""
        revision = wait_until("etcd does not answer", lambda: store_revision(self.client))

        def caught_up() -> bool:
            assert self.error is None, f"the recorder's watch was canceled: {self.error}"
            return self.revision >= revision

        wait_until(f"the recorder did not see revision {revision}", caught_up)
        return revision

    def history(self) -> list[Event]:
        """Return one event per key and revision, the last one, sorted by revision and key."""
        last = {(event.revision, event.key): event for event in self.events}
        return sorted(last.values())

    def close(self) -> None:
        self._closing.set()

        def ended() -> bool:
            if self._call is not None:  # the thread may just be making another one
                self._call.cancel()
            return not self._thread.is_alive()

        wait_until("the recorder's thread did not end", ended)


@pytest.fixture
def recorder(etcd: EtcdClient, prefix: str) -> Iterator[Recorder]:
    """A recorder of this test's prefix from before the test's first change."""
    with Recorder(etcd, prefix) as recorder:
        yield recorder


def mirror_rows(db: str, prefix: str = "", since: int = 0) -> list[Event]:
    """Return the mirror's rows of revision `since` and later, as Recorder.history does."""
    sql = """
        SELECT revision, convert_to(key, 'UTF8'),
               CASE WHEN NOT tombstone THEN coalesce(value_bytes, convert_to(value, 'UTF8')) END
        FROM etcd WHERE starts_with(key, %s) AND revision >= %s
        ORDER BY revision, key COLLATE "C"
    """
    return [Event(*row) for row in rows(db, sql, prefix, since)]


def survivors(history: list[Event], resyncs: Iterable[Sequence[int]]) -> list[Event]:
    """What a mirror has of a history where it copied the state at `new` instead of what came."""
    result, position = [], 0
    for old, new in resyncs:
        result += [event for event in history if position < event.revision <= old]
        before, after = ({e.key: e for e in history if e.revision <= r} for r in (old, new))
        for key, event in after.items():
            if event.value is not None and event.revision > old:
                result.append(event)
            elif event.value is None and key in before and before[key].value is not None:
                result.append(Event(new, key, None))
        position = new
    result += [event for event in history if event.revision > position]
    return sorted(result)


def assert_same(
    recorder: Recorder, db: str, prefix: str, since: int = 0, *, gaps: bool = False
) -> None:
    """Wait until the mirror has, row for row, what the recorder saw from revision `since` on.

    gaps: where etcd had compacted what was missing, it has what was left of it.
    """
    recorder.sync()
    resyncs = """
        SELECT coalesce(target_revision, 0), source_revision FROM etcd_sync_event
        WHERE operation IN ('snapshot', 'resync') AND prefix = %s ORDER BY id
    """
    metadata = """
        SELECT revision, convert_to(key, 'UTF8'), lease, create_revision, version FROM etcd
        WHERE starts_with(key, %s) AND revision >= %s
    """
    expected, mirrored = list[Event](), list[Event]()

    def same() -> bool:
        nonlocal expected, mirrored
        # PostgreSQL may be restarting, or the daemon about to apply the schema
        with suppress(psycopg2.OperationalError, psycopg2.errors.UndefinedTable):
            mirrored = mirror_rows(db, prefix, since)
            # each time anew, as others may go on writing
            expected = [event for event in recorder.history() if event.revision >= since]
            if gaps:
                expected = survivors(expected, rows(db, resyncs, prefix))
            return mirrored == expected and all(
                tuple(n or 0 for n in told) == recorder.metadata.get((revision, key), (0, 0, 0))
                for revision, key, *told in rows(db, metadata, prefix, since)
            )
        return False

    with suppress(TimeoutError):
        wait_until("not the same", same)
        return
    missing = sorted(set(expected) - set(mirrored))
    surplus = sorted(set(mirrored) - set(expected))
    pytest.fail(
        f"the mirror has {len(mirrored)} rows of {len(expected)}; "
        f"{len(missing)} missing: {missing[:5]}; {len(surplus)} too many: {surplus[:5]}; "
        "or leases, create_revisions or versions differ"
    )


def live(db: str, prefix: str) -> dict[bytes, tuple[bytes, int]]:
    """The mirror's live keys with value and revision."""
    sql = """
        SELECT convert_to(key, 'UTF8'), coalesce(value_bytes, convert_to(value, 'UTF8')), revision
        FROM etcd_list(%s)
    """
    return {key: (value, revision) for key, value, revision in rows(db, sql, prefix)}


def held(etcd: EtcdClient, prefix: str) -> dict[bytes, tuple[bytes, int]]:
    """The same as etcd has it."""
    return {
        kv.key: (kv.value, kv.mod_revision)
        for kv in etcd.range(prefix).kvs
        if not kv.key.startswith(etcd_fdw.RESERVED)
    }


SIX_FIELDS = """
    SELECT convert_to(key, 'UTF8'), coalesce(value_bytes, convert_to(value, 'UTF8')), revision,
           coalesce(lease, 0), create_revision, version
    FROM (SELECT DISTINCT ON (key) * FROM etcd WHERE starts_with(key, %s) AND revision <= %s
          ORDER BY key, revision DESC) e
    WHERE NOT tombstone ORDER BY key
"""


def range_at(etcd: EtcdClient, prefix: str, revision: int = 0) -> list[tuple[Any, ...]]:
    """What SIX_FIELDS should return, as etcd has it now or at a revision."""
    return [
        (kv.key, kv.value, kv.mod_revision, kv.lease)
        + ((kv.create_revision, kv.version) if kv.version else (None, None))  # kine tells none
        for kv in etcd.range(prefix, revision).kvs
        if not kv.key.startswith(etcd_fdw.RESERVED)
    ]


def wait_equal(db: str, etcd: EtcdClient, prefix: str) -> None:
    """Wait until both sides hold the same live keys, in all six fields."""

    def equal() -> bool:
        mirrored = rows(db, SIX_FIELDS, prefix, 2**62)
        return live(db, prefix) == held(etcd, prefix) and mirrored == range_at(etcd, prefix)

    wait_until("live keys differ", equal)


def assert_past(db: str, etcd: EtcdClient, prefix: str) -> None:
    """At random revisions the mirror is what etcd's Range tells of them, in all six fields."""
    sql = "SELECT first_revision, revision FROM etcd_sync_state WHERE starts_with(%s, prefix)"
    first, last = rows(db, sql, prefix)[0]
    for revision in random.sample(range(first, last + 1), min(9, last + 1 - first)):
        with suppress(grpc.RpcError):  # etcd has compacted it
            told = range_at(etcd, prefix, revision)
            assert rows(db, SIX_FIELDS, prefix, revision) == told, revision


def arrives(db: str, key: str) -> Callable[[], bool]:
    """Return what tells whether the mirror has a version of a key."""
    return lambda: bool(scalar(db, "SELECT count(*) FROM etcd WHERE key = %s", key))


EVERYTHING = """
SELECT to_jsonb(t) FROM etcd t UNION ALL SELECT to_jsonb(t) FROM etcd_wal t
UNION ALL SELECT to_jsonb(t) FROM etcd_sync_state t
UNION ALL SELECT to_jsonb(t) FROM etcd_sync_event t
ORDER BY 1
"""


# ─ what became of changes ─


class Wal(NamedTuple):
    """A row of etcd_wal; value None: delete."""

    id: int
    key: bytes
    value: bytes | None
    revision: int | None
    status: str
    result_revision: int | None
    error_message: str | None
    txid: str
    depends_on: int | None
    ttl: timedelta | None
    force: bool
    replaced_revision: int | None
    action: str | None

    @property
    def outcome(self) -> tuple[str, int | None]:
        return self.status, self.result_revision


def wal_rows(db: str, prefix: str = "", id_: int | None = None) -> list[Wal]:
    """Return the rows of etcd_wal, or the one with the id, in order."""
    sql = """
        SELECT id, convert_to(key, 'UTF8'), coalesce(value_bytes, convert_to(value, 'UTF8')),
               revision, status, result_revision, error_message, txid::text, depends_on,
               ttl, force, replaced_revision, action
        FROM etcd_wal WHERE starts_with(key, %s) AND coalesce(id = %s, true) ORDER BY id
    """
    return [Wal(*row) for row in rows(db, sql, prefix, id_)]


def ask(db: str, key: str, value: str | None = "mine", **columns: Any) -> int:
    """Insert a change with more columns, such as ttl or force; return its id."""
    given = {"key": key, "value": value, **columns}
    sql = f"INSERT INTO etcd_wal ({', '.join(given)}) VALUES %s RETURNING id"
    return int(scalar(db, sql, tuple(given.values())))


def ended(db: str, change: int | str) -> Wal:
    """Wait until a change, by its id or as the first one to a key, is not pending; return it."""
    sql = "SELECT id FROM etcd_wal WHERE status <> 'pending' AND %s IN (id::text, key) ORDER BY id"
    id_ = wait_until(f"change {change} stays pending", lambda: scalar(db, sql, str(change)))
    return wal_rows(db, id_=id_)[0]


def statuses(db: str) -> list[str]:
    """Wait until no change is pending; return how each ended, in id order."""

    def settled() -> bool:
        with suppress(psycopg2.OperationalError):  # PostgreSQL may be restarting
            return scalar(db, "SELECT count(*) FROM etcd_wal WHERE status = 'pending'") == 0
        return False

    wait_until("changes are still pending", settled)
    return [status for (status,) in rows(db, "SELECT status FROM etcd_wal ORDER BY id")]


class Told:
    """What etcd told a recorder, by revision and key."""

    def __init__(self, recorder: Recorder) -> None:
        self.leases = {at: lease for at, (lease, *_) in recorder.metadata.copy().items()}
        self.values = {event[:2]: event.value for event in recorder.history()}
        self.versions: dict[bytes, list[int]] = collections.defaultdict(list)
        for revision, key in self.values:  # in order
            self.versions[key].append(revision)

    def before(self, revision: int, key: bytes) -> int:
        """Return the mod_revision that the key had just before a revision, 0 for none."""
        index = bisect.bisect_left(self.versions[key], revision)
        last = self.versions[key][index - 1] if index else 0
        return last if self.values.get((last, key)) is not None else 0


def expected_version(row: Wal, wal: dict[int, Wal]) -> int:
    """Return the version that a successful change was made on, 0 for none, as schema.sql says."""
    on = wal.get(row.depends_on or 0)
    if on and on.key == row.key and on.id < row.id:
        ended = "txid", "status", "result_revision"
        if all(getattr(on, name) == getattr(row, name) for name in ended):
            return expected_version(on, wal)
        if on.status == "success":
            return 0 if on.value is None else on.result_revision or 0
    return row.revision or 0


def lies(changes: Sequence[Wal], wal: dict[int, Wal], told: Told, compacted: bool) -> list[str]:
    """Say what is not true of the successful changes to a key at one revision; the last counts."""
    row, forced = changes[-1], any(change.force for change in changes)
    at = (row.result_revision or 0, row.key)
    before = told.before(*at)
    made_on = before if forced else expected_version(row, wal)
    if row.value is None and not made_on:
        return []  # deleted what was not there
    found = []
    if told.values.get(at, b"nothing") != row.value:
        found.append(f"etcd tells {told.values.get(at, b'nothing')!r} of {row}")
    if before != made_on:
        found.append(f"made on {made_on}, applied on {before}: {row}")
    forgotten = compacted and row.replaced_revision is None
    if row.force and row.replaced_revision != (before or None) and not forgotten:
        found.append(f"replaced {before}: {row}")
    lease, had = (told.leases.get((r, row.key), 0) for r in (at[0], before))
    right = lease == had if row.ttl is None else bool(lease) == bool(row.ttl)
    if row.value is not None and len(changes) == 1 and not right:
        found.append(f"lease {lease} after {had}: {row}")
    return found


def assert_outcomes(
    recorder: Recorder,
    *dbs: str,
    load: Load | None = None,
    whole: int = 40,
    compacted: bool = False,
) -> collections.Counter[str]:
    """Hold every row of etcd_wal against what etcd did, and the other way round.

    - A success is one event with its value at its revision, made on the version that the row says,
      or on any if it is forced, with the lease that it should have; or no event, if it deleted
      what was not there.
    - A conflict or failure left no trace: what etcd tells of a value that begins with sql is a
      success. So is each deletion, but for those by the load in etcd and of leases.
    - An event belongs to one transaction. Up to `whole` changes of one end alike, at one revision;
      with a guard, however many, and the guard's key was then at its revision.

    compacted: etcd may have forgotten what a forced change replaced. Returns the statuses, counted.
    """
    for db in dbs:
        statuses(db)
    recorder.sync()
    told, wrong = Told(recorder), list[str]()
    claims: dict[tuple[int, bytes], str] = {}
    counts: collections.Counter[str] = collections.Counter()
    for db in dbs:
        wal = {row.id: row for row in wal_rows(db, recorder.prefix.decode())}
        transactions: dict[str, list[Wal]] = collections.defaultdict(list)
        for row in wal.values():
            if row.action != "keepalive":
                transactions[row.txid].append(row)
        for txid, together in transactions.items():
            guards = [row for row in together if row.action]
            counts.update("guarded" if guards else row.status for row in together)
            successes = [row for row in together if row.status == "success" and not row.action]
            revisions = {row.result_revision for row in successes} - {None}
            parts = max(len(revisions), len({row.status for row in together}))
            small = len(together) + any(row.force for row in together) <= whole
            wrong += [
                f"applied at {revision}: {guard}"
                for revision, guard in itertools.product(revisions, guards)
                if told.before(revision or 0, guard.key) != guard.revision
            ]
            if parts > 1 and (small or guards):
                wrong.append(f"a transaction in parts: {together}")
            for at in {(row.result_revision or 0, row.key): None for row in successes}:
                changes = [row for row in successes if (row.result_revision or 0, row.key) == at]
                wrong += lies(changes, wal, told, compacted)
                if at in told.values and claims.setdefault(at, txid) != txid:
                    wrong.append(f"transaction {claims[at]} claims it too: {changes}")
    unclaimed = [at for at in told.values if at not in claims]
    wrong += [f"nobody claims {at}" for at in unclaimed if (told.values[at] or b"")[:3] == b"sql"]
    if load is not None:
        gone = [at for at in unclaimed if told.values[at] is None and at not in load.deleted]
        gone = [at for at in gone if not told.leases.get((told.before(*at), at[1]))]
        if len(gone) > load.unsure:
            wrong.append(f"nobody claims the deletes {gone[:9]}, {load.unsure} are in doubt")
    assert not wrong, f"{len(wrong)} outcomes are not true:\n" + "\n".join(wrong[:10])
    return counts


@contextmanager
def frozen_mirror(db: str) -> Iterator[None]:
    """Nobody can write table etcd meanwhile: what etcd answers is not recorded."""
    with session(db, "BEGIN", "LOCK TABLE etcd IN SHARE MODE"):
        yield


def kill_once_sent(running: Daemon, db: str, client: EtcdClient, sql: str, key: str) -> int:
    """Ask for a change, kill the daemon before it can note that etcd took it; return where."""
    before = client.get(key)
    with frozen_mirror(db):
        rows(db, sql, key)
        sent = wait_until("nothing was sent", lambda: (now := client.get(key)) != before and now)
        running.kill()
    return int(sent.mod_revision)


def lock_holders(db: str, prefix: str) -> list[int]:
    """Return the pids of the sessions that hold the lock of a prefix: one, or none."""
    with session(db) as cur:
        cur.execute(etcd_fdw.LOCK_HOLDER_SQL, {"prefix": prefix})
        return [pid for pid, *_ in cur]


# ─ a network that fails ─


class _Half:
    """One direction of a proxied connection."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source, self.target = source, target
        self.chunks: collections.deque[tuple[float, bytes]] = collections.deque()  # (due, data)
        self.next_send = 0.0  # the throttle's
        self.ended = False
        self.outlives = False  # the client: its end is never passed on
        self.held = False  # back: the target gets nothing
        self.last: bytes | None = None  # no more is read once this was, see Proxy.hold

    @property
    def data(self) -> bytes:
        return b"".join(data for _, data in self.chunks)

    @property
    def full(self) -> bool:
        """Whether no more is to be read, ever."""
        return self.ended or (self.held and self.last is not None and self.last in self.data)


def _in_its_thread(method: Callable[..., T]) -> Callable[..., T]:
    """Have the proxy's thread run the method, and wait for it."""

    def run(proxy: Proxy, *args: Any) -> T:
        done: Future[T] = Future()
        proxy._orders.append((done, partial(method, proxy, *args)))
        proxy._wake_write.send(b"!")
        return done.result(WAIT_S)

    return run


class Proxy(Closing):
    """A TCP proxy on 127.0.0.1 that can cut, stall, hold, delay and throttle; all at once.

    The kernel goes on acknowledging what a stalled proxy does not read, as a hung peer's would.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self.target = (host.strip("[]"), int(port))
        self.forwarded = 0  # bytes so far, both directions
        self._stalled = self._closing = False
        self._delay_s = self._bytes_per_s = 0.0
        self._halves: list[_Half] = []
        self._servers: set[socket.socket] = set()
        self._orders: collections.deque[tuple[Future[Any], Callable[[], Any]]] = collections.deque()
        self._wake_read, self._wake_write = socket.socketpair()
        self.port = free_port()
        self.endpoint = f"127.0.0.1:{self.port}"
        self._listener: socket.socket | None = self._listen()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    @_in_its_thread
    def cut(self) -> None:
        """Reset all connections; new ones are welcome."""
        self._drop_all()

    @_in_its_thread
    def refuse(self) -> None:
        """Reset all connections and refuse new ones, as a dead server's host does; see resume."""
        self._drop_all()
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    @_in_its_thread
    def stall(self) -> None:
        """Forward nothing on any connection, old or new, but keep them open; see resume."""
        self._stalled = True

    @_in_its_thread
    def hold(self, last: bytes | None = None) -> None:
        """Keep back what is sent to the server on the connections that are open now.

        It outlives the client, whose end the server is never told, as in a network that lost its
        route; answers and new connections go on. last: nothing that comes after these bytes is
        ever passed on, such as that the client gave up. See release.
        """
        for half in self._halves:
            if half.target in self._servers and not half.outlives:
                half.outlives = half.held = True
                half.last = last

    @property
    @_in_its_thread
    def held(self) -> bytes:
        """What is kept back now."""
        return b"".join(half.data for half in self._halves if half.held)

    @_in_its_thread
    def release(self) -> None:
        """Deliver what was kept back, late."""
        for half in self._halves:
            if half.held:
                half.ended = half.full
                half.held = False

    @_in_its_thread
    def resume(self) -> None:
        """End stall, refuse, delay and throttle."""
        self._stalled = False
        self._delay_s = self._bytes_per_s = 0.0
        self._listener = self._listener or self._listen()

    @_in_its_thread
    def delay(self, seconds: float) -> None:
        """Hold back what arrives, in each direction, for that long."""
        self._delay_s = seconds

    @_in_its_thread
    def throttle(self, bytes_per_s: float) -> None:
        """Forward no more than that on each connection, in each direction; 0: no limit."""
        self._bytes_per_s = bytes_per_s

    def close(self) -> None:
        self._closing = True
        self._wake_write.send(b"!")
        self._thread.join(WAIT_S)

    # the rest runs in the thread

    def _listen(self) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        return listener

    def _loop(self) -> None:
        while not self._closing:
            readable, writable = self._wait()
            if self._wake_read in readable:
                self._wake_read.recv(4096)
                while self._orders:
                    done, action = self._orders.popleft()
                    done.set_result(action())
                continue  # what was readable may be closed by now
            if self._listener is not None and self._listener in readable:
                self._accept(self._listener)
            for half in list(self._halves):
                if half.source in readable and not half.full:
                    self._receive(half)
                if half.target in writable and half.chunks and not half.held:
                    self._send(half)
                if half.ended and not half.chunks and not half.outlives:
                    self._drop(half)
        self._drop_all()
        for sock in (self._listener, self._wake_read, self._wake_write):
            if sock is not None:
                sock.close()

    def _wait(self) -> tuple[list[Any], list[Any]]:
        """Wait for something to do; return the sockets that are readable and writable."""
        now, timeout = time.monotonic(), 60.0
        buffer_bytes = (100 if self._delay_s else 1) << 18  # delayed: much is on its way
        reading, writing = [self._wake_read], []
        if self._listener is not None:
            reading.append(self._listener)
        for half in [] if self._stalled else self._halves:
            if sum(len(data) for _, data in half.chunks) < buffer_bytes and not half.full:
                reading.append(half.source)
            if half.chunks and not half.held:
                due = max(half.chunks[0][0], half.next_send)
                if due <= now:
                    writing.append(half.target)
                else:
                    timeout = min(timeout, due - now)
        readable, writable, _ = select.select(reading, writing, [], timeout)
        return readable, writable

    def _accept(self, listener: socket.socket) -> None:
        client, _ = listener.accept()
        try:
            server = socket.create_connection(self.target, timeout=WAIT_S)
        except OSError:
            client.close()
            return
        for sock in (client, server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._servers.add(server)
        for source, target in ((client, server), (server, client)):
            self._halves.append(_Half(source, target))

    def _receive(self, half: _Half) -> None:
        try:
            data = half.source.recv(1 << 16)
        except OSError:
            data = b""
            if not half.held:
                half.chunks.clear()
        half.ended = not data
        if data:
            half.chunks.append((time.monotonic() + self._delay_s, data))

    def _send(self, half: _Half) -> None:
        due, data = half.chunks.popleft()
        limit = max(1, int(self._bytes_per_s / 20)) if self._bytes_per_s else len(data)
        try:
            sent = half.target.send(data[:limit])
        except BlockingIOError:
            sent = 0
        except OSError:  # to a client that was killed go answers to what it sent before
            half.chunks.clear()
            half.ended = half.ended or not self._outlives(half)
            return
        if sent < len(data):
            half.chunks.appendleft((due, data[sent:]))
        self.forwarded += sent
        if self._bytes_per_s:
            half.next_send = time.monotonic() + sent / self._bytes_per_s

    def _outlives(self, half: _Half) -> bool:
        """Whether the connection stays when its client is gone."""
        return any(h.outlives for h in self._halves if h.target in (half.source, half.target))

    def _drop(self, half: _Half) -> None:
        pair = {half.source, half.target}
        self._halves = [other for other in self._halves if other.source not in pair]
        self._servers -= pair
        for sock in pair:
            sock.close()

    def _drop_all(self) -> None:
        reset = struct.pack("ii", 1, 0)  # not an orderly end
        for half in self._halves:
            with suppress(OSError):
                half.source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        while self._halves:
            self._drop(self._halves[0])


# ─ load on both sides ─


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run work(0), work(1), … at once; raise what the first of them raised."""
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))


def random_text(size: int) -> bytes:
    """Return text that does not compress well."""
    return base64.b64encode(os.urandom(size))[:size]


OWN_CHANGES_SQL = "SELECT id FROM etcd_wal WHERE txid = pg_current_xact_id()"
RESTORE_SQL = """
    SELECT etcd_restore(%s, r)
    FROM etcd_sync_state, greatest(first_revision, pruned_revision, revision - %s) r
    WHERE starts_with(%s, prefix) AND NOT r <@ ANY (gaps);
"""
INSERT_MADE_ON_SQL = """
    INSERT INTO etcd_wal (key, value, ttl, force, revision)
    VALUES (%s, %s, %s, %s, (SELECT max(revision) FROM etcd WHERE key = %s)) RETURNING id
"""


def leases(client: EtcdClient) -> set[int]:
    """The leases that there are."""
    answer = client.call(client.leases.LeaseLeases, etcdrpc.LeaseLeasesRequest())
    return {lease.ID for lease in answer.leases}


class Load(Closing):
    """Changes on both sides of a prefix until stopped, whatever the servers do meanwhile.

    Some keys are changed by both sides, so that there are conflicts; some by one side only; some
    expire. Every value is written once, so that an event in etcd tells which change it was.
    """

    PAUSE_S = 1 / 150  # between the changes of each side

    def __init__(self, db: str, endpoint: str, prefix: str, seed: int, bulk: int) -> None:
        self.db, self.endpoint, self.prefix = db, endpoint, prefix
        self.client = EtcdClient(endpoint)
        self.recorder = Recorder(self.client, prefix)
        self.etcd_changes = 0  # answered so far
        self.committed: list[int] = []  # ids of etcd_wal
        self.deleted: set[tuple[int, bytes]] = set()  # (revision, key), by the etcd side
        self.unsure = 0  # deletes of the etcd side that were not answered
        self.errors: list[str] = []  # what no fault excuses
        self._ended = threading.Event()
        pool = ThreadPoolExecutor(2 + bulk)
        self._sides = [
            pool.submit(self._change_etcd, random.Random(seed)),
            pool.submit(self._change_sql, random.Random(seed + 1), self._statement),
        ]
        for n in range(bulk):  # sessions that change many keys, each of its own
            many = partial(self._many, f"{prefix}bulk/{n}/")
            dice = random.Random(seed + 2 + n)
            self._sides.append(pool.submit(self._change_sql, dice, many, self.PAUSE_S * 90))

    def _key(self, dice: random.Random, side: str) -> str:
        kind = "both" if dice.random() < 0.3 else side
        return f"{self.prefix}{kind}/{World.key(dice.randrange(20 if kind == 'both' else 100))}"

    def _change_etcd(self, dice: random.Random) -> None:
        with EtcdClient(self.endpoint, timeout=5) as client:
            while not self._ended.wait(self.PAUSE_S):
                value = World.value(dice, f"etcd-{next(_numbers)} ")
                keys = {self._key(dice, "etcd") for _ in range(dice.choice((1, 1, 1, 3)))}
                doomed = {key for key in sorted(keys) if dice.random() < 0.2}
                try:
                    lease = client.grant(2, World.lease(dice)) if dice.random() < 0.02 else 0
                    puts = [client.put_op(key, value, lease) for key in keys - doomed]
                    answer = client.txn([*puts, *map(client.delete_op, doomed)])
                except grpc.RpcError:
                    self.unsure += len(doomed)
                    continue
                self.etcd_changes += 1
                self.deleted |= {(answer.header.revision, key.encode()) for key in doomed}

    def _change_sql(
        self, dice: random.Random, statement: Callable[..., Any], pause_s: float = PAUSE_S
    ) -> None:
        db = make_dsn(self.db, options="-cstatement_timeout=5s")
        while not self._ended.wait(pause_s):
            sql, args = statement(dice, f"sql-{next(_numbers)} ")
            try:
                self.committed += [id_ for (id_,) in rows(db, sql, *args)]
            except psycopg2.Error as exc:
                away = isinstance(exc, psycopg2.OperationalError)  # or a lock that does not come
                if not away or exc.pgcode == "40P01":  # no two sessions change the same keys
                    self.errors.append(f"{exc.pgcode}: {exc}")

    @staticmethod
    def _many(prefix: str, dice: random.Random, mark: str) -> tuple[str, tuple[Any, ...]]:
        """What changes many keys in any order, and returns the ids."""
        keys = [prefix + World.key(n) for n in dice.sample(range(200), 90)]
        sql = "SELECT etcd_set(k, %s || k) FROM unnest(%s) k"
        return sql, (World.text(dice, mark) + "=", keys)

    def _statement(self, dice: random.Random, mark: str) -> tuple[str, tuple[Any, ...]]:
        """What returns the ids of its changes."""
        key, kind, value = self._key(dice, "sql"), dice.random(), World.text(dice, mark)
        if kind < 0.02:
            sql = "SELECT etcd_delete_prefix(%s);"
            return sql + OWN_CHANGES_SQL, (f"{self.prefix}both/{dice.randrange(10)}",)
        if kind < 0.03:
            some = f"{self.prefix}both/{dice.randrange(10)}"
            return RESTORE_SQL + OWN_CHANGES_SQL, (some, dice.randrange(100), some)
        if kind < 0.1:
            return "SELECT etcd_set_bytes(%s, %s)", (key, World.value(dice, mark))
        if kind < 0.2:
            return "SELECT etcd_delete(%s)", (key,)
        if kind < 0.22:  # if a key that both sides change is as the mirror has it
            guard = self._key(dice, "both")
            sql = "SELECT etcd_expect(%s, coalesce((SELECT revision FROM etcd_get(%s)), 0));"
            return sql + "SELECT etcd_set(%s, %s);" + OWN_CHANGES_SQL, (guard, guard, key, value)
        if kind < 0.23:
            return "SELECT etcd_keepalive(%s)", (self._key(dice, "etcd"),)
        if kind < 0.3:  # one transaction, one Txn
            keys = [f"{key}/{n}" for n in range(dice.choice((3, 3, 30)))]
            return "SELECT etcd_set(k, %s || k) FROM unnest(%s) k", (value + "=", keys)
        if kind < 0.4:  # compare-and-swap on what may be long gone
            return INSERT_MADE_ON_SQL, (key, value, None, False, key)
        if kind < 0.5:  # expires, or is overwritten before that
            return INSERT_MADE_ON_SQL, (key, value, "1 second", dice.random() < 0.3, key)
        if kind < 0.6:
            return INSERT_MADE_ON_SQL, (key, value if kind < 0.57 else None, None, True, key)
        return "SELECT etcd_set(%s, %s)", (key, value)

    def run(self, count: int) -> None:
        """Wait for this many more changes on each side."""
        etcd_goal, sql_goal = self.etcd_changes + count, len(self.committed) + count
        wait_until(
            "the load stands still",
            lambda: self.etcd_changes >= etcd_goal and len(self.committed) >= sql_goal,
        )

    def wait_flow(self) -> None:
        """Wait until changes made from now on have arrived, in both directions."""
        number = next(_numbers)
        keys = f"{self.prefix}flow/{number}/etcd", f"{self.prefix}flow/{number}/sql"

        def arrived() -> bool:
            with suppress(grpc.RpcError, psycopg2.OperationalError):
                if not self.client.get(keys[0]):
                    self.client.put(keys[0], "etcd-flow")
                if not rows(self.db, "SELECT FROM etcd_wal WHERE key = %s", keys[1]):
                    rows(self.db, "SELECT etcd_set(%s, %s)", keys[1], f"sql-flow-{number}")
                sql = "SELECT count(*) FROM etcd_kv WHERE key = ANY (%s)"
                return scalar(self.db, sql, list(keys)) == 2
            return False

        wait_until("changes do not arrive", arrived)

    def compact(self) -> None:
        """Have etcd forget what was superseded, but nothing that the recorder has yet to see."""
        self.client.compact(self.recorder.sync())

    def stop(self) -> None:
        self._ended.set()
        for side in self._sides:
            side.result(WAIT_S)
        assert not self.errors, self.errors[:5]

    def finish(self, gaps: bool = False) -> collections.Counter[str]:
        """Stop, and compare everything; gaps: etcd may have compacted what was not mirrored."""
        self.wait_flow()
        self.stop()
        statuses(self.db)
        kvs = self.client.range
        wait_until("a lease stays", lambda: not any(kv.lease for kv in kvs(self.prefix).kvs))
        assert_same(self.recorder, self.db, self.prefix, gaps=gaps)
        wait_equal(self.db, self.client, self.prefix)
        assert_past(self.db, self.client, self.prefix)
        counts = assert_outcomes(self.recorder, self.db, load=self, compacted=gaps)
        lost = set(self.committed) - {row.id for row in wal_rows(self.db)}
        assert not lost, f"committed changes are gone: {lost}"
        assert self.etcd_changes > 20 < counts["success"], counts  # or there was no load
        assert not counts["failed"], counts
        return counts

    def close(self) -> None:
        self._ended.set()
        self.recorder.close()
        self.client.close()


@pytest.fixture
def load(db: str, prefix: str, etcd_address: EtcdAddress) -> Iterator[Callable[..., Load]]:
    """Start a load: load(etcd=own_etcd.endpoint, postgres=own_postgres.dsn(), seed=7)."""
    with ExitStack() as stack:

        def start(
            etcd: str = etcd_address.endpoint, postgres: str = db, seed: int = 1, bulk: int = 0
        ) -> Load:
            return stack.enter_context(Load(postgres, etcd, prefix, seed, bulk))

        yield start


# ── command line and configuration ───────────────────────────────────────────


P = "postgresql://u:s3cret@127.0.0.1/d"
E = "etcd://root:s3cret@127.0.0.1/x/"
NO_ONE = "127.0.0.1:1"  # a reserved port: nobody listens

# The arguments, and what the message must name.
WRONG_CONFIGURATION = [
    ([], "--postgres-dsn is missing"),
    (["-p", P], "--etcd-dsn is missing"),
    (["-p", "s3cret", "-e", E], "libpq connection string"),
    (["-p", P + "?nonsense=1", "-e", E], "invalid URI query parameter"),
    (["-p", "postgresql://u:s3cret%zz@h/d", "-e", E], "invalid percent-encoded token"),
    (["-p", P + "?options=-csearch_path=x", "-e", E], "= within a value is %3D"),
    (["-p", P, "-e", "127.0.0.1:2379"], "expected etcd://"),
    (["-p", P, "-e", "etcd:///x/"], "a host is missing"),
    (["-p", P, "-e", "etcd://h:0/x/"], "port 0 of host 'h' is not one of 1 to"),
    (["-p", P, "-e", "etcd://h:http/x/"], "'h:http' is not of the form"),
    (["-p", P, "-e", "etcd://h/a#b/"], "prefix must be percent-enc"),
    (["-p", P, "-e", "etcd://h/a%zz/"], "a % in it begins no escape"),
    (["-p", P, "-e", "etcd://root:s3cret%4@h/"], "begins no escape"),
    (["-p", P, "-e", "etcd://h/a\tb"], "a tab"),
    (["-p", P, "-e", E + "?dial_timeout=5s&dial_timeout=6s"], "'dial_timeout' is given twice"),
    (["-p", P, "-e", "etcd://root:s3#cret@h/"], "percent-encoded"),
    (["-p", P, "-e", "etcd://root:s3/cret@h/"], "percent-encoded"),
    (["-p", P, "-e", "etcd://root@h/"], "without a password"),
    (["-p", P, "-e", "etcd://:s3cret@h/"], "without a user name"),
    (["-p", P, "-e", E + "?nonsense=1"], "'nonsense'"),
    (["-p", P, "-e", E + "?dial_timeout=5"], "dial_timeout: '5'"),
    (["-p", P, "-e", E + "?request_timeout=0s"], "request_timeout"),
    (["-p", P, "-e", E + "?tls=maybe"], "tls: 'maybe'"),
    (["-p", P, "-e", E + "?tls=disabled&ca=x"], "ca given"),
    (["-p", P, "-e", E + "?ca=/no/ca.pem"], "ca: '/no/ca.pem': cannot be used"),
    (["-p", P, "-e", E + f"?ca={SCRIPT}"], f"ca: {str(SCRIPT)!r}: cannot be used"),
    (["-p", P, "-e", E + f"?cert={SCRIPT}"], "cert and key go together"),
    (["-p", P, "-e", E + f"?cert={SCRIPT}&key={SCRIPT}"], "cert, key: "),
    (["-p", P, "-e", "etcd://h/a?prefix=b"], "the prefix is given twice"),
    (["-p", P, "-e", "etcd://h?prefix=etcd_fdw/x"], "below etcd_fdw/"),
    (["-p", P, "-e", "etcd://h/%ff"], "the prefix is not text"),
    (["-p", P, "-e", "etcd://h/%00"], "the prefix is not text"),
    (["-p", P, "-e", "etcd://h/" + "x" * 2600], "up to 2600 bytes"),
    (["--postgres", P, "-e", E], "unknown option --postgres; see"),
    (["-p", P, "-e", E, "status", "--chek"], "unknown option --chek; see"),
    (["frobnicate", "-p", P, "-e", E], "frobnicate"),
    ([E, "-p", P], "COMMAND"),
    (["-p", P, "-e", E, "--batch-size", "0"], "--batch-size: '0'"),
    (["-p", P, "-e", E, "--max-txn-ops=-1"], "--max-txn-ops: '-1'"),
    (["-p", P, "-e", E, "--poll-interval=30"], "--poll-interval: '30'"),
    (["-p", P, "-e", E, "--retry-max=0s"], "--retry-max"),
    (["-p", P, "-e", E, "--startup-timeout=soon"], "'soon'"),
    (["-p", P, "-e", E, "--wal-retention=800000d"], "'800000d' is longer than 36500d"),
    (["-p", P, "-e", E, "-l", "loud"], "'loud' is not one of debug"),
    (["-p", P, "-e", E, "--log-format=xml"], "'xml' is not one of text"),
]


VALIDATE = "config", "validate", "--connect"


def assert_one_error_line(
    done: subprocess.CompletedProcess[str], exit_code: int, text: str
) -> None:
    """It ended with this code and one line with the text, without the password s3cret."""
    assert done.returncode == exit_code, done.stderr
    assert re.fullmatch(r"etcd_fdw: [^\n]+\n", done.stderr), done.stderr
    assert text in done.stderr
    assert "s3cret" not in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(("args", "text"), WRONG_CONFIGURATION)
def test_wrong_configuration_is_one_line_and_exit_code_1(args, text, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", clean_environ())
    exit_code = etcd_fdw.main(args)  # in this process, as there are so many
    done = subprocess.CompletedProcess(args, exit_code, *capsys.readouterr())
    assert_one_error_line(done, 1, text)


def test_wrong_environment_variable_is_named():
    env = {"ETCD_FDW_POSTGRES_DSN": P, "ETCD_FDW_ETCD_DSN": E}
    for name, value in {"BATCH_SIZE": "many", "DRY_RUN": "perhaps", "LOG_LEVEL": "loud"}.items():
        done = run_script(env={**env, f"ETCD_FDW_{name}": value})
        assert_one_error_line(done, 1, f"ETCD_FDW_{name}: '{value}'")


def test_unreachable_server_is_exit_code_2(command, db, postgres_dsn, etcd_address):
    wrong = [
        (f"postgresql://u:s3cret@{NO_ONE}/d", "", "port 1 failed"),
        ("postgresql://u:s3cret@nosuch.invalid/d", "", "nosuch.invalid"),
        (make_dsn(postgres_dsn, dbname="nosuch"), "", 'database "nosuch" does not exist'),
        (make_dsn(postgres_dsn, sslmode="require"), "", "SSL"),
        (db, f"etcd://root:s3cret@{NO_ONE}/x/", NO_ONE),
        (db, f"etcd://{NO_ONE},127.0.0.1:2/x/", "127.0.0.1:2"),
        (db, "etcd://nosuch.invalid/x/", "nosuch.invalid"),
        (db, f"etcd://{etcd_address.endpoint}/x/?tls=enabled", etcd_address.endpoint),
    ]
    for postgres, etcd_, text in wrong:
        done = command("--startup-timeout=0s", "-l", "error", postgres=postgres, etcd=etcd_)
        assert_one_error_line(done, 2, text)
    done = command("--startup-timeout=0s", "--log-format=json", etcd=f"etcd://{NO_ONE}/x/")
    assert [json.loads(line)["level"] for line in done.stderr.splitlines()][-1] == "error"


def set_version(db: str, version: int | str) -> None:
    """Have the schema say that it is of this version."""
    body = f"RETURNS int LANGUAGE sql AS 'SELECT {version}'"
    rows(db, f"CREATE OR REPLACE FUNCTION etcd_schema_version() {body}")


def test_start_up_retries_until_its_timeout(db):
    args = ["-p", db, "-e", f"etcd://{NO_ONE}/x/", "--retry-initial=100ms", "--retry-max=200ms"]
    started = time.monotonic()
    done = run_script(*args, "--startup-timeout", "3s")
    assert time.monotonic() - started > 3
    applied, *retries, last = done.stderr.splitlines()
    assert done.returncode == 2
    assert applied.endswith(f"applied schema version {etcd_fdw.SCHEMA_VERSION}")
    assert len(retries) > 1
    for line in retries:
        assert re.search(r"Z WARN etcd at .*; retrying in 0\.[012]s$", line)
    assert last.startswith("etcd_fdw: etcd at")


@pytest.mark.parametrize("side", ["postgresql", "etcd"])
def test_start_up_ends_in_time_although_something_silent_listens(db, side):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        postgres = make_dsn(db, port=port) if side == "postgresql" else db
        etcd_ = f"etcd://127.0.0.1:{port if side == 'etcd' else 1}/x/?dial_timeout=60s"
        started = time.monotonic()
        run_script("--version")
        loaded = time.monotonic()
        done = run_script("-p", postgres, "-e", etcd_, "--startup-timeout=2s", "-l", "error")
        took = time.monotonic() - loaded
    assert done.returncode == 2
    # one answer is else waited for 10 s, and 60 s
    assert 2 < took < 10 + loaded - started, done.stderr


def test_preflight_refuses_what_start_refuses(command, db, prefix, etcd, etcd_address):
    """All three ask the same questions, and say the same."""

    def refused_by_all(text: str, exit_code: int, dsn: str = "") -> None:
        for words in (VALIDATE, ("--dry-run",), ("-l", "error")):
            done = command(*words, etcd=dsn or etcd_address.dsn(prefix), exit_code=exit_code)
            assert text in done.stdout + done.stderr, (words, done)

    rows(db, "CREATE TABLE etcd (id int)")  # as pg_etcd's
    refused_by_all("schema public has a table etcd that is not etcd_fdw's: use another schema", 4)
    rows(db, "DROP TABLE etcd")
    command("sync", etcd=etcd_address.dsn(prefix + "a/"), exit_code=0)
    refused_by_all(f"prefix '{prefix}' overlaps with '{prefix}a/'", 4)
    own = etcd_dsn(etcd_address.endpoint, "etcd_fdw/x")
    refused_by_all("the prefix is below etcd_fdw/", 1, dsn=own)
    other = etcd_address.dsn(prefix + "b/")
    done = command(*VALIDATE, "--max-txn-ops", "129", etcd=other, exit_code=0)
    assert "WARN  etcd takes fewer than 129 operations in one transaction" in done.stdout
    assert "fewer" not in command(*VALIDATE, "--max-txn-ops", "128", etcd=other).stdout


def test_keys_without_a_leading_slash(daemon, command, db, prefix, etcd):
    name = prefix.strip("/") + "-registry/"
    etcd.put(name + "a", "1")
    try:
        wrong = etcd_dsn(etcd.endpoint, f"/{name}")
        said = f"no key begins with '/{name}', but 1 key with '{name}': see prefix={name} in the"
        assert f"WARN  {said}" in command(*VALIDATE, etcd=wrong, exit_code=0).stdout
        assert said in command("sync", etcd=wrong, exit_code=0).stderr
        daemon(etcd=etcd_dsn(etcd.endpoint, name))
        wait_until("not mirrored", arrives(db, name + "a"))
    finally:
        etcd.delete(name, prefix=True)


@pytest.mark.parametrize("words", [["start"], ["--dry-run"], ["config", "validate", "--connect"]])
@pytest.mark.parametrize("path", ["nosuch", "hidden"])
def test_search_path_without_schema_is_exit_code_3(command, db, schema_user, words, path):
    rows(db, "CREATE SCHEMA hidden")
    dsn = make_dsn(db, user=schema_user, options=f"-csearch_path={path}")
    done = command(*words, postgres=dsn, exit_code=3)
    said = done.stdout + done.stderr
    assert f"search_path is {path}, which names no schema" in said
    assert f"GRANT USAGE, CREATE ON SCHEMA … TO {schema_user}" in said
    assert "ok    PostgreSQL grants" not in said


@pytest.fixture
def schema_user(db: str) -> Iterator[str]:
    """A role that may log in and nothing more, to this test's database."""
    name = f"user_{RUN_ID}_{next(_numbers)}"
    create_role(db, name)
    rows(db, "REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    yield name
    rows(db, f"DROP OWNED BY {name}; DROP ROLE {name}")


def test_missing_privileges_are_said_as_grants(command, db, schema_user):
    """The same by config validate, by --dry-run and by start."""
    rows(db, SCHEMA_SQL)
    rows(db, f"GRANT SELECT ON etcd_wal TO {schema_user}")
    run = partial(command, postgres=make_dsn(db, user=schema_user), exit_code=3)
    said = [run(*words) for words in (VALIDATE, ("--dry-run",), ("-l", "error"))]
    told = [
        re.findall("privileges are missing: (.*)$", done.stdout + done.stderr, re.MULTILINE)
        for done in said
    ]
    assert told[0] == told[1] == told[2]
    write = "SELECT, INSERT, UPDATE, DELETE"
    assert [grant for grant in sorted(told[0][0].split("; ")) if "etcd_refused" not in grant] == [
        f"GRANT INSERT, UPDATE, DELETE ON etcd_wal TO {schema_user}",
        f"GRANT SELECT ON etcd_status TO {schema_user}",
        *(
            f"GRANT {write} ON {table} TO {schema_user}"
            for table in ("etcd", "etcd_sync_event", "etcd_sync_state")
        ),
    ]
    rows(db, told[0][0])
    set_version(db, 1)  # to replace functions takes more than to run
    for words in (VALIDATE, ("--dry-run",)):
        done = run(*words)
        assert f"GRANT CREATE ON SCHEMA public TO {schema_user}" in done.stdout + done.stderr
    assert "can replace it: psql -1 -f schema.sql" in run(*VALIDATE).stdout


def test_wrong_postgres_password_is_exit_code_3(command):
    with LocalPostgres(password="right") as server:
        hba = server.data_dir / "pg_hba.conf"
        hba.write_text("host postgres all 127.0.0.1/32 scram-sha-256\n")
        server.restart()
        for login, text in [
            ({"password": "s3cret"}, "password authentication failed"),
            ({"password": ""}, "no password supplied"),
            ({"dbname": "template1"}, "no pg_hba.conf entry"),
        ]:
            dsn = make_dsn(server.dsn(), **login)
            assert_one_error_line(command("--startup-timeout=0s", postgres=dsn), 3, text)
        command("--dry-run", postgres=server.dsn(), exit_code=0)


def test_missing_etcd_permission_is_exit_code_3(command, secure_etcd):
    with secure_etcd.enable_auth():
        for prefix, user, password, text in [
            ("/t/", "fdw", "s3cret", "authentication failed"),
            ("/t/", "nosuch", "s3cret", "authentication failed"),
            ("/t/", None, "", "user name"),
            ("/other/", "fdw", "secret", "permission denied"),
        ]:
            dsn = etcd_dsn(secure_etcd.endpoint, prefix, user, password)
            done = command("--startup-timeout=0s", "-l", "error", etcd=dsn)
            assert_one_error_line(done, 3, text)
        command("--dry-run", etcd=secure_etcd.dsn(), exit_code=0)


def test_what_needs_a_person_is_exit_code_4(command, db, postgres_dsn):
    rows(db, SCHEMA_SQL)
    set_version(db, "NULL::int")
    assert_one_error_line(command(), 4, "a table etcd that is not etcd_fdw's")
    set_version(db, 99)
    newer = f"schema version 99, this script's is {etcd_fdw.SCHEMA_VERSION}: install"
    for args in ((), ("validate",), ("sync", "--retry-failed")):
        assert_one_error_line(command(*args), 4, newer)
    refused("55000", db, SCHEMA_SQL)
    assert scalar(db, "SELECT etcd_schema_version()") == 99
    name = f"latin_{RUN_ID}_{next(_numbers)}"
    options = "ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
    rows(postgres_dsn, f"CREATE DATABASE {name} {options}")
    try:
        done = command(postgres=make_dsn(postgres_dsn, dbname=name))
        assert_one_error_line(done, 4, "encoding is LATIN1")
    finally:
        rows(postgres_dsn, f"DROP DATABASE {name}")


def test_python_3_8_is_told_in_one_line(tmp_path):
    """It has to parse there (an old grammar), and to say so before anything else."""
    ast.parse(SCRIPT.read_text(), feature_version=(3, 8))
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.version_info = (3, 8, 20)")
    done = run_script("--help", env={"PYTHONPATH": str(tmp_path)})
    assert_one_error_line(done, 1, "Python 3.9 or later is needed, this is 3.")


def test_version_and_help():
    for flag in ("-v", "--version"):
        done = run_script(flag)
        assert (done.returncode, done.stdout) == (0, f"etcd_fdw {etcd_fdw.__version__}\n")
    done = run_script("--help")
    assert done.returncode == 0 and not done.stderr
    for option in etcd_fdw.OPTIONS:
        assert option.flag in done.stdout


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_it_is_loaded_stops_it(tmp_path, command, db, signum):
    (tmp_path / "psycopg2.py").write_text(
        "import os, sys\n"
        f"os.kill(os.getpid(), {int(signum)})\n"
        f"sys.path.remove({str(tmp_path)!r}); del sys.modules[__name__]\n"
        "import psycopg2\n"
    )
    env = {"PYTHONPATH": str(tmp_path)}
    service = command(env=env, exit_code=0)
    assert re.fullmatch(r"\S+ INFO stopped\n", service.stderr)
    assert not scalar(db, "SELECT to_regclass('etcd')")
    shown = command("config", "show", env=env)
    assert (shown.returncode, shown.stdout, shown.stderr) == (-signum, "", "")


@pytest.mark.parametrize("module", ["grpc", "psycopg2", "etcd3", "google"])
def test_missing_package_is_one_line_that_says_what_to_install(tmp_path, module):
    (tmp_path / f"{module}.py").write_text(
        f'raise ModuleNotFoundError("No module named {module}", name="{module}")'
    )
    for args in (["--help"], ["-p", P, "-e", E], ["status"]):
        done = run_script(*args, env={"PYTHONPATH": str(tmp_path)})
        assert_one_error_line(done, 1, "python3 -m pip install psycopg2-binary etcd3")


def setting(*argv: str, **environ: str) -> Callable[[str], Any]:
    """Return a function from an option's name to the value that the program would use."""
    given = vars(etcd_fdw.build_parser().parse_args(["-p", P, "-e", E, *argv]))
    environ = {f"ETCD_FDW_{name.upper()}": value for name, value in environ.items()}
    config = etcd_fdw.make_config(etcd_fdw.settings(given, environ))
    return lambda name: getattr(config, name)


def test_every_option_can_be_set_by_environment(db, prefix, etcd_address):
    env = {"ETCD_FDW_POSTGRES_DSN": db, "ETCD_FDW_ETCD_DSN": etcd_address.dsn(prefix)}
    done = run_script(env={**env, "ETCD_FDW_DRY_RUN": "true"})
    assert done.returncode == 0 and "nothing was written" in done.stdout
    names = [option.name for option in etcd_fdw.OPTIONS if option.name != "config"]  # no such file
    environ = {f"ETCD_FDW_{name.upper()}": "x" for name in names}
    chosen = etcd_fdw.settings({}, environ)
    assert {chosen[name] for name in names} == {("x", variable) for variable in environ}


def test_etcd_dsn_says():
    cases: list[tuple[str, dict[str, Any]]] = [
        ("etcd://h", {"hosts": ("h:2379",), "prefix": "", "tls": False}),
        ("etcd://h", {"dial_timeout": 5.0, "request_timeout": 10.0}),
        ("etcd://h/", {"prefix": "/"}),
        ("etcd://h/config", {"prefix": "/config"}),
        ("etcd://h/config/", {"prefix": "/config/"}),
        ("etcd://h//a", {"prefix": "//a"}),
        ("etcd://a:1,b,[::1]:3,[::2]/x", {"hosts": ("a:1", "b:2379", "[::1]:3", "[::2]:2379")}),
        ("etcd://h/?username=u&password=p%26w", {"username": "u", "password": "p&w"}),
        ("etcd://u:s3@h/?password=s4", {"username": "u", "password": "s4"}),
        ("etcd://h/?tls=enabled", {"tls": True}),
        ("etcd://h/?server_name=x", {"tls": True, "server_name": "x"}),
        ("etcd://h?dial_timeout=250ms", {"prefix": "", "dial_timeout": 0.25}),
        ("etcd://h/x?request_timeout=1m", {"prefix": "/x", "request_timeout": 60.0}),
        ("etcd://h?prefix=registry%2Fa&keepalive=90s", {"prefix": "registry/a", "keepalive": 90}),
        ("etcd://h?prefix=", {"prefix": ""}),
    ]
    for text, expected in cases:
        target = etcd_fdw.parse_etcd_dsn(text)
        assert {name: getattr(target, name) for name in expected} == expected, text
        assert target.password is None or target.password not in repr(target)


@given(prefix=ANY_TEXT, user=ANY_TEXT.filter(bool), password=ANY_TEXT.filter(bool))
def test_etcd_dsn_round_trip(prefix, user, password):
    quoted = urllib.parse.quote
    text = f"etcd://{quoted(user, '')}:{quoted(password, '')}@h/{quoted(prefix)}"
    target = etcd_fdw.parse_etcd_dsn(text)
    assert (target.username, target.password) == (user, password)
    assert target.prefix == "/" + prefix


def test_value_of_an_option_is_refused():
    for parse, texts, message in [
        ("duration", "|s|5|-5s|5 s|5x|1e3s|.5s|5s5s|5sec", "is not a duration such as"),
        ("address", "|9379|host|host:|h:99999|::1:9379|http://h:1", "HOST:PORT"),
        ("channel", "|etcd_changes|etcd_outcome|" + "x" * 64, "cannot be the channel"),
    ]:
        for text in texts.split("|"):
            with pytest.raises(ValueError, match=message):
                getattr(etcd_fdw, f"parse_{parse}")(text)


@given(attempt=st.integers(1, 10**6), initial=st.floats(0.001, 60), longest=st.floats(0.001, 3600))
def test_backoff_stays_within_its_limits(attempt, initial, longest):
    delay = etcd_fdw.backoff(attempt, initial, longest)
    assert 0 <= delay <= longest
    assert delay <= initial * 2.0 ** min(attempt, 30)


@given(prefix=ANY_TEXT, key=ANY_TEXT)
def test_ranges_cover_what_starts_with_the_prefix(prefix, key):
    start, end = etcd_fdw.prefix_range(prefix)
    after = etcd_fdw.text_after(prefix)
    for text in (key, prefix + key):
        data, starts = text.encode(), text.startswith(prefix)
        in_etcd = start <= data < end if prefix else data >= start
        in_sql = prefix.encode() <= data and (after is None or data < after.encode())
        assert in_etcd == (starts and data > b"")
        assert in_sql == starts


def outbox_row(**columns: Any) -> etcd_fdw.OutboxRow:
    """A pending change of which only these columns matter."""
    return etcd_fdw.OutboxRow(**{**dict.fromkeys(etcd_fdw.OutboxRow._fields), **columns})


@given(st.dictionaries(st.integers(1, 60) | st.integers(1, 2**63 - 1), st.integers(0, 3)))
def test_rows_in_a_receipt_round_trip(queued):
    rows = [outbox_row(id=id_, queued_at=at) for id_, at in queued.items()]
    assert etcd_fdw.parse_rows(etcd_fdw.format_rows(rows)) == queued


def test_change_that_is_queued_again_keeps_the_version_that_it_was_made_on():
    row = outbox_row(id=2, key="k", size=0, txid="9", depends_on=1, dependency_status="pending")
    (transaction,) = etcd_fdw.group_rows([row], False, 100, set())
    transaction.resolve({1: 50})
    (again,) = etcd_fdw.group_rows(transaction.rows, False, 100, set())
    again.resolve({})  # the outbox has forgotten it
    assert again.changes["k"].expected == 50


def test_receipts_that_two_failovers_hide_are_found(monkeypatch):
    """PostgreSQL is at 5 again. A sender knew of 8; the next one, which ended at once, did not."""

    def receipts(*numbers: int, settled: int) -> list[etcd_fdw.Receipt]:
        return [etcd_fdw.Receipt(100 + n, n, {}, {}, settled) for n in numbers]

    monkeypatch.setattr(etcd_fdw.Receipts, "held", lambda _, at: receipts(6, 7, 8, settled=5))
    held = receipts(9, settled=8) + receipts(10, settled=5)
    found = etcd_fdw.Receipts.unsettled(object.__new__(etcd_fdw.Receipts), held, 5)
    assert [receipt.number for receipt in found] == [6, 7, 8, 9, 10]


LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (DEBUG|INFO|WARN|ERROR) .+")


def test_dry_run_reports_and_writes_nothing(daemon, command, db, prefix, etcd):
    def dry_run() -> str:
        done = command("--dry-run")
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    etcd.put(prefix + "a", "1")
    etcd.put(prefix + "b", "1")
    first = dry_run()
    assert f"schema version {etcd_fdw.SCHEMA_VERSION} would be applied" in first
    assert "no mirror yet; 2 keys to copy" in first
    assert scalar(db, "SELECT count(*) FROM pg_class WHERE relname LIKE 'etcd%%'") == 0
    daemon().stop()

    etcd.put(prefix + "a", "2")
    etcd.delete(prefix + "b")
    etcd.put(prefix + "c", "1")
    conflict = ask(db, prefix + "c")
    rows(db, "SELECT etcd_set(%s, '1'), etcd_set(%s, '2')", prefix + "d", prefix + "e")
    before = rows(db, EVERYTHING), list(etcd.range(prefix).kvs)
    second = dry_run()
    assert "would be applied" not in second
    assert "2 to copy, 1 to mark as deleted" in second
    assert "PostgreSQL to etcd: 3 pending changes" in second
    assert f"  change {conflict} to {prefix}c\n" in second
    assert (rows(db, EVERYTHING), list(etcd.range(prefix).kvs)) == before

    daemon()
    assert statuses(db) == ["conflict", "success", "success"]
    assert "0 to copy, 0 to mark as deleted" in dry_run()  # beside the daemon, which goes on
    rows(db, "SELECT etcd_set(%s, '2')", prefix + "a")
    assert statuses(db)[-1] == "success"


# ── etcd to PostgreSQL ───────────────────────────────────────────────────────


def test_every_kind_of_event_arrives(daemon, db, prefix, etcd, recorder):
    lease = etcd.grant(60)
    etcd.put(prefix + "copied", "1", lease)
    daemon()
    etcd.put(prefix + "leased", "1", lease)
    etcd.put(prefix + "leased", "1")  # no longer
    etcd.put(prefix + "a", "1")
    etcd.put(prefix + "a", "1")  # the same value once more is a revision of its own
    etcd.delete(prefix + "a")
    etcd.put(prefix + "a", "")
    etcd.txn([etcd.put_op(prefix + f"t{i}", "1") for i in range(50)])
    etcd.txn([etcd.delete_op(prefix + "t", prefix=True), etcd.put_op(prefix + "a", "2")])
    etcd.revoke(lease)
    assert_same(recorder, db, prefix)
    wait_equal(db, etcd, prefix)
    assert len(mirror_rows(db, prefix)) == 109


@pytest.mark.parametrize("when", ["before", "while"])
def test_odd_values_and_keys_from_etcd(daemon, db, prefix, etcd, when):
    if when == "while":
        daemon()
    for number, value in enumerate(World.values()):
        etcd.put(prefix + f"v{number}", value)
    room = etcd_fdw.KEY_MAX_BYTES - len(prefix)
    for key in (*World.KEYS, "x" * room, os.urandom(room // 2).hex()):  # hex does not compress
        etcd.put(prefix + key, key)
    if when == "before":
        daemon()
    wait_equal(db, etcd, prefix)
    assert scalar(db, "SELECT value FROM etcd_get(%s)", prefix + "v0") == ""
    both = "value IS NOT NULL AND value_bytes IS NOT NULL"
    assert not rows(db, f"SELECT key FROM etcd WHERE tombstone OR {both}")


def test_unstorable_key_is_reported_and_the_rest_goes_on(daemon, command, db, prefix, etcd):
    stem = prefix.encode()
    unstorable = [stem + b"\xff", stem + b"nul\0", stem + b"x" * 2600]
    before = etcd.put(unstorable[0], b"\xfe")
    first = daemon()
    etcd.put(prefix + "a", "1")
    for key in unstorable[1:]:
        etcd.put(key, "")
    etcd.delete(unstorable[1])
    etcd.put(prefix + "b", "1")
    wait_until("the last key did not arrive", lambda: len(live(db, prefix)) == 2)
    sql = """
        SELECT details->>'key_hex', details->>'value_hex', source_revision FROM etcd_sync_event
        WHERE status = 'unstorable' ORDER BY source_revision
    """
    found = rows(db, sql)
    a, b, c = (key.hex() for key in unstorable)
    assert [row[:2] for row in found] == [(a, "fe"), (b, ""), (c, ""), (b, None)]
    assert found[0][2] == before
    wait_until("not counted", lambda: scalar(db, "SELECT unstorable FROM etcd_status") == 4)
    assert "cannot mirror 1 event whose key is not text" in first.log()
    left = "SELECT relname FROM pg_class WHERE relpersistence = 't' AND relkind = 'r'"
    assert rows(db, left) == []  # nobody would freeze it
    first.kill()
    etcd.compact(etcd.put(prefix + "c", "1"))
    daemon().wait_log("has compacted")
    wait_until("the next key did not arrive", lambda: len(live(db, prefix)) == 3)
    assert rows(db, sql) == found  # once
    compared = comparison_of(command)
    assert (compared["equal"], compared["keys"], compared["unstorable"]) == (True, 3, 2)


def test_revision_is_never_parted(daemon, db, prefix, etcd, recorder, tmp_path):
    # no heartbeat wakes a loop that forgot to go on
    heartless = altered_script(tmp_path, "etcd_fdw.HEARTBEAT_S = 1e6")
    one = daemon("--batch-size", "7")
    for number in range(12):
        if number == 6:
            assert_same(recorder, db, prefix)
            one.stop()
        size = 2 + 9 * (number % 6)
        etcd.txn([etcd.put_op(prefix + f"k{i}", str(number)) for i in range(size)])
    daemon("--batch-size", "7", script=heartless)  # which has the second half at once
    assert_same(recorder, db, prefix)
    sql = "SELECT revision FROM etcd GROUP BY revision HAVING count(DISTINCT xmin::text) > 1"
    assert rows(db, sql) == []


@pytest.mark.parametrize("meanwhile", ["changes", "compaction", "kill"])
def test_first_copy_is_of_one_revision(daemon, db, prefix, own_client, network, meanwhile):
    for n in range(15):
        keys = [f"{prefix}{n:02}/{i}" for i in range(100)]
        own_client.txn([own_client.put_op(key, "x" * 5000) for key in keys])
    network.throttle(2_000_000)
    one = daemon(*FAST, "--batch-size=100", etcd=network, ready=False)
    wait_until("nothing is copied", lambda: network.forwarded > 500_000)
    own_client.delete(f"{prefix}00/", prefix=True)
    own_client.put(keys[-1], "new")
    if meanwhile == "compaction":
        own_client.compact(own_client.revision())
    elif meanwhile == "kill":
        one.kill()
        assert not rows(db, "SELECT FROM etcd UNION ALL SELECT FROM etcd_sync_state")
        one = daemon(*FAST, etcd=own_client)
    network.resume()
    one.wait_log("watching")
    wait_equal(db, own_client, prefix)
    first = scalar(db, "SELECT first_revision FROM etcd_sync_state")
    assert rows(db, SIX_FIELDS, prefix, first) == range_at(own_client, prefix, first)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_quickstart_recovery(daemon, db, prefix, etcd, recorder, end):
    one = daemon()
    for key in "abcd":
        etcd.put(prefix + key, "1")
    assert_same(recorder, db, prefix)
    getattr(one, end)()
    known = etcd.revision()
    etcd.put(prefix + "a", "2")
    etcd.put(prefix + "a", "3")
    etcd.delete(prefix + "b")
    etcd.delete(prefix + "c")
    etcd.put(prefix + "c", "again")
    rows(db, "SELECT etcd_set(%s, 'sql'), etcd_delete(%s)", prefix + "sql", prefix + "d")
    rows(db, "SELECT etcd_set(%s, 'late')", prefix + "a")  # made on what was overwritten since
    rows(db, "SELECT etcd_set(%s, '1'), etcd_delete(%s)", prefix + "e", prefix + "e")
    daemon()
    assert statuses(db) == ["success", "success", "conflict", "success", "success"]
    wait_equal(db, etcd, prefix)
    assert_same(recorder, db, prefix)
    assert len([row for row in mirror_rows(db) if row.revision <= known]) == 4
    takeovers = scalar(db, "SELECT count(*) FROM etcd_sync_event WHERE operation = 'takeover'")
    assert takeovers == (end == "kill")


@pytest.mark.parametrize(
    ("puts", "reason"),
    [
        (None, "belongs to another etcd timeline: it is of cluster"),
        (1, "etcd only at 2"),
        (20, "is not in etcd what it is in the mirror"),
    ],
    ids=["another cluster", "behind", "past the checkpoint"],
)
def test_other_or_wiped_etcd_is_exit_code_4(daemon, command, db, prefix, own_etcd, puts, reason):
    with EtcdClient(own_etcd.endpoint) as client:
        for number in range(5):
            client.put(prefix + "a", str(number))
        daemon(etcd=own_etcd).stop()
        before = rows(db, EVERYTHING)
        if puts:
            own_etcd.stop()
            shutil.rmtree(own_etcd.data_dir)
            own_etcd.start()  # the same cluster id, as it is made from its members' addresses
            wait_until("etcd is away", lambda: store_revision(client))
        for number in range(puts or 0):
            client.put(prefix + "a", f"other {number}")
    server = {"etcd": own_etcd} if puts else {}
    done = command(**server)
    assert_one_error_line(done, 4, reason)
    assert "sync --reset" in done.stderr
    if puts != 20:  # for that start compares keys, which a check does not
        assert reason in command(*VALIDATE, **server, exit_code=4).stdout
    assert rows(db, EVERYTHING) == before


OLD_MIRROR = "UPDATE etcd SET lease = NULL, create_revision = NULL, version = NULL"


@pytest.mark.parametrize("compacted", [False, True])
def test_mirror_of_an_older_version_gets_all_that_etcd_tells(
    daemon, db, prefix, own_client, compacted
):
    metadata = "SELECT lease, create_revision, version FROM etcd ORDER BY key, revision"
    lease = own_client.grant(300)
    first = own_client.put(prefix + "a", "1", lease)
    own_client.put(prefix + "b", "1")
    daemon(etcd=own_client).stop()
    rows(db, OLD_MIRROR)
    rows(db, "UPDATE etcd_sync_state SET unrepaired = true")
    own_client.put("elsewhere", "1")
    newest = own_client.put(prefix + "b", "2", lease)
    if compacted:
        own_client.compact(newest)
    daemon(etcd=own_client)
    wait_equal(db, own_client, prefix)
    superseded = (None, None if compacted else first + 1, None if compacted else 1)
    assert rows(db, metadata) == [(lease, first, 1), superseded, (lease, first + 1, 2)]
    state = rows(db, "SELECT unrepaired, gaps = '{}', resyncs FROM etcd_sync_state")
    assert state == [(False, not compacted, int(compacted))]
    assert not scalar(db, "SELECT count(*) FROM etcd_sync_event WHERE operation = 'repair'")


def test_who_holds_the_lock_of_a_generation_does_not_hold_up_the_mirror(daemon, db, prefix, etcd):
    daemon()
    lock = "pg_try_advisory_lock_shared(_etcd_generation_lock(prefix, generation + n))"
    with session(db, f"SELECT {lock} FROM etcd_sync_state, generate_series(1, 9) n"):
        etcd.put(prefix + "a", "1")
        wait_equal(db, etcd, prefix)
    held = """
        SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)
        WHERE locktype = 'advisory' AND datname = current_database()
    """
    # the daemon's locks: of the prefix, and from the next batch on of the generation
    wait_until("no lock again", lambda: etcd.put(prefix + "b", "1") and scalar(db, held) == 2)


def test_rows_of_a_time_that_the_mirror_cannot_know_are_another_timeline(
    daemon, db, prefix, own_client
):
    own_client.put(prefix + "a", "1")
    daemon(etcd=own_client).stop()
    rows(db, "INSERT INTO etcd (key, value, revision) VALUES (%s, 'x', 4)", prefix + "foreign")
    for number in range(3):
        own_client.put(prefix + "a", str(number))
    own_client.compact(own_client.revision())
    one = daemon(*FAST, etcd=own_client, ready=False)
    assert one.wait_exit() == 4
    assert f"key {prefix}foreign has another history in the mirror" in one.log()


OWN_COLUMNS = (
    "size kind n page due keys at following mine p s data found k w e mirrors deletes same"
)
REFUSALS = "22003 23505 23514 0A000 P0001 42501 40001 53100 54000 57014 XX000"


def test_own_columns_indexes_and_triggers_do_not_matter(
    daemon, command, db, prefix, etcd, recorder
):
    daemon().stop()
    tables = "etcd", "etcd_wal", "etcd_sync_state", "etcd_sync_event", "etcd_lock"
    for table in tables:
        for column in OWN_COLUMNS.split():
            rows(db, f"ALTER TABLE {table} ADD COLUMN {column} text DEFAULT 'own'")
    rows(db, "CREATE INDEX ON etcd (revision); CREATE INDEX ON etcd (ts)")
    rows(
        db,
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN NEW.kind := NEW.key; RETURN NEW; END';"
        "CREATE TRIGGER note BEFORE INSERT OR UPDATE ON etcd FOR EACH ROW EXECUTE FUNCTION note()",
    )
    old = ("--history-retention", "0s", "--wal-retention", "0s", "--audit-retention", "0s")
    one = daemon("-l", "debug", "--audit", "all", *old)
    for value in "12":
        etcd.put(prefix + "a", value)
    rows(db, SET, prefix + "b")
    wait_until("it is not applied", arrives(db, prefix + "b"))  # and its row deleted soon
    etcd.put(prefix.encode() + b"\xff", "")
    etcd.delete(prefix.encode() + b"\xff")
    wait_equal(db, etcd, prefix)
    one.stop()
    rows(db, "UPDATE etcd_sync_state SET unrepaired = true")
    rows(db, "DELETE FROM etcd WHERE key = %s", prefix + "a")
    two = daemon("--audit", "all")
    two.wait_log("WARN .* repaired 1 difference")
    rows(db, "DELETE FROM etcd WHERE key = %s", prefix + "a")
    command("validate", "--fix", exit_code=0)
    command("status", exit_code=0)
    wait_equal(db, etcd, prefix)
    two.stop()
    assert "ERROR" not in one.log() + two.log()
    rows(db, f"TRUNCATE {', '.join(tables)} RESTART IDENTITY")
    use_everything(db)
    rows(db, SCHEMA_SQL)


def refuse(db: str, event: str, table: str, sqlstate: str = "P0001", when: str = "") -> None:
    """Have a trigger named refuse keep everybody from changing rows of a table."""
    rows(
        db,
        f"""
        CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE 'not now' USING ERRCODE = '{sqlstate}'; END $$;
        CREATE TRIGGER refuse BEFORE {event} ON {table} FOR EACH ROW {when}
            EXECUTE FUNCTION refuse()
        """,
    )


@pytest.mark.parametrize("place", ["etcd", "etcd_sync_state", "resync"])
def test_whatever_keeps_the_mirror_from_writing_is_waited_out(
    daemon, db, prefix, own_client, place
):
    table = "etcd" if place == "resync" else place
    one = daemon("--audit", "all", *FAST, etcd=own_client)
    for sqlstate in REFUSALS.split():
        if place == "resync":
            one.stop()
        refuse(db, "INSERT OR UPDATE", table, sqlstate)
        mark = one.mark()
        own_client.put(prefix + sqlstate, "1")
        if place == "resync":
            own_client.compact(own_client.put(prefix + sqlstate, "2"))
            one, mark = daemon("--audit", "all", *FAST, etcd=own_client, ready=False), 0
        one.wait_log(rf"(WARN|ERROR) PostgreSQL: not now \({sqlstate}\).*retrying", after=mark)
        rows(db, f"DROP TRIGGER refuse ON {table}")
        wait_equal(db, own_client, prefix)


def test_event_that_cannot_be_recorded_holds_up_no_mirror(daemon, db, prefix, etcd):
    one = daemon("--audit", "all", *FAST)
    for sqlstate in REFUSALS.split():
        refuse(db, "INSERT", "etcd_sync_event", sqlstate)
        etcd.put(prefix + sqlstate, "1")
        wait_equal(db, etcd, prefix)
        rows(db, "DROP TRIGGER refuse ON etcd_sync_event")
    assert re.findall("(?:WARN|ERROR) .*", one.log()) == [
        "WARN not recorded in etcd_sync_event: PostgreSQL: not now (22003)"
    ]


def test_first_copy_of_what_cannot_be_stored_takes_little_memory(daemon, db, prefix, own_client):
    value = os.urandom(1 << 20)
    for number in range(100):
        own_client.put(prefix.encode() + b"\xff%d" % number, value)
    one = daemon(etcd=own_client)
    assert peak_mib(one.pid) < 150
    told = "SELECT count(DISTINCT key), sum(length(details->>'value_hex')) FROM etcd_sync_event"
    assert rows(db, f"{told} WHERE status = 'unstorable'") == [(100, 100 << 21)]


def test_large_answers_of_many_events_are_not_taken_in_fragments(
    daemon, db, prefix, own_etcd, own_client
):
    daemon(etcd=own_etcd).stop()
    for number in range(900):
        ops = [own_client.put_op(f"{prefix}{number}/{n}", "v" * 400) for n in range(100)]
        own_client.txn(ops)
    before = cpu_s(own_etcd.process.pid)
    one = daemon(*FAST, etcd=own_etcd)
    wait_until("no catch-up", lambda: scalar(db, "SELECT count(*) FROM etcd") == 90_000)
    assert cpu_s(own_etcd.process.pid) - before < 8  # 24 with fragments
    assert "WARN" not in one.log()


def test_answer_that_is_always_too_large_has_a_reason(daemon, command, db, prefix, etcd, tmp_path):
    daemon().stop()
    tiny = "etcd_fdw.ANSWER_LIMITS = tuple((70_000, half) for _, half in etcd_fdw.ANSWER_LIMITS)"
    etcd.put(prefix + "a", "x" * 100_000)
    one = daemon(*FAST, script=altered_script(tmp_path, tiny))
    one.wait_log("ERROR .*larger than max.*retrying")
    wait_until("no reason", lambda: "larger than max" in (status_of(command)["last_error"] or ""))


@pytest.mark.parametrize("asks", [True, False])
def test_silent_watch_is_asked(daemon, db, prefix, etcd, tmp_path, asks):
    change = "etcd_fdw.SILENCE_LIMIT_S = etcd_fdw.ANSWER_LIMIT_S = 0.5\n"
    if not asks:  # so that nothing is heard
        change += "etcd_fdw.Watch.ask = lambda self: None"
    one = daemon(*FAST, script=altered_script(tmp_path, change))
    if not asks:
        one.wait_log("WARN .*the watch has been silent for .*, and does not answer")
    else:
        time.sleep(4)
        assert "silent" not in one.log()
    etcd.put(prefix + "a", "1")
    wait_equal(db, etcd, prefix)


def test_one_revision_larger_than_an_answer_is_mirrored(daemon, db, prefix, own_client):
    keys = [f"{prefix}{number:05}{'k' * 2_480}" for number in range(14_000)]
    daemon(etcd=own_client)
    for start in range(0, len(keys), 100):
        own_client.txn(success=[own_client.put_op(key, "1") for key in keys[start : start + 100]])
    wait_until("not mirrored", lambda: len(live(db, prefix)) == len(keys))
    own_client.delete(prefix, prefix=True)  # 35 MB of keys in one revision
    wait_until("not deleted", lambda: not live(db, prefix))


# ── PostgreSQL to etcd ───────────────────────────────────────────────────────


def test_quickstart_insert_arrives_and_is_mirrored_before_it_is_success(daemon, db, prefix, etcd):
    daemon()
    key = prefix + "app/debug"
    rows(db, "INSERT INTO etcd_wal (key, value, revision) VALUES (%s, 'true', NULL)", key)
    sql = """
        SELECT result_revision, (SELECT e.revision FROM etcd_get(w.key) e)
        FROM etcd_wal w WHERE status <> 'pending'
    """
    # one statement, one snapshot: the first that sees the outcome must see the row as well
    (revisions,) = wait_until("the change is still pending", lambda: rows(db, sql))
    kv = etcd.get(key)
    assert kv.value == b"true"
    assert revisions == (kv.mod_revision, kv.mod_revision)
    assert statuses(db) == ["success"]


def test_quickstart_conflict(daemon, db, prefix, etcd):
    daemon()
    key = prefix + "a"
    old = etcd.put(key, "1")
    new = etcd.put(key, "2")
    for made_on, words in [
        (old, f"the change was made on revision {old}"),
        (None, "the change was made on its absence"),
    ]:
        message = f"etcd wins: {key} is at revision {new} in etcd, {words}"
        beaten = ended(db, ask(db, key, revision=made_on))
        assert (*beaten.outcome, beaten.error_message) == ("conflict", new, message)
    etcd.delete(key)
    gone = f"etcd wins: {key} is not there in etcd, the change was made on revision {new}"
    beaten = ended(db, ask(db, key, revision=new))
    assert (*beaten.outcome, beaten.error_message) == ("conflict", None, gone)
    assert etcd.get(key) is None
    audit = "SELECT operation, status, key FROM etcd_sync_event WHERE key IS NOT NULL"
    assert rows(db, audit) == [("change", "conflict", key)] * 3


def test_transaction_arrives_whole_with_last_change_of_each_key(daemon, db, prefix, etcd, recorder):
    daemon()
    a, b, c = (prefix + key for key in "abc")
    rows(db, "SELECT etcd_set(%s, '1'), etcd_set(%s, '2'), etcd_set(%s, '3')", a, b, a)
    assert statuses(db) == ["success"] * 3
    assert etcd.get(a).mod_revision == etcd.get(b).mod_revision
    rows(db, "SELECT etcd_delete(%s), etcd_set(%s, '4'), etcd_set(%s, '5')", a, b, c)
    assert statuses(db) == ["success"] * 6
    assert_same(recorder, db, prefix)
    assert {event.revision for event in recorder.events[2:]} == {etcd.get(c).mod_revision}
    rows(db, "SELECT etcd_set(%s, '6'), etcd_delete(%s), etcd_set(%s, '7')", b, b, b)
    rows(db, "SELECT etcd_set(%s, '8'), etcd_delete(%s)", c, c)
    assert statuses(db) == ["success"] * 11
    assert_same(recorder, db, prefix)
    told = [event.value for event in recorder.history()]
    assert collections.Counter(told) == collections.Counter(
        [b"3", b"2", b"4", b"5", b"7", None, None]
    )


def test_transaction_with_a_conflict_changes_nothing(daemon, db, prefix, etcd):
    daemon()
    a, b, c = (prefix + key for key in "abc")
    rev_a, rev_b = etcd.put(a, "1"), etcd.put(b, "1")
    newer = etcd.put(b, "2")
    insert = "INSERT INTO etcd_wal (key, value, revision) VALUES (%s, '', %s), (%s, '', %s)"
    rows(db, insert + ", (%s, '', NULL)", a, rev_a, b, rev_b, c)
    assert statuses(db) == ["conflict"] * 3
    said = f"etcd wins: {b} is at revision {newer} in etcd, the change was made on revision {rev_b}"
    sql = "SELECT DISTINCT result_revision, error_message FROM etcd_wal"
    assert rows(db, sql) == [(newer, said)]
    assert (etcd.get(a).value, etcd.get(b).value, etcd.get(c)) == (b"1", b"2", None)


def test_counter_misses_no_step(daemon, db, prefix, etcd):
    key = prefix + "n"
    etcd.put(key, "0")
    daemon()
    update = "UPDATE etcd_kv SET value = (value::int + 1)::text WHERE key = %s"

    def step_in_sql() -> bool:
        """Whether the step was made; it may conflict, or find another one pending."""
        try:
            change = scalar(db, f"{update}; {OWN_CHANGES_SQL}", key)
        except psycopg2.errors.SerializationFailure:
            return False
        return ended(db, change).status == "success"

    def step_in_etcd() -> bool:
        now = etcd.get(key)
        step = etcd.put_op(key, str(int(now.value) + 1))
        return bool(etcd.txn([step], compare=[etcd.unchanged(key, now.mod_revision)]).succeeded)

    def work(number: int) -> None:
        for _ in range(50):
            wait_until("no step was made", step_in_sql if number else step_in_etcd)

    in_threads(8, work)
    assert etcd.get(key).value == b"400"
    assert statuses(db).count("success") == 350


def test_odd_values_and_keys_from_sql(daemon, db, prefix, etcd):
    daemon()
    longest = os.urandom((etcd_fdw.KEY_MAX_BYTES - len(prefix)) // 2).hex()  # not to be compressed
    changes: dict[str, bytes | str] = {key: key for key in (*World.KEYS, longest)}
    for number, value in enumerate(World.values()):
        changes[f"b{number}"] = value
        if etcd_fdw.is_text(value):
            changes[f"t{number}"] = value.decode()
    with session(db) as cur:
        for key, change in changes.items():
            function = "etcd_set" if isinstance(change, str) else "etcd_set_bytes"
            cur.execute(f"SELECT {function}(%s, %s)", (prefix + key, change))
    assert set(statuses(db)) == {"success"}
    expected = {(prefix + key).encode(): _bytes(change) for key, change in changes.items()}
    assert {key: value for key, (value, _) in held(etcd, prefix).items()} == expected
    wait_equal(db, etcd, prefix)


def test_transaction_beyond_max_txn_ops_is_applied_key_by_key(daemon, db, prefix, etcd):
    daemon("--max-txn-ops", "20")
    for stale in ("k7", "yk7"):
        etcd.put(prefix + stale, "etcd")
    sql = "INSERT INTO etcd_wal (key, value) SELECT %s || 'k' || i, i FROM generate_series(1, %s) i"
    rows(db, sql, prefix, 50)
    counts = statuses(db)
    assert counts == ["success"] * 6 + ["conflict"] + ["success"] * 43
    for name, status in [("x", "success"), ("y", "conflict")]:
        rows(db, sql, prefix + name, 16)  # beside receipts, nested transaction and refusal
        assert statuses(db)[-16:] == [status] * 16
    assert len({kv.mod_revision for kv in etcd.range(prefix + "x").kvs}) == 1
    wait_equal(db, etcd, prefix)


def test_what_etcd_refuses_fails_alone(daemon, db, prefix, etcd):
    daemon().stop()
    for number in range(5):
        size = 2_000_000 if number == 2 else 1
        rows(db, "SELECT etcd_set(%s, repeat('x', %s))", f"{prefix}{number}", size)
    daemon()
    assert statuses(db) == ["success", "success", "failed", "success", "success"]
    assert "request is too large" in str(ended(db, prefix + "2").error_message)
    sql = "SELECT status FROM etcd_sync_event WHERE operation = 'change' AND key = %s"
    assert rows(db, sql, prefix + "2") == [("failed",)]
    assert len(held(etcd, prefix)) == 4


def test_forged_dependencies_do_not_stall(daemon, db, prefix, etcd):
    daemon().stop()
    a, b, c = (prefix + key for key in "abc")
    insert = """
        INSERT INTO etcd_wal (id, key, value, txid, depends_on) OVERRIDING SYSTEM VALUE
        VALUES (%s, %s, '1', %s::text::xid8, %s)
    """
    for forged in [
        # id, key, txid, depends_on
        (1, a, 101, None),
        (2, a, 102, 1),
        (3, b, 102, None),
        (4, b, 101, 3),  # each transaction waits for the other
        (5, c, 103, 5),  # itself
        (6, c, 104, 999),  # nothing
        (7, c, 105, 1),  # another key's
    ]:
        rows(db, insert, *forged)
    daemon()
    assert statuses(db)[4:] == ["success", "conflict", "conflict"]  # all made on the absence of c


@pytest.mark.parametrize("lost", ["answer", "daemon"])
def test_applied_without_an_answer_is_success(daemon, db, prefix, etcd, recorder, lost):
    kinds = itertools.product(("insert", "update", "delete"), ("nothing", "put", "put-delete"))
    changed = [f"{prefix}{kind}-{then}" for kind, then in kinds]
    there = [key for key in changed if "/insert-" not in key]
    for key in there:
        etcd.put(key, "old")
    with Proxy(etcd.endpoint) as proxy:
        one = daemon(*FAST, etcd=proxy)
        proxy.delay(0.5)
        with session(db) as cur:
            for key in changed:
                change = "etcd_delete(%s)" if "/delete-" in key else "etcd_set(%s, 'sql')"
                cur.execute(f"SELECT {change}", (key,))
        seen = len(there) + len(changed)
        wait_until("not applied", lambda: len(recorder.events) == seen)
        proxy.refuse()  # the answers are still on their way
        revisions = {event.key.decode(): event.revision for event in recorder.events}
        for key in changed:
            if "-put" in key:
                etcd.put(key, "sql")  # by chance alike
            if key.endswith("-delete"):
                etcd.delete(key)
        if lost == "daemon":
            one.kill()
            daemon()
        else:
            proxy.resume()
        assert statuses(db) == ["success"] * len(changed)
        assert dict(rows(db, "SELECT key, result_revision FROM etcd_wal")) == revisions
        assert_same(recorder, db, prefix)


def test_standby_takes_over(daemon, db, prefix, etcd, recorder):
    active = daemon()
    standby = daemon(ready=False)
    standby.wait_log("standing by: another instance is active")
    etcd.put(prefix + "a", "1")
    rows(db, "SELECT etcd_set(%s, '1')", prefix + "b")
    assert statuses(db) == ["success"]
    assert "watching" not in standby.log()
    active.kill()
    rows(db, "SELECT etcd_set(%s, '2')", prefix + "b")
    etcd.put(prefix + "a", "2")
    standby.wait_log(f"took over from pid {active.pid}")
    assert statuses(db) == ["success"] * 2
    assert_same(recorder, db, prefix)
    assert scalar(db, "SELECT pid FROM etcd_status") == standby.pid
    sql = "SELECT details->>'from_pid' FROM etcd_sync_event WHERE operation = 'takeover'"
    assert rows(db, sql) == [(str(active.pid),)]


@pytest.mark.parametrize("gone", [False, True])
def test_who_holds_the_lock_is_named_if_it_is_still_there(daemon, db, prefix, tmp_path, gone):
    change = "etcd_fdw.LOCK_HOLDER_SQL = 'SELECT WHERE false'" if gone else ""
    with session(db, application_name="psql") as cur:
        cur.execute(etcd_fdw.LOCK_SQL, {"prefix": prefix})
        info = cur.connection.info
        who = f"backend {info.backend_pid} of role {info.user}, psql"
        one = daemon(ready=False, script=altered_script(tmp_path, change))
        who = "backend unknown of role unknown, unknown" if gone else who
        one.wait_log(rf"standing by: another instance is active on '{prefix}': {who}$")
    one.wait_log("watching")


def test_stop_and_kill_under_load_give_each_change_one_outcome(daemon, db, load):
    one = daemon(*FAST)
    rows(
        db,
        """
        CREATE TABLE outcome (id bigint PRIMARY KEY);  -- a second one would fail the daemon
        CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN INSERT INTO outcome VALUES (NEW.id); RETURN NULL; END $$;
        CREATE TRIGGER note AFTER UPDATE OF status ON etcd_wal FOR EACH ROW EXECUTE FUNCTION note()
        """,
    )
    play = load()
    for signum in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGKILL):
        play.run(40)
        one.signal(signum)
        if signum == signal.SIGKILL:
            assert one.wait_exit() == -signum
        else:
            assert one.wait_exit() == 0
            assert one.log().endswith("INFO stopped\n")
        one = daemon(*FAST)
    play.finish()
    statuses = collections.Counter(row.status for row in wal_rows(db))
    assert scalar(db, "SELECT count(*) FROM outcome") == sum(statuses.values())
    counted = rows(db, "SELECT applied, conflicts, events FROM etcd_sync_state")
    events = len(play.recorder.history())
    assert counted == [(statuses["success"], statuses["conflict"], events)]


def test_flood_of_conflicts_is_a_few_lines_also_as_json(daemon, db, prefix, etcd):
    revision = etcd.put(prefix + "7", "x")
    one = daemon("--log-format", "json")
    insert = f"INSERT INTO etcd_wal (key, value, revision) VALUES ('{prefix}' || n, '1', 1)"
    in_transactions_of_their_own(db, 60, insert)
    statuses(db)
    assert one.stop() == 0
    lines = [json.loads(line) for line in one.log().splitlines()]
    for line in lines:
        assert set(line) >= {"ts", "level", "message", "prefix", "pid"}
        assert (line["prefix"], line["pid"]) == (prefix, one.pid)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line["ts"])
    assert lines[-1]["message"] == "stopped"
    conflicts = [line for line in lines if line["message"].startswith("conflict: change")]
    assert len(conflicts) == etcd_fdw.CONFLICTS_SHOWN
    seventh = conflicts[6]
    found = rows(db, "SELECT id, key FROM etcd_wal WHERE key = %s", prefix + "7")
    assert [(seventh["id"], seventh["key"])] == found
    assert (seventh["level"], seventh["revision"]) == ("warn", revision)
    (summary,) = [line for line in lines if line["message"].startswith("mirrored")]
    assert (summary["level"], summary["conflicts"], summary["events"]) == ("warn", 60, 0)
    assert summary["message"].endswith("; not every conflict is a line here: see etcd_wal")


def test_changes_outside_the_prefix_are_left_alone(daemon, db, prefix, etcd):
    """Also where polling takes the place of the trigger."""
    one = daemon("--poll-interval=50ms")
    rows(db, "ALTER TABLE etcd_wal DISABLE TRIGGER etcd_wal_notify")
    rows(db, "SELECT etcd_set('/elsewhere', '1')")
    rows(db, "SELECT etcd_set(%s, '1'), etcd_set('/elsewhere', '2')", prefix + "a")
    rows(db, "SELECT etcd_set(%s, '1')", prefix + "b")
    one.wait_log(r"WARN \d pending changes? outside every mirrored prefix: left alone")
    sql = "SELECT key, status FROM etcd_wal WHERE status <> 'pending' ORDER BY id"
    done = [(prefix + "a", "success"), (prefix + "b", "success")]
    wait_until("not applied", lambda: rows(db, sql) == done)
    assert etcd.get("/elsewhere") is None
    assert scalar(db, "SELECT pending FROM etcd_status WHERE prefix IS NULL") == 2
    rows(db, "SELECT etcd_set('/elsewhere', '3')")
    one.wait_log("WARN 3 pending changes outside every")  # each time that there are new ones


def test_owners_floor_with_a_wide_margin(daemon, db, prefix, etcd, recorder):
    """2,000 single changes each way, all at once, within 20 s."""
    daemon()
    count, began = 2000, time.monotonic()

    def change(number: int) -> None:
        for n in range(number, count, 16):
            if number % 2:
                etcd.put(f"{prefix}etcd/{n}", str(n))
                etcd.put(f"{prefix}etcd/{n}", str(n + 1))
            else:
                rows(db, "SELECT etcd_set(%s, '1')", f"{prefix}sql/{n}")
                rows(db, "SELECT etcd_set(%s, '2')", f"{prefix}sql/{n}")

    in_threads(16, change)
    assert statuses(db) == ["success"] * count
    wait_equal(db, etcd, prefix)
    assert time.monotonic() - began < 20
    assert_same(recorder, db, prefix)
    assert len(mirror_rows(db, prefix)) == 2 * count


# ── SQL interface ────────────────────────────────────────────────────────────

# ─ the schema without the daemon ─


@pytest.fixture(scope="session")
def schema_db(postgres_dsn: str) -> Iterator[str]:
    """The DSN of a database that has the schema, for all tests that need no daemon."""
    name = f"etcd_fdw_{RUN_ID}_schema"
    rows(postgres_dsn, f"CREATE DATABASE {name} ENCODING 'UTF8' TEMPLATE template0")
    dsn = make_dsn(postgres_dsn, dbname=name)
    rows(dsn, SCHEMA_SQL)
    yield dsn
    rows(postgres_dsn, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def schema(schema_db: str) -> str:
    """The DSN of a database that has the schema and nothing else."""
    rows(
        schema_db,
        "TRUNCATE etcd, etcd_wal, etcd_lock, etcd_sync_state, etcd_sync_event RESTART IDENTITY",
    )
    return schema_db


@pytest.fixture
def altered(schema: str) -> Iterator[None]:
    """The test may alter the schema."""
    yield
    rows(schema, "DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    rows(schema, "GRANT USAGE ON SCHEMA public TO PUBLIC")
    rows(schema, SCHEMA_SQL)


@pytest.fixture
def role(schema: str) -> Iterator[str]:
    """A role without privileges, which can log in."""
    name = f"tester_{RUN_ID}_{next(_numbers)}"
    create_role(schema, name)
    yield name
    rows(schema, f"DROP OWNED BY {name}; DROP ROLE {name}")


def mirror(db: str, *history: tuple[str, int, str | bytes | None]) -> None:
    """Write rows (key, revision, value; None: deleted) into table etcd, as the daemon does."""
    sql = "INSERT INTO etcd (key, revision, tombstone, value, value_bytes) VALUES %s"
    with session(db) as cur:
        for key, revision, value in history:
            columns = (value, None) if isinstance(value, str) else (None, value)
            cur.execute(sql, ((key, revision, value is None, *columns),))


def covers(db: str, prefix: str, first: int, checkpoint: int, **columns: Any) -> None:
    """Declare a prefix mirrored from revision first to the checkpoint."""
    row = {"prefix": prefix, "first_revision": first, "revision": checkpoint, **columns}
    values = ", ".join(["%s"] * len(row))
    rows(db, f"INSERT INTO etcd_sync_state ({', '.join(row)}) VALUES ({values})", *row.values())


def finish(db: str, change: int, status: str, revision: int | None = None) -> None:
    """Record how a change ended, as the daemon does."""
    rows(
        db,
        "UPDATE etcd_wal SET status = %s, result_revision = %s, finished_at = now() WHERE id = %s",
        *(status, revision, change),
    )


def refused(sqlstate: str, db: str, sql: str, *args: Any) -> Any:
    """Run a statement that must fail with this SQLSTATE; return the error's fields."""
    with pytest.raises(psycopg2.Error) as caught:
        rows(db, sql, *args)
    assert caught.value.pgcode == sqlstate, caught.value
    return caught.value.diag


def wal(
    db: str, columns: str = "key, value, value_bytes, revision, depends_on"
) -> list[tuple[Any, ...]]:
    return rows(db, f"SELECT {columns} FROM etcd_wal ORDER BY id")


def version(db: str) -> int:
    return scalar(db, "SELECT current_setting('server_version_num')::int / 10000")


def grant_example(db: str, kinds: str = "GRANT", **names: str) -> None:
    """Run the example at the end of schema.sql for this app, and if given, etcd_fdw and mydb."""
    for sql in re.findall(rf"^--     ((?:{kinds}) .*;)$", SCHEMA_SQL, flags=re.M):
        if "etcd_fdw" in names or "etcd_fdw" not in sql:
            rows(db, re.sub(r"(?<=TO )(etcd_fdw|app)\b|mydb", lambda m: names[m[0]], sql))


def long_history(db: str, size: int, keys: int) -> None:
    """Mirror so many revisions of keys /k/0, /k/1, …, one after the other."""
    sql = "SELECT '/k/' || g %% %s, repeat('v', 40), g FROM generate_series(1, %s) g"
    rows(db, f"INSERT INTO etcd (key, value, revision) {sql}", keys, size)
    rows(db, "VACUUM ANALYZE etcd")


def tuples_read(cur: Any, table: str, sql: str) -> int:
    """Count the rows that a query fetches from a table by index; fail if it scans the table."""
    count = f"""
        SELECT coalesce(seq_scan, 0), coalesce(idx_tup_fetch, 0)
        FROM pg_stat_xact_user_tables WHERE relname = '{table}'
    """
    cur.execute(f"BEGIN; {count}")
    scans, tuples = cur.fetchone()
    cur.execute(sql)
    cur.execute(count)
    scans_after, tuples_after = cur.fetchone()
    cur.execute("COMMIT")
    assert scans_after == scans, f"{sql} scanned {table}"
    return tuples_after - tuples


# ─ schema.sql as a whole ─

CATALOG = """
SELECT c.relname::text AS name, c.oid::text || ' ' || c.relfilenode AS incarnation,
       c.reloptions::text, obj_description(c.oid, 'pg_class'),
       CASE c.relkind WHEN 'v' THEN pg_get_viewdef(c.oid) WHEN 'i' THEN pg_get_indexdef(c.oid) END
FROM pg_class c WHERE c.relnamespace = current_schema()::regnamespace
UNION ALL
SELECT relname || '.' || attname, '', format_type(atttypid, atttypmod) || ' ' || attnotnull,
       col_description(attrelid, attnum), pg_get_expr(adbin, adrelid)
FROM pg_attribute JOIN pg_class c ON c.oid = attrelid
LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
WHERE c.relnamespace = current_schema()::regnamespace AND NOT attisdropped
UNION ALL
SELECT oid::regprocedure::text, oid::text, proacl::text,
       obj_description(oid, 'pg_proc'), pg_get_functiondef(oid)
FROM pg_proc WHERE pronamespace = current_schema()::regnamespace
UNION ALL
SELECT conname::text, oid::text, '', '', pg_get_constraintdef(oid) FROM pg_constraint
WHERE connamespace = current_schema()::regnamespace
UNION ALL
SELECT tgname::text, oid::text, tgenabled::text, '', pg_get_triggerdef(oid) FROM pg_trigger
ORDER BY 1, 2
"""


@pytest.mark.usefixtures("altered")
def test_schema_applied_again_changes_nothing(schema):
    rows(schema, "ALTER TABLE etcd_wal DISABLE TRIGGER etcd_wal_notify")  # an operator's choice
    before = rows(schema, CATALOG)
    rows(schema, SCHEMA_SQL)
    assert rows(schema, CATALOG) == before


def test_schema_is_applied_to_a_fresh_database_without_a_word(db):
    with session(db, SCHEMA_SQL) as cur:
        assert cur.connection.notices == []
    if psql := shutil.which("psql"):
        rows(db, "CREATE SCHEMA another")
        there = make_dsn(db, options="-csearch_path=another")
        command = [psql, "-Xq1", "-vON_ERROR_STOP=1", f"-f{etcd_fdw.SCHEMA_FILE}", f"-d{there}"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# What version 2.1 had in place of what is there now, beside what the way back leaves.
_V4_SET = "bigint = NULL, ttl interval = NULL, force boolean = false) RETURNS bigint"
V4_FUNCTIONS = [
    "etcd_get(p_key text) RETURNS SETOF etcd_kv",
    "etcd_get_all(p_key text, p_min_revision bigint = 0) RETURNS TABLE (key text, value text)",
    "etcd_list(p_prefix text DEFAULT '') RETURNS SETOF etcd_kv",
    "etcd_at(p_revision bigint, p_prefix text DEFAULT '') RETURNS SETOF etcd_kv",
    "_etcd_state(p_prefix text, p_revision bigint) RETURNS SETOF etcd_kv",
    f"etcd_set(p_key text, p_value text, p_revision {_V4_SET}",
    f"etcd_set(p_key text, p_value jsonb, p_revision {_V4_SET}",
    f"etcd_set_bytes(p_key text, p_value bytea, p_revision {_V4_SET}",
    "etcd_set_many(p_values jsonb, ttl interval = NULL, force boolean = false)"
    " RETURNS SETOF bigint",
    "etcd_delete(p_key text, p_revision bigint = NULL, force boolean = false) RETURNS bigint",
    "_etcd_change(p_key text, p_value text, p_value_bytes bytea, p_revision bigint = NULL,"
    " p_ttl interval = NULL, p_force boolean = false, p_delete boolean = false,"
    " p_new boolean = false, p_retry_of bigint = NULL) RETURNS bigint",
    "_etcd_wait(p_prefix text, p_generation bigint, p_deadline timestamptz, p_for text)"
    " RETURNS void",
    "etcd_wait(p_id bigint, timeout interval DEFAULT '10 s', OUT status text,"
    " OUT result_revision bigint, OUT error_message text)",
]
SCHEMA_4 = """
    DROP INDEX etcd_wal_txid_idx;
    CREATE INDEX etcd_wal_pending_txid_idx ON etcd_wal (txid, id) WHERE status = 'pending';
    ALTER TABLE etcd_wal
        ADD CONSTRAINT etcd_wal_revision_check CHECK (revision >= 0),
        ADD CONSTRAINT etcd_wal_finished_check
            CHECK ((status = 'pending') = (finished_at IS NULL)),
        ADD CONSTRAINT etcd_wal_dismissed_check
            CHECK (dismissed_at IS NULL OR finished_at IS NOT NULL),
        ADD CONSTRAINT etcd_wal_ttl_check CHECK (ttl BETWEEN interval '0' AND interval '2500000 h');
    CREATE VIEW etcd_kv AS
        SELECT key, value, value_bytes, revision, ts, lease, '{}'::jsonb AS value_json FROM etcd;
    CREATE TRIGGER etcd_kv_write INSTEAD OF INSERT OR UPDATE OR DELETE ON etcd_kv
        FOR EACH ROW EXECUTE FUNCTION _etcd_kv_write();
""" + "".join(f"CREATE FUNCTION {one} LANGUAGE plpgsql AS 'BEGIN END';" for one in V4_FUNCTIONS)
SCHEMA_1 = """
    DROP VIEW etcd_kv CASCADE;
    CREATE VIEW etcd_kv AS SELECT key, value, value_bytes, revision, ts FROM etcd;
    ALTER TABLE etcd DROP COLUMN lease;
    ALTER TABLE etcd_wal DROP COLUMN dismissed_at, DROP COLUMN ttl, DROP COLUMN force,
        DROP COLUMN replaced_revision;
    ALTER TABLE etcd_sync_state DROP COLUMN mirror_id, DROP COLUMN receipt, DROP COLUMN split,
        DROP COLUMN last_error, DROP COLUMN last_error_at, DROP COLUMN generation,
        DROP COLUMN unrepaired;
"""


def downgrade(db: str, old: int) -> None:
    """Make of the schema what a released version had, of 1.0 only what an upgrade alters."""
    rows(db, readme_block("rollback") + SCHEMA_4 + (SCHEMA_1 if old == 1 else ""))
    set_version(db, old)


def shape(db: str) -> list[tuple[Any, ...]]:
    """What the schema consists of, whenever it was made."""
    return sorted((name, *map(str, what)) for name, _, *what in rows(db, CATALOG))


@pytest.mark.parametrize("old", [1, 4])
def test_schema_is_upgraded_with_rows_in_flight(db, daemon, prefix, etcd, old):
    rows(db, SCHEMA_SQL)
    fresh = shape(db)
    etcd.put(prefix + "a", "1")
    assert daemon().stop() == 0
    downgrade(db, old)
    rows(db, "CREATE SCHEMA mine; CREATE VIEW mine.a AS SELECT key, value FROM etcd_kv")
    ended = [("success", 7), ("conflict", 8), ("failed", None)]
    for number, (status, revision) in enumerate([("pending", None), *ended], 1):
        rows(db, "INSERT INTO etcd_wal (key, value) VALUES (%s, 'v')", f"{prefix}{number}")
        if status != "pending":
            finish(db, number, status, revision)
    outbox = "SELECT id, key, value, txid::text, finished_at, status FROM etcd_wal WHERE id > 1"
    mirrored = "SELECT ts, key FROM etcd"
    before = rows(db, outbox), rows(db, mirrored)
    rows(db, SCHEMA_SQL)
    assert shape(db) == fresh
    assert (rows(db, outbox), rows(db, mirrored)) == before
    assert scalar(db, "SELECT unrepaired FROM etcd_sync_state") is True
    assert rows(db, "SELECT * FROM mine.a") == [(prefix + "a", "1")]
    daemon()
    assert rows(db, "SELECT status FROM etcd_wait(1, '60 s')") == [("success",)]
    assert etcd.get(prefix + "1").value == b"v"
    assert scalar(db, "SELECT etcd_retry(4)") == 5
    assert rows(db, "SELECT status FROM etcd_wait(5, '60 s')") == [("success",)]


def test_commands_on_an_older_schema(daemon, command, db):
    daemon().stop()
    downgrade(db, 4)
    dry = command("--dry-run", exit_code=0)
    assert f"schema version {etcd_fdw.SCHEMA_VERSION} would be applied" in dry.stdout
    problem = f"has schema version 4, this script's is {etcd_fdw.SCHEMA_VERSION}: start"
    for args in ("validate", "sync --retry-failed"):
        assert_one_error_line(command(*args.split()), 4, problem)
    assert "PROBLEM: " in command("status", exit_code=0).stdout
    (found,) = status_of(command)["problems"]
    assert problem in found


def test_schema_upgrade_stops_at_what_would_break(db, command):
    rows(db, SCHEMA_SQL)
    downgrade(db, 4)
    rows(db, "CREATE VIEW mine AS SELECT key FROM etcd_list('/mine/')")
    before = rows(db, CATALOG)
    error = refused("2BP01", db, SCHEMA_SQL)
    depends = "view mine depends on function etcd_list(text)"
    assert depends in error.message_detail
    assert_one_error_line(command(), 4, depends)
    assert rows(db, CATALOG) == before


def test_schema_goes_where_search_path_says(db):
    rows(db, 'CREATE SCHEMA "My Schema"')
    there = make_dsn(db, options='-csearch_path="My\\ Schema"')
    rows(there, SCHEMA_SQL)
    rows(there, SCHEMA_SQL)
    assert scalar(db, "SELECT to_regclass('public.etcd')") is None
    assert scalar(db, """SELECT "My Schema".etcd_set('/a', '1')""") == 1  # from any search_path
    assert scalar(db, 'SELECT key FROM "My Schema".etcd_wal') == "/a"


SHADOWED_TYPES = (
    "text", "name", "integer", "bigint", "boolean", "timestamptz", "bytea", "text[]", "int8range",
    "int8range[]", "anyelement", "anyarray", "oid", "regclass", "double precision", "interval",
    "xid8", "jsonb", "uuid", "numeric",
)  # fmt: skip
SHADOWED_OPERATORS = (
    "=", "<>", "<", "<=", ">", ">=", "+", "-", "*", "&", "||", "<@", "@>", "~~", "~",
)  # fmt: skip
CALLED_SQL = r"""
    SELECT DISTINCT proname::text, least(pronargs + more, 3)
    FROM pg_proc, generate_series(0, CASE WHEN provariadic > 0 THEN 1 ELSE 0 END) more
    WHERE pronamespace = 'pg_catalog'::regnamespace AND pronargs > 0
      AND %s ~ ('\m' || proname || '\s*\(')
"""


def shadow(db: str, role: str, calls: str) -> None:
    """As a role that may create objects in the schema, define functions and operators with the
    names of all that are called: an argument's type may fit better than that of pg_catalog's."""
    body = "LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION $$shadow ran as %$$, current_user; END'"
    statements = []
    for name, arity in rows(db, CALLED_SQL, calls):
        some = SHADOWED_TYPES if arity < 3 else SHADOWED_TYPES[:5]
        for arguments in itertools.product(some, repeat=arity):
            signature = f'public."{name}"({", ".join(arguments)})'
            statements.append(f"CREATE FUNCTION {signature} RETURNS bigint {body}")
    for left, right in itertools.product(SHADOWED_TYPES, repeat=2):
        signature = f"public.shadow({left}, {right})"
        statements.append(f"CREATE FUNCTION {signature} RETURNS boolean {body}")
        statements += [
            f"CREATE OPERATOR public.{name}"
            f" (leftarg = {left}, rightarg = {right}, function = public.shadow)"
            for name in SHADOWED_OPERATORS
        ]
    rows(db, f"GRANT USAGE, CREATE ON SCHEMA public TO {role}")
    rows(make_dsn(db, user=role), ";".join(statements))


def use_everything(db: str) -> None:
    """Call all functions and use all views, in each way that runs other code of theirs."""
    mirror(db, ("/a", 3, "x"), ("/a", 6, "y"), ("/b", 4, b"\xff"), ("/c", 5, None))
    covers(db, "/", 2, 9, pruned_revision=3, gaps='{"[7,8)"}', heartbeat_at="now")
    for read in [
        "etcd_get('/a')", "etcd_get_all('/a')", "etcd_get_all('/a', 3)", "etcd_list()",
        "etcd_list('/', 1)", "etcd_at(6)", "etcd_at(6, '/a')", "etcd_kv", "etcd_status",
        "etcd_kv WHERE key = '/a'", "etcd_schema_version()", "etcd_wait_revision(9)",
        "etcd_revision_at(now(), '/')",
    ]:  # fmt: skip
        assert rows(db, f"SELECT * FROM {read}"), read
    for call, sqlstate, _ in [
        *BAD_ARGUMENTS,
        ("etcd_get_all('/a', 1)", "22023", None),
        ("etcd_at(2)", "22023", None),
        ("etcd_at(7)", "22023", None),
        ("etcd_at(10)", "22023", None),
        ("etcd_at(6, 'elsewhere')", "22023", None),
        ("etcd_wait_revision(1, p_prefix => 'elsewhere')", "22023", None),
        ("etcd_wait_revision(10, '0.1 s')", "57014", None),
        ("etcd_set('/a', 'v', 3)", "40001", None),
        ("etcd_wait(99)", "P0002", None),
        ("etcd_wait(txid => '999999999')", "P0002", None),
    ]:
        refused(sqlstate, db, f"SELECT {call}")
    for statement in [
        "SELECT etcd_set('/a', 'v', 6), etcd_set('/d', 'v'), etcd_set_bytes('/e', '\\xff', 0)",
        "SELECT etcd_set('/a', 'w'), etcd_delete('/d')",
        "INSERT INTO etcd_kv (key, value) VALUES ('/f', 'v')",
        "UPDATE etcd_kv SET value = 'z' WHERE key = '/b' AND revision = 4",
        "INSERT INTO etcd_wal (key, value, revision) VALUES ('/g', 'v', 0)",
        """SELECT etcd_set_many('{"/x": 1, "/y": null}', ttl => '9 s', force => true)""",
        "SELECT etcd_set('/h', '1'::jsonb), etcd_delete('/h', force => true), etcd_set('/n', 5)",
        "SELECT etcd_set('/n', '\\xff'::bytea), etcd_expect('/c', 0), etcd_keepalive('/a')",
        "INSERT INTO etcd_kv (key, value) VALUES ('/o', 'v');"
        "UPDATE etcd_kv SET value = 'w' WHERE key = '/o'; DELETE FROM etcd_kv WHERE key = '/o'",
    ]:
        rows(db, f"BEGIN; {statement}; COMMIT")
    refused("40001", db, "UPDATE etcd_kv SET value = 'z' WHERE key = '/a'")
    refused("57014", db, "SELECT etcd_wait(1, '0.1 s')")
    refused("57014", db, "CALL etcd_put('/put', 'v', timeout => '0')")
    finish(db, 1, "conflict", 7)
    assert rows(db, "SELECT etcd_wait(1)") and rows(db, "TABLE etcd_refused")
    rows(db, "SELECT etcd_retry(1), etcd_dismiss(1)")
    for call in ("etcd_retry(1)", "etcd_retry(2)", "etcd_dismiss(2)"):
        refused("55000", db, f"SELECT {call}")
    elsewhere = scalar(db, "SELECT etcd_set('elsewhere', 'v')")
    refused("55000", db, "SELECT etcd_wait(%s)", elsewhere)
    rows(db, "SELECT etcd_cancel(%s)", elsewhere)
    assert scalar(db, "SELECT etcd_delete_prefix('/')") > 5
    rows(db, "DELETE FROM etcd_wal")
    assert scalar(db, "SELECT etcd_restore('/', 3)") == 2


@pytest.mark.usefixtures("altered")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("applied", ["before", "again"])
def test_functions_never_run_code_of_others(schema, role, applied):
    shadow(schema, role, SCHEMA_SQL)
    with pytest.raises(psycopg2.errors.RaiseException, match="shadow ran as"):
        rows(schema, "SELECT hashtextextended('x'::text, 0)")  # the trap is set
    if applied == "again":
        rows(schema, SCHEMA_SQL)
    use_everything(schema)


@pytest.mark.timeout(300)
def test_daemon_never_runs_code_of_others(daemon, command, own_postgres, etcd, prefix):
    db = own_postgres.dsn()
    rows(db, SCHEMA_SQL)
    rows(db, "CREATE ROLE other LOGIN")
    shadow(db, "other", SCHEMA_SQL + SCRIPT.read_text(encoding="utf-8"))
    etcd.put(prefix + "old", "1")
    one = daemon(*FAST, "--audit=all", postgres=db)
    etcd.txn([etcd.put_op(prefix + "old", "2"), etcd.put_op(prefix + "new", b"\xff")])
    rows(db, "INSERT INTO public.etcd_wal (key, value) VALUES (%s, 'v')", prefix + "sql")
    rows(db, "INSERT INTO public.etcd_wal (key, value) VALUES (%s, 'v')", prefix + "old")
    one.wait_log("conflict: change 2")
    assert one.stop() == 0
    nothing_kept = [f"--{table}-retention=0s" for table in ("history", "wal", "audit")]
    two = daemon(*FAST, *nothing_kept, "-l", "debug", postgres=db)
    for table in ("etcd", "etcd_wal", "etcd_sync_event"):
        two.wait_log(f"housekeeping deleted .* of {table}$")
    for words in (["status", "--check"], ["sync"], ["validate"], ["--dry-run"]):
        command(*words, postgres=db, exit_code=0)
    assert two.stop() == 0
    assert "shadow ran as" not in own_postgres.log()
    with pytest.raises(psycopg2.errors.RaiseException, match="shadow ran as"):
        rows(db, "SELECT hashtextextended('x'::text, 0)")  # the trap was set


def test_every_object_explains_itself_and_every_function_has_its_search_path(schema):
    silent = """
        SELECT relname || '.' || attname FROM pg_attribute a JOIN pg_class c ON c.oid = attrelid
        WHERE relname IN ('etcd', 'etcd_wal', 'etcd_kv') AND attnum > 0 AND attname <> 'key'
          AND col_description(attrelid, attnum) IS NULL
        UNION ALL SELECT relname FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v')
          AND obj_description(oid, 'pg_class') IS NULL
        UNION ALL SELECT proname FROM pg_proc
        WHERE pronamespace = 'public'::regnamespace
          AND (obj_description(oid, 'pg_proc') IS NULL AND NOT starts_with(proname, '_')
               OR prosrc NOT LIKE E'\n-- %'
               OR NOT 'search_path=public, pg_temp' = ANY (proconfig))
    """
    assert rows(schema, silent) == []


# ─ tables ─


def test_tables_refuse_contradictory_rows(schema):
    for table, values in [
        ("etcd (key, revision)", "'/a', 1"),  # neither a value nor a tombstone
        ("etcd (key, revision, value, value_bytes)", "'/a', 1, 'a', 'a'"),
        ("etcd (key, revision, value, tombstone)", "'/a', 1, 'a', true"),
        ("etcd (key, revision, value_bytes, tombstone)", "'/a', 1, 'a', true"),
        ("etcd (key, revision, value)", "'/a', 0, 'a'"),
        ("etcd_wal (key)", "''"),
        ("etcd_wal (key)", "repeat('x', 2601)"),
        ("etcd_wal (key, value, value_bytes)", "'/a', 'a', 'a'"),
    ]:
        refused("23514", schema, f"INSERT INTO {table} VALUES ({values})")


def test_outbox_records_who_and_which_transaction(schema):
    with session(schema, application_name="shop") as cur:
        cur.execute("BEGIN; INSERT INTO etcd_wal (key, value) VALUES ('/a', '1')")
        cur.execute("SAVEPOINT s; SELECT etcd_set('/b', '2'); COMMIT")
        cur.execute("SELECT etcd_delete('/c')")
    (a, b, c) = wal(schema, "txid::text, role_name, application_name, status, retry_count")
    assert a == b != c
    assert a[1:] == (scalar(schema, "SELECT current_user::text"), "shop", "pending", 0)


def test_inserts_notify_once_per_transaction_without_payload(schema):
    with session(schema, "LISTEN etcd_changes") as cur:
        listener = cur.connection
        one = "SELECT etcd_set('/a', repeat('x', 100000))"  # no payload holds this
        many = "INSERT INTO etcd_wal (key) SELECT '/k/' || g FROM generate_series(1, 100) g"
        rows(schema, f"{one}; {many}")
        finish(schema, 1, "success", 5)  # the daemon's own writes wake nobody
        rows(schema, "NOTIFY etcd_changes, 'end'")
        while not any(n.payload == "end" for n in listener.notifies):
            assert select.select([listener], [], [], WAIT_S)[0], "no notification"
            listener.poll()
    assert [n.payload for n in listener.notifies] == ["", "end"]


# ─ reading ─


def test_get_returns_the_latest_revision_and_get_all_the_history(schema):
    mirror(schema, ("/a", 9, b"\xff\0"), ("/a", 2, "x"), ("/a", 7, None), ("/b", 8, "other"))
    mirror(schema, ("/c", 3, "x"), ("/c", 4, None))
    query = "SELECT key, value, value_bytes, revision FROM etcd_get(%s)"
    assert rows(schema, query, "/a") == [("/a", None, b"\xff\0", 9)]
    assert rows(schema, query, "/b") == [("/b", "other", None, 8)]
    for nothing in ("/c", "/", None):
        assert rows(schema, query, nothing) == []
    query = "SELECT revision, value, value_bytes, tombstone FROM etcd_get_all(%s, %s)"
    history = [(2, "x", None, False), (7, None, None, True), (9, None, b"\xff\0", False)]
    assert rows(schema, query, "/a", 0) == history
    assert rows(schema, query, "/a", 7) == history[1:]
    assert rows(schema, query, "/a", 10) == []
    assert scalar(schema, "SELECT count(*) FROM etcd_get_all('/a')") == 3


@pytest.mark.parametrize(
    "prefix", ["/a%", "/a_", "/a\\", "/a\\%", "/a'", '/a"', "/a\U0010ffff", "/aé", "/a\n"]
)
def test_list_takes_the_prefix_literally(schema, prefix):
    inside = [prefix, prefix + "\x01", prefix + "/x", prefix + "\U0010ffff\U0010ffff"]
    outside = ["/a", "/a!", "/aX", "/aXx", "/b", prefix[:-1] + "\x02" + prefix[-1]]
    mirror(schema, *((key, 1, "v") for key in {*inside, *outside}))
    assert rows(schema, "SELECT key FROM etcd_list(%s)", prefix) == [(key,) for key in inside]


JSON_VALUES = {
    '{"x": [1, null]}': {"x": [1, None]},
    " \t\r\n[]": [],
    '"text"': "text",
    "-1.5e3 ": -1500,
    "true": True,
    "plain": None,
    "10.1.2.3": None,
    "2026-01-31": None,
    "truth": None,
    "": None,
    "{broken": None,
    "\u00a0[]": None,  # no white space of JSON
    '"\\u0000"': None,  # JSON, but nothing that jsonb holds
    "1e999999": None,
    "[" * 100_000: None,
}


def test_value_json_lease_and_bytes_are_shown_where_keys_are_read(schema):
    mirror(schema, *((f"/{n:03}", n + 1, value) for n, value in enumerate(JSON_VALUES)))
    mirror(schema, ("/null", 900, "null"), ("/bytes", 901, b"\xff"))
    rows(schema, "UPDATE etcd SET lease = 77 WHERE key = '/000'")
    covers(schema, "", 1, 999)
    values = [*JSON_VALUES.values(), None, None]
    raw = [(value.encode(),) for value in JSON_VALUES] + [(b"null",), (b"\xff",)]
    for source in ["etcd_list('/')", "etcd_at(999, '/')", "etcd_kv"]:
        found = rows(schema, f"SELECT value_json, lease FROM {source} ORDER BY revision")
        assert found == [(values[0], 77), *((value, None) for value in values[1:])], source
        assert rows(schema, f"SELECT value_raw FROM {source} ORDER BY revision") == raw
    for key, lease in [("/000", 77), ("/null", None)]:
        for source in (f"etcd_get('{key}')", f"etcd_get_all('{key}')"):
            found = rows(schema, f"SELECT value_json::text = value, lease FROM {source}")
            assert found == [(True, lease)], source


def test_values_are_parsed_only_where_their_json_is_asked_for(schema):
    mirror(schema, ("/a", 1, "{}"))
    for columns, parsed in [("key, value, revision, lease", False), ("value_json", True)]:
        plan = rows(schema, f"EXPLAIN VERBOSE SELECT {columns} FROM etcd_kv WHERE key = '/a'")
        assert ("_etcd_json" in str(plan)) == parsed
    assert "_etcd_json" not in str(rows(schema, "EXPLAIN VERBOSE SELECT count(*) FROM etcd_kv"))
    covers(schema, "", 1, 1)
    for call in ["etcd_list()", "etcd_get('/a')", "etcd_at(1)", "etcd_get_all('/a')"]:
        plan = rows(schema, f"EXPLAIN VERBOSE SELECT key, value FROM {call}")
        assert "_etcd_json" not in str(plan), call
        assert scalar(schema, f"SELECT value_json FROM {call}") == {}


def test_list_and_at_agree_with_a_full_scan(schema):
    dice = random.Random(7)
    keys = [f"/{dice.choice('abc')}/{n:03}" for n in range(150)]
    history = {
        (dice.choice(keys[: 1 + n % 150]), n + 1): dice.choice(["x", "y", b"\xff", None])
        for n in range(2000)
    }
    history |= {("/a/deep", n + 1): "z" for n in range(500)}
    mirror(schema, *((key, revision, value) for (key, revision), value in history.items()))
    covers(schema, "", 1, 2000)
    columns = "key, value, value_bytes, revision"
    oracle = f"""
        SELECT {columns} FROM (
            SELECT DISTINCT ON (key) * FROM etcd WHERE revision <= %s AND starts_with(key, %s)
            ORDER BY key, revision DESC) e
        WHERE NOT tombstone ORDER BY key COLLATE "C"
    """
    for prefix, revision in itertools.product(
        ["", "/", "/a/", "/b/0", "/c/14", "/nil"], [1, 2, 700, 1999, 2000]
    ):
        expected = rows(schema, oracle, revision, prefix)
        assert rows(schema, f"SELECT {columns} FROM etcd_at(%s, %s)", revision, prefix) == expected
    for source, prefix in [("etcd_list('/a')", "/a"), ("etcd_kv ORDER BY key", "")]:
        expected = rows(schema, oracle, 2000, prefix)
        assert rows(schema, f"SELECT {columns} FROM {source}") == expected


def test_at_refuses_what_the_mirror_cannot_know(schema):
    covers(schema, "/a/", 10, 50, gaps='{"[30,40)"}')
    covers(schema, "/p/", 10, 90, pruned_revision=20)
    mirror(schema, ("/retired/a", 40, "v"))
    for revision, prefix, message in [
        (9, "/a/", "before the mirror"),
        (19, "/p/x", "pruned"),
        (30, "/a/", "was compacted"),
        (39, "/a/", "was compacted"),
        (51, "/a/", "beyond the checkpoint"),
        (51, "/a/x", "beyond the checkpoint"),
        (51, "", "beyond the checkpoint"),
        (45, "/retired/", "not mirrored"),
        (-1, "/a/", "before the mirror"),
    ]:
        error = refused("22023", schema, "SELECT * FROM etcd_at(%s, %s)", revision, prefix)
        assert message in error.message_primary
    known = 'Revisions 10 to 50 are known, but for those in {"[30,40)"}.'
    assert error.message_hint == known


def test_lists_have_a_limit_and_a_start(schema):
    long_history(schema, 20000, keys=5000)
    mirror(schema, ("no slash", 30000, "v"), ("/z", 30001, None))
    covers(schema, "", 1, 30001)
    keys = sorted(f"/k/{n}" for n in range(5000))
    assert rows(schema, "SELECT key FROM etcd_list('/k/', 3)") == [(k,) for k in keys[:3]]
    for source in ["etcd_list('/', 3, %s)", "etcd_at(20000, '', 3, %s)"]:
        found = rows(schema, f"SELECT key FROM {source}", keys[70])
        assert found == [(k,) for k in keys[71:74]], source
    assert rows(schema, "SELECT key FROM etcd_list('', 2, '/z')") == [("no slash",)]
    assert rows(schema, "SELECT key FROM etcd_list('/k/', 0)") == []
    assert rows(schema, "SELECT key FROM etcd_list('/k/', 9, '/')") == [(k,) for k in keys[:9]]
    refused("2201W", schema, "SELECT etcd_list('', -1)")
    with session(schema) as cur:
        for call in ["etcd_list('/k/', 50, '/k/3')", "etcd_at(9000, '/k/', 50, '/k/3')"]:
            assert tuples_read(cur, "etcd", f"SELECT * FROM {call}") < 400


def test_many_keys_are_looked_up_by_lateral_etcd_get_not_by_the_view(schema):
    long_history(schema, 20000, keys=5000)
    wanted = "FROM (VALUES ('/k/1'), ('/k/77'), ('/nil')) w (key) LEFT JOIN"
    view = f"SELECT w.key, k.value {wanted} etcd_kv k ON k.key = w.key"
    lateral = f"SELECT w.key, k.value {wanted} LATERAL etcd_get(w.key) k ON true"
    assert sorted(rows(schema, view)) == sorted(rows(schema, lateral))
    with session(schema) as cur:
        assert tuples_read(cur, "etcd", lateral) == 2
        assert tuples_read(cur, "etcd", view) >= 5000  # what the README warns of
        first = "SELECT key, value FROM etcd_kv WHERE key > '/k/3' ORDER BY key LIMIT 9"
        assert tuples_read(cur, "etcd", first) < 100  # ordered by the index
    for statement in (f"EXPLAIN {lateral}", f"EXPLAIN {first}"):
        assert "Sort (" not in str(rows(schema, statement))


def test_the_revision_of_a_time(schema):
    covers(schema, "/a/", 1, 99)
    for revision, age in [(10, "3 days"), (11, "3 days"), (20, "2 h"), (30, "2 s")]:
        mirrored = (
            "INSERT INTO etcd (ts, key, value, revision) VALUES (now() - %s::interval, %s, '', %s)"
        )
        rows(schema, mirrored, age, "/a/x", revision)
        rows(schema, mirrored, age, "/b/other", revision + 500)
    at = "SELECT etcd_revision_at(now() - %s::interval, '/a/')"
    for age, revision in [("0", 30), ("1 min", 20), ("1 day", 11)]:
        assert scalar(schema, at, age) == revision
    assert "mirrored by" in refused("22023", schema, at, "4 days").message_primary
    assert "future" in refused("22023", schema, at, "-1 min").message_primary
    refused("22023", schema, "SELECT etcd_revision_at(now(), '/elsewhere')")
    refused("22023", schema, "SELECT etcd_revision_at(NULL)")
    assert rows(
        schema, "SELECT revision FROM etcd_at(etcd_revision_at(now() - '1 h'::interval), '/a/')"
    ) == [(20,)]
    # copies are known from their own revision on; what was repaired is older than its time
    state = "UPDATE etcd_sync_state SET first_revision = 12, gaps = '{\"[15,25)\"}'"
    rows(schema, f"{state}; UPDATE etcd SET ts = now() WHERE key = '/a/x' AND revision = 10")
    for age, revision in [("0", 30), ("1 min", 25), ("1 day", 12)]:
        assert scalar(schema, at, age) == revision


def test_at_answers_up_to_the_edges_of_what_is_known(schema):
    covers(schema, "/a/", 10, 50, pruned_revision=20, gaps='{"[30,40)"}')
    mirror(schema, ("/a/1", 15, "v"))
    known = [(20, "/a/"), (29, "/a/1"), (40, "/a/"), (50, "/a/"), (50, ""), (50, "/a")]
    for revision, prefix in known:
        assert rows(schema, "SELECT key FROM etcd_at(%s, %s)", revision, prefix) == [("/a/1",)]
    for unknown in [(None, "/a/"), (20, None)]:
        refused("22004", schema, "SELECT * FROM etcd_at(%s, %s)", *unknown)
    covers(schema, "/b/", 42, 60)
    refused("22023", schema, "SELECT * FROM etcd_at(41, '/')")  # each mirror within must know
    assert rows(schema, "SELECT key FROM etcd_at(42, '/')") == [("/a/1",)]
    assert rows(schema, "SELECT key FROM etcd_at(41, '/a/x/')") == []  # /a/ covers it all


def test_reads_fetch_current_rows_not_the_history(schema):
    long_history(schema, 20000, keys=10)
    covers(schema, "", 1, 20000)
    with session(schema) as cur:
        assert tuples_read(cur, "etcd", "SELECT * FROM etcd_get('/k/3')") == 1
        assert tuples_read(cur, "etcd", "SELECT * FROM etcd_get_all('/k/3', 19000)") == 100
        for source in ["etcd_list()", "etcd_list('/k/')", "etcd_at(5000, '/k/')"]:
            assert tuples_read(cur, "etcd", f"SELECT * FROM {source}") <= 1000
        assert tuples_read(cur, "etcd", "SELECT etcd_set('/k/3', 'v')") == 1
        if version(schema) >= 16:  # before, DISTINCT reads the index entries of the key's history
            assert tuples_read(cur, "etcd", "SELECT * FROM etcd_kv WHERE key = '/k/3'") <= 2
    for condition in ["key = '/k/3'", "key IN ('/k/3', '/k/4')", "key >= '/k/3' AND key < '/k/4'"]:
        plan = str(rows(schema, f"EXPLAIN SELECT * FROM etcd_kv WHERE {condition}"))
        assert "Seq Scan" not in plan
        assert "Index Cond: (key = " in plan


def test_revisions_of_a_long_history_are_found_by_block_ranges(schema):
    long_history(schema, 100000, keys=1000)
    for many in (100, 3000):  # with larger ranges, PostgreSQL 18 would visit all keys
        query = f"SELECT * FROM etcd WHERE revision BETWEEN 50001 AND {50000 + many}"
        plan = scalar(schema, f"EXPLAIN (ANALYZE, BUFFERS, FORMAT json) {query}")[0]["Plan"]
        assert plan["Plans"][0]["Index Name"] == "etcd_revision_ts_idx", plan
        assert plan["Actual Rows"] == many
        assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 120, plan


# ─ writing ─


def test_changes_to_one_key_build_on_each_other(schema):
    mirror(schema, ("/a", 2, "w"), ("/a", 3, "x"), ("/gone", 4, "x"), ("/gone", 9, None))
    rows(schema, "SELECT etcd_set('/a', '1'), etcd_set('/b', ''), etcd_delete('/a')")
    rows(schema, "SELECT etcd_set('/a', '2'), etcd_set('/gone', '1'), etcd_delete('/nothing')")
    assert wal(schema, "id, key, value, revision, depends_on") == [
        (1, "/a", "1", 3, None),
        (2, "/b", "", None, None),
        (3, "/a", None, 3, 1),
        (4, "/a", "2", 3, 3),
        (5, "/gone", "1", None, None),
        (6, "/nothing", None, None, None),
    ]
    for change in (1, 3, 4):
        finish(schema, change, "success", 4)
    assert rows(schema, "SELECT etcd_set('/a', '3')") == [(7,)]
    assert wal(schema, "depends_on")[-1] == (None,)  # nothing pending any more


def test_set_with_a_revision_takes_only_the_current_version(schema):
    mirror(schema, ("/a", 3, "x"), ("/a", 8, "y"), ("/gone", 9, None))
    for call in [
        "etcd_set('/a', '1', 3)", "etcd_set('/a', '1', 9)", "etcd_set('/a', '1', 0)",
        "etcd_delete('/a', 3)", "etcd_set_bytes('/gone', '1', 9)", "etcd_set('/new', '1', 1)",
    ]:  # fmt: skip
        refused("40001", schema, f"SELECT {call}")
    rows(schema, "SELECT etcd_set('/a', '1', 8), etcd_set('/gone', '1', 0)")
    rows(schema, "SELECT etcd_set_bytes('/new', '1', 0)")
    assert wal(schema, "key, revision") == [("/a", 8), ("/gone", None), ("/new", None)]
    for call in ["etcd_set('/a', '2', 8)", "etcd_delete('/a', 8)"]:
        error = refused("40001", schema, f"SELECT {call}")
        assert "pending" in error.message_primary
        assert re.search(r"row \d of etcd_wal", error.message_detail)


BAD_ARGUMENTS = [
    ("etcd_set('/a', NULL)", "22004", "etcd_delete"),
    ("etcd_set('/a', NULL::jsonb)", "22004", "etcd_delete"),
    ("etcd_set_bytes('/a', NULL)", "22004", "etcd_delete"),
    ("etcd_set(NULL, 'x')", "22004", None),
    ("etcd_delete(NULL)", "22004", None),
    ("etcd_delete_prefix(NULL)", "22004", None),
    ("etcd_set('', 'x')", "22023", "empty key"),
    ("etcd_delete('')", "22023", "empty key"),
    ("etcd_set(repeat('é', 1301), 'x')", "22023", "cannot index"),
    ("etcd_set('/a', 'x', -1)", "22023", "must not exist"),
    ("etcd_set('/a', 'x', 0, force => true)", "22023", "Give a revision"),
    ("etcd_delete('/a', 3, true)", "22023", "Give a revision"),
    ("etcd_set('/a', 'x', ttl => '-1 s')", "22023", "lease"),
    ("etcd_set('/a', 'x', ttl => '300 years')", "22023", "lease"),
    ("etcd_set_many('[1]')", "22023", "etcd_set_many("),
    ("etcd_set_many(NULL)", "22023", "etcd_set_many("),
    ("etcd_set_many('{\"\": 1}')", "22023", "empty key"),
    ("etcd_delete_prefix('')", "22023", "DELETE FROM etcd_kv"),
    ("etcd_set('/a', 'x', ttl => '289 years')", "22023", "lease"),
    ("etcd_expect('/a', NULL)", "22004", "must not exist"),
    ("etcd_expect('/a', -1)", "22023", "must not exist"),
    ("etcd_retry(1)", "P0002", "etcd_refused"),
    ("etcd_dismiss(NULL)", "P0002", "etcd_refused"),
    ("etcd_cancel(1)", "P0002", None),
]


def test_writing_refuses_bad_arguments(schema):
    for call, sqlstate, hint in BAD_ARGUMENTS:
        error = refused(sqlstate, schema, f"SELECT {call}")
        assert hint is None or hint in error.message_hint
    refused("23514", schema, "SELECT etcd_keepalive('')")
    assert wal(schema) == []


def test_forced_changes_are_made_on_no_version(schema):
    mirror(schema, ("/a", 3, "x"), ("/b", 4, "x"))
    rows(schema, "SELECT etcd_set('/a', 'v')")
    rows(schema, "SELECT etcd_set('/a', 'v', force => true), etcd_delete('/b', force => true)")
    rows(schema, "SELECT etcd_set_bytes('/new', 'v', ttl => '0.5 s', force => true)")
    rows(schema, "SELECT etcd_set('/a', 'w', ttl => '0')")
    assert wal(schema, "key, revision, depends_on, force, ttl::text") == [
        ("/a", 3, None, False, None),
        ("/a", None, None, True, None),
        ("/b", None, None, True, None),
        ("/new", None, None, True, "00:00:00.5"),
        ("/a", 3, 2, False, "00:00:00"),  # what comes after it builds on it
    ]


def test_set_many_puts_and_deletes_the_keys_of_an_object(schema):
    mirror(schema, ("/n", 3, "x"), ("/o", 4, "x"))
    values = """{"/s": "te\\"xt", "/o": {"a": [1]}, "/n": null, "/b": true, "/B": 1.50}"""
    ids = rows(schema, "SELECT etcd_set_many(%s, ttl => '5 s')", values)
    assert ids == [(1,), (2,), (3,), (4,), (5,)]
    assert wal(schema, "key, value, revision, ttl IS NOT NULL") == [
        ("/B", "1.50", None, True),
        ("/b", "true", None, True),
        ("/n", None, 3, False),
        ("/o", '{"a": [1]}', 4, True),
        ("/s", 'te"xt', None, True),
    ]
    assert len(set(wal(schema, "txid::text"))) == 1
    assert rows(schema, "SELECT etcd_set_many('{}')") == []
    rows(schema, """SELECT etcd_set_many('{"/f": "", "/g": null}', force => true)""")
    assert wal(schema, "force, value")[5:] == [(True, ""), (True, None)]


def test_delete_prefix_leaves_nothing_live(schema):
    mirror(schema, ("/a/1", 3, "x"), ("/a/2", 4, "x"), ("/a/gone", 5, None), ("/ab", 6, "x"))
    mirror(schema, ("/a/%", 7, "x"), ("/a/own", 8, "x"))
    rows(schema, "SELECT etcd_set('/a/2', 'y'), etcd_set('/a/new', 'y'), etcd_delete('/a/own')")
    assert scalar(schema, "SELECT etcd_delete_prefix('/a/')") == 4
    assert wal(schema, "key, value, revision, depends_on")[3:] == [
        ("/a/%", None, 7, None),
        ("/a/1", None, 3, None),
        ("/a/2", None, 4, 1),  # after what was pending
        ("/a/new", None, None, 2),
    ]
    assert scalar(schema, "SELECT etcd_delete_prefix('/a/')") == 0
    assert scalar(schema, "SELECT etcd_delete_prefix('/a')") == 1  # /ab
    assert scalar(schema, "SELECT etcd_delete_prefix('/none')") == 0
    rows(schema, "DELETE FROM etcd_wal")
    assert scalar(schema, "SELECT etcd_delete_prefix('/a/', force => true)") == 4
    assert wal(schema, "revision, force") == [(None, True)] * 4


def test_sessions_with_keys_of_their_own_never_meet(schema):
    def write(number: int) -> None:
        dice, keys = random.Random(number), [f"/{number}/{n}ä" for n in range(90)]
        for turn in range(12):
            dice.shuffle(keys)  # the order does not matter
            if turn % 2:
                rows(schema, "SELECT etcd_set(k, 'v') FROM unnest(%s) k", keys)
            else:
                rows(schema, "SELECT etcd_set_many(%s)", json.dumps(dict.fromkeys(keys, turn)))

    in_threads(6, write)  # raises what any of them met
    assert scalar(schema, "SELECT count(*) FROM etcd_wal") == 6 * 12 * 90


def test_a_large_transaction_holds_up_nobody_and_fits_the_lock_table(schema):
    with session(schema, "BEGIN") as cur:
        cur.execute("SELECT count(etcd_set('/k/' || g, 'v')) FROM generate_series(1, 10000) g")
        cur.execute("SELECT count(*) < 50 FROM pg_locks WHERE pid = pg_backend_pid()")
        assert cur.fetchone() == (True,)
        others = "SELECT count(etcd_set('/o/' || g, 'v')) FROM generate_series(1, 1000) g"
        rows(schema, f"SET lock_timeout = '1s'; {others}; RESET lock_timeout")


def test_the_same_key_is_ordered_as_a_row_is(schema):
    begin = "BEGIN; SELECT etcd_set('/b', 'v'); SAVEPOINT s; SELECT etcd_set('/a', 'v')"
    with session(schema, begin) as first, ThreadPoolExecutor() as pool:
        second = pool.submit(scalar, schema, "SELECT etcd_set('/a', 'w')")
        wait_until("nobody waits", lambda: blocked(schema))
        first.execute("ROLLBACK TO s")  # gives back what was locked after the savepoint
        change = second.result(timeout=WAIT_S)
        second = pool.submit(scalar, schema, "SELECT etcd_set('/b', 'w')")
        wait_until("nobody waits", lambda: blocked(schema))
        first.execute("COMMIT")
        last = second.result(timeout=WAIT_S)
    assert wal(schema, "id, depends_on") == [(1, None), (change, None), (last, 1)]


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_snapshot_that_hides_a_newer_change_is_refused_at_once(schema, level):
    rows(schema, "SELECT etcd_set('/a', '1')")
    with session(schema, f"BEGIN ISOLATION LEVEL {level}; SELECT FROM etcd_wal") as cur:
        cur.execute("SELECT etcd_set('/a', '2')")  # sees the first
        cur.execute("COMMIT; BEGIN; SELECT FROM etcd_wal")
        cur.execute(f"ROLLBACK; BEGIN ISOLATION LEVEL {level}; SELECT FROM etcd_wal")
        rows(schema, "SELECT etcd_set('/a', '3'), etcd_set('/new', '3')")
        for key in ("/a", "/new"):
            cur.execute("SAVEPOINT s")
            with pytest.raises(psycopg2.errors.SerializationFailure):
                cur.execute("SELECT etcd_set(%s, '4')", (key,))
            cur.execute("ROLLBACK TO s")


def test_guards_hold_off_changes_but_not_each_other(schema):
    mirror(schema, ("/lock", 3, "x"))
    rows(schema, "SELECT etcd_expect('/lock', 3)")  # only the very first one holds up others
    rows(schema, "DELETE FROM etcd_wal")
    hold = "BEGIN; SELECT etcd_expect('/lock', 3), etcd_set('/a', 'v', force => true)"
    with session(schema, hold) as cur, ThreadPoolExecutor() as pool:
        rows(schema, "SELECT etcd_expect('/lock', 3), etcd_expect('/none', 0)")
        rows(schema, "SELECT etcd_expect('/lock', 4)")  # the mirror may not have it yet
        writer = pool.submit(scalar, schema, "SELECT etcd_set('/lock', 'y')")
        wait_until("it does not wait for the guard", lambda: blocked(schema))
        cur.execute("COMMIT")
        change = writer.result(timeout=WAIT_S)
    refused("40001", schema, "SELECT etcd_expect('/lock', 3)")  # has a pending change
    refused("40001", schema, "SELECT etcd_expect('/a', 3)")
    assert wal(schema, "action, key, revision, force, depends_on") == [
        ("expect", "/lock", 3, False, None),
        (None, "/a", None, True, None),
        ("expect", "/lock", 3, False, None),
        ("expect", "/none", 0, False, None),
        ("expect", "/lock", 4, False, None),
        (None, "/lock", 3, False, None),  # a guard is nothing to build on
    ]
    finish(schema, change, "success", 5)
    mirror(schema, ("/lock", 5, "y"))
    assert "5" in refused("40001", schema, "SELECT etcd_expect('/lock', 3)").message_detail


def test_any_scalar_is_put_as_its_text(schema):
    rows(schema, "CREATE TYPE pg_temp.color AS ENUM ('red')")
    values = {
        "5": "5", "5::smallint": "5", "1.50": "1.50", "1e3::float8": "1000", "true": "true",
        "'{\"a\": 1}'::json": '{"a": 1}', "'{\"a\":1}'::jsonb": '{"a": 1}',
        "'{\"a\":1}'": '{"a":1}', "'red'::pg_temp.color": "red",
        "'7f0c8f0e-0000-4000-8000-000000000000'::uuid": "7f0c8f0e-0000-4000-8000-000000000000",
        "date '2026-01-31'": "2026-01-31", "'x'::varchar": "x", "'y'::name": "y", "'日本'": "日本",
    }  # fmt: skip
    for value in values:
        rows(schema, f"SELECT etcd_set('/a', {value}, ttl => '1 h')")
    rows(schema, "SELECT etcd_set('/a', '\\xff00'::bytea)")
    assert wal(schema, "value") == [*((value,) for value in values.values()), (None,)]
    assert wal(schema, "value_bytes")[-1] == (b"\xff\0",)


def test_restore_queues_what_differs_and_nothing_else(schema):
    mirror(schema, ("same", 1, ""), ("/bytes", 2, b"\n\x03k8s\0"), ("/text", 3, "ä日😀"))
    mirror(schema, ("/gone", 4, "{}"), ("/gone", 8, None), ("/bytes", 9, "text"))
    mirror(schema, ("/text", 10, "new"), ("/later", 11, "x"), ("/leased", 5, "l"))
    rows(schema, "INSERT INTO etcd (key, revision, value, lease) VALUES ('/leased', 12, 'l', 7)")
    covers(schema, "", 1, 20)
    refused("22023", schema, "SELECT etcd_restore('', 21)")
    assert scalar(schema, "SELECT etcd_restore('/nothing/', 5)") == 0
    assert scalar(schema, "SELECT etcd_restore('', 5)") == 5
    assert wal(schema, "key, value, value_bytes, revision, ttl = '0'") == [
        ("/bytes", None, b"\n\x03k8s\0", 9, None),
        ("/gone", "{}", None, None, None),
        ("/later", None, None, 11, None),
        ("/leased", "l", None, 12, True),
        ("/text", "ä日😀", None, 10, None),
    ]
    refused("40001", schema, "SELECT etcd_restore('', 5)")
    rows(schema, "DELETE FROM etcd_wal; SELECT etcd_set('/pending', 'v')")
    refused("40001", schema, "SELECT etcd_restore('/pending', 5)")  # not skipped in silence


def test_own_success_is_not_mistaken_for_a_foreign_change(schema):
    mirror(schema, ("/a", 3, "x"))
    mirrored = "INSERT INTO etcd (key, value, revision) VALUES ('/a', 'y', %s)"
    settled = """
        UPDATE etcd_wal SET status = 'success', result_revision = %s, finished_at = now()
        WHERE id = %s
    """
    with session(schema) as daemon:
        for _ in range(3):
            change = scalar(schema, "SELECT etcd_set('/a', 'y')")
            daemon.execute("BEGIN")
            daemon.execute(mirrored, (change + 10,))
            daemon.execute(settled, (change + 10, change))
            follower = scalar(schema, "SELECT etcd_set('/a', 'z')")  # outcome not committed yet
            daemon.execute("COMMIT")
            depends_on = "DELETE FROM etcd_wal WHERE id = %s RETURNING depends_on"
            assert scalar(schema, depends_on, follower) == change
            assert scalar(schema, "SELECT etcd_set('/a', 'z', %s)", change + 10) > follower
            rows(schema, "DELETE FROM etcd_wal WHERE status = 'pending'")


def test_retry_queues_the_change_on_the_current_version(schema):
    mirror(schema, ("/a", 3, "x"))
    rows(schema, "SELECT etcd_set_bytes('/a', '\\xff', 3, ttl => '7 s')")
    mirror(schema, ("/a", 5, "theirs"))
    finish(schema, 1, "conflict", 5)
    assert scalar(schema, "SELECT etcd_retry(1)") == 2
    assert wal(schema, "key, value_bytes, revision, status, retry_of, ttl::text") == [
        ("/a", b"\xff", 3, "conflict", None, "00:00:07"),
        ("/a", b"\xff", 5, "pending", 1, "00:00:07"),
    ]
    assert "row 2" in refused("55000", schema, "SELECT etcd_retry(1)").message_detail
    refused("55000", schema, "SELECT etcd_retry(2)")  # pending
    finish(schema, 2, "failed")
    assert scalar(schema, "SELECT etcd_retry(2)") == 3
    finish(schema, 3, "success", 6)
    refused("55000", schema, "SELECT etcd_retry(3)")
    rows(schema, "SELECT etcd_delete('/a', force => true)")
    finish(schema, 4, "failed")
    rows(schema, "SELECT etcd_retry(4)")
    assert wal(schema, "value, revision, force")[4:] == [(None, None, True)]


def test_change_outside_every_prefix_earns_a_warning(schema, role):
    def notices(sql: str, **options: str) -> list[str]:
        with session(schema, sql, **options) as cur:
            return list(cur.connection.notices)

    assert notices("SELECT etcd_set('/lost', 'v')") == []  # nothing is mirrored yet
    covers(schema, "/a/", 1, 5)
    covers(schema, "/b/", 1, 5)
    assert notices("SELECT etcd_set('/a/1', 'v'), etcd_set('/a/2', 'v')") == []
    assert notices("SELECT etcd_delete('/b/1')") == []
    (two,) = notices("SELECT etcd_set('/b/2', 'v'), etcd_set('/a/3', 'v')")
    assert "WARNING:  this transaction changes keys of two mirrors" in two
    (notice,) = notices("SELECT etcd_set('/c', 'v')")
    assert 'WARNING:  key "/c" is outside every mirrored prefix' in notice
    assert "HINT:  Row 7 of etcd_wal stays pending" in notice
    rows(schema, f"GRANT SELECT ON etcd, etcd_wal TO {role}; GRANT INSERT ON etcd_wal TO {role}")
    assert notices("SELECT etcd_set('/d', 'v')", user=role) == []  # may not see the mirrors


def test_refused_changes_are_dismissed_once_and_may_be_tried_again(schema):
    rows(schema, "SELECT etcd_set('/' || n, 'v') FROM generate_series(1, 3) n")
    finish(schema, 1, "conflict")
    finish(schema, 2, "success")
    dismissed = "SELECT etcd_dismiss(1); SELECT dismissed_at FROM etcd_wal WHERE id = 1"
    assert scalar(schema, dismissed) == scalar(schema, dismissed)
    for change in (2, 3):
        refused("55000", schema, f"SELECT etcd_dismiss({change})")
    assert rows(schema, "SELECT etcd_retry(1)") == [(4,)]  # one may think again


def test_only_a_later_change_of_the_same_key_is_a_retry(schema):
    covers(schema, "", 1, 9)
    rows(schema, "INSERT INTO etcd_wal (key, retry_of) VALUES ('/a', 2), ('/a', NULL), ('/b', 2)")
    rows(schema, "INSERT INTO etcd_wal (key, retry_of) VALUES ('/c', 2), ('/a', 4)")
    finish(schema, 2, "conflict", 7)
    assert scalar(schema, "SELECT conflicts FROM etcd_status") == 1
    assert scalar(schema, "SELECT etcd_retry(2)") == 6
    assert scalar(schema, "SELECT conflicts FROM etcd_status") == 0
    assert "row 6" in refused("55000", schema, "SELECT etcd_retry(2)").message_detail


def test_a_change_is_tried_again_once_even_by_two_at_once(schema):
    rows(schema, "SELECT etcd_set('/a', 'v')")
    finish(schema, 1, "failed")
    with ThreadPoolExecutor(4) as pool:
        retries = [pool.submit(rows, schema, "SELECT etcd_retry(1)") for _ in range(4)]
    errors = [retry.exception() for retry in retries]
    assert sorted(getattr(error, "pgcode", "") for error in errors) == ["", *["55000"] * 3]
    assert scalar(schema, "SELECT count(*) FROM etcd_wal WHERE retry_of = 1") == 1


# ─ waiting ─


SLEEPING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"


def blocked(db: str) -> int | None:
    """The backend that sleeps on a lock: of a generation, or of a key."""
    waits = "wait_event_type = 'Lock' AND datname = current_database()"
    return scalar(db, f"SELECT pid FROM pg_stat_activity WHERE {waits}")


def test_waiting_sleeps_until_the_daemon_commits(db, daemon, etcd, prefix):
    daemon(*FAST)
    sleeping = """
        SELECT count(*) FROM pg_stat_activity
        WHERE wait_event = 'advisory' AND datname = current_database()
    """
    left = """
        SELECT count(*), current_setting('lock_timeout') FROM pg_locks
        WHERE pid = pg_backend_pid() AND locktype = 'advisory'
    """
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor())
        with frozen_mirror(db):
            newest = etcd.put(prefix + "a", "theirs")
            wait_until("the daemon does not wait", lambda: daemon_waits_on(db, "relation"))
            beaten = ask(db, prefix + "a", revision=77)
            waits = {
                f"etcd_wait({beaten}, '90 s')": "conflict",
                f"etcd_wait_revision({newest}, '90 s')": newest,
                f"etcd_wait_revision({newest}, '90 s', '{prefix}a')": newest,
            }
            begin = "SET lock_timeout = '99s'", "BEGIN"
            cursors = [stack.enter_context(session(db, *begin)) for _ in waits]
            waiters = [
                pool.submit(cur.execute, f"SELECT * FROM {call}")
                for cur, call in zip(cursors, waits)
            ]
            wait_until("they do not sleep", lambda: scalar(db, sleeping) == 3)
        for waiter, cur, result in zip(waiters, cursors, waits.values()):
            waiter.result(timeout=WAIT_S)
            assert cur.fetchone()[0] == result
            cur.execute(left)
            assert cur.fetchall() == [(0, "99s")]
    for call in waits:  # at once, so also where the snapshot never moves
        rows(db, f"BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT * FROM {call}; COMMIT")


def test_waiting_for_a_transaction_tells_its_worst_end(schema):
    covers(schema, "/a/", 1, 9)
    rows(schema, "SELECT etcd_set('/a/' || g, 'v') FROM generate_series(1, 3) g")
    txid = scalar(schema, "SELECT txid::text FROM etcd_wal WHERE id = 1")
    wait = "SELECT * FROM etcd_wait(txid => %s, timeout => '0.1 s')"
    for change, status, revision in [(1, "success", 7), (2, "success", 8)]:
        finish(schema, change, status, revision)
    assert "change 3" in refused("57014", schema, wait, txid).message_primary
    finish(schema, 3, "success")  # deleted nothing
    assert rows(schema, wait, txid) == [("success", 8, None)]
    rows(schema, "UPDATE etcd_wal SET status = 'conflict', error_message = 'theirs' WHERE id = 2")
    assert rows(schema, wait, txid) == [("conflict", 8, "theirs")]
    rows(schema, "UPDATE etcd_wal SET status = 'failed', error_message = 'no' WHERE id = 3")
    assert rows(schema, wait, txid) == [("failed", None, "no")]
    refused("P0002", schema, wait, str(int(txid) + 99))
    rows(schema, "INSERT INTO etcd_wal (key) SELECT g::text FROM generate_series(1, 2000) g")
    rows(schema, "ANALYZE etcd_wal")
    plan = str(rows(schema, f"EXPLAIN SELECT * FROM etcd_wal WHERE txid = '{txid}'"))
    assert "etcd_wal_txid_idx" in plan


def test_put_sets_commits_and_waits(db, daemon, etcd, prefix):
    daemon(*FAST)
    put = "CALL etcd_put(%s, 'v', %s, timeout => '60 s')"
    with session(db, "SET default_transaction_isolation = 'repeatable read'") as cur:
        cur.execute(put, (prefix + "a", 0))
        (revision,) = cur.fetchone()
        assert etcd.get(prefix + "a").mod_revision == revision
        assert scalar(db, "SELECT revision FROM etcd_get(%s)", prefix + "a") == revision
        with pytest.raises(psycopg2.errors.SerializationFailure):
            cur.execute(put, (prefix + "a", 0))
        with pytest.raises(psycopg2.errors.InvalidTransactionTermination):
            cur.execute(f"BEGIN; CALL etcd_put('{prefix}b', 'v')")
        cur.execute("ROLLBACK")


def test_waiting_says_why_it_cannot_or_not_longer(schema):
    rows(schema, "SELECT etcd_set('/a/1', 'v'), etcd_set('/elsewhere', 'v')")
    covers(schema, "/a/", 1, 9)
    covers(schema, "/b/", 1, 9)
    for call, sqlstate, message, hint in [
        ("etcd_wait(1, '0.2 s')", "57014", "waiting for change 1", "etcd_status"),
        ("etcd_wait(1, '0')", "57014", "waiting for change 1", "etcd_status"),
        ("etcd_wait(1, NULL)", "22004", "timeout", None),
        ("etcd_wait(NULL)", "P0002", "no row", "rolled back"),
        ("etcd_wait(9)", "P0002", "no row 9", "rolled back"),
        ("etcd_wait(2)", "55000", 'key "/elsewhere" of change 2', "mirrors it"),
        ("etcd_wait(etcd_set('/a/2', 'v'))", "25001", "change 3 is not committed", "COMMIT first"),
        ("etcd_wait_revision(10, '0.2 s', '/a/')", "57014", "which is at 9", "etcd_status"),
        ("etcd_wait_revision(1)", "22023", "2 prefixes", "p_prefix => '/"),
        ("etcd_wait_revision(1, p_prefix => '/')", "22023", "not mirrored", "etcd_sync_state"),
        ("etcd_wait_revision(NULL)", "22004", "revision", None),
    ]:
        error = refused(sqlstate, schema, f"SELECT {call}")
        assert message in error.message_primary, call
        assert hint is None or hint in error.message_hint
    for call in ("etcd_wait(1)", "etcd_wait_revision(10, p_prefix => '/a/')"):
        error = refused("25000", schema, f"BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT {call}")
        assert "READ COMMITTED" in error.message_hint


def ends(db: str, *statements: str, **names: str) -> list[tuple[Any, ...]]:
    """Run statements in one transaction, %(name)s stands for a key; how each row ended."""
    with session(db, "BEGIN") as cur:
        for statement in statements:
            cur.execute(statement, names)
        cur.execute("SELECT pg_current_xact_id()::text")
        (txid,) = cur.fetchone()
        cur.execute("COMMIT")
    scalar(db, "SELECT status FROM etcd_wait(txid => %s, timeout => '60 s')", txid)
    return rows(
        db, "SELECT status, result_revision FROM etcd_wal WHERE txid = %s ORDER BY id", txid
    )


def test_a_guard_decides_for_its_whole_transaction(db, daemon, etcd, prefix):
    lock, other, gone = (prefix + name for name in ("lock", "other", "gone"))
    fence = etcd.put(lock, "me")
    daemon(*FAST)
    names = {"lock": lock, "other": other, "gone": gone}
    put = "SELECT etcd_set(%(other)s, 'v', force => true)"
    holds = f"SELECT etcd_expect(%(lock)s, {fence}), etcd_expect(%(gone)s, 0)"
    ended = ends(db, holds, put, **names)
    assert {status for status, _ in ended} == {"success"}
    assert ended[2][1] == etcd.get(other).mod_revision
    assert etcd.get(lock).mod_revision == fence  # not changed
    taken = etcd.put(lock, "somebody else")
    rows(db, "SELECT etcd_wait_revision(%s, '60 s')", taken)
    late = f"INSERT INTO etcd_wal (key, revision, action) VALUES (%(lock)s, {fence}, 'expect')"
    assert {status for status, _ in ends(db, put, late, **names)} == {"conflict"}
    assert etcd.get(other).mod_revision == ended[2][1]
    with pytest.raises(psycopg2.errors.SerializationFailure):
        ends(db, holds, put, **names)  # the mirror knows already


def test_a_transaction_with_a_guard_must_be_within_one_mirror(db, daemon, etcd, prefix):
    daemon(*FAST)
    sql = "SELECT etcd_keepalive(%s); SELECT etcd_expect('elsewhere', 0); SELECT etcd_set(%s, 'v')"
    rows(db, sql, prefix + "d", prefix + "a")
    rows(db, "SELECT etcd_expect(%s, 0); SELECT etcd_set('elsewhere', 'v')", prefix + "b")
    rows(db, "SELECT etcd_set(%s, 'v'); SELECT etcd_set('elsewhere', 'v')", prefix + "c")
    for name, status in [("a", "failed"), ("b", "failed"), ("c", "success")]:
        assert ended(db, prefix + name).status == status
    assert ended(db, prefix + "d").error_message == "the key is not there"
    assert [kv.key.decode() for kv in etcd.range(prefix).kvs] == [prefix + "c"]


def test_a_keepalive_renews_without_a_revision(db, daemon, etcd, prefix):
    daemon(*FAST)
    leased, plain = prefix + "leased", prefix + "plain"
    put = "SELECT etcd_set(%(k)s, 'v', ttl => '9 s')"
    ((_, revision),) = ends(db, put, k=leased)
    etcd.put(plain, "v")
    deadline = time.monotonic() + 12
    while time.monotonic() < deadline:
        ended = ends(db, "SELECT etcd_keepalive(%(k)s)", k=leased)
        assert ended[0][0] == "success", rows(db, "TABLE etcd_refused")
        time.sleep(1)
    found = etcd.get(leased)
    assert (found.mod_revision, found.version) == (revision, 1)
    assert ends(db, "SELECT etcd_keepalive(%(k)s)", k=plain)[0][0] == "failed"
    wait_until("it does not expire", lambda: etcd.get(leased) is None, 60)


def test_a_prefix_comes_back_as_it_was(db, daemon, etcd, prefix):
    def content() -> list[tuple[bytes, bytes]]:
        return [(kv.key, kv.value) for kv in etcd.range(prefix).kvs]

    dice = random.Random(1)
    for number in range(40):
        revision = etcd.put(f"{prefix}{number}", World.value(dice))
    before = content()
    daemon(*FAST)
    for number in range(0, 40, 3):
        etcd.put(f"{prefix}{number}", "changed")
        etcd.delete(f"{prefix}{number + 1}")
        newest = etcd.put(f"{prefix}new{number}", "x")
    rows(db, "SELECT etcd_wait_revision(%s, '60 s')", newest)
    restored = ends(db, f"SELECT etcd_restore(%(p)s, {revision})", p=prefix)
    assert {status for status, _ in restored} == {"success"}
    assert content() == before
    previous = """
        SELECT count(*) FROM etcd_wal w
        CROSS JOIN LATERAL etcd_get_all(w.key, w.replaced_revision) h
        WHERE h.revision = w.replaced_revision AND h.value IN ('changed', 'x')
    """
    assert scalar(db, previous) == 28  # what each change replaced


def test_an_empty_etcd_is_filled_from_the_mirror(db, daemon, command, prefix, etcd, own_etcd):
    keys = {prefix + name: value for name, value in [("a", b"1"), ("ä", b""), ("b", b"\0\xff")]}
    for key, value in keys.items():
        revision = etcd.put(key, value)
    one = daemon()
    rows(db, "SELECT etcd_wait_revision(%s, '60 s')", revision)
    assert one.stop() == 0  # and then etcd is lost, and comes back empty
    rows(db, "CREATE TABLE saved AS SELECT key, value_raw FROM etcd_list()")
    there = etcd_dsn(own_etcd.endpoint, prefix)
    command("sync", "--reset", "--yes", etcd=there, exit_code=0)
    daemon(*FAST, etcd=there)
    assert {status for status, _ in ends(db, "SELECT etcd_set(key, value_raw, 0) FROM saved")} == {
        "success"
    }
    with EtcdClient(own_etcd.endpoint) as new:
        assert {kv.key.decode(): kv.value for kv in new.range(prefix).kvs} == keys


# ─ etcd_kv ─


def test_kv_refuses_a_key_with_a_pending_change(schema):
    mirror(schema, ("/a", 3, "x"))
    refused("23505", schema, "INSERT INTO etcd_kv (key, value) VALUES ('/a', 'y')")
    rows(schema, "UPDATE etcd_kv SET value = 'y' WHERE key = '/a'")
    rows(schema, "SELECT etcd_set('/new', 'y')")
    for statement in [
        "UPDATE etcd_kv SET value = 'z' WHERE key = '/a'",
        "DELETE FROM etcd_kv WHERE key = '/a'",
        "INSERT INTO etcd_kv (key, value) VALUES ('/a', 'y')",
        "INSERT INTO etcd_kv (key, value) VALUES ('/new', 'y')",
    ]:
        refused("40001", schema, statement)
    assert len(wal(schema)) == 2


def test_kv_builds_on_what_its_own_transaction_has_queued(schema):
    mirror(schema, ("/a", 3, "x"), ("/b", 4, "x"), ("/gone", 5, None))
    with session(schema, "BEGIN") as cur:
        for statement, count in [
            ("UPDATE etcd_kv SET value = 'z' WHERE key = '/none'", 0),
            ("INSERT INTO etcd_kv (key, value) VALUES ('/new', '1')", 1),
            ("UPDATE etcd_kv SET value = '2' WHERE key = '/new'", 1),
            ("UPDATE etcd_kv SET value = '2', revision = 0 WHERE value = '2' AND revision = 0", 1),
            ("DELETE FROM etcd_kv WHERE key = '/new'", 1),
            ("DELETE FROM etcd_kv WHERE key = '/new'", 0),
            ("INSERT INTO etcd_kv (key, value) VALUES ('/new', '3')", 1),
            ("UPDATE etcd_kv SET value = 'y' WHERE key = '/a'", 1),
            ("UPDATE etcd_kv SET value = 'z' WHERE key = '/a' AND revision = 3", 1),
            ("DELETE FROM etcd_kv WHERE key = '/b'", 1),
            ("UPDATE etcd_kv SET value = 'y' WHERE key = '/b'", 0),  # as of a row that is deleted
            ("INSERT INTO etcd_kv (key, value) VALUES ('/gone', '1')", 1),
            ("SELECT FROM etcd_kv", 2),  # what etcd has
        ]:
            cur.execute(statement)
            assert cur.rowcount == count, statement
        cur.execute("SAVEPOINT s")
        with pytest.raises(psycopg2.errors.UniqueViolation):
            cur.execute("INSERT INTO etcd_kv (key, value) VALUES ('/new', '4')")
        cur.execute("ROLLBACK TO s; COMMIT")
    assert wal(schema, "key, value, revision, depends_on") == [
        ("/new", "1", None, None),
        ("/new", "2", None, 1),
        ("/new", "2", None, 2),
        ("/new", None, None, 3),
        ("/new", "3", None, 4),
        ("/a", "y", 3, None),
        ("/a", "z", 3, 6),
        ("/b", None, 4, None),
        ("/gone", "1", None, None),
    ]
    assert set(wal(schema, "ttl, force")) == {(None, False)}  # a lease stays


def test_kv_skips_no_pending_creation_in_silence(schema):
    rows(schema, "SELECT etcd_set('/new', 'v'), etcd_set('/gone', 'v'), etcd_delete('/gone')")
    for condition in ("key = '/new'", "key LIKE '/n%'", "value = 'v'", "true"):
        refused("40001", schema, f"DELETE FROM etcd_kv WHERE {condition}")
        refused("40001", schema, f"UPDATE etcd_kv SET value = 'w' WHERE {condition}")
    for key in ("/gone", "/nil"):
        rows(schema, "WITH d AS (DELETE FROM etcd_kv WHERE key = %s RETURNING 1) TABLE d", key)
    assert rows(schema, "SELECT * FROM etcd_kv") == []
    plan = str(rows(schema, "EXPLAIN ANALYZE SELECT * FROM etcd_kv WHERE key = '/a'"))
    assert "One-Time Filter: (current_setting('etcd_fdw.writing'" in plan
    assert re.search(r"Function Scan on _etcd_creations[^)]*\) \(never executed\)", plan)


def test_kv_takes_whole_rows_as_mappers_write_them(schema):
    mirror(schema, ("/a", 3, '{"x": 1}'))
    columns = ("value", "value_bytes", "revision", "ts", "lease", "value_json", "create_revision")
    (row,) = rows(schema, f"SELECT {', '.join(columns)} FROM etcd_kv WHERE key = '/a'")
    update = f"UPDATE etcd_kv SET {', '.join(f'{c} = %s' for c in columns)} WHERE key = '/a'"
    read = [json.dumps(v) if isinstance(v, dict) else v for v in row]
    rows(schema, update, "new", *read[1:])
    assert wal(schema, "value, revision") == [("new", 3)]
    rows(schema, "DELETE FROM etcd_wal")
    mirror(schema, ("/a", 5, "theirs"))
    error = refused("40001", schema, update, "new", *read[1:])  # made of an older row
    assert "not at revision 3" in error.message_primary


@pytest.mark.parametrize(
    "statement", ["UPDATE etcd_kv SET value = 'mine' WHERE key = '/a'", "DELETE FROM etcd_kv"]
)
def test_kv_refuses_a_version_that_has_moved_on(schema, statement):
    mirror(schema, ("/a", 3, "x"))
    # holds the writer between its look and its change
    hold = "BEGIN; SELECT etcd_set('/a', 'x'); DELETE FROM etcd_wal"
    with session(schema, hold) as other, ThreadPoolExecutor() as pool:
        writer = pool.submit(refused, "40001", schema, statement)
        wait_until("the writer does not wait for the lock", lambda: blocked(schema))
        other.execute("INSERT INTO etcd (key, value, revision) VALUES ('/a', 'theirs', 5); COMMIT")
        assert writer.result().message_primary == 'key "/a" is not at revision 3'
    assert wal(schema) == []


def test_kv_update_of_the_key_moves_it_in_one_transaction(schema):
    mirror(schema, ("/a", 3, "x"), ("/taken", 4, "x"))
    rows(schema, "UPDATE etcd_kv SET key = '/b' WHERE key = '/a'")
    assert wal(schema) == [("/a", None, None, 3, None), ("/b", "x", None, None, None)]
    assert len(set(wal(schema, "txid::text"))) == 1
    rows(schema, "DELETE FROM etcd_wal")
    refused("23505", schema, "UPDATE etcd_kv SET key = '/taken' WHERE key = '/a'")


@pytest.mark.parametrize(
    ("old", "assignment", "value", "value_bytes"),
    [
        ("x", "value = 'y'", "y", None),
        ("x", "value = value", "x", None),  # a put all the same
        ("x", "value_bytes = '\\xff'", None, b"\xff"),
        ("x", "value = NULL, value_bytes = '\\xff'", None, b"\xff"),
        (b"\xff", "value = 'y'", "y", None),
        (b"\xff", "value_bytes = '\\xfe'", None, b"\xfe"),
        (b"\xff", "value = value", None, b"\xff"),
    ],
)
def test_kv_update_of_a_value_column_clears_the_other(schema, old, assignment, value, value_bytes):
    mirror(schema, ("/a", 3, old))
    update = f"UPDATE etcd_kv SET {assignment} RETURNING value, value_bytes, value_json"
    assert rows(schema, update) == [(value, value_bytes, None)]
    assert wal(schema) == [("/a", value, value_bytes, 3, None)]


def test_kv_refuses_what_etcd_could_not_do(schema):
    mirror(schema, ("/a", 3, "x"))
    for statement, sqlstate in [
        ("INSERT INTO etcd_kv (key) VALUES ('/n')", "22004"),
        ("INSERT INTO etcd_kv (value) VALUES ('x')", "22004"),
        ("INSERT INTO etcd_kv (key, value) VALUES ('', 'x')", "22023"),
        ("INSERT INTO etcd_kv (key, value, value_bytes) VALUES ('/n', 'x', 'x')", "22023"),
        ("INSERT INTO etcd_kv (key, value, revision) VALUES ('/n', 'x', 1)", "428C9"),
        ("INSERT INTO etcd_kv (key, value, ts) VALUES ('/n', 'x', now())", "428C9"),
        ("INSERT INTO etcd_kv (key, value_json) VALUES ('/n', '{}')", "428C9"),
        ("UPDATE etcd_kv SET value = NULL", "22004"),
        ("UPDATE etcd_kv SET value = 'y', value_bytes = 'y'", "22023"),
        ("UPDATE etcd_kv SET key = NULL", "22004"),
        ("UPDATE etcd_kv SET revision = 9", "40001"),
        ("UPDATE etcd_kv SET create_revision = 9", "428C9"),
        ("UPDATE etcd_kv SET value_raw = '9'", "428C9"),
        ("UPDATE etcd_kv SET value = 'y', ts = now()", "428C9"),
        ("UPDATE etcd_kv SET lease = 7", "428C9"),
        ("UPDATE etcd_kv SET value_json = '{}'", "428C9"),
    ]:
        error = refused(sqlstate, schema, statement)
        assert error.message_hint or " key " in f" {error.message_primary} "
        assert wal(schema) == []


def test_files_are_copied_into_kv_which_refuses_an_empty_field(schema):
    def copy(table: str, text: str) -> None:
        with session(schema) as cur:
            cur.copy_expert(f"COPY {table} FROM STDIN (FORMAT csv)", io.StringIO(text))

    copy("etcd_kv (key, value)", '/a,1\n/b,""\nno slash,"{""x"": ""ä😀""}"\n')
    assert wal(schema, "key, value") == [("/a", "1"), ("/b", ""), ("no slash", '{"x": "ä😀"}')]
    with pytest.raises(psycopg2.errors.NullValueNotAllowed):
        copy("etcd_kv (key, value)", "/c,\n")
    copy("etcd_wal (key, value)", "/c,\n")  # is a delete, as the README warns
    assert wal(schema, "key, value")[3:] == [("/c", None)]


# ─ etcd_status ─


def test_status_and_refused_show_what_nobody_has_dealt_with(schema):
    state = {"etcd_revision": 9, "heartbeat_at": "now", "unstorable": 2, "last_error": "no etcd"}
    covers(schema, "/a/", 1, 5, **state)
    covers(schema, "/b/", 1, 6)
    rows(schema, "SELECT etcd_set('/a/' || g, 'v') FROM generate_series(1, 6) g")
    for change, status in enumerate(["success", "conflict", "failed", "conflict", "failed"], 1):
        finish(schema, change, status)
    rows(schema, "SELECT etcd_retry(4)")  # resolved: what counts is the new one, pending
    rows(schema, "SELECT etcd_dismiss(5)")
    query = "SELECT id, key, status FROM etcd_refused ORDER BY id"
    assert rows(schema, query) == [(2, "/a/2", "conflict"), (3, "/a/3", "failed")]
    columns = (
        "prefix, revision, etcd_revision, pending, conflicts, failures, unstorable, last_error"
    )
    assert rows(schema, f"SELECT {columns} FROM etcd_status ORDER BY prefix") == [
        ("/a/", 5, 9, 2, 1, 1, 2, "no etcd"),
        ("/b/", 6, None, 0, 0, 0, 0, None),
    ]
    ages = "heartbeat_age >= '0' AND oldest_pending_age >= '0'"
    assert scalar(schema, f"SELECT {ages} FROM etcd_status WHERE prefix = '/a/'") is True


def test_what_nobody_mirrors_can_be_taken_back(schema, role):
    covers(schema, "/a/", 1, 5)
    rows(schema, "SELECT etcd_set('/a/1', 'v'), etcd_set('typo', 'v'), etcd_set('typo2', 'v')")
    finish(schema, 3, "failed")
    grant_example(schema, app=role)
    app = make_dsn(schema, user=role)
    error = refused("42501", app, "SELECT etcd_cancel(2)")
    assert error.message_hint == f"GRANT DELETE ON etcd_wal TO {role}"
    error = refused("42501", app, "SELECT etcd_dismiss(3)")
    assert error.message_hint == f"GRANT UPDATE (dismissed_at) ON etcd_wal TO {role}"
    rows(schema, error.message_hint + f"; GRANT DELETE ON etcd_wal TO {role}")
    assert "on its way" in refused("55000", app, "SELECT etcd_cancel(1)").message_primary
    assert "is failed" in refused("55000", app, "SELECT etcd_cancel(3)").message_primary
    refused("P0002", app, "SELECT etcd_cancel(9)")
    rows(app, "SELECT etcd_cancel(2), etcd_dismiss(3)")
    assert wal(schema, "id") == [(1,), (3,)]


# ─ privileges ─


def test_example_grants_let_an_application_write_changes_only(schema, role):
    mirror(schema, ("/app/a", 3, "x"), ("/app/b", 3, "x"))
    covers(schema, "", 1, 5)
    grant_example(schema, app=role)
    app = make_dsn(schema, user=role)
    for query in [
        "SELECT etcd_set('/app/e', 'y', ttl => '9 s', force => true), etcd_keepalive('/app/a')",
        "SELECT etcd_delete_prefix('/app/a'), etcd_expect('/app/f', 0), etcd_wait_revision(5)",
        "SELECT FROM etcd_status, etcd_at(3), etcd_list(), etcd_get_all('/app/a')",
        "UPDATE etcd_kv SET value = 'y' WHERE key = '/app/b' AND revision = 3",
    ]:
        rows(app, query)
    for statement in [
        "INSERT INTO etcd (key, revision, value) VALUES ('/x', 1, 'x')",
        "DELETE FROM etcd",
        "UPDATE etcd_wal SET status = 'success', finished_at = now()",
        "DELETE FROM etcd_wal",
        "INSERT INTO etcd_wal (key, role_name) VALUES ('/x', 'somebody else')",
        "INSERT INTO etcd_wal (key, txid) VALUES ('/x', '1')",
        "UPDATE etcd_sync_state SET revision = 1",
        "SELECT * FROM etcd_sync_event",
    ]:
        refused("42501", app, statement)
    assert {name for (name,) in wal(schema, "role_name")} == {role}
    finish(schema, 1, "success", 9)
    assert scalar(app, "SELECT status FROM etcd_wait(1)") == "success"
    rows(schema, f"REVOKE INSERT (force) ON etcd_wal FROM {role}")
    rows(app, "SELECT etcd_set('/app/g', 'y', ttl => '9 s')")
    refused("42501", app, "SELECT etcd_set('/app/g', 'y', force => true)")
    rows(schema, f"REVOKE INSERT (ttl) ON etcd_wal FROM {role}")  # what was granted before 2.1
    rows(app, "SELECT etcd_set('/app/g', 'y')")
    refused("42501", app, "SELECT etcd_set('/app/g', 'y', ttl => '9 s')")


@pytest.mark.usefixtures("altered")
def test_row_level_security_holds_through_functions_and_views(schema, role):
    mirror(schema, ("/app/a", 3, "x"), ("/other", 4, "secret"))
    covers(schema, "", 1, 5)
    rows(schema, "SELECT etcd_set('/other', 'secret')")
    grant_example(schema, r"GRANT|CREATE POLICY|ALTER TABLE \w+ ENABLE", app=role)
    app = make_dsn(schema, user=role)
    for name in ("etcd_get('%s')", "etcd_get_all('%s')", "etcd_list('%s')", "etcd_at(5, '%s')"):
        assert rows(app, "SELECT key FROM " + name.replace("%s", "/app/a")) == [("/app/a",)]
        assert rows(app, "SELECT key FROM " + name.replace("%s", "/other")) == []
    for source in ["etcd_list()", "etcd_at(5)", "etcd_kv"][: 3 if version(schema) >= 15 else 2]:
        assert rows(app, f"SELECT key FROM {source}") == [("/app/a",)], source
    rows(app, "SELECT etcd_set('/app/a', 'y')")
    for statement in [
        "SELECT etcd_set('/other', 'y')",
        "SELECT etcd_delete('/other')",
        "INSERT INTO etcd_kv (key, value) VALUES ('/elsewhere', 'y')",
    ]:
        refused("42501", app, statement)
    for call in ("etcd_retry(1)", "etcd_wait(1)"):
        refused("P0002", app, f"SELECT {call}")
    assert rows(app, "SELECT key FROM etcd_wal") == [("/app/a",)]


@pytest.mark.usefixtures("altered")
def test_an_application_cannot_lock_the_mirror_by_its_view(schema, role):
    grant_example(schema, app=role)
    app = make_dsn(schema, user=role)
    if version(schema) < 15:  # as the file says beside the grants
        rows(schema, f"REVOKE INSERT, UPDATE, DELETE ON etcd_kv FROM {role}")
    for relation in ("etcd_kv", "etcd_status", "etcd"):
        refused("42501", app, f"BEGIN; LOCK TABLE {relation} IN ACCESS EXCLUSIVE MODE")
    rows(app, "SELECT etcd_set('/a', 'v')")


def test_views_that_bypass_row_level_security_are_mended(db, daemon, command, schema_user):
    rows(db, SCHEMA_SQL)
    if version(db) < 15:
        pytest.skip("before PostgreSQL 15 a view has its owner's rights")
    rows(db, "ALTER VIEW etcd_kv RESET (security_invoker)")  # as in a dump of 14
    rows(db, "ALTER VIEW etcd_refused SET (security_invoker = false)")
    here = scalar(db, "SELECT current_database()")
    grant_example(db, app=schema_user, etcd_fdw=schema_user, mydb=here)
    other = make_dsn(db, user=schema_user)  # who does not own them
    checked = command(*VALIDATE, postgres=other, exit_code=3).stdout
    refused_ = command("start", postgres=other, exit_code=3).stderr
    for name in ("etcd_kv", "etcd_refused"):
        mends = f"ALTER VIEW {name} SET (security_invoker = true)"
        assert mends in checked and mends in str(status_of(command)["problems"])
    assert "its owner mends it" in refused_
    daemon()
    assert rows(db, etcd_fdw.OPEN_VIEWS_SQL.replace("%%", "%")) == []


def test_rows_of_keys_that_nobody_holds_are_deleted(schema):
    many = "INSERT INTO etcd_lock SELECT g, pg_current_xact_id() FROM generate_series(1, 300000) g"
    rows(schema, many)
    prune = etcd_fdw.PRUNE_LOCK_SQL % {"limit": 200000}
    with session(schema, "BEGIN; UPDATE etcd_lock SET txid = pg_current_xact_id() WHERE hash = 1"):
        assert rows(schema, prune) == [(200000, True)]
        assert rows(schema, prune) == [(99999, False)]
    assert scalar(schema, "SELECT count(*) FROM etcd_lock") == 1


# ─ applications ─


def test_sqlalchemy_maps_the_view_with_a_version(schema):
    sqlalchemy = pytest.importorskip("sqlalchemy")
    orm = pytest.importorskip("sqlalchemy.orm")
    mirror(schema, ("/a", 3, "x"), ("/b", 4, '{"y": 1}'))

    base: Any = orm.declarative_base()

    class Setting(base):
        __tablename__ = "etcd_kv"
        key = sqlalchemy.Column(sqlalchemy.Text, primary_key=True)
        value = sqlalchemy.Column(sqlalchemy.Text)
        revision = sqlalchemy.Column(
            sqlalchemy.BigInteger, server_default=sqlalchemy.FetchedValue()
        )
        __mapper_args__: ClassVar[dict[str, Any]] = {
            "version_id_col": revision,
            "version_id_generator": False,
            "eager_defaults": True,
        }

    engine = sqlalchemy.create_engine(
        "postgresql+psycopg2://", creator=lambda: psycopg2.connect(schema)
    )
    with orm.Session(engine) as work:
        new, old = Setting(key="/new", value="1"), work.get(Setting, "/a")
        work.add(new)
        old.value = "y"
        work.flush()
        new.value, old.value = "2", "z"  # flushed again in the same transaction
        work.flush()
        work.delete(work.get(Setting, "/b"))
        work.commit()
    changes = [("/a", "y", 3), ("/a", "z", 3), ("/b", "", 4), ("/new", "1", 0), ("/new", "2", 0)]
    assert sorted(wal(schema, "key, coalesce(value, ''), coalesce(revision, 0)")) == changes
    rows(schema, "DELETE FROM etcd_wal")
    with orm.Session(engine) as work:
        stale = work.get(Setting, "/a")
        mirror(schema, ("/a", 9, "theirs"))
        stale.value = "mine"
        with pytest.raises(orm.exc.StaleDataError):
            work.flush()
    engine.dispose()


def test_django_saves_whole_rows(schema):
    django = pytest.importorskip("django")
    if version(schema) < 14:
        pytest.skip("Django wants PostgreSQL 14 or later")
    from django.conf import settings

    connection = {k.upper(): v for k, v in psycopg2.extensions.parse_dsn(schema).items()}
    connection.update(ENGINE="django.db.backends.postgresql", NAME=connection.pop("DBNAME"))
    settings.configure(DATABASES={"default": connection}, USE_TZ=True)
    django.setup()
    from django.db import connections, models, transaction
    from django.db.utils import OperationalError

    class Setting(models.Model):
        key = models.TextField(primary_key=True)
        value = models.TextField(null=True)
        value_bytes = models.BinaryField(null=True)
        revision = models.BigIntegerField(null=True)
        ts = models.DateTimeField(null=True)
        value_json = models.JSONField(null=True)

        class Meta:
            app_label, managed, db_table = "tests", False, "etcd_kv"

    mirror(schema, ("/a", 3, '{"x": [1, "ä"]}'), ("/b", 4, "x"))
    with transaction.atomic():
        one = Setting.objects.get(key="/a")
        one.value = "y"
        one.save()
        one.value = "z"
        one.save()
        Setting.objects.create(key="/new", value="1")
        Setting.objects.filter(key="/b").delete()
        Setting.objects.filter(key="/new").update(value="2")
    assert wal(schema, "key, value, revision") == [
        ("/a", "y", 3), ("/a", "z", 3), ("/new", "1", None), ("/b", None, 4), ("/new", "2", None),
    ]  # fmt: skip
    rows(schema, "DELETE FROM etcd_wal")
    stale = Setting.objects.get(key="/a")
    mirror(schema, ("/a", 9, "theirs"))
    with pytest.raises(OperationalError) as caught:
        stale.save()
    cause = caught.value.__cause__
    assert (getattr(cause, "sqlstate", None) or cause.pgcode) == "40001"  # psycopg 3 or 2
    connections.close_all()


def test_asyncpg_calls_with_untyped_parameters(schema):
    asyncpg = pytest.importorskip("asyncpg")
    mirror(schema, ("/a", 3, "x"))
    covers(schema, "/", 1, 9)
    host = psycopg2.extensions.parse_dsn(schema)

    async def run() -> None:
        conn = await asyncpg.connect(database=host.pop("dbname"), **host)
        change = await conn.fetchval(
            "SELECT etcd_set($1, $2, ttl => $3)", "/a", "y", timedelta(hours=1)
        )
        rows(schema, "UPDATE etcd_wal SET status = 'success', finished_at = now()")
        assert (await conn.fetchrow("SELECT * FROM etcd_wait($1)", change))["status"] == "success"
        assert await conn.fetchval("SELECT etcd_set($1, $2::int)", "/b", 5)
        assert await conn.fetchval("SELECT etcd_expect($1, $2)", "/a", 3)
        await conn.close()

    asyncio.run(run())


# ── random histories ─────────────────────────────────────────────────────────

# ETCD_FDW_TEST_HISTORIES=500 runs that many, other ones each time; the default runs the same few.
HISTORIES = int(os.environ.get("ETCD_FDW_TEST_HISTORIES", "0"))

_key = st.sampled_from([World.key(number) for number in (1, 2, 20)])
_value = st.integers(0, 2) | st.none()  # some of them equal; None: one that nobody else writes
_made_on = st.sampled_from(
    ["null"] * 4 + ["mirror"] * 2 + ["held", "old", "store", "future", "zero"]
)
MADE_ON = {
    "null": "NULL",
    "zero": "0",
    "held": "%(held)s",
    "mirror": "SELECT revision FROM etcd_get(%(key)s)",
    "old": "SELECT min(revision) FROM etcd_get_all(%(key)s)",
    "store": "%(store)s",
    "future": "%(store)s + 1000",
}
STATEMENTS = [
    "SELECT etcd_set(%(key)s, %(value)s, ({made_on}))",
    "SELECT etcd_set_bytes(%(key)s, %(bytes)s, ({made_on}))",
    "SELECT etcd_delete(%(key)s, ({made_on}))",
    "INSERT INTO etcd_wal (key, revision) VALUES (%(key)s, ({made_on}))",
    "INSERT INTO etcd_wal (key, value, revision, ttl, force)"
    " VALUES (%(key)s, %(value)s, ({made_on}), '1 s', {force})",
    "INSERT INTO etcd_wal (key, value, revision, force)"
    " VALUES (%(key)s, %(value)s, ({made_on}), {force})",
    "INSERT INTO etcd_wal (key, revision, force) VALUES (%(key)s, ({made_on}), true)",
    "INSERT INTO etcd_kv (key, value) VALUES (%(key)s, %(value)s)",
    "UPDATE etcd_kv SET value = %(value)s WHERE key = %(key)s",
    "DELETE FROM etcd_kv WHERE key = %(key)s",
    "SELECT etcd_delete_prefix(%(prefix)s)",
    "SELECT etcd_expect(%(key)s, coalesce(({made_on}), 0))",
    "SELECT etcd_keepalive(%(key)s)",
    "SELECT etcd_restore(%(prefix)s, coalesce(({made_on}), revision)) FROM etcd_sync_state",
    """
        SELECT etcd_retry(min(id)) FROM etcd_wal w
        WHERE status = 'conflict' AND starts_with(key, %(prefix)s) AND action IS NULL
          AND NOT EXISTS (SELECT FROM etcd_wal r WHERE r.retry_of = w.id)
        HAVING min(id) IS NOT NULL
    """,
]
_statement = st.tuples(st.sampled_from(STATEMENTS), _key, _value, _made_on, st.booleans())
_end = st.sampled_from(["commit"] * 5 + ["rollback"])
_history = st.lists(
    st.one_of(
        st.tuples(st.just("put_and_delete"), _key),
        st.tuples(st.just("lend"), _key, st.booleans()),
        st.tuples(st.just("txn"), st.dictionaries(_key, st.booleans(), min_size=1)),
        st.tuples(st.just("txn"), st.dictionaries(_key, st.booleans(), min_size=1, max_size=1)),
        st.tuples(st.just("sql"), _end, st.lists(_statement, min_size=1, max_size=1)),
        st.tuples(st.just("sql"), _end, st.lists(_statement, min_size=1, max_size=7)),
        *[st.tuples(st.just(step)) for step in ("remove_all", "hold", "kill", "stop", "start")],
        *[st.tuples(st.just(step)) for step in ("lose_etcd", "lose_postgres", "drain")],
        st.tuples(st.just("compact"), st.integers(0, 3)),
    ),
    min_size=12,
    max_size=60,
)


def end_sessions(db: str) -> bool:
    """End the daemons' sessions; return whether there were any."""
    sql = """
        SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE datname = current_database() AND application_name LIKE 'etcd_fdw%'
    """
    return bool(rows(db, sql))


class History:
    """Two stores, a daemon between them, and a recorder; the methods are what may happen.

    Values made in SQL begin with sql, others do not: who wrote what is known.
    """

    def __init__(
        self,
        db: str,
        client: EtcdClient,
        proxy: Proxy,  # through which the daemon reaches etcd
        prefix: str,
        start: Callable[[], Daemon],
        max_ops: int,
    ) -> None:
        self.db, self.client, self.prefix = db, client, prefix
        self.lose_etcd, self.lose_postgres = proxy.cut, partial(end_sessions, db)
        self.start_daemon, self.max_ops = start, max_ops
        self.daemon: Daemon | None = None
        self.holder: ExitStack | None = None
        self.numbers, self.dice = itertools.count(10), random.Random(prefix)
        self.compacted = False
        self.recorder = Recorder(client, prefix)

    def close(self) -> None:
        self.recorder.close()
        self.release()
        if self.daemon:
            self.daemon.kill()

    # others write to etcd

    def fresh(self) -> bytes:
        return World.value(self.dice, f"f{next(self.numbers)} ", largest=1_500_000)

    def remove_all(self) -> None:
        self.client.delete(self.prefix, prefix=True)

    def lend(self, key: str, revoke: bool) -> None:
        """Put with a lease, which ends at once or some seconds later."""
        lease = self.client.grant(1, World.lease(self.dice))
        self.client.put(self.prefix + key, self.fresh(), lease)
        if revoke:
            self.client.revoke(lease)

    def txn(self, changes: dict[str, bool]) -> None:
        """Put or delete several keys at one revision."""
        self.client.txn(
            [
                self.client.put_op(self.prefix + key, self.fresh())
                if put
                else self.client.delete_op(self.prefix + key)
                for key, put in changes.items()
            ]
        )

    def put_and_delete(self, key: str) -> None:
        """Put and delete one key at one revision; etcd takes it in this order only, and nested."""
        put = self.client.put_op(self.prefix + key, self.fresh())
        delete = self.client.delete_op(self.prefix + key)
        self.client.txn([self.client.txn_op([operation]) for operation in (put, delete)])

    def compact(self, back: int) -> None:
        self.compacted = True
        with suppress(grpc.RpcError):  # compacted already
            self.client.compact(self.recorder.sync() - back)

    # applications write in SQL

    def sql(self, end: str, statements: list[tuple[str, str, int | None, str, bool]]) -> None:
        """Run a transaction. What the schema refuses, it does without."""
        with session(self.db, "BEGIN") as cur:
            for sql, name, number, made_on, force in statements:
                key = self.prefix + name
                kv = self.client.get(key)
                given = {
                    "prefix": self.prefix,
                    "key": key,
                    "value": World.text(self.dice, f"sql{next(self.numbers)} ")
                    if number is None
                    else f"sql{number}",
                    "bytes": World.value(self.dice, f"sql{next(self.numbers)} ", 1_500_000),
                    "held": kv and kv.mod_revision,
                    "store": self.client.revision(),
                }
                cur.execute("SAVEPOINT here")
                try:
                    cur.execute(sql.format(made_on=MADE_ON[made_on], force=force), given)
                except psycopg2.Error as exc:
                    if exc.pgcode not in ("40001", "23505", "22023"):
                        raise
                    cur.execute("ROLLBACK TO here")
            cur.execute(end)

    # the daemon's life

    def start(self) -> None:
        self.release()
        if not self.daemon:
            self.daemon = self.start_daemon()

    def stop(self) -> None:
        self.release()
        if self.daemon:
            assert self.daemon.stop() == 0
            self.daemon = None

    def kill(self) -> None:
        """Kill it; if it is held, when etcd has something of which PostgreSQL does not know."""
        if not self.daemon:
            return
        if self.holder:
            seen = self.recorder.revision
            with suppress(TimeoutError):
                wait_until("nothing was sent", lambda: self.recorder.revision > seen, timeout=0.3)
        self.daemon.kill()
        self.daemon = None
        self.release()

    def hold(self) -> None:
        """Let the daemon send, but not write table etcd until release()."""
        if self.daemon and not self.holder:
            self.holder = ExitStack()
            self.holder.enter_context(frozen_mirror(self.db))

    def release(self) -> None:
        if self.holder:
            self.holder.close()
            self.holder = None

    def drain(self) -> None:
        """Wait until nothing is pending."""
        if self.daemon and not self.holder:
            statuses(self.db)

    def finish(self) -> None:
        """At rest both sides hold the same, with the past that each can know; outcomes are true."""
        self.start()
        self.drain()
        wait_until("a lease did not expire", lambda: not leases(self.client))
        assert_same(self.recorder, self.db, self.prefix, gaps=True)
        wait_equal(self.db, self.client, self.prefix)
        assert_past(self.db, self.client, self.prefix)
        statuses = assert_outcomes(
            self.recorder, self.db, whole=self.max_ops, compacted=self.compacted
        )
        assert set(statuses) <= {"success", "conflict", "guarded"}, statuses


@pytest.mark.parametrize("written", [0, 54])
def test_rest_of_a_long_transaction_is_not_taken_for_a_whole_one(daemon, db, prefix, etcd, written):
    """One of its changes is beaten: the others are applied, whatever was written before a crash."""
    keys = [f"{prefix}{number:02}" for number in range(60)]
    daemon().stop()
    rows(db, "INSERT INTO etcd_wal (key, value) SELECT key, 'x' FROM unnest(%s) key", keys)
    etcd.put(keys[-1], "theirs")
    last = "BEGIN; SELECT FROM etcd_wal WHERE id = 59 FOR UPDATE"
    with session(db, last) if written else frozen_mirror(db):
        first = daemon("--max-txn-ops=7", "--batch-size=4")
        wait_until("nothing was sent", lambda: etcd.get(keys[0]))
        finished = "SELECT count(*) FROM etcd_wal WHERE finished_at IS NOT NULL"
        wait_until("not the most of it is done", lambda: scalar(db, finished) >= written)
        first.kill()
    assert written or etcd.get(keys[-2]) is None
    daemon()
    assert statuses(db) == ["success"] * 59 + ["conflict"]
    split = "SELECT cardinality(split) FROM etcd_sync_state"
    wait_until("it is not known to be done", lambda: scalar(db, split) == 0)


@pytest.mark.timeout(86400 if HISTORIES else 300)
def test_random_histories(daemon, db, own_client, network):
    @hypothesis.settings(
        max_examples=HISTORIES or 12,
        derandomize=not HISTORIES,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],  # what depends on time cannot be made smaller
        suppress_health_check=list(hypothesis.HealthCheck),
        report_multiple_bugs=False,
    )
    @given(
        _history,
        st.sampled_from(["/h{}/", "h{}/", "h{}."]),
        st.sampled_from([7, 100]),
        st.sampled_from([3, 5000]),
    )
    def play(steps, prefix, max_ops, batch):
        prefix = prefix.format(next(_numbers))
        options = f"--max-txn-ops={max_ops}", f"--batch-size={batch}", "--retry-max=200ms"
        start = partial(daemon, *options, etcd=etcd_dsn(network.endpoint, prefix))
        # as the README says: 96 changes of 100 operations
        history = History(db, own_client, network, prefix, start, max_ops - 4)
        try:
            history.start()
            for name, *args in steps:
                getattr(history, name)(*args)
            history.finish()
        except BaseException:
            print(f"── {prefix}: steps {steps}\n── recorded {history.recorder.history()}")
            print(*wal_rows(db, prefix), sep="\n")
            raise
        finally:
            history.close()

    play()


def overlap(db: str, prefix: str, number: int, seed: int, last: dict[str, str]) -> None:
    """Run random transactions on keys that other sessions change as well.

    last: by key, what was set last. It is noted before the commit that hands on the key's lock.
    """
    dice = random.Random(f"{seed} {number}")
    made: dict[str, str] = {}
    with session(db) as cur:

        def set_one(key: str) -> None:
            made[key] = f"{dice.choice(World.TEXTS)}{number}"
            cur.execute("SELECT etcd_set(%s, %s)", (prefix + key, made[key]))

        for turn in range(25):
            made.clear()
            cur.execute("BEGIN")
            try:
                for _ in range(dice.randrange(1, 5)):
                    set_one(dice.choice("abcdefgh"))
                    if dice.random() < 0.3:
                        before = made.copy()
                        cur.execute("SAVEPOINT s")
                        set_one(dice.choice("abcdefgh"))
                        if dice.random() < 0.5:
                            cur.execute("ROLLBACK TO s")
                            made.clear()
                            made.update(before)
                for n in range(150 if dice.random() < 0.1 else 0):  # more than one Txn takes
                    set_one(f"{number}/{turn}/{n}")
                if dice.random() < 0.2:
                    cur.execute("ROLLBACK")
                else:
                    last.update(made)
                    cur.execute("COMMIT")
            except psycopg2.errors.DeadlockDetected:
                cur.execute("ROLLBACK")


def test_where_only_sql_competes_the_last_writer_wins(daemon, db, prefix, etcd, seed):
    running, last = daemon(*FAST), dict[str, str]()
    with ThreadPoolExecutor() as pool:
        work = [pool.submit(overlap, db, prefix, number, seed, last) for number in range(4)]
        while not all(each.done() for each in work):
            wait_until("nothing is applied", lambda: etcd.range(prefix).kvs)
            running.kill()
            running = daemon(*FAST)
        for each in work:
            each.result()
    assert set(statuses(db)) == {"success"}
    assert {key: etcd.get(prefix + key).value.decode() for key in last} == last


# ── status, sync, validate, config ───────────────────────────────────────────


def test_flag_beats_environment_beats_file_beats_default(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("batch-size: 11\nmax_txn_ops: 12\nlog-level: warn\ndry-run: true\n")
    env = {"ETCD_FDW_CONFIG": str(file), "ETCD_FDW_MAX_TXN_OPS": "22", "ETCD_FDW_LOG_LEVEL": "info"}
    done = run_script("config", "show", "--log-level", "debug", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    shown = {line.split()[0]: line.split(None, 2)[1:] for line in done.stdout.splitlines()}
    assert shown["log-level"] == ["--log-level", "debug"]
    assert shown["max-txn-ops"] == ["ETCD_FDW_MAX_TXN_OPS", "22"]
    assert shown["batch-size"] == [f"{file}:", "batch-size  11"]
    assert shown["dry-run"] == [f"{file}:", "dry-run     true"]
    assert shown["retry-initial"] == ["default", "500ms"]
    assert shown["config"] == ["ETCD_FDW_CONFIG", str(file)]


def test_wrong_config_file_is_one_line_that_says_what(tmp_path):
    file = tmp_path / "c.yaml"
    for content, message in [
        (None, "--config: cannot read"),
        ("bach-size: 5\n", "c.yaml, line 1: unknown option 'bach-size'"),
        ("batch-size: 5\naudit: all\nbatch-size: 6\n", "line 3: batch-size is given twice"),
        ("batch-size: 5\nbatch_size: 6\n", "line 2: batch_size is given twice"),
        ("batch-size:\n", "batch-size: expected a single value"),
        ("- batch-size\n", 'expected one "option: value" a line'),
        ("batch-size: many\n", "batch-size: 'many' is not a whole number above zero"),
        ("batch-size: [1]\n", "batch-size: expected a single value"),
        ("batch-size\n", 'expected one "option: value" a line'),
        ("postgres-dsn: 'host=h password=sesame\nx: y\n", "not YAML: "),
    ]:
        if content is not None:
            file.write_text(content)
        done = run_script("-c", str(file), "-p", "host=h", "-e", "etcd://h/x")
        assert_one_error_line(done, 1, message)
        assert "sesame" not in done.stderr


def test_config_file_without_pyyaml_says_so(tmp_path):
    (tmp_path / "yaml.py").write_text("raise ImportError")
    done = run_script("-c", "c.yaml", "config", "show", env={"PYTHONPATH": str(tmp_path)})
    assert_one_error_line(done, 1, "--config needs PyYAML: pip install PyYAML")


def test_config_file_means_what_it_says(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "dry_run: yes\nmetrics-address: off\nnotify_channel: 007\nhistory-retention: keep\n"
    )
    value = setting("-c", str(file), batch_size="")
    assert value("batch_size") == 5000  # set but empty: not set
    assert value("dry_run") is True
    assert setting("-c", str(file), dry_run="off")("dry_run") is False
    assert setting("-c", str(file), "--dry-run", dry_run="off")("dry_run") is True
    assert value("metrics_address") is None and value("history_retention") is None
    assert value("notify_channel") == "007"  # as written, not as YAML reads a number
    assert setting("-c", str(file), notify_channel="off")("notify_channel") is None


def test_config_show_masks_passwords():
    for postgres in (
        "postgresql://me:ses%40me@h/db?sslpassword=sesame2",
        "postgresql://h/d?sslpasswor%64=sesame2&%70assword=sesame",
        "host=h password='ses@me' sslpassword=sesame2",
        r"host=h password=ses\ ame sslpassword=ses&me",
    ):
        for etcd_ in ("etcd://u:sesame3@h/x", "etcd://h/?usernam%65=u&passwor%64=sesame"):
            done = run_script("-p", postgres, "-e", etcd_, "config", "show", exit_code=0)
            assert done.stdout.count("****") == 3
            assert not re.search("ses|ame$|me2|&me", done.stdout)
    done = run_script("-p", "host=h pass word=sesame", "-e", "etcd://u:ses#me@h", "config", "show")
    assert done.stdout.count("(not valid)") == 2


def test_doubts_about_the_configuration_are_warnings(tmp_path):
    cert, key = Authority(tmp_path).issue("client")
    file = tmp_path / "c.yaml"
    file.write_text(
        "postgres-dsn: postgresql://me:sesame@127.0.0.1:1/db\nstartup-timeout: 0s\n"
        f"etcd-dsn: etcd://h/x?key={key}&cert={cert}\n"
    )
    for words, sign in ((), "Z WARN "), (("config", "validate"), "WARN  "):
        file.chmod(0o644)
        key.chmod(0o644)
        done = run_script("-c", str(file), *words, env={"ETCD_FDW_POSTGRESS_DSN": "x"})
        said = done.stdout + done.stderr
        assert f"{sign}everybody can read {file}, which holds a password: chmod o-r {file}" in said
        assert f"{sign}everybody can read {key}, which holds the private key" in said
        assert f"{sign}the environment variable ETCD_FDW_POSTGRESS_DSN is no option" in said
        file.chmod(0o640)
        key.chmod(0o600)
        assert "WARN" not in run_script("-c", str(file), *words).stderr


def test_config_validate_names_every_problem():
    done = run_script("-p", "nonsense", "--batch-size", "0", "config", "validate", exit_code=1)
    failed = re.findall(r"^FAIL +(\S+)", done.stdout, re.MULTILINE)
    assert failed == ["--postgres-dsn:", "--etcd-dsn", "--batch-size:"]


def test_config_validate_connects_to_both_servers(command, db, prefix):
    done = command(*VALIDATE)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(line.startswith("ok ") for line in done.stdout.splitlines())
    assert "no schema yet" in done.stdout
    assert f"etcd grants writing '{prefix}'\n" in done.stdout
    nowhere = free_port()
    away = etcd_dsn(f"127.0.0.1:{nowhere}", prefix)
    for server, wrong, right in [
        ({"postgres": make_dsn(db, port=nowhere)}, "PostgreSQL: .*refused", "etcd"),
        ({"etcd": away}, f"etcd at 127.0.0.1:{nowhere}: ", "PostgreSQL"),
    ]:
        done = command(*VALIDATE, **server, exit_code=2)
        assert re.search(f"^FAIL  {wrong}", done.stdout, re.MULTILINE)
        assert f"ok    {right} grants" in done.stdout


def test_config_validate_names_the_grant_that_is_missing(command, db, schema_user):
    name = scalar(db, "SELECT current_database()")
    rows(db, f"REVOKE ALL ON DATABASE {name} FROM PUBLIC")
    rows(db, f"GRANT CONNECT ON DATABASE {name} TO {schema_user}")
    validate = partial(command, *VALIDATE, postgres=make_dsn(db, user=schema_user))
    done = validate(exit_code=3)
    for grant in (f"GRANT TEMPORARY ON DATABASE {name}", "GRANT CREATE ON SCHEMA public"):
        assert f"{grant} TO {schema_user}" in done.stdout
        rows(db, f"{grant} TO {schema_user}")
    assert validate().returncode == 0


def test_config_validate_tells_reading_from_writing_in_etcd(own_client, command):
    add_etcd_user(own_client, "root", "secret")
    add_etcd_user(own_client, "reader", "secret", "/a/", kind=READ)
    add_etcd_user(own_client, "writer", "secret", "/a/")
    own_client.call(own_client.auth.AuthEnable, etcdrpc.AuthEnableRequest())
    grant, later = "grant this: etcdctl .* readwrite ", "<mirror id>/ .status names it after"
    wait, own = "changes from SQL would wait: ", "FAIL  .*etcd_fdw/[0-9a-f-]{36}/$"
    check = partial(command, *VALIDATE)
    for user, prefix, exit_code, last in [
        ("reader", "/b/", 3, "FAIL  .*; for reading: etcdctl role grant-permission ROLE .*"),
        ("reader", "/a/", 0, f"WARN  {wait}{grant}/a/; {grant}etcd_fdw/{later}"),
        ("writer", "/a/", 0, f"WARN  {wait}{grant}etcd_fdw/{later}"),
    ]:
        dsn = etcd_dsn(own_client.endpoint, prefix, user, "secret")
        done = check(etcd=dsn, exit_code=exit_code)
        assert re.match(last, done.stdout.splitlines()[-1])
        assert "secret" not in done.stdout
    command("sync", etcd=dsn, exit_code=0)
    done = check(etcd=dsn, exit_code=3)
    assert re.match(own, done.stdout.splitlines()[-1])
    mirror = re.findall(r"etcd_fdw/\S+/", done.stdout)[0]
    assert mirror in command("status", etcd=dsn).stdout.replace("\n" + " " * 12, "")
    with EtcdClient(own_client.endpoint, "root", "secret") as root:
        permit(root, "writer", READWRITE, mirror)
    check(etcd=dsn, exit_code=0)


@pytest.mark.skipif(not shutil.which("pgbouncer"), reason="pgbouncer is not installed")
@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_pooler_that_shares_sessions_is_refused(daemon, tmp_path, own_postgres, mode):
    port, account = free_port(), own_postgres.account
    file = own_postgres.directory / "pgbouncer.ini"
    file.write_text(
        f"[databases]\n* = host=127.0.0.1 port={own_postgres.port} user=postgres\n[pgbouncer]\n"
        f"listen_addr=127.0.0.1\nlisten_port={port}\nunix_socket_dir=\nauth_type=any\n"
        f"pool_mode={mode}\nignore_startup_parameters=options\n"
    )
    file.chmod(0o644)
    with subprocess.Popen(
        ["pgbouncer", "-q", str(file)], stderr=subprocess.DEVNULL, **account
    ) as pooler:
        try:
            dsn = make_dsn(own_postgres.dsn(), port=port)
            if mode == "session":
                daemon(postgres=dsn)
            else:
                one = daemon(postgres=dsn, ready=False)
                assert one.wait_exit() == 1
                assert "is a pooler that shares sessions" in one.log()
        finally:
            pooler.kill()


def status_of(command: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """What `status --format json` says."""
    done = command("status", "--format", "json", **options)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_status_of_a_running_daemon(daemon, command, db, prefix, etcd):
    one = daemon()
    revision = etcd.put(prefix + "a", "1")
    etcd.put("elsewhere" + prefix, "1")
    wait_until("not mirrored", lambda: mirror_rows(db, prefix))
    found = status_of(command)
    assert (found["healthy"], found["problems"]) == (True, [])
    assert (found["pid"], found["host"]) == (one.pid, socket.gethostname())
    assert (found["checkpoint"], found["lag_revisions"], found["lag_s"]) == (revision, 0, 0)
    assert (found["keys"], found["revisions"], found["pending"]) == (1, 1, 0)
    assert found["postgresql"]["reachable"] and found["etcd"]["reachable"]
    done = command("status", exit_code=0)
    assert f"pid {one.pid} on " in done.stdout
    assert f"{revision}, in step with etcd" in done.stdout
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert command("status", "--check").stdout == "healthy\n"


def test_status_before_the_first_start_and_after_the_last(daemon, command, prefix, etcd):
    done = command("status", "--check")
    assert (done.returncode, done.stdout) == (2, "no instance is active\n")
    one = daemon()
    one.stop()
    assert "active      nobody\n" in command("status").stdout
    etcd.put("elsewhere" + prefix, "1")
    found = status_of(command)
    assert (found["lag_revisions"], found["problems"]) == (0, ["no instance is active"])
    etcd.put(prefix + "a", "1")
    etcd.put(prefix + "b", "1")
    etcd.delete(prefix, prefix=True)

    def behind() -> Any:  # it gives its watch only a moment
        status = status_of(command)
        return status["lag_revisions"] == 3 and status

    found = wait_until("no lag", behind)
    assert found["lag_s"] > 0
    assert found["problems"][1:] == ["the mirror is behind by 3 revisions"]


def test_status_with_one_server_down(daemon, command, db, prefix):
    nowhere = free_port()
    daemon()
    etcd_down = etcd_dsn(f"127.0.0.1:{nowhere}", prefix)
    found = status_of(command, etcd=etcd_down)
    assert (found["etcd"]["reachable"], found["locked"]) == (False, True)
    assert found["checkpoint"] > 0
    assert f"127.0.0.1:{nowhere}" in found["problems"][0]
    done = command("status", "--check", etcd=etcd_down)
    assert (done.returncode, done.stdout.count("\n")) == (2, 1)
    postgres_down = make_dsn(db, port=nowhere)
    found = status_of(command, postgres=postgres_down)
    assert (found["postgresql"]["reachable"], found["etcd"]["reachable"]) == (False, True)
    assert "refused" in found["postgresql"]["error"]
    done = command("status", postgres=postgres_down, exit_code=0)
    assert "PROBLEM: PostgreSQL: connection to server" in done.stdout
    assert re.search(r"^etcd +3\.", done.stdout, re.MULTILINE)
    assert max(map(len, done.stdout.splitlines())) <= 100
    command("status", postgres=postgres_down, etcd=etcd_down, exit_code=2)
    command("status", "--check", postgres=postgres_down, exit_code=3)  # nobody knows
    command("status", "--check", "--batch-size", "0", exit_code=3)


def test_status_tells_an_instance_that_is_retrying(daemon, command, db, own_etcd):
    one = daemon(*FAST, etcd=own_etcd)
    own_etcd.stop()
    sql = "SELECT last_error_at FROM etcd_sync_state WHERE last_error IS NOT NULL"
    (since,) = wait_until("no error was noted", lambda: rows(db, sql))[0]
    mark = one.mark()
    for _ in range(3):
        mark += one.wait_log("WARN etcd at .*; retrying in .*s$", after=mark).end()
    found = status_of(command, etcd=own_etcd)
    assert (found["pid"], found["host"]) == (one.pid, socket.gethostname())
    assert own_etcd.endpoint in found["last_error"]
    assert found["last_error_at"] == etcd_fdw.utc(since.timestamp())
    alive = rf"pid {one.pid} on .* is alive, but has been retrying for .*s: etcd at "
    assert [re.match(alive, problem) is not None for problem in found["problems"]].count(True) == 1
    own_etcd.start()
    one.wait_log(r"watching .*: connected again after \d+\.\ds$", after=mark)
    one.signal(signal.SIGUSR1)
    one.wait_log("reconnects 1, ")  # sessions that were lost, not attempts
    reconnects = "SELECT reconnects FROM etcd_sync_state"
    wait_until("not written", lambda: scalar(db, reconnects) == 1)
    found = status_of(command, etcd=own_etcd)
    assert (found["healthy"], found["last_error"]) == (True, None)
    one.kill()
    assert status_of(command, etcd=own_etcd)["problems"] == ["no instance is active"]


def test_status_lists_what_was_refused_and_what_nobody_takes(daemon, command, db, prefix):
    daemon()
    ask(db, "elsewhere")
    assert command("status", "--check").stdout == "healthy\n"
    rows(db, "UPDATE etcd_wal SET ts = ts - interval '2 minutes'")
    done = command("status", "--check", exit_code=2)
    said = "1 pending change outside every mirrored prefix, the first is 1 to elsewhere: "
    assert done.stdout.startswith(said)
    insert = "INSERT INTO etcd_wal (key, value, revision)"
    rows(db, insert + " SELECT %s || n, '1', 999999999 FROM generate_series(0, 5) n", prefix)
    conflicts = "SELECT conflicts FROM etcd_status WHERE prefix = %s"
    wait_until("not all refused", lambda: scalar(db, conflicts, prefix) == 6)
    found = status_of(command)
    assert [item["key"] for item in found["refusals"]] == [f"{prefix}{n}" for n in (5, 4, 3, 2, 1)]
    assert "etcd wins" in found["refusals"][0]["message"]
    assert found["pending_outside"] == 1
    shown = command("status").stdout
    assert "refused     6 in conflict, 0 failed" in shown
    assert "1 outside every mirrored prefix" in shown


def test_status_when_etcd_takes_no_changes(daemon, command, db, prefix, own_client):
    daemon(etcd=own_client)
    alarm = partial(etcdrpc.AlarmRequest, alarm=etcdrpc.NOSPACE)
    own_client.call(own_client.maintenance.Alarm, alarm(action=etcdrpc.AlarmRequest.ACTIVATE))
    done = command("status", "--check", etcd=own_client, exit_code=2)  # though nothing is pending
    assert "changes wait: " in done.stdout and "database space exceeded" in done.stdout
    off = command("status", "--check", "--push", "off", etcd=own_client, exit_code=0)
    assert off.stdout == "healthy\n"
    shown = command("status", "--push", "off", etcd=own_client).stdout
    assert "pending     0; --push is off: they wait" in shown


def test_push_is_switched_off_and_on_by_sighup(daemon, db, prefix, etcd, tmp_path):
    file = tmp_path / "etcd_fdw.yaml"
    file.write_text("push: off\n")
    one = daemon("-c", str(file))
    change = ask(db, prefix + "a", "sql")
    etcd.put(prefix + "b", "1")
    wait_until("not mirrored", arrives(db, prefix + "b"))
    assert scalar(db, "SELECT status FROM etcd_wal") == "pending"
    file.write_text("push: on\n")
    one.signal(signal.SIGHUP)
    assert ended(db, change).status == "success"


def test_status_watch_fits_a_terminal_of_24_lines(daemon, db, prefix, etcd_address):
    daemon()
    keys = [f"{prefix}{'long' * 100}\x1b[2J\n{n}" for n in range(6)]
    for key in keys:
        rows(db, "INSERT INTO etcd_wal (key, value, revision) VALUES (%s, 'x', 1)", key)
    assert set(statuses(db)) == {"conflict"}
    env = {"COLUMNS": "60", "LINES": "24"}
    words = ["-p", db, "-e", etcd_address.dsn(prefix), "status", "--watch"]
    with subprocess.Popen(
        [sys.executable, SCRIPT, *words], env=clean_environ(env), stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        screen = list(iter(process.stdout.readline, b"\n"))
        process.kill()
    assert 15 < len(screen) <= 23
    assert all(line[:-1].decode().isprintable() for line in screen)


def comparison_of(command: Callable[..., Any], *args: str, **servers: str) -> dict[str, Any]:
    """What `validate --format json` says; its exit code must agree."""
    done = command("validate", "--format", "json", *args, **servers)
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if found["equal"] else 5)
    return found


def test_sync_without_a_daemon_does_one_pass_both_ways(command, db, prefix, etcd, recorder):
    assert_one_error_line(command("validate"), 4, "there is no mirror yet")
    etcd.put(prefix + "a", "1")
    done = command("sync", exit_code=0)
    assert re.fullmatch(r"in step at revision \d+, nothing pending\n", done.stdout)
    for value in "234":
        etcd.put(prefix + "a", value)
    etcd.put(prefix + "b", "1")
    etcd.delete(prefix + "a")
    rows(db, "SELECT etcd_set(%s, 'from sql')", prefix + "c")
    done = command("sync", exit_code=0)
    line = r"mirrored (\d+) events? up to .*; applied (\d+) changes?, 0 in conflict, 0 failed"
    batches = [tuple(map(int, found)) for found in re.findall(line, done.stderr)]
    assert [sum(column) for column in zip(*batches)] == [6, 1]
    assert etcd.get(prefix + "c").value == b"from sql"
    assert_same(recorder, db, prefix)
    assert scalar(db, "SELECT pid FROM etcd_sync_state") is None
    assert comparison_of(command)["keys"] == 2


def test_sync_beside_the_active_instance(daemon, command, db, prefix, etcd):
    one = daemon("--poll-interval", "1h")
    etcd.put(prefix + "a", "1")
    wait_until("not mirrored", lambda: mirror_rows(db, prefix))
    rows(db, "ALTER TABLE etcd_wal DISABLE TRIGGER etcd_wal_notify")
    rows(db, "SELECT etcd_set(%s, 'unnoticed')", prefix + "b")
    rows(db, "UPDATE etcd SET value = 'wrong' WHERE key = %s", prefix + "a")
    command("sync", exit_code=0)  # waits, and repairs nothing
    assert comparison_of(command)["different"]["count"] == 1
    assert "repaired 1 difference" in command("validate", "--fix", exit_code=0).stdout
    assert etcd.get(prefix + "b").value == b"unnoticed"
    assert scalar(db, "SELECT value FROM etcd_get(%s)", prefix + "a") == "1"
    assert scalar(db, "SELECT key FROM etcd_sync_event WHERE operation = 'repair'") == prefix + "a"
    # a temporary table that stays would stop autovacuum from freezing the database
    assert scalar(db, "SELECT count(*) FROM pg_class WHERE relpersistence = 't'") == 0
    assert one.returncode is None


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_sync_that_waits_ends_at_once(daemon, db, prefix, signum):
    one = daemon()
    one.pause()
    rows(db, "INSERT INTO etcd_wal (key, value) VALUES (%s, '1')", prefix + "a")  # waits for it
    client = daemon("sync", ready=False)
    client.wait_log("waiting until it is in step")
    client.signal(signum)
    assert client.wait_exit() == 4
    assert "stopped before both sides were in step" in client.log()
    one.resume()


def test_sync_retries_what_was_refused(daemon, command, db, prefix, etcd):
    daemon()
    for key in ("a", "b"):
        ask(db, prefix + key, key, revision=999999)
    assert statuses(db) == ["conflict"] * 2
    done = command("sync", "--retry-failed", exit_code=0)
    assert "queued 2 changes again" in done.stderr
    assert [kv.value for kv in etcd.range(prefix).kvs] == [b"a", b"b"]
    assert status_of(command)["conflicts"] == 0
    assert "queued 0 changes again" in command("sync", "--retry-failed").stderr


def test_reset_spares_other_mirrors(daemon, command, db, prefix, etcd, etcd_address):
    for key in ("a/1", "b/1"):
        etcd.put(prefix + key, "1")
    command("sync", etcd=etcd_address.dsn(prefix + "a/"), exit_code=0)
    mine = {"etcd": etcd_address.dsn(prefix + "b/")}
    one = daemon(**mine)
    done = command("sync", "--reset", "--yes", **mine, exit_code=4)
    assert "an instance is active: stop it" in done.stderr
    one.stop()
    rows(db, "UPDATE etcd_sync_state SET cluster_id = 'dead' WHERE prefix = %s", prefix + "b/")
    command("validate", **mine, exit_code=4)
    assert daemon(ready=False, **mine).wait_exit() == 4
    done = command("sync", "--reset", **mine)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Add --yes" in done.stderr
    rows(db, "UPDATE etcd SET ts = '2020-01-01'")
    done = command("sync", "--reset", "--yes", **mine, exit_code=0)
    assert "dropped the mirror: 1 row" in done.stderr
    old = rows(db, "SELECT key, ts < '2021-01-01' FROM etcd ORDER BY key")
    assert old == [(prefix + "a/1", True), (prefix + "b/1", False)]
    assert comparison_of(command, **mine)["equal"]


def test_reset_asks_on_a_terminal_and_says_what_it_drops(command, db, prefix, etcd, etcd_address):
    etcd.put(prefix + "a", "1")
    command("sync", exit_code=0)
    done = command("sync", "--reset", "--dry-run", exit_code=0)
    assert "the mirror would be dropped: 1 row of history" in done.stdout
    assert "no mirror yet; 1 key to copy" in done.stdout
    line = ["-p", db, "-e", etcd_address.dsn(prefix), "sync", "--reset"]
    before = scalar(db, "SELECT mirror_id FROM etcd_sync_state")
    for answer, exit_code in (b"\n", 1), (b"y\n", 0):
        assert scalar(db, "SELECT mirror_id FROM etcd_sync_state") == before
        master, terminal = os.openpty()
        os.write(master, answer)
        done = subprocess.run(
            [sys.executable, SCRIPT, *line], stdin=terminal, capture_output=True, text=True
        )
        os.close(master)
        os.close(terminal)
        assert "drops the mirror and its history. [y/N]" in done.stdout
        assert done.returncode == exit_code
    assert scalar(db, "SELECT mirror_id FROM etcd_sync_state") != before


def test_dry_run_keeps_commands_from_writing(command, db, prefix, etcd):
    command("sync", exit_code=0)
    etcd.put(prefix + "a", "1")
    rows(db, "INSERT INTO etcd (key, value, revision) VALUES (%s, 'x', 1)", prefix + "b")
    rows(db, "SELECT etcd_set(%s, '1')", prefix + "c")
    assert "nothing was written" in command("sync", "--dry-run").stdout
    command("validate", "--fix", "--dry-run", exit_code=5)
    assert [key for _, key, _ in mirror_rows(db, prefix)] == [prefix.encode() + b"b"]
    assert etcd.get(prefix + "c") is None


def test_keys_cannot_move_the_cursor_nor_break_a_poor_terminal(command, db, prefix):
    command("sync", exit_code=0)
    rows(db, "INSERT INTO etcd (key, value, revision) VALUES (%s, 'x', 1)", prefix + "\x1b[2J\né")
    done = command("validate", env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (5, "")
    assert done.stdout.splitlines()[-1] == f"  {prefix}\\x1b[2J\\n\\xe9"


@pytest.mark.parametrize(("name", "own"), [("status", "--check"), ("sync", "--reset")])
def test_help_of_a_command_shows_its_own_options_first(capsys, name, own):
    with pytest.raises(SystemExit):
        etcd_fdw.build_parser().parse_args([name, "--help"])
    assert re.search(rf"^  {own} .*^  -p DSN", capsys.readouterr().out, re.DOTALL | re.MULTILINE)


PUT_AT_THE_CHECKPOINT = (
    "INSERT INTO etcd (key, value, revision) SELECT %(key)s, 'x', revision FROM etcd_sync_state"
)
TAMPERING = {  # name: (what validate then says of the key, how to get there)
    "lost": ("missing", "DELETE FROM etcd WHERE key = %(key)s"),
    "buried": (
        "missing",
        "INSERT INTO etcd (key, revision, tombstone)"
        " SELECT %(key)s, revision, true FROM etcd_sync_state",
    ),
    "old": (
        "different",
        "DELETE FROM etcd WHERE key = %(key)s"
        " AND revision = (SELECT max(revision) FROM etcd WHERE key = %(key)s)",
    ),
    "changed": ("different", "UPDATE etcd SET value = 'x' WHERE key = %(key)s"),
    "leased": ("different", "UPDATE etcd SET lease = 7 WHERE key = %(key)s"),
    "bytes": ("different", "UPDATE etcd SET value = NULL, value_bytes = '1' WHERE key = %(key)s"),
    "later": ("different", PUT_AT_THE_CHECKPOINT),
    "undead": ("extra", "DELETE FROM etcd WHERE key = %(key)s AND tombstone"),
    "new": ("extra", "INSERT INTO etcd (key, value, revision) VALUES (%(key)s, 'x', 1)"),
    "brand-new": ("extra", PUT_AT_THE_CHECKPOINT),
}


@pytest.mark.parametrize("active", [True, False])
def test_validate_finds_and_fixes(daemon, command, db, prefix, etcd, active):
    one = daemon()
    expected: dict[str, list[str]] = {"missing": [], "different": [], "extra": []}
    for name, (kind, _) in sorted(TAMPERING.items()):
        expected[kind].append(prefix + name)
        for value in ("old", "right") if "new" not in name else ():
            etcd.put(prefix + name, value)
        if name == "undead":
            etcd.delete(prefix + name)
    etcd.put(prefix + "z", "1")  # what the start looks at
    wait_until("not mirrored", arrives(db, prefix + "z"))
    if not active:
        one.stop()
    with session(db) as cur:
        for name, (_, tampering) in TAMPERING.items():
            cur.execute(tampering, {"key": prefix + name})
    found = comparison_of(command)
    assert {kind: found[kind]["first"] for kind in expected} == expected
    shown = command("validate").stdout
    assert re.search(r"^missing in the mirror +2$", shown, re.MULTILINE)
    assert f"  {prefix}lost\n" in shown
    found = comparison_of(command, "--fix")
    assert (found["equal"], found["repaired"]) == (True, len(TAMPERING))
    right = [(key, "right") for kind in ("missing", "different") for key in expected[kind]]
    assert rows(db, "SELECT key, value FROM etcd_list()") == sorted([*right, (prefix + "z", "1")])
    repairs = "SELECT count(*) FROM etcd_sync_event WHERE operation = 'repair'"
    assert scalar(db, repairs) == len(TAMPERING)


def test_validate_raises_no_false_alarm_while_both_sides_write(daemon, command, load):
    daemon()
    play = load()
    compared = []
    for _ in range(4):
        play.run(10)
        compared.append(comparison_of(command))
    play.stop()
    assert all(found["equal"] for found in compared)
    assert compared[0]["revision"] < compared[-1]["revision"]


def test_commands_cope_with_a_checkpoint_compacted_since(daemon, command, own_client, db, prefix):
    own_client.put(prefix + "a", "1")
    daemon(etcd=own_client)
    own_client.put(prefix + "b", "1")
    wait_until("not mirrored", lambda: len(mirror_rows(db)) == 2)
    for _ in range(3):
        own_client.put("elsewhere", "1")
    own_client.compact(own_client.revision())
    assert command("status", "--check", etcd=own_client).stdout == "healthy\n"
    command("validate", etcd=own_client, exit_code=0)  # etcd holds the same as then
    command("sync", etcd=own_client, exit_code=0)
    assert scalar(db, "SELECT resyncs FROM etcd_sync_state") == 0
    rows(db, "DELETE FROM etcd WHERE key = %s", prefix + "a")
    done = command("validate", etcd=own_client, exit_code=4)
    assert "etcd has compacted revision" in done.stderr
    # the active instance copies again
    command("validate", "--fix", etcd=own_client, exit_code=0)
    assert scalar(db, "SELECT count(*) FROM etcd_list(%s)", prefix) == 2


READ, WRITE, READWRITE = 0, 1, 2  # authpb.Permission.Type, which etcdrpc does not export


def permit(client: EtcdClient, role: str, kind: int, prefix: str) -> None:
    """Grant READ, WRITE or READWRITE below the prefix."""
    request = etcdrpc.AuthRoleGrantPermissionRequest(name=role)
    request.perm.permType, request.perm.key = kind, prefix.encode()
    request.perm.range_end = prefix_end(prefix)
    client.call(client.auth.RoleGrantPermission, request)


def add_etcd_user(
    client: EtcdClient, user: str, password: str, *prefixes: str, kind: int = READWRITE
) -> None:
    """Add a user, who has a role of the same name."""
    client.call(client.auth.UserAdd, etcdrpc.AuthUserAddRequest(name=user, password=password))
    client.call(client.auth.RoleAdd, etcdrpc.AuthRoleAddRequest(name=user))
    for prefix in prefixes:
        permit(client, user, kind, prefix)
    client.call(client.auth.UserGrantRole, etcdrpc.AuthUserGrantRoleRequest(user=user, role=user))


# ── metrics, signals, supervision, housekeeping ──────────────────────────────


def http_get(address: str, path: str, data: bytes | None = None) -> tuple[int, str]:
    """Status and body of a GET, or of a POST of data."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}{path}", data, timeout=WAIT_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as exc:
        return exc.code, exc.read().decode()


def metrics_address(one: Daemon) -> str:
    """Where a daemon started with --metrics-address 127.0.0.1:0 serves."""
    return one.wait_log(r"serving .* on (\S+:\d+)")[1]


def read_metrics(one: Daemon) -> dict[str, float]:
    """Every sample by its name with labels, as prometheus_client reads it."""
    status, text = http_get(metrics_address(one), "/metrics")
    assert status == 200
    samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            labels = ",".join(f'{k}="{v}"' for k, v in sorted(sample.labels.items()))
            samples[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return samples


def test_metrics_tell_what_happened(daemon, db, prefix, etcd):
    one = daemon("--metrics-address", "127.0.0.1:0")
    before = read_metrics(one)
    etcd.put(prefix + "a", "1")
    wait_until("not mirrored", lambda: mirror_rows(db, prefix))
    rows(db, "SELECT etcd_set(%s, 'x')", prefix + "b")
    rows(db, "INSERT INTO etcd_wal (key, value, revision) VALUES (%s, 'x', 1)", prefix + "a")
    statuses(db)

    def counted() -> dict[str, float]:  # some of it after the commit
        found, checkpoint = read_metrics(one), scalar(db, "SELECT revision FROM etcd_status")
        done = found["etcd_fdw_apply_seconds_count"] - before["etcd_fdw_apply_seconds_count"] == 2
        reached = found["etcd_fdw_checkpoint_revision"] == checkpoint
        return found if done and reached and found.get("etcd_fdw_pending_changes") == 0 else {}

    after = wait_until("not counted", counted)
    grown = {name: after[name] - before[name] for name in after if name in before}
    assert grown['etcd_fdw_changes_total{outcome="success"}'] == 1
    assert grown["etcd_fdw_events_total"] == 2
    assert grown['etcd_fdw_changes_total{outcome="conflict"}'] == 1
    assert grown['etcd_fdw_apply_seconds_bucket{le="+Inf"}'] == 2
    assert 0 < grown["etcd_fdw_apply_seconds_sum"] < 10
    assert grown["etcd_fdw_batches_total"] >= 2 and grown["etcd_fdw_batch_seconds_total"] > 0
    assert after["etcd_fdw_active"] == 1
    assert after['etcd_fdw_connected{side="etcd"}'] == 1
    assert after["etcd_fdw_oldest_pending_seconds"] == 0
    assert after["etcd_fdw_info" + f'{{prefix="{prefix}",version="{etcd_fdw.__version__}"}}'] == 1


def test_metrics_and_readiness_tell_which_side_is_away(daemon, network):
    one = daemon(*FAST, "--metrics-address", "127.0.0.1:0", etcd=network)
    address = metrics_address(one)
    wait_until("not ready", lambda: http_get(address, "/readyz")[0] == 200)
    network.refuse()
    away = 503, "etcd is unavailable\n"
    wait_until("ready without etcd", lambda: http_get(address, "/readyz") == away)
    lost = read_metrics(one)
    assert lost['etcd_fdw_connected{side="etcd"}'] == 0
    assert lost['etcd_fdw_connected{side="postgresql"}'] == 1
    assert lost['etcd_fdw_reconnects_total{side="etcd"}'] >= 1
    assert lost['etcd_fdw_reconnects_total{side="postgresql"}'] == 0
    assert lost["etcd_fdw_lag_seconds"] > 0
    assert http_get(address, "/healthz") == (200, "ok\n")
    network.resume()
    wait_until("not ready again", lambda: http_get(address, "/readyz")[0] == 200)
    wait_until("still behind", lambda: read_metrics(one)["etcd_fdw_lag_seconds"] == 0)


def test_standby_is_shown_and_is_healthy_but_not_ready_and_answers_signals(daemon, command):
    daemon()
    standby = daemon("--metrics-address", "127.0.0.1:0", ready=False)
    standby.wait_log("standing by")
    address = metrics_address(standby)
    assert read_metrics(standby)["etcd_fdw_active"] == 0
    assert http_get(address, "/healthz")[0] == 200
    assert http_get(address, "/readyz") == (503, "standing by\n")
    assert http_get(address, "/other")[0] == 404
    standby.signal(signal.SIGUSR1)
    standby.wait_log("status: standing by, ")
    standby.signal(signal.SIGHUP)
    standby.wait_log("changed: nothing; changes only with a restart: nothing")
    assert len(status_of(command)["standbys"]) == 1
    assert re.search(r"^standbys +1: 127\.0\.0\.1 since 2", command("status").stdout, re.MULTILINE)
    standby.stop()
    wait_until("still there", lambda: not status_of(command)["standbys"])


def test_catching_up_is_lag(daemon, db, prefix, etcd):
    daemon().stop()
    for n in range(300):
        etcd.put(f"{prefix}k{n % 10}", "x" * 1000)
    with frozen_mirror(db):
        one = daemon("--metrics-address", "127.0.0.1:0")
        address = metrics_address(one)
        wait_until("no lag", lambda: read_metrics(one)["etcd_fdw_lag_revisions"] >= 300)
        assert read_metrics(one)["etcd_fdw_lag_seconds"] > 0
        assert http_get(address, "/healthz")[0] == 200  # PostgreSQL is slow, the loop is not stuck
    wait_until("still lag", lambda: read_metrics(one)["etcd_fdw_lag_revisions"] == 0)
    assert len(mirror_rows(db, prefix)) == 300


def connect_metrics(one: Daemon) -> socket.socket:
    """A connection to where a daemon serves its metrics."""
    host, _, port = metrics_address(one).rpartition(":")
    return socket.create_connection((host, int(port)), timeout=WAIT_S)


def test_metrics_port_takes_any_number_of_clients(daemon, db, prefix, etcd):
    one = daemon("--metrics-address", "127.0.0.1:0")
    with ExitStack() as stack:
        clients = [stack.enter_context(connect_metrics(one)) for _ in range(200)]
        clients[-1].send(b"GET /metr")
        clients[0].settimeout(etcd_fdw.METRICS_TIMEOUT_S / 2)  # it has to go before that
        assert clients[0].recv(1) == b""
        assert http_get(metrics_address(one), "/healthz") == (200, "ok\n")
        etcd.put(prefix + "a", "1")
        wait_until("not mirrored", lambda: mirror_rows(db, prefix))


def test_metrics_client_that_says_nothing_is_hung_up_on(daemon):
    with connect_metrics(daemon("--metrics-address", "127.0.0.1:0")) as client:
        assert client.recv(1) == b""


def test_metrics_hold_any_prefix():
    prefix = '/say "hi" \\ and\nbye/ü'
    text = etcd_fdw.exposition(etcd_fdw.Metrics(prefix, etcd_fdw.Counters()))
    info = next(iter(text_string_to_metric_families(text))).samples[0]
    assert info.labels["prefix"] == prefix


def test_metrics_port_in_use_is_one_line(command):
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        done = command("--metrics-address", address)
    message = f"--metrics-address: cannot listen on {address}: Address already in use\n"
    assert_one_error_line(done, 1, message)


def test_metrics_address():
    parse = etcd_fdw.parse_address
    assert parse("127.0.0.1:9379") == parse(":9379") == ("127.0.0.1", 9379)
    assert parse("[::1]:9379") == ("::1", 9379)
    assert parse("metrics.example:1") == ("metrics.example", 1)


class Manager(Closing):
    """The other end of NOTIFY_SOCKET, as systemd has it."""

    def __init__(self, address: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(address)
        self.env = {"NOTIFY_SOCKET": address.replace("\0", "@"), "WATCHDOG_USEC": "1000000"}

    def wait(self, line: str) -> list[str]:
        """The lines of the next message that has a line which begins so."""

        def look() -> list[str]:
            self.sock.settimeout(WAIT_S)
            lines = self.sock.recv(65536).decode().splitlines()
            return lines if any(one.startswith(line) for one in lines) else []

        return wait_until(f"no {line}", look)

    def close(self) -> None:
        self.sock.close()


def test_stuck_loop_is_unhealthy_and_not_kept_alive(monkeypatch, tmp_path):
    with Manager(str(tmp_path / "notify")) as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", manager.env["NOTIFY_SOCKET"])
        monkeypatch.setenv("WATCHDOG_USEC", "300000")
        guard = etcd_fdw.Guard(etcd_fdw.Waker())
        guard.notifier.ready = True
        guard.start()
        manager.wait("WATCHDOG=1")
        guard.turned_at -= etcd_fdw.STUCK_S + 1
        assert guard.stuck_s() > etcd_fdw.STUCK_S
        while select.select([manager.sock], [], [], 0.5)[0]:
            manager.sock.recv(1000)  # what was on its way, and then silence
            assert guard.stuck_s() > etcd_fdw.STUCK_S
        with socket.socket() as sock, guard.limit(sock.fileno(), 3600):
            assert guard.stuck_s() == 0  # PostgreSQL is allowed to take long
        manager.wait("WATCHDOG=1")  # the loop went on


def test_loop_that_hangs_ends_the_process_to_be_restarted():
    """As in gRPC's close: not with exit code 4, which supervisors leave alone."""
    code = f"""
import runpy, time
m = runpy.run_path({str(SCRIPT)!r})
g = m["Guard"](m["Waker"]())
g.listen.__globals__.update(STUCK_S=0.2, HANG_LIMIT_S=0.5)
g.listen()
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=WAIT_S)
    assert done.returncode == 2


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(daemon, prefix, tmp_path, abstract):
    address = f"\0etcd-fdw-{RUN_ID}" if abstract else str(tmp_path / "notify")
    with Manager(address) as manager:
        one = daemon(env=manager.env, ready=False)
        manager.wait("STATUS=mirroring")
        manager.wait("READY=1")
        manager.wait("WATCHDOG=1")
        one.signal(signal.SIGHUP)
        assert manager.wait("RELOADING=1")[1].startswith("MONOTONIC_USEC=")
        manager.wait("READY=1")
        standby = daemon(env=manager.env, ready=False)
        manager.wait("STATUS=standing by")
        manager.wait("READY=1")
        standby.kill()
        one.signal(signal.SIGTERM)
        manager.wait("STOPPING=1")
        assert one.wait_exit() == 0


def test_sigusr1_logs_the_status(daemon, db, prefix, etcd):
    one = daemon()
    etcd.put(prefix + "a", "1")
    wait_until("not mirrored", lambda: mirror_rows(db, prefix))
    rows(db, "INSERT INTO etcd_wal (key, value) VALUES ('elsewhere', '')")
    one.signal(signal.SIGUSR1)
    line = one.wait_log("INFO status: .*")[0]
    revision = scalar(db, "SELECT revision FROM etcd_status WHERE prefix = %s", prefix)
    assert "mirroring, etcd connected, PostgreSQL connected;" in line
    assert f"revision {revision}, etcd at {revision}, 0.0s behind; pending 0, " in line
    assert "events 1, applied 0, conflicts 0, failures 0" in line


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_log_takes_anything_and_prints_lines(log_format):
    """Text from outside adds no line and moves no cursor; a missing argument is no traceback."""
    code = f"""
import runpy
m = runpy.run_path({str(SCRIPT)!r})
m["set_up_logging"](m["make_config"](m["settings"](
    {{"postgres_dsn": {P!r}, "etcd_dsn": {E!r}, "log_format": {log_format!r}}}, {{}})))
m["log"].error("%(key)s", key="/a\\n2026-01-31T15:30:00Z ERROR x \\x1b[2J \\x9b2J \\ud800é")
m["log"].error("of role %(role)s", pid=7)
m["log"].error("%d", "x")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert len(lines) == 3 and done.stderr.isprintable() is False  # but for the newlines
    assert all(line.isprintable() for line in lines)
    for line in lines:
        assert json.loads(line) if log_format == "json" else LOG_LINE.fullmatch(line), line
    assert "role" in lines[1] and "7" in lines[1]


def test_log_that_nobody_reads_holds_up_nothing(db, prefix, etcd, etcd_address):
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)

    def fill() -> None:
        with suppress(BlockingIOError):
            while os.write(writer, b"full\n" * 100):
                pass

    fill()
    args = ["-p", db, "-e", etcd_address.dsn(prefix)]
    one = Daemon(Path(f"/dev/fd/{writer}"), *args)  # opens the pipe anew, to wait as usual
    try:
        wait_until("does not start", lambda: scalar(db, "SELECT to_regclass('etcd_wal')"), 20)
        for key in "abc":
            etcd.put(prefix + key, "1")
            wait_until("waits for the log", arrives(db, prefix + key), 20)
            one.signal(signal.SIGUSR1)
        os.read(reader, 1 << 20)
        said = b""

        def told() -> bool:
            nonlocal said
            one.signal(signal.SIGUSR1)
            with suppress(BlockingIOError):
                said += os.read(reader, 1 << 20)
            return b"lost: nobody read them\n" in said

        wait_until("nothing is counted", told)
        assert re.search(rb"WARN \d lines? of this log lost: nobody read them\n", said)
        assert all(LOG_LINE.fullmatch(line) for line in said.decode().splitlines())
        fill()
        one.signal(signal.SIGTERM)
        assert one.wait_exit(etcd_fdw.STOP_LIMIT_S) == 0
    finally:
        one.kill()
        os.close(reader)
        os.close(writer)


def test_info_log_is_quiet(daemon, db, prefix, etcd):
    began, one = time.monotonic(), daemon()
    mark = one.mark()
    for n in range(100):
        etcd.put(f"{prefix}e{n}", "x")
        rows(db, "SELECT etcd_set(%s, 'x')", f"{prefix}s{n}")
    wait_until("not there", lambda: len(mirror_rows(db, prefix)) == 200)
    one.stop()
    minutes = (time.monotonic() - began) / 60
    assert len(one.log()[mark:].splitlines()) <= 2 + minutes  # the summary, and "stopped"


# housekeeping: retentions are measured against rows that are made older


def test_finished_changes_are_deleted_after_their_retention(daemon, db, prefix, etcd):
    one = daemon("--poll-interval", "100ms")
    for n in range(5):
        rows(db, "SELECT etcd_set(%s, 'x')", f"{prefix}k{n}")
    conflict = ask(db, prefix + "k0")
    assert ended(db, conflict).status == "conflict"
    retry = scalar(db, "SELECT etcd_retry(%s)", conflict)
    assert ended(db, retry).status == "success"
    one.stop()
    rows(db, "UPDATE etcd_wal SET finished_at = finished_at - interval '8 days'")
    young = scalar(db, "SELECT etcd_set(%s, 'x')", prefix + "young")
    rows(db, "INSERT INTO etcd_wal (key, value) VALUES ('elsewhere', 'stray')")
    one = daemon("-l", "debug")
    one.wait_log("housekeeping deleted 5 rows of etcd_wal")
    assert ended(db, young).status == "success"
    kept = rows(db, "SELECT id, status FROM etcd_wal WHERE key <> 'elsewhere' ORDER BY id")
    assert kept == [(conflict, "conflict"), (retry, "success"), (young, "success")]


def test_dismissed_changes_are_deleted_after_their_retention(daemon, command, db, prefix):
    one = daemon(*FAST)
    first, second, third = [ask(db, f"{prefix}{n}", revision=1) for n in range(3)]
    statuses(db)
    rows(db, "UPDATE etcd_wal SET finished_at = finished_at - interval '9 days'")
    rows(db, "SELECT etcd_dismiss(%s), etcd_dismiss(%s)", first, second)
    found = status_of(command)
    assert [item["id"] for item in found["refusals"]] == [third]
    assert found["conflicts"] == 1
    older = "UPDATE etcd_wal SET dismissed_at = dismissed_at - interval '8 days' WHERE id = %s"
    rows(db, older, first)
    one.stop()
    command("sync", "--retry-failed", exit_code=0)
    retries = rows(db, "SELECT retry_of FROM etcd_wal WHERE retry_of IS NOT NULL")
    assert retries == [(third,)]
    daemon()
    kept = "SELECT id FROM etcd_wal WHERE retry_of IS NULL ORDER BY id"
    left = [(second,), (third,)]  # the second was dismissed just now
    wait_until("the first is still there", lambda: rows(db, kept) == left)


def test_superseded_versions_are_deleted_and_etcd_at_says_so(daemon, db, prefix, etcd):
    one = daemon()
    key = prefix + "a"
    first, second, third = (etcd.put(key, value) for value in "123")
    other = etcd.put(prefix + "b", "kept, since it is the latest")
    gone = etcd.put(prefix + "c", "x")
    etcd.delete(prefix + "c")
    buried = etcd.revision()
    wait_until("not mirrored", lambda: len(mirror_rows(db, prefix)) == 6)
    one.stop()
    rows(db, "UPDATE etcd SET ts = ts - interval '2 days' WHERE revision <> %s", third)
    one = daemon("-l", "debug", "--history-retention", "1d")
    one.wait_log("housekeeping deleted 2 rows of etcd$")  # 1 and the put of c; 2 was beaten today
    assert [event[:2] for event in mirror_rows(db, prefix)] == [
        (second, key.encode()),
        (third, key.encode()),
        (other, (prefix + "b").encode()),
        (buried, (prefix + "c").encode()),
    ]
    assert scalar(db, "SELECT pruned_revision FROM etcd_sync_state") == buried
    values = rows(db, "SELECT value FROM etcd_at(%s, %s)", buried, prefix)
    assert values == [("3",), ("kept, since it is the latest",)]
    for sql, args in [
        ("SELECT * FROM etcd_at(%s, %s)", (gone, prefix)),
        ("SELECT * FROM etcd_get_all(%s, %s)", (key, first)),
    ]:
        assert "pruned" in refused("22023", db, sql, *args).message_primary
    assert len(rows(db, "SELECT * FROM etcd_get_all(%s)", key)) == 2
    one.stop()
    daemon()  # the last revision deletes what was pruned, which does not look like another etcd


def test_housekeeping_goes_through_everything_in_steps(daemon, db, prefix, etcd):
    one = daemon()
    etcd.put(prefix + "live", "x")
    wait_until("not mirrored", lambda: mirror_rows(db, prefix))
    one.stop()
    rows(db, "UPDATE etcd_sync_event SET ts = ts - interval '91 days'")  # they are in order
    count = 3 * etcd_fdw.HOUSEKEEPING_ROWS + 7
    of_both = "generate_series(1, %s) n, unnest(ARRAY[%s, '/of another instance/']) p"
    for sql in (
        "INSERT INTO etcd (key, value, revision, ts) SELECT p || n %% 10, '', n, OLD"
        " FROM generate_series(1, %s) n, unnest(ARRAY[%s]) p",
        "INSERT INTO etcd_wal (key, value, status, finished_at)"
        f" SELECT p || n, '', 'success', OLD + n * interval '1 ms' FROM {of_both}",
        "INSERT INTO etcd_sync_event (prefix, operation, status, key, ts)"
        f" SELECT p, 'mirror', s, '', OLD FROM {of_both},"
        " unnest(ARRAY['success', 'unstorable']) s",
    ):
        rows(db, sql.replace("OLD", "now() - interval '90 days'"), count, prefix)
    one = daemon("--metrics-address", "127.0.0.1:0", "--history-retention", "30d")
    # the latest of 10 keys and the live one; what others own; unstorable events are no audit
    left = (
        "SELECT (SELECT count(*) FROM etcd), (SELECT count(*) FROM etcd_wal),"
        " (SELECT count(*) FROM etcd_sync_event WHERE operation = 'mirror')"
    )
    wait_until("not all deleted", lambda: rows(db, left) == [(11, count, 3 * count)])
    expected = {"etcd": count - 10, "etcd_wal": count, "etcd_sync_event": count + 1}  # first copy's
    total = 'etcd_fdw_deleted_rows_total{{table="{}"}}'

    def counted() -> bool:  # after the commit
        deleted = read_metrics(one)
        return all(deleted[total.format(table)] == number for table, number in expected.items())

    wait_until("not counted", counted)


def test_retention_keep_deletes_nothing(daemon, db, prefix, etcd):
    one = daemon()
    etcd.put(prefix + "a", "1")
    rows(db, "SELECT etcd_set(%s, 'x')", prefix + "b")
    wait_until("not mirrored", lambda: len(mirror_rows(db, prefix)) == 2)
    one.stop()
    for table, column in ("etcd", "ts"), ("etcd_wal", "finished_at"), ("etcd_sync_event", "ts"):
        rows(db, f"UPDATE {table} SET {column} = {column} - interval '9 years'")
    one = daemon("-l", "debug", "--wal-retention", "keep")
    one.wait_log("housekeeping deleted 1 rows of etcd_sync_event")  # by its default
    one.stop()
    assert len(mirror_rows(db, prefix)) == 2
    assert scalar(db, "SELECT count(*) FROM etcd_wal") == 1


def test_audit_of_all_tells_who_and_what_became_of_it(daemon, db, prefix, etcd):
    daemon("--audit", "all")
    key = prefix + "a"
    revision = etcd.put(key, "1")
    wait_until("not mirrored", lambda: mirror_rows(db, prefix))
    with session(db, application_name="billing") as cur:
        cur.execute("SELECT etcd_set(%s, '2')", (key,))
        (id_,) = cur.fetchone()
        cur.execute("INSERT INTO etcd_wal (key, value) VALUES (%s, '3')", (key,))
    assert statuses(db) == ["success", "conflict"]
    user, after = scalar(db, "SELECT current_user"), etcd.get(key).mod_revision
    sql = """
        SELECT operation, status, source_system, target_system, target_revision,
               details - 'message'
        FROM etcd_sync_event WHERE key = %s ORDER BY operation, status, target_revision
    """
    asked = {"wal_id": id_, "role": user, "application": "billing"}
    assert rows(db, sql, key) == [
        ("change", "conflict", "postgresql", "etcd", after, {**asked, "wal_id": id_ + 1}),
        (
            "change",
            "success",
            "postgresql",
            "etcd",
            after,
            {**asked, "replaced_revision": revision},
        ),
        ("mirror", "success", "etcd", "postgresql", revision, None),
        ("mirror", "success", "etcd", "postgresql", after, None),
    ]


def test_application_waits_for_its_outcome_without_polling(daemon, db, prefix, etcd):
    rows(db, 'CREATE SCHEMA "My-Schema 2"')  # whose ids are those of any other
    db = make_dsn(db, options='-csearch_path="My-Schema\\ 2"')
    daemon(postgres=db)
    with session(db, "LISTEN etcd_outcome") as cur:  # before the change, or one may miss the answer
        for sql, status in [
            ("SELECT etcd_set(%s, '1')", "success"),
            ("INSERT INTO etcd_wal (key) VALUES (%s) RETURNING id", "conflict"),
        ]:
            id_, conn = scalar(db, sql, prefix + "a"), cur.connection

            def told(conn: Any = conn, id_: int = id_) -> bool:
                select.select([conn], [], [], WAIT_S)
                conn.poll()
                told = [re.split("[- ]", n.payload, maxsplit=2) for n in conn.notifies]
                assert all(schema == "My-Schema 2" for _, _, schema in told)
                return any(int(first) <= id_ <= int(last) for first, last, _ in told)

            wait_until("no notification", told)
            cur.execute("SELECT status, result_revision FROM etcd_wal WHERE id = %s", (id_,))
            assert cur.fetchone() == (status, etcd.get(prefix + "a").mod_revision)


def test_application_is_told_of_revisions(daemon, db, prefix, etcd):
    with session(db, 'LISTEN "config of shop"') as cur:
        before = etcd.put(prefix + "a", "0")
        one = daemon("--notify-channel", "config of shop")
        revisions = [etcd.put(f"{prefix}{n}", "x") for n in range(20)]
        wait_until("not mirrored", lambda: len(mirror_rows(db, prefix)) == 21)
        one.stop()
        cur.execute("SELECT 1")  # the answer comes after what was notified before
        ranges = [tuple(map(int, n.payload.split("-"))) for n in cur.connection.notifies]
        assert ranges[0][0] == 1 and before <= ranges[0][1] < revisions[0]  # the first copy
        covered = [r for r in revisions if any(first <= r <= last for first, last in ranges[1:])]
        assert covered == revisions
        assert ranges == sorted(ranges)


def test_sighup_changes_what_can_be_changed(daemon, db, prefix, etcd, tmp_path):
    file = tmp_path / "etcd_fdw.yaml"
    file.write_text("log-level: info\nbatch-size: 10\n")
    one = daemon("-c", str(file), "--poll-interval", "1h")
    file.write_text(
        "log-level: debug\nbatch-size: 20\npoll-interval: 1s\naudit: all\n"
        "metrics-address: 127.0.0.1:1\n"
    )
    one.signal(signal.SIGHUP)
    # poll-interval stays, since the flag wins
    one.wait_log(
        r"INFO read the configuration again; changed: log-level, batch-size, audit;"
        r" changes only with a restart: metrics-address$"
    )
    etcd.put(prefix + "a", "1")
    audit = "SELECT FROM etcd_sync_event WHERE operation = 'mirror'"
    wait_until("no audit", lambda: rows(db, audit))
    mark = one.mark()
    file.write_text("log-level: loud\n")
    one.signal(signal.SIGHUP)
    one.wait_log("ERROR .*log-level.*; going on with the configuration as it was$", after=mark)
    assert one.returncode is None


def test_sighup_shortens_an_interval_that_has_begun(daemon, db, prefix, tmp_path):
    file = tmp_path / "etcd_fdw.yaml"
    file.write_text("poll-interval: 1h\n")
    one = daemon("-c", str(file))
    rows(db, "ALTER TABLE etcd_wal DISABLE TRIGGER etcd_wal_notify")
    for value in "12":  # at once, and from then on
        id_ = ask(db, prefix + value)
        file.write_text("poll-interval: 1s\n")
        one.signal(signal.SIGHUP)
        assert ended(db, id_).status == "success"


def test_sighup_gives_the_next_connection_new_passwords(daemon, tmp_path, secure_etcd):
    file = tmp_path / "etcd_fdw.yaml"

    def write(password: str, port: int) -> None:
        dsn = f"postgresql://postgres:{password}@127.0.0.1:{port}/postgres"
        etcd_ = etcd_dsn(secure_etcd.endpoint, "/t/", "fdw", password)
        file.write_text(f"postgres-dsn: {dsn}\netcd-dsn: {etcd_}\n")

    with LocalPostgres(password="secret") as server, secure_etcd.enable_auth() as root:
        write("secret", server.port)
        log = Daemon(tmp_path / "log", *FAST, "-c", str(file))
        log.wait_log("watching")
        rows(server.dsn(), "ALTER ROLE postgres PASSWORD 'new'")
        change = etcdrpc.AuthUserChangePasswordRequest(name="fdw", password="new")
        root.call(root.auth.UserChangePassword, change)
        server.password = "new"
        write("new", server.port)
        log.signal(signal.SIGHUP)
        log.wait_log("changed: postgres-dsn, etcd-dsn; changes only with a restart: nothing$")
        server.restart()
        secure_etcd.restart()
        mark = log.wait_log("connected again").end()
        write("new", server.port + 1)
        log.signal(signal.SIGHUP)
        log.wait_log("changed: nothing; changes only with a restart: postgres-dsn$", after=mark)
        assert log.stop() == 0


SUPERVISORD_CONF = """
[supervisord]
nodaemon=true
logfile=%(here)s/supervisord.log
pidfile=%(here)s/supervisord.pid
[unix_http_server]
file=%(here)s/s.sock
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
"""


@pytest.fixture
def supervisord(db: str, prefix: str, etcd_address: EtcdAddress) -> Iterator[tuple[Path, Any]]:
    """A real supervisord that runs it as README says: the log, and the XML-RPC interface."""
    with tempfile.TemporaryDirectory() as name:  # a path short enough for a socket
        options, config = Path(name, "etcd_fdw.yaml"), Path(name, "supervisord.conf")
        options.write_text(json.dumps({"postgres-dsn": db, "etcd-dsn": etcd_address.dsn(prefix)}))
        program = readme_block("supervisord").replace("user=etcd_fdw\n", "")
        for path, ours in [
            ("/opt/etcd_fdw/.venv/bin/python", sys.executable),
            ("/opt/etcd_fdw/etcd_fdw.py", SCRIPT),
            ("/etc/etcd_fdw.yaml", options),
            ("/var/log/", f"{name}/"),
        ]:
            assert path in program
            program = program.replace(path, str(ours))
        config.write_text(SUPERVISORD_CONF + program)
        process = subprocess.Popen(
            [sys.executable, "-m", "supervisor.supervisord", "-c", config],
            env=clean_environ(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        def answers() -> bool:
            with suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
                sock.connect(f"{name}/s.sock")
                return True
            return False

        try:
            wait_until("no supervisord", answers)
            transport = SupervisorTransport(None, None, f"unix://{name}/s.sock")
            with xmlrpc.client.ServerProxy("http://x", transport) as client:
                yield Path(name, "etcd_fdw.log"), client.supervisor
        finally:
            process.terminate()
            process.wait(30)
            for log in Path(name).glob("*.log"):  # shown if the test fails
                print(f"── {log.name}\n{log.read_text()}")


def test_supervisord_starts_restarts_and_stops_it(supervisord, db, prefix, etcd):
    log_path, interface = supervisord

    def running_pid() -> int:
        info = interface.getProcessInfo("etcd_fdw")
        return int(info["pid"]) if info["statename"] == "RUNNING" else 0

    pid = wait_until("not started", running_pid)
    wait_until("not watching", lambda: "watching" in log_path.read_text())
    etcd.put(prefix + "a", "1")
    wait_until("not mirrored", arrives(db, prefix + "a"))
    os.kill(pid, signal.SIGKILL)
    wait_until("not restarted", lambda: running_pid() not in (0, pid))
    etcd.put(prefix + "b", "2")
    wait_until("not mirrored after a crash", arrives(db, prefix + "b"))
    assert interface.stopProcess("etcd_fdw")
    info = interface.getProcessInfo("etcd_fdw")
    assert (info["statename"], info["exitstatus"]) == ("STOPPED", 0)
    assert log_path.read_text().endswith(" INFO stopped\n")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_unit_of_the_readme_is_confined(tmp_path):
    unit = tmp_path / "etcd_fdw.service"
    unit.write_text(readme_block("systemd"))
    options = ["--offline=true", "--threshold=15", str(unit)]  # 1.5 of 10, which is the worst
    command = ["systemd-analyze", "security", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unrecognized option" in done.stderr:
        pytest.skip("needs systemd 250")
    assert done.returncode == 0, done.stdout[-500:] + done.stderr


# ── faults: etcd and network ─────────────────────────────────────────────────


@pytest.mark.parametrize("fault", ["restart", "kill", "pause"])
def test_etcd_goes_away_under_load(daemon, own_etcd, load, fault):
    running = daemon(*FAST, etcd=own_etcd, query=FAST_ETCD)
    play = load(own_etcd.endpoint)
    play.run(100)
    mark = running.mark()
    if fault == "restart":
        own_etcd.restart()
    elif fault == "kill":
        own_etcd.kill()
        own_etcd.start()
    else:
        own_etcd.pause()
        running.wait_log(r"WARN .*retrying", after=mark)  # longer than every timeout
        running.wait_log(r"WARN .*retrying", after=running.mark())
        own_etcd.resume()
    play.wait_flow()
    play.run(50)
    play.finish()


def test_cluster_loses_leader_endpoint_and_majority(daemon, prefix, own_cluster, load):
    def leads(member: LocalEtcd) -> bool:
        with EtcdClient(member.endpoint) as client:
            answer = client.call(client.maintenance.Status, etcdrpc.StatusRequest())
            return bool(answer.leader == answer.header.member_id)

    first, second, third = sorted(own_cluster, key=leads, reverse=True)
    hosts = ",".join(member.endpoint for member in (first, second, third))
    daemon(*FAST, etcd=etcd_dsn(hosts, prefix) + FAST_ETCD)
    play = load(third.endpoint)
    play.run(50)
    first.kill()  # the leader, and the daemon's endpoint
    play.wait_flow()
    first.launch()
    first.wait_ready()
    second.pause()  # silent, perhaps the leader by now
    play.wait_flow()
    first.kill()  # no majority
    second.resume()
    second.kill()
    play.run(0)
    for member in (first, second):
        member.launch()
    for member in (first, second):
        member.wait_ready()
    play.finish()


@pytest.mark.parametrize("side", ["etcd", "postgres"])
def test_network_fails_under_load(daemon, own_etcd, network, db_network, load, side):
    """It cuts, stalls, refuses, delays and throttles."""
    proxy = network if side == "etcd" else db_network
    daemon(*FAST, **{"etcd": own_etcd, side: proxy}, query=FAST_ETCD)
    play = load(own_etcd.endpoint)
    for fault in (proxy.cut, proxy.cut, proxy.stall, proxy.refuse):
        play.run(30)
        fault()
        play.run(100)
        proxy.resume()
        play.wait_flow()
    proxy.delay(0.05)
    play.run(100)
    proxy.resume()
    proxy.throttle(50_000)
    play.run(100)
    proxy.resume()
    play.finish()


def make_room(client: EtcdClient) -> None:
    """Forget what was superseded or deleted, and let etcd take changes again."""
    client.compact(client.revision())
    client.call(client.maintenance.Defragment, etcdrpc.DefragmentRequest())
    member = client.call(client.maintenance.Status, etcdrpc.StatusRequest()).header.member_id
    alarm = etcdrpc.AlarmRequest(
        action=etcdrpc.AlarmRequest.DEACTIVATE, memberID=member, alarm=etcdrpc.NOSPACE
    )
    client.call(client.maintenance.Alarm, alarm)


# ─ compaction ─


def mirror_once(daemon, client: EtcdClient, prefix: str, *keys: str) -> None:
    """Put these keys and let a daemon mirror them, which then stops."""
    for key in keys:
        client.put(prefix + key, "1")
    daemon(etcd=client).stop()


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_compaction_next_to_the_checkpoint_loses_no_delete(daemon, db, prefix, own_client, offset):
    mirror_once(daemon, own_client, prefix, "before", "doomed")
    checkpoint = scalar(db, "SELECT revision FROM etcd_sync_state")
    own_client.delete(prefix + "doomed")  # at checkpoint + 1
    own_client.compact(checkpoint + offset)
    daemon(*FAST, etcd=own_client)
    wait_equal(db, own_client, prefix)


def test_what_etcd_has_not_compacted_is_not_skipped(daemon, db, prefix, own_client):
    mirror_once(daemon, own_client, prefix, "changed", "deleted")
    checkpoint = own_client.revision()
    own_client.put(prefix + "changed", "2")
    compacted = own_client.put(prefix + "changed", "3")
    with Recorder(own_client, prefix) as recorder:
        own_client.delete(prefix + "deleted")
        own_client.put(prefix + "changed", "4")
        own_client.put(prefix + "deleted", "2")
        own_client.delete(prefix + "deleted")
        own_client.compact(compacted)
        daemon(*FAST, etcd=own_client)
        wait_equal(db, own_client, prefix)
        recorder.sync()
        mirrored = [event for event in mirror_rows(db, prefix) if event.revision > compacted]
        assert mirrored == recorder.history()
    gaps = scalar(db, "SELECT gaps::text FROM etcd_sync_state")
    assert gaps == f'{{"[{checkpoint + 1},{compacted})"}}'
    assert rows(db, "SELECT operation FROM etcd_sync_event ORDER BY id DESC LIMIT 1") == [
        ("resync",)
    ]


# ─ another timeline ─


def restore(server: LocalEtcd, snapshot: Path) -> None:
    """Bring an etcd back to a snapshot; it keeps its cluster id."""
    server.stop()
    shutil.rmtree(server.data_dir)
    program = server.program.with_name("etcdutl")
    if not program.exists():  # before etcd 3.5 it was etcdctl that restored
        program = server.program.with_name("etcdctl")
    command: list[str | Path] = [program, "snapshot", "restore", snapshot]
    options = {
        "name": server.name,
        "initial-cluster": f"{server.name}={server.peer_url}",
        "initial-advertise-peer-urls": server.peer_url,
        "data-dir": server.data_dir,
    }
    command += [f"--{name}={value}" for name, value in options.items()]
    subprocess.run(command, env={**os.environ, "ETCDCTL_API": "3"}, check=True, capture_output=True)
    server.start()


@pytest.mark.parametrize(
    ("how", "where"),
    [
        *itertools.product(["put", "delete", "create and delete"], ["behind", "passed"]),
        ("put", "running"),
        *itertools.product(["put", "delete"], ["compacted"]),  # else nothing is left to tell it by
    ],
)
def test_etcd_restored_from_a_backup(daemon, db, prefix, own_etcd, tmp_path, how, where):
    with EtcdClient(own_etcd.endpoint) as client:
        client.put(prefix + "a", "1")
        client.put(prefix + "b", "1")
        client.snapshot(tmp_path / "backup")
        daemon(etcd=own_etcd).stop()
        running = daemon(*FAST, etcd=own_etcd)
        if how != "delete":
            client.put(prefix + ("a" if how == "put" else "c"), "2")
        if how != "put":
            client.delete(prefix + ("a" if how == "delete" else "c"))
        checkpoint = client.revision()
        wait_until("not there", lambda: mirror_rows(db, prefix)[-1].revision == checkpoint)
        if where != "running":
            running.stop()
        sql = "SELECT cluster_id, revision, last_revision, gaps FROM etcd_sync_state"
        before, state = mirror_rows(db, prefix), rows(db, sql)
        restore(own_etcd, tmp_path / "backup")
    with EtcdClient(own_etcd.endpoint) as client:  # the connection of the other may look alive
        while where in ("passed", "compacted") and client.revision() < checkpoint + 5:
            client.put(prefix + "b", "other")
        if where == "compacted":
            client.compact(client.revision())
    refused = running if where == "running" else daemon(*FAST, etcd=own_etcd, ready=False)
    assert refused.wait_exit() == 4
    assert "another etcd timeline" in refused.log()
    assert "sync --reset" in refused.log()
    assert mirror_rows(db, prefix) == before
    assert rows(db, sql) == state


@pytest.mark.parametrize("limit", ["", "etcd_fdw.PROOF_REVISIONS = 0"], ids=["few", "many"])
@pytest.mark.parametrize("known", ["copied", "watched"])
@pytest.mark.parametrize("then", ["nothing", "put", "delete", "put and delete", "too late"])
def test_what_a_restored_etcd_did_instead_is_found(
    daemon, db, prefix, own_etcd, tmp_path, limit, known, then
):
    with EtcdClient(own_etcd.endpoint) as client:
        client.put(prefix + "a", "1")
        if known == "watched":
            daemon(etcd=client).stop()
        client.put("elsewhere", "1")
        client.snapshot(tmp_path / "backup")
        for number in range(9):
            client.put("elsewhere", str(number))
        daemon(etcd=client).stop()
        checkpoint = client.revision()
        if known == "watched":  # as after a progress notification
            rows(db, "UPDATE etcd_sync_state SET revision = %s", checkpoint)
        restore(own_etcd, tmp_path / "backup")
    with EtcdClient(own_etcd.endpoint) as client:
        if "put" in then:
            client.put(prefix + "b", "other")
        if "delete" in then:
            client.delete(prefix + ("b" if "put" in then else "a"))
        while client.revision() < checkpoint + 5:
            client.put("elsewhere", "other")
        before = rows(db, EVERYTHING)
        options = {"etcd": client, "script": altered_script(tmp_path, limit), "ready": False}
        one = daemon(*FAST, **options)
        # what left no trace is seen by the watch, and by nobody if the mirror does not claim it
        fine = then in ("nothing", "too late") or (
            then == "put and delete" and (known == "copied" or bool(limit))
        )
        if fine:
            client.put(prefix + "new", "1")
            one.wait_log("watching")
            wait_until("not mirrored", arrives(db, prefix + "new"))
            return
    assert one.wait_exit() == 4
    assert "another etcd timeline" in one.log()
    assert rows(db, EVERYTHING) == before


def test_nothing_is_sent_to_a_restored_etcd_that_compacted_the_checkpoint(
    daemon, db, prefix, own_etcd, tmp_path
):
    with EtcdClient(own_etcd.endpoint) as client:
        client.put(prefix + "a", "1")
        client.snapshot(tmp_path / "backup")
        revision = client.put(prefix + "a", "2")
        daemon(etcd=own_etcd).stop()
        ask(db, prefix + "a", revision=revision)
        restore(own_etcd, tmp_path / "backup")
    with EtcdClient(own_etcd.endpoint) as client:
        assert client.put(prefix + "a", "other") == revision  # the comparison would not tell
        client.compact(client.put("elsewhere", "1"))
        assert daemon(*FAST, etcd=own_etcd, ready=False).wait_exit() == 4
        assert client.get(prefix + "a").value == b"other"
    assert scalar(db, "SELECT status FROM etcd_wal") == "pending"


def test_timeline_is_proved_by_who_may_only_read(daemon, db, secure_etcd, tmp_path):
    reader = etcd_dsn(secure_etcd.endpoint, "/t/", "reader", "secret")
    count = altered_script(tmp_path, "etcd_fdw.PROOF_REVISIONS = 0; etcd_fdw.PROOF_BYTES = 5000")
    with secure_etcd.enable_auth() as root:
        add_etcd_user(root, "reader", "secret", "/t/", kind=READ)
        for number in range(50):
            root.put(f"/t/{number}", "1")
        root.put("/u", "1")
        daemon(*FAST, etcd=reader).stop()
        root.put("/t/a", "1")
        daemon(*FAST, etcd=reader, script=count)
        wait_equal(db, root, "/t/")


def test_postgres_restored_from_a_backup_catches_up(daemon, db, prefix, etcd, recorder):
    etcd.put(prefix + "a", "1")
    daemon().stop()
    tables = ("etcd", "etcd_sync_state")
    for table in tables:
        rows(db, f"CREATE TABLE backup_{table} AS TABLE {table}")
    one = daemon()
    etcd.put(prefix + "b", "1")
    assert_same(recorder, db, prefix)
    one.stop()
    for table in tables:
        rows(db, f"DELETE FROM {table}; INSERT INTO {table} TABLE backup_{table}")
    daemon()
    assert_same(recorder, db, prefix)


# ─ exclude ─


def whole_dump(db: str) -> str:
    """All that is in the database's tables, as text."""
    tables = "SELECT oid::regclass::text FROM pg_class WHERE relkind = 'r' AND oid >= 16384"
    return str([rows(db, f"SELECT t::text FROM {table} t") for (table,) in rows(db, tables)])


def assert_no_trace(db: str, *logs: str) -> None:
    """No value of an excluded key is anywhere: all of them have this in them."""
    for text in (whole_dump(db), *logs):
        assert "hush" not in text
        assert b"hush".hex() not in text


def test_excluded_keys_leave_no_trace(daemon, command, db, prefix, own_client):
    secret, put = prefix + "secret/", own_client.put
    options = {"etcd": own_client, "query": f"?exclude={secret}&exclude={prefix}events/"}
    dsn = dsn_of(own_client, prefix) + options["query"]
    for key in (prefix + "a", prefix + "secret", prefix + "secret0"):
        put(key, "seen")
    put(secret + "a", "hush")
    put(secret.encode() + b"\xff", "hush")
    lines = ("-l", "debug", "--audit", "all")
    logs = [one := daemon(*lines, **options)]
    put(secret + "b", "hush", own_client.grant(60))
    put(prefix + "events/1", "hush")
    put(secret.encode() + b"\xfe", "hush")
    own_client.txn([own_client.put_op(secret + "c", "hush"), own_client.put_op(prefix + "b", "1")])
    own_client.delete(secret + "a")
    put(prefix + "b", "2")
    seen = {kv.key: kv for kv in own_client.range(prefix).kvs if b"hush" not in kv.value}
    expected = {key: (kv.value, kv.mod_revision) for key, kv in seen.items()}
    wait_until("not mirrored", lambda: live(db, prefix) == expected)
    one.stop()
    put(secret + "d", "hush")
    put("elsewhere", "1")
    own_client.compact(own_client.revision())  # a resync
    logs.append(one := daemon(*lines, **options))
    wait_until("no resync", lambda: "copied 4 keys" in one.log())
    one.stop()
    rows(db, f"UPDATE etcd_sync_state SET unrepaired = true; {OLD_MIRROR}")
    logs.append(daemon(*lines, **options))
    found = comparison_of(command, "--fix", etcd=dsn)
    assert (found["equal"], found["keys"], found["unstorable"]) == (True, 4, 0)
    assert live(db, prefix) == expected
    assert_no_trace(db, *(log.log() for log in logs))
    done = command("validate", etcd=own_client, exit_code=1)
    assert f"this mirror excludes {prefix}events/, {secret}" in done.stderr


@pytest.mark.parametrize("compacted", [False, True])
def test_what_is_excluded_may_change(daemon, db, prefix, own_client, compacted):
    secret = {"etcd": own_client, "query": f"?exclude={prefix}secret/"}
    own_client.put(prefix + "a", "1")
    own_client.put(prefix + "secret/a", "old")
    daemon(**secret).stop()
    own_client.put(prefix + "secret/a", "hush")
    own_client.put(prefix.encode() + b"secret/\xff", "hush")
    known = scalar(db, "SELECT revision FROM etcd_sync_state")
    if compacted:
        own_client.compact(own_client.revision())
    one = daemon(etcd=own_client)
    assert "this mirror excludes nothing now" in one.log()
    wait_until("not mirrored", lambda: live(db, prefix + "secret/"))
    own_client.put(prefix + "b", "1")
    wait_until("not mirrored", arrives(db, prefix + "b"))
    assert {key for key, *_ in rows(db, SIX_FIELDS, prefix, 2**62)} == {
        (prefix + key).encode() for key in ("a", "b", "secret/a")
    }
    refused("22023", db, "SELECT etcd_at(%s)", known - 1)  # nobody knows what was there
    one.stop()
    two = daemon(**secret)
    assert re.search(r"excludes \S+/secret/ now: dropped [12] row", two.log())
    assert set(live(db, prefix)) == {(prefix + key).encode() for key in "ab"}
    assert_no_trace(db, two.log())


# ─ much at once ─


def test_catch_up_of_much_with_slow_postgres(daemon, db, prefix, own_client, db_network):
    mirror_once(daemon, own_client, prefix)
    with Recorder(own_client, prefix) as recorder:
        for n in range(10, 40):
            own_client.put(f"{prefix}{n % 20}", str(n) * 700_000)
        db_network.throttle(30_000_000)
        running = daemon(etcd=own_client, postgres=db_network)
        assert_same(recorder, db, prefix)
        assert peak_mib(running.pid) < 250


def test_large_changes_wait_for_etcd_not_in_memory(daemon, db, prefix, own_client):
    daemon(etcd=own_client).stop()
    sql = "SELECT etcd_set(%s || n %% 20, repeat(n::text, 350000)) FROM generate_series(10, 69) n"
    rows(db, sql, prefix)
    running = daemon(etcd=own_client)
    assert statuses(db) == ["success"] * 60
    assert peak_mib(running.pid) < 250
    wait_equal(db, own_client, prefix)


def bulk(client: EtcdClient, prefix: str, count: int) -> None:
    """Make many revisions of one change each, many calls at a time."""
    done: collections.deque[Any] = collections.deque()
    for n in range(count):
        request = etcdrpc.PutRequest(key=f"{prefix}{n % 1000}".encode(), value=str(n).encode())
        done.append(client.kv.Put.future(request, timeout=60))
        if len(done) > 200:
            done.popleft().result()
    while done:
        done.popleft().result()


# ─ the clock ─


@pytest.fixture
def fake_clock() -> Iterator[tuple[Path, dict[str, str]]]:
    """A file that says how far off the clock is, and the environment that makes it so."""
    libraries = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not libraries:
        pytest.skip("no libfaketime (Debian: apt install libfaketime)")
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)  # for servers, whatever their account is
        clock = Path(directory, "clock")
        clock.write_text("+0")
        yield (
            clock,
            {
                "LD_PRELOAD": str(libraries[0]),
                "FAKETIME_TIMESTAMP_FILE": str(clock),
                "FAKETIME_NO_CACHE": "1",
                "DONT_FAKE_MONOTONIC": "1",
            },
        )


def test_clock_steps_do_not_matter(daemon, load, fake_clock):
    clock, env = fake_clock
    running = daemon(*FAST, env=env)
    play = load()
    for step in ("+400d", "-400d"):
        clock.write_text(step)
        play.run(50)
        play.wait_flow()
    play.finish()
    assert "retrying" not in running.log()


def test_wait_ends_though_the_clock_of_postgres_steps_back(
    daemon, prefix, etcd, fake_clock, monkeypatch
):
    clock, env = fake_clock
    with ExitStack() as stack:
        with monkeypatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            db = stack.enter_context(LocalPostgres()).dsn()
        daemon("--push", "off", postgres=db)
        rows(db, "SELECT etcd_set(%s, 'v')", prefix + "a")
        pool = stack.enter_context(ThreadPoolExecutor(1))
        waiting = pool.submit(refused, "57014", db, "SELECT etcd_wait(1, '2 s')")
        wait_until("nobody waits", lambda: blocked(db))
        clock.write_text("-1d")
        wait_until("it still waits", lambda: etcd.put(prefix + "b", "v") and waiting.done())
        assert "change 1" in waiting.result().message_primary


# ── faults: PostgreSQL ───────────────────────────────────────────────────────


def crash(server: LocalPostgres) -> None:
    server.kill()
    server.start()


def test_nothing_is_lost_when_postgres_fails_under_load(daemon, own_postgres, load):
    started = daemon(*FAST, postgres=own_postgres.dsn())
    play = load(postgres=own_postgres.dsn())
    for fault in (own_postgres.restart, partial(crash, own_postgres)):
        play.run(50)
        fault()
    play.run(50)
    for _ in range(5):
        wait_until("the daemon has no session", lambda: end_sessions(own_postgres.dsn()))
    play.run(50)
    sql = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity"
    for _ in range(50):
        rows(own_postgres.dsn(), sql + " WHERE application_name LIKE 'etcd_fdw%'")
    play.run(50)
    play.finish()
    assert started.stop() == 0


SLOW_INSERT = """
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN PERFORM pg_sleep(0.05); RETURN NEW; END $$;
CREATE TRIGGER slow BEFORE INSERT ON etcd FOR EACH ROW EXECUTE FUNCTION slow();
"""


@contextmanager
def streaming_standby(primary: LocalPostgres) -> Iterator[tuple[LocalPostgres, Proxy, str]]:
    """An asynchronous standby, the network that its stream takes, and a DSN of the two."""
    primary.stop()
    with ExitStack() as stack:
        standby = LocalPostgres()
        stack.callback(standby.close)
        stream = stack.enter_context(Proxy(f"127.0.0.1:{primary.port}"))
        subprocess.run(["cp", "-aT", primary.data_dir, standby.data_dir], check=True)
        primary.start()
        (standby.data_dir / "standby.signal").touch()
        with (standby.data_dir / "postgresql.auto.conf").open("a") as file:
            file.write(f"primary_conninfo = 'host=127.0.0.1 port={stream.port} user=postgres'\n")
        standby.start()
        both = f"127.0.0.1:{primary.port},127.0.0.1:{standby.port}"
        yield (
            standby,
            stream,
            f"postgresql://postgres@{both}/postgres?target_session_attrs=read-write",
        )


def test_status_and_waiting_on_a_standby(daemon, command, own_postgres, etcd, prefix):
    with streaming_standby(own_postgres) as (standby, _, _), ThreadPoolExecutor() as pool:
        one = daemon(postgres=own_postgres.dsn())
        copied = "SELECT 1 FROM etcd_sync_state WHERE heartbeat_at IS NOT NULL"
        there = "SELECT to_regclass('etcd_sync_state')"
        wait_until("not replayed", lambda: scalar(standby.dsn(), there))
        wait_until("not replayed", lambda: rows(standby.dsn(), copied))
        found = status_of(command, postgres=standby.dsn())
        assert (found["postgresql"]["reachable"], found["postgresql"]["standby"]) == (True, True)
        assert (found["problems"], found["pid"]) == ([], one.pid)
        assert ", a standby: " in " ".join(command("status", postgres=standby.dsn()).stdout.split())
        newer = etcd.revision() + 1
        waiter = pool.submit(scalar, standby.dsn(), f"SELECT etcd_wait_revision({newer}, '90 s')")
        wait_until("nobody waits", lambda: scalar(standby.dsn(), SLEEPING))
        etcd.put(prefix + "a", "1")
        assert waiter.result(timeout=WAIT_S) == newer
        one.stop()
        wait_until("not replayed", lambda: not rows(standby.dsn(), copied))
        done = command("status", "--check", postgres=standby.dsn())
        assert (done.returncode, done.stdout) == (2, "no instance is active\n")


def test_lock_on_etcd_is_not_waited_for_for_ever(daemon, db, etcd, recorder, prefix):
    """Who waits in the lock queue holds up everybody behind: the DBA must get a chance."""
    started = daemon(*FAST, postgres=make_dsn(db, options="-clock_timeout=300ms"))
    with session(db, "BEGIN; LOCK TABLE etcd IN EXCLUSIVE MODE") as cur:
        etcd.put(prefix + "a", "1")
        started.wait_log(r"WARN .*lock timeout.*retrying")
        cur.execute("COMMIT")
    assert_same(recorder, db, prefix)


def test_second_signal_ends_at_once_while_a_lock_is_waited_for(daemon, db, etcd, prefix):
    started = daemon(*FAST)
    with session(db, "BEGIN; LOCK TABLE etcd IN EXCLUSIVE MODE"):
        etcd.put(prefix + "a", "1")
        wait_until("the daemon does not wait", lambda: daemon_waits_on(db, "relation"))
        started.signal(signal.SIGTERM)
        started.signal(signal.SIGINT)
        assert started.wait_exit(8) == 0  # one signal would take 10 s


def test_takeover_from_a_killed_daemon_whose_statement_goes_on(daemon, db, etcd, prefix):
    first = daemon(*FAST)
    # PostgreSQL 13 notices that its client is gone when the statement is done, not before
    rows(db, SLOW_INSERT.replace("0.05", "60" if version(db) >= 14 else "5"))
    etcd.put(prefix + "a", "1")
    wait_until("the daemon does not copy", lambda: daemon_waits_on(db, "PgSleep"))
    first.kill()
    daemon(*FAST)  # ready: it has the lock


def test_settings_of_the_database_do_not_apply(daemon, db, etcd, recorder, prefix):
    name = scalar(db, "SELECT current_database()")  # the session of rows() keeps its own settings
    for assignment in (
        "statement_timeout = '1s'",  # which also holds for the session's first statements
        "idle_in_transaction_session_timeout = '1s'",
        "array_nulls = off",
        "default_transaction_isolation = 'serializable'",
    ):
        rows(db, f"ALTER DATABASE {name} SET {assignment}")
    started = daemon(*FAST)
    check = "current_setting('transaction_isolation') = 'read committed'"
    rows(db, SLOW_INSERT + f"ALTER TABLE etcd ADD CHECK ({check})")
    rows(db, "SELECT etcd_delete(%s)", prefix + "a")  # success without a revision
    rows(db, "SELECT etcd_set(%s, '1')", prefix + "b")
    assert statuses(db) == ["success"] * 2
    etcd.txn([etcd.put_op(f"{prefix}{n}", "1") for n in range(40)])
    assert_same(recorder, db, prefix)
    assert "WARN" not in started.log()


def test_crash_of_a_postgres_that_commits_asynchronously(daemon, prefix, etcd):
    with LocalPostgres(["-c", "synchronous_commit=off", "-c", "wal_writer_delay=10s"]) as server:
        db = server.dsn()
        daemon(*FAST, postgres=db)
        rows(db, "SET synchronous_commit = on")
        rows(db, "INSERT INTO etcd_wal (key, value) VALUES (%s, 'mine')", prefix + "a")
        sent = wait_until("nothing was sent", lambda: etcd.get(prefix + "a")).mod_revision
        crash(server)
        assert ended(db, 1).outcome == ("success", sent)


def test_housekeeping_spares_what_a_pending_change_was_made_on(daemon, db, prefix):
    one = daemon()
    for key in "ab":
        apply_change(db, prefix + key)
    one.stop()
    ask(db, prefix + "a", depends_on=1)
    one = daemon("--wal-retention", "0s", "--push", "off", "-l", "debug")
    one.wait_log("housekeeping deleted 1 rows of etcd_wal$")
    assert rows(db, "SELECT id FROM etcd_wal ORDER BY id") == [(1,), (3,)]


# ── faults: bulkheads ────────────────────────────────────────────────────────


@contextmanager
def others_go_on(one: Daemon, db: str, client: EtcdClient, prefix: str) -> Iterator[None]:
    """Whatever the block does, both directions serve others, in the session that there is."""
    yield
    client.put(f"{prefix}others/theirs", "goes on")
    wait_until("the mirror stands still", arrives(db, f"{prefix}others/theirs"))
    rows(db, "SELECT etcd_set(%s, 'goes on')", f"{prefix}others/mine")
    assert ended(db, f"{prefix}others/mine").status == "success"
    assert "retrying" not in one.log()


INSERT = "INSERT INTO etcd_wal (key, value, {0}) VALUES (%s, 'mine', {1}) RETURNING id"


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("ttl", "interval '300 years'", "too large lease TTL"),
        ("ttl", "interval '-178000000 years'", "below zero"),
        ("ttl", "interval '178000000 years'", "too large lease TTL"),
        ("ts", "'infinity'", "its ts is no time"),
        ("ts", "'-infinity'", "its ts is no time"),
        ("ts", "'294276-12-31'", "its ts is no time"),
        ("revision", "-7", "below zero"),
        ("action", "'no such'", "no action 'no such'"),
    ],
)
def test_one_bad_row_fails_alone(daemon, db, prefix, etcd, column, value, reason):
    one = daemon(*FAST)
    with others_go_on(one, db, etcd, prefix):
        rows(db, "SELECT etcd_set(%s, 'innocent')", prefix + "innocent")
        id_ = scalar(db, INSERT.format(column, value), prefix + "bad")
        assert statuses(db) == ["success", "failed"]
        message = scalar(db, "SELECT error_message FROM etcd_wal WHERE id = %s", id_)
        assert reason in message
    one.wait_log(f"WARN change {id_} to {prefix}bad failed: ")
    assert scalar(db, "SELECT last_error FROM etcd_sync_state") is None


@pytest.mark.parametrize("column", ["value", "value_bytes"])
def test_value_beyond_what_any_etcd_takes_fails_unread(daemon, db, prefix, etcd, column):
    made = {
        "value": "repeat('鍵', 12000000)",
        "value_bytes": "decode(repeat('00', 36000000), 'hex')",
    }
    one = daemon(*FAST)
    before = peak_mib(one.pid)
    with others_go_on(one, db, etcd, prefix):
        sql = f"INSERT INTO etcd_wal (key, {column}) VALUES (%s, {made[column]}) RETURNING id"
        row = ended(db, scalar(db, sql, prefix + "large"))
        assert (row.status, "36000000 bytes" in str(row.error_message)) == ("failed", True)
    assert peak_mib(one.pid) < before + 30


@pytest.mark.parametrize(
    ("text", "size", "count"),
    [("漢", 300_000, 2), ("🐘", 9_000, 50), ("ä", 9_000, 90), ("a", 30_000, 90)],
)
def test_sizes_are_bytes(daemon, db, prefix, etcd, text, size, count):
    one = daemon(*FAST)
    with others_go_on(one, db, etcd, prefix):
        sql = "INSERT INTO etcd_wal (key, value) SELECT %s || i, repeat(%s, %s) "
        rows(db, sql + "FROM generate_series(1, %s) i", prefix, text, size, count)
        assert statuses(db) == ["success"] * count


def test_server_with_a_lower_limit_of_operations_fails_nothing(daemon, db, prefix, etcd):
    one = daemon("--max-txn-ops", "1000", *FAST)
    with others_go_on(one, db, etcd, prefix):
        sql = "INSERT INTO etcd_wal (key, value) SELECT %s || i, i FROM generate_series(1, %s) i"
        rows(db, sql, prefix + "small/", 100)
        in_transactions_of_their_own(db, 300, f"INSERT INTO etcd_wal (key) VALUES ('{prefix}%s')")
        rows(db, sql, prefix + "large/", 500)
        assert set(statuses(db)) == {"success"}
    one.wait_log("WARN etcd takes fewer operations in a transaction than --max-txn-ops 1000")
    whole = "SELECT count(DISTINCT result_revision) FROM etcd_wal WHERE starts_with(key, %s)"
    assert scalar(db, whole, prefix + "small/") == 1


def test_transaction_that_expects_something_is_never_split(daemon, db, prefix, etcd):
    one = daemon("--max-txn-ops", "1000", *FAST)
    with others_go_on(one, db, etcd, prefix):
        for size, status in [(60, "success"), (300, "failed"), (7000, "failed")]:
            with session(db, "BEGIN") as cur:
                cur.execute("SELECT etcd_expect(%s, 0)", (f"{prefix}absent",))
                sql = "SELECT etcd_set(%s || i, 'x') FROM generate_series(1, %s) i"
                cur.execute(sql, (f"{prefix}{size}/", size))
                cur.execute("COMMIT")
            assert statuses(db)[-size - 1 :] == [status] * (size + 1)
            assert len(etcd.range(f"{prefix}{size}/").kvs) == (size if status == "success" else 0)


@pytest.mark.parametrize("objection", ["trigger", "foreign key", "lock"])
def test_chore_that_is_refused_is_a_warning(daemon, db, prefix, etcd, objection):
    one = daemon(*FAST)
    apply_change(db, prefix + "old")
    one.stop()
    said, kept = "", "0s"
    with ExitStack() as stack:
        if objection == "trigger":
            refuse(db, "DELETE", "etcd_wal")
            said = "not now"
        elif objection == "foreign key":
            rows(db, "CREATE TABLE mine (id bigint CONSTRAINT mine_fk REFERENCES etcd_wal (id))")
            rows(db, "INSERT INTO mine SELECT id FROM etcd_wal")
            said = "mine_fk"
        else:
            stack.enter_context(session(db, "BEGIN", "LOCK etcd_sync_event IN SHARE MODE"))
            rows(db, "UPDATE etcd_wal SET dismissed_at = now()")
            kept = "1h"  # nothing refuses to delete it
        one = daemon("--wal-retention", kept, "--audit-retention", "0s", *FAST)
        with others_go_on(one, db, etcd, prefix):
            if said:
                one.wait_log(f"WARN .*etcd_wal.*{said}")
        assert one.log().count("WARN") <= 1


def test_corrupt_etcd_keeps_changes_waiting(daemon, db, own_etcd, own_client):
    one = daemon(*FAST, etcd=etcd_dsn(own_etcd.endpoint, "/x/"))
    apply_change(db, "/x/first")
    member = own_client.call(
        own_client.maintenance.Status, etcdrpc.StatusRequest()
    ).header.member_id
    alarm = partial(etcdrpc.AlarmRequest, memberID=member, alarm=2)  # CORRUPT
    own_client.call(own_client.maintenance.Alarm, alarm(action=etcdrpc.AlarmRequest.ACTIVATE))
    rows(db, SET, "/x/waits")
    one.wait_log('ERROR .*corrupt cluster.*changes wait, see "etcdctl alarm list"')
    assert wal_rows(db)[-1].status == "pending"
    own_client.call(own_client.maintenance.Alarm, alarm(action=etcdrpc.AlarmRequest.DEACTIVATE))
    assert ended(db, "/x/waits").status == "success"
    assert "retrying" not in one.log()


def test_unexpected_exception_is_a_new_session(daemon, db, prefix, etcd, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import threading, os\n"
        "start, failed = threading.Thread.start, []\n"
        "def once(self):\n"
        "    if self.name == 'watch' and not failed:\n"
        "        failed.append(1)\n"
        '        raise RuntimeError("can\'t start new thread")\n'
        "    start(self)\n"
        "threading.Thread.start = once\n"
    )
    one = daemon(*FAST, env={"PYTHONPATH": str(tmp_path)}, ready=False)
    one.wait_log(
        r"ERROR internal error: RuntimeError: can't start new thread \(line \d+\); retrying"
    )
    etcd.put(prefix + "a", "1")
    wait_until("it did not go on", arrives(db, prefix + "a"))


def test_no_file_descriptors_are_waited_out(daemon, db, prefix, own_etcd, own_client):
    one = daemon(*FAST, etcd=own_etcd)
    usual = resource.prlimit(one.pid, resource.RLIMIT_NOFILE)
    in_use = len(list(Path(f"/proc/{one.pid}/fd").iterdir()))
    resource.prlimit(one.pid, resource.RLIMIT_NOFILE, (in_use + 3, usual[1]))
    end_sessions(db)
    one.wait_log("WARN Too many open files: raise the limit .*; retrying in")
    resource.prlimit(one.pid, resource.RLIMIT_NOFILE, usual)
    own_client.put(prefix + "a", "1")
    wait_until("it did not go on", arrives(db, prefix + "a"))


def test_synchronous_standby_that_is_away_holds_up_nothing(daemon, own_postgres, prefix, etcd):
    db = own_postgres.dsn()
    one = daemon(*FAST, postgres=db)
    rows(db, "ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    rows(db, "SELECT pg_reload_conf()")
    with session(db, "SET synchronous_commit = local") as cur:
        cur.execute("SELECT etcd_set(%s, '1')", (prefix + "a",))
        wait_until("not applied", lambda: etcd.get(prefix + "a"))
        etcd.put(prefix + "b", "1")
        wait_until("not mirrored", arrives(db, prefix + "b"))
        cur.execute("SELECT status FROM etcd_wal")
        assert cur.fetchall() == [("success",)]
    assert "WARN" not in one.log()


def test_outcome_of_a_row_that_somebody_has_locked_waits_alone(daemon, db, prefix, etcd):
    one = daemon(*FAST)
    with frozen_mirror(db):
        id_ = scalar(db, "SELECT etcd_set(%s, '1')", prefix + "locked")
        holder = connect(db)
        holder.cursor().execute("BEGIN; SELECT FROM etcd_wal WHERE id = %s FOR UPDATE", (id_,))
    with others_go_on(one, db, etcd, prefix):
        wait_until("it was not applied", lambda: etcd.get(prefix + "locked"))
    assert wal_rows(db, id_=id_)[0].status == "pending"
    revision = revision_of(etcd, prefix + "locked")
    one.kill()  # the next one knows what became of it, and does not send it again
    etcd.delete(prefix + "locked")
    one = daemon(*FAST)
    with others_go_on(one, db, etcd, prefix + "again/"):
        pass
    holder.cursor().execute("COMMIT")
    row = ended(db, id_)
    assert (row.status, row.result_revision) == ("success", revision)
    assert etcd.get(prefix + "locked") is None
    assert scalar(db, "SELECT deferred FROM etcd_sync_state") == []


def test_change_on_top_of_one_whose_outcome_waits_is_applied(daemon, db, prefix, etcd):
    one = daemon(*FAST)
    put, deleted = prefix + "put", prefix + "deleted"
    etcd.put(deleted, "1")
    wait_until("not mirrored", arrives(db, deleted))
    with session(db, "BEGIN") as holder:
        with frozen_mirror(db):
            rows(db, "SELECT etcd_set(%s, '2'), etcd_delete(%s)", put, deleted)
            holder.execute("SELECT FROM etcd_wal FOR UPDATE")
        sql = "SELECT jsonb_array_length(deferred) FROM etcd_sync_state"
        wait_until("no outcome waits", lambda: scalar(db, sql) == 2)
        one.kill()
        for key in (put, deleted):
            rows(db, "SELECT etcd_set(%s, '3')", key)
        daemon(*FAST)
        wait_until("not applied", lambda: [kv.value for kv in etcd.range(prefix).kvs] == [b"3"] * 2)
    assert statuses(db) == ["success"] * 4


@pytest.mark.parametrize("body", ["RAISE 'not now'", "RETURN NULL"])
def test_outcome_that_a_trigger_refuses_waits_alone(daemon, db, prefix, etcd, body):
    one = daemon(*FAST)
    refuse(db, "UPDATE", "etcd_wal", when="WHEN (NEW.value = 'refused')")
    function = "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
    rows(db, f"{function} $$ BEGIN {body}; END $$")
    with others_go_on(one, db, etcd, prefix):
        with session(db, "BEGIN") as cur:
            for n, value in enumerate(["fine", "refused", "fine", "fine"]):
                cur.execute("SELECT etcd_set(%s, %s, force => true)", (f"{prefix}{n}", value))
            cur.execute("COMMIT")
        one.wait_log("WARN .*(not now|no UPDATE).*the outcome of change")
        assert [ended(db, f"{prefix}{n}").status for n in (0, 2, 3)] == ["success"] * 3
    rows(db, "DROP TRIGGER refuse ON etcd_wal")
    assert set(statuses(db)) == {"success"}
    assert etcd.get(prefix + "1").version == 1  # it was not sent again


def test_lock_on_the_table_of_changes_holds_up_no_mirror(daemon, db, prefix, etcd):
    daemon(*FAST)
    apply_change(db, prefix + "first")
    with session(db, "BEGIN", "LOCK etcd_wal"):
        for key in "abcd":
            etcd.put(prefix + key, "1")
            wait_until("the mirror stands still", arrives(db, prefix + key), 15)
            time.sleep(1)  # for the next poll to meet the lock
    apply_change(db, prefix + "last")


def test_audit_that_a_trigger_refuses_holds_up_only_what_it_is_about(daemon, db, prefix, etcd):
    one = daemon(*FAST)
    refuse(db, "INSERT", "etcd_sync_event")
    one.kill()
    one = daemon(*FAST)
    one.wait_log("WARN not recorded in etcd_sync_event: .*not now")
    with others_go_on(one, db, etcd, prefix):
        etcd.put(prefix.encode() + b"\xff", "no table can hold this key")
        rows(db, INSERT.format("revision", "77"), prefix + "conflict")
        one.wait_log("WARN .*not now.*the outcome of change 1 waits")
    rows(db, "DROP TRIGGER refuse ON etcd_sync_event")
    assert ended(db, 1).status == "conflict"


def test_outcome_goes_to_the_row_that_was_sent(daemon, db, prefix, own_etcd, own_client, network):
    daemon(*FAST, etcd=f"etcd://{network.endpoint}{prefix}?request_timeout=60s")
    apply_change(db, prefix + "first")
    rows(db, "TRUNCATE etcd_wal RESTART IDENTITY")
    keep_back(network, db, SET, prefix + "sent")
    rows(db, "TRUNCATE etcd_wal RESTART IDENTITY")
    id_ = scalar(db, "SELECT etcd_set(%s, 'other')", prefix + "other")
    deliver(network, own_etcd)
    row = ended(db, id_)
    assert (row.id, row.status) == (1, "success")
    assert row.result_revision == revision_of(own_client, prefix + "other")
    assert revision_of(own_client, prefix + "sent") < row.result_revision


def test_role_that_is_narrowed_for_a_moment_fails_nothing(daemon, db, secure_etcd):
    client = secure_etcd.enable_auth()
    one = daemon(*FAST, etcd=secure_etcd.dsn())
    apply_change(db, "/t/first")
    revoke = etcdrpc.AuthRoleRevokePermissionRequest(
        role="fdw", key=b"/t/", range_end=prefix_end("/t/")
    )
    client.call(client.auth.RoleRevokePermission, revoke)
    permit(client, "fdw", READ, "/t/")
    rows(db, SET, "/t/waits")
    one.wait_log("ERROR .*permission denied.*changes wait")
    assert wal_rows(db)[-1].status == "pending"
    permit(client, "fdw", READWRITE, "/t/")
    assert ended(db, "/t/waits").status == "success"


@pytest.mark.parametrize("privilege", ["SELECT", "UPDATE"])
def test_missing_grant_for_changes_leaves_the_mirror_alone(
    daemon, db, roles, privilege, own_client
):
    roles("GRANT")
    narrow = f"daemon_{RUN_ID}"
    one = daemon(
        *FAST, postgres=make_dsn(db, user=narrow), etcd=f"etcd://{own_client.endpoint}/app/"
    )
    rows(db, f"REVOKE {privilege} ON etcd_wal FROM {narrow}")
    rows(db, SET, "/app/waits")
    one.wait_log("(ERROR|WARN) .*permission denied for table etcd_wal")
    own_client.put("/app/theirs", "goes on")
    wait_until("the mirror stands still", arrives(db, "/app/theirs"))
    rows(db, f"GRANT {privilege} ON etcd_wal TO {narrow}")
    assert ended(db, "/app/waits").status == "success"
    assert "retrying" not in one.log()


def test_many_changes_outside_every_prefix_delay_none(daemon, db, prefix):
    daemon("--poll-interval", "50ms")
    rows(db, "ALTER TABLE etcd_wal DISABLE TRIGGER etcd_wal_notify")

    def took(n: int) -> float:
        started = time.monotonic()
        sql = "INSERT INTO etcd_wal (key, value) VALUES (%s, '1') RETURNING id"
        id_, status = scalar(db, sql, f"{prefix}{n}"), "SELECT status FROM etcd_wal WHERE id = %s"
        wait_until("it stays pending", lambda: scalar(db, status, id_) == "success")
        return time.monotonic() - started

    before = statistics.median(took(n) for n in range(20))
    sql = "INSERT INTO etcd_wal (key) SELECT 'outside/' || i FROM generate_series(1, 200000) i"
    rows(db, sql)
    rows(db, "ANALYZE etcd_wal")
    after = statistics.median(took(n) for n in range(20, 40))
    assert after < 2 * before + 0.15, (before, after)


def test_transactions_that_overlap_are_applied_in_an_order_that_can_have_happened(
    daemon, db, prefix, etcd
):
    daemon(*FAST).stop()
    a, b, k = (prefix + name for name in "abk")
    with session(db, "BEGIN") as first, session(db, "BEGIN") as second:
        first.execute("SELECT etcd_set(%s, 'first')", (a,))
        for key in (k, b):
            second.execute("SELECT etcd_set(%s, 'second')", (key,))
        second.execute("COMMIT")
        first.execute("SELECT etcd_set(%s, 'first')", (k,))
        first.execute("COMMIT")
    daemon(*FAST)
    assert statuses(db) == ["success"] * 4
    assert [etcd.get(key).value for key in (a, b, k)] == [b"first", b"second", b"first"]
    assert revision_of(etcd, a) == revision_of(etcd, k)


RPCTYPES = {  # what each of etcd's messages stops; source: rpctypes/error.go of 3.7.3
    Room.CHANGE: """
        InvalidArgument: duplicate key given in txn request, key is not provided, key not found,
            lease is provided, request is too large, too many operations in txn request,
            value is provided, invalid client api version
        NotFound: requested lease not found
        OutOfRange: too large lease TTL
        FailedPrecondition: lease already exists""",
    Room.PUSH: """
        ResourceExhausted: mvcc: database space exceeded, too many requests
        Unavailable: leader changed, no leader, request timed out,
            request timed out possibly due to connection lost,
            request timed out waiting for the applied index took too long
        DataLoss: corrupt cluster
        PermissionDenied: permission denied
        Unimplemented: unsupported operations in txn request""",
    Room.SESSION: """
        OutOfRange: mvcc: required revision has been compacted,
            mvcc: required revision is a future revision
        InvalidArgument: revision of auth store is old, user name is empty,
            authentication failed
        Unauthenticated: invalid auth token
        Unavailable: server stopped, unhealthy cluster
        Canceled: request canceled, watch canceled
        DeadlineExceeded: context deadline exceeded
        FailedPrecondition: not capable, not leader, rpc not supported for learner
        Unknown: a message that nobody knows""",
}


@pytest.mark.parametrize("room", RPCTYPES)
def test_every_message_of_etcd_stops_what_it_belongs_to(room):
    codes = {code.name.replace("_", "").lower(): code for code in grpc.StatusCode}
    codes["canceled"] = grpc.StatusCode.CANCELLED
    for code, texts in re.findall(r"(\w+): (.+?)(?=\n *[A-Z]\w+: |$)", RPCTYPES[room], re.DOTALL):
        for text in texts.split(","):
            error = etcd_error("etcdserver: " + " ".join(text.split()), codes[code.lower()])
            assert (error.belongs_to, error.side) == (room, "etcd"), text


@pytest.mark.parametrize(
    ("room", "codes"),
    [
        (Room.CHORE, "22003 22P02 23503 23505 23514 40001 40P01 42501 42703 53100 54000 55P03"),
        (Room.CHORE, "57014 P0001 XX000"),
        (Room.SESSION, "08006 25006 57P01 57P03 58030 28P01"),
        (Room.PROCESS, "2BP01"),
    ],
)
def test_every_sqlstate_stops_what_it_belongs_to(db, room, codes):
    for code in codes.split():
        with pytest.raises(psycopg2.Error) as caught:
            rows(db, f"DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{code}'; END $$")
        error = etcd_fdw.postgres_error(caught.value)
        assert (error.belongs_to, code in str(error)) == (room, True), code


# ── exactly once ─────────────────────────────────────────────────────────────


def txns_answered(server: LocalEtcd) -> float:
    """How many Txns etcd has answered, those of clients that are gone among them."""
    _, text = http_get(server.health_url.removeprefix("http://"), "/metrics")
    counts = re.findall(r'^grpc_server_handled_total\{.*grpc_method="Txn".* (\S+)$', text, re.M)
    return sum(map(float, counts))


def keep_back(proxy: Proxy, db: str, sql: str, *args: Any) -> None:
    """Ask for a change to the value mine, which leaves the daemon and does not arrive."""
    proxy.hold(b"mine")
    rows(db, sql, *args)
    wait_until("nothing was sent", lambda: b"mine" in proxy.held)


def deliver(proxy: Proxy, server: LocalEtcd) -> None:
    """Let what was kept back arrive; wait until etcd has answered the Txn in it."""
    before = txns_answered(server)
    proxy.release()
    wait_until("nothing arrived", lambda: txns_answered(server) > before)


def apply_change(db: str, key: str) -> None:
    """Have the daemon apply a change; after that it has all that it needs to send the next."""
    rows(db, "SELECT etcd_set(%s, 'first')", key)
    assert ended(db, key).status == "success"


def revision_of(client: EtcdClient, key: str) -> int:
    return int(client.get(key).mod_revision)


def in_transactions_of_their_own(db: str, count: int, insert: str) -> None:
    """Run an INSERT for n = 1, 2, …, such as … VALUES ('k' || n, n), each committed."""
    rows(db, f"DO $$ BEGIN FOR n IN 1..{count} LOOP {insert}; COMMIT; END LOOP; END $$")


SET = "SELECT etcd_set(%s, 'mine')"
FORCE = "SELECT etcd_set(%s, 'mine', force => true)"


@pytest.mark.parametrize("meanwhile", ["another applies it", "forced", "conflict", "reset"])
def test_change_arrives_late(daemon, command, db, prefix, own_etcd, own_client, network, meanwhile):
    key = prefix + "a"
    first = daemon(*FAST, etcd=network)
    apply_change(db, prefix + "first")
    keep_back(network, db, FORCE if meanwhile == "forced" else SET, key)
    first.kill()
    theirs = own_client.put(key, "mine") if meanwhile == "conflict" else 0  # by chance alike
    if meanwhile == "reset":
        command("sync", "--reset", "--yes", etcd=own_etcd, exit_code=0)
    daemon(*FAST, etcd=own_etcd)
    row = ended(db, key)
    met = ("conflict", theirs) if theirs else ("success", revision_of(own_client, key))
    assert row.outcome == met
    own_client.delete(key)
    deliver(network, own_etcd)
    assert own_client.get(key) is None


def test_thawed_instance_is_silent(daemon, db, prefix, own_etcd, own_client, network, db_network):
    """It was frozen with Txns in flight and packed ahead, and does not know that it has no lock."""
    first = daemon(*FAST, postgres=db_network, etcd=network)
    second = daemon(*FAST, etcd=own_etcd, ready=False)
    second.wait_log("standing by")
    apply_change(db, prefix + "first")
    network.delay(0.5)  # time to pack while the first is on its way
    insert = f"INSERT INTO etcd_wal (key, value) VALUES ('{prefix}' || n, 'mine')"
    in_transactions_of_their_own(db, 2000, insert)
    wait_until("nothing was sent", lambda: own_client.get(prefix + "1"))
    first.pause()
    network.resume()
    db_network.stall()
    for pid in lock_holders(db, prefix):
        rows(db, "SELECT pg_terminate_backend(%s)", pid)
    statuses(db)
    assert {row.status for row in wal_rows(db)} == {"success"}
    own_client.delete(prefix, prefix=True)
    before, mark = txns_answered(own_etcd), first.mark()
    first.resume()
    with suppress(TimeoutError):  # it may as well see that it must not
        wait_until("it sends nothing", lambda: txns_answered(own_etcd) > before, 3)
    db_network.resume()
    first.wait_log("standing by", after=mark)
    assert own_client.range(prefix).count == 0


def test_bytes_arrive_after_the_timeout(daemon, db, prefix, own_etcd, own_client, network):
    key = prefix + "a"
    daemon(*FAST, etcd=network, query="?request_timeout=3s")
    apply_change(db, prefix + "first")
    keep_back(network, db, SET, key)
    assert ended(db, key).outcome == ("success", revision_of(own_client, key))  # by new connections
    own_client.delete(key)
    deliver(network, own_etcd)
    assert own_client.get(key) is None


def wait_replicated(primary: LocalPostgres, standby: LocalPostgres) -> None:
    """Wait until the standby has all that was committed on the primary."""
    written = scalar(primary.dsn(), "SELECT pg_current_wal_flush_lsn()")
    replayed = "SELECT pg_last_wal_replay_lsn() >= %s"
    wait_until("it is not replicated", lambda: scalar(standby.dsn(), replayed, written))


def test_failover_to_a_standby_that_lacks_the_outcome(daemon, prefix, own_postgres, etcd):
    key, db = prefix + "a", own_postgres.dsn()
    daemon(*FAST, postgres=db).stop()
    with streaming_standby(own_postgres) as (standby, stream, both):
        rows(db, SET, key)
        wait_replicated(own_postgres, standby)
        stream.stall()
        daemon(*FAST, postgres=both)
        applied = ended(db, key).outcome
        assert applied == ("success", revision_of(etcd, key))
        etcd.delete(key)
        for n in range(10):  # each in a Txn of its own
            apply_change(db, f"{prefix}later/{n}")
        own_postgres.kill()
        rows(standby.dsn(), "SELECT pg_promote()")
        assert ended(standby.dsn(), key).outcome == applied
        assert etcd.get(key) is None


def test_ids_used_again_after_a_failover(daemon, prefix, own_postgres, etcd, recorder):
    """On the new timeline both ids and transaction ids go on where the standby was."""
    db = own_postgres.dsn()
    rows(db, "ALTER SYSTEM SET autovacuum = off")  # it takes transaction ids
    insert = f"INSERT INTO etcd_wal (key, value) VALUES ('{prefix}' || n, '%s' || n)"
    daemon(*FAST, postgres=db).stop()
    with streaming_standby(own_postgres) as (standby, stream, both):
        # the numbers that PostgreSQL takes from the sequence ahead are not replicated either
        rows(db, "SELECT setval(pg_get_serial_sequence('etcd_wal', 'id'), 1000)")
        wait_replicated(own_postgres, standby)
        stream.stall()
        in_transactions_of_their_own(db, 100, insert % "lost")
        running = daemon(*FAST, postgres=both)
        statuses(db)
        lost = {(row.id, row.txid) for row in wal_rows(db)}
        etcd.delete(prefix, prefix=True)
        running.pause()
        own_postgres.kill()
        rows(standby.dsn(), "SELECT pg_promote()")
        in_transactions_of_their_own(standby.dsn(), 100, insert % "sql")
        assert {(row.id, row.txid) for row in wal_rows(standby.dsn())} == lost
        running.resume()
        assert assert_outcomes(recorder, standby.dsn()) == {"success": 100}


def test_comparison_sees_what_is_not_true(daemon, db, prefix, recorder, monkeypatch):
    daemon(*FAST)
    for n in range(2):
        key = f"{prefix}{n}"
        rows(db, "SELECT etcd_set(%s, %s)", key, f"sql-{n}")
        ended(db, key)
    one, another = wal_rows(db)
    falsified: list[tuple[dict[str, Any], str]] = [
        ({"status": "conflict"}, "nobody claims"),
        ({"value": b"sql-other"}, "etcd tells b'sql-"),
        ({"revision": 1}, "made on 1, applied on"),
        ({"force": True, "replaced_revision": 1}, "replaced"),
        ({"ttl": timedelta(hours=1)}, "lease 0 after 0"),
        ({"txid": another.txid}, "in parts"),
    ]
    for lie, said in falsified:
        told = [one._replace(**lie), another]
        monkeypatch.setitem(globals(), "wal_rows", lambda *_, told=told: told)
        with pytest.raises(AssertionError, match=said):
            assert_outcomes(recorder, db)


KILLS = int(os.environ.get("ETCD_FDW_TEST_KILLS", "20"))


@pytest.mark.timeout(300 + 10 * KILLS)
def test_killed_at_random_moments_with_late_bytes(daemon, own_etcd, network, load, seed):
    dice = random.Random(seed)
    start = partial(daemon, *FAST, etcd=network, query=FAST_ETCD)
    running, late = start(), 0
    play = load(own_etcd.endpoint, seed=seed)
    for _ in range(KILLS):
        threading.Event().wait(dice.uniform(0.1, 1.5))  # while it starts, or well into the load
        if dice.random() < 0.5:
            late += bool(network.held)
            network.release()
        threading.Event().wait(dice.uniform(0.0, 0.5))
        if dice.random() < 0.5:
            network.hold()
            threading.Event().wait(dice.uniform(0.0, 0.2))
        running.kill()
        running = start(ready=False)
    play.wait_flow()
    network.release()
    print(f"{KILLS} kills, {late} with late bytes, SQL changes {dict(play.finish())}")


# ─ leases ─


def test_changes_of_one_transaction_with_the_same_ttl_share_a_lease(daemon, db, prefix, etcd):
    daemon()
    insert = """
        INSERT INTO etcd_wal (key, value, ttl)
        SELECT %s || i, 'x', (ARRAY['299.2 seconds', '10 minutes', NULL])[1 + i %% 3]::interval
        FROM generate_series(1, 9) i
    """
    for number in range(2):
        rows(db, insert, f"{prefix}{number}/")
    assert statuses(db) == ["success"] * 18
    found = collections.Counter(kv.lease for kv in etcd.range(prefix).kvs)
    assert found.pop(0) == 6
    assert sorted(found.values()) == [3, 3, 3, 3]
    asked = [etcdrpc.LeaseTimeToLiveRequest(ID=lease) for lease in found]
    granted = [etcd.call(etcd.leases.LeaseTimeToLive, one).grantedTTL for one in asked]
    assert sorted(granted) == [300, 300, 600, 600]


def test_lease_is_kept_renewed_and_taken_off(daemon, db, prefix, etcd):
    daemon()
    key, theirs = prefix + "a", etcd.grant(300)
    revision: int | None = etcd.put(key, "1", theirs)

    def lease_after(ttl: str | None) -> int:
        nonlocal revision
        status, revision = ended(db, ask(db, key, revision=revision, ttl=ttl)).outcome
        assert status == "success"
        return int(etcd.get(key).lease)

    assert lease_after(None) == theirs
    first = lease_after("5 minutes")
    assert first not in (0, theirs)
    assert lease_after(None) == first
    renewed = lease_after("5 minutes")
    assert renewed not in (0, first)
    assert lease_after("0") == 0
    assert lease_after(None) == 0


def slow_grant(network: Proxy, db: str, client: EtcdClient, key: str) -> int:
    """Ask for a change with a ttl; return its lease, of which the daemon does not know yet."""
    before = leases(client)
    network.delay(3)
    ask(db, key, ttl="2 seconds")
    (lease,) = wait_until("no lease was granted", lambda: leases(client) - before)
    return lease


def test_lease_that_runs_out_on_the_way_is_granted_anew(daemon, db, prefix, own_client, network):
    key = prefix + "a"
    daemon(etcd=network, query="?request_timeout=60s")
    apply_change(db, prefix + "first")
    own_client.revoke(slow_grant(network, db, own_client, key))
    network.resume()
    status, revision = ended(db, key).outcome
    assert status == "success"
    (kv,) = own_client.range(key, revision=revision).kvs
    assert kv.mod_revision == revision and kv.lease


def test_crash_between_grant_and_put(daemon, db, prefix, own_client, network):
    key = prefix + "a"
    first = daemon(etcd=network, query="?request_timeout=60s")
    apply_change(db, prefix + "first")
    left = slow_grant(network, db, own_client, key)
    first.kill()
    assert own_client.get(key) is None
    daemon(etcd=own_client)
    status, revision = ended(db, key).outcome
    assert status == "success"
    assert own_client.range(key, revision=revision).kvs[0].lease != left
    wait_until("it does not expire", lambda: left not in leases(own_client))


# ─ forced changes ─


def forced(db: str, id_: int) -> tuple[str, int | None, int | None]:
    """Wait until a change is done; return its status, result_revision, replaced_revision."""
    return (*ended(db, id_).outcome, ended(db, id_).replaced_revision)


@pytest.fixture(params=[False, True], ids=["no login", "login"])
def login(request: pytest.FixtureRequest) -> bool:
    """Whether the daemon has to log in, which makes its Txns larger."""
    return bool(request.param)


@pytest.fixture
def admin(secure_etcd: SecureEtcd, login: bool) -> Iterator[EtcdClient]:
    """A client of secure_etcd that may do everything."""
    with secure_etcd.enable_auth() if login else EtcdClient(secure_etcd.endpoint) as client:
        yield client


def test_forced_changes_apply_whatever_etcd_holds(daemon, db, secure_etcd, admin):
    daemon("--audit", "all", etcd=secure_etcd.dsn())
    theirs = admin.put("/t/a", "theirs")
    change = ask(db, "/t/a", force=True)
    assert forced(db, change) == ("success", mine := revision_of(admin, "/t/a"), theirs)
    assert admin.get("/t/a").value == b"mine"
    # made on a version that never was
    stale = ask(db, "/t/a", "again", revision=7_000_000, force=True)
    assert forced(db, stale) == ("success", revision_of(admin, "/t/a"), mine)
    new = ask(db, "/t/new", revision=5, force=True)
    assert forced(db, new) == ("success", revision_of(admin, "/t/new"), None)
    there = revision_of(admin, "/t/new")
    status, revision, replaced = forced(db, ask(db, "/t/new", None, force=True))
    assert (status, replaced) == ("success", there)
    assert admin.get("/t/new") is None
    assert admin.revision() == revision
    assert forced(db, ask(db, "/t/new", None, force=True)) == ("success", None, None)
    sql = "SELECT details FROM etcd_sync_event WHERE details ->> 'wal_id' = %s"
    details = scalar(db, sql, str(change))
    assert (details["forced"], details["replaced_revision"]) == (True, theirs)


@pytest.mark.parametrize("ttl", [None, "0", "1 hour"])
def test_lease_of_a_key_that_is_overwritten_by_force(daemon, db, prefix, etcd, ttl):
    daemon()
    lease = etcd.grant(3600)
    etcd.put(prefix + "leased", "theirs", lease)
    etcd.put(prefix + "plain", "theirs")
    for key in ("leased", "plain", "new"):
        assert ended(db, ask(db, prefix + key, ttl=ttl, force=True)).status == "success"
    found = [etcd.get(prefix + key).lease for key in ("leased", "plain", "new")]
    if ttl == "1 hour":
        assert len({0, lease, *found}) == 5
    else:
        assert found == [0 if ttl else lease, 0, 0]


def test_strict_change_beats_forced_ones_of_its_transaction(daemon, db, prefix, etcd):
    daemon()
    insert = """
        INSERT INTO etcd_wal (key, value, revision, force)
        VALUES (%s, 'mine', 1, true), (%s, 'mine', %s, false)
    """
    a, b = prefix + "a", prefix + "b"
    theirs = etcd.put(a, "theirs"), etcd.put(b, "theirs")

    rows(db, insert, a, b, 1)
    assert statuses(db) == ["conflict"] * 2
    assert (revision_of(etcd, a), revision_of(etcd, b)) == theirs
    rows(db, insert, a, b, theirs[1])
    assert statuses(db)[2:] == ["success"] * 2
    mine = revision_of(etcd, a)
    replaced = "SELECT result_revision, replaced_revision FROM etcd_wal WHERE status = 'success'"
    assert rows(db, replaced) == [(mine, theirs[0]), (mine, theirs[1])]


@pytest.mark.parametrize("compacted", [False, True])
def test_lost_answer_to_forced_changes(daemon, db, prefix, own_client, compacted):
    a, b, c = (prefix + name for name in "abc")
    theirs = [own_client.put(key, "old") for key in (a, b)]
    insert = f"""
        INSERT INTO etcd_wal (key, value, ttl, force)
        VALUES (%s, 'mine', '1 h', true), ('{b}', NULL, NULL, true), ('{c}', NULL, NULL, true)
    """
    sent = kill_once_sent(daemon(*FAST, etcd=own_client), db, own_client, insert, a)
    granted, later = leases(own_client), own_client.put(a, "theirs")
    if compacted:
        own_client.compact(later)
    daemon(*FAST, etcd=own_client)
    put, delete, nothing = (forced(db, row.id) for row in wal_rows(db))
    assert put == ("success", sent, None if compacted else theirs[0])
    assert delete == ("success", sent, None if compacted else theirs[1])
    assert nothing == ("success", nothing[1] if compacted else None, None)
    assert revision_of(own_client, a) == later
    assert len(granted) == 1 and leases(own_client) == granted


# ─ who may write what ─


OWN_KEYS = "etcd_fdw/"


@pytest.mark.parametrize("limit", [100, 128])  # ours, and etcd's
def test_transactions_around_the_largest_size_arrive(daemon, db, secure_etcd, admin, login, limit):
    """Beside the fence, the receipt and what makes a change a forced one; a login halves it."""
    options = "--max-txn-ops", str(limit), "--batch-size=30"
    start = partial(daemon, *options, etcd=secure_etcd.dsn())
    start().stop()
    insert = """
        INSERT INTO etcd_wal (key, value, revision, ttl, force)
        SELECT concat_ws('/', '/t', size, force, n), 'x', CASE WHEN force THEN 77 END,
               (ARRAY['1 hour'::interval])[n %% 3], force
        FROM (SELECT %s AS size, %s AS force) t, generate_series(1, size) n
    """
    largest = [(limit - 4 - force) // (2 if login else 1) for force in (False, True)]
    for force, whole in zip((False, True), largest):
        for size in {*range(whole - 3, whole + 12), limit, 3 * limit}:
            rows(db, insert, size, force)
    start()
    assert set(statuses(db)) == {"success"}
    assert admin.range("/t/").count == len(wal_rows(db))
    sql = """
        SELECT force, count(*), count(DISTINCT result_revision)
        FROM etcd_wal GROUP BY force, txid
    """
    for force, size, parts in rows(db, sql):
        assert (parts == 1) == (size <= largest[force]), (force, size, parts)


def test_what_others_write_to_the_daemons_own_keys_is_named(daemon, db, prefix, etcd):
    running = daemon(*FAST)
    own = f"{OWN_KEYS}{scalar(db, 'SELECT mirror_id FROM etcd_sync_state')}"
    apply_change(db, prefix + "first")
    etcd.put(f"{own}/owner", "garbage")
    apply_change(db, prefix + "second")
    etcd.delete(f"{own}/owner")
    apply_change(db, prefix + "third")
    warnings = re.findall(r"WARN .* deleted or overwritten the key (\S+); retrying", running.log())
    assert warnings == [f"{own}/owner"] * 2
    running.kill()
    etcd.put(f"{own}/receipt/0000000000000009", "garbage")
    running = daemon(*FAST)
    rows(db, SET, prefix + "fourth")
    running.wait_log(rf"ERROR .*{own}/receipt/0000000000000009 .* not this program's")
    etcd.put(prefix + "theirs", "goes on")
    wait_until("the mirror stands still", arrives(db, prefix + "theirs"))
    etcd.delete(f"{own}/receipt/0000000000000009")
    assert statuses(db)[-1] == "success"


def test_user_without_the_grant_for_the_daemons_own_keys(daemon, command, db, secure_etcd):
    with secure_etcd.enable_auth() as root:
        add_etcd_user(root, "other", "secret", "/t/")
        dsn = etcd_dsn(secure_etcd.endpoint, "/t/", "other", "secret")
        rows(db, SCHEMA_SQL)
        change = scalar(db, "SELECT etcd_set('/t/sql', '1')")
        done = command("sync", etcd=dsn, exit_code=3)  # which does not wait for it
        assert re.search(rf"grant-permission .*{OWN_KEYS}", done.stderr.splitlines()[-1])
        started = daemon(*FAST, etcd=dsn)
        assert OWN_KEYS in started.wait_log("ERROR .*grant-permission.*")[0]
        root.put("/t/etcd", "1")
        wait_until("it does not mirror", arrives(db, "/t/etcd"))
        assert scalar(db, "SELECT status FROM etcd_wal WHERE id = %s", change) == "pending"
        assert root.get("/t/sql") is None
        permit(root, "other", READWRITE, OWN_KEYS)
        assert ended(db, change).status == "success"
        started.wait_log("INFO changes are sent again$")
        assert started.returncode is None


def test_changes_with_a_client_certificate_for_a_user(daemon, db, tmp_path):
    authority = Authority(tmp_path / "pki")
    with tls_etcd(authority) as server:
        with tls_client(server, authority) as client:
            SecureEtcd.add_users(client)
            client.call(client.auth.AuthEnable, etcdrpc.AuthEnableRequest())
        daemon(*FAST, etcd=tls_dsn(server, authority.ca, authority.issue("fdw")))
        keys = [f"/t/{n}" for n in range(40)]
        rows(db, "SELECT etcd_set(key, 'x') FROM unnest(%s) key", keys)
        assert statuses(db) == ["success"] * 40
        assert len({row.result_revision for row in wal_rows(db)}) == 1


def test_mirror_of_everything_leaves_the_daemons_own_keys_alone(daemon, command, db, own_client):
    dsn, foreign = f"etcd://{own_client.endpoint}", OWN_KEYS + "of/another"
    own_client.put(foreign, "1")
    own_client.put("etcd_fdw", "theirs")
    running = daemon(*FAST, etcd=dsn)
    row = ended(db, ask(db, OWN_KEYS + "x"))
    assert row.status == "failed" and "reserved" in str(row.error_message)
    assert own_client.get(OWN_KEYS + "x") is None
    apply_change(db, "a")
    own_client.put(foreign, "2")
    own_client.put("b", "1")
    wait_until("the put did not arrive", arrives(db, "b"))
    running.stop()
    own_client.delete(foreign)
    own_client.put("c", "1")
    own_client.compact(own_client.revision())
    daemon(*FAST, etcd=dsn)
    wait_until("the put did not arrive", arrives(db, "c"))
    assert sorted({row.key for row in mirror_rows(db)}) == [b"a", b"b", b"c", b"etcd_fdw"]
    found = json.loads(command("validate", "--format", "json", etcd=dsn).stdout)
    assert (found["equal"], found["keys"]) == (True, 4)


# ─ space, resets, backups, copies ─


def test_changes_wait_for_etcds_space_and_are_applied_once(daemon, db, prefix):
    """etcd applies the change that meets the limit all the same."""
    with (
        LocalEtcd(["--quota-backend-bytes", str(4 << 20)]) as server,
        EtcdClient(server.endpoint) as client,
        Recorder(client, prefix) as recorder,
    ):
        running = daemon(*FAST, etcd=server)
        insert = "INSERT INTO etcd_wal (key, value) VALUES (%s, 'sql' || %s || repeat('x', 100000))"
        tried = "SELECT status FROM etcd_wal WHERE status <> 'pending' OR retry_count > 0"
        for n in range(1, 100):
            rows(db, insert, f"{prefix}{n}", str(n))
            wait_until("nothing was sent", lambda: len(rows(db, tried)) == n)  # noqa: B023
            if ("pending",) in rows(db, tried):
                break
        assert "database space exceeded" in scalar(db, "SELECT max(error_message) FROM etcd_wal")
        for n in range(100, 110):
            rows(db, insert, f"{prefix}{n}", str(n))
        request = etcdrpc.DeleteRangeRequest(key=prefix.encode(), range_end=prefix_end(prefix))
        assert client.call(client.kv.DeleteRange, request).deleted > 20  # which needs no space
        wait_until("the mirror stands still", lambda: not live(db, prefix))
        recorder.sync()
        make_room(client)
        assert set(assert_outcomes(recorder, db)) == {"success"}
        assert_same(recorder, db, prefix)
        assert running.returncode is None


def test_backup_of_etcd_tells_what_it_has(daemon, command, db, prefix, own_etcd, tmp_path):
    """Outcomes wait for a mirror that is far behind, changes do not."""
    dsn, saved, lost = etcd_dsn(own_etcd.endpoint, prefix), prefix + "saved", prefix + "lost"
    daemon(etcd=dsn).stop()
    with EtcdClient(own_etcd.endpoint) as client:
        bulk(client, prefix + "other/", 10_000)
        first = daemon("--batch-size=3", etcd=dsn)
        rows(db, SET, saved)
        sent = wait_until("nothing was sent", lambda: client.get(saved)).mod_revision
        client.snapshot(tmp_path / "backup")
        rows(db, SET, lost)
        wait_until("nothing was sent", lambda: client.get(lost))
        first.kill()
    assert [row.status for row in wal_rows(db)] == ["pending", "pending"]
    restore(own_etcd, tmp_path / "backup")
    with EtcdClient(own_etcd.endpoint) as client:
        client.delete(saved)
        command("sync", "--reset", "--yes", etcd=dsn, exit_code=0)
        daemon(*FAST, etcd=dsn)
        assert ended(db, saved).outcome == ("success", sent)
        assert ended(db, lost).outcome == ("success", revision_of(client, lost))
        assert client.get(saved) is None


@pytest.fixture
def copied(postgres_dsn: str, db: str) -> Iterator[Callable[[], str]]:
    """Copy this test's database, which nobody may be connected to; return the copy's DSN."""
    name = psycopg2.extensions.parse_dsn(db)["dbname"]

    def copy() -> str:
        close_sessions()
        sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s"
        wait_until("it is in use", lambda: not scalar(postgres_dsn, sessions, name))
        rows(postgres_dsn, f"CREATE DATABASE {name}_copy TEMPLATE {name}")
        return make_dsn(db, dbname=name + "_copy")

    yield copy
    rows(postgres_dsn, f"DROP DATABASE IF EXISTS {name}_copy WITH (FORCE)")


def test_copy_of_the_database_does_no_harm(daemon, command, db, prefix, copied, recorder):
    original = daemon(*FAST)
    apply_change(db, prefix + "first")
    original.stop()
    sides = {"original": db, "copy": copied()}
    running = [daemon(*FAST, postgres=dsn, ready=False) for dsn in sides.values()]
    names = [psycopg2.extensions.parse_dsn(dsn)["dbname"] for dsn in sides.values()]
    turns = itertools.count()

    def change() -> None:
        turn = next(turns)
        for side, dsn in sides.items():
            rows(dsn, "SELECT etcd_set(%s, %s)", f"{prefix}{side}/{turn}", f"sql {side} {turn}")

    def told() -> bool:
        change()  # each of them hears of the other when it has something to send
        return any(
            socket.gethostname() in line and re.search(rf" ERROR .*\b{other}\b", line)
            for one, other in zip(running, reversed(names))
            for line in one.log().splitlines()
        )

    wait_until("neither says anything of the other", told)
    for one in running:
        assert one.stop() == 0
    command("sync", "--reset", "--yes", postgres=sides["copy"], exit_code=0)
    running = [daemon(*FAST, postgres=dsn) for dsn in sides.values()]
    for _ in range(20):
        change()
    assert set(assert_outcomes(recorder, *sides.values())) == {"success"}
    assert "ERROR" not in "".join(one.log() for one in running)


def test_two_prefixes_side_by_side(daemon, db, prefix, etcd, etcd_address, recorder):
    """They begin alike, but do not overlap."""
    names = "a/", "ab/"
    for name in names:
        daemon(etcd=etcd_address.dsn(prefix + name))
    for n in range(20):
        etcd.put(f"{prefix}{names[n % 2]}etcd/{n}", str(n))
        rows(db, "SELECT etcd_set(%s, %s)", f"{prefix}{names[n % 2]}sql/{n}", f"sql-{n}")
    assert assert_outcomes(recorder, db) == {"success": 20}
    assert_same(recorder, db, prefix)


def test_first_copy_holds_up_no_other_mirror(daemon, db, prefix, etcd, etcd_address):
    daemon(etcd=etcd_address.dsn(prefix + "a/"))
    revision = etcd.put(prefix + "b/", "1")
    with session(db, "BEGIN") as cur:
        sql = "INSERT INTO etcd (key, value, revision) VALUES (%s, '1', %s)"
        cur.execute(sql, (prefix + "b/", revision))
        daemon(etcd=etcd_address.dsn(prefix + "b/"), ready=False)
        wait_until("nothing is merged", lambda: daemon_waits_on(db, "transactionid"))
        etcd.put(prefix + "a/", "1")
        wait_until("the other mirror was held up", arrives(db, prefix + "a/"), timeout=10)
        cur.execute("ROLLBACK")
    wait_until("not copied", arrives(db, prefix + "b/"))


@pytest.mark.parametrize(
    ("there", "other"), [("a/", "a/b/"), ("a/b/", "a/"), ("a/", "a"), ("a/", None)]
)
def test_prefix_that_overlaps_another_is_refused(daemon, db, prefix, etcd_address, there, other):
    daemon(etcd=etcd_address.dsn(prefix + there)).stop()
    dsn = etcd_address.dsn("" if other is None else prefix + other)  # "": the whole key space
    refused = daemon(*FAST, etcd=dsn, ready=False)
    assert refused.wait_exit() == 4
    assert re.fullmatch(rf"etcd_fdw: .*{prefix}{there}(?!b/).*\n", refused.log()), refused.log()
    daemon(etcd=etcd_address.dsn(prefix + there))


# ── security ─────────────────────────────────────────────────────────────────


class Authority:
    """A private certificate authority, by the openssl command; files are replaced in place."""

    curve = "prime256v1"  # of new keys

    def __init__(self, directory: Path) -> None:
        if not shutil.which("openssl"):
            pytest.skip("needs the command openssl")
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self.ca, self.ca_key = directory / "ca.pem", directory / "ca.key"
        self._request(self.ca_key, f"authority {uuid.uuid4()}", self.ca, "-x509")

    def issue(self, name: str, subject: str = "IP:127.0.0.1", days: int = 2) -> tuple[Path, Path]:
        """Sign a certificate for a subject alternative name; return its file and its key's."""
        cert, key = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        request, extensions = self.directory / f"{name}.csr", self.directory / f"{name}.ext"
        extensions.write_text(f"subjectAltName={subject}\n")
        self._request(key, name, request)
        # `openssl x509` of 3.5.9 and later refuses negative days; before 3.4 it takes no dates
        settings = self.directory / "ca.cnf"
        settings.write_text(
            f"[ca]\ndefault_ca = it\n[it]\ndatabase = {self.directory}/index\nrand_serial = yes\n"
            f"new_certs_dir = {self.directory}\ndefault_md = sha256\npolicy = any\n"
            "unique_subject = no\n[any]\ncommonName = supplied\n"
        )
        (self.directory / "index").touch()
        ends = time.time() + days * 86_400
        dates = [
            time.strftime("%y%m%d%H%M%SZ", time.gmtime(at)) for at in (ends - 3 * 86_400, ends)
        ]
        signer = ["-config", settings, "-cert", self.ca, "-keyfile", self.ca_key, "-notext"]
        signer += ["-startdate", dates[0], "-enddate", dates[1], "-extfile", extensions]
        self._openssl("ca", "-batch", *signer, "-in", request, "-out", cert)
        return cert, key

    def _request(self, key: Path, name: str, out: Path, *args: str) -> None:
        """Make a key, and a request for its certificate, or with -x509 that itself."""
        curve = ["-newkey", "ec", "-pkeyopt", f"ec_paramgen_curve:{self.curve}", "-nodes"]
        self._openssl("req", *curve, "-keyout", key, "-subj", f"/CN={name}", "-out", out, *args)

    @staticmethod
    def _openssl(*args: Any) -> None:
        done = subprocess.run(["openssl", *args], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def tls_etcd(authority: Authority, subject: str = "IP:127.0.0.1", days: int = 2) -> LocalEtcd:
    """An etcd, not started yet, that asks for client certificates."""
    cert, key = authority.issue("server", subject, days)
    files = ["--cert-file", cert, "--key-file", key, "--trusted-ca-file", authority.ca]
    return LocalEtcd([*map(str, files), "--client-cert-auth"], tls=True)


def tls_client(server: LocalEtcd, authority: Authority) -> EtcdClient:
    cert, key = authority.issue("tester")
    files = (authority.ca, key, cert)
    credentials = grpc.ssl_channel_credentials(*(path.read_bytes() for path in files))
    return EtcdClient(server.endpoint, credentials=credentials)


def tls_dsn(server: LocalEtcd, ca: Path, files: tuple[Path, Path] | None = None) -> str:
    """The --etcd-dsn for the prefix /t/."""
    client = f"&cert={files[0]}&key={files[1]}" if files else ""
    return f"etcd://{server.endpoint}/t/?ca={ca}{client}"


def test_tls_with_client_certificates_that_are_replaced(daemon, db, tmp_path):
    """What replaced the files on disk is used from the next reconnect on."""
    authority = Authority(tmp_path / "pki")
    files = authority.issue("daemon")
    with tls_etcd(authority) as server:
        started = daemon(*FAST, etcd=tls_dsn(server, authority.ca, files))
        with tls_client(server, authority) as client:
            client.put("/t/a", "1")
        wait_until("the put did not arrive", arrives(db, "/t/a"))
        apply_change(db, "/t/b")

        server.stop()
        authority.issue("next")[0].replace(files[0])  # its key is not there yet
        started.wait_log("WARN .*cert, key: .*: cannot be used.*retrying", after=started.mark())
        authority = Authority(tmp_path / "pki")  # another one: nothing of the old is valid
        authority.issue("server")
        assert authority.issue("daemon") == files
        server.start()
        with tls_client(server, authority) as client:
            client.put("/t/c", "3")
        wait_until("the put did not arrive", arrives(db, "/t/c"))
        assert started.stop() == 0


@pytest.mark.parametrize(
    ("case", "hint"),
    [
        ("wrong authority", "is not trusted: see ca="),
        ("expired", "is not trusted: see ca="),
        ("wrong host name", "is for another host: see server_name="),
        ("P-521", "use P-256, P-384 or RSA"),
        ("no client certificate", "does it want .*a client certificate"),
        ("no tls", "else see tls="),
        # gRPC 1.78 may hear of the closed connection before it has read what was wrong
        ("tls for nothing", "does not speak TLS: see tls=disabled|does it want TLS"),
    ],
)
def test_tls_is_verified(daemon, db, tmp_path, case, hint):
    authority = Authority(tmp_path / "pki")
    subject = "DNS:elsewhere.example" if case == "wrong host name" else "IP:127.0.0.1"
    authority.curve = "secp521r1" if case == "P-521" else authority.curve
    server = tls_etcd(authority, subject, days=-1 if case == "expired" else 2)
    with LocalEtcd() if case == "tls for nothing" else server as server:
        dsn = tls_dsn(server, authority.ca, authority.issue("daemon"))
        if case == "wrong authority":
            dsn = tls_dsn(server, Authority(tmp_path / "other").ca, authority.issue("daemon"))
        elif case == "no client certificate":
            dsn = tls_dsn(server, authority.ca)
        elif case == "no tls":
            dsn = f"etcd://{server.endpoint}/t/"
        started = daemon(*FAST, "--startup-timeout", "0s", etcd=dsn, ready=False)
        assert started.wait_exit() == 2
        assert re.search(hint, started.log())
        if case == "wrong host name":
            daemon(*FAST, etcd=dsn + "&server_name=elsewhere.example")


class SecureEtcd(LocalEtcd):
    """An etcd with authentication: root/root, and fdw/secret who may touch /t/ alone."""

    def enable_auth(self) -> EtcdClient:
        """Return a client of root."""
        with EtcdClient(self.endpoint) as client:
            self.add_users(client)
            client.call(client.auth.AuthEnable, etcdrpc.AuthEnableRequest())
        return EtcdClient(self.endpoint, "root", "root")

    @staticmethod
    def add_users(client: EtcdClient) -> None:
        add_etcd_user(client, "root", "root")
        add_etcd_user(client, "fdw", "secret", "/t/", OWN_KEYS)

    def dsn(self) -> str:
        return etcd_dsn(self.endpoint, "/t/", "fdw", "secret")


@pytest.fixture
def secure_etcd() -> Iterator[SecureEtcd]:
    with SecureEtcd() as server:
        yield server


def test_etcd_user_who_may_touch_the_prefix_alone(daemon, db, secure_etcd):
    with secure_etcd.enable_auth() as root:
        for key in ("/s", "/t", "/t/a", "/t0"):
            root.put(key, "1")
        daemon(*FAST, etcd=secure_etcd.dsn()).stop()
        root.put("/t/b", "2")
        root.put("/u", "2")
        started = daemon(*FAST, etcd=secure_etcd.dsn())
        outside = ask(db, "/u2")
        apply_change(db, "/t/c")
        wait_until("no word of the stray", lambda: "outside every mirrored prefix" in started.log())
        assert [row.key for row in mirror_rows(db)] == [b"/t/a", b"/t/b", b"/t/c"]
        assert scalar(db, "SELECT status FROM etcd_wal WHERE id = %s", outside) == "pending"
        assert root.get("/u2") is None


def test_key_that_the_etcd_user_may_not_write(daemon, db, secure_etcd):
    with secure_etcd.enable_auth() as root:
        permit(root, "fdw", READ, "/t/")  # instead of READWRITE
        permit(root, "fdw", READWRITE, "/t/open/")
        started = daemon(*FAST, etcd=secure_etcd.dsn())
        started.pause()  # so that all go into one Txn, where etcd 3.4 and 3.5 would look away
        good = [ask(db, f"/t/open/{n}") for n in range(3)]
        bad = [ask(db, "/t/closed")]
        mixed = "SELECT etcd_set('/t/open/x', '1') UNION ALL SELECT etcd_delete('/t/shut')"
        bad += [id_ for (id_,) in rows(db, mixed)]
        good += [ask(db, f"/t/open/{n}") for n in range(3, 9)]
        started.resume()
        for change in bad:
            assert ended(db, change).status == "failed"
            assert "permission denied" in str(ended(db, change).error_message)
        for change in good:
            assert ended(db, change).status == "success"
        assert root.get("/t/closed") is root.get("/t/open/x") is None
        assert started.returncode is None


def test_expired_token_is_renewed_in_place(daemon, db):
    """etcd forgets a token that was not used for a while; that is no reason to start over."""
    options = ["--auth-token-ttl=5", "--logger=zap", "--log-level=debug"]
    with SecureEtcd(options) as server, server.enable_auth():
        started = daemon(*FAST, etcd=server.dsn())
        with EtcdClient(server.endpoint, "fdw", "secret") as client:
            client.txn([client.put_op(f"/t/{n}", "1") for n in range(100)])
        wait_until("the puts did not arrive", arrives(db, "/t/99"))
        sessions = scalar(db, SESSIONS)
        pages = etcd_fdw.Etcd(etcd_fdw.parse_etcd_dsn(server.dsn()), server.endpoint).pages(0)
        next(pages)

        deleted = "deleted a simple token"
        wait_until("tokens do not expire", lambda: server.log().count(deleted) >= 4)
        apply_change(db, "/t/b")
        with EtcdClient(server.endpoint, "fdw", "secret") as client:
            client.put("/t/c", "3")
        wait_until("the put did not arrive", arrives(db, "/t/c"))
        assert scalar(db, SESSIONS) == sessions
        assert "WARN" not in started.log()
        assert sum(len(page.kvs) for page in pages) == 100 - 16


def test_auth_is_switched_on_and_the_password_changed_while_running(daemon, db, secure_etcd):
    started = daemon(*FAST, etcd=secure_etcd.dsn())
    apply_change(db, "/t/a")
    with secure_etcd.enable_auth() as root:
        apply_change(db, "/t/b")
        root.put("/t/c", "3")
        wait_until("the put did not arrive", arrives(db, "/t/c"))

        change = etcdrpc.AuthUserChangePasswordRequest(name="fdw", password="new")
        root.call(root.auth.UserChangePassword, change)
        late = scalar(db, "SELECT etcd_set('/t/d', '4')")
        started.wait_log("ERROR .*authentication failed.*retrying")
        assert scalar(db, "SELECT status FROM etcd_wal WHERE id = %s", late) == "pending"
        change.password = "secret"
        root.call(root.auth.UserChangePassword, change)
        assert ended(db, late).status == "success"
        assert started.returncode is None


PIECES = ("Kx7qKx7q", "Zw9pZw9p", "23456", "65432")  # no message has these by itself
PASSWORDS = st.builds(
    lambda first, middle, last: first + middle + last,
    st.sampled_from([PIECES[0], PIECES[2]]),
    st.text("@:/?#&=%+;,'\\\" []\tx", max_size=4),
    st.sampled_from([PIECES[1], PIECES[3]]),
)
LOGIN_FORMS = (
    "postgresql://u:{}@127.0.0.1:1/d",
    "postgresql://127.0.0.1:1/d?user=u&password={}",
    "host=127.0.0.1 port=1 user=u password={}",
    "host=127.0.0.1 port=1 user=u password='{}'",
    "etcd://u:{}@127.0.0.1:1/x/",
    "etcd://127.0.0.1:1/x/?username=u&password={}",
)
# @ stands for the DSN: where it belongs, and where somebody may have put it
CALLS = (
    ["-p", "@", "-e", E, "config", "validate"],
    ["-p", P, "-e", "@", "config", "validate"],
    ["-p", "@", "-e", "@", "config", "show"],
    ["@"],
    ["--postgres-dns", "@"],
    ["-p", P, "-e", E, "--poll-interval", "@"],
    ["-p", P, "-e", E, "-l", "@"],
    ["-p", P, "-e", E, "--bogus=@"],
    ["-p", P, "-e", E, "-c", "@"],
)


@given(
    st.sampled_from(CALLS),
    st.sampled_from(LOGIN_FORMS),
    PASSWORDS,
    st.sampled_from([str, lambda text: urllib.parse.quote(text, safe="")]),
)
@hypothesis.settings(max_examples=150)
def test_no_piece_of_a_password_is_in_any_message(call, form, password, escape):
    dsn = form.format(escape(password))
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        etcd_fdw.main([word.replace("@", dsn) if "@" in word[-2:] else word for word in call])
    assert said.getvalue()
    assert not [piece for piece in PIECES if piece in said.getvalue()], said.getvalue()


@given(st.text() | st.text("etcd:/@?#&=%[]0.,u"))
def test_dsn_parsers_refuse_with_value_error_alone(text):
    for form in ("{}", "etcd://{}", "postgresql://{}", "host={}"):
        for parse in (etcd_fdw.parse_etcd_dsn, etcd_fdw.parse_postgres_dsn):
            with suppress(ValueError):
                parse(form.format(text))


def etcd_error(text: str, code: Any = grpc.StatusCode.UNAVAILABLE) -> etcd_fdw.EtcdFdwError:
    """What the program makes of a failed call."""

    class Failed(grpc.RpcError):
        details = staticmethod(lambda: text)
        code = staticmethod(lambda: code)

    return etcd_fdw.etcd_error(Failed(), "h:1")


def test_messages_of_a_connection_and_their_remedies():
    """As gRPC 1.50 to 1.85 and libpq 13 to 18 word them; each has one remedy, or none."""
    tls = "Tls handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1000:SSL routines:"
    for text, remedy in [
        (tls + "OPENSSL_internal:CERTIFICATE_VERIFY_FAILED", "see ca=FILE"),
        ("Peer name 127.0.0.1 is not in peer certificate: Hostname Verification", "server_name="),
        (tls + "OPENSSL_internal:WRONG_VERSION_NUMBER", "see tls=disabled"),
        (tls + "OPENSSL_internal:TLSV1_ALERT_CERTIFICATE_REQUIRED", "see cert=FILE and key=FILE"),
        ("Socket closed", "was it stopped just now? else see tls="),
        ("recvmsg:Connection reset by peer", "was it stopped just now? else see tls="),
        (
            "Stream removed (Socket closed (GOAWAY received; Error code: 11; Debug Text:"
            " too_many_pings))",
            "see keepalive=DURATION: above etcd's --grpc-keepalive-min-time",
        ),
        (
            "etcdserver: authentication failed, invalid user ID or password",
            "see the user name and the password of --etcd-dsn",
        ),
        ("failed to connect to all addresses; last error: UNKNOWN: Connection refused", ""),
        ("DNS resolution failed for h:1: Domain name not found", ""),
        ("etcdserver: permission denied", ""),
    ]:
        said = str(etcd_error(text))
        assert remedy in said and said.count(";") <= 1 + text.count(";"), said
        assert bool(remedy) == ("; " in said)
    server = 'connection to server at "h" (127.0.0.1), port 5432 failed: '
    unknown = "is that a refused login, or a server that is not ready?"
    for text, exit_code, remedy in [
        ('FATAL:  password authentication failed for user "u"', 3, ""),
        ('FATAL:  no pg_hba.conf entry for host "h", user "u", database "d"', 3, ""),
        ("fe_sendauth: no password supplied", 3, ""),
        ('FATAL:  role "u" does not exist', 3, ""),
        ('FATAL:  role "u" is not permitted to log in', 3, ""),
        ('FATAL:  permission denied for database "d"', 3, ""),
        ('FATAL:  database "d" does not exist', 2, ""),
        ("FATAL:  the database system is starting up", 2, ""),
        ("FATAL:  remaining connection slots are reserved for roles with SUPERUSER", 2, ""),
        ("FATAL:  Passwort-Authentifizierung für Benutzer »u« fehlgeschlagen", 2, unknown),
        ("ВАЖНО:  пользователь не прошёл проверку подлинности", 2, unknown),
        ("Connection refused\n\tIs the server running on that host?", 2, ""),
        ("SSL error: certificate verify failed", 2, ""),
        ("timeout expired", 2, ""),
        ('invalid port number: "x"', 1, ""),
        ('definition of service "s" not found', 1, ""),
    ]:
        error = etcd_fdw.postgres_error(psycopg2.OperationalError(server + text))
        assert (error.exit_code, remedy in str(error)) == (exit_code, True), error
        assert bool(remedy) == ("; " in str(error))


def test_proxies_of_the_environment_are_not_used(command):
    dead = f"http://{NO_ONE}"
    env = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy", "all_proxy"), dead)
    command(*VALIDATE, env=env, exit_code=0)


def owner(db: str, role: str, password: str) -> str:
    """Let a role do what the daemon does, with this password; return its DSN."""
    rows(db, f"GRANT CREATE ON SCHEMA public TO {role}; ALTER ROLE {role} PASSWORD %s", password)
    return make_dsn(db, user=role, password=password)


def test_password_and_value_are_nowhere_to_be_seen(
    daemon, db, prefix, etcd, etcd_address, schema_user
):
    password = "Kx7q'%@:/ \\Zw9p"
    dsn = owner(db, schema_user, password)
    login = psycopg2.extensions.parse_dsn(dsn)
    uri = "postgresql://?" + urllib.parse.urlencode(login, quote_via=urllib.parse.quote)
    one = daemon(*FAST, "-l", "debug", postgres=dsn)
    two = daemon(*FAST, "-l", "debug", postgres=uri, etcd=etcd_address.dsn(prefix), ready=False)
    two.wait_log("standing by")
    etcd.put(prefix + "a", "v4lue")
    rows(db, "SELECT etcd_set(%s, 'v4lue')", prefix + "b")
    rows(db, "INSERT INTO etcd_wal (key, value) VALUES (%s, 'v4lue')", prefix + "a")
    statuses(db)
    away = etcd_dsn(NO_ONE, "/x/", "u", password)
    three = daemon(*FAST, "-l", "debug", postgres=uri, etcd=away, ready=False)
    three.wait_log("retrying")
    for each in (one, two, three):
        each.stop()
        assert not re.search("Kx7q|Zw9p|v4lue|Traceback", each.log())
        for line in each.log().splitlines():
            assert LOG_LINE.fullmatch(line), line
    assert not rows(db, "SELECT FROM etcd_sync_event e WHERE e::text ~ 'Kx7q|Zw9p'")


def test_password_in_an_error_is_masked():
    for text, shown in [
        ("no answer from etcd://u:Kx7q@h:1/x", "no answer from etcd://u:****@h:1/x"),
        ("bad URI postgresql://u:K:/x@7q@h, sorry", "bad URI postgresql://u:****@h, sorry"),
        ("?user=u&password=Kx7q&sslmode=x", "?user=u&password=****&sslmode=x"),
        ("host=h password=Kx7q port=1", "host=h password=**** port=1"),
        (r"password = 'K x\'7q' host=h", "password = **** host=h"),
        ("oauth_client_secret=Kx7q port=1", "oauth_client_secret=**** port=1"),
        (
            "?scram_client_key=Kx7q&scram_server_key=a",
            "?scram_client_key=****&scram_server_key=****",
        ),
        ("sslkey=/client.key&key=/client.key",) * 2,  # files
        ('password authentication failed for user "u"',) * 2,
        ("dns:///h:2379: no such host",) * 2,
    ]:
        assert etcd_fdw.masked(text) == shown
    started = time.monotonic()
    for piece in ("a", "a ", "a=", "a='", "://a:", "://a:b@", "password", "&a%41", r"\'", "\t\n"):
        etcd_fdw.masked(piece * (200_000 // len(piece)))
    assert time.monotonic() - started < 10  # some minutes, if it grew with the square


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_short_password_damages_no_message(daemon, db, prefix, schema_user, log_format):
    one = daemon("--log-format", log_format, postgres=owner(db, schema_user, "t"))
    one.stop()
    assert "stopped" in one.log() and prefix in one.log() and "****" not in one.log()


@pytest.fixture(scope="module")
def tls_postgres() -> Iterator[tuple[LocalPostgres, str]]:
    """A PostgreSQL with TLS, and the DSN of fdw, who needs a client certificate."""
    server = LocalPostgres()
    authority = Authority(server.directory / "pki")
    authority.issue("server", "DNS:localhost")
    authority.issue("fdw")
    pki = authority.directory
    pki.chmod(0o755)
    for path in pki.iterdir():
        path.chmod(0o600)
        if path.name in ("ca.pem", "server.pem", "server.key") and server.account:
            os.chown(path, server.account["user"], server.account["group"])
    files = {"ca": "ca.pem", "cert": "server.pem", "key": "server.key"}
    server.args += ["-cssl=on", *(f"-cssl_{k}_file={pki / name}" for k, name in files.items())]
    try:
        with server:
            rows(server.dsn(), "CREATE ROLE fdw LOGIN SUPERUSER")
            hba = server.data_dir / "pg_hba.conf"
            hba.write_text("hostssl all fdw all cert\n" + hba.read_text())
            rows(server.dsn(), "SELECT pg_reload_conf()")
            files = {"sslrootcert": "ca.pem", "sslcert": "fdw.pem", "sslkey": "fdw.key"}
            options = {k: str(pki / name) for k, name in files.items()}
            options.update(host="localhost", hostaddr="127.0.0.1", user="fdw")
            yield server, make_dsn(server.dsn(), sslmode="verify-full", **options)
    except etcd_fdw.LocalServerError as exc:
        if "not supported by this build" not in str(exc):
            raise
        pytest.skip("this PostgreSQL was built without TLS")


def test_certificates_of_postgres_are_verified(daemon, tmp_path, tls_postgres):
    for wrong, exit_code, message in [
        ({"sslrootcert": str(Authority(tmp_path).ca)}, 2, "certificate verify failed"),
        ({"host": "elsewhere"}, 2, 'does not match host name "elsewhere"'),
        ({"sslcert": "/nonexistent"}, 3, "connection requires a valid client certificate"),
    ]:
        dsn = make_dsn(tls_postgres[1], **wrong)
        started = daemon(*FAST, "--startup-timeout", "0s", postgres=dsn, ready=False)
        assert started.wait_exit() == exit_code
        assert message in started.log()


def test_postgres_password_is_changed_while_running(daemon, tmp_path, etcd, prefix):
    """The new one is taken from .pgpass at the next connection."""
    passfile = tmp_path / "pgpass"
    passfile.touch(0o600)
    with LocalPostgres(password="Kx7qold") as server:
        passfile.write_text("*:*:*:*:Kx7qold")
        dsn = f"postgresql://postgres@127.0.0.1:{server.port}/postgres"
        started = daemon(*FAST, postgres=dsn, env={"PGPASSFILE": str(passfile)})
        rows(server.dsn(), "ALTER ROLE postgres PASSWORD 'Kx7qnew'")
        server.password = "Kx7qnew"
        server.restart()
        started.wait_log("ERROR .*password authentication failed.*retrying")
        passfile.write_text("*:*:*:*:Kx7qnew")
        etcd.put(prefix + "a", "1")
        wait_until("the put did not arrive", arrives(server.dsn(), prefix + "a"))
        assert "Kx7q" not in started.log()


@pytest.fixture
def roles(db: str) -> Iterator[Callable[..., None]]:
    """Roles daemon_… and app_… without any rights, for grant_example, of which kinds are given."""
    name = scalar(db, "SELECT current_database()")
    names = {"etcd_fdw": f"daemon_{RUN_ID}", "app": f"app_{RUN_ID}", "mydb": name}
    rows(db, SCHEMA_SQL)
    rows(db, f"REVOKE ALL ON SCHEMA public FROM PUBLIC; REVOKE ALL ON DATABASE {name} FROM PUBLIC")
    for role in (names["etcd_fdw"], names["app"]):
        create_role(db, role)
        rows(db, f"GRANT CONNECT ON DATABASE {name} TO {role}")
    yield partial(grant_example, db, **names)
    for role in (names["etcd_fdw"], names["app"]):
        rows(db, f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_documented_roles_are_enough(daemon, db, roles, own_client):
    """The grants are those in schema.sql's comments; nothing is left to PUBLIC."""
    roles("GRANT")
    app = make_dsn(db, user=f"app_{RUN_ID}")
    with Recorder(own_client, "/") as recorder:
        own_client.put("/app/a", "1")
        own_client.put("/other/a", "1")
        dsn = f"etcd://{own_client.endpoint}/"
        started = daemon(*FAST, postgres=make_dsn(db, user=f"daemon_{RUN_ID}"), etcd=dsn)
        own_client.put(b"/\xff", "no text")
        rows(app, "UPDATE etcd_kv SET value = '2' WHERE key = '/app/a'")
        apply_change(app, "/app/b")
        rows(app, "DELETE FROM etcd_kv WHERE key = '/app/a'")
        conflict = ask(app, "/other/a", None)
        assert ended(app, conflict).status == "conflict"
        retry = scalar(app, "SELECT etcd_retry(%s)", conflict)
        assert ended(app, retry).status == "success"

        roles(r"ALTER TABLE \w+ ENABLE|CREATE POLICY")
        own_client.put("/other/b", "1")
        apply_change(app, "/app/c")
        wait_until("/other/b did not arrive", arrives(db, "/other/b"))
        recorder.sync()  # its thread appends to what is replaced here
        recorder.events = [event for event in recorder.events if event.key != b"/\xff"]
        first = scalar(db, "SELECT first_revision FROM etcd_sync_state")
        assert_same(recorder, db, "/", since=first + 1)
        assert started.stop() == 0
        assert "ERROR" not in started.log()


# ── programs of the world: Patroni, CoreDNS, kine, Kubernetes ────────────────

# ─ Patroni ─


class PatroniMember:
    """A PostgreSQL under Patroni, both run by the user postgres if this is root."""

    def __init__(self, directory: Path, name: str, scope: str, etcd: EtcdAddress) -> None:
        self.api = f"127.0.0.1:{free_port()}"
        self.config_path = directory / f"{name}.yml"
        user = {"username": etcd.user, "password": etcd.password} if etcd.user else {}
        config = {
            "scope": scope,
            "name": name,
            "etcd3": {"host": etcd.endpoint, **user},
            "restapi": {"listen": self.api, "connect_address": self.api},
            "bootstrap": {
                "dcs": {"ttl": 15, "loop_wait": 2, "retry_timeout": 6},
                "initdb": [{"encoding": "UTF8"}, {"locale": "C"}, "no-sync"],
            },
            "postgresql": {
                "listen": f"127.0.0.1:{free_port()}",
                "data_dir": str(directory / name),
                "bin_dir": str(patroni_postgres()),
                "authentication": {
                    "superuser": {"username": "postgres"},
                    "replication": {"username": "replicator"},
                },
                "parameters": {"unix_socket_directories": str(directory), "fsync": "off"},
                "pg_hba": ["local all all trust"]
                + [f"host {what} all 127.0.0.1/32 trust" for what in ("all", "replication")],
            },
        }
        self.config_path.write_text(json.dumps(config))  # which is YAML as well
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        account: dict[str, Any] = {}
        if os.geteuid() == 0:
            account = {"user": "postgres", "group": "postgres", "extra_groups": []}
        self.process = subprocess.Popen(  # pytest shows what it says if the test fails
            [str(shutil.which("patroni")), str(self.config_path)],
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
            cwd=self.config_path.parent,
            stdin=subprocess.DEVNULL,
            **account,
        )

    def kill(self) -> None:
        """End it and its PostgreSQL, as a crash of the machine would."""
        if self.process:
            self.process.kill()
            self.process.wait()
        pid_file = self.config_path.with_suffix("") / "postmaster.pid"
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int(pid_file.read_text().split()[0]), signal.SIGQUIT)
            wait_until("PostgreSQL did not end", lambda: not pid_file.exists())

    def ask(self, path: str, body: dict[str, str] | None = None) -> int:
        """Send a request to its REST API; return the HTTP status, 0 for no answer."""
        with suppress(OSError):
            return http_get(self.api, f"/{path}", json.dumps(body).encode() if body else None)[0]
        return 0


def patroni_postgres() -> Path | None:
    """The directory with PostgreSQL's programs that the user postgres may run, the newest."""
    found = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max((path.parent for path in found), key=lambda p: float(p.parts[4]), default=None)


@pytest.fixture
def patroni(
    etcd_address: EtcdAddress, etcd: EtcdClient
) -> Iterator[tuple[str, list[PatroniMember]]]:
    """The prefix of a Patroni cluster of two, not started yet; it is stopped in the end."""
    if not shutil.which("patroni"):
        pytest.skip("needs Patroni: apt-get install patroni")
    if not patroni_postgres():
        pytest.skip("needs a PostgreSQL in /usr/lib/postgresql: apt-get install postgresql")
    directory = Path(tempfile.mkdtemp(prefix="patroni-"))  # pytest's own is closed to postgres
    if os.geteuid() == 0:
        shutil.chown(directory, "postgres", "postgres")
    scope = f"t{next(_numbers)}-{RUN_ID}"
    members = [PatroniMember(directory, name, scope, etcd_address) for name in ("pg1", "pg2")]
    yield f"/service/{scope}/", members
    for member in members:
        member.kill()
    etcd.delete(f"/service/{scope}/", prefix=True)
    shutil.rmtree(directory, ignore_errors=True)


def leader_of(members: Sequence[PatroniMember]) -> PatroniMember | None:
    return next((member for member in members if member.ask("primary") == 200), None)


@pytest.mark.timeout(600)
def test_patroni_is_changed_and_followed_as_readme_says(daemon, db, etcd_address, etcd, patroni):
    """Through a switchover, a crash of the leader, and restarts of the daemon."""
    prefix, members = patroni
    script = readme_block("patroni").replace("/service/batman/", prefix)
    leaders, history, configure, switch_over = re.findall(r"\S.*?;\n", script, re.DOTALL)
    servers = {"etcd": etcd_address.dsn(prefix)}
    with Recorder(etcd, prefix) as recorder:
        first = daemon(**servers)
        members[0].start()
        wait_until("Patroni made no cluster", lambda: leader_of(members))
        members[1].start()
        wait_until("pg2 is no replica", lambda: members[1].ask("replica") == 200)
        rows(db, configure)
        config = lambda: json.loads(http_get(members[0].api, "/config")[1])  # noqa: E731
        wait_until("not configured", lambda: config()["loop_wait"] == 3)

        def switched() -> bool:  # Patroni takes the key away, also where it does not do it yet
            if leader_of(members) is members[0] and not etcd.get(prefix + "failover"):
                with suppress(psycopg2.Error):  # our mirror may have the one that it took away
                    rows(db, switch_over)
            return leader_of(members) is members[1]

        wait_until("no switchover", switched)
        first.kill()
        wait_until("pg1 does not follow", lambda: members[0].ask("replica") == 200)
        second = daemon(**servers)
        members[1].kill()  # the lock goes when its lease expires
        wait_until("no failover", lambda: leader_of(members) is members[0])
        assert second.stop() == 0
        third = daemon(**servers)
        assert_same(recorder, db, prefix)
        seen = [leader for _, _, leader, _ in rows(db, leaders)]
        told = [e.value for e in recorder.history() if e.key.decode() == prefix + "leader"]
        assert seen == [value.decode() if value else "(nobody)" for value in told]
        inaugurations = iter(seen)  # in between nobody may lead, or a busy machine elect again
        assert all(name in inaugurations for name in ("pg1", "pg2", "(nobody)", "pg1"))
        assert "pg2" in [leader for *_, leader in rows(db, history)]
        assert third.returncode is None


# ─ CoreDNS ─


def program_of(name: str, version: str) -> str:
    """Return the path of a program that .ci/servers builds, or skip the test."""
    variable = f"ETCD_FDW_TEST_{name.upper()}_BIN"
    if found := shutil.which(name, path=os.environ.get(variable, "")):
        return found
    pytest.skip(f"needs {variable}, see bash .ci/servers {name}-{version}")


class LocalCoreDns(Breakable):
    """A CoreDNS that answers for the zone local.example from an etcd's keys below /skydns."""

    host = "127.0.0.2"  # free_port keeps the UDP port of its number on 127.0.0.1

    def __init__(self, program: str, endpoint: str) -> None:
        super().__init__()
        self.program, self.corefile = program, self.directory / "Corefile"
        etcd = f"etcd {{\n path /skydns\n endpoint http://{endpoint}\n }}"
        zone = f"local.example:{self.port} {{\n bind {self.host}\n {etcd}\n}}\n"
        self.corefile.write_text(zone)

    def command(self) -> list[str]:
        return [self.program, "-conf", str(self.corefile)]

    def is_ready(self) -> bool:
        with suppress(OSError):
            self.ask("local.example")
            return True
        return False

    def ask(self, name: str) -> str:
        """Ask for the address of a name, as `dig +short` does; '' if there is none."""
        labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.settimeout(5)
            sock.connect((self.host, self.port))
            header = struct.pack(">6H", 1, 0x100, 1, 0, 0, 0)  # one question, for a resolver
            sock.send(header + labels + b"\0" + struct.pack(">2H", 1, 1))  # A, IN
            answer = sock.recv(4096)
        _, flags, _, answers, others, _ = struct.unpack_from(">6H", answer)
        assert flags & 0xF in (0, 3), f"{name}: response code {flags & 0xF}"  # 3: no such name
        assert (answers, others) in ((1, 0), (0, 1)), f"{name}: {answers} and {others} records"
        return socket.inet_ntoa(answer[-4:]) if answers else ""


def test_dns_from_sql_answers_as_readme_shows(daemon, db, own_etcd):
    program = program_of("coredns", "1.15.0")
    daemon(etcd=etcd_dsn(own_etcd.endpoint, "/skydns/"))
    rows(db, readme_block("dns trigger"))
    steps = re.findall(r"^(\$ dig|app=>) (.*)\n((?:(?!\$|app=>).*\n)*)", readme_block("dns"), re.M)
    assert len(steps) >= 9
    with LocalCoreDns(program, own_etcd.endpoint) as dns:
        for kind, command, shown in steps:
            if kind == "app=>":
                rows(db, command)
                assert set(statuses(db)) == {"success"}
            else:
                name, address = command.split()[-1], shown.strip()
                message = f"{name} is not {address!r}"
                wait_until(message, lambda: dns.ask(name) == address)  # noqa: B023


# ─ kine, which k3s runs in etcd's place ─


class LocalKine(Breakable):
    """A kine that keeps its data in SQLite."""

    def __init__(self, program: str) -> None:
        super().__init__()
        self.program, self.endpoint = program, f"127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        store = f"--endpoint=sqlite://{self.directory}/db.sqlite?_journal=WAL"
        listen = f"--listen-address=tcp://{self.endpoint}"
        compact = ["--compact-interval=1s", "--compact-min-retain=0"]
        return [self.program, store, listen, "--metrics-bind-address=0", *compact]

    def is_ready(self) -> bool:
        with EtcdClient(self.endpoint, timeout=1) as client:
            return store_revision(client) > 0


def write_as_kubernetes(client: EtcdClient, key: str, value: str | None) -> int:
    """Create, update or delete in the one form of Txn that kine takes; return the revision."""
    kv = client.get(key)
    change = client.delete_op(key) if value is None else client.put_op(key, value)
    request = etcdrpc.TxnRequest(
        compare=[client.unchanged(key, kv.mod_revision if kv else 0)],
        success=[change],
        failure=[etcdrpc.RequestOp(request_range=etcdrpc.RangeRequest(key=key.encode()))]
        if kv
        else [],
    )
    answer = client.call(client.kv.Txn, request)
    assert answer.succeeded
    return int(answer.header.revision)


def test_kine_is_mirrored_and_changes_wait(daemon, command, db):
    key = b"/registry/a"
    kine = LocalKine(program_of("kine", "0.17.5"))
    with kine, EtcdClient(kine.endpoint) as client:
        dsn = etcd_dsn(kine.endpoint, "/registry/")
        told = [write_as_kubernetes(client, key.decode(), "1")]
        one = daemon(*FAST, etcd=dsn)
        change = ask(db, "/registry/b")
        one.wait_log("ERROR .*; changes wait, this server can only be mirrored; ")
        told += [write_as_kubernetes(client, key.decode(), value) for value in ("2", None, "3")]
        wait_equal(db, client, "/registry/")
        expected = list(zip(told, [key] * 4, [b"1", b"2", None, b"3"]))
        assert mirror_rows(db, key.decode()) == expected
        assert wal_rows(db, id_=change)[0].status == "pending"
        assert len(re.findall("watching", one.log())) == 1  # one session
        assert "can only be mirrored" in command("status", etcd=dsn).stdout
        assert "can only be mirrored" in command(*VALIDATE, etcd=dsn, exit_code=0).stdout
        command("validate", etcd=dsn, exit_code=0)
        assert one.stop() == 0

        def compacted() -> bool:
            with suppress(grpc.RpcError):
                return client.range(key, told[-1] - 1) is None
            return True

        wait_until("nothing was compacted", compacted)
        two = daemon(*FAST, etcd=dsn)  # it refuses to watch from there, where etcd does not
        write_as_kubernetes(client, key.decode(), "4")
        wait_equal(db, client, "/registry/")
        assert len(re.findall("watching", two.log())) <= 2


# ─ Kubernetes ─


def test_objects_of_kubernetes_are_read_and_undeleted_as_readme_says(daemon, db, own_client):
    """The Pod is protobuf as k8s.io/apimachinery makes it, the other one JSON."""
    pod, custom = "/registry/pods/default/web-1", "/registry/stable.example.com/crontabs/default/ct"
    rows(db, SCHEMA_SQL)
    rows(db, readme_block("kubernetes objects"))
    query, undelete = re.findall(r"^SELECT .*?;$", readme_block("kubernetes objects"), re.M | re.S)
    meta = '"name": "ct", "namespace": "default", "managedFields": [{"manager": "helm"}]'
    told = f'{{"apiVersion": "stable.example.com/v1", "kind": "CronTab", "metadata": {{{meta}}}}}'
    daemon(etcd=etcd_dsn(own_client.endpoint, "/registry/"))
    own_client.put(pod, World.POD)
    own_client.put(custom, told)
    own_client.put("/registry/health", '{"health": "true"}')
    wait_equal(db, own_client, "/registry/")
    ((*found, _),) = rows(db, query)
    assert found == ["v1", "Pod", "pods", "default", "web-1", ["kubectl-edit", "kubelet"]]
    ((*found, _),) = rows(db, query.replace("'Pod'", "'CronTab'"))
    assert found[1:] == ["CronTab", "stable.example.com/crontabs", "default", "ct", ["helm"]]
    own_client.delete(pod)
    wait_equal(db, own_client, "/registry/")
    assert rows(db, undelete) and statuses(db) == ["success"]
    assert own_client.get(pod).value == World.POD


# ── demo, README, packaging ──────────────────────────────────────────────────

README = SCRIPT.with_name("README.md")


def readme_block(marker: str) -> str:
    """The fenced block of README.md behind <!-- marker -->."""
    match = re.search(rf"<!-- {marker} -->\n```\w*\n(.*?)```", README.read_text(), re.DOTALL)
    assert match, f"README.md has no block {marker}"
    return match[1]


def test_readme_shows_every_option_with_its_default():
    text = README.read_text().partition("## Options")[2].partition("| command |")[0]
    table = dict(re.findall(r"^\| (`.*?`) \| (.*?) \|", text, re.MULTILINE))
    defaults: dict[str, str] = {}
    for flags, default in table.items():
        names = re.findall(r"--[a-z-]+", flags)
        defaults.update(zip(names, default.split(", ") if len(names) > 1 else [default]))
    for option in etcd_fdw.OPTIONS:
        shown = defaults[option.flag]
        absent = ("required",) if option.required else ("off", "none")
        default = option.default if option.default != "false" else None
        assert shown in ((default,) if default else absent), option.name


def test_readme_names_every_command_and_its_options():
    text = README.read_text()
    parser = etcd_fdw.build_parser()
    (commands,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    common = {option.flag for option in etcd_fdw.OPTIONS}
    for name, command in commands.choices.items():
        assert f"| `{name}" in text, name
        own = {flag for a in command._actions for flag in a.option_strings if flag[:2] == "--"}
        for flag in own - common - {"--help"}:
            assert f"`{flag}`" in text, f"{name} {flag}"


def test_commands_of_the_readme_parse():
    calls = re.findall(
        r"^(?:\$ |command=|ExecStart=|.*&& )?\S*python3? \S*etcd_fdw\.py (.*)$",
        README.read_text(),
        re.MULTILINE,
    )
    assert len(calls) >= 6
    for call in calls:
        etcd_fdw.build_parser().parse_args(shlex.split(call))


def test_troubleshooting_has_every_warning_and_error():
    text = README.read_text().partition("## Troubleshooting")[2].partition("\n## ")[0]
    tree = ast.parse(SCRIPT.read_text())
    messages = [
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("log.warning", "log.error")
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    ]
    assert len(messages) >= 10
    for message in messages:
        words = max(re.split(r"%(?:\(\w+\))?[.\d]*[a-z]", message), key=len).strip(" :;,")
        assert words in text, message


def test_loop_that_measures_pauses_has_a_line_for_each_change(daemon, db, prefix):
    if not shutil.which("psql"):
        pytest.skip("needs psql")
    daemon()
    loop = subprocess.Popen(
        ["bash", "-c", readme_block("probe").replace("/config/", prefix)],
        env={**clean_environ(), "DSN": db},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert loop.stdout
    with closing(loop.stdout):
        lines = [loop.stdout.readline() for _ in range(3)]
        os.killpg(loop.pid, signal.SIGKILL)
        loop.wait()
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \S+\|success\n", line) for line in lines), lines


def test_alerts_and_dashboard_ask_for_what_metrics_has(daemon, db, prefix, etcd):
    """A rule or panel on a metric that is not there never fires, and never says so."""
    configs = {k: v["content"].replace("$$", "$") for k, v in compose()["configs"].items()}
    alerts = yaml.safe_load(configs["alerts"])
    assert alerts == yaml.safe_load(readme_block("alerts"))
    panels = json.loads(configs["dashboard"])["panels"]
    asked = [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    asked += [target["expr"] for panel in panels for target in panel["targets"]]
    named = set(re.findall(r"\betcd_fdw_\w+", " ".join(asked)))
    assert len(asked) >= 15 and len(named) >= 12
    one = daemon("--metrics-address", "127.0.0.1:0")

    def missing() -> set[str]:
        return named - {name.partition("{")[0] for name in read_metrics(one)}

    wait_until(f"these do not exist: {missing()}", lambda: not missing())
    scraped = yaml.safe_load(configs["prometheus"])["scrape_configs"]
    assert [job["static_configs"][0]["targets"] for job in scraped] == [["etcd_fdw:9379"]]


def test_uninstalling_as_readme_says_leaves_nothing(db):
    before = "SELECT relname FROM pg_class UNION ALL SELECT proname FROM pg_proc ORDER BY 1"
    found = rows(db, before)
    rows(db, SCHEMA_SQL)
    assert rows(db, before) != found
    rows(db, readme_block("uninstall"))
    assert rows(db, before) == found


def test_going_back_as_readme_says_leaves_a_schema_that_can_be_upgraded(db):
    rows(db, SCHEMA_SQL)
    columns = "SELECT table_name, column_name FROM information_schema.columns"
    new = set(rows(db, columns))
    rows(db, "CREATE VIEW mine AS SELECT key FROM etcd_kv")
    with pytest.raises(psycopg2.errors.DependentObjectsStillExist):
        rows(db, readme_block("rollback"))  # and nothing is changed
    rows(db, "DROP VIEW mine")
    rows(db, readme_block("rollback"))
    assert not rows(db, "SELECT FROM pg_proc WHERE proname = 'etcd_schema_version'")
    assert ("etcd", "version") not in set(rows(db, columns))
    # what version 4 applies, as far as an upgrade asks
    rows(db, "CREATE FUNCTION etcd_schema_version() RETURNS int LANGUAGE sql AS 'SELECT 4'")
    rows(db, SCHEMA_SQL)
    assert scalar(db, "SELECT etcd_schema_version()") == etcd_fdw.SCHEMA_VERSION
    assert set(rows(db, columns)) == new


FOLLOWER = """
import sys
{code}

def note(cur, *change):
    cur.execute("INSERT INTO followed VALUES (%s, %s, %s, %s)", change)

def forget(cur):
    cur.execute("DELETE FROM followed")

follow(sys.argv[1], sys.argv[2], note, forget)
"""


def test_follower_of_the_readme_takes_each_change_once(daemon, command, db, prefix, etcd, tmp_path):
    """Also when it is killed, when its connection breaks, while it is away, and after a reset."""
    one = daemon("--notify-channel", "etcd_mirrored")
    rows(db, "CREATE TABLE followed (revision bigint, key text, value text, deleted boolean)")
    program = tmp_path / "follower.py"
    program.write_text(FOLLOWER.format(code=readme_block("follower")))
    dsn = make_dsn(db, application_name="follower")
    mirrored = "SELECT revision, key, value, tombstone FROM etcd ORDER BY revision, key"
    followed = "SELECT revision, key, value, deleted FROM followed ORDER BY revision, key"

    def change() -> int:
        """Return the last of three revisions of two keys, a deletion."""
        for value in "12":
            etcd.txn([etcd.put_op(prefix + key, value) for key in "ab"])
        return int(etcd.txn([etcd.delete_op(prefix + "a")]).header.revision)

    def assert_follows() -> None:
        last = change()
        there = "SELECT FROM followed WHERE revision = %s"
        wait_until("it does not follow", lambda: rows(db, there, last))
        assert rows(db, followed) == rows(db, mirrored)

    for _ in range(3):
        with Daemon(tmp_path / "follower.log", dsn, prefix, script=program) as follower:
            wait_until("it does not start", lambda: scalar(db, "SELECT to_regclass('follower')"))
            assert_follows()
            end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            assert rows(db, f"{end} WHERE application_name = 'follower'")
            assert_follows()
            assert follower.returncode is None, follower.log()
        change()
    one.stop()
    command("sync", "--reset", "--yes", exit_code=0)
    etcd.put(prefix + "c", "")
    daemon("--notify-channel", "etcd_mirrored")
    with Daemon(tmp_path / "follower.log", dsn, prefix, script=program):
        assert_follows()


def compose() -> dict[str, Any]:
    """What docker-compose.test.yml says."""
    return dict(yaml.safe_load(SCRIPT.with_name("docker-compose.test.yml").read_text()))


def test_container_stays_down_where_a_person_is_needed():
    """The policy on-failure starts it again after every exit code but 0."""
    misconfigured = run_as_in_the_container({"ETCD_FDW_LOG_LEVEL": "loud"})  # the script's 1
    alone = run_as_in_the_container({"ETCD_FDW_STARTUP_TIMEOUT": "0s"})
    assert (misconfigured.wait(WAIT_S), alone.wait(WAIT_S)) == (0, 2)


def test_container_stops_in_good_order(db, etcd_address, prefix):
    servers = {"ETCD_FDW_POSTGRES_DSN": db, "ETCD_FDW_ETCD_DSN": etcd_address.dsn(prefix)}
    container = run_as_in_the_container(servers)
    try:
        mirrors = "SELECT count(*) FROM etcd_sync_state WHERE pid IS NOT NULL"
        created = "SELECT to_regclass('etcd_sync_state')"
        wait_until("it makes no tables", lambda: scalar(db, created))
        wait_until("it does not start", lambda: scalar(db, mirrors))
        container.terminate()
        assert container.wait(WAIT_S) == 0
        assert not scalar(db, mirrors)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(container.pid, signal.SIGKILL)


def run_as_in_the_container(environ: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start the script as docker-compose.test.yml does, with nothing that would answer."""
    service = compose()["services"]["etcd_fdw"]
    assert service["restart"] == "on-failure"
    nobody = {
        "ETCD_FDW_POSTGRES_DSN": f"postgresql://postgres@{NO_ONE}/postgres",
        "ETCD_FDW_ETCD_DSN": f"etcd://{NO_ONE}/",
    }
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        [part.replace("$$", "$") for part in service["command"]],
        cwd=SCRIPT.parent,
        env=clean_environ({**nobody, **environ, "PATH": path}),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def test_requirements_are_those_of_the_script_block():
    lines = SCRIPT.with_name("requirements.txt").read_text().splitlines()
    required = {line.strip() for line in lines if line.strip() and not line.startswith("#")}
    block = re.search(r"^# dependencies = (\[[^]]*\])$", SCRIPT.read_text(), re.MULTILINE)
    assert block
    listed = ast.literal_eval(block[1].replace("#", ""))
    assert set(listed) == required | {"PyYAML"}  # for --config


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has another account for PostgreSQL")
def test_what_root_writes_is_in_a_folder_of_root():
    """A symbolic link planted in a folder of another account overwrote a file of root's."""
    with LocalPostgres(password="secret") as server:
        assert server.directory.stat().st_uid == 0
        assert not server.directory.stat().st_mode & 0o022
        owned = [path for path in server.directory.iterdir() if path.stat().st_uid != 0]
        assert server.data_dir in owned and server.log_path not in owned
        assert {path.stat().st_mode & 0o077 for path in owned if path.is_file()} <= {0}
        assert scalar(server.dsn(), "SELECT 1") == 1


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_demo_shows_everything_and_cleans_up(tmp_path, end):
    environ = {  # of other servers
        "ETCDCTL_ENDPOINTS": NO_ONE,
        "ETCDCTL_USER": "u:p",
        "PGSSLMODE": "verify-full",
        "ETCD_FDW_MAX_TXN_OPS": "many",
    }
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o755)  # PostgreSQL is another user
        demo = Daemon(tmp_path / "demo.log", "demo", env={**environ, "TMPDIR": home})
        try:
            demo.wait_log("until you press Ctrl-C")
            shown = demo.log()
            dsn = demo.wait_log(r"psql (\S+)")[1]
            for line in readme_block("demo output").splitlines():
                assert line in shown.splitlines(), line
            assert scalar(dsn, "SELECT count(*) FROM etcd_kv") == 2
            demo.signal(end)
            demo.signal(signal.SIGHUP)  # a closed terminal sends it twice: itself, and the shell
            assert demo.wait_exit() == 0
            assert "Traceback" not in demo.log()
        finally:
            demo.kill()
        assert not os.listdir(home)
    with pytest.raises(psycopg2.OperationalError):
        connect(dsn)


# ── soak ─────────────────────────────────────────────────────────────────────
#
# pytest -m soak: what takes minutes, or as long as you let it.


@pytest.mark.timeout(0)
@pytest.mark.parametrize("prefix", ["registry/"])  # elsewhere they begin with a slash
def test_soak(daemon, db, own_etcd, network, db_network, load, seed):
    """Load in both directions and random faults for ETCD_FDW_SOAK_S seconds (1200)."""
    seconds = float(os.environ.get("ETCD_FDW_SOAK_S", "1200"))
    dice = random.Random(seed)
    servers = {"postgres": db_network, "etcd": network, "query": FAST_ETCD}
    start = partial(daemon, *FAST, **servers)
    running = [start(), start(ready=False)]
    play = load(own_etcd.endpoint, seed=seed, bulk=2)
    counts: collections.Counter[str] = collections.Counter()

    def kill_daemon() -> None:
        running.pop(dice.randrange(2)).kill()
        running.append(start(ready=False))

    def fail_network() -> None:
        proxy = dice.choice([network, db_network])
        dice.choice([proxy.cut, proxy.stall, proxy.refuse])()
        play.run(dice.randrange(200))
        proxy.resume()

    def bytes_arrive_late() -> None:  # those of the last time
        network.release()
        network.hold()

    def pause_etcd() -> None:
        own_etcd.pause()
        threading.Event().wait(dice.uniform(0.5, 6))
        own_etcd.resume()

    def kill_etcd() -> None:
        own_etcd.kill()
        own_etcd.start()

    def lose_postgres() -> None:
        end_sessions(db)

    def lock_mirror() -> None:
        with frozen_mirror(db):
            play.run(dice.randrange(100))

    faults: list[Callable[[], None]] = [kill_daemon, fail_network, bytes_arrive_late, kill_etcd]
    faults += [pause_etcd, own_etcd.restart, play.compact, lose_postgres, lock_mirror]
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        play.run(dice.randrange(200))
        fault = dice.choice(faults)
        with suppress(grpc.RpcError):
            fault()
        counts[fault.__name__] += 1
        if sum(counts.values()) % 5 == 0:
            play.wait_flow()
    network.release()
    statuses = play.finish(gaps=True)
    print(f"{seconds:.0f} s, faults: {dict(counts)}; etcd changes:")
    print(f"{play.etcd_changes}; SQL changes: {dict(statuses)}; differences: 0")


# ── bench ────────────────────────────────────────────────────────────────────
#
# pytest -m bench -s: each measurement has servers of its own, with the defaults of PostgreSQL
# (fsync and synchronous_commit on) and of etcd. Load and bare clients are processes of their own.
# Nothing is asserted about time, only that what was measured is complete.

BENCH_SCALE = float(os.environ.get("ETCD_FDW_BENCH_SCALE") or 0.3)


def scaled(number: int, least: int = 100) -> int:
    """Return the number of things to measure with, for the scale that was asked for."""
    return max(least, int(number * BENCH_SCALE))


def put_load(
    endpoint: str, prefix: str, txns: int, keys: int, size: int, at_once: int
) -> tuple[float, float]:
    """Send Txns of `keys` puts, at_once of them in flight; return when that began and ended."""
    value, errors = random_text(size), []
    requests = [
        etcdrpc.TxnRequest(
            success=[EtcdClient.put_op(f"{prefix}{n * keys + i:07}", value) for i in range(keys)]
        ).SerializeToString()
        for n in range(txns)
    ]
    slots = threading.Semaphore(at_once)

    def done(future: Any) -> None:
        slots.release()
        if future.exception():
            errors.append(future.exception())

    with EtcdClient(endpoint) as client:
        send = client.channel.unary_unary("/etcdserverpb.KV/Txn")  # bytes in, bytes out: cheap
        began = time.monotonic()
        for request in requests:
            slots.acquire()
            send.future(request).add_done_callback(done)
        for _ in range(at_once):
            slots.acquire()
    assert not errors, errors[0]
    return began, time.monotonic()


def bare_watch(endpoint: str, prefix: str, start_revision: int, count: int) -> tuple[float, float]:
    """Watch until so many events have come; return when that began and ended (monotonic)."""
    with EtcdClient(endpoint) as client:
        began = time.monotonic()
        for response in client.watch(start_revision, prefix):
            count -= len(response.events)
            if count <= 0:
                break
        return began, time.monotonic()


def bare_txns(endpoint: str, prefix: str, txns: int, groups: int, members: int) -> float:
    """Send Txns as the program makes them, one by one; return how many changes a second that are.

    Each has `groups` transactions with `members` changes; 0: all change one key, one after another.
    """
    value, numbers, revision = random_text(64), itertools.count(), 0
    with EtcdClient(endpoint) as client:
        began = time.monotonic()
        for _ in range(txns):
            txn = etcdrpc.TxnRequest()
            for _ in range(groups or 1):
                nested = txn.success.add().request_txn
                for _ in range(members):
                    key = f"{prefix}{next(numbers) if groups else 0}".encode()
                    expected = 0 if groups else revision
                    nested.compare.add(key=key, target=etcdrpc.Compare.MOD, mod_revision=expected)
                    put = nested.success.add().request_put
                    put.key, put.value, put.ignore_lease = key, value, expected > 0
                    nested.failure.add().request_range.key = key
            answer = client.kv.Txn(txn)
            assert all(one.response_txn.succeeded for one in answer.responses)
            revision = answer.header.revision
    return txns * (groups or 1) * members / (time.monotonic() - began)


def sql_load(db: str, sessions: int, each: int, statement: str) -> Callable[[], float]:
    """Open sessions; return what commits `each` transactions in each, and returns when it began.

    They run in a loop on the server, and do not wait for the disk, which limits how many fit into a
    second; c, i: session, turn.
    """
    block = """
        DO $$ DECLARE c int := {};
        BEGIN FOR i IN 1..{} LOOP {}; COMMIT; END LOOP; END $$
    """
    options = "-csynchronous_commit=off"
    cursors = [connect(db, options=options).cursor() for _ in range(sessions)]

    def run() -> float:
        began = time.monotonic()
        in_threads(sessions, lambda n: cursors[n].execute(block.format(n, each, statement)))
        return began

    return run


# for sql_load: so many rows in one transaction
INSERT_ROWS = """
    INSERT INTO etcd_wal (key, value)
    SELECT format('{}%s/%s/%s', c, i, n), repeat('v', 64) FROM generate_series(1, {}) n
"""


class Figure(NamedTuple):
    """One line of the table; bare: the same by a client that does nothing else."""

    what: str
    value: float
    unit: str
    bare: float | None = None
    note: str = ""

    def __str__(self) -> str:
        ratio = f"{self.bare:>12,.0f} {self.value / self.bare:>6.2f}" if self.bare else ""
        value = f"{self.value:,.0f}" if self.value >= 1000 else f"{self.value:,.2f}"
        return f"{self.what:<58} {value:>12} {self.unit:<11} {ratio:>19}  {self.note}".rstrip()


class Bench:
    """Servers for one measurement, and the figures of all."""

    def __init__(self, figures: list[Figure], log_dir: Path, stack: ExitStack) -> None:
        self.figures, self.log_dir, self.stack = figures, log_dir, stack
        self.postgres = stack.enter_context(LocalPostgres(["-c", "fsync=on"]))
        self.etcd = stack.enter_context(LocalEtcd(["--quota-backend-bytes=8589934592"]))
        self.client = stack.enter_context(EtcdClient(self.etcd.endpoint))
        processes = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))
        self.start = stack.enter_context(processes).submit
        self.numbers = itertools.count(1)

    def setting(self) -> tuple[str, str]:
        """Return a fresh prefix, and the DSN of a fresh database."""
        number = next(self.numbers)
        rows(self.postgres.dsn(), f"CREATE DATABASE b{number}")
        return f"/b{number}/", self.postgres.dsn(f"b{number}")

    def daemon(self, prefix: str, db: str, *args: str) -> Daemon:
        """Start the program and wait until it mirrors."""
        log_path = self.log_dir / f"daemon{next(self.numbers)}.log"
        daemon = Daemon(log_path, "-p", db, "-e", etcd_dsn(self.etcd.endpoint, prefix), *args)
        self.stack.callback(daemon.kill)
        daemon.wait_log("watching")
        return daemon

    def watched_load(
        self, prefix: str, txns: int, keys: int, size: int, at_once: int
    ) -> tuple[float, float]:
        """Put; return when that began, and how many events a second a bare watch client got."""
        endpoint, count = self.etcd.endpoint, txns * keys
        watch = self.start(bare_watch, endpoint, prefix, self.client.revision() + 1, count)
        began, _ = self.start(put_load, endpoint, prefix, txns, keys, size, at_once).result()
        return began, count / (watch.result()[1] - began)

    def add(self, *figure: Any, note: str = "") -> None:
        self.figures.append(Figure(*figure)._replace(note=note))
        print(self.figures[-1], flush=True)

    def add_percentiles(self, what: str, samples: Iterable[float], note: str = "") -> None:
        """Add figures for latencies in seconds."""
        ms = sorted(sample * 1000 for sample in samples)
        points = {"p50": ms[len(ms) // 2], "p99": ms[len(ms) * 99 // 100], "max": ms[-1]}
        for name, value in points.items():
            self.add(f"{what}, {name}", value, "ms", note=note)


def wait_state(db: str, column: str, least: int) -> float:
    """Wait until a column of etcd_sync_state has come so far; return when (monotonic)."""
    sql = f"SELECT {column} FROM etcd_sync_state"
    wait_until(f"{column} did not reach {least}", lambda: scalar(db, sql) >= least, 300)
    return time.monotonic()


def memory(daemon: Daemon) -> str:
    return f"{peak_mib(daemon.pid):.0f} MiB resident at most"


@pytest.fixture(scope="module")
def figures() -> Iterator[list[Figure]]:
    """The figures of all measurements, shown at the end as a table."""
    figures: list[Figure] = []
    yield figures
    head = f"{'what':<58} {'figure':>12} {'unit':<11} {'bare':>12} {'ratio':>6}  note"
    print("\n", head, *figures, "", sep="\n")
    if path := os.environ.get("ETCD_FDW_BENCH_JSON"):
        data = {"scale": BENCH_SCALE, "figures": [figure._asdict() for figure in figures]}
        Path(path).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def bench_etcd_to_postgres(bench: Bench) -> None:
    """Throughput of the mirror, following a load and catching up; against a bare watch client."""
    for what, *shape in (
        ("64 writers, 64 B", scaled(100_000), 1, 64, 64),
        ("Txns of 100 keys, 64 B", scaled(3000, 20), 100, 64, 4),
        ("Txns of 100 keys, 1 KiB", scaled(500, 20), 100, 1024, 4),
    ):
        what = f"etcd to SQL, {what}"
        prefix, db = bench.setting()
        count = shape[0] * shape[1]
        bench.daemon(prefix, db).stop()
        start = bench.client.revision() + 1
        _, alone = bench.watched_load(prefix, *shape)
        began, ended = bench.start(bare_watch, bench.etcd.endpoint, prefix, start, count).result()
        daemon = bench.daemon(prefix, db)
        daemon_began = time.monotonic()
        caught_up = count / (wait_state(db, "revision", bench.client.revision()) - daemon_began)
        note = f"{shape[0]} missed revisions"
        bench.add(f"{what}: catch-up", caught_up, "events/s", count / (ended - began), note=note)
        began, followed = bench.watched_load(prefix, *shape)
        rate = count / (wait_state(db, "revision", bench.client.revision()) - began)
        bench.add(what, rate, "events/s", followed, note=f"the bare client alone: {alone:,.0f}")
        assert scalar(db, "SELECT count(*) FROM etcd") == 2 * count
        daemon.stop()


def bench_postgres_to_etcd(bench: Bench) -> None:
    """Throughput of the push; against a bare client that sends the same Txns one after another."""
    for what, sessions, transactions, members, statement in (
        ("one INSERT of 50 k rows", 1, 1, scaled(50_000), INSERT_ROWS),
        ("32 sessions, one-row transactions", 32, scaled(1000, 10), 1, INSERT_ROWS),
        ("transactions of 10 changes", 8, scaled(400, 10), 10, INSERT_ROWS),
        ("one hot key", 1, scaled(2000, 10), 1, "PERFORM etcd_set('{}0', i::text)"),
    ):
        what = f"SQL to etcd, {what}"
        prefix, db = bench.setting()
        count = sessions * transactions * members
        daemon = bench.daemon(prefix, db)
        width = members if members <= 10 else 1
        groups = 0 if "hot" in what else 100 - width  # of --max-txn-ops
        shape = max(1, count // (groups or 1) // width), groups, width
        etcd = bench.etcd.endpoint
        bare = bench.start(bare_txns, etcd, f"/bare{prefix}", *shape).result()
        write = sql_load(db, sessions, transactions, statement.format(prefix, members))
        began = write()
        if sessions == transactions == 1:
            began = time.monotonic()  # nobody can see a row before
        finished = wait_state(db, "applied", count)
        bench.add(what, count / (finished - began), "changes/s", bare)
        assert scalar(db, "SELECT count(*) FROM etcd_wal WHERE status = 'success'") == count
        daemon.stop()


def sender(target: str) -> Callable[[str], Any]:
    """Return what changes a key at the target, an etcd endpoint or a DSN, to the time of now."""
    if target.startswith("postgresql:"):
        return lambda key: rows(target, "SELECT etcd_set(%s, %s)", key, repr(time.monotonic()))
    client = EtcdClient(target)
    return lambda key: client.put(key, repr(time.monotonic()))


def mirror_latencies(db: str, prefix: str) -> Iterator[float]:
    """Yield 0 once it listens, then how long changes by sender() took to be seen in the mirror."""
    sql = f"""
        CREATE FUNCTION seen() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_notify('seen', NEW.value); RETURN NULL; END $$;
        CREATE TRIGGER seen AFTER INSERT ON etcd FOR EACH ROW
        WHEN (starts_with(NEW.key, '{prefix}latency/')) EXECUTE FUNCTION seen();
        LISTEN seen
    """
    with session(db, sql) as cur:
        yield 0.0
        while select.select([cur.connection], [], [], 60)[0]:
            cur.connection.poll()
            while cur.connection.notifies:
                yield time.monotonic() - float(cur.connection.notifies.pop(0).payload)
    raise TimeoutError("a change did not arrive in SQL")


def watch_latencies(endpoint: str, prefix: str) -> Iterator[float]:
    """Yield 0 once it watches, then how long changes by sender() took to be seen by it."""
    with EtcdClient(endpoint) as client:
        for response in client.watch(0, prefix + "latency/"):
            if response.created:
                yield 0.0
            for event in response.events:
                yield time.monotonic() - float(event.kv.value)


def timed(count: int, action: Callable[[int], Any]) -> list[float]:
    """How long each of so many actions took."""
    samples = []
    for n in range(count):
        began = time.monotonic()
        action(n)
        samples.append(time.monotonic() - began)
    return samples


def bench_latency(bench: Bench) -> None:
    """How long one change takes each way.

    The floor of each way is what its durable writes cost by themselves.
    """
    prefix, db = bench.setting()
    count = scaled(500)
    puts = timed(count, lambda n: bench.client.put(f"/floor{prefix}{n}", str(n)))
    rows(db, "CREATE TABLE floor (n int)")
    commits = timed(count, lambda n: rows(db, "INSERT INTO floor VALUES (%s)", n))
    bench.add_percentiles("floor of etcd to SQL: a put", puts)
    bench.add_percentiles("floor of SQL to etcd: a commit and a put", map(sum, zip(puts, commits)))
    bench.daemon(prefix, db)
    endpoint = bench.etcd.endpoint
    for what, target, latencies in (
        ("latency etcd to SQL", endpoint, mirror_latencies(db, prefix)),
        ("latency SQL to etcd", db, watch_latencies(endpoint, prefix)),
    ):
        send, samples = sender(target), []
        next(latencies)  # both are there
        for n in range(count):
            send(f"{prefix}latency/{n}")
            samples.append(next(latencies))
        bench.add_percentiles(what, samples)


def bare_pages(endpoint: str, prefix: str) -> float:
    """Read all keys page by page, as the program does, and only count them."""
    target = etcd_fdw.parse_etcd_dsn(etcd_dsn(endpoint, prefix))
    etcd = etcd_fdw.Etcd(target, endpoint)
    began = time.monotonic()
    count = sum(len(page.kvs) for page in etcd.pages(0))
    return count / (time.monotonic() - began)


def bench_first_copy(bench: Bench) -> None:
    """First copy and resync of an unchanged mirror; against a client that only reads the pages."""
    prefix, _ = bench.setting()
    sql = """
        SELECT (details->>'keys')::bigint / extract(epoch FROM duration) FROM etcd_sync_event
        WHERE operation = %s AND (details->>'keys')::bigint = %s
    """
    held, endpoint = 0, bench.etcd.endpoint
    bench.client.timeout = 120.0  # to compact a million keys
    for size in (10_000, 100_000, 1_000_000):
        count = scaled(size, 1000) // 100 * 100
        more = (count - held) // 100
        bench.start(put_load, endpoint, f"{prefix}{count}/", more, 100, 64, 4).result()
        held = count
        bare = bench.start(bare_pages, endpoint, prefix).result()
        _, db = bench.setting()
        for operation, what in (("snapshot", "first copy of"), ("resync", "resync of unchanged")):
            daemon = bench.daemon(prefix, db)
            daemon.wait_log("copied")
            rate = float(scalar(db, sql, operation, count))
            bench.add(f"{what} {count:,} keys", rate, "keys/s", bare, note=memory(daemon))
            daemon.stop()
            bench.client.put("elsewhere", "")
            bench.client.compact(bench.client.revision())
        assert scalar(db, "SELECT count(*) FROM etcd") == count


def bench_reads(bench: Bench) -> None:
    """Reading in SQL: 100 keys with long histories, and many keys."""
    prefix, db = bench.setting()
    bench.daemon(prefix, db).stop()
    keys = scaled(1_000_000)
    fill = """
        INSERT INTO etcd (key, value, revision)
        SELECT %s || n %% %s, repeat('v', 64), r * 100 + 10
        FROM generate_series(1, %s) r, generate_series(1, %s) n
    """
    rows(db, fill, f"{prefix}h/", 100, keys // 100, 100)
    rows(db, fill, f"{prefix}m/", keys, 1, keys)
    rows(db, "UPDATE etcd_sync_state SET revision = %s", keys + 100)
    rows(db, "ANALYZE etcd")
    for what, sql in (
        ("a key of many revisions", f"etcd_get('{prefix}h/7')"),
        ("a key of many keys", f"etcd_get('{prefix}m/77')"),
        ("100 keys in the past", f"etcd_at({keys // 2}, '{prefix}h/')"),
    ):

        def read(_: int, sql: str = sql) -> None:
            rows(db, f"SELECT count(*) FROM (SELECT * FROM {sql} OFFSET 0) x")

        bench.add(f"read {what}", sorted(timed(50, read))[25] * 1000, "ms")


def bench_idle(bench: Bench) -> None:
    """What it costs to have nothing to do."""
    daemon = bench.daemon(*bench.setting())
    before, wait_s = cpu_s(daemon.pid), max(1.0, 60 * BENCH_SCALE)
    time.sleep(wait_s)
    share = (cpu_s(daemon.pid) - before) / wait_s
    bench.add("idle: CPU", share * 100, "% of a core", note=memory(daemon))


def bench_backlog(bench: Bench) -> None:
    """Pending changes that wait for the program to start: does it slow down as they grow?"""
    for size in (10_000, 1_000_000):
        count = scaled(size)
        prefix, db = bench.setting()
        bench.daemon(prefix, db).stop()
        sql_load(db, 1, 1, INSERT_ROWS.format(prefix, count))()
        daemon = bench.daemon(prefix, db)
        began = time.monotonic()
        rate = count / (wait_state(db, "applied", count) - began)
        bench.add(f"backlog of {count:,} changes", rate, "changes/s", note=memory(daemon))
        assert scalar(db, "SELECT count(*) FROM etcd_wal WHERE status = 'success'") == count
        daemon.stop()


MEASUREMENTS = {name[6:]: f for name, f in list(globals().items()) if name.startswith("bench_")}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("measure", MEASUREMENTS)
def test_benchmark(measure, figures, tmp_path):
    with ExitStack() as stack:
        MEASUREMENTS[measure](Bench(figures, tmp_path, stack))


# ── markers ──────────────────────────────────────────────────────────────────


def mark_sections() -> None:
    """Mark each test by its banner up to the first : , or and, such as faults, for pytest -m."""
    marker = ""
    for line in Path(__file__).read_text(encoding="utf-8").splitlines():
        if banner := re.match(r"# ── (.+?)(?::|,| and | ─).*─$", line):
            marker = banner[1].lower().replace(" ", "_")
        elif test := re.match(r"def (test_\w+)", line):
            getattr(pytest.mark, marker)(globals()[test[1]])


mark_sections()
