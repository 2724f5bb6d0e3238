"""rapidocr, in its own environment: `python -I rapidocr_worker.py '{"threads": 2}'`. Nothing of UNIT is imported."""

import json
import os
import sys


def start(settings):
    """`(version, read)` of `serve`."""
    import importlib.metadata

    import numpy
    from PIL import Image, ImageDraw, ImageFont
    from rapidocr import RapidOCR

    engine = RapidOCR(
        params={
            "Global.log_level": "critical",
            "EngineConfig.onnxruntime.intra_op_num_threads": settings["threads"],
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )

    def read(pixels, request):
        rgb = numpy.frombuffer(pixels, dtype=numpy.uint8).reshape(request["height"], request["width"], 3)
        found = engine(numpy.ascontiguousarray(rgb[:, :, ::-1]))  # arrays are BGR to it
        return "\n".join(found.txts or ())

    # its three models are loaded when they are first needed: have it read two words before anything is timed
    picture = Image.new("RGB", (320, 64), "white")
    ImageDraw.Draw(picture).text((10, 10), "warming up", fill="black", font=ImageFont.load_default(size=36))
    read(picture.tobytes(), {"width": picture.width, "height": picture.height})
    return "rapidocr " + importlib.metadata.version("rapidocr"), read


if __name__ == "__main__":
    # after all that the isolated mode finds, so that nothing is shadowed
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    from serve import serve

    serve(lambda: start(json.loads(sys.argv[1])))
