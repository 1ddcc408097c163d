"""The repository rendered for serving: path, selection and format to ready bytes."""
