"""What a user of the service knows, compared with what its database, its disk and the gateway hold."""

import sqlite3
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from tests.faults.calls import Conversation, Order, Reading, Sending
from tests.faults.world import World
from tests.stand_in import Plan, reply_text

FINISH = {"empty": "stop", "stopped": "stopped", "interrupted": "interrupted", "failed": "error"}
UNSETTLED = ("queued", "streaming")


@dataclass(eq=False)
class Message:
    """A message, however often it was sent. Its text is unlike that of any other message."""

    conversation: Conversation
    text: str
    key: str | None
    stream: bool
    image: bool
    sendings: list[Sending] = field(default_factory=list)

    @property
    def reply_id(self) -> int | None:
        """The id of its reply, once an answer has named it."""
        return next((sending.reply_id for sending in self.sendings if sending.reply_id), None)


class Row(NamedTuple):
    """A message as it is stored. A user's message has the id of its reply."""

    id: int
    session_id: int
    role: str
    text: str
    status: str
    reply_id: int | None


class Ledger:
    """The conversations, messages, readers and orders of one example, and the checks of them.

    Each check raises AssertionError.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.projects: list[int] = []
        self.conversations: list[Conversation] = []
        self.messages: list[Message] = []
        self.readings: list[Reading] = []
        self.orders: list[Order] = []
        self._seen: dict[int, str] = {}  # the text of each reply when it was last read
        self._conn = sqlite3.connect(f"{world.database.as_uri()}?mode=ro", uri=True, timeout=30)

    def close(self) -> None:
        """Closes the connection to the database."""
        self._conn.close()

    def rows(self) -> list[Row]:
        """The messages of this example's conversations, with the text that is stored at this moment."""
        marks = ", ".join("?" * len(self.conversations))
        found = self._conn.execute(
            "SELECT m.id, m.session_id, m.role, m.content || coalesce((SELECT group_concat(text, '') FROM (SELECT text "
            "FROM reply_pieces WHERE reply_id = m.id ORDER BY until)), ''), m.status, t.reply_id FROM messages m "
            f"LEFT JOIN turns t ON t.message_id = m.id WHERE m.session_id IN ({marks}) ORDER BY m.id",
            [conversation.id for conversation in self.conversations],
        )
        return [Row(*row) for row in found]

    def deleted(self, conversation: Conversation) -> Literal["no", "maybe", "yes"]:
        """Whether a session is deleted, as far as its user knows from the answers so far."""
        outcomes = {order.outcome for order in self.orders if conversation in order.deletes}
        if "acknowledged" in outcomes:
            return "yes"
        return "maybe" if outcomes & {"pending", "unknown"} else "no"

    # --- after each step ---

    def check(self) -> None:
        """Nothing is lost, doubled, shortened or changed; nothing of what was deleted or stopped is left."""
        # What is known is read before the rows. The other way round, an answer could come between the two.
        states = {c.id: self.deleted(c) for c in self.conversations}
        known = [(message, {str(sending.outcome) for sending in message.sendings}) for message in self.messages]
        stopped = {i for order in self.orders if order.outcome == "acknowledged" for i in order.ends}
        rows = self.rows()
        for message, outcomes in known:
            self._check_message(message, outcomes, states[message.conversation.id], rows)
        asked = {row.reply_id: row.text for row in rows if row.role == "user"}
        for row in rows:
            assert states[row.session_id] != "yes", f"its session was deleted: {row}"
            assert row.id not in stopped or row.status not in UNSETTLED, f"its session was stopped: {row}"
            if row.role == "assistant":
                self._check_text(row, asked[row.id])
        for reading in self.readings:
            self._check_reading(reading, states[reading.conversation.id])
        for call in (*self.readings, *self.orders):
            assert call.code != "internal_error", f"a fault that nobody has thought of: {call}"

    def _check_message(self, message: Message, outcomes: set[str], deleted: str, rows: list[Row]) -> None:
        found = [row for row in rows if row.role == "user" and row.text == message.text]
        assert len(found) <= 1, f"stored {len(found)} times: {found}"
        runs = sum(run.text == message.text for run in list(self.world.gateway.runs))
        assert runs <= 1, f"the agent received {message.text!r} {runs} times"
        answers = [(sending.outcome, sending.status, sending.code) for sending in message.sendings]
        if outcomes == {"refused"}:
            assert not found, f"every request was refused, {answers}, but it is stored: {found}"
        ids = {sending.reply_id for sending in message.sendings if sending.reply_id}
        assert len(ids) <= 1, f"one message has several replies: {ids}"
        if "acknowledged" in outcomes and deleted == "no":
            assert found, f"{message.text!r} was acknowledged, {answers}, but is not stored"
            assert ids == {found[0].reply_id}, f"{answers} named the reply {ids}, stored is {found}"

    def _check_text(self, row: Row, asked: str) -> None:
        before, whole = self._seen.get(row.id, ""), reply_text(asked)
        assert row.text.startswith(before), f"the text was {before!r} before: {row}"
        assert whole.startswith(row.text), f"the gateway sent {whole!r}: {row}"
        assert row.status != "complete" or row.text == whole, f"complete, but the gateway sent {whole!r}: {row}"
        self._seen[row.id] = row.text

    def _check_reading(self, reading: Reading, deleted: str) -> None:
        assert reading.status != 404 or deleted != "no", f"nobody deleted the session: {reading}"
        asked = next((m.text for m in self.messages if m.reply_id == reading.reply_id), None)
        if asked is not None and reading.reply_id is not None:
            sent, text = reply_text(asked)[reading.after :], reading.text
            assert sent.startswith(text), f"a reader at {reading.after} got {text!r}, the gateway sent {sent!r}"

    # --- after the last fault ---

    def all_final(self) -> bool:
        """True if no turn is queued or running."""
        return all(row.status not in UNSETTLED for row in self.rows())

    def check_ends(self, seconds: float) -> None:
        """Every request gets an answer within `seconds`, and every reader who got the end has what is stored."""
        rows = {row.id: row for row in self.rows()}
        asked = {row.reply_id: row.text for row in rows.values()}
        for call in (*self.readings, *self.orders):
            assert call.over.wait(seconds), f"no end of the answer within {seconds} s: {call}"
        for reading in self.readings:
            row = rows.get(reading.reply_id or 0)
            deleted = reading.finish == "stopped" and self.deleted(reading.conversation) != "no"
            if row is not None and reading.finish is not None and not deleted:
                stored = row.text[reading.after :]
                assert reading.text == stored, f"a reader at {reading.after} got {reading.text!r}: {row}"
                finish = Plan.of(asked[row.id]).finish if row.status == "complete" else FINISH[row.status]
                assert reading.finish == finish, f"a reader got {reading.finish!r}: {row}"

    def leftovers(self) -> list[str]:
        """What is left of the deleted conversations, in any table, on disk or in the gateway."""
        found = [f"foreign key: {row}" for row in self._conn.execute("PRAGMA foreign_key_check")]
        for conversation in self.conversations:
            rows = self._left("sessions", "id = ?", conversation.id)
            if rows and self.deleted(conversation) == "maybe":
                continue  # no answer came, and it was not deleted
            if self.deleted(conversation) != "no":
                found += rows + self._left("messages", "session_id = ?", conversation.id)
                found += self._left("outbox", "instr(target, ?)", conversation.key)
                images = self.world.disk.folder / "images" / conversation.key
                found += [str(images)] * images.exists()
                found += [key for key in list(self.world.gateway.sessions) if conversation.key in key]
        return found

    def _left(self, table: str, condition: str, value: object) -> list[str]:
        rows = self._conn.execute(f"SELECT * FROM {table} WHERE {condition}", (value,)).fetchall()
        return [f"{table}: {row}" for row in rows]
