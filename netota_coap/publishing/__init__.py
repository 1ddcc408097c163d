"""What a release engineer does to a stream, and what a change means for devices."""
