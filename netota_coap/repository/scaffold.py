"""Creates a repository, with files for git and for people. Source: rules P-40 and P-41."""

from __future__ import annotations

from pathlib import Path

from netota_coap.encoding.codecs import Format
from netota_coap.encoding.documents import encode
from netota_coap.errors import RepositoryConflictError
from netota_coap.files import make_directory, write, writing
from netota_coap.model.values import FORMAT, Repository
from netota_coap.repository import lock

_ATTRIBUTES = """\
# Files are the same bytes on each system. Streams are merged as text, whatever git is told
# elsewhere: two branches that changed the same one conflict, and a file with the marks of a
# conflict in it is malformed, so that no server takes it.
*.toml text eol=lf merge
*.md text eol=lf
"""

_README = """\
# {title}

What devices are supposed to run, as plain files: a repository of netota-coap, which serves this
directory and tells devices of each change. A package has streams, and a stream holds one version:

- `packages/<package>/streams/<stream>.toml`: what the stream holds now;
- `packages/<package>/history/<stream>/<sequence>.toml`: every state that it ever held;
- `blobs/`: the files themselves, as far as they are stored here. Not in git.

## Day by day

```sh
netota-coap list .
netota-coap publish . PKG/STREAM --release release.toml -m 'why'
netota-coap rollback . PKG/STREAM -m 'why'
netota-coap check .
git add --all && git commit
```

With `--dry-run`, publish and rollback only say what would change, and for which devices. Check
before each push. `netota-coap spec publishing` describes the rest.

## History is write-once

Each change of a stream raises its `sequence`, and devices ignore a sequence that they have seen.
So never edit or delete what is in `history/`, and never take back a commit that others have seen.

- To go back to what a stream held before: `netota-coap rollback`, not `git revert`.
- A publish was reverted all the same: revert the revert, then `netota-coap rollback`.

## Branches

Branches that changed different streams merge. Two that changed the same stream conflict, for both
took the same sequence. Take one side (of a stream that one of them removed, the other) and publish
what is wanted anew:

```sh
git checkout --ours -- packages/PKG && git add --all && git commit
netota-coap publish . PKG/STREAM --release release.toml -m 'why'
netota-coap check .
git add --all && git commit
```
"""

_NOT_IN_GIT = (b"/" + lock.FILE.encode(), b"/blobs/", b".*.tmp")


def init(root: Path, title: str | None = None) -> None:
    """Make an empty repository, ready to be kept in git; files that are there stay.

    Raises:
        InvalidDataError: The title breaks its rule.
        RepositoryConflictError: There is a repository already.
        RepositoryError: It cannot be written.
    """
    if (root / "repository.toml").exists():
        raise RepositoryConflictError(f"{root}: there is a repository already")
    top = encode(Repository(format=FORMAT, title=title), Format.TOML)
    with writing(root):
        make_directory((root / "packages").absolute())
        readme = _README.format(title=title or "A repository of netota-coap")
        for name, text in ((".gitattributes", _ATTRIBUTES), ("README.md", readme)):
            if not (root / name).exists():
                write(root / name, text.encode())
        ignored = root / ".gitignore"
        lines = ignored.read_bytes().splitlines() if ignored.exists() else []
        lines += [line for line in _NOT_IN_GIT if line not in lines]
        write(ignored, b"\n".join(lines) + b"\n")
        write(root / "repository.toml", top)
