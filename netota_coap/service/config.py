"""The configuration of a service: a table of settings, and the layers that give them values.

The table is `Config`. Its rows drive the file, the environment, the options of `serve` and
`mirror`, `config default` and `spec/operation.md`. Rules for editors of this file: a setting is a
field of `Config`; a kind of `setting_types.py` says how its values are written; nothing else
knows its key.
Source: `spec/operation.md`.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import attrs

from netota_coap.encoding.codecs import Format, load
from netota_coap.errors import ConfigError, InvalidDataError, Issue
from netota_coap.files import open_nonblocking
from netota_coap.model.values import (
    BLOB_METRIC,
    DEFAULT_MAX_AGE_S,
    LIMITS,
    OBSERVERS_IN_TOTAL,
    OBSERVERS_PER_ADDRESS,
    OBSERVERS_PER_STREAM,
    STATUS_READERS,
    UPSTREAM_POLL_S,
)
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
Command = Literal["serve", "mirror"]

_NONE: Mapping[str, object] = MappingProxyType({})
_VARIABLE = "NETOTA_COAP_"
# Kubernetes sets these for a service named netota-coap.
_OF_CONTAINER_MANAGERS = (f"{_VARIABLE}PORT", f"{_VARIABLE}SERVICE_")
_SHOWN = 64  # characters of an unknown key in its error message
_SECTION_NAMES = ("coap", "http", "blobs", "mirror", "status", "log")
_WIDTH = 95  # of the comments in the documented file


@attrs.frozen
class Setting:
    """One row of the table."""

    name: str  # of the attribute of `Config`
    kind: Kind
    help: str  # sentences for operators, in documents and `--help`
    example: str | tuple[str, ...] = ""  # for documents, if there is no default value
    serve: str = ""  # its option in `netota-coap serve`, or the metavar of its argument
    mirror: str = ""  # its option in `netota-coap mirror`
    at_reload: bool = False  # whether a reload applies it; otherwise it needs a restart

    @property
    def key(self) -> str:
        """The key in the file, after its section and a dot."""
        section, _, key = self.name.partition("_")
        return f"{section}.{key}" if section in _SECTION_NAMES else self.name

    @property
    def variable(self) -> str:
        """The name of its environment variable."""
        return f"{_VARIABLE}{self.name.upper()}"

    def option(self, command: Command) -> str:
        """Return its option of a command, or the metavar of its argument; "" if none."""
        return {"serve": self.serve, "mirror": self.mirror}[command]

    @property
    def default(self) -> Any:
        """The default as a TOML value; None if there is an example instead."""
        return None if self.example else self.plain(Config())

    def plain(self, config: Config) -> Any:
        """Return its value as a TOML value; None if it is not set."""
        value = getattr(config, self.name)
        return None if value is None else self.kind.encode(value)


@attrs.frozen(kw_only=True)
class Config:
    """What the operator sets; each attribute is a row of the table."""

    repository: Path | None = PATH.setting(
        None,
        "Directory of the repository to serve. Default: $STATE_DIRECTORY/repository, if systemd "
        "sets it.",
        example="/var/lib/netota-coap/repository",
        serve="DIR",
    )
    state: Path | None = PATH.setting(
        None,
        "Directory where observers and sequence numbers are kept across restarts. Default: "
        "$STATE_DIRECTORY; without it they are not kept.",
        example="/var/lib/netota-coap",
        serve="--state",
    )
    keep_trying: bool = BOOLEAN.setting(
        False,
        "Wait for a valid repository if there is none at the start, instead of exiting.",
        serve="--keep-trying",
    )
    coap_bind: tuple[str, ...] = LISTENERS.setting(
        ("[::]:5683",),
        "Addresses to listen on for CoAP over UDP; port 0 picks a free port.",
        serve="--bind",
    )
    coap_multicast: tuple[str, ...] = INTERFACES.setting(
        (),
        "Answer multicast discovery on these interfaces. Default: none.",
        example=("eth0",),
        serve="--multicast",
    )
    coap_max_age_s: int = SECONDS.setting(
        DEFAULT_MAX_AGE_S,
        "How long caches may keep an answer, over CoAP and HTTP, seconds.",
        serve="--max-age-s",
        at_reload=True,
    )
    coap_observers_total: int = COUNT.setting(
        OBSERVERS_IN_TOTAL,
        "Limit of observers; further devices get an answer, but no notifications.",
        at_reload=True,
    )
    coap_observers_per_stream: int = COUNT.setting(
        OBSERVERS_PER_STREAM, "Limit of observers of one stream.", at_reload=True
    )
    coap_observers_per_address: int = COUNT.setting(
        OBSERVERS_PER_ADDRESS,
        "Limit of observers from one address, which many devices may share.",
        at_reload=True,
    )
    http_bind: str = HTTP_BIND.setting(
        "",
        "Address to listen on for HTTP. Default: none.",
        example="localhost:8000",
        serve="--http",
    )
    http_prefix: str = PREFIX.setting(
        "", "Path prefix under which a reverse proxy offers the service, as in /ota."
    )
    blobs_metric: int = METRIC.setting(
        BLOB_METRIC,
        "Metric of the offers that the server adds for files it stores; lowest metric preferred.",
        at_reload=True,
    )
    blobs_cache: str = choice("ahead", "on-demand").setting(
        "ahead",
        "When to fetch files that other servers offer: ahead, from upstreams before devices hear "
        "of them; or on-demand, each when the first device asks for it.",
    )
    blobs_limit_bytes_s: int = BYTES.setting(
        0,
        "Download limit for all files together, bytes per second; 0 = unlimited.",
        mirror="--limit-bytes-s",
    )
    blobs_keep_free: int = BYTES.setting(
        0,
        "Disk space to keep free, bytes; a file that would leave less is not fetched.",
        mirror="--keep-free",
    )
    blobs_size_cap: int = BYTES.setting(
        0,
        "Size of all stored files together, bytes, above which unused files are deleted, longest "
        "unused first; 0 = unlimited.",
        mirror="--size-cap",
    )
    blobs_in_flight: int = WINDOW.setting(
        1,
        "Blocks to request at the same time over CoAP; more are faster where the round-trip time "
        "is long, and as many are fetched again after a crash.",
        mirror="--in-flight",
    )
    mirror_upstreams: tuple[str, ...] = UPSTREAMS.setting(
        (),
        "Servers whose streams are copied into the repository. Default: none.",
        example=("coap://updates.example.com",),
    )
    mirror_packages: tuple[str, ...] = PATTERNS.setting(
        ("*",), "Packages to copy, as shell patterns of their names.", mirror="--package"
    )
    mirror_streams: tuple[str, ...] = PATTERNS.setting(
        ("*",), "Streams to copy, as shell patterns of their names.", mirror="--stream"
    )
    mirror_devices: tuple[str, ...] = PARAMETERS.setting(
        (),
        "Attributes of the devices served here, as in their queries: a device has any of the "
        "values of one key, and all of the keys. Files that suit none are not fetched ahead. "
        "Default: all are fetched.",
        example=("machine=nrf52840dk", "machine=nrf9160dk"),
    )
    mirror_announce: str = choice("fetched", "at-once").setting(
        "fetched",
        "When devices hear of a new state: fetched, once its files are stored; or at-once, "
        "before that.",
        mirror="--announce",
    )
    mirror_poll_s: int = PERIOD.setting(
        UPSTREAM_POLL_S, "Ask an upstream again after so many seconds without news from it."
    )
    status_readers: tuple[str, ...] = NETWORKS.setting(
        STATUS_READERS, "Networks from which /status may be read over CoAP.", at_reload=True
    )
    log_level: str = choice("debug", "info", "warning", "error").setting(
        "info", "Log messages of this level and above.", at_reload=True
    )
    log_format: str = choice("auto", "plain", "journal", "json").setting(
        "auto",
        "Format of the log; auto is journal under systemd, and plain elsewhere.",
        serve="--log-format",
    )

    def reloaded(self, fresh: Config) -> tuple[Config, list[str]]:
        """Apply the settings of a fresh configuration that can change while serving.

        Returns:
            The new configuration, and the keys of changed settings that need a restart.
        """
        now = {row.name: getattr(fresh, row.name) for row in SETTINGS if row.at_reload}
        taken = attrs.evolve(self, **now)
        waiting = [s.key for s in SETTINGS if getattr(taken, s.name) != getattr(fresh, s.name)]
        return taken, waiting


SETTINGS = tuple(Setting(field.name, **field.metadata) for field in attrs.fields(Config))
"""The rows of the table, grouped by section."""

_BY_NAME = {setting.name: setting for setting in SETTINGS}
_SECTIONS: dict[str, dict[str, Setting]] = {}
for _row in SETTINGS:
    _section, _, _key = _row.key.rpartition(".")
    _SECTIONS.setdefault(_section, {})[_key] = _row


@attrs.frozen
class Effective:
    """A configuration with all layers applied, and where each value comes from."""

    config: Config
    origins: Mapping[str, str]  # key → file, variable, option, or `default`
    strays: tuple[str, ...] = ()  # `NETOTA_COAP_` variables that belong to no setting

    def shown(self) -> dict[str, tuple[Any, str]]:
        """Return key → value as a TOML value, and its origin."""
        return {s.key: (s.plain(self.config), self.origins[s.key]) for s in SETTINGS}


@attrs.frozen
class _Given:
    """A value that one layer gives to one setting."""

    setting: Setting
    plain: Any  # a TOML value
    place: str  # the key, variable or option that gave it
    file: Path | None = None  # if it was a key

    def value(self) -> Any:
        """Decode the value; if it is refused, the error names file and place."""
        try:
            return self.setting.kind.decode(self.plain, self.file.parent if self.file else Path())
        except InvalidDataError as error:
            inside = (issue.inside(self.place) for issue in error.issues)
            file = str(self.file or "")
            raise InvalidDataError(attrs.evolve(issue, file=file) for issue in inside) from error


def default_file(environment: Environment) -> Path:
    """Return the file to read if none is named."""
    return (_of_manager(environment, "CONFIGURATION_DIRECTORY") or DIRECTORY) / FILE


def assemble(
    file: Path | None, environment: Environment, options: Mapping[str, object] = _NONE
) -> Effective:
    """Assemble a configuration: options over environment over file over defaults.

    Args:
        file: None for the default file, which may be missing.
        environment: Variables of the process.
        options: Options of `serve`: attribute of `Config` → value.

    Raises:
        ConfigError: The file cannot be read, or an option is refused.
        InvalidDataError: Values of file or environment are refused; it has an issue for each.
    """
    issues: list[Issue] = []
    values: dict[str, Any] = {}
    origins = dict.fromkeys((setting.key for setting in SETTINGS), "default")
    for given in (
        *_from_manager(environment),
        *_from_file(file or default_file(environment), issues, may_be_missing=file is None),
        *_from_environment(environment),
    ):
        try:
            values[given.setting.name] = given.value()
        except InvalidDataError as error:
            issues += error.issues
        origins[given.setting.key] = str(given.file or given.place)
    values |= decode_options(options, "serve")
    origins |= {_BY_NAME[name].key: _BY_NAME[name].serve for name in options}
    if issues:
        raise InvalidDataError(issues, hint="All keys: netota-coap config default")
    return Effective(Config(**values), origins, tuple(_strays(environment)))


def decode_options(options: Mapping[str, object], command: Command) -> dict[str, Any]:
    """Return the values of options, by attribute of `Config`.

    Raises:
        ConfigError: A value is refused.
    """
    given = [(_BY_NAME[name], plain) for name, plain in options.items()]
    try:
        return {row.name: _Given(row, plain, row.option(command)).value() for row, plain in given}
    except InvalidDataError as error:
        raise ConfigError(error.detail) from error


def _of_manager(environment: Environment, variable: str) -> Path | None:
    """Return the first directory that the service manager made and named in a variable."""
    directory = environment.get(variable, "").partition(":")[0]
    return Path(directory) if directory else None


def _from_manager(environment: Environment) -> Iterator[_Given]:
    state = _of_manager(environment, "STATE_DIRECTORY")
    if state:
        yield _Given(_BY_NAME["repository"], state / "repository", "$STATE_DIRECTORY")
        yield _Given(_BY_NAME["state"], state, "$STATE_DIRECTORY")


def _from_file(file: Path, issues: list[Issue], *, may_be_missing: bool) -> Iterator[_Given]:
    try:
        # Opening a pipe must not block the service.
        with open(file, "rb", opener=open_nonblocking) as stream:
            data = stream.read(LIMITS["document"].value + 1)
        plain = load(data, Format.TOML)
    except FileNotFoundError as error:
        if may_be_missing:
            return
        raise ConfigError(f"{file}: does not exist") from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    except InvalidDataError as error:
        issues += (attrs.evolve(issue, file=str(file)) for issue in error.issues)
        return
    yield from _from_table(file, plain, "", issues)


def _from_table(
    file: Path, plain: Mapping[str, Any], section: str, issues: list[Issue]
) -> Iterator[_Given]:
    known = _SECTIONS[section]
    for key, item in plain.items():
        place = f"{section}.{key}" if section else key
        if key.startswith("x-"):
            continue
        if key in known:
            yield _Given(known[key], item, place, file)
        elif not section and key and key in _SECTIONS:
            if type(item) is dict:
                yield from _from_table(file, item, key, issues)
            else:
                issues.append(Issue(place, "must be a table", str(file)))
        else:
            keys = ", ".join((*known, *(() if section else filter(None, _SECTIONS))))
            issues.append(Issue(place[:_SHOWN], f"unknown key; valid are {keys}", str(file)))


def _from_environment(environment: Environment) -> Iterator[_Given]:
    for setting in SETTINGS:
        given = environment.get(setting.variable)
        if given:
            yield _Given(setting, setting.kind.parse(given), setting.variable)


def _strays(environment: Environment) -> Iterator[str]:
    """Yield unknown variables. They are no error: container managers set some of their own."""
    known = {setting.variable for setting in SETTINGS}
    for name in sorted(environment.keys() - known):
        if name.startswith(_VARIABLE) and not name.startswith(_OF_CONTAINER_MANAGERS):
            yield name


def documented() -> str:
    """Return a file with every key and its default or example, commented out, and its help."""
    lines = [
        "# Configuration of netota-coap serve. Each value is the default, or an example.",
        "# Environment variables override this file; options of the command override both.",
    ]
    for section, known in _SECTIONS.items():
        lines += ["", f"[{section}]"] if section else []
        for key, setting in known.items():
            plain = setting.example or setting.plain(Config())
            effect = "at a reload" if setting.at_reload else "at a restart"
            lines += ["", *(f"# {line}" for line in textwrap.wrap(setting.help, _WIDTH))]
            lines += [f"# {setting.variable}; takes effect {effect}."]
            # JSON writes these values as TOML does; tomli_w would put arrays on many lines.
            lines += [f"# {key} = {json.dumps(plain)}"]
    return "\n".join(lines) + "\n"
