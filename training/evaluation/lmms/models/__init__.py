"""Models of the plugin, as `LMMS_EVAL_PLUGINS` reads them: file name -> class."""

AVAILABLE_MODELS = {"unit_llava": "UnitLlava"}
