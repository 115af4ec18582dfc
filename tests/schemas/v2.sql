CREATE TABLE legacy_values (table_name TEXT NOT NULL, row_id INTEGER NOT NULL,
           column_name TEXT NOT NULL, value, PRIMARY KEY (table_name, row_id, column_name)) WITHOUT ROWID;
CREATE TABLE "users" (id INTEGER PRIMARY KEY AUTOINCREMENT, email TEXT, email_key TEXT UNIQUE, name TEXT,
       password TEXT, token_version INTEGER NOT NULL DEFAULT 0, created_at TEXT NOT NULL);
CREATE TABLE "projects" (id INTEGER PRIMARY KEY AUTOINCREMENT,
       user_id INTEGER NOT NULL REFERENCES users(id) ON DELETE CASCADE, name TEXT NOT NULL, description TEXT,
       project_path TEXT NOT NULL, archived INTEGER NOT NULL DEFAULT 0, created_at TEXT NOT NULL,
       updated_at TEXT NOT NULL);
CREATE TABLE "sessions" (id INTEGER PRIMARY KEY AUTOINCREMENT,
       project_id INTEGER NOT NULL REFERENCES projects(id) ON DELETE CASCADE, session_key TEXT NOT NULL UNIQUE,
       label TEXT, archived INTEGER NOT NULL DEFAULT 0 CHECK (archived IN (0, 1)),
       scope TEXT NOT NULL DEFAULT 'private', channel TEXT NOT NULL DEFAULT 'webchat',
       agent_id TEXT NOT NULL DEFAULT 'main', created_at TEXT NOT NULL, last_used_at TEXT);
CREATE TABLE "messages" (id INTEGER PRIMARY KEY AUTOINCREMENT,
       session_id INTEGER NOT NULL REFERENCES sessions(id) ON DELETE CASCADE, role TEXT NOT NULL,
       content TEXT NOT NULL, status TEXT NOT NULL DEFAULT 'complete' CHECK (status IN
       ('queued', 'streaming', 'complete', 'stopped', 'interrupted', 'failed', 'empty')),
       error TEXT, usage TEXT, created_at TEXT NOT NULL, legacy_image TEXT, finish_reason TEXT);
CREATE TABLE message_images (id INTEGER PRIMARY KEY AUTOINCREMENT,
       message_id INTEGER NOT NULL REFERENCES messages(id) ON DELETE CASCADE, file TEXT NOT NULL);
CREATE TABLE orphaned_projects(
  id INT,
  user_id,
  name,
  description,
  project_path,
  archived,
  created_at,
  updated_at
);
CREATE TABLE orphaned_sessions(
  id INT,
  project_id,
  session_key,
  label,
  archived,
  scope,
  channel,
  agent_id,
  created_at,
  last_used_at
);
CREATE TABLE orphaned_messages(
  id INT,
  session_id,
  role,
  content,
  created_at,
  image
);
CREATE INDEX projects_user ON projects(user_id);
CREATE INDEX sessions_project ON sessions(project_id);
CREATE INDEX messages_session ON messages(session_id);
CREATE UNIQUE INDEX messages_streaming ON messages(session_id) WHERE status = 'streaming';
CREATE INDEX messages_queued ON messages(session_id, id) WHERE status = 'queued';
CREATE TRIGGER messages_status BEFORE UPDATE OF status ON messages
       WHEN OLD.status <> NEW.status AND NOT (
         (OLD.status = 'queued' AND NEW.status IN ('streaming', 'stopped')) OR (OLD.status = 'streaming'
           AND NEW.status IN ('complete', 'stopped', 'interrupted', 'failed', 'empty')))
       BEGIN SELECT RAISE(ABORT, 'a turn cannot go from one of these states to the other'); END;
CREATE TRIGGER messages_content BEFORE UPDATE OF content ON messages WHEN OLD.status <> 'streaming'
       BEGIN SELECT RAISE(ABORT, 'only a running reply can change'); END;
CREATE INDEX message_images_message ON message_images(message_id);
CREATE TABLE turns (reply_id INTEGER PRIMARY KEY REFERENCES messages(id) ON DELETE CASCADE,
       message_id INTEGER NOT NULL REFERENCES messages(id) ON DELETE CASCADE,
       session_id INTEGER NOT NULL REFERENCES sessions(id) ON DELETE CASCADE,
       idempotency_key TEXT, digest TEXT NOT NULL, owner TEXT, run_id TEXT,
       stop_requested INTEGER NOT NULL DEFAULT 0, inherited INTEGER NOT NULL DEFAULT 0, asked_at TEXT);
CREATE UNIQUE INDEX turns_key ON turns(session_id, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX turns_session ON turns(session_id);
CREATE INDEX turns_message ON turns(message_id);
CREATE TABLE revoked_tokens (jti TEXT PRIMARY KEY, expires_at INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE outbox (id INTEGER PRIMARY KEY AUTOINCREMENT,
       kind TEXT NOT NULL CHECK (kind IN ('gateway_session', 'images', 'folder')), target TEXT NOT NULL,
       owner TEXT, attempts INTEGER NOT NULL DEFAULT 0, due_at REAL NOT NULL);
CREATE TABLE reply_pieces (
           reply_id INTEGER NOT NULL REFERENCES messages(id) ON DELETE CASCADE,
           until INTEGER NOT NULL, text TEXT NOT NULL, PRIMARY KEY (reply_id, until)) WITHOUT ROWID;
CREATE TRIGGER messages_never_shorter BEFORE UPDATE OF content ON messages
           WHEN length(CAST(NEW.content AS BLOB)) < length(CAST(OLD.content AS BLOB))
           BEGIN SELECT RAISE(ABORT, 'the text of a message never gets shorter'); END;
CREATE INDEX message_images_file ON message_images(file);
CREATE INDEX revoked_tokens_expires ON revoked_tokens(expires_at);
PRAGMA user_version=2;
