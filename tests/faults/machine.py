"""A state machine of hypothesis that makes faults in random orders while users talk to the service.

It draws from two processes on one database, a scripted gateway, and every fault of `World`. After each step, and again
once the last fault is over, the `Ledger` compares what the users know with what is stored.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.faults.calls import Call, Conversation, Order, Reading, Sending
from tests.faults.ledger import Ledger, Message
from tests.faults.world import SILENCE, World
from tests.service import until
from tests.stand_in import Plan, reply_text

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
SETTLES = 15  # seconds after the last fault within which every turn is final, as docs/reliability.md promises
SLACK = 3  # on a busy machine, everything takes up to this many times as long

# What the gateway does with a message. A hung run ends by CLAWDBOT_TIMEOUT.
PLANS = (
    "chunks=3",
    "chunks=20 size=4 delay=0.03",
    "chunks=8 delay=0.1",
    "first=0.7",
    "end=drop chunks=4 delay=0.05",
    "end=hang chunks=3 delay=0.1",
    "end=eof",
    "end=error chunks=2",
    "end=badjson",
    "end=empty",
    "odd=1 split=3",
    "finish=length",
    "status=500",
    "status=503",
    "big=200000",
)

which = st.integers(0, 7)  # the newest conversation or message, the one before it, and so on
via = st.integers(0, 1)  # one of the two processes
patience = st.sampled_from([0.15, 0.6, 0.0])  # seconds that a step waits for its request to be answered


class Worlds:
    """Makes a world for the first example, and another one for the example after one that failed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._made = 0
        self._world: World | None = None
        self.examples = 0
        self.slowest = 0.0  # seconds in which the turns of an example became final
        self.wiped = 0.0  # seconds until nothing was left of the deleted sessions of an example

    def get(self) -> World:
        """Returns a world without faults."""
        self.examples += 1
        if self._world is None or self._world.spoiled:
            self.close()
            self._made += 1
            self._world = World(self._directory / f"world-{self._made}")
        return self._world

    def keep(self, steps: list[str]) -> None:
        """Appends the steps of an example to a file, to show what the test does."""
        with (self._directory / "stories.txt").open("a") as file:
            slowest = f"so far: settled in {self.slowest:.1f} s, wiped in {self.wiped:.1f} s"
            file.write("\n".join((f"--- example {self.examples}, {slowest}", *steps, "")))

    def close(self) -> None:
        """Ends the processes."""
        if self._world is not None:
            self._world.close()
            self._world = None


def _serving(machine: "FaultMachine") -> bool:
    return machine.world.calm


def _talked(machine: "FaultMachine") -> bool:
    return bool(machine.ledger.messages)


class FaultMachine(RuleBasedStateMachine):
    """Users and faults. Each example has its own projects, in processes that it shares with other examples."""

    def __init__(self, worlds: Worlds) -> None:
        super().__init__()
        self.worlds = worlds
        self.world = worlds.get()
        self.ledger = Ledger(self.world)
        self.number = 0
        self.began = time.monotonic()
        self.steps: list[str] = []

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Runs a check. If it fails, the message of the failure gets the steps and the logs, and the next
        example gets another world."""
        try:
            yield
        except BaseException:
            self.world.spoiled = True
            note("\n".join(self.steps))
            note(self.world.logs())
            raise

    def record(self, what: str) -> None:
        """Adds a line to the steps of this example."""
        self.steps.append(f"{time.monotonic() - self.began:7.3f} {what}")

    def conversation(self, number: int) -> Conversation:
        """The newest conversation for 0, the one before it for 1, and so on, round and round."""
        return self.ledger.conversations[-1 - number % len(self.ledger.conversations)]

    def message(self, number: int) -> Message:
        """The newest message for 0, and so on."""
        return self.ledger.messages[-1 - number % len(self.ledger.messages)]

    # --- users ---

    @initialize(
        plans=st.lists(st.sampled_from(PLANS), min_size=1, max_size=3), keyed=st.booleans(), stream=st.booleans()
    )
    def begin(self, plans: list[str], keyed: bool, stream: bool) -> None:
        """A project with one session, and messages in it, so that there is something that the faults can hit."""
        with self.checking():
            self.create(0, new_project=True)
        for via, plan in enumerate(plans):
            self.send(0, via % 2, "with a key" if keyed else "once", plan, stream, image=False, patience=0.1)

    @precondition(_serving)
    @rule(via=via, new_project=st.booleans())
    def create(self, via: int, new_project: bool) -> None:
        """Creates a session, in the newest project or in a new one."""
        ledger = self.ledger
        alive = [p for p in ledger.projects if not any(f"/projects/{p}" == order.path for order in ledger.orders)]
        if new_project or not alive:
            alive = [self.world.create(via, "/projects", name="A project")["id"]]
            ledger.projects += alive
        made = self.world.create(via, f"/projects/{alive[-1]}/sessions")
        ledger.conversations.append(Conversation(made["id"], made["session_key"], alive[-1]))
        self.record(f"session {made['id']} in project {alive[-1]}")

    @rule(
        which=which, via=via, how=st.sampled_from(["once", "with a key", "at both"]), plan=st.sampled_from(PLANS),
        stream=st.booleans(), image=st.sampled_from([False, False, False, True]), patience=patience,
    )  # fmt: skip
    def send(self, which: int, via: int, how: str, plan: str, stream: bool, image: bool, patience: float) -> None:
        """Sends a message: without an Idempotency-Key, with one, or with one through both processes at once."""
        message = self._new_message(self.conversation(which), plan, how != "once", stream, image)
        if how == "at both":
            self._send(message, 1 - via, 0)
        self._send(message, via, patience)

    @precondition(_talked)
    @rule(which=which, via=via, after=st.none() | st.integers(0, 60), patience=patience)
    def again(self, which: int, via: int, after: int | None, patience: float) -> None:
        """Reads a reply from an offset on, if its id is known; or sends its message once more, if it had a key."""
        message = self.message(which)
        if after is None and message.key is not None:
            self._send(message, via, patience)
        elif after is not None and message.reply_id is not None:
            client, reply_id = self.world.client(via), message.reply_id
            reading = Reading(client, message.conversation, reply_id=reply_id, after=after)
            self.ledger.readings.append(reading)
            self._start(reading, patience, f"resume reply {reply_id} from {after} via {via}")

    @rule(which=which, via=via, what=st.sampled_from(["stop", "session", "stop", "project"]), patience=patience)
    def end(self, which: int, via: int, what: str, patience: float) -> None:
        """Stops a session, or deletes it or its project. A stop ends the replies that had begun before it."""
        conversation, ledger = self.conversation(which), self.ledger
        order = Order(self.world.client(via), conversation)
        if what == "stop":
            order.path = f"/sessions/{conversation.id}/stop"
            order.ends = [m.reply_id for m in ledger.messages if m.conversation is conversation and m.reply_id]
        elif what == "session":
            order.method, order.path, order.deletes = "DELETE", f"/sessions/{conversation.id}", [conversation]
        else:
            order.method, order.path = "DELETE", f"/projects/{conversation.project}"
            order.deletes = [c for c in ledger.conversations if c.project == conversation.project]
        self._order(order, patience, via)

    def _new_message(
        self, conversation: Conversation, plan: str, keyed: bool, stream: bool, image: bool = False
    ) -> Message:
        self.number += 1
        text = f"{conversation.key[:8]} {self.number} [[{plan} seed={conversation.id * 1000 + self.number}]]"
        message = Message(conversation, text, text if keyed else None, stream, image)
        self.ledger.messages.append(message)
        return message

    def _send(self, message: Message, via: int, patience: float) -> None:
        body: dict[str, Any] = {
            "session_key": message.conversation.key,
            "messages": [{"role": "user", "content": message.text}],
            "stream": message.stream,
        }
        body |= {"image": PNG} if message.image else {}
        headers = {"Idempotency-Key": message.key} if message.key else {}
        sending = Sending(self.world.client(via), message.conversation, body=body, headers=headers)
        message.sendings.append(sending)
        self.ledger.readings.append(sending)
        self._start(sending, patience, f"send {message.text} in session {message.conversation.id} via {via}")

    def _start(self, call: Call, patience: float, what: str) -> None:
        call.start(patience)
        self.record(f"{what}: {call.outcome} {call.status or ''} {call.code or ''}")

    def _order(self, order: Order, patience: float, via: int) -> None:
        self.ledger.orders.append(order)
        self._start(order, patience, f"{order.method} {order.path} via {via}")

    # --- faults ---

    @rule(via=via, what=st.sampled_from(["kill", "crash", "freeze", "start"]))
    def process(self, via: int, what: str) -> None:
        """Kills a process, with another one started in its place at once or later; or suspends it, or continues it."""
        process = self.world.processes[via]
        if what == "freeze" and process.running:
            self.record(f"{'SIGCONT' if process.frozen else 'SIGSTOP'} {via}")
            (process.thaw if process.frozen else process.freeze)()
        elif what in ("kill", "crash"):
            self.record(f"kill {via}")
            process.kill()
        if what in ("crash", "start") and not process.running:
            self._restart(via)

    def _restart(self, via: int) -> None:
        """Starts a process. Whether it serves depends on the other faults."""
        process = self.world.processes[via]
        process.kill()
        process.spawn()
        deadline = time.monotonic() + 3
        while process.running and not process.serves() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.record(f"start {via}: {'serves' if process.ready else 'does not serve yet'}")

    @rule(
        what=st.sampled_from(["disk", "file", "transaction"]), seconds=st.sampled_from([0.1, 0.5, None, 1.0, 7.0])
    )  # fmt: skip
    def storage(self, what: Literal["disk", "file", "transaction"], seconds: float | None) -> None:
        """Fills the disk, or has another program hold a lock of the database, for some seconds or until the end.

        The longest time is longer than the deadlines of the service.
        """
        world = self.world
        self.record(f"{what} {'until the end' if seconds is None else seconds}")
        if what == "disk":
            world.disk.fill(world.processes)
        else:
            world.unlock()
            world.lock(what)
        if seconds is not None:
            time.sleep(seconds)
            world.unlock()
            world.disk.free(world.processes)
            self.record("over")

    @rule(what=st.sampled_from(["end", "archive", "drain", "mute"]), which=which)
    def gateway(self, what: str, which: int) -> None:
        """Ends the gateway, archives a conversation, has it refuse all work, or never answer a WebSocket; or takes
        that back. What its chats do wrong, `PLANS` says."""
        gateway = self.world.gateway
        if what == "end":
            self.world.set_gateway(not self.world.gateway_up)
        elif what == "drain":
            gateway.draining = not gateway.draining
        elif what == "mute":
            gateway.websocket_status = 0 if gateway.websocket_status is None else None
        else:
            key = self.conversation(which).key
            gateway.archived |= {known for known in list(gateway.sessions) if key in known}
        self.record(f"gateway: {what}; up {self.world.gateway_up}, draining {gateway.draining}")

    @rule(seconds=st.sampled_from([0.1, 1.0]), step=st.sampled_from([None, 3600, -3600, 30, -30, 86_400]))
    def wait(self, seconds: float, step: int | None) -> None:
        """Lets time pass. The wall clock of both processes may step in addition."""
        if step is not None:
            self.record(f"clock {step:+}")
            self.world.set_clock(step)
        time.sleep(seconds)

    # --- what must hold ---

    @invariant()
    def holds(self) -> None:
        """Nothing is lost, doubled, shortened or left, whatever fails at the moment."""
        if self.ledger.conversations:
            with self.checking():
                self.ledger.check()

    def teardown(self) -> None:
        """Ends every fault. From then on everything settles, and what is deleted leaves nothing behind."""
        try:
            if self.ledger.conversations and not self.world.spoiled:
                with self.checking():
                    self._settle()
                    self._clean_up()
        finally:
            self.ledger.close()
            self.worlds.keep(self.steps)

    def _settle(self) -> None:
        self.world.heal()
        self.record("healed")
        healed = time.monotonic()
        plans = [Plan.of(message.text) for message in self.ledger.messages]
        lasts = sum(plan.first + plan.delay * plan.chunks + SILENCE * (plan.end == "hang") for plan in plans)
        until(self.ledger.all_final, SLACK * (SETTLES + lasts), "every turn to be final")
        self.worlds.slowest = max(self.worlds.slowest, time.monotonic() - healed)
        self.record("final")
        for reading in self.ledger.readings:
            self.record(f"reply {reading.reply_id}: {reading.outcome} {reading.status} {reading.code or ''}")
        for order in self.ledger.orders:
            self.record(f"{order.path}: {order.outcome} {order.status}")
        self.ledger.check_ends(SLACK * 10)
        self.ledger.check()
        for via, conversation in enumerate(self.ledger.conversations[-4:]):
            if self.ledger.deleted(conversation) == "no":
                until(self._answers(conversation, via % 2), SLACK * 10, f"an answer in session {conversation.id}")
        self.ledger.check()

    def _answers(self, conversation: Conversation, via: int) -> Callable[[], bool]:
        """A function that sends a message and returns True if it is answered: nothing is stuck in the session."""

        def answers() -> bool:
            message = self._new_message(conversation, "chunks=2", keyed=False, stream=False)
            self._send(message, via, 60)
            sending = message.sendings[0]
            sending.over.wait(60)
            return sending.status == 200 and sending.text == reply_text(message.text)

        return answers

    def _clean_up(self) -> None:
        deleting = time.monotonic()
        for project in self.ledger.projects:
            gone = [c for c in self.ledger.conversations if c.project == project]
            order = Order(self.world.client(0), gone[0], method="DELETE", path=f"/projects/{project}", deletes=gone)
            self._order(order, 60, 0)
            existed = all(self.ledger.deleted(c) == "no" for c in gone)
            assert order.status == 200 or (order.status == 404 and not existed), f"{order} was not done"
        left = self.ledger.leftovers()
        while left and time.monotonic() < deleting + SLACK * 30:
            time.sleep(0.05)
            left = self.ledger.leftovers()
        assert not left, f"left of deleted sessions: {left}"
        self.worlds.wiped = max(self.worlds.wiped, time.monotonic() - deleting)
        self.ledger.check()
