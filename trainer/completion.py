"""Shell completion of `ambient`: commands, their options, fields of a configuration, and the named values of options
and fields."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from importlib import import_module

from data_pipeline.corruption.degradations import NAMES
from trainer.config.reference import groups
from trainer.evaluation.features import PACKAGED

SCRIPT = """# bash: source <(ambient completion)
# zsh: autoload -U bashcompinit && bashcompinit && source <(ambient completion)
_ambient() {
    local word=${COMP_WORDS[COMP_CWORD]} of=${COMP_WORDS[COMP_CWORD - 1]} command=${COMP_WORDS[1]} before= words= name
    COMPREPLY=()
    if [[ $word == "=" ]]; then  # bash treats "=" as a word of its own
        word=
    elif [[ $of == "=" ]]; then
        of=${COMP_WORDS[COMP_CWORD - 2]}
    elif [[ $word == *=* ]]; then  # zsh does not
        of=${word%%=*} before=${word%%=*}= word=${word#*=}
    elif ((COMP_CWORD > 1)) && [[ $of != -* || $word == -* ]]; then
        of=
    fi
    if ((COMP_CWORD == 1)); then
        words="@COMMANDS@"
    elif [[ $of ]]; then
        case $command:$of in
@VALUES@
        esac
    else
        case $command in
@WORDS@
        esac
    fi
    COMPREPLY=($(compgen -P "$before" -W "$words" -- "$word"))
    if [[ ! $of && $words == *=* && $word != */* ]]; then  # both files and fields are valid here
        while IFS= read -r name; do
            [[ -d $name ]] && COMPREPLY+=("$(printf %q "$name")/") || COMPREPLY+=("$(printf %q "$name")")
        done < <(compgen -f -- "$word")
    fi
    [[ ${COMPREPLY[0]-} == *[=/] ]] && compopt -o nospace 2>/dev/null
    ((${#COMPREPLY[@]})) || compopt -o default 2>/dev/null
}
complete -F _ambient ambient
"""

NAMED = {
    "--corruption": (*NAMES, "measured"),
    "--checkpoint": ("latest", "best"),
    "--extractor": (PACKAGED,),
}
"""Suggested values of options that also accept other values."""


def script(commands: Mapping[str, str]) -> str:
    """Returns the completion script for bash, and for zsh by bashcompinit. commands: the module of each command."""
    values, words, fields = [], [], _fields()
    for command, module in commands.items():
        parser: argparse.ArgumentParser = import_module(module).parser()
        offered: list[str] = []
        for action in parser._actions:
            offered += sorted(action.option_strings)
            for option in action.option_strings:
                if choices := action.choices or NAMED.get(option):
                    values.append(_case(f"{command}:{option}", map(str, choices)))
            if action.dest == "overrides":
                offered += [f"{name}=" for name in fields]
        words.append(_case(command, offered))
    values += [_case(f"*:{name}", choices) for name, choices in fields.items() if choices]
    listed = " ".join([*commands, "completion"])
    return (
        SCRIPT.replace("@COMMANDS@", listed).replace("@VALUES@", "\n".join(values)).replace("@WORDS@", "\n".join(words))
    )


def _case(pattern: str, words: Iterable[str]) -> str:
    return f"""            {pattern}) words="{" ".join(words)}" ;;"""


def _fields() -> dict[str, list[str]]:
    """Returns the fields of a configuration by path, each with those of its values that have a name."""
    named_values: dict[str, dict[str, None]] = {}
    for group in groups():
        if group.kind:
            named_values.setdefault(f"{group.path}.kind", {})[group.kind] = None
        if group.null != "no":
            named_values.setdefault(group.path, {})["null"] = None
        for field in group.fields:
            named_values.setdefault(f"{group.path}.{field.name}".removeprefix("."), {}).update(
                dict.fromkeys(field.choices)
            )
    return {name: list(named_values[name]) for name in sorted(named_values)}
