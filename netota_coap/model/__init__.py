"""The domain: values that check themselves, and selections; pure. Everybody may import it."""
