"""Run the README's two commands in new minimal Debians, as root and as an ordinary user.

A system has Python, git, and what of this machine tells how registries are reached. It is a
temporary directory, and what runs there reaches nothing of this machine but the network. What is
not committed is not looked at. It takes root, and some 4 GB of disk.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

PROJECT = Path(__file__).parent.parent
HOMES = {"root": "root", "ordinary": "home/ordinary"}
LAST_LINES = 60

# How this machine reaches registries.
FILES = (
    *("etc/hosts", "etc/resolv.conf", "etc/ssl/certs/ca-certificates.crt"),
    *("usr/local/share/ca-certificates", "etc/apt/auth.conf", "etc/apt/auth.conf.d"),
    *("etc/pip.conf", "etc/xdg/pip"),
)
FILES_OF_USER = (".config/pip", ".pip")
VARIABLES = re.compile(r"PIP_.*|SSL_CERT_.*|.*_CA_BUNDLE|(?i:[a-z]+_proxy)")
APT_OPTIONS = re.compile(r"^Acquire::(?:https?|ftp|Check|Retries|ForceIPv).*\n", re.MULTILINE)

# Process 1 stays the shell: few signals reach process 1, and it takes in orphans.
ENTER = """\
mount --bind "$1" "$1"
cd "$1"; shift
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
mount -t tmpfs tmpfs dev/shm
mkdir -p .host
pivot_root . .host
umount -l .host
"$@"
exit
"""


def output(*command: str) -> str:
    """Run a command here; what it prints."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"check_fresh: {shlex.join(command)}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def carry(here: Path, there: Path, paths: tuple[str, ...]) -> None:
    """Copy files and directories of this machine, those that are there."""
    for path in filter(lambda path: (here / path).exists(), paths):
        (there / path).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(("cp", "-rL", here / path, (there / path).parent), check=True)


def make(root: Path, release: str) -> None:
    """Make a minimal Debian, from where this machine has its own."""
    own = platform.freedesktop_os_release()["VERSION_CODENAME"]
    targets = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
    told = output("apt-get", "indextargets", "--format", targets, "Created-By: Packages")
    sources = re.findall(rf"^(\S+) {own}(|-updates|-security) (\S+)$", told, re.MULTILINE)
    if not sources:
        sys.exit(f"check_fresh: apt has no source of {own} here: add one in /etc/apt")
    script = "/usr/share/debootstrap/scripts/sid"  # it may not know the release by name
    included, uri = "--include=python3,git", next(uri for uri, suite, _ in sources if not suite)
    output("debootstrap", "--variant=minbase", included, release, str(root), uri, script)
    carry(Path("/"), root, FILES)
    text = "".join(f"deb {uri} {release}{suite} {part}\n" for uri, suite, part in sources)
    (root / "etc/apt/sources.list").write_text(text)
    options = APT_OPTIONS.findall(output("apt-config", "dump"))
    (root / "etc/apt/apt.conf.d/machine").write_text("".join(options))
    # Else a daemon that is installed would be started, in this machine's network.
    policy = root / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)


def run(root: Path, user: str, command: str) -> tuple[int, str]:
    """Run a command line in a Debian, in the clone; its exit code and its last lines."""
    passed = [f"{name}={value}" for name, value in os.environ.items() if VARIABLES.fullmatch(name)]
    path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    inside = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", ENTER, "sh")
    by = ("chroot", f"--userspec={user}:{user}", "/", "env", "-i", path, f"HOME=/{HOMES[user]}")
    with subprocess.Popen(
        (*inside, root, *by, *passed, "sh", "-c", f"cd; cd netota_coap 2>/dev/null; {command}"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        try:
            lines = deque(process.stdout, LAST_LINES)
        except BaseException:
            process.kill()
            process.stdout.read()  # until the last process in there has died
            raise
    return process.returncode, "".join(lines)


def check(root: Path, release: str, user: str, test: str) -> list[str]:
    """Do in a Debian as a newcomer does.

    Returns:
        A row for each command, with FAILED where it did.
    """
    rows = []

    def step(who: str, line: str) -> None:
        begun = time.monotonic()
        code, last = run(root, who, line)
        state, took = "FAILED" if code else "ok", time.monotonic() - begun
        rows.append(f"{release:<9} {user:<9} {state:<6} {took:4.0f} s  {line[:60]}")
        print(rows[-1], *([last] if code else []), sep="\n", flush=True)

    run(root, "root", "useradd --create-home ordinary")
    carry(Path.home(), root / HOMES[user], FILES_OF_USER)
    output("git", "clone", "-q", str(PROJECT), str(root / HOMES[user] / "netota_coap"))
    run(root, "root", f"chown -R {user}: /{HOMES[user]}")
    for what, command in (("run", "tools/demo --once"), ("dev", test)):
        # Who is not root is told what root is to install.
        told = run(root, user, f"tools/setup {what}")[1] if user != "root" else ""
        if asked := re.search(r"as root: (apt-get install .*)", told):
            step("root", f"{asked[1]} -y".replace("apt-get", "apt-get update && apt-get"))
        step(user, command)
    return rows


def end(*_: object) -> None:
    """Let the temporary directory be removed, undisturbed by more signals."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit("check_fresh: ended by a signal")


def main() -> None:
    """Check each release, as each user."""
    parser = argparse.ArgumentParser(prog="tools/check_fresh", description=__doc__)
    parser.add_argument("--user", choices=HOMES, help="only as one of them")
    parser.add_argument("--fast", action="store_true", help="run tools/test --fast")
    parser.add_argument("release", nargs="*", help="of Debian; by default bookworm and trixie")
    given = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("check_fresh: only root can make a Debian: sudo tools/check_fresh")
    if shutil.which("debootstrap") is None:
        output("sh", "-c", "apt-get update && apt-get install -y debootstrap")
    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    rows = []
    with tempfile.TemporaryDirectory(prefix="netota-fresh-") as directory:
        for release in given.release or ("bookworm", "trixie"):
            base = Path(directory, release)
            print(f"{release}: debootstrap …", flush=True)
            make(base, release)
            for user in [given.user] if given.user else HOMES:
                root = Path(directory, f"{release}-{user}")
                output("cp", "-a", str(base), str(root))
                rows += check(root, release, user, f"tools/test{' --fast' if given.fast else ''}")
                shutil.rmtree(root)
    print("", *rows, sep="\n")
    sys.exit(any("FAILED" in row for row in rows))


if __name__ == "__main__":
    main()
