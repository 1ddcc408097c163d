"""Reads the states that a stream had from its history files."""

from __future__ import annotations

from pathlib import Path

from netota_coap.errors import InvalidDataError, Issue, NotFoundError, RepositoryError
from netota_coap.model.values import Stream, StreamName
from netota_coap.repository.layout import history_file, read_file, recorded, stream_file
from netota_coap.repository.loading import collect, read, sequence_issues
from netota_coap.repository.lock import require_repository


def last_before_removal(root: Path, name: StreamName) -> Stream | None:
    """Return the last state of a stream that has no stream file; None: it never existed."""
    found = recorded(root, name)
    traces = interrupted(root, name, None, found)
    sequence = next((each for each in reversed(found) if each not in traces), None)
    return None if sequence is None else recorded_state(root, name, sequence)


def interrupted(
    root: Path, name: StreamName, present: Stream | None, sequences: list[int]
) -> list[int]:
    """Return the sequences whose changes were interrupted. Source: rule R-11.

    Without a stream file, these are the ones after the last removal. Without a removal there are
    none: the stream file was deleted by hand (decision 0003).
    """
    if present:
        return [each for each in sequences if each > present.sequence]
    after: list[int] = []
    for sequence in reversed(sequences):
        if recorded_state(root, name, sequence).removed:
            return after
        after.append(sequence)
    return []


def history(root: Path, name: StreamName, most: int | None = None) -> list[Stream]:
    """Return the `most` newest states of a stream, newest first; a removal is one, too.

    Raises:
        NotFoundError: There never was such a stream.
    """
    present, past = _sequences(root, name)
    states = [present] if present else []
    wanted = past if most is None else past[: most - len(states)]
    return states + [recorded_state(root, name, sequence) for sequence in wanted]


def _sequences(root: Path, name: StreamName) -> tuple[Stream | None, list[int]]:
    """Return the present state and the recorded sequences before it, newest first."""
    require_repository(root)
    present, found = read(root, name)[1], recorded(root, name)
    if not present and not found:
        raise NotFoundError(
            f"{root}: there is no stream {'/'.join(name)}, and never was",
            hint=f"List the streams: netota-coap list {root}",
        )
    left_out = [*interrupted(root, name, present, found), present.sequence if present else 0]
    return present, [each for each in reversed(found) if each not in left_out]


def recorded_state(root: Path, name: StreamName, sequence: int) -> Stream:
    """Return the state in one history file."""
    path = history_file(root, name, sequence)
    try:
        return read_file(Stream, path, path.relative_to(root).as_posix())[1]
    except FileNotFoundError:
        # A publisher has just removed the trace of an interrupted change.
        raise RepositoryError(f"{path}: changed while it was read", hint="Try again.") from None


def history_issues(
    root: Path, name: StreamName, stream: Stream
) -> tuple[list[Issue], list[Issue]]:
    """Return the errors and the warnings about a history. Source: rules R-9, R-11 and R-12."""
    errors: list[Issue] = []
    warnings: list[Issue] = []
    for sequence in collect(errors, lambda: recorded(root, name)):
        path = history_file(root, name, sequence)
        file = path.relative_to(root).as_posix()
        try:
            _, state = read_file(Stream, path, file)
        except FileNotFoundError:
            continue  # a publisher has just replaced an interrupted publish
        except InvalidDataError as error:
            errors.extend(error.issues)
            continue
        if state.sequence != sequence:
            errors.append(Issue("sequence", f"must be {sequence}, as the file's name says", file))
        elif sequence > stream.sequence:
            reason = (
                "is above the stream's sequence: an interrupted publish, which the next replaces"
            )
            warnings.append(Issue("", reason, file))
        elif sequence == stream.sequence:
            file = stream_file(root, name).relative_to(root).as_posix()
            errors.extend(sequence_issues(state, stream, file))
    return errors, warnings


def state_at(root: Path, name: StreamName, sequence: int) -> Stream:
    """Return the state that a stream had at a sequence.

    Raises:
        NotFoundError: The stream never had that sequence, or its history lacks it.
    """
    present, past = _sequences(root, name)
    if present and present.sequence == sequence:
        return present
    if sequence not in past:
        raise NotFoundError(
            f"{root}: the history of {'/'.join(name)} has no sequence {sequence}",
            hint=f"Show its history: netota-coap log {root} {'/'.join(name)}",
        )
    return recorded_state(root, name, sequence)
