#!/usr/bin/env python3
"""Renders chat templates as transformers does and writes what exl-gen must reproduce.

    pip install transformers jinja2
    python exl-gen/tests/golden/templates.py                     # own-templates.json
    python exl-gen/tests/golden/templates.py PATH/chat-templates # and shared-templates.json

`own-templates.json` holds the texts rendered from fragments.json and templates/*.jinja.
`shared-templates.json` holds only an FNV-1a hash of each rendering, in the order of
conversations.json (without, then with generation prompt), because published templates are not ours
to copy. null and "-" stand for a rendering that transformers refuses.
"""
import datetime
import json
import pathlib
import sys

import transformers.utils.chat_template_utils as chat

HERE = pathlib.Path(__file__).parent
DATA = json.loads((HERE / "conversations.json").read_text(encoding="utf-8"))
NOW = datetime.datetime.fromisoformat(DATA["now"])


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


chat.datetime = Clock


def fnv(text):
    value = 0xCBF29CE484222325
    for byte in text.encode("utf-8"):
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def render(template, case, prompt):
    # apply_chat_template drops keys whose value is None before it renders.
    messages = [{k: v for k, v in m.items() if v is not None} for m in case["messages"]]
    if prompt and case.get("continue"):
        return None  # apply_chat_template refuses the pair before it renders
    try:
        texts, _ = chat.render_jinja_template(
            conversations=[messages],
            tools=case.get("tools"),
            documents=case.get("documents"),
            chat_template=template,
            add_generation_prompt=prompt,
            continue_final_message=case.get("continue", False),
            **{**DATA["variables"], **case.get("variables", {})},
        )
        return texts[0]
    except Exception as error:  # any refusal counts, whatever its Python type
        if "-v" in sys.argv:
            print("   ", case["name"], type(error).__name__, str(error)[:150], file=sys.stderr)
        return None


def renderings(template):
    return [render(template, case, prompt) for case in DATA["cases"] for prompt in (False, True)]


def write(name, result):
    text = json.dumps(result, ensure_ascii=False, indent=1)
    (HERE / name).write_text(text + "\n", encoding="utf-8")
    print("wrote", name)


def templates(folder):
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}


if __name__ == "__main__":
    case = {"name": "fragment", "messages": DATA["cases"][2]["messages"], "variables": {"x": {"a": 1}}}
    fragments = json.loads((HERE / "fragments.json").read_text(encoding="utf-8"))
    own = {
        "fragments": [render(fragment, case, True) for fragment in fragments],
        "templates": {name: renderings(text) for name, text in templates(HERE / "templates").items()},
    }
    write("own-templates.json", own)
    for folder in sys.argv[1:]:
        if not folder.startswith("-"):
            shared = {
                name: " ".join("-" if r is None else fnv(r) for r in renderings(text))
                for name, text in templates(pathlib.Path(folder)).items()
            }
            write("shared-templates.json", shared)
