"""The device's and people's side: get, observe, discover and download."""
