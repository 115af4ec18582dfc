"""Reading, defaults and validation of the settings."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

import settings
from settings import Settings

from .service import CHECKOUT, COVERAGE, JSON, free_port

DEFAULTS: JSON = {
    "db_path": "{checkout}/clawdbot_adapter.db",
    "data": "{checkout}",
    "projects": "{checkout}/projects",
    "images": "{checkout}/images",
    "clawdbot_base_url": "http://localhost:18789",
    "clawdbot_token": "",
    "clawdbot_timeout": 1800,
    "public_base_url": None,
    "cors_origins": ["*"],
    "jwt_secret": None,
    "signup": "open",
    "log_level": "INFO",
    "log_format": "plain",
    "metrics_token": None,
}
SHOW = """
import json, sys
from pydantic import SecretStr
import settings
loaded = settings.load_settings()
shown = {name: getattr(loaded, name) for name in sys.argv[1:]}
opened = {name: value.get_secret_value() if isinstance(value, SecretStr) else value for name, value in shown.items()}
json.dump(opened, sys.stdout, default=str)
"""


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes all settings from the environment."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the code, in which a test can write a `.env`."""
    folder = tmp_path / "a checkout"
    folder.mkdir()
    for file in (*CHECKOUT.glob("*.py"), *CHECKOUT.glob("[!tv]*/*.py")):
        (folder / file.relative_to(CHECKOUT)).parent.mkdir(exist_ok=True)
        shutil.copy(file, folder / file.relative_to(CHECKOUT))
    return folder


def run(checkout: Path, code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a new process, with the environment of this one."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, cwd=cwd or checkout, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def shown(checkout: Path, *names: str, cwd: Path | None = None) -> JSON:
    """Returns settings as a new process reads them."""
    done = run(checkout, SHOW, *names, cwd=cwd)
    assert done.returncode == 0, done.stderr
    values: JSON = json.loads(done.stdout)
    return values


# --- valid settings -----------------------------------------------------------------------------------


def test_everything_has_a_default(checkout: Path, tmp_path: Path) -> None:
    """Without environment variables, the settings have the documented defaults, in any working directory."""
    expected = {
        name: value.format(checkout=checkout) if isinstance(value, str) else value for name, value in DEFAULTS.items()
    }
    assert shown(checkout, *DEFAULTS, cwd=tmp_path) == expected


def test_a_dotenv_beside_the_code_is_read(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The `.env` of the checkout is read, the one of the working directory is not, and the environment takes
    precedence."""
    (checkout / ".env").write_text(
        "# a comment\nCLAWDBOT_TOKEN='from the file'\nSIGNUP=closed\nTOKEN_TTL=120\nSOMEBODY_ELSES=1\nLOG_LEVEL=\n"
    )
    (tmp_path / ".env").write_text("CLAWDBOT_TIMEOUT=7\n")
    monkeypatch.setenv("TOKEN_TTL", "180")
    assert shown(checkout, "clawdbot_token", "signup", "token_ttl", "clawdbot_timeout", "log_level", cwd=tmp_path) == {
        "clawdbot_token": "from the file",
        "signup": "closed",
        "token_ttl": 180,
        "clawdbot_timeout": 1800,
        "log_level": "INFO",
    }


def test_a_wrong_dotenv_stops_the_start(checkout: Path) -> None:
    """A wrong value in `.env` is named like one in the environment."""
    (checkout / ".env").write_text("TOKEN_TTL=soon\n")
    done = run(checkout, "import app")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert "TOKEN_TTL" in done.stderr


def test_data_lies_beside_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`DATA_DIR` defaults to the directory of the database, and `PROJECTS_DIR` to a directory in `DATA_DIR`."""
    monkeypatch.setenv("DB_PATH", str(tmp_path / "here/x.db"))
    loaded = settings.load_settings()
    here = tmp_path / "here"
    assert (loaded.data, loaded.images, loaded.projects) == (here, here / "images", here / "projects")
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "there"))
    loaded, there = settings.load_settings(), tmp_path / "there"
    assert (loaded.db_path.parent, loaded.data, loaded.images) == (here, there, there / "images")
    assert loaded.projects == there / "projects"
    monkeypatch.setenv("PROJECTS_DIR", str(tmp_path / "elsewhere"))
    assert (settings.load_settings().data, settings.load_settings().projects) == (there, tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["DB_PATH", "DATA_DIR", "PROJECTS_DIR"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("below/x", "{checkout}/below/x"),
        ("./x", "{checkout}/x"),
        ("../beside/x", "{checkout.parent}/beside/x"),
        ("~/x", "{home}/x"),
        ("/absolute/./a/../x", "/absolute/x"),
    ],
)
def test_a_path_may_be_relative(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str, expected: str
) -> None:
    """A relative path starts at the checkout, in any working directory, and `~` is the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    assert str(getattr(settings.load_settings(), name.lower())) == expected.format(checkout=CHECKOUT, home=tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("CLAWDBOT_BASE_URL", "https://gateway.example:8443/", "https://gateway.example:8443"),
        ("CLAWDBOT_BASE_URL", "http://[::1]:18789", "http://[::1]:18789"),
        ("CLAWDBOT_BASE_URL", "http://host/below/", "http://host/below"),
        ("CLAWDBOT_TIMEOUT", "0.5", 0.5),
        ("PUBLIC_BASE_URL", "https://chat.example/", "https://chat.example"),
        ("CORS_ORIGINS", "*", ("*",)),
        ("CORS_ORIGINS", "https://a.example", ("https://a.example",)),
        (
            "CORS_ORIGINS",
            " https://a.example/ , http://b.example:3000,",
            ("https://a.example", "http://b.example:3000"),
        ),
        ("TOKEN_TTL", "60", 60),
        ("LOG_LEVEL", "debug", "DEBUG"),
        ("LOG_LEVEL", "Warning", "WARNING"),
        ("LOG_FORMAT", "JSON", "json"),
        ("METRICS_TOKEN", "x" * 16, SecretStr("x" * 16)),
    ],
)
def test_a_right_value_is_taken(monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: object) -> None:
    """A valid value is accepted, without its trailing slash, and in upper or lower case if the case has no meaning."""
    monkeypatch.setenv(name, value)
    assert getattr(settings.load_settings(), name.lower()) == expected


@pytest.mark.parametrize("name", [name.upper() for name in Settings.model_fields])
def test_an_empty_value_is_none(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """An empty variable counts as unset."""
    usual = settings.load_settings()
    monkeypatch.setenv(name, "")
    assert settings.load_settings() == usual


# --- invalid settings ---------------------------------------------------------------------------------

WRONG = (
    *(("CLAWDBOT_BASE_URL", url) for url in ("localhost", "localhost:18789", "ftp://x", "http://", "http://[::1")),
    *(
        ("CLAWDBOT_BASE_URL", url)
        for url in ("http://x?q=1", "http://x#f", "http://x:99999", "http://x:y", "http://x y")
    ),
    *(("CLAWDBOT_BASE_URL", url) for url in ("http://name:word@x", "http://name@x", "javascript://x")),
    *(("CLAWDBOT_TOKEN", token) for token in ("a\nb", "a\rb", "\x1b")),
    *(("CLAWDBOT_TIMEOUT", number) for number in ("0", "-1", "soon", "nan", "inf", "1e9")),
    *(("PUBLIC_BASE_URL", url) for url in ("chat.example", "http://", "http://x?q=1", "http://x:99999")),
    *(("CORS_ORIGINS", text) for text in ("a.example", "https://a.example/path", "https://a.example,b", "null")),
    *(("CORS_ORIGINS", text) for text in ("https://a.example;https://b.example", "https://a.example:99999")),
    *(("JWT_SECRET", secret) for secret in ("short", "x" * 31)),
    *(("TOKEN_TTL", number) for number in ("0", "59", "-1", "1.5", "soon", "1e3", "9999999999")),
    *(("LOG_LEVEL", level) for level in ("TRACE", "0", "INFO,DEBUG")),
    *(("LOG_FORMAT", form) for form in ("text", "plain,json")),
    *(
        ("METRICS_TOKEN", token)
        for token in ("t" * 15, "a token with spaces in it", "tökentökentökentöken", "\x7f" * 16)
    ),
    ("SIGNUP", "x" * 201),  # the field `invite` of a sign-up has at most 200 characters
    ("PROJECTS_DIR", "~nobody-of-that-name/x"),
)


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_stops_the_start(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """An invalid value ends the process with one line that names the variable and shows no secret."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        settings.load_settings()
    said = str(stopped.value.code)
    assert name in said
    assert len(said.splitlines()) == 1
    assert name not in ("JWT_SECRET", "CLAWDBOT_TOKEN", "SIGNUP", "METRICS_TOKEN") or value not in said


def test_every_wrong_value_is_named_at_once(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing the app exits with status 1 and one line on stderr that names all variables. It prints nothing to
    stdout and creates no file."""
    monkeypatch.setenv("TOKEN_TTL", "soon")
    monkeypatch.setenv("CORS_ORIGINS", "nowhere")
    monkeypatch.setenv("JWT_SECRET", "my little secret")
    before = sorted(checkout.iterdir())
    done = run(checkout, "import app")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    for name in ("TOKEN_TTL", "CORS_ORIGINS", "JWT_SECRET"):
        assert name in done.stderr
    assert "my little secret" not in done.stderr
    assert sorted(checkout.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("DB_PATH", "folder"),
        ("DB_PATH", "file/below.db"),
        ("DB_PATH", "file"),
        ("DB_PATH", "/"),
        ("DATA_DIR", "file"),
        ("DATA_DIR", "file/below"),
        ("PROJECTS_DIR", "file"),
        ("PROJECTS_DIR", "file/below"),
    ],
)
def test_a_path_that_cannot_be_used_stops_the_start(tmp_path: Path, name: str, path: str) -> None:
    """If a database or directory cannot be created, the server exits with a line that names the variable, without a
    traceback."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("no database and no folder")
    environment = {
        "PATH": os.environ["PATH"],
        "DB_PATH": str(tmp_path / "x.db"),
        "DATA_DIR": str(tmp_path),
        "CLAWDBOT_BASE_URL": f"http://127.0.0.1:{free_port()}",
        **COVERAGE,
        name: str(tmp_path / path),
    }
    command = [sys.executable, "-m", "uvicorn", "app:app", "--host", "127.0.0.1", "--port", str(free_port())]
    with subprocess.Popen(
        command, cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            output, _ = server.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            server.kill()
            pytest.fail(f"the service started with {name}={path}")
    assert server.returncode != 0
    assert [line for line in output.splitlines() if name in line]
    assert "Traceback" not in output


def test_settings_show_no_secret_and_do_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Printed settings hide secrets, and settings cannot be changed."""
    secrets = {
        "CLAWDBOT_TOKEN": "the-token",
        "JWT_SECRET": "the-secret-that-signs-all-the-tokens",
        "SIGNUP": "the-invite",
        "METRICS_TOKEN": "the-token-of-the-metrics",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    loaded = settings.load_settings()
    for text in (repr(loaded), str(loaded), loaded.model_dump_json()):
        for value in secrets.values():
            assert value not in text
    with pytest.raises(ValueError, match="frozen"):
        loaded.token_ttl = 60  # type: ignore[misc]  # the test is that the frozen model refuses this


@pytest.mark.parametrize(
    "secret",
    [
        *("x" * 32, "ab" * 20, "abcdefgh" * 5, "1234567890" * 4, "changeme-changeme-changeme-changeme", "0" * 64),
        *(
            "your-256-bit-secret-your-256-bit-secret",
            "super_secret_key_for_development_only",
            "example secret of a readme file",
        ),
    ],
)
def test_a_secret_that_is_easy_to_guess_stops_the_start(monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    """Repetitions and what examples contain, however long."""
    monkeypatch.setenv("JWT_SECRET", secret)
    with pytest.raises(SystemExit, match=r"JWT_SECRET: .*(easy to guess|at least 32)"):
        settings.load_settings()


@pytest.mark.parametrize(
    "secret", ["d0a1" + "6f83b25c97e4" * 1 + "0b1d4a7799e2c3f5a6b8", "a secret of the tests, long enough"]
)
def test_a_secret_that_is_random_starts(monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    """What `openssl rand` prints, or a sentence of one's own."""
    monkeypatch.setenv("JWT_SECRET", secret)
    loaded = settings.load_settings().jwt_secret
    assert loaded is not None and loaded.get_secret_value() == secret


@pytest.mark.parametrize(
    "value", ["false", "off", "no", "close", "true", "on", "yes", "0", "1", "none", "disabled", "Invite-Only", "short"]
)
def test_a_signup_that_looks_like_a_switch_stops_the_start(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """Each of them would become an invite code of that name, which anybody guesses."""
    monkeypatch.setenv("SIGNUP", value)
    with pytest.raises(SystemExit, match="SIGNUP: write `open`, `closed`"):
        settings.load_settings()


@pytest.mark.parametrize(
    ("value", "signup"), [("Open", "open"), (" CLOSED ", "closed"), ("open sesame", "open sesame")]
)
def test_a_signup_is_read_whatever_its_case(monkeypatch: pytest.MonkeyPatch, value: str, signup: str) -> None:
    """Blanks around the two words do not matter either; an invite code is taken as it is."""
    monkeypatch.setenv("SIGNUP", value)
    assert settings.load_settings().signup.get_secret_value() == signup
