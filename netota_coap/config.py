"""The configuration of a service: one table of settings, and the layers it is put together from.

The table is `Config`: the file, the environment, the options of `serve`, `config default` and
`spec/operation.md` are driven by its rows. Rules for editors of this file: a setting is a field of
`Config`; how its values look is a `Kind`; nothing else knows the key of one.
Source: `spec/operation.md`.
"""

from __future__ import annotations

import ipaddress
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs

from netota_coap.coap.observers import Caps
from netota_coap.coap.server import DEFAULT_MAX_AGE_S, STATUS_READERS
from netota_coap.coap.sockets import DEFAULT_BIND, parse_bind
from netota_coap.errors import ConfigError, InvalidDataError, Issue
from netota_coap.files import at_once
from netota_coap.formats import Format, load, refuse
from netota_coap.holding import DEFAULT_METRIC
from netota_coap.model import LIMITS, Rule, instance, text

FILE = "config.toml"
DIRECTORY = Path("/etc/netota-coap")

Environment = Mapping[str, str]

_NONE: Mapping[str, object] = MappingProxyType({})
_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)+")
_SHOWN = 64  # characters of a key that is unknown
_WIDTH = 95

# ----------------------------------------------------------------------------------------------
# Kinds: how the values of a setting look


@attrs.frozen
class Kind:
    """How the values of a setting look.

    Attributes:
        name: For people.
        decode: From what TOML has, and the directory that paths are relative to, to the value.
        parse: From text of the environment to what TOML would have; what is not of the kind is
            left for `decode` to refuse.
        encode: From the value to what TOML has.
    """

    name: str
    decode: Callable[[Any, Path], Any]
    parse: Callable[[str], Any] = str
    encode: Callable[[Any], Any] = lambda value: value


def _held(rule: Rule, plain: Any) -> Any:
    reason = rule(plain)
    if reason is not None:
        raise refuse(reason)
    return plain


def _directory(plain: Any, base: Path) -> Path:
    return base / str(_held(text("summary"), str(plain) if isinstance(plain, Path) else plain))


def _bind(plain: Any) -> str:
    try:
        parse_bind(_held(text("url"), plain))
    except ConfigError as error:
        raise refuse(error.detail) from error
    return str(plain)


def _http_bind(plain: Any, _base: Path) -> str:
    if not _held(instance(str, "text"), plain):
        return ""
    if not _bind(plain).rpartition(":")[2].isdecimal():
        raise refuse(f"{plain!r}: must be HOST:PORT")
    return str(plain)


def _prefix(plain: Any, _base: Path) -> str:
    path = str(_held(instance(str, "text"), plain))
    if path and not _PREFIX.fullmatch(path):
        raise refuse("must be a path as in a URL, begin with '/' and not end with it")
    return path


def _interface(plain: Any) -> str:
    return str(_held(text("name"), plain))


def _network(plain: Any) -> str:
    try:
        return str(ipaddress.ip_network(_held(text("text"), plain)))
    except InvalidDataError:
        raise
    except ValueError as error:
        raise refuse(f"must be a network, as in 192.0.2.0/24: {error}") from error


def _array(of: str, item: Callable[[Any], str], fewest: int = 0) -> Kind:
    def decode(plain: Any, _base: Path) -> tuple[str, ...]:
        if type(plain) not in (list, tuple):
            raise refuse("must be an array")
        if len(plain) < fewest:
            raise refuse("must not be empty")
        values, issues = [], []
        for index, each in enumerate(plain):
            try:
                values.append(item(each))
            except InvalidDataError as error:
                issues += [issue.inside(f"[{index}]") for issue in error.issues]
        if issues:
            raise InvalidDataError(issues)
        return tuple(values)

    return Kind(f"array of {of}", decode, str.split, list)


def _number(unit: str, low: int, high: int) -> Kind:
    def decode(plain: Any, _base: Path) -> int:
        number = int(_held(instance(int, "an integer"), plain))
        if not low <= number <= high:
            raise refuse(f"must be from {low} to {high}")
        return number

    def parse(given: str) -> int | str:
        return int(given) if given.isascii() and given.isdecimal() and len(given) < 20 else given

    return Kind(f"{unit}, {low} to {high}", decode, parse)


def _choice(*names: str) -> Kind:
    one_of = ", ".join(names)

    def decode(plain: Any, _base: Path) -> str:
        if plain not in names:
            raise refuse(f"must be one of {one_of}")
        return str(plain)

    return Kind(one_of, decode)


PATH = Kind("directory", _directory, encode=str)
HTTP_BIND = Kind("HOST:PORT", _http_bind)
PREFIX = Kind("path", _prefix)
BINDS = _array("HOST:PORT", _bind)
LISTENERS = _array("HOST:PORT", _bind, fewest=1)
INTERFACES = _array("interfaces", _interface)
NETWORKS = _array("networks", _network)
SECONDS = _number("seconds", 0, LIMITS["poll"].value)
COUNT = _number("number", 1, 10_000_000)
METRIC = _number("number", 0, LIMITS["metric"].value)
BOOLEAN = Kind(
    "true or false",
    lambda plain, _: _held(instance(bool, "a boolean"), plain),
    lambda given: {"true": True, "false": False}.get(given, given),
)

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
        return f"NETOTA_COAP_{self.name.upper()}"

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
    coap_tcp: tuple[str, ...] = _setting(
        (),
        "coap.tcp",
        BINDS,
        "Where to listen for CoAP over TCP, for gateways behind NAT. Default: nowhere.",
        example=("[::]:5683",),
        option="--tcp",
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
        _choice("debug", "info", "warning", "error"),
        "What is logged: this and what is worse.",
        at_reload=True,
    )
    log_format: str = _setting(
        "auto",
        "log.format",
        _choice("auto", "plain", "journal", "json"),
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
    """

    config: Config
    origins: Mapping[str, str]


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
    return Effective(Config(**values), origins)


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
        with open(file, "rb", opener=at_once) as stream:
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
    """What is unknown is left alone: container managers make variables of their own."""
    for setting in SETTINGS:
        given = environment.get(setting.variable)
        if given:
            yield _Said(setting, setting.kind.parse(given), setting.variable)


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
