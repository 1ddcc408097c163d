"""What a repository is made of: values that check themselves, and selections. Pure."""
