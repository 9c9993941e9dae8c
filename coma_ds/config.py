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

from coma_ds.recipe_files import merge, parse_overrides, read_recipe, wrong_values

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
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML 1.1 reads 1e3 as text; where a whole number is wanted, it is one.  yes is none."""
        wanted = cls.model_fields[info.field_name].annotation
        kinds = (wanted, *get_args(wanted))
        if isinstance(value, bool) and {int, float} & {*kinds} and bool not in kinds:
            raise ValueError(f"expected a number, got {str(value).lower()}")
        if isinstance(value, str) and int in kinds:
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
    targets: tuple[str, ...] = Field(("q_proj", "k_proj", "v_proj", "o_proj"), min_length=1)


PACKED_ARITHMETIC = ("flash_attn", "flash_attn_4", "varlen", "flex")


class ModelConfig(Section):
    """What is trained, and how it is arranged."""

    path: str = "builtin:demo-base"  # a folder, a hub name, or builtin:NAME
    family: Family | None = None  # checked when given
    weights: Literal["pretrained", "random"] = "pretrained"
    compression_tokens: int = Field(32, ge=0)
    bottleneck: Literal["kv", "last_hidden"] = "kv"
    pooling: Literal["mean", "attention", "last"] = "mean"
    pooling_heads: int = Field(1, ge=1)  # of attention pooling
    adapter: Literal["none", "lora", "dora"] = "none"
    lora: LoRAConfig = LoRAConfig()
    train_vision: bool = False
    attention: Literal["auto", "split", "dense", "packed"] = "auto"
    # what computes it; the last four on packed sequences and a GPU (auto takes the first there is)
    arithmetic: Literal[
        "auto", "sdpa", "matmul", "flash_attn", "flash_attn_4", "varlen", "flex"
    ] = "auto"
    liger: bool | Literal["auto"] = "auto"  # fused kernels, where installed and on a GPU
    gradient_checkpointing: bool = False
    min_vision_tokens: int | None = Field(None, ge=1)  # None: what the processor says
    max_vision_tokens: int | None = Field(None, ge=1)
    max_length: int = Field(8192, ge=16)

    @model_validator(mode="after")
    def _vision_tokens(self):
        low, high = self.min_vision_tokens, self.max_vision_tokens
        if low and high and low > high:
            raise ValueError(f"min_vision_tokens {low} is above max_vision_tokens {high}")
        if self.attention in ("split", "dense") and self.arithmetic in PACKED_ARITHMETIC:
            raise ValueError(
                f"arithmetic {self.arithmetic!r} works on packed sequences, not with attention "
                f"{self.attention!r}: use 'packed' or 'auto'"
            )
        if self.pooling_heads > 1 and self.pooling != "attention":
            raise ValueError(
                f"pooling_heads {self.pooling_heads} has no effect with pooling {self.pooling!r}: "
                "use 'attention'"
            )
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
    sources: tuple[str, ...] = ()  # builtin: empty takes all; mmeb: names of sets
    split: str = "original"
    limit: int | None = Field(None, ge=1)  # rows of each source
    weighting: Literal["uniform", "proportional"] = "uniform"
    sub_batch: int = Field(0, ge=0)  # 0: sources mixed freely
    # what coma-ds prepare wrote: the ranks then share each batch so that all have as many tokens
    lengths: str | None = None
    min_score: float | None = None  # pairs: rows with a lower score are left out, and counted
    columns: dict[str, str] = {}  # pairs: our column name to the file's
    leave_out_empty: bool = False  # mmeb: rows with an empty side are left out, and counted
    bad_rows: float = Field(0.0, ge=0, lt=1)  # share of rows that others may replace; 0: none
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

    @property
    def taught(self) -> bool:
        """Whether a teacher's forward goes in front of each."""
        return self.loss == "kl"

    @model_validator(mode="after")
    def _teacher(self):
        if self.visible and self.loss == "kl":
            raise ValueError(
                "loss 'kl' with visible: the teacher sees the image too, so there is nothing to "
                "learn; use 'ce'"
            )
        return self


class MatchConfig(Section):
    """Stage 2.  Cosines are in -1..1; what each option does: ``coma_ds.kernels.info_nce``."""

    temperature: float = Field(0.03, gt=0)
    task_temperature: dict[str, Annotated[float, Field(gt=0)]] = {}  # by task (source) name
    learn_temperature: bool = False
    mask_false_negatives: bool = True  # equal content never competes, across ranks too
    false_negative_margin: float | None = None  # nor does a cosine above the positive's plus this
    hardness: float = Field(0.0, ge=0)  # a negative counts exp(hardness * cosine) times
    hard_negatives: Literal["shared", "own"] = "shared"  # of all rows and ranks, or of their pair
    query_negatives: bool = False  # the other queries compete too
    target_negatives: bool = False  # as do the other targets as seen from the positive
    symmetric: bool = False  # and from targets to queries, half and half
    matryoshka: tuple[Annotated[int, Field(ge=1)], ...] = ()  # widths trained beside the full one
    matryoshka_weights: tuple[Annotated[float, Field(gt=0)], ...] = ()  # one each; empty: all 1
    loss_dtype: Literal["fp32", "bf16"] = "fp32"  # what embeddings are rounded to in the loss

    @model_validator(mode="after")
    def _options_fit(self):
        if self.symmetric:
            one_way = ("query_negatives", "target_negatives")
            clash = [name for name in one_way if getattr(self, name)]
            clash += ["hard_negatives 'own'"] * (self.hard_negatives == "own")
            if clash:
                raise ValueError(f"symmetric does not go with {clash[0]}: leave one of them out")
        widths, weights = self.matryoshka, self.matryoshka_weights
        if list(widths) != sorted(set(widths)):
            raise ValueError(f"matryoshka {list(widths)}: expected increasing widths")
        if weights and len(weights) != len(widths):
            raise ValueError(
                f"matryoshka_weights {list(weights)}: expected one for each of the "
                f"{len(widths)} widths of matryoshka"
            )
        return self


class ChunkConfig(Section):
    """What goes through the model at a time: so many samples, and padded tokens, at most.

    ``keep``, in stage 2: chunks whose graph stays in memory instead of a replay.  ``auto``: as the
    memory allows that the first step finds.
    """

    samples: int = Field(64, ge=1)
    tokens: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    keep: Annotated[int, Field(ge=0)] | Literal["auto"] = 0


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    batch_size: int = Field(256, ge=1)  # pairs or dialogues of one optimizer step, all ranks
    steps: int = Field(100, ge=0)  # 0: export and evaluate what it starts from
    lr: float = Field(5e-5, gt=0, le=1e30)
    token_lr: float | None = Field(None, gt=0, le=1e30)  # compression tokens; None: lr
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    warmup: float = Field(0.05, ge=0, le=1)  # share of the steps
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    clip: float = Field(1.0, ge=0)  # 0: off
    kind: Literal["adamw", "muon", "sgd"] = "adamw"

    @model_validator(mode="after")
    def _rates(self):
        if self.kind == "muon" and self.token_lr:
            raise ValueError(
                "token_lr has no effect with kind 'muon', which has one rate: leave it out "
                "(optim.token_lr=null)"
            )
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
    every: int = Field(0, ge=0)  # steps, and at the end; 0: only when asked to save or stop
    resume: str = "auto"  # auto | none | a checkpoint folder
    keep_last: int = Field(2, ge=0)  # 0: all
    keep_every: int = Field(0, ge=0)  # those of steps that it divides stay as well; 0: none
    # An evaluated value (group/All, the name of a set, KIND/tokens in stage 1): every evaluated
    # step is saved too, and the checkpoint where it was highest stays.
    best: str = ""


class GuardConfig(Section):
    """What becomes of steps that go wrong."""

    skips_in_a_row: int = Field(10, ge=1)  # steps without a finite gradient that end the run
    spike: float = Field(8.0, ge=0)  # a loss so many deviations above the last is told; 0: off
    skip_spikes: bool = False  # and its step left out


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
    # autocast: fp32 weights, bf16 products; auto: bf16, or fp32 on a CPU where that is faster
    precision: Literal["auto", "bf16", "fp32", "autocast"] = "bf16"
    deepspeed: str = "zero3"  # a name in ds_configs/, or a JSON file
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    compress: CompressConfig = CompressConfig()
    match: MatchConfig = MatchConfig()
    chunk: ChunkConfig = ChunkConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
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
        if self.objective == "match" and size == 1:
            raise ValueError(
                "optim.batch_size is 1: a pair alone has no other target to be told from"
            )
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
    if recipe is not None:
        tree = read_recipe(recipe)
        _check_keys(tree, known, f"recipe {recipe!r}")
        tree = {"recipe": recipe, **tree}
    over = parse_overrides(overrides or [])
    _check_keys(over, known, "override")
    return validate(merge(tree, over))


def validate(tree: dict) -> RunConfig:
    """The typed config of a tree; ``ValueError`` with one line for each wrong value."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ValueError("; ".join(wrong_values(error.errors(), _known_keys(RunConfig)))) from None


def dump(config: RunConfig) -> str:
    """The whole tree as YAML; ``load_config`` of that file gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
