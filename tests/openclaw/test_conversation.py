"""Conversations: the agent knows all messages of its own conversation and of no other, however they are sent."""

import base64
import io

import pillow_heif
import pytest
from PIL import Image

from tests.service import Person, Service

from .gateway import Gateway, session_of
from .model_provider import ModelProvider

SIZE = (64, 48)
RED = (200, 30, 60)


def picture(kind: str) -> bytes:
    """Returns a small red image in this format."""
    pillow_heif.register_heif_opener()
    file = io.BytesIO()
    Image.new("RGB", SIZE, RED).save(file, kind)
    return file.getvalue()


def encoded(data: bytes) -> str:
    """Returns an image in base64, as a client sends it."""
    return base64.b64encode(data).decode()


def test_four_ways_are_four_turns_of_one_conversation(
    service: Service, gateway: Gateway, provider: ModelProvider, person: Person
) -> None:
    """Messages with and without image, streamed and not, go to one agent session; each reply knows all before it."""
    session = person.session()
    png, jpeg = picture("PNG"), picture("JPEG")
    ways = [
        ("text", None, False),
        ("streamedtext", None, True),
        ("image", png, False),
        ("streamedimage", jpeg, True),
        ("again", None, False),
    ]
    marks: list[str] = []
    for mark, data, stream in ways:
        marks.append(mark)
        image = encoded(data) if data else None
        answer = person.say(session, f"Hello MARK-{mark}", image=image, stream=stream)
        assert (answer.status_code, answer.text) == (200, f"seen: {','.join(marks)}")
        # The gateway passes small images on unchanged.
        assert provider.run(mark).pictures == ([data] if data else [])
    key = session["session_key"]
    assert [name for name in gateway.sessions() if key in name] == [session_of(key)]
    line = f"[CHAT] Sending to OpenClaw with 'user' field: adapter-session-{key}"
    assert service.output().count(line) == len(ways)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "HEIF"])
def test_every_type_of_image_reaches_the_model(provider: ModelProvider, person: Person, kind: str) -> None:
    """An image of each accepted type reaches the model with the same size and color."""
    mark = f"kind{kind}"
    answer = person.say(person.session(), f"Look MARK-{mark}", image=encoded(picture(kind)))
    assert answer.status_code == 200, answer.body
    [arrived] = provider.run(mark).pictures
    image = Image.open(io.BytesIO(arrived)).convert("RGB")
    assert image.size == SIZE
    pixel = image.getpixel((SIZE[0] // 2, SIZE[1] // 2))
    assert isinstance(pixel, tuple)
    assert all(abs(got - sent) < 16 for got, sent in zip(pixel, RED, strict=True)), pixel


def test_sessions_never_mix(service: Service, provider: ModelProvider, person: Person) -> None:
    """Sessions of one project, of another project and of another user know only their own messages."""
    project = person.project()
    with service.person() as stranger:
        owners = [(person, project), (person, project), (person, None), (stranger, None)]
        talks = [(who, who.session(where)) for who, where in owners]
        for turn in "ab":
            for number, (who, session) in enumerate(talks):
                answer = who.say(session, f"MARK-mix{number}{turn}", stream=number % 2 == 0)
                seen = [f"mix{number}{earlier}" for earlier in "ab" if earlier <= turn]
                assert answer.text == f"seen: {','.join(seen)}"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("image", [None, encoded(picture("PNG"))], ids=["text", "image"])
def test_the_system_prompt_describes_the_project(
    provider: ModelProvider, person: Person, stream: bool, image: str | None
) -> None:
    """The model's system prompt contains name, description and folder of the project, however a message is sent."""
    project = person.project("Lighthouse ledger", "Keeps the tides of Cape Wrath.")
    mark = f"told{'image' if image else 'text'}{'stream' if stream else 'whole'}"
    assert person.say(person.session(project), f"MARK-{mark}", image=image, stream=stream).status_code == 200
    system = provider.run(mark).system
    for fact in (project["name"], project["description"], project["project_path"]):
        assert fact in system


def test_the_system_prompt_follows_a_rename(provider: ModelProvider, person: Person) -> None:
    """A change of the project's name and description is in the system prompt of the next message."""
    project = person.project("Old harbour")
    session = person.session(project)
    person.say(session, "MARK-oldname")
    person.rename(project, name="New harbour", description="Moved by the storm.")
    person.say(session, "MARK-newname")
    assert "Old harbour" in provider.run("oldname").system
    renamed = provider.run("newname").system
    assert "New harbour" in renamed
    assert "Moved by the storm." in renamed
    assert "Old harbour" not in renamed


def test_ready_and_log_name_the_gateways_version(service: Service, gateway: Gateway, person: Person) -> None:
    """`/health/ready` and the log name the gateway's version, since sessions could work differently in another one."""
    answer = person.ready()
    assert answer.status_code == 200, answer.text
    version = gateway.openclaw.version(gateway.home)
    assert version in answer.text
    assert version in service.output()
    assert gateway.token not in answer.text
