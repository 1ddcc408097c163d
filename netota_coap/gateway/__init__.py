"""Follows upstreams into a local repository, and fetches the files that devices need."""
