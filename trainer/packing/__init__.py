"""The .tiny format: packs a network into a very small file that decodes to it bit for bit."""
