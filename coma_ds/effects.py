"""Which keys of a config do nothing in a run of its kind."""

from __future__ import annotations

from coma_ds.config import RunConfig
from coma_ds.recipe_files import parse_overrides

_FORMATS = {  # the keys of data that a format reads, beside those that all of them do
    "builtin": ("length", "turns", "sources"),
    "mmeb": ("root", "image_root", "sources", "split", "limit", "leave_out_empty"),
    "pairs": ("path", "image_root", "limit", "min_score", "columns"),
    "dialogues": ("path", "image_root", "limit"),
}


def check_effect(config: RunConfig, overrides: list[str]) -> None:
    """Raise ``ValueError`` for an override that changes nothing of this run.

    A recipe may hold such keys, its heirs can use them; on a command line they are a mistake.
    """
    over = parse_overrides(overrides)
    matching, of_format = config.objective == "match", _FORMATS[config.data.format]
    objective = f"objective {config.objective!r}"
    idle = {key: objective for key in (("compress",) if matching else ("match",))}
    idle |= dict.fromkeys(
        ("eval.path", "eval.bottleneck_questions") if matching else ("eval.root", "eval.sets"),
        objective,
    )
    idle |= {
        f"data.{key}": f"data.format {config.data.format!r}"
        for key in {key for keys in _FORMATS.values() for key in keys} - {*of_format}
    }
    if config.model.adapter == "none":
        idle["model.lora"] = "model.adapter 'none'"
    if config.init_from:
        idle["model.path"] = "init_from, which names the model (init_from=null leaves it out)"
    for key, cause in idle.items():
        section, _, leaf = key.partition(".")
        node = over.get(section, {})
        given = node if not leaf else {leaf: node[leaf]} if leaf in node else {}
        part = getattr(config, section)
        for name in given:
            fields = type(part).model_fields
            if getattr(part, name) != fields[name].get_default():
                raise ValueError(f"override {section}.{name} has no effect with {cause}")
