"""The run configuration: one frozen, typed tree; defaults < recipe < dotted overrides.

The run config owns batch, clipping, learning rate and precision; the DeepSpeed JSON owns ZeRO
mechanics.  An unknown key is an error that names the nearest one.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from coma_ds.recipe_files import merge, parse_overrides, read_recipe

Family = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
FAMILIES: tuple[str, ...] = get_args(Family)


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _scientific(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML 1.1 reads 1e3 as text; where a whole number is wanted, it is one."""
        wanted = cls.model_fields[info.field_name].annotation
        if isinstance(value, str) and int in (wanted, *get_args(wanted)):
            try:
                return float(value)
            except ValueError:
                pass
        return value


class LoRAConfig(Section):
    """Adapters of the language model (peft)."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(64, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


class ModelConfig(Section):
    """What is trained, and how it is arranged."""

    path: str = "builtin:demo-base"  # a folder, a hub name, or builtin:NAME
    family: Family | None = None  # checked when given
    weights: Literal["pretrained", "random"] = "pretrained"
    compression_tokens: int = Field(32, ge=0)
    bottleneck: Literal["kv", "last_hidden"] = "kv"
    pooling: Literal["mean", "attention", "last"] = "mean"
    adapter: Literal["none", "lora", "dora"] = "none"
    lora: LoRAConfig = LoRAConfig()
    train_vision: bool = False
    attention: Literal["auto", "split", "dense", "packed"] = "auto"
    arithmetic: Literal["auto", "sdpa", "matmul"] = "auto"
    gradient_checkpointing: bool = False
    min_vision_tokens: int | None = Field(None, ge=1)  # None: what the processor says
    max_vision_tokens: int | None = Field(None, ge=1)
    max_length: int = Field(8192, ge=16)

    @model_validator(mode="after")
    def _vision_tokens(self):
        low, high = self.min_vision_tokens, self.max_vision_tokens
        if low and high and low > high:
            raise ValueError(f"min_vision_tokens {low} is above max_vision_tokens {high}")
        tokens = self.compression_tokens
        if (high or 0) + tokens >= self.max_length:
            images = f"max_vision_tokens {high} and " if high else ""
            raise ValueError(
                f"{images}{tokens} compression tokens do not fit in max_length {self.max_length}"
            )
        return self


class DataConfig(Section):
    """Where the samples come from."""

    format: Literal["builtin", "mmeb", "pairs", "dialogues"] = "builtin"
    root: str | None = None  # mmeb: folder of parquet folders, or a hub name
    path: str | None = None  # pairs, dialogues: one file
    image_root: str | None = None
    sources: tuple[str, ...] = ()  # empty: all
    split: str = "original"
    limit: int | None = Field(None, ge=1)  # rows of each source
    weighting: Literal["uniform", "proportional"] = "uniform"
    sub_batch: int = Field(0, ge=0)  # 0: sources mixed freely
    min_score: float | None = None  # pairs: rows with a lower score are left out, and counted
    columns: dict[str, str] = {}  # pairs: our column name to the file's
    leave_out_empty: bool = False  # mmeb: rows with an empty side are left out, and counted
    workers: int = Field(1, ge=0)
    length: int = Field(100_000, ge=1)  # builtin: samples of an epoch
    turns: tuple[int, int] = (3, 5)  # builtin dialogues: least and most

    @model_validator(mode="after")
    def _turns(self):
        if not 1 <= self.turns[0] <= self.turns[1]:
            raise ValueError(
                f"turns {list(self.turns)}: expected (least, most), 1 <= least <= most"
            )
        return self


class CompressConfig(Section):
    """Stage 1."""

    loss: Literal["ce", "kl"] = "ce"
    format: Literal["multi_turn", "single_turn", "description", "caption"] = "multi_turn"
    visible: bool = False  # rule off: the dialogue sees the image

    @model_validator(mode="after")
    def _teacher(self):
        if self.visible and self.loss == "kl":
            raise ValueError(
                "loss 'kl' with visible: the teacher sees the image too, so there is nothing to "
                "learn; use 'ce'"
            )
        return self


class MatchConfig(Section):
    """Stage 2."""

    temperature: float = Field(0.03, gt=0)
    learn_temperature: bool = False
    mask_false_negatives: bool = True


class ChunkConfig(Section):
    """What goes through the model at a time: samples, or padded tokens where that is set."""

    samples: int = Field(64, ge=1)
    tokens: int | None = Field(None, ge=1)


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    batch_size: int = Field(256, ge=1)  # pairs or dialogues of one optimizer step, all ranks
    steps: int = Field(100, ge=0)  # 0: export and evaluate what it starts from
    lr: float = Field(5e-5, gt=0)
    token_lr: float | None = Field(None, gt=0)  # compression tokens; None: lr
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    warmup: float = Field(0.05, ge=0, le=1)  # share of the steps
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    clip: float = Field(1.0, ge=0)  # 0: off
    kind: Literal["adamw", "muon", "sgd"] = "adamw"

    @model_validator(mode="after")
    def _rates(self):
        if self.kind == "muon" and self.token_lr:
            raise ValueError("token_lr has no effect with kind 'muon', which has one rate")
        return self


class EvalConfig(Section):
    every: int = Field(0, ge=0)  # steps; 0: at the end only
    at_end: bool = True
    root: str | None = None  # an MMEB-eval folder; None: the built-in sets for built-in data
    image_root: str | None = None
    sets: tuple[str, ...] = ()  # empty: all
    along: tuple[str, ...] = ()  # the sets of evaluations on the way; empty: the same
    batch_size: int = Field(128, ge=1)
    bottleneck_questions: int = Field(200, ge=0)  # of each kind
    path: str | None = None  # compress: a dialogue file to ask; None: the built-in questions


class CheckpointConfig(Section):
    every: int = Field(0, ge=0)  # steps, and at the end; 0: none are written
    resume: str = "auto"  # auto | none | a checkpoint folder


class LoggingConfig(Section):
    every: int = Field(1, ge=1)
    tensorboard: bool = True
    progress: bool = True


class RunConfig(Section):
    """One run.  ``recipe`` is the name it came from, for the record."""

    recipe: str = ""
    objective: Literal["compress", "match"] = "compress"
    output: str = Field("runs/demo-compress", min_length=1)
    init_from: str | None = None  # a finished run, or a model folder
    seed: int = Field(0, ge=0)
    precision: Literal["bf16", "fp32", "autocast"] = "bf16"  # autocast: fp32 weights, bf16 products
    deepspeed: str = "zero3"  # a name in ds_configs/, or a JSON file
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    compress: CompressConfig = CompressConfig()
    match: MatchConfig = MatchConfig()
    chunk: ChunkConfig = ChunkConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _consistent(self):
        needs_tokens = self.objective == "match" or not self.compress.visible
        if needs_tokens and self.model.compression_tokens == 0:
            raise ValueError(
                "model.compression_tokens is 0: this objective reads the image through them, "
                "use 1 or more (0 is only for compress.visible=true)"
            )
        if self.init_from and self.model.weights == "random":
            raise ValueError(
                f"model.weights is 'random', but init_from {self.init_from!r} names the model to "
                "start from: leave one of them out"
            )
        if self.init_from:
            source, output = Path(self.init_from).absolute(), Path(self.output).absolute()
            if output in (source, source.parent if source.name == "model" else source):
                raise ValueError(
                    f"output {self.output!r} is the run that init_from names: it would be replaced"
                )
        if self.objective == "match" and self.data.format == "dialogues":
            raise ValueError("data.format 'dialogues' has no pairs: objective 'match' needs pairs")
        if self.objective == "compress" and self.data.format in ("mmeb", "pairs"):
            raise ValueError(
                f"data.format {self.data.format!r} has no dialogues: objective 'compress' needs "
                "'builtin' or 'dialogues'"
            )
        size, sub = self.optim.batch_size, self.data.sub_batch
        if sub and size % sub:
            raise ValueError(f"optim.batch_size {size} is not a multiple of data.sub_batch {sub}")
        return self


def _known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += _known_keys(inner, f"{prefix}{name}.")
    return keys


def _nearest(key: str, known: list[str]) -> str:
    leaf = key.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(key, known, 1, 0.5) or [
        k for k in known if k.rsplit(".", 1)[-1] == leaf
    ]
    return f"; did you mean {close[0]!r}?" if close else ""


def _check_keys(tree: dict, known: list[str], source: str, prefix: str = "") -> None:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key not in known:
            raise ValueError(f"{source}: unknown key {key!r}{_nearest(key, known)}")
        is_section = any(k.startswith(key + ".") for k in known)
        if is_section and not isinstance(value, dict):
            raise ValueError(f"{source}: {key!r} is a section, give its keys ({key}.KEY=VALUE)")
        if is_section:
            _check_keys(value, known, source, key + ".")


def load_config(recipe: str | None, overrides: list[str] | None = None) -> RunConfig:
    """Defaults, then the recipe, then the overrides, checked as a whole.

    Raises ``ValueError`` with the key and what was expected.
    """
    known = [k for k in _known_keys(RunConfig)]
    tree: dict = {}
    if recipe:
        tree = read_recipe(recipe)
        _check_keys(tree, known, f"recipe {recipe!r}")
        tree = {"recipe": recipe, **tree}
    over = parse_overrides(overrides or [])
    _check_keys(over, known, "override")
    return validate(merge(tree, over))


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
        idle["model.path"] = "init_from, which names the model"
    for key, cause in idle.items():
        section, _, leaf = key.partition(".")
        node = over.get(section, {})
        given = node if not leaf else {leaf: node[leaf]} if leaf in node else {}
        part = getattr(config, section)
        for name in given:
            fields = type(part).model_fields
            if getattr(part, name) != fields[name].get_default():
                raise ValueError(f"override {section}.{name} has no effect with {cause}")


def validate(tree: dict) -> RunConfig:
    """The typed config of a tree; ``ValueError`` with one line for each wrong value."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            message = item["msg"].removeprefix("Value error, ")
            given = "" if item["type"] == "value_error" else f" (given: {item['input']!r})"
            lines.append(f"{key}: {message}{given}" if key else message)
        raise ValueError("; ".join(lines)) from None


def dump(config: RunConfig) -> str:
    """The whole tree as YAML; ``load_config`` of that file gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
