"""Completion scripts, made from the parser: verbs, their flags, and the choices of those that have some."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

PROGRAM = "pager-inspect"


@dataclass(frozen=True, slots=True)
class Words:
    """What may follow a verb: flags, and per flag (or per place, under "") its choices."""

    help: str
    flags: dict[str, str]
    choices: dict[str, list[str]]


def words_of(parser: argparse.ArgumentParser) -> dict[str, Words]:
    """By verb; "" is before any verb."""
    found = {"": _words(parser, "")}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for verb, sub in action.choices.items():
                found[verb] = _words(sub, helps.get(verb, ""))
    return found


def _words(parser: argparse.ArgumentParser, text: str) -> Words:
    flags: dict[str, str] = {}
    choices: dict[str, list[str]] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        for name in action.option_strings:
            flags[name] = (action.help or "").replace("%%", "%")
        if action.choices:
            for name in action.option_strings or [""]:
                choices[name] = [str(choice) for choice in action.choices]
    return Words(text, flags, choices)


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """Raises KeyError for a shell that is not bash, zsh or fish."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](words_of(parser))


def _bash(words: dict[str, Words]) -> str:
    verbs = [verb for verb in words if verb]
    cases = []
    for verb in verbs:
        inside = [
            f'      {flag}) COMPREPLY=($(compgen -W "{" ".join(c)}" -- "$cur")); return;;'
            for flag, c in words[verb].choices.items()
            if flag
        ]
        places = " ".join(words[verb].choices.get("", []))
        offered = " ".join(words[verb].flags) + (f" {places}" if places else "")
        block = "\n".join(inside)
        cases.append(
            f'    {verb})\n      case "$prev" in\n{block}\n      *) ;;\n      esac\n      offered="{offered}";;'
        )
    body = "\n".join(cases)
    return f"""# completion of {PROGRAM} for bash: source this file
_pager_inspect() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}" verb="" word offered
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case "$word" in {"|".join(verbs)}) verb="$word";; esac
  done
  case "$prev" in -s|--socket) COMPREPLY=($(compgen -f -- "$cur")); return;; esac
  offered="{" ".join([*verbs, *words[""].flags])}"
  case "$verb" in
{body}
  esac
  COMPREPLY=($(compgen -W "$offered" -- "$cur"))
  [ ${{#COMPREPLY[@]}} -eq 0 ] && COMPREPLY=($(compgen -f -- "$cur"))
}}
complete -F _pager_inspect {PROGRAM}
"""


def _zsh(words: dict[str, Words]) -> str:
    verbs = " ".join(f"'{verb}:{_plain(words[verb].help)}'" for verb in words if verb)
    cases = []
    for verb, about in words.items():
        if verb:
            flags = " ".join(f"'{_zsh_flag(flag, text, about)}'" for flag, text in about.flags.items())
            place = f" '1:what:({' '.join(about.choices[''])})'" if "" in about.choices else " '*:file:_files'"
            cases.append(f"    {verb}) _arguments {flags}{place};;")
    body = "\n".join(cases)
    return f"""#compdef {PROGRAM}
# completion of {PROGRAM} for zsh: put this file in $fpath as _pager-inspect
_pager_inspect() {{
  local -a verbs; verbs=({verbs})
  local verb="${{words[(r)({"|".join(v for v in words if v)})]}}"
  if [[ -z "$verb" ]]; then _describe verb verbs; return; fi
  words=("${{(@)words[${{words[(i)$verb]}},-1]}}"); (( CURRENT = ${{#words}} ))
  case "$verb" in
{body}
  esac
}}
compdef _pager_inspect {PROGRAM}
"""


def _zsh_flag(flag: str, text: str, about: Words) -> str:
    told = f"{flag}[{_plain(text)}]"
    return f"{told}:value:({' '.join(about.choices[flag])})" if flag in about.choices else told


def _fish(words: dict[str, Words]) -> str:
    lines = [f"# completion of {PROGRAM} for fish: put this file in ~/.config/fish/completions"]
    for verb, about in words.items():
        when = f"-n '__fish_seen_subcommand_from {verb}'" if verb else "-n '__fish_use_subcommand'"
        if verb:
            lines.append(f"complete -c {PROGRAM} -n '__fish_use_subcommand' -a {verb} -d '{_plain(about.help)}'")
        for flag, text in about.flags.items():
            name = f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
            values = f" -x -a '{' '.join(about.choices[flag])}'" if flag in about.choices else ""
            lines.append(f"complete -c {PROGRAM} {when} {name} -d '{_plain(text)}'{values}")
        if "" in about.choices:
            lines.append(f"complete -c {PROGRAM} {when} -f -a '{' '.join(about.choices[''])}'")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Without what shells would read as something else."""
    return "".join(c for c in text if c not in "'\"[]:`$\\")
