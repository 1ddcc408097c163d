"""service/config.py: one table drives the file, the environment, the options and the documents."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import click
import pytest

from netota_coap.cli import cli
from netota_coap.coap import options as coap
from netota_coap.errors import ConfigError, InvalidDataError
from netota_coap.service.config import (
    SETTINGS,
    Command,
    Config,
    assemble,
    default_file,
    documented,
)
from tests.support.device import GET, device
from tests.support.serving import PATIENCE_S, netota, served, until

PATH = "p/sensor-node/s/stable"
NO_SUCH_FILE: Mapping[str, str] = {"CONFIGURATION_DIRECTORY": "/nonexistent"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def from_text(file: Path, text: str) -> Config:
    file.write_text(text)
    return assemble(file, {}).config


# ----------------------------------------------------------------------------------------------
# The table


def test_nothing_is_said() -> None:
    """Without file, environment and options, each value is the default."""
    effective = assemble(None, NO_SUCH_FILE)

    assert effective.config == Config()
    assert set(effective.origins.values()) == {"default"}
    assert effective.origins.keys() == {setting.key for setting in SETTINGS}


def test_the_documented_file(file: Path) -> None:
    """It says nothing; each line that is a comment's can be used, and says what is so anyway."""
    assert from_text(file, documented()) == Config()
    lines = documented().splitlines()
    said = [re.sub(r"^# (?=[a-z_]+ = )", "", line) for line in lines]
    config = from_text(file, "\n".join(said))
    examples = {setting.name for setting in SETTINGS if setting.example}

    assert {s.name for s in SETTINGS if getattr(config, s.name) != getattr(Config(), s.name)} == (
        examples
    )
    assert max(map(len, lines)) <= 99


@pytest.mark.parametrize("name", get_args(Command))
def test_options_come_from_the_table(name: Command) -> None:
    """Each setting's option has its description; arrays are repeatable, choices are checked."""
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    parameters = {parameter.name: parameter for parameter in command.params}
    for row in SETTINGS:
        parameter = parameters.get(row.name) if row.option(name) else None
        if isinstance(parameter, click.Option):
            assert parameter.opts == [row.option(name)]
            assert parameter.multiple == row.kind.many
            assert (parameter.help or "").startswith(row.help)
        else:
            assert row.option(name) in ("", "DIR")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve", "--max-age-s", "soon"), "'soon' is not a valid integer"),
        (("serve", "--max-age-s", "-1"), "error: --max-age-s: must be from 0 to 4294967295"),
        (("serve", "--log-format", "loud"), "'loud' is not one of 'auto', 'plain', 'journal'"),
        (("mirror", "coap://a", "x", "--in-flight", "65"), "error: --in-flight: must be from 1"),
    ],
)
async def test_options_that_are_refused(arguments: tuple[str, ...], message: str) -> None:
    """The message names the option and what it may be."""
    code, _, err = await netota(*arguments)
    assert (code, message in err) == (2, True), err


WRONG = [
    ("colour = 1", "colour: unknown key; valid are repository, state, keep_trying, coap, http"),
    ("[coap]\ncolour = 1", "coap.colour: unknown key; valid are bind, multicast"),
    ("[colours]\nred = 1", "colours: unknown key"),
    ('"coap.bind" = ["[::]:1"]', "coap.bind: unknown key"),
    ("coap = 1", "coap: must be a table"),
    ("repository = 1", "repository: must be text, not an integer"),
    ('repository = ""', "repository: must not be empty"),
    ('keep_trying = "yes"', "keep_trying: must be a boolean, not text"),
    ('[coap]\nbind = "[::]:5683"', "coap.bind: must be an array"),
    ("[coap]\nbind = []", "coap.bind: must not be empty"),
    ('[coap]\nbind = ["[::]:1", "h:x"]', "coap.bind[1]: 'h:x': the port must"),
    ("[coap]\nmulticast = [1]", "coap.multicast[0]: must be text, not an integer"),
    ("[coap]\nmax_age_s = true", "coap.max_age_s: must be an integer, not a boolean"),
    ("[coap]\nmax_age_s = 4294967296", "coap.max_age_s: must be from 0 to 4294967295"),
    ("[coap]\nobservers_total = 0", "coap.observers_total: must be from 1 to 10000000"),
    ('[status]\nreaders = ["10.0.0.1/8"]', "status.readers[0]: must be a network, as in"),
    ("[http]\nbind = 8000", "http.bind: must be text, not an integer"),
    ('[http]\nbind = "localhost"', "http.bind: 'localhost': must be HOST:PORT"),
    ('[http]\nprefix = "ota"', "http.prefix: must be a path as in a URL"),
    ('[http]\nprefix = "/ota/"', "http.prefix: must be a path as in a URL"),
    ('[status]\nreaders = [""]', "status.readers[0]: must not be empty"),
    ('[blobs]\ncache = "never"', "blobs.cache: must be one of ahead, on-demand"),
    ('[mirror]\nupstreams = ["ftp://host"]', "mirror.upstreams[0]: must be the URI of"),
    ('[mirror]\nupstreams = ["coap://a/b"]', "mirror.upstreams[0]: must be the URI of"),
    ('[mirror]\nupstreams = ["http://a?b"]', "mirror.upstreams[0]: must be the URI of"),
    ('[mirror]\nupstreams = ["coap://a..b"]', "mirror.upstreams[0]: 'a..b' is not a valid host"),
    (
        '[mirror]\nupstreams = ["coap://a", "http://a/x", "http://A:80/x/"]',
        "mirror.upstreams[2]: is the same as [1]",
    ),
    ("[mirror]\npackages = []", "mirror.packages: must not be empty"),
    ('[mirror]\ndevices = ["x"]', "mirror.devices[0]: must be KEY=VALUE, as in machine="),
    ("[mirror]\npoll_s = 0", "mirror.poll_s: must be from 1 to 4294967295"),
    ('[log]\nlevel = "loud"', "log.level: must be one of debug, info, warning, error"),
    ("[log]\nformat = [1]", "log.format: must be one of auto, plain, journal, json"),
    ("[log", "is not valid TOML"),
]


@pytest.mark.parametrize(("text", "reason"), WRONG, ids=[row[0] for row in WRONG])
def test_what_is_wrong_in_a_file(file: Path, text: str, reason: str) -> None:
    """It is said with file, place and reason."""
    with pytest.raises(InvalidDataError) as caught:
        from_text(file, text)

    assert str(caught.value.issues[0]).startswith(f"{file}: {reason}")


def test_all_at_once(file: Path) -> None:
    """What is wrong in file and environment is listed together; what is ours alone is skipped."""
    file.write_text('x-mine = 1\nkeep_trying = 1\n[coap]\nx-mine = 2\nbind = ["[", "["]\n')
    with pytest.raises(InvalidDataError) as caught:
        assemble(file, {"NETOTA_COAP_LOG_LEVEL": "loud", "NETOTA_COAP_KEEP_TRYING": "1"})

    assert [(issue.file, issue.place) for issue in caught.value.issues] == [
        (str(file), "keep_trying"),
        (str(file), "coap.bind[0]"),
        (str(file), "coap.bind[1]"),
        ("", "NETOTA_COAP_KEEP_TRYING"),
        ("", "NETOTA_COAP_LOG_LEVEL"),
    ]
    assert "config default" in caught.value.hint


# ----------------------------------------------------------------------------------------------
# Layers


def test_options_win_over_environment_over_file(file: Path) -> None:
    """Each value is of the highest layer that has one, and it is known of which."""
    file.write_text(
        'repository = "fleet"\nstate = "/state"\n[coap]\nbind = ["[::]:1"]\nmax_age_s = 1\n'
    )
    environment = {
        "STATE_DIRECTORY": "/var/lib/a:/var/lib/b",
        "NETOTA_COAP_COAP_BIND": "[::]:2 127.0.0.1:2",
        "NETOTA_COAP_COAP_MAX_AGE_S": "2",
        "NETOTA_COAP_KEEP_TRYING": "true",
        "NETOTA_COAP_LOG_LEVEL": "",
        "NETOTA_COAP_SERVICE_HOST": "10.0.0.1",
    }
    effective = assemble(file, environment, {"coap_max_age_s": 3})

    assert effective.config == Config(
        repository=file.parent / "fleet",
        state=Path("/state"),
        coap_bind=("[::]:2", "127.0.0.1:2"),
        coap_max_age_s=3,
        keep_trying=True,
    )
    said = {key: origin for key, origin in effective.origins.items() if origin != "default"}
    assert said == {
        "repository": str(file),
        "state": str(file),
        "coap.bind": "NETOTA_COAP_COAP_BIND",
        "coap.max_age_s": "--max-age-s",
        "keep_trying": "NETOTA_COAP_KEEP_TRYING",
    }


def test_a_layer_takes_back(file: Path) -> None:
    """What is off can be said over what is on."""
    file.write_text('[http]\nbind = "[::]:80"\n[coap]\nmulticast = ["eth0"]\n')
    config = assemble(file, {}, {"http_bind": ""}).config

    assert (config.http_bind, config.coap_multicast) == ("", ("eth0",))


def test_directories_of_the_service_manager(tmp_path: Path) -> None:
    """Where systemd says which directories there are, nothing need be configured."""
    environment = {"CONFIGURATION_DIRECTORY": str(tmp_path), "STATE_DIRECTORY": "/var/lib/x"}
    config = assemble(None, environment).config

    assert (config.repository, config.state) == (Path("/var/lib/x/repository"), Path("/var/lib/x"))
    assert default_file(environment) == tmp_path / "config.toml"
    assert default_file({}) == Path("/etc/netota-coap/config.toml")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"coap_max_age_s": -1}, "--max-age-s: must be from 0"),
        ({"coap_bind": ("[::", "[::]:x")}, r"--bind\[0\]: '\[::': must be HOST:PORT"),
        ({"repository": ""}, "DIR: must not be empty"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, object], reason: str) -> None:
    """They are named as they were typed."""
    with pytest.raises(ConfigError, match=reason):
        assemble(None, NO_SUCH_FILE, options)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A file that is named must be there; what is there must be a file."""
    with pytest.raises(ConfigError, match=r"nix\.toml: does not exist"):
        assemble(tmp_path / "nix.toml", {})
    (tmp_path / "config.toml").mkdir()
    with pytest.raises(ConfigError, match=r"config\.toml: cannot be read: Is a directory"):
        assemble(None, {"CONFIGURATION_DIRECTORY": str(tmp_path)})


def test_a_reload_takes_what_it_can() -> None:
    """What needs a restart stays as it was, and is named."""
    fresh = Config(coap_max_age_s=5, coap_bind=("[::]:1",), log_level="debug", log_format="json")
    taken, waiting = Config().reloaded(fresh)

    assert taken == Config(coap_max_age_s=5, log_level="debug")
    assert waiting == ["coap.bind", "log.format"]
    assert taken.reloaded(taken) == (taken, [])


def test_variables_of_nothing() -> None:
    """What looks like a setting's variable and is none is told, and does no harm."""
    odd = ("NETOTA_COAP_MIRROR_UPSTREAM", "NETOTA_COAP_PORT_5683_UDP", "NETOTA_COAP_SERVICE_HOST")
    environment = dict.fromkeys((*odd, "NETOTA", "NETOTA_COAP_LOG_LEVEL"), "error")
    assert assemble(None, environment).strays == odd[:1]


# ----------------------------------------------------------------------------------------------
# The commands


async def test_commands(file: Path) -> None:
    """check, show and default, as they are typed."""
    code, out, _ = await netota("config", "default")
    file.write_text(out)
    assert code == 0
    assert await netota("config", "check", file) == (0, f"{file}: valid\n", "")
    file.write_text('[log]\nlevel = "error"\n')
    _, out, _ = await netota("config", "show", file, "--json")
    assert json.loads(out)["log.level"] == {"value": "error", "from": str(file)}
    assert json.loads(out)["state"] == {"value": None, "from": "default"}
    _, out, _ = await netota("config", "show", file)
    assert ["log.level", '"error"', str(file)] in [line.split() for line in out.splitlines()]
    file.write_text("[log]\nlevel = 1\ncolour = 1\n")
    code, _, err = await netota("config", "check", file)
    assert (code, err.count(f"error: {file}: log.")) == (3, 2)


async def test_sighup(sample: Path, file: Path) -> None:
    """SIGHUP takes over what can change, names what cannot, and keeps the old if it is faulty."""

    async def max_age(uri: str) -> int:
        async with device(uri) as it:
            return (await it.ask(GET, PATH)).uint(coap.MAX_AGE)

    bind = '[coap]\nbind = ["127.0.0.1:0"]\n'
    file.write_text(f'repository = "{sample}"\n{bind}max_age_s = 9\n')
    environment = {**os.environ, "NETOTA_COAP_LOG_FORMAT": "plain"}
    async with served(None, "--config", str(file), environment=environment) as server:
        assert await max_age(server.uri) == 9
        file.write_text(f'repository = "/tmp"\n{bind}max_age_s = 8\nobservers_total = 1\n')
        server.signal(signal.SIGHUP)
        await until(lambda: any("reloaded" in line for line in server.log))
        assert await max_age(server.uri) == 8
        async with device(server.uri) as one, device(server.uri) as other:
            assert (await one.observe(PATH)).uint(coap.OBSERVE)
            assert (await other.observe(PATH)).uint(coap.OBSERVE) is None
        file.write_text("nonsense")
        server.signal(signal.SIGHUP)
        await until(lambda: sum("reloaded" in line for line in server.log) == 2)
        assert await max_age(server.uri) == 8
        file.write_text(f'repository = "{sample}"\n{bind}[log]\nlevel = "error"\n')
        server.signal(signal.SIGHUP)
        async with asyncio.timeout(PATIENCE_S):
            while await max_age(server.uri) != 60:
                pass

    assert server.log[0] == "WARNING repository: takes effect after a restart"
    assert server.log[2].startswith(
        "ERROR the configuration is refused, the old one stays in effect: "
    )
    assert len(server.log) == 4


async def test_no_repository() -> None:
    """A service that is told of none says how to tell it."""
    code, _, err = await netota("serve", "--config", os.devnull)

    assert code == 2
    assert "error: no repository is configured\nhint: Name it: netota-coap serve DIR" in err


async def test_a_pipe_keeps_nobody_waiting(tmp_path: Path) -> None:
    """Whoever puts one in place of the file has an empty configuration."""
    pipe = tmp_path / "config.toml"
    os.mkfifo(pipe)
    code, _, _ = await netota("config", "check", pipe)
    assert code == 0
