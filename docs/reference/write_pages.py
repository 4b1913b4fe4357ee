"""Write flags.md, model-fields.md and export-fields.md, of what the code's dataclasses are and say.

Usage: python docs/reference/write_pages.py
"""

import dataclasses
import html
import re
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from docstring_parser import Docstring, DocstringStyle, parse

from megatron_mimo.cli import TrainCommandLine
from megatron_mimo.config.arguments import Flag, known_flags
from megatron_mimo.config.presets import PROVIDERS
from megatron_mimo.model.omni.fields import FATES, Carried, Fate, Fixed, NoEffect
from megatron_mimo.settings import declared
from megatron_mimo.tools.checkpoint.convert import ConvertConfig
from megatron_mimo.tools.checkpoint.inspect import InspectConfig
from megatron_mimo.tools.data.bench import BenchCommandLine
from megatron_mimo.tools.data.digits import DigitsCommandLine
from megatron_mimo.tools.data.inspect import InspectCommandLine
from megatron_mimo.tools.data.omni_digits import OmniDigitsCommandLine
from megatron_mimo.tools.data.prepare import PrepareConfig
from megatron_mimo.tools.demo.command import DemoConfig
from megatron_mimo.tools.demo.omni import OmniDemoConfig
from megatron_mimo.tools.doctor.command import DoctorConfig
from megatron_mimo.tools.evaluate.config import EvaluateConfig
from megatron_mimo.tools.generate.config import ChatConfig, GenerateConfig
from megatron_mimo.tools.parity.command import ParityConfig
from megatron_mimo.tools.plan.command import PlanCommandLine
from megatron_mimo.tools.report.command import ReportConfig

# How each command is called, up to its flags, and the dataclass of these.
COMMANDS: dict[str, type] = {
    "megatron-mimo train": TrainCommandLine,
    "megatron-mimo demo": DemoConfig,
    "megatron-mimo demo-omni": OmniDemoConfig,
    "megatron-mimo generate RUN QUESTION": GenerateConfig,
    "megatron-mimo chat RUN": ChatConfig,
    "megatron-mimo evaluate RUN --data DATASET": EvaluateConfig,
    "megatron-mimo data prepare SOURCE --out DIR": PrepareConfig,
    "megatron-mimo data inspect PATH": InspectCommandLine,
    "megatron-mimo data bench DATASET": BenchCommandLine,
    "megatron-mimo data digits": DigitsCommandLine,
    "megatron-mimo data omni-digits": OmniDigitsCommandLine,
    "megatron-mimo parity RUN_A RUN_B": ParityConfig,
    "megatron-mimo doctor": DoctorConfig,
    "megatron-mimo report RUN": ReportConfig,
    "megatron-mimo plan": PlanCommandLine,
    "megatron-mimo checkpoint inspect PATH": InspectConfig,
    "megatron-mimo checkpoint convert --from PATH": ConvertConfig,
}

_FLAGS = """\
# Flags

<!-- Written by `make docs` from the code's own types, defaults and texts. -->

Every flag of every command, as `--help` shows them. A flag without a default may be left out, and
the text says what happens then. A switch is off or on; one that has a `--no-` twin can be turned
off again, as in `--no-dynamic-resolution`. `--config FILE` reads any flag of `train` from YAML, as
a key without the dashes; the command line wins. An unknown flag is an error that names the nearest
one.
"""
_EXPORT = """\
# Fields of an exported model

<!-- Written by `make docs` from the table that `checkpoint convert` goes by. -->

What becomes of every field of a model's parts in a `nemotron_h_omni` folder of transformers
([exporting](../how-to/export.md)). A field in bold stands in the way where it has another value
than the one that the class computes with: `checkpoint convert` refuses the run with one line.
Runs that began from a folder of another model keep the description of that folder, whole.
"""
_FIELDS = """\
# Fields of a model

<!-- Written by `make docs` from the code's own types, values and texts. -->

The parts and fields of a preset. A file of `--model-config` sets fields by section, `--override
SECTION.FIELD=VALUE` sets a single one; [Your own model](../how-to/own-model.md) shows how. The
columns are the presets of `--model-provider`, without `nemotron-moe-vlm-` in front. The size of the
vocabulary is the tokenizer's, and the length of a sequence is `--seq-length`.
"""
_KINDS = {int: "INT", float: "FLOAT", str: "STR"}


def pages() -> dict[Path, str]:
    """Each page, and what it should hold."""
    folder = Path(__file__).parent
    return {
        folder / "flags.md": flags_page(),
        folder / "model-fields.md": fields_page(),
        folder / "export-fields.md": export_page(),
    }


def flags_page() -> str:
    """Every flag of every command."""
    writer = _Writer()
    links = ",\n".join(_link(_title(usage)) for usage in COMMANDS)
    parts = (writer.command(usage, into) for usage, into in COMMANDS.items())
    return "\n".join([_FLAGS, f"{links}.\n", *parts]).rstrip("\n") + "\n"


def fields_page() -> str:
    """Every field of an architecture, and its value in each preset."""
    presets = {name: build() for name, build in PROVIDERS.items()}
    lines = [_FIELDS]
    for section in dict.fromkeys(part for preset in presets.values() for part in preset.parts):
        parts = {
            name: preset.part(section)
            for name, preset in presets.items()
            if section in preset.parts
        }
        kinds = list(dict.fromkeys(type(part) for part in parts.values()))
        for kind in kinds:
            title = section if len(kinds) == 1 else f"{section}: {kind.__name__}"
            having = {name: part for name, part in parts.items() if type(part) is kind}
            lines += [f"## {title}", "", _prose(kind), "", *_fields(kind, having)]
    return "\n".join(lines).rstrip("\n") + "\n"


def export_page() -> str:
    """What becomes of every field of a model in an exported folder."""
    lines = [_EXPORT]
    for kind, fates in FATES.items():
        lines += [f"## {kind.__name__}", "", "| field | in the folder |", "|---|---|"]
        for field, fate in fates.items():
            lines.append(f"| `{field}` | {_fate(fate)} |")
        lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def _fate(fate: Fate) -> str:
    match fate:
        case Carried(at):
            return at
        case NoEffect(why):
            return f"nothing: {why}"
        case Fixed(value, needs, flag):
            where = f" (`{flag}`)" if flag else ""
            return f"**`{value}` only**{where}: others would need {needs}"


def _fields(kind: type, presets: dict[str, Any]) -> Iterator[str]:
    """The table of a part of a model, with the values that presets have."""
    texts = _texts(kind)
    names = [name.removeprefix("nemotron-moe-vlm-") for name in presets]
    yield from (f"| field | {' | '.join(names)} | what it is |", "|---" * (len(names) + 2) + "|")
    for name, flag in known_flags(kind).items():
        field = name.replace("-", "_")
        values = " | ".join(_value(getattr(part, field)) for part in presets.values())
        text = _escape(texts[field])
        if isinstance(flag.kind, tuple):
            text += f" One of {', '.join(f'`{choice}`' for choice in flag.kind)}."
        yield f"| `{field}` | {values} | {text} |"
    yield ""


def _value(value: Any) -> str:
    """As a file of `--model-config` would have it."""
    if isinstance(value, tuple):
        return f"`[{', '.join(str(item) for item in value)}]`"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`".replace("|", r"\|")


class _Writer:
    """Writes commands one after the other, and each dataclass of flags once."""

    def __init__(self) -> None:
        self._homes: dict[type, str] = {}

    def command(self, usage: str, into: type) -> str:
        """A command: its heading, its text, its own flags, and those of its sections."""
        title = _title(usage)
        lines = [f"## {title}", "", f"    {usage} [flags]", "", _prose(into), ""]
        sections = dict(_sections(into))
        lines += self._flags(into, without=sections)
        for field, kind in sections.items():
            lines += self._section(field, kind, title)
        return "\n".join(lines)

    def _section(self, name: str, into: type, command: str) -> Iterator[str]:
        if into in self._homes:
            yield from (f"And all flags of {self._homes[into]}.", "")
            return
        sections = list(_sections(into, parts=False))
        if sections:
            # All of them together are what the command is about.
            self._homes[into] = _link(command)
            for inner, kind in sections:
                yield from self._section(inner, kind, command)
            return
        title = f"{command.split()[-1]}: {name}"
        self._homes[into] = _link(title)
        yield from (f"### {title}", "", _prose(into), "")
        yield from self._flags(into)

    def _flags(self, into: type, without: Container[str] = ()) -> Iterator[str]:
        """The table of a dataclass's flags, those of its parts in place."""
        known = known_flags(into)
        yield from ("| flag | default | what it does |", "|---|---|---|")
        for flag in declared(into):
            if flag.path[0] in without:
                continue
            text = _escape(_texts(flag.owner)[flag.path[-1]])
            form = _form(flag.name, known[flag.name])
            yield f"| {form} | {_default(flag.default)} | {text} |"
        yield ""


def _title(usage: str) -> str:
    """The words of a command, without what follows them."""
    words = re.match(r"[a-z-]+( [a-z]+)*", usage)
    assert words is not None, usage
    return words[0]


def _sections(into: type, *, parts: bool = True) -> Iterator[tuple[str, type]]:
    """Fields of a dataclass that are dataclasses of more flags; those of no name are parts."""
    for name, hint in get_type_hints(into, include_extras=True).items():
        marks = hint.__metadata__ if get_origin(hint) is Annotated else ()
        kind = get_args(hint)[0] if marks else hint
        if dataclasses.is_dataclass(kind) and (parts or not marks):
            assert isinstance(kind, type)
            yield name, kind


def _form(name: str, flag: Flag) -> str:
    """A flag as one types it."""
    if flag.kind is bool:
        return f"`--{name}`" + (f", `--no-{name}`" if flag.has_negative else "")
    if flag.metavar is not None:
        value = flag.metavar
    elif isinstance(flag.kind, tuple):
        value = f"{{{', '.join(flag.kind)}}}"
    else:
        value = _KINDS[flag.kind]
    return f"`--{name} {value}`" + (", repeatable" if flag.repeatable else "")


def _default(value: Any) -> str:
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value}`"


def _texts(into: type) -> dict[str, str]:
    """What the documentation of a dataclass, and of those it derives from, says of each field."""
    texts: dict[str, str] = {}
    for kind in reversed(into.__mro__):
        if dataclasses.is_dataclass(kind):
            for param in _documentation(kind).params:
                texts[param.arg_name] = " ".join((param.description or "").split())
    return texts


def _prose(into: type) -> str:
    """What the documentation of a dataclass says of the whole."""
    documentation = _documentation(into)
    texts = (documentation.short_description, documentation.long_description)
    return "\n\n".join(_escape(" ".join(text.split())) for text in texts if text)


def _documentation(into: type) -> Docstring:
    return parse(into.__doc__ or "", style=DocstringStyle.GOOGLE)


def _escape(text: str) -> str:
    """A text as Markdown shows it unchanged, in a table too, with flags as code."""
    parts = text.split("`")
    for index in range(0, len(parts), 2):  # Those that are not code already.
        plain = html.escape(parts[index], quote=False).replace("|", r"\|").replace("*", r"\*")
        parts[index] = re.sub(r"(?<![\w-])--[a-z][a-z0-9-]*", r"`\g<0>`", plain)
    return "`".join(parts)


def _link(title: str) -> str:
    """A link to a heading of the page, by the name that GitHub gives it."""
    anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
    return f"[{title}](#{anchor})"


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
