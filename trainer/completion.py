"""What a shell completes after `ambient`: commands, their options, and fields of a configuration."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib import import_module

SCRIPT = """# bash: source <(ambient completion); zsh: autoload -U bashcompinit && bashcompinit && source <(ambient completion)
_ambient() {
    local word=${COMP_WORDS[COMP_CWORD]} words=
    if [[ $word == "=" || ${COMP_WORDS[COMP_CWORD - 1]} == "=" ]]; then
        words=  # of values nothing is known
    elif ((COMP_CWORD == 1)); then
        words="@COMMANDS@"
    else
        case ${COMP_WORDS[1]} in
@CASES@
        esac
        case $word in
            -*) ;;
            *) if [[ $words == *" "*=* && $word != */* ]]; then words="$words $(compgen -f -- "$word")"; else words=; fi ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    [[ ${COMPREPLY[0]-} == *= ]] && compopt -o nospace 2>/dev/null
    ((${#COMPREPLY[@]})) || compopt -o default 2>/dev/null
}
complete -F _ambient ambient
"""


def script(commands: Mapping[str, str]) -> str:
    """For bash, and for zsh by bashcompinit. commands: each one's module."""
    from trainer.config_fields import groups

    fields = sorted({f"{group.path}.{field.name}=".removeprefix(".") for group in groups() for field in group.fields})
    cases: list[str] = []
    for command, module in commands.items():
        parser: argparse.ArgumentParser = import_module(module).parser()
        options = [option for action in parser._actions for option in action.option_strings]
        takes_fields = any(action.dest == "overrides" for action in parser._actions)
        cases.append(
            f'            {command}) words="{" ".join([*sorted(options), *(fields if takes_fields else [])])}" ;;'
        )
    return SCRIPT.replace("@COMMANDS@", " ".join([*commands, "completion"])).replace("@CASES@", "\n".join(cases))
