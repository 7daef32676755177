"""The .tiny format: a network as the smallest file that gives it back bit for bit."""
