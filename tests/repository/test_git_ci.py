"""The examples of spec/publishing.md, run: release file, CI jobs, and the hook that deploys."""

from __future__ import annotations

import asyncio
import re
import shutil
from pathlib import Path

import pytest
import yaml

from netota_coap.client.coap_client import Client
from netota_coap.client.downloads import download
from netota_coap.encoding.codecs import Format, load
from netota_coap.publishing.archives import ArchiveSource
from netota_coap.publishing.release_file import RELEASE
from netota_coap.repository.blobs import Blobs, blob_name
from tests.support.fleets import BETA, EDGE, FILE, STABLE, begin, clean, released, run
from tests.support.publishing import publish, rollback
from tests.support.serving import served, until
from tests.support.storing import FIRMWARE, PLACE, SHA256, content
from tools.generate import make_spec

pytestmark = pytest.mark.slow

DOCUMENT = (make_spec.SPEC / "publishing.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return begin(tmp_path_factory.mktemp("begun") / "fleet")


@pytest.fixture
def fleet(tmp_path: Path, begun: Path) -> Path:
    """A repository in git; stable holds sequence 2 of version 2."""
    return Path(shutil.copytree(begun, tmp_path / "fleet"))


def example(info: str) -> str:
    """Return the example of publishing.md with what follows in its fence."""
    (text,) = re.findall(rf"^```{info}\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    return str(text)


# ----------------------------------------------------------------------------------------------
# Release file and CI jobs


def test_the_release_file() -> None:
    """The example is one, and every key of the table is known."""
    text = example("text release.toml")
    release = RELEASE.from_plain(load(text.encode(), Format.TOML), Format.TOML)
    assert (len(release.offers), len(release.archives)) == (1, 2)
    assert release.archives[1].content.attributes == {"region": "eu"}


def gitlab_script() -> list[str]:
    return list(yaml.safe_load(example("yaml gitlab"))["publish"]["script"])


def github_script() -> list[str]:
    steps = yaml.safe_load(example("yaml github"))["jobs"]["publish"]["steps"]
    return ['git clone "$FLEET_URL" fleet', *(step["run"] for step in steps if "run" in step)]


@pytest.fixture
def remote(fleet: Path) -> Path:
    """A bare repository that has what fleet has, which follows it."""
    root = fleet.parent / "remote.git"
    run(fleet.parent, "git", "clone", "--bare", str(fleet), str(root))
    run(fleet, "git", "remote", "add", "origin", str(root))
    run(fleet, "git", "push", "--set-upstream", "origin", "main")
    return root


@pytest.fixture
def firmware(tmp_path: Path, remote: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a CI job: what was built, and the variables that it is given."""
    root = tmp_path / "firmware"
    root.mkdir()
    (root / "app.bin").write_text("firmware")
    offer = '[[offers]]\nurl = "https://example.com/{version}/{name}"\nmetric = 1\n'
    archive = '[[archives]]\nfile = "app.bin"\n'
    (root / "release.toml").write_text(f'version = "1.0.0"\n{offer}{archive}')
    variables = {
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "FLEET_URL": str(remote),
        "CI_COMMIT_TAG": "v1.0.0",
        "GITLAB_USER_NAME": "Ann",
        "GITLAB_USER_EMAIL": "ann@example.com",
        "GITHUB_REF_NAME": "v1.0.0",
        "GITHUB_ACTOR": "ann",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return root


def run_job(firmware: Path, script: list[str], code: int = 0) -> str:
    """Run the lines of a job as CI does: one shell, which ends with the first that fails."""
    lines = [line for line in script if not line.startswith("pip install")]
    assert len(script) == len(lines) + 1
    return run(firmware, "sh", "-ec", "\n".join(lines), code=code)


@pytest.mark.parametrize(
    ("script", "author"),
    [
        (gitlab_script(), "Ann <ann@example.com>"),
        (github_script(), "ann <ann@users.noreply.github.com>"),
    ],
    ids=["gitlab", "github"],
)
def test_a_job_publishes(
    firmware: Path,
    remote: Path,
    fleet: Path,
    script: list[str],
    author: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is pushed as one commit, after another one that was faster with the same stream."""
    released("0.9", BETA)(fleet)
    run(fleet, "git", "add", "--all")
    run(fleet, "git", "-c", "user.name=x", "-c", "user.email=y", "commit", "-m", "faster")
    once = firmware / "once"
    hook = firmware / "template" / "hooks" / "pre-push"
    hook.parent.mkdir(parents=True)
    hook.write_text(
        f"#!/bin/sh\nmkdir {once} || exit 0\nunset GIT_DIR GIT_PREFIX\ngit -C {fleet} push\n"
    )
    hook.chmod(0o755)
    monkeypatch.setenv("GIT_TEMPLATE_DIR", str(hook.parent.parent))

    run_job(firmware, script)
    assert once.exists()
    run(fleet, "git", "pull")
    state = clean(fleet)["beta"]
    assert (state.version, state.sequence, state.message) == ("1.0.0", 2, "v1.0.0")
    assert author == state.author
    subjects = run(remote, "git", "log", "--format=%s", "main").splitlines()
    assert subjects[:3] == ["sensor-node/beta: v1.0.0", "faster", "publish 2"]


@pytest.mark.parametrize("script", [gitlab_script(), github_script()], ids=["gitlab", "github"])
def test_a_job_fails_as_a_whole(firmware: Path, remote: Path, script: list[str]) -> None:
    """What cannot be published is not pushed, and the job says why."""
    (firmware / "app.bin").unlink()
    before = run(remote, "git", "rev-parse", "main")
    assert "there is no file app.bin" in run_job(firmware, script, code=3)
    assert before == run(remote, "git", "rev-parse", "main")


# ----------------------------------------------------------------------------------------------
# The hook


@pytest.fixture
def link(tmp_path: Path, remote: Path) -> Path:
    """Where the bare repository deploys to; nothing is there yet."""
    path = tmp_path / "srv" / "fleet"
    path.parent.mkdir()
    hook = remote / "hooks" / "post-receive"
    hook.write_text(example("sh post-receive"))
    hook.chmod(0o755)
    run(remote, "sh", "-n", str(hook))
    run(remote, "git", "config", "netota.served", str(path))
    return path


def push(root: Path, message: str) -> str:
    """Commit what there is, push it, and return what the pusher is told."""
    run(root, "git", "add", "--all")
    run(root, "git", "commit", "--allow-empty", "-m", message)
    told = run(root, "git", "push")
    return re.sub(r"\x1b\[[0-9;]*[mK]", "", told)


async def test_a_push_is_served(fleet: Path, link: Path) -> None:
    """Each push is one exchange; one with errors is none, and the pusher is told why."""

    async def pushed(message: str) -> str:
        return await asyncio.to_thread(push, fleet, message)

    assert "remote: deployed: " in await pushed("first")
    async with served(link) as server, Client() as client:

        async def stable() -> str:
            return (await client.stream(f"{server.uri}/p/sensor-node/s/stable")).version

        def swaps() -> list[str]:
            return [line for line in server.log if "reloaded" in line]

        assert await stable() == "2"
        released("3")(fleet)
        released("4", EDGE)(fleet)
        assert re.search(r"remote: deployed: \w+ publish 3", await pushed("publish 3"))
        await until(swaps)
        assert await stable() == "3"

        tree = link.resolve()
        good = (fleet / FILE).read_text()
        (fleet / FILE).write_text(good + "<<<<<<<\n")
        told = await pushed("malformed")
        assert f"remote: error: {FILE}: is not valid TOML" in told
        assert "remote: not deployed: what is served stays as it was" in told
        assert tree == link.resolve()

        (fleet / FILE).write_text(good)
        assert "remote: deployed: " in await pushed("mended")
        await until(lambda: len(swaps()) == 2)
        tree = link.resolve()

        run(fleet, "git", "revert", "--no-edit", "HEAD~2")
        told = await pushed("on top of the revert")
        assert f"remote: error: {FILE}: sequence: must be above 3" in told
        assert "remote: hint: Devices ignore a sequence that they have seen." in told
        assert "remote: not deployed: " in told
        assert tree == link.resolve()

        run(fleet, "git", "revert", "--no-edit", "HEAD~")
        rollback(fleet, STABLE)
        assert "remote: deployed: " in await pushed("rolled back")
        await until(lambda: len(swaps()) == 3)
        assert await stable() == "2"
    assert len(swaps()) == 3
    assert not [line for line in server.log if "rror" in line]


def test_what_is_left_of_pushes(fleet: Path, link: Path) -> None:
    """The last two trees before the served one stay, and can be read by all; no other branch."""
    trees: list[Path] = []
    for number in range(4):
        push(fleet, f"push {number}")
        trees.append(link.resolve())
    run(fleet, "git", "checkout", "-b", "other")
    told = run(fleet, "git", "push", "origin", "other")
    assert "remote: " not in told
    assert [link, *trees[-3:]] == sorted(link.parent.iterdir())
    assert trees[-1] == link.resolve()
    assert trees[-1].stat().st_mode & 0o055 == 0o055
    clean(link)


async def test_blobs_survive_a_deployment(fleet: Path, link: Path, remote: Path) -> None:
    """What is held is served on from the next tree, as the same file, also when older ones go."""
    push(fleet, "first")
    first = link.resolve()
    image = fleet.parent / "image.bin"
    image.write_bytes(FIRMWARE)
    add = example("sh add").replace("/srv/fleet.git", str(remote)).replace("/srv/fleet", str(link))
    run(fleet, "sh", "-ec", add.replace("build/zephyr/zephyr.signed.bin", str(image)))
    inode = (link / PLACE).stat().st_ino
    async with served(link) as server, Client() as client:
        publish(fleet, EDGE, "3", [ArchiveSource(image, "image")])
        told = await asyncio.to_thread(push, fleet, "publish 3")
        assert "remote: 0 errors, 0 warnings" in told
        await until(lambda: any("reloaded" in line for line in server.log))
        state = await client.stream(f"{server.uri}/p/sensor-node/s/edge")
        assert [offer.url for offer in (state.archives or ())[0].offers] == [
            f"/b/{blob_name(SHA256)}"
        ]
        for number in range(2):
            await asyncio.to_thread(push, fleet, f"push {number}")
        assert not first.exists()
        (archive,) = state.archives or ()
        target = fleet.parent / "downloaded"
        await download(archive, target, server=server.uri)
        assert target.read_bytes() == FIRMWARE
    run(fleet, "git", "revert", "--no-edit", "HEAD~2")
    assert "remote: not deployed: " in await asyncio.to_thread(push, fleet, "with errors")
    assert inode == (link / PLACE).stat().st_ino
    assert content(Blobs(link)) == FIRMWARE


@pytest.mark.parametrize("wrong", ["a directory in the way", "nothing configured"])
def test_a_hook_that_cannot_deploy(fleet: Path, link: Path, remote: Path, wrong: str) -> None:
    """What is there stays, nothing is left over, and the pusher is told."""
    if wrong == "nothing configured":
        run(remote, "git", "config", "--unset", "netota.served")
    else:
        (link / "kept").mkdir(parents=True)
    assert "remote: not deployed: " in push(fleet, "push")
    assert list(link.parent.glob("fleet.*")) == []
    assert link.exists() == (link / "kept").exists()
