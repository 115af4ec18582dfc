"""A state machine of hypothesis that makes faults in random orders while users talk to the service.

It draws from two processes on one database, a scripted gateway, and every fault of `World`. After each step, and again
once the last fault is over, the `Ledger` compares what the users know with what is stored.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.faults.calls import Call, Conversation, Order, Reading, Sending
from tests.faults.ledger import Ledger, Message
from tests.faults.world import SILENCE, Lock, World
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

    def keep(self, story: list[str]) -> None:
        """Appends the story of an example to a file, for whoever looks at what the machine does."""
        with (self._directory / "stories.txt").open("a") as file:
            file.write("\n".join((f"--- example {self.examples}", *story, "")))

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
        self.story: list[str] = []

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Around each check: a failure costs the world, and is told with its story and the logs."""
        try:
            yield
        except BaseException:
            self.world.spoiled = True
            note("\n".join(self.story))
            note(self.world.logs())
            raise

    def tell(self, what: str) -> None:
        """Adds a line to the story of this example."""
        self.story.append(f"{time.monotonic() - self.began:7.3f} {what}")

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
            self.send(0, via % 2, plan, keyed, stream, image=False, patience=0.1)

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
        self.tell(f"session {made['id']} in project {alive[-1]}")

    @rule(
        which=which, via=via, plan=st.sampled_from(PLANS), keyed=st.booleans(), stream=st.booleans(),
        image=st.sampled_from([False, False, False, True]), patience=patience,
    )  # fmt: skip
    def send(self, which: int, via: int, plan: str, keyed: bool, stream: bool, image: bool, patience: float) -> None:
        """Sends a message, with or without an Idempotency-Key."""
        message = self._new_message(which, plan, keyed, stream, image)
        self._send(message, via, patience)

    @rule(which=which, plan=st.sampled_from(PLANS), stream=st.booleans(), patience=patience)
    def send_at_both(self, which: int, plan: str, stream: bool, patience: float) -> None:
        """Sends a message with an Idempotency-Key through both processes at the same moment."""
        message = self._new_message(which, plan, keyed=True, stream=stream, image=False)
        self._send(message, 0, 0)
        self._send(message, 1, patience)

    @precondition(_talked)
    @rule(which=which, via=via, patience=patience)
    def send_again(self, which: int, via: int, patience: float) -> None:
        """Sends a message with the same Idempotency-Key once more. Does nothing if it had none."""
        message = self.message(which)
        if message.key is not None:
            self._send(message, via, patience)

    def _new_message(self, which: int, plan: str, keyed: bool, stream: bool, image: bool) -> Message:
        self.number += 1
        conversation = self.conversation(which)
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
        self.tell(f"{what}: {call.outcome} {call.status or ''} {call.code or ''}")

    @precondition(_talked)
    @rule(which=which, via=via, after=st.integers(0, 60), patience=patience)
    def resume(self, which: int, via: int, after: int, patience: float) -> None:
        """Reads a reply from an offset on, if its id is known."""
        message = self.message(which)
        if message.reply_id is not None:
            client, reply_id = self.world.client(via), message.reply_id
            reading = Reading(client, message.conversation, reply_id=reply_id, after=after)
            self.ledger.readings.append(reading)
            self._start(reading, patience, f"resume reply {reply_id} from {after} via {via}")

    @rule(which=which, via=via, patience=patience)
    def stop(self, which: int, via: int, patience: float) -> None:
        """Stops a session. The replies whose ids are known had begun before."""
        conversation = self.conversation(which)
        ends = [m.reply_id for m in self.ledger.messages if m.conversation is conversation and m.reply_id]
        order = Order(self.world.client(via), conversation, path=f"/sessions/{conversation.id}/stop", ends=ends)
        self._order(order, patience, via)

    @rule(which=which, via=via, project=st.sampled_from([False, False, True]), patience=patience)
    def delete(self, which: int, via: int, project: bool, patience: float) -> None:
        """Deletes a session or its project. The next message goes to another session."""
        conversation = self.conversation(which)
        gone = [c for c in self.ledger.conversations if project and c.project == conversation.project]
        path = f"/projects/{conversation.project}" if project else f"/sessions/{conversation.id}"
        client, gone = self.world.client(via), gone or [conversation]
        self._order(Order(client, conversation, method="DELETE", path=path, deletes=gone), patience, via)

    def _order(self, order: Order, patience: float, via: int) -> None:
        self.ledger.orders.append(order)
        self._start(order, patience, f"{order.method} {order.path} via {via}")

    @rule(seconds=st.sampled_from([0.05, 0.3, 1.0]))
    def wait(self, seconds: float) -> None:
        """Lets time pass."""
        time.sleep(seconds)

    # --- faults ---

    @rule(via=via, again=st.booleans())
    def kill(self, via: int, again: bool) -> None:
        """Kills a process with SIGKILL, and starts another one in its place at once or later."""
        process = self.world.processes[via]
        if process.running:
            self.tell(f"kill {via}")
            process.kill()
        if again:
            self.restart(via)

    @rule(via=via)
    def restart(self, via: int) -> None:
        """Starts a process that was killed. Whether it serves depends on the other faults."""
        process = self.world.processes[via]
        if not process.running:
            process.kill()
            process.spawn()
            deadline = time.monotonic() + 3
            while process.running and not process.serves() and time.monotonic() < deadline:
                time.sleep(0.05)
            self.tell(f"start {via}: {'serves' if process.serves() else 'does not serve yet'}")

    @rule(via=via)
    def freeze(self, via: int) -> None:
        """Suspends a process, or continues it if it is suspended."""
        process = self.world.processes[via]
        if process.running:
            self.tell(f"{'SIGCONT' if process.frozen else 'SIGSTOP'} {via}")
            (process.thaw if process.frozen else process.freeze)()

    @rule(seconds=st.sampled_from([3600, -3600, 30, -30, 86_400, 0]))
    def step_clock(self, seconds: int) -> None:
        """Sets the wall clock of both processes."""
        self.tell(f"clock {seconds:+}")
        self.world.set_clock(seconds)

    @rule()
    def fill_disk(self) -> None:
        """Fills the disk, or makes room again."""
        disk = self.world.disk
        self.tell("disk has room" if disk.full else "disk full")
        (disk.free if disk.full else disk.fill)(self.world.processes)

    @rule(kind=st.sampled_from(["file", "transaction"]), seconds=st.sampled_from([0.1, 0.5, 0.0, 7.0]))
    def lock(self, kind: Lock, seconds: float) -> None:
        """Another program takes a lock of the database and holds it for some seconds, or from here on. The longest
        time is longer than any deadline of the service."""
        self.tell(f"{kind} lock {seconds}")
        self.world.unlock()
        self.world.lock(kind)
        time.sleep(seconds)
        if seconds:
            self.world.unlock()

    @rule()
    def end_gateway(self) -> None:
        """Ends the gateway, or starts it again."""
        self.tell("gateway ends" if self.world.gateway_up else "gateway starts")
        self.world.set_gateway(not self.world.gateway_up)

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
            self.worlds.keep(self.story)

    def _settle(self) -> None:
        self.world.heal()
        self.tell("healed")
        healed = time.monotonic()
        plans = [Plan.of(message.text) for message in self.ledger.messages]
        lasts = sum(plan.first + plan.delay * plan.chunks + SILENCE * (plan.end == "hang") for plan in plans)
        until(self.ledger.all_final, SLACK * (SETTLES + lasts), "every turn to be final")
        self.worlds.slowest = max(self.worlds.slowest, time.monotonic() - healed)
        self.tell("final")
        self.ledger.check_ends(SLACK * 10)
        self.ledger.check()
        for via, conversation in enumerate(self.ledger.conversations[-4:]):
            if self.ledger.deleted(conversation) == "no":
                until(self._answers(conversation, via % 2), SLACK * 10, f"an answer in session {conversation.id}")
        self.ledger.check()

    def _answers(self, conversation: Conversation, via: int) -> Callable[[], bool]:
        """A function that sends a message and returns True if it is answered: nothing is stuck in the session."""

        def answers() -> bool:
            message = self._new_message(0, "chunks=2", keyed=False, stream=False, image=False)
            message.conversation = conversation
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
