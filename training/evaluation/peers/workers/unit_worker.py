"""A UNIT checkpoint as `unit read` has it, in a process of its own, so that its time and memory can be set beside
those of peers: `python unit_worker.py SETTINGS`, JSON of `source`, `device`, `threads`."""

import json
import sys

from training.evaluation.peers.workers.serve import peak_memory, serve


def start(settings):
    """`(version, read)` of :func:`serve`; a picture of two words is read first, as with every worker."""
    import torch
    import transformers
    from PIL import Image, ImageDraw

    from modeling_unit import Reader

    torch.set_num_threads(settings["threads"])
    transformers.logging.disable_progress_bar()
    reader = Reader.from_pretrained(settings["source"], device=settings["device"])
    picture = Image.new("RGB", (160, 32), "white")
    ImageDraw.Draw(picture).text((10, 10), "warming up", fill="black")
    reader.read_many([picture])

    def read(pixels, request):
        image = Image.frombytes("RGB", (request["width"], request["height"]), pixels)
        text = reader.read_many([image])[0].text
        on_gpu = settings["device"].startswith("cuda")
        return text, torch.cuda.max_memory_allocated() if on_gpu else peak_memory()

    return f"torch {torch.__version__}", read


if __name__ == "__main__":
    serve(lambda: start(json.loads(sys.argv[1])))
