"""Reads the arguments in shell scripts and argument files.

Follows variables, arrays, quoted commands (`bash -c "..."`) and here-documents. Nothing is run.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

import yaml

from scaletune.linting.constants import LONGEST, fold
from scaletune.linting.shell_words import Word, cut_heredocs, split
from scaletune.linting.values import ANY, MATTERS, UNREAD, Source, normalize_key, parse_scalar

ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
OVERRIDE = re.compile(r"\+{0,2}[A-Za-z_]\w*(\.\w+)+=.*", re.DOTALL)
EXPANSION = re.compile(
    r"\$\(\((?P<sum>.*?)\)\)|\$\((?P<run>.*?)\)(?!\))|`(?P<tick>[^`]*)`"
    r"|\$\{(?P<name>\w+|[@*#])(?P<index>\[[@*]\])?(?::?(?:[-=](?P<default>[^}]*)|[?][^}]*))?\}"
    r"|\$(?P<plain>\w+|[@*])|(?P<other>\$\{[^}]*\})",
    re.DOTALL,
)
GAP = "\0"
"""Marks a value that the script does not set."""
STARTS = {"export", "local", "declare", "readonly", "then", "else", "do", "{", "env"}
OPEN, CLOSE = {"if", "case", "for", "while", "until"}, {"fi", "esac", "done"}
CONFIG_FILE = re.compile(r"[\w./-]+\.(json|ya?ml|toml)")


class Script:
    """State while a script is read: variables, arguments, and what was not understood."""

    def __init__(self) -> None:
        self.variables: dict[str, str | list[str]] = {}
        self.changed: set[str] = set()
        self.arguments: dict[str, Any] = {}
        self.not_read: dict[str, None] = {}
        self.gaps: set[str] = set()
        self.depth = 0

    def note(self, sentence: str) -> None:
        """Adds a sentence on what was not read, once."""
        self.not_read[sentence] = None

    def read(self, text: str, level: int = 0) -> None:
        """Reads one script or quoted command."""
        if level > 5:
            return
        text, bodies = cut_heredocs(text)
        command: list[Word] = []
        words = split(text)
        for word in words:
            if word.operator:
                self.finish(command, level)
                command = []
            elif self.assigns(word, command) and not word.text.startswith("-"):
                self.assign(word, words, level)
            else:
                self.depth += 0 if command else (word.text in OPEN) - (word.text in CLOSE)
                command.append(word)
        self.finish(command, level)
        for body in bodies:
            self.read_document(body, level)

    def assigns(self, word: Word, command: list[Word]) -> bool:
        """Whether the word is an assignment, by its form and its place."""
        at_start = all(each.text in STARTS or "=" in each.text for each in command)
        return at_start and bool(ASSIGNMENT.fullmatch(word.text))

    def assign(self, word: Word, words: Iterator[Word], level: int) -> None:
        """Sets a variable or an array."""
        match = ASSIGNMENT.fullmatch(word.text)
        if match is None:
            return
        name, more, text = match.groups()
        if not text and not word.quoted:
            following = next(words, Word("\n", operator=True))
            if following.text == "(" and following.operator:
                self.set(name, self.read_array(words), bool(more))
                return
        self.set(name, self.expand(text), bool(more))

    def read_array(self, words: Iterator[Word]) -> list[str]:
        """The expanded words up to the closing parenthesis."""
        items: list[str] = []
        for word in words:
            if word.operator and word.text == ")":
                break
            items += [] if word.operator else self.expand_word(word)
        return items

    def set(self, name: str, value: str | list[str], more: bool) -> None:
        """Sets a variable, or appends to it. A value that depends on a condition is a gap."""
        before = self.variables.get(name)
        if sum(map(len, before or ())) > LONGEST:
            self.variables[name] = GAP + name
        elif more:
            added = value if isinstance(value, list) else [value]
            if self.depth:
                self.note_conditional(added)
                return
            kept = before if isinstance(before, list) else [before] if before else []
            self.variables[name] = [*kept, *added]
        elif self.depth and isinstance(before, str) and isinstance(value, str) and before:
            if value.startswith(before):
                self.note_conditional([value.removeprefix(before)])
            elif value != before:
                self.variables[name] = GAP + name
        else:
            self.variables[name] = value

    def note_conditional(self, items: list[str]) -> None:
        """Says which relevant arguments depend on a condition."""
        flags = [word for item in items for word in item.split() if word.startswith("--")]
        flags = [flag for flag in flags if MATTERS.search(normalize_key(flag))]
        self.gaps |= {normalize_key(flag.split("=")[0]) for flag in flags}
        if flags:
            self.note(f"{', '.join(flags)}: the script adds them under a condition")

    def expand(self, text: str) -> str:
        """The text with its variables replaced; what is unknown becomes a gap."""
        expanded = EXPANSION.sub(self.replace, text)
        return expanded if len(expanded) <= LONGEST else GAP

    def replace(self, match: re.Match[str]) -> str:
        """The value of one `$...`."""
        if match["sum"] is not None:
            names = self.expand(re.sub(r"(?<![\w$])([A-Za-z_]\w*)", r"${\1}", match["sum"]))
            try:
                value = fold(ast.parse(names.strip().replace("/", "//"), mode="eval").body, {})
            except (SyntaxError, ValueError):
                value = UNREAD
            return str(value) if isinstance(value, int | float) else GAP
        name = match["name"] or match["plain"]
        value = self.variables.get(name or "")
        if value is None and match["default"] is not None:
            return self.expand(match["default"])
        if value is None:
            return GAP + (name or "")
        return " ".join(value) if isinstance(value, list) else value

    def expand_word(self, word: Word) -> list[str]:
        """The words that one word expands to; a list for an array."""
        if "$" not in word.text and "`" not in word.text:
            return [word.text]
        text = self.expand(word.text)
        array = re.fullmatch(r"\$\{?(\w+)(\[[@*]\])?\}?", word.text)
        value = self.variables.get(array[1]) if array else None
        if isinstance(value, list) and (array and array[2]):
            return list(value)
        return [text] if word.quoted else text.split()

    def finish(self, command: list[Word], level: int) -> None:
        """Reads the arguments of one command."""
        words: list[str] = []
        for word in command:
            for text in self.expand_word(word):
                if re.search(r"\s", text) and re.search(r"(^|\s)--\w", text):
                    self.read_quoted(text, level)
                else:
                    words.append(text)
        self.read_flags(words, runs=any(word.endswith(".py") for word in words))

    def read_flags(self, words: list[str], runs: bool) -> None:
        """`--key value`, `--key=value`, bare `--key`, and `a.b=value` of a program's arguments."""
        position = 0
        while position < len(words):
            word, position = words[position], position + 1
            if OVERRIDE.fullmatch(word):
                key, _, text = word.lstrip("+").partition("=")
                self.put(key, [text])
            elif word.startswith("--") and len(word) > 2:
                key, equals, text = word[2:].partition("=")
                values = [text] if equals else []
                while not equals and position < len(words) and not words[position].startswith("--"):
                    values.append(words[position])
                    position += 1
                self.put(key, values)
                for text in values[1:] if runs else ():
                    self.note_bundle(text)
            elif runs:
                self.note_bundle(word)

    def note_bundle(self, word: str) -> None:
        """Says that a variable with arguments is unknown."""
        if re.fullmatch(rf"{GAP}[\w@*]*", word):
            self.note(f"the arguments in `{word.replace(GAP, '$')}`: this file does not set it")
            self.gaps.add(ANY)

    def put(self, key: str, texts: list[str]) -> None:
        """Sets one argument, or notes that its value is unknown."""
        name = normalize_key(key)
        first = texts[0] if texts else "true"
        if GAP in first or GAP in key:
            self.gaps.add(name)
            if MATTERS.search(name):
                named = f"the script does not set `{first.replace(GAP, '$')}`"
                self.note(f"--{key}: {'a command computes it' if first == GAP else named}")
            self.arguments.pop(name, None)
            return
        if CONFIG_FILE.fullmatch(first) and re.search(r"config|cfg|deepspeed", name):
            self.note(f"the file `{first}` that --{key} names: lint it too")
        value, before = parse_scalar(first), self.arguments.get(name)
        if self.depth and before not in (None, value) and MATTERS.search(name):
            self.note(f"--{key}: its value depends on a condition")
            self.gaps.add(name)
            self.arguments.pop(name)
            return
        self.arguments[name] = value

    def read_document(self, body: str, level: int) -> None:
        """A here-document: a config in JSON or YAML, or a script."""
        try:
            content = yaml.safe_load(self.expand(body).replace(GAP, ""))
        except yaml.YAMLError:
            content = None
        if isinstance(content, dict):
            self.arguments |= content
        elif re.search(r"(^|\s)--\w", body):
            self.read_quoted(body, level)
        elif MATTERS.search(body):
            self.note(f"the here-document that starts with `{first_line(body)}`")

    def read_quoted(self, text: str, level: int) -> None:
        """Reads a script within the script, with its own variables."""
        inner = Script()
        inner.variables = dict(self.variables)
        try:
            inner.read(text, level + 1)
        except ValueError:
            self.note(f"the text that starts with `{first_line(text)}`")
            return
        self.arguments |= inner.arguments
        self.not_read |= inner.not_read
        self.gaps |= inner.gaps


def first_line(text: str) -> str:
    """The start of a text, to name it by."""
    return text.strip().splitlines()[0][:60] if text.strip() else ""


def read_shell(text: str) -> Source:
    """The arguments of all commands of a script; of equal ones the last counts."""
    script = Script()
    script.read(text)
    return Source(script.arguments, list(script.not_read), script.gaps)
