"""What a release engineer does to a stream, and what a change means for devices.

It imports `repository.store` and what lies below. `cli`, `service/dev.py` and, for `diff`, the
page of `http` import it; other parts of servers do not.
"""
