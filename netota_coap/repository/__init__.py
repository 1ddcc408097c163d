"""The repository on disk: loaded, changed, watched, checked; and the blobs that it holds."""
