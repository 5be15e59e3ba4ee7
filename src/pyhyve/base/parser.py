"""argparse with pyhyve's manners: one line for an error, and a guess at what was meant."""

import argparse
import re
from collections.abc import Iterable
from typing import NoReturn

from pyhyve.base.errors import UsageError

Namespace = argparse.Namespace

_UNRECOGNIZED = re.compile(r"unrecognized arguments: (.*)")
_CHOICE = re.compile(r"argument (?P<option>.*?): invalid choice: (?P<value>'.*?') \(choose from (?P<choices>.*)\)")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)


class Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse would print its usage and exit. Options are not abbreviated."""

    def __init__(self, prog: str, description: str, usage: str | None = None, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog=epilog,
            formatter_class=_Formatter,
            allow_abbrev=False,
        )

    def option_strings(self) -> list[str]:
        """Return every option that this parser knows."""
        return [option for action in self._actions for option in action.option_strings]

    def options(self) -> Iterable[argparse.Action]:
        """Return the parser's actions, for those that describe it."""
        return tuple(self._actions)

    def error(self, message: str) -> NoReturn:
        raise UsageError(self._explain(message))

    def _explain(self, message: str) -> str:
        verb = self.prog.removeprefix("pyhyve").strip()
        see = f"see '{self.prog} --help'"
        match = _UNRECOGNIZED.fullmatch(message)
        if match is not None:
            word = match[1].split()[0]
            name = word.partition("=")[0]
            if word.startswith("-"):
                return f"{name}: unknown option{did_you_mean(name, self.option_strings())}; {see}"
            return f"{word}: unexpected argument{f' of {verb}' if verb else ''}; {see}"
        match = _CHOICE.fullmatch(message)
        if match is not None:
            choices = [choice.strip(" '") for choice in match["choices"].split(",")]
            value = match["value"].strip("'")
            return f"{match['option']} {value}: unknown{did_you_mean(value, choices)}; there are {', '.join(choices)}"
        message = message.removeprefix("argument ")
        message = re.sub(r"^the following arguments are required: (.*)", r"\1: missing", message)
        return f"{message}; {see}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the nearest of the known words, or nothing."""
    import difflib

    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
