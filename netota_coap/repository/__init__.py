"""A repository on disk: loading, changing, watching, checking it, and its stored files.

`store` is for whatever changes one; servers and commands read by `loading` and `history`.
"""
