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
-- Map (COMMENTs say what each is: \d+, \df+ etcd_*; a function's parameters and errors: \sf)
--     tables      etcd              the mirror with its history; only the daemon writes it
--                 etcd_wal          the outbox; applications insert, the daemon records outcomes
--                 etcd_lock         whose rows are locked while a key is changed
--                 etcd_sync_state   one row per mirrored prefix: checkpoint, who is active, counters
--                 etcd_sync_event   audit trail
--     views       etcd_kv           the live keys; INSERT, UPDATE and DELETE work on it
--                 etcd_refused      conflicts and failures that nobody has dealt with
--                 etcd_status       health of each prefix, for dashboards
--     read        etcd_get, etcd_get_all, etcd_list, etcd_at, etcd_revision_at
--     write       etcd_set, etcd_set_bytes, etcd_set_many, etcd_delete, etcd_delete_prefix, etcd_restore
--                 etcd_expect, etcd_keepalive
--     outcome     etcd_put, etcd_wait, etcd_wait_revision, etcd_retry, etcd_dismiss, etcd_cancel
-- What starts with an underscore is internal and may change with any version.
--
-- The daemon applies it when needed; by hand: psql -1 -f schema.sql. A second run changes nothing. It needs
-- PostgreSQL 13 or later. All objects go into the first schema of search_path. If you rename that schema, run
-- this file again: the functions have their search_path pinned to it.

-- == search_path =======================================================================================

-- Every function keeps what is set here (SET search_path FROM CURRENT): it finds its tables whatever the caller's
-- search_path says. Others may have put functions and operators into this schema, and one for just these types is
-- preferred to one of pg_catalog that has to cast them. So functions with arguments are called by their qualified name;
-- and an operator that pg_catalog does not have for just these types gets a cast, or is qualified, too.
DO $$
BEGIN
    PERFORM pg_catalog.set_config('etcd_fdw.search_path', pg_catalog.current_setting('search_path'), false);
    PERFORM pg_catalog.set_config(
        'search_path', pg_catalog.format('%I, pg_temp', current_schema()), false);  -- until the end of this file
END
$$;

-- == Upgrades ==========================================================================================

-- What older versions lack or had, as far as the rest of this file does not replace it in place. Functions whose
-- signature has changed are dropped: a view of yours that uses one stops the upgrade, with nothing changed.
DO $$
DECLARE v_installed int;
BEGIN
    IF pg_catalog.to_regprocedure('etcd_schema_version()') IS NULL THEN
        RETURN;  -- a new installation
    END IF;
    v_installed := etcd_schema_version();
    IF v_installed > 5 THEN
        RAISE EXCEPTION 'schema version % is installed, this file is version 5', v_installed
            USING ERRCODE = '55000', HINT = 'Use the schema.sql that belongs to the newer etcd_fdw.';
    END IF;

    IF v_installed < 5 THEN
        ALTER TABLE etcd
            ADD COLUMN IF NOT EXISTS lease bigint, ADD COLUMN IF NOT EXISTS create_revision bigint,
            ADD COLUMN IF NOT EXISTS version bigint;
        ALTER TABLE etcd_wal
            ADD COLUMN IF NOT EXISTS dismissed_at timestamptz, ADD COLUMN IF NOT EXISTS ttl interval,
            ADD COLUMN IF NOT EXISTS force boolean NOT NULL DEFAULT false,
            ADD COLUMN IF NOT EXISTS replaced_revision bigint, ADD COLUMN IF NOT EXISTS action text,
            DROP CONSTRAINT IF EXISTS etcd_wal_status_check, DROP CONSTRAINT IF EXISTS etcd_wal_revision_check,
            DROP CONSTRAINT IF EXISTS etcd_wal_finished_check, DROP CONSTRAINT IF EXISTS etcd_wal_dismissed_check,
            DROP CONSTRAINT IF EXISTS etcd_wal_ttl_check;
        ALTER TABLE etcd_sync_state
            DROP COLUMN IF EXISTS sent_before, DROP COLUMN IF EXISTS sent_after, DROP COLUMN IF EXISTS sent_in_parts,
            DROP COLUMN IF EXISTS last_key,
            ADD COLUMN IF NOT EXISTS mirror_id uuid NOT NULL DEFAULT pg_catalog.gen_random_uuid(),
            ADD COLUMN IF NOT EXISTS receipt bigint NOT NULL DEFAULT 0,
            ADD COLUMN IF NOT EXISTS split xid8[] NOT NULL DEFAULT '{}',
            ADD COLUMN IF NOT EXISTS last_error text, ADD COLUMN IF NOT EXISTS last_error_at timestamptz,
            ADD COLUMN IF NOT EXISTS generation bigint NOT NULL DEFAULT 0,
            ADD COLUMN IF NOT EXISTS unrepaired boolean NOT NULL DEFAULT false,
            ADD COLUMN IF NOT EXISTS deferred jsonb NOT NULL DEFAULT '[]',
            ADD COLUMN IF NOT EXISTS last_revision bigint NOT NULL DEFAULT 0,
            ADD COLUMN IF NOT EXISTS excluded text[] NOT NULL DEFAULT '{}';
        UPDATE etcd_sync_state s SET unrepaired = true, last_revision = coalesce((
            SELECT pg_catalog.max(e.revision) FROM etcd e
             WHERE pg_catalog.starts_with(e.key, s.prefix) AND e.revision <= s.revision), 0);
        IF v_installed < 4 THEN
            DROP INDEX IF EXISTS etcd_revision_ts_idx;  -- has other ranges now
        END IF;
        DROP INDEX IF EXISTS etcd_wal_retry_of_key, etcd_wal_success_idx, etcd_wal_pending_txid_idx;
        DROP FUNCTION IF EXISTS
            etcd_get(text), etcd_get_all(text, bigint), etcd_list(text), etcd_at(bigint, text), _etcd_lock_key(text),
            _etcd_state(text, bigint), etcd_set(text, text, bigint), etcd_set(text, jsonb, bigint, interval, boolean),
            etcd_set_bytes(text, bytea, bigint), etcd_delete(text, bigint), etcd_wait(bigint, interval),
            _etcd_wait(text, bigint, timestamptz, text), _etcd_change(text, text, bytea, bigint, boolean, bigint),
            _etcd_change(text, text, bytea, bigint, interval, boolean, boolean, boolean, bigint);
    END IF;
END
$$;

-- == Tables ============================================================================================

-- The latest row of a key is its current state: the primary key answers that with one index descent.
CREATE TABLE IF NOT EXISTS etcd (
    ts               timestamptz       NOT NULL DEFAULT now(),
    key              text COLLATE "C"  NOT NULL,
    value            text,
    revision         bigint            NOT NULL,
    tombstone        boolean           NOT NULL DEFAULT false,
    value_bytes      bytea,
    lease            bigint,
    create_revision  bigint,
    version          bigint,
    CONSTRAINT etcd_pkey PRIMARY KEY (key, revision),
    CONSTRAINT etcd_revision_check CHECK (revision > 0),
    CONSTRAINT etcd_value_check CHECK (
        CASE WHEN tombstone THEN value IS NULL AND value_bytes IS NULL
             ELSE (value IS NULL) <> (value_bytes IS NULL) END)
);

COMMENT ON TABLE  etcd IS 'Mirror of etcd: every revision of every key. Written by etcd_fdw only.';
COMMENT ON COLUMN etcd.ts IS 'when the row was mirrored: etcd keeps no time of its own';
COMMENT ON COLUMN etcd.key IS 'compared byte by byte, as etcd does';
COMMENT ON COLUMN etcd.value IS 'value as text; null for a tombstone, or if value_bytes holds it';
COMMENT ON COLUMN etcd.revision IS 'etcd''s mod_revision: unique per key, shared by the keys of one etcd transaction';
COMMENT ON COLUMN etcd.tombstone IS 'the key was deleted, or expired, at this revision; both values are null';
COMMENT ON COLUMN etcd.value_bytes IS 'value that text cannot hold: not UTF-8, or with a NUL byte';
COMMENT ON COLUMN etcd.lease IS 'etcd''s id of the lease that the key was put with; null: none';
COMMENT ON COLUMN etcd.create_revision IS 'revision of the put that created the key; null for a tombstone, or if not known';
COMMENT ON COLUMN etcd.version IS 'puts since the key was created, 1 for the first; null as create_revision';

-- A plain INSERT is a strict compare-and-swap on revision; etcd_set and its kin fill in revision and depends_on.
-- A CHECK costs every INSERT 2 to 5 us: so there are two. What else makes no sense ends as failed.
CREATE TABLE IF NOT EXISTS etcd_wal (
    id                 bigint            GENERATED ALWAYS AS IDENTITY,
    ts                 timestamptz       NOT NULL DEFAULT now(),
    key                text COLLATE "C"  NOT NULL,
    value              text,
    value_bytes        bytea,
    revision           bigint,
    status             text              NOT NULL DEFAULT 'pending',
    retry_count        integer           NOT NULL DEFAULT 0,
    error_message      text,
    result_revision    bigint,
    finished_at        timestamptz,
    txid               xid8              NOT NULL DEFAULT pg_current_xact_id(),
    depends_on         bigint,
    retry_of           bigint,
    role_name          text              NOT NULL DEFAULT current_user,
    application_name   text              DEFAULT pg_catalog.current_setting('application_name', true),
    dismissed_at       timestamptz,
    ttl                interval,
    force              boolean           NOT NULL DEFAULT false,
    replaced_revision  bigint,
    action             text,
    CONSTRAINT etcd_wal_pkey PRIMARY KEY (id),
    CONSTRAINT etcd_wal_key_check CHECK (key <> '' AND pg_catalog.octet_length(key) <= 2600),
    CONSTRAINT etcd_wal_value_check CHECK (value IS NULL OR value_bytes IS NULL)
) WITH (
    -- every row is updated once and most are deleted later: vacuum after 1000 rows, not after 20 %
    autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0.01, autovacuum_analyze_threshold = 1000,
    autovacuum_analyze_scale_factor = 0.02, autovacuum_vacuum_cost_limit = 2000
);

COMMENT ON TABLE  etcd_wal IS 'Changes that SQL wants made in etcd, and what became of each. A transaction across two mirrors arrives as two.';
COMMENT ON COLUMN etcd_wal.id IS 'order of the changes; ids may become visible out of order';
COMMENT ON COLUMN etcd_wal.ts IS 'start of the transaction that asked for it';
COMMENT ON COLUMN etcd_wal.key IS 'at most 2600 bytes, what an index row surely takes';
COMMENT ON COLUMN etcd_wal.value IS 'text to put; null, as an empty field of COPY CSV is, and no value_bytes: delete';
COMMENT ON COLUMN etcd_wal.value_bytes IS 'bytes to put, for what text cannot hold';
COMMENT ON COLUMN etcd_wal.revision IS 'version the change was made on; null or 0: the key must not exist';
COMMENT ON COLUMN etcd_wal.status IS
    'pending: not answered by etcd yet; success: applied, and visible in table etcd; conflict: etcd held another '
    'version, nothing was changed; failed: etcd refused it. All but pending are final: trying again is a new row';
COMMENT ON COLUMN etcd_wal.retry_count IS 'attempts that ended without an answer from etcd';
COMMENT ON COLUMN etcd_wal.error_message IS 'what went wrong last, or what beat the change';
COMMENT ON COLUMN etcd_wal.result_revision IS
    'revision that the change got (success; null: it deleted a key that was not there) or that beat it (conflict)';
COMMENT ON COLUMN etcd_wal.finished_at IS 'when the status became final; null exactly while pending';
COMMENT ON COLUMN etcd_wal.txid IS 'PostgreSQL transaction; its rows become one etcd transaction in each mirror';
COMMENT ON COLUMN etcd_wal.depends_on IS 'earlier change that this one was made on; its result stands for revision';
COMMENT ON COLUMN etcd_wal.retry_of IS 'refused row that this one tries again: an earlier row of the same key';
COMMENT ON COLUMN etcd_wal.role_name IS 'who asked';
COMMENT ON COLUMN etcd_wal.application_name IS 'who asked';
COMMENT ON COLUMN etcd_wal.dismissed_at IS 'when the conflict or failure was acknowledged; null: it still counts';
COMMENT ON COLUMN etcd_wal.ttl IS 'lease that the key is put with; 0: none; null: the key keeps the one that it has';
COMMENT ON COLUMN etcd_wal.force IS 'apply it whatever etcd holds: revision does not count, it cannot be a conflict';
COMMENT ON COLUMN etcd_wal.action IS
    'null: put the value, or delete; expect: change nothing, the key must be at revision; keepalive: renew its lease';
COMMENT ON COLUMN etcd_wal.replaced_revision IS 'version that the change replaced; null: none, or not known';

-- Who changes a key holds its row here until the transaction ends, and the next one waits. A hash instead of the key:
-- who may not read a key does not see its name. Unlogged: a lock need not outlive a crash.
CREATE UNLOGGED TABLE IF NOT EXISTS etcd_lock (
    hash  bigint  NOT NULL,
    txid  xid8    NOT NULL,
    CONSTRAINT etcd_lock_pkey PRIMARY KEY (hash)
) WITH (fillfactor = 50);

COMMENT ON TABLE  etcd_lock IS 'One row per changed key, locked while a transaction that changes it is open.';
-- What is in it means nothing: the grants on etcd_wal decide who may change a key.
GRANT SELECT, INSERT, UPDATE, DELETE ON etcd_lock TO PUBLIC;

CREATE TABLE IF NOT EXISTS etcd_sync_state (
    prefix           text COLLATE "C"  NOT NULL,
    mirror_id        uuid              NOT NULL DEFAULT pg_catalog.gen_random_uuid(),
    cluster_id       text,
    first_revision   bigint            NOT NULL,
    revision         bigint            NOT NULL,
    pruned_revision  bigint            NOT NULL DEFAULT 0,
    gaps             int8range[]       NOT NULL DEFAULT '{}',
    last_revision    bigint            NOT NULL DEFAULT 0,
    etcd_revision    bigint,
    receipt          bigint            NOT NULL DEFAULT 0,
    split            xid8[]            NOT NULL DEFAULT '{}',
    deferred         jsonb             NOT NULL DEFAULT '[]',
    generation       bigint            NOT NULL DEFAULT 0,
    unrepaired       boolean           NOT NULL DEFAULT false,
    excluded         text[]            NOT NULL DEFAULT '{}',
    updated_at       timestamptz       NOT NULL DEFAULT now(),
    host text, pid integer, version text, started_at timestamptz, heartbeat_at timestamptz,
    last_error text, last_error_at timestamptz,
    events bigint NOT NULL DEFAULT 0, applied bigint NOT NULL DEFAULT 0, conflicts bigint NOT NULL DEFAULT 0,
    failures bigint NOT NULL DEFAULT 0, resyncs bigint NOT NULL DEFAULT 0, reconnects bigint NOT NULL DEFAULT 0,
    unstorable bigint NOT NULL DEFAULT 0,
    CONSTRAINT etcd_sync_state_pkey PRIMARY KEY (prefix)
) WITH (fillfactor = 50);  -- updated with every batch: leave room for it in the page

COMMENT ON TABLE  etcd_sync_state IS 'Per mirrored prefix: checkpoint, active daemon, counters.';
COMMENT ON COLUMN etcd_sync_state.prefix IS 'empty: the whole key space. No row''s prefix begins with another''s';
COMMENT ON COLUMN etcd_sync_state.revision IS 'checkpoint: table etcd is exact up to this revision';
COMMENT ON COLUMN etcd_sync_state.pruned_revision IS 'housekeeping deleted what was before; the state at it is exact';
COMMENT ON COLUMN etcd_sync_state.gaps IS 'revisions that etcd compacted before they were mirrored; unknown';
COMMENT ON COLUMN etcd_sync_state.last_revision IS 'newest event mirrored: between it and the checkpoint was none';
COMMENT ON COLUMN etcd_sync_state.receipt IS 'the newest receipt in etcd whose outcomes are all in etcd_wal';
COMMENT ON COLUMN etcd_sync_state.deferred IS 'outcomes whose row of etcd_wal somebody has locked, or a trigger refuses';
COMMENT ON COLUMN etcd_sync_state.generation IS 'raised with every commit of the daemon; what etcd_wait sleeps on';
COMMENT ON COLUMN etcd_sync_state.unrepaired IS 'mirrored by a version that knew less of a key: the daemon compares it once';
COMMENT ON COLUMN etcd_sync_state.excluded IS 'sub-prefixes that are not mirrored: parameter exclude of the etcd DSN';
COMMENT ON COLUMN etcd_sync_state.host IS 'of the active daemon, as are pid, version, started_at, heartbeat_at';
COMMENT ON COLUMN etcd_sync_state.events IS 'revisions of keys mirrored, counted as those after it since the first copy';
COMMENT ON COLUMN etcd_sync_state.unstorable IS 'events that cannot be stored; see etcd_sync_event';

CREATE TABLE IF NOT EXISTS etcd_sync_event (
    id               bigint       GENERATED ALWAYS AS IDENTITY,
    ts               timestamptz  NOT NULL DEFAULT now(),
    prefix           text COLLATE "C",
    operation        text         NOT NULL,
    key              text COLLATE "C",
    source_system    text, source_revision  bigint,
    target_system    text, target_revision  bigint,
    status           text,
    duration         interval,
    details          jsonb,
    CONSTRAINT etcd_sync_event_pkey PRIMARY KEY (id)
);

COMMENT ON TABLE  etcd_sync_event IS 'Audit trail: conflicts, failures, resyncs, takeovers; with --audit all, changes.';
COMMENT ON COLUMN etcd_sync_event.operation IS 'change, mirror, snapshot, resync, takeover, repair or reset';
COMMENT ON COLUMN etcd_sync_event.key IS 'null if it concerns the whole prefix, or if the key is no text';
COMMENT ON COLUMN etcd_sync_event.details IS 'anything else, by operation; a key that is no text is here in hex';

-- == Indexes ===========================================================================================

-- The history by revision or time ("what has changed since"); a BRIN index costs the mirror next to nothing.
-- With PostgreSQL's 128 pages per range, 18 prefers a skip scan of the primary key, which visits every key.
CREATE INDEX IF NOT EXISTS etcd_revision_ts_idx ON etcd USING brin (revision, ts)
    WITH (autosummarize = on, pages_per_range = 16);

-- Pending rows, and only those: in order, and the newest of a key. All rows by transaction.
CREATE INDEX IF NOT EXISTS etcd_wal_pending_idx ON etcd_wal (id) WHERE status = 'pending';
CREATE INDEX IF NOT EXISTS etcd_wal_pending_key_idx ON etcd_wal (key, id) WHERE status = 'pending';
CREATE INDEX IF NOT EXISTS etcd_wal_txid_idx ON etcd_wal (txid, id);

-- Conflicts and failures; and a row is tried again once only, by a later row of the same key.
CREATE INDEX IF NOT EXISTS etcd_wal_unresolved_idx ON etcd_wal (id) WHERE status IN ('conflict', 'failed');
CREATE UNIQUE INDEX IF NOT EXISTS etcd_wal_retry_key ON etcd_wal (retry_of, key) WHERE retry_of < id;

-- What housekeeping deletes: old successes, what was dismissed long ago, old audit rows.
CREATE INDEX IF NOT EXISTS etcd_wal_settled_idx ON etcd_wal (coalesce(dismissed_at, finished_at))
    WHERE status = 'success' OR dismissed_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS etcd_sync_event_ts_idx ON etcd_sync_event USING brin (ts);

-- == Views =============================================================================================

CREATE OR REPLACE FUNCTION _etcd_json(p_value text)
RETURNS jsonb LANGUAGE plpgsql IMMUTABLE STRICT SET search_path FROM CURRENT AS $$
-- A value as jsonb; null if it is no JSON, or none that jsonb takes. Never an error.
-- What plainly is no JSON is not even tried, because a try that fails costs more.
BEGIN
    IF p_value ~ '^[ \t\r\n]*([[{"]|(true|false|null|-?[0-9]+([.][0-9]+)?([eE][-+]?[0-9]+)?)[ \t\r\n]*$)' THEN
        BEGIN
            RETURN p_value::jsonb;
        EXCEPTION WHEN data_exception OR program_limit_exceeded THEN  -- the latter: nested too deeply
        END;
    END IF;
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION _etcd_creations(p_prefix text DEFAULT '')
RETURNS TABLE (key text, value text, value_bytes bytea)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED ROWS 10 SET search_path FROM CURRENT AS $$
-- Keys that are not live and will be when what is pending is applied.
BEGIN
    RETURN QUERY SELECT n.key::text, n.value, n.value_bytes
      FROM (SELECT DISTINCT ON (w.key) w.key, w.value, w.value_bytes FROM etcd_wal w
             WHERE w.status = 'pending' AND w.action IS NULL
               AND w.key >= p_prefix COLLATE "C" AND pg_catalog.starts_with(w.key, p_prefix COLLATE "C")
             ORDER BY w.key, w.id DESC) n
     WHERE (n.value IS NOT NULL OR n.value_bytes IS NOT NULL)
       AND (SELECT e.tombstone FROM etcd e WHERE e.key = n.key ORDER BY e.revision DESC LIMIT 1) IS NOT FALSE;
END
$$;

-- The live keys. See _etcd_kv_write below for what writing to it does. WHERE key = ... is answered by the index:
-- with two descents from PostgreSQL 16 on, before by reading the index entries of that key's history. To look up many
-- keys, join LATERAL etcd_get(key); for keys under a prefix, or all keys of a long history, etcd_list() is faster.
--
-- The second part is for UPDATE and DELETE only, while which a trigger has etcd_fdw.writing set: a key whose
-- creation is pending is visited, too (at revision 0), and not skipped in silence. For a SELECT that part costs
-- the look at that setting: Result with a One-Time Filter in EXPLAIN.
CREATE OR REPLACE VIEW etcd_kv AS
(SELECT k.key, e.value, e.value_bytes, e.revision, e.ts, e.lease, _etcd_json(e.value) AS value_json,
       e.create_revision, e.version, coalesce(e.value_bytes, pg_catalog.convert_to(e.value, 'UTF8')) AS value_raw
  FROM (SELECT DISTINCT d.key FROM etcd d) k
 CROSS JOIN LATERAL (
        SELECT l.value, l.value_bytes, l.revision, l.ts, l.lease, l.create_revision, l.version, l.tombstone
          FROM etcd l
         WHERE l.key = k.key
         ORDER BY l.revision DESC LIMIT 1) e
 WHERE NOT e.tombstone
 ORDER BY k.key)  -- as the index has it, so that ORDER BY key LIMIT 10 reads 10 keys
UNION ALL
SELECT c.key COLLATE "C", c.value, c.value_bytes, 0::bigint, NULL::timestamptz, NULL::bigint, _etcd_json(c.value),
       NULL::bigint, NULL::bigint, coalesce(c.value_bytes, pg_catalog.convert_to(c.value, 'UTF8'))
  FROM _etcd_creations() c
 WHERE pg_catalog.current_setting('etcd_fdw.writing', true) = 'on';

COMMENT ON VIEW etcd_kv IS
    'Live keys. INSERT, UPDATE and DELETE queue a change made on the version that was seen, or on an own change '
    'of this transaction; 40001 if the key has another pending change or has moved on, 23505 on INSERT of a live '
    'key. UPDATE and DELETE visit keys whose creation is pending, too; SELECT shows what etcd has.';
COMMENT ON COLUMN etcd_kv.value IS 'value as text; setting it clears value_bytes';
COMMENT ON COLUMN etcd_kv.value_bytes IS 'value that is no text; setting it clears value';
COMMENT ON COLUMN etcd_kv.revision IS
    'etcd''s mod_revision. Read only: an UPDATE that sets another one than the key has is refused with 40001';
COMMENT ON COLUMN etcd_kv.ts IS 'when that revision was mirrored; read only';
COMMENT ON COLUMN etcd_kv.lease IS 'id of the lease that the key expires with; null: none; read only';
COMMENT ON COLUMN etcd_kv.value_json IS 'value as jsonb, null if it is no JSON; read only';
COMMENT ON COLUMN etcd_kv.create_revision IS 'revision of the put that created the key; read only';
COMMENT ON COLUMN etcd_kv.version IS 'puts since the key was created; read only';
COMMENT ON COLUMN etcd_kv.value_raw IS 'value as bytes, whichever column has it; read only';

CREATE OR REPLACE VIEW etcd_refused AS
SELECT w.id, w.ts, w.key, w.status, w.error_message, w.result_revision, w.revision, w.action, w.finished_at,
       w.txid, w.role_name, w.application_name
  FROM etcd_wal w
 WHERE w.status IN ('conflict', 'failed')
   AND w.dismissed_at IS NULL
   AND NOT EXISTS (
           SELECT FROM etcd_wal r WHERE r.retry_of = w.id AND r.key = w.key AND r.retry_of < r.id);

COMMENT ON VIEW etcd_refused IS
    'Conflicts and failures that nobody has tried again or dismissed: etcd_retry(id), etcd_dismiss(id).';

CREATE OR REPLACE VIEW etcd_status AS
WITH open_change AS (
    SELECT w.key, w.status, w.ts FROM etcd_wal w WHERE w.status = 'pending'
    UNION ALL
    SELECT r.key, r.status, r.ts FROM etcd_refused r
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
SELECT coalesce(s.prefix, t.prefix) AS prefix, s.revision, s.etcd_revision, s.updated_at,
       clock_timestamp() - s.heartbeat_at AS heartbeat_age, s.host, s.pid, s.version, s.started_at,
       coalesce(t.pending, 0) AS pending, clock_timestamp() - t.oldest AS oldest_pending_age,
       coalesce(t.conflicts, 0) AS conflicts, coalesce(t.failures, 0) AS failures,
       s.unstorable, s.last_error, s.last_error_at
  FROM etcd_sync_state s
  FULL JOIN tally t ON t.prefix = s.prefix;

COMMENT ON VIEW etcd_status IS
    'Health of each mirrored prefix. Prefix null: changes outside every prefix, which no daemon will apply. '
    'revision: checkpoint; etcd_revision: newest of the whole store; heartbeat_age: beyond seconds no daemon is active; '
    'conflicts, failures: neither tried again nor dismissed; last_error: what keeps the daemon from working.';

-- == Reading ===========================================================================================

-- What reads, as rows of table etcd. Each is under the name without the underscore below, with value_json and
-- value_raw. enable_sort is off so that a plan made while the table was small cannot turn into a scan when it grows.

CREATE OR REPLACE FUNCTION _etcd_get(p_key text)
RETURNS SETOF etcd LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 1 SET search_path FROM CURRENT SET enable_sort = off AS $$
-- One index descent, however long the history is.
BEGIN
    RETURN QUERY SELECT l.*
      FROM (SELECT e.* FROM etcd e WHERE e.key = p_key COLLATE "C"
             ORDER BY e.revision DESC LIMIT 1) l
     WHERE NOT l.tombstone;
END
$$;

CREATE OR REPLACE FUNCTION _etcd_get_all(p_key text, p_min_revision bigint)
RETURNS SETOF etcd LANGUAGE plpgsql STABLE PARALLEL SAFE SET search_path FROM CURRENT SET enable_sort = off AS $$
-- See etcd_get_all.
DECLARE v_pruned bigint;
BEGIN
    IF p_min_revision > 0 THEN
        SELECT s.pruned_revision INTO v_pruned FROM etcd_sync_state s
         WHERE pg_catalog.starts_with(p_key COLLATE "C", s.prefix);
    END IF;
    IF p_min_revision < v_pruned THEN
        RAISE EXCEPTION 'history before revision % has been pruned', v_pruned
            USING ERRCODE = '22023', HINT = 'Ask from that revision on, or without a revision for what is left.';
    END IF;
    RETURN QUERY SELECT e.* FROM etcd e WHERE e.key = p_key COLLATE "C"
       AND e.revision >= coalesce(p_min_revision, 0)
     ORDER BY e.revision;
END
$$;

CREATE OR REPLACE FUNCTION _etcd_list(
    p_prefix text, p_limit bigint DEFAULT NULL, p_after text DEFAULT NULL,
    p_revision bigint DEFAULT 9223372036854775807)
RETURNS SETOF etcd LANGUAGE plpgsql STABLE PARALLEL SAFE SET search_path FROM CURRENT SET enable_sort = off AS $$
-- Live keys under a prefix as of a revision, in key order. Skips from key to key, whatever the history holds: looks at
-- the next 64 rows for keys, goes on behind the last of those, and descends the index once for each key found.
DECLARE
    -- No key with the prefix is above, being shorter: ends the search where row-level security hides the rest.
    v_end  text := p_prefix || pg_catalog.repeat(pg_catalog.chr(1114111), 700);
BEGIN
    RETURN QUERY
    WITH RECURSIVE step (keys) AS (
        SELECT pg_catalog.array_agg(DISTINCT b.key)
          FROM (SELECT e.key FROM etcd e
                 WHERE e.key >= p_prefix COLLATE "C" AND e.key > coalesce(p_after, '') COLLATE "C"
                   AND e.key <= v_end COLLATE "C"
                 ORDER BY e.key LIMIT 64) b
        UNION ALL
        SELECT (SELECT pg_catalog.array_agg(DISTINCT b.key)
                  FROM (SELECT e.key FROM etcd e WHERE e.key > l.last AND e.key <= v_end COLLATE "C"
                         ORDER BY e.key LIMIT 64) b)
          FROM step, LATERAL (SELECT step.keys[pg_catalog.cardinality(step.keys)]) l (last)
         WHERE pg_catalog.starts_with(l.last, p_prefix COLLATE "C")  -- neither null nor beyond
    )
    SELECT l.* FROM step
     CROSS JOIN LATERAL pg_catalog.unnest(step.keys) k (key)
     CROSS JOIN LATERAL (
            SELECT e.* FROM etcd e WHERE e.key = k.key AND e.revision <= p_revision
             ORDER BY e.revision DESC LIMIT 1) l
     WHERE pg_catalog.starts_with(k.key, p_prefix COLLATE "C") AND NOT l.tombstone
     LIMIT p_limit;
END
$$;

CREATE OR REPLACE FUNCTION _etcd_at(p_revision bigint, p_prefix text, p_limit bigint, p_after text)
RETURNS SETOF etcd LANGUAGE plpgsql STABLE PARALLEL SAFE SET search_path FROM CURRENT AS $$
-- See etcd_at. The mirror that must know is the one that covers p_prefix, else each that lies within it.
DECLARE
    s          record;
    v_problem  text;
BEGIN
    IF p_revision IS NULL OR p_prefix IS NULL THEN
        RAISE EXCEPTION 'revision and prefix must not be null' USING ERRCODE = '22004';
    END IF;
    FOR s IN
        SELECT c.prefix, c.first_revision, c.pruned_revision, c.revision, c.gaps FROM etcd_sync_state c
         WHERE pg_catalog.starts_with(p_prefix COLLATE "C", c.prefix)
            OR pg_catalog.starts_with(c.prefix, p_prefix COLLATE "C")
         ORDER BY c.prefix
    LOOP
        v_problem := CASE
            WHEN p_revision < s.first_revision THEN 'is before the mirror began'
            WHEN p_revision < s.pruned_revision THEN 'has been pruned'
            WHEN p_revision > s.revision THEN 'is beyond the checkpoint; etcd_wait_revision waits for it'
            WHEN p_revision OPERATOR(pg_catalog.<@) ANY (s.gaps) THEN 'was compacted before it was mirrored' END;
        IF v_problem IS NOT NULL THEN
            RAISE EXCEPTION 'revision % of prefix "%" %', p_revision, s.prefix, v_problem
                USING ERRCODE = '22023', HINT = pg_catalog.format(
                    'Revisions %s to %s are known%s.', greatest(s.first_revision, s.pruned_revision), s.revision,
                    CASE WHEN pg_catalog.cardinality(s.gaps) > 0 THEN ', but for those in ' || s.gaps::text END);
        END IF;
    END LOOP;
    IF NOT FOUND THEN
        PERFORM _etcd_mirror(p_prefix);  -- raises
    END IF;
    RETURN QUERY SELECT * FROM _etcd_list(p_prefix, p_limit, p_after, p_revision);
END
$$;

-- The functions to call. PostgreSQL replaces each by its query, so what is not asked for is not computed: no JSON
-- is parsed for SELECT key, value. That forbids a SET clause, so all names in them are qualified.
DO $$
DECLARE
    v_rows  text := 's.key, s.value, s.value_bytes, s.revision, s.ts,%s s.lease, %%1$I._etcd_json(s.value), '
                    's.create_revision, s.version, '
                    'coalesce(s.value_bytes, pg_catalog.convert_to(s.value, ''UTF8''::pg_catalog.name))';
    f       record;
BEGIN
    FOR f IN SELECT * FROM (VALUES
        ('etcd_get(p_key text)', 'SETOF %1$I.etcd_kv ROWS 1', '', '_etcd_get($1)',
         '-- One index descent, however long the history is.'),
        ('etcd_list(p_prefix text DEFAULT '''', p_limit bigint DEFAULT NULL, p_after text DEFAULT NULL)',
         'SETOF %1$I.etcd_kv', '', '_etcd_list($1, $2, $3)',
         '--   p_prefix  taken literally (%% and _ mean themselves); '''' for all keys
--   p_limit   at most so many; null: all
--   p_after   only keys behind this one: the last one of the page before'),
        ('etcd_at(p_revision bigint, p_prefix text DEFAULT '''', p_limit bigint DEFAULT NULL, '
         'p_after text DEFAULT NULL)', 'SETOF %1$I.etcd_kv', '', '_etcd_at($1, $2, $3, $4)',
         '--   parameters  those of etcd_list; a time''s revision is told by etcd_revision_at
--   errors      22023 if the mirror cannot know: no mirrored prefix there, before the mirror began or was
--               pruned, in a gap, beyond the checkpoint; 22004 if an argument is null'),
        ('etcd_get_all(p_key text, p_min_revision bigint DEFAULT 0)',
         'TABLE (key text, value text, value_bytes bytea, revision bigint, ts timestamptz, tombstone boolean, '
         'lease bigint, value_json jsonb, create_revision bigint, version bigint, value_raw bytea)',
         ' s.tombstone,', '_etcd_get_all($1, $2)',
         '--   p_min_revision  leave out what is older; 0 or null: everything that the mirror holds
--   errors          22023 if history from p_min_revision on was asked for and some of it has been deleted')
    ) v (signature, result, tombstone, source, header) LOOP
        EXECUTE pg_catalog.format(
            'CREATE OR REPLACE FUNCTION ' || f.signature || ' RETURNS ' || f.result || E' LANGUAGE sql STABLE AS $b$\n'
                || f.header || E'\nSELECT ' || pg_catalog.format(v_rows, f.tombstone)
                || E'\n  FROM %1$I.' || f.source || E' s\n$b$',
            current_schema());
    END LOOP;
END
$$;
COMMENT ON FUNCTION etcd_get(text) IS 'current value of one key; no row if it does not exist';
COMMENT ON FUNCTION etcd_list(text, bigint, text) IS 'live keys under a prefix, in key order';
COMMENT ON FUNCTION etcd_at(bigint, text, bigint, text) IS 'live keys under a prefix as of a past revision';
COMMENT ON FUNCTION etcd_get_all(text, bigint) IS 'history of one key, oldest first, with tombstones';

CREATE OR REPLACE FUNCTION _etcd_mirror(p_prefix text, OUT prefix text, OUT revision bigint, OUT generation bigint)
LANGUAGE plpgsql STABLE SET search_path FROM CURRENT AS $$
-- The mirror that covers a prefix or key; null or '': the only one. 22023 if there is none, or several.
DECLARE v_prefixes text[];
BEGIN
    SELECT pg_catalog.max(s.prefix), pg_catalog.max(s.revision), pg_catalog.max(s.generation),
           pg_catalog.array_agg(s.prefix ORDER BY s.prefix)
      INTO prefix, revision, generation, v_prefixes
      FROM etcd_sync_state s
     WHERE coalesce(p_prefix, '') = '' OR pg_catalog.starts_with(p_prefix COLLATE "C", s.prefix);
    IF v_prefixes IS NULL THEN
        RAISE EXCEPTION 'prefix "%" is not mirrored', coalesce(p_prefix, '')
            USING ERRCODE = '22023', HINT = 'Table etcd_sync_state lists the mirrored prefixes.';
    ELSIF pg_catalog.cardinality(v_prefixes) > 1 THEN
        RAISE EXCEPTION '% prefixes are mirrored', pg_catalog.cardinality(v_prefixes)
            USING ERRCODE = '22023', HINT = pg_catalog.format('Name one: p_prefix => %L, for example.', v_prefixes[1]);
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION etcd_revision_at(p_time timestamptz, p_prefix text DEFAULT '')
RETURNS bigint LANGUAGE plpgsql STABLE SET search_path FROM CURRENT SET enable_seqscan = off AS $$
-- For etcd_at and etcd_restore. The newest revision that was mirrored by then under the mirror that covers
-- p_prefix ('': the only one); what etcd had written and the daemon had not mirrored yet does not count.
--   errors  22023 p_time is in the future, or before everything that is mirrored; no such mirror, or several
DECLARE
    v_prefix    text := (_etcd_mirror(p_prefix)).prefix;
    v_window    interval := '1 s';
    v_revision  bigint;
BEGIN
    IF p_time > clock_timestamp() THEN
        RAISE EXCEPTION '% is in the future', p_time USING ERRCODE = '22023';
    END IF;
    LOOP  -- looks back by windows that grow: the block range index finds the few rows of each
        SELECT pg_catalog.max(e.revision) INTO v_revision FROM etcd e
         WHERE e.ts <= p_time AND e.ts > p_time - v_window AND pg_catalog.starts_with(e.key, v_prefix);
        IF v_revision IS NOT NULL THEN
            -- A repair gives a row its own time, so older rows may be newer. What a copy brings is known from its
            -- own revision on: the first one's, or the end of a gap.
            SELECT greatest(v_revision, pg_catalog.max(e.revision)) INTO v_revision FROM etcd e
             WHERE e.revision > v_revision AND e.ts <= p_time AND pg_catalog.starts_with(e.key, v_prefix);
            RETURN (SELECT greatest(v_revision, s.first_revision, pg_catalog.max(pg_catalog.upper(g)))
                      FROM etcd_sync_state s
                      LEFT JOIN pg_catalog.unnest(s.gaps) g ON v_revision OPERATOR(pg_catalog.<@) g
                     WHERE s.prefix = v_prefix GROUP BY s.first_revision);
        ELSIF v_window > interval '1000 years' OR p_time IS NULL THEN
            RAISE EXCEPTION 'nothing was mirrored by %', p_time USING ERRCODE = '22023';
        END IF;
        v_window := v_window * 8::float8;
    END LOOP;
END
$$;
COMMENT ON FUNCTION etcd_revision_at(timestamptz, text) IS 'revision at a time, for etcd_at and etcd_restore';

-- == Writing ===========================================================================================

CREATE OR REPLACE FUNCTION _etcd_change(
    p_key text, p_value text, p_value_bytes bytea, p_revision bigint DEFAULT NULL, p_ttl interval DEFAULT NULL,
    p_force boolean DEFAULT false, p_delete boolean DEFAULT false, p_new boolean DEFAULT false,
    p_retry_of bigint DEFAULT NULL, p_own boolean DEFAULT false, p_expect boolean DEFAULT false)
RETURNS bigint LANGUAGE plpgsql SET search_path FROM CURRENT SET enable_sort = off AS $$
-- Queue one change: everything that writes goes through here. Parameters and errors are those of etcd_set, and
--   p_value, p_value_bytes  what to put, one of them; both null with p_delete
--   p_new                   the key must not exist, 23505 if it does
--   p_retry_of              the etcd_wal row that this one tries again, 55000 if another one does
--   p_own                   made on top of an own pending change of this transaction; null if that deletes the key
--   p_expect                a guard, see etcd_expect
-- In a REPEATABLE READ transaction the version is that of its snapshot; if it is old, etcd says so later. If another
-- session has changed the key in etcd_wal since, it is 40001 at once, by the row of etcd_lock.
DECLARE
    v_hash     bigint := pg_catalog.hashtextextended(p_key COLLATE "C", 0);
    v_wrong    text[];  -- SQLSTATE, message, hint
    v_pending  record;
    v_current  bigint;  -- 0: the key does not exist
    v_id       bigint;
    v_prefix   text;
BEGIN
    IF p_key IS NULL OR p_key = '' OR pg_catalog.octet_length(p_key) > 2600 OR p_revision < 0
       OR (p_value IS NULL) = (p_value_bytes IS NULL) AND NOT (p_delete OR p_expect)
       OR p_revision IS NOT NULL AND p_force OR p_expect AND p_revision IS NULL
       OR NOT EXTRACT(epoch FROM p_ttl)::float8 BETWEEN 0::float8 AND 9000000000::float8 THEN
        v_wrong := CASE
            WHEN p_key IS NULL THEN ARRAY['22004', 'key must not be null', 'It has 1 to 2600 bytes.']
            WHEN p_key = '' OR pg_catalog.octet_length(p_key) > 2600 THEN ARRAY[
                '22023', pg_catalog.format('key must have 1 to 2600 bytes, not %s', pg_catalog.octet_length(p_key)),
                'etcd has no empty key, and PostgreSQL cannot index a longer one.']
            WHEN p_value IS NULL AND p_value_bytes IS NULL AND NOT (p_delete OR p_expect) THEN ARRAY[
                '22004', 'value must not be null', 'To delete a key use etcd_delete, or DELETE FROM etcd_kv.']
            WHEN p_value IS NOT NULL AND p_value_bytes IS NOT NULL THEN ARRAY[
                '22023', 'only one of value and value_bytes can be set',
                'Text belongs into value, and into value_bytes what is no text.']
            WHEN p_revision IS NULL AND p_expect THEN ARRAY[
                '22004', 'revision must not be null', '0 means that the key must not exist.']
            WHEN p_revision < 0 THEN ARRAY[
                '22023', 'revision must not be negative', '0 means that the key must not exist, null any version.']
            WHEN p_revision IS NOT NULL AND p_force THEN ARRAY[
                '22023', 'a forced change is made on no certain revision',
                'Give a revision to change that version only, or force => true to change any.']
            WHEN NOT EXTRACT(epoch FROM p_ttl)::float8 BETWEEN 0::float8 AND 9000000000::float8 THEN ARRAY[
                '22023', pg_catalog.format('ttl must be between 0 and 9000000000 seconds, not %s', p_ttl),
                '0 takes the lease of the key off, null leaves it as it is.'] END;
        RAISE EXCEPTION '%', v_wrong[2] USING ERRCODE = v_wrong[1], HINT = v_wrong[3];
    END IF;

    -- One transaction after the other changes a key: the next one waits here until this one ends. Transactions
    -- that change the same keys in different orders can deadlock, as with rows: 40P01, try again.
    IF p_expect THEN  -- guards do not wait for each other, once the row is there
        LOOP
            INSERT INTO etcd_lock (hash, txid) VALUES (v_hash, pg_current_xact_id()) ON CONFLICT DO NOTHING;
            PERFORM FROM etcd_lock l WHERE l.hash = v_hash FOR SHARE;
            EXIT WHEN FOUND;  -- unless housekeeping has deleted it just now
        END LOOP;
    ELSE
        INSERT INTO etcd_lock AS l (hash, txid) VALUES (v_hash, pg_current_xact_id())
            ON CONFLICT (hash) DO UPDATE SET txid = excluded.txid WHERE l.txid <> excluded.txid;
    END IF;

    IF p_retry_of IS NOT NULL THEN
        SELECT w.id INTO v_id FROM etcd_wal w
         WHERE w.retry_of = p_retry_of AND w.key = p_key COLLATE "C" AND w.retry_of < w.id;
        IF FOUND THEN
            RAISE EXCEPTION 'change % was tried again already', p_retry_of
                USING ERRCODE = '55000', DETAIL = pg_catalog.format('That is row %s of etcd_wal.', v_id),
                      HINT = 'If that one ended as conflict or failed, too, try that one again.';
        END IF;
    END IF;

    IF p_force IS NOT TRUE THEN
        -- Pending first, mirror second: the daemon marks success and mirrors in one transaction, so if a change
        -- is pending no longer, the second query sees its revision: it is never taken for somebody else's.
        -- A range of one key, sorted by both columns: with sorts off only the index on (key, id) can answer
        -- that, while key = p_key ORDER BY id may be planned as a walk along (id), past everything pending.
        SELECT w.id, w.revision, w.force, w.txid, w.value IS NULL AND w.value_bytes IS NULL AS deletes INTO v_pending
          FROM etcd_wal w
         WHERE w.key >= p_key COLLATE "C" AND w.key <= p_key COLLATE "C"
           AND w.status = 'pending' AND w.action IS NULL
         ORDER BY w.key DESC, w.id DESC LIMIT 1;
        v_current := coalesce((SELECT CASE WHEN e.tombstone THEN 0 ELSE e.revision END FROM etcd e
                                WHERE e.key = p_key COLLATE "C" ORDER BY e.revision DESC LIMIT 1), 0);

        IF p_new OR p_revision IS NOT NULL THEN
            p_own := p_own AND v_pending.txid = pg_current_xact_id();
            IF p_own AND v_pending.deletes AND NOT p_new THEN
                RETURN NULL;
            ELSIF v_pending.id IS NOT NULL AND p_own IS NOT TRUE THEN
                RAISE EXCEPTION 'key "%" has a pending change', p_key
                    USING ERRCODE = '40001', DETAIL = pg_catalog.format('It is row %s of etcd_wal.', v_pending.id),
                          HINT = 'Try again when it is applied, or use etcd_set or etcd_delete without a revision.';
            ELSIF p_new AND (CASE WHEN p_own THEN NOT v_pending.deletes ELSE v_current > 0 END) THEN
                RAISE EXCEPTION 'key "%" already exists', p_key
                    USING ERRCODE = '23505',
                          DETAIL = CASE WHEN p_own THEN pg_catalog.format('It is row %s of etcd_wal.', v_pending.id)
                                        ELSE pg_catalog.format('It is at revision %s.', v_current) END,
                          HINT = 'To change it use UPDATE or etcd_set.';
            ELSIF (CASE WHEN p_expect THEN p_revision < v_current  -- the mirror may be behind what the caller knows
                        WHEN p_own THEN p_revision <> coalesce(v_pending.revision, 0) AND NOT v_pending.force
                        ELSE p_revision <> v_current END) THEN
                RAISE EXCEPTION 'key "%" is not at revision %', p_key, p_revision
                    USING ERRCODE = '40001',
                          DETAIL = CASE v_current WHEN 0 THEN 'It does not exist.'
                                                  ELSE pg_catalog.format('It is at revision %s.', v_current) END,
                          HINT = 'Read it again and repeat the change.';
            END IF;
        END IF;
    END IF;

    -- INSERT is checked column by column: name action, force and ttl only where they are used, so that a role
    -- without INSERT on them can do all the rest.
    IF p_expect THEN
        INSERT INTO etcd_wal AS w (key, revision, action) VALUES (p_key, p_revision, 'expect') RETURNING w.id INTO v_id;
    ELSIF p_force THEN
        INSERT INTO etcd_wal AS w (key, value, value_bytes, retry_of, ttl, force)
        VALUES (p_key, p_value, p_value_bytes, p_retry_of, p_ttl, true) RETURNING w.id INTO v_id;
    ELSIF p_ttl IS NOT NULL THEN
        INSERT INTO etcd_wal AS w (key, value, value_bytes, revision, depends_on, retry_of, ttl)
        VALUES (p_key, p_value, p_value_bytes, nullif(v_current, 0), v_pending.id, p_retry_of, p_ttl)
        RETURNING w.id INTO v_id;
    ELSE
        INSERT INTO etcd_wal AS w (key, value, value_bytes, revision, depends_on, retry_of)
        VALUES (p_key, p_value, p_value_bytes, nullif(v_current, 0), v_pending.id, p_retry_of)
        RETURNING w.id INTO v_id;
    END IF;

    -- No warning for a role that may not read etcd_sync_state, nor before there is a mirror.
    IF pg_catalog.has_table_privilege('etcd_sync_state'::regclass::oid, 'SELECT'::text) THEN
        SELECT s.prefix INTO v_prefix FROM etcd_sync_state s
         WHERE pg_catalog.starts_with(p_key COLLATE "C", s.prefix) ORDER BY s.prefix DESC LIMIT 1;
        IF v_prefix IS NULL THEN
            IF EXISTS (SELECT FROM etcd_sync_state) THEN
                RAISE WARNING 'key "%" is outside every mirrored prefix', p_key
                    USING HINT = pg_catalog.format(
                        'Row %s of etcd_wal stays pending until an etcd_fdw that mirrors this key runs.', v_id);
            END IF;
        ELSIF pg_catalog.current_setting('etcd_fdw.prefix', true) IS DISTINCT FROM v_prefix THEN
            IF pg_catalog.current_setting('etcd_fdw.prefix', true) <> '' THEN
                RAISE WARNING 'this transaction changes keys of two mirrors: it arrives in etcd as two';
            END IF;
            v_prefix := pg_catalog.set_config('etcd_fdw.prefix', v_prefix, true);  -- of this transaction's last change
        END IF;
    END IF;
    RETURN v_id;
END
$$;

CREATE OR REPLACE FUNCTION etcd_set(
    p_key text, p_value text, p_revision bigint DEFAULT NULL, ttl interval DEFAULT NULL, force boolean DEFAULT false)
RETURNS bigint LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
--   p_key       1 to 2600 bytes
--   p_revision  null: put it on whatever is current, after any pending change (the last writer wins)
--               else: only if the key is at this revision now (0: does not exist) and nothing is pending
--   ttl         null: the key keeps the lease that it has; else it expires so long after it is put, in whole
--               seconds, rounded up, unless it is set again with a ttl; '0': it does not expire
--   force       apply it whatever etcd holds then: overwrites what nobody here has seen
--   errors      40001 if p_revision does not hold; 22004 for a null key or value; 22023 for a bad key or ttl,
--               or for a revision and force. A warning if no mirrored prefix has the key
BEGIN
    RETURN _etcd_change(p_key, p_value, NULL, p_revision, ttl, force);
END
$$;
COMMENT ON FUNCTION etcd_set(text, text, bigint, interval, boolean) IS
    'queue a put, as row id of etcd_wal; with a revision only on that version (0: must not exist), else 40001';

CREATE OR REPLACE FUNCTION etcd_set(
    p_key text, p_value anynonarray, p_revision bigint DEFAULT NULL, ttl interval DEFAULT NULL,
    force boolean DEFAULT false)
RETURNS bigint LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
-- A number, boolean, uuid, enum, json, jsonb, time, ...: as the text that PostgreSQL makes of it; bytea: as bytes.
-- A literal without a type calls etcd_set of text.
BEGIN
    IF pg_catalog.pg_typeof(p_value)::oid = 'bytea'::regtype::oid THEN
        RETURN _etcd_change(p_key, NULL, p_value, p_revision, ttl, force);
    END IF;
    RETURN _etcd_change(p_key, p_value::text, NULL, p_revision, ttl, force);
END
$$;
COMMENT ON FUNCTION etcd_set(text, anynonarray, bigint, interval, boolean) IS 'queue a put of any scalar, or bytea';

CREATE OR REPLACE FUNCTION etcd_set_bytes(
    p_key text, p_value bytea, p_revision bigint DEFAULT NULL, ttl interval DEFAULT NULL, force boolean DEFAULT false)
RETURNS bigint LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
-- As etcd_set, for what need not be text.
BEGIN
    RETURN _etcd_change(p_key, NULL, p_value, p_revision, ttl, force);
END
$$;
COMMENT ON FUNCTION etcd_set_bytes(text, bytea, bigint, interval, boolean) IS 'queue a put of bytes; see etcd_set';

CREATE OR REPLACE FUNCTION etcd_set_many(p_values jsonb, ttl interval DEFAULT NULL, force boolean DEFAULT false)
RETURNS SETOF bigint LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
--   p_values  {"key": value, ...}: a string is put as its text, null deletes the key, anything else is put as
--             its JSON text; each on whatever is current, after any pending change
--   result    etcd_wal.id of each, in the order of the keys: so two of them do not wait for each other's keys
--   errors    as etcd_set; 22023 if it is no object
BEGIN
    IF p_values IS NULL OR pg_catalog.jsonb_typeof(p_values) <> 'object' THEN
        RAISE EXCEPTION 'values must be an object of keys, not %', coalesce(pg_catalog.jsonb_typeof(p_values), 'null')
            USING ERRCODE = '22023',
                  HINT = 'For example etcd_set_many(''{"/a": "text", "/b": {"x": 1}, "/gone": null}'').';
    END IF;
    RETURN QUERY SELECT _etcd_change(
               e.key, e.value, NULL, p_force => force, p_delete => e.value IS NULL,
               p_ttl => CASE WHEN e.value IS NOT NULL THEN ttl END)
      FROM (SELECT * FROM pg_catalog.jsonb_each_text(p_values) j ORDER BY j.key COLLATE "C") e;
END
$$;
COMMENT ON FUNCTION etcd_set_many(jsonb, interval, boolean) IS
    'queue a put of each key of an object, a delete where the value is null; etcd applies them together';

CREATE OR REPLACE FUNCTION etcd_delete(p_key text, p_revision bigint DEFAULT NULL, force boolean DEFAULT false)
RETURNS bigint LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
-- As etcd_set. The key need not exist: the change then succeeds without a result_revision.
BEGIN
    RETURN _etcd_change(p_key, NULL, NULL, p_revision, p_force => force, p_delete => true);
END
$$;
COMMENT ON FUNCTION etcd_delete(text, bigint, boolean) IS 'queue a delete, as row id of etcd_wal; see etcd_set';

CREATE OR REPLACE FUNCTION etcd_delete_prefix(p_prefix text, force boolean DEFAULT false)
RETURNS bigint LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
--   p_prefix  taken literally, not empty: 22004, 22023
--   force     as in etcd_set; keys that the mirror does not have yet stay
--   result    how many deletes were queued: one for each key that is live, or will be when what is pending is applied,
--             each on top of that. So a second call finds nothing left to do.
BEGIN
    IF p_prefix = '' OR p_prefix IS NULL THEN
        RAISE EXCEPTION 'prefix must be neither null nor empty' USING
            ERRCODE = CASE p_prefix WHEN '' THEN '22023' ELSE '22004' END,
            HINT = 'To delete everything use DELETE FROM etcd_kv.';
    END IF;
    RETURN (
        SELECT pg_catalog.count(etcd_delete(k.key, force => force))
          FROM (SELECT l.key FROM _etcd_list(p_prefix) l
                 WHERE (SELECT w.value IS NULL AND w.value_bytes IS NULL FROM etcd_wal w
                         WHERE w.key = l.key AND w.status = 'pending' AND w.action IS NULL
                         ORDER BY w.key DESC, w.id DESC LIMIT 1) IS NOT TRUE  -- unless it will be gone by then
                 UNION ALL
                SELECT c.key COLLATE "C" FROM _etcd_creations(p_prefix) c ORDER BY 1) k);
END
$$;
COMMENT ON FUNCTION etcd_delete_prefix(text, boolean) IS
    'queue a delete of every key under a prefix; how many. Applied together if one etcd transaction takes them';

CREATE OR REPLACE FUNCTION etcd_restore(p_prefix text, p_revision bigint)
RETURNS bigint LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
--   p_prefix    taken literally
--   p_revision  as for etcd_at; of a time: etcd_revision_at
--   result      how many changes were queued: puts of what differs or is missing, deletes of what was not there.
--               Each is made on the version that the mirror has. A lease of then is gone: a key gets none that way,
--               one that still has a lease keeps it, and one that had none then loses it.
--   errors      those of etcd_at; 40001 if a key under the prefix has a pending change
BEGIN
    RETURN (
        SELECT pg_catalog.count(_etcd_change(
                   k.key, k.value, k.value_bytes, k.revision, p_delete => k.deleted,
                   p_ttl => CASE WHEN k.unleased THEN interval '0' END))
          FROM (SELECT key, o.value, o.value_bytes, coalesce(n.revision, 0) AS revision,
                       o.key IS NULL AS deleted, o.lease IS NULL AND n.lease > 0 AND o.key IS NOT NULL AS unleased,
                       (o.value, o.value_bytes) IS NOT DISTINCT FROM (n.value, n.value_bytes) AS same
                  FROM _etcd_at(p_revision, p_prefix, NULL, NULL) o
                  FULL JOIN (SELECT l.key, l.value, l.value_bytes, l.revision, l.lease FROM _etcd_list(p_prefix) l
                              UNION ALL
                             SELECT c.key COLLATE "C", NULL, NULL, 0, NULL FROM _etcd_creations(p_prefix) c) n USING (key)
                 ORDER BY 1) k
         WHERE k.unleased OR k.deleted OR NOT k.same);
END
$$;
COMMENT ON FUNCTION etcd_restore(text, bigint) IS 'queue what brings a prefix back to what it was; how many changes';

CREATE OR REPLACE FUNCTION etcd_expect(p_key text, p_revision bigint)
RETURNS bigint LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
-- A guard: this transaction is applied only if the key is at this revision (0: does not exist) when etcd applies it,
-- else all of it is a conflict, forced changes, too. The key is not changed. Such a transaction is never split:
-- too large, or with keys of two mirrors, it fails.
--   errors  40001 if the key has moved on already or has a pending change, else as etcd_set
BEGIN
    RETURN _etcd_change(p_key, NULL, NULL, p_revision, p_expect => true);
END
$$;
COMMENT ON FUNCTION etcd_expect(text, bigint) IS 'apply this transaction only if a key is at a revision';

CREATE OR REPLACE FUNCTION etcd_keepalive(p_key text)
RETURNS bigint LANGUAGE sql SET search_path FROM CURRENT AS $$
-- The lease that the key has in etcd begins anew: no new revision, no new lease. It fails if there is none.
INSERT INTO etcd_wal (key, action) VALUES (p_key, 'keepalive') RETURNING id
$$;
COMMENT ON FUNCTION etcd_keepalive(text) IS 'renew the ttl of a key, as row id of etcd_wal';

-- == Outcomes ==========================================================================================

CREATE OR REPLACE FUNCTION _etcd_generation_lock(p_prefix text, p_generation bigint)
RETURNS bigint LANGUAGE sql STABLE SET search_path FROM CURRENT AS $$
-- The advisory lock that the active daemon of a prefix holds while etcd_sync_state.generation is this.
SELECT pg_catalog.hashtextextended(
    'etcd_fdw generation ' || current_schema()::text || ' ' || p_prefix COLLATE "C", p_generation)
$$;

CREATE OR REPLACE FUNCTION _etcd_wait(p_prefix text, p_generation bigint, INOUT p_left interval, p_for text)
LANGUAGE plpgsql SET search_path FROM CURRENT SET lock_timeout = 0 AS $$
-- Sleep until the daemon of a prefix has committed something, or until the time is up. The daemon holds the lock of the
-- current generation, and releases it when it has committed the next one: that wakes everybody at once.
--   p_generation  of etcd_sync_state, as last seen
--   p_left        how long at most; returned: what is left of it. A clock that is set back does not prolong it, but for
--                 the last sleep, as it does any lock_timeout and pg_sleep
--   p_for         what is waited for, to say so when time is up
DECLARE
    v_left   float8 := EXTRACT(epoch FROM p_left);
    v_begin  timestamptz := clock_timestamp();
BEGIN
    IF p_left IS NULL THEN
        RAISE EXCEPTION 'timeout must not be null' USING ERRCODE = '22004';
    ELSIF pg_catalog.current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
        RAISE EXCEPTION 'cannot wait for % in a transaction whose snapshot never moves', p_for
            USING ERRCODE = '25000', HINT = 'Wait outside of it, or in one with ISOLATION LEVEL READ COMMITTED.';
    ELSIF v_left <= 0::float8 THEN
        RAISE EXCEPTION 'timeout while waiting for %', p_for
            USING ERRCODE = '57014',
                  HINT = 'Nothing was taken back; wait again. Column last_error of view etcd_status tells what holds it up.';
    END IF;
    PERFORM pg_catalog.set_config(
        'lock_timeout', pg_catalog.ceil(least(v_left, 86400::float8) * 1000::float8)::int::text, true);
    BEGIN
        PERFORM pg_catalog.pg_advisory_xact_lock_shared(_etcd_generation_lock(p_prefix, p_generation));
        RAISE EXCEPTION USING ERRCODE = 'ETCD0';  -- gives the lock back
    EXCEPTION WHEN SQLSTATE 'ETCD0' OR lock_not_available THEN
    END;
    -- The generation is still the same, so nobody held its lock: no daemon is active, or this is a standby.
    IF EXISTS (SELECT FROM etcd_sync_state s WHERE s.prefix = p_prefix AND s.generation = p_generation) THEN
        PERFORM pg_catalog.pg_sleep(least(v_left, 0.05::float8));
    END IF;
    p_left := p_left - greatest(clock_timestamp() - v_begin, interval '0.01 s');
END
$$;

CREATE OR REPLACE FUNCTION etcd_wait(
    p_id bigint DEFAULT NULL, timeout interval DEFAULT '10 s', txid xid8 DEFAULT NULL,
    OUT status text, OUT result_revision bigint, OUT error_message text)
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
--   p_id     of etcd_wal
--   timeout  '0' just looks
--   txid     instead of p_id, by its name: all changes of that transaction; what is told is the worst of their
--            ends: failed, conflict, success; the first message, and of successes the newest revision
--   errors   57014 it is pending still, as when statement_timeout ends a statement (PL/pgSQL: WHEN
--            query_canceled, as OTHERS does not catch it); 25001 it is of this very transaction; 25000 in a
--            REPEATABLE READ or SERIALIZABLE transaction; P0002 no such row; 55000 nobody mirrors its key
-- A session that waits holds no lock and does nothing until the daemon commits.
DECLARE
    v_ids  bigint[] := ARRAY[p_id];
    w      record;
BEGIN
    IF txid IS NOT NULL THEN
        v_ids := ARRAY(SELECT o.id FROM etcd_wal o WHERE o.txid = etcd_wait.txid);
    END IF;
    LOOP
        SELECT o.id, o.status, o.result_revision, o.error_message, o.key, o.txid, s.prefix, s.generation INTO w
          FROM etcd_wal o
          LEFT JOIN etcd_sync_state s ON pg_catalog.starts_with(o.key, s.prefix)
         WHERE o.id = ANY (v_ids)
         ORDER BY CASE o.status WHEN 'pending' THEN 1 WHEN 'failed' THEN 2 WHEN 'conflict' THEN 3 ELSE 4 END,
                  o.error_message IS NULL, CASE o.status WHEN 'success' THEN -o.result_revision END, o.id
         LIMIT 1;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'etcd_wal has no row %', coalesce('of transaction ' || txid::text, p_id::text, 'null')
                USING ERRCODE = 'P0002', HINT = 'Was its transaction rolled back, or did housekeeping delete it?';
        ELSIF w.status <> 'pending' THEN
            SELECT w.status, w.result_revision, w.error_message INTO status, result_revision, error_message;
            RETURN;
        ELSIF w.txid = pg_current_xact_id_if_assigned() THEN
            RAISE EXCEPTION 'change % is not committed', w.id
                USING ERRCODE = '25001', HINT = 'COMMIT first, then wait: etcd_fdw cannot see it before.';
        ELSIF w.prefix IS NULL THEN
            RAISE EXCEPTION 'key "%" of change % is outside every mirrored prefix', w.key, w.id
                USING ERRCODE = '55000',
                      HINT = 'Start an etcd_fdw that mirrors it; table etcd_sync_state lists what is mirrored.';
        END IF;
        timeout := _etcd_wait(w.prefix, w.generation, timeout, pg_catalog.format('change %s', w.id));
    END LOOP;
END
$$;
COMMENT ON FUNCTION etcd_wait(bigint, interval, xid8) IS 'wait until a change, or txid => all of one, is final';

DO $$
BEGIN
    -- A procedure that commits cannot have a SET clause, so its names are qualified.
    EXECUTE pg_catalog.format($b$
        CREATE OR REPLACE PROCEDURE etcd_put(
            p_key text, p_value text, p_revision bigint DEFAULT NULL, ttl interval DEFAULT NULL,
            force boolean DEFAULT false, timeout interval DEFAULT '10 s', INOUT result_revision bigint DEFAULT NULL)
        LANGUAGE plpgsql AS $p$
-- Set, commit, wait: what people expect of a write. Not within a transaction, which it would end: 2D000.
--   result  the revision that the key got, and has in table etcd
--   errors  40001 it became a conflict; 58000 etcd refused it; 57014 as in etcd_wait, it is committed and pending;
--           those of etcd_set
DECLARE
    v_id  bigint := %1$I.etcd_set(p_key, p_value, p_revision, ttl, force);
    w     record;
BEGIN
    COMMIT;
    SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
    SELECT o.status, o.result_revision, o.error_message INTO w FROM %1$I.etcd_wait(v_id, timeout) o;
    IF w.status <> 'success' THEN
        RAISE EXCEPTION 'change %% of key "%%": %%', v_id, p_key, w.error_message
            USING ERRCODE = CASE w.status WHEN 'conflict' THEN '40001' ELSE '58000' END,
                  HINT = 'etcd_retry puts it on the version that etcd has now.';
    END IF;
    result_revision := w.result_revision;
END
$p$;
$b$, current_schema());
END
$$;
COMMENT ON PROCEDURE etcd_put(text, text, bigint, interval, boolean, interval, bigint) IS
    'CALL: set a key, commit, and wait until etcd has it; 40001 if it became a conflict';

CREATE OR REPLACE FUNCTION etcd_wait_revision(
    p_revision bigint, timeout interval DEFAULT '10 s', p_prefix text DEFAULT NULL)
RETURNS bigint LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
--   p_revision  that a write under the prefix got; what is written elsewhere moves the mirror only now and then
--   timeout     '0' just looks
--   p_prefix    which mirror: a prefix or key within it; null: the only one
--   result      the checkpoint: p_revision or newer
--   errors      57014 and 25000 as in etcd_wait; 22023 no such mirror, or several and none named
DECLARE s record;
BEGIN
    IF p_revision IS NULL THEN
        RAISE EXCEPTION 'revision must not be null' USING ERRCODE = '22004';
    END IF;
    LOOP
        s := _etcd_mirror(p_prefix);
        IF s.revision >= p_revision THEN
            RETURN s.revision;
        END IF;
        timeout := _etcd_wait(s.prefix, s.generation, timeout, pg_catalog.format(
            'revision %s of prefix "%s", which is at %s', p_revision, s.prefix, s.revision));
    END LOOP;
END
$$;
COMMENT ON FUNCTION etcd_wait_revision(bigint, interval, text) IS 'wait until the mirror has got to a revision';

CREATE OR REPLACE FUNCTION _etcd_unapplied(p_id bigint)
RETURNS etcd_wal LANGUAGE plpgsql STABLE SET search_path FROM CURRENT AS $$
-- The row of a conflict or failed change; P0002 no such row, 55000 it is pending or succeeded.
DECLARE w etcd_wal;
BEGIN
    SELECT * INTO w FROM etcd_wal o WHERE o.id = p_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'etcd_wal has no row %', p_id
            USING ERRCODE = 'P0002', HINT = 'View etcd_refused lists conflicts and failures.';
    ELSIF w.status NOT IN ('conflict', 'failed') THEN
        RAISE EXCEPTION 'change % is %, not conflict or failed', p_id, w.status
            USING ERRCODE = '55000', HINT = 'etcd_wait tells how a pending change ends; after a success nothing is to do.';
    END IF;
    RETURN w;
END
$$;

CREATE OR REPLACE FUNCTION etcd_retry(p_id bigint)
RETURNS bigint LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
-- It overrides what beat the change. The new row names the old in retry_of.
--   errors   P0002 no such row; 55000 it is pending or succeeded, or was tried again already, or is a guard
DECLARE w etcd_wal := _etcd_unapplied(p_id);
BEGIN
    IF w.action IS NOT NULL THEN
        RAISE EXCEPTION 'change % is no put or delete', p_id
            USING ERRCODE = '55000', HINT = 'Dismiss it, and run the transaction again.';
    END IF;
    RETURN _etcd_change(
        w.key, w.value, w.value_bytes, p_ttl => w.ttl, p_force => w.force,
        p_delete => w.value IS NULL AND w.value_bytes IS NULL, p_retry_of => p_id);
END
$$;
COMMENT ON FUNCTION etcd_retry(bigint) IS 'queue a conflict or failed change again, on the current version';

CREATE OR REPLACE FUNCTION etcd_dismiss(p_id bigint)
RETURNS void LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
-- It is deleted in time, as old successes are. The caller needs UPDATE on column dismissed_at of etcd_wal.
--   errors   P0002 no such row; 55000 it is pending or succeeded; 42501
BEGIN
    PERFORM _etcd_unapplied(p_id);
    IF NOT pg_catalog.has_column_privilege('etcd_wal', 'dismissed_at', 'UPDATE') THEN
        RAISE EXCEPTION '% may not dismiss changes', current_user
            USING ERRCODE = '42501',
                  HINT = pg_catalog.format('GRANT UPDATE (dismissed_at) ON etcd_wal TO %I', current_user);
    END IF;
    UPDATE etcd_wal w SET dismissed_at = now() WHERE w.id = p_id AND w.dismissed_at IS NULL;
END
$$;
COMMENT ON FUNCTION etcd_dismiss(bigint) IS 'acknowledge a conflict or failure, so that it counts no longer';

CREATE OR REPLACE FUNCTION etcd_cancel(p_id bigint)
RETURNS void LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
-- Deletes it. Only what is outside every mirrored prefix was surely not sent to etcd. The caller needs DELETE.
--   errors   P0002 no such row; 55000 it is final, or under a mirrored prefix; 42501
DECLARE v_state text := (
    SELECT CASE WHEN s.prefix IS NOT NULL AND w.status = 'pending' THEN 'on its way to etcd' ELSE w.status END
      FROM etcd_wal w LEFT JOIN etcd_sync_state s ON pg_catalog.starts_with(w.key, s.prefix)
     WHERE w.id = p_id);
BEGIN
    IF v_state IS NULL THEN
        RAISE EXCEPTION 'etcd_wal has no row %', p_id USING ERRCODE = 'P0002';
    ELSIF v_state <> 'pending' THEN
        RAISE EXCEPTION 'change % is %', p_id, v_state
            USING ERRCODE = '55000', HINT = 'Only a pending change outside every mirrored prefix can be taken back.';
    ELSIF NOT pg_catalog.has_table_privilege('etcd_wal', 'DELETE') THEN
        RAISE EXCEPTION '% may not take back changes', current_user
            USING ERRCODE = '42501', HINT = pg_catalog.format('GRANT DELETE ON etcd_wal TO %I', current_user);
    END IF;
    DELETE FROM etcd_wal w WHERE w.id = p_id AND w.status = 'pending';
END
$$;
COMMENT ON FUNCTION etcd_cancel(bigint) IS 'take back a pending change whose key no daemon mirrors';

CREATE OR REPLACE FUNCTION etcd_schema_version()
RETURNS integer LANGUAGE sql IMMUTABLE PARALLEL SAFE SET search_path FROM CURRENT AS $$
-- The daemon applies a newer one and refuses an older one.
SELECT 5
$$;
COMMENT ON FUNCTION etcd_schema_version() IS 'version of schema.sql as installed';

-- == Triggers ==========================================================================================

CREATE OR REPLACE FUNCTION _etcd_kv_write()
RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
-- INSERT, UPDATE and DELETE on etcd_kv: queue the change, made on the version that the statement saw, or on top of
-- what this transaction itself has queued for the key.
--   INSERT   one of value and value_bytes; the key must not exist
--   UPDATE   the value column that was changed counts and clears the other; a changed key is a delete of the
--            old and an insert of the new, applied together; a lease stays with its key. Other columns may be set
--            to what they are, as object-relational mappers do
--   errors   40001, 23505 as the view's comment says; 22004 no value; 428C9 a column that is not the writer's to set
DECLARE
    v_new  boolean := NEW.key IS DISTINCT FROM OLD.key;  -- OLD is all null in an INSERT
    v_id   bigint;
BEGIN
    IF TG_OP = 'DELETE' THEN
        v_id := _etcd_change(OLD.key, NULL, NULL, OLD.revision, p_delete => true, p_own => true);
        RETURN CASE WHEN v_id IS NOT NULL THEN OLD END;
    ELSIF OLD.revision = 0 THEN  -- its creation is pending: what the row was made from may not know the rest
        NEW.value_json := coalesce(NEW.value_json, OLD.value_json);
        NEW.value_raw := coalesce(NEW.value_raw, OLD.value_raw);
    END IF;
    IF TG_OP = 'UPDATE' AND coalesce(NEW.revision, 0) <> OLD.revision THEN
        RAISE EXCEPTION 'key "%" is not at revision %', OLD.key, coalesce(NEW.revision, 0)
            USING ERRCODE = '40001', DETAIL = pg_catalog.format('It is at revision %s.', OLD.revision),
                  HINT = 'Read it again and repeat the change. The revision itself cannot be set.';
    ELSIF coalesce(NEW.revision, 0) <> coalesce(OLD.revision, 0)
       OR (NEW.ts, NEW.lease, NEW.create_revision, NEW.version, NEW.value_json, NEW.value_raw) IS DISTINCT FROM
          (OLD.ts, OLD.lease, OLD.create_revision, OLD.version, OLD.value_json, OLD.value_raw) THEN
        RAISE EXCEPTION 'only columns key, value and value_bytes of etcd_kv can be set'
            USING ERRCODE = 'generated_always',
                  HINT = 'A certain version is changed by UPDATE ... WHERE revision = the one you read, '
                         'a lease by etcd_set with a ttl, value_json by setting value.';
    END IF;

    IF NEW.value IS NOT DISTINCT FROM OLD.value AND NEW.value_bytes IS DISTINCT FROM OLD.value_bytes THEN
        NEW.value := NULL;
    ELSIF NEW.value IS DISTINCT FROM OLD.value AND NEW.value_bytes IS NOT DISTINCT FROM OLD.value_bytes THEN
        NEW.value_bytes := NULL;
    END IF;
    IF v_new AND TG_OP = 'UPDATE' THEN
        PERFORM _etcd_change(OLD.key, NULL, NULL, OLD.revision, p_delete => true, p_own => true);
    END IF;
    v_id := _etcd_change(
        NEW.key, NEW.value, NEW.value_bytes, CASE WHEN NOT v_new THEN OLD.revision END, p_new => v_new, p_own => true);
    NEW.revision := coalesce(OLD.revision, 0);  -- from here on for RETURNING
    NEW.value_json := _etcd_json(NEW.value);
    NEW.value_raw := coalesce(NEW.value_bytes, pg_catalog.convert_to(NEW.value, 'UTF8'));
    RETURN CASE WHEN v_id IS NOT NULL THEN NEW END;
END
$$;

CREATE OR REPLACE FUNCTION _etcd_kv_statement()
RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
-- While UPDATE or DELETE on etcd_kv runs, the view shows keys whose creation is pending, too.
BEGIN
    PERFORM pg_catalog.set_config('etcd_fdw.writing', CASE TG_WHEN WHEN 'BEFORE' THEN 'on' ELSE '' END, true);
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION _etcd_notify()
RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
-- Wake the daemon. A hint without content, one per transaction, at commit: the daemon reads the table, and does
-- so every --poll-interval even if no hint arrives.
BEGIN
    PERFORM pg_catalog.pg_notify('etcd_changes', '');
    RETURN NULL;
END
$$;

-- To do without notifications (they serialise commits of all writers in the database):
--     ALTER TABLE etcd_wal DISABLE TRIGGER etcd_wal_notify;
-- and run the daemon with a short --poll-interval. A later run of this file leaves that as it is.
DO $$
DECLARE
    v_version  int := pg_catalog.current_setting('server_version_num')::int;
    t          record;
BEGIN
    FOR t IN SELECT * FROM (VALUES
        ('etcd_kv_write', 'INSTEAD OF INSERT OR UPDATE OR DELETE ON etcd_kv FOR EACH ROW', '_etcd_kv_write'),
        ('etcd_kv_begin', 'BEFORE UPDATE OR DELETE ON etcd_kv FOR EACH STATEMENT', '_etcd_kv_statement'),
        ('etcd_kv_end', 'AFTER UPDATE OR DELETE ON etcd_kv FOR EACH STATEMENT', '_etcd_kv_statement'),
        ('etcd_wal_notify', 'AFTER INSERT ON etcd_wal FOR EACH STATEMENT', '_etcd_notify')) v (name, event, function)
    LOOP
        IF NOT EXISTS (SELECT FROM pg_trigger g WHERE g.tgname = t.name::name
                          AND g.tgrelid IN ('etcd_kv'::regclass::oid, 'etcd_wal'::regclass::oid)) THEN
            EXECUTE pg_catalog.format('CREATE TRIGGER %I %s EXECUTE FUNCTION %I()', t.name, t.event, t.function);
        END IF;
    END LOOP;

    -- From PostgreSQL 15 on the views check the caller's privileges and row-level security; before, a view reads with
    -- its owner's rights. From 17 on _etcd_json can run in a parallel query; before, that cannot catch an error.
    IF v_version >= 150000 THEN
        GRANT SELECT ON etcd_refused TO PUBLIC;  -- of which each sees what etcd_wal shows: etcd_status needs it
        ALTER VIEW etcd_kv SET (security_invoker = true);
        ALTER VIEW etcd_refused SET (security_invoker = true);
        ALTER VIEW etcd_status SET (security_invoker = true);
    END IF;
    IF v_version >= 170000 THEN
        ALTER FUNCTION _etcd_json(text) PARALLEL SAFE;
    END IF;
    PERFORM pg_catalog.set_config('search_path', pg_catalog.current_setting('etcd_fdw.search_path'), false);
END
$$;

-- == Grants: an example ================================================================================

-- The functions run with the caller's rights, so the tables decide. PostgreSQL 13 and 14 let everybody create objects
-- in schema public, and with them have others run code: REVOKE CREATE ON SCHEMA public FROM PUBLIC;
--
-- The daemon, if a DBA applied this file (else it owns everything and only needs CREATE on the schema):
--     GRANT TEMP ON DATABASE mydb TO etcd_fdw;
--     GRANT USAGE ON SCHEMA public TO etcd_fdw;
--     GRANT SELECT, INSERT, UPDATE, DELETE ON etcd, etcd_wal, etcd_sync_state, etcd_sync_event TO etcd_fdw;
--     GRANT SELECT ON etcd_kv, etcd_status, etcd_refused TO etcd_fdw;
-- An application that reads everything and changes keys, but can neither write the mirror nor claim an outcome:
--     GRANT USAGE ON SCHEMA public TO app;
--     GRANT SELECT ON etcd, etcd_wal, etcd_sync_state, etcd_status TO app;
--     GRANT INSERT (key, value, value_bytes, revision, depends_on, retry_of, ttl, force, action) ON etcd_wal TO app;
--     GRANT SELECT, INSERT, UPDATE, DELETE ON etcd_kv TO app;
-- Leave out ttl, force or action for one that must not use it: 42501 if it does. One that only reads: the first two
-- lines, and SELECT on etcd_kv. etcd_cancel needs GRANT DELETE ON etcd_wal, and etcd_dismiss
-- GRANT UPDATE (dismissed_at) ON etcd_wal, which lets it hide conflicts and failures from everybody.
-- Before PostgreSQL 15, who may write to etcd_kv can LOCK table etcd by it: grant the untrusted only SELECT on it.
-- Only keys under a prefix: row-level security. The functions obey it, the views from PostgreSQL 15 on (before, do not
-- grant them). The daemon needs the first two policies unless it owns the tables or has BYPASSRLS; it is slower then.
--     CREATE POLICY daemon ON etcd TO etcd_fdw USING (true);
--     CREATE POLICY daemon ON etcd_wal TO etcd_fdw USING (true);
--     CREATE POLICY app ON etcd FOR SELECT TO app USING (starts_with(key, '/app/'));
--     CREATE POLICY app ON etcd_wal TO app USING (starts_with(key, '/app/'));
--     ALTER TABLE etcd ENABLE ROW LEVEL SECURITY;
--     ALTER TABLE etcd_wal ENABLE ROW LEVEL SECURITY;
