"""LLaVA models with UNIT's tower in lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval).

A plugin of lmms-eval: model `unit_llava`, and tasks from a file of one's own. lmms-eval finds it through the entry
point of the installed package, or where `LMMS_EVAL_PLUGINS=training.evaluation.lmms` is in the environment.
`unit lmms` (:mod:`training.evaluation.lmms.run`) does the rest.

lmms-eval has a `llava_hf` of its own. Read in 0.7.3, it does not do for these models:

* transformers finds a tower of `model_type` "unit_vision_model" in a registry that only `import modeling_unit` fills;
* it wants CUDA unless told otherwise, and decord, a video reader, at import;
* it answers one question at a time;
* an answer that fails is an empty answer, and nobody is told how many there were;
* it leaves the stopping strings of a task aside.

So the plugin is thin: it loads, batches, counts what fails; what is asked and how it is marked is lmms-eval's.
"""

from __future__ import annotations

MODEL = "unit_llava"
CLASS_PATH = "training.evaluation.lmms.models.unit_llava.UnitLlava"


def manifest():
    """What lmms-eval's entry point `lmms_eval.models` asks for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL, simple_class_path=CLASS_PATH)
