"""The built-in picture set: real drawings of some 1,900 concepts by six artists.

``build.py`` makes the data files next to this module; ``NOTICE.md`` says whose work they are.
"""

from coma_ds.data.builtin.baseline import pixel_baseline
from coma_ds.data.builtin.dialogues import BottleneckQuestions, BuiltinDialogues
from coma_ds.data.builtin.evaluation_sets import write_mmeb_eval
from coma_ds.data.builtin.pairs import BuiltinPairs
from coma_ds.data.builtin.pictures import (
    TEST_STYLE,
    TRAINING_STYLES,
    BuiltinPicture,
    CropPicture,
    PictureSet,
    ScenePicture,
)

__all__ = [
    "TEST_STYLE",
    "TRAINING_STYLES",
    "BottleneckQuestions",
    "BuiltinDialogues",
    "BuiltinPairs",
    "BuiltinPicture",
    "CropPicture",
    "PictureSet",
    "ScenePicture",
    "pixel_baseline",
    "write_mmeb_eval",
]
