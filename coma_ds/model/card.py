"""The model card of an exported folder; its Python blocks are run by the tests."""

from __future__ import annotations

from coma_ds.config import RunConfig
from coma_ds.data.processing import COMPRESSION_TOKEN, POOLING_FILE

POOL = {
    "mean": "rows.mean(0)",
    "last": "rows[-1]",
    "attention": "attend(rows.view(K, *query.shape))",
}
POOL_WORDS = {
    "mean": "the mean of their final hidden states",
    "last": "the final hidden state of the last of them",
    "attention": f"the mean of their final hidden states weighted by attention (`{POOLING_FILE}`)",
}
ATTEND = f"""query = load_file(f"{{{{folder}}}}/{POOLING_FILE}")["query"].view({{heads}}, -1)


def attend(rows):
    weights = torch.softmax((rows * query).sum(-1) * query.shape[1] ** -0.5, 0)
    return (weights[..., None] * rows).sum(0).flatten()


"""
EMBEDDER = """```python
from coma_ds import Embedder

embedder = Embedder(".")  # this folder
vectors = embedder.encode(texts=["a red car"])  # float32 [1, width], unit length
```
"""
STOCK = """```python
import torch
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
{imports}
folder = "."  # this folder
model = AutoModelForImageTextToText.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
{setup}K = {count}
TOKENS = "".join(f"{token}" for k in range(K))
MARK = "<|image_1|>"  # where the image stands in the text; without it, first


@torch.no_grad()
def embed(text="", image=None):
    pixels = {{}}
    if image is not None:
        image = ImageOps.exif_transpose(image).convert("RGBA")  # upright, on white
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        pixels = image_processor(images=image, return_tensors="pt")
        count = int(pixels["image_grid_thw"].prod()) // image_processor.merge_size**2
        shown = "<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>"
        text = text if MARK in text else " ".join(filter(None, (MARK, text)))
        text = text.replace(MARK, shown)
    ids = tokenizer(text + TOKENS, add_special_tokens=False, return_tensors="pt")["input_ids"]
    image_places = (ids == model.config.image_token_id).int()
    states = model.model(input_ids=ids, mm_token_type_ids=image_places, **pixels)
    rows = states.last_hidden_state[0, -K:].float()
    return torch.nn.functional.normalize({pool}, dim=-1)
```
"""


def model_card(config: RunConfig, step: int) -> str:
    """The README of the folder that a run of ``config`` exports after ``step`` steps."""
    start = config.init_from or config.model.path
    if config.model.weights == "random":
        start = "random weights"
    how = {"none": "full training", "lora": "LoRA, merged", "dora": "DoRA, merged"}
    tags = ["coma-ds", config.objective, config.model.bottleneck]
    return f"""---
library_name: transformers
pipeline_tag: feature-extraction
tags: [{", ".join(tags)}]
---
# {config.recipe or config.objective}

Trained by coma-ds from {start}: objective `{config.objective}`,
{step} of {config.optim.steps} steps of {config.optim.batch_size} samples,
{how[config.model.adapter]}, precision {config.precision}, seed {config.seed}.

{_use(config)}
The folder is a plain transformers model: `from_pretrained` of the stock classes loads it without
missing or unexpected weights. Tokenizer and image processor lie beside it, and `coma_ds.json` says
what coma-ds must know to go on from here (`init_from`).
"""


def _use(config: RunConfig) -> str:
    count, kind = config.model.compression_tokens, config.model.pooling
    if not count:
        return "An ordinary language model that sees images; it has no compression tokens.\n"
    first, last = COMPRESSION_TOKEN.format(0), COMPRESSION_TOKEN.format(count - 1)
    attention = kind == "attention"
    stock = STOCK.format(
        imports="from safetensors.torch import load_file\n" if attention else "",
        setup=ATTEND.format(heads=config.model.pooling_heads) if attention else "",
        count=count,
        token=COMPRESSION_TOKEN.format("{k}"),
        pool=POOL[kind],
    )
    caution = (
        "Stage 1 trains the tokens to carry what an image says, not their final states to match:\n"
        "as an embedding model it is unfinished, `match` is the next stage.\n\n"
        if config.objective == "compress"
        else ""
    )
    return f"""{caution}An embedding is {POOL_WORDS[kind]}, of unit length, where the
{count} compression tokens `{first}` to `{last}` end the input. No chat template.

With coma-ds:

{EMBEDDER}
With transformers alone, one input at a time:

{stock}
coma-ds cuts texts to {config.model.max_length} tokens and scales 16-bit grey images to 8 bits; the
recipe above does neither.
"""
