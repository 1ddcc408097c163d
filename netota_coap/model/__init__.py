"""The domain, without I/O: values that check themselves, and selections.

It imports `errors` only; every package imports it.
"""
