"""The config of a command: composes it, checks it, and builds objects from it."""
