"""The main job: whichever way a message is sent, the agent knows the whole conversation and no other."""

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
    """A small red picture, as a file of this kind."""
    pillow_heif.register_heif_opener()
    file = io.BytesIO()
    Image.new("RGB", SIZE, RED).save(file, kind)
    return file.getvalue()


def encoded(data: bytes) -> str:
    """A picture as a client sends it."""
    return base64.b64encode(data).decode()


def test_four_ways_are_four_turns_of_one_conversation(
    service: Service, gateway: Gateway, provider: ModelProvider, person: Person
) -> None:
    """Text and image, streamed and not: each reply knows every message before it, in one agent session."""
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
        # A picture that the gateway need not shrink reaches the model as it was sent.
        assert provider.run(mark).pictures == ([data] if data else [])
    key = session["session_key"]
    assert [name for name in gateway.sessions() if key in name] == [session_of(key)]
    line = f"[CHAT] Sending to OpenClaw with 'user' field: adapter-session-{key}"
    assert service.output().count(line) == len(ways)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "HEIF"])
def test_every_kind_of_picture_reaches_the_model(provider: ModelProvider, person: Person, kind: str) -> None:
    """Each type that the contract accepts arrives as a picture of the same size and colour."""
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
    """Two sessions of a project, one of another project and one of another user: each knows only itself."""
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
def test_the_agent_is_told_of_the_project(
    provider: ModelProvider, person: Person, stream: bool, image: str | None
) -> None:
    """Name, description and folder of the project stand in the model's system prompt, each of the four ways."""
    project = person.project("Lighthouse ledger", "Keeps the tides of Cape Wrath.")
    mark = f"told{'image' if image else 'text'}{'stream' if stream else 'whole'}"
    assert person.say(person.session(project), f"MARK-{mark}", image=image, stream=stream).status_code == 200
    system = provider.run(mark).system
    for fact in (project["name"], project["description"], project["project_path"]):
        assert fact in system


def test_the_agent_is_told_of_a_renamed_project(provider: ModelProvider, person: Person) -> None:
    """What the user changes about the project reaches the agent with the next message."""
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
    """An operator sees which gateway answers: sessions could change their meaning with its version."""
    answer = person.ready()
    assert answer.status_code == 200, answer.text
    version = gateway.openclaw.version(gateway.home)
    assert version in answer.text
    assert version in service.output()
    assert gateway.token not in answer.text
