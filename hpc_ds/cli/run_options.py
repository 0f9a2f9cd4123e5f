"""The options of ``hpcds run``: a table, and a parser that ends at the script.

Not typer's: what follows the script must reach it as it is, every name has two spellings (``--master_port`` and
``--master-port``) and may be shortened as in DeepSpeed's launcher, and the ranks wait while a parser is loaded.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, NamedTuple

from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MOST_DIGITS = 9
_ORDER = ("Resources", "Starting", "The script", "Environment and output", "Accepted for DeepSpeed's launcher", "Other")


class Option(NamedTuple):
    """One option.

    Attributes:
        name: with underscores, without dashes.
        kind: ``flag``, ``text``, ``list`` (text, several times), ``whole`` or ``seconds``.
        value: what its value is called in the help.
        short: its one letter, if it has one.
        own: whether DeepSpeed's launcher does not have it.
    """

    name: str
    kind: str
    group: int
    help: str
    value: str = ""
    short: str = ""
    own: bool = False


OPTIONS = (
    Option("hostfile", "text", 0, "Hosts, one 'NAME slots=N' a line. Default: Slurm's, or this machine.", "FILE", "H"),
    Option("include", "text", 0, "Take only these: NAME or NAME:SLOT,SLOT, parted by '@'.", "FILTER", "i"),
    Option("exclude", "text", 0, "Take all but these.", "FILTER", "e"),
    Option("num_nodes", "whole", 0, "Take the first N hosts.", "N"),
    Option("num_gpus", "whole", 0, "Take the first N slots of each host; without GPUs, start N ranks.", "N"),
    Option("launcher", "text", 1, "local, ssh, pdsh, openmpi, mpich, impi or slurm. Default: what fits.", "NAME"),
    Option("launcher_args", "text", 1, "Options for that program, in one word.", "ARGS"),
    Option("master_addr", "text", 1, "Where the ranks meet. Default: an address of the first host.", "HOST"),
    Option("master_port", "whole", 1, "Its port. Default: a free one.", "PORT"),
    Option("ssh_port", "whole", 1, "Port of sshd on the hosts.", "PORT"),
    Option("force_multi", "flag", 1, "Use the launcher even for one host that is this machine."),
    Option("no_ssh", "flag", 1, "Start only the ranks of --node_rank, here; the same command is run on each host."),
    Option("node_rank", "whole", 1, "Which host of the hostfile this is, with --no_ssh.", "N"),
    Option("venv_script", "text", 1, "Source this script, on its host, before each rank.", "FILE"),
    Option("bind_cores_to_rank", "flag", 1, "Give each rank cores of its own."),
    Option("bind_core_list", "text", 1, "Which cores to part among the ranks of a host: 0-3,8.", "LIST"),
    Option("grace", "seconds", 1, "From SIGTERM to SIGKILL. Default: 30.", "SECONDS", own=True),
    Option("module", "flag", 2, "SCRIPT is a module: python -m SCRIPT."),
    Option("no_python", "flag", 2, "SCRIPT is a program of any kind."),
    Option("no_local_rank", "flag", 2, "Do not give --local_rank=N to the script."),
    Option("as_deepspeed", "flag", 2, "In SCRIPT, import deepspeed means hpc_ds.", own=True),
    Option("env", "list", 3, "Set a variable for every rank; several times.", "NAME=VALUE", own=True),
    Option("env_file", "list", 3, "Set those of a file with a NAME=VALUE a line; several times.", "FILE", own=True),
    Option("prefix", "flag", 3, "Begin each line of output with its rank.", own=True),
    Option("enable_each_rank_log", "text", 3, "A log for each rank in this folder, and nothing here.", "DIR"),
    Option("save_pid", "flag", 3, "Leave the id of this process in <tmp>/<pid>.deepspeed while it runs."),
    Option("quiet", "flag", 3, "Say errors only.", short="q"),
    Option("log_level", "text", 4, "debug, info, warning, error or critical.", "LEVEL"),
    Option("no_ssh_check", "flag", 4, "Nothing is checked in advance anyway."),
    Option("autotuning", "text", 4, "Refused.", "MODE"),
    Option("elastic_training", "flag", 4, "Refused."),
    Option("dry_run", "flag", 5, "Print what would be started where, and stop.", own=True),
    Option("json", "flag", 5, "Print that as JSON.", own=True),
    Option("help", "flag", 5, "Print this and stop.", short="h", own=True),
)

_BY_NAME = {option.name: option for option in OPTIONS} | {
    "num_accelerators": next(option for option in OPTIONS if option.name == "num_gpus")
}
_BY_LETTER = {option.short: option for option in OPTIONS if option.short}


class Line(NamedTuple):
    """A command line.

    Attributes:
        values: of the options that were given.
        script: None where there is none.
        args: all that follows it.
    """

    values: dict[str, object]
    script: str | None
    args: list[str]


def parse(words: Sequence[str]) -> Line:
    """The options before the script, the script, and all that follows it.

    Raises:
        ConfigError: an option is unknown, lacks its value, or cannot have it.
    """
    values: dict[str, object] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        if word == "--":
            break
        if not word.startswith("-") or word == "-":
            left.insert(0, word)
            break
        for option, value in _options_of(word, left):
            if option.kind == "list":
                values.setdefault(option.name, []).append(value)  # type: ignore[attr-defined]
            else:
                values[option.name] = value
    return Line(values, left[0] if left else None, left[1:])


def swallowed(args: Sequence[str]) -> list[str]:
    """Options of DeepSpeed's launcher among the arguments of the script."""
    names = [word.partition("=")[0] for word in args if word.startswith("--")]
    known = {name for name, option in _BY_NAME.items() if not option.own}
    return [name for name in dict.fromkeys(names) if name[2:].replace("-", "_") in known]


def help_text() -> str:
    """What ``hpcds run --help`` prints."""
    lines = [
        "Usage: hpcds run [OPTIONS] SCRIPT [ARGS]...",
        "",
        "  Start a script as ranks on this machine, on hosts, or in a Slurm allocation, and end with its exit code.",
        "",
        "  The options are those of DeepSpeed's launcher, with _ or - inside; they end at SCRIPT.",
    ]
    for place, title in enumerate(_ORDER):
        lines += ["", f"{title}:"]
        for option in OPTIONS:
            if option.group == place:
                lines += _help_of(option)
    return "\n".join(lines) + "\n"


def _help_of(option: Option) -> list[str]:
    names = f"-{option.short}, " if option.short else "    "
    names += f"--{option.name if not option.own else option.name.replace('_', '-')}"
    head = f"  {names} {option.value}".rstrip()
    text = textwrap.wrap(option.help, 52)
    if len(head) > 36:
        return [head, *(" " * 38 + line for line in text)]
    return [head.ljust(38) + text[0], *(" " * 38 + line for line in text[1:])]


def _options_of(word: str, following: list[str]) -> Iterator[tuple[Option, object]]:
    """The options of one word, with their values, which may be words of their own."""
    if word.startswith("--"):
        name, equals, value = word[2:].partition("=")
        option = _long(f"--{name}", name.replace("-", "_"))
        if option.kind == "flag" and equals:
            raise ConfigError(f"--{name} {value!r}: takes no value; write --{name} alone", key=option.name)
        yield option, _value(f"--{name}", option, value if equals else None, following)
        return
    letters = word[1:]
    while letters:
        letter, letters = letters[0], letters[1:]
        if letter not in _BY_LETTER:
            raise ConfigError(f"-{letter}: no such option; hpcds run --help lists them", key=letter)
        option = _BY_LETTER[letter]
        if option.kind == "flag":
            yield option, True
        else:
            yield option, _value(f"-{letter}", option, letters.removeprefix("=") or None, following)
            return


def _long(word: str, name: str) -> Option:
    if name in _BY_NAME:
        return _BY_NAME[name]
    meant = {option.name: option for known, option in _BY_NAME.items() if name and known.startswith(name)}
    if len(meant) == 1:
        return next(iter(meant.values()))
    if meant:
        which = ", ".join(f"--{known}" for known in meant)
        raise ConfigError(f"{word}: may be {which}; write it out", key=name)
    raise ConfigError(
        f"{word}: no such option; options of the script go behind the script, and hpcds run --help lists ours", key=name
    )


def _value(word: str, option: Option, given: str | None, following: list[str]) -> object:
    if option.kind == "flag":
        return True
    if given is None:
        if not following:
            raise ConfigError(f"{word}: its value is missing; write {word} {option.value}", key=option.name)
        given = following.pop(0)
    if option.kind == "whole":
        digits = given.strip().removeprefix("-")
        if not (digits.isascii() and digits.isdigit() and len(digits) <= MOST_DIGITS):
            raise ConfigError(f"{word} {given!r}: not a whole number; write one", key=option.name, value=given)
        return int(given)
    if option.kind == "seconds":
        return _seconds(word, option, given)
    return given


def _seconds(word: str, option: Option, given: str) -> float:
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 10**MOST_DIGITS:
        raise ConfigError(f"{word} {given!r}: not a number of seconds; write one", key=option.name, value=given)
    return seconds
