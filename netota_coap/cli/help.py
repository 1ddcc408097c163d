"""Commands that print texts: the specification, and scripts for shells."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from netota_coap.cli.common import command


@command("spec wire")
@click.argument("name", required=False)
def spec(name: str | None) -> None:
    """Without NAME, the names of all documents are printed."""
    documents = {
        path.relative_to(root).as_posix(): path
        for root in [Path(str(importlib.resources.files("netota_coap") / "spec"))]
        for path in sorted(root.rglob("*"))
        if path.suffix in (".md", ".cddl")
    }
    if name is None:
        for document in documents:
            click.echo(document)
        return
    found = documents.get(name) or documents.get(f"{name}.md") or documents.get(f"{name}.cddl")
    if found is None:
        raise click.UsageError(f"no document {name!r}; choose from {', '.join(documents)}")
    click.echo(found.read_text(encoding="utf-8").rstrip("\n"))


@command("completion bash > ~/.local/share/bash-completion/completions/netota-coap")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Your shell then completes commands, options and the streams of a repository."""
    made = get_completion_class(shell)
    assert made is not None
    root = context.find_root().command
    click.echo(made(root, {}, "netota-coap", "_NETOTA_COAP_COMPLETE").source())
