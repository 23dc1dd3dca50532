"""The rules of inference engines as Markdown, for the documentation.

Run as a program it prints the tables, each under the heading that it stands under there.
"""

import sys

from hifiprune.deployment.engines import BLOCKS, ENGINES, FORMS, KEYS, SUPPORT, shown


def support_table() -> str:
    """How engines run each model type, as Markdown."""
    lines = [f"| model type | {' | '.join(f'{each.name} {each.version}' for each in ENGINES.values())} |"]
    lines.append("|---|" + "---|" * len(ENGINES))
    lines += [f"| `{name}` | {' | '.join(kinds)} |" for name, kinds in sorted(SUPPORT.items())]
    return "\n".join(lines)


def forms_table() -> str:
    """What each format wants of sizes, as Markdown."""
    lines = ["| engine | format | must be multiples | of | otherwise | source |", "|---|---|---|---|---|---|"]
    for form in FORMS:
        engine = ENGINES[form.engine]
        whole = "MLP width and heads, of the number of GPUs" if engine.splits else "nothing"
        what = (
            "query and key width, width of a gated MLP"
            if form.name == BLOCKS
            else "MLP width, hidden size, attention width"
        )
        wants = (f"{what}; on each GPU" if engine.splits else what) if form.multiple > 1 else whole
        then = f"{form.otherwise}: {form.then}" if form.then else "no" if engine.splits else ""
        by = str(form.multiple) if form.multiple > 1 else ""
        source = _link(form.source or engine.splits or engine.models)
        lines.append(f"| {engine.name} | {form.name} | {wants} | {by} | {then} | {source} |")
    return "\n".join(lines)


def mixed_table() -> str:
    """What engines do with checkpoints whose layers differ in width, as Markdown."""
    lines = ["| engine | layout deci | layout remote | reason | source |", "|---|---|---|---|---|"]
    for each in ENGINES.values():
        lines.append(f"| {each.name} | {_link(each.deci)} | {each.mixed} | {each.why} | {_link(each.code)} |")
    return "\n".join(lines)


def sources_table() -> str:
    """Where the answers about model types, and about sharing layers, come from, as Markdown."""
    lines = ["| engine | models | hard-coded widths, for example | tensor parallelism |", "|---|---|---|---|"]
    for each in ENGINES.values():
        cells = (_link(address) if address else "" for address in (each.models, each.fixed, each.splits))
        lines.append(f"| {each.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def keys_table() -> str:
    """What engines read in `config.json`, as Markdown."""
    lines = ["| engine | model type | keys it reads | default if missing |", "|---|---|---|---|"]
    for key, types in KEYS.items():
        for name, wanted in sorted(types.items()):
            names = ", ".join(f"`{each}`" for each in wanted)
            taken = ", ".join(shown(value) for value in wanted.values())
            lines.append(f"| {ENGINES[key].name} | `{name}` | {names} | {taken} |")
    return "\n".join(lines)


def _link(address: str) -> str:
    """The last parts of an address, as a link to it."""
    return f"[{address.partition('#')[0].rsplit('/', 1)[-1]}]({address})"


TABLES = {
    "Model types": support_table,
    "Sources": sources_table,
    "Sizes": forms_table,
    "Layers of different widths": mixed_table,
    "Keys of `config.json`": keys_table,
}

if __name__ == "__main__":
    sys.stdout.write("\n".join(f"## {title}\n\n{table()}\n" for title, table in TABLES.items()))
