"""What a release engineer does to a stream, and what a change means for devices.

Commands and `service/dev.py` import it; servers do not, except the page for `diff`.
"""
