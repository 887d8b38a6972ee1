-- The change log of an embedded store. What is ours has the prefix rolecache_; users and mailboxes are the bot's, and stay
-- as they are where they exist. Only functions that every SQLite since 3.38 has built in: any program may write to users,
-- and fires the triggers, which are made when the store is opened, because they follow the shape of the table.

create table if not exists users (
  user_id integer primary key,
  role text,
  username text
);

create table if not exists mailboxes (
  id integer primary key,
  creator_id integer not null
);

-- A row per transaction that changed roles; per changed row, where another program changed it. The id is the revision:
-- SQLite has one writer at a time, so the order of ids is the order of commits, and autoincrement gives none twice.
create table rolecache_commits (
  id integer primary key autoincrement,
  -- 16 random bytes: by them a restored backup is told from the history that it replaced.
  tag blob not null,
  -- Milliseconds since 1970.
  committed_at integer not null,
  -- How many changes it has.
  size integer not null
);

-- A row per change. Written under one lock, seq grows along with commit_id.
create table rolecache_changes (
  seq integer primary key,
  commit_id integer not null,
  user_id integer not null,
  -- Null where the user did not exist before, or does not after.
  old_role text,
  new_role text,
  username text,
  -- 1 our own call, 2 anybody's SQL, which has no name to give: SQLite knows no users.
  origin integer not null default 2,
  actor text not null default 'sqlite',
  reason text,
  transfer_from integer,
  transfer_to integer,
  mailbox_id integer
);
create index rolecache_changes_commit on rolecache_changes (commit_id, seq);
create index rolecache_changes_user on rolecache_changes (user_id, seq);

-- One row, about the whole log.
create table rolecache_feed (
  one integer primary key check (one = 1),
  store_id blob not null,
  default_role text not null,
  admin_role text not null,
  trimmed_revision integer not null default 0,
  trimmed_tag blob not null,
  -- The commit of the running batch of our own calls. Set and cleared in one transaction, so nobody else ever sees it set.
  open_commit integer
);

-- Where the log ends; where it is empty, the point up to which it was trimmed.
create view rolecache_head (revision, tag) as
select id, tag from (
  select id, tag from (select id, tag from rolecache_commits order by id desc limit 1)
  union all
  select trimmed_revision, trimmed_tag from rolecache_feed
)
order by id desc
limit 1;

-- Calls that came with a request id, and what they were answered.
create table rolecache_requests (
  actor text not null,
  request_id text not null,
  hash blob not null,
  revision integer not null,
  answered_at integer not null,
  -- Its changes in the log: the first row, its index, and how many.
  first_seq integer not null,
  first_index integer not null,
  size integer not null,
  primary key (actor, request_id)
) without rowid;
create index rolecache_requests_age on rolecache_requests (answered_at);

-- Who an INSERT OR REPLACE or UPDATE OR REPLACE may remove: SQLite fires no DELETE trigger for them, unless told to by
-- recursive_triggers. Triggers note the candidates before the statement (for_user is the row it is about) and log those
-- who are gone after it. No key and no constraint: OR IGNORE or OR REPLACE of the statement would rule in here too.
create table rolecache_replaced (
  for_user,
  user_id integer,
  role,
  username
);
create index rolecache_replaced_for on rolecache_replaced (for_user);
create index rolecache_replaced_user on rolecache_replaced (user_id);
