"""The configuration of a service: one table of settings, and the layers it is put together from.

The table is `Config`: the file, the environment, the options of `serve`, `config default` and
`spec/operation.md` are driven by its rows. Rules for editors of this file: a setting is a field of
`Config`; how its values look is a kind of `kinds.py`; nothing else knows the key of one.
Source: `spec/operation.md`.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs

from netota_coap.catalog.local_blobs import DEFAULT_METRIC
from netota_coap.coap.observe.table import Caps
from netota_coap.coap.responder import DEFAULT_MAX_AGE_S
from netota_coap.coap.site import STATUS_READERS
from netota_coap.coap.sockets import DEFAULT_BIND
from netota_coap.encoding.codecs import Format, load
from netota_coap.errors import ConfigError, InvalidDataError, Issue
from netota_coap.files import open_nonblocking
from netota_coap.model.values import LIMITS
from netota_coap.service.setting_types import (
    BOOLEAN,
    BYTES,
    COUNT,
    HTTP_BIND,
    INTERFACES,
    LISTENERS,
    METRIC,
    NETWORKS,
    PARAMETERS,
    PATH,
    PATTERNS,
    PERIOD,
    PREFIX,
    SECONDS,
    UPSTREAMS,
    WINDOW,
    Kind,
    choice,
)

FILE = "config.toml"
DIRECTORY = Path("/etc/netota-coap")

Environment = Mapping[str, str]

_NONE: Mapping[str, object] = MappingProxyType({})
_VARIABLE = "NETOTA_COAP_"
_OF_CONTAINER_MANAGERS = (f"{_VARIABLE}PORT", f"{_VARIABLE}SERVICE_")  # of a service of this name
_SHOWN = 64  # characters of a key that is unknown
_WIDTH = 95

# ----------------------------------------------------------------------------------------------
# The table


@attrs.frozen
class Setting:
    """One row of the table.

    Attributes:
        key: In the file, with its section.
        kind: How its values look.
        help: What it is for.
        example: Of plain data, where the default is that nothing is said.
        option: Of `netota-coap serve`, or its argument, or "".
        at_reload: Whether it takes effect at a reload; if not, it needs a restart.
    """

    key: str
    kind: Kind
    help: str
    example: str | tuple[str, ...] = ""
    option: str = ""
    at_reload: bool = False

    @property
    def name(self) -> str:
        """The attribute of `Config`."""
        return self.key.replace(".", "_")

    @property
    def variable(self) -> str:
        """The environment variable."""
        return f"{_VARIABLE}{self.name.upper()}"

    def plain(self, config: Config) -> Any:
        """Return its value as TOML and JSON have it; None: there is none."""
        value = getattr(config, self.name)
        return None if value is None else self.kind.encode(value)


_SETTING = "netota_coap.setting"


def _setting(default: object, key: str, kind: Kind, help: str, **more: Any) -> Any:  # noqa: A002
    return attrs.field(default=default, metadata={_SETTING: Setting(key, kind, help, **more)})


@attrs.frozen(kw_only=True)
class Config:
    """What a service is told by its operator; the attributes are the rows of the table."""

    repository: Path | None = _setting(
        None,
        "repository",
        PATH,
        "What is served. Default: $STATE_DIRECTORY/repository, where systemd sets it.",
        example="/var/lib/netota-coap/repository",
        option="DIR",
    )
    state: Path | None = _setting(
        None,
        "state",
        PATH,
        "Where observers and sequences are remembered over a restart. Default: $STATE_DIRECTORY; "
        "without it nothing is remembered.",
        example="/var/lib/netota-coap",
        option="--state",
    )
    keep_trying: bool = _setting(
        False,
        "keep_trying",
        BOOLEAN,
        "Wait for a repository that can be served, if it cannot at the start, instead of exiting.",
        option="--keep-trying",
    )
    coap_bind: tuple[str, ...] = _setting(
        (DEFAULT_BIND,),
        "coap.bind",
        LISTENERS,
        "Where to listen for CoAP over UDP; port 0 is any free one.",
        option="--bind",
    )
    coap_multicast: tuple[str, ...] = _setting(
        (),
        "coap.multicast",
        INTERFACES,
        "Interfaces on which the server can be found by multicast. Default: none.",
        example=("eth0",),
        option="--multicast",
    )
    coap_max_age_s: int = _setting(
        DEFAULT_MAX_AGE_S,
        "coap.max_age_s",
        SECONDS,
        "How long caches may keep an answer, over CoAP and HTTP.",
        option="--max-age-s",
        at_reload=True,
    )
    coap_observers_total: int = _setting(
        Caps().total,
        "coap.observers_total",
        COUNT,
        "Observations at most.",
        at_reload=True,
    )
    coap_observers_per_stream: int = _setting(
        Caps().path,
        "coap.observers_per_stream",
        COUNT,
        "Observations of one stream at most.",
        at_reload=True,
    )
    coap_observers_per_address: int = _setting(
        Caps().address,
        "coap.observers_per_address",
        COUNT,
        "Observations from one address at most; there may be many devices behind it.",
        at_reload=True,
    )
    http_bind: str = _setting(
        "",
        "http.bind",
        HTTP_BIND,
        "Where to listen for HTTP. Default: nowhere.",
        example="localhost:8000",
        option="--http",
    )
    http_prefix: str = _setting(
        "",
        "http.prefix",
        PREFIX,
        "Of all paths where clients see them, behind a reverse proxy, as in /ota.",
    )
    blobs_metric: int = _setting(
        DEFAULT_METRIC,
        "blobs.metric",
        METRIC,
        "Of the offers that the server adds for files that it holds itself; lowest preferred.",
        at_reload=True,
    )
    blobs_cache: str = _setting(
        "ahead",
        "blobs.cache",
        choice("ahead", "on-demand"),
        "When files are fetched that others offer: ahead, by following upstreams, before devices "
        "hear of them; or on-demand, each when the first device asks for it.",
    )
    blobs_limit_bytes_s: int = _setting(
        0,
        "blobs.limit_bytes_s",
        BYTES,
        "Of what is fetched, all together, per second; 0: no limit.",
    )
    blobs_keep_free: int = _setting(
        0,
        "blobs.keep_free",
        BYTES,
        "What is to stay free on the disk: nothing is fetched that would leave less.",
    )
    blobs_size_cap: int = _setting(
        0,
        "blobs.size_cap",
        BYTES,
        "Of all files together: those leave that no stream holds any more, the oldest first; 0: "
        "no cap.",
    )
    blobs_in_flight: int = _setting(
        1,
        "blobs.in_flight",
        WINDOW,
        "Blocks that are asked for at a time over CoAP: more are faster where the way is long, "
        "and as many are asked for again after a kill.",
    )
    mirror_upstreams: tuple[str, ...] = _setting(
        (),
        "mirror.upstreams",
        UPSTREAMS,
        "Servers whose streams are taken over into the repository. Default: none.",
        example=("coap://updates.example.com",),
    )
    mirror_packages: tuple[str, ...] = _setting(
        ("*",),
        "mirror.packages",
        PATTERNS,
        "Packages that are taken over: patterns of their names, as of a shell.",
    )
    mirror_streams: tuple[str, ...] = _setting(
        ("*",), "mirror.streams", PATTERNS, "Streams that are taken over, likewise."
    )
    mirror_devices: tuple[str, ...] = _setting(
        (),
        "mirror.devices",
        PARAMETERS,
        "What the devices here say about themselves, as in their queries: of one key, either "
        "value; of several keys, all of them. Files that suit none are not fetched ahead. "
        "Default: all are fetched.",
        example=("machine=nrf52840dk", "machine=nrf9160dk"),
    )
    mirror_announce: str = _setting(
        "fetched",
        "mirror.announce",
        choice("fetched", "at-once"),
        "When devices hear of a new state: once its files are here, or before that.",
    )
    mirror_poll_s: int = _setting(
        300,
        "mirror.poll_s",
        PERIOD,
        "After so many seconds of silence upstreams are asked, too.",
    )
    status_readers: tuple[str, ...] = _setting(
        STATUS_READERS,
        "status.readers",
        NETWORKS,
        "Networks from which /status may be read over CoAP.",
        at_reload=True,
    )
    log_level: str = _setting(
        "info",
        "log.level",
        choice("debug", "info", "warning", "error"),
        "What is logged: this and what is worse.",
        at_reload=True,
    )
    log_format: str = _setting(
        "auto",
        "log.format",
        choice("auto", "plain", "journal", "json"),
        "How it is logged: auto is journal under systemd's journal, and plain elsewhere.",
        option="--log-format",
    )

    @property
    def caps(self) -> Caps:
        """How many observers there may be."""
        return Caps(
            total=self.coap_observers_total,
            path=self.coap_observers_per_stream,
            address=self.coap_observers_per_address,
        )

    def reloaded(self, fresh: Config) -> tuple[Config, list[str]]:
        """Take from a fresh configuration what can take effect now.

        Returns:
            The configuration, and the keys of what differs still and needs a restart.
        """
        now = {
            setting.name: getattr(fresh, setting.name) for setting in SETTINGS if setting.at_reload
        }
        taken = attrs.evolve(self, **now)
        waiting = [s.key for s in SETTINGS if getattr(taken, s.name) != getattr(fresh, s.name)]
        return taken, waiting


SETTINGS: tuple[Setting, ...] = tuple(f.metadata[_SETTING] for f in attrs.fields(Config))
"""The rows of the table, sections together."""

_BY_NAME = {setting.name: setting for setting in SETTINGS}
_SECTIONS: dict[str, dict[str, Setting]] = {}
for _row in SETTINGS:
    _section, _, _key = _row.key.rpartition(".")
    _SECTIONS.setdefault(_section, {})[_key] = _row

# ----------------------------------------------------------------------------------------------
# Layers


@attrs.frozen
class Effective:
    """A configuration, and where each value comes from.

    Attributes:
        config: With all layers.
        origins: By key: a file, a variable, an option, or `default`.
        strays: Variables that may have been meant for a setting, and are none's.
    """

    config: Config
    origins: Mapping[str, str]
    strays: tuple[str, ...] = ()


@attrs.frozen
class _Said:
    """What one layer says of one setting.

    Attributes:
        setting: That is meant.
        plain: As TOML would have it.
        place: Key, variable or option.
        file: Where the key stands, or None.
    """

    setting: Setting
    plain: Any
    place: str
    file: Path | None = None

    def value(self) -> Any:
        """Return the value.

        Raises:
            InvalidDataError: With file and place.
        """
        try:
            return self.setting.kind.decode(self.plain, self.file.parent if self.file else Path())
        except InvalidDataError as error:
            inside = (issue.inside(self.place) for issue in error.issues)
            file = str(self.file or "")
            raise InvalidDataError(attrs.evolve(issue, file=file) for issue in inside) from error


def default_file(environment: Environment) -> Path:
    """Return the file that is read where none is named."""
    return (_of_manager(environment, "CONFIGURATION_DIRECTORY") or DIRECTORY) / FILE


def assemble(
    file: Path | None, environment: Environment, options: Mapping[str, object] = _NONE
) -> Effective:
    """Put a configuration together: options over environment over file over defaults.

    Args:
        file: None: the default one, which may be missing.
        environment: Of the process.
        options: By attribute of `Config`; what is not given is left out.

    Raises:
        ConfigError: The file cannot be read, or an option not be used.
        InvalidDataError: With all that is wrong in file and environment.
    """
    issues: list[Issue] = []
    values: dict[str, Any] = {}
    origins = dict.fromkeys((setting.key for setting in SETTINGS), "default")
    for said in (
        *_from_manager(environment),
        *_from_file(file or default_file(environment), issues, may_be_missing=file is None),
        *_from_environment(environment),
        *(_Said(_BY_NAME[name], plain, _BY_NAME[name].option) for name, plain in options.items()),
    ):
        try:
            values[said.setting.name] = said.value()
        except InvalidDataError as error:
            if said.place == said.setting.option:
                raise ConfigError(error.detail) from error
            issues += error.issues
        origins[said.setting.key] = str(said.file or said.place)
    if issues:
        raise InvalidDataError(issues, hint="All keys: netota-coap config default")
    return Effective(Config(**values), origins, tuple(_strays(environment)))


def _of_manager(environment: Environment, variable: str) -> Path | None:
    """Return the directory that the service manager made; of several, the first."""
    directory = environment.get(variable, "").partition(":")[0]
    return Path(directory) if directory else None


def _from_manager(environment: Environment) -> Iterator[_Said]:
    state = _of_manager(environment, "STATE_DIRECTORY")
    if state:
        yield _Said(_BY_NAME["repository"], state / "repository", "$STATE_DIRECTORY")
        yield _Said(_BY_NAME["state"], state, "$STATE_DIRECTORY")


def _from_file(file: Path, issues: list[Issue], *, may_be_missing: bool) -> Iterator[_Said]:
    try:
        # A pipe must not keep the service waiting.
        with open(file, "rb", opener=open_nonblocking) as stream:
            data = stream.read(LIMITS["document"].value + 1)
        plain = load(data, Format.TOML)
    except FileNotFoundError as error:
        if may_be_missing:
            return
        raise ConfigError(f"{file}: is not there") from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    except InvalidDataError as error:
        issues += (attrs.evolve(issue, file=str(file)) for issue in error.issues)
        return
    yield from _from_table(file, plain, "", issues)


def _from_table(
    file: Path, plain: Mapping[str, Any], section: str, issues: list[Issue]
) -> Iterator[_Said]:
    known = _SECTIONS[section]
    for key, item in plain.items():
        place = f"{section}.{key}" if section else key
        if key.startswith("x-"):
            continue
        if key in known:
            yield _Said(known[key], item, place, file)
        elif not section and key and key in _SECTIONS:
            if type(item) is dict:
                yield from _from_table(file, item, key, issues)
            else:
                issues.append(Issue(place, "must be a table", str(file)))
        else:
            there = ", ".join((*known, *(() if section else filter(None, _SECTIONS))))
            issues.append(Issue(place[:_SHOWN], f"unknown key; there is {there}", str(file)))


def _from_environment(environment: Environment) -> Iterator[_Said]:
    for setting in SETTINGS:
        given = environment.get(setting.variable)
        if given:
            yield _Said(setting, setting.kind.parse(given), setting.variable)


def _strays(environment: Environment) -> Iterator[str]:
    """Yield what is unknown: no error, for container managers make variables of their own."""
    known = {setting.variable for setting in SETTINGS}
    for name in sorted(environment.keys() - known):
        if name.startswith(_VARIABLE) and not name.startswith(_OF_CONTAINER_MANAGERS):
            yield name


# ----------------------------------------------------------------------------------------------
# For people


def documented() -> str:
    """Return the file that says what is so anyway: every key, with its comment."""
    lines = [
        "# The configuration of netota-coap serve. Each value is the default, or an example.",
        "# A variable of the environment wins over this file, an option of the command over both.",
    ]
    for section, known in _SECTIONS.items():
        lines += ["", f"[{section}]"] if section else []
        for key, setting in known.items():
            plain = setting.example or setting.plain(Config())
            effect = "at a reload" if setting.at_reload else "at a restart"
            lines += ["", *(f"# {line}" for line in textwrap.wrap(setting.help, _WIDTH))]
            lines += [f"# {setting.variable}; takes effect {effect}."]
            # Of these kinds of values, TOML's text is JSON's; and tomli_w's arrays are long.
            lines += [f"# {key} = {json.dumps(plain)}"]
    return "\n".join(lines) + "\n"
