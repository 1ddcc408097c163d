"""Observers over CoAP: the table, its congestion window and its journal."""
