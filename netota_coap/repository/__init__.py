"""A repository on disk: loading, changing, watching and checking it, and its stored files.

It imports `encoding` and what lies below. All packages above except `client` import it: `store` to
change a repository, `loading` and `history` to read it, `blobs` for stored files.
"""
