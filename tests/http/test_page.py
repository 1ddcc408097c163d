"""http/page.py, http/page_content.py: what a browser is shown."""

from __future__ import annotations

import shlex
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit

import attrs
import pytest
from hypothesis import given

from netota_coap.catalog.catalog import Catalog
from netota_coap.catalog.resources import StreamResource
from netota_coap.coap import options as coap
from netota_coap.coap.responder import Responder
from netota_coap.encoding.codecs import Format, diagnostic, load
from netota_coap.encoding.documents import selection_from_query
from netota_coap.http import page_content
from netota_coap.model.selection import Selection
from netota_coap.model.values import Archive, Content, Envelope, Offer, Package, Repository, Stream
from netota_coap.repository import history, loading, scaffold
from netota_coap.repository.store import DirectoryStore
from tests.support import publishing
from tests.support.pages import Shown
from tests.support.publishing import NOW, STABLE
from tests.support.strategies import archive_lists

STABLE_PATH = "/p/sensor-node/s/stable"


@pytest.fixture
def shown(repository_dir: Path) -> Shown:
    """The typical repository."""
    return Shown(repository_dir)


def archive(name: str, **content: object) -> Archive:
    envelope = Envelope(type="application/octet-stream", size=1, sha256=bytes(32))
    return Archive(name=name, envelope=envelope, content=Content(**content))


def resource_of(*archives: Archive) -> StreamResource:
    stream = Stream(version="1", sequence=1, published=NOW, archives=archives)
    package = Package(streams={"s": stream})
    catalog = Catalog.of(Repository(format=1, packages={"p": package}))
    found = catalog.find(("p", "p", "s", "s"))
    assert isinstance(found, StreamResource)
    return found


# ---- texts


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3_600, "just now"),
        (59, "just now"),
        (60, "1 minute ago"),
        (7_199, "1 hour ago"),
        (7_200, "2 hours ago"),
        (6 * 86_400, "6 days ago"),
        (70 * 86_400, "2 months ago"),
        (800 * 86_400, "2 years ago"),
    ],
)
def test_age(seconds: int, text: str) -> None:
    """Ages are told in one unit; what the future holds is now."""
    assert text == page_content.age(NOW, NOW + timedelta(seconds=seconds))


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1_000, "1 kB"),
        (229_500, "230 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (150_648_584, "151 MB"),
        (2**63 - 1, "9.22 EB"),
    ],
)
def test_readable_size(size: int, text: str) -> None:
    """Sizes are told in three digits."""
    assert text == page_content.readable_size(size)


@pytest.mark.parametrize(
    ("seconds", "text"), [(1, "1 s"), (90, "90 s"), (600, "10 min"), (86_400, "1 d")]
)
def test_duration(seconds: int, text: str) -> None:
    """Durations are told exactly."""
    assert text == page_content.duration(seconds)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://example.com/", True),
        ("HTTP://example.com/", True),
        ("javascript:alert(1)", False),
        ("data:text/html,x", False),
        ("/b/x", False),
        ("coap://example.com/", False),
    ],
)
def test_is_web(url: str, expected: bool) -> None:
    """Only what leads to the web becomes a link."""
    assert expected == page_content.is_web(url)


@pytest.mark.parametrize(
    ("header", "host"),
    [
        ("gateway.local", "gateway.local"),
        ("localhost:8000", "localhost"),
        ("192.0.2.1:80", "192.0.2.1"),
        ("[2001:db8::1]:8000", "[2001:db8::1]"),
        ("", "HOST"),
        ("a'; rm -rf /", "HOST"),
        ("a$(reboot)", "HOST"),
        ("-oProxyCommand", "HOST"),
        ("x" * 300, "HOST"),
    ],
)
def test_host_of(header: str, host: str) -> None:
    """What a client says that the host is goes into a command only if it is one."""
    assert host == page_content.host_of(header)


@pytest.mark.parametrize(
    ("author", "name"),
    [(None, ""), ("Release team", "Release team"), ("Ada <a@b.c>", "Ada"), ("a@b.c", "")],
)
def test_name_of(author: str | None, name: str) -> None:
    """Mail addresses are nobody's business."""
    assert name == page_content.name_of(author)


# ---- what devices get


def test_columns() -> None:
    """Only attributes that are said have a column; free ones come last."""
    archives = [
        archive("a", arch="arm", attributes={"ram": 1}),
        archive("b", type="t", debug=True),
    ]
    assert page_content.columns(archives) == ("type", "arch", "debug", "ram")
    assert page_content.columns([archive("c")]) == ()


def test_kinds_are_as_coap_answers(repository_dir: Path) -> None:
    """Number and notation of the bytes are those that a device gets over CoAP."""
    catalog = Catalog.of(loading.Loader(repository_dir).load())
    resource = catalog.find(("p", "sensor-node", "s", "stable"))
    assert isinstance(resource, StreamResource)
    for kind in page_content.kinds(resource, "gateway"):
        uri = urlsplit(shlex.split(kind.commands[0])[1])
        options = [(coap.URI_PATH, part.encode()) for part in uri.path.split("/")[1:]]
        options += [(coap.URI_QUERY, unquote(part).encode()) for part in uri.query.split("&")]
        _, tail = Responder(catalog).answer(tuple(options), None)
        payload = coap.decode(tail)[1]
        assert (kind.size, kind.notation) == (
            len(payload),
            diagnostic(load(payload, Format.CBOR)),
        )
        assert (len(kind.archives), kind.more) == (1, False)


@given(archive_lists)
def test_commands_say_what_the_device_is(archives: list[Archive]) -> None:
    """Whatever attributes hold, a shell gives each command the selection, and nothing else."""
    resource = resource_of(*archives)
    served = resource.stream.archives or ()
    selections = list(dict.fromkeys(Selection.of(each.content.all()) for each in served))
    kinds = page_content.kinds(resource, "[::1]")
    for selection, kind in zip(selections or [Selection()], kinds, strict=False):
        program, uri = shlex.split(kind.commands[0])
        query = [unquote(part) for part in urlsplit(uri).query.split("&") if part]
        assert (program, urlsplit(uri).fragment) == ("aiocoap-client", "")
        assert selection_from_query(query) == selection
        words = shlex.split(kind.commands[1])
        assert words[:3] == ["netota-coap", "watch", "coap://[::1]/p/p/s/s"]
        assert selection_from_query(words[4::2]) == selection


def test_many_kinds() -> None:
    """Of a thousand kinds of devices, the first are shown."""
    resource = resource_of(*(archive(f"a{n}", machine=f"m{n}") for n in range(200)))
    assert len(page_content.kinds(resource, "h")) == page_content.MOST_KINDS


def test_history(repository_dir: Path) -> None:
    """Each state says what changed, and who was left without a build."""
    sources = [(archive("nrf52840", machine="nrf52840dk", arch="arm"))]
    present = publishing.served(repository_dir)

    def make(_stream: Stream | None) -> Stream:
        return attrs.evolve(present, version="9", archives=tuple(sources))

    publishing.change(repository_dir, STABLE, make)
    publishing.close(repository_dir, STABLE)
    publishing.remove(repository_dir, STABLE)
    removed, closed, shrunk, *_ = page_content.history(
        STABLE, history.history(repository_dir, STABLE)
    )
    assert (removed.summary, closed.summary) == ("1 removed, removed", "closed")
    assert (shrunk.version, shrunk.summary) == ("2.4.1 → 9", "1 rebuilt, 5 removed")
    assert shrunk.lost == ("arch=arm machine=nrf9160dk", "arch=riscv machine=xiao_esp32c3")


# ---- pages


async def test_index(shown: Shown) -> None:
    """All packages and streams, with their branding, links, ages and observers."""
    shown.observers["p", "sensor-node", "s", "stable"] = 1_234
    page = await shown.page("/")
    assert page.one("title").text == "Devices of the Example Company"
    titles = [title.text for title in page.one("main").all("h2")]
    assert titles == ["Gateway OS", "Sensor node"]
    rows = [row.text for row in page.one("section", aria_labelledby="sensor-node").all("tr")]
    assert rows[0] == "StreamVersionSequencePublishedObserversState"
    assert rows[3].startswith("stable Stable 2.4.1 17 ")
    assert rows[3].endswith(" ago 1,234 open")
    assert rows[4].endswith("closed → sensor-node/stable")
    links = {link.attributes["href"] for link in page.one("main").all("a")}
    assert {STABLE_PATH, "https://example.com/products/sensor-node"} < links
    times = page.one("section", aria_labelledby="sensor-node").all("time")
    assert times[2].attributes == {
        "datetime": "2026-11-20T09:30:00+00:00",
        "title": "2026-11-20 09:30:00 UTC",
    }
    assert page.one("b", data_live="observers").text == "1,234"
    assert "netota-coap 1.2.3, started 2 hours ago" in page.one("footer").text


async def test_stream(shown: Shown) -> None:
    """Archives by content, their files and offers, what devices get, commands and history."""
    page = await shown.page(STABLE_PATH)
    assert page.one("h1").text == "Stable sensor-node/stable"
    table = page.one("table")
    assert [cell.text for cell in table.one("thead").all("th")] == [
        *("Archive", "type", "arch", "machine", "debug", "Size")
    ]
    body = table.one("tbody", id="archive-nrf52840")
    cells = [cell.text for cell in body.all("tr")[0].all("td")]
    assert cells == ["zephyr-image", "arm", "nrf52840dk", "false", "201 kB"]
    digest = "315686e6fd68a8573dcb25d0104e16125d38673a97730bdbb3feaa02036cffce"
    assert body.one("button").attributes["data-copy"] == digest == body.one("code").text
    assert "application/octet-stream, 201,180 bytes" in body.text
    assert [offer.text for offer in body.one("ol").all("li")] == [
        "10 coap://example.com/2.4.1/nrf52840",
        "100 https://example.org/2.4.1/nrf52840",
    ]
    assert [link.text for link in body.all("a")] == ["https://example.org/2.4.1/nrf52840"]
    kind = page.one("details", id="kind-1")
    assert kind.one("summary").text == (
        "type=zephyr-image arch=riscv machine=xiao_esp32c3 debug=false 193 bytes"
    )
    assert kind.one("pre").text.startswith('{ 1: "2.4.1", 2: 17,')
    query = "type=zephyr-image&arch=riscv&machine=xiao_esp32c3&debug=false"
    command = f"aiocoap-client 'coap://gateway{STABLE_PATH}?{query}'"
    assert kind.all("code")[0].text == command
    assert kind.all("button")[0].attributes["data-copy"] == command
    states = page.one("ol", class_="history").all("li", class_="")
    state = page.one("li", id="state-17")
    assert state.one("div").text.startswith("17 2.4.0 → 2.4.1 6 rebuilt ")
    assert state.one("p").text == "Fixes the clock after a brown-out — Release team"
    assert states == []


async def test_closed_stream(shown: Shown) -> None:
    """What replaces a closed stream is linked."""
    banner = (await shown.page("/p/sensor-node/s/v1")).one("section", aria_label="Closed")
    assert banner.one("a").attributes["href"] == STABLE_PATH


@pytest.mark.parametrize("path", ["/p/sensor-node/s/none", "/p/%3Cb%3E/s/x%2Fy", "/p/p/s/"])
async def test_gone(shown: Shown, path: str) -> None:
    """Where no stream is, a page says so."""
    answer = await shown.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (
        404,
        "text/html; charset=utf-8",
    )
    assert "Stream not found" in answer.text
    assert "<b>" not in answer.text.partition("<main")[2]


async def test_empty_repository(tmp_path: Path) -> None:
    """What is empty says so: repository, package, stream, offers."""
    scaffold.init(tmp_path)
    shown = Shown(tmp_path)
    assert "Nothing has been published yet." in (await shown.page("/")).text
    DirectoryStore(tmp_path).write_package("p", Package())
    shown.reload()
    assert "No streams yet." in (await shown.page("/")).text

    def make(*archives: Archive) -> None:
        state = Stream(version="1", sequence=1, published=NOW, archives=archives)
        publishing.change(tmp_path, ("p", "s"), lambda _: state)
        shown.reload()

    make()
    page = await shown.page("/p/p/s/s")
    assert "There are no archives: devices learn that nothing suits them." in page.text
    assert page.one("summary").text == "any device 14 bytes"
    make(archive("a", machine="m"), archive("b", debug=True))
    page = await shown.page("/p/p/s/s")
    assert [cell.text for cell in page.one("tbody", id="archive-a").all("td")[:2]] == ["m", "any"]
    assert "This archive has no offer, so no device can download it." in page.text


async def test_more_than_is_shown(tmp_path: Path) -> None:
    """Of many kinds of devices and many states the first are shown, and that there are more."""
    scaffold.init(tmp_path)
    many = tuple(archive(f"a{number}", machine=f"m{number}") for number in range(60))
    for number in range(page_content.MOST_STATES + 2):
        state = Stream(version=f"{number}", sequence=1, published=NOW, archives=many)
        publishing.change(tmp_path, ("p", "s"), lambda _, state=state: state)
    page = await Shown(tmp_path).page("/p/p/s/s")
    states = [item for item in page.all("li") if (item.attributes.get("id") or "").strip()]
    assert len(states) == page_content.MOST_STATES
    assert "Only the first 50 kinds are shown." in page.text
    assert "lists older states." in page.text


async def test_left_out(tmp_path: Path) -> None:
    """What a device does not get in one datagram is told."""
    scaffold.init(tmp_path)
    offers = tuple(Offer(url=f"coap://h/{'x' * 200}{n}", metric=n) for n in range(2))
    state = Stream(
        version="1",
        sequence=1,
        published=NOW,
        archives=(attrs.evolve(archive("a"), offers=offers),),
    )
    publishing.change(tmp_path, ("p", "s"), lambda _: state)
    assert (
        "Something is left out to fit: more tells" in (await Shown(tmp_path).page("/p/p/s/s")).text
    )


async def test_history_that_cannot_be_read(shown: Shown) -> None:
    """A broken history breaks no page, and nothing about files is told to everybody."""
    present = shown.root / "packages/sensor-node/streams/stable.toml"
    present.write_text("version = 1")
    page = await shown.page(STABLE_PATH)
    assert "The history cannot be read; netota-coap check says why." in page.text
    assert str(shown.root) not in page.text


async def test_without_history(repository_dir: Path) -> None:
    """Where there are no files, there is no history."""
    page = await Shown(repository_dir, options={"root": None}).page(STABLE_PATH)
    assert [h2.text for h2 in page.all("h2")] == ["Archives", "What a device gets"]


@pytest.mark.parametrize("path", ["/", STABLE_PATH, "/p/no/s/no"])
async def test_refused(shown: Shown, path: str) -> None:
    """Each page says when what is on disk is refused; what else is wrong only that it is."""
    shown.issues = ("a.toml: <b>bad</b>", "b.toml: \u202eworse")
    shown.troubles = ("/var/lib/secret: No space left on device",)
    main = (await shown.page(path)).one("main")
    refused = main.one("section", aria_labelledby="refused")
    assert [item.text for item in refused.all("li")] == [
        "a.toml: <b>bad</b>",
        "b.toml: \\u202eworse",
    ]
    assert "netota-coap status" in main.one("section", aria_label="Problem").text
    assert "secret" not in main.text


# ---- hostile texts

HOSTILE = {
    "script": "<script>alert(1)</script>",
    "attribute": "\"'><img src=x onerror=alert(2)>",
    "direction": "\u202eevil\u202c \u2066x",
    "template": "{{ 7 * 7 }} {% raw %} &amp;",
    "longest": "W" * 64,
}
TAGS = {"", "html", "head", "meta", "title", "link", "script", "body", "a", "header", "ul", "ol"}
TAGS |= {"li", "b", "p", "main", "section", "h1", "h2", "div", "table", "caption", "thead", "tr"}
TAGS |= {"th", "tbody", "td", "bdi", "small", "time", "span", "footer", "nav", "dl", "dt", "dd"}
TAGS |= {"code", "abbr", "button", "details", "summary", "svg", "rect", "pre", "img", "strong"}


def hostile(root: Path, text: str) -> None:
    """Put a text everywhere where a publisher can."""
    web, bad = "https://example.com/\"'><script>alert(3)</script>", "javascript:alert(4)"
    package = Package(title=text, summary=text, homepage=bad, poll_s=1)
    DirectoryStore(root).write_package("evil", package)
    offers = (Offer(url=bad, metric=1), Offer(url=web, metric=2), Offer(url="/b/x", metric=3))
    content = Content(type=text, arch=text, machine=text, attributes={"free": text})
    envelope = Envelope(type=text, size=2**63 - 1, sha256=bytes(32))
    archives = (Archive(name="a" * 32, envelope=envelope, content=content, offers=offers),)
    for number in range(2):
        state = Stream(
            version=text,
            sequence=1,
            published=NOW,
            title=text,
            author=text,
            message=f"{number}{text}",
            archives=archives,
        )
        publishing.change(root, ("evil", "s" * 32), lambda _, state=state: state)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
async def test_hostile_texts_stay_text(tmp_path: Path, text: str) -> None:
    """Whatever publishers write is shown as they wrote it, and is nothing but text."""
    scaffold.init(tmp_path, title=text)
    hostile(tmp_path, text)
    shown = Shown(tmp_path)
    visible = " ".join(str(page_content.shown(text)).split())
    for path, times in (("/", 6), (f"/p/evil/s/{'s' * 32}", 16)):
        page = await shown.page(path)
        assert page.tags() <= TAGS
        assert not {name for name in page.attribute_names() if name.startswith("on")}
        assert [script.text for script in page.all("script")] == [""]
        assert page.text.count(visible) >= times
        assert "\u202e" not in page.text
        for link in page.all("a"):
            assert (link.attributes["href"] or "").startswith(("https://", "/", "#"))
            outside = (link.attributes["href"] or "").startswith("https://")
            assert outside == ("noopener" in (link.attributes.get("rel") or ""))


# ---- HTTP


async def test_headers(shown: Shown) -> None:
    """A page runs and loads nothing but its own; and is asked for anew each time."""
    answer = await shown.get("/")
    assert answer.headers["content-security-policy"] == (
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
        "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    expected = ("Accept", "no-cache", "nosniff")
    names = ("vary", "cache-control", "x-content-type-options")
    assert tuple(answer.headers[name] for name in names) == expected
    # It started when it did, although two clocks never tell the same second for long.
    shown.site.status = lambda: attrs.evolve(shown.status(), uptime_s=7_201)
    again = await shown.get("/", If_None_Match=answer.headers["etag"])
    assert (again.status_code, again.content) == (304, b"")
    assert (await shown.get("/", method="HEAD")).headers["etag"] == answer.headers["etag"]


@pytest.mark.parametrize(
    ("path", "accept", "media_type"),
    [
        ("/", "text/html,application/xhtml+xml,*/*;q=0.8", "text/html; charset=utf-8"),
        (STABLE_PATH, "text/html,*/*;q=0.8", "text/html; charset=utf-8"),
        (STABLE_PATH, "*/*", "application/json"),
        (STABLE_PATH, "", "application/json"),
        (STABLE_PATH, "application/json, text/html", "application/json"),
        (STABLE_PATH, "application/cbor", "application/cbor"),
        ("/p", "text/html,*/*;q=0.8", "application/json"),
    ],
)
async def test_who_gets_a_page(shown: Shown, path: str, accept: str, media_type: str) -> None:
    """Browsers get pages, programs what they got before."""
    assert media_type == (await shown.get(path, accept)).headers["content-type"]


async def test_prefix(repository_dir: Path) -> None:
    """Behind a reverse proxy, all that a page refers to carries the prefix."""
    shown = Shown(repository_dir, options={"prefix": "/ota"})
    for path in ("/", STABLE_PATH, "/p/sensor-node/s/v1"):
        page = await shown.page(path)
        refers = [each.attributes["href"] for tag in ("a", "link") for each in page.all(tag)]
        refers += [each.attributes["src"] for tag in ("img", "script") for each in page.all(tag)]
        refers += [page.one("body").attributes["data-live"]]
        assert [
            each for each in refers if each and not each.startswith(("/ota/", "https://", "#"))
        ] == []


async def test_static_files(shown: Shown) -> None:
    """What pages need may be kept for ever: another state of it has another URL."""
    page = await shown.page("/")
    for path in (page.one("script").attributes["src"], page.all("link")[1].attributes["href"]):
        assert path
        answer = await shown.get(path, "*/*")
        assert answer.status_code == 200
        assert "immutable" in answer.headers["cache-control"]
    for path in (
        "/static",
        "/static/",
        "/static/../page.py",
        "/static/x",
        "/static/%2e%2e/page.py",
    ):
        assert (await shown.get(path, "*/*")).status_code == 404
