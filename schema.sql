-- etcd_fdw: the PostgreSQL side of an etcd key prefix
--
-- etcd_fdw.py keeps a prefix of an etcd v3 key space and these tables in step:
--
--     etcd  --watch-->  etcd            every revision of every key, kept for good
--     etcd  <---txn---  etcd_wal        what SQL wants to change, and how each change ended
--
-- etcd wins: a change is applied only if etcd still holds the version that the change was made on.
-- All changes of one PostgreSQL transaction become one etcd transaction.
--
-- Map
--     tables      etcd              the mirror with its history; only the daemon writes it
--                 etcd_wal          the outbox; applications insert, the daemon records outcomes
--                 etcd_sync_state   one row per mirrored prefix: checkpoint, who is active, counters
--                 etcd_sync_event   audit trail
--     views       etcd_kv           the live keys; INSERT, UPDATE and DELETE work on it
--                 etcd_status       health of each prefix, for dashboards
--     read        etcd_get(key)                         current value of one key
--                 etcd_get_all(key, min_revision)       history of one key
--                 etcd_list(prefix)                     live keys under a prefix
--                 etcd_at(revision, prefix)             live keys under a prefix as of a past revision
--     write       etcd_set(key, value, revision)        put text
--                 etcd_set_bytes(key, value, revision)  put bytes
--                 etcd_delete(key, revision)            delete
--                 etcd_retry(id)                        queue a conflict or failure again
--                 etcd_dismiss(id)                      acknowledge a conflict or failure
--     version     etcd_schema_version()
-- What starts with an underscore is internal and may change with any version.
--
-- Applying it. The daemon does it when needed. By hand: psql -1 -f schema.sql
-- Needs PostgreSQL 13 or later. All objects go into the first schema of search_path. A second run
-- changes nothing. Renaming that schema afterwards means running this file again, because the functions
-- have their search_path pinned to it.

-- A newer version stays as it is.
DO $$
DECLARE
    v_installed int;
BEGIN
    IF pg_catalog.to_regprocedure(
           pg_catalog.format('%I.etcd_schema_version()', current_schema())) IS NOT NULL THEN
        EXECUTE pg_catalog.format('SELECT %I.etcd_schema_version()', current_schema()) INTO v_installed;
        IF v_installed > 4 THEN
            RAISE EXCEPTION 'schema version % is installed, this file is version 4', v_installed
                USING ERRCODE = 'object_not_in_prerequisite_state',
                      HINT = 'Use the schema.sql that belongs to the newer etcd_fdw.';
        END IF;
    END IF;
END
$$;


-- == Tables ============================================================================================

-- etcd: one row per key and revision, written by the daemon alone.
--
--     ts           when the row was mirrored (etcd keeps no time of its own)
--     key          compared byte by byte, as etcd does
--     value        the value, if PostgreSQL's text can hold it
--     revision     etcd's mod_revision; unique per key, shared by the keys of one etcd transaction
--     tombstone    the key was deleted at this revision; both values are null
--     value_bytes  the value, if it is not valid text (not UTF-8, or with a NUL byte); value is null then
--     lease        etcd's id of the lease that the key was put with; null: none
--
-- The latest row of a key is its current state. The primary key answers that with one index descent.
CREATE TABLE IF NOT EXISTS etcd (
    ts           timestamptz       NOT NULL DEFAULT now(),
    key          text COLLATE "C"  NOT NULL,
    value        text,
    revision     bigint            NOT NULL,
    tombstone    boolean           NOT NULL DEFAULT false,
    value_bytes  bytea,
    lease        bigint,
    CONSTRAINT etcd_pkey PRIMARY KEY (key, revision),
    CONSTRAINT etcd_revision_check CHECK (revision > 0),
    CONSTRAINT etcd_value_check CHECK (
        CASE WHEN tombstone THEN value IS NULL AND value_bytes IS NULL
             ELSE (value IS NULL) <> (value_bytes IS NULL) END)
);

-- Since version 4.
ALTER TABLE etcd ADD COLUMN IF NOT EXISTS lease bigint;

COMMENT ON TABLE  etcd IS 'Mirror of etcd: every revision of every key. Written by etcd_fdw only.';
COMMENT ON COLUMN etcd.ts IS 'when the row was mirrored, not when etcd wrote it';
COMMENT ON COLUMN etcd.value IS 'value as text; null for a tombstone or when value_bytes holds it';
COMMENT ON COLUMN etcd.revision IS 'etcd mod_revision';
COMMENT ON COLUMN etcd.tombstone IS 'the key was deleted at this revision';
COMMENT ON COLUMN etcd.value_bytes IS 'value that text cannot hold: not UTF-8, or with a NUL byte';


-- etcd_wal: the outbox. A row is one wanted change; rows of one transaction are applied together.
--
--     id                order of the changes; ids may become visible out of order
--     ts                start of the transaction that asked for it
--     key               at most 2600 bytes, what an index row surely takes
--     value             text to put, or
--     value_bytes       bytes to put; both null: delete the key
--     revision          the version that the change was made on; null or 0: the key must not exist
--     status            pending    not yet answered by etcd
--                       success    applied, and visible in table etcd
--                       conflict   etcd held another version; nothing was changed
--                       failed     etcd refused it; see error_message
--     retry_count       attempts that ended without an answer
--     error_message     what went wrong last, or what beat the change
--     result_revision   success: the revision that it got (null: deleted a key that was not there)
--                       conflict: the revision that beat it
--     finished_at       when the status stopped being pending
--     txid              the PostgreSQL transaction; its rows form one etcd transaction
--     depends_on        id of an earlier pending change to this key that this one was made on top of;
--                       if that one succeeds, its result_revision stands in for revision
--     retry_of          id of the conflict or failed row that this one tries again; counts only if that is
--                       an earlier row of the same key
--     role_name, application_name   who asked
--     dismissed_at      when somebody acknowledged the conflict or failure; null: it still counts
--     ttl               put the key with a lease of so long; '0': without one; null: it keeps the one that it has
--     force             apply it whatever etcd holds: revision does not count, and it cannot conflict
--     replaced_revision   of a forced change: the version that it replaced; null: none, or not known
--
-- A plain INSERT of key, value and revision is a strict compare-and-swap. etcd_set and its kin fill in
-- revision and depends_on. Statuses other than pending are final: trying again is a new row.
CREATE TABLE IF NOT EXISTS etcd_wal (
    id                bigint            GENERATED ALWAYS AS IDENTITY,
    ts                timestamptz       NOT NULL DEFAULT now(),
    key               text COLLATE "C"  NOT NULL,
    value             text,
    value_bytes       bytea,
    revision          bigint,
    status            text              NOT NULL DEFAULT 'pending',
    retry_count       integer           NOT NULL DEFAULT 0,
    error_message     text,
    result_revision   bigint,
    finished_at       timestamptz,
    txid              xid8              NOT NULL DEFAULT pg_current_xact_id(),
    depends_on        bigint,
    retry_of          bigint,
    role_name         text              NOT NULL DEFAULT current_user,
    application_name  text              DEFAULT pg_catalog.current_setting('application_name', true),
    dismissed_at      timestamptz,
    ttl               interval,
    force             boolean           NOT NULL DEFAULT false,
    replaced_revision bigint,
    CONSTRAINT etcd_wal_pkey PRIMARY KEY (id),
    CONSTRAINT etcd_wal_key_check CHECK (key <> '' AND pg_catalog.octet_length(key) <= 2600),
    CONSTRAINT etcd_wal_value_check CHECK (value IS NULL OR value_bytes IS NULL),
    CONSTRAINT etcd_wal_revision_check CHECK (revision >= 0),
    CONSTRAINT etcd_wal_status_check CHECK (status IN ('pending', 'success', 'conflict', 'failed')),
    CONSTRAINT etcd_wal_finished_check CHECK ((status = 'pending') = (finished_at IS NULL)),
    CONSTRAINT etcd_wal_dismissed_check CHECK (dismissed_at IS NULL OR status IN ('conflict', 'failed'))
) WITH (
    -- every row is updated once and most are deleted later: vacuum after 1000 rows, not after 20 %
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_scale_factor = 0.01,
    autovacuum_analyze_threshold = 1000,
    autovacuum_analyze_scale_factor = 0.02,
    autovacuum_vacuum_cost_limit = 2000
);

-- Since version 3.
ALTER TABLE etcd_wal
    ADD COLUMN IF NOT EXISTS dismissed_at timestamptz
    CONSTRAINT etcd_wal_dismissed_check CHECK (dismissed_at IS NULL OR status IN ('conflict', 'failed'));

-- Since version 4.
ALTER TABLE etcd_wal
    ADD COLUMN IF NOT EXISTS ttl                interval,
    ADD COLUMN IF NOT EXISTS force              boolean  NOT NULL DEFAULT false,
    ADD COLUMN IF NOT EXISTS replaced_revision  bigint;

COMMENT ON TABLE  etcd_wal IS 'Outbox: changes that SQL wants made in etcd, with the outcome of each.';
COMMENT ON COLUMN etcd_wal.value IS 'text to put; null together with value_bytes: delete';
COMMENT ON COLUMN etcd_wal.value_bytes IS 'bytes to put, for what text cannot hold';
COMMENT ON COLUMN etcd_wal.revision IS 'version the change was made on; null or 0: the key must not exist';
COMMENT ON COLUMN etcd_wal.status IS 'pending, success, conflict or failed; the last three are final';
COMMENT ON COLUMN etcd_wal.retry_count IS 'attempts that ended without an answer from etcd';
COMMENT ON COLUMN etcd_wal.result_revision IS 'revision that the change got (success) or that beat it (conflict)';
COMMENT ON COLUMN etcd_wal.finished_at IS 'when the status became final; null exactly while pending';
COMMENT ON COLUMN etcd_wal.txid IS 'PostgreSQL transaction; its rows become one etcd transaction';
COMMENT ON COLUMN etcd_wal.depends_on IS 'earlier pending change to the same key that this one was made on top of';
COMMENT ON COLUMN etcd_wal.retry_of IS 'conflict or failed row that this one tries again';
COMMENT ON COLUMN etcd_wal.dismissed_at IS 'when the conflict or failure was acknowledged; null: it still counts';


-- etcd_sync_state: one row per mirrored prefix, written by the daemon that holds the prefix.
--
--     prefix            '' is the whole key space; no prefix of one row begins with that of another
--     mirror_id         names the daemon's own keys in etcd, etcd_fdw/<mirror_id>/
--     cluster_id        etcd cluster, in hex as etcdctl shows it
--     first_revision    where the mirror began; earlier states are unknown
--     revision          the checkpoint: table etcd is exact up to here
--     pruned_revision   history before it was deleted by housekeeping; the state at it is still exact
--     gaps              revisions that etcd compacted before they could be mirrored; states unknown
--     last_key          a recently mirrored key, by which a restored etcd is recognised
--     etcd_revision     newest revision of the whole etcd store that the daemon has heard of
--     updated_at        when the checkpoint last moved
--     receipt           revision of the newest etcd transaction of changes up to which all outcomes are here
--     split             PostgreSQL transactions that are too large for etcd: applied change by change, not all done
--     generation        raised with every commit of the daemon; what etcd_wait sleeps on
--     unrepaired        the mirror was made by a version that did not know leases: the daemon compares it once
--     host, pid, version, started_at, heartbeat_at   the active daemon
--     last_error, last_error_at   what keeps it from working, null: nothing
--     events to unstorable   counters since the prefix was first mirrored
CREATE TABLE IF NOT EXISTS etcd_sync_state (
    prefix           text COLLATE "C"  NOT NULL,
    mirror_id        uuid              NOT NULL DEFAULT pg_catalog.gen_random_uuid(),
    cluster_id       text,
    first_revision   bigint            NOT NULL,
    revision         bigint            NOT NULL,
    pruned_revision  bigint            NOT NULL DEFAULT 0,
    gaps             int8range[]       NOT NULL DEFAULT '{}',
    last_key         text COLLATE "C",
    etcd_revision    bigint,
    receipt          bigint            NOT NULL DEFAULT 0,
    split            xid8[]            NOT NULL DEFAULT '{}',
    generation       bigint            NOT NULL DEFAULT 0,
    unrepaired       boolean           NOT NULL DEFAULT false,
    updated_at       timestamptz       NOT NULL DEFAULT now(),
    host             text,
    pid              integer,
    version          text,
    started_at       timestamptz,
    heartbeat_at     timestamptz,
    last_error       text,
    last_error_at    timestamptz,
    events           bigint            NOT NULL DEFAULT 0,
    applied          bigint            NOT NULL DEFAULT 0,
    conflicts        bigint            NOT NULL DEFAULT 0,
    failures         bigint            NOT NULL DEFAULT 0,
    resyncs          bigint            NOT NULL DEFAULT 0,
    reconnects       bigint            NOT NULL DEFAULT 0,
    unstorable       bigint            NOT NULL DEFAULT 0,
    CONSTRAINT etcd_sync_state_pkey PRIMARY KEY (prefix)
) WITH (fillfactor = 50);  -- updated with every batch: leave room for it in the page

-- Since version 3, which settles lost answers by receipts in etcd; version 2 noted what may have been sent.
ALTER TABLE etcd_sync_state
    ADD COLUMN IF NOT EXISTS mirror_id      uuid    NOT NULL DEFAULT pg_catalog.gen_random_uuid(),
    ADD COLUMN IF NOT EXISTS receipt        bigint  NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS split          xid8[]  NOT NULL DEFAULT '{}',
    ADD COLUMN IF NOT EXISTS last_error     text,
    ADD COLUMN IF NOT EXISTS last_error_at  timestamptz,
    DROP COLUMN IF EXISTS sent_before,
    DROP COLUMN IF EXISTS sent_after,
    DROP COLUMN IF EXISTS sent_in_parts;

-- Since version 4, which mirrors leases: what was mirrored before gets them when the daemon starts.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_attribute
                   WHERE attrelid = 'etcd_sync_state'::regclass::oid AND attname = 'generation') THEN
        ALTER TABLE etcd_sync_state
            ADD COLUMN generation  bigint   NOT NULL DEFAULT 0,
            ADD COLUMN unrepaired  boolean  NOT NULL DEFAULT false;
        UPDATE etcd_sync_state SET unrepaired = true;
    END IF;
END
$$;

COMMENT ON TABLE  etcd_sync_state IS 'Per mirrored prefix: checkpoint, active daemon, counters.';
COMMENT ON COLUMN etcd_sync_state.prefix IS 'mirrored prefix; empty: the whole key space';
COMMENT ON COLUMN etcd_sync_state.cluster_id IS 'etcd cluster id in hex';
COMMENT ON COLUMN etcd_sync_state.first_revision IS 'where the mirror began; earlier states are unknown';
COMMENT ON COLUMN etcd_sync_state.revision IS 'checkpoint: table etcd is exact up to this revision';
COMMENT ON COLUMN etcd_sync_state.pruned_revision IS
    'history before this revision was deleted; the state at it is still exact';
COMMENT ON COLUMN etcd_sync_state.gaps IS 'revisions that etcd compacted before they were mirrored';
COMMENT ON COLUMN etcd_sync_state.last_key IS 'recently mirrored key, checked at start against etcd';
COMMENT ON COLUMN etcd_sync_state.etcd_revision IS 'newest revision of the whole etcd store that was seen';
COMMENT ON COLUMN etcd_sync_state.mirror_id IS 'names the daemon''s own keys in etcd: etcd_fdw/<mirror_id>/';
COMMENT ON COLUMN etcd_sync_state.receipt IS
    'newest etcd transaction of changes up to which all outcomes are in etcd_wal';
COMMENT ON COLUMN etcd_sync_state.split IS
    'transactions too large for etcd, which are applied change by change and not all done';
COMMENT ON COLUMN etcd_sync_state.last_error IS 'what keeps the active daemon from working; null: nothing';
COMMENT ON COLUMN etcd_sync_state.events IS 'counter: revisions of keys mirrored';
COMMENT ON COLUMN etcd_sync_state.applied IS 'counter: changes from etcd_wal that etcd took';
COMMENT ON COLUMN etcd_sync_state.conflicts IS 'counter: changes that ended as conflict';
COMMENT ON COLUMN etcd_sync_state.failures IS 'counter: changes that ended as failed';
COMMENT ON COLUMN etcd_sync_state.resyncs IS 'counter: full snapshots taken';
COMMENT ON COLUMN etcd_sync_state.reconnects IS 'counter: sessions lost and started again';
COMMENT ON COLUMN etcd_sync_state.unstorable IS 'counter: events that cannot be stored; see etcd_sync_event';


-- etcd_sync_event: audit trail, written by the daemon.
--
--     operation                         what happened: change, mirror, snapshot, resync, takeover, sync, repair, reset
--     key                               null if it concerns the whole prefix, or if the key is no text
--     source_system, source_revision    where it came from: etcd or postgresql, and at which revision
--     target_system, target_revision    where it was to go
--     status, duration, details         how it ended, how long it took, anything else
CREATE TABLE IF NOT EXISTS etcd_sync_event (
    id               bigint       GENERATED ALWAYS AS IDENTITY,
    ts               timestamptz  NOT NULL DEFAULT now(),
    prefix           text COLLATE "C",
    operation        text         NOT NULL,
    key              text COLLATE "C",
    source_system    text,
    source_revision  bigint,
    target_system    text,
    target_revision  bigint,
    status           text,
    duration         interval,
    details          jsonb,
    CONSTRAINT etcd_sync_event_pkey PRIMARY KEY (id)
);

COMMENT ON TABLE  etcd_sync_event IS
    'Audit trail of etcd_fdw: conflicts, failures, resyncs, takeovers; with --audit all every change.';
COMMENT ON COLUMN etcd_sync_event.prefix IS 'mirrored prefix that it belongs to';
COMMENT ON COLUMN etcd_sync_event.source_system IS 'etcd or postgresql';
COMMENT ON COLUMN etcd_sync_event.target_system IS 'etcd or postgresql';
COMMENT ON COLUMN etcd_sync_event.details IS 'anything else, by operation; a key that is no text is here in hex';


-- == Indexes ===========================================================================================

-- The history by revision or time ("what has changed since"); a BRIN index costs the mirror next to nothing.
CREATE INDEX IF NOT EXISTS etcd_revision_ts_idx ON etcd USING brin (revision, ts) WITH (autosummarize = on);

-- Pending rows, and only those: in order, the newest of a key, and by transaction.
CREATE INDEX IF NOT EXISTS etcd_wal_pending_idx ON etcd_wal (id) WHERE status = 'pending';
CREATE INDEX IF NOT EXISTS etcd_wal_pending_key_idx ON etcd_wal (key, id) WHERE status = 'pending';
CREATE INDEX IF NOT EXISTS etcd_wal_pending_txid_idx ON etcd_wal (txid, id) WHERE status = 'pending';

-- What needs a look; and a row is tried again once only, by a later row of the same key.
CREATE INDEX IF NOT EXISTS etcd_wal_unresolved_idx ON etcd_wal (id) WHERE status IN ('conflict', 'failed');
CREATE UNIQUE INDEX IF NOT EXISTS etcd_wal_retry_key ON etcd_wal (retry_of, key) WHERE retry_of < id;
DROP INDEX IF EXISTS etcd_wal_retry_of_key;  -- until version 2

-- What housekeeping deletes: old successes, what was dismissed long ago, old audit rows.
CREATE INDEX IF NOT EXISTS etcd_wal_settled_idx ON etcd_wal (coalesce(dismissed_at, finished_at))
    WHERE status = 'success' OR dismissed_at IS NOT NULL;
DROP INDEX IF EXISTS etcd_wal_success_idx;  -- until version 2
CREATE INDEX IF NOT EXISTS etcd_sync_event_ts_idx ON etcd_sync_event USING brin (ts);


-- == Views =============================================================================================

-- etcd_kv: the live keys. See _etcd_kv_write below for what writing to it does.
--
-- WHERE key = ... is answered by the index: with two descents from PostgreSQL 16 on, before that by reading
-- the index entries of that key's history. To look up many keys, join LATERAL etcd_get(key); for all keys of
-- a long history, etcd_list() is faster.
CREATE OR REPLACE VIEW etcd_kv AS
SELECT k.key, e.value, e.value_bytes, e.revision, e.ts
  FROM (SELECT DISTINCT d.key FROM etcd d) k
 CROSS JOIN LATERAL (
        SELECT l.value, l.value_bytes, l.revision, l.ts, l.tombstone
          FROM etcd l
         WHERE l.key = k.key
         ORDER BY l.revision DESC
         LIMIT 1) e
 WHERE NOT e.tombstone;

COMMENT ON VIEW etcd_kv IS
    'Live keys. INSERT, UPDATE and DELETE queue a change made on the version that was seen; '
    '40001 if the key has a pending change or has moved on, 23505 on INSERT of a live key.';
COMMENT ON COLUMN etcd_kv.value IS 'value as text; setting it clears value_bytes';
COMMENT ON COLUMN etcd_kv.value_bytes IS 'value that is no text; setting it clears value';
COMMENT ON COLUMN etcd_kv.revision IS 'etcd mod_revision; read only';
COMMENT ON COLUMN etcd_kv.ts IS 'when that revision was mirrored; read only';


-- etcd_status: one row per mirrored prefix, and one with prefix null if etcd_wal has rows outside all
-- of them (no daemon will take those).
--
--     revision, etcd_revision     the checkpoint; the newest revision of the store that was seen
--     heartbeat_age               grows beyond seconds when no daemon is active
--     pending, oldest_pending_age changes that wait, and for how long
--     conflicts, failures         changes that ended so, and were neither tried again nor dismissed
--     unstorable                  events that PostgreSQL cannot hold
CREATE OR REPLACE VIEW etcd_status AS
WITH open_change AS (
    SELECT w.key, w.status, w.ts
      FROM etcd_wal w
     WHERE w.status = 'pending'
    UNION ALL
    SELECT w.key, w.status, w.ts
      FROM etcd_wal w
     WHERE w.status IN ('conflict', 'failed')
       AND w.dismissed_at IS NULL
       AND NOT EXISTS (
               SELECT FROM etcd_wal r WHERE r.retry_of = w.id AND r.key = w.key AND r.retry_of < r.id)
), tally AS (
    SELECT s.prefix,
           count(*) FILTER (WHERE o.status = 'pending')  AS pending,
           pg_catalog.min(o.ts) FILTER (WHERE o.status = 'pending') AS oldest,
           count(*) FILTER (WHERE o.status = 'conflict') AS conflicts,
           count(*) FILTER (WHERE o.status = 'failed')   AS failures
      FROM open_change o
      LEFT JOIN etcd_sync_state s ON pg_catalog.starts_with(o.key, s.prefix)
     GROUP BY s.prefix
)
SELECT coalesce(s.prefix, t.prefix)        AS prefix,
       s.revision,
       s.etcd_revision,
       s.updated_at,
       clock_timestamp() - s.heartbeat_at  AS heartbeat_age,
       s.host,
       s.pid,
       s.version,
       s.started_at,
       coalesce(t.pending, 0)              AS pending,
       clock_timestamp() - t.oldest        AS oldest_pending_age,
       coalesce(t.conflicts, 0)            AS conflicts,
       coalesce(t.failures, 0)             AS failures,
       s.unstorable
  FROM etcd_sync_state s
  FULL JOIN tally t ON t.prefix = s.prefix;

COMMENT ON VIEW etcd_status IS
    'Health of each mirrored prefix. '
    'A row with prefix null counts changes outside every prefix, which no daemon will apply.';
COMMENT ON COLUMN etcd_status.revision IS 'checkpoint';
COMMENT ON COLUMN etcd_status.etcd_revision IS 'newest revision of the whole etcd store that was seen';
COMMENT ON COLUMN etcd_status.heartbeat_age IS 'time since the active daemon last reported';
COMMENT ON COLUMN etcd_status.conflicts IS 'changes that ended as conflict, neither tried again nor dismissed';
COMMENT ON COLUMN etcd_status.failures IS 'changes that ended as failed, neither tried again nor dismissed';

-- Let the views check the caller's privileges and row-level security. PostgreSQL 13 and 14 cannot: there
-- a view reads with its owner's rights.
DO $$
BEGIN
    IF pg_catalog.current_setting('server_version_num')::int >= 150000 THEN
        ALTER VIEW etcd_kv SET (security_invoker = true);
        ALTER VIEW etcd_status SET (security_invoker = true);
    END IF;
END
$$;


-- == Reading ===========================================================================================

CREATE OR REPLACE FUNCTION etcd_get(p_key text)
RETURNS TABLE (key text, value text, value_bytes bytea, revision bigint, ts timestamptz)
LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 1 SET enable_sort = off AS $$
-- Current value of one key: one index descent, however long the history is.
--   p_key    the key, exactly
--   result   one row; none if the key does not exist or was deleted
BEGIN
    RETURN QUERY
    SELECT l.key, l.value, l.value_bytes, l.revision, l.ts
      FROM (SELECT e.*
              FROM etcd e
             WHERE e.key = p_key COLLATE "C"
             ORDER BY e.revision DESC
             LIMIT 1) l
     WHERE NOT l.tombstone;
END
$$;
COMMENT ON FUNCTION etcd_get(text) IS 'current value of one key; no row if it does not exist';


CREATE OR REPLACE FUNCTION etcd_get_all(p_key text, p_min_revision bigint DEFAULT 0)
RETURNS TABLE (key text, value text, value_bytes bytea, revision bigint, ts timestamptz, tombstone boolean)
LANGUAGE plpgsql STABLE PARALLEL SAFE SET enable_sort = off AS $$
-- History of one key, oldest first, deletions included as rows with tombstone true.
--   p_key           the key, exactly
--   p_min_revision  leave out what is older; 0: everything that the mirror holds
--   result          nothing from before the mirror began, nor what housekeeping deleted
--   errors          22023 if history from p_min_revision on was asked for and some of it has been deleted
DECLARE
    v_pruned  bigint;
BEGIN
    IF p_min_revision > 0 THEN
        SELECT s.pruned_revision INTO v_pruned
          FROM etcd_sync_state s
         WHERE pg_catalog.starts_with(p_key COLLATE "C", s.prefix);
        IF p_min_revision < v_pruned THEN
            RAISE EXCEPTION 'history before revision % has been pruned', v_pruned
                USING ERRCODE = 'invalid_parameter_value',
                      HINT = pg_catalog.format(
                          'Ask from revision %s on, or without a revision for what is left.', v_pruned);
        END IF;
    END IF;
    RETURN QUERY
    SELECT e.key, e.value, e.value_bytes, e.revision, e.ts, e.tombstone
      FROM etcd e
     WHERE e.key = p_key COLLATE "C"
       AND e.revision >= p_min_revision
     ORDER BY e.revision;
END
$$;
COMMENT ON FUNCTION etcd_get_all(text, bigint) IS 'history of one key that the mirror holds, oldest first, with tombstones; an error if it was pruned';


CREATE OR REPLACE FUNCTION _etcd_state(p_prefix text, p_revision bigint)
RETURNS TABLE (key text, value text, value_bytes bytea, revision bigint, ts timestamptz)
LANGUAGE plpgsql STABLE PARALLEL SAFE SET enable_sort = off AS $$
-- Live keys under a prefix as of a revision, in key order.
--   p_prefix    '' for all keys; no pattern characters
--   p_revision  the newest revision to look at
-- Skips from key to key, whatever the history holds: looks at the next 64 rows for keys, goes on behind the
-- last of those, and descends the index once for each key found. enable_sort is off so that a plan made while
-- the table was small cannot turn into a scan when it grows.
DECLARE
    v_end  text;  -- no key with the prefix is above: ends the search where row-level security hides the rest
BEGIN
    IF getdatabaseencoding() = 'UTF8' THEN
        -- 2800 bytes more, which is more than a key in the index can have
        v_end := p_prefix || pg_catalog.repeat(pg_catalog.chr(1114111), 700);
    ELSE
        v_end := (SELECT e.key FROM etcd e ORDER BY e.key DESC LIMIT 1);
    END IF;
    RETURN QUERY
    WITH RECURSIVE step (keys) AS (
        SELECT pg_catalog.array_agg(DISTINCT b.key)
          FROM (SELECT e.key
                  FROM etcd e
                 WHERE e.key >= p_prefix COLLATE "C" AND e.key <= v_end COLLATE "C"
                 ORDER BY e.key
                 LIMIT 64) b
        UNION ALL
        SELECT (SELECT pg_catalog.array_agg(DISTINCT b.key)
                  FROM (SELECT e.key
                          FROM etcd e
                         WHERE e.key > step.keys[pg_catalog.cardinality(step.keys)]
                           AND e.key <= v_end COLLATE "C"
                         ORDER BY e.key
                         LIMIT 64) b)
          FROM step
         WHERE pg_catalog.starts_with(  -- neither null nor beyond
                   step.keys[pg_catalog.cardinality(step.keys)], p_prefix COLLATE "C")
    )
    SELECT k.key, l.value, l.value_bytes, l.revision, l.ts
      FROM step
     CROSS JOIN LATERAL pg_catalog.unnest(step.keys) k (key)
     CROSS JOIN LATERAL (
            SELECT e.value, e.value_bytes, e.revision, e.ts, e.tombstone
              FROM etcd e
             WHERE e.key = k.key
               AND e.revision <= p_revision
             ORDER BY e.revision DESC
             LIMIT 1) l
     WHERE pg_catalog.starts_with(k.key, p_prefix COLLATE "C")
       AND NOT l.tombstone;
END
$$;
COMMENT ON FUNCTION _etcd_state(text, bigint) IS 'internal: live keys under a prefix as of a revision';


CREATE OR REPLACE FUNCTION etcd_list(p_prefix text DEFAULT '')
RETURNS TABLE (key text, value text, value_bytes bytea, revision bigint, ts timestamptz)
LANGUAGE plpgsql STABLE PARALLEL SAFE AS $$
-- Live keys under a prefix, in key order.
--   p_prefix  taken literally (% and _ mean themselves); '' for all keys
--   result    one row per live key
BEGIN
    RETURN QUERY SELECT * FROM _etcd_state(p_prefix, 9223372036854775807);
END
$$;
COMMENT ON FUNCTION etcd_list(text) IS 'live keys under a prefix';


CREATE OR REPLACE FUNCTION etcd_at(p_revision bigint, p_prefix text DEFAULT '')
RETURNS TABLE (key text, value text, value_bytes bytea, revision bigint, ts timestamptz)
LANGUAGE plpgsql STABLE PARALLEL SAFE AS $$
-- What etcd held under a prefix at a past revision, in key order.
--   p_revision  any revision that the mirror knows completely
--   p_prefix    taken literally; '' for all keys that are mirrored
--   result      one row per key that was live then
--   errors      22023 if the mirror cannot know: no mirrored prefix there, before the mirror began or was
--               pruned, in a gap, beyond the checkpoint; 22004 if an argument is null
-- The mirror that must know is the one that covers p_prefix, else each that lies within it.
DECLARE
    s        etcd_sync_state;
    v_found  boolean := false;
BEGIN
    IF p_revision IS NULL OR p_prefix IS NULL THEN
        RAISE EXCEPTION 'revision and prefix must not be null' USING ERRCODE = 'null_value_not_allowed';
    END IF;
    FOR s IN
        SELECT c.*
          FROM etcd_sync_state c
         WHERE pg_catalog.starts_with(p_prefix COLLATE "C", c.prefix)
            OR pg_catalog.starts_with(c.prefix, p_prefix COLLATE "C")
         ORDER BY c.prefix
    LOOP
        v_found := true;
        IF p_revision < s.pruned_revision THEN
            RAISE EXCEPTION 'revision % of prefix "%" has been pruned', p_revision, s.prefix
                USING ERRCODE = 'invalid_parameter_value',
                      HINT = pg_catalog.format('The oldest revision kept is %s.', s.pruned_revision);
        ELSIF p_revision < s.first_revision THEN
            RAISE EXCEPTION 'revision % is before the mirror of prefix "%" began', p_revision, s.prefix
                USING ERRCODE = 'invalid_parameter_value',
                      HINT = pg_catalog.format('The oldest revision known is %s.', s.first_revision);
        ELSIF p_revision > s.revision THEN
            RAISE EXCEPTION 'revision % is beyond the checkpoint of prefix "%"', p_revision, s.prefix
                USING ERRCODE = 'invalid_parameter_value',
                      HINT = pg_catalog.format(
                          'The newest revision mirrored is %s; see etcd_status.', s.revision);
        ELSIF p_revision OPERATOR(pg_catalog.<@) ANY (s.gaps) THEN
            RAISE EXCEPTION 'revision % of prefix "%" was compacted before it was mirrored', p_revision, s.prefix
                USING ERRCODE = 'invalid_parameter_value',
                      HINT = 'Column gaps of etcd_sync_state lists the revisions that are unknown.';
        END IF;
    END LOOP;
    IF NOT v_found THEN
        RAISE EXCEPTION 'prefix "%" is not mirrored', p_prefix
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'Table etcd_sync_state lists the mirrored prefixes.';
    END IF;
    RETURN QUERY SELECT * FROM _etcd_state(p_prefix, p_revision);
END
$$;
COMMENT ON FUNCTION etcd_at(bigint, text) IS
    'live keys under a prefix as of a past revision; an error if the mirror cannot know';


-- == Writing ===========================================================================================

CREATE OR REPLACE FUNCTION _etcd_lock_key(p_key text)
RETURNS void
LANGUAGE plpgsql AS $$
-- Order the transactions that change one key: wait for the others, hold until this one ends.
-- All keys share 1024 locks. A lock for each key would let one bulk change fill the server's lock table
-- (max_locks_per_transaction), at the cost of everybody; sharing costs a rare wait for a stranger. Transactions
-- that change many keys in different orders can deadlock, as with rows: 40P01, try again.
BEGIN
    PERFORM pg_catalog.pg_advisory_xact_lock(
        2379, (pg_catalog.hashtextextended(p_key COLLATE "C", 0) & 1023::bigint)::int);
END
$$;
COMMENT ON FUNCTION _etcd_lock_key(text) IS 'internal: transaction-level lock on one key';


CREATE OR REPLACE FUNCTION _etcd_change(
    p_key          text,
    p_value        text,
    p_value_bytes  bytea,
    p_revision     bigint   DEFAULT NULL,
    p_new          boolean  DEFAULT false,
    p_retry_of     bigint   DEFAULT NULL
) RETURNS bigint
LANGUAGE plpgsql SET enable_sort = off AS $$
-- Queue one change. Everything that writes goes through here.
--   p_value, p_value_bytes  what to put; both null: delete
--   p_revision              null: on the current version, after any pending change
--                           else: only on this version (0: the key must not exist), nothing pending
--   p_new                   the key must not exist, and that it does is a unique violation
--   p_retry_of              the etcd_wal row that this one tries again
--   result                  etcd_wal.id
--   errors                  22004, 22023 for arguments; 40001 moved on or pending; 23505 exists;
--                           a warning for a key that is outside every mirrored prefix
-- enable_sort is off so that a plan made while the tables were small cannot turn into a scan when they grow.
-- In a REPEATABLE READ transaction the version is that of its snapshot; if it is old, etcd says so later.
DECLARE
    v_pending  bigint;
    v_current  bigint;  -- 0: the key does not exist
    v_id       bigint;
BEGIN
    IF p_key IS NULL THEN
        RAISE EXCEPTION 'key must not be null' USING ERRCODE = 'null_value_not_allowed';
    ELSIF p_key = '' OR pg_catalog.octet_length(p_key) > 2600 THEN
        RAISE EXCEPTION 'key must have 1 to 2600 bytes, not %', pg_catalog.octet_length(p_key)
            USING ERRCODE = 'invalid_parameter_value';
    ELSIF p_value IS NOT NULL AND p_value_bytes IS NOT NULL THEN
        RAISE EXCEPTION 'only one of value and value_bytes can be set' USING ERRCODE = 'invalid_parameter_value';
    ELSIF p_revision < 0 THEN
        RAISE EXCEPTION 'revision must not be negative' USING ERRCODE = 'invalid_parameter_value';
    END IF;

    PERFORM _etcd_lock_key(p_key);

    -- Pending first, mirror second: the daemon marks success and mirrors in one transaction, so the second
    -- look can only know more, and an own change is never mistaken for a foreign one.
    -- A range of one key, sorted by both columns: with sorts off only the index on (key, id) can answer that,
    -- while key = p_key ORDER BY id may be planned as a walk along (id), past everything that is pending.
    SELECT w.id INTO v_pending
      FROM etcd_wal w
     WHERE w.key >= p_key COLLATE "C" AND w.key <= p_key COLLATE "C"
       AND w.status = 'pending'
     ORDER BY w.key DESC, w.id DESC
     LIMIT 1;
    SELECT CASE WHEN e.tombstone THEN 0 ELSE e.revision END INTO v_current
      FROM etcd e
     WHERE e.key = p_key COLLATE "C"
     ORDER BY e.revision DESC
     LIMIT 1;
    v_current := coalesce(v_current, 0);

    IF v_pending IS NOT NULL AND (p_new OR p_revision IS NOT NULL) THEN
        RAISE EXCEPTION 'key "%" has a pending change', p_key
            USING ERRCODE = 'serialization_failure',
                  DETAIL = pg_catalog.format('It is row %s of etcd_wal.', v_pending),
                  HINT = 'Try again when it is applied, or use etcd_set or etcd_delete without a revision.';
    ELSIF p_new AND v_current > 0 THEN
        RAISE EXCEPTION 'key "%" already exists', p_key
            USING ERRCODE = 'unique_violation',
                  DETAIL = pg_catalog.format('It is at revision %s.', v_current);
    ELSIF p_revision <> v_current THEN
        RAISE EXCEPTION 'key "%" is not at revision %', p_key, p_revision
            USING ERRCODE = 'serialization_failure',
                  DETAIL = CASE v_current WHEN 0 THEN 'It does not exist.'
                                          ELSE pg_catalog.format('It is at revision %s.', v_current) END,
                  HINT = 'Read it again and repeat the change.';
    END IF;

    INSERT INTO etcd_wal (key, value, value_bytes, revision, depends_on, retry_of)
    VALUES (p_key, p_value, p_value_bytes, nullif(v_current, 0), v_pending, p_retry_of)
    RETURNING id INTO v_id;

    -- Who may not see the mirrors is not told; nor is anybody before there is one.
    IF pg_catalog.has_table_privilege('etcd_sync_state', 'SELECT') THEN
        IF (SELECT NOT pg_catalog.bool_or(pg_catalog.starts_with(p_key COLLATE "C", s.prefix))
              FROM etcd_sync_state s) THEN
            RAISE WARNING 'key "%" is outside every mirrored prefix', p_key
                USING HINT = pg_catalog.format(
                    'Row %s of etcd_wal stays pending until an etcd_fdw that mirrors this key runs.', v_id);
        END IF;
    END IF;
    RETURN v_id;
END
$$;
COMMENT ON FUNCTION _etcd_change(text, text, bytea, bigint, boolean, bigint) IS 'internal: queue one change';


CREATE OR REPLACE FUNCTION etcd_set(p_key text, p_value text, p_revision bigint DEFAULT NULL)
RETURNS bigint
LANGUAGE plpgsql AS $$
-- Queue a put of text.
--   p_key       1 to 2600 bytes
--   p_value     not null; '' is a value
--   p_revision  null: put it on whatever is current, after any pending change (the last writer wins)
--               else: only if the key is at this revision now (0: does not exist) and nothing is pending
--   result      etcd_wal.id, to look up how it ended
--   errors      40001 if p_revision does not hold; 22004 for a null key or value; 22023 for a bad key
BEGIN
    IF p_value IS NULL THEN
        RAISE EXCEPTION 'value must not be null'
            USING ERRCODE = 'null_value_not_allowed', HINT = 'To delete a key use etcd_delete.';
    END IF;
    RETURN _etcd_change(p_key, p_value, NULL, p_revision);
END
$$;
COMMENT ON FUNCTION etcd_set(text, text, bigint) IS
    'queue a put; with a revision only on that version (0: must not exist), else 40001';


CREATE OR REPLACE FUNCTION etcd_set_bytes(p_key text, p_value bytea, p_revision bigint DEFAULT NULL)
RETURNS bigint
LANGUAGE plpgsql AS $$
-- Queue a put of bytes that need not be text. Otherwise as etcd_set.
BEGIN
    IF p_value IS NULL THEN
        RAISE EXCEPTION 'value must not be null'
            USING ERRCODE = 'null_value_not_allowed', HINT = 'To delete a key use etcd_delete.';
    END IF;
    RETURN _etcd_change(p_key, NULL, p_value, p_revision);
END
$$;
COMMENT ON FUNCTION etcd_set_bytes(text, bytea, bigint) IS 'queue a put of bytes; see etcd_set';


CREATE OR REPLACE FUNCTION etcd_delete(p_key text, p_revision bigint DEFAULT NULL)
RETURNS bigint
LANGUAGE plpgsql AS $$
-- Queue a delete.
--   p_key       1 to 2600 bytes; it need not exist: the change then succeeds without a result_revision
--   p_revision  as in etcd_set
--   result      etcd_wal.id
--   errors      40001 if p_revision does not hold; 22004 for a null key; 22023 for a bad one
BEGIN
    RETURN _etcd_change(p_key, NULL, NULL, p_revision);
END
$$;
COMMENT ON FUNCTION etcd_delete(text, bigint) IS 'queue a delete; with a revision only that version, else 40001';


CREATE OR REPLACE FUNCTION etcd_retry(p_id bigint)
RETURNS bigint
LANGUAGE plpgsql AS $$
-- Queue a conflict or failed change again, on the current version: it overrides what beat it.
--   p_id     etcd_wal.id of that change
--   result   etcd_wal.id of the new one, which names the old in retry_of
--   errors   P0002 no such row; 55000 it is pending or succeeded, or was tried again already
DECLARE
    w        etcd_wal;
    v_again  bigint;
BEGIN
    SELECT * INTO w FROM etcd_wal o WHERE o.id = p_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'etcd_wal has no row %', p_id USING ERRCODE = 'no_data_found';
    ELSIF w.status NOT IN ('conflict', 'failed') THEN
        RAISE EXCEPTION 'change % is %, only conflict and failed can be tried again', p_id, w.status
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    PERFORM _etcd_lock_key(w.key);
    SELECT o.id INTO v_again
      FROM etcd_wal o
     WHERE o.retry_of = p_id AND o.key = w.key AND o.retry_of < o.id;
    IF FOUND THEN
        RAISE EXCEPTION 'change % was tried again already', p_id
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  DETAIL = pg_catalog.format('That is row %s of etcd_wal.', v_again);
    END IF;
    RETURN _etcd_change(w.key, w.value, w.value_bytes, p_retry_of => p_id);
END
$$;
COMMENT ON FUNCTION etcd_retry(bigint) IS 'queue a conflict or failed change again, on the current version';


CREATE OR REPLACE FUNCTION etcd_dismiss(p_id bigint)
RETURNS void
LANGUAGE plpgsql AS $$
-- Acknowledge a conflict or failure: it counts no longer, and is deleted as old successes are.
-- The caller needs UPDATE on column dismissed_at of etcd_wal.
--   p_id     etcd_wal.id of that change; to dismiss it again changes nothing
--   errors   P0002 no such row; 55000 it is pending or succeeded
DECLARE
    v_status  text;
BEGIN
    SELECT o.status INTO v_status FROM etcd_wal o WHERE o.id = p_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'etcd_wal has no row %', p_id USING ERRCODE = 'no_data_found';
    ELSIF v_status NOT IN ('conflict', 'failed') THEN
        RAISE EXCEPTION 'change % is %, only conflict and failed can be dismissed', p_id, v_status
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    UPDATE etcd_wal SET dismissed_at = now() WHERE id = p_id AND dismissed_at IS NULL;
END
$$;
COMMENT ON FUNCTION etcd_dismiss(bigint) IS 'acknowledge a conflict or failure, so that it counts no longer';


CREATE OR REPLACE FUNCTION _etcd_generation_lock(p_prefix text, p_generation bigint)
RETURNS bigint
LANGUAGE sql STABLE AS $$
SELECT pg_catalog.hashtextextended(
    'etcd_fdw generation '::text || current_schema()::text || ' '::text || p_prefix, p_generation)
$$;


CREATE OR REPLACE FUNCTION etcd_schema_version()
RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
-- Version of this file as installed. The daemon applies a newer one and refuses an older one.
SELECT 4
$$;
COMMENT ON FUNCTION etcd_schema_version() IS 'version of schema.sql as installed';


-- == Triggers ==========================================================================================

CREATE OR REPLACE FUNCTION _etcd_kv_write()
RETURNS trigger
LANGUAGE plpgsql AS $$
-- INSERT, UPDATE and DELETE on etcd_kv: queue the change, made on the version that the statement saw.
--   INSERT   one of value and value_bytes; the key must not exist
--   UPDATE   the value column that was changed counts and clears the other; a changed key is a delete of the
--            old and an insert of the new, applied together
--   errors   40001 the key has a pending change (an own one of this transaction included) or has moved on;
--            23505 the key to insert exists; 22004 no value; 428C9 revision or ts set, which are not the
--            writer's to choose
BEGIN
    IF TG_OP = 'DELETE' THEN
        PERFORM _etcd_change(OLD.key, NULL, NULL, OLD.revision);
        RETURN OLD;
    END IF;

    IF TG_OP = 'UPDATE' THEN
        IF NEW.value IS NOT DISTINCT FROM OLD.value THEN
            IF NEW.value_bytes IS DISTINCT FROM OLD.value_bytes THEN
                NEW.value := NULL;
            END IF;
        ELSIF NEW.value_bytes IS NOT DISTINCT FROM OLD.value_bytes THEN
            NEW.value_bytes := NULL;
        END IF;
    END IF;
    IF NEW.value IS NULL AND NEW.value_bytes IS NULL THEN
        RAISE EXCEPTION 'value must not be null'
            USING ERRCODE = 'null_value_not_allowed', HINT = 'To delete a key use DELETE.';
    END IF;

    IF TG_OP = 'INSERT' THEN
        IF NEW.revision IS NOT NULL OR NEW.ts IS NOT NULL THEN
            RAISE EXCEPTION 'columns revision and ts of etcd_kv cannot be set' USING ERRCODE = 'generated_always';
        END IF;
        PERFORM _etcd_change(NEW.key, NEW.value, NEW.value_bytes, p_new => true);
        RETURN NEW;
    END IF;

    IF NEW.revision IS DISTINCT FROM OLD.revision OR NEW.ts IS DISTINCT FROM OLD.ts THEN
        RAISE EXCEPTION 'columns revision and ts of etcd_kv cannot be set'
            USING ERRCODE = 'generated_always',
                  HINT = 'To change a certain version only, say WHERE revision = the one you read.';
    ELSIF NEW.key IS DISTINCT FROM OLD.key THEN
        PERFORM _etcd_change(OLD.key, NULL, NULL, OLD.revision);
        PERFORM _etcd_change(NEW.key, NEW.value, NEW.value_bytes, p_new => true);
    ELSE
        PERFORM _etcd_change(NEW.key, NEW.value, NEW.value_bytes, OLD.revision);
    END IF;
    RETURN NEW;
END
$$;
COMMENT ON FUNCTION _etcd_kv_write() IS 'internal: makes etcd_kv writable';


CREATE OR REPLACE FUNCTION _etcd_notify()
RETURNS trigger
LANGUAGE plpgsql AS $$
-- Wake the daemon. A hint without content: the daemon reads the table, and looks there from time to time
-- even if no hint arrives. PostgreSQL sends one per transaction, at commit.
BEGIN
    PERFORM pg_catalog.pg_notify('etcd_changes', '');
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION _etcd_notify() IS 'internal: wakes the daemon after an INSERT into etcd_wal';

-- To do without notifications (they serialise commits of all writers in the database):
--     ALTER TABLE etcd_wal DISABLE TRIGGER etcd_wal_notify;
-- and run the daemon with a short --poll-interval. A later run of this file leaves that as it is.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = 'etcd_kv'::regclass::oid AND tgname = 'etcd_kv_write') THEN
        CREATE TRIGGER etcd_kv_write INSTEAD OF INSERT OR UPDATE OR DELETE ON etcd_kv
            FOR EACH ROW EXECUTE FUNCTION _etcd_kv_write();
    END IF;
    IF NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = 'etcd_wal'::regclass::oid AND tgname = 'etcd_wal_notify') THEN
        CREATE TRIGGER etcd_wal_notify AFTER INSERT ON etcd_wal
            FOR EACH STATEMENT EXECUTE FUNCTION _etcd_notify();
    END IF;
END
$$;


-- == search_path =======================================================================================

-- The functions find their tables in this schema whatever the caller's search_path says, and a temporary
-- table of the same name does not get in between. That alone does not keep them from calling what somebody
-- else has put into the schema: pg_catalog comes first, but a function or operator for just these types is
-- preferred to one of pg_catalog that has to cast them, or takes any type. So functions with arguments are
-- called by their qualified name; and an operator that pg_catalog does not have for just these types gets a
-- cast, or is qualified, too.
DO $$
DECLARE
    v_function text;
BEGIN
    FOREACH v_function IN ARRAY ARRAY[
        'etcd_get(text)', 'etcd_get_all(text, bigint)', 'etcd_list(text)', 'etcd_at(bigint, text)',
        'etcd_set(text, text, bigint)', 'etcd_set_bytes(text, bytea, bigint)', 'etcd_delete(text, bigint)',
        'etcd_retry(bigint)', 'etcd_dismiss(bigint)', 'etcd_schema_version()',
        '_etcd_state(text, bigint)', '_etcd_lock_key(text)',
        '_etcd_change(text, text, bytea, bigint, boolean, bigint)', '_etcd_kv_write()', '_etcd_notify()']
    LOOP
        EXECUTE pg_catalog.format(
            'ALTER FUNCTION %1$I.%2$s SET search_path = %1$I, pg_temp', current_schema(), v_function);
    END LOOP;
END
$$;


-- == Grants: an example ================================================================================

-- PostgreSQL lets PUBLIC execute functions; these run with the caller's rights, so the tables decide.
-- PostgreSQL 13 and 14 also let everybody create objects in schema public, and with them have others run
-- code. If there are users who are not trusted:
--
--     REVOKE CREATE ON SCHEMA public FROM PUBLIC;
--
-- The daemon, if a DBA applied this file (if the daemon did, it owns everything and only needs CREATE on the
-- schema):
--
--     GRANT TEMP ON DATABASE mydb TO etcd_fdw;
--     GRANT USAGE ON SCHEMA public TO etcd_fdw;
--     GRANT SELECT, INSERT, UPDATE, DELETE ON etcd, etcd_wal, etcd_sync_state, etcd_sync_event TO etcd_fdw;
--     GRANT SELECT ON etcd_kv, etcd_status TO etcd_fdw;
--
-- An application that reads everything and changes keys, by function or through etcd_kv, but can neither
-- write the mirror nor claim an outcome:
--
--     GRANT USAGE ON SCHEMA public TO app;
--     GRANT SELECT ON etcd, etcd_wal, etcd_sync_state, etcd_status TO app;
--     GRANT INSERT (key, value, value_bytes, revision, depends_on, retry_of) ON etcd_wal TO app;
--     GRANT SELECT, INSERT, UPDATE, DELETE ON etcd_kv TO app;
--
-- One that only reads: the first two lines of these, and SELECT on etcd_kv. Who may call etcd_dismiss needs
-- one more, which lets it hide conflicts and failures from everybody: GRANT UPDATE (dismissed_at) ON etcd_wal.
--
-- Only keys under a prefix: row-level security. The functions obey it, the views from PostgreSQL 15 on (before,
-- they read with their owner's rights: do not grant them). The daemon needs the first two policies unless it
-- owns the tables or has BYPASSRLS; with policies PostgreSQL refuses it COPY, so it is slower.
--
--     CREATE POLICY daemon ON etcd TO etcd_fdw USING (true);
--     CREATE POLICY daemon ON etcd_wal TO etcd_fdw USING (true);
--     CREATE POLICY app ON etcd FOR SELECT TO app USING (starts_with(key, '/app/'));
--     CREATE POLICY app ON etcd_wal TO app USING (starts_with(key, '/app/'));
--     ALTER TABLE etcd ENABLE ROW LEVEL SECURITY;
--     ALTER TABLE etcd_wal ENABLE ROW LEVEL SECURITY;
