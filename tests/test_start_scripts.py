"""The start scripts: which branches each accepts, how they maintain `venv/`, what they start, and the whole demo."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from settings import Settings

from .checkout import TOOLS, Checkout, use_this_python
from .service import free_port

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"start-backend.sh": 8002, "start-backend-dev.sh": 8001}


def run(script: Path, *options: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(script), *options], cwd=cwd, env=TOOLS | env, capture_output=True, text=True, check=False, timeout=300
    )


def git(directory: Path, *arguments: str) -> None:
    who = ("-c", "user.name=Test", "-c", "user.email=test@example.com")
    subprocess.run(["git", *who, *arguments], cwd=directory, env=TOOLS, capture_output=True, check=True)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with a space in its name, no requirements, and free ports."""
    directory = tmp_path_factory.mktemp("a clone")
    (directory / "tests").mkdir()
    (directory / "tests" / ".gitkeep").touch()
    (directory / ".gitignore").write_text("venv/\n.env\n")
    (directory / "requirements.lock").write_text("# nothing\n")
    for script in (*SCRIPTS, "checkout.py"):
        shutil.copy(ROOT / script, directory)
    start = directory / "start-backend.sh"
    text = start.read_text()
    for port in SCRIPTS.values():
        text = text.replace(f"USUAL_PORT={port}", f"USUAL_PORT={free_port()}")
    start.write_text(text)
    git(directory, "init", "--initial-branch", "main")
    git(directory, "add", ".")
    git(directory, "commit", "-m", "First")
    assert run(start, "--check").stderr == (
        "start-backend.sh: Installing the packages of requirements.lock into venv/; this takes about a minute.\n"
    )
    return directory


@pytest.fixture
def checkout(clone: Path) -> Iterator[Path]:
    """The clone on `main`. Restores it after the test."""
    yield clone
    git(clone, "checkout", "--force", "main")
    (clone / ".env").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("branch", "accepted_by"),
    [
        ("main", ["start-backend.sh"]),
        ("feature/chat", ["start-backend-dev.sh"]),
        ("fix/one", ["start-backend-dev.sh"]),
        ("development", ["start-backend-dev.sh"]),
        ("release/main", []),
        ("featured", []),
    ],
)
def test_each_script_accepts_its_own_branches(checkout: Path, branch: str, accepted_by: list[str]) -> None:
    """The error names the branch and the git command that creates a suitable worktree."""
    git(checkout, "checkout", "-B", branch)
    for script in SCRIPTS:
        done = run(checkout / script, "--check")
        if script in accepted_by:
            assert (done.returncode, done.stderr) == (0, "")
        else:
            assert done.returncode == 3
            assert f"is on {branch}." in done.stderr
            assert "git worktree add ../" in done.stderr


def test_a_branch_below_development_is_accepted(checkout: Path) -> None:
    """This is a separate test because git cannot store `development/ada` next to a branch `development`."""
    git(checkout, "update-ref", "-d", "refs/heads/development")
    git(checkout, "checkout", "-B", "development/ada")
    assert run(checkout / "start-backend-dev.sh", "--check").returncode == 0
    git(checkout, "checkout", "main")
    git(checkout, "branch", "-D", "development/ada")


def test_a_commit_of_main_counts_as_main(checkout: Path) -> None:
    git(checkout, "commit", "--allow-empty", "-m", "Second")
    git(checkout, "checkout", "--detach", "main~1")
    assert run(checkout / "start-backend.sh", "--check").returncode == 0
    assert run(checkout / "start-backend-dev.sh", "--check").returncode == 3
    git(checkout, "commit", "--allow-empty", "-m", "Not of main")
    assert run(checkout / "start-backend.sh", "--check").returncode == 3
    git(checkout, "update-ref", "refs/remotes/origin/main", "HEAD")
    assert run(checkout / "start-backend.sh", "--check").returncode == 0
    git(checkout, "update-ref", "-d", "refs/remotes/origin/main")


def test_a_worktree_is_a_checkout_of_its_own(checkout: Path, tmp_path: Path) -> None:
    git(checkout, "branch", "--force", "feature/tree")
    git(checkout, "worktree", "add", str(tmp_path / "tree"), "feature/tree")
    assert run(tmp_path / "tree" / "start-backend.sh", "--check").returncode == 3
    assert run(tmp_path / "tree" / "start-backend-dev.sh", "--check").returncode == 0
    git(checkout, "worktree", "remove", "--force", str(tmp_path / "tree"))


def test_a_directory_that_is_not_a_checkout_is_refused(checkout: Path, tmp_path: Path) -> None:
    for script in (*SCRIPTS, "checkout.py"):
        shutil.copy(checkout / script, tmp_path)
    for script in SCRIPTS:
        done = run(tmp_path / script, "--check")
        assert done.returncode == 3
        assert f"{tmp_path} is not a git checkout" in done.stderr


def test_the_script_works_from_any_directory_and_through_a_symlink(checkout: Path, tmp_path: Path) -> None:
    link = tmp_path / "start"
    link.symlink_to(checkout / "start-backend.sh")
    assert run(link, "--check", cwd=tmp_path).returncode == 0


def test_a_port_in_use_is_reported_with_its_process(checkout: Path) -> None:
    port = int(re.findall(r"USUAL_PORT=(\d+)", (checkout / "start-backend.sh").read_text())[0])
    with socket.create_server(("127.0.0.1", port)):
        done = run(checkout / "start-backend.sh", "--check")
    assert done.returncode == 4
    assert f"Port {port} is already in use" in done.stderr
    assert (f"by process {os.getpid()}." in done.stderr) == bool(shutil.which("ss"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_options(script: str) -> None:
    """`--help` names the port and every option; unknown and misplaced options are refused."""
    helped = run(ROOT / script, "--help")
    assert helped.returncode == 0
    assert f"port {SCRIPTS[script]}" in helped.stdout
    assert {"--check", "--prepare", "--demo", "--port", "--help", "PYTHON"} <= set(
        re.findall(r"--\w+|PYTHON", helped.stdout)
    )
    for wrong in (["--reload"], ["x"], ["--port", "9000"], ["--demo", "--port"], ["--demo", "--port", "70000"]):
        refused = run(ROOT / script, *wrong)
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"{script}: ")
        assert refused.stderr.count("\n") == 1


@pytest.mark.slow
def test_changed_requirements_are_installed_before_the_start(checkout: Path) -> None:
    """If pip fails, the script prints pip's output, and the next start installs again. The environment stays in place,
    because a service may be running on it."""
    requirements = checkout / "requirements.lock"
    mark = checkout / "venv" / "left-over"
    mark.touch()
    requirements.write_text("=== no requirement\n")
    failed = run(checkout / "start-backend.sh", "--check")
    assert failed.returncode == 1
    assert "Invalid requirement" in failed.stderr
    requirements.write_text("# nothing\n")
    assert "Installing" in run(checkout / "start-backend.sh", "--check").stderr
    requirements.write_text("# nothing at all\n")
    assert "Installing" in run(checkout / "start-backend.sh", "--check").stderr
    assert mark.exists()
    assert run(checkout / "start-backend.sh", "--check").stderr == ""
    (checkout / "venv" / ".stamp").write_text("3.0.0 elsewhere\n")
    assert "Installing" in run(checkout / "start-backend.sh", "--check").stderr
    assert not mark.exists()


def test_a_requirement_without_a_hash_is_refused(checkout: Path) -> None:
    """Without a hash in the lock file, a package index could deliver other code than the code that was tested."""
    lock = checkout / "requirements.lock"
    before = lock.read_text()
    lock.write_text("./package\n")
    (checkout / "package").mkdir()
    (checkout / "package" / "pyproject.toml").write_text('[project]\nname = "package"\nversion = "1"\n')
    refused = run(checkout / "start-backend.sh", "--check")
    assert refused.returncode == 1
    assert "hash" in refused.stderr
    shutil.rmtree(checkout / "package")
    lock.write_text(before)
    assert "Installing" in run(checkout / "start-backend.sh", "--check").stderr


def test_two_starts_at_once_build_one_environment(checkout: Path) -> None:
    (checkout / "venv" / ".stamp").unlink()
    command = [str(checkout / "start-backend.sh"), "--check"]
    starts = [subprocess.Popen(command, env=TOOLS, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [start.communicate(timeout=120)[1] for start in starts]
    assert [start.returncode for start in starts] == [0, 0]
    assert sum("Installing" in text for text in outputs) == 1


def test_a_missing_python_is_reported(checkout: Path, tmp_path: Path) -> None:
    wrong = run(checkout / "start-backend.sh", "--check", PYTHON="/bin/false")
    assert (wrong.returncode, "PYTHON=/bin/false is not Python 3.11" in wrong.stderr) == (1, True)
    for tool in ("bash", "dirname", "readlink"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    none = run(checkout / "start-backend.sh", "--check", PYTHON="", PATH=str(tmp_path), cwd=tmp_path)
    assert (none.returncode, "Python 3.11 or newer was not found" in none.stderr) == (1, True)


def test_a_python_without_venv_is_reported(checkout: Path, tmp_path: Path) -> None:
    stamp = checkout / "venv" / ".stamp"
    content = stamp.read_text()
    stamp.unlink()
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *ensurepip*) exit 1 ;; esac\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    done = run(checkout / "start-backend.sh", "--check", PYTHON=str(python))
    assert (done.returncode, "apt-get install python3-venv" in done.stderr) == (1, True)
    stamp.write_text(content)


def test_the_started_commands(checkout: Path) -> None:
    """Development uses its own database unless the environment or `.env` sets `DB_PATH`, and reloads only when the
    code of the service changes."""
    python = checkout / "venv" / "bin" / "python"
    python.unlink()
    python.write_text('#!/bin/sh\necho "DB_PATH=$DB_PATH"\necho "$@"\n')
    python.chmod(0o755)
    ports = re.findall(r"USUAL_PORT=(\d+)", (checkout / "start-backend.sh").read_text())
    production = run(checkout / "start-backend.sh")
    assert production.stdout == f"DB_PATH=\nserve.py --host 0.0.0.0 --port {ports[0]}\n"
    git(checkout, "checkout", "-B", "development")
    development = checkout / "start-backend-dev.sh"
    excluded = " ".join(f"--reload-exclude {checkout / name}" for name in ("projects", "tests", "venv"))
    options = "--no-access-log --timeout-graceful-shutdown 10 --reload"
    expected = f"-m uvicorn app:app --host 0.0.0.0 --port {ports[1]} {options} {excluded}\n"
    assert run(development).stdout == f"DB_PATH=clawdbot_adapter_dev.db\n{expected}"
    assert run(development, DB_PATH="mine.db").stdout.startswith("DB_PATH=mine.db\n")
    for line, database in (
        ("DB_PATH=mine.db", ""),
        ('export db_path = "mine.db"', ""),
        ('DB_PATH=""', "clawdbot_adapter_dev.db"),
        ("# DB_PATH=mine.db", "clawdbot_adapter_dev.db"),
    ):
        (checkout / ".env").write_text(f"SIGNUP=closed\n{line}\n")
        assert run(development).stdout.startswith(f"DB_PATH={database}\n")


def test_the_demo_sets_every_setting() -> None:
    """A setting that the demo did not set would be read from the checkout's `.env`."""
    text = (ROOT / "start-backend.sh").read_text()
    for name in Settings.model_fields:
        assert re.search(rf"\b{name.upper()}=\S", text), name


@contextmanager
def demo(script: Path, temporary: Path, **env: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """Runs a demo. Yields its process, its address, and the commands that it prints for pasting."""
    url = f"http://127.0.0.1:{free_port()}"
    command = [str(script), "--demo", "--port", url.rpartition(":")[2]]
    process = subprocess.Popen(
        command, env=TOOLS | env | {"TMPDIR": str(temporary)}, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout
        lines: list[str] = []
        while lines.count("\n") < 2:  # the demo prints an empty line before the commands, and one after them
            lines.append(process.stdout.readline())
            assert lines[-1], "the demo ended before it printed its commands"
        yield process, url, "".join(lines[lines.index("\n") :])
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def paste(lines: str) -> str:
    """Returns the output of the commands, run twice in a new bash without the caller's environment."""
    with tempfile.TemporaryDirectory() as home:
        env = {"PATH": os.environ["PATH"], "HOME": home}
        done = subprocess.run(
            ["bash"], input=lines * 2, env=env, capture_output=True, text=True, check=False, timeout=60
        )
    assert done.stderr == ""
    return done.stdout


def has_ended(process: subprocess.Popen[str], url: str, temporary: Path) -> bool:
    """Checks that the service, the stand-in and the whole process group of the script have ended. Returns whether the
    demo removed its data."""
    process.wait(30)
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return not list(temporary.iterdir())


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    """A copy of this checkout with an environment that the scripts do not build again."""
    return Checkout(tmp_path / "a checkout", {}).path


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """The directory for temporary files, in which a demo puts its data."""
    path = tmp_path / "temporary"
    path.mkdir()
    return path


@pytest.mark.parametrize("is_built", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_demos_commands_are_a_first_chat(ready: Path, temporary: Path, is_built: bool) -> None:
    """In a new clone, the demo first installs the packages of `requirements.lock`."""
    if not is_built:
        shutil.rmtree(ready / "venv")
    with demo(ready / "start-backend.sh", temporary) as (process, url, lines):
        assert url in lines
        output = paste(lines)
        assert output.count("data: [DONE]") == 2
        assert output.count('"content":" stand-in:"') == 2
        process.send_signal(signal.SIGTERM)
        assert has_ended(process, url, temporary)
        assert process.returncode == 128 + signal.SIGTERM


def test_the_demo_ignores_settings_and_leaves_no_data(tmp_path: Path) -> None:
    """The demo ignores the caller's environment and `.env`. Ctrl-C, which signals the whole process group, ends it."""
    copy, temporary = tmp_path / "a copy", tmp_path / "temporary"
    temporary.mkdir()
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns(".venv*", "__pycache__"))
    for pattern in ("*.py", "[!tv]*/*.py", "start-*.sh", "requirements.*"):
        for file in ROOT.glob(pattern):
            (copy / file.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copy(file, copy / file.relative_to(ROOT))
    use_this_python(copy)
    hostile = {
        "DB_PATH": "mine.db",
        "PROJECTS_DIR": "mine",
        "SIGNUP": "closed",
        "CLAWDBOT_BASE_URL": "http://127.0.0.1:1",
    }
    (copy / ".env").write_text("".join(f"{name}={value}\n" for name, value in hostile.items()) + "TOKEN_TTL=never\n")
    before = {path.name for path in copy.iterdir()} | {"__pycache__"}
    with demo(copy / "start-backend-dev.sh", temporary, **hostile, JWT_SECRET="short") as (process, url, lines):
        assert paste(lines).count("data: [DONE]") == 2
        os.killpg(process.pid, signal.SIGINT)
        assert has_ended(process, url, temporary)
    assert {path.name for path in copy.iterdir()} <= before


@pytest.mark.parametrize("part", ["app:app", "demo.py"])
def test_a_demo_ends_if_one_of_its_processes_dies(ready: Path, temporary: Path, part: str) -> None:
    with demo(ready / "start-backend.sh", temporary) as (process, url, _):
        found = subprocess.run(["pgrep", "-g", str(process.pid), "-f", part], capture_output=True, check=True)
        os.kill(int(found.stdout), signal.SIGKILL)
        assert has_ended(process, url, temporary)
        assert process.returncode == 1
