"""The only room that sees a config: composes it, checks it, and builds objects from it."""
