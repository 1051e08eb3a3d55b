"""Commands that are printed come back from a shell as they were, and can be read."""

import shutil
import subprocess

import pytest

from lmlab.console import command

WORDS = {
    "outputs/2026-01-31/12-00-00": "outputs/2026-01-31/12-00-00",
    "trainer.max_steps=…": "trainer.max_steps=…",
    "": "''",
    "two words": "'two words'",
    "What's it?": '"What\'s it?"',
    "It's 5 o'clock": "\"It's 5 o'clock\"",
    "~callbacks": "'~callbacks'",
    "optim.lr=interval(1,2)": "'optim.lr=interval(1,2)'",
    'the so-called "best"': "'the so-called \"best\"'",
    "it's $HOME": r"'it'\''s $HOME'",
    "it's `id`": r"'it'\''s `id`'",
    "it's late!!": r"'it'\''s late!!'",
    "it's \\": r"'it'\''s \'",
    'it\'s "so"': r"""'it'\''s "so"'""",
    "it's\nso": "'it'\\''s\nso'",
    "$HOME `id` !! \\": "'$HOME `id` !! \\'",
}
"""A word, and what is printed for it."""


@pytest.mark.parametrize("word", WORDS)
def test_a_word(word: str) -> None:
    assert command(word) == WORDS[word]


@pytest.mark.parametrize("shell", [["sh"], ["bash"], ["zsh", "-f"]], ids=lambda shell: shell[0])
def test_shells_read_what_was_meant(shell: list[str]) -> None:
    if not shutil.which(shell[0]):
        pytest.skip(f"{shell[0]} is not installed")
    script = command("printf", r"%s\0", *WORDS)
    assert subprocess.check_output([*shell, "-c", script], text=True) == "\0".join([*WORDS, ""])
