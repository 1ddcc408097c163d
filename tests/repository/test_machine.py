"""Whatever publishers and hands do to a repository, a long-lived loader serves the right thing."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import attrs
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from netota_coap.encoding.codecs import Format
from netota_coap.encoding.documents import encode
from netota_coap.errors import InvalidDataError, NotFoundError, RepositoryConflictError
from netota_coap.model.values import Stream, StreamName
from netota_coap.repository.check import check
from netota_coap.repository.loading import Loader
from netota_coap.repository.scaffold import init
from tests.support.publishing import NOW, close, promote, publish, remove, reopen, rollback
from tests.support.strategies import fewer

pytestmark = pytest.mark.slow

NAMES: tuple[StreamName, ...] = (("a", "stable"), ("a", "beta"), ("b", "stable"))
names = st.sampled_from(NAMES)
versions = st.sampled_from(["1.0", "1.1", "2.0"])


def essence(stream: Stream) -> tuple[object, ...]:
    """Return what of these streams needs a higher sequence; the rest of them never differs."""
    return stream.sequence, stream.version, stream.closed, stream.removed


def regressed(old: Stream | None, new: Stream) -> bool:
    """Tell whether one state must not follow another."""
    return old is not None and new.sequence <= old.sequence and essence(old) != essence(new)


class RepositoryMachine(RuleBasedStateMachine):
    """The model: per stream, what its file says, its history, and what was served at last.

    Attributes:
        disk: What the files say, or said before they were damaged.
        damaged: The streams whose files are cut off.
        history: Per stream, sequence to state.
        served: What must be served until a load goes well again.
        seen: Per stream, the last state that was ever served.
    """

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        init(self.root)
        self.loader = Loader(self.root)
        self.disk: dict[StreamName, Stream] = {}
        self.damaged: set[StreamName] = set()
        self.history: dict[StreamName, dict[int, Stream]] = {name: {} for name in NAMES}
        self.served: dict[StreamName, Stream] = {}
        self.seen: dict[StreamName, Stream] = {}

    def teardown(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.root)

    def file(self, name: StreamName) -> str:
        """Return the stream's file."""
        return f"packages/{name[0]}/streams/{name[1]}.toml"

    def next(self, name: StreamName) -> int:
        """Return the sequence that the next change must have."""
        present = self.disk.get(name)
        return 1 + max([0, *self.history[name], *([present.sequence] if present else [])])

    def write(self, file: str, data: bytes) -> None:
        """Write a file by hand, without any care."""
        path = self.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def changed(self, name: StreamName, expected: Stream, state: Stream) -> None:
        """Take note of a change that went well."""
        assert attrs.evolve(expected, sequence=self.next(name)) == state
        present = self.disk.get(name)
        # What is above the present state, or above a removal, was interrupted.
        removals = [n for n, was in self.history[name].items() if was.removed]
        last = present.sequence if present else max(removals, default=2**32)
        kept = {n: was for n, was in self.history[name].items() if n <= last}
        if present:
            kept.setdefault(present.sequence, present)
        self.history[name] = {**kept, state.sequence: state}
        self.disk[name] = state
        if state.removed:
            del self.disk[name]

    # ------------------------------------------------------------------------------------------
    # What publishers do

    @rule(name=names, version=versions)
    def publish(self, name: StreamName, version: str) -> None:
        present = self.disk.get(name)
        if name in self.damaged:
            with pytest.raises(InvalidDataError):
                publish(self.root, name, version, [], now=NOW)
        elif present and (present.closed or present.version == version):
            with pytest.raises(RepositoryConflictError):
                publish(self.root, name, version, [], now=NOW)
        else:
            title = present.title if present else None
            fresh = Stream(version=version, sequence=1, published=NOW, archives=(), title=title)
            self.changed(name, fresh, publish(self.root, name, version, [], now=NOW))

    @rule(name=names, closing=st.booleans())
    def close_or_reopen(self, name: StreamName, closing: bool) -> None:
        change = close if closing else reopen
        present = self.disk.get(name)
        if name in self.damaged:
            with pytest.raises(InvalidDataError):
                change(self.root, name)
        elif not present:
            with pytest.raises(NotFoundError):
                change(self.root, name)
        elif present.closed == closing:
            with pytest.raises(RepositoryConflictError):
                change(self.root, name)
        else:
            expected = attrs.evolve(present, closed=closing, changed=NOW, message=None)
            self.changed(name, expected, change(self.root, name))

    @rule(name=names)
    def remove(self, name: StreamName) -> None:
        present = self.disk.get(name)
        if name in self.damaged:
            with pytest.raises(InvalidDataError):
                remove(self.root, name)
        elif not present:
            with pytest.raises(NotFoundError):
                remove(self.root, name)
        else:
            expected = attrs.evolve(present, removed=True, closed=False, changed=NOW, message=None)
            self.changed(name, expected, remove(self.root, name))

    @rule(name=names)
    def rollback(self, name: StreamName) -> None:
        present = self.disk.get(name)
        last = present.sequence if present else 2**32
        older = sorted(n for n in self.history[name] if n < last)
        states = [self.history[name][n] for n in reversed(older)]
        if not present:
            # What is above the removal was interrupted.
            end = next((at for at, state in enumerate(states) if state.removed), 0)
            states = states[end:]
        held = [state for state in states if not state.removed]
        wanted = next((s for s in held if not present or s.version != present.version), None)
        if name in self.damaged:
            with pytest.raises(InvalidDataError):
                rollback(self.root, name)
        elif present and present.closed:
            with pytest.raises(RepositoryConflictError):
                rollback(self.root, name)
        elif wanted is None:
            with pytest.raises(NotFoundError):
                rollback(self.root, name)
        else:
            title = present.title if present else None
            fresh = Stream(
                version=wanted.version,
                sequence=1,
                published=NOW,
                archives=(),
                title=title,
                message=f"rollback to sequence {wanted.sequence}",
            )
            self.changed(name, fresh, rollback(self.root, name))

    @rule(giver=names, taker=names)
    def promote(self, giver: StreamName, taker: StreamName) -> None:
        given, present = self.disk.get(giver), self.disk.get(taker)
        if self.damaged & {giver, taker}:
            with pytest.raises((InvalidDataError, RepositoryConflictError)):
                promote(self.root, giver, taker)
        elif giver == taker or (present and present.closed):
            with pytest.raises(RepositoryConflictError):
                promote(self.root, giver, taker)
        elif not given:
            with pytest.raises(NotFoundError):
                promote(self.root, giver, taker)
        elif present and present.version == given.version:
            with pytest.raises(RepositoryConflictError):
                promote(self.root, giver, taker)
        else:
            title = present.title if present else None
            fresh = attrs.evolve(given, changed=None, closed=False, title=title, message=None)
            self.changed(taker, fresh, promote(self.root, giver, taker))

    @rule(name=names, version=versions)
    def interrupt(self, name: StreamName, version: str) -> None:
        """A publisher is killed between history file and stream file."""
        sequence = self.next(name)
        state = Stream(version=version, sequence=sequence, published=NOW, archives=())
        directory = f"packages/{name[0]}/history/{name[1]}"
        self.write(f"{directory}/{sequence:08}.toml", encode(state, Format.TOML))
        self.history[name][sequence] = state

    # ------------------------------------------------------------------------------------------
    # What hands do

    @rule(
        name=names,
        version=versions,
        rise=st.integers(-2, 2),
        title=st.sampled_from([None, "One", "Two"]),
        closed=st.booleans(),
    )
    def edit(
        self, name: StreamName, version: str, rise: int, title: str | None, closed: bool
    ) -> None:
        present = self.disk.get(name)
        sequence = max(1, (present.sequence if present else 0) + rise)
        state = Stream(
            version=version,
            sequence=sequence,
            published=NOW,
            archives=(),
            title=title,
            closed=closed,
        )
        self.write(self.file(name), encode(state, Format.TOML))
        self.disk[name] = state
        self.damaged.discard(name)

    @precondition(lambda self: self.disk)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.disk)))
        whole = encode(self.disk[name], Format.TOML)
        self.write(self.file(name), whole[: data.draw(st.integers(0, 40))])
        self.damaged.add(name)

    @precondition(lambda self: self.damaged)
    @rule(data=st.data())
    def mend(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.damaged)))
        self.write(self.file(name), encode(self.disk[name], Format.TOML))
        self.damaged.remove(name)

    @precondition(lambda self: self.disk)
    @rule(data=st.data())
    def unlink(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.disk)))
        (self.root / self.file(name)).unlink()
        del self.disk[name]
        self.damaged.discard(name)

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        """The last state that was served comes back, as from a backup."""
        name = data.draw(st.sampled_from(sorted(self.seen)))
        self.write(self.file(name), encode(self.seen[name], Format.TOML))
        self.disk[name] = self.seen[name]
        self.damaged.discard(name)

    # ------------------------------------------------------------------------------------------
    # What must hold

    @rule()
    def reload(self) -> None:
        wrong = {n for n, state in self.disk.items() if regressed(self.seen.get(n), state)}
        wrong = {self.file(name) for name in wrong | self.damaged}
        if wrong:
            with pytest.raises(InvalidDataError) as raised:
                self.loader.load()
            assert wrong == {issue.file for issue in raised.value.issues}
            return
        packages = self.loader.load().packages
        self.served = {
            (package, name): state
            for package, value in packages.items()
            for name, state in value.streams.items()
        }
        assert self.disk == self.served
        assert not [n for n, state in self.served.items() if regressed(self.seen.get(n), state)]
        self.seen |= self.served

    @invariant()
    def check_tells_what_is_wrong(self) -> None:
        findings = check(self.root)
        errors = {issue.file for issue in findings.errors}
        if self.damaged:
            assert {self.file(name) for name in self.damaged} == errors
            return
        contradicted = {
            self.file(name)
            for name, state in self.disk.items()
            if regressed(self.history[name].get(state.sequence), state)
        }
        assert contradicted == errors
        interrupted = {
            f"packages/{name[0]}/history/{name[1]}/{sequence:08}.toml"
            for name, state in self.disk.items()
            for sequence in self.history[name]
            if sequence > state.sequence
        }
        bereft = {
            f"packages/{name[0]}/history/{name[1]}"
            for name, states in self.history.items()
            if states and name not in self.disk and not any(s.removed for s in states.values())
        }
        assert interrupted | bereft == {issue.file for issue in findings.warnings}


RepositoryMachine.TestCase.settings = fewer(3, stateful_step_count=30)
test_repository_machine = RepositoryMachine.TestCase
